"""What is explained: what the units of the input are, what is scored, what is left out.

Legend: K targets; positions are those of a token in the prompt followed by its own target alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from .chat import Span
from .granularity import (
    MAX_UNITS,
    Granularity,
    ImageGranularity,
    Images,
    Seconds,
    Tiles,
    TokenSpans,
    described,
)
from .grouping import (
    automatic,
    chunked,
    joined,
    patch_text,
    placed,
    seconds_text,
    tiled,
    units_of,
)
from .parts import TargetGranularity, target_parts
from .pictures import Picture, Sound
from .pieces import Document, LeftOut, Target, TargetPart, Unit
from .selection import NOT_ASKED_FOR, checked_explain_only, select
from .tokens import Tokens

TOO_LATE = "no scored token comes after it"

_COARSE_TILES = Tiles(3)
_COARSE_SECONDS = Seconds(0.5)
_CHUNKS = (64, 8)  # tokens; how ids without a text are divided, and text without structure


@dataclass(frozen=True)
class Layout:
    """A prompt and its targets as the model reads them.

    Args:
        prompt_ids: The prompt's tokens, and those of the answer in front of its scored ones.
        target_ids: Of each target, its scored tokens.
        text: Prompt text followed by the text of each target.
        prompt_stop: Character of ``text`` where the first target starts.
        target_stops: Characters where the targets end.
        units: What is suppressed, one at a time.
        targets: What is scored, one target after the other.
        left_out: What the model reads besides the units.
        tokens: The tokens that units are made of, each as a unit of its own.
        regions: Spans of ``text`` that units are made of, ascending; none reaches over two.
        is_text: Whether ``text`` is what was written, rather than a list of ids.
        granularity: How large the units are; of ``auto``, what was chosen.
        documents: Sources in the prompt.
        parts: What the targets are read in; empty for whole ones.
        pictures: Those of the prompt.
        sound: What the prompt is, if it is one.
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
    regions: list[Span]
    is_text: bool
    granularity: Granularity
    documents: list[Document]
    parts: list[TargetPart]
    pictures: list[Picture]
    sound: Sound | None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each picture."""
        return [(picture.width, picture.height) for picture in self.pictures]


def lay_out(
    prompt: Tokens,
    targets: Sequence[Tokens],
    granularity: Granularity = "token",
    explain_only: Any = None,
    *,
    is_text: bool = True,
    documents: Sequence[Document] = (),
    context: int = 0,
    max_units: int = MAX_UNITS,
    target_granularity: TargetGranularity = "complete",
    image_granularity: ImageGranularity = "patch",
    pictures: Sequence[Picture] = (),
    sound: Sound | None = None,
) -> Layout:
    """The user's own tokens in front of each target's last one make the units.

    A unit consists of whole tokens that follow each other, all of the prompt or all of one target;
    it reaches over no token that is left out, and over no border of a message, a document or a
    passage of ``explain_only``. ``placing.owners`` says where a token belongs that stands on both
    sides of a border.

    Args:
        prompt: The prompt's tokens.
        targets: Each target's tokens, spans counted from the target's start.
        granularity: How large a unit is. ``auto`` takes of token, word, sentence and paragraph what
            gives the number of units of the prompt closest to ``max_units``, the finer of equals.
            Only where paragraphs are more than that (without text, tokens), neighbours are joined,
            so that about as many tokens stand in each of at most ``max_units`` units; never across
            a border.
        explain_only: Passages and pictures of the prompt, or indices of the units to keep,
            counted without this argument; None keeps all (see ``selection.checked_explain_only``).
        is_text: Whether spans refer to written text; without it there are only tokens.
        documents: Sources in the prompt; without ``explain_only``, nothing else is explained.
        context: So many tokens of the only target are read, but not scored.
        max_units: Of ``auto``.
        target_granularity: What the targets are read in.
        image_granularity: How large a unit of a picture is.
        pictures: Those of the prompt.
        sound: What the prompt is, if it is one.
    Raises:
        TypeError: if ``explain_only`` holds neither passages nor integers.
        ValueError: if it is empty or out of range, if no token can be a unit, or if the
            granularity needs a text, messages or documents that are not there.
    """
    sources = [(document.start, document.stop) for document in documents]
    _check(granularity, prompt, sources, is_text)
    passages, indices = _asked(explain_only)
    selection = select(prompt, granularity, sources, passages, is_text=is_text)
    prompt = replace(prompt, reasons=selection.reasons)
    if selection.answer is not None:
        targets = [
            replace(each, reasons=[why or selection.answer for why in each.reasons])
            for each in targets
        ]
    text, starts = prompt.text, []
    for target in targets:
        starts.append(len(text))
        text += target.text
    stops = [*starts[1:], len(text)]
    tokens = _token_units(prompt, 0, None, len(prompt), selection.documents)
    scored: list[Target] = []
    left_out = _left_out(prompt, 0, None, len(prompt))
    for branch, (target, start) in enumerate(zip(targets, starts, strict=True)):
        tokens += _token_units(target, start, branch, len(prompt), context=context)
        left_out += _left_out(target, start, branch, len(prompt))
        for index in range(context, len(target)):
            place = _moved(target.spans[index], start) or (None, None)
            token = len(prompt) + index
            scored.append(Target(target.names[index], token, target.ids[index], *place, branch))
    if not tokens:
        raise ValueError("prompt has nothing to explain: all of its tokens are special tokens.")
    layout = Layout(
        prompt_ids=prompt.ids + (targets[0].ids[:context] if context else []),
        target_ids=[target.ids[context:] for target in targets],
        text=text,
        prompt_stop=len(prompt.text),
        target_stops=stops,
        units=[],
        targets=[placed(target) for target in scored],
        left_out=[],
        tokens=tokens,
        regions=[*selection.regions, *zip(starts, stops, strict=False)],
        is_text=is_text,
        granularity=granularity,
        documents=list(documents),
        parts=[],
        pictures=list(pictures),
        sound=sound,
    )
    if context or target_granularity != "complete":
        layout.parts.extend(_parts(layout, target_granularity))
    if granularity == "auto":
        granularity, units = automatic(tokens, text, layout.regions, max_units, is_text=is_text)
        shown = [token for token in tokens if token.image is not None]
        units = units_of(shown, text, [], "token", image_granularity, layout.sizes) + units
    else:
        units = units_of(tokens, text, layout.regions, granularity, image_granularity, layout.sizes)
    kept, late = [], []
    for unit in units:
        reached = unit.branch is None or max(unit.tokens) < _last(len(prompt), targets, unit)
        (kept if reached else late).append(unit)
    if not kept:
        raise ValueError("prompt has nothing to explain: no token of its own is scored after it.")
    chosen = _chosen(kept, indices)
    remaining = {id(unit) for unit in chosen}
    left_out += [LeftOut(u.text, u.tokens, TOO_LATE, _branch(u)) for u in late]
    left_out += _merged([u for u in kept if id(u) not in remaining], text)
    left_out.sort(key=lambda piece: (-1 if piece.branch is None else piece.branch, piece.tokens))
    if granularity == "token":
        own = {(unit.branch, position) for unit in chosen for position in unit.tokens}
        tokens = [token for token in tokens if (token.branch, token.tokens[0]) in own]
    return replace(
        layout,
        units=[placed(unit) for unit in chosen],
        left_out=left_out,
        tokens=tokens,
        granularity=granularity,
    )


class TokenPlace(NamedTuple):
    """Where a token stands.

    Args:
        span: Its characters of the text; None where it has no place there.
        branch: The target that it belongs to; None in the prompt.
    """

    span: Span | None
    branch: int | None


def token_places(
    prompt: Tokens, targets: Sequence[Tokens], context: int = 0
) -> dict[tuple[int | None, int], TokenPlace]:
    """Of every token, by what the engine calls it: target (None in its prompt) and position.

    Args:
        context: So many tokens of the only target are part of the engine's prompt.
    """
    places = {}
    start = 0
    for number, tokens in enumerate([prompt, *targets], -1):
        branch = None if number < 0 else number
        first = 0 if branch is None else len(prompt)
        for index, span in enumerate(tokens.spans):
            called = None if index < context else branch
            places[called, first + index] = TokenPlace(_moved(span, start), branch)
        start += len(tokens.text)
    return places


def coarsest(layout: Layout) -> list[Unit]:
    """The largest pieces that divide what stands before the scored tokens; those stay single."""
    own = [token for token in layout.tokens if token.branch is None]
    shown = [token for token in own if token.image is not None]
    if shown:
        words = replace(layout, tokens=[token for token in layout.tokens if token.image is None])
        tiles = tiled(shown, _COARSE_TILES, layout.sizes)
        return tiles + (coarsest(words) if words.tokens else [])
    target = [placed(token) for token in layout.tokens if token.branch is not None]
    if any(token.seconds is not None for token in own):
        return units_of(own, layout.text, layout.regions, _COARSE_SECONDS) + target
    prompt = own
    levels: tuple[Granularity, ...] = ("paragraph", "sentence") if layout.is_text else ()
    for level in levels:
        found = units_of(prompt, layout.text, layout.regions, level)
        if len(found) > 1:
            return found + target
    return chunked(prompt, layout.text, _CHUNKS) + target


def divided(unit: Unit, layout: Layout) -> list[Unit]:
    """What a unit is made of: a paragraph of sentences, a sentence of tokens.

    A piece that has no such parts and is longer than a chunk is divided into chunks.
    """
    own = set(unit.tokens)
    tokens = [t for t in layout.tokens if t.branch == unit.branch and t.tokens[0] in own]
    if unit.image is not None or unit.seconds is not None:
        return tokens
    if unit.level == "paragraph":
        sentence = units_of(tokens, layout.text, layout.regions, "sentence")
        if len(sentence) > 1:
            return sentence
    return chunked(tokens, layout.text, [c for c in _CHUNKS if 2 * c <= len(tokens)])


def _parts(layout: Layout, granularity: TargetGranularity) -> list[TargetPart]:
    return target_parts(
        layout.text, layout.targets, layout.prompt_stop, layout.target_stops, granularity
    )


def _check(
    granularity: Granularity, prompt: Tokens, documents: Sequence[Span], is_text: bool
) -> None:
    """Refuse a granularity that this prompt does not have."""
    if isinstance(granularity, Seconds) and not prompt.seconds:
        raise ValueError(
            f"granularity={described(granularity)!r} is of a sound, but the prompt is none."
        )
    apart = isinstance(granularity, (TokenSpans, Seconds))
    if not is_text and granularity not in ("token", "auto") and not apart:
        raise ValueError(
            f"granularity={described(granularity)!r} needs text, but without a tokenizer the "
            "prompt is token ids; pass the tokenizer, or take granularity='token'."
        )
    if granularity == "turn" and not prompt.contents:
        raise ValueError(
            "granularity='turn' needs chat messages, but the prompt is none; give a list of "
            "{'role': ..., 'content': ...}, or cut the text with a Delimiter."
        )
    if granularity == "document" and not documents:
        raise ValueError("granularity='document' needs documents; give documents=[...].")


def _asked(explain_only: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """Passages, or indices."""
    checked = checked_explain_only(explain_only)
    if checked is None or isinstance(checked[0], (str, tuple, Images)):
        return checked, None
    return None, checked


def _token_units(
    tokens: Tokens,
    shift: int,
    branch: int | None,
    prompt: int,
    documents: Sequence[int | None] = (),
    context: int = 0,
) -> list[Unit]:
    """A prompt's or target's own tokens that something is predicted from."""
    first = 0 if branch is None else prompt
    units = []
    for index in range(_count_read(tokens, branch)):
        if tokens.reasons[index] is None:
            start, stop = _moved(tokens.spans[index], shift) or (None, None)
            area = tokens.areas[index] if tokens.areas else None
            seconds = tokens.seconds[index] if tokens.seconds else None
            name, level = tokens.names[index], "token"
            if area is not None:
                name, level = patch_text(area.box, area.view), "patch"
            elif seconds is not None:
                name, level = seconds_text(*seconds), "frame"
            units.append(
                Unit(
                    name,
                    (first + index,),
                    start,
                    stop,
                    part="prompt" if branch is None else "target",
                    # What is read but not scored is as good as the prompt's, for the engine.
                    branch=None if index < context else branch,
                    level=level,
                    document=documents[index] if documents else None,
                    image=None if area is None else area.image,
                    boxes=() if area is None or area.box is None else (area.box,),
                    seconds=seconds,
                )
            )
    return units


def _count_read(tokens: Tokens, branch: int | None) -> int:
    """How many the model reads, those of a target before its last one."""
    if not tokens.read:
        return 0
    return len(tokens) if branch is None else len(tokens) - 1


def _last(prompt: int, targets: Sequence[Tokens], unit: Unit) -> int:
    """Position of the last scored token of the unit's target."""
    assert unit.branch is not None
    return prompt + len(targets[unit.branch]) - 1


def _moved(span: Span | None, by: int) -> Span | None:
    return None if span is None else (span[0] + by, span[1] + by)


def _chosen(candidates: list[Unit], indices: Sequence[Any] | None) -> list[Unit]:
    """The candidates that indices name, in text order."""
    if indices is None:
        return candidates
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
    count = _count_read(tokens, branch)
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
    left_out: list[list[Unit]] = []
    for unit in units:
        last = left_out[-1][-1] if left_out else None
        follows = last is not None and last.tokens[-1] + 1 == unit.tokens[0]
        if follows and last is not None and _branch(last) == _branch(unit):
            left_out[-1].append(unit)
        else:
            left_out.append([unit])
    pieces = [joined(piece, text, "chunk") for piece in left_out]
    return [LeftOut(each.text, each.tokens, NOT_ASKED_FOR, _branch(each)) for each in pieces]


def _branch(unit: Unit) -> int | None:
    """The target that a unit stands in, also where it is not scored there."""
    return 0 if unit.part == "target" and unit.branch is None else unit.branch
