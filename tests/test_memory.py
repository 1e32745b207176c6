"""What fits: estimates, halving when memory runs out, prompts in pieces, no copied prefix."""

from __future__ import annotations

import pytest
import torch
from test_engine import PROMPT, TARGET, UNITS, perturbed, started
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_models import MODELS, gemma2, gpt2, llama

from atman_triton import memory, runner
from atman_triton.engine import Unit, undisturbed

CUDA = torch.OutOfMemoryError("CUDA out of memory.")
ERRORS = {
    "cuda": CUDA,
    "windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
    "linux": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "python": MemoryError(),
}
failing = pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
S = len(PROMPT) + len(TARGET) - 1


def crowded(refuses, error=CUDA):
    """A probed model that runs out of memory where ``refuses(shape, passes so far)``.

    Returns: it, and the shape ``[rows, tokens]`` of each pass tried.
    """
    model, tried = llama(), []
    started(model)

    def hook(module, args, kwargs):
        tried.append(tuple(kwargs["input_ids"].shape))
        if refuses(tried[-1], len(tried)):
            raise error

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, tried


@failing
@pytest.mark.parametrize("effect", ["total", "direct"])
def test_automatic_batches_are_halved_when_memory_runs_out(error, effect):
    model, tried = crowded(lambda shape, _: shape[0] > 2, error)
    run = started(model)
    found = perturbed(run, effect=effect)
    assert [rows for rows, _ in tried] == [1, 5, 2, 2, 1]
    assert run.record.batch_sizes == [1, 2, 2, 1]
    assert run.record.runs[effect] == len(UNITS)
    assert run.record.tokens == sum(a * b for a, b in tried if a <= 2)
    expected = perturbed(started(MODELS["llama"](), batch_size=1), effect=effect)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_memory_is_halved_as_often_as_it_takes():
    model, tried = crowded(lambda shape, _: shape[0] > 1)
    run = started(model)
    perturbed(run, [(0,)] * 9)
    assert [rows for rows, _ in tried] == [1, 9, 4, 2, *[1] * 9]


def test_finished_batches_are_not_run_again(monkeypatch):
    """Something else takes the memory meanwhile: the third pass fails once."""
    monkeypatch.setattr(memory, "tokens_per_batch", lambda device: 3 * S)
    model, tried = crowded(lambda _, passes: passes == 3)
    run = started(model)
    units = [(0,), (1,), (2,), (3,), (4,), (5,), (6,)]
    found = perturbed(run, units)
    done = [shape for place, shape in enumerate(tried) if place != 2]
    assert sum(rows for rows, _ in done) == 1 + len(units)
    assert run.record.batch_sizes == [rows for rows, _ in done]
    expected = perturbed(started(MODELS["llama"](), batch_size=1), units)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_whole_passes_are_halved_too():
    model, tried = crowded(lambda shape, _: shape[0] > 2)
    run = started(model, without=frozenset({"shared_prefix"}))
    found = perturbed(run)
    assert [rows for rows, _ in tried] == [1, 5, 2, 2, 1]
    expected = perturbed(started(MODELS["llama"](), batch_size=1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@failing
def test_one_row_that_does_not_fit_is_an_error(error):
    model, _ = crowded(lambda shape, passes: passes > 1, error)
    run = started(model)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row of 12 tokens fits"):
        perturbed(run)


@failing
def test_a_base_run_that_does_not_fit_is_the_same_error(error):
    model, _ = crowded(lambda shape, passes: True, error)
    with pytest.raises(torch.OutOfMemoryError, match="not even one row of 12 tokens fits"):
        started(model)


def test_a_batch_size_that_was_asked_for_is_not_changed_silently():
    model, tried = crowded(lambda shape, _: shape[0] > 2)
    run = started(model, batch_size=3)
    message = "batch_size 3 with 12 tokens each does not fit in memory: lower it or use"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        perturbed(run)
    assert tried == [(1, 12), (3, 12)]


def test_other_errors_are_not_taken_for_memory():
    model, tried = crowded(lambda shape, _: shape[0] > 1, RuntimeError("something else"))
    run = started(model)
    with pytest.raises(RuntimeError, match="something else"):
        perturbed(run)
    assert len(tried) == 2


def test_an_interrupted_run_can_be_asked_again():
    """The same engine, after an error."""
    model, _ = crowded(lambda _, passes: passes == 2, RuntimeError("something else"))
    run = started(model)
    with pytest.raises(RuntimeError, match="something else"):
        perturbed(run)
    expected = perturbed(started(MODELS["llama"]()))
    torch.testing.assert_close(perturbed(run), expected, rtol=0, atol=1e-5)


def test_batches_follow_the_free_memory(monkeypatch):
    model = MODELS["llama"]()
    row = memory.bytes_per_row(model, S, len(TARGET), S)
    for rows in (1, 2, 4):
        monkeypatch.setattr(memory, "free_memory", lambda model, rows=rows: 2 * rows * row)
        run = started(model)
        perturbed(run, [(0,)] * 8)
        assert run.record.batch_sizes == [1, *[rows] * (8 // rows)]
    monkeypatch.setattr(memory, "free_memory", lambda model: 0)
    run = started(model)
    perturbed(run)
    assert run.record.batch_sizes[:2] == [1, 1]  # no more tokens than the longest row alone
    monkeypatch.setattr(memory, "free_memory", lambda model: None)  # unknown: what is fastest
    run = started(model)
    perturbed(run)
    assert run.record.batch_sizes == [1, len(UNITS)]


def test_a_row_takes_more_with_more_of_anything():
    model = MODELS["llama"]()
    row = memory.bytes_per_row(model, 10, 2, 20)
    assert memory.bytes_per_row(model, 11, 2, 20) > row
    assert memory.bytes_per_row(model, 10, 3, 20) > row
    assert memory.bytes_per_row(model, 10, 2, 21) > row
    assert memory.bytes_per_row(llama(vocab_size=1024), 10, 2, 20) > row
    assert memory.bytes_per_row(llama(hidden_size=64), 10, 2, 20) > row


# --- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [3, 5, 7])
@pytest.mark.parametrize("targets", [[TARGET], [TARGET, [7], [84]]], ids=["one", "several"])
@pytest.mark.parametrize("build", [llama, gemma2, gpt2])
def test_long_prompts_are_read_in_pieces(monkeypatch, build, targets, piece):
    """Gemma 2's window of 5 is longer than a piece, and shorter."""
    model, tried = build(), []
    expected = perturbed(started(model, targets), UNITS[:4])
    monkeypatch.setattr(runner, "_PIECE", {"cpu": piece})
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: tried.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    run = started(model, targets)
    hook.remove()
    assert sum(tried) == S
    assert max(tried) <= piece
    assert len(tried) <= -(-S // piece) + 1  # the last prompt token stands with the target
    torch.testing.assert_close(perturbed(run, UNITS[:4]), expected, rtol=0, atol=1e-5)


# --- copies -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers in any storage that an operator gave back."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                numbers = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.numbers = max(self.numbers, numbers)
        return output


@pytest.mark.parametrize("changes", [{}, {"heads": (1,)}], ids=["all heads", "one head"])
@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
@pytest.mark.parametrize("effect", ["total", "direct"])
@pytest.mark.parametrize("build", [llama, gemma2])
def test_the_prefix_is_never_copied_per_row(build, effect, mode, changes):
    """The last two tokens of 400, eight times each: 16 rows of two queries, head dim 64."""
    prompt, rows = [7 * place % 500 for place in range(400)], 16
    model = build(head_dim=64, max_position_embeddings=512)
    run = started(model, [[5]], prompt, mode=mode, batch_size=rows, **changes)
    places = range(398, 400) if effect == "total" else range(16)
    units = [Unit((place,)) for place in places] * (rows // len(places))
    with undisturbed(model), Largest() as largest:
        found = run.perturb(units, effect)
    assert run.record.batch_sizes[-1] == rows
    assert not torch.equal(found[0], found[1])
    copied = rows * 2 * 398 * 64  # B · Hk · Tp · D
    assert 398 * 64 < largest.numbers < copied / 4
