"""The HTML page of several targets, of direct effects, of units of every size."""

import dataclasses

import pytest
import torch
from pictures import CHROMIUM, Page, drive
from toy_explanations import (
    CONTRACT,
    HOSTILE,
    coarser,
    explain,
    explain_several,
    hierarchical,
    merge,
    with_effects,
)

from atman_triton.render import layout, wording
from atman_triton.render.html import to_html

NAN, INF = float("nan"), float("inf")


def radios(page, name):
    return [e for e in page.elements if e.attributes.get("name") == name]


def attribute(page, name, value):
    return next(e for e in page.elements if e.attributes.get(name) == value)


def unpacked(data, row):
    """What the script makes of a target token's row."""
    packed, values = data["rows"][row + 1], [NAN] * len(data["owner"])
    own = [u for u, b in enumerate(data["owner"]) if b in (-1, data["branch"][row])]
    for unit, steps in zip(own, packed["steps"], strict=True):
        special = {None: NAN, "+": INF, "-": -INF}
        values[unit] = special[steps] if steps in special else steps * packed["step"]
    return values


def test_several_targets_can_be_chosen_and_then_their_tokens():
    page = Page(explain_several().to_html())
    assert [e.attributes["value"] for e in radios(page, "branch")] == ["0", "-1", "-2", "-3"]
    assert [e.attributes["value"] for e in radios(page, "target0")] == ["-1", "1", "2"]
    assert [e.attributes["value"] for e in radios(page, "target1")] == ["-2", "3", "4"]
    assert not radios(page, "target2")  # of a single token
    assert not radios(page, "target")
    for name in ("branch", "target0", "target1"):
        assert ["checked" in e.attributes for e in radios(page, name)][:2] == [True, False]
    for branch in "01":
        assert "hidden" in attribute(page, "data-of", branch).attributes
    assert [e.text for e in page.elements if e.tag == "bdi"][:4] == [
        *("all (mean)", "34 dollars", "51 dollars", "no")
    ]
    assert [e.text for e in page.elements if e.tag == "small"][:3] == ["47.2%", "47.2%", "77.9%"]


def test_the_text_of_each_target_is_there_but_hidden():
    explanation = explain_several()
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    hidden = [e for e in page.elements if "data-b" in e.attributes]
    assert [e.attributes["data-b"] for e in hidden] == ["0", "1", "2"]
    assert all("hidden" in e.attributes for e in hidden)
    tokens = [s.attributes["data-t"] for s in page.spans if "data-t" in s.attributes]
    assert tokens == ["0", "1", "2", "3", "4"]
    styles = {s.text: s.attributes.get("style") for s in page.spans}
    assert styles["Overtime"] == "--v:0.667"  # scaled by the prompt's units


def test_the_numbers_of_several_targets_are_packed():
    explanation = explain_several()
    explanation.suppressed_logprobs[3, :2] = torch.tensor([INF, -INF])
    explanation.suppressed_logprobs[4, 2] = NAN
    data = Page(explanation.to_html()).data["explanations"][0]
    assert len(data["rows"]) == 6
    values = torch.tensor([unpacked(data, row) for row in range(5)])
    torch.testing.assert_close(values, explanation.scores, rtol=0, atol=2e-5, equal_nan=True)
    assert len(data["rows"][5]["steps"]) == 16  # the prompt's units
    assert [data["stops"][0], data["stops"][-1]] == [len(CONTRACT), len(explanation.text)]
    assert data["rows"][0][-2:] == [None, None]  # a target's units
    assert data["rows"][0][4:-2] == pytest.approx(explanation.relevance[4:-2].tolist(), rel=1e-4)


def test_many_targets_have_a_filter_and_stay_small():
    html = explain_several(350).to_html()
    page = Page(html)
    assert "hidden" in attribute(page, "id", "tools").attributes
    assert attribute(page, "id", "filter").attributes["type"] == "search"
    assert len(radios(page, "branch")) == 351
    assert len(html) < 400_000
    few = Page(explain_several().to_html())
    assert not [e for e in few.elements if e.attributes.get("id") == "tools"]


def test_every_control_has_a_name():
    for explanation in (explain_several(9), hierarchical(), explain_several()):
        page = Page(explanation.to_html())
        inputs = [e for e in page.elements if e.tag in ("input", "select")]
        labels = [e for e in page.elements if e.tag == "label"]
        assert len(inputs) == len(labels)
        assert len([e for e in page.elements if e.tag == "fieldset"]) == len(
            [e for e in page.elements if e.tag == "legend" and e.text]
        )


def page_text(page):
    return next(e.text for e in page.elements if e.attributes.get("class") == "sub")


def keys(page):
    return [e.text for e in page.elements if e.attributes.get("class") == "hint key"]


def test_the_page_says_what_the_numbers_are():
    direct = explain()
    units = [dataclasses.replace(unit, effect="direct") for unit in direct.units]
    direct = dataclasses.replace(direct, units=units, method="direct")
    words = "direct effect: only the answer's own rows are manipulated."
    for explanation, scores, shown in (
        (explain(), "Scores: total effect.", 0),
        (direct, f"Scores: {words}", 0),
        (explain_several(), "Scores: total effect.", 0),
        (with_effects(explain(), {"pay"}), f"but where a line is dashed a {words}", 1),
    ):
        page = Page(explanation.to_html())
        assert page_text(page).endswith(scores)
        assert len(keys(page)) == shown
        assert all(wording.DIFFERENCE in key for key in keys(page))
    assert page_text(Page(to_html([direct, direct]))).endswith(f"Scores: {words}")
    assert "Scores:" not in page_text(Page(to_html([direct, explain()])))


def test_direct_effects_among_total_ones_are_marked():
    scores = {"34": 2.0, "pay": 1.0, "is": 0.001}
    page = Page(with_effects(explain(scores=scores), {"pay", "is"}).to_html())
    marked = [s.text for s in page.spans if "d" in s.attributes["class"].split()]
    assert marked == ["pay"]
    data = page.data["explanations"][0]
    assert (data["effect"], data["direct"]) == ("mixed", [1, 2, 8])


def test_units_of_every_size_are_on_the_page():
    explanation = hierarchical()
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    assert [e.attributes["value"] for e in radios(page, "level")] == ["0", "1", "2"]
    names = [e.text for e in page.elements if e.tag == "bdi"][:3]
    assert names == ["words and sentences (9)", "sentences (3)", "paragraphs (2)"]
    assert len(page.data["explanations"]) == 3
    assert not page.data["overlay"]
    for size, each in enumerate(layout.by_size(explanation)):
        data = page.data["explanations"][size]
        assert data["levels"] == [unit.level for unit in each.units]
        texts = [""] * len(each.units)
        for span, piece in zip(page.spans, page.data["pieces"], strict=True):
            for unit in piece[size]:
                texts[unit] += span.text
        if size:  # all of a large unit is coloured, the spaces between its words too
            assert texts == [unit.text.lstrip(" ") for unit in each.units]
    # At first the finest are shown.
    colours = {s.text: s.attributes.get("style") for s in page.spans}
    assert colours["pay"] == "--v:0.500"


def test_units_of_every_size_without_a_place_stand_behind_the_text():
    fine = explain()
    coarse = coarser(fine)
    fine.units[0] = dataclasses.replace(fine.units[0], start=None, stop=None)
    coarse.units[0] = dataclasses.replace(coarse.units[0], text="§", start=None, stop=None)
    page = Page(dataclasses.replace(fine, method="hierarchical", coarse=coarse).to_html())
    assert page.text == fine.text + "\nNot in the text: The\nNot in the text: §"
    first = [e["units"][0] for e in page.data["explanations"]]
    assert [page.text[slice(*span)] for span in first] == ["The", "§"]
    assert [e["text"] for e in page.data["explanations"]] == [page.text] * 2


def test_the_mark_of_a_line_break_stands_where_it_breaks():
    html = coarser(explain()).to_html()
    assert 'Overtime is 51 dollars.<i class="nl" aria-hidden="true"></i>\n</span>' in html


def test_hostile_text_is_only_text_among_targets_and_sizes():
    several = merge([explain(HOSTILE, " " + HOSTILE), explain(HOSTILE, " <b>no</b>")])
    several = dataclasses.replace(several, method="hierarchical", coarse=coarser(several))
    page = Page(several.to_html())
    assert page.text == layout.printable(several.text)
    assert {e.tag for e in page.elements if e.inside} <= {"span", "i"}
    assert len(page.scripts) == 2
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]


def test_several_targets_are_laid_over_others_by_their_prompt():
    page = Page(explain_several().to_html(others=[explain()]))
    assert page.text == CONTRACT
    values = [e.attributes["value"] for e in page.elements if e.tag == "option"]
    assert values == ["0", "-1", "1", "2", "-2", "3", "4", "-3", "5", "0", "1", "2"]
    assert "3 targets" in [e.text for e in page.elements if e.attributes.get("class") == "answer"]
    assert Page(to_html([explain_several(), explain_several()])).text == CONTRACT


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_chooses_among_targets(tmp_path):
    explanation = with_effects(explain_several(), {"Overtime"})
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        const shown = () => texts(".branch:not([hidden])");
        const sets = () => all("[data-of]:not([hidden])").map((e) => e.dataset.of);
        result.first = [painted(), rows(), shown(), sets()];
        key("End"); result.end = document.querySelector(".cur").textContent;
        pick("branch", -2); result.second = [painted(), rows(), shown(), sets()];
        key("End"); result.last = document.querySelector(".cur").textContent;
        key("Escape"); key("ArrowDown"); result.best = byId("detail").innerText;
        key("ArrowDown"); result.detail = byId("detail").innerText;
        pick("target1", 4); result.token = byId("detail").innerText;
        result.sel = document.querySelector(".sel").textContent;
        pick("branch", -3); result.third = [rows(), shown(), sets()];
        pick("branch", 0); result.again = [painted(), rows(), shown(), sets()];
        result.dashed = texts("#text .d");
        """,
    )
    assert "error" not in result
    assert result["first"] == result["again"]
    painted, rows, shown, sets = result["first"]
    assert painted == ["pay p0.667", "34 p1.000", "hour. p0.167", "Overtime p0.667", "51 p1.000"]
    assert rows[:3] == ["34 +0.500", "51 +0.500", "pay +0.333"]
    assert (shown, sets, result["end"]) == ([], [], "A:")
    painted, rows, shown, sets = result["second"]
    assert painted == ["34 n0.333", "Overtime p0.667", "51 p1.000", "51 p1.000"]
    assert rows == ["51 +1.50", "51 +1.50", "Overtime direct +1.00"]
    assert (shown, sets, result["last"]) == ([" 51 dollars"], ["1"], "dollars")
    lines = [line for line in result["detail"].split("\n") if line]
    assert lines[0] == "…is 51 dollars. Q: Which pay? A: 51 dollars"
    assert lines[1:5] == ["relevance", "+1.50 nats", "rank", "2 of 17"]
    assert lines[5:] == ["effect", "total"]  # for its own token it was not measured
    assert "answer’s probability\n47.2% → 2.4%" in result["best"]
    assert "score for “dollars”" in result["token"]
    assert result["sel"] == "dollars"
    assert result["third"] == [["hour. +0.250"], [" no"], []]
    assert result["dashed"] == ["Overtime"]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_filters_and_orders_targets(tmp_path):
    explanation = explain_several(40)
    explanation.base_logprobs[23] = -0.125
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        const shown = () => texts(".chips label:not([hidden]) bdi");
        const send = (id, value, name) => {
          byId(id).value = value; byId(id).dispatchEvent(new Event(name));
        };
        result.tools = byId("tools").hidden;
        send("filter", "3", "input"); result.found = [shown(), byId("found").textContent];
        send("order", "likely", "change"); result.likely = shown();
        send("filter", "", "input"); send("order", "given", "change"); result.all = shown();
        """,
    )
    assert "error" not in result
    assert result["tools"] is False
    assert result["found"] == [
        ["all (mean)", "3", "13", "23", *map(str, range(30, 40))],
        "13 found",
    ]
    assert result["likely"] == ["all (mean)", "23", "3", "13", *map(str, range(30, 40))]
    assert result["all"] == ["all (mean)", *map(str, range(40))]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_goes_from_size_to_size(tmp_path):
    result = drive(
        tmp_path,
        hierarchical().to_html(),
        """
        const turn = (level) => pick("level", level);
        const current = () => texts(".cur").join("");
        const words = () => painted().map((line) => line.replace(/ [pn][\\d.]+$/, "")).join("");
        key("Home"); key("ArrowRight"); result.fine = [current(), byId("detail").innerText];
        turn(1); result.cleared = current();
        result.sentences = [rows(), words()];
        key("Home"); result.first = current(); key("ArrowRight"); result.second = current();
        key("ArrowLeft"); result.back = current();
        result.detail = byId("detail").innerText;
        pick("target", 2); result.token = rows();
        turn(2); result.paragraphs = rows(); turn(0); result.again = rows();
        """,
    )
    assert "error" not in result
    assert result["fine"][0] == "pay"
    assert "level\nword" in result["fine"][1]
    assert result["cleared"] == ""
    assert result["sentences"][0] == ["The pay is 34 dollars an hour. +3.25"]
    assert result["sentences"][1].startswith("The pay is 34 dollars an hour.")
    assert result["first"] == result["back"] == "The pay is 34 dollars an hour."
    assert result["second"] == "Overtime is 51 dollars.\n"
    assert "level\nsentence" in result["detail"]
    assert result["token"][0] == "The pay is 34 dollars an hour. +3.25"
    assert result["paragraphs"][0].endswith("51 dollars.↵ +2.75")
    assert result["again"][0] == "34 +2.00"
