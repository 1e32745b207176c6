"""Check atman_triton on a public model: is the swap exact, do factors act, is the answer right?

    python examples/verify_real_model.py --model HuggingFaceTB/SmolLM2-135M --revision main

Needs a network for the download, or a folder as ``--model``, and memory for the model three times
over: a copy in float64 (``--truth float32`` for large models) says what is exact. Prints a table
and exits with 0 if every check passed, with 1 if one failed.

The truth is the readable oracle, put into the model by this file; it shares no code with the
kernels or with ``atman_triton/integration.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    __version__,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import atman_triton as atman
from atman_triton.kernels.reference import attention_reference
from atman_triton.testing import assert_close_to_oracle

DOCUMENT = (
    "Anna lives in Paris and works as a nurse.",
    "Boris lives in Rome and works as a baker.",
    "Clara lives in Oslo and works as a pilot.",
)
# What is asked, how it is answered, and the sentence of DOCUMENT that says so.
QUESTIONS = (
    (" Question: Where does Boris live? Answer: Boris lives in", " Rome and works as a baker.", 1),
    (" Question: Where does Clara live? Answer: Clara lives in", " Oslo and works as a pilot.", 2),
)
MODES = ("min_shift", "multiplicative", "log_additive")
FACTOR = 0.1


@dataclass
class Manipulation:
    """What the oracle attention applies inside a model."""

    key_factor: Tensor | None = None  # [B, T]
    mode: str = "min_shift"
    layers: tuple[int, ...] | None = None
    first_row: int = 0  # queries before it are left alone, as for a direct effect
    calls: int = 0


class NoOracleError(RuntimeError):
    """The model never calls a registered attention, so the oracle cannot be put into it."""


@dataclass
class Report:
    """Checks by name: whether each passed, and what was seen."""

    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def add(self, name: str, passed: bool, seen: str) -> None:
        """Add one check."""
        self.checks[name] = passed, seen

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, (passed, _) in self.checks.items() if not passed]

    def table(self) -> Table:
        """All checks, to print."""
        table = Table("check", "result", "seen")
        for name, (passed, seen) in self.checks.items():
            table.add_row(
                escape(name), "[green]ok[/]" if passed else "[red]FAILED[/]", escape(seen)
            )
        return table

    def compare(self, name: str, actual: Tensor, eager: Tensor, truth: Tensor) -> None:
        """Add the check that ``actual`` is as close to ``truth`` as eager attention is."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                assert_close_to_oracle(actual, eager, truth.double(), name="logits")
                seen = printed.getvalue().removeprefix("logits: ").split(", allowed")[0]
                self.add(name, True, seen)
            except AssertionError as wrong:
                self.add(name, False, str(wrong))


APPLIED = Manipulation()


def oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer by the oracle, with the factors of ``APPLIED``."""
    APPLIED.calls += 1
    added = attention_mask[..., : key.shape[2]]
    visible = added > torch.finfo(added.dtype).min / 2
    bias = torch.where(visible, added, 0.0) if position_bias is None else position_bias
    reached = APPLIED.layers is None or getattr(module, "layer_idx", None) in APPLIED.layers
    factor = APPLIED.key_factor if reached else None
    if factor is not None:
        factor = factor.to(query.dtype).expand(query.shape[0], -1)
    settings: dict[str, Any] = {
        "mode": APPLIED.mode,
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "position_bias": bias.to(query.dtype),
        "mask": visible,
    }
    out, _ = attention_reference(query, key, value, factor, **settings)
    if APPLIED.first_row:
        plain, _ = attention_reference(query, key, value, **settings)
        out = torch.cat([plain[:, :, : APPLIED.first_row], out[:, :, APPLIED.first_row :]], 2)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("verify_oracle", oracle_attention)
AttentionMaskInterface.register("verify_oracle", eager_mask)


@contextlib.contextmanager
def implementation(model: Any, name: str) -> Iterator[Any]:
    """``model`` with another attention implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def by_oracle(model: Any, ids: Tensor, **manipulation: Any) -> Tensor:
    """Logits ``[T, V]`` of ``ids [1, T]`` by the oracle, in the model's dtype."""
    global APPLIED
    APPLIED = Manipulation(**manipulation)
    try:
        with implementation(model, "verify_oracle"):
            logits = model(ids, use_cache=False).logits[0]
        if not APPLIED.calls:
            raise NoOracleError(f"{type(model).__name__} calls no registered attention function")
        return logits
    finally:
        APPLIED = Manipulation()


def by_atman(model: Any, ids: Tensor, cache: str = "none", **manipulation: Any) -> Tensor:
    """Logits ``[T, V]`` by the swap; with a cache in two steps, the second on the first's keys."""
    with implementation(model, "atman"), atman.manipulate(model, **manipulation):
        if cache == "none":
            return model(ids, use_cache=False).logits[0]
        if cache == "static":
            kept: Any = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 8)
        else:
            kept = DynamicCache(config=model.config)
        half = ids.shape[1] // 2
        parts = [
            model(part, past_key_values=kept, use_cache=True).logits[0]
            for part in (ids[:, :half], ids[:, half:])
        ]
        return torch.cat(parts)


def check_swap(report: Report, model: Any, exact: Any, ids: Tensor) -> None:
    """The swap against eager attention: without factors, with them, in one layer, with caches."""
    with implementation(model, "eager"):
        eager = model(ids, use_cache=False).logits[0]
    with implementation(model, "atman"):
        plain = model(ids, use_cache=False).logits[0]
    truth = by_oracle(exact, ids)
    report.compare("no factors: the oracle is this model", eager, by_oracle(model, ids), truth)
    report.compare("no factors: atman like eager", plain, eager, truth)

    key_factor = torch.ones(1, ids.shape[1], device=ids.device)
    key_factor[0, 1 :: max(2, ids.shape[1] // 8)] = FACTOR
    for mode in MODES:
        chosen = {"key_factor": key_factor, "mode": mode}
        single, double = (by_oracle(m, ids, **chosen) for m in (model, exact))
        report.compare(f"factors, {mode}", by_atman(model, ids, **chosen), single, double)
        effect = (double - truth).abs().max().item()
        noise = (single.double() - double.double()).abs().max().item()
        report.add(
            f"factors, {mode}: felt",
            effect > 10 * noise,
            f"logits move by {effect:.3g}, rounding is {noise:.1e}",
        )

    chosen = {"key_factor": key_factor, "mode": "min_shift"}
    single, double = (by_oracle(m, ids, **chosen) for m in (model, exact))
    for cache in ("dynamic", "static"):
        found = by_atman(model, ids, cache, **chosen)
        report.compare(f"factors with a {cache} cache", found, single, double)
    layer = (model.config.get_text_config().num_hidden_layers - 1,)
    single, double = (by_oracle(m, ids, **chosen, layers=layer) for m in (model, exact))
    found = by_atman(model, ids, **chosen, layers=list(layer))
    report.compare("factors in the last layer only", found, single, double)


def check_explanation(report: Report, model: Any, exact: Any, tokenizer: Any) -> None:
    """Explanations against the oracle, and against what the text says."""
    settings: dict[str, Any] = {"method": "exact", "factor": FACTOR, "progress": False}
    explainer = atman.Explainer(model, tokenizer, **settings)
    tops = []
    for asked, target, sentence in QUESTIONS:
        prompt = " ".join(DOCUMENT) + asked
        found = explainer.explain(prompt, target)
        if not tops:
            alone = atman.Explainer(model, tokenizer, batch_size=1, **settings)
            several = explainer.explain(prompt, targets=[asked for _, asked, _ in QUESTIONS])
            runs = {
                "in batches": found,
                "one by one": alone.explain(prompt, target),
                "among several targets": several.branch(0),
            }
            ids = tokenizer(prompt).input_ids
            check_scores(report, model, exact, ids, runs)
            runner = found.provenance["runner"]
            why = "; ".join(found.provenance["runner_reasons"])
            report.add("perturbations run", True, f"{runner} {why}".strip())
            if runner == "shared_prefix":
                settings["method"] = "direct"
                direct = atman.Explainer(model, tokenizer, **settings)
                runs = {"of direct effects": direct.explain(prompt, target)}
                check_scores(report, model, exact, ids, runs, first_row=len(ids) - 1)
        tops.append(top_sentence(found))
        said = "none" if tops[-1] is None else DOCUMENT[tops[-1]]
        report.add(f"evidence for {target!r}", tops[-1] == sentence, f"most relevant: {said}")
    report.add("another question, another sentence", len(set(tops)) == len(tops), f"{tops}")


def check_scores(
    report: Report,
    model: Any,
    exact: Any,
    prompt: list[int],
    runs: dict[str, Any],
    first_row: int = 0,
) -> None:
    """The base run and the strongest unit's of each explanation in ``runs`` against the oracle."""
    found = next(iter(runs.values()))
    first = found.targets[0].token
    ids = prompt[:first] + [target.token_id for target in found.targets]
    tokens = torch.tensor([ids[:-1]], device=model.device)
    wanted = torch.tensor(ids[first:], device=model.device)
    strongest = int(found.relevance.nan_to_num(-torch.inf).argmax())
    key_factor = torch.ones(1, tokens.shape[1], device=model.device)
    key_factor[0, list(found.units[strongest].tokens)] = FACTOR

    def logprobs(chosen: Any, factors: Tensor | None) -> Tensor:
        manipulation = {"key_factor": factors, "mode": "min_shift", "first_row": first_row}
        logits = by_oracle(chosen, tokens, **manipulation)[first - 1 :]
        upcast = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits, -1, dtype=upcast).gather(1, wanted[:, None])[:, 0].cpu()

    single, truth = (
        torch.cat([logprobs(chosen, factors) for factors in (None, key_factor)])
        for chosen in (model, exact)
    )
    for how, run in runs.items():
        seen = torch.cat([run.base_logprobs, run.suppressed_logprobs[:, strongest]])
        scored = ~seen.isnan()  # a unit of the target has no score where it stands
        unit = run.units[strongest].text
        report.compare(f"explanation {how}, {unit!r}", seen[scored], single[scored], truth[scored])


def top_sentence(found: Any) -> int | None:
    """Index of the document's sentence that holds its most relevant unit."""
    start, sentences = 0, []
    for sentence in DOCUMENT:
        at = found.text.index(sentence, start)
        sentences.append((at, at + len(sentence)))
        start = at + len(sentence)
    order = found.relevance.nan_to_num(-torch.inf).argsort(descending=True).tolist()
    for unit in (found.units[index] for index in order):
        for index, (start, stop) in enumerate(sentences):
            # A token's span may begin at the space before its word.
            if unit.start is not None and start <= unit.stop - 1 < stop:
                return index
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="name on the hub, or a folder")
    parser.add_argument(
        "--revision", help="commit, tag or branch on the hub; name one to repeat a run"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--truth", default="float64", choices=("float64", "float32"))
    options = parser.parse_args(arguments)

    load: dict[str, Any] = {"revision": options.revision} if options.revision else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **load)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), **load
    )
    model = model.to(options.device).eval()
    exact = copy.deepcopy(model).to(getattr(torch, options.truth))
    ids = tokenizer(" ".join(DOCUMENT) + QUESTIONS[0][0], return_tensors="pt").input_ids
    ids = ids.to(options.device)

    report = Report()
    console = Console()
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_swap(report, model, exact, ids),
        lambda: check_explanation(report, model, exact, tokenizer),
    )
    with torch.no_grad():
        for check in checks:
            try:
                check()
            except atman.UnsupportedModelError as unsupported:
                report.add("supported", False, str(unsupported))
            except NoOracleError as missing:
                report.add("comparable with the oracle", False, str(missing))
    console.print(report.table())
    console.print(
        f"{type(model).__name__} {options.model} {options.revision or ''} {options.dtype} on"
        f" {options.device}, torch {torch.__version__}, transformers {__version__}:"
        f" {len(report.failed) or 'no'} failed"
    )
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
