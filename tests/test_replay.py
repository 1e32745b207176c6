"""Any range of columns through a model's own forward: the logits of one whole pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import MODELS, VOCABULARY, in_float64, llama, plain_logits
from transformers import LlamaForCausalLM

from atman_triton.branches import Branches, TreeMask
from atman_triton.integration import run_as_atman
from atman_triton.prefix import PrefixStore
from atman_triton.replay import Replay

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84]
TARGET = (84, 62, 64)


def text(prompt=PROMPT, **more):
    return {"input_ids": torch.tensor([prompt])} | more


def run_in_pieces(model, replay, cuts, rows=1):
    """Logits of all columns, the last piece in several rows."""
    branches = replay.branches
    store = PrefixStore(branches.length)
    store.tree = None if branches.linear else TreeMask(branches, torch.device("cpu"))
    found, edges = [], [0, *cuts, branches.length]
    for start, stop in pairwise(edges):
        last = stop == branches.length
        store.tokens, store.recording = start, not last
        with torch.no_grad(), run_as_atman(model, None, "min_shift", store=store):
            found.append(replay.run(start, stop, rows if last else 1, None))
    return [part[row] for part in found for row in (range(rows) if part is found[-1] else (0,))]


@given(
    name=st.sampled_from(sorted(MODELS)),
    cuts=st.sets(st.integers(1, 11), max_size=4).map(sorted),
    rows=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_pieces_give_the_logits_of_the_whole(name, cuts, rows):
    model = in_float64(name)
    replay = Replay(model, text(), Branches(len(PROMPT), (TARGET,)))
    pieces = run_in_pieces(model, replay, cuts, rows)
    whole = plain_logits(model, [*PROMPT, 84, 62])
    for last in pieces[len(cuts) :]:
        found = torch.cat([*pieces[: len(cuts)], last])
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_branches_give_the_logits_of_each_alone(name):
    model, targets = in_float64(name), ((84, 62, 64), (7,), (84, 5, 9, 30))
    branches = Branches(len(PROMPT), targets)
    replay = Replay(model, text(), branches)
    for cuts in ([], [6], [10]):  # within the prompt, and at its end
        found = torch.cat(run_in_pieces(model, replay, cuts))
        for first, target in zip(branches.first_columns, targets, strict=True):
            alone = plain_logits(model, [*PROMPT, *target[:-1]])
            own = [*range(len(PROMPT)), *range(first, first + len(target) - 1)]
            torch.testing.assert_close(found[own], alone, rtol=1e-9, atol=1e-9)


def test_only_the_last_logits_are_computed_where_a_model_can():
    model, shapes = llama(), []
    hook = model.lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape[1]))
    replay = Replay(model, text(), Branches(len(PROMPT), (TARGET,)))
    with torch.no_grad(), run_as_atman(model, None, "min_shift", store=PrefixStore(12)):
        assert replay.run(0, 12, 2, 3).shape == (2, 3, VOCABULARY)
        assert replay.run(0, 12, 2, None).shape == (2, 12, VOCABULARY)
    hook.remove()
    assert shapes == [3, 12]


def test_plain_inputs_are_not_prepared_and_can_be_cut_anywhere():
    padding = torch.tensor([[0, 0, *[1] * 8]])
    for inputs in (text(), text(attention_mask=padding), text(position_ids=torch.arange(10)[None])):
        replay = Replay(llama(), inputs, Branches(len(PROMPT), (TARGET,)))
        assert not replay.prepared
        assert replay.length == 12
        assert [replay.closed_start(c) for c in range(13)] == list(range(13))
        assert [replay.closed_stop(c) for c in range(13)] == list(range(13))
        assert replay.padded == ("attention_mask" in inputs)
        assert replay.first_shown() == (2 if replay.padded else 0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs must hold input_ids of shape \[1, tokens\]"),
        ({"input_ids": PROMPT}, r"inputs must hold input_ids of shape \[1, tokens\]"),
        ({"input_ids": torch.ones(2, 10).long()}, r"shape \[1, tokens\]"),
        (text(PROMPT[:9]), "input_ids must hold the prompt's 10 tokens, got 9"),
    ],
)
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        Replay(llama(), inputs, Branches(len(PROMPT), (TARGET,)))


class FlatLogits(LlamaForCausalLM):
    """Gives one row of logits, as some wrappers do."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[:, -1]
        return output


def test_logits_of_another_shape_are_refused():
    model = llama(FlatLogits)
    replay = Replay(model, text(), Branches(len(PROMPT), (TARGET,)))
    with (
        pytest.raises(TypeError, match=r"FlatLogits must give logits \[rows, tokens, vocabulary\]"),
        run_as_atman(model, None, "min_shift"),
    ):
        replay.run(0, 12, 1, 3, cached=False)
