"""The command line: results, files, exit codes, and one line for every failure."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_explanations import explain
from toy_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from atman_triton import cli
from atman_triton._version import __version__
from atman_triton.cli import explaining
from atman_triton.explain import Explainer
from atman_triton.explanation import load
from atman_triton.integration import UnsupportedModelError

PROMPT = "The pay per hour is 23 euros. [bold]Q:[/bold] What is the pay? A:"


@pytest.fixture(scope="module")
def reader():
    """An untrained model with a real tokenizer."""
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def folder(reader, tmp_path_factory):
    path = tmp_path_factory.mktemp("reader")
    logging.disable_progress_bar()
    for part in reader:
        part.save_pretrained(path)
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run ``atman`` in this process: exit code, standard output, standard error."""

    def run(*words, stdin=os.devnull):
        stream = open(stdin) if stdin == os.devnull else io.StringIO(stdin)  # noqa: SIM115
        with stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stream)
            patch.setenv("COLUMNS", "100")
            code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.json"
    explain().save(path)
    return path


# What works.


def test_help_and_version():
    runner = CliRunner()
    for words in ([], ["--help"]):
        result = runner.invoke(cli.app, words)
        assert result.exit_code == 0
        assert "explain" in result.output
        assert "view" in result.output
        assert "steer" in result.output
    result = runner.invoke(cli.app, ["explain", "--help"], env={"COLUMNS": "120"})
    for option in (
        *("file", "model", "target", "preset", "factor", "mode", "device", "dtype", "batch-size"),
        *("max-new-tokens", "html", "plot", "save", "top-k", "json", "quiet", "no-progress"),
    ):
        assert f"--{option}" in result.output
    assert "min_shift_full" in result.output
    assert runner.invoke(cli.app, ["--version"]).output == f"atman {__version__}\n"


def test_similar_tokens_are_suppressed_along(run, folder, tmp_path):
    saved = tmp_path / "a.json"
    words = ("explain", PROMPT, "--model", folder, "--quiet", "--save", saved, "--target", "23")
    for options, expected in [
        ((), (None, None)),
        (("--similarity", 0.3), (0.3, "released")),
        (("--similarity", 0.3, "--rule", "paper"), (0.3, "paper")),
        (("--similarity", "preset", "--preset", "paper"), (0.7, "paper")),
        (("--preset", "released"), (0.6, "released")),
        (("--preset", "released", "--similarity", "off"), (None, None)),
    ]:
        assert run(*words, *options)[0] == 0
        known = load(saved).provenance
        assert (known["similarity"], known["rule"]) == expected
    code, _, error = run(*words, "--similarity", 2)
    assert code == 2
    assert "similarity must lie in (0, 1]" in error


def test_methods_and_several_targets(run, folder, tmp_path):
    saved = tmp_path / "a.json"
    words = ("explain", PROMPT, "--model", folder, "--quiet", "--save", saved)
    assert run(*words, "--target", "23", "--method", "direct")[0] == 0
    assert load(saved).method == "direct"
    assert "direct effect" in load(saved).provenance["effect"]
    for budget, runs in (("4", 4), ("0.5", None)):
        code, _, _ = run(*words, "--target", "23", "--method", "hybrid", "--budget", budget)
        assert code == 0
        found = load(saved).provenance["exact_runs"]
        assert found == (runs or len(load(saved).units) // 2)
    code, out, _ = run(*words, "--target", "23", "--target", "no idea", "--granularity", "sentence")
    assert code == 0
    assert load(saved).answers == [" 23", " no idea"]
    assert {unit.level for unit in load(saved).units} == {"sentence"}
    assert "23" in out and "no idea" in out
    code, out, _ = run("view", saved, "--answer", 1, "--json")
    assert code == 0
    assert json.loads(out)["text"] == PROMPT + " no idea"
    check(run("view", saved, "--answer", 2), 2, "--answer must be at most 1")
    result = run("view", saved, "--answer", 0, "--target-token", 0)
    check(result, 2, "--target-token and --answer exclude each other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "fast"],
            "--method must be one of exact, direct, hybrid, hierarchical, path, score_gradient,",
        ),
        (["--granularity", "page"], "--granularity must be one of token, word, sentence, paragr"),
        (["--budget", "half"], "--budget must be a share such as 0.2, or a number of runs, got"),
        (["--budget", "0.2"], "budget is for hybrid and hierarchical, but method is 'direct'"),
        (
            ["--method", "hybrid", "--budget", "2.5"],
            "budget as a share must lie in (0, 1], got 2.5",
        ),
        (
            ["--method", "hierarchical", "--granularity", "sentence"],
            "method='hierarchical' chooses the size of units itself",
        ),
        (
            ["--method", "direct", "--mode", "min_shift_full"],
            "method='direct' keeps the prompt's keys of the base run",
        ),
    ],
)
def test_methods_that_cannot_be_are_bad_usage(run, folder, words, message):
    result = run("explain", PROMPT, "--model", folder, "--target", "23", "--quiet", *words)
    check(result, 2, message)


def test_explain_prints_and_writes_everything(run, folder, tmp_path):
    html, plot, saved = tmp_path / "a.html", tmp_path / "a.png", tmp_path / "a.json"
    code, out, err = run(
        *("explain", PROMPT, "--model", folder, "--target", "23", "--top-k", 2),
        *("--html", html, "--plot", plot, "--save", saved),
    )
    assert code == 0
    assert out.startswith("Answer: 23 ")
    assert "[bold]" in out
    assert err.splitlines() == [f"Wrote {saved}", f"Wrote {html}", f"Wrote {plot}"]
    explanation = load(saved)
    assert explanation.prompt == PROMPT
    assert explanation.provenance["mode"] == "min_shift"
    assert html.read_text() == explanation.to_html()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_is_all_that_stands_on_standard_output(run, folder, tmp_path, monkeypatch):
    def chatty(self, *arguments, **options):
        print("a library says something")
        bars.append(self.progress)
        return original(self, *arguments, **options)

    bars, original = [], Explainer.explain
    monkeypatch.setattr(Explainer, "explain", chatty)
    code, out, err = run(
        *("explain", PROMPT, "--model", folder, "--json", "--top-k", 3, "--max-new-tokens", 2),
        *("--preset", "paper", "--factor", 0.5, "--batch-size", 3, "--device", "cpu"),
        *("--dtype", "float32", "--html", tmp_path / "a.html", "--quiet"),
    )
    assert code == 0
    assert err == "a library says something\n"
    assert bars == [False]
    run("explain", PROMPT, "--model", folder, "--json", "--target", "23")
    assert bars == [False, True]
    data = json.loads(out)
    assert len(data["targets"]) == 2
    assert len(data["ranking"]) == 3
    settings = data["provenance"]
    assert (settings["preset"], settings["mode"], settings["factor"]) == (
        *("paper", "multiplicative"),
        0.5,
    )
    assert max(settings["batch_sizes"]) == 3
    path = tmp_path / "from_json.json"
    path.write_text(out)
    explanation = load(path)
    best = explanation.ranking()[0]
    assert data["ranking"][0] == {
        "unit": best,
        "text": explanation.units[best].text,
        "value": explanation.relevance[best].item(),
    }


@pytest.mark.parametrize("way", ["file", "pipe", "dash"])
def test_the_prompt_comes_from_a_file_or_standard_input(run, folder, tmp_path, way):
    words = ["explain", "--model", folder, "--target", "23", "--json"]
    if way == "file":
        (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
        code, out, _ = run(*words, "--file", tmp_path / "prompt.txt")
    else:
        code, out, _ = run(*words, *["-"] * (way == "dash"), stdin=PROMPT + "\n")
    assert code == 0
    data = json.loads(out)
    assert data["text"][: data["prompt_stop"]] == PROMPT


def test_without_a_prompt_the_shipped_contract_is_explained(run, reader, monkeypatch):
    from atman_triton import demo

    monkeypatch.setattr(demo, "load_demo_model", lambda: reader)
    monkeypatch.setattr(demo, "demo_prompt", lambda: PROMPT)
    code, out, _ = run("explain", "--target", "23", "--dtype", "float32")
    assert code == 0
    assert out.startswith("Answer: 23 ")


def test_view_shows_what_was_saved(run, saved, tmp_path):
    code, out, err = run("view", saved, "--target-token", 1, "--top-k", 1)
    assert (code, err) == (0, "")
    assert "Target token 1: dollars" in out
    code, out, err = run(
        "view", saved, "--html", tmp_path / "a.html", "--plot", tmp_path / "a.svg", "--json"
    )
    assert code == 0
    assert json.loads(out)["format"] == "atman_explanation"
    assert (tmp_path / "a.html").read_text() == explain().to_html()
    assert "Wrote" in err


def test_view_lays_several_explanations_over_each_other(run, saved, tmp_path):
    other = tmp_path / "other.json"
    explain(answer=" 51").save(other)
    code, out, _ = run("view", saved, other, "--html", tmp_path / "a.html", "--quiet")
    assert code == 0
    assert out.count("Answer: ") == 2
    assert (tmp_path / "a.html").read_text() == explain().to_html(others=[explain(answer=" 51")])


# What fails: the exit code and one line that says what to do.


def check(result, code, message):
    assert result[0] == code
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert result[2].startswith("atman: ")
    assert message in result[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", ""], "the prompt is empty: give a text to explain."),
        (["explain", " \n"], "the prompt is empty"),
        (["explain", "x", "--preset", "best"], "--preset must be one of default, paper, released"),
        (["explain", "x", "--mode", "add"], "--mode must be one of multiplicative, min_shift"),
        (["explain", "x", "--rule", "own"], "--rule must be one of released, paper, got 'own'"),
        (["explain", "x", "--similarity", "high"], "--similarity must be a number in (0, 1], pre"),
        (["explain", "x", "--dtype", "int8"], "--dtype must be one of auto, float32"),
        (["explain", "x", "--batch-size", "0"], "--batch-size must be auto or a number"),
        (["explain", "x", "--device", "tpu9"], "--device must be auto, cpu, cuda, cuda:1 or mps"),
        (["explain", "x", "--device", "meta"], "--device must be auto, cpu, cuda, cuda:1 or mps"),
        (["explain", "x", "--device", "xpu"], "--device must be auto, cpu, cuda, cuda:1 or mps"),
        (["explain", "x", "--device", "mps:3"], "--device"),
        (["explain", "x", "--device", "cuda:99"], "try --device cpu."),
        (["explain", "x", "--top-k", "0"], "--top-k"),
        (["explain", "x", "--target", "y", "--max-new-tokens", "3"], "--target gives one."),
        (["explain", "x", "--factor", "high"], "--factor"),
        (["explain", "x", "--file", "y"], "as an argument or with --file, not both."),
        (["explain", "--file", "no/such/file"], "--file: no/such/file does not exist."),
        (
            ["explain", "x", "--model", "./no_model"],
            "--model: the folder ./no_model does not exist.",
        ),
        (["explain", "--model", "some/model"], "no prompt: give it as an argument, with --file"),
        (["explain", "x", "--html", "no/such/a.html"], "--html: no/such/a.html lies in a folder"),
        (["explain", "x", "--save", "."], "--save: . is a folder."),
        (
            ["explain", "x", "--save", "f", "--html", "./f"],
            "--save and --html name the same file, f.",
        ),
        (
            ["explain", "x", "--html", "f.svg", "--plot", "f.svg"],
            "--html and --plot name the same file, f.svg.",
        ),
        (["view", "f", "--html", "./f"], "--html: f is a file to view."),
        (["explain", "x", "--plot", "a.xyz"], "--plot: a.xyz must end in .png, .svg, .pdf."),
        (["explain", "--colour"], "No such option: --colour"),
        (["view"], "(see 'atman --help')"),
        (["view", "no.json"], "no.json does not exist."),
        (["view", "."], ". is a folder."),
        (["paint"], "No such command 'paint'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(run, words, message):
    check(run(*words), 2, message)


def test_bad_usage_that_the_explainer_finds(run, folder):
    words = ["explain", "--model", folder]
    check(run(*words, "x", "--factor", 2), 2, "factor must lie in [0, 1), got 2.0")
    check(run(*words, "x", "--target", ""), 2, "empty")
    check(run(*words, "word " * 100, "--target", "y"), 2, "context window of 64 tokens")


def only_the_first_token(logits):
    logits[..., 1:] = -torch.inf
    return logits


def break_logits(reader, change):
    """A hook on the model's last layer, which sees all logits."""
    return reader[0].lm_head.register_forward_hook(lambda *call: change(call[2].clone()))


def test_errors_of_the_run_itself_are_no_bad_usage(run, reader, folder, monkeypatch):
    words = ["explain", PROMPT, "--model", folder, "--quiet"]
    monkeypatch.setattr(explaining, "load_model", lambda *_: reader)
    with break_logits(reader, lambda logits: logits.fill_(torch.nan)):
        check(run(*words, "--target", "23"), 1, "the model returns NaN in torch.float32")
    with break_logits(reader, only_the_first_token):
        check(run(*words, "--target", "23"), 1, "gives target token 0 probability 0")
    monkeypatch.setattr(reader[0].generation_config, "eos_token_id", list(range(300)))
    check(run(*words), 1, "atman: the model's completion is empty: it ended at once")


@pytest.mark.parametrize("error", [TypeError, ValueError, UnsupportedModelError])
def test_what_the_model_raises_is_no_bad_usage(run, reader, folder, monkeypatch, error):
    def fail(*_, **__):
        raise error("this model is no good")

    monkeypatch.setattr(explaining, "load_model", lambda *_: reader)
    monkeypatch.setattr(reader[0].model, "forward", fail)
    for words in (["--target", "23"], []):
        result = run("explain", PROMPT, "--model", folder, "--quiet", *words)
        check(result, 1, "this model is no good")


def test_an_empty_pipe_is_an_empty_prompt(run):
    check(run("explain", stdin="\n"), 2, "the prompt is empty")


def test_view_refuses_what_it_cannot_show(run, saved, tmp_path):
    check(run("view", saved, "--target-token", 2), 2, "--target-token must be at most 1")
    check(run("view", saved, saved, "--json"), 2, "give one file.")
    broken = tmp_path / "broken.json"
    broken.write_text(saved.read_text()[:99])
    check(run("view", broken), 2, "it may be cut short.")
    stranger = tmp_path / "stranger.json"
    explain("quite another text").save(stranger)
    result = run("view", saved, stranger, "--html", tmp_path / "a.html")
    check(result, 2, "others must explain the same text")


def test_a_folder_without_a_model_is_a_failed_run(run, tmp_path):
    check(run("explain", "x", "--model", tmp_path), 1, "cannot be loaded: ")


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("tokenizer", "has no tokenizer files")],
)
def test_what_a_model_folder_lacks_is_named(run, folder, tmp_path, missing, message):
    for file in Path(folder).iterdir():
        if not file.name.startswith(missing):
            shutil.copy(file, tmp_path)
    check(run("explain", "x", "--model", tmp_path), 1, f"loaded: {tmp_path} {message}.")


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path):
    code = (
        "import sys; from atman_triton.cli import main; "
        "sys.exit(main(['explain', 'x', '--model', 'some/model']))"
    )
    places = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        | places,
    )
    check(
        (done.returncode, done.stdout, done.stderr),
        1,
        "--model some/model cannot be loaded: http://127.0.0.1:9 cannot "
        "be reached and the model is not in the cache.",
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("first\n\n   second"), "atman: RuntimeError: first second\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (OSError("disk full"), "atman: disk full\n"),
        (RuntimeError("x" * 9999), "xxx…\n"),
    ],
    ids=["lines", "memory", "disk", "long"],
)
def test_a_run_that_fails(run, folder, monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Explainer, "explain", fail)
    words = ["explain", "x", "--model", folder, "--target", "y"]
    check(run(*words), 1, message)
    code, _, err = run(*words, "--debug")
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert message.strip("…\n") in err.splitlines()[-1]


def test_ctrl_c_is_told_apart(run, folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Explainer, "explain", interrupt)
    check(run("explain", "x", "--model", folder), 130, "interrupted")


def test_starting_up_leaves_optional_libraries_alone_and_a_reader_that_leaves_is_no_drama():
    """Of both nothing is said on standard error; one process, which takes seconds to start."""
    code = (
        "import contextlib, io, sys; from atman_triton.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out: assert main(['--help']) == 0\n"
        "assert 'explain' in out.getvalue()\n"
        "assert not {'matplotlib', 'pandas'} & set(sys.modules)\n"
        # So little output that it is written only at the end.
        "sys.exit(main(['--version']))"
    )
    command = [sys.executable, "-c", code]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=buffered) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1
