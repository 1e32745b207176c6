"""The shipped shapes model: what it sees, what is measured of it, and where its relevance lies."""

import json
import shutil

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from atman_triton.demo.evaluate import Share
from atman_triton.demo.shapes import (
    DEMO_PROMPT,
    IMAGE,
    MODEL_FOLDER,
    demo_picture,
    load_shapes_model,
    make_picture,
    make_redundant_picture,
)
from atman_triton.demo.shapes.card import write_card
from atman_triton.demo.shapes.evaluate import (
    answered_right,
    fresh_cases,
    generate_answers,
    main,
    name_chances,
)
from atman_triton.demo.shapes.model import GRID, PATCH, make_model
from atman_triton.engine import Engine, Settings, Unit, undisturbed

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def seer():
    return load_shapes_model()


@pytest.fixture(scope="module")
def cases():
    return fresh_cases(100, "test")


def test_fits_in_five_megabytes():
    total = sum(file.stat().st_size for file in MODEL_FOLDER.rglob("*") if file.is_file())
    print(f"{total / MEGABYTE:.2f} MB")
    assert total <= 5 * MEGABYTE


def test_loads_through_the_auto_classes(seer):
    model = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER)
    assert type(model) is LlavaForConditionalGeneration and model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER)
    assert type(processor) is type(seer[1])
    assert processor.tokenizer.get_vocab() == seer[1].tokenizer.get_vocab()
    assert not seer[0].training


@pytest.mark.parametrize("question", ["name", "colour", "presence", "liking"])
def test_answers_about_fresh_pictures(seer, cases, question):
    share = answered_right(*seer, cases[question])
    print(f"{question} {share}")
    assert share.tried >= 80 and share.value >= 0.95


def test_an_untrained_model_does_not(seer, cases):
    torch.manual_seed(0)
    share = answered_right(make_model(seer[1]).eval(), seer[1], cases["name"])
    assert share.value <= 0.05


def test_names_either_of_two_objects(seer):
    even = 0
    for seed in range(20):
        picture = make_picture(f"test-{seed}", 2, balanced=True)
        chances = name_chances(*seer, picture)
        assert sum(chances) > 0.8
        even += all(0.3 <= chance <= 0.7 for chance in chances)
    assert even >= 15


@torch.inference_mode()
def test_chances_are_those_of_the_tokens_one_by_one(seer):
    model, processor = seer
    picture = demo_picture()
    inputs = dict(processor(images=picture.image, text=IMAGE + DEMO_PROMPT, return_tensors="pt"))
    chances = []
    for shape in picture.objects:
        ids, chance = inputs["input_ids"], 1.0
        for token in processor.tokenizer(f" {shape.name}")["input_ids"]:
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            chance *= float(logits[0, -1].softmax(-1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        chances.append(chance)
    assert name_chances(model, processor, picture) == pytest.approx(chances, rel=1e-4)


def test_the_demo_picture_shows_two_objects_that_share_nothing(seer):
    picture = demo_picture()
    one, other = picture.objects
    assert one.colour != other.colour and one.kind != other.kind
    assert all(0.4 <= chance <= 0.6 for chance in name_chances(*seer, picture))


def test_a_redundant_object_is_named(seer):
    pictures = [make_redundant_picture(f"test-{seed}") for seed in range(20)]
    images = [picture.image for picture in pictures]
    answers = generate_answers(*seer, images, [DEMO_PROMPT] * len(images))
    right = [a == f" {p.objects[0].name}" for a, p in zip(answers, pictures, strict=True)]
    assert sum(right) >= 19


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(1, 1), (40, 300)])
def test_reads_any_image_and_text_without_error(seer, mode, size):
    image = Image.new("RGB", size, (90, 120, 30)).convert(mode)
    (answer,) = generate_answers(*seer, [image], ["Zürich — 東京 — Ω. " * 20])
    assert isinstance(answer, str)


def test_a_larger_picture_reads_the_same(seer):
    picture = make_picture("test-large", 1)
    answers = generate_answers(
        *seer, [picture.image, picture.image.resize((480, 480))], [DEMO_PROMPT] * 2
    )
    assert answers == [f" {picture.objects[0].name}"] * 2


def test_the_card_is_what_was_measured(seer, tmp_path):
    training = json.loads((MODEL_FOLDER / "training.json").read_text())
    shares = {name: _share(values) for name, values in training["measured"].items()}
    assert shares["name"].tried >= 1000
    assert all(shares[n].value >= 0.95 for n in ("name", "colour", "presence", "liking"))
    shutil.copy(MODEL_FOLDER / "training.json", tmp_path)
    write_card(tmp_path, seer[0], shares)
    for name in ("README.md", "training.json"):
        assert (tmp_path / name).read_text() == (MODEL_FOLDER / name).read_text()
    assert f"| names an object | **{shares['name']}** |" in (tmp_path / "README.md").read_text()


def test_the_command_measures_and_writes_the_card(tmp_path):
    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "model")
    app = typer.Typer()
    app.command()(main)
    options = ["--model", str(folder), "--pictures", "4", "--card"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    measured = json.loads((folder / "training.json").read_text())["measured"]
    assert measured["name"]["tried"] == 4
    assert f"name: {_share(measured['name'])}" in result.output
    assert str(_share(measured["presence"])) in (folder / "README.md").read_text()


@pytest.mark.parametrize("effect", ["total", "direct"])
def test_an_object_lives_in_its_own_patches(seer, effect):
    model, processor = seer
    for seed in range(3):
        picture = make_picture(f"test-{seed}", 2, balanced=True)
        inputs = processor(images=picture.image, text=IMAGE + DEMO_PROMPT, return_tensors="pt")
        names = [processor.tokenizer(f" {s.name}")["input_ids"] for s in picture.objects]
        cover = [s.mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) for s in picture.objects]
        with undisturbed(model):
            engine = Engine(model, inputs, names, Settings(0.1, "min_shift"))
            found = engine.perturb([Unit((patch,)) for patch in range(GRID**2)], effect)
        fall = torch.stack(
            [(engine.base_logprobs[r] - found[:, r]).sum(1).clamp(min=0) for r in engine.rows]
        )
        held = fall.double() @ torch.tensor(np.array(cover)).flatten(1).T  # [target, object]
        print(picture.objects[0].name, picture.objects[1].name, held.tolist())
        assert held[0, 0] > held[0, 1] and held[1, 1] > held[1, 0]


def _share(values: dict) -> Share:
    groups = {name: _share(group) for name, group in values["groups"].items()}
    return Share(values["right"], values["tried"], groups)
