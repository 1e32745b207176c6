"""``atman steer``: what it shows, how controls are written, and what it refuses."""

import json

import pytest
import torch
from test_cli import PROMPT, check, folder, reader, run  # noqa: F401 - fixtures

from atman_triton import TextControl, steer
from atman_triton.cli.controls import place_control, split_control
from atman_triton.demo import demo_prompt

AMPLIFIED = "Extra hours bring $33.80 each."


def continuation(reader, controls, **options):  # noqa: F811
    """What generate gives under controls, and the probabilities of the token behind the prompt."""
    model, tokenizer = reader
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with steer(model, controls, inputs=inputs, **options), torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        row = model(**inputs).logits[0, -1].softmax(-1)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]), row


def test_json_tells_what_generate_gives(run, reader, folder):  # noqa: F811
    words = ("steer", "-m", folder, "--prompt", PROMPT, "--max-new-tokens", 6, "--json")
    for option, settings in (
        ((), {}),
        (("--mode", "log_additive"), {"mode": "log_additive"}),
        (("--heads", "1", "--layers", "0-0"), {"heads": [1], "layers": [0]}),
    ):
        code, out, err = run(*words, "--control", "text:23 euros=9", "--top-k", 3, *option)
        assert (code, err) == (0, "")
        data = json.loads(out)
        start = PROMPT.index("23 euros")
        plain, before = continuation(reader, [])
        steered, after = continuation(reader, [TextControl(start, 8, 9.0, "complete")], **settings)
        assert (data["plain"], data["steered"]) == (plain, steered)
        assert data["next_tokens_behind"] == ""
        ids = {*before.topk(3).indices.tolist(), *after.topk(3).indices.tolist()}
        assert {token["id"] for token in data["next_tokens"]} == ids
        for token in data["next_tokens"]:
            assert token["plain"] == pytest.approx(before[token["id"]].item(), rel=1e-4)
            assert token["steered"] == pytest.approx(after[token["id"]].item(), rel=1e-4)
        assert {entry["factor"] for entry in data["factors"]} == {9.0}
        assert "".join(entry["text"] for entry in data["factors"]).strip() == "23 euros"
    assert plain != steered


def test_the_shipped_model_is_turned_to_another_fact(run):  # noqa: F811
    """Figure 4 of the paper: the first command amplifies a fact, the second suppresses one."""
    code, out, err = run("steer", "--control", f"text:{AMPLIFIED}=2", "--max-new-tokens", 12)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["Plain", "Steered"] in lines
    assert ["$30.20", "$33.80"] in lines
    assert out.startswith(f"Amplified, factor 2: '{AMPLIFIED}'")
    assert "Next token behind '$'" in out
    assert ["30", "1.000", "0.000", "-1.000"] in lines
    words = ("steer", "--control", "text:$30.20=0.1", "--json", "--file", "-")
    code, out, _ = run("steer", *words[1:4], "--prompt", "-", stdin=demo_prompt())
    assert code == 0
    data = json.loads(out)
    assert data["plain"].strip() == "$30.20"
    assert "30.20" not in data["steered"]


def test_a_control_that_changes_nothing_says_so(run, folder):  # noqa: F811
    words = ("steer", "-m", folder, "--prompt", PROMPT, "--max-new-tokens", 3)
    code, out, _ = run(*words, "--control", "token:0=1")
    assert code == 0
    assert "The continuation is the same." in out
    code, out, _ = run(*words, "--control", "text:23=0.5", "--similarity", 0.9)
    assert code == 0
    assert out.startswith("Suppressed, factor 0.5: '23', and what is 0.9 similar")


def test_samples_are_drawn_alike(run, folder):  # noqa: F811
    words = ("steer", "-m", folder, "--prompt", PROMPT, "--json", "--control", "token:3=1")
    hot = ("--temperature", 5, "--max-new-tokens", 8)
    first, again, other = (json.loads(run(*words, *hot, "--seed", seed)[1]) for seed in (0, 0, 1))
    assert first == again
    assert first["plain"] == first["steered"]
    assert first["plain"] != other["plain"]
    assert first["generation"]["do_sample"] is True


@pytest.mark.parametrize(
    ("given", "start", "length", "factor"),
    [
        ("text:pay#1=0.1", PROMPT.index("pay"), 3, 0.1),
        ("text:pay#2=2", PROMPT.rindex("pay"), 3, 2.0),
        ("text:23=0", PROMPT.index("23"), 2, 0.0),
        ("text:Q:[/bold]=1e1", PROMPT.index("Q:"), 9, 10.0),
    ],
)
def test_how_a_control_is_written(given, start, length, factor):
    control = place_control(PROMPT, split_control(given), "partial", 0.5)
    assert control == TextControl(start, length, factor, "partial", similarity=0.5)


def test_words_may_hold_signs_that_controls_use():
    text = "a=b and C#1, C#1 is new"
    for given, start, length in (
        ("text:a=b=2", 0, 3),
        ("text:C#1#2=2", text.rindex("C#1"), 3),
        ("text:and C=2", 4, 5),
    ):
        control = place_control(text, split_control(given), "complete")
        assert control == TextControl(start, length, 2.0, "complete")
    # Places may overlap.
    control = place_control("aaa", split_control("text:aa#2=2"), "complete")
    assert control == TextControl(1, 2, 2.0, "complete")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give at least one --control"),
        (["--control", "pay=0.1"], "--control must be text:WORDS=FACTOR, token:POSITION=FACTOR or"),
        (["--control", "text:pay"], "--control must be text:WORDS=FACTOR"),
        (["--control", "text:=0.1"], "--control must be text:WORDS=FACTOR"),
        (["--control", "image:0=0.1"], "the rectangle must be LEFT,TOP,WIDTH,HEIGHT in shares of"),
        (["--control", "sound:0=0.1"], "--control must be text:WORDS=FACTOR"),
        (["--control", "text:23=a"], "the factor behind the last = must be a number, got 'a'"),
        (["--control", "text:23=-1"], "the factor must be at least 0, got -1"),
        (["--control", "text:23=nan"], "the factor must be at least 0, got nan"),
        (["--control", "token:x=1"], "the position must be a number from 0, got 'x'"),
        (["--control", "token:0=1", "--mode", "min_shift_full"], "--mode must be one of multip"),
        (["--control", "token:0=1", "--overlap", "half"], "--overlap must be one of partial, com"),
        (["--control", "token:0=1", "--dtype", "int8"], "--dtype must be one of auto"),
        (["--control", "token:0=1", "--layers", "1-"], "--layers must be numbers and ranges such"),
        (["--control", "token:0=1", "--heads", "3-1"], "--heads must be numbers and ranges such"),
        (["--control", "token:0=1", "--seed", "1"], "--seed is for sampling; give --temperature"),
        (["--control", "token:0=1", "--temperature", "0"], "--temperature must be above 0, got 0"),
    ],
)
def test_bad_usage_before_the_model_is_loaded(run, words, message):  # noqa: F811
    check(run("steer", "--prompt", PROMPT, "-m", "no/model", *words), 2, message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control", "text:soccer=0.1"], "'soccer' does not occur in the prompt."),
        (["--control", "text:pay=0.1"], "'pay' occurs 2 times in the prompt; say which, such as"),
        (["--control", "text:pay#3=0.1"], "so the number must be from 1 to 2"),
        (["--control", "text:pay#0=0.1"], "so the number must be from 1 to 2"),
        (["--control", "token:999=1"], "stands outside the prompt; pos must be at most"),
        (["--control", "token:0=1", "--layers", "7"], "layers must be among 0..0"),
        (["--control", "token:0=1", "--similarity", "2"], "similarity must lie in (0, 1]"),
        (["--control", "token:0=1", "--max-new-tokens", "99"], "lower --max-new-tokens to"),
    ],
)
def test_bad_usage_that_the_prompt_or_the_model_shows(run, folder, words, message):  # noqa: F811
    check(run("steer", "--prompt", PROMPT, "-m", folder, *words), 2, message)
