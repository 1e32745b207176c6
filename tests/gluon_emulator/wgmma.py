"""Emulated warpgroup_mma: operands in shared memory are read when the product is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from gluon_emulator.errors import AccumulatorError, OperandError, UnsupportedError
from gluon_emulator.machine import Partition, machine, place
from gluon_emulator.shared import SharedMemory, use
from gluon_emulator.values import Tensor, as_tensor


class Accumulator:
    """The result of an asynchronous product, of use in waits and further products only."""

    dtype = tl.float32

    def __init__(self, shape: tuple[int, ...], value: Tensor | None, origin: str) -> None:
        self.shape = shape
        self.value = value
        self.place = origin
        self.continued = False  # by a further product, whose result stands for both

    def refuse(self, *_: Any) -> Any:
        """Say what is missing."""
        raise AccumulatorError(
            f"The result of warpgroup_mma from {self.place} is used in {place()} before "
            "warpgroup_mma_wait completes and returns it."
        )

    def check_current(self) -> None:
        """Its registers must not belong to a further product."""
        if self.continued:
            raise AccumulatorError(
                f"The result of warpgroup_mma from {self.place} is used in {place()}, though a "
                "later product has accumulated into it."
            )

    def __getattr__(self, name: str) -> Any:
        return self.refuse()

    __hash__ = object.__hash__


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod neg lt le gt ge eq ne getitem bool "
    "index and rand or ror xor rxor invert abs"
).split():
    setattr(Accumulator, f"__{_name}__", Accumulator.refuse)


@dataclass(eq=False)
class Product:
    """An unfinished ``accumulator + a @ b``."""

    a: Tensor | SharedMemory
    b: SharedMemory
    accumulator: Tensor | Accumulator
    use_acc: bool
    result: Accumulator
    place: str

    def complete(self) -> None:
        """Read the operands and multiply."""
        left = self.a.view if isinstance(self.a, SharedMemory) else self.a.data
        product = left.to(torch.float32) @ self.b.view.to(torch.float32)
        if self.use_acc:
            start = self.accumulator
            value = start.value if isinstance(start, Accumulator) else start
            product = value.data + product
        self.result.value = Tensor(product, tl.float32)


def warpgroup_mma_init(value: Tensor) -> Accumulator:
    """A tensor as an accumulator."""
    if not isinstance(value, Tensor):
        raise OperandError(f"warpgroup_mma_init needs a tensor, got {type(value).__name__}.")
    return Accumulator(value.shape, value, place())


def _check_product(a: Any, b: Any, acc: Any, partition: Partition) -> None:
    if not isinstance(b, SharedMemory):
        raise OperandError(f"warpgroup_mma needs b in shared memory, got {type(b).__name__}.")
    if not isinstance(a, SharedMemory | Tensor):
        as_tensor(a)
        raise OperandError(f"warpgroup_mma needs a tensor a, got {type(a).__name__}.")
    if a.dtype != b.dtype or a.dtype not in (tl.float16, tl.bfloat16):
        raise UnsupportedError(f"warpgroup_mma of {a.dtype} and {b.dtype}.")
    if isinstance(acc, Tensor) and acc.dtype != tl.float32:
        raise UnsupportedError(f"warpgroup_mma into {acc.dtype}.")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
    if not fits or tuple(acc.shape) != (a.shape[0], b.shape[1]):
        raise OperandError(
            f"warpgroup_mma needs [M, K], [K, N] and [M, N], "
            f"got {list(a.shape)}, {list(b.shape)} and {list(acc.shape)}."
        )
    if partition.warps % 4 or a.shape[0] % 64:
        raise OperandError(
            f"warpgroup_mma needs groups of 4 warps and 64 rows each, got {partition.warps} warps "
            f"and {a.shape[0]} rows."
        )


def warpgroup_mma(
    a: Tensor | SharedMemory,
    b: SharedMemory,
    acc: Tensor | Accumulator,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Tensor | Accumulator:
    """``acc + a @ b`` in float32, or ``a @ b`` unless ``use_acc``."""
    machine().pause()
    partition = machine().current
    _check_product(a, b, acc, partition)
    partition.issued_products += 1
    agent = ("product", partition.index)
    for name, operand in (("a", a), ("b", b)):
        if isinstance(operand, SharedMemory):
            what = f"warpgroup_mma (operand {name})"
            use(operand, what, writes=False, agent=agent, time=partition.issued_products)
    if isinstance(acc, Accumulator):
        acc.check_current()
        acc.continued = acc.value is None  # else a copy is continued
    result = Accumulator((a.shape[0], b.shape[1]), None, place())
    partition.products.append(Product(a, b, acc, bool(use_acc), result, result.place))
    return result if is_async else warpgroup_mma_wait(0, deps=[result])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    """Until all but the youngest products are done; the ``deps``, as tensors if they are done."""
    if deps is None:
        raise OperandError("warpgroup_mma_wait deps must be given.")
    machine().pause()
    partition = machine().current
    while len(partition.products) > num_outstanding:
        partition.products.pop(0).complete()
    partition.clock["product", partition.index] = partition.issued_products - len(
        partition.products
    )
    for dep in deps:
        if isinstance(dep, Accumulator):
            dep.check_current()
    results = [
        dep.value if isinstance(dep, Accumulator) and dep.value is not None else dep for dep in deps
    ]
    return results[0] if len(results) == 1 else tuple(results)
