"""Explanations as JSON: what ``Explanation.save`` writes and ``load`` reads back exactly.

Version 1 knew one target, token units and total effects only, version 2 no gradient methods,
version 3 no documents, neighbours, parts and ways to read the scores, version 4 no pictures, sounds
and classes; their files still load.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import reading
from .pictures import Picture, Sound
from .pieces import LeftOut, Unit

if TYPE_CHECKING:
    from .explanation import Explanation

FORMAT = "atman_explanation"
VERSION = 5


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
        "units": [_unit(unit) for unit in explanation.units],
        "targets": [asdict(target) for target in explanation.targets],
        "base_logprobs": _numbers(explanation.base_logprobs),
        "suppressed_logprobs": [_numbers(row) for row in explanation.suppressed_logprobs],
        "together_logprobs": None if together is None else _numbers(together),
        "reduction": explanation.reduction,
        "left_out": [_piece(piece) for piece in explanation.left_out],
        "provenance": explanation.provenance,
        "documents": [asdict(document) for document in explanation.documents],
        "parts": [asdict(part) | {"rows": list(part.rows)} for part in explanation.parts],
        "postprocessing": explanation.postprocessing,
        "normalize": explanation.normalize,
        "contrast": explanation.contrast,
        "pictures": [_picture(picture) for picture in explanation.pictures],
        "sound": _sound(explanation.sound),
        "quantity": explanation.quantity,
        "coarse": None if coarse is None else _body(coarse),
    }


def from_json(data: dict[str, Any]) -> Explanation:
    """The inverse of ``to_json``, also for what older versions wrote; other fields are ignored.

    Raises: KeyError, TypeError or ValueError: if a field is missing or wrong, naming the field.
    """
    return _explanation(data, data["version"])


def _explanation(data: dict[str, Any], version: int) -> Explanation:
    from .explanation import Explanation  # which imports this module

    def pieces(field: str, read: Callable[[str, Any, int], Any]) -> list[Any]:
        items = enumerate(reading.listed(field, data[field]))
        return [read(f"{field}[{i}]", item, version) for i, item in items]

    units, targets = pieces("units", reading.unit), pieces("targets", reading.target)
    rows = reading.listed("suppressed_logprobs", data["suppressed_logprobs"], len(targets))
    suppressed = [
        reading.tensor(f"suppressed_logprobs[{i}]", row, len(units)) for i, row in enumerate(rows)
    ]
    if not isinstance(data["provenance"], dict):
        raise ValueError(f"provenance must be an object, got {data['provenance']!r}.")
    later: dict[str, Any] = {}
    if version > 1:
        later = {
            "target_stops": list(reading.counts("target_stops", data["target_stops"])),
            "method": reading.string("method", data["method"]),
            "coarse": _coarse(data["coarse"], version),
        }
    if version > 2 and data["together_logprobs"] is not None:
        later["together_logprobs"] = reading.tensor("together_logprobs", data["together_logprobs"])
    if version > 3:
        later |= {
            "documents": pieces("documents", reading.document),
            "parts": pieces("parts", reading.part),
            "postprocessing": reading.string("postprocessing", data["postprocessing"]),
            "normalize": reading.flag("normalize", data["normalize"]),
            "contrast": reading.flag("contrast", data["contrast"]),
        }
    if version > 4:
        later |= {
            "pictures": pieces("pictures", reading.picture),
            "sound": reading.sound("sound", data["sound"]),
            "quantity": reading.string("quantity", data["quantity"]),
        }
    return Explanation(
        text=reading.string("text", data["text"]),
        prompt_stop=reading.integer("prompt_stop", data["prompt_stop"]),
        units=units,
        targets=targets,
        base_logprobs=reading.tensor("base_logprobs", data["base_logprobs"]),
        suppressed_logprobs=torch.stack(suppressed) if suppressed else torch.empty(0, len(units)),
        reduction=cast(Any, reading.string("reduction", data["reduction"])),
        left_out=pieces("left_out", reading.left_out),
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


def _unit(unit: Unit) -> dict[str, Any]:
    """A neighbour is written as a list, in the order of its fields: there can be very many."""
    near = [[getattr(each, name) for name in reading.NEIGHBOUR] for each in unit.neighbours]
    rest = _piece(replace(unit, neighbours=()))
    boxes = [list(box) for box in unit.boxes]
    seconds = None if unit.seconds is None else list(unit.seconds)
    return rest | {"neighbours": near, "boxes": boxes, "seconds": seconds}


def _picture(picture: Picture) -> dict[str, Any]:
    return asdict(picture) | {"data": base64.b64encode(picture.data).decode("ascii")}


def _sound(sound: Sound | None) -> dict[str, Any] | None:
    return sound and asdict(sound) | {"envelope": list(sound.envelope)}


def _piece(piece: Unit | LeftOut) -> dict[str, Any]:
    return asdict(piece) | {"tokens": list(piece.tokens)}


def _numbers(values: Tensor) -> list[float | str | None]:
    """float32 values as JSON: 9 significant digits tell any two float32 apart."""
    return [
        float(f"{value:.9g}") if math.isfinite(value) else None if math.isnan(value) else str(value)
        for value in values.tolist()
    ]
