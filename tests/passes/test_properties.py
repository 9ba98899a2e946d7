"""Every rewrite of the exact recipe on random cascades: the interpreter gives the same before and after."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade
from einscade.ir.interpret import interpret
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.defer import Defer
from einscade.passes.online import Loops, Online
from einscade.passes.pipeline import run
from einscade.passes.restrict import Restrict
from einscade.passes.rewrite import NotApplicable
from tests.strategies import Case, attention, cascades, reductions

RELAXED = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


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
@pytest.mark.parametrize("rewrite", [Canonicalise(), Restrict(), Defer(), Online(), Loops()], ids=lambda r: r.name)
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
