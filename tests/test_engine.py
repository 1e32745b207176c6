"""The engine: right numbers, whatever it saves, and every saving really made.

Legend: S input columns, P prompt tokens, U units, M scored tokens.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_models import MODELS, VOCABULARY, gemma2, in_float64, llama, plain_loop
from transformers import LlamaForCausalLM

from atman_triton import memory, runner
from atman_triton.engine import SAVINGS, Engine, Settings, Unit, undisturbed
from atman_triton.integration import UnsupportedModelError, manipulate
from atman_triton.testing import assert_close_to_oracle

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84]
TARGET = [84, 62, 64]
UNITS = [(0,), (1, 2), (5,), (9,), (11,)]
MODES = ["min_shift", "multiplicative", "log_additive"]
EFFECTS = ["total", "direct"]
STEP = torch.finfo(torch.float32).eps  # one rounding, of results to float32


def started(model, targets=(TARGET,), prompt=PROMPT, inputs=None, **changes):
    inputs = inputs or {"input_ids": torch.tensor([prompt])}
    with undisturbed(model):
        return Engine(
            model, inputs, targets, Settings(**{"factor": 0.1, "mode": "min_shift"} | changes)
        )


def placed(positions, run):
    """A piece of the prompt, or else of the first target."""
    return Unit(positions, None if max(positions) < run.prompt_tokens else 0)


def perturbed(run, units=UNITS, effect="total"):
    """``[1 + U, M]``, the base run first; what the engine leaves NaN is the base run's."""
    several = [
        u if isinstance(u, Unit) else Unit(u, None if max(u) < run.prompt_tokens else 0)
        for u in units
    ]
    with undisturbed(run._runners[0].model):
        found = run.perturb(several, effect)
    return torch.cat([run.base_logprobs[None], found.where(~found.isnan(), run.base_logprobs)])


def close(found, expected):
    """Equal but for rounding to float32, of what ran in float64."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=2 * STEP, atol=1e-9)


def loops(name, mode, effect, **chosen):
    """What a plain loop finds in float32 and in float64."""
    first = len(PROMPT) - 1 if effect == "direct" else 0
    arguments = (PROMPT + TARGET[:-1], TARGET, UNITS, 0.1, mode)
    return [
        plain_loop(model, *arguments, first_row=first, **chosen)
        for model in (MODELS[name](), in_float64(name))
    ]


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_a_plain_loop(name, mode, effect):
    eager, truth = loops(name, mode, effect)
    result = perturbed(started(MODELS[name](), mode=mode), effect=effect)
    assert_close_to_oracle(result, eager, truth, name="log-probabilities")
    # It proves nothing unless each unit moves its targets far beyond rounding.
    moved = (truth[1:] - truth[0]).abs().amax(1)
    reached = [name != "gemma2" or effect == "total" or unit[-1] > 5 for unit in UNITS]
    assert moved[torch.tensor(reached)].min() > 100 * (eager - truth).abs().max()


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize(
    "chosen", [{"layers": (1,), "heads": (0, 3)}, {"heads": (2,)}, {"layers": (0,)}], ids=str
)
def test_layers_and_heads_are_passed_on(chosen, effect):
    """Head 2 shares its key head with head 3 and nothing else."""
    eager, truth = loops("llama", "min_shift", effect, **chosen)
    everywhere = perturbed(started(MODELS["llama"]()), effect=effect)
    result = perturbed(started(MODELS["llama"](), **chosen), effect=effect)
    assert_close_to_oracle(result, eager, truth)
    assert (everywhere - result).abs().max() > 100 * (eager - truth).abs().max()
    assert (truth[1:] - truth[0]).abs().amax(1).max() > 100 * (eager - truth).abs().max()


def test_min_shift_full_runs_in_full():
    eager, truth = loops("llama", "min_shift_full", "total")
    run = started(MODELS["llama"](), mode="min_shift_full")
    assert_close_to_oracle(perturbed(run), eager, truth)
    assert run.record.runners == ["full"]
    assert run.record.reasons == ["mode='min_shift_full' looks at future keys"]
    with pytest.raises(UnsupportedModelError, match=r"min_shift_full.*use method='exact'"):
        perturbed(run, effect="direct")
    with pytest.raises(ValueError, match="use backend='torch'"):
        started(MODELS["llama"](), mode="min_shift_full", backend="triton")


ids = st.integers(0, VOCABULARY - 1)


@given(
    name=st.sampled_from(sorted(MODELS)),
    mode=st.sampled_from(MODES),
    effect=st.sampled_from(EFFECTS),
    size=st.integers(1, 7) | st.just("auto"),
    tokens=st.integers(1, 120),
    piece=st.integers(1, 30),
    without=st.sets(st.sampled_from(SAVINGS)),
    prompt=st.lists(ids, min_size=1, max_size=9),
    targets=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_no_plan_and_no_saving_changes_a_number(
    name, mode, effect, size, tokens, piece, without, prompt, targets, data
):
    model, units = in_float64(name), []
    if effect == "direct":
        without.discard("shared_prefix")
    for branch in (None, *range(len(targets))):
        stop = len(prompt) if branch is None else len(prompt) + len(targets[branch]) - 1
        places = st.integers(0 if branch is None else len(prompt), max(0, stop - 1))
        if branch is None or stop > len(prompt):
            for positions in data.draw(st.lists(st.sets(places, min_size=1), max_size=4)):
                units.append(Unit(tuple(positions), branch))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "tokens_per_batch", lambda device: tokens)
        patch.setattr(runner, "_PIECE", {"cpu": piece})
        changes = {"mode": mode, "batch_size": size, "without": frozenset(without)}
        run = started(model, targets, prompt, **changes)
        with undisturbed(model):
            found = run.perturb(units, effect)
    for k, target in enumerate(targets):
        mine = [u for u, unit in enumerate(units) if unit.branch in (None, k)]
        plain = plain_loop(
            model,
            prompt + target[:-1],
            target,
            [units[u].positions for u in mine],
            0.1,
            mode,
            first_row=len(prompt) - 1 if effect == "direct" else 0,
        )
        first = torch.tensor([len(prompt) - 1, *(max(units[u].positions) for u in mine)])
        reached = first[:, None] < len(prompt) + torch.arange(len(target))
        own = torch.cat([run.base_logprobs[None], found[mine]])[:, list(run.rows[k])]
        assert torch.equal(own.isnan(), ~reached)
        close(own[reached], plain[reached])
        others = [u for u in range(len(units)) if u not in mine]
        assert found[others][:, list(run.rows[k])].isnan().all()


def test_units_at_or_behind_a_token_say_nothing_of_it():
    run = started(MODELS["llama"](), [TARGET, [7], [84, 5]])
    with undisturbed(MODELS["llama"]()):
        found = run.perturb([Unit((9,)), Unit((10,), 0), Unit((11,), 0), Unit((10,), 2)])
    assert found.isnan().tolist() == [
        [False] * 6,
        [True, False, False, True, True, True],
        [True, True, False, True, True, True],
        [True, True, True, True, True, False],
    ]


# --- savings ------------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """A fresh model that was probed already, and the shapes of ids and logits of its passes."""
    model, ids, logits = llama(), [], []
    started(model)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    model.lm_head.register_forward_hook(
        lambda module, args, out: logits.append(tuple(out.shape[:2]))
    )
    return model, ids, logits


def test_every_saving_is_made_by_default(heard, monkeypatch):
    model, ids, logits = heard
    monkeypatch.setattr(memory, "tokens_per_batch", lambda device: 36)
    run = started(model)
    perturbed(run)
    perturbed(run, effect="direct")
    # Base; starts 0, 1 | 5 | 9, 11 in batches of little waste; direct from the last prompt token.
    assert ids[0] == (1, 12)
    assert ids[-1] == (5, 3)
    assert sum(rows for rows, _ in ids[1:-1]) == len(UNITS)
    starts = [12 - columns for _, columns in ids[1:-1]]
    assert starts == sorted(starts)
    assert starts[-1] >= 5
    assert logits == [(rows, min(columns, len(TARGET))) for rows, columns in ids]
    record = run.record
    assert record.batch_sizes == [rows for rows, _ in ids]
    assert record.tokens == sum(rows * columns for rows, columns in ids)
    assert record.runs == {"total": 5, "direct": 5}
    assert (record.runners, record.reasons) == (["shared_prefix"], [])
    assert record.logits == "target positions"
    assert (
        record.prefix_bytes == 2 * 2 * 2 * 12 * 8 * 4
    )  # K and V, layers, key heads, S, D, float32
    assert record.seconds > 0
    useful = sum(12 - unit[0] for unit in UNITS)
    run_tokens = sum(rows * columns for rows, columns in ids[1:-1])
    assert record.wasted == pytest.approx(1 - useful / run_tokens)


def test_logits_everywhere_without_target_logits(heard):
    model, ids, logits = heard
    run = started(model, without=frozenset({"target_logits"}))
    perturbed(run)
    assert logits == ids
    assert run.record.logits == "all positions"


@pytest.mark.parametrize("effect", EFFECTS)
def test_one_row_per_pass_without_batching(heard, effect):
    model, ids, _ = heard
    run = started(model, without=frozenset({"batching"}))
    perturbed(run, effect=effect)
    starts = [0, 1, 5, 9, 11] if effect == "total" else [9] * 5
    assert ids == [(1, 12), *((1, 12 - start) for start in starts)]
    assert run.record.wasted == 0


def test_the_whole_input_in_every_pass_without_a_shared_prefix(heard):
    model, ids, _ = heard
    run = started(model, without=frozenset({"shared_prefix"}))
    perturbed(run)
    assert ids == [(1, 12), (5, 12)]
    assert run.record.runners == ["full"]
    assert run.record.reasons == ["the shared prefix is switched off"]
    assert run.record.prefix_bytes == 0
    with pytest.raises(UnsupportedModelError, match="the shared prefix is switched off"):
        perturbed(run, effect="direct")


def test_one_pass_over_the_prompt_for_each_target_without_one_pass(heard):
    model, ids, _ = heard
    targets = [TARGET, [7], [84, 5]]
    run = started(model, targets, without=frozenset({"one_pass"}))
    assert ids == [(1, 12), (1, 10), (1, 11)]
    assert run.record.runners == ["shared_prefix"] * 3
    ids.clear()
    together = started(model, targets)
    assert ids == [(1, 13)]
    torch.testing.assert_close(
        perturbed(together, UNITS[:4]), perturbed(run, UNITS[:4]), rtol=0, atol=1e-5
    )


def test_unknown_savings_are_refused():
    with pytest.raises(ValueError, match=r"among target_logits, batching, .*got \['speed'\]"):
        Settings(0.1, "min_shift", without=frozenset({"speed"}))


# --- many targets -------------------------------------------------------------------------------


def test_targets_of_one_token_read_one_softmax(heard):
    model, ids, logits = heard
    targets = [[token] for token in range(40, 60)]
    run = started(model, targets)
    found = perturbed(run, UNITS[:4])
    passes, columns = list(ids), list(logits)
    ids.clear()
    alone = perturbed(started(model, targets[3:4]), UNITS[:4])
    assert ids == passes  # twenty targets cost the passes of one
    assert all(columns == 1 for _, columns in columns)
    torch.testing.assert_close(found[:, 3:4], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("name", MODELS)
def test_many_targets_equal_each_alone(name, effect):
    """Mixed lengths, two of them the same, one the start of another."""
    model = in_float64(name)
    targets = [[84, 62, 64, 9, 30, 11], [7], TARGET, [8], TARGET, [84, 62]]
    own = [Unit((10,), 0), Unit((12, 13), 0), Unit((10, 11), 4), Unit((10,), 5)]
    units = [*map(Unit, UNITS[:4]), *own]
    run = started(model, targets)
    assert run.record.runners == ["shared_prefix"]
    found = perturbed(run, units, effect)
    for k, target in enumerate(targets):
        mine = [u for u, unit in enumerate(units) if unit.branch in (None, k)]
        alone = started(model, [target])
        own = found[[0, *(u + 1 for u in mine)]][:, list(run.rows[k])]
        close(own, perturbed(alone, [units[u].positions for u in mine], effect))
    rows = [list(run.rows[k]) for k in (2, 4)]
    assert torch.equal(found[:5, rows[0]], found[:5, rows[1]])


@pytest.mark.parametrize("make", [llama, gemma2])
def test_a_prompt_shorter_than_its_targets(make):
    """Whether the input can be split is tried once, on a new model within the first target."""
    model, targets = make().double(), [[18, 38, 6, 32], [40, 18], [25]]
    units = [Unit((0,)), Unit((2,), 0), Unit((1,), 1)]
    run = started(model, targets, [25])
    found = perturbed(run, units)
    for k, target in enumerate(targets):
        mine = [u for u, unit in enumerate(units) if unit.branch in (None, k)]
        alone = started(model, [target], [25])
        own = found[[0, *(u + 1 for u in mine)]][:, list(run.rows[k])]
        close(own, perturbed(alone, [units[u].positions for u in mine]))


class CountsPositionsItself(LlamaForCausalLM):
    """Takes no position ids, as older models."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        kwargs.pop("position_ids", None)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


def test_targets_run_separately_where_positions_cannot_be_set():
    model = llama(CountsPositionsItself)
    targets = [TARGET, [7], [84, 5], [8]]
    run = started(model, targets)
    reason = "CountsPositionsItself counts positions by itself"
    assert run.record.reasons == [f"targets of several tokens ran separately: {reason}"]
    assert run.record.runners == ["shared_prefix"] * 3  # both single tokens in one
    expected = perturbed(started(MODELS["llama"](), targets), UNITS[:4])
    torch.testing.assert_close(perturbed(run, UNITS[:4]), expected, rtol=0, atol=1e-5)


class WithoutLogitsToKeep(LlamaForCausalLM):
    """Gives logits at every position, as older models do."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=return_dict,
        )


@pytest.mark.parametrize("targets", [[TARGET], [TARGET, [7], [84, 5]]], ids=["one", "several"])
@pytest.mark.parametrize("effect", EFFECTS)
def test_models_without_logits_to_keep_are_sliced(effect, targets):
    run = started(llama(WithoutLogitsToKeep), targets)
    assert run.record.logits == "all positions"
    expected = perturbed(started(MODELS["llama"](), targets), UNITS[:4], effect)
    torch.testing.assert_close(perturbed(run, UNITS[:4], effect), expected, rtol=0, atol=1e-5)


def test_targets_reads_are_reduced_some_rows_at_a_time(monkeypatch):
    whole = perturbed(started(MODELS["llama"]()))
    monkeypatch.setattr(runner, "_REDUCTION_BYTES", {"cpu": 4 * VOCABULARY * 2})
    assert torch.equal(perturbed(started(MODELS["llama"]())), whole)


def test_half_precision_is_reduced_in_float32():
    logits = torch.randn(2, 3, 50).bfloat16()
    rows, tokens = torch.tensor([1, 2, 2]), torch.tensor([2, 3, 40])
    expected = logits.double().log_softmax(-1)[:, rows, tokens]
    result = runner.target_logprobs(logits, rows, tokens)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


# --- a user's own manipulation around it --------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "effect", "targets"),
    [
        *product(MODES, ["total"], [[TARGET]]),
        ("min_shift", "direct", [TARGET]),
        ("min_shift", "total", [[7], [84, 62]]),
        ("log_additive", "direct", [TARGET, [84, 5]]),
    ],
)
def test_a_manipulation_around_it_is_kept(mode, effect, targets):
    """Its factors on the prefix, on suppressed tokens and on the target, times the engine's."""
    model = in_float64("llama")
    around = torch.ones(1, 12)
    around[0, [2, 5, 10]] = torch.tensor([0.2, 3.0, 0.5])
    with manipulate(model, around, mode):
        found = perturbed(started(model, targets, mode=mode, batch_size=1), UNITS[:4], effect)
    assert (
        found - perturbed(started(model, targets, mode=mode), UNITS[:4], effect)
    ).abs().max() > 0.1
    for u, unit in enumerate([(), *UNITS[:4]]):
        first = 0
        for target in targets:
            factors = torch.ones(12)
            factors[list(unit)] = 0.1
            inputs = {"input_ids": torch.tensor([PROMPT + target[:-1]]), "use_cache": False}
            with torch.no_grad(), manipulate(model, around, mode):
                if effect == "direct":
                    expected = _in_last_rows(model, inputs, factors, mode, len(target))
                else:
                    with manipulate(model, factors[None], mode):
                        expected = model(**inputs).logits[0, -len(target) :].log_softmax(-1)
            expected = expected[range(len(target)), target]
            part = found[u, first : first + len(target)].double()
            close(part, expected)
            first += len(target)


def _in_last_rows(model, inputs, factors, mode, count):
    """Log-probabilities with factors in the last rows alone, by the model's own cache."""
    ids = inputs["input_ids"]
    past = model(input_ids=ids[:, :-count], use_cache=True).past_key_values
    with manipulate(model, factors[None], mode):
        return model(input_ids=ids[:, -count:], past_key_values=past).logits[0].log_softmax(-1)


# --- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("targets", [[TARGET], [TARGET, [7], [84, 5]]], ids=["one", "several"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_prompt_with_positions_is_the_prompt_alone(name, targets, effect):
    model, pad = in_float64(name), 4
    padded = {
        "input_ids": torch.tensor([[0] * pad + PROMPT]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(PROMPT)]),
        "position_ids": torch.tensor([[0] * pad + [*range(len(PROMPT))]]),
    }
    run = started(model, targets, inputs=padded)
    assert run.record.reasons == []
    moved = [tuple(token + pad for token in unit) for unit in UNITS[:4]]
    found = perturbed(run, moved, effect)
    expected = perturbed(started(model, targets), UNITS[:4], effect)
    close(found, expected)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("without", [frozenset(), frozenset({"shared_prefix"})])
def test_nan_is_refused(without):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(ValueError, match=r"the model returns NaN in torch\.float32"):
        started(model, without=without)


@pytest.mark.parametrize("effect", EFFECTS)
def test_nan_in_a_perturbation_is_refused(effect):
    model = llama()
    run = started(model)
    model.model.norm.register_forward_hook(lambda module, args, output: output.fill_(torch.nan))
    with pytest.raises(ValueError, match=r"the model returns NaN in torch\.float32"):
        perturbed(run, effect=effect)


def test_impossible_targets_are_refused():
    model = llama()

    def mask(module, args, output):
        output[..., TARGET[1]] = -torch.inf
        return output

    model.lm_head.register_forward_hook(mask)
    with pytest.raises(ValueError, match="gives target token 1 probability 0"):
        started(model)
