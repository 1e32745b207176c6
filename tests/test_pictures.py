"""Units of pictures and sounds: laid out, checked, saved."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from atman_triton.explanation import Explanation, Target, Unit, load
from atman_triton.granularity import Images, Seconds, Tiles, checked_granularity, tiles_of
from atman_triton.granularity import checked_image_granularity as checked_images
from atman_triton.grouping import tiled
from atman_triton.pictures import Picture, Sound
from atman_triton.pieces import Area
from atman_triton.tokens import Tokens
from atman_triton.units import coarsest, divided, lay_out

WIDE = Picture.of(Image.new("RGB", (40, 20), "red"), 0)
TALL = Picture.of(Image.new("RGB", (10, 30), "blue"), 3)


def prompt():
    """Two pictures, the first of 4×2 patches and one without a place, and two words."""
    areas = [Area(0, (10.0 * x, 10.0 * y, 10.0, 10.0)) for y in (0, 1) for x in range(4)]
    areas += [Area(0, None, "newline")]
    areas += [Area(1, (0.0, 10.0 * y, 10.0, 10.0)) for y in range(3)]
    count = len(areas)
    return Tokens(
        ids=list(range(count + 2)),
        text="one two",
        spans=[None] * count + [(0, 3), (3, 7)],
        names=["<image>"] * count + ["one", " two"],
        reasons=[None] * (count + 2),
        areas=[*areas, None, None],
    )


def answer():
    return Tokens([7], " x", [(0, 2)], [" x"], [None])


def units(**options):
    return lay_out(prompt(), [answer()], pictures=[WIDE, TALL], **options).units


def test_every_image_token_is_a_unit_with_its_box():
    found = units()
    assert [unit.level for unit in found] == ["patch"] * 12 + ["token"] * 2
    assert found[5].boxes == ((10.0, 10.0, 10.0, 10.0),)
    assert (found[5].image, found[5].text, found[5].start) == (0, "patch at 10,10, 10×10", None)
    assert (found[8].boxes, found[8].text) == ((), "newline token")
    assert found[9].image == 1
    assert [unit.text for unit in found[12:]] == ["one", " two"]


def test_tiles_hold_the_tokens_whose_centres_lie_in_them():
    found = units(image_granularity=Tiles(2, 1))
    assert [(unit.image, unit.tokens) for unit in found[:3]] == [
        (0, (0, 1, 4, 5)),
        (0, (2, 3, 6, 7)),
        (1, (9, 10, 11)),
    ]
    assert found[1].boxes == ((20.0, 0.0, 20.0, 20.0),)
    assert found[2].boxes == ((5.0, 0.0, 5.0, 30.0),)  # a centre on the border goes right
    assert {unit.level for unit in found[:3]} == {"tile"}


def gridded(columns, rows, view="grid", first=0):
    """Units of a grid over the whole of ``WIDE``."""
    width, height = WIDE.width / columns, WIDE.height / rows
    return [
        Unit(view, (first + row * columns + column,), None, None, "prompt", image=0, boxes=(box,))
        for row in range(rows)
        for column in range(columns)
        for box in [(column * width, row * height, width, height)]
    ]


def held(units, *shape):
    return [unit.tokens for unit in tiled(units, Tiles(*shape), [(WIDE.width, WIDE.height)])]


def test_an_overview_and_crops_of_one_place_go_together():
    assert held(gridded(2, 2, "overview") + gridded(4, 4, "crop", first=4), 2) == [
        (0, 4, 5, 8, 9),
        (1, 6, 7, 10, 11),
        (2, 12, 13, 16, 17),
        (3, 14, 15, 18, 19),
    ]


@pytest.mark.parametrize("count", [3, 5, 7, 11, 13])
def test_a_centre_on_an_edge_goes_to_the_later_tile_everywhere(count):
    """Of an odd number of tokens the middle one stands on the edge between two halves."""
    halves = [tuple(range(count // 2)), tuple(range(count // 2, count))]
    assert held(gridded(count, 1), 2, 1) == halves
    assert held(gridded(1, count), 1, 2) == halves


def test_the_grid_of_the_tokens_gives_each_its_own_tile():
    assert held(gridded(12, 12), 12) == [(token,) for token in range(144)]


def test_a_whole_picture_also_holds_tokens_without_a_place():
    found = units(image_granularity=Tiles(1))
    assert [unit.tokens for unit in found[:2]] == [tuple(range(9)), (9, 10, 11)]
    assert [(unit.level, unit.text) for unit in found[:2]] == [
        ("image", "image 1"),
        ("image", "image 2"),
    ]
    assert found[1].boxes == ((0.0, 0.0, 10.0, 30.0),)


def test_text_and_pictures_are_divided_each_in_its_way():
    found = units(image_granularity=Tiles(1), granularity="sentence")
    assert [unit.level for unit in found] == ["image", "image", "sentence"]
    automatic = units(image_granularity=Tiles(1), granularity="auto")
    assert [unit.level for unit in automatic] == ["image", "image", "token", "token"]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (Images(), [0, 1]),
        (Images(1), [1]),
        ("two", [None]),
        ([Images(1), "two"], [1, None]),
    ],
)
def test_explain_only_takes_pictures_and_passages(only, expected):
    found = units(image_granularity=Tiles(1), explain_only=only)
    assert [unit.image for unit in found] == expected


def test_explain_only_of_a_picture_that_is_not_there():
    with pytest.raises(ValueError, match=r"asks for picture 2, but the prompt holds 2, 0 to 1\.$"):
        units(explain_only=Images(2))


def test_pieces_of_a_picture_are_divided_into_its_patches():
    layout = lay_out(prompt(), [answer()], pictures=[WIDE, TALL])
    coarse = coarsest(layout)
    assert [unit.level for unit in coarse[:2]] == ["tile", "tile"]
    assert coarse[0].tokens == (0,)
    parts = [part for unit in coarse if unit.image == 1 for part in divided(unit, layout)]
    assert [part.tokens for part in parts] == [(9,), (10,), (11,)]


def test_frames_of_a_sound_are_joined_by_seconds():
    frames = [(0.5 * k, 0.5 * k + 0.5) for k in range(4)]
    heard = Tokens([0] * 4, "", [None] * 4, ["frame"] * 4, [None] * 4, seconds=[*frames])
    sound = Sound(2.0, (0.5, 1.0))
    each = lay_out(heard, [answer()], sound=sound).units
    assert [(unit.level, unit.seconds, unit.text) for unit in each[:2]] == [
        ("frame", (0.0, 0.5), "0.00–0.50 s"),
        ("frame", (0.5, 1.0), "0.50–1.00 s"),
    ]
    joined = lay_out(heard, [answer()], Seconds(1.0), sound=sound).units
    assert [(unit.tokens, unit.seconds) for unit in joined] == [
        ((0, 1), (0.0, 1.0)),
        ((2, 3), (1.0, 2.0)),
    ]
    with pytest.raises(ValueError, match="is of a sound, but the prompt is none"):
        lay_out(prompt(), [answer()], Seconds(1.0), pictures=[WIDE, TALL])


@pytest.mark.parametrize(
    ("given", "expected"),
    [("6x6", Tiles(6)), ("3×2", Tiles(3, 2)), ("image", Tiles(1)), (Tiles(4), Tiles(4, 4))],
)
def test_grids_by_name(given, expected):
    assert tiles_of(given) == checked_images(given) == expected


def test_names_that_are_no_grid():
    assert tiles_of("token") is None
    assert checked_images(None) == checked_images("patch") == "patch"
    assert checked_granularity("0.5s") == Seconds(0.5)
    with pytest.raises(ValueError, match=r"a grid such as '6x6', or Tiles, got '0x3'\.$"):
        checked_images("0x3")
    with pytest.raises(ValueError, match=r"^columns of Tiles must be at least 1, got 0\.$"):
        Tiles(0)
    with pytest.raises(ValueError, match=r"^Seconds must be finite and above 0, got 0\.$"):
        Seconds(0)


def explained(**changes):
    unit = Unit("patch", (0,), None, None, "prompt", level="patch", image=0, boxes=((0, 0, 4, 4),))
    fields = {
        "text": "ab x",
        "prompt_stop": 2,
        "units": [unit],
        "targets": [Target("x", 1, 3, 2, 4)],
        "base_logprobs": torch.tensor([-1.0]),
        "suppressed_logprobs": torch.tensor([[-2.0]]),
        "pictures": [WIDE],
    }
    return Explanation(**fields | changes)


def test_pictures_are_saved(tmp_path):
    heard = Unit("0–1 s", (1,), None, None, "prompt", level="frame", seconds=(0.0, 1.0))
    whole = explained(
        units=[*explained().units, heard],
        suppressed_logprobs=torch.tensor([[-2.0, -3.0]]),
        sound=Sound.of([0.0, -0.5, 0.25], 3),
        quantity="output",
    )
    whole.save(tmp_path / "e.json")
    again = load(tmp_path / "e.json")
    assert again == whole
    assert again.pictures[0].image.size == (40, 20)
    assert again.pictures[0].image.getpixel((3, 3)) == (255, 0, 0)
    assert again.sound == Sound(1.0, (0.0, 1.0, 0.5))


def test_a_large_picture_is_kept_smaller():
    kept = Picture.of(Image.new("RGB", (4096, 100)), 0)
    assert (kept.width, kept.height, kept.image.size) == (4096, 100, (1024, 25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": []}, r"^units\[0\]\.image must be None or one of the 0 pictures"),
        ({"image": None}, r"^units\[0\]\.boxes must be empty where image is None\.$"),
        ({"boxes": ((0, 0, 41, 4),)}, r"must lie within the picture of 40×20 pixels, got \(0, 0"),
        ({"boxes": ((-1, 0, 4, 4),)}, "must lie within the picture"),
        ({"boxes": ((0, 0, 0, 4),)}, "must lie within the picture"),
        ({"seconds": (0.0, 1.0)}, r"^units\[0\]\.seconds must rise from 0"),
        ({"pictures": [replace(WIDE, start=3)]}, r"^pictures\[0\]\.start must lie within"),
        ({"quantity": "probability"}, "^quantity must be 'logprob', 'logit' or 'output'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    of_unit = {name: changes.pop(name) for name in ("image", "boxes", "seconds") if name in changes}
    units = [replace(explained().units[0], **of_unit)]
    with pytest.raises(ValueError, match=message):
        explained(units=units, **changes)
