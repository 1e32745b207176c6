"""Results that are done, on disk: nothing lost, nothing done twice, whatever ends the run.

Every process has a file of its own in one folder: a line that says with what it measures, then a
line for each method of each example, written together once the example is done. A line that was
cut short is no line, and is measured again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from .._version import __version__
from .examples import Example
from .results import Result

FACTS = ("data", "weights", "dtype", "device_type", "code", "torch", "transformers")
"""Of ``run_facts``, what must agree between results that stand in one table."""

_PACKAGE = Path(__file__).resolve().parent.parent


_SHOWS = (
    *("cli/", "render/", "evaluate/figures/", "evaluate/tables.py", "evaluate/written.py"),
    *("evaluate/sweep.py", "evaluate/statistics.py", "evaluate/paper.py", "evaluate/bootstrap.py"),
)
"""Parts of the package that change no result, so that a better figure wants no new run."""


class Mixed(ValueError):
    """A folder holds results that were measured with something else."""


class Busy(ValueError):
    """Another run writes to the folder."""


class Journal:
    """The results in a folder, to which several processes may write.

    Args:
        folder: Made if it is not there.
        digests: Of the examples whose results count, by id; see ``digest``.
        run_facts: With what is measured now; see ``run_facts``.
        process: The number of this process, which has a file of its own; None only reads.
    Raises:
        Mixed: if the folder holds results that were measured with something else.
        Busy: if this process's file is in use.
    """

    def __init__(
        self,
        folder: Path,
        digests: Mapping[str, str],
        run_facts: Mapping[str, str],
        process: int | None = None,
    ) -> None:
        self.folder = folder
        self.facts = dict(run_facts)
        self.runs: list[dict[str, str]] = []
        """What all runs that wrote here measured with, as far as was read."""
        self.digests = dict(digests)
        self._found: dict[tuple[str, str], Result] = {}
        self._seen: dict[Path, int] = {}  # bytes
        self._file: IO[bytes] | None = None
        self._begun = False
        folder.mkdir(parents=True, exist_ok=True)
        if process is not None:
            self._file = _locked(folder / f"{process}.jsonl")
            _cut(self._file)
        try:
            self.read()
        except Mixed:
            self.close()
            raise

    def read(self) -> dict[tuple[str, str], Result]:
        """Results of the examples, by example and method; the last one where there are several.

        Raises: Mixed: if a run or an example is another one than now.
        """
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._seen.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]  # another process may be writing its last line
            for line in whole.splitlines():
                self._take(path, json.loads(line))
            self._seen[path] = start + len(whole)
        return dict(self._found)

    def _take(self, path: Path, entry: Mapping[str, Any]) -> None:
        if "run" in entry:
            self._check(path, entry["run"])
            self.runs.append(entry["run"])
            return
        result = Result.from_json(entry["result"])
        own = self.digests.get(result.example)
        if own not in (None, entry["digest"]):
            raise Mixed(
                f"{path} has results of another example {result.example!r} than there is now; "
                f"{_way_out(self.folder)}"
            )
        if own is not None:
            self._found[result.example, result.method] = result

    def add(self, example: Example, results: Iterable[Result]) -> None:
        """Note what is done of an example.

        Raises: ValueError: if this journal only reads.
        """
        if self._file is None:
            raise ValueError("this journal only reads; give it the number of a process.")
        own = self.digests[example.id]
        entries: list[dict[str, Any]] = [] if self._begun else [{"run": self.facts}]
        entries += [{"digest": own, "result": result.to_json()} for result in results]
        lines = "".join(f"{json.dumps(entry, allow_nan=False)}\n" for entry in entries)
        self._file.write(lines.encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._begun = True

    def close(self) -> None:
        """Let other runs write."""
        if self._file is not None:
            self._file.close()

    def _check(self, path: Path, theirs: Mapping[str, str]) -> None:
        differing = [name for name in FACTS if theirs.get(name) != self.facts.get(name)]
        if differing:
            said = ", ".join(
                f"{name.replace('_', ' ')} {theirs.get(name)} (now {self.facts.get(name)})"
                for name in differing
            )
            raise Mixed(f"{path} was measured with {said}; {_way_out(self.folder)}")


def _way_out(folder: Path) -> str:
    return f"delete {folder}, or give another folder (--out)."


# --- files ------------------------------------------------------------------------------------


def _locked(path: Path) -> IO[bytes]:
    """The file, for this process alone until it ends; systems without such locks do without."""
    file = path.open("a+b")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise Busy(
            f"{path} is in use: another run writes to this folder; wait for it, or give another "
            "folder (--out)."
        ) from error
    return file


def _cut(file: IO[bytes]) -> None:
    """Take away a last line that was cut short."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


# --- what is measured with what -----------------------------------------------------------------


def digest(example: Example) -> str:
    """A short name that only this prompt, answer and label have."""
    found = hashlib.sha256()
    for part in (example.prompt, example.target, example.region, example.labels, example.reworded):
        _add(found, part)
    _add(found, example.mask)
    return found.hexdigest()[:16]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Image.Image):
        found.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (list, tuple)):
        found.update(b"[")
        for each in value:
            _add(found, each)
        found.update(b"]")
    else:
        found.update(f"{type(value).__name__} {value!r};".encode())


def weights_digest(model: Any) -> str:
    """A short name that only these weights have, on any device."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        plain = weight.detach().cpu().contiguous().flatten()
        found.update(f"{name}{weight.dtype}{tuple(weight.shape)}".encode())
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def code_digest() -> str:
    """A short name of the source of this package, kernels included, but for what only shows."""
    found = hashlib.sha256()
    folders = [_PACKAGE, _PACKAGE / "kernels"]  # which may be a link that rglob does not follow
    paths = {path.relative_to(_PACKAGE) for folder in folders for path in folder.rglob("*.py")}
    for path in sorted(paths):
        if not path.as_posix().startswith(_SHOWS):
            found.update(path.as_posix().encode() + (_PACKAGE / path).read_bytes())
    return found.hexdigest()[:16]


def run_facts(model: Any, data: str, device: str, commit: str) -> dict[str, str]:
    """With what is measured, as JSON values.

    Args:
        model: Whose weights count, and the dtype that it runs in.
        data: The name of the data.
        device: The chip's name.
        commit: Of a checkout, else empty.
    """
    parameter = next(model.parameters())
    return {
        "data": data,
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "weights": weights_digest(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device_type": parameter.device.type,
        "device": device,
        "code": code_digest(),
        "atman_triton": __version__,
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
    }
