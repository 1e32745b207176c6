"""Names and indices of classes, problems and kinds of models."""

import classifier_cases as cases
import pytest
import torch
import transformers as tf

from atman_triton.classes import class_of, kind_of, label_of, problem_of


def config(labels=cases.LABELS, **more):
    return tf.BertConfig(id2label=dict(enumerate(labels)), **more)


def test_a_class_is_given_by_name_or_index():
    known = config()
    assert class_of("target", "weather", known) == 2
    for index in (2, torch.tensor(2), torch.arange(4).numpy()[2]):
        assert class_of("target", index, known) == 2
    assert label_of(known, 3) == "art"


@pytest.mark.parametrize(
    ("labels", "target", "kind", "message"),
    [
        (
            cases.LABELS,
            "Sport",
            ValueError,
            "target must be one of the model's 4 classes, got 'Sport'; near ones are 'sports'.",
        ),
        (
            cases.LABELS,
            "xyz",
            ValueError,
            "target must be one of the model's 4 classes, got 'xyz'; they are 'sports', "
            "'politics', 'weather', 'art'.",
        ),
        (
            [f"q{number}" for number in range(13)],
            "zzzzzz",
            ValueError,
            "target must be one of the model's 13 classes, got 'zzzzzz'; they are 'q0', 'q1', "
            "'q2', 'q3', 'q4', 'q5', 'q6', 'q7', 'q8', 'q9', 'q10', 'q11' and 1 more.",
        ),
        (
            ["a", "b", "a"],
            "a",
            ValueError,
            "target must name one class, but 2 are called 'a'; give one of the indices 0, 2.",
        ),
        (cases.LABELS, 4, ValueError, "target must be a class index within 0..3, got 4."),
        (cases.LABELS, -1, ValueError, "target must be a class index within 0..3, got -1."),
        (cases.LABELS, True, TypeError, "target must be a class name or a class index, got True."),
        (cases.LABELS, 1.0, TypeError, "target must be a class name or a class index, got 1.0."),
        (cases.LABELS, [1], TypeError, "target must be a class name or a class index, got [1]."),
    ],
    ids=["near", "far", "many", "twice", "high", "negative", "bool", "float", "list"],
)
def test_other_targets_are_refused(labels, target, kind, message):
    with pytest.raises(kind) as refused:
        class_of("target", target, config(labels))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("count", "given", "found"),
    [
        (4, None, "single_label"),
        (4, "single_label_classification", "single_label"),
        (4, "multi_label_classification", "multi_label"),
        (4, "regression", "regression"),
        (1, None, "regression"),
        (1, "multi_label_classification", "multi_label"),
    ],
)
def test_what_a_head_was_made_for(count, given, found):
    assert problem_of(config([f"l{k}" for k in range(count)], problem_type=given)) == found


def test_kinds_go_by_the_name_of_the_class_or_of_one_above():
    class Mine(tf.BertForTokenClassification):
        pass

    assert kind_of(Mine(tf.BertConfig(num_hidden_layers=1, **_SMALL))) == "token"
    assert kind_of(torch.nn.Linear(1, 1)) is None
    assert kind_of(tf.BertModel(tf.BertConfig(num_hidden_layers=1, **_SMALL))) is None
    assert kind_of(cases.make("gpt2")) == "sequence"
    assert kind_of(torch.compile(cases.make("vit"))) == "image"


_SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
