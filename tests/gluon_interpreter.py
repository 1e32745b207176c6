"""Runs warp-specialised Hopper kernels written in Gluon on the CPU, to find what is wrong in them.

::

    emulate(kernel, grid, *arguments, seed=0, CONSTANT=...)

Every seed is another schedule; a third each has copies complete at once, as late as possible or
at random. Races, missing fences, misused barriers, deadlocks, results used too early, accesses out
of bounds and work left unfinished raise the errors of ``gluon_machine``. Not emulated: layouts and
what the compiler makes of a kernel (compile it too), clusters, and the liveness of allocations.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import random
import types
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import gluon_barriers
import gluon_hopper
import gluon_language
import torch
import triton.language as tl
from gluon_hopper import Descriptor
from gluon_machine import Machine, OperandError, UnsupportedError, running
from gluon_values import Pointer, Tensor, scalar
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # of a launch


class _Constexpr:
    """``gl.constexpr(value)`` is the value."""

    def __new__(cls, value: Any = None) -> Any:
        return value


def _replacements() -> dict[int, Any]:
    """What the emulator has instead of each object of the language, by identity."""
    table: dict[int, Any] = {}
    for name, function in gluon_language.FUNCTIONS.items():
        for module in (tl, gl):
            if hasattr(module, name):
                table[id(getattr(module, name))] = function
    for module in (tl, gl):
        table[id(module.constexpr)] = _Constexpr
    table[id(gl.shared_memory_descriptor)] = gluon_hopper.SharedMemory
    for name in "allocate_mbarrier init invalidate expect arrive wait".split():
        if hasattr(hopper.mbarrier, name):
            table[id(getattr(hopper.mbarrier, name))] = getattr(gluon_barriers, name)
    for name in "async_copy_global_to_shared async_copy_shared_to_global store_wait".split():
        table[id(getattr(hopper.tma, name))] = getattr(gluon_hopper, name)
    for name in "warpgroup_mma warpgroup_mma_init warpgroup_mma_wait fence_async_shared".split():
        table[id(getattr(hopper, name))] = getattr(gluon_hopper, name)
    return table


REPLACEMENTS = _replacements()


class _Module:
    """A module whose attributes are emulated."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = emulated_value(getattr(self._module, name))
        setattr(self, name, value)
        return value


class _Missing:
    """Stands for a function that the emulator lacks, until it is called."""

    def __init__(self, value: Any) -> None:
        self._name = f"{getattr(value, '__module__', '?')}.{getattr(value, '__name__', value)}"

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise UnsupportedError(f"The emulator has no {self._name}.")


_modules: dict[str, _Module] = {}


def emulated_value(value: Any) -> Any:
    """What a global of a kernel, or a constant given to it, is in the emulator."""
    if id(value) in REPLACEMENTS:
        return REPLACEMENTS[id(value)]
    if isinstance(value, JITFunction | InterpretedFunction):
        if value.fn.__module__.startswith("triton."):
            return _Missing(value.fn)
        return emulated_function(value.fn)
    if isinstance(value, tl.constexpr):
        return value.value
    if isinstance(value, ModuleType):
        return _modules.setdefault(value.__name__, _Module(value))
    if callable(value) and getattr(value, "__triton_builtin__", False):
        return _Missing(value)
    if type(value) in (tuple, list):
        return type(value)(emulated_value(item) for item in value)
    return value


@functools.cache
def emulated_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function with the emulated language in place of the real one."""
    code, names = function.__code__, function.__globals__
    scope: dict[str, Any] = {
        "__builtins__": builtins,
        "__emulated__": True,
        "__name__": function.__module__,
        "range": gluon_language.runtime_range,
        "max": gluon_language.maximum,
        "min": gluon_language.minimum,
    }
    cells = tuple(types.CellType() for _ in code.co_freevars)
    copy = types.FunctionType(code, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = {
        name: emulated_value(value) for name, value in (function.__kwdefaults__ or {}).items()
    } or None
    copy.__defaults__ = tuple(emulated_value(value) for value in function.__defaults__ or ())

    @functools.wraps(function)
    def first(*arguments: Any, **options: Any) -> Any:
        if not scope.get("__filled__"):  # on the first call, since functions may call each other
            scope["__filled__"] = True
            for name in _names(code):
                if name in names:
                    scope[name] = emulated_value(names[name])
            for cell, original in zip(cells, function.__closure__ or (), strict=True):
                cell.cell_contents = emulated_value(original.cell_contents)
        return copy(*arguments, **options)

    return first


def _names(code: types.CodeType) -> set[str]:
    """Global names that the code, or a function in it, may use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*(_names(part) for part in inner))


def launched_value(name: str, value: Any) -> Any:
    """What the kernel gets for an argument that is not constexpr."""
    if isinstance(value, torch.Tensor):
        return Pointer(name, value)
    if isinstance(value, TensorDescriptor):
        return Descriptor(name, value)
    if isinstance(value, bool | int | float):
        return scalar(value)
    if isinstance(value, tuple | list):
        return tuple(launched_value(f"{name}[{i}]", item) for i, item in enumerate(value))
    if value is None or isinstance(value, str | tl.dtype):
        return value
    raise OperandError(f"The emulator cannot pass {type(value).__name__} for {name}.")


def emulate(
    kernel: JITFunction,
    grid: int | Sequence[int] | Callable[[dict[str, Any]], Sequence[int]],
    *arguments: Any,
    seed: int = 0,
    **options: Any,
) -> None:
    """Run every program of a launch, in an order drawn from ``seed``.

    Args:
        kernel: A ``@gluon.jit`` function.
        grid: Programs along each axis, or a function of the arguments that gives them.
        arguments: CPU tensors, host TensorDescriptors, numbers, tuples of these, constants.
        options: The same by name, and options of a launch: num_warps, maxnreg ...
    """
    warps = options.get("num_warps", 4)
    names = [parameter.name for parameter in kernel.params]
    named = {name: value for name, value in options.items() if name in names or name not in OPTIONS}
    bound = kernel.signature.bind(*arguments, **named)
    bound.apply_defaults()
    sizes = grid(dict(bound.arguments)) if callable(grid) else grid
    extents = (sizes,) if isinstance(sizes, int) else tuple(int(size) for size in sizes)
    extents += (1,) * (3 - len(extents))
    function = emulated_function(kernel.fn)
    values = {}
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        value = value.value if isinstance(value, tl.constexpr) else value
        values[parameter.name] = (
            emulated_value(value)
            if parameter.is_constexpr
            else launched_value(parameter.name, value)
        )
    programs = list(itertools.product(*(range(extent) for extent in extents)))
    random.Random(seed).shuffle(programs)
    for number, program in enumerate(programs):
        with running(Machine(program, extents, warps, seed + 9 * number)) as current:
            function(**values)
            current.finish()


class _Launcher:
    """``emulated(kernel)``: ``[grid]`` gives what launches it."""

    def __init__(self, kernel: JITFunction, seed: int) -> None:
        self.kernel = kernel
        self.seed = seed

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(emulate, self.kernel, grid, seed=self.seed)


def emulated(kernel: JITFunction, seed: int = 0) -> _Launcher:
    """A kernel that ``emulated(kernel)[grid](...)`` emulates."""
    return _Launcher(kernel, seed)


__all__ = ["Tensor", "emulate", "emulated", "emulated_function"]
