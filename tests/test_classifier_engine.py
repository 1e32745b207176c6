"""ClassifierEngine: equal to a loop of plain forwards, in batches, embedded once."""

import copy

import classifier_cases as cases
import pytest
import torch

from atman_triton.classes import Readout
from atman_triton.classifier_engine import ClassifierEngine
from atman_triton.embedded import catching, entry_of
from atman_triton.engine import undisturbed
from atman_triton.integration import UnsupportedModelError
from atman_triton.perturbations import RunFailed, Settings, Unit

READ = Readout((2, 0))
MIN_SHIFT = Settings(0.1, "min_shift")


def units_of(tokens):
    """Single tokens, and one unit of several."""
    return [*(Unit((token,)) for token in range(tokens)), Unit((1, 3, 4))]


def engine_of(name, readout=READ, settings=MIN_SHIFT, model=None, given=None):
    model = cases.make(name) if model is None else model
    inputs, tokens = cases.inputs_of(name) if given is None else given
    with undisturbed(model):
        return model, inputs, tokens, ClassifierEngine(model, inputs, tokens, readout, settings)


def perturb(model, engine, units, effect="total"):
    with undisturbed(model):
        return engine.perturb(units, effect)


def numbers(logits, readout):
    """What a readout of one class of all gives, by hand."""
    return logits.log_softmax(-1)[list(readout.classes)].float()


def plain(model, inputs, tokens, units, settings, read):
    """The base run's numbers, and ``[U, M]`` of a loop of plain forwards."""
    rows = [None]
    for unit in units:
        row = torch.ones(tokens)
        row[list(unit.positions)] = settings.factor
        rows.append(row)
    how = (settings.mode, settings.layers, settings.heads)
    with torch.no_grad():
        found = torch.stack([read(cases.plain_logits(model, inputs, row, *how)) for row in rows])
    return found[0], found[1:]


CASES = [(name, "min_shift") for name in cases.TEXT + cases.IMAGE] + [
    (name, mode)
    for name in ("bert", "modernbert", "dinov2")
    for mode in ("multiplicative", "log_additive", "min_shift_full")
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_engine_equals_a_loop_of_plain_forwards(name, mode):
    settings = Settings(0.1, mode)
    model, inputs, tokens, engine = engine_of(name, settings=settings)
    units = units_of(tokens)
    base, loop = plain(model, inputs, tokens, units, settings, lambda x: numbers(x, READ))
    found = perturb(model, engine, units)
    assert found.dtype == engine.base_logprobs.dtype == torch.float32
    torch.testing.assert_close(engine.base_logprobs, base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, loop, rtol=1e-6, atol=1e-6)
    assert (found - base).abs().amax(1).min() > 1e-5  # every unit is felt


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "siglip"])
def test_layers_and_heads(name):
    settings = Settings(0.1, "min_shift", layers=[1], heads=[0, 3])
    model, inputs, tokens, engine = engine_of(name, settings=settings)
    units = units_of(tokens)
    _, loop = plain(model, inputs, tokens, units, settings, lambda x: numbers(x, READ))
    torch.testing.assert_close(perturb(model, engine, units), loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama"])
def test_padding_behind_the_text(name):
    settings = Settings(0.1, "min_shift")
    given = cases.inputs_of(name, padding=3)
    model, inputs, tokens, engine = engine_of(name, given=given)
    units = units_of(tokens - 3)
    _, loop = plain(model, inputs, tokens, units, settings, lambda x: numbers(x, READ))
    found = perturb(model, engine, units)
    torch.testing.assert_close(found, loop, rtol=1e-6, atol=1e-6)
    alone, _ = cases.inputs_of(name)
    _, unpadded = plain(model, alone, tokens - 3, units, settings, lambda x: numbers(x, READ))
    torch.testing.assert_close(found, unpadded, rtol=1e-6, atol=1e-6)


def test_all_classes_come_from_the_same_passes():
    readout = Readout(tuple(range(len(cases.LABELS))))
    model, _, tokens, engine = engine_of("bert", readout)
    units = units_of(tokens)
    found = perturb(model, engine, units)
    assert engine.rows == [range(k, k + 1) for k in range(4)]
    torch.testing.assert_close(found.exp().sum(1), torch.ones(len(units)))
    assert engine.record.runs["total"] == len(units)
    assert sum(engine.record.batch_sizes) == len(units) + 1


@pytest.mark.parametrize(
    ("problem", "read"),
    [
        ("multi_label_classification", lambda x: -torch.log1p(torch.exp(-x))),
        ("regression", lambda x: x),
    ],
)
def test_other_heads(problem, read):
    short = {"multi_label_classification": "multi_label"}.get(problem, problem)
    readout = Readout((1, 3), short, "output" if problem == "regression" else "logprob")
    model, inputs, tokens, engine = engine_of("bert", readout)
    units = units_of(tokens)
    base, loop = plain(model, inputs, tokens, units, MIN_SHIFT, lambda x: read(x)[[1, 3]].float())
    torch.testing.assert_close(engine.base_logprobs, base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(perturb(model, engine, units), loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
def test_logits(problem):
    readout = Readout((1, 3), problem, "logit")
    model, inputs, tokens, engine = engine_of("bert", readout)
    units = units_of(tokens)
    _, loop = plain(model, inputs, tokens, units, MIN_SHIFT, lambda x: x[[1, 3]].float())
    torch.testing.assert_close(perturb(model, engine, units), loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert-tokens", "modernbert-tokens"])
def test_tokens_are_classified_one_class_after_the_other(name):
    readout = Readout((2, 0, 3), places=(4, 5))
    model, inputs, tokens, engine = engine_of(name, readout)
    units = units_of(tokens)
    assert engine.rows == [range(0, 2), range(2, 4), range(4, 6)]

    def read(logits):
        logprobs = logits.log_softmax(-1)
        return torch.stack([logprobs[place, k] for k in (2, 0, 3) for place in (4, 5)]).float()

    base, loop = plain(model, inputs, tokens, units, MIN_SHIFT, read)
    torch.testing.assert_close(engine.base_logprobs, base, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(perturb(model, engine, units), loop, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "siglip", "dinov2-registers"])
def test_correlated_suppression_by_embeddings_without_positions(name):
    settings = Settings(0.1, "min_shift", similarity=0.3)
    inputs, tokens = cases.inputs_of(name)
    if "input_ids" in inputs:
        inputs["input_ids"][0, 6] = inputs["input_ids"][0, 2]  # the same word again
        first, again = 2, 6
    else:
        inputs["pixel_values"][..., 8:12, 16:20] = inputs["pixel_values"][..., :4, 4:8]
        first, again = (tokens - 36) + 1, (tokens - 36) + 2 * 6 + 4  # patches in rows of six
    model, _, _, engine = engine_of(name, settings=settings, given=(inputs, tokens))
    vectors = content(model, inputs, tokens)
    similar = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    units = [Unit((token,)) for token in range(tokens)]
    rows = []
    for token in range(tokens):
        row = torch.ones(tokens, dtype=torch.float64)
        near = similar[token] >= 0.3
        row[near] = 1 - 0.9 * similar[token][near]
        row[token] = 0.1
        rows.append(row.float())
        found = {near.position: near for near in engine.neighbours(units[token])}
        assert sorted(found) == [k for k in near.nonzero().flatten().tolist() if k != token]
    near = {near.position: near for near in engine.neighbours(units[first])}
    assert near[again].similarity == 1 and near[again].factor == pytest.approx(0.1)
    both = engine.neighbours(Unit((first, again)))
    assert not {first, again} & {near.position for near in both}
    with torch.no_grad():
        loop = [numbers(cases.plain_logits(model, inputs, row), READ) for row in rows]
    torch.testing.assert_close(
        perturb(model, engine, units), torch.stack(loop), rtol=1e-5, atol=1e-5
    )


def content(model, inputs, tokens):
    """Words or patches without positions; tokens that are neither are like nothing."""
    if "input_ids" in inputs:
        return model.get_input_embeddings()(inputs["input_ids"])[0].detach()
    (conv,) = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    patches = conv(inputs["pixel_values"].double())[0].flatten(1).T.detach()
    return torch.cat([torch.zeros(tokens - len(patches), patches.shape[1]).double(), patches])


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "llama", "vit", "clip"])
def test_inputs_are_embedded_once(name):
    model = cases.make(name)
    embedding = model.get_input_embeddings() if name in cases.TEXT else None
    if embedding is None:
        (embedding,) = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    seen, original = [], embedding.forward

    def counted(rows):
        seen.append(len(rows))
        return original(rows)

    embedding.forward = counted  # pyright: ignore[reportAttributeAccessIssue]
    settings = Settings(0.1, "min_shift", batch_size=4)
    _, _, tokens, engine = engine_of(name, settings=settings, model=model)
    perturb(model, engine, units_of(tokens))
    assert seen == [1]
    assert engine.record.batch_sizes[0] == 1 and engine.record.batch_sizes[1] == 4
    assert embedding.forward is counted
    assert entry_of(model).__dict__.get("forward") in (None, counted)


@pytest.mark.parametrize("size", [1, "auto"])
def test_what_a_model_writes_into_is_embedded_every_time(size):
    model = cases.make("bert")

    def scale(module, args):
        args[0].mul_(1.5)

    model.bert.encoder.register_forward_pre_hook(scale)
    settings = Settings(0.1, "min_shift", batch_size=size)
    model, inputs, tokens, engine = engine_of("bert", settings=settings, model=model)
    units = units_of(tokens)
    _, loop = plain(model, inputs, tokens, units, settings, lambda x: numbers(x, READ))
    torch.testing.assert_close(perturb(model, engine, units), loop, rtol=1e-6, atol=1e-6)


def test_a_copy_lasts_where_a_model_writes_into_what_it_embeds():
    module = torch.nn.Linear(2, 3)
    with torch.no_grad(), catching(module) as caught, catching(module, copied=True) as copies:
        module(torch.ones(1, 2)).mul_(2)
    kept = copies.lasting
    assert caught.lasting is None and kept is not None
    torch.testing.assert_close(kept, module(torch.ones(1, 2)))
    with torch.no_grad(), catching(module) as twice:
        module(torch.ones(1, 2))
        module(torch.ones(1, 2))
    assert twice.lasting is None


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_batch_sizes_change_nothing(size):
    settings = Settings(0.1, "min_shift", batch_size=size)
    model, _, tokens, engine = engine_of("bert", settings=settings)
    counted = []
    engine.advance = counted.append
    units = units_of(tokens)
    found = perturb(model, engine, units)
    _, _, _, whole = engine_of("bert", model=model)
    torch.testing.assert_close(found, perturb(model, whole, units), rtol=1e-6, atol=1e-6)
    sizes = {1: [1] * 10, 3: [3, 3, 3, 1], "auto": [10]}[size]
    assert engine.record.batch_sizes == [1, *sizes]
    assert counted == [rows * tokens for rows in sizes]
    assert engine.record.tokens == (1 + len(units)) * tokens


def test_batches_are_halved_where_memory_ends_and_nothing_is_lost():
    model, _, tokens, engine = engine_of("bert")
    units = units_of(tokens)
    whole = perturb(model, engine, units)
    numbers = engine._numbers

    def tight(rows):
        if rows > 3:
            raise torch.OutOfMemoryError("so many rows")
        return numbers(rows)

    engine._numbers = tight
    torch.testing.assert_close(perturb(model, engine, units), whole, rtol=1e-6, atol=1e-6)
    assert engine.record.batch_sizes == [1, 10, 2, 2, 1, 2, 2, 1]
    engine._numbers = lambda rows: tight(4)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row of 9 tokens fits"):
        perturb(model, engine, units)


def test_a_fixed_batch_that_does_not_fit_is_an_error():
    settings = Settings(0.1, "min_shift", batch_size=4)
    model, _, tokens, engine = engine_of("bert", settings=settings)

    def full(rows):
        raise torch.OutOfMemoryError("full")

    engine._numbers = full
    with pytest.raises(torch.OutOfMemoryError, match="batch_size 4 with 9 tokens each does not"):
        perturb(model, engine, units_of(tokens))


def test_a_decoder_without_a_padding_token_runs_row_by_row():
    model, _, tokens, engine = engine_of("gpt2")
    perturb(model, engine, units_of(tokens))
    assert set(engine.record.batch_sizes) == {1}


def test_direct_effects_are_refused():
    model, _, _, engine = engine_of("bert")
    assert not engine.shares_prefix
    assert engine.record.reasons == ["BertForSequenceClassification reads its whole input at once"]
    with pytest.raises(UnsupportedModelError) as refused:
        perturb(model, engine, [Unit((1,))], "direct")
    assert str(refused.value) == (
        "method='direct' keeps the prompt's keys and values of the base run, but "
        "BertForSequenceClassification reads its whole input at once; use method='exact'."
    )


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "vit", "clip"])
def test_the_gradient_at_the_start_is_that_of_a_plain_forward(name):
    settings = Settings(0.1, "min_shift", gradients=True)
    model, inputs, tokens, engine = engine_of(name, settings=settings)
    units = [Unit((token,)) for token in range(tokens)][3:]
    units[0] = Unit((1, 3))
    with undisturbed(model):
        found = engine.attribute(units, None)
    row = torch.ones(tokens, dtype=torch.float64, requires_grad=True)
    logprobs = cases.plain_logits(model, inputs, row).log_softmax(-1)
    slopes = torch.stack(
        [torch.autograd.grad(-logprobs[k], row, retain_graph=True)[0] for k in READ.classes]
    )
    own = torch.stack([slopes[:, list(unit.positions)].sum(1) for unit in units])
    torch.testing.assert_close(found.scores, -0.9 * own.float(), rtol=1e-5, atol=1e-6)
    assert (
        engine.record.activations is not None and "inputs of 2 layers" in engine.record.activations
    )


def test_shares_of_the_path_add_up_the_better_the_more_steps():
    settings = Settings(0.1, "multiplicative", gradients=True)
    model, inputs, tokens, engine = engine_of("bert", settings=settings)
    units = [Unit((token,)) for token in range(1, tokens)]
    everything = [Unit(tuple(range(1, tokens)))]
    base, loop = plain(model, inputs, tokens, everything, settings, lambda x: numbers(x, READ))
    errors = []
    for steps in (8, 32):
        with undisturbed(model):
            found = engine.attribute(units, steps)
        torch.testing.assert_close(found.together, loop[0], rtol=1e-6, atol=1e-6)
        errors.append((found.scores.sum(0) - (base - loop[0])).abs().max())
    assert errors[1] < errors[0] / 4  # the midpoint rule: a sixteenth


def test_numbers_that_cannot_be_explained():
    model = cases.make("bert")
    with torch.no_grad():
        model.classifier.bias[2] = torch.nan
    with pytest.raises(RunFailed, match=r"the model returns NaN in torch.float64; try another"):
        engine_of("bert", model=model)
    with torch.no_grad():
        model.classifier.bias[2] = -torch.inf
    with pytest.raises(RunFailed, match="the model gives a class probability 0, or an output"):
        engine_of("bert", model=model)


def test_another_number_of_tokens_is_refused():
    inputs, tokens = cases.inputs_of("vit")
    with pytest.raises(UnsupportedModelError) as refused:
        engine_of("vit", given=(inputs, tokens - 1))
    assert str(refused.value) == (
        "ViTForImageClassification makes 37 tokens of its input, but 36 were expected."
    )


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_model_is_unchanged_after_an_exception(name):
    model = cases.make(name)
    inputs, tokens = cases.inputs_of(name)
    read = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    before = model(**read).logits
    state = copy.deepcopy(model.state_dict())
    _, _, _, engine = engine_of(name, model=model)
    dense = next(m for m in reversed(list(model.modules())) if isinstance(m, torch.nn.Linear))
    hook = dense.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        perturb(model, engine, units_of(tokens))
    hook.remove()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(model(**read).logits, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
