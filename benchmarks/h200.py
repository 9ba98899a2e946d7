"""Attention on one GPU, from plain PyTorch modules: einscade beside what others make of them, in one run.

    python benchmarks/h200.py                              the table, in less than ten minutes
    python benchmarks/h200.py --rows documents,dense-bias  some rows
    python benchmarks/h200.py --tiny                       small sizes on whatever device there is: does it run?
    python benchmarks/h200.py --out FILE --commit ID       the JSON, also from a tree without git
    python benchmarks/h200.py --join A B --out FILE        one JSON of runs of one commit, on a GPU each, of rows each

What is timed is the module that `einscade.optimize` returns, its call and all, after it chose its kernel; rows of
gradients time the backward pass alone. First it is compared with the module in float64 at an odd length: one that errs
by more than 1.5 times what the module itself makes in bfloat16 has no figure. Peers (benchmarks/h200_peers.py): cuDNN
through `scaled_dot_product_attention` where that computes the same, FlexAttention, FlashAttention-4 where it is
installed, and torch.compile of the module where its scores fit in memory; the slow compilers among them run beforehand,
for all rows at once. Times are medians after warm-up on normally distributed data, TFLOP/s count only the points that
the domain keeps. Of tuning the JSON has the program, each candidate's time, the seconds it took, and how the cost
model's own choice compares. Peers are left out, and the JSON says so, when `--minutes` are nearly over: give more where
FlashAttention-4 is installed and has not compiled its kernels yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import h200_peers
from benchmarks.h200_rows import ROWS, Row
from einscade.codegen.schedule import Schedule
from einscade.runtime.kernels import Kernel

PEERS = tuple(h200_peers.PEERS)
CHECKED = 1000
AHEAD = 180.0
"""Seconds after which no row's compilers are waited for before the first row is measured."""


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=150, return_mode="median"))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """The model's choice of kernels, for a call that is not timed."""
    before = os.environ.get("EINSCADE_AUTOTUNE")
    os.environ["EINSCADE_AUTOTUNE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EINSCADE_AUTOTUNE"]
        else:
            os.environ["EINSCADE_AUTOTUNE"] = before


def errors(row: Row, n: int, device: str, kernel: Callable[..., Tensor]) -> tuple[float, float]:
    """The kernel's error at n positions, and the module's own in bfloat16; of several gradients where they differ
    most."""
    inputs = row.inputs(n, device, batch=min(row.batch or 4, 4) if row.batch else None)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    found = [_results(row, *given) for given in ((kernel, inputs), (row.module, inputs), (row.module, exact))]
    pairs = [(distance(ours, best), distance(plain, best)) for ours, plain, best in zip(*found, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))


def _results(row: Row, attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a row computes: the attention's result, or the gradients of a fixed weighted sum of it."""
    result = attention(*inputs)
    if not row.backward:
        return [result]
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return list(torch.autograd.grad(result, inputs[:3], weights.to(result)))


def ours(row: Row, checked: int, device: str) -> dict[str, Any]:
    """Milliseconds, errors, and which kernels the module runs."""
    import einscade
    from einscade.runtime.call import prepared

    with untuned():
        error, plain = errors(row, checked, device, einscade.optimize(row.module, dynamic=False))
    torch._dynamo.reset()
    if not error <= 1.5 * plain:
        raise AssertionError(f"error {error:.1e} where the module in bfloat16 has {plain:.1e}")
    fast = einscade.optimize(row.module, dynamic=False)
    inputs = row.inputs(row.length, device)
    before = prepared()
    started = time.perf_counter()
    timed = row.timed(lambda: fast(*inputs), inputs)
    timed()
    first = time.perf_counter() - started
    found = {"error": error, "plain_error": plain, "first_call_s": round(first, 1)}
    found["ms"] = milliseconds(timed, device)
    made = [c for c in prepared() if c not in before and c.program.cascade.name.endswith("_gradient") == row.backward]
    kernels = [kernel for c in made for kernel in c.kernels.values()]
    found["programs"] = [
        {"text": c.program.text, "sizes": dict(zip(c.program.cascade.symbols, (1 << e for e in key), strict=False))}
        for c in made
        for key in c.kernels
    ]
    found["kernels"] = [k.candidate for k in kernels]
    found["schedules"] = [schedule_record(k.schedule) for k in kernels]
    found["tuning"] = [tuning(k) for k in kernels]
    sites = einscade.report(fast).sites
    rewritten = sum(s.status == "rewritten" for s in sites)
    if not kernels or rewritten < len(sites):
        raise AssertionError(f"{rewritten} of {len(sites)} attention sites rewritten")
    return found


def tuning(kernel: Kernel) -> dict[str, Any]:
    """What choosing a kernel took, and what was measured: `untuned` is the time of the cost model's choice, which runs
    under EINSCADE_AUTOTUNE=0, over the best candidate's, `library` that of the library's best call over the chosen
    one's. None where one of the two was not measured."""
    chosen = next((t for t in kernel.timings if (t.kind, t.schedule) == (kernel.candidate, kernel.schedule)), None)
    best = min((t.seconds for t in kernel.timings), default=0.0)
    guess = next((t.seconds for t in kernel.timings if t.rank == 0), None)
    library = min((t.seconds for t in kernel.timings if t.kind.startswith("library:")), default=None)
    return {
        "compile_s": round(kernel.spent[0], 1),
        "measure_s": round(kernel.spent[1], 1),
        "candidates": len(kernel.timings) + kernel.untried,
        "untuned": round(guess / best, 3) if guess and best else None,
        "library": round(library / chosen.seconds, 3) if library and chosen else None,
        "measured": [
            {"rank": t.rank, "kind": t.kind, "ms": round(1e3 * t.seconds, 4)} | schedule_record(t.schedule)
            for t in kernel.timings
        ],
    }


def schedule_record(schedule: Schedule) -> dict[str, Any]:
    """What a schedule says, where it says something of its own."""
    plain = {f.name: f.default for f in fields(Schedule)}
    said = {name: value for name, value in vars(schedule).items() if name in plain and value != plain[name]}
    return dict(schedule.tiles) | {k: v for k, v in said.items() if k not in ("tiles", "out_order", "target")}


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of the kernels that were tuned, each once: the median of `untuned`, and the longest tuning."""
    tuned = [t for r in results.values() for t in r.get("tuning", ()) if t["measured"]]
    ratios = [t["untuned"] for t in tuned if t["untuned"] is not None]
    return {
        "untuned_median": round(statistics.median(ratios), 3) if ratios else None,
        "untuned_worst": max(ratios, default=None),
        "tuning_s_most": max((round(t["compile_s"] + t["measure_s"], 1) for t in tuned), default=None),
    }


def peer(name: str, row: Row, device: str, autotune: bool) -> float:
    """Milliseconds of another's form of the row. Raises where there is none."""
    torch._dynamo.reset()
    inputs = row.inputs(row.length, device)
    return milliseconds(row.timed(h200_peers.attention(name, row, inputs, autotune), inputs), device)


def measure(
    row: Row, checked: int, device: str, peers: Mapping[str, str | None], end: float, autotune: bool
) -> dict[str, Any]:
    """A row's figures in TFLOP/s, or why there are none. `peers`: of which to get one, None, or why there is none."""
    result: dict[str, Any] = {"goal": row.goal, "seconds": {}}
    operations = row.operations(row.length, row.inputs(row.length, device, batch=1))
    with _seconds(result["seconds"], "einscade"):
        try:
            result |= ours(row, checked, device)
            result["tflops"] = round(operations / result["ms"] / 1e9, 1)
        except Exception as error:
            result["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    for name, known in peers.items():
        with _seconds(result["seconds"], name):
            try:
                if time.monotonic() > end:
                    raise TimeoutError("no time left")
                result[name] = known or round(operations / peer(name, row, device, autotune) / 1e9, 1)
            except Exception as error:
                result[name] = h200_peers.problem(error)
            if device == "cuda":
                torch.cuda.empty_cache()
    return result


@contextlib.contextmanager
def _seconds(into: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    into[name] = round(time.monotonic() - started, 1)


def line(row: Row, result: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [result.get(key, "") for key in ("tflops", "goal", *PEERS)]
    shown = [f"{c:g}" if isinstance(c, (int, float)) else "–" for c in cells]
    tail = result.get("problem")
    if tail is None:
        kernels = ", ".join(f"{k} {s}" for k, s in zip(result["kernels"], result["schedules"], strict=True))
        tail = f"{kernels} error {result['error']:.1e} ({result['plain_error']:.1e})"
    return f"| {row.name} | " + " | ".join(shown) + f" | {tail} |"


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """The runs of one commit with one set of versions on one kind of GPU as one, rows in the table's order. Raises
    ValueError where they are not of one, and where two have the same row."""
    runs = [json.loads(path.read_text()) for path in files]
    same = ("commit", "cpu", "gpu", "python", "versions")
    figures: dict[str, Any] = {}
    for path, run in zip(files, runs, strict=True):
        if differing := [name for name in same if run["environment"][name] != runs[0]["environment"][name]]:
            raise ValueError(f"{path} has another {differing[0]} than {files[0]}: measure both again")
        if twice := set(figures) & set(run["figures"]):
            raise ValueError(f"{path} has a row that another file has, too: {min(twice)}")
        figures |= run["figures"]
    ordered = {row.name: figures[row.name] for row in ROWS if row.name in figures}
    return {"environment": runs[0]["environment"], "tuning": summary(ordered), "figures": ordered}


def main() -> int:
    names = ", ".join(r.name for r in ROWS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=f"comma-separated, default: all of {names}")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, of " + ", ".join(PEERS))
    parser.add_argument("--minutes", type=float, default=9.5, help="from when on peers are left out (default 9.5)")
    parser.add_argument("--autotune-flex", action="store_true", help="FlexAttention with max-autotune")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test, not a measurement")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, join these runs' JSON into --out")
    args = parser.parse_args()
    if args.join:
        if args.out is None:
            parser.error("--join needs --out, the file to write")
        args.out.write_text(json.dumps(joined(args.join), indent=1) + "\n")
        return 0
    chosen = args.rows.split(",") if args.rows else [r.name for r in ROWS]
    peers = tuple(p for p in args.peers.split(",") if p)
    if unknown := set(chosen) - {r.name for r in ROWS}:
        parser.error(f"unknown row {', '.join(sorted(unknown))}: choose from {names}")
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("no CUDA device: only --tiny runs without one")

    from benchmarks import record

    env = record.environment(args.commit)
    started = time.monotonic()
    results: dict[str, Any] = {}
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # backward is run more than once on one forward pass
    rows = [r for r in ROWS if r.name in chosen]
    known: dict[tuple[str, str], str] = {}
    if device == "cuda" and not args.tiny:
        ahead = [p for p in peers if not (p == "flex" and args.autotune_flex)]  # which measures while it compiles
        known = h200_peers.call_ahead([r.name for r in rows], ahead, AHEAD)
        print(f"compiled ahead in {time.monotonic() - started:.0f} s")
    titles = "| TFLOP/s | einscade | goal | cuDNN | FlexAttention | FlashAttention-4 | torch.compile |"
    print(titles + " kernel, error (plain bfloat16's) |")
    print("|---" * 8 + "|")
    for i, row in enumerate(rows):
        checked = min(CHECKED, row.length - 7)
        if args.tiny:
            row, checked = replace(row, length=80, heads=2 * row.shared, batch=row.batch and 1), 73
        end = started + args.minutes * 60 - 20 * (len(rows) - 1 - i)  # what comes after needs its own time
        from_peers = {name: known.get((row.name, name)) for name in peers}
        results[row.name] = measure(row, checked, device, from_peers, end, args.autotune_flex)
        print(line(row, results[row.name]), flush=True)
        torch._dynamo.reset()
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            kept = {"environment": env, "tuning": summary(results), "figures": results}
            args.out.write_text(json.dumps(kept, indent=1) + "\n")
    print("tuning: " + ", ".join(f"{name} {value}" for name, value in summary(results).items()))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any("problem" in r for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
