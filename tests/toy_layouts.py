"""Laying out prompts without a model, and what must hold of every layout."""

from itertools import pairwise

from atman_triton.documents import checked_documents, filled, located
from atman_triton.granularity import checked_granularity
from atman_triton.tokens import encode_prompt, encode_target
from atman_triton.units import lay_out

MANY = 10**6  # a vocabulary that holds every id


def laid_out(
    prompt,
    granularity="token",
    tokenizer=None,
    explain_only=None,
    target=(7,),
    documents=None,
    **others,
):
    """The layout of a prompt in front of token ids."""
    sources = checked_documents(documents)
    whole = filled(prompt, sources)
    words = encode_prompt(whole.prompt, tokenizer, MANY)
    answer = encode_target(target, words, tokenizer, MANY, "")
    return lay_out(
        words,
        [answer],
        checked_granularity(granularity),
        explain_only,
        is_text=tokenizer is not None,
        documents=located(sources, whole, words),
        **others,
    )


def texts(layout):
    """What the units of the prompt say."""
    return [unit.text for unit in layout.units if unit.part == "prompt"]


def check_exact(layout):
    """Units are exact and disjoint, and with what is left out hold every token that is read."""
    held = [
        (-1 if piece.branch is None else piece.branch, token)
        for piece in (*layout.units, *layout.left_out)
        for token in piece.tokens
    ]
    read = [(-1, token) for token in range(len(layout.prompt_ids))]
    for branch, target in enumerate(layout.target_ids):
        read += [(branch, len(layout.prompt_ids) + step) for step in range(len(target) - 1)]
    assert sorted(held) == read
    placed = [unit for unit in layout.units if unit.start is not None]
    for unit in placed:
        assert layout.text[unit.start : unit.stop] == unit.text
        assert list(unit.tokens) == list(range(unit.tokens[0], unit.tokens[-1] + 1))
    if layout.granularity != "token":  # tokens of one character share its span
        assert all(first.stop <= second.start for first, second in pairwise(placed))


def check_covering(layout):
    """Every character of the prompt but whitespace is a unit's; for prompts without a template."""
    covered = {
        place
        for unit in layout.units
        if unit.start is not None
        for place in range(unit.start, unit.stop)
    }
    missing = [
        place
        for place, character in enumerate(layout.text[: layout.prompt_stop])
        if place not in covered and not character.isspace()
    ]
    assert not missing
