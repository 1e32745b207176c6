"""Live citations of pictures: the generation, its scores, and how often the picture is encoded."""

from __future__ import annotations

import pytest
import torch
from test_multimodal import FAMILIES, ONE_STEP, SMALL, TALL, TEXT, WIDE, encoded, mark, seeing
from test_multimodal_methods import towers

from atman_triton import Explainer, generate_explained

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("every", [1, 3])
def test_scores_are_those_of_the_finished_text(name, every):
    model, processor = seeing(name)
    sign = mark(name, processor)
    inputs = encoded(name, processor, f"Look: {sign}{TEXT}", [SMALL])
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    seen = []
    handle = towers(model).register_forward_hook(lambda *_: seen.append(1))
    try:
        live = generate_explained(
            model,
            ["Look: ", SMALL, TEXT],
            tokenizer=processor,
            mode="multiplicative",
            every=every,
            **GREEDY,
        )
        found = list(live)
        explanation = live.explanation()
    finally:
        handle.remove()
    assert len(seen) == 1
    assert [token.token_id for token in found] == expected
    direct = Explainer(
        model, processor, method="direct", mode="multiplicative", progress=False
    ).explain(["Look: ", SMALL, TEXT], expected)
    count = len(explanation.units)
    assert [unit.tokens for unit in explanation.units] == [
        unit.tokens for unit in direct.units[:count]
    ]
    for ours, theirs in (
        (explanation.base_logprobs, direct.base_logprobs),
        (explanation.suppressed_logprobs, direct.suppressed_logprobs[:, :count]),
    ):
        torch.testing.assert_close(ours, theirs, rtol=4 * ONE_STEP, atol=4 * ONE_STEP)
    assert float(explanation.scores.abs().max()) > 1000 * ONE_STEP
    assert explanation.pictures == direct.pictures
    assert explanation.text == direct.text
    share = direct.provenance["negative_scores"]
    assert explanation.provenance["negative_scores"] == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_the_model_may_be_used_between_tokens(name):
    """It keeps how far the positions of its last prompt stand apart."""
    model, processor = seeing(name)
    sign = mark(name, processor)
    inputs = encoded(name, processor, f"{sign}{TEXT}", [WIDE])
    other = encoded(name, processor, f"{sign}{sign}{TEXT}", [TALL, WIDE])
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    live = generate_explained(model, [WIDE, TEXT], tokenizer=processor, every=1, **GREEDY)
    with torch.no_grad():
        model(**other)
        found = []
        for token in live:
            found.append(token.token_id)
            model(**other)
    assert found == expected


@pytest.mark.parametrize("given", [{"units": "2x2"}, {"units": "word", "image_granularity": "2x2"}])
def test_units_are_tiles(given):
    model, processor = seeing("qwen2.5-vl")
    prompt = ["One ", SMALL, "and ", TALL, TEXT]
    live = generate_explained(model, prompt, tokenizer=processor, **given, **GREEDY)
    list(live)
    explanation = live.explanation()
    shown = [unit for unit in explanation.units if unit.image is not None]
    assert {unit.level for unit in shown} == {"tile"}
    assert {unit.image for unit in shown} == {0, 1}
    ids = [target.token_id for target in explanation.targets]
    whole = Explainer(model, processor, method="direct", progress=False).explain(
        prompt, ids, given["units"], image_granularity=given.get("image_granularity")
    )
    count = len(explanation.units)
    torch.testing.assert_close(
        explanation.scores, whole.scores[:, :count], rtol=4 * ONE_STEP, atol=8 * ONE_STEP
    )


def test_messages_with_pictures():
    model, processor = seeing("gemma3")
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<start>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}:"
    )
    content = [{"type": "image", "image": SMALL}, {"type": "text", "text": "hello"}]
    asked = [{"role": "user", "content": content}]
    live = generate_explained(model, asked, tokenizer=processor, **GREEDY)
    assert len(list(live)) == 5
    assert live.explanation().text.startswith("hello:")
    processor.chat_template = None


def test_what_is_refused():
    model, processor = seeing("llava")
    with pytest.raises(ValueError, match=r"^inputs must end with text, got a picture at the end"):
        generate_explained(model, [TEXT, SMALL], tokenizer=processor)
    with pytest.raises(ValueError, match="is of pictures, but the prompt holds none"):
        generate_explained(model, "hello", tokenizer=processor, image_granularity="2x2")
    with pytest.raises(TypeError, match=r"both say how pictures are divided; give one\.$"):
        generate_explained(
            model, [SMALL, TEXT], tokenizer=processor, units="2x2", image_granularity="image"
        )
