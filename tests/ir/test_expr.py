"""Scalar expressions: what evaluates on construction, and what must not."""

from __future__ import annotations

import itertools

import pytest
import sympy

from einscade.ir import Access, FloorDiv, Mod, Round, Trunc, Where, accesses, ceil_div, const, free_vars, var

p, m, M, N = map(var, ("p", "m", "M", "N"))
A, B = Access("A", p), Access("B", p, m)


def test_an_access_is_a_number_and_a_boolean_at_once() -> None:
    assert sympy.And(A, m <= p).args
    assert sympy.Not(A) != A
    assert A + 1 - 1 == A
    assert A.at(m) == Access("A", m)
    assert str(B) == "B[p,m]"
    assert B.tensor == "B"


@pytest.mark.parametrize("other", [sympy.Integer(0), 2 * p + 1, Access("C", m) + 1, sympy.oo, p])
@pytest.mark.parametrize("relation", [sympy.Eq, sympy.Ne])
def test_equality_with_an_access_stays_open(relation: type, other: sympy.Expr) -> None:
    """Also after a substitution, which builds the relation anew; sympy alone would make it false."""
    for sides in ((A, other), (other, A)):
        comparison = relation(*sides)
        assert isinstance(comparison, relation)
        assert comparison.xreplace({p: m}) == relation(*(s.xreplace({p: m}) for s in sides))
        assert isinstance(comparison.xreplace({p: sympy.Integer(3)}), relation)


def test_equality_of_anything_else_is_sympys() -> None:
    assert sympy.Eq(A, A) == sympy.true
    assert sympy.Ne(A, A) == sympy.false
    assert sympy.Eq(sympy.true, sympy.Integer(1)) == sympy.false
    assert sympy.Eq(sympy.Integer(2), sympy.Integer(2)) == sympy.true


def test_an_access_is_an_atom_to_derivatives() -> None:
    C = Access("A", m)
    assert (A**2 * C).diff(A) == 2 * A * C
    assert sympy.exp(A - C).diff(C) == -sympy.exp(A - C)
    assert Where(A < 0, A**2, A).diff(A) == Where(A < 0, 2 * A, 1)


def test_variables_of_the_index_are_free_the_name_is_not() -> None:
    assert free_vars(Access("m", p + M) * N) == {"p", "M", "N"}
    assert accesses(Access("T", Access("I", p)) + A) in (
        (A, Access("T", Access("I", p)), Access("I", p)),
        (Access("T", Access("I", p)), Access("I", p), A),
    )


@pytest.mark.parametrize("build", [FloorDiv, Mod])
def test_division_of_numbers_is_pythons(build: type) -> None:
    python = {FloorDiv: int.__floordiv__, Mod: int.__mod__}[build]
    for a, b in itertools.product(range(-9, 10), (-4, -1, 1, 3, 8)):
        assert build(sympy.Integer(a), sympy.Integer(b)) == python(a, b)


def test_exact_multiples_leave_a_division() -> None:
    assert FloorDiv(4 * p + m, 4) == p + FloorDiv(m, 4)
    assert Mod(4 * p + m, 4) == Mod(m, 4)
    assert FloorDiv(M * p, M) == p
    assert FloorDiv(M**2, M) == M
    assert Mod(M**2, M) == 0
    assert FloorDiv(p, 1) == p
    assert Mod(p, 1) == 0
    assert ceil_div(M, N).xreplace({M: sympy.Integer(7), N: sympy.Integer(2)}) == 4
    assert ceil_div(M, 2).xreplace({M: sympy.Integer(0)}) == 0


def test_constants() -> None:
    assert const(2.0) == sympy.Integer(2)
    assert const(0.5) == sympy.Float(0.5)
    assert const(float("-inf")) == -sympy.oo
    assert const(True) == sympy.true


def test_rounding_and_choice_evaluate_what_is_known() -> None:
    assert Trunc(p) == p
    assert Round(A).is_integer
    assert Where(sympy.true, A, B) == A
    assert Where(m <= p, A, A) == A
