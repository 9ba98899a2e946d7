"""Recipes: named sequences of rewrites, what a user asks for.

Comes in: a recipe's name. Goes out: its rewrites, in order; an unknown name is an error that suggests the nearest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from einscade.passes.bounded import Bounded
from einscade.passes.canonicalise import Canonicalise
from einscade.passes.defer import Defer
from einscade.passes.online import Loops, Online
from einscade.passes.restrict import Restrict
from einscade.passes.rewrite import Rewrite

__all__ = ["RECIPES", "recipe"]

RECIPES: Mapping[str, tuple[Rewrite, ...]] = {
    "exact": (Canonicalise(), Restrict(), Defer(), Bounded(), Online(), Loops()),
}


def recipe(name: str) -> tuple[Rewrite, ...]:
    """The rewrites of a recipe. Raises ValueError for a name that is none, with the names nearest to it."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(str(name), RECIPES, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known recipes: {', '.join(sorted(RECIPES))}"
    raise ValueError(f"unknown recipe {name!r}; {hint}")
