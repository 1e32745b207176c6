"""OpenImages: photographs in which every object of a class is marked pixel by pixel.

Source: Benenson et al., 2019, "Large-scale interactive object segmentation with human annotators".
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from ..examples import Example
from .asking import TOO_LONG, Asking
from .gather import Gathered, Skipped, gather, shuffled

PROMPT = "This is a picture of"
REWORDED = "The picture shows"
LEAST_PIXELS = 200  # of the shorter side
WIDEST = 1.2  # longer side to shorter
PER_CLASS = 200

NO_IMAGE = "the images folder has no such image"
NO_MASK = "the masks folder has no such mask"
SMALL = f"a side is below {LEAST_PIXELS} pixels"
LONG = f"the longer side is over {WIDEST} times the shorter"
ENOUGH = f"its class has {PER_CLASS} already"
EMPTY = "its masks are empty"
NAMELESS = "its class has no name in the class descriptions"

SITE = "https://storage.googleapis.com/openimages/web/download_v7.html"
_CLASSES = (
    "class-descriptions-boxable.csv",
    "oidv7-class-descriptions-boxable.csv",
    "oidv7-class-descriptions.csv",
)
_SPLITS = ("validation", "test", "train")
_COLUMNS = ("MaskPath", "ImageID", "LabelName")


@dataclass(frozen=True)
class _Found:
    """A class in an image, whose files are opened when they are wanted."""

    id: str
    name: str
    image: Path
    masks: tuple[Path, ...]
    facts: dict[str, Any]

    def example(self) -> Example:
        """Opens the files."""
        image = _pixels(self.image, "RGB")
        return Example(
            id=self.id,
            prompt=[image, PROMPT],
            target=f" {self.name}",
            mask=_joined(self.masks, image.size),
            group=self.name,
            reworded=[image, REWORDED],
            facts=self.facts,
        )


class Pictures(Sequence[Example]):
    """Examples that open their picture each time they are asked for, as many would fill memory."""

    def __init__(self, found: Sequence[_Found]) -> None:
        self._found = list(found)

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Pictures: ...

    def __getitem__(self, index: int | slice) -> Example | Pictures:
        if isinstance(index, slice):
            return Pictures(self._found[index])
        return self._found[index].example()


def load_open_images(
    limit: int | None,
    *,
    path: str | Path | None = None,
    images: str | Path | None = None,
    seed: int = 0,
    model: Any = None,
    processor: Any = None,
    progress: bool = False,
) -> Gathered[Example]:
    """Photographs and the name of a class in them, filtered as the paper filters them.

    The prompt is ``[image, "This is a picture of"]``, the paper's template without an article (the
    authors' released evaluation writes "a" or "an"), and the target the class in lower case,
    without what its name has in brackets. All masks of the class in the image are joined. Kept are
    images of at least 200 pixels on the shorter side whose longer side is at most 1.2 times that,
    and of every class the first 200. ``group`` is the class. ``reworded`` says "The picture shows".

    Args:
        limit: The most pairs of image and class; None is all.
        path: Folder with ``class-descriptions-boxable.csv`` (or version 7's),
            ``validation-annotations-object-segmentation.csv`` (or test, train) and ``masks``, where
            the mask archives were unpacked, in folders of their own or not.
        images: Folder with ``<ImageID>.jpg``; None is ``images`` in ``path``. Annotated images that
            it does not have are left out and counted.
        seed: Of the order.
        model: Leave out what is too long for this model; None leaves out nothing.
        processor: Its processor.
        progress: Show a progress bar.
    Raises:
        FileNotFoundError: if a file or folder is missing.
        ValueError: if no path is given, a file is not in the site's form, or no image is left.
    Source: AtMan, 4.2 and its appendix on data.
    """
    if path is None:
        raise ValueError(
            f"path must be a folder with OpenImages' annotations and masks, from {SITE}."
        )
    folder = Path(path)
    pictures = folder / "images" if images is None else Path(images)
    names = _classes(_first_file(folder, _CLASSES))
    annotations = _first_file(
        folder, tuple(f"{split}-annotations-object-segmentation.csv" for split in _SPLITS)
    )
    for place, what in ((pictures, "images"), (folder / "masks", "masks")):
        if not place.is_dir():
            raise FileNotFoundError(f"{place} must be a folder of OpenImages' {what}, from {SITE}.")
    pairs = shuffled(_pairs(annotations).items(), lambda pair: " ".join(pair[0]), seed)
    asking = None if model is None else Asking(model, processor)
    found = gather(
        "openimages",
        _candidates(pairs, names, pictures, folder / "masks", asking),
        limit,
        progress=progress,
    )
    return Gathered(Pictures(found.kept), found.notes)


def _candidates(
    pairs: Sequence[tuple[tuple[str, str], list[str]]],
    names: dict[str, str],
    pictures: Path,
    masks: Path,
    asking: Asking | None,
) -> Iterator[_Found | Skipped]:
    per_class: Counter[str] = Counter()
    for (image, label), files in pairs:
        if label not in names:
            yield Skipped(NAMELESS)
        elif per_class[names[label]] == PER_CLASS:
            yield Skipped(ENOUGH)
        else:
            own = _candidate(image, label, names[label], files, pictures, masks, asking)
            per_class[names[label]] += isinstance(own, _Found)
            yield own


def _candidate(
    image: str,
    label: str,
    name: str,
    files: Sequence[str],
    pictures: Path,
    masks: Path,
    asking: Asking | None,
) -> _Found | Skipped:
    picture = pictures / f"{image}.jpg"
    if not picture.is_file():
        return Skipped(NO_IMAGE)
    size = width, height = _size(picture)
    if min(size) < LEAST_PIXELS:
        return Skipped(SMALL)
    if max(size) > WIDEST * min(size):
        return Skipped(LONG)
    places = [_mask_place(masks, file) for file in files]
    own = tuple(place for place in places if place is not None)
    if len(own) < len(files):  # a mask without all of them would call the object background
        return Skipped(NO_MASK)
    share = float(_joined(own, size).mean())
    if not share:
        return Skipped(EMPTY)
    facts = {
        "class": name,
        "label": label,
        "masks": len(own),
        "mask_share": share,
        "width": width,
        "height": height,
    }
    found = _Found(f"{image} {label}", name, picture, own, facts)
    if asking is not None:
        example = found.example()
        if not all(asking.fits(own, example.target) for own in (example.prompt, example.reworded)):
            return Skipped(TOO_LONG)
    return found


def _first_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there.

    Raises: FileNotFoundError: naming all of them.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} must hold {' or '.join(names)}, from {SITE}.")


def _classes(path: Path) -> dict[str, str]:
    """Label -> name in lower case, without brackets; a header is the name of no label."""
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 2:
                raise ValueError(f"{path}, line {number}: expected a label and a name, got {row}.")
            name = re.sub(r"\s*\(.*?\)", "", row[1]).strip().lower()
            if name:
                found[row[0]] = name
    return found


def _pairs(path: Path) -> dict[tuple[str, str], list[str]]:
    """Image and label -> files of masks."""
    found: dict[tuple[str, str], list[str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} must have the columns {', '.join(_COLUMNS)}, but lacks "
                f"{', '.join(missing)}; it is at {SITE}."
            )
        for row in rows:
            mask, image, label = (row[name] for name in _COLUMNS)
            if not (mask and image and label):
                raise ValueError(f"{path}, line {rows.line_num}: a field is empty: {row}.")
            found.setdefault((image, label), []).append(mask)
    return found


def _mask_place(masks: Path, name: str) -> Path | None:
    """A mask's file; the archives, named by the first character, may be unpacked in folders."""
    first = name[0]
    folders = ("", first, *(f"{split}-masks-{first}" for split in _SPLITS))
    places = (masks / folder / name for folder in folders)
    return next((place for place in places if place.is_file()), None)


def _joined(masks: Sequence[Path], size: tuple[int, int]) -> np.ndarray:
    """``[H, W]`` bool, what any of the masks covers of a picture of ``size`` (width, height)."""
    found = np.zeros(size[::-1], bool)
    for path in masks:
        mask = _pixels(path, "L").resize(size, Image.Resampling.NEAREST)
        found |= np.asarray(mask) > 0
    return found


def _size(path: Path) -> tuple[int, int]:
    """Width and height, without decoding the rest."""
    try:
        with Image.open(path) as file:
            return file.size
    except OSError as error:
        raise _damaged(path, error) from error


def _pixels(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except OSError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} is no whole picture: {error}; download it again from {SITE}.")
