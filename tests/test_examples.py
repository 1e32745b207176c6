"""Every example runs without a network, on a small random model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAID = {
    "explain_bert": [
        "BertForSequenceClassification",
        "Every class in one pass of 11 runs:",
        "positive: most for it",
    ],
    "explain_vit": ["ViTForImageClassification", "most for it the patch at"],
    "explain_t5": [
        "Suppressed in encoder self-attention and cross-attention:",
        "Suppressed in encoder self-attention:",
        "Suppressed in cross-attention:",
        "Scores: total effect.",
        "T5ForConditionalGeneration",
    ],
    "explain_bart": [
        "The tower is 324 metres tall.",
        "Two summaries in one pass:",
        "A picture of two cats.",
        "BartForConditionalGeneration",
    ],
    "explain_whisper": [
        "0.30–0.40 s: ",
        "0.80–0.90 s: ",
        "WhisperForConditionalGeneration",
    ],
    "explain_blip": [
        "BlipForConditionalGeneration",
        "BlipForQuestionAnswering",
        "what is in the picture?",
    ],
}
"""What each script prints, among other things."""


def test_every_script_is_listed():
    found = {path.stem for path in EXAMPLES.glob("explain_*.py")}
    assert found == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_an_example_explains_a_small_model(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "small random one: what it says is noise" in said
    for part in SAID[name]:
        assert part in said
