"""Layouts of pictures of every size and kind, and of prompts that cannot be read.

Legend: P prompt tokens.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import cache
from itertools import pairwise
from math import isclose

import pytest
import torch
import toy_processors
import transformers as tf
from image_probe import embedded, layout_of, silenced
from PIL import Image
from toy_images import seeing
from toy_processors import SHOWN, encoded, noisy

from atman_triton.images import cross_image_tokens, image_tokens, readable
from atman_triton.images.geometry import resampled
from atman_triton.stacks import UnsupportedModelError

STRETCHED = [
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "gemma3",
    "paligemma",
    "idefics3",
    "smolvlm",
    "internvl",
]
SIZES = [(20 + 37 * k % 173, 20 + 53 * k % 181) for k in range(25)]  # all kinds of ratios
SMALL = [(1, 1), (5, 3), (2, 9), (150, 1), (1, 150)]


seen = cache(seeing)


def laid_out(name, sizes, parts=None):
    """The tokens of a prompt with empty pictures."""
    model, processor = parts or seen(name)
    pictures = [Image.new("RGB", size, (90, 60, 200)) for size in sizes]
    return layout_of(name)(model, processor, encoded(processor, [pictures], "hi"), sizes)


def covered(tokens):
    """Of each view of a picture, the area of its boxes, none of which reaches into another."""
    views = defaultdict(list)
    for token in tokens:
        if token.box is not None:
            views[token.view].append(token.box)
    for boxes in views.values():
        edges = [sorted({(box[a], box[a] + box[a + 2]) for box in boxes}) for a in (0, 1)]
        assert len(boxes) == len(edges[0]) * len(edges[1])
        for spans in edges:
            assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
    return {view: sum(w * h for _, _, w, h in boxes) for view, boxes in views.items()}


@pytest.mark.parametrize("name", STRETCHED)
def test_the_boxes_of_a_view_cover_the_picture(name):
    for size in [*SMALL, (60, 60), (110, 44), (46, 96), (71, 53)]:
        found = covered(laid_out(name, [size]))
        assert all(isclose(area, size[0] * size[1]) for area in found.values())
        assert found.keys() in ({"grid"}, {"overview", "crop"})


def test_a_padded_picture_is_covered():
    for size in [*SMALL, (60, 60), (110, 44), (46, 96), (71, 53)]:
        (area,) = covered(laid_out("mllama", [size])).values()
        assert isclose(area, size[0] * size[1])


def test_the_last_crop_is_what_is_left_of_a_long_picture():
    model, processor = seeing("gemma3")
    size = (70, 25)
    encoding = encoded(processor, [[noisy(size)]], "hi", do_pan_and_scan=True)
    tokens = image_tokens(model, processor, encoding, [size])
    crops = [token.box for token in tokens if token.view == "crop"]
    assert crops[0] == pytest.approx((0, 0, 24 / 3, 25 / 3))
    assert crops[-1] == pytest.approx((48 + 22 / 3 * 2, 25 / 3 * 2, 22 / 3, 25 / 3))


def test_pixels_that_a_tower_leaves_unread_are_in_no_box():
    """Of 26 pixels each way, six patches of four are read."""
    assert covered(laid_out("llava-onevision", [(52, 52)])) == pytest.approx(
        {"overview": 52 * 52 * (24 / 26) ** 2, "crop": 48 * 48}
    )


def test_averaged_patches_keep_the_gaps_between_tiles():
    spans = [(0, 1), (2, 3), (4, 5)]
    assert resampled(spans, 1) == [(0, 5)]
    assert resampled(spans, 2) == [(0, 2.5), (2.5, 5)]
    assert resampled(spans, 3) == spans
    assert resampled(spans[:2], 4) == [(0, 0.5), (0.5, 1), (2, 2.5), (2.5, 3)]


@pytest.mark.parametrize(
    ("size", "visible"),
    [
        ((110, 44), (110 * 18 / 60, 0, 110 * 24 / 60, 44)),
        ((46, 96), (0, 96 * 13 / 50, 46, 96 * 24 / 50)),
        ((61, 41), (61 * 5 / 35, 0, 61 * 24 / 35, 41)),  # of an odd rest, the larger half behind
        ((60, 60), (0, 0, 60, 60)),
    ],
)
def test_what_a_crop_cuts_off_is_in_no_box_and_moves_nothing(size, visible):
    model, processor = seeing("llava")
    picture = noisy(size)
    encoding = encoded(processor, [[picture]], "hi")
    boxes = [token.box for token in image_tokens(model, processor, encoding, [size])]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(b[0] + b[2] for b in boxes), max(b[1] + b[3] for b in boxes)
    assert (left, top, right - left, bottom - top) == pytest.approx(visible)
    outside = picture.copy()
    outside.paste((255, 255, 255), (0, 0, *size))
    reach = 4  # pixels that resizing blurs
    kept = [round(left) - reach, round(top) - reach, round(right) + reach, round(bottom) + reach]
    kept = [max(kept[0], 0), max(kept[1], 0), min(kept[2], size[0]), min(kept[3], size[1])]
    outside.paste(picture.crop(kept), kept[:2])
    vectors = embedded(silenced(model), encoded(processor, [[picture], [outside]], "hi"))
    # not bit for bit: some processors add up the rows of a batch in another order
    step = 64 * torch.finfo(vectors.dtype).eps * float(vectors.abs().max())
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=step)
    assert (outside == picture) == (size == (60, 60))


def test_counts_are_those_of_the_processor_for_every_size():
    """Which rounding decides how many tiles and rows a picture gets, is the family's own."""
    for name in ("llava-next", "llava-onevision"):
        for size in SIZES:
            laid_out(name, [size])  # it raises where counts differ


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("longest", [25, 48, 72, 100, 4200])
def test_tiles_are_those_that_the_processor_says(name, longest):
    parts = seeing(name, toy_processors.PROCESSORS[name](size={"longest_edge": longest}))
    images = parts[1].image_processor
    even = [(48, 26), (20, 36), (63, 115)]  # an edge that is odd is made even, which adds a tile
    for size in [*SIZES, *even] if longest < 1000 else [(3, 4100)]:
        said = images([Image.new("RGB", size)], return_row_col_info=True)
        rows, columns = said["rows"][0][0] or 1, said["cols"][0][0] or 1
        first = laid_out(name, [size], parts)[0].box
        assert first[2:] == pytest.approx((size[0] / columns / 3, size[1] / rows / 3))


@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 5), (3, 4)])
def test_tiles_are_those_that_distort_least(least, most):
    processor = toy_processors.internvl(min_patches=least, max_patches=most)
    parts = seeing("internvl", processor)
    rule = sys.modules[type(processor.image_processor).__module__].get_optimal_tiled_canvas
    for size in [*SIZES, (40, 20), (56, 28)]:  # between two ratios the order decides
        columns, rows = rule(size[::-1], (SHOWN, SHOWN), least, most)
        first = laid_out("internvl", [size], parts)[0].box
        assert first[2:] == pytest.approx((size[0] / columns / 3, size[1] / rows / 3))


# --- small pictures, and pictures of other kinds --------------------------------------------------


@pytest.mark.parametrize("name", toy_processors.PROCESSORS)
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_a_very_small_picture_is_read(name, size):
    tokens = laid_out(name, [size])
    inside = [token.box for token in tokens if token.box is not None]
    assert inside
    for left, top, width, height in inside:
        assert width > 0 and height > 0 and left >= 0 and top >= 0
        assert left + width <= size[0] + 1e-9 and top + height <= size[1] + 1e-9


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_picture_that_is_too_long_is_refused_by_the_processor(name):
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got 300"):
        laid_out(name, [(300, 1)])


@pytest.mark.parametrize("name", toy_processors.PROCESSORS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_picture_is_read_alike(name, mode):
    _, processor = seen(name)
    picture = noisy((40, 30)).convert("L").convert(mode if mode != "I;16" else "I")
    if mode == "I;16":
        picture = picture.point(lambda value: value * 257).convert("I;16")
    found = encoded(processor, [[readable(picture)]], "hi")["pixel_values"]
    if mode in ("1", "P", "CMYK"):  # which keep few colours
        expected = encoded(processor, [[picture.convert("RGB")]], "hi")["pixel_values"]
    else:
        expected = encoded(processor, [[noisy((40, 30)).convert("L").convert("RGB")]], "hi")[
            "pixel_values"
        ]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", toy_processors.PROCESSORS)
def test_left_to_itself_a_processor_neither_turns_a_picture_nor_scales_it(name):
    """Why pictures are made readable first."""
    _, processor = seen(name)

    def shown(picture):
        return encoded(processor, [[picture]], "hi")["pixel_values"]

    lying, standing = noisy((40, 30)), noisy((40, 30)).transpose(Image.Transpose.ROTATE_270)
    lying.getexif()[0x0112] = 6  # held so that the left edge is the top
    assert torch.equal(shown(lying), shown(noisy((40, 30))))
    assert torch.equal(shown(readable(lying)), shown(standing))
    grey = Image.frombytes("I;16", (40, 30), (20_000).to_bytes(2, "little") * 1200)
    assert torch.equal(shown(grey), shown(Image.new("RGB", (40, 30), "white")))
    assert torch.equal(shown(readable(grey)), shown(Image.new("L", (40, 30), 78)))


# --- what cannot be known -------------------------------------------------------------------------


def prompt(name="llava", sizes=((60, 60),), **options):
    model, processor = seeing(name)
    pictures = [noisy(size) for size in sizes]
    return model, processor, encoded(processor, [pictures], "hi", **options), list(sizes)


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
    processor = toy_processors.llava(size={"shortest_edge": 24, "longest_edge": 24})
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
    with pytest.raises(ValueError, match=r"must show 60x60 pixels in 24x24 .*, got 24x28"):
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


def test_another_image_processor_is_named():
    model, processor, encoding, sizes = prompt()
    processor.image_processor = tf.ViTImageProcessorPil()
    with pytest.raises(
        UnsupportedModelError, match=r"ViTImageProcessorPil prepares .* this llava;"
    ):
        image_tokens(model, processor, encoding, sizes)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_an_image_processor_of_another_backend_is_known(name):
    model, processor, encoding, sizes = prompt()
    kind = type(name, (tf.image_processing_utils.BaseImageProcessor,), {})
    processor.image_processor = kind(**processor.image_processor.to_dict())
    assert len(image_tokens(model, processor, encoding, sizes)) == 36


def test_images_beside_the_prompt_are_asked_for_by_name():
    model, processor, encoding, sizes = prompt("mllama")
    with pytest.raises(UnsupportedModelError, match=r"is a mllama; .* see cross_image_tokens"):
        image_tokens(model, processor, encoding, sizes)
    with pytest.raises(ValueError, match=r"aspect_ratio_ids must hold an id for each of 2 pict"):
        cross_image_tokens(model, processor, encoding, [*sizes, (9, 9)])
    text = processor(text="hello", return_tensors="pt")
    assert cross_image_tokens(model, processor, text, []) == []
    model, processor, encoding, sizes = prompt("llava")
    with pytest.raises(UnsupportedModelError, match=r"is a llava; .* Known families: mllama\.$"):
        cross_image_tokens(model, processor, encoding, sizes)


def test_canvases_of_processor_and_model_must_agree():
    model, processor, encoding, sizes = prompt("llava-next")
    model.config.image_grid_pinpoints = model.config.image_grid_pinpoints[::-1]
    with pytest.raises(UnsupportedModelError, match="image_grid_pinpoints of the processor and th"):
        image_tokens(model, processor, encoding, sizes)


def test_pictures_given_together_must_be_all_pictures():
    model, processor, encoding, sizes = prompt("llava-onevision", [(60, 60), (60, 60)])
    encoding["batch_num_images"] = torch.tensor([3])
    with pytest.raises(ValueError, match="batch_num_images must count 2 pictures, got 3"):
        image_tokens(model, processor, encoding, sizes)
    model, processor, encoding, sizes = prompt("llava-onevision", [(60, 60), (9, 40)], flat=True)
    each = [len(image_tokens(*prompt("llava-onevision", [size]))) for size in sizes]
    del encoding["batch_num_images"]  # which a processor may leave out
    assert len(image_tokens(model, processor, encoding, sizes)) == sum(each)
