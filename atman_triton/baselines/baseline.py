"""``Baseline``: the same question as ``Explainer``, answered by what people use instead."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from ..answers import Answers
from ..arguments import check_one_of
from ..asked import Asked
from ..capabilities import dtype_of
from ..engine import Settings
from ..explain import Explainer, Measured
from ..granularity import described
from ..methods import Outcome
from ..perturbations import RunFailed
from ..progress import token_progress
from ..provenance import measured_with
from ..tasks import Prompt, task_of
from ..tasks.decoder import DecoderTask
from ..units import Layout
from .case import Case, Output, no_decoder
from .methods import BASELINES, Options

_LEAST = {"budget": 2, "superpixels": 0, "steps": 1, "seed": 0}


class Baseline(Explainer):
    """Explains with one of the methods that AtMan is compared with.

    ``explain`` takes what ``Explainer.explain`` takes and gives an ``Explanation`` of the same
    units and targets. What a score is differs from method to method: a share of the gradient, of
    attention, of what removed units change; only the order of a method's own scores compares.
    ``provenance["forwards"]`` counts its cost in passes over the prompt, a backward pass as two.

    Args:
        model: A transformers decoder alone, with pictures in its prompts or without.
        tokenizer: Its tokenizer or processor; None if prompts and targets are token ids.
        method: One of ``BASELINES``.
        budget: Of ``lime``, ``kernel_shap`` and ``context_cite``, the most forward passes. None:
            twice as many as what is removed has pieces, at most 128; of ``kernel_shap`` four times,
            at most 256.
        superpixels: Of the same, into how many pieces each side of a picture is cut, whose patches
            are removed together and share what comes of it (None: 6; 0: every patch by itself).
        steps: Of ``integrated_gradients`` (None: 32).
        layer: Of ``grad_cam``, which decoder layer, from 0 (None: the last).
        seed: Of ``random``, ``lime``, ``kernel_shap`` and ``context_cite`` (None: 0).
        output: Of gradients, what is differentiated: the target's ``logit`` (None), which has a
            slope even where the model is certain, or its ``logprob``.
        progress: Show a progress bar on stderr, if that is a terminal.
    Raises:
        TypeError: if ``model`` is no transformers model, or a setting is no int.
        UnsupportedModelError: if it is no decoder alone.
        ValueError: if the method is unknown, or does not take a setting, or it is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        method: str,
        budget: int | None = None,
        superpixels: int | None = None,
        steps: int | None = None,
        layer: int | None = None,
        seed: int | None = None,
        output: Output | None = None,
        progress: bool = True,
    ) -> None:
        check_one_of("method", method, tuple(BASELINES))
        self.task = task_of(model, tokenizer)
        if type(self.task) is not DecoderTask:
            raise no_decoder(model)
        self.model = model
        self.tokenizer = self.task.tokenizer
        self.preset = "default"
        self.method = method  # pyright: ignore[reportIncompatibleVariableOverride, reportAttributeAccessIssue]
        self.progress = progress
        self.settings = Settings(factor=0.1, mode="min_shift")  # of controls
        given = {
            "budget": budget,
            "superpixels": superpixels,
            "steps": steps,
            "layer": layer,
            "seed": seed,
            "output": output,
        }
        self.options = _checked(method, given, len(self.task.layers))

    def with_seed(self, seed: int) -> Baseline:
        """The same with another seed, which methods that draw nothing do not look at."""
        other = copy.copy(self)
        other.options = replace(self.options, seed=seed)
        return other

    def _measured(self, read: Prompt, answers: Answers, layout: Layout, asked: Asked) -> Measured:
        rate = BASELINES[self.method].load()
        with token_progress(f"Explaining with {self.method}", self.progress) as bar:
            case = Case(
                self.task,
                read,
                layout.target_ids,
                layout.units,
                context=layout.prompt_ids[len(read.words) :],
                expect=bar.expect,
                advance=bar.advance,
            )
            scores = rate(case, self.options)
        _check_scores(self.method, scores, case)
        scores = scores.masked_fill(~case.measured, float("nan"))
        logprobs = (case.base_logprobs.double()[:, None] - scores.T).float()
        units = [replace(unit, effect="baseline") for unit in layout.units]
        own = BASELINES[self.method]
        facts = measured_with(self.model, case.record, described(asked.granularity))
        facts |= {
            "method": self.method,
            "effect": f"a baseline, made of {own.of}",
            "source": own.source,
            "forwards": case.forwards,
        }
        facts |= {name: getattr(self.options, name) for name in own.options}
        return Measured(Outcome(units, logprobs.contiguous()), case.base_logprobs, facts)


def _check_scores(method: str, scores: Tensor, case: Case) -> None:
    """Refuse scores that are no numbers; those of a target's units may be missing.

    Raises: RunFailed: naming the first unit of the prompt that has none.
    """
    missing = ~scores[case.removable].isfinite() & case.measured[case.removable]
    if bool(missing.any()):
        unit = case.units[case.removable[int(missing.any(1).nonzero()[0])]]
        raise RunFailed(
            f"{method} gives {unit.text!r} no finite score: the model's numbers overflow in "
            f"{str(dtype_of(case.model)).removeprefix('torch.')}; load it in float32 or bfloat16."
        )


def _checked(method: str, given: dict[str, Any], layers: int) -> Options:
    """The settings of a method.

    Raises: TypeError, ValueError: naming one that is wrong.
    """
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if name not in BASELINES[method].options:
            takers = [other for other, own in BASELINES.items() if name in own.options]
            raise ValueError(f"{name} is for {', '.join(takers)}, but method is {method!r}.")
        if name == "output":
            check_one_of(name, value, get_args(Output))
        elif isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}.")
        elif name == "layer" and not -1 <= value < layers:
            raise ValueError(f"layer must lie in [-1, {layers - 1}], got {value}.")
        elif name != "layer" and value < _LEAST[name]:
            raise ValueError(f"{name} must be at least {_LEAST[name]}, got {value}.")
    return Options(**found)
