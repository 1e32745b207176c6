"""The result of an explanation: which units of the input supported which target tokens.

Legend: K targets (answers that were explained), T target tokens (what was scored, those of all
targets in order), U units (what was suppressed, one at a time). Log-probabilities and scores are in
nats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from . import checks
from .completeness import Completeness
from .pictures import Picture, Sound
from .pieces import Document, Effect, LeftOut, Target, TargetPart, Unit
from .reduction import Postprocessing, Quantity, Reduction, normalized, postprocessed, reduced
from .saving import from_json, load, save, to_json
from .single import single, whole_targets
from .sources import sources
from .table import dataframe, import_extra

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_LISTS = ("units", "targets", "left_out", "documents", "parts", "pictures")

__all__ = ["Explanation", "LeftOut", "Target", "Unit", "from_json", "load", "to_json"]


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

    What is read from the scores, ``relevance`` and its like, ``values``, ``ranking``, tables and
    pictures, is made of them in this order: ``postprocessing`` of every score, ``reduction`` over
    target tokens, the mean over targets, ``normalize``. In a contrast, scores are reduced as they
    are, those of target 1 subtracted from those of target 0, and the difference is postprocessed.

    Args:
        text: The prompt, then target 0, target 1 and so on; all character spans refer to it.
        prompt_stop: Character of ``text`` where the prompt ends and target 0 starts.
        units: The ``U`` pieces that were suppressed, at least one.
        targets: The ``T`` scored tokens, at least one for every target, in order.
        base_logprobs: ``[T]`` float32, nats: log p of each target token with nothing suppressed.
        suppressed_logprobs: ``[T, U]`` float32, nats: the same with one unit suppressed; NaN where
            the unit stands at or after the target token, or in another target. Gradient methods
            and baselines suppress no unit alone: there it is the base less the score.
        reduction: How ``relevance`` goes over target tokens: ``"mean"`` (Eq. 3), ``"sum"`` (Eq. 2).
        left_out: What the model read besides the units, such as template tokens.
        provenance: How the numbers came about: model, settings, library versions. JSON values only.
        target_stops: ``[K]``, character of ``text`` where each target ends, the last one where the
            text ends. Empty stands for one target and becomes ``[len(text)]``.
        method: ``"exact"`` (every unit's total effect), ``"direct"`` (every unit's direct effect),
            ``"hybrid"`` (direct, then exact for the strongest), ``"hierarchical"`` (large units
            first, then what they are made of), or by gradients ``"path"`` and
            ``"score_gradient"``; any other name is a baseline's. See ``Unit.effect``.
        coarse: The same prompt and targets by larger units, from which ``"hierarchical"`` chose
            what to refine; it may have a ``coarse`` of its own.
        together_logprobs: Of gradient methods, and only of them, ``[T]`` float32, nats: log p of
            each target token with all units suppressed together that have a score for it.
        documents: Sources that the prompt holds, in text order (``Unit.document``).
        parts: What the target tokens are read in: whole answers, sentences, words, tokens. Empty
            stands for a part per target and becomes that.
        postprocessing: What is done to every score before the reduction over target tokens:
            ``"none"``, ``"absolute"`` (how much a unit matters, for or against) or ``"square"``
            (the same, the largest all the more). ``scores`` itself stays as measured.
        normalize: Whether what is read is then moved and scaled to [0, 1] over the measured units,
            each row (relevance, a target's, a part's, a target token's) by itself: 0 is the
            smallest value of the row and 1 the largest; where all are alike, all are 0.
        contrast: Whether ``relevance`` is that for target 0 minus that for target 1: why this
            rather than that. Positive: the unit speaks for target 0. Units of either target are
            NaN, as they say nothing about the other one.
        pictures: Those that the prompt holds, in order (``Unit.image``).
        sound: What the prompt is, if it is a sound (``Unit.seconds``).
        quantity: What is scored, and what ``base_logprobs`` and ``suppressed_logprobs`` hold:
            ``"logprob"`` (of a token or a class, nats), ``"logit"`` (of a class) or ``"output"``
            (of a regression, in its own unit; a positive score raises it).

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
    reduction: Reduction = "mean"
    left_out: list[LeftOut] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    target_stops: list[int] = field(default_factory=list)
    method: str = "exact"
    coarse: Explanation | None = None
    together_logprobs: Tensor | None = None
    documents: list[Document] = field(default_factory=list)
    parts: list[TargetPart] = field(default_factory=list)
    postprocessing: Postprocessing = "none"
    normalize: bool = False
    contrast: bool = False
    pictures: list[Picture] = field(default_factory=list)
    sound: Sound | None = None
    quantity: Quantity = "logprob"

    def __post_init__(self) -> None:
        checks.check_settings(self)
        for name in (*_LISTS, "target_stops"):
            setattr(self, name, list(getattr(self, name)))
        self.target_stops = self.target_stops or [len(self.text)]
        checks.check_targets(self)
        if len(self.target_stops) == 1:
            self.units = [
                replace(unit, branch=0) if unit.part == "target" and unit.branch is None else unit
                for unit in self.units
            ]
        checks.check_branches(self)
        shape = (len(self.targets), len(self.units))
        tensor = checks.checked_tensor
        self.base_logprobs = tensor("base_logprobs", self.base_logprobs, shape[:1])
        self.suppressed_logprobs = tensor("suppressed_logprobs", self.suppressed_logprobs, shape)
        if self.together_logprobs is not None:
            self.together_logprobs = tensor("together_logprobs", self.together_logprobs, shape[:1])
        checks.check_numbers(self)
        checks.check_together(self)
        try:
            self.provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must hold JSON values only: {error}.") from error
        checks.check_documents(self)
        checks.check_neighbours(self)
        checks.check_pictures(self)
        self.parts = self.parts or whole_targets(self)
        checks.check_parts(self)
        self._join_coarse()

    def _join_coarse(self) -> None:
        """What larger units said is read as the whole is."""
        checks.check_coarse(self)
        names = ("parts", "postprocessing", "normalize", "contrast")
        ways = {name: getattr(self, name) for name in names}
        if self.coarse is not None and any(getattr(self.coarse, n) != w for n, w in ways.items()):
            self.coarse = replace(self.coarse, **ways)

    @property
    def _owners(self) -> list[int]:
        """``[T]``: which target each scored token belongs to."""
        return [target.branch for target in self.targets]

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
        """``[K, U]`` float32: ``scores`` averaged (or summed) over each target's tokens.

        In nats (squares of them where ``postprocessing`` is ``"square"``), or from 0 to 1 where
        ``normalize`` is set. NaN counts as absent; a unit that was measured for no token of the
        target stays NaN. In a contrast too, each row is that of its own target alone.
        Source: AtMan, Eq. 3 (mean), Eq. 2 (sum).
        """
        return self._scaled(self._reduced(self._owners, len(self.target_stops)))

    @property
    def part_relevances(self) -> Tensor:
        """``[parts, U]`` float32: the same over the tokens of each of ``parts``."""
        return self._scaled(self._reduced(self._part_of, len(self.parts)))

    @property
    def relevance(self) -> Tensor:
        """``[U]`` float32: of one target its relevances, of several their mean.

        In a contrast, what the unit does for target 0 minus what it does for target 1. NaN counts
        as absent; a unit that was measured for no target stays NaN, in a contrast one that was not
        measured for both.
        Source: AtMan, Eq. 3 (mean), Eq. 2 (sum).
        """
        return self._scaled(self._overall())

    def _reduced(self, groups: Sequence[int], count: int) -> Tensor:
        """``[G, U]`` float64, before it is scaled."""
        scores = postprocessed(self.scores.double(), self.postprocessing)
        return reduced(scores, groups, count, self.reduction)

    def _overall(self) -> Tensor:
        """``[U]`` float64, before it is scaled."""
        if self.contrast:
            this, that = reduced(self.scores, self._owners, 2, self.reduction)
            return postprocessed(this - that, self.postprocessing)
        relevances = self._reduced(self._owners, len(self.target_stops))
        return reduced(relevances, [0] * len(relevances), 1, "mean")[0]

    def _scaled(self, values: Tensor) -> Tensor:
        return (normalized(values) if self.normalize else values).float()

    @property
    def _part_of(self) -> list[int]:
        """``[T]``: which part each scored token belongs to."""
        owners = {row: index for index, part in enumerate(self.parts) for row in part.rows}
        return [owners[row] for row in range(len(self.targets))]

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
        return self._summed(self._owners, len(self.target_stops))

    @property
    def part_logprobs(self) -> Tensor:
        """``[parts]`` float32, nats: the same of each of ``parts``, given what is before it."""
        return self._summed(self._part_of, len(self.parts))

    def _summed(self, groups: list[int], count: int) -> Tensor:
        return reduced(self.base_logprobs[:, None], groups, count, "sum")[:, 0].float()

    @property
    def effect(self) -> Effect | Literal["mixed"]:
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
        branches = torch.tensor(self._owners)
        return Completeness(scores.nansum(1), rises, branches, len(self.target_stops))

    def branch(self, index: int) -> Explanation:
        """What a separate explanation of one of the targets gives.

        Units and left-out pieces of other targets are dropped; the text is the prompt and that
        target, the spans and token positions are those there. ``coarse`` is reduced alike,
        ``provenance`` stays that of the whole, and a contrast is none any more.

        Args:
            index: Which target, from 0.
        Raises: ValueError: if there is no such target, or none of the units belongs to it.
        """
        self._check("branch", index, len(self.target_stops))
        return single(self, index)

    def ranking(
        self, target: int | None = None, branch: int | None = None, part: int | None = None
    ) -> list[int]:
        """Indices of the measured units, the strongest supporter first; ties stay in text order.

        Args:
            target: Rank by this row of ``scores`` instead of by ``relevance``.
            branch: Rank by this row of ``relevances``.
            part: Rank by this row of ``part_relevances``.
        Raises: ValueError: if there is no such target or part, or several are given.
        """
        values = self._values(target, branch, part).tolist()
        measured = [index for index, value in enumerate(values) if not math.isnan(value)]
        return sorted(measured, key=lambda index: -values[index])

    def values(
        self, target: int | None = None, branch: int | None = None, part: int | None = None
    ) -> Tensor:
        """``[U]`` float32: ``relevance``, or one row of ``scores``, ``relevances``, of parts.

        A target token's row is postprocessed and scaled as all that is read.

        Args:
            target: Index of a target token; None for all of them reduced.
            branch: Index of one of several targets; None for all of them.
            part: Index of one of ``parts``; None for all of them.
        Raises: ValueError: if there is no such target or part, or several are given.
        """
        return self._scaled(self._values(target, branch, part))

    def _values(self, target: int | None, branch: int | None, part: int | None) -> Tensor:
        """``[U]`` float64, before it is scaled."""
        given = {"target": target, "branch": branch, "part": part}
        given = {name: index for name, index in given.items() if index is not None}
        if len(given) > 1:
            raise ValueError(
                "give one of target (a target token), branch (a whole target) and part (a piece of "
                f"one), got {', '.join(f'{name}={index}' for name, index in given.items())}."
            )
        if branch is not None:
            self._check("branch", branch, len(self.target_stops))
            return self._reduced(self._owners, len(self.target_stops))[branch]
        if part is not None:
            self._check("part", part, len(self.parts))
            return self._reduced(self._part_of, len(self.parts))[part]
        if target is None:
            return self._overall()
        self._check("target", target, len(self.targets))
        return postprocessed(self.scores[target].double(), self.postprocessing)

    @staticmethod
    def _check(name: str, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise ValueError(f"{name} must lie in [0, {count - 1}], got {index}.")

    def sources(self, top_k: int | None = None) -> dict[str, Any]:
        """Which documents each answer and each of its sentences rests on, as JSON values.

        ``{"answers": [...]}``, for each target ``text``, ``sources``, ``documents`` and
        ``sentences``, each of which has ``text``, ``start``, ``stop`` (characters of the answer),
        ``sources`` and ``documents``. ``sources`` are the measured units of documents, the
        strongest supporter first: ``document`` (its id), ``start`` and ``stop`` (characters of the
        document), ``text`` and ``score`` (as in ``relevances``, over the tokens of the answer or
        sentence). ``documents`` are ranked by their strongest unit. Infinite scores are strings.

        Args:
            top_k: Keep so many of each list of sources; None keeps all.
        Raises:
            TypeError: if ``top_k`` is no int.
            ValueError: if it is below 1, or nothing was explained with documents.
        """
        return sources(self, top_k)

    def to_dataframe(self, top_k: int | None = None) -> pandas.DataFrame:
        """One row per unit: text, part, start, stop, relevance, rank (1 = best), effect, level.

        With several target tokens, a column for each one's values follows: ``"0: text"``,
        ``"1: text"`` and so on. With several targets these columns are the ``relevances`` for each
        target instead (``branch(k).to_dataframe()`` tells its tokens apart), and ``branch`` says
        which target a unit belongs to. Where there are more parts than targets, ``"part 0: text"``
        and so on are the ``part_relevances``. With documents, ``document`` is the id of a unit's,
        and with correlated suppression ``neighbours`` counts what was suppressed along with it. Of
        pictures, ``image`` says which and ``left``, ``top``, ``width``, ``height`` where on it, in
        its pixels; of a sound, ``start_seconds`` and ``stop_seconds`` say when.
        The index is the unit's number. Of gradient methods, ``attrs["completeness_error"]`` is
        that of ``completeness``.

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
        part: int | None = None,
    ) -> None:
        """Print the explanation to the terminal: heat maps, then the strongest units.

        Pictures are drawn in blocks of colour, once for each of several targets, or in characters
        where there is no colour; a sound is a strip over time. Of several targets, the prompt is
        coloured by what it does for all of them, and the targets are listed; ``branch`` or
        ``target`` shows one of them with its own text.

        Args:
            top_k: How many supporters to list; None for up to 10 that tell something.
            width: Columns to use; None for the terminal's.
            target: Show this target token's scores instead of ``relevance``.
            branch: Show this one of several targets.
            part: Show what supports this one of ``parts``.
        Raises: ValueError: if ``top_k`` or ``width`` is too small or there is no such target.
        """
        from .render.terminal import show

        explanation, target, part = self._chosen(target, branch, part)
        show(explanation, top_k=top_k, width=width, target=target, part=part)

    def _chosen(
        self, target: int | None, branch: int | None, part: int | None
    ) -> tuple[Explanation, int | None, int | None]:
        """The explanation of the one target to picture, and the token or part of it."""
        self._values(target, branch, part)
        if target is not None:
            branch = self.targets[target].branch
            target -= self._owners.index(branch)
        if part is not None:
            branch = self.parts[part].branch
            part -= [each.branch for each in self.parts].index(branch)
        if branch is None or len(self.target_stops) == 1:
            return self, target, part
        return self.branch(branch), target, part

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, others: Iterable[Explanation] = ()
    ) -> str:
        """One self-contained HTML page: pictures, sound and text coloured by relevance, numbers.

        The numbers of a piece are shown on hover or focus. The reader chooses the target, the
        target token and, of a refined result, larger units.

        Args:
            path: Also write the page to this file.
            others: Explanations of the same document (other questions, other targets) to lay over
                this one, each in its own colour, as in the paper's Fig. 6.
        Returns: the page.
        Raises: ValueError: if the explanations share no text, or are not of the same pictures.
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
        part: int | None = None,
        smooth: bool = True,
    ) -> Figure:
        """A matplotlib figure: pictures, sound and text as heat maps, the strongest units, targets.

        Of several targets, every picture is drawn once for each (the likeliest seven), on a colour
        scale of its own; text and sound are coloured by what they do for all of them.

        Args:
            path: Also write the figure to this file; its ending (png, svg, pdf) says the format.
            target: Draw this target token's scores instead of ``relevance``.
            branch: Draw this one of several targets.
            part: Draw what supports this one of ``parts``.
            smooth: Whether colours on pictures run over into each other, or keep to the exact edges
                of patches and tiles.
        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if there is no such target.
        """
        import_extra("matplotlib", "plot")
        from .render.figure import plot

        explanation, target, part = self._chosen(target, branch, part)
        return plot(explanation, path=path, target=target, part=part, smooth=smooth)

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
        if self.contrast:
            what = f"answer={self.answers[0]!r}, rather_than={self.answers[1]!r}"
        return (
            f"Explanation({what}, units={len(self.units)}, targets={len(self.targets)}, "
            f"reduction={self.reduction!r}, method={self.method!r})"
        )
