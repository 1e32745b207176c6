"""Sounds as prompts: what is read, what is refused with a way out, when frames are heard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atman_triton.audio import frame_seconds, waveform

SAMPLES = np.linspace(-0.5, 0.5, 100)


@pytest.mark.parametrize(
    "given",
    [
        SAMPLES,
        SAMPLES.astype(np.float32),
        torch.tensor(SAMPLES),
        torch.tensor(SAMPLES, requires_grad=True),
        {"array": SAMPLES, "sampling_rate": 16000},
        {"array": SAMPLES.tolist(), "sampling_rate": 16000, "path": "speech.wav"},
    ],
    ids=["float64", "float32", "tensor", "gradient", "dataset", "list"],
)
def test_what_datasets_and_libraries_give_is_read(given):
    found = waveform(given, 16000, 1.0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, SAMPLES.astype(np.float32))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("speech.wav", TypeError, r"must be a sound: a 1-D numpy array.*got str\. Read a WAV"),
        ([0.1, 0.2], TypeError, r"must be a sound.*got list"),
        ({"array": SAMPLES}, ValueError, r"'array' and 'sampling_rate', got \['array'\]"),
        (
            {"array": SAMPLES, "sampling_rate": 44100},
            ValueError,
            r"sampling_rate must be 16000, .*got 44100; resample .*\(samples, 44100, 16000\)",
        ),
        (np.zeros((2, 50)), ValueError, r"one channel of samples, got shape \[2, 50\]; average"),
        (np.zeros(0), ValueError, "the sound has no samples"),
        (np.zeros(50, dtype=np.int16), TypeError, r"from -1 to 1, got int16; divide .* by 32768"),
        (np.array([0.1, np.nan]), ValueError, "samples must be finite"),
        (np.zeros(17000), ValueError, r"no longer than the 1 s .*got 1\.06 s; cut it"),
    ],
)
def test_no_sound_is_refused_with_a_way_out(given, error, message):
    with pytest.raises(error, match=message):
        waveform(given, 16000, 1.0)


def test_frames_behind_the_end_are_silence_and_the_last_is_cut_there():
    assert frame_seconds(5, 0.02, 0.05) == [
        (0.0, 0.02),
        (0.02, 0.04),
        (0.04, 0.05),
        None,
        None,
    ]
    assert frame_seconds(2, 0.02, 0.04) == [(0.0, 0.02), (0.02, 0.04)]
