"""Seeded training batches: a picture, then its questions side by side behind it.

Legend: B pictures, Q tokens of a picture's questions, I image tokens (144), N scored positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from ..tokenizer import END_OF_TEXT
from .model import GRID, PATCH
from .pictures import COLOURS, KINDS, Picture, make_picture, make_redundant_picture
from .questions import (
    PROMPTS,
    Question,
    colour_question,
    liking_question,
    name_question,
    presence_question,
)

_REDUNDANT = 0.15  # share of pictures that show an object twice
_LEADS = ("", "", " ", "\n")  # what stands between image and text
_CLEAR = 0.2  # share of a patch that an object must cover to give it its name
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Pictures with their questions.

    Attributes:
        pixels: ``[B, 3, 96, 96]`` what the vision tower reads.
        ids: ``[B, Q]`` token ids of the questions with their answers, padded on the right.
        positions: ``[1, B, I + Q]`` without the first axis; each question begins behind the image.
        mask: ``[B, 1, I + Q, I + Q]`` added to the scores: 0 for a column that a row may see.
        scored: ``[N]`` flat positions in ``[B, Q]`` whose next token is part of an answer.
        labels: ``[N]`` those next tokens.
        answer: ``[N]`` index of the answer that the label is part of.
        yes_no: ``[answers]`` bool, whether an answer is yes or no rather than a name.
        colours: ``[B, I]`` index in ``COLOURS`` of what covers each patch, ``len(COLOURS)`` for
            the ground, ``IGNORED`` where an object covers too little.
        kinds: the same in ``KINDS``.
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    scored: Tensor
    labels: Tensor
    answer: Tensor
    yes_no: Tensor
    colours: Tensor
    kinds: Tensor


def draw_batch(
    processor: LlavaProcessor, *, pictures: int, seed: int, step: int, rank: int = 0
) -> Batch:
    """The batch of one step and worker; the arguments alone decide it."""
    rng = random.Random(f"train-{seed}-{step}-{rank}")
    rows = []
    for _ in range(pictures):
        if rng.random() < _REDUNDANT:
            picture = make_redundant_picture(rng, other=rng.random() < 0.5)
        else:
            picture = make_picture(rng)
        rows.append((picture, ask_everything(rng, picture)))
    return pack(rows, processor, rng)


def ask_everything(rng: random.Random, picture: Picture) -> list[Question]:
    """The name of every object behind one prompt, and questions of every other kind."""
    prompt = rng.choice((PROMPTS[0], *PROMPTS))
    asked = [name_question(picture, index, prompt) for index in range(len(picture.objects))]
    asked += [presence_question(rng, picture, answer) for answer in (True, False) * 2]
    people = rng.choice((1, 2))
    asked += [liking_question(rng, picture, answer, people=people) for answer in (True, False)]
    colour = colour_question(rng, picture)
    return asked if colour is None else [*asked, colour]


def pack(
    rows: Sequence[tuple[Picture, Sequence[Question]]],
    processor: LlavaProcessor,
    rng: random.Random,
) -> Batch:
    """Turn pictures with their questions into one batch; ``rng`` picks what stands before a text.

    A question sees the image and itself. Equal prompts with different answers thus teach the
    chances of each.
    """
    pieces = []
    for _, questions in rows:
        for question in questions:
            pieces.append(rng.choice(_LEADS) + question.text)
            pieces.append(question.answer + END_OF_TEXT)
    encoded = (each.ids for each in processor.tokenizer.backend_tokenizer.encode_batch(pieces))
    ids: list[list[int]] = []
    part: list[list[int]] = []  # which question a token belongs to
    place: list[list[int]] = []
    scored, labels, answer, yes_no = [], [], [], []
    for index, (_, questions) in enumerate(rows):
        row, parts, places = [], [], []
        for number, question in enumerate(questions):
            text, reply = next(encoded), next(encoded)
            start = len(row) + len(text)
            scored += [(index, position - 1) for position in range(start, start + len(reply))]
            labels += reply
            answer += [len(yes_no)] * len(reply)
            yes_no.append(question.answer in (" yes", " no"))
            row += text + reply
            parts += [number] * (len(text) + len(reply))
            places += range(len(text) + len(reply))
        ids.append(row)
        part.append(parts)
        place.append(places)
    width = max(map(len, ids))
    patches = GRID**2

    def padded(values: list[list[int]], value: int) -> Tensor:
        return torch.tensor([each + [value] * (width - len(each)) for each in values])

    image = torch.arange(patches).expand(len(rows), -1)
    owner = torch.cat([torch.full_like(image, -1), padded(part, -2)], 1)
    causal = torch.ones(patches + width, patches + width, dtype=torch.bool).tril()
    seen = causal & ((owner[:, :, None] == owner[:, None]) | (owner[:, None] == -1))
    covered = [_covered(picture) for picture, _ in rows]
    return Batch(
        pixels=processor.image_processor(
            [picture.image for picture, _ in rows], return_tensors="pt"
        )["pixel_values"],
        ids=padded(ids, processor.tokenizer.pad_token_id),
        positions=torch.cat([image, padded(place, 0) + patches], 1),
        mask=torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None],
        scored=torch.tensor([row * width + column for row, column in scored]),
        labels=torch.tensor(labels),
        answer=torch.tensor(answer),
        yes_no=torch.tensor(yes_no),
        colours=torch.stack([colours for colours, _ in covered]),
        kinds=torch.stack([kinds for _, kinds in covered]),
    )


def _covered(picture: Picture) -> tuple[Tensor, Tensor]:
    """Indices of colour and kind that stand in each patch."""
    shares = np.stack(
        [s.mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel() for s in picture.objects]
    )
    largest, owner = torch.from_numpy(shares.max(0)), torch.from_numpy(shares.argmax(0))
    tags = []
    for index, names in enumerate((tuple(COLOURS), KINDS)):
        own = torch.tensor([names.index(s.name.split()[index]) for s in picture.objects])[owner]
        own[largest < _CLEAR] = IGNORED
        own[largest == 0] = len(names)
        tags.append(own)
    return tags[0], tags[1]
