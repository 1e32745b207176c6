"""What ``atman`` is given to read beside text: pictures and a sound, and the prompt they make."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loading import BadUsage, modalities
from .shared import read_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..demo.shapes import Picture

PLACEHOLDER = "{image}"
"""Where a picture stands in the text."""

Pictures = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        help="A picture to read; several, one --image each. They stand in front of the text, or "
        "each where it says {image}.",
        show_default=False,
    ),
]
Audio = Annotated[
    Path | None,
    typer.Option(help="A WAV file to read, for a speech model.", show_default=False),
]

_CONVERT = "ffmpeg -i FILE -ac 1 -ar {rate} -c:a pcm_s16le speech.wav"


@dataclass(frozen=True)
class Asked:
    """What a model is given to read.

    Args:
        text: None where a picture or a sound is all.
        pictures: In order.
        sound: ``array`` and ``sampling_rate``, as an explainer takes it.
        shown: The shipped picture, if that is the one.
        offered: Answers that are explained if none is asked for.
    """

    text: str | None
    pictures: Sequence[Image] = ()
    sound: dict[str, Any] | None = None
    shown: Picture | None = None
    offered: Sequence[str] = ()

    @property
    def prompt(self) -> Any:
        """Text and pictures in the order in which they are read; one thing alone is itself."""
        if self.sound is not None:
            return self.sound
        pieces = _interleaved(self.text, self.pictures)
        return pieces[0] if len(pieces) == 1 else pieces


def read_asked(
    prompt: str | None,
    file: Path | None,
    image: Sequence[Path],
    audio: Path | None,
    demo: str | None,
) -> Asked:
    """What is to be read, from the options that name it.

    Args:
        demo: Which shipped model reads, which brings its own prompt; None of another one.
    """
    text, pictures = read_prompt(prompt, file), read_pictures(image)
    sound = None if audio is None else read_sound(audio)
    if demo == "shapes":
        return _of_shapes(text, pictures, sound)
    if text is None and not pictures and sound is None:
        if demo is None:
            raise BadUsage(
                "no prompt: give it as an argument, with --file, or on standard input; a picture "
                "with --image."
            )
        from ..demo import demo_prompt

        text = demo_prompt()
    return Asked(text, pictures, sound)


def _of_shapes(text: str | None, pictures: list[Image], sound: dict[str, Any] | None) -> Asked:
    """What the shipped model of shapes reads: by itself its own picture, and each shape in it."""
    from ..demo.shapes import DEMO_PROMPT, demo_picture

    words = DEMO_PROMPT if text is None else text
    if pictures:
        return Asked(words, pictures, sound)
    shown = demo_picture()
    offered = [f" {shape.name}" for shape in shown.objects] if text is None else []
    return Asked(words, [shown.image], sound, shown, offered)


def read_pictures(files: Sequence[Path]) -> list[Image]:
    """Pictures from files."""
    from PIL import Image, UnidentifiedImageError

    found = []
    for file in files:
        try:
            with Image.open(file) as picture:
                picture.load()
            found.append(picture)
        except FileNotFoundError as error:
            raise BadUsage(f"--image: {file} does not exist.") from error
        except UnidentifiedImageError as error:
            raise BadUsage(f"--image: {file} is no picture that Pillow reads.") from error
        except OSError as error:
            raise BadUsage(f"--image: {file} cannot be read: {error}") from error
    return found


def read_sound(file: Path) -> dict[str, Any]:
    """A WAV file: ``array`` ``[N]`` float32 from -1 to 1, channels averaged, ``sampling_rate``."""
    import numpy as np

    try:
        with wave.open(str(file)) as sound:
            channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            data = sound.readframes(sound.getnframes())
    except FileNotFoundError as error:
        raise BadUsage(f"--audio: {file} does not exist.") from error
    except (wave.Error, EOFError) as error:
        raise BadUsage(
            f"--audio: {file} is no WAV file of whole numbers ({error}); make one: "
            + _CONVERT.format(rate=16000)
        ) from error
    except OSError as error:
        raise BadUsage(f"--audio: {file} cannot be read: {error}") from error
    if not data:
        raise BadUsage(f"--audio: {file} holds no samples.")
    raw = np.frombuffer(data, np.uint8).reshape(-1, width).astype(np.int64)
    values = raw @ (1 << 8 * np.arange(width, dtype=np.int64))
    half = 1 << 8 * width - 1
    values = values - half if width == 1 else (values + half) % (2 * half) - half  # 8 bits: no sign
    samples = (values / half).reshape(-1, channels).mean(1)
    return {"array": samples.astype(np.float32), "sampling_rate": rate}


def _interleaved(text: str | None, pictures: Sequence[Any]) -> list[Any]:
    """Text and pictures, in order.

    Raises: BadUsage: if the text has other than no places, or one for each picture.
    """
    if not pictures or text is None:
        return [*pictures] if text is None else [text]
    parts = text.split(PLACEHOLDER)
    places = len(parts) - 1
    if places not in (0, len(pictures)):
        raise BadUsage(
            f"the text says {PLACEHOLDER} {places} times, but --image is given {len(pictures)} "
            "times; write one for each picture, or none."
        )
    if not places:
        return [*pictures, text]
    between = [piece for pair in zip(pictures, parts[1:], strict=True) for piece in pair]
    return [piece for piece in (parts[0], *between) if piece != ""]


def check_read(model: Any, reader: Any, asked: Asked) -> None:
    """Refuse what a model cannot read, and ask for what it must."""
    read, name = modalities(model), type(model).__name__
    if asked.pictures and "image" not in read:
        raise BadUsage(
            f"--image: {name} reads no pictures; take a vision-language model, or --demo shapes."
        )
    if read == ("image",) and asked.text is not None:
        raise BadUsage(f"{name} reads a picture alone; give --image, and no text.")
    if asked.sound is None:
        if "audio" in read:
            raise BadUsage(f"{name} reads a sound; give it with --audio speech.wav.")
        return
    if "audio" not in read:
        raise BadUsage(f"--audio: {name} reads no sound; take a speech model such as Whisper.")
    if asked.text is not None or asked.pictures:
        raise BadUsage(f"{name} reads a sound alone; give --audio, and no text or picture.")
    rate, heard = asked.sound["sampling_rate"], reader.feature_extractor.sampling_rate
    if rate != heard:
        raise BadUsage(
            f"--audio: the file has {rate} samples a second, but {name} hears {heard}; make "
            f"another: {_CONVERT.format(rate=heard)}"
        )
