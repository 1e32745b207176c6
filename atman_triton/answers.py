"""The answers that are explained, as tokens: what the user gives, or what the model writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import plain
from .capabilities import context_window, vocabulary_size
from .chat import Span
from .perturbations import RunFailed
from .pieces import LeftOut
from .placing import owners, passage
from .tokens import Tokens, border, encode_target, tokens_of_ids

END_OF_TEXT = "end of text, generated and not explained"
BEHIND_SPAN = "behind target_span, not run"

_NEW_TOKENS = 32  # how many are generated where there is room and nothing else is said


@dataclass(frozen=True)
class Answers:
    """Answers behind one prompt.

    Args:
        tokens: Of each answer, its tokens.
        left_out: What the model wrote that is not explained.
        facts: How the answers came about, as JSON values.
        context: So many tokens of the only answer are read, but not scored.
    """

    tokens: list[Tokens]
    left_out: list[LeftOut] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    context: int = 0


def given_answers(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    words: Tokens,
    targets: Sequence[Any],
    separator: str | None,
    *,
    alone: bool = False,
    target_span: str | Span | None = None,
) -> Answers:
    """What the user gives.

    Args:
        model: What reads them.
        tokenizer: Its tokenizer; None is enough for ids.
        prompt: As in ``encode_prompt``.
        words: The same, encoded.
        targets: Each a str or token ids.
        separator: Text in front of each str; None is what ``border`` says.
        alone: Note one separator rather than a list of them.
        target_span: Of one target, the only passage that is scored (see ``limited``).
    Raises: ValueError: if a target is empty, unknown to the model or too long for it, or the
        passage is not there.
    """
    vocabulary = vocabulary_size(model)
    answers, separators = [], []
    cut = Answers([])
    for target in targets:
        between = border(prompt, words, target) if separator is None else separator
        answer = encode_target(target, words, tokenizer, vocabulary, between)
        if isinstance(target, str):
            separators.append(between)
        if target_span is not None:
            skipped = len(between) if isinstance(target, str) else 0
            cut = limited(answer, target_span, tokenizer, skipped)
            answer = cut.tokens[0]
        check_length(model, len(words), len(answer), "the target's")
        answers.append(answer)
    facts: dict[str, Any] = {"target": "given"}
    if separators:
        facts["separator"] = separators[0] if alone else separators
    return Answers(answers, cut.left_out, facts | cut.facts, cut.context)


def generated_answer(
    model: Any,
    tokenizer: Any,
    words: Tokens,
    max_new_tokens: int | None,
    generation_kwargs: dict[str, Any],
    target_span: str | Span | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Answers:
    """The model's own continuation, without its end-of-text token.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer, or None.
        words: The prompt.
        max_new_tokens: The most tokens; None is 32, or what the context window has room for.
        generation_kwargs: Passed on to ``model.generate``.
        target_span: The only passage of it that is scored (see ``limited``).
        inputs: What the model's forward takes for the prompt; None is its ids.
    Raises:
        RunFailed: if it ends at once.
        ValueError: if it might not fit into the context window, is not one, or the passage is not
            in it.
    """
    if max_new_tokens is None:
        max_new_tokens = default_new_tokens(model, len(words))
    check_length(model, len(words), max_new_tokens, "max_new_tokens")
    arguments = {"max_new_tokens": max_new_tokens} | generation_kwargs
    answer, end = _generate(model, tokenizer, words, inputs or {}, arguments)
    given = {name: plain(value) for name, value in arguments.items()}
    facts = {"target": "generated", "generation": given}
    if target_span is None:
        return Answers([answer], end, facts)
    cut = limited(answer, target_span, tokenizer)
    return Answers(cut.tokens, cut.left_out + end, facts | cut.facts, cut.context)


def limited(answer: Tokens, target_span: str | Span, tokenizer: Any, skipped: int = 0) -> Answers:
    """An answer of which only the tokens of one passage are scored.

    What comes before is context; what comes after is not run. A token belongs to the passage if it
    touches it with more than whitespace.

    Args:
        answer: All of its tokens.
        target_span: The passage itself, which must occur once, or ``(start, stop)``.
        tokenizer: None if there are only ids.
        skipped: Characters at the start of ``answer.text`` that do not count: the separator.
    Raises: ValueError: if the passage is not there, or there is no text.
    """
    if tokenizer is None:
        raise ValueError(
            "target_span needs text, but without a tokenizer the target is token ids; pass the "
            "tokenizer, or end the prompt where the scored tokens begin."
        )
    place = passage("target_span", target_span, answer.text[skipped:], None, "the completion")
    start, stop = place[0] + skipped, place[1] + skipped
    inside = owners(answer.text, answer.spans, [(start, stop)])
    rows = [row for row, owner in enumerate(inside) if owner is not None]
    if not rows:
        raise ValueError(f"target_span {target_span!r} holds no token: only whitespace.")
    cut = answer.head(rows[-1] + 1)
    left_out = []
    if len(cut) < len(answer):
        rest = answer.text[len(cut.text) :] or "".join(answer.names[len(cut) :])
        left_out = [LeftOut(rest, (), BEHIND_SPAN)]
    return Answers([cut], left_out, {"target_span": list(place)}, rows[0])


def contrasted(answers: Answers, other: Answers) -> Answers:
    """One answer and the one that it is compared with.

    Raises: ValueError: if both are the same tokens.
    """
    if other.tokens[0].ids == answers.tokens[0].ids:
        raise ValueError(
            f"contrast_target must differ from the target, but both are {other.tokens[0].text!r}."
        )
    facts = dict(answers.facts)
    between = [each.facts["separator"] for each in (answers, other) if "separator" in each.facts]
    if between:
        facts["separator"] = between
    # What the model wrote is of the first answer only.
    left_out = [replace(piece, branch=0) for piece in answers.left_out]
    return Answers(answers.tokens + other.tokens, left_out, facts)


def _generate(
    model: Any,
    tokenizer: Any,
    prompt: Tokens,
    inputs: Mapping[str, Any],
    arguments: dict[str, Any],
) -> tuple[Tokens, list[LeftOut]]:
    ids = torch.tensor(prompt.ids, device=model.device)[None]
    given = {**inputs, "input_ids": ids}
    given.setdefault("attention_mask", torch.ones_like(ids))
    config = arguments.get("generation_config") or model.generation_config
    ends = end_tokens(tokenizer, config, arguments)
    defaults: dict[str, Any] = {}
    if "generation_config" not in arguments:
        defaults = {"do_sample": False, "num_beams": 1}
    if config.pad_token_id is None and ends:
        defaults["pad_token_id"] = min(ends)  # there is nothing to pad; spares a warning
    output = model.generate(**given, **(defaults | arguments))
    sequences = output if isinstance(output, Tensor) else output.sequences
    if len(sequences) != 1:
        raise ValueError(
            f"one completion is explained at a time, got {len(sequences)}; "
            "leave num_return_sequences at 1."
        )
    completion = sequences[0, len(prompt) :].tolist()
    kept = len(completion)
    while kept and completion[kept - 1] in ends:
        kept -= 1
    if not kept:
        raise RunFailed("the model's completion is empty: it ended at once; give a target.")
    answer = tokens_of_ids(completion[:kept], tokenizer, after=prompt)
    if kept == len(completion):
        return answer, []
    rest = tokens_of_ids(completion[kept:], tokenizer, after=prompt)
    # Generated, but never read again: it has no position in the model input.
    return answer, [LeftOut("".join(rest.names), (), END_OF_TEXT)]


def check_length(model: Any, prompt_tokens: int, target_tokens: int, whose: str) -> None:
    """Refuse, by a ValueError, what does not fit into the context window."""
    limit = context_window(model)
    needed = prompt_tokens + target_tokens - 1  # the last target token is never read
    if limit is not None and needed > limit:
        remedy = "shorten one of them"
        if whose == "max_new_tokens":
            room = limit - prompt_tokens + 1
            remedy = f"lower max_new_tokens to {room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"prompt and target must fit into the context window of {limit} tokens, got "
            f"{prompt_tokens} and {whose} {target_tokens}: {needed - limit} too many; {remedy}."
        )


def default_new_tokens(model: Any, prompt_tokens: int) -> int:
    """How many tokens are generated where nothing is said."""
    limit = context_window(model)
    room = _NEW_TOKENS if limit is None else limit - prompt_tokens + 1
    return max(1, min(_NEW_TOKENS, room))


def end_tokens(tokenizer: Any, config: Any, arguments: dict[str, Any]) -> set[int]:
    """Ids that end a completion."""
    given = arguments.get("eos_token_id", config.eos_token_id)
    several = given if isinstance(given, (list, tuple)) else [given]
    known = [*several, getattr(tokenizer, "eos_token_id", None)]
    return {int(token_id) for token_id in known if token_id is not None}
