"""Real processors of vision-language families, built offline with small sizes and tokenizers."""

import warnings
from typing import Any

import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from toy_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast, processing_utils
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

# Without torchvision transformers does not export the class that it checks video processors by.
vars(processing_utils.transformers_module)["VideoProcessorMixin"] = VideoProcessorMixin

PATCH = 4  # pixels, of every tower here
SHOWN = 24  # pixels, of every tower of one size: 6x6 patches
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]  # LLaVA's: height, width


def _tokenizer(*others: str, **named: str) -> Any:
    """Byte-level, with a family's special tokens, some of which it knows by a name."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(others),
        model_specific_special_tokens=named,
    )


def llava(kind: Any = None, **settings: Any) -> Any:
    """LLaVA 1.5's: the shorter edge resized, the middle cut out."""
    defaults = {
        "size": {"shortest_edge": SHOWN},
        "crop_size": {"height": SHOWN, "width": SHOWN},
    }
    kind = kind or tf.CLIPImageProcessorPil
    return tf.LlavaProcessor(
        kind(**defaults | settings),
        _tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen2_5(**settings: Any) -> Any:
    """Qwen2.5-VL's: stretched to whole squares of merged patches."""
    defaults = {
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        "patch_size": PATCH,
        "merge_size": 2,
    }
    return tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessorPil(**defaults | settings),
        _qwen_tokenizer(),
        BaseVideoProcessor(),
    )


def _qwen_tokenizer():
    return _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def qwen3(**settings: Any) -> Any:
    """Qwen3-VL's."""
    defaults = {
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        "patch_size": PATCH,
        "merge_size": 2,
    }
    return tf.Qwen3VLProcessor(
        tf.Qwen2VLImageProcessorPil(**defaults | settings),
        _qwen_tokenizer(),
        BaseVideoProcessor(),
    )


def gemma3(**settings: Any) -> Any:
    """Gemma 3's: stretched to a square."""
    named = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(**{"size": {"height": SHOWN, "width": SHOWN}} | settings),
        _tokenizer(**named),
        image_seq_length=9,
    )


def paligemma(**settings: Any) -> Any:
    """PaliGemma's: stretched to a square."""
    size = {"size": {"height": SHOWN, "width": SHOWN}}
    images: Any = tf.SiglipImageProcessorPil(**size | settings)
    images.image_seq_length = 36
    return tf.PaliGemmaProcessor(images, _tokenizer(image_token="<image>"))


def encoded(processor: Any, rows: list[list[Image.Image]], text: str = "", **options: Any) -> Any:
    """Prompts with the same text, each with its own pictures in front: what the model takes."""
    mark = getattr(processor, "image_token", "<image>")
    texts = ["\n".join([mark] * len(rows[0])) + text] * len(rows)
    with warnings.catch_warnings():
        # PaliGemma's processor makes arrays of tensors in a way that numpy is to give up.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return processor(images=rows, text=texts, return_tensors="pt", **options)


PROCESSORS = {
    "llava": llava,
    "qwen2.5-vl": qwen2_5,
    "qwen3-vl": qwen3,
    "gemma3": gemma3,
    "paligemma": paligemma,
}
