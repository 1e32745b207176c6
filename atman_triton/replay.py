"""Runs columns of one input through a model's own forward, behind a prefix that it has seen.

Inputs of text alone go to the model as they are, cut to the columns wanted. Where a model prepares
more in front of its text stack (images, multi-axis positions, masks), that is done once: what the
stack would get is caught, and each pass gets its columns of it.

Legend: P prompt tokens, S columns (see ``Branches``), B rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branches
from .capabilities import keeps_logits, text_config
from .inputs import continued, filled_up
from .integration import run_as_atman
from .layers import KEYWORD
from .masks import AttentionMask, cut_mask
from .prefix import PrefixCache
from .stacks import UnsupportedModelError, find_stack

_TEXT = frozenset({"input_ids", "attention_mask", "position_ids"})


class _Caught(BaseException):
    """Ends a forward pass at the text stack; no library's ``except Exception`` stops it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class Replay:
    """One input and its branches, of which any range of columns can be run.

    Args:
        model: A causal language model.
        inputs: What its forward takes for the prompt, with ``input_ids`` ``[1, P]``.
        branches: The targets behind it.
    Raises: ValueError: if ``inputs`` holds several rows or no ids.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], branches: Branches) -> None:
        self.model = model
        self.branches = branches
        self.keeps_logits = keeps_logits(model)
        self._kind = str(getattr(model.config, "model_type", ""))
        self._layers = int(text_config(model).num_hidden_layers)
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
            raise ValueError("inputs must hold input_ids of shape [1, tokens].")
        if ids.shape[1] != branches.prompt_tokens:
            raise ValueError(
                f"input_ids must hold the prompt's {branches.prompt_tokens} tokens, "
                f"got {ids.shape[1]}."
            )
        self.ids = torch.cat([ids, ids.new_tensor(branches.read_ids)[None]], 1)  # [1, S]
        padding = inputs.get("attention_mask")
        if padding is None and not branches.linear:
            padding = torch.ones_like(ids)  # else positions that start anew mean other sequences
        self._padding = filled_up(padding, len(branches.read_ids), 1)
        self._positions = self._positions_of(inputs)
        self._prepared = None if set(inputs) <= _TEXT else self._prepare(inputs)

    @property
    def prepared(self) -> bool:
        """Whether the model prepares more than ids, positions and a padding mask."""
        return self._prepared is not None

    @property
    def length(self) -> int:
        """``S``."""
        return self.branches.length

    def run(
        self,
        start: int,
        stop: int,
        rows: int,
        logits: int | None,
        *,
        cached: bool = True,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Logits of the last columns of a range, in as many equal rows as there are factors.

        Args:
            start: First column to run; those before it come from the store of the manipulation.
            stop: One past the last.
            rows: ``B``.
            logits: How many of the last columns need logits; None computes all.
            cached: Tell the model that a prefix was seen; False for a plain pass from 0.
            embeddings: ``[B, stop - start, D]``, which the text stack reads in place of its own.
        Returns: ``[B, logits, V]``, or more columns from a model that computes all.
        """
        arguments: dict[str, Any] = {"return_dict": True, "use_cache": cached}
        if cached:
            arguments["past_key_values"] = PrefixCache(start, self._layers)
        if logits is not None and self.keeps_logits:
            arguments["logits_to_keep"] = logits
        if self._positions is not None:
            arguments["position_ids"] = self._positions[..., start:stop]
        if self._prepared is not None:
            # Only their number counts, so the last one, which is text, stands in for all.
            arguments["input_ids"] = self.ids[:, -1:].expand(rows, stop - start)
            prepared = self._cut(self._prepared, start, stop, rows, arguments)
            if embeddings is not None:
                prepared["inputs_embeds"] = embeddings
            with self._prepared_stack(prepared):
                output = self.model(**arguments)
        else:
            arguments["input_ids"] = self.ids[:, start:stop].expand(rows, -1)
            if self._positions is not None:
                arguments["position_ids"] = arguments["position_ids"].expand(rows, -1)
            if self._padding is not None:
                arguments["attention_mask"] = self._padding[:, :stop].expand(rows, -1)
            with nullcontext() if embeddings is None else self._embedded_stack(embeddings):
                output = self.model(**arguments)
        found = output.logits
        least = 1 if logits is None else logits
        if found.dim() != 3 or found.shape[1] < least:
            raise TypeError(
                f"{type(self.model).__name__} must give logits [rows, tokens, vocabulary], "
                f"got {list(found.shape)}."
            )
        return found if logits is None else found[:, -logits:]

    def closed_start(self, column: int) -> int:
        """The last column up to ``column`` of which no column before it knows anything."""
        return self._borders[bisect_right(self._borders, column) - 1]

    def closed_stop(self, column: int) -> int:
        """The first column from ``column`` on of which no column before it knows anything."""
        return self._borders[bisect_left(self._borders, column)]

    def first_shown(self) -> int:
        """The first column that is no padding."""
        return 0 if self._padding is None else int(self._padding[0].long().argmax())

    def shown(self) -> Tensor:
        """Bool ``[S]``: columns that are no padding."""
        padding = torch.ones_like(self.ids) if self._padding is None else self._padding
        return padding[0].bool()

    def embeddings(self) -> Tensor:
        """What the text stack reads in every column, images included: ``[S, D]``."""
        if self._prepared is not None:
            return self._prepared["inputs_embeds"][0]
        return self._embedded(self.ids)[0]

    def _embedded(self, ids: Tensor) -> Tensor:
        embed: Any = self.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        return embed(ids)

    @property
    def padded(self) -> bool:
        """Whether some columns are hidden."""
        return self._padding is not None and not bool(self._padding.all())

    def _positions_of(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Position ids of every column, where they were given or the branches need them."""
        given = inputs.get("position_ids")
        places = torch.tensor(self.branches.positions, device=self.ids.device)
        if given is None:
            return None if self.branches.linear else places[None]
        longest = len(self.branches.longest) - 1
        steps = torch.arange(1, longest + 1, device=given.device, dtype=given.dtype)
        return torch.cat([given, given[..., -1:] + steps], -1)[..., places]

    # --- what the model prepares in front of its text stack ---------------------------------------

    def _prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the text stack gets for all columns."""
        linear = continued(inputs, self.branches.longest[:-1], self._kind)
        stack, _ = find_stack(self.model)

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
            found = dict(bound.arguments)
            found |= found.pop("kwargs", {})
            raise _Caught(found)

        hook = stack.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with run_as_atman(self.model, None, "multiplicative"):
                self.model(**linear, use_cache=False, return_dict=True)
            raise TypeError(f"{type(self.model).__name__} does not run its text stack.")
        except _Caught as caught:
            found = caught.arguments
        finally:
            hook.remove()
        for name in (KEYWORD, "past_key_values", "use_cache", "cache_position", "input_ids"):
            found.pop(name, None)
        if not isinstance(found.get("inputs_embeds"), Tensor):
            raise TypeError(f"{type(self.model).__name__} hands no embeddings to its text stack.")
        return self._in_columns(found)

    def _in_columns(self, found: dict[str, Any]) -> dict[str, Any]:
        """The same for the columns of all branches, whose text is embedded as the model does."""
        positions = found.pop("position_ids", None)
        if isinstance(positions, Tensor):
            places = torch.tensor(self.branches.positions, device=positions.device)
            self._positions = positions[..., places]
        visual = found.get("visual_pos_masks")
        if visual is not None:
            found["visual_pos_masks"] = filled_up(visual, self.length - visual.shape[1], False)
        if self.branches.linear:
            return found
        prompt = found["inputs_embeds"][:, : self.branches.prompt_tokens]
        text = self._embedded(self.ids[:, self.branches.prompt_tokens :]).to(prompt.dtype)
        return found | {"inputs_embeds": torch.cat([prompt, text], 1)}

    def _cut(
        self,
        prepared: dict[str, Any],
        start: int,
        stop: int,
        rows: int,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        """The text stack's arguments for a range of columns."""
        cut: dict[str, Any] = {}
        for name, value in prepared.items():
            cut[name] = self._cut_one(name, value, start, stop, rows)
        visual = prepared.get("visual_pos_masks")
        if visual is not None:  # the embeddings added in deeper layers, one per image token
            before, count = int(visual[:, :start].sum()), int(visual[:, start:stop].sum())
            embeds = prepared.get("deepstack_visual_embeds") or []
            cut["deepstack_visual_embeds"] = [
                each[before : before + count].repeat(rows, 1) for each in embeds
            ]
        cut["use_cache"] = arguments["use_cache"]
        if "past_key_values" in arguments:
            cut["past_key_values"] = arguments["past_key_values"]
        if self._positions is not None:
            shape = [-1] * self._positions.dim()
            shape[-2] = rows
            cut["position_ids"] = self._positions[..., start:stop].expand(shape)
        return cut

    def _cut_one(self, name: str, value: Any, start: int, stop: int, rows: int) -> Any:
        if isinstance(value, AttentionMask):
            missing = self.length - (0 if value.padding is None else value.padding.shape[1])
            value = value._replace(padding=filled_up(value.padding, missing, True))
            if self.branches.linear:
                return cut_mask(value, start, stop, stop)
            # by positions, which the tree mask asks for
            cut = cut_mask(value, start, None, self.length)
            return cut._replace(key_tokens=stop, padding=cut_mask(value, 0, None, stop).padding)
        if isinstance(value, dict):
            return {
                key: self._cut_one(name, each, start, stop, rows) for key, each in value.items()
            }
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != 1:
            return value
        if name == "attention_mask":  # padding, of all keys
            return filled_up(value, self.length - value.shape[1], 1)[:, :stop].expand(rows, -1)  # pyright: ignore[reportOptionalSubscript]
        if value.shape[1] >= self.length:
            return value[:, start:stop].expand(rows, *[-1] * (value.dim() - 1))
        return value

    @contextmanager
    def _prepared_stack(self, prepared: dict[str, Any]) -> Iterator[None]:
        """Let the text stack run on ``prepared`` instead of what it is given."""
        stack, _ = find_stack(self.model)

        def replace(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            carried = {name: kwargs[name] for name in (KEYWORD,) if name in kwargs}
            return (), prepared | carried

        hook = stack.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _embedded_stack(self, embeddings: Tensor) -> Iterator[None]:
        """Let the text stack read embeddings instead of token ids."""
        stack, _ = find_stack(self.model)

        def replace(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
            given = dict(bound.arguments)
            given |= given.pop("kwargs", {})
            return (), given | {"input_ids": None, "inputs_embeds": embeddings}

        hook = stack.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @cached_property
    def _borders(self) -> Sequence[int]:
        """Columns, ascending, at which the input can be cut: no column before sees one behind."""
        masks = _masks_in((self._prepared or {}).get("attention_mask"))
        if any(mask.dense is None and not mask.causal for mask in masks):
            return [0, self.length]
        dense = [mask.dense for mask in masks if mask.dense is not None]
        if not dense:
            return range(self.length + 1)
        columns = torch.arange(dense[0].shape[-1], device=self.ids.device)
        farthest = columns.clone()
        for mask in dense:
            seen = mask.any(0).any(0)  # [S, S]
            farthest = torch.maximum(farthest, torch.where(seen, columns, 0).amax(-1))
        farthest = farthest.cummax(0).values.tolist()
        inner = {b for b in range(1, len(farthest)) if farthest[b - 1] < b}
        answer = self.branches.prompt_tokens
        if not inner.issuperset(range(answer, len(farthest))):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} lets tokens of the prompt or the target see target "
                "tokens behind them, so their probabilities are not those of predictions."
            )
        return sorted({0, *inner, *range(answer, self.length + 1)})


def _masks_in(mask: Any) -> list[AttentionMask]:
    """The masks of all layer types that a text stack is handed ready-made."""
    several = mask.values() if isinstance(mask, dict) else [mask]
    return [each for each in several if isinstance(each, AttentionMask)]
