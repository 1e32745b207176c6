"""Compiles the Hopper kernel for sm_90. Needs no GPU, but a process without TRITON_INTERPRET."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from atman_triton.kernels.hopper_configs import hopper_config
from atman_triton.kernels.hopper_tiles import HEAD_DIMS, HopperConfig
from bench.compile_report import MODES

NUM_WARPS = 4  # of the first consumer; the other partitions have theirs on top


@dataclass(frozen=True)
class HopperCase:
    """One variant to compile; tiles are the configured ones unless given."""

    head_dim: int
    mode: str = "multiplicative"
    causal: bool = True
    dtype: str = "bfloat16"
    value_dim: int | None = None
    config: HopperConfig | None = None

    @property
    def dims(self) -> tuple[int, int]:
        """(D, Dv)."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def tiles(self) -> HopperConfig:
        """The configuration that is compiled."""
        return self.config or hopper_config(*self.dims)


def hopper_cases() -> list[HopperCase]:
    """The published table: head dims, modes, with and without causality, both dtypes."""
    cases = [
        HopperCase(head_dim, mode, causal)
        for head_dim in HEAD_DIMS
        for mode in MODES
        for causal in (True, False)
    ]
    cases += [HopperCase(head_dim, dtype="float16") for head_dim in HEAD_DIMS]
    cases += [HopperCase(64, value_dim=128), HopperCase(256, value_dim=64)]
    return cases


def signature(case: HopperCase, spec: Any) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes that the launcher's arguments would specialise to."""
    import torch

    from atman_triton.kernels.hopper import block_layout
    from atman_triton.kernels.hopper_kernel import _hopper_fwd_kernel as kernel
    from atman_triton.kernels.hopper_work import ROWS

    dtype = getattr(torch, case.dtype)
    short = {"bfloat16": "bf16", "float16": "fp16"}[case.dtype]
    head_dim, value_dim = case.dims
    blocks = {
        "output_tma": [1, 1, ROWS.value, value_dim],
        "query_tma": [1, 1, ROWS.value, head_dim],
        "key_tma": [1, 1, spec.block_n, head_dim],
        "value_tma": [1, 1, spec.block_n, value_dim],
    }
    types: dict[str, Any] = {
        name: f"tensordesc<{short}{block},{block_layout(block, dtype)!r}>"
        for name, block in blocks.items()
    }
    pointers = {"factor_ptr": "*fp32", "before_ptr": "*i32", "flagged_ptr": "*i32"}
    if spec.mode == "plain":
        pointers = dict.fromkeys(pointers, "constexpr")
    pointers["lse_ptr"] = "*fp32"
    scalars = [name for name in kernel.arg_names if name not in (*blocks, *pointers, "SPEC")]
    types |= pointers | dict.fromkeys(scalars, "i32") | {"unit": "fp32", "SPEC": "constexpr"}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name == "SPEC":
            constants[(index,)] = spec
        elif types[name] == "constexpr":
            constants[(index,)] = None
        elif name in pointers:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return {name: types[name] for name in kernel.arg_names}, constants, attributes


def build_hopper(case: HopperCase) -> Any:
    """What triton makes of a variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from atman_triton.kernels.hopper import variant
    from atman_triton.kernels.hopper_kernel import _hopper_fwd_kernel as kernel

    spec = variant(case.tiles, *case.dims, case.mode, case.causal)
    source = GluonASTSource(kernel, *signature(case, spec))
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}
    )
