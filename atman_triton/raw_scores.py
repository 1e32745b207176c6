"""How many raw attention scores are negative: there, multiplying by m < 1 raises a score.

Legend: Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capabilities import keeps_logits
from .integration import manipulate
from .masks import AttentionMask
from .perturbations import Attention
from .sites import named_sites, own_source

_ROWS_PER_BLOCK = 128


def negative_share(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
) -> float:
    """Share of negative scores among all that a query can see, from one unmanipulated pass.

    Args:
        model: A causal language model, in evaluation mode.
        inputs: What its forward takes for one sequence, ``input_ids`` ``[1, Tq]`` among them.
        layers: Count in these layers only; None is all.
        heads: Count in these query heads only; None is all.
        backend: What computes attention meanwhile.
    Source: AtMan, Eq. 4, whose factor 1 - f suppresses positive scores and raises negative ones.
    """
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    own = [own_source(model)]
    return share_of_negative(
        model, lambda: model(**moved, use_cache=False, **few), own, layers, heads, backend
    )


def share_of_negative(
    model: nn.Module,
    run: Callable[[], Any],
    sources: Sequence[str],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    backend: str = "auto",
    attention: Attention | None = None,
) -> float:
    """The same of what one call runs, of a model that reads several sources.

    Args:
        model: In evaluation mode.
        run: Runs it on one sequence, all of its parts.
        sources: Count where these are read.
        layers: Count in these layers only; None is all.
        heads: Count in these query heads only; None is all.
        backend: What computes attention meanwhile.
        attention: Where an encoder's tokens are read; None is everywhere.
    """
    negative, visible = 0, 0

    def count(query: Tensor, key: Tensor, mask: AttentionMask) -> None:
        nonlocal negative, visible
        below, seen = count_negative(query, key, mask, heads)
        negative, visible = negative + below, visible + seen

    plain = {source: torch.ones(1, 1) for source in sources}
    with manipulate(model, plain, layers=layers, backend=backend, attention=attention):
        for site, _ in named_sites(model, plain, attention)[1]:
            manipulation = site.stack.current.manipulation
            assert manipulation is not None  # manipulate has just put it there
            manipulation.observe = count
        run()
    return negative / visible


def count_negative(
    query: Tensor, key: Tensor, mask: AttentionMask, heads: Sequence[int] | None = None
) -> tuple[int, int]:
    """Negative scores and all scores among visible pairs; memory stays proportional to ``Tk``.

    Args:
        query: ``[1, Hq, Tq, D]``; the scale is positive and a soft cap keeps the sign.
        key: ``[1, Hk, Tk, D]``.
        mask: Which pairs are visible.
        heads: Query heads to count in; None is all.
    """
    query_heads, group = query.shape[1], query.shape[1] // key.shape[1]
    chosen = range(query_heads) if heads is None else heads
    negative, visible = 0, 0
    for start in range(0, query.shape[2], _ROWS_PER_BLOCK):
        rows = query[0, :, start : start + _ROWS_PER_BLOCK]  # [Hq, rows, D]
        seen = _visible(mask, start, rows.shape[1], query.device)  # [1|Hq, rows, Tk]
        seen = seen.expand(query_heads, -1, -1)
        for head in chosen:
            scores = rows[head].float() @ key[0, head // group].float().T  # [rows, Tk]
            negative += int(((scores < 0) & seen[head]).sum())
            visible += int(seen[head].sum())
    return negative, visible


def _visible(mask: AttentionMask, start: int, rows: int, device: torch.device) -> Tensor:
    """Which keys some query rows may see: bool ``[1|Hq, rows, Tk]``."""
    if mask.dense is not None:
        return mask.dense[0, :, start : start + rows]
    row = torch.arange(start, start + rows, device=device)[:, None] + mask.query_offset
    distance = row - torch.arange(mask.key_tokens, device=device)[None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= (distance if mask.causal else distance.abs()) < mask.window
    if mask.padding is not None:
        seen &= mask.padding[:1]
    return seen[None]
