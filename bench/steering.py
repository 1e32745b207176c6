"""How well a model is steered in each mode: towards one of two facts, and away from one.

    python -m bench.steering --write

The shipped model answers questions about fresh documents. Of those that it answers right, the
sentence with the answer is suppressed, or amplified, or another sentence that states a value of the
same kind is amplified. The answer is then the same, or the other sentence's value, or neither.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import atman_triton as atman
from atman_triton.demo import load_demo_model, make_document, prompt
from bench import rates

RESULTS = Path(__file__).parent / "results" / "steering.csv"
MODES = ("min_shift", "multiplicative", "log_additive")
SUPPRESS, AMPLIFY, DISTRACT = "suppress evidence", "amplify evidence", "amplify another fact"
FACTORS = {
    SUPPRESS: (0.5, 0.1, 0.0),
    AMPLIFY: (1.5, 2.0, 4.0, 10.0, 30.0),
    DISTRACT: (1.5, 2.0, 4.0, 10.0, 30.0),
}
_NEW_TOKENS = 10
_BATCH = 50


@dataclass(frozen=True)
class Case:
    """A question, with the sentences that answer it and that state another value of its kind."""

    text: str
    answer: str
    evidence: tuple[int, int]
    other: tuple[int, int]
    other_value: str


@dataclass(frozen=True)
class Row:
    """What one factor did to all answers; shares of documents with their standard errors."""

    action: str
    mode: str
    factor: float
    documents: int
    kept: float
    kept_error: float
    turned: float
    turned_error: float
    device: str
    torch: str
    transformers: str
    commit: str
    date: str


def cases() -> Iterator[Case]:
    """Questions about fresh documents, without end."""
    for number in itertools.count():
        rng = random.Random(f"steering-{number}")
        document = make_document(rng)
        question = rng.choice(document.questions)
        spans = document.spans
        other = rng.choice(
            [
                fact
                for fact in document.facts
                if fact.value_type == question.value_type and fact.sentence != question.evidence
            ]
        )
        yield Case(
            prompt(document, question),
            question.answer.strip(),
            spans[question.evidence],
            spans[other.sentence],
            other.value,
        )


def continuations(
    model: Any, tokenizer: Any, texts: Sequence[str], controls: Any, mode: str
) -> list[str]:
    """Greedy continuations of texts, each under its own controls."""
    found: list[str] = []
    for start in range(0, len(texts), _BATCH):
        some = texts[start : start + _BATCH]
        inputs = tokenizer(list(some), padding=True, return_tensors="pt")
        own = controls[start : start + _BATCH]
        with atman.steer(model, own, inputs=inputs, mode=mode):
            ids = model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def measure(documents: int) -> list[Row]:
    """Every action, mode and factor on so many documents whose question is answered right."""
    model, tokenizer = load_demo_model()
    tokenizer.padding_side = "left"
    known: list[Case] = []
    fresh = cases()
    while len(known) < documents:
        some = list(itertools.islice(fresh, documents))
        plain = continuations(model, tokenizer, [c.text for c in some], [[]] * len(some), MODES[0])
        known += [c for c, text in zip(some, plain, strict=True) if text.startswith(c.answer)]
    known = known[:documents]
    stamp, rows = rates.provenance(), []
    for action, mode in itertools.product(FACTORS, MODES):
        for factor in FACTORS[action]:
            controls = []
            for case in known:
                start, stop = case.other if action == DISTRACT else case.evidence
                controls.append([atman.TextControl(start, stop - start, factor, "complete")])
            texts = continuations(model, tokenizer, [c.text for c in known], controls, mode)
            pairs = list(zip(known, texts, strict=True))
            kept = rates.mean([float(text.startswith(case.answer)) for case, text in pairs])
            turned = rates.mean([float(text.startswith(case.other_value)) for case, text in pairs])
            rows.append(Row(action, mode, factor, documents, *kept, *turned, **stamp))
            print(f"{action}, {mode}, {factor:g}: kept {kept[0]:.2f}, turned {turned[0]:.2f}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--write`` also into ``bench/results``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = measure(given.documents)
    if given.write:
        rates.write(rows, RESULTS)


if __name__ == "__main__":
    main()
