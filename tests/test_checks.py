"""What must hold between documents, neighbours, parts and ways to read an explanation."""

import dataclasses
from typing import Any

import pytest
import torch
from test_explanation import TARGET, TARGET_C, small
from toy_explanations import explain, explain_several, sourced

from atman_triton.explanation import Unit
from atman_triton.pieces import Document, Neighbour, TargetPart

NAN, INF = float("nan"), float("inf")
change = dataclasses.replace

# "ab cd ef" asks, " x y" and " z" answer.
A, C = Document("a", 0, 2), Document("c", 3, 5)
UNITS = [
    Unit("ab", (0,), 0, 2, "prompt", document=0),
    Unit(" cd", (1,), 2, 5, "prompt", document=1),
    Unit(" ef", (2,), 5, 8, "prompt"),
    Unit(" x", (3,), 8, 10, "target", branch=0),
]
NEAR = Neighbour(1, 0.3, 0.75, 2, 5)


def asked(**changes: Any):
    fields: dict[str, Any] = {
        "text": "ab cd ef x y z",
        "prompt_stop": 8,
        "target_stops": [12, 14],
        "units": UNITS,
        "targets": [
            dataclasses.replace(TARGET, token=3, start=8, stop=10),
            dataclasses.replace(TARGET, token=4, start=10, stop=12),
            dataclasses.replace(TARGET_C, token=3, start=12, stop=14),
        ],
        "base_logprobs": -torch.ones(3),
        "suppressed_logprobs": torch.tensor([[-2.0, -2, -2, NAN]] * 3),
        "documents": [A, C],
    }
    return small(**fields | changes)


def with_unit(index, **changes):
    return {"units": [change(u, **changes) if i == index else u for i, u in enumerate(UNITS)]}


def with_near(unit=0, **changes):
    return with_unit(unit, neighbours=(change(NEAR, **changes),))


def parts(*rows, **changes):
    branches = [0 if each and each[0] < 2 else 1 for each in rows]
    made = [TargetPart("x", each, None, None, b) for each, b in zip(rows, branches, strict=True)]
    return {"parts": [change(part, **changes) for part in made]}


def test_it_can_be_right():
    near = (NEAR, Neighbour(3, 0.5, 0.6, 8, 10, 0), Neighbour(3, 0.5, 0.6, None, None, 1))
    explanation = asked(**with_unit(0, neighbours=near), **parts((0,), (1,), (2,)))
    assert explanation.units[0].neighbours == near
    assert asked(**parts((0, 1), (2,))).parts != explanation.parts
    # A token may hold the space before its document, and that behind it.
    asked(documents=[Document("a", 0, 2), Document("c", 3, 4)], **with_unit(1, stop=4))
    asked(documents=[Document("a", 0, 1), Document("c", 3, 5)], **with_unit(0, stop=1))
    asked(**with_unit(2, start=None, stop=None, document=1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"postprocessing": "cube"},
            ValueError,
            "postprocessing must be 'none', 'absolute' or 'square', got 'cube'.",
        ),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1."),
        ({"contrast": "yes"}, TypeError, "contrast must be True or False, got 'yes'."),
        ({"documents": ["a"]}, TypeError, "documents[0] must be a Document, got str."),
        (
            {"documents": [change(A, id=7)]},
            TypeError,
            "documents[0].id must be a str, got int.",
        ),
        (
            {"documents": [A, change(C, id="a")]},
            ValueError,
            "documents[1].id must be unique, but 'a' came before.",
        ),
        (
            {"documents": [C, A]},
            ValueError,
            "documents[1] must span characters of the prompt behind the document before it, "
            "within [5, 8] and at least one, got 0:2.",
        ),
        (
            {"documents": [A, change(C, start=1)]},
            ValueError,
            "documents[1] must span characters of the prompt behind the document before it, "
            "within [2, 8] and at least one, got 1:5.",
        ),
        ({"documents": [A, change(C, stop=9)]}, ValueError, "documents[1] must span characters"),
        ({"documents": [A, change(C, stop=3)]}, ValueError, "documents[1] must span characters"),
        ({"documents": [change(A, start=-1)]}, ValueError, "documents[0] must span characters"),
        (
            {"documents": [A]},
            ValueError,
            "units[1].document must be None or one of the 1 documents, counted from 0, got 1.",
        ),
        (
            with_unit(2, document=True),
            ValueError,
            "units[2].document must be None or one of the 2 documents, counted from 0, got True.",
        ),
        (with_unit(2, document=-1), ValueError, "units[2].document must be None or one of"),
        (
            with_unit(2, document=1),
            ValueError,
            "units[2] must span characters of document 'c', within [3, 5], got 5:8.",
        ),
        (
            with_unit(1, document=0),
            ValueError,
            "units[1] must span characters of document 'a', within [0, 2], got 2:5.",
        ),
        (
            with_unit(3, document=1),
            ValueError,
            "units[3].document must be None for a piece of a target.",
        ),
        (
            with_unit(0, neighbours=(1,)),
            TypeError,
            "units[0].neighbours[0] must be a Neighbour, got int.",
        ),
        (
            with_near(factor=True),
            TypeError,
            "units[0].neighbours[0].factor must be a number, got True.",
        ),
        (
            with_near(factor=NAN),
            ValueError,
            "units[0].neighbours[0].factor must be finite, got nan.",
        ),
        (
            with_near(similarity=INF),
            ValueError,
            "units[0].neighbours[0].similarity must be finite, got inf.",
        ),
        (
            with_near(branch=2),
            ValueError,
            "units[0].neighbours[0].branch must be None in the prompt, else lie in [0, 1], got 2.",
        ),
        (
            with_near(3, start=12, stop=14, branch=1),
            ValueError,
            "units[3].neighbours[0].branch must be None or the unit's own target 0, got 1.",
        ),
        (
            with_near(token=0),
            ValueError,
            "units[0].neighbours[0].token must be a token outside of the unit that was not named "
            "before, got 0.",
        ),
        (
            with_unit(0, neighbours=(NEAR, NEAR)),
            ValueError,
            "units[0].neighbours[1].token must be a token outside of the unit",
        ),
        (
            with_near(start=None),
            ValueError,
            "units[0].neighbours[0] must span characters within [0, 14], got None:5.",
        ),
        (
            with_near(start=8, stop=10),
            ValueError,
            "units[0].neighbours[0] must span characters of the prompt, within [0, 8], got 8:10.",
        ),
        (
            with_near(branch=1),
            ValueError,
            "units[0].neighbours[0] must span characters of target 1, within [12, 14], got 2:5.",
        ),
        ({"parts": [(0, 1, 2)]}, TypeError, "parts[0] must be a TargetPart, got tuple."),
        (
            parts((0, 1), ()),
            ValueError,
            "parts[1].rows must rise within [0, 2], at least one, got [].",
        ),
        (
            parts((1, 0), (2,)),
            ValueError,
            "parts[0].rows must rise within [0, 2], at least one, got [1, 0].",
        ),
        (
            parts((0, 0, 1), (2,)),
            ValueError,
            "parts[0].rows must rise within [0, 2], at least one, got [0, 0, 1].",
        ),
        (
            parts((0, 1), (2, 3)),
            ValueError,
            "parts[1].rows must rise within [0, 2], at least one, got [2, 3].",
        ),
        (
            parts((-1, 0, 1), (2,)),
            ValueError,
            "parts[0].rows must be target tokens that no part before it holds, got [-1, 0, 1].",
        ),
        (
            parts((0, 1), (1,), (2,)),
            ValueError,
            "parts[1].rows must be target tokens that no part before it holds, got [1].",
        ),
        (
            parts((0, 1, 2)),
            ValueError,
            "parts[0] must lie within its target 0, got tokens of 0, 1.",
        ),
        (
            parts((0, 1), (2,), branch=0),
            ValueError,
            "parts[1] must lie within its target 0, got tokens of 1.",
        ),
        (
            parts((0,), (2,)),
            ValueError,
            "parts must hold every target token, missing are [1]; leave parts empty for one per "
            "target.",
        ),
        (
            parts((2,), (0, 1)),
            ValueError,
            "parts must be in text order, got first tokens [2, 0].",
        ),
        (
            parts((0, 1), (2,), start=0, stop=15),
            ValueError,
            "parts[0] must span characters within [0, 14], got 0:15.",
        ),
        (
            parts((0, 1), (2,), start=8, stop=14),
            ValueError,
            "parts[0] must span characters of target 0, within [8, 12], got 8:14.",
        ),
        (
            {"coarse": asked(documents=[A, C, Document("e", 6, 8)])},
            ValueError,
            "coarse must explain the same prompt and targets; documents differ.",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, error, message):
    with pytest.raises(error) as caught:
        asked(**changes)
    assert str(caught.value).startswith(message)


def test_of_one_target_too_neighbours_stand_where_they_belong():
    explanation = sourced(explain())
    owners = {near.branch for unit in explanation.units for near in unit.neighbours}
    assert owners == {None, 0}
    units = [
        change(u, neighbours=tuple(change(near, branch=None) for near in u.neighbours))
        for u in explanation.units
    ]
    with pytest.raises(ValueError, match="must span characters of the prompt, within"):
        change(explanation, units=units)


def test_other_targets_need_other_parts():
    with pytest.raises(ValueError, match=r"missing are \[2, 3, 4\]; leave parts empty"):
        change(explain_several(), parts=explain().parts)
