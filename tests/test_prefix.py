"""Keys and values in front: written once, read in place, and what a model's cache says of them."""

from __future__ import annotations

import pytest
import torch

from atman_triton.masks import AttentionMask
from atman_triton.prefix import PrefixCache, PrefixStore

HEADS, DIM, VALUE_DIM, S = 2, 4, 6, 7


def columns(start, stop, rows=1):
    """Keys and values that tell their column."""
    place = torch.arange(start, stop, dtype=torch.float32)[:, None]
    return (
        place.expand(rows, HEADS, -1, DIM).clone(),
        (10 * place).expand(rows, HEADS, -1, VALUE_DIM).clone(),
    )


def causal(keys):
    return AttentionMask(keys, 0, 0, causal=True)


def recorded(cuts):
    store = PrefixStore(S)
    store.recording = True
    for start, stop in cuts:
        store.tokens = start
        key, value, prefix = store.around(0, *columns(start, stop), causal(stop))
        assert prefix is None
        assert key[0, 0, :, 0].tolist() == list(range(stop))  # what came before, and its own
        assert value[0, 0, :, 0].tolist() == [10 * place for place in range(stop)]
    store.recording = False
    return store


@pytest.mark.parametrize("cuts", [[(0, 7)], [(0, 3), (3, 7)], [(0, 1), (1, 2), (2, 7)]])
def test_what_was_recorded_is_read_in_place(cuts):
    store = recorded(cuts)
    seen = set()
    for tokens in (1, 4, 6):
        store.tokens = tokens
        own = columns(tokens, S, rows=3)
        key, value, prefix = store.around(0, *own, causal(S))
        assert key is own[0] and value is own[1]
        assert prefix is not None
        assert [part.shape for part in prefix] == [
            (1, HEADS, tokens, DIM),
            (1, HEADS, tokens, VALUE_DIM),
        ]
        assert prefix[0][0, 0, :, 0].tolist() == list(range(tokens))
        seen.add((prefix[0].data_ptr(), prefix[1].data_ptr()))
    assert len(seen) == 1  # always the same memory


def test_a_run_from_the_first_token_has_no_prefix():
    store = recorded([(0, 7)])
    own = columns(0, S)
    assert store.around(0, *own, causal(S)) == (*own, None)


def test_perturbations_write_nothing():
    store = recorded([(0, 7)])
    store.tokens = 3
    store.around(0, torch.full((2, HEADS, 4, DIM), -1.0), torch.zeros(2, HEADS, 4, 6), causal(S))
    store.tokens = 6
    _, _, prefix = store.around(0, *columns(6, 7), causal(S))
    assert prefix is not None
    assert prefix[0][0, 0, :, 0].tolist() == list(range(6))


def test_every_layer_has_its_own():
    store = PrefixStore(S)
    assert store.bytes() == 0
    store.recording = True
    for layer in (0, 2):
        key, value = columns(0, S)
        store.around(layer, key + layer, value.double(), causal(S))
    assert store.bytes() == 2 * HEADS * S * (4 * DIM + 8 * VALUE_DIM)
    store.recording, store.tokens = False, 5
    for layer in (0, 2):
        _, _, prefix = store.around(layer, *columns(5, 7), causal(S))
        assert prefix is not None
        assert prefix[0][0, 0, 0, 0] == layer


def _dense(rows, sees):
    return torch.tensor([[sees(row, column) for column in range(S)] for row in rows])[None, None]


@pytest.mark.parametrize(
    ("mask", "ahead"),
    [
        (AttentionMask(S, 0, 0, causal=True), False),
        (AttentionMask(S, 0, 0, causal=True, window=2), False),
        (AttentionMask(S, 0, 0, causal=False), True),
        (AttentionMask(S, 0, 0, dense=_dense(range(S), lambda row, column: column <= row)), False),
        (AttentionMask(S, 0, 3, dense=_dense(range(3, S), lambda row, col: col <= row)), False),
        (AttentionMask(S, 0, 3, dense=_dense(range(3, S), lambda row, col: col <= row + 1)), True),
        (
            AttentionMask(S, 0, 0, dense=_dense(range(S), lambda row, col: (row, col) == (2, 3))),
            True,
        ),
    ],
)
def test_rows_that_look_ahead_are_noticed(mask, ahead):
    store = PrefixStore(S)
    store.recording = True
    store.around(0, *columns(0, S), mask)
    assert store.looks_ahead == ahead
    store.around(1, *columns(0, S), causal(S))
    assert store.looks_ahead == ahead  # one layer is enough


def test_a_model_is_told_of_the_prefix_and_gets_its_own_back():
    cache = PrefixCache(5, layers=3)
    assert len(cache) == 3
    for layer in range(3):
        assert cache.get_seq_length(layer) == 5
        assert cache.get_mask_sizes(4, layer) == (9, 0)
        own = columns(5, 9)
        assert all(a is b for a, b in zip(cache.update(*own, layer), own, strict=True))
        assert cache.get_seq_length(layer) == 5  # it keeps nothing
    assert not any(cache.is_sliding)
