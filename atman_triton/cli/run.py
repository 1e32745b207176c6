"""One explanation, as ``atman explain`` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from .controls import OVERLAPS, Written, place_control
from .prompt import Asked
from .shared import DTYPES, check_one_of, our_errors

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..tasks import Task

ATTENTIONS = ("both", "encoder", "cross")


def check_settings(**given: str | None) -> None:
    """Refuse values that are not among the known ones of their option."""
    from ..attention import MODES
    from ..explain import METHODS, PRESETS
    from ..parts import TARGET_GRANULARITIES
    from ..reduction import Postprocessing, Quantity
    from ..suppression import RULES

    known = {
        "preset": PRESETS,
        "mode": MODES,
        "rule": RULES,
        "dtype": DTYPES,
        "method": METHODS,
        "target_granularity": TARGET_GRANULARITIES,
        "postprocessing": get_args(Postprocessing),
        "overlap": OVERLAPS,
        "score": get_args(Quantity),
        "attention": ATTENTIONS,
    }
    for name, value in given.items():
        if value is not None:
            check_one_of(name, value, known[name])


def explain_once(
    model: Any,
    reader: Any,
    asked: Asked,
    targets: Sequence[str],
    *,
    settings: dict[str, Any],
    controls: Sequence[Written],
    overlap: str,
    progress: bool,
    **options: Any,
) -> Explanation:
    """Explain one prompt.

    Args:
        settings: Of ``Explainer``.
        **options: Of ``Explainer.explain``.
    """
    from ..documents import checked_documents, filled
    from ..explain import Explainer

    with our_errors():
        prompt = _with_documents(asked, options.get("documents")).prompt
        explainer = Explainer(model, reader, progress=progress, **settings)
        if controls:
            whole = filled(prompt, checked_documents(options.get("documents"))).prompt
            text = explainer.task.read(whole).words.text
            options["controls"] = [place_control(text, one, overlap) for one in controls]
        chosen = [_class(explainer.task, target) for target in targets]
        if len(chosen) > 1:
            options["targets"] = chosen
        elif chosen:
            options["target"] = chosen[0]
        return explainer.explain(prompt, **options)


def _with_documents(asked: Asked, documents: Any) -> Asked:
    """A place for documents in the text, in front of it; beside pictures they are put there too."""
    from ..documents import PLACEHOLDER, checked_documents, filled

    if documents is None or asked.text is None:
        return asked
    text = asked.text if PLACEHOLDER in asked.text else f"{PLACEHOLDER}\n\n{asked.text}"
    if asked.pictures:
        text = filled(text, checked_documents(documents)).prompt
    return replace(asked, text=text)


def _class(task: Task, target: str) -> str | int:
    """A class that is given by its number, unless one is called so; of other models a text."""
    if not getattr(task, "classifies", False) or not target.isdecimal():
        return target
    return target if target in task.model.config.id2label.values() else int(target)
