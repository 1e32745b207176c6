"""Loading a model for the command line, with every failure said in one line.

Libraries are imported where they are needed, so that ``atman --help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "*.tiktoken")


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


def load_model(name: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer, on a device; the shipped ones without a name.

    Raises: BadUsage or Failed: saying why it cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    model: Any  # transformers' stubs do not know that a model moves to a device by name
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name is None:
        from .demo import load_demo_model

        try:
            model, tokenizer = load_demo_model()
        except (OSError, ValueError) as error:
            raise Failed(f"the shipped model cannot be loaded: {first_line(error)}") from error
        if dtype != "auto":
            model.to(getattr(torch, dtype))
        return model.to(device), tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise BadUsage(f"--model: the folder {name} does not exist.")
    source = str(folder) if folder.is_dir() else name
    cut_off = None if folder.is_dir() else _unreachable_hub()
    local: dict[str, Any] = {"local_files_only": cut_off is not None}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **local)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if folder.is_dir():
            why = _lacking(folder) or first_line(error)
        elif cut_off is not None and isinstance(error, OSError):
            why = f"{cut_off} cannot be reached and the model is not in the cache."
        else:
            why = first_line(error)
        raise Failed(
            f"--model {name} cannot be loaded as a causal language model: {why}"
        ) from error
    return model.eval().to(device), tokenizer


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


def _lacking(folder: Path) -> str | None:
    """What a model folder that could not be loaded lacks, if it is as plain as that."""
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json."
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return f"{folder} has no tokenizer files."
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without the rest of its report."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
