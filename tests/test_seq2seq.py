"""Explaining encoder-decoders: what they read, what they answer, what supports it.

Legend: P prompt tokens, U units, M scored tokens.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seq2seq_models
import torch
from seq2seq_models import plain_logprobs
from test_seq2seq_engine import close

import atman_triton
from atman_triton import Explainer, Seconds, TextControl

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import small_models  # pyright: ignore[reportMissingImports]

TEXT = "translate English to German: The house is wonderful."
MAKERS = {
    "t5": small_models.t5,
    "bart": small_models.bart,
    "whisper": small_models.whisper,
}


@cache
def made(name):
    model, processor = MAKERS[name]()
    return model.double(), processor


@cache
def sound(seconds=0.55):
    count = int(seconds * 16000)
    return np.sin(np.linspace(0, 700, count)) * np.linspace(0.1, 1, count)


def prompt_of(name):
    return {
        "t5": TEXT,
        "bart": TEXT,
        "whisper": sound(),
    }[name]


def explainer(name, **changes):
    return Explainer(*made(name), **{"progress": False, "method": "exact"} | changes)


def read(name, prompt=None):
    return explainer(name).task.read(prompt_of(name) if prompt is None else prompt)


def row_of(name, prompt, unit, target):
    """A unit's factor in every source."""
    start = prompt.inputs["decoder_input_ids"].shape[1]
    source = "audio" if name == "whisper" else "text"
    sizes = [len(prompt.words) - start]
    row = torch.ones(len(prompt.words) + len(target) - 1)
    row[list(unit.tokens)] = 0.1
    sizes.append(len(row) - sum(sizes))
    return dict(zip([source, "decoder"], row.split(sizes), strict=True))


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [None, "encoder", "cross"])
@pytest.mark.parametrize("name", MAKERS)
def test_an_explanation_is_that_of_a_plain_loop(name, attention):
    model, _ = made(name)
    e = explainer(name, attention=attention).explain(prompt_of(name), "a picture of two cats")
    prompt = read(name)
    start = prompt.inputs["decoder_input_ids"][0].tolist()
    target = [each.token_id for each in e.targets]
    plain = {"attention": attention or "both"}
    inputs = {key: value for key, value in prompt.inputs.items() if key != "decoder_input_ids"}
    base = plain_logprobs(model, inputs, start, target, {})
    close(e.base_logprobs, base)
    assert len(e.units) > 4
    for column, unit in enumerate(e.units):
        rows = row_of(name, prompt, unit, target)
        logprobs = plain_logprobs(model, inputs, start, target, rows, **plain)
        reached = ~e.suppressed_logprobs[:, column].isnan()
        first = len(prompt.words) if unit.part == "prompt" else unit.tokens[-1] + 1
        assert reached.tolist() == [target.token >= first for target in e.targets]
        close(e.suppressed_logprobs[reached, column], logprobs[reached])


# --- reading ------------------------------------------------------------------------------------


def test_a_text_is_read_whole_and_the_answer_as_it_was_learnt():
    e = explainer("bart").explain("The tower is 324 metres tall.", "Das Haus")
    _, tokenizer = made("bart")
    ids = tokenizer("The tower is 324 metres tall.").input_ids
    prompt = read("bart", "The tower is 324 metres tall.")
    assert prompt.words.ids == [*ids, 2, 0]  # the labels' first token is read, not scored
    assert prompt.inputs["input_ids"].tolist() == [ids]
    assert prompt.inputs["decoder_input_ids"].tolist() == [[2, 0]]
    assert [target.token_id for target in e.targets] == tokenizer(text_target="Das Haus").input_ids[
        1:-1
    ]
    assert e.text == "The tower is 324 metres tall. Das Haus"
    assert e.provenance["separator"] == " "
    assert [(e.text[t.start : t.stop]) for t in e.targets] == [t.text for t in e.targets]
    assert e.targets[0].text == "Das"
    assert "".join(unit.text for unit in e.units if unit.part == "prompt") == e.prompt
    assert [(piece.text, piece.reason) for piece in e.left_out] == [
        ("<s>", "special token"),
        ("</s>", "special token"),
        ("</s><s>", "read by the decoder before the answer"),
    ]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_ids_and_encodings_are_read_as_the_text_is(name):
    model, tokenizer = made(name)
    text = explainer(name).explain(TEXT, "Das Haus")
    encoding = tokenizer(TEXT, return_tensors="pt")
    target = [target.token_id for target in text.targets]
    for prompt in (encoding, encoding["input_ids"][0], encoding["input_ids"][0].tolist()):
        found = explainer(name).explain(prompt, target)
        assert torch.equal(found.base_logprobs, text.base_logprobs)
        torch.testing.assert_close(found.scores, text.scores, rtol=0, atol=1e-6, equal_nan=True)
    alone = Explainer(model, method="exact", progress=False).explain(
        encoding["input_ids"][0].tolist(), target
    )
    assert alone.units[1].text == str(encoding["input_ids"][0][1].item())


def test_spans_and_documents_work_as_for_decoders():
    e = explainer("t5").explain(TEXT, "Das Haus ist wunderbar.", target_span="wunderbar")
    assert {target.text.strip(" .") for target in e.targets} <= {"w", "under", "bar", "wunderbar"}
    assert any(unit.part == "target" and unit.text == "Das" for unit in e.units)
    whole = explainer("t5").explain(TEXT, "Das Haus ist wunderbar.")
    rows = [
        row
        for row, target in enumerate(whole.targets)
        if target.token in {t.token for t in e.targets}
    ]
    torch.testing.assert_close(e.base_logprobs, whole.base_logprobs[rows])
    sources = explainer("t5").explain(
        "{documents} Which is wonderful?", "house", documents=["The house.", "The tower."]
    )
    assert {unit.document for unit in sources.units if unit.part == "prompt"} == {0, 1}
    words = explainer("t5").explain(TEXT, "Haus", granularity="word")
    assert [unit.text for unit in words.units][:2] == ["translate", " English"]


def test_several_answers_are_those_of_calls_of_their_own():
    several = explainer("t5").explain(TEXT, targets=["Das Haus", "two cats", "Das"])
    for k, target in enumerate(["Das Haus", "two cats", "Das"]):
        alone = explainer("t5").explain(TEXT, target)
        own = several.branch(k)
        torch.testing.assert_close(own.scores, alone.scores, rtol=0, atol=1e-6, equal_nan=True)
        assert own.text == alone.text
    contrast = explainer("t5").explain(TEXT, "Das Haus", contrast_target="two cats")
    assert contrast.contrast


def test_what_a_unit_is_like_is_named():
    e = explainer("t5", similarity=0.99).explain("house is house", "is house is")
    first = next(unit for unit in e.units if unit.text == " house")
    (again,) = first.neighbours  # the answer's, not the one without a space
    assert (again.branch, e.text[again.start : again.stop], again.similarity) == (0, " house", 1.0)
    assert e.provenance["mean_neighbours"] > 0


# --- answers of the model's own -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_without_a_target_the_model_s_own_answer_is_explained(name):
    model, _ = made(name)
    e = explainer(name).explain(prompt_of(name), max_new_tokens=4)
    inputs = read(name).inputs
    own = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=1)[0].tolist()
    start = inputs["decoder_input_ids"][0].tolist()
    assert own[: len(start)] == start
    written = [target.token_id for target in e.targets]
    assert own[len(start) :][: len(written)] == written
    assert e.provenance["target"] == "generated"


def test_the_closing_token_of_an_answer_is_left_out():
    e = explainer("t5").explain(TEXT, max_new_tokens=4, forced_eos_token_id=1)
    assert len(e.targets) == 3
    assert e.left_out[-1].text == "</s>"
    assert e.left_out[-1].reason == "end of text, generated and not explained"
    with pytest.raises(ValueError, match="completion is empty"):
        explainer("t5").explain(TEXT, max_new_tokens=1, forced_eos_token_id=1)


# --- controls and raw scores --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "direct"])
def test_an_explanation_under_controls_is_of_the_controlled_model(method):
    model, tokenizer = made("t5")
    at = TEXT.index("house")
    explained = explainer("t5", method=method)
    e = explained.explain(TEXT, "Das Haus", controls=[TextControl(at, 5, 0.3, "complete")])
    target = [each.token_id for each in e.targets]
    inputs = {"input_ids": tokenizer(TEXT, return_tensors="pt").input_ids}
    controlled = torch.ones(inputs["input_ids"].shape[1])
    held = next(unit for unit in e.units if "house" in unit.text)
    controlled[list(held.tokens)] = 0.3
    base = plain_logprobs(model, inputs, [0], target, {"text": controlled})
    close(e.base_logprobs, base)
    if method == "exact":
        for column, unit in enumerate(e.units[:4]):
            row = controlled.clone()
            row[list(unit.tokens)] *= 0.1
            plain = plain_logprobs(model, inputs, [0], target, {"text": row})
            close(e.suppressed_logprobs[:, column], plain)


@pytest.mark.parametrize("attention", ["both", "encoder", "cross"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_share_of_negative_scores_is_counted_everywhere(name, attention, monkeypatch):
    e = explainer(name, mode="multiplicative", attention=attention).explain(prompt_of(name), " a")
    counts = {"negative": 0, "seen": 0}

    def count(module, scores, mask):
        source, kind, _ = seq2seq_models._plan["places"][id(module)]
        if attention in ("both", kind) or source == "decoder":
            seen = torch.ones_like(scores, dtype=torch.bool)
            seen = seen if mask is None else seen & (mask > -1e30)
            counts["negative"] += int(((scores < 0) & seen).sum())
            counts["seen"] += int(seen.sum())
        return scores

    monkeypatch.setattr(seq2seq_models, "_manipulated", count)
    inputs = read(name).inputs
    start = inputs.pop("decoder_input_ids")[0].tolist()
    target = [each.token_id for each in e.targets]
    plain_logprobs(made(name)[0], inputs, start, target, {})
    share = counts["negative"] / counts["seen"]
    assert e.provenance["negative_scores"] == pytest.approx(share, abs=1e-12)


# --- sounds -------------------------------------------------------------------------------------


def test_a_sound_is_heard_in_frames_of_two_hundredths_of_a_second():
    e = explainer("whisper", method="direct").explain(sound(0.55), " Mr. Quilter")
    frames = [unit for unit in e.units if unit.part == "prompt"]
    assert len(frames) == 28
    assert all(unit.level == "frame" for unit in frames)
    assert [unit.tokens for unit in frames] == [(frame,) for frame in range(28)]
    assert frames[3].seconds == pytest.approx((0.06, 0.08))
    assert frames[3].text == "0.06–0.08 s"
    assert frames[-1].seconds == pytest.approx((0.54, 0.55))
    assert e.sound.seconds == pytest.approx(0.55)
    assert max(e.sound.envelope) == 1
    assert e.sound.envelope[0] < 0.3 < e.sound.envelope[-2]
    reasons = [(piece.text, piece.reason, len(piece.tokens)) for piece in e.left_out]
    assert reasons == [
        ("0.56–1.00 s", "silence that pads the sound", 22),
        (
            "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>",
            "read by the decoder before the answer",
            4,
        ),
    ]
    assert e.text == " Mr. Quilter"
    assert e.provenance["attention"] == "cross-attention"


def test_seconds_group_frames():
    e = explainer("whisper").explain(sound(0.55), " Mr. Quilter", granularity=Seconds(0.2))
    parts = [unit for unit in e.units if unit.part == "prompt"]
    assert [unit.seconds for unit in parts] == [
        pytest.approx(span) for span in ((0, 0.2), (0.2, 0.4), (0.4, 0.55))
    ]
    assert [len(unit.tokens) for unit in parts] == [10, 10, 8]
    same = explainer("whisper").explain(sound(0.55), " Mr. Quilter", granularity="0.2s")
    torch.testing.assert_close(same.scores, e.scores, equal_nan=True)


def test_a_long_sound_is_divided_into_about_as_many_stretches_as_wanted():
    e = explainer("whisper").explain(sound(0.55), " Mr. Quilter", granularity="auto", max_units=10)
    parts = [unit for unit in e.units if unit.part == "prompt"]
    assert [len(unit.tokens) for unit in parts] == [3] * 9 + [1]
    assert e.provenance["level"] == "Seconds(length=0.06)"
    short = explainer("whisper").explain(sound(0.15), " Mr.", granularity="auto", max_units=10)
    assert [unit.level for unit in short.units if unit.part == "prompt"] == ["frame"] * 8


def test_stretches_that_promise_most_are_opened_up_to_frames():
    e = explainer("whisper", method="hierarchical", budget=40).explain(sound(0.9), " Mr. Quilter")
    parts = [unit for unit in e.units if unit.part == "prompt"]
    assert {unit.level for unit in parts} == {"seconds", "frame"}
    assert sorted(place for unit in parts for place in unit.tokens) == list(range(45))
    assert [unit.seconds for unit in e.coarse.units if unit.seconds is not None] == [
        pytest.approx((0, 0.5)),
        pytest.approx((0.5, 0.9)),
    ]


def test_what_the_model_hears_is_what_its_processor_makes():
    _, processor = made("whisper")
    prompt = read("whisper")
    features = processor.feature_extractor(sound(), sampling_rate=16000, return_tensors="pt")
    assert torch.equal(prompt.inputs["input_features"], features["input_features"].double())
    assert prompt.inputs["decoder_input_ids"].tolist() == [[1, 2, 3, 4]]
    again = read("whisper", {"array": sound(), "sampling_rate": 16000})
    assert torch.equal(again.inputs["input_features"], prompt.inputs["input_features"])


def test_the_transcript_is_the_model_s_own():
    model, _ = made("whisper")
    e = explainer("whisper").explain(sound(), max_new_tokens=5)
    ids = torch.tensor([[1, 2, 3, 4]])
    for _ in range(5):
        with torch.no_grad():
            features = read("whisper").inputs["input_features"]
            logits = model(input_features=features, decoder_input_ids=ids).logits
        logits[..., model.generation_config.suppress_tokens] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    written = ids[0, 4:].tolist()
    assert [target.token_id for target in e.targets] == written[: len(e.targets)]


def test_the_language_is_asked_of_the_model_where_nobody_names_it(monkeypatch):
    model, processor = made("whisper")
    config, tokenizer = model.generation_config, processor.tokenizer
    monkeypatch.setattr(config, "lang_to_id", {"<|en|>": 2, "<|de|>": 9}, raising=False)
    monkeypatch.setattr(config, "task_to_id", {"transcribe": 3}, raising=False)
    heard = []

    def hear(features):
        heard.append(features.shape)
        return torch.tensor([9])

    monkeypatch.setattr(model, "detect_language", hear)
    assert read("whisper").inputs["decoder_input_ids"].tolist() == [[1, 2, 3, 4]]
    assert not heard
    monkeypatch.setattr(tokenizer, "language", None)
    monkeypatch.setattr(tokenizer, "task", None)
    tokenizer.set_prefix_tokens()
    assert read("whisper").inputs["decoder_input_ids"].tolist() == [[1, 9, 3, 4]]
    assert len(heard) == 1
    monkeypatch.setattr(config, "language", "en", raising=False)
    assert read("whisper").inputs["decoder_input_ids"].tolist() == [[1, 2, 3, 4]]
    assert len(heard) == 1
    monkeypatch.undo()
    tokenizer.set_prefix_tokens(language="english", task="transcribe")


def test_an_explanation_of_a_sound_is_saved_and_read_again(tmp_path):
    e = explainer("whisper").explain(sound(), " Mr.", granularity=Seconds(0.2))
    e.save(tmp_path / "e.json")
    again = atman_triton.load(tmp_path / "e.json")
    assert again.units == e.units
    assert again.sound == e.sound
    assert again.provenance["attention"] == "encoder self-attention and cross-attention"


# --- what is done, and refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "encoder self-attention and cross-attention"),
        ({"attention": "cross"}, "cross-attention"),
        ({"attention": "encoder"}, "encoder self-attention"),
        ({"attention": "both", "method": "direct"}, "cross-attention"),
    ],
)
def test_where_the_prompt_was_suppressed_is_said(changes, said):
    e = explainer("t5", **changes).explain(TEXT, "Haus")
    assert e.provenance["attention"] == said


def test_by_default_effects_are_direct_where_there_are_any():
    model, tokenizer = made("t5")
    direct = Explainer(model, tokenizer, progress=False).explain(TEXT, "Haus")
    assert direct.provenance["method"] == "direct"
    exact = Explainer(model, tokenizer, progress=False, attention="encoder").explain(TEXT, "Haus")
    assert exact.provenance["method"] == "exact"
    assert "attention='encoder' leaves cross-attention alone" in exact.provenance["method_choice"]


@pytest.mark.parametrize("method", ["hybrid", "hierarchical"])
def test_methods_that_rank_by_direct_effects_work(method):
    e = explainer("t5", method=method).explain(TEXT, "Haus")
    exact = explainer("t5").explain(TEXT, "Haus")
    totals = [unit for unit in e.units if unit.effect == "total"]
    assert totals
    for column, unit in enumerate(e.units):
        if unit.effect == "total" and unit.level == "token":
            same = next(c for c, other in enumerate(exact.units) if other.tokens == unit.tokens)
            close(e.suppressed_logprobs[:, column], exact.suppressed_logprobs[:, same])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention": "all"}, ValueError, r"attention must be .*encoder.*got 'all'"),
        (
            {"attention": "encoder", "method": "direct"},
            ValueError,
            r"method='direct' suppresses in cross-attention.*take method='exact'",
        ),
    ],
)
def test_wrong_choices_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        explainer("t5", **changes)


def test_a_path_adds_up_the_better_the_more_steps_it_takes():
    model, _ = made("t5")
    errors = []
    for steps in (2, 16):
        one = Explainer(model, method="path", steps=steps, progress=False)
        e = one.explain([290, 17, 305, 42, 77, 1], [61, 312, 9])
        together: Any = e.together_logprobs
        rises = (e.base_logprobs - together).double()
        torch.testing.assert_close(e.completeness.rises, rises)
        errors.append(e.completeness.error)
    assert errors[1] < errors[0]
    assert {unit.effect for unit in e.units} == {"path"}
    assert e.provenance["attention"] == "encoder self-attention and cross-attention"


def test_a_decoder_alone_has_no_such_choice():
    from toy_models import MODELS

    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not have; leave it out"):
        Explainer(MODELS["llama"](), attention="cross")


@pytest.mark.parametrize(
    ("name", "prompt", "error", "message"),
    [
        ("t5", sound(), TypeError, "must hold integer token ids|must be a str"),
        ("t5", "", ValueError, "prompt must not be empty"),
        ("t5", [1, 400], ValueError, "the model knows ids 0 to 399"),
        ("bart", "house " * 200, ValueError, r"fit into the 128 tokens that BartFor.*shorten"),
        ("whisper", "hello", TypeError, "prompt must be a sound"),
        ("whisper", sound(1.1), ValueError, r"no longer than the 1 s"),
        ("whisper", np.zeros((2, 100)), ValueError, "one channel"),
    ],
)
def test_prompts_that_are_none_are_refused(name, prompt, error, message):
    with pytest.raises(error, match=message):
        explainer(name).explain(prompt, "two")


@pytest.mark.parametrize(
    ("name", "target", "error", "message"),
    [
        ("t5", "", ValueError, "target must not be empty"),
        ("t5", [], ValueError, "target must not be empty"),
        ("t5", [500], ValueError, "the model knows ids 0 to 399"),
        ("t5", 3.5, TypeError, "target must be a str or token ids"),
        ("whisper", [7] * 70, ValueError, r"room for 61 tokens .*got the target's 70; shorten"),
    ],
)
def test_answers_that_are_none_are_refused(name, target, error, message):
    with pytest.raises(error, match=message):
        explainer(name).explain(prompt_of(name), target)


def test_the_processor_is_asked_for_where_it_is_needed():
    model, _ = made("whisper")
    with pytest.raises(ValueError, match=r"processor is needed, got NoneType; load it with Auto"):
        Explainer(model, method="exact").explain(sound(), [5])
