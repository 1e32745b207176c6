"""Small models and rows of text to train them on, and a run of transformers' Trainer.

Legend: B rows of a batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import atman_triton  # noqa: F401 (registers "atman" with transformers)
from atman_triton.demo import load_demo_model, make_document, prompt

WRONG_GRADIENT = "sdpa_wrong_gradient"
"""An attention implementation whose gradient of the queries is 0.1% too large."""

_BATCH = 8
_IGNORED = -100  # label of a token that is not trained on
_MASKED = 0.15  # share of the tokens that BERT has to guess
_WINDOW = 16
_INITIAL = 0.15  # spread of random weights: attention matters from the start
# The name since transformers 5.23, and the one before.
_CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)

Row = dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, and what it is trained on.

    Attributes:
        name: what tables and pictures call it.
        build: an untrained model, always the same one, for a dropout of the residual stream and
            embeddings, and one of the attention.
        rows: as many rows of ``input_ids`` and ``labels`` as asked for.
        learning_rate: the first one, which falls to zero over the run.
    """

    name: str
    build: Callable[[float, float], nn.Module]
    rows: Callable[[int], list[Row]]
    learning_rate: float


class _Recorder(Trainer):
    """transformers' Trainer, which keeps the loss of every step as it is."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[float] = []

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.losses.append(loss.item())
        return loss


def train(
    task: Task,
    implementation: str,
    *,
    steps: int = 50,
    seed: int = 0,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    checkpointing: bool = False,
    device: str = "cpu",
) -> list[float]:
    """Train a task's model, from the same weights and on the same batches every time.

    Args:
        implementation: what computes attention, as ``set_attn_implementation`` takes it.
        seed: of the dropout, and of nothing else.
        checkpointing: recompute each layer in the backward pass.
        device: ``"cpu"``, or ``"cuda"`` for the GPU that the Trainer finds.
    Returns: the loss of each step before its update, float32, nats per token.
    """
    model: Any = task.build(dropout, attention_dropout)
    model.set_attn_implementation(implementation)
    model.config.use_cache = False
    checkpoints: dict[str, Any] = {}
    if checkpointing:
        checkpoints = {_CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    with tempfile.TemporaryDirectory() as folder:
        recorder = _Recorder(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=_BATCH,
                learning_rate=task.learning_rate,
                seed=seed,
                data_seed=0,
                use_cpu=device == "cpu",
                dataloader_pin_memory=False,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                **checkpoints,
            ),
            train_dataset=task.rows(steps * _BATCH),  # pyright: ignore[reportArgumentType]
            data_collator=_pad,
        )
        recorder.remove_callback(PrinterCallback)  # a line about the run's speed
        recorder.train()
    return recorder.losses


def _pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch ``[B, T]`` of rows, padded on the right to the longest."""

    def filled(lists: Sequence[list[int]], value: int) -> Tensor:
        longest = max(map(len, lists))
        return torch.tensor([one + [value] * (longest - len(one)) for one in lists])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], _IGNORED),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
    }


# --- text ---------------------------------------------------------------------------------------


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return load_demo_model()[1]


@cache
def _contract(number: int) -> tuple[int, ...]:
    """A generated contract with one of its questions and its answer."""
    rng = random.Random(f"training-{number}")
    document = make_document(rng, "contract")
    question = rng.choice(document.questions)
    return tuple(_tokenizer()(prompt(document, question) + question.answer)["input_ids"])


def _causal_rows(tokens: int | None, count: int) -> list[Row]:
    """Contracts, whole or their first tokens, of which every token is to be predicted."""
    texts = [list(_contract(number)[:tokens]) for number in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def _masked_rows(tokens: int, count: int) -> list[Row]:
    """The ends of contracts, of unlike lengths, with tokens to guess."""
    mask, rng, rows = len(_tokenizer()), random.Random("masked"), []
    for number in range(count):
        text = list(_contract(number)[-rng.randint(tokens // 3, tokens) :])
        chosen = set(rng.sample(range(len(text)), max(1, round(_MASKED * len(text)))))
        shown = [mask if place in chosen else token for place, token in enumerate(text)]
        labels = [token if place in chosen else _IGNORED for place, token in enumerate(text)]
        rows.append({"input_ids": shown, "labels": labels})
    return rows


# --- models -------------------------------------------------------------------------------------


def _reader(dropout: float, attention_dropout: float) -> nn.Module:
    if dropout:
        raise ValueError(f"dropout must be 0 in a Llama, which has none of its own, got {dropout}.")
    model = load_demo_model()[0]
    model.config.attention_dropout = attention_dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = attention_dropout  # pyright: ignore
    return model


def _gpt2(width: int, tokens: int, dropout: float, attention_dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(_tokenizer()),
        n_positions=tokens,
        n_embd=width,
        initializer_range=_INITIAL,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # which transformers takes anyway, but with a warning
    return model


def _bert(width: int, tokens: int, dropout: float, attention_dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(_tokenizer()) + 1,  # the mask
        max_position_embeddings=tokens,
        hidden_size=width,
        initializer_range=_INITIAL,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=attention_dropout,
    )
    return BertForMaskedLM(config)


def _mistral(width: int, tokens: int, dropout: float, attention_dropout: float) -> nn.Module:
    if dropout:
        raise ValueError(f"dropout must be 0 in a Mistral, which has no other, got {dropout}.")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(_tokenizer()),
        max_position_embeddings=tokens,
        hidden_size=width,
        initializer_range=_INITIAL,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=_WINDOW,
        attention_dropout=attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MistralForCausalLM(config)


def make_tasks(*, width: int = 64, tokens: int = 96) -> dict[str, Task]:
    """The four tasks, by name.

    Args:
        width: hidden size of the models that start from random weights.
        tokens: most tokens of their rows; the shipped reader gets whole contracts at 96 and more.
    """

    def sized(build: Callable[..., nn.Module]) -> Callable[[float, float], nn.Module]:
        return lambda dropout, attention_dropout: build(width, tokens, dropout, attention_dropout)

    whole = tokens if tokens < 96 else None
    tasks = (
        Task("reader", _reader, lambda count: _causal_rows(whole, count), 3e-4),
        Task("GPT-2", sized(_gpt2), lambda count: _causal_rows(tokens, count), 3e-3),
        Task("BERT", sized(_bert), lambda count: _masked_rows(tokens, count), 3e-3),
        Task("Mistral", sized(_mistral), lambda count: _causal_rows(tokens, count), 3e-3),
    )
    return {task.name: task for task in tasks}


# --- the control of the exact comparison --------------------------------------------------------


def _sdpa_wrong_gradient(
    module: nn.Module, query: Tensor, *arguments: Any, **keywords: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa" with the same output and 1.001 times the gradient of the queries."""
    more = 0.001 * query
    return sdpa_attention_forward(module, query + (more - more.detach()), *arguments, **keywords)


AttentionInterface.register(WRONG_GRADIENT, _sdpa_wrong_gradient)
AttentionMaskInterface.register(WRONG_GRADIENT, sdpa_mask)
