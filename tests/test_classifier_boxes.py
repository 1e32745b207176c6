"""Every patch's box is the place on the picture that its embedding is made of: by probe."""

import random
from typing import Any

import classifier_cases as cases
import pytest
import torch
import transformers as tf
from PIL import Image

from atman_triton.classifier_input import read_picture
from atman_triton.embedded import entry_of
from atman_triton.images.classifiers import patch_cells
from atman_triton.stacks import UnsupportedModelError

SIZES = [(60, 60), (110, 44), (46, 96), (71, 53)]
PATCHES = (cases.SIZE // cases.PATCH) ** 2


def noisy(size, seed=0):
    """A picture without flat regions."""
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(90, 130, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def marked(picture, x, y, side=3):
    """The picture with a bright block that has its middle at a place."""
    changed = picture.copy()
    left, top = round(x - side / 2), round(y - side / 2)
    changed.paste((255, 255, 255), (left, top, left + side, top + side))
    return changed


@torch.no_grad()
def embedded(model, processor, pictures):
    """What the first layer reads: ``[N, S, D]``."""
    inputs = processor(images=pictures, return_tensors="pt")
    pixels = inputs["pixel_values"].double()
    more = [inputs["spatial_shapes"]] if "spatial_shapes" in inputs else []
    entry: Any = entry_of(model)
    return entry(pixels, *more)


def moved(model, processor, picture, areas):
    """Of each patch, the token that moves most when the picture changes somewhere in its box."""
    places = random.Random(3)
    changed = []
    for area in areas:
        left, top, width, height = area.box
        x = left + width * places.uniform(0.25, 0.75)
        changed.append(marked(picture, x, top + height * places.uniform(0.25, 0.75)))
    vectors = embedded(model, processor, [picture, *changed])
    distances = (vectors[1:] - vectors[0]).norm(dim=-1)
    assert bool((distances.amax(1) > 0).all())
    return distances.argmax(1).tolist()


@pytest.mark.parametrize("name", cases.PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_patch_that_stands_there_moves_most(name, size):
    if name == "as it is":
        size = (cases.SIZE, cases.SIZE)
    model, processor, picture = cases.make("vit"), cases.PROCESSORS[name](), noisy(size)
    words, inputs, (shown,) = read_picture(picture, processor, model)
    assert len(words) == 1 + PATCHES and (shown.width, shown.height) == size
    assert words.reasons == ["class token", *[None] * PATCHES]
    assert words.areas[0] is None and words.text == ""
    assert list(inputs) == ["pixel_values"]
    areas = words.areas[1:]
    assert moved(model, processor, picture, areas) == [*range(1, 1 + PATCHES)]
    for area in areas:
        assert area is not None and area.box is not None
        left, top, width, height = area.box
        assert left >= 0 and top >= 0 and width > 0 and height > 0
        assert left + width <= size[0] + 1e-6 and top + height <= size[1] + 1e-6


@pytest.mark.parametrize("name", cases.IMAGE)
def test_tokens_in_front_of_the_patches_are_left_out_by_name(name):
    model, picture = cases.make(name), noisy((71, 53))
    processor = cases.PROCESSORS["stretched"]()
    words, _, _ = read_picture(picture, processor, model)
    front = {
        "vit": ["class token"],
        "deit": ["class token", "distillation token"],
        "dinov2": ["class token"],
        "dinov2-registers": ["class token", *["register token"] * 3],
        "siglip": [],
        "clip": ["class token"],
    }[name]
    assert words.reasons == [*front, *[None] * PATCHES]
    found = moved(model, processor, picture, words.areas[len(front) :])
    assert found == [*range(len(front), len(front) + PATCHES)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_that_keep_their_shape_and_are_padded(size):
    vision = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision |= {"patch_size": cases.PATCH, "num_patches": 36, "intermediate_size": 48}
    model = tf.Siglip2ForImageClassification(tf.Siglip2Config(vision_config=vision)).double()
    processor = tf.Siglip2ImageProcessorPil(patch_size=cases.PATCH, max_num_patches=40)
    picture = noisy(size)
    words, inputs, _ = read_picture(picture, processor, model)
    rows, columns = inputs["spatial_shapes"][0].tolist()
    assert words.reasons == [None] * rows * columns + ["padding"] * (40 - rows * columns)
    found = moved(model, processor, picture, words.areas[: rows * columns])
    assert found == [*range(rows * columns)]


def refused_by(processor, match, kind=UnsupportedModelError, model=None):
    with pytest.raises(kind, match=match):
        read_picture(noisy((60, 50)), processor, cases.make("vit") if model is None else model)


def test_what_is_not_known_of_a_processor_is_said():
    size = {"shortest_edge": 24, "longest_edge": 24}
    refused_by(
        tf.BitImageProcessorPil(size=size, do_center_crop=False), r"resizes to {'shortest_edge': 24"
    )
    square = {"height": 24, "width": 24}
    pool = tf.PoolFormerImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)
    refused_by(pool, "PoolFormerImageProcessorPil crops by crop_pct in a way of its own")
    model = cases.make("vit")
    model.config.patch_size = (4, 8)
    refused_by(cases.PROCESSORS["stretched"](), r"patch_size \(4, 8\), and one number", model=model)


def test_pixels_that_do_not_fit_the_settings_are_refused():
    class Other(tf.ViTImageProcessorPil):
        def resize(self, image, size, **more):
            return super().resize(image, tf.image_utils.SizeDict(height=28, width=24), **more)

    refused_by(
        Other(size={"height": 24, "width": 24}),
        "of 60x50 pixels must show 24x24 by the settings of Other, got 24x28",
        ValueError,
    )


def test_from_384_pixels_on_convnext_stretches_instead_of_cropping():
    processor = tf.ConvNextImageProcessorPil(size={"shortest_edge": 384}, crop_pct=0.5)
    encoding = processor(images=noisy((60, 50)), return_tensors="pt")
    config = tf.ViTConfig(image_size=384, patch_size=96)
    cells = patch_cells(config, processor, encoding, (60, 50))
    boxes = [(15.0 * x, 12.5 * y, 15.0, 12.5) for y in range(4) for x in range(4)]
    assert [cell.box for cell in cells] == boxes
