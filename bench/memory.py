"""What an explanation takes beside the weights: at batch 1, behind a prefix, of 100 000 tokens.

Three tables, mode ``min_shift``, random weights::

    python -m bench.memory                       # activations at batch 1, and no copy of a prefix
    python -m bench.memory activations --lengths 256 4096
    python -m bench.memory prefix
    python -m bench.memory long                  # 100 000 tokens in 64 units: tens of minutes

``activations``: the peak of the base run, of one exact and of one direct perturbation at batch 1,
above the weights, beside a plain forward with a cache and one position's logits. Keys and values
that stay are subtracted on both sides; the ratio may not be above 1.10. ``prefix``: the peak of
batches at 16 384 tokens beside what a copy of the prefix for each row would take. ``long``: time
and peak of a document of 64 units.

Peaks on a CPU are counted allocation by allocation (``bench/allocations.py``), those of ``long`` by
the operating system. Other work on the machine does not change them. Rows go to
``bench/results/<device>.csv``; ``--no-times`` leaves seconds out, for a machine that is not idle.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from atman_triton.engine import Effect, Engine, Unit, undisturbed
from bench.allocations import Peak, peak_of, resident_peak
from bench.explaining import LLAMA_34M, MODE, LlamaShape, Task, check, make_task, spread
from bench.harness import RESULTS, Row, summarise, write_rows

LENGTHS = (256, 512, 1024, 2048, 4096)
LIMIT = 1.10
PREFIX_SHAPE = LlamaShape("llama-1M", 128, 2, 4, 2, 256, vocabulary=512)
PREFIX_TOKENS, PREFIX_ROWS = 16384, {"direct": 16, "exact": 4}
LONG_SHAPE = LlamaShape("llama-2-layers-1-head", 32, 2, 1, 1, 64, vocabulary=256)
LONG_TOKENS, LONG_UNITS = 100_000, 64
EFFECTS: dict[str, Effect] = {"exact": "total", "direct": "direct"}
_MIB = 2**20
_CHECKED_TOKENS = 64  # the same model is checked on so many, whatever the length that is measured


def checked(shape: LlamaShape, device: torch.device, target: int) -> None:
    """Refuse to measure a model whose scores are wrong."""
    task = make_task(shape.model(torch.float32, device), _CHECKED_TOKENS, [target])
    units = spread(_CHECKED_TOKENS, 8)
    check(
        task,
        {name: (task.scores(units, effect), effect) for name, effect in EFFECTS.items()},
        units,
    )


def row_of(what: str, provider: str, shape: str, metric: str, value: float, task: Task) -> Row:
    """One row of a number that is exact, so its quantiles are equal."""
    (row,) = summarise(
        {provider: [value]},
        what=what,
        shape=shape,
        dtype=task.model.dtype,
        device=task.model.device,
        metric=metric,
    )
    return row


# --- activations at batch 1 -----------------------------------------------------------------------


def kept_by(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def bytes_of(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """What keys and values take."""
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def plain_forward(task: Task) -> tuple[Peak, int]:
    """A forward pass with a cache and one position's logits: its peak, and the cache's bytes."""
    model = task.model
    tokens = torch.cat([task.prompt, task.targets[0][:-1]])[None]
    before = model.config._attn_implementation or "eager"
    model.set_attn_implementation("sdpa")
    try:
        with undisturbed(model):

            def forward() -> Any:
                return model(
                    tokens,
                    use_cache=True,
                    logits_to_keep=1,
                    past_key_values=DynamicCache(config=model.config),
                )

            forward()  # buffers that are made once
            peak, output = peak_of(forward, model.device)
    finally:
        model.set_attn_implementation(before)
    return peak, bytes_of(kept_by(output.past_key_values))


def phases(task: Task) -> dict[str, tuple[Peak, int]]:
    """Each phase of an explanation at batch 1: its peak, and what of it stays as the prefix.

    The exact perturbation is the widest, that of the first token.
    """
    task.engine(batch_size=1)  # tries out once per model whether a prefix can be shared
    device = task.model.device
    peak, engine = peak_of(lambda: task.engine(batch_size=1), device)
    found = {"base run": (peak, engine.record.prefix_bytes)}
    with undisturbed(task.model):
        for name, effect in EFFECTS.items():
            peak, _ = peak_of(lambda effect=effect: engine.perturb([Unit((0,))], effect), device)
            found[f"{name} perturbation"] = (peak, 0)
    return found


def activations(lengths: Sequence[int], shape: LlamaShape, device: torch.device) -> list[Row]:
    """The table of activation peaks; what stands at a peak above the limit goes to stderr."""
    what = f"activation peak at batch 1, {MODE}"
    checked(shape, device, 8)
    model = shape.model(torch.float32, device, max(lengths) + 8)
    rows = []
    print(
        f"{'tokens':>7} {'phase':<22}{'peak MiB':>10}{'keys, values':>14}{'rest':>10}{'ratio':>8}"
    )
    for length in lengths:
        task = make_task(model, length, [8])
        name = f"{shape.name}-prompt{length}-target8"
        found = {"plain forward": plain_forward(task), **phases(task)}
        plain = found["plain forward"][0].bytes - found["plain forward"][1]
        for phase, (peak, stays) in found.items():
            rest = peak.bytes - stays
            sizes = f"{peak.bytes / _MIB:>10.2f}{stays / _MIB:>14.2f}{rest / _MIB:>10.2f}"
            print(f"{length:>7} {phase:<22}{sizes}{rest / plain:>8.3f}", flush=True)
            rows.append(row_of(what, phase, name, "MiB", rest / _MIB, task))
            if rest > LIMIT * plain:
                for size, source in peak.standing[:6]:
                    print(f"          {size / _MIB:8.2f} MiB  {source}", file=sys.stderr)
    return rows


def above_limit(rows: Sequence[Row]) -> list[str]:
    """Phases that take more than ``LIMIT`` times what a plain forward takes."""
    plain = {row.shape: row.median for row in rows if row.provider == "plain forward"}
    return [
        f"{row.provider} of {row.shape}: {row.median / plain[row.shape]:.2f} times a plain forward"
        for row in rows
        if row.median > LIMIT * plain[row.shape]
    ]


# --- no copy of the prefix per row ----------------------------------------------------------------


def prefix(tokens: int, shape: LlamaShape, device: torch.device) -> list[Row]:
    """The table of batches behind a long prefix.

    The copy that is spoken of is that of one layer at a time, the least that copying could take.
    Units stand near the end, so that exact rows too have most of the prompt in front of them.
    """
    what = f"peak of a batch behind a prefix, {MODE}"
    checked(shape, device, 4)
    task = make_task(shape.model(torch.float32, device, tokens + 4), tokens, [4])
    rows = []
    print(f"{'method':<8}{'rows':>6}{'peak MiB':>10}{'a copy per row, one layer':>28}{'share':>8}")
    for name, count in PREFIX_ROWS.items():
        engine = task.engine(batch_size=count)
        first = tokens - tokens // 64
        units = [Unit((first + 2 * place,)) for place in range(count)]
        before = len(engine.record.batch_sizes)
        with undisturbed(task.model):
            peak, _ = peak_of(lambda: engine.perturb(units, EFFECTS[name]), device)  # noqa: B023
        if engine.record.batch_sizes[before:] != [count] or engine.record.reasons:
            raise RuntimeError(f"{count} rows were to run as one batch behind a shared prefix.")
        seen = first if name == "exact" else tokens - 1
        head_dim = shape.width // shape.heads
        copies = count * 2 * 4 * shape.key_heads * head_dim * seen  # keys and values, float32
        share = peak.bytes / copies
        sizes = f"{peak.bytes / _MIB:>10.2f}{copies / _MIB:>28.2f}{share:>8.2f}"
        print(f"{name:<8}{count:>6}{sizes}", flush=True)
        label = f"{shape.name}-prompt{tokens}-target4-rows{count}"
        rows.append(row_of(what, name, label, "MiB", peak.bytes / _MIB, task))
        rows.append(row_of(what, f"copies for {name}", label, "MiB", copies / _MIB, task))
        if share > 1:
            for size, source in peak.standing[:6]:
                print(f"          {size / _MIB:8.2f} MiB  {source}", file=sys.stderr)
    return rows


# --- 100 000 tokens -------------------------------------------------------------------------------


def spans(tokens: int, units: int) -> list[Unit]:
    """The whole prompt in so many equal units; the last has what is left."""
    cuts = [place * tokens // units for place in range(units + 1)]
    return [Unit(tuple(range(a, b))) for a, b in pairwise(cuts)]


def long(
    tokens: int, units: int, shape: LlamaShape, device: torch.device, times: bool
) -> list[Row]:
    """The table of a long document, every unit explained."""
    what = f"explanation of a long document, {MODE}"
    checked(shape, device, 4)
    task = make_task(shape.model(torch.float32, device, tokens + 4), tokens, [4])
    label = f"{shape.name}-prompt{tokens}-target4-units{units}"
    rows = []
    print(f"{'phase':<10}{'seconds':>10}{'peak MiB':>10}   {label}")

    def measured(name: str, call: Any) -> Any:
        started = time.perf_counter()
        if device.type == "cuda":
            found, result = peak_of(call, device)
            peak = found.bytes
        else:
            peak, result = resident_peak(call)
        seconds = time.perf_counter() - started
        print(f"{name:<10}{seconds:>10.1f}{peak / _MIB:>10.1f}", flush=True)
        rows.append(row_of(what, name, label, "MiB", peak / _MIB, task))
        if times:
            rows.append(row_of(what, name, label, "s", seconds, task))
        return result

    engine: Engine = measured("base run", task.engine)
    if engine.record.reasons:
        raise RuntimeError(f"the prefix was not shared: {engine.record.reasons}.")
    print(f"keys and values that stay: {engine.record.prefix_bytes / _MIB:.1f} MiB")
    with undisturbed(task.model):
        effects: tuple[tuple[str, Effect], ...] = (("direct", "direct"), ("exact", "total"))
        for name, effect in effects:
            found = measured(name, partial(engine.perturb, spans(tokens, units), effect))
            if not bool(found.isfinite().all()):
                raise AssertionError(f"{name} gave scores that are not finite.")
    return rows


def main(arguments: list[str] | None = None, shape: LlamaShape | None = None) -> int:
    """Command line; 1 if an activation peak is above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help="activations, prefix, long; the first two"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of activations")
    parser.add_argument("--tokens", type=int, help="of the prompt, for prefix and long")
    parser.add_argument("--units", type=int, default=LONG_UNITS, help="of the long document")
    parser.add_argument("--no-times", action="store_true", help="record no seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    tables = options.tables or ["activations", "prefix"]
    if unknown := set(tables) - {"activations", "prefix", "long"}:
        parser.error(f"tables are activations, prefix and long, got {', '.join(sorted(unknown))}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures: list[str] = []
    for table in tables:
        if table == "activations":
            rows = activations(options.lengths, shape or LLAMA_34M, device)
            failures = above_limit(rows)
        elif table == "prefix":
            rows = prefix(options.tokens or PREFIX_TOKENS, shape or PREFIX_SHAPE, device)
        else:
            tokens = options.tokens or LONG_TOKENS
            rows = long(tokens, options.units, shape or LONG_SHAPE, device, not options.no_times)
        print(f"rows in {write_rows(rows, options.out)}", file=sys.stderr, flush=True)
    for failure in failures:
        print(f"above {LIMIT:.2f}: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
