"""Kinds of models: how each is given a prompt, answers it, and is perturbed."""

from __future__ import annotations

from typing import Any

from .base import Prompt, Task
from .beside import BesideTask
from .classifier import ClassifierTask
from .decoder import DecoderTask
from .seq2seq import Seq2SeqTask

__all__ = ["Prompt", "Task", "task_of"]

# The last one serves all the others, or says why it cannot.
_TASKS: tuple[type[Task], ...] = (ClassifierTask, Seq2SeqTask, BesideTask, DecoderTask)


def task_of(model: Any, processor: Any = None) -> Task:
    """The task of a model.

    Args:
        model: A transformers model.
        processor: Its tokenizer or processor; None if prompts and targets are token ids.
    Raises:
        TypeError: if it is no transformers model.
        UnsupportedModelError: if it is of no kind that can be explained.
    """
    kind = next((kind for kind in _TASKS[:-1] if kind.serves(model)), _TASKS[-1])
    return kind(model, processor)
