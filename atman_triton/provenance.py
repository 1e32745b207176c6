"""How the numbers of an explanation came about: model, settings, work done, versions."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .methods import Method
from .perturbations import Record

if TYPE_CHECKING:
    from .explain import Explainer

EFFECTS = {
    "exact": "total effect: each unit was suppressed in every row of every layer",
    "direct": "direct effect: each unit was suppressed only in the rows that predict the target, "
    "so what reached the answer through other tokens is not counted",
    "hybrid": "total effect of the most promising units, direct effect of the others",
    "hierarchical": "total effect of the tokens of the most promising pieces; of the other pieces "
    "the direct effect, or the total one where runs were left",
    "path": "share in suppressing all units together: gradients, summed on the way there",
    "score_gradient": "first-order estimate of suppressing all units together, from the gradient "
    "with nothing suppressed: usually a poor one",
}
"""What the scores of each method are."""


def provenance(
    explainer: Explainer, method: Method, record: Record, granularity: str, prompt_tokens: int
) -> dict[str, Any]:
    """How the numbers came about, as JSON values.

    Args:
        explainer: Its settings.
        method: What was run in the end.
        record: What the engine did.
        granularity: How large the units are.
        prompt_tokens: Tokens of the prompt, by which ``forwards`` are counted.
    """
    model, settings = explainer.model, explainer.settings
    ignored = settings.similarity is not None and settings.rule == "paper"
    return measured_with(model, record, granularity) | {
        "preset": explainer.preset,
        "mode": settings.mode,
        "factor": None if ignored else settings.factor,
        "similarity": settings.similarity,
        "rule": None if settings.similarity is None else settings.rule,
        "method": method,
        "effect": EFFECTS[method],
        "budget": explainer.budget,
        "steps": explainer.steps,
        "layers": settings.layers,
        "heads": settings.heads,
        "backend": settings.backend,
        "exact_runs": record.runs["total"],
        "direct_runs": record.runs["direct"],
        "forwards": record.tokens / prompt_tokens,
        "runner": " + ".join(sorted(set(record.runners))),
        "runner_reasons": record.reasons,
        "wasted_share": record.wasted,
        "prefix_bytes": record.prefix_bytes,
        "activations": record.activations,
        "logits": record.logits,
    }


def measured_with(model: Any, record: Record, granularity: str) -> dict[str, Any]:
    """What holds of every method: model, work, versions, as JSON values."""
    parameter = next(model.parameters())
    versions = {"atman_triton": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "granularity": granularity,
        "runs": sum(record.batch_sizes),
        "backward_runs": record.backward_runs,
        "batch_sizes": record.batch_sizes,
        "seconds": record.seconds,
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
