"""``backend="hopper"``: what it refuses, that auto waits for measurements, and its gradients.

On a Hopper GPU as it is; elsewhere with the kernel emulated and the device's check passed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the fused kernels need triton")
pytest.importorskip("triton.experimental.gluon", reason="the Hopper kernel needs Gluon")

import triton
from gluon_emulator.interpreter import emulated
from kernel_cases import DEVICE, Case, make_inputs, poison, worse
from test_hopper import ON_HOPPER, pytestmark

from atman_triton import attention, backend_registry, backend_table, explain_backend
from atman_triton.backend_table import MeasuredRow, write_table
from atman_triton.kernels import hopper, tuned
from atman_triton.kernels.configs import device_architecture, device_name
from atman_triton.kernels.hopper_configs import hopper_rule
from atman_triton.kernels.hopper_tiles import HopperConfig
from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle

__all__ = ["poison", "pytestmark"]  # an autouse fixture, and where it is skipped


@pytest.fixture
def on_hopper(monkeypatch):
    """The kernel's name in a list for each of its launches."""
    launches = []
    kernel = hopper._hopper_fwd_kernel if ON_HOPPER else emulated(hopper._hopper_fwd_kernel)

    class Counted:
        def __getitem__(self, grid):
            launches.append("hopper")
            return kernel[grid]

    monkeypatch.setattr(hopper, "_hopper_fwd_kernel", Counted())
    monkeypatch.setattr(backend_registry, "_is_hopper", lambda device: True)
    return launches


def inputs_of(mode: str = "multiplicative", tokens: tuple[int, int] = (70, 150)):
    case = Case(tokens, (64, 64), (4, 2), 2, torch.float16, mode)
    tensors, options = make_inputs(case)
    options.pop("softcap")
    return tensors, options


@pytest.mark.skipif(ON_HOPPER, reason="here it serves")
def test_it_needs_a_hopper_gpu():
    tensors, options = inputs_of()
    needed = rf"^backend='hopper' needs a Hopper GPU \(sm_90\), got tensors on {DEVICE}"
    with pytest.raises(ValueError, match=needed):
        attention(*tensors, **options, backend="hopper")


def test_it_refuses_what_it_does_not_serve(on_hopper):
    tensors, options = inputs_of()
    refused = "^backend='hopper' does not serve window; use backend='auto'.$"
    with pytest.raises(ValueError, match=refused):
        attention(*tensors, **options, window=5, backend="hopper")
    assert on_hopper == []
    report = {each.name: each for each in explain_backend(*tensors, **options).candidates}
    assert report["hopper"].serves
    assert report["hopper"].kernel == "forward for sm_90"
    report = {each.name: each for each in explain_backend(*tensors, **options, window=5).candidates}
    assert report["hopper"].why_not == "does not serve window"


def row(backend: str, milliseconds: float, tokens: int) -> MeasuredRow:
    versions = backend_table.versions()
    return MeasuredRow(
        "A Hopper", *versions, "float16", 64, 64, "multiplicative", "every key", True, True,
        "forward", tokens, tokens, f"T{tokens}", backend, milliseconds, "0000000", "2026-01-01",
    )  # fmt: skip


@pytest.mark.parametrize(("spent", "chosen"), [(0.5, "hopper"), (2.0, "other")])
def test_auto_takes_it_where_it_measured_faster(on_hopper, monkeypatch, tmp_path, spent, chosen):
    ruled = "triton" if DEVICE == "cuda" else "torch"
    tensors, options = inputs_of(tokens=(150, 150))
    assert explain_backend(*tensors, **options).backend == ruled  # nothing was measured
    path = tmp_path / "table.csv"
    write_table([row(ruled, 1.0, 128), row("hopper", spent, 128)], path)
    monkeypatch.setattr(backend_table, "TABLE", path)
    monkeypatch.setattr(backend_table, "device_name", lambda device: "A Hopper")
    backend_table.forget()
    try:
        told = explain_backend(*tensors, **options)
        attention(*tensors, **options)
    finally:
        monkeypatch.undo()
        backend_table.forget()
    assert told.backend == (chosen if chosen == "hopper" else ruled)
    assert len(on_hopper) == (chosen == "hopper")
    if chosen == "hopper":
        assert told.reason.startswith(f"measured faster than {ruled} at 128 keys on A Hopper")


@pytest.mark.parametrize("mode", ["multiplicative", "log_additive"])
def test_gradients(on_hopper, mode):
    """The backward kernels take over from it."""
    tensors, options = inputs_of(mode)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    given = torch.randn(2, 4, 70, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def grads(run, leaves):
        return torch.autograd.grad(run(*leaves), leaves, given.to(leaves[0].dtype))

    found = grads(lambda *each: attention(*each, **options, backend="hopper"), leaves)
    assert on_hopper == ["hopper"]
    eager = grads(lambda *each: attention_reference(*each, **options)[0], leaves)
    query, key, value, factor = tensors
    turned = [query.flip(-1), key.flip(-1), value.flip(-1), factor]
    flipped = [tensor.detach().requires_grad_() for tensor in turned]
    other = torch.autograd.grad(
        attention_reference(*flipped, **options)[0], flipped, given.flip(-1).to(query.dtype)
    )
    other = [*(each.flip(-1) for each in other[:3]), other[3]]
    double = [tensor.double().requires_grad_() for tensor in tensors]
    oracle = grads(lambda *each: attention_reference(*each, **options)[0], double)
    for name, ours, one, two, truth in zip(
        ("query", "key", "value", "factor"), found, eager, other, oracle, strict=True
    ):
        assert_close_to_oracle(ours, worse(one, two, truth), truth, 3, name)


def test_gradients_of_min_shift_are_refused(on_hopper):
    tensors, options = inputs_of("min_shift")
    tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="saves no row minima, which the backward pass"):
        attention(*tensors, **options, backend="hopper")
    with torch.no_grad():
        attention(*tensors, **options, backend="hopper")
    assert on_hopper == ["hopper"]


def test_it_compiles_into_one_graph(on_hopper):
    tensors, options = inputs_of()
    plain = attention(*tensors, **options, backend="hopper")
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(*tensors, **options, backend="hopper"), plain)
    assert len(on_hopper) == 2


def test_views_that_start_within_are_copied(on_hopper):
    tensors, options = inputs_of()
    plain = attention(*tensors, **options, backend="hopper")
    for place in range(3):
        whole = tensors[place]
        buffer = torch.zeros(whole.numel() + 1, dtype=whole.dtype, device=DEVICE)
        moved = buffer[1:].view(whole.shape).copy_(whole)
        assert moved.data_ptr() % 16
        given = [moved if i == place else tensor for i, tensor in enumerate(tensors)]
        assert torch.equal(attention(*given, **options, backend="hopper"), plain)


def tuned_row(**changes) -> tuned.Row:
    """Tiles of the calls above for this device, another than the rule's."""
    device = torch.device(DEVICE)
    problem = tuned.Problem(
        device_architecture(device, DEVICE == "cpu"), "hopper", 64, 64, "half", "multiplicative",
        True, "1k",
    )  # fmt: skip
    name = device_name(device, DEVICE == "cpu")
    spent = (1.0, 2.0, 0.1, "a shape", name, triton.__version__, "2.13.0", "2026-01-31", "0" * 10)
    parts = [problem, HopperConfig(64, 3, False), tuned.Measurement(*spent)]
    parts = [
        replace(part, **{name: new for name, new in changes.items() if hasattr(part, name)})
        for part in parts
    ]
    return tuned.Row(*parts)


def test_measured_tiles_come_first(on_hopper, monkeypatch, tmp_path):
    """And are read from the file as they were written; other problems take the rule."""
    seen = []
    variant = hopper.variant

    def kept(config, *given):
        seen.append(config)
        return variant(config, *given)

    monkeypatch.setattr(hopper, "variant", kept)
    path = tmp_path / "tuned.json"
    others = [{"mode": "min_shift"}, {"causal": False}, {"length": "4k"}, {"head_dim": 128}]
    others += [{"triton": "3.0.0"}]
    more = [tuned_row(**{"own_output": True, "block_n": 32}, **change) for change in others]
    tuned.save([tuned_row(), *more], path)
    tensors, options = inputs_of()
    attention(*tensors, **options, backend="hopper")
    with tuned.in_use(tuned.load(path)):
        found = attention(*tensors, **options, backend="hopper")
    with tuned.in_use(tuned.Table(more)):
        attention(*tensors, **options, backend="hopper")
    rule = hopper_rule(64, 64)
    assert seen == [rule, HopperConfig(64, 3, False), rule]
    oracle = attention_reference(*(tensor.double() for tensor in tensors), **options)[0]
    assert_close_to_oracle(found, attention_reference(*tensors, **options)[0], oracle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_n": 48}, r"block_n must be one of 32, 64, 128, got 48\."),
        ({"stages": 1}, r"stages must lie between 2 and 8, got 1\."),
        ({"head_dim": 96}, r"head_dim must be one of 64, 128, 256, got 96\."),
        ({"value_dim": 128}, r"own_output must be true where values are of another size"),
        (
            {"head_dim": 128, "value_dim": 128, "block_n": 128, "own_output": True},
            r"must fit 232448 bytes of shared memory, got 263168",
        ),
        ({"dtype": "float32"}, r"dtype must be half for hopper, got 'float32'\."),
        ({"kernel": "attention"}, r"tiles of attention must be a TileConfig, got HopperConfig"),
        ({"ms": 3.0}, r"ms must lie between 0 and rule_ms = 2\.0, got 3\.0\."),
    ],
)
def test_tiles_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match="row 0: .*" + message):
        tuned.Table([tuned_row(**change)])


def test_a_row_of_the_hopper_kernel_has_its_own_fields(tmp_path):
    path = tmp_path / "tuned.json"
    tuned.save([tuned_row()], path)
    path.write_text(path.read_text().replace("own_output", "num_warps"))
    needed = "row 0, tiles: unknown field 'num_warps'; required are block_n, stages, own_output"
    with pytest.raises(ValueError, match=needed):
        tuned.load(path)
