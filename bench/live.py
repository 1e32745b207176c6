"""What it costs to score 20 units for every token while it is generated.

A 34M-parameter Llama generates greedily behind a prompt: ``model.generate`` with the attention that
it has by itself, and what ``generate_explained`` runs, with the prompt divided into equal units, in
the same process, in turns. Before anything is timed, both must write the same tokens, and the
scores must be those of a direct explanation of the finished text. Live scores may cost at most as
much again as the generation: half of its tokens per second. Run it on an otherwise idle machine::

    python -m bench.live              # 256 prompt tokens, 64 new ones, 2 threads
    python -m bench.live --tiny       # seconds, to see that it runs

Rows go to ``bench/results/<device>.csv``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from atman_triton.engine import Engine, Record, Settings, Unit, undisturbed
from atman_triton.live import EVERY
from atman_triton.live_run import Ambient, LiveRun, Scored
from atman_triton.lockstep import Lockstep
from bench.explaining import FACTOR, LLAMA_34M, MODE, LlamaShape
from bench.harness import RESULTS, Row, report, summarise, take_turns, write_rows

WHAT = f"live citations, {MODE}"
PLAIN, LIVE = "generate", "generate_explained"
LEAST = 0.5  # of the tokens per second of plain generation
TINY = LlamaShape("llama-tiny", 48, 2, 6, 2, 96, vocabulary=512)
_CLOSE = 1e-3  # nats; float32 sums of one row and of many differ by some 1e-5


class Case:
    """A model, a prompt in equal units, how many tokens to write and to score at a time."""

    def __init__(
        self,
        model: Any,
        prompt: int,
        units: int,
        new_tokens: int,
        every: int,
        backend: str = "auto",
    ) -> None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = None
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=generator)
        self.new_tokens = new_tokens
        self.every = every
        self.settings = Settings(FACTOR, MODE, backend=backend)
        edges = [prompt * unit // units for unit in range(units + 1)]
        self.units = [tuple(range(*edge)) for edge in pairwise(edges)]

    def plain(self) -> list[int]:
        """The new tokens of ``generate``."""
        ids = self.ids[None].to(self.model.device)
        written = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.new_tokens,
            do_sample=False,
        )
        return written[0, ids.shape[1] :].tolist()

    def live(self) -> list[Scored]:
        """The same, each with the log-probabilities of the plain row and of every unit's."""
        run = LiveRun(
            self.model,
            self.ids.tolist(),
            self.units,
            self.settings,
            self.every,
            {"max_new_tokens": self.new_tokens, "do_sample": False},
            None,
            Record(),
            Ambient.of_this_thread(self.model),
        )
        return list(Lockstep(run))

    def check(self) -> None:
        """Refuse to time another text or wrong scores.

        Raises: AssertionError: if either is found.
        """
        found = self.live()
        written = [token.token_id for token in found]
        assert written == self.plain(), "live generation writes another text"
        inputs = {"input_ids": self.ids[None]}
        with undisturbed(self.model):
            engine = Engine(self.model, inputs, [written], self.settings)
            wanted = engine.perturb([Unit(unit) for unit in self.units], "direct")  # [U, T]
        rows = torch.stack([token.logprobs for token in found]).T  # [1 + U, T]
        for name, one, other in (
            ("plain", rows[0], engine.base_logprobs),
            ("units", rows[1:], wanted),
        ):
            error = float((one - other).abs().max())
            assert error < _CLOSE, f"live log-probabilities ({name}) are off by {error:.2g} nats"


def rows_of(case: Case, name: str, times: dict[str, list[float]]) -> list[Row]:
    """Tokens per second of both, the prompt's pass included, and the cost of a round's pair."""
    model, new_tokens = case.model, case.new_tokens
    shape = f"{name}-prompt{len(case.ids)}-new{new_tokens}-units{len(case.units)}-every{case.every}"
    place: dict[str, Any] = {
        "what": WHAT,
        "shape": shape,
        "dtype": model.dtype,
        "device": model.device,
    }
    speeds = {name: [1e3 * new_tokens / spent for spent in own] for name, own in times.items()}
    ratios = [live / plain for live, plain in zip(speeds[LIVE], speeds[PLAIN], strict=True)]
    return [
        *summarise(speeds, metric="tokens/s", **place),
        *summarise({LIVE: ratios}, metric=f"tokens/s, share of {PLAIN}", **place),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 1 if live scores cost more than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--units", type=int, default=20, help="units of the prompt")
    parser.add_argument(
        "--every", type=int, default=EVERY["cpu"], help="tokens that are scored at a time"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=10, help="at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="about, of all rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, a few tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    shape = TINY if options.tiny else LLAMA_34M
    prompt, new_tokens = (24, 4) if options.tiny else (options.prompt, options.new)
    rounds = 2 if options.tiny else options.rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        model = shape.model(torch.float32, device, prompt + new_tokens)
        case = Case(model, prompt, options.units, new_tokens, options.every)
        case.check()
        times = take_turns(
            {PLAIN: case.plain, LIVE: case.live}, device, seconds=options.seconds, most=rounds
        )
    finally:
        torch.set_num_threads(threads)
    rows = rows_of(case, shape.name, times)
    path = write_rows(rows, options.out)
    print(f"rows in {path}", file=sys.stderr)
    print(report(rows[:2], PLAIN))
    share = rows[-1]
    met = verdict(share.median)
    print(
        f"live citations run at {share.median:.2f} [{share.p20:.2f}, {share.p80:.2f}] of the speed "
        f"of plain generation, at least {LEAST} required: {'yes' if met else 'NO'}"
    )
    return int(not met)


def verdict(share: float) -> bool:
    """Whether the cost is allowed."""
    return share >= LEAST


if __name__ == "__main__":
    sys.exit(main())
