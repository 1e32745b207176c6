"""What of a prompt is explained: passages, documents, the user's own content."""

import pytest
from toy_layouts import check_exact, laid_out, texts
from toy_tokenizers import byte_level, chat, sentencepiece
from transformers import ByT5Tokenizer

PROMPT = (
    "Answer in a word.\n\nThe pay per hour is 23 euros. The period is four weeks.\n\nQ: pay? A:"
)
DOCUMENT = "The pay per hour is 23 euros. The period is four weeks."
START = PROMPT.index(DOCUMENT)


def left_out(layout):
    return [(piece.text, piece.reason) for piece in layout.left_out]


# --- explain_only -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [DOCUMENT, (START, START + len(DOCUMENT)), [(START, START + 30), (START + 29, 74)]]
)
@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["bytes", "pieces"])
def test_a_document_but_not_the_instructions(asked, tokenizer):
    layout = laid_out(PROMPT, "sentence", tokenizer, asked, target=(7, 8, 9))
    assert [text.strip() for text in texts(layout)] == [
        "The pay per hour is 23 euros.",
        "The period is four weeks.",
    ]
    assert {unit.part for unit in layout.units} == {"prompt"}
    assert ("Answer in a word.\n\n", "not in explain_only") in left_out(layout)
    assert layout.left_out[-1].branch == 0  # the answer was not asked for either
    check_exact(layout)


def test_several_passages():
    layout = laid_out(PROMPT, "word", byte_level(), ["four weeks", (0, 6)])
    assert [text.strip() for text in texts(layout)] == ["Answer", "four", "weeks"]
    check_exact(layout)


def test_no_unit_reaches_over_the_end_of_a_passage():
    layout = laid_out(PROMPT, "sentence", byte_level(), ["per hour is", "23"])
    assert [text.strip() for text in texts(layout)] == ["per hour is", "23"]
    assert [unit.level for unit in layout.units] == ["sentence", "sentence"]


def test_a_token_that_a_passage_touches_belongs_to_it():
    assert texts(laid_out("The pay is", "token", byte_level(), "ay")) == [" pay"]
    spaces = laid_out("The pay is", "token", byte_level(), "pay ")
    assert texts(spaces) == [" pay"]  # the space alone is none of the next word's


def test_a_pair_is_a_span_and_a_list_holds_indices():
    assert texts(laid_out("The pay is", "token", byte_level(), (0, 3))) == ["The"]
    assert texts(laid_out("The pay is", "token", byte_level(), [0, 2])) == ["The", " is"]


def test_a_passage_of_a_message_is_looked_for_in_contents_only():
    messages = [{"role": "user", "content": "The user asks: user? Hello."}]
    layout = laid_out(messages, "word", chat(), "Hello")
    assert texts(layout) == [" Hello."] or texts(layout) == ["Hello"]
    with pytest.raises(ValueError, match="'user' occurs 2 times in the prompt"):
        laid_out(messages, "word", chat(), "user")
    assert len(texts(laid_out([{"role": "user", "content": "A user."}], "word", chat(), "user")))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("The", r"'The' occurs 2 times in the prompt; give .* one: \(19, 22\), \(49, 52\)."),
        ("the pay", "explain_only 'the pay' does not occur in the prompt; it must be there"),
        ((0, 999), r"must lie within the prompt, which has 86 characters, got \(0, 999\)"),
        (["", "pay"], "explain_only must not be an empty str"),
        ([], "explain_only must name at least one unit"),
    ],
)
def test_passages_that_are_not_there_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        laid_out(PROMPT, "word", byte_level(), asked)


def test_a_passage_of_nothing_is_refused():
    with pytest.raises(ValueError, match="explain_only '</s>' holds no token that can be expl"):
        laid_out("Hello</s> world", "token", sentencepiece(), "</s>")
    with pytest.raises(ValueError, match="explain_only by passage needs text"):
        laid_out([5, 6, 7], "token", None, (0, 1))


# --- documents ----------------------------------------------------------------------------------

SOURCES = [
    {"id": "contract", "text": "The pay is 23 euros. The period is four weeks."},
    "Paris is the capital. Is it?",
]
QUESTION = "Read this:\n\n{documents}\n\nQ: What is the pay? A:"


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece("legacy")], ids=["bytes", "▁"])
def test_documents_are_put_where_the_prompt_says(tokenizer):
    layout = laid_out(QUESTION, "sentence", tokenizer, documents=SOURCES, target=(7, 8))
    both = f"{SOURCES[0]['text']}\n\n{SOURCES[1]}"
    assert layout.text.startswith(f"Read this:\n\n{both}\n\nQ: What")
    assert [document.id for document in layout.documents] == ["contract", "1"]
    for document, given in zip(layout.documents, [SOURCES[0]["text"], SOURCES[1]], strict=True):
        assert layout.text[document.start : document.stop] == given
    assert [(unit.text.strip(), unit.document) for unit in layout.units] == [
        ("The pay is 23 euros.", 0),
        ("The period is four weeks.", 0),
        ("Paris is the capital.", 1),
        ("Is it?", 1),
    ]
    assert {reason for _, reason in left_out(layout)} - {"special token"} == {"in no document"}
    check_exact(layout)


@pytest.mark.parametrize("size", ["token", "word", "sentence", "paragraph", "document", "auto"])
def test_no_unit_reaches_over_two_documents(size):
    sources = ["One two", "three. Four", "five\n\nsix"]
    layout = laid_out("{documents}", size, byte_level(), documents=sources)
    assert sorted({unit.document for unit in layout.units}) == [0, 1, 2]
    for unit in layout.units:
        assert unit.text.strip() in sources[unit.document]
    if size == "document":
        assert texts(layout) == sources
        assert {unit.level for unit in layout.units} == {"document"}
    check_exact(layout)


def test_documents_without_a_line_between_them_stay_apart():
    layout = laid_out(
        "One two three four", "sentence", byte_level(), documents=["One two", " three"]
    )
    assert texts(layout) == ["One two", " three"]
    assert [unit.document for unit in layout.units] == [0, 1]


def test_documents_in_a_message():
    messages = [
        {"role": "system", "content": "Use the documents."},
        {"role": "user", "content": "  {documents}\nQ: pay?  "},
    ]
    layout = laid_out(messages, "document", chat(), documents=["The pay is 23.", "Hello."])
    assert texts(layout) == ["The pay is 23.", "Hello."]
    check_exact(layout)
    last = [{"role": "user", "content": "Q: pay?\n{documents}"}]
    layout = laid_out(last, "document", chat(), documents=["The pay is 23.\n", "Hello.\n\n"])
    assert [layout.text[d.start : d.stop] for d in layout.documents] == [
        "The pay is 23.\n",
        "Hello.",
    ]


def test_a_slow_tokenizer_s_documents_are_searched():
    layout = laid_out("Read {documents}!", "document", ByT5Tokenizer(), documents=["one", "two"])
    assert texts(layout) == ["one", "two"]


def test_a_token_on_a_document_s_border_belongs_to_it():
    layout = laid_out("<{documents}>", "document", byte_level(), documents=["A.", "B"])
    check_exact(layout)
    assert [text.strip("<>\n") for text in texts(layout)] == ["A.", "B"]


def test_documents_that_stand_in_the_prompt_already():
    layout = laid_out(PROMPT, "document", byte_level(), documents=["The period is four weeks."])
    assert [text.strip() for text in texts(layout)] == ["The period is four weeks."]
    twice = laid_out("A b. A b.", "document", byte_level(), documents=["A b.", "A b."])
    assert [(d.start, d.stop) for d in twice.documents] == [(0, 4), (5, 9)]


def test_explain_only_beside_documents():
    layout = laid_out(QUESTION, "word", byte_level(), "What is the pay", documents=SOURCES)
    assert "".join(texts(layout)).strip() == "What is the pay"
    assert {unit.document for unit in layout.units} == {None}
    inside = laid_out(QUESTION, "word", byte_level(), "23 euros", documents=SOURCES)
    assert [unit.document for unit in inside.units] == [0, 0]


@pytest.mark.parametrize(
    ("prompt", "documents", "error", "message"),
    [
        (QUESTION, [], ValueError, "documents must hold at least one document, or be None."),
        (QUESTION, "text", TypeError, "documents must be a list of str or of"),
        (QUESTION, [5], TypeError, r"documents\[0\] must be a str or a mapping, got int."),
        (QUESTION, ["a", " \n"], ValueError, r"documents\[1\] must not be blank"),
        (
            QUESTION,
            [{"id": "a"}],
            ValueError,
            r"documents\[0\] must hold 'text' and may hold 'id', g",
        ),
        (QUESTION, [{"text": "a", "name": "b"}], ValueError, r"got \['name', 'text'\]"),
        (QUESTION, [{"text": "a", "id": 1.5}], TypeError, r"\['id'\] must be a str, got 1.5"),
        (QUESTION, [{"text": "a", "id": 1}, "b"], ValueError, "different ids, but '1' comes twice"),
        ("{documents} {documents}", ["a"], ValueError, "must hold {documents} once, got 2 times"),
        ("a b", ["c"], ValueError, "document '0' does not occur in the prompt; each must stand"),
        ("a b", ["b", "a"], ValueError, "'1' does not occur in the prompt behind the one before"),
        ("a b a", ["a"], ValueError, "occurs more than once .*; write {documents} in the prompt"),
    ],
)
def test_bad_documents_are_refused(prompt, documents, error, message):
    with pytest.raises(error, match=message):
        laid_out(prompt, "word", byte_level(), documents=documents)


def test_a_level_of_documents_needs_documents():
    with pytest.raises(ValueError, match="granularity='document' needs documents"):
        laid_out("Hello", "document", byte_level())
