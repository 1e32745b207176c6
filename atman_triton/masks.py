"""What transformers says about visibility, kept whole on its way to the op.

transformers asks a registered mask function which keys each query may see. Its own functions answer
with ``None`` or a dense tensor, and both forget which absolute positions the keys stand at: a
sliding cache has dropped the first ones, a static cache holds empty slots behind the last. Ours
answers with an :class:`AttentionMask`, which keeps the offsets.

Legend: B batch, Hq query heads, Tq/Tk query/key tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)
from transformers.utils.import_utils import is_tracing


class AttentionMask(NamedTuple):
    """Which keys each query may see, and where keys and queries stand; all conditions must hold."""

    key_tokens: int
    key_offset: int  # absolute position of the first key
    query_offset: int | Tensor  # of the first query, counted from the first key
    causal: bool = False
    window: int | None = None
    padding: Tensor | None = None  # bool [B, Tk]
    dense: Tensor | None = None  # bool [B, 1, Tq, Tk]
    manipulation: Any = None  # rides along in models whose layers take no further arguments

    @property
    def ndim(self) -> int:
        """Neither 2 (padding) nor 4 (dense), by which models tell what to do with a mask."""
        return 5

    @property
    def shape(self) -> tuple[int, ...]:
        """Asked for its last entry, the number of keys, where a mask comes back to be made."""
        return (1, 1, 1, 1, self.key_tokens)

    def contiguous(self) -> AttentionMask:
        """Called by ``generate`` on masks that it prepares; nothing to do."""
        return self


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | AttentionMask | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> AttentionMask:
    """Build the mask of one layer type; arguments as transformers' mask interface passes them.

    Plain, windowed and two-sided masks are recognised by the identity of ``mask_function``. Any
    other function (chunks, packed sequences, image blocks, a user's own) is evaluated densely.
    """
    if isinstance(attention_mask, AttentionMask):
        return attention_mask  # prepared by `generate` for a static cache
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have 2 or 4 dimensions, got shape {list(attention_mask.shape)}."
        )
    # The difference is a new tensor: a static cache's own counter moves before the layers run.
    query_offset = q_offset - kv_offset
    kind = None if use_vmap else _recognise(mask_function)
    if kind is None:
        dense = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # pyright: ignore[reportArgumentType]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return AttentionMask(kv_length, kv_offset, query_offset, dense=dense)
    causal, window = kind
    if not causal and window is None:
        query_offset = 0  # no rule refers to it
    padding = _present_padding(attention_mask, kv_length, kv_offset)
    return AttentionMask(kv_length, kv_offset, query_offset, causal, window, padding)


def cut_mask(mask: AttentionMask, first: int, stop: int | None, keys: int) -> AttentionMask:
    """Rows ``first`` to ``stop`` of a mask, over its first ``keys`` keys."""
    return mask._replace(
        key_tokens=keys,
        query_offset=mask.query_offset + first if mask.causal or mask.window else 0,
        padding=None if mask.padding is None else mask.padding[:, :keys],
        dense=None if mask.dense is None else mask.dense[:, :, first:stop, :keys],
    )


def dense_visibility(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a 4-D mask given by a user or a model into visibility and what it adds to scores.

    Returns: bool ``[B|1, Hq|1, Tq, Tk]``, and the additive rest (float, 0 where hidden) if ``mask``
        is a float mask, which may carry a bias besides hiding keys.
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask must be bool or floating, got {mask.dtype}.")
    visible = mask > torch.finfo(mask.dtype).min / 2
    return visible, torch.where(visible, mask, torch.zeros((), dtype=mask.dtype))


def _present_padding(padding: Tensor | None, key_tokens: int, key_offset: int) -> Tensor | None:
    """The padding mask of the keys that are present: bool ``[B, Tk]``, ``None`` if all visible."""
    if padding is None:
        return None
    missing = key_tokens + key_offset - padding.shape[-1]
    if missing > 0:  # empty slots of a static cache
        padding = F.pad(padding, (0, missing))
    padding = padding[:, key_offset : key_offset + key_tokens].to(torch.bool)
    return padding if is_tracing(padding) or not bool(padding.all()) else None


# The inner functions of transformers' factories share one code object each.
_AND = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = sliding_window_bidirectional_overlay(1).__code__


def _recognise(mask_function: Callable) -> tuple[bool, int | None] | None:
    """``(causal, window)`` of a mask function that the op knows, otherwise ``None``."""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND:
        return None  # dynamo cannot read the closure of a function made while it traces
    parts = _closure(mask_function)["mask_functions"]
    if len(parts) != 2:
        return None
    overlay, base = parts
    code = getattr(overlay, "__code__", None)
    if code is _WINDOW and base is causal_mask_function:
        return True, _closure(overlay)["sliding_window"]
    if code is _TWO_SIDED_WINDOW and base is bidirectional_mask_function:
        return False, _closure(overlay)["sliding_window"] + 1  # theirs counts the last key in
    return None


def _closure(function: Callable) -> dict[str, Any]:
    """Free variables of a nested function by name."""
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
