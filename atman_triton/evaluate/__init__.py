"""How good explanations are: data with labels, metrics, tables and figures, for any method."""

from .examples import Example
from .results import Result

__all__ = ["Example", "Result"]
