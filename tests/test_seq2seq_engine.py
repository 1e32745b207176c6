"""The engine of encoder-decoders: the numbers of whole forwards, and every saving really made.

Legend: U units, K targets, M scored tokens, P prompt tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seq2seq_models import (
    MODELS,
    TEXT,
    VOCABULARY,
    inputs_of,
    plain_logprobs,
    sizes_of,
    start_of,
)

from atman_triton import layers, memory
from atman_triton.engine import undisturbed
from atman_triton.integration import UnsupportedModelError
from atman_triton.perturbations import SAVINGS, RunFailed, Settings, Unit
from atman_triton.seq2seq.engine import Seq2SeqEngine
from atman_triton.seq2seq.lanes import Lane, lanes_of

TARGETS = [[5, 9, 11], [7], [84, 5]]
ATTENTION = ["encoder", "cross", "both"]
STEP = torch.finfo(torch.float32).eps


def started(name, targets=TARGETS, padded=0, inputs=None, **changes):
    model = MODELS[name]()
    chosen = Settings(**{"factor": 0.1, "mode": "min_shift"} | changes)
    with undisturbed(model):
        return Seq2SeqEngine(model, inputs or inputs_of(name, padded), targets, chosen)


def perturbed(run, units, effect="total"):
    with undisturbed(run.model):
        return run.perturb(units, effect)


def every_unit(name, targets=TARGETS, padded=0):
    """All single tokens, some larger pieces, and those of the targets."""
    prompt = sum(sizes_of(name, padded).values())
    units = [Unit((place,)) for place in range(prompt)] + [Unit((0, 1)), Unit((2, prompt - 2))]
    for k, target in enumerate(targets):
        units += [Unit((prompt + place,), k) for place in range(len(target) - 1)]
    return units


def rows_by_source(name, unit, target, factor, padded=0):
    """What a unit does to each source: ``{source: [tokens]}``."""
    sizes = sizes_of(name, padded)
    row = torch.ones(sum(sizes.values()) + len(target) - 1)
    row[list(unit.positions)] = factor
    return split(name, row, padded)


def split(name, row, padded=0):
    sizes = sizes_of(name, padded)
    sizes["decoder"] = len(row) - sum(sizes.values()) + sizes["decoder"]
    return dict(zip(sizes, row.split(list(sizes.values())), strict=True))


def plain(name, units, effect="total", targets=TARGETS, padded=0, **chosen):
    """A plain loop: ``[U, M]``, NaN where a unit is not read before the scored token."""
    if effect == "direct":
        chosen["attention"] = "cross"
    settings = tuple(sorted(chosen.items()))
    return torch.stack(
        [
            torch.cat(
                [_line(name, u, k, tuple(t), padded, settings) for k, t in enumerate(targets)]
            )
            for u in units
        ]
    )


@cache
def _line(name, unit, k, target, padded, chosen):
    """One whole forward, for a unit and a target: ``[T]``; the same for several tests."""
    if unit.branch not in (None, k):
        return torch.full((len(target),), torch.nan)
    rows = rows_by_source(name, unit, target, 0.1, padded)
    inputs, start = inputs_of(name, padded), start_of(name)
    found = plain_logprobs(MODELS[name](), inputs, start, list(target), rows, **dict(chosen))
    prompt = sum(sizes_of(name, padded).values())
    found[: max(0, max(unit.positions) - prompt + 1)] = torch.nan
    return found


def close(found, expected):
    """Equal but for rounding to float32, of what ran in float64."""
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=2 * STEP, atol=1e-9, equal_nan=True
    )


def base_of(name, targets=TARGETS, padded=0):
    model, inputs, start = MODELS[name](), inputs_of(name, padded), start_of(name)
    return torch.cat([plain_logprobs(model, inputs, start, target, {}) for target in targets])


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
def test_every_unit_is_that_of_a_plain_loop(name, attention):
    run, units = started(name, attention=attention), every_unit(name)
    base = base_of(name)
    close(run.base_logprobs, base)
    expected = plain(name, units, attention=attention)
    close(perturbed(run, units), expected)
    # It proves nothing unless every token that is a unit moves some target far beyond rounding.
    moved = (expected - base).abs().nan_to_num(0).amax(1)
    assert moved.min() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_direct_effect_is_that_of_cross_attention_alone(name):
    run, units = started(name), every_unit(name)
    assert run.shares_prefix
    found = perturbed(run, units, "direct")
    close(found, plain(name, units, "direct"))
    cross = perturbed(started(name, attention="cross"), units)
    torch.testing.assert_close(found, cross, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mode", ["multiplicative", "log_additive", "min_shift_full"])
@pytest.mark.parametrize("name", MODELS)
def test_every_mode(name, mode):
    units = every_unit(name)[::3]
    backend = "reference" if mode == "min_shift_full" else "auto"
    close(
        perturbed(started(name, mode=mode, backend=backend), units), plain(name, units, mode=mode)
    )


@pytest.mark.parametrize("effect", ["total", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_and_heads_are_passed_on(name, effect):
    units, chosen = every_unit(name)[::2], {"layers": (0,), "heads": (1,)}
    if name[:4] == "blip" and effect == "total":
        with pytest.raises(ValueError, match=r"wherever the image is read.*has 2 and 4 there"):
            perturbed(started(name, **chosen), units, effect)
        del chosen["heads"]
    found = perturbed(started(name, **chosen), units, effect)
    close(found, plain(name, units, effect, **chosen))
    assert not torch.allclose(found, perturbed(started(name), units, effect), equal_nan=True)


@pytest.mark.parametrize("effect", ["total", "direct"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_is_no_part_of_the_prompt(name, effect):
    units = every_unit(name, padded=3)
    image = sizes_of(name).get("image", 0)
    blank = [
        unit for unit in units if {image + len(TEXT), image + len(TEXT) + 1} & set(unit.positions)
    ]
    run = started(name, padded=3)
    found = perturbed(run, units, effect)
    close(found, plain(name, units, effect, padded=3))
    close(run.base_logprobs, base_of(name))
    still = perturbed(run, blank, effect)
    torch.testing.assert_close(still, run.base_logprobs.expand_as(still), rtol=0, atol=1e-6)


ids = st.integers(4, VOCABULARY - 1)


@given(
    name=st.sampled_from(sorted(MODELS)),
    mode=st.sampled_from(["min_shift", "multiplicative", "log_additive"]),
    attention=st.sampled_from(ATTENTION),
    effect=st.sampled_from(["total", "direct"]),
    size=st.integers(1, 7) | st.just("auto"),
    tokens=st.integers(1, 200),
    without=st.sets(st.sampled_from(SAVINGS)),
    targets=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_no_plan_and_no_saving_changes_a_number(
    name, mode, attention, effect, size, tokens, without, targets, data
):
    prompt, units = sum(sizes_of(name).values()), []
    if attention == "encoder":
        effect = "total"
    for branch in (None, *range(len(targets))):
        stop = prompt if branch is None else prompt + len(targets[branch]) - 1
        low = 0 if branch is None else prompt
        if stop > low:
            places = st.sets(st.integers(low, stop - 1), min_size=1, max_size=3)
            units += [
                Unit(tuple(places), branch) for places in data.draw(st.lists(places, max_size=3))
            ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "tokens_per_batch", lambda device: tokens)
        run = started(
            name,
            targets,
            mode=mode,
            attention=attention,
            batch_size=size,
            without=frozenset(without),
        )
        found = perturbed(run, units, effect)
    assert found.shape == (len(units), sum(map(len, targets)))
    if units:
        close(found, plain(name, units, effect, targets, mode=mode, attention=attention))


def test_equal_targets_and_starts_of_others_have_equal_scores():
    units = every_unit("bart")[:9]
    run = started("bart", [[5, 9, 11], [5], [5, 9], [5, 9, 11]])
    found = perturbed(run, units)
    whole = found[:, list(run.rows[0])]
    for k in (1, 2, 3):
        own = found[:, list(run.rows[k])]
        torch.testing.assert_close(own, whole[:, : own.shape[1]], rtol=0, atol=0)


# --- savings ------------------------------------------------------------------------------------


@contextmanager
def heard(name):
    """Rows of every pass of the encoders and of the decoder, and of their logits, while open."""
    model = MODELS[name]()
    if model.config.model_type == "blip":
        towers = [getattr(model, part, None) for part in ("vision_model", "text_encoder")]
    else:
        towers = [model.get_encoder()]
    head = getattr(model, "text_decoder", model)
    encoded, logits, hooks = [], [], []
    for tower in filter(None, towers):
        hooks.append(
            tower.register_forward_hook(
                lambda module, args, out: encoded.append(out.last_hidden_state.shape[0])
            )
        )
    hooks.append(
        head.get_output_embeddings().register_forward_hook(
            lambda module, args, out: logits.append(tuple(out.shape[:2]))
        )
    )
    try:
        yield encoded, logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("effect", ["total", "direct"])
@pytest.mark.parametrize("name", MODELS)
def test_the_encoder_runs_once_where_only_cross_attention_is_suppressed(name, effect):
    """But a question is encoded anew for every part of the image, with the tower's one state."""
    image = sizes_of(name).get("image", 0) if name == "blip_vqa" else 0
    with heard(name) as (encoded, _):
        run = started(name, attention="cross" if effect == "total" else "both")
        once = list(encoded)
        perturbed(run, [u for u in every_unit(name) if min(u.positions) >= image], effect)
        assert encoded == once == [1] * (len(sizes_of(name)) - 1)
        if image:
            perturbed(run, every_unit(name)[:image], effect)
            assert encoded == [*once, image]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_the_encoder_runs_once_for_the_base_and_once_per_unit(name):
    with heard(name) as (encoded, _):
        run = started(name)
        assert encoded == [1]
        prompt = sum(sizes_of(name).values())
        answer = [Unit((prompt,), 0), Unit((prompt,), 2)]
        perturbed(run, answer)
        assert encoded == [1]  # the answer's own tokens leave the encoder alone
        perturbed(run, every_unit(name)[:5])
        assert encoded == [1, 5]
    assert run.record.runners == ["shared_prefix", "full"]
    assert run.record.reasons == ["units are suppressed in the encoder, which runs again"]


def test_logits_only_where_a_target_is_scored():
    with heard("whisper") as (_, logits):
        run = started("whisper", [[5, 9, 11], [6]])
        assert logits == [(1, 1), (1, 3)] or logits == [(1, 3), (1, 3)]
        logits.clear()
        perturbed(run, every_unit("whisper")[:4])
        assert logits == [(4, 3)]
        assert run.record.logits == "target positions"
        logits.clear()
        run = started("whisper", [[5, 9, 11]], without=frozenset({"target_logits"}))
        perturbed(run, every_unit("whisper")[:4])
        assert logits[-1] == (4, 5)
        assert run.record.logits == "all positions"


def test_targets_of_one_token_read_one_softmax():
    with heard("t5") as (_, logits):
        run = started("t5", [[token] for token in range(5, 60)])
        perturbed(run, every_unit("t5")[:4])
        assert logits[1:] == [(1, 1), (4, 1)]


def test_one_encoder_pass_serves_all_targets():
    with heard("t5") as (encoded, logits):
        run = started("t5", [[5, 9, 11], [7], [84, 5]])
        perturbed(run, every_unit("t5", [])[:4])
        assert encoded == [1, 4]
        assert logits[1:] == [(2, 3), (8, 3)]  # two lanes for each of four units


def test_keys_of_the_encoder_are_read_in_place(monkeypatch):
    """One row of keys for all rows of queries: nothing is copied per perturbation."""
    shapes, real = [], layers.attention

    def noted(query, key, *args, **kwargs):
        shapes.append((query.shape[0], key.shape[0], key.shape[2]))
        return real(query, key, *args, **kwargs)

    run = started("bart", attention="cross")
    monkeypatch.setattr(layers, "attention", noted)
    perturbed(run, every_unit("bart")[:6])
    crossing = [shape for shape in shapes if shape[2] == len(TEXT)]
    assert crossing == [(12, 1, len(TEXT))] * 2  # two lanes of six units, two layers
    assert run.record.prefix_bytes == 2 * 2 * len(TEXT) * 16 * 8  # K and V, layers, E, D, float64


def test_what_each_run_costs():
    prompt = sum(sizes_of("t5").values())
    run = started("t5", [[5, 9, 11]])
    # the encoder and the start token, then the start token and the two tokens that are read
    assert run.record.tokens == 9 + 1 + 3
    perturbed(run, [Unit((0,)), Unit((4,)), Unit((prompt,), 0)])
    assert run.record.tokens == 13 + 2 * (9 + 3) + 3
    assert run.record.batch_sizes == [1, 1, 2, 1]
    assert run.record.runs == {"total": 3, "direct": 0}
    perturbed(run, [Unit((0,)), Unit((4,))], "direct")
    assert run.record.tokens == 13 + 27 + 2 * 3
    assert run.record.runs == {"total": 3, "direct": 2}


def test_progress_counts_the_tokens_that_are_run():
    said = {"expected": 0, "done": 0}
    model = MODELS["t5"]()
    with undisturbed(model):
        run = Seq2SeqEngine(
            model,
            inputs_of("t5"),
            TARGETS,
            Settings(0.1, "min_shift", batch_size=2),
            lambda tokens: said.update(expected=said["expected"] + tokens),
            lambda tokens: said.update(done=said["done"] + tokens),
        )
        run.perturb(every_unit("t5"))
        run.perturb(every_unit("t5"), "direct")
    assert said["expected"] == said["done"] == run.record.tokens


# --- memory -------------------------------------------------------------------------------------


@contextmanager
def little_memory(name, rows):
    """More decoder rows than this run out of memory."""
    model = MODELS[name]()
    decoder = getattr(getattr(model, "text_decoder", None), "bert", None) or model.get_decoder()
    tried = []

    def refuse(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        tried.append(len(ids))
        if len(ids) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = decoder.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        hook.remove()


@pytest.mark.parametrize("effect", ["total", "direct"])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_batches_are_halved_until_they_fit(name, effect):
    units = every_unit(name)
    with little_memory(name, 3) as tried:
        run = started(name)
        found = perturbed(run, units, effect)
    close(found, plain(name, units, effect))
    assert max(tried) > 3
    assert max(run.record.batch_sizes) <= 3


def test_one_unit_with_many_targets_is_cut_into_lanes():
    targets = [[5, 9], [6, 9], [7, 9], [8, 9]]
    with little_memory("t5", 1):
        run = started("t5", targets)
        found = perturbed(run, [Unit((2,))])
    close(found, plain("t5", [Unit((2,))], targets=targets))
    assert set(run.record.batch_sizes) == {1}


def test_a_batch_size_that_does_not_fit_is_refused():
    with little_memory("t5", 3):
        run = started("t5", [[5, 9]], batch_size=5)
        with pytest.raises(torch.OutOfMemoryError, match=r"batch_size 5 does not fit .*'auto'"):
            perturbed(run, every_unit("t5", [])[:8])


def test_nothing_fits():
    message = "not even one perturbation fits"
    with little_memory("t5", 0), pytest.raises(torch.OutOfMemoryError, match=message):
        started("t5")


def test_other_errors_are_passed_on():
    run = started("t5")
    decoder: Any = run.model.decoder
    hook = decoder.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perturbed(run, every_unit("t5")[:2])
    hook.remove()


# --- lanes --------------------------------------------------------------------------------------


def test_an_answer_is_scored_where_a_longer_one_is_read():
    targets = [[5, 9, 11], [7], [84, 5], [5, 2], [5, 9, 12, 1], [84, 6, 3]]
    lanes = lanes_of(targets, joined=True)
    assert lanes == [
        Lane((5, 9, 12), (4, 0, 3, 1)),
        Lane((84, 6), (5, 2)),
    ]
    apart = lanes_of(targets, joined=False)
    assert sorted(lane.targets for lane in apart) == [(k,) for k in range(6)]
    assert all(lane.read == tuple(targets[lane.targets[0]][:-1]) for lane in apart)


# --- refused ------------------------------------------------------------------------------------


def test_the_encoder_alone_has_no_direct_effect():
    run = started("t5", attention="encoder")
    assert not run.shares_prefix
    assert run.record.reasons == ["attention='encoder' leaves cross-attention alone"]
    with pytest.raises(UnsupportedModelError, match=r"use method='exact', or attention='both'"):
        perturbed(run, [Unit((0,))], "direct")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"inputs of T5ForConditionalGeneration must hold input_ids"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"one row, got shape \[2, 3\]"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "decoder_input_ids": torch.ones(3)},
            r"decoder_input_ids must have shape \[1, tokens\]",
        ),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        started("t5", inputs={"nothing": 1} | inputs)


def test_nan_and_impossible_targets_are_refused():
    model = MODELS["t5"]()

    def change(value):
        def hook(module, args, output):
            output[..., 9] = value
            return output

        return model.lm_head.register_forward_hook(hook)

    for value, message in (
        (torch.nan, "NaN in torch.float64"),
        (-torch.inf, "token 1 probability"),
    ):
        hook = change(value)
        with pytest.raises(RunFailed, match=message):
            started("t5")
        hook.remove()
    run = started("t5")
    hook = change(torch.nan)
    with pytest.raises(RunFailed, match=r"NaN in torch\.float64"):
        perturbed(run, [Unit((0,))])
    hook.remove()
