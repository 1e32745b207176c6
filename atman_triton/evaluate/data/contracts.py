"""Fresh contracts, CVs and product sheets: where an answer stands in them is known exactly.

Every document has three other facts of the answer's type, so that only the question tells which
one is asked for. Only what the model answers right is kept: where else a wrong answer comes from,
no label says.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from ...chat import Span
from ...demo.documents import Document, Question, prompt, reworded
from ...demo.evaluate import fresh_case
from ..examples import Example
from .asking import TOO_LONG, Asking, lengths
from .gather import Gathered, Skipped, gather

WRONG = "the model does not answer it right"

_PATIENCE = 200  # documents in a row that the model answers wrong


def load_contracts(
    limit: int,
    *,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    progress: bool = False,
) -> Gathered[Example]:
    """Documents that training never draws, with one question each.

    The prompt is ``{document} Q: {question} A:``. The label is the value as the document writes
    it, once, in one sentence; some answers are written otherwise (``facts["form"]``: ``"digits"``
    of a number in words, ``"country"`` of a state), and their label is what they were made from.
    ``facts["evidence"]`` are the characters of the whole sentence. ``reworded`` asks for the same
    fact by another pattern, where the model answers that right as well. ``group`` is the
    document's kind.

    Args:
        limit: How many.
        seed: Of the documents.
        model: Keep only what this model answers right; None keeps all.
        processor: Its tokenizer.
        progress: Show a progress bar.
    Raises: ValueError: if the model answers none of the first 200 right.
    """
    asking = None if model is None else Asking(model, processor)
    found = gather(
        "contracts",
        (_example(number, seed, asking) for number in itertools.count()),
        limit,
        patience=_PATIENCE,
        progress=progress,
    )
    alike = sum(example.reworded is None for example in found.kept)
    if alike:
        found.notes.append(
            f"contracts: {alike} without a reworded question that the model answers right"
        )
    if asking is None:
        found.notes.append("contracts: no model was given, so whether it answers right is unknown")
    return found


def _example(number: int, seed: int, asking: Asking | None) -> Example | Skipped:
    salt = f"evaluate-{seed}"
    document, question = fresh_case(number, salt)
    text = prompt(document, question)
    words = None
    if asking is not None:
        words = asking.tokens(text)
        if not asking.fits(text, question.answer, words):
            return Skipped(TOO_LONG)
        if not asking.said(text, question.answer).right:
            return Skipped(WRONG)
    rng = random.Random(f"{salt}-{number}-reworded")
    region, label = (0, len(document.text)), value_span(document, question)
    return Example(
        id=f"contracts-{seed}-{number}",
        prompt=text,
        target=question.answer,
        region=region,
        labels=(label,),
        group=document.kind,
        reworded=_reworded(rng, document, question, asking),
        facts={
            "kind": document.kind,
            "sentences": len(document.sentences),
            "questions": len(document.questions),
            "value_type": question.value_type,
            "form": question.form,
            "evidence": list(document.spans[question.evidence]),
        }
        | lengths(text, region, label, words),
    )


def value_span(document: Document, question: Question) -> Span:
    """Where the value that a question asks for stands in a document, in characters."""
    stated = next(fact for fact in document.facts if fact.sentence == question.evidence)
    start = document.spans[question.evidence][0]
    start += document.sentences[question.evidence].index(stated.value)
    return start, start + len(stated.value)


def _reworded(
    rng: random.Random, document: Document, question: Question, asking: Asking | None
) -> str | None:
    """The prompt with its question in other words, if the model answers that right as well."""
    other = reworded(rng, document, question)
    if other is None:
        return None
    text = prompt(document, other)
    if asking is None:
        return text
    fits = asking.fits(text, other.answer)
    return text if fits and asking.said(text, other.answer).right else None
