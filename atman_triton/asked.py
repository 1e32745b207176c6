"""What ``Explainer`` is asked, checked: each error names the argument and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from .arguments import check_contrast, check_generation, check_one_of, checked_targets
from .chat import Span
from .documents import Given, checked_documents
from .granularity import (
    Granularity,
    ImageGranularity,
    checked_granularity,
    checked_image_granularity,
    checked_max_units,
    described,
    tiles_of,
)
from .methods import GRADIENT_METHODS
from .parts import TARGET_GRANULARITIES
from .perturbations import Attention
from .placing import checked_span
from .presets import Preset
from .reduction import Postprocessing, Quantity, Reduction
from .selection import checked_explain_only
from .tasks import Task


class Reading(NamedTuple):
    """How scores are read: fields of ``Explanation``."""

    reduction: Reduction
    postprocessing: Postprocessing
    normalize: bool
    contrast: bool
    quantity: Quantity = "logprob"


@dataclass(frozen=True)
class Asked:
    """Arguments of ``Explainer.explain`` that need more than to be passed on.

    Args:
        granularity: What one unit of a text or a sound is.
        images: What one unit of a picture is.
        divides_images: Whether the user said so.
        max_units: About how many units ``auto`` aims at.
        reading: How scores are read.
        targets: All answers that are given; None lets the model answer.
        target_span: The passage that is scored; None for all.
        documents: Sources.
    """

    granularity: Granularity
    images: ImageGranularity
    divides_images: bool
    max_units: int
    reading: Reading
    targets: list[Any] | None
    target_span: str | Span | None
    documents: list[Given]


def checked_question(
    task: Task,
    preset: Preset,
    method: str,
    given: Mapping[str, Any],
    generation_kwargs: dict[str, Any],
) -> Asked:
    """Check what ``Explainer.explain`` is given besides prompt and controls.

    Args:
        task: What kind of model is asked.
        preset: What stands for arguments that are None.
        method: Which perturbations are run.
        given: Arguments of ``explain`` by name.
        generation_kwargs: The rest of them.
    Raises: TypeError, ValueError: as ``explain`` says.
    """
    granularity, images = given["granularity"], given["image_granularity"]
    if granularity is None:  # hierarchical chooses for itself
        granularity = "token" if method == "hierarchical" else preset.granularity
    if (tiles := tiles_of(granularity)) is not None:
        if images is not None:
            raise TypeError(
                f"granularity={granularity!r} and image_granularity={images!r} both say how "
                "pictures are divided; give one."
            )
        granularity, images = "token", tiles
    granularity = checked_granularity(granularity)
    if method == "hierarchical" and granularity != "token":
        raise ValueError(
            f"method='hierarchical' chooses the size of units itself, got "
            f"granularity={described(granularity)!r}; leave it out."
        )
    check_one_of("target_granularity", given["target_granularity"], TARGET_GRANULARITIES)
    checked_explain_only(given["explain_only"])
    documents = checked_documents(given["documents"])
    if documents and task.tokenizer is None:
        raise ValueError("documents need text; pass the tokenizer.")
    separator = given["separator"]
    if separator is not None and not isinstance(separator, str):
        raise TypeError(f"separator must be a str or None, got {separator!r}.")
    targets = _checked_answers(task, given)
    check_generation(targets, given["max_new_tokens"], generation_kwargs)
    return Asked(
        granularity,
        checked_image_granularity(images),
        images is not None,
        checked_max_units(given["max_units"], granularity),
        _checked_reading(task, preset, given),
        targets,
        _checked_target_span(task, given),
        documents,
    )


def _checked_reading(task: Task, preset: Preset, given: Mapping[str, Any]) -> Reading:
    check_one_of("reduction", given["reduction"], get_args(Reduction))
    postprocessing = given["postprocessing"]
    if postprocessing is None:
        postprocessing = preset.postprocessing
    check_one_of("postprocessing", postprocessing, get_args(Postprocessing))
    normalize = given["normalize"]
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be True or False, got {normalize!r}.")
    score = given["score"]
    if score is not None:
        check_one_of("score", score, task.quantities)
    return Reading(
        given["reduction"],
        postprocessing,
        normalize,
        given["contrast_target"] is not None,
        task.quantities[0] if score is None else score,
    )


def _checked_answers(task: Task, given: Mapping[str, Any]) -> list[Any] | None:
    """All targets; None lets the model answer."""
    targets = checked_targets(given["target"], given["targets"], classes=task.classifies)
    check_contrast(given["contrast_target"], given["targets"], classes=task.classifies)
    return targets


def _checked_target_span(task: Task, given: Mapping[str, Any]) -> str | Span | None:
    span = given["target_span"]
    if span is None:
        return None
    one = given["targets"] is None and given["contrast_target"] is None
    if not (one or task.classifies):
        raise TypeError(
            "target_span is of one answer; give target, without targets and contrast_target."
        )
    return span if isinstance(span, str) else checked_span("target_span", span)


def check_method(mode: str, method: str) -> None:
    """Refuse a method that a mode does not have."""
    if mode != "min_shift_full":
        return
    if method in ("direct", "hybrid"):
        raise ValueError(
            f"method={method!r} keeps the prompt's keys of the base run, which "
            "mode='min_shift_full' does not allow; take method='exact' or mode='min_shift'."
        )
    if method in GRADIENT_METHODS:
        raise ValueError(
            f"method={method!r} needs that no token acts on those before it, but with "
            "mode='min_shift_full' all do; take method='exact' or mode='min_shift'."
        )


def check_attention(task: Task, attention: Any, method: str, *, default: bool) -> None:
    """Refuse a choice that the model does not have, or that a method which was given contradicts.

    Args:
        task: What kind of model is asked.
        attention: Where a prompt is suppressed; None is everywhere.
        method: Which perturbations are run.
        default: Whether the method is only the preset's.
    """
    if attention is None:
        return
    check_one_of("attention", attention, get_args(Attention))
    if not task.attends:
        raise ValueError(
            f"attention={attention!r} chooses between an encoder and cross-attention, which "
            f"{type(task.model).__name__} does not have; leave it out."
        )
    if attention == "encoder" and method in ("direct", "hybrid") and not default:
        raise ValueError(
            f"method={method!r} suppresses in cross-attention, which attention='encoder' "
            "leaves alone; take method='exact', or attention='both' or 'cross'."
        )
