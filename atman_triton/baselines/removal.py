"""Pieces of a prompt taken out of a model's input, many variants in few passes.

Legend: N variants, K targets, M scored tokens, T of one target, L tokens of a shortened prompt with
a target behind it, B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import memory, multimodal
from ..capabilities import keeps_logits
from ..encoded_once import EncodedOnce
from ..inputs import TOKEN_TYPES, continued, moved
from ..pieces import Box
from ..stacks import UnsupportedModelError
from .painting import images_of, mean_colour, painted, with_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from .case import Case, Scored

_COUNT_TOKENS = TOKEN_TYPES | {"input_ids", "attention_mask"}


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
        self._prepared = set(case.prompt.inputs) != {"input_ids"}
        """Whether a processor made the inputs, which then hold more than ids."""

    def scores(self, removed: Sequence[Collection[int]], output: Scored) -> Tensor:
        """``[N, M]`` float32."""
        case = self.case
        several = [self._variant(units) for units in dict.fromkeys(map(frozenset, removed))]
        found = {each.units: torch.empty(len(case.base_logprobs)) for each in several}
        behind = [[*case.context, *target[:-1]] for target in case.targets]
        case.expect(sum(len(each.ids) + len(more) for each in several for more in behind))
        pending = self._groups(several, max(map(len, behind)))
        while pending:
            group = pending.pop(0)
            try:
                scored = self._run(group, behind, output)
            except (RuntimeError, MemoryError) as error:
                if len(group) == 1 or not memory.out_of_memory(error):
                    raise
            else:
                for each, own in zip(group, scored, strict=True):
                    found[each.units] = own
                for more in behind:
                    case.count_all([len(each.ids) + len(more) for each in group])
                continue
            # Outside the except block, so that the failed pass's tensors are gone by now.
            half = len(group) // 2
            pending = [group[:half], group[half:], *pending]
        rows = [found[frozenset(units)] for units in removed]
        return torch.stack(rows) if rows else torch.empty(0, len(case.base_logprobs))

    def _run(
        self, group: Sequence[Variant], behind: Sequence[Sequence[int]], output: Scored
    ) -> Tensor:
        """``[B, M]`` of one batch, on the CPU; its pictures are encoded once for all targets."""
        case = self.case
        read = self._read(group)
        encoded, scored = EncodedOnce(), []
        for k, more in enumerate(behind):
            lengths = [len(each.ids) + len(more) for each in group]
            inputs = moved(self._behind(group, read, more), case.device)
            wanted = len(case.targets[k])
            keep = max(lengths) - min(lengths) + wanted
            with encoded.on(case.model):
                logits = case.model(**inputs, use_cache=False, **case.keep(keep)).logits
            ends = torch.tensor(lengths, device=logits.device) - max(lengths) + logits.shape[1]
            columns = ends[:, None] + torch.arange(-wanted, 0, device=logits.device)  # [B, T]
            rows = torch.arange(len(group), device=logits.device)[:, None]
            scored.append(case.scored(logits[rows, columns], k, output).float().cpu())
        return torch.cat(scored, 1)

    # --- which variants there are -----------------------------------------------------------------

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
            token = getattr(config.get_text_config(), name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
        raise ValueError(
            "removed must leave a token of the prompt, as the model's config names no start, end "
            "or padding token to stand for an empty one."
        )

    def _groups(self, several: Sequence[Variant], more: int) -> list[list[Variant]]:
        """Variants that go through the model together, the short ones first.

        What a processor prepared has one length in a group; text has any, so that few tokens are
        put behind the short ones.
        """
        free = memory.free_memory(self.case.model)
        groups: list[list[Variant]] = []
        for each in sorted(several, key=lambda each: len(each.ids)):
            if groups and self._fits(groups[-1], each, more, free):
                groups[-1].append(each)
            else:
                groups.append([each])
        return groups

    def _fits(self, group: list[Variant], longer: Variant, more: int, free: int | None) -> bool:
        """Whether a variant goes along with shorter ones, so many tokens behind each."""
        shortest, length = len(group[0].ids), len(longer.ids) + more
        if self._prepared and shortest != len(longer.ids):
            return False
        rows = memory.tokens_per_batch(self.case.device) // length
        if free is not None:
            kept = keeps_logits(self.case.model)
            logits = length - shortest + 1 if kept else length
            row = memory.bytes_per_row(self.case.model, length, logits, length)
            rows = min(rows, int(free * memory.SHARE) // row)
        return len(group) < rows

    # --- what the model reads ---------------------------------------------------------------------

    def _read(self, group: Sequence[Variant]) -> dict[str, Any] | None:
        """The prompts of a group as a processor prepares them; None where it is text alone."""
        return _stacked([self._reread(each) for each in group]) if self._prepared else None

    def _behind(
        self, group: Sequence[Variant], read: dict[str, Any] | None, more: Sequence[int]
    ) -> dict[str, Any]:
        """What the model's forward takes for a group with tokens behind each prompt.

        Shorter rows are filled up behind their last token, which text in front does not see: so
        positions, windows and biases are those of the row alone, and no mask is needed.
        """
        if read is not None:
            return continued(read, more, self._kind)
        rows = [[*each.ids, *more] for each in group]
        longest = max(map(len, rows))
        return {"input_ids": torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])}

    def _reread(self, variant: Variant) -> dict[str, Any]:
        """What the model takes for one prompt with its pictures painted and text deleted."""
        inputs = self._repainted(variant) if variant.painted else self.case.prompt.inputs
        if len(variant.kept) == len(self.case.prompt.words):
            return inputs
        kept = torch.tensor(variant.kept or [0])
        cut = {name: _cut(name, value, kept) for name, value in inputs.items()}
        cut["input_ids"] = cut["input_ids"].new_tensor(variant.ids)[None]
        return cut

    def _repainted(self, variant: Variant) -> dict[str, Any]:
        """What the processor makes of the prompt with its pictures painted."""
        prompt, task = self.case.prompt, self.case.task
        boxes: dict[int, list[Box]] = {}
        for image, box in variant.painted:
            boxes.setdefault(image, []).append(box)
        images = [
            painted(image, boxes[index], self._means[index]) if index in boxes else image
            for index, image in enumerate(self._images)
        ]
        if self._reads_images_alone:
            alone = self._seen(images)
            if all(_alike(value, prompt.inputs[name]) for name, value in alone.items()):
                return {**prompt.inputs, **alone}
        inputs = multimodal.prepared(
            with_images(prompt.raw, iter(images)), task.model, task.processor
        )
        if not torch.equal(inputs["input_ids"], prompt.inputs["input_ids"]):
            raise UnsupportedModelError(
                f"{type(task.processor).__name__} reads a painted picture as other tokens than "
                "the picture itself, so patches cannot be removed from its prompts."
            )
        return inputs

    @cached_property
    def _reads_images_alone(self) -> bool:
        """Whether the processor's part for pictures makes of them what the whole processor made.

        It is then asked for every variant: the text need not be read again, the rest is the same.
        """
        inputs = self.case.prompt.inputs
        if getattr(self.case.task.processor, "image_processor", None) is None:
            return False
        try:
            alone = self._seen(self._images)
        except (TypeError, ValueError):  # it wants them in another form
            return False
        known = all(
            _alike(value, inputs.get(name)) and torch.equal(value, inputs[name])
            for name, value in alone.items()
        )
        return known and set(inputs) - set(alone) <= _COUNT_TOKENS

    def _seen(self, images: Sequence[Image]) -> dict[str, Any]:
        """What the processor's part for pictures gives."""
        task = self.case.task
        encoding = task.processor.image_processor(images=list(images), return_tensors="pt")
        return multimodal.moved(encoding, task.model)

    @cached_property
    def _images(self) -> list[Image]:
        return images_of(self.case.prompt.raw)

    @cached_property
    def _means(self) -> list[tuple[int, int, int]]:
        return [mean_colour(image) for image in self._images]


def _cut(name: str, value: Any, kept: Tensor) -> Any:
    """An input that counts the prompt's tokens, for those that are kept; others as they are."""
    if name == "position_ids":
        raise UnsupportedModelError(
            "the processor numbers the tokens of a prompt itself, so which numbers they have once "
            "some are deleted is not known."
        )
    return value.index_select(1, kept.to(value.device)) if name in _COUNT_TOKENS else value


def _alike(value: Any, other: Any) -> bool:
    """Whether two inputs are tensors of one shape."""
    tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
    return tensors and value.shape == other.shape


def _stacked(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of several prompts as those of one batch."""
    if len(several) == 1:
        return dict(several[0])
    return {name: _joined([each[name] for each in several]) for name in several[0]}


def _joined(values: Sequence[Any]) -> Any:
    """One input of several prompts: tensors and lists one after the other, settings as they are."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    return [item for value in values for item in value] if isinstance(first, list) else first
