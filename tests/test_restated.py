"""Documents that state a fact twice: what their twin sentences say, and where they stand."""

import pytest

from atman_triton.demo.facts import REGIONS
from bench.restated import restate, spans, stated_value

NUMBER = 40


@pytest.mark.parametrize("relation", ["same", "synonym", "conflict"])
def test_the_twin_is_another_sentence_elsewhere(relation):
    for number in range(NUMBER):
        restated = restate(f"test-{number}", relation)
        own, twin = restated.sentences[restated.first], restated.sentences[restated.twin]
        assert restated.without(restated.twin) == restated.once.sentences
        assert own == restated.once.sentences[restated.question.evidence]
        assert abs(restated.first - restated.twin) > 1
        value = stated_value(restated.once, restated.question)
        assert restated.twin_value in twin and value in own
        # the wording differs even where the value is the same
        assert own.lower().replace(value.lower(), "") != twin.lower().replace(value.lower(), "")
    assert restate("test-0", relation) == restate("test-0", relation) != restate("test-1", relation)


def test_what_the_twin_answers():
    same, synonym, conflict = (
        [restate(f"test-{number}", relation) for number in range(NUMBER)]
        for relation in ("same", "synonym", "conflict")
    )
    for restated in same:
        assert restated.twin_value == stated_value(restated.once, restated.question)
        assert restated.twin_answer == restated.question.answer
    for restated in synonym:
        value = stated_value(restated.once, restated.question)
        answer = restated.question.answer.strip()
        assert restated.twin_answer == restated.question.answer
        assert restated.twin_value not in (value, *restated.once.text.split())
        assert restated.twin_value in (answer, *REGIONS.get(answer, ()))
    for restated in conflict:
        assert restated.twin_answer not in {each.answer for each in restated.once.questions}
        assert restated.twin_value not in restated.once.text
        assert restated.answer_of(restated.first) == restated.question.answer
        assert restated.answer_of(restated.twin) == restated.twin_answer


def test_sentences_have_their_places():
    sentences = ("One.", "Two.", "Three.")
    assert [" ".join(sentences)[a:b] for a, b in spans(sentences)] == list(sentences)
