"""Controls: what is checked when they are made, and the factor that each token gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from toy_tokenizers import byte_level, sentencepiece, unigram

from atman_triton.controls import (
    ControlledRow,
    ImageControl,
    TextControl,
    TokenControl,
    checked_controls,
    control_factors,
)
from atman_triton.tokens import encode_prompt, spans_of_encoding

TEXT = "soccer is fun"
SPANS = [None, (0, 6), (6, 9), (9, 10), (10, 13)]  # BOS, "soccer", " is", " ", "fun"
ROW = ControlledRow(5, SPANS, len(TEXT))


def factors(*controls, row=ROW, embeddings=None):
    def read():
        assert embeddings is not None, "embeddings are read only for a similarity"
        return embeddings

    return control_factors(controls, row, read).tolist()


# --- what they are made of ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TextControl(0, 3, -0.1), ValueError, "factor must be at least 0, got -0.1"),
        (lambda: TextControl(0, 3, math.nan), ValueError, "factor must be finite, got nan"),
        (lambda: TextControl(0, 3, math.inf), ValueError, "factor must be finite, got inf"),
        (lambda: TextControl(0, 3, "2"), TypeError, "factor must be a number, got '2'"),
        (lambda: TextControl(0, 3, True), TypeError, "factor must be a number, got True"),
        (lambda: TextControl(0, 0, 2), ValueError, "length must be at least 1, got 0"),
        (lambda: TextControl(-1, 3, 2), ValueError, "start must be at least 0, got -1"),
        (lambda: TextControl(0.0, 3, 2), TypeError, "start must be an int, got 0.0"),
        (lambda: TextControl(0, True, 2), TypeError, "length must be an int, got True"),
        (
            lambda: TextControl(0, 3, 2, "half"),
            ValueError,
            "overlap must be 'partial' or 'complete', got 'half'",
        ),
        (
            lambda: TextControl(0, 3, 2, similarity=0),
            ValueError,
            r"similarity must lie in \(0, 1\] or be None, got 0",
        ),
        (lambda: TokenControl(1, 2, similarity=1.1), ValueError, "similarity must lie in"),
        (lambda: TokenControl(1, 2, similarity="x"), TypeError, "similarity must be a number"),
        (lambda: TokenControl(-1, 2), ValueError, "pos must be at least 0, got -1"),
        (lambda: TokenControl("1", 2), TypeError, "pos must be an int, got '1'"),
        (lambda: ImageControl(-0.1, 0, 1, 1, 2), ValueError, r"left must lie in \[0, 1\)"),
        (lambda: ImageControl(0, 1, 1, 1, 2), ValueError, r"top must lie in \[0, 1\)"),
        (lambda: ImageControl(0, 0, 0, 1, 2), ValueError, "width must be above 0"),
        (lambda: ImageControl(0, 0.5, 1, 0.6, 2), ValueError, "at most 0.5, got 0.6"),
        (lambda: ImageControl(0, 0, math.nan, 1, 2), ValueError, "width must be finite"),
        (lambda: ImageControl(0, 0, 1, 1, -2), ValueError, "factor must be at least 0"),
        (lambda: ImageControl(0, 0, 1, 1, 2, "all"), ValueError, "overlap must be"),
        (lambda: ImageControl(0, 0, 1, 1, 2, similarity=2), ValueError, "similarity must lie"),
    ],
)
def test_a_control_that_cannot_be_is_not_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_controls_are_values():
    control = TextControl(0, 6, 2, similarity=1)
    assert control == TextControl(0, 6, 2.0, "partial", similarity=1.0)
    assert len({control, TextControl(0, 6, 2.0, similarity=1.0)}) == 1
    with pytest.raises(AttributeError):
        control.factor = 3.0  # pyright: ignore[reportAttributeAccessIssue]
    assert ImageControl(0.7, 0, 0.3, 1, 2).width == 0.3  # 0.7 + 0.3 is a little above 1
    assert TokenControl(np.int64(3), np.float32(0.5)) == TokenControl(3, 0.5)  # pyright: ignore


def test_controls_are_a_sequence():
    control = TokenControl(1, 2)
    assert checked_controls("controls", (control,)) == [control]
    with pytest.raises(TypeError, match="put the one into a list"):
        checked_controls("controls", control)
    with pytest.raises(TypeError, match="must be a sequence of controls, got None"):
        checked_controls("controls", None)
    with pytest.raises(TypeError, match=r"controls\[1\] must be a TextControl, .* got 'text'"):
        checked_controls("controls", [control, "text"])


# --- the factors of tokens ----------------------------------------------------------------------


def test_a_token_gets_its_share_of_the_factor():
    # "r is": one of six characters, then all of " is"
    expected = [1.0, 1 + (3 - 1) / 6, 3.0, 1.0, 1.0]
    assert factors(TextControl(5, 4, 3.0)) == pytest.approx(expected)
    assert factors(TextControl(5, 4, 3.0, "complete")) == [1.0, 3.0, 3.0, 1.0, 1.0]
    # "is": the token's space stands outside
    assert factors(TextControl(7, 2, 0.1)) == pytest.approx([1, 1, 1 - 0.9 * 2 / 3, 1, 1])
    assert factors(TextControl(7, 2, 0.1, "complete")) == pytest.approx([1, 1, 0.1, 1, 1])
    assert factors(TextControl(0, len(TEXT), 0.0)) == [1, 0, 0, 0, 0]
    assert factors(TextControl(0, 6, 1.0)) == [1.0] * 5


def test_tokens_that_share_a_character_all_get_the_factor():
    row = ControlledRow(3, [(0, 1), (0, 1), (1, 3)], 3)
    assert factors(TextControl(0, 2, 0.5), row=row) == [0.5, 0.5, 0.75]


def test_a_token_control_counts_special_tokens():
    assert factors(TokenControl(0, 4.0)) == [4, 1, 1, 1, 1]
    assert factors(TokenControl(4, 0.0)) == [1, 1, 1, 1, 0]


def test_factors_of_several_controls_multiply():
    assert factors(TokenControl(1, 0.5), TextControl(0, 6, 3.0)) == [1, 1.5, 1, 1, 1]
    assert factors() == [1.0] * 5


@pytest.mark.parametrize(
    ("control", "row", "message"),
    [
        (TokenControl(5, 2), ROW, "stands outside the prompt; pos must be at most 4"),
        (TextControl(10, 4, 2), ROW, "ends at character 14, but the text of the prompt has 13"),
        (TextControl(3, 1, 2), ControlledRow(2, [None, (0, 3)], None), "takes in no token"),
        (TextControl(0, 1, 2), ControlledRow(2, "it is unknown.", None), "but it is unknown."),
        (ImageControl(0, 0, 1, 1, 2), ROW, "needs an image in the prompt"),
    ],
)
def test_a_control_without_its_tokens_is_refused(control, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        factors(control, row=row)
    assert type(control).__name__ in str(caught.value)


# --- similar tokens -----------------------------------------------------------------------------

# Cosines with token 1: 0.6 of token 2, 1 of token 3 (twice as long), 0 of token 4, -1 of token 0.
VECTORS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [2.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("factor", [0.1, 0.0, 3.0])
def test_similar_tokens_are_taken_along(factor):
    more = factor - 1
    found = factors(TokenControl(1, factor, similarity=0.5), embeddings=VECTORS)
    assert found == pytest.approx([1, factor, 1 + 0.6 * more, factor, 1])
    found = factors(TokenControl(1, factor, similarity=0.7), embeddings=VECTORS)
    assert found == pytest.approx([1, factor, 1, factor, 1])


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_the_strongest_of_what_reaches_a_token_wins(factor):
    # Tokens 3 (wholly) and 4 (for a third) are inside; token 2 has 0.6 with 3 and 0.8 with 4.
    for threshold, second in ((0.5, 0.6), (0.7, 0.8 / 3)):
        control = TextControl(9, 2, factor, similarity=threshold)
        found = factors(control, embeddings=VECTORS)
        shares = [0.0, 1.0, second, 1.0, 1 / 3]
        assert found == pytest.approx([1 + (factor - 1) * share for share in shares])
        # What two controls give multiplies all the same.
        both = factors(control, TokenControl(1, 0.5), embeddings=VECTORS)
        assert both == pytest.approx([found[0], 0.5 * found[1], *found[2:]])


def test_a_token_without_embedding_is_similar_to_nothing():
    found = factors(TokenControl(1, 0.1, similarity=0.5), embeddings=torch.zeros(5, 2))
    assert found == pytest.approx([1, 0.1, 1, 1, 1])


def test_similar_tokens_agree_with_a_table_of_all_pairs():
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(40, 3, generator=generator)
    spans = [(2 * index, 2 * index + 2) for index in range(40)]
    row = ControlledRow(40, spans, 80)
    found = factors(TextControl(5, 20, 0.2, similarity=0.4), row=row, embeddings=vectors)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).double()
    share = torch.zeros(40, dtype=torch.double)
    share[2], share[3:12], share[12] = 0.5, 1.0, 0.5
    reached = share[:, None] * torch.where(cosine >= 0.4, cosine, 0.0)
    expected = 1 - 0.8 * torch.maximum(share, reached.amax(0))
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert (expected < 1).sum() > 15


# --- places of tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(trim_offsets=False),
        byte_level(add_prefix_space=True),
        sentencepiece(),
        sentencepiece("legacy"),
        sentencepiece("gemma"),
        unigram(),
    ],
)
@pytest.mark.parametrize("text", ["The pay  per hour is 23 euros.", " héllo 👍 wörld\n\nQ: A "])
def test_an_encoding_tells_the_same_places_as_its_text(tokenizer, text):
    words = encode_prompt(text, tokenizer, 1000)
    spans = spans_of_encoding(tokenizer(text).encodings[0])
    assert spans[: len(words)] == words.spans
    assert all(span is None for span in spans[len(words) :])
