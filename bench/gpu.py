"""What a GPU must show, one named set in a call that ends inside ten minutes.

::

    python bench/gpu.py kernels --out FOLDER    # one attention call beside its rivals
    python bench/gpu.py explain --out FOLDER    # whole explanations of Llamas of 1B, 6B and 30B
    python bench/gpu.py long --out FOLDER       # a million tokens in a call; a document in chunks

A short table is printed last, and rows are written to ``FOLDER/<device>.csv`` (``bench/results``
where it is not given). It needs this repository, torch, triton and transformers. ``--tiny``
(``--dry-run`` is the same) runs the same code in toy sizes on any machine, to see that it works:
its times mean nothing, and its rows are written only where ``--out`` says so. Without a GPU the
fused kernels run in it only where the environment has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, not installed

from bench import gpu_explain, gpu_kernels, gpu_long
from bench.harness import RESULTS, Row, device_name, write_rows


@dataclass(frozen=True)
class Set:
    """One set of measurements.

    Args:
        run: takes the device and whether sizes are toys; its rows, the table to print, and, a line
            each, what of ours failed.
        about: one line for the list of sets.
    """

    run: Callable[[torch.device, bool], tuple[list[Row], str, *tuple[str, ...]]]
    about: str


SETS = {
    "kernels": Set(gpu_kernels.run, "one attention call in each mode, forward and backward"),
    "explain": Set(gpu_explain.run, "explanations of 1024 tokens, every token, savings one by one"),
    "long": Set(gpu_long.run, "64k to 1M tokens in one call; 64 chunks of a 64k-token document"),
}


def main(arguments: list[str] | None = None) -> None:
    """Command line; exits 2 without a GPU, 1 where something of ours failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(f"{name}: {each.about}" for name, each in SETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("set", choices=sorted(SETS), help="what to measure")
    parser.add_argument("--out", type=Path, help="folder of the rows")
    parser.add_argument(
        "--tiny", "--dry-run", action="store_true", help="toy sizes, on a CPU where need be"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no GPU is here; --tiny runs the same code on a CPU, in toy sizes.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, table, *failures = SETS[options.set].run(device, options.tiny)
    out = options.out or (None if options.tiny else RESULTS)
    if out is not None:
        print(f"rows in {write_rows(rows, out)}", file=sys.stderr)
    toys = ", toy sizes: the times mean nothing" if options.tiny else ""
    print(f"{options.set} on {device_name(device)}{toys}\n{table}")
    if failures:
        sys.exit("\n".join(["FAILED", *failures]))


if __name__ == "__main__":
    main()
