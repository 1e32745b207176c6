"""Pictures of coloured shapes and a small LLaVA that names them: generator, training, model."""

from .model import IMAGE, MODEL_FOLDER, load_shapes_model
from .pictures import COLOURS, KINDS, Picture, Shape, make_picture, make_redundant_picture
from .questions import (
    DEMO_PROMPT,
    Question,
    colour_question,
    liking_question,
    name_question,
    presence_question,
)

__all__ = [
    "COLOURS",
    "DEMO_PROMPT",
    "IMAGE",
    "KINDS",
    "MODEL_FOLDER",
    "Picture",
    "Question",
    "Shape",
    "colour_question",
    "demo_picture",
    "liking_question",
    "load_shapes_model",
    "make_picture",
    "make_redundant_picture",
    "name_question",
    "presence_question",
]

_DEMO_SEED = 15  # a blue square and a red circle


def demo_picture() -> Picture:
    """The picture that ``make explain-image`` explains: two objects of about the same area."""
    return make_picture(_DEMO_SEED, 2, balanced=True)
