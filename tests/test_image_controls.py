"""Controls of pictures: which tokens they reach, and what a model says and explains under them."""

from __future__ import annotations

import pytest
import torch
from test_multimodal import (
    ONE_STEP,
    TALL,
    TEXT,
    WIDE,
    behind,
    encoded,
    logprobs,
    mark,
    noise,
    plain_attention,
    seeing,
)
from toy_models import llama
from toy_processors import llava

from atman_triton import Explainer, ImageControl, TextControl, TokenControl, steer

SOME = ["llava", "qwen2.5-vl"]
NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
LEFT = ImageControl(0.0, 0.0, 0.5, 1.0, 9.0)


def prompt(name, images=(WIDE,), text="{}" + TEXT):
    model, processor = seeing(name)
    sign = mark(name, processor)
    return model, processor, encoded(name, processor, text.format(*[sign] * len(images)), images)


def places(model, inputs):
    """Columns of the image tokens."""
    return (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()


def factors(name, controls, images=(WIDE,), text="{}" + TEXT, read=None):
    """What a prompt gets from controls, ``[P]``, and the columns of its image tokens."""
    model, processor, inputs = prompt(name, images, text)
    given = {"inputs": inputs, "images": list(images)} if read is None else {"inputs": read}
    with torch.no_grad(), steer(model, controls, processor=processor, **given) as found:
        model(**inputs)
    return found[0], places(model, inputs)


@pytest.mark.parametrize("overlap", ["partial", "complete"])
def test_every_token_gets_its_share_of_the_rectangle(overlap):
    """Qwen2.5-VL reads this picture as 7 × 4 equal parts."""
    control = ImageControl(0.2, 0.3, 0.45, 0.5, 3.0, overlap)
    found, columns = factors("qwen2.5-vl", [control])
    expected = torch.ones(len(found), dtype=torch.float64)
    for number, column in enumerate(columns):
        row, place = divmod(number, 7)
        across = max(0.0, min(0.65, (place + 1) / 7) - max(0.2, place / 7)) * 7
        down = max(0.0, min(0.8, (row + 1) / 4) - max(0.3, row / 4)) * 4
        share = across * down if overlap == "partial" else float(across * down > 0)
        expected[column] = 1 + 2.0 * share
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert 4 < int((found != 1).sum()) < 28


def test_edges_that_touch_take_nothing_along():
    """Of 3/7 of a width only rounding lies in the third column of seven."""
    control = ImageControl(3 / 7, 0.25, 2 / 7, 0.25, 2.0, "complete")
    found, columns = factors("qwen2.5-vl", [control])
    assert [column for column in columns if found[column] != 1] == [columns[10], columns[11]]


def test_each_picture_is_named_by_its_number():
    images, text = (WIDE, TALL), "a {} b {} c"
    first, columns = factors("qwen2.5-vl", [ImageControl(0, 0, 1, 1, 2.0)], images, text)
    second, _ = factors("qwen2.5-vl", [ImageControl(0, 0, 1, 1, 2.0, image=1)], images, text)
    reached = [[c for c in range(len(row)) if row[c] != 1] for row in (first, second)]
    assert [*reached[0], *reached[1]] == columns
    assert len(reached[0]) == 28


def test_a_crop_is_where_it_was_cut_out():
    """LLaVA's processor shows the middle 40 of 60 columns."""
    found, columns = factors("llava", [ImageControl(0.0, 0.0, 0.5, 1.0, 2.0)])
    assert [column for column in columns if found[column] != 1] == [
        column for number, column in enumerate(columns) if number % 6 < 3
    ]


@pytest.mark.parametrize("name", SOME)
def test_similar_tokens_are_taken_along(name):
    """In a picture of one colour they are alike, and unlike the text."""
    plain = noise(4, 4).resize((1, 1)).resize((48, 48))
    where = (0, 0, 0.4, 0.4, 3.0, "complete")
    alone, columns = factors(name, [ImageControl(*where)], (plain,))
    along, _ = factors(name, [ImageControl(*where, similarity=0.9)], (plain,))
    assert bool((along >= alone).all())
    more = [column for column in range(len(alone)) if along[column] > alone[column]]
    assert len(more) > 4
    assert set(more) <= set(columns)


# --- generation -----------------------------------------------------------------------------------


def loop(name, model, inputs, factor):
    """Greedy tokens and the first step's logits, each step one eager pass of the whole model."""
    ids: list[int] = []
    with plain_attention(model):
        for _ in range(NEW):
            own = behind(name, inputs, [*ids, 0])
            matrix = torch.ones(own["input_ids"].shape[1])
            matrix[: len(factor)] = factor
            logits = logprobs(model, own, None, matrix.expand(len(matrix), -1))
            ids.append(int(logits[-1].argmax()))
    return ids


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("control", [LEFT, ImageControl(0.2, 0.2, 0.7, 0.7, 0.0)], ids=["9", "0"])
def test_generation_equals_the_loop(name, control):
    model, processor, inputs = prompt(name)
    count = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **GREEDY)[0, count:].tolist()
    given = {"inputs": inputs, "processor": processor, "images": [WIDE]}
    with steer(model, [control], **given) as factor:
        steered = model.generate(**inputs, **GREEDY)[0, count:].tolist()
    assert steered == loop(name, model, inputs, factor[0])
    assert steered != plain
    assert plain == loop(name, model, inputs, torch.ones(count))


@pytest.mark.parametrize("name", SOME)
def test_logits_move_where_the_picture_is_seen(name):
    """Nothing before the picture's first token under control changes."""
    model, processor, inputs = prompt(name, text="Look: {}" + TEXT)
    with torch.no_grad():
        before = model(**inputs).logits[0]
        for factor in (0.1, 4.0):
            control = ImageControl(0.0, 0.5, 1.0, 0.5, factor)
            given = {"inputs": inputs, "processor": processor, "images": WIDE}
            with steer(model, [control], **given) as factors:
                after = model(**inputs).logits[0]
            first = int((factors[0] != 1).nonzero()[0])
            moved = (after - before).abs().amax(-1)
            assert first in places(model, inputs)
            assert float(moved[:first].max()) < 1e-9
            assert float(moved[-1]) > 1e-3


@pytest.mark.parametrize("name", SOME)
def test_a_prompt_as_explain_takes_it(name):
    model, processor, inputs = prompt(name, text="Look: {}" + TEXT)
    controls, form = [LEFT, TextControl(0, 5, 0.2), TokenControl(1, 0.5)], "Look: {}" + TEXT
    found, columns = factors(name, controls, text=form, read=["Look: ", WIDE, TEXT])
    other, _ = factors(name, [LEFT, TokenControl(1, 0.5)], text=form)
    text = found / other
    assert float(text[columns].sub(1).abs().max()) < 1e-6
    assert int((text != 1).sum()) > 0
    match = "the model runs on other tokens than the inputs of steer"
    with (
        pytest.raises(ValueError, match=match),
        steer(model, controls, inputs=["Look: ", WIDE, "Hello"], processor=processor),
    ):
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", ["exact", "direct"])
def test_units_are_suppressed_under_the_controls(name, method):
    model, processor, inputs = prompt(name)
    count = inputs["input_ids"].shape[1]
    controls = [ImageControl(0.1, 0.0, 0.5, 0.6, 3.0), TextControl(0, 6, 0.4)]
    explanation = Explainer(model, processor, method=method, progress=False).explain(
        [WIDE, TEXT], " red", "3x3", controls=controls
    )
    around, _ = factors(name, controls, read=[WIDE, TEXT])
    target = [each.token_id for each in explanation.targets]
    own = behind(name, inputs, target)
    rows = []
    with plain_attention(model):
        for unit in [(), *(unit.tokens for unit in explanation.units)]:
            matrix = torch.ones(own["input_ids"].shape[1]).repeat(own["input_ids"].shape[1], 1)
            matrix[:, :count] = around
            matrix[count - 1 if method == "direct" else 0 :, list(unit)] *= 0.1
            rows.append(logprobs(model, own, target, matrix))
    expected = torch.stack(rows)
    found = torch.cat([explanation.base_logprobs[None], explanation.suppressed_logprobs.T])
    seen = ~found.isnan()
    torch.testing.assert_close(found[seen], expected[seen], rtol=4 * ONE_STEP, atol=4 * ONE_STEP)
    facts = explanation.provenance["controls"]
    assert (facts[0]["kind"], facts[0]["image"], facts[0]["width"]) == ("ImageControl", 0, 0.5)


def test_similar_tokens_cost_no_other_pass_of_the_tower():
    model, processor = seeing("llava")
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    try:
        Explainer(model, processor, progress=False).explain(
            [WIDE, TEXT], " red", controls=[ImageControl(0, 0, 0.5, 0.5, 2.0, similarity=0.5)]
        )
    finally:
        handle.remove()
    assert len(seen) == 1


# --- what is refused ------------------------------------------------------------------------------


def refused(match, controls=(LEFT,), **changes):
    model, processor, inputs = prompt("llava")
    given = {"inputs": inputs, "processor": processor, "images": [WIDE]} | changes
    with pytest.raises(ValueError, match=match), steer(model, list(controls), **given):
        pass


def test_what_an_image_control_needs():
    needs = r"needs the places of the image's tokens, but .* pass processor= and images="
    refused(needs, processor=None, images=None)
    refused("^images= needs processor= too", processor=None)
    refused("^processor= needs images= too", images=None)
    refused(r"must hold 72 image tokens", images=[WIDE, TALL])
    refused(
        "needs an image in the prompt, which holds 1 of", [ImageControl(0, 0, 1, 1, 2, image=1)]
    )
    refused("takes in no token of the image", [ImageControl(0.0, 0.0, 0.1, 1.0, 2.0)])


def test_one_prompt_at_a_time():
    model, processor, inputs = prompt("llava")
    twice = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    with (
        pytest.raises(ValueError, match=r"^images= are of one prompt, .* got 2 prompts"),
        steer(model, [LEFT], inputs=twice, processor=processor, images=[WIDE]),
    ):
        pass
    with (
        pytest.raises(TypeError, match=r"^images are in the inputs already"),
        steer(model, [LEFT], inputs=[WIDE, TEXT], processor=processor, images=[WIDE]),
    ):
        pass


def test_a_text_has_no_image():
    model, processor = seeing("llava")
    match = "needs an image in the prompt, which holds 0 of"
    with pytest.raises(ValueError, match=match):
        Explainer(model, processor).explain("Hello", " there", controls=[LEFT])
    with (
        pytest.raises(ValueError, match="prompt holds a picture, for which"),
        steer(llama(), [LEFT], inputs=[WIDE, TEXT], tokenizer=llava().tokenizer),
    ):
        pass


def test_the_number_of_a_picture():
    with pytest.raises(ValueError, match=r"^image must be at least 0, got -1\.$"):
        ImageControl(0, 0, 1, 1, 2.0, image=-1)
    with pytest.raises(TypeError, match=r"^image must be an int, got 0\.5\.$"):
        ImageControl(0, 0, 1, 1, 2.0, image=0.5)
