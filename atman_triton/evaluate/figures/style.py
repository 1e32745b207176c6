"""How methods are named and coloured, alike in every figure, and the frame around each.

A family of methods has one colour (Okabe and Ito's, which colour-blind readers tell apart), its
members have shades of it and marks of their own; a hollow mark is a method that suppresses similar
units together.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...baselines import BASELINES
from ...render.palette import LIGHT, WHITE, Colour, hexadecimal, mix
from ..settings import ATMAN, RELEASED

WIDTH = 9.0  # inches; shown 800 pixels wide, a letter of 9 points is 11 of them high
DPI = 144
SIZE = 9  # points, of most letters
SMALL = 8
INK = hexadecimal(LIGHT.ink)
FAINT = hexadecimal(LIGHT.faint)
LINE = hexadecimal(LIGHT.line)
COLUMNS = 146  # characters of a caption's line

_BLACK: Colour = (0, 0, 0)
_FAMILIES: dict[str, tuple[Colour, str]] = {
    "atman": ((0, 114, 178), "AtMan"),
    "gradients": ((213, 94, 0), "gradients"),
    "attention": ((0, 158, 115), "attention weights"),
    "removal": ((204, 121, 167), "removal, sampling"),
    "random": ((110, 110, 110), "random"),
}
_LABELS = {
    "input_x_gradient": "input × gradient",
    "integrated_gradients": "integrated gradients",
    "grad_cam": "GradCAM",
    "attn_lrp": "AttnLRP",
    "chefer": "Chefer et al.",
    "rollout": "attention rollout",
    "last_attention": "last attention",
    "leave_one_out": "leave-one-out",
    "lime": "LIME",
    "kernel_shap": "KernelSHAP",
    "context_cite": "ContextCite",
}
_OPTIONS = {"similarity": "κ\N{NO-BREAK SPACE}"}
_SHADES = (0.0, 0.42, -0.38, 0.62, -0.6)  # of white, or, negative, of black
_MARKS = "osD^vPXp"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Args:
        family: Key of its family: atman, gradients, attention, removal, random.
        label: Its name for people.
        colour: ``#rrggbb``.
        mark: Matplotlib's marker.
        dash: Matplotlib's line style.
        hollow: Whether it suppresses similar units together.
    """

    family: str
    label: str
    colour: str
    mark: str
    dash: Any
    hollow: bool

    @property
    def face(self) -> str:
        """What its marks and bars are filled with."""
        return "white" if self.hollow else self.colour


@cache
def look(name: str) -> Look:
    """How the method of this name is drawn; ``name`` as ``settings.Setting.name`` has it."""
    method, *words = name.split()
    options = [word for word in words if "=" in word]
    mode = next((word for word in words if "=" not in word), "")
    family = family_of(name)
    place = _place(method, family)
    variant = {"": 0, "multiplicative": 1, "log_additive": 2}.get(mode, 3)
    colour = _shade(_FAMILIES[family][0], _SHADES[place % len(_SHADES)])
    hollow = any(option.startswith("similarity=") for option in options) or method == RELEASED
    return Look(
        family,
        label(name),
        hexadecimal(colour),
        _MARKS[(variant if family == "atman" else place) % len(_MARKS)],
        _DASHES[(variant if family == "atman" else place) % len(_DASHES)],
        hollow,
    )


def family_of(name: str) -> str:
    """atman, gradients, attention, removal or random."""
    method = name.split()[0]
    if method not in BASELINES:
        return "atman"
    of = BASELINES[method].of
    if of == "chance":
        return "random"
    return next((each for each in ("gradients", "attention") if of.startswith(each)), "removal")


def family_colour(family: str) -> str:
    """``#rrggbb`` of the first of a family."""
    return hexadecimal(_FAMILIES[family][0])


def family_label(family: str) -> str:
    """A family's name for people."""
    return _FAMILIES[family][1]


def label(name: str) -> str:
    """A method's name for people: ``AtMan exact, multiplicative, κ 0.7``."""
    return short(name) if name.split()[0] in BASELINES else f"AtMan {short(name)}"


def short(name: str) -> str:
    """The same without AtMan's name."""
    method, *words = name.split()
    said = [_LABELS.get(method, method)]
    for word in words:
        option, equals, value = word.partition("=")
        if option == "rule":
            said[-1] += f" ({value})"
        else:
            said.append(_OPTIONS.get(option, f"{option} ") + value if equals else word)
    return ", ".join(said).replace("_", " ")


def family_legend(names: Sequence[str]) -> dict[str, str]:
    """Of the families that the methods belong to, label and colour, in a fixed order."""
    there = {family_of(name) for name in names}
    return {family_label(each): family_colour(each) for each in _FAMILIES if each in there}


def framed(
    height: float,
    title: str,
    caption: str,
    *,
    handles: Sequence[Any] = (),
    columns: int = 4,
    free: bool = False,
) -> tuple[Figure, float]:
    """An empty figure with its title above and its caption below.

    Args:
        height: Inches of what is drawn between the two.
        title: One line; longer ones are broken.
        caption: What it shows: data, number of examples, model, what is not shown.
        handles: What a legend below the title names.
        columns: Of the legend.
        free: Whether axes are placed by hand; else they are laid out between the two.
    Returns: the figure, and where what is drawn begins, inches from the lower edge.
    """
    head = textwrap.wrap(title, 92)
    foot = [line for part in caption.splitlines() for line in textwrap.wrap(part, COLUMNS)]
    key = 0.08 + 0.185 * -(-len(handles) // columns) if handles else 0.0
    above, below = 0.14 + 0.2 * len(head) + key, 0.12 + 0.155 * len(foot)
    whole = above + height + below
    figure = Figure(figsize=(WIDTH, whole), dpi=DPI, facecolor="white")
    figure.text(
        0.08 / WIDTH,
        1 - 0.06 / whole,
        "\n".join(head),
        size=11,
        weight="bold",
        va="top",
        color=INK,
        parse_math=False,
    )
    figure.text(
        0.08 / WIDTH,
        0.05 / whole,
        "\n".join(foot),
        size=SMALL,
        va="bottom",
        color=FAINT,
        linespacing=1.25,
        parse_math=False,
    )
    if handles:
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0, 1 - (above - key - 0.02) / whole),
            ncols=columns,
            fontsize=SMALL,
            frameon=False,
            labelcolor=INK,
            borderpad=0.2,
            labelspacing=0.35,
        )
        legend.set_in_layout(False)
    if not free:
        figure.set_layout_engine("constrained", rect=(0, below / whole, 1, height / whole))
    return figure, whole - above


def plain(axes: Any, grid: str | None = "both") -> None:
    """Few lines: no box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=INK, labelsize=SIZE, length=2.5, color=LINE)
    if grid:
        axes.grid(axis=grid, color=LINE, linewidth=0.6, alpha=0.8)
        axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _place(method: str, family: str) -> int:
    """A method's number in its family."""
    if family == "atman":
        known = (*ATMAN, RELEASED)
        return known.index(method) if method in known else len(known)
    return [name for name in BASELINES if family_of(name) == family].index(method)


def _shade(colour: Colour, share: float) -> Colour:
    return mix(colour, WHITE if share > 0 else _BLACK, abs(share))
