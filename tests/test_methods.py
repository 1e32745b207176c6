"""Exact, direct, hybrid and hierarchical: what each runs, and what its numbers are.

The document is long enough for every level; the model is random, so nothing is obvious.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from toy_models import MODELS, VOCABULARY, in_float64, llama, plain_loop
from toy_tokenizers import byte_level

from atman_triton import Explainer
from atman_triton.integration import UnsupportedModelError

TOKENIZER = byte_level()
DOCUMENT = (
    "The pay per hour is 23 euros. The notice period is four weeks.\n\n"
    "Hello world. The capital of France is Paris. Is it?\n\nBe brief."
)
ANSWERS = ["23 euros", "Paris", "four weeks. The"]
STEP = torch.finfo(torch.float32).eps


@cache
def model():
    return llama(max_position_embeddings=512).double()


def explained(method="exact", targets=None, prompt=DOCUMENT, tokenizer=TOKENIZER, **changes):
    arguments = {
        name: changes.pop(name)
        for name in ("explain_only", "reduction", "granularity")
        if name in changes
    }
    explainer = Explainer(model(), tokenizer, method=method, **changes)
    return explainer.explain(prompt, targets=targets or ANSWERS, **arguments)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=4 * STEP, atol=1e-5, equal_nan=True)


# --- exact and direct ---------------------------------------------------------------------------


def test_direct_effects_are_those_of_a_loop_over_the_target_s_rows():
    e = explained("direct", ANSWERS[:1])
    words = TOKENIZER(DOCUMENT).input_ids
    answer = [target.token_id for target in e.targets]
    loop = plain_loop(
        model(),
        words + answer[:-1],
        answer,
        [unit.tokens for unit in e.units],
        0.1,
        "min_shift",
        first_row=len(words) - 1,
    )
    known = ~e.scores.isnan()
    same(e.scores[known], (loop[0] - loop[1:]).T.float()[known])
    assert e.effect == "direct"
    assert {unit.effect for unit in e.units} == {"direct"}
    total = explained("exact", ANSWERS[:1])
    assert total.effect == "total"
    assert (e.scores - total.scores)[known].abs().max() > 0.1  # another quantity


def test_of_one_layer_the_direct_effect_is_the_total_one():
    """Suppressed in the last layer alone, nothing passes through other tokens."""
    direct = explained("direct", layers=[1])
    total = explained("exact", layers=[1])
    same(direct.scores, total.scores)


def test_the_last_token_s_effect_on_a_one_token_target_is_direct():
    """Only its own row sees it."""
    last = explained("direct", ["Paris"]).scores[:, -1]
    same(last, explained("exact", ["Paris"]).scores[:, -1])


def test_direct_costs_the_target_s_tokens():
    e = explained("direct")
    words = len(TOKENIZER(DOCUMENT).input_ids)
    columns = sum(len([t for t in e.targets if t.branch == k]) - 1 for k in range(3))
    tokens = words + columns + len(e.units) * (columns + 1)
    assert e.provenance["forwards"] == pytest.approx(tokens / words)
    assert (e.provenance["exact_runs"], e.provenance["direct_runs"]) == (0, len(e.units))


# --- hybrid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0.37, 1, 6, 10_000, 1.0, 1e-9])
@pytest.mark.parametrize("targets", [["Paris"], ANSWERS], ids=["one", "several"])
def test_hybrid_units_are_exact_or_direct_and_say_so(budget, targets):
    e = explained("hybrid", targets, budget=budget)
    exact, direct = explained("exact", targets), explained("direct", targets)
    assert [unit.tokens for unit in e.units] == [unit.tokens for unit in exact.units]
    total = torch.tensor([unit.effect == "total" for unit in e.units])
    same(e.scores[:, total], exact.scores[:, total])
    same(e.scores[:, ~total], direct.scores[:, ~total])
    share = 0.2 if budget is None else budget
    runs = share if isinstance(share, int) else max(1, math.floor(share * len(e.units)))
    assert int(total.sum()) == e.provenance["exact_runs"] == min(runs, len(e.units))
    assert e.provenance["direct_runs"] == len(e.units)
    assert e.effect == ("total" if total.all() else "mixed")
    assert e.method == e.provenance["method"] == "hybrid"
    # Those of the highest direct relevance in some target; ranks count from 1.
    places = direct.relevances.nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)
    best = places.argsort(dim=1).amin(0)
    assert best[total].max() <= (best[~total].min() if not total.all() else math.inf)


def test_hybrid_goes_by_each_target_s_own_ranking():
    """With as many runs as targets, every target's first is among them."""
    e = explained("hybrid", budget=len(ANSWERS))
    direct = explained("direct")
    chosen = {column for column, unit in enumerate(e.units) if unit.effect == "total"}
    assert set(direct.relevances.nan_to_num(-math.inf).argmax(1).tolist()) <= chosen


def test_hybrid_of_sentences():
    e = explained("hybrid", budget=2, granularity="sentence")
    exact = explained("exact", granularity="sentence")
    total = [column for column, unit in enumerate(e.units) if unit.effect == "total"]
    assert len(total) == 2
    same(e.scores[:, total], exact.scores[:, total])
    assert {unit.level for unit in e.units} == {"sentence"}


# --- hierarchical -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 12, 20, 0.5, 1.0])
@pytest.mark.parametrize("targets", [["Paris"], ANSWERS], ids=["one", "several"])
def test_hierarchical_units_divide_the_input(budget, targets):
    e = explained("hierarchical", targets, budget=budget)
    exact = explained("exact", targets)
    everything = sorted((str(u.branch), t) for u in exact.units for t in u.tokens)
    for each in (e, e.coarse):
        assert sorted((str(u.branch), t) for u in each.units for t in u.tokens) == everything
        spans = [(u.start, u.stop) for u in each.units]
        assert spans == sorted(spans)
    share = 0.25 if budget is None else budget
    runs = share if isinstance(share, int) else math.floor(share * len(exact.units))
    total = [unit for unit in e.units if unit.effect == "total"]
    assert len(total) == e.provenance["exact_runs"] <= runs
    assert e.coarse.coarse is None
    assert {u.level for u in e.coarse.units if u.part == "prompt"} == {"paragraph"}
    assert {u.effect for u in e.coarse.units} == {"direct"}
    assert {u.level for u in e.units} > {"token"} or budget == 1.0
    # Where it came down to tokens, their scores are those of an exact run.
    tokens = [c for c, unit in enumerate(e.units) if unit.level == "token"]
    assert tokens
    assert {e.units[c].effect for c in tokens} == {"total"}
    # Pieces keep their direct effect only where no run was left for them.
    if len(total) < runs:
        assert e.effect == "total"
    places = {(unit.tokens, unit.branch): column for column, unit in enumerate(exact.units)}
    columns = [places[e.units[c].tokens, e.units[c].branch] for c in tokens]
    same(e.scores[:, tokens], exact.scores[:, columns])


def test_every_size_has_the_scores_of_a_loop():
    e = explained("hierarchical", ["Paris"], budget=16)
    words = TOKENIZER(DOCUMENT).input_ids
    answer = [target.token_id for target in e.targets]
    for each in (e, e.coarse):
        units = [unit.tokens for unit in each.units]
        for effect, row in (("total", 0), ("direct", len(words) - 1)):
            loop = plain_loop(
                model(), words + answer[:-1], answer, units, 0.1, "min_shift", first_row=row
            )
            mine = torch.tensor([unit.effect == effect for unit in each.units])
            known = ~each.scores.isnan() & mine
            same(each.scores[known], (loop[0] - loop[1:]).T.float()[known])
    levels = {unit.level for unit in (*e.units, *e.coarse.units)}
    assert levels == {"paragraph", "sentence", "token"}


def test_the_best_paragraph_is_divided_first():
    e = explained("hierarchical", ["Paris"], budget=12)
    best = e.coarse.units[int(e.coarse.relevance.nan_to_num(-math.inf).argmax())]
    divided = {unit.tokens for unit in e.coarse.units} - {unit.tokens for unit in e.units}
    assert best.tokens in divided or best.level == "token"


def test_a_budget_below_the_target_s_own_tokens_is_refused():
    message = "budget must allow at least 2 runs for this input, got 1; raise it, or take method"
    with pytest.raises(ValueError, match=message):
        explained("hierarchical", [[5, 6, 7]], budget=1)
    e = explained("hierarchical", [[5, 6, 7]], budget=2)
    assert [unit.effect for unit in e.units if unit.part == "target"] == ["total"] * 2
    assert e.units[0].level == "paragraph" and e.units[0].effect == "direct"


def test_runs_that_are_left_go_to_the_best_pieces():
    """Too few for the tokens of any sentence, yet none is wasted."""
    e = explained("hierarchical", [[5]], budget=1)
    pieces = [unit for unit in e.units if unit.effect == "total"]
    assert len(pieces) == e.provenance["exact_runs"] == 1
    assert {unit.level for unit in pieces} <= {"paragraph", "sentence"}


def test_without_direct_effects_pieces_are_chosen_by_total_ones():
    from test_capabilities import STATEFUL, sharp

    stateful = sharp(STATEFUL["falcon-h1"][0])
    ids = [5 + token % 90 for token in range(40)]
    explainer = Explainer(stateful, method="hierarchical", budget=20)
    e = explainer.explain(ids, [8])
    assert e.effect == e.coarse.effect == "total"
    assert e.provenance["direct_runs"] == 0
    assert e.provenance["exact_runs"] <= 20
    assert [len(unit.tokens) for unit in e.coarse.units] == [8] * 5
    assert {unit.level for unit in e.units} == {"chunk", "token"}
    with pytest.raises(ValueError, match="budget must allow at least 5 runs for this input, got 4"):
        Explainer(stateful, method="hierarchical", budget=4).explain(ids, [8])


def test_ids_without_a_tokenizer_are_divided_into_chunks():
    ids = [token % VOCABULARY for token in range(3, 3 + 5 * 64, 1)]
    e = explained("hierarchical", [[5]], ids, None, budget=30)
    assert [len(unit.tokens) for unit in e.coarse.units] == [64] * 5
    assert {unit.level for unit in e.coarse.units} == {"chunk"}
    assert {len(unit.tokens) for unit in e.units} == {64, 8, 1}
    assert e.provenance["exact_runs"] <= 30
    assert sorted(token for unit in e.units for token in unit.tokens) == list(range(len(ids)))


def test_few_ids_are_tokens_from_the_start():
    e = explained("hierarchical", [[5]], [7, 9, 30, 4], None, budget=1.0)
    assert [unit.tokens for unit in e.units] == [(0,), (1,), (2,), (3,)]
    same(e.scores, explained("exact", [[5]], [7, 9, 30, 4], None).scores)
    assert e.coarse is None


# --- many targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "sentence", "paragraph"])
@pytest.mark.parametrize("method", ["exact", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_a_branch_is_what_a_separate_explanation_gives(name, method, granularity):
    explainer = Explainer(in_float64(name), TOKENIZER, method=method)
    prompt, answers = (
        "The pay is 23. Is it?\n\nYes.",
        ["23 euros", "Y", "four", "23 euros", "it is. A"],
    )
    e = explainer.explain(prompt, targets=answers, granularity=granularity)
    assert e.provenance["runner"] == "shared_prefix"
    assert e.provenance["runner_reasons"] == []
    for k, answer in enumerate(answers):
        alone = explainer.explain(prompt, answer, granularity)
        branch = e.branch(k)
        assert (branch.text, branch.prompt_stop) == (alone.text, alone.prompt_stop)
        assert branch.units == alone.units
        assert branch.targets == alone.targets
        assert branch.left_out == alone.left_out
        same(branch.scores, alone.scores)
        same(branch.base_logprobs, alone.base_logprobs)
        same(branch.relevance, alone.relevance)
    assert e.provenance["separator"] == [" "] * 5


def test_classes_cost_what_one_does():
    one = explained(targets=[[7]])
    many = explained(targets=[[token] for token in range(30, 80)])
    for name in ("batch_sizes", "forwards", "exact_runs"):
        assert many.provenance[name] == one.provenance[name]
    assert many.scores.shape == (50, len(one.units))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "hybrid"])
def test_direct_effects_are_refused_where_no_prefix_can_be_shared(method):
    from test_capabilities import STATEFUL, sharp

    stateful = sharp(STATEFUL["falcon-h1"][0])
    with pytest.raises(UnsupportedModelError, match="FalconH1ForCausalLM keeps a state besides"):
        Explainer(stateful, method=method).explain([5, 6, 7], [8])
    e = Explainer(stateful).explain([5, 6, 7], [8])
    assert e.method == e.provenance["method"] == "exact"
    assert {unit.effect for unit in e.units} == {"total"}
    assert e.provenance["method_choice"].startswith("default: no direct effects, because ")
    assert e.provenance["runner"] == "full"
    assert e.provenance["runner_reasons"] == [STATEFUL["falcon-h1"][1]]


@pytest.mark.parametrize(
    ("settings", "method", "choice"),
    [
        ({}, "direct", "default"),
        ({"preset": "paper"}, "exact", "default"),
        ({"mode": "min_shift_full"}, "exact", "default"),
        ({"method": "exact"}, "exact", "given"),
        ({"method": "direct", "preset": "paper"}, "direct", "given"),
    ],
)
def test_the_method_is_the_presets_unless_given(settings, method, choice):
    e = Explainer(model(), **settings).explain([5, 6, 7, 8], [9, 10])
    assert (e.method, e.provenance["method"]) == (method, method)
    assert e.provenance["method_choice"] == choice
    assert {unit.effect for unit in e.units} == {"total" if method == "exact" else "direct"}


@pytest.mark.parametrize("method", ["direct", "hybrid"])
def test_min_shift_full_has_no_direct_effect(method):
    message = f"method='{method}' keeps the prompt's keys .* take method='exact' or mode="
    with pytest.raises(ValueError, match=message):
        Explainer(model(), mode="min_shift_full", method=method)


@pytest.mark.parametrize(
    ("method", "budget", "error", "message"),
    [
        ("exact", 3, ValueError, "budget is for hybrid and hierarchical, but method is 'exact'"),
        ("direct", 0.5, ValueError, "budget is for hybrid and hierarchical, but method is 'dir"),
        ("hybrid", 0, ValueError, "budget as a count must be at least 1, got 0"),
        ("hybrid", -2, ValueError, "budget as a count must be at least 1, got -2"),
        ("hybrid", 0.0, ValueError, r"budget as a share must lie in \(0, 1\], got 0.0"),
        ("hierarchical", 1.5, ValueError, r"budget as a share must lie in \(0, 1\], got 1.5"),
        ("hybrid", float("nan"), ValueError, r"budget as a share must lie in \(0, 1\], got nan"),
        ("hybrid", True, TypeError, "budget must be a float .* or None, got True"),
        ("hybrid", "10%", TypeError, "budget must be a float .* or None, got '10%'"),
        ("path", 0.5, ValueError, "budget is for hybrid and hierarchical, but method is 'path'"),
        (
            "gradient",
            None,
            ValueError,
            "method must be one of exact, direct, hybrid, hierarchical, path, score_gradient, got",
        ),
    ],
)
def test_bad_methods_and_budgets_are_refused(method, budget, error, message):
    with pytest.raises(error, match=message):
        Explainer(model(), method=method, budget=budget)


def test_hierarchical_chooses_the_size_of_units_itself():
    with pytest.raises(ValueError, match="itself, got granularity='sentence'; leave it out"):
        explained("hierarchical", granularity="sentence")
