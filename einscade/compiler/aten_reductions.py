"""Raising rules of reductions, softmax and contractions: the operations that become statements with a reduction.

Comes in: a raiser, a node, an index into its result. Goes out: the scalar expression there. A dimension that was put
together inside the region (a sink appended to the scores) is reduced run by run, and the results are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from einscade.compiler.aten_facts import Unraisable, arguments, is_tensor, op_name, scalar, shape, torch_dtype
from einscade.compiler.aten_pointwise import NUMERIC, as_number, as_predicate
from einscade.compiler.aten_views import broadcast
from einscade.compiler.raising_index import Index
from einscade.ir.cascade import Reduction
from einscade.ir.expr import Access, Expr, Where

if TYPE_CHECKING:
    from einscade.compiler.raising import Raiser

__all__ = ["CHANNELS", "CONTRACTIONS", "DISTANCES", "REDUCTIONS", "SOFTMAX", "deviation", "reduction", "variance"]

Rule = Callable[["Raiser", Node, SimpleNamespace, Index], Expr]
_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)

def segments(r: Raiser, node: Node, dim: int) -> list[tuple[Expr, Expr]]:
    """Start and length of the runs of a dimension that were concatenated inside the region, in order."""

    @cache  # a chain may read each of its links twice
    def of(node: Node) -> list[tuple[Expr, Expr]]:
        size = shape(node)[dim]
        whole = [(_ZERO, size)]
        if node not in r.core:
            return whole
        name = op_name(node)
        if name == "aten::cat":
            a = arguments(node)
            if a.dim % len(shape(node)) != dim:
                return whole
            start, runs = _ZERO, []
            for part in a.tensors:
                for offset, length in of(part):
                    runs.append((start + offset, length))
                start = start + shape(part)[dim]
            return runs
        if name.removeprefix("aten::") in NUMERIC or name in _TRANSPARENT:
            for operand in node.all_input_nodes:
                alike = is_tensor(operand) and len(shape(operand)) == len(shape(node)) and shape(operand)[dim] == size
                if alike and len(found := of(operand)) > 1:
                    return found
        return whole

    return of(node)


_TRANSPARENT = {"aten::_softmax", "aten::_safe_softmax", "aten::clone", "aten::_to_copy", "aten::masked_fill",
                "aten::where", "prims::convert_element_type", "aten::_log_softmax"}  # fmt: skip


def _combine(monoid: str, values: Sequence[Expr]) -> Expr:
    combine = {"sum": sympy.Add, "prod": sympy.Mul, "max": sympy.Max, "min": sympy.Min, "any": sympy.Or,
               "all": sympy.And}  # fmt: skip
    return combine[monoid](*values)


def over(r: Raiser, node: Node, key: Any, operand: Node, dims: Sequence[int], monoid: str, kept: Index,
         value: Callable[[Index], Expr], dtype: str | None = None) -> Expr:  # fmt: skip
    """`monoid` over dimensions of an operand of `value(index into the operand)`; `kept` indexes the others."""
    sizes = shape(operand)
    others = tuple(n for d, n in enumerate(sizes) if d not in dims)
    runs = segments(r, operand, dims[0]) if len(dims) == 1 else [(_ZERO, _ONE)]

    def full(own: Index, reduced: Sequence[Expr]) -> Index:
        left, gone = iter(own), iter(reduced)
        return tuple(next(gone) if d in dims else next(left) for d in range(len(sizes)))

    if len(runs) == 1:

        def whole(i: Index) -> Expr:
            return value(full(i[: len(others)], i[len(others) :]))

        return r.reduce((node, key), node, monoid, [sizes[d] for d in dims], whole, kept, others, dtype)

    def combined(own: Index) -> tuple[Expr, None]:
        parts = []
        for k, (start, length) in enumerate(runs):
            if length == 1:
                parts.append(value(full(own, [start])))
                continue

            def run(i: Index, start: Expr = start) -> Expr:
                return value(full(i[: len(others)], [start + i[-1]]))

            parts.append(r.reduce((node, key, k), node, monoid, [length], run, own, others, dtype))
        return _combine(monoid, parts), None

    return r.define((node, key), node, kept, others, combined, dtype)


def _dims(a: SimpleNamespace, node: Node) -> list[int]:
    rank = len(shape(node))
    dims = getattr(a, "dim", None)
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims)) if rank else []


def _kept(index: Index, dims: Sequence[int], keepdim: bool) -> Index:
    return tuple(i for d, i in enumerate(index) if d not in dims) if keepdim else index


def reduction(monoid: str, prepare: Callable[[Expr], Expr] | None = None, mean: bool = False) -> Rule:
    def rule(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
        operand = a.self
        if hasattr(a, "other"):
            raise Unraisable(f"{node.target} of two tensors")
        dims = _dims(a, operand)
        if not dims:
            return r.read(operand, index)
        kept = _kept(index, dims, getattr(a, "keepdim", False))
        logical = monoid in ("any", "all")
        boolean = torch_dtype(operand) == torch.bool

        def value(at: Index) -> Expr:
            read = r.operand if operand in r.products else r.read
            expr = read(operand, at)
            expr = as_predicate(expr, boolean) if logical else as_number(expr, boolean)
            return prepare(expr) if prepare else expr

        count = sympy.Mul(*(shape(operand)[d] for d in dims))
        if node not in r.core:
            return _constant_reduction(r, node, operand, dims, kept, value, monoid, count, mean)
        result = over(r, node, "reduce", operand, dims, monoid, kept, value)
        return result / count if mean else result

    return rule


def _argmax(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """Where along a dimension the greatest element is, the first of equal ones: the one slot of a `topk`."""
    if a.dim is None:
        raise Unraisable(f"{node.target} over all dimensions")
    sizes, (dim,) = shape(a.self), _dims(a, a.self)

    def build(own: Index) -> tuple[Expr, Reduction]:
        at, names = r.fresh((node, "greatest", "reduced"), sizes[dim], keep_one=True)
        _, (slot,) = r.fresh((node, "greatest", "slot"), _ONE, keep_one=True)
        if len(names) > 1:
            raise Unraisable(f"{node.target} over a dimension in parts")
        return r.read(a.self, (*own[:dim], at, *own[dim:-1])), Reduction("topk", names, slot)

    kept = _kept(index, [dim], a.keepdim)
    return r.define((node, "greatest"), node, (*kept, _ZERO), (*sizes[:dim], *sizes[dim + 1 :], _ONE), build, "i64")


def _constant_reduction(r: Raiser, node: Node, operand: Node, dims: Sequence[int], kept: Index,
                        value: Callable[[Index], Expr], monoid: str, count: Expr, mean: bool) -> Expr:  # fmt: skip
    """A reduction on the side, where every element is one number."""
    left = iter(kept)
    at = tuple(r.fresh((node, "constant", d), n)[0] if d in dims else next(left) for d, n in enumerate(shape(operand)))
    constant = value(at)
    if constant.free_symbols or constant.has(Access):
        raise Unraisable(f"{node.target} outside the region")
    return constant * count if monoid == "sum" and not mean else constant


def softmax(r: Raiser, node: Node, operand: Node, dim: int, index: Index, result: str) -> Expr:
    """`exp(x - max) / sum`, its logarithm, or the logarithm of the sum (`result`: "softmax", "log_softmax", "sum")."""
    sizes = shape(operand)
    dim %= len(sizes)
    split = len(segments(r, operand, dim)) > 1

    def without(i: Index) -> Index:
        return i[:dim] + i[dim + 1 :]

    def x(i: Index) -> Expr:
        return r.read(operand, i) if split else r.share(operand, i)

    def greatest(kept: Index) -> Expr:
        return over(r, node, "max", operand, [dim], "max", kept, x)

    def weight(i: Index) -> Expr:
        if split or result == "sum":
            return sympy.exp(x(i) - greatest(without(i)))
        return r.define(
            (node, "weight"), node, i, sizes, lambda own: (sympy.exp(x(own) - greatest(without(own))), None)
        )

    def total(kept: Index) -> Expr:
        return over(r, node, "sum", operand, [dim], "sum", kept, weight)

    if result == "sum":
        return greatest(index) + sympy.log(total(index))
    if result == "log_softmax":
        return x(index) - greatest(without(index)) - sympy.log(total(without(index)))
    above = weight(index)
    return above / total(without(index))


def _softmax(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return softmax(r, node, a.self, a.dim, index, "softmax")


def _log_softmax(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return softmax(r, node, a.self, a.dim, index, "log_softmax")


def _logsumexp(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dims = _dims(a, a.self)
    if len(dims) != 1:
        raise Unraisable(f"{node.target} over several dimensions")
    return softmax(r, node, a.self, dims[0], _kept(index, dims, a.keepdim), "sum")


def _norm(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    order = getattr(a, "ord", getattr(a, "p", None))
    if order in (1, math.inf, -math.inf):
        return reduction({1: "sum", math.inf: "max"}.get(order, "min"), sympy.Abs)(r, node, a, index)
    if order not in (2, None):
        raise Unraisable(f"{node.target} of order {order}")
    return sympy.sqrt(reduction("sum", lambda x: x**2)(r, node, a, index))


def variance(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """The mean of squared distances from the mean, over as many elements as there are less `correction`."""
    dims = _dims(a, a.self)
    if node not in r.core or not dims:
        raise Unraisable(f"{node.target} outside the region")
    count = sympy.Mul(*(shape(a.self)[d] for d in dims))

    def mean(kept: Index) -> Expr:
        return over(r, node, "mean", a.self, dims, "sum", kept, lambda i: r.share(a.self, i)) / count

    def squared(i: Index) -> Expr:
        return (r.share(a.self, i) - mean(tuple(x for d, x in enumerate(i) if d not in dims))) ** 2

    total = over(r, node, "variance", a.self, dims, "sum", _kept(index, dims, a.keepdim), squared)
    unbiased = getattr(a, "unbiased", True)
    correction = 1 if getattr(a, "correction", None) is None else a.correction
    return total / (count - (scalar(correction) if unbiased else _ZERO))


def deviation(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return sympy.sqrt(variance(r, node, a, index))


# -- contractions --


def contract(r: Raiser, node: Node, a: Node, b: Node, index: Index, left: Callable[[Index, Expr], Index],
             right: Callable[[Index, Expr], Index], length: Expr) -> Expr:  # fmt: skip
    """`sum(k) a[left(index, k)] * b[right(index, k)]`."""

    def value(i: Index) -> Expr:
        own, k = i[:-1], i[-1]
        width = k if node in r.scores else None
        return r.operand(a, left(own, k), width) * r.operand(b, right(own, k), width)

    return r.reduce((node, "contract"), node, "sum", [length], value, index, shape(node))


def _matmul(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """mm, bmm, mv, dot and matmul: batch dimensions broadcast, vectors have no row (or column)."""
    first = a.self
    second = next(v for k, v in vars(a).items() if k in ("mat2", "other", "vec", "vec2", "tensor"))
    return _product(r, node, first, second, index)


def _product(r: Raiser, node: Node, first: Node, second: Node, index: Index) -> Expr:
    row, column = len(shape(first)) > 1, len(shape(second)) > 1
    batch = shape(node)[: len(shape(node)) - row - column]

    def at(operand: Node, i: Index) -> Index:
        own = shape(operand)[:-2]
        return broadcast(i[: len(batch)], batch, own) if own else ()

    def left(i: Index, k: Expr) -> Index:
        return (*at(first, i), i[len(batch)], k) if row else (k,)

    def right(i: Index, k: Expr) -> Index:
        return (*at(second, i), k, i[-1]) if column else (k,)

    return contract(r, node, first, second, index, left, right, shape(first)[-1])


def _add_product(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    first, second = (a.batch1, a.batch2) if hasattr(a, "batch1") else (a.mat1, a.mat2)
    product = _product(r, node, first, second, index)
    if scalar(a.beta) == 0:
        return scalar(a.alpha) * product
    added = r.read(a.self, broadcast(index, shape(node), shape(a.self)))
    return scalar(a.beta) * added + scalar(a.alpha) * product


def _convolution(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """Only where it mixes channels point by point: kernels of one point, nothing padded, every point kept."""
    size, kernel = shape(a.input), shape(a.weight)
    plain = all(n == 1 for n in (*kernel[2:], *a.stride, a.groups)) and not any((*a.padding, a.transposed))
    if not plain or len(size) != len(kernel):
        raise Unraisable(f"{node.target} over more than one point")
    points = (_ZERO,) * (len(kernel) - 2)
    product = contract(r, node, a.input, a.weight, index, lambda i, k: (i[0], k, *i[2:]),
                       lambda i, k: (i[1], k, *points), kernel[1])  # fmt: skip
    return product if a.bias is None else product + r.read(a.bias, (index[1],))


def _distance(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """`sqrt(sum(e) (x1 - x2)**2)`. Where both are one point the distance is the number 0, and has no slope, as torch
    differentiates it; the root has an infinite one."""
    if a.p != 2:
        raise Unraisable(f"{node.target} of order {a.p}")
    batch = shape(node)[:-2]

    def squared(i: Index) -> Expr:
        points = zip((a.x1, a.x2), i[-3:-1], strict=True)
        x1, x2 = (r.operand(x, (*broadcast(i[:-3], batch, shape(x)[:-2]), at, i[-1])) for x, at in points)
        return (x1 - x2) ** 2

    total = r.reduce((node, "contract"), node, "sum", [shape(a.x1)[-1]], squared, index, shape(node))
    return Where(sympy.Ne(total, 0), sympy.sqrt(total), _ZERO)


def _linear(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    product = contract(r, node, a.input, a.weight, index, lambda i, k: (*i[:-1], k), lambda i, k: (i[-1], k),
                       shape(a.input)[-1])  # fmt: skip
    return product if a.bias is None else product + r.read(a.bias, (index[-1],))


CONTRACTIONS: Mapping[str, Rule] = {
    "aten::mm": _matmul,
    "aten::bmm": _matmul,
    "aten::matmul": _matmul,
    "aten::mv": _matmul,
    "aten::dot": _matmul,
    "aten::addmm": _add_product,
    "aten::baddbmm": _add_product,
    "aten::linear": _linear,
}
"""Matrix products, which `regions_scan` takes apart into their operands."""


REDUCTIONS: Mapping[str, Rule] = {
    "aten::sum": reduction("sum"),
    "aten::mean": reduction("sum", mean=True),
    "aten::amax": reduction("max"),
    "aten::amin": reduction("min"),
    "aten::max": reduction("max"),
    "aten::min": reduction("min"),
    "aten::prod": reduction("prod"),
    "aten::any": reduction("any"),
    "aten::all": reduction("all"),
    "aten::var": variance,
    "aten::std": deviation,
    "aten::linalg_vector_norm": _norm,
    "aten::logsumexp": _logsumexp,
    "aten::argmax": _argmax,
}

DISTANCES: Mapping[str, Rule] = {"aten::_cdist_forward": _distance}
CHANNELS: Mapping[str, Rule] = {"aten::convolution": _convolution}
"""Products of channels with weights, at every point of an image."""

SOFTMAX: Mapping[str, Rule] = {
    "aten::_softmax": _softmax,
    "aten::softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_log_softmax": _log_softmax,
    "aten::log_softmax": _log_softmax,
}
