"""``auto`` and ``explain_backend`` choose as one, and the kernel that is named is what runs."""

import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_attention import FACTOR, KEY, PREFIX, QUERY, VALUE, inputs

import atman_triton as atman
from atman_triton import attention, backend_registry, explain_backend
from atman_triton.kernels import decode, forward, packed_prefix, portable, portable_prefix
from atman_triton.kernels import shared_prefix as shared
from atman_triton.kernels.configs import DECODE, FORWARD, PACKED, SHARED

MODES = ("multiplicative", "min_shift", "min_shift_full", "log_additive")
FUSED = {
    FORWARD: (forward, "attention_fwd"),
    DECODE: (decode, "decode_fwd"),
    SHARED: (shared, "shared_prefix_fwd"),
    PACKED: (packed_prefix, "packed_prefix_fwd"),
}


def test_it_takes_what_attention_takes():
    ours, theirs = (inspect.signature(each).parameters for each in (explain_backend, attention))
    assert list(ours.values()) == list(theirs.values())


def report_of(choice, name):
    """What is said of one backend."""
    return {report.name: report for report in choice.candidates}[name]


class Witness:
    """What ran of a call, from counts of the functions that compute."""

    def __init__(self, monkeypatch):
        self.ran = []
        for name, (module, launcher) in FUSED.items():
            self._watch(monkeypatch, module, launcher, name)
        for module in (portable, portable_prefix):
            self._watch(monkeypatch, module, "attention_blocks", "score blocks")
            self._watch(monkeypatch, module, "attention_eager", "query blocks")
        self._watch(monkeypatch, portable, "_row_minimum", "row minimum")
        self._watch(monkeypatch, backend_registry, "attention_reference", "oracle")
        self.sdpa = []  # keys and masks
        original = F.scaled_dot_product_attention

        def sdpa(query, key, value, *, attn_mask, **options):
            self.sdpa.append((key, attn_mask))
            return original(query, key, value, attn_mask=attn_mask, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)

    def _watch(self, monkeypatch, module, function, name):
        original = getattr(module, function)

        def watched(*args, **kwargs):
            self.ran.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, watched)

    def kernel(self, key, has_factor):
        """The name of what ran."""
        if not self.sdpa:
            (name,) = self.ran
            return name
        given, mask = self.sdpa[0]
        masked = "" if mask is None else " with a mask"
        assert masked or len(self.sdpa) == 1
        if self.ran:
            assert self.ran == ["row minimum"]
            return f"row minimum + SDPA{masked}"
        places = range(key.shape[2] - given.shape[2] + 1)  # of the keys that a block of rows sees
        if any(torch.equal(given, key[:, :, at : at + given.shape[2]]) for at in places):
            floats = mask is not None and mask.is_floating_point()
            return "bias + SDPA" if floats and has_factor else f"SDPA{masked}"
        return f"scaled keys + SDPA{masked}"


FEATURES = {
    "bare": {},
    "causal": {"causal": True},
    "upper left": {"causal": True, "query_offset": 0},
    "offset tensor": {"causal": True, "query_offset": torch.tensor(3)},
    "window": {"causal": True, "window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.zeros(4)},
    "lse": {"return_lse": True},
    "bias": {"position_bias": torch.randn(1, 4, 1, 9)},
    "padding": {"mask": torch.arange(9)[None].expand(2, 9) < 8},
    "dropout": {"dropout": 0.1, "dropout_seed": 3},
    "negative scale": {"causal": True, "scale": -0.3, "query_offset": 0},
}
# On a CPU without gradients blocks of scores are faster than most of what SDPA would do.
WORLDS = ("float32", "float32 gradients", "half", "half gradients")


def calls(mode, world, queries):
    """Arguments and options of calls with every feature."""
    query, key, value, factor = inputs(query_tokens=queries)
    if "half" in world:
        query, key, value = (t.half() for t in (query, key, value))
    query.requires_grad_("gradients" in world)
    arguments = (query, key, value, factor if mode else None)
    for features in FEATURES.values():
        yield arguments, {"mode": mode, **features} if mode else features


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize("queries", [9, 6])
def test_the_kernel_that_is_named_runs(monkeypatch, mode, world, queries):
    for arguments, call in calls(mode, world, queries):
        choice = explain_backend(*arguments, **call)
        with monkeypatch.context() as patch:
            witness = Witness(patch)
            attention(*arguments, **call)
        assert choice.backend == "torch"
        assert witness.kernel(arguments[1], mode is not None) == choice.kernel


def test_the_calls_above_reach_every_kernel():
    grid = itertools.product([*MODES, None], WORLDS, [9, 6])
    each = itertools.chain.from_iterable(calls(*place) for place in grid)
    folded = {"SDPA", "scaled keys + SDPA", "row minimum + SDPA"}
    assert {explain_backend(*arguments, **call).kernel for arguments, call in each} == {
        "score blocks",
        "query blocks",
        "bias + SDPA",
        *folded,
        *(f"{name} with a mask" for name in folded),
    }


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "prefix"])
def test_the_fused_kernel_that_is_named_runs(monkeypatch, needs_grad, queries, prefix):
    query, key, value, factor = inputs(query_tokens=queries)
    query.requires_grad_(needs_grad)
    call = {"causal": True, "prefix": prefix, "backend": "triton"}
    seen = []
    for dropout in (0.0, 0.1):
        choice = explain_backend(query, key, value, factor, dropout=dropout, **call)
        with monkeypatch.context() as patch:
            witness = Witness(patch)
            attention(query, key, value, factor, dropout=dropout, **call)
        assert (choice.backend, choice.kernel) == ("triton", witness.kernel(key, True))
        seen.append(choice.kernel)
    few = queries == 1
    bare = (DECODE if few else FORWARD) if prefix is None else (PACKED if few else SHARED)
    trains = FORWARD if prefix is None else SHARED
    assert seen == [trains if needs_grad else bare, trains]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_prefix_is_explained(monkeypatch, backend):
    for needs_grad in (False, True):
        query = QUERY.clone().requires_grad_(needs_grad)
        call = {"prefix": PREFIX, "backend": backend}
        choice = explain_backend(query, KEY, VALUE, FACTOR, **call)
        with monkeypatch.context() as patch:
            witness = Witness(patch)
            attention(query, KEY, VALUE, FACTOR, **call)
        assert choice.kernel == witness.kernel(KEY, True)


def test_no_queries_and_an_empty_prefix():
    none = tuple(part[:, :, :0] for part in PREFIX)
    assert explain_backend(QUERY[:, :, :0], KEY, VALUE).kernel == "nothing to compute"
    bare = explain_backend(QUERY, KEY, VALUE, FACTOR)
    assert explain_backend(QUERY, KEY, VALUE, FACTOR, prefix=none) == bare


def test_explaining_computes_nothing(monkeypatch):
    witness = Witness(monkeypatch)
    state = torch.random.get_rng_state()
    meta = [t.to("meta") for t in (QUERY, KEY, VALUE, FACTOR)]  # it could not be computed
    for backend in ("auto", "torch", "reference"):
        explain_backend(*meta, backend=backend, dropout=0.5)
        explain_backend(QUERY, KEY, VALUE, FACTOR, backend=backend, dropout=0.5)
    assert witness.ran == witness.sdpa == []
    assert torch.equal(torch.random.get_rng_state(), state)


# --- on a GPU: tensors without memory stand for its tensors, as neither is on a CPU ---------------


def on_a_device(query_tokens=64, key_tokens=64, query_heads=4, dim=16, dtype=torch.bfloat16):
    query = torch.empty(2, query_heads, query_tokens, dim, device="meta", dtype=dtype)
    key, value = torch.empty(2, 2, 2, key_tokens, dim, device="meta", dtype=dtype)
    return query, key, value, torch.empty(2, key_tokens, device="meta")


def sdpa_calls(monkeypatch, arguments, call):
    """Masks that SDPA was given."""
    masks = []
    original = F.scaled_dot_product_attention

    def sdpa(*tensors, attn_mask, **options):
        masks.append(attn_mask)
        assert options.get("enable_gqa", False) == (tensors[0].shape[1] != tensors[1].shape[1])
        return original(*tensors, attn_mask=attn_mask, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", sdpa)
        output = attention(*arguments, backend="torch", **call)
    assert output.shape == arguments[0].shape
    return masks


@pytest.mark.parametrize("heads", [2, 4], ids=["heads", "grouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("per_head", [False, True], ids=["per key", "per head"])
def test_scaled_keys_are_one_call_off_a_cpu(monkeypatch, heads, causal, per_head):
    """Of any length: the limit of a block of rows is for masks."""
    query, key, value, factor = on_a_device(8192, 8192, heads)
    if per_head:
        factor = factor[:, None].expand(-1, heads, -1)
    for leaf in (False, True):
        arguments = (query.clone().requires_grad_(leaf), key, value, factor)
        choice = explain_backend(*arguments, causal=causal, backend="torch")
        assert choice.kernel == "scaled keys + SDPA"
        assert [report.slower_because for report in choice.candidates][1] is None
        if not (per_head and heads == 4):
            assert sdpa_calls(monkeypatch, arguments, {"causal": causal}) == [None]


def test_decoding_off_a_cpu_is_one_call(monkeypatch):
    arguments = on_a_device(query_tokens=1)
    assert explain_backend(*arguments, causal=True).kernel == "scaled keys + SDPA"
    assert sdpa_calls(monkeypatch, arguments, {"causal": True}) == [None]


SLOW = {
    "softcap": ({"softcap": 2.0}, "query blocks"),
    "sinks": ({"sinks": torch.empty(4, device="meta")}, "query blocks"),
    "log-sum-exp": ({"return_lse": True}, "query blocks"),
    "dropout": ({"dropout": 0.1}, "query blocks"),
    "half precision": ({"mode": "log_additive"}, "query blocks"),
    "what the factors add": ({"mode": "min_shift"}, "query blocks"),
    "position_bias": ({"position_bias": torch.empty(1, 4, 1, 64, device="meta")}, "query blocks"),
    "prefix": ({"prefix": torch.empty(2, 1, 2, 5, 16, device="meta").bfloat16().unbind()}, None),
    "window": ({"window": 3}, "scaled keys + SDPA with a mask"),
    "mask": (
        {"mask": torch.empty(2, 64, device="meta", dtype=torch.bool)},
        "scaled keys + SDPA with a mask",
    ),
    "causal flag": ({"causal": True, "query_offset": 3}, "scaled keys + SDPA with a mask"),
}


@pytest.mark.parametrize("word", SLOW)
def test_what_keeps_torch_from_its_fastest_way_is_said(word):
    features, kernel = SLOW[word]
    choice = explain_backend(*on_a_device(), backend="torch", **features)
    report = report_of(choice, "torch")
    assert choice.kernel == report.kernel == (kernel or "query blocks")
    assert word in report.slower_because
    assert report.slower_because.startswith("slow: ") == (report.kernel == "query blocks")
    assert f"torch: {report.kernel} ({report.slower_because}); not measured" in str(choice)


def test_full_attention_that_may_hold_all_scores_goes_in_rows():
    """In float32 off a CPU, and with head dims that no kernel without a score matrix takes."""
    for arguments in (on_a_device(dtype=torch.float32), on_a_device(dim=320)):
        report = report_of(explain_backend(*arguments, backend="torch"), "torch")
        assert report.kernel == "scaled keys + SDPA with a mask"
        assert "whole score matrices" in str(report)


# --- what is said ---------------------------------------------------------------------------------


def test_a_choice_in_words(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert str(explain_backend(QUERY, KEY, VALUE, FACTOR, mode="min_shift")).splitlines() == [
        "torch, score blocks: query is on cpu, where auto takes torch.",
        "  triton: needs a GPU or the interpreter (TRITON_INTERPRET=1), got tensors on cpu",
        "  hopper: needs a Hopper GPU (sm_90), got tensors on cpu",
        "  torch: score blocks (they are faster on a CPU without gradients); not measured",
        "  reference: oracle (it is there to test the others); not measured",
    ]


def test_the_readme_shows_a_choice(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    said = str(explain_backend(*call_of(64), causal=True)).splitlines()
    readme = Path(__file__).parent.parent / "README.md"
    assert "\n".join(f"# {line}" for line in said) in readme.read_text(encoding="utf-8")


def test_an_explicit_backend_is_explained_or_refused():
    choice = explain_backend(QUERY, KEY, VALUE, FACTOR, backend="reference")
    assert (choice.backend, choice.kernel) == ("reference", "oracle")
    assert choice.reason == "backend='reference' was asked for."
    assert isinstance(choice, atman.BackendChoice)
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.backend = "torch"  # pyright: ignore[reportAttributeAccessIssue]
    doubles = [t.double() for t in (QUERY, KEY, VALUE)]
    refused = [
        {"backend": "cuda"},
        {"backend": "triton", "mode": "min_shift_full"},
        {"window": 0},
        {"backend": "triton"},
    ]
    for call, tensors in zip(refused, [*3 * [(QUERY, KEY, VALUE)], doubles], strict=True):
        texts = []
        for function in (attention, explain_backend):
            with pytest.raises(ValueError, match=r"^.+\.$") as raised:
                function(*tensors, FACTOR, **call)
            texts.append(str(raised.value))
        assert texts[0] == texts[1]
    report = report_of(explain_backend(*doubles), "triton")
    assert not report.serves and report.kernel is None and report.milliseconds is None
    assert report.why_not == "serves fp16, bf16 and fp32, got torch.float64"


def call_of(tokens=64, queries=None, **changes):
    options = {"query_tokens": queries or tokens, "key_tokens": tokens} | changes
    return inputs(**options)


# --- one more -------------------------------------------------------------------------------------


def made(name="made", **options):
    """A backend that serves head dim 16 only and returns sevens."""
    options.setdefault("why_not", lambda c: None if c.query.shape[-1] == 16 else "serves D 16 only")
    return backend_registry.Candidate(
        name,
        kernel=lambda _: ("sevens", ""),
        run=lambda call, _: (torch.full_like(call.query, 7.0), None),
        **options,
    )


def add(monkeypatch, candidate):
    monkeypatch.setattr(backend_registry, "CANDIDATES", (candidate, *backend_registry.CANDIDATES))


def test_the_registry_takes_one_more(monkeypatch):
    add(monkeypatch, made())
    assert (attention(QUERY, KEY, VALUE, FACTOR, backend="made") == 7).all()
    choice = explain_backend(QUERY, KEY, VALUE, FACTOR, backend="made")
    assert (choice.backend, choice.kernel) == ("made", "sevens")
    assert str(choice.candidates[0]) == "made: sevens; not measured"
    other = inputs(dim=8)
    with pytest.raises(ValueError, match=r"^backend='made' serves D 16 only; use backend='torch'"):
        attention(*other, backend="made")
    with pytest.raises(
        ValueError, match="one of auto, made, triton, hopper, torch, reference, got 'none'"
    ):
        attention(*other, backend="none")
    # unmeasured, it is not what auto takes
    assert explain_backend(QUERY, KEY, VALUE, FACTOR).backend == "torch"
    add(monkeypatch, made("ruling", unmeasured_on=("cpu",)))
    assert explain_backend(QUERY, KEY, VALUE, FACTOR).backend == "ruling"
    assert explain_backend(*other).backend == "torch"  # where it does not serve
