"""Analyses against counts worked out by hand. Each cascade's comment says why its number is what it is."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given, settings

from einscade.ir import Access, Cascade, var
from einscade.ir.analysis import (
    BITS,
    analyse,
    footprint,
    kept_fraction,
    operations,
    passes,
    roofline,
    serial_rank,
    traffic,
)
from einscade.ir.device import A100, CPU, DEVICES, H200, Device
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from tests.strategies import Case, attention, cascades

ATTENTION = """cascade attention(Q[p,e]: bf16, K[m,e]: bf16, V[m,f]: bf16) -> O[p,f]: bf16
  where p < P, m < M, e < 64, f < 64"""

TEXTBOOK = f"""{ATTENTION}
  S[p,m] = sum(e) Q[p,e] * K[m,e] * 0.125   if m <= p
  G[p]   = max(m) S[p,m]
  W[p,m] = exp(S[p,m] - G[p])
  Z[p]   = sum(m) W[p,m]
  A[p,m] = W[p,m] / Z[p]
  O[p,f] = sum(m) A[p,m] * V[m,f]
"""
DEFERRED = f"""{ATTENTION}
  S[p,m] = sum(e) Q[p,e] * K[m,e] * 0.125   if m <= p
  G[p]   = max(m) S[p,m]
  W[p,m] = exp(S[p,m] - G[p])
  Z[p]   = sum(m) W[p,m]
  N[p,f] = sum(m) W[p,m] * V[m,f]
  O[p,f] = N[p,f] / Z[p]
"""
ONLINE = f"""{ATTENTION}, m1 < ceil_div(M, M0) of m, m0 < M0 of m
  S[p,m1,m0] = sum(e) Q[p,e] * K[m1*M0 + m0,e] * 0.125   if m1*M0 + m0 < M & m1*M0 + m0 <= p
  L[p,m1]    = max(m0) S[p,m1,m0]
  G[p,m1]    = Max(G[p,m1 - 1], L[p,m1])   along m1 from -oo
  W[p,m1,m0] = exp(S[p,m1,m0] - G[p,m1])
  ZL[p,m1]   = sum(m0) W[p,m1,m0]
  Z[p,m1]    = Z[p,m1 - 1] * exp(G[p,m1 - 1] - G[p,m1]) + ZL[p,m1]   along m1 from 0
  NL[p,m1,f] = sum(m0) W[p,m1,m0] * V[m1*M0 + m0,f]
  N[p,m1,f]  = N[p,m1 - 1,f] * exp(G[p,m1 - 1] - G[p,m1]) + NL[p,m1,f]   along m1 from 0
  O[p,f]     = N[p,(M - 1) // M0,f] / Z[p,(M - 1) // M0]
"""

BY_HAND = {
    # the maximum; the sum of exponentials needs it; the division needs the sum
    "textbook attention": (TEXTBOOK, "m", 3),
    # the division no longer traverses m
    "deferred attention": (DEFERRED, "m", 2),
    # running values go along with the traversal; only the last element is read after it
    "online attention": (ONLINE, "m", 1),
    # every query is visited once, whatever happens along the keys
    "attention, query rank": (TEXTBOOK, "p", 1),
    # maximum, then the shifted sum; the logarithm comes after
    "log-sum-exp": (
        """cascade lse(X[p,m]) -> L
        where p < P, m < M
        G[p] = max(m) X[p,m]
        Z[p] = sum(m) exp(X[p,m] - G[p])
        L[p] = G[p] + log(Z[p])""",
        "m",
        2,
    ),
    # the mean, then the squared distances from it
    "variance, two passes": (
        """cascade variance(X[p,m]) -> V
        where p < P, m < M
        A[p] = sum(m) X[p,m]
        V[p] = sum(m) (X[p,m] - A[p] / M)**2""",
        "m",
        2,
    ),
    # both moments in one traversal, their combination after it
    "variance by moments": (
        """cascade variance(X[p,m]) -> V
        where p < P, m < M
        A[p] = sum(m) X[p,m]
        B[p] = sum(m) X[p,m]**2
        V[p] = B[p] / M - (A[p] / M)**2""",
        "m",
        1,
    ),
    # mean, variance, and the product with the normalised row
    "layer norm, then matmul": (
        """cascade norm(X[p,d], T[d,f]) -> Y
        where p < P, d < D, f < F
        A[p]   = sum(d) X[p,d] / D
        B[p]   = sum(d) (X[p,d] - A[p])**2 / D
        N[p,d] = (X[p,d] - A[p]) / sqrt(B[p] + 1e-05)
        Y[p,f] = sum(d) N[p,d] * T[d,f]""",
        "d",
        3,
    ),
    # no normaliser at all
    "sigmoid attention": (
        """cascade sigmoid(Q[p,e], K[m,e], V[m,f]) -> O
        where p < P, m < M, e < E, f < F
        S[p,m] = sum(e) Q[p,e] * K[m,e]
        W[p,m] = 1 / (1 + exp(-S[p,m]))
        O[p,f] = sum(m) W[p,m] * V[m,f]""",
        "m",
        1,
    ),
    # the state sums over the keys once; queries read it whole
    "linear attention": (
        """cascade linear(Q[p,e], K[m,e], V[m,f]) -> O
        where p < P, m < M, e < E, f < F
        H[e,f] = sum(m) K[m,e] * V[m,f]
        Z[e]   = sum(m) K[m,e]
        D[p]   = sum(e) Q[p,e] * Z[e]
        O[p,f] = sum(e) Q[p,e] * H[e,f] / D[p]""",
        "m",
        1,
    ),
    # the same cascade along the width: the denominator is a traversal of e, its use in the sum another
    "linear attention, width": (
        """cascade linear(Q[p,e], H[e,f], Z[e]) -> O
        where p < P, e < E, f < F
        D[p]   = sum(e) Q[p,e] * Z[e]
        O[p,f] = sum(e) Q[p,e] * H[e,f] / D[p]""",
        "e",
        2,
    ),
    # norms along e come first, then the scores; along m it is textbook attention
    "cosine attention, width": (
        """cascade cosine(Q[p,e], K[m,e], V[m,f]) -> O
        where p < P, m < M, e < E, f < F
        A[p]   = sum(e) Q[p,e]**2
        B[m]   = sum(e) K[m,e]**2
        S[p,m] = sum(e) Q[p,e] * K[m,e] / sqrt(A[p]) / sqrt(B[m])
        G[p]   = max(m) S[p,m]
        W[p,m] = exp(S[p,m] - G[p])
        Z[p]   = sum(m) W[p,m]
        O[p,f] = sum(m) W[p,m] / Z[p] * V[m,f]""",
        "e",
        2,
    ),
    # the largest of a row, then its place, then what stands there: a gather needs all of the index, no traversal
    "selection": (
        """cascade select(X[p,m], V[m]) -> Y
        where p < P, m < M, s < 4
        I[p,s]: i64 = topk(m -> s) X[p,m]
        Y[p,s] = V[I[p,s]]""",
        "m",
        1,
    ),
    # suffix sums of prefix sums: the second scan runs against the first, so that it must wait for its end
    "two scans, opposite ways": (
        """cascade scans(X[t]) -> B
        where t < T
        A[t] = A[t - 1] + X[t]   along t from 0
        B[t] = B[t - 1] + A[T - 1 - t]   along t from 0""",
        "t",
        2,
    ),
    # both scans run the same way: one traversal
    "two scans, the same way": (
        """cascade scans(X[t]) -> B
        where t < T
        A[t] = A[t - 1] + X[t]   along t from 0
        B[t] = B[t - 1] + A[t]   along t from 0""",
        "t",
        1,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_passes(name: str) -> None:
    text, rank, expected = BY_HAND[name]
    assert passes(parse_cascade(text))[rank] == expected


def _same(a: sympy.Expr, b: sympy.Expr) -> bool:
    return sympy.expand(a - b) == 0


def test_traffic_counts_what_is_read_and_written_once() -> None:
    P, M = var("P"), var("M")
    cascade = parse_cascade(TEXTBOOK)
    assert _same(traffic(cascade), 2 * (64 * P + 64 * M + 64 * M + 64 * P))
    unread = parse_cascade("cascade c(X[p], Y[p]: i4) -> Z\n where p < P\n Z[p] = X[p] + 1")
    assert _same(traffic(unread), 8 * P)
    packed = parse_cascade("cascade c(Y[p]: i4) -> Z[p]: f16\n where p < P\n Z[p] = Y[p] + 1")
    assert _same(traffic(packed), sympy.Rational(5, 2) * P)


def test_operations_of_deferred_attention() -> None:
    P, M = var("P"), var("M")
    work = operations(parse_cascade(DEFERRED))
    assert set(work.matrix) == {"bf16"}
    assert _same(work.matrix["bf16"], 2 * 64 * P * M + 2 * 64 * P * M)
    assert _same(work.special, P * M)
    # the scale of S, a maximum, a difference, a sum for each point; a division for each output
    assert _same(work.vector, P * M + P * M + P * M + P * M + 64 * P)


def test_footprint_grows_with_the_keys_until_the_cascade_is_online() -> None:
    M, M0 = var("M"), var("M0")
    for text in (TEXTBOOK, DEFERRED):
        assert M in footprint(parse_cascade(text), "m", {"p"}).free_symbols
    online = footprint(parse_cascade(ONLINE), "m", {"p"})
    assert M not in online.free_symbols
    # while NL is made: W's and V's tiles, NL, the running G and Z; while N is updated: NL, N, G, Z
    assert online == sympy.Max((4 + 128) * M0 + 256 + 8, 256 + 256 + 8)
    # of the textbook form, while W is made: S and W whole, since later passes read them, and G
    assert footprint(parse_cascade(TEXTBOOK), "m", {"p"}).subs(M, 10**6) == 8 * 10**6 + 4


def test_the_serial_rank_is_the_one_with_most_passes_and_open_length() -> None:
    assert [serial_rank(parse_cascade(t)) for t in (TEXTBOOK, ONLINE, BY_HAND["variance by moments"][0])] == ["m"] * 3
    assert serial_rank(parse_cascade("cascade c(X[p]) -> Y\n where p < P\n Y[p] = exp(X[p])")) is None


@pytest.mark.parametrize("text", [TEXTBOOK, ONLINE])
def test_a_causal_domain_keeps_half(text: str) -> None:
    cascade = parse_cascade(text)
    assert kept_fraction(cascade, "W", {"P": 4096, "M": 4096, "M0": 64}) == pytest.approx(0.5, abs=0.02)


def test_a_finished_scan_is_read_at_every_point() -> None:
    assert kept_fraction(parse_cascade(ONLINE), "O", {"P": 4096, "M": 4096, "M0": 64}) == 1


def test_roofline_is_the_longer_of_traffic_and_arithmetic() -> None:
    cascade = parse_cascade(DEFERRED.replace("   if m <= p", ""))
    n = 8192
    compute = roofline(cascade, H200, {"P": n, "M": n})
    assert compute >= 4 * n * n * 64 / H200.matrix["bf16"]
    single = roofline(cascade, H200, {"P": 1, "M": n})
    assert single == pytest.approx(2 * (2 * 64 + 2 * 64 * n) / H200.bandwidth)
    assert roofline(cascade, A100, {"P": n, "M": n}) > compute


def test_points_outside_a_domain_take_no_time() -> None:
    sizes = {"P": 8192, "M": 8192}
    causal = roofline(parse_cascade(DEFERRED), H200, sizes)
    assert causal == pytest.approx(
        roofline(parse_cascade(DEFERRED.replace("   if m <= p", "")), H200, sizes) / 2, rel=0.05
    )


def test_analyse_gathers_the_figures() -> None:
    figures = analyse(parse_cascade(ONLINE))
    assert figures.passes["m"] == 1
    assert figures.serial == "m"


def test_devices() -> None:
    assert len({d.name for d in DEVICES}) == len(DEVICES)
    assert pickle.loads(pickle.dumps(H200)) == H200
    assert hash(H200) != hash(A100)
    cpu = Device.of(torch.device("cpu"))
    assert cpu.kind == "cpu"
    assert cpu.vector == CPU.vector * torch.get_num_threads()
    assert H200.matrix_rate("i16") == H200.vector
    with pytest.raises(ValueError, match="meta"):
        Device.of("meta")


def test_an_empty_body_costs_its_copies() -> None:
    cascade = Cascade("same", (), (), (), ())
    assert passes(cascade) == {}
    assert footprint(cascade) == 0


@settings(max_examples=100, deadline=None)
@given(case=cascades())
def test_every_cascade_has_figures(case: Case) -> None:
    figures = analyse(case.cascade)
    iterated = {r for e in case.cascade.body for r in e.ranks}
    assert all((figures.passes[r] > 0) == (r in iterated) for r in figures.passes)
    # A reduction of a rank is a pass over it; more passes than statements cannot be forced.
    assert max(figures.passes.values()) <= len(case.cascade.body)
    for device in DEVICES:
        assert 0 < roofline(case.cascade, device, case.sizes) < 1
    values = {var(s): size for s, size in case.sizes.items()}
    inputs = sum(x.numel() * x.element_size() for x in case.inputs().values())
    outputs = sum(
        math.prod(case.cascade.shape(o)) * BITS[case.cascade.tensors[o].dtype] // 8 for o in case.cascade.outputs
    )
    assert figures.traffic.subs(values) <= inputs + sympy.sympify(outputs).subs(values)


@settings(max_examples=60, deadline=None)
@given(case=attention())
def test_the_kept_fraction_is_exact_on_small_grids(case: Case) -> None:
    """Counted by the interpreter, for domains that read no tensor."""
    first = case.cascade.body[0]
    if first.domain.has(Access):
        return
    ones = first.replace(output=replace(first.output, dtype="f32"), expr=sympy.Integer(1), reduce=None)
    counted = case.cascade.replace(body=(ones,), outputs=(ones.name,))
    kept = interpret(counted, case.inputs(), {s: case.sizes[s] for s in counted.symbols})[ones.name]
    assert kept_fraction(case.cascade, first.name, case.sizes) == pytest.approx(float(kept.mean()))
