"""What an explanation looks like: cutting and breaking text, terminal, HTML page, figure."""

import io
import itertools
import json
import math
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html import unescape as html_unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from rich.cells import cell_len
from rich.console import Console
from toy_explanations import CONTRACT, HOSTILE, explain

from atman_triton.explanation import Explanation, LeftOut, Target, Unit
from atman_triton.render import layout, palette
from atman_triton.render.html import shared, to_html
from atman_triton.render.terminal import show

NAN, INF = float("nan"), float("inf")


# Cutting and breaking text.


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 12),
    st.lists(st.lists(st.none() | st.tuples(st.integers(-1, 13), st.integers(-1, 13)), max_size=4)),
)
def test_pieces_cover_the_text_once_and_know_their_spans(length, span_lists):
    pieces = layout.cut(length, *span_lists)
    assert "".join("x" * (piece.stop - piece.start) for piece in pieces) == "x" * length
    for before, after in itertools.pairwise(pieces):
        assert before.stop == after.start
    for piece in pieces:
        for cover, spans in zip(piece.covers, span_lists, strict=True):
            for character in range(piece.start, piece.stop):
                inside = [i for i, s in enumerate(spans) if s and s[0] <= character < s[1]]
                assert list(cover) == inside


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab \n漢🙂\u0301", max_size=60), st.integers(3, 12))
def test_lines_hold_the_whole_text_and_fit(text, width):
    spans = layout.lines(text, width)
    assert "".join(text[start:stop] for start, stop in spans) == text
    for start, stop in spans:
        assert "\n" not in text[start : stop - 1]
        row = text[start:stop].rstrip(" \n")
        assert sum(map(layout.get_character_cell_size, row)) <= width


def test_lines_break_after_spaces():
    text = "aaa bb cccccccc d"
    assert [text[a:b] for a, b in layout.lines(text, 7)] == ["aaa bb ", "ccccccc", "c d"]


def test_control_characters_are_made_visible():
    text = "a\x00\x1b[1m\tb\n\r\x7f\x85\u202e\ud800"
    assert layout.printable(text) == "a␀␛[1m⇥b\n␍␡\ufffd\ufffd\ufffd"
    assert len(layout.printable(HOSTILE)) == len(HOSTILE)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" word", "word"), ("  word", "␣␣word"), ("a ", "a␣"), ("\n", "↵"), ("  ", "␣␣"), ("", "∅")],
)
def test_a_unit_is_shown_on_one_line(text, shown):
    assert layout.visible(text) == shown


def test_strengths_are_scaled_by_the_largest_magnitude():
    assert layout.strengths([1.0, -4.0, 0.0, INF, -INF]) == [0.25, -1.0, 0.0, 1.0, -1.0]
    assert layout.strengths([0.0, 0.0]) == [0.0, 0.0]
    assert math.isnan(layout.strengths([NAN, 1.0])[0])
    assert layout.strongest([0.2, -0.5, NAN], (0, 1, 2)) == -0.5
    assert layout.strongest([NAN], (0,)) == 0.0


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([12.3456, -0.001, NAN], ["+12.3", "0.0", "–"]),
        ([0.01234, -0.00567, INF], ["+0.0123", "−0.0057", "+∞"]),
        ([0.0, -INF], ["0.00", "−∞"]),
    ],
)
def test_numbers_have_the_digits_of_the_largest(values, shown):
    digits = layout.decimals(values)
    assert [layout.signed(value, digits) for value in values] == shown


def test_context_is_cut_at_words():
    explanation = explain()
    unit = [u.text for u in explanation.units].index(" Overtime")
    assert layout.context(explanation, unit, 12) == ("…an hour. ", "Overtime", " is 51…")
    assert layout.context(explanation, 0, 9) == ("", "The", " pay is…")


def test_a_part_of_a_word_is_shown_in_it():
    explanation = explain("the normal pay")
    parts = [("n", 4, 5), ("orm", 5, 8), ("al", 8, 10), (" pay", 10, 14)]
    explanation.units[1:3] = [Unit(text, (1,), a, b, "prompt") for text, a, b in parts]
    shown = [layout.in_word(explanation, unit) for unit in range(5)]
    assert shown == ["the", "[n]ormal", "n[orm]al", "norm[al]", "pay"]


def test_long_texts_are_elided_around_marks():
    marked = [index == 20 for index in range(40)]
    assert layout.elide(marked, 40) == list(range(40))
    assert layout.elide(marked, 39) == [0, 1, None, 19, 20, 21, None, 36, 37, 38, 39]


def test_units_without_a_place_stand_behind_the_text():
    explanation = Explanation(
        text="ab",
        prompt_stop=2,
        units=[
            Unit("a", (0,), 0, 1, "prompt"),
            Unit("\ufffd", (1,), None, None, "prompt"),
            Unit("", (2,), 1, 1, "prompt"),
        ],
        targets=[Target("x", 3, 1, None, None)],
        base_logprobs=torch.zeros(1),
        suppressed_logprobs=-torch.ones(1, 3),
    )
    placed = layout.place(explanation)
    assert placed.text == "ab\nNot in the text: \ufffd ∅"
    assert [placed.text[start:stop] for start, stop in placed.units] == ["a", "\ufffd", "∅"]
    rows = layout.heat_lines(explanation, [1.0, -1.0, 0.5], 80)
    assert [(run.text, run.strength) for run in rows[1] if run.strength] == [
        ("\ufffd", -1.0),
        ("∅", 0.5),
    ]
    page = Page(explanation.to_html())
    assert page.text == placed.text
    assert explanation.answer in printed(explanation)


def test_settings_name_the_folder_and_not_the_path():
    assert layout.settings(explain(model="/home/me/models/reader", layers=[0, 2])) == (
        "models/reader · preset default · mode min_shift · factor 0.1 · layers 0,2 · "
        "17 units · 2 target tokens (mean) · 18 runs · 0.5 s"
    )
    assert layout.settings(explain(model="org/name")).startswith("org/name · ")


# Colours.


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour(theme):
    for colour in (theme.support, theme.oppose, *theme.overlays):
        for opacity in range(21):
            back = palette.mix(theme.paper, colour, opacity / 20)
            assert palette.contrast(theme.ink, back) >= 4.5
    for back in (theme.paper, theme.panel):
        assert palette.contrast(theme.ink, back) >= 7
        assert palette.contrast(theme.faint, back) >= 4.5
        assert palette.contrast(theme.accent, back) >= 4.5


def test_contrast_is_that_of_wcag():
    assert palette.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert palette.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)


# The terminal.


def printed(explanation, width=80, colour=None, **options):
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        color_system=colour,
        force_terminal=colour is not None,
        markup=False,
        emoji=False,
        _environ={},
    )
    show(explanation, width=width, console=console, **options)
    return file.getvalue()


def test_without_colour_strong_units_stand_in_brackets():
    text = printed(explain(CONTRACT, scores={"34": 2.0, "pay": 1.0, "51": -1.0}))
    assert "The ⟦pay⟧ is ⟦34⟧ dollars an hour. Overtime is ⟪51⟫ dollars." in text
    assert "\x1b" not in text
    assert "Answer: 34 dollars   p = 0.472" in text
    assert re.search(r"\n +1  █{14} +\+2\.00  The pay is 34 dollars an…", text)
    assert re.search(r"\n +17  █{7} +−1\.00 .* 51 dollars", text)
    assert "Left out: <s> (special token)" in text
    assert "were not measured" not in text
    assert text.rstrip().endswith("(mean) · 18 runs · 0.5 s")


def test_with_colour_the_strongest_unit_is_coloured():
    text = printed(explain(scores={"34": 2.0, "51": -2.0, "pay": 0.3}), colour="truecolor")
    assert "\x1b[38;2;0;0;0;48;2;255;142;20m34\x1b[0m" in text
    assert "\x1b[38;2;0;0;0;48;2;92;164;255m51\x1b[0m" in text
    assert re.search(r"\x1b\[4;38;2;184;98;0mpay\x1b\[0m", text)
    assert "⟦" not in text


def test_colours_of_the_terminal_are_readable():
    from atman_triton.render import terminal

    for colour in (terminal.SUPPORT, terminal.OPPOSE):
        for opacity in range(21):
            back = palette.mix(terminal.GREY, colour, opacity / 20)
            assert palette.contrast((0, 0, 0), back) >= 4.5
    for ink in (terminal.SUPPORT_INK, terminal.OPPOSE_INK):
        for back in ((0, 0, 0), (255, 255, 255)):
            assert palette.contrast(ink, back) >= 4


@pytest.mark.parametrize("colour", [None, "truecolor"])
def test_hostile_text_is_only_text_in_the_terminal(colour):
    text = printed(explain(HOSTILE, HOSTILE), colour=colour, width=1000)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "[bold]markup[/bold] :smile:" in plain
    assert "␛[31mred \ufffd␀⇥" in plain


@pytest.mark.parametrize("width", [20, 33, 80])
def test_lines_stay_within_the_width(width):
    prompt = "漢字かな交じり文を 折り返す words 🙂 " * 6
    text = printed(explain(prompt, scores={"words": 1.0}), width=width)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width


def test_the_list_follows_target_and_top_k():
    explanation = explain()
    text = printed(explanation, target=1, top_k=2)
    assert "Target token 1: dollars   p = 0.607" in text
    assert len(re.findall(r"^ +\d+  █", text, re.MULTILINE)) == 2
    assert "score, nats" in text


def listed(explanation, **options):
    return len(re.findall(r"^ +\d+  █", printed(explanation, **options), re.MULTILINE))


def test_the_list_leaves_out_what_tells_nothing():
    scores = {"34": 2.0, "pay": 0.03, "is": 0.019, "an": 0.001, "The": 0.001, "A:": 0.001}
    assert listed(explain(scores=scores)) == 3
    assert listed(explain(scores=scores), top_k=5) == 5
    assert listed(explain(scores={"34": 2.0, "an": 0.001, "The": 0.001})) == 3


def test_show_prints_to_standard_output(capsys):
    explain().show(width=70, top_k=1)
    captured = capsys.readouterr()
    assert "Answer: 34 dollars" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"width": 19}, "width must be at least 20, got 19."),
        ({"target": 2}, "target must lie in [0, 1], got 2."),
    ],
)
def test_show_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explain().show(**options)


def test_a_long_text_is_cut_down_to_what_matters():
    prompt = "nothing to see here at all\n" * 300 + "the key is 34\n" + "more of nothing\n" * 300
    lines = printed(explain(prompt, scores={"34": 1.0})).splitlines()
    assert len(lines) < 40
    assert "the key is ⟦34⟧" in lines
    assert lines.count("⋯") == 2


def test_nothing_measured_and_nothing_supporting_can_be_shown():
    explanation = explain(scores={})
    assert "no unit supports the answer" in printed(explanation)
    explanation.suppressed_logprobs.fill_(NAN)
    text = printed(explanation)
    assert "were not measured" in text
    assert Page(explanation.to_html()).text == explanation.text


# The page.


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.html, self.path, self.text, self.scripts = html, [], "", []
        self.elements: list[Any] = []
        self.feed(html)
        self.close()
        assert not self.path  # every element is closed
        self.data = json.loads(self.scripts[0])
        self.spans = [e for e in self.elements if "data-p" in e.attributes]

    def handle_starttag(self, tag, attrs):
        node = SimpleNamespace(
            tag=tag, attributes=dict(attrs), text="", inside=self._inside_the_text()
        )
        self.elements.append(node)
        if tag not in ("meta", "input"):
            self.path.append((tag, node))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.path.pop()[0] == tag

    def _inside_the_text(self):
        return any(node.attributes.get("id") == "text" for _, node in self.path)

    def handle_data(self, data):
        if self.path and self.path[-1][0] == "script":
            self.scripts[-1] += data
        if self._inside_the_text():
            self.text += data
        for _, node in self.path[-1:]:
            node.text += data


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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = """
const result = {};
const byId = (id) => document.getElementById(id);
const press = (key) => new KeyboardEvent("keydown", {key, bubbles: true});
const key = (name) => byId("text").dispatchEvent(press(name));
const words = (row, name) => row.querySelector(name).textContent;
const rows = () => [...document.querySelectorAll(".row")]
  .map((row) => words(row, "b") + " " + words(row, ".number"));
const sign = (span) => span.className.split(" ").filter((name) => "pn".includes(name));
const painted = () => [...document.querySelectorAll("#text .p, #text .n")]
  .map((span) => span.textContent + " " + sign(span) + span.style.getPropertyValue("--v"));
try { STEPS } catch (error) { result.error = String(error); }
document.body.replaceChildren(JSON.stringify(result));
"""


def drive(tmp_path, html, steps):
    """What the page's script does, as JSON; the page's policy would rightly stop the driver."""
    html = re.sub(r"<meta http-equiv=[^>]*>", "", html)
    script = f"<script>{DRIVER.replace('STEPS', steps)}</script></body>"
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", script), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-component-update"
    quiet = ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *options.split(), *quiet, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    assert body, done.stderr
    return json.loads(html_unescape(body[1]))


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


# The figure.


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_figure_is_returned_and_written(tmp_path, ending):
    path = tmp_path / f"figure.{ending}"
    figure = explain().plot(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "34 dollars   (p = 0.472)" in words
    assert "target token × unit" in words


def test_hostile_text_and_missing_glyphs_do_not_warn(tmp_path):
    explain(HOSTILE + "\U00013000\ue000\u0e01", HOSTILE).plot(tmp_path / "figure.png")


def test_dollar_signs_are_no_formulas(tmp_path):
    formula = "$\\nonsense{$"
    explain(f"{formula} a", f"{formula} b", model=formula).plot(tmp_path / "figure.png")


def test_a_figure_of_one_target_and_a_long_text():
    prompt = (
        "\n".join(f"line {index} says nothing new" for index in range(125)) + "\nthe pay is 3400"
    )
    figure = explain(prompt, " 3400", scores={"3400": 1.0}).plot(target=0)
    axes = figure.axes
    assert len(axes) == 2  # no matrix
    assert len(axes[1].patches) == 3  # the others tell nothing
    shown = [text.get_text() for text in axes[0].texts]
    assert "⋯" in shown
    assert shown.count("3400") == 2
    assert figure.get_size_inches()[1] < 20


def test_the_boxes_of_the_figure_follow_the_strengths():
    figure = explain(scores={"34": 2.0, "51": -1.0}).plot()
    colours = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    expected = [
        tuple(channel / 255 for channel in colour)
        for colour in (
            palette.LIGHT.support,
            palette.mix((255, 255, 255), palette.LIGHT.oppose, 0.5),
            palette.LIGHT.support,
        )
    ]
    assert colours == [pytest.approx(colour) for colour in expected]


def test_a_figure_of_a_missing_target_is_refused():
    with pytest.raises(ValueError, match=r"^target must lie in \[0, 1\], got 5\.$"):
        explain().plot(target=5)
