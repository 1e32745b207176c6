"""Gradients through encoder-decoders: those of whole forwards, by small differences.

Legend: U units, M scored tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from seq2seq_models import MODELS, inputs_of, plain_logprobs, sizes_of, start_of
from test_seq2seq_engine import close, every_unit, split, started

from atman_triton.engine import undisturbed
from atman_triton.perturbations import Unit

TARGETS = [[5, 9, 11], [7], [84, 5]]
STEP = 1e-4


def singles(name):
    """Every single token once, in the prompt and in the answers."""
    return [unit for unit in every_unit(name, TARGETS) if len(unit.positions) == 1]


def attributed(run, units, steps):
    with undisturbed(run.model):
        return run.attribute(units, steps)


def losses(name, target, row, **chosen):
    factors = split(name, row)
    return -plain_logprobs(
        MODELS[name](), inputs_of(name), start_of(name), target, factors, **chosen
    )


# T5's norms are float32 whatever its dtype, and small differences would multiply their rounding.
@pytest.mark.parametrize("attention", ["both", "cross"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "t5"])
def test_the_gradient_is_that_of_small_differences(name, attention):
    units = singles(name)[::3]
    run = started(name, TARGETS, attention=attention)
    found = attributed(run, units, None).scores
    prompt = sum(sizes_of(name).values())
    for k, target in enumerate(TARGETS):
        for u, unit in enumerate(units):
            own = found[u, list(run.rows[k])]
            if unit.branch not in (None, k):
                assert own.isnan().all()
                continue
            ends = []
            for sign in (1, -1):
                row = torch.ones(prompt + len(target) - 1, dtype=torch.float64)
                row[list(unit.positions)] += sign * STEP
                ends.append(losses(name, target, row, attention=attention))
            slope = (ends[0] - ends[1]) / (2 * STEP) * (0.1 - 1)
            reached = ~own.isnan()
            # the difference is off by the square of the step, the engine by float32's rounding
            torch.testing.assert_close(
                own[reached].double(), slope[reached], rtol=1e-5, atol=10 * STEP**2
            )


@pytest.mark.parametrize("name", MODELS)
def test_a_path_ends_where_all_units_are_suppressed_and_adds_up_to_that(name):
    units = singles(name)
    run = started(name, TARGETS)
    few, many = (attributed(run, units, steps) for steps in (2, 16))
    prompt = sum(sizes_of(name).values())
    expected = []
    for target in TARGETS:
        for place in range(len(target)):
            row = torch.full((prompt + len(target) - 1,), 0.1)
            row[prompt + place :] = 1.0  # no token speaks for one before it
            expected.append(-losses(name, target, row)[place])
    expected = torch.stack(expected)
    close(many.together, expected)
    rise = run.base_logprobs.double() - expected
    errors = [(each.scores.double().nansum(0) - rise).abs().sum() for each in (few, many)]
    assert errors[1] < errors[0] / 2  # of the midpoint rule
    assert run.record.backward_runs > 0
    assert "layers are kept" in str(run.record.activations)


def test_units_are_suppressed_alone():
    run = started("t5", similarity=0.5)
    with pytest.raises(ValueError, match=r"Settings\.similarity must be None"):
        attributed(run, [Unit((0,))], 4)


def test_layers_are_given_back_as_they_were():
    run = started("bart", TARGETS)
    model: Any = run.model
    model.requires_grad_(True)
    forwards = [layer.forward for layer in model.model.encoder.layers]
    attributed(run, singles("bart"), 2)
    assert [layer.forward for layer in model.model.encoder.layers] == forwards
    assert all(weight.requires_grad for weight in model.parameters())
