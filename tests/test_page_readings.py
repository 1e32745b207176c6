"""The page of documents, neighbours, parts of a target, contrasts and processed scores."""

import dataclasses
import re

import pytest
import torch
from pictures import CHROMIUM, Page, drive
from toy_explanations import HOSTILE, coarser, explain, explain_several, merge, sourced

from atman_triton.pieces import Document, Neighbour, TargetPart
from atman_triton.render import layout, numbers

change = dataclasses.replace
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def halves(explanation):
    """The same with each target in two parts: its first token, and the rest."""
    parts = []
    for branch in range(len(explanation.target_stops)):
        own = [row for row, t in enumerate(explanation.targets) if t.branch == branch]
        for rows in (own[:1], own[1:]):
            first, last = explanation.targets[rows[0]], explanation.targets[rows[-1]]
            text = explanation.text[first.start : last.stop]
            parts.append(TargetPart(text, tuple(rows), first.start, last.stop, branch))
    return change(explanation, parts=parts)


def one(**ways):
    """One answer of three words in two parts, documents and neighbours."""
    made = explain(answer=" 34 dollars now", scores={"34": 2.0, "pay": 1.0, "51": -0.5})
    scores = made.scores * torch.tensor([[1.0], [1.5], [2.0]])
    made = change(made, suppressed_logprobs=made.base_logprobs[:, None] - scores)
    return change(halves(sourced(made)), **ways)


def two(**ways):
    this = explain(answer=" 34 dollars now", scores={"34": 2.0, "pay": 1.0, "51": -0.5})
    that = explain(answer=" 51 dollars then", scores={"34": 0.5, "51": 1.5})
    return change(halves(sourced(merge([this, that]))), **ways)


def spans_of(page, name):
    return [e for e in page.elements if name in (e.attributes.get("class") or "").split()]


def test_documents_are_marked_and_the_text_stays_as_it_is():
    explanation = one()
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    marks = spans_of(page, "doc")
    assert [mark.attributes["data-id"] for mark in marks] == ["pay", "overtime"]
    assert all(mark.text == "" for mark in marks)
    assert marks[0].attributes["aria-label"] == "document pay"
    opened = re.findall(r'<span class="document">(.*?)</span>(?=[^<]*(?:<span|\n|$))', page.html)
    assert len(opened) == 2
    data = page.data["explanations"][0]
    assert data["documents"] == ["pay", "overtime"]
    assert data["document"] == [unit.document for unit in explanation.units]
    plain = Page(explain().to_html())
    assert not spans_of(plain, "doc")
    assert "documents" not in plain.data["explanations"][0]


def test_hostile_ids_parts_and_names_are_only_text():
    made = halves(explain(HOSTILE, " " + HOSTILE))
    size = len(HOSTILE)
    units = [change(unit, document=0 if unit.part == "prompt" else None) for unit in made.units]
    made = change(made, units=units, documents=[Document(HOSTILE, 0, size)])
    page = Page(made.to_html())
    assert page.text == layout.printable(made.text)
    marks = spans_of(page, "doc")
    assert marks[0].attributes["data-id"] == layout.visible(HOSTILE)
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
    assert len(page.scripts) == 2


def test_neighbours_have_places_also_where_no_unit_is():
    explanation = one()
    gone = next(i for i, unit in enumerate(explanation.units) if unit.text == " 51")
    kept = [i for i in range(len(explanation.units)) if i != gone]
    explanation = change(
        explanation,
        units=[explanation.units[i] for i in kept],
        suppressed_logprobs=explanation.suppressed_logprobs[:, kept],
    )
    page = Page(explanation.to_html())
    assert page.text == explanation.text
    own = page.data["explanations"][0]["neighbours"]
    for unit, near in zip(explanation.units, own, strict=True):
        assert near["count"] == len(unit.neighbours)
        shown = [(word, factor, similarity) for _, word, factor, similarity in near["shown"]]
        texts = [explanation.text[n.start : n.stop].strip() for n in unit.neighbours]
        assert shown == [(text, 0.28, 0.8) for text in texts]
        for (place, *_), text in zip(near["shown"], texts, strict=True):
            marked = [page.spans[i].text for i in page.data["near"][place]]
            assert marked == [text]
    lone = [
        i
        for places in page.data["near"]
        for i in places
        if not any(page.data["pieces"][i]) and page.spans[i].text == "51"
    ]
    assert len(lone) == 1


def test_of_very_many_neighbours_the_most_manipulated_are_on_the_page():
    explanation = explain(" ".join(f"w{i}" for i in range(100)), scores={})
    others = explanation.units[1:90]
    near = [Neighbour(u.tokens[0], i / 100, 0.9, u.start, u.stop) for i, u in enumerate(others)]
    units = [change(explanation.units[0], neighbours=tuple(near)), *explanation.units[1:]]
    data = Page(change(explanation, units=units).to_html()).data["explanations"][0]
    first = data["neighbours"][0]
    assert (first["count"], len(first["shown"])) == (89, numbers.NEIGHBOURS)
    factors = [factor for *_, factor, _ in first["shown"]]
    assert factors == [i / 100 for i in range(numbers.NEIGHBOURS)]


def radios(page):
    found = [e for e in page.elements if e.attributes.get("type") == "radio"]
    return [(e.attributes["name"], e.attributes["value"]) for e in found]


def test_parts_can_be_chosen_beside_target_tokens():
    page = Page(one().to_html())
    assert radios(page) == [("target", value) for value in ("0", "4", "5", "1", "2", "3")]
    legends = [e.text for e in page.elements if e.tag == "legend"]
    assert legends == ["Which part of the target to explain", "Which target token to explain"]
    parts = page.data["explanations"][0]["parts"]
    assert [(part["text"], part["rows"]) for part in parts] == [
        ("34", [0]),
        ("dollars now", [1, 2]),
    ]
    chips = [e.text for e in page.elements if e.tag == "bdi"]
    assert chips == ["all (mean)", "34", "dollars now", "34", "dollars", "now"]
    # Parts that are tokens, or whole targets, are no other choice.
    assert radios(Page(sourced(explain()).to_html())) == radios(Page(explain().to_html()))


def test_parts_of_several_targets_stand_with_their_own():
    page = Page(two().to_html())
    first = [value for name, value in radios(page) if name == "target0"]
    second = [value for name, value in radios(page) if name == "target1"]
    assert first == ["-1", "7", "8", "1", "2", "3"]
    assert second == ["-2", "9", "10", "4", "5", "6"]
    options = [
        e.attributes["value"]
        for e in Page(one().to_html(others=[one()])).elements
        if e.tag == "option"
    ]
    assert options == ["0", "4", "5", "1", "2", "3"] * 2


@pytest.mark.parametrize(
    ("ways", "title", "ends", "words"),
    [
        ({}, "34 dollars now", "opposessupports", "rises (orange) or falls (blue) when"),
        (
            {"postprocessing": "absolute"},
            "34 dollars now",
            "0matters",
            "changes (absolute change, the one way or the other) when",
        ),
        ({"normalize": True}, "34 dollars now", "0supports", "Values are scaled: 0 is the"),
        (
            {"contrast": True},
            "Why “34 dollars now” rather than “51 dollars then”",
            "for “51 dollars then”for “34 dollars now”",
            "rises more than that of the second (orange), or less (blue), when",
        ),
        (
            {"contrast": True, "postprocessing": "square"},
            "Why “34 dollars now” rather than “51 dollars then”",
            "0matters",
            "(square difference, the one way or the other)",
        ),
        (
            {"contrast": True, "normalize": True},
            "Why “34 dollars now” rather than “51 dollars then”",
            "0for “34 dollars now”",
            "rises more than that of the second, when",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_title_words_and_legend_say_what_the_colours_are(ways, title, ends, words):
    explanation = two(**ways) if "contrast" in ways else one(**ways)
    page = Page(explanation.to_html())
    assert next(e.text for e in page.elements if e.tag == "h1") == title
    at = page.elements.index(next(e for e in page.elements if e.attributes.get("id") == "scale"))
    scale = page.elements[at + 1 : at + 3]
    assert "".join(e.text for e in scale) == ends
    assert words in next(e.text for e in page.elements if e.attributes.get("class") == "sub")
    signed = "postprocessing" not in ways and "normalize" not in ways
    assert bool(spans_of(page, "single")) != signed
    assert bool(spans_of(page, "n")) == signed


def test_the_first_row_is_read_and_the_others_are_as_measured():
    explanation = one(postprocessing="square", normalize=True)
    data = Page(explanation.to_html()).data["explanations"][0]
    rows = torch.tensor([[torch.nan if v is None else v for v in row] for row in data["rows"]])
    expected = torch.cat([explanation.relevance[None], explanation.scores])
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=0, equal_nan=True)
    assert (data["post"], data["scaled"], data["reduction"]) == ("square", True, "mean")
    assert (data["scale"]["suffix"], data["scale"]["signed"]) == ("", False)
    assert Page(one(postprocessing="square").to_html()).data["explanations"][0]["scale"][
        "suffix"
    ] == (" nats²")


# What the script does.

READ = """
const values = () => Object.fromEntries([...document.querySelectorAll(".row")].map((row) =>
  [words(row, "b") + "@" + words(row, ".context"), words(row, ".number")]));
const more = () => { for (let b; (b = document.querySelector(".more"));) b.click(); };
"""
WAYS = [
    {"postprocessing": p, "normalize": n, "contrast": c, "reduction": r}
    for p, n, c, r in (
        ("none", False, True, "mean"),
        ("absolute", False, False, "sum"),
        ("square", True, True, "mean"),
        ("none", True, False, "sum"),
    )
]


def shown(explanation, **which):
    """Supporters' numbers as the page lists them, in order."""
    values = explanation.values(**which).tolist()
    if not which:
        values = layout.in_sight(explanation)
    digits = max(0, layout_digits(values))
    signed = explanation.postprocessing == "none" and not explanation.normalize
    ranked = [values[unit] for unit in layout.ranking(values) if values[unit] > 0]
    return [f"{'+' * signed}{value:.{digits}f}" for value in ranked]


def layout_digits(values):
    from atman_triton.render import wording

    return wording.decimals(values)


@browser
@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "-".join(map(str, ways.values())))
def test_the_script_reads_as_explanations_do(tmp_path, ways):
    explanation = two(**ways)
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        const amounts = () => {
          for (let b; (b = document.querySelector(".more"));) b.click();
          const list = document.querySelector("#ranking ol");
          return list ? [...list.querySelectorAll(".number")].map((e) => e.textContent) : [];
        };
        result.all = amounts();
        result.branches = [-1, -2].map((b) => { pick("branch", b); return amounts(); });
        result.tokens = [1, 2, 3, 4, 5, 6].map((t) => {
          pick("branch", t < 4 ? -1 : -2); pick(t < 4 ? "target0" : "target1", t); return amounts();
        });
        result.parts = [7, 8, 9, 10].map((p) => {
          pick("branch", p < 9 ? -1 : -2); pick(p < 9 ? "target0" : "target1", p);
          return [amounts(), texts(".sel")];
        });
        """,
    )
    assert "error" not in result
    assert result["all"] == shown(explanation)
    assert result["branches"] == [shown(explanation, branch=b) for b in range(2)]
    assert result["tokens"] == [shown(explanation, target=t) for t in range(6)]
    parts = [shown(explanation, part=p) for p in range(4)]
    assert [amounts for amounts, _ in result["parts"]] == parts
    assert [chosen for _, chosen in result["parts"]] == [
        ["34"],
        ["dollars", "now"],
        ["51"],
        ["dollars", "then"],
    ]


@browser
def test_the_script_outlines_the_neighbourhood(tmp_path):
    explanation = change(one(), coarse=coarser(sourced(one()), documents=sourced(one()).documents))
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        const near = () => all("#text .near").map((e) => e.textContent + " " + e.title);
        const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
        const spans = all("#text [data-p]");
        const named = (word) => spans.find((e) => e.textContent === word);
        result.before = near();
        over(named("51")); result.hover = near(); result.detail = byId("detail").innerText;
        over(named("is")); result.none = near();
        byId("text").dispatchEvent(new MouseEvent("mouseleave")); result.left = near();
        key("Home"); key("ArrowRight"); result.focus = near();
        const row = document.querySelector(".row");
        key("Escape"); result.escaped = near();
        row.dispatchEvent(new MouseEvent("mouseenter")); result.row = near();
        row.dispatchEvent(new MouseEvent("mouseleave")); result.row_left = near();
        pick("level", 1); result.coarse = near();
        """,
    )
    assert "error" not in result
    title = " suppressed along: ×0.28, similarity 0.8"
    assert result["before"] == result["none"] == result["left"] == result["escaped"] == []
    assert result["hover"] == ["pay" + title, "34" + title, "34" + title]
    assert result["focus"] == ["34" + title, "51" + title, "34" + title]
    lines = [line for line in result["detail"].split("\n") if line]
    at = lines.index("along with it")
    assert lines[at + 1 :] == ["pay ×0.28 (similarity 0.8)"] + ["34 ×0.28 (similarity 0.8)"] * 2
    assert lines[at - 2 : at] == ["document", "overtime"]
    assert len(result["row"]) == 3
    assert result["row_left"] == result["coarse"] == []


@browser
def test_the_panel_of_a_contrast_has_both_sides(tmp_path):
    result = drive(
        tmp_path,
        two(contrast=True).to_html(),
        """
        const titles = () => texts("#ranking h2");
        key("ArrowDown"); result.panel = byId("detail").innerText;
        result.titles = titles(); result.scale = texts("#scale span");
        result.sources = texts(".row .source");
        pick("branch", -1); result.own = titles(); result.own_scale = texts("#scale span");
        pick("target0", 8); key("ArrowDown"); result.part = byId("detail").innerText;
        """,
    )
    assert "error" not in result
    panel = [line for line in result["panel"].split("\n") if line]
    assert panel[1:3] == ["relevance", "+1.50 nats"]
    assert panel[5:9] == ["for “34 dollars now”", "+2.00", "for “51 dollars then”", "+0.50"]
    names = ["“34 dollars now”", "“51 dollars then”"]
    assert result["titles"] == [f"Speaks for {name}" for name in names]
    assert result["scale"] == [
        "−2.00 for “51 dollars then”",
        "0",
        "for “34 dollars now” +2.00 nats",
    ]
    assert result["sources"] == ["pay", "pay", "overtime"]
    assert result["own"][0] == "Supports the answer most"
    assert result["own_scale"][0].endswith(" opposes")
    assert "relevance for “dollars now”" in result["part"]
    assert "part’s probability" in result["part"]


def test_several_targets_keep_documents_in_the_prompt():
    page = Page(two().to_html())
    assert page.text == two().text
    html = page.html
    assert html.index('class="branch"') > html.rindex('class="document"')
    assert html.count("<span") - html.count("</span>") == 0
    overlay = Page(explain_several().to_html(others=[sourced(explain())]))
    assert not spans_of(overlay, "doc")
    assert len(spans_of(Page(one().to_html(others=[explain()])), "doc")) == 2


@browser
def test_of_a_unit_as_large_as_a_document_its_ends_are_named(tmp_path):
    words = " ".join(f"w{i}" for i in range(400))
    made = explain(words + "\nQ: which?", scores={})
    by_line = coarser(made, "document", r"[^\n]+\n?")
    scores = torch.tensor([[1.0, 0.5]] * len(made.targets))
    suppressed = by_line.base_logprobs[:, None] - scores
    document = Document("all", 0, len(words))
    units = [change(by_line.units[0], document=0), by_line.units[1]]
    explanation = change(by_line, suppressed_logprobs=suppressed, documents=[document], units=units)
    result = drive(
        tmp_path,
        explanation.to_html(),
        """
        key("ArrowDown"); result.panel = byId("detail").innerText.split("\\n")[0];
        result.row = document.querySelector(".row b").textContent;
        result.text = byId("text").textContent;
        """,
    )
    assert "error" not in result
    assert result["panel"].startswith("w0 w1 w2 ")
    assert " … " in result["panel"]
    assert "w399" in result["panel"]
    assert len(result["panel"]) < 320
    assert len(result["row"]) < 160
    assert result["text"] == explanation.text
