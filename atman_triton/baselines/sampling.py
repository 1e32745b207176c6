"""Baselines that take many units away at random and fit a linear model to what that does.

One set of ablations serves all scored tokens: ``budget`` forward passes, however long the targets
are. Units of a target cannot be taken out of what is scored: their scores are NaN.

Legend: U units, R of them in the prompt, M scored tokens, T of one target, N ablations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..table import import_extra
from .case import Case, Scored
from .methods import Options

LASSO = {"alpha": 0.01, "max_iter": 10_000}
"""Of ``lime`` and ``context_cite``: the penalty of captum's and of ContextCite's own code."""

KEPT = 0.5  # chance of a unit to stay in an ablation of ``context_cite``


def lime(case: Case, options: Options) -> Tensor:
    """``[U, M]``: weights of units in a sparse linear model of the log-probability, nats.

    Captum's, as it comes: every unit stays with chance 1/2, an ablation counts by
    ``exp(-d² / 2)`` with d its cosine distance from the whole prompt, Lasso with penalty 0.01.

    Raises: ImportError: naming the extra that brings captum, if it is missing.
    Source: Ribeiro et al. 2016, '"Why Should I Trust You?"'.
    """
    linear = import_extra("sklearn.linear_model", "eval")
    return _by_captum("Lime", lambda: linear.Lasso(**LASSO), case, options)


def kernel_shap(case: Case, options: Options) -> Tensor:
    """``[U, M]``: estimated Shapley values of units, of the log-probability, nats.

    Captum's: ablations are drawn by the Shapley kernel, none and all of the units among them, and
    the values add up to what all units together do. It takes several times as many ablations as
    there are units: with about as many the fit is exact and the values are mostly noise, with
    fewer they are the least that fit.

    Raises: ImportError: naming the extra that brings captum, if it is missing.
    Source: Lundberg and Lee 2017, "A Unified Approach to Interpreting Model Predictions", 4.1.
    """
    if len(case.removable) == 1:  # captum draws subsets that are neither empty nor all
        alone = case.base_logprobs.double() - case.without([case.removable])[0].double()
        return _placed(case, alone[None])
    linear = import_extra("sklearn.linear_model", "eval")
    return _by_captum("KernelShap", linear.LinearRegression, case, options)


def context_cite(case: Case, options: Options) -> Tensor:
    """``[U, M]``: weights of units in a sparse linear model of the target's log-odds.

    Every unit stays with chance 1/2. ContextCite fits one model to the log-odds of the whole
    target, scaled by its tokens. Here every token's own log-odds are fitted likewise, and what
    these weights lack is spread evenly over the tokens, so that over the rows of a target they add
    up to ContextCite's.

    Raises: ImportError: naming the extra that brings scikit-learn, if it is missing.
    Source: Cohen-Wang et al. 2024, "ContextCite: Attributing Model Generation to Context", 3.
    """
    drawn = torch.Generator().manual_seed(options.seed)
    kept = torch.rand(options.budget, len(case.removable), generator=drawn) < KEPT  # [N, R]
    odds = Ablations(case, "odds")(kept).double()  # [N, M]
    weights = torch.empty(len(case.removable), odds.shape[1], dtype=torch.float64)
    for rows in case.rows:
        own = odds[:, rows.start : rows.stop]
        together = log_odds(own)[:, None] / len(rows)
        each = _standardised(kept, own)  # [R, T]
        lacking = _standardised(kept, together) - each.mean(1, keepdim=True)
        weights[:, rows.start : rows.stop] = each + lacking
    return _placed(case, weights)


class Ablations:
    """What the model says with units of the prompt taken away; every ablation is run once.

    Args:
        case: The prompt.
        output: What is given of each scored token.
    """

    def __init__(self, case: Case, output: Scored = "logprob") -> None:
        self.case = case
        self.output: Scored = output
        self._known: dict[frozenset[int], Tensor] = {}

    def __call__(self, kept: Tensor) -> Tensor:
        """``[N, M]`` float32 of ``[N, R]`` masks: what is not 0 stays."""
        units = torch.tensor(self.case.removable)
        removed = [frozenset(units[row == 0].tolist()) for row in kept]
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


def _by_captum(name: str, model: Callable[[], Any], case: Case, options: Options) -> Tensor:
    """``[U, M]`` by a method of captum, which draws ablations and weighs them."""
    ablations = Ablations(case)
    method = getattr(import_extra("captum.attr", "eval"), name)(lambda kept: ablations(kept)[:, 0])
    method.interpretable_model = _Together(model, ablations)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        weights = method.attribute(
            torch.ones(1, len(case.removable)),
            n_samples=options.budget,
            perturbations_per_eval=options.budget,
            return_input_shape=False,
        )
    return _placed(case, weights.T)


def _standardised(kept: Tensor, outputs: Tensor) -> Tensor:
    """``[R, T]`` weights of ``[N, R]`` masks in ``[N, T]`` outputs; Lasso of variables of scale 1.

    A unit that always stays, or never, gets weight 0.
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


def _placed(case: Case, weights: Tensor) -> Tensor:
    """``[U, M]`` of ``[R, M]``; NaN for the other units."""
    scores = torch.full((len(case.units), len(case.base_logprobs)), torch.nan, dtype=torch.float64)
    scores[case.removable] = weights.double()
    return scores
