"""Linear attention: contraction order by cost, and causal, decaying and gated forms as a scan over chunks."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, var
from einscade.passes.chunk import Chunk
from einscade.passes.reassociate import Reassociate
from einscade.passes.rewrite import NotApplicable
from tests.families.cascades import (
    ATTENTION,
    DECAYED,
    FEATURE_GATED,
    GATED,
    LINEAR,
    NORMALISED,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

DECAYS = {"l": torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)}


def data_of(text: str, c: Cascade, p: int, m: int, seed: int = 0) -> dict[str, torch.Tensor]:
    data = inputs(c, seed, B=2, P=p, M=m)
    if text is DECAYED:
        data |= DECAYS
    if text in (GATED, FEATURE_GATED):  # running sums of log gates, below zero and falling
        data["g"] = -data["g"].abs().cumsum(2)
    if text is NORMALISED:
        data["Q"], data["K"] = data["Q"].abs(), data["K"].abs()
    return data


# -- reassociation --


@pytest.mark.parametrize("text", [LINEAR, NORMALISED])
def test_keys_and_values_are_contracted_first(text: str) -> None:
    before = cascade(text)
    after = apply(before, Reassociate("m"))
    assert all({"p", "m"} - set(s.ranks) for s in after.body), "no statement visits every pair of positions"
    data = data_of(text, before, 9, 13)
    assert_same(interpreted(after, data), interpreted(before, data))
    assert_same(generated(after, data), interpreted(before, data))


def test_the_cost_decides() -> None:
    before = cascade(LINEAR)
    with pytest.raises(NotApplicable, match="no order visits fewer"):
        Reassociate("m", sizes=(("P", 4), ("M", 4))).apply(before)
    assert Reassociate("m", sizes=(("P", 64), ("M", 64))).apply(before) != before


def test_a_mask_on_keys_alone_does_not_block() -> None:
    before = cascade(LINEAR, "m < 5")
    after = apply(before, Reassociate("m"))
    data = data_of(LINEAR, before, 9, 13)
    assert_same(interpreted(after, data), interpreted(before, data))


def test_a_mask_on_queries_alone_keeps_its_zeros() -> None:
    before = cascade(LINEAR, "p < 5")
    after = apply(before, Reassociate("m"))
    data = data_of(LINEAR, before, 9, 13)
    assert_same(interpreted(after, data), interpreted(before, data))


@pytest.mark.parametrize(
    ("text", "domain", "reason"),
    [
        (LINEAR, "m <= p", "no order visits fewer"),
        (ATTENTION, "true", "no order visits fewer"),
    ],
)
def test_what_blocks_reassociation(text: str, domain: str, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        Reassociate("m").apply(cascade(text, domain))


def test_no_such_sum() -> None:
    with pytest.raises(NotApplicable, match="no sum over p"):
        Reassociate("p").apply(cascade(LINEAR))


def test_absorption_of_a_projection_is_the_same_rewrite() -> None:
    """Queries against keys that are a projection of a narrow latent: few queries are projected instead."""
    before = cascade("""
    cascade latent(Q[p,e]: f64, C[m,r]: f64, U[r,e]: f64) -> S[p,m]
      where p < P, m < M, e < 64, r < 16
      K[m,e] = sum(r) C[m,r] * U[r,e]
      S[p,m] = sum(e) Q[p,e] * K[m,e]
    """)
    after = apply(before, Reassociate("e", sizes=(("P", 1), ("M", 4096))))
    assert not any({"m", "e"} <= set(s.ranks) for s in after.body), "no key is ever expanded"
    data = inputs(before, P=3, M=11)
    assert_same(interpreted(after, data), interpreted(before, data))


# -- chunked scans --

AT_ONCE = """
cascade at_once(Q[b,h,p,e]: f64, K[b,h,m,e]: f64, V[b,h,m,f]: f64) -> O
  where b < B, h < 3, p < P, m < M, e < 8, f < 6
  O[b,h,p,f]: f64 = sum(m,e) Q[b,h,p,e] * K[b,h,m,e] * V[b,h,m,f] if m <= p
"""
CAUSAL = [
    (LINEAR, "m <= p"),
    (LINEAR, "m < p"),
    (AT_ONCE, ""),
    (NORMALISED, "m <= p"),
    (DECAYED, ""),
    (GATED, ""),
    (FEATURE_GATED, ""),
]


@pytest.mark.parametrize(("text", "domain"), CAUSAL)
@pytest.mark.parametrize(("length", "size"), [(13, 4), (12, 4), (3, 8), (1, 1), (7, 1)])
def test_a_chunked_scan_is_exact(text: str, domain: str, length: int, size: int) -> None:
    before = cascade(text, domain)
    after = apply(before, Chunk("p", "m", size))
    data = data_of(text, before, length, length)
    expected = interpreted(before, data)
    assert_same(interpreted(after, data), expected)
    assert_same(generated(after, data), expected)


def test_what_two_sums_share_is_made_once_in_a_chunk() -> None:
    after = apply(cascade(NORMALISED, "m <= p"), Chunk("p", "m", 4))
    assert sum({"pu", "mu", "e"} <= set(s.ranks) for s in after.body) == 1


def test_a_sum_over_everything_at_once_is_contracted_in_pairs() -> None:
    after = apply(cascade(AT_ONCE), Chunk("p", "m", 4))
    assert not any({"pu", "mu", "e", "f"} <= set(s.ranks) for s in after.body)


@given(
    p=st.integers(1, 20), m=st.integers(1, 20), size=st.integers(1, 9), seed=st.integers(0, 99), strict=st.booleans()
)
@settings(max_examples=25, deadline=None)
def test_lengths_that_divide_nothing_and_differ(p: int, m: int, size: int, seed: int, strict: bool) -> None:
    before = cascade(NORMALISED, "m < p" if strict else "m <= p")
    after = apply(before, Chunk("p", "m", size))
    data = data_of(NORMALISED, before, p, m, seed)
    assert_same(interpreted(after, data), interpreted(before, data))


def test_the_state_decays_by_a_chunk_and_nothing_grows() -> None:
    """The derived factors of l^(p - m): every exponent is nonnegative, so no decay, however strong, overflows."""
    after = apply(cascade(DECAYED), Chunk("p", "m", 64))
    powers = {power for s in after.body for power in s.expr.atoms(sympy.Pow)}
    row, column = var("pu"), var("mu")
    assert {power.exp for power in powers} == {64, 63 - column, row + 1, row - column}  # the last where mu <= pu


def test_strong_decay_does_not_overflow() -> None:
    before = cascade(DECAYED)
    after = apply(before, Chunk("p", "m", 8))
    data = data_of(DECAYED, before, 40, 40) | {"l": torch.tensor([1e-200, 0.0, 1.0], dtype=torch.float64)}
    out = interpreted(after, data)["O"]
    assert out.isfinite().all()
    assert_same({"O": out}, interpreted(before, data))


@pytest.mark.parametrize(
    ("text", "domain", "reason"),
    [
        (LINEAR, "true", "keys after a query's chunk are not all hidden"),
        (LINEAR, "m <= p & p - m < 7", "may hide keys of earlier chunks"),
        (LINEAR, "m <= p + M - P", "may hide keys of earlier chunks|keys after"),
        (DECAYED.replace("l[h]**(p - m)", "l[h]**((p - m)**2)"), "", "does not separate"),
        (DECAYED.replace("l[h]**(p - m)", "1 / (1 + p - m)"), "", "does not separate"),
        (ATTENTION, "m <= p", "does not separate"),
    ],
)
def test_what_has_no_chunked_scan(text: str, domain: str, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        Chunk("p", "m", 4).apply(cascade(text, domain))


def test_chunk_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Chunk("p", "m", 0)
