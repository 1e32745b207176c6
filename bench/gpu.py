"""What a GPU must show, one named set in a call that ends inside ten minutes.

::

    python bench/gpu.py correctness             # the tests that need a GPU, and the sanitizer
    python bench/gpu.py kernels --out FOLDER    # one attention call beside its rivals
    python bench/gpu.py explain --out FOLDER    # whole explanations of Llamas of 1B, 6B and 30B
    python bench/gpu.py memory --out FOLDER     # peak memory and time over size and length (Fig. 8)
    python bench/gpu.py long --out FOLDER       # a million tokens in a call; a document in chunks
    python bench/gpu.py all --dry-run           # one after the other
    python bench/gpu.py plot --out FOLDER       # only draw the pictures again, from the rows

A short table is printed last, and rows are written to ``FOLDER/<device>.csv`` (``bench/results``
where it is not given), those of ``memory`` to ``scaling.csv``; pictures are drawn from these files,
beside them, where matplotlib is installed. With ``--traces``, ``explain`` keeps what the profiler
saw in ``FOLDER/traces``. It needs this repository, torch, triton and transformers; ``correctness``
also pytest, and pytest-xdist to be quick. On a Hopper GPU a few small cases of the Hopper kernel
are run in other processes first, see ``hopper_gate.py``: if it hangs or is wrong it fails, and all
else goes on.

``--tiny`` (``--dry-run`` is the same) runs the same code in toy sizes on any machine, to see that
it works: its times mean nothing, and its rows are written only where ``--out`` says so. Without a
GPU the fused kernels run in it only where the environment has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not installed

from bench import (
    gpu_correctness,
    gpu_explain,
    gpu_kernels,
    gpu_long,
    gpu_memory,
    gpu_plots,
    hopper_gate,
)
from bench.harness import RESULTS, device_name, write_rows


@dataclass(frozen=True)
class Set:
    """One set of measurements.

    Args:
        run: takes the device and whether sizes are toys; its rows, the table to print, and, a line
            each, what of ours failed.
        about: one line for the list of sets.
        write: puts the rows into a folder; the file.
        traced: ``run`` also takes a folder for the profiler's traces.
    """

    run: Callable[..., tuple[list[Any], str, *tuple[str, ...]]]
    about: str
    write: Callable[[list[Any], Path], Path] = write_rows
    traced: bool = False


SETS = {
    "correctness": Set(gpu_correctness.run, "the tests that need a GPU, some under the sanitizer"),
    "kernels": Set(gpu_kernels.run, "one attention call in each mode, forward and backward"),
    "explain": Set(
        gpu_explain.run,
        "explanations of 1024 tokens, every token, savings one by one; live citations",
        traced=True,
    ),
    "memory": Set(
        gpu_memory.run, "peak memory and time over model size and prompt length", gpu_memory.write
    ),
    "long": Set(gpu_long.run, "64k to 1M tokens in one call; 64 chunks of a 64k-token document"),
}


def draw(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Pictures of the rows in some files; none where they cannot be drawn, which is said."""
    drawn = []
    try:
        for path in files:
            if path.name == "scaling.csv":
                drawn += gpu_memory.draw(folder)
            else:
                drawn += gpu_plots.draw_all(gpu_plots.read_rows(path), folder)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        print("no pictures: matplotlib is not installed; the set plot draws them", file=sys.stderr)
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Command line; exits 2 without a GPU, 1 where something of ours failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(f"{name}: {each.about}" for name, each in SETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=[*sorted(SETS), "all", "plot"], help="what to measure")
    parser.add_argument("--out", type=Path, help="folder of rows and pictures")
    parser.add_argument(
        "--tiny", "--dry-run", action="store_true", help="toy sizes, on a CPU where need be"
    )
    parser.add_argument(
        "--traces", action="store_true", help="keep the profiler's traces of explain, some MB"
    )
    options = parser.parse_args(arguments)
    if options.set == "plot":
        folder = options.out or RESULTS
        pictures = draw(folder, sorted(folder.glob("*.csv")))
        print("\n".join(str(path) for path in pictures) or f"no rows of these sets in {folder}")
        return
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no GPU is here; --tiny runs the same code on a CPU, in toy sizes.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or (None if options.tiny else RESULTS)
    failures = hopper_gate.shut_out_of_auto(device)
    for name in SETS if options.set == "all" else [options.set]:
        each = SETS[name]
        folder = [out / "traces"] if out is not None and options.traces and each.traced else []
        rows, table, *failed = each.run(device, options.tiny, *folder)
        if out is not None:
            path = each.write(rows, out)
            print(f"rows in {path}", file=sys.stderr)
            draw(out, [path])
        toys = ", toy sizes: the times mean nothing" if options.tiny else ""
        print(f"{name} on {device_name(device)}{toys}\n{table}", flush=True)
        failures += [f"{name}: {line}" for line in failed]
    if failures:
        sys.exit("\n".join(["FAILED", *failures]))


if __name__ == "__main__":
    main()
