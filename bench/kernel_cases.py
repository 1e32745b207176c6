"""The shapes that ``bench/gpu_kernels.py`` times, in order of importance, and their inputs.

Legend: B batch, Hq/Hk query/key heads, T tokens, Tq query tokens where they are fewer, D head dim.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

Factors = Literal["one key per row", "every key", "every key and head"]
ONE: Factors = "one key per row"
EACH: Factors = "every key"
PER_HEAD: Factors = "every key and head"
MODES = ("multiplicative", "min_shift", "log_additive")
LENGTHS = (8192, 2048, 16384, 4096, 1024, 512)
TOKENS = 16384  # of a batch
# Hq, Hk, D, by width and head dim
HEADS = {
    "2048/128": (16, 16, 128),
    "grouped": (32, 8, 128),
    "2048/64": (32, 32, 64),
    "2048/256": (8, 8, 256),
    "4096/128": (32, 32, 128),
    "4096/64": (64, 64, 64),
    "4096/256": (16, 16, 256),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One self-attention, in one or both directions, or a step that reads a cache.

    Args:
        factors: which keys have one that is not 1.
        flex: whether FlexAttention is compiled for it, which takes long.
        queries: of a step with a cache of T tokens, all of which it sees; ``None`` is T.
    """

    batch: int
    heads: int
    key_heads: int
    tokens: int
    head_dim: int
    causal: bool = True
    backward: bool = False
    factors: Factors = ONE
    flex: bool = dataclasses.field(default=True, compare=False)
    queries: int | None = None

    @property
    def rows(self) -> int:
        return self.tokens if self.queries is None else self.queries

    @property
    def shape(self) -> str:
        heads = f"Hq{self.heads}-Hk{self.key_heads}"
        few = "" if self.queries is None else f"-Tq{self.queries}"
        return f"B{self.batch}-{heads}{few}-T{self.tokens}-D{self.head_dim}"

    @property
    def kind(self) -> str:
        direction = "forward + backward" if self.backward else "forward"
        if self.queries is not None:
            return f"decode B{self.batch}, {self.factors}"
        return f"{direction}, {'causal' if self.causal else 'full'}, {self.factors}"

    @property
    def family(self) -> str:
        """What cases that differ in length only have in common."""
        return f"Hq{self.heads}-Hk{self.key_heads}-D{self.head_dim} {self.kind}"

    @property
    def flops(self) -> float:
        forward = 4.0 * self.batch * self.heads * self.rows * self.tokens * self.head_dim
        return forward / (2 if self.causal else 1) * (3.5 if self.backward else 1)

    def rate(self, milliseconds: float, dtype: torch.dtype) -> tuple[float, str]:
        """Work in a time and its unit: TFLOP/s, but of a step the cache that it reads, in GB/s."""
        if self.queries is None:
            return self.flops / milliseconds / 1e9, "TFLOP/s"
        numbers = 2 * self.batch * self.key_heads * self.tokens * self.head_dim
        return numbers * dtype.itemsize / milliseconds / 1e6, "GB/s"

    def small(self) -> Case:
        """The same in little, for gradients against float64."""
        key_heads = min(self.key_heads, 2)
        heads = key_heads * self.heads // self.key_heads
        tokens = min(self.tokens, 384)
        return dataclasses.replace(self, batch=2, heads=heads, key_heads=key_heads, tokens=tokens)


def case_of(
    heads: str, tokens: int, causal: bool, backward: bool, factors: Factors = ONE, flex: bool = True
) -> Case:
    """A case by the name of its heads in :data:`HEADS`."""
    query_heads, key_heads, head_dim = HEADS[heads]
    batch = TOKENS // tokens
    return Case(batch, query_heads, key_heads, tokens, head_dim, causal, backward, factors, flex)


def decode_cases() -> list[Case]:
    """One query of a model whose heads are grouped: one sequence, long or short, and a batch."""
    heads, key_heads, head_dim = HEADS["grouped"]
    step = Case(1, heads, key_heads, 131072, head_dim, causal=False, queries=1)
    return [
        step,
        dataclasses.replace(step, factors=EACH, flex=False),
        dataclasses.replace(step, tokens=8192),
        dataclasses.replace(step, batch=16, tokens=8192, flex=False),
    ]


def all_cases() -> list[Case]:
    """What a GPU times; FlexAttention on a few shapes of each kind."""
    ordered: list[Case] = []
    for backward in (False, True):
        for tokens in LENGTHS:
            flex = tokens in (8192, 2048)
            ordered.append(case_of("2048/128", tokens, True, backward, flex=flex))
    ordered += decode_cases()
    for backward in (False, True):
        for heads in ("2048/64", "2048/256", "grouped"):
            ordered.append(case_of(heads, 8192, True, backward))
        ordered.append(case_of("2048/128", 8192, False, backward))
        for factors in (EACH, PER_HEAD):
            ordered.append(case_of("2048/128", 8192, True, backward, factors))
    for heads in HEADS:
        for causal in (True, False):
            for tokens in LENGTHS:
                for backward in (False, True):
                    ordered.append(case_of(heads, tokens, causal, backward, flex=False))
    return list(dict.fromkeys(ordered))  # each where it first stands


TOY_CASES = (
    Case(1, 1, 1, 32, 16),
    Case(1, 2, 1, 24, 16, backward=True, factors=PER_HEAD),
    Case(1, 1, 1, 24, 16, causal=False, factors=EACH, flex=False),
    Case(1, 2, 1, 24, 16, causal=False, queries=1),
)


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random query, key, value, factor, and the output's gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        size = (case.batch, heads, tokens, case.head_dim)
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    if case.factors == ONE:
        factor = torch.ones(case.batch, case.tokens, device=device)
        for row in range(case.batch):
            factor[row, (2 * row + 1) * case.tokens // (2 * case.batch)] = 0.1
    else:
        heads = (case.heads,) if case.factors == PER_HEAD else ()
        size = (case.batch, *heads, case.tokens)
        factor = torch.rand(size, device=device, generator=generator) * 1.8 + 0.1
    query, gradient = (normal(case.heads, case.rows) for _ in range(2))
    key, value = (normal(case.key_heads, case.tokens) for _ in range(2))
    return [query, key, value, factor, gradient]
