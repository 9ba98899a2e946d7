"""Arguments of the public functions, checked where they come in: every message names the argument and the fix."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from einscade.passes.recipes import recipe as rewrites_of

__all__ = ["INNER", "SWITCHES", "check_call", "check_environment", "check_inner", "check_recipe", "split_call"]

INNER = ("inductor", "aot_eager", "eager")
SWITCHES = ("EINSCADE_AUTOTUNE", "EINSCADE_PROGRESS")


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


def check_environment() -> None:
    """Raises ValueError for a variable that switches something and says neither 0 nor 1."""
    for name in SWITCHES:
        value = os.environ.get(name, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"{name} must be 0 or 1, got {value!r}")


def check_call(what: str, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises TypeError where `model(*args, **kwargs)` would, for arguments that its `forward` does not take."""
    if model._forward_pre_hooks:  # they may change the arguments
        return
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # not Python
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        forward = f"{type(model).__name__}.forward{signature}"
        raise TypeError(f"{what}: {forward} was given other arguments: {error}") from None
