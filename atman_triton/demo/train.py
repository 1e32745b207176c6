"""Train the demo reader: ``python -m atman_triton.demo.train --out checkpoints/demo``.

Every step reads its own seeded batch of packed rows: a document, then several of its questions with their answers. The
loss is on the answers, plus a little language modelling. Documents grow longer as the answers become right.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .documents import (
    MAX_SENTENCES,
    MIN_SENTENCES,
    Document,
    Question,
    make_document,
    unfinished_statement,
)
from .facts import FACTS
from .model import END_OF_TEXT, make_model, train_tokenizer

_LENGTHS = (3, 5, 8, 12)
_PASS = 0.85
# Share of questions put as an unfinished statement: they teach to match words first, and then their synonyms.
_UNFINISHED = (0.5, 0.3, 0.2, 0.1)
_LM_SHARE, _LM_WEIGHT = 0.1, 0.1
# A linear head behind this layer names the fact at every value and every question, in training only.
_TAG_LAYER, _TAG_WEIGHT = 2, 0.3
_TAGS = {
    (kind, fact.name): index
    for index, (kind, fact) in enumerate(
        (kind, fact) for kind, types in FACTS.items() for group in types.values() for fact in group
    )
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its length.

    Attributes:
        seed: of the weights and of every batch.
        tokens: tokens per batch and worker, padding included.
        workers: processes of one thread each that share every step; part of the recipe, as each draws its own batch.
        muon_lr: peak learning rate of the hidden matrices.
        adam_lr: peak learning rate of embeddings and norms.
        warmup: steps of linear warm-up.
        steady: share of the run before the learning rate falls linearly to zero.
        autocast: compute in bfloat16 where the processor is fast at it.
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
    steady: float = 0.5
    autocast: bool = True


@dataclass
class Progress:
    """Where a run stands; saved with its checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0
    right: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Packed rows. ``scored`` are flat positions whose next token is trained on, ``weights`` its loss weights."""

    ids: Tensor  # [B, T]
    scored: Tensor  # [N]
    labels: Tensor  # [N]
    weights: Tensor  # [N]
    answer: Tensor  # [N], index of the answer that the label is part of, -1 outside answers
    answers: int
    tagged: Tensor  # [M], flat positions of value tokens in documents, and those that predict an answer token
    tags: Tensor  # [M], index of the fact that each of them is about


def sample_texts(seed: int, documents: int) -> list[str]:
    """Texts of the shape that the model reads, for the tokenizer."""
    texts = []
    for number in range(documents):
        document = make_document(f"tokenizer-{seed}-{number}")
        texts.append(
            document.text + "".join(f" Q: {q.text} A:{q.answer}" for q in document.questions)
        )
    return texts


def pack(
    rows: list[tuple[Document, list[Question]]],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> Batch:
    """Turn documents with their questions into one padded batch."""
    pieces = []
    for document, questions in rows:
        pieces.append(document.text)
        for question in questions:
            pieces.append(f" Q: {question.text} A:")
            pieces.append(f"{question.answer}{END_OF_TEXT}")
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(pieces))
    eot, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids, scored, labels, weights, answer = [], [], [], [], []
    tagged: list[tuple[int, int]] = []
    tags: list[int] = []
    answers = 0
    for document, questions in rows:
        read = next(encoded)
        row = list(read.ids)
        for stated in document.facts:
            start = document.spans[stated.sentence][0]
            start += document.sentences[stated.sentence].index(stated.value)
            first, last = read.char_to_token(start), read.char_to_token(start + len(stated.value) - 1)
            tagged += [(len(ids), position) for position in range(first, last + 1)]
            tags += [_TAGS[document.kind, stated.name]] * (last + 1 - first)
        spans = []
        for question in questions:
            row += next(encoded).ids
            start = len(row)
            row += next(encoded).ids
            spans.append((start, len(row)))
            tagged += [(len(ids), position) for position in range(start - 1, len(row) - 1)]
            tags += [_TAGS[document.kind, question.fact]] * (len(row) - start)
        if row[-1] != eot:
            raise RuntimeError("the tokenizer does not keep the end-of-text token whole.")
        ids.append(row)
        marked = [-1] * len(row)
        for start, stop in spans:
            marked[start:stop] = [answers] * (stop - start)
            answers += 1
        for position in range(1, len(row)):
            part = marked[position]
            if part >= 0 or rng.random() < _LM_SHARE:
                scored.append((len(ids) - 1, position - 1))
                labels.append(row[position])
                answer.append(part)
    width = max(map(len, ids))
    inside = sum(part >= 0 for part in answer)
    outside = max(len(answer) - inside, 1)
    weights = [1 / inside if part >= 0 else _LM_WEIGHT / outside for part in answer]
    return Batch(
        ids=torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        scored=torch.tensor([row * width + column for row, column in scored]),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights),
        answer=torch.tensor(answer),
        answers=answers,
        tagged=torch.tensor([row * width + column for row, column in tagged]),
        tags=torch.tensor(tags),
    )


def draw_batch(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int, level: int, rank: int = 0
) -> Batch:
    """The batch of one step and worker, which depends on nothing but the arguments."""
    rng = random.Random(f"train-{recipe.seed}-{step}")
    longest = _LENGTHS[level]
    # A quarter of the batches is full-sized from the start; the last level is mostly full-sized.
    if rng.random() < (0.75 if longest == MAX_SENTENCES else 0.05):
        low, high = MIN_SENTENCES, MAX_SENTENCES
    else:
        low, high = 2, longest
    sentences = rng.randint(low, high)
    asked = rng.randint(min(3, sentences), min(8, sentences))
    rng = random.Random(f"train-{recipe.seed}-{step}-{rank}")
    estimate = 13 * sentences + 18 * asked
    rows = []
    for _ in range(max(recipe.tokens // estimate, 1)):
        document = make_document(rng, sentences=sentences)
        questions = rng.sample(document.questions, min(asked, len(document.questions)))
        for index, question in enumerate(questions):
            if rng.random() < _UNFINISHED[level]:
                questions[index] = unfinished_statement(rng, document, question)
        rows.append((document, questions))
    return pack(rows, tokenizer, rng)


def forward(
    model: LlamaForCausalLM, batch: Batch, autocast: bool, tag_head: torch.nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a batch; per answer, whether each of its tokens was the most likely one; share of facts named right."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.model(batch.ids, use_cache=False, output_hidden_states=tag_head is not None)
        logits = model.lm_head(output.last_hidden_state.flatten(0, 1)[batch.scored])
        loss = (F.cross_entropy(logits.float(), batch.labels, reduction="none") * batch.weights).sum()
        named = torch.tensor(0.0)
        if tag_head is not None:
            hidden = output.hidden_states[_TAG_LAYER].flatten(0, 1)[batch.tagged]
            tags = tag_head(F.rms_norm(hidden, hidden.shape[-1:]))
            loss = loss + _TAG_WEIGHT * F.cross_entropy(tags.float(), batch.tags)
            named = (tags.argmax(-1) == batch.tags).float().mean()
    right = torch.ones(batch.answers + 1)
    wrong = batch.answer[logits.argmax(-1) != batch.labels]
    right[wrong] = 0.0  # -1 falls on the spare last entry
    return loss, right[:-1], named


class Trainer:
    """A run that can stop and continue from its folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerFast, rank: int = 0
    ) -> None:
        self.rank = rank
        torch.manual_seed(recipe.seed)
        self.recipe, self.folder, self.tokenizer = recipe, folder, tokenizer
        self.model = make_model(tokenizer, width=recipe.width, layers=recipe.layers)
        self.tag_head = torch.nn.Linear(recipe.width, len(_TAGS))
        matrices, others = [], list(self.tag_head.parameters())
        for name, parameter in self.model.named_parameters():
            hidden = parameter.ndim == 2 and "embed_tokens" not in name
            (matrices if hidden else others).append(parameter)
        self.optimizers = (
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.parameters = [*self.model.parameters(), *self.tag_head.parameters()]
        self.progress = Progress()

    def step(self, done: float) -> dict[str, Any]:
        """One update; ``done`` is the finished share of the run and sets the learning rate."""
        recipe, progress = self.recipe, self.progress
        fall = min(1.0, (1.0 - done) / (1.0 - recipe.steady))
        scale = min(1.0, (progress.step + 1) / recipe.warmup) * max(fall, 0.0)
        peaks = (recipe.muon_lr, recipe.adam_lr)
        for optimizer, peak in zip(self.optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        batch = draw_batch(self.tokenizer, recipe, progress.step, progress.level, self.rank)
        loss, right, named = forward(self.model, batch, recipe.autocast, self.tag_head)
        loss.backward()
        numbers = torch.stack(
            [loss.detach(), right.mean(), torch.tensor(float(batch.ids.numel())), named]
        )
        if recipe.workers > 1:
            numbers = self._share(numbers)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean_loss, accuracy, tokens, mean_named = numbers.tolist()
        progress.right += 0.02 * (accuracy - progress.right)
        if progress.right > _PASS and progress.level + 1 < len(_LENGTHS):
            progress.level, progress.right = progress.level + 1, 0.0
        progress.step += 1
        progress.tokens += round(tokens * recipe.workers)
        return {"loss": mean_loss, "right": accuracy, "named": mean_named, "lr_scale": scale}

    def _share(self, numbers: Tensor) -> Tensor:
        """Average the gradients and ``numbers`` over the workers."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([numbers, *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        flat /= self.recipe.workers
        start = numbers.numel()
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return flat[: numbers.numel()]

    def save(self) -> None:
        """Write the checkpoint, and the model and tokenizer in the form ``from_pretrained`` reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "tag_head": self.tag_head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = self.folder / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")
        self.model.save_pretrained(self.folder / "model")
        self.tokenizer.save_pretrained(self.folder / "model")

    def load(self) -> None:
        """Continue from the folder's checkpoint. Raises: ValueError: if it was made with another recipe."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.tag_head.load_state_dict(state["tag_head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


@torch.inference_mode()
def quick_check(trainer: Trainer, documents: int = 48) -> float:
    """Share of answers on fresh full-sized documents that greedy decoding gets exactly right (teacher-forced test)."""
    right = []
    for start in range(0, documents, 16):
        rng = random.Random(f"check-{start}")
        rows = [(make_document(rng), []) for _ in range(16)]
        rows = [(document, [rng.choice(document.questions)]) for document, _ in rows]
        batch = pack(rows, trainer.tokenizer, rng)
        right.append(forward(trainer.model, batch, trainer.recipe.autocast)[1])
    return float(torch.cat(right).mean())


def run(
    trainer: Trainer,
    *,
    steps: int | None,
    minutes: float | None,
    log_every: int = 50,
    check_every: int = 500,
    save_minutes: float = 3.0,
) -> None:
    """Train until ``steps`` or ``minutes`` (all sessions counted) are reached, then save."""
    progress, chief = trainer.progress, trainer.rank == 0
    history = trainer.folder / "history.jsonl"
    trainer.folder.mkdir(parents=True, exist_ok=True)
    began, before = time.perf_counter(), progress.seconds
    saved = began
    recent: list[dict[str, Any]] = []
    done = _share_done(trainer, steps, minutes)
    while done < 1.0:
        recent.append(trainer.step(done))
        now = time.perf_counter()
        progress.seconds = before + now - began
        if chief and progress.step % log_every == 0:
            row: dict[str, Any] = {
                key: round(sum(r[key] for r in recent) / len(recent), 4) for key in recent[0]
            }
            row |= {key: round(v, 3) for key, v in asdict(progress).items() if key != "right"}
            if progress.step % check_every == 0:
                row["check"] = quick_check(trainer)
            recent.clear()
            with history.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if chief and now - saved > save_minutes * 60:
            trainer.save()
            saved = time.perf_counter()
        if progress.step % 10 == 0 or steps is not None:
            done = _share_done(trainer, steps, minutes)
    if chief:
        trainer.save()


def _share_done(trainer: Trainer, steps: int | None, minutes: float | None) -> float:
    """Finished share of the run, the same for every worker."""
    progress = trainer.progress
    done = progress.step / steps if steps is not None else 0.0
    if minutes is not None:
        done = max(done, progress.seconds / 60 / minutes)
    if trainer.recipe.workers > 1 and minutes is not None:
        shared = torch.tensor(done, dtype=torch.float64)
        dist.broadcast(shared, 0)
        done = shared.item()
    return done


def _work(
    rank: int, recipe: Recipe, out: Path, steps: int | None, minutes: float | None, resume: bool
) -> None:
    torch.set_num_threads(1)
    if recipe.workers > 1:
        rendezvous = f"file://{(out / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=recipe.workers)
    tokenizer = train_tokenizer(sample_texts(recipe.seed, 4000), recipe.vocabulary)
    trainer = Trainer(recipe, out, tokenizer, rank)
    if resume:
        trainer.load()
    run(trainer, steps=steps, minutes=minutes)
    if recipe.workers > 1:
        dist.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option()] = Path("checkpoints/demo"),
    steps: Annotated[int | None, typer.Option()] = None,
    minutes: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    workers: Annotated[int, typer.Option()] = 2,
    resume: Annotated[bool, typer.Option()] = False,
    muon_lr: float = 0.01,
    adam_lr: float = 0.005,
    weight_decay: float = 0.1,
    tokens: int = 3072,
    steady: float = 0.5,
) -> None:
    recipe = Recipe(
        seed=seed, weight_decay=weight_decay, workers=workers, muon_lr=muon_lr, adam_lr=adam_lr, tokens=tokens, steady=steady
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "rendezvous").unlink(missing_ok=True)
    if workers > 1:
        arguments = (recipe, out, steps, minutes, resume)
        torch.multiprocessing.spawn(_work, arguments, workers)
    else:
        _work(0, recipe, out, steps, minutes, resume)


if __name__ == "__main__":
    typer.run(main)
