"""Triton's interpreter without the work that it does for nothing, for about half the time.

Nothing that a kernel computes changes. Three of its habits cost as much as all the rest:

* each call of a helper looks through all of ``triton.language`` for what to replace, though the
  launch that it belongs to, or an earlier call in it, has replaced it and nothing undoes that
  before the launch ends;
* each integer sum and product is computed again in 64 bits, to compare it with the largest number
  of its type, and the answer is thrown away unless the kernel is run in debug mode;
* each look-up of a NumPy dtype builds the table of all of them.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from triton.runtime import interpreter


def quicken() -> None:
    """Change the interpreter of this process."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    replaced: set[Any] = set()  # functions whose language is replaced, until the launch ends
    launch, replace_language = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in replaced:
            replace_language(self.fn)
            replaced.add(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launched
    interpreter.InterpretedFunction.__call__ = called

    look_up = interpreter._get_np_dtype
    of_number = functools.cache(look_up)

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return look_up(scalar) if scalar.is_ptr() else of_number(scalar)

    interpreter._get_np_dtype = numpy_dtype
