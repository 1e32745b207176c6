"""Explanations made by hand: no model, known numbers."""

import math
import re
from dataclasses import replace
from typing import Any

import torch

from atman_triton.explanation import Explanation, LeftOut, Target, Unit
from atman_triton.pieces import Document, Neighbour, TargetPart

CONTRACT = "The pay is 34 dollars an hour. Overtime is 51 dollars.\nQ: Which pay? A:"
HOSTILE = (
    '</script><script>alert(1)</script> <img src=x onerror="alert(1)"> '
    "\"double\" 'single' & &amp; {{data}} {{text}} <!-- ]]> [bold]markup[/bold] :smile: "
    "$x_1$ \\alpha \x1b[31mred \u202e\x00\t\u2028 漢字かな 🙂 e\u0301"
)


def explain(
    prompt=CONTRACT, answer=" 34 dollars", scores=None, reduction: Any = "mean", **provenance
):
    """An explanation whose units are the words of prompt and answer, each with the space before it.

    ``scores`` maps words to what they contribute to every target; all others contribute 0.
    """
    text = prompt + answer
    spans = [
        (start + match.start(), start + match.end())
        for start, part in ((0, prompt), (len(prompt), answer))
        for match in re.finditer(r"\n| ?[^ \n]+| ", part)
    ]
    first = sum(start < len(prompt) for start, _ in spans)
    units = [
        Unit(text[start:stop], (index,), start, stop, "prompt" if index < first else "target")
        for index, (start, stop) in enumerate(spans[:-1])
    ]
    targets = [
        Target(text[start:stop], index, 100 + index, start, stop)
        for index, (start, stop) in enumerate(spans)
        if index >= first
    ]
    scores = {"34": 2.0, "pay": 1.0, "51": -0.5} if scores is None else scores
    values = torch.tensor([[scores.get(u.text.strip(), 0.0) for u in units] for _ in targets])
    for row, target in zip(values, targets, strict=True):
        row[[u.tokens[0] >= target.token for u in units]] = math.nan
    base = torch.tensor([-0.25 * (index + 1) for index in range(len(targets))])
    return Explanation(
        text=text,
        prompt_stop=len(prompt),
        units=units,
        targets=targets,
        base_logprobs=base,
        suppressed_logprobs=base[:, None] - values,
        reduction=reduction,
        left_out=[LeftOut("<s>", (0,), "special token")],
        provenance={
            "model": "toy",
            "preset": "default",
            "mode": "min_shift",
            "factor": 0.1,
            "layers": None,
            "runs": len(units) + 1,
            "seconds": 0.5,
        }
        | provenance,
    )


def merge(explanations, **changes):
    """Several explanations of one prompt as one of several targets: what ``branch`` undoes."""
    first = explanations[0]
    stop = first.prompt_stop
    units = [unit for unit in first.units if unit.part == "prompt"]
    text, stops, targets, rows, left_out = first.prompt, [], [], [], list(first.left_out)
    blocks = []
    for branch, each in enumerate(explanations):
        assert each.prompt == first.prompt
        by = len(text) - stop
        text += each.text[stop:]
        stops.append(len(text))
        own = [
            replace(unit, branch=branch, start=unit.start + by, stop=unit.stop + by)
            for unit in each.units
            if unit.part == "target"
        ]
        targets += [
            replace(target, branch=branch, start=target.start + by, stop=target.stop + by)
            for target in each.targets
        ]
        blocks.append((len(units), len(own)))
        units += own
    for each, (start, count) in zip(explanations, blocks, strict=True):
        scores = torch.full((len(each.targets), len(units)), math.nan)
        prompt = len(each.units) - count
        scores[:, :prompt] = each.suppressed_logprobs[:, :prompt]
        scores[:, start : start + count] = each.suppressed_logprobs[:, prompt:]
        rows.append(scores)
    fields = {
        "text": text,
        "target_stops": stops,
        "units": units,
        "targets": targets,
        "base_logprobs": torch.cat([each.base_logprobs for each in explanations]),
        "suppressed_logprobs": torch.cat(rows),
        "left_out": left_out,
        "parts": [],
    }
    return replace(first, **fields | changes)


def explain_several(count=None, **changes):
    """One contract, several questions' answers: three by hand, or ``count`` of one word each."""
    if count is not None:
        words = [f" {index}" for index in range(count)]
        return merge([explain(answer=w, scores={"34": 0.01 * i}) for i, w in enumerate(words)])
    answers = {
        " 34 dollars": {"34": 2.0, "pay": 1.0},
        " 51 dollars": {"51": 1.5, "Overtime": 1.0, "34": -0.5},
        " no": {"hour.": 0.25},
    }
    return merge(
        [explain(answer=text, scores=scores) for text, scores in answers.items()], **changes
    )


def with_effects(explanation, direct, method="hybrid"):
    """The same with the named words' effect direct, all others' total."""
    units = [
        replace(unit, effect="direct" if unit.text.strip() in direct else "total")
        for unit in explanation.units
    ]
    return replace(explanation, units=units, method=method)


def coarser(explanation, level="sentence", pattern=r"[^\n.]*[\n.]+|[^\n.]+$", **changes):
    """The same prompt and targets by larger units, each the sum of what it is made of."""
    spans = [match.span() for match in re.finditer(pattern, explanation.prompt)]
    units, columns = [], []
    for start, stop in spans:
        inside = [
            index
            for index, unit in enumerate(explanation.units)
            if unit.part == "prompt" and start <= unit.start < stop
        ]
        tokens = tuple(token for index in inside for token in explanation.units[index].tokens)
        units.append(Unit(explanation.text[start:stop], tokens, start, stop, "prompt", level=level))
        columns.append(explanation.scores[:, inside].sum(1))
    suppressed = explanation.base_logprobs[:, None] - torch.stack(columns, 1)
    fields = {"units": units, "suppressed_logprobs": suppressed, "method": "exact"}
    return replace(explanation, **fields | changes)


def hierarchical():
    """Words of the sentences that mattered, chosen from sentences, chosen from paragraphs."""
    words = explain(scores={"34": 2.0, "pay": 1.0, "dollars": 0.25, "51": -0.5})
    sentences = coarser(words)
    paragraphs = coarser(words, "paragraph", r"[^\n]*\n|[^\n]+$")
    kept = [index for index, unit in enumerate(words.units) if unit.start < 29 or unit.branch == 0]
    refined = [replace(words.units[index], level="word") for index in kept]
    rest = sentences.units[1:]
    suppressed = [words.suppressed_logprobs[:, kept], sentences.suppressed_logprobs[:, 1:]]
    first = sum(unit.part == "prompt" for unit in refined)
    order = [*range(first), *range(len(kept), len(kept) + len(rest)), *range(first, len(kept))]
    return replace(
        words,
        units=[(refined + rest)[index] for index in order],
        suppressed_logprobs=torch.cat(suppressed, 1)[:, order],
        method="hierarchical",
        coarse=replace(sentences, method="hierarchical", coarse=paragraphs),
    )


def by_token(explanation):
    """A part for every target token."""
    return [
        TargetPart(target.text, (row,), target.start, target.stop, target.branch)
        for row, target in enumerate(explanation.targets)
    ]


def sourced(explanation, **changes):
    """The same with both sentences as documents, a part per target token, and amounts alike."""
    middle = explanation.text.index(" Overtime")
    documents = [Document("pay", 0, middle), Document("overtime", middle + 1, 54)]
    amounts = [u for u in explanation.units if u.text.strip() in ("34", "51", "pay")]
    units = []
    for unit in explanation.units:
        owner = None if unit.start >= 54 else int(unit.start >= middle)
        near = [
            Neighbour(other.tokens[0], 0.28, 0.8, other.start, other.stop, other.branch)
            for other in amounts
            if unit in amounts and other != unit and None in (unit.branch, other.branch)
        ]
        units.append(replace(unit, document=owner, neighbours=tuple(near)))
    fields = {"units": units, "documents": documents, "parts": by_token(explanation)}
    return replace(explanation, **fields | changes)


def as_version(data, version):
    """What version 2, 3 or 4 of the format wrote of an explanation saved now."""
    added = {"pictures", "sound", "quantity"}
    added |= (
        {"documents", "parts", "postprocessing", "normalize", "contrast"} if version < 4 else set()
    )
    added |= {"together_logprobs"} if version < 3 else set()
    of_unit = {"image", "boxes", "seconds"} | ({"document", "neighbours"} if version < 4 else set())
    old = {name: value for name, value in data.items() if name not in added}
    old["units"] = [
        {name: value for name, value in unit.items() if name not in of_unit}
        for unit in data["units"]
    ]
    if old["coarse"] is not None:
        old["coarse"] = as_version(old["coarse"], version)
    return old | ({"version": version} if "version" in data else {})
