"""What a user amplifies or suppresses in a prompt, and the factor that each token gets from it.

A control with factor m gives a token of which it takes in the share p the factor 1 + (m - 1) · p.
With ``similarity=κ`` it also takes in tokens outside whose input embedding has a cosine similarity
S ≥ κ with one inside, with the share p · S; the largest share of a token counts. That is correlated
suppression (rule ``released``), for amplification as well. Where several controls meet on a token,
their factors multiply.

Legend: P tokens of a prompt, D width of embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .chat import Span
from .pieces import Area, Box
from .suppression import neighbourhoods

Overlap = Literal["partial", "complete"]

_ROUNDING = 1e-6  # of left + width, which may be 0.7 + 0.3


@dataclass(frozen=True)
class _Control:
    """What every control has: checks of the numbers that it is made of."""

    def __post_init__(self) -> None:
        for name in ("factor", "left", "top", "width", "height"):
            if name in self.__dataclass_fields__:
                object.__setattr__(self, name, _number(name, getattr(self, name)))
        factor: float = getattr(self, "factor")  # noqa: B009 - a field of every subclass
        if factor < 0:
            raise ValueError(f"factor must be at least 0, got {factor}; 0 suppresses most.")
        for name, least in (("start", 0), ("length", 1), ("pos", 0), ("image", 0)):
            if name in self.__dataclass_fields__:
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, Integral):
                    raise TypeError(f"{name} must be an int, got {value!r}.")
                object.__setattr__(self, name, int(value))
                if value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}.")
        overlap = getattr(self, "overlap", "partial")
        if overlap not in get_args(Overlap):
            raise ValueError(f"overlap must be 'partial' or 'complete', got {overlap!r}.")
        threshold = getattr(self, "similarity", None)
        if threshold is not None:
            threshold = _number("similarity", threshold)
            if not 0 < threshold <= 1:
                raise ValueError(
                    f"similarity must lie in (0, 1] or be None, got {threshold}; it is the least "
                    "cosine similarity that counts."
                )
            object.__setattr__(self, "similarity", threshold)


@dataclass(frozen=True)
class TextControl(_Control):
    """Amplify or suppress a piece of the prompt's text.

    Args:
        start: Its first character, counted from 0 in the text that was tokenised (for chat
            messages, what the template made of them).
        length: Its characters, at least 1. It must end within the text.
        factor: m, at least 0: below 1 suppresses, above 1 amplifies, 1 does nothing.
        overlap: What a token gets that only partly stands in the piece: ``partial`` 1 + (m - 1) · p
            with p the share of its characters that do, ``complete`` m. Many tokens hold the space
            before their word, which counts as one of their characters.
        similarity: The least cosine similarity of input embeddings for other tokens of the prompt
            to be taken along, in ``(0, 1]``; None takes none along.
    Raises:
        TypeError, ValueError: if a value is not as above.
    """

    start: int
    length: int
    factor: float
    overlap: Overlap = "partial"
    _: KW_ONLY
    similarity: float | None = None


@dataclass(frozen=True)
class TokenControl(_Control):
    """Amplify or suppress one token of the prompt.

    Args:
        pos: Its position among the tokens that the model reads, from 0: special tokens such as BOS
            count, padding does not.
        factor: m, at least 0: below 1 suppresses, above 1 amplifies, 1 does nothing.
        similarity: As of ``TextControl``.
    Raises:
        TypeError, ValueError: if a value is not as above.
    """

    pos: int
    factor: float
    _: KW_ONLY
    similarity: float | None = None


@dataclass(frozen=True)
class ImageControl(_Control):
    """Amplify or suppress a rectangle of an image; all lengths are shares of the image's.

    Args:
        left, top: Of its upper left corner, in ``[0, 1)``, from the image's.
        width, height: Above 0; the rectangle must end within the image.
        factor: m, at least 0: below 1 suppresses, above 1 amplifies, 1 does nothing.
        overlap: What a token gets whose patch only partly lies in the rectangle: ``partial``
            1 + (m - 1) · p with p the share of its area that does, ``complete`` m. Where a model
            reads a picture more than once (an overview and crops), all its tokens count.
        similarity: As of ``TextControl``.
        image: Which of the prompt's images, from 0.
    Raises:
        TypeError, ValueError: if a value is not as above.
    """

    left: float
    top: float
    width: float
    height: float
    factor: float
    overlap: Overlap = "partial"
    _: KW_ONLY
    similarity: float | None = None
    image: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for start, size in (("left", "width"), ("top", "height")):
            first, extent = getattr(self, start), getattr(self, size)
            if not 0 <= first < 1:
                raise ValueError(f"{start} must lie in [0, 1), a share of the image, got {first}.")
            if extent <= 0 or first + extent > 1 + _ROUNDING:
                raise ValueError(
                    f"{size} must be above 0 and end within the image, at most {1 - first:g}, "
                    f"got {extent}."
                )


Control = TextControl | TokenControl | ImageControl


@dataclass(frozen=True)
class ControlledRow:
    """What is known of one prompt.

    Args:
        tokens: P, without padding.
        spans: Each token's characters, ``(start, stop)``; None where it has no place in the text.
            A str instead says why they are not known.
        length: The text's characters; None where only the tokens' are known.
        areas: What of a picture each token stands for; None of others. Empty without pictures. A
            str instead says why it is not known.
        sizes: Width and height of each picture.
    """

    tokens: int
    spans: Sequence[Span | None] | str
    length: int | None
    areas: Sequence[Area | None] | str = ()
    sizes: Sequence[tuple[int, int]] = ()


def checked_controls(name: str, controls: Any) -> list[Control]:
    """The controls of one prompt.

    Raises: TypeError: if they are no sequence of controls.
    """
    if isinstance(controls, get_args(Control)):
        raise TypeError(f"{name} must be a sequence of controls; put the one into a list.")
    if isinstance(controls, (str, bytes)) or not isinstance(controls, Sequence):
        raise TypeError(f"{name} must be a sequence of controls, got {controls!r}.")
    for index, control in enumerate(controls):
        if not isinstance(control, get_args(Control)):
            raise TypeError(
                f"{name}[{index}] must be a TextControl, TokenControl or ImageControl, got "
                f"{control!r}."
            )
    return list(controls)


def plain_control(control: Control) -> dict[str, Any]:
    """A control as JSON values."""
    return {"kind": type(control).__name__} | dataclasses.asdict(control)


def control_factors(
    controls: Sequence[Control], row: ControlledRow, embeddings: Callable[[], Tensor]
) -> Tensor:
    """The factor of every token of one prompt: ``[P]`` float32 on the CPU.

    Args:
        controls: What acts on it.
        row: Its tokens.
        embeddings: Gives ``[P, D]``, its input embeddings; called if a control has a similarity.
    Raises:
        ValueError: if a control stands outside the prompt or on none of its tokens, or needs what
            is not known of it.
    """
    factors = torch.ones(row.tokens, dtype=torch.float64)
    for control in controls:
        share = _shares(control, row)
        if control.similarity is not None:
            share = _with_similar(share, embeddings(), control.similarity)
        factors *= 1 + (control.factor - 1) * share
    return factors.float()


def _shares(control: Control, row: ControlledRow) -> Tensor:
    """Of each token, how much of it a control takes in: ``[P]`` float64, from 0 to 1."""
    share = torch.zeros(row.tokens, dtype=torch.float64)
    if isinstance(control, TokenControl):
        if control.pos >= row.tokens:
            raise ValueError(
                f"{control} stands outside the prompt; pos must be at most {row.tokens - 1}."
            )
        share[control.pos] = 1.0
        return share
    if isinstance(control, ImageControl):
        return _shares_of_image(control, row)
    if isinstance(row.spans, str):
        raise ValueError(f"{control} needs the text of the prompt, but {row.spans}")
    first, end = control.start, control.start + control.length
    if row.length is not None and end > row.length:
        raise ValueError(
            f"{control} ends at character {end}, but the text of the prompt has {row.length}."
        )
    for index, span in enumerate(row.spans):
        if span is not None and (common := min(end, span[1]) - max(first, span[0])) > 0:
            share[index] = 1.0 if control.overlap == "complete" else common / (span[1] - span[0])
    if not bool(share.any()):
        raise ValueError(f"{control} takes in no token of the prompt.")
    return share


def _shares_of_image(control: ImageControl, row: ControlledRow) -> Tensor:
    """The same for a rectangle of a picture."""
    if isinstance(row.areas, str):
        raise ValueError(f"{control} needs the places of the image's tokens, but {row.areas}")
    if control.image >= len(row.sizes):
        raise ValueError(
            f"{control} needs an image in the prompt, which holds {len(row.sizes)} of them; image "
            "counts from 0."
        )
    width, height = row.sizes[control.image]
    wanted = (
        control.left * width,
        control.top * height,
        control.width * width,
        control.height * height,
    )
    share = torch.zeros(row.tokens, dtype=torch.float64)
    for index, area in enumerate(row.areas):
        if area is None or area.image != control.image or area.box is None:
            continue
        inside = _common(area.box, wanted) / (area.box[2] * area.box[3])
        if inside > _ROUNDING:
            share[index] = 1.0 if control.overlap == "complete" else min(inside, 1.0)
    if not bool(share.any()):
        raise ValueError(f"{control} takes in no token of the image.")
    return share


def _common(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(down, 0.0)


def _with_similar(share: Tensor, embeddings: Tensor, threshold: float) -> Tensor:
    """Shares ``[P]`` when similar tokens are taken along, each with the largest one it gets."""
    inside = share.nonzero()[:, 0]
    groups: dict[float, list[int]] = {}
    for index in inside.tolist():
        groups.setdefault(float(share[index]), []).append(index)
    largest = share.clone()
    near = neighbourhoods(embeddings, list(groups.values()), threshold)
    for own, neighbours in zip(groups, near, strict=True):
        columns = neighbours.columns
        largest[columns] = torch.maximum(largest[columns], own * neighbours.similarity.double())
    return largest


def _number(name: str, value: Any) -> float:
    """A finite number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.")
    return float(value)
