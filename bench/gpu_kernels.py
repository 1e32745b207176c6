"""The set ``kernels`` of ``bench/gpu.py``: one attention call with factors beside its rivals.

Forward, and forward + backward with gradients to query, key, value and factor, of every provider
of ``bench/rivals.py`` that serves a mode, all modes of a shape in turns. First each is compared
with float64: output and gradients on a small shape, then some rows of the output at the size that
is timed; what is wrong or cannot run is not timed but named, with the reason. Cases come in order
of importance, and those that time does not allow are named too.

TFLOP/s count 4·B·Hq·T²·D operations, half of that where causal, 3.5 times that with the backward
pass; of a decoding step, GB/s count the keys and values that it reads. A ratio is a rival's time
over ours: above 1 we are faster.

Legend: B batch, Hq/Hk query/key heads, T tokens, D head dim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from atman_triton.kernels.reference import attention_reference
from atman_triton.memory import out_of_memory
from atman_triton.testing import assert_close_to_oracle
from bench.eager import attention_eager
from bench.gpu_explain import matmul_peak
from bench.harness import Row, clock, summarise
from bench.hopper_gate import on_hopper, verdict
from bench.kernel_cases import MODES, TOY_CASES, Case, all_cases, inputs_of
from bench.kernel_table import (
    FUSED,
    Findings,
    Key,
    cells_of,
    hopper_gain,
    left_out,
    never_slower,
    not_timed,
    table_of,
)
from bench.rivals import (
    EAGER,
    FLEX,
    OURS,
    OURS_HOPPER,
    Attention,
    UnservedError,
    forget_masks,
    matrix_of,
    providers,
)

try:
    from triton.errors import TritonError
except ImportError:  # optional: without it ours cannot run, and says so
    _TRITON_ERRORS = ()
else:
    _TRITON_ERRORS = (TritonError,)

CANNOT = (RuntimeError, ValueError, MemoryError, UnservedError, AssertionError, *_TRITON_ERRORS)
_NO_FLEX = "it compiles for long, so it is timed on some of the shapes only"
_NO_TIME = "no time was left"
_NOT_SERVED = "ValueError: backend='hopper'"  # how the op refuses what that kernel does not serve
_ROWS = 16  # of the output that are compared at full size
# Larger together than any second-level cache, and long enough for launches to queue up behind.
_FLUSH_BYTES, _FLUSHES = 256 * 2**20, 12


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run."""

    seconds: float = 0.1  # about how long the turns of one provider take together
    least: int = 5
    most: int = 40  # turns, however quick
    minutes: float = 8.0  # after which no further case is begun
    last: float = 9.0  # after which nothing more is compiled


TOY = Sizes(least=1, most=1)


# --- right, or not timed --------------------------------------------------------------------------


def call_of(attend: Attention, inputs: Sequence[Tensor], backward: bool) -> Callable[[], Any]:
    """The call to be timed: the output, and with the backward pass its four gradients."""
    *tensors, gradient = inputs
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(*tensors),)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def both() -> tuple[Tensor, ...]:
        output = attend(*leaves)
        return output, *torch.autograd.grad(output, leaves, gradient)

    return both


def require_close(
    actual: Sequence[Tensor], eager: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """The tolerance rule for an output and, three times eager's error, for its gradients."""
    names = ("output", "query's gradient", "key's gradient", "value's gradient", "dm")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it allows
        for name, *three in zip(names, actual, eager, oracle, strict=False):
            got, plain, truth = (tensor.detach() for tensor in three)
            assert_close_to_oracle(got, plain, truth, 2 if name == "output" else 3, name)


class Gate:
    """Whether a provider is right on the small shape of a case: decided once.

    Args:
        refused: providers that must not even be tried, with the reason.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        refused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._dtype, self._device, self._refused = dtype, device, refused
        self._verdicts: dict[tuple[Case, Key], str | None] = {}
        self._truths: dict[tuple[Case, str], tuple[Any, Any]] = {}

    def reason(self, case: Case, mode: str, name: str) -> str | None:
        """Why a provider must not be timed; ``None`` where it is right."""
        if name in self._refused:
            return self._refused[name]
        small = case.small()
        place = (small, (mode, name))
        if place not in self._verdicts:
            _, self._verdicts[place] = attempt(lambda: self._check(small, mode, name))
        return self._verdicts[place]

    def _check(self, case: Case, mode: str, name: str) -> None:
        inputs = inputs_of(case, self._dtype, self._device)
        offer = providers(mode, case.causal, self._device)
        place = (case, mode)
        if place not in self._truths:

            def oracle(query: Tensor, key: Tensor, value: Tensor, factor: Tensor) -> Tensor:
                tensors = (query, key, value, factor)
                return attention_reference(*tensors, mode=mode, causal=case.causal)[0]

            truth = call_of(oracle, [each.double() for each in inputs], case.backward)()
            self._truths[place] = truth, call_of(offer[EAGER], inputs, case.backward)()
        truth, eager = self._truths[place]
        require_close(call_of(offer[name], inputs, case.backward)(), eager, truth)


def check_rows(case: Case, mode: str, inputs: Sequence[Tensor]) -> Callable[[Tensor], None]:
    """A check of some rows of a full output, the last among them, against float64."""
    query, key, value, factor, _ = inputs
    device = query.device
    rows = torch.linspace(0, case.rows - 1, _ROWS, device=device).round().long()
    visible = torch.ones(_ROWS, case.tokens, dtype=torch.bool, device=device)
    if case.causal:
        visible = torch.arange(case.tokens, device=device) <= rows[:, None]
    some = (query[:, :, rows], key, value)
    doubles = (tensor.double() for tensor in (*some, factor))
    truth = attention_reference(*doubles, mode=mode, mask=visible[None, None])[0]
    eager = attention_eager(*some, matrix_of(factor, _ROWS), mode=mode, visible=visible)
    return lambda output: require_close([output[:, :, rows]], [eager], [truth])


# --- measuring ------------------------------------------------------------------------------------


def attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The call's result, or why there is none.

    Raises: torch.AcceleratorError: the device is lost, and nothing more can run on it.
    """
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")  # SDPA warns of why a backend does not serve
        try:
            return call(), None
        except torch.AcceleratorError:
            raise
        except CANNOT as error:
            if out_of_memory(error):
                return None, "out of memory"
            verdict = "wrong" if isinstance(error, AssertionError) else type(error).__name__
            told = [str(error), *(str(each.message) for each in heard)]
    lines = [text.strip().splitlines()[0].split(" (Triggered")[0] for text in told if text.strip()]
    return None, f"{verdict}: {' '.join(dict.fromkeys(lines))}"[:400]


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of the device's own work, with a cold second-level cache; on a CPU wall time."""
    if device.type == "cuda":
        junk = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        for _ in range(_FLUSHES - 1):  # and once in clock
            junk.zero_()
    return clock(call, device)


def eager_bytes(case: Case) -> int:
    """Roughly what eager attention holds at its widest: scores in several forms, two in float32."""
    return case.batch * case.heads * case.rows * case.tokens * (24 if case.backward else 12)


def measure(case: Case, sizes: Sizes, gate: Gate, inputs: list[Tensor], stop: float) -> Findings:
    """Every mode and provider of a case in turns.

    Args:
        stop: when compiling must end, on the clock of ``time.perf_counter``.
    """
    device = inputs[0].device
    most = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else float("inf")
    ready: dict[Key, Callable[[], Any]] = {}
    found = Findings({}, {})
    for mode in MODES:
        right, trouble = attempt(lambda mode=mode: check_rows(case, mode, inputs))
        for name, attend in providers(mode, case.causal, device).items():
            place = (mode, name)
            reason = trouble
            if name == FLEX and not case.flex:
                reason = _NO_FLEX
            elif name == EAGER and (needed := eager_bytes(case)) > most:
                reason = f"its score matrices would take some {needed / 2**30:.0f} GiB"
            elif time.perf_counter() > stop:
                reason = _NO_TIME
            reason = reason or gate.reason(case, mode, name)
            if reason is None:
                call = call_of(attend, inputs, case.backward)
                _, reason = attempt(lambda call=call, right=right: right(call()[0]))
                ready[place] = call
            if reason is not None:
                found.reasons[place] = reason
                ready.pop(place, None)

    def time_once(place: Key) -> float:
        spent, reason = attempt(lambda: milliseconds(ready[place], device))
        if reason is not None:
            found.reasons[place] = reason
            found.times.pop(place, None)
            del ready[place]
            return 0.0
        found.times.setdefault(place, []).append(spent)
        return spent

    turns: dict[Key, int] = {}
    for place in list(ready):
        wanted = sizes.least
        if sizes.most > sizes.least:
            wanted = int(1e3 * sizes.seconds / max(time_once(place), 1e-3))
        turns[place] = max(sizes.least, min(sizes.most, wanted))
    found.times.clear()  # first calls
    order = random.Random(0)
    for turn in range(max(turns.values(), default=0)):
        due = [place for place in ready if turn < turns[place]]
        for place in order.sample(due, len(due)):
            time_once(place)
    return found


# --- the set --------------------------------------------------------------------------------------


def rows_of(case: Case, found: Findings, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Milliseconds and TFLOP/s, or GB/s, of everything that was timed.

    And where the Hopper kernel was, how many times as fast as our portable one it is.
    """
    for mode in MODES:
        times = {name: spent for (of, name), spent in found.times.items() if of == mode}
        rates = {name: [case.rate(ms, dtype)[0] for ms in spent] for name, spent in times.items()}
        metrics = [("ms", times), (case.rate(1, dtype)[1], rates)]
        gain = hopper_gain(found.medians(mode))
        if gain is not None:
            metrics.append((f"times as fast as {OURS}", {OURS_HOPPER: [gain]}))
        for metric, numbers in metrics:
            yield from summarise(
                numbers,
                what=f"attention {case.kind}, {mode}",
                shape=case.shape,
                dtype=dtype,
                device=device,
                metric=metric,
            )


def run(
    device: torch.device,
    tiny: bool,
    cases: Sequence[Case] | None = None,
    sizes: Sizes | None = None,
) -> tuple[list[Row], str, *tuple[str, ...]]:
    """All cases that time allows: rows, the table, and what must not be (ours wrong or refused).

    Args:
        cases, sizes: in place of the set's own.
    """
    began = time.perf_counter()
    sizes = sizes or (TOY if tiny else Sizes())
    cases = list(cases or (TOY_CASES if tiny else all_cases()))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peak = matmul_peak(device, dtype, 128 if tiny else 8192)
    rows = summarise(
        {"torch.mm": [peak / 1e12]},
        what="matrix product",
        shape="128x128x128" if tiny else "8192x8192x8192",
        dtype=dtype,
        device=device,
        metric="TFLOP/s",
    )
    cells: dict[Case, dict[str, str]] = {}
    failures: list[str] = []
    refused: dict[str, str] = {}
    gains: list[tuple[str, float]] = []
    notes: list[str] = []
    if not on_hopper(device):
        notes.append(f"{OURS_HOPPER} is left out: it needs a Hopper GPU (sm_90)")
    elif (reason := verdict()) is not None:
        refused[OURS_HOPPER] = reason
        failures.append(f"{OURS_HOPPER} {reason}")
    gate = Gate(dtype, device, refused)
    reasons: dict[tuple[str, str], list[str]] = {}
    left = list(cases)
    while left and time.perf_counter() - began < 60 * sizes.minutes:
        case = left.pop(0)
        print(f"{case.shape} {case.kind} ...", file=sys.stderr, flush=True)
        try:
            found = measure_apart(case, sizes, gate, dtype, device, began + 60 * sizes.last)
        except torch.AcceleratorError as error:
            left.insert(0, case)
            failures.append(f"{case.shape} {case.kind}: {str(error).splitlines()[0]}")
            break
        rows += rows_of(case, found, dtype, device)
        cells[case] = cells_of(case, found, peak, dtype)
        for mode in MODES:
            gain = hopper_gain(found.medians(mode))
            gains += [] if gain is None else [(f"{case.shape} {case.kind}, {mode}", gain)]
        for (mode, name), reason in found.reasons.items():
            reasons.setdefault((name, reason), []).append(f"{case.shape} {case.kind}, {mode}")
            if fails(name, reason, device, refused):
                failures.append(f"{name} on {case.shape} {case.kind}, {mode}: {reason}")
    lines = ["not timed, with the number of cases:", *not_timed(reasons)] if reasons else []
    lines += notes
    if left:
        lines += [f"not reached: {len(left)} of {len(cases)} cases", *left_out(left)]
    lines += [f"torch.mm: {peak / 1e12:.3g} TFLOP/s", *table_of(cells), *never_slower(gains)]
    return rows, "\n".join(lines), *failures


def fails(name: str, reason: str, device: torch.device, refused: Mapping[str, str]) -> bool:
    """Whether a provider that was not timed must have been: ours, where it serves."""
    if name in refused or not name.startswith("atman"):
        return False  # said once, and a rival's reason is no fault of ours
    if reason.startswith("wrong"):
        return True
    by_design = name == OURS_HOPPER and reason.startswith(_NOT_SERVED)
    must = name in FUSED and device.type == "cuda" and reason != _NO_TIME
    return must and not by_design


def measure_apart(
    case: Case, sizes: Sizes, gate: Gate, dtype: torch.dtype, device: torch.device, stop: float
) -> Findings:
    """Measure a case, and give back its memory and what was compiled for it."""
    if case.flex and device.type == "cuda":
        torch.compiler.reset()  # one function is compiled for few shapes
    try:
        return measure(case, sizes, gate, inputs_of(case, dtype, device), stop)
    finally:
        forget_masks()
        if device.type == "cuda":
            torch.cuda.empty_cache()
