"""Cascades that the passes are tested on, as text, and the comparison of two cascades on random inputs."""

from __future__ import annotations

import torch

from einscade.ir import Cascade
from einscade.ir.interpret import extents, interpret
from einscade.ir.text import parse_cascade

SIZES = {"B": 2, "P": 5, "M": 7}

ATTENTION = """
cascade attention(Q[b,h,p,e]: f32, K[b,g,m,e]: f32, V[b,g,m,f]: f32) -> O
  where b < B, h < 4, g < 2, p < P, m < M, e < 3, f < 5
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h // 2,m,e] if m <= p
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h // 2,m,f] / Z[b,h,p]
"""

LOGSUMEXP = """
cascade lse(Q[b,p,e]: f32, K[b,m,e]: f32) -> L
  where b < B, p < P, m < M, e < 3
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
  G[b,p] = max(m) S[b,p,m]
  Z[b,p] = sum(m) exp(S[b,p,m] - G[b,p])
  L[b,p] = G[b,p] + log(Z[b,p])
"""

SINK = """
cascade sink(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32, s[h]: f32) -> O
  where b < B, h < 4, p < P, m < M, e < 3, f < 5
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] if m <= p
  G0[b,h,p] = max(m) S[b,h,p,m]
  G[b,h,p] = Max(G0[b,h,p], s[h])
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z0[b,h,p] = sum(m) W[b,h,p,m]
  Z[b,h,p] = Z0[b,h,p] + exp(s[h] - G[b,h,p])
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""

VARIANCE = """
cascade variance(x[b,m]: f32) -> D
  where b < B, m < M
  X[b] = sum(m) x[b,m]
  mu[b] = X[b] / M
  C[b] = sum(m) (x[b,m] - mu[b])**2
  D[b] = C[b] / M
"""

WEIGHTED_MEAN = """
cascade mean(x[b,m]: f32, w[b,m]: f32) -> A
  where b < B, m < M
  G[b] = max(m) w[b,m]
  N[b] = sum(m) exp(2*w[b,m] - 2*G[b]) * x[b,m]
  Z[b] = sum(m) exp(2*w[b,m] - 2*G[b])
  A[b] = N[b] / Z[b] if Z[b] != 0
"""

SIGMOID = """
cascade sigmoid(Q[b,p,e]: f32, K[b,m,e]: f32, V[b,m,f]: f32) -> O
  where b < B, p < P, m < M, e < 3, f < 5
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e] if m <= p
  W[b,p,m] = 1 / (1 + exp(-S[b,p,m]))
  O[b,p,f] = sum(m) W[b,p,m] * V[b,m,f]
"""

DIFFERENTIAL = """
cascade differential(Q[b,c,p,e]: f32, K[b,c,m,e]: f32, V[b,m,f]: f32, lam[b]: f32) -> O
  where b < B, c < 2, p < P, m < M, e < 3, f < 5
  S1[b,p,m] = sum(e) Q[b,0,p,e] * K[b,0,m,e] if m <= p
  S2[b,p,m] = sum(e) Q[b,1,p,e] * K[b,1,m,e] if m <= p
  G1[b,p] = max(m) S1[b,p,m]
  G2[b,p] = max(m) S2[b,p,m]
  W1[b,p,m] = exp(S1[b,p,m] - G1[b,p])
  W2[b,p,m] = exp(S2[b,p,m] - G2[b,p])
  Z1[b,p] = sum(m) W1[b,p,m]
  Z2[b,p] = sum(m) W2[b,p,m]
  O[b,p,f] = sum(m) (W1[b,p,m] / Z1[b,p] - lam[b] * W2[b,p,m] / Z2[b,p]) * V[b,m,f]
"""

NO_CORRECTION = """
cascade hard(x[b,m]: f32) -> T
  where b < B, m < M
  G[b] = max(m) x[b,m]
  T[b] = sum(m) tanh(x[b,m] - G[b])
"""

ALL = {
    "attention": ATTENTION,
    "logsumexp": LOGSUMEXP,
    "sink": SINK,
    "variance": VARIANCE,
    "weighted mean": WEIGHTED_MEAN,
    "sigmoid": SIGMOID,
    "differential": DIFFERENTIAL,
    "no correction": NO_CORRECTION,
}


def cascade(text: str) -> Cascade:
    return parse_cascade(text.strip())


def random_inputs(c: Cascade, sizes: dict[str, int], seed: int = 0) -> list[torch.Tensor]:
    """An input for each of the cascade's, in order: standard normal, small integers or coin flips by dtype."""
    generator = torch.Generator().manual_seed(seed)
    lengths = extents(c, {s: sizes.get(s, 1) for s in c.symbols})
    made = []
    for t in c.inputs:
        shape = [lengths[r] for r in t.ranks]
        if t.dtype == "bool":
            made.append(torch.randn(shape, generator=generator) > -0.5)
        elif t.dtype[0] in "iu":
            made.append(torch.randint(0, 3, shape, generator=generator))
        else:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return made


def outputs(c: Cascade, inputs: list[torch.Tensor], sizes: dict[str, int]) -> list[torch.Tensor]:
    named = {t.name: x for t, x in zip(c.inputs, inputs, strict=True)}
    result = interpret(c, named, {s: n for s, n in sizes.items() if s in c.symbols})
    return [result[name] for name in c.outputs]


def assert_equal(
    before: Cascade, after: Cascade, sizes: dict[str, int], seed: int = 0, tiles: tuple[int, ...] = (3,)
) -> None:
    """Both cascades give the same outputs; every tile symbol that `after` adds takes each of `tiles`."""
    inputs = random_inputs(before, sizes, seed)
    expected = outputs(before, inputs, sizes)
    new = [s for s in after.symbols if s not in before.symbols]
    for tile in tiles:
        got = outputs(after, inputs, {**sizes, **dict.fromkeys(new, tile)})
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(
                g, e, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m: f"{m}\n{before}\n{after}"
            )
