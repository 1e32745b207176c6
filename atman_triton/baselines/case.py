"""One prompt and its targets, as the methods see it that AtMan is compared with.

Four ways to ask a model: with pieces of the prompt taken out of its input (``without``), with
pieces hidden from attention (``hidden``), with other embeddings (``values``, which can be
differentiated), and as it is (``inputs``). All of them count what they run in ``record``, so that
costs compare.

Legend: U units, K targets, M scored tokens of all targets, T of one of them, P prompt tokens,
S = P + T − 1 tokens that are read for one target, D width of embeddings, N variants of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from .. import memory
from ..branches import Branches
from ..capabilities import device_of, dtype_of, keeps_logits
from ..engine import Engine, undisturbed
from ..explanation import Explanation
from ..inputs import continued, moved
from ..integration import run_as_atman
from ..perturbations import Record, Settings
from ..perturbations import Unit as Perturbation
from ..pieces import Unit
from ..replay import Replay
from ..scored import check_base, rows_of, stands_before, timed
from ..stacks import UnsupportedModelError
from ..tasks import Prompt, Task, task_of
from ..tasks.decoder import DecoderTask
from .removal import Removal

Output = Literal["logprob", "logit"]
"""What is scored of a target token; logits still have a slope where the model is certain."""

Scored = Literal["logprob", "logit", "odds"]
"""``odds``: the logarithm of p / (1 - p), which is exact where p is all but 1."""

BACKWARD = 2  # forward passes that a backward one costs


class Case:
    """A prompt, what is scored behind it, and the units that are to be rated.

    Args:
        task: Of the model: a decoder alone.
        prompt: As the task reads it.
        targets: ``K`` sequences of token ids that are scored.
        units: ``U`` pieces of the prompt and of the targets.
        context: Token ids behind the prompt that are read, but not scored.
        expect: Called with the number of tokens that will be run.
        advance: Called with the number of tokens that were run.
    Raises: UnsupportedModelError: if the model is no decoder alone.
    """

    def __init__(
        self,
        task: Task,
        prompt: Prompt,
        targets: Sequence[Sequence[int]],
        units: Sequence[Unit],
        *,
        context: Sequence[int] = (),
        expect: Callable[[int], None] = lambda tokens: None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        if type(task) is not DecoderTask:
            raise no_decoder(task.model)
        self.task: DecoderTask = task
        self.model: Any = task.model
        self.device = device_of(self.model)
        self.prompt = prompt
        self.targets = [tuple(target) for target in targets]
        self.rows = rows_of(self.targets)
        """Of each target, its rows among the ``M``."""
        self.units = list(units)
        self.perturbations = [Perturbation(unit.tokens, unit.branch) for unit in self.units]
        self.context = list(context)
        self.prompt_tokens = len(prompt.words) + len(self.context)
        """``P``, the context included."""
        self.record = Record()
        self.expect, self.advance = expect, advance
        self.measured = stands_before(self.perturbations, self.rows, self.prompt_tokens, max)
        """Bool ``[U, M]``: where a score has a meaning; elsewhere it is NaN."""
        with undisturbed(self.model), timed(self.record):
            self.base_logprobs = self._base()
        """``[M]`` float32, nats: the prompt as it is."""
        check_base(self.base_logprobs, dtype_of(self.model))

    @classmethod
    def of(cls, model: Any, processor: Any, prompt: Any, explanation: Explanation) -> Case:
        """The prompt, targets and units of an explanation.

        Args:
            model: The model that was explained.
            processor: Its tokenizer or processor.
            prompt: As ``explain`` was given it, with its documents filled in.
            explanation: Of this prompt and of whole targets: not of a ``target_span``.
        Raises:
            UnsupportedModelError: if the model is no decoder alone.
            ValueError: if the explanation is of another prompt, or of part of a target.
        """
        task = task_of(model, processor)
        if type(task) is not DecoderTask:
            raise no_decoder(model)
        read = task.read(prompt)
        targets: list[list[int]] = [[] for _ in explanation.target_stops]
        for target in explanation.targets:
            own = targets[target.branch]
            expected = len(read.words) + len(own)
            if target.token != expected:
                raise ValueError(
                    "explanation must be of this prompt, its documents filled in, and of whole "
                    f"targets: scored token {target.text!r} stands at {target.token}, expected "
                    f"{expected}."
                )
            own.append(target.token_id)
        return cls(task, read, targets, explanation.units)

    @property
    def forwards(self) -> float:
        """What was run so far, in passes over the prompt; a backward pass counts as two."""
        return self.record.tokens / self.prompt_tokens

    def count(self, rows: int, tokens: int, *, backward: bool = False) -> None:
        """Note a finished pass of ``rows`` times ``tokens`` tokens, or a backward pass."""
        if backward:
            self.record.backward_runs += rows
            self._note(rows * tokens * BACKWARD)
        else:
            self.count_all([tokens] * rows)

    def count_all(self, tokens: Sequence[int]) -> None:
        """Note a finished pass of rows of so many tokens each."""
        self.record.batch_sizes.append(len(tokens))
        self._note(sum(tokens))

    def _note(self, tokens: int) -> None:
        self.record.tokens += tokens
        self.advance(tokens)

    # --- the prompt as it is ----------------------------------------------------------------------

    def inputs(self, target: int) -> dict[str, Any]:
        """What the model's forward takes for the prompt and one target but its last token."""
        longer = continued(
            self.prompt.inputs,
            [*self.context, *self.targets[target][:-1]],
            str(getattr(self.model.config, "model_type", "")),
        )
        return moved(longer, self.device)

    def length(self, target: int) -> int:
        """``S`` of a target."""
        return self.prompt_tokens + len(self.targets[target]) - 1

    def places(self, target: int) -> range:
        """``T`` columns of the ``S`` that predict a target's tokens."""
        return range(self.prompt_tokens - 1, self.length(target))

    def scored(self, logits: Tensor, target: int, output: Scored = "logprob") -> Tensor:
        """``[B, T]`` of the target's tokens, from logits whose last ``T`` columns predict them.

        In float32; of float64 logits in float64.
        """
        own = torch.tensor(self.targets[target], device=logits.device)
        kept = logits[:, -len(own) :]
        kept = kept if kept.dtype == torch.float64 else kept.float()
        wanted = own.expand(len(kept), -1)[..., None]  # [B, T, 1]
        if output == "logprob":
            kept = kept.log_softmax(-1)
        found = kept.gather(-1, wanted).squeeze(-1)
        if output == "odds":
            found = found - kept.scatter(-1, wanted, -torch.inf).logsumexp(-1)
        return found

    def _base(self) -> Tensor:
        found = []
        for k, target in enumerate(self.targets):
            self.expect(self.length(k))
            with self.task.encoded.on(self.model):
                output = self.model(**self.inputs(k), use_cache=False, **self.keep(len(target)))
            found.append(self.scored(output.logits, k)[0].float().cpu())
            self.count(1, self.length(k))
        return torch.cat(found)

    def keep(self, logits: int) -> dict[str, int]:
        """What tells the model's forward to compute the last logits alone, where it can be told."""
        return {"logits_to_keep": logits} if keeps_logits(self.model) else {}

    # --- other embeddings -------------------------------------------------------------------------

    @cached_property
    def _replays(self) -> list[Replay]:
        found = []
        for k in range(len(self.targets)):
            inputs = self.inputs(k)
            branches = Branches(self.length(k), ((0,),))  # whose only token is never read
            with undisturbed(self.model), self.task.encoded.on(self.model):
                found.append(Replay(self.model, inputs, branches))
        return found

    def embeddings(self, target: int) -> Tensor:
        """What the text stack reads for one target, pictures included: ``[1, S, D]``, detached."""
        with torch.no_grad():
            return self._replays[target].embeddings()[None].detach().clone()

    def values(self, target: int, embeddings: Tensor, output: Output = "logit") -> Tensor:
        """One target's tokens where the text stack reads other embeddings.

        Differentiable in ``embeddings`` inside ``torch.enable_grad()``. Counted as one forward pass
        a row; who runs it backward counts that (``count(..., backward=True)``).

        Args:
            target: Which of the ``K``.
            embeddings: ``[B, S, D]``.
            output: What to return of each token.
        Returns: ``[B, T]`` float32; of a model in float64 that.
        """
        replay, rows, length = self._replays[target], len(embeddings), self.length(target)
        slopes = torch.is_grad_enabled()
        with (
            undisturbed(self.model),
            torch.set_grad_enabled(slopes),
            run_as_atman(self.model, None, "multiplicative"),
        ):
            wanted = len(self.targets[target])
            logits = replay.run(0, length, rows, wanted, cached=False, embeddings=embeddings)
        self.count(rows, self.length(target))
        return self.scored(logits, target, output)

    # --- pieces of the prompt taken away ----------------------------------------------------------

    @cached_property
    def removable(self) -> list[int]:
        """Indices of the units that stand in the prompt."""
        return [index for index, unit in enumerate(self.units) if unit.part == "prompt"]

    def without(self, removed: Sequence[Collection[int]], output: Scored = "logprob") -> Tensor:
        """Log-probabilities with units of the prompt taken out of the model's input.

        Text is deleted: what follows moves up. Pieces of a picture are painted in the picture's
        mean colour; those without a place on it stay. Where nothing would be left in front of the
        answer, one start, end or padding token stands there.

        Args:
            removed: ``N`` sets of indices of units.
            output: What to give of each scored token, in place of its log-probability.
        Returns: ``[N, M]`` float32, nats, on the CPU.
        Raises:
            torch.OutOfMemoryError: if not even one variant fits in memory.
            UnsupportedModelError: if the processor reads painted pictures as other tokens.
            ValueError: if a unit is none of the prompt, or nothing stands for an empty one.
        """
        for units in removed:
            self._check_removable(units)
        with undisturbed(self.model), timed(self.record):
            return self._removal.scores(removed, output)

    @cached_property
    def _removal(self) -> Removal:
        return Removal(self)

    def hidden(self, removed: Sequence[Collection[int]]) -> Tensor:
        """Log-probabilities with units of the prompt hidden from all attention.

        They stay where they are, but no token sees them, in any layer: their weights are 0.

        Args:
            removed: ``N`` sets of indices of units.
        Returns: ``[N, M]`` float32, nats, on the CPU.
        Raises: ValueError: if a unit is none of the prompt.
        """
        for units in removed:
            self._check_removable(units)
        found = self.base_logprobs.repeat(len(removed), 1)
        some = [n for n, units in enumerate(removed) if units]
        unions = [
            Perturbation(tuple(sorted({p for u in removed[n] for p in self.units[u].tokens})))
            for n in some
        ]
        with undisturbed(self.model), timed(self.record):
            before = self._hiding.record.tokens
            if some:
                found[some] = self._hiding.perturb(unions)
            self.record.tokens += self._hiding.record.tokens - before
        return found

    @cached_property
    def _hiding(self) -> Engine:
        inputs = continued(
            self.prompt.inputs, self.context, str(getattr(self.model.config, "model_type", ""))
        )
        settings = Settings(factor=0.0, mode="log_additive")
        with self.task.encoded.on(self.model):
            engine = Engine(self.model, inputs, self.targets, settings, self.expect, self.advance)
        self.record.tokens += engine.record.tokens
        return engine

    def _check_removable(self, units: Collection[int]) -> None:
        wrong = sorted(set(units).difference(self.removable), key=str)
        if wrong:
            raise ValueError(f"removed must hold indices of units of the prompt, got {wrong[0]!r}.")

    # --- scores -----------------------------------------------------------------------------------

    def by_unit(self, target: int, values: Tensor) -> Tensor:
        """Values of tokens summed over units: ``[T, S]`` to ``[U, T]`` float64, on the CPU.

        Units of other targets get 0, which ``scores`` replaces.
        """
        values = values.detach().double().cpu()
        found = torch.zeros(len(self.units), len(values), dtype=torch.float64)
        for index, unit in enumerate(self.units):
            if unit.branch in (None, target):
                own = [place for place in unit.tokens if place < values.shape[1]]
                found[index] = values[:, own].sum(1)
        return found

    def scores(self, per_target: Sequence[Tensor]) -> Tensor:
        """What each target gave, ``[U, T]`` each, side by side: ``[U, M]``, NaN where too late."""
        return torch.cat(list(per_target), 1).double().masked_fill(~self.measured, torch.nan)

    def batches(self, count: int, tokens: int) -> Iterator[range]:
        """``count`` rows of ``tokens`` tokens each, in batches that are worth their memory."""
        size = max(1, memory.tokens_per_batch(self.device) // max(1, tokens))
        for start in range(0, count, size):
            yield range(start, min(count, start + size))


def no_decoder(model: Any) -> UnsupportedModelError:
    """What is said of a model that baselines do not explain."""
    return UnsupportedModelError(
        f"baselines explain decoders alone, with pictures or without, got {type(model).__name__}; "
        "atman_triton.Explainer takes it."
    )
