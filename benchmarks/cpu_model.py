"""SmolLM2 on the CPU: error, speed, memory and compile time against eager and against sdpa under torch.compile.

    python benchmarks/cpu_model.py             every figure beside its bound, in twenty minutes or so
    python benchmarks/cpu_model.py --json      the same as JSON
    python benchmarks/cpu_model.py --write     keeps them in benchmarks/results/cpu.json (only from a clean commit)
    python benchmarks/cpu_model.py error import   only these parts

Every part runs in processes of its own, with fresh caches where it says cold. Prefill is real text, without a cache of
keys and values and with the last position's logits, in fp32. Times that are compared are measured in turns in one
process, after warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PREFILL = 4096
ERROR_TOKENS = 2048
GREEDY_TOKENS = 64
COMPILE_TOKENS = 64  # short, so that the first call's time is the compiler's
RUNS = 3

# figure -> (bound, unit, what it is)
BOUNDS: dict[str, tuple[float, str, str]] = {
    "logit_error": (1e-3, "", f"max abs logit error against eager, {ERROR_TOKENS} real tokens"),
    "greedy_differences": (0, "tokens", f"greedy tokens that differ, of {GREEDY_TOKENS}"),
    "prefill_vs_eager": (0.30, "×", f"prefill of {PREFILL} tokens: time against eager"),
    "prefill_vs_sdpa": (1.02, "×", "the same against sdpa under torch.compile"),
    "import_s": (0.5, "s", "import einscade beyond import torch"),
    "memory_vs_eager": (0.35, "×", f"peak extra memory at {PREFILL} tokens against eager"),
    "cold_s": (20.0, "s", "optimise + first call beyond torch.compile, cold cache"),
    "warm_s": (5.0, "s", "the same, warm cache, new process"),
}


def _prefill(tokens: Any) -> Callable[[Any], Any]:
    import torch

    def call(model: Any) -> Any:
        with torch.no_grad():
            return model(tokens, use_cache=False, logits_to_keep=1)

    return call


def _variant(name: str) -> Any:
    """A model to call: "eager", "compiled" (eager attention, torch.compile), "sdpa" (compiled too) or "einscade"."""
    import torch

    import einscade
    from examples import pretrained

    model = pretrained.smollm2("sdpa" if name == "sdpa" else "eager")
    if name == "eager":
        return model
    return einscade.optimize(model, inner="inductor") if name == "einscade" else torch.compile(model)


def worker_error() -> dict[str, Any]:
    """Logit error and greedy tokens of the optimised model against eager."""
    import torch

    import einscade
    from examples import pretrained

    model, tokenizer = pretrained.smollm2("eager"), pretrained.smollm2_tokenizer()
    fast = einscade.optimize(model)
    tokens = pretrained.real_tokens(tokenizer, ERROR_TOKENS)
    settings = {"max_new_tokens": GREEDY_TOKENS, "min_new_tokens": GREEDY_TOKENS, "do_sample": False}
    with torch.no_grad():
        error = float((model(tokens).logits - fast(tokens).logits).abs().max())
        prompt = tokens[:, :100]
        expected, actual = (m.generate(prompt, **settings)[0, prompt.shape[1] :] for m in (model, fast))
    rewritten = sum(site.status == "rewritten" for site in fast.report.sites)
    return {
        "logit_error": error,
        "greedy_differences": int((expected != actual).sum()),
        "sites": len(fast.report.sites),
        "sites_rewritten": rewritten,
    }


def worker_prefill() -> dict[str, Any]:
    """Times of eager, of sdpa under torch.compile, and ours, in turns."""
    from benchmarks.measure import interleaved_medians
    from examples import pretrained

    call = _prefill(pretrained.real_tokens(pretrained.smollm2_tokenizer(), PREFILL))
    models = {name: _variant(name) for name in ("eager", "sdpa", "einscade")}
    medians = interleaved_medians({name: lambda m=m: call(m) for name, m in models.items()}, repeats=RUNS, warmup=1)
    seconds = {name: median for name, (median, _) in medians.items()}
    return {
        "prefill_vs_eager": seconds["einscade"] / seconds["eager"],
        "prefill_vs_sdpa": seconds["einscade"] / seconds["sdpa"],
        "prefill_s": seconds,
        "prefill_all_s": {name: all_times for name, (_, all_times) in medians.items()},
    }


def worker_memory(variant: str) -> dict[str, Any]:
    """Bytes that one warm prefill of `variant` needs beyond the model."""
    from benchmarks.measure import peak_extra_memory
    from examples import pretrained

    call, model = _prefill(pretrained.real_tokens(pretrained.smollm2_tokenizer(), PREFILL)), _variant(variant)
    call(model)
    return {"bytes": peak_extra_memory(lambda: call(model))}


def worker_compile(variant: str) -> dict[str, Any]:
    """Seconds of wrapping the model and its first call, with the caches that the environment names."""
    import torch

    import einscade
    from examples import pretrained

    model = pretrained.smollm2("eager")
    call = _prefill(pretrained.real_tokens(pretrained.smollm2_tokenizer(), COMPILE_TOKENS))
    started = time.perf_counter()
    call(einscade.optimize(model, inner="inductor") if variant == "einscade" else torch.compile(model))
    return {"seconds": time.perf_counter() - started}


def part_error() -> dict[str, Any]:
    return _work("error")


def part_prefill() -> dict[str, Any]:
    return _work("prefill")


def part_memory() -> dict[str, Any]:
    extra = {variant: _work("memory", variant)["bytes"] for variant in ("eager", "sdpa", "einscade")}
    return {
        "memory_vs_eager": extra["einscade"] / extra["eager"],
        "memory_vs_sdpa": extra["einscade"] / extra["sdpa"],
        "memory_bytes": extra,
    }


def part_import() -> dict[str, Any]:
    code = "import time, torch; t = time.perf_counter(); import einscade; print(time.perf_counter() - t)"
    times = [float(subprocess.check_output((sys.executable, "-c", code), text=True)) for _ in range(RUNS)]
    return {"import_s": statistics.median(times), "import_all_s": times}


def part_compile() -> dict[str, Any]:
    seconds: dict[str, dict[str, float]] = {"cold": {}, "warm": {}}
    for variant in ("compiled", "einscade"):
        with tempfile.TemporaryDirectory() as folder:
            caches = {"EINSCADE_CACHE_DIR": f"{folder}/einscade", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            for state in ("cold", "warm"):
                seconds[state][variant] = _work("compile", variant, environment=caches)["seconds"]
    return {
        "cold_s": seconds["cold"]["einscade"] - seconds["cold"]["compiled"],
        "warm_s": seconds["warm"]["einscade"] - seconds["warm"]["compiled"],
        "first_call_s": seconds,
    }


PARTS = {
    "error": part_error,
    "import": part_import,
    "memory": part_memory,
    "compile": part_compile,
    "prefill": part_prefill,
}
WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "error": worker_error,
    "prefill": worker_prefill,
    "memory": worker_memory,
    "compile": worker_compile,
}


def _work(*worker: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a worker in a new process; what it prints last is its answer."""
    command = (sys.executable, __file__, "--worker", *worker)
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/cpu.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return 0
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")

    from benchmarks import record

    if args.write:
        record.check_clean()
    env = record.environment()
    figures: dict[str, Any] = {}
    for part in args.parts or PARTS:
        print(f"measuring {part} …", file=sys.stderr, flush=True)
        figures |= PARTS[part]()
    if args.json:
        print(json.dumps({"environment": env, "figures": figures}, indent=1))
    else:
        print(_table(figures))
    if args.write:
        print(f"written to {record.write('cpu', figures, env)}", file=sys.stderr)
    return 0 if all(figures[name] <= bound for name, (bound, *_) in BOUNDS.items() if name in figures) else 1


def _table(figures: dict[str, Any]) -> str:
    rows = [f"{'figure':<62}{'measured':>14}{'bound':>14}"]
    for name, (bound, unit, what) in BOUNDS.items():
        if name in figures:
            verdict = "ok" if figures[name] <= bound else "MISSED"
            rows.append(f"{what:<62}{f'{figures[name]:.3g} {unit}':>14}{f'≤ {bound:g} {unit}':>14}  {verdict}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
