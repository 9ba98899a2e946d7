"""Every spelling is found, raised to an equal cascade, and its mask and normaliser become properties of the cascade."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch

from einscade.compiler.regions import Region, find
from einscade.ir import Access, Cascade, var
from einscade.ir.interpret import interpret
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.rewrite import NotApplicable
from tests.compiler.region_oracle import check, trace, values_of
from tests.spellings.cases import CASES, NEGATIVES, B, Case, M, P, inputs

LENGTHS = {"static": (), "dynamic": (B, P, M)}


def graph(case: Case, mode: str) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    args = inputs(case, torch.float64)
    function = case.function.double() if isinstance(case.function, torch.nn.Module) else case.function
    return trace(function, args, LENGTHS[mode]), args


def canonical(cascade: Cascade) -> Cascade:
    try:
        return Canonicalise().apply(cascade)
    except NotApplicable:
        return cascade


def normaliser(cascade: Cascade) -> str:
    """How the weights are normalised, from what is reduced over m and what is divided by."""
    divides = {a.tensor for e in cascade.body for power in e.expr.atoms(sympy.Pow)
               if power.exp.is_negative for a in power.base.atoms(Access)}  # fmt: skip
    scores = {a.tensor for e in cascade.body for f in e.expr.atoms(sympy.exp) for a in f.atoms(Access)}
    monoids = {e.reduce.monoid for e in cascade.body if e.reduce and e.name in divides | scores}
    sums = any(e.reduce and e.reduce.monoid == "sum" and e.name in divides - scores for e in cascade.body)
    return "none" if not sums else "softmax" if "max" in monoids else "sum"


def domain(cascade: Cascade, sizes: dict[str, int]) -> tuple[tuple[int, int], set[tuple[int, int]]]:
    """The lengths of p and m, and the (p, m) that exist by position alone: what the domains say without tensors."""
    known = {var(name): sympy.Integer(n) for name, n in sizes.items()}
    lengths = {r.name: int(r.extent.xreplace(known)) for r in cascade.ranks}
    parts = [c for e in cascade.body for c in sympy.And.make_args(e.domain) if not c.has(Access) and c != sympy.true]
    shape = lengths.get("p", 1), lengths.get("m", 1)
    points = set()
    for p, m in itertools.product(*map(range, shape)):
        at = {**known, var("p"): sympy.Integer(p), var("m"): sympy.Integer(m)}
        if all(part.xreplace(at) == sympy.true for part in parts):
            points.add((p, m))
    return shape, points


@pytest.mark.parametrize("mode", LENGTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_spelling(case: Case, mode: str) -> None:
    gm, args = graph(case, mode)
    regions = check(gm, args, 1e-5 if case.casts else 1e-9)
    assert [r.reason for r in regions] == [None] * case.sites
    values = values_of(gm, args)
    for region in regions:
        assert region.cascade is not None
        assert len(region.outputs) == case.outputs
        _check_properties(case, region, values)


def _check_properties(case: Case, region: Region, values: dict) -> None:
    assert region.cascade is not None
    cascade = canonical(region.cascade)
    given = {t.name: values[n] for t, n in zip(cascade.inputs, region.inputs, strict=True)}
    fixed = {k: int(values[v]) if isinstance(v, torch.fx.Node) else _hint(v) for k, v in region.sizes.items()}
    for name, own in zip(cascade.outputs, region.cascade.outputs, strict=True):
        want = interpret(region.cascade, {t.name: values[n] for t, n in zip(region.cascade.inputs, region.inputs,
                         strict=True)}, fixed)[own]  # fmt: skip
        torch.testing.assert_close(interpret(cascade, given, fixed)[name], want, rtol=1e-9, atol=1e-9)
    assert normaliser(cascade) == case.normaliser
    if case.sites == 1:
        lengths, points = domain(cascade, fixed)
        every = set(itertools.product(*map(range, lengths)))
        assert points == {(p, m) for p, m in every if case.domain is None or case.domain(p, m)}


def _hint(size: object) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)  # type: ignore[call-overload]


@pytest.mark.parametrize("case", NEGATIVES, ids=lambda c: c.name)
def test_negative(case: Case) -> None:
    gm, _ = graph(case, "static")
    assert find(gm) == []


def test_the_suite_is_large_enough() -> None:
    assert len(CASES) >= 60
    assert len({c.name for c in (*CASES, *NEGATIVES)}) == len(CASES) + len(NEGATIVES)

