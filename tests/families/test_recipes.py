"""The families under the exact recipe: canonical form, deferral and loops after each rewrite, then generated code."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, Einsum, Rank, Reduction, Tensor, var
from einscade.ir.verify import verify
from einscade.passes.chunk import Chunk
from einscade.passes.contract import contract, flatten
from einscade.passes.defer import Defer
from einscade.passes.pipeline import run
from einscade.passes.quantize import Quantize
from einscade.passes.reassociate import Reassociate
from einscade.passes.select import Select
from einscade.passes.smooth import Smooth
from einscade.passes.split import Split
from einscade.passes.statements import Names
from tests.families.cascades import (
    ATTENTION,
    DECAYED,
    NORMALISED,
    WINDOW_WITH_SINK,
    apply,
    assert_same,
    cascade,
    generated,
    inputs,
    interpreted,
)

DIAGONAL = sympy.Eq(var("m"), var("p"))
KEYS = Quantize("Kcentred", (("m", 4), ("e", 0)))
QUERIES = Quantize("Q", (("p", 4), ("e", 0)))
FAMILIES = {
    "window with a sink": (ATTENTION, WINDOW_WITH_SINK, ()),
    "selected blocks": (ATTENTION, "m <= p", (Select("p", "m", 2, 4, 4, DIAGONAL),)),
    "quantized": (ATTENTION, "m <= p", (Smooth("K", "m"), KEYS, QUERIES)),
    "selected and quantized": (ATTENTION, "m <= p", (Smooth("K", "m"), Select("p", "m", 2, 4, 4, DIAGONAL), KEYS)),
    "reassociated": (NORMALISED, "true", (Reassociate("m"),)),
    "chunked": (NORMALISED, "m <= p", (Chunk("p", "m", 4),)),
    "decayed": (DECAYED, "", (Chunk("p", "m", 4),)),
    "split": (ATTENTION, "m <= p", (Defer(), Split("m", 3))),
    "split and quantized": (ATTENTION, "m <= p", (Smooth("K", "m"), KEYS, Defer(), Split("m", 3))),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("p", "m"), [(11, 11), (1, 1)])
def test_the_exact_recipe_keeps_what_the_family_computes(name: str, p: int, m: int) -> None:
    text, domain, rewrites = FAMILIES[name]
    before = apply(cascade(text, domain), *rewrites)
    after = run(before, "exact").cascade
    data = inputs(before, B=2, P=p, M=m)
    if text == NORMALISED:
        data["Q"], data["K"] = data["Q"].abs(), data["K"].abs()
    expected = list(interpreted(before, data).values())
    renamed = {t.name: data[s.name] for s, t in zip(before.inputs, after.inputs, strict=True)}
    for values in (interpreted(after, renamed), generated(after, renamed)):
        assert_same(dict(enumerate(values.values())), dict(enumerate(expected)))


# -- contraction order, on random products --

RANKS = {"a": 2, "b": 3, "c": 4, "d": 5}


@st.composite
def products(draw: st.DrawFn) -> Cascade:
    """`sum(..) x[..] * y[..] * ...` over random ranks, with or without a condition between two of them."""
    count = draw(st.integers(2, 4))
    some = st.lists(st.sampled_from(sorted(RANKS)), min_size=1, max_size=3, unique=True)
    tensors = [Tensor(f"x{i}", tuple(draw(some)), "f64") for i in range(count)]
    used = sorted({r for t in tensors for r in t.ranks})
    reduced = draw(st.lists(st.sampled_from(used), min_size=1, unique=True))
    output = Tensor("O", tuple(r for r in used if r not in reduced), "f64")
    domain = sympy.true
    if len(used) > 1 and draw(st.booleans()):
        first, second = draw(st.permutations(used))[:2]
        domain = var(first) <= var(second)
    statement = Einsum(output, sympy.Mul(*(t() for t in tensors)), Reduction("sum", tuple(reduced)), domain)
    ranks = tuple(Rank(r, sympy.Integer(n)) for r, n in RANKS.items() if r in used)
    return Cascade("product", ranks, tuple(tensors), ("O",), (statement,))


@given(products())
@settings(max_examples=60, deadline=None)
def test_every_order_of_contraction_gives_the_product(before: Cascade) -> None:
    verify(before)
    (statement,) = before.body
    product, after = flatten(statement, before, statement.reduce.ranks[0] if statement.reduce else "")
    after = after.replace(body=contract(product, statement.output, after, Names(after)))
    verify(after, "contract")
    data = {t.name: torch.randn([RANKS[r] for r in t.ranks], dtype=torch.float64) for t in before.inputs}
    assert_same(interpreted(after, data), interpreted(before, data))
