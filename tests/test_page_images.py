"""The HTML page of pictures, sounds and classes."""

import base64
import dataclasses
import io
import re

import pytest
from pictures import CHROMIUM, Page, drive
from PIL import Image
from toy_pictures import classified, corner, explained, grid, heard, patch, seen

from atman_triton.explanation import load
from atman_triton.pieces import Neighbour

browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
change = dataclasses.replace


def classes(element):
    return element.attributes.get("class", "").split()


def boxes(page):
    return [e for e in page.elements if "box" in classes(e)]


def places(page):
    """Left, top, width and height of every region, in per cent."""
    names = ("left", "top", "width", "height")
    return [
        tuple(float(re.search(rf"{n}:([\d.]+)%", e.attributes["style"])[1]) for n in names)
        for e in boxes(page)
    ]


def colours(page):
    """What every region contributes, by its class and its strength."""
    found = []
    for box in boxes(page):
        strength = re.search(r"--v:([\d.]+)", box.attributes["style"])
        sign = 1 if "p" in classes(box) else -1
        found.append(sign * float(strength[1]) if strength else 0.0)
    return found


def subtitle(page):
    return next(e.text for e in page.elements if classes(e) == ["sub"])


def test_the_picture_is_in_the_page_and_nothing_else_is_loaded():
    e = corner()
    page = Page(e.to_html())
    (image,) = [element for element in page.elements if element.tag == "img"]
    start, data = image.attributes["src"].split(",")
    assert start == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 20)
    assert image.attributes["alt"] == "image, 40×20 pixels"
    policy = next(e for e in page.elements if "http-equiv" in e.attributes).attributes["content"]
    assert "default-src 'none'; img-src data:;" in policy
    assert not re.search(r"https?:|url\(", page.html)


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_every_unit_has_a_region_where_it_stands(size):
    page = Page(corner(size).to_html())
    expected = [(25.0 * x, 50.0 * y, 25.0, 50.0) for y in (0, 1) for x in range(4)]
    assert places(page) == expected
    assert colours(page) == [1.0, *[0.0] * 6, -0.5]
    frame = next(e for e in page.elements if "picture" in classes(e))
    assert f"aspect-ratio:{size[0]}/{size[1]}" in frame.attributes["style"]
    side = int(re.match(r"width:(\d+)px", frame.attributes["style"])[1])
    assert side == (420 if size == (40, 20) else 210)
    assert [e.attributes["data-p"] for e in boxes(page)] == [str(k) for k in range(8)]
    assert page.data["pieces"][:8] == [[[k]] for k in range(8)]


def test_regions_have_names_for_those_who_hear_the_page():
    page = Page(corner().to_html())
    first = boxes(page)[0].attributes
    assert (first["role"], first["aria-label"]) == ("img", "patch at 0,0")
    assert page.data["explanations"][0]["drawn"]["7"] == "patch at 30,10"
    units = [patch(0, (0, 0, 20, 20)), patch(1, (0, 10, 10, 20))]
    page = Page(explained(units, [[1.0, 0.5]], sizes=((40, 20), (10, 30))).to_html())
    names = [box.attributes["aria-label"] for box in boxes(page)]
    assert names == ["image 1: patch at 0,0", "image 2: patch at 0,10"]
    assert [e.attributes["alt"] for e in page.elements if e.tag == "img"] == [
        "image 1, 40×20 pixels",
        "image 2, 10×30 pixels",
    ]


def test_pictures_stand_where_they_stand_in_the_text():
    e = seen(answers=(" cat",))
    e.pictures[0] = change(e.pictures[0], start=9)
    html = e.to_html()
    assert html.index(">picture<") < html.index("data:image/png") < html.index(">of<")
    page = Page(html)
    assert page.text == e.text
    assert html.count("<span") == html.count("</span>")
    e.pictures[0] = change(e.pictures[0], start=0)
    assert e.to_html().index("data:image/png") < e.to_html().index(">picture<")
    alone = corner(answers=("",))
    assert len(boxes(Page(alone.to_html()))) == 8


def test_text_and_pictures_are_coloured_on_one_scale():
    page = Page(seen(answers=(" cat",)).to_html())
    assert colours(page)[:4] == [1.0, 0.5, 0.0, -0.25]
    styles = {span.text: span.attributes.get("style") for span in page.spans}
    assert styles["picture"] == "--v:0.250"
    assert "Not in the text" not in page.text


def test_units_of_every_size_lie_over_the_picture():
    fine = corner()
    tiles = [change(unit, level="tile") for unit in grid((40, 20), 1, 1)]
    coarse = explained(tiles, [[3.0]])
    whole = change(fine, method="hierarchical", coarse=change(coarse, method="hierarchical"))
    page = Page(whole.to_html())
    assert len(boxes(page)) == 9
    assert ["hidden" in e.attributes for e in boxes(page)] == [False] * 8 + [True]
    assert page.data["pieces"][8] == [[], [0]]


def test_units_of_one_place_share_a_region():
    again = [*grid((40, 20), 2, 1), patch(0, (20, 0, 20, 20), "tile")]
    page = Page(explained(again, [[1.0, 0.5, -2.0]]).to_html())
    assert page.data["pieces"][:2] == [[[0]], [[1, 2]]]
    assert colours(page) == [0.5, -1.0]


def test_explanations_of_one_picture_are_laid_over_each_other():
    first, second = seen().branch(0), seen().branch(1)
    page = Page(first.to_html(others=[second]))
    assert len(boxes(page)) == 8
    styles = [box.attributes["style"] for box in boxes(page)]
    assert "rgb(var(--overlay0) / 1.000) 0% 100%" in styles[0]
    assert "rgb(var(--overlay1) / 1.000) 0% 100%" in styles[3]
    assert styles[1].count("overlay") == 1
    alone = [corner(answers=(name,)) for name in (" cat", " dog")]
    assert len(boxes(Page(alone[0].to_html(others=alone[1:])))) == 8
    other = corner((20, 40), answers=(" dog",))
    with pytest.raises(ValueError, match=r"^others must explain the same pictures and the same"):
        alone[0].to_html(others=[other])


def test_patches_suppressed_along_are_named_by_their_place():
    e = corner()
    units = [change(unit, tokens=(index,)) for index, unit in enumerate(e.units)]
    units[0] = change(units[0], neighbours=(Neighbour(7, 0.5, 0.9), Neighbour(99, 0.5, 0.8)))
    page = Page(change(e, units=units).to_html())
    shown = page.data["explanations"][0]["neighbours"][0]["shown"]
    assert [each[:2] for each in shown] == [[0, "patch at 30,10"], [-1, "token 99"]]
    assert page.data["near"] == [[7]]  # the region that is outlined


def test_a_sound_is_a_waveform_with_regions_over_time():
    page = Page(heard().to_html())
    assert places(page) == [(25.0 * k, 0.0, 25.0, 100.0) for k in range(4)]
    assert colours(page) == [-0.5, 0.0, 1.0, 0.0]
    svg = next(e for e in page.elements if e.tag == "svg")
    assert svg.attributes["aria-label"] == "sound, 2 seconds"
    assert svg.attributes["viewbox"] == "0 0 4 100"
    path = next(e for e in page.elements if e.tag == "path").attributes["d"]
    assert path == "M0 50V49h1V2h1V26h1V49h1V51h-1V74h-1V98h-1V51h-1Z"
    marks = [
        (e.attributes["data-at"], e.attributes["style"])
        for e in page.elements
        if "mark" in classes(e)
    ]
    assert marks[:3] == [("0 s", "left:0%"), ("0.5 s", "left:25%"), ("1 s", "left:50%")]
    assert page.text == " cat"


def test_saved_explanations_make_the_same_page(tmp_path):
    for e in (seen(), heard(), classified()):
        e.save(tmp_path / "e.json")
        assert load(tmp_path / "e.json").to_html() == e.to_html()


def test_names_of_pictures_are_only_text():
    unit = patch(0, (0, 0, 4, 4), "image", '"><script>alert(1)</script>')
    page = Page(explained([unit], [[1.0]]).to_html())
    assert len(page.scripts) == 2
    assert boxes(page)[0].attributes["aria-label"] == '"><script>alert(1)</script>'


def test_classes_and_outputs_have_words_of_their_own():
    page = Page(classified().to_html())
    assert "the loss of the chosen class, or of all classes on average" in subtitle(page)
    legends = [e.text for e in page.elements if e.tag == "legend"]
    assert legends == ["Which of 2 classes to explain"]
    assert [e.text for e in page.elements if e.tag == "small"] == ["60.7%", "36.8%"]
    labels = [e for e in page.spans if "label" in classes(e)]
    assert [e.text for e in labels] == ["POSITIVE", "NEGATIVE"]
    page = Page(classified("logit", ("POSITIVE",)).to_html())
    assert subtitle(page).startswith(
        "Logit -0.5. The colour of a piece shows how much the logit of this class falls (orange) "
        "or rises (blue) when"
    )
    page = Page(classified("output", ("stars",)).to_html())
    assert subtitle(page).startswith(
        "Output -0.5. The colour of a piece shows how much the output "
    )
    ends = [e.text for e in page.elements if e.tag == "span"]
    assert {"lowers", "raises"} <= set(ends)
    data = page.data["explanations"][0]
    assert data["scale"]["titles"]["most"] == "Raises the output most"
    assert data["scale"]["suffix"] == ""
    for quantity in ("logit", "output"):
        html = classified(quantity).to_html().split("<script>")[0]
        assert not re.search(r"robabilit|nats|\d%<", html)


@browser
def test_the_script_colours_pictures_by_what_is_chosen(tmp_path):
    result = drive(
        tmp_path,
        seen().to_html(),
        """
        const shown = () => all(".box").map((e) => sign(e) + e.style.getPropertyValue("--v"));
        const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
        result.first = shown(); result.rows = rows();
        pick("branch", -1); result.cat = shown();
        pick("branch", -2); result.dog = shown();
        key("Home"); key("ArrowRight"); result.second = document.querySelector(".cur").ariaLabel;
        over(all(".box")[3]); result.hover = byId("detail").innerText;
        key("Escape"); key("ArrowDown"); result.best = document.querySelector(".cur").ariaLabel;
        document.querySelector(".row").click();
        result.pinned = document.querySelector(".cur").ariaLabel;
        const rect = (node) => {
          const { left, top, width, height } = node.getBoundingClientRect();
          return [left, top, width, height];
        };
        result.frame = rect(document.querySelector(".picture")); result.last = rect(all(".box")[7]);
        result.see = byId("see").hidden; byId("plain").click();
        result.plain = getComputedStyle(document.querySelector(".picture img")).filter;
        result.bare = getComputedStyle(all(".box")[0]).backgroundColor;
        byId("plain").click(); byId("smooth").click();
        const filters = () => all(".box").map((e) => getComputedStyle(e).filter);
        result.soft = [...new Set(filters())]; over(all(".box")[3]); result.sharp = filters()[3];
        byId("smooth").click(); result.again = [...new Set(filters())];
        """,
    )
    assert "error" not in result
    assert result["cat"] == ["p1.000", "p0.500", "", "n0.250"] * 2
    assert result["dog"] == ["n0.250", "", "p0.500", "p1.000"] * 2
    assert result["rows"][0] == "patch at 0,0 +0.438"
    assert result["second"] == "patch at 10,0"
    lines = [line for line in result["hover"].split("\n") if line]
    assert lines[:5] == ["patch at 30,0", "relevance", "+0.500 nats", "rank", "1 of 12"]
    assert lines[5:] == ["answer’s probability", "36.8% → 22.3%", "level", "patch"]
    assert result["best"] == result["pinned"] == "patch at 30,0"
    left, top, width, height = result["frame"]
    assert width / height == pytest.approx(2, rel=0.01)
    expected = [left + 0.75 * width, top + 0.5 * height, 0.25 * width, 0.5 * height]
    assert result["last"] == pytest.approx(expected, abs=0.5)
    assert (result["see"], result["plain"]) == (False, "none")
    assert result["bare"] == "rgba(0, 0, 0, 0)"
    # by the width of a patch, of which four make the picture; what is pointed at keeps its edges
    blurs = [float(each[len("blur(") : -len("px)")]) for each in result["soft"] if each != "none"]
    assert blurs == [pytest.approx(width / 16, rel=0.01)]
    assert (result["sharp"], result["again"]) == ("none", ["none"])


@browser
def test_the_script_turns_to_larger_pieces_of_a_picture(tmp_path):
    fine = corner()
    coarse = explained([change(grid((40, 20), 1, 1)[0], level="tile")], [[3.0]])
    whole = change(fine, method="hierarchical", coarse=change(coarse, method="hierarchical"))
    result = drive(
        tmp_path,
        whole.to_html(),
        """
        const shown = () => all(".box:not([hidden])").map((e) => e.ariaLabel);
        result.fine = shown(); pick("level", 1); result.coarse = shown(); result.rows = rows();
        pick("level", 0); result.again = shown();
        """,
    )
    assert "error" not in result
    assert result["fine"] == result["again"]
    assert len(result["fine"]) == 8
    assert result["coarse"] == ["tile at 0,0"]
    assert result["rows"] == ["tile at 0,0 +3.00"]


@browser
def test_the_panel_of_an_output_has_its_own_numbers(tmp_path):
    steps = (
        'key("ArrowDown"); result.panel = byId("detail").innerText; result.titles = texts("h2");'
    )
    result = drive(tmp_path, classified("output", ("stars",)).to_html(), steps)
    assert "error" not in result
    lines = [line for line in result["panel"].split("\n") if line]
    assert lines[1:] == ["relevance", "+1.50", "rank", "1 of 4", "output", "−0.5 → −2"]
    assert result["titles"] == ["Raises the output most", "Lowers it"]
    logit = drive(tmp_path, classified("logit", ("A",)).to_html(), steps)["panel"]
    assert "class’s logit\n−0.5 → −2" in logit.replace("\n\n", "\n")


@browser
def test_the_script_outlines_patches_that_were_suppressed_along(tmp_path):
    e = corner()
    units = [change(unit, tokens=(index,)) for index, unit in enumerate(e.units)]
    units[0] = change(units[0], neighbours=(Neighbour(7, 0.5, 0.9),))
    steps = 'key("Home"); result.near = all("#text .near").map((e) => e.ariaLabel + e.title);'
    result = drive(tmp_path, change(e, units=units).to_html(), steps)
    assert result == {"near": ["patch at 30,10suppressed along: ×0.5, similarity 0.9"]}
