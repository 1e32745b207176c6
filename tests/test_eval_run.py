"""Every example by every method: what is noted, what is missing, what stops a run."""

import os

import pytest
from eval_cases import example, result
from toy_models import llama
from toy_tokenizers import byte_level

from atman_triton.baselines import Case
from atman_triton.evaluate import labels, metrics
from atman_triton.evaluate.faithfulness import Faithful
from atman_triton.evaluate.journal import FACTS, Journal
from atman_triton.evaluate.readings import READINGS, read
from atman_triton.evaluate.run import (
    MethodFailed,
    Plan,
    evaluate,
    explain,
    measure,
    prepared,
    split,
)
from atman_triton.evaluate.settings import explainer, parse_methods
from atman_triton.loading import Failed

FACTS_NOW = dict.fromkeys(FACTS, "x")
AGAIN = "The pay of a is 5 and no more. Q: How much is paid? A:"


@pytest.fixture(scope="module")
def reader():
    tokenizer = byte_level()
    return llama(vocab_size=len(tokenizer), max_position_embeddings=128), tokenizer


@pytest.fixture
def run(reader, tmp_path):
    """Evaluate into a folder; returns results and how many were measured now."""

    def run(examples, methods, process=0, processes=1, stability=0, gallery=0):
        plan = Plan.of(examples, parse_methods(methods), stability, gallery)
        journal = Journal(tmp_path, plan.digests, FACTS_NOW, process)
        measured = []
        try:
            evaluate(*reader, plan.part(process, processes), journal, measured.append)
            return plan.results(journal.read()), len(measured)
        finally:
            journal.close()

    return run


def test_results_are_what_the_parts_give_on_their_own(reader):
    one = example("a", reworded=AGAIN, group="g", facts={"n": 1})
    settings = parse_methods("direct,exact multiplicative,random")
    found = measure(
        *reader, one, prepared(*reader, settings), split="choose", again=True, keep=True
    )
    assert [each.method for each in found] == ["direct", "exact multiplicative", "random"]
    for setting, own in zip(settings, found, strict=True):
        explanation = explain(explainer(setting, *reader), one)
        units = labels.rated(explanation, one)
        y = labels.label(explanation, one)
        assert 0 < y.sum() < len(units)
        assert (own.example, own.split, own.group) == ("a", "choose", "g")
        assert own.facts == {"n": 1, "units": len(units)} and own.seconds > 0
        assert own.forwards == explanation.provenance["forwards"]
        for reading in READINGS:
            x = read(explanation, reading)[units]
            assert own.alignment[reading]["precision"] == metrics.precision(x, y).value
            assert own.alignment[reading]["recall"] == metrics.recall(x, y).value
        x = read(explanation, "signed mean")[units].double()
        faithful = Faithful(Case.of(*reader, one.prompt, explanation), units, seed="a")
        expected = faithful.measure({"m": x})["m"]
        values = dict(own.faithfulness)
        again = explain(explainer(setting, *reader), one, AGAIN)
        other = read(again, "signed mean")[labels.rated(again, one)]
        assert values.pop("stability") == metrics.rank_correlation(x, other).value
        # Run beside other methods' variants, in batches of another shape.
        assert values == pytest.approx(expected.values, rel=1e-4, abs=1e-5)
        assert own.curve["most"] == pytest.approx(expected.curve["most"], rel=1e-4, abs=1e-5)
        assert own.heat["values"] == x.tolist()
        spans = [[explanation.units[unit].start, explanation.units[unit].stop] for unit in units]
        assert own.heat["units"] == spans
    assert found[2].faithfulness["stability"] < 1  # chance is drawn anew


def test_without_more_to_ask_there_is_no_more(reader):
    settings = parse_methods("direct")
    (found,) = measure(*reader, example("a"), prepared(*reader, settings))
    assert "stability" not in found.faithfulness and found.heat == {}
    assert found.split == "report"


def test_only_what_is_missing_is_measured(run):
    examples = [example("a", reworded=AGAIN), example("b"), example("c")]
    results, measured = run(examples[:2], "direct")
    assert measured == 2 and [one.split for one in results] == ["choose", "report"]
    results, measured = run(examples[:2], "direct")
    assert measured == 0 and len(results) == 2
    results, measured = run(examples, "direct,random")
    assert measured == 4
    assert [(one.example, one.method) for one in results] == [
        (name, method) for name in "abc" for method in ("direct", "random")
    ]
    # What was measured without a reworded question or a picture for the gallery is measured again.
    results, measured = run(examples, "direct,random", stability=3, gallery=2)
    assert measured == 4 and "stability" in results[0].faithfulness and results[3].heat
    assert run(examples, "random", stability=3, gallery=2)[1] == 0


def test_processes_share_the_examples(run):
    examples = [example(name) for name in "abcde"]
    first, measured = run(examples, "direct", 0, 2)
    assert measured == 3 and [one.example for one in first] == ["a", "c", "e"]
    both, measured = run(examples, "direct", 1, 2)
    assert measured == 2 and [one.example for one in both] == list("abcde")
    alone, measured = run(examples, "direct")
    assert measured == 0 and alone == both


def test_a_method_that_fails_stops_the_run_and_what_is_done_stays(run):
    broken = example("b", target="")
    with pytest.raises(MethodFailed, match="direct failed on example 'b': ValueError: target"):
        run([example("a"), broken, example("c")], "direct")
    results, measured = run([example("a"), example("c")], "direct")
    assert measured == 1 and len(results) == 2


def test_plans():
    examples = [example(name) for name in "abcdefgh"]
    plan = Plan.of(examples, parse_methods("direct,random"), 3, 1)
    assert plan.total == 16 and plan.part(1, 3).own == [1, 4, 7]
    assert plan.reworded == frozenset()
    assert [split(index) for index in range(8)] == ["choose", *7 * ["report"]]
    assert [split(index) for index in (12, 13, 24)] == ["choose", "report", "choose"]
    done = {("b", "direct"): result("b"), ("a", "direct"): result("a")}
    missing = plan.missing(done)
    assert [one.name for one in missing[1]] == ["random"] and len(missing[0]) == 2  # no heat
    with pytest.raises(ValueError, match="different ids, but 'a' is twice"):
        Plan.of([*examples, examples[0]], [], 0, 0)
    with pytest.raises(ValueError, match="at least one, got none"):
        Plan.of([], [], 0, 0)


def test_groups_choose_or_are_reported_together():
    groups = "aabacdefghijklmna"
    examples = [example(str(place), group=group) for place, group in enumerate(groups)]
    plan = Plan.of(examples, [], 0, 0, together=True)
    chosen = {group for group, part in zip(groups, plan.splits, strict=True) if part == "choose"}
    reported = {group for group, part in zip(groups, plan.splits, strict=True) if part == "report"}
    assert chosen == {"a", "m"} and not chosen & reported
    assert Plan.of(examples, [], 0, 0).splits == [split(place) for place in range(len(groups))]
    alone = [example(str(place), group="a") for place in range(3)]
    assert Plan.of(alone, [], 0, 0, together=True).splits == ["choose", "report", "report"]


def test_examples_are_not_held():
    """Those of large data open their pictures when they are looked at."""
    seen = []

    class Lazy(list):
        def __getitem__(self, index):
            seen.append(index)
            return example("abcd"[index])

        def __iter__(self):
            return (self[index] for index in range(4))

    plan = Plan.of(Lazy(range(4)), parse_methods("direct"), 50, 12)
    assert seen == [0, 1, 2, 3]
    plan.missing({})
    plan.results({})
    assert len(seen) == 4


def test_a_failing_process_says_why(tmp_path):
    from atman_triton.evaluate.workers import Job, work

    plan = Plan.of([example("a")], parse_methods("direct"), 0, 0)
    where = {"model": "/nowhere", "device": "cpu", "dtype": "auto", "demo": "contract"}
    job = Job(0, plan, tmp_path, FACTS_NOW, threads=1, **where)
    looks = []
    with pytest.raises(Failed, match="the folder /nowhere does not exist"):
        work([job], lambda: looks.append(1))
    assert looks


def test_a_process_that_ends_while_it_is_looked_at_is_not_missed(tmp_path, monkeypatch):
    """Its exit code is read once in a round: it may be None, and 1 a moment later."""
    from atman_triton.evaluate import workers

    class Ending:
        sentinel, reads = None, 0

        def __init__(self, **given):
            given["args"][1].send("why")

        @property
        def exitcode(self):
            self.reads += 1
            return None if self.reads == 1 else 1

        def start(self):
            pass

        terminate = join = start

    context = workers.multiprocessing.get_context("spawn")
    monkeypatch.setattr(context, "Process", Ending)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda how: context)
    monkeypatch.setattr(workers, "wait", lambda sentinels, pause: None)
    with pytest.raises(Failed, match="why"):
        workers.work([None], lambda: None)  # pyright: ignore[reportArgumentType]


def test_what_processes_are_told_does_not_stay(monkeypatch):
    from atman_triton.evaluate.workers import KEPT, _environment

    first, second = KEPT
    monkeypatch.setenv(first, "7")  # the user's own
    monkeypatch.delenv(second, raising=False)

    def broken():
        with _environment(KEPT):
            assert (os.environ[first], os.environ[second]) == ("7", KEPT[second])
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert os.environ[first] == "7" and second not in os.environ
