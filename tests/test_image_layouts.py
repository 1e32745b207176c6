"""Each image token's box is the place on the picture that its embedding is made of.

Proven by probe: a tower whose attention is silenced turns every patch into its own token, so a
picture that is changed in one place moves the tokens that stand there, and no other.

Legend: P prompt tokens, N changed pictures.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from PIL import Image
from toy_images import seeing
from toy_processors import PROCESSORS, encoded, llava

from atman_triton.images import image_tokens
from atman_triton.stacks import UnsupportedModelError

SIZES = [(60, 60), (110, 44), (46, 96), (71, 53)]


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
    """What the language model reads: ``[N, P, D]``."""
    found = []

    def stop(module, args, kwargs):
        found.append(kwargs["inputs_embeds"])
        raise Stopped

    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), pytest.raises(Stopped):
        model(**inputs)
    hook.remove()
    return found[0]


def noisy(size, seed=0):
    """A picture without flat regions."""
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(90, 130, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def marked(picture, x, y, width=3, height=3):
    """The picture with a bright block that has its middle at a place."""
    changed = picture.copy()
    left, top = round(x - width / 2), round(y - height / 2)
    changed.paste((255, 255, 255), (left, top, left + width, top + height))
    return changed


def middle(box):
    left, top, width, height = box
    return left + width / 2, top + height / 2


def meets(box, x, y, reach=0.0):
    """Whether a place is in a box widened on all sides."""
    left, top, width, height = box
    return left - reach <= x <= left + width + reach and top - reach <= y <= top + height + reach


def probed(name, sizes, processor=None):
    """The image tokens of a prompt, and how far each prompt token moves when their middles change.

    Returns: Tokens that have a box; all of them; distances ``[N, P]``.
    """
    model, processor = seeing(name, processor)
    pictures = [noisy(size, seed) for seed, size in enumerate(sizes)]
    tokens = image_tokens(model, processor, encoded(processor, [pictures], "hi"), sizes)
    placed = [token for token in tokens if token.box is not None]
    rows = [pictures]
    for token in placed:
        row = list(pictures)
        row[token.image] = marked(row[token.image], *middle(token.box))
        rows.append(row)
    vectors = embedded(silenced(model), encoded(processor, rows, "hi"))
    return placed, tokens, (vectors[1:] - vectors[0]).norm(dim=-1)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("sizes", [*([size] for size in SIZES), [(60, 60), (71, 53)]], ids=str)
def test_the_token_that_stands_there_moves_most(name, sizes):
    placed, tokens, moved = probed(name, sizes)
    for token, distances in zip(placed, moved, strict=True):
        x, y = middle(token.box)
        views = defaultdict(list)
        for other in tokens:
            if other.image == token.image and other.box is not None:
                views[other.view].append(other)
        for view, others in views.items():
            most = max(others, key=lambda other: distances[other.token])
            assert distances[most.token] > 0
            assert most == token if view == token.view else meets(most.box, x, y, 1.5)


# --- what cannot be known -------------------------------------------------------------------------


def prompt(name="llava", sizes=((60, 60),)):
    model, processor = seeing(name)
    pictures = [noisy(size) for size in sizes]
    return model, processor, encoded(processor, [pictures], "hi"), list(sizes)


def test_a_prompt_without_pictures_has_no_image_tokens():
    model, processor, _, _ = prompt()
    encoding = processor(text="hello", return_tensors="pt")
    assert image_tokens(model, processor, encoding, []) == []


def test_an_unknown_family_is_named():
    model, processor, encoding, sizes = prompt()
    model.config.model_type = "fuyu"
    with pytest.raises(UnsupportedModelError, match=r"is a fuyu; .* Known families: .*llava, .*qw"):
        image_tokens(model, processor, encoding, sizes)


def test_an_unknown_tower_is_named():
    model, processor, encoding, sizes = prompt()
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(UnsupportedModelError, match=r"of this llava stand .* tower is a pixtral"):
        image_tokens(model, processor, encoding, sizes)


def test_an_unknown_way_to_resize_is_named():
    processor = llava(size={"shortest_edge": 24, "longest_edge": 24})
    model, _ = seeing("llava", processor)
    encoding = encoded(processor, [[noisy((60, 60))]], "hi")
    with pytest.raises(UnsupportedModelError, match=r"processor resizes to {'shortest_edge': 24, "):
        image_tokens(model, processor, encoding, [(60, 60)])


def test_sizes_that_do_not_fit_are_refused():
    model, processor, encoding, sizes = prompt()
    with pytest.raises(ValueError, match=r"must hold 72 image tokens for .*60x60, 9x9 .* got 36;"):
        image_tokens(model, processor, encoding, [*sizes, (9, 9)])
    with pytest.raises(ValueError, match=r"must hold 0 image tokens for pictures of no size .* 36"):
        image_tokens(model, processor, encoding, [])
    with pytest.raises(ValueError, match=r"at least 1, got \[\(0, 5\)\]"):
        image_tokens(model, processor, encoding, [(0, 5)])
    model, processor, encoding, sizes = prompt("qwen2.5-vl")
    with pytest.raises(ValueError, match="image_grid_thw must hold a row for each of 2 pictures"):
        image_tokens(model, processor, encoding, [*sizes, (9, 9)])


def test_pixels_that_do_not_fit_the_settings_are_refused():
    model, processor, encoding, sizes = prompt()
    processor.image_processor.do_center_crop = False
    encoding["pixel_values"] = torch.zeros(1, 3, 28, 24)
    with pytest.raises(ValueError, match=r"of 60x60 pixels must show 24x24 .*, got 24x28"):
        image_tokens(model, processor, encoding, sizes)


def test_what_is_no_encoding_is_refused():
    model, processor, encoding, sizes = prompt()
    several = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"input_ids of shape \[1, tokens\], got \[2, 5\]"):
        image_tokens(model, processor, {"input_ids": several}, sizes)
    with pytest.raises(ValueError, match=r"input_ids of shape \[1, tokens\], got list"):
        image_tokens(model, processor, {"input_ids": [[1, 2]]}, sizes)
    with pytest.raises(ValueError, match=r"must hold the tensor pixel_values, .*got NoneType"):
        image_tokens(model, processor, {"input_ids": encoding["input_ids"]}, sizes)
    with pytest.raises(
        TypeError, match=r"processor must prepare images and text, .*got Tokenizers"
    ):
        image_tokens(model, processor.tokenizer, encoding, sizes)
