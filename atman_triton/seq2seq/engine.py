"""Runs an encoder-decoder once per perturbation and does only the work that the result needs.

An encoder's tokens are read in two ways: by the encoder itself (self-attention) and by the decoder
(cross-attention). ``Settings.attention`` says in which a piece of the prompt is suppressed. Where
it is cross-attention alone, and for the *direct* effect, the encoder runs once: all perturbations
read the base run's keys and values of it in place. Earlier tokens of an answer, and start tokens,
are suppressed in the decoder's self-attention, whatever the setting.

The prompt's tokens are those of all sources (see ``encoder_decoder``), one after the other, then
the decoder's start tokens.

Legend: U units, K targets, M scored tokens, S columns (see ``Branches``), P prompt tokens,
L lanes (see ``lanes``), T decoder tokens, E tokens of a source, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .. import gradients, memory
from ..branches import Branches
from ..capabilities import device_of, dtype_of
from ..integration import UnsupportedModelError, run_as_atman
from ..perturbations import Attention, Effect, Near, Record, Settings, Unit
from ..runner import check_nan
from ..scored import check_base, rows_of, stands_before, timed
from ..sites import named_sites
from ..suppression import Correlated
from .encoder_decoder import encoder_decoder, first_input
from .gradients import WholeRuns, nothing_fits
from .lanes import lanes_of, scored
from .plan import Pass, Planner


class Seq2SeqEngine:
    """One prompt and its answers, of which any units can be suppressed.

    Args:
        model: An encoder-decoder in evaluation mode (see ``undisturbed``).
        inputs: What it reads of the prompt, see ``encoder_decoder``.
        targets: ``K`` sequences of token ids to score behind the start tokens.
        settings: How to perturb.
        expect: Called with the number of tokens that will be run, once it is known.
        advance: Called with the number of tokens that each finished batch ran.
    Raises:
        RunFailed: if the model gives NaN, or no chance at all to a target token.
        UnsupportedModelError: if its attention cannot be manipulated.
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
        self.model = model
        self.record = Record()
        self._settings = settings
        self._expect, self._advance = expect, advance
        self.targets = [tuple(target) for target in targets]
        self.rows = rows_of(self.targets)  # of each target, its rows among the M
        self._device = device_of(model)
        inputs = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        self._parts = encoder_decoder(model, inputs)
        chosen = settings.attention or "both"
        self._attention: Attention = chosen if self._parts.chooses else "cross"
        # min_shift_full looks at keys behind an answer too
        joined = "one_pass" not in settings.without and settings.mode != "min_shift_full"
        self._lanes = lanes_of(self.targets, joined=joined)
        self._states: list[Tensor] = []  # of each stage, [1, E, D]
        self._crossing = DynamicCache()  # keys and values that the decoder makes of the last one
        with timed(self.record):
            try:
                read = self._encode()
                sizes = [states.shape[1] for states in self._states]
                self._edges = [0, *accumulate(sizes)]  # of each source, its first column
                self.prompt_tokens = self._edges[-1] + len(self._parts.start)
                self._branches = Branches(self.prompt_tokens, tuple(self.targets))
                start = len(self._parts.start)
                self._plan = Planner(
                    model, settings, self._edges, start, self._lanes, joined=joined
                )
                self._correlated = self._neighbourhoods(read)
                base = self._base()
            except (RuntimeError, MemoryError) as error:
                if not memory.out_of_memory(error):
                    raise
                raise nothing_fits(str(error)) from error
        self.base_logprobs = base
        """``[M]`` float32, nats: nothing suppressed, one target after the other."""
        check_base(base, dtype_of(model))

    @property
    def shares_prefix(self) -> bool:
        """Whether perturbations read the base run's encoder, so that there are direct effects."""
        return self._parts.chooses and self._attention != "encoder"

    @property
    def _no_direct(self) -> str:
        """Why there are no direct effects."""
        if self._parts.chooses:
            return "attention='encoder' leaves cross-attention alone"
        return (
            f"the text of {type(self.model).__name__} reads the picture in rows of the prompt too"
        )

    def perturb(self, units: Sequence[Unit], effect: Effect = "total") -> Tensor:
        """Log-probabilities of all scored tokens with each unit suppressed in turn.

        Args:
            units: What to suppress.
            effect: ``total``: wherever ``Settings.attention`` says. ``direct``: of the prompt only
                in cross-attention; what the encoder made of it stays that of the base run.
        Returns: ``[U, M]`` float32, nats; NaN where a unit does not stand before the scored token
            in the token's own target.
        Raises: UnsupportedModelError: if the direct effect is asked of suppression in the encoder.
        """
        if effect == "direct" and not self.shares_prefix:
            other = ", or attention='both' or 'cross'" if self._parts.chooses else ""
            raise UnsupportedModelError(
                f"method='direct' suppresses in cross-attention, but {self._no_direct}; use "
                f"method='exact'{other}."
            )
        where: Attention = "cross" if effect == "direct" else self._attention
        result = torch.full((len(units), len(self.base_logprobs)), torch.nan)
        before = stands_before(units, self.rows, self.prompt_tokens, max)
        columns = [self._columns(unit) for unit in units]
        if self._correlated is not None:
            self._correlated.neighbourhoods(columns)  # all at once, in full blocks

        def factors(rows: Sequence[int]) -> Tensor:
            return torch.stack([self._factors(columns[row]) for row in rows])

        groups: dict[tuple[int, int | None], list[int]] = {}
        for row, unit in enumerate(units):
            first = self._first_stage(self._factors(columns[row]), where)
            groups.setdefault((first, unit.branch), []).append(row)
        with timed(self.record):
            self._run_all(groups, factors, where, result)
        self.record.runs[effect] += len(units)
        check_nan(result[before], dtype_of(self.model))
        return result.masked_fill_(~before, torch.nan)

    def neighbours(self, unit: Unit) -> list[Near]:
        """What is suppressed along with a unit: of the prompt, then of each target, in order.

        Empty without ``Settings.similarity``.
        """
        if self._correlated is None:
            return []
        columns = self._columns(unit)
        (near,) = self._correlated.neighbourhoods([columns])
        factors = self._correlated.row(columns)[near.columns].tolist()
        found = zip(near.columns.tolist(), factors, near.similarity.tolist(), strict=True)
        own, owners, positions = set(columns), self._branches.owners, self._branches.positions
        return [
            Near(positions[column], None if owners[column] < 0 else owners[column], factor, like)
            for column, factor, like in found
            if column not in own
        ]

    def attribute(self, units: Sequence[Unit], steps: int | None) -> gradients.Attribution:
        """Scores from gradients on the line from no suppression to that of all units together.

        Args:
            units: What to suppress; no token stands in two of them.
            steps: Of how many parts of the line the gradient is taken in the middle; None takes
                it with nothing suppressed, for the whole line.
        Returns: scores ``[U, M]``, and ``[M]`` log-probabilities with all units suppressed.
        Raises: UnsupportedModelError: if the model cannot be differentiated.
        """
        if self._settings.similarity is not None:
            raise ValueError("attribute suppresses units alone: Settings.similarity must be None.")
        measured = stands_before(units, self.rows, self.prompt_tokens, max)
        begun = stands_before(units, self.rows, self.prompt_tokens, min)
        scores = torch.full(measured.shape, torch.nan)
        together = self.base_logprobs.clone()
        with timed(self.record):
            for own in self._alike():
                mine = [u for u, unit in enumerate(units) if unit.branch in (None, *own)]
                if not mine:
                    continue
                columns = [sorted(units[u].positions) for u in mine]
                rows = torch.tensor([row for k in own for row in self.rows[k]])
                places = (torch.tensor(mine)[:, None], rows)
                found = gradients.attribute(
                    self._whole(own, rows), columns, measured[places], begun[places], steps
                )
                scores[places], together[rows] = found.scores, found.together
        check_nan(scores[measured], dtype_of(self.model))
        return gradients.Attribution(scores, together)

    def _alike(self) -> list[list[int]]:
        """Targets that can be run whole together: those of one token, and every other alone."""
        single = [k for k, target in enumerate(self.targets) if len(target) == 1]
        several = [[k] for k, target in enumerate(self.targets) if len(target) > 1]
        return [single, *several] if single else several

    def _whole(self, own: Sequence[int], rows: Tensor) -> WholeRuns:
        """Whole runs of targets that are alike, which are ``rows`` of the ``M``."""
        return WholeRuns(
            self.model,
            self._parts,
            self._edges,
            self.targets[own[0]][:-1],
            [place for k in own for place in enumerate(self.targets[k])],
            self.base_logprobs[rows],
            self._settings,
            lambda factors: self._manipulated(factors, self._attention),
            self.record,
            self._expect,
            self._advance,
        )

    # --- runs ------------------------------------------------------------------------------------

    def _encode(self) -> list[Tensor]:
        """Run all stages once; what the first layer of each one read, ``[E, D]``."""
        read = []
        settings = self._settings
        with run_as_atman(self.model, None, settings.mode, settings.layers, settings.backend):
            for stage in self._parts.stages:
                before = self._states[-1] if self._states else None
                with first_input(stage.module) as found:
                    self._states.append(stage.encode(1, before))
                read.append(found[0][0] if stage.inside else self._states[-1][0])
            # The start tokens alone fill the cache with one row, as the states are.
            start = torch.tensor([self._parts.start], device=self._device)
            self._parts.decode(start, self._states[-1], self._parts.cache(self._crossing))
        tokens = sum(states.shape[1] for states in self._states) + len(self._parts.start)
        self._expect(tokens)
        self._advance(tokens)
        self._count(1, tokens)
        return read

    def _base(self) -> Tensor:
        """``[M]`` float32."""
        base = torch.full((1, self.rows[-1].stop), torch.nan)
        groups: dict[tuple[int, int | None], list[int]] = {(len(self._parts.stages), None): [0]}
        ones = torch.ones(1, self._branches.length)
        self._run_all(groups, lambda rows: ones, "cross", base)
        self.record.runners.append("shared_prefix")
        if not self.shares_prefix:
            self.record.reasons.append(self._no_direct)
        kept: Any = self._crossing.layers
        self.record.prefix_bytes = sum(
            part.numel() * part.element_size() for each in kept for part in (each.keys, each.values)
        )
        return base[0]

    def _run_all(
        self,
        groups: Mapping[tuple[int, int | None], Sequence[int]],
        factors: Callable[[Sequence[int]], Tensor],
        where: Attention,
        result: Tensor,
    ) -> None:
        """Fill ``result`` ``[U, M]`` with units that run from the same stage on together."""
        pending = [
            part
            for (first, branch), rows in groups.items()
            for lanes in self._plan.lanes_of(branch)
            for part in self._plan.planned(Pass(first, branch, lanes, tuple(rows)))
        ]
        if any(one.first < len(self._parts.stages) for one in pending):
            self._note_full()
        self._expect(sum(map(self._plan.tokens, pending)))
        while pending:
            one = pending[0]
            try:
                found = self._run(one, factors(one.rows), where)
            except (RuntimeError, MemoryError) as error:
                if not memory.out_of_memory(error):
                    raise
                refused = str(error)
            else:
                rows = torch.tensor(one.rows)[:, None]
                for lane, logprobs in zip(one.lanes, found, strict=True):
                    targets = self._lanes[lane].targets
                    places = [row for k in targets for row in self.rows[k]]
                    result[rows, torch.tensor(places)] = logprobs
                self._advance(self._plan.tokens(one))
                self._count(len(one.rows) * len(one.lanes), self._plan.tokens(one))
                pending = pending[1:]
                continue
            # Outside the except block, so that the failed pass's tensors are gone by now.
            most, before = self._plan.smaller(one, refused), sum(map(self._plan.tokens, pending))
            pending = [part for each in pending for part in self._plan.within(each, most)]
            self._expect(sum(map(self._plan.tokens, pending)) - before)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, one: Pass, factors: Tensor, where: Attention) -> list[Tensor]:
        """Log-probabilities of each lane's targets, ``[rows, M of them]``.

        Args:
            one: What runs.
            factors: ``[rows, S]``.
            where: The prompt is suppressed.
        """
        stages, rows, lanes = self._parts.stages, len(one.rows), len(one.lanes)
        named = {
            stage.source: own
            for stage, (start, stop) in zip(stages, pairwise(self._edges), strict=True)
            if bool((own := factors[:, start:stop]).ne(1).any())
        }
        named["decoder"] = self._decoder_factors(one, factors)
        first_scored = len(self._parts.start) - 1
        states, cache = self._states[one.first - 1] if one.first else None, None
        with self._manipulated(named, where), self._logits_from(first_scored):
            for stage in stages[one.first :]:
                states = stage.encode(rows, states)
            assert states is not None  # there is a stage
            if one.first < len(stages):
                states = states.repeat_interleave(lanes, 0) if lanes > 1 else states
            else:
                cache = self._parts.cache(self._crossing)
            ids = self._ids(one).repeat(rows, 1)
            logits = self._parts.decode(ids, states, cache)
        kept = ids.shape[1] - first_scored
        if logits.shape[1] != kept:
            self.record.logits = "all positions"
        logits = logits[:, -kept:].unflatten(0, (rows, lanes))
        return [
            scored(logits[:, place], self._lanes[lane], self.targets).cpu()
            for place, lane in enumerate(one.lanes)
        ]

    @contextmanager
    def _manipulated(self, factors: Mapping[str, Tensor], where: Attention) -> Iterator[None]:
        """Run the model as "atman" with factors ``[rows, tokens]`` of sources."""
        settings = self._settings
        if settings.heads is not None:
            factors = self._in_heads(settings.heads, factors, where)
        with run_as_atman(
            self.model,
            factors,
            settings.mode,
            settings.layers,
            settings.backend,
            attention=where if self._parts.chooses else None,
        ):
            yield

    def _in_heads(
        self, chosen: Sequence[int], factors: Mapping[str, Tensor], where: Attention
    ) -> dict[str, Tensor]:
        """Factors ``[rows, H, tokens]``, 1 in heads that are not chosen."""
        _, named = named_sites(self.model, factors, where if self._parts.chooses else None)
        found: dict[str, Tensor] = {}
        for source, factor in factors.items():
            counts = sorted({site.stack.heads for site, _ in named if site.source == source})
            if len(counts) > 1:
                raise ValueError(
                    f"heads must be the same wherever the {source} is read, but "
                    f"{type(self.model).__name__} has {' and '.join(map(str, counts))} there; "
                    "choose attention='encoder' or attention='cross'."
                )
            found[source] = factor[:, None].expand(-1, *counts, -1).clone()
            found[source][:, [head for head in range(*counts) if head not in chosen]] = 1.0
        return found

    @contextmanager
    def _logits_from(self, row: int) -> Iterator[None]:
        """Let the decoder make logits of its rows from one on only, where it is known how."""
        head = self._parts.head
        if head is None or "target_logits" in self._settings.without:
            yield
            return

        def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][:, row:], *args[1:])

        hook = head.register_forward_pre_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    def _ids(self, one: Pass) -> Tensor:
        """What the decoder reads in each lane, padded behind: ``[L, T]``."""
        start, reads = self._parts.start, [self._lanes[lane].read for lane in one.lanes]
        longest = max(map(len, reads))
        # Whatever stands behind an answer, no row of the answer sees it.
        ids = [[*start, *read, *[start[0]] * (longest - len(read))] for read in reads]
        return torch.tensor(ids, device=self._device)

    def _decoder_factors(self, one: Pass, factors: Tensor) -> Tensor:
        """Of the columns that the decoder reads: ``[rows · L, T]``, lane by lane in each row."""
        first, start = self._edges[-1], len(self._parts.start)
        shape = len(one.rows), len(one.lanes), self._plan.width(one)
        own = torch.ones(shape)
        own[:, :, :start] = factors[:, None, first : first + start]
        for place, lane in enumerate(one.lanes):
            branch = self._lanes[lane].targets[0] if one.branch is None else one.branch
            read = len(self.targets[branch]) - 1
            behind = range(self.prompt_tokens, self.prompt_tokens + read)
            columns = self._branches.columns(branch, behind)
            own[:, place, start : start + read] = factors[:, columns]
        return own.flatten(0, 1)

    # --- units -----------------------------------------------------------------------------------

    def _columns(self, unit: Unit) -> list[int]:
        return self._branches.columns(unit.branch, sorted(unit.positions))

    def _factors(self, columns: Sequence[int]) -> Tensor:
        """``[S]`` float32 while the unit in these columns is suppressed."""
        if self._correlated is not None:
            return self._correlated.row(columns)
        factors = torch.ones(self._branches.length)
        factors[list(columns)] = self._settings.factor
        return factors

    def _first_stage(self, factors: Tensor, where: Attention) -> int:
        """The first stage that a row of factors ``[S]`` changes; past the last one if none."""
        if "shared_prefix" in self._settings.without:
            return 0
        touched = [bool(factors[a:b].ne(1).any()) for a, b in pairwise(self._edges)]
        for index in range(len(touched)):
            across = index > 0 and touched[index - 1] and where != "encoder"
            if across or (touched[index] and where != "cross"):
                return index
        return len(touched)

    def _neighbourhoods(self, read: Sequence[Tensor]) -> Correlated | None:
        """What is suppressed along with what; None where units are suppressed alone."""
        settings = self._settings
        if settings.similarity is None:
            return None
        shown = [
            torch.ones(len(own), dtype=torch.bool)
            if stage.padding is None
            else stage.padding[0].cpu()
            for stage, own in zip(self._parts.stages, read, strict=True)
        ]
        rest = self._branches.length - self._edges[-1]
        shown.append(torch.ones(rest, dtype=torch.bool))
        vectors = self._parts.embeddings(read, self._branches.read_ids)
        return Correlated(
            lambda: vectors,
            self._branches.owners,
            torch.cat(shown),
            settings.factor,
            settings.similarity,
            settings.rule,
        )

    def _count(self, rows: int, tokens: int) -> None:
        """Note a finished pass of so many rows, and of so many tokens in all."""
        self.record.batch_sizes.append(rows)
        self.record.tokens += tokens

    def _note_full(self) -> None:
        """Note that perturbations ran through the encoder."""
        if "full" not in self.record.runners:
            self.record.runners.append("full")
            self.record.reasons.append("units are suppressed in the encoder, which runs again")
