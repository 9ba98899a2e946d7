"""Do two kernels compute the same? A guard for the moment of tuning, when every candidate has just run.

Comes in: the outputs of a candidate and of one that is trusted, on the same inputs. Goes out: None, or what differs.
The bounds only tell a wrong kernel from a right one; how exact a right one has to be is the tests' business.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["disagreement"]

# By the least precise floating dtype involved: relative error, and the part of the inputs' scale that an output whose
# terms cancel is measured against.
_BOUNDS = {
    torch.float64: (1e-9, 1e-2),
    torch.float32: (2e-3, 1e-2),
    torch.float16: (1e-2, 1.0),
    torch.bfloat16: (4e-2, 1.0),
}


_CANCELLED = 0.05
"""The most of that scale where outputs are gradients: they are sums over long ranks, far smaller than what enters."""


def disagreement(
    outputs: Sequence[Tensor],
    trusted: Sequence[Tensor],
    inputs: Sequence[Tensor],
    empty_rows: bool = False,
    cotangents: Collection[int] = (),
) -> str | None:
    """What is wrong with `outputs` if `trusted` is right: a shape, a value that is not finite, or the figures of an
    error that rounding does not explain. None where they agree. `empty_rows`: rows may have no points (a mask made of
    data), which is 0 here and something else elsewhere, so rows of zeros are passed over. `cotangents`: the places of
    the inputs that all outputs are linear in, however small those are."""
    floats = [t for t in (*inputs, *trusted) if t.dtype in _BOUNDS]
    bound, floor = max((_BOUNDS[t.dtype] for t in floats), default=(0.0, 0.0))
    sizes = {i: _rms(t) for i, t in enumerate(inputs) if t.dtype in _BOUNDS and t.numel()}
    scale = max((s for i, s in sizes.items() if i not in cotangents), default=0.0)
    if cotangents:
        floor = min(floor, _CANCELLED)
        scale = max(scale, 1.0) * max((sizes.get(i, 0.0) for i in cotangents), default=0.0)
    for i, (got, expected) in enumerate(zip(outputs, trusted, strict=True)):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"output {i} is {got.dtype}{tuple(got.shape)}, not {expected.dtype}{tuple(expected.shape)}"
        if got.dtype not in _BOUNDS:
            if not torch.equal(got, expected):
                return f"output {i} differs"
            continue
        known = expected.isfinite()
        if empty_rows and got.dim():
            known &= (got != 0).any(-1, keepdim=True)
        if not bool((got.isfinite() | ~known).all()):
            return f"output {i} has values that are not finite"
        wanted = expected.masked_fill(~known, 0).double()
        error = float((got.masked_fill(~known, 0).double() - wanted).norm())
        allowed = bound * (float(wanted.norm()) + floor * scale * wanted.numel() ** 0.5)
        if error > allowed:
            return f"output {i} is off by {error:.1e} where rounding allows {allowed:.1e}"
    return None


def _rms(t: Tensor) -> float:
    finite = t.detach().masked_fill(~t.isfinite(), 0).double()
    return float(finite.square().mean().sqrt())
