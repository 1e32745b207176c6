"""The benchmark of the path method in small: its rows, and that its verdicts can be no."""

from __future__ import annotations

import csv

from bench import path


def test_rows_of_one_length(tmp_path, capsys):
    arguments = ["--lengths", "64", "--documents", "1", "--answer-tokens", "1"]
    assert path.main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["provider"] for row in rows] == 3 * [f"path {n} steps" for n in path.STEPS]
    costs = [float(row["median"]) for row in rows if row["metric"] == "forwards"]
    assert costs == [2 + 15 + 4 * 4, 2 + 31 + 4 * 8, 2 + 31 + 4 * 16]
    assert "independent of the length" in capsys.readouterr().out


def test_verdicts_can_be_no():
    def of(error, forwards):
        return {path.JUDGED: [path.Found(1.0, forwards, error)]}

    assert list(path.verdicts({64: of(0.019, 65), 128: of(0.001, 66)}).values()) == [True, True]
    assert list(path.verdicts({64: of(0.001, 65), 128: of(0.021, 70)}).values()) == [False, False]
