"""The shapes' pictures, questions, processor and training loop."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch.multiprocessing.spawn import spawn
from typer.testing import CliRunner

from atman_triton.demo.shapes import (
    COLOURS,
    DEMO_PROMPT,
    IMAGE,
    KINDS,
    Picture,
    Shape,
    colour_question,
    liking_question,
    load_shapes_model,
    make_picture,
    make_redundant_picture,
    name_question,
    presence_question,
)
from atman_triton.demo.shapes.model import GRID, make_model, make_processor
from atman_triton.demo.shapes.packing import IGNORED, draw_batch, pack
from atman_triton.demo.shapes.train import SMOKE, Trainer, forward, main, run

seeds = st.integers(0, 2**32)
pictures = st.builds(make_picture, seeds)
SHORT = replace(SMOKE, looking=2)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def spread(picture: Picture) -> np.ndarray:
    """How far each pixel is from grey: nothing but an object has a colour."""
    pixels = np.asarray(picture.image).astype(int)
    return pixels.max(2) - pixels.min(2)


def widened(shape: Shape) -> np.ndarray:
    """A mask with two pixels around it."""
    return np.asarray(Image.fromarray(shape.mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0


class TestPictures:
    @settings(max_examples=60, deadline=None)
    @given(pictures)
    def test_a_mask_is_where_the_object_covers_half_a_pixel(self, picture):
        colour = spread(picture)
        assert colour[~np.any([widened(shape) for shape in picture.objects], 0)].max() == 0
        for shape in picture.objects:
            whole = np.median(colour[shape.mask])
            # An object covers sixteenths of a pixel: between 7 and 8 of them lies the edge.
            seen = widened(shape) & (colour > 7.5 / 16 * whole)
            assert np.array_equal(seen, shape.mask)
            rows, columns = np.nonzero(shape.mask)
            assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            paint = np.median(np.asarray(picture.image)[shape.mask], 0)
            assert np.abs(paint - COLOURS[shape.colour]).max() <= 15

    @settings(max_examples=60, deadline=None)
    @given(pictures)
    def test_objects_stand_apart_and_have_names_of_their_own(self, picture):
        assert 1 <= len(picture.objects) <= 4
        assert np.sum([widened(shape) for shape in picture.objects], 0).max() == 1
        names = [shape.name for shape in picture.objects]
        assert len(set(names)) == len(names)
        assert all(shape.name == f"{shape.colour} {shape.kind}" for shape in picture.objects)
        assert picture.image.size == (96, 96) and picture.image.mode == "RGB"

    def test_a_seed_decides_a_picture(self):
        one, same, other = make_picture(3, 2), make_picture(3, 2), make_picture(4, 2)
        assert one.image.tobytes() == same.image.tobytes() != other.image.tobytes()
        for a, b in zip(one.objects, same.objects, strict=True):
            assert a.name == b.name and a.box == b.box and np.array_equal(a.mask, b.mask)

    @settings(max_examples=40, deadline=None)
    @given(seeds, st.integers(2, 4))
    def test_balanced_areas_differ_by_a_fifth_at_most(self, seed, count):
        areas = [shape.area for shape in make_picture(seed, count, balanced=True).objects]
        assert len(areas) == count
        assert max(areas) <= 1.2 * min(areas)

    def test_areas_are_not_balanced_by_chance(self):
        pairs = [[s.area for s in make_picture(seed, 2).objects] for seed in range(40)]
        assert sum(max(areas) > 1.2 * min(areas) for areas in pairs) > 20

    @settings(max_examples=40, deadline=None)
    @given(seeds, st.booleans())
    def test_a_redundant_picture_shows_the_same_twice(self, seed, other):
        shapes = make_redundant_picture(seed, other=other).objects
        assert len(shapes) == 2 + other
        assert shapes[0].name == shapes[1].name
        assert all(s.colour != shapes[0].colour and s.kind != shapes[0].kind for s in shapes[2:])
        areas = [shape.area for shape in shapes]
        assert max(areas) <= 1.2 * min(areas)

    def test_every_colour_and_kind_is_drawn(self):
        shapes = [shape for seed in range(100) for shape in make_picture(seed).objects]
        assert {shape.colour for shape in shapes} == set(COLOURS)
        assert {shape.kind for shape in shapes} == set(KINDS)
        assert {len(make_picture(seed).objects) for seed in range(100)} == {1, 2, 3, 4}

    @pytest.mark.parametrize("objects", [0, 5])
    def test_refuses_what_it_cannot_draw(self, objects):
        with pytest.raises(ValueError, match=f"^objects must be from 1 to 4, got {objects}.$"):
            make_picture(0, objects)


class TestQuestions:
    @settings(max_examples=60, deadline=None)
    @given(pictures, seeds, st.booleans())
    def test_what_is_not_there_is_alike_what_is(self, picture, seed, answer):
        question = presence_question(random.Random(seed), picture, answer)
        (colour,) = [name for name in COLOURS if f" {name} " in question.text]
        (kind,) = [name for name in KINDS if f" {name}" in question.text]
        there = [shape.colour == colour and shape.kind == kind for shape in picture.objects]
        assert question.answer == (" yes" if answer else " no") and any(there) == answer
        near = [shape.colour == colour or shape.kind == kind for shape in picture.objects]
        assert question.about == tuple(np.flatnonzero(there if answer else near))
        assert question.about and question.fact is None

    def test_what_is_not_there_shares_colour_and_kind_equally_often(self):
        shares = []
        for seed in range(400):
            picture = make_picture(seed, 1)
            text = presence_question(random.Random(seed), picture, False).text
            shares.append(f" {picture.objects[0].colour} " in text)
        assert 160 < sum(shares) < 240  # 4 standard deviations of a fair coin

    @settings(max_examples=60, deadline=None)
    @given(pictures, seeds, st.booleans(), st.integers(1, 4))
    def test_liking_needs_text_and_picture(self, picture, seed, answer, people):
        question: Any = liking_question(random.Random(seed), picture, answer, people=people)
        start, stop = question.fact
        statements = re.findall(r"(\w+) likes (\w+)(?: things)?\.", question.text)
        assert len(dict(statements)) == people
        ((person, value),) = re.findall(
            r"^(\w+) likes (\w+)(?: things)?\.$", question.text[start:stop]
        )
        assert question.text.rsplit(". ", 1)[1].count(person) == 1
        plurals = {f"{kind}es" if kind == "cross" else f"{kind}s": kind for kind in KINDS}
        liked = plurals.get(value, value)
        assert liked in KINDS or liked in COLOURS
        shown = [liked in (shape.colour, shape.kind) for shape in picture.objects]
        assert question.answer == (" yes" if any(shown) else " no")
        assert any(shown) == answer
        assert question.about == tuple(np.flatnonzero(shown))

    def test_what_others_like_does_not_tell(self):
        picture, told = make_picture(0), []
        shown = {value for shape in picture.objects for value in (shape.colour, shape.kind)}
        for seed in range(400):
            question = liking_question(random.Random(seed), picture, True, people=2)
            other = question.text[: question.fact[0]] + question.text[question.fact[1] :]
            (value,) = re.findall(r"likes (\w+?)(?:e?s)?(?: things)?\.", other)
            told.append(value in shown or f"{value}e" in shown)
        assert 160 < sum(told) < 240  # 4 standard deviations of a fair coin

    @settings(max_examples=60, deadline=None)
    @given(pictures, seeds)
    def test_a_colour_is_asked_of_a_kind_that_stands_alone(self, picture, seed):
        question = colour_question(random.Random(seed), picture)
        kinds = [shape.kind for shape in picture.objects]
        if question is None:
            assert all(kinds.count(kind) > 1 for kind in kinds)
        else:
            (index,) = question.about
            assert kinds.count(kinds[index]) == 1 and kinds[index] in question.text
            assert question.answer == f" {picture.objects[index].colour}"

    def test_a_name_is_about_every_object_that_has_it(self):
        picture = make_redundant_picture(0, other=True)
        assert name_question(picture, 1).about == (0, 1)
        assert name_question(picture, 2).about == (2,)
        assert name_question(picture, 2).answer == f" {picture.objects[2].name}"


class TestProcessor:
    @settings(max_examples=100, deadline=None)
    @given(st.text().filter(lambda text: "<" not in text))
    def test_any_text_survives(self, processor, text):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(ids) == text

    def test_offsets_cut_the_tokens_out_of_the_text(self, processor):
        rng = random.Random(0)
        question = liking_question(rng, make_picture(rng), True)
        text = IMAGE + question.text + question.answer
        encoded = processor.tokenizer(text, return_offsets_mapping=True)
        pieces = [text[start:stop] for start, stop in encoded["offset_mapping"]]
        assert "".join(pieces) == text
        assert pieces == [processor.tokenizer.decode([token]) for token in encoded["input_ids"]]
        assert pieces[0] == IMAGE and pieces[-1] == " yes"

    def test_a_name_is_two_tokens(self, processor):
        for colour in COLOURS:
            for kind in KINDS:
                assert len(processor.tokenizer(f" {colour} {kind}")["input_ids"]) == 2

    def test_a_picture_becomes_144_tokens_behind_its_place(self, processor):
        inputs = processor(
            images=make_picture(0).image, text=IMAGE + DEMO_PROMPT, return_tensors="pt"
        )
        ids = inputs["input_ids"][0]
        assert (ids == processor.image_token_id).nonzero().flatten().tolist() == list(range(144))
        assert processor.tokenizer.decode(ids[144:]) == DEMO_PROMPT

    def test_a_picture_of_96_pixels_is_not_changed(self, processor):
        image = make_picture(0).image
        images = processor.image_processor
        found = images(image, return_tensors="pt")["pixel_values"][0]
        scale, mean = torch.tensor(images.image_std), torch.tensor(images.image_mean)
        pixels = found.permute(1, 2, 0) * scale + mean
        assert np.array_equal((pixels * 255).round().numpy(), np.asarray(image))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
    @pytest.mark.parametrize("size", [(1, 1), (7, 200), (300, 40)])
    def test_any_image_is_resized_whole(self, processor, mode, size):
        image = Image.new("RGB", size)
        image.paste((200, 200, 200), (0, 0, (size[0] + 1) // 2, size[1]))
        pixels = processor.image_processor(image.convert(mode), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 96, 96)
        left, right = pixels[0, :, :, 0].mean(), pixels[0, :, :, -1].mean()
        assert (left > right + 1) if size[0] > 1 else torch.allclose(left, right)


class TestPacking:
    def test_a_packed_question_is_answered_like_a_prompt_of_its_own(self, processor):
        torch.manual_seed(0)
        model = make_model(processor, width=32, layers=2).eval()
        rng = random.Random(0)
        rows = []
        for seed in range(2):
            picture = make_picture(seed, 2)
            asked = [name_question(picture, index) for index in range(2)]
            rows.append((picture, [*asked, presence_question(rng, picture, seed == 0)]))
        batch = pack(rows, processor, _FirstOf())
        logits = model.lm_head(decoded(model, batch)).flatten(0, 1)[batch.scored]
        expected, labels = [], []
        for picture, questions in rows:
            for question in questions:
                reply = processor.tokenizer(question.answer)["input_ids"]
                text = IMAGE + question.text + question.answer
                inputs = processor(images=picture.image, text=text, return_tensors="pt")
                expected.append(model(**inputs).logits[0, -len(reply) - 1 :])
                labels += [*reply, processor.tokenizer.eos_token_id]
        assert batch.labels.tolist() == labels
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert batch.yes_no.tolist() == [False, False, True] * 2

    def test_tags_name_what_covers_a_patch(self, processor):
        picture = make_picture(1, 2)
        batch = pack([(picture, [name_question(picture, 0)])], processor, random.Random(0))
        for patch in range(GRID**2):
            row, column = divmod(patch, GRID)
            inside = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            share = [shape.mask[inside].mean() for shape in picture.objects]
            most = picture.objects[int(np.argmax(share))]
            expected = (list(COLOURS).index(most.colour), KINDS.index(most.kind))
            if max(share) < 0.2:
                expected = (IGNORED, IGNORED) if max(share) else (len(COLOURS), len(KINDS))
            assert (batch.colours[0, patch], batch.kinds[0, patch]) == expected

    def test_a_batch_depends_on_its_step_alone(self, processor):
        one, same, other, rank = (
            draw_batch(processor, pictures=2, seed=0, step=step, rank=rank)
            for step, rank in ((5, 0), (5, 0), (6, 0), (5, 1))
        )
        assert torch.equal(one.pixels, same.pixels) and torch.equal(one.ids, same.ids)
        assert not torch.equal(one.pixels, other.pixels)
        assert not torch.equal(one.pixels, rank.pixels)


class TestTraining:
    def test_a_resumed_run_equals_an_unbroken_one(self, tmp_path: Path, processor):
        whole = Trainer(SHORT, tmp_path / "whole", processor)
        run(whole, steps=4)
        first = Trainer(SHORT, tmp_path / "parts", processor)
        run(first, steps=4, stop=3)
        assert first.progress.step == 3
        second = Trainer(SHORT, tmp_path / "parts", processor)
        second.load()
        run(second, steps=4)
        assert second.progress.step == whole.progress.step == 4
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, second.model.state_dict()[name]), name

    def test_the_loss_falls(self, tmp_path: Path, processor):
        history = run(Trainer(SHORT, tmp_path, processor), steps=24, log_every=5)
        losses = [row["loss"] for row in history[1:]]
        print(losses)
        assert losses[-1] < 0.8 * losses[0]

    def test_only_the_tower_learns_at_first(self, tmp_path: Path, processor):
        trainer = Trainer(replace(SMOKE, looking=1), tmp_path, processor)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        moved = []
        for _ in range(2):
            trainer.step(0.0)
            names = [n for n, w in trainer.model.named_parameters() if not w.equal(before[n])]
            moved.append({name.split(".")[1] for name in names})
        assert moved[0] == {"vision_tower", "multi_modal_projector"}
        assert moved[1] == {"vision_tower", "multi_modal_projector", "language_model"}

    def test_the_command_trains_and_resumes(self, tmp_path: Path):
        options = ["--smoke", "--workers", "1", "--out", str(tmp_path)]
        for more in (["--steps", "1"], ["--steps", "2", "--resume"]):
            result = _command([*options, *more])
            assert result.exit_code == 0, result.output
        model, processor = load_shapes_model(tmp_path / "model")
        assert len(processor.tokenizer) == model.config.get_text_config().vocab_size
        training = json.loads((tmp_path / "model" / "training.json").read_text())
        assert training["progress"]["step"] == 2

    def test_two_workers_train_one_model(self, tmp_path: Path):
        spawn(_train_as_one_of_two, (tmp_path,), nprocs=2)
        assert load_shapes_model(tmp_path / "model")[0].config.get_text_config().hidden_size == 32

    @pytest.mark.parametrize(("exists", "options"), [(False, ["--resume"]), (True, [])])
    def test_the_command_refuses_to_guess_about_a_checkpoint(self, tmp_path, exists, options):
        if exists:
            (tmp_path / "checkpoint.pt").touch()
        result = _command(["--out", str(tmp_path), *options])
        assert result.exit_code == 2
        assert "checkpoint.pt" in result.stderr

    def test_refuses_a_checkpoint_of_another_recipe(self, tmp_path: Path, processor):
        Trainer(SMOKE, tmp_path, processor).save()
        with pytest.raises(ValueError, match="was made with another recipe"):
            Trainer(replace(SMOKE, seed=1), tmp_path, processor).load()


class _FirstOf(random.Random):
    """Draws what comes first: nothing between an image and its text."""

    def choice(self, seq):
        return seq[0]


def decoded(model, batch):
    """Hidden states behind the last layer at the questions, by what a training step runs."""
    found = []
    hook = model.model.language_model.norm.register_forward_hook(
        lambda module, args, output: found.append(output)
    )
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(COLOURS) + len(KINDS) + 2)
    forward(model, head, batch, autocast=False)
    hook.remove()
    return found[0][:, GRID**2 :]


def _command(arguments: list[str]) -> Any:
    """Run the training command in this process."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, arguments)


def _train_as_one_of_two(rank: int, folder: Path) -> None:
    """What each of two worker processes does: average, train, and compare the weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    trainer = Trainer(replace(SMOKE, workers=2, looking=1), folder, make_processor(), rank)
    for parameter in trainer.parameters:
        parameter.grad = torch.full_like(parameter, float(rank))
    assert trainer._average(torch.tensor([2.0 * rank])).tolist() == [1.0]
    assert all(bool((p.grad == 0.5).all()) for p in trainer.parameters)
    for parameter in trainer.parameters:
        parameter.grad = None
    run(trainer, steps=2)
    for parameter in trainer.parameters:
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)
    dist.destroy_process_group()
