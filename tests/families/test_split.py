"""A split over the key rank: parts side by side, and a merge that is derived, for whatever has a one-pass form."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.codegen.loops import plan
from einscade.ir import Cascade, accesses
from einscade.passes.defer import Defer
from einscade.passes.online import Loops, Online
from einscade.passes.rewrite import NotApplicable
from einscade.passes.split import Split
from tests.families.cascades import (
    ATTENTION,
    WINDOW_WITH_SINK,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

ONE_PASS = (Online(), Loops())
SINK_TERM = """
cascade sink_term(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64, s[h]: f64) -> O
  where b < B, h < 3, p < P, m < M, e < 8, f < 6
  S[b,h,p,m]  = sum(e) Q[b,h,p,e] * K[b,h,m,e]
  G0[b,h,p]   = max(m) S[b,h,p,m]
  G[b,h,p]    = Max(G0[b,h,p], s[h])
  W[b,h,p,m]  = exp(S[b,h,p,m] - G[b,h,p])
  Z0[b,h,p]   = sum(m) W[b,h,p,m]
  Z[b,h,p]    = Z0[b,h,p] + exp(s[h] - G[b,h,p])
  O[b,h,p,f]: f64 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
VARIANCE = """
cascade variance(x[b,m]: f64) -> D
  where b < B, m < M
  X[b]  = sum(m) x[b,m]
  mu[b] = X[b] / M
  C[b]  = sum(m) (x[b,m] - mu[b])**2
  D[b]: f64 = C[b] / M
"""
LOG_SUM_EXP = """
cascade lse(Q[b,p,e]: f64, K[b,m,e]: f64) -> L
  where b < B, p < P, m < M, e < 8
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
  G[b,p]   = max(m) S[b,p,m]
  Z[b,p]   = sum(m) exp(S[b,p,m] - G[b,p])
  L[b,p]: f64 = G[b,p] + log(Z[b,p])
"""
ENTMAX = """
cascade tangent(x[b,m]: f64) -> T
  where b < B, m < M
  G[b] = max(m) x[b,m]
  T[b]: f64 = sum(m) tanh(x[b,m] - G[b])
"""
CASES = {
    "full": cascade(ATTENTION),
    "causal": cascade(ATTENTION, "m <= p"),
    "window with a sink": cascade(ATTENTION, WINDOW_WITH_SINK),
    "rows without keys": cascade(ATTENTION, "m <= p & m > 4"),
    "a sink term": cascade(SINK_TERM),
    "log-sum-exp": cascade(LOG_SUM_EXP),
    "variance": cascade(VARIANCE),
}


def split(c: Cascade, parts: int | str = "S") -> Cascade:
    return apply(apply(c, optional=(Defer(),)), Split("m", parts))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("p", "m"), [(9, 13), (1, 1), (5, 8)])
@pytest.mark.parametrize("parts", [1, 3, 11])
def test_a_split_is_exact(name: str, p: int, m: int, parts: int) -> None:
    before = CASES[name]
    after = split(before)
    data = inputs(before, B=2, P=p, M=m)
    expected = interpreted(apply(before, optional=(Defer(),)), data)  # an empty row's quotient is guarded there
    assert_same(interpreted(after, data, sizes={"S": parts}), expected)


@given(m=st.integers(1, 20), parts=st.integers(1, 7), offset=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_variance_of_parts_does_not_cancel(m: int, parts: int, offset: float, seed: int) -> None:
    """The derived merge is that of Chan, Golub and LeVeque: a large mean costs no more digits than it must."""
    data = inputs(CASES["variance"], seed, B=2, M=m)
    data["x"] = data["x"] + offset
    found = interpreted(split(CASES["variance"], parts), data)["D"]
    true = data["x"].var(1, unbiased=False)
    assert ((found - true).abs() <= 1e-15 * offset**2 * 1e-3 + 1e-10).all()


def test_the_merge_is_the_derived_correction() -> None:
    after = split(CASES["causal"])
    scale = sympy.exp(after.definitions["G"].expr - after.tensors["G"]())
    for name in ("Z", "N"):
        merge = after.definitions[name]
        assert merge.reduce is not None
        assert merge.reduce.ranks == ("ms",)
        assert scale in sympy.Mul.make_args(merge.expr)
        assert {a.tensor for a in accesses(merge.expr)} == {f"{name}s", "Gs", "G"}


def test_parts_run_side_by_side_and_each_in_one_pass() -> None:
    program = plan(apply(split(CASES["causal"], 3), *ONE_PASS[:1]))
    parts, merge = program.serial_nests
    assert "ms" in parts.grid
    assert {e.name for e in parts.scans} == {"Gs", "Zs", "Ns"}
    assert not {"Q", "K", "V"} & set(merge.inputs), "the merge reads no key again"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("p", "m"), [(9, 13), (1, 1)])
@pytest.mark.parametrize("parts", [1, 3, 11])
def test_generated_code_agrees(name: str, p: int, m: int, parts: int) -> None:
    before = CASES[name]
    after = apply(split(before), optional=ONE_PASS)
    data = inputs(before, B=2, P=p, M=m)
    expected = interpreted(apply(before, optional=(Defer(),)), data)
    assert_same(generated(after, data, sizes={"S": parts}), expected)


def test_splits_nest() -> None:
    """Parts of parts: keys over devices, then over the blocks of each."""
    before = CASES["causal"]
    after = apply(split(before, "D"), Split("mu", "S"))
    data = inputs(before, B=2, P=9, M=23)
    assert_same(interpreted(after, data, sizes={"D": 3, "S": 2}), interpreted(before, data))


@pytest.mark.parametrize(
    ("text", "rewrite", "reason"),
    [
        (ENTMAX, Split("m"), "its ratio for two values of G depends on m"),
        (ATTENTION, Split("e"), "no reductions over e"),
        (ATTENTION, Split("x"), "no reductions over x"),
    ],
)
def test_what_cannot_be_split(text: str, rewrite: Split, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        rewrite.apply(cascade(text))


def test_parts_must_be_positive() -> None:
    with pytest.raises(ValueError, match="parts=0"):
        Split("m", 0)


def test_one_key_far_above_the_others() -> None:
    before = CASES["full"]
    data = inputs(before, B=1, P=4, M=12)
    data["K"][:, :, 7] *= 1e3
    out = interpreted(split(before, 4), data)["O"]
    assert out.isfinite().all()
    assert_same({"O": out}, interpreted(before, data))
    assert isinstance(out, torch.Tensor)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 5, 100])
def test_parts_of_a_length(name: str, length: int) -> None:
    """However many it takes, the last one shorter."""
    before = CASES[name]
    after = apply(apply(before, optional=(Defer(),)), Split("m", length="LP"))
    data = inputs(before, B=2, P=7, M=13)
    expected = interpreted(apply(before, optional=(Defer(),)), data)
    assert_same(interpreted(after, data, sizes={"LP": length}), expected)
    assert_same(generated(apply(after, optional=ONE_PASS), data, sizes={"LP": length}), expected)


def test_a_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="length=0"):
        Split("m", length=0)
