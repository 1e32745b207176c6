"""SQuAD v1.1: paragraphs of Wikipedia, questions, and the passage that answers each.

Source: Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...chat import Span
from ...table import import_extra
from ..examples import Example
from .asking import TOO_LONG, Asking, lengths
from .gather import Gathered, Skipped, gather, shuffled

HUB_NAME = "rajpurkar/squad"
NO_ANSWER = "no answer"
EMPTY = "an empty context, question or answer"
ELSEWHERE = "the answer's offset does not match the context"
TWICE = "an id that an earlier question has"

_FORM = "expected SQuAD's own form: data, paragraphs, context, qas, question, id, answers"


@dataclass(frozen=True)
class _Row:
    """A question as SQuAD gives it.

    Args:
        paragraph: Name of its paragraph: the article's title and a number from 0.
        questions: How many the paragraph has.
        answers: Texts, and where each begins in the context.
    """

    id: str
    paragraph: str
    questions: int
    context: str
    question: str
    answers: tuple[tuple[str, int], ...]


def load_squad(
    limit: int | None,
    *,
    path: str | Path | None = None,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    progress: bool = False,
) -> Gathered[Example]:
    """Questions with the context in front of them, as the paper asks them.

    The prompt is ``{context} Q: {question} A:`` and the target the first answer; the label is where
    that stands. ``reworded`` writes ``Question:`` and ``Answer:`` instead, as the data has no
    second wording. ``group`` is the paragraph, ``facts["questions"]`` how many questions that has.
    Whether the model would answer so is not asked.

    Args:
        limit: The most questions; None is all.
        path: A JSON file in SQuAD's own form, or a folder that ``datasets`` saved; None reads the
            validation split of ``rajpurkar/squad`` from the Hugging Face hub.
        seed: Of the order of questions.
        model: Leave out what is too long for this model; None leaves out nothing.
        processor: Its tokenizer.
        progress: Show a progress bar.
    Raises:
        ConnectionError: if the hub is needed and cannot be reached.
        FileNotFoundError: if there is no such path.
        ImportError: if ``datasets`` is needed and missing.
        ValueError: if the file is not in SQuAD's form, or no question is left.
    Source: AtMan, 4.1.
    """
    asking = None if model is None else Asking(model, processor)
    rows = list(_read(path))
    first = {row.id: row for row in reversed(rows)}
    found = gather(
        "squad",
        (_example(row, asking) for row in shuffled(first.values(), lambda row: row.id, seed)),
        limit,
        progress=progress,
    )
    if len(first) < len(rows):
        found.notes.append(f"squad: left out {len(rows) - len(first)}: {TWICE}")
    return found


def _example(row: _Row, asking: Asking | None) -> Example | Skipped:
    if not row.answers:
        return Skipped(NO_ANSWER)
    question = row.question.strip()
    # Spaces around an answer are none of it.
    answer, start = row.answers[0]
    start += len(answer) - len(answer.lstrip())
    answer = answer.strip()
    if not (answer and question and row.context.strip()):
        return Skipped(EMPTY)
    label: Span = (start, start + len(answer))
    if start < 0 or row.context[slice(*label)] != answer:
        return Skipped(ELSEWHERE)
    prompt = f"{row.context} Q: {question} A:"
    reworded: str | None = f"{row.context} Question: {question} Answer:"
    words = None
    if asking is not None:
        words = asking.tokens(prompt)
        if not asking.fits(prompt, answer, words):
            return Skipped(TOO_LONG)
        if not asking.fits(reworded, answer):
            reworded = None
    region = (0, len(row.context))
    facts = {
        "paragraph": row.paragraph,
        "questions": row.questions,
        "answers": [text for text, _ in row.answers],
    }
    return Example(
        id=row.id,
        prompt=prompt,
        target=answer,
        region=region,
        labels=(label,),
        group=row.paragraph,
        reworded=reworded,
        facts=facts | lengths(prompt, region, label, words),
    )


def _read(path: str | Path | None) -> Iterable[_Row]:
    """All questions, in the order of the data."""
    if path is None:
        return _flat(_from_hub())
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"path must be a JSON file in SQuAD's form or a folder that datasets saved, but there "
            f"is no {place}; dev-v1.1.json is at https://rajpurkar.github.io/SQuAD-explorer/."
        )
    if place.is_dir():
        return _flat(_from_folder(place))
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of text that is not UTF-8
        raise ValueError(f"{place} is no JSON: {error}; {_FORM}.") from error
    return list(_nested(data, place))


def _from_hub() -> Iterable[Mapping[str, Any]]:
    datasets = import_extra("datasets", "eval")
    try:
        return datasets.load_dataset(HUB_NAME, split="validation")
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"{HUB_NAME} could not be read from the Hugging Face hub: {error}. Give the path of a "
            "local copy, such as dev-v1.1.json of https://rajpurkar.github.io/SQuAD-explorer/."
        ) from error


def _from_folder(place: Path) -> Iterable[Mapping[str, Any]]:
    datasets = import_extra("datasets", "eval")
    try:
        found = datasets.load_from_disk(str(place))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} holds no dataset that datasets saved: {error}") from error
    if not isinstance(found, Mapping):
        return found
    if "validation" not in found:
        raise ValueError(
            f"{place} must hold a split 'validation' or be one split, got {', '.join(found)}."
        )
    return found["validation"]


def _flat(rows: Iterable[Mapping[str, Any]]) -> list[_Row]:
    """Rows of the hub: a question each, with ``title`` and ``answers`` as lists."""
    rows = list(rows)
    names: dict[tuple[str, str], str] = {}  # of paragraphs, by title and context
    counts: Counter[tuple[str, str]] = Counter()
    numbers: Counter[str] = Counter()
    found = []
    for place, row in enumerate(rows):
        where = f"row {place} of the data"
        title, context = _text(row, "title", where), _text(row, "context", where)
        if (title, context) not in names:
            names[title, context] = f"{title} #{numbers[title]}"
            numbers[title] += 1
        counts[title, context] += 1
    for place, row in enumerate(rows):
        where = f"row {place} of the data"
        own = row["title"], row["context"]
        answers = _of(row, "answers", Mapping, where)
        texts = _of(answers, "text", list, where)
        starts = _of(answers, "answer_start", list, where)
        if len(texts) != len(starts):
            raise ValueError(f"{where} has {len(texts)} answers and {len(starts)} offsets.")
        pairs = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
        found.append(_row(row, names[own], counts[own], row["context"], pairs, where))
    return found


def _nested(data: Any, place: Path) -> Iterator[_Row]:
    """Questions of a file as SQuAD's site gives it."""
    where = str(place)
    for i, article in enumerate(_of(data, "data", list, where)):
        at = f"{where}: data[{i}]"
        title = str(article.get("title", f"article {i}")) if isinstance(article, Mapping) else ""
        for j, paragraph in enumerate(_of(article, "paragraphs", list, at)):
            inner = f"{at}.paragraphs[{j}]"
            context = _text(paragraph, "context", inner)
            questions = _of(paragraph, "qas", list, inner)
            for k, asked in enumerate(questions):
                deep = f"{inner}.qas[{k}]"
                answers = _of(asked, "answers", list, deep)
                yield _row(asked, f"{title} #{j}", len(questions), context, answers, deep)


def _row(
    asked: Mapping[str, Any],
    paragraph: str,
    questions: int,
    context: str,
    answers: list[Any],
    where: str,
) -> _Row:
    pairs = tuple(
        (_text(answer, "text", where), _of(answer, "answer_start", int, where))
        for answer in answers
    )
    own = _text(asked, "id", where), _text(asked, "question", where)
    return _Row(own[0], paragraph, questions, context, own[1], pairs)


def _text(holder: Any, name: str, where: str) -> str:
    return _of(holder, name, str, where)


def _of(holder: Any, name: str, kind: type, where: str) -> Any:
    """An entry of a JSON object.

    Raises: ValueError: if it is missing or of another type.
    """
    value = holder.get(name) if isinstance(holder, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(
            f"{where} must have {name!r} of type {kind.__name__}, got {value!r:.60}; {_FORM}."
        )
    return value
