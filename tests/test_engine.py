"""Perturbation batches: right, whatever their size, and nothing of the model left changed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import MODELS, VOCABULARY, WINDOW, gpt2, llama, plain_loop
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from atman_triton import engine
from atman_triton.engine import (
    Settings,
    automatic_batch_size,
    check_causal,
    context_window,
    keeps_logits,
    run_perturbations,
    undisturbed,
    vocabulary_size,
)
from atman_triton.integration import UnsupportedModelError
from atman_triton.testing import assert_close_to_oracle

INPUT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84]
TARGET = [84, 62, 64]
INPUT_IDS = INPUT + TARGET[:-1]
UNITS = [(0,), (1, 2), (5,), (9,), (11,)]


def run(model, batch_size="auto", **changes):
    how: dict[str, Any] = {"factor": 0.1, "mode": "min_shift", "batch_size": batch_size}
    with undisturbed(model):
        return run_perturbations(model, INPUT_IDS, TARGET, UNITS, Settings(**how | changes))


def together(result):
    return torch.cat([result.base_logprobs[None], result.suppressed_logprobs.T])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
def test_log_probabilities_are_those_of_a_plain_loop(name, mode):
    model = MODELS[name]()
    eager = plain_loop(model, INPUT_IDS, TARGET, UNITS, 0.1, mode)
    try:
        truth = plain_loop(model.double(), INPUT_IDS, TARGET, UNITS, 0.1, mode)
    finally:
        model.float()
    result = run(model, mode=mode)
    assert_close_to_oracle(together(result), eager, truth, name="log-probabilities")
    # It proves nothing unless each unit moves its targets far beyond rounding.
    moved = (truth[1:] - truth[0]).abs().amax(1)
    assert moved.min() > 100 * (eager - truth).abs().max()


def test_layers_and_heads_are_passed_on():
    model, chosen = llama(), {"layers": (1,), "heads": (0, 3)}
    eager = plain_loop(model, INPUT_IDS, TARGET, UNITS, 0.1, "min_shift", **chosen)
    truth = plain_loop(model.double(), INPUT_IDS, TARGET, UNITS, 0.1, "min_shift", **chosen)
    everywhere = together(run(model.float()))
    result = together(run(model, **chosen))
    assert_close_to_oracle(result, eager, truth)
    assert (everywhere - result).abs().max() > 100 * (eager - truth).abs().max()


def test_min_shift_full_goes_to_the_reference():
    model = llama()
    eager = plain_loop(model, INPUT_IDS, TARGET, UNITS, 0.1, "min_shift_full")
    truth = plain_loop(model.double(), INPUT_IDS, TARGET, UNITS, 0.1, "min_shift_full")
    assert_close_to_oracle(together(run(model.float(), mode="min_shift_full")), eager, truth)
    with pytest.raises(ValueError, match="use backend='reference'"):
        run(model, mode="min_shift_full", backend="torch")


@given(
    name=st.sampled_from(sorted(MODELS)),
    batch_size=st.integers(1, 9),
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
    target=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
)
@settings(max_examples=15, deadline=None)
def test_any_batch_size_gives_the_same(name, batch_size, prompt, target):
    model, ids = MODELS[name](), prompt + target[:-1]
    units = [(token,) for token in range(len(ids))]
    try:
        model.double()  # so that only the last step, to float32, rounds visibly
        with undisturbed(model):
            batched, single = (
                run_perturbations(
                    model, ids, target, units, Settings(0.1, "min_shift", batch_size=size)
                )
                for size in (batch_size, 1)
            )
    finally:
        model.float()
    assert sum(batched.batch_sizes) == len(single.batch_sizes) == len(units) + 1
    assert max(batched.batch_sizes) <= batch_size
    one_step = torch.finfo(torch.float32).eps
    torch.testing.assert_close(together(batched), together(single), rtol=one_step, atol=0)


def test_logits_are_asked_for_at_target_positions_only():
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    result = run(model, batch_size=4)
    assert result.logits == "target positions"
    assert seen == [(4, len(TARGET), VOCABULARY), (2, len(TARGET), VOCABULARY)]


class WithoutLogitsToKeep(LlamaForCausalLM):
    """Gives logits at every position, as older models do."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, return_dict=None):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            return_dict=return_dict,
        )


def test_models_without_logits_to_keep_are_sliced():
    plain, sliced = llama(), llama(WithoutLogitsToKeep)
    assert keeps_logits(plain)
    assert not keeps_logits(sliced)
    result = run(sliced)
    assert result.logits == "all positions"
    torch.testing.assert_close(together(result), together(run(plain)), rtol=0, atol=1e-5)


def test_compiled_models_still_keep_logits():
    assert keeps_logits(torch.compile(llama(), backend="eager"))


def test_the_vocabulary_is_reduced_some_rows_at_a_time(monkeypatch):
    whole = together(run(llama()))
    monkeypatch.setattr(engine, "_REDUCTION_BYTES", 4 * VOCABULARY * 2)
    assert torch.equal(together(run(llama())), whole)


def test_half_precision_is_reduced_in_float32():
    logits = torch.randn(2, 3, 50).bfloat16()
    targets = torch.tensor([1, 2, 3])
    expected = logits.double().log_softmax(-1)[:, [0, 1, 2], [1, 2, 3]]
    result = engine._target_logprobs(logits, targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


# --- memory -------------------------------------------------------------------------------------


def crowded(model, most, error):
    """Let the model run out of memory with more than ``most`` rows; returns the rows tried."""
    tried = []

    def refuse(module, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > most:
            raise error

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
    ids=["cuda", "windows", "linux", "python"],
)
def test_automatic_batches_are_halved_when_memory_runs_out(error):
    expected = together(run(llama(), batch_size=1))
    model = llama()
    tried = crowded(model, most=2, error=error)
    result = run(model)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert result.batch_sizes == [1] * 6
    torch.testing.assert_close(together(result), expected, rtol=0, atol=1e-5)


def test_finished_batches_are_not_run_again(monkeypatch):
    monkeypatch.setattr(engine, "automatic_batch_size", lambda *_: 4)
    expected = together(run(llama(), batch_size=1))
    model, tried = llama(), []

    def refuse(module, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if len(tried) == 2:  # something else took the memory meanwhile
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    result = run(model)
    assert tried == [4, 2, 1, 1]
    torch.testing.assert_close(together(result), expected, rtol=0, atol=1e-5)


def test_one_row_that_does_not_fit_is_an_error():
    model = llama()
    crowded(model, most=0, error=torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match="not even one row of 12 tokens fits"):
        run(model)


def test_a_batch_size_that_was_asked_for_is_not_changed_silently():
    model = llama()
    crowded(model, most=2, error=torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match="batch_size 3 with 12 tokens each does not"):
        run(model, batch_size=3)


def test_other_errors_are_not_taken_for_memory():
    model = llama()
    tried = crowded(model, most=0, error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        run(model)
    assert len(tried) == 1


def test_automatic_batch_size(monkeypatch):
    model = llama()
    monkeypatch.setattr(engine, "_free_memory", lambda model: None)
    assert automatic_batch_size(model, 10, 2) == 204  # 2048 tokens on a CPU
    assert automatic_batch_size(model, 5000, 2) == 1
    row = engine._bytes_per_row(model, 10, 2)
    monkeypatch.setattr(engine, "_free_memory", lambda model: 20 * row)
    assert automatic_batch_size(model, 10, 2) == 10  # half of it
    monkeypatch.setattr(engine, "_free_memory", lambda model: 0)
    assert automatic_batch_size(model, 10, 2) == 1
    assert engine._bytes_per_row(llama(WithoutLogitsToKeep), 10, 2) > row


# --- what is refused ----------------------------------------------------------------------------


def test_nan_is_refused():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"the model returns NaN in torch\.float32"):
        run(model)


def test_impossible_targets_are_refused():
    model = llama()

    def mask(module, args, output):
        output[..., TARGET[1]] = -torch.inf
        return output

    model.lm_head.register_forward_hook(mask)
    with pytest.raises(ValueError, match="gives target token 1 probability 0"):
        run(model)


TINY_BERT: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: BertForMaskedLM(BertConfig(**TINY_BERT)),
            "BertForMaskedLM does not predict next tokens; load it with AutoModelForCausalLM",
        ),
        (
            lambda: GPT2ForSequenceClassification(
                GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2)
            ),
            "GPT2ForSequenceClassification does not predict next tokens",
        ),
        (
            lambda: BertLMHeadModel(BertConfig(**TINY_BERT)),
            "the attention of this BertLMHeadModel looks both ways",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "T5ForConditionalGeneration has an encoder and a decoder",
        ),
    ],
    ids=["masked", "classifier", "two-sided", "encoder-decoder"],
)
def test_models_that_are_not_causal_are_refused(build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_causal(build())


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(2, 2)], ids=["object", "module"])
def test_what_is_no_model_is_refused(thing):
    name = type(thing).__name__
    with pytest.raises(TypeError, match=f"transformers causal language model, got {name}"):
        check_causal(thing)


def test_causal_models_are_accepted():
    config = GPTNeoXConfig(
        vocab_size=60,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    check_causal(GPTNeoXForCausalLM(config))  # its config says is_decoder=False
    check_causal(BertLMHeadModel(BertConfig(**TINY_BERT, is_decoder=True)))
    for build in MODELS.values():
        check_causal(build())


def test_what_a_model_says_of_itself():
    assert context_window(llama()) == context_window(gpt2()) == WINDOW
    bloom = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=8, n_layer=1, n_head=2))
    assert context_window(bloom) is None  # ALiBi
    assert vocabulary_size(bloom) == 60


# --- the model is left as it was ----------------------------------------------------------------


def snapshot(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    return hooks, modes, classes, model.config._attn_implementation


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_changed_by_an_interruption(error):
    model = llama().train()
    model.model.layers[1].eval()  # a part the user froze
    passes = []

    def interrupt(module, args):
        passes.append(module.training)
        if len(passes) == 2:
            raise error

    model.model.norm.register_forward_pre_hook(interrupt)
    before = snapshot(model)
    with pytest.raises(error):
        run(model, batch_size=2)
    assert snapshot(model) == before
    assert passes == [False, False]
    assert torch.is_grad_enabled()


def test_the_model_can_be_trained_afterwards():
    model = llama().train()
    run(model)
    model(input_ids=torch.tensor([INPUT_IDS])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
