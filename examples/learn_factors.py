"""Learn one factor per token of a prompt so that the model gives another answer.

The shipped model reads a contract and is asked for the pay per hour, which it gets right. Factors
are trained, and nothing else, until it answers with the travel allowance instead, which stands in
another sentence. Which tokens must be heard more, and which less, for that?

    python examples/learn_factors.py
    python examples/learn_factors.py --answer " $33.80" --keep 0.01
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import atman_triton as atman
from atman_triton.demo import demo_prompt, load_demo_model

MODE = "min_shift"


def loss_of(model: Any, ids: Tensor, answer: Tensor) -> Tensor:
    """Negative log-probability of the answer behind the prompt, nats; both ``[1, tokens]``."""
    rows = torch.cat([ids, answer[:, :-1]], dim=1)
    logits = model(rows, use_cache=False, logits_to_keep=answer.shape[1]).logits
    return torch.nn.functional.cross_entropy(logits[0], answer[0], reduction="sum")


def learn(
    model: Any, ids: Tensor, answer: Tensor, *, steps: int, rate: float, keep: float
) -> Tensor:
    """Factors ``[1, tokens]``, one per token of the prompt, that make the answer likely.

    Args:
        ids, answer: tokens of the prompt and of the answer, ``[1, tokens]``.
        steps, rate: of Adam.
        keep: nats that it costs to move one factor by 1, so that few move.
    """
    factor = torch.nn.Parameter(torch.ones(ids.shape))
    optimizer = torch.optim.Adam([factor], lr=rate)
    for _ in track(range(steps), "Learning factors", console=Console(stderr=True)):
        optimizer.zero_grad()
        with atman.manipulate(model, factor, mode=MODE):
            loss = loss_of(model, ids, answer) + keep * (factor - 1).abs().sum()
        loss.backward()
        optimizer.step()
    return factor.detach()


def main(arguments: list[str] | None = None) -> int:
    """Print what was learned; 0 if the model now gives the answer asked for, 1 if not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--answer", default=" $24.20", help="what it shall answer instead")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate of Adam")
    parser.add_argument("--keep", type=float, default=0.1, help="nats to move a factor by 1")
    parser.add_argument("--show", type=int, default=10, help="tokens to print")
    options = parser.parse_args(arguments)

    model: Any
    model, tokenizer = load_demo_model()
    model.requires_grad_(False)
    prompt = demo_prompt()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = tokenizer(options.answer, return_tensors="pt")["input_ids"]

    def answered(factor: Tensor) -> tuple[float, str]:
        """Probability of the answer, and what the model says by itself."""
        with torch.no_grad(), atman.manipulate(model, factor, mode=MODE):
            probability = (-loss_of(model, ids, answer)).exp().item()
            said = model.generate(ids, max_new_tokens=answer.shape[1] + 2, do_sample=False)
        return probability, str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))

    ones = torch.ones(ids.shape)
    factor = learn(model, ids, answer, steps=options.steps, rate=options.rate, keep=options.keep)
    console = Console()
    console.print(prompt, highlight=False, markup=False)
    table = Table()
    for name in ("factors", f"p({options.answer.strip()})", "the model says"):
        table.add_column(name)
    for name, used in (("all 1", ones), ("learned", factor)):
        probability, said = answered(used)
        table.add_row(name, f"{probability:.3g}", said.strip())
    console.print(table)

    moved = Table(title="Tokens whose factors moved most")
    for name in ("position", "token", "in", "factor"):
        moved.add_column(name, justify="right" if name in ("position", "factor") else "left")
    for place in (factor[0] - 1).abs().argsort(descending=True)[: options.show].tolist():
        around = tokenizer.decode(ids[0, max(0, place - 3) : place + 4])
        token = tokenizer.decode(ids[0, place])
        moved.add_row(str(place), repr(token), f"…{around}…", f"{factor[0, place]:.2f}")
    console.print(moved)
    return 0 if answered(factor)[1].startswith(options.answer) else 1


if __name__ == "__main__":
    raise SystemExit(main())
