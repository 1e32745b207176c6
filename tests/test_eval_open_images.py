"""OpenImages as its site ships it: lists as CSV, masks as PNG, images as JPEG."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atman_triton.demo.shapes import load_shapes_model
from atman_triton.evaluate.data import load, open_images
from atman_triton.evaluate.statistics import statistics

HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
CLASSES = {"/m/dog": "Dog", "/m/eye": "Human eye", "/m/ball": "Football (Ball)"}


class Site:
    """A folder that fills up."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("images", "masks"):
            (folder / name).mkdir()
        lines = [f"{label},{name}" for label, name in CLASSES.items()]
        (folder / "class-descriptions-boxable.csv").write_text("\n".join(lines))
        self.annotations = folder / "validation-annotations-object-segmentation.csv"
        self.annotations.write_text(HEADER + "\n")
        self.masks = 0

    def image(self, name, size=(240, 200)):
        Image.new("RGB", size, (90, 120, 30)).save(self.folder / "images" / f"{name}.jpg")

    def mask(self, image, label, pixels, folder="masks"):
        self.masks += 1
        name = f"{image}_{label.replace('/', '')}_{self.masks}.png"
        (self.folder / folder).mkdir(exist_ok=True)
        if pixels is not None:
            Image.fromarray(np.array(pixels, bool)).save(self.folder / folder / name)
        with self.annotations.open("a") as file:
            file.write(f"{name},{image},{label},box,0,1,0,1,0,\n")

    def load(self, limit=None, **more):
        return load("openimages", limit=limit, path=self.folder, **more)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


LEFT = [[1, 0], [1, 0]]
TOP = [[1, 1], [0, 0]]


def test_masks_of_a_class_are_joined_at_the_size_of_the_image(site):
    site.image("abc")
    site.mask("abc", "/m/dog", LEFT)
    site.mask("abc", "/m/dog", TOP)
    site.mask("abc", "/m/eye", np.eye(200, 240))
    found = {example.group: example for example in site.load().examples}
    dog = found["dog"]
    assert dog.target == " dog" and dog.id == "abc /m/dog"
    image, text = dog.prompt
    assert image.size == (240, 200) and image.mode == "RGB" and text == "This is a picture of"
    assert dog.mask.shape == (200, 240) and dog.mask.dtype == bool
    assert dog.mask[:, :120].all() and dog.mask[:100].all() and not dog.mask[100:, 120:].any()
    assert dog.facts["masks"] == 2 and dog.facts["mask_share"] == 0.75
    assert dog.reworded[1] == "The picture shows"
    assert found["human eye"].mask.sum() == 200


def test_names_lose_what_stands_in_brackets(site):
    site.image("abc")
    site.mask("abc", "/m/ball", LEFT)
    assert [example.target for example in site.load().examples] == [" football"]


def test_the_papers_filters_leave_out_and_count(site):
    for name, size in (
        ("small", (239, 199)),
        ("long", (241, 200)),
        ("tall", (200, 241)),
        ("kept", (200, 240)),
    ):
        site.image(name, size)
        site.mask(name, "/m/dog", LEFT)
    site.mask("absent", "/m/dog", LEFT)
    site.mask("kept", "/m/unknown", LEFT)
    site.mask("kept", "/m/eye", np.zeros((2, 2)))
    site.image("partly")
    site.mask("partly", "/m/dog", LEFT)
    site.mask("partly", "/m/dog", None)
    loaded = site.load()
    assert [example.id for example in loaded.examples] == ["kept /m/dog"]
    assert loaded.notes[0] == "openimages: 1 examples of 8 that were looked at"
    assert set(loaded.notes[1:]) == {
        f"openimages: left out {count}: {reason}"
        for count, reason in (
            (2, open_images.LONG),
            (1, open_images.SMALL),
            (1, open_images.NO_IMAGE),
            (1, open_images.NO_MASK),
            (1, open_images.NAMELESS),
            (1, open_images.EMPTY),
        )
    }


def test_a_class_has_so_many_images_at_most(site, monkeypatch):
    monkeypatch.setattr(open_images, "PER_CLASS", 3)
    for number in range(9):
        site.image(f"{number:02}", (200, 200))
        site.mask(f"{number:02}", "/m/dog", LEFT)
        if number < 2:
            site.mask(f"{number:02}", "/m/eye", LEFT)
    loaded = site.load()
    assert Counter(example.group for example in loaded.examples) == {"dog": 3, "human eye": 2}
    assert f"openimages: left out 6: {open_images.ENOUGH}" in loaded.notes
    whole = [example.id for example in loaded.examples]
    assert whole != sorted(whole)
    for limit in (1, 2, 4, 5):
        assert [example.id for example in site.load(limit).examples] == whole[:limit]


def test_what_is_left_out_does_not_count_towards_a_class(site, monkeypatch):
    monkeypatch.setattr(open_images, "PER_CLASS", 3)
    for number in range(12):
        site.image(f"{number:02}", (200, 200) if number < 3 else (100, 100))
        site.mask(f"{number:02}", "/m/dog", LEFT)
    loaded = site.load()
    assert sorted(example.id[:2] for example in loaded.examples) == ["00", "01", "02"]


def test_mask_archives_may_be_unpacked_in_folders_and_images_stand_elsewhere(site, tmp_path):
    site.image("abc")
    site.mask("abc", "/m/dog", LEFT, folder="masks/validation-masks-a")
    site.mask("abc", "/m/dog", TOP, folder="masks/a")
    (site.folder / "images").rename(tmp_path / "photographs")
    [example] = site.load(images=tmp_path / "photographs").examples
    assert example.facts["masks"] == 2


def test_the_lists_of_version_7_have_a_header(site):
    (site.folder / "class-descriptions-boxable.csv").unlink()
    new = site.folder / "oidv7-class-descriptions.csv"
    new.write_text("LabelName,DisplayName\n/m/dog,Dog\n")
    site.image("abc")
    site.mask("abc", "/m/dog", LEFT)
    assert [example.group for example in site.load().examples] == ["dog"]
    new.write_text("/m/dog\n")
    with pytest.raises(ValueError, match=r"line 1: expected a label and a name, got \['/m/dog'\]"):
        site.load()


def test_missing_files_are_named_with_where_to_get_them(site, tmp_path):
    where = "from https://storage.googleapis.com/openimages/web"
    with pytest.raises(ValueError, match=f"path must be a folder .*{where}"):
        load("openimages", limit=1)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}/no must be a folder .*images, {where}"
    ):
        site.load(images=tmp_path / "no")
    for name in ("images", "masks"):
        (site.folder / name).rename(site.folder / "away")
        with pytest.raises(FileNotFoundError, match=f"/{name} must be a folder .*{name}, {where}"):
            site.load()
        (site.folder / "away").rename(site.folder / name)
    site.annotations.write_text("ImageID,LabelName\n")
    with pytest.raises(
        ValueError, match=f"must have the columns .* but lacks MaskPath; .*{where[5:]}"
    ):
        site.load()
    site.annotations.write_text("MaskPath,ImageID,LabelName\n,abc,/m/dog\n")
    with pytest.raises(ValueError, match="line 2: a field is empty"):
        site.load()
    site.annotations.unlink()
    with pytest.raises(FileNotFoundError, match=f"validation-annotations-object-seg.*{where}"):
        site.load()
    (site.folder / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(FileNotFoundError, match=f"class-descriptions-boxable.csv or .*{where}"):
        site.load()


def test_damaged_pictures_are_named(site):
    site.image("abc")
    site.mask("abc", "/m/dog", LEFT)
    [mask] = (site.folder / "masks").iterdir()
    mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{re.escape(str(mask))} is no whole picture"):
        site.load()
    (site.folder / "images" / "abc.jpg").write_bytes(b"neither")
    with pytest.raises(ValueError, match=r"abc.jpg is no whole picture"):
        site.load()


def test_examples_are_opened_when_asked_for(site):
    for name in "abc":
        site.image(name)
        site.mask(name, "/m/dog", LEFT)
    examples = site.load().examples
    assert len(examples) == 3 and len(examples[1:]) == 2
    assert examples[1:][0].id == examples[1].id and examples[-1].id == examples[2].id
    assert examples[0].prompt[0] is not examples[0].prompt[0]
    assert [example.id for example in examples] == [examples[n].id for n in range(3)]
    with pytest.raises(IndexError):
        examples[3]
    found = statistics(examples)
    assert found.values["images of a class"] == [3]
    assert found.values["share of a picture that its mask covers"] == [0.5] * 3


def test_a_model_that_cannot_read_the_prompt_leaves_it_out(site):
    site.image("abc", (200, 200))
    site.mask("abc", "/m/dog", LEFT)
    loaded: Any = load_shapes_model()
    model, processor = loaded
    assert len(site.load(model=model, processor=processor).examples) == 1
    model.config.text_config.max_position_embeddings = 144  # as many as a picture has patches
    with pytest.raises(ValueError, match="left out 1: longer than the model's context window"):
        site.load(model=model, processor=processor)
