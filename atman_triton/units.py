"""What is explained: what the units of the input are, what is scored, what is left out.

Legend: K targets; positions are those of a token in the prompt followed by its own target alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from .pieces import LeftOut, Level, Target, Unit
from .segments import paragraphs, sentences
from .tokens import Span, Tokens

NOT_ASKED_FOR = "not in explain_only"
TOO_LATE = "no scored token comes after it"

_CHUNKS = (64, 8)  # tokens; how ids without a text are divided, and text without structure
_SEGMENTS = {"paragraph": paragraphs, "sentence": sentences}


@dataclass(frozen=True)
class Layout:
    """A prompt and its targets as the model reads them.

    Args:
        prompt_ids: The prompt's tokens.
        target_ids: Of each target, its tokens.
        text: Prompt text followed by the text of each target.
        prompt_stop: Character of ``text`` where the first target starts.
        target_stops: Characters where the targets end.
        units: What is suppressed, one at a time.
        targets: What is scored, one target after the other.
        left_out: What the model reads besides the units.
        tokens: The tokens that units are made of, each as a unit of its own.
        is_text: Whether ``text`` is what was written, rather than a list of ids.
    """

    prompt_ids: list[int]
    target_ids: list[list[int]]
    text: str
    prompt_stop: int
    target_stops: list[int]
    units: list[Unit]
    targets: list[Target]
    left_out: list[LeftOut]
    tokens: list[Unit]
    is_text: bool


def lay_out(
    prompt: Tokens,
    targets: Sequence[Tokens],
    level: Level = "token",
    explain_only: Sequence[int] | None = None,
    *,
    is_text: bool = True,
) -> Layout:
    """The user's own tokens in front of each target's last one make the units.

    Args:
        prompt: The prompt's tokens.
        targets: Each target's tokens, spans counted from the target's start.
        level: How large a unit is: ``token``, ``sentence`` or ``paragraph``.
        explain_only: Indices of the units to keep, counted without this argument; None keeps all.
        is_text: Whether spans refer to written text; without it there are only tokens.
    Raises:
        TypeError: if ``explain_only`` holds anything but integers.
        ValueError: if it is empty or out of range, if no token can be a unit, or if units larger
            than a token are asked of ids without a text.
    """
    if level != "token" and not is_text:
        raise ValueError(
            f"granularity={level!r} needs text, but without a tokenizer the prompt is token ids; "
            "pass the tokenizer, or take granularity='token'."
        )
    text, starts = prompt.text, []
    for target in targets:
        starts.append(len(text))
        text += target.text
    stops = [*starts[1:], len(text)]
    tokens = _token_units(prompt, 0, None, len(prompt))
    scored: list[Target] = []
    left_out = _left_out(prompt, 0, None, len(prompt))
    for branch, (target, start) in enumerate(zip(targets, starts, strict=True)):
        tokens += _token_units(target, start, branch, len(prompt))
        left_out += _left_out(target, start, branch, len(prompt))
        for index, token_id in enumerate(target.ids):
            span = _moved(target.spans[index], start)
            place = (None, None) if span is None else span
            token = len(prompt) + index
            scored.append(Target(target.names[index], token, token_id, *place, branch))
    if not tokens:
        raise ValueError("prompt has nothing to explain: all of its tokens are special tokens.")
    units = tokens if level == "token" else _grouped(tokens, text, [0, *starts, len(text)], level)
    kept, late = [], []
    for unit in units:
        reached = unit.branch is None or max(unit.tokens) < _last(len(prompt), targets, unit)
        (kept if reached else late).append(unit)
    if not kept:
        raise ValueError("prompt has nothing to explain: no token of its own is scored after it.")
    chosen = _chosen(kept, explain_only)
    remaining = {id(unit) for unit in chosen}
    left_out += [LeftOut(u.text, u.tokens, TOO_LATE, u.branch) for u in late]
    left_out += _merged([u for u in kept if id(u) not in remaining], text)
    left_out.sort(key=lambda piece: (-1 if piece.branch is None else piece.branch, piece.tokens))
    return Layout(
        prompt_ids=prompt.ids,
        target_ids=[target.ids for target in targets],
        text=text,
        prompt_stop=len(prompt.text),
        target_stops=stops,
        units=chosen,
        targets=scored,
        left_out=left_out,
        tokens=chosen if level == "token" else tokens,
        is_text=is_text,
    )


def token_spans(
    prompt: Tokens, targets: Sequence[Tokens]
) -> dict[tuple[int | None, int], Span | None]:
    """Characters of every token that is read, by its target (None in the prompt) and position."""
    spans: dict[tuple[int | None, int], Span | None] = {}
    start = 0
    for branch, tokens in enumerate([prompt, *targets], -1):
        first = 0 if branch < 0 else len(prompt)
        for index, span in enumerate(tokens.spans):
            spans[None if branch < 0 else branch, first + index] = _moved(span, start)
        start += len(tokens.text)
    return spans


def coarsest(layout: Layout) -> list[Unit]:
    """The largest pieces that divide the prompt; the targets' tokens stay single."""
    prompt = [unit for unit in layout.tokens if unit.branch is None]
    target = [unit for unit in layout.tokens if unit.branch is not None]
    levels: tuple[Level, ...] = ("paragraph", "sentence") if layout.is_text else ()
    for level in levels:
        edges = [0, layout.prompt_stop]
        found = _grouped(prompt, layout.text, edges, level)
        if len(found) > 1:
            return found + target
    return _chunked(prompt, layout.text, _CHUNKS) + target


def divided(unit: Unit, layout: Layout) -> list[Unit]:
    """What a unit is made of: a paragraph of sentences, a sentence of tokens.

    A piece that has no such parts and is longer than a chunk is divided into chunks.
    """
    own = set(unit.tokens)
    tokens = [t for t in layout.tokens if t.branch == unit.branch and t.tokens[0] in own]
    if unit.level == "paragraph":
        sentence = _grouped(tokens, layout.text, [0, layout.prompt_stop], "sentence")
        if len(sentence) > 1:
            return sentence
    return _chunked(tokens, layout.text, [c for c in _CHUNKS if 2 * c <= len(tokens)])


def _token_units(tokens: Tokens, shift: int, branch: int | None, prompt: int) -> list[Unit]:
    """A prompt's or target's own tokens that something is predicted from."""
    first = 0 if branch is None else prompt
    count = len(tokens) if branch is None else len(tokens) - 1  # the last one is never read
    units = []
    for index in range(count):
        if tokens.reasons[index] is None:
            start, stop = _moved(tokens.spans[index], shift) or (None, None)
            part = "prompt" if branch is None else "target"
            units.append(
                Unit(tokens.names[index], (first + index,), start, stop, part, branch=branch)
            )
    return units


def _last(prompt: int, targets: Sequence[Tokens], unit: Unit) -> int:
    """Position of the last scored token of the unit's target."""
    assert unit.branch is not None
    return prompt + len(targets[unit.branch]) - 1


def _grouped(tokens: list[Unit], text: str, edges: Sequence[int], level: Level) -> list[Unit]:
    """Neighbouring tokens of one segment as one unit; prompt and targets are divided apart."""
    starts = [
        edge + start
        for edge, stop in pairwise(edges)
        for start, _ in _SEGMENTS[level](text[edge:stop])
    ]

    def segment(unit: Unit) -> int:
        if unit.start is None or unit.stop is None:
            return -1 - unit.tokens[0]  # it has no place in the text, so it stays alone
        words = unit.start + len(piece := text[unit.start : unit.stop]) - len(piece.lstrip())
        return bisect_right(starts, min(words, max(unit.start, unit.stop - 1)))

    groups = groupby(tokens, key=lambda unit: (unit.branch, segment(unit)))
    return [_joined(list(group), text, level) for _, group in groups]


def _chunked(tokens: list[Unit], text: str, sizes: Sequence[int]) -> list[Unit]:
    """Pieces of the largest size that gives several; tokens if none does."""
    for size in sizes:
        if len(tokens) > size:
            parts = [tokens[a : a + size] for a in range(0, len(tokens), size)]
            return [_joined(part, text, "chunk") for part in parts]
    return tokens


def _joined(tokens: list[Unit], text: str, level: Level) -> Unit:
    """One unit of neighbouring tokens."""
    first = tokens[0]
    placed = [t for t in tokens if t.start is not None and t.stop is not None]
    start = placed[0].start if placed else None
    stop = placed[-1].stop if placed else None
    whole = len(placed) == len(tokens) and start is not None
    words = text[start:stop] if whole else "".join(token.text for token in tokens)
    positions = tuple(position for token in tokens for position in token.tokens)
    return Unit(words, positions, start, stop, first.part, branch=first.branch, level=level)


def _moved(span: Span | None, by: int) -> Span | None:
    return None if span is None else (span[0] + by, span[1] + by)


def _chosen(candidates: list[Unit], explain_only: Sequence[int] | None) -> list[Unit]:
    """The candidates that ``explain_only`` names, in text order."""
    if explain_only is None:
        return candidates
    indices = list(explain_only)
    if not indices:
        raise ValueError("explain_only must name at least one unit, or be None for all.")
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"explain_only must hold unit indices, got {index!r}.")
        if not 0 <= index < len(candidates):
            raise ValueError(
                f"explain_only holds unit index {index}, but this input has {len(candidates)} "
                f"units, 0 to {len(candidates) - 1}."
            )
    return [candidates[index] for index in sorted(set(indices))]


def _left_out(tokens: Tokens, shift: int, branch: int | None, prompt: int) -> list[LeftOut]:
    """Tokens that the model reads but that are none of the user's; neighbours make one piece."""
    first = 0 if branch is None else prompt
    count = len(tokens) if branch is None else len(tokens) - 1
    why = [(index, reason) for index in range(count) if (reason := tokens.reasons[index])]
    left_out = []
    # Token minus rank is constant along a run of neighbours.
    runs = groupby(enumerate(why), key=lambda item: (item[1][0] - item[0], item[1][1]))
    for (_, reason), run in runs:
        indices = [index for _, (index, _) in run]
        placed = [span for index in indices if (span := tokens.spans[index]) is not None]
        if len(placed) == len(indices):
            piece = tokens.text[placed[0][0] : placed[-1][1]]
        else:
            piece = "".join(tokens.names[index] for index in indices)
        positions = tuple(first + index for index in indices)
        left_out.append(LeftOut(piece, positions, reason, branch))
    return left_out


def _merged(units: list[Unit], text: str) -> list[LeftOut]:
    """Units that were not asked for; neighbours make one piece."""
    keyed = enumerate(units)
    runs = groupby(keyed, key=lambda item: (item[1].branch, item[1].tokens[0] - item[0]))
    left_out = []
    for (branch, _), run in runs:
        joined = _joined([unit for _, unit in run], text, "chunk")
        left_out.append(LeftOut(joined.text, joined.tokens, NOT_ASKED_FOR, branch))
    return left_out
