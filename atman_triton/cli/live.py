"""``atman explain --live``: the prompt is coloured while the answer appears."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from ..loading import BadUsage, check_decoder
from .shared import our_errors

if TYPE_CHECKING:
    from ..explanation import Explanation

_INTERVAL = 0.1  # seconds between two pictures


def refuse_with_live(**given: Any) -> None:
    """Refuse options under which nothing can be scored before the answer is finished."""
    for name, value in given.items():
        if value:
            raise BadUsage(
                f"--{name.replace('_', '-')} does not go with --live, which scores an answer while "
                "it is written: leave one of them out."
            )


def explain_live(
    model: Any,
    reader: Any,
    prompt: Any,
    *,
    settings: dict[str, Any],
    granularity: Any,
    image_granularity: str | None,
    explain_only: Any,
    max_new_tokens: int | None,
    watch: bool,
) -> Explanation:
    """Let the model answer, scores and all.

    Args:
        reader: Its tokenizer or processor.
        settings: Of ``generate_explained``.
        watch: Draw on standard error, if that is a terminal.
    """
    check_decoder("--live", model)
    from rich.console import Console

    from ..live import generate_explained
    from ..render.live import LiveView

    view = LiveView(Console(file=sys.stderr, highlight=False, markup=False, emoji=False))
    watched = watch and view.wanted
    with our_errors():
        stream = generate_explained(
            model,
            prompt,
            tokenizer=reader,
            units=granularity,
            image_granularity=image_granularity,
            explain_only=explain_only,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            every=1 if watched else "auto",  # bursts save time, but are not what one watches
            **settings,
        )
        with stream, view:
            drawn = 0.0
            for _ in stream:
                if watched and stream.text and time.monotonic() > drawn + _INTERVAL:
                    view.update(stream.explanation())
                    drawn = time.monotonic()
        return stream.explanation()
