"""Which half seconds of a recording made Whisper write each word.

    python examples/explain_whisper.py openai/whisper-tiny speech.wav

The recording must be a WAV of 16 bits at 16 kHz, and no longer than 30 s.
"""

import sys
import wave
from typing import Any

import numpy as np
from small_models import NOTE, whisper
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from atman_triton import Explainer, Seconds


def recorded(path: str) -> dict[str, Any]:
    with wave.open(path, "rb") as file:
        rate, channels = file.getframerate(), file.getnchannels()
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    samples = samples.reshape(-1, channels).mean(1) / 32768
    return {"array": samples.astype(np.float32), "sampling_rate": rate}


def main(name: str | None = None, path: str | None = None) -> None:
    if name is None:
        print(NOTE)
        model, processor = whisper()
    else:
        model = WhisperForConditionalGeneration.from_pretrained(name)
        processor = WhisperProcessor.from_pretrained(name)
    tone = np.sin(np.linspace(0, 2 * np.pi * 440 * 0.9, 14400)).astype(np.float32)
    sound = {"array": tone, "sampling_rate": 16000} if path is None else recorded(path)
    explainer = Explainer(model, processor)
    explanation = explainer.explain(
        sound, granularity=Seconds(0.5 if path else 0.1), target_granularity="word"
    )
    explanation.show()
    for unit, relevance in zip(explanation.units, explanation.relevance.tolist(), strict=True):
        if unit.seconds is not None:
            print(f"{unit.text}: {relevance:+.3f} nats")


if __name__ == "__main__":
    main(*sys.argv[1:])
