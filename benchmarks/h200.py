"""Attention on GPUs of one kind, from plain PyTorch modules: einscade beside what others make of them, in one run.

    python benchmarks/h200.py                              the table, in less than ten minutes
    python benchmarks/h200.py --rows documents,dense-bias  some rows
    python benchmarks/h200.py --gpus 1                     on one of the GPUs that there are
    python benchmarks/h200.py --tiny                       small sizes on whatever device there is: does it run?
    python benchmarks/h200.py --out FILE --commit ID       the JSON, also from a tree without git
    python benchmarks/h200.py --join A B --out FILE        one JSON of runs of one commit, of rows each

What is timed is the module that `einscade.optimize` returns, its call and all, after it chose its kernel; rows of
gradients time the backward pass alone. First it is compared with the module in float64 at an odd length: one that errs
by more than 1.5 times what the module itself makes in bfloat16 has no figure. Peers (benchmarks/h200_peers.py): cuDNN
through `scaled_dot_product_attention` where that computes the same, FlexAttention, FlashAttention-4 where it is
installed, and torch.compile of the module where its scores fit in memory. Times are medians after warm-up on normally
distributed data, each on a device that has rested, TFLOP/s count only the points that the domain keeps. Of tuning the
JSON has the program, each candidate's time, the seconds it took, and how the cost model's own choice compares.

The comparisons, and the slow compilers among the peers, come before anything is measured, for all rows at once
(benchmarks/h200_ahead.py); nothing else runs while rows are measured. Every GPU then has a process that takes the next
row that nobody has, and measures it and its peers there; the JSON says on which. Peers are left out, and the JSON and
the end of the table say so, when `--minutes` are nearly over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import apart, h200_peers, record, table
from benchmarks.h200_ahead import CHECK, ahead, check, jobs
from benchmarks.h200_rows import ROWS, Row
from einscade.codegen.schedule import Schedule
from einscade.runtime.kernels import Kernel

PEERS = tuple(h200_peers.PEERS)
AHEAD = 240.0
"""Seconds after which nothing that is done ahead is waited for."""

FORWARD, BACKWARD = 8.0, 22.0
"""Seconds that a row takes without its peers: what comes after a row needs its own time."""


REST = 0.5
"""Seconds that a device has nothing to do before anything is measured on it. Under load it comes to its power limit
within a tenth of a second and lowers its clock; what is measured right behind tuning would begin where others end.
"""

SHORT = 0.5
"""Milliseconds of a call below which its time is the median of three series: one may have 1.3 times another's."""


@dataclass(frozen=True)
class Plan:
    """What is measured, the same for every process that has a part in it. `known`: by row, what `ahead` found; `end`:
    from when on (`time.time()`) peers are left out."""

    rows: tuple[str, ...]
    peers: tuple[str, ...]
    known: Mapping[str, Mapping[str, Any]]
    end: float
    gpus: int
    autotune_flex: bool
    tiny: bool


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        def once() -> float:
            torch.cuda.synchronize()
            time.sleep(REST)
            return float(do_bench(call, warmup=50, rep=150, return_mode="median"))

        found = once()
        return found if found >= SHORT else statistics.median([found, once(), once()])
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def ours(row: Row, known: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Milliseconds, errors, and which kernels the module runs. `known`: what was done ahead."""
    import einscade
    from einscade.runtime.call import prepared

    checked = known[CHECK] if CHECK in known else check(row, device)
    if isinstance(checked, str):
        raise AssertionError(checked)
    found: dict[str, Any] = dict(checked)
    if not found["error"] <= 1.5 * found["plain_error"]:
        raise AssertionError(f"error {found['error']:.1e} where the module in bfloat16 has {found['plain_error']:.1e}")
    fast = einscade.optimize(row.module, dynamic=False)
    inputs = row.inputs(row.length, device)
    before = prepared()
    started = time.perf_counter()
    timed = row.timed(lambda: fast(*inputs), inputs)
    timed()
    found["first_call_s"] = round(time.perf_counter() - started, 1)
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
    if rewritten < len(sites):
        raise AssertionError(f"{rewritten} of {len(sites)} attention sites rewritten")
    if not kernels:
        raise AssertionError("no kernel of its own: at this size a row before it has the same program")
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


def measure(row: Row, plan: Plan, end: float, device: str) -> dict[str, Any]:
    """A row's figures in TFLOP/s, or why there are none; peers only until `end`."""
    known = plan.known.get(row.name, {})
    result: dict[str, Any] = {"seconds": {}}
    operations = row.operations(row.length, row.inputs(row.length, device, batch=1))
    with _seconds(result["seconds"], "einscade"):
        try:
            result |= ours(row, known, device)
            result["tflops"] = round(operations / result["ms"] / 1e9, 1)
        except Exception as error:
            result["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    for name in plan.peers:
        with _seconds(result["seconds"], name):
            try:
                if known.get(name) is None and time.time() > end:
                    raise TimeoutError("no time left")
                result[name] = known.get(name) or round(
                    operations / peer(name, row, device, plan.autotune_flex) / 1e9, 1
                )
            except Exception as error:
                result[name] = h200_peers.problem(error)
            if device == "cuda":
                torch.cuda.empty_cache()
    return result | {"bounds": row.bounds(result)}


def measured(plan: Plan, mine: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a plan that are this process' to measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functorch_config.donated_buffer = False  # backward is run more than once on one forward pass
    torch.manual_seed(0)
    rows = [row.tiny() if plan.tiny else row for row in ROWS if row.name in plan.rows]
    for i, row in enumerate(rows):
        if mine(row.name):
            later = sum(BACKWARD if r.backward else FORWARD for r in rows[i + 1 :]) / plan.gpus
            yield row.name, measure(row, plan, plan.end - later, device)
            torch._dynamo.reset()


def measured_apart(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of a plan, each GPU's from a process of its own. A row whose process crashed is not among them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PLAN).write_text(json.dumps(asdict(plan)))
        parts = [[str(Path(__file__).resolve()), "--part", folder, str(i)] for i in range(plan.gpus)]
        settings = [apart.gpu(i) if torch.cuda.is_available() else {} for i in range(plan.gpus)]
        yield from apart.stream(parts, settings)


def part(folder: Path, gpu: int, log: Path) -> None:
    """One process of `measured_apart`."""
    read = json.loads((folder / PLAN).read_text())
    for name, result in measured(Plan(**read), lambda row: apart.claim(folder, row)):
        apart.append(log, [name, result | {"gpu": gpu}])
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where a kernel took the device with it: other processes do the rest


PLAN = "plan.json"


@contextlib.contextmanager
def _seconds(into: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    into[name] = round(time.monotonic() - started, 1)


def line(row: Row, result: dict[str, Any]) -> str:
    """A row of the table."""
    if "problem" in result:
        return table.line(row, result, result["problem"])
    kernels = ", ".join(f"{k} {s}" for k, s in zip(result["kernels"], result["schedules"], strict=True))
    return table.line(row, result, f"{kernels} error {result['error']:.1e} ({result['plain_error']:.1e})")


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
    ordered = in_order(figures)
    return {"environment": runs[0]["environment"], "tuning": summary(ordered), "figures": ordered}


def in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    return {row.name: results[row.name] for row in ROWS if row.name in results}


def main() -> int:
    if sys.argv[1:2] == ["--part"]:
        folder, gpu, log = sys.argv[2:]
        part(Path(folder), int(gpu), Path(log))
        return 0
    args = arguments()
    if args.join:
        args.out.write_text(json.dumps(joined(args.join), indent=1) + "\n")
        return 0
    cuda = torch.cuda.is_available()
    env = record.environment(args.commit) | {"gpus": args.gpus}
    started, now = time.monotonic(), time.time()
    rows = [r for r in ROWS if r.name in args.rows]
    called = [p for p in args.peers if not (p == "flex" and args.autotune_flex)]  # which measures while it compiles
    known = ahead(jobs(rows, called), args.gpus if cuda else 0, args.ahead, args.tiny) if args.ahead else {}
    seconds = {"ahead": round(time.monotonic() - started)}
    print(f"compiled and compared ahead in {seconds['ahead']} s, measuring on {args.gpus} devices")
    end = now + 60 * args.minutes
    plan = Plan(tuple(args.rows), tuple(args.peers), known, end, args.gpus, args.autotune_flex, args.tiny)
    results: dict[str, Any] = {}
    print(table.header("kernel, error (plain bfloat16's)"), flush=True)
    waiting = list(rows)
    for name, result in measured_apart(plan) if args.gpus > 1 else measured(plan, lambda row: True):
        results[name] = result
        while waiting and waiting[0].name in results:
            row = waiting.pop(0)
            print(line(row, results[row.name]), flush=True)
        seconds["all"] = round(time.monotonic() - started)
        save(args.out, env, seconds, results)
    for row in waiting:
        results.setdefault(row.name, {"problem": "the process that measured it crashed"})
        print(line(row, results[row.name]))
    save(args.out, env, seconds, results)
    print("\n".join(["", *table.reasons(in_order(results), args.peers), ""]))
    print("tuning: " + ", ".join(f"{name} {value}" for name, value in summary(results).items()))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any("problem" in r for r in results.values()))


def save(out: Path | None, env: Mapping[str, Any], seconds: Mapping[str, int], results: Mapping[str, Any]) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        kept = {"environment": env, "seconds": seconds, "tuning": summary(results), "figures": in_order(results)}
        out.write_text(json.dumps(kept, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    names = [r.name for r in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(names), help="comma-separated, default: %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, of " + ", ".join(PEERS))
    parser.add_argument("--gpus", type=int, help="on how many devices, default: on all GPUs that there are")
    parser.add_argument("--ahead", type=float, default=AHEAD, help="so many seconds at most before measuring; 0: none")
    parser.add_argument("--minutes", type=float, default=9.2, help="from when on peers are left out (default 9.2)")
    parser.add_argument("--autotune-flex", action="store_true", help="FlexAttention with max-autotune")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test, not a measurement")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    parser.add_argument("--join", nargs="+", type=Path, help="measure nothing, join these runs' JSON into --out")
    args = parser.parse_args()
    if args.join and args.out is None:
        parser.error("--join needs --out, the file to write")
    args.rows, args.peers = args.rows.split(","), [p for p in args.peers.split(",") if p]
    if unknown := set(args.rows) - set(names):
        parser.error(f"unknown row {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}: choose from {', '.join(PEERS)}")
    there = torch.cuda.device_count()
    if not there and not (args.tiny or args.join):
        parser.error("no CUDA device: only --tiny runs without one")
    args.gpus = args.gpus or there or 1
    if there and args.gpus > there:
        parser.error(f"--gpus {args.gpus}, but {there} there are")
    return args


if __name__ == "__main__":
    sys.exit(main())
