"""Every family against its own eager attention, and against eager with the modifier matrix.

The reference is always one forward pass over the whole text without a cache. A run with a cache
must give the same rows, so factors that slip from their tokens show.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, LAYERS, VOCAB, WINDOW, eager_logprobs, eager_reference
from torch import Tensor
from transformers import DynamicCache, StaticCache

import atman_triton.integration as atman
from atman_triton.engine import Engine, Settings, Unit, undisturbed
from atman_triton.testing import assert_close_to_oracle, count_launches

BATCH, PROMPT, TOKENS = 2, 8, 12
CHUNKS = ((0, 8), (8, 10), (10, 11), (11, 12))
MODES = ("multiplicative", "min_shift", "log_additive")
PADDINGS = ("none", "left", "right")

OWN_ROUNDING = 1e-4  # float32 throughout, a few layers deep


def _ids() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def _padding(kind: str) -> Tensor | None:
    """Padding of the prompt: on its left, or on its right, before the tokens that follow."""
    if kind == "none":
        return None
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, slice(0, 3) if kind == "left" else slice(PROMPT - 3, PROMPT)] = 0
    return mask


def _factor() -> Tensor:
    """Some columns suppressed, amplified or removed; others left alone."""
    generator = torch.Generator().manual_seed(2)
    factor = torch.rand(BATCH, TOKENS, generator=generator) * 2
    keep = torch.rand(BATCH, TOKENS, generator=generator) < 0.4
    factor = torch.where(keep, 1.0, factor)
    factor[:, 4] = 0.0
    factor[:, 10] = 0.1  # a token that comes after the prompt
    return factor


@torch.no_grad()
def _run(model: Any, padding: Tensor | None, cache_kind: str) -> Tensor:
    """Logits ``[B, T, V]`` of the whole text."""
    ids = _ids()
    if cache_kind == "none":
        return model(ids, attention_mask=padding, use_cache=False).logits
    past = (
        DynamicCache(config=model.config)
        if cache_kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=TOKENS + 3)
    )
    rows = []
    for start, stop in CHUNKS:
        seen = None if padding is None else padding[:, :stop]
        output = model(
            ids[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True
        )
        rows.append(output.logits)
    return torch.cat(rows, 1)


@cache
def _model(name: str) -> Any:
    return FAMILIES[name].build()


@cache
def _reference(name: str, padding: str, mode: str | None) -> Tensor:
    family, model = FAMILIES[name], _model(name)
    with eager_reference(family, model, None if mode is None else _factor(), mode or MODES[0]):
        return _run(model, _padding(padding), "none")


def _error(actual: Tensor, expected: Tensor, padding: str) -> float:
    """Largest difference in the rows of real tokens."""
    mask = _padding(padding)
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool) if mask is None else mask.bool()
    return (actual[real] - expected[real]).abs().max().item()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_is_the_models_own_attention(name: str, padding: str) -> None:
    model = FAMILIES[name].build().float()  # in float64 their masks overflow in a float32 softmax
    own = _run(model, _padding(padding), "none")
    assert _error(own, _reference(name, padding, None), padding) < OWN_ROUNDING


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_manipulation_is_large_enough_to_prove_something(name: str, mode: str) -> None:
    for padding in PADDINGS:
        effect = _error(_reference(name, padding, mode), _reference(name, padding, None), padding)
        assert effect > 100 * OWN_ROUNDING


@pytest.mark.parametrize("cache_kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_eager_with_the_modifier_matrix(name: str, cache_kind: str) -> None:
    """In one pass, every padding in every mode; with a cache, each mode in one padding.

    Which one it is moves on from family to family, so that all come together with each cache.
    """
    family, model = FAMILIES[name], _model(name)
    pairs = [(padding, mode) for padding in PADDINGS for mode in (None, *MODES)]
    if cache_kind != "none":
        turn = list(FAMILIES).index(name) + (cache_kind == "static")
        pairs = [(PADDINGS[(turn + k) % 3], mode) for k, mode in enumerate((None, *MODES))]
    errors = {}
    for padding, mode in pairs:
        factor = torch.ones(1, 1) if mode is None else _factor()
        with atman.manipulate(model, factor, mode or MODES[0]):
            actual = _run(model, _padding(padding), cache_kind)
        errors[padding, mode] = _error(actual, _reference(name, padding, mode), padding)
    print({key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) < family.rounding
    assert model.config._attn_implementation == family.own


@pytest.mark.parametrize("name", FAMILIES)
def test_works_when_built_with_the_implementation(name: str) -> None:
    family = FAMILIES[name]
    model = family.build("atman")
    for cache_kind, padding in (("none", "none"), ("dynamic", "left"), ("static", "right")):
        # BLOOM's own layers cannot add ALiBi for a short mask to a static cache.
        if (name, cache_kind) != ("bloom", "static"):
            plain = _run(model, _padding(padding), cache_kind)
            assert _error(plain, _reference(name, padding, None), padding) < family.rounding
        with atman.manipulate(model, _factor(), "min_shift"):
            actual = _run(model, _padding(padding), cache_kind)
        assert _error(actual, _reference(name, padding, "min_shift"), padding) < family.rounding


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_on_the_kernel_with_every_launch_counted(name: str) -> None:
    """One prompt and one chunk of decoding; without a GPU under Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, factor, padding = _ids().to(device), _factor(), _padding("left")
    assert padding is not None
    padding = padding.to(device)

    @torch.no_grad()
    def run(model: Any, backend: str) -> Tensor:
        past, rows = DynamicCache(config=model.config), []
        with atman.manipulate(model, factor, "min_shift", backend=backend):
            for start, stop in ((0, 10), (10, 12)):
                seen = padding[:, :stop]
                output = model(ids[:, start:stop], attention_mask=seen, past_key_values=past)
                rows.append(output.logits)
        return torch.cat(rows, 1)[padding.bool()]

    model = FAMILIES[name].build().to(device)
    oracle = run(model.double(), "torch")
    model = model.float()
    portable = run(model, "torch")
    with count_launches() as launches:
        fused = run(model, "triton")
    assert launches.attention == 2 * LAYERS
    assert_close_to_oracle(fused, portable, oracle, name=name)


# --- explanations -------------------------------------------------------------------------------

WORDS = 11  # tokens of the prompt that is explained
ANSWERS = ((52, 98, 56, 86, 13), (8,), (41,), (3, 79, 27), (52, 98, 56, 86, 13))
PIECES = (
    Unit((3,)),  # the first that a padded prompt shows
    Unit((4, 5)),
    Unit((4, 9)),
    Unit((WORDS - 1,)),
    Unit((WORDS,), branch=0),
    Unit((WORDS, WORDS + 1), branch=3),
    Unit((0,)),
)
FAR = {"mistral", "phi3"}  # every layer has a window, so the first tokens are out of reach
LAYOUTS = ("plain", "padded", "placed")
EFFECTS = ("total", "direct")
# Their positions are those of columns, so branches would stand at wrong ones.
SEPARATE = {
    "bloom": "BloomForCausalLM counts positions by itself",
    "falcon-alibi": "FalconForCausalLM biases scores by column",
}


def _words(layout: str) -> dict[str, Tensor]:
    """A prompt: plain, padded on its left, or padded with its positions said."""
    generator = torch.Generator().manual_seed(3)
    inputs = {"input_ids": torch.randint(3, VOCAB, (1, WORDS), generator=generator)}
    if layout != "plain":
        padding = (torch.arange(WORDS) >= 3).long()[None]
        inputs["attention_mask"] = padding
        if layout == "placed":
            inputs["position_ids"] = (padding.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _expected(name: str, layout: str, mode: str, effect: str) -> tuple[Tensor, Tensor]:
    """Base ``[M]`` and suppressed ``[U, M]``, each target alone behind the prompt."""
    bases, tables = [], []
    for k, answer in enumerate(ANSWERS):
        mine = [u for u, unit in enumerate(PIECES) if unit.branch in (None, k)]
        rows = eager_logprobs(
            FAMILIES[name],
            _model(name),
            _words(layout),
            answer,
            [(), *(PIECES[u].positions for u in mine)],
            0.1,
            mode,
            effect,
        )
        table = torch.full((len(PIECES), len(answer)), torch.nan, dtype=rows.dtype)
        table[mine] = rows[1:]
        for u in mine:  # a token neither predicts itself nor what stands before it
            table[u, : max(0, max(PIECES[u].positions) - WORDS + 1)] = torch.nan
        bases.append(rows[0])
        tables.append(table)
    return torch.cat(bases), torch.cat(tables, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_many_targets_are_explained_as_by_plain_full_forwards(name: str, layout: str) -> None:
    """Both effects of all targets at once, against one target at a time.

    In every mode behind a plain prompt, else in one that moves on from family to family.
    """
    family, model = FAMILIES[name], _model(name)
    settings = list(zip(MODES, ("auto", 3, 1), strict=True))
    if layout != "plain":
        settings = [settings[(list(FAMILIES).index(name) + LAYOUTS.index(layout)) % 3]]
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if layout == "placed" and not takes_positions:
        pytest.skip(f"{type(model).__name__} takes no position_ids")
    first = WORDS - WINDOW if name in FAR else 0 if layout == "plain" else 3
    felt = torch.tensor([max(piece.positions) >= first for piece in PIECES])
    for mode, batch_size in settings:
        with undisturbed(model):
            engine = Engine(
                model, _words(layout), ANSWERS, Settings(0.1, mode, batch_size=batch_size)
            )
        for effect in EFFECTS:
            base, expected = _expected(name, layout, mode, effect)
            with undisturbed(model):
                found = engine.perturb(PIECES, effect)
            assert torch.equal(found.isnan(), expected.isnan())
            known = ~expected.isnan()
            # The results are float32.
            allowed = family.rounding + torch.finfo(torch.float32).eps * expected[known].abs().max()
            errors = (
                (found - expected).abs()[known].max(),
                (engine.base_logprobs - base).abs().max(),
            )
            print(mode, effect, f"{float(max(errors)):.1e} of {float(allowed):.1e}")
            assert max(errors) < allowed
            moved = (expected - base).abs().nan_to_num(0.0).amax(1)
            assert moved[felt].min() > 100 * allowed  # else it proves nothing
        record = engine.record
        assert set(record.runners) == {"shared_prefix"}
        reasons = [reason.partition(": ")[2] for reason in record.reasons]
        if name in SEPARATE:
            assert reasons == [SEPARATE[name]]
        elif layout == "padded":
            assert reasons == ["the prompt is padded and comes without position_ids"]
        else:
            assert reasons == []
        assert len(record.runners) == (4 if reasons else 1)


def _on_kernel(name: str, answers: tuple[tuple[int, ...], ...], calls: int) -> None:
    """Both effects of one piece by the fused kernel, launched ``calls`` times a layer and pass."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FAMILIES[name].build().to(device)
    layout = "plain" if name == "bloom" else "placed"  # BLOOM takes no position_ids

    def run(backend: str) -> tuple[Tensor, int]:
        settings = Settings(0.1, "min_shift", backend=backend)
        with undisturbed(model):
            engine = Engine(model, _words(layout), answers, settings)
            found = [engine.perturb(PIECES[2:3], effect) for effect in EFFECTS]
        assert engine.record.reasons == []
        return torch.cat([engine.base_logprobs[None], *found]), len(engine.record.batch_sizes)

    model.double()
    oracle, _ = run("torch")
    model.float()
    portable, _ = run("torch")
    with count_launches() as launches:
        fused, passes = run("triton")
    assert passes == 3
    assert launches.attention == passes * LAYERS * calls
    assert_close_to_oracle(fused, portable, oracle.double(), name=name)


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3", "bloom", "gptj"])
def test_explanations_run_on_the_kernel_with_every_launch_counted(name: str) -> None:
    """Groups, windows, other value dims, ALiBi, own code; every family runs on it above."""
    _on_kernel(name, ANSWERS[2:4], 1)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_branches_run_on_the_kernel_with_every_launch_counted(name: str) -> None:
    """Windows, soft caps and sinks; the prompt's rows and the branches' rows are a call each."""
    _on_kernel(name, (ANSWERS[3], ANSWERS[1], ANSWERS[0][:3]), 2)
