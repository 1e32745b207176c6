"""Units of every size, in any script, through every kind of tokenizer."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_layouts import check_covering, check_exact, laid_out, texts
from toy_tokenizers import byte_level, chat, sentencepiece, unigram, wordpiece

from atman_triton import Delimiter, Spans, TokenSpans
from atman_triton.demo.model import load_demo_model
from atman_triton.granularity import GRANULARITIES, checked_granularity
from atman_triton.placing import owners
from atman_triton.segments import words
from atman_triton.units import coarsest, divided

TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level-prefix": byte_level(add_prefix_space=True),
    "llama": sentencepiece("first"),
    "llama-legacy": sentencepiece("legacy"),
    "gemma": sentencepiece("gemma"),
    "unigram": unigram(),
    "wordpiece": wordpiece(),
}
SIZES: list[Any] = [
    "token",
    "word",
    "sentence",
    "paragraph",
    "auto",
    Delimiter(". ", "\n"),
    Delimiter(r"\s+", regex=True),
]
PIECES = st.sampled_from(
    [
        *(
            "Hello",
            " world",
            "The pay is 23",
            "你好",
            "世界",
            "สวัสดีชาวโลก",
            "مرحبا",
            "שלום",
            "日本の首都は",
        ),
        *(
            "cafe\u0301",
            "naïve",
            "3.14",
            "don't",
            "e-mail",
            "नमस्ते",
            "ﬁx",
            "½",
            "…",
            "—",
            "「東京」",
        ),
        *(
            "🤣",
            "👨\u200d👩\u200d👧",
            "👍🏽",
            "🇫🇷",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "\u00a0",
            "\u3000",
        ),
        *(". ", "? ", "! ", "。", "؟ ", "(", ")", '"', "“", "”", "$5", "5 €", ",", "\u2028", "###"),
    ]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join)


# --- exactness ----------------------------------------------------------------------------------


@given(name=st.sampled_from(list(TOKENIZERS)), size=st.sampled_from(SIZES), text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_units_are_exact_disjoint_and_cover_the_text(name, size, text):
    layout = laid_out("x" + text + "y", size, TOKENIZERS[name], target=(7, 8, 9))
    check_exact(layout)
    if name not in ("unigram", "wordpiece"):  # which drop or rewrite characters
        check_covering(layout)


@pytest.mark.parametrize("size", ["word", "sentence", Delimiter("。")], ids=str)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_of_a_character_stay_in_one_unit(name, size):
    layout = laid_out("So 🤣 👨‍👩‍👧 e\u0301 日本語。ﬁx", size, TOKENIZERS[name])
    check_exact(layout)
    for character in ("🤣", "👨‍👩‍👧", "e\u0301", "ﬁ"):
        at = layout.text.index(character)
        placed = [(u.start, u.stop) for u in layout.units if u.start is not None and u.stop]
        touching = [(a, b) for a, b in placed if a < at + len(character) and at < b]
        assert len(touching) == 1, character


def squad():
    """Paragraphs of real text, where they are there."""
    root = Path(__file__).parent.parent
    given = os.environ.get("ATMAN_SQUAD", root.parent / "shared/data/squad_v1_subset.json")
    if not Path(given).exists():
        pytest.skip("no squad_v1_subset.json beside the repository; ATMAN_SQUAD may name one")
    data = json.loads(Path(given).read_text(encoding="utf-8"))["data"]
    return [paragraph["context"] for article in data for paragraph in article["paragraphs"]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_real_text_goes_through_every_granularity(size):
    contexts = squad()
    demo = load_demo_model()[1]
    for number, context in enumerate(contexts[::6]):
        chosen = list(TOKENIZERS.values())[number % len(TOKENIZERS)]
        for tokenizer in (demo, chosen):
            layout = laid_out(context, size, tokenizer)
            check_exact(layout)
            if chosen not in (TOKENIZERS["unigram"], TOKENIZERS["wordpiece"]):
                check_covering(layout)
        if size == "auto":
            assert 1 <= len(texts(layout)) <= 60


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!  Yes.", ["Hello, ", "world!  ", "Yes."]),
        ("It's 3.14 (or so) for $5 or 5$ now", "It's |3.14 |(or |so) |for |$5 |or |5$ |now"),
        ('He said "no" - twice', 'He |said |"no" - |twice'),
        ("你好世界，今天天气很好。", "你好|世界，|今天|天气|很好。"),
        ("日本の首都は「東京」です。", "日本|の|首都|は|「東京」|です。"),
        ("สวัสดีชาวโลก", "สวัสดี|ชาว|โลก"),
        ("مرحبا بالعالم. كيف", "مرحبا |بالعالم. |كيف"),
        ("שלום עולם.", "שלום |עולם."),
        ("नमस्ते दुनिया।", "नमस्ते |दुनिया।"),
        ("a 👨‍👩‍👧 🤣 cafe\u0301", "a |👨‍👩‍👧 |🤣 |cafe\u0301"),
        ("2+2=4", "2|+|2|=|4"),
        ("  leading", ["  leading"]),
        ("ends (", ["ends ("]),
        ("?!", ["?!"]),
        (" \n", [" \n"]),
        ("", [""]),
    ],
)
def test_words(text, expected):
    expected = expected.split("|") if isinstance(expected, str) else expected
    assert [text[start:stop] for start, stop in words(text)] == expected


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_words_cover_the_text_once(text):
    spans = words(text)
    assert "".join(text[start:stop] for start, stop in spans) == text
    assert all(start < stop for start, stop in spans)


def test_a_space_belongs_to_the_word_whose_token_carries_it():
    text = "Hello world, hello there."
    assert texts(laid_out(text, "word", byte_level())) == ["Hello", " world,", " hello", " there."]
    assert texts(laid_out(text, "word", wordpiece())) == ["Hello", " world,", " hello", " there."]
    # a token of spaces alone goes with the word before
    assert texts(laid_out("a  b", "word", byte_level())) == ["a ", " b"]


def test_a_token_that_holds_several_words_belongs_to_the_longest_of_them():
    layout = laid_out("日本の", "word", unigram())  # one unknown token, or two
    check_exact(layout)
    assert "".join(texts(layout)) == "日本の"


# --- delimiters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "delimiter", "expected"),
    [
        ("One### Two### Three", Delimiter("###"), ["One###", " Two###", " Three"]),
        ("###One###Two", Delimiter("###"), ["###One###", "Two"]),
        ("One######Two###", Delimiter("###"), ["One######", "Two###"]),
        ("a;b|c", Delimiter(";", "|"), ["a;", "b|", "c"]),
        ("a--->b->c", Delimiter("->", "--->"), ["a--->", "b->", "c"]),
        ("a.b", Delimiter("."), ["a.", "b"]),
        ("a1b22c", Delimiter(r"\d+", regex=True), ["a1", "b22", "c"]),
        ("Q: a A: b Q: c", Delimiter(r"(?=Q:)", regex=True), ["Q: a A: b ", "Q: c"]),
        ("nothing to cut", Delimiter("###"), ["nothing to cut"]),
    ],
)
def test_a_delimiter_ends_its_unit(text, delimiter, expected):
    layout = laid_out(text, delimiter, byte_level())
    assert texts(layout) == expected
    assert {unit.level for unit in layout.units} == {"delimited"}
    check_exact(layout)


def test_delimiters_say_what_they_are():
    assert repr(Delimiter("###", "--")) == "Delimiter('###', '--')"
    assert repr(Delimiter("#+", regex=True)) == "Delimiter('#+', regex=True)"
    assert Delimiter("a") == Delimiter("a") != Delimiter("a", regex=True)


@pytest.mark.parametrize(
    ("delimiters", "error", "message"),
    [
        ((), ValueError, "Delimiter must be given at least one delimiter, got none."),
        (("",), ValueError, "a delimiter must not be an empty str."),
        ((5,), TypeError, "a delimiter must be a str, got 5."),
        (("(",), ValueError, r"delimiter '\(' is no regular expression: missing \)"),
    ],
)
def test_bad_delimiters_are_refused(delimiters, error, message):
    with pytest.raises(error, match=message):
        Delimiter(*delimiters, regex=True)


# --- spans --------------------------------------------------------------------------------------

SENTENCE = "The pay per hour is 23 euros."


def test_spans_of_characters():
    layout = laid_out(SENTENCE, Spans([(20, 28), (4, 16)]), byte_level())
    assert texts(layout) == [" pay per hour", " 23 euros"]
    assert {unit.level for unit in layout.units} == {"span"}
    assert [(p.text, p.reason) for p in layout.left_out] == [
        ("The", "in no span"),
        (" is", "in no span"),
        (".", "in no span"),
    ]
    check_exact(layout)
    assert laid_out(SENTENCE, [(20, 28), (4, 16)], byte_level()).units == layout.units


def test_a_token_partly_inside_a_span_belongs_to_it():
    assert texts(laid_out(SENTENCE, [(5, 6)], byte_level())) == [" pay"]
    # of two spans to the one that holds more of it, and whitespace does not count
    both = laid_out(SENTENCE, [(0, 5), (5, 7)], byte_level())
    assert texts(both) == ["The", " pay"]
    equal = laid_out(SENTENCE, [(0, 6), (6, 13)], byte_level())  # pa | y per: most is in the first
    assert texts(equal) == ["The pay", " per hour"]
    assert owners("ab", [(0, 2)], [(0, 1), (1, 2)]) == [0]  # of equals the first


def test_a_span_and_the_target_s_own_tokens():
    layout = laid_out(SENTENCE, [(0, 3)], byte_level(), target=(8, 9, 10))
    assert [unit.part for unit in layout.units] == ["prompt"]
    assert (layout.left_out[-1].reason, layout.left_out[-1].branch) == ("in no span", 0)
    check_exact(layout)


def test_spans_of_tokens():
    layout = laid_out([5, 6, 7, 8, 9], TokenSpans([(3, 5), (0, 2)]))
    assert [unit.tokens for unit in layout.units] == [(0, 1), (3, 4)]
    assert texts(layout) == ["5 6", "8 9"]
    assert [(p.tokens, p.reason) for p in layout.left_out] == [((2,), "in no span")]
    text = laid_out("Hello world", TokenSpans([(0, 3)]), sentencepiece())
    assert [unit.tokens for unit in text.units] == [(1, 2)]  # <s> is no unit's


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ([], ValueError, "Spans must be given at least one"),
        ([(3, 3)], ValueError, r"must be \(start, stop\) with 0 <= start < stop, got \(3, 3\)"),
        ([(-1, 3)], ValueError, "0 <= start < stop"),
        ([(0, 5), (4, 8)], ValueError, r"disjoint, but \(0, 5\) and \(4, 8\) overlap"),
        ([(0, 1.5)], TypeError, r"must be \(start, stop\), two ints, got \(0, 1.5\)"),
        ([3], TypeError, r"must be \(start, stop\), two ints, got 3"),
        ([(0, 99)], ValueError, r"must lie within the prompt, which has 29 characters, got \(0, 9"),
        ([(3, 4)], ValueError, r"span \(3, 4\) holds no token that can be explained"),
    ],
)
def test_bad_spans_are_refused(spans, error, message):
    with pytest.raises(error, match=message):
        laid_out(SENTENCE, spans, byte_level())


def test_a_span_over_a_token_that_is_no_unit_s_is_refused():
    with pytest.raises(ValueError, match=r"reaches over '</s>' \(special token\)"):
        laid_out("Hello</s> world", [(0, 15)], sentencepiece())
    with pytest.raises(ValueError, match="holds no token that can be explained: it is special tok"):
        laid_out("Hello</s> world", [(5, 9)], sentencepiece())
    with pytest.raises(ValueError, match=r"which has 3 tokens, got \(2, 4\)"):
        laid_out([5, 6, 7], TokenSpans([(2, 4)]))


# --- turns --------------------------------------------------------------------------------------

MESSAGES = [
    {"role": "system", "content": "Be brief. Be kind."},
    {"role": "user", "content": "Hello there.\n\nIs it 23?"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "Sure?"},
]


def test_a_turn_is_a_message():
    layout = laid_out(MESSAGES, "turn", chat(), target=(7, 8, 9))
    assert texts(layout) == [message["content"] for message in MESSAGES]
    assert {unit.level for unit in layout.units} == {"turn"}
    assert layout.left_out[-1].reason == "part of the answer"
    check_exact(layout)


@pytest.mark.parametrize("size", ["word", "sentence", "paragraph", "auto", Delimiter(" ")], ids=str)
def test_no_unit_mixes_messages_or_template(size):
    tokenizer = chat()
    template = tokenizer.chat_template
    try:  # one that writes next to nothing between messages
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
        )
        layout = laid_out(MESSAGES, size, tokenizer)
    finally:
        tokenizer.chat_template = template
    check_exact(layout)
    contents = [message["content"] for message in MESSAGES]
    assert all(any(text.strip() in content for content in contents) for text in texts(layout))
    assert "".join("".join(texts(layout)).split()) == "".join("".join(contents).split())


def test_messages_with_nothing_between_them_stay_apart():
    tokenizer = chat()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        messages = [{"role": "user", "content": text} for text in ("Hello", " world", " hello")]
        layout = laid_out(messages, "turn", tokenizer)
    finally:
        tokenizer.chat_template = template
    assert texts(layout) == ["Hello", " world", " hello"]


@pytest.mark.parametrize("size", ["sentence", "paragraph", Delimiter("###")], ids=str)
def test_no_unit_reaches_over_a_special_token(size):
    layout = laid_out("Hello</s> world", size, sentencepiece())
    assert texts(layout) == ["Hello", " world"]
    check_exact(layout)


def test_parts_of_a_message_are_one_turn_where_nothing_stands_between():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": " world"}]
    tokenizer = chat()
    template = tokenizer.chat_template
    try:
        for between, expected in (("", ["Hello world"]), ("|", ["Hello", " world"])):
            tokenizer.chat_template = (
                "{% for m in messages %}<{% for p in m['content'] %}{{ p['text'] }}"
                + between
                + "{% endfor %}>{% endfor %}"
            )
            layout = laid_out([{"role": "user", "content": parts}], "turn", tokenizer)
            assert texts(layout) == expected
            check_exact(layout)
    finally:
        tokenizer.chat_template = template


def test_a_turn_needs_messages():
    with pytest.raises(ValueError, match="granularity='turn' needs chat messages"):
        laid_out("Hello", "turn", byte_level())


# --- automatic ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_units", "level"),
    [
        ("Hello world", 30, "token"),
        ("The pay is good. " * 10, 40, "word"),
        ("The pay is good. " * 30, 30, "sentence"),
        ("The pay is good. So it is.\n\n" * 30, 30, "paragraph"),
        ("One. Two.", 1, "paragraph"),
    ],
)
def test_automatic_takes_the_level_with_the_closest_number(prompt, max_units, level):
    layout = laid_out(prompt.strip(), "auto", byte_level(), max_units=max_units)
    assert layout.granularity == level
    assert {unit.level for unit in layout.units} == {level}
    counts = {
        each: len(laid_out(prompt.strip(), each, byte_level()).units)
        for each in ("token", "word", "sentence", "paragraph")
    }
    assert abs(len(layout.units) - max_units) == min(abs(n - max_units) for n in counts.values())


def test_neighbouring_paragraphs_are_joined_where_they_are_too_many():
    text = "\n\n".join(f"Paragraph {number}. It is one." for number in range(100))
    layout = laid_out(text, "auto", byte_level(), max_units=7)
    assert len(layout.units) == 7
    assert {unit.level for unit in layout.units} == {"chunk"}
    assert "".join(texts(layout)) == text
    sizes = [len(unit.tokens) for unit in layout.units]
    assert max(sizes) < 2 * min(sizes)
    check_exact(layout)


def test_ids_without_a_text_are_joined_too():
    layout = laid_out([*range(3, 103)], "auto", max_units=10)
    assert [len(unit.tokens) for unit in layout.units] == [10] * 10
    few = laid_out([5, 6, 7], "auto", max_units=10)
    assert {unit.level for unit in few.units} == {"token"}


def test_a_chunk_does_not_end_amid_a_character():
    layout = laid_out("a" + "🤣" * 30, "token", byte_level())
    chunks = coarsest(layout)
    assert len(chunks) > 1
    assert all(first.stop == second.start for first, second in pairwise(chunks))
    assert [part.start for part in divided(chunks[0], layout)][:3] == [0, 3, 5]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["page", None, 5, "Token"])
def test_unknown_granularities_are_refused(given):
    with pytest.raises(ValueError, match=f"one of {', '.join(GRANULARITIES)}, a Delimiter, Spans"):
        checked_granularity(given)


@pytest.mark.parametrize("size", ["word", "sentence", "turn", Delimiter("a"), Spans([(0, 1)])])
def test_ids_without_a_text_have_tokens_only(size):
    with pytest.raises(ValueError, match="needs text, but without a tokenizer the prompt is tok"):
        laid_out([5, 12, 7], size)
