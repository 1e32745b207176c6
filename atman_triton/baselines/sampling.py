"""Baselines that take many units away at random and fit a linear model to what that does.

One set of ablations serves all scored tokens: ``budget`` forward passes, however long the targets
are. Units of a target cannot be taken out of what is scored: their scores are NaN.

Legend: U units, R of them in the prompt, M scored tokens, T of one target, N ablations.
"""

from __future__ import annotations

from collections.abc import Callable
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
    attr = _captum("captum.attr")
    models = _captum("captum._utils.models.linear_model")

    def explainer(forward: Callable[[Tensor], Tensor]) -> Any:
        return attr.Lime(forward, interpretable_model=models.SkLearnLasso(**LASSO))

    return _by_captum(explainer, case, options)


def kernel_shap(case: Case, options: Options) -> Tensor:
    """``[U, M]``: estimated Shapley values of units, of the log-probability, nats.

    Captum's: ablations are drawn by the Shapley kernel, none and all of the units among them, and
    the values add up to what all units together do. With fewer ablations than units the least
    values that fit are given.

    Raises: ImportError: naming the extra that brings captum, if it is missing.
    Source: Lundberg and Lee 2017, "A Unified Approach to Interpreting Model Predictions", 4.1.
    """
    if len(case.removable) == 1:  # captum draws subsets that are neither empty nor all
        alone = case.base_logprobs.double() - case.without([case.removable])[0].double()
        return _placed(case, alone[None])
    attr = _captum("captum.attr")
    return _by_captum(attr.KernelShap, case, options)


def context_cite(case: Case, options: Options) -> Tensor:
    """``[U, M]``: weights of units in a sparse linear model of the target's log-odds.

    Every unit stays with chance 1/2. ContextCite fits one model to the log-odds of the whole
    target, scaled by its tokens. Here every token's own log-odds are fitted likewise, and what
    these weights lack is spread evenly over the tokens, so that over the rows of a target they add
    up to ContextCite's.

    Raises: ImportError: naming the extra that brings scikit-learn, if it is missing.
    Source: Cohen-Wang et al. 2024, "ContextCite: Attributing Model Generation to Context", 3.
    """
    fit = _lasso()
    drawn = torch.Generator().manual_seed(options.seed)
    kept = torch.rand(options.budget, len(case.removable), generator=drawn) < KEPT  # [N, R]
    odds = Ablations(case, "odds")(kept).double()  # [N, M]
    weights = torch.empty(len(case.removable), odds.shape[1], dtype=torch.float64)
    for rows in case.rows:
        own = odds[:, rows.start : rows.stop]
        together = log_odds(own)[:, None] / len(rows)
        each = fit(kept, own)  # [R, T]
        lacking = fit(kept, together) - each.mean(1, keepdim=True)
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


def _by_captum(
    explainer: Callable[[Callable[[Tensor], Tensor]], Any], case: Case, options: Options
) -> Tensor:
    """``[U, M]``: captum takes one output at a time, so the same seed draws the same ablations."""
    ablations = Ablations(case)
    whole = torch.ones(1, len(case.removable))
    weights = []
    for column in range(len(case.base_logprobs)):
        method = explainer(lambda kept, column=column: ablations(kept)[:, column].double())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            found = method.attribute(
                whole, n_samples=options.budget, perturbations_per_eval=options.budget
            )
        weights.append(found[0].double())
    return _placed(case, torch.stack(weights, 1))


def _lasso() -> Callable[[Tensor, Tensor], Tensor]:
    """``[R, T]`` weights of ``[N, R]`` masks in ``[N, T]`` outputs, masks scaled to variance 1."""
    linear = import_extra("sklearn.linear_model", "eval")

    def fit(kept: Tensor, outputs: Tensor) -> Tensor:
        masks = kept.double()
        scale = masks.std(0, correction=0)
        scaled = (masks - masks.mean(0)) / scale.where(scale > 0, 1.0)
        found = []
        for column in outputs.T:
            model = linear.Lasso(**LASSO).fit(scaled.numpy(), column.numpy())
            found.append(torch.from_numpy(model.coef_) / scale.where(scale > 0, 1.0))
        return torch.stack(found, 1)

    return fit


def _placed(case: Case, weights: Tensor) -> Tensor:
    """``[U, M]`` of ``[R, M]``; NaN for the other units."""
    scores = torch.full((len(case.units), len(case.base_logprobs)), torch.nan, dtype=torch.float64)
    scores[case.removable] = weights.double()
    return scores


def _captum(module: str) -> Any:
    import_extra("captum", "eval")
    return import_extra(module, "eval")
