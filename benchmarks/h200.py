"""Generated Hopper kernels beside their peers on one GPU, in one run.

    python benchmarks/h200.py [--only NAME ...] [--out benchmarks/results/h200.json] [--autotune-flex]

Each row is a cascade, taken through the exact recipe and the Gluon emitter; all of the emitter's schedules are timed
and the fastest is reported. Peers: cuDNN through `scaled_dot_product_attention` where it computes the same, and
FlexAttention. Times are medians after warm-up on normally distributed data; TFLOP/s count only the points that the
domain keeps. Every kernel is first compared with float64 at an odd length.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from einscade.codegen import gluon
from einscade.codegen.loops import plan
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite

Tensor = torch.Tensor


@dataclass(frozen=True)
class Row:
    """`score`, `domain`: text of the cascade; `mod`, `mask`: the same for FlexAttention and for the reference.
    `extra`: further inputs as text, `make` makes them. `goal` in TFLOP/s."""

    name: str
    heads: int
    shared: int
    width: int
    length: int
    goal: float
    score: str = "R[b,h,p,m]"
    domain: str = ""
    extra: str = ""
    ranks: str = ""
    mod: Callable[..., Tensor] | None = None
    mask: Callable[..., Tensor] | None = None
    make: Callable[[int, int], list[Tensor]] = field(default=lambda heads, n: [])
    normalised: bool = True

    @property
    def causal(self) -> bool:
        return self.domain == "if m <= p"

    @property
    def plain(self) -> bool:
        return self.mod is None and self.normalised and (self.causal or not self.domain)

    def cascade(self) -> str:
        key = f"h // {self.shared}" if self.shared > 1 else "h"
        rank = "g" if self.shared > 1 else "h"
        groups = f", g < {self.heads // self.shared}" if self.shared > 1 else ""
        inputs = f"Q[b,h,p,e]: bf16, K[b,{rank},m,e]: bf16, V[b,{rank},m,f]: bf16{self.extra}"
        head = f"""cascade attention({inputs}) -> O[b,h,p,f]: bf16
  where b < B, h < {self.heads}{groups}, p < P, m < M, e < {self.width}, f < {self.width}{self.ranks}
  R[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,{key},m,e] * {self.width**-0.5!r}  {self.domain}
  S[b,h,p,m] = {self.score}
"""
        if not self.normalised:
            return head + f"  O[b,h,p,f]: bf16 = sum(m) S[b,h,p,m] * V[b,{key},m,f]\n"
        return (
            head
            + f"""  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,{key},m,f] / Z[b,h,p]
"""
        )

    def inputs(self, batch: int, n: int) -> list[Tensor]:
        def normal(heads: int) -> Tensor:
            return torch.randn(batch, heads, n, self.width, device="cuda").bfloat16()

        keys = self.heads // self.shared
        return [normal(self.heads), normal(keys), normal(keys), *self.make(self.heads, n)]

    def kept(self, n: int) -> int:
        """Points of one head that the domain keeps."""
        if self.mask is None:
            return n * n
        total = 0
        keys = torch.arange(n, device="cuda")
        extra = self.make(self.heads, n)
        for rows in torch.arange(n, device="cuda").split(1024):
            total += int(self.mask(*extra)(0, 0, rows[:, None], keys[None]).sum())
        return total


def reference(row: Row, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The attention in the plain way, in another precision."""
    q, k, v, *extra = inputs
    k, v = (x.to(dtype).repeat_interleave(row.shared, 1) for x in (k, v))
    n = q.shape[2]
    p, m = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")[None]
    s = q.to(dtype) @ k.transpose(-1, -2) * row.width**-0.5
    if row.mod is not None:
        h = torch.arange(row.heads, device="cuda")[:, None, None]
        s = row.mod(*extra)(s, 0, h, p, m).to(dtype)
    if not row.normalised:
        return s @ v
    if row.mask is not None:
        s = s.masked_fill(~row.mask(*extra)(0, 0, p, m), -math.inf)
    return s.softmax(-1) @ v


def error(out: Tensor, ref: Tensor) -> float:
    return float((out.double() - ref).norm() / ref.norm())


def load(text: str, folder: Path, name: str) -> Any:
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=150, return_mode="median"))


def ours(row: Row, folder: Path) -> dict[str, Any]:
    """The fastest of the emitter's schedules, its error against float64, and that of bfloat16 in the plain way."""
    program = plan(rewrite(parse_cascade(row.cascade()), "exact").cascade)
    small = row.inputs(1, 1000)
    exact = reference(row, small, torch.float64)
    plain = error(reference(row, small, torch.bfloat16), exact)
    big = row.inputs(2, row.length)
    best: dict[str, Any] = {}
    for i, schedule in enumerate(gluon.schedules(program)):
        module = load(gluon.emit(program, schedule).text, folder, f"row{ROWS.index(row)}_{i}")
        sizes = {"B": 1, "P": 1000, "M": 1000}
        (out,) = module.run(*small, **sizes)
        e = error(out, exact)
        if not e <= 1.5 * plain:
            raise AssertionError(f"{row.name}: error {e:.2e}, plain bfloat16 has {plain:.2e}")
        ms = milliseconds(partial(module.run, *big, B=2, P=row.length, M=row.length))
        if not best or ms < best["ms"]:
            best = {
                "ms": ms,
                "schedule": dict(schedule.tiles) | {"stages": schedule.stages},
                "error": e,
                "plain": plain,
            }
    return best


def cudnn(row: Row) -> float:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = row.inputs(2, row.length)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=row.causal, enable_gqa=row.shared > 1
            )

    return milliseconds(call)


def flex(row: Row, autotune: bool) -> float:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    q, k, v, *extra = row.inputs(2, row.length)
    n = row.length
    mask = create_block_mask(row.mask(*extra), None, None, n, n, _compile=True) if row.mask else None
    compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs" if autotune else None)
    mod = row.mod(*extra) if row.mod else None
    return milliseconds(lambda: compiled(q, k, v, score_mod=mod, block_mask=mask, enable_gqa=row.shared > 1))


def slopes(heads: int, n: int) -> list[Tensor]:
    return [2.0 ** (-8 * torch.arange(1, heads + 1, device="cuda") / heads)]


def causal(*_: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, p, m: m <= p


def with_slopes(a: Tensor) -> Callable[..., Tensor]:
    return lambda s, b, h, p, m: s + a[h] * (m - p)


def capped(*_: Tensor) -> Callable[..., Tensor]:
    return lambda s, b, h, p, m: 20 * torch.tanh(s / 20)


def from_table(t: Tensor) -> Callable[..., Tensor]:
    n = (t.shape[1] + 1) // 2
    return lambda s, b, h, p, m: s + t[h, m - p + n - 1]


def biased(t: Tensor) -> Callable[..., Tensor]:
    return lambda s, b, h, p, m: s + t[h, p, m]


def sigmoid(*_: Tensor) -> Callable[..., Tensor]:
    return lambda s, b, h, p, m: torch.sigmoid(s - 8)


DOMAIN = "if m <= p"
ROWS = (
    Row("dense D128 full", 16, 1, 128, 16384, 680),
    Row("dense D128 causal", 16, 1, 128, 16384, 640, domain=DOMAIN, mask=causal),
    Row("dense D64 full", 32, 1, 64, 16384, 540),
    Row("dense D64 causal", 32, 1, 64, 16384, 520, domain=DOMAIN, mask=causal),
    Row("GQA 32/8 D128 causal", 32, 4, 128, 16384, 650, domain=DOMAIN, mask=causal),
    Row("ALiBi causal", 16, 1, 128, 8192, 560, "R[b,h,p,m] + A[h] * (m - p)", DOMAIN, ", A[h]: f32",
        mod=with_slopes, mask=causal, make=slopes),
    Row("soft-cap causal", 16, 1, 128, 8192, 430, "tanh(R[b,h,p,m] * 0.05) * 20", DOMAIN, mod=capped, mask=causal),
    Row("window 1024 causal", 16, 1, 128, 8192, 520, domain="if m <= p & p - m < 1024",
        mask=lambda: lambda b, h, p, m: (m <= p) & (p - m < 1024)),
    Row("prefix-LM 1024", 16, 1, 128, 8192, 620, domain="if m <= p | m < 1024",
        mask=lambda: lambda b, h, p, m: (m <= p) | (m < 1024)),
    Row("relative-position table", 16, 1, 128, 8192, 450, "R[b,h,p,m] + T[h, m - p + P - 1]", extra=", T[h,r]: bf16",
        ranks=", r < P + M - 1", mod=from_table,
        make=lambda h, n: [torch.randn(h, 2 * n - 1, device="cuda").bfloat16()]),
    Row("dense bias", 16, 1, 128, 8192, 450, "R[b,h,p,m] + T[h,p,m]", extra=", T[h,p,m]: bf16", mod=biased,
        make=lambda h, n: [torch.randn(h, n, n, device="cuda").bfloat16()]),
    Row("sigmoid attention", 16, 1, 128, 8192, 600, "1 / (1 + exp(8.0 - R[b,h,p,m]))", mod=sigmoid, normalised=False),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "h200.json")
    parser.add_argument("--autotune-flex", action="store_true", help="FlexAttention with max-autotune as well")
    parser.add_argument("--no-flex", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    report: dict[str, Any] = {
        "date": date.today().isoformat(), "commit": commit, "torch": torch.__version__, "triton": triton.__version__,
        "device": torch.cuda.get_device_name(), "rows": {},
    }  # fmt: skip
    print(f"{'TFLOP/s':28}{'generated':>10}{'goal':>8}{'cuDNN':>8}{'flex':>8}{'tuned':>8}  error (plain bf16)")
    with tempfile.TemporaryDirectory() as folder:
        for row in ROWS:
            if arguments.only and row.name not in arguments.only:
                continue
            operations = 4 * 2 * row.heads * row.width * row.kept(row.length)
            result: dict[str, Any] = {"goal": row.goal}
            peers: dict[str, Callable[[], float]] = {}
            if row.plain:
                peers["cudnn"] = lambda row=row: cudnn(row)  # type: ignore[misc]
            if row.normalised and not arguments.no_flex:
                peers["flex"] = lambda row=row: flex(row, False)  # type: ignore[misc]
                if arguments.autotune_flex:
                    peers["flex_tuned"] = lambda row=row: flex(row, True)  # type: ignore[misc]
            try:
                result |= ours(row, Path(folder))
                result["tflops"] = round(operations / result["ms"] / 1e9, 1)
            except Exception as problem:
                result["problem"] = f"{type(problem).__name__}: {problem}"[:400]
            for name, call in peers.items():
                try:
                    result[name] = round(operations / call() / 1e9, 1)
                except Exception as problem:
                    result[name] = f"{type(problem).__name__}: {problem}"[:200]
            report["rows"][row.name] = result
            cells = [result.get(k, "") for k in ("tflops", "goal", "cudnn", "flex", "flex_tuned")]
            text = "".join(
                f"{c if not isinstance(c, str) else c[:7]:>{w}}" for c, w in zip(cells, (10, 8, 8, 8, 8), strict=True)
            )
            tail = result.get("problem") or f"{result['error']:.1e} ({result['plain']:.1e})"
            print(f"{row.name:28}{text}  {tail}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
