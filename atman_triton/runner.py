"""Runs one prompt with its targets: once as it is, then once per perturbation.

There are two ways. Behind a *shared prefix*, the base run's keys and values are kept and a
perturbation runs from its first suppressed token on. In *full*, where a model keeps more than
attention keys, every perturbation runs over the whole input.

Legend: U units, M scored tokens, S input columns, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import memory
from .branches import Branches, TreeMask
from .capabilities import device_of, dtype_of, text_config, why_not_prefix
from .gradients import decoder_layers
from .integration import UnsupportedModelError, run_as_atman
from .layers import Manipulation
from .perturbations import Effect, Near, Record, RunFailed, Settings, Unit
from .plan import Batch, plan_batches, wasted_tokens
from .prefix import PrefixStore
from .replay import Replay
from .sites import own_source
from .stacks import find_stack
from .suppression import Correlated

# Tokens of the base run that go through the model at once, so that no activation of a long prompt
# grows with its length times the width of the feed-forward layers.
_PIECE = {"cpu": 1024}
_PIECE_ELSEWHERE = 8192
# Vocabulary-sized float32 copies are made for so many bytes of rows at a time. On a CPU they stay
# in its cache: 2048 rows of 32 000 took 38 ms (2 threads), 56 ms in pieces of 8 MB, 109 ms whole.
_REDUCTION_BYTES = {"cpu": 1 << 20}
_REDUCTION_BYTES_ELSEWHERE = 1 << 26
# A first pass in two pieces must give the logits of one in a whole. A model that does not split is
# off by about the spread of its logits; rounding stays far below these shares of it.
_PROBE_TOKENS = 16
_PROBE_SHARE = {torch.float64: 1e-3, torch.float32: 1e-3}
_PROBE_SHARE_HALF = 0.15


class NotSideBySide(Exception):
    """Targets stand side by side behind a prompt only where attention alone joins tokens."""


class Runner:
    """Targets that stand behind one prompt at the same time.

    Args:
        model: A causal language model, in evaluation mode.
        inputs: What its forward takes for the prompt alone.
        branches: The layout of the targets.
        chosen: Which of the engine's targets they are.
        settings: How to perturb.
        record: What is done is noted here.
        expect: Called with the number of tokens that will be run.
        advance: Called with the number of tokens that each finished batch ran.
    Raises:
        NotSideBySide: if there are several targets and they cannot stand side by side.
        torch.OutOfMemoryError: if not even one row fits.
    """

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
        self._stack = find_stack(model)[1]  # these two look through all modules
        self._source = own_source(model)
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
        self.correlated: Correlated | None = None
        if settings.similarity is not None:
            self.correlated = Correlated(
                self.replay.embeddings,
                branches.owners,
                self.replay.shown(),
                settings.factor,
                settings.similarity,
                settings.rule,
            )
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
        """``[U, M]`` of the runner's targets; 0 where a unit comes too late to be felt."""
        if effect == "direct" and self.reason is not None:
            raise UnsupportedModelError(
                f"method='direct' keeps the prompt's keys and values of the base run, but "
                f"{self.reason}; use method='exact'."
            )
        columns = self.columns(units)
        if self.correlated is not None:
            self.correlated.neighbourhoods(columns)  # all at once, in full blocks
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
                factors = self._factors([columns[row] for row in batch.rows])
                found = self.run_factors(factors, batch.start, effect)
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
            most = self.smaller(batch, refused)
            pending = [part for each in pending for part in each.split(self.branches.length, most)]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        check_nan(result, dtype_of(self.model))
        return result

    def reads(self, unit: Unit) -> bool:
        """Whether the unit stands in the prompt or in one of the runner's targets."""
        return unit.branch is None or unit.branch in self.chosen

    def columns(self, units: Sequence[Unit]) -> list[list[int]]:
        """Of each unit, its columns in ascending order."""
        return [
            self.branches.columns(
                None if unit.branch is None else self.chosen.index(unit.branch),
                sorted(unit.positions),
            )
            for unit in units
        ]

    def neighbours(self, unit: Unit) -> list[Near]:
        """What is suppressed along with a unit because it is like it, in the order of columns."""
        if self.correlated is None:
            return []
        (columns,) = self.columns([unit])
        (near,) = self.correlated.neighbourhoods([columns])
        factors = self.correlated.row(columns)[near.columns].tolist()
        found = zip(near.columns.tolist(), factors, near.similarity.tolist(), strict=True)
        own, owners, positions = set(columns), self.branches.owners, self.branches.positions
        return [
            Near(positions[column], self._target(owners[column]), factor, similarity)
            for column, factor, similarity in found
            if column not in own
        ]

    def _target(self, owner: int) -> int | None:
        return None if owner < 0 else self.chosen[owner]

    def _start(self, columns: Sequence[int], effect: Effect) -> int:
        """The first column that a perturbation has to run."""
        if effect == "direct":
            return self.tail
        if self.reason is not None:
            return 0
        first = columns[0] if self.correlated is None else self.correlated.start(columns)
        start = self.replay.closed_start(first)
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
        return self.reason, self.run_factors(torch.ones(1, self.branches.length))[0]

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
            with self.manipulated(None):
                logits = self.replay.run(start, stop, 1, self._logits(kept))
            if stop == length:
                base = self._logprobs(logits, self.tail)[0]
            self.advance(stop - start)
            self.count(1, stop - start)
        store.recording = False
        return base

    def _factors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``[rows, S]`` float32 on the CPU, of units given by their columns."""
        if self.correlated is not None:
            return torch.stack([self.correlated.row(columns) for columns in rows])
        factors = torch.ones(len(rows), self.branches.length)
        for factor, columns in zip(factors, rows, strict=True):
            factor[list(columns)] = self.settings.factor
        return factors

    def run_factors(self, factors: Tensor, start: int = 0, effect: str = "total") -> Tensor:
        """Rows with factors ``[rows, S]`` from a column on: log-probabilities ``[rows, M]``."""
        length, rows = self.branches.length, len(factors)
        kept = length - max(start, self.tail)
        whole = self.reason is not None
        self.store.tokens = start
        self.store.own_factors_only = effect == "total" and self._alone
        with self.manipulated(factors.to(self.device)):
            logits = self.replay.run(start, length, rows, self._logits(kept), cached=not whole)
        result = self._logprobs(logits, length - kept)
        self.advance(rows * (length - start))
        self.count(rows, length - start)
        return result

    def logprobs_of(self, scored: Sequence[int], rows: int) -> Tensor:
        """Of some scored tokens, from a pass over the whole input: ``[rows, scored]``.

        For ``manipulated`` with gradients enabled; neither moved nor counted.
        """
        length = self.branches.length
        logits = self.replay.run(0, length, rows, self._logits(length - self.tail), cached=False)
        first = length - logits.shape[1]
        places = (self.predictors[list(scored)] - first).to(logits.device)
        return target_logprobs(logits, places, self.ids[list(scored)])

    # --- for gradients, which run the whole input -------------------------------------------------

    @property
    def length(self) -> int:
        """Columns of the input."""
        return self.branches.length

    @property
    def config(self) -> Any:
        """The configuration of the decoder layers."""
        return text_config(self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return decoder_layers(self.model)

    def bytes_per_row(self) -> int:
        """A rough estimate of what a pass over the whole input takes for a row."""
        kept = self.length - self.tail if self.replay.keeps_logits else self.length
        return memory.bytes_per_row(self.model, self.length, kept, self.length)

    @property
    def _alone(self) -> bool:
        """Whether no manipulation of the user's is around this run."""
        return self._stack.current.manipulation is None

    @contextmanager
    def manipulated(self, factors: Tensor | None) -> Iterator[Manipulation]:
        """Run the model as "atman", its scores manipulated by factors ``[rows, S]``."""
        settings = self.settings
        if factors is not None and settings.heads is not None:
            heads = self._stack.heads
            per_head = factors[:, None].expand(-1, heads, -1).clone()
            per_head[:, [head for head in range(heads) if head not in settings.heads]] = 1.0
            factors = per_head
        given = None if factors is None else {self._source: factors}
        with run_as_atman(
            self.model, given, settings.mode, settings.layers, settings.backend, self.store
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

    def count(self, rows: int, tokens: int) -> None:
        """Note a finished forward pass."""
        self.record.batch_sizes.append(rows)
        self.record.tokens += rows * tokens

    # --- choices ---------------------------------------------------------------------------------

    def _why_full(self) -> str | None:
        """Why perturbations must run over the whole input; None if they can share a prefix."""
        off = None
        if "shared_prefix" in self.settings.without:
            off = "the shared prefix is switched off"
        if self.settings.gradients:
            off = "gradients are taken through the whole input"
        if self.branches.linear and off is not None:
            return off
        if self.settings.mode == "min_shift_full":
            return "mode='min_shift_full' looks at future keys"
        reason = why_not_prefix(self.model, self.branches.length) or self._probe()
        if reason is not None and not self.branches.linear:
            raise NotSideBySide(reason)
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
        cut = shown < half < stop
        if not cut:  # it sees itself as a whole, so its last column is run again
            half = stop - 1
        if half <= shown:
            # a single column shares nothing
            return None if length == 1 else "the input is too short to try whether it can be split"
        store, self.store = self.store, PrefixStore(length)
        self.store.tree = store.tree
        try:
            with self.manipulated(None):
                whole = replay.run(0, stop, 1, stop - half)
            self.store.recording = True
            first = half if cut else stop
            for self.store.tokens, end, kept in ((0, first, 1), (half, stop, stop - half)):
                with self.manipulated(None):
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

    def smaller(self, batch: Batch, refused: str) -> int:
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
    size = _REDUCTION_BYTES.get(logits.device.type, _REDUCTION_BYTES_ELSEWHERE)
    step = max(1, size // (4 * vocabulary))
    normaliser = torch.cat([part.to(dtype).logsumexp(-1) for part in flat.split(step)])
    return (chosen - normaliser.view(batch, count)[:, rows]).float()


def check_nan(logprobs: Tensor, dtype: torch.dtype) -> None:
    """Refuse numbers that mean nothing."""
    if bool(logprobs.isnan().any()):
        raise RunFailed(f"the model returns NaN in {dtype}; try another dtype.")
