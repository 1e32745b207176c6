"""Runs a decoder that attends to pictures beside its prompt (Mllama), once per perturbation.

The vision tower runs once; every perturbation reads what it made and runs the whole text, since
its cross-attention layers keep no prefix. The prompt's tokens are those of the pictures, one after
the other, then those of the text.

Legend: U units, K targets, M scored tokens, N image tokens, P prompt tokens, S text columns, T
tokens of a target, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import gradients, memory
from .batches import in_batches
from .capabilities import device_of, dtype_of, text_config
from .embedded import expanded
from .inputs import continued
from .integration import UnsupportedModelError, run_as_atman
from .perturbations import Effect, Near, Record, Settings, Unit
from .plan import Batch
from .runner import check_nan, target_logprobs
from .scored import check_base, rows_of, stands_before, timed
from .stacks import find_stack

_STATES = "cross_attention_states"
_PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class BesideEngine:
    """One prompt with pictures and its targets, of which any units can be suppressed.

    Args:
        model: An Mllama, in evaluation mode (see ``undisturbed``).
        inputs: What its forward takes for the prompt, pictures among it.
        image_tokens: ``N``.
        targets: ``K`` sequences of token ids to score behind the prompt.
        settings: How to perturb.
        expect: Called with the number of tokens that will be run, once it is known.
        advance: Called with the number of tokens that each finished batch ran.
    Raises:
        RunFailed: if the model gives NaN, or no chance at all to a target token.
        UnsupportedModelError: if similar tokens are to be suppressed too, or gradients taken.
        torch.OutOfMemoryError: if not even one row fits; with a fixed batch size, if one batch
            does not.
    """

    shares_prefix = False
    """There are no direct effects: cross-attention keeps no prefix to read."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        image_tokens: int,
        targets: Sequence[Sequence[int]],
        settings: Settings,
        expect: Callable[[int], None] = lambda tokens: None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model = model
        self.device = device_of(model)
        self.settings = settings
        self.expect, self.advance = expect, advance
        self.targets = [tuple(target) for target in targets]
        self.rows = rows_of(self.targets)  # of each target, its rows among the M
        self.record = Record(runners=["full"])
        self.record.reasons.append(f"{self._name} attends to pictures beside its prompt")
        self._refuse()
        self._images = image_tokens
        self._text = inputs["input_ids"].shape[1]
        self._inputs = dict(inputs)
        self.length = image_tokens + self._text + max(map(len, self.targets)) - 1
        expect(sum(self._length(k) for k in range(len(self.targets))))
        with timed(self.record):
            base = torch.cat([self._run(k, [()])[0] for k in range(len(self.targets))])
        self.base_logprobs = base
        """``[M]`` float32, nats: nothing suppressed, one target after the other."""
        check_base(base, dtype_of(model))

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _refuse(self) -> None:
        for what, given in (
            ("similarity", self.settings.similarity is not None),
            ("a method that takes gradients", self.settings.gradients),
        ):
            if given:
                raise UnsupportedModelError(
                    f"{what} is not supported for {self._name}, which attends to pictures beside "
                    "its prompt; take method='exact' without similarity."
                )

    def perturb(self, units: Sequence[Unit], effect: Effect = "total") -> Tensor:
        """Log-probabilities of all scored tokens with each unit suppressed in turn.

        Args:
            units: What to suppress.
            effect: ``total``: in every row of every layer that reads it.
        Returns: ``[U, M]`` float32, nats; NaN where a unit does not stand before the scored token
            in the token's own target.
        Raises: UnsupportedModelError: if the direct effect is asked for.
        """
        if effect == "direct":
            raise UnsupportedModelError(
                f"method='direct' keeps the prompt's keys and values of the base run, but "
                f"{self.record.reasons[0]}; use method='exact'."
            )
        result = torch.full((len(units), len(self.base_logprobs)), torch.nan)
        with timed(self.record):
            for k, own in enumerate(self.rows):
                mine = [u for u, unit in enumerate(units) if unit.branch in (None, k)]
                self.expect(len(mine) * self._length(k))

                found = torch.empty(len(mine), len(own))
                in_batches(
                    self, len(mine), self._rows_per_batch(), self._filling(found, k, mine, units)
                )
                check_nan(found, dtype_of(self.model))
                if mine:
                    result[torch.tensor(mine)[:, None], torch.tensor(own)] = found
        self.record.runs["total"] += len(units)
        before = stands_before(units, self.rows, self._images + self._text, max)
        return result.masked_fill_(~before, torch.nan)

    def neighbours(self, unit: Unit) -> list[Near]:
        """None: units are suppressed alone."""
        return []

    def attribute(self, units: Sequence[Unit], steps: int | None) -> gradients.Attribution:
        """Refused, when the engine is made."""
        raise UnsupportedModelError(f"gradients are not supported for {self._name}.")

    # --- runs ------------------------------------------------------------------------------------

    def _filling(
        self, found: Tensor, k: int, mine: Sequence[int], units: Sequence[Unit]
    ) -> Callable[[Sequence[int]], None]:
        """What runs some of the units for a target and puts them where they belong in ``found``."""

        def run(chosen: Sequence[int]) -> None:
            found[list(chosen)] = self._run(k, [units[mine[row]].positions for row in chosen])

        return run

    def _length(self, k: int) -> int:
        """Tokens of a pass for one target."""
        return self._images + self._text + len(self.targets[k]) - 1

    def _run(self, k: int, columns: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of one target with some tokens suppressed in each row: ``[B, T]``."""
        rows, target = len(columns), self.targets[k]
        factors = torch.ones(rows, self._length(k))
        for factor, own in zip(factors, columns, strict=True):
            factor[list(own)] = self.settings.factor
        given = continued(self._inputs, target[:-1], "mllama")
        wide = {name: expanded(value, rows) for name, value in given.items()}
        if _STATES in given:
            wide[_STATES] = given[_STATES].repeat(rows, 1, 1)  # [B · images · tiles, patches, D]
        with self._manipulated(factors.to(self.device)), self._keeping_states():
            output = self.model(**wide, use_cache=False, logits_to_keep=len(target))
        places = torch.arange(len(target), device=self.device)
        found = target_logprobs(output.logits, places, torch.tensor(target)).cpu()
        self.advance(factors.numel())
        self.record.batch_sizes.append(rows)
        self.record.tokens += factors.numel()
        return found

    def _manipulated(self, factors: Tensor) -> Any:
        """The model with its scores manipulated by factors ``[B, N + S]``."""
        settings = self.settings
        if settings.heads is not None:
            heads = find_stack(self.model)[1].heads
            factors = factors[:, None].expand(-1, heads, -1).clone()
            factors[:, [head for head in range(heads) if head not in settings.heads]] = 1.0
        parts = {"image": factors[..., : self._images], "decoder": factors[..., self._images :]}
        return run_as_atman(self.model, parts, settings.mode, settings.layers, settings.backend)

    @contextmanager
    def _keeping_states(self) -> Iterator[None]:
        """Keep what the vision tower makes of the pictures in the first pass, for all others."""
        if _STATES in self._inputs:
            yield
            return

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            text = {name: self._inputs[name] for name in self._inputs if name not in _PICTURES}
            self._inputs = text | {_STATES: kwargs[_STATES]}

        hook = find_stack(self.model)[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    # --- choices ---------------------------------------------------------------------------------

    def _rows_per_batch(self) -> int:
        size = self.settings.batch_size
        if size != "auto":
            return size
        most = max(1, memory.tokens_per_batch(self.device) // self.length)
        free = memory.free_memory(self.model)
        if free is None:
            return most
        itemsize = dtype_of(self.model).itemsize
        row = memory.layer_bytes(text_config(self.model), itemsize, self.length, self.length)
        return max(1, min(most, int(free * memory.SHARE) // row))

    def smaller(self, batch: Batch, refused: str) -> int:
        """The most tokens of a batch to go on with after ``batch`` did not fit."""
        if self.settings.batch_size != "auto" or len(batch.rows) == 1:
            raise torch.OutOfMemoryError(
                f"{len(batch.rows)} rows of {self.length} tokens do not fit in memory: lower "
                f"batch_size, shorten the prompt or free some memory. ({refused})"
            )
        return len(batch.rows) // 2 * self.length
