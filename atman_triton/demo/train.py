"""Train the demo reader: ``python -m atman_triton.demo.train``.

Documents grow longer as the answers become right. The loss is on the answers, plus a little
language modelling, plus an auxiliary head that names the fact at every value and every question:
it shows the reader early that the words of a question and of a sentence belong together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import make_document
from .model import make_model
from .packing import FACT_INDEX, LEVELS, Batch, draw_batch, pack, sample_texts
from .tokenizer import train_tokenizer
from .training import Run, carry_on, check_folder, launch, means

_PASS = 0.85  # share of right answers that opens the next level
_TAG_LAYER, _TAG_WEIGHT = 2, 0.3
_TOKENIZER_DOCUMENTS = 4000


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its length.

    Attributes:
        seed: of the weights and of every batch.
        tokens: tokens per step and worker, padding included.
        workers: processes of one thread each, with their own batches and averaged gradients.
        width: hidden size.
        layers: decoder layers.
        vocabulary: tokens of the tokenizer.
        muon_lr: peak learning rate of the hidden matrices (Muon).
        adam_lr: peak learning rate of embeddings and norms (AdamW).
        weight_decay: of the hidden matrices.
        warmup: steps of linear warm-up.
        steady: share of the run after which the learning rate falls linearly to zero.
        autocast: compute in bfloat16; weights and updates stay float32.
    """

    seed: int = 0
    tokens: int = 3072
    workers: int = 2
    width: int = 128
    layers: int = 4
    vocabulary: int = 2560
    muon_lr: float = 0.01
    adam_lr: float = 0.005
    weight_decay: float = 0.1
    warmup: int = 100
    steady: float = 0.7
    autocast: bool = True


SMOKE = Recipe(tokens=256, workers=1, width=32, layers=3, vocabulary=700, warmup=5, autocast=False)


@dataclass
class Progress:
    """Where a run stands; ``right`` is the running share of right answers at this level."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0
    right: float = 0.0


def forward(
    model: LlamaForCausalLM, batch: Batch, autocast: bool, tag_head: torch.nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch; per answer, 1 if every token was likeliest; share of facts named right."""
    named = torch.tensor(0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.model(batch.ids, use_cache=False, output_hidden_states=tag_head is not None)
        logits = model.lm_head(output.last_hidden_state.flatten(0, 1)[batch.scored])
        losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
        loss = (losses * batch.weights).sum()
        if tag_head is not None:
            hidden = output.hidden_states[_TAG_LAYER].flatten(0, 1)[batch.tagged]
            tags = tag_head(F.rms_norm(hidden, hidden.shape[-1:]))
            loss = loss + _TAG_WEIGHT * F.cross_entropy(tags.float(), batch.tags)
            named = (tags.argmax(-1) == batch.tags).float().mean()
    right = torch.ones(batch.answers + 1)
    right[batch.answer[logits.argmax(-1) != batch.labels]] = 0.0  # -1 falls on the spare last entry
    return loss, right[:-1], named


class Trainer(Run):
    """The training of the reader."""

    model: LlamaForCausalLM
    progress: Progress

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, rank: int = 0
    ) -> None:
        torch.manual_seed(recipe.seed)
        model = make_model(tokenizer, width=recipe.width, layers=recipe.layers)
        head = torch.nn.Linear(recipe.width, len(FACT_INDEX))
        super().__init__(recipe, folder, model, head, tokenizer, Progress(), rank)

    def step(self, done: float) -> dict[str, float]:
        """One update. ``done``, the finished share of the run, sets the learning rate."""
        recipe, progress = self.recipe, self.progress
        batch = draw_batch(
            self.reader,
            tokens=recipe.tokens,
            seed=recipe.seed,
            step=progress.step,
            level=progress.level,
            rank=self.rank,
        )
        loss, right, named = forward(self.model, batch, recipe.autocast, self.head)
        size = torch.tensor(float(batch.ids.numel()))
        numbers = torch.stack([loss.detach(), right.mean(), named, size])
        numbers = self._update(loss, numbers, done, (progress.step + 1) / recipe.warmup)
        mean_loss, accuracy, mean_named, mean_size = numbers.tolist()
        progress.right += 0.02 * (accuracy - progress.right)
        if progress.right > _PASS and progress.level + 1 < len(LEVELS):
            progress.level, progress.right = progress.level + 1, 0.0
        progress.tokens += round(mean_size * recipe.workers)
        return {"loss": mean_loss, "right": accuracy, "named": mean_named, "lr_scale": self.scale}

    @torch.inference_mode()
    def check(self, documents: int = 48) -> float:
        """Share of fresh full-sized documents that greedy decoding would answer exactly."""
        right = []
        for start in range(0, documents, 16):
            rng = Random(f"check-{start}")
            drawn = [make_document(rng) for _ in range(16)]
            rows = [(document, [rng.choice(document.questions)]) for document in drawn]
            batch = pack(rows, self.reader, rng)
            right.append(forward(self.model, batch, self.recipe.autocast)[1])
        return float(torch.cat(right).mean())

    def load(self) -> None:
        """Continue from the folder's checkpoint, its history cut to that.

        Raises: ValueError: if it was made with another recipe.
        """
        super().load()
        history = self.folder / "history.jsonl"
        if self.rank == 0 and history.exists():
            rows = history.read_text().splitlines(keepends=True)
            kept = [row for row in rows if json.loads(row)["step"] <= self.progress.step]
            history.write_text("".join(kept))


def run(
    trainer: Trainer,
    *,
    steps: int,
    stop: int | None = None,
    log_every: int = 50,
    check_every: int = 500,
    save_minutes: float = 3.0,
    console: Console | None = None,
) -> None:
    """Train to ``steps``, all sessions counted, or to ``stop`` on the way there, then save.

    Every ``log_every`` steps a row of means goes to ``history.jsonl`` in the folder and to the
    console, if there is one.
    """
    trainer.folder.mkdir(parents=True, exist_ok=True)
    carry_on(
        trainer,
        lambda recent: _log(trainer, recent, check=trainer.progress.step % check_every == 0),
        steps=steps,
        stop=stop,
        log_every=log_every,
        save_minutes=save_minutes,
        console=console,
    )


def _log(trainer: Trainer, recent: list[dict[str, float]], *, check: bool) -> str:
    """Append one row to the history and return it as text."""
    row: dict[str, Any] = dict(means(recent))
    row |= {k: round(v, 3) for k, v in asdict(trainer.progress).items() if k != "right"}
    if check:
        row["check"] = round(trainer.check(), 4)
    with (trainer.folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return json.dumps(row)


def _work(rank: int, out: Path, recipe: Recipe, steps: int, resume: bool) -> None:
    """What one worker does."""
    texts = sample_texts(recipe.seed, _TOKENIZER_DOCUMENTS)
    trainer = Trainer(recipe, out, train_tokenizer(texts, recipe.vocabulary), rank)
    if resume:
        trainer.load()
    run(trainer, steps=steps, console=Console() if rank == 0 else None)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("checkpoints/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Updates in all, earlier sessions too.")] = 3200,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Single-threaded processes.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy size for a few seconds.")] = False,
) -> None:
    """Train the demo reader; OUT/model is then what from_pretrained reads."""
    check_folder(out, resume)
    recipe = replace(SMOKE if smoke else Recipe(), seed=seed, workers=workers)
    launch(_work, workers, out, recipe, min(steps, 40) if smoke else steps, resume)


if __name__ == "__main__":
    typer.run(main)
