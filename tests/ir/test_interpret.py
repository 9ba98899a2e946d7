"""The interpreter against plain PyTorch in float64, and its rules one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention, sigmoid

from einscade.ir import CascadeError, parse_cascade
from einscade.ir.interpret import extents, infer_sizes, interpret
from tests.strategies import Case, assert_equivalent, attention, cascades

torch.manual_seed(0)
B, H, P, M, E, F = 2, 4, 5, 7, 8, 3
Q, K, V = torch.randn(B, H, P, E), torch.randn(B, H, M, E), torch.randn(B, H, M, F)
KG, VG = torch.randn(B, 2, M, E), torch.randn(B, 2, M, F)
SCALE = E**-0.5
HEAD = """cascade attention({inputs}) -> O
  where b < B, h < 4, g < 2, p < P, m < M, e < 8, f < 3, r < 5, y < 2
"""
QKV = "Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]"
SCORES = f"  T[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] * {SCALE!r}"
SOFTMAX = """
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
VALUES = "\n  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f]\n"
ROW, COL = torch.arange(P)[:, None], torch.arange(M)[None, :]
BIAS, MASK = torch.randn(H, P, M), torch.rand(B, P, M) < 0.7
SLOPES, TABLE = torch.rand(H), torch.randn(H, 5)
QDOC, KDOC = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 2, 2, 0, 1])
SINK, MIX = torch.randn(H), torch.randn(H, H)


def _softmax(scores: Tensor, values: Tensor = V) -> Tensor:
    return scores.double().softmax(-1) @ values.double()


def _scores(keep: Tensor | None = None, k: Tensor = K) -> Tensor:
    scores = Q.double() @ k.double().transpose(-1, -2) * SCALE
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


def _plain(domain: str = "", score: str = "T[b,h,p,m]", after: str = SOFTMAX, extra: str = "") -> str:
    head = HEAD.format(inputs=QKV + (f", {extra}" if extra else ""))
    return f"{head}{SCORES}{f'   if {domain}' if domain else ''}\n  S[b,h,p,m] = {score}{after}"


Variant: TypeAlias = tuple[str, dict[str, Tensor], Callable[[], Tensor]]

VARIANTS: dict[str, Variant] = {
    "full": (_plain(), {}, lambda: scaled_dot_product_attention(Q.double(), K.double(), V.double())),
    "causal": (
        _plain("m <= p"),
        {},
        lambda: scaled_dot_product_attention(Q.double(), K.double(), V.double(), is_causal=True),
    ),
    "causal, ends aligned": (_plain("m <= p + M - P"), {}, lambda: _softmax(_scores(COL <= ROW + M - P))),
    "window with sink": (
        _plain("m <= p & (p - m < 2 | m < 1)"),
        {},
        lambda: _softmax(_scores((COL <= ROW) & ((ROW - COL < 2) | (COL < 1)))),
    ),
    "grouped heads": (
        HEAD.format(inputs="Q[b,h,p,e], K[b,g,m,e], V[b,g,m,f]")
        + SCORES.replace("K[b,h,", "K[b,h // 2,")
        + "\n  S[b,h,p,m] = T[b,h,p,m]"
        + SOFTMAX.replace("V[b,h,", "V[b,h // 2,"),
        {"K": KG, "V": VG},
        lambda: scaled_dot_product_attention(Q.double(), KG.double(), VG.double(), enable_gqa=True, scale=SCALE),
    ),
    "dense bias": (
        _plain(score="T[b,h,p,m] + X[h,p,m]", extra="X[h,p,m]"),
        {"X": BIAS},
        lambda: _softmax(_scores() + BIAS),
    ),
    "boolean mask": (
        _plain("A[b,p,m]", extra="A[b,p,m]: bool"),
        {"A": MASK},
        lambda: _softmax(_scores(MASK[:, None])).nan_to_num(0),
    ),
    "slopes": (
        _plain("m <= p", "T[b,h,p,m] + X[h]*(m - p)", extra="X[h]"),
        {"X": SLOPES},
        lambda: _softmax(_scores(COL <= ROW) + SLOPES.double()[:, None, None] * (COL - ROW)),
    ),
    "softcap": (_plain(score="tanh(T[b,h,p,m] / 5) * 5"), {}, lambda: _softmax((_scores() / 5).tanh() * 5)),
    "relative table": (
        _plain(score="T[b,h,p,m] + X[h,Max(Min(p - m, 2), -2) + 2]", extra="X[h,r]"),
        {"X": TABLE},
        lambda: _softmax(_scores() + TABLE[:, (ROW - COL).clamp(-2, 2) + 2]),
    ),
    "documents": (
        _plain("D[p] == C[m]", extra="D[p]: i64, C[m]: i64"),
        {"D": QDOC, "C": KDOC},
        lambda: _softmax(_scores(QDOC[:, None] == KDOC[None, :])),
    ),
    "sigmoid": (
        _plain(after="\n  W[b,h,p,m] = 1 / (1 + exp(-S[b,h,p,m]))" + VALUES),
        {},
        lambda: sigmoid(_scores()) @ V.double(),
    ),
    "squared relu": (
        _plain(after="\n  W[b,h,p,m] = Max(S[b,h,p,m], 0)**2" + VALUES),
        {},
        lambda: _scores().relu() ** 2 @ V.double(),
    ),
    "sink in the denominator": (
        _plain(
            after=SOFTMAX.replace("G[b,h,p]   = max(m) S[b,h,p,m]", "J[b,h,p] = max(m) S[b,h,p,m]\n"
                                  "  G[b,h,p] = Max(J[b,h,p], X[h])")
            .replace("/ Z[b,h,p]", "/ (Z[b,h,p] + exp(X[h] - G[b,h,p]))"),
            extra="X[h]",
        ),
        {"X": SINK},
        lambda: torch.cat([SINK.double().view(1, H, 1, 1).expand(B, H, P, 1), _scores()], -1).softmax(-1)[..., 1:]
        @ V.double(),
    ),
    "cosine": (
        HEAD.format(inputs=QKV)
        + "  A[b,h,p] = sum(e) Q[b,h,p,e]**2\n  C[b,h,m] = sum(e) K[b,h,m,e]**2\n"
        + SCORES.replace(f"* {SCALE!r}", "/ sqrt(A[b,h,p]) / sqrt(C[b,h,m])")
        + "\n  S[b,h,p,m] = T[b,h,p,m]"
        + SOFTMAX,
        {},
        lambda: _softmax(normalize(Q.double(), dim=-1) @ normalize(K.double(), dim=-1).transpose(-1, -2)),
    ),
    "talking heads": (
        HEAD.replace("g < 2", "g < 4").format(inputs=QKV + ", X[h,g]")
        + SCORES
        + "\n  S[b,h,p,m] = sum(g) X[h,g] * T[b,g,p,m]"
        + SOFTMAX,
        {"X": MIX},
        lambda: _softmax(torch.einsum("hg,bgpm->bhpm", MIX.double(), _scores())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_attention(name: str) -> None:
    text, more, expected = VARIANTS[name]
    cascade = parse_cascade(text)
    inputs = {"Q": Q, "K": K, "V": V, **more}
    out = interpret(cascade, inputs)["O"]
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected(), rtol=1e-12, atol=1e-12)


def test_linear_attention_with_decay_is_its_quadratic_form() -> None:
    cascade = parse_cascade(
        """cascade retention(Q[h,t,e], K[h,t,e], V[h,t,f], D[h]) -> O
        where h < H, t < T, e < E, f < F
        S[h,t,e,f] = S[h,t - 1,e,f] * D[h] + K[h,t,e] * V[h,t,f]   along t from 0
        O[h,t,f]   = sum(e) Q[h,t,e] * S[h,t,e,f]"""
    )
    q, k, v, decay = torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.randn(2, 6, 4), torch.tensor([0.5, 0.9])
    distance = torch.arange(6)[:, None] - torch.arange(6)[None, :]
    weights = (decay.double()[:, None, None] ** distance.clamp(min=0)) * (distance >= 0)
    expected = ((q.double() @ k.double().transpose(1, 2)) * weights) @ v.double()
    torch.testing.assert_close(interpret(cascade, {"Q": q, "K": k, "V": v, "D": decay})["O"], expected)


ONLINE = """cascade online(Q[p,e], K[m,e], V[m,f]) -> O
  where p < P, m < M, e < E, f < F, m1 < ceil_div(M, M0) of m, m0 < M0 of m
  S[p,m1,m0] = sum(e) Q[p,e] * K[m1*M0 + m0,e]   if m1*M0 + m0 < M & m1*M0 + m0 <= p - 2
  L[p,m1]    = max(m0) S[p,m1,m0]
  G[p,m1]    = Max(G[p,m1 - 1], L[p,m1])   along m1 from -oo
  W[p,m1,m0] = exp(S[p,m1,m0] - G[p,m1])
  A[p,m1]    = sum(m0) W[p,m1,m0]
  Z[p,m1]    = Z[p,m1 - 1] * exp(G[p,m1 - 1] - G[p,m1]) + A[p,m1]   along m1 from 0
  C[p,m1,f]  = sum(m0) W[p,m1,m0] * V[m1*M0 + m0,f]
  N[p,m1,f]  = N[p,m1 - 1,f] * exp(G[p,m1 - 1] - G[p,m1]) + C[p,m1,f]   along m1 from 0
  O[p,f]     = N[p,(M - 1) // M0,f] / Z[p,(M - 1) // M0]   if Z[p,(M - 1) // M0] != 0
"""


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 16])
def test_the_one_pass_form_with_rows_that_start_empty(tile: int) -> None:
    q, k, v = torch.randn(7, 4), torch.randn(7, 4), torch.randn(7, 3)
    out = interpret(parse_cascade(ONLINE), {"Q": q, "K": k, "V": v}, {"M0": tile})["O"]
    keep = torch.arange(7)[None, :] <= torch.arange(7)[:, None] - 2
    scores = (q.double() @ k.double().T).masked_fill(~keep, -math.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v.double()).nan_to_num(0))


def _run(text: str, **inputs: Tensor) -> Tensor:
    cascade = parse_cascade(text)
    return interpret(cascade, inputs)[cascade.outputs[0]]


X = torch.tensor([3.0, -1.0, 2.0, 2.0, 5.0])


class TestExistence:
    def test_a_row_condition_removes_the_row_and_other_conditions_only_what_is_reduced(self) -> None:
        body = "cascade c(X[m]) -> R\n where p < 3, m < M\n A[p] = sum(m) X[m]   if {}\n R[p] = A[p] + 1"
        assert _run(body.format("p < 1"), X=X).tolist() == [12, 0, 0]  # rows 1 and 2 do not exist
        assert _run(body.format("m < p"), X=X).tolist() == [1, 4, 3]  # row 0 is an empty sum
        assert _run(body.format("m < p & p < 2"), X=X).tolist() == [1, 4, 0]

    def test_a_missing_read_removes_the_point(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M\n A[m] = X[m]   if m % 2 == 0\n B[m] = A[m] + 1"
        assert _run(text, X=X).tolist() == [4, 0, 3, 0, 6]
        text = "cascade c(X[m]) -> B\n where m < M, p < 1\n A[m] = X[m]   if m % 2 == 0\n B[p] = max(m) -A[m]"
        assert _run(text, X=X).tolist() == [-2]

    def test_a_row_read_that_is_missing_removes_the_row(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M, p < 2\n A[p] = p   if p != 0\n B[p] = sum(m) X[m] + A[p]"
        assert _run(text, X=X).tolist() == [0, 16]

    def test_this_does_not_depend_on_extents_of_one(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M, p < 2\n A[p] = sum(m) X[m]   if m < p\n B[p] = A[p] + 1"
        assert _run(text, X=X[:1]).tolist() == [1, 4]

    def test_where_reads_the_branch_it_takes(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M\n A[m] = X[m]   if m > 1\n B[m] = Where(m > 1, A[m], X[m + 1])"
        assert _run(text, X=X).tolist() == [-1, 2, 2, 2, 5]

    def test_and_or_stop_at_what_decides(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < 7, n < N\n B[m]: bool = m < 5 & X[m] > 2 | m >= 6"
        assert _run(text.replace("X[m])", "X[n])"), X=X).tolist() == [True, False, False, False, True, False, True]

    def test_empty_reductions_are_identities(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M, p < 1\n B[p] = {}(m) X[m]   if m < p"
        values = {"sum": 0, "prod": 1, "max": -math.inf, "min": math.inf}
        for monoid, identity in values.items():
            assert _run(text.format(monoid), X=X).tolist() == [identity]
            assert _run(text.format(monoid), X=X[:0]).tolist() == [identity]


class TestReads:
    def test_outside_is_harmless_at_a_point_that_does_not_exist(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M\n A[m] = X[m + 1]   if m + 1 < M\n B[m] = A[m] * X[m + 1]"
        assert _run(text, X=X).tolist() == [1, 4, 4, 25, 0]

    @pytest.mark.parametrize(
        ("body", "place"),
        [
            ("B[m] = X[m + 1]", "m=4"),
            ("B[m] = X[m - 1]", "m=0"),
            ("B[m] = 1   if X[m + 2] > 0", "m=3"),
            ("B[m] = Where(X[m] < 4, 0, X[m + 1])", "m=4"),
            ("A[p] = max(m) X[m + p]\nB[m] = 0", "p=1, m=4"),
        ],
    )
    def test_outside_is_an_error_at_a_point_that_exists(self, body: str, place: str) -> None:
        with pytest.raises(CascadeError, match=f"reads outside a tensor at {place}"):
            _run(f"cascade c(X[m]) -> B\n where m < M, p < 2\n {body}", X=X)

    def test_gathers(self) -> None:
        index = torch.tensor([4, 0, 0])
        text = "cascade c(X[m], I[p]: i64) -> B\n where m < M, p < P\n B[p] = X[I[p]] + X[X1[I[p] // 4]]"
        text = text.replace(" B[p]", " X1[m]: i64 = Where(m == 0, 1, 2)\n B[p]")
        assert _run(text, X=X, I=index).tolist() == [5 + 2, 3 - 1, 3 - 1]

    def test_strides_do_not_matter(self) -> None:
        x = torch.randn(4, 6, 5)
        text = "cascade c(X[p,m,e]) -> B\n where p < P, m < M, e < E\n B[p,e] = sum(m) X[p,m,e]"
        views = {"transposed": x.permute(2, 1, 0), "expanded": x[:1].expand(4, 6, 5), "flipped": x[:, ::2]}
        for view in views.values():
            torch.testing.assert_close(_run(text, X=view), view.double().sum(1))


class TestArithmetic:
    def test_opposite_infinities_cancel(self) -> None:
        text = "cascade c(X[m], Y[m]) -> B\n where m < M\n B[m] = exp(X[m] - Y[m] + 1)"
        inf = math.inf
        out = _run(text, X=torch.tensor([-inf, inf, -inf, 1.0]), Y=torch.tensor([-inf, inf, 1.0, 1.0]))
        assert out.tolist() == pytest.approx([math.e, math.e, 0, math.e])

    def test_integers_stay_exact(self) -> None:
        big = torch.tensor([2**60 + 1, -7])
        text = "cascade c(X[m]: i64) -> B[m]: i64\n where m < M\n B[m] = X[m] * 2 - X[m] + {}"
        assert _run(text.format("0"), X=big).tolist() == big.tolist()
        text = "cascade c(X[m]) -> B[m]: i64\n where m < M\n B[m] = {}"
        assert _run(text.format("round(X[m]*2.5)"), X=torch.tensor([1.0, -1.0, 0.1])).tolist() == [2, -2, 0]
        assert _run(text.format("trunc(X[m])"), X=torch.tensor([1.7, -1.7])).tolist() == [1, -1]
        assert _run(text.format("(m - 2) // 2 * 10 + (m - 2) % 2"), X=X).tolist() == [-10, -9, 0, 1, 10]

    def test_half_precision_is_only_storage(self) -> None:
        x = torch.tensor([60000.0, 60000.0], dtype=torch.float16)
        text = "cascade c(X[m]: f16) -> B[p]: f16\n where m < M, p < 1\n B[p] = sum(m) X[m]**2"
        assert _run(text, X=x).tolist() == [2 * float(x[0]) ** 2]

    def test_topk_orders_ties_and_missing_points(self) -> None:
        text = "cascade c(X[m]) -> B[k,p]: i64\n where m < M, p < 2, k < 5\n B[k,p] = topk(m -> k) X[m]   if m != p"
        assert _run(text, X=X).T.tolist() == [[4, 2, 3, 1, 0], [4, 0, 2, 3, 1]]
        inf = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, -math.inf])
        assert _run(text, X=inf).T.tolist() == [[3, 1, 2, 4, 0], [3, 0, 2, 4, 1]]
        with pytest.raises(CascadeError, match="topk of 5 points among 3"):
            _run(text, X=X[:3])

    def test_large_grids_are_computed_in_slices(self) -> None:
        q, k = torch.randn(300, 8), torch.randn(4096, 8)
        text = """cascade c(Q[p,e], K[m,e]) -> B
        where p < P, m < M, e < 8
        S[p,m] = sum(e) Q[p,e] * K[m,e]   if m >= p
        B[p]   = max(m) S[p,m]"""
        scores = (q.double() @ k.double().T).masked_fill(
            torch.arange(4096)[None] < torch.arange(300)[:, None], -math.inf
        )
        torch.testing.assert_close(_run(text, Q=q, K=k), scores.amax(-1))


class TestScans:
    def test_the_first_step_reads_the_initial_value_and_later_readers_find_it_at_minus_one(self) -> None:
        text = "cascade c(X[m], I[]) -> B\n where m < M\n A[m] = A[m - 1] + X[m]   along m from I[]\n B[m] = A[m - 1]"
        assert _run(text, X=X, I=torch.tensor(10.0)).tolist() == [10, 13, 12, 14, 16]

    def test_a_scan_may_contract_its_state(self) -> None:
        text = """cascade c(K[t,d,j]) -> S
        where t < T, d < 3, j < 3
        S[t,d] = sum(j) K[t,d,j] * S[t - 1,j]   along t from 1"""
        k = torch.randn(4, 3, 3)
        state, states = torch.ones(3, dtype=torch.float64), []
        for step in k.double():
            state = step @ state
            states.append(state)
        torch.testing.assert_close(_run(text, K=k), torch.stack(states))

    def test_no_steps(self) -> None:
        text = "cascade c(X[m]) -> B\n where m < M, p < 1\n A[m] = A[m - 1] + X[m]   along m from 7\n B[p] = A[M - 1]"
        assert _run(text, X=X[:0]).tolist() == [7]


class TestSizes:
    TEXT = "cascade c(X[p,m], Y[m]) -> Z\n where p < P, m < M, k < M // B\n Z[k] = sum(p) X[p,k] + Y[k]"

    def test_they_come_from_shapes_and_sizes(self) -> None:
        cascade = parse_cascade(self.TEXT)
        sizes = infer_sizes(cascade, {"X": (2, 6), "Y": (6,)}, {"B": 2})
        assert sizes == {"P": 2, "M": 6, "B": 2}
        assert extents(cascade, sizes) == {"p": 2, "m": 6, "k": 3}

    @pytest.mark.parametrize(
        ("shapes", "sizes", "message"),
        [
            ({"X": (2, 6), "Y": (5,)}, {"B": 2}, r"input Y, rank m \(dimension 0\): size 5, expected M = 6 .*input X"),
            ({"X": (2, 6), "Y": (6,)}, {}, "no input's shape gives B; pass sizes="),
            ({"X": (2, 6), "Y": (6,)}, {"B": 2, "C": 1}, "has no symbol C"),
            ({"X": (2, 6)}, {"B": 2}, r"missing: \['Y'\]"),
            ({"X": (2, 6), "Y": (6,), "N": ()}, {"B": 2}, r"unknown: \['N'\]"),
            ({"X": (2, 6, 1), "Y": (6,)}, {"B": 2}, r"input X has shape \(2, 6, 1\), its ranks are \[p,m\]"),
            ({"X": (2, 6), "Y": (6,)}, {"B": 2, "M": 7}, "expected M = 7 .*from sizes"),
        ],
    )
    def test_contradictions_are_explained(
        self, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            infer_sizes(parse_cascade(self.TEXT), shapes, sizes)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
    def test_wrong_kinds_of_input_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=r"input X is .*, the cascade declares it f32"):
            _run("cascade c(X[m]) -> B\n where m < M\n B[m] = X[m]", X=torch.ones(3, dtype=dtype))


@settings(max_examples=100, deadline=None)
@given(case=cascades())
def test_inputs_of_a_case_fit_and_their_strides_do_not_matter(case: Case) -> None:
    plain, strided = (case.reference(case.inputs(1, strided=s)) for s in (False, True))
    for name, value in plain.items():
        assert torch.equal(value.nan_to_num(), strided[name].nan_to_num())


@settings(max_examples=60, deadline=None)
@given(case=attention(normalisers=("softmax", "softmax, weights apart", "sink")))
def test_softmax_has_no_nan_whatever_is_masked(case: Case) -> None:
    for value in case.reference(case.inputs(2)).values():
        assert value.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(case=attention(normalisers=("softmax",)))
def test_dividing_before_or_after_the_sum_is_the_same(case: Case) -> None:
    """The oracle agrees with an identity that holds for every one of these cascades."""
    text = str(case.cascade)
    line = next(row for row in text.split("\n") if row.startswith("  O["))
    after = text.replace(line, line.replace("  O[b,h,p,f]", "  N[b,h,p,f]").replace(" / Z[b,h,p]", ""))
    dtype = next(t.dtype for t in case.cascade.inputs if t.name == "Q")
    after += f"\n  O[b,h,p,f]: {dtype} = N[b,h,p,f] / Z[b,h,p]   if Z[b,h,p] != 0"
    assert_equivalent(case, parse_cascade(after), seed=3)
