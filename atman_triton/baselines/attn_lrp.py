"""AttnLRP by the rules of the package ``lxt``, which its licence keeps out of this one.

Of lxt 2.1 only the file of rules is loaded: the rest of its ``lxt.efficient`` does not run beside
today's transformers, and replaces the methods of transformers' classes for the whole process. Here
hooks on the model's own modules apply the rules, and are gone when the scores are there.

Legend: U units, M scored tokens, T of one target, S tokens that are read, D width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capabilities import text_config
from ..stacks import UnsupportedModelError, find_stack
from .case import BACKWARD, Case
from .gradient import one_run_for_all, rated, rows_of_tokens
from .methods import Options

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are made of what there is a rule for, and of nothing else."""

_PARTS = {
    "gated MLP": ("gate_proj", "up_proj", "down_proj", "act_fn"),
    "attention": ("q_proj", "k_proj", "v_proj"),
}


def attn_lrp(case: Case, options: Options) -> Tensor:
    """``[U, M]``: relevance that runs from the output back to the embeddings, in lxt's way.

    That is input times gradient, where the gradient follows the rules for a product (each factor
    gets half, Eq. 7 of the paper), and for what acts element by element and normalisation
    (relevance passes as it is, Eq. 9). Costs as much as ``input_x_gradient``: of each target one
    forward pass, and one backward for every token.

    Raises:
        ImportError: if lxt is missing, or has no such rules.
        UnsupportedModelError: if the text stack is none of ``KINDS``.
    Source: Achtibat et al. 2024, "AttnLRP".
    """
    rules = _rules()
    stack = _supported(case.model)

    def rate(target: int) -> Tensor:
        tokens, length = len(case.targets[target]), case.length(target)
        case.expect(length * (1 + BACKWARD * tokens))
        rows = rows_of_tokens(case, target)
        with _ruled(stack, rules):
            found = one_run_for_all(case, target, options)(rows)
            (gradients,) = torch.autograd.grad(found.sum(), rows)
        return (rows * gradients).sum(-1)

    return rated(case, rate)


def _rules() -> Any:
    """The module ``lxt.efficient.rules``, without what its package imports beside it.

    Raises: ImportError: if there is none.
    """
    package = importlib.util.find_spec("lxt")
    places = [] if package is None else list(package.submodule_search_locations or [])
    if not places:
        raise ImportError(
            "attn_lrp takes its rules from lxt, which is not installed: pip install lxt "
            "(of what it depends on nothing is needed: pip install --no-deps lxt)."
        )
    path = Path(places[0]) / "efficient" / "rules.py"
    if not path.is_file():
        raise ImportError(f"lxt has no file {path}, as version 2.1 has: pip install lxt==2.1.")
    spec = importlib.util.spec_from_file_location("_lxt_efficient_rules", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [n for n in ("divide_gradient", "identity_rule_implicit") if not hasattr(module, n)]
    if missing:
        raise ImportError(f"{path} has no {missing[0]}, as version 2.1 has: pip install lxt==2.1.")
    return module


def _supported(model: Any) -> nn.Module:
    """The text stack.

    Raises: UnsupportedModelError: if there is no rule for a part of it.
    """
    kind = str(getattr(text_config(model), "model_type", ""))
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"attn_lrp has rules for the layers of {', '.join(KINDS)}, got {kind}; "
            "use method='input_x_gradient'."
        )
    return find_stack(model)[0]


@contextmanager
def _ruled(stack: nn.Module, rules: Any) -> Iterator[None]:
    """Let gradients follow the rules while the context is open; what is computed stays the same.

    Raises: UnsupportedModelError: if a layer is not made as those of ``KINDS`` are.
    """

    def divided(by: int) -> Callable[..., Tensor]:
        return lambda module, args, output: rules.divide_gradient(output, by)

    def divided_before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rules.divide_gradient(args[0], 2), *args[1:])

    def passed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        known = output.detach()
        return rules.identity_rule_implicit(lambda _: known, args[0])

    found = dict.fromkeys(_PARTS, 0)
    with ExitStack() as undo:
        for module in stack.modules():
            part: Any = module
            if type(module).__name__.endswith("RMSNorm"):
                undo.callback(module.register_forward_hook(passed).remove)
            if all(isinstance(getattr(part, n, None), nn.Module) for n in _PARTS["gated MLP"]):
                found["gated MLP"] += 1
                undo.callback(part.act_fn.register_forward_hook(passed).remove)
                # the product of the gate and what it lets through
                undo.callback(part.down_proj.register_forward_pre_hook(divided_before).remove)
            if all(isinstance(getattr(part, n, None), nn.Module) for n in _PARTS["attention"]):
                found["attention"] += 1
                # Two products: of queries and keys, and of the weights they make and values.
                # Rotations are linear, so what holds behind them may be done before.
                for name, by in (("q_proj", 4), ("k_proj", 4), ("v_proj", 2)):
                    undo.callback(getattr(part, name).register_forward_hook(divided(by)).remove)
        layers = int(stack.config.num_hidden_layers)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        for name, count in found.items():
            if count != layers:
                raise UnsupportedModelError(
                    f"attn_lrp looks for {layers} layers with {name} "
                    f"({', '.join(_PARTS[name])}), got {count}; use method='input_x_gradient'."
                )
        yield
