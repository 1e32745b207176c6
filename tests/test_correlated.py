"""Explanations with correlated suppression: right numbers, whatever is saved on the way.

Legend: S columns, U units, M scored tokens.
"""

from __future__ import annotations

import pytest
import torch
from test_suppression import by_hand, cosine
from toy_images import MODELS as IMAGE_MODELS
from toy_models import MODELS, in_float64, plain_logits
from toy_tokenizers import byte_level, sentencepiece

from atman_triton.engine import Engine, Settings, Unit, undisturbed
from atman_triton.explain import Explainer
from atman_triton.integration import manipulate
from atman_triton.suppression import RULES

STEP = torch.finfo(torch.float32).eps
PROMPT = [3, 141, 59, 26, 59, 58, 97, 141, 23, 84]
TARGETS = [(84, 62, 59, 3), (7,), (59, 5, 97)]
KAPPA = 0.3  # of random embeddings, few are more alike
UNITS = [
    Unit((0,)),
    Unit((2,)),
    Unit((1, 2, 6)),
    Unit((9,)),
    Unit((10,), 0),
    Unit((11, 12), 0),
    Unit((10,), 2),
]


def factors_by_hand(model, ids, unit, rule, threshold=KAPPA):
    """The factors of a unit in the prompt followed by one target alone: ``[1, S]``."""
    vectors = model.get_input_embeddings()(torch.tensor(ids)).tolist()
    return torch.tensor([by_hand(vectors, sorted(unit), 0.1, threshold, rule)])


def loop(model, units, targets, rule, mode, first_row=0, **chosen):
    """``[U, M]``: one full forward per unit and target, all factors written out."""
    rows = torch.full((len(units), sum(map(len, targets))), torch.nan, dtype=torch.float64)
    column = 0
    for k, target in enumerate(targets):
        ids = [*PROMPT, *target[:-1]]
        for u, unit in enumerate(units):
            if unit.branch not in (None, k):
                continue
            factors = factors_by_hand(model, ids, unit.positions, rule)
            if first_row:
                matrix = torch.ones(len(ids), len(ids))
                matrix[first_row:] = factors
                logits = plain_logits(model, ids, matrix, mode)
            else:
                with manipulate(model, factors, mode, **chosen), torch.no_grad():
                    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
            found = logits[-len(target) :].log_softmax(-1)[range(len(target)), list(target)]
            late = max(unit.positions) - len(PROMPT) + 1  # scored tokens that it does not precede
            rows[u, column + max(0, late) : column + len(target)] = found[max(0, late) :]
        column += len(target)
    return rows


def perturbed(model, effect="total", targets=TARGETS, units=UNITS, inputs=None, **changes):
    given = {"factor": 0.1, "mode": "min_shift", "similarity": KAPPA} | changes
    inputs = inputs or {"input_ids": torch.tensor([PROMPT])}
    with undisturbed(model):
        engine = Engine(model, inputs, targets, Settings(**given))
        return engine, engine.perturb(units, effect)


def close(found, expected):
    torch.testing.assert_close(
        found.double(), expected, rtol=8 * STEP, atol=8 * STEP, equal_nan=True
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_total_effects_are_those_of_a_plain_loop(name, mode, rule):
    model = in_float64(name)
    expected = loop(model, UNITS, TARGETS, rule, mode)
    for size in ("auto", 3):
        engine, found = perturbed(model, mode=mode, rule=rule, batch_size=size)
        assert engine.record.runners == ["shared_prefix"]
        close(found, expected)
    _, alone = perturbed(model, mode=mode, similarity=None)
    moved = (alone - found).abs().nan_to_num().amax(1)
    assert (moved > 1e-3).sum() >= 5  # neighbourhoods matter


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_direct_effects_are_those_of_their_definition(name, rule):
    """Factors in the target's rows only."""
    model = in_float64(name)
    first = len(PROMPT) - 1
    expected = loop(model, UNITS, TARGETS, rule, "min_shift", first_row=first)
    _, found = perturbed(model, "direct", rule=rule)
    close(found, expected)
    _, alone = perturbed(model, "direct", similarity=None)
    assert ((alone - found).abs().nan_to_num().amax(1) > 1e-3).sum() >= 5


@pytest.mark.parametrize("rule", RULES)
def test_layers_and_heads_limit_neighbourhoods_too(rule):
    model = in_float64("llama")
    chosen = {"layers": (1,), "heads": (0, 3)}
    # manipulate() takes factors per head: here the same for the chosen ones
    expected = torch.full((len(UNITS), 4), torch.nan, dtype=torch.float64)
    ids = [*PROMPT, *TARGETS[0][:-1]]
    for u, unit in enumerate(UNITS[:6]):
        factors = factors_by_hand(model, ids, unit.positions, rule)
        per_head = torch.ones(1, 4, len(ids))
        per_head[:, [0, 3]] = factors
        with manipulate(model, per_head, "min_shift", layers=[1]), torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -4:]
        late = max(0, max(unit.positions) - len(PROMPT) + 1)
        expected[u, late:] = logits.log_softmax(-1)[range(4), list(TARGETS[0])][late:]
    units = UNITS[:6]
    _, found = perturbed(model, targets=TARGETS[:1], units=units, rule=rule, **chosen)
    close(found, expected[:6])


@pytest.mark.parametrize("rule", RULES)
def test_a_run_starts_at_the_first_token_of_the_neighbourhood(rule):
    """What is wasted is nothing where every row runs alone, and no start is too late."""
    model = in_float64("llama")
    for targets in (TARGETS[:1], TARGETS):
        units = [u for u in UNITS if u.branch is None or u.branch < len(targets)]
        engine, found = perturbed(model, targets=targets, units=units, rule=rule, batch_size=1)
        without = frozenset({"shared_prefix"}) if len(targets) == 1 else frozenset({"one_pass"})
        _, full = perturbed(model, targets=targets, units=units, rule=rule, without=without)
        torch.testing.assert_close(found, full, rtol=8 * STEP, atol=8 * STEP, equal_nan=True)
        assert engine.record.wasted_tokens == 0
        length = len(PROMPT) + sum(len(target) - 1 for target in targets)
        starts = []
        for unit in units:
            ids = [*PROMPT, *targets[unit.branch or 0][:-1]]
            factors = factors_by_hand(model, ids, unit.positions, rule)[0]
            changed = (factors != 1).nonzero()[0].item()
            starts.append(min(changed, len(PROMPT)) if len(targets) > 1 else changed)
        assert engine.record.shared_tokens == sum(length - start for start in starts)
        if rule == "paper":  # nothing but the unit itself is left alone
            assert starts == [1] + [0] * (len(units) - 1)
        else:
            assert starts[3:5] != [9, 10]  # some neighbours stand earlier


def test_an_input_of_one_token_has_no_neighbours():
    model = in_float64("llama")
    inputs = {"input_ids": torch.tensor([[5]])}
    for rule in RULES:
        engine, found = perturbed(
            model, targets=[(7,)], units=[Unit((0,))], inputs=inputs, rule=rule
        )
        assert engine.neighbours(Unit((0,))) == []
        if rule == "paper":
            assert torch.equal(found, engine.base_logprobs[None])


@pytest.mark.parametrize("rule", RULES)
def test_padding_is_nobodys_neighbour(rule):
    model = in_float64("llama")
    padded = {
        "input_ids": torch.tensor([[59, 141, *PROMPT]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * len(PROMPT)]]),
        "position_ids": torch.tensor([[1, 1, *range(len(PROMPT))]]),
    }
    moved = [Unit(tuple(p + 2 for p in unit.positions), unit.branch) for unit in UNITS]
    engine, found = perturbed(model, inputs=padded, units=moved, rule=rule)
    other, expected = perturbed(model, rule=rule)
    torch.testing.assert_close(found, expected, rtol=8 * STEP, atol=8 * STEP, equal_nan=True)
    for here, there in zip(moved, UNITS, strict=True):
        assert [(n.position - 2, n.branch) for n in engine.neighbours(here)] == [
            (n.position, n.branch) for n in other.neighbours(there)
        ]


@pytest.mark.parametrize("without", [(), ("one_pass",)])
def test_neighbours_stand_in_order_and_in_the_units_own_target(without):
    model = in_float64("llama")
    engine, _ = perturbed(model, units=[], without=frozenset(without))
    ids = {-1: PROMPT, 0: TARGETS[0][:-1], 1: (), 2: TARGETS[2][:-1]}
    tokens = [(k, i) for k in ids for i in range(len(ids[k]))]  # the prompt first
    embed = model.get_input_embeddings()
    vectors = {(k, i): embed(torch.tensor(ids[k][i])).tolist() for k, i in tokens}
    counts = []
    for unit in UNITS:
        home = -1 if unit.branch is None else unit.branch
        own = [(-1, p) if p < len(PROMPT) else (home, p - len(PROMPT)) for p in unit.positions]
        expected = []
        for k, i in tokens:
            s = max(cosine(vectors[k, i], vectors[each]) for each in own)
            if s >= KAPPA and (k, i) not in own and (home == -1 or k in (-1, home)):
                place = (i, None) if k < 0 else (len(PROMPT) + i, k)
                expected.append((*place, 1 - 0.9 * s, s))
        found = engine.neighbours(unit)
        assert [n[:2] for n in found] == [each[:2] for each in expected]
        for near, each in zip(found, expected, strict=True):
            assert near[2:] == pytest.approx(each[2:], abs=1e-6)
        counts.append(len(found))
    assert max(counts) > 2
    assert any(near.branch is not None for unit in UNITS for near in engine.neighbours(unit))


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3-vl"])
def test_images_are_compared_as_the_text_stack_reads_them(name):
    """Patches are neighbours of patches, and of text whose embedding is like theirs."""
    model, inputs = IMAGE_MODELS[name]()
    merged = []
    with undisturbed(model):
        engine = Engine(model, inputs, [(7, 9, 5)], Settings(0.1, "min_shift", similarity=KAPPA))
        (run,) = engine._runners
        vectors = run.replay.embeddings()
        stack = next(m for n, m in model.named_modules() if n.endswith("language_model"))
        hook = stack.register_forward_pre_hook(
            lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
        prompt = inputs["input_ids"].shape[1]
        torch.testing.assert_close(vectors[:prompt], merged[0][0])
        assert len(vectors) == prompt + 2
        units = [Unit((token,)) for token in range(prompt)]
        found = engine.perturb(units)
        rows = vectors.tolist()
        counts = []
        for u, unit in enumerate(units):
            factors = torch.tensor([by_hand(rows, unit.positions, 0.1, KAPPA, "released")])
            counts.append(int((factors < 1).sum()) - 1)
            expected = run.run_factors(factors)[0]
            torch.testing.assert_close(found[u], expected, rtol=8 * STEP, atol=8 * STEP)
    image = inputs["input_ids"][0] == inputs["input_ids"][0].mode().values
    assert sum(counts) > 0
    assert image.sum() > 3


# --- Explainer ----------------------------------------------------------------------------------

TEXT = "The pay per hour is 23. Is the pay 23? The pay"


def explained(tokenizer=None, target=" is 23", targets=None, explain_only=None, **changes):
    granularity = changes.pop("granularity", "token")
    given = {"similarity": KAPPA} | changes
    explainer = Explainer(in_float64("llama"), tokenizer or sentencepiece(), **given)
    target = target if targets is None else None
    return explainer.explain(TEXT, target, granularity, targets=targets, explain_only=explain_only)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("granularity", ["token", "sentence"])
@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["words", "bytes"])
def test_scores_are_those_of_a_plain_loop(tokenizer, granularity, rule):
    model = in_float64("llama")
    e = explained(tokenizer, granularity=granularity, rule=rule, method="exact", factor=None)
    prompt = tokenizer(TEXT).input_ids
    answer = [target.token_id for target in e.targets]
    ids = [*prompt, *answer[:-1]]
    for u, unit in enumerate(e.units):
        factors = factors_by_hand(model, ids, unit.tokens, rule)
        with manipulate(model, factors, "min_shift"), torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -len(answer) :]
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        reached = [max(unit.tokens) < target.token for target in e.targets]
        close(e.suppressed_logprobs[reached, u], expected[reached])
        for near in unit.neighbours:
            assert near.token not in unit.tokens
            assert factors[0, near.token] == pytest.approx(near.factor, abs=1e-6)
            assert near.similarity >= KAPPA
    assert sum(len(unit.neighbours) for unit in e.units) > 3


def test_neighbours_say_where_they_stand():
    e = explained(explain_only=[1], target=" pay is 23")  # the first "pay"
    (unit,) = e.units
    assert unit.text == " pay"
    same = [n for n in unit.neighbours if n.similarity == 1]
    assert [e.text[n.start : n.stop] for n in same] == [" pay"] * 3
    assert [n.branch for n in same] == [None, None, 0]
    assert [n.token for n in unit.neighbours] == sorted(n.token for n in unit.neighbours)
    assert all(n.factor == pytest.approx(0.1) for n in same)
    assert e.provenance["mean_neighbours"] == len(unit.neighbours)
    assert (e.provenance["similarity"], e.provenance["rule"]) == (KAPPA, "released")
    alone = explained(similarity=None)
    assert all(unit.neighbours == () for unit in alone.units)
    known = alone.provenance
    assert (known["similarity"], known["rule"], "mean_neighbours" in known) == (None, None, False)


def test_one_target_of_several_has_its_own_neighbours():
    targets = [" is 23", " pay the pay is"]
    both = explained(targets=targets)
    for k, target in enumerate(targets):
        alone = explained(targets=[target])
        assert [u.neighbours for u in both.branch(k).units] == [u.neighbours for u in alone.units]
    assert any(n.branch == 1 for unit in both.units for n in unit.neighbours)


@pytest.mark.parametrize("method", ["hybrid", "hierarchical", "direct"])
def test_methods_that_choose_units_suppress_neighbourhoods(method):
    e = explained(method=method)
    exact = explained(method="exact")
    direct = explained(method="direct")
    place = {unit.tokens: u for u, unit in enumerate(exact.units)}
    checked = 0
    for u, unit in enumerate(e.units):
        if unit.level == "token":
            same = exact if unit.effect == "total" else direct
            assert unit.neighbours == exact.units[place[unit.tokens]].neighbours
            torch.testing.assert_close(
                e.scores[:, u], same.scores[:, place[unit.tokens]], equal_nan=True
            )
            checked += 1
    assert checked >= 3
    if method == "hierarchical":
        assert e.coarse is not None
        assert any(unit.neighbours for unit in e.coarse.units)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "similarity", "rule", "factor"),
    [
        ({}, None, None, 0.1),
        ({"similarity": False}, None, None, 0.1),
        ({"similarity": True}, 0.6, "released", 0.1),
        ({"similarity": 0.4, "rule": "paper"}, 0.4, "paper", None),
        ({"preset": "paper"}, None, None, 0.1),
        ({"preset": "paper", "similarity": True}, 0.7, "paper", None),
        ({"preset": "released"}, 0.6, "released", 0.1),
        ({"preset": "released", "similarity": False}, None, None, 0.1),
        ({"preset": "released", "similarity": 0.9}, 0.9, "released", 0.1),
        ({"preset": "paper", "similarity": 1, "rule": "released"}, 1.0, "released", 0.1),
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_is_done(given, similarity, rule, factor):
    e = Explainer(MODELS["llama"](), None, **given).explain([5, 6, 7], [8])
    known = [e.provenance[name] for name in ("similarity", "rule", "factor")]
    assert known == [similarity, rule, factor]


def test_the_preset_of_the_released_code():
    """Its numbers are those of the same settings, one by one."""
    model = MODELS["llama"]()
    e = Explainer(model, None, preset="released").explain(PROMPT, [59, 7])
    plain = Explainer(model, None, method="exact", similarity=0.6).explain(PROMPT, [59, 7])
    torch.testing.assert_close(e.scores, plain.scores, rtol=0, atol=1e-6, equal_nan=True)
    assert (e.method, e.provenance["mode"], e.postprocessing) == ("exact", "min_shift", "square")
    squares = plain.scores.double().square().nanmean(0).float()
    torch.testing.assert_close(e.relevance, squares)
    again = Explainer(model, None, preset="released").explain(
        PROMPT, [59, 7], postprocessing="none"
    )
    assert again.postprocessing == "none"


def test_the_preset_of_the_product():
    """About 30 units of a text, log-additive; what is given goes before what is preset."""
    model, text = MODELS["llama"](), "The pay is 23. " * 7
    explainer = Explainer(model, byte_level(), preset="aleph_alpha")
    e = explainer.explain(text, "23")
    known = [e.provenance[name] for name in ("mode", "factor", "method", "similarity")]
    assert known == ["log_additive", 0.1, "exact", None]
    assert e.provenance["granularity"] == "auto"
    plain = Explainer(model, byte_level(), mode="log_additive", method="exact")
    assert torch.equal(plain.explain(text, "23", "auto").scores, e.scores)
    assert len(plain.explain(text, "23").units) > len(e.units)
    assert explainer.explain(text, "23", "sentence").provenance["granularity"] == "sentence"
    Explainer(model, byte_level(), preset="aleph_alpha", method="hierarchical").explain(text, "23")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"similarity": 0}, ValueError, r"similarity must lie in \(0, 1\], .* got 0; False"),
        ({"similarity": 1.5}, ValueError, r"similarity must lie in \(0, 1\], .* got 1.5"),
        ({"similarity": float("nan")}, ValueError, r"similarity must lie in \(0, 1\]"),
        ({"similarity": "0.6"}, TypeError, "similarity must be a number, a bool or None, got '0."),
        ({"similarity": 0.6, "rule": "arxiv"}, ValueError, "rule must be one of released, paper"),
        ({"rule": "paper"}, ValueError, r"rule='paper' says how .*; pass similarity too"),
        (
            {"rule": "paper", "similarity": 0.6, "factor": 0.2},
            ValueError,
            r"rule='paper' takes .* got factor=0.2; leave it out, or take rule='released'",
        ),
        (
            {"method": "path", "similarity": 0.6},
            ValueError,
            r"method='path' cannot take similarity.*; take method='exact' or 'direct'",
        ),
        ({"method": "score_gradient", "similarity": True}, ValueError, "cannot take similarity"),
        ({"method": "path", "preset": "released"}, ValueError, "or similarity=False"),
    ],
    ids=str,
)
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        Explainer(MODELS["llama"](), None, **given)
