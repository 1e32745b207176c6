"""Which keys the query rows of a block may see, for the portable implementations.

Legend: B batch, Hq query heads, Tq/Tk query/key tokens (Tk with a prefix's).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys each query row may see, materialised one block of rows at a time."""

    causal: bool
    query_offset: int | Tensor
    window: int | None
    mask: Tensor | None  # bool [B, Tk] or [B|1, Hq|1, Tq, Tk]
    key_tokens: int

    def batch_rows(self, rows: slice) -> Visibility:
        """The same for some rows of the batch."""
        if self.mask is None or self.mask.shape[0] == 1:
            return self
        return replace(self, mask=self.mask[rows])

    def always_some_key(self) -> bool:
        """Whether it is certain, without reading tensors, that every query row sees a key."""
        if self.mask is not None or self.window is not None or not self.key_tokens:
            return False
        return not self.causal or (isinstance(self.query_offset, int) and self.query_offset >= 0)

    def all_keys(self) -> Visibility:
        """The same number of keys, none of them hidden."""
        return Visibility(False, 0, None, None, self.key_tokens)

    def key_range(self, start: int, stop: int) -> tuple[int, int]:
        """Keys that rows ``start..stop`` can see at all; all of them if the offset is a tensor."""
        if isinstance(self.query_offset, Tensor):
            return 0, self.key_tokens
        low, high = 0, self.key_tokens
        if self.causal:
            high = min(high, stop + self.query_offset)
        if self.window is not None:
            low = max(low, start + self.query_offset - self.window + 1)
            high = min(high, stop - 1 + self.query_offset + self.window)
        return low, max(low, high)

    def first_hidden(self, start: int, low: int, high: int) -> int:
        """Keys ``low..`` before this one are visible to all rows from ``start`` on."""
        if self.mask is not None or self.window is not None:
            return low
        if not self.causal:
            return high
        if isinstance(self.query_offset, Tensor):
            return low
        return min(high, max(low, start + self.query_offset + 1))

    def block(
        self, start: int, stop: int, low: int, high: int, device: torch.device
    ) -> Tensor | None:
        """Bool ``[B|1, Hq|1, rows, keys]``; ``None`` where every key is visible."""
        visible = None
        if not self._band_is_full(start, stop, low, high):
            row = torch.arange(start, stop, device=device)[:, None] + self.query_offset
            column = torch.arange(low, high, device=device)[None, :]
            distance = row - column  # [rows, keys]
            visible = distance >= 0 if self.causal else None
            if self.window is not None:
                near = (distance if self.causal else distance.abs()) < self.window
                visible = near if visible is None else visible & near
            visible = None if visible is None else visible[None, None]
        if self.mask is not None:
            if self.mask.dim() == 2:
                given = self.mask[:, None, None, low:high]
            else:
                given = self.mask[:, :, start:stop, low:high]
            visible = given if visible is None else visible & given
        return visible

    def _band_is_full(self, start: int, stop: int, low: int, high: int) -> bool:
        """Whether neither the diagonal nor the window cuts into this block."""
        if not self.causal and self.window is None:
            return True
        if isinstance(self.query_offset, Tensor):
            return False
        first, last = start + self.query_offset, stop - 1 + self.query_offset
        if self.causal and high - 1 > first:
            return False
        if self.window is None:
            return True
        return last - low < self.window and (self.causal or high - 1 - first < self.window)
