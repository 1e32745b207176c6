"""Which parts of a picture made BLIP caption it so, or answer a question so.

python examples/explain_blip.py Salesforce/blip-image-captioning-base cats.jpg
python examples/explain_blip.py Salesforce/blip-vqa-base cats.jpg "How many cats are there?"
"""

import sys

from PIL import Image, ImageDraw
from small_models import NOTE, blip, blip_vqa
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering, BlipProcessor

from atman_triton import Explainer


def drawn() -> Image.Image:
    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((10, 12, 46, 48), fill="red")
    return picture


def main(name: str | None = None, path: str | None = None, question: str | None = None) -> None:
    picture = drawn() if path is None else Image.open(path)
    if name is None:
        print(NOTE)
        asked = [(*blip(), picture), (*blip_vqa(), [picture, "what is in the picture?"])]
    else:
        kind = BlipForConditionalGeneration if question is None else BlipForQuestionAnswering
        model, processor = kind.from_pretrained(name), BlipProcessor.from_pretrained(name)
        asked = [(model, processor, picture if question is None else [picture, question])]
    for model, processor, prompt in asked:
        explainer = Explainer(model, processor, method="exact")
        explanation = explainer.explain(prompt, image_granularity="6x4", max_new_tokens=8)
        explanation.show()


if __name__ == "__main__":
    main(*sys.argv[1:])
