"""Every rewrite of the exact recipe on random cascades: the interpreter gives the same before and after."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from einscade.ir import Access, Cascade, Einsum, Where, accesses, var
from einscade.ir.interpret import interpret
from einscade.passes.bounded import Bounded
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.defer import Defer
from einscade.passes.online import Loops, Online
from einscade.passes.pipeline import run
from einscade.passes.restrict import Restrict
from einscade.passes.rewrite import NotApplicable
from tests.strategies import DOMAINS, SCORES, Case, attention, cascades, reductions

RELAXED = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def assert_same(case: Case, after: Cascade, tile: int = 3) -> None:
    """As `assert_equivalent`, with inputs and outputs by position."""
    before = case.cascade
    inputs = case.inputs()
    expected = case.reference(inputs)
    renamed = {new.name: inputs[old.name] for old, new in zip(before.inputs, after.inputs, strict=True)}
    sizes = {s: case.sizes.get(s, tile) for s in after.symbols}
    actual = interpret(after, renamed, sizes)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        torch.testing.assert_close(
            actual[new], expected[old], rtol=1e-8, atol=1e-8, equal_nan=True, msg=lambda m: f"{m}\n{before}\n{after}"
        )


@RELAXED
@given(case=attention(), tile=st.integers(1, 5))
def test_exact_on_attention(case: Case, tile: int) -> None:
    assert_same(case, run(case.cascade, "exact").cascade, tile)


@RELAXED
@given(case=reductions(), tile=st.integers(1, 5))
def test_exact_on_dependent_reductions(case: Case, tile: int) -> None:
    assert_same(case, run(case.cascade, "exact").cascade, tile)


@settings(RELAXED, max_examples=30)
@given(case=cascades(), tile=st.integers(1, 5))
@pytest.mark.parametrize(
    "rewrite", [Canonicalise(), Restrict(), Defer(), Bounded(), Online(), Loops()], ids=lambda r: r.name
)
def test_each_rewrite_alone(rewrite: Canonicalise, case: Case, tile: int) -> None:
    try:
        after = rewrite.apply(case.cascade)
    except NotApplicable:
        return
    assert_same(case, after, tile)


@RELAXED
@given(case=attention())
def test_the_canonical_form_is_a_fixed_point(case: Case) -> None:
    once = Canonicalise().apply(case.cascade)
    with pytest.raises(NotApplicable):
        Canonicalise().apply(once)


# Masks that read a tensor of queries keep a finite fill: their empty rows are means, not 0.
KEYS = tuple(k for k in DOMAINS if k not in ("boolean mask", "documents"))
MASKABLE = ("softmax", "softmax, weights apart", "sink", "no maximum", "sigmoid", "squared relu")
# Where an additive mask does not read a missing score, the point exists after all: not what a fill of it says.
PLAIN = tuple(k for k in SCORES if k != "additive mask")
FILLS = [-sympy.oo, sympy.Float(-3.4028234663852886e38)]


def masked(case: Case, fill: sympy.Expr, added: bool) -> Case:
    """The case with the domain of its scores spelled as a fill of what is computed from them."""
    body = []
    condition = sympy.true
    for s in case.cascade.body:
        if s.name == "T":
            condition, s = s.domain, s.replace(domain=sympy.true)
        elif s.name == "S":
            expr = s.expr + Where(condition, 0, fill) if added else Where(condition, s.expr, fill)
            s = s.replace(expr=expr)
        body.append(s)
    return Case(case.cascade.replace(body=tuple(body)), case.sizes, case.limits)


@RELAXED
@given(
    case=attention(domains=KEYS, scores=PLAIN, normalisers=MASKABLE),
    fill=st.sampled_from(FILLS),
    added=st.booleans(),
    tile=st.integers(1, 5),
)
def test_masks_are_domains(case: Case, fill: sympy.Expr, added: bool, tile: int) -> None:
    after = run(masked(case, fill, added).cascade, "exact").cascade
    assert not any(s.expr.has(sympy.oo, -sympy.oo) for s in after.body if s.scan is None)
    assert_same(case, after, tile)


@RELAXED
@given(case=attention(scores=PLAIN, normalisers=MASKABLE), tile=st.integers(1, 5))
def test_infinite_masks_of_any_kind_are_domains(case: Case, tile: int) -> None:
    after = run(masked(case, -sympy.oo, False).cascade, "exact").cascade
    assert_same(case, after, tile)


@RELAXED
@given(case=attention(domains=("boolean mask", "documents"), scores=PLAIN, normalisers=("softmax",)))
def test_a_finite_fill_of_queries_means_what_it_says(case: Case) -> None:
    spelled = masked(case, FILLS[1], False)
    assert_same(spelled, run(spelled.cascade, "exact").cascade)


@RELAXED
@given(
    case=attention(domains=KEYS, scores=PLAIN, normalisers=("softmax", "sink")),
    fill=st.sampled_from(FILLS),
    tile=st.integers(1, 5),
)
def test_two_masked_softmaxes_apart(case: Case, fill: sympy.Expr, tile: int) -> None:
    """The difference of two, the second with twice the scores, as masks and as domains."""

    def doubled(c: Cascade) -> Cascade:
        second = {s.name: f"{s.name}2" for s in c.body if s.name != "T"}
        body = list(c.body)
        for s in c.body:
            if s.name == "T":
                continue
            calls = {a: Access(second[a.tensor], *a.index) for a in s.reads if a.tensor in second}
            expr = s.expr.xreplace(calls)
            if s.name == "S":
                expr = expr.xreplace({a: 2 * a for a in accesses(expr) if a.tensor == "T"})
            body.append(s.replace(output=replace(s.output, name=second[s.name]), expr=expr))
        o = c.tensors["O"]
        body.append(Einsum(replace(o, name="apart"), o() - Access("O2", *map(var, o.ranks)) / 3))
        return c.replace(body=tuple(body), outputs=("apart",))

    reference = Case(doubled(case.cascade), case.sizes, case.limits)
    spelled = doubled(masked(case, fill, False).cascade)
    assert_same(reference, run(spelled, "exact").cascade, tile)
    assert_same(reference, run(reference.cascade, "exact").cascade, tile)
