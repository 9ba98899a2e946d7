"""Factors that wait for the same scores, as one value: what is held, and that nothing else changes."""

from __future__ import annotations

import random

import pytest
import sympy

from einscade.codegen.base2 import Exp2
from einscade.codegen.gluon_factors import joined, shared
from einscade.codegen.gluon_form import Form, nest_form
from einscade.codegen.gluon_plan import Plan
from einscade.codegen.gluon_program import schedules
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, accesses, var
from tests.codegen.test_gluon_gradients import NARROW, WIDE, program


def keys(name: str) -> tuple[Form, tuple[Statement, ...]]:
    """The loop of a gradient's rows of keys, and its statements."""
    _, loops = program(name, tuple(WIDE.items()))
    shape = nest_form(loops.cascade, loops.serial_nests[1])
    tiles = (("P0", 32), ("m", 128))
    statements = Plan(shape, Schedule(tiles, 4, 2, (), "cuda:90", True)).statements
    return shape, shared(statements, (shape.p, shape.m))


def evaluated(name: str, statements: tuple[Statement, ...], known: dict[str, float]) -> float:
    """A value of one point; what no statement makes is a random number, the same for the same name."""
    made = {s.name: s for s in statements}
    if name not in made:
        return known.setdefault(name, random.Random(name).uniform(-1, 1))
    expr = made[name].expr
    expr = expr.xreplace({a: sympy.Float(evaluated(a.tensor, statements, known), 30) for a in accesses(expr)})
    return float(expr.replace(Exp2, lambda x: 2**x).evalf(30))


@pytest.mark.parametrize("name", ["softcap", "sigmoid"])
def test_one_value_is_held_for_the_last_product(name: str) -> None:
    shape, statements = keys(name)
    found = joined(statements, shape)
    product = next(s for s in found if s.name == shape.sums[0].weights)
    before, after = (len([a for a in s.reads if shape.m in {str(i) for i in a.index}])
                     for s in (next(s for s in statements if s.name == product.name), product))  # fmt: skip
    assert (before, after) == (3, 2)
    for x in shape.sums:
        expected, got = evaluated(x.weights, statements, {}), evaluated(x.weights, found, {})
        assert got == pytest.approx(expected, rel=1e-12)
        assert expected != 0


def test_a_number_stays_with_the_product() -> None:
    """The cap, in `5 - 5 * tanh(s)**2`: it then multiplies the sum, and no point."""
    shape, statements = keys("softcap")
    product = next(s for s in joined(statements, shape) if s.name == shape.sums[0].weights)
    number = next(s for s in statements if s.name == product.name).expr.as_coeff_Mul()[0]
    assert float(product.expr.as_coeff_Mul()[0] / number) == 5


@pytest.mark.parametrize("name", ["causal", "slopes", "gathered"])
def test_factors_that_wait_for_different_scores_stay_apart(name: str) -> None:
    """And what is one for each row is no factor that waits."""
    shape, statements = keys(name)
    assert joined(statements, shape) == statements


def test_a_value_that_others_read_stays() -> None:
    """And is read where the factors are one value, not written out."""
    shape, statements = keys("softcap")
    derivative = next(s for s in statements if s.expr.is_Add and 5 in s.expr.args)
    other = Statement("other", derivative.ranks, 2 * Access(derivative.name, *map(var, derivative.ranks)))
    found = {s.name: s for s in joined((*statements, other), shape)}
    assert found[derivative.name] == derivative
    assert [s.name for s in found.values() if derivative.name in {a.tensor for a in s.reads}][1:] == ["other"]


@pytest.mark.parametrize("name", ["softcap", "sigmoid"])
@pytest.mark.parametrize("shape", [NARROW, WIDE, {**WIDE, "h": 8}], ids=["64", "128", "groups"])
def test_the_queries_gradient_is_added_up_there_too(name: str, shape: dict[str, object]) -> None:
    """With as many queries an iteration as where nothing modifies scores."""
    found = [schedules(program(n, tuple(shape.items()))[1]) for n in (name, "causal")]
    first, plain = (next(s for s in space if s.unordered) for space in found)
    assert found[0][0] == first
    assert first.tile("P0") == plain.tile("P0")
