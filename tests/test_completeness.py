"""What a gradient method's explanation holds besides, and how it is shown, saved and asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache

import pytest
import torch
from test_cli import PROMPT, folder, reader, run  # noqa: F401 - fixtures
from toy_explanations import as_version, explain, merge
from toy_models import llama
from toy_tokenizers import byte_level

from atman_triton import Explainer, load
from atman_triton.completeness import Completeness
from atman_triton.explanation import Explanation, from_json, to_json

EFFECTS = {"path": "path", "score_gradient": "gradient"}


def with_gradients(explanation: Explanation, method="path", rises=(3.0, 2.0), **provenance):
    """The same as a gradient method's, the loss of each target rising by so much together."""
    return dataclasses.replace(
        explanation,
        units=[dataclasses.replace(u, effect=EFFECTS[method]) for u in explanation.units],  # pyright: ignore[reportArgumentType]
        method=method,
        together_logprobs=explanation.base_logprobs - torch.tensor(rises),
        provenance=explanation.provenance | {"forwards": 43.21} | provenance,
    )


@cache
def found(method="path"):
    model = llama(max_position_embeddings=512)
    explainer = Explainer(model, byte_level(), method=method, progress=False)
    return explainer.explain("The pay is 23. Is it?", targets=["23 euros", "Y"])


def test_sums_rises_and_errors():
    e = with_gradients(explain())  # the words contribute 2, 1 and -0.5 to both target tokens
    complete = e.completeness
    assert complete is not None
    assert complete.sums.tolist() == [2.5, 4.5]  # " 34" of the answer supports the second token
    assert complete.rises.tolist() == [3.0, 2.0]
    assert complete.error == pytest.approx((0.5 + 2.5) / 5)
    assert complete.errors.tolist() == [pytest.approx(0.6)]
    assert str(complete) == (
        "the scores sum to 7 nats; with all units suppressed the loss rises by 5 (error 60%)"
    )
    assert explain().completeness is None


def test_every_target_has_an_error_of_its_own():
    e = found()
    complete = e.completeness
    assert complete is not None
    rows = torch.tensor([target.branch for target in e.targets])
    for k in range(2):
        own = rows == k
        off = (complete.sums - complete.rises)[own].abs().sum() / complete.rises[own].abs().sum()
        assert float(complete.errors[k]) == pytest.approx(float(off))
        branch = e.branch(k).completeness
        assert branch is not None
        assert branch.error == pytest.approx(float(off))
    torch.testing.assert_close(complete.sums, e.scores.double().nansum(1))


@pytest.mark.parametrize(
    ("sums", "rises", "error"), [([0.0], [0.0], 0.0), ([1.0], [0.0], math.inf), ([2.0], [1.0], 1.0)]
)
def test_nothing_to_sum_to(sums, rises, error):
    values = [torch.tensor(each, dtype=torch.float64) for each in (sums, rises)]
    complete = Completeness(*values, torch.zeros(1, dtype=torch.long), 1)
    assert complete.error == error and complete.errors.tolist() == [error]
    assert ("all of it" in str(complete)) == math.isinf(error)


@pytest.mark.parametrize("method", EFFECTS)
def test_what_the_result_says_of_itself(method):
    e = found(method)
    assert e.method == e.provenance["method"] == method
    assert e.effect == EFFECTS[method]
    assert {unit.effect for unit in e.units} == {EFFECTS[method]}
    assert e.provenance["steps"] == (8 if method == "path" else None)
    assert "all units together" in e.provenance["effect"]
    assert ("a poor one" in e.provenance["effect"]) == (method == "score_gradient")
    assert "2 layers are kept" in e.provenance["activations"]
    assert e.provenance["logits"] == "target positions"
    assert (e.provenance["exact_runs"], e.provenance["direct_runs"]) == (0, 0)
    assert e.provenance["runner_reasons"] == ["gradients are taken through the whole input"]


def test_other_methods_have_none_of_it():
    e = Explainer(llama(), progress=False).explain([3, 4, 5], [6])
    assert e.together_logprobs is None and e.completeness is None
    assert e.provenance["steps"] is None and e.provenance["activations"] is None


@pytest.mark.parametrize("method", EFFECTS)
def test_saved_and_loaded(tmp_path, method):
    found(method).save(tmp_path / "a.json")
    again = load(tmp_path / "a.json")
    assert again == found(method)
    assert torch.equal(again.together_logprobs, found(method).together_logprobs)
    assert again.completeness.error == found(method).completeness.error


def test_a_file_of_version_2_still_loads():
    data = as_version(to_json(explain()), 2)
    assert "together_logprobs" not in data
    assert from_json(data) == explain()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"together_logprobs": None}, "together_logprobs must be given where method is 'path'"),
        ({"together_logprobs": [1.0]}, r"together_logprobs must have shape \[2\], got \[1\]"),
        ({"together_logprobs": [None, 1.0]}, "together_logprobs must hold no NaN"),
        ({"together_logprobs": 3}, "together_logprobs must be a list, got 3"),
        ({"method": "exact"}, "units\\[0\\].effect must be 'total' where method is 'exact'"),
    ],
)
def test_damaged_files_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_json(to_json(with_gradients(explain())) | changes)


def test_only_gradient_methods_have_it():
    together = torch.zeros(2)
    with pytest.raises(ValueError, match="must be None where method is 'exact': it is for path"):
        dataclasses.replace(explain(), together_logprobs=together)
    with pytest.raises(TypeError, match=r"together_logprobs must be torch.float32, got torch.int"):
        dataclasses.replace(with_gradients(explain()), together_logprobs=together.int())


def test_shown_in_a_terminal_and_on_a_page(capsys, tmp_path):
    e = with_gradients(explain(), steps=8)
    e.show(width=200)
    text = capsys.readouterr().out
    complete = "Completeness: the scores sum to 7 nats; with all units suppressed the loss rises"
    assert complete in text
    assert "Scores: share in suppressing all units together" in text
    assert "method path · steps 8 · preset default" in text
    assert text.rstrip().endswith("cost of 43.2 forwards · 0.5 s")
    assert complete in e.to_html()
    several = merge([explain(), explain(answer=" 51")])
    several = with_gradients(several, rises=(3.0, 2.0, 1.0))
    assert "Completeness: the scores sum to" in several.to_html()
    estimate = with_gradients(explain(), "score_gradient")
    estimate.show(width=200)
    text = capsys.readouterr().out
    assert "first-order estimate" in text and "method score_gradient" in text
    explain().show()
    assert "Completeness" not in capsys.readouterr().out
    assert "Completeness" not in explain().to_html()


def test_drawn_below_the_figure(tmp_path):
    pytest.importorskip("matplotlib")
    figure = with_gradients(explain()).plot(tmp_path / "a.png")
    assert any("Completeness: the scores" in text.get_text() for text in figure.texts)


def test_beside_the_table():
    pytest.importorskip("pandas")
    frame = with_gradients(explain()).to_dataframe()
    assert frame.attrs["completeness_error"] == pytest.approx(0.6)
    assert set(frame["effect"]) == {"path"}
    assert explain().to_dataframe().attrs == {}


def test_from_the_command_line(run, folder, tmp_path):  # noqa: F811 - fixtures
    saved = tmp_path / "a.json"
    words = ("explain", PROMPT, "--model", folder, "--target", "23 euros", "--quiet")
    code, out, _ = run(*words, "--method", "path", "--steps", "4", "--save", saved)
    assert code == 0
    assert "Completeness: the scores sum to" in out and "steps 4" in out
    assert load(saved).provenance["steps"] == 4
    code, out, _ = run("view", saved, "--html", tmp_path / "a.html", "--quiet")
    assert code == 0 and "Completeness" in out
    assert "Completeness" in (tmp_path / "a.html").read_text()
    code, out, _ = run(*words, "--method", "score_gradient", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["method"] == "score_gradient"
    assert set(data["completeness"]) == {"score_sums", "loss_rises", "error"}
    assert len(data["completeness"]["loss_rises"]) == len(data["targets"])
    code, _, err = run(*words, "--method", "exact", "--steps", "4")
    assert code == 2 and "steps is for path, but method is 'exact'" in err
    code, _, err = run(*words, "--method", "path", "--steps", "0")
    assert code == 2 and "Invalid value for '--steps'" in err
