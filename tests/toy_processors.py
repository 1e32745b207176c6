"""Real processors of vision-language families, built offline with small sizes and tokenizers."""

import warnings
from typing import Any

import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer
from toy_tokenizers import byte_level
from transformers import PreTrainedTokenizerFast, processing_utils
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

# Without torchvision transformers does not export the class that it checks video processors by.
vars(processing_utils.transformers_module)["VideoProcessorMixin"] = VideoProcessorMixin

PATCH = 4  # pixels, of every tower here
SHOWN = 24  # pixels, of every tower of one size: 6x6 patches
CANVASES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]  # LLaVA's: rows and columns of tiles


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


def llava(kind: Any = None, select: str = "default", extra: int = 1, **settings: Any) -> Any:
    """LLaVA 1.5's: the shorter edge resized, the middle cut out.

    Args:
        kind: Class of image processors.
        select: ``full`` passes the tower's class token on.
        extra: Tokens of the tower that are no patches.
    """
    defaults = {
        "size": {"shortest_edge": SHOWN},
        "crop_size": {"height": SHOWN, "width": SHOWN},
    }
    kind = kind or tf.CLIPImageProcessorPil
    return tf.LlavaProcessor(
        kind(**defaults | settings),
        _tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=extra,
    )


def _qwen_parts(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    defaults = {
        "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        "patch_size": PATCH,
        "merge_size": 2,
    }
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    images = tf.Qwen2VLImageProcessorPil(**defaults | settings)
    return images, _tokenizer(*marks), BaseVideoProcessor()


def qwen2(**settings: Any) -> Any:
    """Qwen2-VL's: stretched to whole squares of merged patches."""
    return tf.Qwen2VLProcessor(*_qwen_parts(settings))


def qwen2_5(**settings: Any) -> Any:
    """Qwen2.5-VL's: the same."""
    return tf.Qwen2_5_VLProcessor(*_qwen_parts(settings))


def qwen3(**settings: Any) -> Any:
    """Qwen3-VL's: the same."""
    return tf.Qwen3VLProcessor(*_qwen_parts(settings))


def gemma3(**settings: Any) -> Any:
    """Gemma 3's: stretched to a square; crops of long pictures where a call asks for them."""
    named = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    processor: Any = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(**{"size": {"height": SHOWN, "width": SHOWN}} | settings),
        _tokenizer(**named),
        image_seq_length=9,
    )
    processor.images_kwargs = processor.images_kwargs | {"pan_and_scan_min_crop_size": 20}
    return processor


def paligemma(**settings: Any) -> Any:
    """PaliGemma's: stretched to a square."""
    size = {"size": {"height": SHOWN, "width": SHOWN}}
    images: Any = tf.SiglipImageProcessorPil(**size | settings)
    images.image_seq_length = 36
    return tf.PaliGemmaProcessor(images, _tokenizer(image_token="<image>"))


def llava_next(shown: int = SHOWN, **settings: Any) -> Any:
    """LLaVA-NeXT's: an overview, and tiles of the canvas that fits best."""
    defaults = {
        "size": {"shortest_edge": shown},
        "crop_size": {"height": shown, "width": shown},
        "image_grid_pinpoints": [[shown * rows, shown * columns] for rows, columns in CANVASES],
    }
    return tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(**defaults | settings),
        _tokenizer("<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision(most: int = 9, shown: int = SHOWN + 2, **settings: Any) -> Any:
    """LLaVA-OneVision's: the same; its tower leaves some pixels of each tile unread.

    Args:
        most: Tiles' worth of tokens that a picture may have.
    """
    defaults = {
        "size": {"height": shown, "width": shown},
        "image_grid_pinpoints": [[shown * rows, shown * columns] for rows, columns in CANVASES],
    }
    return tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessorPil(**defaults | settings),
        _tokenizer("<image>", "<video>"),
        BaseVideoProcessor(),
        num_image_tokens=(shown // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{most}",
    )


def _idefics_parts(kind: Any, shown: int, settings: dict[str, Any]) -> tuple[Any, Any]:
    defaults = {"size": {"longest_edge": 2 * shown}, "max_image_size": {"longest_edge": shown}}
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    return kind(**defaults | settings), _tokenizer(*marks, *places, "<video>")


def idefics3(shown: int = SHOWN, **settings: Any) -> Any:
    """Idefics 3's: stretched to whole tiles, an overview behind them."""
    parts = _idefics_parts(tf.Idefics3ImageProcessorPil, shown, settings)
    return tf.Idefics3Processor(*parts, image_seq_len=(shown // PATCH // 2) ** 2)


def smolvlm(shown: int = SHOWN, **settings: Any) -> Any:
    """SmolVLM's: the same."""
    smolvlm: Any = processing_smolvlm
    smolvlm.num2words = str  # for videos alone, but asked for at once
    parts = _idefics_parts(tf.SmolVLMImageProcessorPil, shown, settings)
    tokens = (shown // PATCH // 2) ** 2
    return tf.SmolVLMProcessor(*parts, BaseVideoProcessor(), image_seq_len=tokens)


def internvl(shown: int = SHOWN, **settings: Any) -> Any:
    """InternVL's: stretched to the tiles that distort least, an overview behind them."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    defaults = {"size": {"height": shown, "width": shown}, "max_patches": 6}
    return tf.InternVLProcessor(
        tf.GotOcr2ImageProcessorPil(**defaults | settings),
        _tokenizer(**named),
        BaseVideoProcessor(),
        image_seq_length=(shown // PATCH // 2) ** 2,
    )


def mllama(**settings: Any) -> Any:
    """Mllama's: padded to whole tiles, beside the prompt."""
    return tf.MllamaProcessor(
        tf.MllamaImageProcessorPil(**{"size": {"height": SHOWN, "width": SHOWN}} | settings),
        _tokenizer("<|image|>", "<|python_tag|>"),
    )


def noisy(size, seed=0):
    """A picture without flat regions."""
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(90, 130, (height, width, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def encoded(
    processor: Any,
    rows: list[list[Image.Image]],
    text: str = "",
    *,
    flat: bool = False,
    **options: Any,
) -> Any:
    """Prompts with the same text, each with its own pictures in front: what the model takes.

    Args:
        flat: Hand all pictures over in one list, which means something else to LLaVA-OneVision.
    """
    mark = getattr(processor, "image_token", "<image>")
    texts = ["\n".join([mark] * len(rows[0])) + text] * len(rows)
    with warnings.catch_warnings():
        # PaliGemma's processor makes arrays of tensors in a way that numpy is to give up.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        images: Any = [picture for row in rows for picture in row] if flat else rows
        return processor(images=images, text=texts, return_tensors="pt", **options)


PROCESSORS = {
    "llava": llava,
    "qwen2-vl": qwen2,
    "qwen2.5-vl": qwen2_5,
    "qwen3-vl": qwen3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "mllama": mllama,
}
