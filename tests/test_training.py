"""Training with "atman" gives the curves of "sdpa", and factors can be trained."""

import csv
from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

import atman_triton as atman
from atman_triton import backend_registry
from atman_triton.demo import demo_prompt
from atman_triton.testing import count_launches
from bench import training
from bench.training_tasks import make_tasks, train
from examples import learn_factors

TASKS = make_tasks(width=32, tokens=48)
TEN_LINES = """\
import torch
from atman_triton.demo import demo_prompt, load_demo_model

model, tokenizer = load_demo_model()
n = len(tokenizer(demo_prompt())["input_ids"])
ids = tokenizer(demo_prompt() + " $24.20", return_tensors="pt")["input_ids"]
labels = ids.masked_fill(torch.arange(ids.shape[1]) < n, -100)  # only the answer counts
factor = torch.nn.Parameter(torch.ones(1, n))                   # one per token of the prompt
optimizer = torch.optim.Adam([factor], lr=0.05)
for _ in range(100):
    optimizer.zero_grad()
    with atman.manipulate(model, factor, mode="min_shift"):
        model(ids, labels=labels).loss.backward()
    optimizer.step()
"""
"""What the README shows."""


def judged(rows):
    """Verdicts by provider, with the numbers printed."""
    for row in rows:
        print(row.what, row.provider, row.largest_difference, row.share_of_bound, row.p_value)
    return {row.provider: row.same for row in rows}


@pytest.mark.parametrize("name", TASKS)
def test_same_curve_within_rounding(name):
    curves = training.exact_curves(TASKS[name], 12, "cpu")
    assert judged(training.compare(name, curves, "cpu")) == {
        "sdpa": True,
        "eager": True,
        "atman": True,
        "atman, checkpointed": True,
        "sdpa_wrong_gradient": False,
    }
    losses = curves["atman"][0]
    assert losses[-5:].mean() < losses[:5].mean()  # it learns


def test_same_distribution_with_dropout():
    """BERT, of which nothing but the attention's dropout makes runs differ."""
    # More dropout than by default, so that so few steps show its absence.
    curves = training.dropout_curves(TASKS["BERT"], 20, 6, "cpu", attention_dropout=0.5)
    assert judged(training.compare("BERT", curves, "cpu")) == {
        "sdpa": True,
        "atman": True,
        "atman, checkpointed": True,
        "sdpa without attention dropout": False,
    }
    assert bool((curves["atman"].std(0) > 0).all())  # seeds matter from the first step on


def test_the_fused_kernels_train_too(monkeypatch):
    pytest.importorskip("triton", reason="the fused kernels need triton")
    task, steps = TASKS["Mistral"], 2
    sdpa, eager = (
        torch.tensor(train(task, implementation, steps=steps), dtype=torch.float64)
        for implementation in ("sdpa", "eager")
    )
    # "auto" is what transformers' calls ask for
    triton = backend_registry.find_candidate("triton")
    monkeypatch.setattr(backend_registry, "by_rule", lambda _: triton)
    with count_launches() as launches:
        fused = torch.tensor(train(task, "atman", steps=steps), dtype=torch.float64)
    assert launches.attention == launches["_attention_bwd_dkv_kernel"] > steps
    assert bool(((fused - sdpa).abs() <= training.rounding_bound(sdpa, eager)).all())
    assert len(set(fused.tolist())) == steps  # it moves


def test_rounding_bound_by_hand():
    rival, yardstick = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([4.0, 2.5, 1.0])
    rounding = 2 * 2.0**-23
    wanted = torch.tensor([4 * rounding, 1.5 + 2 * rounding, 1.5 + rounding])
    torch.testing.assert_close(training.rounding_bound(rival, yardstick), wanted)


def test_permutation_test_by_hand():
    low, high = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert training.permutation_p(low, high) == pytest.approx(2 / 6)  # of 6 ways, either order
    middle, outer = torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [4.0]])
    assert training.permutation_p(middle, outer) == 1
    with pytest.raises(ValueError, match="first and second must vary from run to run"):
        training.permutation_p(torch.ones(2, 1), torch.ones(2, 1))


def test_spreads_alone_are_told_apart():
    narrow = torch.linspace(-0.1, 0.1, 6, dtype=torch.float64)[:, None].expand(-1, 10)
    assert training.distribution_p(narrow, narrow + 1e-3) > 0.5
    assert training.distribution_p(narrow, 20 * narrow) < 0.05


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_main_writes_verdicts_curves_and_a_picture(error, tmp_path, monkeypatch, capsys):
    def train(task, implementation, *, steps, seed=0, attention_dropout=0.0, **_):
        losses = torch.linspace(3, 2, steps, dtype=torch.float64)
        off = {"atman": error, "sdpa_wrong_gradient": 1e-3}.get(implementation, 0.0)
        noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed))
        return (losses + off + attention_dropout * noise).tolist()

    monkeypatch.setattr(training, "train", train)
    status = training.main(["--steps", "20", "--seeds", "6", "--out", str(tmp_path)])
    complaint = "NOT AS EXPECTED: Mistral: atman is another than sdpa"
    assert (status, complaint in capsys.readouterr().out) == (bool(error), bool(error))
    rows = list(csv.DictReader((tmp_path / "training.csv").read_text().splitlines()))
    whats = Counter(row["what"] for row in rows)
    assert whats == dict.fromkeys(TASKS, 5) | {"GPT-2, dropout": 4, "BERT, dropout": 4}
    points = list(csv.DictReader((tmp_path / "training-curves.csv").read_text().splitlines()))
    assert len(points) == 20 * len(rows)
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_main_refuses_one_seed(capsys):
    with pytest.raises(SystemExit) as stopped:
        training.main(["--seeds", "1"])
    assert stopped.value.code == 2
    assert "from 2 to 10 seeds" in capsys.readouterr().err


def test_learned_factors_change_the_answer(capsys):
    assert learn_factors.main([]) == 0
    said = capsys.readouterr().out
    assert said.index("$30.20 ") < said.index("Tokens whose factors moved most")
    assert learn_factors.main(["--steps", "1"]) == 1  # one step is not enough


def test_ten_lines_of_the_readme():
    assert TEN_LINES in (training.RESULTS.parents[1] / "README.md").read_text()
    names: dict[str, Any] = {"atman": atman}
    exec(TEN_LINES, names)
    model, tokenizer, ids, n = (names[name] for name in ("model", "tokenizer", "ids", "n"))
    answer = ids[0, n:].tolist()
    for factor, wanted in ((torch.ones(1, n), False), (names["factor"].detach(), True)):
        with torch.no_grad(), atman.manipulate(model, factor, mode="min_shift"):
            said = model.generate(ids[:, :n], max_new_tokens=len(answer), do_sample=False)
        assert (said[0, n:].tolist() == answer) is wanted
    assert tokenizer.decode(answer) == " $24.20" and "$24.20 per day" in demo_prompt()
