"""Which words of a text made T5 write its answer, and whether the encoder or the decoder read them.

python examples/explain_t5.py google-t5/t5-small "translate English to German: I am at home."
"""

import sys

from small_models import NOTE, t5
from transformers import AutoTokenizer, T5ForConditionalGeneration

from atman_triton import Explainer

TEXT = "translate English to German: The house is wonderful."


def main(name: str | None = None, text: str = TEXT) -> None:
    if name is None:
        print(NOTE)
        model, tokenizer = t5()
    else:
        model = T5ForConditionalGeneration.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    for attention in ("both", "encoder", "cross"):
        explainer = Explainer(model, tokenizer, method="exact", attention=attention)
        explanation = explainer.explain(text, granularity="word", max_new_tokens=16)
        print(f"\nSuppressed in {explanation.provenance['attention']}:")
        explanation.show()


if __name__ == "__main__":
    main(*sys.argv[1:])
