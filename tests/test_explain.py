"""The Explainer from a prompt to an Explanation: forms of input, generation, settings, refusals."""

import json
from typing import Any

import pytest
import torch
from toy_models import MODELS, VOCABULARY, WINDOW, llama, plain_loop
from toy_tokenizers import byte_level, chat, sentencepiece
from transformers import GenerationConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from atman_triton.explain import Explainer
from atman_triton.explanation import load
from atman_triton.integration import UnsupportedModelError
from atman_triton.testing import assert_close_to_oracle, count_launches

PROMPT = "Q: What is the pay per hour? A:"
TOKENIZER = sentencepiece()


def explainer(tokenizer=TOKENIZER, **changes):
    return Explainer(MODELS["llama"](), tokenizer, **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_scores_are_those_of_one_eager_forward_per_token(name, preset):
    model = MODELS[name]()
    mode = {"default": "min_shift", "paper": "multiplicative"}[preset]
    words = TOKENIZER(PROMPT).input_ids
    answer: Any = TOKENIZER.convert_tokens_to_ids(["▁23", "▁euros.", "▁The"])
    ids = words + answer[:-1]
    units = [(token,) for token in range(1, len(ids))]  # all but BOS
    eager = plain_loop(model, ids, answer, units, 0.1, mode)
    try:
        truth = plain_loop(model.double(), ids, answer, units, 0.1, mode)
    finally:
        model.float()

    explainer = Explainer(model, TOKENIZER, preset=preset, method="exact")
    e = explainer.explain(PROMPT, "23 euros. The")

    assert [unit.tokens for unit in e.units] == units
    assert [target.token_id for target in e.targets] == answer
    reaches = torch.tensor([[unit.tokens[0] < t.token for unit in e.units] for t in e.targets])
    assert torch.equal(e.suppressed_logprobs.isnan(), ~reaches)
    found = torch.cat([e.base_logprobs, e.suppressed_logprobs[reaches]])
    loops = [torch.cat([loop[0], loop[1:].T[reaches]]) for loop in (eager, truth)]
    assert_close_to_oracle(found, *loops, name="log-probabilities")
    losses = -truth  # a unit supports a target if the loss rises without it
    rise = (losses[1:] - losses[0]).T
    clear = rise.abs() > 0.01
    assert clear.any()
    assert torch.equal(e.scores[reaches & clear].sign(), rise[reaches & clear].sign().float())


def test_shapes_parts_and_text():
    e = explainer().explain(PROMPT, "23 euros. The", reduction="sum")
    assert e.text == PROMPT + " 23 euros. The"
    assert e.prompt_stop == len(PROMPT)
    assert e.scores.shape == (3, len(e.units))
    assert e.scores.dtype == e.base_logprobs.dtype == torch.float32
    assert [unit.text for unit in e.units if unit.part == "target"] == [" 23", " euros."]
    assert not e.scores.isinf().any()
    assert torch.equal(e.relevance, e.scores.double().nansum(0).float())
    assert [(piece.text, piece.reason) for piece in e.left_out] == [("<s>", "special token")]


def test_a_one_token_target():
    e = explainer().explain(PROMPT, " 23")
    assert len(e.targets) == 1
    assert {unit.part for unit in e.units} == {"prompt"}
    assert not e.scores.isnan().any()


def test_text_ids_and_encodings_agree():
    words = TOKENIZER(PROMPT).input_ids
    answer: Any = TOKENIZER.convert_tokens_to_ids(["▁23", "▁euros.", "▁The"])
    of_text = explainer().explain(PROMPT, "23 euros. The")
    for prompt, target in [
        (words, answer),
        (torch.tensor([words]), torch.tensor(answer)),
        (TOKENIZER(PROMPT, return_tensors="pt"), " 23 euros. The"),
        (TOKENIZER(PROMPT, return_tensors="pt"), "23 euros. The"),
        (words, "23 euros. The"),
    ]:
        e = explainer().explain(prompt, target)
        assert torch.equal(e.scores.nan_to_num(), of_text.scores.nan_to_num())
        assert [unit.tokens for unit in e.units] == [unit.tokens for unit in of_text.units]
        assert e.text == "<s> " + of_text.text
    bare = explainer(None).explain(words, answer)
    assert len(bare.units) == len(of_text.units) + 1  # without a tokenizer BOS is a unit like any
    torch.testing.assert_close(
        bare.scores[:, 1:], of_text.scores, rtol=0, atol=1e-5, equal_nan=True
    )


def test_the_border_between_prompt_and_target():
    for target, separator, text, used in [
        ("23", None, " 23", " "),
        (" 23", None, " 23", ""),
        ("23", "", "23", ""),
        ("23", "\n", "\n23", "\n"),
    ]:
        e = explainer().explain(PROMPT, target, separator=separator)
        assert e.text == PROMPT + text
        assert e.provenance["separator"] == used
    ids = explainer().explain(PROMPT, [5, 6])
    assert "separator" not in ids.provenance
    words = TOKENIZER(PROMPT).input_ids
    assert explainer().explain(words, "23").provenance["separator"] == " "
    assert explainer().explain([*words, 2], "23").provenance["separator"] == ""  # behind </s>


def test_chat_messages():
    messages = [{"role": "user", "content": "Hello world"}]
    e = explainer(chat()).explain(messages, "hi")
    assert "".join(u.text for u in e.units if u.part == "prompt") == "Hello world"
    assert e.text.endswith("<|im_start|>assistant\nhi")
    assert ("assistant\n", "chat template") in [(p.text, p.reason) for p in e.left_out]


def test_chat_scores_are_those_of_the_rendered_ids():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello world"},
    ]
    e = explainer(chat()).explain(messages, "hi there")
    ids = chat().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    answer = [target.token_id for target in e.targets]
    whole = explainer(None).explain(ids, answer)
    columns = [unit.tokens[0] for unit in e.units]
    torch.testing.assert_close(
        e.scores, whole.scores[:, columns], rtol=0, atol=1e-5, equal_nan=True
    )
    assert len(e.units) < len(whole.units)


def test_explain_only_gives_the_same_columns():
    everything = explainer().explain(PROMPT, "23 euros. The")
    some = explainer().explain(PROMPT, "23 euros. The", explain_only=[1, 4])
    assert some.units == [everything.units[1], everything.units[4]]
    assert some.provenance["runs"] == 3
    torch.testing.assert_close(some.scores, everything.scores[:, [1, 4]], rtol=0, atol=1e-5)


def test_bfloat16():
    model = llama().bfloat16()
    e = Explainer(model, TOKENIZER).explain(PROMPT, "23")
    reference = explainer().explain(PROMPT, "23")
    assert e.scores.dtype == torch.float32
    assert e.provenance["dtype"] == "bfloat16"
    # The largest score stands far above bfloat16's noise.
    assert e.scores.argmax() == reference.scores.argmax()


# --- generation ---------------------------------------------------------------------------------


def greedy(steps, model=None, tokenizer=TOKENIZER):
    model = model or MODELS["llama"]()
    ids = tokenizer(PROMPT).input_ids
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-steps:]


def test_without_a_target_the_greedy_completion_is_explained():
    completion = greedy(4)
    e = explainer().explain(PROMPT, max_new_tokens=4)
    assert [target.token_id for target in e.targets] == completion
    assert e.text.startswith(PROMPT)
    assert e.provenance["target"] == "generated"
    assert e.provenance["generation"] == {"max_new_tokens": 4}
    given = explainer().explain(PROMPT, completion)
    assert torch.equal(given.scores.nan_to_num(), e.scores.nan_to_num())


def test_the_model_s_own_generation_config_cannot_make_it_sample():
    model = llama()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    e = Explainer(model, TOKENIZER).explain(PROMPT, max_new_tokens=4)
    assert [target.token_id for target in e.targets] == greedy(4)


def test_generation_arguments_are_passed_on():
    banned = greedy(1)[0]
    e = explainer().explain(PROMPT, max_new_tokens=3, bad_words_ids=[[banned]])
    assert banned not in [target.token_id for target in e.targets]
    assert e.provenance["generation"] == {"max_new_tokens": 3, "bad_words_ids": [[banned]]}
    torch.manual_seed(0)
    drawn = explainer().explain(PROMPT, max_new_tokens=8, do_sample=True, temperature=3.0)
    assert [target.token_id for target in drawn.targets] != greedy(8)
    config = GenerationConfig(do_sample=True, temperature=3.0)
    torch.manual_seed(0)
    e = explainer().explain(PROMPT, max_new_tokens=8, generation_config=config)
    assert e.targets == drawn.targets
    asked = explainer().explain(PROMPT, max_new_tokens=2, return_dict_in_generate=True)
    assert len(asked.targets) == 2


def test_the_end_of_text_token_is_not_explained():
    words, completion = TOKENIZER(PROMPT).input_ids, greedy(4)
    end = completion[3]
    assert end not in completion[:3]
    e = explainer(None).explain(words, max_new_tokens=10, eos_token_id=end)
    assert [target.token_id for target in e.targets] == completion[:3]
    last = e.left_out[-1]
    assert (last.text, last.tokens) == (str(end), ())
    assert last.reason == "end of text, generated and not explained"
    model = llama()
    model.generation_config.eos_token_id = [511, end]
    again = Explainer(model).explain(words, max_new_tokens=10)
    assert [target.token_id for target in again.targets] == completion[:3]


def test_an_empty_completion_is_refused():
    words = TOKENIZER(PROMPT).input_ids
    with pytest.raises(ValueError, match="the model's completion is empty: it ended at once"):
        explainer(None).explain(words, eos_token_id=greedy(1)[0])


def test_several_completions_are_refused():
    with pytest.raises(ValueError, match="one completion is explained at a time, got 2"):
        explainer().explain(
            PROMPT, max_new_tokens=2, num_beams=2, num_return_sequences=2, early_stopping=True
        )


def test_generation_arguments_with_a_target_are_refused():
    with pytest.raises(TypeError, match="temperature would go to model"):
        explainer().explain(PROMPT, "23", temperature=1.0)


# --- how it is told -----------------------------------------------------------------------------


def test_provenance(tmp_path):
    e = explainer(preset="paper", layers=[1], heads=[0, 2], batch_size=4).explain(
        PROMPT, "23 euros"
    )
    known, units = e.provenance, len(e.units)
    assert known["batch_sizes"] == [1] + [4] * (units // 4) + [units % 4] * (units % 4 > 0)
    assert known["runs"] == units + 1
    assert (known["exact_runs"], known["direct_runs"]) == (units, 0)
    assert known["model"] == known["model_class"] == "LlamaForCausalLM"
    settings = {key: known[key] for key in ("preset", "mode", "factor", "layers", "heads")}
    assert settings == {
        "preset": "paper",
        "mode": "multiplicative",
        "factor": 0.1,
        "layers": [1],
        "heads": [0, 2],
    }
    assert known["method"] == "exact"
    assert known["budget"] is None
    assert known["granularity"] == "token"
    assert known["effect"].startswith("total effect: each unit was suppressed in every row")
    assert (known["runner"], known["runner_reasons"]) == ("shared_prefix", [])
    # Keys and values: 2 layers, 2 heads of 8, float32, prompt and all of the target but the last.
    words = e.targets[0].token
    columns = words + len(e.targets) - 1
    assert known["prefix_bytes"] == 2 * 2 * 2 * 8 * 4 * columns
    starts = [unit.tokens[0] for unit in e.units]
    firsts = [starts[row // 4 * 4] for row in range(units)]  # rows of four, in order
    ran = sum(columns - first for first in firsts)
    assert known["wasted_share"] == pytest.approx(1 - sum(columns - s for s in starts) / ran)
    assert known["forwards"] == pytest.approx((columns + ran) / words)
    assert {"atman_triton", "torch", "transformers", "python"} <= known["versions"].keys()
    assert known["seconds"] > 0
    e.save(tmp_path / "e.json")
    assert load(tmp_path / "e.json") == e
    json.dumps(known, allow_nan=False)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("direct", "direct effect: each unit was suppressed only in the rows that predict the"),
        ("hybrid", "total effect of the most promising units, direct effect of the others"),
        ("hierarchical", "total effect of the tokens of the most promising pieces; of the other"),
    ],
)
def test_provenance_says_what_a_score_is(method, words):
    budget = None if method == "direct" else 9
    known = explainer(method=method, budget=budget).explain(PROMPT, "23").provenance
    assert known["method"] == method
    assert known["budget"] == budget
    assert known["effect"].startswith(words)


def test_presets_can_be_changed_in_part():
    known = explainer(preset="paper", factor=0.5, mode="log_additive").explain(PROMPT, "23")
    settings = [known.provenance[key] for key in ("preset", "mode", "factor")]
    assert settings == ["paper", "log_additive", 0.5]


def test_layers_and_heads_change_the_scores():
    whole = explainer().explain(PROMPT, "23").scores
    assert not torch.allclose(explainer(layers=[0]).explain(PROMPT, "23").scores, whole)
    assert not torch.allclose(explainer(heads=[1]).explain(PROMPT, "23").scores, whole)


# --- on the fused kernel ------------------------------------------------------------------------


def test_on_triton_with_launches_counted():
    pytest.importorskip("triton")
    model = MODELS["llama"]()
    expected = Explainer(model, TOKENIZER, backend="torch").explain("The pay is", "23 euros")
    with count_launches() as launches:
        e = Explainer(model, TOKENIZER, backend="triton").explain("The pay is", "23 euros")
    passes = len(e.provenance["batch_sizes"])
    assert launches.attention == passes * model.config.num_hidden_layers
    assert e.provenance["backend"] == "triton"
    torch.testing.assert_close(e.scores, expected.scores, rtol=0, atol=1e-4, equal_nan=True)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"preset": "best"},
            ValueError,
            "preset must be one of default, paper, released, aleph_alpha, got",
        ),
        ({"mode": "subtract"}, ValueError, "mode must be one of multiplicative, min_shift"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend must be one of auto, triton, hopper",
        ),
        ({"factor": 1.0}, ValueError, r"factor must lie in \[0, 1\), got 1.0"),
        ({"factor": -0.1}, ValueError, r"factor must lie in \[0, 1\), got -0.1"),
        ({"factor": -1, "mode": "log_additive"}, ValueError, r"factor must lie in \[0, 1\)"),
        ({"factor": float("nan")}, ValueError, r"factor must lie in \[0, 1\), got nan"),
        ({"factor": 2}, ValueError, r"factor must lie in \[0, 1\), got 2"),
        ({"factor": "0.1"}, TypeError, "factor must be a number, got '0.1'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be 'auto' or an int, got 2.0"),
        ({"layers": [2]}, ValueError, r"layers must be among 0..1 \(2 with attention\), got 2"),
        ({"heads": [4]}, ValueError, "heads must be within 0..3, got 4"),
        ({"heads": []}, ValueError, "heads must name at least one, got none"),
        ({"layers": 1}, TypeError, "layers must be a sequence of ints or None, got 1"),
        ({"heads": 1}, TypeError, "heads must be a sequence of ints or None, got 1"),
        ({"heads": "01"}, TypeError, "heads must be a sequence of ints or None, got '01'"),
        ({"batch_size": "large"}, TypeError, "batch_size must be 'auto' or an int, got 'large'"),
    ],
)
def test_bad_settings_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        explainer(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt must not be empty."),
        ({"target": ""}, ValueError, "target must not be empty."),
        ({"target": []}, ValueError, "target must not be empty."),
        ({"target": [VOCABULARY]}, ValueError, "target holds token id 512, but the model knows"),
        ({"prompt": [VOCABULARY]}, ValueError, "prompt holds token id 512, but the model knows"),
        (
            {"granularity": "page"},
            ValueError,
            "granularity must be one of token, word, .*, a Delimiter, Spans, .*, got 'page'",
        ),
        ({"granularity": 5}, ValueError, "granularity must be one of .*, got 5"),
        ({"targets": ["a"]}, TypeError, "target and targets exclude each other; put the one"),
        ({"target": None, "targets": []}, ValueError, "targets must hold at least one target"),
        (
            {"target": None, "targets": "23"},
            TypeError,
            "targets must be a sequence of str or token ids, got '23'",
        ),
        (
            {"target": None, "targets": 5},
            TypeError,
            "targets must be a sequence of str or token ids, got 5",
        ),
        (
            {"target": None, "targets": ["23", 7]},
            TypeError,
            r"targets\[1\] must be a str or a sequence of token ids, got 7; a single .* is \[7\]",
        ),
        ({"target": None, "targets": ["23", ""]}, ValueError, "target must not be empty."),
        ({"target": None, "targets": [[VOCABULARY]]}, ValueError, "target holds token id 512"),
        (
            {"target": None, "targets": ["23"], "max_new_tokens": 3},
            TypeError,
            "max_new_tokens would go to model.generate, but a target is given",
        ),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, got 'max'"),
        ({"explain_only": [99]}, ValueError, "explain_only holds unit index 99, but this input"),
        ({"explain_only": 3}, TypeError, "explain_only must be unit indices, a passage .*, got 3"),
        ({"explain_only": [0, "pay"]}, TypeError, "must hold indices or passages, not both"),
        ({"explain_only": (5, 5)}, ValueError, r"with 0 <= start < stop, got \(5, 5\)"),
        ({"max_units": 5}, ValueError, "max_units is for granularity='auto', but .* is 'token'"),
        ({"max_units": 0, "granularity": "auto"}, ValueError, "max_units must be at least 1, got"),
        ({"max_units": "5", "granularity": "auto"}, TypeError, "max_units must be an int or None"),
        (
            {"target_granularity": "line"},
            ValueError,
            "target_granularity must be one of complete, token, word, sentence, got 'line'",
        ),
        ({"target_span": 3}, TypeError, r"target_span must be \(start, stop\), two ints, got 3"),
        ({"target_span": "24"}, ValueError, "target_span '24' does not occur in the completion"),
        ({"target_span": (0, 9)}, ValueError, "must lie within the completion, which has 2 char"),
        (
            {"target_span": "23", "targets": ["23"], "target": None},
            TypeError,
            "target_span is of one answer; give target, without targets and contrast_target.",
        ),
        ({"separator": 3}, TypeError, "separator must be a str or None, got 3"),
        ({"max_new_tokens": 3}, TypeError, "max_new_tokens would go to model.generate, but a"),
        (
            {"target": None, "max_new_tokens": "3"},
            TypeError,
            "max_new_tokens must be an int or None, got '3'",
        ),
        (
            {"target": None, "max_new_tokens": 0},
            ValueError,
            "max_new_tokens must be at least 1, got 0",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    arguments = {"prompt": PROMPT, "target": "23"} | arguments
    with pytest.raises(error, match=message):
        explainer().explain(**arguments)


def test_what_does_not_fit_into_the_context_window_is_refused():
    fitting = [5] * (WINDOW - 2)
    explainer(None, batch_size=8).explain(fitting, [1, 2, 3], explain_only=[0])  # the last one
    with pytest.raises(
        ValueError,
        match="context window of 64 tokens, got 62 and the target's 4: 1 too many; shorten",
    ):
        explainer(None).explain(fitting, [1, 2, 3, 4])
    with pytest.raises(
        ValueError, match="got 62 and max_new_tokens 32: 29 too many; lower max_new_tokens to 3"
    ):
        explainer(None).explain(fitting, max_new_tokens=32)
    with pytest.raises(ValueError, match="got 65 and max_new_tokens 1: 1 too many; shorten the p"):
        explainer(None).explain([5] * (WINDOW + 1))


@pytest.mark.parametrize(("length", "room"), [(10, 32), (WINDOW - 2, 3), (WINDOW, 1)])
def test_as_much_is_generated_as_the_context_window_has_room_for(length, room):
    e = explainer(None, batch_size=8).explain([5] * length, explain_only=[0])
    assert len(e.targets) == room
    assert e.provenance["generation"] == {"max_new_tokens": room}


def test_a_str_prompt_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="a str prompt needs a tokenizer, got None"):
        explainer(None).explain(PROMPT, [1])
    with pytest.raises(ValueError, match="a str target needs a tokenizer, got None"):
        explainer(None).explain([1, 2], "23")


def test_unsupported_models_are_refused():
    config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2)
    model = OpenAIGPTLMHeadModel(config)
    with pytest.raises(UnsupportedModelError, match="OpenAIGPTLMHeadModel"):
        Explainer(model, byte_level())


def test_a_model_that_is_not_causal_is_refused():
    with pytest.raises(TypeError, match="model must be a transformers causal language model"):
        Explainer(torch.nn.Linear(2, 2))


def test_generation_leaves_the_model_as_it_was():
    model = llama().train()
    config = model.generation_config.to_dict()
    with pytest.raises(ValueError, match="one completion is explained at a time"):
        Explainer(model, TOKENIZER).explain(
            PROMPT, max_new_tokens=2, do_sample=True, num_return_sequences=2
        )
    assert all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == config
    assert model.config._attn_implementation == llama().config._attn_implementation
