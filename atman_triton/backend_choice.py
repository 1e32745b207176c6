"""Which backend computes a call of the op, and why.

Legend: see ``attention``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backend_registry, backend_table
from .backend_call import Call, checked_call
from .backend_registry import Candidate, by_rule, choose, measured_case
from .backend_table import Case, MeasuredRow


@dataclass(frozen=True)
class CandidateReport:
    """What is known of one backend for a call.

    Args:
        name: as in ``backend=``.
        why_not: why it cannot serve; ``None`` if it can.
        kernel: which of its kernels would compute the call; ``None`` if it cannot serve.
        slower_because: why that is not its fastest way; ``None`` if it is, or if it cannot serve.
        rows: what was measured of it at the lengths around the call's, the nearest first.
    """

    name: str
    why_not: str | None
    kernel: str | None
    slower_because: str | None
    rows: tuple[MeasuredRow, ...]

    @property
    def serves(self) -> bool:
        """Whether it can compute the call."""
        return self.why_not is None

    @property
    def milliseconds(self) -> float | None:
        """What it took at the nearest measured length; ``None`` if that was not measured."""
        return self.rows[0].milliseconds if self.rows else None

    def __str__(self) -> str:
        """One line."""
        if self.why_not is not None:
            return f"{self.name}: {self.why_not}"
        why = "" if self.slower_because is None else f" ({self.slower_because})"
        times = (f"{row.milliseconds:g} ms for {row.shape} on {row.date}" for row in self.rows)
        return f"{self.name}: {self.kernel}{why}; {', '.join(times) or 'not measured'}"


@dataclass(frozen=True)
class BackendChoice:
    """The backend that computes a call, what else there is, and why. ``print`` it.

    Args:
        backend: its name.
        kernel: which of its kernels computes the call: ``forward``, ``decode``, ``shared prefix``
            or ``packed shared prefix`` of the fused ones; of ``torch``, ``scaled keys + SDPA``,
            ``bias + SDPA``, ``row minimum + SDPA`` or ``SDPA`` (each may be ``with a mask``),
            ``score blocks`` or ``query blocks``.
        reason: one sentence.
        candidates: every backend.
    """

    backend: str
    kernel: str
    reason: str
    candidates: tuple[CandidateReport, ...]

    def __str__(self) -> str:
        """The choice, and a line for each candidate."""
        lines = [f"{self.backend}, {self.kernel}: {self.reason}"]
        return "\n".join([*lines, *(f"  {candidate}" for candidate in self.candidates)])


def explain_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_factor: Tensor | None = None,
    *,
    mode: str = "multiplicative",
    causal: bool = False,
    query_offset: int | Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> BackendChoice:
    """Which backend and kernel compute a call of :func:`atman_triton.attention`, and why.

    Computes no attention, draws no random numbers, and does not wait for a GPU. It asks the code
    that makes the choice in ``attention``, so that both always agree: in the same process, with
    gradients enabled or not as here. (``torch.compile`` keeps to operators that it can follow, so
    that a compiled call of ``torch`` on a CPU may take another kernel; and where it leaves the
    number of tokens open, ``auto`` takes what it takes of calls that were not measured.)

    Args:
        query, key, value, key_factor: as of ``attention``, like all that follow.
    Returns: the choice; ``print`` shows it in words.
    Raises:
        TypeError, ValueError: what ``attention`` raises of these arguments, an explicit ``backend``
            that cannot serve them included.
    """
    call = checked_call(
        query,
        key,
        value,
        key_factor,
        mode=mode,
        causal=causal,
        query_offset=query_offset,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        position_bias=position_bias,
        mask=mask,
        prefix=prefix,
        dropout=dropout,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )
    chosen = choose(call, backend)
    case = measured_case(call)
    rows: list[MeasuredRow] = []
    if isinstance(case, Case) and backend_table.has_rows(query.device):
        rows = backend_table.rows_for(case, key.shape[2])
    reports = tuple(_report(candidate, call, rows) for candidate in backend_registry.CANDIDATES)
    reason = (
        f"backend={backend!r} was asked for"
        if backend != "auto"
        else _reason(call, chosen, case, rows)
    )
    return BackendChoice(chosen.name, chosen.kernel(call)[0], f"{reason}.", reports)


def _report(candidate: Candidate, call: Call, rows: list[MeasuredRow]) -> CandidateReport:
    why_not = candidate.why_not(call)
    if why_not is not None:
        return CandidateReport(candidate.name, why_not, None, None, ())
    kernel, slower = candidate.kernel(call)
    own = tuple(row for row in rows if row.backend == candidate.name)
    return CandidateReport(candidate.name, None, kernel, slower or None, own)


def _reason(call: Call, chosen: Candidate, case: Case | str, rows: list[MeasuredRow]) -> str:
    """Why ``auto`` takes this one."""
    device, ruled = call.query.device, by_rule(call)
    name = backend_table.device_name(device)
    if chosen is not ruled:
        lengths = " and ".join(str(tokens) for tokens in sorted({row.tokens for row in rows}))
        return f"measured faster than {ruled.name} at {lengths} keys on {name}"
    if name is None:
        return f"query is on {device}, where auto takes {chosen.name}"
    refused = [
        f"{candidate.name} {candidate.why_not(call)}, and"
        for candidate in backend_registry.CANDIDATES
        if device.type in (candidate.unmeasured_on or ()) and candidate.why_not(call) is not None
    ]
    rule = " ".join([*refused, f"{chosen.name} is what auto takes on a GPU"])
    if not backend_table.has_rows(device):
        here = "triton {}, torch {}".format(*_versions())
        return f"{rule} where nothing was measured, as on {name} with {here}"
    if isinstance(case, str):
        return f"{rule} where nothing was measured: {case}"
    if not rows:
        return f"{rule} where nothing was measured, as of a call like this on {name}"
    return f"{rule}, where nothing that serves measured faster"


def _versions() -> tuple[str, str]:
    """What is installed, where triton may be missing."""
    try:
        return backend_table.versions()
    except ImportError:
        return "missing", backend_table.major_minor(str(torch.__version__))
