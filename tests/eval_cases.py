"""Results made by hand, for what is done with them."""

from atman_triton.evaluate.examples import Example
from atman_triton.evaluate.readings import READINGS
from atman_triton.evaluate.results import Result


def result(example, method="direct", *, split="report", precision=0.5, best=None, **changes):
    """A result whose precision is the same in all readings but one, which has 0.1 more."""
    alignment = {
        reading: {
            "precision": precision + 0.1 * (reading == best),
            "recall": precision / 2,
            "pointing": 1.0,
        }
        for reading in READINGS
    }
    values = {
        "forwards": 3.0,
        "seconds": 0.5,
        "faithfulness": {"removal_gap": 2.0, "deletion": 0.25},
        "alignment": alignment,
    }
    return Result(example, method, split, **(values | changes))


def example(name, target="5", **changes):
    """A sentence with a question."""
    prompt = f"The pay of {name} is 5 and no more. Q: What is the pay? A:"
    region = (0, prompt.index(" Q:"))
    labels = ((prompt.index("5"), prompt.index("5") + 1),)
    return Example(name, prompt, target, region, labels, **changes)
