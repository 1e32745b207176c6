"""What ``method="path"`` costs and how well its scores add up, by the length of the prompt.

The shipped model, generated documents joined to an exact number of tokens, each with a question
that the model answers rightly with two tokens, every token a unit, mode ``min_shift``. The cost
must not depend on the length, and 8 steps must leave a completeness error below 2%. Run it on an
otherwise idle machine::

    python -m bench.path              # 64 ... 1024 tokens, 10 documents each
    python -m bench.path --tiny       # a minute, to see that it runs

Rows go to ``bench/results/<device>.csv``: medians and quantiles are over documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import atman_triton as atman
from atman_triton.demo import load_demo_model, make_document, prompt
from bench.harness import RESULTS, Row, clock, summarise, write_rows

MODE = "min_shift"
WHAT = f"path by length, {MODE}"
LENGTHS = (64, 128, 256, 512, 1024)
STEPS = (4, 8, 16)
JUDGED = 8  # steps that must leave an error below _ALLOWED
_ALLOWED = 0.02
_LEVEL = 1.05  # the largest cost may be so many times the smallest
_TRIES = 200  # documents for each that the model answers


@dataclasses.dataclass(frozen=True)
class Case:
    """Token ids of a prompt and of the right answer."""

    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Found:
    """One explanation."""

    milliseconds: float
    forwards: float
    error: float


def cases(model: Any, tokenizer: Any, tokens: int, count: int, answer_tokens: int) -> list[Case]:
    """Prompts of exactly so many tokens, the question at the end, that are answered rightly.

    Raises: ValueError: if too few are.
    """
    found: list[Case] = []
    for number in range(_TRIES * count):
        if len(found) == count:
            return found
        rng = random.Random(f"path-{tokens}-{number}")
        document = make_document(rng)
        question = rng.choice(document.questions)
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        if len(answer) != answer_tokens:
            continue
        texts = document.text
        while len(ids := tokenizer(prompt(texts, question))["input_ids"]) < tokens:
            texts = f"{make_document(rng).text}\n\n{texts}"
        case = Case(ids[-tokens:], answer)
        if answered(model, case):
            found.append(case)
    raise ValueError(f"{count} prompts of {tokens} tokens must be answered, got {len(found)}.")


@torch.inference_mode()
def answered(model: Any, case: Case) -> bool:
    """Whether every token of the answer is the likeliest."""
    ids = torch.tensor([case.prompt + case.answer[:-1]], device=model.device)
    logits = model(ids, logits_to_keep=len(case.answer), use_cache=False).logits[0]
    return logits.argmax(-1).tolist() == case.answer


def explained(model: Any, case: Case, steps: int) -> Found:
    """One timed explanation."""
    explainer = atman.Explainer(model, mode=MODE, method="path", steps=steps, progress=False)
    results: list[atman.Explanation] = []
    spent = clock(lambda: results.append(explainer.explain(case.prompt, case.answer)), model.device)
    complete = results[0].completeness
    assert complete is not None  # every path has it
    return Found(spent, results[0].provenance["forwards"], complete.error)


def rows_of(
    tokens: int, answer_tokens: int, found: dict[int, list[Found]], model: Any
) -> list[Row]:
    """Time, cost and error of one length, a row each per number of steps."""
    rows: list[Row] = []
    for metric, name in (
        ("ms", "milliseconds"),
        ("forwards", "forwards"),
        ("completeness error", "error"),
    ):
        values = {
            f"path {steps} steps": [getattr(each, name) for each in own]
            for steps, own in found.items()
        }
        rows += summarise(
            values,
            what=WHAT,
            shape=f"demo-prompt{tokens}-target{answer_tokens}",
            dtype=model.dtype,
            device=model.device,
            metric=metric,
        )
    return rows


def table(found: dict[int, dict[int, list[Found]]]) -> str:
    """Median seconds and cost, and the errors' median and largest."""
    lines = [f"{'tokens':>7}{'steps':>7}{'seconds':>10}{'forwards':>10}{'error':>9}{'largest':>9}"]
    for tokens, by_steps in found.items():
        for steps, own in by_steps.items():
            seconds = median(each.milliseconds for each in own) / 1e3
            errors = [each.error for each in own]
            lines.append(
                f"{tokens:>7}{steps:>7}{seconds:>10.2f}{median(e.forwards for e in own):>10.1f}"
                f"{median(errors):>9.2%}{max(errors):>9.2%}"
            )
    return "\n".join(lines)


def verdicts(found: dict[int, dict[int, list[Found]]]) -> dict[str, bool]:
    """The two requirements and whether they are met; errors are means over a length's documents."""
    worst = max(fmean(e.error for e in by[JUDGED]) for by in found.values())
    costs = [fmean(e.forwards for e in by[JUDGED]) for by in found.values()]
    return {
        f"completeness error at {JUDGED} steps below {_ALLOWED:.0%} at every length "
        f"(the largest mean is {worst:.2%})": worst < _ALLOWED,
        f"cost in forwards independent of the length ({min(costs):.1f} to {max(costs):.1f})": max(
            costs
        )
        <= _LEVEL * min(costs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompt tokens")
    parser.add_argument("--documents", type=int, default=10, help="of each length")
    parser.add_argument("--answer-tokens", type=int, default=2, help="tokens of every answer")
    parser.add_argument("--tiny", action="store_true", help="two lengths, two documents each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    lengths = LENGTHS[:2] if options.tiny else sorted(options.lengths)
    documents = 2 if options.tiny else options.documents
    model, tokenizer = load_demo_model()
    console = Console(stderr=True)
    found: dict[int, dict[int, list[Found]]] = {}
    for tokens in lengths:
        chosen = cases(model, tokenizer, tokens, documents, options.answer_tokens)
        explained(model, chosen[0], 1)  # warm
        found[tokens] = {steps: [] for steps in STEPS}
        for case in track(chosen, f"{tokens} tokens", console=console, transient=True):
            for steps in STEPS:
                found[tokens][steps].append(explained(model, case, steps))
        path = write_rows(rows_of(tokens, options.answer_tokens, found[tokens], model), options.out)
        print(f"{tokens} tokens: rows in {path}", file=sys.stderr, flush=True)
    print(table(found))
    results = verdicts(found)
    for text, met in results.items():
        print(f"{text}: {'yes' if met else 'NO'}")
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
