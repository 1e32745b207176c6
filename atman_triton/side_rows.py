"""Rows that go through a model beside the plain one while ``generate`` runs.

``generate`` drives one sequence and never learns of the others: hooks on the model widen each of
its passes to a row per unit, all of them fed the plain row's token, and hand the plain row's logits
back. All rows read the prompt's keys and values in one place; each keeps only those of its own
tokens, from the prompt's last one on.

Legend: U units, R = 1 + U rows (the plain one first), P prompt tokens, Hk key heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .layers import Manipulation
from .prefix import PrefixLayer

_FIRST_TOKENS = 32  # a row's buffer begins with so many, and doubles when it is full
# Which axis of a pass's arguments counts rows, where it is not the first.
_ROW_AXIS = {"position_ids": -2}  # some models have several kinds in front


class _RowsLayer(PrefixLayer):
    """The cache of one layer: all rows' own keys and values.

    They lie as ``[Hk, R, capacity, D]``, in which the keys of all rows are one batch of matrices
    per key head: the portable kernel then multiplies them in place.
    """

    def __init__(self, prefix_tokens: int, rows: int) -> None:
        super().__init__(prefix_tokens)
        self._rows = rows
        self.chosen = slice(0, rows)  # which of them the present pass runs
        self.own = 0  # tokens of each row before the present pass
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The chosen rows' own keys and values, the new ones (``[rows, Hk, 1, D]``) included."""
        stop = self.own + key_states.shape[2]
        new = (key_states, value_states)
        if not self._buffers:
            self._buffers = [self._empty(part, max(_FIRST_TOKENS, stop)) for part in new]
        while self._buffers[0].shape[2] < stop:
            self._buffers = [
                torch.cat([buffer, torch.empty_like(buffer)], dim=2) for buffer in self._buffers
            ]
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, self.chosen, self.own : stop] = part.transpose(0, 1)
        keys, values = (buffer[:, self.chosen, :stop].transpose(0, 1) for buffer in self._buffers)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Prefix, own and new tokens, from position 0 on."""
        return self.tokens + self.own + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the present pass."""
        return self.tokens + self.own

    def bytes(self) -> int:
        """Bytes that the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    def _empty(self, part: Tensor, tokens: int) -> Tensor:
        return part.new_empty(part.shape[1], self._rows, tokens, part.shape[3])


class RowsCache(Cache):
    """What ``generate`` is given as the cache of a prompt of which all but the last token is run.

    Args:
        prefix_tokens: ``P - 1``.
        layers: How many layers the model has.
        rows: ``R``.
    """

    def __init__(self, prefix_tokens: int, layers: int, rows: int) -> None:
        self._own = [_RowsLayer(prefix_tokens, rows) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    def choose(self, rows: slice) -> None:
        """Which rows the next pass runs."""
        for layer in self._own:
            layer.chosen = rows

    def advance(self) -> None:
        """All rows have run one more token."""
        for layer in self._own:
            layer.own += 1

    def bytes(self) -> int:
        """Bytes of all rows' own keys and values."""
        return sum(layer.bytes() for layer in self._own)


class SideRows:
    """Widens each pass of one thread's ``generate`` and keeps the logits of all rows.

    Args:
        cache: What ``generate`` was given.
        manipulation: Under which it runs, with the factors of all rows.
        groups: Rows that go through the model together, the plain row in the first.
        check: Called before each pass; it may raise.
    """

    def __init__(
        self,
        cache: RowsCache,
        manipulation: Manipulation,
        groups: Sequence[slice],
        check: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._manipulation = manipulation
        self._factors = manipulation.factors
        self._groups = groups
        self._check = check
        self._thread = threading.get_ident()
        self._given: dict[str, Any] = {}  # the arguments of the pass under way
        self._further = False  # it is the one of another group than the first
        self.logits: deque[list[Tensor]] = deque()
        """Of each pass that nobody took yet, ``[rows, V]`` of every group."""

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hook the model that ``generate`` calls."""
        hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _is_ours(self) -> bool:
        return not self._further and threading.get_ident() == self._thread

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_ours():
            return None
        self._check()
        self._given = kwargs
        return args, self._widened(self._groups[0])

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self._is_ours():
            return None
        logits = [output.logits[:, -1]]
        self._further = True
        try:
            for group in self._groups[1:]:
                logits.append(module(**self._widened(group)).logits[:, -1])
        finally:
            self._further = False
        self._cache.advance()
        self.logits.append(logits)
        output.logits = output.logits[:1]
        return output

    def _widened(self, group: slice) -> dict[str, Any]:
        """The arguments for some rows, which are run next."""
        self._cache.choose(group)
        if len(self._groups) > 1:
            self._manipulation.factors = tuple(
                factor if factor is None or len(factor) == 1 else factor[group]
                for factor in self._factors
            )
        rows = group.stop - group.start
        widened = {}
        for name, value in self._given.items():
            axis = _ROW_AXIS.get(name, 0)
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[axis] == 1:
                shape = [-1] * value.dim()
                shape[axis] = rows
                value = value.expand(shape)
            widened[name] = value
        return widened
