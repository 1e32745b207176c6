"""The benchmark of live citations in small: its rows, and that it can refuse."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import live


def test_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(live, "LEAST", 0.0)
    assert live.main(["--tiny", "--threads", "1", "--units", "5", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {row["shape"] for row in rows} == {"llama-tiny-prompt24-new4-units5-every8"}
    assert [row["provider"] for row in rows] == [live.PLAIN, live.LIVE, live.LIVE]
    plain, ours, share = (float(row["median"]) for row in rows)
    assert 0 < ours < plain
    assert 0 < share < 1
    assert "of the speed of plain generation" in capsys.readouterr().out


def test_it_can_refuse(monkeypatch):
    assert live.verdict(0.5)
    assert not live.verdict(0.49)
    model = live.TINY.model(torch.float32, torch.device("cpu"), 20)
    case = live.Case(model, 12, 3, 4, 2)
    case.check()
    assert case.units == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    right = case.live()
    monkeypatch.setattr(
        case, "live", lambda: [t._replace(logprobs=t.logprobs + 0.1) for t in right]
    )
    with pytest.raises(AssertionError, match=r"off by 0\.1 nats"):
        case.check()
    monkeypatch.setattr(case, "live", lambda: [t._replace(token_id=1) for t in right])
    with pytest.raises(AssertionError, match="another text"):
        case.check()
