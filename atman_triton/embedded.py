"""What a model makes of its input in front of its first layer: caught once, and given again.

A classifier runs many rows of the same input, which differ in their attention alone. What it
embeds (words, or patches of a picture, with their positions) is the same in all of them, so it is
computed in one pass, and expanded in the others.

Legend: B rows, S tokens, D width of embeddings, N patches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PATCHES = ("patch_embeddings", "patch_embedding")
_IN_FRONT = {  # in the order in which they stand there
    "cls_token": "class token",
    "class_embedding": "class token",
    "distillation_token": "distillation token",
    "register_tokens": "register token",
}
_LOCK = threading.RLock()
_USERS: dict[int, list[Any]] = {}  # module id -> [what stood in its place, users]


class _Outputs(threading.local):
    """What modules answer in one thread, by their ids."""

    def __init__(self) -> None:
        self.known: dict[int, Tensor] = {}


_OUTPUTS = _Outputs()


def entry_of(model: nn.Module) -> nn.Module | None:
    """The module that embeds an input; None if it cannot be found."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "embeddings":
            return module
    return _input_embeddings(model)


def content_of(model: nn.Module) -> nn.Module | None:
    """The module that embeds words or patches without their positions; None if there is none."""
    entry = entry_of(model)
    for name in _PATCHES:
        patches = getattr(entry, name, None)
        if isinstance(patches, nn.Module):
            return patches
    return _input_embeddings(model)


def encoder_config(model: nn.Module) -> Any:
    """The configuration of the layers behind an input, which may be a part of the model's."""
    entry: Any = entry_of(model)
    for part in model.modules():
        if entry in list(part.children()) and hasattr(part, "config"):
            return part.config
    return model.config


def special_tokens(model: nn.Module) -> list[str]:
    """What the tokens in front of the patches of a picture are, by how they are left out."""
    entry = entry_of(model)
    found = []
    for name, reason in _IN_FRONT.items():
        weight = getattr(entry, name, None)
        if isinstance(weight, Tensor):
            found += [reason] * (weight.shape[1] if weight.dim() == 3 else 1)
    return found


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


class Caught(list[Any]):
    """What a module returned, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self._versions: list[int] = []

    def add(self, output: Any) -> None:
        """Note an output."""
        self.append(output)
        self._versions.append(output._version if isinstance(output, Tensor) else 0)

    @property
    def lasting(self) -> Tensor | None:
        """The one row that was returned in one call, if nothing was written into it since."""
        if len(self) != 1 or not isinstance(self[0], Tensor) or len(self[0]) != 1:
            return None
        return self[0] if self[0]._version == self._versions[0] else None


@contextmanager
def catching(module: nn.Module | None, *, copied: bool = False) -> Iterator[Caught]:
    """What the module returns in this thread, or copies of it, which nothing is written into."""
    caught = Caught()
    owner = threading.get_ident()

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == owner:
            caught.add(output.clone() if copied and isinstance(output, Tensor) else output)

    hook = None if module is None else module.register_forward_hook(catch)
    try:
        yield caught
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def replayed(module: nn.Module | None, output: Tensor | None) -> Iterator[None]:
    """Let a module answer with ``output`` in this thread, without computing anything.

    Without either, nothing is changed.
    """
    if module is None or output is None:
        yield
        return
    _install(module)
    before = _OUTPUTS.known
    _OUTPUTS.known = {**before, id(module): output}
    try:
        yield
    finally:
        _OUTPUTS.known = before
        _uninstall(module)


def _install(module: nn.Module) -> None:
    with _LOCK:
        if id(module) not in _USERS:
            own = module.__dict__.get("forward")  # what another library has put there
            original = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                known = _OUTPUTS.known.get(id(module))
                return original(*args, **kwargs) if known is None else known

            module.forward = forward
            _USERS[id(module)] = [own, 0]
        _USERS[id(module)][1] += 1


def _uninstall(module: nn.Module) -> None:
    with _LOCK:
        entry = _USERS[id(module)]
        entry[1] -= 1
        if entry[1] == 0:
            del _USERS[id(module)]
            if entry[0] is None:
                del module.forward
            else:
                module.forward = entry[0]


def in_columns(content: Tensor, tokens: int) -> Tensor:
    """Embeddings of words ``[1, S, D]`` or patches (``[1, N, D]``, ``[1, D, h, w]``): ``[S, D]``.

    Tokens in front of the patches (class token, registers) have none: zeros.
    """
    if content.dim() == 4:
        content = content.flatten(2).transpose(1, 2)
    found = content.new_zeros(tokens, content.shape[-1])
    found[tokens - content.shape[1] :] = content[0]
    return found


def expanded(value: Any, rows: int) -> Any:
    """One row of an input, ``[1, ...]``, seen as ``[B, ...]``, not copied; others as they are."""
    if isinstance(value, Tensor) and value.dim() and len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    return value


def as_read(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An input where the model is, numbers in its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
