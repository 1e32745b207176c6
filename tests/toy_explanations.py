"""Explanations made by hand: no model, known numbers."""

import math
import re
from typing import Any

import torch

from atman_triton.explanation import Explanation, LeftOut, Target, Unit

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
