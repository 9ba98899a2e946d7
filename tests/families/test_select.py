"""Block-sparse attention: an estimator cascade chooses key blocks, the main cascade reads them through an index."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, accesses, var
from einscade.passes.approximation import output_errors
from einscade.passes.defer import Defer
from einscade.passes.online import Loops, Online
from einscade.passes.quantize import Quantize
from einscade.passes.rewrite import NotApplicable
from einscade.passes.select import Select
from einscade.passes.smooth import Smooth
from tests.families.cascades import (
    ATTENTION,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

ONE_PASS = (Defer(), Online(), Loops())
DIAGONAL = sympy.Eq(var("m"), var("p"))
CAUSAL = "m <= p"


COLUMNS = """
cascade columns(Q[b,p,e]: f64, K[b,m,e]: f64) -> O
  where b < B, p < P, m < M, e < 8
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
  O[b,m]   = sum(p) S[b,p,m]
"""


def blockwise(data: dict[str, torch.Tensor], keep: int, size: int, causal: bool) -> torch.Tensor:
    """The approximation written with torch: choose blocks by mean-pooled scores, then masked attention."""
    q, k, v = data["Q"], data["K"].repeat_interleave(2, 1), data["V"].repeat_interleave(2, 1)
    rows, columns = q.shape[2], k.shape[2]
    pooled_q = torch.stack([x.mean(2) for x in q.split(size, 2)], 2)
    pooled_k = torch.stack([x.mean(2) for x in k.split(size, 2)], 2)
    scores = pooled_q @ pooled_k.mT * 0.35
    block_rows, block_columns = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
    if causal:
        scores = scores.masked_fill(block_columns > block_rows, -torch.inf)
        scores = scores.masked_fill(block_columns == block_rows, torch.inf)
    best = scores.topk(min(keep, scores.shape[3]), -1).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    mask = kept.repeat_interleave(size, 2)[:, :, :rows].repeat_interleave(size, 3)[..., :columns]
    if causal:
        mask = mask & (torch.arange(columns) <= torch.arange(rows)[:, None])
    weights = (q @ k.mT * 0.35).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return weights @ v


def selected(c: Cascade, keep: int, size: int = 4, causal: bool = False) -> Cascade:
    return apply(c, Select("p", "m", keep, size, size, DIAGONAL if causal else sympy.false))


@given(
    n=st.integers(1, 21), keep=st.integers(1, 6), size=st.integers(2, 5), seed=st.integers(0, 99), causal=st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_it_is_the_approximation_it_says(n: int, keep: int, size: int, seed: int, causal: bool) -> None:
    exact = cascade(ATTENTION, CAUSAL if causal else "true")
    data = inputs(exact, seed, B=2, P=n, M=n)
    after = selected(exact, keep, size, causal)
    assert_same(interpreted(after, data), {"O": blockwise(data, keep, size, causal)})


def test_every_block_selected_is_exact() -> None:
    for domain in ("true", CAUSAL):
        exact = cascade(ATTENTION, domain)
        data = inputs(exact, B=2, P=10, M=13)
        assert_same(interpreted(selected(exact, 99), data), interpreted(exact, data))


def chosen(c: Cascade, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return interpreted(c.replace(outputs=("I",)), data)["I"]


def test_future_blocks_are_never_read_and_the_diagonal_always() -> None:
    exact = cascade(ATTENTION, CAUSAL)
    data = inputs(exact, B=2, P=24, M=24)
    after = selected(exact, 3, causal=True)
    index = chosen(after, data)
    rows = torch.arange(6)[:, None]
    assert (index == rows).any(-1).all(), "the diagonal block is always kept"
    past = (index <= rows).sum(-1)
    assert (past == torch.minimum(rows.squeeze(), torch.tensor(2)) + 1).all(), (
        "a past block always goes before a future one"
    )
    poisoned = data | {"K": data["K"].clone(), "V": data["V"].clone()}
    poisoned["K"][:, :, 12:] = poisoned["V"][:, :, 12:] = 1e30
    before, after_poison = (interpreted(after, d)["O"][:, :, :12] for d in (data, poisoned))
    assert_same({"O": after_poison}, {"O": before})


def test_blocks_outside_a_window_are_not_scored() -> None:
    """The estimator's domain is where a block pair has a point: derived from the window, block by block."""
    after = selected(cascade(ATTENTION, "m <= p & (p - m < 5 | m < 2)"), 3)
    estimate = after.definitions["E"].domain
    for pb in range(8):
        for mb in range(8):
            points = [(4 * pb + i, 4 * mb + j) for i in range(4) for j in range(4)]
            some = any(m <= p and (p - m < 5 or m < 2) for p, m in points)
            assert bool(estimate.subs({var("pb"): pb, var("mb"): mb})) == some


def test_a_sink_can_be_kept() -> None:
    exact = cascade(ATTENTION, CAUSAL)
    data = inputs(exact, B=1, P=32, M=32)
    after = apply(exact, Select("p", "m", 2, 4, 4, sympy.Or(DIAGONAL, var("m") < 3)))
    index = chosen(after, data)
    assert (index == 0).any(-1).all()
    assert (index == torch.arange(8)[:, None]).any(-1).all()


def test_the_error_falls_with_what_is_kept() -> None:
    exact = cascade(ATTENTION, CAUSAL)
    data = inputs(exact, B=2, P=64, M=64)
    errors = [output_errors(exact, selected(exact, keep, causal=True), data)["O"] for keep in (1, 4, 8, 16)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-12


def test_it_pays_on_keys_that_cluster() -> None:
    """Where attention is concentrated in blocks, a few blocks carry it: what the estimator is for."""
    exact = cascade(ATTENTION)
    data = inputs(exact, B=1, P=64, M=64)
    scattered = output_errors(exact, selected(exact, 2), data)["O"]
    centres = 4 * torch.randn(1, 2, 16, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data["K"] = (centres + 0.3 * data["K"].unflatten(2, (16, 4))).flatten(2, 3)
    data["Q"] = (centres.repeat_interleave(2, 1) + 0.3 * data["Q"].unflatten(2, (16, 4))).flatten(2, 3)
    assert output_errors(exact, selected(exact, 2), data)["O"] < min(0.03, 0.05 * scattered)


def test_one_pass_over_the_selected_keys() -> None:
    """Online finds the running form along the selected keys, as along any others."""
    one_pass = apply(selected(cascade(ATTENTION, CAUSAL), 3, causal=True), *ONE_PASS[:2])
    scans = [s for s in one_pass.body if s.scan and one_pass.rank_table[s.scan.rank].origin == "ms"]
    assert {s.name for s in scans} == {"G", "Z", "N"}
    assert len({s.scan.rank for s in scans if s.scan}) == 1


@pytest.mark.parametrize("domain", ["true", CAUSAL, "m <= p & (p - m < 5 | m < 2)"])
@pytest.mark.parametrize(("p", "m"), [(13, 13), (9, 17), (1, 1)])
def test_generated_code_computes_the_approximation(domain: str, p: int, m: int) -> None:
    after = selected(cascade(ATTENTION, domain), 2, causal=domain == CAUSAL)
    one_pass = apply(after, optional=ONE_PASS)
    data = inputs(after, B=2, P=p, M=m)
    expected = interpreted(after, data)
    assert_same(interpreted(one_pass, data), expected)
    assert_same(generated(after, data), expected)
    assert_same(generated(one_pass, data), expected)


def test_it_composes_with_quantization() -> None:
    """SageAttention on selected blocks: three rewrites, no new machinery."""
    rewrites = (Smooth("K", "m"), Select("p", "m", 2, 4, 4, DIAGONAL), Quantize("Kcentred", (("m", 4), ("e", 0))))
    after = apply(cascade(ATTENTION, CAUSAL), *rewrites)
    one_pass = apply(after, optional=ONE_PASS)
    data = inputs(after, B=2, P=14, M=14)
    expected = interpreted(after, data)
    assert_same(interpreted(one_pass, data), expected)
    assert_same(generated(one_pass, data), expected)


def test_unselected_statements_stay() -> None:
    after = selected(cascade(ATTENTION), 2)
    main = after.definitions["S"]
    assert {a.tensor for a in accesses(main.domain)} == {"I"}
    assert {a.tensor for a in main.reads} == {"Q", "K", "I"}


@pytest.mark.parametrize(
    ("text", "outputs", "reason"),
    [
        (ATTENTION.replace("sum(e) Q[b,h,p,e] *", "max(e) Q[b,h,p,e] *"), "O", "no sum of products over a query at p"),
        (ATTENTION, "W", "the output W has every m"),
        (COLUMNS, "O", "O needs every m"),
    ],
)
def test_what_cannot_be_selected(text: str, outputs: str, reason: str) -> None:
    before = cascade(text).replace(outputs=(outputs,))
    with pytest.raises(NotApplicable, match=reason):
        Select("p", "m", 2).apply(before)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Select("p", "m", 0)
