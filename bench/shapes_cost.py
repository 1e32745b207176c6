"""What 144 patches cost: direct and exact explanations beside a loop over whole forward passes.

The loop runs the whole model, vision tower included, once as it is and once for each patch, with
that patch suppressed: what one would write with ``manipulate`` alone. Its scores are those of
``exact`` to rounding, which is checked first. Times are taken in turns on one picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import atman_triton as atman
from atman_triton.demo.shapes import DEMO_PROMPT
from atman_triton.granularity import Images
from bench.harness import take_turns
from bench.shapes_pointing import picture_of
from bench.shapes_rows import Row, Setting, row

_ROUNDING = 1e-3  # nats, of float32
_ROUNDS = 5


def looped(model: Any, inputs: dict[str, Any], answer: list[int], positions: list[int]) -> Tensor:
    """``[positions]`` rises of the answer's loss, nats per token, by a forward pass each."""
    ids = inputs["input_ids"]
    prompt = ids.shape[1]
    whole = {**inputs, "input_ids": torch.cat([ids, torch.tensor([answer[:-1]])], 1).long()}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])

    def loss(position: int | None) -> Tensor:
        factor = torch.ones(whole["input_ids"].shape)
        if position is not None:
            factor[0, position] = 0.1
        with torch.inference_mode(), atman.manipulate(model, factor, "min_shift"):
            logits = model(**whole, use_cache=False).logits[0, prompt - 1 :]
        return -logits.float().log_softmax(-1)[range(len(answer)), answer].mean()

    base = loss(None)
    return torch.stack([loss(position) - base for position in positions])


def measure(model: Any, processor: Any) -> list[Row]:
    """Rows of one picture."""
    picture = picture_of(0)
    target = f" {picture.objects[0].name}"
    prompt = [picture.image, DEMO_PROMPT]

    def explain(method: str) -> atman.Explanation:
        explainer = atman.Explainer(model, processor, method=method, progress=False)  # pyright: ignore[reportArgumentType]
        return explainer.explain(prompt, target, explain_only=Images())

    explanations = {method: explain(method) for method in ("direct", "exact")}
    exact = explanations["exact"]
    positions = [unit.tokens[0] for unit in exact.units]
    inputs = dict(
        processor(
            images=picture.image, text=f"{processor.image_token}{DEMO_PROMPT}", return_tensors="pt"
        )
    )
    answer = processor.tokenizer(target)["input_ids"]

    def loop() -> Tensor:
        return looped(model, inputs, answer, positions)

    torch.testing.assert_close(loop(), exact.relevance, rtol=0, atol=_ROUNDING)
    calls: dict[str, Callable[[], object]] = {
        "direct": lambda: explain("direct"),
        "exact": lambda: explain("exact"),
        "loop": loop,
    }
    times = take_turns(calls, torch.device("cpu"), seconds=60, most=_ROUNDS)
    rows = []
    kind = f"{len(positions)} patches"
    for name, spent in times.items():
        points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        low, middle, high = (torch.tensor(spent).double() / 1e3).quantile(points).tolist()
        rows.append(row("cost", kind, Setting(name), "seconds", len(spent), (middle, low, high)))
        runs = 1.0 + len(positions)
        if name in explanations:
            runs = explanations[name].provenance["forwards"]
        rows.append(row("cost", kind, Setting(name), "forwards", 1, (runs, runs, runs)))
    return rows
