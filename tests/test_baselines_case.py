"""Cases of baselines against plain forward passes of prompts that were shortened by hand.

Models are float64 and results float32, so they differ by roundings of float32 alone.
"""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES as TEXT_FAMILIES
from PIL import Image
from seq2seq_models import t5
from test_multimodal import FAMILIES as SEEING_FAMILIES
from test_multimodal import SMALL, WIDE, behind, encoded, mark, noise
from toy_images import seeing
from toy_models import in_float64, llama
from toy_tokenizers import byte_level

from atman_triton import Explainer, memory
from atman_triton.baselines import Case, painting
from atman_triton.baselines.painting import images_of, mean_colour, with_images
from atman_triton.pieces import Unit
from atman_triton.stacks import UnsupportedModelError
from atman_triton.tasks import task_of

ONE_STEP = torch.finfo(torch.float32).eps
PROMPT, TARGETS = [5, 17, 33, 60, 21, 44, 9, 80, 71], [[12, 55, 3], [8]]
REMOVED: list[Any] = [[], {0}, {3}, {1, 2, 5}, range(9), [8], range(7), {3}, {2, 7}]
seeing = cache(seeing)


@cache
def family(name):
    return TEXT_FAMILIES[name].build()


def case_of(model, prompt=None, targets=None, **more):
    """A text, every token of it a unit."""
    prompt = PROMPT if prompt is None else prompt
    units = [Unit(str(token), (place,), None, None, "prompt") for place, token in enumerate(prompt)]
    task = task_of(model)
    return Case(task, task.read(prompt), TARGETS if targets is None else targets, units, **more)


@torch.no_grad()
def alone(model, ids, target, **inputs):
    """Log-probabilities ``[T]`` of a target behind ids, by themselves."""
    read = torch.tensor([[*ids, *target[:-1]]])
    logits = model(input_ids=read, use_cache=False, **inputs).logits[0, -len(target) :]
    return logits.double().log_softmax(-1)[range(len(target)), target]


def shortened(model, removed, targets=None, nothing=1, context=()):
    """``[N, M]``: each shortened text by itself."""
    rows = []
    for units in removed:
        ids = [token for place, token in enumerate(PROMPT) if place not in units] or [nothing]
        own = [alone(model, [*ids, *context], target) for target in targets or TARGETS]
        rows.append(torch.cat(own))
    return torch.stack(rows)


def assert_close(found, expected, steps=8.0):
    """Equal up to some roundings of float32."""
    assert found.shape == expected.shape
    step = steps * ONE_STEP
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=step, atol=step)


# --- text taken out ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_removed_text_is_never_read(name):
    """Mixed lengths in one batch, whatever tells positions: rotary, learned, ALiBi, windows."""
    model = family(name)
    found = case_of(model).without(REMOVED)
    expected = shortened(model, REMOVED)
    rounding = TEXT_FAMILIES[name].rounding
    torch.testing.assert_close(
        found.double(), expected, rtol=8 * ONE_STEP, atol=max(rounding, 2e-6)
    )
    assert float((expected - expected[0]).abs().max()) > 0.01


def test_units_of_many_tokens_and_a_context_in_front_of_the_answer():
    model = in_float64("llama")
    task = task_of(model)
    units = [Unit("", tokens, None, None, "prompt") for tokens in ((0, 1, 2), (3,), (4, 5, 6, 8))]
    case = Case(task, task.read(PROMPT), TARGETS, units, context=[40, 41])
    removed = [[0], [1, 2], [0, 1, 2]]
    tokens = [[place for unit in each for place in units[unit].tokens] for each in removed]
    assert_close(case.without(removed), shortened(model, tokens, context=[40, 41]))
    assert case.length(0) == len(PROMPT) + 2 + 2


def test_an_empty_prompt_has_one_token_that_says_nothing(monkeypatch):
    model = in_float64("gpt2")
    whole = [range(len(PROMPT))]
    for names, expected in (({"bos_token_id": 7}, 7), ({"eos_token_id": [9, 8]}, 9)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            monkeypatch.setattr(model.config, name, names.get(name))
        found = case_of(model).without(whole)
        assert_close(found, shortened(model, whole, nothing=expected))
    monkeypatch.setattr(model.config, "eos_token_id", None)
    with pytest.raises(ValueError, match="names no start, end or padding token"):
        case_of(model).without(whole)


def test_logits_and_odds_of_shortened_texts():
    model, target = in_float64("llama"), [12, 55]
    case = case_of(model, targets=[target])
    removed = [[2], [3, 4]]
    for output in ("logit", "odds"):
        found = case.without(removed, output)
        for row, units in zip(found, removed, strict=True):
            ids = [token for place, token in enumerate(PROMPT) if place not in units]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*ids, 12]])).logits[0, -2:]
            own = logits[range(2), target]
            if output == "odds":
                p = logits.softmax(-1)[range(2), target]
                own = (p / (1 - p)).log()
            assert_close(row, own, 64)


def test_odds_of_what_is_all_but_certain():
    """log p is 0 in float32; the odds still tell."""
    case = case_of(in_float64("llama"), targets=[[12]])
    logits = torch.zeros(1, 1, 512)
    logits[..., 12] = 40.0
    assert float(case.scored(logits, 0)) == 0.0
    expected = 40 - torch.tensor(511.0).log()
    torch.testing.assert_close(case.scored(logits, 0, "odds")[0, 0], expected)


def test_batches_change_nothing(monkeypatch):
    model = in_float64("llama")
    expected = case_of(model).without(REMOVED)
    for tokens in (1, 25, 60):
        monkeypatch.setattr(memory, "tokens_per_batch", lambda device, most=tokens: most)
        case = case_of(model)
        assert_close(case.without(REMOVED), expected)
        assert max(case.record.batch_sizes) <= max(1, tokens // 3)
    monkeypatch.setattr(memory, "free_memory", lambda model: 0)
    case = case_of(model)
    assert_close(case.without(REMOVED), expected)
    assert set(case.record.batch_sizes) == {1}


def test_what_does_not_fit_is_halved(monkeypatch):
    model = in_float64("llama")
    case = case_of(model)
    expected, sizes = case.without(REMOVED), []
    plain, fits = model.forward, 3

    def small(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    before = case.record.tokens
    assert_close(case.without(REMOVED), expected)
    assert case.record.tokens - before == sum(
        (len(PROMPT) - len(set(units)) or 1) * 2 + 2
        for units in {frozenset(each) for each in REMOVED}
    )
    assert max(sizes) > fits
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        case.without(REMOVED)


def test_what_is_run_is_counted():
    expected, done = [], []
    case = case_of(in_float64("llama"), expect=expected.append, advance=done.append)
    assert case.record.tokens == (9 + 2) + 9
    case.without([{0}, {1, 2}, {0}])  # the third is the first
    assert case.record.tokens == 20 + (8 + 7) * 2 + 2 * 2
    case.values(1, case.embeddings(1).repeat(3, 1, 1))
    assert case.record.tokens == 54 + 3 * 9
    case.count(3, 9, backward=True)
    assert case.record.tokens == 81 + 2 * 3 * 9 and case.record.backward_runs == 3
    assert case.forwards == 135 / 9
    assert sum(expected) == 54 and sum(done) == 135
    assert case.record.seconds > 0


def test_nothing_asked_gives_nothing():
    case = case_of(in_float64("llama"))
    assert case.without([]).shape == case.hidden([]).shape == (0, 4)


# --- text hidden from attention -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_hidden_text_is_seen_by_no_token(name):
    model = family(name)
    removed = [[], {3}, {0}, {1, 2, 5}, {8}, range(7)]
    found = case_of(model).hidden(removed)
    rows = []
    for units in removed:
        own = []
        for target in TARGETS:
            length = len(PROMPT) + len(target) - 1
            seen = torch.ones(length, length).tril().bool()
            seen[:, list(units)] = False
            shown = torch.where(seen, 0.0, torch.finfo(torch.float32).min).double()
            mask = {"attention_mask": shown[None, None]}
            own.append(alone(model, PROMPT, target, **mask))
        rows.append(torch.cat(own))
    expected = torch.stack(rows)
    assert_close(found, expected)
    assert float((expected - expected[0]).abs().max()) > 0.01


# --- other embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_FAMILIES)
@torch.no_grad()
def test_the_own_embeddings_of_a_text_give_what_it_gives(name):
    case = case_of(family(name))
    found = [case.values(k, case.embeddings(k), "logprob")[0] for k in range(2)]
    rounding = TEXT_FAMILIES[name].rounding
    torch.testing.assert_close(
        torch.cat(found).float(), case.base_logprobs, rtol=8 * ONE_STEP, atol=max(rounding, 2e-6)
    )
    others = case.values(0, case.embeddings(0).flip(1), "logprob")[0]
    assert float((others - found[0]).abs().max()) > 0.01
    logits = case.values(0, case.embeddings(0), "logit")[0]
    assert float((logits - found[0]).abs().min()) > 0.001


@pytest.mark.parametrize("name", SEEING_FAMILIES)
@torch.no_grad()
def test_the_own_embeddings_of_pictures_give_what_they_give(name):
    case, _ = seen(name)
    found = [case.values(k, case.embeddings(k), "logprob")[0] for k in range(2)]
    assert_close(torch.cat(found).float(), case.base_logprobs)
    own = case.embeddings(0)
    for place in (case.units[0].tokens[0], case.prompt_tokens - 1):  # of a picture, of the text
        changed = own.clone()
        changed[0, place] *= -1
        assert float((case.values(0, changed, "logprob")[0] - found[0]).abs().max()) > 1e-4


def test_values_have_slopes_where_these_are_asked_for():
    """The gradient along a direction is what a small step along it changes."""
    case = case_of(family("gpt2"))
    own = case.embeddings(0)
    step = torch.randn(own.shape, dtype=own.dtype, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        point = own.clone().requires_grad_()
        (slope,) = torch.autograd.grad(case.values(0, point)[0].sum(), point)
    small = 1e-5
    with torch.no_grad():
        there, back = (case.values(0, own + sign * small * step)[0].sum() for sign in (1, -1))
        assert not case.values(0, point).requires_grad
    torch.testing.assert_close(
        (slope * step).sum(), (there - back) / (2 * small), rtol=1e-6, atol=0
    )


# --- pictures -------------------------------------------------------------------------------------


@cache
def seen(name):
    """A case with two pictures, and the model."""
    model, processor = seeing(name)
    prompt = [WIDE, "This is", SMALL, " a picture of"]
    explainer = Explainer(model, processor, progress=False)
    explanation = explainer.explain(prompt, targets=[" red circle", "x"])
    return Case.of(model, processor, prompt, explanation), model


def painted(images, case, units):
    """The pictures, written over as arrays; a pixel belongs to the box that holds its centre."""
    arrays = [np.asarray(image).copy() for image in images]
    means = [np.rint(each.astype(float).mean((0, 1))) for each in arrays]
    for unit in units:
        for left, top, width, height in case.units[unit].boxes:
            image = case.units[unit].image
            y, x = np.mgrid[: arrays[image].shape[0], : arrays[image].shape[1]] + 0.5
            inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
            arrays[image][inside] = means[image]
    return [Image.fromarray(each) for each in arrays]


def texts_and_patches(case):
    """Units of the text, and of the pictures those with a place."""
    own = case.units
    text = [unit for unit in case.removable if own[unit].image is None]
    return text, [unit for unit in case.removable if own[unit].boxes]


@pytest.mark.parametrize("name", SEEING_FAMILIES)
def test_patches_are_painted_and_text_is_deleted(name):
    case, model = seen(name)
    text, patches = texts_and_patches(case)
    removed = [
        [],
        [patches[0]],
        patches[3:9] + patches[-2:],
        [text[1]],
        [text[2], patches[4]],
        text[:3],
        text,
        text[1:3] + patches,
    ]
    found = case.without(removed)
    processor = case.task.processor
    written = f"{mark(name, processor)}This is{mark(name, processor)} a picture of"
    rows = []
    for units in removed:
        inputs = encoded(name, processor, written, painted([WIDE, SMALL], case, units))
        gone = {place for unit in set(units) & set(text) for place in case.units[unit].tokens}
        stay = [place for place in range(case.prompt_tokens) if place not in gone]
        cut = {
            key: value[:, stay] if value.shape[:2] == (1, case.prompt_tokens) else value
            for key, value in inputs.items()
        }
        own = []
        for target in case.targets:
            with torch.no_grad():
                logits = model(**behind(name, cut, list(target)), use_cache=False).logits
            own.append(logits[0, -len(target) :].log_softmax(-1)[range(len(target)), target])
        rows.append(torch.cat(own))
    expected = torch.stack(rows)
    assert_close(found, expected)
    assert_close(found[0], case.base_logprobs)
    assert float((expected[1:] - expected[0]).abs().amax(1).min()) > 100 * ONE_STEP


def test_painted_pictures_go_through_the_model_together_and_are_encoded_once(monkeypatch):
    case, model = seen("llava")
    text, patches = texts_and_patches(case)
    expected = case.without([[patch] for patch in patches[:6]])
    encoder, encodings = model.model.vision_tower, []
    hook = encoder.register_forward_pre_hook(lambda *_: encodings.append(1))
    before = len(case.record.batch_sizes)
    try:
        found = case.without([[patch] for patch in patches[:6]])
    finally:
        hook.remove()
    assert torch.equal(found, expected)
    assert case.record.batch_sizes[before:] == [6, 6]  # one pass for each target
    assert len(encodings) == 1
    one_shorter = [[token] for token in text if len(case.units[token].tokens) == 1][:3]
    before = len(case.record.batch_sizes)
    case.without(one_shorter)
    assert case.record.batch_sizes[before:] == [3, 3]


def test_pixels_whose_centre_lies_in_the_box_are_painted():
    image = Image.new("RGB", (6, 4), "white")
    boxes = [
        (1.5, 0.0, 2.0, 1.4),  # centres 1.5 and 2.5; 0.5
        (5.6, 3.9, 0.2, 0.1),  # no centre: the nearest pixel all the same
    ]
    pixels = np.asarray(painting.painted(image, boxes, (10, 20, 30)))
    changed = {(x, y): tuple(pixels[y, x]) for y in range(4) for x in range(6)}
    changed = {place: colour for place, colour in changed.items() if colour != (255, 255, 255)}
    assert changed == dict.fromkeys([(1, 0), (2, 0), (5, 3)], (10, 20, 30))
    assert image.getcolors() == [(24, (255, 255, 255))]  # itself stays


def test_the_mean_colour_is_rounded():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (10, 0, 255))
    image.putpixel((1, 0), (13, 1, 255))
    assert mean_colour(image) == (12, 0, 255)  # halves go to the even one


def test_pictures_are_taken_and_put_back_in_order():
    first, second = noise(4, 4), noise(5, 4, 1).convert("L")
    chat = [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "image", "image": first}, "what", {"type": "text", "text": "is"}],
        },
        {"role": "user", "content": [{"type": "image", "image": second}]},
    ]
    for prompt in (chat, [first, "and", second], (first, second)):
        images = images_of(prompt)
        assert [image.size for image in images] == [(4, 4), (5, 4)]
        assert all(image.mode == "RGB" for image in images)
        new = [noise(3, 3), noise(2, 2)]
        assert images_of(with_images(prompt, iter(new))) == new
    assert chat[1]["content"][0]["image"] is first
    assert with_images(first, iter(["other"])) == "other"
    assert images_of("text") == []


def test_pictures_of_chat_messages_are_painted():
    model, processor = seeing("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}\n{% endfor %}"
    )
    content = [{"type": "image", "image": WIDE}, {"type": "text", "text": "what is it"}]
    chat = [{"role": "user", "content": content}]
    explainer = Explainer(model, processor, progress=False)
    case = Case.of(model, processor, chat, explainer.explain(chat, "x"))
    text, patches = texts_and_patches(case)
    found = case.without([[patches[0], patches[7]], [text[0]]])
    (image,) = painted([WIDE], case, [patches[0], patches[7]])
    written = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = encoded("llava", processor, written, [image])
    assert inputs["input_ids"][0].tolist() == case.prompt.words.ids
    with torch.no_grad():
        logprob = model(**inputs).logits[0, -1].log_softmax(-1)[case.targets[0][0]]
    assert_close(found[0], logprob[None])
    assert abs(float(found[1, 0] - case.base_logprobs[0])) > 1e-4


def test_a_processor_that_numbers_tokens_is_refused():
    case, _ = seen("llava")
    text, _ = texts_and_patches(case)
    own = Case(case.task, case.prompt, case.targets, case.units)
    own.prompt.inputs["position_ids"] = torch.arange(own.prompt_tokens)[None]
    try:
        with pytest.raises(UnsupportedModelError, match="numbers the tokens of a prompt itself"):
            own.without([[text[0]]])
    finally:
        del own.prompt.inputs["position_ids"]


# --- what is refused, and what stays as it was ----------------------------------------------------


@pytest.mark.parametrize("ask", ["without", "hidden"])
@pytest.mark.parametrize("wrong", [9, -1, "a", 10])
def test_only_units_of_the_prompt_can_be_removed(ask, wrong):
    model = in_float64("llama")
    task = task_of(model)
    units = [*case_of(model).units, Unit("12", (9,), None, None, "target", 0)]
    case = Case(task, task.read(PROMPT), TARGETS, units)
    assert case.removable == list(range(9))
    with pytest.raises(ValueError, match=f"units of the prompt, got {wrong!r}"):
        getattr(case, ask)([[0], [1, wrong]])


def test_a_case_of_an_explanation_has_its_targets():
    model = in_float64("llama")
    explanation = Explainer(model, progress=False).explain(PROMPT, targets=TARGETS)
    case = Case.of(model, None, PROMPT, explanation)
    assert case.targets == [(12, 55, 3), (8,)]
    assert case.units == explanation.units
    assert_close(case.base_logprobs, explanation.base_logprobs)
    assert torch.equal(case.measured, ~explanation.suppressed_logprobs.T.isnan())
    with pytest.raises(ValueError, match="explanation must be of this prompt"):
        Case.of(model, None, PROMPT[1:], explanation)
    part = Explainer(model, byte_level(), progress=False).explain(
        "Hello world", " there. Hello", target_span="Hello"
    )
    with pytest.raises(ValueError, match="of whole targets"):
        Case.of(model, byte_level(), "Hello world", part)


def test_other_kinds_of_models_are_refused_by_name():
    explanation = Explainer(in_float64("llama"), progress=False).explain(PROMPT, [12])
    for model in (t5(), seeing("mllama")[0]):
        with pytest.raises(UnsupportedModelError, match=f"got {type(model).__name__}; atman"):
            Case.of(model, None, PROMPT, explanation)
        task = task_of(model)
        with pytest.raises(UnsupportedModelError, match=f"got {type(model).__name__}; atman"):
            Case(task, task_of(in_float64("llama")).read(PROMPT), TARGETS, explanation.units)


def everything(case):
    case.without([{0}, {1, 2}])
    case.hidden([{0}])
    case.values(0, case.embeddings(0))


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_of_the_model_is_changed(interrupted):
    model = llama(attention_dropout=0.5).train()
    model.lm_head.eval()
    case = case_of(model)
    quiet = case_of(llama(attention_dropout=0.5))
    assert torch.equal(case.base_logprobs, quiet.base_logprobs)
    hooks, modes = len(model.model._forward_pre_hooks), [m.training for m in model.modules()]
    implementation = model.config._attn_implementation
    if interrupted:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.lm_head.register_forward_pre_hook(stop)
        for ask in (
            lambda: case.without([{0}]),
            lambda: case.hidden([{0}]),
            lambda: case.values(0, torch.zeros(1, 11, 32)),
        ):
            with pytest.raises(KeyboardInterrupt):
                ask()
        hook.remove()
    else:
        everything(case)
        everything(quiet)
        assert torch.equal(case.without([{0}]), quiet.without([{0}]))
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert len(model.model._forward_pre_hooks) == hooks
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_asking_again_holds_no_more_memory():
    case, _ = seen("llava")
    text, patches = texts_and_patches(case)

    def ask(start):
        for number in range(4):
            case.without([[patches[start + number]], [text[number]]])
            case.hidden([[patches[start + number]]])
            case.values(0, case.embeddings(0))
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    ask(0)
    assert ask(4) == ask(8)
