"""One thing to explain of which it is known where the answer stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..chat import Span


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt, the answer that is explained, and what in the prompt it rests on.

    Args:
        id: Its name, unique in its data set and the same in every run.
        prompt: What ``Explainer.explain`` takes: a str, or ``[image, "text"]``.
        target: The answer.
        region: Of text, the characters of the prompt whose units are rated (the context without
            the question). None where a picture is rated.
        labels: Characters of the prompt that hold the answer, within the region.
        mask: Of a picture, ``[H, W]`` bool at its own size: where the answer is to be seen.
        group: What examples have in common: a paragraph, a class.
        reworded: The same prompt with its question in other words, the same region; None if there
            is none.
        facts: What statistics and figures read, JSON values: ``questions`` of the paragraph,
            ``context_tokens`` and so on.
    """

    id: str
    prompt: Any
    target: str
    region: Span | None = None
    labels: tuple[Span, ...] = ()
    mask: np.ndarray | None = None
    group: str = ""
    reworded: Any = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_picture(self) -> bool:
        """Whether a picture is rated, rather than text."""
        return self.mask is not None
