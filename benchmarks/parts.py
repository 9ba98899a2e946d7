"""How long the parts of a long loop should be: one decoding step in parts of several lengths, each way timed.

    python benchmarks/parts.py                            one sequence of 131072 keys, 32 heads on 8 heads of keys
    python benchmarks/parts.py --length N --groups G --batch B
    python benchmarks/parts.py --tiny                     compiles and runs little, for a GPU other than Hopper too
    python benchmarks/parts.py --out FILE [--commit ID]

Prints GB/s of keys and values for each schedule (tile of keys, warps, stages, tile of the merge) and each number of
programs a processor to aim at, and for the first of them the microseconds of the two kernels alone. Times are those of
`benchmarks/decode.py`: medians, caches flushed, calls captured in CUDA graphs. Every result is compared with the first;
one that differs is not timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.decode import captured, copy_bandwidth, seconds
from benchmarks.launch import noted_launches
from einscade.codegen.loops import plan
from einscade.codegen.parts import with_parts
from einscade.codegen.schedule import Schedule
from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.device import Device
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from einscade.runtime.modules import load

WIDTH = 128
STEPS = ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (32, 4, 4))
"""Tiles of keys, warps, stages."""

MERGES = (32, 64)
"""Tiles of parts in the merge. The first step is timed with all of them, the others with the first."""

PROGRAMS = (1, 2, 3, 4, 6, 8)
"""Programs a processor, at most."""


def text(heads: int, groups: int) -> str:
    """Attention of a few queries to all keys."""
    return f"""
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < {heads}, g < {groups}, p < 1, m < M, e < {WIDTH}, f < {WIDTH}
  S[b,h,p,m] = sum(e) {WIDTH**-0.5!r} * Q[b,h,p,e] * K[b,h // {heads // groups},m,e]
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // {heads // groups},m,f] / Z[b,h,p]
"""


def schedules(base: Schedule, programs: int, device: Device) -> Iterator[tuple[str, Schedule]]:
    """What is timed, and its name. `programs`: of the kernel of parts, if each had a whole loop."""
    for i, (step, warps, stages) in enumerate(STEPS):
        for merge in MERGES if i == 0 else MERGES[:1]:
            for aim in PROGRAMS:
                tiles = {**dict(base.tiles), "MU0": step, "MS0": merge}
                parts = max(1, aim * device.processors // programs)
                length = f"{step}*ceil_div(M, {step * parts})"
                name = f"{step:4} {warps:5} {stages:6} {merge:5} {aim:4}"
                yield name, replace(base, tiles=tuple(sorted(tiles.items())), warps=warps, stages=stages,
                                    launch=(("L", length),))  # fmt: skip


def alone(call: Callable[[], object], device: str) -> list[float]:
    """Microseconds of each kernel that a call launches, by itself."""
    launches = [
        functools.partial(launcher[grid], *args, **options) for launcher, grid, args, options in noted_launches(call)
    ]
    return [seconds(captured(launch, device), device) * 1e6 for launch in launches]


def measure(heads: int, groups: int, batch: int, length: int, few: bool) -> dict[str, Any]:
    device = Device.of("cuda")
    cascade = parse_cascade(text(heads, groups))
    loops = plan(run(cascade, with_parts(recipe("exact"), "m", "L")).cascade)
    base = candidates(loops, device, {"B": batch, "M": length})[0]
    torch.manual_seed(0)

    def normal(h: int, n: int) -> Tensor:
        return torch.randn(batch, h, n, WIDTH, device="cuda").bfloat16()

    inputs = [normal(heads, 1), normal(groups, length), normal(groups, length)]
    moved = 2 * inputs[1].numel() * 2
    copy = copy_bandwidth("cuda")
    print(f"copy {copy / 1e9:.0f} GB/s\nstep warps stages merge  aim    GB/s  parts, merge alone", flush=True)
    rows: dict[str, Any] = {}
    expected: Tensor | None = None
    for name, schedule in list(schedules(base, groups * batch, device))[: 3 if few else None]:
        call = functools.partial(load(emit(loops, schedule), cascade.name), *inputs, B=batch, M=length)
        try:
            (out,) = call()
            expected = out.double() if expected is None else expected
            if not (out - expected).norm() <= 1e-2 * expected.norm():
                raise ArithmeticError("differs from the first")
            once = seconds(captured(call, "cuda"), "cuda")
            kernels = alone(call, "cuda") if len(rows) < len(PROGRAMS) else []
            rows[name] = {"GBps": moved / once / 1e9, "alone_us": kernels}
            print(f"{name}  {moved / once / 1e9:6.0f}  {', '.join(f'{x:.2f}' for x in kernels)}", flush=True)
        except Exception as problem:
            rows[name] = {"problem": f"{type(problem).__name__}: {problem}"[:200]}
            print(f"{name}  {rows[name]['problem']}", flush=True)
    return {"copy_GBps": copy / 1e9, "shape": [batch, heads, groups, length], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--tiny", action="store_true", help="few schedules, few keys")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--commit", help="id of the commit, where there is no git")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    length = 4096 if options.tiny else options.length
    figures = measure(options.heads, options.groups, options.batch, length, options.tiny)
    if options.out is not None:
        report = {"environment": record.environment(options.commit), "figures": figures}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
