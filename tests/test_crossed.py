"""Mllama, whose text reads pictures across: explained as a loop of whole passes explains it."""

import pytest
import torch
import toy_images
import toy_processors
from site_oracle import oracle_logits

import atman_triton as atman
from atman_triton.granularity import Images, Tiles
from atman_triton.multimodal import CLASS_TOKEN, PADDING
from atman_triton.tokens import SPECIAL

STEP = torch.finfo(torch.float32).eps
TARGETS = [[7, 9, 12], [33]]


@pytest.fixture(scope="module")
def mllama():
    """With its gates to pictures open, which are shut before training."""
    model, processor = toy_images.seeing("mllama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model, processor


@pytest.fixture(scope="module")
def picture():
    return toy_processors.noisy((30, 14))


def counted(model):
    """Runs of the vision tower from now on, and what ends the counting."""
    seen = []
    return seen, model.model.vision_model.register_forward_hook(lambda *_: seen.append(1))


def across(model):
    """How many tokens of one picture's tiles there are."""
    config = model.config.vision_config
    return config.max_num_tiles * ((config.image_size // config.patch_size) ** 2 + 1)


def loop(model, processor, picture, text, target, units, mode):
    """``[1 + U, T]`` log-probabilities of whole passes, the tower and all, with a full matrix.

    Units are tokens of the tiles, then of the text.
    """
    inputs = dict(toy_processors.encoded(processor, [[picture]], text))
    own = inputs["input_ids"].shape[1]
    more = torch.tensor([target[:-1]], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    mask = inputs["cross_attention_mask"]
    inputs["cross_attention_mask"] = torch.cat([mask, *[mask[:, -1:]] * more.shape[1]], 1)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    columns = across(model)
    rows = []
    for unit in [(), *units]:
        factors = {"image": torch.ones(1, columns), "decoder": torch.ones(1, own + len(target) - 1)}
        for token in unit:
            source, place = ("image", token) if token < columns else ("decoder", token - columns)
            factors[source][0, place] = 0.1
        logits = oracle_logits(model, inputs, factors, mode)[0, -len(target) :]
        rows.append(logits.log_softmax(-1)[range(len(target)), target])
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
def test_equals_a_loop_of_whole_passes(mllama, picture, mode):
    model, processor = mllama
    seen, hook = counted(model)
    explainer = atman.Explainer(model, processor, mode=mode, method="exact", progress=False)
    e = explainer.explain([picture, "is a"], targets=TARGETS, image_granularity=Tiles(3, 2))
    hook.remove()
    # counting negative scores of multiplicative is a pass of its own
    assert len(seen) == (2 if mode == "multiplicative" else 1)
    prompt = [unit for unit in e.units if unit.part == "prompt"]
    assert {unit.level for unit in prompt} == {"tile", "token"}
    for branch, target in enumerate(TARGETS):
        rows = [row for row, scored in enumerate(e.targets) if scored.branch == branch]
        columns = [column for column, unit in enumerate(e.units) if unit.part == "prompt"]
        units = [unit.tokens for unit in prompt]
        expected = loop(model, processor, picture, "is a", target, units, mode).float()
        torch.testing.assert_close(e.base_logprobs[rows], expected[0], rtol=0, atol=20 * STEP)
        found = e.suppressed_logprobs[rows][:, columns]
        torch.testing.assert_close(found, expected[1:].T, rtol=0, atol=20 * STEP)
        moved = (expected[1:] - expected[0]).abs().amax(1)
        assert moved[: len(prompt) - 2].min() > 1000 * STEP


def test_patches_stand_where_their_tiles_do(mllama, picture):
    model, processor = mllama
    explainer = atman.Explainer(model, processor, progress=False)
    e = explainer.explain([picture, "is a"], target=[7], explain_only=Images())
    assert {unit.level for unit in e.units} == {"patch"}
    assert e.provenance["method"] == "exact"
    assert "reads the picture in rows of the prompt too" in e.provenance["method_choice"]
    reasons = {piece.reason for piece in e.left_out}
    assert {CLASS_TOKEN, PADDING, SPECIAL} <= reasons
    right = max(box[0] + box[2] for unit in e.units for box in unit.boxes)
    assert right == pytest.approx(picture.width)
    assert e.text.startswith("is a")
    assert e.pictures[0].image.size == picture.size


def test_a_generated_answer_and_controls(mllama, picture):
    model, processor = mllama
    explainer = atman.Explainer(model, processor, progress=False)
    options = {"image_granularity": "image", "max_new_tokens": 3}
    plain = explainer.explain([picture, "is a"], **options)
    inputs = dict(toy_processors.encoded(processor, [[picture]], "is a"))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    own = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    assert [target.token_id for target in plain.targets] == own
    control = atman.ImageControl(0, 0, 1, 1, factor=0.0, overlap="complete")
    ids = [target.token_id for target in plain.targets]
    steered = explainer.explain(
        [picture, "is a"], ids, image_granularity="image", controls=[control]
    )
    assert (steered.base_logprobs - plain.base_logprobs).abs().max() > 1e-4
    text = atman.TokenControl(len(steered.units[0].tokens), 0.3)
    also = explainer.explain([picture, "is a"], ids, image_granularity="image", controls=[text])
    assert (also.base_logprobs - plain.base_logprobs).abs().max() > 1e-4


def test_direct_effects_are_refused(mllama, picture):
    model, processor = mllama
    with pytest.raises(atman.UnsupportedModelError, match="reads the picture in rows of the prom"):
        atman.Explainer(model, processor, method="direct", progress=False).explain(
            [picture, "is a"], target=[7]
        )


def test_similar_patches_go_along(mllama, picture):
    model, processor = mllama
    explainer = atman.Explainer(model, processor, similarity=0.5, method="exact", progress=False)
    e = explainer.explain([picture, "is a"], target=[7], image_granularity=Tiles(2))
    assert any(unit.neighbours for unit in e.units if unit.image is not None)
    for unit in e.units:
        near = {neighbour.token < across(model) for neighbour in unit.neighbours}
        assert near <= {unit.image is not None}  # text is never like a picture


def test_a_path_adds_up(mllama, picture):
    model, processor = mllama
    explainer = atman.Explainer(model, processor, method="path", steps=16, progress=False)
    e = explainer.explain([picture, "is a"], target=[7], image_granularity=Tiles(2))
    rise = float(e.base_logprobs[0] - e.together_logprobs[0])
    assert abs(rise) > 0.01
    assert float(e.scores.sum()) == pytest.approx(rise, rel=0.03)
