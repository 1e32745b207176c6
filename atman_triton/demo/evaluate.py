"""How well the demo reader reads: ``python -m atman_triton.demo.evaluate``.

Exact match on fresh documents, whose seeds training never draws, beside the keyword baseline and an untrained model.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
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
from .documents import Document, Question, make_document, prompt
from .model import MODEL_FOLDER, load_demo_model, make_model

_ANSWER_TOKENS = 10


@dataclass
class Share:
    """A count of successes among tries, as a whole and by group."""

    right: int = 0
    tried: int = 0
    groups: dict[str, Share] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Successes per try; 0 where nothing was tried."""
        return self.right / self.tried if self.tried else 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.right}/{self.tried})"


def fresh_cases(count: int, salt: str = "fresh") -> list[tuple[Document, Question]]:
    """``count`` documents that training never sees, each with one of its questions drawn evenly."""
    cases = []
    for number in range(count):
        rng = random.Random(f"{salt}-{number}")
        document = make_document(rng)
        cases.append((document, rng.choice(document.questions)))
    return cases


@torch.inference_mode()
def generate_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    track_progress: bool = False,
) -> list[str]:
    """Greedy continuation of each prompt up to the end-of-text token."""
    answers: list[str] = []
    starts = range(0, len(prompts), batch_size)
    for start in track(starts, "Reading", disable=not track_progress):
        batch = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output: Any = model.generate(
            **batch,  # pyright: ignore[reportArgumentType]
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            if tokenizer.eos_token_id in row:
                row = row[: row.index(tokenizer.eos_token_id)]
            answers.append(tokenizer.decode(row))
    return answers


def tally(
    cases: Sequence[tuple[Document, Question]],
    right: Callable[[int], bool],
) -> Share:
    """Count the cases for which ``right(index)`` holds, by document kind, value type and answer form."""
    total = Share(groups=defaultdict(Share))
    for index, (document, question) in enumerate(cases):
        names = (f"kind {document.kind}", f"type {question.value_type}", f"form {question.form}")
        for share in (total, *(total.groups[name] for name in names)):
            share.right += right(index)
            share.tried += 1
    return total


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cases: Sequence[tuple[Document, Question]],
    *,
    track_progress: bool = False,
) -> Share:
    """Share of cases whose greedy answer equals the expected one, character by character."""
    prompts = [prompt(document, question) for document, question in cases]
    answers = generate_answers(model, tokenizer, prompts, track_progress=track_progress)
    return tally(cases, lambda index: answers[index] == cases[index][1].answer)


def keyword_match(cases: Sequence[tuple[Document, Question]]) -> Share:
    """Share of cases whose evidence sentence BM25 ranks first."""
    return tally(
        cases,
        lambda index: (
            bm25_best(cases[index][1].text, cases[index][0].sentences) == cases[index][1].evidence
        ),
    )


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model to measure.")] = MODEL_FOLDER,
    documents: Annotated[int, typer.Option(help="Fresh documents, one question each.")] = 1000,
    save: Annotated[Path | None, typer.Option(help="Write the numbers here as JSON.")] = None,
) -> None:
    """Measure exact match, the keyword baseline and an untrained model."""
    console = Console()
    cases = fresh_cases(documents)
    reader, tokenizer = load_demo_model(model)
    torch.manual_seed(0)
    shares = {
        "reader": exact_match(reader, tokenizer, cases, track_progress=True),
        "untrained": exact_match(make_model(tokenizer).eval(), tokenizer, cases[:200]),
        "bm25": keyword_match(cases),
    }
    for name, share in shares.items():
        console.print(f"{name}: {share}")
        for group in sorted(share.groups) if name == "reader" else ():
            console.print(f"  {group}: {share.groups[group]}")
    if save is not None:
        numbers = {
            name: {
                "value": share.value,
                "tried": share.tried,
                "groups": {group: part.value for group, part in sorted(share.groups.items())},
            }
            for name, share in shares.items()
        }
        save.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
