"""What of a prompt is explained, and why the rest is not.

Legend: a span is ``(start, stop)`` in characters of the prompt as the model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .chat import Span
from .granularity import Granularity, Images, Spans, TokenSpans
from .placing import checked_span, owners, passage
from .tokens import Tokens

NOT_ASKED_FOR = "not in explain_only"
NO_DOCUMENT = "in no document"
NO_SPAN = "in no span"
ANSWER = "part of the answer"


@dataclass(frozen=True)
class Selection:
    """The explained part of a prompt.

    Args:
        reasons: Of each token of the prompt, why it is left out; None where it is explained.
        documents: Of each token of the prompt, which document it stands in.
        regions: What units are made of, ascending; none reaches over two.
        answer: Why the answer's own tokens are no units; None where they are.
    """

    reasons: list[str | None]
    documents: list[int | None]
    regions: list[Span]
    answer: str | None = None


def checked_explain_only(given: Any) -> list[str | Span | Images] | list[Any] | None:
    """What ``explain_only`` names: passages and pictures, or unit indices still to be checked.

    A str and a ``(start, stop)`` are passages, ``Images`` pictures, alone or several in a list; a
    list of anything else holds indices.

    Raises:
        TypeError: if it is none of these, or a mixture.
        ValueError: if it is empty, or a span is.
    """
    kinds = (
        "unit indices, a passage of the prompt, (start, stop) in characters, Images, or several "
        "of them"
    )
    if given is None:
        return None
    if isinstance(given, (str, Images)) or _is_pair(given):
        given = [given]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TypeError(f"explain_only must be {kinds}, got {given!r}.")
    several = list(given)
    if not several:
        raise ValueError("explain_only must name at least one unit, or be None for all.")
    places = [isinstance(item, (str, tuple, list, Images)) for item in several]
    if any(places) and not all(places):
        raise TypeError(f"explain_only must hold indices or passages, not both, got {given!r}.")
    if not all(places):
        return several
    return [
        item if isinstance(item, (str, Images)) else checked_span("explain_only", item)
        for item in several
    ]


def _is_pair(given: Any) -> bool:
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) for x in given)
    )


def select(
    prompt: Tokens,
    granularity: Granularity,
    documents: Sequence[Span],
    asked: Sequence[str | Span | Images] | None,
    *,
    is_text: bool,
) -> Selection:
    """What is explained: the user's own tokens, of them those that are asked for.

    Args:
        prompt: The prompt's tokens.
        granularity: How large a unit is.
        documents: Where the documents stand; without ``asked``, nothing else is explained.
        asked: Passages and pictures to explain; None is all.
        is_text: Whether the prompt's text is what was written, rather than a list of ids.
    Raises: ValueError: if a passage is not there, holds nothing to explain, or would make more
        than one unit.
    """
    written = None if asked is None else [item for item in asked if not isinstance(item, Images)]
    if written and not is_text:
        raise ValueError(
            "explain_only by passage needs text, but without a tokenizer the prompt is token ids; "
            "pass the tokenizer, or give unit indices."
        )
    reasons = list(prompt.reasons)
    belongs = owners(prompt.text, prompt.spans, documents)
    passages: list[Span] = []
    answer = ANSWER if granularity == "turn" else None
    if isinstance(granularity, (Spans, TokenSpans)):
        answer = NO_SPAN
    if documents and (asked is None or granularity == "document"):
        _leave_out(reasons, belongs, NO_DOCUMENT)
        answer = NO_DOCUMENT
    if asked is not None and written is not None:
        passages = _passages(prompt, written, reasons)
        inside = owners(prompt.text, prompt.spans, passages)
        pictured = _pictured(prompt, [item for item in asked if isinstance(item, Images)])
        inside = [0 if see else own for own, see in zip(inside, pictured, strict=True)]
        _leave_out(reasons, inside, NOT_ASKED_FOR)
        answer = NOT_ASKED_FOR
    if isinstance(granularity, (Spans, TokenSpans)):
        inside = _inside(prompt, granularity)
        _check_one_unit_each(prompt, granularity, inside, reasons, belongs)
        _leave_out(reasons, inside, NO_SPAN)
    if isinstance(granularity, Spans):
        regions = list(granularity.spans)
    else:
        within = [list(documents) if documents and asked is None else [], passages]
        regions = _regions(len(prompt.text), [*within, _turns(prompt)], documents)
    return Selection(reasons, belongs, regions, answer)


def _regions(length: int, within: Sequence[Sequence[Span]], apart: Sequence[Span]) -> list[Span]:
    """The parts of a text that lie in one span of each kind, cut at every border.

    Args:
        length: Of the text, in characters.
        within: Of each kind, its spans; a kind without any does not count.
        apart: Spans that only cut.
    """
    kinds = [spans for spans in within if spans]
    borders = {0, length, *(edge for spans in (*kinds, apart) for span in spans for edge in span)}
    return [
        (start, stop)
        for start, stop in pairwise(sorted(borders))
        if all(any(a <= start and stop <= b for a, b in spans) for spans in kinds)
    ]


def _leave_out(reasons: list[str | None], inside: Sequence[int | None], reason: str) -> None:
    """Tokens that are in nothing get a reason, unless they have one."""
    for index, owner in enumerate(inside):
        if owner is None and reasons[index] is None:
            reasons[index] = reason


def _turns(prompt: Tokens) -> list[Span]:
    """Contents of chat messages; parts of one message that follow each other are one turn."""
    turns: list[tuple[int, Span]] = []
    for start, stop, message in prompt.contents:
        if turns and turns[-1][0] == message and turns[-1][1][1] == start:
            turns[-1] = message, (turns[-1][1][0], stop)
        else:
            turns.append((message, (start, stop)))
    return [span for _, span in turns]


def _passages(
    prompt: Tokens, asked: Sequence[str | Span], reasons: Sequence[str | None]
) -> list[Span]:
    """The passages in text order, those that overlap as one."""
    within = [(start, stop) for start, stop, _ in prompt.contents] or None
    found: list[Span] = []
    for wanted in asked:
        span = passage("explain_only", wanted, prompt.text, within, "the prompt")
        touched = owners(prompt.text, prompt.spans, [span])
        if not any(
            owner is not None and why is None for owner, why in zip(touched, reasons, strict=True)
        ):
            raise ValueError(
                f"explain_only {wanted!r} holds no token that can be explained; special tokens, "
                "the chat template and whitespace between words are left out."
            )
        found.append(span)
    merged: list[Span] = []
    for start, stop in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def _pictured(prompt: Tokens, asked: Sequence[Images]) -> list[bool]:
    """Of each token, whether it stands for a picture that is asked for."""
    areas = prompt.areas or [None] * len(prompt)
    count = 1 + max((area.image for area in areas if area is not None), default=-1)
    for each in asked:
        if not count:
            raise ValueError("explain_only asks for Images, but the prompt holds no picture.")
        if each.indices and max(each.indices) >= count:
            raise ValueError(
                f"explain_only asks for picture {max(each.indices)}, but the prompt holds {count}, "
                f"0 to {count - 1}."
            )
    wanted = {index for each in asked for index in each.indices or range(count)}
    return [area is not None and area.image in wanted for area in areas]


def _inside(prompt: Tokens, granularity: Spans | TokenSpans) -> list[int | None]:
    """Of each token, the span that it belongs to."""
    last = granularity.spans[-1]
    if isinstance(granularity, Spans):
        passage("a span of Spans", last, prompt.text, None, "the prompt")
        return owners(prompt.text, prompt.spans, granularity.spans)
    if last[1] > len(prompt):
        raise ValueError(
            f"a span of TokenSpans must lie within the prompt, which has {len(prompt)} tokens, "
            f"got {last}."
        )
    inside: list[int | None] = [None] * len(prompt)
    for number, (start, stop) in enumerate(granularity.spans):
        inside[start:stop] = [number] * (stop - start)
    return inside


def _check_one_unit_each(
    prompt: Tokens,
    granularity: Spans | TokenSpans,
    inside: Sequence[int | None],
    reasons: Sequence[str | None],
    documents: Sequence[int | None],
) -> None:
    """Refuse a span that holds nothing, or reaches over what is no unit's."""
    for number, span in enumerate(granularity.spans):
        held = [index for index, owner in enumerate(inside) if owner == number]
        own = [index for index in held if reasons[index] is None]
        if not own:
            others = {reasons[index] for index in held} - {NOT_ASKED_FOR, NO_DOCUMENT}
            if others or not held:
                why = f": it is {' and '.join(sorted(map(str, others)))}" if others else ""
                raise ValueError(f"span {span} holds no token that can be explained{why}.")
            continue
        gap = next((i for i in range(own[0], own[-1]) if reasons[i] is not None), None)
        if gap is not None:
            raise ValueError(
                f"span {span} reaches over {prompt.names[gap]!r} ({reasons[gap]}), which is no "
                "unit's; give a span on each side of it."
            )
        if len({documents[index] for index in own}) > 1:
            raise ValueError(f"span {span} reaches over a document's border; divide it there.")
