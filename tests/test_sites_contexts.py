"""manipulate() on encoders and encoder-decoders: contexts, threads, gradients, what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers as tf
from manipulated import checkpoint_layers, fresh_dynamo
from site_models import BLIP, ENCODERS, SEQ2SEQ, drawn
from site_oracle import logits_of, oracle, oracle_logits
from torch import Tensor
from toy_images import seeing
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.siglip.modeling_siglip import SiglipAttention

from atman_triton.integration import UnsupportedModelError, manipulate
from atman_triton.sites import own_source, sources
from atman_triton.stacks import find_stack

__all__ = ["fresh_dynamo"]  # a fixture

ALL = ENCODERS | SEQ2SEQ | BLIP
KINDS = ["vit", "siglip", "bart", "t5", "whisper", "blip-vqa"]
ROUNDING = 1e-9  # float64


@torch.no_grad()
def plain_logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return logits_of(model, inputs)


def far(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item()


def state_of(model: Any) -> list[Any]:
    """What a context may change: hooks and classes of modules, and of their configs."""
    state: list[Any] = []
    for module in model.modules():
        hooks = len(module._forward_pre_hooks), len(module._forward_hooks)
        config = getattr(module, "config", None)
        state.append(
            (type(module), hooks, type(config), getattr(config, "_attn_implementation", 0))
        )
    return state


# --- contexts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_nested_contexts_multiply(name: str) -> None:
    case = ALL[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    first = next(iter(factors))
    again = torch.ones(1, 4)
    again[:, 1] = 0.4
    product = dict(factors)
    product[first] = factors[first].clone()
    product[first][:, :4] *= again
    with manipulate(model, factors, "min_shift"):
        outer = plain_logits(model, inputs)
        with manipulate(model, again, "min_shift"):
            nested = plain_logits(model, inputs)
        assert torch.equal(plain_logits(model, inputs), outer)
    assert far(nested, oracle_logits(model, inputs, product)) < ROUNDING
    assert far(outer, oracle_logits(model, inputs, factors)) < ROUNDING


def test_contexts_of_different_sources_add_up() -> None:
    case = SEQ2SEQ["bart"]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    expected = oracle_logits(model, inputs, factors)
    with (
        manipulate(model, {"text": factors["text"]}, "min_shift"),
        manipulate(model, {"decoder": factors["decoder"]}, "min_shift"),
    ):
        assert far(plain_logits(model, inputs), expected) < ROUNDING
    with (
        manipulate(model, factors, "min_shift", attention="encoder"),
        manipulate(model, factors["text"], "min_shift", attention="cross"),
    ):
        assert far(plain_logits(model, inputs), expected) < ROUNDING


@pytest.mark.parametrize("name", KINDS)
def test_exceptions_leave_no_trace(name: str) -> None:
    case = ALL[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    before, state = plain_logits(model, inputs), state_of(model)
    try:
        with manipulate(model, factors):
            assert state_of(model) != state
            raise KeyError
    except KeyError:
        pass
    wrong = {source: factor.repeat(2, 1)[:3] for source, factor in factors.items()}
    with pytest.raises(ValueError, match="key_factor has 3 rows"), manipulate(model, wrong):
        plain_logits(model, inputs)
    assert state_of(model) == state
    assert torch.equal(plain_logits(model, inputs), before)


@pytest.mark.parametrize("name", KINDS)
def test_threads_have_their_own_factors(name: str) -> None:
    """Two threads with different factors and one without, on one model at the same time."""
    case = ALL[name]
    model, inputs = case.build(), case.inputs()
    plain = plain_logits(model, inputs)
    given = [case.factors(), {source: factor[:1] for source, factor in case.factors().items()}]
    expected = [*(oracle_logits(model, inputs, factors) for factors in given), plain]
    barrier, wrong = threading.Barrier(3, timeout=60), []

    def work(index: int) -> None:
        for _ in range(3):
            if index == 2:
                barrier.wait()
                actual = plain_logits(model, inputs)
                barrier.wait()
            else:
                with manipulate(model, given[index], "min_shift"):
                    barrier.wait()
                    actual = plain_logits(model, inputs)
                    barrier.wait()
            if not far(actual, expected[index]) < ROUNDING:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert far(expected[0], expected[1]) > 1000 * ROUNDING


# --- an encoder that ran before -------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_the_encoder_runs_once_for_many_rows(name: str) -> None:
    """Its outputs are those of one row, expanded; each row suppresses another token."""
    case = SEQ2SEQ[name]
    model, inputs = case.build(), {key: value[:1] for key, value in case.inputs().items()}
    source, tokens = next(iter(case.sources.items()))
    factor = torch.ones(tokens, tokens) - 0.9 * torch.eye(tokens)
    rows = {key: value.expand(tokens, *value.shape[1:]) for key, value in inputs.items()}
    expected = oracle_logits(model, rows, {source: factor}, attention="cross")
    start = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    states = model.get_encoder()(**start)[0].expand(tokens, -1, -1)
    answers = {key: rows[key] for key in ("decoder_input_ids", "attention_mask") if key in rows}
    with manipulate(model, factor, "min_shift", attention="cross"):
        output = model(**answers, encoder_outputs=BaseModelOutput(last_hidden_state=states))
    assert far(output.logits, expected) < ROUNDING
    message = r"no forward pass of its encoder stack ran .* choose attention='cross'"
    with (
        pytest.raises(UnsupportedModelError, match=message),
        manipulate(model, factor, "min_shift"),
    ):
        model(**answers, encoder_outputs=BaseModelOutput(last_hidden_state=states))


@torch.no_grad()
def test_beams_share_the_row_of_their_prompt() -> None:
    case = SEQ2SEQ["bart"]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with manipulate(model, factors["text"], "min_shift"):
        both = model.generate(**inputs, **options)
    for row in range(2):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        with manipulate(model, factors["text"][row : row + 1], "min_shift"):
            assert torch.equal(model.generate(**alone, **options)[0], both[row])


# --- training -----------------------------------------------------------------------------------


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        for name in ("p", "dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_factors_are_those_of_the_modifier_matrix(name: str) -> None:
    case = ALL[name]
    model, inputs = without_dropout(case.build().train()), case.inputs()

    def gradients(run: Any) -> dict[str, Tensor]:
        factors = {source: factor.requires_grad_() for source, factor in case.factors().items()}
        with run(model, factors, "min_shift"):
            logits_of(model, inputs).square().mean().backward()
        return {source: factor.grad for source, factor in factors.items()}  # pyright: ignore

    found, expected = gradients(manipulate), gradients(oracle)
    for source, gradient in expected.items():
        size = gradient.abs().max().item()
        assert size > 1e-5
        # factors are float32, and so is T5's norm, whose noise passes through three layers
        assert far(found[source], gradient) < 8 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("name", ["vit", "bart", "t5", "whisper"])
def test_activation_checkpointing_recomputes_with_the_factors(name: str) -> None:
    case = ALL[name]

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = without_dropout(case.build().train())
        if checkpointing:
            checkpoint_layers(model)
        factors = {source: factor.requires_grad_() for source, factor in case.factors().items()}
        with manipulate(model, factors, "min_shift"):
            loss = logits_of(model, case.inputs()).square().mean()
        loss.backward()
        found = [factor.grad for factor in factors.values()]
        return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]  # pyright: ignore

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 2
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(plain, recomputed, strict=True))


def test_activation_checkpointing_is_refused_where_factors_are_no_argument() -> None:
    case = ENCODERS["siglip"]
    model = case.build().train()
    checkpoint_layers(model)
    with (
        pytest.raises(ValueError, match=r"SiglipAttention takes no factors .* checkpointing off"),
        manipulate(model, case.factors()),
    ):
        model(**case.inputs())
    with manipulate(model, case.factors()):
        plain_logits(model, case.inputs())  # nothing to recompute


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_compiled(name: str) -> None:
    """Factors come as an argument in one, and are looked up in the other."""
    case = ALL[name]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    compiled: Any = torch.compile(model, backend="eager")
    plain = plain_logits(model, inputs)
    for given in (None, factors, {s: f[:1] for s, f in factors.items()}, None):
        if given is None:
            assert far(plain_logits(compiled, inputs), plain) < ROUNDING
            continue
        expected = oracle_logits(model, inputs, given)
        with manipulate(compiled, given, "min_shift"):
            assert far(plain_logits(compiled, inputs), expected) < ROUNDING


# --- what is refused ----------------------------------------------------------------------------


class _Deaf(SiglipAttention):
    """Looks like an attention layer, and computes by itself."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return hidden_states, None


def test_layers_may_be_replaced_between_contexts() -> None:
    case = ENCODERS["siglip"]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    with manipulate(model, factors, "min_shift"):
        plain_logits(model, inputs)
    model.vision_model.encoder.layers[1] = copy.deepcopy(model.vision_model.encoder.layers[0])
    with manipulate(model, factors, "min_shift"):
        actual = plain_logits(model, inputs)
    assert far(actual, oracle_logits(model, inputs, factors)) < ROUNDING


def test_a_layer_that_does_not_ask_is_named() -> None:
    case = ENCODERS["siglip"]
    model = case.build()
    model.vision_model.encoder.layers[1].self_attn.__class__ = _Deaf
    message = r"SiglipForImageClassification: .* did not reach attention layers \[1\] of \[0, 1\]"
    with pytest.raises(UnsupportedModelError, match=message), manipulate(model, case.factors()):
        plain_logits(model, case.inputs())


def test_cross_attention_that_does_not_run_is_named() -> None:
    """A decoder alone, given no encoder's tokens."""
    case = SEQ2SEQ["t5"]
    model = case.build()
    message = r"did not reach cross-attention layers \[0, 1\] of \[0, 1\] and cross-attention"
    with pytest.raises(UnsupportedModelError, match=message), manipulate(model, case.factors()):
        model.get_decoder()(input_ids=case.inputs()["decoder_input_ids"], use_cache=False)


def _swin() -> Any:
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return tf.SwinForImageClassification(tf.SwinConfig(image_size=16, patch_size=4, **sizes))


def _without_cross() -> Any:
    model = SEQ2SEQ["bart"].build()
    for layer in model.model.decoder.layers:
        layer.peeking = layer.encoder_attn  # under no name that says what it is
        del layer.encoder_attn
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_swin, "SwinForImageClassification: the layers of SwinModel attend within windows"),
        (_without_cross, "the cross-attention of BartDecoder cannot be found"),
    ],
    ids=["windows", "no-cross-attention"],
)
def test_unsupported_models_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    model = make()
    for ask in (sources, lambda m: manipulate(m, torch.ones(1, 1)).__enter__()):
        with pytest.raises(UnsupportedModelError, match=message):
            ask(model)


ONES = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("name", "factor", "kwargs", "error", "message"),
    [
        ("t5", [1.0], {}, TypeError, "a tensor, or one for each of text, decoder, got list"),
        ("t5", {"text": 1.0}, {}, TypeError, "key_factor must be a tensor, got float"),
        ("t5", {}, {}, ValueError, r"sources of T5\w+, text, decoder, got \[\]"),
        ("t5", {"image": ONES}, {}, ValueError, r"text, decoder, got \['image'\]"),
        ("vit", {"decoder": ONES}, {}, ValueError, r"sources of ViT\w+, image, got \['decoder'\]"),
        ("t5", ONES, {"attention": "self"}, ValueError, "one of encoder, cross, both, got 'self'"),
        ("vit", ONES, {"attention": "both"}, ValueError, "with an encoder and cross-attention, "),
        ("t5", ONES, {"layers": [3]}, ValueError, r"layers must be among 0\.\.2"),
        ("t5", {"decoder": ONES}, {"layers": [2]}, ValueError, r"among 0\.\.1 .* got 2"),
        (
            "t5",
            {"text": ONES, "decoder": ONES},
            {"layers": [2]},
            ValueError,
            r"layers must name some that read 'decoder', got \[2\]",
        ),
        ("t5", torch.ones(1, 3, 2), {}, ValueError, r"must have 2 heads in T5\w+, got shape"),
    ],
)
def test_bad_arguments_are_named(
    name: str, factor: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = ALL[name].build()
    state = state_of(model)
    with pytest.raises(error, match=message), manipulate(model, factor, **kwargs):
        pass
    assert state_of(model) == state


@pytest.mark.parametrize("name", ["bart", "blip-captions", "clip-pair"])
def test_models_of_several_encoders_have_no_source_of_their_own(name: str) -> None:
    model = ALL[name].build()
    with pytest.raises(UnsupportedModelError, match=r"reads \w+ and \w+, each by its own layers"):
        own_source(model)
    if name != "clip-pair":
        with pytest.raises(UnsupportedModelError, match="has several stacks of layers"):
            find_stack(model)
    assert own_source(ALL["bert"].build()) == "text"


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3"])
def test_the_pictures_of_a_decoder_are_among_its_tokens(name: str) -> None:
    assert sources(seeing(name)[0]) == ("decoder",)


def test_heads_that_differ_between_encoder_and_decoder() -> None:
    config, model_class = SEQ2SEQ["bart"].make()
    config.decoder_attention_heads = 4
    model = drawn(config, model_class)
    inputs, factors = SEQ2SEQ["bart"].inputs(), SEQ2SEQ["bart"].factors()
    expected = oracle_logits(model, inputs, factors)
    with manipulate(model, factors, "min_shift"):
        assert far(plain_logits(model, inputs), expected) < ROUNDING
    with manipulate(model, factors["text"], "min_shift", heads=[3], attention="cross"):
        plain_logits(model, inputs)
    for heads, given in (([0], factors["text"]), (None, torch.ones(1, 4, 2))):
        with (
            pytest.raises(ValueError, match="2 and 4 heads"),
            manipulate(model, given, heads=heads),
        ):
            pass


def test_attention_weights_are_refused() -> None:
    case = SEQ2SEQ["bart"]
    model = case.build()
    with (
        pytest.raises(ValueError, match="output_attentions=True"),
        manipulate(model, torch.ones(1, 1)),
    ):
        model(**case.inputs(), output_attentions=True)


@torch.no_grad()
def test_min_shift_full_needs_all_keys_of_the_decoder_only() -> None:
    case = SEQ2SEQ["bart"]
    model, inputs, factors = case.build(), case.inputs(), case.factors()
    del inputs["decoder_input_ids"]
    with manipulate(model, factors["text"], "min_shift_full"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with (
        pytest.raises(ValueError, match=r"min_shift_full.* cannot use a cache"),
        manipulate(model, factors, "min_shift_full"),
    ):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
