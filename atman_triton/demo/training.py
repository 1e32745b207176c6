"""What the training of both demo models shares: updates, workers, checkpoints, the command."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn


class Run(ABC):
    """A run that can stop, and continue from its folder.

    Args:
        recipe: A frozen dataclass with ``seed``, ``workers``, ``muon_lr``, ``adam_lr``,
            ``weight_decay`` and ``steady``.
        folder: Of the run.
        model: What is trained, in the form that ``save_pretrained`` writes.
        head: An auxiliary head, trained along and not part of the model.
        reader: The tokenizer or processor that is saved with the model.
        progress: A dataclass with ``step`` and ``seconds``, at its start.
        rank: Which of the workers this is.
    """

    def __init__(
        self,
        recipe: Any,
        folder: Path,
        model: Any,
        head: nn.Module,
        reader: Any,
        progress: Any,
        rank: int = 0,
    ) -> None:
        self.recipe, self.folder, self.rank = recipe, folder, rank
        self.model, self.head, self.reader, self.progress = model, head, reader, progress
        matrices, others = [], list(head.parameters())
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name
            (matrices if hidden else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )

    @abstractmethod
    def step(self, done: float) -> dict[str, float]:
        """One update. ``done``, the finished share of the run, sets the learning rate."""

    def _update(self, loss: Tensor, numbers: Tensor, done: float, warm: float) -> Tensor:
        """Go down a loss's gradient; ``numbers``, averaged over the workers.

        Args:
            loss: Of this worker's batch.
            numbers: What is told of it.
            done: The finished share of the run, after ``steady`` of which the rate falls.
            warm: Share of the learning rate, of a linear warm-up.
        """
        recipe = self.recipe
        fall = min(1.0, (1.0 - done) / (1.0 - recipe.steady))
        self.scale = min(1.0, warm) * max(fall, 0.0)
        for optimizer, peak in zip(self.optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.scale
        loss.backward()
        if recipe.workers > 1:
            numbers = self._average(numbers)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return numbers

    def _average(self, numbers: Tensor) -> Tensor:
        """Average the gradients, in place, and ``numbers`` over the workers."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([numbers, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        flat /= self.recipe.workers
        sizes = [len(numbers), *(gradient.numel() for gradient in gradients)]
        mean, *pieces = flat.split(sizes)
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        return mean

    def save(self) -> None:
        """Write the checkpoint, and model and reader in the form ``from_pretrained`` reads."""
        state = {
            "recipe": asdict(self.recipe),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")
        self.model.save_pretrained(self.folder / "model")
        self.reader.save_pretrained(self.folder / "model")
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
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = type(self.progress)(**state["progress"])


def carry_on(
    trainer: Run,
    log: Callable[[list[dict[str, float]]], str],
    *,
    steps: int,
    stop: int | None,
    log_every: int,
    save_minutes: float,
    console: Console | None,
) -> None:
    """Train to ``steps``, all sessions counted, or to ``stop`` on the way there, then save.

    Args:
        log: Takes what the last ``log_every`` steps told, and gives a line for the console.
    """
    progress, chief = trainer.progress, trainer.rank == 0
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
                line = log(recent)
                if console is not None:
                    bar.console.print(line, soft_wrap=True)
                recent.clear()
            if chief and now - saved > save_minutes * 60:
                trainer.save()
                saved = time.perf_counter()
    if chief:
        trainer.save()


def means(recent: list[dict[str, float]]) -> dict[str, float]:
    """Of what the last of several steps told."""
    return {k: round(sum(r.get(k, 0.0) for r in recent) / len(recent), 4) for k in recent[-1]}


def check_folder(out: Path, resume: bool) -> None:
    """Exit with 2 unless there is a run to resume, or none to write over."""
    checkpoint = out / "checkpoint.pt"
    if resume == checkpoint.exists():
        return
    way = f"There is no {checkpoint} to resume." if resume else f"{checkpoint} exists: --resume?"
    Console(stderr=True).print(f"[red]{way}[/red]", soft_wrap=True)
    raise typer.Exit(2)


def launch(work: Callable[..., None], workers: int, out: Path, *arguments: Any) -> None:
    """Call ``work(rank, out, *arguments)`` in each of so many processes, which average gradients.

    Args:
        work: At the top of a module, so that a new process finds it.
        workers: With 1, it runs here.
        out: Folder of the run.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    # glibc would otherwise map and fault in every activation anew; workers read this as they start.
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        os.environ.setdefault(name, str(2**32))
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    if workers > 1:
        spawn(_together, (work, workers, out, *arguments), workers)
    else:
        torch.set_num_threads(1)
        work(0, out, *arguments)


def _together(
    rank: int, work: Callable[..., None], workers: int, out: Path, *arguments: Any
) -> None:
    """One of several worker processes."""
    torch.set_num_threads(1)
    meeting = f"file://{(out / 'rendezvous').resolve()}"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=workers)
    work(rank, out, *arguments)
    dist.destroy_process_group()
