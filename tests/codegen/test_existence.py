"""Which points exist: generated code against the interpreter, where conditions are inherited from what is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from torch import Tensor

from einscade.codegen import tiled_torch
from einscade.codegen.loops import flat, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.existence import existence
from einscade.passes.online import Loops, Online
from einscade.passes.rewrite import NotApplicable
from tests.codegen.generated import module

P = 6
PARTIAL = """cascade partial(X[p], A[p]: bool) -> O
  where p < P
  Y[p] = X[p]   if p < 3
  B[p]: bool = X[p] > 0   if p != 1
"""
READERS = (
    "O[p] = abs(Y[p]) + 1",
    "O[p] = abs(X[p]) + 1   if Y[p] > -100",
    "O[p] = abs(X[p]) + 1   if B[p] | A[p]",
    "O[p] = abs(X[p]) + 1   if ~(B[p] & A[p])",
    "O[p] = abs(X[p]) + 1   if A[p] & (B[p] | Y[p] < 1)",
    "O[p] = Where(A[p] | B[p], 1, 2)",
    "O[p] = Where(A[p] & B[p], 1, 2)",
    "O[p] = Where(~B[p], 1, 2)",
    "O[p] = Where(A[p], 1 + abs(Y[p]), 2)",
    "O[p] = Where(A[p] | Y[p] > 0, Where(B[p], 1, 2), 3)",
    "O[p]: bool = A[p] | B[p]",
)


def given() -> dict[str, Tensor]:
    x = torch.randn(P, generator=torch.Generator().manual_seed(0))
    return {"X": x, "A": torch.tensor([True, True, False, True, False, False])}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_a_point_exists_where_what_it_reads_exists(reader: str, whole: bool) -> None:
    """Values are positive: 0 stands for a missing point."""
    cascade = parse_cascade(f"{PARTIAL}  {reader}\n")
    expected = interpret(cascade, given())["O"]
    source = tiled_torch.emit(flat(cascade) if whole else plan(cascade), Schedule())
    (made,) = module(source).run(*given().values(), P=P)
    torch.testing.assert_close(made.double(), expected.double(), rtol=1e-6, atol=0)


def scan(step: str, condition: str = "") -> Cascade:
    return parse_cascade(f"""
        cascade running(X[h,t], A[h,t]: bool, B[h]: bool) -> R
          where h < 2, t < T
          Y[h,t] = X[h,t]   if A[h,t]
          Z[h,t] = X[h,t]   if B[h]
          S[h,t] = {step}   {condition}   along t from 0
          R[h]   = S[h,T - 1]
    """)


@pytest.mark.parametrize(
    ("step", "condition", "missing"),
    [
        ("S[h,t - 1] + Y[h,t]", "", "A[h,t]"),
        ("S[h,t - 1] + X[h,t]", "if A[h,t]", "A[h,t]"),
        ("S[h,t - 1] + X[h,t]", "if t != 2", "t != 2"),
    ],
)
def test_a_scan_ends_at_a_missing_step(step: str, condition: str, missing: str) -> None:
    """What reads a missing value is missing, so that the last value is; no emitter writes a loop that would go on."""
    cascade = scan(step, condition)
    inputs = {"X": torch.ones(2, 5), "A": torch.ones(2, 5, dtype=torch.bool), "B": torch.ones(2, dtype=torch.bool)}
    inputs["A"][0, 2] = False
    assert interpret(cascade, inputs)["R"].tolist() == ([0, 5] if "A" in missing else [0, 0])
    for program in (plan(cascade), flat(cascade)):
        with pytest.raises(Unsupported, match="the scan S has a step only if") as refused:
            tiled_torch.emit(program, Schedule())
        assert f"only if {missing}, " in str(refused.value)


@pytest.mark.parametrize(
    ("step", "condition"),
    [
        ("S[h,t - 1] + Z[h,t]", ""),
        ("S[h,t - 1] + X[h,t]", "if B[h]"),
        ("S[h,t - 1] + X[h,t]", "if t < T & B[h]"),
        ("S[h,t - 1] + Where(A[h,t], Y[h,t], 0)", ""),
    ],
)
def test_a_scan_with_all_steps(step: str, condition: str) -> None:
    cascade = scan(step, condition)
    assert existence(cascade).ended is None
    inputs = {"X": torch.randn(2, 5), "A": torch.rand(2, 5) < 0.5, "B": torch.tensor([True, False])}
    expected = interpret(cascade, inputs)["R"]
    for program in (plan(cascade), flat(cascade)):
        (made,) = module(tiled_torch.emit(program, Schedule())).run(*inputs.values(), T=5)
        torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-6)


ROWS = """
    cascade rows(X[p,m], V[m,f], L[p]: i64, W0[f,o]) -> {outputs}
      where p < P, m < M, f < 3, o < 3
      {body}
"""
LOOPED = {
    "after the loop": """S[p,m] = X[p,m]   if m < L[p]
      G[p] = max(m) S[p,m]
      Z[p] = sum(m) exp(S[p,m] - G[p])
      N[p,f] = sum(m) exp(S[p,m] - G[p]) * V[m,f]
      O[p,f] = N[p,f] / Z[p]   if Z[p] != 0
      Y[p,o] = sum(f) O[p,f] * W0[f,o]
      R[p,o] = Y[p,o] + 1""",
    "in another nest": """S[p,m] = X[p,m]   if m < L[p]
      G[p] = max(m) S[p,m]
      Z[p] = sum(m) exp(S[p,m] - G[p])
      N[p,f] = sum(m) exp(S[p,m] - G[p]) * V[m,f]
      O[p,f] = N[p,f] / Z[p]   if Z[p] != 0
      Y[p,o] = sum(f) O[P - 1 - p,f] * W0[f,o]
      R[p,o] = Y[p,o] + 1""",
    "before the loop": """Y[p] = max(m) 2 * X[p,m]
      T[p] = Y[p]**2   if L[p] > 1
      S[p,m] = Y[p]
      Z[p] = sum(m) T[p] * S[p,m]
      R[p] = Z[p]""",
}


@pytest.mark.parametrize("name", LOOPED)
def test_reductions_over_nothing_around_loops(name: str) -> None:
    """A row without points is missing after its division, and is the 0 that a sum over it gives."""
    cascade = parse_cascade(ROWS.format(outputs="R", body=LOOPED[name]))
    cascade = (Loops() if "before" in name else Online()).apply(cascade)
    inputs = {"X": torch.randn(4, 5), "V": torch.randn(5, 3), "L": torch.tensor([0, 2, 5, 0]), "W0": torch.randn(3, 3)}
    tiles = {s: 2 for s in cascade.symbols if s not in "PM"}
    expected = interpret(cascade, inputs, tiles)["R"]
    source = tiled_torch.emit(plan(cascade), Schedule(tiles=tuple(tiles.items())))
    (made,) = module(source).run(*inputs.values(), P=4, M=5)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "S[p,m] = X[p,m]   if m < 3\n T[p] = max(m) S[p,m]\n R[p] = T[p] + 1",
        "S[p,m] = X[p,m]   if p < 2\n T[p] = max(m) S[p,m]\n R[p] = T[p] + 1",
    ],
)
def test_an_output_that_is_reduced(body: str) -> None:
    """Missing points are 0 in the output, and not in a maximum over it."""
    cascade = parse_cascade(ROWS.format(outputs="S, R", body=body))
    inputs = {"X": -torch.rand(4, 5) - 1, "V": torch.randn(5, 3), "L": torch.zeros(4, dtype=torch.int64)}
    inputs["W0"] = torch.randn(3, 3)
    expected = interpret(cascade, inputs)
    made = module(tiled_torch.emit(flat(cascade), Schedule())).run(*inputs.values(), P=4, M=5)
    torch.testing.assert_close([m.double() for m in made], list(expected.values()), rtol=1e-6, atol=1e-6)


def test_a_name_for_a_value_keeps_it() -> None:
    """What is read for the last time is written over, not so where another name stands for it."""
    body = "S[p] = sum(m) X[p,m]\n T[p] = S[p]\n U[p] = exp(S[p])\n R[p] = T[p] + U[p]"
    cascade = parse_cascade(ROWS.format(outputs="R", body=body))
    inputs = {"X": torch.rand(4, 5), "V": torch.randn(5, 3), "L": torch.zeros(4, dtype=torch.int64)}
    inputs["W0"] = torch.randn(3, 3)
    (made,) = module(tiled_torch.emit(flat(cascade), Schedule())).run(*inputs.values(), P=4, M=5)
    torch.testing.assert_close(made.double(), interpret(cascade, inputs)["R"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("monoid", ["any", "all"])
@pytest.mark.parametrize("condition", ["C[p,m]", "A[p]", "m < 2 | B[m]"])
@pytest.mark.parametrize("operand", ["X[p,m] > 0", "A[p] | B[m]", "V[m] > 0", "C[p,m]"])
def test_reduced_booleans(monoid: str, condition: str, operand: str) -> None:
    """Missing points do not count, whatever operators the operand has and whichever ranks it lacks."""
    check(parse_cascade(f"{PARTS}  O[p]: bool = {monoid}(m) {operand}   if {condition}\n"), 0)
    check(parse_cascade(f"{PARTS}  O[m]: bool = {monoid}(p) {operand}   if {condition}\n"), 1)


PARTS = """cascade parts(X[p,m], U[p], V[m], A[p]: bool, B[m]: bool, C[p,m]: bool) -> O
  where p < P, m < M
"""


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Statements over two ranks, pointwise or reduced, each with a domain or none, which read what is before them, or
    nothing at all."""
    values, flags = {"X": "pm", "U": "p", "V": "m"}, {"A": "p", "B": "m", "C": "pm"}

    def read(table: dict[str, str], ranks: str) -> str:
        name = draw(st.sampled_from([n for n, own in table.items() if {*own} <= {*ranks}]))
        return f"{name}[{','.join(table[name])}]"

    def condition(ranks: str, depth: int = 2) -> str:
        kind = draw(st.sampled_from(["pair", "not", "flag", "value", "place"][0 if depth else 2 :]))
        if kind == "pair":
            operator = draw(st.sampled_from("&|"))
            return f"({condition(ranks, depth - 1)} {operator} {condition(ranks, depth - 1)})"
        if kind == "not":
            return f"~({condition(ranks, depth - 1)})"
        places = [c for c in ("p < 3", "m != 1", "m <= p") if {*c} & {*"pm"} <= {*ranks}]
        if kind == "place":
            return draw(st.sampled_from(places))
        return read(flags, ranks) if kind == "flag" else f"{read(values, ranks)} > 0"

    def value(ranks: str, depth: int = 2) -> str:
        kind = draw(st.sampled_from(["sum", "product", "where", "read", "read", "constant"][0 if depth else 3 :]))
        if kind == "read":
            return read(values, ranks)
        if kind == "constant":
            return draw(st.sampled_from(["1", "0.5", "-2", "P / 3", f"(1 + {ranks[0]})", "Where(M < 3, 1, 0.25)"]))
        a, b = value(ranks, depth - 1), value(ranks, depth - 1)
        if kind == "where":
            return f"Where({condition(ranks, 1)}, {a}, {b})"
        return f"({a} {'+' if kind == 'sum' else '*'} {b})"

    lines = []
    for i in range(draw(st.integers(1, 4))):
        out = draw(st.sampled_from(["pm", "p", "m"]))
        reduced = "" if len(out) == 2 else draw(st.sampled_from(["", "m" if out == "p" else "p"]))
        flag, over = draw(st.booleans()), out + reduced
        monoid = draw(st.sampled_from(["any", "all"] if flag else ["sum", "max"])) + f"({reduced}) " if reduced else ""
        what = condition(over) if flag else value(over)
        domain = f"   if {condition(over)}" if draw(st.booleans()) else ""
        lines.append(f"  S{i}[{','.join(out)}]{': bool' if flag else ''} = {monoid}{what}{domain}")
        (flags if flag else values)[f"S{i}"] = out
    lines.append(f"  O[p] = Where({read(flags, 'p')}, 1, 2) * (abs({read(values, 'p')}) + 1)")
    return parse_cascade(PARTS + "\n".join(lines) + "\n")


@for_all(cascades(), st.integers(0, 99))
def test_random_parts(cascade: Cascade, seed: int) -> None:
    check(cascade, seed)


@for_all(cascades(), st.integers(0, 99))
def test_gradients_of_random_parts(cascade: Cascade, seed: int) -> None:
    """Against autograd's of the forward pass that is emitted."""
    try:
        gradient = differentiate(cascade)
    except NotApplicable:
        return
    values = {t.name: x for t, x in zip(cascade.inputs, random_inputs(seed).values(), strict=True)}
    leaves = {n: x if x.dtype == torch.bool else x.clone().requires_grad_() for n, x in values.items()}
    (out,) = module(tiled_torch.emit_flat(cascade)).run(*leaves.values(), P=4, M=3)
    cotangent = torch.arange(1.0, 5)
    asked = [leaves[n] for n in gradient.gradients]
    wanted = torch.autograd.grad(out, asked, cotangent, allow_unused=True) if out.requires_grad else [None] * len(asked)
    given = values | interpret(gradient.forward, {t.name: values[t.name] for t in gradient.forward.inputs})
    given[gradient.cotangents["O"]] = cotangent
    sizes = {s: n for s, n in (("P", 4), ("M", 3)) if s in gradient.cascade.symbols}
    made = interpret(gradient.cascade, {t.name: given[t.name] for t in gradient.cascade.inputs}, sizes)
    for (n, name), exact in zip(gradient.gradients.items(), wanted, strict=True):
        exact = torch.zeros_like(values[n]) if exact is None else exact
        torch.testing.assert_close(made[name].double(), exact.double(), rtol=2e-3, atol=2e-3, msg=f"{cascade}\n{n}")


def random_inputs(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"X": (4, 3), "U": (4,), "V": (3,), "A": (4,), "B": (3,), "C": (4, 3)}
    inputs = {n: torch.randn(s, generator=rng, dtype=torch.float32) for n, s in shapes.items()}
    return inputs | {n: inputs[n] > 0 for n in "ABC"}


def check(cascade: Cascade, seed: int) -> None:
    inputs = random_inputs(seed)
    expected = interpret(cascade, inputs)["O"]
    (made,) = module(tiled_torch.emit(flat(cascade), Schedule())).run(*inputs.values(), P=4, M=3)
    torch.testing.assert_close(made.double(), expected.double(), rtol=1e-4, atol=1e-4, equal_nan=True, msg=str(cascade))
