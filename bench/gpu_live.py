"""Live citations beside plain generation, for the set ``explain`` of ``bench/gpu.py``.

The same prompt, the same number of new tokens, in turns. Before it, the shape with two layers must
write the text of plain generation and the log-probabilities of a direct explanation of it, in
float32 (in half precision the likeliest tokens are often equal to the last bit); and in the dtype
that is timed, scores as close to float64 as a loop of eager forwards has them, for its own text.

A third provider is plain generation from a static cache with the model compiled, on a GPU into CUDA
graphs: what the host's time costs the other two. It is taken of small models only, since it
compiles for long.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CompileConfig

from atman_triton.live import EVERY
from atman_triton.testing import assert_close_to_oracle
from bench.explaining import FACTOR, MODE, LlamaShape, Task, make_task
from bench.harness import Row, summarise, take_turns
from bench.live import LIVE, PLAIN, WHAT, Case, rows_of

UNITS = 20
COMPILED = f"{PLAIN}, static cache, compiled"


@dataclasses.dataclass(frozen=True)
class LiveSizes:
    """How much is generated."""

    new_tokens: int = 64
    gate_prompt: int = 96
    gate_tokens: int = 8
    seconds: float = 20.0  # about, of all rounds
    rounds: int = 5
    compiled: int = 2 * 10**9  # parameters up to which a compiled model is timed too


TOY = LiveSizes(new_tokens=4, gate_prompt=40, gate_tokens=3, seconds=1.0, rounds=2)


def case_of(model: Any, prompt: int, new_tokens: int) -> Case:
    """20 units, scored as often as is the default on the model's device."""
    return Case(model, prompt, UNITS, new_tokens, EVERY.get(model.device.type, 1))


def checked(shape: LlamaShape, dtype: torch.dtype, device: torch.device, sizes: LiveSizes) -> None:
    """Refuse to time another text or wrong scores.

    Raises: AssertionError: if either is found.
    """
    small = dataclasses.replace(shape, layers=2)
    positions = sizes.gate_prompt + sizes.gate_tokens
    for each in dict.fromkeys((torch.float32, dtype)):
        case = case_of(small.model(each, device, positions), sizes.gate_prompt, sizes.gate_tokens)
        if each == torch.float32:
            case.check()
        check_scores(case)


def check_scores(case: Case) -> None:
    """Scores of the text that is written live, by the tolerance rule.

    Raises: AssertionError: if they are wrong.
    """
    found = case.live()
    rows = torch.stack([token.logprobs for token in found])  # [T, 1 + U]
    task = make_task(case.model, len(case.ids), [1])
    written = torch.tensor([token.token_id for token in found], device=case.model.device)
    task = dataclasses.replace(task, prompt=case.ids.to(case.model.device), targets=(written,))
    units: Any = [list(unit) for unit in case.units]
    assert_close_to_oracle(
        rows[:, :1] - rows[:, 1:],
        task.loop(units, "direct").cpu(),
        task.doubled().loop(units, "direct").cpu(),
        name=f"live citations, {MODE}, factor {FACTOR:g}",
    )


def compiled(case: Case) -> int:
    """How many new tokens plain generation with a compiled model writes."""
    ids = case.ids[None].to(case.model.device)
    if case.model.device.type == "cuda":
        how = CompileConfig(mode="reduce-overhead")
    else:  # to see that it runs
        how = CompileConfig(backend="eager", mode=None)  # pyright: ignore[reportArgumentType]
        vars(how)["_compile_all_devices"] = True
    written = case.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=case.new_tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=how,
    )
    return written.shape[1] - ids.shape[1]


def measure_compiled(case: Case, name: str, sizes: LiveSizes) -> tuple[list[Row], list[str]]:
    """Tokens per second of plain generation with a compiled model, or why there are none."""
    model = case.model
    try:
        for _ in range(2):  # compiles, captures
            if compiled(case) != case.new_tokens:
                raise RuntimeError("it ended early")
        times = take_turns(
            {COMPILED: lambda: compiled(case)},
            model.device,
            seconds=sizes.seconds / 2,
            most=sizes.rounds,
        )
    except torch.AcceleratorError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        return [], [f"  {COMPILED}: did not run, {str(error).splitlines()[0]}"]
    finally:
        vars(model).pop("_compiled_call", None)  # else generate would go on with it
        torch.compiler.reset()
    rows = summarise(
        {COMPILED: [1e3 * case.new_tokens / spent for spent in times[COMPILED]]},
        what=WHAT,
        shape=f"{name}-prompt{len(case.ids)}-new{case.new_tokens}",
        dtype=model.dtype,
        device=model.device,
        metric="tokens/s",
    )
    return rows, [f"  {COMPILED:<62}{rows[0].median:>10.4g} tokens/s"]


def measure(task: Task, name: str, sizes: LiveSizes) -> tuple[list[Row], list[str]]:
    """Tokens per second of both, and their ratio: rows, and lines of the table."""
    case = case_of(task.model, len(task.prompt), sizes.new_tokens)
    calls = {PLAIN: case.plain, LIVE: case.live}
    for call in calls.values():
        call()  # compiles, allocates
    times = take_turns(calls, task.model.device, seconds=sizes.seconds, most=sizes.rounds)
    rows = rows_of(case, name, times)
    plain, live, share = rows
    lines = [
        f"  {PLAIN:<62}{plain.median:>10.4g} tokens/s",
        f"  {f'{LIVE}, {UNITS} units, every {case.every}':<62}{live.median:>10.4g} tokens/s"
        f"{share.median:>9.2f}x {PLAIN} [{share.p20:.2f}, {share.p80:.2f}]",
    ]
    if sum(weight.numel() for weight in task.model.parameters()) <= sizes.compiled:
        more, said = measure_compiled(case, name, sizes)
        rows, lines = rows + more, lines + said
    return rows, lines
