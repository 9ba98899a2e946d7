"""The cost model's order beside times that were measured: is what it would run without tuning near the best?

    python benchmarks/replay.py                        of benchmarks/results/h200.json
    python benchmarks/replay.py FILE --rows dense-d64  of another file of benchmarks/h200.py, some rows

Nothing is measured and no GPU is needed: of a row's candidates, in the order in which the cost model has them now, the
first whose time the file has is held against the least time in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.h200 import schedule_record
from einscade.ir.device import DEVICES, Device
from einscade.passes.pipeline import run
from einscade.runtime.candidates import candidates
from einscade.runtime.program import parse_program

__all__ = ["device_of", "ratios"]


def device_of(environment: Mapping[str, Any]) -> Device:
    """The device that a file's figures are of. Raises ValueError for one that is not described."""
    found = next((d for d in DEVICES if d.kind != "cpu" and d.name in (environment["gpu"] or "")), None)
    if found is None:
        raise ValueError(f"the figures are of {environment['gpu']}, which einscade.ir.device does not describe")
    return found


def ratios(row: Mapping[str, Any], device: Device) -> list[float]:
    """For each of a row's kernels that several candidates were measured of: the model's choice over the best."""
    found = []
    for made, tuned in zip(row.get("programs", ()), row.get("tuning", ()), strict=True):
        times = {_key(m): m["ms"] for m in tuned["measured"]}
        if len(times) < 2:
            continue
        program = parse_program(made["text"])
        rewritten = run(program.cascade, program.recipe).cascade
        now = [_key({"kind": c.kind} | schedule_record(c.schedule))
               for c in candidates(program, rewritten, (), device, made["sizes"])]  # fmt: skip
        first = next((times[key] for key in now if key in times), None)
        if first is not None:
            found.append(first / min(times.values()))
    return found


def _key(measured: Mapping[str, Any]) -> str:
    """A candidate, without what was measured of it, and without the order of its tiles, which is no choice."""
    return json.dumps({k: v for k, v in measured.items() if k not in ("rank", "ms", "abreast")}, sort_keys=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=record.RESULTS / "h200.json")
    parser.add_argument("--rows", help="comma-separated, default: all in the file")
    args = parser.parse_args()
    kept = json.loads(args.file.read_text())
    device = device_of(kept["environment"])
    every: list[float] = []
    for name, row in kept["figures"].items():
        if args.rows is None or name in args.rows.split(","):
            found = ratios(row, device)
            every += found
            print(f"{name:28} {', '.join(f'{r:.3f}' for r in found) or 'nothing to compare'}", flush=True)
    print(f"median {statistics.median(every):.3f} of {len(every)} kernels" if every else "no times in the file")
    return int(not every or statistics.median(every) > 1.15)


if __name__ == "__main__":
    sys.exit(main())
