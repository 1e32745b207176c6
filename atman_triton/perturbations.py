"""What the engine is asked for and what it tells: perturbations, settings, a record of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .suppression import Rule

SAVINGS = ("target_logits", "batching", "shared_prefix", "one_pass")
"""What ``Settings.without`` can switch off, to measure what each is worth."""

Effect = Literal["total", "direct"]
Attention = Literal["encoder", "cross", "both"]
"""Where a prompt is suppressed in a model with an encoder and cross-attention."""


class RunFailed(ValueError):
    """The arguments were right, but the model's numbers or words cannot be explained."""


@dataclass(frozen=True)
class Settings:
    """How every row of a run is perturbed and how large batches are; names as in ``Explainer``.

    ``without`` names savings to leave out, see ``SAVINGS``. ``gradients`` makes every pass run over
    the whole input, as ``Engine.attribute`` needs it. ``similarity`` is κ, a number, or None where
    units are suppressed alone. ``attention`` is for models with an encoder and cross-attention.
    """

    factor: float
    mode: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    backend: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    without: frozenset[str] = frozenset()
    gradients: bool = False
    similarity: float | None = None
    rule: Rule = "released"
    attention: Attention | None = None

    def __post_init__(self) -> None:
        unknown = sorted(self.without - set(SAVINGS))
        if unknown:
            raise ValueError(
                f"without must name savings among {', '.join(SAVINGS)}, got {unknown}."
            )


@dataclass(frozen=True)
class Unit:
    """What one perturbation suppresses.

    Args:
        positions: Tokens, counted in the prompt followed by the unit's target alone.
        branch: The target that the tokens belong to; None if all stand in the prompt.
    """

    positions: tuple[int, ...]
    branch: int | None = None


class Near(NamedTuple):
    """A token outside of a unit that is suppressed along with it.

    Args:
        position: As in ``Unit``.
        branch: The target that it belongs to; None in the prompt.
        factor: What its scores are manipulated with.
        similarity: The largest with one of the unit's tokens.
    """

    position: int
    branch: int | None
    factor: float
    similarity: float


@dataclass
class Record:
    """What was done, for the result's provenance.

    Args:
        batch_sizes: Rows of each finished pass, the base runs included.
        tokens: Tokens that all passes ran; those of a backward pass count twice, and once more
            because it runs the layers again.
        runs: Perturbations finished, by effect.
        backward_runs: Rows that backward passes went through.
        shared_tokens: Those of the total runs behind a shared prefix.
        wasted_tokens: Those of them that stood before their row's first suppressed one.
        runners: How each pass over a prompt was run, ``shared_prefix`` or ``full``.
        reasons: Why not all shared a prefix; empty if they did.
        logits: Where the model computed logits.
        prefix_bytes: Bytes of keys and values that were kept.
        activations: How those of backward passes were held; None without any.
        seconds: Wall time of all passes.
    """

    batch_sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    runs: dict[str, int] = field(default_factory=lambda: {"total": 0, "direct": 0})
    backward_runs: int = 0
    shared_tokens: int = 0
    wasted_tokens: int = 0
    runners: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    logits: str = "target positions"
    prefix_bytes: int = 0
    activations: str | None = None
    seconds: float = 0.0

    @property
    def wasted(self) -> float:
        """Share of the total runs' tokens that stood before their row's first suppressed one."""
        return self.wasted_tokens / self.shared_tokens if self.shared_tokens else 0.0
