"""The benchmark of shapes in small: its judgements by hand, and a run."""

import csv
import dataclasses
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from atman_triton.demo.shapes import make_picture
from atman_triton.demo.shapes.model import make_model, make_processor
from atman_triton.pieces import Unit
from bench import shapes, shapes_cost, shapes_pointing, shapes_questions, shapes_redundancy
from bench.shapes_rows import Row, Setting, average, put, rate, read, row

SIDE = 96


@pytest.fixture(scope="module")
def reader():
    """An untrained model of the real shape."""
    torch.manual_seed(0)
    processor = make_processor()
    return make_model(processor, layers=1, tower=1).eval(), processor


def patches():
    """Of a picture of 4×4 patches."""
    side = SIDE / 4
    return [
        Unit(f"patch {k}", (k,), None, None, "prompt", level="patch", image=0, boxes=(box,))
        for k, box in enumerate(
            (x * side, y * side, side, side) for y in range(4) for x in range(4)
        )
    ]


def mask(*places):
    """The pixels of some of the 16 patches."""
    grid = torch.zeros(4, 4, dtype=torch.bool)
    for place in places:
        grid[place // 4, place % 4] = True
    return grid.repeat_interleave(SIDE // 4, 0).repeat_interleave(SIDE // 4, 1)


def test_intervals():
    # Wilson's, as tables give them: 8 of 10, none of 5.
    assert rate([True] * 8 + [False] * 2) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert rate([False] * 5) == pytest.approx((0.0, 0.0, 0.4345), abs=1e-4)
    mean, low, high = average([float(k % 10) for k in range(100)])
    # The mean's standard error is 0.287, and 1.96 of them stand on either side.
    assert mean == 4.5
    assert (4.5 - low, high - 4.5) == pytest.approx((0.563, 0.563), abs=0.06)


def test_rows_of_a_part_take_the_place_of_its_earlier_ones(tmp_path):
    path = tmp_path / "shapes.csv"

    def of(part, value, kappa=None):
        setting = Setting("direct", similarity=kappa)
        return row(part, "two objects", setting, "right", 3, (value, 0.0, 1.0))

    put([of("cost", 0.5), of("cost", 0.25, 0.6)], path)
    put([of("pointing", 1.0)], path)
    whole = put([of("cost", 0.75, 0.6)], path)
    assert [(each.part, each.value) for each in whole] == [("pointing", 1.0), ("cost", 0.75)]
    assert read(path) == whole
    assert whole[1].similarity == 0.6 and whole[0].similarity is None


def test_of_a_joined_unit_all_boxes_count_and_each_patch_is_in_one_unit():
    found = shapes_redundancy.grouped(patches(), [mask(0, 1), mask(1, 2, 15)])
    assert [unit.tokens for unit in found[:3]] == [(0, 1), (2, 15), (3,)]
    assert len(found) == 2 + 12
    assert len(found[1].boxes) == 2


@pytest.mark.parametrize(
    ("rises", "on", "top", "strength"),
    [
        ({0: 3.0, 1: 1.0, 5: 2.0}, 4 / 6, True, 0.75),
        ({0: 2.0, 1: 1.0, 5: 3.0}, 3 / 6, False, 0.5),
        ({5: -3.0}, 0.0, True, 0.0),  # nothing is positive: the first of equals is on it
    ],
)
def test_an_object_is_found_where_most_relevance_stands_on_it(rises, on, top, strength):
    values = torch.zeros(16)
    for place, value in rises.items():
        values[place] = value
    found = shapes_redundancy.judge(patches(), values, mask(0, 1), whole=4.0)
    assert found == pytest.approx((on, top, strength))
    assert found.found == (on > 0.5)
    assert shapes_redundancy.judge(patches(), values, mask(0, 1), whole=-1.0).strength == 0


def test_a_name_is_right_where_its_object_holds_more_than_the_other(reader):
    picture = make_picture("by hand", 2, balanced=True)
    explanation = shapes_pointing.explained(*reader, picture, Setting("direct"))
    masks = [torch.from_numpy(shape.mask) for shape in picture.objects]
    units = explanation.units
    measured = ~explanation.suppressed_logprobs.isnan()
    base = explanation.base_logprobs[:, None].expand_as(measured)
    chosen = base.where(measured, torch.nan)  # all of it stands on the second object
    inside = [bool(unit.boxes) and shapes_pointing.covered(unit, masks[1]) == 1 for unit in units]
    chosen[:, inside] -= 1.0
    found = shapes_pointing.pointed(replace(explanation, suppressed_logprobs=chosen), picture)
    assert found.on == (0.0, 1.0)
    assert found.off == (1.0, 0.0)
    assert found.right == [False, True]
    assert found.top == (False, True)
    nothing = replace(explanation, suppressed_logprobs=(base * 0).where(measured, torch.nan))
    assert shapes_pointing.pointed(nothing, picture).right == [False, False]


def test_questions_are_judged_by_object_and_words(reader):
    picture, asked = shapes_questions.asked(0)
    for kind, question in asked.items():
        start, stop = shapes_questions.deciding(question)
        words = question.text[start:stop]
        if kind in ("present", "absent"):
            name = picture.objects[question.about[0]].name
            assert (words == name) == (kind == "present")
            assert len(words.split()) == 2
        else:
            assert "likes" in words and words.endswith(".")
        assert question.answer == (" yes" if kind in ("present", "liked") else " no")
    question = asked["present"]
    explanation = shapes_questions.explained(*reader, picture, question, "direct")
    assert explanation.answer in shapes_questions.ANSWERS
    values = explanation.base_logprobs[:, None].expand_as(explanation.suppressed_logprobs).clone()
    object_mask = torch.from_numpy(picture.objects[question.about[0]].mask)
    patch = next(
        place
        for place, unit in enumerate(explanation.units)
        if unit.boxes and shapes_questions.covered(unit, object_mask) > 0
    )
    name = picture.objects[question.about[0]].name.split()[0]
    word = next(place for place, unit in enumerate(explanation.units) if name in unit.text)
    values[:, patch] -= 3.0
    values[:, word] -= 1.0
    found = replace(explanation, suppressed_logprobs=values)
    whole = shapes_questions.explained(*reader, picture, question, "direct", "image")
    of_image = [unit.image is not None for unit in whole.units]
    assert sum(of_image) == 1
    judged = shapes_questions.judged(found, whole, picture, question)
    assert judged.on_picture == pytest.approx(0.75)
    sizes = whole.relevance[[unit.part == "prompt" for unit in whole.units]].abs()
    assert judged.as_one == pytest.approx(float(sizes[of_image.index(True)] / sizes.sum()))
    assert judged.object_first and judged.words_first and judged.both
    values[:, patch] += 4.0
    values[:, word] += 2.0
    judged = shapes_questions.judged(found, whole, picture, question)
    assert not judged.object_first and not judged.words_first


def test_a_small_run(tmp_path, monkeypatch, capsys, reader):
    def start():
        shapes._worker["model"], shapes._worker["processor"] = reader

    monkeypatch.setattr(shapes, "_start", start)
    few = (Setting("direct"), Setting("direct", similarity=0.6))
    monkeypatch.setattr(shapes_pointing, "SETTINGS", few)
    monkeypatch.setattr(shapes_redundancy, "EFFECTS", {"direct": "direct"})
    monkeypatch.setattr(shapes_redundancy, "KAPPAS", {"direct": (None, 0.6)})
    monkeypatch.setattr(shapes_questions, "METHODS", ("direct",))
    monkeypatch.setattr(
        shapes_cost, "take_turns", lambda calls, *_, **__: {name: [2.0] for name in calls}
    )
    where = ["--pictures", "2", "--processes", "0", "--out", str(tmp_path), "--docs", str(tmp_path)]
    shapes.main(where)
    with (tmp_path / "shapes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Row)]
    assert {each["part"] for each in rows} == {*shapes.SAMPLED, "cost"}
    assert all(float(each["low"]) <= float(each["value"]) <= float(each["high"]) for each in rows)
    for name in ("shapes.png", "explain-image.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "144 patches" in said
    with pytest.raises(SystemExit, match="2"):
        shapes.main(["points"])
    assert "parts must be among pointing, redundancy" in capsys.readouterr().err
