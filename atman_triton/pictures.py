"""Pictures and sounds of a prompt, as an explanation keeps them to be shown.

Legend: a box is left, top, width, height in pixels of the picture as it was given.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Picture", "Sound"]

_SHOWN = 1024  # pixels a side
_PARTS = 400  # of an envelope


@dataclass(frozen=True)
class Picture:
    """A picture that the prompt holds.

    Args:
        width: Of the picture as it was given, in pixels.
        height: The same.
        start: Character of ``Explanation.text`` in front of which it stands.
        data: A PNG of it, made smaller where it is large.
    Raises: TypeError, ValueError: if a field is not as above.
    """

    width: int
    height: int
    start: int
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("height", 1), ("start", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}.")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not isinstance(self.data, bytes):
            raise TypeError(f"data must be bytes, got {type(self.data).__name__}.")
        if not self.data.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("data must be a PNG.")

    @classmethod
    def of(cls, image: Image, start: int) -> Picture:
        """A picture as it was given, and the character in front of which it stands."""
        shown = image.convert("RGB")
        shown.thumbnail((_SHOWN, _SHOWN))
        file = io.BytesIO()
        shown.save(file, "PNG")
        return cls(image.width, image.height, start, file.getvalue())

    @property
    def image(self) -> Image:
        """The picture as it is shown, RGB."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data)).convert("RGB")


@dataclass(frozen=True)
class Sound:
    """A sound that the prompt is.

    Args:
        seconds: How long it is.
        envelope: The largest amplitude in equal parts of it, relative to the loudest, 0 to 1.
    Raises: ValueError: if a field is not as above.
    """

    seconds: float
    envelope: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {self.seconds}.")
        if not self.envelope or not all(0 <= level <= 1 for level in self.envelope):
            raise ValueError("envelope must hold at least one level, all from 0 to 1.")

    @classmethod
    def of(cls, samples: Any, rate: int) -> Sound:
        """A waveform: ``[N]`` floats, ``rate`` of them a second."""
        import numpy as np

        loud = np.abs(np.asarray(samples, dtype=np.float64))
        parts = np.array_split(loud, min(_PARTS, len(loud)))
        peaks: Sequence[float] = [float(part.max()) for part in parts]
        top = max(peaks) or 1.0
        return cls(len(loud) / rate, tuple(round(peak / top, 4) for peak in peaks))
