"""Find tiles by timing, and write those that beat the rules to ``kernels/tuned.json``.

::

    python -m bench.tune --out kernels/tuned.json               # on a GPU
    python -m bench.tune --compile-only --architecture sm_90    # what would be timed; without one
    python -m bench.tune --dry-run                              # the whole path, in toy sizes

For each setting (kernel, head dim, mode, causal or full; most important first) tiles of many sizes
are compiled, and those that spill or need too much shared memory are dropped. The rest must pass
the check that ``bench/gpu_kernels.py`` makes of every provider. Then, for each bucket of lengths,
they are timed in turns with the rule's own tiles; of the fastest, what can be switched is switched.
The best is timed against the rule once more, in turns and many times, because the least of many
medians is low by luck: a row is written only if its median in these last turns lies below the
rule's by more than the spread, which is the larger of the two distances between 20% and 80%
quantiles. It must also compile cleanly with the hardest features that a row serves.

The direction ``hopper`` is the Hopper kernel's (sm_90). Its tiles are checked in other processes,
as ``hopper_gate.py`` does first of all, since wrong ones can hang.

An existing file is merged with: rows of other devices and Triton versions stay, and of what is
timed anew the old row goes, whether or not there is a new one. What time does not allow is named.

Legend: B batch, Hq/Hk query/key heads, T tokens, D head dim.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read by triton when a kernel is defined, so it must precede every import of our kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

from atman_triton.kernels import tuned
from atman_triton.kernels.configs import device_architecture, device_name
from atman_triton.kernels.hopper_tiles import HopperConfig
from atman_triton.kernels.tuned import (
    HOPPER,
    Measurement,
    Problem,
    Row,
    Table,
    TileConfig,
    Tiles,
    in_use,
)
from bench.compile_report import ARCHITECTURES
from bench.gpu_kernels import MODES, Gate, attempt, call_of, check_rows, milliseconds
from bench.harness import commit, summarise
from bench.hopper_gate import on_hopper
from bench.hopper_gate import verdict as verdict_of_gate
from bench.kernel_cases import HEADS, Case, case_of, inputs_of
from bench.rivals import OURS, OURS_HOPPER, atman
from bench.tune_candidates import (
    DIRECTIONS,
    QUERIES,
    Setting,
    clean,
    compiled,
    options,
    served_cases,
    settings,
    shapes,
)
from bench.tune_hopper import text_of, verdicts_apart

TOKENS = {"above": 8192, "4k": 4096, "1k": 1024}  # what stands for each bucket of lengths
HEAD_DIMS = (128, 64, 256)
SM_90 = "sm_90"  # where there is a Hopper kernel
TOY = 16  # the head dim of a dry run


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is tuned for, and how thoroughly.

    Args:
        architecture: of the rows; ``compiled_for`` is that of the check by compiling.
        screening, confirming: turns of every tile, and of the best beside the rule.
        stop: when no further setting is begun, on the clock of ``time.perf_counter``.
        workers: processes that compile and check tiles for the device; 0 is this process.
        toy: sizes mean nothing.
    """

    device: torch.device
    dtype: torch.dtype
    architecture: str
    compiled_for: str
    screening: int
    confirming: int
    stop: float
    workers: int = 0
    toy: bool = False


def table_of(setting: Setting, architecture: str, dtype: torch.dtype, tiles: Tiles) -> Table:
    """A table that gives a setting these tiles, whatever the length."""
    kind = "float32" if dtype == torch.float32 else "half"
    tried = Measurement(1.0, 2.0, 0.0, "", "", triton.__version__, "", "", "")
    return Table(
        [
            Row(
                Problem(
                    architecture,
                    setting.kernel,
                    setting.head_dim,
                    setting.head_dim,
                    kind,
                    setting.mode,
                    setting.causal,
                    length,
                ),
                tiles,
                tried,
            )
            for length in tuned.LENGTHS
        ]
    )


def timed_case(setting: Setting, length: str, toy: bool) -> Case:
    """The call that stands for a bucket of lengths."""
    if toy:
        return Case(1, 2, 1, 40, setting.head_dim, setting.causal, setting.backward, flex=False)
    heads = next(name for name, (*_, head_dim) in HEADS.items() if head_dim == setting.head_dim)
    return case_of(heads, TOKENS[length], setting.causal, setting.backward, flex=False)


def call_to_time(
    setting: Setting, inputs: Sequence[Tensor], table: Table
) -> Callable[[], tuple[Tensor, ...]]:
    """The call under a table; of a backward kernel the backward pass alone."""
    attend = atman(setting.mode, setting.causal, _backend(setting))
    if setting.backward:
        *tensors, gradient = inputs
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = attend(*leaves)

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output, leaves, gradient, retain_graph=True)
    else:
        call = call_of(attend, inputs, backward=False)

    def under_table() -> tuple[Tensor, ...]:
        with in_use(table):
            return call()

    return under_table


def in_turns(
    calls: dict[Tiles, Callable[[], Any]], turns: int, device: torch.device
) -> dict[Tiles, list[float]]:
    """Milliseconds of calls that have run before, in a new random order each round."""
    times: dict[Tiles, list[float]] = {tiles: [] for tiles in calls}
    order, names = random.Random(0), list(calls)
    for _ in range(turns):
        order.shuffle(names)
        for tiles in names:
            times[tiles].append(milliseconds(calls[tiles], device))
    return times


def median(times: Sequence[float]) -> float:
    return torch.tensor(times, dtype=torch.float64).median().item()


def confirmed(
    times: dict[Tiles, list[float]], rule: Tiles, best: Tiles, **about: Any
) -> Measurement | None:
    """The measurement of the best beside the rule, if it is faster by more than the spread."""
    device, dtype, shape = about["device"], about["dtype"], about["shape"]
    ours, rules = (
        summarise({"tiles": times[tiles]}, what="tiles", shape=shape, dtype=dtype, device=device)[0]
        for tiles in (best, rule)
    )
    spread = max(row.p80 - row.p20 for row in (ours, rules))
    if not rules.median - ours.median > spread:
        return None
    return Measurement(
        ms=ours.median,
        rule_ms=rules.median,
        spread_ms=round(spread, 4),
        shape=shape,
        device=device_name(device, device.type != "cuda"),
        triton=triton.__version__,
        torch=ours.torch,
        date=ours.date,
        commit=commit(),
    )


def verdict(setting: Setting, machine: Machine, tiles: Tiles, case: Case) -> str | None:
    """Why tiles must not be timed: what the gate says of the small shape.

    Compiles them as they are launched, and leaves that in Triton's cache for other processes.
    """
    with in_use(table_of(setting, machine.architecture, machine.dtype, tiles)):
        try:
            provider = OURS_HOPPER if setting.kernel == HOPPER else OURS
            return Gate(machine.dtype, machine.device).reason(case, setting.mode, provider)
        except torch.AcceleratorError as error:
            if not machine.workers:
                raise
            return f"the device was lost: {str(error).splitlines()[0]}"


def _backend(setting: Setting) -> str:
    return HOPPER if setting.kernel == HOPPER else "triton"


class Tuner:
    """One setting: its tiles, compiled and checked once, timed for each bucket of lengths."""

    def __init__(
        self,
        setting: Setting,
        machine: Machine,
        say: Callable[[str], None],
        pool: Executor | None = None,
    ) -> None:
        self.setting, self.machine, self.say, self._pool = setting, machine, say, pool
        tokens = timed_case(setting, "above", machine.toy).tokens
        self.rule = setting.rule(machine.architecture, tokens, machine.dtype)
        self._verdicts: dict[Tiles, str | None] = {}

    def tried(self) -> list[Tiles]:
        """The rule's tiles and the others that compile."""
        every = shapes(self.setting, self.machine.compiled_for, self.rule)
        if self.machine.toy and isinstance(self.rule, TileConfig):
            smaller = dataclasses.replace(self.rule, block_m=32, block_n=32)
            every = list(dict.fromkeys([self.rule, smaller]))
        return list(dict.fromkeys([self.rule, *self._that_compile(every)]))

    def _that_compile(self, every: Sequence[Tiles]) -> list[Tiles]:
        found = [tiles for tiles, _ in clean(self.setting, self.machine.compiled_for, every)]
        self.say(f"{len(found)} of {len(every)} tiles compile cleanly")
        return found

    def check(self, tried: Sequence[Tiles], case: Case) -> None:
        """Ask the gate about tiles, each once, in other processes where there are some."""
        new = [tiles for tiles in tried if tiles not in self._verdicts]
        if self.setting.kernel == HOPPER:
            own = [tiles for tiles in new if isinstance(tiles, HopperConfig)]
            found = verdicts_apart(self.setting, self.machine, own, case)
            self._verdicts |= dict(zip(own, found, strict=True))
            return
        asked = ([self.setting] * len(new), [self.machine] * len(new), new, [case] * len(new))
        found = self._pool.map(verdict, *asked) if self._pool else map(verdict, *asked)
        self._verdicts |= dict(zip(new, found, strict=True))

    def _table(self, tiles: Tiles) -> Table:
        machine = self.machine
        return table_of(self.setting, machine.architecture, machine.dtype, tiles)

    def calls(
        self, tried: Sequence[Tiles], case: Case, inputs: list[Tensor]
    ) -> dict[Tiles, Callable[[], Any]]:
        """The calls of all tiles that are right, each run once; those that are not are named."""
        self.check(tried, case)
        right = None
        if not self.setting.backward:
            right = check_rows(case, self.setting.mode, inputs)
        ready = {}
        for tiles in tried:
            reason = self._verdicts[tiles]
            if reason is None:
                call = call_to_time(self.setting, inputs, self._table(tiles))
                got, reason = attempt(call)
                if reason is None and right is not None:
                    _, reason = attempt(lambda got=got: right(got[0]))
            if reason is None:
                ready[tiles] = call
            else:
                self.say(f"not timed: {_text(tiles)}: {reason}")
        return ready

    def tune(self, tried: Sequence[Tiles], length: str) -> Row | None:
        """The best tiles for a bucket of lengths, where they beat the rule's."""
        machine = self.machine
        case = timed_case(self.setting, length, machine.toy)
        inputs = inputs_of(case, machine.dtype, machine.device)
        calls = self.calls(tried, case, inputs)
        if self.rule not in calls:
            raise RuntimeError(f"{self.setting}: the rule's own tiles could not be timed.")
        medians = self._medians(calls)
        leader = min(medians, key=medians.__getitem__)
        new = [tiles for tiles in options(self.setting, leader) if tiles not in calls]
        if new:
            more = self.calls(self._that_compile(new), case, inputs)
            calls |= more
            medians |= self._medians({leader: calls[leader]} | more)
        for best in sorted(medians, key=medians.__getitem__):
            if best == self.rule:
                break
            served = served_cases(self.setting, machine.compiled_for, best)
            problems = [report["problems"] for report in compiled(served) if report["problems"]]
            if problems:
                self.say(f"not taken: {_text(best)}: {problems[0]} with other features")
                continue
            pair = {tiles: calls[tiles] for tiles in (self.rule, best)}
            times = in_turns(pair, machine.confirming, machine.device)
            about = {"device": machine.device, "dtype": machine.dtype, "shape": case.shape}
            measured = confirmed(times, self.rule, best, **about)
            if measured is not None:
                problem = self._table(best).rows[0].problem
                return Row(dataclasses.replace(problem, length=length), best, measured)
            break  # those that follow were slower still
        return None

    def _medians(self, calls: dict[Tiles, Callable[[], Any]]) -> dict[Tiles, float]:
        times = in_turns(calls, self.machine.screening, self.machine.device)
        return {tiles: median(spent) for tiles, spent in times.items()}


def _text(tiles: Tiles) -> str:
    if isinstance(tiles, HopperConfig):
        return text_of(tiles)
    switched = "+skip" * tiles.skip_plain_tiles + "+persistent" * tiles.persistent
    return (
        f"{tiles.block_m}x{tiles.block_n} {tiles.num_warps} warps {tiles.num_stages} stages "
        f"({tiles.edge_stages} at edges){switched}"
    )


def merged(old: Sequence[Row], new: Sequence[Row], measured: set[tuple[Any, ...]]) -> list[Row]:
    """Old rows but those of places that were measured anew, and the new ones."""
    return [row for row in old if row.place not in measured] + list(new)


def tune(
    machine: Machine,
    wanted: Sequence[Setting],
    out: Path | None,
    pool: Executor | None = None,
) -> tuple[list[Row], str]:
    """All settings that time allows: new rows, and the lines to print. ``out`` grows with each."""
    old = tuned.load(out).rows if out is not None and out.exists() else ()
    rows: list[Row] = []
    measured: set[tuple[Any, ...]] = set()
    lines, left = [], []
    lengths = ("1k",) if machine.toy else tuple(TOKENS)
    for number, setting in enumerate(wanted):
        if time.perf_counter() > machine.stop:
            left = [f"  {each}" for each in wanted[number:]]
            break
        say = _sayer(f"[{number + 1}/{len(wanted)}] {setting}")
        tuner = Tuner(setting, machine, say, pool)
        with in_use(Table([])):  # the rule, whatever the file says
            tried = tuner.tried()
            for length in lengths:
                if time.perf_counter() > machine.stop:
                    left.append(f"  {setting}, keys {length}")
                    continue
                row, reason = attempt(lambda: tuner.tune(tried, length))  # noqa: B023
                lines.append(f"{setting}, keys {length}: {_told(row, reason)}")
                say(lines[-1])
                if reason is None:
                    problem = table_of(setting, machine.architecture, machine.dtype, tuner.rule)
                    problem = dataclasses.replace(problem.rows[0].problem, length=length)
                    name = device_name(machine.device, machine.device.type != "cuda")
                    measured.add((problem, tuned.release(triton.__version__), name))
                rows += [row] * (row is not None)
                if machine.device.type == "cuda":
                    torch.cuda.empty_cache()
        if out is not None:
            tuned.save(merged(old, rows, measured), out)
    if left:
        lines += [f"not reached: {len(left)}", *left]
    return rows, "\n".join(lines)


def _told(row: Row | None, reason: str | None) -> str:
    if reason is not None:
        return f"failed: {reason}"
    if row is None:
        return "the rule stays"
    faster = row.measured.rule_ms / row.measured.ms
    return f"{_text(row.tiles)}, {faster:.3f} times as fast as the rule"


def _sayer(prefix: str) -> Callable[[str], None]:
    return lambda text: print(f"{prefix}: {text}", file=sys.stderr, flush=True)


def survivors(wanted: Sequence[Setting], architecture: str) -> Iterator[str]:
    """What would be timed, with registers of a thread and shared memory; compiles only."""
    for setting in wanted:
        rule = setting.rule(architecture, QUERIES, torch.bfloat16)
        tried = list(dict.fromkeys([*shapes(setting, architecture, rule), *options(setting, rule)]))
        _sayer(architecture)(f"{setting}: compiling {len(tried)} tiles ...")
        kept = list(clean(setting, architecture, tried))
        yield f"{setting}: {len(kept)} of {len(tried)} compile cleanly"
        for tiles, report in kept:
            mark = " (the rule)" if tiles == rule else ""
            numbers = f"{report['registers']} registers, {report['shared']} bytes shared"
            yield f"  {_text(tiles)}: {numbers}{mark}"


def main(arguments: list[str] | None = None) -> None:
    """Command line; exits 2 on bad usage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the file of rows, merged with what it holds")
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=tuple(DIRECTIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--minutes", type=float, help="nothing is begun after that; 8, or 1 in a dry run"
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="with --compile-only")
    parser.add_argument("--compile-only", action="store_true", help="print what would be timed")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes; times mean nothing")
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    here = device_architecture(device, False) if cuda else None
    if given.compile_only:
        architecture = given.architecture or here
        if architecture is None:
            parser.error("no GPU is here: --architecture says what to compile for.")
        directions = [each for each in given.directions if each != HOPPER or architecture == SM_90]
        for line in survivors(settings(directions, given.head_dims, given.modes), architecture):
            print(line, flush=True)
        return
    if not cuda and not given.dry_run:
        parser.error("no GPU is here; --dry-run runs the same code on a CPU, in toy sizes.")
    if given.out is None and not given.dry_run:
        parser.error("--out says where rows go, for example kernels/tuned.json.")
    began = time.perf_counter()
    toy = given.dry_run
    minutes = (1.0 if toy else 8.0) if given.minutes is None else given.minutes
    machine = Machine(
        device=device,
        dtype=torch.bfloat16 if cuda else torch.float32,
        architecture=here or "interpreter",
        compiled_for=given.architecture or here or "sm_90",
        screening=1 if toy else 7,
        confirming=3 if toy else 40,
        stop=began + 60 * minutes,
        workers=min(8, os.cpu_count() or 1) if cuda else 0,
        toy=toy,
    )
    directions, trouble = list(given.directions), None
    if HOPPER in directions:
        trouble = verdict_of_gate() if on_hopper(device) else None
        if trouble is not None or not on_hopper(device):
            directions.remove(HOPPER)
            reason = trouble or "needs a Hopper GPU (sm_90)"
            print(f"the direction {HOPPER} is left out: it {reason}", file=sys.stderr)
    wanted = settings(directions, (TOY,) if toy else given.head_dims, given.modes)
    with contextlib.ExitStack() as opened:
        pool = None
        if machine.workers:
            pool = ProcessPoolExecutor(machine.workers, multiprocessing.get_context("spawn"))
            opened.enter_context(pool)
        rows, text = tune(machine, wanted, given.out, pool)
    print(text)
    if toy:
        print("toy sizes: the times mean nothing")
    if given.out is not None:
        print(f"{len(rows)} rows written to {given.out}")
    if trouble is not None:
        sys.exit(f"FAILED\n{OURS_HOPPER} {trouble}")


if __name__ == "__main__":
    main()
