"""Train the demo reader: ``python -m atman_triton.demo.train``.

Documents grow longer as the answers become right. The loss is on the answers, plus a little
language modelling, plus an auxiliary head that names the fact at every value and every question:
it shows the reader early that the words of a question and of a sentence belong together.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import make_document
from .model import make_model
from .packing import FACT_INDEX, LEVELS, Batch, draw_batch, pack, sample_texts
from .tokenizer import train_tokenizer

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


class Trainer:
    """A run that can stop, and continue from its folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, rank: int = 0
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.tokenizer, self.rank = recipe, folder, tokenizer, rank
        self.model = make_model(tokenizer, width=recipe.width, layers=recipe.layers)
        self.tag_head = torch.nn.Linear(recipe.width, len(FACT_INDEX))
        matrices, others = [], list(self.tag_head.parameters())
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and "embed_tokens" not in name
            (matrices if hidden else others).append(parameter)
        self.parameters = [*self.model.parameters(), *self.tag_head.parameters()]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.progress = Progress()

    def step(self, done: float) -> dict[str, float]:
        """One update. ``done``, the finished share of the run, sets the learning rate."""
        recipe, progress = self.recipe, self.progress
        fall = min(1.0, (1.0 - done) / (1.0 - recipe.steady))
        scale = min(1.0, (progress.step + 1) / recipe.warmup) * max(fall, 0.0)
        for optimizer, peak in zip(self.optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        batch = draw_batch(
            self.tokenizer,
            tokens=recipe.tokens,
            seed=recipe.seed,
            step=progress.step,
            level=progress.level,
            rank=self.rank,
        )
        loss, right, named = forward(self.model, batch, recipe.autocast, self.tag_head)
        loss.backward()
        size = torch.tensor(float(batch.ids.numel()))
        numbers = torch.stack([loss.detach(), right.mean(), named, size])
        if recipe.workers > 1:
            numbers = self._average(numbers)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean_loss, accuracy, mean_named, mean_size = numbers.tolist()
        progress.right += 0.02 * (accuracy - progress.right)
        if progress.right > _PASS and progress.level + 1 < len(LEVELS):
            progress.level, progress.right = progress.level + 1, 0.0
        progress.step += 1
        progress.tokens += round(mean_size * recipe.workers)
        return {"loss": mean_loss, "right": accuracy, "named": mean_named, "lr_scale": scale}

    def _average(self, numbers: Tensor) -> Tensor:
        """Average the gradients, in place, and ``numbers`` over the workers."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([numbers, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        flat /= self.recipe.workers
        start = numbers.numel()
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return flat[: numbers.numel()]

    @torch.inference_mode()
    def check(self, documents: int = 48) -> float:
        """Share of fresh full-sized documents that greedy decoding would answer exactly."""
        right = []
        for start in range(0, documents, 16):
            rng = Random(f"check-{start}")
            drawn = [make_document(rng) for _ in range(16)]
            rows = [(document, [rng.choice(document.questions)]) for document in drawn]
            batch = pack(rows, self.tokenizer, rng)
            right.append(forward(self.model, batch, self.recipe.autocast)[1])
        return float(torch.cat(right).mean())

    def save(self) -> None:
        """Write the checkpoint, and model and tokenizer in the form ``from_pretrained`` reads."""
        state = {
            "recipe": asdict(self.recipe),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "tag_head": self.tag_head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")
        self.model.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")
        facts = {"recipe": state["recipe"], "progress": state["progress"]}
        (self.folder / "model" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    def load(self) -> None:
        """Continue from the folder's checkpoint.

        Raises: ValueError: if it was made with another recipe.
        """
        path = self.folder / "checkpoint.pt"
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} was made with another recipe: {state['recipe']}.")
        self.model.load_state_dict(state["model"])
        self.tag_head.load_state_dict(state["tag_head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
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
    progress, chief = trainer.progress, trainer.rank == 0
    trainer.folder.mkdir(parents=True, exist_ok=True)
    began = saved = time.perf_counter()
    before = progress.seconds
    recent: list[dict[str, float]] = []
    with Bar(console=console, disable=console is None) as bar:
        task = bar.add_task("Training", total=steps, completed=progress.step)
        while progress.step < (steps if stop is None else stop):
            recent.append(trainer.step(progress.step / steps))
            now = time.perf_counter()
            progress.seconds = before + now - began
            bar.update(task, completed=progress.step)
            if chief and progress.step % log_every == 0:
                row = _log(trainer, recent, check=progress.step % check_every == 0)
                if console is not None:
                    bar.console.print(row, soft_wrap=True)
                recent.clear()
            if chief and now - saved > save_minutes * 60:
                trainer.save()
                saved = time.perf_counter()
    if chief:
        trainer.save()


def _log(trainer: Trainer, recent: list[dict[str, float]], *, check: bool) -> str:
    """Append one row to the history and return it as text."""
    row: dict[str, Any] = {
        key: round(sum(r[key] for r in recent) / len(recent), 4) for key in recent[0]
    }
    row |= {k: round(v, 3) for k, v in asdict(trainer.progress).items() if k != "right"}
    if check:
        row["check"] = round(trainer.check(), 4)
    with (trainer.folder / "history.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return json.dumps(row)


def _work(rank: int, recipe: Recipe, out: Path, steps: int, resume: bool) -> None:
    """One worker process."""
    torch.set_num_threads(1)
    if recipe.workers > 1:
        meeting = f"file://{(out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=recipe.workers)
    texts = sample_texts(recipe.seed, _TOKENIZER_DOCUMENTS)
    trainer = Trainer(recipe, out, train_tokenizer(texts, recipe.vocabulary), rank)
    if resume:
        trainer.load()
    run(trainer, steps=steps, console=Console() if rank == 0 else None)
    if recipe.workers > 1:
        dist.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("checkpoints/demo"),
    steps: Annotated[int, typer.Option(min=1, help="Updates in all, earlier sessions too.")] = 3200,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Single-threaded processes.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy size for a few seconds.")] = False,
) -> None:
    """Train the demo reader; OUT/model is then what from_pretrained reads."""
    console = Console(stderr=True)
    checkpoint = out / "checkpoint.pt"
    if resume != checkpoint.exists():
        way = (
            f"There is no {checkpoint} to resume." if resume else f"{checkpoint} exists: --resume?"
        )
        console.print(f"[red]{way}[/red]", soft_wrap=True)
        raise typer.Exit(2)
    recipe = (
        replace(SMOKE, seed=seed, workers=workers) if smoke else Recipe(seed=seed, workers=workers)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    # glibc would otherwise map and fault in every activation anew; workers read this as they start.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**32))
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    arguments = (recipe, out, min(steps, 40) if smoke else steps, resume)
    if recipe.workers > 1:
        spawn(_work, arguments, recipe.workers)
    else:
        _work(0, *arguments)


if __name__ == "__main__":
    typer.run(main)
