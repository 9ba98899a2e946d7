"""Terms of a row beside the points of a tile: an equal loop, and what is left as it was."""

from __future__ import annotations

import pytest
import sympy

from einscade.codegen.base2 import Exp2
from einscade.codegen.gluon_shift import coordinates, row_terms_apart
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, var

P, M = var("p"), var("m")
S, X, T, G, ROW = Access("S", P, M), Access("X"), Access("T", P, M), Access("G", P), Access("T_row", P)


def loop(score: Expr, *more: Statement) -> list[Statement]:
    """A modified score, its maximum, and weights."""
    return [
        Statement("T", ("p", "m"), score),
        Statement("L", ("p",), T, "max", ("m",)),
        Statement("W", ("p", "m"), Exp2(T / 4 - G / 4)),
        *more,
    ]


@pytest.mark.parametrize("score", [S + X * (M - P), 3 * S - 2 * X * P + X * M, S * X + 5 * (M + P) - Access("Y", P)])
def test_row_terms_leave(score: Expr) -> None:
    """What is left and the row's term are the score, the maximum has the term once, the exponent too."""
    first, offset = coordinates("m")
    found = {s.name: s for s in row_terms_apart(loop(score), "p", "m")}
    assert list(found) == ["T_row", "T", "L_part", "L", "W"]
    row, rest = found["T_row"].expr, found["T"].expr
    assert sympy.expand((row + rest).xreplace({first: M - offset}) - score) == 0
    assert offset not in row.free_symbols
    assert first not in rest.free_symbols
    assert not rest.has(Access("Y", P))
    assert found["L_part"].expr == T
    assert found["L_part"].monoid == "max"
    assert found["L"].expr == Access("L_part", P) + ROW
    assert found["L"].ranks == ("p",)
    assert found["W"].expr == Exp2(T / 4 + ROW / 4 - G / 4)


@pytest.mark.parametrize(
    "statements",
    [
        loop(S + X),
        loop(S + X * sympy.Abs(M - P)),
        loop(S + X * (M - P), Statement("U", ("p", "m"), T**2)),
        loop(S + X * (M - P), Statement("U", ("p",), T, "sum", ("m",))),
        loop(S + X * (M - P), Statement("U", ("p", "m"), S, keep=sympy.Gt(T, 0))),
        [Statement("T", ("p", "m"), S + X * (M - P))],
    ],
    ids=["no position", "a distance", "a square", "a sum", "a condition", "no reader"],
)
def test_what_stays(statements: list[Statement]) -> None:
    assert row_terms_apart(statements, "p", "m") == tuple(statements)
