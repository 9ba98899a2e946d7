"""Arguments of the public functions, checked where they come in: every message names the argument and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einscade.passes.recipes import recipe as rewrites_of

__all__ = ["INNER", "check_inner", "check_recipe", "split_call"]

INNER = ("inductor", "aot_eager", "eager")


def check_recipe(recipe: Any) -> str:
    """The recipe's name. Raises ValueError for an unknown one, with the names nearest to it."""
    if not isinstance(recipe, str):
        raise ValueError(f"recipe must be a name, got {type(recipe).__name__}")
    rewrites_of(recipe)
    return recipe


def check_inner(inner: Any) -> str:
    if inner not in INNER:
        raise ValueError(f"inner must be one of {', '.join(map(repr, INNER))}, got {inner!r}")
    return str(inner)


def split_call(name: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`(args, kwargs)` as given to `verify` and `example_inputs`. Raises ValueError for anything else."""
    if value is None:
        return None
    well_formed = isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], (tuple, list))
    if not well_formed or not isinstance(value[1], Mapping):
        raise ValueError(f"{name} must be (args, kwargs), as in {name}=((x,), {{'mask': mask}})")
    return tuple(value[0]), dict(value[1])
