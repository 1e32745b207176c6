"""Several answers behind one prompt, as a decoder with its own sequence reads them.

An answer that is the start of another one is scored where that one is read: answers of one token
all read one softmax. What is left goes side by side as rows of a batch, the *lanes*.

Legend: K targets, M scored tokens of all targets, N decoder rows that predict something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runner import target_logprobs


@dataclass(frozen=True)
class Lane:
    """What the decoder reads behind its start tokens, and which targets are scored there.

    Args:
        read: Token ids.
        targets: Indices of targets whose tokens before the last one begin ``read``; what the first
            one reads is all of it.
    """

    read: tuple[int, ...]
    targets: tuple[int, ...]


def lanes_of(targets: Sequence[Sequence[int]], *, joined: bool) -> list[Lane]:
    """Lanes for all targets, the longest first.

    Args:
        targets: ``K`` sequences of token ids, none of them empty.
        joined: Whether targets may share a lane.
    """
    owners: list[list[int]] = []
    for k in sorted(range(len(targets)), key=lambda k: (-len(targets[k]), k)):
        read = tuple(targets[k][:-1])
        for own in owners if joined else ():
            if tuple(targets[own[0]][: len(read)]) == read:
                own.append(k)
                break
        else:
            owners.append([k])
    return [Lane(tuple(targets[own[0]][:-1]), tuple(own)) for own in owners]


def scored(logits: Tensor, lane: Lane, targets: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of a lane's targets, one after the other: ``[B, M of them]`` float32.

    Args:
        logits: ``[B, N, V]``, from the row that predicts the first token of a target on.
        lane: Whose rows they are.
        targets: All targets.
    """
    logits = logits[:, : len(lane.read) + 1]
    rows = [row for k in lane.targets for row in range(len(targets[k]))]
    ids = [token for k in lane.targets for token in targets[k]]
    places = torch.tensor(rows, device=logits.device)
    return target_logprobs(logits, places, torch.tensor(ids))
