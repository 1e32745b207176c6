"""Where the tokens of a prompt and its targets stand, and what they see of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atman_triton.branches import Branches, TreeMask
from atman_triton.masks import AttentionMask

CPU = torch.device("cpu")
TARGETS = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5
).map(tuple)


def alone(branches, k):
    """The columns that hold the prompt and one target, in the order of its own sequence."""
    first = branches.first_columns[k]
    return [
        *range(branches.prompt_tokens),
        *range(first, first + len(branches.targets[k]) - 1),
    ]


@given(prompt=st.integers(1, 6), targets=TARGETS)
@settings(max_examples=80, deadline=None)
def test_every_target_finds_its_own_sequence(prompt, targets):
    branches = Branches(prompt, targets)
    read = [0] * prompt + branches.read_ids
    assert branches.length == len(read) == prompt + sum(len(t) - 1 for t in targets)
    assert len(branches.positions) == len(branches.owners) == branches.length
    scored = iter(zip(branches.predictors, branches.scored_ids, strict=True))
    for k, target in enumerate(targets):
        columns = alone(branches, k)
        # Read in order, at the positions that they would have without the others.
        assert [read[c] for c in columns[prompt:]] == list(target[:-1])
        assert [branches.positions[c] for c in columns] == list(range(len(columns)))
        assert {branches.owners[c] for c in columns[prompt:]} <= {k}
        # Each token is predicted where the one before it is read.
        assert [next(scored) for _ in target] == list(
            zip(columns[prompt - 1 :], target, strict=True)
        )
        inside = range(len(columns))
        assert branches.columns(k, inside) == columns
    assert branches.columns(None, range(prompt)) == list(range(prompt))
    assert branches.owners[:prompt] == [-1] * prompt
    assert next(scored, None) is None


def test_targets_of_one_token_add_no_columns():
    branches = Branches(4, ((5,), (6,), (5,)))
    assert branches.length == 4
    assert branches.linear
    assert branches.predictors == [3, 3, 3]
    assert branches.scored_ids == [5, 6, 5]


@pytest.mark.parametrize(
    ("targets", "linear"),
    [
        (((1, 2, 3),), True),
        (((1,), (1, 2, 3), (4,)), True),
        (((1, 2), (3, 4)), False),
        (((1, 2), (1, 2)), False),
    ],
)
def test_a_tree_is_needed_for_several_longer_targets(targets, linear):
    assert Branches(3, targets).linear == linear


@given(
    prompt=st.integers(1, 6),
    targets=TARGETS,
    window=st.none() | st.integers(1, 6),
    causal=st.booleans(),
    hidden=st.integers(0, 4),
    start=st.integers(0, 6),
)
@settings(max_examples=120, deadline=None)
def test_a_branch_sees_what_it_would_see_alone(prompt, targets, window, causal, hidden, start):
    """Visibility of every row behind the prompt, against a model's rule on the branch alone."""
    branches = Branches(prompt, targets)
    columns, hidden, start = branches.length, min(hidden, prompt - 1), min(start, prompt)
    padding = None
    if hidden:
        padding = (torch.arange(columns) >= hidden)[None]
    mask = AttentionMask(columns, 0, start, causal, window, padding)
    if columns == prompt:
        return
    made = TreeMask(branches, CPU).of_branches(mask, start)
    assert made.key_tokens == columns
    assert made.dense.shape[-2:] == (columns - prompt, columns)
    expected = torch.zeros(columns - prompt, columns, dtype=torch.bool)
    for k in range(len(targets)):
        own = alone(branches, k)
        for row in range(prompt, len(own)):
            for place, column in enumerate(own):
                distance = row - place
                seen = place >= hidden and (not causal or distance >= 0)
                if window is not None:
                    seen = seen and (distance if causal else abs(distance)) < window
                expected[own[row] - prompt, column] = seen
    assert torch.equal(made.dense[0, 0], expected)


def test_a_dense_mask_is_read_at_positions():
    """Chunks of three positions, as Llama 4 has them: the rows count from column ``start``."""
    branches = Branches(4, ((7, 8, 9), (7, 5, 6)))
    places = torch.arange(branches.length)
    chunks = places[:, None] // 3 == places[None] // 3
    dense = (chunks & (places[:, None] >= places[None]))[None, None]
    for start in (0, 2, 4):
        mask = AttentionMask(branches.length, 0, start, dense=dense[:, :, start:])
        seen = TreeMask(branches, CPU).of_branches(mask, start).dense[0, 0]
        # Positions 4 and 5 of both branches share a chunk with position 3 of the prompt.
        assert seen.tolist() == [
            [False, False, False, True, True, False, False, False],
            [False, False, False, True, True, True, False, False],
            [False, False, False, True, False, False, True, False],
            [False, False, False, True, False, False, True, True],
        ]


def test_the_mask_of_one_layer_type_is_not_that_of_another():
    tree = TreeMask(Branches(3, ((1, 2, 3), (4, 5, 6))), CPU)
    wide = tree.of_branches(AttentionMask(7, 0, 3, True), 3)
    narrow = tree.of_branches(AttentionMask(7, 0, 3, True, 2), 3)
    padding = torch.tensor([[False, True, True, True, True, True, True]])
    padded = tree.of_branches(AttentionMask(7, 0, 3, True, None, padding), 3)
    again = tree.of_branches(AttentionMask(7, 0, 3, True), 3)
    assert not torch.equal(wide.dense, narrow.dense)
    assert not torch.equal(wide.dense, padded.dense)
    assert torch.equal(wide.dense, again.dense)
