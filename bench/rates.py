"""Rows of results over documents: means with standard errors, and with what they were measured."""

from __future__ import annotations

import csv
import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.harness import commit, device_name, version_of
from bench.removal import standard_error


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values and its standard error, to four places."""
    return round(fmean(values), 4), round(standard_error(values), 4)


def provenance() -> dict[str, str]:
    """With what is measured: device, versions, commit, date."""
    return {
        "device": device_name(torch.device("cpu")),
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write(rows: Sequence[Any], path: Path) -> None:
    """Write rows, instances of one dataclass, in place of those of an earlier run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
