"""Explanations of a model that controls act on, against one eager forward per unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_models import MODELS, in_float64, llama, plain_logits
from toy_tokenizers import byte_level

from atman_triton import Explainer, ImageControl, TextControl, TokenControl, steer
from atman_triton.explain import METHODS

TEXT = "The pay per hour is 23 euros."
CONTROLS = [
    TextControl(TEXT.index("23"), 2, 3.0, "complete"),
    TextControl(0, 5, 0.2),
    TokenControl(2, 0.5),
]


def prompt_ids() -> list[int]:
    return byte_level()(TEXT)["input_ids"]


def factors_by_hand() -> torch.Tensor:
    """What CONTROLS give to every token of TEXT."""
    encoding = byte_level(trim_offsets=False)(TEXT, return_offsets_mapping=True)
    assert encoding["input_ids"] == prompt_ids()
    row = torch.ones(len(prompt_ids()))
    for index, (start, stop) in enumerate(encoding["offset_mapping"]):
        if stop > TEXT.index("23") and start < TEXT.index("23") + 2:
            row[index] *= 3.0
        row[index] *= 1 - 0.8 * max(0, min(stop, 5) - start) / (stop - start)
    row[2] *= 0.5
    return row


def loop(model: Any, target: list[int], units: list[Any], mode: str, direct: bool) -> torch.Tensor:
    """Log-probabilities ``[1 + U, T]`` with the controls in every row of the matrix."""
    ids = [*prompt_ids(), *target[:-1]]
    around = torch.ones(len(ids))
    around[: len(prompt_ids())] = factors_by_hand()
    rows = []
    for tokens in [(), *units]:
        matrix = around.expand(len(ids), -1).clone()
        matrix[len(prompt_ids()) - 1 if direct else 0 :, list(tokens)] *= 0.1
        logits = plain_logits(model, ids, matrix, mode)[-len(target) :]
        rows.append(logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)])
    return torch.stack(rows)


@pytest.mark.parametrize("method", ["exact", "direct"])
@pytest.mark.parametrize("mode", ["min_shift", "multiplicative", "log_additive"])
@pytest.mark.parametrize("name", MODELS)
def test_units_are_suppressed_under_the_controls(name: str, mode: str, method: Any) -> None:
    model, target = in_float64(name), [9, 84, 20]
    explainer = Explainer(model, byte_level(), mode=mode, method=method, progress=False)
    explanation = explainer.explain(TEXT, target, controls=CONTROLS)
    units = [unit.tokens for unit in explanation.units]
    rows = loop(model, target, units, mode, method == "direct")
    expected = (rows[0] - rows[1:]).T.float()
    known = ~explanation.scores.isnan()
    assert known.sum() > 3 * len(prompt_ids()) - 1
    torch.testing.assert_close(explanation.scores[known], expected[known], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(explanation.base_logprobs, rows[0].float(), rtol=1e-4, atol=1e-5)
    plain = explainer.explain(TEXT, target).scores
    assert (plain - explanation.scores)[known].abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_as_inside_steer(method: Any) -> None:
    """Steering around the whole explanation is the same, for one target and for several."""
    model = llama()
    budget = 50 if method == "hierarchical" else None
    explainer = Explainer(model, byte_level(), method=method, budget=budget, progress=False)
    for targets in ([[9, 84]], [[9, 84], [7, 3, 5], [20]]):
        found = explainer.explain(TEXT, targets=targets, controls=CONTROLS)
        with steer(model, CONTROLS, inputs=TEXT, tokenizer=byte_level(), mode="min_shift"):
            expected = explainer.explain(TEXT, targets=targets)
        assert [unit.tokens for unit in found.units] == [unit.tokens for unit in expected.units]
        torch.testing.assert_close(
            found.scores, expected.scores, equal_nan=True, rtol=1e-4, atol=1e-5
        )
        plain = explainer.explain(TEXT, targets=targets)
        assert not torch.equal(plain.base_logprobs, found.base_logprobs)
        if method == "path":
            assert found.completeness is not None
            assert abs(found.completeness.error) < 0.2


def test_the_answer_is_generated_under_the_controls() -> None:
    model: Any = llama()
    tokenizer = byte_level()
    explainer = Explainer(model, tokenizer, progress=False)
    strong = [TokenControl(7, 30.0), TokenControl(len(prompt_ids()) - 1, 0.0)]
    explanation = explainer.explain(TEXT, controls=strong, max_new_tokens=4)
    inputs = tokenizer(TEXT, return_tensors="pt")
    with steer(model, strong, inputs=inputs):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert [target.token_id for target in explanation.targets] == ids[0, -4:].tolist()
    assert explanation.answer != explainer.explain(TEXT, max_new_tokens=4).answer
    assert explanation.provenance["controls"][0] == {
        "kind": "TokenControl",
        "pos": 7,
        "factor": 30.0,
        "similarity": None,
    }
    assert explainer.explain(TEXT, [9]).provenance["controls"] == []


def test_what_is_shown_names_the_controls(capsys: pytest.CaptureFixture[str]) -> None:
    explainer = Explainer(llama(), byte_level(), progress=False)
    explanation = explainer.explain(TEXT, [9], controls=CONTROLS)
    named = "controls “23” ×3, “The p” ×0.2, token 2 ×0.5"
    explanation.show(width=200)
    assert named in capsys.readouterr().out
    assert named in explanation.to_html()
    explainer.explain(TEXT, [9]).show(width=200)
    assert "controls" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("controls", "error", "message"),
    [
        (CONTROLS[0], TypeError, "put the one into a list"),
        ([CONTROLS], TypeError, r"controls\[0\] must be a TextControl"),
        ([TokenControl(99, 2.0)], ValueError, "stands outside the prompt"),
        ([TextControl(20, 20, 2.0)], ValueError, "ends at character 40, but the text of the"),
        ([ImageControl(0, 0, 1, 1, 2.0)], ValueError, "needs an image in the prompt"),
    ],
)
def test_controls_that_cannot_act(controls: Any, error: Any, message: str) -> None:
    explainer = Explainer(llama(), byte_level(), progress=False)
    with pytest.raises(error, match=message):
        explainer.explain(TEXT, [9], controls=controls)
