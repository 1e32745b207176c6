"""Which words made BERT choose a class, and which would speak for each of the others.

python examples/explain_bert.py textattack/bert-base-uncased-SST-2 "So good!"
"""

import sys

from small_models import NOTE, bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from atman_triton import Explainer

TEXT = "The tower is tall, but the picture of it is wonderful."


def main(name: str | None = None, text: str = TEXT) -> None:
    if name is None:
        print(NOTE)
        model, tokenizer = bert()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    explainer = Explainer(model, tokenizer)
    explainer.explain(text, granularity="word").show()  # of the class that is predicted

    labels = list(model.config.id2label.values())
    every = explainer.explain(text, targets=labels, granularity="word")
    print(f"\nEvery class in one pass of {every.provenance['exact_runs']} runs:")
    for branch, label in enumerate(labels):
        words = [every.units[unit].text.strip() for unit in every.ranking(branch=branch)]
        print(f"{label}: most for it {words[0]!r}, most against it {words[-1]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
