"""Digits: an index that counts through several ranks, as a number counts through its digits.

Comes in: an index `12*a + 4*b + c` with `b < 3` and `c < 4`, or a number `n` and the sizes of its digits. Goes out: the
ranks `a, b, c`, the slowest first, or the digits `n // 12, n // 4 % 3, n % 4`. The slowest has no upper end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from einscade.ir.expr import Expr, FloorDiv, Mod, var

__all__ = ["counted", "digits", "number"]


def counted(index: Expr, extents: Mapping[str, Expr], step: Expr | int = 1) -> tuple[str, ...] | None:
    """The ranks of `extents` through all of which an index counts in steps of `step`, the slowest first; None where it
    is any other."""
    rest, stride = sympy.expand(index), sympy.sympify(step)
    left = sorted(extents, key=lambda rank: extents[rank] != 1)  # what never moves has the stride of the next
    found: list[str] = []
    while left:
        rank = next((r for r in left if sympy.expand(rest.coeff(var(r)) - stride) == 0), None)
        if rank is None:
            return None
        rest = sympy.expand(rest - stride * var(rank))
        stride = sympy.expand(stride * extents[rank])
        left.remove(rank)
        found.insert(0, rank)
    return tuple(found) if rest == 0 else None


def digits(value: Expr, sizes: Sequence[Expr], step: Expr | int = 1) -> tuple[Expr, ...]:
    """The digits of `value // step`, the slowest first, where each is below its size."""
    found: list[Expr] = []
    stride = sympy.sympify(step)
    for size in reversed(sizes[1:]):
        found.insert(0, Mod(FloorDiv(value, stride), size))
        stride = sympy.expand(stride * size)
    return (FloorDiv(value, stride), *found)


def number(places: Sequence[Expr], sizes: Sequence[Expr]) -> Expr:
    """What has the digits `places`, the slowest first."""
    value: Expr = sympy.Integer(0)
    for place, size in zip(places, sizes, strict=True):
        value = value * size + place
    return sympy.expand(value)
