"""The explanation that the benchmarks time: a Llama of a known shape, random weights and tokens.

Legend: P prompt tokens, T target tokens, M scored tokens of all targets, U units.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from atman_triton.engine import Effect, Engine, Settings, Unit, undisturbed
from atman_triton.testing import assert_close_to_oracle
from bench.eager import scores_by_eager_loop

FACTOR, MODE = 0.1, "min_shift"  # the default preset's
LOOP = "eager loop, full logits"


@dataclasses.dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama with an output head of its own."""

    name: str
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int = 32000

    @property
    def parameters(self) -> int:
        """How many weights such a model has."""
        head_dim = self.width // self.heads
        attention = 2 * self.width * head_dim * (self.heads + self.key_heads)
        layer = attention + 3 * self.width * self.inner + 2 * self.width
        return self.layers * layer + 2 * self.vocabulary * self.width + self.width

    def model(
        self, dtype: torch.dtype, device: torch.device, positions: int = 4096 + 64
    ) -> LlamaForCausalLM:
        """The model, its weights large enough that suppressing a token is felt."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            initializer_range=self.width**-0.5,
        )
        before = torch.get_default_dtype()
        try:  # born where it stays, because the largest would not fit twice
            torch.set_default_dtype(dtype)
            with device:
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


# Like the Llamas with this vocabulary it has an output head of its own, which with 34M parameters
# takes more of a full forward pass than the layers do.
LLAMA_34M = LlamaShape("llama-34M", 384, 6, 6, 2, 1024)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is explained: every prompt token is a unit.

    Args:
        prompt: ``[P]`` token ids.
        targets: ``[T]`` each.
    """

    model: LlamaForCausalLM
    prompt: Tensor
    targets: tuple[Tensor, ...]

    def engine(
        self,
        without: Iterable[str] = (),
        batch_size: int | str = "auto",
        expect=lambda tokens: None,
    ) -> Engine:
        """The base run done, in mode ``min_shift``."""
        settings = Settings(FACTOR, MODE, batch_size=batch_size, without=frozenset(without))  # pyright: ignore[reportArgumentType]
        inputs = {"input_ids": self.prompt[None]}
        targets = [target.tolist() for target in self.targets]
        with undisturbed(self.model):
            return Engine(self.model, inputs, targets, settings, expect)

    def scores(
        self,
        units: Sequence[int] | None = None,
        effect: Effect = "total",
        without: Iterable[str] = (),
        batch_size: int | str = "auto",
    ) -> Tensor:
        """``[M, U]``, of all prompt tokens where no units are given; base run included."""
        engine = self.engine(without, batch_size)
        units = range(len(self.prompt)) if units is None else units
        with undisturbed(self.model):
            found = engine.perturb([Unit((unit,)) for unit in units], effect)
        return (engine.base_logprobs - found).T

    def loop(self, units: Sequence[int], effect: Effect = "total", target: int = 0) -> Tensor:
        """``[T, U]`` of one target by the loop of eager forwards."""
        return scores_by_eager_loop(
            self.model,
            self.prompt,
            self.targets[target],
            units,
            factor=FACTOR,
            mode=MODE,
            first_row=len(self.prompt) - 1 if effect == "direct" else 0,
        )

    def doubled(self) -> Task:
        """The same in float64."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model).double())


def make_task(model: LlamaForCausalLM, prompt: int, targets: Sequence[int]) -> Task:
    """Random tokens, as many as given."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        0, model.config.vocab_size, (prompt + sum(targets),), generator=generator
    )
    first, *rest = tokens.to(model.device).split([prompt, *targets])
    return Task(model, first, tuple(rest))


def spread(units: int, count: int) -> list[int]:
    """``count`` of the numbers below ``units``, evenly spread, neither end left out."""
    if count >= units:
        return list(range(units))
    if count == 1:
        return [units // 2]
    return [round(place * (units - 1) / (count - 1)) for place in range(count)]


def check(
    task: Task,
    outputs: dict[str, tuple[Tensor, Effect]],
    units: Sequence[int],
    target: int = 0,
) -> None:
    """Refuse wrong scores.

    Args:
        outputs: ``[T, U]`` scores of ``target`` and ``units``, and which effect they are.
    Raises: AssertionError: with the name of what is wrong.
    """
    truth = task.doubled()
    by_effect: dict[Effect, dict[str, Tensor]] = {}
    for name, (scores, effect) in outputs.items():
        by_effect.setdefault(effect, {})[name] = scores
    for effect, named in by_effect.items():
        oracle = truth.loop(units, effect, target)
        eager = task.loop(units, effect, target)
        for name, scores in named.items():
            assert_close_to_oracle(scores.to(eager.device), eager, oracle, name=name)


class _Planned(Exception):
    """Ends a run once it is known how many tokens it would take."""


def planned_tokens(task: Task, units: Sequence[int], without: Iterable[str] = ()) -> int:
    """Tokens that exact runs of units take, wasted ones included; the base run is not counted."""
    plan: list[int] = []
    armed = False

    def expect(tokens: int) -> None:
        if armed:
            plan.append(tokens)
            raise _Planned

    engine = task.engine(without, expect=expect)
    armed = True
    try:
        with undisturbed(task.model):
            engine.perturb([Unit((unit,)) for unit in units])
    except _Planned:
        return plan[0]
    raise RuntimeError("the engine ran without saying how many tokens it would run.")
