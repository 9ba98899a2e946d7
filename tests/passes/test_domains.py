"""Predicates over tiles in the form in which a kernel evaluates them."""

from __future__ import annotations

from itertools import product

import pytest
import sympy

from einscade.ir.expr import free_vars, var
from einscade.ir.text import parse_cascade
from einscade.passes.domains import limits_apart, one_limit_a_side
from einscade.passes.terms import conjuncts


@pytest.mark.parametrize(
    ("predicate", "comparisons"),
    [
        ("m <= p & m < M", 1),
        ("m <= p & p - m < 3 & m < M & p < P", 2),
        ("m < M & p < P", 1),
        ("p < P", 0),
        ("m >= p & m > 2", 1),
        ("m >= p - 2 & p < 5", 1),
        ("(m <= p | m < 2) & m < M & p < P", 2),
        ("2 * m <= p & m < M", 2),
    ],
)
def test_one_limit_a_side(predicate: str, comparisons: int) -> None:
    """Equal at every point, with at most one comparison with the coordinate from each side."""
    text = f"cascade c(X[p]) -> Y[p,m]\n  where p < P, m < M\n  Y[p,m] = X[p]  if {predicate}\n"
    domain = parse_cascade(text).body[0].domain
    found = one_limit_a_side(domain, "m")
    apart = limits_apart(domain, "m")
    assert (apart is not None) == (predicate == "m <= p & p - m < 3 & m < M & p < P")
    assert apart is None or sympy.And(*apart) == found
    assert len([c for c in conjuncts(found) if "m" in free_vars(c)]) == comparisons
    for p, m, rows, columns in product(range(9), range(9), (1, 6), (1, 7)):
        at = {var("p"): p, var("m"): m, var("P"): rows, var("M"): columns}
        point = {k: sympy.Integer(v) for k, v in at.items()}
        assert bool(found.xreplace(point).doit()) == bool(domain.xreplace(point)), (p, m, rows, columns)
