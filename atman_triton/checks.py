"""What must hold between the fields of an explanation; every message names the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from .pictures import Picture, Sound
from .pieces import EFFECTS, LEVELS, Document, Neighbour, Target, TargetPart, Unit
from .reduction import Postprocessing, Quantity, Reduction

if TYPE_CHECKING:
    from .explanation import Explanation

_EDGE = 0.01  # pixels, for rounding
GRADIENT_METHODS = ("path", "score_gradient")


def check_settings(explanation: Explanation) -> None:
    """The text and the names of settings."""
    e = explanation
    if not isinstance(e.text, str):
        raise TypeError(f"text must be a str, got {type(e.text).__name__}.")
    if not 0 <= e.prompt_stop <= len(e.text):
        raise ValueError(f"prompt_stop must lie in [0, {len(e.text)}], got {e.prompt_stop}.")
    if e.reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {e.reduction!r}.")
    if not isinstance(e.method, str) or not e.method:
        raise ValueError(f"method must be a name, got {e.method!r}.")
    if e.postprocessing not in get_args(Postprocessing):
        raise ValueError(
            f"postprocessing must be 'none', 'absolute' or 'square', got {e.postprocessing!r}."
        )
    if e.quantity not in get_args(Quantity):
        raise ValueError(f"quantity must be 'logprob', 'logit' or 'output', got {e.quantity!r}.")
    for name in ("normalize", "contrast"):
        if not isinstance(getattr(e, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(e, name)!r}.")


def check_targets(explanation: Explanation) -> None:
    """Where the targets end, and how many a contrast has."""
    e = explanation
    edges = [e.prompt_stop, *e.target_stops]
    if edges != sorted(edges) or edges[-1] != len(e.text):
        raise ValueError(
            f"target_stops must rise from prompt_stop {e.prompt_stop} to the text's length "
            f"{len(e.text)}, got {e.target_stops}."
        )
    if e.contrast and len(e.target_stops) != 2:
        raise ValueError(
            "contrast is between two targets, the one that is explained and the other, got "
            f"{len(e.target_stops)}."
        )
    check_pieces("units", e.units, Unit, len(e.text))
    check_pieces("targets", e.targets, Target, len(e.text))
    check_names(e.units, e.method)


def check_pieces(name: str, pieces: Sequence[Any], kind: type, length: int) -> None:
    """Raise TypeError or ValueError unless all are of one kind and span characters of the text."""
    if not pieces:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, got none.")
    for index, piece in enumerate(pieces):
        if not isinstance(piece, kind):
            raise TypeError(
                f"{name}[{index}] must be a {kind.__name__}, got {type(piece).__name__}."
            )
        _check_span(f"{name}[{index}]", piece, length)


def _check_span(name: str, piece: Any, length: int) -> None:
    start, stop = piece.start, piece.stop
    if start is None and stop is None:
        return
    if start is None or stop is None or not 0 <= start <= stop <= length:
        raise ValueError(f"{name} must span characters within [0, {length}], got {start}:{stop}.")


def check_names(units: Sequence[Unit], method: str) -> None:
    """Raise ValueError unless parts, effects and levels are known and effects fit the method."""
    effects = {
        "exact": ("total",),
        "direct": ("direct",),
        "path": ("path",),
        "score_gradient": ("gradient",),
        "hybrid": ("total", "direct"),
        "hierarchical": ("total", "direct"),
    }.get(method, ("baseline",))
    for index, unit in enumerate(units):
        if unit.part not in ("prompt", "target"):
            raise ValueError(
                f"units[{index}].part must be 'prompt' or 'target', got {unit.part!r}."
            )
        if unit.effect not in EFFECTS:
            raise ValueError(
                f"units[{index}].effect must be one of {', '.join(EFFECTS)}, got {unit.effect!r}."
            )
        if unit.effect not in effects:
            raise ValueError(
                f"units[{index}].effect must be {' or '.join(map(repr, effects))} where method is "
                f"{method!r}, got {unit.effect!r}."
            )
        if unit.level not in LEVELS:
            raise ValueError(
                f"units[{index}].level must be one of {', '.join(LEVELS)}, got {unit.level!r}."
            )


def check_branches(explanation: Explanation) -> None:
    """Raise ValueError unless every piece belongs to a target that exists, and stands in it."""
    e, count = explanation, len(explanation.target_stops)
    order = [target.branch for target in e.targets]
    if order != sorted(order) or set(order) != set(range(count)):
        raise ValueError(
            f"targets must belong to targets 0 to {count - 1} in order, at least one token each, "
            f"got branches {_short(order)}."
        )
    for index, unit in enumerate(e.units):
        if unit.part == "prompt" and unit.branch is not None:
            raise ValueError(
                f"units[{index}].branch must be None for a piece of the prompt, got {unit.branch}."
            )
        if unit.part == "target" and unit.branch not in range(count):
            raise ValueError(
                f"units[{index}].branch must lie in [0, {count - 1}], got {unit.branch}."
            )
    if count > 1:
        for name in ("units", "targets"):
            for index, piece in enumerate(getattr(e, name)):
                _check_place(f"{name}[{index}]", piece, e)


def _check_place(name: str, piece: Any, explanation: Explanation) -> None:
    """A piece with a place must stand in the prompt or in its own target."""
    edges, branch = [explanation.prompt_stop, *explanation.target_stops], piece.branch
    low, high = (0, edges[0]) if branch is None else edges[branch : branch + 2]
    if piece.start is not None and not low <= piece.start <= piece.stop <= high:
        whose = "the prompt" if branch is None else f"target {branch}"
        raise ValueError(
            f"{name} must span characters of {whose}, within [{low}, {high}], "
            f"got {piece.start}:{piece.stop}."
        )


def check_documents(explanation: Explanation) -> None:
    """Raise unless documents follow each other in the prompt and units stand in theirs.

    A unit may reach beyond its document, as a token may stand on both sides of its border.
    """
    e, end, known = explanation, 0, set()
    for index, document in enumerate(e.documents):
        name = f"documents[{index}]"
        if not isinstance(document, Document):
            raise TypeError(f"{name} must be a Document, got {type(document).__name__}.")
        if not isinstance(document.id, str):
            raise TypeError(f"{name}.id must be a str, got {type(document.id).__name__}.")
        if document.id in known:
            raise ValueError(f"{name}.id must be unique, but {document.id!r} came before.")
        if not end <= document.start < document.stop <= e.prompt_stop:
            raise ValueError(
                f"{name} must span characters of the prompt behind the document before it, within "
                f"[{end}, {e.prompt_stop}] and at least one, got {document.start}:{document.stop}."
            )
        known.add(document.id)
        end = document.stop
    for index, unit in enumerate(e.units):
        if unit.document is None:
            continue
        name, count = f"units[{index}]", len(e.documents)
        if not _is_index(unit.document, count):
            raise ValueError(
                f"{name}.document must be None or one of the {count} documents, counted from 0, "
                f"got {unit.document!r}."
            )
        if unit.part != "prompt":
            raise ValueError(f"{name}.document must be None for a piece of a target.")
        if unit.start is None or unit.stop is None:
            continue
        document = e.documents[unit.document]
        inside = e.text[max(unit.start, document.start) : min(unit.stop, document.stop)]
        if unit.text.strip() and not inside.strip():
            raise ValueError(
                f"{name} must span characters of document {document.id!r}, within "
                f"[{document.start}, {document.stop}], got {unit.start}:{unit.stop}."
            )


def check_pictures(explanation: Explanation) -> None:
    """Raise unless units that stand in a picture or a sound stand within one that is there."""
    e = explanation
    for index, picture in enumerate(e.pictures):
        if not isinstance(picture, Picture):
            raise TypeError(f"pictures[{index}] must be a Picture, got {type(picture).__name__}.")
        if picture.start > e.prompt_stop:
            raise ValueError(
                f"pictures[{index}].start must lie within the prompt, [0, {e.prompt_stop}], got "
                f"{picture.start}."
            )
    if e.sound is not None and not isinstance(e.sound, Sound):
        raise TypeError(f"sound must be a Sound or None, got {type(e.sound).__name__}.")
    for index, unit in enumerate(e.units):
        name = f"units[{index}]"
        if unit.seconds is not None:
            start, stop = unit.seconds
            if e.sound is None or not 0 <= start < stop:
                raise ValueError(
                    f"{name}.seconds must rise from 0 or later in a sound that is there, got "
                    f"{unit.seconds}."
                )
        if unit.image is None:
            if unit.boxes:
                raise ValueError(f"{name}.boxes must be empty where image is None.")
            continue
        if not _is_index(unit.image, len(e.pictures)):
            raise ValueError(
                f"{name}.image must be None or one of the {len(e.pictures)} pictures, counted "
                f"from 0, got {unit.image!r}."
            )
        picture = e.pictures[unit.image]
        for box in unit.boxes:
            left, top, width, height = box
            inside = left > -_EDGE and top > -_EDGE and width > 0 and height > 0
            if not (
                inside
                and left + width <= picture.width + _EDGE
                and top + height <= picture.height + _EDGE
            ):
                raise ValueError(
                    f"{name}.boxes must lie within the picture of {picture.width}×"
                    f"{picture.height} pixels, got {box}."
                )


def check_neighbours(explanation: Explanation) -> None:
    """Raise unless neighbours are other tokens that the unit's own run can suppress."""
    e = explanation
    bounds = [*pairwise([e.prompt_stop, *e.target_stops]), (0, e.prompt_stop)]
    checked: dict[int, Neighbour] = {}  # there can be very many, but few that are different
    for index, unit in enumerate(e.units):
        seen: set[tuple[int | None, int]] = {(unit.branch, token) for token in unit.tokens}
        for place, near in enumerate(unit.neighbours):
            if id(near) not in checked:
                _check_neighbour(f"units[{index}].neighbours[{place}]", near, bounds, e)
                checked[id(near)] = near
            if None not in (unit.branch, near.branch) and near.branch != unit.branch:
                raise ValueError(
                    f"units[{index}].neighbours[{place}].branch must be None or the unit's own "
                    f"target {unit.branch}, got {near.branch}."
                )
            if (near.branch, near.token) in seen:
                raise ValueError(
                    f"units[{index}].neighbours[{place}].token must be a token outside of the "
                    f"unit that was not named before, got {near.token}."
                )
            seen.add((near.branch, near.token))


def _check_neighbour(
    name: str, near: Any, bounds: list[tuple[int, int]], explanation: Explanation
) -> None:
    """One by itself; the prompt's bounds are the last ones."""
    count = len(explanation.target_stops)
    if not isinstance(near, Neighbour):
        raise TypeError(f"{name} must be a Neighbour, got {type(near).__name__}.")
    for field, value in (("factor", near.factor), ("similarity", near.similarity)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}.{field} must be a number, got {value!r}.")
        if not math.isfinite(value):
            raise ValueError(f"{name}.{field} must be finite, got {value}.")
    if near.branch is not None and not _is_index(near.branch, count):
        raise ValueError(
            f"{name}.branch must be None in the prompt, else lie in [0, {count - 1}], "
            f"got {near.branch!r}."
        )
    low, high = bounds[-1 if near.branch is None else near.branch]
    start, stop = near.start, near.stop
    if start is None or stop is None or not low <= start <= stop <= high:
        _check_span(name, near, len(explanation.text))
        _check_place(name, near, explanation)


def check_parts(explanation: Explanation) -> None:
    """Raise unless every target token is in exactly one part, and a part within one target."""
    e, known = explanation, set()
    for index, part in enumerate(e.parts):
        name = f"parts[{index}]"
        if not isinstance(part, TargetPart):
            raise TypeError(f"{name} must be a TargetPart, got {type(part).__name__}.")
        rows = list(part.rows)
        if not rows or rows != sorted(set(rows)) or not _is_index(rows[-1], len(e.targets)):
            raise ValueError(
                f"{name}.rows must rise within [0, {len(e.targets) - 1}], at least one, "
                f"got {_short(rows)}."
            )
        if rows[0] < 0 or known.intersection(rows):
            raise ValueError(
                f"{name}.rows must be target tokens that no part before it holds, "
                f"got {_short(rows)}."
            )
        known.update(rows)
        owners = {e.targets[row].branch for row in rows}
        if owners != {part.branch}:
            raise ValueError(
                f"{name} must lie within its target {part.branch}, got tokens of "
                f"{', '.join(map(str, sorted(owners)))}."
            )
        _check_span(name, part, len(e.text))
        _check_place(name, part, e)
    missing = sorted(set(range(len(e.targets))) - known)
    if missing:
        raise ValueError(
            f"parts must hold every target token, missing are {_short(missing)}; leave parts "
            "empty for one per target."
        )
    first = [part.rows[0] for part in e.parts]
    if first != sorted(first):
        raise ValueError(f"parts must be in text order, got first tokens {_short(first)}.")


def check_together(explanation: Explanation) -> None:
    """Raise unless gradient methods, and only they, tell what all units did together."""
    e = explanation
    wanted = e.method in GRADIENT_METHODS
    if e.together_logprobs is None:
        if wanted:
            raise ValueError(f"together_logprobs must be given where method is {e.method!r}.")
        return
    if not wanted:
        raise ValueError(
            f"together_logprobs must be None where method is {e.method!r}: it is for "
            f"{' and '.join(GRADIENT_METHODS)}."
        )
    if bool(e.together_logprobs.isnan().any()):
        raise ValueError("together_logprobs must hold no NaN.")


def check_numbers(explanation: Explanation) -> None:
    """Raise ValueError where a number stands that cannot have been measured."""
    e = explanation
    branches = torch.tensor([target.branch for target in e.targets])
    if bool(e.base_logprobs.isnan().any()):
        raise ValueError(
            "base_logprobs must hold no NaN: the model returned NaN with nothing suppressed; "
            "try another dtype."
        )
    # A unit of one target says nothing about another one: NaN, never a number.
    owners = torch.tensor([-1 if unit.branch is None else unit.branch for unit in e.units])
    foreign = (owners >= 0) & (owners != branches[:, None])  # [T, U]
    wrong = (foreign & ~e.suppressed_logprobs.isnan()).nonzero()
    if len(wrong):
        target, unit = wrong[0].tolist()
        raise ValueError(
            f"suppressed_logprobs[{target}, {unit}] must be NaN: the unit belongs to target "
            f"{e.units[unit].branch}, the token to target {e.targets[target].branch}."
        )


def check_coarse(explanation: Explanation) -> None:
    """Raise unless the explanation by larger units is of the same prompt and targets."""
    e, coarse = explanation, explanation.coarse
    if coarse is None:
        return
    if not isinstance(coarse, type(e)):
        raise TypeError(f"coarse must be an Explanation or None, got {type(coarse).__name__}.")
    same = ("text", "prompt_stop", "target_stops", "targets", "documents", "pictures", "sound")
    for name in (*same, "quantity"):
        if getattr(coarse, name) != getattr(e, name):
            raise ValueError(f"coarse must explain the same prompt and targets; {name} differ.")


def checked_tensor(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor on the CPU, detached; TypeError or ValueError unless float32 of this shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be torch.float32, got {value.dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}.")
    return value.detach().cpu()


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _short(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"[{shown}, ...]" if len(values) > 12 else f"[{shown}]"
