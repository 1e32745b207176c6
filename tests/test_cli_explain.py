"""``atman explain``: each option reaches the argument of the same name."""

import json

import pytest
import torch
from test_cli import PROMPT, check, folder, reader, run  # noqa: F401 - fixtures

from atman_triton import TextControl, TokenControl
from atman_triton.explain import Explainer
from atman_triton.explanation import load


@pytest.fixture
def explained(run, folder, reader, tmp_path):  # noqa: F811
    """Run ``atman explain`` and compare with what the arguments give in Python."""

    def explained(*words, **arguments):
        saved = tmp_path / "a.json"
        code, _, err = run(
            *("explain", PROMPT, "-m", folder, "--target", "23", "--quiet", "--save", saved), *words
        )
        assert (code, err) == (0, "")
        found = load(saved)
        expected = Explainer(*reader, progress=False).explain(PROMPT, "23", **arguments)
        assert [unit.tokens for unit in found.units] == [unit.tokens for unit in expected.units]
        torch.testing.assert_close(
            found.relevance, expected.relevance, rtol=1e-3, atol=1e-5, equal_nan=True
        )
        plain = Explainer(*reader, progress=False).explain(PROMPT, "23").relevance
        assert not torch.equal(plain, found.relevance[: len(plain)])
        return found

    return explained


def test_what_is_done_to_scores(explained):
    found = explained("--postprocessing", "absolute", postprocessing="absolute")
    assert found.postprocessing == "absolute"
    assert explained("--normalize", normalize=True).normalize is True
    found = explained("--contrast-target", "no idea", contrast_target="no idea")
    assert found.answers == [" 23", " no idea"]


def test_controls_act_on_the_explained_model(explained):
    words = ("--control", "text:23 euros=4", "--control", "token:0=0.5")
    start = PROMPT.index("23 euros")
    controls = [TextControl(start, 8, 4.0, "complete"), TokenControl(0, 0.5)]
    found = explained(*words, controls=controls)
    assert [each["kind"] for each in found.provenance["controls"]] == [
        "TextControl",
        "TokenControl",
    ]
    controls = [TextControl(start, 8, 4.0)]
    explained(*words[:2], "--overlap", "partial", controls=controls)


def test_generated_under_controls(run, folder):  # noqa: F811
    words = ("explain", PROMPT, "-m", folder, "--json", "--max-new-tokens", 3)
    plain, steered = (
        json.loads(run(*words, *more)[1]) for more in ((), ("--control", "text:23 euros=9"))
    )
    assert plain["text"] != steered["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--postprocessing", "root"], "--postprocessing must be one of none, absolute, square"),
        (["--overlap", "some"], "--overlap must be one of partial, complete"),
        (["--control", "pay"], "--control must be text:WORDS=FACTOR or token:POSITION=FACTOR"),
        (["--control", "text:pay=2"], "'pay' occurs 2 times in the prompt; say which, such as"),
        (["--control", "token:999=2"], "stands outside the prompt"),
        (
            ["--target", "a", "--target", "b", "--contrast-target", "c"],
            "--contrast-target is beside one answer; give one --target, or none.",
        ),
    ],
)
def test_bad_usage(run, folder, words, message):  # noqa: F811
    check(run("explain", PROMPT, "-m", folder, "--quiet", *words), 2, message)
