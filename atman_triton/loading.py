"""Loading a model for the command line, with every failure said in one line.

Libraries are imported where they are needed, so that ``atman --help`` is quick.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "*.tiktoken")
DEMOS = ("contract", "shapes")
"""What is shipped: a reader of contracts, and one that names shapes in pictures."""

_LIBRARY = re.compile(r"requires the (\w+) library")


class BadUsage(Exception):
    """The command was called wrongly: exit code 2."""


class Failed(Exception):
    """The run failed: exit code 1."""


def pick_device(name: str) -> str:
    """The device to run on, checked to be there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise BadUsage(f"--device must be auto, cpu, cuda, cuda:1 or mps, got {name!r}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices were found" if count else "no CUDA device was found"
            raise BadUsage(f"--device {name}: {found}; try --device cpu.")
    elif device.index:
        raise BadUsage(f"--device {name}: there is one {device.type} device, {device.type}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadUsage(f"--device {name}: no MPS device was found; try --device cpu.")
    return name


def load_model(
    name: str | None, device: str, dtype: str, demo: str = "contract"
) -> tuple[Any, Any]:
    """A model and its tokenizer or processor, on a device; shipped ones without a name.

    Args:
        demo: Which of the shipped ones, see ``DEMOS``.
    Raises: BadUsage or Failed: saying why it cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    model: Any  # transformers' stubs do not know that a model moves to a device by name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        try:
            model, reader = _shipped(demo)
        except (OSError, ValueError) as error:
            raise Failed(f"the shipped model cannot be loaded: {first_line(error)}") from error
        if dtype != "auto":
            model.to(getattr(torch, dtype))
        return model.to(device), reader
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise BadUsage(f"--model: the folder {name} does not exist.")
    source = str(folder) if folder.is_dir() else name
    cut_off = None if folder.is_dir() else _unreachable_hub()
    local: dict[str, Any] = {"local_files_only": cut_off is not None}
    try:
        kind = _class_of(source, local)
        _check_complete(folder, modalities(kind))
        reader = _reader_of(kind).from_pretrained(source, **local)
        model = kind.from_pretrained(source, dtype=dtype, **local)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        if folder.is_dir() and not (folder / "config.json").is_file():
            why = f"{folder} has no config.json."
        elif cut_off is not None and isinstance(error, OSError):
            why = f"{cut_off} cannot be reached and the model is not in the cache."
        else:
            why = _lacking_library(error) or first_line(error)
        raise Failed(f"--model {name} cannot be loaded: {why}") from error
    return model.eval().to(device), reader


def modalities(model: Any) -> tuple[str, ...]:
    """What a model reads: ``text``, ``image``, ``audio``."""
    found = getattr(model, "input_modalities", "text")
    return (found,) if isinstance(found, str) else tuple(found)


def check_decoder(what: str, model: Any) -> None:
    """Refuse, for what follows an answer token by token, all but a decoder alone."""
    name = type(model).__name__
    if not model.can_generate():
        raise BadUsage(f"{what}: {name} writes no answer; take a model that does.")
    if getattr(model.config, "is_encoder_decoder", False) or name.startswith("Blip"):
        raise BadUsage(f"{what}: {name} has an encoder and a decoder; take a decoder alone.")


def _shipped(demo: str) -> tuple[Any, Any]:
    if demo == "shapes":
        from .demo.shapes import load_shapes_model

        return load_shapes_model()
    from .demo import load_demo_model

    return load_demo_model()


def _class_of(source: str, local: dict[str, Any]) -> Any:
    """The class that a model's configuration names, if that predicts anything.

    Of a bare stack of layers, and of what transformers does not have, the causal language model.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(source, **local)
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is not None and ("For" in name or kind.can_generate()):
        return kind
    if kind is not None and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"its config.json names {name}, which neither generates nor classifies; take a model "
            "with a head, such as a ...ForConditionalGeneration or a ...ForImageClassification."
        )
    return transformers.AutoModelForCausalLM


def _reader_of(kind: Any) -> Any:
    """What loads that which prepares prompts for a class of models."""
    import transformers

    if modalities(kind) == ("text",):
        return transformers.AutoTokenizer
    return transformers.AutoProcessor


def _unreachable_hub() -> str | None:
    """The hub's address if it does not answer, asked once: libraries try for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, logging

    logging.set_verbosity_error()
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # noqa: BLE001 - which ones depends on the release and its HTTP library
        return constants.ENDPOINT
    return None


def _check_complete(folder: Path, read: tuple[str, ...]) -> None:
    """Refuse a folder without what prepares prompts, which transformers may make up instead."""
    if not folder.is_dir():
        return
    if "text" in read and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer files.")
    if read != ("text",) and not any(folder.glob("*processor_config.json")):
        raise ValueError(f"{folder} has no preprocessor_config.json, nor a processor_config.json.")


def _lacking_library(error: Exception) -> str | None:
    """Which library a model's processor needs, where it says so over several lines."""
    found = _LIBRARY.search(str(error)) if isinstance(error, ImportError) else None
    if found is None:
        return None
    library = found[1].lower()
    return f"what prepares its prompts needs {library}; install it: pip install {library}"


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of its report."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
