"""Operations that only move elements: an index into the result becomes an index into the operand, and the view is gone.

Comes in: a node and an index into it. Goes out: the operand and the index there. Copies and casts between floating
dtypes are views too: a dtype is how a tensor is stored, never what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import sympy
import torch
from torch.fx import Node

from einscade.compiler.aten_facts import (
    Unraisable,
    arguments,
    is_tensor,
    op_name,
    scalar,
    shape,
    tensor_inputs,
    torch_dtype,
)
from einscade.compiler.raising_index import Extents, Index, quotient_and_rest, reshape_index, solved_digits
from einscade.ir.expr import Expr

__all__ = ["VIEWS", "is_copy", "slice_start", "view"]

_ZERO = sympy.Integer(0)
Rule = Callable[[Node, SimpleNamespace, Index, Extents], Index]


def view(node: Node, index: Index, extents: Extents) -> tuple[Node, Index] | None:
    """The operand and the index into it, if the node is a view, a copy or a cast that changes no value; else None."""
    name = op_name(node)
    if name == "getitem":
        return _piece(node, index)
    if name not in VIEWS:
        return (next(tensor_inputs(node)), index) if is_copy(node) else None
    bound = arguments(node)
    operand = bound.self
    if not is_tensor(operand):
        return None
    return operand, tuple(VIEWS[name](node, bound, index, extents))


def is_copy(node: Node) -> bool:
    """A clone, or a cast that keeps every value over the reals."""
    name = op_name(node)
    if name in _COPIES:
        return True
    if name not in _CASTS or not is_tensor(node.args[0]):
        return False
    before, after = torch_dtype(node.args[0]), torch_dtype(node)
    if before == torch.bool or after == torch.bool:
        return before == after
    return after.is_floating_point or not before.is_floating_point


_COPIES = {"aten::clone", "aten::contiguous", "aten::alias", "aten::lift_fresh", "aten::lift_fresh_copy",
           "aten::positive"}  # fmt: skip
_CASTS = {"aten::_to_copy", "aten::to", "prims::convert_element_type", "aten::type_as"}


def _reshape(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    return reshape_index(index, shape(node), shape(bound.self), extents)


def _permute(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    rank = len(index)
    result: list[Expr] = [_ZERO] * rank
    for here, there in enumerate(bound.dims):
        result[there % rank] = index[here]
    return tuple(result)


def _transpose(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    result = list(index)
    if result:
        i, j = bound.dim0 % len(result), bound.dim1 % len(result)
        result[i], result[j] = result[j], result[i]
    return tuple(result)


def _t(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    return tuple(reversed(index))


def _expand(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    return broadcast(index, shape(node), shape(bound.self))


def broadcast(index: Index, result: Index, operand: Index) -> Index:
    """The index into an operand that was broadcast to `result`."""
    skipped = len(result) - len(operand)
    return tuple(_ZERO if n == 1 and result[skipped + k] != 1 else index[skipped + k] for k, n in enumerate(operand))


def _unsqueeze(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dim = bound.dim % len(index)
    return index[:dim] + index[dim + 1 :]


def _squeeze(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    sizes = shape(bound.self)
    dims = getattr(bound, "dim", None)
    dims = range(len(sizes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(sizes) for d in dims if sizes[d] == 1} if sizes else set()
    left = iter(index)
    return tuple(_ZERO if d in gone else next(left) for d in range(len(sizes)))


def slice_start(start: Any, size: Expr) -> Expr:
    """Where a slice begins: negative starts count from the end, as in Python."""
    if start is None:
        return _ZERO
    if isinstance(start, Node):
        start = start.meta["val"]
    if isinstance(start, int):
        if start >= 0 or not size.is_Integer:
            return sympy.Integer(start) if start >= 0 else size + start
        return sympy.Integer(max(0, int(size) + start))
    hint = start.node.hint if isinstance(start, torch.SymInt) else None
    if hint is None:
        raise Unraisable("a slice starts at a number that depends on data")
    # The sign was guarded on when the graph was traced, so the hint's holds for every run of it.
    return scalar(start) if hint >= 0 else sympy.expand(size + _signed(start))


def _signed(size: torch.SymInt) -> Expr:
    return -scalar(-size)


def _slice(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dim = bound.dim % len(index)
    start = slice_start(bound.start, shape(bound.self)[dim])
    return (*index[:dim], sympy.expand(start + scalar(bound.step) * index[dim]), *index[dim + 1 :])


def _narrow(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dim = bound.dim % len(index)
    start = slice_start(bound.start, shape(bound.self)[dim])
    return (*index[:dim], sympy.expand(start + index[dim]), *index[dim + 1 :])


def _select(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dim = bound.dim % (len(index) + 1)
    return (*index[:dim], slice_start(bound.index, shape(bound.self)[dim]), *index[dim:])


def _flip(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dims = {d % len(index) for d in bound.dims}
    return tuple(n - 1 - i if d in dims else i for d, (i, n) in enumerate(zip(index, shape(node), strict=True)))


def _roll(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    sizes = shape(node)
    if not bound.dims:
        raise Unraisable(f"{node.target} over the flattened tensor")
    result = list(index)
    for shift, dim in zip(bound.shifts, bound.dims, strict=True):
        rolled = sympy.expand(index[dim] - scalar(shift))
        result[dim] = quotient_and_rest(rolled, sizes[dim], extents)[1]
    return tuple(result)


def _repeat(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    sizes = shape(bound.self)
    inner = index[len(index) - len(sizes) :]
    return tuple(quotient_and_rest(i, n, extents)[1] for i, n in zip(inner, sizes, strict=True))


def _repeat_interleave(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    if bound.dim is None or not hasattr(bound, "repeats") or is_tensor(bound.repeats):
        raise Unraisable(f"{node.target} with repeats that depend on data or without dim")
    dim = bound.dim % len(index)
    return (*index[:dim], quotient_and_rest(index[dim], scalar(bound.repeats), extents)[0], *index[dim + 1 :])


def _unfold(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    dim = bound.dimension % (len(index) - 1)
    at = sympy.expand(index[dim] * scalar(bound.step) + index[-1])
    return (*index[:dim], at, *index[dim + 1 : -1])


def _diagonal(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    rank = len(index) + 1
    first, second = bound.dim1 % rank, bound.dim2 % rank
    along, left = index[-1], iter(index[:-1])
    below, above = max(0, -bound.offset), max(0, bound.offset)
    return tuple(along + below if d == first else along + above if d == second else next(left) for d in range(rank))


def _as_strided(node: Node, bound: SimpleNamespace, index: Index, extents: Extents) -> Index:
    """Only of a tensor that is contiguous itself: then an address is a position in row-major order."""
    base = bound.self.meta["val"]
    if not base.is_contiguous():
        raise Unraisable(f"{node.target} of a tensor that is not contiguous")
    address = scalar(bound.storage_offset or 0)
    for i, stride in zip(index, bound.stride, strict=True):
        address = sympy.expand(address + i * scalar(stride))
    return solved_digits(address, shape(bound.self), extents)


VIEWS: Mapping[str, Rule] = {
    "aten::view": _reshape,
    "aten::_unsafe_view": _reshape,
    "aten::reshape": _reshape,
    "aten::_reshape_alias": _reshape,
    "aten::flatten": _reshape,
    "aten::unflatten": _reshape,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::t": _t,
    "aten::numpy_T": _t,
    "aten::expand": _expand,
    "aten::expand_as": _expand,
    "aten::unsqueeze": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::slice": _slice,
    "aten::narrow": _narrow,
    "aten::select": _select,
    "aten::flip": _flip,
    "aten::roll": _roll,
    "aten::repeat": _repeat,
    "aten::repeat_interleave": _repeat_interleave,
    "aten::unfold": _unfold,
    "aten::diagonal": _diagonal,
    "aten::as_strided": _as_strided,
}


def _piece(node: Node, index: Index) -> tuple[Node, Index] | None:
    """An item of a split, chunk or unbind."""
    whole, which = node.args
    if not isinstance(whole, Node) or not isinstance(which, int):
        return None
    name = op_name(whole)
    if name not in ("aten::split", "aten::chunk", "aten::split_with_sizes", "aten::unbind", "aten::unsafe_chunk"):
        return None
    bound = arguments(whole)
    pieces = whole.meta["val"]
    if name == "aten::unbind":
        dim = bound.dim % (len(index) + 1)
        return bound.self, (*index[:dim], sympy.Integer(which % len(pieces)), *index[dim:])
    dim = bound.dim % len(index)
    start: Expr = sympy.Add(*(scalar(pieces[k].shape[dim]) for k in range(which)))
    return bound.self, (*index[:dim], start + index[dim], *index[dim + 1 :])
