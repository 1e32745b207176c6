"""Runs a model once per perturbation, in batches that fit in memory.

One row of a batch is the same input with one unit suppressed; row 0 of a run has nothing
suppressed. Rows have equal length, so there is no padding.

Legend: U units, T target tokens, S input tokens (prompt and target without its last token),
V vocabulary.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .integration import UnsupportedModelError, manipulate

# Share of the free memory that one batch may take; the estimate of a row is a rough one.
_MEMORY_SHARE = 0.5
# Where a larger batch no longer makes a token cheaper. On a CPU (one thread, models of 1M and 50M
# parameters, inputs of 128 and 512 tokens) that was at 1000 to 2000 tokens; up to 18% was lost at
# more. With two threads and 34M parameters 2072 tokens took 0 to 9% less time than 777.
_TOKENS_PER_BATCH = {"cpu": 2048}
_TOKENS_PER_BATCH_ELSEWHERE = 65536
# Vocabulary-sized float32 copies are made for so many bytes of rows at a time.
_REDUCTION_BYTES = 1 << 26


class RunFailed(ValueError):
    """The arguments were right, but the model's numbers or words cannot be explained."""


@dataclass(frozen=True)
class Settings:
    """How every row of a run is perturbed and how large batches are; names as in ``Explainer``."""

    factor: float
    mode: str
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    backend: str = "auto"
    batch_size: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class Run:
    """What came out, and how it was done.

    Args:
        base_logprobs: ``[T]`` float32, nats, nothing suppressed.
        suppressed_logprobs: ``[T, U]`` float32, nats; also where a unit cannot reach a target.
        batch_sizes: Rows of each forward pass that was finished.
        seconds: Wall time of all passes.
        logits: Whether the model computed logits for the targets alone.
    """

    base_logprobs: Tensor
    suppressed_logprobs: Tensor
    batch_sizes: list[int]
    seconds: float
    logits: Literal["target positions", "all positions"]


def run_perturbations(
    model: nn.Module,
    input_ids: Sequence[int],
    target_ids: Sequence[int],
    units: Sequence[Sequence[int]],
    settings: Settings,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Run:
    """Log-probabilities of the targets with each unit suppressed in turn, and with none.

    Args:
        model: A causal language model, in evaluation mode (see ``undisturbed``).
        input_ids: ``S`` tokens, the last ``T`` of which predict the targets.
        target_ids: ``T`` tokens.
        units: Token positions of each unit.
        settings: How to perturb.
        advance: Called with the number of tokens that each finished batch read.
    Raises:
        ValueError: if the model gives NaN, or no chance at all to a target token.
        torch.OutOfMemoryError: if not even one row fits; with a fixed batch size, if one batch
            does not.
    """
    device = _device(model)
    inputs = torch.tensor(input_ids, device=device)[None]  # [1, S]
    targets = torch.tensor(target_ids)
    keeps = keeps_logits(model)
    rows = len(units) + 1
    logprobs = torch.empty(rows, len(target_ids))  # [U + 1, T]
    size = settings.batch_size
    if size == "auto":
        size = automatic_batch_size(model, len(input_ids), len(target_ids))
    batch_sizes: list[int] = []
    started = time.perf_counter()
    done = 0
    while done < rows:
        stop = min(done + size, rows)
        factors = _factor_rows([(), *units][done:stop], len(input_ids), settings.factor)
        try:
            batch = _forward(model, inputs, targets, factors.to(device), settings, keeps)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            refused = str(error)
        else:
            logprobs[done:stop] = batch
            batch_sizes.append(stop - done)
            advance((stop - done) * len(input_ids))
            done = stop
            continue
        # Outside the except block, so that the failed pass's tensors are gone by now.
        size = _smaller(stop - done, len(input_ids), settings.batch_size, refused)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if bool(logprobs.isnan().any()):
        raise RunFailed(f"the model returns NaN in {_dtype(model)}; try another dtype.")
    if not bool(logprobs[0].isfinite().all()):
        token = int((~logprobs[0].isfinite()).nonzero()[0])
        raise RunFailed(f"the model gives target token {token} probability 0: nothing to explain.")
    return Run(
        base_logprobs=logprobs[0].clone(),
        suppressed_logprobs=logprobs[1:].T.contiguous(),
        batch_sizes=batch_sizes,
        seconds=time.perf_counter() - started,
        logits="target positions" if keeps else "all positions",
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every module's own mode given back whatever happens.

    ``no_grad`` rather than ``inference_mode``: some models fill buffers on their first call, and
    buffers born in inference mode would break the user's own training later.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def automatic_batch_size(model: nn.Module, input_tokens: int, target_tokens: int) -> int:
    """Rows per batch: as many as the free memory holds, up to where more bring no more speed."""
    device = _device(model)
    limit = _TOKENS_PER_BATCH.get(device.type, _TOKENS_PER_BATCH_ELSEWHERE)
    size = max(1, limit // input_tokens)
    free = _free_memory(model)
    if free is not None:
        row = _bytes_per_row(model, input_tokens, target_tokens)
        size = min(size, max(1, int(free * _MEMORY_SHARE) // row))
    return size


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward can be told to compute logits at the last positions only."""
    original = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if hasattr(original, "get_base_model"):  # adapters (PEFT)
        original = original.get_base_model()  # pyright: ignore[reportCallIssue]
    return "logits_to_keep" in inspect.signature(original.forward).parameters


def _forward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    factors: Tensor,
    settings: Settings,
    keeps: bool,
) -> Tensor:
    """One batch through the model's own forward: log-probabilities ``[rows, T]`` on the CPU."""
    wanted = {"logits_to_keep": len(targets)} if keeps else {}
    with manipulate(
        model,
        factors,
        mode=settings.mode,
        layers=settings.layers,
        heads=settings.heads,
        backend=settings.backend,
    ):
        output = model(
            input_ids=inputs.repeat(len(factors), 1), use_cache=False, return_dict=True, **wanted
        )
    logits = output.logits  # [rows, T, V]; [rows, S, V] where the model keeps all
    if logits.dim() != 3 or logits.shape[1] < len(targets):
        raise TypeError(
            f"{type(model).__name__} must give logits [rows, tokens, vocabulary], "
            f"got {list(logits.shape)}."
        )
    return _target_logprobs(logits[:, -len(targets) :], targets.to(logits.device)).cpu()


def _target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """``log softmax(logits)[target]`` in float32 (float64 for float64), some rows at a time.

    Returns: ``[rows, T]`` float32.
    """
    rows, count, vocabulary = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    chosen = logits.gather(-1, targets.expand(rows, count)[..., None])[..., 0].to(dtype)
    flat = logits.flatten(0, 1)  # [rows · T, V]
    step = max(1, _REDUCTION_BYTES // (4 * vocabulary))
    normaliser = torch.cat([part.to(dtype).logsumexp(-1) for part in flat.split(step)])
    return (chosen - normaliser.view(rows, count)).float()


def _factor_rows(units: Sequence[Sequence[int]], length: int, factor: float) -> Tensor:
    """``[rows, length]`` float32: ``factor`` at each row's own tokens, 1 elsewhere."""
    rows = torch.ones(len(units), length)
    for row, tokens in zip(rows, units, strict=True):
        row[list(tokens)] = factor
    return rows


# --- memory -------------------------------------------------------------------------------------


def _out_of_memory(error: BaseException) -> bool:
    """CPU allocations fail with a plain RuntimeError that only its text tells apart."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _smaller(failed: int, input_tokens: int, asked: int | Literal["auto"], refused: str) -> int:
    """The batch size to go on with after ``failed`` rows did not fit."""
    if asked != "auto":
        raise torch.OutOfMemoryError(
            f"batch_size {failed} with {input_tokens} tokens each does not fit in memory: lower it "
            f"or use batch_size='auto'. ({refused})"
        )
    if failed == 1:
        raise torch.OutOfMemoryError(
            f"not even one row of {input_tokens} tokens fits in memory: shorten the prompt, use a "
            f"smaller dtype or free some memory. ({refused})"
        )
    return failed // 2


def _bytes_per_row(model: nn.Module, input_tokens: int, target_tokens: int) -> int:
    """A rough estimate of what one row allocates at the widest point of a forward pass."""
    config = _text_config(model)
    hidden = int(getattr(config, "hidden_size", 1024))
    inner = getattr(config, "intermediate_size", None)
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner or 4 * hidden
    element = _dtype(model).itemsize
    positions = target_tokens if keeps_logits(model) else input_tokens
    # Residual stream, its norm, queries, keys, values, output; the gated products of the MLP.
    layer = input_tokens * element * (6 * hidden + 3 * inner)
    # The portable backend holds float32 scores for blocks of 64 query rows.
    heads = int(getattr(config, "num_attention_heads", 1))
    scores = 3 * 4 * heads * min(input_tokens, 64) * input_tokens
    logits = 3 * positions * vocabulary_size(model) * element
    return layer + scores + logits


def _free_memory(model: nn.Module) -> int | None:
    """Bytes that can still be allocated on the fullest of the model's devices; None if unknown."""
    devices = {parameter.device for parameter in model.parameters()}
    known = [free for device in devices if (free := _free_on(device)) is not None]
    return min(known, default=None)


def _free_on(device: torch.device) -> int | None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


# --- what the model says of itself --------------------------------------------------------------


def check_causal(model: Any) -> None:
    """Refuse what is no causal language model.

    Raises:
        TypeError: if it is no transformers model.
        UnsupportedModelError: naming the class and what is missing.
    """
    name = type(getattr(model, "_orig_mod", model)).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers causal language model, got {name}.")
    config: Any = model.config
    can_generate: Any = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model must be a decoder alone, but {name} has an encoder and a decoder, which is "
            "not supported."
        )
    if can_generate is None or not can_generate():
        raise UnsupportedModelError(
            f"model must be a causal language model, but {name} does not predict next tokens; "
            "load it with AutoModelForCausalLM."
        )
    # GPT-NeoX leaves is_decoder False and is causal all the same; its layers say so.
    two_sided = any(getattr(module, "is_causal", None) is False for module in model.modules())
    if getattr(_text_config(model), "is_decoder", None) is False and two_sided:
        raise UnsupportedModelError(
            f"model must be causal, but the attention of this {name} looks both ways; load it "
            "with is_decoder=True."
        )


def context_window(model: nn.Module) -> int | None:
    """The most tokens the model can read; None if it names no limit, as with ALiBi."""
    config = _text_config(model)
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's input embedding knows."""
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return int(embedding.weight.shape[0])


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
