"""Prompts with pictures: how they are read, and what is refused."""

import pytest
import torch
from test_multimodal import FAMILIES, TALL, WIDE, encoded, mark, noise, seeing
from toy_models import llama
from toy_processors import PROCESSORS, llava
from toy_tokenizers import byte_level

from atman_triton import Explainer
from atman_triton.multimodal import MARKUP
from atman_triton.stacks import UnsupportedModelError
from atman_triton.tasks import task_of
from atman_triton.tokens import SPECIAL, TEMPLATE

PARTS = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}MARK{% else %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def read(name, prompt):
    return task_of(*seeing(name)).read(prompt)


def with_template(name):
    """A family's model, and a processor of its own with a chat template."""
    processor = PROCESSORS[name]()
    processor.chat_template = PARTS.replace("MARK", mark(name, processor))
    return seeing(name)[0], processor


def check_spans(words):
    """Tokens that have a place hold what stands there, and all of the text is somebody's."""
    covered = set()
    for span, name in zip(words.spans, words.names, strict=True):
        if span is not None:
            assert words.text[slice(*span)] == name
            covered.update(range(*span))
    assert covered == set(range(len(words.text)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("prompt", "form"),
    [
        ([WIDE, "This is a picture of a"], "{}This is a picture of a"),
        (["Hello ", WIDE, " world, ", "is", TALL, "hello"], "Hello {} world, is{}hello"),
        ([WIDE, TALL, " 23 euros"], "{}{} 23 euros"),
        (["What is the pay?", WIDE], "What is the pay?{}"),
        (WIDE, "{}"),
    ],
    ids=["front", "amid", "side by side", "behind", "alone"],
)
def test_a_list_is_read_as_the_processor_does(name, prompt, form):
    _, processor = seeing(name)
    items = prompt if isinstance(prompt, list) else [prompt]
    images = [item for item in items if not isinstance(item, str)]
    marks = [mark(name, processor)] * len(images)
    inputs = encoded(name, processor, form.format(*marks), images)
    found = read(name, prompt)
    words = found.words
    assert found.inputs.keys() == inputs.keys()
    for key, value in inputs.items():
        torch.testing.assert_close(found.inputs[key], value, rtol=0, atol=1e-6)
    assert words.ids == inputs["input_ids"][0].tolist()
    assert words.text == form.format(*[""] * len(images))
    check_spans(words)
    starts = [len(part) for part in form.split("{}")[:-1]]
    assert [picture.start for picture in found.pictures] == [
        sum(starts[: k + 1]) for k in range(len(starts))
    ]
    assert [(p.width, p.height) for p in found.pictures] == [image.size for image in images]
    assert [area.image for area in words.areas if area] == sorted(a.image for a in words.areas if a)
    assert {area.image for area in words.areas if area} == set(range(len(images)))
    for area, span, reason in zip(words.areas, words.spans, words.reasons, strict=True):
        assert (span is not None) or area or reason in (SPECIAL, MARKUP)
        assert not (area and (span or reason))


def messages(*images):
    return [
        {"role": "system", "content": "be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "hello "},
                *({"type": "image", "image": image} for image in images),
                {"type": "text", "text": "The pay per hour"},
            ],
        },
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_messages_go_through_the_template(name):
    model, processor = with_template(name)
    found = task_of(model, processor).read(messages(WIDE, TALL))
    sign = mark(name, processor)
    text = f"<s>system: be brief.</s>\nuser: hello{sign}{sign}The pay per hour</s>\nassistant:"
    options = {"add_special_tokens": False}
    inputs = processor(text=[text], images=[[WIDE, TALL]], return_tensors="pt", **options)
    words = found.words
    assert words.ids == inputs["input_ids"][0].tolist()
    assert words.text == text.replace(sign, "")
    check_spans(words)
    place = words.text.index("The pay")
    assert [picture.start for picture in found.pictures] == [place, place]
    own = [words.text[start:stop] for start, stop, _ in words.contents]
    assert own == ["be brief.", "hello", "The pay per hour"]
    assert [content.message for content in words.contents] == [0, 1, 1]
    written = "".join(
        words.text[slice(*span)]
        for span, reason in zip(words.spans, words.reasons, strict=True)
        if span and reason is None
    )
    assert written == " be brief. helloThe pay per hour"
    assert {TEMPLATE, SPECIAL} <= set(words.reasons)


def test_documents_stand_in_messages_with_pictures():
    model, processor = with_template("llava")
    asked = messages(WIDE)
    asked[1]["content"][2]["text"] = "{documents} hello"
    explanation = Explainer(model, processor, progress=False).explain(
        asked, " 23", documents=["The pay per hour is 23 euros."]
    )
    (document,) = explanation.documents
    shown = explanation.text[document.start : document.stop]
    assert shown == "The pay per hour is 23 euros."
    assert explanation.pictures[0].start == document.start


def test_documents_stand_among_pictures():
    model, processor = seeing("llava")
    explanation = Explainer(model, processor, progress=False).explain(
        ["hello ", WIDE, "{documents} Q: the pay?"],
        " 23",
        documents=["The pay is 23.", "of France"],
    )
    shown = [explanation.text[each.start : each.stop] for each in explanation.documents]
    assert shown == ["The pay is 23.", "of France"]
    assert {unit.document for unit in explanation.units if unit.part == "prompt"} == {0, 1}


def test_what_a_processor_returned_is_no_prompt():
    model, processor = seeing("llava")
    encoding = encoded("llava", processor, "<image>hello", [WIDE])
    with pytest.raises(ValueError, match=r"holds pixel_values; give pictures themselves, \[image"):
        task_of(model, processor).read(encoding)


def test_messages_without_pictures_are_text():
    model, processor = with_template("qwen2.5-vl")
    found = task_of(model, processor).read([{"role": "user", "content": "hello"}])
    assert found.words.text == "<s>user: hello</s>\nassistant:"
    assert set(found.inputs) == {"input_ids"}
    assert not found.pictures


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_is_text(name):
    model, processor = seeing(name)
    for prompt in ("Hello world", ["Hello", " world"]):
        if name == "paligemma" and isinstance(prompt, list):
            continue  # its processor reads no text without a picture
        explanation = Explainer(model, processor, progress=False).explain(prompt, " there")
        assert explanation.text == "Hello world there"
        assert {unit.level for unit in explanation.units} == {"token"}


def test_paligemma_reads_no_list_without_a_picture():
    with pytest.raises(ValueError, match="images"):
        read("paligemma", ["Hello", " world"])


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "gemma3"])
@pytest.mark.parametrize(
    "image",
    [
        noise(1, 1),
        noise(9, 5),
        noise(40, 30).convert("L"),
        noise(40, 30).convert("RGBA"),
        noise(120, 30),
        noise(30, 120),
        noise(40, 30).convert("P"),
    ],
    ids=["1x1", "small", "grey", "alpha", "wide", "tall", "palette"],
)
def test_pictures_of_every_kind(name, image):
    model, processor = seeing(name)
    explanation = Explainer(model, processor, progress=False).explain([image, "hello"], " there")
    (picture,) = explanation.pictures
    assert (picture.width, picture.height) == image.size
    assert any(unit.boxes for unit in explanation.units)
    again = Explainer(model, processor, progress=False).explain(
        [image.convert("RGB"), "hello"], " there"
    )
    torch.testing.assert_close(explanation.scores, again.scores, equal_nan=True)


# --- what is refused ------------------------------------------------------------------------------


def refused(name, prompt, error, match):
    with pytest.raises(error, match=match):
        read(name, prompt)


def test_what_is_no_picture_is_named():
    refused("llava", [WIDE, 5], TypeError, r"^prompt\[1\] must be a str or a PIL.Image, got int\.$")
    refused("llava", ["hi", b"x"], TypeError, r"^prompt\[1\] must be a str or a PIL.Image, got byt")
    array = torch.zeros(3, 4, 4)
    refused("llava", [array, "hi"], TypeError, r"^prompt\[0\] must be .* got Tensor\.$")
    refused("llava", [""], ValueError, r"^prompt must not be empty\.$")
    refused(
        "llava", [noise(4, 4).convert("F"), "hi"], ValueError, r"^prompt\[0\]: an image of mode"
    )


def test_a_path_is_text():
    assert read("llava", [WIDE, "hello.png"]).words.text == "hello.png"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "url": "http://x/y.png"},
        {"type": "image", "path": "y.png"},
        {"type": "image", "image": "y.png"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "http://x/y.png"}},
    ],
)
def test_messages_must_hold_the_picture_itself(part):
    model, processor = with_template("llava")
    asked = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
    match = r"^prompt\[0\]\['content'\]\[1\] must hold the picture itself, .*open it with PIL.Image"
    with pytest.raises(TypeError, match=match):
        task_of(model, processor).read(asked)


def test_other_parts_of_messages_are_refused():
    model, processor = with_template("llava")
    asked = [{"role": "user", "content": [{"type": "video", "video": "x"}, *messages(WIDE)]}]
    with pytest.raises(ValueError, match=r"prompt\[0\] holds something that is not text"):
        task_of(model, processor).read(asked)
    with pytest.raises(ValueError, match=r"^prompt\[0\] must have a 'role' and a 'content'"):
        task_of(model, processor).read([{"role": "user"}, *messages(WIDE)])


def test_a_processor_without_a_template():
    match = "^LlavaProcessor has no chat template; set processor.chat_template, or pass pictures"
    refused("llava", messages(WIDE), ValueError, match)


def test_a_template_that_passes_over_pictures():
    model, processor = with_template("llava")
    processor.chat_template = processor.chat_template.replace("<image>", "")
    with pytest.raises(ValueError, match="template writes '<image>' 0 times for 1 pictures"):
        task_of(model, processor).read(messages(WIDE))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_placeholder_without_its_picture(name):
    _, processor = seeing(name)
    match = r"^prompt holds '.*', which stands for a picture, but no picture for it; put the"
    sign = processor.image_token
    refused(name, f"hello {sign}", ValueError, match)
    refused(name, [WIDE, f"hello {sign}"], ValueError, match)
    token = seeing(name)[0].config.image_token_id
    ids = [3, token, 5]
    refused(name, ids, ValueError, rf"^prompt holds token {token}, which stands for a picture")


def test_a_tokenizer_is_no_processor():
    model, processor = seeing("llava")
    match = r"^prompt holds a picture, .*got LlavaForCond.* AutoProcessor.from_pretrained"
    for prompt in ([WIDE, "hi"], WIDE, messages(WIDE)):
        with pytest.raises(ValueError, match=match):
            task_of(model, processor.tokenizer).read(prompt)
    with pytest.raises(ValueError, match=r"got LlamaForCausalLM and .*load its processor"):
        task_of(llama(), byte_level()).read([WIDE, "hi"])


def test_a_model_of_text_with_a_processor():
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a llama; where its image"):
        task_of(llama(), llava()).read([WIDE, "hi"])


def test_a_processor_that_does_not_say_what_stands_for_a_picture():
    model, processor = seeing("llava")[0], llava()
    processor.image_token = None
    with pytest.raises(ValueError, match="LlavaProcessor does not say what stands for a picture"):
        task_of(model, processor).read([WIDE, "hi"])


def test_a_processor_that_rewrites_the_text():
    model, processor = seeing("llava")[0], llava()
    expand = processor.get_text_with_replacements
    processor.get_text_with_replacements = lambda text, *more: expand(
        [each.replace("hi", "ho") for each in text], *more
    )
    with pytest.raises(UnsupportedModelError, match="not known: it makes 'ho' of 'hi'"):
        task_of(model, processor).read([WIDE, "hi"])


def test_a_slow_tokenizer():
    model, processor = seeing("llava")[0], llava()

    class Slow(type(processor.tokenizer)):
        def __call__(self, *args, **kwargs):
            answer = super().__call__(*args, **kwargs)
            answer._encodings = None
            return answer

    processor.tokenizer.__class__ = Slow
    with pytest.raises(ValueError, match=r"^Slow is no fast tokenizer, .*use_fast=True"):
        task_of(model, processor).read([WIDE, "hi"])


def test_the_processor_is_left_as_it_is():
    model, processor = with_template("qwen2.5-vl")
    before = dict(vars(processor))
    task = task_of(model, processor)
    task.read([WIDE, "hi"])
    task.read(messages(WIDE))
    assert vars(processor) == before


def test_pictures_are_divided_only_where_there_are_some():
    model, processor = seeing("llava")
    with pytest.raises(ValueError, match="is of pictures, but the prompt holds none"):
        Explainer(model, processor).explain("Hello", " there", image_granularity="6x6")
