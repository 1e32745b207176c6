"""Paragraphs and sentences, in any script, as spans of characters."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atman_triton.segments import paragraphs, sentences

SCRIPTS = st.lists(
    st.sampled_from(
        [
            *"aB1 .!?\n\r\t,'\"()…é你。！🤣ع؟שไ।\u2028\u00a0\ud7ff",
            *("e\u0301", "👨\u200d👩\u200d👧", "🇫🇷", "क\u094d"),
        ]
    ),
    max_size=60,
).map("".join)


def pieces(divide, text):
    return [text[start:stop] for start, stop in divide(text)]


@pytest.mark.parametrize("divide", [paragraphs, sentences])
@given(text=SCRIPTS)
@example("")
@example("\n\n\n")
@example(" \n x")
@settings(max_examples=100, deadline=None)
def test_spans_cover_the_text_once(divide, text):
    spans = divide(text)
    assert "".join(text[a:b] for a, b in spans) == text
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])][: len(spans)]
    if text:
        assert all(a < b for a, b in spans)


@given(text=SCRIPTS)
@settings(max_examples=100, deadline=None)
def test_no_sentence_crosses_a_paragraph(text):
    edges = {a for a, _ in paragraphs(text)}
    assert edges <= {a for a, _ in sentences(text)} | {0}


@given(text=SCRIPTS)
@settings(max_examples=100, deadline=None)
def test_no_sentence_starts_within_a_character(text):
    for start, _ in sentences(text)[1:]:
        assert not unicodedata.combining(text[start])
        assert text[start] != "\u200d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One.\n\nTwo.\nStill two.\n\n\nThree.", ["One.\n\n", "Two.\nStill two.\n\n\n", "Three."]),
        ("One.\n \t\nTwo.", ["One.\n \t\n", "Two."]),
        ("One.\nTwo.\nThree.\n", ["One.\n", "Two.\n", "Three.\n"]),
        ("One.\r\n\r\nTwo.\r\n", ["One.\r\n\r\n", "Two.\r\n"]),
        ("No line end", ["No line end"]),
        ("Ends with blank lines.\n\n\n", ["Ends with blank lines.\n\n\n"]),
        ("第一段。\n\n第二段。", ["第一段。\n\n", "第二段。"]),
    ],
)
def test_paragraphs(text, expected):
    assert pieces(paragraphs, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It works. Does it? Yes!", ["It works. ", "Does it? ", "Yes!"]),
        ("Pi is 3.14 or so. Good.", ["Pi is 3.14 or so. ", "Good."]),
        ("今天天气很好。你好吗？我很好！", ["今天天气很好。", "你好吗？", "我很好！"]),
        ("مرحبا بالعالم. كيف حالك؟ بخير.", ["مرحبا بالعالم. ", "كيف حالك؟ ", "بخير."]),
        ("यह पहला है। यह दूसरा है।", ["यह पहला है। ", "यह दूसरा है।"]),
        ("שלום עולם. מה שלומך?", ["שלום עולם. ", "מה שלומך?"]),
        (
            "Ha 🤣. So 👨‍👩‍👧 fun! Cafe\u0301 closed.",
            ["Ha 🤣. ", "So 👨‍👩‍👧 fun! ", "Cafe\u0301 closed."],
        ),
        ("Title\n\nA sentence. Another one.", ["Title\n\n", "A sentence. ", "Another one."]),
        ("   Leading. Spaces.", ["   Leading. ", "Spaces."]),
        ("Wait... what? !!! Yes.", ["Wait... what? !!! ", "Yes."]),
    ],
)
def test_sentences(text, expected):
    assert pieces(sentences, text) == expected


def test_a_piece_without_letters_stays_with_the_sentence_before():
    assert pieces(sentences, "Done. — ! Next.") == ["Done. — ! ", "Next."]
