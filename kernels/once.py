"""What the layers of one forward pass have in common: the first makes it, the others find it.

All layers of a model read the same factors, so the lists of their tiles are the same in each. Who
runs the layers keeps a :class:`Once` per pass and says so with :func:`kept_in`; calls outside of it
keep nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Once:
    """What was made of tensors, as long as these are what they were."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Tensor, Any]] = {}

    def clear(self) -> None:
        """Forget all: a new pass begins."""
        self._kept.clear()

    def get(self, kind: Hashable, source: Tensor, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave before for the same numbers.

        They are the same where another tensor is the same view of memory that nothing has changed:
        PyTorch counts the changes. The source is kept too, so that no other can lie in its place.

        Args:
            kind: What is made, and of whatever else than the source.
        """
        try:
            place = (source.data_ptr(), source._version)
        except RuntimeError:  # no memory of its own (functorch, fake), or changes are not counted
            return make()
        # what is made while a graph is captured is there only when it is replayed
        captured = source.is_cuda and torch.cuda.is_current_stream_capturing()
        view = (source.shape, source.stride(), source.dtype, source.device)
        key = (kind, place, view, captured)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = (source, make())
        return found[1]


class _Current(threading.local):
    once: Once | None = None


_current = _Current()


@contextmanager
def kept_in(once: Once) -> Iterator[None]:
    """Let calls of this thread keep there what they make, and find it."""
    before, _current.once = _current.once, once
    try:
        yield
    finally:
        _current.once = before


def made_once(kind: Hashable, source: Tensor, make: Callable[[], T]) -> T:
    """See :meth:`Once.get`; made anew where nobody keeps anything."""
    once = _current.once
    return make() if once is None else once.get(kind, source, make)
