"""Which layer of a stack an attention module is, and whether it reads the stack's own tokens.

A *place* is one attention of a stack: the self-attention of layer ``i`` is place ``i``, its
cross-attention, over tokens of another stack, is place ``depth + i``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

_CROSS = frozenset(
    {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
)


@dataclass(frozen=True)
class Places:
    """The places of one stack.

    Args:
        layers: Indices of layers with self-attention.
        crossing: Indices of layers with cross-attention.
        by_module: Layer of every module within the layers by its ``id``; empty where each attention
            module knows its own.
        crosses_by_module: The ``id`` of those within cross-attention.
    """

    layers: tuple[int, ...]
    crossing: tuple[int, ...] = ()
    by_module: dict[int, int] = field(default_factory=dict)
    crosses_by_module: frozenset[int] = frozenset()

    @property
    def depth(self) -> int:
        """The place of the first layer's cross-attention."""
        return 1 + max((*self.layers, *self.crossing))

    @property
    def count(self) -> int:
        """How many places there are."""
        return 2 * self.depth if self.crossing else self.depth

    def all(self, crossing: bool) -> tuple[int, ...]:
        """The layers that have one kind of attention."""
        return self.crossing if crossing else self.layers

    def layer(self, module: nn.Module) -> int | None:
        """The layer that a module is in."""
        if self.by_module:
            return self.by_module.get(id(module))
        for name in ("layer_idx", "layer_id"):
            index = getattr(module, name, None)
            if isinstance(index, int):
                return index
        return None

    def crosses(self, module: nn.Module) -> bool:
        """Whether the keys of an attention module are tokens of another stack."""
        return id(module) in self.crosses_by_module or is_cross_attention(module)

    def place(self, module: nn.Module) -> int | None:
        """The place of an attention module, None if it has none here."""
        layer = self.layer(module)
        if layer is None or not self.crosses(module):
            return layer
        return self.depth + layer if self.crossing else None


def is_cross_attention(module: nn.Module) -> bool:
    """Whether a module says of itself that its keys are tokens of another stack."""
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__


def found_places(stack: nn.Module) -> Places:
    """The places of a stack whose attention modules need not know which layer they are in.

    They are in the outermost list of layers that hold attention, which all of them must have.
    """
    lists = (_numbered(part) for part in stack.modules() if isinstance(part, nn.ModuleList))
    return next((places for places in lists if places.layers), Places(()))


def _numbered(blocks: nn.ModuleList) -> Places:
    """The places in a list of layers."""
    by_module: dict[int, int] = {}
    crosses: set[int] = set()
    kinds: set[bool] = set()
    for layer, block in enumerate(blocks):
        for name, part in block.named_modules():
            by_module[id(part)] = layer
            crossing = not _CROSS.isdisjoint(name.split(".")) or is_cross_attention(part)
            if crossing:
                crosses.add(id(part))
            if "Attention" in type(part).__name__:
                kinds.add(crossing)
    every = tuple(range(len(blocks)))
    return Places(
        every if False in kinds else (),
        every if True in kinds else (),
        by_module,
        frozenset(crosses),
    )
