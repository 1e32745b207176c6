"""The keyword baseline: BM25 over the sentences of one document."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def bm25_scores(
    query: str, sentences: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> list[float]:
    """BM25 score of each sentence for a query, the sentences being the whole collection.

    Args:
        query: the question.
        sentences: the texts to rank.
        k1: saturation of the term frequency.
        b: strength of the length normalisation.
    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009.
    """
    bags = [Counter(_words(sentence)) for sentence in sentences]
    mean = sum(bag.total() for bag in bags) / max(len(bags), 1)
    scores = [0.0] * len(bags)
    for word in set(_words(query)):
        holding = sum(word in bag for bag in bags)
        weight = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        for index, bag in enumerate(bags):
            count = bag[word]
            norm = count + k1 * (1 - b + b * bag.total() / mean)
            scores[index] += weight * count * (k1 + 1) / norm
    return scores


def bm25_best(query: str, sentences: Sequence[str]) -> int:
    """Index of the sentence that keywords point to; the first of equals."""
    scores = bm25_scores(query, sentences)
    return max(range(len(scores)), key=scores.__getitem__)


def _words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"\w+", text.lower())
