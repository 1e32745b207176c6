"""Controls as the command line writes them: ``text:WORDS=FACTOR``, ``image:0,0,0.5,1=FACTOR``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..loading import BadUsage

if TYPE_CHECKING:
    from ..controls import Control

OVERLAPS = ("partial", "complete")
WRITTEN = (
    "[bold]text:WORDS=FACTOR[/bold]  these words, which must occur once in the prompt; "
    "text:WORDS#2=FACTOR takes the second place where they do. The factor stands behind the last "
    "equals sign, so the words may hold others; write text:C#1#1=2 for the words 'C#1'.\n\n"
    "[bold]token:7=FACTOR[/bold]  the token at position 7, from 0, special tokens included.\n\n"
    "[bold]image:LEFT,TOP,WIDTH,HEIGHT=FACTOR[/bold]  a rectangle of the picture, in shares of its "
    "width and height: image:0,0,0.5,1=0.1 suppresses the left half; of the second picture "
    "image:0,0,0.5,1#2=0.1."
)
"""How controls are written, for the help of commands."""

Controls = Annotated[
    list[str] | None,
    typer.Option(
        help="text:WORDS=FACTOR, token:POSITION=FACTOR or image:LEFT,TOP,WIDTH,HEIGHT=FACTOR; "
        "several, one --control each.",
        show_default=False,
    ),
]
Overlap = Annotated[
    str,
    typer.Option(
        help="What a token gets of which a control's words take in only a part (a space in front "
        "of them counts): complete, the whole factor | partial, as much of it as the share."
    ),
]

_KINDS = ("text", "token", "image")
_BOX = re.compile(r"\d*\.?\d+(,\d*\.?\d+){3}")
_PLACE = re.compile(r"#(\d+)$")


class Written(NamedTuple):
    """A control as it was given, in its parts."""

    given: str
    kind: str
    name: str
    factor: float


def split_control(given: str) -> Written:
    """The parts of ``kind:name=factor``."""
    head, equals, number = given.rpartition("=")
    kind, colon, name = head.partition(":")
    if not equals or not colon or kind not in _KINDS or not name:
        raise BadUsage(
            "--control must be text:WORDS=FACTOR, token:POSITION=FACTOR or "
            f"image:LEFT,TOP,WIDTH,HEIGHT=FACTOR, got {given!r}."
        )
    try:
        factor = float(number)
    except ValueError as error:
        raise BadUsage(
            f"--control {given!r}: the factor behind the last = must be a number, got {number!r}."
        ) from error
    if not math.isfinite(factor) or factor < 0:
        raise BadUsage(f"--control {given!r}: the factor must be at least 0, got {number}.")
    if kind == "token" and not name.isdecimal():
        raise BadUsage(f"--control {given!r}: the position must be a number from 0, got {name!r}.")
    if kind == "image" and not _BOX.fullmatch(_PLACE.sub("", name)):
        raise BadUsage(
            f"--control {given!r}: the rectangle must be LEFT,TOP,WIDTH,HEIGHT in shares of the "
            f"picture, such as 0,0,0.5,1, got {name!r}."
        )
    return Written(given, kind, name, factor)


def place_control(
    text: str, written: Written, overlap: Any, similarity: float | None = None
) -> Control:
    """A control with its place in the text of the prompt."""
    from ..controls import ImageControl, TextControl, TokenControl

    given, kind, name, factor = written
    if kind == "token":
        return TokenControl(int(name), factor, similarity=similarity)
    number = _PLACE.search(name)
    sought = name[: number.start()] if number else name
    if kind == "image":
        left, top, width, height = map(float, sought.split(","))
        which = 0 if number is None else int(number[1]) - 1
        return ImageControl(
            *(left, top, width, height, factor, overlap), similarity=similarity, image=which
        )
    found = [at for at in range(len(text)) if sought and text.startswith(sought, at)]
    if not found:
        raise BadUsage(f"--control {given!r}: {sought!r} does not occur in the prompt.")
    if number is None and len(found) > 1:
        raise BadUsage(
            f"--control {given!r}: {sought!r} occurs {len(found)} times in the prompt; say which, "
            f"such as text:{sought}#1={factor:g}."
        )
    chosen = 1 if number is None else int(number[1])
    if not 1 <= chosen <= len(found):
        raise BadUsage(
            f"--control {given!r}: {sought!r} occurs {len(found)} times in the prompt, so the "
            f"number must be from 1 to {len(found)}."
        )
    return TextControl(found[chosen - 1], len(sought), factor, overlap, similarity=similarity)
