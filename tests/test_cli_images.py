"""The command line reads pictures, sounds and classes: each option, and each error, once."""

import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import PROMPT, check, folder, reader, run  # noqa: F401 - fixtures
from test_cli_loading import saved  # noqa: F401 - a fixture

from atman_triton import Explainer, ImageControl, steer
from atman_triton.cli.prompt import Asked, read_sound
from atman_triton.demo.shapes import demo_picture, make_picture
from atman_triton.explanation import load
from atman_triton.granularity import Images
from atman_triton.loading import BadUsage, load_model

RED, BLUE = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 20), "blue")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_sound(path, samples, width=2, rate=16000, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


# What is read.


def test_text_and_pictures_stand_in_the_order_that_is_read():
    several = [RED, BLUE]
    assert Asked("one").prompt == "one"
    assert Asked("a {image} b").prompt == "a {image} b"  # without a picture a word like others
    assert Asked(None, [RED]).prompt is RED
    assert Asked("one", [RED]).prompt == [RED, "one"]
    assert Asked("one", several).prompt == [RED, BLUE, "one"]
    assert Asked("a {image} b {image}", several).prompt == ["a ", RED, " b ", BLUE]
    assert Asked("{image}{image} b", several).prompt == [RED, BLUE, " b"]
    with pytest.raises(BadUsage, match=r"says \{image\} 1 times, but --image is given 2 times"):
        _ = Asked("a {image} b", several).prompt


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_any_width_are_the_same_numbers(tmp_path, width):
    wanted = np.array([-1.0, -0.5, 0.0, 0.25, 0.5])
    half = 1 << 8 * width - 1
    whole = [int(each * half) + (half if width == 1 else 0) for each in wanted]
    data = b"".join(each.to_bytes(width, "little", signed=width > 1) for each in whole)
    sound = read_sound(write_sound(tmp_path / "a.wav", data, width))
    assert sound["sampling_rate"] == 16000
    assert sound["array"].dtype == np.float32
    np.testing.assert_array_equal(sound["array"], wanted)


def test_channels_are_averaged(tmp_path):
    data = np.array([[16384, 0], [-16384, -8192]], "<i2").tobytes()
    sound = read_sound(write_sound(tmp_path / "a.wav", data, channels=2))
    np.testing.assert_array_equal(sound["array"], [0.25, -0.375])


def test_what_is_no_picture_or_sound_is_refused(run, tmp_path):  # noqa: F811
    text = tmp_path / "a.txt"
    text.write_text("no picture")
    words = ("explain", "x", "--model", "./anything")
    check(run(*words, "--image", text), 2, "a.txt is no picture that Pillow reads.")
    check(run(*words, "--image", "no.png"), 2, "--image: no.png does not exist.")
    check(run(*words, "--image", tmp_path), 2, "cannot be read")
    check(run(*words, "--audio", text), 2, "a.txt is no WAV file of whole numbers")
    check(run(*words, "--audio", "no.wav"), 2, "--audio: no.wav does not exist.")
    check(run(*words, "--audio", tmp_path), 2, "cannot be read")
    empty = write_sound(tmp_path / "a.wav", b"")
    check(run(*words, "--audio", empty), 2, "holds no samples.")


def test_a_model_is_given_what_it_reads(run, folder, saved, picture, tmp_path):  # noqa: F811
    sound = write_sound(tmp_path / "a.wav", bytes(32))
    words = ("explain", "--model", folder)
    result = run(*words, "x", "--image", picture)
    check(result, 2, "LlamaForCausalLM reads no pictures; take a vision-language model, or --demo")
    check(run(*words, "--audio", sound), 2, "reads no sound; take a speech model such as Whisper")
    words = ("explain", "--model", saved("ViTForImageClassification"))
    check(run(*words), 2, "no prompt: give it as an argument, with --file, or on standard input; a")
    check(run(*words, "x", "--image", picture), 2, "reads a picture alone; give --image, and no te")


# Classes.


def test_classes_are_named_or_numbered(run, saved, tmp_path):  # noqa: F811
    path, model_folder = tmp_path / "a.json", saved("BertForSequenceClassification")
    words = ("explain", PROMPT, "-m", model_folder, "--quiet", "--save", path)
    several = ("--target", "LABEL_1", "--target", "0")
    assert run(*words, *several, "--score", "logit")[0] == 0
    found = load(path)
    assert found.quantity == "logit"
    model, tokenizer = load_model(str(model_folder), "cpu", "auto")
    explainer = Explainer(model, tokenizer, progress=False)
    expected = explainer.explain(PROMPT, targets=["LABEL_1", 0], score="logit")
    assert found.targets == expected.targets
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)
    assert run(*words)[0] == 0  # the class that it predicts
    assert load(path).answer.strip() in ("LABEL_0", "LABEL_1")
    check(run(*words, "--target", "2"), 2, "target must be a class index within 0..1, got 2")
    check(run(*words, "--target", "sport"), 2, "must be one of the model's 2 classes, got 'sport'")
    check(run(*words, "--score", "loss"), 2, "--score must be one of logprob, logit, output, got")
    check(run(*words, "--score", "output"), 2, "score must be one of logprob, logit, got 'output'")
    check(run(*words, "--max-new-tokens", "3"), 2, "would go to model.generate, but it classifies")
    check(run(*words, "--live"), 2, "--live: BertForSequenceClassification writes no answer; take")


def test_a_class_may_be_called_by_a_number(run, saved, tmp_path):  # noqa: F811
    for file in saved("BertForSequenceClassification").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    labels = {"0": "1", "1": "7"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": labels}))
    words = ("explain", PROMPT, "-m", tmp_path, "--json", "--quiet", "--target", "1")
    data = json.loads(run(*words)[1])
    assert data["targets"][0]["token_id"] == 0


def test_the_tokens_whose_class_is_explained(run, saved, tmp_path):  # noqa: F811
    path = tmp_path / "a.json"
    words = ("explain", PROMPT, "-m", saved("BertForTokenClassification"), "--quiet")
    code, _, error = run(*words, "--target", "LABEL_1", "--target-span", "23 euros", "--save", path)
    assert (code, error) == (0, "")
    assert len(load(path).targets) == 2
    check(run(*words, "--target", "LABEL_1"), 2, "target_span must say which tokens' class is sco")
    assert run(*words, "--target", "0", "--target-span", "23 euros", "--json")[0] == 0


# Encoders with decoders.


def test_where_an_encoder_and_its_decoder_are_manipulated(run, saved, tmp_path):  # noqa: F811
    path, model_folder = tmp_path / "a.json", saved("T5ForConditionalGeneration")
    words = ("explain", "The house is wonderful.", "-m", model_folder, "--quiet", "--save", path)
    answer = ("--target", "Das Haus")
    said = {}
    for given in ("encoder", "cross", "both"):
        assert run(*words, *answer, "--attention", given, "--method", "exact")[0] == 0
        said[given] = load(path).provenance["attention"]
    assert said["cross"] == "cross-attention"
    assert len(set(said.values())) == 3
    check(run(*words, "--attention", "self"), 2, "--attention must be one of both, encoder, cross")
    result = run(
        "explain", PROMPT, "-m", saved("LlamaForCausalLM"), *answer, "--attention", "cross"
    )
    check(result, 2, "attention='cross' chooses between an encoder and cross-attention, which")
    check(
        run(*words[:-2], "--live"), 2, "--live: T5ForConditionalGeneration has an encoder and a d"
    )
    result = run("steer", "-m", model_folder, "--prompt", "x", "--control", "token:0=0.1")
    check(result, 2, "steer: T5ForConditionalGeneration has an encoder and a decoder")


def test_a_sound_is_explained_in_seconds(run, saved, tmp_path):  # noqa: F811
    path, model_folder = tmp_path / "a.json", saved("WhisperForConditionalGeneration")
    wave_of = np.sin(np.linspace(0, 700, 8000)) * 20000
    sound = write_sound(tmp_path / "a.wav", wave_of.astype("<i2").tobytes())
    words = ("explain", "-m", model_folder, "--quiet", "--target", "hello", "--audio", sound)
    assert run(*words, "--granularity", "0.2s", "--save", path)[0] == 0
    found = [unit.seconds for unit in load(path).units if unit.seconds]
    assert found[0] == pytest.approx((0, 0.2), abs=0.03)
    assert found[-1][1] == pytest.approx(0.5, abs=0.03)
    assert load(path).sound.seconds == 0.5
    code, out, _ = run("view", path)
    assert code == 0
    assert "0.2" in out
    assert run(*words, "--granularity", "frame", "--save", path)[0] == 0
    assert len(load(path).units) > len(found) + 1
    slow = write_sound(tmp_path / "b.wav", bytes(32), rate=8000)
    message = "the file has 8000 samples a second, but WhisperForConditionalGeneration hears 16000"
    check(run(*words[:-1], slow), 2, message)
    check(run(*words, "x"), 2, "reads a sound alone; give --audio, and no text or picture.")
    check(run("explain", "x", "-m", model_folder), 2, "reads a sound; give it with --audio speech")


# Pictures beside text.


@pytest.fixture
def seen(run, saved, picture, tmp_path):  # noqa: F811
    """Run ``atman explain`` with a picture, and what the same arguments give in Python."""

    def seen(words, prompt, **arguments):
        path, model_folder = tmp_path / "a.json", saved("LlavaForConditionalGeneration")
        given = ("explain", "-m", model_folder, "--quiet", "--save", path, "--image", picture)
        code, _, error = run(*given, "--target", "yes", *words)
        assert (code, error) == (0, "")
        found = load(path)
        explainer = Explainer(*load_model(str(model_folder), "cpu", "auto"), progress=False)
        expected = explainer.explain(prompt, " yes", **arguments)
        assert found.units == expected.units
        assert found.text == expected.text
        assert [each.data for each in found.pictures] == [each.data for each in expected.pictures]
        torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-3, atol=1e-5)
        return found

    return seen


def test_a_picture_stands_in_front_of_the_text_or_where_it_says(seen, picture):
    image = Image.open(picture)
    found = seen(["This is a"], [image, "This is a"])
    assert (found.pictures[0].width, found.pictures[0].height) == (36, 24)
    found = seen(["What is {image} here?"], ["What is ", image, " here?"])
    assert found.pictures[0].start == len("What is ")
    other = ["--image", picture]
    found = seen([*other, "{image} or {image}?"], [image, " or ", image, "?"])
    assert {unit.image for unit in found.units} == {0, 1, None}


def test_how_a_picture_is_divided_and_what_of_it_is_explained(seen, picture):
    image = Image.open(picture)
    prompt = [image, "This is a"]
    found = seen(["This is a", "--image-granularity", "3x2"], prompt, image_granularity="3x2")
    assert sum(unit.level == "tile" for unit in found.units) == 6
    found = seen(["This is a", "--granularity", "image"], prompt, granularity="image")
    assert [unit.level for unit in found.units].count("image") == 1
    found = seen(["This is a", "--explain-only", "{image}"], prompt, explain_only=Images())
    assert {unit.level for unit in found.units if unit.part == "prompt"} == {"patch"}


def test_documents_stand_in_the_text_beside_a_picture(seen, picture, tmp_path):
    file = tmp_path / "note.txt"
    file.write_text("The cat sleeps.\n")
    documents = [{"id": "note.txt", "text": "The cat sleeps."}]
    prompt = [Image.open(picture), "The cat sleeps.\n\nWhat is it?"]
    found = seen(["What is it?", "--document", file], prompt, documents=documents)
    assert [each.id for each in found.documents] == ["note.txt"]


def test_pictures_are_shown_again(run, saved, picture, tmp_path):  # noqa: F811
    path, html, plot = (tmp_path / name for name in ("a.json", "a.html", "a.png"))
    words = ("explain", "-m", saved("LlavaForConditionalGeneration"), "This is a", "--quiet")
    files = ("--save", path, "--html", html, "--plot", plot)
    code, out, _ = run(*words, "--image", picture, "--target", "yes", *files)
    assert code == 0
    assert run("view", path)[1] == out
    again = tmp_path / "b.html"
    assert run("view", path, "--html", again, "--quiet")[0] == 0
    assert again.read_text() == html.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    data = json.loads(run("view", path, "--json")[1])
    assert len(data["pictures"]) == 1


def test_what_a_picture_cannot_be_divided_into(run, saved, picture):  # noqa: F811
    words = ("explain", "x", "-m", saved("LlavaForConditionalGeneration"), "--target", "y", "-q")
    result = run(*words, "--image", picture, "--image-granularity", "tiles")
    check(result, 2, "image_granularity must be 'patch' (one image token), 'image' (the whole pic")
    check(run(*words, "--image-granularity", "2x2"), 2, "but the prompt holds none.")
    check(run(*words, "--image", picture, "--granularity", "2by2"), 2, "--granularity must be one")


def test_a_part_of_a_picture_is_suppressed(run, saved, picture):  # noqa: F811
    model_folder = saved("LlavaForConditionalGeneration")
    model, processor = load_model(str(model_folder), "cpu", "auto")
    image = Image.open(picture)
    words = ("steer", "-m", model_folder, "--image", picture, "--max-new-tokens", 2, "--json")
    for text, which in (("This is a", 0), ("{image}This is a", 0), ("{image}{image}x", 1)):
        several = text.count("{image}") or 1
        prompt = [*[image] * several, text.replace("{image}", "")]
        place = "#2" if which else ""
        given = (*words, *["--image", picture] * (several - 1), "--prompt", text)
        code, out, error = run(*given, "--control", f"image:0,0,0.5,1{place}=0.1")
        assert (code, error) == (0, "")
        data = json.loads(out)
        control = ImageControl(0.0, 0.0, 0.5, 1.0, 0.1, "complete", image=which)
        steering = steer(model, [control], inputs=prompt, processor=processor)
        with steering as factors, torch.no_grad():
            mark = processor.image_token * several
            shown = processor([image] * several, mark + prompt[-1], return_tensors="pt")
            row = model(**shown).logits[0, -1].softmax(-1)
        found = {entry["position"]: entry["factor"] for entry in data["factors"]}
        wanted = {k: pytest.approx(f) for k, f in enumerate(factors[0].tolist()) if f != 1}
        assert found == wanted
        assert len(found) == 18  # of 6×6 patches
        for token in data["next_tokens"]:
            if not data["next_tokens_behind"]:
                assert token["steered"] == pytest.approx(row[token["id"]].item(), rel=1e-3)
    result = run(*words, "--prompt", "x", "--control", "image:0,0,0.5,1#3=0.1")
    check(result, 2, "needs an image in the prompt, which holds 1 of them")
    check(run(*words, "--prompt", "x", "--control", "image:0,0,1.5,1=0.1"), 2, "width must be abo")
    text_alone = ("steer", "-m", saved("LlamaForCausalLM"), "--prompt", "x", "--image", picture)
    result = run(*text_alone, "--control", "token:0=0.1")
    check(result, 2, "--image: LlamaForCausalLM reads no pictures")


def test_what_is_explained_may_be_suppressed_too(seen, picture):
    prompt = [Image.open(picture), "This is a"]
    control = ImageControl(0.5, 0.0, 0.5, 1.0, 0.2, "complete")
    words = ["This is a", "--control", "image:0.5,0,0.5,1=0.2"]
    found = seen(words, prompt, controls=[control])
    assert found.provenance["controls"][0]["left"] == 0.5


def test_a_picture_is_cited_while_the_answer_is_written(run, saved, picture, tmp_path):  # noqa: F811
    paths = [tmp_path / "live.json", tmp_path / "other.json"]
    words = ("explain", "This is a", "-m", saved("LlavaForConditionalGeneration"), "--quiet")
    words += ("--image", picture, "--max-new-tokens", 2, "--image-granularity", "2x2")
    assert run(*words, "--live", "--save", paths[0])[0] == 0
    assert run(*words, "--save", paths[1])[0] == 0
    live, other = map(load, paths)
    own = [place for place, unit in enumerate(other.units) if unit.part == "prompt"]
    assert live.units == [other.units[place] for place in own]
    torch.testing.assert_close(live.scores, other.scores[:, own], rtol=1e-3, atol=1e-5)


# The shipped model of shapes.


def test_each_shape_answers_to_its_name(run):  # noqa: F811
    code, out, error = run("explain", "--demo", "shapes", "--quiet")
    assert (code, error) == (0, "")
    names = [shape.name for shape in demo_picture().objects]
    table = out[out.index("Where relevance stands") :].splitlines()
    assert table[0].split() == "Where relevance stands".split() + " ".join(names).split() + [
        "elsewhere"
    ]
    for index, name in enumerate(names):
        row = next(line for line in table if line.startswith(repr(f" {name}")))
        shares = [int(cell.rstrip("%")) for cell in row.split("'")[2].split()]
        assert sum(shares) == pytest.approx(100, abs=1)
        assert shares[index] > 50 > 5 > shares[1 - index]
    code, out, _ = run("explain", "--demo", "shapes", "--json", "--image-granularity", "6x6")
    assert [each["text"] for each in json.loads(out)["targets"]][:2] == [
        " " + word for word in names[0].split()
    ]


def test_the_shipped_model_answers_and_reads_other_pictures(run, tmp_path):  # noqa: F811
    name = demo_picture().objects[0].name
    words = ("explain", "--demo", "shapes", "--quiet", f"Is there a {name}? A:")
    code, out, _ = run(*words)
    assert code == 0
    assert out.startswith("Answer: yes ")
    path = tmp_path / "other.png"
    other = make_picture("another one", 1)
    other.image.save(path)
    code, out, _ = run("explain", "--image", path, "--quiet", "--max-new-tokens", 4)
    assert code == 0
    assert out.startswith(f"Answer: {other.objects[0].name} ")
    assert "Where relevance stands" not in out
    result = run("explain", "--demo", "contract", "x", "--image", path)
    check(
        result, 2, "LlamaForCausalLM reads no pictures; take a vision-language model, or --demo s"
    )
    check(run("explain", "--demo", "cats"), 2, "--demo must be one of contract, shapes, got 'cats'")
    result = run("explain", "--demo", "shapes", "--model", "x")
    check(result, 2, "--demo and --model exclude each other; give one of them.")


def test_a_suppressed_shape_is_not_named(run):  # noqa: F811
    shape = demo_picture().objects[1]
    left, top, right, bottom = (edge / 96 for edge in shape.box)
    control = f"image:{left:.2f},{top:.2f},{right - left:.2f},{bottom - top:.2f}=0.1"
    code, out, _ = run("steer", "--demo", "shapes", "--control", control, "--json")
    assert code == 0
    data = json.loads(out)
    assert shape.name not in data["steered"]
    assert data["prompt"] == "This is a picture of a"
    behind = {token["text"].strip(): token for token in data["next_tokens"]}
    if shape.colour in behind and not data["next_tokens_behind"]:
        assert behind[shape.colour]["steered"] < behind[shape.colour]["plain"]
    code, out, _ = run("steer", "--demo", "shapes", "--control", control, "--max-new-tokens", 4)
    assert out.startswith("Suppressed, factor 0.1: ")
    assert "of picture 1, from" in out


def test_a_picture_alone_is_classified_or_asked_about(run, saved, picture, tmp_path):  # noqa: F811
    path = tmp_path / "a.json"
    words = ("explain", "--image", picture, "--quiet", "--save", path)
    model_folder = saved("ViTForImageClassification")
    assert run(*words, "-m", model_folder, "--target", "LABEL_1")[0] == 0
    assert load(path).answer == "LABEL_1"
    assert {unit.level for unit in load(path).units} == {"patch"}
    model_folder = saved("BlipForQuestionAnswering")
    code, _, error = run(*words, "-m", model_folder, "What is it?", "--target", "a cat")
    assert (code, error) == (0, "")
    found = load(path)
    assert found.prompt == "What is it?"
    assert {unit.level for unit in found.units} == {"patch", "token"}
    result = run("explain", "x", "-m", model_folder, "--target", "a cat")
    check(result, 2, "prompt must hold one image, got 0")
