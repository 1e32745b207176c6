"""Documents that state one fact twice: in other words, with other words for its value, or another.

A fresh document is asked a question. The sentence that answers it gets a twin, worded by another of
the fact's statements and put anywhere but next to it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atman_triton.demo import Document, Question, StatedFact, make_document
from atman_triton.demo.documents import MAX_SENTENCES, MIN_SENTENCES
from atman_triton.demo.facts import FACTS, REGIONS, Fact

Relation = Literal["same", "synonym", "conflict"]
"""Of the twin's value to the first one: the same words; other words that give the same answer
("nine days", "9 days"; two states of the country asked for); another value."""


@dataclass(frozen=True)
class Restated:
    """A document and its twin sentence.

    Attributes:
        once: the document as it was.
        question: what is asked; its answer is that of ``once``.
        sentences: of the document with the twin.
        first, twin: where in ``sentences`` the sentence of ``once`` and its twin stand.
        twin_answer: what the twin answers.
        twin_value: its value, as it writes it.
    """

    once: Document
    question: Question
    sentences: tuple[str, ...]
    first: int
    twin: int
    twin_answer: str
    twin_value: str

    def without(self, *places: int) -> tuple[str, ...]:
        """The sentences but for those at some places."""
        return tuple(text for place, text in enumerate(self.sentences) if place not in places)

    def answer_of(self, place: int) -> str:
        """What the sentence or its twin answers."""
        return {self.first: self.question.answer, self.twin: self.twin_answer}[place]


def restate(seed: str, relation: Relation) -> Restated:
    """A fresh document, of 8 to 11 sentences, and a twin of one of them; the seed decides all."""
    rng = random.Random(seed)
    while True:
        document = make_document(rng, sentences=rng.randint(MIN_SENTENCES, MAX_SENTENCES - 1))
        question = rng.choice(document.questions)
        value = stated_value(document, question)
        found = _twin_value(rng, document, question, value, relation)
        if found is not None:
            break
    twin_value, twin_answer = found
    sentence = f"{_other_statement(rng, document, question, value).replace('{}', twin_value)}."
    places = range(len(document.sentences) + 1)
    place = rng.choice([p for p in places if p - question.evidence not in (0, 1)])
    sentences = (*document.sentences[:place], sentence, *document.sentences[place:])
    first = question.evidence + (place <= question.evidence)
    return Restated(document, question, sentences, first, place, twin_answer, twin_value)


def spans(sentences: Sequence[str]) -> list[tuple[int, int]]:
    """Character span ``(start, stop)`` of each sentence in a text that joins them by spaces."""
    found, start = [], 0
    for sentence in sentences:
        found.append((start, start + len(sentence)))
        start += len(sentence) + 1
    return found


def stated_value(document: Document, question: Question) -> str:
    """The value that a question asks for, as the document writes it."""
    stated: StatedFact = next(s for s in document.facts if s.sentence == question.evidence)
    return stated.value


def worded(rng: random.Random, pattern: str) -> str:
    """A pattern of ``facts.toml`` with each of its ``[a|b]`` choices made."""
    return re.sub(r"\[([^]]*)\]", lambda found: rng.choice(found[1].split("|")), pattern)


def _twin_value(
    rng: random.Random, document: Document, question: Question, value: str, relation: Relation
) -> tuple[str, str] | None:
    """Value and answer of the twin; None if this question has none."""
    if relation == "same":
        return value, question.answer
    if relation == "conflict":
        return _conflicting(rng, document, question)
    if question.form == "country":
        states = [s for s in REGIONS[question.answer.strip()] if s not in document.text]
        return (rng.choice(states), question.answer) if states else None
    if question.form == "digits" and question.value_type == "duration":
        return question.answer.strip(), question.answer
    return None


def _conflicting(rng: random.Random, document: Document, question: Question) -> tuple[str, str]:
    """What some other document answers to the question, in the same form, but not this one."""
    asked = (question.fact, question.value_type, question.form)
    known = {each.answer for each in document.questions}
    while True:
        other = make_document(rng, document.kind)
        for each in other.questions:
            if (each.fact, each.value_type, each.form) == asked and each.answer not in known:
                value = stated_value(other, each)
                if value not in document.text:
                    return value, each.answer


def _other_statement(rng: random.Random, document: Document, question: Question, value: str) -> str:
    """A statement of the question's fact that its sentence was not made of, without its value."""
    facts = FACTS[document.kind][question.value_type]
    fact: Fact = next(fact for fact in facts if fact.name == question.fact)
    sentence = document.sentences[question.evidence].lower()

    def states(pattern: str) -> bool:
        pieces = re.split(r"\[([^]]*)\]", pattern.replace("{}", value).lower())
        choices = [
            f"(?:{'|'.join(map(re.escape, piece.split('|')))})" if index % 2 else re.escape(piece)
            for index, piece in enumerate(pieces)
        ]
        return re.search("".join(choices), sentence) is not None

    others = [pattern for pattern in fact.statements if not states(pattern)]
    assert len(others) == len(fact.statements) - 1  # statements of a fact are never alike
    return worded(rng, rng.choice(others))
