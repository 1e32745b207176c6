"""Runs a classifier once per perturbation, as lean as a model without a prefix allows.

An encoder looks both ways, so a suppressed token changes everything: every perturbation runs over
the whole input. What is saved, without changing a number: words or patches are embedded once for
all runs, inputs are expanded, never copied, rows go through the model in batches, only the head's
output is kept, and all classes are read off the same one.

Legend: U units, K classes, M scored numbers (see ``Readout``), S tokens, B rows of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import gradients, memory
from .batches import in_batches
from .capabilities import device_of, dtype_of
from .classes import Readout
from .embedded import (
    as_read,
    catching,
    content_of,
    encoder_config,
    entry_of,
    expanded,
    in_columns,
    replayed,
)
from .integration import UnsupportedModelError, run_as_atman
from .perturbations import Effect, Near, Record, RunFailed, Settings, Unit
from .plan import Batch
from .runner import check_nan
from .scored import timed
from .stacks import find_stack
from .suppression import Correlated


class ClassifierEngine:
    """One input of a classifier, of which any units can be suppressed.

    Args:
        model: With a classification or regression head over one encoder (or decoder), in evaluation
            mode (see ``engine.undisturbed``). A compiled model runs uncompiled.
        inputs: What its forward takes: one row.
        tokens: ``S``, how many keys its attention layers see.
        readout: What is read off its logits.
        settings: How to perturb.
        expect: Called with the number of tokens that will be run, once it is known.
        advance: Called with the number of tokens that each finished batch ran.
    Raises:
        RunFailed: if the model gives NaN, or no chance at all to a class.
        UnsupportedModelError: if its attention cannot be manipulated, or it makes another number
            of tokens of its input.
        torch.OutOfMemoryError: if not even one row fits; with a fixed batch size, if one batch
            does not.
    """

    shares_prefix = False
    """There are no direct effects: no token is read by the head alone."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        tokens: int,
        readout: Readout,
        settings: Settings,
        expect: Callable[[int], None] = lambda tokens: None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.device, self.dtype = device_of(model), dtype_of(model)
        self.length = tokens
        self.readout = readout
        self.rows = readout.rows  # of each class, its rows among the M
        if self._alone:
            settings = replace(settings, batch_size=1)
        self.settings = settings
        self.expect, self.advance = expect, advance
        self.record = Record(runners=["full"], logits="classes")
        self.record.reasons.append(f"{type(self.model).__name__} reads its whole input at once")
        self._inputs = arguments_of(self.model, inputs)
        self._entry = entry_of(self.model)
        self._embedded: Tensor | None = None
        self.correlated: Correlated | None = None
        with timed(self.record):
            self.base_logprobs = self._base()
        """``[M]`` float32, nats (regression: the outputs): nothing suppressed."""
        _check(self.base_logprobs, self.dtype)

    def perturb(self, units: Sequence[Unit], effect: Effect = "total") -> Tensor:
        """The scored numbers with each unit suppressed in turn.

        Args:
            units: What to suppress.
            effect: ``total``: in every row of every layer.
        Returns: ``[U, M]`` float32, nats (regression: the outputs).
        Raises: UnsupportedModelError: if the direct effect is asked for.
        """
        if effect == "direct":
            raise UnsupportedModelError(
                f"method='direct' keeps the prompt's keys and values of the base run, but "
                f"{self.record.reasons[0]}; use method='exact'."
            )
        columns = [sorted(unit.positions) for unit in units]
        if self.correlated is not None:
            self.correlated.neighbourhoods(columns)  # all at once, in full blocks
        result = torch.empty(len(units), len(self.base_logprobs))
        self.expect(len(units) * self.length)

        def run(chosen: Sequence[int]) -> None:
            result[list(chosen)] = self.run_factors(self._factors([columns[u] for u in chosen]))
            self.record.runs[effect] += len(chosen)

        with timed(self.record):
            in_batches(self, len(units), self._rows_per_batch(), run)
        check_nan(result, self.dtype)
        return result

    def neighbours(self, unit: Unit) -> list[Near]:
        """What is suppressed along with a unit because it is like it, in the order of columns."""
        if self.correlated is None:
            return []
        own = sorted(unit.positions)
        (near,) = self.correlated.neighbourhoods([own])
        factors = self.correlated.row(own)[near.columns].tolist()
        found = zip(near.columns.tolist(), factors, near.similarity.tolist(), strict=True)
        return [
            Near(column, None, factor, similarity)
            for column, factor, similarity in found
            if column not in unit.positions
        ]

    def attribute(self, units: Sequence[Unit], steps: int | None) -> gradients.Attribution:
        """Scores from gradients on the line from no suppression to that of all units together.

        Args:
            units: What to suppress; no token stands in two of them.
            steps: Of how many parts of the line the gradient is taken in the middle; None takes
                it with nothing suppressed, for the whole line.
        Returns: scores ``[U, M]``, and ``[M]`` numbers with all units suppressed.
        Raises: UnsupportedModelError: if the model cannot be differentiated.
        """
        if self.settings.similarity is not None:
            raise ValueError("attribute suppresses units alone: Settings.similarity must be None.")
        columns = [sorted(unit.positions) for unit in units]
        all_rows = torch.ones(len(units), len(self.base), dtype=torch.bool)
        with timed(self.record):
            found = gradients.attribute(self, columns, all_rows, all_rows, steps)
        check_nan(found.scores, self.dtype)
        return found

    # --- runs ------------------------------------------------------------------------------------

    def run_factors(self, factors: Tensor) -> Tensor:
        """Rows with factors ``[B, S]``: the scored numbers, ``[B, M]`` on the CPU."""
        rows = len(factors)
        with self.manipulated(factors.to(self.device)):
            found = self._numbers(rows).cpu()
        self.advance(rows * self.length)
        self.count(rows, self.length)
        return found

    def logprobs_of(self, scored: Sequence[int], rows: int) -> Tensor:
        """``[B, scored]`` of a pass in ``manipulated``, neither moved nor counted."""
        return self._numbers(rows)[:, list(scored)]

    def count(self, rows: int, tokens: int) -> None:
        """Note a finished forward pass."""
        self.record.batch_sizes.append(rows)
        self.record.tokens += rows * tokens

    def _base(self) -> Tensor:
        """``[M]``; what the model embeds is kept from this run."""
        self.expect(self.length)
        content = None if self.settings.similarity is None else content_of(self.model)
        try:
            with (
                catching(content, copied=True) as contents,
                catching(self._entry) as embedded,
            ):
                found = self.run_factors(torch.ones(1, self.length))[0]
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            raise self._nothing_fits(str(error)) from error
        self._embedded = embedded.lasting
        if self._embedded is not None and self._embedded.shape[1] != self.length:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} makes {self._embedded.shape[1]} tokens of its "
                f"input, but {self.length} were expected."
            )
        if self.settings.similarity is not None:
            self.correlated = self._correlated(contents.lasting)
        return found

    def _correlated(self, content: Tensor | None) -> Correlated:
        """Neighbourhoods by what the model embeds, without positions."""
        if content is None:
            raise UnsupportedModelError(
                f"similarity compares embeddings, but those of {type(self.model).__name__} cannot "
                "be found; leave similarity out."
            )
        columns = in_columns(content, self.length)
        shown = torch.ones(self.length, dtype=torch.bool)
        if isinstance(mask := self._inputs.get("attention_mask"), Tensor):
            shown = mask[0].bool()
        settings = self.settings
        assert settings.similarity is not None
        owners = [-1] * self.length
        return Correlated(
            lambda: columns, owners, shown, settings.factor, settings.similarity, settings.rule
        )

    def _numbers(self, rows: int) -> Tensor:
        """A forward pass of equal rows: ``[B, M]``."""
        inputs = {name: expanded(value, rows) for name, value in self._inputs.items()}
        embedded = None if self._embedded is None else expanded(self._embedded, rows)
        with replayed(self._entry, embedded):
            logits = self.model(**inputs).logits
        if logits.dim() != (2 if self.readout.places is None else 3) or len(logits) != rows:
            shape = "[rows, classes]" if self.readout.places is None else "[rows, tokens, classes]"
            raise TypeError(
                f"{type(self.model).__name__} must give logits {shape}, got {list(logits.shape)}."
            )
        return self.readout(logits)

    @property
    def base(self) -> Tensor:
        """``base_logprobs``."""
        return self.base_logprobs

    @property
    def config(self) -> Any:
        """The configuration of the layers, which may be a part of the model's."""
        return encoder_config(self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the encoder (or decoder), in order."""
        count = self.config.num_hidden_layers
        for part in self.model.modules():
            if isinstance(part, nn.ModuleList) and len(part) == count:
                return list(part)
        raise UnsupportedModelError(
            f"{type(self.model).__name__}: its layers cannot be found, so its activations cannot "
            "be checkpointed; use method='exact'."
        )

    @contextmanager
    def manipulated(self, factors: Tensor) -> Iterator[None]:
        """Run the model as "atman", its scores manipulated by factors ``[B, S]``."""
        settings = self.settings
        if settings.heads is not None:
            heads = find_stack(self.model)[1].heads
            per_head = factors[:, None].expand(-1, heads, -1).clone()
            per_head[:, [head for head in range(heads) if head not in settings.heads]] = 1.0
            factors = per_head
        with run_as_atman(self.model, factors, settings.mode, settings.layers, settings.backend):
            yield

    def _factors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``[B, S]`` float32 on the CPU, of units given by their columns."""
        if self.correlated is not None:
            return torch.stack([self.correlated.row(columns) for columns in rows])
        factors = torch.ones(len(rows), self.length)
        for factor, columns in zip(factors, rows, strict=True):
            factor[list(columns)] = self.settings.factor
        return factors

    # --- batches ---------------------------------------------------------------------------------

    def _rows_per_batch(self) -> int:
        """As many as the free memory holds, up to where more bring no more speed."""
        size = self.settings.batch_size
        if "batching" in self.settings.without:
            return 1
        if size != "auto":
            return size
        most = max(1, memory.tokens_per_batch(self.device) // self.length)
        free = memory.free_memory(self.model)
        if free is None:
            return most
        return max(1, min(most, int(free * memory.SHARE) // self.bytes_per_row()))

    @property
    def _alone(self) -> bool:
        """Whether the model takes one row at a time: a decoder's head that cannot find its end."""
        config: Any = self.model.config
        config = config.get_text_config()
        decodes = "past_key_values" in inspect.signature(self.model.forward).parameters
        return decodes and getattr(config, "pad_token_id", None) is None

    def bytes_per_row(self) -> int:
        """A rough estimate of what one row takes."""
        return memory.layer_bytes(self.config, self.dtype.itemsize, self.length, self.length)

    def smaller(self, batch: Batch, refused: str) -> int:
        """The most tokens of a batch to go on with after ``batch`` did not fit."""
        if len(batch.rows) == 1:
            raise self._nothing_fits(refused)
        if self.settings.batch_size != "auto":
            raise torch.OutOfMemoryError(
                f"batch_size {len(batch.rows)} with {self.length} tokens each does not fit in "
                f"memory: lower it or use batch_size='auto'. ({refused})"
            )
        return len(batch.rows) // 2 * self.length

    def _nothing_fits(self, refused: str) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"not even one row of {self.length} tokens fits in memory: shorten the prompt, use a "
            f"smaller dtype or free some memory. ({refused})"
        )


def arguments_of(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a classifier's forward is called with: inputs where it is, numbers in its dtype."""
    device, dtype = device_of(model), dtype_of(model)
    found = {name: as_read(value, device, dtype) for name, value in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        found["use_cache"] = False
    return found | {"return_dict": True}


def _check(base: Tensor, dtype: torch.dtype) -> None:
    """Refuse base runs that cannot be explained."""
    check_nan(base, dtype)
    if not bool(base.isfinite().all()):
        raise RunFailed(
            f"the model gives a class probability 0, or an output that is not finite, in {dtype}: "
            "nothing to explain."
        )
