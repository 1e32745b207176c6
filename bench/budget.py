"""Which method and mode for which budget, on the shipped model and fresh documents.

The removal gap (see ``bench.removal``) and the rank correlation with leave-one-out, against the
cost in forwards of the whole input: perturbed runs count by their tokens, a backward counts twice,
and once more because it runs the layers again. Only documents that the model answers correctly
count::

    python -m bench.budget                       # 200 documents
    python -m bench.budget --methods exact direct --documents 20
    python -m bench.budget --share 0/2 &         # half of the documents,
    python -m bench.budget --share 1/2           # and the other half

Each document is noted as soon as it is done, in ``--parts``; a run that was interrupted goes on
where it stopped, and one with more methods or documents measures what is missing. Documents that
another version of the code, the model or the libraries measured are refused. The share that
ends last writes the rows to ``bench/results/budget.csv`` and draws ``bench/results/budget.png``.

Legend: U units.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import atman_triton as atman
from atman_triton.demo import load_demo_model
from bench.budget_results import (
    LEAVE_ONE_OUT,
    MODES,
    RANDOM,
    Document,
    Found,
    Setting,
    draw,
    summarise,
    supported,
    table,
    write,
)
from bench.harness import RESULTS, ROOT, commit, device_name, version_of
from bench.removal import Case, Removal, answered_cases, rank_correlation

LEVELS: dict[str, tuple[float | int | None, ...]] = {
    "exact": (None,),
    "direct": (None,),
    "hybrid": (0.1, 0.2, 0.3),  # budgets
    "path": (2, 4, 8, 16),  # steps
    "score_gradient": (None,),
}
PARTS = ROOT / ".benchmarks" / "budget"
_MEASURE = (ROOT / "bench" / "budget.py", ROOT / "bench" / "removal.py")
# What must agree between runs whose documents stand in one table: a method may change any day.
_SAME = ("weights", "code", "torch", "transformers")


def settings_of(methods: Iterable[str]) -> list[Setting]:
    """Every level of some methods in every mode, and the two without a mode."""
    found = [
        Setting(method, level, mode)
        for method in methods
        for mode in MODES
        for level in LEVELS[method]
    ]
    return [*found, LEAVE_ONE_OUT, RANDOM]


def explain(model: Any, tokenizer: Any, case: Case, setting: Setting) -> atman.Explanation:
    """One document by one setting, every token a unit."""
    arguments: dict[str, Any] = {}
    if setting.method == "hybrid":
        arguments["budget"] = setting.level
    if setting.method == "path":
        arguments["steps"] = setting.level
    explainer = atman.Explainer(
        model,
        tokenizer,
        mode=setting.mode,
        method=setting.method,  # pyright: ignore[reportArgumentType]
        progress=False,
        **arguments,
    )
    return explainer.explain(case.prompt, case.answer)


def examine(
    model: Any, tokenizer: Any, case: Case, settings: Sequence[Setting], number: int
) -> Document:
    """What every setting gives for one document."""
    explained = {
        setting: explain(model, tokenizer, case, setting)
        for setting in settings
        if setting not in (LEAVE_ONE_OUT, RANDOM)
    }
    units = next(iter(explained.values()), None)
    if units is None:  # the two alone; the cheapest explanation says what the units are
        units = explain(model, tokenizer, case, Setting("direct", None, MODES[0]))
    removal = Removal(model, tokenizer, case, units, number)
    reference = removal.leave_one_out()
    scores = {setting: found.relevance.tolist() for setting, found in explained.items()}
    forwards = {setting: found.provenance["forwards"] for setting, found in explained.items()}
    scores |= {LEAVE_ONE_OUT: reference, RANDOM: removal.random}
    forwards |= {LEAVE_ONE_OUT: len(removal.inside) + 1.0, RANDOM: 0.0}
    gaps = removal.gaps({setting.name: scores[setting] for setting in settings})
    theirs = removal.of_prompt(reference)
    found = {
        setting.name: Found(
            gap=gaps[setting.name],
            forwards=forwards[setting],
            rank_correlation=rank_correlation(removal.of_prompt(scores[setting]), theirs),
        )
        for setting in settings
    }
    return Document(prompt_tokens=len(removal.ids), found=found)


# --- what is done already ---------------------------------------------------------------------


class Journal:
    """The documents that are done, by number, in a folder to which several processes may write.

    Args:
        folder: Where every process has a file of its own, one JSON value a line.
        own: The name of this process's file.
        run: With what is measured; see ``described``.
    Raises: ValueError: if the folder holds documents that were measured with something else.
    """

    def __init__(self, folder: Path, own: str, run: dict[str, str]) -> None:
        self.folder, self.run = folder, run
        self.path = folder / own
        self._begun = False
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():  # a line that an interruption cut short is measured again
            whole = self.path.read_bytes()
            self.path.write_bytes(whole[: whole.rfind(b"\n") + 1])

    def read(self, cases: Sequence[Case]) -> tuple[dict[int, Document], list[dict[str, str]]]:
        """All processes' documents, and the runs that measured them.

        Raises: ValueError: if a document or a run is another one than now.
        """
        done: dict[int, Document] = {}
        runs: list[dict[str, str]] = []
        for path in sorted(self.folder.glob("*.jsonl")):
            *lines, _ = path.read_text().split("\n")  # another process may be writing its last
            for line in lines:
                entry = json.loads(line)
                if "run" in entry:
                    self._check(path, {name: entry["run"][name] for name in _SAME}, self.run)
                    runs.append(entry["run"])
                elif (number := entry["document"]) < len(cases):
                    self._check(path, {"case": entry["case"]}, {"case": digest(cases[number])})
                    found = {name: Found(**each) for name, each in entry["found"].items()}
                    before = done[number].found if number in done else {}
                    done[number] = Document(entry["prompt_tokens"], before | found)
        return done, runs

    def add(self, number: int, case: Case, document: Document) -> None:
        """Note a document that is done."""
        entry = {"document": number, "case": digest(case)} | dataclasses.asdict(document)
        lines = [entry] if self._begun else [{"run": self.run}, entry]
        with self.path.open("a") as file:
            file.write("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines))
        self._begun = True

    def _check(self, path: Path, theirs: dict[str, str], ours: dict[str, str]) -> None:
        for name, value in theirs.items():
            if value != ours[name]:
                raise ValueError(
                    f"{path} was measured with {name} {value}, now it is {ours[name]}; "
                    "delete the folder, or name another one (--parts)."
                )


def digest(case: Case) -> str:
    """A short name that only this prompt and answer have."""
    return hashlib.sha256(json.dumps(dataclasses.astuple(case)).encode()).hexdigest()[:16]


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def described(model: Any) -> dict[str, str]:
    """With what is measured."""
    weights = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        weights.update(name.encode() + weight.float().numpy().tobytes())
    code = hashlib.sha256()
    for path in [*_sources(ROOT / "atman_triton"), *_sources(ROOT / "kernels"), *_MEASURE]:
        code.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {
        "weights": weights.hexdigest()[:16],
        "code": code.hexdigest()[:16],
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
        "device": device_name(torch.device("cpu")),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


# --- the run ----------------------------------------------------------------------------------


def measure_missing(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    numbers: Iterable[int],
    settings: Sequence[Setting],
    journal: Journal,
    say: Callable[[str], None],
) -> None:
    """Measure what the journal does not have yet of some documents, telling the time left."""
    done, _ = journal.read(cases)
    missing: dict[int, list[Setting]] = {}
    for number in numbers:
        found = done[number].found if number in done else {}
        if wanted := [setting for setting in settings if setting.name not in found]:
            missing[number] = wanted
    started = time.perf_counter()
    for count, (number, wanted) in enumerate(missing.items(), 1):
        journal.add(number, cases[number], examine(model, tokenizer, cases[number], wanted, number))
        each = (time.perf_counter() - started) / count
        left = datetime.timedelta(seconds=round(each * (len(missing) - count)))
        say(f"{count} of {len(missing)} documents, {each:.1f} s each, {left} left")


def _share(text: str) -> tuple[int, int]:
    """``0/2`` as ``(0, 2)``."""
    own, slash, count = text.partition("/")
    if not (slash and own.isdecimal() and count.isdecimal() and int(own) < int(count)):
        raise argparse.ArgumentTypeError(f"must be like 0/2 or 1/2, got {text!r}")
    return int(own), int(count)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if the folder of parts belongs to another run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=200, help="answered correctly, from 2")
    parser.add_argument("--methods", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--share", type=_share, default=(0, 1), help="0/2: every second document")
    parser.add_argument("--parts", type=Path, default=PARTS, help="folder of finished documents")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and picture")
    options = parser.parse_args(arguments)
    if options.documents < 2:
        parser.error("a standard error needs at least 2 documents")
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    cases = answered_cases(model, tokenizer, options.documents)
    settings = settings_of(dict.fromkeys(options.methods))
    own, count = options.share

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        journal = Journal(options.parts, f"share-{own}-of-{count}.jsonl", described(model))
        numbers = range(own, len(cases), count)
        measure_missing(model, tokenizer, cases, numbers, settings, journal, say)
        done, runs = journal.read(cases)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    documents = [done[number] for number in sorted(done)]
    documents = [each for each in documents if all(s.name in each.found for s in settings)]
    if len(documents) < len(cases):
        say(f"{len(documents)} of {len(cases)} documents are done; other shares are still missing")
        return 0
    rows = summarise(documents, settings, runs)
    write(rows, options.out / "budget.csv")
    draw(rows, options.out / "budget.png")
    console = Console(width=120)
    console.print(table(rows))
    console.print(supported(rows, documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
