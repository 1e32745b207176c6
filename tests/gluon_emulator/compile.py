"""Compiles the Gluon kernels of the tests for sm_90; needs a process without TRITON_INTERPRET.

::

    PYTHONPATH=.:tests python -m gluon_emulator.compile gemm attention
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16}


def described(name: str, block: list[int]) -> str:
    """Type of a TensorDescriptor argument."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[name])
    return f"tensordesc<{name}{block},{layout!r}>"


def signature(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> GluonASTSource:
    """The kernel with types of some arguments, constants for the others."""
    order = kernel.arg_names
    listed = {name: types.get(name, "constexpr") for name in order}
    return GluonASTSource(kernel, listed, {(order.index(n),): v for n, v in constants.items()})


def gemm_sources() -> Iterator[GluonASTSource]:
    """Both ways of the matrix product to store, in a dtype each."""
    from gluon_emulator.gemm import gemm_kernel

    for name, tma_store in (("bf16", True), ("fp16", False)):
        types = dict.fromkeys(("a_desc", "b_desc", "c_desc"), described(name, [64, 64]))
        types |= dict.fromkeys(("rows", "columns", "depth"), "i32") | {"c_ptr": f"*{name}"}
        yield signature(gemm_kernel, types, {"STAGES": 3, "TMA_STORE": tma_store})


def attention_sources() -> Iterator[GluonASTSource]:
    """Attention with a factor."""
    from gluon_emulator.attention import attention_kernel

    blocks = ("query_desc", "key_desc", "value_desc", "out_desc")
    types = dict.fromkeys(blocks, described("bf16", [1, 1, 64, 64]))
    types |= {"factor_ptr": "*fp32", "keys": "i32", "unit": "fp32"}
    yield signature(attention_kernel, types, {"STAGES": 2})


def main(names: list[str]) -> None:
    """Print what was compiled as JSON."""
    sources = {"gemm": gemm_sources, "attention": attention_sources}
    reports = []
    for name in names:
        for source in sources[name]():
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            code = compiled.asm["ptx"]
            reports.append(
                {
                    "kernel": name,
                    "shared": compiled.metadata.shared,
                    "wgmma": code.count("wgmma.mma_async"),
                    "tma": code.count("cp.async.bulk.tensor"),
                }
            )
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1:])
