"""Removal measures on models that are known: by hand, run once, and on the shipped models."""

import math
import random
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atman_triton as atman
from atman_triton.baselines.case import Case
from atman_triton.demo import load_demo_model
from atman_triton.demo.shapes import DEMO_PROMPT, load_shapes_model, make_picture
from atman_triton.evaluate import faithfulness
from atman_triton.evaluate.faithfulness import PICTURE_SHARES, SHARES, VALUES, Faithful, shares_of
from bench import removal

NAN = math.nan
WHOLE = math.exp(-1)


class Known:
    """A case of two target tokens whose log p is −1 less what ``lost`` says of the removed units.

    Of the two tokens one lies 0.5 higher and one 0.5 lower; hidden units cost half as much.
    """

    def __init__(self, size, lost, images=()):
        self.units = [SimpleNamespace(image=0 if u in images else None) for u in range(size)]
        self.removable = list(range(size))
        self.targets: Any = [(1, 2)]
        self.lost = lost
        self.base_logprobs = torch.tensor([-0.5, -1.5])
        self.asked, self.hid = [], []

    def without(self, removed):
        self.asked.append(list(removed))
        return self._logprobs(removed, 1)

    def hidden(self, removed):
        self.hid.append(list(removed))
        return self._logprobs(removed, 0.5)

    def _logprobs(self, removed, scale):
        means = [-1 - scale * self.lost(units) for units in removed]
        means = torch.tensor(means, dtype=torch.float64)
        return torch.stack([means + 0.5, means - 0.5], 1)


def _weights(weights):
    return lambda removed: sum(weights[unit] for unit in removed)


def _measured(case, relevance, region=None, seed="0"):
    region = list(range(len(case.units))) if region is None else region
    return Faithful(case, region, seed).measure({"own": relevance})["own"]


# --- by hand --------------------------------------------------------------------------------------


def test_one_unit_that_matters_by_hand():
    """Of ten units only unit 3 matters: without it the log p falls from −1 to −3."""
    case = Known(10, _weights([0, 0, 0, 2, 0, 0, 0, 0, 0, 0]))
    found = _measured(case, [-9, -8, -7, 5, -1, -2, -3, -4, -5, -6])
    low = math.exp(-3)
    # 0, 1, 1, 1, 2, 5, 8, 9, 9, 9 and 10 units
    assert found.curve["most"] == pytest.approx([-1, *[-3] * 10])
    assert found.curve["least"] == pytest.approx([*[-1] * 10, -3])
    assert found.values == pytest.approx(
        {
            "removal_gap": 2,
            "deletion": 0.1 * (WHOLE + low) / 2 + 0.9 * low,
            "insertion": 0.9 * WHOLE + 0.1 * (WHOLE + low) / 2,
            "gap_area": (-1 - 0.1) - (-0.2 - 0.9 * 3),
            "comprehensiveness": 5 / 6 * (WHOLE - low),  # all bins but the empty one
            "sufficiency": 1 / 6 * (WHOLE - low),  # the empty bin alone
            "top5_drop": 2,
            "hidden_gap": 1,
            "lds": found.values["lds"],
        }
    )
    assert list(found.values) == list(VALUES)
    assert found.notes == ["lds: ties share their mean rank"]


def test_wrong_way_round_by_hand():
    case = Known(10, _weights([0, 0, 0, 2, 0, 0, 0, 0, 0, 0]))
    found = _measured(case, [9, 8, 7, -5, 1, 2, 3, 4, 5, 6]).values
    low = math.exp(-3)
    assert found["removal_gap"] == pytest.approx(-2)
    assert found["hidden_gap"] == pytest.approx(-1)
    assert found["gap_area"] == pytest.approx(-1.8)
    assert found["comprehensiveness"] == pytest.approx(0)
    assert found["sufficiency"] == pytest.approx(WHOLE - low)
    assert found["top5_drop"] == pytest.approx(0)


def test_additive_model_by_hand():
    """Four units cost 4, 2, 1 and 0: curves −1 −5 −7 −8 −8 and −1 −1 −2 −4 −8."""
    found = _measured(Known(4, _weights([4, 2, 1, 0])), [0.4, 0.2, 0.1, 0])
    # shares are 0, 1, 1, 1, 1, 2, 3, 3, 3, 3 and 4 units: 0.2·4 is one, 0.8·4 three
    assert found.curve["most"] == pytest.approx([-1, -5, -5, -5, -5, -7, -8, -8, -8, -8, -8])
    assert found.curve["least"] == pytest.approx([-1, -1, -1, -1, -1, -2, -4, -4, -4, -4, -8])
    most = (1 + 5) / 8 + (5 + 7) / 8 + (7 + 8) / 8 + (8 + 8) / 8
    least = (1 + 1) / 8 + (1 + 2) / 8 + (2 + 4) / 8 + (4 + 8) / 8
    assert found.values["gap_area"] == pytest.approx(most - least)
    assert found.values["lds"] == pytest.approx(1)
    assert found.values["top5_drop"] == pytest.approx(7)
    assert found.notes == ["top5_drop: 4 units"]


def test_redundant_units_by_hand():
    """Either of two units suffices: the best tenth alone costs nothing."""
    case = Known(10, lambda removed: 3.0 if {0, 1} <= set(removed) else 0.0)
    found = _measured(case, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    assert found.curve["most"] == pytest.approx([*[-1] * 4, *[-4] * 7])
    assert found.values["removal_gap"] == pytest.approx(0)
    assert found.values["comprehensiveness"] == pytest.approx(2 / 6 * (WHOLE - math.exp(-4)))


def test_lds_is_the_rank_correlation_over_the_shared_halves():
    weights = [1.0, 0.25, 2.0, 0.5, 4.0, 0.0625, 0.125]
    case = Known(7, lambda removed: _weights(weights)(removed) + 2.9 * ({0, 1} <= set(removed)))
    faithful = Faithful(case, range(7), "seed")
    assert len(set(faithful.ablations)) == faithfulness.ABLATIONS == 24
    assert {len(each) for each in faithful.ablations} == {3}
    relevance = [8.0, NAN, 2.0, 0.5, -0.25, 1.0, 4.0]
    found = faithful.measure({"own": relevance})["own"].values["lds"]
    stays = [np.nansum([relevance[u] for u in range(7) if u not in s]) for s in faithful.ablations]
    true = [-case.lost(each) for each in faithful.ablations]
    assert len(set(stays)) == len(set(true)) == 24  # no ties: ranks are places
    ranks = np.argsort(np.argsort(np.array([stays, true])))
    assert found == pytest.approx(float(np.corrcoef(*ranks)[0, 1]), abs=1e-9)


# --- what is not as usual -------------------------------------------------------------------------


def test_ties_are_in_an_order_that_all_share():
    case = Known(20, _weights(range(20)))
    faithful = Faithful(case, range(20), "a")
    found = faithful.measure(
        {"ones": [1] * 20, "zeros": [0] * 20, "two tied": [*range(18), 99, 99]}
    )
    assert faithful.order([1] * 20) == faithful.permutation != list(range(20))
    assert found["ones"].curve == found["zeros"].curve
    assert found["ones"].notes[0] == "20 of 20 tied, in a drawn order"
    assert math.isnan(found["ones"].values["lds"])
    assert found["ones"].notes[1] == "lds: one side is constant"
    assert not any("drawn" in note for note in found["two tied"].notes)
    other = Faithful(case, range(20), "b")
    assert other.permutation != faithful.permutation
    assert Faithful(case, range(20), "a").permutation == faithful.permutation
    tied = faithful.order([5, 5, *[0] * 18])
    assert tied[:2] == [u for u in faithful.permutation if u in (0, 1)]


def test_nan_is_the_lowest_and_is_said():
    case = Known(10, _weights([0, 0, 0, 2, 0, 0, 0, 0, 0, 0]))
    relevance = [9, 8, 7, NAN, 1, -math.inf, 3, 4, 5, 6]
    faithful = Faithful(case, range(10), "0")
    assert faithful.order(relevance)[-2:] == [5, 3]
    found = faithful.measure({"own": relevance})["own"]
    assert found.values["removal_gap"] == pytest.approx(-2)
    assert math.isnan(found.values["lds"])
    assert found.notes == ["1 NaN count as the lowest", "lds: infinite relevance has no sum"]
    nothing = faithful.measure({"own": [NAN] * 10})["own"]
    assert nothing.notes[:2] == ["10 NaN count as the lowest", "10 of 10 tied, in a drawn order"]


def test_one_unit():
    found = _measured(Known(1, _weights([2])), [1.0])
    assert found.values["removal_gap"] == found.values["hidden_gap"] == 0
    assert found.values["gap_area"] == pytest.approx(0)
    assert found.values["top5_drop"] == pytest.approx(2)
    assert found.notes == ["one unit", "lds: fewer than two values"]


def test_log_probabilities_of_nothing_are_said():
    found = _measured(Known(10, lambda removed: math.inf if len(removed) > 4 else 0.0), range(10))
    assert found.values["insertion"] == pytest.approx(0.2 * WHOLE + 0.3 * WHOLE / 2)
    assert math.isnan(found.values["gap_area"])
    assert "gap_area: 4 points without a height" in found.notes


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ([], "region must hold at least one unit"),
        ([1, 1], "region must hold every unit once"),
        ([1, 7], "region must hold units of the prompt, got 7"),
    ],
)
def test_wrong_regions(region, text):
    with pytest.raises(ValueError, match=text):
        Faithful(Known(3, _weights([0, 0, 0])), region, "0")


def test_wrong_arguments():
    case = Known(3, _weights([0, 0, 0]))
    with pytest.raises(ValueError, match=r"relevances\['own'\] must have shape \[2\].*got \[3\]"):
        _measured(case, [1, 2, 3], region=[0, 2])
    case.targets = [(1,), (2,)]
    with pytest.raises(ValueError, match="case must have one target, got 2"):
        Faithful(case, [0], "0")
    assert shares_of([0.0] * 11) == SHARES and shares_of([0.0] * 7) == PICTURE_SHARES
    with pytest.raises(ValueError, match="curve must have 11 points, or 7 of a picture, got 3"):
        shares_of([0.0] * 3)


# --- what always holds ----------------------------------------------------------------------------


def test_shares_are_the_same_from_both_ends():
    for shares in (SHARES, PICTURE_SHARES):
        assert [1 - share for share in shares[::-1]] == pytest.approx(list(shares))


def test_nothing_is_run_twice_and_only_the_region_goes():
    rng = random.Random(1)
    case = Known(40, _weights([rng.random() for _ in range(40)]))
    region = list(range(5, 35))
    relevances = {f"{n}": [rng.random() for _ in region] for n in range(6)}
    relevances["0 scaled"] = [3 * each for each in relevances["0"]]
    relevances["0 huge"] = [2.0**1023 * each for each in relevances["0"]]
    faithful = Faithful(case, region, "0")
    together = faithful.measure(relevances)
    assert len(case.asked) == len(case.hid) == 1  # one batch of all
    asked = [*case.asked[0]]
    assert len(asked) == len(set(asked)) and frozenset() not in asked
    assert set().union(*asked) == set(region)
    # 1, 2, 3, 6, 15, 24, 27, 28 and 29 units from both ends; the five best; all 30
    single = Known(40, case.lost)
    _measured(single, relevances["0"], region)
    assert len(single.asked[0]) == 24 + 2 * 9 + 1 + 1 and len(single.hid[0]) == 2
    assert len(asked) <= 24 + 6 * (2 * 9 + 1) + 1
    assert len(case.hid[0]) == 12
    assert together["0"] == together["0 scaled"] == together["0 huge"]
    assert faithful.measure(relevances) == together
    assert len(case.asked) == len(case.hid) == 1
    for name, relevance in relevances.items():
        assert _measured(Known(40, case.lost), relevance, region) == together[name]


def test_pictures_are_looked_at_less_often():
    case = Known(12, _weights(range(12)), images=range(10))
    pictured = Faithful(case, range(10), "0")
    assert pictured.shares == PICTURE_SHARES and len(pictured.counts) == 7
    assert Faithful(case, [10, 11], "0").shares == SHARES
    curve = pictured.measure({"own": range(10)})["own"].curve
    assert shares_of(curve["most"]) == shares_of(curve["least"]) == PICTURE_SHARES
    assert pictured.measure({}) == {}


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(9)), st.lists(st.integers(0, 5), min_size=9, max_size=9))
def test_best_order_of_an_additive_model_is_never_beaten(order, weights):
    weights = [each + place / 128 for place, each in enumerate(weights)]
    case = Known(9, _weights(weights))
    found = Faithful(case, range(9), "0").measure(
        {"best": weights, "worst": [-each for each in weights], "other": order}
    )
    best, worst, other = (found[name].values for name in ("best", "worst", "other"))
    assert best["lds"] == pytest.approx(1) and worst["lds"] == pytest.approx(-1)
    for name in ("removal_gap", "gap_area", "insertion", "comprehensiveness", "top5_drop"):
        assert best[name] + 1e-6 >= other[name] >= worst[name] - 1e-6
    for name in ("deletion", "sufficiency"):
        assert best[name] - 1e-6 <= other[name] <= worst[name] + 1e-6
    assert best["gap_area"] == pytest.approx(-worst["gap_area"], abs=1e-5)
    assert best["removal_gap"] == pytest.approx(2 * best["hidden_gap"], abs=1e-5)


# --- on the shipped models ------------------------------------------------------------------------


def test_leave_one_out_beats_chance_on_the_reader():
    model, tokenizer = load_demo_model()
    cases = removal.answered_cases(model, tokenizer, 3)
    found = []
    for number, each in enumerate(cases):
        explainer = atman.Explainer(model, tokenizer, method="direct", progress=False)
        explanation = explainer.explain(each.prompt, each.answer)
        own = removal.Removal(model, tokenizer, each, explanation, number)
        case = Case.of(model, tokenizer, each.prompt, explanation)
        faithful = Faithful(case, own.inside, f"{number}")
        scores = {
            "loo": own.of_prompt(own.leave_one_out()),
            "random": own.of_prompt(own.random),
        }
        found.append(faithful.measure(scores))
        for name in scores:  # no ties: the gap is that of bench/removal.py
            order = removal.ranking(scores[name], range(len(own.inside)))
            (gap,) = removal.removal_gaps(model, own.ids, own.answer, own.positions, [order])
            assert found[-1][name].values["removal_gap"] == pytest.approx(gap, abs=1e-4)
        if not number:
            alone = Faithful(case, own.inside, "0").measure({"random": scores["random"]})
            assert alone["random"].values == pytest.approx(found[0]["random"].values, abs=1e-4)
    for name in ("removal_gap", "gap_area", "insertion", "comprehensiveness", "hidden_gap"):
        loo, chance = (fmean(each[m].values[name] for each in found) for m in ("loo", "random"))
        assert loo > chance, name
    for name in ("deletion", "sufficiency"):
        loo, chance = (fmean(each[m].values[name] for each in found) for m in ("loo", "random"))
        assert loo < chance, name


def test_patches_of_the_shapes_are_painted():
    model, processor = load_shapes_model()
    picture = make_picture("faithful-0", 2, balanced=True)
    prompt = [picture.image, DEMO_PROMPT]
    explainer = atman.Explainer(model, processor, method="direct", progress=False)
    explanation = explainer.explain(prompt, f" {picture.objects[0].name}", image_granularity="4x4")
    case = Case.of(model, processor, prompt, explanation)
    region = [place for place, unit in enumerate(case.units) if unit.image is not None]
    faithful = Faithful(case, region, "0")
    assert faithful.shares == PICTURE_SHARES and len(region) == 16
    relevance = explanation.relevance[region]
    found = faithful.measure({"direct": relevance})["direct"]
    order = relevance.argsort(descending=True).tolist()
    best, worst = [[region[place] for place in end] for end in (order[:2], order[-2:])]
    for name, remove in (("removal_gap", case.without), ("hidden_gap", case.hidden)):
        low, high = remove([best, worst]).double().mean(1).tolist()
        assert found.values[name] == pytest.approx(high - low, abs=1e-5)
    assert found.values["removal_gap"] > 0
