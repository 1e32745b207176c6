"""The study of interaction: pairs worked out by hand, and against plain manipulated passes."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from atman_triton import manipulate
from atman_triton.demo import load_demo_model
from atman_triton.tokens import encode_prompt
from bench.studies import interaction
from bench.studies.common import Labelled
from bench.studies.interaction import Pairs

CASE = Labelled("The fee is 9 euros.", "What is the fee?", " 9 euros", ((0, 19),), (0,))


def pairs(similarity, interactions, equal=None, effects=None, distance=None):
    count = len(similarity)
    return Pairs(
        np.array(similarity),
        np.array(interactions),
        np.arange(1.0, count + 1) if distance is None else np.array(distance),
        np.ones((count, 2)) if effects is None else np.array(effects),
        np.zeros(count, bool) if equal is None else np.array(equal),
    )


def test_measures_of_four_pairs():
    """The first and the third stand for one another; S is above 2 of 2, and above 1 of 2."""
    found = interaction.measures(
        pairs(
            [1.0, 0.2, 0.3, 0.5],
            [0.4, 0.0, 0.1, -0.3],
            equal=[True, False, False, False],
            effects=[[0.0, 5.0], [1.0, 1.0], [2.0, -2.0], [0.5, 0.5]],
            distance=[9.0, 1.0, 1.0, 2.0],
        )
    )
    assert found[interaction.SIMILARITY] == 3 / 4
    assert found[interaction.UNLIKE] == 1 / 2  # 0.3 against 0.2 and 0.5
    assert found[interaction.TWENTIETH] == 1.0  # the first against the rest
    assert found[interaction.NEARNESS] == (0 + 0 + 0.5 + 1) / 4
    assert found[interaction.PRODUCT] == (0 + 0 + 1 + 1) / 4
    assert found[interaction.ALIKE] == 0.4
    assert found[interaction.OTHERS] == pytest.approx(-0.2 / 3)
    assert (found[interaction.FOUND], found[interaction.FOUND_OTHERS]) == (1.0, 1 / 3)


def test_what_is_not_there_is_not_defined():
    found = interaction.measures(pairs([0.1, 0.2], [0.0, 0.01]))
    assert math.isnan(found[interaction.SIMILARITY]) and math.isnan(found[interaction.ALIKE])
    assert found[interaction.TWENTIETH] == 1.0
    binned = interaction.by_similarity(pairs([-0.5, 0.05, 0.02, 1.0], [1.0, 2.0, 4.0, 8.0]))
    assert binned[:2] == [1.0, 3.0] and binned[-1] == 8.0
    assert all(map(math.isnan, binned[2:-1]))


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def test_interaction_is_that_of_plain_manipulated_passes(demo):
    model, tokenizer = demo
    found = interaction.examine(model, tokenizer, CASE)["exact, 16 largest"]
    words = encode_prompt(CASE.prompt, tokenizer, model.config.vocab_size)
    answer = tokenizer(CASE.answer)["input_ids"]
    inside = [p for p, span in enumerate(words.spans) if span and span[0] < len(CASE.text)]
    assert len(inside) <= 16  # so all of them are looked at
    ids = torch.tensor([[*words.ids, *answer[:-1]]])

    def loss(*suppressed):
        factors = torch.ones(1, ids.shape[1])
        factors[0, list(suppressed)] = 0.1
        with torch.no_grad(), manipulate(model, factors, "min_shift"):
            logits = model(input_ids=ids).logits[0, -len(answer) :]
        return -logits.double().log_softmax(-1)[range(len(answer)), answer].mean().item()

    i, j = inside[1], inside[3]
    place = 1 * len(inside) - 1 + 1  # of (1, 3) among the pairs: behind those of 0, then (1, 2)
    expected = loss(i, j) - loss(i) - loss(j) + loss()
    assert found.interaction[place] == pytest.approx(expected, abs=2e-5)
    assert found.distance[place] == j - i
    table = model.get_input_embeddings().weight.detach()
    cosine = torch.cosine_similarity(table[words.ids[i]], table[words.ids[j]], dim=0)
    assert found.similarity[place] == pytest.approx(float(cosine), abs=1e-6)
    assert found.effects[place] == pytest.approx([loss(i) - loss(), loss(j) - loss()], abs=2e-5)


def test_the_command_writes_rows_and_a_picture(tmp_path, monkeypatch, demo):
    monkeypatch.setattr(interaction, "load_demo_model", lambda: demo)
    monkeypatch.setattr(interaction, "cases_of", lambda *_: [CASE, CASE])
    interaction.main(["--documents", "2", "--out", str(tmp_path)])
    rows = (tmp_path / "studies-interaction.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 3 * len(interaction.MEASURES)
    assert (tmp_path / "studies-interaction.png").stat().st_size > 10_000
