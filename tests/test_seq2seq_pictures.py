"""Explaining BLIP: what of a picture, and of a text with it, supports a caption or an answer.

Legend: P prompt tokens, U units, M scored tokens.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from seq2seq_models import plain_logprobs
from test_seq2seq_engine import close

from atman_triton import Explainer, ImageControl, TextControl, Tiles

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import small_models  # pyright: ignore[reportMissingImports]

QUESTION = "what is in the picture?"
MAKERS = {"blip": small_models.blip, "blip_vqa": small_models.blip_vqa}


@cache
def made(name):
    model, processor = MAKERS[name]()
    return model.double(), processor


@cache
def picture():
    pixels = np.random.default_rng(3).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_of(name):
    return [picture(), QUESTION if name == "blip_vqa" else "a picture of"]


def explainer(name, **changes):
    return Explainer(*made(name), **{"progress": False, "method": "exact"} | changes)


def read(name, prompt=None):
    return explainer(name).task.read(prompt_of(name) if prompt is None else prompt)


def row_of(prompt, unit, target):
    """A unit's factor in every source."""
    row = torch.ones(len(prompt.words) + len(target) - 1)
    row[list(unit.tokens)] = 0.1
    asked = prompt.inputs["input_ids"].shape[1] if "input_ids" in prompt.inputs else 0
    rows = row.split([37, asked, len(row) - 37 - asked])
    return {"image": rows[0], "decoder": rows[2]} | ({"text": rows[1]} if asked else {})


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["both", "encoder", "cross"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_explanation_is_that_of_a_plain_loop(name, attention):
    model, _ = made(name)
    e = explainer(name, attention=attention).explain(
        prompt_of(name), "two cats", image_granularity="3x2"
    )
    prompt = read(name)
    start = prompt.inputs["decoder_input_ids"][0].tolist()
    target = [each.token_id for each in e.targets]
    inputs = {key: value for key, value in prompt.inputs.items() if key != "decoder_input_ids"}
    close(e.base_logprobs, plain_logprobs(model, inputs, start, target, {}))
    assert len(e.units) > 8
    for column, unit in enumerate(e.units):
        rows = row_of(prompt, unit, target)
        logprobs = plain_logprobs(model, inputs, start, target, rows, attention=attention)
        reached = ~e.suppressed_logprobs[:, column].isnan()
        first = len(prompt.words) if unit.part == "prompt" else unit.tokens[-1] + 1
        assert reached.tolist() == [target.token >= first for target in e.targets]
        close(e.suppressed_logprobs[reached, column], logprobs[reached])


@pytest.mark.parametrize("name", MAKERS)
def test_without_a_target_the_model_s_own_answer_is_explained(name):
    model, _ = made(name)
    e = explainer(name, method="direct").explain(prompt_of(name), max_new_tokens=4)
    inputs = read(name).inputs
    start = inputs.pop("decoder_input_ids")
    if name == "blip":  # which drops a closing token
        inputs["input_ids"] = torch.cat([start, start[:, :1]], 1)
    own = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1)[0].tolist()
    assert own[: start.shape[1]] == start[0].tolist()
    written = [target.token_id for target in e.targets]
    assert own[start.shape[1] :][: len(written)] == written
    assert e.provenance["target"] == "generated"


@pytest.mark.parametrize("name", MAKERS)
def test_controls_act_on_the_picture_and_on_the_text(name):
    model, _ = made(name)
    text = prompt_of(name)[1]
    controls = [
        ImageControl(0, 0, 0.5, 1, factor=0.2),
        TextControl(text.index("picture"), 7, 0.3, "complete"),
    ]
    e = explainer(name).explain(prompt_of(name), "two cats", controls=controls)
    prompt = read(name)
    target = [each.token_id for each in e.targets]
    row = torch.ones(len(prompt.words) + len(target) - 1)
    row[[place for place in range(1, 37) if (place - 1) % 6 < 3]] = 0.2
    words = [unit for unit in e.units if unit.image is None and "picture" in unit.text]
    row[[place for unit in words for place in unit.tokens]] = 0.3
    asked = prompt.inputs["input_ids"].shape[1] if name == "blip_vqa" else 0
    image, asks, rest = row.split([37, asked, len(row) - 37 - asked])
    rows = {"image": image, "decoder": rest} | ({"text": asks} if asked else {})
    start = prompt.inputs.pop("decoder_input_ids")[0].tolist()
    close(e.base_logprobs, plain_logprobs(model, prompt.inputs, start, target, rows))


def test_controls_find_what_is_alike_by_what_the_tower_reads():
    e = explainer("blip", method="direct").explain(
        picture(), "two cats", controls=[ImageControl(0, 0, 0.1, 0.1, factor=0.2, similarity=0.9)]
    )
    plain = explainer("blip", method="direct").explain(picture(), "two cats")
    assert not torch.equal(e.base_logprobs, plain.base_logprobs)


# --- pictures -----------------------------------------------------------------------------------


def test_patches_stand_on_the_picture_as_it_was_given():
    e = explainer("blip", method="direct").explain(picture(), "two cats")
    patches = [unit for unit in e.units if unit.part == "prompt"]
    assert len(patches) == 36
    assert all(unit.image == 0 and unit.level == "patch" for unit in patches)
    assert patches[0].tokens == (1,)
    assert patches[7].boxes == (pytest.approx((10.0, 5.0, 10.0, 5.0)),)
    assert (e.pictures[0].width, e.pictures[0].height) == (60, 30)
    assert [(piece.tokens, piece.reason) for piece in e.left_out] == [
        ((0,), "class token of the picture"),
        ((37,), "read by the decoder before the answer"),
    ]
    assert e.text == "two cats"
    tiles = explainer("blip").explain(picture(), "two cats", granularity=Tiles(2))
    assert [len(unit.tokens) for unit in tiles.units if unit.part == "prompt"] == [9] * 4


def test_a_patch_moves_its_own_token_most():
    """What stands in a box is what the unit's token reads."""
    model, processor = made("blip")
    e = explainer("blip", method="direct").explain(picture(), "two cats")
    embed = model.vision_model.embeddings

    def tokens(image):
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return embed(pixels.double())[0]

    before = tokens(picture())
    for unit in e.units[:36:5]:
        left, top, width, height = unit.boxes[0]
        changed = picture().copy()
        changed.paste((255, 0, 0), tuple(map(round, (left, top, left + width, top + height))))
        moved = (tokens(changed) - before).norm(dim=1)
        assert moved.argmax() == unit.tokens[0]


def test_how_a_caption_begins_is_explained_and_continued():
    e = explainer("blip").explain([picture(), "a picture of"], "two cats")
    words = [unit for unit in e.units if unit.part == "prompt" and unit.image is None]
    assert "".join(unit.text for unit in words).split() == ["a", "picture", "of"]
    assert e.text == "a picture of two cats"
    prompt = read("blip")
    assert prompt.inputs["decoder_input_ids"][0, 0] == 5
    assert prompt.inputs["decoder_input_ids"].shape[1] == 1 + len(words)
    assert not any("[CLS]" in piece.text for piece in e.left_out)


def test_a_question_and_its_picture_are_explained_together():
    e = explainer("blip_vqa").explain([QUESTION, picture()], "two")
    words = [unit for unit in e.units if unit.part == "prompt" and unit.image is None]
    assert "".join(unit.text for unit in words) == QUESTION
    assert e.prompt == QUESTION
    assert sum(unit.image == 0 for unit in e.units) == 36
    left = [piece.reason for piece in e.left_out]
    assert left == [
        "class token of the picture",
        "special token",
        "special token",
        "read by the decoder before the answer",
    ]


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt", "error", "message"),
    [
        ("blip", "hello", ValueError, r"must hold one image, got 0; .* reads an image, or"),
        ("blip", [picture(), picture()], ValueError, "must hold one image, got 2"),
        ("blip", [picture(), "a", "b"], ValueError, "got 2 texts"),
        ("blip", np.zeros((4, 4, 3)), TypeError, r"must be a PIL\.Image, got ndarray"),
        ("blip_vqa", picture(), ValueError, r"must be \[image, question\] .*got 0 texts"),
    ],
)
def test_prompts_that_are_none_are_refused(name, prompt, error, message):
    with pytest.raises(error, match=message):
        explainer(name).explain(prompt, "two")


def test_the_processor_is_asked_for_where_it_is_needed():
    model, _ = made("blip")
    with pytest.raises(ValueError, match=r"processor is needed, got NoneType; load it with Auto"):
        Explainer(model, method="exact").explain(picture(), [5])
