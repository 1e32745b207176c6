"""The command for Fig. 4 in small, and its sums by hand."""

import pytest

pytest.importorskip("matplotlib")

from atman_triton.demo import load_demo_model
from bench import figure4
from bench.restated import spans

FACTS = {"device": "d", "torch": "t", "transformers": "x", "commit": "c", "date": "2026-01-02"}


@pytest.fixture(scope="module")
def demo():
    return load_demo_model()


@pytest.fixture(scope="module")
def cases(demo):
    return figure4.conflicting_cases(*demo, 3)[0]


def test_a_continuation_turns_or_goes_away(cases):
    used, other = (
        [case.restated.answer_of(getattr(case, name)) for case in cases]
        for name in ("used", "other")
    )
    assert all(a != b for a, b in zip(used, other, strict=True))

    def shares(said):
        row = figure4.summarise(cases, said, figure4.AMPLIFIED, "min_shift", 2.0, FACTS)
        return row.turned, row.away

    assert shares(used) == (0, 0)
    assert shares(other) == (1, 1)
    assert shares([used[0], other[1], "neither"]) == (
        pytest.approx(1 / 3, abs=1e-4),
        pytest.approx(2 / 3, abs=1e-4),
    )


def test_the_right_sentence_is_steered(cases):
    for case in cases:
        assert {case.used, case.other} == {case.restated.first, case.restated.twin}
        assert case.unrelated not in (case.used, case.other)
        for what, place in (
            (figure4.AMPLIFIED, case.other),
            (figure4.SUPPRESSED, case.used),
            (figure4.UNRELATED_UP, case.unrelated),
            (figure4.UNRELATED_DOWN, case.unrelated),
        ):
            control = case.control(what, 3.0)
            start, stop = spans(case.restated.sentences)[place]
            assert (control.start, control.start + control.length) == (start, stop)
            assert case.prompt[start:stop] == case.restated.sentences[place]
            assert (control.factor, control.overlap) == (3.0, "complete")


def test_steering_turns_continuations(demo, cases, tmp_path, monkeypatch):
    model, tokenizer = demo
    monkeypatch.setattr(
        figure4, "WHATS", {figure4.AMPLIFIED: (1.0, 1.5), figure4.SUPPRESSED: (0.1,)}
    )
    monkeypatch.setattr(figure4, "MODES", ("min_shift",))
    rows = figure4.measure(model, tokenizer, cases)
    found = {(row.what, row.factor): (row.turned, row.away) for row in rows}
    assert found[figure4.AMPLIFIED, 1.0] == (0, 0)  # nothing is steered
    assert found[figure4.AMPLIFIED, 1.5] == found[figure4.SUPPRESSED, 0.1] == (1, 1)
    case = figure4.shown_case(tokenizer, cases)
    tokens = figure4.next_tokens(model, tokenizer, case)
    plain, amplified, suppressed = tokens.values()
    firsts = [
        tokenizer.decode(tokenizer(case.restated.answer_of(p))["input_ids"][:1])
        for p in (case.used, case.other)
    ]
    assert dict(plain)[firsts[0]] > 0.9 > 0.1 > dict(plain)[firsts[1]]
    assert dict(amplified)[firsts[1]] > 0.9 and dict(suppressed)[firsts[1]] > 0.9
    assert figure4.document_table(case, tokens).row_count == len(plain)


def test_figure_4_is_drawn(demo, cases, tmp_path):
    rows = [
        figure4.Row(what, mode, factor, 3, 0.5, 0.1, 0.6, 0.1, **FACTS)
        for what, factors in figure4.WHATS.items()
        for mode in figure4.MODES
        for factor in factors
    ]
    tokens = figure4.next_tokens(*demo, cases[0])
    figure4.draw(cases[0], tokens, rows, tmp_path / "figure4.png")
    assert (tmp_path / "figure4.png").stat().st_size > 20_000
    assert figure4.rate_table(rows, (figure4.AMPLIFIED, figure4.UNRELATED_UP)).row_count == 2 * len(
        figure4.MODES
    )


def test_one_document_has_no_standard_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        figure4.main(["--documents", "1"])
    assert "at least 2 documents" in capsys.readouterr().err
