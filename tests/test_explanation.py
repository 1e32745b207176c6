"""The data model: numbers, validation, data frames, files."""

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch
from toy_explanations import HOSTILE, explain

from atman_triton.explanation import Explanation, LeftOut, Target, Unit, from_json, load, to_json

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
    assert repr(explanation) == ("Explanation(answer=' b c', units=2, targets=2, reduction='mean')")
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
        *("text", "part", "start", "stop", "relevance", "rank"),
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
    assert "rank" in explanation.to_dataframe().columns[-1]
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


def test_saved_and_loaded_is_exactly_equal(tmp_path):
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32)
    numbers = bits.view(torch.float32)
    numbers[:6] = torch.tensor([NAN, INF, -INF, 1e-45, -0.0, 3.4028235e38])
    units = [Unit(HOSTILE[:9], (index, 7), 0, 1, "prompt") for index in range(2000)]
    explanation = small(
        numbers.view(2, 2000).tolist(),
        text="é\ud800<",
        units=units,
        targets=[Target("x", 1, 7, None, None), Target(HOSTILE, 2, 8, 1, 3)],
        base_logprobs=torch.tensor([-INF, 0.1]),
        left_out=[LeftOut("<s>", (0, 1), "special token")],
        provenance={"model": "ü", "layers": (1, 2), "factor": 0.1},
    )
    path = tmp_path / "saved.json"
    explanation.save(path)
    loaded = load(path)
    assert loaded == explanation
    actual, expected = loaded.suppressed_logprobs, explanation.suppressed_logprobs
    assert torch.equal(actual.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(actual.view(torch.int32)[known], expected.view(torch.int32)[known])
    assert loaded.units == explanation.units
    assert loaded.left_out == explanation.left_out


def test_the_file_is_strict_json_with_a_version(tmp_path):
    path = tmp_path / "saved.json"
    small().save(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (data["format"], data["version"]) == ("atman_explanation", 1)
    assert data["suppressed_logprobs"][0] == [-2.0, None]


def test_equality_looks_at_every_field():
    assert small() == small()
    assert small() != "small"
    changes: list[dict[str, Any]] = [
        {"text": "a b d"},
        {"suppressed": ((-2.0, NAN), (-0.5, -3.5))},
        {"reduction": "sum"},
        {"provenance": {"factor": 0.2}},
        {"left_out": [LeftOut("<s>", (0,), "special token")]},
    ]
    for change in changes:
        assert small(**change) != small()


def damage(text, **changes):
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:200], "is no complete JSON file (line 1, column "),
        (lambda text: "", "it may be cut short."),
        (lambda text: "[1, 2]", 'is no saved explanation: it lacks "format": "atman_explanation".'),
        (lambda text: damage(text, format="png"), 'it lacks "format": "atman_explanation".'),
        (
            lambda text: damage(text, version=2),
            "has version 2, this release reads up to version 1: upgrade atman_triton.",
        ),
        (
            lambda text: damage(text, version="1"),
            "is damaged: version must be a positive integer, got '1'.",
        ),
        (lambda text: damage(text, base_logprobs=[0.0]), "base_logprobs must have shape [2]"),
        (lambda text: damage(text, suppressed_logprobs=[[0.0, 0.0], [0.0]]), "is damaged: "),
        (lambda text: damage(text, suppressed_logprobs=[]), "is damaged: "),
        (lambda text: damage(text, units=[3]), "is damaged: "),
        (lambda text: damage(text, units=[{"text": "a"}]), "is damaged: units[0] lacks 'tokens'."),
        (lambda text: text.replace("prompt_stop", "stop_prompt"), "it lacks 'prompt_stop'."),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why(tmp_path, edit, message):
    path = tmp_path / "saved.json"
    small().save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(ValueError, match=r"saved\.json") as caught:
        load(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], True, "version must be a positive integer, got True."),
        (["text"], 5, "text must be a str, got 5."),
        (["prompt_stop"], 1.0, "prompt_stop must be an int, got 1.0."),
        (["prompt_stop"], True, "prompt_stop must be an int, got True."),
        (["reduction"], ["mean"], "reduction must be a str, got ['mean']."),
        (["units"], {}, "units must be a list, got {}."),
        (["units", 1], "ab", "units[1] must be an object, got 'ab'."),
        (["units", 0, "text"], 5, "units[0].text must be a str, got 5."),
        (["units", 0, "tokens"], "ab", "units[0].tokens must be a list, got 'ab'."),
        (["units", 0, "tokens"], [0, True], "units[0].tokens[1] must be an int, got True."),
        (["units", 0, "tokens"], [-1], "units[0].tokens[0] must be at least 0, got -1."),
        (["units", 1, "start"], "1", "units[1].start must be an int or null, got '1'."),
        (["units", 1, "stop"], 2.5, "units[1].stop must be an int or null, got 2.5."),
        (["units", 1, "part"], ["target"], "units[1].part must be a str, got ['target']."),
        (["units", 1, "colour"], 1, "units[1] has the unknown field 'colour'."),
        (["targets", 0, "token"], "1", "targets[0].token must be an int, got '1'."),
        (["targets", 0, "token_id"], None, "targets[0].token_id must be an int, got None."),
        (["targets", 1, "text"], None, "targets[1].text must be a str, got None."),
        (["base_logprobs"], 1, "base_logprobs must be a list, got 1."),
        (["base_logprobs", 1], "x", "base_logprobs[1] must be a number, got 'x'."),
        (["base_logprobs", 1], True, "base_logprobs[1] must be a number, got True."),
        (["base_logprobs", 1], 10**400, "int too large to convert to float"),
        (["suppressed_logprobs"], "ab", "suppressed_logprobs must be a list, got 'ab'."),
        (["suppressed_logprobs"], [[1], [1, 2]], "suppressed_logprobs[0] must have length 2"),
        (["suppressed_logprobs"], [], "suppressed_logprobs must have length 2, got 0."),
        (["suppressed_logprobs", 1], "ab", "suppressed_logprobs[1] must be a list, got 'ab'."),
        (["suppressed_logprobs", 1, 0], [], "suppressed_logprobs[1][0] must be a number, got []."),
        (["left_out"], None, "left_out must be a list, got None."),
        (["left_out", 0, "reason"], 1, "left_out[0].reason must be a str, got 1."),
        (["provenance"], [1], "provenance must be an object, got [1]."),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, path, value, message):
    file = tmp_path / "saved.json"
    small(left_out=[LeftOut("<s>", (0,), "special token")]).save(file)
    data = json.loads(file.read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="is damaged: ") as caught:
        load(file)
    assert str(caught.value).startswith(f"{file} is damaged: {message}")


def test_a_whole_number_is_a_log_probability():
    data = to_json(small()) | {"base_logprobs": [-1, -1]}
    assert from_json(data) == small()


def test_other_files_cannot_be_loaded(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"picture.png is no saved explanation: it is not text\.$"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.json")
