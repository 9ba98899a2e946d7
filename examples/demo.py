"""`make demo`: two pretrained models, their attention found, rewritten and compiled, and what that changed.

Everything that is printed is computed in this run. The exit status is 1 if a promise does not hold: every attention
site rewritten, the same tokens generated, logits and embeddings within their bounds, less memory than before.
`--short` keeps the same promises on shorter texts, measured once each, with the first layers of the decoder: what the
tests run.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import einscade

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import peak_extra_memory
from examples import pretrained

PROMPT = "Why is the sky blue?"
POSITIONS = 32  # that logits are computed for, spread over the text: all of them would hide attention's memory
MAX_LOGIT_ERROR = 1e-3
MAX_EMBEDDING_ERROR = 1e-5


@dataclass(frozen=True)
class Extent:
    """How much of everything: `repeats` of the measurements by number of tokens, how many tokens are generated, and by
    how many of the decoder's layers (None: by all)."""

    repeats: dict[int, int]
    new_tokens: int
    layers: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.repeats)


WHOLE = Extent({512: 3, 2048: 1}, new_tokens=64)
SHORT = Extent({384: 1, 768: 1}, new_tokens=24, layers=6)

console = Console(highlight=False)
Forward = Callable[[Any], Any]


class Promises:
    """What the demo says will hold; `failed` collects what did not."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        console.print(f"  [bold {'green' if holds else 'red'}]{'✓' if holds else '✗'}[/] {what}")
        if not holds:
            self.failed.append(what)


def optimise(name: str, model: Any, first_call: Forward, sites: int, promises: Promises) -> Any:
    """`einscade.optimize`, its first call under a progress bar, and the report."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"compiling {name}", total=sites)
        # the rest of the graph stays as it was, so that what changes is attention, and nothing waits for a C++ compiler
        fast = einscade.optimize(
            model,
            inner="eager",
            dynamic=True,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        first_call(fast)
    console.print(str(fast.report), markup=False, soft_wrap=True)
    rewritten = sum(site.status == "rewritten" for site in fast.report.sites)
    promises.check(
        rewritten == sites == len(fast.report.sites), f"{rewritten} of {sites} attention sites rewritten in {name}"
    )
    return fast


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute the same tensor: a table row of median times and peak memory, whether memory went down, and
    the largest difference between the results."""

    row: list[str]
    less_memory: bool
    error: float


def compare(what: str, before: Callable[[], Tensor], after: Callable[[], Tensor], repeats: int) -> Comparison:
    """Times, memory and results of the same calls, in turns; `after` is called once before, to choose its kernels."""
    seconds: dict[str, list[float]] = {"before": [], "after": []}
    peaks: dict[str, float] = {}
    results: dict[str, Tensor] = {}

    def timed(key: str, call: Callable[[], Tensor]) -> None:
        started = time.perf_counter()
        results[key] = call()
        seconds[key].append(time.perf_counter() - started)

    after()
    for _ in range(repeats):
        for key, call in (("before", before), ("after", after)):
            peaks[key] = peak_extra_memory(partial(timed, key, call)) / 2**20
    t0, t1 = (statistics.median(seconds[key]) for key in ("before", "after"))
    m0, m1 = peaks["before"], peaks["after"]
    times = [f"{t0:.2f} s", f"{t1:.2f} s", f"{t1 / t0:.2f} ×"]
    row = [what, *times, f"{m0:.0f} MiB", f"{m1:.0f} MiB", f"{m1 / m0:.2f} ×"]
    return Comparison(row, m1 < m0, float((results["before"] - results["after"]).abs().max()))


def comparison_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("", "time: eager", "optimised", "", "memory: eager", "optimised", ""):
        table.add_column(column, justify="right")
    return table


def language_model(extent: Extent, promises: Promises) -> None:
    console.rule("SmolLM2-135M-Instruct, eager attention, fp32")
    with console.status("loading"):
        model, tokenizer = pretrained.smollm2("eager"), pretrained.smollm2_tokenizer()
    if extent.layers is not None:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[: extent.layers], extent.layers
    tokens = pretrained.real_tokens(tokenizer, max(extent.lengths))

    def logits(m: Any, length: int) -> Tensor:
        positions = torch.linspace(0, length - 1, POSITIONS).long()
        return m(tokens[:, :length], use_cache=False, logits_to_keep=positions).logits

    layers = model.config.num_hidden_layers
    fast = optimise("SmolLM2", model, lambda m: logits(m, extent.lengths[0]), layers, promises)

    table = comparison_table("prefill of real text")
    smaller = []
    for length, repeats in extent.repeats.items():
        found = compare(f"{length} tokens", partial(logits, model, length), partial(logits, fast, length), repeats)
        promises.check(
            found.error <= MAX_LOGIT_ERROR,
            f"logits at {POSITIONS} of {length} tokens: largest difference {found.error:.1e}",
        )
        table.add_row(*found.row)
        smaller.append(found.less_memory)
    console.print(table)
    promises.check(all(smaller), "less memory at every length")

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    count = extent.new_tokens
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    with console.status("generating with the original"):
        expected = model.generate(**chat, **settings)[0, chat["input_ids"].shape[1] :]
    with console.status("generating with the optimised model (prefill and decoding compile once each)"):
        actual = fast.generate(**chat, **settings)[0, chat["input_ids"].shape[1] :]
    console.print(f"[dim]> {PROMPT}[/]\n{tokenizer.decode(actual, skip_special_tokens=True).strip()}", markup=True)
    same = int((expected == actual).sum()) if expected.shape == actual.shape else 0
    promises.check(same == count, f"{same} of {count} greedy tokens are the original's")


def encoder(extent: Extent, promises: Promises) -> None:
    console.rule("all-MiniLM-L6-v2, eager attention, fp32")
    with console.status("loading"):
        model, tokenizer = pretrained.minilm("eager"), pretrained.minilm_tokenizer()
    shortest = min(extent.lengths)  # 512 is all it takes
    ids = pretrained.real_tokens(tokenizer, max(extent.lengths)).reshape(-1, shortest)
    batches = {count: ids[: count // shortest] for count in extent.lengths}

    def embed(m: Any, batch: Tensor) -> Tensor:
        mask = torch.ones_like(batch)
        return pretrained.sentence_embedding(m(input_ids=batch, attention_mask=mask), mask)

    fast = optimise("MiniLM", model, lambda m: embed(m, ids), model.config.num_hidden_layers, promises)
    table = comparison_table("embedding of real text")
    repeats = max(extent.repeats.values())
    for count, batch in batches.items():
        found = compare(f"{count} tokens", partial(embed, model, batch), partial(embed, fast, batch), repeats)
        promises.check(
            found.error <= MAX_EMBEDDING_ERROR, f"embeddings of {count} tokens: largest difference {found.error:.1e}"
        )
        table.add_row(*found.row)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="shorter texts, measured once each")
    extent = SHORT if parser.parse_args(argv).short else WHOLE
    started = time.perf_counter()
    promises = Promises()
    with torch.no_grad():
        language_model(extent, promises)
        encoder(extent, promises)
    console.rule()
    threads = torch.get_num_threads()
    console.print(f"{time.perf_counter() - started:.0f} s on {threads} threads, torch {torch.__version__}")
    for failure in promises.failed:
        console.print(f"[bold red]did not hold:[/] {failure}")
    return 1 if promises.failed else 0


if __name__ == "__main__":
    sys.exit(main())
