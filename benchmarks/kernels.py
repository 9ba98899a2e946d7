"""The kernel generated from a plain cascade against FlexAttention and PyTorch's own attention, in one run.

    python benchmarks/kernels.py [--json FILE] [--check]

Needs a CUDA device. Llama-shaped causal attention with grouped heads (32 of 8, width 128, bf16). TFLOP/s count the
cells that the domain keeps. Medians of many launches after warm-up, on random data; every kernel's error against
float64 on the same inputs is printed beside it. `--check` exits with 1 where the bound is missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.device import Device
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite

H, G, WIDTH = 32, 8, 128
TEXT = f"""
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < {H}, g < {G}, p < P, m < M, e < {WIDTH}, f < {WIDTH}
  S[b,h,p,m] = sum(e) {WIDTH**-0.5!r} * Q[b,h,p,e] * K[b,h // {H // G},m,e]   if m <= p
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // {H // G},m,f] / Z[b,h,p]
"""
BOUND = 1.0


def milliseconds(f: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(f, warmup=50, rep=300, return_mode="median"))


def load(source: Source, folder: Path, number: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    path = folder / f"generated_{number}.py"
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    n = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda")
    default = torch.compile(flex_attention, dynamic=False)
    tuned = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

    def library(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return call

    return {
        "FlexAttention": lambda: default(q, k, v, block_mask=mask, enable_gqa=True),
        "FlexAttention max-autotune": lambda: tuned(q, k, v, block_mask=mask, enable_gqa=True),
        "sdpa cuDNN": library(SDPBackend.CUDNN_ATTENTION),
        "sdpa flash": library(SDPBackend.FLASH_ATTENTION),
    }


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of one head's output in float64."""
    s = q[0, 0, rows].double() @ k[0, 0].double().T * WIDTH**-0.5
    keep = torch.arange(s.shape[1], device="cuda")[None] <= torch.arange(s.shape[1], device="cuda")[rows, None]
    return s.masked_fill(~keep, float("-inf")).softmax(-1) @ v[0, 0].double()


def tune(b: int, n: int, folder: Path, most: int) -> tuple[Schedule, float, list[dict[str, object]]]:
    """The best of the cost model's candidates, and what each took; the first is what runs without tuning."""
    program = plan(rewrite(parse_cascade(TEXT), "exact").cascade)
    q, k, v = (torch.randn(b, x, n, WIDTH, device="cuda", dtype=torch.bfloat16) for x in (H, G, G))
    log: list[dict[str, object]] = []
    best, least = None, float("inf")
    for number, schedule in enumerate(candidates(program, Device.of("cuda"), {"B": b, "P": n, "M": n})[:most]):
        started = time.perf_counter()
        try:
            run = load(emit(program, schedule), folder, number)
            run(q, k, v, B=b, P=n, M=n)
            torch.cuda.synchronize()
            built = time.perf_counter() - started
            took = milliseconds(lambda run=run: run(q, k, v, B=b, P=n, M=n))
        except Exception as failure:
            log.append({"schedule": str(schedule), "failed": f"{type(failure).__name__}: {failure}"[:300]})
            continue
        log.append({"schedule": str(schedule), "ms": took, "seconds to build": round(built, 2)})
        if took < least:
            best, least = schedule, took
    assert best is not None, log
    return best, least, log


def measure(b: int, n: int, schedule: Schedule, folder: Path, number: int) -> list[dict[str, object]]:
    q, k, v = (torch.randn(b, x, n, WIDTH, device="cuda", dtype=torch.bfloat16) for x in (H, G, G))
    program = plan(rewrite(parse_cascade(TEXT), "exact").cascade)
    run = load(emit(program, schedule), folder, number)
    flops = 4 * b * H * WIDTH * n * (n + 1) / 2
    reference = exact(q, k, v, slice(n - 512, n))
    rows = []
    for name, call in {"einscade": lambda: run(q, k, v, B=b, P=n, M=n)[0], **peers(q, k, v)}.items():
        try:
            out = call()
            error = float((out[0, 0, -512:].double() - reference).norm() / reference.norm())
            ms = sorted(milliseconds(call) for _ in range(3))[1]
        except Exception as failure:
            rows.append({"batch": b, "length": n, "name": name, "failed": f"{type(failure).__name__}: {failure}"[:300]})
            continue
        rows.append({"batch": b, "length": n, "name": name, "ms": ms, "TFLOP/s": flops / ms / 1e9, "error": error})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 below {BOUND} x FlexAttention")
    parser.add_argument("--commit", help="the commit that is measured, where this is no git checkout")
    parser.add_argument("--candidates", type=int, default=12, help="schedules to try")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schedule, _, log = tune(1, 8192, folder, options.candidates)
        for entry in log:
            print(entry)
        rows = [r for i, b in enumerate((1, 2)) for r in measure(b, 8192, schedule, folder, 1000 + i)]
    met = True
    for r in rows:
        if "failed" in r:
            print(f"B{r['batch']} {r['name']:<28} {r['failed']}")
            continue
        print(f"B{r['batch']} {r['name']:<28} {r['ms']:8.3f} ms {r['TFLOP/s']:7.1f} TFLOP/s  error {r['error']:.2e}")
    for b in (1, 2):
        speed = {str(r["name"]): float(str(r["TFLOP/s"])) for r in rows if r["batch"] == b and "TFLOP/s" in r}
        flex = max((v for k, v in speed.items() if k.startswith("Flex")), default=float("nan"))
        ratio = speed.get("einscade", 0.0) / flex
        met = met and ratio >= BOUND
        print(f"B{b}: {ratio:.2f} x FlexAttention (bound {BOUND})")
    if options.json:
        import triton

        commit = (
            options.commit
            or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        )
        record = {
            "commit": commit, "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(),
            "torch": torch.__version__, "triton": triton.__version__, "schedule": str(schedule), "tuning": log,
            "rows": rows,
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if met or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
