"""Prompts and targets as ids with exact places in the text, for every kind of tokenizer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from toy_tokenizers import byte_level, chat, sentencepiece, unigram
from transformers import ByT5Tokenizer

from atman_triton.tokens import SPECIAL, TEMPLATE, border, encode_prompt, encode_target

MANY = 10**6  # a vocabulary that holds every id

LOSSLESS = {
    "byte-level": byte_level(),
    "byte-level-untrimmed": byte_level(trim_offsets=False),
    "byte-level-prefix": byte_level(add_prefix_space=True),
    "llama": sentencepiece("first"),
    "llama-always": sentencepiece("always"),
    "llama-legacy": sentencepiece("legacy"),
    "gemma": sentencepiece("gemma"),
    "slow": ByT5Tokenizer(),
}
TOKENIZERS = LOSSLESS | {"unigram": unigram()}

every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)

texts = st.text(alphabet=st.sampled_from("ab Thepay\n\t23:.,(é日🤣👍🏽ﬁ<"), min_size=1, max_size=14)


def whole(tokenizer, text):
    """Ids of a text as the tokenizer gives them by default, no closing token."""
    ids = tokenizer(text).input_ids
    closes = tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closes else ids


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@every_tokenizer
@given(text=texts)
@settings(max_examples=25, deadline=None)
def test_prompt_ids_are_the_tokenizers_own(name, text):
    tokenizer = TOKENIZERS[name]
    if not whole(tokenizer, text):
        return
    assert encode_prompt(text, tokenizer, MANY).ids == whole(tokenizer, text)


@pytest.mark.parametrize("name", LOSSLESS)
@given(prompt=texts, target=texts, separator=st.sampled_from(["", " "]))
@settings(max_examples=60, deadline=None)
def test_target_continues_the_prompt_exactly(name, prompt, target, separator):
    tokenizer = LOSSLESS[name]
    words = encode_prompt(prompt, tokenizer, MANY)
    answer = encode_target(target, words, tokenizer, MANY, separator)
    both = decoded(tokenizer, words.ids + answer.ids)
    assert both == decoded(tokenizer, words.ids) + separator + target
    assert answer.text == separator + target
    assert words.ids == whole(tokenizer, prompt)  # whatever the target


@every_tokenizer
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Q: What is the pay per hour? A:", " 23"),
        ("The capital of France is", " Paris."),
        ("def f(x):\n    return", "\n\nreturn x"),
    ],
)
def test_target_has_the_ids_it_has_in_the_whole_text(name, prompt, text):
    tokenizer = TOKENIZERS[name]
    words = encode_prompt(prompt, tokenizer, MANY)
    answer = encode_target(text, words, tokenizer, MANY, "")
    assert words.ids + answer.ids == whole(tokenizer, prompt + text)


def test_target_gets_no_special_tokens():
    tokenizer = sentencepiece()
    words = encode_prompt("Hello", tokenizer, MANY)
    answer = encode_target("world", words, tokenizer, MANY, " ")
    assert words.ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in answer.ids


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("Q: pay? A:", "23", " "),
        ("Q: pay? A:", "$23", " "),
        ("Q: pay? A:", " 23", ""),
        ("Q: pay? A: ", "23", ""),
        ("Q: pay?\n", "23", ""),
        ("f(", "x)", ""),
        ('He said "', "no", ""),
        ('He said "no"', "twice", " "),
        ("Hello", ", world", ""),
        ("日本の首都は", "東京", ""),
        ("서울은", "도시", " "),
        ("A:", [1, 2], ""),
        (byte_level()("Q: pay? A:").input_ids, "23", " "),
        (byte_level()("f(").input_ids, "x)", ""),
        (byte_level()("Q: pay?\n", return_tensors="pt"), "23", ""),
        ([{"role": "user", "content": "Hi"}], "Hello", ""),
    ],
)
def test_border(prompt, target, expected):
    is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
    words = encode_prompt(prompt, chat() if is_chat else byte_level(), MANY)
    assert border(prompt, words, target) == expected


# --- places in the text -------------------------------------------------------------------------


def token_bytes(tokenizer, token_id):
    """The UTF-8 bytes a byte-level or sentencepiece token stands for, from its spelling."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in printable]
        spelling = {chr(byte): byte for byte in printable}
        spelling |= {chr(256 + rank): byte for rank, byte in enumerate(rest)}
        return bytes(spelling[character] for character in token)
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def exact_spans(tokenizer, text, ids):
    """Spans by counting bytes: the characters that a token's bytes touch."""
    of_byte = [index for index, character in enumerate(text) for _ in character.encode()]
    pieces = [token_bytes(tokenizer, token_id) for token_id in ids]
    position = len(of_byte) - sum(map(len, pieces))  # a space put in front makes it negative
    spans = []
    for piece in pieces:
        touched = [of_byte[at] for at in range(position, position + len(piece)) if at >= 0]
        spans.append((touched[0], touched[-1] + 1) if touched else None)
        position += len(piece)
    return spans


@pytest.mark.parametrize(
    "name",
    [
        "byte-level",
        "byte-level-untrimmed",
        "byte-level-prefix",
        "llama",
        "llama-always",
        "llama-legacy",
        "gemma",
    ],
)
@given(text=texts)
@settings(max_examples=60, deadline=None)
def test_spans_are_the_characters_a_token_holds(name, text):
    tokenizer = LOSSLESS[name]
    words = encode_prompt(text, tokenizer, MANY)
    own = [index for index, why in enumerate(words.reasons) if why is None]
    exact = exact_spans(tokenizer, text, [words.ids[index] for index in own])
    for index, span in zip(own, exact, strict=True):
        if span is not None:  # the space put in front has no place of its own
            assert words.spans[index] == span
            assert words.names[index] == text[span[0] : span[1]]


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_spans_of_ids_agree_with_spans_of_text(name, text):
    tokenizer = LOSSLESS[name]
    words = encode_prompt(text, tokenizer, MANY)
    again = encode_prompt(words.ids, tokenizer, MANY)
    assert again.ids == words.ids
    assert again.text == decoded(tokenizer, words.ids)
    shift = len(again.text) - len(text)  # BOS and a space put in front stand in the decoded text
    for index, (span, other) in enumerate(zip(words.spans, again.spans, strict=True)):
        if words.reasons[index] is None and index > 1:
            assert other is not None
            assert span == (other[0] - shift, other[1] - shift)


def test_spans_of_a_target_given_as_ids():
    tokenizer = sentencepiece("legacy")
    words = encode_prompt("The pay is", tokenizer, MANY)
    answer = encode_target("23 🤣", words, tokenizer, MANY, " ")
    again = encode_target(answer.ids, words, tokenizer, MANY, "")
    assert (again.text, again.spans) == (" 23 🤣", answer.spans)
    assert again.spans[-4:] == [(4, 5)] * 4  # one emoji of four byte tokens


def test_ids_without_a_tokenizer_are_their_own_text():
    words = encode_prompt([5, 12, 7], None, MANY)
    answer = encode_target([9, 30], words, None, MANY, "")
    assert (words.text, words.spans) == ("5 12 7", [(0, 1), (2, 4), (5, 6)])
    assert (answer.text, answer.spans) == (" 9 30", [(1, 2), (3, 5)])
    assert words.reasons == [None] * 3


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        torch.tensor,
        lambda ids: torch.tensor([ids]),
        lambda ids: torch.tensor(ids).numpy(),
        lambda ids: {"input_ids": ids},
        lambda ids: {"input_ids": [[0, *ids]], "attention_mask": [[0, *(1 for _ in ids)]]},
        lambda ids: {"input_ids": [*ids, 0], "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        lambda ids: {
            "input_ids": [[0, *ids]],
            "attention_mask": [[False, True, True, True]],
            "position_ids": [[1, 0, 1, 2]],
        },
    ],
    ids=["list", "tuple", "tensor", "row", "array", "encoding", "left", "right", "positions"],
)
def test_prompt_ids_in_every_form(convert):
    assert encode_prompt(convert([5, 12, 7]), None, MANY).ids == [5, 12, 7]


def test_what_a_tokenizer_returns_is_a_prompt():
    tokenizer = sentencepiece()
    encoding = tokenizer("Hello world", return_tensors="pt")
    words = encode_prompt(encoding, tokenizer, MANY)
    assert words.ids == tokenizer("Hello world").input_ids


# --- special tokens and chat --------------------------------------------------------------------


def test_special_tokens_are_marked():
    words = encode_prompt("Hello</s> world", sentencepiece(), MANY)
    marked = [name for name, why in zip(words.names, words.reasons, strict=True) if why == SPECIAL]
    assert marked == ["<s>", "</s>"]


@pytest.mark.parametrize("name", ["llama", "unigram"])
def test_a_closing_token_that_the_user_typed_is_kept(name):
    tokenizer = TOKENIZERS[name]
    words = encode_prompt("Hello</s>", tokenizer, MANY)
    assert words.ids.count(tokenizer.eos_token_id) == 1
    assert words.reasons[-1] == SPECIAL


def test_the_unknown_token_is_the_users_own_text():
    words = encode_prompt("Hello 日", unigram(), MANY)
    assert words.names[-1] == "日"
    assert words.reasons[-1] is None


MESSAGES = [
    {"role": "system", "content": "system"},
    {"role": "user", "content": "  Hello world. assistant?\n"},
]


def test_chat_contents_are_marked_off_from_the_template():
    words = encode_prompt(MESSAGES, chat(), MANY)
    assert words.text == (
        "<|im_start|>system\nsystem<|im_end|>\n<|im_start|>user\nHello world. assistant?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    own = "".join(n for n, why in zip(words.names, words.reasons, strict=True) if why is None)
    assert own == "systemHello world. assistant?"
    starts = [s[0] for s, why in zip(words.spans, words.reasons, strict=True) if s and why is None]
    assert starts[0] == words.text.index("\nsystem") + 1  # the content, not the role
    special = {n for n, why in zip(words.names, words.reasons, strict=True) if why == SPECIAL}
    assert special == {"<|im_start|>", "<|im_end|>"}
    assert TEMPLATE in words.reasons
    rendered: Any = chat().apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert words.ids == rendered["input_ids"]


def test_chat_with_parts():
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world"}]
    tokenizer = chat()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}"
            "{% endfor %}"
        )
        words = encode_prompt([{"role": "user", "content": parts}], tokenizer, MANY)
    finally:
        tokenizer.chat_template = template
    own = [n for n, why in zip(words.names, words.reasons, strict=True) if why is None]
    assert "".join(own) == "Helloworld"


def test_chat_template_that_depends_on_the_content_is_searched():
    tokenizer = chat()
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] | length }}:{{ m['content'] }};{% endfor %}"
        )
        words = encode_prompt([*MESSAGES[:1], {"role": "user", "content": "Hi"}], tokenizer, MANY)
    finally:
        tokenizer.chat_template = template
    own = [n for n, why in zip(words.names, words.reasons, strict=True) if why is None]
    assert (words.text, "".join(own)) == ("6:system;2:Hi;", "systemHi")


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "message"),
    [
        ("", byte_level(), "prompt must not be empty."),
        ([], byte_level(), "prompt must not be empty."),
        ("Hello", None, "a str prompt needs a tokenizer, got None"),
        (MESSAGES, None, "chat messages needs a tokenizer, got None"),
        (MESSAGES, byte_level(), "has no chat template"),
        ([{"role": "user", "content": ""}], chat(), "prompt must not be empty: no message"),
        ([{"content": "Hi"}], chat(), r"prompt\[0\] must have a 'role' and a 'content'"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            chat(),
            r"prompt\[0\] holds something that is not text",
        ),
        ([[1, 2], [3, 4]], None, "prompt must be one row of token ids"),
        ([1, 7, MANY], None, "prompt holds token id 1000000, but the model knows ids 0 to 999999"),
        ([1, -1], None, "prompt holds token id -1"),
        ({"attention_mask": [1]}, None, "prompt must hold input_ids"),
        ({"input_ids": [1], "attention_mask": [0]}, None, "its attention_mask hides every token"),
        ({"input_ids": [1], "pixel_values": [0]}, None, "text alone, but it holds pixel_values"),
        (
            {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]},
            None,
            r"attention_mask must be one block of ones .*, got \[1, 0, 1\]",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [0.5, 1]},
            None,
            r"attention_mask must be one block of ones .*, got \[0.5, 1.0\]",
        ),
        (
            {"input_ids": [5, 6, 7], "attention_mask": [1, 1]},
            None,
            "attention_mask must have one value for each of the 3 input_ids, got 2",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": torch.ones(1, 1, 2, 2)},
            None,
            r"attention_mask must have one value for each of the 2 input_ids, got 4",
        ),
        (
            {"input_ids": [5, 6, 7], "position_ids": [0, 2, 3]},
            None,
            r"position_ids must be 0 to 2 .*, got \[0, 2, 3\]",
        ),
        (
            {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "position_ids": [0, 1, 2]},
            None,
            r"position_ids must be 0 to 1 .*, got \[1, 2\]",
        ),
        (
            {"input_ids": [5, 6, 7], "position_ids": [[0, 1]]},
            None,
            "position_ids must have one value for each of the 3 input_ids, got 2",
        ),
        (
            {"input_ids": [5, 6], "attention_mask": [[1], [1, 1]]},
            None,
            "attention_mask must have one value for each of the 2 input_ids",
        ),
    ],
)
def test_bad_prompts_are_refused(prompt, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, tokenizer, MANY)


@pytest.mark.parametrize("prompt", [5, 1.5, None, [1.5], [True], ["Hello"], torch.tensor([0.5])])
def test_prompts_of_other_types_are_refused(prompt):
    with pytest.raises(TypeError, match="prompt must"):
        encode_prompt(prompt, byte_level(), MANY)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("", ValueError, "target must not be empty."),
        ([], ValueError, "target must not be empty."),
        ([MANY], ValueError, "target holds token id 1000000"),
        (3, TypeError, "target must be a str or token ids, got int"),
    ],
)
def test_bad_targets_are_refused(target, error, message):
    words = encode_prompt("Hello", byte_level(), MANY)
    with pytest.raises(error, match=message):
        encode_target(target, words, byte_level(), MANY, " ")


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="is this the model's tokenizer"):
        encode_prompt("Hello world", byte_level(), 3)


def test_a_target_that_cannot_be_told_apart_is_refused():
    words = encode_prompt("日本の", unigram(), MANY)  # unknown characters fuse with the target's
    with pytest.raises(ValueError, match="cannot be tokenised apart from the prompt"):
        encode_target("東京", words, unigram(), MANY, "")
