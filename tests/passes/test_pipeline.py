"""Recipes run in order, verified after every rewrite, with a step for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from einscade.ir import Cascade
from einscade.ir.verify import CascadeError
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from tests.passes.cascades import ALL, ATTENTION, SIZES, assert_equal, cascade


@pytest.mark.parametrize("name", ALL)
def test_exact_is_exact(name: str) -> None:
    before = cascade(ALL[name])
    after = run(before, "exact").cascade
    for m, p in [(7, 5), (1, 1), (6, 9), (0, 3)]:
        assert_equal(before, after, {**SIZES, "M": m, "P": p}, tiles=(1, 4))


def test_a_step_per_rewrite_with_reasons() -> None:
    rewritten = run(cascade(ATTENTION), "exact")
    assert [s.name for s in rewritten.steps] == [r.name for r in recipe("exact")]
    assert rewritten.steps[0].before == cascade(ATTENTION)
    assert rewritten.steps[-1].after == rewritten.cascade
    for step in rewritten.steps:
        assert step.changed == (step.before != step.after)
        assert step.identity
    assert any(s.reason for s in rewritten.steps)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'exat'; did you mean 'exact'"):
        run(cascade(ATTENTION), "exat")
    with pytest.raises(ValueError, match=r"known recipes: .*exact"):
        recipe("zzz")


def test_a_rewrite_that_breaks_the_cascade_is_named() -> None:
    @dataclass(frozen=True)
    class Breaks:
        name: ClassVar[str] = "breaks"
        identity: ClassVar[str] = "none"
        exact: ClassVar[bool] = True

        def apply(self, cascade: Cascade) -> Cascade:
            return cascade.replace(body=cascade.body[1:])

    with pytest.raises(CascadeError, match="after breaks"):
        run(cascade(ATTENTION), [Breaks()])
