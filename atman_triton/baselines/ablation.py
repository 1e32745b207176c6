"""Baselines that take something away and look, one unit at a time.

Legend: U units, M scored tokens, T of one target, S tokens that are read, B rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case
from .methods import Options


def random(case: Case, options: Options) -> Tensor:
    """``[U, M]``: numbers that mean nothing, evenly in [0, 1)."""
    drawn = torch.Generator().manual_seed(options.seed)
    numbers = torch.rand(len(case.units), len(case.base_logprobs), generator=drawn)
    return numbers.double().masked_fill(~case.measured, torch.nan)


def leave_one_out(case: Case, options: Options) -> Tensor:
    """``[U, M]``: how much the log-probability drops when a unit is taken out of the input, nats.

    Units of a target cannot be taken out of what is scored: NaN.

    Source: Li et al. 2016, "Understanding Neural Networks through Representation Erasure", Eq. 1
        (there relative to the log-probability, which changes no order).
    """
    scores = torch.full((len(case.units), len(case.base_logprobs)), torch.nan, dtype=torch.float64)
    absent = case.without([[unit] for unit in case.removable])
    scores[case.removable] = case.base_logprobs.double() - absent.double()
    return scores


def occlusion(case: Case, options: Options) -> Tensor:
    """``[U, M]``: how much the log-probability drops when a unit's embeddings say nothing, nats.

    Those of all its tokens become the mean of the prompt's embeddings; positions stay. Units of a
    target, too, are occluded for the tokens behind them.

    Source: Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks", 4.2.
    """
    per_target = []
    for k in range(len(case.targets)):
        own, length = case.embeddings(k), case.length(k)
        blank = own[0, : case.prompt_tokens].mean(0)  # [D]
        columns = case.measured[:, case.rows[k].start : case.rows[k].stop]
        asked = columns.any(1).nonzero().flatten().tolist()
        drops = torch.full(columns.shape, torch.nan, dtype=torch.float64)  # [U, T]
        base = case.base_logprobs[case.rows[k].start : case.rows[k].stop].double()
        case.expect(len(asked) * length)
        for batch in case.batches(len(asked), length):
            units = [asked[index] for index in batch]
            rows = own.repeat(len(units), 1, 1)  # [B, S, D]
            for row, unit in zip(rows, units, strict=True):
                row[[place for place in case.units[unit].tokens if place < length]] = blank
            with torch.no_grad():
                drops[units] = base - case.values(k, rows, "logprob").double().cpu()
        per_target.append(drops)
    return case.scores(per_target)
