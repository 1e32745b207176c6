"""Train the shapes model: ``python -m atman_triton.demo.shapes.train``.

The loss is on the answers, plus an auxiliary head that names what stands in each patch: it shows
the tower early what an object is, and keeps what a patch says to its own place.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from .model import GRID, make_model, make_processor
from .packing import Batch, draw_batch
from .pictures import COLOURS, KINDS

_TAG_WEIGHT, _GROUND_WEIGHT = 0.5, 0.2
_TAGS = (len(COLOURS) + 1, len(KINDS) + 1)  # the last of each is the ground


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its length.

    Attributes:
        seed: of the weights and of every batch.
        pictures: pictures per step and worker.
        workers: processes of one thread each, with their own batches and averaged gradients.
        width: hidden size of the decoder.
        layers: decoder layers.
        tower: layers of the vision tower.
        muon_lr: peak learning rate of the hidden matrices (Muon).
        adam_lr: peak learning rate of everything else (AdamW).
        weight_decay: of the hidden matrices.
        looking: steps in the beginning that train the tower alone, which are cheap.
        warmup: steps of linear warm-up, of the tower and of the whole.
        steady: share of the run after which the learning rate falls linearly to zero.
        autocast: compute in bfloat16; weights and updates stay float32.
    """

    seed: int = 0
    pictures: int = 16
    workers: int = 2
    width: int = 128
    layers: int = 4
    tower: int = 2
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.1
    looking: int = 1000
    warmup: int = 50
    steady: float = 0.6
    autocast: bool = True


SMOKE = Recipe(
    pictures=8, workers=1, width=32, layers=2, tower=1, looking=10, warmup=5, autocast=False
)


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    pictures: int = 0
    seconds: float = 0.0


def forward(
    model: LlavaForConditionalGeneration,
    head: torch.nn.Module,
    batch: Batch,
    *,
    autocast: bool,
    answering: bool = True,
) -> dict[str, Tensor]:
    """Loss of a batch, and shares of what was named right.

    Args:
        model: the model.
        head: gives the scores of colours and kinds from an image token.
        batch: what to look at and to answer.
        autocast: compute in bfloat16.
        answering: run the decoder too; else only what stands in the patches is named.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        seen: Any = model.model.get_image_features(batch.pixels)
        image = torch.stack(seen.pooler_output)
        tags = head(image).float().split(_TAGS, -1)
    numbers = {"loss": torch.tensor(0.0)}
    for name, scores, labels in zip(
        ("patch_colours", "patch_kinds"), tags, (batch.colours, batch.kinds), strict=True
    ):
        ground = scores.shape[-1] - 1
        weights = torch.ones(ground + 1)
        weights[ground] = _GROUND_WEIGHT
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), weights)
        numbers["loss"] = numbers["loss"] + _TAG_WEIGHT * loss
        on_object = (labels >= 0) & (labels < ground)
        numbers[name] = (scores.argmax(-1) == labels)[on_object].float().mean()
    if not answering:
        return numbers
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        text = model.get_input_embeddings()(batch.ids)
        output = model.model.language_model(
            inputs_embeds=torch.cat([image, text.to(image.dtype)], 1),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        )
        hidden = output.last_hidden_state[:, GRID**2 :].flatten(0, 1)[batch.scored]
        logits = model.lm_head(hidden).float()
    numbers["loss"] = numbers["loss"] + F.cross_entropy(logits, batch.labels)
    right = torch.ones(len(batch.yes_no))
    right[batch.answer[logits.argmax(-1) != batch.labels]] = 0.0
    numbers["yes_no"], numbers["names"] = right[batch.yes_no].mean(), right[~batch.yes_no].mean()
    return numbers


class Trainer:
    """A run that can stop, and continue from its folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, processor: LlavaProcessor, rank: int = 0
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.processor, self.rank = recipe, folder, processor, rank
        self.model = make_model(
            processor, width=recipe.width, layers=recipe.layers, tower=recipe.tower
        )
        self.model.set_attn_implementation("eager")  # the faster backward on a CPU
        self.head = torch.nn.Linear(recipe.width, sum(_TAGS))
        matrices, others = [], list(self.head.parameters())
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name
            (matrices if hidden else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.progress = Progress()

    def step(self, done: float) -> dict[str, float]:
        """One update. ``done``, the finished share of the run, sets the learning rate."""
        recipe, progress = self.recipe, self.progress
        fall = min(1.0, (1.0 - done) / (1.0 - recipe.steady))
        begun = progress.step - recipe.looking if progress.step >= recipe.looking else progress.step
        scale = min(1.0, (begun + 1) / recipe.warmup) * max(fall, 0.0)
        for optimizer, peak in zip(self.optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        batch = draw_batch(
            self.processor,
            pictures=recipe.pictures,
            seed=recipe.seed,
            step=progress.step,
            rank=self.rank,
        )
        found = forward(
            self.model,
            self.head,
            batch,
            autocast=recipe.autocast,
            answering=progress.step >= recipe.looking,
        )
        found["loss"].backward()
        numbers = torch.stack([number.detach() for number in found.values()])
        if recipe.workers > 1:
            numbers = self._average(numbers)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.pictures += recipe.pictures * recipe.workers
        return dict(zip(found, numbers.tolist(), strict=True))

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
        """Write the checkpoint, and model and processor in the form ``from_pretrained`` reads."""
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
        self.processor.save_pretrained(self.folder / "model")
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
        self.progress = Progress(**state["progress"])


def run(
    trainer: Trainer,
    *,
    steps: int,
    stop: int | None = None,
    log_every: int = 50,
    save_minutes: float = 3.0,
    console: Console | None = None,
) -> list[dict[str, float]]:
    """Train to ``steps``, all sessions counted, or to ``stop`` on the way there, then save.

    Returns: means over ``log_every`` steps each, which the console shows too, if there is one.
    """
    progress, chief = trainer.progress, trainer.rank == 0
    began = saved = time.perf_counter()
    before = progress.seconds
    recent: list[dict[str, float]] = []
    history: list[dict[str, float]] = []
    with Bar(console=console, disable=console is None) as bar:
        task = bar.add_task("Training", total=steps, completed=progress.step)
        while progress.step < (steps if stop is None else stop):
            recent.append(trainer.step(progress.step / steps))
            now = time.perf_counter()
            progress.seconds = before + now - began
            bar.update(task, completed=progress.step)
            if progress.step % log_every == 0:
                means = {
                    k: round(sum(r.get(k, 0.0) for r in recent) / len(recent), 4)
                    for k in recent[-1]
                }
                history.append(means)
                recent.clear()
                if console is not None:
                    bar.console.print(json.dumps(asdict(progress) | means), soft_wrap=True)
            if chief and now - saved > save_minutes * 60:
                trainer.save()
                saved = time.perf_counter()
    if chief:
        trainer.save()
    return history


def _work(rank: int, recipe: Recipe, out: Path, steps: int, resume: bool) -> None:
    """One worker process."""
    torch.set_num_threads(1)
    if recipe.workers > 1:
        meeting = f"file://{(out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=recipe.workers)
    trainer = Trainer(recipe, out, make_processor(), rank)
    if resume:
        trainer.load()
    run(trainer, steps=steps, console=Console() if rank == 0 else None)
    if recipe.workers > 1:
        dist.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("checkpoints/shapes"),
    steps: Annotated[int, typer.Option(min=1, help="Updates in all, earlier sessions too.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Single-threaded processes.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy size for a few seconds.")] = False,
) -> None:
    """Train the shapes model; OUT/model is then what from_pretrained reads."""
    console = Console(stderr=True)
    checkpoint = out / "checkpoint.pt"
    if resume != checkpoint.exists():
        way = (
            f"There is no {checkpoint} to resume." if resume else f"{checkpoint} exists: --resume?"
        )
        console.print(f"[red]{way}[/red]", soft_wrap=True)
        raise typer.Exit(2)
    recipe = replace(SMOKE if smoke else Recipe(), seed=seed, workers=workers)
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
