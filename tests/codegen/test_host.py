"""Bounds as Python code: the code is worth what the expression is."""

from __future__ import annotations

from itertools import product

import pytest
import sympy
from sympy.logic.boolalg import And, Not, Or

from einscade.codegen.gluon_text import paren
from einscade.codegen.host import python
from einscade.codegen.source import Unsupported
from einscade.ir.expr import Expr, FloorDiv, Mod, ceil_div, var

a, b, n = map(var, "abn")
ENDS = sympy.Max(a, b) + sympy.Min(a, 5)


@pytest.mark.parametrize(
    "expr",
    [
        a - ENDS,
        a - (b - n),
        -a * b - 3,
        2 * sympy.Max(a, b) * n,
        -(FloorDiv(a, 2) ** 2) * b - a**3,
        sympy.Mul(2, ENDS, evaluate=False),
        FloorDiv(ENDS, 3),
        FloorDiv(a - ENDS, n + 1),
        Mod(ENDS, 3),
        Mod(a * b, n + 1),
        ceil_div(a + b, n + 1),
        ceil_div(ENDS, 4) * 4 - 1,
        FloorDiv(FloorDiv(a, 2) + b, Mod(n, 3) + 1),
        sympy.Max(0, sympy.Min(FloorDiv(a - b, 2), n)),
        sympy.Le(a - b, n - 2),
        sympy.Ne(ENDS, 3),
        And(sympy.Lt(a, b), Or(sympy.Eq(n, 2), Not(sympy.Ge(b, 3)))),
    ],
    ids=str,
)
def test_python(expr: Expr) -> None:
    code = python(expr)
    for values in product((0, 1, 3, 7), repeat=3):
        point = dict(zip("abn", values, strict=True))
        expected = expr.xreplace({var(k): sympy.Integer(v) for k, v in point.items()}).doit()
        assert eval(code, {}, point) == expected, f"{code} at {point}"


def test_names() -> None:
    assert python(FloorDiv(a, b), {"a": "size"}) == "size // b"


def test_what_the_host_cannot_compute() -> None:
    with pytest.raises(Unsupported, match="cannot be computed on the host"):
        python(sympy.exp(a))


SIZES = (n, a + 3, ceil_div(a, n + 1), ceil_div(a + b, 4), ceil_div(a, 4) + ceil_div(b, 4))


@pytest.mark.parametrize("expr", SIZES, ids=str)
def test_an_operand(expr: Expr) -> None:
    """What the Gluon emitter multiplies and divides sizes by."""
    for values in product((0, 1, 3, 7), repeat=3):
        point = dict(zip("abn", values, strict=True))
        size = int(expr.xreplace({var(k): sympy.Integer(v) for k, v in point.items()}))
        operand = paren(python(expr))
        assert eval(f"-(-{operand} // 4) * {operand}", {}, point) == -(-size // 4) * size
