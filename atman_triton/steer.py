"""``steer``: what a model says while parts of its prompt are suppressed or amplified.

Legend: B prompts, P columns of the prompts (padding included), R rows of a forward pass, Tq its
tokens, D width of embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_one_of
from .attention import BACKENDS, MODES
from .capabilities import check_causal
from .controls import Control, checked_controls, control_factors
from .integration import manipulate
from .layers import THREAD
from .sites import own_source
from .stacks import find_stack
from .steer_inputs import Prompts, prompts_of, read_steered
from .tokens import Tokens

# By `python -m bench.steering`: at factor 2 another fact takes over 61% of answers (multiplicative
# 14%, log_additive none), and at 0.1 almost none survives (log_additive: 96%).
DEFAULT_MODE = "min_shift"


@contextmanager
def steer(
    model: nn.Module,
    controls: Sequence[Control] | Sequence[Sequence[Control]],
    *,
    inputs: Any,
    tokenizer: Any = None,
    processor: Any = None,
    images: Any = None,
    mode: str = DEFAULT_MODE,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    backend: str = "auto",
) -> Iterator[Tensor]:
    """Let controls act on a prompt while the context is open, in ``generate`` or forward passes.

    The factors stay with the prompt's tokens through the whole generation; tokens that the model
    adds have factor 1. Greedy search, sampling, beams, assisted decoding, streaming, and dynamic
    and static caches all serve. Open the context in the thread that runs the model: elsewhere it
    has no effect. Steering combines with ``manipulate`` and with ``steer`` around it: factors
    multiply, and ``Explainer.explain`` inside explains the steered model.

    Args:
        model: A transformers causal language model.
        controls: What to suppress and amplify: ``TextControl``, ``TokenControl``,
            ``ImageControl``. One sequence acts on every prompt; a sequence of sequences has one
            for each. Where several meet on a token, their factors multiply.
        inputs: The prompts, as ``generate`` gets them: what ``tokenizer(...)`` or
            ``processor(...)`` returned, padded on either side; or ids ``[B, P]``; or a str or
            several, together with ``tokenizer``; or a prompt with pictures as
            ``Explainer.explain`` takes it (``[image, "text"]``, chat messages), together with
            ``processor``. A ``TextControl`` needs text, or the unchanged encoding of a fast
            tokenizer; its characters are those of the text without what stands for pictures.
        tokenizer: Only for inputs that are text, which it must encode as ``generate`` gets it.
        processor: What made the inputs, where an ``ImageControl`` acts on them.
        images: The pictures that the inputs of one prompt were made of, in order, where the inputs
            are what ``processor(...)`` returned and an ``ImageControl`` acts on them.
        mode: How a factor acts on scores, see ``atman_triton.attention``. The default,
            ``min_shift``, is the explainer's and works both ways: it moves a score towards the
            row's smallest one, or away from it, so that amplification always means more attention.
            ``multiplicative`` takes attention away where it amplifies a negative score.
            ``log_additive`` multiplies the attention that a token gets against the others by m:
            gentle where scores lie far apart, but 0 removes the token.
        layers: In these layers only; None is all.
        heads: In these query heads only; None is all.
        backend: ``auto``, ``triton``, ``hopper``, ``torch`` or ``reference``.
    Yields: the factors, ``[B, P]`` float32 on the CPU, 1 on padding.
    Raises:
        TypeError, ValueError: if an argument is not as above, a control stands on no token of its
            prompt or needs what is not known of it; from the forward pass, if the model runs on
            other tokens than ``inputs`` (not seen by compiled models).
        UnsupportedModelError: if the model's attention cannot be manipulated, or no forward pass
            of it ran in this thread.
    Source: AtMan; the authors' product, which has the same controls.
    """
    check_causal(model)
    check_one_of("mode", mode, MODES)
    check_one_of("backend", backend, BACKENDS)
    prompts = read_steered(inputs, model, tokenizer, processor, images)
    factors = control_rows(model, controls, prompts)
    with (
        _only_on(model, prompts.ids),
        _without_continuous_batching(model),
        manipulate(model, {own_source(model): factors}, mode, layers, heads, backend=backend),
    ):
        yield factors


@contextmanager
def under_controls(
    model: nn.Module,
    controls: Sequence[Control] | None,
    words: Tokens,
    mode: str,
    backend: str,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    embed: Callable[[], Tensor] | None = None,
    by_source: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
) -> Iterator[list[Control]]:
    """Let controls act on a prompt that is explained; yields them, checked. None is none.

    ``by_source`` divides the prompt's factors ``[1, P]`` where several parts of a model read it;
    else they are of its own tokens.
    """
    if controls is None:
        yield []
        return
    checked = checked_controls("controls", controls)
    factors = control_rows(model, checked, prompts_of(words, sizes, embed))
    given = {own_source(model): factors} if by_source is None else by_source(factors)
    with manipulate(model, given, mode, backend=backend):
        yield checked


def control_rows(model: nn.Module, controls: Any, prompts: Prompts) -> Tensor:
    """The factors that controls give to prompts: ``[B, P]`` float32 on the CPU."""
    factors = torch.ones(prompts.ids.shape)
    every = _per_row(controls, len(prompts.ids))
    for row, (own, columns, known) in enumerate(
        zip(every, prompts.columns, prompts.rows, strict=True)
    ):
        ids = prompts.ids[row, columns]
        embedded = prompts.embed or (lambda i=ids: embed(model, i))
        try:
            factors[row, columns] = control_factors(own, known, embedded)
        except ValueError as error:
            if len(prompts.ids) == 1:
                raise
            raise ValueError(f"prompt {row}: {error}") from error
    return factors


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Input embeddings of token ids: ``[P, D]``."""
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        return table(ids.to(table.weight.device))


def _per_row(controls: Any, rows: int) -> list[list[Control]]:
    """The controls of every prompt."""
    nested = (
        isinstance(controls, (list, tuple))
        and bool(controls)
        and all(isinstance(own, (list, tuple)) for own in controls)
    )
    if not nested:
        return [checked_controls("controls", controls)] * rows
    if len(controls) != rows:
        raise ValueError(
            f"controls must have one sequence for each of the {rows} prompts, or one in all, got "
            f"{len(controls)}."
        )
    return [checked_controls(f"controls[{row}]", own) for row, own in enumerate(controls)]


@contextmanager
def _only_on(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Refuse forward passes of this thread that hold other tokens in the prompts' columns.

    Factors are aligned by column, so there they would act on the wrong tokens.
    """
    module, _ = find_stack(model)
    config: Any = module.config
    layers = config.num_hidden_layers
    thread = THREAD.serves

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if torch.compiler.is_compiling() or THREAD.serves != thread or kwargs is None:
            return
        if config.num_hidden_layers != layers:
            raise ValueError(
                "steer cannot run a model on some of its layers, as assistant_early_exit does; "
                "give generate an assistant_model."
            )
        read = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(read, Tensor):
            _check_tokens(read, kwargs.get("past_key_values"), ids)

    readers: list[Any] = [module]
    if getattr(model.config, "image_token_id", None) is not None:
        # the stack of a vision-language model is handed embeddings, the model around it ids
        outer: Any = model
        readers.append(outer.get_base_model() if hasattr(outer, "get_base_model") else outer)
    handles = [each.register_forward_pre_hook(check, with_kwargs=True) for each in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        config.num_hidden_layers = layers  # an early exit that failed leaves its own


def _check_tokens(read: Tensor, cache: Any, ids: Tensor) -> None:
    """Compare the tokens ``[R, Tq]`` of a pass with the prompts' in the same columns."""
    start = 0 if cache is None else cache.get_seq_length()
    if isinstance(start, Tensor):
        if read.shape[1] == 1:  # a static cache amid decoding; its length would wait for the GPU
            return
        start = int(start)
    expected = ids[:, start : start + read.shape[1]]
    if not expected.shape[1]:
        return
    if len(read) % len(ids):
        raise ValueError(
            f"inputs of steer hold {len(ids)} prompts, but the model runs on {len(read)} rows; "
            "give steer the inputs that the model gets."
        )
    expected = expected.repeat_interleave(len(read) // len(ids), 0)
    differs = read[:, : expected.shape[1]].cpu() != expected
    if bool(differs.any()):
        row, column = (int(index) for index in differs.nonzero()[0])
        raise ValueError(
            f"the model runs on other tokens than the inputs of steer: row {row} has token "
            f"{int(read[row, column])} in column {start + column}, where the controls expect "
            f"{int(expected[row, column])}; give steer the inputs that the model gets."
        )


@contextmanager
def _without_continuous_batching(model: nn.Module) -> Iterator[None]:
    """Refuse it by name: it runs in a thread of its own, which no manipulation reaches."""
    owner: Any = getattr(model, "_orig_mod", model)
    start = getattr(owner, "init_continuous_batching", None)
    if start is None:
        yield
        return
    before = vars(owner).get("init_continuous_batching")
    thread = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return start(*args, **kwargs)
        raise ValueError(
            "steer does not reach continuous batching (generate_batch), which pages its cache and "
            "runs in a thread of its own; call generate."
        )

    owner.init_continuous_batching = refuse
    try:
        yield
    finally:
        if before is None:
            del owner.init_continuous_batching
        else:
            owner.init_continuous_batching = before
