"""The data model: numbers, validation, several targets, data frames."""

import dataclasses
import re
import sys
from typing import Any

import pytest
import torch
from toy_explanations import (
    coarser,
    explain,
    explain_several,
    hierarchical,
    merge,
    with_effects,
)

from atman_triton.explanation import Explanation, LeftOut, Target, Unit

NAN, INF = float("nan"), float("inf")


def small(suppressed=((-2.0, NAN), (-0.5, -3.0)), reduction="mean", **changes: Any):
    fields: dict[str, Any] = {
        "text": "a b c",
        "prompt_stop": 1,
        "units": [Unit("a", (0,), 0, 1, "prompt"), Unit(" b", (1,), 1, 3, "target")],
        "targets": [Target(" b", 1, 7, 1, 3), Target(" c", 2, 8, 3, 5)],
        "base_logprobs": torch.tensor([-1.0, -1.0]),
        "suppressed_logprobs": torch.tensor(suppressed),
        "reduction": reduction,
    }
    return Explanation(**fields | changes)


def same(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_scores_are_positive_where_a_unit_supports():
    same(small().scores, [[1.0, NAN], [-0.5, 2.0]])


def test_relevance_counts_nan_as_absent():
    same(small().relevance, [0.25, 2.0])
    same(small(reduction="sum").relevance, [0.5, 2.0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_unit_that_was_never_measured_stays_nan(reduction):
    explanation = small(((-2.0, NAN), (-0.5, NAN)), reduction)
    assert explanation.relevance.isnan().tolist() == [False, True]
    assert explanation.ranking() == [0]


def test_prompt_answer_and_repr():
    explanation = small()
    assert (explanation.prompt, explanation.answer) == ("a", " b c")
    assert repr(explanation) == (
        "Explanation(answer=' b c', units=2, targets=2, reduction='mean', method='exact')"
    )
    loose = small(
        text="",
        prompt_stop=0,
        units=[Unit("a", (0,), None, None, "prompt")] * 2,
        targets=[Target("x", 1, 1, None, None)] * 2,
    )
    assert loose.answer == "xx"


def test_ranking_and_values():
    explanation = explain()
    words = [explanation.units[unit].text.strip() for unit in explanation.ranking()]
    assert words[:4] == ["34", "34", "pay", "The"]  # ties stay in text order
    assert words[-1] == "51"
    assert explanation.ranking(0).count(len(explanation.units) - 1) == 0  # NaN for the first target
    same(explanation.values(1), explanation.scores[1].tolist())


@pytest.mark.parametrize("target", [-1, 2])
def test_there_must_be_such_a_target(target):
    with pytest.raises(ValueError, match=rf"^target must lie in \[0, 1\], got {target}\.$"):
        small().values(target)


UNIT, TARGET = Unit("a", (0,), 0, 1, "prompt"), Target("b", 1, 7, 1, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": 3}, TypeError, "text must be a str, got int."),
        ({"prompt_stop": 6}, ValueError, "prompt_stop must lie in [0, 5], got 6."),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean' or 'sum', got 'max'."),
        ({"units": []}, ValueError, "units must hold at least one Unit, got none."),
        ({"targets": []}, ValueError, "targets must hold at least one Target, got none."),
        ({"units": [UNIT, TARGET]}, TypeError, "units[1] must be a Unit, got Target."),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, stop=6)]},
            ValueError,
            "units[1] must span characters within [0, 5], got 0:6.",
        ),
        (
            {"targets": [TARGET, dataclasses.replace(TARGET, start=None)]},
            ValueError,
            "targets[1] must span characters within [0, 5], got None:3.",
        ),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, part="image")]},
            ValueError,
            "units[1].part must be 'prompt' or 'target', got 'image'.",
        ),
        ({"base_logprobs": [0.0, 0.0]}, TypeError, "base_logprobs must be a tensor, got list."),
        (
            {"base_logprobs": torch.zeros(2, dtype=torch.float64)},
            TypeError,
            "base_logprobs must be torch.float32, got torch.float64.",
        ),
        (
            {"base_logprobs": torch.zeros(3)},
            ValueError,
            "base_logprobs must have shape [2], got [3].",
        ),
        (
            {"suppressed_logprobs": torch.zeros(2, 3)},
            ValueError,
            "suppressed_logprobs must have shape [2, 2], got [2, 3].",
        ),
        (
            {"base_logprobs": torch.tensor([0.0, NAN])},
            ValueError,
            "base_logprobs must hold no NaN: the model returned NaN with nothing suppressed; "
            "try another dtype.",
        ),
        (
            {"provenance": {"factor": NAN}},
            TypeError,
            "provenance must hold JSON values only: "
            "Out of range float values are not JSON compliant",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_fields_are_refused(changes, error, message):
    with pytest.raises(error) as caught:
        small(**changes)
    assert str(caught.value).startswith(message)


def test_tensors_are_detached_and_provenance_is_json():
    explanation = small(
        base_logprobs=torch.zeros(2, requires_grad=True), provenance={"layers": (0, 1)}
    )
    assert not explanation.scores.requires_grad
    assert explanation.provenance == {"layers": [0, 1]}


def test_data_frame_has_a_row_per_unit():
    explanation = explain()
    frame = explanation.to_dataframe()
    assert list(frame.columns) == [
        *("text", "part", "start", "stop", "relevance", "rank", "effect", "level"),
        *("0:  34", "1:  dollars"),
    ]
    assert frame["text"].tolist() == [unit.text for unit in explanation.units]
    assert sorted(frame["rank"].dropna().tolist()) == list(range(1, len(frame) + 1))
    assert frame["part"].iloc[-1] == "target"
    assert frame["0:  34"].isna().tolist() == [False] * (len(frame) - 1) + [True]


def test_data_frame_of_the_top():
    frame = explain().to_dataframe(top_k=3)
    assert frame["text"].str.strip().tolist() == ["34", "34", "pay"]
    assert frame["rank"].tolist() == [1, 2, 3]
    assert len(explain().to_dataframe(top_k=1000)) == len(explain().units)
    with pytest.raises(ValueError, match=r"^top_k must be at least 1, got 0\.$"):
        explain().to_dataframe(top_k=0)


def test_data_frame_of_one_target_and_of_units_without_a_place():
    explanation = explain(answer=" 34")
    assert explanation.to_dataframe().columns[-1] == "level"
    loose = small(units=[UNIT, Unit("?", (1,), None, None, "target")])
    assert loose.to_dataframe()["start"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [("pandas", "data", Explanation.to_dataframe), ("matplotlib", "plot", Explanation.plot)],
)
def test_a_missing_library_names_the_extra(monkeypatch, module, extra, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^{module} is not installed: .*\[{extra}\]'\.$"):
        call(explain())


def test_equality_looks_at_every_field():
    assert small() == small()
    assert small() != "small"
    changes: list[dict[str, Any]] = [
        {"text": "a b d"},
        {"suppressed": ((-2.0, NAN), (-0.5, -3.5))},
        {"reduction": "sum"},
        {"provenance": {"factor": 0.2}},
        {"left_out": [LeftOut("<s>", (0,), "special token")]},
        {"method": "hierarchical"},
        {"coarse": small()},
        {"units": [dataclasses.replace(UNIT, level="word"), small().units[1]]},
    ]
    for change in changes:
        assert small(**change) != small()
    direct = [dataclasses.replace(unit, effect="direct") for unit in small().units]
    assert small(units=direct, method="hybrid") != small(method="hybrid")
    two = {"target_stops": [3, 5], "targets": [small().targets[0], TARGET_C], **ONLY_PROMPT}
    assert small(**two) != small(**two | {"targets": small().targets, "target_stops": []})


# Several targets.

ONLY_PROMPT: dict[str, Any] = {
    "units": [Unit("a", (0,), 0, 1, "prompt")],
    "suppressed_logprobs": torch.tensor([[-2.0], [-0.5]]),
}
TARGET_C = Target(" c", 1, 8, 3, 5, branch=1)


def test_one_target_is_the_target_that_all_belong_to():
    explanation = small()
    assert explanation.target_stops == [5]
    assert [unit.branch for unit in explanation.units] == [None, 0]
    assert explanation.answers == [explanation.answer]
    assert explanation == small(target_stops=[5])
    same(explanation.relevances, [explanation.relevance.tolist()])
    assert explanation.branch(0) == explanation


def test_one_row_per_token_of_all_targets_in_order():
    explanation = explain_several()
    assert explanation.scores.shape == (5, len(explanation.units))
    assert [target.branch for target in explanation.targets] == [0, 0, 1, 1, 2]
    assert explanation.answers == [" 34 dollars", " 51 dollars", " no"]
    assert explanation.answer == " 34 dollars |  51 dollars |  no"
    assert repr(explanation).startswith("Explanation(answers=3, units=18, targets=5, ")
    same(explanation.answer_logprobs, [-0.75, -0.75, -0.25])


def test_answers_without_text_are_made_of_their_tokens():
    loose = small(
        text="",
        prompt_stop=0,
        target_stops=[0, 0],
        units=[Unit("a", (0,), None, None, "prompt")],
        suppressed_logprobs=torch.zeros(2, 1),
        targets=[Target("x", 1, 1, None, None), Target("y", 1, 1, None, None, 1)],
    )
    assert loose.answers == ["x", "y"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_branch_is_what_a_separate_explanation_gives(reduction):
    separate = [
        explain(answer=" 34 dollars", scores={"34": 2.0, "pay": 1.0}, reduction=reduction),
        explain(answer=" 51 dollars", scores={"51": 1.5, "34": -0.5}, reduction=reduction),
        explain(answer=" 9 to 5", scores={"hour.": 0.25, "9": 0.75}, reduction=reduction),
    ]
    several = merge(separate)
    for branch, each in enumerate(separate):
        each = dataclasses.replace(each, provenance=several.provenance)
        assert several.branch(branch) == each
        columns = [
            index for index, unit in enumerate(several.units) if unit.branch in (None, branch)
        ]
        same(several.relevances[branch][columns], each.relevance.tolist())
        rest = set(range(len(several.units))) - set(columns)
        assert several.relevances[branch][list(rest)].isnan().all()


def test_a_branch_counts_tokens_from_the_end_of_the_prompt():
    one = explain_several()
    by = {0: 0, 1: 2, 2: 4}  # the same targets, numbered on instead
    units = [
        dataclasses.replace(unit, tokens=(unit.tokens[0] + by[unit.branch or 0],))
        for unit in one.units
    ]
    targets = [dataclasses.replace(t, token=t.token + by[t.branch]) for t in one.targets]
    other = dataclasses.replace(one, units=units, targets=targets)
    assert [other.branch(k) for k in range(3)] == [one.branch(k) for k in range(3)]


def test_a_branch_keeps_what_is_left_out_of_it_and_its_coarse_explanation():
    pieces = [LeftOut("<s>", (0,), "special"), LeftOut("2", (17,), "not asked for", branch=1)]
    explanation = explain_several(left_out=pieces)
    explanation = dataclasses.replace(explanation, coarse=coarser(explanation))
    assert explanation.branch(0).left_out == pieces[:1]
    assert [piece.text for piece in explanation.branch(1).left_out] == ["<s>", "2"]
    assert explanation.branch(1).left_out[1].branch == 0
    assert explanation.coarse
    assert explanation.branch(1).coarse == explanation.coarse.branch(1)


def test_relevance_of_several_targets_is_the_mean_of_those_that_measured_it():
    suppressed = torch.tensor([[-2.0, NAN], [-4.0, NAN], [-1.5, -3.0]])
    explanation = small(
        text="a b c d",
        target_stops=[5, 7],
        units=[Unit("a", (0,), 0, 1, "prompt"), Unit(" d", (1,), 5, 7, "target", branch=1)],
        targets=[Target(" b", 1, 7, 1, 3), Target(" c", 2, 8, 3, 5), Target(" d", 2, 9, 5, 7, 1)],
        base_logprobs=-torch.ones(3),
        suppressed_logprobs=suppressed,
    )
    same(explanation.relevances, [[2.0, NAN], [0.5, 2.0]])
    same(explanation.relevance, [1.25, 2.0])
    same(explanation.values(branch=1), [0.5, 2.0])
    assert explanation.ranking() == [1, 0]
    assert explanation.ranking(branch=0) == [0]
    explanation = dataclasses.replace(explanation, reduction="sum")
    same(explanation.relevances, [[4.0, NAN], [0.5, 2.0]])
    same(explanation.relevance, [2.25, 2.0])


def test_an_infinite_score_stays_infinite():
    explanation = small(((-INF, NAN), (-0.5, -3.0)))
    same(explanation.relevance, [INF, 2.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branch": 3}, "branch must lie in [0, 2], got 3."),
        ({"branch": -1}, "branch must lie in [0, 2], got -1."),
        (
            {"target": 0, "branch": 1},
            "give one of target (a target token), branch (a whole target) and part (a piece of "
            "one), got target=0, branch=1.",
        ),
    ],
)
def test_there_must_be_such_a_branch(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        explain_several().values(**arguments)


def test_a_branch_needs_units():
    explanation = explain_several()
    assert explanation.units[-1].branch == 1
    alone = dataclasses.replace(
        explanation,
        units=explanation.units[-1:],
        suppressed_logprobs=explanation.suppressed_logprobs[:, -1:],
    )
    with pytest.raises(ValueError, match=r"^no unit belongs to target 2 or the prompt\.$"):
        alone.branch(2)
    with pytest.raises(ValueError, match=r"^branch must lie in \[0, 2\], got 3\.$"):
        alone.branch(3)


def test_data_frame_of_several_targets_has_a_column_for_each():
    explanation = explain_several()
    frame = explanation.to_dataframe()
    assert list(frame.columns[6:]) == [
        *("effect", "level", "branch", "0:  34 dollars", "1:  51 dollars", "2:  no")
    ]
    assert frame["branch"].dropna().tolist() == [0, 1]
    same(torch.tensor(frame["1:  51 dollars"].to_numpy()), explanation.relevances[1].tolist())


def test_data_frame_tells_effects_and_levels():
    mixed = with_effects(explain(), {"pay", "is"})
    assert set(mixed.to_dataframe().query("effect == 'direct'")["text"]) == {" pay", " is"}
    assert set(hierarchical().to_dataframe()["level"]) == {"word", "sentence"}


def test_effect_names_what_all_units_have():
    units = [dataclasses.replace(unit, effect="direct") for unit in small().units]
    assert small().effect == "total"
    assert small(units=units, method="direct").effect == "direct"
    assert with_effects(explain(), {"pay"}).effect == "mixed"


SECOND = dataclasses.replace(UNIT, start=1, stop=3, part="target")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"method": "fast"},
            ValueError,
            "units[0].effect must be 'baseline' where method is 'fast', got 'total'.",
        ),
        (
            {"method": ""},
            ValueError,
            "method must be a name, got ''.",
        ),
        (
            {"target_stops": [3]},
            ValueError,
            "target_stops must rise from prompt_stop 1 to the text's length 5, got [3].",
        ),
        ({"target_stops": [3, 2, 5]}, ValueError, "target_stops must rise from prompt_stop 1"),
        ({"target_stops": [0, 5]}, ValueError, "target_stops must rise from prompt_stop 1"),
        (
            {"target_stops": [3, 5]},
            ValueError,
            "targets must belong to targets 0 to 1 in order, at least one token each, got branches "
            "[0, 0].",
        ),
        (
            {"targets": [TARGET_C, TARGET], "target_stops": [3, 5]},
            ValueError,
            "targets must belong to targets 0 to 1 in order, at least one token each, got branches "
            "[1, 0].",
        ),
        (
            {"targets": [TARGET, TARGET_C]},
            ValueError,
            "targets must belong to targets 0 to 0 in order",
        ),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, branch=0)]},
            ValueError,
            "units[1].branch must be None for a piece of the prompt, got 0.",
        ),
        (
            {"units": [UNIT, SECOND], "targets": [TARGET, TARGET_C], "target_stops": [3, 5]},
            ValueError,
            "units[1].branch must lie in [0, 1], got None.",
        ),
        (
            {"units": [UNIT, dataclasses.replace(SECOND, branch=1)]},
            ValueError,
            "units[1].branch must lie in [0, 0], got 1.",
        ),
        (
            {
                "units": [UNIT, dataclasses.replace(SECOND, branch=1)],
                "targets": [TARGET, TARGET_C],
                "target_stops": [3, 5],
            },
            ValueError,
            "units[1] must span characters of target 1, within [3, 5], got 1:3.",
        ),
        (
            {
                "units": [UNIT, dataclasses.replace(UNIT, stop=2)],
                "targets": [TARGET, TARGET_C],
                "target_stops": [3, 5],
            },
            ValueError,
            "units[1] must span characters of the prompt, within [0, 1], got 0:2.",
        ),
        (
            {
                "units": [UNIT, dataclasses.replace(SECOND, branch=0)],
                "targets": [TARGET, TARGET_C],
                "target_stops": [3, 5],
            },
            ValueError,
            "suppressed_logprobs[1, 1] must be NaN: the unit belongs to target 0, the token to "
            "target 1.",
        ),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, effect="indirect")]},
            ValueError,
            "units[1].effect must be one of total, direct, path, gradient, baseline, "
            "got 'indirect'.",
        ),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, effect="direct")]},
            ValueError,
            "units[1].effect must be 'total' where method is 'exact', got 'direct'.",
        ),
        (
            {"method": "direct"},
            ValueError,
            "units[0].effect must be 'direct' where method is 'direct', got 'total'.",
        ),
        (
            {"units": [UNIT, dataclasses.replace(UNIT, level="page")]},
            ValueError,
            "units[1].level must be one of token, word, sentence, paragraph, chunk, delimited, "
            "span, turn, document, patch, tile, image, frame, seconds, got 'page'.",
        ),
        ({"coarse": {}}, TypeError, "coarse must be an Explanation or None, got dict."),
        (
            {"coarse": explain()},
            ValueError,
            "coarse must explain the same prompt and targets; text differ.",
        ),
        (
            {"coarse": small(targets=[TARGET, dataclasses.replace(TARGET, token_id=9)])},
            ValueError,
            "coarse must explain the same prompt and targets; targets differ.",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_fields_of_several_targets_and_methods_are_refused(changes, error, message):
    with pytest.raises(error) as caught:
        small(**changes)
    assert str(caught.value).startswith(message)
