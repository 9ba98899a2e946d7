"""Hypothesis strategies: random verified cascades, sizes and inputs for them.

Comes in: nothing. Goes out: `Case`, a cascade with sizes for its symbols, from which `inputs(seed)` makes tensors and
`reference(...)` the interpreter's outputs.

    @given(attention())
    def test_a_pass(case: Case) -> None:
        assert_equivalent(case, MyPass().apply(case.cascade))

* `attention`: scores with random domains, scales, caps and biases, several normalisers, grouped heads, keys and values
  apart or in one tensor, any dtype.
* `reductions`: rows reduced several times over, each reduction seeing the ones before.
* `scans`: running values and states with decay.
* `selections`: topk and gathers.
* `cascades`: any of these.

Extents are drawn small, 1 and odd ones among them; rows without a point occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from einscade.ir import Cascade
from einscade.ir.interpret import extents, interpret
from einscade.ir.text import parse_cascade

__all__ = ["TORCH_DTYPES", "Case", "assert_equivalent", "attention", "cascades", "reductions", "scans", "selections"]

TORCH_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A cascade, a value for each of its symbols, and for integer inputs the (exclusive) limit of their values."""

    cascade: Cascade
    sizes: Mapping[str, int]
    limits: Mapping[str, int] = field(default_factory=dict)

    def inputs(self, seed: int = 0, strided: bool = False) -> dict[str, torch.Tensor]:
        """Random inputs in the declared dtypes: normal floats, integers below their limits, fair booleans. `strided`
        stores each with its dimensions the other way round."""
        generator = torch.Generator().manual_seed(seed)
        lengths = extents(self.cascade, self.sizes)
        inputs = {}
        for t in self.cascade.inputs:
            shape, dtype = [lengths[r] for r in t.ranks], TORCH_DTYPES[t.dtype]
            if dtype.is_floating_point:
                x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            elif dtype == torch.bool:
                x = torch.rand(shape, generator=generator) < 0.6
            else:
                x = torch.randint(0, self.limits.get(t.name, 4), shape, generator=generator).to(dtype)
            inputs[t.name] = (
                x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]) if strided else x
            )
        return inputs

    def reference(
        self, inputs: Mapping[str, torch.Tensor], cascade: Cascade | None = None, **sizes: int
    ) -> dict[str, torch.Tensor]:
        """The interpreter's outputs, of another cascade over the same inputs where one is given; sizes of symbols
        that only the other one has come as keywords."""
        cascade = cascade or self.cascade
        known = {**self.sizes, **sizes}
        return interpret(cascade, inputs, {s: known[s] for s in cascade.symbols})

    def __repr__(self) -> str:  # what hypothesis prints for a failing example
        return f"Case(sizes={dict(self.sizes)}, limits={dict(self.limits)}, cascade=\n{self.cascade}\n)"


def assert_equivalent(case: Case, after: Cascade, seed: int = 0, tolerance: float = 1e-9, **sizes: int) -> None:
    """The rewritten cascade has the same outputs, to `tolerance` of their norm, NaN and infinities in the same places.
    `sizes` are for the symbols that the rewrite introduced (tile extents)."""
    inputs = case.inputs(seed)
    expected = case.reference(inputs)
    actual = case.reference(inputs, after, **sizes)
    assert set(actual) == set(expected)
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}\n{after}"
        finite = want.isfinite()
        same = torch.allclose(got[~finite].double(), want[~finite].double(), equal_nan=True)
        assert same, f"{name}: infinities or NaN differ\n{after}"
        error = (got - want)[finite].double().norm() if want.dtype != torch.bool else (got ^ want).double().norm()
        bound = tolerance * (1 + want[finite].double().norm())
        assert error <= bound, f"{name}: error {float(error)} exceeds {float(bound)}\n{after}"


LENGTHS = st.sampled_from([1, 2, 3, 5, 7, 8, 9])
WIDTHS = st.sampled_from([1, 2, 3, 4, 5])
FLOATS = st.sampled_from(["f32", "bf16", "f16", "f64"])
SCALES = st.sampled_from(["", " * 0.125", " * 0.3535533905932738", " / sqrt(3)"])

# Domains of attention: text, inputs, limits.
DOMAINS = {
    "all": ("", "", {}),
    "causal": ("m <= p", "", {}),
    "causal, ends aligned": ("m <= p + M - P", "", {}),
    "window": ("m <= p & p - m < 3", "", {}),
    "two-sided window": ("p - m <= 2 & m - p <= 2", "", {}),
    "window and sink": ("m <= p & (p - m < 2 | m < 1)", "", {}),
    "prefix": ("m <= p | m < 3", "", {}),
    "dilated": ("(p + m) % 2 == 0", "", {}),
    "documents": ("D[p] == C[m]", "D[p]: i32, C[m]: i32", {"D": 2, "C": 2}),
    "lengths": ("m < L[b]", "L[b]: i64", {"L": 10}),
    "boolean mask": ("A[p,m]", "A[p,m]: bool", {}),
    "not masked": ("~A[b,m] & m <= p", "A[b,m]: bool", {}),
}
# What happens to a score `T[b,h,p,m]`: text, inputs, limits.
SCORES = {
    "plain": ("T[b,h,p,m]", "", {}),
    "softcap": ("tanh(T[b,h,p,m] / 3) * 3", "", {}),
    "dense bias": ("T[b,h,p,m] + X[h,p,m]", "X[h,p,m]", {}),
    "two biases": ("T[b,h,p,m] + X[h,p,m] + Y[b,m]", "X[h,p,m], Y[b,m]", {}),
    "slopes": ("T[b,h,p,m] + X[h]*(m - p)", "X[h]", {}),
    "relative table": ("T[b,h,p,m] + X[h,Max(Min(p - m, 2), -2) + 2]", "X[h,r]", {}),
    "buckets": ("T[b,h,p,m] + X[h,U[p,m]]", "X[h,r], U[p,m]: i64", {"U": 5}),
    "additive mask": ("Where(U[p,m], T[b,h,p,m], -10000)", "U[p,m]: bool", {}),
    "temperature": ("T[b,h,p,m] * exp(X[h])", "X[h]", {}),
}
# From scores to the output, as statements.
SOFTMAX = """
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
"""
NORMALISERS = {
    "softmax": (SOFTMAX + "  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f] / Z[b,h,p]", "", "O"),
    "softmax, weights apart": (
        SOFTMAX + "  N[b,h,p,m] = W[b,h,p,m] / Z[b,h,p]\n  O[b,h,p,f]: {dtype} = sum(m) N[b,h,p,m] * V[b,{group},m,f]",
        "",
        "O",
    ),
    "softmax and log-sum-exp": (
        SOFTMAX + "  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f] / Z[b,h,p]\n"
        "  R[b,h,p] = G[b,h,p] + log(Z[b,h,p])   if Z[b,h,p] != 0",
        "",
        "O, R",
    ),
    "sink": (
        """
  J[b,h,p]   = max(m) S[b,h,p,m]
  G[b,h,p]   = Max(J[b,h,p], I[h])
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  N[b,h,p]   = Z[b,h,p] + exp(I[h] - G[b,h,p])
  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f] / N[b,h,p]""",
        "I[h]",
        "O",
    ),
    "no maximum": (
        """
  W[b,h,p,m] = exp(S[b,h,p,m] / 4)
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f] / (Z[b,h,p] + 1)""",
        "",
        "O",
    ),
    "sigmoid": (
        """
  W[b,h,p,m] = 1 / (1 + exp(-S[b,h,p,m]))
  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f]""",
        "",
        "O",
    ),
    "squared relu": (
        """
  W[b,h,p,m] = Max(S[b,h,p,m], 0)**2
  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[b,{group},m,f]""",
        "",
        "O",
    ),
    "absolute": (
        """
  Z[b,h,p]   = sum(m) abs(S[b,h,p,m])
  O[b,h,p,f]: {dtype} = sum(m) S[b,h,p,m] * V[b,{group},m,f] / Max(Z[b,h,p], 1)""",
        "",
        "O",
    ),
}


@st.composite
def attention(
    draw: st.DrawFn,
    domains: tuple[str, ...] = tuple(DOMAINS),
    scores: tuple[str, ...] = tuple(SCORES),
    normalisers: tuple[str, ...] = tuple(NORMALISERS),
) -> Case:
    """Attention of some kind: `domains`, `scores` and `normalisers` restrict the draw to some keys of the tables."""
    domain, domain_inputs, limits = DOMAINS[draw(st.sampled_from(domains))]
    score, score_inputs, more_limits = SCORES[draw(st.sampled_from(scores))]
    normaliser, normaliser_inputs, outputs = NORMALISERS[draw(st.sampled_from(normalisers))]
    dtype = draw(FLOATS)
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    group = "h" if share == 1 else f"h // {share}"
    inputs = [f"Q[b,h,p,e]: {dtype}, K[b,g,m,e]: {dtype}, V[b,g,m,f]: {dtype}"]
    inputs += [text for text in (domain_inputs, score_inputs, normaliser_inputs) if text]
    wide, high = draw(WIDTHS), draw(WIDTHS)
    table = ", r < 5" if "[h,r]" in score_inputs else ""
    text = f"""cascade attention({", ".join(inputs)}) -> {outputs}
  where b < B, h < {groups * share}, g < {groups}, p < P, m < M, e < {wide}, f < {high}{table}
  T[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,{group},m,e]{draw(SCALES)}{"   if " + domain if domain else ""}
  S[b,h,p,m] = {score}
{normaliser.format(dtype=dtype, group=group)}
"""
    if draw(st.booleans()):  # keys and values are pieces of one tensor
        text = text.replace(f"K[b,g,m,e]: {dtype}, V[b,g,m,f]: {dtype}", f"K[b,g,m,t]: {dtype}")
        text = text.replace(f"V[b,{group},m,f]", f"K[b,{group},m,f + {wide}]").replace(
            "m < M,", f"m < M, t < {wide + high},"
        )
    sizes = {"B": draw(st.integers(1, 2)), "P": draw(LENGTHS), "M": draw(LENGTHS)}
    return Case(parse_cascade(text), sizes, {**limits, **more_limits})


# Values along a row and of a row: bounded functions, so that nothing overflows.
_MAPS = [
    "{x}",
    "{x}**2",
    "tanh({x})",
    "abs({x})",
    "{x} * {y}",
    "{x} + {y} / 2",
    "exp({x} / 4)",
    "sin({x})",
    "cos({x})*{y}",
]
_WITH_ROW = [
    "({x}) - {r}",
    "({x}) * {r}",
    "exp(({x}) - {r})",
    "(({x}) - {r})**2",
    "({x}) / (1 + abs({r}))",
    "Max({x}, {r})",
]


@st.composite
def reductions(draw: st.DrawFn) -> Case:
    """Rows of two inputs reduced two to four times; each reduction may use the results of those before it."""
    condition = draw(st.sampled_from(["", "   if m <= p", "   if A[p,m]", "   if m % 2 == 0 | p < 2"]))
    rows: list[str] = []
    lines: list[str] = []
    for i in range(draw(st.integers(2, 4))):
        along = draw(st.sampled_from(_MAPS)).format(x="X[p,m]", y="Y[m]")
        if rows and draw(st.booleans()):
            along = draw(st.sampled_from(_WITH_ROW)).format(x=along, r=f"{draw(st.sampled_from(rows))}[p]")
        monoid = draw(st.sampled_from(["sum", "sum", "sum", "max", "min"]))
        if draw(st.booleans()):
            lines += [f"  E{i}[p,m] = {along}{condition}", f"  R{i}[p] = {monoid}(m) E{i}[p,m]"]
        else:
            lines.append(f"  R{i}[p] = {monoid}(m) {along}{condition}")
        if monoid == "sum":
            rows.append(f"R{i}")
    inputs = "X[p,m], Y[m]" + (", A[p,m]: bool" if "A[" in condition else "")
    outputs = draw(st.sampled_from([", ".join(rows[-1:] or ["R0"]), f"R{i}", "R0"]))
    text = f"cascade rows({inputs}) -> {outputs}\n  where p < P, m < M\n" + "\n".join(lines)
    return Case(parse_cascade(text), {"P": draw(LENGTHS), "M": draw(LENGTHS)})


@st.composite
def scans(draw: st.DrawFn) -> Case:
    """Running values and states along a rank, read at every step or at the last one."""
    decay = draw(st.sampled_from(["", " * 0.5", " * exp(-abs(A[h]))", " * exp(-abs(Y[h,t]))"]))
    form = draw(st.sampled_from(["state", "running maximum", "sum from a value"]))
    inputs = {"state": "Q[h,t,e], K[h,t,e], V[h,t,f]", "running maximum": "X[h,t]", "sum from a value": "X[h,t], I[h]"}[
        form
    ]
    inputs += ", A[h]" if "A[" in decay else ", Y[h,t]" if "Y[" in decay else ""
    body = {
        "state": f"""
  S[h,t,e,f] = S[h,t - 1,e,f]{decay} + K[h,t,e] * V[h,t,f]   along t from 0
  O[h,t,f]   = sum(e) Q[h,t,e] * S[h,t,e,f]""",
        "running maximum": f"""
  S[h,t] = Max(S[h,t - 1], X[h,t])   along t from -oo
  Z[h,t] = Z[h,t - 1] * exp(S[h,t - 1] - S[h,t]) + exp(X[h,t] - S[h,t])   along t from 0
  O[h]   = S[h,T - 1] + log(Z[h,T - 1]){decay.replace("Y[h,t]", "Y[h,0]")}""",
        "sum from a value": f"""
  S[h,t] = S[h,t - 1]{decay} + X[h,t]   along t from I[h]
  O[h,t] = S[h,t]**2 + S[h,T - 1]""",
    }[form]
    text = f"cascade scan({inputs}) -> O\n  where h < 2, t < T, e < {draw(WIDTHS)}, f < {draw(WIDTHS)}{body}"
    return Case(parse_cascade(text), {"T": draw(LENGTHS)})


@st.composite
def selections(draw: st.DrawFn) -> Case:
    """The largest of some estimates, and what is gathered at their places."""
    slots = draw(st.integers(1, 3))
    condition = draw(st.sampled_from(["", "   if n <= q", "   if n != q"]))
    width = draw(WIDTHS)
    body = draw(
        st.sampled_from(
            [
                "  O[q,f] = sum(s) V[I[q,s],f]",
                "  O[q,f] = sum(s) V[I[q,s],f] / (1 + I[q,s])   if I[q,s] <= q",
                "  G[q,s] = max(f) V[I[q,s],f]\n  O[q,f] = sum(s) exp(V[I[q,s],f] - G[q,s])",
            ]
        )
    )
    text = f"""cascade select(X[q,n], V[n,f]) -> O, I
  where q < R, n < N, s < {slots}, f < {width}
  I[q,s]: i64 = topk(n -> s) X[q,n]{condition}
{body}"""
    return Case(parse_cascade(text), {"R": draw(LENGTHS), "N": slots + draw(st.integers(0, 4))})


def cascades() -> st.SearchStrategy[Case]:
    """Any of the cascades above."""
    return st.one_of(attention(), reductions(), scans(), selections())
