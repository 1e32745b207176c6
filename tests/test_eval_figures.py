"""What figures of an evaluation show, against the results they are drawn from."""

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import toy_results as toy
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.text import Text

from atman_triton.baselines import BASELINES
from atman_triton.evaluate.bootstrap import Interval, bootstrap
from atman_triton.evaluate.faithfulness import SHARES
from atman_triton.evaluate.figures import draw_all, draw_sweep
from atman_triton.evaluate.figures.collected import Collected, NothingToDraw, picked
from atman_triton.evaluate.figures.curves import curves, mean_curve
from atman_triton.evaluate.figures.dataset import dataset
from atman_triton.evaluate.figures.gallery import gallery
from atman_triton.evaluate.figures.heats import lines
from atman_triton.evaluate.figures.pareto import Point, front, pareto, points
from atman_triton.evaluate.figures.placing import overlap, place_labels
from atman_triton.evaluate.figures.questions import binned, by_questions
from atman_triton.evaluate.figures.spread import boxes, histograms
from atman_triton.evaluate.figures.style import family_of, framed, label, look
from atman_triton.evaluate.figures.summary import summary
from atman_triton.evaluate.figures.suppression import pairs, suppression
from atman_triton.evaluate.figures.sweep import sweep

READING = "signed mean"
FEW = ("direct", "direct similarity=0.6", "exact multiplicative", "chefer", "random")
NAN = math.nan


@dataclass(frozen=True)
class Row:
    method: str
    reading: str = READING
    chosen: bool = True
    paper: dict[str, float] = field(default_factory=dict)


def collected(results, methods=FEW, paper=None, grouped=False):
    rows = [Row(name, paper=(paper or {}).get(name, {})) for name in methods]
    return Collected.of(results, rows, "made up, a model", grouped=grouped)


@pytest.fixture(scope="module")
def texts():
    return toy.texts(12)


@pytest.fixture(scope="module")
def results(texts):
    return toy.results(texts, FEW)


@pytest.fixture(scope="module")
def of_pictures():
    examples = toy.pictures(6)
    return examples, toy.results(examples, FEW)


def without_numbers(results):
    """The same with NaN in place of every number, and no curve."""
    return [
        replace(
            result,
            alignment={
                reading: dict.fromkeys(own, NAN) for reading, own in result.alignment.items()
            },
            faithfulness=dict.fromkeys(result.faithfulness, NAN),
            curve={order: [NAN] * len(SHARES) for order in result.curve},
            heat={},
        )
        for result in results
    ]


def some_nan(results):
    """NaN of the first reported example of every method."""
    first = next(result.example for result in results if result.split == "report")
    return [
        without_numbers([result])[0] if result.example == first else result for result in results
    ]


def panels(figure) -> Any:
    return figure.axes


def words(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def said(figure):
    return " ".join(" ".join(words(figure)).split())


def bars(axes):
    return [
        bar
        for container in axes.containers
        if isinstance(container, BarContainer)
        for bar in container.patches
    ]


def precisions(results, method):
    return [
        result.alignment[READING]["precision"]
        for result in results
        if result.method == method and result.split == "report"
    ]


# --- names ------------------------------------------------------------------------------------


def test_every_method_has_a_family_a_label_and_a_look_of_its_own():
    names = [*toy.METHODS, *(name for name in BASELINES if name not in toy.METHODS)]
    assert {family_of(name) for name in names} == {
        *("atman", "gradients", "attention", "removal", "random"),
    }
    assert family_of("chefer") == "attention" and family_of("grad_cam") == "gradients"
    assert family_of("occlusion") == "removal" and family_of("released") == "atman"
    assert len({label(name) for name in names}) == len(names)
    looks = {(look(name).colour, look(name).mark, look(name).hollow) for name in names}
    assert len(looks) == len(names)
    assert label("exact multiplicative similarity=0.7 rule=paper") == (
        "AtMan exact, multiplicative, κ\N{NO-BREAK SPACE}0.7 (paper)"
    )
    assert label("lime budget=64") == "LIME, budget 64" and label("path steps=4").endswith(" 4")


def test_who_is_shown_does_not_depend_on_results_and_chance_is():
    assert picked(["random", "path", "chefer", "new", "exact"], 3) == ["exact", "chefer", "random"]
    assert picked(["random", "new"], 1) == ["random"]
    assert picked(["random", "path"], 1, floor=False) == ["path"]
    assert picked(list(toy.METHODS), 99)[-1] == "random"
    assert sorted(picked(list(toy.METHODS), 99)) == sorted(toy.METHODS)


def test_only_reported_results_in_the_chosen_reading_count(results):
    rows = [Row("chefer", "squared sum"), Row("chefer", "absolute sum", chosen=False)]
    own = Collected.of(results, rows, "title")
    assert own.methods == ["chefer"]
    expected = {
        result.example: result.alignment["squared sum"]["precision"]
        for result in results
        if result.method == "chefer" and result.split == "report"
    }
    assert own.values("chefer", "mAP") == expected and len(expected) == 10
    assert own.intervals("mAP") == {"chefer": bootstrap(list(expected.values()))}
    assert own.intervals("stability") == {}


# --- bars, boxes, lines -----------------------------------------------------------------------


def test_summary_bars_are_the_tables_numbers(results):
    figure = summary(collected(results, paper={"chefer": {"mAP": 0.727}}), "SQuAD")
    left, right = panels(figure)
    names = [text.get_text() for text in left.get_yticklabels()]
    assert sorted(names) == sorted(label(name) for name in FEW)
    means = {label(name): 100 * bootstrap(precisions(results, name)).value for name in FEW}
    assert [bar.get_width() for bar in bars(left)] == pytest.approx([means[n] for n in names])
    assert [bar.get_width() for bar in bars(left)] == sorted(means.values())
    gaps = {
        label(name): np.mean(
            [
                result.faithfulness["removal_gap"]
                for result in results
                if result.method == name and result.split == "report"
            ]
        )
        for name in FEW
    }
    assert [bar.get_width() for bar in bars(right)] == pytest.approx([gaps[n] for n in names])
    (marks,) = [each for each in left.collections if isinstance(each, PathCollection)]
    ((value, place),) = np.asarray(marks.get_offsets())
    assert value == pytest.approx(72.7) and names[int(place)] == "Chefer et al."
    assert not [each for each in right.collections if isinstance(each, PathCollection)]
    assert "the paper's, on its 6B model, SQuAD" in words(figure)
    colours = {name: bar.get_facecolor() for name, bar in zip(names, bars(left), strict=True)}
    assert colours["AtMan direct"] == colours["AtMan exact, multiplicative"]
    assert colours["Chefer et al."] == colours["random"] != colours["AtMan direct"]
    assert "made up, a model; 10 examples. " in said(figure)


def test_without_the_papers_numbers_nothing_is_said_of_them(results):
    figure = summary(collected(results))
    assert not any("6B" in text for text in words(figure))


def test_boxes_are_quartiles_of_every_method(results):
    figure = boxes(collected(results))
    left, _ = panels(figure)
    names = [text.get_text() for text in left.get_yticklabels()]
    chefer = names.index("Chefer et al.")
    box = bars(left)[chefer]
    values = 100 * np.array(precisions(results, "chefer"))
    first, third = np.quantile(values, (0.25, 0.75))
    assert box.get_x() == pytest.approx(first)
    assert box.get_width() == pytest.approx(third - first)
    marks = {
        line.get_ydata()[0]: line.get_xdata()[0]
        for line in left.lines
        if len(line.get_xdata()) == 1
    }
    assert marks[chefer] == pytest.approx(values.mean())
    assert list(marks.values()) == sorted(marks.values())


def test_histograms_hold_all_examples(results):
    figure = histograms(collected(results))
    assert len(panels(figure)) == 2 * len(FEW)
    for axes in panels(figure):
        assert sum(bar.get_height() for bar in bars(axes)) == pytest.approx(100)
    titles = [axes.get_title(loc="left") for axes in panels(figure)[::2]]
    assert titles == [label(name) for name in picked(FEW, 8)]


def test_lines_over_questions_are_means_of_their_groups(texts, results):
    figure = by_questions(collected(results))
    (axes,) = panels(figure)
    lines_of = {each.get_label(): each for each in axes.containers}
    assert set(lines_of) == {label(name) for name in FEW}
    drawn = lines_of["Chefer et al."].lines[0].get_ydata()
    questions = {example.id: example.facts["questions"] for example in texts}
    for place, count in enumerate(sorted(set(questions.values()))):
        own = [
            100 * result.alignment[READING]["precision"]
            for result in results
            if result.method == "chefer"
            and result.split == "report"
            and questions[result.example] == count
        ]
        assert drawn[place] == pytest.approx(np.mean(own))
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["1\n(2)", "2\n(3)", "3\n(2)", "4\n(3)"]


def test_groups_of_counts():
    assert binned([3, 1, 1, 7]) == [(1, 1), (3, 3), (7, 7)]
    groups = binned([*range(1, 18), 40])
    assert groups == [(1, 5), (6, 10), (11, 15), (16, 20), (36, 40)]


def test_curves_are_means_over_whole_curves(results):
    own = collected(results)
    figure = curves(own)
    most, least = panels(figure)
    assert len(most.lines) == len(least.lines) == len(FEW)
    (line,) = [each for each in least.lines if each.get_label() == "Chefer et al."]
    whole = list(own.by_method["chefer"].values())
    assert line.get_xdata() == pytest.approx(100 * np.array(SHARES))
    assert line.get_ydata() == pytest.approx(
        np.mean([result.curve["least"] for result in whole], axis=0)
    )
    means, low, high = mean_curve(whole, "most")
    assert all(a <= b <= c for a, b, c in zip(low, means, high, strict=True))
    cut = [replace(whole[0], curve={"most": [NAN] * len(SHARES), "least": [0.0] * len(SHARES)})]
    assert "9 examples" in said(curves(collected([*cut, *whole[1:]])))


# --- cost -------------------------------------------------------------------------------------


def point(name, forwards, value):
    return Point(name, forwards, Interval(value, value - 1, value + 1, 5))


def test_the_front_by_hand():
    cheap, same, worse, dear = (
        point("a", 1, 5),
        point("b", 1, 4),
        point("c", 2, 5),
        point("d", 3, 6),
    )
    assert front([dear, worse, same, cheap]) == [cheap, dear]


def test_pareto_shows_every_method(results):
    own = collected(results)
    figure = pareto(own)
    upper, lower = panels(figure)
    by_name = {each.method: each for each in points(own, "mAP")}
    assert by_name["chefer"].quality.value == pytest.approx(
        100 * np.mean(precisions(results, "chefer"))
    )
    for axes in (upper, lower):
        assert axes.get_xscale() == "log"
        shown = [text.get_text() for text in axes.texts]
        (floor,) = [text for text in shown if text.startswith("random")]
        assert sorted(shown) == sorted([*(label(name) for name in FEW if name != "random"), floor])


def test_labels_do_not_touch_each_other_or_points():
    figure, _ = framed(3, "title", "caption", free=True)
    axes = figure.add_axes((0.1, 0.2, 0.8, 0.6))
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    labels = [(5 + 0.1 * (n % 3), 5 + 0.2 * n, f"method {n}", n < 3, "black") for n in range(12)]
    placed = place_labels(axes, labels, 8, lines=[(0, 5, 10, 5)])
    assert len(placed) == 12
    at = [axes.transData.transform(each[:2]) * 72 / figure.dpi for each in labels]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    for index, box in enumerate(placed):
        assert not any(overlap(box, other) for other in placed[:index])
        assert not any(overlap(box, mark) for mark in marks)
    line = axes.transData.transform((0, 5))[1] * 72 / figure.dpi
    assert not any(box[1] < line < box[3] for box in placed)
    crowd = [(5, 5, "a very long label " * 3, True, "black")] * 60
    with pytest.raises(ValueError, match="finds no room; draw fewer points"):
        place_labels(axes, crowd, 8)


# --- heat maps --------------------------------------------------------------------------------


def test_strips_hold_the_relevance_of_each_character(texts, results):
    figure = gallery(results, texts, "title")
    shown = lines(texts[0])
    assert "".join(line for _, line in shown) == toy.TEXT
    first = panels(figure)[0]
    names = picked(FEW[:-1], 8)
    assert len(first.images) == len(shown) * len(names)
    result = next(r for r in results if r.example == "text-0" and r.method == names[0])
    most = max(map(abs, result.heat["values"]))
    row = first.images[0].get_array()[0]
    assert len(row) == len(shown[0][1])
    for (start, stop), value in zip(result.heat["units"], result.heat["values"], strict=True):
        if stop <= len(row):
            assert row[start:stop].tolist() == pytest.approx([value / most] * (stop - start))
    assert "the first 4 examples" in said(figure)
    assert "random" not in words(figure)


def test_lines_on_which_nothing_is_relevant_have_no_strips(texts, results):
    shown = lines(texts[0])
    values = [2.0 * (start == shown[1][0]) for start, _ in shown]
    units = [[start, start + len(line)] for start, line in shown]
    own = replace(results[0], heat={"units": units, "values": values})
    assert len(panels(gallery([own], texts, "title"))[0].images) == 1
    faint = replace(own, heat={"units": units, "values": [0.1, *values[1:]]})
    assert len(panels(gallery([faint], texts, "title"))[0].images) == 2


def test_long_texts_are_cut_around_their_label(texts):
    before, after = "Nothing happens here. " * 80, "And nothing follows. " * 80
    whole = before + toy.TEXT + after
    place = whole.index(toy.ANSWER)
    long = replace(
        texts[0],
        prompt=f"{whole}Q: Who? A:",
        region=(0, len(whole)),
        labels=((place, place + len(toy.ANSWER)),),
    )
    shown = lines(long)
    assert len(shown) == 9
    assert all(whole[start : start + len(line)] == line for start, line in shown)
    assert any(start <= place < start + len(line) for start, line in shown)


def test_units_that_were_not_measured_are_grey(of_pictures):
    examples, results = of_pictures
    own = replace(
        results[0],
        heat={"units": [[[0, 0, 24, 20], [0, 20, 24, 28]], [[24, 0, 24, 48]]], "values": [1, None]},
    )
    figure = gallery([own], examples, "title")
    assert len(panels(figure)) == 2
    picture, over = (axes.images[0].get_array() for axes in panels(figure))
    assert picture.shape == over.shape
    side = over.shape[1]
    orange, grey = over[5, 5].tolist(), over[5, side - 5].tolist()
    assert orange[0] > orange[2] + 100 and grey[0] == grey[1] == grey[2]
    assert "dark grey was not measured" in said(figure)


def test_a_gallery_of_pictures_has_a_column_for_each_method(of_pictures):
    examples, results = of_pictures
    figure = gallery(results, examples[:2], "title")
    assert len(panels(figure)) == 2 * (1 + len(FEW))
    titles = [axes.get_title() for axes in panels(figure)[: 1 + len(FEW)]]
    assert titles[0] == "square" and titles[-1] == "random"
    missing = [r for r in results if (r.example, r.method) != ("picture-1", "chefer")]
    assert "no result" in words(gallery(missing, examples[:2], "title"))


def test_pairs_with_and_without_similarity(texts, results, of_pictures):
    assert pairs(FEW) == [("direct", "direct similarity=0.6")]
    several = ["exact multiplicative similarity=0.7 rule=paper", "exact multiplicative", "released"]
    assert pairs(several) == [(several[1], several[0])]
    figure = suppression(collected(results), texts)
    left = panels(figure)[0]
    assert [bar.get_width() for bar in bars(left)] == pytest.approx(
        [100 * np.mean(precisions(results, name)) for name in ("direct", "direct similarity=0.6")]
    )
    assert len(panels(figure)[2].images) == 2 * len(lines(texts[0]))
    examples, own = of_pictures
    figure = suppression(collected(own), examples)
    assert len(panels(figure)) == 2 + 4 * 3
    with pytest.raises(NothingToDraw, match="both with and without similarity"):
        suppression(collected(results, ("direct", "chefer")), texts[:0])


# --- sweep, data ------------------------------------------------------------------------------


def cell(value, **options):
    interval = Interval(value, value - 0.1, value + 0.1, 40)
    return SimpleNamespace(options=options, values={"mAP": interval})


def test_a_sweep_has_its_numbers_in_their_places():
    cells = [
        cell(0.1 * n + (kappa == "0.5"), factor=factor, similarity=kappa)
        for n, factor in enumerate(("0", "0.5"))
        for kappa in ("none", "0.5")
    ]
    figure = sweep(cells, "direct; made up")
    axes = panels(figure)[0]
    assert axes.images[0].get_array().tolist() == [
        [0, pytest.approx(10)],
        [100, pytest.approx(110)],
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["none", "0.5"]
    (frame,) = axes.patches
    assert frame.get_xy() == (0.5, 0.5)
    assert "110.0" in words(figure) and "100.0 to 120.0" in words(figure)
    assert not panels(sweep([cell(0.5, steps="1"), cell(0.5, steps="2")], "title"))[0].patches
    low, high = (
        panels(sweep([cell(0.5, steps="1"), cell(0.51, steps="2")], "t"))[0].images[0].get_clim()
    )
    assert (low, high) == (50, pytest.approx(70))  # as wide as an interval
    with pytest.raises(ValueError, match="comes twice"):
        sweep([*cells, cells[0]], "title")


def test_a_sweep_over_one_option_with_a_cell_that_failed(tmp_path):
    cells = [cell(NAN, steps="2"), cell(0.4, steps="4")]
    values = panels(sweep(cells, "title"))[0].images[0].get_array()
    assert np.ma.getmaskarray(values).tolist() == [[True, False]]
    with pytest.raises(NothingToDraw, match="no cell of the sweep"):
        draw_sweep(cells[:1], tmp_path / "sweep.png", "title")
    assert draw_sweep(cells, tmp_path / "sweep.png", "title").stat().st_size > 1000


def test_histograms_of_the_data():
    figure = dataset({"questions": [1, 2, 2, 4], "length": [0.5, 2.25, NAN], "none": []}, "title")
    first, second = panels(figure)
    assert [bar.get_height() for bar in bars(first)] == [1, 2, 0, 1]
    assert first.lines[0].get_xdata()[0] == pytest.approx(2.25)
    assert sum(bar.get_height() for bar in bars(second)) == 2
    with pytest.raises(NothingToDraw, match="no statistics"):
        dataset({"none": []}, "title")


# --- all, and what is missing -----------------------------------------------------------------

EVERY = (summary, pareto, curves, boxes, histograms, by_questions)


@pytest.mark.parametrize("draw", EVERY)
def test_nan_is_left_out_and_nothing_is_drawn_of_nothing(draw, texts, results):
    assert "9 examples" in said(draw(collected(some_nan(results))))
    with pytest.raises(NothingToDraw):
        draw(collected(without_numbers(results)))


def test_heat_maps_of_results_without_any(texts, results):
    with pytest.raises(NothingToDraw, match="relevances"):
        gallery(without_numbers(results), texts, "title")
    with pytest.raises(NothingToDraw, match="no labels and no heat maps"):
        suppression(collected(without_numbers(results)), texts)
    figure = suppression(collected(some_nan(results)), texts)
    assert "9 examples" in said(figure)


def test_one_method_alone(texts, results):
    alone = [result for result in results if result.method == "chefer"]
    own = collected(alone, ("chefer",))
    for draw in (summary, curves, boxes, histograms, by_questions):
        draw(own)
    with pytest.raises(NothingToDraw, match="fewer than two methods"):
        pareto(own)


def test_all_are_written_or_said_to_be_missing(tmp_path, texts, results):
    told = []
    statistics = SimpleNamespace(values={"questions": [1, 2, 3]})
    rows = [Row(name) for name in FEW]
    paths = draw_all(
        without_numbers(results), rows, statistics, tmp_path, "made up", texts, say=told.append
    )
    assert [path.name for path in paths] == ["data.png"]
    assert len(told) == 8 and all(" is left out: " in line for line in told)
    old = tmp_path / "questions.png"
    old.write_bytes(b"of an earlier run")
    told.clear()
    few = [replace(result, facts={}) for result in results if result.method in FEW[:2]]
    paths = draw_all(few, rows, None, tmp_path, "made up", texts, say=told.append)
    names = [path.stem for path in paths]
    assert names == "summary pareto curves boxes histograms suppression gallery".split()
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert not old.exists() and told == [
        "questions.png is left out: examples do not differ in their paragraph's number of "
        "questions.",
        "data.png is left out: there are no statistics of the data.",
    ]
