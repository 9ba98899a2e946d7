"""Text generation with SmolLM2 on the CPU: steady-state time per token, against eager and sdpa under torch.compile.

    python benchmarks/generation.py                both caches of transformers: the growing ("dynamic") and the static
    python benchmarks/generation.py static         one of them
    python benchmarks/generation.py --layers 4     with the first layers only, to try it out
    python benchmarks/generation.py --json         the same as JSON
    python benchmarks/generation.py --write        keeps the figures in benchmarks/results/generation.json
                                                   (of one cache: generation-dynamic.json, generation-static.json)

`model.generate`, greedy, one prompt, fp32. Every token's time is taken where generate hands it out; the first tokens of
a text (prefill, and what compiles) do not count. The three models take turns, text by text, in one process. After the
first text nothing may compile any more: the later prompts have other lengths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import einscade
from benchmarks import record
from examples import pretrained

NEW_TOKENS = 64
FIRST = 8  # tokens of a text that do not count
PROMPTS = (100, 61, 130)  # lengths: the first text compiles, the others are measured
BOUND = 1.0
VARIANTS = ("eager", "sdpa", "einscade")
CACHES = ("dynamic", "static")


class Clock:
    """A streamer, which generate gives each token as soon as it is known: the time of each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def steps(self) -> list[float]:
        """Seconds from one token to the next, without the first ones of the text."""
        times = self.times[1 + FIRST :]  # the prompt is put first
        return [b - a for a, b in itertools.pairwise(times)]


def load(layers: int | None) -> dict[str, Any]:
    """SmolLM2 with eager and with sdpa attention; only its first `layers` where a number is given."""
    models = {attention: pretrained.smollm2(attention) for attention in ("eager", "sdpa")}
    for model in models.values():
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = len(model.model.layers)
    return models


def build(variant: str, loaded: Mapping[str, Any]) -> Any:
    """The model as it is, with sdpa under torch.compile, or ours."""
    if variant == "einscade":
        return einscade.optimize(loaded["eager"], inner="inductor", dynamic=True)
    model = loaded[variant]
    model._compiled_call_impl = None
    if variant == "sdpa":
        model.compile(dynamic=True)
    return model


def generate(model: Any, prompt: torch.Tensor, cache: str) -> tuple[torch.Tensor, list[float], float]:
    """The new tokens, the seconds between those that count, and the seconds to the first."""
    clock = Clock()
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(prompt, streamer=clock, **settings)
    return out[0, prompt.shape[1] :], clock.steps(), clock.times[1] - started


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(cache: str, prompts: Sequence[torch.Tensor], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """All variants with one kind of cache. `prompts`: the first is for compiling, the others are measured."""
    torch._dynamo.reset()
    models = {name: build(name, loaded) for name in VARIANTS}
    graphs: dict[str, int] = dict.fromkeys(VARIANTS, 0)
    later: dict[str, int] = dict.fromkeys(VARIANTS, 0)
    steps: dict[str, list[float]] = {name: [] for name in VARIANTS}
    prefill: dict[str, list[float]] = {name: [] for name in VARIANTS}
    first_text: dict[str, float] = {}
    different = dict.fromkeys(VARIANTS, 0)
    for turn, prompt in enumerate(prompts):
        expected: torch.Tensor | None = None
        for name, model in models.items():
            before, started = compiled_graphs(), time.perf_counter()
            tokens, times, first = generate(model, prompt, cache)
            new = compiled_graphs() - before
            expected = tokens if expected is None else expected
            different[name] += int((tokens != expected).sum())
            if turn == 0:
                graphs[name], first_text[name] = new, time.perf_counter() - started
            else:
                later[name] += new
                steps[name] += times
                prefill[name].append(first)
    fast = models["einscade"]
    seconds = {name: statistics.median(t) for name, t in steps.items()}
    return {
        "ms_per_token": {name: 1e3 * s for name, s in seconds.items()},
        "vs_sdpa": seconds["einscade"] / seconds["sdpa"],
        "vs_eager": seconds["einscade"] / seconds["eager"],
        "first_token_s": {name: statistics.median(t) for name, t in prefill.items()},
        "first_text_s": first_text,
        "graphs": graphs,
        "graphs_later": later,
        "different_tokens": different,
        "tokens": NEW_TOKENS * len(prompts),
        "sites": len(fast.report.sites),
        "sites_rewritten": sum(site.status == "rewritten" for site in fast.report.sites),
        "kernels": sorted({site.kernel.candidate for site in fast.report.sites}),
        "quartiles_ms": {name: [1e3 * q for q in statistics.quantiles(t, n=4)] for name, t in steps.items()},
    }


def holds(figures: dict[str, Any]) -> bool:
    """No slower than sdpa, the same tokens, and nothing compiled once it runs."""
    fast = "einscade"
    same = figures["different_tokens"][fast] == 0 and figures["graphs_later"][fast] == 0
    return same and figures["vs_sdpa"] <= BOUND


def table(figures: dict[str, dict[str, Any]]) -> str:
    rows = [f"{'cache':<9}{'model':<10}{'ms/token':>9}{'first token':>13}{'graphs':>8}{'later':>7}{'other tokens':>14}"]
    for cache, f in figures.items():
        for name in VARIANTS:
            rows.append(
                f"{cache:<9}{name:<10}{f['ms_per_token'][name]:>9.2f}{1e3 * f['first_token_s'][name]:>10.0f} ms"
                f"{f['graphs'][name]:>8}{f['graphs_later'][name]:>7}{f['different_tokens'][name]:>7} of {f['tokens']}"
            )
        verdict = "ok" if holds(f) else "MISSED"
        ratios = f"{f['vs_sdpa']:.3f} × sdpa under torch.compile (bound {BOUND:g}), {f['vs_eager']:.3f} × eager"
        rows.append(f"{cache}: {ratios}, {f['sites_rewritten']} of {f['sites']} sites  {verdict}")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("caches", nargs="*", help=f"default: {', '.join(CACHES)}")
    parser.add_argument("--layers", type=int, help="only so many of the model's layers")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/generation.json")
    args = parser.parse_args()
    if unknown := set(args.caches) - set(CACHES):
        parser.error(f"unknown cache {', '.join(sorted(unknown))}: choose from {', '.join(CACHES)}")
    if args.write and args.layers is not None:
        parser.error("--write keeps figures of the whole model only: leave --layers out")
    if args.write:
        record.check_clean()
    env = record.environment()
    tokenizer = pretrained.smollm2_tokenizer()
    text = pretrained.real_tokens(tokenizer, sum(PROMPTS))
    prompts = text.split(PROMPTS, dim=1)
    loaded, figures = load(args.layers), {}
    for cache in args.caches or CACHES:
        print(f"measuring the {cache} cache …", file=sys.stderr, flush=True)
        figures[cache] = measure(cache, prompts, loaded)
    print(json.dumps({"environment": env, "figures": figures}, indent=1) if args.json else table(figures))
    if args.write:
        name = "-".join(("generation", *args.caches))
        print(f"written to {record.write(name, figures, env)}", file=sys.stderr)
    return 0 if all(map(holds, figures.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
