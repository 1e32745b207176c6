"""Methods, granularities and targets on pictures, and how often the picture is encoded."""

from typing import Any

import pytest
import torch
import toy_images
from test_multimodal import FAMILIES, TALL, TARGET, TEXT, WIDE, check, encoded, mark, noise, seeing
from toy_processors import llava
from transformers import LlavaForConditionalGeneration

from atman_triton import Explainer
from atman_triton.methods import METHODS

SOME = ["llava", "qwen2.5-vl", "gemma3"]
STEP = 4 * torch.finfo(torch.float32).eps


def towers(model):
    """The vision tower, whatever it is called."""
    names = ("vision_tower", "visual", "vision_model")
    return next(m for n, m in model.named_modules() if n.rpartition(".")[2] in names)


@pytest.fixture
def passes():
    """Counts the passes of a model's vision tower while a test runs."""
    handles = []

    def watch(model):
        seen = []
        handles.append(towers(model).register_forward_hook(lambda *_: seen.append(1)))
        return seen

    yield watch
    for handle in handles:
        handle.remove()


def explainer(name, **options):
    model, processor = seeing(name)
    return Explainer(model, processor, progress=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_picture_is_encoded_once(name, passes):
    """For the answer, neighbours, several runs and the share of negative scores together."""
    seen = passes(seeing(name)[0])
    every = explainer(name, mode="multiplicative", similarity=0.3, method="direct")
    explanation = every.explain([WIDE, TEXT], max_new_tokens=3, contrast_target=" red")
    assert explanation.provenance["negative_scores"] > 0
    assert any(unit.neighbours for unit in explanation.units)
    assert len(seen) == 1
    every.explain([WIDE, TEXT], " red")
    assert len(seen) == 2  # nothing is kept for the next call


def test_runs_apart_encode_the_picture_once(passes):
    seen = passes(seeing("llava")[0])
    found = explainer("llava", mode="min_shift_full").explain(
        [WIDE, TEXT], targets=[" red", " blue circle", " green"]
    )
    assert len(found.provenance["runner_reasons"]) == 2
    assert len(seen) == 1


@pytest.mark.parametrize("name", SOME)
def test_the_answer_is_what_generate_gives(name):
    model, processor = seeing(name)
    inputs = encoded(name, processor, f"{mark(name, processor)}{TEXT}", [WIDE])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
    explanation = explainer(name).explain([WIDE, TEXT], max_new_tokens=4)
    found = [target.token_id for target in explanation.targets]
    assert found == expected[: len(found)]
    assert len(found) >= 3


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_before_the_scored_passage_is_read(name):
    one = explainer(name, method="exact")
    whole = one.explain([WIDE, TEXT], TARGET)
    part = one.explain([WIDE, TEXT], TARGET, target_span="circle")
    count = len(part.targets)
    assert 0 < count < len(whole.targets)
    assert part.targets == whole.targets[-count:]
    assert part.units == whole.units
    torch.testing.assert_close(
        part.scores, whole.scores[-count:], rtol=STEP, atol=STEP, equal_nan=True
    )


def test_many_class_names_in_one_pass_over_the_perturbed_picture():
    """As if each alone had been asked for (paper, Fig. 7)."""
    names = [" red", " pay per hour", " hello", " circle", " notice period", " in Paris", " four"]
    names = [f"{one}{two}" for one in names for two in ("", " is", " of", "!")]
    model, _ = seeing("llava")
    passed = []
    handle = model.register_forward_pre_hook(lambda *_: passed.append(1))
    try:
        together = explainer("llava", method="direct").explain([WIDE, TEXT], targets=names)
        assert len(passed) < 12
    finally:
        handle.remove()
    for k in range(0, len(names), 5):
        alone = explainer("llava", method="direct").explain([WIDE, TEXT], names[k])
        branch = together.branch(k)
        assert branch.text == alone.text
        torch.testing.assert_close(
            branch.scores, alone.scores, rtol=STEP, atol=STEP, equal_nan=True
        )


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(name, method):
    """What it measures in full is what ``exact`` measures."""
    budget = 20 if method in ("hybrid", "hierarchical") else None
    explanation = explainer(name, method=method, budget=budget).explain([WIDE, TEXT], TARGET)
    shown = [unit for unit in explanation.units if unit.image == 0]
    assert {unit.level for unit in shown} <= {"patch", "tile"}
    assert float(explanation.scores[-1].abs().max()) > 1e-3
    exact = explainer(name, method="exact").explain([WIDE, TEXT], TARGET)
    places = {unit.tokens: column for column, unit in enumerate(exact.units)}
    total = [
        (column, places[unit.tokens])
        for column, unit in enumerate(explanation.units)
        if unit.effect == "total" and unit.tokens in places
    ]
    assert bool(total) == (method in ("exact", "hybrid", "hierarchical"))
    for column, other in total:
        found, expected = explanation.scores[:, column], exact.scores[:, other]
        torch.testing.assert_close(found, expected, rtol=STEP, atol=STEP, equal_nan=True)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", ["exact", "direct"])
@pytest.mark.parametrize("granularity", ["3x3", "image", "word"])
def test_tiles_equal_the_plain_loop(name, method, granularity):
    _, processor = seeing(name)
    sign = mark(name, processor)
    inputs = encoded(name, processor, f"{sign}Look {sign}{TEXT}", [WIDE, TALL])
    given = {"image_granularity": "3x3"} if granularity == "word" else {}
    explanation = explainer(name, method=method).explain(
        [WIDE, "Look ", TALL, TEXT], TARGET, granularity, **given
    )
    shown = [unit for unit in explanation.units if unit.image is not None]
    assert {unit.image for unit in shown} == {0, 1}
    assert {unit.level for unit in shown} == {"image" if granularity == "image" else "tile"}
    check(name, explanation, inputs)


@pytest.mark.parametrize("name", SOME)
def test_image_tokens_are_neighbours(name):
    """A picture of one colour: each of its tokens is like all the others."""
    plain = noise(4, 4).resize((1, 1)).resize((48, 48))
    explanation = explainer(name, similarity=0.9, method="exact").explain([plain, TEXT], TARGET)
    shown = [unit for unit in explanation.units if unit.image == 0]
    places = {unit.tokens[0] for unit in shown}
    alike = 0
    for unit in shown:
        near = {each.token for each in unit.neighbours}
        assert unit.tokens[0] not in near
        alike += len(near & places)
        assert all(each.start is None for each in unit.neighbours if each.token in places)
    assert alike > len(shown)


def test_a_picture_of_144_tokens_costs_a_few_forwards(passes):
    """The direct effects of all of them together."""
    processor = llava(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    config: Any = toy_images._llava_config(processor)
    config.vision_config.image_size = 48
    model = toy_images._drawn(LlavaForConditionalGeneration(config))
    seen = passes(model)
    explanation = Explainer(model, processor, progress=False).explain([WIDE, TEXT], " red")
    assert explanation.method == "direct"
    assert sum(unit.image == 0 for unit in explanation.units) == 144
    assert explanation.provenance["forwards"] < 8
    assert len(seen) == 1
