"""Correlated suppression in encoder-decoders: what is like a unit, whichever source it is in."""

from __future__ import annotations

import pytest
import torch
from seq2seq_models import MODELS, TEXT, inputs_of, plain_logprobs, sizes_of, start_of
from test_seq2seq_engine import close, perturbed, split, started

from atman_triton.perturbations import Unit


def vectors_of(name, targets):
    """Of every source what is compared, and which sources are compared with each other."""
    model, inputs = MODELS[name](), inputs_of(name)
    read = start_of(name) + [token for target in targets for token in target[:-1]]
    table = {
        "t5": lambda: model.shared,
        "bart": lambda: model.model.shared,
        "marian": lambda: model.model.decoder.embed_tokens,
        "whisper": lambda: model.model.decoder.embed_tokens,
    }.get(name, lambda: model.text_decoder.bert.embeddings.word_embeddings)()
    found = {"decoder": table(torch.tensor(read))}
    if "input_ids" in inputs:
        own = {
            "marian": lambda: model.model.encoder.embed_tokens,
            "blip_vqa": lambda: model.text_encoder.embeddings.word_embeddings,
        }.get(name, lambda: table)()
        found["text"] = own(inputs["input_ids"])[0]
    if "input_features" in inputs:
        encoder = model.model.encoder
        sound = torch.nn.functional.gelu(encoder.conv1(inputs["input_features"]))
        sound = torch.nn.functional.gelu(encoder.conv2(sound))[0].T
        found["audio"] = sound + encoder.embed_positions.weight
    if "pixel_values" in inputs:
        found["image"] = model.vision_model.embeddings(inputs["pixel_values"])[0]
    return found, name in ("t5", "bart")


def correlated_row(name, unit, targets, threshold, rule, factor=0.1):
    """All columns' factors by the table of ``suppression``: prompt, then each target's tokens."""
    vectors, shared = vectors_of(name, targets)
    order = list(sizes_of(name))
    kinds = [source for source in order for _ in vectors[source]]
    kinds = ["decoder" if shared else kind for kind in kinds]
    flat = [vector.detach() for source in order for vector in vectors[source]]
    prompt = sum(sizes_of(name).values())
    owners = [None] * prompt + [k for k, target in enumerate(targets) for _ in target[:-1]]
    first = prompt + sum(len(target) - 1 for target in targets[: unit.branch or 0])
    own = [place if place < prompt else place - prompt + first for place in unit.positions]
    row = torch.ones(len(flat))
    for k in range(len(flat)):
        if unit.branch is not None and owners[k] not in (None, unit.branch):
            continue
        likes = [
            float(torch.cosine_similarity(flat[k], flat[u], dim=0)) if kinds[k] == kinds[u] else 0.0
            for u in own
            if u != k
        ]
        like = max(likes, default=-1.0)
        near = like >= threshold - 1e-9
        if rule == "released":
            row[k] = factor if k in own else 1 - (1 - factor) * like if near else 1.0
        elif not (k in own and len(own) == 1):
            row[k] = 1 - like if near else 1 - threshold
    return row


@pytest.mark.parametrize("rule", ["released", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_like_a_unit_is_suppressed_along(name, rule):
    """A threshold that most tokens reach, in both effects; a shared table joins the sources."""
    prompt, threshold = sum(sizes_of(name).values()), 0.2
    targets = [[31, 59, 70], [41, 5]]
    units = [Unit((place,)) for place in range(0, prompt, 2)]
    units += [Unit((1, 2)), Unit((prompt,), 0), Unit((prompt,), 1)]
    run = started(name, targets, similarity=threshold, rule=rule)
    model, start = MODELS[name](), start_of(name)
    found = {effect: perturbed(run, units, effect) for effect in ("total", "direct")}
    together = 0
    for u, unit in enumerate(units):
        row = correlated_row(name, unit, targets, threshold, rule)
        for k, target in enumerate(targets):
            if unit.branch not in (None, k):
                continue
            first = prompt + sum(len(each) - 1 for each in targets[:k])
            columns = torch.cat([row[:prompt], row[first : first + len(target) - 1]])
            together += int((columns != 1).sum()) - len(unit.positions)
            for effect, attention in (("total", "both"), ("direct", "cross")):
                plain = plain_logprobs(
                    model, inputs_of(name), start, target, split(name, columns), attention=attention
                )
                skip = max(0, max(unit.positions) - prompt + 1)
                close(found[effect][u, list(run.rows[k])][skip:], plain[skip:])
    assert together > len(units)
    shared = name in ("t5", "bart")
    near = run.neighbours(Unit((0,)))
    if rule == "released":
        assert any(one.branch == 0 and one.similarity == 1 for one in near) == shared
        if shared:  # the first token of the prompt is the first of the first answer
            (again,) = [one for one in near if one.branch == 0 and one.similarity == 1]
            assert (again.position, again.factor) == (prompt, pytest.approx(0.1))


def test_padding_is_like_nothing():
    run = started("t5", padded=3, similarity=0.2)
    blank = range(len(TEXT), len(TEXT) + 3)
    for place in range(len(TEXT)):
        assert not {one.position for one in run.neighbours(Unit((place,)))} & set(blank)
    assert started("t5").neighbours(Unit((0,))) == []
