"""Explainer on image classifiers: equal to plain forwards, in boxes of the picture as given."""

import classifier_cases as cases
import pytest
import torch
import transformers as tf
from PIL import Image
from test_classifier_boxes import noisy

from atman_triton import Explainer, Images, load
from atman_triton.pieces import Box

SIZE = (110, 44)  # three times as wide as what a crop keeps of it
PATCHES = (cases.SIZE // cases.PATCH) ** 2


def explainer_of(name, processor="stretched", model=None, **settings):
    model = cases.make(name) if model is None else model
    processor = cases.PROCESSORS[processor]()
    return model, processor, Explainer(model, processor, progress=False, **settings)


def loop(model, processor, picture, e, index, factor=0.1):
    """``[1, U]``: how far a class falls in a plain forward with each unit suppressed."""
    inputs = dict(processor(images=picture, return_tensors="pt"))
    front = {"vit": 1, "dinov2": 1, "dinov2_with_registers": 4, "siglip_vision_model": 0}
    config = getattr(model.config, "vision_config", model.config)
    tokens = PATCHES + front[config.model_type]
    with torch.no_grad():
        base = cases.plain_logits(model, inputs).log_softmax(-1)[index]
        found = []
        for unit in e.units:
            row = torch.ones(tokens)
            row[list(unit.tokens)] = factor
            found.append(base - cases.plain_logits(model, inputs, row).log_softmax(-1)[index])
    return torch.stack(found)[None].float()


def covered(boxes: list[Box]) -> float:
    """Pixels that disjoint boxes cover."""
    return sum(width * height for _, _, width, height in boxes)


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("vit", "stretched"),
        ("dinov2", "cropped"),
        ("dinov2-registers", "middle"),
        ("siglip", "siglip"),
    ],
)
def test_scores_of_patches(name, processor):
    picture = noisy(SIZE)
    model, processor, explainer = explainer_of(name, processor)
    e = explainer.explain(picture, target="weather")
    torch.testing.assert_close(
        e.scores, loop(model, processor, picture, e, 2), rtol=1e-5, atol=1e-6
    )
    assert e.text == "weather" and e.prompt == "" and e.answer == "weather"
    assert [(each.width, each.height, each.start) for each in e.pictures] == [(*SIZE, 0)]
    assert len(e.units) == PATCHES
    assert {(unit.level, unit.image, len(unit.boxes)) for unit in e.units} == {("patch", 0, 1)}
    reasons = [each.reason for each in e.left_out]
    front = {"vit": 1, "dinov2": 1, "dinov2-registers": 4, "siglip": 0}[name]
    assert reasons == {0: [], 1: ["class token"], 4: ["class token", "register token"]}[front]
    assert [unit.tokens for unit in e.units] == [(front + k,) for k in range(PATCHES)]
    if name in ("vit", "siglip"):  # shown whole
        assert covered([unit.boxes[0] for unit in e.units]) == pytest.approx(SIZE[0] * SIZE[1])


@pytest.mark.parametrize("grid", ["3x2", "image"])
def test_scores_of_tiles(grid):
    picture = noisy(SIZE)
    model, processor, explainer = explainer_of("vit")
    e = explainer.explain(picture, "art", granularity=grid)
    torch.testing.assert_close(
        e.scores, loop(model, processor, picture, e, 3), rtol=1e-5, atol=1e-6
    )
    assert len(e.units) == {"3x2": 6, "image": 1}[grid]
    assert sorted(token for unit in e.units for token in unit.tokens) == [*range(1, 1 + PATCHES)]


def test_every_class_of_a_picture_is_read_off_the_same_passes():
    picture = noisy(SIZE)
    model, processor, explainer = explainer_of("vit")
    e = explainer.explain(picture, targets=[*cases.LABELS], image_granularity="3x3")
    assert e.answers == [*cases.LABELS] and e.provenance["exact_runs"] == 9
    for index in range(len(cases.LABELS)):
        expected = loop(model, processor, picture, e, index)
        torch.testing.assert_close(e.scores[[index]], expected, rtol=1e-5, atol=1e-6)


def test_the_predicted_class_of_a_picture():
    picture = noisy(SIZE)
    model, processor, explainer = explainer_of("vit")
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"].double()
    best = int(model(pixels).logits.argmax())
    e = explainer.explain([picture], granularity="image")
    assert e.answer == cases.LABELS[best] and e.provenance["target"] == "predicted"


def test_pictures_of_other_kinds():
    model, processor, explainer = explainer_of("vit")
    colour = noisy((30, 20))
    grey = colour.convert("L")
    clear = colour.convert("RGBA")
    clear.putalpha(0)
    for picture, shown in (
        (grey, grey.convert("RGB")),
        (clear, Image.new("RGB", (30, 20), "white")),
        (Image.new("RGB", (1, 1), "red"), Image.new("RGB", (1, 1), "red")),
    ):
        e = explainer.explain(picture, 1)
        torch.testing.assert_close(
            e.scores, loop(model, processor, shown, e, 1), rtol=1e-5, atol=1e-6
        )


def test_patches_that_look_alike_go_along():
    picture = Image.new("RGB", (24, 24), "black")
    picture.paste((255, 0, 0), (4, 4, 8, 8))
    picture.paste((255, 0, 0), (16, 12, 20, 16))
    _, _, explainer = explainer_of("vit", "as it is", similarity=0.999)
    e = explainer.explain(picture, "art")
    first, again = 6 + 1, 3 * 6 + 4
    assert e.units[first].boxes == ((4, 4, 4, 4),) and e.units[again].boxes == ((16, 12, 4, 4),)
    assert [near.token for near in e.units[first].neighbours] == [1 + again]


@pytest.mark.parametrize("method", ["path", "hierarchical"])
def test_other_methods_on_pictures(method):
    _, _, explainer = explainer_of("siglip", method=method)
    e = explainer.explain(noisy(SIZE), "art")
    assert e.method == method and bool(e.scores.isfinite().all())


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_negative_scores_are_counted_on_pictures(name):
    model, processor, explainer = explainer_of(name, mode="multiplicative")
    e = explainer.explain(noisy(SIZE), "art", granularity="image")
    share = cases.negative_share(model, dict(processor(images=noisy(SIZE), return_tensors="pt")))
    assert e.provenance["negative_scores"] == pytest.approx(share, abs=1e-12)


def test_only_some_pictures_are_explained_or_units():
    _, _, explainer = explainer_of("vit")
    whole = explainer.explain(noisy(SIZE), "art")
    same = explainer.explain(noisy(SIZE), "art", explain_only=Images())
    assert torch.equal(same.scores, whole.scores)
    some = explainer.explain(noisy(SIZE), "art", explain_only=[3, 5])
    torch.testing.assert_close(some.scores, whole.scores[:, [3, 5]], rtol=1e-5, atol=1e-6)


def test_a_picture_is_saved_with_its_explanation(tmp_path):
    _, _, explainer = explainer_of("vit")
    e = explainer.explain(noisy(SIZE), "art", granularity="3x3")
    e.save(tmp_path / "e.json")
    assert load(tmp_path / "e.json") == e


def test_the_processor_may_be_of_texts_too():
    model = cases.make("clip")
    images = cases.PROCESSORS["middle"]()
    from toy_tokenizers import byte_level

    both = tf.CLIPProcessor(images, byte_level())
    explainer = Explainer(model, both, progress=False)
    assert explainer.tokenizer is None
    e = explainer.explain(noisy(SIZE), "art", granularity="image")
    alone = Explainer(model, images, progress=False).explain(noisy(SIZE), "art", "image")
    assert torch.equal(e.scores, alone.scores)


@pytest.mark.parametrize(
    ("prompt", "processor", "message"),
    [
        ("a.png", "stretched", "an image must be a PIL.Image, got str; open files with"),
        (
            [Image.new("RGB", (4, 4))] * 2,
            "stretched",
            "an image must be a PIL.Image, got list; open files with",
        ),
        (
            Image.new("RGB", (4, 4)),
            None,
            "pictures need the model's image processor, as AutoImageProcessor.from_pretrained "
            "loads it, got NoneType.",
        ),
    ],
    ids=["path", "two", "no processor"],
)
def test_what_is_no_picture_is_refused(prompt, processor, message):
    model = cases.make("vit")
    processor = None if processor is None else cases.PROCESSORS[processor]()
    explainer = Explainer(model, processor, progress=False)
    with pytest.raises(TypeError) as refused:
        explainer.explain(prompt, "art")
    assert str(refused.value).startswith(message)
