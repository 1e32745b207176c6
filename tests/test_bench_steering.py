"""The benchmark of steering in small."""

import itertools

import pytest
import torch

from atman_triton import TextControl
from atman_triton.demo import load_demo_model
from bench import steering


def test_rows_say_what_became_of_the_answers(monkeypatch, capsys):
    monkeypatch.setattr(
        steering, "FACTORS", {steering.SUPPRESS: (0.1, 1.0), steering.DISTRACT: (2.0,)}
    )
    rows = steering.measure(6)
    assert [(row.action, row.mode, row.factor) for row in rows] == [
        *((steering.SUPPRESS, mode, factor) for mode in steering.MODES for factor in (0.1, 1.0)),
        *((steering.DISTRACT, mode, 2.0) for mode in steering.MODES),
    ]
    assert all(row.kept == 1 and row.turned == 0 for row in rows if row.factor == 1)
    assert rows[0].kept < 0.5
    turned = {row.mode: row.turned for row in rows[-3:]}
    assert turned["min_shift"] > turned["log_additive"]
    assert "suppress evidence, min_shift, 0.1: kept " in capsys.readouterr().out


def test_a_batch_steers_as_each_document_alone():
    model, tokenizer = load_demo_model()
    tokenizer.padding_side = "left"
    some = list(itertools.islice(steering.cases(), 3))
    assert all(c.text[slice(*c.other)].count(c.other_value) for c in some)
    controls = [[TextControl(c.other[0], c.other[1] - c.other[0], 2.0)] for c in some]
    with torch.no_grad():
        texts = steering.continuations(
            model, tokenizer, [c.text for c in some], controls, "min_shift"
        )
        for case, own, text in zip(some, controls, texts, strict=True):
            assert steering.continuations(model, tokenizer, [case.text], [own], "min_shift") == [
                text
            ]


def test_arguments(monkeypatch, tmp_path):
    path = tmp_path / "steering.csv"
    monkeypatch.setattr(steering, "RESULTS", path)
    monkeypatch.setattr(steering, "FACTORS", {steering.SUPPRESS: (0.0,)})
    monkeypatch.setattr(steering, "MODES", ("min_shift",))
    steering.main(["--documents", "2"])
    assert not path.exists()
    steering.main(["--documents", "2", "--write"])
    head, row = path.read_text().splitlines()
    assert head.startswith("action,mode,factor,documents,kept,kept_error,turned")
    assert row.startswith("suppress evidence,min_shift,0.0,2,")
    with pytest.raises(SystemExit):
        steering.main(["--documents", "many"])
