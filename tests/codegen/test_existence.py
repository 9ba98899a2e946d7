"""Which points exist: generated code against the interpreter, where conditions are inherited from what is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einscade.codegen import tiled_torch
from einscade.codegen.loops import flat, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.existence import existence
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
