"""Which fonts texts of any script need, and what is written where no font has a glyph."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from rich.cells import get_character_cell_size

from . import layout

MISSING = "▯"

# matplotlib brings the first two; the others are what systems have for the rest of the world.
FONTS = (
    "DejaVu Sans Mono",
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Nirmala UI",
    "Arial Unicode MS",
    "Noto Emoji",
    "Segoe UI Symbol",
)


def families(texts: Iterable[str]) -> list[str]:
    """The fonts that texts need, in the order in which to look for a glyph."""
    needed = {_font(character) for character in set().union(*map(layout.printable, texts))}
    return [name for name in FONTS if name in needed or name == FONTS[0]]


def known(text: str) -> str:
    """The text with a box for every character that no font has, of which matplotlib would warn."""
    return "".join(
        character if character in " \n" or _font(character) else MISSING
        for character in layout.printable(text)
        if get_character_cell_size(character) or _font(character)
    )


@lru_cache(maxsize=65536)
def _font(character: str) -> str | None:
    """The first font that has a glyph for the character."""
    return next((name for name in FONTS if ord(character) in _glyphs(name)), None)


@lru_cache(maxsize=len(FONTS))
def _glyphs(name: str) -> frozenset[int]:
    """The characters that an installed font has, none where it is not installed."""
    if not any(font.name == name for font in fontManager.ttflist):
        return frozenset()
    path = fontManager.findfont(FontProperties(family=[name]))
    return frozenset(FT2Font(path).get_charmap())
