"""Sounds as prompts: reading a waveform, and when each of an encoder's frames is heard.

Legend: N samples, F frames of an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

_KINDS = (
    "a 1-D numpy array or tensor of samples, or {'array': samples, 'sampling_rate': rate} as "
    "datasets gives it"
)


def waveform(given: Any, rate: int, longest: float | None = None) -> np.ndarray:
    """The samples of a sound, ``[N]`` float32.

    Args:
        given: Samples at the rate that the model hears, a numpy array or a tensor; or a mapping
            that also names their rate.
        rate: Samples a second that the model hears.
        longest: The most seconds it can hear; None for no limit.
    Raises:
        TypeError: if it is no sound.
        ValueError: if it is empty, has several channels, another rate, no finite numbers, or is
            too long.
    """
    import numpy as np

    array = given
    if isinstance(given, Mapping):
        if not {"array", "sampling_rate"} <= set(given):
            raise ValueError(
                f"prompt must hold 'array' and 'sampling_rate', got {sorted(map(str, given))}."
            )
        array, own = given["array"], given["sampling_rate"]
        if own != rate:
            raise ValueError(
                f"sampling_rate must be {rate}, which the model hears, got {own!r}; resample the "
                f"sound first, for example with torchaudio.functional.resample(samples, {own}, "
                f"{rate}), or of a data set with cast_column('audio', Audio(sampling_rate={rate}))."
            )
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    if isinstance(array, list) and isinstance(given, Mapping):
        array = np.asarray(array)
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"prompt must be a sound: {_KINDS}; got {type(array).__name__}. Read a WAV file with "
            "the modules wave and numpy, or any file with soundfile.read(path)."
        )
    if array.ndim != 1:
        raise ValueError(
            f"prompt must be one channel of samples, got shape {list(array.shape)}; average "
            "several with samples.mean(axis), axis being that of the channels."
        )
    if not array.size:
        raise ValueError("prompt must not be empty: the sound has no samples.")
    if array.dtype.kind != "f":
        raise TypeError(
            f"samples must be floats from -1 to 1, got {array.dtype}; divide those of 16 bits by "
            "32768."
        )
    if not bool(np.isfinite(array).all()):
        raise ValueError("samples must be finite, got NaN or infinity.")
    if longest is not None and len(array) > longest * rate:
        raise ValueError(
            f"prompt must be no longer than the {longest:g} s that the model hears at once, got "
            f"{len(array) / rate:.2f} s; cut it and explain the parts."
        )
    return array.astype(np.float32)


def frame_seconds(frames: int, step: float, length: float) -> list[tuple[float, float] | None]:
    """When each frame begins and ends; None of frames that lie behind the sound.

    Args:
        frames: ``F``.
        step: Seconds from one frame to the next.
        length: Of the sound, in seconds; the frame in which it ends is cut there.
    """
    found: list[tuple[float, float] | None] = []
    for frame in range(frames):
        start, stop = frame * step, min((frame + 1) * step, length)
        found.append((start, stop) if start < stop else None)
    return found
