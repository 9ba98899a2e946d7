"""Digits against plain arithmetic, at every point."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import FloorDiv, var
from einscade.ir.digits import counted, digits, number

RANKS = "abcd"
steps = st.integers(1, 3)
sizes_of = st.lists(st.integers(1, 4), min_size=1, max_size=len(RANKS))
extents_of = st.lists(st.sampled_from([1, 2, 3, var("M"), var("N")]), min_size=1, max_size=len(RANKS))


def plain(value: int, sizes: Sequence[int]) -> list[int]:
    """The digits of a number, the slowest first."""
    *others, last = sizes
    return [*plain(value // last, others), value % last] if others else [value]


@given(sizes_of, steps)
@settings(max_examples=50, deadline=None)
def test_the_digits_of_a_number(sizes: list[int], step: int) -> None:
    n = var("n")
    places = digits(n, [sympy.Integer(s) for s in sizes], step)
    for value in range(2 * step * prod(sizes)):  # beyond the last, which the slowest digit counts on
        assert [int(p.xreplace({n: sympy.Integer(value)})) for p in places] == plain(value // step, sizes)


@given(sizes_of)
@settings(max_examples=50, deadline=None)
def test_the_number_of_digits(sizes: list[int]) -> None:
    value = number([var(r) for r in RANKS[: len(sizes)]], [sympy.Integer(s) for s in sizes])
    for n, places in enumerate(itertools.product(*map(range, sizes))):  # in the order in which one counts
        at = {var(r): sympy.Integer(p) for r, p in zip(RANKS, places, strict=False)}
        assert value.xreplace(at) == n


@given(extents_of, steps, st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_ranks_of_a_number(sizes: list[int | sympy.Expr], step: int, random: object) -> None:
    """They come back in their order, in which ranks of 1 may stand anywhere."""
    extents = {r: sympy.sympify(n) for r, n in zip(RANKS, sizes, strict=False)}
    index = sympy.expand(step * number([*map(var, extents)], [*extents.values()]))
    ranks = list(extents)
    random.shuffle(ranks)  # type: ignore[attr-defined]
    found = counted(index, {r: extents[r] for r in ranks}, step)
    assert found is not None
    assert sorted(found) == sorted(extents)
    assert [r for r in found if extents[r] != 1] == [r for r in extents if extents[r] != 1]
    assert sympy.expand(step * number([*map(var, found)], [extents[r] for r in found]) - index) == 0


@given(st.lists(st.tuples(st.integers(2, 3), st.integers(0, 6)), min_size=1, max_size=3), st.integers(0, 1), steps)
@settings(max_examples=200, deadline=None)
def test_an_index_counts_or_does_not(terms: list[tuple[int, int]], start: int, step: int) -> None:
    """It does if, in steps from 0 on, it takes every value once."""
    extents = {r: sympy.Integer(n) for r, (n, _) in zip(RANKS, terms, strict=False)}
    index = sympy.Add(start, *(c * var(r) for r, (_, c) in zip(RANKS, terms, strict=False)))
    values = [
        start + sum(c * p for (_, c), p in zip(terms, point, strict=True))
        for point in itertools.product(*(range(n) for n, _ in terms))
    ]
    counts = sorted(values) == [step * k for k in range(len(values))]
    assert (counted(index, extents, step) is not None) == counts


def test_what_is_no_sum_of_its_ranks_does_not_count() -> None:
    a, b, three = var("a"), var("b"), sympy.Integer(3)
    for index in (a * b, FloorDiv(a, 2) + b, 3 * a + b + var("c"), 3 * a):
        assert counted(index, {"a": three, "b": three}) is None
    assert counted(sympy.Integer(0), {}) == ()
