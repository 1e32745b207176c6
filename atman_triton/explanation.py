"""The result of an explanation: which units of the input supported which target tokens.

Legend: U units (what was suppressed, one at a time), T target tokens (what was scored).
Log-probabilities and scores are in nats. ``token`` and ``tokens`` count tokens of the model input
from 0; ``start`` and ``stop`` count characters of ``Explanation.text`` from 0, ``stop`` exclusive.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Explanation", "LeftOut", "Target", "Unit", "load"]

FORMAT = "atman_explanation"
VERSION = 1


@dataclass(frozen=True)
class Unit:
    """A piece of the input that was suppressed as one: a token, a word, a sentence.

    Args:
        text: The piece as text; for a token that holds part of a character, what it decodes to.
        tokens: Its positions in the model input.
        start: First character in ``Explanation.text``; None where the piece has no place there.
        stop: One past its last character; None together with ``start``.
        part: Whether it belongs to the prompt or to the target.
    """

    text: str
    tokens: tuple[int, ...]
    start: int | None
    stop: int | None
    part: Literal["prompt", "target"]


@dataclass(frozen=True)
class Target:
    """A token whose log-probability was scored.

    Args:
        text: The token as text.
        token: Its position in the model input (the last one is scored, but never fed to the model).
        token_id: Its index in the vocabulary.
        start: First character in ``Explanation.text``; None where the token has no place there.
        stop: One past its last character; None together with ``start``.
    """

    text: str
    token: int
    token_id: int
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class LeftOut:
    """A piece of the input that the model read but that is no unit.

    Args:
        text: The piece as text, for example ``<s>``.
        tokens: Its positions in the model input.
        reason: Why it was left out, for example ``special token``.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str


@dataclass(eq=False, repr=False)
class Explanation:
    """What every unit of the input contributed to every target token.

    ``scores[t, u]`` is the rise of the loss of target ``t`` when unit ``u`` is suppressed: positive
    means that the unit supports the target, negative that it opposes it. NaN means not measured,
    because the unit stands at or after the target; it never means 0.

    Args:
        text: Prompt followed by target, as the model read them; all character spans refer to it.
        prompt_stop: Character of ``text`` where the prompt ends and the target starts.
        units: The ``U`` pieces that were suppressed, at least one.
        targets: The ``T`` scored tokens, at least one.
        base_logprobs: ``[T]`` float32, nats: log p of each target token with nothing suppressed.
        suppressed_logprobs: ``[T, U]`` float32, nats: the same with one unit suppressed; NaN where
            the unit stands at or after the target.
        reduction: How ``relevance`` goes over target tokens: ``"mean"`` (Eq. 3), ``"sum"`` (Eq. 2).
        left_out: What the model read besides the units, such as template tokens.
        provenance: How the numbers came about: model, settings, library versions. JSON values only.

    Tensors are kept on the CPU, detached; ``provenance`` as JSON returns it (tuples become lists).

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if shapes, spans or names disagree.
    Source: AtMan, Eq. 2 and 3.
    """

    text: str
    prompt_stop: int
    units: list[Unit]
    targets: list[Target]
    base_logprobs: Tensor
    suppressed_logprobs: Tensor
    reduction: Literal["mean", "sum"] = "mean"
    left_out: list[LeftOut] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a str, got {type(self.text).__name__}.")
        if not 0 <= self.prompt_stop <= len(self.text):
            raise ValueError(
                f"prompt_stop must lie in [0, {len(self.text)}], got {self.prompt_stop}."
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")
        self.units, self.targets = list(self.units), list(self.targets)
        self.left_out = list(self.left_out)
        _check_pieces("units", self.units, Unit, len(self.text))
        _check_pieces("targets", self.targets, Target, len(self.text))
        for index, unit in enumerate(self.units):
            if unit.part not in ("prompt", "target"):
                raise ValueError(
                    f"units[{index}].part must be 'prompt' or 'target', got {unit.part!r}."
                )
        shape = (len(self.targets), len(self.units))
        self.base_logprobs = _checked("base_logprobs", self.base_logprobs, shape[:1])
        self.suppressed_logprobs = _checked("suppressed_logprobs", self.suppressed_logprobs, shape)
        if bool(self.base_logprobs.isnan().any()):
            raise ValueError(
                "base_logprobs must hold no NaN: the model returned NaN with nothing suppressed; "
                "try another dtype."
            )
        try:
            self.provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must hold JSON values only: {error}.") from error

    @property
    def scores(self) -> Tensor:
        """``[T, U]`` float32, nats: loss with the unit suppressed minus loss without.

        Positive: the unit supports the target. NaN: the unit stands at or after the target.
        Source: AtMan, Eq. 3.
        """
        return self.base_logprobs[:, None] - self.suppressed_logprobs

    @property
    def relevance(self) -> Tensor:
        """``[U]`` float32, nats: ``scores`` averaged (or summed) over the target tokens.

        NaN counts as absent; a unit that was measured for no target stays NaN.
        Source: AtMan, Eq. 3 (mean), Eq. 2 (sum).
        """
        scores = self.scores.double()
        measured = (~scores.isnan()).sum(0)
        total = scores.nansum(0)
        reduced = total / measured if self.reduction == "mean" else total
        return reduced.where(measured > 0, torch.nan).float()

    @property
    def prompt(self) -> str:
        """The prompt as the model read it."""
        return self.text[: self.prompt_stop]

    @property
    def answer(self) -> str:
        """The target as text: what was explained."""
        return self.text[self.prompt_stop :] or "".join(target.text for target in self.targets)

    def ranking(self, target: int | None = None) -> list[int]:
        """Indices of the measured units, the strongest supporter first; ties stay in text order.

        Args:
            target: Rank by this row of ``scores`` instead of by ``relevance``.
        Raises: ValueError: if there is no such target.
        """
        values = self.values(target).tolist()
        measured = [index for index, value in enumerate(values) if not math.isnan(value)]
        return sorted(measured, key=lambda index: -values[index])

    def values(self, target: int | None = None) -> Tensor:
        """``[U]`` float32, nats: ``relevance``, or one row of ``scores``.

        Args:
            target: Index of a target token; None for all of them reduced.
        Raises: ValueError: if there is no such target.
        """
        if target is None:
            return self.relevance
        if not 0 <= target < len(self.targets):
            raise ValueError(f"target must lie in [0, {len(self.targets) - 1}], got {target}.")
        return self.scores[target]

    def to_dataframe(self, top_k: int | None = None) -> pandas.DataFrame:
        """One row per unit: text, part, start, stop, relevance, rank (1 = strongest supporter).

        With several target tokens, a column for each one's scores follows: ``"0: text"``,
        ``"1: text"`` and so on. The index is the unit's number.

        Args:
            top_k: Keep so many units, the most relevant first; None keeps all in text order.
        Raises:
            ImportError: if pandas is not installed.
            ValueError: if ``top_k`` is below 1.
        """
        pandas = import_extra("pandas", "data")
        check_top_k(top_k)
        order = self.ranking()
        rank = {unit: place for place, unit in enumerate(order, start=1)}
        whole = {
            "start": [unit.start for unit in self.units],
            "stop": [unit.stop for unit in self.units],
            "rank": [rank.get(index) for index in range(len(self.units))],
        }
        integers = {name: pandas.array(column, dtype="Int64") for name, column in whole.items()}
        columns: dict[str, Any] = {
            "text": [unit.text for unit in self.units],
            "part": [unit.part for unit in self.units],
            "start": integers["start"],
            "stop": integers["stop"],
            "relevance": self.relevance.numpy(),
            "rank": integers["rank"],
        }
        if len(self.targets) > 1:
            for index, (target, row) in enumerate(zip(self.targets, self.scores, strict=True)):
                columns[f"{index}: {target.text}"] = row.numpy()
        frame = pandas.DataFrame(columns, index=pandas.RangeIndex(len(self.units), name="unit"))
        return frame if top_k is None else frame.loc[order[:top_k]]

    def show(
        self, top_k: int | None = None, width: int | None = None, target: int | None = None
    ) -> None:
        """Print the explanation to the terminal: the text as a heat map, then the strongest units.

        Args:
            top_k: How many supporters to list; None for up to 10 that tell something.
            width: Columns to use; None for the terminal's.
            target: Show this target token's scores instead of ``relevance``.
        Raises: ValueError: if ``top_k`` or ``width`` is too small or there is no such target.
        """
        from .render.terminal import show

        show(self, top_k=top_k, width=width, target=target)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, others: Iterable[Explanation] = ()
    ) -> str:
        """One self-contained HTML page: the text coloured by relevance, numbers on hover or focus.

        Args:
            path: Also write the page to this file.
            others: Explanations of the same document (other questions, other targets) to lay over
                this one, each in its own colour, as in the paper's Fig. 6.
        Returns: the page.
        Raises: ValueError: if the explanations share no text.
        """
        from .render.html import to_html

        page = to_html([self, *others])
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def plot(self, path: str | os.PathLike[str] | None = None, target: int | None = None) -> Figure:
        """A matplotlib figure: the text as a heat map, the strongest units, targets against units.

        Args:
            path: Also write the figure to this file; its ending (png, svg, pdf) says the format.
            target: Draw this target token's scores instead of ``relevance``.
        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if there is no such target.
        """
        import_extra("matplotlib", "plot")
        from .render.figure import plot

        return plot(self, path=path, target=target)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, which ``load`` reads back exactly."""
        Path(path).write_text(json.dumps(to_json(self), allow_nan=False) + "\n", encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        """Equal in every field; NaN equals NaN."""
        if not isinstance(other, Explanation):
            return NotImplemented
        return to_json(self) == to_json(other)

    def __repr__(self) -> str:
        return (
            f"Explanation(answer={self.answer!r}, units={len(self.units)}, "
            f"targets={len(self.targets)}, reduction={self.reduction!r})"
        )


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


def to_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON values: NaN is null, infinities are strings, float32 stays exact."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "text": explanation.text,
        "prompt_stop": explanation.prompt_stop,
        "units": [_piece(unit) for unit in explanation.units],
        "targets": [asdict(target) for target in explanation.targets],
        "base_logprobs": _numbers(explanation.base_logprobs),
        "suppressed_logprobs": [_numbers(row) for row in explanation.suppressed_logprobs],
        "reduction": explanation.reduction,
        "left_out": [_piece(piece) for piece in explanation.left_out],
        "provenance": explanation.provenance,
    }


def from_json(data: dict[str, Any]) -> Explanation:
    """The inverse of ``to_json``.

    Raises: KeyError, TypeError or ValueError: if a field is missing or wrong, naming the field.
    """
    units = [_unit(f"units[{i}]", item) for i, item in enumerate(_list("units", data["units"]))]
    targets = [
        _target(f"targets[{i}]", item) for i, item in enumerate(_list("targets", data["targets"]))
    ]
    rows = _list("suppressed_logprobs", data["suppressed_logprobs"], len(targets))
    suppressed = [
        _tensor(f"suppressed_logprobs[{i}]", row, len(units)) for i, row in enumerate(rows)
    ]
    if not isinstance(data["provenance"], dict):
        raise ValueError(f"provenance must be an object, got {data['provenance']!r}.")
    return Explanation(
        text=_str("text", data["text"]),
        prompt_stop=_int("prompt_stop", data["prompt_stop"]),
        units=units,
        targets=targets,
        base_logprobs=_tensor("base_logprobs", data["base_logprobs"]),
        suppressed_logprobs=torch.stack(suppressed) if suppressed else torch.empty(0, len(units)),
        reduction=cast(Any, _str("reduction", data["reduction"])),
        left_out=[
            _left_out(f"left_out[{i}]", item)
            for i, item in enumerate(_list("left_out", data["left_out"]))
        ],
        provenance=data["provenance"],
    )


def import_extra(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises: ImportError: naming the extra that brings it, if it is missing.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(
            f"{module} is not installed: pip install 'atman_triton[{extra}]'."
        ) from error


def check_top_k(top_k: int | None) -> None:
    """Raise ValueError unless ``top_k`` is None or at least 1."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be torch.float32, got {value.dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}.")
    return value.detach().cpu()


def _check_pieces(name: str, pieces: list[Any], kind: type, length: int) -> None:
    if not pieces:
        raise ValueError(f"{name} must hold at least one {kind.__name__}, got none.")
    for index, piece in enumerate(pieces):
        if not isinstance(piece, kind):
            raise TypeError(
                f"{name}[{index}] must be a {kind.__name__}, got {type(piece).__name__}."
            )
        start, stop = piece.start, piece.stop
        if start is None and stop is None:
            continue
        if start is None or stop is None or not 0 <= start <= stop <= length:
            raise ValueError(
                f"{name}[{index}] must span characters within [0, {length}], got {start}:{stop}."
            )


def _piece(piece: Unit | LeftOut) -> dict[str, Any]:
    return asdict(piece) | {"tokens": list(piece.tokens)}


def _numbers(values: Tensor) -> list[float | str | None]:
    """float32 values as JSON: 9 significant digits tell any two float32 apart."""
    return [
        float(f"{value:.9g}") if math.isfinite(value) else None if math.isnan(value) else str(value)
        for value in values.tolist()
    ]


def _unit(name: str, data: Any) -> Unit:
    piece = _object(name, data, Unit)
    return Unit(
        text=_str(f"{name}.text", piece["text"]),
        tokens=_tokens(f"{name}.tokens", piece["tokens"]),
        start=_place(f"{name}.start", piece["start"]),
        stop=_place(f"{name}.stop", piece["stop"]),
        part=cast(Any, _str(f"{name}.part", piece["part"])),
    )


def _target(name: str, data: Any) -> Target:
    piece = _object(name, data, Target)
    return Target(
        text=_str(f"{name}.text", piece["text"]),
        token=_int(f"{name}.token", piece["token"]),
        token_id=_int(f"{name}.token_id", piece["token_id"]),
        start=_place(f"{name}.start", piece["start"]),
        stop=_place(f"{name}.stop", piece["stop"]),
    )


def _left_out(name: str, data: Any) -> LeftOut:
    piece = _object(name, data, LeftOut)
    return LeftOut(
        text=_str(f"{name}.text", piece["text"]),
        tokens=_tokens(f"{name}.tokens", piece["tokens"]),
        reason=_str(f"{name}.reason", piece["reason"]),
    )


def _object(name: str, value: Any, kind: type[Unit] | type[Target] | type[LeftOut]) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {value!r}.")
    known = [each.name for each in fields(kind)]
    for key in known:
        if key not in value:
            raise ValueError(f"{name} lacks {key!r}.")
    for key in value:
        if key not in known:
            raise ValueError(f"{name} has the unknown field {key!r}.")
    return value


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
