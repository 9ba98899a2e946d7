"""The Python frame that Dynamo compiles a model's call from.

Comes in: a module. Goes out: a function that calls it, with a code object of its own.

Dynamo keeps compiled graphs, and counts recompilations against its limit, by code object. Compiled from `forward`, all
models of a class, and all that are optimised in turn in one process, would share one count and run unoptimised once it
is reached; and a `forward` that is torch's own (nn.TransformerEncoder) would not be compiled at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["framed"]


def framed(self: nn.Module) -> Callable[..., Any]:
    """A function that calls the module, hooks included and its compiled call left aside. The module has the name that
    its own methods give it, which is how Dynamo names what it finds in it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call
