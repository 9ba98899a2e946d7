"""How far a rewritten cascade is from the one before: the error that an approximate rewrite declares.

Comes in: two cascades with the same inputs and outputs, and data. Goes out: one number per output, from the reference
interpreter, so that nothing but the rewrite is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from einscade.ir import Cascade
from einscade.ir.interpret import interpret

__all__ = ["output_errors"]


def output_errors(
    before: Cascade,
    after: Cascade,
    inputs: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """`‖after - before‖ / ‖before‖` (Frobenius, float64) of every output; 0 where both are 0, inf where only the
    first is.

    `sizes` gives symbols that no input's shape does, of either cascade.
    """
    exact, changed = (
        interpret(c, inputs, {name: size for name, size in (sizes or {}).items() if name in c.symbols})
        for c in (before, after)
    )
    errors = {}
    for name in before.outputs:
        difference, norm = (changed[name].double() - exact[name].double()).norm(), exact[name].double().norm()
        errors[name] = float(difference / norm) if norm > 0 else (0.0 if difference == 0 else torch.inf)
    return errors
