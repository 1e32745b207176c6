"""The model card of the demo reader, written from measured numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: question-answering
---

# Demo reader

A small language model that reads a generated employment contract, CV or product sheet of 8 to 12
sentences and answers one question about it. It exists so that `atman explain` has something real
to explain on a laptop, without a download: the answer stands in exactly one sentence, so an
explanation can be checked.

It knows nothing but these documents. Any other text goes through it (the tokenizer falls back to
bytes, the context is 2048 tokens), but expect wrong answers there.

## Use

```python
from atman_triton.demo import load_demo_model, make_document, prompt

model, tokenizer = load_demo_model()
document = make_document(seed=1, kind="contract")
inputs = tokenizer(prompt(document, document.questions[0]), return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=10)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The prompt is `{{document}} Q: {{question}} A:`. The answer begins with a space, is at most 6
tokens long, and is followed by the end-of-text token.

## Model

Llama architecture: {layers} layers, width {width}, 4 query and 2 key-value heads, tied
embeddings, {parameters:,} parameters in float32. Byte-level BPE with {vocabulary:,} tokens;
digits go in pairs.

## Data

`atman_triton/demo/documents.py` makes the documents from `facts.toml`: every fact has several
wordings, every question several phrasings with other words than the facts, and every question at
least three facts of the same value type beside it. Some answers are asked for in another form
than the text has: a date or number in words asked for in digits, a state asked for as its
country. All names and numbers are drawn by chance.

## Training

    python -m atman_triton.demo.train --steps {steps}
    python -m atman_triton.demo.evaluate --model checkpoints/demo/model --card

Seed {seed}, {tokens:.1f} million tokens, {minutes:.0f} minutes on 2 busy CPU cores. Muon for the
matrices, AdamW for the rest. While training, a linear head behind layer 2 names the fact at
values and questions; it is not part of the model.

## Measured

Exact match: greedy generation up to the end-of-text token equals the expected answer character by
character. Fresh documents, whose seeds training never draws, one question each. *Keywords* is how
often BM25 over the sentences ranks the sentence with the answer first.

| | right |
|---|---|
| this model, exact match | **{reader}** |
| the same model untrained, exact match | {untrained} |
| keywords (BM25) find the sentence | {keywords} |

| group | exact match | keywords |
|---|---|---|
{rows}

## Limits

The wordings are those of the generator: a contract phrased otherwise is out of its reach. It
always answers, also where the document says nothing. It is no tool for decisions about people,
contracts or products.
"""


def write_card(
    folder: Path,
    parameters: int,
    shares: Mapping[str, str],
    groups: Sequence[tuple[str, str, str]],
) -> None:
    """Write ``README.md`` into a trained model's folder.

    Args:
        folder: the folder, with the ``training.json`` that the trainer leaves in it.
        parameters: number of the model's parameters.
        shares: measured shares as text, for ``reader``, ``untrained`` and ``keywords``.
        groups: rows of group name, exact match and keyword share.
    """
    training = json.loads((folder / "training.json").read_text())
    recipe, progress = training["recipe"], training["progress"]
    card = _CARD.format(
        layers=recipe["layers"],
        width=recipe["width"],
        parameters=parameters,
        vocabulary=recipe["vocabulary"],
        seed=recipe["seed"],
        steps=progress["step"],
        tokens=progress["tokens"] / 1e6,
        minutes=progress["seconds"] / 60,
        rows="\n".join(f"| {' | '.join(row)} |" for row in groups),
        **shares,
    )
    (folder / "README.md").write_text(card)
