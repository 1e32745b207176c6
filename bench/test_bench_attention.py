"""Forward of one attention call with factors: our backends, the modifier matrix, and SDPA's tricks.

``python -m pytest bench/test_bench_attention.py -s``: portable backend on a CPU, Triton on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atman_triton import attention
from atman_triton.kernels.reference import attention_reference
from bench.eager import attention_eager, modifier_matrix
from bench.harness import interleave, report, summarise, write_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
OURS, EAGER = "atman (auto)", "eager, modifier matrix"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One causal self-attention: B batch, Hq/Hk heads, T tokens, D head dim."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        return f"B{self.batch}-Hq{self.heads}-Hk{self.key_heads}-T{self.tokens}-D{self.head_dim}"


CPU_SHAPES = [Shape(8, 8, 4, 128, 64), Shape(8, 8, 4, 256, 64), Shape(2, 8, 2, 1024, 128)]
CUDA_SHAPES = [
    Shape(32, 16, 16, 512, 64),
    Shape(8, 16, 16, 2048, 128),
    Shape(4, 32, 8, 4096, 128),
    Shape(1, 16, 16, 16384, 128),
]


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key, value and factors; each batch row suppresses one token of its own."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.tokens, shape.head_dim)
        return torch.randn(size, device=DEVICE, dtype=DTYPE, generator=generator)

    factor = torch.ones(shape.batch, shape.tokens, device=DEVICE)
    for row in range(shape.batch):
        factor[row, (row * shape.tokens) // shape.batch + 1] = 0.1
    return normal(shape.heads), normal(shape.key_heads), normal(shape.key_heads), factor


def providers(
    mode: str, query: Tensor, key: Tensor, value: Tensor, factor: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Everything that computes this mode, by name."""
    tokens = query.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    offer: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attention(query, key, value, factor, mode=mode, causal=True),
        EAGER: lambda: attention_eager(
            query, key, value, modifier_matrix(factor, tokens), mode=mode, visible=visible
        ),
    }
    if DEVICE.type == "cuda":
        offer["atman (torch)"] = lambda: attention(
            query, key, value, factor, mode=mode, causal=True, backend="torch"
        )
    if mode == "multiplicative":
        offer["SDPA on scaled keys"] = lambda: scaled_dot_product_attention(
            query,
            key * factor[:, None, :, None].to(key.dtype),
            value,
            is_causal=True,
            enable_gqa=True,
        )
    if mode == "log_additive":
        offer["SDPA with a bias"] = lambda: scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=factor.log()[:, None, None, :]
            .to(query.dtype)
            .masked_fill(~visible, float("-inf")),
            enable_gqa=True,
        )
    return offer


@pytest.mark.parametrize("mode", ["multiplicative", "min_shift", "log_additive"])
@pytest.mark.parametrize("shape", CUDA_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES, ids=str)
@torch.no_grad()
def test_forward(benchmark, shape: Shape, mode: str) -> None:
    query, key, value, factor = inputs(shape)
    offer = providers(mode, query, key, value, factor)

    # Checked on one batch row, because the float64 oracle holds whole score matrices.
    row = [part[-1:].contiguous() for part in (query, key, value, factor)]
    outputs = {name: call() for name, call in providers(mode, *row).items()}
    times = interleave(
        benchmark,
        OURS,
        offer,
        outputs=outputs,
        eager=outputs[EAGER],
        oracle=attention_reference(*(part.double() for part in row), mode=mode, causal=True)[0],
        device=DEVICE,
    )
    rows = summarise(
        times,
        what=f"attention forward, causal, {mode}",
        shape=str(shape),
        dtype=DTYPE,
        device=DEVICE,
    )
    write_rows(rows)
    print("\n" + report(rows, OURS))
