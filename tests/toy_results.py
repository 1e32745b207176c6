"""Made-up results of many methods, as an evaluation would note them."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from atman_triton.evaluate.examples import Example
from atman_triton.evaluate.faithfulness import SHARES
from atman_triton.evaluate.readings import READINGS
from atman_triton.evaluate.results import Result

METHODS = (
    "direct",
    "direct multiplicative",
    "direct log_additive",
    "direct similarity=0.6",
    "exact",
    "exact multiplicative",
    "exact log_additive",
    "exact min_shift_full",
    "exact multiplicative similarity=0.7 rule=paper",
    "released",
    "hybrid",
    "path",
    "input_x_gradient",
    "integrated_gradients",
    "grad_cam",
    "chefer",
    "rollout",
    "last_attention",
    "leave_one_out",
    "occlusion",
    "lime",
    "kernel_shap",
    "context_cite",
    "attn_lrp",
    "random",
)
_FORWARDS = {
    "direct": 2.4,
    "exact": 56.0,
    "hybrid": 14.0,
    "path": 24.0,
    "input_x_gradient": 3.0,
    "integrated_gradients": 96.0,
    "grad_cam": 3.0,
    "chefer": 3.0,
    "rollout": 1.0,
    "last_attention": 1.0,
    "leave_one_out": 110.0,
    "occlusion": 110.0,
    "lime": 128.0,
    "kernel_shap": 128.0,
    "context_cite": 128.0,
    "attn_lrp": 3.0,
    "random": 0.0,
    "released": 60.0,
}
TEXT = (
    "The employment starts on 4 September 2025. The rules of the house are part of this "
    "contract. Extra hours bring $33.80 each. Wages are looked at again on the fifth of October. "
    "The meal allowance is $25.20 per shift. Both parties signed on the twenty-fourth of "
    "February 2025. The normal salary has been set at $30.20 an hour. "
)
ANSWER = "$30.20"


def texts(count: int) -> list[Example]:
    place = TEXT.index(ANSWER)
    return [
        Example(
            f"text-{number}",
            f"{TEXT}Q: What is the pay? A:",
            f" {ANSWER}",
            (0, len(TEXT)),
            ((place, place + len(ANSWER)),),
            group=f"paragraph-{number // 3}",
            facts={"questions": 1 + number // 3 % 5},
        )
        for number in range(count)
    ]


def pictures(count: int, side: int = 48) -> list[Example]:
    found = []
    for number in range(count):
        drawn = np.full((side, side, 3), 200, dtype=np.uint8)
        mask = np.zeros((side, side), dtype=bool)
        left = 4 + number * 5 % 24
        mask[left : left + 16, 8:24] = True
        drawn[mask] = (30, 90, 160)
        image = Image.fromarray(drawn)
        found.append(
            Example(
                f"picture-{number}",
                [image, "This is a picture of"],
                " square",
                mask=mask,
                facts={"class": "square"},
            )
        )
    return found


def results(examples: list[Example], methods: tuple[str, ...] = METHODS) -> list[Result]:
    return [
        _result(example, name, number)
        for number, example in enumerate(examples)
        for name in methods
    ]


def _result(example: Example, name: str, number: int) -> Result:
    good = random.Random(name).uniform(0.25, 0.85) if name != "random" else 0.1
    rng = random.Random(f"{name} {example.id}")
    aligned = {
        reading: {
            "precision": min(max(rng.gauss(good, 0.2), 0.0), 1.0),
            "recall": min(max(rng.gauss(good, 0.3), 0.0), 1.0),
            "pointing": float(rng.random() < good),
        }
        for reading in READINGS
    }
    gap = rng.gauss(3 * good, 1)
    return Result(
        example.id,
        name,
        "choose" if number % 6 == 0 else "report",
        example.group,
        dict(example.facts),
        _FORWARDS[name.split()[0]] * rng.uniform(0.9, 1.1),
        0.1,
        aligned,
        {"removal_gap": gap, "gap_area": gap / 2, "lds": rng.gauss(good, 0.1)},
        {
            "most": [-0.3 - gap * math.sqrt(share) for share in SHARES],
            "least": [-0.3 - 2 * share**2 / good for share in SHARES],
        },
        heat=_heat(example, rng, good) if number < 12 else {},
    )


def _heat(example: Example, rng: random.Random, good: float) -> dict[str, list]:
    if example.mask is not None:
        side = example.mask.shape[0] // 12
        units = [[[x * side, y * side, side, side]] for y in range(12) for x in range(12)]
        values = [
            rng.gauss(0, 0.4) + 2 * good * bool(example.mask[y + side // 2, x + side // 2])
            for ((x, y, *_),) in units
        ]
        return {"units": units, "values": values}
    units, place = [], 0
    for word in TEXT.split(" "):
        units.append([max(place - 1, 0), place + len(word)])
        place += len(word) + 1
    values = [rng.gauss(0, 0.4) + 2 * good * (ANSWER in TEXT[a:b]) for a, b in units]
    return {"units": [each for each in units if each[1] > each[0]][: len(values)], "values": values}
