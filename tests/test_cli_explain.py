"""``atman explain``: each option reaches the argument of the same name."""

import json

import pytest
import torch
from test_cli import PROMPT, check, folder, reader, run  # noqa: F401 - fixtures

from atman_triton import TextControl, TokenControl
from atman_triton.explain import Explainer
from atman_triton.explanation import load
from atman_triton.granularity import Delimiter

TARGET = "23 euros per hour."


@pytest.fixture
def explained(run, folder, reader, tmp_path):  # noqa: F811
    """Run ``atman explain`` and compare with what the arguments give in Python."""

    def explained(*words, **arguments):
        saved = tmp_path / "a.json"
        given = ("explain", PROMPT, "-m", folder, "--target", TARGET, "--quiet", "--save", saved)
        code, _, err = run(*given, *words)
        assert (code, err) == (0, "")
        found = load(saved)
        explainer = Explainer(*reader, progress=False)
        expected, plain = (explainer.explain(PROMPT, TARGET, **each) for each in (arguments, {}))
        for name in ("units", "targets", "parts"):
            assert getattr(found, name) == getattr(expected, name)
        torch.testing.assert_close(
            found.relevance, expected.relevance, rtol=1e-3, atol=1e-5, equal_nan=True
        )
        same = torch.equal(plain.relevance, found.relevance[: len(plain.relevance)])
        assert not same or plain.parts != found.parts
        return found

    return explained


def test_what_is_done_to_scores(explained):
    found = explained("--postprocessing", "absolute", postprocessing="absolute")
    assert found.postprocessing == "absolute"
    assert explained("--normalize", normalize=True).normalize is True
    found = explained("--contrast-target", "no idea", contrast_target="no idea")
    assert found.answers == [" " + TARGET, " no idea"]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["--granularity", "word"], {"granularity": "word"}),
        (
            ["--granularity", "auto", "--max-units", "6"],
            {"granularity": "auto", "max_units": 6},
        ),
        (["--delimiter", ".", "--delimiter", "?"], {"granularity": Delimiter(".", "?")}),
        (["--delimiter-regex", "[.?]"], {"granularity": Delimiter("[.?]", regex=True)}),
        (["--explain-only", "23 euros"], {"explain_only": "23 euros"}),
        (
            ["--explain-only", "0:7", "--explain-only", "23"],
            {"explain_only": [(0, 7), "23"]},
        ),
        (["--target-granularity", "word"], {"target_granularity": "word"}),
        (["--target-span", "per hour"], {"target_span": "per hour"}),
        (["--target-span", "3:8"], {"target_span": (3, 8)}),
    ],
)
def test_units_and_passages(explained, words, arguments):
    explained(*words, **arguments)


def rounded(value):
    """Numbers that are the same but for the order of a sum."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def test_documents_are_files(run, folder, reader, tmp_path):  # noqa: F811
    texts = {"pay.txt": "The pay is 23 euros.", "notice.txt": "Four weeks."}
    files = []
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n")
        files += ["--document", tmp_path / name]
    given = [{"id": name, "text": text} for name, text in texts.items()]
    for question, prompt in (
        ("Q: What? A:", "{documents}\n\nQ: What? A:"),
        ("Read {documents} Q: What? A:", "Read {documents} Q: What? A:"),
    ):
        words = ("explain", question, "-m", folder, "--target", "23", "--json", *files)
        code, out, _ = run(*words, "--granularity", "sentence", "--control", "text:Four=3")
        assert code == 0
        data = json.loads(out)
        whole = prompt.replace("{documents}", "\n\n".join(texts.values()))
        assert data["text"] == whole + " 23"
        expected = Explainer(*reader, progress=False).explain(
            prompt,
            "23",
            "sentence",
            documents=given,
            controls=[TextControl(whole.index("Four"), 4, 3.0, "complete")],
        )
        assert expected.sources() == rounded(data["sources"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pay.txt").write_text("The pay is 51 euros.")
    _, out, _ = run(*words, "--document", tmp_path / "other" / "pay.txt")
    found = [document["id"] for document in json.loads(out)["documents"]]
    assert found == [str(tmp_path / "pay.txt"), "notice.txt", str(tmp_path / "other" / "pay.txt")]


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
        (["--granularity", "turn"], "--granularity must be one of token, word, sentence, parag"),
        (
            ["--granularity", "word", "--delimiter", "."],
            "--granularity and --delimiter exclude each other; give one of them.",
        ),
        (["--delimiter-regex", "("], "regular expression"),
        (["--max-units", "5"], "max_units is for granularity='auto'"),
        (["--target-granularity", "line"], "--target-granularity must be one of complete, token"),
        (["--explain-only", "soccer"], "soccer"),
        (["--explain-only", "5:2"], "5"),
        (["--document", "no/such"], "--document: no/such does not exist."),
        (["--target", "a", "--target", "b", "--target-span", "a"], "--target-span is of one ans"),
        (["--target", "23", "--target-span", "24"], "24"),
        (["--postprocessing", "root"], "--postprocessing must be one of none, absolute, square"),
        (["--overlap", "some"], "--overlap must be one of partial, complete"),
        (["--control", "pay"], "--control must be text:WORDS=FACTOR, token:POSITION=FACTOR or"),
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
