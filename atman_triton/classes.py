"""What a classifier's outputs mean: its labels, and the number that a class gets.

Legend: B rows, T tokens, C classes, K classes that are scored, P tokens whose class is scored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduction import Quantity

Problem = Literal["single_label", "multi_label", "regression"]
Kind = Literal["sequence", "token", "image"]

_SHOWN = 12  # labels that an error message lists
_KINDS: dict[str, Kind] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForImageClassification": "image",
}


def kind_of(model: Any) -> Kind | None:
    """What a model classifies, by the name of its class or of one that it inherits from.

    None if it is no classifier.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if hasattr(model, "get_base_model"):  # adapters (PEFT)
        model = model.get_base_model()
    names = [each.__name__ for each in type(model).__mro__]
    return next((kind for end, kind in _KINDS.items() if any(end in n for n in names)), None)


def problem_of(config: Any) -> Problem:
    """What the head was made for: one class of all, any of them, or numbers.

    A single output is taken for a number, unless the configuration says that it is a label.
    """
    if config.problem_type == "multi_label_classification":
        return "multi_label"
    if config.problem_type == "regression" or config.num_labels == 1:
        return "regression"
    return "single_label"


def label_of(config: Any, index: int) -> str:
    """The name of a class."""
    return str(config.id2label[index])


def class_of(name: str, target: Any, config: Any) -> int:
    """The index of a class that is given by its name or its index.

    Args:
        name: Of the argument, for messages.
        target: str, exactly as in ``config.id2label``, or an integer.
        config: The model's.
    Raises:
        TypeError: if it is neither.
        ValueError: if the model has no such class, or several of that name.
    """
    count = config.num_labels
    if isinstance(target, str):
        return _class_named(name, target, [label_of(config, index) for index in range(count)])
    kind = getattr(target, "dtype", type(target))
    try:
        if kind in (bool, torch.bool):
            raise TypeError
        index = operator.index(target)
    except TypeError:
        raise TypeError(f"{name} must be a class name or a class index, got {target!r}.") from None
    if not 0 <= index < count:
        raise ValueError(f"{name} must be a class index within 0..{count - 1}, got {index}.")
    return index


def _class_named(name: str, target: str, labels: list[str]) -> int:
    found = [index for index, label in enumerate(labels) if label == target]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{name} must name one class, but {len(found)} are called {target!r}; give one of the "
            f"indices {', '.join(map(str, found))}."
        )
    by_case = {label.casefold(): label for label in labels}
    near = [by_case[each] for each in get_close_matches(target.casefold(), by_case)]
    if near:
        hint = f"near ones are {', '.join(map(repr, near))}"
    else:
        more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
        hint = f"they are {', '.join(map(repr, labels[:_SHOWN]))}{more}"
    raise ValueError(
        f"{name} must be one of the model's {len(labels)} classes, got {target!r}; {hint}."
    )


_READINGS: dict[Quantity, dict[Problem, Callable[[Tensor], Tensor]]] = {
    "logprob": {"single_label": lambda x: x.log_softmax(-1), "multi_label": F.logsigmoid},
    "logit": {"single_label": lambda x: x, "multi_label": lambda x: x},
    "output": {"regression": lambda x: x},
}


@dataclass(frozen=True)
class Readout:
    """Which numbers are read off a classifier's logits.

    Args:
        classes: ``K`` indices.
        problem: What the head was made for.
        quantity: ``logprob``: of one class of all the log softmax, of labels that do not exclude
            each other the log sigmoid. ``logit``: what either is taken of. ``output``: that of a
            regression, which has no other.
        places: Of token classification, the ``P`` tokens whose class is scored; None where there
            is one answer for the whole input.
    """

    classes: tuple[int, ...]
    problem: Problem = "single_label"
    quantity: Quantity = "logprob"
    places: tuple[int, ...] | None = None

    @property
    def rows(self) -> list[range]:
        """Of each class, its rows among the ``M`` = K · P (or K) numbers."""
        width = 1 if self.places is None else len(self.places)
        return [range(k * width, (k + 1) * width) for k in range(len(self.classes))]

    def __call__(self, logits: Tensor) -> Tensor:
        """``[B, C]`` or ``[B, T, C]`` to ``[B, M]`` float32, on the logits' device."""
        if self.places is not None:
            logits = logits[:, list(self.places)]  # [B, P, C]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = _READINGS[self.quantity][self.problem](logits)[..., list(self.classes)]
        return found.transpose(1, -1).flatten(1).float()
