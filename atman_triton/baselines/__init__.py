"""What AtMan is compared with: gradients, attention maps, ablations, one interface for all."""

from .baseline import Baseline
from .case import Case
from .methods import BASELINES, Method, Options

__all__ = ["BASELINES", "Baseline", "Case", "Method", "Options"]
