"""What the emulator of Gluon reports, by kind."""

from __future__ import annotations


class EmulationError(RuntimeError):
    """Something that a kernel must not do."""


class UnsupportedError(EmulationError, NotImplementedError):
    """A part of the language that the emulator lacks."""


class OperandError(EmulationError, TypeError):
    """An operand of a shape, dtype or kind that the language refuses."""


class BoundsError(EmulationError, IndexError):
    """An access outside a tensor or a buffer."""


class RaceError(EmulationError):
    """Two accesses to shared memory that nothing orders."""


class FenceError(EmulationError):
    """Shared memory written by threads is read by TMA or wgmma without a fence between."""


class BarrierError(EmulationError):
    """A misused mbarrier."""


class AccumulatorError(EmulationError):
    """The result of an unfinished warpgroup_mma is used."""


class DeadlockError(EmulationError):
    """Every partition waits and no copy is in flight."""


class UnfinishedError(EmulationError):
    """A partition ends while something that it started is in flight."""
