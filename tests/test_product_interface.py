"""Every parameter of the authors' product interface, beside ours: what each means, one test each.

Names in section titles are those of its client: an explanation request, a completion request, and
the items and controls that prompts of either are made of.
"""

import math
from itertools import pairwise

import pytest
import torch
from toy_images import seeing
from toy_models import llama, plain_logits, plain_loop
from toy_processors import noisy
from toy_tokenizers import byte_level

import atman_triton as atman
from atman_triton.demo import load_demo_model

TEXT = "The pay per hour is 23 euros. The notice period is four weeks."
TARGET = " hello there"
PARTS = "The pay is 23.\n\nQ: What is it? A: 23###The notice is long. Q: What is it? A: long"


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def ids(text):
    return byte_level()(text)["input_ids"]


def explain(prompt=TEXT, target=TARGET, *more, explainer=None, **arguments):
    settings = {"method": "exact", "progress": False} | (explainer or {})
    return atman.Explainer(llama(), byte_level(), **settings).explain(
        prompt, target, *more, **arguments
    )


def by_hand(units, factor, mode, prompt=TEXT, target=TARGET):
    """Relevance of units, each the positions of its tokens: one eager forward per unit."""
    target_ids = ids(target)
    rows = plain_loop(llama(), ids(prompt) + target_ids[:-1], target_ids, units, factor, mode)
    return (rows[0] - rows[1:]).mean(-1)


def in_prompt(explanation):
    """The units of the prompt with their relevance."""
    pairs = zip(explanation.units, explanation.relevance.tolist(), strict=True)
    return [(unit, value) for unit, value in pairs if unit.part == "prompt"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- explanation: prompt, target ----------------------------------------------------------------


def test_prompt_items_are_text_or_token_ids():
    text, tokens = explain(), explain(ids(TEXT), ids(TARGET))
    close(text.relevance, tokens.relevance)
    assert [unit.tokens for unit in text.units] == [unit.tokens for unit in tokens.units]
    start = TEXT.index(" pay")
    assert any((u.text, u.start, u.stop) == (" pay", start, start + 4) for u in text.units)


def test_a_prompt_item_that_is_an_image_is_refused_by_a_text_model():
    with pytest.raises(TypeError, match="prompt must hold integer token ids"):
        explain([TEXT, torch.zeros(3, 4, 4)])


def test_prompt_items_may_be_images():
    """Text, image, text: each image token is a unit with its place in the picture."""
    model, processor = seeing("llava")
    picture = noisy((24, 24))
    explainer = atman.Explainer(model, processor, progress=False)
    explanation = explainer.explain(["Look: ", picture, "is a"], " there")
    patches = [unit for unit in explanation.units if unit.image == 0]
    assert len(patches) > 1
    assert all(len(unit.boxes) == 1 for unit in patches)
    assert explanation.pictures[0].start == len("Look: ")
    assert explanation.text.startswith("Look: is a")


def test_the_target_is_explained_too_by_what_comes_before():
    explanation = explain()
    assert explanation.targets[-1].text == " there"
    assert explanation.text == TEXT + TARGET
    late = [unit for unit in explanation.units if unit.part == "target"]
    assert late and math.isnan(explanation.scores[0, explanation.units.index(late[-1])])


# --- explanation: control_factor, control_log_additive ------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("mode", ["log_additive", "min_shift"])
def test_control_factor_is_the_factor_of_the_suppressed_unit(factor, mode):
    if mode == "log_additive" and factor == 0.0:
        factor = 0.01  # the first token alone would leave a row without keys
    explanation = explain(explainer={"factor": factor, "mode": mode})
    units = [unit.tokens for unit in explanation.units if unit.part == "prompt"]
    values = torch.tensor([value for _, value in in_prompt(explanation)])
    close(values, by_hand(units, factor, mode))


def test_control_factor_defaults_to_a_tenth():
    assert explain().provenance["factor"] == 0.1


def test_control_log_additive_adds_the_logarithm_or_multiplies_shifted_scores():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 16, generator=generator) for _ in range(3))
    factor = torch.tensor([[1.0, 0.1, 1.0, 3.0, 0.5]])
    scores = query @ key.transpose(2, 3) / 4
    added = scores + factor.log()  # True, its default
    shifted = (scores - scores.amin(-1, keepdim=True)) * factor  # False
    for mode, expected in (("log_additive", added), ("min_shift", shifted)):
        out = atman.attention(query, key, value, factor, mode=mode)
        close(out, expected.softmax(-1) @ value)


# --- explanation: contextual_control_threshold --------------------------------------------------


def test_contextual_control_threshold_takes_similar_tokens_along():
    """At 1, equal tokens: suppressed together with the unit, in the target too."""
    repeated = "hello world, hello there"
    alone = explain(repeated, explainer={"mode": "min_shift"})
    along = explain(repeated, explainer={"mode": "min_shift", "similarity": 1.0})
    tokens = ids(repeated) + ids(TARGET)[:-1]
    pairs = zip(in_prompt(alone), in_prompt(along), strict=True)
    for (_, before), (unit, value) in pairs:
        (own,) = unit.tokens
        equal = [place for place, token in enumerate(tokens) if token == tokens[own]]
        (expected,) = by_hand([equal], 0.1, "min_shift", repeated).tolist()
        assert value == pytest.approx(expected, abs=1e-5)
        assert (abs(value - before) < 1e-6) == (len(equal) == 1)
    assert len(set(tokens)) < len(tokens)


# --- explanation: postprocessing, normalize, target_granularity -----------------------------------


def test_postprocessing_of_every_score():
    plain = explain(postprocessing="none")
    scores = plain.scores.double()
    for how, expected in (("absolute", scores.abs()), ("square", scores.square())):
        close(explain(postprocessing=how).relevance.double(), expected.nanmean(0))
    close(plain.relevance.double(), scores.nanmean(0))


def test_normalize_after_postprocessing():
    squared = explain(postprocessing="square").relevance
    found = explain(postprocessing="square", normalize=True).relevance
    close(found, (squared - squared.min()) / (squared.max() - squared.min()))
    assert (float(found.min()), float(found.max())) == (0, 1)


# --- explanation: prompt_granularity, target_granularity ----------------------------------------


def pieces(granularity, prompt=PARTS, **arguments):
    """The texts of the prompt's units; each is where it says, and together they are the prompt."""
    found = [unit for unit, _ in in_prompt(explain(prompt, TARGET, granularity, **arguments))]
    assert all(prompt[unit.start : unit.stop] == unit.text for unit in found)
    assert "".join(unit.text for unit in found) == prompt
    return [unit.text.strip() for unit in found]


def test_prompt_granularity_by_name():
    tokens, found = ids(PARTS), explain(PARTS)
    assert [unit.tokens for unit, _ in in_prompt(found)] == [(i,) for i in range(len(tokens))]
    assert pieces("word", "Hello world, hello.") == ["Hello", "world,", "hello."]
    assert pieces("sentence", "The pay is 23. It is long. Hello") == [
        "The pay is 23.",
        "It is long.",
        "Hello",
    ]
    assert pieces("paragraph", "The pay.\n\nThe notice. Hello") == ["The pay.", "The notice. Hello"]


def test_prompt_granularity_with_a_custom_delimiter():
    """Between the examples of a few-shot prompt; a delimiter goes with what it ends."""
    shots = "The pay is 23.###The notice is four weeks.###hello"
    found = pieces(atman.Delimiter("###"), shots)
    assert found == ["The pay is 23.###", "The notice is four weeks.###", "hello"]


def test_a_unit_of_any_granularity_is_suppressed_as_one():
    found = explain(PARTS, TARGET, "sentence")
    values = torch.tensor([value for _, value in in_prompt(found)])
    close(values, by_hand([unit.tokens for unit, _ in in_prompt(found)], 0.1, "min_shift", PARTS))


def test_without_a_granularity_about_thirty_units():
    """The interface's default, ours by name: what comes closest to 30 units."""
    short, long = "The pay per hour is 23 euros.", " ".join(["The pay is 23."] * 12)
    levels = ("token", "word", "sentence", "paragraph")
    for prompt, most in ((short, None), (long, None), (long, 10)):
        counts = {level: len(pieces(level, prompt)) for level in levels}
        wanted = {} if most is None else {"max_units": most}
        chosen = explain(prompt, TARGET, "auto", **wanted)
        closest = min(levels, key=lambda level: abs(counts[level] - (most or 30)))
        assert chosen.provenance["level"] == closest
        assert len(in_prompt(chosen)) == counts[closest]


def test_target_granularity():
    complete = explain(target_granularity="complete")
    assert [part.text for part in complete.parts] in ([], [TARGET])
    close(complete.relevance, complete.scores.nanmean(0))
    by_token = explain(target_granularity="token")
    assert [part.text for part in by_token.parts] == [target.text for target in by_token.targets]
    torch.testing.assert_close(by_token.scores, complete.scores, equal_nan=True)


# --- completion, and explanation, under controls ----------------------------------------------


def factors(controls, prompt="soccer is fun", **arguments):
    """The factor that each token of a prompt gets, and the tokens."""
    inputs = byte_level()(prompt, return_tensors="pt")
    model = llama()
    with atman.steer(model, controls, inputs=inputs, **arguments) as found:
        model(**inputs)
    return found[0].tolist(), inputs["input_ids"][0].tolist()


def spans(prompt):
    """Each token's characters, its leading space among them."""
    stops = [0]
    for token in ids(prompt):
        stops.append(stops[-1] + len(byte_level().decode([token])))
    return list(pairwise(stops))


@pytest.mark.parametrize("factor", [0.1, 2.0])
def test_text_controls_count_characters(factor):
    prompt, first, end = "hello world", 2, 8
    shares = [
        max(0, min(stop, end) - max(start, first)) / (stop - start) for start, stop in spans(prompt)
    ]
    assert 1.0 in shares and any(0 < share < 1 for share in shares)
    found, _ = factors([atman.TextControl(first, end - first, factor)], prompt)
    assert found == pytest.approx([1 + (factor - 1) * share for share in shares])


def test_control_token_overlap_is_partial_or_complete():
    """The interface's own example: 2.0 on two of a token's four characters is 1.5."""
    prompt = "hello world, The pay"
    (index,) = (i for i, span in enumerate(spans(prompt)) if prompt[slice(*span)] == " pay")
    start = spans(prompt)[index][0]
    found = factors([atman.TextControl(start, 2, 2.0)], prompt)[0]
    assert found == [1.5 if place == index else 1.0 for place in range(len(found))]
    found = factors([atman.TextControl(start, 2, 2.0, overlap="complete")], prompt)[0]
    assert found == [2.0 if place == index else 1.0 for place in range(len(found))]


def test_token_controls_count_tokens():
    found, tokens = factors([atman.TokenControl(1, 0.5), atman.TokenControl(2, 3.0)])
    assert found == [1.0, 0.5, 3.0] + [1.0] * (len(tokens) - 3)


def test_image_controls_are_rectangles_in_shares_and_need_an_image():
    control = atman.ImageControl(0.25, 0.5, 0.5, 0.5, 0.1)
    assert (control.left, control.top, control.width, control.height) == (0.25, 0.5, 0.5, 0.5)
    assert (control.factor, control.overlap) == (0.1, "partial")
    with pytest.raises(ValueError, match="end within the image"):
        atman.ImageControl(0.0, 0.5, 0.5, 0.6, 0.1)
    with pytest.raises(ValueError, match="needs an image in the prompt"):
        factors([control])


def test_image_controls_take_in_the_tokens_of_their_rectangle():
    """The left half of a picture: tokens that lie there get the factor, those cut by it a share."""
    model, processor = seeing("llava")
    picture = noisy((24, 24))
    explainer = atman.Explainer(model, processor, progress=False)
    boxes = {
        u.tokens[0]: u.boxes[0] for u in explainer.explain([picture, "is"], " a").units if u.boxes
    }
    for overlap in ("partial", "complete"):
        control = atman.ImageControl(0.0, 0.0, 0.5, 1.0, 0.1, overlap)
        prompt = [picture, "is a"]
        with atman.steer(model, [control], inputs=prompt, processor=processor) as found:
            model(**processor(text="<image>is a", images=picture, return_tensors="pt"))
        for token, (left, _, width, _) in boxes.items():
            share = max(0.0, min(12.0, left + width) - left) / width
            share = float(share > 0) if overlap == "complete" else share
            assert found[0, token] == pytest.approx(1 - 0.9 * share)


def test_contextual_control_threshold_in_completion():
    prompt = "hello world, hello there, hello"
    tokens = byte_level()(prompt)["input_ids"]
    twice = next(t for t in tokens if tokens.count(t) > 1)
    found, _ = factors([atman.TokenControl(tokens.index(twice), 0.25, similarity=1.0)], prompt)
    assert found == [0.25 if token == twice else 1.0 for token in tokens]
    alone, _ = factors([atman.TokenControl(tokens.index(twice), 0.25)], prompt)
    assert alone.count(0.25) == 1


@pytest.mark.parametrize("mode", ["log_additive", "min_shift"])
def test_control_log_additive_in_completion(mode):
    """One forward pass under a control against a modifier matrix in plain attention."""
    model, tokens = llama(), ids("hello world, hello there")
    matrix = torch.ones(len(tokens), len(tokens))
    matrix[:, 2] = 3.0
    expected = plain_logits(model, tokens, matrix, mode)
    inputs, control = torch.tensor([tokens]), atman.TokenControl(2, 3.0)
    with torch.no_grad(), atman.steer(model, [control], inputs=inputs, mode=mode):
        close(model(inputs).logits[0], expected)


def test_a_completion_keeps_its_controls(demo):
    """Suppressing the sentence that was used, or amplifying the other, changes what is written."""
    model, tokenizer = demo
    text = "The team is led by David Schmidt. Daily instructions are given by Ida Abel. "
    text += "The substitute is Clara Becker. Q: Whose orders must be followed? A:"
    inputs = tokenizer(text, return_tensors="pt")

    def complete(*controls):
        with atman.steer(model, controls, inputs=inputs, mode="min_shift"):
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    first, second = text.index("The team"), text.index(" Daily")
    length = text.index(" The substitute") - second
    said = complete(atman.TokenControl(0, 1.0))
    places = {" David Schmidt": (first, second - first), " Ida Abel": (second, length)}
    other = next(answer for answer in places if answer != said)
    assert said in places
    assert complete(atman.TextControl(*places[said], factor=0.1)) == other
    assert complete(atman.TextControl(*places[other], factor=1.5)) == other
    assert complete(atman.TextControl(*places[said], factor=1.0)) == said


def test_controls_in_an_explanation():
    """What the steered model says is explained: factors of unit and control multiply."""
    control = atman.TokenControl(2, 3.0)
    explainer = {"mode": "log_additive"}
    found = explain(explainer=explainer, controls=[control])
    prompt, target = ids(TEXT), ids(TARGET)
    tokens = prompt + target[:-1]
    (unit,) = found.units[1].tokens
    rows = []
    for suppressed in (1.0, 0.1):
        matrix = torch.ones(len(tokens), len(tokens))
        matrix[:, 2] = 3.0
        matrix[:, unit] *= suppressed
        logprobs = plain_logits(llama(), tokens, matrix, "log_additive").log_softmax(-1)
        rows.append(logprobs[-len(target) :][range(len(target)), target])
    close(found.base_logprobs, rows[0])
    close(found.scores[:, 1], rows[0] - rows[1])
