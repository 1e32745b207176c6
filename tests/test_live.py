"""Live citations: the text of plain generation, and the scores of a direct explanation of it."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, VOCAB
from test_interruptions import snapshot
from torch import nn
from toy_models import llama
from toy_tokenizers import byte_level, chat, unigram
from transformers import GenerationConfig, LogitsProcessor, MaxLengthCriteria, TextStreamer

import atman_triton as atman
from atman_triton import Explainer, UnsupportedModelError, memory
from atman_triton.live import OF_THE_ANSWER
from atman_triton.live_run import Ambient, LiveRun
from atman_triton.perturbations import RunFailed

PROMPT = [3, 41, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95}


@pytest.fixture(scope="module")
def model():
    return llama(vocab_size=VOCAB).double()


def live_threads():
    """Those that generate; others, such as a progress bar's, may be there from before."""
    return [thread for thread in threading.enumerate() if thread.name == "atman live"]


def assert_left_out_alike(found, wanted):
    """The same pieces for the same reasons, but that of the answer none was asked for."""
    given = [
        piece if piece.branch is None else replace(piece, reason=OF_THE_ANSWER)
        for piece in wanted.left_out
    ]
    assert found.left_out == given


def plain(model, ids, **options):
    """The new tokens of ``generate`` alone."""
    inputs = torch.tensor([ids])
    mask = torch.ones_like(inputs)
    return model.generate(inputs, attention_mask=mask, **options)[0, len(ids) :].tolist()


def explained(model, ids, answer, **settings):
    """The direct explanation of the finished text, units of the prompt only."""
    only = range(len(ids))
    explainer = Explainer(model, None, method="direct", progress=False, **settings)
    return explainer.explain(ids, target=answer, explain_only=only)


def check(model, ids=PROMPT, *, settings=None, within=1e-6, **options):
    """Live text and scores against generation and an explanation, each by itself."""
    settings, options = settings or {}, {"max_new_tokens": 6} | options
    every = options.pop("every", "auto")
    torch.manual_seed(5)
    answer = plain(model, ids, **options)
    torch.manual_seed(5)
    stream = atman.generate_explained(model, ids, every=every, **settings, **options)
    tokens = list(stream)
    assert [token.token_id for token in tokens] == answer
    wanted = explained(model, ids, answer, **settings)
    scores = torch.stack([token.scores for token in tokens])
    assert float(wanted.scores.abs().max()) > 1e-3  # there is something to compare
    assert scores.shape == wanted.scores.shape
    torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=within)
    logprobs = torch.tensor([token.logprob for token in tokens])
    torch.testing.assert_close(logprobs, wanted.base_logprobs, rtol=0, atol=within)
    return stream, wanted


@pytest.mark.parametrize(
    "name",
    # grouped heads; windows of 4 tokens, soft caps; learned positions; sinks; own code, ALiBi
    ["llama", "mistral", "gemma2", "gemma3", "gpt2", "opt", "gpt_oss", "bloom", "phi3"],
)
@pytest.mark.parametrize(
    "options", [{"do_sample": False, "every": 1}, SAMPLED | {"every": 4}], ids=["greedy", "sampled"]
)
def test_scores_are_those_of_the_finished_text(name, options):
    family = FAMILIES[name]
    within = max(1e-6, 10 * family.rounding)
    check(family.build(), within=within, eos_token_id=None, pad_token_id=0, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "multiplicative"},
        {"mode": "log_additive"},
        {"factor": 0.0},
        {"layers": [1], "heads": [0, 3]},
        {"batch_size": 5},
        {"batch_size": 1, "heads": [2]},
        {"backend": "reference"},
    ],
    ids=str,
)
@pytest.mark.parametrize("every", [1, 4])
def test_settings(model, settings, every):
    stream, wanted = check(model, settings=settings, every=every)
    found = stream.explanation()
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-6)
    for name in ("text", "units", "targets", "prompt_stop", "target_stops"):
        assert getattr(found, name) == getattr(wanted, name)
    assert_left_out_alike(found, wanted)
    for name in ("mode", "factor", "method", "layers", "heads", "backend", "direct_runs"):
        assert found.provenance[name] == wanted.provenance[name]
    assert found.provenance.get("negative_scores") == wanted.provenance.get("negative_scores")
    rows, size = found.provenance["batch_sizes"], settings.get("batch_size", 12)
    assert found.provenance["forwards"] == (12 + 6 * 13) / 12
    if every == 1:
        assert sum(rows) == 1 + 6 * 13  # the prompt; the plain row and 12 units at every step
        assert max(rows) == 1 + size
    else:
        assert sum(rows) == 1 + 6 + 2 * 12  # 4 tokens and 2 are scored at a time
        assert max(rows) == size


@pytest.mark.parametrize(
    ("ids", "options"),
    [
        (PROMPT[:1], SAMPLED),
        (PROMPT[:2], {}),
        (PROMPT, {"max_new_tokens": 1}),
        (PROMPT, {"max_new_tokens": 40}),  # more than the rows' first buffers hold
        (PROMPT, {"repetition_penalty": 3.0}),
        (PROMPT, {"generation_config": GenerationConfig(max_new_tokens=3)}),
        (PROMPT, {"max_new_tokens": None, "max_length": 15}),
        (PROMPT, {"stopping_criteria": [MaxLengthCriteria(14)]}),
        (PROMPT, {"prefill_chunk_size": 4}),
    ],
    ids=lambda value: f"{len(value)} tokens" if isinstance(value, list) else " ".join(value),
)
def test_prompts_and_options(model, ids, options):
    check(model, ids, **options)


def test_a_logits_processor_changes_the_text_but_not_the_distribution(model):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, 7] = 0.0
            return forced

    stream, _ = check(model, logits_processor=[Only()])
    assert [token.token_id for token in stream.tokens] == 6 * [7]
    assert all(token.logprob < -0.1 for token in stream.tokens)


@pytest.mark.parametrize("end", [0, 1])
def test_the_token_that_ends_the_text_is_no_part_of_the_answer(model, end):
    answer = plain(model, PROMPT, max_new_tokens=6)
    assert answer.index(answer[end]) == end
    stream = atman.generate_explained(
        model, PROMPT, max_new_tokens=6, eos_token_id=answer[end], pad_token_id=0
    )
    tokens = list(stream)
    assert [token.token_id for token in tokens] == answer[: end + 1]
    assert tokens[end].text == ""
    if end == 0:
        assert stream.text == ""
        with pytest.raises(RunFailed, match="empty"):
            stream.explanation()
        return
    found = stream.explanation()
    assert [target.token_id for target in found.targets] == answer[:end]
    assert found.left_out[-1].reason.startswith("end of text")
    wanted = explained(model, PROMPT, answer[:end])
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-6)
    assert "".join(token.text for token in tokens) == stream.text


# --- text ----------------------------------------------------------------------------------------

TEXT = "The pay per hour is 23 euros. The notice period is four weeks. Q: What is the pay?"
MESSAGES = [{"role": "user", "content": TEXT}]


@pytest.mark.parametrize("tokenizer", [byte_level, chat, unigram])
@pytest.mark.parametrize("units", ["token", "word", "auto", atman.Delimiter(".")], ids=str)
def test_texts_and_units(tokenizer, units):
    tokenizer = tokenizer()
    model = llama(vocab_size=512, max_position_embeddings=256).double()
    prompt = MESSAGES if tokenizer.chat_template else TEXT
    options = {"max_new_tokens": 12, "suppress_tokens": [tokenizer.eos_token_id]} | SAMPLED
    torch.manual_seed(3)
    stream = atman.generate_explained(model, prompt, tokenizer=tokenizer, units=units, **options)
    tokens = list(stream)
    assert len(tokens[0].scores) == len(stream.units)
    assert all(unit.part == "prompt" for unit in stream.units)
    found = stream.explanation()
    assert found.units == [replace(unit, effect="direct") for unit in stream.units]
    assert found.text == found.prompt + stream.text
    assert stream.text.startswith("".join(token.text for token in tokens))
    explainer = Explainer(model, tokenizer, method="direct", progress=False)
    wanted = explainer.explain(
        prompt, [t.token_id for t in tokens], units, explain_only=range(len(stream.units))
    )
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-6)
    assert (found.units, found.text) == (wanted.units, wanted.text)
    assert_left_out_alike(found, wanted)


def test_a_character_comes_with_the_token_that_completes_it(model):
    tokenizer = byte_level()
    ids = tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5

    class Write(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, ids[input_ids.shape[1] - len(PROMPT)]] = 0.0
            return forced

    wide = llama(vocab_size=512)
    stream = atman.generate_explained(
        wide, PROMPT, tokenizer=tokenizer, max_new_tokens=5, logits_processor=[Write()]
    )
    assert [token.text for token in stream] == ["a", "", "", "€", "b"]
    assert stream.text == "a€b"


def test_padding_and_a_choice_of_units(model):
    encoding = {"input_ids": [0, 0, *PROMPT], "attention_mask": [0, 0, *[1] * len(PROMPT)]}
    options = {"max_new_tokens": 3}
    some = atman.generate_explained(model, encoding, explain_only=[2, 11], **options)
    whole = list(atman.generate_explained(model, PROMPT, **options))
    for token, all_of_it in zip(some, whole, strict=True):
        torch.testing.assert_close(token.scores, all_of_it.scores[[2, 11]], rtol=0, atol=1e-6)
    assert [unit.tokens for unit in some.units] == [(2,), (11,)]
    assert some.explanation().scores.shape == (3, 2)


def test_a_streamer_gets_the_text_too(model, capsys):
    tokenizer = byte_level()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    wide = llama(vocab_size=512)
    stream = atman.generate_explained(
        wide, PROMPT, tokenizer=tokenizer, max_new_tokens=4, streamer=streamer
    )
    list(stream)
    assert capsys.readouterr().out.rstrip("\n") == stream.text


# --- the model is left alone ----------------------------------------------------------------------


class Interrupter(nn.Module):
    """Raises in the n-th pass."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.passes = at, error, 0

    def __call__(self, module, args):
        self.passes += 1
        if self.passes == self.at:
            raise self.error


def test_dropping_closing_or_leaving_ends_it(model):
    model.train()
    before, threads = snapshot(model), live_threads()

    def during(stream):
        next(stream)
        assert snapshot(model) != before
        assert len(live_threads()) == len(threads) + 1

    stream = atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1)
    assert snapshot(model) == before  # nothing runs before the first token is asked for
    during(stream)
    del stream
    gc.collect()
    assert (snapshot(model), live_threads()) == (before, threads)

    stream = atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1)
    during(stream)
    stream.close()
    assert (snapshot(model), live_threads()) == (before, threads)
    assert list(stream) == []
    assert len(stream.explanation().targets) == 1  # what came stays

    with atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1) as stream:
        during(stream)
    assert (snapshot(model), live_threads()) == (before, threads)

    for _ in atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1):
        break
    assert (snapshot(model), live_threads()) == (before, threads)

    assert len(list(atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1))) == 6
    assert (snapshot(model), live_threads()) == (before, threads)
    model.eval()


@pytest.mark.parametrize("at", [1, 5])  # the prompt; a step
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_errors_reach_the_caller(at, error):
    model = llama(vocab_size=VOCAB)
    interrupter = Interrupter(at, error("stop here"))
    hook = model.model.norm.register_forward_pre_hook(interrupter)
    before, threads = snapshot(model), live_threads()
    stream = atman.generate_explained(model, PROMPT, max_new_tokens=8)
    with pytest.raises(error, match="stop here"):
        list(stream)
    assert interrupter.passes == at
    assert (snapshot(model), live_threads()) == (before, threads)
    assert list(stream) == []
    hook.remove()
    check(model, within=1e-4)


def test_ctrl_c_while_waiting(model, monkeypatch):
    before, threads = snapshot(model), live_threads()
    stream = atman.generate_explained(model, PROMPT, max_new_tokens=6)
    next(stream)
    ready = stream._steps._handover._ready

    class Interrupted:
        def acquire(self):
            raise KeyboardInterrupt

        release = ready.release

    monkeypatch.setattr(stream._steps._handover, "_ready", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert (snapshot(model), live_threads()) == (before, threads)


def test_the_caller_may_use_the_model_and_random_numbers_between_tokens(model):
    ids = torch.tensor([PROMPT])
    alone = model(ids).logits
    answer = plain(model, PROMPT, max_new_tokens=6)
    stream = atman.generate_explained(model, PROMPT, max_new_tokens=6, every=1)
    other = atman.generate_explained(model, PROMPT[::-1], max_new_tokens=6, every=1)
    found = []
    for token, _ in zip(stream, other, strict=True):  # two at once
        found.append(token.token_id)
        torch.testing.assert_close(model(ids).logits, alone)
    assert found == answer
    # whatever a caller draws, a seed gives what the same draws around plain sampling give
    torch.manual_seed(1)
    drawn = [token.token_id for token in atman.generate_explained(model, PROMPT, **SAMPLED)]
    torch.manual_seed(1)
    assert drawn == plain(model, PROMPT, max_new_tokens=32, **SAMPLED)


# --- contexts ------------------------------------------------------------------------------------


def test_a_manipulation_around_counts(model):
    factor = torch.ones(1, len(PROMPT))
    factor[0, 4] = 5.0
    _, free = check(model)
    with atman.manipulate(model, factor, mode="min_shift"):
        _, steered = check(model)
    assert float((free.base_logprobs - steered.base_logprobs).abs().max()) > 0.1
    with atman.manipulate(model, factor, mode="min_shift"):
        stream = atman.generate_explained(model, PROMPT, max_new_tokens=6)
        next(stream)
    token = list(stream)[-1]  # what was around the call, also after it is left
    torch.testing.assert_close(token.scores, steered.scores[-1], rtol=0, atol=1e-6)


def test_steering_around_counts(model):
    controls = [atman.TokenControl(4, 5.0), atman.TokenControl(9, 0.2)]
    _, free = check(model)
    with atman.steer(model, controls, inputs=[PROMPT]):
        _, steered = check(model)
    assert float((free.base_logprobs - steered.base_logprobs).abs().max()) > 0.1
    with (
        pytest.raises(ValueError, match="runs on other tokens than the inputs of steer"),
        atman.steer(model, controls, inputs=[PROMPT[::-1]]),
    ):
        next(atman.generate_explained(model, PROMPT))


def test_a_manipulation_of_another_kind_is_refused(model):
    with (
        atman.manipulate(model, torch.full((1, 3), 0.5), mode="log_additive"),
        pytest.raises(ValueError, match="mode must be that of the context"),
    ):
        next(atman.generate_explained(model, PROMPT))
    rows = torch.full((13, 3), 0.5)
    with (
        pytest.raises(ValueError, match=r"one row of factors, .* got 13 rows"),
        atman.manipulate(model, rows, mode="min_shift"),
    ):
        atman.generate_explained(model, PROMPT)


def test_a_new_thread_gets_what_is_around_the_call(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = Ambient.of_this_thread(model)
    seen = []

    def look():
        with around.entered(model):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        seen.append(torch.is_autocast_enabled("cpu"))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(True, torch.bfloat16), False]
    assert Ambient.of_this_thread(model)[:3] == (None, None, None)


def test_inference_mode_around_changes_nothing(model):
    outside = list(atman.generate_explained(model, PROMPT, max_new_tokens=2))
    with torch.inference_mode():
        inside = list(atman.generate_explained(model, PROMPT, max_new_tokens=2))
    assert [token.logprob for token in inside] == [token.logprob for token in outside]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams must be 1, got 2: beams are several texts"),
        ({"num_return_sequences": 3}, "num_return_sequences must be 1, got 3"),
        ({"guidance_scale": 1.5}, "guidance_scale must be 1, got 1.5"),
        ({"use_cache": False}, "use_cache must be True, got False"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams must be 1, got 4"),
        ({"assistant_model": "another"}, "assistant_model makes the model run"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens makes the model run"),
        ({"past_key_values": "a cache"}, "past_key_values is taken by generate_explained"),
        ({"input_ids": [1]}, "input_ids is taken by generate_explained"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate asks for what"),
        ({"method": "exact"}, "method must be 'direct', got 'exact': any other runs the prompt"),
        ({"method": "magic"}, "method must be one of exact, direct"),
        ({"mode": "min_shift_full"}, "take mode='min_shift'"),
        ({"mode": "other"}, "mode must be one of"),
        ({"preset": "none"}, "preset must be one of"),
        ({"units": "line"}, "must be one of .*token"),
        ({"units": "sentence"}, "needs text"),
        ({"factor": 1.0}, r"factor must lie in \[0, 1\)"),
        ({"layers": [7]}, "layers must be among 0..1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"explain_only": [12]}, "explain_only holds unit index 12"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 60}, "lower max_new_tokens to 53"),
    ],
    ids=str,
)
def test_what_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        atman.generate_explained(model, PROMPT, **options)
    assert live_threads() == []


def test_prompts_that_are_refused(model):
    with pytest.raises(ValueError, match="prompt must not be empty"):
        atman.generate_explained(model, [])
    with pytest.raises(ValueError, match="one prompt at a time"):
        atman.generate_explained(model, [PROMPT, PROMPT])
    with pytest.raises(TypeError, match=r"got 3\.5"):
        atman.generate_explained(model, [3.5])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        atman.generate_explained(model, "a text")
    with pytest.raises(ValueError, match="unheard_of"):
        next(atman.generate_explained(model, PROMPT, unheard_of=1))


def test_a_model_without_direct_effects_is_refused(monkeypatch):
    config = FAMILIES["qwen2"].build()
    monkeypatch.setattr(type(config), "_is_stateful", True)
    with pytest.raises(
        UnsupportedModelError, match=r"keeps a state .* explain with method='exact'"
    ):
        atman.generate_explained(config, PROMPT)
    with pytest.raises(TypeError, match="model must be"):
        atman.generate_explained("a model", PROMPT)


def test_rows_are_grouped_by_memory(model, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda model: 0)
    stream, _ = check(model)
    assert max(stream.explanation().provenance["batch_sizes"]) == 1
    monkeypatch.setattr(memory, "free_memory", lambda model: None)
    settings = Explainer(model).settings
    run = LiveRun(model, PROMPT, 12 * [(0,)], settings, 1, {}, None, None, None)
    assert run._groups() == [slice(0, 13)]
    assert replace(run, every=2)._groups() == [slice(0, 1), slice(1, 13)]
