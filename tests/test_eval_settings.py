"""Names of methods as they are written, and what they become."""

import pytest
from toy_models import llama
from toy_tokenizers import byte_level

from atman_triton.baselines import BASELINES, Baseline
from atman_triton.evaluate import Example
from atman_triton.evaluate.settings import explain, explainer, parse_methods, setting

SIMILAR = ["exact multiplicative similarity=0.7", "chefer"]


def names(text):
    return [one.name for one in parse_methods(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("direct", ["direct"]),
        ("exact:mode=multiplicative:similarity=0.7,chefer", SIMILAR),
        ("exact:mode=multiplicative,similarity=0.7,chefer", SIMILAR),
        ("exact multiplicative similarity=0.70, chefer", SIMILAR),
        # Defaults are not written, and nothing is run twice.
        ("direct:mode=min_shift:factor=0.1:similarity=none,direct", ["direct"]),
        ("hybrid:budget=0.2,hybrid:budget=3,path:steps=8", ["hybrid", "hybrid budget=3", "path"]),
        ("occlusion,integrated_gradients:steps=32", ["occlusion", "integrated_gradients"]),
        ("integrated_gradients:steps=8", ["integrated_gradients steps=8"]),
        ("lime:budget=64:seed=1", ["lime budget=64 seed=1"]),
        ("released,released:similarity=none", ["released", "released similarity=none"]),
        ("exact:rule=released:similarity=0.6", ["exact similarity=0.6"]),
        ("direct:factor=0", ["direct factor=0"]),
    ],
)
def test_names(text, expected):
    found = names(text)
    assert found == expected
    assert names(", ".join(found)) == found  # names are what can be asked for again


def test_groups():
    everything = parse_methods("all")
    found = [one.name for one in everything]
    assert len(set(found)) == len(found)
    assert {"direct", "exact min_shift_full", "released", "path", "hybrid"} < set(found)
    assert set(BASELINES) - {one.method for one in everything} <= {"attn_lrp"}
    assert "kernel_shap" in found
    for group in ("paper", "fast", "baselines"):
        assert set(names(group)) <= {*found, "attn_lrp"}
    assert names("direct,fast")[0] == "direct" and names("fast,direct") == names("fast")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("direkt", "methods: 'direkt' is none of exact, direct,"),
        ("direct,,exact", "a name is missing between commas"),
        ("factor=0.2", "'factor=0.2' is an option without a method in front of it"),
        ("direct:factr=0.2", r"direct takes mode=, .*, got 'factr'"),
        ("direct:factor=", r"factor of direct must be a number in \[0, 1\), got ''"),
        ("direct:factor=much", r"factor of direct must be a number in \[0, 1\), got 'much'"),
        ("direct:factor=1", r"methods: direct: factor must lie in \[0, 1\), got 1"),
        ("direct:factor=0.1:factor=0.2", "direct is given factor twice"),
        ("direct:mode=shift", "mode of direct must be one of multiplicative, .*, got 'shift'"),
        ("direct min_shift_full", "methods: direct: .*take method='exact'"),
        ("exact:similarity=2", r"methods: exact: similarity must lie in \(0, 1\]"),
        ("exact:rule=paper", "methods: exact: rule='paper' says how similar tokens"),
        ("path:similarity=0.6", "methods: path: .*cannot take similarity"),
        ("path:steps=0", "methods: path: steps must be at least 1, got 0"),
        ("hybrid:budget=0", "methods: hybrid: budget as a count must be at least 1"),
        ("chefer:budget=3", "chefer takes output=, got 'budget'"),
        ("rollout:budget=3", "rollout takes no options, got 'budget'"),
        ("lime:budget=few", "budget of lime must be a number, got 'few'"),
        ("chefer:output=loss", "output of chefer must be one of logprob, logit, got 'loss'"),
        ("paper:similarity=0.7", "paper stands for several methods .*exact:mode=multiplicative"),
        ("", "a name is missing between commas"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_methods(text)


def test_explainers():
    model = llama()
    (one,) = parse_methods("released:factor=0.2")
    made = explainer(one, model, None)
    assert (made.preset, made.method) == ("released", "exact")
    assert (made.settings.factor, made.settings.similarity) == (0.2, 0.6)
    (one,) = parse_methods("hybrid log_additive similarity=0.5 budget=3")
    made = explainer(one, model, None)
    assert (made.method, made.budget, made.settings.mode) == ("hybrid", 3, "log_additive")
    assert made.settings.similarity == 0.5
    (one,) = parse_methods("lime:budget=64")
    made = explainer(one, model, None)
    assert isinstance(made, Baseline) and made.options.budget == 64
    made = explainer(setting("released", {"similarity": False}), model, None)
    assert made.settings.similarity is None


def test_only_what_is_rated_is_explained():
    model = llama()
    own = explainer(setting("direct", {}), model, byte_level())
    example = Example("a", "The pay is 5. Q: How much? A:", "5", region=(0, 13))
    found = explain(own, example)
    assert {unit.stop <= 13 for unit in found.units} == {True}
    again = explain(own, example, "The pay is 5. Q: What is it? A:")
    assert [unit.tokens for unit in again.units] == [unit.tokens for unit in found.units]
