"""Seeded documents with questions whose answers stand in one known sentence.

Three kinds: employment contracts, CVs and product sheets, of 8 to 12 sentences in varied wording
and shuffled order. Every question has at least three other facts of the same value type in its
document.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from . import facts as data
from .facts import Fact

KINDS: tuple[str, ...] = tuple(data.FACTS)
MIN_SENTENCES, MAX_SENTENCES = 8, 12

# How the facts of a document spread over value types, by its sentences; fillers make up the rest.
_GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((4, 4),),
    9: ((4, 4), (4, 5)),
    10: ((4, 5), (5, 5)),
    11: ((5, 5),),
    12: ((5, 5), (4, 4, 4)),
}
_UNITS: dict[str, tuple[str, ...]] = {
    "contract": ("days", "weeks", "months"),
    "product": ("hours", "days", "weeks"),
}
_OPENING_SHARE = 0.25


class Question(NamedTuple):
    """A question about a document.

    Attributes:
        text: the question, with its question mark.
        answer: what the model should generate after ``A:``; begins with a space.
        evidence: index of the one sentence that holds the answer.
        fact: name of the fact asked for.
        value_type: type of the value, such as ``"money"`` or ``"date"``.
        form: ``"plain"``, or how the answer differs from the text: ``"digits"`` or ``"country"``.
    """

    text: str
    answer: str
    evidence: int
    fact: str
    value_type: str
    form: str


class StatedFact(NamedTuple):
    """A fact as a document states it: name, value type, value in the text, sentence index."""

    name: str
    value_type: str
    value: str
    sentence: int


@dataclass(frozen=True)
class Document:
    """A generated document, its stated facts and one question for each of them."""

    kind: str
    sentences: tuple[str, ...]
    facts: tuple[StatedFact, ...]
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        """The sentences joined by single spaces."""
        return " ".join(self.sentences)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Character span ``(start, stop)`` of each sentence, in ``text`` as in its prompts."""
        spans, start = [], 0
        for sentence in self.sentences:
            spans.append((start, start + len(sentence)))
            start += len(sentence) + 1
        return tuple(spans)


def make_document(
    seed: int | str | random.Random, kind: str | None = None, *, sentences: int | None = None
) -> Document:
    """Make one document with a question for each of its facts.

    Args:
        seed: a seed, or the generator to draw from.
        kind: ``"contract"``, ``"cv"`` or ``"product"``; drawn if absent.
        sentences: 8 to 12, drawn if absent. Fewer than 8 give a shorter document for training,
            without the promise of three distractors.
    Raises: ValueError: if ``kind`` or ``sentences`` is out of range.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    if kind is None:
        kind = rng.choice(KINDS)
    if kind not in data.FACTS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if sentences is None:
        sentences = rng.randint(MIN_SENTENCES, MAX_SENTENCES)
    if not 1 <= sentences <= MAX_SENTENCES:
        raise ValueError(f"sentences must be from 1 to {MAX_SENTENCES}, got {sentences}.")

    # (sentence, its facts as (fact, value type, value)); a filler states none.
    lines: list[tuple[str, tuple[Fact, str, _Value] | None]] = []
    for value_type, count in _choose_groups(rng, kind, sentences):
        values = _draw_values(rng, value_type, kind, count)
        for fact, value in zip(
            rng.sample(data.FACTS[kind][value_type], count), values, strict=True
        ):
            pattern = rng.choice(_expand(rng.choice(fact.statements)))
            lines.append(
                (_sentence(rng, pattern.replace("{}", value.text)), (fact, value_type, value))
            )
    for filler in rng.sample(data.FILLERS[kind], sentences - len(lines)):
        lines.append((_sentence(rng, filler), None))
    rng.shuffle(lines)

    stated, questions = [], []
    for index, (_, content) in enumerate(lines):
        if content is not None:
            fact, value_type, value = content
            stated.append(StatedFact(fact.name, value_type, value.text, index))
            questions.append(_ask(rng, fact, value_type, value, index))
    return Document(kind, tuple(text for text, _ in lines), tuple(stated), tuple(questions))


def prompt(document: Document | str, question: Question | str) -> str:
    """What the model reads: ``{document} Q: {question} A:``. Both may be any text."""
    text = document.text if isinstance(document, Document) else document
    asked = question.text if isinstance(question, Question) else question
    return f"{text} Q: {asked} A:"


def unfinished_statement(rng: random.Random, document: Document, question: Question) -> Question:
    """The same fact, asked for by a statement that stops before its value: easier, for training."""
    facts = data.FACTS[document.kind][question.value_type]
    fact = next(fact for fact in facts if fact.name == question.fact)
    stated = next(stated for stated in document.facts if stated.sentence == question.evidence)
    if rng.random() < 0.5:
        text = document.sentences[question.evidence].split(stated.value)[0]
    else:
        text = rng.choice(_expand(rng.choice(fact.statements))).split("{}")[0]
    answer = f" {stated.value}" if question.form == "country" else question.answer
    return question._replace(text=f"{text.rstrip()}?", answer=answer, form="plain")


def reworded(rng: random.Random, document: Document, question: Question) -> Question | None:
    """The same question in other words, for the same answer; None if it is asked in one way only.

    The words are those of another pattern of the fact where there is one, not just another choice
    of words in the same.
    """
    facts = data.FACTS[document.kind][question.value_type]
    fact = next(fact for fact in facts if fact.name == question.fact)
    ways = [
        [_question_text(text, question.form) for text in _expand(pattern)]
        for pattern in fact.questions
    ]
    others = [way for way in ways if question.text not in way]
    texts = [text for way in others or ways for text in way if text != question.text]
    return question._replace(text=rng.choice(texts)) if texts else None


class _Value(NamedTuple):
    """A value: how the text writes it, and the answer for each form it can be asked in."""

    text: str
    answers: dict[str, str]


def _choose_groups(rng: random.Random, kind: str, sentences: int) -> list[tuple[str, int]]:
    """Value types of a document and how many facts of each it states."""
    types = list(data.FACTS[kind])
    if sentences >= MIN_SENTENCES:
        counts = rng.choice(_GROUPS[sentences])
    elif sentences <= 4:
        counts = (sentences,)
    else:
        counts = (sentences - sentences // 2, sentences // 2)
    return list(zip(rng.sample(types, len(counts)), counts, strict=True))


def _draw_values(rng: random.Random, value_type: str, kind: str, count: int) -> list[_Value]:
    """``count`` values of one type that no two facts can be confused by."""
    if value_type == "money":
        amounts = rng.sample(range(11, 60), count)
        cents = [rng.choice(("", "", ".20", ".40", ".50", ".80")) for _ in amounts]
        return [_plain(f"${whole}{part}") for whole, part in zip(amounts, cents, strict=True)]
    if value_type == "date":
        return [_date(rng, day) for day in rng.sample(range(28), count)]
    if value_type == "duration":
        numbers = rng.sample(range(2, 31), count)
        return [_duration(rng, number, rng.choice(_UNITS[kind])) for number in numbers]
    if value_type == "length":
        return [_plain(f"{number} cm") for number in rng.sample(range(11, 100), count)]
    if value_type == "year":
        return [_plain(str(year)) for year in rng.sample(range(1971, 2024), count)]
    if value_type == "person":
        first, last = rng.sample(data.FIRST_NAMES, count), rng.sample(data.LAST_NAMES, count)
        return [_plain(f"{a} {b}") for a, b in zip(first, last, strict=True)]
    if value_type == "region":
        countries = rng.sample(list(data.REGIONS), count)
        states = [rng.choice(data.REGIONS[country]) for country in countries]
        return [
            _Value(state, {"plain": state, "country": country})
            for state, country in zip(states, countries, strict=True)
        ]
    words = {
        "company": data.COMPANIES,
        "subject": data.SUBJECTS,
        "material": data.MATERIALS,
    }[value_type]
    return [_plain(word) for word in rng.sample(words, count)]


def _plain(text: str) -> _Value:
    """A value that is asked for as the text writes it."""
    return _Value(text, {"plain": text})


def _date(rng: random.Random, day: int) -> _Value:
    """A date written ``3 May 2024``, or in words and then asked for in digits."""
    month, year = rng.randrange(12), rng.randint(2023, 2026)
    if rng.random() < 0.5:
        return _plain(f"{day + 1} {data.MONTHS[month]} {year}")
    return _Value(
        f"the {data.ORDINALS[day]} of {data.MONTHS[month]} {year}",
        {"digits": f"{year}-{month + 1:02d}-{day + 1:02d}"},
    )


def _duration(rng: random.Random, number: int, unit: str) -> _Value:
    """A duration, sometimes with its number in words and then asked for in digits."""
    if number - 2 < len(data.NUMBER_WORDS) and rng.random() < 0.5:
        return _Value(f"{data.NUMBER_WORDS[number - 2]} {unit}", {"digits": f"{number} {unit}"})
    return _plain(f"{number} {unit}")


def _ask(rng: random.Random, fact: Fact, value_type: str, value: _Value, sentence: int) -> Question:
    """One of the wordings of the question for a stated fact."""
    form = rng.choice(tuple(value.answers))
    text = _question_text(rng.choice(_expand(rng.choice(fact.questions))), form)
    return Question(text, f" {value.answers[form]}", sentence, fact.name, value_type, form)


def _question_text(text: str, form: str) -> str:
    """A question's wording, made to ask for the answer in this form."""
    text = text.replace("{place}", "country" if form == "country" else "state")
    return text.replace("?", ", in digits?") if form == "digits" else text


def _sentence(rng: random.Random, text: str) -> str:
    """``text`` with its full stop, sometimes behind an opening phrase."""
    if rng.random() < _OPENING_SHARE:
        text = rng.choice(data.OPENINGS) + text[0].lower() + text[1:]
    return f"{text}."


_expanded: dict[str, tuple[str, ...]] = {}


def _expand(pattern: str) -> tuple[str, ...]:
    """Every text that a pattern with ``[a|b]`` choices stands for."""
    if pattern not in _expanded:
        parts = re.split(r"\[([^]]*)\]", pattern)
        choices = [p.split("|") if i % 2 else [p] for i, p in enumerate(parts)]
        _expanded[pattern] = tuple("".join(pick) for pick in itertools.product(*choices))
    return _expanded[pattern]
