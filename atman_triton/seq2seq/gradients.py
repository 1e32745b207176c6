"""One answer of an encoder-decoder, run whole: encoders, decoder and all.

That is what ``gradients`` takes slopes from: every factor moves, so nothing of the base run stays.

Legend: B rows, M scored tokens, S columns: the prompt's, then those of the answer before its last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..perturbations import Record, Settings
from ..plan import Batch
from ..runner import target_logprobs
from .encoder_decoder import EncoderDecoder, layers_of


class WholeRuns:
    """Answers that read the same tokens, which are of one target unless there are none.

    Args:
        model: An encoder-decoder in evaluation mode.
        parts: Its parts.
        edges: Of each source, its first column, and where the decoder's start tokens begin.
        read: What the decoder reads behind the start tokens.
        scored: ``M`` pairs: the place behind the last start token that predicts, and the token id.
        base: ``[M]`` float32, nats: nothing suppressed.
        settings: How to perturb.
        manipulated: Runs in it feel factors of sources.
        record: What is done is noted here.
        expect: Called with the number of tokens that will be run.
        advance: Called with the number of tokens that each finished batch ran.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: EncoderDecoder,
        edges: Sequence[int],
        read: Sequence[int],
        scored: Sequence[tuple[int, int]],
        base: Tensor,
        settings: Settings,
        manipulated: Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]],
        record: Record,
        expect: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> None:
        self.model = model
        self.base = base
        self.settings = settings
        self.record = record
        self.expect, self.advance = expect, advance
        self._parts, self._edges = parts, list(edges)
        self._manipulated = manipulated
        self.device = next(model.parameters()).device
        self._ids = torch.tensor([[*parts.start, *read]], device=self.device)
        places, ids = zip(*scored, strict=True)
        self._places, self._scored = torch.tensor(places), torch.tensor(ids)

    @property
    def length(self) -> int:
        """``S``."""
        return self._edges[-1] + self._ids.shape[1]

    @property
    def layers(self) -> list[nn.Module]:
        """Those of every encoder, then the decoder's."""
        modules = [*(stage.module for stage in self._parts.stages), self._parts.decoder]
        return [layer for module in modules for layer in layers_of(module)]

    @property
    def config(self) -> Any:
        """The decoder's configuration."""
        return self._parts.decoder.config

    def manipulated(self, factors: Tensor) -> AbstractContextManager[Any]:
        """Runs in it feel factors ``[B, S]``."""
        edges = [*self._edges, self.length]
        names = [*(stage.source for stage in self._parts.stages), "decoder"]
        spans = zip(names, pairwise(edges), strict=True)
        return self._manipulated({name: factors[:, a:b] for name, (a, b) in spans})

    def run_factors(self, factors: Tensor) -> Tensor:
        """Rows with factors ``[B, S]``: ``[B, M]`` on the CPU."""
        rows = len(factors)
        with self.manipulated(factors.to(self.device)):
            found = self.logprobs_of(range(len(self.base)), rows).cpu()
        self.advance(rows * self.length)
        self.count(rows, self.length)
        return found

    def logprobs_of(self, scored: Sequence[int], rows: int) -> Tensor:
        """``[B, scored]`` of a run in ``manipulated``, neither moved nor counted."""
        states = None
        for stage in self._parts.stages:
            states = stage.encode(rows, states)
        assert states is not None  # there is a stage
        logits = self._parts.decode(self._ids.expand(rows, -1), states, None)
        logits = logits[:, len(self._parts.start) - 1 :]
        chosen = list(scored)
        places = self._places[chosen].to(logits.device)
        return target_logprobs(logits, places, self._scored[chosen])

    def count(self, rows: int, tokens: int) -> None:
        """Note a finished forward pass."""
        self.record.batch_sizes.append(rows)
        self.record.tokens += rows * tokens

    def bytes_per_row(self) -> int:
        """A rough estimate of what a forward pass takes for a row."""
        keys = max(b - a for a, b in pairwise([*self._edges, self.length]))
        return memory.bytes_per_row(self.model, self.length, self._ids.shape[1], keys)

    def smaller(self, batch: Batch, refused: str) -> int:
        """The most tokens of a batch to go on with after ``batch`` did not fit."""
        if len(batch.rows) == 1:
            raise nothing_fits(refused)
        if self.settings.batch_size != "auto":
            raise does_not_fit(len(batch.rows), refused)
        return len(batch.rows) // 2 * self.length


def does_not_fit(rows: int, refused: str) -> torch.OutOfMemoryError:
    """The error for a batch size that was asked for."""
    return torch.OutOfMemoryError(
        f"batch_size {rows} does not fit in memory: lower it or use batch_size='auto'. ({refused})"
    )


def nothing_fits(refused: str) -> torch.OutOfMemoryError:
    """The error for a perturbation that does not fit by itself."""
    return torch.OutOfMemoryError(
        "not even one perturbation fits in memory: shorten the prompt, use a smaller dtype or free "
        f"some memory. ({refused})"
    )
