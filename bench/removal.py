"""How good a ranking of a prompt's units is: what deleting the units does to the answer.

*Removal gap*: the tenth of the prompt's units that stands highest is deleted from the input, and
the lowest tenth likewise; the gap is how much more the first raises the loss of the answer (nats
per token). *Leave-one-out*: the rise with one unit deleted, for every unit.

Legend: U units, P of them in the prompt, N tokens of a shortened input, T of the answer.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

import pandas
import torch
from torch import Tensor

import atman_triton as atman
from atman_triton.demo import prompt
from atman_triton.demo.evaluate import fresh_cases, generate_answers
from atman_triton.tokens import encode_prompt

SALT = "quality"
_REMOVED = 0.1  # share of the prompt's units
_BATCH_TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and the answer that is explained."""

    prompt: str
    answer: str


def answered_cases(model: Any, tokenizer: Any, count: int) -> list[Case]:
    """``count`` fresh documents that the model answers correctly, the first of the test set."""
    found: list[Case] = []
    tried = 0
    while len(found) < count:
        upto = tried + max(8, count - len(found))
        fresh = fresh_cases(upto, SALT)[tried:]
        cases = [Case(prompt(document, question), question.answer) for document, question in fresh]
        answers = generate_answers(model, tokenizer, [case.prompt for case in cases])
        found += [case for case, said in zip(cases, answers, strict=True) if said == case.answer]
        tried = upto
    return found[:count]


@torch.inference_mode()
def losses(model: Any, inputs: Sequence[Sequence[int]], answer: Sequence[int]) -> Tensor:
    """``[len(inputs)]`` mean loss of the answer's tokens behind each input of one length, nats."""
    found, size = [], max(1, _BATCH_TOKENS // (len(inputs[0]) + len(answer)))
    target = torch.tensor(answer)
    for start in range(0, len(inputs), size):
        ids = torch.tensor([[*row, *answer[:-1]] for row in inputs[start : start + size]])
        output = model(ids, logits_to_keep=len(answer), use_cache=False)
        logprobs = output.logits.float().log_softmax(-1)  # [rows, T, vocabulary]
        wanted = target.expand(len(ids), -1)[..., None]
        found.append(-logprobs.gather(-1, wanted).squeeze(-1).double().mean(-1))
    return torch.cat(found)


def without(ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """The ids but for those at some positions."""
    gone = set(positions)
    return [token for position, token in enumerate(ids) if position not in gone]


def ranking(scores: Sequence[float], permutation: Sequence[int]) -> list[int]:
    """Indices, highest score first; equal scores in the order of the permutation."""
    return sorted(permutation, key=lambda index: -scores[index])


def removed_count(units: int) -> int:
    """How many of the prompt's units are deleted."""
    return max(1, round(_REMOVED * units))


def removal_gaps(
    model: Any,
    ids: Sequence[int],
    answer: Sequence[int],
    positions: Sequence[int],
    orders: Sequence[Sequence[int]],
) -> list[float]:
    """Loss with the best units deleted less the loss with the worst deleted, nats per token.

    Args:
        ids, answer: tokens of the prompt and of what is scored behind it.
        positions: ``P``, where each unit of the prompt stands.
        orders: each ``P`` unit indices, the most relevant first.
    """
    count = removed_count(len(positions))
    ends = [frozenset(end) for order in orders for end in (order[:count], order[-count:])]
    several = list(dict.fromkeys(ends))  # rankings often agree
    rows = [without(ids, [positions[unit] for unit in end]) for end in several]
    loss = dict(zip(several, losses(model, rows, answer).tolist(), strict=True))
    return [loss[best] - loss[worst] for best, worst in zip(ends[::2], ends[1::2], strict=True)]


def leave_one_out(
    model: Any, ids: Sequence[int], answer: Sequence[int], positions: Sequence[int]
) -> list[float]:
    """``P`` rises of the answer's loss, nats per token, each with one token deleted."""
    base = losses(model, [ids], answer)
    rows = [without(ids, [position]) for position in positions]
    return (losses(model, rows, answer) - base).tolist()


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, equal values sharing the mean of their ranks."""
    frame = pandas.DataFrame({"first": first, "second": second})
    return float(frame.corr(method="spearman").loc["first", "second"])  # pyright: ignore


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return stdev(values) / math.sqrt(len(values))


class Removal:
    """One document, whose units are deleted in the order of some scores.

    Args:
        explanation: Of the document, every token a unit: it says what the units are.
        number: The document's, which seeds the order of equal scores and the random scores.
    """

    def __init__(
        self, model: Any, tokenizer: Any, case: Case, explanation: atman.Explanation, number: int
    ) -> None:
        self.model = model
        self.ids = encode_prompt(case.prompt, tokenizer, model.config.vocab_size).ids
        self.answer = [target.token_id for target in explanation.targets]
        self.places = [unit.tokens for unit in explanation.units]
        parts = [unit.part for unit in explanation.units]
        self.inside = [unit for unit, part in enumerate(parts) if part == "prompt"]
        """``P``, which of the units stand in the prompt."""
        self.positions = [self.places[unit][0] for unit in self.inside]
        rng = random.Random(f"{SALT}-ties-{number}")
        self.permutation = rng.sample(range(len(parts)), len(parts))
        self.random = [rng.random() for _ in parts]
        """``U`` scores that mean nothing."""

    def gaps(self, scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The removal gap of each method's ``U`` scores, of which only the prompt's count."""
        place = {unit: index for index, unit in enumerate(self.inside)}
        shared = [place[unit] for unit in self.permutation if unit in place]
        orders = [ranking(self.of_prompt(own), shared) for own in scores.values()]
        found = removal_gaps(self.model, self.ids, self.answer, self.positions, orders)
        return dict(zip(scores, found, strict=True))

    def leave_one_out(self) -> list[float]:
        """``U`` rises of the loss; the answer's own tokens, which are never deleted, stand last."""
        scores = [-math.inf] * len(self.places)
        rises = leave_one_out(self.model, self.ids, self.answer, self.positions)
        for unit, rise in zip(self.inside, rises, strict=True):
            scores[unit] = rise
        return scores

    def of_prompt(self, scores: Sequence[float]) -> list[float]:
        """``P`` of the ``U`` scores."""
        return [scores[unit] for unit in self.inside]
