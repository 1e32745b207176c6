"""The set ``long`` of ``bench/gpu.py``: very long inputs.

One attention call at 64k to 1M tokens, with one chunk of keys suppressed: time, and peak memory
beside the bytes of the tensors that must exist. Then a document of 64k tokens in 64 chunks, on as
many layers of an 8B-shaped Llama as memory allows: direct and exact effects with the prefix shared,
and direct effects the other way, every row with a copy of the prefix in its cache, until that runs
out of memory.

Legend: Hq/Hk query/key heads, T tokens, D head dim, P prompt tokens, B rows.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from atman_triton import attention, manipulate
from atman_triton.engine import Unit, undisturbed
from atman_triton.kernels.reference import attention_reference
from atman_triton.memory import out_of_memory
from atman_triton.testing import assert_close_to_oracle
from bench.allocations import peak_of
from bench.eager import attention_eager, modifier_matrix
from bench.explaining import FACTOR, MODE, LlamaShape, Task, check, make_task, spread
from bench.harness import Row, clock, seconds_of, summarise
from bench.memory import bytes_of, kept_by, spans

MODES = ("multiplicative", "min_shift")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run."""

    lengths: tuple[int, ...] = (1 << 16, 1 << 18, 1 << 20)
    heads: tuple[int, int, int] = (8, 2, 128)  # Hq, Hk, D
    shape: LlamaShape = LlamaShape("llama-8B", 4096, 32, 32, 8, 14336)  # noqa: RUF009
    prompt: int = 1 << 16
    chunks: int = 64
    exact: int = 8  # chunks whose exact effect is timed, and scaled
    target: int = 4
    copies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)  # rows of a batch


TOY = Sizes(
    lengths=(96, 160),
    heads=(4, 2, 16),
    shape=LlamaShape("llama-toy", 32, 2, 4, 2, 48, vocabulary=101),
    prompt=128,
    chunks=8,
    exact=3,
    target=3,
    copies=(1, 2),
)


# --- one call -------------------------------------------------------------------------------------


def call_inputs(
    tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key, value ``[1, H, T, D]``, and a 64th of the keys suppressed."""
    generator = torch.Generator(device).manual_seed(0)
    query_heads, key_heads, head_dim = heads

    def normal(count: int) -> Tensor:
        size = (1, count, tokens, head_dim)
        return torch.randn(size, device=device, dtype=dtype, generator=generator)

    factor = torch.ones(1, tokens, device=device)
    factor[:, tokens // 3 : tokens // 3 + max(1, tokens // 64)] = FACTOR
    return normal(query_heads), normal(key_heads), normal(key_heads), factor


def check_last_rows(output: Tensor, inputs: Sequence[Tensor], mode: str, rows: int = 8) -> None:
    """The last rows against float64: they see every key."""
    query, key, value, factor = inputs
    last = query[:, :, -rows:]
    tokens = key.shape[2]
    visible = torch.ones(rows, tokens, dtype=torch.bool, device=key.device).tril(tokens - rows)
    doubles = (part.double() for part in (last, key, value, factor))
    oracle = attention_reference(*doubles, mode=mode, causal=True, query_offset=tokens - rows)[0]
    matrix = modifier_matrix(factor, rows)
    eager = attention_eager(last, key, value, matrix, mode=mode, visible=visible)
    assert_close_to_oracle(output[:, :, -rows:], eager, oracle, name=f"{mode}, {tokens} tokens")


def calls(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[list[Row], list[str]]:
    """One attention call of each length and mode."""
    rows: list[Row] = []
    lines = [
        "one call, Hq{}-Hk{}-D{}, causal, a 64th of the keys suppressed".format(*sizes.heads),
        f"  {'tokens':>8} {'mode':<16}{'ms':>12}{'TFLOP/s':>9}{'peak GiB':>10}{'tensors GiB':>12}",
    ]
    for tokens in sizes.lengths:
        inputs = call_inputs(tokens, sizes.heads, dtype, device)
        for mode in MODES:

            def call(mode: str = mode, inputs: Sequence[Tensor] = inputs) -> Tensor:
                return attention(*inputs, mode=mode, causal=True)

            call()  # compiles
            peak, output = peak_of(call, device)
            check_last_rows(output, inputs, mode)
            held = sum(part.nbytes for part in (*inputs, output))
            most = peak.bytes + sum(part.nbytes for part in inputs)
            del output
            spent = [clock(call, device) for _ in range(3)]
            label = f"B1-Hq{sizes.heads[0]}-Hk{sizes.heads[1]}-T{tokens}-D{sizes.heads[2]}"
            what = f"attention forward, causal, long, {mode}"
            for metric, numbers in (("ms", spent), ("GiB", [most / _GIB])):
                rows += summarise(
                    {"atman (auto)": numbers},
                    what=what,
                    shape=label,
                    dtype=dtype,
                    device=device,
                    metric=metric,
                )
            milliseconds = rows[-2].median
            flops = 4 * sizes.heads[0] * sizes.heads[2] * tokens**2 / 2
            rate = flops / milliseconds / 1e9
            lines.append(
                f"  {tokens:>8} {mode:<16}{milliseconds:>12.2f}{rate:>9.3g}"
                f"{most / _GIB:>10.4f}{held / _GIB:>12.4f}"
            )
    return rows, lines


# --- a document in chunks -------------------------------------------------------------------------


def base_cache(task: Task, piece: int = 8192) -> DynamicCache:
    """Keys and values of the prompt without its last token."""
    cache = DynamicCache(config=task.model.config)
    with undisturbed(task.model):
        for part in task.prompt[None, :-1].split(piece, 1):
            task.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def copied_direct(task: Task, cache: DynamicCache, units: Sequence[Unit]) -> Tensor:
    """Direct effects, each row's cache a copy of the prefix: log-probabilities ``[B, T]``."""
    target = task.targets[0]
    tokens = torch.cat([task.prompt[-1:], target[:-1]]).expand(len(units), -1)
    copies = DynamicCache(config=task.model.config)
    for index, (keys, values) in enumerate(kept_by(cache)):
        copies.update(keys.repeat(len(units), 1, 1, 1), values.repeat(len(units), 1, 1, 1), index)
    factor = torch.ones(len(units), len(task.prompt) + len(target) - 1)
    for row, unit in zip(factor, units, strict=True):
        row[list(unit.positions)] = FACTOR
    with undisturbed(task.model), manipulate(task.model, factor, MODE):
        logits = task.model(tokens, past_key_values=copies, use_cache=True).logits
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logprobs.gather(2, target.expand(len(units), -1)[..., None])[..., 0].cpu()


def checked(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to time wrong scores: the same shape, two layers, a short prompt."""
    shape = dataclasses.replace(sizes.shape, layers=2)
    task = make_task(shape.model(dtype, device), 96, [sizes.target])
    units = spread(96 - 1, 48)
    base = copied_direct(task, base_cache(task), [Unit(())])
    copied = copied_direct(task, base_cache(task), [Unit((unit,)) for unit in units])
    check(
        task,
        {
            "exact": (task.scores(units), "total"),
            "direct": (task.scores(units, "direct"), "direct"),
            "direct, copied prefix": ((base - copied).T, "direct"),
        },
        units,
    )


def affordable(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> LlamaShape:
    """As many layers as fit into half of the free memory, their keys and values included."""
    shape = sizes.shape
    if device.type != "cuda":
        return shape
    free, _ = torch.cuda.mem_get_info(device)
    head = 2 * shape.vocabulary * shape.width
    weights = (shape.parameters - head) // shape.layers
    cache = 2 * shape.key_heads * (shape.width // shape.heads) * sizes.prompt
    layers = int((free / 2 / dtype.itemsize - head) // (weights + cache))
    if layers < 1:
        raise RuntimeError(f"not one layer of {shape.name} fits into {free / _GIB:.0f} GiB.")
    return dataclasses.replace(shape, layers=min(shape.layers, layers))


@dataclasses.dataclass
class Table:
    """What was measured of one document.

    Args:
        label: the shape, as rows name it.
    """

    label: str
    dtype: torch.dtype
    device: torch.device
    rows: list[Row] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)

    def record(self, name: str, call: Callable[[], object], scale: float = 1.0, above: int = 0):
        """Seconds of a call, and its peak with the ``above`` bytes that stood before it."""
        call()  # compiles, and fails here where memory runs out
        peak, _ = peak_of(call, self.device)
        seconds = seconds_of(call, self.device) * scale
        most = (peak.bytes + above) / _GIB
        for metric, number in (("s", seconds), ("GiB", most)):
            self.rows += summarise(
                {name: [number]},
                what=f"explanation of a long document, {MODE}",
                shape=self.label,
                dtype=self.dtype,
                device=self.device,
                metric=metric,
            )
        self.lines.append(f"  {name:<54}{seconds:>10.3f}{most:>28.3f}")


def with_shared_prefix(task: Task, sizes: Sizes, table: Table) -> None:
    """Base run, direct effects in batches, some exact effects."""
    units = spans(sizes.prompt, sizes.chunks)
    table.record("base run", task.engine)
    engine = task.engine()
    if engine.record.reasons:
        raise RuntimeError(f"the prefix was not shared: {engine.record.reasons}.")
    kept = engine.record.prefix_bytes
    with undisturbed(task.model):
        for count in sizes.copies:
            some = units[:count]
            name = f"direct, {count} chunks in a batch, prefix shared"
            table.record(name, lambda some=some: engine.perturb(some, "direct"), above=kept)
        chosen = [units[place] for place in spread(len(units), sizes.exact)]
        run = [sum(sizes.prompt - unit.positions[0] for unit in some) for some in (chosen, units)]
        name = f"exact, prefix shared ({len(chosen)} of {len(units)} chunks, scaled)"
        table.record(name, lambda: engine.perturb(chosen), run[1] / run[0], above=kept)


def with_copied_prefix(task: Task, sizes: Sizes, table: Table) -> None:
    """Direct effects in batches, until memory runs out."""
    cache = base_cache(task)
    held = bytes_of(kept_by(cache))
    for count in sizes.copies:
        name = f"direct, {count} chunks in a batch, prefix copied"
        some = spans(sizes.prompt, sizes.chunks)[:count]
        try:
            table.record(name, lambda some=some: copied_direct(task, cache, some), above=held)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            table.lines.append(f"  {name:<54}{'out of memory':>38}")
            return


def document(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[list[Row], list[str]]:
    """A document in chunks, with the prefix shared and with copies of it."""
    checked(sizes, dtype, device)
    shape = affordable(sizes, dtype, device)
    task = make_task(
        shape.model(dtype, device, sizes.prompt + sizes.target), sizes.prompt, [sizes.target]
    )
    label = f"{shape.name}-layers{shape.layers}-prompt{sizes.prompt}-target{sizes.target}"
    table = Table(label, dtype, device)
    table.lines += [label, f"  {'':<54}{'s':>10}{'peak GiB above the weights':>28}"]
    with_shared_prefix(task, sizes, table)
    gc.collect()
    with_copied_prefix(task, sizes, table)
    table.lines.append(f"  weights: {shape.parameters * dtype.itemsize / _GIB:.3f} GiB")
    return table.rows, table.lines


def run(device: torch.device, tiny: bool) -> tuple[list[Row], str]:
    """Both parts: rows, and the table."""
    sizes = TOY if tiny else Sizes()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, lines = calls(sizes, dtype, device)
    print("one call: done", file=sys.stderr, flush=True)
    more, table = document(sizes, dtype, device)
    return rows + more, "\n".join([*lines, *table])
