"""Which parts of a picture made ViT choose a class: a heat map over the picture.

python examples/explain_vit.py google/vit-base-patch16-224 photo.jpg heat.png
"""

import sys

from PIL import Image, ImageDraw
from small_models import NOTE, vit
from transformers import AutoImageProcessor, AutoModelForImageClassification

from atman_triton import Explainer


def drawn() -> Image.Image:
    """A red circle and a blue square."""
    picture = Image.new("RGB", (160, 96), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 28, 60, 68), fill="red")
    draw.rectangle((100, 28, 140, 68), fill="blue")
    return picture


def main(name: str | None = None, picture: str | None = None, out: str = "heat.png") -> None:
    if name is None:
        print(NOTE)
        model, processor = vit()
    else:
        model = AutoModelForImageClassification.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    image = drawn() if picture is None else Image.open(picture)
    explainer = Explainer(model, processor)
    explanation = explainer.explain(image)  # of the class that is predicted, patch by patch
    explanation.show()
    explanation.plot(out)
    best = explanation.units[explanation.ranking()[0]]
    print(f"{explanation.answer!r}: most for it the {best.text}. Heat map: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
