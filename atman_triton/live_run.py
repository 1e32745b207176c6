"""Generation that scores every new token: one plain row and a row per unit, step by step.

Legend: U units, R = 1 + U rows (the plain one first), P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from . import memory
from .branches import Branches
from .capabilities import device_of, dtype_of, text_config
from .engine import undisturbed
from .integration import UnsupportedModelError
from .layers import THREAD, Manipulation
from .lockstep import Handover
from .perturbations import Record, RunFailed, Settings
from .runner import Runner, check_nan, target_logprobs
from .side_rows import RowsCache, SideRows
from .stacks import find_stack

_TAKEN = "is taken by generate_explained, which passes it to model.generate itself"
_WITHOUT_A_ROW = "makes the model run in ways in which there is no plain row to run beside"
_REFUSED = {
    "inputs": _TAKEN,
    "input_ids": _TAKEN,
    "inputs_embeds": _TAKEN,
    "attention_mask": _TAKEN,
    "position_ids": _TAKEN,
    "past_key_values": _TAKEN,
    "cache_implementation": _TAKEN,
    "assistant_model": _WITHOUT_A_ROW,
    "assistant_early_exit": _WITHOUT_A_ROW,
    "prompt_lookup_num_tokens": _WITHOUT_A_ROW,
    "penalty_alpha": _WITHOUT_A_ROW,
    "dola_layers": _WITHOUT_A_ROW,
    "negative_prompt_ids": _WITHOUT_A_ROW,
    "custom_generate": _WITHOUT_A_ROW,
    "constraints": _WITHOUT_A_ROW,
    "force_words_ids": _WITHOUT_A_ROW,
    "token_healing": "changes the prompt",
    "return_dict_in_generate": "asks for what model.generate returns, which is not given",
}
# Options that must not be anything but this one value, and why.
_ONE_VALUE = {
    "num_beams": (1, "beams are several texts at once, and only one is explained"),
    "num_return_sequences": (1, "only one text is explained at a time"),
    "guidance_scale": (1, "the model would run on another prompt too"),
    "use_cache": (True, "the rows share the cache of the prompt"),
}


Elsewhere = Callable[[Callable[[], Any]], Any]
"""Runs a function in another thread, and gives what it returns or raises."""


class Scored(NamedTuple):
    """A new token, ``[R]`` float32 log-probabilities in nats."""

    token_id: int
    logprobs: Tensor


@dataclass(frozen=True)
class LiveRun:
    """What is generated and how, ready to be run in a thread of its own.

    Args:
        model: A causal language model.
        prompt_ids: ``P`` token ids.
        units: Of each unit, its tokens in the prompt.
        settings: How to suppress; ``batch_size`` counts units.
        every: So many tokens are scored at a time, see ``generate_explained``.
        generation: Keyword arguments of ``model.generate``.
        streamer: The user's own, or None.
        record: What is done is noted here.
        ambient: The caller's thread, see :func:`ambient`.
        inputs: What the model's forward takes for the prompt; None is its ids.
        once: Keeps what the model makes of pictures, see ``EncodedOnce``.
    """

    model: Any
    prompt_ids: list[int]
    units: list[tuple[int, ...]]
    settings: Settings
    every: int
    generation: dict[str, Any]
    streamer: BaseStreamer | None
    record: Record
    ambient: Ambient
    inputs: Mapping[str, Any] | None = None
    once: Callable[[Any], AbstractContextManager[Any]] = nullcontext

    def __call__(self, handover: Handover[Scored]) -> None:
        """Generate; emit every new token.

        Raises:
            UnsupportedModelError: if the model has no direct effects.
            torch.OutOfMemoryError: if a step does not fit.
            RunFailed: if the model gives NaN, or no chance at all to the token that it writes.
        """
        with self.ambient.entered(self.model), undisturbed(self.model):
            started = time.perf_counter()
            runner = _in_caller(self.model, handover)(lambda: self._read_prompt(handover))
            self.record.seconds += time.perf_counter() - started
            rows = 1 + len(self.units)
            factors = torch.ones(rows, len(self.prompt_ids))
            for factor, tokens in zip(factors[1:], self.units, strict=True):
                factor[list(tokens)] = self.settings.factor
            runner.store.tokens = len(self.prompt_ids) - 1
            layers = int(text_config(self.model).num_hidden_layers)
            cache = RowsCache(runner.store.tokens, layers, rows)
            ids = torch.tensor([self.prompt_ids], device=runner.device)
            with runner.manipulated(factors.to(runner.device)) as manipulation:
                self._generate(ids, cache, manipulation, handover)

    def _read_prompt(self, handover: Handover[Scored]) -> Runner:
        """Run the prompt once, its keys and values kept."""

        def check(tokens: int) -> None:
            handover.check()

        branches = Branches(len(self.prompt_ids), ((0,),))  # any token stands for the first one
        inputs = self.inputs or {"input_ids": torch.tensor([self.prompt_ids])}
        with self.once(self.model):
            runner = Runner(
                self.model, inputs, branches, [0], self.settings, self.record, check, check
            )
        if runner.reason is not None:
            raise unsupported(runner.reason)
        return runner

    def _generate(
        self,
        ids: Tensor,
        cache: RowsCache,
        manipulation: Manipulation,
        handover: Handover[Scored],
    ) -> None:
        groups = self._groups()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        elsewhere = _in_caller(self.model, handover)
        rows = SideRows(base, cache, manipulation, groups, handover.check, elsewhere)
        emitter = _Emitter(self, rows, handover, elsewhere)
        try:
            with rows.on():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    streamer=emitter,
                    **self.generation,
                )
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
            widest = max(group.stop - group.start for group in groups)
            raise torch.OutOfMemoryError(
                f"a step of {widest} rows does not fit in memory beside the {cache.bytes()} bytes "
                f"that {len(self.units)} units keep: lower batch_size, or take fewer or larger "
                f"units. ({error})"
            ) from error

    def _groups(self) -> list[slice]:
        """Rows that go through the model together."""
        rows, size = 1 + len(self.units), self.settings.batch_size
        if size == "auto":
            size = self._fitting() - 1
        groups = [slice(start, min(start + size, rows)) for start in range(1, rows, size)]
        if self.every == 1:
            return [slice(0, groups[0].stop), *groups[1:]]
        return [slice(0, 1), *groups]

    def _fitting(self) -> int:
        """As many rows as the free memory holds, at least 2."""
        most = memory.tokens_per_batch(device_of(self.model))
        free = memory.free_memory(self.model)
        if free is not None:
            keys = 2 * len(self.prompt_ids)  # leaves room for as many new tokens
            row = memory.bytes_per_row(self.model, self.every, self.every, keys)
            most = min(most, int(free * memory.SHARE) // row)
        return max(2, most)


class _Emitter(BaseStreamer):
    """Takes every token that ``generate`` chooses, scores it and hands it over."""

    def __init__(
        self, run: LiveRun, rows: SideRows, handover: Handover[Scored], elsewhere: Elsewhere
    ) -> None:
        self._elsewhere = elsewhere
        self._run = run
        self._rows = rows
        self._handover = handover
        self._read_prompt = False
        self._waiting: list[int] = []  # tokens that are not scored yet
        self._resumed = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """The prompt, then each new token."""
        if self._run.streamer is not None:
            self._run.streamer.put(value)
        if not self._read_prompt:
            self._read_prompt = True
            return
        self._waiting += value.flatten().tolist()
        if len(self._waiting) >= self._run.every:
            self._emit()

    def end(self) -> None:
        """No more tokens."""
        if self._waiting:
            self._emit()
        if self._run.streamer is not None:
            self._run.streamer.end()

    def _emit(self) -> None:
        logprobs = self._logprobs()  # [R, waiting]
        record = self._run.record
        record.seconds += time.perf_counter() - self._resumed
        waiting, self._waiting = self._waiting, []
        for token_id, column in zip(waiting, logprobs.unbind(1), strict=True):
            self._handover.emit(Scored(token_id, column))
        self._resumed = time.perf_counter()

    def _logprobs(self) -> Tensor:
        """Of the waiting tokens in all rows: ``[R, waiting]``."""
        chosen, count, record = torch.tensor(self._waiting), len(self._waiting), self._run.record
        found = []
        groups = self._rows.score(count)
        for logits in groups:  # [rows, count, V]
            places = torch.arange(count, device=logits.device)
            found.append(self._elsewhere(partial(target_logprobs, logits, places, chosen)).cpu())
        record.batch_sizes += [len(groups[0])] * count + [len(logits) for logits in groups[1:]]
        logprobs = torch.cat(found)
        record.tokens += logprobs.numel()
        check_nan(logprobs, dtype_of(self._run.model))
        if not bool(logprobs[0].isfinite().all()):
            place = int((~logprobs[0].isfinite()).nonzero()[0])
            raise RunFailed(
                f"the model gives new token {self._waiting[place]} probability 0: no scores."
            )
        return logprobs


class Ambient(NamedTuple):
    """What a thread has around it that a new one would not have.

    Args:
        manipulation: That of the contexts around the call.
        autocast: The dtype of the model's device, None where it is off.
        stream: The CUDA stream that is current, None without one.
        thread: Itself, whose contexts hold for the new one too.
    """

    manipulation: Manipulation | None
    autocast: torch.dtype | None
    stream: Any
    thread: int

    @classmethod
    def of_this_thread(cls, model: Any) -> Ambient:
        """Found here, to be entered elsewhere.

        Raises: ValueError: if a manipulation around has several rows.
        """
        device = device_of(model)
        manipulation = find_stack(model)[1].current.manipulation
        for factor in () if manipulation is None else manipulation.factors:
            if factor is not None and len(factor) > 1:
                raise ValueError(
                    "a context around generate_explained must have one row of factors, since it "
                    f"generates one text, got {len(factor)} rows."
                )
        autocast = None
        if torch.is_autocast_enabled(device.type):
            autocast = torch.get_autocast_dtype(device.type)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        return cls(manipulation, autocast, stream, THREAD.serves)

    @contextmanager
    def entered(self, model: Any) -> Iterator[None]:
        """The same in the thread that enters."""
        current = find_stack(model)[1].current
        with ExitStack() as stack:
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device_of(model).type, dtype=self.autocast))
            current.manipulation, THREAD.serves = self.manipulation, self.thread
            try:
                yield
            finally:
                current.manipulation = None


def _in_caller(model: Any, handover: Handover[Scored]) -> Elsewhere:
    """What runs a pass of the model in the caller's thread, manipulated as in this one."""
    current = find_stack(model)[1].current

    def state() -> tuple[Any, ...]:
        return (
            THREAD.stacks,
            THREAD.by_config,
            THREAD.switched,
            THREAD.serves,
        ), current.manipulation

    def become(other: tuple[Any, ...]) -> None:
        (THREAD.stacks, THREAD.by_config, THREAD.switched, THREAD.serves), manipulation = other
        current.manipulation = manipulation

    def run(function: Callable[[], Any]) -> Any:
        here = state()

        def errand() -> Any:
            own = state()
            become(here)
            try:
                with torch.inference_mode(False), torch.no_grad():
                    return function()
            finally:
                become(own)

        return handover.in_caller(errand)

    return run


def check_options(model: Any, options: dict[str, Any]) -> None:
    """Refuse options of ``generate`` under which there is no one plain row.

    Args:
        model: Its own generation config counts where nothing else is said.
        options: Keyword arguments of ``generate``.
    Raises: ValueError: naming the option.
    """
    configs = (options.get("generation_config"), getattr(model, "generation_config", None))

    def value_of(name: str) -> Any:
        given = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    for name, why in _REFUSED.items():
        if value_of(name) not in (None, False):
            raise ValueError(f"{name} {why}; leave it out.")
    for name, (allowed, why) in _ONE_VALUE.items():
        value = value_of(name)
        if value is not None and value != allowed:
            raise ValueError(
                f"{name} must be {allowed}, got {value!r}: {why}; pass {name}={allowed}."
            )


def unsupported(reason: str) -> UnsupportedModelError:
    """What to raise where a model cannot share a prefix."""
    return UnsupportedModelError(
        f"scores while generating are direct effects, for which all rows share the prompt's keys "
        f"and values, but {reason}; generate first, then explain with method='exact'."
    )
