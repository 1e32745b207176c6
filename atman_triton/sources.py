"""Which documents an answer rests on: ranked sources as JSON values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .parts import target_parts

if TYPE_CHECKING:
    from .explanation import Explanation


def sources(explanation: Explanation, top_k: int | None = None) -> dict[str, Any]:
    """What ``Explanation.sources`` returns."""
    if not explanation.documents:
        raise ValueError("sources needs documents; explain with documents=[...].")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise TypeError(f"top_k must be an int or None, got {top_k!r}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    e = explanation
    sentences = replace(
        e, parts=target_parts(e.text, e.targets, e.prompt_stop, e.target_stops, "sentence")
    )
    edges = [e.prompt_stop, *e.target_stops]
    relevances, by_sentence = e.relevances, sentences.part_relevances
    answers = []
    for branch, text in enumerate(e.answers):
        own = [
            {
                "text": part.text,
                "start": None if part.start is None else part.start - edges[branch],
                "stop": None if part.stop is None else part.stop - edges[branch],
                **_ranked(e, values, top_k),
            }
            for part, values in zip(sentences.parts, by_sentence, strict=True)
            if part.branch == branch
        ]
        answers.append({"text": text, **_ranked(e, relevances[branch], top_k), "sentences": own})
    return {"answers": answers}


def _ranked(explanation: Explanation, relevance: Tensor, top_k: int | None) -> dict[str, Any]:
    """The units of documents, and the documents by their strongest unit.

    Args:
        relevance: ``[U]``; NaN was not measured.
        top_k: So many sources.
    """
    best: dict[int, float] = {}
    found: list[tuple[float, dict[str, Any]]] = []
    for unit, score in zip(explanation.units, relevance.tolist(), strict=True):
        if unit.document is None or math.isnan(score):
            continue
        best[unit.document] = max(score, best.get(unit.document, -math.inf))
        document = explanation.documents[unit.document]
        start = stop = None
        text = unit.text
        if unit.start is not None and unit.stop is not None:  # a token may reach beyond it
            start = min(max(unit.start, document.start), document.stop)
            stop = max(min(unit.stop, document.stop), start)
            text = explanation.text[start:stop]
            start, stop = start - document.start, stop - document.start
        source = {
            "document": document.id,
            "start": start,
            "stop": stop,
            "text": text,
            "score": _number(score),
        }
        found.append((score, source))
    found.sort(key=lambda item: -item[0])  # stable: equals stay in text order
    return {
        "sources": [source for _, source in found[:top_k]],
        "documents": [
            {"document": explanation.documents[index].id, "score": _number(score)}
            for index, score in sorted(best.items(), key=lambda item: -item[1])
        ],
    }


def _number(score: float) -> float | str:
    """JSON has no infinities, so they are strings."""
    return score if math.isfinite(score) else str(score)
