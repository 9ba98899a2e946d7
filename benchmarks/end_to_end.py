"""Whole models on one GPU: einscade beside eager, sdpa under torch.compile, and FlexAttention, in one run.

    python benchmarks/end_to_end.py                        the table (models with random bfloat16 weights)
    python benchmarks/end_to_end.py gemma2-8k --layers 4   one workload, with fewer layers
    python benchmarks/end_to_end.py --tiny                 a few small layers on whatever device there is: does it run?
    python benchmarks/end_to_end.py --out FILE --commit ID JSON, for a machine without git

A workload is a transformers model of a published size, its depth cut to `--layers` so that the whole table fits into
ten minutes: time per layer is what is compared. Every variant computes the same call, after warm-up; medians of CUDA
events. Decoding is measured with a static cache that is full to the length, one token a call, each variant under a CUDA
graph of its own, so that what counts is the kernels and not Python. Einscade's output is compared with that of eager in
float32, at the shorter length `CHECKED`: if it errs by more than 1.5 times eager's own bfloat16 error, it has no time.
Where a variant does not exist or does not fit, the row says why.

Most of the time is compilers, in one thread each, and it grows with the layers. So all of the table's checks and first
calls are made beforehand, in processes of their own at once: what is timed afterwards finds torch.compile's part on
disk (`first_call_s` is with that), and einscade measures its kernels then, on an idle GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import apart

CHECKED = 512
ROOM = 64
VARIANTS = ("eager", "sdpa", "flex", "einscade")
AHEAD = ("check", "flex", "einscade", "sdpa")
"""What is done beforehand for each workload, the longest first."""
AT_ONCE = 14
"""As many of these as fit into 139 GiB with eight layers."""
AHEAD_SECONDS = 240.0


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


def build(work: Workload, layers: int, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with random weights, on the device."""
    import transformers

    depth = {"num_layers" if work.family == "t5" else "num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(work.family, **(work.config | depth), dropout_rate=0.0)
    kind = transformers.T5EncoderModel if work.encoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never more memory than that of the model
    try:
        with torch.device(device):
            model = kind(config) if work.encoder else kind.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval().requires_grad_(False)


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


def milliseconds(call: Callable[[], object], device: str) -> float:
    """The median of three calls, and of up to seven as long as they take less than a second together."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 7 and sum(times) < 1e3):
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


def errors(work: Workload, layers: int, device: str) -> dict[str, Any]:
    """Eager's error in bfloat16 against float32, and einscade's, or what went wrong with it."""
    model = build(work, layers, device)
    config = copy.deepcopy(model.config)
    with torch.no_grad():
        exact = call_of(work, variant(model, "eager"), config, device)()
        model = model.bfloat16()
        found: dict[str, Any] = {"eager_bf16_error": distance(call_of(work, model, config, device)(), exact)}
        try:
            found["error"] = distance(call_of(work, variant(model, "einscade"), config, device)(), exact)
        except Exception as problem:
            found["problem"] = _said(problem)
    return found


def checked_ahead(names: Sequence[str], variants: Sequence[str], options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`errors` by workload, where there was time for them; meanwhile each variant's compiler filled its caches.
    `options`: of this program, for its own calls of itself."""
    jobs = [(name, job) for job in AHEAD if job in ("check", *variants) for name in names]
    this = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as decisions:  # which kernels are best is not decided on a GPU that others use
        settings = {"EINSCADE_AUTOTUNE": "0", "EINSCADE_CACHE_DIR": decisions}
        commands = [[this, name, *options, "--ahead", job] for name, job in jobs]
        said = apart.lines(commands, min(AT_ONCE, os.cpu_count() or 1), AHEAD_SECONDS, [settings] * len(jobs))
    return {name: lines[0] for (name, job), lines in zip(jobs, said, strict=True) if job == "check" and lines}


def _ahead(work: Workload, layers: int, checked: int, device: str, job: str, log: Path) -> None:
    """One process of `checked_ahead`."""
    if job == "check":
        apart.append(log, errors(replace(work, length=checked), layers, device))
        return
    model = build(work, layers, device, torch.bfloat16)
    with torch.no_grad():
        call_of(work, variant(model, job), copy.deepcopy(model.config), device)()


def measure(work: Workload, layers: int, device: str, names: tuple[str, ...], checks: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds, error and gigabytes of every variant, or why there are none. `checks`: its `errors`."""
    model = build(work, layers, device).bfloat16()
    config = copy.deepcopy(model.config)
    plain = checks["eager_bf16_error"]
    found: dict[str, Any] = {"layers": layers, "eager_bf16_error": plain, "variants": {}}
    for name in names:
        result: dict[str, Any] = {}
        try:
            if name == "einscade":
                result = {key: checks[key] for key in ("error", "problem") if key in checks}
                if not checks.get("error", 0.0) <= 1.5 * plain:
                    raise AssertionError(f"error {result['error']:.1e} where eager in bfloat16 has {plain:.1e}")
            if "problem" not in result:
                with torch.no_grad():
                    result |= _measure_one(work, model, config, name, device)
        except Exception as problem:  # a variant that does not exist, or does not fit, is a result
            result = {"problem": _said(problem)}
        found["variants"][name] = result
        print(f"{work.name} {name}: {result}", file=sys.stderr, flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]


def _measure_one(work: Workload, model: Any, config: Any, name: str, device: str) -> dict[str, Any]:
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
    result = {"ms": milliseconds(timed, device), "first_call_s": first}
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
    parser.add_argument("--layers", type=int, default=8, help="depth of every model (default 8)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--tiny", action="store_true", help="small models and lengths: a test, not a measurement")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    parser.add_argument("--ahead", nargs=2, help=argparse.SUPPRESS)  # a process of `checked_ahead`: what, and its log
    args = parser.parse_args()
    unknown = set(args.workloads) - {w.name for w in WORKLOADS}
    if unknown:
        parser.error(
            f"unknown workload {', '.join(sorted(unknown))}: choose from {', '.join(w.name for w in WORKLOADS)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device: only --tiny runs without one")

    works = [w for w in WORKLOADS if not args.workloads or w.name in args.workloads]
    checked, layers = CHECKED, args.layers
    if args.tiny:
        works = [replace(w, length=80, config={k: SMALL.get(k, v) for k, v in w.config.items()}) for w in works]
        checked, layers = 48, 2
    if args.ahead:
        job, log = args.ahead
        _ahead(works[0], layers, checked, device, job, Path(log))
        return 0

    from benchmarks import record

    env = record.environment(args.commit)
    rows: dict[str, Any] = {}
    ahead = {} if args.tiny else checked_ahead([w.name for w in works], args.variants, ["--layers", str(layers)])
    print("| ms | eager | sdpa, compiled | FlexAttention | einscade | of the best other |\n|---|---|---|---|---|---|")
    for work in works:
        try:
            checks = ahead.get(work.name) or errors(replace(work, length=checked), layers, device)
            rows[work.name] = measure(work, layers, device, tuple(args.variants), checks)
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
