"""Mllama, whose text attends to pictures beside it, against one full forward per unit."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from site_oracle import oracle_logits
from test_multimodal import SMALL, TARGET, TEXT
from toy_images import seeing as built

from atman_triton import Explainer, ImageControl, TokenControl, generate_explained, steer
from atman_triton.multimodal import PADDING
from atman_triton.stacks import UnsupportedModelError
from atman_triton.tasks import task_of
from atman_triton.tokens import SPECIAL

ROUNDING = 1e-5  # parts of the model's own code are float32


@cache
def mllama():
    """With gates that let what it sees through; they begin shut."""
    model, processor = built("mllama")
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
    return model, processor


def prompt():
    model, processor = mllama()
    text = f"Look: <|image|>{TEXT}"
    inputs = dict(processor(text=[text], images=[[SMALL]], return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    return model, processor, inputs


def test_it_is_read_as_the_processor_does():
    model, processor, inputs = prompt()
    found = task_of(model, processor).read(["Look: ", SMALL, TEXT])
    shown = [area for area in found.words.areas if area is not None]
    text = found.words.ids[len(shown) :]
    assert text == inputs["input_ids"][0].tolist()
    assert found.words.text == f"Look: {TEXT}"
    assert found.words.areas[len(shown) :] == [None] * len(text)
    assert found.words.reasons[len(shown) + text.index(model.config.image_token_id)] == SPECIAL
    why = [found.words.reasons[k] for k, area in enumerate(shown) if area.view == "padding"]
    assert why
    assert set(why) == {PADDING}


def reference(model, inputs, target, units, images, around=1.0):
    """``[1 + U, T]``, of passes of the whole model, tower and all, under factors of the prompt."""
    more = torch.tensor([target[:-1]])
    own = dict(inputs)
    own["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    own["attention_mask"] = torch.ones_like(own["input_ids"])
    asks = inputs["cross_attention_mask"]
    last = asks[:, -1:].expand(-1, more.shape[1], -1, -1)
    own["cross_attention_mask"] = torch.cat([asks, last], 1)
    rows = []
    for tokens in [(), *units]:
        factor = torch.ones(1, images + own["input_ids"].shape[1])
        factor[0, : images + inputs["input_ids"].shape[1]] *= around
        factor[0, list(tokens)] *= 0.1
        parts = {"image": factor[:, :images], "decoder": factor[:, images:]}
        logits = oracle_logits(model, own, parts, "min_shift")[0, -len(target) :]
        rows.append(logits.log_softmax(-1)[range(len(target)), target].float())
    return torch.stack(rows)


@pytest.mark.parametrize("granularity", ["token", "2x2"])
def test_equals_the_plain_loop(granularity):
    model, processor, inputs = prompt()
    towers = []
    handle = model.model.vision_model.register_forward_hook(lambda *_: towers.append(1))
    try:
        explanation = Explainer(model, processor, progress=False).explain(
            ["Look: ", SMALL, TEXT], TARGET, granularity
        )
    finally:
        handle.remove()
    assert len(towers) == 1
    assert explanation.method == "exact"
    images = len(task_of(model, processor).read(["Look: ", SMALL, TEXT]).words)
    images -= inputs["input_ids"].shape[1]
    target = [each.token_id for each in explanation.targets]
    units = [unit.tokens for unit in explanation.units]
    expected = reference(model, inputs, target, units, images)
    found = torch.cat([explanation.base_logprobs[None], explanation.suppressed_logprobs.T])
    seen = ~found.isnan()
    torch.testing.assert_close(found[seen], expected[seen], rtol=ROUNDING, atol=ROUNDING)
    shown = [k for k, unit in enumerate(explanation.units) if unit.image == 0]
    assert float(explanation.scores[:, shown].abs().max()) > 100 * ROUNDING
    assert any(explanation.units[k].boxes for k in shown)


def test_units_are_suppressed_under_the_controls():
    model, processor, inputs = prompt()
    controls = [ImageControl(0.0, 0.0, 0.5, 1.0, 4.0, "complete"), TokenControl(0, 0.3)]
    asked = ["Look: ", SMALL, TEXT]
    words = task_of(model, processor).read(asked).words
    images = len(words) - inputs["input_ids"].shape[1]
    around = torch.ones(len(words))
    around[0] = 0.3
    for k, area in enumerate(words.areas):
        if area is not None and area.box is not None and area.box[0] < 0.5 * SMALL.width - 1e-6:
            around[k] *= 4.0
    explanation = Explainer(model, processor, progress=False).explain(
        asked, " red", "2x2", controls=controls
    )
    target = [each.token_id for each in explanation.targets]
    units = [unit.tokens for unit in explanation.units]
    expected = reference(model, inputs, target, units, images, around)
    found = torch.cat([explanation.base_logprobs[None], explanation.suppressed_logprobs.T])
    seen = ~found.isnan()
    torch.testing.assert_close(found[seen], expected[seen], rtol=ROUNDING, atol=ROUNDING)
    plain = Explainer(model, processor, progress=False).explain(asked, " red", "2x2")
    assert float((plain.base_logprobs - found[0]).abs().max()) > 100 * ROUNDING


def test_several_targets_are_as_each_alone():
    model, processor, _ = prompt()
    explainer = Explainer(model, processor, progress=False)
    names = [" red", " pay per hour", " is"]
    together = explainer.explain([SMALL, TEXT], targets=names, granularity="image")
    for k, name in enumerate(names):
        alone = explainer.explain([SMALL, TEXT], name, "image")
        torch.testing.assert_close(
            together.branch(k).scores, alone.scores, rtol=ROUNDING, atol=ROUNDING, equal_nan=True
        )


def test_its_own_answer_and_a_passage_of_it():
    model, processor, inputs = prompt()
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    written = written[0, inputs["input_ids"].shape[1] :].tolist()
    explainer = Explainer(model, processor, progress=False)
    explanation = explainer.explain(["Look: ", SMALL, TEXT], max_new_tokens=4)
    found = [target.token_id for target in explanation.targets]
    assert found == written[: len(found)]
    whole = explainer.explain([SMALL, TEXT], TARGET, "image")
    part = explainer.explain([SMALL, TEXT], TARGET, "image", target_span="circle")
    count = len(part.targets)
    torch.testing.assert_close(
        part.base_logprobs, whole.base_logprobs[-count:], rtol=ROUNDING, atol=ROUNDING
    )


def test_text_alone_is_text():
    model, processor, _ = prompt()
    explanation = Explainer(model, processor, progress=False).explain("Hello world", " there")
    assert {unit.level for unit in explanation.units} == {"token"}


def test_live_scores_are_refused():
    model, processor = mllama()
    match = "share the prompt's keys and values, but Mllama.* attends to pictures beside its prompt"
    with pytest.raises(UnsupportedModelError, match=match):
        generate_explained(model, [SMALL, TEXT], tokenizer=processor)


def test_steering_of_its_pictures_is_refused():
    model, processor, inputs = prompt()
    given = {"inputs": inputs, "processor": processor, "images": [SMALL]}
    with (
        pytest.raises(UnsupportedModelError, match="It reads images beside the prompt"),
        steer(model, [ImageControl(0, 0, 1, 1, 2.0)], **given),
    ):
        pass
