"""Explanations of pictures against a plain loop: the whole model once per unit, tower and all.

Legend: S tokens of the prompt and the target without its last one, T target tokens, U units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from toy_images import seeing
from toy_models import _perturbation
from toy_processors import PROCESSORS

from atman_triton import Explainer

ONE_STEP = torch.finfo(torch.float32).eps  # results are float32, all else float64
TEXT = "This is a picture of a"
TARGET = " red circle"
FACTOR = 0.1


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without flat regions."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


WIDE, TALL, SMALL = noise(60, 40), noise(30, 50, 1), noise(26, 20, 2)
seeing = cache(seeing)
# Mllama reads pictures beside the prompt.
FAMILIES = [name for name in PROCESSORS if name != "mllama"]


def mark(name: str, processor: Any) -> str:
    """What stands for a picture in a text of the family, as its documentation writes it."""
    if name.startswith("qwen"):
        return "<|vision_start|><|image_pad|><|vision_end|>"
    return processor.image_token


def encoded(name: str, processor: Any, text: str, images: list[Image.Image]) -> dict[str, Any]:
    """What the processor itself makes of a prompt."""
    found = dict(processor(text=[text], images=[images], return_tensors="pt"))
    found.pop("labels", None)
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}


def behind(name: str, inputs: dict[str, Any], target: list[int]) -> dict[str, Any]:
    """The same with a target behind it, of which the last token is never read."""
    more = torch.tensor([target[:-1]], dtype=torch.long)
    own = dict(inputs)
    own["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    for key, value in (
        ("attention_mask", 1),
        ("mm_token_type_ids", 0),
        ("token_type_ids", int(name == "paligemma")),
    ):
        if key in inputs:
            own[key] = torch.cat([inputs[key], torch.full_like(more, value)], 1)
    return own


@torch.no_grad()
def logprobs(model: Any, inputs: dict[str, Any], target: list[int] | None, matrix: Any) -> Any:
    """``[T]``, of one eager forward of the whole model with scores multiplied by a matrix.

    Without a target, those of all tokens in all places.
    """
    _perturbation.update(matrix=matrix, mode="min_shift", layers=None, heads=None)
    logits = model(**inputs, use_cache=False).logits[0]
    if target is None:
        return logits.log_softmax(-1)
    logits = logits[-len(target) :]
    return logits.log_softmax(-1)[range(len(target)), target].float()


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """The decoder alone attends with the matrix; the vision tower is what it is."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "plain_eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def plain_loop(model, inputs, target, units, first_row=0):
    """``[1 + U, T]``, the base run first; queries before ``first_row`` feel no factor."""
    length = inputs["input_ids"].shape[1]
    rows = []
    with plain_attention(model):
        for tokens in [(), *units]:
            matrix = torch.ones(length, length)
            matrix[first_row:, list(tokens)] = FACTOR
            rows.append(logprobs(model, inputs, target, matrix))
    return torch.stack(rows)


def check(name, explanation, inputs):
    """The explanation is what the plain loop gives."""
    model, _ = seeing(name)
    target = [each.token_id for each in explanation.targets]
    prompt = inputs["input_ids"].shape[1]
    units = [unit.tokens for unit in explanation.units]
    first = prompt - 1 if explanation.method == "direct" else 0
    expected = plain_loop(model, behind(name, inputs, target), target, units, first)
    found = torch.cat([explanation.base_logprobs[None], explanation.suppressed_logprobs.T])
    seen = ~found.isnan()
    assert bool(seen[:, -1].all())
    torch.testing.assert_close(found[seen], expected[seen], rtol=4 * ONE_STEP, atol=4 * ONE_STEP)
    moved = (expected[1:] - expected[0]).abs()
    assert float(moved[seen[1:]].max()) > 1000 * ONE_STEP


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["exact", "direct"])
def test_equals_the_plain_loop(name, method):
    model, processor = seeing(name)
    prompt = ["Look: ", SMALL, TEXT]
    inputs = encoded(name, processor, f"Look: {mark(name, processor)}{TEXT}", [SMALL])
    explainer = Explainer(model, processor, method=method, progress=False)
    explanation = explainer.explain(prompt, TARGET)
    assert explanation.text == f"Look: {TEXT}{TARGET}"
    assert {unit.level for unit in explanation.units} == {"patch", "token"}
    check(name, explanation, inputs)
