"""What a known tensor is, as an expression of its index: one number, an arithmetic sequence, a band, equal blocks.

Comes in: the value of a buffer and an index into it. Goes out: the expression, checked against every element, or None.
So a causal mask kept as a buffer is `m <= p`, as if it had been computed in place.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from einscade.compiler.raising_index import Index
from einscade.ir.expr import Expr, Where, const

__all__ = ["least_is_nonnegative", "recognise"]

_LARGEST = 1 << 26  # elements; a larger buffer is not looked at
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def recognise(value: Tensor, index: Index) -> Expr | None:
    """The expression of a known tensor at an index, if it is one of the forms above in its last two dimensions."""
    version = None if value.is_inference() else value._version  # a buffer that was written to is another value
    known = _KNOWN.get(value)
    if known is None or known[0] != version:
        known = _KNOWN[value] = (version, _form(value.detach()))
    form = known[1]
    return None if form is None else form(index)


def least_is_nonnegative(value: Tensor) -> bool:
    """Whether no element of a known tensor of integers is negative."""
    if value.dtype.is_floating_point or value.dtype == torch.bool or value.numel() > _LARGEST:
        return False
    return value.device.type != "meta" and value.numel() > 0 and int(value.min()) >= 0


def _form(value: Tensor) -> Callable[[Index], Expr] | None:
    if value.is_complex() or not 0 < value.numel() <= _LARGEST or value.device.type == "meta":
        return None
    value = value.cpu()
    for d, n in enumerate(value.shape):
        if n > 1 and bool((value == value.narrow(d, 0, 1)).all()):
            value = value.narrow(d, 0, 1)
    varying = [d for d, n in enumerate(value.shape) if n > 1]
    first = value.flatten()[0].item()
    if not varying:
        return lambda index: const(first)
    plain = value.squeeze()
    if len(varying) == 1:
        return _sequence(plain, varying[0]) or _blocks(plain, varying[0])
    if len(varying) == 2:
        return _band(plain, *varying)
    return None


def _sequence(value: Tensor, d: int) -> Callable[[Index], Expr] | None:
    if value.dtype == torch.bool or not value.double().isfinite().all():
        return None
    start, step = value[0].item(), (value[1] - value[0]).item()
    line = torch.arange(len(value), dtype=torch.float64) * step + start
    if not bool((value.double() == line).all()):
        return None
    return lambda index: const(start) + const(step) * index[d]


def _blocks(value: Tensor, d: int) -> Callable[[Index], Expr] | None:
    """Two values, the first up to a position."""
    changes = (value[1:] != value[:-1]).nonzero().flatten()
    if len(changes) != 1:
        return None
    at, before, after = int(changes[0]) + 1, value[0].item(), value[-1].item()
    return lambda index: _two(index[d] < at, before, after)


def _band(value: Tensor, row: int, column: int) -> Callable[[Index], Expr] | None:
    """Two values: one where `low <= column - row <= high`, the other elsewhere."""
    n, m = value.shape
    offset = torch.arange(m)[None, :] - torch.arange(n)[:, None]
    corner = value[0, -1]
    for outside in (corner, value[-1, 0]):
        inside = value != outside
        if not bool(inside.any()):
            continue
        low, high = int(offset[inside].min()), int(offset[inside].max())
        chosen = value[inside][0]
        expected = torch.where((offset >= low) & (offset <= high), chosen, outside)
        if not bool((value == expected).all()):
            continue

        def form(index: Index, low: int = low, high: int = high, a: Tensor = chosen, b: Tensor = outside) -> Expr:
            conditions = []
            if high < m - 1:
                conditions.append(sympy.Le(index[column], index[row] + high))
            if low > -(n - 1):
                conditions.append(sympy.Ge(index[column], index[row] + low))
            return _two(sympy.And(*conditions), a.item(), b.item())

        return form
    return None


def _two(condition: sympy.logic.boolalg.Boolean, a: float | bool, b: float | bool) -> Expr:
    if isinstance(a, bool):
        return condition if a else sympy.Not(condition)
    return Where(condition, const(a), const(b))
