"""Scores from gradients: the line integral, what it sums to, many models, targets and units.

Legend: U units, M scored tokens, S input columns.
"""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, eager_logprobs
from test_capabilities import STATEFUL, sharp
from toy_images import MODELS as IMAGE_MODELS
from toy_models import MODELS, in_float64, llama, plain_logits
from toy_tokenizers import byte_level

from atman_triton import Explainer, gradients, line
from atman_triton.demo import demo_prompt, load_demo_model
from atman_triton.engine import Engine, Settings, Unit, undisturbed
from atman_triton.integration import manipulate

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84]
TARGET = [84, 62, 64]
SEVERAL = [TARGET, [7], [30, 11]]
UNITS = [Unit((token,)) for token in range(len(PROMPT))] + [Unit((10,), 0), Unit((11,), 0)]
MODES = ["min_shift", "multiplicative", "log_additive"]
STEPS = 40  # equal parts
TOKENIZER = byte_level()
DOCUMENT = "The pay per hour is 23 euros. The notice period is four weeks.\n\nHello world. Is it?"


def started(model, targets=(TARGET,), inputs=None, **changes):
    inputs = inputs or {"input_ids": torch.tensor([PROMPT])}
    settings = Settings(**{"factor": 0.1, "mode": "min_shift", "gradients": True} | changes)
    with undisturbed(model):
        return Engine(model, inputs, targets, settings)


def attributed(model, units=UNITS, steps=STEPS, targets=(TARGET,), inputs=None, **changes):
    engine = started(model, targets, inputs, **changes)
    with undisturbed(model):
        return engine, engine.attribute(units, steps)


def explained(method="path", model=None, prompt=DOCUMENT, target="23 euros", **changes):
    arguments = {
        name: changes.pop(name)
        for name in ("explain_only", "granularity", "targets", "reduction")
        if name in changes
    }
    model = llama(max_position_embeddings=512).double() if model is None else model
    explainer = Explainer(model, TOKENIZER, method=method, progress=False, **changes)
    return explainer.explain(prompt, target, **arguments)


# --- an independent line integral ---------------------------------------------------------------


def plain_losses(model, columns, mode, **chosen):
    """``[M]``: the eager oracle's losses, a factor per column."""
    matrix = columns.expand(len(columns), -1)
    logits = plain_logits(model, PROMPT + TARGET[:-1], matrix, mode, **chosen)
    return -logits[-len(TARGET) :].log_softmax(-1)[range(len(TARGET)), TARGET]


def line_integral(model, moving, units, mode, steps, width, factor=0.1, **chosen):
    """``[M, U]`` by full forwards and finite differences, at the middles of equal parts."""
    size = len(PROMPT) + len(TARGET) - 1
    scores = torch.zeros(len(TARGET), len(units), dtype=torch.float64)
    for step in range(steps):
        at = torch.ones(size, dtype=torch.float64)
        at[moving] = 1 + (step + 0.5) / steps * (factor - 1)
        for place, unit in enumerate(units):
            above, below = at.clone(), at.clone()
            above[unit] += width
            below[unit] -= width
            rise = plain_losses(model, above, mode, **chosen) - plain_losses(
                model, below, mode, **chosen
            )
            scores[:, place] += rise / (2 * width) * (factor - 1) / steps
    return scores


@pytest.mark.parametrize(
    ("name", "mode", "chosen"),
    [(name, mode, {}) for name in MODELS for mode in MODES]
    + [(*each, {"layers": (1,), "heads": (0, 3)}) for each in zip(MODELS, MODES, strict=True)],
)
def test_scores_are_those_of_a_line_integral_by_finite_differences(monkeypatch, name, mode, chosen):
    """Grouped heads, learned positions, a window of 5 with soft caps; 8 equal parts on each side.

    Layers and heads are chosen in one mode of each model.
    """
    monkeypatch.setattr(line, "EQUAL_FROM", 8)
    model, steps = in_float64(name), 8
    units = [[0], [2, 3], [8], [10]]
    everything = sorted(column for unit in units for column in unit)
    # The norms of the others round to float32, which a narrow difference would blow up.
    width, allowed = (1e-5, 2e-6) if name == "gpt2" else (2e-3, 3e-4)
    expected = line_integral(model, everything, units, mode, steps, width, **chosen)
    own = [Unit(tuple(unit), 0 if unit == [10] else None) for unit in units]
    _, found = attributed(model, own, steps, mode=mode, **chosen)
    late = torch.tensor([[unit[-1] >= len(PROMPT) + row for row in range(3)] for unit in units])
    assert torch.equal(found.scores.isnan(), late)
    known = ~late
    error = (found.scores.double() - expected.T)[known].abs().max()
    assert error < allowed * max(1.0, float(expected.abs().max()))
    assert expected.abs().max() > 100 * allowed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_completeness_converges_with_the_steps(name, mode):
    """The midpoint rule's error falls with the square; one token of the prompt stays as it is.

    In mode ``min_shift`` the place of a row's minimum may change, so that the slope jumps.
    """
    units = UNITS[1:]
    errors = []
    for steps in (32, 64, 128):
        engine, found = attributed(in_float64(name), units, steps, mode=mode)
        rise = (engine.base_logprobs - found.together).double()
        at = torch.ones(12, dtype=torch.float64)
        at[1:] = 0.1
        plain = plain_losses(in_float64(name), at, mode)
        torch.testing.assert_close(-found.together.double(), plain, rtol=1e-6, atol=1e-6)
        errors.append(float((found.scores.double().nansum(0) - rise).abs().sum()))
    assert errors[0] < 0.05 * float(rise.abs().sum())
    if mode == "min_shift":
        assert errors[2] < 0.005 * float(rise.abs().sum())
    else:
        assert errors[1] < errors[0] / 2.5 and errors[2] < max(errors[1] / 2.5, 2e-6)


def test_eight_steps_are_enough_on_the_shipped_model():
    """The model is certain of the answer, so the loss bends sharply somewhere on the line."""
    reader, tokenizer = load_demo_model()
    explainer = Explainer(reader, tokenizer, method="path", progress=False)
    complete = explainer.explain(demo_prompt(), " $30.20").completeness
    assert complete is not None
    assert complete.error < 0.02
    assert float(complete.rises.sum()) > 5


def test_the_one_step_gradient_is_the_first_order_estimate():
    model, width = in_float64("gpt2"), 1e-5
    _, found = attributed(model, UNITS, None)
    for unit in (0, 4, 9, 10):
        at = torch.ones(12, dtype=torch.float64)
        at[unit] = 1 - width
        rise = plain_losses(model, at, "min_shift") - plain_losses(
            model, torch.ones(12, dtype=torch.float64), "min_shift"
        )
        rows = slice(max(0, unit - len(PROMPT) + 1), None)
        expected = (rise * 0.9 / width)[rows].float()
        torch.testing.assert_close(found.scores[unit, rows], expected, rtol=1e-3, atol=1e-4)


def test_log_additive_of_all_tokens_alike_sums_to_nothing():
    """A constant on every score is none after the softmax, down to a factor of 0."""
    for factor in (0.1, 0.0):
        engine, found = attributed(in_float64("llama"), UNITS, mode="log_additive", factor=factor)
        assert (engine.base_logprobs - found.together).abs().max() < 1e-5 or factor == 0.0
        assert found.scores.nansum(0).abs().max() < 1e-4
        assert found.scores.nan_to_num().abs().max() > 0.1


# --- many models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for place, (name, family) in enumerate(FAMILIES.items())
        for mode in (MODES if family.own_code else [MODES[place % 3]])
    ],
)
def test_gradients_of_every_family_are_those_of_its_own_eager_code(name, mode):
    """Where the attention interface is asked, modes and families do not meet: one mode each."""
    family = FAMILIES[name]
    model = family.build()
    prompt, target = [52, 98, 56, 86, 13, 8, 41, 3, 79, 27], [5, 66, 30]
    inputs = {"input_ids": torch.tensor([prompt])}
    columns = [[0], [6], [8, 9], [10]]
    width = 3e-3 if family.own_code else 1e-3

    def losses(factor):
        return -eager_logprobs(family, model, inputs, target, columns, factor, mode).double()

    slope = (losses(1 + width) - losses(1 - width)) / (2 * width)  # [U, M]
    units = [Unit(tuple(own), 0 if own == [10] else None) for own in columns]
    _, found = attributed(model, units, None, [target], inputs, mode=mode)
    known = ~found.scores.isnan()
    assert known.sum() == 11
    error = (found.scores.double() + 0.9 * slope)[known].abs().max()
    assert error < 0.01 * slope[known].abs().max()
    everything = [sorted(column for own in columns for column in own)]
    together = eager_logprobs(family, model, inputs, target, everything, 0.1, mode)[0]
    torch.testing.assert_close(found.together.double(), together.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STATEFUL)
def test_models_with_a_state_can_be_differentiated(name):
    model = sharp(STATEFUL[name][0])
    prompt, targets = [3, 41, 59, 26, 53, 58, 97, 93, 23, 84], [[84, 62, 64], [30, 11]]
    inputs = {"input_ids": torch.tensor([prompt])}
    units = [Unit((token,)) for token in range(10)]
    engine, found = attributed(model, units, 96, targets, inputs)
    rise = (engine.base_logprobs - found.together).double()
    off = (found.scores.double().nansum(0) - rise).abs()
    assert off.sum() < 0.02 * rise.abs().sum()
    assert rise.abs().max() > 0.05


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_images_are_replayed_with_gradients(name):
    model, inputs = IMAGE_MODELS[name]()
    targets = [(7, 9, 12, 14), (33,)]
    units = [Unit((token,)) for token in range(inputs["input_ids"].shape[1])]
    engine, found = attributed(model, units, 64, targets, inputs)
    rise = (engine.base_logprobs - found.together).double()
    off = (found.scores.double().nansum(0) - rise).abs()
    assert off.sum() < 0.02 * rise.abs().sum()
    with undisturbed(model):
        plain = started(model, targets, inputs, gradients=False)
        one = plain.perturb([Unit(tuple(range(len(units))))])[0]
    torch.testing.assert_close(found.together, one, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    model = in_float64("gemma2")
    _, plain = attributed(model)
    inputs = {
        "input_ids": torch.tensor([[7, 8, *PROMPT]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * len(PROMPT)]]),
        "position_ids": torch.tensor([[0, 0, *range(len(PROMPT))]]),
    }
    moved = [Unit(tuple(p + 2 for p in unit.positions), unit.branch) for unit in UNITS]
    _, padded = attributed(model, moved, inputs=inputs)
    torch.testing.assert_close(padded.scores, plain.scores, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(padded.together, plain.together)


# --- many targets, some units -------------------------------------------------------------------


@pytest.mark.parametrize("steps", [8, None])
@pytest.mark.parametrize("name", MODELS)
def test_every_target_gets_what_it_gets_alone(name, steps):
    method = "score_gradient" if steps is None else "path"
    model = in_float64(name)
    several = explained(method, model, "The pay is 23. Is it?", None, targets=["23 euros", "Y"])
    for k, answer in enumerate(["23 euros", "Y"]):
        alone = explained(method, model, "The pay is 23. Is it?", answer)
        branch = several.branch(k)
        assert branch.units == alone.units
        # Places are chosen for each token, but looked at for all of a pass.
        tolerance = 0.05 * float(alone.scores.nan_to_num().abs().max()) if steps else 1e-5
        torch.testing.assert_close(
            branch.scores, alone.scores, rtol=0, atol=tolerance, equal_nan=True
        )
        torch.testing.assert_close(branch.together_logprobs, alone.together_logprobs)
        assert branch.completeness.targets == 1
        torch.testing.assert_close(branch.completeness.errors[0], several.completeness.errors[k])


def test_of_equal_parts_every_target_gets_exactly_what_it_gets_alone():
    _, several = attributed(in_float64("llama"), UNITS, 33, SEVERAL)
    _, alone = attributed(in_float64("llama"), UNITS, 33)
    torch.testing.assert_close(
        several.scores[:, :3], alone.scores, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    assert several.scores[-2:, 3:].isnan().all()


def test_only_the_units_asked_for_move():
    model = in_float64("llama")
    some = explained(model=model, prompt="The pay is 23.", explain_only=[1, 3], steps=STEPS)
    assert len(some.units) == 2
    exact = explained("exact", model, "The pay is 23.", explain_only=[1, 3])
    assert torch.equal(some.scores.isnan(), exact.scores.isnan())
    assert some.completeness.error < 0.02
    everything = explained(model=model, prompt="The pay is 23.", steps=STEPS)
    assert (everything.scores[:, [1, 3]] - some.scores).abs().max() > 1e-2  # other lines


@pytest.mark.parametrize("granularity", ["sentence", "paragraph"])
def test_a_unit_that_a_target_token_stands_in_does_not_move_for_it(granularity):
    """Else the scores of those tokens could not sum to anything that was measured."""
    targets = ["23 euros. It is four. Is it", "weeks"]
    e = explained(target=None, targets=targets, granularity=granularity, steps=64)
    exact = explained("exact", target=None, targets=targets, granularity=granularity)
    assert torch.equal(e.scores.isnan(), exact.scores.isnan())
    assert e.completeness.error < 0.02
    columns = [[u for u in range(len(e.units)) if not row[u].isnan()] for row in e.scores]
    assert len({tuple(own) for own in columns}) >= 2
    # Independent of which tokens share a line: each against its own units suppressed at once.
    model = llama(max_position_embeddings=512).double()
    words = TOKENIZER(DOCUMENT).input_ids
    for row, target in enumerate(e.targets):
        answer = [each.token_id for each in e.targets if each.branch == target.branch]
        factor = torch.ones(1, len(words) + len(answer))
        factor[0, [t for u in columns[row] for t in e.units[u].tokens]] = 0.1
        with torch.no_grad(), manipulate(model, factor, "min_shift"):
            logits = model(torch.tensor([words + answer]), use_cache=False).logits[0]
        logprob = logits[target.token - 1].log_softmax(-1)[target.token_id]
        assert float(e.together_logprobs[row]) == pytest.approx(float(logprob), abs=1e-5)


def test_groups_are_few():
    measured = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    begun = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    found = gradients.groups(measured, begun)
    assert [(group.rows, group.moving, group.still) for group in found] == [
        ([0, 1], {0}, {1}),
        ([2, 3], {0, 1, 2}, set()),
    ]
    assert gradients.groups(torch.zeros(2, 3).bool(), begun[:2, :3]) == []
