"""What true removal says about an explanation of one document.

``gap``: the removal gap; ``rank correlation``: Spearman's with leave-one-out, over the prompt's
tokens; ``top 5``: the share of leave-one-out's five largest among the explanation's five largest;
``precision``: of the label (see ``bench.studies.common``).

Legend: P tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import atman_triton as atman
from bench.quality import token_scores
from bench.removal import Removal, rank_correlation, ranking
from bench.studies.common import Labelled, label_precision

GAP, PRECISION, CORRELATION, TOP = "removal gap", "precision", "rank correlation", "top 5"
MEASURES = (GAP, PRECISION, CORRELATION, TOP)
_TOP = 5


class Truth(Removal):
    """One document, each of its tokens deleted in turn.

    Args:
        explanation: Of the document, every token a unit: it says what the units are.
        number: The document's, which seeds the order of equal scores.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        case: Labelled,
        explanation: atman.Explanation,
        number: int,
    ) -> None:
        super().__init__(model, tokenizer, case.case, explanation, number)
        self.labelled = case
        self.rises = self.of_prompt(self.leave_one_out())
        """``P`` rises of the loss, nats per token of the answer."""

    def order(self, scores: Sequence[float]) -> list[int]:
        """``P`` places, the highest of ``P`` scores first; equal ones as in the gap."""
        place = {unit: index for index, unit in enumerate(self.inside)}
        return ranking(scores, [place[unit] for unit in self.permutation if unit in place])

    def overlap(self, scores: Sequence[float], count: int = _TOP) -> float:
        """Share of leave-one-out's largest among the largest of ``P`` scores."""
        theirs, own = self.order(self.rises)[:count], self.order(scores)[:count]
        return len(set(theirs) & set(own)) / len(theirs)

    def prompt_scores(self, explanation: atman.Explanation) -> list[float]:
        """``P`` relevances; a token of a larger piece has an equal part of the piece's."""
        return self.of_prompt(token_scores(explanation, self.places))

    def judge(self, explanations: Mapping[str, atman.Explanation]) -> dict[str, dict[str, float]]:
        """Of each explanation, every one of ``MEASURES``; NaN where one is not defined."""
        scores = {
            name: token_scores(explanation, self.places)
            for name, explanation in explanations.items()
        }
        gaps = self.gaps(scores)
        found = {}
        for name, explanation in explanations.items():
            own = self.of_prompt(scores[name])
            found[name] = {
                GAP: gaps[name],
                PRECISION: label_precision(explanation, self.labelled),
                CORRELATION: rank_correlation(own, self.rises),
                TOP: self.overlap(own),
            }
        return found
