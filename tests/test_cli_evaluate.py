"""``atman evaluate``: a table that is the same however often the run was ended."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import run  # noqa: F401 - fixture
from toy_models import llama
from toy_tokenizers import byte_level

from atman_triton.cli import evaluating
from atman_triton.evaluate.run import split

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("--methods", "direct,exact,random")
SMALL = ("contracts", "--limit", "8", "--stability", "2", "--gallery", "1", *METHODS)
CLOCKED = ("seconds", "device")


def table(folder, name="table.csv"):
    """Rows without what a clock or the number of processes says."""
    with (folder / name).open() as file:
        return [
            {key: value for key, value in row.items() if not key.startswith(CLOCKED)}
            for row in csv.DictReader(file)
        ]


def noted(folder):
    """Every result that was written, with those that were written twice."""
    lines = [
        json.loads(line)
        for path in (folder / "journal").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    results = [line["result"] for line in lines if "result" in line]
    return [(one["example"], one["method"]) for one in results]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They have tests of their own, and take seconds."""
    monkeypatch.setattr("atman_triton.evaluate.figures.draw_all", lambda *_, **__: [])
    monkeypatch.setattr("atman_triton.evaluate.figures.draw_sweep", lambda cells, path, title: path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_and_resumed_gives_the_same_table(run, tmp_path):  # noqa: F811
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [sys.executable, "-m", "atman_triton", "evaluate", *SMALL, "--processes", "2"]
    started = subprocess.Popen(
        [*words, "--out", str(killed)], cwd=ROOT, stderr=subprocess.PIPE, env=os.environ
    )
    while not (killed / "journal").is_dir() or not noted(killed):
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    # Its workers have the pipe too: it ends when they do, and they end with the one that asked.
    assert started.communicate()[1] is not None
    before = noted(killed)
    assert 3 <= len(before) < 24

    code, out, err = run("evaluate", *SMALL, "--processes", 2, "--out", killed)
    assert code == 0 and "direct" in out and "table.csv" in err
    code, _, err = run("evaluate", *SMALL, "--out", whole, "--quiet")
    assert (code, err) == (0, "")
    assert table(killed) == table(whole)
    after = noted(killed)
    assert after[: len(before)] == before or set(before) < set(after)
    assert len(set(after)) == len(after) == 24

    # Asked again, or for a method more, only what is missing is measured.
    assert run("evaluate", *SMALL, "--out", whole)[0] == 0
    assert len(noted(whole)) == 24
    more = ("--methods", "direct,rollout,random,exact")
    assert run("evaluate", *SMALL, *more, "--out", whole)[0] == 0
    assert noted(whole)[24:] == [(name, "rollout") for name, _ in noted(whole)[:24:3]]
    assert [row for row in table(whole) if row["method"] != "rollout"] == [
        row
        for method in ("direct", "random", "exact")
        for row in table(killed)
        if row["method"] == method
    ]
    rows = table(whole)
    assert len(rows) == 4 * 6 and rows[0]["examples"] == "7" and rows[0]["data"] == "contracts"
    text = (whole / "table.md").read_text()
    assert "| direct | " in text and "7 examples" in text
    assert table(whole, "statistics.csv")[0]["count"] == "8"

    # Another model's results are not taken for this one's.
    code, _, err = run("evaluate", *SMALL, "--out", whole, "--dtype", "bfloat16")
    assert code == 2 and "was measured with" in err and "dtype float32 (now bfloat16)" in err


def test_launched_processes_share_the_examples(run, tmp_path):  # noqa: F811
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no figures here')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launch = (*several, "--mixed_precision", "no", "--dynamo_backend", "no")
    module = ("-m", "atman_triton", "evaluate", "--device", "cpu")
    small = ("contracts", "--limit", "3", "--stability", "0", "--gallery", "0")
    words = (*small, "--methods", "direct,random")
    launcher = ("-m", "accelerate.commands.launch", *launch, "--main_process_port", port)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *launcher, *module, *words, "--out", str(tmp_path / "launched")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "direct" in done.stdout and "No figures: " in done.stderr
    own = {path.name: len(path.read_text().splitlines()) for path in tmp_path.rglob("*.jsonl")}
    assert own == {"0.jsonl": 5, "1.jsonl": 3}
    assert run("evaluate", *words, "--out", tmp_path / "alone")[0] == 0
    assert table(tmp_path / "launched") == table(tmp_path / "alone")


def test_one_of_several_processes_that_are_not_there_is_told_of(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    words = ("--limit", 2, "--methods", "random", "--stability", 0, "--out", tmp_path)
    code, _, err = run("evaluate", "contracts", *words)
    assert code == 0 and "accelerate launch --cpu starts one process" in err


def test_data_and_a_model_of_ones_own(run, tmp_path):  # noqa: F811
    tokenizer = byte_level()
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    context = "The pay is five and the term is two."
    asked = [
        {
            "id": word,
            "question": f"What is {word}?",
            "answers": [{"text": word, "answer_start": context.index(word)}],
        }
        for word in ("pay", "five", "term")
    ]
    paragraphs = [{"context": context, "qas": asked}]
    (tmp_path / "own.json").write_text(
        json.dumps({"version": "1.1", "data": [{"title": "Pay", "paragraphs": paragraphs}]})
    )
    own = ("--data", tmp_path / "own.json", "--model", tmp_path / "model", "--methods", "random")
    code, out, err = run("evaluate", "squad", *own, "--out", tmp_path / "out", "--device", "cpu")
    assert (code, "random" in out) == (0, True), err
    assert {row["examples"] for row in table(tmp_path / "out")} == {"2"}


def test_sweep(run, tmp_path):  # noqa: F811
    words = ("--limit", 3, "--sweep", "factor=0,0.3; similarity=none,0.6", "--out", tmp_path)
    code, out, err = run("evaluate", "contracts", "--stability", 0, *words)
    assert code == 0 and "sweep.csv" in err
    assert "removal gap" in out and "0.3" in out
    rows = table(tmp_path, "sweep.csv")
    grid = [(row["factor"], row["similarity"]) for row in rows]
    assert grid == [("0", "none"), ("0", "0.6"), ("0.3", "none"), ("0.3", "0.6")]
    assert {row["method"] for row in rows} == {"direct"} and rows[0]["examples"] == "2"
    assert all(0 <= float(row["mAP"]) <= 1 for row in rows)
    assert len({method for _, method in noted(tmp_path)}) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["contract"], "the data must be one of squad, openimages, contracts, shapes, got"),
        (["squad"], "no shipped model knows squad; name one with --model"),
        (["contracts", "--methods", "direkt"], "methods: 'direkt' is none of exact"),
        (["contracts", "--methods", "direct:factor=2"], "factor must lie in [0, 1)"),
        (["contracts", "--sweep", "factor"], "sweep must be like factor=0,0.1;"),
        (["contracts", "--sweep", "factor=0;factor=1"], "sweep: factor is given twice"),
        (["contracts", "--sweep", "factor=0,0"], "sweep: factor has a value twice"),
        (["contracts", "--sweep", "factor=2"], "sweep: 2: factor must lie in [0, 1)"),
        (["contracts", "--sweep", "steps=2"], "direct takes mode=, "),
        (
            ["contracts", "--sweep", "factor=0;similarity=none;mode=min_shift"],
            "sweep takes one or two options, got factor, similarity, mode",
        ),
        (["contracts", "--limit", "1"], "'--limit'"),
        (["contracts", "--dtype", "int8"], "--dtype must be one of"),
        (["contracts", "--device", "abacus"], "--device must be auto"),
        (["contracts", "--data", "x.json", "--limit", "2"], "--data is for data that is read"),
    ],
)
def test_bad_usage(run, tmp_path, words, said):  # noqa: F811
    code, out, err = run("evaluate", *words, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failing_method_is_a_failed_run(run, tmp_path, monkeypatch):  # noqa: F811
    def broken(*_):
        raise ArithmeticError("no slope")

    monkeypatch.setattr("atman_triton.baselines.ablation.random", broken)
    words = ("contracts", "--limit", 2, "--methods", "direct,random", "--out", tmp_path)
    code, out, err = run("evaluate", *words)
    assert (code, out) == (1, "")
    assert "atman: random failed on example 'contracts-0-0': ArithmeticError: no slope" in err


def test_help(run):  # noqa: F811
    code, out, _ = run("evaluate", "--help")
    assert code == 0
    for option in ("methods", "limit", "out", "data", "images", "sweep", "processes", "stability"):
        assert f"--{option}" in out
    # as many are reported as the tables of the README promise
    assert sum(split(index) == "report" for index in range(evaluating.LIMIT)) == 500
