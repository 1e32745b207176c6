"""Pictures changed in one place, and what image embeddings make of the change.

A tower whose attention is silenced turns every patch into its own token, so a change moves the
tokens that stand there and no other.

Legend: P prompt tokens or cross-attention keys, N changed pictures, D width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy_processors
from toy_images import seeing
from toy_processors import encoded, noisy

from atman_triton.images import cross_image_tokens, image_tokens


def layout_of(name):
    """The function that says where a family's image tokens stand."""
    return cross_image_tokens if name == "mllama" else image_tokens


class Stopped(Exception):
    """Ends a forward pass where the language model begins."""


def silenced(model):
    """The same model with a vision tower in which no patch looks at another."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and "language_model" not in name:
            for child, part in module.named_children():
                if child in ("out_proj", "proj", "projection_layer", "o_proj"):
                    torch.nn.init.zeros_(part.weight)
                    if part.bias is not None:
                        torch.nn.init.zeros_(part.bias)
    return model


def embedded(model, inputs):
    """What the language model reads in place of images or beside the prompt: ``[N, P, D]``."""
    found: list[Any] = []

    def stop(module, args, kwargs):
        found.append(kwargs.get("cross_attention_states", kwargs["inputs_embeds"]))
        raise Stopped

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), pytest.raises(Stopped):
        model(**inputs)
    hook.remove()
    return found[0].reshape(len(inputs["input_ids"]), -1, found[0].shape[-1])


def marked(picture, box):
    """The picture with a bright block in the middle of a box."""
    changed = picture.copy()
    (x, y), edge = middle(box), max(1, min(3, int(min(box[2:]))))
    left, top = round(x - edge / 2), round(y - edge / 2)
    changed.paste((255, 255, 255), (left, top, left + edge, top + edge))
    return changed


def middle(box):
    left, top, width, height = box
    return left + width / 2, top + height / 2


def meets(box, x, y, reach=(0.0, 0.0)):
    """Whether a place is in a box widened on all sides."""
    left, top, width, height = box
    across, down = reach
    return -across <= x - left <= width + across and -down <= y - top <= height + down


class Probe:
    """A family's model and processor, which are shown pictures."""

    def __init__(self, name, sizes, tower=None, options=None, **settings):
        processor = toy_processors.PROCESSORS[name](**settings)
        self.model, self.processor = seeing(name, processor, **tower or {})
        self.options = options or {}
        self.sizes = sizes
        self.pictures = [noisy(size, seed) for seed, size in enumerate(sizes)]
        encoding = encoded(self.processor, [self.pictures], "hi", **self.options)
        self.tokens = layout_of(name)(self.model, self.processor, encoding, sizes)
        self.placed = [token for token in self.tokens if token.box is not None]

    def moved(self):
        """How far each token moves when the middle of one's box changes: ``[N, P]``."""
        rows = [self.pictures]
        for token in self.placed:
            row = list(self.pictures)
            row[token.image] = marked(row[token.image], token.box)
            rows.append(row)
        inputs = encoded(self.processor, rows, "hi", **self.options)
        vectors = embedded(silenced(self.model), inputs)
        return (vectors[1:] - vectors[0]).norm(dim=-1)
