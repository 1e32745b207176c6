"""What is read from the scores: postprocessing, scaling, parts of a target, contrasts."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_explanation import small
from toy_explanations import by_token, coarser, explain, explain_several, merge, sourced

from atman_triton.explanation import Explanation, load
from atman_triton.pieces import TargetPart
from atman_triton.reduction import normalized

NAN, INF = float("nan"), float("inf")
SCORES = [[1.0, NAN], [-0.5, 2.0]]  # of small()
change = dataclasses.replace


def same(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def both(**changes):
    """Two targets: words of the prompt do this much for one and for the other."""
    this = explain(answer=" 34 dollars", scores={"34": 2.0, "pay": 1.0, "51": -0.5})
    that = explain(answer=" 51", scores={"34": 0.5, "pay": 1.0, "51": 1.5})
    return merge([this, that], **changes)


def read(explanation: Explanation, values):
    """What each word of the prompt has."""
    pairs = zip(explanation.units, values.tolist(), strict=True)
    return {unit.text.strip(): value for unit, value in pairs if unit.part == "prompt"}


# Postprocessing.


@pytest.mark.parametrize(
    ("postprocessing", "mean", "total"),
    [
        ("none", [0.25, 2.0], [0.5, 2.0]),
        ("absolute", [0.75, 2.0], [1.5, 2.0]),
        ("square", [0.625, 4.0], [1.25, 4.0]),
    ],
)
def test_every_score_is_processed_before_the_reduction(postprocessing, mean, total):
    explanation = small(postprocessing=postprocessing)
    same(explanation.scores, SCORES)  # as measured
    same(explanation.relevance, mean)
    same(explanation.values(), mean)
    same(change(explanation, reduction="sum").relevance, total)
    assert explanation.ranking() == [1, 0]


def test_a_target_token_is_read_with_postprocessing():
    explanation = small(postprocessing="square")
    same(explanation.values(target=1), [0.25, 4.0])
    same(explanation.values(target=0), [1.0, NAN])
    opposing = small(((-0.5, NAN), (-0.5, -1.25)))
    assert opposing.ranking(target=1) == [1, 0]
    assert change(opposing, postprocessing="absolute").ranking(target=1) == [0, 1]


def test_of_several_targets_the_mean_is_of_what_was_processed():
    explanation = both(postprocessing="absolute")
    assert read(explanation, explanation.relevance)["51"] == 1.0  # of 0.5 and 1.5
    assert read(explanation, explanation.relevances[0])["51"] == 0.5
    assert read(both(), both().relevance)["51"] == 0.5  # of -0.5 and 1.5


def test_the_effect_and_completeness_stay_as_measured():
    from test_completeness import with_gradients

    plain = with_gradients(explain())
    for changes in ({"postprocessing": "square"}, {"normalize": True}):
        other = change(plain, **changes)
        assert other.effect == plain.effect
        assert other.completeness and plain.completeness
        assert other.completeness.error == plain.completeness.error
        same(other.answer_logprobs, plain.answer_logprobs.tolist())


# Scaling.


def test_normalized_goes_from_0_to_1_over_what_was_measured():
    explanation = explain(scores={"34": 3.0, "51": -1.0}, normalize=False)
    scaled = change(explanation, normalize=True)
    words = read(scaled, scaled.relevance)
    assert (words["34"], words["51"], words["The"]) == (1.0, 0.0, 0.25)
    same(scaled.scores, explanation.scores.tolist())
    assert scaled.ranking() == explanation.ranking()


def test_postprocessing_comes_before_scaling():
    explanation = explain(scores={"34": 3.0, "51": -1.0})
    scaled = change(explanation, normalize=True, postprocessing="absolute")
    words = read(scaled, scaled.relevance)
    assert words["The"] == 0.0
    assert words["51"] == pytest.approx(1 / 3)


def test_every_row_that_is_read_is_scaled_by_itself():
    explanation = sourced(both(), normalize=True)
    rows = [
        explanation.relevance,
        *explanation.relevances,
        *explanation.part_relevances,
        *(explanation.values(target=row) for row in range(3)),
        *(explanation.values(part=part) for part in range(3)),
    ]
    for row in rows:
        known = row[~row.isnan()]
        assert (known.min(), known.max()) == (0.0, 1.0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(width=32), min_size=1, max_size=6))
@example([-INF, 1.0, INF, 3.0, NAN])
@example([INF, INF])
@example([2.0, 2.0])
def test_scaling_keeps_order_and_what_is_missing(values):
    row = torch.tensor(values, dtype=torch.float64)
    scaled = normalized(row)
    assert torch.equal(scaled.isnan(), row.isnan())
    known = [(a, b) for a, b in zip(values, scaled.tolist(), strict=True) if not math.isnan(a)]
    assert all(0 <= after <= 1 for _, after in known)
    for (a, x), (b, y) in itertools.permutations(known, 2):
        assert a > b or x <= y
    finite = sorted({a for a, _ in known if math.isfinite(a)})
    ends = dict(known)
    if len(finite) > 1:
        assert (ends[finite[0]], ends[finite[-1]]) == (0.0, 1.0)
    elif finite:
        assert ends[finite[0]] == 0.0
    for infinity, end in ((INF, 1.0), (-INF, 0.0)):
        assert ends.get(infinity, end) == end


# Parts.


def test_a_part_is_read_over_its_own_tokens():
    explanation = small(parts=[TargetPart(" b", (0,), 1, 3), TargetPart(" c", (1,), 3, 5)])
    same(explanation.part_relevances, SCORES)
    same(explanation.values(part=1), SCORES[1])
    assert explanation.ranking(part=0) == [0]
    same(explanation.part_logprobs, [-1.0, -1.0])
    same(change(explanation, postprocessing="square").values(part=1), [0.25, 4.0])


def test_without_parts_every_target_is_one():
    explanation = explain_several()
    assert [part.text for part in explanation.parts] == explanation.answers
    assert [part.rows for part in explanation.parts] == [(0, 1), (2, 3), (4,)]
    spans = [(part.start, part.stop) for part in explanation.parts]
    assert [explanation.text[start:stop] for start, stop in spans] == explanation.answers
    same(explanation.part_relevances, explanation.relevances.tolist())
    same(explanation.part_logprobs, explanation.answer_logprobs.tolist())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_are_reduced_like_targets(reduction):
    explanation = explain(answer=" 34 dollars an hour", reduction=reduction)
    rows = [(0,), (1, 2), (3,)]
    parts = [TargetPart("x", each, None, None) for each in rows]
    explanation = change(explanation, parts=parts)
    for part, each in enumerate(rows):
        scores = explanation.scores[list(each)].double()
        total = scores.nansum(0) / ((~scores.isnan()).sum(0) if reduction == "mean" else 1)
        expected = total.where(~scores.isnan().all(0), NAN).float()
        torch.testing.assert_close(explanation.values(part=part), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": 5}, "part must lie in [0, 4], got 5."),
        ({"part": -1}, "part must lie in [0, 4], got -1."),
        ({"part": 0, "branch": 1}, "give one of target (a target token), branch"),
        ({"part": 0, "target": 1}, "got target=1, part=0."),
    ],
)
@pytest.mark.parametrize("read", ["values", "ranking", "show", "plot"])
def test_there_must_be_such_a_part(read, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(sourced(explain_several()), read)(**arguments)


# Contrasts.


def test_a_contrast_is_the_difference():
    explanation = both(contrast=True)
    words = read(explanation, explanation.relevance)
    assert (words["34"], words["pay"], words["51"]) == (1.5, 0.0, -2.0)
    assert explanation.units[explanation.ranking()[0]].text == " 34"
    owned = [unit.part == "target" for unit in explanation.units]
    assert explanation.relevance.isnan().tolist() == owned
    same(explanation.relevances, both().relevances.tolist())  # of either target alone
    same(explanation.values(branch=1), both().values(branch=1).tolist())
    assert repr(explanation).startswith(
        "Explanation(answer=' 34 dollars', rather_than=' 51', units=17, targets=3, "
    )


def test_the_difference_is_of_sums_or_of_means():
    explanation = both(contrast=True, reduction="sum")
    words = read(explanation, explanation.relevance)
    assert (words["34"], words["pay"], words["51"]) == (3.5, 1.0, -2.5)


@pytest.mark.parametrize(
    ("postprocessing", "expected"),
    [("absolute", (1.5, 0.0, 2.0)), ("square", (2.25, 0.0, 4.0))],
)
def test_the_difference_is_what_is_processed(postprocessing, expected):
    explanation = both(contrast=True, postprocessing=postprocessing)
    words = read(explanation, explanation.relevance)
    assert (words["34"], words["pay"], words["51"]) == expected
    processed = read(explanation, explanation.relevances[0])
    assert processed["51"] == {"absolute": 0.5, "square": 0.25}[postprocessing]


def test_a_contrast_can_be_scaled():
    explanation = both(contrast=True, normalize=True)
    words = read(explanation, explanation.relevance)
    assert (words["34"], words["51"], words["pay"]) == (1.0, 0.0, pytest.approx(2 / 3.5))


def test_one_side_of_a_contrast_is_none():
    explanation = both(contrast=True, normalize=True, postprocessing="absolute")
    this = explanation.branch(0)
    assert (this.contrast, this.normalize, this.postprocessing) == (False, True, "absolute")
    kept = [unit.branch in (None, 0) for unit in explanation.units]
    same(this.relevance, explanation.values(branch=0)[kept].tolist())


@pytest.mark.parametrize("make", [explain, explain_several])
def test_a_contrast_has_two_sides(make):
    count = len(make().target_stops)
    with pytest.raises(ValueError, match=rf"^contrast is between two targets, .* got {count}\.$"):
        change(make(), contrast=True)


# Everything together.

WAYS = [
    {"postprocessing": p, "normalize": n, "contrast": c, "reduction": r}
    for p in ("none", "absolute", "square")
    for n in (False, True)
    for c in (False, True)
    for r in ("mean", "sum")
]


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "-".join(map(str, ways.values())))
def test_saved_loaded_and_taken_apart_in_every_way(tmp_path, ways):
    explanation = sourced(both(**ways))
    explanation = change(explanation, coarse=coarser(sourced(both())))
    assert explanation.coarse and explanation.coarse.normalize == ways["normalize"]
    explanation.save(tmp_path / "a.json")
    loaded = load(tmp_path / "a.json")
    assert loaded == explanation
    same(loaded.relevance, explanation.relevance.tolist())
    same(loaded.part_relevances, explanation.part_relevances.tolist())
    for branch in range(2):
        one = loaded.branch(branch)
        kept = [unit.branch in (None, branch) for unit in explanation.units]
        same(one.relevance, explanation.values(branch=branch)[kept].tolist())
        parts = [i for i, part in enumerate(explanation.parts) if part.branch == branch]
        assert len(one.parts) == len(parts)
        for own, part in enumerate(parts):
            same(one.values(part=own), explanation.values(part=part)[kept].tolist())
            text = one.parts[own].text
            assert one.text[one.parts[own].start : one.parts[own].stop] == text
        assert one.documents == explanation.documents


def test_a_branch_keeps_documents_parts_and_its_own_neighbours():
    explanation = sourced(both())
    second = explanation.branch(1)
    alone = sourced(both().branch(1))
    assert second == alone
    amount = next(unit for unit in explanation.units if unit.text == " 51" and unit.branch is None)
    owners = [near.branch for near in amount.neighbours]
    assert sorted(owners, key=str) == [0, None, None]
    kept = next(unit for unit in second.units if unit.text == " 51" and unit.branch is None)
    assert [near.branch for near in kept.neighbours] == [None, None]
    first = explanation.branch(0)
    kept = next(unit for unit in first.units if unit.text == " 51" and unit.branch is None)
    assert [first.text[n.start : n.stop] for n in kept.neighbours] == [" pay", " 34", " 34"]
    assert [near.branch for near in kept.neighbours] == [None, None, 0]


def test_parts_of_the_second_target_count_from_its_own_first_token():
    explanation = change(explain_several(), parts=by_token(explain_several()))
    assert [part.rows for part in explanation.branch(1).parts] == [(0,), (1,)]
    assert [part.branch for part in explanation.branch(1).parts] == [0, 0]
