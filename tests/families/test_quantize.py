"""Quantized attention: keys smoothed by their mean, integers with scales per block, scales out of the contraction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, accesses, free_vars
from einscade.passes.approximation import output_errors
from einscade.passes.defer import Defer
from einscade.passes.invariance import UNCHANGED, propagate
from einscade.passes.online import Loops, Online
from einscade.passes.quantize import Quantize
from einscade.passes.rewrite import NotApplicable
from einscade.passes.smooth import Smooth
from tests.families.cascades import (
    ATTENTION,
    LINEAR,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

ONE_PASS = (Defer(), Online(), Loops())
SIGMOID = ATTENTION.replace("exp(S[b,h,p,m] - G[b,h,p])", "1 / (1 + exp(-S[b,h,p,m]))")
NO_MAXIMUM = ATTENTION.replace("exp(S[b,h,p,m] - G[b,h,p])", "exp(S[b,h,p,m])")
LOG_SUM_EXP = """
cascade lse(Q[b,p,e]: f64, K[b,m,e]: f64) -> L
  where b < B, p < P, m < M, e < 8
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
  G[b,p]   = max(m) S[b,p,m]
  Z[b,p]   = sum(m) exp(S[b,p,m] - G[b,p])
  L[b,p]   = G[b,p] + log(Z[b,p])
"""
CAPPED = ATTENTION.replace(
    "  G[b,h,p]   = max(m) S[b,h,p,m]", "  T[b,h,p,m] = tanh(S[b,h,p,m])\n  G[b,h,p]   = max(m) T[b,h,p,m]"
).replace("exp(S[b,h,p,m]", "exp(T[b,h,p,m]")

_MAXIMUM = "  G[b,h,p]   = max(m) S[b,h,p,m]"
POSITIVE = ATTENTION.replace(
    _MAXIMUM, "  T[b,h,p,m] = Where(S[b,h,p,m] > 0, S[b,h,p,m], -oo)\n  G[b,h,p]   = max(m) T[b,h,p,m]"
).replace("exp(S[b,h,p,m]", "exp(T[b,h,p,m]")
ANY_POSITIVE = ATTENTION.replace(_MAXIMUM, f"  A[b,h,p]: bool = any(m) S[b,h,p,m] > 0\n{_MAXIMUM}")
COMPARED = ATTENTION.replace(_MAXIMUM, f"  A[b,g,m,e]: bool = K[b,g,m,e] > 0\n{_MAXIMUM}")


def offset_keys(c: Cascade, p: int, m: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keys with a large mean in every channel, as models have them: what smoothing is for."""
    data = inputs(c, seed, B=2, P=p, M=m)
    data["K"] = data["K"] + 6 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return data


# -- smooth --


@pytest.mark.parametrize("text", [ATTENTION, NO_MAXIMUM])
@pytest.mark.parametrize("domain", ["true", "m <= p", "m <= p & (p - m < 5 | m < 2)"])
def test_smoothing_is_exact_for_softmax(text: str, domain: str) -> None:
    before = cascade(text, domain)
    after = apply(before, Smooth("K", "m"))
    for p, m in ((7, 11), (1, 1), (4, 0)):
        data = offset_keys(before, p, m)
        assert_same(interpreted(after, data), interpreted(before, data))


def test_smoothing_is_derived_after_defer_too() -> None:
    before = apply(cascade(ATTENTION, "m <= p"), Defer())
    after = apply(before, Smooth("K", "m"))
    data = offset_keys(before, 9, 9)
    assert_same(interpreted(after, data), interpreted(before, data))


@pytest.mark.parametrize(
    ("text", "rewrite", "reason"),
    [
        (SIGMOID, Smooth("K", "m"), "W = .* tells the change apart"),
        (CAPPED, Smooth("K", "m"), "T = .* tells the change apart"),
        (LOG_SUM_EXP, Smooth("K", "m"), "the output L depends on a shift of S"),
        (POSITIVE, Smooth("K", "m"), "T = .* tells the change apart"),
        (ANY_POSITIVE, Smooth("K", "m"), "A = .* compares a tensor that would change"),
        (COMPARED, Smooth("K", "m"), "A compares K"),
        (LINEAR, Smooth("K", "m"), "O = .* tells the change apart"),
        (ATTENTION, Smooth("Q", "p"), "tells the change apart"),
        (ATTENTION, Smooth("K", "e"), "sums K over e"),
        (ATTENTION, Smooth("V", "m"), "sums V over m"),
        (ATTENTION, Smooth("K", "x"), "no tensor K with a rank x"),
    ],
)
def test_where_smoothing_is_not_exact(text: str, rewrite: Smooth, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        rewrite.apply(cascade(text))


def test_a_shift_of_the_scores_reaches_the_maximum_and_no_further() -> None:
    from einscade.passes.smooth import _shift

    c = cascade(ATTENTION)
    scores = c.definitions["S"]
    changes = propagate(c, {"S": _shift(scores, "K", 2)})
    assert changes["G"].shift == changes["S"].shift != 0
    assert "m" not in free_vars(changes["S"].shift)
    assert changes["W"] == changes["Z"] == changes["O"] == UNCHANGED


# -- quantize --

QUERIES = Quantize("Q", (("p", 4), ("e", 0)))
KEYS = Quantize("K", (("m", 4), ("e", 0)))
SMOOTHED = Quantize("Kcentred", (("m", 4), ("e", 0)))
VALUES = Quantize("V", (("m", 0),))
SAGE = (Smooth("K", "m"), SMOOTHED, QUERIES)


def rounded(x: torch.Tensor, span: int, axis: int, bits: int = 8) -> torch.Tensor:
    """The approximation written with torch: blocks of `span` along `axis` (-2), whole rows of the last axis."""
    top = 2 ** (bits - 1) - 1
    parts = []
    for part in x.split(span, axis):
        scale = part.abs().amax((axis, -1), keepdim=True) / top
        parts.append(torch.round(part / torch.where(scale > 0, scale, 1)) * torch.where(scale > 0, scale, 1))
    return torch.cat(parts, axis)


@given(p=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 99), causal=st.booleans())
@settings(max_examples=25, deadline=None)
def test_it_is_the_approximation_it_says(p: int, m: int, seed: int, causal: bool) -> None:
    exact = cascade(ATTENTION, "m <= p" if causal else "true")
    data = offset_keys(exact, p, m, seed)
    smoothed = data["K"] - data["K"].mean(2, keepdim=True)
    by_hand = data | {"Q": rounded(data["Q"], 4, -2), "K": rounded(smoothed, 4, -2)}
    assert_same(interpreted(apply(exact, *SAGE), data), interpreted(exact, by_hand))


def test_the_scales_leave_the_contraction() -> None:
    after = apply(cascade(ATTENTION, "m <= p"), *SAGE)
    (dot,) = (s for s in after.body if s.output.dtype == "i32")
    assert {a.tensor for a in accesses(dot.expr)} == {"Qint", "Kcentredint"}
    assert dot.reduce.ranks == ("e",)
    scores = after.definitions["S"]
    assert scores.reduce is None
    assert {a.tensor for a in accesses(scores.expr)} == {dot.name, "Qscale", "Kcentredscale"}
    layout = after.tensors["Kcentredint"].layout
    assert (layout.kind, layout["bits"], layout["group"], layout["scales"]) == (
        "quantized",
        8,
        "m:4,e:*",
        "Kcentredscale",
    )


def test_a_scale_for_every_channel_of_the_values_leaves_the_sum_over_keys() -> None:
    after = apply(cascade(ATTENTION), Defer(), VALUES)
    assert {a.tensor for a in accesses(after.definitions["Ndot"].expr)} == {"W", "Vint"}
    assert "Vscale" in {a.tensor for a in accesses(after.definitions["O"].expr)}


def test_a_scale_for_every_channel_of_the_keys_stays_in_the_contraction() -> None:
    after = apply(cascade(ATTENTION), Quantize("K", (("m", 0),)))
    assert {"Kint", "Kscale"} <= {a.tensor for a in accesses(after.definitions["Sdot"].expr)}
    data = offset_keys(after, 6, 6)
    scale = data["K"].abs().amax(2, keepdim=True) / 127
    by_hand = data | {"K": torch.round(data["K"] / scale) * scale}
    assert_same(interpreted(after, data), interpreted(cascade(ATTENTION), by_hand))


def test_blocks_of_zeros() -> None:
    exact = cascade(ATTENTION)
    data = inputs(exact, B=1, P=5, M=6)
    data["Q"][:, :, :4] = 0
    out = interpreted(apply(exact, QUERIES, KEYS), data)["O"]
    assert out.isfinite().all()
    torch.testing.assert_close(
        out[:, :, :4], data["V"].repeat_interleave(2, 1).mean(2, keepdim=True).expand(1, 4, 4, 6)
    )


def test_smoothing_pays_where_keys_have_a_mean() -> None:
    exact = cascade(ATTENTION, "m <= p")
    data = offset_keys(exact, 96, 96)
    plain = output_errors(exact, apply(exact, KEYS, QUERIES), data)["O"]
    smooth = output_errors(exact, apply(exact, *SAGE), data)["O"]
    assert 0 < smooth < 0.5 * plain
    assert smooth < 0.02


def test_fewer_bits_lose_more() -> None:
    exact = cascade(ATTENTION)
    data = inputs(exact, B=2, P=32, M=32)
    eight, four = (
        output_errors(exact, apply(exact, Quantize("K", (("m", 4), ("e", 0)), bits)), data)["O"] for bits in (8, 4)
    )
    assert 0 < eight < 0.2 * four


@pytest.mark.parametrize("domain", ["true", "m <= p"])
@pytest.mark.parametrize("rewrites", [SAGE, (KEYS, QUERIES), (Defer(), VALUES)])
def test_generated_code_computes_the_approximation(domain: str, rewrites: tuple) -> None:
    after = apply(cascade(ATTENTION, domain), *rewrites)
    one_pass = apply(after, optional=ONE_PASS)
    for p, m in ((9, 13), (4, 8)):
        data = offset_keys(after, p, m)
        expected = interpreted(after, data)
        assert_same(interpreted(one_pass, data, tile=8), expected)
        assert_same(generated(after, data), expected)
        assert_same(generated(one_pass, data, tile=8, grid={"p": 4}), expected)


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        (Quantize("X", (("m", 4),)), "no tensor X"),
        (Quantize("K", (("p", 4),)), "no tensor K with ranks p"),
        (Quantize("O", (("p", 4),)), "nothing reads O"),
    ],
)
def test_what_cannot_be_quantized(rewrite: Quantize, reason: str) -> None:
    with pytest.raises(NotApplicable, match=reason):
        rewrite.apply(cascade(ATTENTION))


def test_not_twice() -> None:
    with pytest.raises(NotApplicable, match="quantized already"):
        Quantize("Kint", (("m", 4),)).apply(KEYS.apply(cascade(ATTENTION)))


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        Quantize("K", (("m", 4),), bits=5)
    with pytest.raises(ValueError, match="group m=-1"):
        Quantize("K", (("m", -1),))
