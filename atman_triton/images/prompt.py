"""What the layout of a prompt's pictures is read from: settings, pixels and their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..stacks import UnsupportedModelError
from .geometry import CLASS, Axis, Cell, Span

# Vision towers -> whether the first of their tokens is a class token.
_HAS_CLASS = {"clip_vision_model": True, "siglip_vision_model": False}
_BACKENDS = ("Pil", "Fast")  # endings of the names of image processors that do the same


@dataclass(frozen=True)
class Prompt:
    """A prompt as its processor prepared it.

    Args:
        model_type: The model's family.
        config: The model's configuration.
        processor: What prepared the prompt.
        encoding: What it returned.
        sizes: Width and height of the pictures.
        tokens: How many tokens stand for images.
    """

    model_type: str
    config: Any
    processor: Any
    encoding: Mapping[str, Any]
    sizes: Sequence[tuple[int, int]]
    tokens: int

    def tensor(self, name: str) -> Tensor:
        """A tensor of the encoding.

        Raises: ValueError: if it is not there.
        """
        found = self.encoding.get(name)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"encoding must hold the tensor {name}, which the processor of a "
                f"{self.model_type} returns with return_tensors='pt', got {type(found).__name__}."
            )
        return found

    def shown(self) -> tuple[int, int]:
        """Columns and rows of pixels of what the vision tower is shown at a time."""
        height, width = self.tensor("pixel_values").shape[-2:]
        return width, height

    def patches(self, columns: Axis, rows: Axis, merged: int = 1) -> tuple[list[Span], list[Span]]:
        """Columns and rows of squares of ``merged`` by ``merged`` of the tower's patches."""
        size = self.config.vision_config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return columns.patches(width * merged), rows.patches(height * merged)

    def setting(self, name: str, default: Any = None) -> Any:
        """How the processor prepares pictures: its own word, else its image processor's."""
        own = getattr(self.processor, "images_kwargs", None) or {}
        found = own.get(name)
        if found is None:
            found = getattr(self.processor.image_processor, name, None)
        return default if found is None else found

    def edges(self, name: str) -> dict[str, int]:
        """A setting that is a size: its named edges."""
        found = self.setting(name) or {}
        named = found if isinstance(found, Mapping) else vars(found)
        names = ("height", "width", "shortest_edge", "longest_edge")
        return {key: int(named[key]) for key in names if named.get(key)}

    def prepared(self, columns: Axis, rows: Axis) -> tuple[Axis, Axis]:
        """What resizing and a centre crop make of a picture or a tile of one.

        Raises: UnsupportedModelError: if the processor resizes in another way.
        """
        if self.setting("do_resize", True):
            width, height = self._resized(columns.pixels, rows.pixels)
            columns, rows = columns.resized(width), rows.resized(height)
        if self.setting("do_center_crop", False):
            crop = self.edges("crop_size")
            columns, rows = columns.centred(crop["width"]), rows.centred(crop["height"])
        return columns, rows

    def matched(self, columns: Axis, rows: Axis) -> tuple[Axis, Axis]:
        """The same as :meth:`prepared`, where that is what the tower is shown.

        Raises: ValueError: if it is not.
        """
        before = f"{columns.pixels}x{rows.pixels}"
        columns, rows = self.prepared(columns, rows)
        if (columns.pixels, rows.pixels) != self.shown():
            raise ValueError(
                f"pixel_values must show {before} pixels in {columns.pixels}x{rows.pixels} by the "
                f"processor's settings, got {'x'.join(map(str, self.shown()))}; do sizes fit the "
                "pictures?"
            )
        return columns, rows

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        size = self.edges("size")
        if set(size) == {"height", "width"}:
            return size["width"], size["height"]
        if set(size) != {"shortest_edge"}:
            raise self.unknown(f"its processor resizes to {size}")
        edge = size["shortest_edge"]
        longer = int(edge * max(width, height) / min(width, height))
        return (edge, longer) if width <= height else (longer, edge)

    def selected(self, cells: list[Cell]) -> list[Cell]:
        """The cells of a tower's tokens that go on to the language model.

        Raises: UnsupportedModelError: if the tower is of another kind.
        """
        tower = self.config.vision_config.model_type
        if tower not in _HAS_CLASS:
            raise self.unknown(
                f"its vision tower is a {tower}; known are {', '.join(sorted(_HAS_CLASS))}"
            )
        tokens = [CLASS, *cells] if _HAS_CLASS[tower] else cells
        return tokens[1:] if self.config.vision_feature_select_strategy == "default" else tokens

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether pictures of so many tokens each make all tokens."""
        return sum(counts) == self.tokens

    def unknown(self, what: str) -> UnsupportedModelError:
        """The error that says what about this model's pictures is not known."""
        return UnsupportedModelError(
            f"where the image tokens of this {self.model_type} stand is not known: {what}."
        )


class Family(NamedTuple):
    """A family of models: the rule by which its image tokens stand, and whose rule that is.

    Args:
        cells: What each picture's tokens stand for, in order.
        processors: Image processors that it holds for.
    """

    cells: Callable[[Prompt], list[list[Cell]]]
    processors: tuple[str, ...]


def is_one_of(image_processor: Any, names: Sequence[str]) -> bool:
    """Whether an image processor is of one of these classes, by whatever backend."""
    kinds = {kind.__name__ for kind in type(image_processor).__mro__}
    return any(name + end in kinds for name in names for end in ("", *_BACKENDS))
