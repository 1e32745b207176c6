"""What the tests of the fused kernels share: cases, their inputs, covering sets, poisoned memory.

Legend: B batch, Hq/Hk heads, Tq/Tk tokens, D head dim.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("multiplicative", "min_shift", "log_additive")
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@pytest.fixture(autouse=True)
def poison():
    """Fill every ``torch.empty`` with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def worse(first: Tensor, second: Tensor, oracle: Tensor) -> Tensor:
    """Of two results of plain PyTorch the one further from the oracle, number by number.

    How far it is in one order of a sum is luck, and another on every processor: the rule is judged
    by two orders, in which the numbers of a head are added up from either end.
    """
    errors = [(result.double() - oracle).abs() for result in (first, second)]
    return torch.where(errors[0] >= errors[1], first, second)


@dataclass(frozen=True)
class Case:
    """One call; ``dims`` are (D, Dv), ``tokens`` (Tq, Tk), ``heads`` (Hq, Hk)."""

    tokens: tuple[int, int] = (113, 203)
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (2, 1)
    batch: int = 2
    dtype: torch.dtype = torch.float32
    mode: str = "multiplicative"
    factors: str = "some"  # none | some | per_head | one
    band: str = "causal"  # full | causal | upper_left | offset | window | window_full
    softcap: float | None = None
    sinks: bool = False
    bias: str = "none"  # none | dense | shared | alibi
    mask: str = "none"  # none | left | right | holes | rows | heads
    layout: str = "plain"  # plain | tokens_first | shared_keys

    def __str__(self):
        tokens, dims = self.tokens, self.dims
        head_dim = f"D{dims[0]}" + f"v{dims[1]}" * (dims[0] != dims[1])
        parts = [
            f"B{self.batch}-Hq{self.heads[0]}-Hk{self.heads[1]}",
            f"Tq{tokens[0]}-Tk{tokens[1]}",
        ]
        parts += [head_dim, SHORT[self.dtype], self.band]
        parts += [self.mode, self.factors] if self.factors != "none" else ["plain"]
        parts += [f"cap{cap:g}" for cap in [self.softcap] if cap] + ["sinks"] * self.sinks
        parts += [f"bias_{self.bias}"] * (self.bias != "none")
        parts += [f"mask_{self.mask}"] * (self.mask != "none")
        parts += [self.layout] * (self.layout != "plain")
        return "-".join(parts)


def make_inputs(case: Case, seed: int = 0) -> tuple[list, dict]:
    """Query, key, value, key_factor and the oracle's keyword arguments, on DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    (rows, keys), (head_dim, value_dim), (heads, key_heads) = case.tokens, case.dims, case.heads
    batch = case.batch

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def chance(p, *shape):
        return torch.rand(*shape, generator=generator) < p

    def tensor(count, tokens, width):
        if case.layout == "tokens_first":  # [B, T, H, D] with room to spare, seen as [B, H, T, D]
            whole = randn(batch, tokens, count + 1, width + 3).to(case.dtype).to(DEVICE)
            return whole[:, :, 1:, 1 : width + 1].transpose(1, 2)
        first = 1 if case.layout == "shared_keys" and count == key_heads else batch
        return randn(first, count, tokens, width).to(case.dtype).to(DEVICE)

    query = randn(batch, heads, rows, head_dim).to(case.dtype).to(DEVICE)
    if case.layout == "tokens_first":
        query = tensor(heads, rows, head_dim)
    key, value = tensor(key_heads, keys, head_dim), tensor(key_heads, keys, value_dim)
    factor = None
    if case.factors != "none":
        shape = (batch, heads, keys) if case.factors == "per_head" else (batch, keys)
        touched = chance(0.3, *shape)
        if case.factors == "per_head":  # each head another part, so that their tiles differ
            part = torch.arange(keys) * heads // keys == torch.arange(heads)[:, None]  # [Hq, Tk]
            touched = chance(0.5, *shape) & part
        if case.factors == "one":  # one key per row, as in an explanation
            touched = torch.arange(keys) == keys // 3
        low = 0.0 if case.mode == "log_additive" else -1.0
        values = torch.rand(*shape, generator=generator) * (2 - low) + low
        values = torch.where(chance(0.2, *shape), 0.0, values)
        factor = torch.where(touched, values, 1.0).to(DEVICE)

    options: dict = {"mode": case.mode, "softcap": case.softcap}
    options["causal"] = case.band not in ("full", "window_full")
    if case.band == "upper_left":
        options["query_offset"] = 0
    elif case.band in ("offset", "window_full"):
        options["query_offset"] = torch.tensor(keys // 2 - rows // 3, device=DEVICE)
    if case.band in ("window", "window_full"):
        options["window"] = max(1, keys // 3)
    if case.sinks:
        options["sinks"] = (randn(heads) + 1).to(case.dtype).to(DEVICE)
    shapes = {"dense": (batch, heads, rows, keys), "shared": (1, 1, rows, keys)}
    shapes["alibi"] = (1, heads, 1, keys)
    if case.bias != "none":
        options["position_bias"] = (randn(*shapes[case.bias]) * 2).to(case.dtype).to(DEVICE)
    if case.mask in ("left", "right"):
        length = torch.randint(0, keys + 1, (batch, 1), generator=generator)
        column = torch.arange(keys)[None, :]
        options["mask"] = column >= length if case.mask == "left" else column < length
    elif case.mask == "holes":
        options["mask"] = chance(0.7, batch, keys)
    elif case.mask == "rows":
        options["mask"] = chance(0.6, batch, 1, rows, keys)
    elif case.mask == "heads":
        options["mask"] = chance(0.6, 1, heads, rows, keys)
        options["mask"][:, :, rows // 2] = False  # a row that sees nothing
    if "mask" in options:
        options["mask"] = options["mask"].to(DEVICE)
    return [query, key, value, factor], options


LEVELS = {
    "tokens": [(1, 131), (65, 64), (70, 150), (130, 70)],
    "batch": [1, 2],
    "dims": [(40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)],
    "heads": [(2, 2), (4, 2), (3, 1)],
    "dtype": [torch.float32, torch.float16],
    "mode": [*MODES],
    "factors": ["none", "some", "per_head", "one"],
    "band": ["full", "causal", "upper_left", "offset", "window", "window_full"],
    "softcap": [None, 2.5, 50.0],
    "sinks": [False, True],
    "bias": ["none", "dense", "shared", "alibi"],
    "mask": ["none", "left", "right", "holes", "rows", "heads"],
    "layout": ["plain", "tokens_first", "shared_keys"],
}


def covering(
    levels: dict[str, list], cost: Callable[[dict], float] | None = None, tries: int = 10
) -> list[dict]:
    """Choices in which every pair of values of two fields occurs, built greedily: few and cheap.

    Each next choice starts with the value that most pairs still want, takes the other fields in a
    random order, of each the value that most new pairs come of, and is the best of ``tries``.

    Args:
        levels: the values of each field.
        cost: of a choice; nearly as many new pairs for half the cost are better.
    """
    price = cost or (lambda _: 1.0)
    wanted = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(levels, 2)
        for x, y in itertools.product(levels[a], levels[b])
    }
    missing = {  # of each value, in the order of levels, whatever Python's hashes are
        (name, value): sum(len(levels[other]) for other in levels if other != name)
        for name, values in levels.items()
        for value in values
    }
    generator = random.Random(0)

    def draw() -> tuple[dict, set]:
        row = dict([max(missing, key=lambda each: (missing[each], generator.random()))])
        for name in generator.sample(list(levels), len(levels)):
            if name not in row:
                row[name] = max(
                    levels[name],
                    key=lambda value: (
                        sum(frozenset(((name, value), other)) in wanted for other in row.items()),
                        generator.random(),
                    ),
                )
        return row, wanted.intersection(map(frozenset, itertools.combinations(row.items(), 2)))

    chosen = []
    while wanted:
        drawn = [draw() for _ in range(tries)]
        row, new = max(drawn, key=lambda each: len(each[1]) / price(each[0]) ** 0.3)
        for name in levels:  # what shows nothing new may be cheap
            if not any((name, row[name]) in pair for pair in new):
                row[name] = min(levels[name], key=lambda value: price(row | {name: value}))
        wanted -= new
        for value in itertools.chain.from_iterable(new):
            missing[value] -= 1
        chosen.append({name: row[name] for name in levels})
    return chosen


def pairwise(**levels: Sequence) -> pytest.MarkDecorator:
    """Parameters of a test in which every pair of values occurs, in place of all combinations."""
    rows = covering({name: list(values) for name, values in levels.items()})
    return pytest.mark.parametrize(tuple(levels), [tuple(row.values()) for row in rows])


def tiles(row: dict) -> int:
    """What a choice of :data:`LEVELS` costs under the interpreter, in tiles of 64 × 64."""
    rows, keys = row["tokens"]
    return row["batch"] * row["heads"][0] * -(-rows // 64) * -(-keys // 64)


class Allocations(TorchDispatchMode):
    """Elements of every tensor made that is no view of a known storage."""

    def __init__(self, *known):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel():
                pointer = tensor.untyped_storage().data_ptr()
                if pointer not in self.storages:
                    self.storages.add(pointer)
                    self.elements += tensor.untyped_storage().nbytes() // tensor.element_size()
        return result
