"""Which tokens are units, which are targets, what is left out, and how large a unit is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import byte_level, chat, sentencepiece, unigram

from atman_triton.explanation import LeftOut
from atman_triton.segments import paragraphs, sentences
from atman_triton.tokens import encode_prompt, encode_target
from atman_triton.units import coarsest, divided, lay_out

MANY = 10**6
DIVIDE = {"sentence": sentences, "paragraph": paragraphs}
DOCUMENT = (
    "The pay per hour is 23 euros. The notice period is four weeks.\n\n"
    "Hello world, hello there. The capital of France is Paris. Is it? Yes.\n\n"
    "One sentence alone."
)


def laid_out(prompt, target, tokenizer=None, separator="", explain_only=None, level="token"):
    targets = target if isinstance(target, tuple) else (target,)
    words = encode_prompt(prompt, tokenizer, MANY)
    answers = [encode_target(each, words, tokenizer, MANY, separator) for each in targets]
    return lay_out(words, answers, level, explain_only, is_text=tokenizer is not None)


def covered(layout):
    """Positions of the prompt and of each target that are a unit's or left out, in order."""
    pieces = [*layout.units, *layout.left_out]
    return sorted(
        (-1 if piece.branch is None else piece.branch, token)
        for piece in pieces
        for token in piece.tokens
    )


def read(layout):
    prompt = len(layout.prompt_ids)
    own = [
        (k, prompt + step)
        for k, target in enumerate(layout.target_ids)
        for step in range(len(target) - 1)
    ]
    return [*((-1, token) for token in range(prompt)), *own]


# --- tokens -------------------------------------------------------------------------------------


def test_every_token_before_the_last_target_is_a_unit():
    layout = laid_out([5, 12, 7], [9, 30])
    assert layout.prompt_ids == [5, 12, 7]
    assert layout.target_ids == [[9, 30]]
    assert (layout.text, layout.prompt_stop, layout.target_stops) == ("5 12 7 9 30", 6, [11])
    assert [unit.tokens for unit in layout.units] == [(0,), (1,), (2,), (3,)]
    assert [unit.part for unit in layout.units] == ["prompt", "prompt", "prompt", "target"]
    assert [unit.branch for unit in layout.units] == [None, None, None, 0]
    assert [(target.token, target.token_id) for target in layout.targets] == [(3, 9), (4, 30)]
    assert layout.left_out == []


def test_several_targets_stand_behind_the_same_prompt():
    layout = laid_out([5, 12], ([9, 30, 8], [7], [9, 30]))
    own = [(unit.tokens, unit.branch) for unit in layout.units if unit.part == "target"]
    assert own == [((2,), 0), ((3,), 0), ((2,), 2)]
    scored = [(target.branch, target.token, target.token_id) for target in layout.targets]
    assert scored == [(0, 2, 9), (0, 3, 30), (0, 4, 8), (1, 2, 7), (2, 2, 9), (2, 3, 30)]
    assert layout.text == "5 12 9 30 8 7 9 30"
    assert layout.target_stops == [11, 13, 18]
    assert covered(layout) == read(layout)


def test_spans_of_units_and_targets_lie_in_the_whole_text():
    layout = laid_out("The pay is 🤣", ("23 euros", "Paris. The"), sentencepiece(), " ")
    assert layout.text == "The pay is 🤣 23 euros Paris. The"
    for piece in (*layout.units, *layout.targets):
        assert piece.text == layout.text[piece.start : piece.stop]
    for k in (0, 1):
        mine = [target for target in layout.targets if target.branch == k]
        assert mine[0].start == [layout.prompt_stop, *layout.target_stops][k]
        assert mine[-1].stop == layout.target_stops[k]
    assert layout.left_out == [LeftOut("<s>", (0,), "special token")]


def test_special_tokens_in_the_target_are_targets_but_no_units():
    tokenizer = sentencepiece()
    layout = laid_out("Hello", "world</s> there", tokenizer, " ")
    ends = [t for t in layout.targets if t.token_id == tokenizer.eos_token_id]
    assert len(ends) == 1
    assert ends[0].token not in [unit.tokens[0] for unit in layout.units]
    assert layout.left_out[-1] == LeftOut("</s>", (ends[0].token,), "special token", 0)


@pytest.mark.parametrize("level", ["token", "sentence", "paragraph"])
def test_what_the_template_writes_is_left_out(level):
    messages = [{"role": "user", "content": "Hello world. The pay is 23 euros."}]
    layout = laid_out(messages, "hi there", chat(), level=level)
    prompt_units = [unit for unit in layout.units if unit.part == "prompt"]
    assert "".join(unit.text for unit in prompt_units) == "Hello world. The pay is 23 euros."
    listed = [(piece.text, piece.reason) for piece in layout.left_out if piece.branch is None]
    assert listed == [
        ("<|im_start|>", "special token"),
        ("user\n", "chat template"),
        ("<|im_end|>", "special token"),
        ("\n", "chat template"),
        ("<|im_start|>", "special token"),
        ("assistant\n", "chat template"),
    ]
    assert covered(layout) == read(layout)  # nothing is lost


def test_explain_only():
    everything = laid_out([5, 12, 7], [9, 30])
    some = laid_out([5, 12, 7], [9, 30], explain_only=[2, 0, 2])
    assert some.units == [everything.units[0], everything.units[2]]
    assert some.left_out == [
        LeftOut("12", (1,), "not in explain_only"),
        LeftOut("9", (3,), "not in explain_only", 0),
    ]
    sentence = laid_out(DOCUMENT, "23", byte_level(), explain_only=[1, 3], level="sentence")
    assert [unit.text.strip() for unit in sentence.units] == [
        "The notice period is four weeks.",
        "The capital of France is Paris.",
    ]
    assert covered(sentence) == read(sentence)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([4], ValueError, "unit index 4, but this input has 4 units, 0 to 3"),
        ([-1], ValueError, "unit index -1, but this input has 4 units"),
        ([], ValueError, "explain_only must name at least one unit"),
        ([1.0], TypeError, "explain_only must hold unit indices, got 1.0"),
        ([True], TypeError, "explain_only must hold unit indices, got True"),
    ],
)
def test_bad_indices_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        laid_out([5, 12, 7], [9, 30], explain_only=indices)


def test_a_prompt_of_special_tokens_is_refused():
    tokenizer = sentencepiece()
    with pytest.raises(ValueError, match="nothing to explain: all of its tokens are special"):
        laid_out([tokenizer.bos_token_id], [7], tokenizer)


# --- sentences and paragraphs -------------------------------------------------------------------


@pytest.mark.parametrize("level", ["sentence", "paragraph"])
def test_ids_without_a_text_have_no_sentences(level):
    message = f"granularity='{level}' needs text, but without a tokenizer the prompt is token ids"
    with pytest.raises(ValueError, match=message):
        laid_out([5, 12, 7], [9, 30], level=level)


def test_sentences_of_a_document():
    layout = laid_out(DOCUMENT, "23 euros", byte_level(), " ", level="sentence")
    prompt = [unit for unit in layout.units if unit.part == "prompt"]
    assert [unit.text.strip() for unit in prompt] == [
        "The pay per hour is 23 euros.",
        "The notice period is four weeks.",
        "Hello world, hello there.",
        "The capital of France is Paris.",
        "Is it?",
        "Yes.",
        "One sentence alone.",
    ]
    assert {unit.level for unit in prompt} == {"sentence"}
    assert "".join(unit.text for unit in prompt) == DOCUMENT
    assert [
        u.text.strip() for u in laid_out(DOCUMENT, "x", byte_level(), level="paragraph").units
    ] == [part.strip() for part in DOCUMENT.split("\n\n")]


def test_a_target_is_one_sentence_only_where_something_is_scored_after_it():
    layout = laid_out("Hello world.", "Yes. It is. The pay", byte_level(), " ", level="sentence")
    own = [unit for unit in layout.units if unit.part == "target"]
    assert [unit.text.strip() for unit in own][:2] == ["Yes.", "It is."]
    assert all(max(unit.tokens) < layout.targets[-1].token for unit in own)
    assert covered(layout) == read(layout)


KINDS = [byte_level, sentencepiece, unigram]
WORDS = ["Hello world", "The pay is 23", "你好", "مرحبا", "café", "e\u0301", "3.14", "x", "A. "]
MARKS = [". ", "? ", "! ", "\n\n", "\n", " ", "  ", "\t", "。", "؟ ", "שלום. ", "…", "\u2028"]
PIECES = st.sampled_from([*WORDS, *MARKS, "🤣", "👨\u200d👩\u200d👧"])
TEXTS = st.lists(PIECES, min_size=1, max_size=14).map("".join)


@given(kind=st.sampled_from(KINDS), level=st.sampled_from(list(DIVIDE)), text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_every_own_token_is_in_one_unit_and_offsets_are_exact(kind, level, text):
    layout = laid_out(text + "x", "23 euros", kind(), level=level)
    assert covered(layout) == read(layout)
    starts = [start for start, _ in DIVIDE[level](layout.text[: layout.prompt_stop])]
    for unit in layout.units:
        assert list(unit.tokens) == sorted(unit.tokens)
        if unit.start is None:
            continue
        assert layout.text[unit.start : unit.stop] == unit.text
        if unit.part == "target" or not unit.text.strip():
            continue
        # The first word of a unit stands in the segment that the unit is, and no word in the next.
        word = unit.start + len(unit.text) - len(unit.text.lstrip())
        last = unit.start + len(unit.text.rstrip()) - 1
        segment = max(place for place, start in enumerate(starts) if start <= word)
        if segment + 1 < len(starts) and last >= starts[segment + 1]:
            # Only a token that itself crosses the border may bring more along.
            crossing = [
                token
                for token in layout.tokens
                if token.start is not None
                and token.stop is not None
                and token.tokens[0] in unit.tokens
                and token.start < starts[segment + 1] < token.stop
            ]
            assert crossing


def test_a_space_before_a_word_belongs_to_the_word_s_sentence():
    """Byte-level tokens carry the space in front of their word."""
    layout = laid_out("It is. The pay is 23. The end.", "x", byte_level(), level="sentence")
    assert [unit.text for unit in layout.units] == ["It is.", " The pay is 23.", " The end."]


def test_no_sentence_mixes_prompt_and_target():
    layout = laid_out("The pay is", "23 euros. Yes", byte_level(), " ", level="sentence")
    assert [unit.part for unit in layout.units][:1] == ["prompt"]
    assert layout.units[0].text == "The pay is"
    assert {unit.branch for unit in layout.units if unit.part == "target"} == {0}


def test_sentences_of_several_targets_stay_apart():
    layout = laid_out(
        "The pay is", ("23 euros. Yes it", "four. No it is"), byte_level(), " ", level="sentence"
    )
    assert ("23 euros.", 0) in [(u.text.strip(), u.branch) for u in layout.units]
    assert ("four.", 1) in [(u.text.strip(), u.branch) for u in layout.units]
    assert covered(layout) == read(layout)


# --- what hierarchical starts from and divides --------------------------------------------------


def partition(units, layout):
    """The units hold every token of the layout's once."""
    held = [(unit.branch, token) for unit in units for token in unit.tokens]
    return sorted(held, key=str) == sorted(
        ((unit.branch, token) for unit in layout.tokens for token in unit.tokens), key=str
    )


def down(layout):
    """All units from the coarsest on, checking that each division holds the same tokens."""
    found, waiting = [], coarsest(layout)
    assert partition(waiting, layout)
    while waiting:
        unit = waiting.pop(0)
        found.append(unit)
        if unit.level != "token":
            parts = divided(unit, layout)
            assert len(parts) > 1 or parts[0].level == "token"
            assert tuple(token for part in parts for token in part.tokens) == unit.tokens
            assert {part.branch for part in parts} == {unit.branch}
            waiting += parts
    return found


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "levels"),
    [
        (DOCUMENT, byte_level, ["paragraph", "sentence", "token"]),
        ("The pay is 23. Hello there. Yes.", sentencepiece, ["sentence", "token"]),
        ("no structure " * 40, byte_level, ["chunk", "token"]),
        ([*range(3, 300)], None, ["chunk", "token"]),
        ([*range(3, 9)], None, ["token"]),
    ],
    ids=["paragraphs", "sentences", "text", "ids", "few ids"],
)
def test_the_largest_pieces_divide_down_to_tokens(prompt, tokenizer, levels):
    layout = laid_out(prompt, [5, 6, 7], tokenizer and tokenizer())
    found = down(layout)
    seen = [
        level
        for level in ("paragraph", "sentence", "chunk", "token")
        if any(u.level == level for u in found if u.part == "prompt")
    ]
    assert [level for level in seen if level in levels] == levels
    assert sorted(u.tokens for u in found if u.level == "token") == sorted(
        u.tokens for u in layout.tokens
    )


def test_units_left_out_of_explain_only_are_divided_into_nothing():
    layout = laid_out(DOCUMENT, "23", byte_level(), explain_only=[0, 1, 2, 20])
    assert partition(coarsest(layout), layout)
    assert len(layout.tokens) == 4
