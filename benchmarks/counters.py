"""What limits the rows of `benchmarks/h200.py`: each kernel of one call under Nsight Compute, and its time without.

    python benchmarks/counters.py --rows documents,window-1024
    python benchmarks/counters.py --rows dense-d128 --out FILE --commit ID    the JSON, also from a tree without git

Comes in: names of rows. Goes out: a line for each kernel that a call of the row's optimised module runs: microseconds
by torch's profiler (the median of some calls), then by the hardware's counters how busy the tensor cores, the special
functions, the issue slots, the second-level cache and the memory were, the registers of a thread, millions of bank
conflicts in shared memory, and what warps mostly waited for (warps in that state for each instruction issued). A row is
run in a process of its own, then once more under `ncu`, which finds the kernel that the first has chosen in the cache;
clocks stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.h200_rows import ROWS, Row

PERCENTAGES = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "special": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
"""Counters, by the names of their columns."""

OTHERS = {
    "ncu_us": "gpu__time_duration.sum",
    "registers": "launch__registers_per_thread",
    "conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}
STALLED = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
MOST_STALLS = 4
CALLS = 20
SECONDS = 120


class ProfilingError(RuntimeError):
    """A row could not be run, or not be profiled."""


def run_row(row: Row, counted: bool) -> dict[str, float]:
    """Microseconds of each kernel in a call of a row's optimised module, medians; of a run under ncu (`counted`), which
    tolerates no second profiler, nothing, but one call inside the range that it looks at. Needs a GPU."""
    import einscade

    torch.manual_seed(0)
    inputs = row.inputs(row.length, "cuda")
    fast = einscade.optimize(row.module, dynamic=False)
    call = row.timed(lambda: fast(*inputs), inputs)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if counted:
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time:
            times[event.name].append(event.device_time)
    return {name: len(t) / CALLS * statistics.median(t) for name, t in times.items()}


def counters(text: str) -> list[dict[str, Any]]:
    """Of `ncu --csv --page raw`: for each kernel its name, the counters, and the stalls from the greatest down."""
    lines = text.splitlines()
    start = next((i for i, x in enumerate(lines) if x.startswith('"ID"')), None)
    if start is None:
        raise ProfilingError(f"ncu saw no kernel: {text.strip()[-500:]}")
    _, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))  # the first has the units

    def number(kernel: dict[str, str], name: str) -> float | None:
        try:
            return float(kernel[name].replace(",", ""))
        except (KeyError, ValueError):
            return None

    found = []
    for k in kernels:
        stalls = {m[1]: number(k, name) or 0.0 for name in k if (m := STALLED.fullmatch(name))}
        stalls.pop("selected", None)
        most = sorted(stalls, key=lambda s: -stalls[s])[:MOST_STALLS]
        values = {column: number(k, name) for column, name in (PERCENTAGES | OTHERS).items()}
        for column, unit in (("ncu_us", 1e3), ("conflicts", 1e6)):
            if (value := values[column]) is not None:
                values[column] = value / unit
        found.append({"kernel": k["Kernel Name"], **values, "stalls": {s: round(stalls[s], 2) for s in most}})
    return found


def profile_row(name: str) -> list[dict[str, Any]]:
    """A row's kernels, with their times and counters. Raises ProfilingError with what the tools said."""
    own = [sys.executable, __file__, "--one", name]
    times: dict[str, float] = json.loads(_checked(own).splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
        command += ["--print-units", "base", "--log-file", str(log), "--section", "WarpStateStats"]
        command += ["--metrics", ",".join((*PERCENTAGES.values(), *OTHERS.values())), *own, "--counted"]
        try:
            _checked(command)
        except ProfilingError as problem:
            raise ProfilingError(f"{problem}\n{log.read_text()[-800:] if log.exists() else ''}") from None
        kernels = counters(log.read_text())
    for k in kernels:
        k["us"] = times.get(k["kernel"])
    return kernels


def _checked(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ProfilingError(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode:
        raise ProfilingError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


def lines(row: str, kernels: list[dict[str, Any]]) -> list[str]:
    """A row's part of the table."""

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"

    return [
        f"| {row} | {k['kernel'][:40]} | {shown(k['us'])} | {shown(k['ncu_us'])} | "
        + " | ".join(shown(k[column]) for column in (*PERCENTAGES, "registers", "conflicts"))
        + f" | {', '.join(f'{name} {value}' for name, value in k['stalls'].items())} |"
        for k in kernels
    ]


def main() -> int:
    names = ", ".join(r.name for r in ROWS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="documents,window-1024", help=f"comma-separated, of {names}")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what the processes of their own get
    parser.add_argument("--counted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    args = parser.parse_args()
    rows = {r.name: r for r in ROWS}
    chosen = [args.one] if args.one else args.rows.split(",")
    if unknown := set(chosen) - set(rows):
        parser.error(f"unknown row {', '.join(sorted(unknown))}: choose from {names}")
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if args.one:
        print(json.dumps(run_row(rows[args.one], args.counted)))
        return 0
    if shutil.which("ncu") is None:
        parser.error("no ncu on the PATH: install Nsight Compute, which comes with the CUDA toolkit")

    from benchmarks import record

    figures: dict[str, Any] = {}
    columns = ["row", "kernel", "µs", "µs under ncu", *(f"{c} %" for c in PERCENTAGES)]
    columns += ["registers", "conflicts", "stalls"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for name in chosen:
        started = time.monotonic()
        try:
            figures[name] = profile_row(name)
            print("\n".join(lines(name, figures[name])), flush=True)
        except ProfilingError as problem:
            figures[name] = str(problem)
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if args.out:
        record_ = {"environment": record.environment(args.commit), "figures": figures}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record_, indent=1) + "\n")
    return int(any(isinstance(f, str) for f in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
