"""Suppressing a token's values instead of its attention scores.

AtMan weakens the scores with which a token is looked at, before the softmax. What if the token
is looked at as before, but what is taken from it shrinks: its value vector times the factor, in
every layer? Weights then do not move to other tokens. Both are done with the same units, total and
direct effects, and judged by ``removal gap`` and ``precision`` of the label
(``bench.studies.common``)::

    python -m bench.studies.values               # 60 documents

Part ``methods`` has every setting, part ``difference`` the gap of values less that of scores, mode
min_shift, the same factor and effect, document by document. The library has scores alone: values
are scaled here, by hooks on the projections that make them. Rows go to
``bench/results/studies-values.csv``, the picture to ``studies-values.png``.

Legend: U units, P prompt tokens, T target tokens, S = P + T − 1 tokens that are read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import atman_triton as atman
from atman_triton.demo import load_demo_model
from atman_triton.tokens import encode_prompt
from bench.removal import Removal
from bench.studies import common
from bench.studies.common import Labelled, Row
from bench.studies.slowly import extend, measured, methods
from bench.studies.truth import GAP, PRECISION

NAME = "values"
VALUES, RANDOM = "values", "random"
EFFECTS = ("direct", "exact")
FACTORS = (0.1, 0.0)
MODES = ("min_shift", "multiplicative", "log_additive")
_ROWS = 20  # of a batch, about 2000 tokens
_COLOURS = {"min_shift": "#2166ac", "log_additive": "#1b7837", "multiplicative": "#e08214"}


@contextmanager
def scaled_values(model: Any, factors: Tensor) -> Iterator[None]:
    """Scale the values of the tokens that are run by ``[B, S]``, in every layer of a Llama."""

    def scale(module: Any, args: Any, values: Tensor) -> Tensor:  # [B, S, Hk D]
        return values * factors[..., None].to(values)

    with ExitStack() as undo:
        for layer in model.model.layers:
            undo.callback(layer.self_attn.v_proj.register_forward_hook(scale).remove)
        yield


@torch.no_grad()
def suppressed(
    model: Any,
    ids: Sequence[int],
    target: Sequence[int],
    units: Sequence[Sequence[int]],
    factor: float,
    effect: str,
) -> Tensor:
    """Log-probabilities ``[U, T]`` of a target, each with the values of one unit scaled.

    Args:
        ids: ``P``, of the prompt.
        units: Of each, its places among the ``S``.
        effect: ``exact``: for all tokens that look; ``direct``: for those that predict the target,
            all else as it was with nothing scaled.
    """
    whole = torch.tensor([*ids, *target[:-1]])
    factors = torch.ones(len(units), len(whole))
    for row, places in zip(factors, units, strict=True):
        row[list(places)] = factor
    first = len(ids) - 1 if effect == "direct" else 0
    before = model(whole[None, :first], use_cache=True).past_key_values if first else None
    found = []
    for rows in factors.split(_ROWS):
        cache = None if before is None else _scaled(before, rows[:, :first])
        with scaled_values(model, rows[:, first:]):
            logits = model(
                whole[first:].expand(len(rows), -1),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=len(target),
            ).logits
        wanted = torch.tensor(target).expand(len(rows), -1)[..., None]
        found.append(logits.float().log_softmax(-1).gather(-1, wanted).squeeze(-1))
    return torch.cat(found)


def _scaled(cache: Any, factors: Tensor) -> DynamicCache:
    """A copy of a cache for each row of ``[B, P]``, its values scaled."""
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values  # [1, Hk, P, D]
        if keys is None or values is None:
            raise ValueError(f"cache must be filled, but layer {index} is empty.")
        own = values * factors[:, None, :, None].to(values)
        made.update(keys.expand(len(factors), -1, -1, -1), own, index)
    return made


def by_values(
    model: Any, tokenizer: Any, case: Labelled, like: atman.Explanation, factor: float, effect: str
) -> atman.Explanation:
    """An explanation of the same units and target as another, by scaled values."""
    ids = encode_prompt(case.prompt, tokenizer, model.config.vocab_size).ids
    target = [each.token_id for each in like.targets]
    places = [unit.tokens for unit in like.units]
    found = suppressed(model, ids, target, places, factor, effect)
    unread = like.suppressed_logprobs.isnan()  # [T, U]
    logprobs = found.T.masked_fill(unread, torch.nan).contiguous()
    return dataclasses.replace(like, suppressed_logprobs=logprobs)


# --- all documents --------------------------------------------------------------------------

Key = tuple[str, str]
"""What was scaled and how far, and the effect: ``("values, factor 0.1", "direct")``."""


def _key(kind: str, factor: float, effect: str) -> Key:
    return f"{kind}, factor {factor:g}", effect


def examine(
    model: Any,
    tokenizer: Any,
    case: Labelled,
    number: int,
    effects: Sequence[str] = EFFECTS,
) -> dict[Key, dict[str, float]]:
    """One document: measures of every setting."""
    explained: dict[Key, atman.Explanation] = {}
    for factor, effect, mode in itertools.product(FACTORS, effects, MODES):
        explained[_key(mode, factor, effect)] = common.explain(
            model, tokenizer, case, method=effect, mode=mode, factor=factor
        )
    first = next(iter(explained.values()))
    for factor, effect in itertools.product(FACTORS, effects):
        explained[_key(VALUES, factor, effect)] = by_values(
            model, tokenizer, case, first, factor, effect
        )
    removal = Removal(model, tokenizer, case.case, first, number)
    gaps: dict[Any, float] = removal.gaps(
        {key: each.relevance.tolist() for key, each in explained.items()}  # pyright: ignore[reportArgumentType]
        | {RANDOM: removal.random}
    )
    found = {
        key: {GAP: gaps[key], PRECISION: common.label_precision(each, case)}
        for key, each in explained.items()
    }
    return found | {("", RANDOM): {GAP: gaps[RANDOM]}}


def rows_of(found: Sequence[Mapping[Key, Mapping[str, float]]]) -> list[Row]:
    """A row for every setting and measure, and for the difference between values and scores."""
    rows = [
        common.mean_row(NAME, "methods", *key, measure, measured(found, key, measure))
        for key in found[0]
        for measure in found[0][key]
    ]
    for factor, effect, measure in itertools.product(FACTORS, EFFECTS, (GAP, PRECISION)):
        values, scores = (_key(kind, factor, effect) for kind in (VALUES, MODES[0]))
        both = zip(measured(found, values, measure), measured(found, scores, measure), strict=True)
        less = [own - theirs for own, theirs in both]
        what = f"values less {MODES[0]}, factor {factor:g}"
        rows.append(common.mean_row(NAME, "difference", what, effect, measure, less))
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether scores are better, in plain words."""
    return [
        f"{each.what}, {each.method}: {each.measure} {each.value:+.3f} "
        f"[{each.low:+.3f}, {each.high:+.3f}]"
        for each in common.pick(rows, part="difference")
    ]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gap and precision of every setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), (GAP, PRECISION), strict=True):
        own = [row for row in common.pick(rows, part="methods", measure=measure) if row.what]
        own.sort(key=lambda row: (EFFECTS.index(row.method), row.what.split("factor ")[1]))
        for line, row in enumerate(own):
            axes.errorbar(
                row.value,
                line,
                xerr=[[row.value - row.low], [row.high - row.value]],
                fmt="o",
                capsize=3,
                color=_COLOURS.get(row.what.split(",")[0], "#b2182b"),
            )
        axes.set_yticks(range(len(own)), [f"{row.method}, {row.what}" for row in own], fontsize=8)
        axes.set_xlabel(f"{measure}, nats per token" if measure == GAP else measure)
        axes.grid(axis="x", alpha=0.2)
        for floor in common.pick(rows, part="methods", method=RANDOM, measure=measure):
            axes.axvline(floor.value, color="grey", linestyle=":", label="random")
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.options_of(__doc__, arguments, 60, extend)
    model, tokenizer = load_demo_model()
    several = common.documents(model, tokenizer, options.documents)
    found = [
        examine(model, tokenizer, case, number, methods(EFFECTS, number, options.exact_documents))
        for number, case in common.progress(list(enumerate(several)), "Values and scores")
    ]
    rows = rows_of(found)
    common.write(rows, options.out)
    draw(rows, options.out / f"studies-{NAME}.png")
    common.show(rows, verdicts(rows))


if __name__ == "__main__":
    main()
