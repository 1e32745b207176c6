"""An explanation in a terminal while its answer is still being written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from . import layout
from .blocks import NOTABLE, pictures
from .shown import chosen
from .terminal import FAINT, coloured_line, plain_line

if TYPE_CHECKING:
    from types import TracebackType

    from ..explanation import Explanation

_REST = 4  # lines of the screen that the text leaves free: the answer, and where the cursor stands
_FEWEST = 3


class LiveView:
    """Shows the text so far as a heat map, in place, and wipes it out at the end.

    Colours are the mean over the answer so far: single tokens would flicker, and the last picture
    is that of the finished explanation.

    Args:
        console: Where to draw; nothing is drawn where it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._coloured = not console.no_color and console.color_system in ("256", "truecolor")
        self._live = Live(console=console, transient=True, auto_refresh=False)

    @property
    def wanted(self) -> bool:
        """Whether there is anyone to see it."""
        return self._console.is_terminal

    def __enter__(self) -> LiveView:
        if self.wanted:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, explanation: Explanation) -> None:
        """Draw what is known now."""
        if self.wanted:
            self._live.update(self.picture(explanation), refresh=True)

    def picture(self, explanation: Explanation) -> Group:
        """The end of the answer, and the text with the strongest units of the prompt in sight."""
        width, height = self._console.width, self._console.height
        answer = layout.visible(explanation.answers[0])
        heading = Text(overflow="ellipsis", no_wrap=True)
        heading.append("Answer so far: ", FAINT)
        heading.append(answer[-max(1, width - heading.cell_len) :], "bold")
        draw = coloured_line if self._coloured else plain_line
        cells = width if self._coloured else width - 6  # brackets stand around strong units
        values = layout.in_sight(explanation)
        seen = chosen(explanation, values, "")
        lines = pictures(explanation, seen, width, self._coloured, height // 4)
        if len(lines) > height // 2:  # several pictures below each other
            lines = []
        limit = max(_FEWEST, (height - len(lines)) // 2 - _REST)  # remarks stand between the lines
        for row in layout.shown_lines(explanation, values, max(_FEWEST, cells), limit, NOTABLE):
            remark = any(run.note for run in row)
            line = Text(row[0].text, FAINT) if remark else draw(row, explanation.prompt_stop)
            line.no_wrap = True
            lines.append(line)
        return Group(heading, Text(), *lines)
