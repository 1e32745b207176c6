"""Train the shapes model: ``python -m atman_triton.demo.shapes.train``.

The loss is on the answers, plus an auxiliary head that names what stands in each patch: it shows
the tower early what an object is, and keeps what a patch says to its own place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ..training import Run, carry_on, check_folder, launch, means
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


class Trainer(Run):
    """The training of the shapes model."""

    model: LlavaForConditionalGeneration
    progress: Progress

    def __init__(
        self, recipe: Recipe, folder: Path, processor: LlavaProcessor, rank: int = 0
    ) -> None:
        torch.manual_seed(recipe.seed)
        model = make_model(processor, width=recipe.width, layers=recipe.layers, tower=recipe.tower)
        model.set_attn_implementation("eager")  # the faster backward on a CPU
        head = torch.nn.Linear(recipe.width, sum(_TAGS))
        super().__init__(recipe, folder, model, head, processor, Progress(), rank)

    def step(self, done: float) -> dict[str, float]:
        """One update. ``done``, the finished share of the run, sets the learning rate."""
        recipe, progress = self.recipe, self.progress
        answering = progress.step >= recipe.looking
        begun = progress.step - recipe.looking if answering else progress.step
        batch = draw_batch(
            self.reader,
            pictures=recipe.pictures,
            seed=recipe.seed,
            step=progress.step,
            rank=self.rank,
        )
        found = forward(self.model, self.head, batch, autocast=recipe.autocast, answering=answering)
        numbers = torch.stack([number.detach() for number in found.values()])
        numbers = self._update(found["loss"], numbers, done, (begun + 1) / recipe.warmup)
        progress.pictures += recipe.pictures * recipe.workers
        return dict(zip(found, numbers.tolist(), strict=True))


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
    history: list[dict[str, float]] = []

    def log(recent: list[dict[str, float]]) -> str:
        history.append(means(recent))
        return json.dumps(asdict(trainer.progress) | history[-1])

    carry_on(
        trainer,
        log,
        steps=steps,
        stop=stop,
        log_every=log_every,
        save_minutes=save_minutes,
        console=console,
    )
    return history


def _work(rank: int, out: Path, recipe: Recipe, steps: int, resume: bool) -> None:
    """What one worker does."""
    trainer = Trainer(recipe, out, make_processor(), rank)
    if resume:
        trainer.load()
    run(trainer, steps=steps, console=Console() if rank == 0 else None)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("checkpoints/shapes"),
    steps: Annotated[int, typer.Option(min=1, help="Updates in all, earlier sessions too.")] = 3000,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Single-threaded processes.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the folder.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A toy size for a few seconds.")] = False,
) -> None:
    """Train the shapes model; OUT/model is then what from_pretrained reads."""
    check_folder(out, resume)
    recipe = replace(SMOKE if smoke else Recipe(), seed=seed, workers=workers)
    launch(_work, workers, out, recipe, min(steps, 40) if smoke else steps, resume)


if __name__ == "__main__":
    typer.run(main)
