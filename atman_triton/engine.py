"""Runs a model once per perturbation and does only the work that the result needs.

Four savings, none of which changes a number: logits at target positions only; perturbations in
batches; a shared prefix (what stands before the first suppressed token is run once); and many
targets behind one prompt. A perturbation is run in one of two ways: *total*, suppressed in every
row, or *direct*, suppressed only in the rows that predict the targets.

Legend: U units, K targets, M scored tokens of all targets, S input columns, P prompt tokens,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import memory
from .branches import Branches, TreeMask
from .capabilities import device_of, dtype_of, why_not_branches, why_not_prefix
from .integration import UnsupportedModelError, run_as_atman
from .layers import Manipulation
from .plan import Batch, plan_batches, wasted_tokens
from .prefix import PrefixStore
from .replay import Replay
from .stacks import find_stack

SAVINGS = ("target_logits", "batching", "shared_prefix", "one_pass")
"""What ``Settings.without`` can switch off, to measure what each is worth."""

Effect = Literal["total", "direct"]

# Tokens of the base run that go through the model at once, so that no activation of a long prompt
# grows with its length times the width of the feed-forward layers.
_PIECE = {"cpu": 1024}
_PIECE_ELSEWHERE = 8192
# Vocabulary-sized float32 copies are made for so many bytes of rows at a time.
_REDUCTION_BYTES = 1 << 26
# A first pass in two pieces must give the logits of one in a whole. A model that does not split is
# off by about the spread of its logits; rounding stays far below these shares of it.
_PROBE_TOKENS = 16
_PROBE_SHARE = {torch.float64: 1e-3, torch.float32: 1e-3}
_PROBE_SHARE_HALF = 0.15


class RunFailed(ValueError):
    """The arguments were right, but the model's numbers or words cannot be explained."""


@dataclass(frozen=True)
class Settings:
    """How every row of a run is perturbed and how large batches are; names as in ``Explainer``.

    ``without`` names savings to leave out, see ``SAVINGS``.
    """

    factor: float
    mode: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    backend: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = sorted(self.without - set(SAVINGS))
        if unknown:
            raise ValueError(
                f"without must name savings among {', '.join(SAVINGS)}, got {unknown}."
            )


@dataclass(frozen=True)
class Unit:
    """What one perturbation suppresses.

    Args:
        positions: Tokens, counted in the prompt followed by the unit's target alone.
        branch: The target that the tokens belong to; None if all stand in the prompt.
    """

    positions: tuple[int, ...]
    branch: int | None = None


@dataclass
class Record:
    """What was done, for the result's provenance.

    Args:
        batch_sizes: Rows of each finished pass, the base runs included.
        tokens: Tokens that all passes ran.
        runs: Perturbations finished, by effect.
        shared_tokens: Those of the total runs behind a shared prefix.
        wasted_tokens: Those of them that stood before their row's first suppressed one.
        runners: How each pass over a prompt was run, ``shared_prefix`` or ``full``.
        reasons: Why not all shared a prefix; empty if they did.
        logits: Where the model computed logits.
        prefix_bytes: Bytes of keys and values that were kept.
        seconds: Wall time of all passes.
    """

    batch_sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    runs: dict[str, int] = field(default_factory=lambda: {"total": 0, "direct": 0})
    shared_tokens: int = 0
    wasted_tokens: int = 0
    runners: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    logits: str = "target positions"
    prefix_bytes: int = 0
    seconds: float = 0.0

    @property
    def wasted(self) -> float:
        """Share of the total runs' tokens that stood before their row's first suppressed one."""
        return self.wasted_tokens / self.shared_tokens if self.shared_tokens else 0.0


class Engine:
    """One prompt and its targets, of which any units can be suppressed.

    Args:
        model: A causal language model, in evaluation mode (see ``undisturbed``).
        inputs: What its forward takes for the prompt alone: ``input_ids`` ``[1, P]``, and where
            there is more than text, all that belongs to it.
        targets: ``K`` sequences of token ids to score behind the prompt.
        settings: How to perturb.
        expect: Called with the number of tokens that will be run, once it is known.
        advance: Called with the number of tokens that each finished batch ran.
    Raises:
        RunFailed: if the model gives NaN, or no chance at all to a target token.
        torch.OutOfMemoryError: if not even one row fits; with a fixed batch size, if one batch
            does not.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        targets: Sequence[Sequence[int]],
        settings: Settings,
        expect: Callable[[int], None] = lambda tokens: None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.record = Record()
        self.targets = [tuple(target) for target in targets]
        self.rows = _slices(self.targets)  # of each target, its rows among the M
        prompt = inputs["input_ids"].shape[1]
        self.prompt_tokens = prompt

        def start(chosen: list[int]) -> _Pass:
            branches = Branches(prompt, tuple(self.targets[k] for k in chosen))
            return _Pass(model, inputs, branches, chosen, settings, self.record, expect, advance)

        with _timed(self.record):
            try:
                self._passes = [start(c) for c in self._partition(model, inputs, settings)]
            except _NotSideBySide as error:
                self._passes = [start(c) for c in self._apart(str(error))]
        base = torch.cat([each.base for each in self._passes])
        order = [row for each in self._passes for k in each.chosen for row in self.rows[k]]
        self.base_logprobs = torch.empty_like(base)
        """``[M]`` float32, nats: nothing suppressed, one target after the other."""
        self.base_logprobs[order] = base
        _check(self.base_logprobs, dtype_of(model))

    def perturb(self, units: Sequence[Unit], effect: Effect = "total") -> Tensor:
        """Log-probabilities of all scored tokens with each unit suppressed in turn.

        Args:
            units: What to suppress.
            effect: ``total``: in every row of every layer. ``direct``: only in the rows that
                predict the targets; the prompt's own keys and values stay those of the base run.
        Returns: ``[U, M]`` float32, nats; NaN where a unit does not stand before the scored token
            in the token's own target.
        Raises:
            UnsupportedModelError: if the direct effect is asked of a model whose perturbations
                cannot share a prefix.
        """
        result = torch.full((len(units), len(self.base_logprobs)), torch.nan)
        with _timed(self.record):
            for each in self._passes:
                mine = [
                    u
                    for u, unit in enumerate(units)
                    if unit.branch is None or unit.branch in each.chosen
                ]
                found = each.perturb([units[u] for u in mine], effect)  # [mine, M of the pass]
                if mine:
                    rows = [row for k in each.chosen for row in self.rows[k]]
                    result[torch.tensor(mine)[:, None], torch.tensor(rows)] = found
        owner = torch.tensor([k for k, rows in enumerate(self.rows) for _ in rows])  # [M]
        place = torch.tensor(
            [self.prompt_tokens + i for rows in self.rows for i in range(len(rows))]
        )
        last = torch.tensor([max(unit.positions) for unit in units], dtype=torch.long)[:, None]
        branch = [-1 if unit.branch is None else unit.branch for unit in units]
        branch = torch.tensor(branch, dtype=torch.long)[:, None]
        foreign = (branch >= 0) & (branch != owner)
        return result.masked_fill_(foreign | (last >= place), torch.nan)

    def _partition(
        self, model: nn.Module, inputs: Mapping[str, Any], settings: Settings
    ) -> list[list[int]]:
        """Targets that go through the model together."""
        everything = list(range(len(self.targets)))
        several = [k for k in everything if len(self.targets[k]) > 1]
        if "one_pass" in settings.without:
            return [[k] for k in everything]
        if len(several) < 2:
            return [everything]
        reason = why_not_branches(model)
        if reason is None and find_stack(model)[1].current.manipulation is not None:
            reason = "a manipulation around them counts positions, not columns"
        if reason is None:
            reason = why_not_prefix(model, self.prompt_tokens + max(map(len, self.targets)) - 1)
        if reason is None and settings.mode == "min_shift_full":
            reason = "min_shift_full looks at the other targets' keys too"
        padding = inputs.get("attention_mask")
        if reason is None and padding is not None and "position_ids" not in inputs:
            if not bool(padding.bool().all()):
                reason = "the prompt is padded and comes without position_ids"
        return [everything] if reason is None else self._apart(reason)

    def _apart(self, reason: str) -> list[list[int]]:
        """Targets of one token together, every other one alone."""
        self.record.reasons.append(f"targets of several tokens ran separately: {reason}")
        single = [k for k, target in enumerate(self.targets) if len(target) == 1]
        several = [[k] for k, target in enumerate(self.targets) if len(target) > 1]
        return [single, *several] if single else several


class _NotSideBySide(Exception):
    """Targets stand side by side behind a prompt only where attention alone joins tokens."""


class _Pass:
    """Targets that stand behind one prompt at the same time."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        branches: Branches,
        chosen: list[int],
        settings: Settings,
        record: Record,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> None:
        self.model = model
        self.branches = branches
        self.chosen = chosen
        self.settings = settings
        self.record = record
        self.expect = expect
        self.advance = advance
        self.device = device_of(model)
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self.replay = Replay(model, inputs, branches)
        self.ids = torch.tensor(branches.scored_ids)
        self.predictors = torch.tensor(branches.predictors)
        self.tail = branches.prompt_tokens - 1  # first column whose logits are read
        self.store = PrefixStore(branches.length)
        if not branches.linear:
            self.store.tree = TreeMask(branches, self.device)
        if not self.replay.keeps_logits or "target_logits" in settings.without:
            record.logits = "all positions"
        try:
            self.reason, self.base = self._run_base()
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            raise self._nothing_fits(branches.length, str(error)) from error
        reason = self.reason
        if reason is not None and reason not in record.reasons:
            record.reasons.append(reason)
        record.runners.append("full" if reason is not None else "shared_prefix")
        record.prefix_bytes = max(record.prefix_bytes, self.store.bytes())

    # --- runs ------------------------------------------------------------------------------------

    def perturb(self, units: Sequence[Unit], effect: Effect) -> Tensor:
        """``[U, M]`` of this pass's targets; the base run's where a unit comes too late."""
        if effect == "direct" and self.reason is not None:
            raise UnsupportedModelError(
                f"method='direct' keeps the prompt's keys and values of the base run, but "
                f"{self.reason}; use method='exact'."
            )
        columns = [
            self.branches.columns(self._branch(unit), sorted(unit.positions)) for unit in units
        ]
        starts = [self._start(own, effect) for own in columns]
        result = torch.empty(len(units), len(self.ids))
        if not units:
            return result
        size = self.settings.batch_size
        rows = 1 if "batching" in self.settings.without else None if size == "auto" else size
        tokens = self._tokens_per_batch(starts) if rows is None else None
        pending = plan_batches(starts, self.branches.length, tokens=tokens, rows=rows)
        run = sum(batch.tokens(self.branches.length) for batch in pending)
        if effect == "total" and self.reason is None:
            self.record.shared_tokens += run
            self.record.wasted_tokens += wasted_tokens(pending, starts)
        self.expect(run)
        while pending:
            batch = pending[0]
            try:
                found = self._run_rows([columns[row] for row in batch.rows], batch, effect)
            except (RuntimeError, MemoryError) as error:
                if not memory.out_of_memory(error):
                    raise
                refused = str(error)
            else:
                result[list(batch.rows)] = found
                self.record.runs[effect] += len(batch.rows)
                pending = pending[1:]
                continue
            # Outside the except block, so that the failed pass's tensors are gone by now.
            most = self._smaller(batch, refused)
            pending = [part for each in pending for part in each.split(self.branches.length, most)]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        _check_nan(result, dtype_of(self.model))
        return result

    def _branch(self, unit: Unit) -> int | None:
        return None if unit.branch is None else self.chosen.index(unit.branch)

    def _start(self, columns: Sequence[int], effect: Effect) -> int:
        """The first column that a perturbation has to run."""
        if effect == "direct":
            return self.tail
        if self.reason is not None:
            return 0
        start = self.replay.closed_start(columns[0])
        # the tree mask is made from that of the prompt's end
        return start if self.branches.linear else min(start, self.branches.prompt_tokens)

    def _run_base(self) -> tuple[str | None, Tensor]:
        """Why perturbations run in full, if they do, and the base run's log-probabilities."""
        self.reason = self._why_full()
        if self.reason is None:
            base = self._base_in_pieces()
            if self.replay.prepared or not self.store.looks_ahead:
                return None, base
            self.reason = f"earlier tokens of {type(self.model).__name__} see later ones"
        tree = self.store.tree
        self.store = PrefixStore(self.branches.length)
        self.store.tree = tree
        self.expect(self.branches.length)
        return self.reason, self._run_rows([()], Batch(0, (0,)), "total")[0]

    def _base_in_pieces(self) -> Tensor:
        """The base run, its keys and values kept: log-probabilities ``[M]``."""
        length, store = self.branches.length, self.store
        size = _PIECE.get(self.device.type, _PIECE_ELSEWHERE)
        last = self.replay.closed_start(self.tail)
        cuts = [0]
        while length - cuts[-1] > size and cuts[-1] < last:
            cut = min(self.replay.closed_stop(cuts[-1] + size), last)
            cuts.append(cut)
        store.recording = True
        self.expect(length)
        for start, stop in zip(cuts, [*cuts[1:], length], strict=True):
            store.tokens = start
            kept = length - self.tail if stop == length else 1
            with self._manipulated(None):
                logits = self.replay.run(start, stop, 1, self._logits(kept))
            if stop == length:
                base = self._logprobs(logits, self.tail)[0]
            self.advance(stop - start)
            self._count(1, stop - start)
        store.recording = False
        return base

    def _run_rows(self, rows: Sequence[Sequence[int]], batch: Batch, effect: Effect) -> Tensor:
        """One batch: log-probabilities ``[rows, M]`` on the CPU."""
        length, start = self.branches.length, batch.start
        factors = torch.ones(len(rows), length)
        for factor, columns in zip(factors, rows, strict=True):
            factor[list(columns)] = self.settings.factor
        kept = length - max(start, self.tail)
        whole = self.reason is not None
        self.store.tokens = start
        self.store.own_factors_only = effect == "total" and self._alone
        with self._manipulated(factors.to(self.device)):
            logits = self.replay.run(start, length, len(rows), self._logits(kept), cached=not whole)
        result = self._logprobs(logits, length - kept)
        if start > self.tail:  # what the first of them predict is as in the base run
            early = self.predictors < start
            result[:, early] = self.base[early]
        self.advance(len(rows) * (length - start))
        self._count(len(rows), length - start)
        return result

    @property
    def _alone(self) -> bool:
        """Whether no manipulation of the user's is around this run."""
        return find_stack(self.model)[1].current.manipulation is None

    @contextmanager
    def _manipulated(self, factors: Tensor | None) -> Iterator[Manipulation]:
        settings = self.settings
        if factors is not None and settings.heads is not None:
            heads = find_stack(self.model)[1].heads
            per_head = factors[:, None].expand(-1, heads, -1).clone()
            per_head[:, [head for head in range(heads) if head not in settings.heads]] = 1.0
            factors = per_head
        with run_as_atman(
            self.model, factors, settings.mode, settings.layers, settings.backend, self.store
        ) as manipulation:
            yield manipulation

    def _logits(self, kept: int) -> int | None:
        return None if "target_logits" in self.settings.without else kept

    def _logprobs(self, logits: Tensor, first: int) -> Tensor:
        """Of the scored tokens that columns from ``first`` on predict; others stay 0."""
        logits = logits[:, first - self.branches.length :]
        here = self.predictors >= first
        found = torch.zeros(len(logits), len(self.ids))
        found[:, here] = target_logprobs(
            logits, (self.predictors[here] - first).to(logits.device), self.ids[here]
        ).cpu()
        return found

    def _count(self, rows: int, tokens: int) -> None:
        self.record.batch_sizes.append(rows)
        self.record.tokens += rows * tokens

    # --- choices ---------------------------------------------------------------------------------

    def _why_full(self) -> str | None:
        """Why perturbations must run over the whole input; None if they can share a prefix."""
        off = "the shared prefix is switched off"
        off = off if "shared_prefix" in self.settings.without else None
        if self.branches.linear and off is not None:
            return off
        if self.settings.mode == "min_shift_full":
            return "mode='min_shift_full' looks at future keys"
        reason = why_not_prefix(self.model, self.branches.length) or self._probe()
        if reason is not None and not self.branches.linear:
            raise _NotSideBySide(reason)
        return off or reason

    def _probe(self) -> str | None:
        """Run the start of the input whole and in two pieces, once per model."""
        stack, _ = find_stack(self.model)
        if stack in _PROBED:
            return _PROBED[stack]
        replay = self.replay
        shown = replay.first_shown()
        length = self.branches.length
        stop = replay.closed_stop(min(shown + _PROBE_TOKENS, self.branches.first_stop))
        middle = shown + (stop - shown) // 2
        half = replay.closed_start(middle)
        half = half if half > shown else replay.closed_stop(middle)
        if not shown < half < stop:
            # a single column shares nothing
            return None if length == 1 else "the input is too short to try whether it can be split"
        store, self.store = self.store, PrefixStore(length)
        self.store.tree = store.tree
        try:
            with self._manipulated(None):
                whole = replay.run(0, stop, 1, stop - half)
            self.store.recording = True
            for self.store.tokens, end, kept in ((0, half, 1), (half, stop, stop - half)):
                with self._manipulated(None):
                    pieces = replay.run(self.store.tokens, end, 1, kept)
        finally:
            self.store = store
        error = (whole - pieces).double().abs().max()
        allowed = _PROBE_SHARE.get(whole.dtype, _PROBE_SHARE_HALF) * whole.double().std()
        if bool(error > allowed):
            _PROBED[stack] = (
                f"{type(self.model).__name__} gives other logits when its input comes in two "
                f"pieces (by {float(error):.2g})"
            )
        elif not bool(error.isnan()):  # NaN tells nothing; the run itself will refuse it
            _PROBED[stack] = None
        return _PROBED.get(stack)

    def _tokens_per_batch(self, starts: Sequence[int]) -> int:
        """As many as the free memory holds, up to where more bring no more speed."""
        length = self.branches.length
        most = memory.tokens_per_batch(self.device)
        free = memory.free_memory(self.model)
        if free is None:
            return most
        longest = length - min(starts)
        kept = longest
        if self.replay.keeps_logits and "target_logits" not in self.settings.without:
            kept = length - self.tail
        row = memory.bytes_per_row(self.model, longest, kept, length)
        return min(most, max(1, int(free * memory.SHARE) // row) * longest)

    def _smaller(self, batch: Batch, refused: str) -> int:
        """The most tokens of a batch to go on with after ``batch`` did not fit."""
        own = self.branches.length - batch.start
        size = self.settings.batch_size
        if size != "auto":
            raise torch.OutOfMemoryError(
                f"batch_size {len(batch.rows)} with {own} tokens each does not fit in memory: "
                f"lower it or use batch_size='auto'. ({refused})"
            )
        if len(batch.rows) == 1:
            raise self._nothing_fits(own, refused)
        return len(batch.rows) // 2 * own

    @staticmethod
    def _nothing_fits(tokens: int, refused: str) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"not even one row of {tokens} tokens fits in memory: shorten the prompt, use a "
            f"smaller dtype or free some memory. ({refused})"
        )


_PROBED: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every module's own mode given back whatever happens.

    ``no_grad`` rather than ``inference_mode``: some models fill buffers on their first call, and
    buffers born in inference mode would break the user's own training later.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def target_logprobs(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """``log softmax(logits[:, row])[id]`` in float32 (float64 for float64), some rows at a time.

    Args:
        logits: ``[B, N, V]``.
        rows: ``[M]``, in ``[0, N)``; each row is normalised once, however many ids read it.
        ids: ``[M]``.
    Returns: ``[B, M]`` float32.
    """
    batch, count, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits[:, rows, ids.to(logits.device)].to(dtype)
    flat = logits.flatten(0, 1)  # [B · N, V]
    step = max(1, _REDUCTION_BYTES // (4 * vocabulary))
    normaliser = torch.cat([part.to(dtype).logsumexp(-1) for part in flat.split(step)])
    return (chosen - normaliser.view(batch, count)[:, rows]).float()


def _slices(targets: Sequence[Sequence[int]]) -> list[range]:
    slices, first = [], 0
    for target in targets:
        slices.append(range(first, first + len(target)))
        first += len(target)
    return slices


@contextmanager
def _timed(record: Record) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        record.seconds += time.perf_counter() - started


def _check(base: Tensor, dtype: torch.dtype) -> None:
    """Refuse base runs that cannot be explained."""
    _check_nan(base, dtype)
    if not bool(base.isfinite().all()):
        token = int((~base.isfinite()).nonzero()[0])
        raise RunFailed(f"the model gives target token {token} probability 0: nothing to explain.")


def _check_nan(logprobs: Tensor, dtype: torch.dtype) -> None:
    if bool(logprobs.isnan().any()):
        raise RunFailed(f"the model returns NaN in {dtype}; try another dtype.")
