"""Runs a model once per perturbation and does only the work that the result needs.

Four savings, none of which changes a number: logits at target positions only; perturbations in
batches; a shared prefix (what stands before the first suppressed token is run once); and many
targets behind one prompt. A perturbation is run in one of two ways: *total*, suppressed in every
row, or *direct*, suppressed only in the rows that predict the targets.

Legend: U units, K targets, M scored tokens of all targets, S input columns, P prompt tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import gradients
from .branches import Branches
from .capabilities import dtype_of, why_not_branches, why_not_prefix
from .perturbations import SAVINGS, Effect, Near, Record, RunFailed, Settings, Unit
from .products import fast_products
from .runner import NotSideBySide, Runner, check_nan
from .scored import check_base, rows_of, stands_before, timed
from .stacks import find_stack

__all__ = [
    "SAVINGS",
    "Effect",
    "Engine",
    "Near",
    "Record",
    "RunFailed",
    "Settings",
    "Unit",
    "undisturbed",
]


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
        self._settings = settings
        self.targets = [tuple(target) for target in targets]
        self.rows = rows_of(self.targets)  # of each target, its rows among the M
        prompt = inputs["input_ids"].shape[1]
        self.prompt_tokens = prompt

        def start(chosen: list[int]) -> Runner:
            branches = Branches(prompt, tuple(self.targets[k] for k in chosen))
            return Runner(model, inputs, branches, chosen, settings, self.record, expect, advance)

        with timed(self.record):
            try:
                self._runners = [start(c) for c in self._partition(model, inputs, settings)]
            except NotSideBySide as error:
                self._runners = [start(c) for c in self._apart(str(error))]
        base = torch.cat([each.base for each in self._runners])
        order = [row for each in self._runners for k in each.chosen for row in self.rows[k]]
        self.base_logprobs = torch.empty_like(base)
        """``[M]`` float32, nats: nothing suppressed, one target after the other."""
        self.base_logprobs[order] = base
        check_base(self.base_logprobs, dtype_of(model))

    @property
    def shares_prefix(self) -> bool:
        """Whether perturbations read the base run's keys, so that there are direct effects."""
        return all(each.reason is None for each in self._runners)

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
        with timed(self.record):
            for each in self._runners:
                mine = [u for u, unit in enumerate(units) if each.reads(unit)]
                found = each.perturb([units[u] for u in mine], effect)  # [mine, M of the pass]
                if mine:
                    rows = [row for k in each.chosen for row in self.rows[k]]
                    result[torch.tensor(mine)[:, None], torch.tensor(rows)] = found
        return result.masked_fill_(~self._before(units, max), torch.nan)

    def neighbours(self, unit: Unit) -> list[Near]:
        """What is suppressed along with a unit: of the prompt, then of each target, in order.

        Empty without ``Settings.similarity``. The prompt is the same for all targets, and targets
        that a piece of another one cannot reach are left out.
        """
        readers = [each for each in self._runners if each.reads(unit)]
        if len(readers) == 1:
            return readers[0].neighbours(unit)
        found = {
            (-1 if near.branch is None else near.branch, near.position): near
            for each in reversed(readers)
            for near in each.neighbours(unit)
        }
        return [found[place] for place in sorted(found)]

    def attribute(self, units: Sequence[Unit], steps: int | None) -> gradients.Attribution:
        """Scores from gradients on the line from no suppression to that of all units together.

        Needs ``Settings.gradients``, and gradients that can be enabled (no inference mode).

        Args:
            units: What to suppress; no token stands in two of them.
            steps: Of how many parts of the line the gradient is taken in the middle; None takes
                it with nothing suppressed, for the whole line.
        Returns: scores ``[U, M]``, and ``[M]`` log-probabilities with all units suppressed.
        Raises: UnsupportedModelError: if the model cannot be differentiated.
        """
        if not self._settings.gradients:
            raise ValueError("attribute needs an engine with Settings(gradients=True).")
        if self._settings.similarity is not None:
            raise ValueError("attribute suppresses units alone: Settings.similarity must be None.")
        measured, begun = self._before(units, max), self._before(units, min)  # [U, M]
        scores = torch.full(measured.shape, torch.nan)
        together = self.base_logprobs.clone()
        with timed(self.record):
            for each in self._runners:
                mine = [u for u, unit in enumerate(units) if each.reads(unit)]
                if not mine:
                    continue
                rows = torch.tensor([row for k in each.chosen for row in self.rows[k]])
                places = (torch.tensor(mine)[:, None], rows)
                found = gradients.attribute(
                    each,
                    each.columns([units[u] for u in mine]),
                    measured[places],
                    begun[places],
                    steps,
                )
                scores[places] = found.scores
                together[rows] = found.together
        check_nan(scores[measured], dtype_of(self._runners[0].model))
        return gradients.Attribution(scores, together)

    def _before(self, units: Sequence[Unit], end: Callable[[Sequence[int]], int]) -> Tensor:
        """Bool ``[U, M]``: the unit's last (or first) token is read before the scored one."""
        return stands_before(units, self.rows, self.prompt_tokens, end)

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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every module's own mode given back whatever happens.

    Also inside the user's inference mode, where no gradient to a factor could be taken.

    ``no_grad`` rather than ``inference_mode``: some models fill buffers on their first call, and
    buffers born in inference mode would break the user's own training later.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode(False), torch.no_grad(), fast_products(model):
            yield
    finally:
        for module in training:
            module.training = True
