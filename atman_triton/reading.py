"""JSON values that were saved, read strictly: the wrong kind of value is named, none is guessed.

Every reader takes the name of what it reads, for its messages, and raises ValueError.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from .pictures import Picture, Sound
from .pieces import Document, LeftOut, Neighbour, Target, TargetPart, Unit

# What later versions of the format added to a piece.
_ADDED: dict[type, dict[int, tuple[str, ...]]] = {
    Unit: {
        2: ("branch", "effect", "level"),
        4: ("document", "neighbours"),
        5: ("image", "boxes", "seconds"),
    },
    Target: {2: ("branch",)},
    LeftOut: {2: ("branch",)},
}
NEIGHBOUR = tuple(each.name for each in fields(Neighbour))
"""The order in which a neighbour's fields are written."""


def unit(name: str, data: Any, version: int) -> Unit:
    """A unit with every field that this version of the format has; the others' defaults."""
    piece = _object(name, data, Unit, version)
    return Unit(
        text=string(f"{name}.text", piece["text"]),
        tokens=counts(f"{name}.tokens", piece["tokens"]),
        start=place(f"{name}.start", piece["start"]),
        stop=place(f"{name}.stop", piece["stop"]),
        part=cast(Any, string(f"{name}.part", piece["part"])),
        branch=place(f"{name}.branch", piece["branch"]),
        effect=cast(Any, string(f"{name}.effect", piece["effect"])),
        level=cast(Any, string(f"{name}.level", piece["level"])),
        document=place(f"{name}.document", piece["document"]),
        neighbours=_neighbours(f"{name}.neighbours", piece["neighbours"]),
        image=place(f"{name}.image", piece["image"]),
        boxes=tuple(
            cast(Any, _floats(f"{name}.boxes[{i}]", box, 4))
            for i, box in enumerate(listed(f"{name}.boxes", piece["boxes"]))
        ),
        seconds=None
        if piece["seconds"] is None
        else cast(Any, _floats(f"{name}.seconds", piece["seconds"], 2)),
    )


def _neighbours(name: str, data: Any) -> tuple[Neighbour, ...]:
    """There can be very many, so they get a name for messages only where something is wrong."""
    return tuple(
        Neighbour(*item) if _is_neighbour(item) else _neighbour(f"{name}[{i}]", item)
        for i, item in enumerate(listed(name, data))
    )


def _is_neighbour(data: Any) -> bool:
    if type(data) is not list or len(data) != len(NEIGHBOUR):
        return False
    token, factor, similarity, start, stop, branch = data
    return (
        type(factor) is type(similarity) is float
        and token is not None
        and _is_place(token)
        and _is_place(start)
        and _is_place(stop)
        and _is_place(branch)
    )


def _is_place(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _neighbour(name: str, data: Any) -> Neighbour:
    token, factor, similarity, start, stop, branch = listed(name, data, len(NEIGHBOUR))
    return Neighbour(
        token=integer(f"{name}.token", token),
        factor=_number(f"{name}.factor", factor),
        similarity=_number(f"{name}.similarity", similarity),
        start=place(f"{name}.start", start),
        stop=place(f"{name}.stop", stop),
        branch=place(f"{name}.branch", branch),
    )


def target(name: str, data: Any, version: int) -> Target:
    """A target token."""
    piece = _object(name, data, Target, version)
    return Target(
        text=string(f"{name}.text", piece["text"]),
        token=integer(f"{name}.token", piece["token"]),
        token_id=integer(f"{name}.token_id", piece["token_id"]),
        start=place(f"{name}.start", piece["start"]),
        stop=place(f"{name}.stop", piece["stop"]),
        branch=integer(f"{name}.branch", piece["branch"]),
    )


def left_out(name: str, data: Any, version: int) -> LeftOut:
    """A piece that is no unit."""
    piece = _object(name, data, LeftOut, version)
    return LeftOut(
        text=string(f"{name}.text", piece["text"]),
        tokens=counts(f"{name}.tokens", piece["tokens"]),
        reason=string(f"{name}.reason", piece["reason"]),
        branch=place(f"{name}.branch", piece["branch"]),
    )


def document(name: str, data: Any, version: int) -> Document:
    """A source."""
    piece = _object(name, data, Document, version)
    return Document(
        id=string(f"{name}.id", piece["id"]),
        start=integer(f"{name}.start", piece["start"]),
        stop=integer(f"{name}.stop", piece["stop"]),
    )


def part(name: str, data: Any, version: int) -> TargetPart:
    """Neighbouring target tokens."""
    piece = _object(name, data, TargetPart, version)
    return TargetPart(
        text=string(f"{name}.text", piece["text"]),
        rows=counts(f"{name}.rows", piece["rows"]),
        start=place(f"{name}.start", piece["start"]),
        stop=place(f"{name}.stop", piece["stop"]),
        branch=integer(f"{name}.branch", piece["branch"]),
    )


def picture(name: str, data: Any, version: int) -> Picture:
    """A picture of the prompt."""
    piece = _object(name, data, Picture, version)
    try:
        data = base64.b64decode(string(f"{name}.data", piece["data"]), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}.data must be base64: {error}.") from error
    return Picture(
        width=integer(f"{name}.width", piece["width"]),
        height=integer(f"{name}.height", piece["height"]),
        start=integer(f"{name}.start", piece["start"]),
        data=data,
    )


def sound(name: str, data: Any) -> Sound | None:
    """What the prompt is, or null."""
    if data is None:
        return None
    piece = _object(name, data, Sound, 5)
    levels = listed(f"{name}.envelope", piece["envelope"])
    return Sound(
        seconds=_number(f"{name}.seconds", piece["seconds"]),
        envelope=_floats(f"{name}.envelope", levels, len(levels)),
    )


def _floats(name: str, data: Any, length: int) -> tuple[float, ...]:
    return tuple(_number(f"{name}[{i}]", item) for i, item in enumerate(listed(name, data, length)))


def _object(name: str, value: Any, kind: type[Any], version: int) -> dict[str, Any]:
    """A piece with every field of its kind; what its version lacks gets its default."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}.")
    later = {
        field for since, names in _ADDED.get(kind, {}).items() if since > version for field in names
    }
    defaults = {each.name: each.default for each in fields(kind) if each.name in later}
    defaults = {key: [] if default == () else default for key, default in defaults.items()}
    known = [each.name for each in fields(kind) if each.name not in later]
    for key in known:
        if key not in value:
            raise ValueError(f"{name} lacks {key!r}.")
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has the unknown field {key!r}.")
    return value | defaults


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return float(value)


def listed(name: str, value: Any, length: int | None = None) -> list[Any]:
    """A list, of this length if one is given."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}.")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have length {length}, got {len(value)}.")
    return value


def string(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, got {value!r}.")
    return value


def integer(name: str, value: Any, kind: str = "an int") -> int:
    """A number that counts: no bool, none below 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")
    return value


def place(name: str, value: Any) -> int | None:
    """A number that counts, or null."""
    return None if value is None else integer(name, value, "an int or null")


def counts(name: str, value: Any) -> tuple[int, ...]:
    """Numbers that count."""
    return tuple(integer(f"{name}[{i}]", token) for i, token in enumerate(listed(name, value)))


def tensor(name: str, values: Any, length: int | None = None) -> Tensor:
    """float32: null is NaN, infinities are strings."""
    numbers = []
    for index, value in enumerate(listed(name, values, length)):
        if value is None:
            numbers.append(math.nan)
        elif value in ("inf", "-inf") or (
            isinstance(value, int | float) and not isinstance(value, bool)
        ):
            numbers.append(float(value))
        else:
            raise ValueError(f"{name}[{index}] must be a number, got {value!r}.")
    return torch.tensor(numbers, dtype=torch.float32)
