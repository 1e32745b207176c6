"""A small reader of contracts, CVs and product sheets: generator, training, shipped model."""

from .documents import Document, Question, StatedFact, make_document, prompt
from .model import MODEL_FOLDER, load_demo_model

__all__ = [
    "MODEL_FOLDER",
    "Document",
    "Question",
    "StatedFact",
    "demo_document",
    "demo_prompt",
    "load_demo_model",
    "make_document",
    "prompt",
]

_DEMO_SEED = 16897  # a contract with several rates of pay
_DEMO_QUESTION = "What is the pay per hour?"


def demo_document() -> Document:
    """The employment contract that ``make explain`` explains."""
    return make_document(_DEMO_SEED, "contract")


def demo_prompt() -> str:
    """The contract of :func:`demo_document` with the question "What is the pay per hour?"."""
    return prompt(demo_document(), _DEMO_QUESTION)
