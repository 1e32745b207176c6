"""What the set ``kernels`` prints: our rates beside the best rivals, and what is not among them.

Legend: B batch, Hq/Hk query/key heads, T tokens, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from bench.kernel_cases import MODES, Case
from bench.rivals import OURS, OURS_HOPPER, OURS_PORTABLE

Key = tuple[str, str]  # mode, provider
FUSED = (OURS, OURS_HOPPER)
_BESIDE = "triton/hopper"
_WORST = 20  # that are listed

# Of the last word of a provider's name, for the table.
LETTERS = {
    "cuDNN": "c",
    "FLASH": "f",
    "EFFICIENT": "e",
    "MATH": "t",
    "FlashAttention-4": "4",
    "FlexAttention": "x",
    "matrix": "a",
}


@dataclasses.dataclass
class Findings:
    """Milliseconds of a case by mode and provider, and the reasons of those not timed."""

    times: dict[Key, list[float]]
    reasons: dict[Key, str]

    def medians(self, mode: str) -> dict[str, float]:
        """By provider."""
        return {
            name: torch.tensor(spent).median().item()
            for (of, name), spent in self.times.items()
            if of == mode
        }


def cells_of(
    case: Case, found: Findings, peak: float, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """By mode: our TFLOP/s and share of the peak, or GB/s, and the best rival's time over ours.

    Ours is the faster of our kernels. The Hopper kernel's own lines are beside those of the modes.
    """
    cells: dict[str, str] = {}
    for mode in MODES:
        medians = found.medians(mode)
        own = our_time(medians)
        if own is None:
            cells[mode] = "-"
            continue
        rate, unit = case.rate(own, dtype)
        share = f" {1e12 * rate / peak:.0%}" if unit == "TFLOP/s" else unit
        which = "h" if own == medians.get(OURS_HOPPER) else ""
        cells[mode] = f"{rate:.3g}{which}{share}"
        rivals = {name: ms for name, ms in medians.items() if not name.startswith("atman")}
        if mode == "min_shift":
            base = our_time(found.medians("multiplicative"))
            cells[mode] += "" if base is None else f" {own / base:.2f}m"
        elif rivals:
            best = min(rivals, key=rivals.__getitem__)
            cells[mode] += f" {rivals[best] / own:.2f}{LETTERS[best.split()[-1]]}"
        gain = hopper_gain(medians)
        if gain is not None:
            cells[hopper_line(mode)] = f"{gain:.2f}" + (" SLOWER" if gain < 1 else "")
    return cells


def our_time(medians: dict[str, float]) -> float | None:
    """Of the faster fused kernel, or where none was timed (on a CPU) of the portable backend."""
    fused = [medians[name] for name in FUSED if name in medians]
    return min(fused, default=medians.get(OURS_PORTABLE))


def hopper_gain(medians: dict[str, float]) -> float | None:
    """How many times as fast as our portable kernel that for Hopper is; below 1 it is slower."""
    if not medians.keys() >= set(FUSED):
        return None
    return medians[OURS] / medians[OURS_HOPPER]


def hopper_line(mode: str) -> str:
    """The key of the line of :func:`hopper_gain`, below that of its mode."""
    return f"{mode} {_BESIDE}"


def never_slower(gains: Sequence[tuple[str, float]]) -> list[str]:
    """Whether the Hopper kernel was ever slower than our portable one, and where; by case."""
    slower = [(gain, place) for place, gain in gains if gain < 1]
    if not gains:
        return []
    if not slower:
        return [f"{OURS_HOPPER} is never slower than {OURS}: {len(gains)} cases"]
    title = f"{OURS_HOPPER} is SLOWER than {OURS} in {len(slower)} of {len(gains)} cases:"
    worst = [f"  {gain:.2f} {place}" for gain, place in sorted(slower)[:_WORST]]
    return [title, *worst, *(["  ..."] if len(slower) > _WORST else [])]


def table_of(cells: dict[Case, dict[str, str]]) -> list[str]:
    """Lengths side by side, a line for each mode of cases that share all else.

    Where the Hopper kernel was timed, another tells how it compares with the portable one.
    """
    lengths = sorted({case.tokens for case in cells})
    lines = [
        "TFLOP/s, % of torch.mm, and a ratio: the best rival's time over ours ("
        + ", ".join(f"{letter} {name}" for name, letter in LETTERS.items())
        + "), or our min_shift's time over our multiplicative's (m)"
        + f"; h marks ours by {OURS_HOPPER}, and {_BESIDE} is {OURS}'s time over its",
    ]
    families: dict[str, dict[int, dict[str, str]]] = {}
    for case, texts in cells.items():
        families.setdefault(case.family, {})[case.tokens] = texts
    for family, by_length in families.items():
        lines.append(family)
        lines.append(f"  {'':<15}" + "".join(f"{f'T{tokens}':>19}" for tokens in lengths))
        for mode in MODES:
            for name, label in ((mode, mode), (hopper_line(mode), f"  {_BESIDE}")):
                texts = [by_length.get(tokens, {}).get(name, "") for tokens in lengths]
                if name == mode or any(texts):
                    line = f"  {label:<15}" + "".join(f"{text:>19}" for text in texts)
                    lines.append(line.rstrip())
    return lines


def left_out(cases: Sequence[Case]) -> list[str]:
    """Cases that were not reached, lengths together."""
    families: dict[str, list[str]] = {}
    for case in cases:
        families.setdefault(case.family, []).append(f"T{case.tokens}")
    return [f"  {family}: {' '.join(lengths)}" for family, lengths in families.items()]


def not_timed(reasons: dict[tuple[str, str], list[str]]) -> list[str]:
    """Providers that could not run, each reason once with its number of cases and the first."""
    return [
        f"  {name}: {reason} [{len(places)}: {places[0]}{', ...' if len(places) > 1 else ''}]"
        for (name, reason), places in sorted(reasons.items())
    ]
