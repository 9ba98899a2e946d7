"""Defer and online: equal over the reals for every cascade that has a correction; a reason for one that has none."""

from __future__ import annotations

import pytest
import sympy

from einscade.ir import Cascade, ceil_div, var
from einscade.ir.verify import verify
from einscade.passes.defer import Defer
from einscade.passes.existence import existence
from einscade.passes.online import Loops, Online
from einscade.passes.pipeline import run
from einscade.passes.rewrite import NotApplicable
from tests.passes.cascades import ALL, ATTENTION, NO_CORRECTION, SIZES, VARIANCE, assert_equal, cascade

LENGTHS = [(7, 5), (1, 1), (6, 9), (0, 3), (3, 0)]


def rewritten(c: Cascade) -> Cascade:
    for rewrite in (Defer(), Online(), Loops()):
        try:
            c = rewrite.apply(c)
        except NotApplicable:
            continue
        verify(c, rewrite.name)
    return c


@pytest.mark.parametrize("name", ALL)
def test_equal_for_all_lengths_and_tiles(name: str) -> None:
    before = cascade(ALL[name])
    after = rewritten(before)
    for m, p in LENGTHS:
        sizes = {**SIZES, "M": m, "P": p}
        assert_equal(before, after, sizes, tiles=(1, 3, 16))


def test_what_reads_other_points_than_its_own_has_no_loop() -> None:
    """Halves that change places, as in rotary positions: the tile of a step does not have what is read."""
    before = cascade("""
        cascade rotated(Q[p,e], K[m,e], V[m,f], C[m]) -> O
          where p < P, m < 8, e < 3, f < 2
          S[p,m] = sum(e) Q[p,e] * K[m,e]
          O[p,f] = sum(m) (S[p,m] * C[m] - S[p,(m + 4) % 8]) * V[m,f]
    """)
    with pytest.raises(NotApplicable, match="point by point"):
        Loops().apply(before)
    assert_equal(before, rewritten(before), {"P": 5}, tiles=(1, 3, 16))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"no correction"}))
def test_one_loop_over_the_long_rank(name: str) -> None:
    scans = {s.scan.rank for s in rewritten(cascade(ALL[name])).body if s.scan}
    assert scans == {"m1"}


def test_the_documented_form() -> None:
    after = Online().apply(Defer().apply(cascade(ATTENTION)))
    g, z = after.tensors["G"], after.tensors["Z"]
    b, h, p, m1 = map(var, ("b", "h", "p", "m1"))
    correction = sympy.exp(g(b, h, p, m1 - 1) - g())
    assert after.definitions["Z"].expr == z(b, h, p, m1 - 1) * correction + after.tensors["ZL"]()
    assert after.definitions["G"].scan is not None
    assert after.definitions["G"].scan.init == -sympy.oo
    assert after.definitions["O"].domain == sympy.Ne(z(b, h, p, ceil_div(var("M"), var("M0")) - 1), 0)
    assert [r.origin for r in after.ranks if r.name in ("m1", "m0")] == ["m", "m"]


def test_refusal_names_the_reduction_and_the_reason() -> None:
    with pytest.raises(NotApplicable, match=r"T: sum of .*tanh.*ratio.*G depends on m"):
        Online().apply(cascade(NO_CORRECTION))


def test_a_median_like_dependency_is_refused() -> None:
    count_below = """
    cascade rank(x[b,m]: f32) -> C
      where b < B, m < M
      A[b] = sum(m) x[b,m]
      C[b] = sum(m) Where(x[b,m] < A[b] / M, 1, 0)
    """
    with pytest.raises(NotApplicable, match=r"C: .*depends on m"):
        Online().apply(cascade(count_below))


def test_what_cannot_be_joined_gets_a_loop_of_its_own() -> None:
    text = """
    cascade two(Q[b,p,e]: f32, K[b,m,e]: f32, V[b,m,f]: f32) -> O
      where b < B, p < P, m < M, e < 3, f < 5
      S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e] if m <= p
      G[b,p] = max(m) S[b,p,m]
      O[b,p,f] = sum(m) tanh(S[b,p,m] - G[b,p]) * V[b,m,f]
    """
    before = cascade(text)
    after = rewritten(before)
    assert len({s.scan.rank for s in after.body if s.scan}) == 2
    assert_equal(before, after, SIZES, tiles=(1, 3, 16))


def test_mixing_heads_after_the_normaliser_takes_two_loops() -> None:
    text = """
    cascade talking(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32, A[h,k]: f32) -> O
      where b < B, h < 4, k < 4, p < P, m < M, e < 3, f < 5
      S[b,k,p,m] = sum(e) Q[b,k,p,e] * K[b,k,m,e] if m <= p
      G[b,k,p] = max(m) S[b,k,p,m]
      W[b,k,p,m] = exp(S[b,k,p,m] - G[b,k,p])
      Z[b,k,p] = sum(m) W[b,k,p,m]
      T[b,h,p,m] = sum(k) A[h,k] * W[b,k,p,m] / Z[b,k,p]
      O[b,h,p,f] = sum(m) T[b,h,p,m] * V[b,h,m,f]
    """
    before = cascade(text)
    after = rewritten(before)
    assert len({s.scan.rank for s in after.body if s.scan}) == 2
    assert_equal(before, after, SIZES, tiles=(1, 3, 16))


def test_higher_moments() -> None:
    text = """
    cascade skew(x[b,m]: f32, w[b,m]: f32) -> T, U
      where b < B, m < M
      X[b] = sum(m) w[b,m] * x[b,m] if m < 6
      N[b] = sum(m) w[b,m] if m < 6
      mu[b] = X[b] / (N[b] + 30)
      T[b] = sum(m) w[b,m] * (x[b,m] - mu[b])**3 if m < 6
      G[b] = max(m) x[b,m]
      U[b] = sum(m) exp(x[b,m] - G[b]) * (x[b,m] - mu[b])
    """
    before = cascade(text)
    after = rewritten(before)
    assert len({s.scan.rank for s in after.body if s.scan}) == 1
    assert_equal(before, after, {"B": 2, "M": 11}, tiles=(1, 3, 16))


@pytest.mark.parametrize(
    ("factors", "joins"), [("(x - mu)**2 * (x + mu)**2", True), ("(x - mu)**3 * (x + mu)**2", False)]
)
def test_polynomials_up_to_the_fourth_degree_are_carried(factors: str, joins: bool) -> None:
    """Of a product, too, none of whose factors is of a higher degree than that."""
    expr = factors.replace("x", "x[b,m]").replace("mu", "mu[b]")
    before = cascade(f"""
    cascade moments(x[b,m]: f32, w[b,m]: f32) -> T
      where b < B, m < M
      S[b,m] = x[b,m] * w[b,m]
      mu[b] = sum(m) S[b,m]
      T[b] = sum(m) sin(S[b,m]) * {expr}
    """)
    after = rewritten(before)
    assert len({s.scan.rank for s in after.body if s.scan}) == (1 if joins else 2)
    assert_equal(before, after, {"B": 2, "M": 11}, tiles=(1, 3, 16))


def test_an_expression_that_is_long_is_not_carried() -> None:
    """Simplifying it would take long, too."""
    weights = "W[b,m] / Z[b]"
    for _ in range(5):
        weights = f"({weights} + {weights} * sin({weights}))"
    before = cascade(f"""
    cascade long(x[b,m]: f32, v[b,m]: f32) -> O
      where b < B, m < M
      W[b,m] = exp(x[b,m])
      Z[b] = sum(m) W[b,m]
      O[b] = sum(m) {weights} * v[b,m]
    """)
    with pytest.raises(NotApplicable, match="more than 200 operations"):
        Online().apply(before)


def test_a_moment_sums_over_the_points_of_its_own_reduction() -> None:
    """Buckets along a result's own rank (the gradient of a relative bias, of probabilities that are an output, too),
    and three reductions whose moments have the same expression but not the same points."""
    text = """
    cascade buckets(x[b,m]: f32, w[b,m]: f32, I[m]: i64) -> T, U, N
      where b < B, m < M, f < 3
      S[b,m] = x[b,m] * w[b,m]
      mu[b] = sum(m) S[b,m]
      T[b,f] = sum(m) S[b,m] * (x[b,m] - mu[b])**2 if I[m] == f
      U[b] = sum(m) S[b,m] * (x[b,m] + mu[b])**2 if m < 6
      N[b] = sum(m) S[b,m] * (2 * x[b,m] - mu[b])**2
    """
    before = cascade(text)
    after = rewritten(before)
    assert len({s.scan.rank for s in after.body if s.scan}) == 1
    assert_equal(before, after, {"B": 2, "M": 11}, tiles=(1, 3, 16))


def test_running_variance_does_not_cancel() -> None:
    """In float32, with a mean a thousand times the deviation, the running form is as good as the two-pass one."""
    import torch

    x = 1000 + torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    after = rewritten(cascade(VARIANCE))
    running = {s.name: torch.zeros(1) for s in after.body if s.scan}
    tile = 64
    names = {s.name for s in after.body}
    assert {"X", "CA", "C"} <= names
    for step in range(4096 // tile):
        xs = x[:, step * tile : (step + 1) * tile]
        old = dict(running)
        running["X"] = old["X"] + xs.sum(1)
        mu, before = running["X"] / ((step + 1) * tile), old["X"] / max(1, step * tile)
        running["CA"] = (mu - before) * step * tile + old["CA"] + (mu - xs).sum(1)
        running["C"] = (
            (mu - before) ** 2 * step * tile + 2 * (mu - before) * old["CA"] + old["C"] + ((xs - mu) ** 2).sum(1)
        )
    exact = ((x.double() - x.double().mean()) ** 2).sum()
    assert abs(running["C"].double() - exact) / exact < 1e-3


def test_terms_that_are_split_keep_the_points_of_the_whole() -> None:
    text = """
    cascade apart(Q[b,p,e]: f32, K[b,m,e]: f32, V[b,m,f]: f32) -> O
      where b < B, p < P, m < M, e < 3, f < 5
      S1[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e] if m <= p
      S2[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
      W1[b,p,m] = exp(S1[b,p,m])
      W2[b,p,m] = exp(S2[b,p,m])
      Z1[b,p] = sum(m) W1[b,p,m]
      Z2[b,p] = sum(m) W2[b,p,m]
      O[b,p,f] = sum(m) (W1[b,p,m] / Z1[b,p] - W2[b,p,m] / Z2[b,p]) * V[b,m,f]
    """
    before = cascade(text)
    after = Defer().apply(before)
    assert [s.domain for s in after.body if s.name.startswith("N")] != [sympy.true, sympy.true]
    assert_equal(before, after, SIZES)
    assert_equal(before, rewritten(before), SIZES, tiles=(1, 3))


def test_booleans_run_along() -> None:
    text = """
    cascade found(Q[b,p,e]: f32, K[b,m,e]: f32, V[b,m,f]: f32) -> A, O
      where b < B, p < P, m < M, e < 3, f < 5
      S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e] if m <= p
      A[b,p]: bool = any(m) S[b,p,m] > 1
      C[b,p]: i32 = sum(m) Where(S[b,p,m] > 1, 1, 0)
      O[b,p,f] = sum(m) Where(S[b,p,m] > 0, V[b,m,f], 0) / (1 + C[b,p])
    """
    before = cascade(text)
    after = rewritten(before)
    assert {s.scan.rank for s in after.body if s.scan} == {"m1"}
    assert_equal(before, after, SIZES, tiles=(1, 3, 16))
    assert_equal(before, run(before, "exact").cascade, SIZES, tiles=(1, 3, 16))


@pytest.mark.parametrize("domain", ["m < L[b]", "m < L[b] & m <= p"])
def test_a_step_of_one_point_adds_nothing_where_it_is_missing(domain: str) -> None:
    """The gradient of a bias that rows of a batch share, which have lengths of their own: a running sum passes over
    what one row does not have. What no row has is a sum over nothing."""
    before = cascade(f"""
        cascade shared(Q[b,p,e], K[b,m,e], L[b]: i64, C[b,p]) -> O
          where b < B, p < P, m < M, e < 3
          S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]   if {domain}
          O[p,m]   = sum(b) C[b,p] * exp(S[b,p,m])
    """)
    after = rewritten(before)
    assert any(s.scan for s in after.body)
    assert existence(after).results["O"] == existence(before).results["O"] == sympy.true
    assert_equal(before, after, {"B": 4, "P": 3, "M": 9}, tiles=(1,))
