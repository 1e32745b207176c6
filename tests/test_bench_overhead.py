"""What the host does per layer, in small: every kind is measured, and of what it is the slope."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import overhead


def test_rows_and_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "LAYERS", (1, 3))
    monkeypatch.setattr(overhead, "STEPS", (2, 4))
    overhead.main(["--rounds", "3", "--write", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["provider"] for row in rows] == [
        "exact",
        "direct",
        "transformers",
        "live",
        "generate",
    ]
    assert all(float(row["median"]) > 0 for row in rows if row["provider"] in ("exact", "direct"))
    capsys.readouterr()
    overhead.main(["exact", "--rounds", "1", "--profile"])
    assert "_attention_forward" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        overhead.main(["nothing"])


def test_a_layer_costs_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 us a layer and pass, beside 100 us for anything else; of generation per step too."""

    def calls_of(layers: int, backend: str) -> dict[str, int]:
        steps = {f"live {count}": count for count in overhead.STEPS}
        return {name: 100 + 7 * layers * count for name, count in {"exact": 1, **steps}.items()}

    monkeypatch.setattr(overhead, "model_of", lambda layers: layers)
    monkeypatch.setattr(overhead, "calls_of", calls_of)
    monkeypatch.setattr(
        overhead, "timed", lambda calls, rounds: {place: [us] for place, us in calls.items()}
    )
    assert overhead.measure("torch", 1, ("exact", "live")) == {"exact": 7, "live": 7}
