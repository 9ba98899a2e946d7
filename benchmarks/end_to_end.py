"""Whole models on one GPU: einscade beside eager, sdpa under torch.compile, and FlexAttention, in one run.

    python benchmarks/end_to_end.py                        the table (models with random bfloat16 weights)
    python benchmarks/end_to_end.py gemma2-8k --layers 4   one workload, with fewer layers
    python benchmarks/end_to_end.py --tiny                 a few small layers on whatever device there is: does it run?
    python benchmarks/end_to_end.py --out FILE --commit ID JSON, for a machine without git

A workload is a transformers model of a published size, its depth cut to `--layers` so that the whole table fits into
ten minutes: time per layer is what is compared. Every variant computes the same call, after warm-up; medians of CUDA
events. Decoding is measured with a static cache that is full to the length, one token a call, each variant under a CUDA
graph of its own, so that what counts is the kernels and not Python. Before it is timed, einscade's output is compared
with that of eager in float32, at the shorter length `CHECKED`: if it errs by more than 1.5 times eager's own bfloat16
error, it has no time. Where a variant does not exist or does not fit, the row says why.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHECKED = 512
ROOM = 64
VARIANTS = ("eager", "sdpa", "flex", "einscade")


@dataclass(frozen=True)
class Workload:
    """`config`: arguments of the transformers configuration `family`, at full size but for its depth. `decode`: one
    token behind `length` cached ones, else a prefill of `length`."""

    name: str
    family: str
    length: int
    decode: bool = False
    encoder: bool = False
    config: dict[str, Any] = field(default_factory=dict)


LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 65536,
}  # fmt: skip
T5 = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16}
GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "max_position_embeddings": 16384,
}  # fmt: skip
WORKLOADS = (
    Workload("llama3-8b-8k", "llama", 8192, config=LLAMA),
    Workload("llama3-8b-32k", "llama", 32768, config=LLAMA),
    Workload("llama3-8b-decode-32k", "llama", 32768, decode=True, config=LLAMA),
    Workload("t5-large-encoder-4k", "t5", 4096, encoder=True, config=T5),
    Workload("gemma2-8k", "gemma2", 8192, config=GEMMA2),
)
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "sliding_window": 32,
}  # fmt: skip


def build(work: Workload, layers: int, device: str) -> Any:
    """The model in float32 with random weights, on the device."""
    import transformers

    depth = {"num_layers" if work.family == "t5" else "num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(work.family, **(work.config | depth), dropout_rate=0.0)
    kind = transformers.T5EncoderModel if work.encoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config) if work.encoder else kind.from_config(config)
    return model.float().eval().requires_grad_(False)


def variant(model: Any, name: str) -> Any:
    """What is called: the model with one of transformers' attentions, compiled unless it is eager."""
    import einscade

    torch._dynamo.reset()
    model.set_attn_implementation({"sdpa": "sdpa", "flex": "flex_attention"}.get(name, "eager"))
    if name == "eager":
        return model
    return einscade.optimize(model) if name == "einscade" else torch.compile(model)


def call_of(work: Workload, model: Any, config: Any, device: str) -> Callable[[], torch.Tensor]:
    """The measured call of a model; it gives the output."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (1, work.length), generator=generator).to(device)
    if work.encoder:
        return lambda: model(tokens).last_hidden_state
    if not work.decode:
        return lambda: model(tokens, use_cache=False, logits_to_keep=1).logits
    cache = filled_cache(config, work.length, next(model.parameters()))
    return lambda: model(tokens[:, -1:], past_key_values=cache).logits


def filled_cache(config: Any, length: int, like: torch.Tensor) -> Any:
    """A static cache with random keys and values in `length` positions and room for the calls that are measured."""
    from transformers import StaticCache

    cache = StaticCache(config=config, max_cache_len=length + ROOM)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(2)
    for layer in range(config.num_hidden_layers):
        state = torch.randn(1, heads, length, getattr(config, "head_dim", None) or width, generator=generator).to(like)
        cache.update(state, state.flip(2), layer, {"cache_position": torch.arange(length, device=like.device)})
    return cache


def graphed(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """The call as a CUDA graph; warm-up is the caller's."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def distance(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def measure(work: Workload, layers: int, device: str, names: tuple[str, ...], checked: int) -> dict[str, Any]:
    """Milliseconds, error and gigabytes of every variant, or why there are none."""
    model = build(work, layers, device)
    config = copy.deepcopy(model.config)
    short = replace(work, length=checked)
    with torch.no_grad():
        exact = call_of(short, variant(model, "eager"), config, device)()
        model = model.bfloat16()
        plain = distance(call_of(short, model, config, device)(), exact)
        found: dict[str, Any] = {"layers": layers, "eager_bf16_error": plain, "variants": {}}
        for name in names:
            try:
                found["variants"][name] = _measure_one(work, short, model, config, name, exact, plain, device)
            except Exception as problem:  # a variant that does not exist, or does not fit, is a result
                found["variants"][name] = {"problem": f"{type(problem).__name__}: {problem}".splitlines()[0][:300]}
            print(f"{work.name} {name}: {found['variants'][name]}", file=sys.stderr, flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def _measure_one(
    work: Workload, short: Workload, model: Any, config: Any, name: str, exact: torch.Tensor, plain: float, device: str
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if name == "einscade":
        result["error"] = distance(call_of(short, variant(model, name), config, device)(), exact)
        if not result["error"] <= 1.5 * plain:
            raise AssertionError(f"error {result['error']:.1e} where eager in bfloat16 has {plain:.1e}")
    compiled = variant(model, name)  # compiled for the measured length alone
    call = call_of(work, compiled, config, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - started
    for _ in range(2):
        call()
    timed = graphed(call) if work.decode and device == "cuda" else call
    result |= {"ms": milliseconds(timed, device), "first_call_s": first}
    if device == "cuda":
        result["gigabytes"] = torch.cuda.max_memory_allocated() / 2**30
    if name == "einscade":
        sites = compiled.report.sites
        result["sites"] = len(sites)
        result["rewritten"] = sum(s.status == "rewritten" for s in sites)
        result["kernels"] = sorted({s.kernel.candidate for s in sites if s.kernel is not None})
    return result


def line(work: Workload, found: dict[str, Any]) -> str:
    """A row of the table: milliseconds of every variant, and einscade's time as a part of the best other's."""
    variants = found["variants"]
    cells = [f"{variants[n]['ms']:.2f}" if "ms" in variants.get(n, {}) else "–" for n in VARIANTS]
    others = [v["ms"] for n, v in variants.items() if n != "einscade" and "ms" in v]
    ours = variants.get("einscade", {}).get("ms")
    ratio = f"{ours / min(others):.2f} ×" if ours and others else "–"
    return f"| {work.name}, {found['layers']} layers | " + " | ".join([*cells, ratio]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"default: all of {', '.join(w.name for w in WORKLOADS)}")
    parser.add_argument("--layers", type=int, default=4, help="depth of every model (default 4)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--tiny", action="store_true", help="small models and lengths: a test, not a measurement")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    args = parser.parse_args()
    unknown = set(args.workloads) - {w.name for w in WORKLOADS}
    if unknown:
        parser.error(
            f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join(w.name for w in WORKLOADS)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device: only --tiny runs without one")

    from benchmarks import record

    env = record.environment(args.commit)
    rows: dict[str, Any] = {}
    print("| ms | eager | sdpa, compiled | FlexAttention | einscade | of the best other |\n|---|---|---|---|---|---|")
    for work in WORKLOADS:
        if args.workloads and work.name not in args.workloads:
            continue
        checked, layers = CHECKED, args.layers
        if args.tiny:
            config = {k: SMALL.get(k, v) for k, v in work.config.items()}
            work = Workload(work.name, work.family, 80, work.decode, work.encoder, config)
            checked, layers = 48, 2
        try:
            rows[work.name] = measure(work, layers, device, tuple(args.variants), checked)
            print(line(work, rows[work.name]), flush=True)
        except Exception as problem:
            rows[work.name] = {"problem": f"{type(problem).__name__}: {problem}"[:300]}
            print(f"| {work.name} | {rows[work.name]['problem']} |", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": env, "figures": rows}, indent=1) + "\n")
    return int(any("problem" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
