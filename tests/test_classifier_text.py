"""Explainer on classifiers of texts and tokens: equal to plain forwards, and refused clearly."""

import re

import classifier_cases as cases
import pytest
import torch
import transformers as tf
from toy_tokenizers import byte_level, sentencepiece, wordpiece

from atman_triton import Explainer, TokenControl, load
from atman_triton.stacks import UnsupportedModelError

TEXT = "The pay per hour is 23 euros. The notice period is four weeks."


def explainer_of(name, tokenizer=None, model=None, **settings):
    model = cases.make(name) if model is None else model
    tokenizer = wordpiece() if tokenizer is None else tokenizer
    return model, Explainer(model, tokenizer, progress=False, **settings)


def loop(model, inputs, e, read):
    """``[T, U]``: what a plain forward with each unit suppressed rises or falls by."""
    tokens = inputs["input_ids"].shape[1]
    with torch.no_grad():
        base = read(cases.plain_logits(model, inputs))
        columns = []
        for unit in e.units:
            row = torch.ones(tokens)
            row[list(unit.tokens)] = 0.1
            columns.append(base - read(cases.plain_logits(model, inputs, row)))
    return torch.stack(columns, 1).float()


def inputs_of(tokenizer, *texts):
    return dict(tokenizer(*texts, return_tensors="pt"))


def class_logprob(index):
    return lambda logits: logits.log_softmax(-1)[[index]]


def assert_scores(e, expected):
    torch.testing.assert_close(e.scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["weather", 2])
def test_scores_of_a_class(target):
    model, explainer = explainer_of("bert")
    e = explainer.explain(TEXT, target)
    inputs = inputs_of(wordpiece(), TEXT)
    assert_scores(e, loop(model, inputs, e, class_logprob(2)))
    assert e.quantity == "logprob" and e.method == "exact"
    assert e.text == TEXT + " weather" and e.prompt == TEXT and e.answer == " weather"
    assert [each.text for each in e.targets] == ["weather"]
    assert [each.token_id for each in e.targets] == [2]
    assert e.text[e.targets[0].start : e.targets[0].stop] == "weather"
    assert "".join(unit.text for unit in e.units) == TEXT
    assert [unit.tokens for unit in e.units] == [(k,) for k in range(1, len(e.units) + 1)]
    last = inputs["input_ids"].shape[1] - 1
    assert [(each.text, each.tokens, each.reason) for each in e.left_out] == [
        ("[CLS]", (0,), "special token"),
        ("[SEP]", (last,), "special token"),
    ]
    assert e.provenance["method_choice"] == (
        "default: no direct effects, because BertForSequenceClassification reads its whole input "
        "at once"
    )
    assert e.provenance["target"] == "given" and e.provenance["classes"] == ["weather"]


def test_without_a_target_the_predicted_class_is_explained():
    model, explainer = explainer_of("bert")
    inputs = inputs_of(wordpiece(), TEXT)
    best = int(model(**inputs).logits.argmax())
    e = explainer.explain(TEXT)
    assert e.targets[0].token_id == best and e.answer.strip() == cases.LABELS[best]
    assert e.provenance["target"] == "predicted"
    assert e == explainer_like(explainer.explain(TEXT, best), e)


def explainer_like(e, other):
    """The same explanation with the other's provenance, which holds times."""
    e.provenance = other.provenance
    return e


def test_several_classes_in_one_pass():
    model, explainer = explainer_of("roberta", sentencepiece(), model=wide("roberta"))
    e = explainer.explain(TEXT, targets=["art", 0])
    inputs = inputs_of(sentencepiece(), TEXT)
    both = loop(model, inputs, e, lambda logits: logits.log_softmax(-1)[[3, 0]])
    assert_scores(e, both)
    assert e.answers == [" art", " sports"] and e.provenance["exact_runs"] == len(e.units)
    alone = e.branch(1)
    assert_scores(alone, both[1:])
    assert alone.text == TEXT + " sports"


def test_a_class_rather_than_another():
    _, explainer = explainer_of("bert")
    e = explainer.explain(TEXT, "art", contrast_target=1)
    this, that = e.relevances
    torch.testing.assert_close(e.relevance, this - that)
    assert e.answers == [" art", " politics"]
    with pytest.raises(ValueError, match="contrast_target must differ from the target"):
        explainer.explain(TEXT, "art", contrast_target=3)


def test_logits_on_request():
    model, explainer = explainer_of("bert")
    e = explainer.explain(TEXT, "art", score="logit")
    assert e.quantity == "logit"
    assert_scores(e, loop(model, inputs_of(wordpiece(), TEXT), e, lambda x: x[[3]]))
    with pytest.raises(ValueError, match="score must be one of logprob, logit, got 'output'"):
        explainer.explain(TEXT, "art", score="output")


def test_labels_that_do_not_exclude_each_other():
    model = cases.make("bert", problem_type="multi_label_classification")
    _, explainer = explainer_of("bert", model=model)
    e = explainer.explain(TEXT, "politics")
    inputs = inputs_of(wordpiece(), TEXT)
    assert_scores(e, loop(model, inputs, e, lambda x: -torch.log1p(torch.exp(-x[[1]]))))
    assert e.provenance["problem"] == "multi_label"


def test_a_unit_that_raises_the_output_of_a_regression_is_positive():
    model = cases.make("bert", num_labels=1, id2label={0: "stars"}, label2id={"stars": 0})
    _, explainer = explainer_of("bert", model=model)
    e = explainer.explain(TEXT)
    inputs = inputs_of(wordpiece(), TEXT)
    assert e.quantity == "output" and e.answer == " stars"
    assert_scores(e, loop(model, inputs, e, lambda x: x))
    best = e.ranking()[0]
    assert e.scores[0, best] > 0
    torch.testing.assert_close(e.base_logprobs, model(**inputs).logits[0].float())
    assert float(e.suppressed_logprobs[0, best]) < float(e.base_logprobs[0])
    with pytest.raises(ValueError, match="score must be one of output, got 'logprob'"):
        explainer.explain(TEXT, score="logprob")


def test_a_regression_with_several_outputs_needs_one():
    model = cases.make("bert", problem_type="regression")
    _, explainer = explainer_of("bert", model=model)
    with pytest.raises(ValueError, match="target must name one of the 4 outputs of this regressio"):
        explainer.explain(TEXT)
    e = explainer.explain(TEXT, "art")
    assert_scores(e, loop(model, inputs_of(wordpiece(), TEXT), e, lambda x: x[[3]]))


@pytest.mark.parametrize("span", ["notice period", (34, 47)])
def test_the_class_of_tokens_of_a_passage(span):
    model, explainer = explainer_of("bert-tokens")
    inputs = inputs_of(wordpiece(), TEXT)
    start = TEXT.index("notice period")
    assert (start, start + 13) == (34, 47)
    e = explainer.explain(TEXT, targets=["art", "sports"], target_span=span)
    own = [
        index
        for index, (first, last) in enumerate(
            wordpiece()(TEXT, return_offsets_mapping=True)["offset_mapping"]
        )
        if start <= first < last <= start + 13
    ]
    assert len(own) > 1 and e.provenance["target_tokens"] == own

    def read(logits):
        logprobs = logits.log_softmax(-1)
        return torch.stack([logprobs[place, k] for k in (3, 0) for place in own])

    assert_scores(e, loop(model, inputs, e, read))
    names = [TEXT[a:b] for a, b in wordpiece()(TEXT, return_offsets_mapping=True)["offset_mapping"]]
    expected = [f"{label} ({names[place]})" for label in ("art", "sports") for place in own]
    assert [target.text for target in e.targets] == expected
    assert e.answers == [" art", " sports"]
    assert {unit.part for unit in e.units} == {"prompt"}
    assert [each.reason for each in e.left_out] == ["special token"] * 2
    two = explainer.explain(TEXT, "art", contrast_target="sports", target_span=span)
    assert torch.equal(two.scores, e.scores) and two.contrast
    parts = explainer.explain(TEXT, "art", target_span=span, target_granularity="token").parts
    assert [part.rows for part in parts] == [(row,) for row in range(len(own))]


def test_the_predicted_class_of_tokens_is_the_likeliest_for_all_of_them():
    model, explainer = explainer_of("bert-tokens")
    inputs = inputs_of(wordpiece(), TEXT)
    e = explainer.explain(TEXT, target_span="notice period")
    own = e.provenance["target_tokens"]
    best = int(model(**inputs).logits[0, own].log_softmax(-1).sum(0).argmax())
    assert {target.token_id for target in e.targets} == {best}


def test_passages_are_refused_where_they_mean_nothing():
    _, explainer = explainer_of("bert-tokens")
    message = (
        "target_span must say which tokens' class is scored, because BertForTokenClassification "
        "classifies every token: a passage of the prompt that occurs once, or (start, stop)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        explainer.explain(TEXT, "art")
    with pytest.raises(ValueError, match="target_span 'is' occurs 2 times in the prompt"):
        explainer.explain(TEXT, "art", target_span="is")
    with pytest.raises(ValueError, match="target_span needs text"):
        Explainer(explainer.model, progress=False).explain([5, 6], "art", target_span=(0, 1))
    _, explainer = explainer_of("bert")
    with pytest.raises(TypeError) as refused:
        explainer.explain(TEXT, "art", target_span="notice")
    assert str(refused.value) == (
        "target_span is for models that classify every token, but this one classifies the whole "
        "prompt; leave it out."
    )


@pytest.mark.parametrize("granularity", ["word", "sentence"])
def test_larger_units(granularity):
    model, explainer = explainer_of("modernbert")
    e = explainer.explain(TEXT, "art", granularity)
    assert_scores(e, loop(model, inputs_of(wordpiece(), TEXT), e, class_logprob(3)))
    assert "".join(unit.text for unit in e.units) == TEXT
    assert max(len(unit.tokens) for unit in e.units) > 1
    if granularity == "sentence":
        assert len(e.units) == 2


def test_a_pair_of_texts():
    first, second = "The pay per hour is 23 euros.", "The notice period is four weeks."
    model = cases.make("bert")
    _, explainer = explainer_of("bert", pair_tokenizer(), model=model)
    e = explainer.explain((first, second), "art")
    inputs = inputs_of(pair_tokenizer(), first, second)
    assert inputs["token_type_ids"].unique().tolist() == [0, 1]
    assert_scores(e, loop(model, inputs, e, class_logprob(3)))
    assert e.text == f"{first}\n{second} art"
    middle = sum(unit.start < len(first) for unit in e.units)
    assert "".join(unit.text for unit in e.units[:middle]) == first
    assert "".join(unit.text for unit in e.units[middle:]) == second
    for unit in e.units:
        assert e.text[unit.start : unit.stop] == unit.text
    again = explainer.explain(pair_tokenizer()(first, second), "art")
    torch.testing.assert_close(again.scores[:, : len(e.units)], e.scores)


def pair_tokenizer():
    """Says by token types which of two texts a token stands in, as BERT's does."""
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece()._tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    from tokenizers import processors

    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return tokenizer


def test_an_encoding_is_read_as_it_is_its_padding_left_out():
    model = cases.make("bert")
    _, explainer = explainer_of("bert", model=model)
    ids = [1, 40, 50, 60, 2, 0, 0]
    raw = {"input_ids": [ids], "attention_mask": [[1] * 5 + [0] * 2], "length": [7]}
    e = explainer.explain(raw, "art")
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([[1] * 5 + [0] * 2])}
    assert [unit.tokens for unit in e.units] == [(1,), (2,), (3,)]
    assert_scores(e, loop(model, inputs, e, class_logprob(3)))
    assert [each.reason for each in e.left_out] == ["special token", "special token", "padding"]


def test_token_ids_need_no_tokenizer():
    model = cases.make("llama")
    explainer = Explainer(model, progress=False)
    e = explainer.explain([7, 40, 50, 60], "art")
    inputs = {"input_ids": torch.tensor([[7, 40, 50, 60]])}
    assert_scores(e, loop(model, inputs, e, class_logprob(3)))
    assert len(e.units) == 4 and e.text == "7 40 50 60 art"


def test_a_decoder_that_classifies_reads_its_last_token():
    model, explainer = explainer_of("gpt2", byte_level(), model=wide("gpt2"))
    text = "Hello world, hello there."
    e = explainer.explain(text, "art")
    assert_scores(e, loop(model, inputs_of(byte_level(), text), e, class_logprob(3)))
    assert len(e.units) == inputs_of(byte_level(), text)["input_ids"].shape[1]


def wide(name):
    """With a vocabulary that holds every tokenizer's."""
    return cases.make(name, vocab_size=512)


def test_correlated_suppression_names_what_goes_along():
    _, explainer = explainer_of("bert", similarity=0.99)
    e = explainer.explain(TEXT, "art")
    again = next(unit for unit in e.units if unit.text.strip() == "is")
    assert [TEXT[near.start : near.stop].strip() for near in again.neighbours] == ["is"]
    single = explainer_of("bert", model=explainer.model)[1].explain(TEXT, "art")
    assert not torch.equal(single.scores, e.scores)


def test_controls_act_on_what_is_explained():
    model, explainer = explainer_of("bert")
    controls = [TokenControl(3, 0.2)]
    e = explainer.explain(TEXT, "art", controls=controls)
    inputs = inputs_of(wordpiece(), TEXT)
    tokens = inputs["input_ids"].shape[1]
    row = torch.ones(tokens)
    row[3] = 0.2
    with torch.no_grad():
        base = cases.plain_logits(model, inputs, row).log_softmax(-1)[3]
        row[e.units[0].tokens[0]] *= 0.1
        first = cases.plain_logits(model, inputs, row).log_softmax(-1)[3]
    torch.testing.assert_close(e.base_logprobs[0], base.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(e.scores[0, 0], (base - first).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["path", "score_gradient", "hierarchical"])
def test_other_methods(method):
    _, explainer = explainer_of("bert", method=method)
    e = explainer.explain(TEXT, "art")
    assert e.method == method and bool(e.scores.isfinite().all())


@pytest.mark.parametrize("method", ["direct", "hybrid"])
def test_methods_with_direct_effects_are_refused(method):
    _, explainer = explainer_of("bert", method=method)
    with pytest.raises(UnsupportedModelError, match="reads its whole input at once; use method='e"):
        explainer.explain(TEXT, "art")


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_negative_scores_are_counted_where_factors_multiply(name):
    model, explainer = explainer_of(name, preset="paper")
    e = explainer.explain(TEXT, "art", explain_only=[0])
    share = cases.negative_share(model, inputs_of(wordpiece(), TEXT))
    assert 0.2 < share < 0.8
    assert e.provenance["negative_scores"] == pytest.approx(share, abs=1e-12)


def test_it_is_saved_and_loaded(tmp_path):
    _, explainer = explainer_of("bert-tokens")
    e = explainer.explain(TEXT, targets=["art", 0], target_span="notice period")
    e.save(tmp_path / "e.json")
    assert load(tmp_path / "e.json") == e


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        (
            "word " * 60,
            {"target": "art"},
            ValueError,
            "prompt must fit into the 48 tokens that the model can read, got",
        ),
        ("", {"target": "art"}, ValueError, "prompt must not be empty."),
        (("a", ""), {}, ValueError, "prompt must be a pair of texts that are not empty."),
        (
            [{"role": "user", "content": "hello"}],
            {"target": "art"},
            TypeError,
            "prompt must be a text to a classifier, but it is chat messages; render them with",
        ),
        (
            TEXT,
            {"max_new_tokens": 3},
            TypeError,
            "max_new_tokens would go to model.generate, but it classifies.",
        ),
        (
            TEXT,
            {"targets": ["art", "arts"]},
            ValueError,
            "targets[1] must be one of the model's 4 classes, got 'arts'; near ones are 'art'",
        ),
        ({"pixel_values": 1}, {}, ValueError, "prompt must hold input_ids, got ['pixel_values']."),
        (
            {"input_ids": [5, 6], "attention_mask": [1, 1, 1]},
            {},
            ValueError,
            "attention_mask must have one value for each of the 2 input_ids, got shape [1, 3].",
        ),
        (TEXT, {"targets": "art"}, TypeError, "targets must be a sequence of class names or"),
    ],
)
def test_what_cannot_be_explained(prompt, options, kind, message):
    _, explainer = explainer_of("bert")
    with pytest.raises(kind) as refused:
        explainer.explain(prompt, **options)
    assert str(refused.value).startswith(message)


def test_positions_that_a_model_never_reads_count_against_its_window():
    _, explainer = explainer_of("roberta", sentencepiece())
    explainer.explain([20] * 46, "art")
    with pytest.raises(ValueError, match="fit into the 46 tokens that the model can read, got 47"):
        explainer.explain([20] * 47, "art")


def test_models_that_are_refused():
    with pytest.raises(UnsupportedModelError) as refused:
        Explainer(cases.make_seq2seq())
    assert str(refused.value) == (
        "model must be a classifier over one encoder or decoder, but BartForSequenceClassification "
        "has both."
    )
    with pytest.raises(UnsupportedModelError) as refused:
        Explainer(tf.HubertForSequenceClassification(tf.HubertConfig(**_HEARING)))
    assert str(refused.value) == (
        "model must classify texts or pictures, but HubertForSequenceClassification reads "
        "input_values."
    )
    with pytest.raises(UnsupportedModelError, match="DebertaV2Model computes attention in its own"):
        Explainer(cases.make("deberta"))


_HEARING = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "intermediate_size": 16,
    "conv_dim": (8,),
    "conv_kernel": (2,),
    "conv_stride": (2,),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
