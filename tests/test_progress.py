"""The progress bar: drawn on terminals alone, as long as the work, and full at the end."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from toy_models import MODELS, llama
from toy_tokenizers import byte_level

from atman_triton import Explainer, explain, progress
from atman_triton.engine import Engine, Settings, Unit, undisturbed

PROMPT = "The pay is 23. Hello world.\n\nIs it? Yes. The notice period is four weeks."
ANSWERS = ["23 euros", "Paris", "four weeks"]
METHODS = ["exact", "direct", "hybrid", "hierarchical"]


@pytest.fixture
def terminal(monkeypatch):
    """What a wide terminal on stderr shows."""
    drawn = io.StringIO()

    def console(**_):
        return Console(file=drawn, force_terminal=True, width=100)

    monkeypatch.setattr(progress, "Console", console)
    return drawn


@pytest.mark.parametrize("method", METHODS)
def test_it_is_full_at_the_end(terminal, method):
    explainer = Explainer(MODELS["llama"](), byte_level(), method=method, budget=_budget(method))
    e = explainer.explain(PROMPT, targets=ANSWERS)
    last = re.findall(r"([\d,]+) of ([\d,]+) tokens", terminal.getvalue())[-1]
    done, total = (int(number.replace(",", "")) for number in last)
    words = len(byte_level()(PROMPT).input_ids)
    assert done == total == round(e.provenance["forwards"] * words)


def _budget(method):
    return 20 if method in ("hybrid", "hierarchical") else None


def test_it_can_be_left_out(terminal, capsys):
    Explainer(MODELS["llama"](), byte_level(), progress=False).explain(PROMPT, ANSWERS[0])
    assert terminal.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_nothing_is_drawn_without_a_terminal(capsys):
    Explainer(MODELS["llama"](), byte_level()).explain(PROMPT, ANSWERS[0])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_token_is_announced_and_done_once(monkeypatch, method, batch_size):
    announced, done = [], []

    class Bar:
        expect, advance = announced.append, done.append

    @contextmanager
    def bar(title, shown):
        yield Bar

    monkeypatch.setattr(explain, "token_progress", bar)
    model, ran = llama(), []
    Explainer(model).explain([5, 6, 7], [8])  # the probe is not counted
    announced.clear()
    done.clear()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    explainer = Explainer(
        model, byte_level(), method=method, budget=_budget(method), batch_size=batch_size
    )
    e = explainer.explain("The pay is 23. Hello world. Is it? Yes.", targets=ANSWERS)
    assert done == ran
    assert sum(announced) == sum(ran)
    running = 0
    for tokens in ran:  # never more done than announced
        running += tokens
        assert running <= sum(announced)
    assert e.provenance["forwards"] == pytest.approx(sum(ran) / e.targets[0].token)


def test_halved_batches_are_not_announced_again():
    announced, done = [], []
    model = llama()
    Explainer(model).explain([5, 6, 7], [8])

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with undisturbed(model):
        run = Engine(
            model, inputs, [[3, 4]], Settings(0.1, "min_shift"), announced.append, done.append
        )
        run.perturb([Unit((0,)), Unit((1,)), Unit((3,)), Unit((4,)), Unit((0, 2))])
    assert sum(announced) == sum(done) == run.record.tokens
