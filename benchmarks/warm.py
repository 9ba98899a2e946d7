"""What a site costs a process whose kernels were chosen and compiled before: reading, loading, the first launch.

    python benchmarks/warm.py                          a process that fills the caches, then one that finds them full
    python benchmarks/warm.py --rows dense-d64         other rows of benchmarks/h200.py
    python benchmarks/warm.py --out FILE --commit ID   the JSON, also from a tree without git

A site's time is what making its kernel takes, and its first call beyond its second. Capturing the graph is not in it,
and neither is what Triton does once in a process (imports, a hash over its own installation). Without a GPU kernels are
compiled for an H200 and launches do nothing (`stub_device`): nothing can be measured and the cost model chooses.
Exits with 1 where the warm process measures or compiles anything, or a site of it takes more than the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks.h200_rows import ROWS as KNOWN
from benchmarks.h200_rows import Row
from benchmarks.stub_device import hopper

ROWS = ("causal-d128", "soft-cap-causal", "documents", "gqa-causal-d128-backward")
BOUND = 0.2
STUB_LENGTH = 256


class Counts:
    """Seconds of each kernel by its program's name, and what was measured and compiled meanwhile."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tuned: list[str] = []
        self.compiled = 0

    @contextlib.contextmanager
    def counting(self, row: str) -> Iterator[None]:
        from triton import knobs

        from einscade.runtime import call, kernels, tuning

        plain_made, plain_call, plain_tune = call.Call._made, kernels.Kernel.__call__, tuning.tune
        making: dict[int, float] = {}

        def made(self_: call.Call, *given: Any) -> kernels.Kernel:
            kernel, seconds = timed(lambda: plain_made(self_, *given))
            making[id(kernel)] = seconds
            return kernel

        def called(kernel: kernels.Kernel, *given: Any) -> tuple[Tensor, ...]:
            if id(kernel) not in making:
                return plain_call(kernel, *given)
            _, first = timed(lambda: plain_call(kernel, *given))
            outputs, second = timed(lambda: plain_call(kernel, *given))
            gradient = " (gradient)" if kernel.program.cascade.name.endswith("_gradient") else ""
            self.seconds[row + gradient] = making.pop(id(kernel)) + max(0.0, first - second)
            return outputs

        def tune(name: str, *given: Any) -> tuning.Tuned:
            self.tuned.append(name)
            return plain_tune(name, *given)

        def compiled(cache_hit: bool, **_: Any) -> None:
            self.compiled += not cache_hit

        with (
            mock.patch.object(call.Call, "_made", made),
            mock.patch.object(kernels.Kernel, "__call__", called),
            mock.patch.object(tuning, "tune", tune),
            mock.patch.object(knobs.compilation, "listener", compiled),
        ):
            yield


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds until the device is done."""
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def start_triton() -> None:
    """What Triton does once in a process: it imports its languages and hashes its own installation."""
    import triton.experimental.gluon.language.nvidia.hopper
    import triton.language.extra.cuda  # noqa: F401
    from triton.runtime.cache import triton_key

    triton_key()


def call_once(row: Row, stub: bool) -> None:
    """An optimised module's first call, or that of its backward pass."""
    import einscade

    inputs = row.inputs(min(row.length, STUB_LENGTH) if stub else row.length, "cpu" if stub else "cuda")
    with torch.set_grad_enabled(row.backward):
        fast = einscade.optimize(row.module, dynamic=False, inner="eager")
        row.timed(lambda: fast(*inputs), inputs)()
    torch._dynamo.reset()


def process(rows: Sequence[str]) -> dict[str, Any]:
    """One process' sites: seconds by row, what was measured, how many kernels were compiled."""
    functorch_config.donated_buffer = False
    _, once = timed(start_triton)
    counts, stub = Counts(), not torch.cuda.is_available()
    with hopper() if stub else contextlib.nullcontext():
        for row in (r for r in KNOWN if r.name in rows):
            with counts.counting(row.name):
                call_once(row, stub)
    found = {name: round(seconds, 3) for name, seconds in counts.seconds.items()}
    return {"seconds": found, "tuned": len(counts.tuned), "compiled": counts.compiled, "triton_once_s": round(once, 3)}


def apart(rows: Sequence[str], folder: str) -> dict[str, Any]:
    """The same in a process of its own, with its caches in `folder`."""
    stub = {} if torch.cuda.is_available() else {"EINSCADE_AUTOTUNE": "0"}
    caches = {"EINSCADE_CACHE_DIR": f"{folder}/einscade", "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, __file__, "--process", "--rows", ",".join(rows)]
    done = subprocess.run(command, env={**os.environ, **stub, **caches}, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated rows of h200.py (default %(default)s)")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--commit", help="the commit, where the tree has no git")
    parser.add_argument("--process", action="store_true", help="one process, with the caches that it finds")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if args.process:
        print(json.dumps(process(rows)))
        return 0
    from benchmarks import record

    env = record.environment(args.commit)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'seconds of a site':40} {'cold':>8} {'warm':>8}   bound {BOUND}")
        cold = apart(rows, folder)
        warm = apart(rows, folder)
    for name, seconds in cold["seconds"].items():
        print(f"{name:40} {seconds:8.3f} {warm['seconds'][name]:8.3f}")
    again = f"{warm['tuned']} sites measured, {warm['compiled']} kernels compiled by the warm process"
    print(f"{again}; Triton's own {warm['triton_once_s']} s once")
    figures = {"launches": "real" if torch.cuda.is_available() else "do nothing", "cold": cold, "warm": warm}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": env, "figures": figures, "bound_s": BOUND}, indent=1) + "\n")
    return int(warm["tuned"] + warm["compiled"] > 0 or max(warm["seconds"].values()) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
