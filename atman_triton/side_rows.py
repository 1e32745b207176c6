"""Rows that go through a model beside the plain one while ``generate`` runs.

``generate`` drives one sequence and never learns of the others: hooks on the model widen each of
its passes to more rows, all of them fed the plain row's token, and hand the plain row's logits
back. Rows that are not in there follow in passes of their own, over one token or several. All rows
read the prompt's keys and values in one place; each keeps only those of its own tokens, from the
prompt's last one on. A plain row that runs alone keeps them right behind the prompt's, so that it
attends to one tensor, as plain generation does.

Legend: U units, R = 1 + U rows (the plain one first), P prompt tokens, Hk key heads, D head dim,
V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
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
        self.stored = False  # the store of the manipulation keeps what the present pass adds
        self.own = 0  # tokens of each row before the present pass
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The chosen rows' own keys and values, the new ones (``[rows, Hk, 1, D]``) included.

        Of a row that is stored elsewhere, the new ones alone.
        """
        if self.stored:
            return key_states, value_states
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

    def choose(self, rows: slice, tokens: int, stored: bool) -> None:
        """What the next pass runs.

        Args:
            rows: Which.
            tokens: How many of their own they ran before.
            stored: The store of the manipulation keeps what they add.
        """
        for layer in self._own:
            layer.chosen, layer.own, layer.stored = rows, tokens, stored

    def bytes(self) -> int:
        """Bytes of all rows' own keys and values."""
        return sum(layer.bytes() for layer in self._own)


class SideRows:
    """Widens each pass of one thread's ``generate``, and runs the rows that are not in there.

    Args:
        model: The one whose ``forward`` its ``generate`` calls.
        cache: What ``generate`` was given.
        manipulation: Under which it runs, with the factors of all rows.
        groups: Rows that go through the model together. The first, which begins with the plain
            row, is run by ``generate``, the others by :meth:`score`.
        check: Called before each pass; it may raise.
        elsewhere: Runs each pass, in the thread where the model is to run.
    """

    def __init__(
        self,
        model: Any,
        cache: RowsCache,
        manipulation: Manipulation,
        groups: Sequence[slice],
        check: Callable[[], None],
        elsewhere: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._model = model
        self._elsewhere = elsewhere
        self._cache = cache
        self._manipulation = manipulation
        self._factors = [
            manipulation.factors if len(groups) == 1 else _of_rows(manipulation.factors, group)
            for group in groups
        ]
        self._groups = groups
        self._check = check
        self._alone = len(groups) > 1 and groups[0] == slice(0, 1)  # the plain row
        self._prefix_tokens = cache.get_seq_length()
        self._thread = threading.get_ident()
        self._further = False  # a pass of our own is under way
        self._given: dict[str, Any] = {}  # the arguments of the pass under way
        # Of passes that are not scored yet, the arguments and the first group's ``[rows, V]``.
        self._passes: list[dict[str, Any]] = []
        self._logits: list[Tensor] = []
        self._scored = 0  # passes
        self._choose(0, 0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hook the model, and let its passes of this thread run elsewhere."""
        forward, own = self._model.forward, vars(self._model).get("forward")

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            return self._elsewhere(lambda: forward(*args, **kwargs))

        self._model.forward = run
        hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if own is None:
                del self._model.forward
            else:
                self._model.forward = own

    def score(self, count: int) -> list[Tensor]:
        """Logits of the ``count`` oldest passes not scored yet: of each group ``[rows, count, V]``.

        Not while a pass is under way.
        """
        given = _joined(self._passes[:count])
        found = [torch.stack(self._logits[:count], 1)]
        del self._passes[:count], self._logits[:count]
        self._further = True
        try:
            for number in range(1, len(self._groups)):
                self._check()
                arguments = self._widened(given, number, self._scored)
                found.append(self._model(**arguments).logits[:, -count:])
        finally:
            self._further = False
        self._scored += count
        self._choose(0, self._scored + len(self._passes))
        return found

    def _is_ours(self) -> bool:
        return not self._further and threading.get_ident() == self._thread

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_ours():
            return None
        self._check()
        self._given = kwargs
        return args, self._widened(kwargs, 0, self._scored + len(self._passes))

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not self._is_ours():
            return None
        self._passes.append(self._given)
        self._logits.append(output.logits[:, -1])
        self._choose(0, self._scored + len(self._passes))
        output.logits = output.logits[:1]
        return output

    def _widened(self, given: dict[str, Any], number: int, tokens: int) -> dict[str, Any]:
        """A pass's arguments for the rows of a group, which are run next."""
        self._choose(number, tokens)
        self._manipulation.factors = self._factors[number]
        rows = self._groups[number].stop - self._groups[number].start
        widened = {}
        for name, value in given.items():
            axis = _ROW_AXIS.get(name, 0)
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[axis] == 1:
                shape = [-1] * value.dim()
                shape[axis] = rows
                value = value.expand(shape)
            widened[name] = value
        return widened

    def _choose(self, number: int, tokens: int) -> None:
        """Which group runs next, and how many tokens of its own it ran before."""
        store = self._manipulation.store
        assert store is not None
        store.recording = self._alone and number == 0
        store.tokens = self._prefix_tokens + (tokens if store.recording else 0)
        self._cache.choose(self._groups[number], tokens, store.recording)


def _of_rows(factors: Sequence[Tensor | None], rows: slice) -> tuple[Tensor | None, ...]:
    """The factors of some rows; None where all are 1."""
    chosen = [each if each is None or len(each) == 1 else each[rows] for each in factors]
    return tuple(None if each is None or bool((each == 1).all()) else each for each in chosen)


def _joined(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of passes over one token each as those of one pass over all of them."""
    joined = dict(passes[-1])
    for name, value in joined.items():
        if name == "logits_to_keep":
            joined[name] = len(passes)
        elif name != "attention_mask" and isinstance(value, Tensor) and value.shape[-1:] == (1,):
            joined[name] = torch.cat([each[name] for each in passes], -1)
    return joined
