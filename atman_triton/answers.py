"""The answers that are explained, as tokens: what the user gives, or what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .arguments import plain
from .capabilities import context_window, vocabulary_size
from .perturbations import RunFailed
from .pieces import LeftOut
from .tokens import Tokens, border, encode_target, tokens_of_ids

END_OF_TEXT = "end of text, generated and not explained"

_NEW_TOKENS = 32  # how many are generated where there is room and nothing else is said


@dataclass(frozen=True)
class Answers:
    """Answers behind one prompt.

    Args:
        tokens: Of each answer, its tokens.
        left_out: What the model wrote that is not explained.
        facts: How the answers came about, as JSON values.
    """

    tokens: list[Tokens]
    left_out: list[LeftOut] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def given_answers(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    words: Tokens,
    targets: Sequence[Any],
    separator: str | None,
    *,
    alone: bool = False,
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
    Raises: ValueError: if a target is empty, unknown to the model or too long for it.
    """
    vocabulary = vocabulary_size(model)
    answers, separators = [], []
    for target in targets:
        between = border(prompt, words, target) if separator is None else separator
        answer = encode_target(target, words, tokenizer, vocabulary, between)
        if isinstance(target, str):
            separators.append(between)
        check_length(model, len(words), len(answer), "the target's")
        answers.append(answer)
    facts: dict[str, Any] = {"target": "given"}
    if separators:
        facts["separator"] = separators[0] if alone else separators
    return Answers(answers, facts=facts)


def generated_answer(
    model: Any,
    tokenizer: Any,
    words: Tokens,
    max_new_tokens: int | None,
    generation_kwargs: dict[str, Any],
) -> Answers:
    """The model's own continuation, without its end-of-text token.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer, or None.
        words: The prompt.
        max_new_tokens: The most tokens; None is 32, or what the context window has room for.
        generation_kwargs: Passed on to ``model.generate``.
    Raises:
        RunFailed: if it ends at once.
        ValueError: if it might not fit into the context window, or is not one.
    """
    if max_new_tokens is None:
        max_new_tokens = default_new_tokens(model, len(words))
    check_length(model, len(words), max_new_tokens, "max_new_tokens")
    arguments = {"max_new_tokens": max_new_tokens} | generation_kwargs
    answer, end = _generate(model, tokenizer, words, arguments)
    given = {name: plain(value) for name, value in arguments.items()}
    return Answers([answer], end, {"target": "generated", "generation": given})


def contrasted(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    words: Tokens,
    answers: Answers,
    other: Any,
    separator: str | None,
) -> Answers:
    """One answer and what it is compared with, given as ``given_answers`` takes it.

    Raises: ValueError: if both are the same tokens; else as ``given_answers`` does.
    """
    given = given_answers(model, tokenizer, prompt, words, [other], separator, alone=True)
    if given.tokens[0].ids == answers.tokens[0].ids:
        raise ValueError(
            f"contrast_target must differ from the target, but both are {given.tokens[0].text!r}."
        )
    facts = dict(answers.facts)
    between = [each.facts["separator"] for each in (answers, given) if "separator" in each.facts]
    if between:
        facts["separator"] = between
    # What the model wrote is of the first answer only.
    left_out = [replace(piece, branch=0) for piece in answers.left_out]
    return Answers(answers.tokens + given.tokens, left_out, facts)


def _generate(
    model: Any, tokenizer: Any, prompt: Tokens, arguments: dict[str, Any]
) -> tuple[Tokens, list[LeftOut]]:
    ids = torch.tensor(prompt.ids, device=model.device)[None]
    config = arguments.get("generation_config") or model.generation_config
    ends = end_tokens(tokenizer, config, arguments)
    defaults: dict[str, Any] = {}
    if "generation_config" not in arguments:
        defaults = {"do_sample": False, "num_beams": 1}
    if config.pad_token_id is None and ends:
        defaults["pad_token_id"] = min(ends)  # there is nothing to pad; spares a warning
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **(defaults | arguments)
    )
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
