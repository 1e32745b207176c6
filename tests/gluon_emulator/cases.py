"""The Gluon kernels that the emulator is tried on, with inputs; and mutants of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator.interpreter import emulate

GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LOG2_E = 1.4426950408889634


def descriptor(tensor: torch.Tensor, block: list[int], **options: Any) -> TensorDescriptor:
    """A host descriptor with the layout that Triton prefers."""
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout, **options)


def multiply(
    module: ModuleType,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    programs: int = 1,
    stages: int = 2,
    tma_store: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``a``, ``b`` and the kernel's product of the two."""
    rows, columns, depth = shape
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(rows, depth, generator=generator).to(dtype)
    b = torch.randn(depth, columns, generator=generator).to(dtype)
    c = torch.full((rows, columns), torch.nan, dtype=dtype)
    emulate(
        module.gemm_kernel,
        (programs,),
        descriptor(a, [64, 64]),
        descriptor(b, [64, 64]),
        descriptor(c, [64, 64]),
        c,
        *shape,
        seed=seed,
        STAGES=stages,
        TMA_STORE=tma_store,
    )
    return a, b, c


def attend(
    module: ModuleType,
    sizes: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    stages: int = 2,
) -> tuple[torch.Tensor, ...]:
    """Query, key, value and factor of ``sizes`` (heads, rows, keys), and the kernel's attention."""
    heads, rows, keys = sizes
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(1, heads, tokens, 64, generator=generator).to(dtype)
        for tokens in (rows, keys, keys)
    )
    factor = torch.rand(keys, generator=generator)
    out = torch.full_like(query, torch.nan)
    blocks = [descriptor(tensor, [1, 1, 64, 64]) for tensor in (query, key, value, out)]
    grid = (-(-rows // 64), heads)
    unit = 0.125 * LOG2_E
    emulate(module.attention_kernel, grid, *blocks, factor, keys, unit, seed=seed, STAGES=stages)
    return query, key, value, factor, out


def mutant(original: ModuleType, folder: Path, replaced: tuple[str, ...]) -> ModuleType:
    """The module with texts replaced: old, new, old, new ..."""
    text = Path(original.__file__ or "").read_text()
    for old, new in zip(replaced[::2], replaced[1::2], strict=True):
        if text.count(old) != 1:
            raise ValueError(f"A mutant must replace one text, got {text.count(old)} of {old!r}.")
        text = text.replace(old, new)
    path = folder / f"mutant_{original.__name__}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
