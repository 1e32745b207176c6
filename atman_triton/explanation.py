"""The result of an explanation: which units of the input supported which target tokens.

Legend: K targets (answers that were explained), T target tokens (what was scored, those of all
targets in order), U units (what was suppressed, one at a time). Log-probabilities and scores are in
nats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .completeness import Completeness
from .pieces import (
    Document,
    LeftOut,
    Target,
    TargetPart,
    Unit,
    check_branches,
    check_names,
    check_pieces,
)
from .saving import from_json, load, save, to_json
from .table import dataframe, import_extra

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Explanation", "LeftOut", "Target", "Unit", "from_json", "load", "to_json"]

METHODS = ("exact", "direct", "hybrid", "hierarchical", "path", "score_gradient")
GRADIENT_METHODS = ("path", "score_gradient")


@dataclass(eq=False, repr=False)
class Explanation:
    """What every unit of the input contributed to every target token.

    ``scores[t, u]`` is the rise of the loss of target token ``t`` when unit ``u`` is suppressed:
    positive means that the unit supports the target, negative that it opposes it. NaN means not
    measured, because the unit stands at or after the target token or in another target; it never
    means 0.

    One target or many, the shapes follow one rule: a row per target token, those of target 0
    first. Each target was scored as if it alone followed the prompt, and its tokens are counted on
    from the prompt's; ``branch(k)`` is what a separate explanation of target ``k`` gives.

    Args:
        text: The prompt, then target 0, target 1 and so on; all character spans refer to it.
        prompt_stop: Character of ``text`` where the prompt ends and target 0 starts.
        units: The ``U`` pieces that were suppressed, at least one.
        targets: The ``T`` scored tokens, at least one for every target, in order.
        base_logprobs: ``[T]`` float32, nats: log p of each target token with nothing suppressed.
        suppressed_logprobs: ``[T, U]`` float32, nats: the same with one unit suppressed; NaN where
            the unit stands at or after the target token, or in another target. No run of a gradient
            method suppresses one unit alone: there it is the base less the score.
        reduction: How ``relevance`` goes over target tokens: ``"mean"`` (Eq. 3), ``"sum"`` (Eq. 2).
        left_out: What the model read besides the units, such as template tokens.
        provenance: How the numbers came about: model, settings, library versions. JSON values only.
        target_stops: ``[K]``, character of ``text`` where each target ends, the last one where the
            text ends. Empty stands for one target and becomes ``[len(text)]``.
        method: ``"exact"`` (every unit's total effect), ``"direct"`` (every unit's direct effect),
            ``"hybrid"`` (direct, then exact for the strongest), ``"hierarchical"`` (large units
            first, then what they are made of), or by gradients ``"path"`` and
            ``"score_gradient"``; see ``Unit.effect``.
        coarse: The same prompt and targets by larger units, from which ``"hierarchical"`` chose
            what to refine; it may have a ``coarse`` of its own.
        together_logprobs: Of gradient methods, and only of them, ``[T]`` float32, nats: log p of
            each target token with all units suppressed together that have a score for it.
        documents: Sources that the prompt holds, in text order (``Unit.document``).
        parts: What the target tokens are read in: whole answers, sentences, words, tokens. Empty
            stands for a part per target and becomes that.
        postprocessing: What is done to every score before ``relevance`` goes over target tokens:
            ``"none"``, ``"absolute"`` or ``"square"``. ``scores`` itself stays as measured.
        normalize: Whether ``relevance`` is then moved and scaled to [0, 1] over the measured units.
        contrast: Whether ``relevance`` is that for target 0 minus that for target 1: why this
            rather than that.

    Tensors are kept on the CPU, detached; ``provenance`` as JSON returns it (tuples become lists).

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if shapes, spans or names disagree.
    Source: AtMan, Eq. 2 and 3.
    """

    text: str
    prompt_stop: int
    units: list[Unit]
    targets: list[Target]
    base_logprobs: Tensor
    suppressed_logprobs: Tensor
    reduction: Literal["mean", "sum"] = "mean"
    left_out: list[LeftOut] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    target_stops: list[int] = field(default_factory=list)
    method: str = "exact"
    coarse: Explanation | None = None
    together_logprobs: Tensor | None = None
    documents: list[Document] = field(default_factory=list)
    parts: list[TargetPart] = field(default_factory=list)
    postprocessing: Literal["none", "absolute", "square"] = "none"
    normalize: bool = False
    contrast: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a str, got {type(self.text).__name__}.")
        if not 0 <= self.prompt_stop <= len(self.text):
            raise ValueError(
                f"prompt_stop must lie in [0, {len(self.text)}], got {self.prompt_stop}."
            )
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}.")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
        self.units, self.targets = list(self.units), list(self.targets)
        self.left_out, self.documents = list(self.left_out), list(self.documents)
        self.target_stops = list(self.target_stops) or [len(self.text)]
        edges = [self.prompt_stop, *self.target_stops]
        if edges != sorted(edges) or edges[-1] != len(self.text):
            raise ValueError(
                f"target_stops must rise from prompt_stop {self.prompt_stop} to the text's length "
                f"{len(self.text)}, got {self.target_stops}."
            )
        check_pieces("units", self.units, Unit, len(self.text))
        check_pieces("targets", self.targets, Target, len(self.text))
        check_names(self.units, self.method)
        if len(self.target_stops) == 1:
            self.units = [
                replace(unit, branch=0) if unit.part == "target" and unit.branch is None else unit
                for unit in self.units
            ]
        check_branches(self.units, self.targets, self.prompt_stop, self.target_stops)
        shape = (len(self.targets), len(self.units))
        self.base_logprobs = _checked("base_logprobs", self.base_logprobs, shape[:1])
        self.suppressed_logprobs = _checked("suppressed_logprobs", self.suppressed_logprobs, shape)
        if bool(self.base_logprobs.isnan().any()):
            raise ValueError(
                "base_logprobs must hold no NaN: the model returned NaN with nothing suppressed; "
                "try another dtype."
            )
        self._check_together(shape[:1])
        self._check_other_targets()
        try:
            self.provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must hold JSON values only: {error}.") from error
        self._check_coarse()
        self.parts = list(self.parts) or self._answers()

    def _answers(self) -> list[TargetPart]:
        """A part per target: all of its tokens."""
        edges = [self.prompt_stop, *self.target_stops]
        order = [target.branch for target in self.targets]
        parts = []
        for branch, text in enumerate(self.answers):
            start, stop = edges[branch : branch + 2]
            span = (start, stop) if start < stop else (None, None)
            rows = tuple(row for row, owner in enumerate(order) if owner == branch)
            parts.append(TargetPart(text, rows, *span, branch))
        return parts

    def _check_together(self, shape: tuple[int, ...]) -> None:
        wanted = self.method in GRADIENT_METHODS
        if self.together_logprobs is None:
            if wanted:
                raise ValueError(
                    f"together_logprobs must be given where method is {self.method!r}."
                )
            return
        if not wanted:
            raise ValueError(
                f"together_logprobs must be None where method is {self.method!r}: it is for "
                f"{' and '.join(GRADIENT_METHODS)}."
            )
        self.together_logprobs = _checked("together_logprobs", self.together_logprobs, shape)
        if bool(self.together_logprobs.isnan().any()):
            raise ValueError("together_logprobs must hold no NaN.")

    def _check_other_targets(self) -> None:
        """A unit of one target says nothing about another one: NaN, never a number."""
        owners = torch.tensor([-1 if unit.branch is None else unit.branch for unit in self.units])
        foreign = (owners >= 0) & (owners != self._branches()[:, None])  # [T, U]
        wrong = (foreign & ~self.suppressed_logprobs.isnan()).nonzero()
        if len(wrong):
            target, unit = wrong[0].tolist()
            raise ValueError(
                f"suppressed_logprobs[{target}, {unit}] must be NaN: the unit belongs to target "
                f"{self.units[unit].branch}, the token to target {self.targets[target].branch}."
            )

    def _check_coarse(self) -> None:
        coarse = self.coarse
        if coarse is None:
            return
        if not isinstance(coarse, Explanation):
            raise TypeError(f"coarse must be an Explanation or None, got {type(coarse).__name__}.")
        for name in ("text", "prompt_stop", "target_stops", "targets"):
            if getattr(coarse, name) != getattr(self, name):
                raise ValueError(f"coarse must explain the same prompt and targets; {name} differ.")

    def _branches(self) -> Tensor:
        """``[T]``: which target each scored token belongs to."""
        return torch.tensor([target.branch for target in self.targets])

    @property
    def scores(self) -> Tensor:
        """``[T, U]`` float32, nats: loss with the unit suppressed minus loss without.

        A row per target token, those of all targets in order. Positive: the unit supports the
        target. NaN: the unit stands at or after the target token, or in another target.
        Source: AtMan, Eq. 3.
        """
        return self.base_logprobs[:, None] - self.suppressed_logprobs

    @property
    def relevances(self) -> Tensor:
        """``[K, U]`` float32, nats: ``scores`` averaged (or summed) over each target's tokens.

        NaN counts as absent; a unit that was measured for no token of the target stays NaN.
        Source: AtMan, Eq. 3 (mean), Eq. 2 (sum).
        """
        return self._reduced()[0].float()

    @property
    def relevance(self) -> Tensor:
        """``[U]`` float32, nats: ``relevances`` averaged over the targets; of one target, its own.

        NaN counts as absent; a unit that was measured for no target stays NaN.
        Source: AtMan, Eq. 3 (mean), Eq. 2 (sum).
        """
        relevances, measured = self._reduced()
        total = relevances.where(measured, 0.0).sum(0)
        count = measured.sum(0)
        return (total / count).where(count > 0, torch.nan).float()

    def _reduced(self) -> tuple[Tensor, Tensor]:
        """``[K, U]`` float64 relevances, and which of them were measured."""
        scores = self.scores.double()
        measured = ~scores.isnan()
        shape = (len(self.target_stops), len(self.units))
        branches = self._branches()
        total = torch.zeros(shape, dtype=torch.float64)
        total.index_add_(0, branches, scores.where(measured, 0.0))
        count = torch.zeros(shape, dtype=torch.float64)
        count.index_add_(0, branches, measured.double())
        reduced = total / count if self.reduction == "mean" else total
        return reduced.where(count > 0, torch.nan), count > 0

    @property
    def prompt(self) -> str:
        """The prompt as the model read it."""
        return self.text[: self.prompt_stop]

    @property
    def answers(self) -> list[str]:
        """The text of each of the ``K`` targets."""
        names: list[list[str]] = [[] for _ in self.target_stops]
        for target in self.targets:
            names[target.branch].append(target.text)
        edges = [self.prompt_stop, *self.target_stops]
        return [
            self.text[start:stop] or "".join(name)
            for start, stop, name in zip(edges, edges[1:], names, strict=False)
        ]

    @property
    def answer(self) -> str:
        """What was explained, as text; of several targets all, with `` | `` between them."""
        return " | ".join(self.answers)

    @property
    def answer_logprobs(self) -> Tensor:
        """``[K]`` float32, nats: log p of each whole target with nothing suppressed."""
        total = torch.zeros(len(self.target_stops), dtype=torch.float64)
        return total.index_add_(0, self._branches(), self.base_logprobs.double()).float()

    @property
    def effect(self) -> Literal["total", "direct", "path", "gradient", "mixed"]:
        """The effect that the units' scores are, ``mixed`` if not all the same."""
        first = self.units[0].effect
        return first if all(unit.effect == first for unit in self.units) else "mixed"

    @property
    def completeness(self) -> Completeness | None:
        """Whether the scores add up: of gradient methods only, None of the others."""
        if self.together_logprobs is None:
            return None
        scores = self.scores.double()
        rises = self.base_logprobs.double() - self.together_logprobs.double()
        return Completeness(scores.nansum(1), rises, self._branches(), len(self.target_stops))

    def branch(self, index: int) -> Explanation:
        """What a separate explanation of one of the targets gives.

        Units and left-out pieces of other targets are dropped; the text is the prompt and that
        target, the spans and token positions are those there. ``coarse`` is reduced alike,
        ``provenance`` stays that of the whole.

        Args:
            index: Which target, from 0.
        Raises: ValueError: if there is no such target, or none of the units belongs to it.
        """
        self._check_branch(index)
        start, stop = [self.prompt_stop, *self.target_stops][index : index + 2]
        rows = [row for row, target in enumerate(self.targets) if target.branch == index]
        columns = [c for c, unit in enumerate(self.units) if unit.branch in (None, index)]
        if not columns:
            raise ValueError(f"no unit belongs to target {index} or the prompt.")
        # Whether targets are counted on or each from the prompt's end, all end up at the latter.
        tokens = self.targets[rows[0]].token - self.targets[0].token

        def moved(piece: Any) -> Any:
            neighbours = getattr(piece, "neighbours", ())
            if neighbours:
                own = tuple(moved(n) for n in neighbours if n.branch in (None, index))
                piece = replace(piece, neighbours=own)
            if piece.branch is None:
                return piece
            place: dict[str, Any] = {"branch": 0}
            if hasattr(piece, "tokens"):
                place["tokens"] = tuple(token - tokens for token in piece.tokens)
            else:
                place["token"] = piece.token - tokens
            if getattr(piece, "start", None) is not None:
                by = start - self.prompt_stop
                place |= {"start": piece.start - by, "stop": piece.stop - by}
            return replace(piece, **place)

        return replace(
            self,
            text=self.prompt + self.text[start:stop],
            units=[moved(self.units[column]) for column in columns],
            targets=[moved(self.targets[row]) for row in rows],
            base_logprobs=self.base_logprobs[rows],
            suppressed_logprobs=self.suppressed_logprobs[rows][:, columns],
            together_logprobs=None
            if self.together_logprobs is None
            else self.together_logprobs[rows],
            left_out=[moved(p) for p in self.left_out if p.branch in (None, index)],
            target_stops=[self.prompt_stop + stop - start],
            parts=[],
            coarse=None if self.coarse is None else self.coarse.branch(index),
        )

    def ranking(self, target: int | None = None, branch: int | None = None) -> list[int]:
        """Indices of the measured units, the strongest supporter first; ties stay in text order.

        Args:
            target: Rank by this row of ``scores`` instead of by ``relevance``.
            branch: Rank by this row of ``relevances``.
        Raises: ValueError: if there is no such target.
        """
        values = self.values(target, branch).tolist()
        measured = [index for index, value in enumerate(values) if not math.isnan(value)]
        return sorted(measured, key=lambda index: -values[index])

    def values(self, target: int | None = None, branch: int | None = None) -> Tensor:
        """``[U]`` float32, nats: ``relevance``, or one row of ``scores`` or ``relevances``.

        Args:
            target: Index of a target token; None for all of them reduced.
            branch: Index of one of several targets; None for all of them.
        Raises: ValueError: if there is no such target, or both are given.
        """
        if target is not None and branch is not None:
            raise ValueError(
                f"give target (a target token) or branch (a whole target), got target={target} "
                f"and branch={branch}."
            )
        if branch is not None:
            self._check_branch(branch)
            return self.relevances[branch]
        if target is None:
            return self.relevance
        if not 0 <= target < len(self.targets):
            raise ValueError(f"target must lie in [0, {len(self.targets) - 1}], got {target}.")
        return self.scores[target]

    def _check_branch(self, index: int) -> None:
        if not 0 <= index < len(self.target_stops):
            raise ValueError(f"branch must lie in [0, {len(self.target_stops) - 1}], got {index}.")

    def to_dataframe(self, top_k: int | None = None) -> pandas.DataFrame:
        """One row per unit: text, part, start, stop, relevance, rank (1 = best), effect, level.

        With several target tokens, a column for each one's scores follows: ``"0: text"``,
        ``"1: text"`` and so on. With several targets these columns are the ``relevances`` for each
        target instead (``branch(k).to_dataframe()`` tells its tokens apart), and ``branch`` says
        which target a unit belongs to. The index is the unit's number. Of gradient methods,
        ``attrs["completeness_error"]`` is that of ``completeness``.

        Args:
            top_k: Keep so many units, the most relevant first; None keeps all in text order.
        Raises:
            ImportError: if pandas is not installed.
            ValueError: if ``top_k`` is below 1.
        """
        return dataframe(self, top_k)

    def show(
        self,
        top_k: int | None = None,
        width: int | None = None,
        target: int | None = None,
        branch: int | None = None,
    ) -> None:
        """Print the explanation to the terminal: the text as a heat map, then the strongest units.

        Of several targets, the prompt is coloured by what it does for all of them, and the targets
        are listed; ``branch`` or ``target`` shows one of them with its own text.

        Args:
            top_k: How many supporters to list; None for up to 10 that tell something.
            width: Columns to use; None for the terminal's.
            target: Show this target token's scores instead of ``relevance``.
            branch: Show this one of several targets.
        Raises: ValueError: if ``top_k`` or ``width`` is too small or there is no such target.
        """
        from .render.terminal import show

        explanation, target = self._chosen(target, branch)
        show(explanation, top_k=top_k, width=width, target=target)

    def _chosen(self, target: int | None, branch: int | None) -> tuple[Explanation, int | None]:
        """The explanation of the one target to picture, and the token's number in it."""
        self.values(target, branch)
        if len(self.target_stops) == 1:
            return self, target
        if target is not None:
            branch = self.targets[target].branch
            target -= [each.branch for each in self.targets].index(branch)
        return (self if branch is None else self.branch(branch)), target

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, others: Iterable[Explanation] = ()
    ) -> str:
        """One self-contained HTML page: the text coloured by relevance, numbers on hover or focus.

        The reader chooses the target, the target token and, of a refined result, larger units.

        Args:
            path: Also write the page to this file.
            others: Explanations of the same document (other questions, other targets) to lay over
                this one, each in its own colour, as in the paper's Fig. 6.
        Returns: the page.
        Raises: ValueError: if the explanations share no text.
        """
        from .render.html import to_html

        page = to_html([self, *others])
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        target: int | None = None,
        branch: int | None = None,
    ) -> Figure:
        """A matplotlib figure: the text as a heat map, the strongest units, targets against units.

        Of several targets, the prompt is coloured by what it does for all of them.

        Args:
            path: Also write the figure to this file; its ending (png, svg, pdf) says the format.
            target: Draw this target token's scores instead of ``relevance``.
            branch: Draw this one of several targets.
        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if there is no such target.
        """
        import_extra("matplotlib", "plot")
        from .render.figure import plot

        explanation, target = self._chosen(target, branch)
        return plot(explanation, path=path, target=target)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON, which ``load`` reads back exactly."""
        save(self, path)

    def __eq__(self, other: object) -> bool:
        """Equal in every field; NaN equals NaN."""
        if not isinstance(other, Explanation):
            return NotImplemented
        return to_json(self) == to_json(other)

    def __repr__(self) -> str:
        count = len(self.target_stops)
        what = f"answer={self.answer!r}" if count == 1 else f"answers={count}"
        return (
            f"Explanation({what}, units={len(self.units)}, targets={len(self.targets)}, "
            f"reduction={self.reduction!r}, method={self.method!r})"
        )


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be torch.float32, got {value.dtype}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}.")
    return value.detach().cpu()
