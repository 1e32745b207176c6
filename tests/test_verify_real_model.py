"""The checks for public models pass on a random one, except for those that need training."""

from typing import Any

import pytest
import torch
from toy_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from examples import verify_real_model as verify

NEED_TRAINING = ("evidence for", "another question")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random model and a tokenizer."""
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    folder = str(tmp_path_factory.mktemp("reader"))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, verify.Report]:
    """The exit status and the checks."""
    reports: list[verify.Report] = []

    class Kept(verify.Report):
        def __init__(self) -> None:
            super().__init__()
            reports.append(self)

    monkeypatch.setattr(verify, "Report", Kept)
    status = verify.main(["--model", folder, "--device", "cpu"])
    return status, reports[0]


def test_checks_pass(
    reader: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(reader, monkeypatch)
    assert [name for name in report.failed if not name.startswith(NEED_TRAINING)] == []
    assert len(report.checks) == 19
    assert status == bool(report.failed)
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_checks_can_fail(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = verify.attention_reference

    def wrong(*parts: Any, **settings: Any) -> Any:
        out, lse = right(*parts, **settings)
        return out * 1.001, lse

    monkeypatch.setattr(verify, "attention_reference", wrong)
    status, report = run(reader, monkeypatch)
    assert status == 1
    # Without factors the swap and the model's own eager attention still agree.
    unmoved = ("no factors: atman", "perturbations run", *NEED_TRAINING)
    exact = [n for n in report.checks if not n.startswith(unmoved) and not n.endswith("felt")]
    assert set(exact) <= set(report.failed)
