"""Ablation baselines: known weights found again, exact Shapley values, plain forward passes.

Legend: R units of the prompt, M scored tokens, N ablations.
"""

from __future__ import annotations

import math
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from captum.attr import KernelShap, Lime
from test_baselines_case import ONE_STEP, PROMPT, alone, assert_close, shortened
from test_multimodal import SMALL
from toy_images import seeing
from toy_models import in_float64

from atman_triton import Explainer
from atman_triton.baselines import Baseline, Case, Options
from atman_triton.baselines.ablation import leave_one_out, occlusion, random
from atman_triton.baselines.sampling import (
    LASSO,
    context_cite,
    kernel_shap,
    lime,
    log_odds,
    pieces_of,
)
from atman_triton.table import import_extra

TARGETS = [[12, 55, 3], [8]]
SAMPLING = (lime, kernel_shap, context_cite)


def explained(model, prompt=PROMPT, targets=TARGETS, processor=None):
    """A case whose first target has units too."""
    explanation = Explainer(model, processor, progress=False).explain(prompt, targets=targets)
    return Case.of(model, processor, prompt, explanation)


def of_prompt(case, scores):
    """``[R, M]``, after a look at the others."""
    others = [unit for unit in range(len(case.units)) if unit not in case.removable]
    assert scores.shape == case.measured.shape and scores.dtype == torch.float64
    assert bool(scores[others].isnan().all())
    return scores[case.removable]


def additive(case, weights, constant=-1.0):
    """Let a case answer with a sum over the units that stay, and count what is asked."""
    asked = []

    def without(removed, output="logprob"):
        asked.extend(removed)
        rows = [[place for place in case.removable if place not in units] for units in removed]
        places = [[case.removable.index(place) for place in row] for row in rows]
        return torch.stack([constant + weights[row].sum(0) for row in places]).float()

    case.without = without
    return asked


# --- one at a time --------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    model = in_float64("llama")
    case = explained(model)
    whole = shortened(model, [[]], TARGETS)
    drops = whole - shortened(model, [[place] for place in range(len(PROMPT))], TARGETS)
    assert_close(of_prompt(case, leave_one_out(case, Options())), drops)
    lengths = (len(PROMPT) + 2) + len(PROMPT)
    assert case.record.tokens == lengths + len(PROMPT) * (lengths - 2)


def test_occlusion_by_hand():
    """The mean of the prompt in place of a unit, also of one of the target."""
    model = in_float64("llama")
    case = explained(model)
    found = occlusion(case, Options())
    table = model.get_input_embeddings().weight.detach()
    for k, target in enumerate(TARGETS):
        read = table[[*PROMPT, *target[:-1]]]
        for index, unit in enumerate(case.units):
            if unit.branch not in (None, k):
                continue
            rows = read.clone()
            own = [place for place in unit.tokens if place < len(read)]
            rows[own] = read[: len(PROMPT)].mean(0)
            with torch.no_grad():
                logits = model(inputs_embeds=rows[None]).logits[0, -len(target) :]
            logprobs = logits.log_softmax(-1)[range(len(target)), target]
            drops = alone(model, PROMPT, target) - logprobs
            late = max(unit.tokens) >= len(PROMPT) + torch.arange(len(target))
            drops = drops.masked_fill(late, torch.nan)
            columns = found[index, case.rows[k].start : case.rows[k].stop]
            assert torch.equal(columns.isnan(), late)
            assert_close(columns.nan_to_num(0.0), drops.nan_to_num(0.0), 32)
    assert torch.equal(found.isnan(), ~case.measured)
    first = (9 + 2) * (9 + 2)  # rows of the prompt's units and the target's that are read
    assert case.record.tokens == 11 + 9 + first + 9 * 9


def test_chance_is_chance():
    case = explained(in_float64("llama"))
    first, again = (random(case, Options(seed=3)) for _ in range(2))
    assert torch.equal(first.nan_to_num(-1.0), again.nan_to_num(-1.0))
    assert torch.equal(first.isnan(), ~case.measured)
    assert float(first.nan_to_num(0.5).min()) >= 0 and float(first.nan_to_num(0.5).max()) < 1
    assert not torch.equal(random(case, Options(seed=4)).nan_to_num(-1.0), first.nan_to_num(-1.0))


# --- at random ------------------------------------------------------------------------------------


def known(rows):
    """``[R, M]``: some units matter, and differently for every token."""
    weights = torch.zeros(len(PROMPT), rows, dtype=torch.float64)
    weights[1] = torch.arange(1.0, rows + 1)
    weights[4, 0], weights[7] = -3.0, 0.5
    return weights


@pytest.mark.parametrize("function", [lime, context_cite])
def test_sparse_fits_find_known_weights(function):
    """Lasso gives a weight up as far as its penalty over the variance of a mask, at most.

    The weighted variance of a mask of chance 1/2 is at least 0.2 over 400 ablations; in the fit of
    ContextCite, where variables have scale 1, the bound is the penalty over the standard deviation.
    """
    case = explained(in_float64("llama"), targets=[[12], [8]])
    weights = known(2)
    asked = additive(case, weights)
    found = of_prompt(case, function(case, Options(budget=400)))
    bound = LASSO["alpha"] / (0.2 if function is lime else 0.2**0.5)
    assert float((found - weights).abs().max()) < bound
    assert bool((found.abs() < bound)[weights == 0].all())
    assert float((found - weights).abs().max()) > 1e-4  # the penalty is at work
    assert len(asked) <= 400


def test_shapley_values_of_an_additive_function_are_its_weights():
    case = explained(in_float64("llama"))
    weights = known(4)
    asked = additive(case, weights)
    found = of_prompt(case, kernel_shap(case, Options(budget=64)))
    assert_close(found, weights, 64)
    assert len(asked) <= 64


def test_context_cite_adds_up_to_the_fit_of_the_whole_target():
    """The log-odds of a target of three tokens are no sum of theirs."""
    case = explained(in_float64("llama"))
    found = of_prompt(case, context_cite(case, Options(budget=40, seed=2)))
    drawn = torch.Generator().manual_seed(2)
    kept = torch.rand(40, len(PROMPT), generator=drawn) < 0.5
    removed = [(~row).nonzero().flatten().tolist() for row in kept]
    logprobs = shortened(case.model, removed, TARGETS)
    linear = import_extra("sklearn.linear_model", "eval")
    masks = kept.double().numpy()
    scaled = (masks - masks.mean(0)) / masks.std(0)
    for rows in case.rows:
        p = logprobs[:, rows.start : rows.stop].sum(1).exp().numpy()
        odds = np.log(p / (1 - p)) / len(rows)
        model = linear.Lasso(alpha=0.01).fit(scaled, odds)
        expected = torch.from_numpy(model.coef_ / masks.std(0) * len(rows))
        mine = found[:, rows.start : rows.stop].sum(1)
        # coordinate descent ends where the gap is below 1e-4 of the variance, in either fit
        gap = 1e-4 * float((odds**2).sum())
        torch.testing.assert_close(mine, expected, rtol=0, atol=len(rows) * 2 * math.sqrt(2 * gap))
    differ = found[:, :3] - found[:, :1]
    assert float(differ.abs().max()) > 0.01  # tokens have weights of their own


def test_log_odds_of_several_tokens():
    p = torch.tensor([[0.5, 0.2], [0.9, 1 - 1e-12]], dtype=torch.float64)
    found = log_odds((p / (1 - p)).log())
    both = p.prod(1)
    torch.testing.assert_close(found, (both / (1 - both)).log(), rtol=1e-12, atol=1e-12)
    certain = torch.full((1, 2), 60.0, dtype=torch.float64)
    torch.testing.assert_close(log_odds(certain)[0].item(), 60 - math.log(2), rtol=1e-12, atol=0)


def shapley(value, count):
    """Exact Shapley values ``[R, M]`` of a function of the units that stay."""
    found = []
    for unit in range(count):
        rest = [other for other in range(count) if other != unit]
        total = 0
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for some in combinations(rest, size):
                total = total + share * (value({*some, unit}) - value(set(some)))
        found.append(total)
    return torch.stack(found)


def test_kernel_shap_tends_to_the_exact_shapley_values():
    """Over independent seeds the mean lies within five standard errors of them."""
    model, prompt, targets = in_float64("llama"), PROMPT[:5], [[12, 55]]
    case = explained(model, prompt, targets)
    known = {}

    def value(stays):
        key = frozenset(stays)
        if key not in known:
            ids = [token for place, token in enumerate(prompt) if place in key] or [1]
            known[key] = alone(model, ids, targets[0])
        return known[key]

    exact = shapley(value, len(prompt))
    several = [of_prompt(case, kernel_shap(case, Options(budget=1000, seed=s))) for s in range(6)]
    together = value(range(5)) - value(())
    for found in several:  # captum lets the two ends count as a million ablations
        torch.testing.assert_close(found.sum(0), together, rtol=1000 / 1e6, atol=1000 / 1e6)
    several = torch.stack(several)
    error = several.std(0) / len(several) ** 0.5
    assert bool(((several.mean(0) - exact).abs() < 5 * error).all())
    assert float(error.max()) < 0.2 * float(exact.abs().max())  # so it does tell
    interactions = exact - (
        value(range(5)) - torch.stack([value({*range(5)} - {u}) for u in range(5)])
    )
    assert float(interactions.abs().max()) > 8 * float(error.max())  # it is not additive


def test_one_unit_alone_has_all_of_the_value():
    model = in_float64("llama")
    explanation = Explainer(model, progress=False).explain(PROMPT, targets=TARGETS)
    case = Case.of(model, None, PROMPT, explanation)
    case.units, case.removable = case.units[:1], [0]
    case.measured = case.measured[:1]
    drop = shortened(model, [[]], TARGETS) - shortened(model, [[0]], TARGETS)
    assert_close(kernel_shap(case, Options(budget=2)), drop)


@pytest.mark.parametrize(("function", "method"), [(lime, Lime), (kernel_shap, KernelShap)])
def test_all_tokens_at_once_are_what_captum_gives_one_by_one(function, method):
    case = explained(in_float64("llama"))
    found = of_prompt(case, function(case, Options(budget=50, seed=5)))
    for column in range(found.shape[1]):

        def answer(kept, column=column):
            removed = [(row == 0).nonzero().flatten().tolist() for row in kept]
            return shortened(case.model, removed, TARGETS)[:, column].float()

        torch.manual_seed(5)
        expected = method(answer).attribute(torch.ones(1, len(PROMPT)), n_samples=50)
        # captum fits in float32, with weights up to 1e6, and ends Lasso at its tolerance
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            found[:, column].float(), expected[0], rtol=0, atol=scale * 1000 * ONE_STEP
        )


@pytest.mark.parametrize("function", SAMPLING)
def test_seeds_decide_and_budgets_are_kept(function):
    case = explained(in_float64("llama"))
    state = torch.random.get_rng_state()
    before = len(case.record.batch_sizes)
    first = of_prompt(case, function(case, Options(budget=24)))
    rows = sum(case.record.batch_sizes[before:])
    assert 12 <= rows / len(TARGETS) <= 24  # each ablation once for each target, none twice
    assert torch.equal(first, of_prompt(case, function(case, Options(budget=24))))
    assert not torch.equal(first, of_prompt(case, function(case, Options(budget=24, seed=1))))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool(first.isfinite().all())


@pytest.mark.parametrize("function", [*SAMPLING, leave_one_out, occlusion])
def test_pictures_have_scores_too(function):
    model, processor = seeing("llava")
    case = explained(model, [SMALL, "a picture of"], [" red"], processor)
    found = function(case, Options(budget=20))
    assert bool(found[case.removable].isfinite().all())
    assert torch.count_nonzero(found[case.removable]) > 5


def quarters(case):
    """The patches of each quarter of the picture, and every unit of text, worked out by hand."""
    found = {}
    for index in case.removable:
        unit = case.units[index]
        if unit.image is None:
            found[index] = [index]
            continue
        ((left, top, width, height),) = unit.boxes
        right, low = left + width / 2 >= SMALL.width / 2, top + height / 2 >= SMALL.height / 2
        found.setdefault((right, low), []).append(index)
    return list(found.values())


@pytest.mark.parametrize("function", SAMPLING)
def test_a_superpixel_is_removed_whole_and_its_weight_shared(function):
    """Of a sum over units, a linear fit finds what each piece adds to it."""
    model, processor = seeing("llava")
    case = explained(model, [SMALL, "a picture of"], [[12]], processor)
    weights = torch.arange(1.0, len(case.removable) + 1, dtype=torch.float64)[:, None] / 40
    asked = additive(case, weights)
    found = function(case, Options(budget=400, superpixels=2))[:, 0]
    pieces = quarters(case)
    assert sorted(map(len, pieces))[-4:] == [9, 9, 9, 9] and len(pieces) == 4 + 7
    for gone in map(set, asked):
        assert all(set(piece) <= gone or not set(piece) & gone for piece in pieces)
    assert len({frozenset(gone) for gone in asked}) > 100
    # what Lasso's penalty takes, as above, from masks that are not quite independent
    taken = {lime: LASSO["alpha"] / 0.2, context_cite: LASSO["alpha"] / 0.2**0.5}
    bound = 1.5 * taken.get(function, 0.0)
    for piece in pieces:
        own, whole = found[piece], float(weights[piece].sum())
        assert torch.equal(own, own[:1].expand(len(piece)))
        rounding = 64 * ONE_STEP * float(weights.sum())
        assert abs(float(own.sum()) - whole) < bound + rounding


@pytest.mark.parametrize("function", SAMPLING)
@pytest.mark.parametrize("superpixels", [0, 3])
def test_without_a_budget_there_are_ablations_for_every_piece(function, superpixels):
    model, processor = seeing("llava")
    case = explained(model, [SMALL, "a picture of"], [" red"], processor)
    asked = additive(case, torch.ones(len(case.removable), len(case.base_logprobs)))
    function(case, Options(superpixels=superpixels))
    pieces = len(pieces_of(case, superpixels))
    each, most = (4, 256) if function is kernel_shap else (2, 128)
    assert pieces == (len(case.removable) if superpixels == 0 else 9 + 7)
    assert 0.7 * min(each * pieces, most) < len(asked) <= min(each * pieces, most)


def test_text_has_no_superpixels():
    case = explained(in_float64("llama"))
    assert pieces_of(case, 6) == [[index] for index in case.removable]


@pytest.mark.parametrize("missing", ["captum", "sklearn"])
def test_what_is_not_installed_is_named_with_its_extra(missing, monkeypatch):

    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    baseline = Baseline(in_float64("llama"), method="lime", budget=4, progress=False)
    with pytest.raises(ImportError, match=rf"{missing} is not installed.*atman_triton\[eval\]"):
        baseline.explain(PROMPT, [12])
