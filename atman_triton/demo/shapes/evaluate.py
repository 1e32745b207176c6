"""How well the shapes model sees: ``python -m atman_triton.demo.shapes.evaluate``.

Greedy answers about fresh pictures, whose seeds training never draws, beside an untrained model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ..evaluate import Share
from .card import write_card
from .model import IMAGE, MODEL_FOLDER, load_shapes_model, make_model
from .pictures import Picture, make_picture
from .questions import (
    DEMO_PROMPT,
    Question,
    colour_question,
    liking_question,
    name_question,
    presence_question,
)

Case = tuple[Picture, Question]
_ANSWER_TOKENS = 6
_EVEN = (0.3, 0.7)  # chances of a name when either of two is right


def fresh_cases(count: int, salt: str = "fresh") -> dict[str, list[Case]]:
    """``count`` pictures that training never sees, with questions of each kind."""
    cases: dict[str, list[Case]] = {}
    for number in range(count):
        rng = random.Random(f"{salt}-{number}")
        picture = make_picture(rng)
        answer = number % 2 == 0
        asked = {
            "name": name_question(picture, 0),
            "colour": colour_question(rng, picture),
            "presence": presence_question(rng, picture, answer),
            "liking": liking_question(rng, picture, answer),
            "liking_of_two": liking_question(rng, picture, answer, people=2),
        }
        for name, question in asked.items():
            if question is not None:
                cases.setdefault(name, []).append((picture, question))
    return cases


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    batch_size: int = 50,
    progress: bool = False,
) -> list[str]:
    """Greedy continuation of each text behind its image, up to the end-of-text token."""
    answers: list[str] = []
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    read: Any = processor
    tokenizer = processor.tokenizer
    for start in track(range(0, len(texts), batch_size), "Looking", disable=not progress):
        stop = start + batch_size
        batch = read(
            images=list(images[start:stop]),
            text=[IMAGE + text for text in texts[start:stop]],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = generate(**batch, max_new_tokens=_ANSWER_TOKENS, do_sample=False)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id)]
            answers.append(str(tokenizer.decode(row)))
    return answers


def answered_right(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    cases: Sequence[Case],
    *,
    progress: bool = False,
) -> Share:
    """Share of cases answered as expected, by number of objects and by yes and no.

    To name an object, the name of any object in the picture is right.
    """
    images = [picture.image for picture, _ in cases]
    texts = [question.text for _, question in cases]
    answers = generate_answers(model, processor, images, texts, progress=progress)
    total = Share()
    for (picture, question), answer in zip(cases, answers, strict=True):
        expected = [question.answer]
        if question.text == DEMO_PROMPT:
            expected = [f" {shape.name}" for shape in picture.objects]
        count = len(picture.objects)
        groups = [f"{count} object{'s' * (count > 1)}"]
        if question.answer in (" yes", " no"):
            groups.append(f"answer{question.answer}")
        for share in (total, *(total.groups.setdefault(name, Share()) for name in groups)):
            share.right += answer in expected
            share.tried += 1
    return total


@torch.inference_mode()
def name_chances(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, picture: Picture
) -> list[float]:
    """The chance of each object's name behind the prompt."""
    names = [f" {shape.name}" for shape in picture.objects]
    read: Any = processor
    batch = read(
        images=[picture.image] * len(names),
        text=[IMAGE + DEMO_PROMPT + name for name in names],
        padding=True,
        return_tensors="pt",
    )
    logprobs = model(**batch).logits.log_softmax(-1)
    start = len(read(images=picture.image, text=IMAGE + DEMO_PROMPT)["input_ids"][0])
    chances = []
    for row, name in zip(logprobs, names, strict=True):
        tokens = processor.tokenizer(name)["input_ids"]
        scored = row[start - 1 : start - 1 + len(tokens)]
        chances.append(float(scored[range(len(tokens)), tokens].sum().exp()))
    return chances


def even_chances(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: int
) -> Share:
    """Share of balanced pictures of two objects in which each has a chance of 30% to 70%."""
    share = Share()
    for number in range(pictures):
        picture = make_picture(f"pair-{number}", 2, balanced=True)
        chances = name_chances(model, processor, picture)
        share.right += all(_EVEN[0] <= chance <= _EVEN[1] for chance in chances)
        share.tried += 1
    return share


def measure(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: int,
    *,
    progress: bool = False,
) -> dict[str, Share]:
    """Every share that the card tells, by name."""
    cases = fresh_cases(pictures)
    shares = {
        name: answered_right(model, processor, of_kind, progress=progress)
        for name, of_kind in cases.items()
    }
    torch.manual_seed(0)
    untrained = make_model(processor).eval()
    shares["untrained"] = answered_right(untrained, processor, cases["name"][:200])
    shares["even"] = even_chances(model, processor, min(pictures, 200))
    return shares


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model to measure.")] = MODEL_FOLDER,
    pictures: Annotated[int, typer.Option(min=1, help="Fresh pictures.")] = 1000,
    card: Annotated[
        bool, typer.Option("--card", help="Write the numbers into the model's folder.")
    ] = False,
) -> None:
    """Measure names, answers to questions, and an untrained model."""
    console = Console()
    seer, processor = load_shapes_model(model)
    shares = measure(seer, processor, pictures, progress=True)
    for name, share in shares.items():
        console.print(f"{name}: {share}")
        for group, part in sorted(share.groups.items()):
            console.print(f"  {group}: {part}")
    if card:
        write_card(model, seer, shares)


if __name__ == "__main__":
    typer.run(main)
