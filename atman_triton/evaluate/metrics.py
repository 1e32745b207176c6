"""What is counted of an explanation: plain functions of numbers, none of which asks a model.

Every one gives a ``Metric``: the number, NaN where it is not defined, and a note of what was not as
usual: NaN, ties, no label, no positive relevance. What cannot be, such as a label outside of 0 to
1 or lists of unlike lengths, is an error.

Legend: R rated units, H and W rows and columns of a picture's patches, N values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

Numbers = Sequence[float] | np.ndarray | Tensor


class Metric(NamedTuple):
    """A number and what was done to get it.

    Attributes:
        value: NaN where it is not defined.
        note: What was not as usual, in words; empty if nothing.
    """

    value: float
    note: str = ""


UNDEFINED = float("nan")


def as_array(values: Numbers) -> np.ndarray:
    """As float64, tensors of any dtype and device included."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


# --- agreement with a label -----------------------------------------------------------------------


def precision(x: Numbers, y: Numbers) -> Metric:
    """Which share of the relevance stands on the label: Σ x·y / Σ x, from 0 to 1.

    Args:
        x: ``[R]``, relevance. What is below 0 counts as 0, and so does NaN; where some is infinite,
            that is all there is. Scaling it changes nothing.
        y: ``[R]``, which share of each unit is labelled, from 0 to 1.
    Returns: 0 without positive relevance, so that a method gains nothing from saying nothing; NaN
        without a label.
    Raises: ValueError: if ``y`` is no such label or the lengths differ.
    Source: AtMan, section 4 and the evaluation released with it; its mean over examples is mAP.
    """
    weights, label, notes = _weighed(x, y)
    if weights is None:
        return _nothing(label, notes)
    return _metric(weights @ label / weights.sum(), notes)


def recall(x: Numbers, y: Numbers) -> Metric:
    """How relevant the label is on average, the most relevant unit being 1: Σ (x / max x)·y / Σ y.

    Args:
        x: ``[R]``, as in ``precision``. A label that was not measured (NaN) counts as not found.
        y: ``[R]``, as in ``precision``.
    Returns: from 0 to 1; 0 without positive relevance, NaN without a label.
    Raises: ValueError: as ``precision`` does.
    Source: AtMan, section 4 and the evaluation released with it; its mean over examples is mAR.
    """
    weights, label, notes = _weighed(x, y)
    if weights is None:
        return _nothing(label, notes)
    return _metric(weights @ label / label.sum(), notes)


def pointing(x: Numbers, y: Numbers) -> Metric:
    """1 if the most relevant unit is labelled, 0 if not; of several such units, their mean.

    A unit that is labelled in part counts in part: a point drawn on it would hit that often.

    Args:
        x: ``[R]``, relevance of any sign; NaN is never the most relevant.
        y: ``[R]``, as in ``precision``.
    Returns: NaN without a label, or if nothing was measured.
    Raises: ValueError: as ``precision`` does.
    Source: Zhang et al. 2016, Top-down neural attention by excitation backprop, section 4.2.
    """
    values, label, notes = _labelled(x, y)
    known = ~np.isnan(values)
    if not label.any() or not known.any():
        return _undefined(notes)
    if not known.all():
        notes.append(f"{np.sum(~known)} NaN never largest")
    top = known & (values == values[known].max())
    if top.sum() > 1:
        notes.append(f"{top.sum()} tied for largest share")
    return _metric(label[top].mean(), notes)


def outside(x: Numbers, y: Numbers) -> Metric:
    """Which share of the positive relevance stands beside the label: Σ x·(1 − y) / Σ x.

    What is noise on a heat map, if the label is all there is to see; with ``precision`` it gives 1,
    where both are defined.

    Args: as of ``precision``.
    Returns: from 0 to 1; NaN without a label or without positive relevance.
    Raises: ValueError: as ``precision`` does.
    Source: the complement of AtMan's precision; Arras et al. 2022 (CLEVR-XAI) call that mass
        accuracy.
    """
    weights, label, notes = _weighed(x, y)
    if weights is None:
        return _undefined(notes)
    return _metric(weights @ (1 - label) / weights.sum(), notes)


def total_variation(grid: Numbers) -> Metric:
    """How ragged a heat map is: differences of neighbouring patches, of relevance that sums to 1.

    Σ |g[i+1, j] − g[i, j]| + Σ |g[i, j+1] − g[i, j]| with g = x / Σ x: 0 where all patches are
    alike, 4 where all relevance is on one patch that has four neighbours.

    Args:
        grid: ``[H, W]``, relevance; what is below 0, NaN or infinite counts as in ``precision``.
    Returns: from 0 to 4; NaN without positive relevance.
    Raises: ValueError: if ``grid`` has no two dimensions.
    Source: Rudin, Osher and Fatemi 1992, in its anisotropic form, on the map as a distribution.
    """
    values = as_array(grid)
    if values.ndim != 2:
        raise ValueError(f"grid must have shape [H, W], got {list(values.shape)}.")
    notes: list[str] = []
    weights = _positive(values.ravel(), notes)
    if weights is None:
        return _undefined(notes)
    scaled = (weights / weights.sum()).reshape(values.shape)
    return _metric(np.abs(np.diff(scaled, axis=0)).sum() + np.abs(np.diff(scaled)).sum(), notes)


def align(x: Numbers, y: Numbers) -> dict[str, Metric]:
    """What ``Result.alignment`` says of text: ``precision``, ``recall`` and ``pointing``.

    Args: as of ``precision``.
    """
    return {"precision": precision(x, y), "recall": recall(x, y), "pointing": pointing(x, y)}


def align_grid(x: Numbers, y: Numbers) -> dict[str, Metric]:
    """What ``Result.alignment`` says of a picture: ``variation`` and ``outside`` as well.

    Args:
        x: ``[H, W]``, relevance of the patches.
        y: ``[H, W]``, their labels, as in ``precision``.
    Raises: ValueError: if one has no two dimensions, or as ``precision`` does.
    """
    grid, label = as_array(x), as_array(y)
    for name, each in (("x", grid), ("y", label)):
        if each.ndim != 2:
            raise ValueError(f"{name} must have shape [H, W], got {list(each.shape)}.")
    if grid.shape != label.shape:
        raise ValueError(f"y must have shape {list(grid.shape)}, as x, got {list(label.shape)}.")
    found = align(grid.ravel(), label.ravel())
    found["variation"] = total_variation(grid)
    found["outside"] = outside(grid.ravel(), label.ravel())
    return found


# --- two rankings ---------------------------------------------------------------------------------


def rank_correlation(a: Numbers, b: Numbers) -> Metric:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs.

    Args:
        a, b: ``[N]``; a pair that holds NaN is left out.
    Returns: from −1 to 1; NaN if fewer than two pairs are left or one side is constant.
    Raises: ValueError: if the lengths differ.
    Source: Spearman 1904; with ties it is Pearson's correlation of the mean ranks.
    """
    first, second, notes = _pairs(a, b)
    if len(first) < 2:
        return _undefined([*notes, "fewer than two values"])
    if np.all(first == first[0]) or np.all(second == second[0]):
        return _undefined([*notes, "one side is constant"])
    ties = [len(each) - len(np.unique(each)) for each in (first, second)]
    if any(ties):
        notes.append("ties share their mean rank")
    one, two = (_ranks(each) - (len(first) + 1) / 2 for each in (first, second))
    return _metric(one @ two / np.sqrt((one @ one) * (two @ two)), notes)


def top_overlap(a: Numbers, b: Numbers, k: int) -> Metric:
    """How much of the ``k`` largest of one list is among the ``k`` largest of the other.

    Of values that are tied for the last places, each is in by the share of places there are for
    them, and in both lists by the smaller of its two shares, so that a list agrees with itself.

    Args:
        a, b: ``[N]``; a pair that holds NaN is left out.
        k: at least 1; all that there are, if there are fewer.
    Returns: from 0 to 1; NaN if no pair is left.
    Raises: ValueError: if the lengths differ or ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    first, second, notes = _pairs(a, b)
    if not len(first):
        return _undefined([*notes, "no values"])
    if k >= len(first):
        notes.append(f"k is {k} of {len(first)}")
        k = len(first)
    one, two = _among_largest(first, k), _among_largest(second, k)
    if np.any((one % 1) > 0) or np.any((two % 1) > 0):
        notes.append("ties share the last places")
    return _metric(np.minimum(one, two).sum() / k, notes)


def auroc(higher: Numbers, lower: Numbers) -> Metric:
    """How often a value that should be high is above one that should be low; a tie is a half.

    Args:
        higher: ``[N]``, of what should have the larger values; NaN is left out.
        lower: ``[N']``, of what should have the smaller ones; NaN is left out.
    Returns: from 0 to 1, the area under the ROC curve; NaN if one side is empty.
    Source: Hanley and McNeil 1982; Mann and Whitney 1947.
    """
    notes: list[str] = []
    first, second = _known(higher, notes), _known(lower, notes)
    if not len(first) or not len(second):
        return _undefined([*notes, "no values on one side"])
    both = np.concatenate([first, second])
    if len(np.intersect1d(first, second)):
        notes.append("ties count as a half")
    least = len(first) * (len(first) + 1) / 2
    above = _ranks(both)[: len(first)].sum() - least
    return _metric(above / (len(first) * len(second)), notes)


# --- curves and averages --------------------------------------------------------------------------


def area(xs: Numbers, ys: Numbers) -> Metric:
    """The mean height of a curve: the area under straight lines between its points, by its width.

    Args:
        xs: ``[N]``, rising.
        ys: ``[N]``, in any unit, which is the result's.
    Returns: NaN if there are fewer than two points, or a height is NaN or infinite.
    Raises: ValueError: if ``xs`` do not rise or the lengths differ.
    """
    across, up = as_array(xs), as_array(ys)
    _check_alike(("xs", across), ("ys", up))
    if not np.all(np.diff(across) > 0) or not np.isfinite(across).all():
        raise ValueError(f"xs must rise from one point to the next, got {across.tolist()}.")
    if len(across) < 2:
        return Metric(UNDEFINED, "fewer than two points")
    if not np.isfinite(up).all():
        return Metric(UNDEFINED, f"{np.sum(~np.isfinite(up))} points without a height")
    under = (np.diff(across) * (up[1:] + up[:-1]) / 2).sum()
    return Metric(float(under / (across[-1] - across[0])))


def interquartile_mean(values: Numbers) -> Metric:
    """The mean of the middle half of some values, those on its edges weighed by their part in it.

    Each of N sorted values takes up 1/N; its weight is what of that lies between 1/4 and 3/4: of
    three values 1/6, 4/6 and 1/6, of four 0, 1/2, 1/2 and 0.

    Args:
        values: ``[N]``; NaN is left out.
    Returns: NaN if no value is left.
    Source: the mean trimmed by a quarter on both sides, with parts of values; as ``mAP_IQ`` and
        ``mAR_IQ`` of AtMan, Table 1, name it without defining the edges.
    """
    notes: list[str] = []
    known = np.sort(_known(values, notes))
    if not len(known):
        return _undefined([*notes, "no values"])
    inner = np.clip(np.arange(len(known) + 1) / len(known), 0.25, 0.75)
    weights = np.diff(inner) / 0.5
    within = weights > 0  # what is infinite may lie outside
    return _metric(weights[within] @ known[within], notes)


# --- helpers --------------------------------------------------------------------------------------


def _metric(value: Any, notes: Sequence[str]) -> Metric:
    return Metric(float(value), "; ".join(notes))


def _undefined(notes: Sequence[str]) -> Metric:
    return Metric(UNDEFINED, "; ".join(notes))


def _check_alike(first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> None:
    """Raise ValueError unless both are lists of one length."""
    (own, a), (other, b) = first, second
    if a.ndim != 1:
        raise ValueError(f"{own} must be a list of numbers, got shape {list(a.shape)}.")
    if a.shape != b.shape:
        raise ValueError(f"{other} must have shape {list(a.shape)}, as {own}, got {list(b.shape)}.")


def _known(values: Numbers, notes: list[str]) -> np.ndarray:
    """The values that are not NaN."""
    found = as_array(values).ravel()
    known = found[~np.isnan(found)]
    if len(known) < len(found):
        notes.append(f"{len(found) - len(known)} NaN left out")
    return known


def _pairs(a: Numbers, b: Numbers) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Both lists without the pairs that hold NaN, and what was done."""
    first, second = as_array(a), as_array(b)
    _check_alike(("a", first), ("b", second))
    known = ~(np.isnan(first) | np.isnan(second))
    notes = [] if known.all() else [f"{np.sum(~known)} NaN left out"]
    return first[known], second[known], notes


def _labelled(x: Numbers, y: Numbers) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Relevance and label, and what is unusual about them."""
    values, label = as_array(x), as_array(y)
    _check_alike(("x", values), ("y", label))
    if not np.all((label >= 0) & (label <= 1)):
        raise ValueError("y must lie in [0, 1], got values outside of it or NaN.")
    notes: list[str] = []
    if not len(values):
        notes.append("no units")
    elif not label.any():
        notes.append("no label")
    elif label.all() and np.all(label == 1):
        notes.append("one unit" if len(values) == 1 else "all units are labelled")
    known = values[~np.isnan(values)]
    if len(values) and not len(known):
        notes.append("no relevance was measured")
    elif len(known) > 1 and np.all(known == known[0]):
        notes.append("all relevance is equal")
    return values, label, notes


def _nothing(label: np.ndarray, notes: Sequence[str]) -> Metric:
    """What finds a label without any relevance: 0; or NaN, if there is no label."""
    return _metric(0.0, notes) if label.any() else _undefined(notes)


def _weighed(x: Numbers, y: Numbers) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Relevance from 0 to 1, None where no share of it is defined; the label; and notes."""
    values, label, notes = _labelled(x, y)
    weights = _positive(values, notes)
    return (weights if label.any() else None), label, notes


def _positive(values: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """What is above 0, the largest scaled to 1; None, and a note, where nothing is."""
    missing, negative = np.isnan(values), values < 0
    if missing.any():
        notes.append(f"{missing.sum()} NaN taken as 0")
    if negative.any():
        notes.append(f"{negative.sum()} negative taken as 0")
    kept = np.where(values > 0, values, 0.0)
    endless = np.isinf(kept)
    if endless.any():
        notes.append(f"{endless.sum()} infinite, beside which the rest counts as 0")
        return endless.astype(np.float64)
    if not kept.any():
        notes.append("no positive relevance")
        return None
    return kept / kept.max()


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, equal values sharing the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _among_largest(values: np.ndarray, k: int) -> np.ndarray:
    """``[N]`` from 0 to 1: by how much each is among the ``k`` largest."""
    edge = np.sort(values)[-k]
    above, tied = values > edge, values == edge
    return above + tied * ((k - above.sum()) / tied.sum())
