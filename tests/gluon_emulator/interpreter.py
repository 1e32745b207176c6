"""Runs warp-specialised Hopper kernels written in Gluon on the CPU, to find what is wrong in them.

::

    emulate(kernel, grid, *arguments, seed=0, CONSTANT=...)

Every seed is another schedule: in a third each, copies land at once, as late as possible or at
random, and partitions go on as long as they can, take turns or are switched now and then (nine
seeds have each with each; more draw other orders and other partitions that hardly ever run). Races,
missing fences, misused barriers, deadlocks, results used too early, accesses out of bounds and work
left unfinished raise the errors of ``errors``. Races, fences and buffers released too early
are known from vector clocks, so that nearly all are reported in every schedule.

Not emulated: layouts and all else that compiling checks, so compile a kernel too; clusters; the
compiler's reuse of shared memory that it takes to be dead; order between accesses to global memory;
the rounding of wgmma. Python numbers stay Python numbers where Triton makes run-time scalars of
variables that a loop changes: start those with ``gl.to_tensor(0)`` if they need methods.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator.errors import OperandError
from gluon_emulator.machine import Machine, running
from gluon_emulator.pointers import Pointer
from gluon_emulator.rebuild import constant_parameters, emulated_function, emulated_value
from gluon_emulator.tma import Descriptor
from gluon_emulator.values import scalar

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # of a launch


def launched_value(name: str, value: Any) -> Any:
    """What the kernel gets for an argument that is not constexpr."""
    tensor = getattr(value, "base", value)
    if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
        raise OperandError(f"{name} must be on the CPU, got {tensor.device}.")
    if isinstance(value, torch.Tensor):
        return Pointer(name, value)
    if isinstance(value, TensorDescriptor):
        return Descriptor(name, value)
    if isinstance(value, bool | int | float):
        return scalar(value)
    if isinstance(value, tuple | list):
        return tuple(launched_value(f"{name}[{i}]", item) for i, item in enumerate(value))
    if value is None or isinstance(value, str | tl.dtype | tl.constexpr):
        return emulated_value(value)
    raise OperandError(f"The emulator cannot pass {type(value).__name__} for {name}.")


def emulate(
    kernel: Any,
    grid: int | Sequence[int] | Callable[[dict[str, Any]], Sequence[int]],
    *arguments: Any,
    seed: int = 0,
    **options: Any,
) -> None:
    """Run every program of a launch, in an order drawn from ``seed``.

    Args:
        kernel: A ``@gluon.jit`` function, or a ``@triton.jit`` one without ``tl.dot``.
        grid: Programs along each axis, or a function of the arguments that gives them.
        arguments: CPU tensors, host TensorDescriptors, numbers, tuples of these, constants.
        options: The same by name, and options of a launch: num_warps, maxnreg ...
    """
    signature = inspect.signature(kernel.fn)
    named = {
        name: value
        for name, value in options.items()
        if name in signature.parameters or name not in OPTIONS
    }
    bound = signature.bind(*arguments, **named)
    bound.apply_defaults()
    sizes = grid(dict(bound.arguments)) if callable(grid) else grid
    extents = (sizes,) if isinstance(sizes, int) else tuple(int(size) for size in sizes)
    extents += (1,) * (3 - len(extents))
    function = emulated_function(kernel.fn)
    constants = constant_parameters(kernel.fn).values()
    values = {
        name: emulated_value(value) if name in constants else launched_value(name, value)
        for name, value in bound.arguments.items()
    }
    warps = options.get("num_warps", 4)
    programs = list(itertools.product(*(range(extent) for extent in extents)))
    random.Random(seed).shuffle(programs)
    for number, program in enumerate(programs):
        with running(Machine(program, extents, warps, seed + 9 * number)) as current:
            function(**values)
            current.finish()


class _Launcher:
    """``emulated(kernel)``: ``[grid]`` gives what launches it."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.kernel = kernel
        self.seed = seed

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(emulate, self.kernel, grid, seed=self.seed)


def emulated(kernel: Any, seed: int = 0) -> _Launcher:
    """A kernel that ``emulated(kernel)[grid](...)`` emulates."""
    return _Launcher(kernel, seed)
