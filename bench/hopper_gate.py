"""Whether the Hopper kernel is right on this GPU, asked before anything of it is run in a process.

::

    python -m bench.hopper_gate     # on a Hopper GPU (sm_90)

Its parts wait for one another, so a mistake in it can hang, and nothing that waits for a hung GPU
can be ended from within. So a few small cases are run in processes of their own, with a limit of
time. A kernel that hangs, crashes or is wrong is then failed with the reason, and not launched.

Legend: B batch, Hq/Hk query/key heads, Tq/Tk query/key tokens, D head dim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.apart import Ended, run_apart

SECONDS = 90.0
VERDICT = "ATMAN_HOPPER_VERDICT"
"""Environment variable of the verdict, which holds for the processes that this one starts, too."""

RIGHT = "right"
_REPEATED = 3  # the same call, to the same bits
_NAME = "hopper"  # of the backend


@dataclass(frozen=True)
class GateCase:
    """One call.

    Args:
        mode: ``plain`` is without factors.
        tokens: (Tq, Tk).
        heads: (Hq, Hk).
        few: the factors that are not 1 stand together in one or two tiles of keys.
        per_head: each query head has factors of its own.
    """

    mode: str
    head_dim: int
    causal: bool
    tokens: tuple[int, int] = (200, 333)
    heads: tuple[int, int] = (4, 2)
    batch: int = 2
    few: bool = True
    per_head: bool = False

    def __str__(self) -> str:
        kind = "" if self.mode == "plain" else f" {'few' if self.few else 'all'} factors"
        own = " of each head" if self.per_head else ""
        return (
            f"{self.mode} {'causal' if self.causal else 'full'} B{self.batch}-Hq{self.heads[0]}"
            f"-Hk{self.heads[1]}-Tq{self.tokens[0]}-Tk{self.tokens[1]}-D{self.head_dim}{kind}{own}"
        )


# More blocks of rows than multiprocessors, so that a program takes several: its barriers go round.
_MANY: dict[str, Any] = {"tokens": (1100, 1100), "heads": (24, 6)}
CASES = (
    GateCase("multiplicative", 128, True, **_MANY),
    GateCase("min_shift", 128, True, **_MANY),
    GateCase("min_shift", 64, False, **_MANY),
    GateCase("multiplicative", 256, False, **_MANY),
    GateCase("multiplicative", 64, True),
    GateCase("min_shift", 256, True),
    GateCase("min_shift", 128, False, few=False, per_head=True),
    GateCase("log_additive", 128, True, few=False),
    GateCase("log_additive", 64, False),
    GateCase("log_additive", 256, False, few=False),
    GateCase("plain", 128, False),
    GateCase("multiplicative", 64, True, tokens=(300, 40)),  # rows that see nothing
)


def on_hopper(device: torch.device | None = None) -> bool:
    """Whether the kernel runs on a device, or where none is named on the one in use."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def verdict() -> str | None:
    """Why the kernel must not be launched on this GPU; ``None`` where it is right. Asked once."""
    if VERDICT not in os.environ:
        print("atman (hopper): asking in other processes whether it is right ...", file=sys.stderr)
        os.environ[VERDICT] = ask() or RIGHT
    found = os.environ[VERDICT]
    return None if found == RIGHT else found


def ask(commands: Sequence[Sequence[str]] | None = None, seconds: float = SECONDS) -> str | None:
    """Run the cases elsewhere; why the kernel must not be launched, ``None`` where it is right.

    Args:
        commands: in place of the cases, which are shared out among processes as they compile long.
    """
    if commands is None:
        parts = min(len(CASES), os.cpu_count() or 1)
        own = [sys.executable, "-m", "bench.hopper_gate"]
        commands = [[*own, str(part), str(parts)] for part in range(parts)]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = run_apart(commands, seconds, environment=environment)
    reasons = [reason for each in ended if (reason := reason_of(each, seconds)) is not None]
    if not reasons:
        return None
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"failed before anything was run with it: {reasons[0]}{more}"


def reason_of(ended: Ended, seconds: float) -> str | None:
    """What is wrong with how a part of the gate ended, if anything is."""
    last = " ".join(ended.lines[-2:])[-600:] or "its start"
    if ended.code is None:
        return f"no answer within {seconds:g} s, at {ended.lines[-1] if ended.lines else last}"
    if ended.code != 0:
        return f"exit code {ended.code} at {last}"
    if ended.lines[-1:] != [RIGHT]:
        return f"it did not say that the numbers are right, but: {last}"
    return None


def shut_out_of_auto(device: torch.device) -> list[str]:
    """Keep ``auto`` from a kernel that is not right, in this process and from now on.

    Asks only where the table would have ``auto`` take it. Returns: the reason, if it is kept out.
    """
    from atman_triton import backend_registry, backend_table

    if not on_hopper(device):
        return []
    name = torch.cuda.get_device_name(device)
    taken = (row.backend == _NAME and row.device == name for row in backend_table.read_table())
    if not any(taken):
        return []
    reason = verdict()
    if reason is None:
        return []
    backend_registry._is_hopper = lambda device: False
    return [f"atman ({_NAME}): {reason}"]


def check(case: GateCase, device: torch.device) -> None:
    """Compare a call with float64, and with itself.

    Raises: AssertionError: it is wrong, or not the same each time.
    """
    from atman_triton import attention
    from atman_triton.kernels.reference import attention_reference
    from atman_triton.testing import assert_close_to_oracle

    generator = torch.Generator().manual_seed(0)
    (rows, keys), (heads, key_heads) = case.tokens, case.heads

    def normal(count: int, tokens: int) -> torch.Tensor:
        size = (case.batch, count, tokens, case.head_dim)
        return torch.randn(size, generator=generator).to(device, torch.bfloat16)

    query, key, value = normal(heads, rows), normal(key_heads, keys), normal(key_heads, keys)
    options: dict[str, Any] = {"causal": case.causal}
    factor = None
    if case.mode != "plain":
        options["mode"] = case.mode
        own = (heads,) if case.per_head else ()
        factor = torch.rand(case.batch, *own, keys, generator=generator) * 1.8 + 0.1
        if case.few:
            place = torch.arange(keys)
            factor[..., (place < keys // 3) | (place >= keys // 3 + 5)] = 1.0
        factor = factor.to(device)
    tensors = (query, key, value, factor)

    def call() -> Any:
        return attention(*tensors, **options, backend=_NAME, return_lse=True)

    found = call()
    for _ in range(_REPEATED - 1):
        if not all(map(torch.equal, call(), found)):
            raise AssertionError("the same call gave other numbers")
    eager = attention_reference(*tensors, **options)
    doubles = (query.double(), key.double(), value.double())
    truth = attention_reference(*doubles, None if factor is None else factor.double(), **options)
    for name, *three in zip(("output", "log-sum-exp"), found, eager, truth, strict=True):
        got, plain, right = three
        assert_close_to_oracle(got, plain.to(got.dtype), right, name=name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: a part of the cases and of how many; without them all, in other processes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not on_hopper():
        sys.exit("the Hopper kernel needs a Hopper GPU (sm_90)")
    if not given:
        sys.exit(ask())
    part, parts = map(int, given)
    for case in CASES[part::parts]:
        print(f"{case}:", flush=True)
        try:
            check(case, torch.device("cuda"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the verdict
            first = (str(error).strip() or "no message").splitlines()[0]
            print(f"{type(error).__name__}: {first}", flush=True)
            os._exit(1)  # nothing that waits for the GPU is waited for
    print(RIGHT, flush=True)


if __name__ == "__main__":
    main()
