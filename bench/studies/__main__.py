"""All studies in turn: ``python -m bench.studies [--documents N] [--out DIR] [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import time
from pathlib import Path

import bench.studies
from bench.harness import RESULTS

_NO_STUDY = ("__main__", "common")


def names() -> list[str]:
    """The modules that are studies: those with a ``main``."""
    return [
        module.name
        for module in pkgutil.iter_modules(bench.studies.__path__)
        if module.name not in _NO_STUDY
        and hasattr(importlib.import_module(f"bench.studies.{module.name}"), "main")
    ]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    known = names()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--documents", type=int, help="of every study; each has its own default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rows and pictures")
    options = parser.parse_args(arguments)
    if wrong := [name for name in options.studies if name not in known]:
        parser.error(f"studies must be among {', '.join(known)}, got {', '.join(wrong)}")
    given = [] if options.documents is None else ["--documents", str(options.documents)]
    for name in options.studies or known:
        started = time.perf_counter()
        study = importlib.import_module(f"bench.studies.{name}")
        study.main([*given, "--out", str(options.out)])
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
