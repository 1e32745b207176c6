"""Every reading is what the explanation itself gives where it is read that way."""

from dataclasses import replace

import pytest
import torch

from atman_triton import Explainer
from atman_triton.demo import load_demo_model
from atman_triton.evaluate.readings import READINGS, read

PROMPT = "The pay is $30.20 per hour. Q: What is the pay per hour? A:"


@pytest.fixture(scope="module")
def explainer():
    return Explainer(*load_demo_model(), progress=False)


@pytest.mark.parametrize("reading", READINGS)
def test_a_reading_is_the_relevance_of_an_explanation_read_that_way(explainer, reading):
    explanation = explainer.explain(PROMPT, target="$30.20")
    how, reduction = READINGS[reading]
    whole = replace(explanation, postprocessing=how, reduction=reduction).relevance
    assert torch.equal(read(explanation, reading).nan_to_num(7), whole.nan_to_num(7))
    assert explanation.scores.isnan().any()  # of the answer's own tokens


def test_several_targets_are_refused(explainer):
    explanation = explainer.explain(PROMPT, targets=["$30.20", "23"])
    with pytest.raises(ValueError, match="must be of one target, got 2"):
        read(explanation, "signed mean")
