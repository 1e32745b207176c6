"""Where on a line gradients are taken: few places, and parts whose middles stand for them."""

from __future__ import annotations

import math

import pytest
import torch

from atman_triton import line


def elbow(at, width, height=10.0):
    """A loss that stays flat and then rises: the loss of a model that was certain."""

    def losses(places):
        place = torch.as_tensor(places, dtype=torch.float64)
        bend = torch.nn.functional.softplus((place - at) / width) * width
        return height * bend / (1 - at)

    def slope(place):
        return height / (1 - at) * torch.sigmoid((place - at) / width)

    return losses, slope


def rule(edges, slope):
    """The midpoint rule over parts."""
    return float((slope((edges[1:] + edges[:-1]) / 2) * edges.diff()).sum())


@pytest.mark.parametrize("at", [0.27, 0.5, 0.66, 0.81])
@pytest.mark.parametrize("width", [0.003, 0.01, 0.03])
def test_parts_are_short_where_the_loss_bends(at, width):
    losses, slope = elbow(at, width)
    rise = float(losses(1.0) - losses(0.0))
    places, found = line.look(lambda places: losses(places)[:, None], 8)
    chosen = line.edges(places, found[:, 0], 8)
    assert abs(rule(chosen, slope) / rise - 1) < 0.02
    assert chosen[0] == 0 and chosen[-1] == 1 and len(chosen) == 9
    assert (chosen.diff() > 0).all()


def test_equal_parts_would_jump_over_it():
    worst = 0.0
    for at in (0.27, 0.5, 0.66, 0.81):
        losses, slope = elbow(at, 0.01)
        rise = float(losses(1.0) - losses(0.0))
        equal = torch.linspace(0, 1, 9, dtype=torch.float64)
        worst = max(worst, abs(rule(equal, slope) / rise - 1))
    assert worst > 0.05


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 15, 31, 32, 100])
def test_as_many_places_are_looked_at_as_was_said(steps):
    losses, _ = elbow(0.66, 0.01)
    seen = []

    def noting(places):
        seen.extend(places)
        return torch.stack([losses(places), -losses(places)], 1)

    places, found = line.look(noting, steps)
    assert sorted(seen) == places.tolist()
    assert len(places) == line.looks(steps) + 2
    assert places[0] == 0 and places[-1] == 1 and (places.diff() > 0).all()
    torch.testing.assert_close(found[:, 0], losses(places))
    torch.testing.assert_close(found[:, 1], -losses(places))
    expected = min(31, 4 * steps - 1) if 1 < steps < 32 else 0
    assert line.looks(steps) == expected
    edges = line.edges(places, found[:, 0], steps)
    assert len(edges) == steps + 1
    if not expected:
        torch.testing.assert_close(edges.diff(), torch.full_like(edges[1:], 1 / steps))


def test_every_row_has_a_say_in_where_to_look():
    """However small its losses are beside those of another."""
    early, late = elbow(0.3, 0.005, 1e-3)[0], elbow(0.8, 0.005, 1e3)[0]
    places, _ = line.look(lambda p: torch.stack([early(p), late(p)], 1), 8)
    for at in (0.3, 0.8):
        assert ((places - at).abs() < 0.05).sum() >= 4


@pytest.mark.parametrize("losses", [torch.zeros, torch.ones], ids=["flat", "one"])
def test_a_loss_that_never_changes_is_no_error(losses):
    places, found = line.look(lambda p: losses(len(p), 2, dtype=torch.float64), 8)
    edges = line.edges(places, found[:, 0], 8)
    assert (edges.diff() > 0).all() and len(edges) == 9
    assert not any(math.isnan(edge) for edge in edges.tolist())


def test_the_curve_goes_through_what_was_seen_and_overshoots_nowhere():
    places = torch.tensor([0, 0.1, 0.5, 0.55, 1], dtype=torch.float64)
    values = torch.tensor([0, 0, 1, 5, 5.5], dtype=torch.float64)
    fine = torch.linspace(0, 1, 1001, dtype=torch.float64)
    curve = line._interpolated(places, values, fine)
    torch.testing.assert_close(line._interpolated(places, values, places), values)
    assert (curve.diff() >= -1e-12).all() and curve.max() <= 5.5 + 1e-12
    straight = line._interpolated(places, 3 * places, fine)
    torch.testing.assert_close(straight, 3 * fine)
