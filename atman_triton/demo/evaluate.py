"""How well the demo reader reads: ``python -m atman_triton.demo.evaluate``.

Exact match on fresh documents, whose seeds training never draws, beside the keyword baseline and
an untrained model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .bm25 import bm25_best
from .card import write_card
from .documents import Document, Question, make_document, prompt
from .model import MODEL_FOLDER, load_demo_model, make_model

Case = tuple[Document, Question]
_ANSWER_TOKENS = 10


@dataclass
class Share:
    """Successes among tries, as a whole and by group, such as ``"type money"``."""

    right: int = 0
    tried: int = 0
    groups: dict[str, Share] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Successes per try; 0 where nothing was tried."""
        return self.right / self.tried if self.tried else 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.right} of {self.tried})"


def fresh_cases(count: int, salt: str = "fresh") -> list[Case]:
    """``count`` documents that training never sees, each with one of its questions."""
    return [fresh_case(number, salt) for number in range(count)]


def fresh_case(number: int, salt: str = "fresh") -> Case:
    """One of them, from 0."""
    rng = random.Random(f"{salt}-{number}")
    document = make_document(rng)
    return document, rng.choice(document.questions)


@torch.inference_mode()
def generate_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """Greedy continuation of each prompt up to the end-of-text token."""
    answers: list[str] = []
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    for start in track(range(0, len(prompts), batch_size), "Reading", disable=not progress):
        batch: Any = tokenizer(
            list(prompts[start : start + batch_size]),
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


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cases: Sequence[Case],
    *,
    progress: bool = False,
) -> Share:
    """Share of cases whose greedy answer equals the expected one, character by character."""
    prompts = [prompt(document, question) for document, question in cases]
    answers = generate_answers(model, tokenizer, prompts, progress=progress)
    return _tally(cases, lambda index: answers[index] == cases[index][1].answer)


def keyword_match(cases: Sequence[Case]) -> Share:
    """Share of cases whose evidence sentence BM25 ranks first."""

    def found(index: int) -> bool:
        document, question = cases[index]
        return bm25_best(question.text, document.sentences) == question.evidence

    return _tally(cases, found)


def _tally(cases: Sequence[Case], right: Callable[[int], bool]) -> Share:
    """Count the cases for which ``right(index)`` holds, by document kind, value type and form."""
    total = Share()
    for index, (document, question) in enumerate(cases):
        names = (f"kind {document.kind}", f"type {question.value_type}", f"form {question.form}")
        groups = [total.groups.setdefault(name, Share()) for name in names]
        for share in (total, *groups):
            share.right += right(index)
            share.tried += 1
    return total


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model to measure.")] = MODEL_FOLDER,
    documents: Annotated[
        int, typer.Option(min=1, help="Fresh documents, one question each.")
    ] = 1000,
    card: Annotated[
        bool, typer.Option("--card", help="Write the numbers into the model's README.md.")
    ] = False,
) -> None:
    """Measure exact match, the keyword baseline and an untrained model."""
    console = Console()
    cases = fresh_cases(documents)
    reader, tokenizer = load_demo_model(model)
    torch.manual_seed(0)
    untrained = make_model(tokenizer).eval()
    shares = {
        "reader": exact_match(reader, tokenizer, cases, progress=True),
        "untrained": exact_match(untrained, tokenizer, cases[:200]),
        "keywords": keyword_match(cases),
    }
    for name, share in shares.items():
        console.print(f"{name}: {share}")
    for name, share in sorted(shares["reader"].groups.items()):
        console.print(f"  {name}: {share}")
    if card:
        write_card(
            model,
            reader.num_parameters(),
            {k: str(v) for k, v in shares.items()},
            [
                (name, str(share), str(shares["keywords"].groups[name]))
                for name, share in sorted(shares["reader"].groups.items())
            ],
        )


if __name__ == "__main__":
    typer.run(main)
