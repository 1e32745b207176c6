"""The main job on the shipped model: the sentence that holds the answer comes out on top."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from atman_triton.demo import Document, Question, load_demo_model, make_document, prompt
from atman_triton.explain import Explainer
from atman_triton.explanation import Explanation

DOCUMENTS = 100
TWO_QUESTIONS = 20  # documents that are asked a second question


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    model, tokenizer = load_demo_model()
    return Explainer(model, tokenizer, progress=False)


def answers(explainer: Explainer, document: Document, question: Question) -> bool:
    """Whether the model's own greedy answer is exactly right."""
    ids = explainer.tokenizer(prompt(document, question), return_tensors="pt")
    with torch.no_grad():
        output = explainer.model.generate(**ids, max_new_tokens=16, do_sample=False)
    text = explainer.tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return text == question.answer


def right_questions(
    explainer: Explainer,
) -> Iterator[tuple[Document, Question, Iterator[Question]]]:
    """Fresh documents, the first question that the model answers right, and the others as asked."""
    for number in range(2 * DOCUMENTS):
        document = make_document(f"evidence-test-{number}")
        right = (q for q in document.questions[:3] if answers(explainer, document, q))
        for first in right:
            yield document, first, right
            break


def top_sentence(explanation: Explanation, document: Document) -> int:
    """Index of the sentence whose tokens have the largest summed relevance."""
    totals = torch.zeros(len(document.sentences))
    for unit, relevance in zip(explanation.units, explanation.relevance.tolist(), strict=True):
        if unit.start is None or unit.stop is None:
            continue
        # a token's leading space belongs to no sentence, so its last character decides
        for index, (start, stop) in enumerate(document.spans):
            if start < unit.stop <= stop:
                totals[index] += relevance
    return int(totals.argmax())


def test_the_evidence_sentence_comes_first(explainer: Explainer) -> None:
    found = moved = both = 0
    documents = right_questions(explainer)
    for number in range(DOCUMENTS):
        document, first, others = next(documents)
        explanation = explainer.explain(prompt(document, first), first.answer)
        top = top_sentence(explanation, document)
        found += top == first.evidence
        second = next(others, None) if number < TWO_QUESTIONS else None
        if second is not None:
            both += 1
            other = explainer.explain(prompt(document, second), second.answer)
            moved += top_sentence(other, document) != top
    print(f"evidence first {found} of {DOCUMENTS}; moved with the question {moved} of {both}")
    assert found >= 95
    assert both >= TWO_QUESTIONS // 2
    assert moved >= 0.95 * both
