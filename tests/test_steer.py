"""steer(): a steered generation is what the whole prompt, recomputed at every step, would give."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import families
import pytest
import torch
import torch._dynamo
from families import FAMILIES, VOCAB, eager_reference
from torch import Tensor
from toy_models import llama as toy_llama
from toy_tokenizers import byte_level, chat, sentencepiece, unigram
from transformers import DynamicCache, TextIteratorStreamer

from atman_triton import ImageControl, TextControl, TokenControl, UnsupportedModelError, steer
from atman_triton.integration import manipulate

MODES = ("multiplicative", "min_shift", "log_additive")
ROWS, COLUMNS, NEW = 4, 12, 6
PADDING = (0, 3, 1, 5)  # on the left of each row
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": VOCAB + 1, "pad_token_id": 0}
SEEDS = {"gemma2": 41}  # its tied embeddings repeat the last token of most prompts
STRONG = {"multiplicative": (0.0, 6.0), "min_shift": (0.0, 6.0), "log_additive": (0.0, 90.0)}


@cache
def _model(name: str) -> Any:
    return FAMILIES[name].build("sdpa" if name in ("llama", "mistral") else None)


def _prompts(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, COLUMNS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : PADDING[row]] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _controls(mode: str = "min_shift") -> list[list[TokenControl]]:
    """Other controls for every row, all near the end, where windows reach."""
    low, high = STRONG[mode]
    tokens = (
        {11: low, 10: high, 9: low},
        {7: low, 6: high, 5: low},
        {10: low, 9: low, 8: high, 7: low},
        {6: low, 5: high, 4: high, 3: low},
    )
    return [[TokenControl(pos, factor) for pos, factor in row.items()] for row in tokens]


def _matrix_row(mode: str = "min_shift") -> Tensor:
    """The factors of ``_controls``, written down by column."""
    low, high = STRONG[mode]
    factor = torch.ones(ROWS, COLUMNS)
    factor[0, 9:] = torch.tensor([low, high, low])
    factor[1, 8:11] = torch.tensor([low, high, low])
    factor[2, 8:] = torch.tensor([low, high, low, low])
    factor[3, 8:] = torch.tensor([low, high, high, low])
    return factor


def _longer(factor: Tensor, tokens: int, rows: int) -> Tensor:
    """Factors of a longer text and of several rows for each prompt."""
    ones = torch.ones(len(factor), tokens - factor.shape[1])
    return torch.cat([factor, ones], 1).repeat_interleave(rows // len(factor), 0)


@torch.no_grad()
def _loop(name: str, prompts: dict[str, Tensor], factor: Tensor | None, mode: str) -> Tensor:
    """Greedy tokens; every step is one eager pass over the whole text with the modifier matrix."""
    model = _model(name)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for _ in range(NEW):
        longer = None if factor is None else _longer(factor, ids.shape[1], len(ids))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with eager_reference(FAMILIES[name], model, longer, mode):
            output = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@contextmanager
def _recomputed(name: str, factor: Tensor, mode: str) -> Iterator[None]:
    """``generate`` with ``use_cache=False`` runs eagerly with the modifier matrix."""
    model = _model(name)

    def lengthen(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["input_ids"].shape
        families._MODIFIER["factor"] = _longer(factor, tokens, rows)

    handle = model.register_forward_pre_hook(lengthen, with_kwargs=True)
    try:
        with eager_reference(FAMILIES[name], model, factor, mode):
            yield
    finally:
        handle.remove()


# --- what is generated --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
def test_greedy_tokens_are_those_of_the_loop(name: str) -> None:
    """In all modes, in a batch with left padding and other controls in every row."""
    prompts, model = _prompts(seed=SEEDS.get(name, 0)), _model(name)
    plain = _loop(name, prompts, None, "min_shift")
    with steer(model, [], inputs=prompts):
        assert torch.equal(model.generate(**prompts, **GREEDY), plain)
    changed = []
    for mode in MODES:
        with steer(model, _controls(mode), inputs=prompts, mode=mode) as factors:
            steered = model.generate(**prompts, **GREEDY)
        assert torch.equal(factors, _matrix_row(mode))
        assert torch.equal(steered, _loop(name, prompts, _matrix_row(mode), mode))
        changed += (steered != plain).any(1).tolist()
    print(f"{name}: steering changed {sum(changed)} of {len(changed)} texts")
    assert sum(changed) >= 0.9 * len(changed)


@pytest.mark.parametrize("cache_kind", ["static", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_caches(name: str, cache_kind: str) -> None:
    prompts, model = _prompts(), _model(name)
    options = {"use_cache": False} if cache_kind == "none" else {"cache_implementation": "static"}
    with steer(model, _controls(), inputs=prompts):
        steered = model.generate(**prompts, **GREEDY, **options)
    assert torch.equal(steered, _loop(name, prompts, _matrix_row(), "min_shift"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 3.0},
        {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 3.0, "num_beams": 2},
    ],
    ids=["beams", "samples", "several samples", "sampled beams"],
)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beams_and_samples(name: str, options: dict[str, Any]) -> None:
    prompts, model = _prompts(), _model(name)
    options = GREEDY | options
    torch.manual_seed(3)
    with _recomputed(name, _matrix_row(), "min_shift"):
        expected = model.generate(**prompts, **options, use_cache=False)
    torch.manual_seed(3)
    with steer(model, _controls(), inputs=prompts):
        steered = model.generate(**prompts, **options)
    assert torch.equal(steered, expected)
    torch.manual_seed(3)
    plain = model.generate(**prompts, **options)
    assert (steered != plain).any(1).float().mean() >= 0.9


@pytest.mark.parametrize("way", ["another model", "the prompt's own words"])
def test_assisted_decoding_gives_the_same_tokens(way: str) -> None:
    """The assistant is not steered; the model, which is, has the last word on every token."""
    model = _model("llama")
    prompts = {name: rows[:1] for name, rows in _prompts().items()}
    if way == "another model":
        options: dict[str, Any] = {"assistant_model": _model("gpt2")}
    else:
        options = {"prompt_lookup_num_tokens": 3}
    for control in _controls()[0], [TokenControl(3, 6.0)], []:
        with steer(model, control, inputs=prompts):
            expected = model.generate(**prompts, **GREEDY)
            assert torch.equal(model.generate(**prompts, **GREEDY, **options), expected)


def test_an_early_exit_is_refused_and_undone() -> None:
    model, prompts = _model("llama"), _prompts(1)
    with (
        pytest.raises(ValueError, match="on some of its layers, as assistant_early_exit does"),
        steer(model, [], inputs=prompts),
    ):
        model.generate(**prompts, **GREEDY, assistant_early_exit=1)
    assert model.config.num_hidden_layers == families.LAYERS


def test_a_stream_is_steered_in_the_thread_of_the_context() -> None:
    model: Any = toy_llama()
    tokenizer = byte_level()
    prompts = tokenizer("The pay per hour is 23 euros.", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 8, "do_sample": False}

    def run() -> None:
        with steer(model, [TextControl(20, 2, 9.0)], inputs=prompts):
            model.generate(**prompts, **options, streamer=streamer)

    thread = threading.Thread(target=run)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    with steer(model, [TextControl(20, 2, 9.0)], inputs=prompts):
        steered = model.generate(**prompts, **options)[0, prompts["input_ids"].shape[1] :]
    plain = model.generate(**prompts, **options)[0, prompts["input_ids"].shape[1] :]
    assert streamed == tokenizer.decode(steered)
    assert streamed != tokenizer.decode(plain)


def test_compiled_models() -> None:
    model, prompts = _model("llama"), _prompts()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        plain = compiled(**prompts, use_cache=False).logits
        with steer(model, _controls(), inputs=prompts):
            expected = model(**prompts, use_cache=False).logits
        with steer(compiled, _controls(), inputs=prompts):
            steered = compiled(**prompts, use_cache=False).logits
        again = compiled(**prompts, use_cache=False).logits
    torch._dynamo.reset()
    assert (steered - expected).abs().max() < 1e-9
    assert (steered - plain).abs().max() > 0.1
    assert torch.equal(again, plain)


def test_layers_and_heads() -> None:
    model, prompts = _model("llama"), _prompts()

    def logits(context: Any) -> Tensor:
        with context, torch.no_grad():
            return model(**prompts).logits

    factor, everywhere = _matrix_row(), {"inputs": prompts, "mode": "min_shift"}
    whole = logits(steer(model, _controls(), **everywhere))
    for where in ({"layers": [1]}, {"heads": [0, 3]}):
        part = logits(steer(model, _controls(), **everywhere, **where))
        assert torch.equal(part, logits(manipulate(model, factor, "min_shift", **where)))
        assert not torch.equal(part, whole)


def test_steering_in_steering_multiplies() -> None:
    model, prompts = _model("llama"), _prompts()
    twice = [TokenControl(3, 0.5), TokenControl(3, 0.5), TokenControl(4, 3.0)]
    with steer(model, twice, inputs=prompts), torch.no_grad():
        expected = model(**prompts).logits
    with (
        steer(model, twice[:1], inputs=prompts),
        steer(model, twice[1:], inputs=prompts),
        torch.no_grad(),
    ):
        assert (model(**prompts).logits - expected).abs().max() < 1e-9
    assert "init_continuous_batching" not in vars(model)
    assert not model.get_decoder()._forward_pre_hooks


# --- what inputs are ----------------------------------------------------------------------------

TEXTS = ["The pay per hour is 23 euros.", "Hello world, hello there.", "A: 23"]


def _factors(controls: Any, inputs: Any, tokenizer: Any = None) -> Tensor:
    model = toy_llama()
    with steer(model, controls, inputs=inputs, tokenizer=tokenizer) as factors:
        ids = inputs
        if isinstance(inputs, (str, list)):
            several = isinstance(inputs, list)
            ids = tokenizer(inputs, padding=several, return_tensors="pt")
        ids = torch.as_tensor(ids["input_ids"])
        model(ids[None] if ids.dim() == 1 else ids)
    return factors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_characters_are_found_in_padded_batches(make: Any, side: str) -> None:
    tokenizer = make()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    encoding = tokenizer(TEXTS, padding=True, return_tensors="pt")
    controls = [
        [TextControl(TEXTS[0].index("23"), 2, 0.5, "complete")],
        [TextControl(0, 5, 3.0, "complete"), TokenControl(0, 2.0)],
        [],
    ]
    factors = _factors(controls, encoding)
    assert factors.shape == encoding["input_ids"].shape
    for row, text in enumerate(TEXTS):
        offsets, shown = encoding.encodings[row].offsets, encoding["attention_mask"][row]
        marks = encoding.encodings[row].special_tokens_mask
        named = ["" if mark else text[slice(*o)] for o, mark in zip(offsets, marks, strict=True)]
        for column, (own, factor) in enumerate(zip(named, factors[row].tolist(), strict=True)):
            expected = 1.0
            if row == 0 and own.strip() in ("23", "2", "3"):
                expected = 0.5
            if row == 1 and shown[column]:
                expected = 3.0 if own and offsets[column][0] < 5 else 1.0
                expected *= 2.0 if column == int(shown.nonzero()[0]) else 1.0
            assert factor == expected, (row, own)
    assert torch.equal(factors, _factors(controls, TEXTS, tokenizer))
    # One list for all rows, each with its own text.
    together = _factors([TextControl(0, 2, 0.0)], encoding)
    alone = [_factors([TextControl(0, 2, 0.0)], text, tokenizer)[0] for text in TEXTS]
    for row, mask in zip(together, encoding["attention_mask"], strict=True):
        assert torch.equal(row[mask.bool()], alone.pop(0))


def test_chat_encodings_know_their_text() -> None:
    tokenizer = chat()
    messages = [{"role": "user", "content": "The pay is 23 euros."}]
    encoding = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    factors = _factors([TextControl(rendered.index("pay"), 3, 0.0, "complete")], encoding)
    hit = [tokenizer.decode(encoding["input_ids"][0, c]) for c in (factors[0] == 0).nonzero()[:, 0]]
    assert "".join(hit).strip() == "pay"


def test_similarity_reads_the_models_embeddings() -> None:
    model: Any = toy_llama()
    ids = torch.tensor([[7, 5, 9, 7, 8], [0, 7, 7, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[9] = 0.5 * table[7] + 1e-3
    with steer(model, [TokenControl(0, 0.5, similarity=0.95)], inputs=inputs) as factors:
        model(**inputs)
    assert factors[0].tolist() == pytest.approx([0.5, 1, 0.5, 0.5, 1], abs=1e-3)
    assert factors[1].tolist() == [1, 0.5, 0.5, 1, 1]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("text", ValueError, "inputs as text need a tokenizer"),
        ({"pixel_values": 1}, ValueError, r"must hold input_ids, got \['pixel_values'\]"),
        ([[1, 2], [3]], ValueError, "pad the rows to one length"),
        ([[0.5, 1.0]], TypeError, "input_ids must be integers, got torch.float32"),
        (torch.ones(1, 2, 3, dtype=torch.long), ValueError, r"shape \[batch, tokens\], got"),
        (torch.ones(0, 3, dtype=torch.long), ValueError, r"shape \[batch, tokens\], got"),
        ([[1, 2, 600]], ValueError, r"must lie within 0..511, .* got 1..600"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            ValueError,
            r"attention_mask must have the shape of input_ids, \[1, 2\], got \[1, 1\]",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
            ValueError,
            "attention_mask hides every token of row 0",
        ),
        (["text", 3], TypeError, r"inputs\[1\] must be a str"),
        (["text", ""], ValueError, r"inputs\[1\] must not be empty"),
    ],
)
def test_inputs_that_are_none(inputs: Any, error: Any, message: str) -> None:
    with (
        pytest.raises(error, match=message),
        steer(toy_llama(), [TokenControl(0, 2.0)], inputs=inputs),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "add"}, ValueError, "mode must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"layers": [9]}, ValueError, "layers must be among"),
        ({"controls": TokenControl(0, 2.0)}, TypeError, "put the one into a list"),
        ({"controls": [[], [], []]}, ValueError, "one sequence for each of the 2 prompts"),
        (
            {"controls": [[], [TokenControl(2, 2.0)]]},
            ValueError,
            r"prompt 1: TokenControl\(pos=2, .* outside the prompt; pos must be at most 1",
        ),
        ({"controls": [TextControl(0, 1, 2.0)]}, ValueError, "ids without their text; pass the"),
        ({"controls": [ImageControl(0, 0, 1, 1, 2.0)]}, ValueError, "needs an image"),
    ],
)
def test_controls_and_settings_that_cannot_be(arguments: Any, error: Any, message: str) -> None:
    inputs = {"input_ids": [[1, 2, 3], [0, 2, 3]], "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    given = {"controls": [TokenControl(0, 2.0)], "inputs": inputs} | arguments
    with pytest.raises(error, match=message), steer(toy_llama(), **given):
        pass


def test_text_whose_places_are_not_known() -> None:
    tokenizer, control = byte_level(), [TextControl(0, 2, 0.5)]
    changed = tokenizer(TEXTS[0], return_tensors="pt")
    changed["input_ids"] = changed["input_ids"][:, 1:]
    changed.pop("attention_mask")
    pair = tokenizer("one", "two", return_tensors="pt")
    for inputs, message in (
        (changed, "input_ids are not those that the tokenizer made"),
        (pair, "pairs of texts"),
        (dict(tokenizer(TEXTS[0], return_tensors="pt")), "token ids without their text"),
    ):
        with pytest.raises(ValueError, match=message), steer(toy_llama(), control, inputs=inputs):
            pass


def test_a_model_that_runs_on_something_else() -> None:
    model, prompts = _model("llama"), _prompts(2)
    ids = prompts["input_ids"]
    other = ids.clone()
    other[1, 7] += 1
    message = r"row 1 has token \d+ in column 7, where the controls expect \d+"
    with pytest.raises(ValueError, match=message), steer(model, [], inputs=prompts):
        model.generate(other, **GREEDY)
    with pytest.raises(ValueError, match="2 prompts, but the model runs on 1 rows"):  # noqa: SIM117
        with steer(model, [], inputs=prompts):
            model.generate(ids[:1], **GREEDY)
    # A shorter prompt, whose new tokens would get the factors of the longer one's.
    with pytest.raises(ValueError, match=r"in column \d+, where"), steer(model, [], inputs=prompts):
        model.generate(ids[:, :5], **GREEDY)
    # Guidance runs the last token alone, in the first one's column.
    with pytest.raises(ValueError, match="in column 0, where"), steer(model, [], inputs=ids[:1]):
        model.generate(ids[:1], **GREEDY, guidance_scale=2.0)
    # A cache of the prompt may be continued.
    cache_ = DynamicCache(config=model.config)
    with steer(model, _controls()[0], inputs=ids[:1]), torch.no_grad():
        whole = model(ids[:1]).logits
        model(ids[:1, :4], past_key_values=cache_)
        assert (model(ids[:1, 4:], past_key_values=cache_).logits - whole[:, 4:]).abs().max() < 1e-9
        cache_ = DynamicCache(config=model.config)
        model(ids[:1, :4], past_key_values=cache_)
        with pytest.raises(ValueError, match="in column 4, where"):
            model(ids[:1, 6:], past_key_values=cache_)


def test_continuous_batching_is_refused_by_name() -> None:
    model, prompts = _model("llama"), _prompts(1)
    with (
        pytest.raises(ValueError, match="does not reach continuous batching"),
        steer(model, [], inputs=prompts),
    ):
        model.generate_batch(inputs=prompts["input_ids"].tolist())
    assert "init_continuous_batching" not in vars(model)


def test_a_context_that_no_pass_used_says_so() -> None:
    model, prompts = _model("llama"), _prompts(1)
    thread = threading.Thread(target=lambda: model.generate(**prompts, **GREEDY))
    context = steer(model, [], inputs=prompts)
    context.__enter__()
    thread.start()
    thread.join()
    with pytest.raises(UnsupportedModelError, match="no forward pass of this model ran in this"):
        context.__exit__(None, None, None)
