"""A whole explanation, every prompt token, against a loop of eager forwards with full logits.

``python -m pytest bench/test_bench_explain.py -s`` prints the ratio.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import atman_triton as atman
from bench.eager import scores_by_eager_loop
from bench.harness import interleave, report, summarise, write_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "atman"
FACTOR, MODE = 0.1, "min_shift"  # the default preset's


@dataclasses.dataclass(frozen=True)
class Case:
    """A randomly initialised Llama and a text for it."""

    name: str
    width: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    dtype: torch.dtype
    prompt: int
    target: int
    loop_units: int  # the loop is timed on that many, and scaled to all
    limit: float | None = None  # our share of the loop's time may not be larger

    def __str__(self) -> str:
        return f"{self.name}-prompt{self.prompt}-target{self.target}"

    def model(self) -> LlamaForCausalLM:
        """The model, its weights large enough that suppressing a token is felt."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            initializer_range=0.05,
        )
        model = LlamaForCausalLM(config).eval()
        return model.to(device=DEVICE, dtype=self.dtype)  # pyright: ignore[reportCallIssue]


# Like the Llamas with this vocabulary it has an output head of its own, which with 34M parameters
# takes more of a full forward pass than the layers do.
CASES = [Case("llama-34M", 384, 6, 6, 2, 1024, torch.float32, 256, 4, 256, limit=0.45)]
if DEVICE.type == "cuda":
    CASES.append(Case("llama-1B", 2048, 16, 32, 8, 8192, torch.bfloat16, 1024, 4, 10))


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_explanation(benchmark, case: Case) -> None:
    model = case.model()
    tokens = torch.randint(0, 32000, (case.prompt + case.target,), device=DEVICE)
    prompt, target = tokens[: case.prompt], tokens[case.prompt :]
    explainer = atman.Explainer(model, None, factor=FACTOR, mode=MODE, progress=False)

    def ours() -> Tensor:
        return explainer.explain(prompt.tolist(), target=target.tolist()).scores

    def loop(units: range, model: LlamaForCausalLM = model) -> Tensor:
        return scores_by_eager_loop(model, prompt, target, units, factor=FACTOR, mode=MODE)

    scale = case.prompt / case.loop_units
    name = "eager loop, full logits"
    if scale > 1:
        name += f" ({case.loop_units} of {case.prompt} units, scaled)"
    some = range(0, case.prompt, case.prompt // 4)
    eager = loop(some)
    times = interleave(
        benchmark,
        OURS,
        {OURS: ours, name: lambda: loop(range(case.loop_units))},
        outputs={OURS: ours()[:, list(some)].to(DEVICE), name: eager},
        eager=eager,
        oracle=loop(some, copy.deepcopy(model).double()),
        device=DEVICE,
        rounds=3,
    )
    times[name] = [spent * scale for spent in times[name]]
    rows = summarise(
        times, what=f"explanation, {MODE}", shape=str(case), dtype=case.dtype, device=DEVICE
    )
    write_rows(rows)
    ratio = rows[0].median / rows[1].median
    print(f"\n{report(rows, OURS)}\n  explanation takes {ratio:.1%} of the loop's time")
    assert case.limit is None or ratio <= case.limit, f"{ratio:.1%} is above {case.limit:.0%}"
