"""Which sentences of a text BART's summary rests on, and which of two summaries they speak for.

python examples/explain_bart.py facebook/bart-large-cnn article.txt
"""

import sys
from pathlib import Path

from small_models import NOTE, bart
from transformers import AutoTokenizer, BartForConditionalGeneration

from atman_triton import Explainer

TEXT = (
    "The tower is 324 metres tall. It is about the same height as an 81-storey building. "
    "A red circle is in the picture."
)


def main(name: str | None = None, path: str | None = None) -> None:
    if name is None:
        print(NOTE)
        model, tokenizer = bart()
    else:
        model = BartForConditionalGeneration.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    text = TEXT if path is None else Path(path).read_text(encoding="utf-8")
    explainer = Explainer(model, tokenizer)
    print("\nThe summary, and what of each sentence reached it directly:")
    explainer.explain(text, granularity="sentence", max_new_tokens=24).show()
    print("\nTwo summaries in one pass:")
    explainer.explain(
        text, targets=["The tower is tall.", "A picture of two cats."], granularity="sentence"
    ).show()


if __name__ == "__main__":
    main(*sys.argv[1:])
