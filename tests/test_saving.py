"""Saved explanations: exact, strict, old files still load, damage is named."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from toy_explanations import (
    HOSTILE,
    as_version,
    explain_several,
    hierarchical,
    sourced,
    with_effects,
)

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


@pytest.mark.parametrize(
    "make",
    [
        explain_several,
        hierarchical,
        lambda: with_effects(explain_several(), {"pay", "no"}),
        lambda: small(left_out=[LeftOut("<s>", (0,), "special token", branch=0)]),
    ],
    ids=["several", "hierarchical", "hybrid", "left out of a target"],
)
def test_targets_effects_and_coarse_explanations_come_back(tmp_path, make):
    explanation, path = make(), tmp_path / "saved.json"
    explanation.save(path)
    loaded = load(path)
    assert loaded == explanation
    for name in ("units", "targets", "left_out", "target_stops", "method", "coarse"):
        assert getattr(loaded, name) == getattr(explanation, name)
    assert torch.equal(loaded.scores.nan_to_num(9.0), explanation.scores.nan_to_num(9.0))


VERSION_1 = """{"format": "atman_explanation", "version": 1, "text": "a b c", "prompt_stop": 1,
 "units": [{"text": "a", "tokens": [0], "start": 0, "stop": 1, "part": "prompt"},
           {"text": " b", "tokens": [1], "start": 1, "stop": 3, "part": "target"}],
 "targets": [{"text": " b", "token": 1, "token_id": 7, "start": 1, "stop": 3},
             {"text": " c", "token": 2, "token_id": 8, "start": 3, "stop": 5}],
 "base_logprobs": [-1.0, -1.0], "suppressed_logprobs": [[-2.0, null], [-0.5, -3.0]],
 "reduction": "mean", "left_out": [{"text": "<s>", "tokens": [], "reason": "special token"}],
 "provenance": {"factor": 0.1}}"""


def test_a_file_of_version_1_still_loads(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(VERSION_1)
    expected = small(left_out=[LeftOut("<s>", (), "special token")], provenance={"factor": 0.1})
    assert load(path) == expected
    assert (expected.method, expected.target_stops, expected.coarse) == ("exact", [5], None)


def test_a_file_of_version_1_holds_no_newer_field(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(VERSION_1.replace('"part": "prompt"', '"part": "prompt", "branch": null'))
    with pytest.raises(ValueError, match=r"units\[0\] has the unknown field 'branch'\.$"):
        load(path)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("make", [small, explain_several, hierarchical])
def test_files_of_later_versions_still_load(make, version):
    old = as_version(to_json(make()), version)
    assert from_json(old) == make()
    newer = "boxes" if version == 4 else "neighbours"
    old["units"][0][newer] = []
    with pytest.raises(ValueError, match=rf"^units\[0\] has the unknown field '{newer}'\.$"):
        from_json(old)


def test_other_fields_of_the_whole_are_ignored():
    assert from_json(to_json(small()) | {"ranking": [0]}) == small()


def test_the_file_is_strict_json_with_a_version(tmp_path):
    path = tmp_path / "saved.json"
    small().save(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (data["format"], data["version"]) == ("atman_explanation", 5)
    assert data["suppressed_logprobs"][0] == [-2.0, None]


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
            lambda text: damage(text, version=6),
            "has version 6, this release reads up to version 5: upgrade atman_triton.",
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
        (["units", 0, "branch"], "0", "units[0].branch must be an int or null, got '0'."),
        (["units", 0, "effect"], None, "units[0].effect must be a str, got None."),
        (
            ["units", 0, "effect"],
            "half",
            "units[0].effect must be one of total, direct, path, gradient, baseline, got 'half'",
        ),
        (["units", 0, "level"], 1, "units[0].level must be a str, got 1."),
        (["targets", 0, "branch"], None, "targets[0].branch must be an int, got None."),
        (["left_out", 0, "branch"], 1.5, "left_out[0].branch must be an int or null, got 1.5."),
        (["target_stops"], 5, "target_stops must be a list, got 5."),
        (["target_stops", 0], 5.0, "target_stops[0] must be an int, got 5.0."),
        (["method"], None, "method must be a str, got None."),
        (["coarse"], [1], "coarse must be an object or null, got [1]."),
        (["coarse"], {}, "coarse lacks 'units'."),
        (["coarse", "text"], 5, "in coarse, text must be a str, got 5."),
        (["coarse", "units", 0, "level"], 5, "in coarse, units[0].level must be a str, got 5."),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_named(tmp_path, path, value, message):
    file = tmp_path / "saved.json"
    small(left_out=[LeftOut("<s>", (0,), "special token")], coarse=small()).save(file)
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


def test_documents_neighbours_and_parts_come_back(tmp_path):
    explanation = sourced(explain_several())
    ways = {"postprocessing": "square", "normalize": True}
    explanation = dataclasses.replace(explanation, **ways)
    explanation.save(tmp_path / "saved.json")
    loaded = load(tmp_path / "saved.json")
    assert loaded == explanation
    for name in ("units", "documents", "parts", *ways):
        assert getattr(loaded, name) == getattr(explanation, name)
    assert loaded.units[1].neighbours == explanation.units[1].neighbours != ()
    changes = {"postprocessing": "absolute", "normalize": False, "documents": [], "parts": []}
    plain = [dataclasses.replace(u, document=None) for u in explanation.units]
    assert dataclasses.replace(explanation, units=plain) != explanation
    for change in changes.items():
        other = dict([change]) | ({"units": plain} if change[0] == "documents" else {})
        assert dataclasses.replace(explanation, **other) != explanation


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["documents"], None, "documents must be a list, got None."),
        (["documents", 0], "a", "documents[0] must be an object, got 'a'."),
        (["documents", 0, "id"], 5, "documents[0].id must be a str, got 5."),
        (["documents", 0, "start"], None, "documents[0].start must be an int, got None."),
        (["documents", 1, "stop"], 2.5, "documents[1].stop must be an int, got 2.5."),
        (["documents", 1, "title"], "a", "documents[1] has the unknown field 'title'."),
        (["documents", 1, "stop"], 2000, "documents[1] must span characters of the prompt"),
        (["parts"], {}, "parts must be a list, got {}."),
        (["parts", 1, "text"], None, "parts[1].text must be a str, got None."),
        (["parts", 1, "rows"], [True], "parts[1].rows[0] must be an int, got True."),
        (["parts", 1, "rows"], [0], "parts[1].rows must be target tokens that no part before"),
        (["parts", 1, "start"], "1", "parts[1].start must be an int or null, got '1'."),
        (["parts", 1, "branch"], None, "parts[1].branch must be an int, got None."),
        (["postprocessing"], 1, "postprocessing must be a str, got 1."),
        (["postprocessing"], "cube", "postprocessing must be 'none', 'absolute' or 'square'"),
        (["normalize"], 1, "normalize must be true or false, got 1."),
        (["contrast"], None, "contrast must be true or false, got None."),
        (["contrast"], True, "contrast is between two targets"),
        (["units", 0, "document"], "pay", "units[0].document must be an int or null, got 'pay'."),
        (["units", 0, "document"], 2, "units[0].document must be None or one of the 2 documents"),
        (["units", 1, "neighbours"], None, "units[1].neighbours must be a list, got None."),
        (["units", 1, "neighbours", 0], {}, "units[1].neighbours[0] must be a list, got {}."),
        (["units", 1, "neighbours", 0], [1], "units[1].neighbours[0] must have length 6, got 1."),
        (
            ["units", 1, "neighbours", 0, 0],
            -1,
            "units[1].neighbours[0].token must be at least 0, got -1.",
        ),
        (
            ["units", 1, "neighbours", 0, 0],
            None,
            "units[1].neighbours[0].token must be an int, got None.",
        ),
        (
            ["units", 1, "neighbours", 1, 1],
            "0.1",
            "units[1].neighbours[1].factor must be a number, got '0.1'.",
        ),
        (
            ["units", 1, "neighbours", 1, 2],
            True,
            "units[1].neighbours[1].similarity must be a number, got True.",
        ),
        (
            ["units", 1, "neighbours", 1, 3],
            True,
            "units[1].neighbours[1].start must be an int or null, got True.",
        ),
        (
            ["units", 1, "neighbours", 1, 4],
            1.5,
            "units[1].neighbours[1].stop must be an int or null, got 1.5.",
        ),
        (
            ["units", 1, "neighbours", 0, 5],
            "0",
            "units[1].neighbours[0].branch must be an int or null, got '0'.",
        ),
    ],
    ids=str,
)
def test_a_wrong_document_neighbour_or_part_is_named(path, value, message):
    data = json.loads(json.dumps(to_json(sourced(explain_several()))))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        from_json(data)
    assert str(caught.value).startswith(message)


def test_a_factor_that_is_a_whole_number_is_one():
    data = to_json(sourced(explain_several()))
    data["units"][1]["neighbours"][0][1:3] = [0, 1]
    near = from_json(data).units[1].neighbours[0]
    assert (near.factor, near.similarity) == (0.0, 1.0)
    assert type(near.factor) is float
