"""The command line loads models of every kind, and says what a folder lacks."""

import json
import sys
from pathlib import Path

import pytest
import toy_images
import transformers as tf
from test_cli import check, run  # noqa: F401 - a fixture
from toy_tokenizers import byte_level, wordpiece
from transformers.utils import logging

from atman_triton.loading import load_model, modalities

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import small_models  # pyright: ignore[reportMissingImports]

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SIZE = {"size": {"height": 12, "width": 12}}


def seeing(name):
    model, processor = toy_images.seeing(name)
    return model.float(), processor


def of(kind, config, reader, **settings):
    return getattr(tf, kind)(getattr(tf, config)(**TINY, **settings)), reader()


MAKERS = {
    "LlamaForCausalLM": lambda: of("LlamaForCausalLM", "LlamaConfig", byte_level, vocab_size=400),
    "BertForSequenceClassification": lambda: of(
        "BertForSequenceClassification", "BertConfig", wordpiece, vocab_size=200
    ),
    "BertForTokenClassification": lambda: of(
        "BertForTokenClassification", "BertConfig", wordpiece, vocab_size=200
    ),
    "BertModel": lambda: of("BertModel", "BertConfig", wordpiece, vocab_size=200),
    "ViTForImageClassification": lambda: of(
        *("ViTForImageClassification", "ViTConfig", lambda: tf.ViTImageProcessorPil(**SIZE)),
        image_size=12,
        patch_size=4,
    ),
    "ViTModel": lambda: of(
        *("ViTModel", "ViTConfig", lambda: tf.ViTImageProcessorPil(**SIZE)),
        image_size=12,
        patch_size=4,
    ),
    "T5ForConditionalGeneration": small_models.t5,
    "WhisperForConditionalGeneration": small_models.whisper,
    "BlipForQuestionAnswering": small_models.blip_vqa,
    "LlavaForConditionalGeneration": lambda: seeing("llava"),
    "Gemma3ForConditionalGeneration": lambda: seeing("gemma3"),
    "Qwen2_5_VLForConditionalGeneration": lambda: seeing("qwen2.5-vl"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a kind of model once; returns its folder."""
    logging.disable_progress_bar()
    folders = {}

    def saved(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            for part in MAKERS[name]():
                part.save_pretrained(folders[name])
        return folders[name]

    return saved


@pytest.mark.parametrize(
    ("name", "reader", "read"),
    [
        ("LlamaForCausalLM", "TokenizersBackend", ("text",)),
        ("BertForSequenceClassification", "TokenizersBackend", ("text",)),
        ("BertForTokenClassification", "TokenizersBackend", ("text",)),
        ("ViTForImageClassification", "ViTImageProcessorPil", ("image",)),
        ("T5ForConditionalGeneration", "TokenizersBackend", ("text",)),
        ("WhisperForConditionalGeneration", "WhisperProcessor", ("audio", "text")),
        ("BlipForQuestionAnswering", "BlipProcessor", ("image", "text")),
        ("LlavaForConditionalGeneration", "LlavaProcessor", ("image", "text")),
        ("Gemma3ForConditionalGeneration", "Gemma3Processor", ("image", "text")),
    ],
)
def test_a_model_is_loaded_as_its_configuration_says(saved, name, reader, read):
    model, processor = load_model(str(saved(name)), "cpu", "auto")
    assert (type(model).__name__, type(processor).__name__) == (name, reader)
    assert modalities(model) == read
    assert not model.training


def test_a_bare_stack_becomes_a_language_model_where_there_is_one(run, saved, tmp_path):  # noqa: F811
    model, _ = load_model(str(saved("BertModel")), "cpu", "auto")
    assert type(model).__name__ == "BertLMHeadModel"
    result = run("explain", "x", "--model", saved("ViTModel"))
    check(result, 1, "its config.json names ViTModel, which neither generates nor classifies; take")
    config = json.loads((saved("LlamaForCausalLM") / "config.json").read_text())
    for file in saved("LlamaForCausalLM").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Of_my_own"]}))
    model, _ = load_model(str(tmp_path), "cpu", "auto")
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("BertForSequenceClassification", "token", "has no tokenizer files."),
        ("LlavaForConditionalGeneration", "token", "has no tokenizer files."),
        ("LlavaForConditionalGeneration", "processor", "has no preprocessor_config.json, nor a"),
        ("ViTForImageClassification", "preprocessor", "has no preprocessor_config.json, nor a"),
    ],
)
def test_what_prepares_prompts_is_not_made_up(run, saved, tmp_path, name, missing, message):  # noqa: F811
    for file in saved(name).iterdir():
        if not file.name.startswith(missing):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    check(run("explain", "x", "--model", tmp_path), 1, message)


def test_a_library_that_a_processor_needs_is_named(run, saved, monkeypatch):  # noqa: F811
    folder = saved("Qwen2_5_VLForConditionalGeneration")
    lines = "\nBaseVideoProcessor requires the Torchvision library but it was not found in your\nx"

    def fail(*_, **__):
        raise ImportError(lines)

    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", fail)
    message = "prepares its prompts needs torchvision; install it: pip install torchvision"
    check(run("explain", "x", "--model", folder), 1, message)
