"""Each image token's box is the place on the picture that its embedding is made of."""

from __future__ import annotations

from typing import Any

import pytest
import toy_processors
import transformers as tf
from image_probe import Probe, meets, middle
from toy_processors import PATCH, SHOWN

SQUARE, WIDE, TALL, ODD = (60, 60), (110, 44), (46, 96), (71, 53)
FEWER: dict[str, Any] = {"llava-next": {"shown": 16}, "llava-onevision": {"shown": 18}}
PROBES = {
    f"{name}-{'-'.join(f'{w}x{h}' for w, h in sizes)}": (name, sizes, FEWER.get(name, {}))
    for name in toy_processors.PROCESSORS
    for sizes in ([SQUARE], [WIDE], [TALL], [ODD, SQUARE])
}
WHOLE = {"size": {"height": SHOWN, "width": SHOWN}, "do_center_crop": False}
SIGLIP = tf.SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SHOWN + 2,  # of which two pixels are never read
    patch_size=PATCH,
)
PROBES |= {
    "llava-stretched": ("llava", [WIDE, TALL], WHOLE),
    "llava-too-small-for-its-crop": ("llava", [WIDE, SQUARE], {"size": {"shortest_edge": 21}}),
    "llava-squared": (
        "llava",
        [WIDE, TALL, (71, 54)],
        {"kind": tf.LlavaImageProcessorPil, "do_pad": True},
    ),
    "llava-with-class": (
        "llava",
        [ODD, SQUARE],
        {"select": "full", "tower": {"vision_feature_select_strategy": "full"}},
    ),
    "llava-siglip": (
        "llava",
        [ODD],
        {
            "kind": tf.SiglipImageProcessorPil,
            "select": "full",
            "extra": 0,
            "size": {"height": SHOWN + 2, "width": SHOWN + 2},
            "tower": {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
        },
    ),
    "llava-siglip-without-its-first-patch": (
        "llava",
        [ODD],
        {
            "kind": tf.SiglipImageProcessorPil,
            "extra": 0,
            "size": {"height": SHOWN + 2, "width": SHOWN + 2},
            "do_center_crop": False,
            "tower": {"vision_config": SIGLIP},
        },
    ),
    "gemma3-crops": (
        "gemma3",
        [WIDE, SQUARE, TALL, (70, 25)],
        {"options": {"do_pan_and_scan": True}},
    ),
    "llava-onevision-averaged": ("llava-onevision", [ODD], {"most": 1, "shown": 18}),
    "llava-onevision-averaged-wide": ("llava-onevision", [(120, 40)], {"most": 2, "shown": 18}),
    "llava-onevision-two-in-full": (
        "llava-onevision",
        [ODD, WIDE],
        {"options": {"flat": True}, "shown": 18},
    ),
    "idefics3-3-columns": ("idefics3", [WIDE], {"size": {"longest_edge": 3 * SHOWN}}),
    "idefics3-one-tile": ("idefics3", [ODD], {"size": {"longest_edge": SHOWN}}),
    "smolvlm-not-split": ("smolvlm", [ODD], {"options": {"do_image_splitting": False}}),
    "internvl-not-split": ("internvl", [ODD], {"options": {"crop_to_patches": False}}),
    "mllama-small": ("mllama", [(20, 12), (9, 26)], {}),
}


@pytest.mark.parametrize("probe", PROBES)
def test_the_token_that_stands_there_moves_most(probe):
    name, sizes, settings = PROBES[probe]
    probe = Probe(name, sizes, **settings)
    for token, row in zip(probe.placed, probe.moved(), strict=True):
        x, y = middle(token.box)
        mates = [other for other in probe.placed if other.image == token.image]
        for view in {other.view for other in mates}:
            same = [other for other in mates if other.view == view]
            most = max(same, key=lambda other: row[other.token])
            if view == token.view:
                assert most == token
            elif any(meets(other.box, x, y) for other in same):  # it may be cut off, or never read
                assert meets(most.box, x, y, (1.5, 1.5))
        # Resizing blurs by less than two cells; nothing else knows of the change.
        near = {o.token for o in mates if meets(o.box, x, y, (2 * o.box[2], 2 * o.box[3]))}
        assert set(row.nonzero()[:, 0].tolist()) <= near
