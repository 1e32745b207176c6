"""Explanations as JSON: what ``Explanation.save`` writes and ``load`` reads back exactly.

Version 1 knew one target, token units and total effects only, version 2 no gradient methods; their
files still load.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .pieces import LeftOut, Target, Unit

if TYPE_CHECKING:
    from .explanation import Explanation

FORMAT = "atman_explanation"
VERSION = 3
# What version 1 did not write, by the kind of piece.
NEW_IN_2 = {
    Unit: ("branch", "effect", "level"),
    Target: ("branch",),
    LeftOut: ("branch",),
}


def load(path: str | os.PathLike[str]) -> Explanation:
    """Read an explanation that ``Explanation.save`` wrote.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no saved explanation, is damaged, or was written by a newer version.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no saved explanation: it is not text.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no complete JSON file (line {error.lineno}, column {error.colno}: "
            f"{error.msg}); it may be cut short."
        ) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'{path} is no saved explanation: it lacks "format": "{FORMAT}".')
    version = data.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"{path} is damaged: version must be a positive integer, got {version!r}.")
    if version > VERSION:
        raise ValueError(
            f"{path} has version {version}, this release reads up to version {VERSION}: "
            "upgrade atman_triton."
        )
    try:
        return from_json(data)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error.args[0]!r}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def save(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Write everything as one line of JSON."""
    Path(path).write_text(json.dumps(to_json(explanation), allow_nan=False) + "\n", "utf-8")


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON values: NaN is null, infinities are strings, float32 stays exact."""
    return {"format": FORMAT, "version": VERSION} | _body(explanation)


def _body(explanation: Explanation) -> dict[str, Any]:
    coarse, together = explanation.coarse, explanation.together_logprobs
    return {
        "text": explanation.text,
        "prompt_stop": explanation.prompt_stop,
        "target_stops": explanation.target_stops,
        "method": explanation.method,
        "units": [_piece(unit) for unit in explanation.units],
        "targets": [asdict(target) for target in explanation.targets],
        "base_logprobs": _numbers(explanation.base_logprobs),
        "suppressed_logprobs": [_numbers(row) for row in explanation.suppressed_logprobs],
        "together_logprobs": None if together is None else _numbers(together),
        "reduction": explanation.reduction,
        "left_out": [_piece(piece) for piece in explanation.left_out],
        "provenance": explanation.provenance,
        "coarse": None if coarse is None else _body(coarse),
    }


def from_json(data: dict[str, Any]) -> Explanation:
    """The inverse of ``to_json``, also for what version 1 wrote; other fields are ignored.

    Raises: KeyError, TypeError or ValueError: if a field is missing or wrong, naming the field.
    """
    return _explanation(data, data["version"])


def _explanation(data: dict[str, Any], version: int) -> Explanation:
    from .explanation import Explanation  # which imports this module

    units = [
        _unit(f"units[{i}]", item, version) for i, item in enumerate(_list("units", data["units"]))
    ]
    targets = [
        _target(f"targets[{i}]", item, version)
        for i, item in enumerate(_list("targets", data["targets"]))
    ]
    rows = _list("suppressed_logprobs", data["suppressed_logprobs"], len(targets))
    suppressed = [
        _tensor(f"suppressed_logprobs[{i}]", row, len(units)) for i, row in enumerate(rows)
    ]
    if not isinstance(data["provenance"], dict):
        raise ValueError(f"provenance must be an object, got {data['provenance']!r}.")
    later: dict[str, Any] = {}
    if version > 1:
        later = {
            "target_stops": [
                _int(f"target_stops[{i}]", item)
                for i, item in enumerate(_list("target_stops", data["target_stops"]))
            ],
            "method": _str("method", data["method"]),
            "coarse": _coarse(data["coarse"], version),
        }
    if version > 2 and data["together_logprobs"] is not None:
        later["together_logprobs"] = _tensor("together_logprobs", data["together_logprobs"])
    return Explanation(
        text=_str("text", data["text"]),
        prompt_stop=_int("prompt_stop", data["prompt_stop"]),
        units=units,
        targets=targets,
        base_logprobs=_tensor("base_logprobs", data["base_logprobs"]),
        suppressed_logprobs=torch.stack(suppressed) if suppressed else torch.empty(0, len(units)),
        reduction=cast(Any, _str("reduction", data["reduction"])),
        left_out=[
            _left_out(f"left_out[{i}]", item, version)
            for i, item in enumerate(_list("left_out", data["left_out"]))
        ],
        provenance=data["provenance"],
        **later,
    )


def _coarse(data: Any, version: int) -> Explanation | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError(f"coarse must be an object or null, got {data!r}.")
    try:
        return _explanation(data, version)
    except KeyError as error:
        raise ValueError(f"coarse lacks {error.args[0]!r}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"in coarse, {error}") from error


def _piece(piece: Unit | LeftOut) -> dict[str, Any]:
    return asdict(piece) | {"tokens": list(piece.tokens)}


def _numbers(values: Tensor) -> list[float | str | None]:
    """float32 values as JSON: 9 significant digits tell any two float32 apart."""
    return [
        float(f"{value:.9g}") if math.isfinite(value) else None if math.isnan(value) else str(value)
        for value in values.tolist()
    ]


def _unit(name: str, data: Any, version: int) -> Unit:
    piece = _object(name, data, Unit, version)
    return Unit(
        text=_str(f"{name}.text", piece["text"]),
        tokens=_tokens(f"{name}.tokens", piece["tokens"]),
        start=_place(f"{name}.start", piece["start"]),
        stop=_place(f"{name}.stop", piece["stop"]),
        part=cast(Any, _str(f"{name}.part", piece["part"])),
        branch=_place(f"{name}.branch", piece["branch"]),
        effect=cast(Any, _str(f"{name}.effect", piece["effect"])),
        level=cast(Any, _str(f"{name}.level", piece["level"])),
    )


def _target(name: str, data: Any, version: int) -> Target:
    piece = _object(name, data, Target, version)
    return Target(
        text=_str(f"{name}.text", piece["text"]),
        token=_int(f"{name}.token", piece["token"]),
        token_id=_int(f"{name}.token_id", piece["token_id"]),
        start=_place(f"{name}.start", piece["start"]),
        stop=_place(f"{name}.stop", piece["stop"]),
        branch=_int(f"{name}.branch", piece["branch"]),
    )


def _left_out(name: str, data: Any, version: int) -> LeftOut:
    piece = _object(name, data, LeftOut, version)
    return LeftOut(
        text=_str(f"{name}.text", piece["text"]),
        tokens=_tokens(f"{name}.tokens", piece["tokens"]),
        reason=_str(f"{name}.reason", piece["reason"]),
        branch=_place(f"{name}.branch", piece["branch"]),
    )


def _object(
    name: str, value: Any, kind: type[Unit] | type[Target] | type[LeftOut], version: int
) -> dict[str, Any]:
    """A piece with every field of its kind; what version 1 lacks gets its default."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}.")
    defaults = {each.name: each.default for each in fields(kind) if each.name in NEW_IN_2[kind]}
    known = [each.name for each in fields(kind) if version > 1 or each.name not in defaults]
    for key in known:
        if key not in value:
            raise ValueError(f"{name} lacks {key!r}.")
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has the unknown field {key!r}.")
    return value if version > 1 else value | defaults


def _list(name: str, value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}.")
    if length is not None and len(value) != length:
        raise ValueError(f"{name} must have length {length}, got {len(value)}.")
    return value


def _str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a str, got {value!r}.")
    return value


def _int(name: str, value: Any, kind: str = "an int") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}.")
    return value


def _place(name: str, value: Any) -> int | None:
    return None if value is None else _int(name, value, "an int or null")


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    return tuple(_int(f"{name}[{i}]", token) for i, token in enumerate(_list(name, value)))


def _tensor(name: str, values: Any, length: int | None = None) -> Tensor:
    """The inverse of ``_numbers``."""
    numbers = []
    for index, value in enumerate(_list(name, values, length)):
        if value is None:
            numbers.append(math.nan)
        elif value in ("inf", "-inf") or (
            isinstance(value, int | float) and not isinstance(value, bool)
        ):
            numbers.append(float(value))
        else:
            raise ValueError(f"{name}[{index}] must be a number, got {value!r}.")
    return torch.tensor(numbers, dtype=torch.float32)
