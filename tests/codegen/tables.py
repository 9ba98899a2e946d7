"""Biases read from tables, in the ways that models index them, with the gradients of all inputs.

Comes in: a name of `TABLES`. Goes out: `gradient`, the differentiated cascade, and `values` for its inputs.
"""

from __future__ import annotations

import torch

from einscade.compiler.gradients import scan_free
from einscade.ir import Cascade
from einscade.ir.interpret import extents, interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import Gradient, differentiate
from tests.strategies import TORCH_DTYPES

__all__ = ["TABLES", "forward", "gradient", "values"]

HEAD = """cascade c(Q[b,h,p,e]: {dtype}, K[b,g,m,e]: {dtype}, V[b,g,m,f]: {dtype}, {tensors}) -> O[b,h,p,f]: {dtype}
  where b < B, h < {h}, g < {g}, p < P, m < M, e < {e}, f < {e}, {ranks}
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // {group},m,e] * 0.3{domain}
  C[b,h,p,m] = S[b,h,p,m] + {bias}
"""
SOFTMAX = """  G[b,h,p]   = max(m) C[b,h,p,m]
  W[b,h,p,m] = exp(C[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: {dtype} = sum(m) V[b,h // {group},m,f] * W[b,h,p,m] / Z[b,h,p]
"""
SIGMOID = "  O[b,h,p,f]: {dtype} = sum(m) V[b,h // {group},m,f] / (1 + exp(-C[b,h,p,m]))\n"

# name: what the bias reads, with the ranks of that; the bias; the domain; the rest
TABLES = {
    "buckets of distances": (
        "I[p,m]: i64, A[t,h]: {dtype}", "t < 12",
        "A[Where(m > p, 6, 0) + Where(abs(m - p) < 4, abs(m - p), Min(5, I[p,m] + 4)),h]", "", SOFTMAX,
    ),
    "causal buckets": ("I[p,m]: i64, A[t,h]: {dtype}", "t < 12", "A[Min(11, I[p,m]),h]", "  if m <= p", SOFTMAX),
    "clamped distances": (
        "A[h,t]: {dtype}", "t < 17", "A[h,Min(8, Max(-8, p - m)) + 8]", "  if p - m < 40", SOFTMAX,
    ),
    "all distances": ("A[h,t]: {dtype}", "t < P + M - 1", "A[h,p - m + M - 1]", "", SOFTMAX),
    "one place for a pair": ("I[u]: i64, A[t,h]: {dtype}", "t < 49, u < P*M", "A[I[p*M + m],h]", "", SOFTMAX),
    "a table of two ranks": (
        "I[p,m]: i64, J[p,m]: i64, A[h,t,u]: {dtype}", "t < 12, u < 12", "A[h,I[p,m],J[p,m]]", "", SOFTMAX,
    ),
    "shared by heads": ("I[p,m]: i64, A[t]: {dtype}", "t < 12", "A[I[p,m]]", "  if m <= p", SOFTMAX),
    "an index of each batch": ("I[b,p,m]: i64, A[t,h]: {dtype}", "t < 12", "A[I[b,p,m],h]", "", SOFTMAX),
    "lengths": ("L[b]: i64, I[p,m]: i64, A[t,h]: {dtype}", "t < 12", "A[I[p,m],h]", "  if m < L[b] & m <= p", SOFTMAX),
    "sigmoid": ("I[p,m]: i64, A[t,h]: {dtype}", "t < 12", "A[I[p,m],h]", "", SIGMOID),
}  # fmt: skip


def forward(name: str, dtype: str = "f32", h: int = 2, g: int = 2, e: int = 8) -> Cascade:
    """The attention as it is before loops are made."""
    tensors, ranks, bias, domain, rest = TABLES[name]
    known = {"dtype": dtype, "h": h, "g": g, "e": e, "group": h // g, "ranks": ranks, "bias": bias, "domain": domain}
    text = HEAD.format(tensors=tensors.format(dtype=dtype), **known) + rest.format(**known)
    return scan_free(parse_cascade(text), "exact")


def gradient(plain: Cascade) -> Gradient:
    return differentiate(plain)


def values(plain: Cascade, made: Gradient, sizes: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for what the gradient reads, those saved computed in float64: in the order of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    lengths = extents(plain, sizes)
    found: dict[str, torch.Tensor] = {}
    for t in plain.inputs:
        shape = [lengths[r] for r in t.ranks]
        if t.dtype == "i64":
            found[t.name] = torch.randint(0, 12, shape, generator=generator)
        else:
            found[t.name] = torch.randn(shape, generator=generator).to(TORCH_DTYPES[t.dtype])
    saved = interpret(made.forward, found, sizes)
    kept = made.forward.tensors
    found |= {n: saved[n].to(TORCH_DTYPES[kept[n].dtype]) for n in made.saved}
    for output, cotangent in made.cotangents.items():
        found[cotangent] = torch.randn(saved[output].shape, generator=generator).to(TORCH_DTYPES[kept[output].dtype])
    return {t.name: found[t.name] for t in made.cascade.inputs}
