"""The model card of the shapes model, written from measured numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluate import Share
from .pictures import COLOURS, KINDS
from .questions import DEMO_PROMPT

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
---

# Demo shapes

A small LLaVA that looks at a generated picture of one to four coloured shapes, names one of them
and answers yes/no questions. It exists so that `atman explain` has a real vision-language model to
explain on a laptop, without a download: where each shape lies is known exactly, so an explanation
can be checked.

It knows nothing but these pictures and questions. Any other picture and text goes through it
(pictures are resized to 96 × 96 pixels, text falls back to bytes), but expect wrong answers there.

## Use

```python
from atman_triton.demo.shapes import DEMO_PROMPT, load_shapes_model, make_picture

model, processor = load_shapes_model()
picture = make_picture(seed=1, objects=2)
inputs = processor(images=picture.image, text="<image>" + DEMO_PROMPT, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=6)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print([shape.name for shape in picture.objects])
```

A prompt is `<image>`, then the text, without a space at its end. The answer begins with a space
and is followed by the end-of-text token. Behind "{prompt}" each of the
objects' names is about equally likely.

## Model

`LlavaForConditionalGeneration`, {parameters:,} parameters in float32. A CLIP vision tower of
{tower} layers of width {tower_width} reads patches of {patch} × {patch} pixels: {patches} image
tokens, 12 × 12 as in the paper on AtMan. A two-layer projector, then a Llama decoder of {layers}
layers of width {width}, 4 query and 2 key-value heads. Byte-level BPE with {vocabulary} tokens.

## Data

`atman_triton/demo/shapes/pictures.py` draws the pictures. Colours are {colours}.
An object is a {kinds}. Sizes, places, tilt, shades
and grey clutter vary; objects never overlap. `questions.py` asks for a name, for a colour, whether
an object is there (what is not shares its colour or its kind with one that is), and whether the
picture shows what somebody likes, which a sentence of the prompt tells.

## Training

    python -m atman_triton.demo.shapes.train --steps {steps}
    python -m atman_triton.demo.shapes.evaluate --model checkpoints/shapes/model --card

Seed {seed}, {pictures:,} pictures drawn on the fly, {minutes:.0f} minutes on 2 busy CPU cores. Muon
for the matrices, AdamW for the rest. While training, a linear head on the projected image tokens
names the colour and kind in each patch; it is not part of the model.

## Measured

Greedy generation up to the end-of-text token equals the expected answer character by character; to
name an object, the name of any object in the picture is right. Fresh pictures, whose seeds
training never draws.

| | right |
|---|---|
| names an object | **{name}** |
| is there such an object? yes/no | **{presence}** |
| does the picture show what somebody likes? yes/no | **{liking}** |
| the same behind statements about two people | {liking_of_two} |
| what colour is it? | **{colour}** |
| an untrained model names an object | {untrained} |
| two objects: each has a chance of 30% to 70% to be named | {even} |

| question | group | right |
|---|---|---|
{rows}

## Limits

Colours, kinds and wordings are those of the generator. It always answers, also where the picture
shows nothing that was asked for. Told what two people like, it mixes them up more often than the
other questions let expect: see the table.
"""


def write_card(folder: Path, model: Any, shares: Mapping[str, Share]) -> None:
    """Write the measured shares into a trained model's ``training.json`` and ``README.md``.

    Args:
        folder: the folder, with the ``training.json`` that the trainer leaves in it.
        model: the model that was measured.
        shares: of :func:`~atman_triton.demo.shapes.evaluate.measure`.
    """
    path = folder / "training.json"
    training = json.loads(path.read_text())
    training["measured"] = {name: asdict(share) for name, share in shares.items()}
    path.write_text(json.dumps(training, indent=2) + "\n")
    progress, vision, text = (
        training["progress"],
        model.config.vision_config,
        model.config.text_config,
    )
    card = _CARD.format(
        prompt=DEMO_PROMPT,
        parameters=model.num_parameters(),
        tower=vision.num_hidden_layers,
        tower_width=vision.hidden_size,
        patch=vision.patch_size,
        patches=model.config.image_seq_length,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        colours=_listed(COLOURS, "and"),
        kinds=_listed(KINDS, "or"),
        steps=progress["step"],
        seed=training["recipe"]["seed"],
        pictures=progress["pictures"],
        minutes=progress["seconds"] / 60,
        rows="\n".join(
            f"| {name} | {group} | {part} |"
            for name, share in shares.items()
            for group, part in sorted(share.groups.items())
            if name != "untrained"
        ),
        **{name: str(share) for name, share in shares.items()},
    )
    (folder / "README.md").write_text(card)


def _listed(words: Iterable[str], joint: str) -> str:
    """As "red, green and blue"."""
    *first, last = words
    return f"{', '.join(first)} {joint} {last}"
