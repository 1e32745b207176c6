"""Vision-language inputs replayed column by column give what the whole model gives in one pass."""

from typing import Any

import pytest
import torch
from toy_images import MODELS, TILED

from atman_triton.engine import Engine, Settings, Unit, undisturbed
from atman_triton.integration import manipulate
from atman_triton.stacks import UnsupportedModelError, find_stack

TARGETS = [(7, 9, 12, 14), (33,), (21, 17, 18)]
ONE_STEP = torch.finfo(torch.float32).eps  # results are float32, all else float64


def whole(model, inputs, target, factor, mode, kind):
    """Log-probabilities of one target by the model's own forward, image and all."""
    more = torch.tensor([target[:-1]], dtype=torch.long)
    own = dict(inputs)
    own["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    for name, value in (
        ("attention_mask", 1),
        ("mm_token_type_ids", 0),
        ("token_type_ids", int(kind.startswith("paligemma"))),
    ):
        if name in inputs:
            own[name] = torch.cat([inputs[name], torch.full_like(more, value)], 1)
    with manipulate(model, factor, mode):
        logits = model(**own, use_cache=False).logits[0, -len(target) :]
    return logits.log_softmax(-1)[range(len(target)), list(target)].float()


def units_of(inputs):
    count = inputs["input_ids"].shape[1]
    return [Unit((token,)) for token in range(count)] + [Unit((4, 5, count - 1))]


@pytest.mark.parametrize("name", MODELS | TILED)
@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
def test_equals_the_whole_model(name, mode):
    model, inputs = (MODELS | TILED)[name]()
    every = mode == "min_shift"  # what a token's place decides, it decides in every mode
    units = units_of(inputs)[:: 1 if every and name in MODELS else 3]
    for targets in (TARGETS[:1], TARGETS) if every else (TARGETS,):
        with undisturbed(model):
            engine = Engine(model, inputs, targets, Settings(0.1, mode))
            found = torch.cat([engine.base_logprobs[None], engine.perturb(units)])
            rows = []
            for unit in [None, *units]:
                factor = torch.ones(1, inputs["input_ids"].shape[1])
                if unit is not None:
                    factor[0, list(unit.positions)] = 0.1
                rows.append(
                    torch.cat([whole(model, inputs, t, factor, mode, name) for t in targets])
                )
        assert engine.record.runners == ["shared_prefix"]
        expected = torch.stack(rows)
        torch.testing.assert_close(found, expected, rtol=4 * ONE_STEP, atol=4 * ONE_STEP)
        moved = (expected[1:] - expected[0]).abs().amax(1)
        assert moved.min() > 1000 * ONE_STEP


@pytest.mark.parametrize("name", MODELS | TILED)
def test_the_image_is_encoded_once(name):
    model, inputs = (MODELS | TILED)[name]()
    encoded = []
    towers = ("vision_tower", "visual", "vision_model")
    tower = next(m for n, m in model.named_modules() if n.endswith(towers))
    tower.register_forward_hook(lambda *_: encoded.append(1))
    with undisturbed(model):
        engine = Engine(model, inputs, TARGETS, Settings(0.1, "min_shift", batch_size=2))
        engine.perturb(units_of(inputs))
        engine.perturb(units_of(inputs), "direct")
    assert len(encoded) == 1
    assert len(engine.record.batch_sizes) > 10


def test_the_start_moves_back_to_where_earlier_tokens_see_later_ones():
    starts = {}
    for name in MODELS:
        model, inputs = MODELS[name]()
        with undisturbed(model):
            (run,) = Engine(model, inputs, TARGETS[:1], Settings(0.1, "min_shift"))._runners
        count = inputs["input_ids"].shape[1]
        starts[name] = [run.replay.closed_start(token) for token in range(count)]
    assert starts["gemma3"] == [0, 1, 2, *[3] * 9, 12, 13, 14, 15]
    assert set(starts["paligemma"]) == {0}
    for name in ("llava", "qwen2.5-vl", "qwen3-vl"):
        assert starts[name] == list(range(len(starts[name])))


@pytest.mark.parametrize("name", MODELS | TILED)
def test_pieces_never_cut_through_what_sees_itself(name, monkeypatch):
    model, inputs = (MODELS | TILED)[name]()
    with undisturbed(model):
        expected = Engine(model, inputs, TARGETS, Settings(0.1, "min_shift"))
        monkeypatch.setattr("atman_triton.runner._PIECE", {"cpu": 3})
        pieces = Engine(model, inputs, TARGETS, Settings(0.1, "min_shift"))
        units = units_of(inputs)
        torch.testing.assert_close(pieces.base_logprobs, expected.base_logprobs)
        torch.testing.assert_close(pieces.perturb(units), expected.perturb(units))
        torch.testing.assert_close(
            pieces.perturb(units, "direct"), expected.perturb(units, "direct")
        )
    if not name.startswith("paligemma"):  # its prompt cannot be cut at all
        assert len(pieces.record.batch_sizes) > len(expected.record.batch_sizes)


def test_a_prompt_that_sees_the_target_is_refused():
    """PaliGemma's tokens of type 0 all see each other: a target among them is no prediction."""
    model, inputs = MODELS["paligemma"]()
    model.config.model_type = "other"
    with undisturbed(model), pytest.raises(UnsupportedModelError, match="see target tokens behind"):
        Engine(model, inputs, TARGETS[:1], Settings(0.1, "min_shift")).perturb(units_of(inputs))


@pytest.mark.parametrize("name", ["gemma3", "qwen3-vl"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_no_hooks(name, error):
    model, inputs = MODELS[name]()
    stack: Any = find_stack(model)[0]
    calls = []

    def interrupt(module, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise error

    hook = stack.layers[1].register_forward_pre_hook(interrupt, with_kwargs=True)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with undisturbed(model), pytest.raises(error):
        Engine(model, inputs, TARGETS, Settings(0.1, "min_shift", batch_size=2)).perturb(
            units_of(inputs)
        )
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before
    hook.remove()
