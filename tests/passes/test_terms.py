"""Tools on expressions."""

from __future__ import annotations

import pytest

from einscade.ir.expr import Access, var
from einscade.passes.terms import opposed

p, m, h = var("p"), var("m"), var("h")
S, X, Y, Z = Access("S", h, p, m), Access("X", p), Access("X", m), Access("Z", h, p)


@pytest.mark.parametrize(
    ("expr", "pair"),
    [
        (S + X - Y, (X, -Y)),
        (2 * S + 3 * X - 3 * Y, (3 * X, -3 * Y)),
        (S + X - Y - Z - Access("G", p), (X, -Y)),
        (S + X - Access("G", m), None),  # of another tensor, which may be large by itself
        (X - Y, None),  # nothing else is added
        (S + X - 2 * Y, None),
        (S + X + Y, None),
        (S + X - Access("G", p), None),  # along one rank
        (S - Access("T", h, p, m) + Z, None),  # along all
    ],
)
def test_which_terms_are_taken_from_one_another_first(expr: object, pair: object) -> None:
    assert opposed(expr) == pair  # type: ignore[arg-type]
