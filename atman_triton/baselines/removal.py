"""Pieces of a prompt taken out of a model's input, many variants in few passes.

Legend: N variants, K targets, M scored tokens, T of one target, L tokens of a shortened prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..inputs import TOKEN_TYPES, continued, moved
from ..pieces import Box
from ..tasks.decoder import DecoderTask
from .painting import images_of, mean_colour, paint, with_images

if TYPE_CHECKING:
    from .case import Case

_COUNT_TOKENS = TOKEN_TYPES | {"input_ids", "attention_mask", "position_ids"}


class Variant(NamedTuple):
    """A prompt with some of its units removed.

    Args:
        units: Which.
        kept: Positions of the prompt that stay: all but the removed text.
        ids: Their token ids; one that says nothing where none stays.
        painted: What of which picture is painted over.
    """

    units: frozenset[int]
    kept: list[int]
    ids: list[int]
    painted: list[tuple[int, Box]]


class Removal:
    """Variants of one prompt; see ``Case.without``."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._kind = str(getattr(case.model.config, "model_type", ""))
        original: Any = getattr(case.model, "_orig_mod", case.model)
        self._places = "position_ids" in inspect.signature(original.forward).parameters
        # reading a prompt anew must not forget the pictures that the case has encoded
        self._reader = DecoderTask(case.task.model, case.task.processor)

    def logprobs(self, removed: Sequence[Collection[int]]) -> Tensor:
        """``[N, M]`` float32."""
        case = self.case
        several = [self._variant(units) for units in dict.fromkeys(map(frozenset, removed))]
        found = {each.units: torch.empty(len(case.base_logprobs)) for each in several}
        for k, target in enumerate(case.targets):
            more = [*case.context, *target[:-1]]
            case.expect(sum(len(each.ids) + len(more) for each in several))
            for group in self._groups(several, len(more)):
                inputs = moved(self._inputs(group, more), case.device)
                output = case.model(**inputs, use_cache=False, **case.keep(len(target)))
                case.count(1, sum(len(each.ids) + len(more) for each in group))
                rows = case.rows[k]
                for each, own in zip(group, case.scored(output.logits, k).cpu(), strict=True):
                    found[each.units][rows.start : rows.stop] = own
        return torch.stack([found[frozenset(units)] for units in removed])

    def _variant(self, units: frozenset[int]) -> Variant:
        own, words = self.case.units, self.case.prompt.words
        gone = {place for u in units if own[u].image is None for place in own[u].tokens}
        kept = [place for place in range(len(words)) if place not in gone]
        ids = [words.ids[place] for place in kept] or [self._nothing()]
        painted = [box for u in sorted(units) for box in self._boxes(u)]
        return Variant(units, kept, ids, painted)

    def _boxes(self, unit: int) -> list[tuple[int, Box]]:
        """Where a unit stands on which picture."""
        own = self.case.units[unit]
        return [] if own.image is None else [(own.image, box) for box in own.boxes]

    def _nothing(self) -> int:
        """A token that stands for an empty prompt."""
        config = self.case.model.config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
        raise ValueError(
            "removed must leave a token of the prompt, as the model's config names no start, end "
            "or padding token to stand for an empty one."
        )

    def _groups(self, several: Sequence[Variant], more: int) -> Iterator[list[Variant]]:
        """Variants that go through the model together, the short ones first.

        With pictures, only those that keep the same text; else any, shorter ones padded.
        """
        pictures = bool(self.case.prompt.pictures)
        order = sorted(several, key=lambda each: (len(each.ids), each.kept, sorted(each.units)))
        most = memory.tokens_per_batch(self.case.device)
        group: list[Variant] = []
        for each in order:
            full = (len(group) + 1) * (len(each.ids) + more) > most
            if group and (full or (pictures and group[0].kept != each.kept)):
                yield group
                group = []
            group.append(each)
        if group:
            yield group

    def _inputs(self, group: Sequence[Variant], more: Sequence[int]) -> dict[str, Any]:
        """What the model's forward takes for some variants, with tokens behind them."""
        if self.case.prompt.pictures:
            return _stacked([continued(self._reread(each), more, self._kind) for each in group])
        longest = max(len(each.ids) for each in group)
        padding = [longest - len(each.ids) for each in group]
        rows = [[0] * pad + [*each.ids, *more] for pad, each in zip(padding, group, strict=True)]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(rows)}
        if any(padding):
            shown = torch.ones_like(inputs["input_ids"])
            for row, pad in zip(shown, padding, strict=True):
                row[:pad] = 0
            inputs["attention_mask"] = shown
            if self._places:
                inputs["position_ids"] = (shown.cumsum(1) - 1).clamp(min=0)
        return inputs

    def _reread(self, variant: Variant) -> dict[str, Any]:
        """What the model takes for the prompt with its pictures painted and text deleted."""
        prompt = self.case.prompt
        inputs = prompt.inputs
        if variant.painted:
            images = images_of(prompt.raw)
            for image, box in variant.painted:
                paint(images[image], box, self._means[image])
            own = self._reader.read(with_images(prompt.raw, iter(images)))
            if own.words.ids != prompt.words.ids:
                raise ValueError("a painted picture is read in other tokens than the picture.")
            inputs = own.inputs
        tokens = len(prompt.words)
        if len(variant.ids) == tokens:
            return inputs
        return {name: _cut(name, value, variant.kept, tokens) for name, value in inputs.items()}

    @cached_property
    def _means(self) -> list[tuple[int, int, int]]:
        return [mean_colour(image) for image in images_of(self.case.prompt.raw)]


def _cut(name: str, value: Any, kept: Sequence[int], tokens: int) -> Any:
    """An input that counts the prompt's tokens, for those that are kept; others as they are."""
    if not isinstance(value, Tensor) or name not in _COUNT_TOKENS:
        return value
    places = torch.tensor(kept, dtype=torch.long)
    if name == "position_ids":  # what follows moves up
        return value[..., : len(kept)]
    return value.index_select(1, places)


def _stacked(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of several rows as those of one batch."""
    first = several[0]
    if len(several) == 1:
        return first
    return {
        name: torch.cat([each[name] for each in several]) if isinstance(value, Tensor) else value
        for name, value in first.items()
    }
