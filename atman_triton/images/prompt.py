"""What the layout of a prompt's pictures is read from: settings, pixels and their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..stacks import UnsupportedModelError


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

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether pictures of so many tokens each make all tokens."""
        return sum(counts) == self.tokens

    def unknown(self, what: str) -> UnsupportedModelError:
        """The error that says what about this model's pictures is not known."""
        return UnsupportedModelError(
            f"where the image tokens of this {self.model_type} stand is not known: {what}."
        )
