"""Which tokens are units, which are targets, what is left out."""

import pytest
from toy_tokenizers import chat, sentencepiece

from atman_triton.explanation import LeftOut
from atman_triton.tokens import encode_prompt, encode_target
from atman_triton.units import lay_out

MANY = 10**6


def laid_out(prompt, target, tokenizer=None, separator="", explain_only=None):
    words = encode_prompt(prompt, tokenizer, MANY)
    answer = encode_target(target, words, tokenizer, MANY, separator)
    return lay_out(words, answer, explain_only)


def test_every_token_before_the_last_target_is_a_unit():
    layout = laid_out([5, 12, 7], [9, 30])
    assert layout.input_ids == [5, 12, 7, 9]
    assert layout.target_ids == [9, 30]
    assert (layout.text, layout.prompt_stop) == ("5 12 7 9 30", 6)
    assert [unit.tokens for unit in layout.units] == [(0,), (1,), (2,), (3,)]
    assert [unit.part for unit in layout.units] == ["prompt", "prompt", "prompt", "target"]
    assert [(target.token, target.token_id) for target in layout.targets] == [(3, 9), (4, 30)]
    assert layout.left_out == []


def test_spans_of_units_and_targets_lie_in_the_whole_text():
    layout = laid_out("The pay is 🤣", "23 euros", sentencepiece(), " ")
    assert layout.text == "The pay is 🤣 23 euros"
    for piece in (*layout.units, *layout.targets):
        assert piece.text == layout.text[piece.start : piece.stop]
    assert layout.targets[0].start == layout.prompt_stop
    assert layout.targets[-1].stop == len(layout.text)
    assert layout.left_out == [LeftOut("<s>", (0,), "special token")]


def test_special_tokens_in_the_target_are_targets_but_no_units():
    tokenizer = sentencepiece()
    layout = laid_out("Hello", "world</s> there", tokenizer, " ")
    ends = [t for t in layout.targets if t.token_id == tokenizer.eos_token_id]
    assert len(ends) == 1
    assert ends[0].token not in [unit.tokens[0] for unit in layout.units]
    assert layout.left_out[-1] == LeftOut("</s>", (ends[0].token,), "special token")


def test_what_the_template_writes_is_left_out():
    messages = [{"role": "user", "content": "Hello world"}]
    layout = laid_out(messages, "hi", chat())
    prompt_units = [unit for unit in layout.units if unit.part == "prompt"]
    assert "".join(unit.text for unit in prompt_units) == "Hello world"
    listed = [(piece.text, piece.reason) for piece in layout.left_out]
    assert listed == [
        ("<|im_start|>", "special token"),
        ("user\n", "chat template"),
        ("<|im_end|>", "special token"),
        ("\n", "chat template"),
        ("<|im_start|>", "special token"),
        ("assistant\n", "chat template"),
    ]
    covered = {token for piece in layout.left_out for token in piece.tokens}
    covered |= {token for unit in layout.units for token in unit.tokens}
    assert covered == set(range(len(layout.input_ids)))  # nothing is lost


def test_explain_only():
    everything = laid_out([5, 12, 7], [9, 30])
    some = laid_out([5, 12, 7], [9, 30], explain_only=[2, 0, 2])
    assert some.units == [everything.units[0], everything.units[2]]
    assert some.left_out == [
        LeftOut("12", (1,), "not in explain_only"),
        LeftOut("9", (3,), "not in explain_only"),
    ]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([4], ValueError, "unit index 4, but this input has 4 units, 0 to 3"),
        ([-1], ValueError, "unit index -1, but this input has 4 units"),
        ([], ValueError, "explain_only must name at least one unit"),
        ([1.0], TypeError, "explain_only must hold unit indices, got 1.0"),
        ([True], TypeError, "explain_only must hold unit indices, got True"),
    ],
)
def test_bad_indices_are_refused(indices, error, message):
    with pytest.raises(error, match=message):
        laid_out([5, 12, 7], [9, 30], explain_only=indices)


def test_a_prompt_of_special_tokens_is_refused():
    tokenizer = sentencepiece()
    with pytest.raises(ValueError, match="nothing to explain: all of its tokens are special"):
        laid_out([tokenizer.bos_token_id], [7], tokenizer)
