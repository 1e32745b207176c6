"""The HTML page of an explanation: what is on it, and what its script does in a browser."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest
import torch
from pictures import CHROMIUM, Page, drive
from toy_explanations import (
    HOSTILE,
    explain,
)

from atman_triton.explanation import LeftOut, Unit
from atman_triton.render import layout
from atman_triton.render.html import shared, to_html

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def hostile():
    prompt, scores = HOSTILE + "\n<b>first</b>", {"&": 1.0}
    explanation = explain(prompt, HOSTILE, scores, model=HOSTILE, note=[HOSTILE])
    explanation.left_out.append(LeftOut(HOSTILE, (0,), HOSTILE))
    other = explain(HOSTILE + "\n<b>second</b>", " other", model=HOSTILE)
    return explanation, Page(explanation.to_html()), Page(explanation.to_html(others=[other]))


@pytest.mark.parametrize("which", [1, 2], ids=["one", "overlay"])
def test_hostile_text_is_only_text_on_the_page(hostile, which):
    explanation, page = hostile[0], hostile[which]
    whole = layout.printable(explanation.text)
    assert page.text == (whole if which == 1 else layout.printable(HOSTILE) + "\n")
    assert {e.tag for e in page.elements if e.inside} <= {"span", "i"}
    assert {e.tag for e in page.elements} <= set(
        "html head meta title style body header div p h1 button main article span i bdi aside "
        "section noscript fieldset legend label input small ul li select option "
        "footer details summary table tr th td script".split()
    )
    assert len(page.scripts) == 2
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
    assert page.data["explanations"][0]["text"] == whole
    assert "alert" not in page.scripts[1]


def test_the_page_needs_no_network(hostile):
    page = hostile[1]
    attributes = {name for element in page.elements for name in element.attributes}
    assert not attributes & {"src", "href", "action", "srcset", "poster", "background"}
    template = to_html([explain()])
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|import\(", template)
    policy = next(e for e in page.elements if "http-equiv" in e.attributes).attributes["content"]
    digest = b64encode(sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_text_is_coloured_by_relevance():
    explanation = explain(scores={"34": 2.0, "pay": 1.0, "51": -0.5})
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    strength = layout.strengths(explanation.relevance.tolist())
    assert len(page.spans) == len(explanation.units) + 1  # and the last target token
    for span, (units,) in zip(page.spans, page.data["pieces"], strict=True):
        if not units:
            assert span.attributes["class"].split() == ["t", "answer"]
            continue
        value = strength[units[0]]
        assert span.text == explanation.units[units[0]].text.strip(" ")
        assert ("p" in span.attributes["class"].split()) == (value > 0)
        assert ("n" in span.attributes["class"].split()) == (value < 0)
        assert span.attributes.get("style") == (f"--v:{abs(value):.3f}" if value else None)


def test_the_page_holds_all_numbers():
    explanation = explain()
    data = Page(explanation.to_html()).data["explanations"][0]
    rows = torch.tensor([[NAN if v is None else v for v in row] for row in data["rows"]])
    expected = torch.cat([explanation.relevance[None], explanation.scores])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=0, equal_nan=True)
    assert data["base"] == [-0.25, -0.5]
    assert data["targets"] == ["34", "dollars"]
    assert data["units"] == [[unit.start, unit.stop] for unit in explanation.units]


def test_text_between_units_is_only_text():
    explanation = explain("x <b>&amp;</b> y")
    del explanation.units[1]
    explanation.suppressed_logprobs = explanation.suppressed_logprobs[:, 1:]
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    assert "b" not in {element.tag for element in page.elements}


def test_infinite_scores_stay_numbers_on_the_page():
    explanation = explain()
    explanation.suppressed_logprobs[:, 0] = -INF
    page = Page(explanation.to_html())
    assert page.data["explanations"][0]["rows"][0][0] == page.data["infinity"]


def test_target_tokens_can_be_chosen():
    page = Page(explain().to_html())
    radios = [e for e in page.elements if e.attributes.get("type") == "radio"]
    assert [e.attributes["value"] for e in radios] == ["0", "1", "2"]
    assert ["checked" in e.attributes for e in radios] == [True, False, False]
    assert [s.attributes["data-t"] for s in page.spans if "data-t" in s.attributes] == ["0", "1"]
    single = Page(explain(answer=" 34").to_html())
    assert not [e for e in single.elements if e.attributes.get("type") == "radio"]


def test_tokens_that_share_characters_share_a_piece():
    explanation = explain("x 🙂 y")
    halves = [Unit("\ufffd", (index,), 2, 3, "prompt") for index in (1, 2)]
    explanation.units[1:3] = halves
    page = Page(explanation.to_html())
    assert [1, 2] in [units for (units,) in page.data["pieces"]]
    assert page.text == explanation.text


def overlaid():
    prompts = [f"The pay is 34. The leave is 26.\nQ: What is the {w}? A:" for w in ("pay", "leave")]
    return [
        explain(prompts[0], " 34", scores={"34.": 1.0, "pay?": 4.0}),
        explain(prompts[1], " 26", scores={"26.": 0.5, "34.": 0.25, "pay": -0.5}),
    ]


def test_explanations_of_one_text_are_laid_over_each_other():
    first, second = overlaid()
    page = Page(first.to_html(others=[second]))
    assert page.text == "The pay is 34. The leave is 26.\n"
    styles = {e.text: e.attributes.get("style", "") for e in page.spans}
    # Scaled within the shared text: the question's own words take no part.
    assert styles["26."] == (
        "background-image:linear-gradient(rgb(var(--overlay1) / 1.000) 0% 100%)"
    )
    assert styles["34."] == (
        "background-image:linear-gradient(rgb(var(--overlay0) / 1.000) 0% 50%, "
        "rgb(var(--overlay1) / 0.500) 50% 100%)"
    )
    assert styles["pay"] == ""
    words = [e.text for e in page.elements if e.attributes.get("class") in ("question", "letter")]
    assert words == ["A", "Q: What is the pay? A:", "B", "Q: What is the leave? A:"]
    assert len([e for e in page.elements if e.attributes.get("type") == "checkbox"]) == 2


@pytest.mark.parametrize(
    ("texts", "stops", "common"),
    [
        (["A doc. Q: a?", "A doc. Q: b?"], [12, 12], "A doc."),
        (["doc Q: a? x", "doc Q: b? y"], [9, 9], "doc Q: "),
        (["a? doc. yes", "bb? doc. no"], [7, 8], "? doc."),
        (["doc. yes", "doc. no"], [4, 4], "doc."),
        (["doc. yes", "doc. yes"], [4, 4], "doc. yes"),
    ],
)
def test_the_shared_text_is_found(texts, stops, common):
    starts, length = shared(texts, stops)
    assert [text[start : start + length] for text, start in zip(texts, starts, strict=True)] == [
        common
    ] * len(texts)


def test_explanations_of_different_texts_are_refused():
    with pytest.raises(ValueError, match=r"^others must explain the same text: "):
        explain("one thing").to_html(others=[explain("another story")])


@pytest.mark.parametrize(
    ("prompts", "shares"),
    [
        (("doc. Q: a?", "doc. Q: b?"), 4),
        (("The pay is 34 an hour. Q: x? A:", "Night work is at 10 pm. Q: x? A:"), 10),
        (("doc. Q: a?", "doc. Q: b?" + " longer" * 9), 4),
        (("aaaa b", "aaaa " + "b" * 10), 6),
        (("", "a"), 0),
    ],
)
def test_prompts_that_share_less_than_half_are_refused(prompts, shares):
    with pytest.raises(ValueError, match=rf"^others must .* share {shares} characters .*\.$"):
        shared(prompts, [len(prompt) for prompt in prompts])


def test_an_overlay_says_what_it_does_not_show():
    def subtitle(*explanations):
        page = Page(to_html(explanations))
        return next(e.text for e in page.elements if e.attributes.get("class") == "sub")

    assert "where they differ (the questions)" in subtitle(*overlaid())
    assert "differ" not in subtitle(explain(), explain(answer=" 51"))
    assert "differ" not in subtitle(explain(), explain())
    assert "differ" not in subtitle(explain())


def test_ten_thousand_units_make_one_page(tmp_path):
    prompt = " ".join(f"word{index}" for index in range(10_000))
    explanation = explain(prompt, " a b c", scores={"word77": 1.0})
    path = tmp_path / "long.html"
    html = explanation.to_html(path)
    assert path.read_text(encoding="utf-8") == html
    assert html.count("data-p=") == len(explanation.units) + 1
    assert len(html) < 4_000_000


# The page's script, in a browser where there is one.


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_shows_numbers_and_targets(tmp_path):
    explanation = explain("é🙂 pay is 34 not 51. A:", scores={"34": 2.0, "pay": 1.0, "51.": -1.5})
    explanation.suppressed_logprobs[1, 1] -= 4.0  # "pay" matters most to the second target
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        result.before = rows(); result.painted = painted();
        key("ArrowDown"); result.detail = byId("detail").innerText;
        key("ArrowRight"); result.next = document.querySelector(".cur").textContent;
        key("ArrowDown"); key("End"); key("Enter");
        result.chosen = document.querySelector("input:checked").value;
        result.after = rows(); result.selected = document.querySelector(".sel").textContent;
        key("Home"); key("ArrowDown"); result.second = byId("detail").innerText;
        document.querySelectorAll("input")[0].click(); result.again = painted();
        byId("theme").click(); byId("theme").click();
        result.theme = document.documentElement.dataset.theme;
        result.dark = getComputedStyle(document.body).backgroundColor;
        """,
    )
    assert "error" not in result
    assert result["before"] == ["pay +3.00", "34 +2.00", "34 +2.00", "51. −1.50"]
    assert result["painted"] == ["pay p1.000", "34 p0.667", "51. n0.500", "34 p0.667"]
    assert result["again"] == result["painted"]
    assert [line for line in result["detail"].split("\n") if line] == [
        *("é🙂 pay is 34 not 51. A: 34 dollars", "relevance", "+3.00 nats", "rank", "1 of 8"),
        *("answer’s probability", "47.2% → 0.12%"),
    ]
    assert result["next"] == "is"
    assert (result["chosen"], result["selected"]) == ("2", "dollars")
    assert result["after"] == ["pay +5.00", "34 +2.00", "34 +2.00"]
    assert "score for “dollars”" in result["second"]
    assert (result["theme"], result["dark"]) == ("dark", "rgb(22, 23, 26)")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_script_turns_layers_on_and_off(tmp_path):
    first, second = overlaid()
    result = drive(
        tmp_path,
        first.to_html(others=[second]),
        """
        const style = (word) => [...document.querySelectorAll("#text span")]
          .find((s) => s.textContent === word).style.backgroundImage.replaceAll("0.0%", "0%");
        const boxes = document.querySelectorAll("input");
        result.both = style("34."); result.rows = rows();
        boxes[0].click(); result.one = style("34."); result.left = rows();
        """,
    )
    assert "error" not in result
    assert result["both"].count("overlay") == 2
    assert result["rows"] == ["34. +1.00", "26. +0.500", "34. +0.250"]
    assert "overlay1" in result["one"]
    assert "overlay0" not in result["one"]
    assert result["left"] == ["26. +0.500", "34. +0.250"]
