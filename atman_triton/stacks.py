"""A stack of attention layers: finding it, switching it to "atman", and seeing that it obeys.

A stack's hooks hand factors to its layers and check after each forward pass that every layer named
has applied them.
"""

from __future__ import annotations

import inspect
import threading
from functools import cache
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from . import adapters
from .adapters import refuse_weights
from .layers import (
    KEYWORD,
    THREAD,
    Manipulation,
    marked_while_tracing,
    start_tracing,
)
from .places import Places, found_places, is_cross_attention

_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "moe", "recurrent"})
_HIERARCHICAL = ("depths", "window_size")  # of Swin and its like
_LAYER_LISTS = ("layers", "h", "blocks", "layer")
_LOCK = threading.RLock()


Role = Literal["decoder", "encoder", "answering"]
_HEADS = {
    "decoder": "num_attention_heads",
    "encoder": "encoder_attention_heads",
    "answering": "decoder_attention_heads",
}


class UnsupportedModelError(RuntimeError):
    """A manipulation does not reach the attention layers it names, so its answer would be wrong."""


class _Current(threading.local):
    """The manipulation of one stack in one thread."""

    def __init__(self) -> None:
        self.manipulation: Manipulation | None = None


@torch.library.custom_op("atman_triton::refuse", mutates_args=())
def _refuse(output: Tensor, message: str) -> Tensor:
    """Raise when a compiled graph runs: an error raised while tracing would change its type."""
    raise UnsupportedModelError(message)


@_refuse.register_fake
def _(output: Tensor, message: str) -> Tensor:
    return torch.empty_like(output)


_refuse.register_autograd(lambda ctx, grad: (grad, None))


class Stack:
    """A stack of layers: which places it has, and the manipulations it is under.

    Args:
        module: What its hooks are put on.
        model_name: For errors.
        role: "decoder" is a decoder alone, whose layers know their index and are handed factors as
            a keyword argument. An "encoder", and a decoder that is "answering" to one, are known by
            their modules, which look factors up where the argument does not get there.
    """

    def __init__(self, module: nn.Module, model_name: str, role: Role = "decoder") -> None:
        self.model_name = model_name
        self.role: Role = role
        self.serial = str(id(module))
        self.current = _Current()
        config: Any = _text_config(module) if role == "decoder" else module.config
        self.config_id = id(getattr(module, "config", config))
        self.heads = _head_count(config, role)
        self.carried = config.model_type in adapters.CARRIES_IN_MASK
        self.places = _places(module, config, role) if self.heads else Places(())
        if not self.places.layers:
            raise UnsupportedModelError(
                f"{model_name} has no layers with softmax attention, so there are no scores to "
                "manipulate."
            )
        self.configs: dict[int, PreTrainedConfig] = {}  # those that name the implementation
        self.users = 0
        self.holders = 0
        self._undo: list[Any] = []
        self._undo_hold: list[Any] = []

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have self-attention."""
        return self.places.layers

    # The two hooks run inside the graph under torch.compile. torch looks up separately whether a
    # hook wants keyword arguments, so while another thread adds or removes them, they may be called
    # without. A thread with a manipulation does not meet this.

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the thread's factors into the stack's keyword arguments."""
        manipulation = self.current.manipulation
        if manipulation is None or kwargs is None:
            return None
        weights = kwargs.get("output_attentions")
        if getattr(module.config, "output_attentions", False) if weights is None else weights:
            refuse_weights()
        _refuse_dense_mask(kwargs, self.carried)
        manipulation.reached = {}
        if not torch.compiler.is_compiling():
            manipulation.once.clear()
        manipulation.traced = bool(
            torch.compiler.is_compiling()
            and module.training
            and getattr(module, "gradient_checkpointing", False)
        )
        if manipulation.traced:
            start_tracing()
        if self.carried:
            return None
        return args, {**kwargs, KEYWORD: manipulation}

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None
    ) -> Any:
        """Refuse an answer in which not every layer named was manipulated."""
        manipulation = self.current.manipulation
        if manipulation is None:
            return None
        reached = marked_while_tracing() if manipulation.traced else manipulation.reached or {}
        missed = [place for place in manipulation.named if place not in reached]
        if not missed:
            return None
        message = (
            f"{self.model_name}: the manipulation did not reach {self._places(missed)} of "
            f"{self._places(manipulation.named, short=True)}; these layers did not run, or do not "
            "use transformers' attention interface."
        )
        if torch.compiler.is_compiling():
            return _refuse_in_graph(output, message)
        raise UnsupportedModelError(message)

    def _places(self, places: list[int], short: bool = False) -> str:
        """Layers in words."""
        crossing = [place - self.places.depth for place in places if place >= self.places.depth]
        own = [place for place in places if place < self.places.depth]
        words = [] if not own else [f"{own}" if short else f"attention layers {own}"]
        words += [f"cross-attention layers {crossing}"] if crossing else []
        return " and ".join(words)

    def install(self, module: nn.Module) -> None:
        """Hook the stack and let it run "atman" in some threads, for the first of its users."""
        with _LOCK:
            if self.users == 0:
                self._undo = [
                    module.register_forward_pre_hook(self.before, with_kwargs=True).remove,
                    module.register_forward_hook(self.after, with_kwargs=True).remove,
                ]
                changed = adapters.adapt(module)
                self._undo.append(lambda: adapters.restore(changed))
                self._undo += [_answer_by_thread(config) for config in self.configs.values()]
            self.users += 1

    def hold(self) -> None:
        """Run "atman" in every thread: autograd has its own, in which it recomputes layers."""
        with _LOCK:
            if self.holders == 0:
                self._undo_hold = [_switch(config) for config in self.configs.values()]
            self.holders += 1

    def release(self) -> None:
        """Undo :meth:`hold` and :meth:`install`."""
        with _LOCK:
            self.holders -= 1
            if self.holders == 0:
                undo, self._undo_hold = self._undo_hold, []
                for step in undo:
                    step()
            self.uninstall()

    def uninstall(self) -> None:
        """Undo :meth:`install`, for the last of the stack's users."""
        with _LOCK:
            self.users -= 1
            if self.users == 0:
                undo, self._undo = self._undo, []
                for step in reversed(undo):
                    step()


def _refuse_in_graph(output: Any, message: str) -> Any:
    """``output`` with a node that raises when the graph runs."""
    if isinstance(output, Tensor):
        return _refuse(output, message)
    if isinstance(output, tuple):
        return (_refuse(output[0], message), *output[1:])
    first, *rest = output.keys()
    values = {name: output[name] for name in rest}
    return type(output)(**{first: _refuse(output[first], message)}, **values)


def _refuse_dense_mask(kwargs: dict[str, Any], carried: bool) -> None:
    """A 4-D mask carries no factors, and does not say which keys a sliding cache has dropped."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    if not any(isinstance(m, Tensor) and m.dim() == 4 for m in masks):
        return
    if carried:
        raise ValueError("a manipulation of this model needs a 2-D attention_mask, got 4-D.")
    if cache is None or not any(getattr(cache, "is_sliding", ())):
        return
    length = cache.get_seq_length()
    if isinstance(length, Tensor) or length > 0:
        raise ValueError(
            "a 4-D attention_mask with a sliding-window cache does not say where its keys stand, "
            "so factors cannot be aligned; pass a 2-D padding mask."
        )


_SWITCHED: dict[int, list[Any]] = {}  # config id -> [config, previous implementation, users]


def _switch(config: PreTrainedConfig) -> Any:
    """Set a config to "atman"; returns what undoes it. Models may share a config."""
    entry = _SWITCHED.setdefault(id(config), [config, config._attn_implementation_internal, 0])
    entry[2] += 1
    config._attn_implementation_internal = adapters.NAME

    def undo() -> None:
        entry[2] -= 1
        if entry[2] == 0:
            config._attn_implementation_internal = entry[1]
            del _SWITCHED[id(config)]

    return undo


_KINDS: dict[int, list[Any]] = {}  # config id -> [config, its class, users]


def _answer_by_thread(config: PreTrainedConfig) -> Any:
    """Let a config answer "atman" in threads that manipulate it; returns what undoes it.

    All other threads, which may be amid a forward pass, see their own implementation throughout.
    """
    entry = _KINDS.setdefault(id(config), [config, type(config), 0])
    entry[2] += 1
    config.__class__ = _by_thread(entry[1])

    def undo() -> None:
        entry[2] -= 1
        if entry[2] == 0:
            config.__class__ = entry[1]
            del _KINDS[id(config)]

    return undo


@cache
def _by_thread(kind: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The subclass of a config class that knows which threads manipulate the config."""

    def get(self: Any) -> str | None:
        if id(self) in THREAD.switched:
            return adapters.NAME
        return self._attn_implementation_internal

    def reduce(self: Any, protocol: Any) -> Any:  # copies are of the original class
        _, arguments, *rest = kind.__reduce_ex__(self, protocol)
        return object.__new__, (kind, *arguments[1:]), *rest

    body = {
        "_attn_implementation": property(get, cast(Any, kind)._attn_implementation.fset),
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    made = type.__new__(type(kind), kind.__name__, (kind,), body)
    return made


_STACKS: WeakKeyDictionary[nn.Module, Stack] = WeakKeyDictionary()


def unwrap(module: Any) -> Any:
    """The module that ``torch.compile`` has wrapped."""
    return getattr(module, "_orig_mod", module)


def _text_config(module: nn.Module) -> Any:
    return module.config.get_text_config(decoder=True)  # pyright: ignore


def checked_model(model: Any) -> nn.Module:
    """A transformers model, unwrapped.

    Raises:
        TypeError: if ``model`` is no module.
        UnsupportedModelError: if it is no model of transformers.
    """
    model = unwrap(model)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {name}.")
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{name} is not a transformers model with a text stack.")
    return model


def find_stack(model: Any) -> tuple[nn.Module, Stack]:
    """The stack of a decoder alone, or of an encoder alone, and what is known of it.

    Raises:
        TypeError: if ``model`` is no module.
        UnsupportedModelError: if it has no text stack that asks the attention interface.
    """
    model = checked_model(model)
    config: Any = model.config
    name = type(model).__name__
    if config.is_encoder_decoder or config.model_type == "blip":
        raise UnsupportedModelError(
            f"{name} has several stacks of layers; this is for a decoder alone."
        )
    module = unwrap(model.get_decoder())  # pyright: ignore[reportCallIssue]
    modality = MODALITIES.get(getattr(module, "main_input_name", "input_ids"), "text")
    if modality != "text":
        module = _tower(module, modality)
    role = "decoder" if modality == "text" and _writes(model, module) else "encoder"
    return module, stack_of(module, role, model)


MODALITIES = {
    "pixel_values": "image",
    "flattened_patches": "image",
    "input_features": "audio",
    "input_values": "audio",
}
"""What a model reads by the name of its main input; any other is text."""


def _tower(model: Any, modality: str) -> Any:
    """The encoder within an image or audio model that has only one."""
    names = {"image": ("vision_model",), "audio": ("encoder",)}[modality]
    return next((getattr(model, name) for name in names if hasattr(model, name)), model)


def _writes(model: Any, module: nn.Module) -> bool:
    """Whether a text stack is a decoder; PaliGemma's looks both ways within its prompt."""
    generates = getattr(model, "can_generate", None)
    return bool(generates and generates()) or not looks_both_ways(module)


def looks_both_ways(module: nn.Module) -> bool:
    """Whether an attention module of a stack says that it is not causal."""
    return any(
        getattr(part, "is_causal", None) is False and not is_cross_attention(part)
        for part in module.modules()
    )


def stack_of(module: Any, role: Role, model: Any) -> Stack:
    """What is known of a stack, in whatever models it is.

    Args:
        model: The model that contains it.
    Raises: UnsupportedModelError: if it is none, or does not ask the attention interface.
    """
    name = type(model).__name__
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        raise UnsupportedModelError(
            f"{name}: its text stack cannot be found; get_decoder() answers with "
            f"{type(module).__name__}."
        )
    own = _text_config(module) if role == "decoder" else module.config
    takes_kwargs = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(module.forward).parameters.values()
    )
    if own.model_type not in adapters.CARRIES_IN_MASK and not (
        takes_kwargs
        and (
            getattr(module, "_can_set_attn_implementation", lambda: True)()
            or adapters.knows(module)
        )
    ):
        raise UnsupportedModelError(
            f"{name}: {type(module).__name__} computes attention in its own code instead of "
            "transformers' attention interface, so its scores cannot be manipulated."
        )
    if role == "encoder" and any(getattr(own, sign, None) for sign in _HIERARCHICAL):
        raise UnsupportedModelError(
            f"{name}: the layers of {type(module).__name__} attend within windows or merge tokens, "
            "so their keys are not the tokens that factors are for."
        )
    with _LOCK:
        stack = _STACKS.get(module)
        if stack is None:
            stack = _STACKS[module] = Stack(module, name, role)
        if stack.users == 0:
            if stack.places.by_module:
                stack.places = found_places(module)  # modules may have been replaced
            candidates = [getattr(part, "config", None) for part in module.modules()]
            if role == "decoder":
                candidates.append(model.config.get_text_config(decoder=True))
            stack.configs = {id(c): c for c in candidates if isinstance(c, PreTrainedConfig)}
    return stack


def checkpoints_activations(module: nn.Module) -> bool:
    """Whether any layer recomputes its activations in the backward pass."""
    return any(getattr(part, "gradient_checkpointing", False) for part in module.modules())


def _head_count(config: Any, role: Role) -> int:
    """How many query heads each layer has."""
    heads = getattr(config, _HEADS[role], None)
    return heads or getattr(config, "num_attention_heads", 0)


def _places(module: nn.Module, config: Any, role: Role) -> Places:
    """The places of a stack; of a decoder alone those that its config tells."""
    if role != "decoder":
        return found_places(module)
    count = config.num_hidden_layers
    for name in _LAYER_LISTS:
        blocks = getattr(module, name, None)
        if isinstance(blocks, nn.ModuleList):
            count = min(count, len(blocks))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    crossing = tuple(getattr(config, "cross_attention_layers", None) or ())
    own = tuple(
        layer
        for layer in range(count)
        if kinds[layer] not in _WITHOUT_ATTENTION and layer not in crossing
    )
    return Places(own, tuple(layer for layer in crossing if layer < count) if own else ())
