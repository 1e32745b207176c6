"""A whole explanation, every prompt token, against a loop of eager forwards with full logits.

``python -m pytest bench/test_bench_explain.py -s`` prints how many times faster ours are: exact
total effects, which are what the loop computes, and direct ones, which are another quantity.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.explain_scaling import explained
from bench.explaining import LLAMA_34M, LOOP, MODE, LlamaShape, check, make_task, spread
from bench.harness import interleave, report, summarise, write_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS, DIRECT = "atman exact", "atman direct"


@dataclasses.dataclass(frozen=True)
class Case:
    """A randomly initialised Llama and a text for it."""

    shape: LlamaShape
    dtype: torch.dtype
    prompt: int
    target: int
    loop_units: int  # the loop is timed on that many, and scaled to all
    exact: float | None = None  # so many times faster than the loop must ours be
    direct: float | None = None

    def __str__(self) -> str:
        return f"{self.shape.name}-prompt{self.prompt}-target{self.target}"


CASES = [Case(LLAMA_34M, torch.float32, 256, 8, 256, exact=4.0, direct=20.0)]
if DEVICE.type == "cuda":
    llama_1b = LlamaShape("llama-1B", 2048, 16, 32, 8, 8192)
    CASES.append(Case(llama_1b, torch.bfloat16, 1024, 8, 10))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_explanation(benchmark, case: Case) -> None:
    task = make_task(case.shape.model(case.dtype, DEVICE), case.prompt, [case.target])
    timed = spread(case.prompt, case.loop_units)
    scale = (case.prompt + 1) / (len(timed) + 1)  # with the run that suppresses nothing
    name = LOOP
    if scale > 1:
        name += f" ({len(timed)} of {case.prompt} units, scaled)"
    some = spread(case.prompt, 8)
    exact, direct = explained(task, "exact"), explained(task, "direct")
    check(task, {DIRECT: (direct[:, some], "direct")}, some)
    eager = task.loop(some)
    times = interleave(
        benchmark,
        OURS,
        {
            OURS: lambda: explained(task, "exact"),
            DIRECT: lambda: explained(task, "direct"),
            name: lambda: task.loop(timed),
        },
        outputs={OURS: exact[:, some].to(DEVICE), name: eager},
        eager=eager,
        oracle=task.doubled().loop(some),
        device=DEVICE,
        rounds=3,
        checked=(DIRECT,),
    )
    times[name] = [spent * scale for spent in times[name]]
    rows = summarise(
        times, what=f"explanation, {MODE}", shape=str(case), dtype=case.dtype, device=DEVICE
    )
    write_rows(rows)
    loop = rows[2].median
    ratios = {"exact": loop / rows[0].median, "direct": loop / rows[1].median}
    said = " and ".join(f"{method} {ratio:.1f}x" for method, ratio in ratios.items())
    print(f"\n{report(rows, OURS)}\n  faster than the loop: {said}")
    for method, least in (("exact", case.exact), ("direct", case.direct)):
        ratio = ratios[method]
        assert least is None or ratio >= least, f"{method}: {ratio:.1f}x is below {least:g}x"
