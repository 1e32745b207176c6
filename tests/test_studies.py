"""What the studies share: labels and their arithmetic by hand, documents, rows, the command."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")

from atman_triton.demo import load_demo_model
from atman_triton.pieces import Unit
from bench.studies import __main__ as all_studies
from bench.studies import common
from bench.studies.common import Labelled

TEXT = "One two. Three four. Five."
CASE = Labelled(TEXT, "Which?", " four", ((0, 8), (9, 20), (21, 26)), (1,))
# a token carries the space before it, as the model's do; the question and the answer stand last
PIECES = ("One", " two.", " Three", " four.", " Five.", " Q: Which? A:", " four")


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


def explained(relevance):
    units, start = [], 0
    for number, piece in enumerate(PIECES):
        part = "target" if number == len(PIECES) - 1 else "prompt"
        units.append(Unit(piece, (number,), start, start + len(piece), part))
        start += len(piece)
    return SimpleNamespace(units=units, relevance=torch.tensor(relevance, dtype=torch.float64))


def test_units_belong_to_sentences():
    assert CASE.prompt[: len(TEXT)] == TEXT
    assert common.places(explained([0.0] * 7), CASE) == [0, 0, 1, 1, 2, None, None]
    assert common.sentence_of(CASE, 7, 12) == 1  # one character of the first, three of the second
    assert common.sentence_of(CASE, 8, 9) is None  # the space between two


def test_precision_and_rank_by_hand():
    found = explained([1.0, -9.0, 2.0, 3.0, 4.0, 50.0, 60.0])
    assert common.by_sentence(found, CASE) == [-8.0, 5.0, 4.0]
    assert common.label_precision(found, CASE) == 5 / 10
    assert common.evidence_rank(found, CASE) == 1
    tied = explained([5.0, 0.0, 2.0, 3.0, 6.0, 0.0, 0.0])
    assert common.evidence_rank(tied, CASE) == 3  # as good is not above
    assert common.label_precision(explained([-1.0] * 7), CASE) == 0  # nothing relevant is a miss


def test_documents_are_answered_and_the_same_every_time(demo):
    several = common.documents(*demo, 3)
    assert len(several) == 3 and several == common.documents(*demo, 5)[:3]
    assert common.answered(*demo, several) == several
    for case in several:
        (place,) = case.evidence
        start, stop = case.sentences[place]
        assert case.text[start:stop].endswith(".")
    choose, report = common.halves(several)
    assert choose == [several[1]] and report == [several[0], several[2]]


def test_the_evidence_is_found_on_the_shipped_reader(demo):
    (case,) = common.documents(*demo, 1)
    for granularity in ("token", "sentence"):
        found = common.explain(*demo, case, granularity)
        assert common.label_precision(found, case) > 0.9
        assert common.evidence_rank(found, case) == 1


def test_rows_leave_out_what_is_not_defined(tmp_path):
    found = common.mean_row("x", "part", "what", "how", "gap", [1.0, math.nan, 3.0])
    assert (found.value, found.count) == (2.0, 2) and found.low <= 2.0 <= found.high
    nothing = common.mean_row("x", "part", "what", "how", "rank", [math.nan])
    assert math.isnan(nothing.value) and nothing.count == 0
    path = common.write([found, nothing], tmp_path)
    assert path.name == "studies-x.csv"
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert (first["value"], first["measure"], second["count"]) == ("2.0", "gap", "0")
    assert all(first[name] for name in ("device", "torch", "transformers", "commit", "date"))
    assert common.pick([found, nothing], measure="rank") == [nothing]
    shown = common.table([found, nothing], "part")
    assert shown.row_count == 1 and len(shown.columns) == 5


def test_the_best_setting_has_the_largest_mean():
    scores = {"a": [1.0, 2.0], "b": [math.nan, 2.0], "c": [2.0, 2.0], "d": [math.nan]}
    assert common.best(scores) == "b"


def test_the_command_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit, match="2"):
        all_studies.main(["nonsense"])
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        common.options_of("Doc.", ["--documents", "1"], 10)
    assert "at least 2" in capsys.readouterr().err
