"""Baselines that take much away at random and fit a linear model to what that does.

One set of ablations serves all scored tokens: ``budget`` forward passes, however long the targets
are. What is taken away together is a piece: a unit of text, and of a picture all units in one of
its superpixels, as LIME and KernelSHAP are used on pictures: a patch by itself hardly matters, and
there are more of them than ablations. A piece's weight is shared evenly among its units. Units of a
target cannot be taken out of what is scored: their scores are NaN.

Legend: U units, R pieces of the prompt, M scored tokens, T of one target, N ablations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..table import import_extra
from .case import Case, Scored
from .methods import Options

FEW = (2, 128)
"""Without a ``budget``, ablations of the sparse fits: for every piece, and at most."""

SEVERAL = (4, 256)
"""The same of KernelSHAP, whose fit is not sparse."""

LASSO = {"alpha": 0.01, "max_iter": 10_000}
"""Of ``lime`` and ``context_cite``: the penalty of captum's and of ContextCite's own code."""

KEPT = 0.5  # chance of a unit to stay in an ablation of ``context_cite``


def lime(case: Case, options: Options) -> Tensor:
    """``[U, M]``: weights of pieces in a sparse linear model of the log-probability, nats.

    Captum's, as it comes: every piece stays with chance 1/2, an ablation counts by
    ``exp(-d² / 2)`` with d its cosine distance from the whole prompt, Lasso with penalty 0.01.

    Raises: ImportError: naming the extra that brings captum, if it is missing.
    Source: Ribeiro et al. 2016, '"Why Should I Trust You?"'.
    """
    linear = import_extra("sklearn.linear_model", "eval")
    return _by_captum("Lime", lambda: linear.Lasso(**LASSO), case, options, FEW)


def kernel_shap(case: Case, options: Options) -> Tensor:
    """``[U, M]``: estimated Shapley values of pieces, of the log-probability, nats.

    Captum's: ablations are drawn by the Shapley kernel, none and all of the pieces among them, and
    the values add up to what all pieces together do. It takes several times as many ablations as
    there are pieces: with about as many the fit is exact and the values are mostly noise, with
    fewer they are the least that fit.

    Raises: ImportError: naming the extra that brings captum, if it is missing.
    Source: Lundberg and Lee 2017, "A Unified Approach to Interpreting Model Predictions", 4.1.
    """
    pieces = pieces_of(case, options.superpixels)
    if len(pieces) == 1:  # captum draws subsets that are neither empty nor all
        alone = case.base_logprobs.double() - case.without(pieces)[0].double()
        return _placed(case, pieces, alone[None])
    linear = import_extra("sklearn.linear_model", "eval")
    return _by_captum("KernelShap", linear.LinearRegression, case, options, SEVERAL)


def context_cite(case: Case, options: Options) -> Tensor:
    """``[U, M]``: weights of pieces in a sparse linear model of the target's log-odds.

    Every piece stays with chance 1/2. ContextCite fits one model to the log-odds of the whole
    target, scaled by its tokens. Here every token's own log-odds are fitted likewise, and what
    these weights lack is spread evenly over the tokens, so that over the rows of a target they add
    up to ContextCite's.

    Raises: ImportError: naming the extra that brings scikit-learn, if it is missing.
    Source: Cohen-Wang et al. 2024, "ContextCite: Attributing Model Generation to Context", 3.
    """
    pieces = pieces_of(case, options.superpixels)
    drawn = torch.Generator().manual_seed(options.seed)
    budget = _budget(options, pieces, FEW)
    kept = torch.rand(budget, len(pieces), generator=drawn) < KEPT  # [N, R]
    odds = Ablations(case, pieces, "odds")(kept).double()  # [N, M]
    weights = torch.empty(len(pieces), odds.shape[1], dtype=torch.float64)
    for rows in case.rows:
        own = odds[:, rows.start : rows.stop]
        together = log_odds(own)[:, None] / len(rows)
        each = _standardised(kept, own)  # [R, T]
        lacking = _standardised(kept, together) - each.mean(1, keepdim=True)
        weights[:, rows.start : rows.stop] = each + lacking
    return _placed(case, pieces, weights)


def pieces_of(case: Case, superpixels: int) -> list[list[int]]:
    """Units of the prompt that are taken away together, in the order in which pieces begin.

    Args:
        superpixels: Along each side of a picture: its units are put together by the tile that
            their middle lies in. 0: every unit by itself, as those of text always are.
    """
    found: dict[Hashable, list[int]] = {}
    for index in case.removable:
        unit = case.units[index]
        place: Hashable = index
        if unit.image is not None and superpixels:
            picture = case.prompt.pictures[unit.image]
            place = (
                unit.image,
                _tile([(box[0], box[2]) for box in unit.boxes], picture.width, superpixels),
                _tile([(box[1], box[3]) for box in unit.boxes], picture.height, superpixels),
            )
        found.setdefault(place, []).append(index)
    return list(found.values())


def _tile(spans: Sequence[tuple[float, float]], size: int, tiles: int) -> int:
    """Which of so many equal parts of an edge holds the middle of some (start, length) on it."""
    start = min(first for first, _ in spans)
    stop = max(first + length for first, length in spans)
    return min(tiles - 1, int((start + stop) / 2 * tiles / size))


def _budget(options: Options, pieces: Sequence[Sequence[int]], without: tuple[int, int]) -> int:
    """How many ablations: what was asked for, else ``FEW`` or ``SEVERAL``."""
    each, most = without
    return options.budget or min(most, each * len(pieces))


class Ablations:
    """What the model says with pieces of the prompt taken away; every ablation is run once.

    Args:
        case: The prompt.
        pieces: ``R``, the units of each.
        output: What is given of each scored token.
    """

    def __init__(
        self, case: Case, pieces: Sequence[Sequence[int]], output: Scored = "logprob"
    ) -> None:
        self.case, self.pieces = case, pieces
        self.output: Scored = output
        self._known: dict[frozenset[int], Tensor] = {}

    def __call__(self, kept: Tensor) -> Tensor:
        """``[N, M]`` float32 of ``[N, R]`` masks: what is not 0 stays."""
        removed = [
            frozenset(unit for piece in gone for unit in self.pieces[piece])
            for gone in ((row == 0).nonzero()[:, 0].tolist() for row in kept)
        ]
        new = [gone for gone in dict.fromkeys(removed) if gone not in self._known]
        if new:
            found = self.case.without(new, self.output)
            self._known |= dict(zip(new, found, strict=True))
        return torch.stack([self._known[gone] for gone in removed])


def log_odds(odds: Tensor) -> Tensor:
    """``[N]``: of all tokens of a target together, from ``[N, T]`` float64 of each by itself."""
    logprob = torch.nn.functional.logsigmoid(odds).sum(-1)
    return logprob - (-torch.expm1(logprob)).log()


class _Together:
    """Stands for captum's linear model of one output, and fits those of all scored tokens.

    Args:
        model: What makes a linear model of scikit-learn.
        ablations: What the outputs are.
    """

    def __init__(self, model: Callable[[], Any], ablations: Ablations) -> None:
        self._model, self._ablations = model, ablations

    def fit(self, train_data: Iterable[Sequence[Tensor]]) -> None:
        """Fit to captum's masks ``[N, R]`` and their weights ``[N]``."""
        ((kept, _, weights),) = train_data
        self._weights = _fitted(self._model(), kept, self._ablations(kept), weights)

    def representation(self) -> Tensor:
        """``[M, R]`` float64."""
        return self._weights


def _by_captum(
    name: str, model: Callable[[], Any], case: Case, options: Options, without: tuple[int, int]
) -> Tensor:
    """``[U, M]`` by a method of captum, which draws ablations and weighs them."""
    pieces = pieces_of(case, options.superpixels)
    budget = _budget(options, pieces, without)
    ablations = Ablations(case, pieces)
    method = getattr(import_extra("captum.attr", "eval"), name)(lambda kept: ablations(kept)[:, 0])
    method.interpretable_model = _Together(model, ablations)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        weights = method.attribute(
            torch.ones(1, len(pieces)),
            n_samples=budget,
            perturbations_per_eval=budget,
            return_input_shape=False,
        )
    return _placed(case, pieces, weights.T)


def _standardised(kept: Tensor, outputs: Tensor) -> Tensor:
    """``[R, T]`` weights of ``[N, R]`` masks in ``[N, T]`` outputs; Lasso of variables of scale 1.

    A piece that always stays, or never, gets weight 0.
    """
    linear = import_extra("sklearn.linear_model", "eval")
    masks = kept.double()
    scale = masks.std(0, correction=0)
    scale = scale.where(scale > 0, 1.0)
    scaled = (masks - masks.mean(0)) / scale
    return (_fitted(linear.Lasso(**LASSO), scaled, outputs) / scale).T


def _fitted(model: Any, masks: Tensor, outputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """``[T, R]`` float64 weights of ``[N, R]`` masks in ``[N, T]`` outputs, in one thread.

    Several threads wait for one another longer than such small fits take.
    """
    limited = import_extra("threadpoolctl", "eval").threadpool_limits
    with limited(limits=1):
        model.fit(
            masks.double().numpy(),
            outputs.double().numpy(),
            None if weights is None else weights.double().numpy(),
        )
    return torch.from_numpy(model.coef_).reshape(outputs.shape[1], -1)


def _placed(case: Case, pieces: Sequence[Sequence[int]], weights: Tensor) -> Tensor:
    """``[U, M]`` of ``[R, M]``, each piece's shared among its units; NaN for the other units."""
    scores = torch.full((len(case.units), len(case.base_logprobs)), torch.nan, dtype=torch.float64)
    for units, own in zip(pieces, weights.double(), strict=True):
        scores[list(units)] = own / len(units)
    return scores
