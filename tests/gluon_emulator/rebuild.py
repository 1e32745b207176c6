"""Rebuilds the Python function of a Gluon or Triton kernel on the emulated language.

What is replaced is known by identity: the real functions and modules, whatever a kernel calls them.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import types
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gluon_emulator import barriers, language, tma, wgmma
from gluon_emulator.errors import OperandError, UnsupportedError
from gluon_emulator.shared import SharedMemory
from gluon_emulator.values import Tensor


class _Constexpr:
    """``gl.constexpr(value)`` is the value."""

    def __new__(cls, value: Any = None) -> Any:
        return value


def _replacements() -> dict[int, Any]:
    """What the emulator has instead of each object of the language, by identity."""
    table: dict[int, Any] = {}
    languages: tuple[Any, ...] = (tl, gl)
    for name, function in language.FUNCTIONS.items():
        for module in languages:
            if hasattr(module, name):
                table[id(getattr(module, name))] = function
    table[id(tl.constexpr)] = _Constexpr
    table[id(gl.shared_memory_descriptor)] = SharedMemory
    for name in "allocate_mbarrier init invalidate expect arrive wait".split():
        if hasattr(hopper.mbarrier, name):
            table[id(getattr(hopper.mbarrier, name))] = getattr(barriers, name)
    for name in "async_copy_global_to_shared async_copy_shared_to_global store_wait".split():
        table[id(getattr(hopper.tma, name))] = getattr(tma, name)
    table[id(hopper.fence_async_shared)] = tma.fence_async_shared
    for name in "warpgroup_mma warpgroup_mma_init warpgroup_mma_wait".split():
        table[id(getattr(hopper, name))] = getattr(wgmma, name)
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
    if type(value) is tuple:
        return tuple(emulated_value(item) for item in value)
    if type(value) is list:
        return [emulated_value(item) for item in value]
    language_class = isinstance(value, type) and issubclass(value, tl.core.base_value)
    if language_class or (callable(value) and getattr(value, "__triton_builtin__", False)):
        return _Missing(value)
    return value


@functools.cache
def emulated_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function with the emulated language in place of the real one."""
    code, names = function.__code__, function.__globals__
    scope: dict[str, Any] = {
        "__builtins__": builtins,
        "__emulated__": True,
        "__name__": function.__module__,
        "range": language.runtime_range,
        "max": language.larger,
        "min": language.smaller,
    }
    cells = tuple(types.CellType() for _ in code.co_freevars)
    copy = types.FunctionType(code, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = {
        name: emulated_value(value) for name, value in (function.__kwdefaults__ or {}).items()
    } or None
    copy.__defaults__ = tuple(emulated_value(value) for value in function.__defaults__ or ())

    constants = constant_parameters(function)

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        for position, name in constants.items():
            given = arguments[position] if position < len(arguments) else options.get(name)
            if isinstance(given, Tensor):
                raise OperandError(
                    f"{name} of {function.__name__} must be a constant, got {given!r}."
                )
        if not scope.get("__filled__"):  # on the first call, since functions may call each other
            scope["__filled__"] = True
            for name in _names(code):
                if name in names:
                    scope[name] = emulated_value(names[name])
            for cell, original in zip(cells, function.__closure__ or (), strict=True):
                cell.cell_contents = emulated_value(original.cell_contents)
        return copy(*arguments, **options)

    return called


def constant_parameters(function: Callable[..., Any]) -> dict[int, str]:
    """Position and name of what is annotated as constexpr."""
    parameters = inspect.signature(function).parameters.values()
    return {i: p.name for i, p in enumerate(parameters) if "constexpr" in str(p.annotation)}


def _names(code: types.CodeType) -> set[str]:
    """Global names that the code, or a function in it, may use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*(_names(part) for part in inner))
