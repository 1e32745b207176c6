"""``atman explain --live``: the same explanation, drawn while the answer appears."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console
from toy_explanations import explain
from toy_models import llama
from toy_tokenizers import byte_level
from transformers.utils import logging

from atman_triton import cli
from atman_triton.explanation import load
from atman_triton.render.live import LiveView

PROMPT = "The pay per hour is 23 euros. The notice period is four weeks. Q: What is the pay?"
WORDS = ("explain", PROMPT, "--max-new-tokens", "5", "--granularity", "word")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader")
    logging.disable_progress_bar()
    tokenizer = byte_level()
    llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(*words):
    return cli.main([str(word) for word in words])


def test_it_explains_what_the_other_way_explains(folder, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("live.json", "other.json", "live.html")}
    words = (*WORDS, "--model", folder, "--quiet")
    live = ("--live", "--save", files["live.json"], "--html", files["live.html"])
    assert run(*words, *live) == 0
    captured = capsys.readouterr()
    assert captured.out.count("Answer: ") == 1  # no terminal: what there is at the end, once
    assert captured.err == ""
    assert run(*words, "--save", files["other.json"]) == 0
    found, other = load(files["live.json"]), load(files["other.json"])
    assert found.text == other.text
    prompt = [place for place, unit in enumerate(other.units) if unit.part == "prompt"]
    assert found.units == [other.units[place] for place in prompt]
    torch.testing.assert_close(found.scores, other.scores[:, prompt], rtol=0, atol=1e-4)
    assert found.provenance["live"]
    assert "<html" in files["live.html"].read_text()
    capsys.readouterr()
    assert run(*words, "--live", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == found.text


@pytest.mark.parametrize(
    "options",
    [
        ("--target", "23"),
        ("--contrast-target", "23"),
        ("--method", "exact"),
        ("--control", "text:pay=0.1"),
        ("--similarity", "0.5"),
        ("--normalize",),
    ],
    ids=lambda options: options[0],
)
def test_what_does_not_go_with_it(options, capsys):
    words = WORDS if options[0] != "--target" else WORDS[:2]
    assert run(*words, "--live", *options) == 2
    assert f"{options[0]} does not go with --live" in capsys.readouterr().err


def test_a_preset_that_needs_the_whole_answer_is_refused(folder, capsys):
    assert run(*WORDS, "--model", folder, "--live", "--preset", "released") == 2
    assert "take preset='default'" in capsys.readouterr().err


@pytest.mark.parametrize("colours", ["truecolor", None])
def test_the_picture_has_the_answer_and_the_text(colours):
    explanation = explain()
    file = io.StringIO()
    console = Console(
        file=file,
        width=60,
        height=24,
        force_terminal=True,
        color_system=colours,
        no_color=not colours,
    )
    view = LiveView(console)
    with view:
        view.update(explanation)
        drawn = file.getvalue()
        assert f"Answer so far: {explanation.answers[0].strip()}" in plain(drawn)
        for word in explanation.prompt.split():
            assert word in plain(drawn)
        assert ("\x1b[48;2" in drawn or "48;2" in drawn) == bool(colours)
        assert ("⟦" in drawn) != bool(colours)
    assert len(plain(drawn).splitlines()) < 24


def test_nothing_is_drawn_where_nobody_looks():
    file = io.StringIO()
    view = LiveView(Console(file=file, width=60))
    with view:
        view.update(explain())
    assert not view.wanted
    assert file.getvalue() == ""


def plain(drawn):
    """Without the codes for colours and the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
