"""Of which targets pictures are drawn, and with which values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import layout, wording

if TYPE_CHECKING:
    from ..explanation import Explanation

PANELS = 7  # targets whose pictures are drawn


@dataclass(frozen=True)
class Shown:
    """What is drawn over pictures.

    Args:
        title: What it is.
        values: Of each unit.
        branch: Of several targets, which one.
    """

    title: str
    values: list[float]
    branch: int | None = None


def chosen(explanation: Explanation, values: list[float], title: str) -> list[Shown]:
    """One target's colours, or each one's of several; nothing without pictures.

    Args:
        values: What is in sight of a single target.
        title: Of it.
    """
    e = explanation
    if not e.pictures:
        return []
    if e.contrast:
        title = " rather than ".join(map(wording.name_of, e.answers))
    if e.contrast or not layout.several(e):
        return [Shown(title, values)]
    logprobs = e.answer_logprobs.tolist()
    likely = sorted(range(len(logprobs)), key=lambda branch: -logprobs[branch])[:PANELS]
    return [Shown(_name(e, k), e.values(branch=k).tolist(), k) for k in sorted(likely)]


def remark(explanation: Explanation) -> str:
    """How the pictures of several targets are coloured."""
    noun = wording.noun(explanation)
    return (
        f"Each picture has its own colour scale, that of its {noun.one}; text and bars show the "
        f"mean over {noun.many}."
    )


def _name(explanation: Explanation, branch: int) -> str:
    base = float(explanation.answer_logprobs[branch])
    name = wording.name_of(explanation.answers[branch])
    return f"{name}   {wording.base_brief(explanation, base)}"
