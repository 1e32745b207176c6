"""Colours for support and opposition: text backgrounds that colour-blind readers tell apart.

Orange supports and blue opposes. A strength of 0 to 1 is the opacity of the colour over the paper;
ink on it keeps a WCAG contrast of at least 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Theme:
    """The colours of one page theme, sRGB 0 to 255.

    Args:
        paper: Background of the page.
        panel: Background of boxes on it.
        ink: Text.
        faint: Secondary text.
        line: Borders.
        accent: Controls and the focus ring.
        support: Highlight of units that support the target.
        oppose: Highlight of units that oppose it.
        overlays: Highlights of explanations laid over each other, by number.
    """

    paper: Colour
    panel: Colour
    ink: Colour
    faint: Colour
    line: Colour
    accent: Colour
    support: Colour
    oppose: Colour
    overlays: tuple[Colour, ...]


LIGHT = Theme(
    paper=(252, 251, 247),
    panel=(245, 243, 236),
    ink=(31, 29, 26),
    faint=(98, 92, 82),
    line=(222, 217, 205),
    accent=(21, 92, 150),
    support=(255, 160, 51),
    oppose=(104, 168, 255),
    overlays=(
        (255, 170, 64),
        (98, 186, 244),
        (84, 208, 158),
        (240, 150, 200),
        (232, 218, 66),
        (184, 166, 255),
    ),
)

DARK = Theme(
    paper=(22, 23, 26),
    panel=(31, 33, 37),
    ink=(236, 233, 226),
    faint=(168, 164, 154),
    line=(58, 60, 66),
    accent=(128, 190, 245),
    support=(166, 82, 0),
    oppose=(28, 92, 184),
    overlays=(
        (158, 80, 0),
        (0, 98, 158),
        (0, 108, 74),
        (150, 52, 112),
        (104, 96, 0),
        (96, 76, 190),
    ),
)


# Of a terminal: middle tones stand out equally from dark and light ones; black on them reads well.
GREY: Colour = (150, 150, 150)
SUPPORT: Colour = (255, 142, 20)
OPPOSE: Colour = (92, 164, 255)
SUPPORT_INK: Colour = (184, 98, 0)
OPPOSE_INK: Colour = (36, 116, 224)


def mix(back: Colour, front: Colour, opacity: float) -> Colour:
    """``front`` laid over ``back`` with an opacity of 0 to 1."""
    red, green, blue = (round(b + (f - b) * opacity) for b, f in zip(back, front, strict=True))
    return red, green, blue


def contrast(first: Colour, second: Colour) -> float:
    """The contrast ratio of two colours, 1 to 21. Source: WCAG 2.1, section 1.4.3."""
    dark, light = sorted((_luminance(first), _luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def hexadecimal(colour: Colour) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _luminance(colour: Colour) -> float:
    channels = [value / 255 for value in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
