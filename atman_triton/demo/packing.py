"""Seeded training batches: rows of a document, then several of its questions with their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .documents import (
    MAX_SENTENCES,
    MIN_SENTENCES,
    Document,
    Question,
    make_document,
    unfinished_statement,
)
from .facts import FACTS
from .tokenizer import END_OF_TEXT

# Longest document, in sentences, of each level; a level is left when enough answers are right.
LEVELS = (3, 5, 8, MAX_SENTENCES)
# Share of questions put as an unfinished statement: they teach matching words, before synonyms.
_UNFINISHED = (0.5, 0.3, 0.2, 0.1)
_FULL_SIZED = (0.05, 0.05, 0.05, 0.75)
_LM_SHARE, _LM_WEIGHT = 0.1, 0.1

FACT_INDEX: dict[tuple[str, str], int] = {
    key: index
    for index, key in enumerate(
        (kind, fact.name)
        for kind, types in FACTS.items()
        for group in types.values()
        for fact in group
    )
}


@dataclass(frozen=True)
class Batch:
    """Packed rows, padded on the right: B rows, T tokens, N scored positions, M tagged positions.

    Attributes:
        ids: ``[B, T]`` token ids.
        scored: ``[N]`` flat positions whose next token is trained on.
        labels: ``[N]`` those next tokens.
        weights: ``[N]`` their weights in the loss.
        answer: ``[N]`` index of the answer that the label is part of, -1 outside answers.
        answers: number of answers.
        tagged: ``[M]`` flat positions of value tokens, and of tokens that predict an answer's.
        tags: ``[M]`` index in ``FACT_INDEX`` of the fact that each of them is about.
    """

    ids: Tensor
    scored: Tensor
    labels: Tensor
    weights: Tensor
    answer: Tensor
    answers: int
    tagged: Tensor
    tags: Tensor


def sample_texts(seed: int, documents: int) -> list[str]:
    """Texts of the shape that the model reads, for the tokenizer."""
    texts = []
    for number in range(documents):
        document = make_document(f"tokenizer-{seed}-{number}")
        asked = "".join(f" Q: {q.text} A:{q.answer}" for q in document.questions)
        texts.append(document.text + asked)
    return texts


def draw_batch(
    tokenizer: PreTrainedTokenizerFast,
    *,
    tokens: int,
    seed: int,
    step: int,
    level: int,
    rank: int = 0,
) -> Batch:
    """The batch of one step and worker, about ``tokens`` long; the arguments alone decide it."""
    # The same lengths for every worker, so that none waits for another.
    rng = random.Random(f"train-{seed}-{step}")
    if rng.random() < _FULL_SIZED[level]:
        low, high = MIN_SENTENCES, MAX_SENTENCES
    else:
        low, high = 2, LEVELS[level]
    sentences = rng.randint(low, high)
    asked = rng.randint(min(3, sentences), min(8, sentences))
    rng = random.Random(f"train-{seed}-{step}-{rank}")
    rows = []
    for _ in range(max(tokens // (13 * sentences + 18 * asked), 1)):
        document = make_document(rng, sentences=sentences)
        questions = rng.sample(document.questions, min(asked, len(document.questions)))
        for index, question in enumerate(questions):
            if rng.random() < _UNFINISHED[level]:
                questions[index] = unfinished_statement(rng, document, question)
        rows.append((document, questions))
    return pack(rows, tokenizer, rng)


def pack(
    rows: Sequence[tuple[Document, Sequence[Question]]],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> Batch:
    """Turn documents with their questions into one batch; ``rng`` picks the LM loss's positions."""
    pieces = []
    for document, questions in rows:
        pieces.append(document.text)
        for question in questions:
            pieces += (f" Q: {question.text} A:", f"{question.answer}{END_OF_TEXT}")
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(pieces))

    ids: list[list[int]] = []
    labels, answer, tags = [], [], []
    scored: list[tuple[int, int]] = []
    tagged: list[tuple[int, int]] = []
    answers = 0
    for document, questions in rows:
        read = next(encoded)
        row = list(read.ids)
        for stated in document.facts:
            start = document.spans[stated.sentence][0]
            start += document.sentences[stated.sentence].index(stated.value)
            stop = start + len(stated.value)
            value = [i for i, (a, b) in enumerate(read.offsets) if a < stop and b > start]
            tagged += [(len(ids), position) for position in value]
            tags += [FACT_INDEX[document.kind, stated.name]] * len(value)
        part = [-1] * len(row)
        for question in questions:
            row += next(encoded).ids
            start = len(row)
            row += next(encoded).ids
            part += [-1] * (start - len(part)) + [answers] * (len(row) - start)
            tagged += [(len(ids), position) for position in range(start - 1, len(row) - 1)]
            tags += [FACT_INDEX[document.kind, question.fact]] * (len(row) - start)
            answers += 1
        for position in range(1, len(row)):
            if part[position] >= 0 or rng.random() < _LM_SHARE:
                scored.append((len(ids), position - 1))
                labels.append(row[position])
                answer.append(part[position])
        ids.append(row)

    width = max(map(len, ids))
    inside = sum(index >= 0 for index in answer)
    outside = max(len(answer) - inside, 1)
    pad = tokenizer.pad_token_id
    return Batch(
        ids=torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        scored=torch.tensor([row * width + column for row, column in scored]),
        labels=torch.tensor(labels),
        weights=torch.tensor(
            [1 / inside if index >= 0 else _LM_WEIGHT / outside for index in answer]
        ),
        answer=torch.tensor(answer),
        answers=answers,
        tagged=torch.tensor([row * width + column for row, column in tagged]),
        tags=torch.tensor(tags),
    )
