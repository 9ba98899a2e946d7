"""Attention cascades as people mean them (textbook form), rewritten by the exact recipe, with inputs for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from einscade.ir.cascade import Cascade
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}

SOFTMAX = """
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: {t} = sum(m) W[b,h,p,m] * V[b,h // {r},m,f] / Z[b,h,p]"""


@dataclass(frozen=True)
class Case:
    """A variant of attention: its scores (`S` from the raw product `X`), domain, what follows, and extra inputs
    (declaration, and what to fill it with: "float", "bool", "index:N", "sorted:N", "long:N": the same of 64 bits)."""

    name: str
    score: str = "X[b,h,p,m]"
    domain: str = ""
    after: str = SOFTMAX
    extra: tuple[tuple[str, str], ...] = ()
    ranks: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    causal: bool = False


CASES = (
    Case("full"),
    Case("causal", domain="m <= p", causal=True),
    Case("causal_end", domain="m <= p + M - P"),
    Case("window", domain="m <= p & p - m < 9"),
    Case("window_sink", domain="m <= p & (p - m < 7 | m < 3)"),
    Case("documents", domain="m <= p & D[b,p] == E[b,m]",
         extra=(("D[b,p]: i32", "sorted:3"), ("E[b,m]: i32", "sorted:3"))),
    Case("boolean", domain="Mask[b,p,m]", extra=(("Mask[b,p,m]: bool", "bool"),)),
    Case("additive", score="X[b,h,p,m] + Bias[h,p,m]", extra=(("Bias[h,p,m]", "float"),)),
    Case("slopes", score="X[b,h,p,m] + Slope[h] * (m - p)", domain="m <= p", extra=(("Slope[h]", "float"),)),
    Case("softcap", score="tanh(X[b,h,p,m] / 5) * 5", domain="m <= p"),
    Case("table", score="X[b,h,p,m] + T[h,Max(0, Min(15, m - p + 8))]", extra=(("T[h,c]", "float"),), ranks=", c < 16"),
    Case("gathered", score="X[b,h,p,m] + T[h,I[m]]", extra=(("T[h,c]", "float"), ("I[m]: i64", "index:16")),
         ranks=", c < 16"),
    Case("sigmoid", after="""
  W[b,h,p,m] = 1 / (1 + exp(-S[b,h,p,m]))
  O[b,h,p,f]: {t} = sum(m) W[b,h,p,m] * V[b,h // {r},m,f]""", domain="m <= p"),
    Case("sink", after="""
  G0[b,h,p]  = max(m) S[b,h,p,m]
  G[b,h,p]   = Max(G0[b,h,p], Sink[h])
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z0[b,h,p]  = sum(m) W[b,h,p,m]
  Z[b,h,p]   = Z0[b,h,p] + exp(Sink[h] - G[b,h,p])
  O[b,h,p,f]: {t} = sum(m) W[b,h,p,m] * V[b,h // {r},m,f] / Z[b,h,p]""", extra=(("Sink[h]", "float"),),
         domain="m <= p"),
)  # fmt: skip


def text(case: Case, dtype: str = "f32", h: int = 4, g: int = 2, e: int = 16, f: int = 16) -> str:
    """The case as a textbook cascade."""
    inputs = [f"Q[b,h,p,e]: {dtype}", f"K[b,g,m,e]: {dtype}", f"V[b,g,m,f]: {dtype}", *(x for x, _ in case.extra)]
    r = h // g
    where = f"  if {case.domain}" if case.domain else ""
    lines = [
        f"cascade {case.name}({', '.join(inputs)}) -> O[b,h,p,f]: {dtype}",
        f"  where b < B, h < {h}, g < {g}, p < P, m < M, e < {e}, f < {f}{case.ranks}",
        f"  X[b,h,p,m] = sum(e) {e**-0.5!r} * Q[b,h,p,e] * K[b,h // {r},m,e]",
        f"  S[b,h,p,m] = {case.score} {where}",
    ]
    return "\n".join(lines) + case.after.format(t=dtype, r=r)


def cascade(case: Case, **shape: int | str) -> tuple[Cascade, Cascade]:
    """The textbook form, and what the exact recipe makes of it."""
    return _rewritten(text(case, **shape))  # type: ignore[arg-type]


@functools.cache
def _rewritten(spelled: str) -> tuple[Cascade, Cascade]:
    plain = parse_cascade(spelled)
    return plain, rewrite(plain, "exact").cascade


def inputs(plain: Cascade, case: Case, sizes: dict[str, int], device: str = "cpu") -> dict[str, Tensor]:
    """Random inputs: floats normal, masks two thirds true with one row all false, documents sorted."""
    kinds = {x.split("[")[0]: kind for x, kind in case.extra}
    made: dict[str, Tensor] = {}
    for t in plain.inputs:
        shape = [int(plain.extent(r).subs({s: sizes[s.name] for s in plain.extent(r).free_symbols})) for r in t.ranks]
        kind, _, bound = kinds.get(t.name, "float").partition(":")
        if kind == "bool":
            mask = torch.rand(shape) < 0.66
            mask[..., shape[-2] // 2, :] = False
            made[t.name] = mask
        elif kind == "sorted":
            made[t.name] = torch.randint(0, int(bound), shape, dtype=torch.int32).sort(-1).values
        elif kind == "long":
            made[t.name] = torch.randint(0, int(bound), shape).sort(-1).values * 2**32
        elif kind == "index":
            made[t.name] = torch.randint(0, int(bound), shape)
        else:
            made[t.name] = torch.randn(shape, dtype=torch.float32).to(DTYPES[t.dtype])
    return {name: x.to(device) for name, x in made.items()}


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Frobenius, NaN if there is any."""
    return float((out.double().cpu() - reference.cpu()).norm() / reference.norm().cpu().clamp_min(1e-30))
