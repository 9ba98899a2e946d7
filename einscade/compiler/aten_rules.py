"""Raising rules of ATen operations: masks, casts, gathers, factories, and what puts tensors together.

Comes in: a raiser, a node, an index into its result. Goes out: the scalar expression there. `evaluate` is the single
entry; an operation without a rule raises `Unraisable` with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from einscade.compiler.aten_attention import SCALED_DOT_PRODUCT, scaled_dot_product
from einscade.compiler.aten_facts import Unraisable, arguments, is_tensor, op_name, scalar, shape, torch_dtype
from einscade.compiler.aten_pointwise import LOGICAL, NUMERIC, as_number, as_predicate, choose
from einscade.compiler.aten_reductions import (
    CHANNELS,
    CONTRACTIONS,
    DISTANCES,
    REDUCTIONS,
    SOFTMAX,
    deviation,
    reduction,
    variance,
)
from einscade.compiler.aten_views import broadcast, slice_start
from einscade.compiler.raising_index import Index, at_least, bounds
from einscade.ir.expr import Access, Expr, Trunc, Where, const

if TYPE_CHECKING:
    from einscade.compiler.raising import Raiser

__all__ = ["evaluate", "gathered", "has_rule"]

Rule = Callable[["Raiser", Node, SimpleNamespace, Index], Expr]
_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)


def has_rule(name: str) -> bool:
    return name in RULES or name.removeprefix("aten::").rstrip("_") in NUMERIC.keys() | LOGICAL.keys()


def evaluate(r: Raiser, node: Node, index: Index) -> Expr:
    """The value of a node at an index; `Unraisable` names an operation that has no rule."""
    name = op_name(node)
    if name == "getitem":
        return _item(r, node, index)
    if rule := RULES.get(name):
        return rule(r, node, arguments(node), index)
    short = name.removeprefix("aten::")
    if short in NUMERIC or short in LOGICAL:
        return _pointwise(r, node, short, index)
    raise Unraisable(f"{node.target if name else node.op} has no rule")


# -- pointwise --

_SCALARS = {"alpha": 1, "beta": 1}


def _pointwise(r: Raiser, operation: Node, name: str, index: Index, result: Node | None = None) -> Expr:
    """`result` is the node with the value, where the operation has several."""
    node = result or operation
    bound = arguments(operation)
    tensors = [v for v in vars(bound).values() if is_tensor(v)]
    boolean = torch_dtype(node) == torch.bool
    kinds = [torch_dtype(t) for t in tensors]
    logical = name in LOGICAL and all(k == torch.bool for k in kinds) and (boolean or name.startswith("bitwise"))
    if logical and any(not isinstance(v, bool | Node) for k, v in vars(bound).items() if k == "other"):
        logical = False
    logical = logical or name.startswith("logical")
    if not logical and name not in NUMERIC:
        raise Unraisable(f"{node.target} of integers")
    integral = all(not k.is_floating_point for k in kinds) and not torch_dtype(node).is_floating_point
    values: dict[str, Any] = {"integral": integral}
    for key, value in vars(bound).items():
        values[key] = _argument(r, node, value, index, logical)
    for key, default in _SCALARS.items():
        values.setdefault(key, const(default))
    operands = list(values.values())
    sums = any(isinstance(v, sympy.Add) for v in operands)
    if name == "mul" and node not in r.core and sums and any(map(_is_fill, operands)):
        # (1 - x) * -1e9 must not become -1e9 + 1e9 * x, which loses every score it is added to.
        raise Unraisable(f"{node.target} by a very large number on the side")
    return _lifted(LOGICAL[name] if logical else NUMERIC[name], SimpleNamespace(**values))


def _is_fill(value: Any) -> bool:
    return isinstance(value, sympy.Expr) and value.is_number and bool(abs(value) > 100)


def _argument(r: Raiser, node: Node, value: Any, index: Index, logical: bool) -> Any:
    if is_tensor(value):
        at = broadcast(index, shape(node), shape(value))
        expr = r.operand(value, at) if node in r.products else r.read(value, at)
        boolean = torch_dtype(value) == torch.bool
        return as_predicate(expr, boolean) if logical else as_number(expr, boolean)
    if isinstance(value, bool):
        return sympy.true if value and logical else sympy.false if logical else const(int(value))
    if isinstance(value, int | float | Node | torch.SymInt):
        return r.number(value)
    return value


def _lifted(function: Callable[[SimpleNamespace], Any], a: SimpleNamespace) -> Any:
    """`f(Where(c, 1, 0), 2)` is `Where(c, f(1, 2), f(0, 2))`: masks stay one choice of two numbers."""
    chosen = [(k, v) for k, v in vars(a).items() if isinstance(v, Where)]
    if len(chosen) != 1 or not all(branch.is_number for branch in chosen[0][1].args[1:]):
        return function(a)
    key, where = chosen[0]
    if any(isinstance(v, sympy.Basic) and v.has(Access, sympy.Symbol) for k, v in vars(a).items() if k != key):
        return function(a)
    yes, no = (function(SimpleNamespace(**{**vars(a), key: branch})) for branch in where.args[1:])
    if yes == no:
        return yes
    if isinstance(yes, sympy.logic.boolalg.BooleanAtom):
        return choose(where.args[0], yes, no)
    return Where(where.args[0], yes, no)


def _where(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    condition = _predicate(r, node, a.condition, index)
    if not hasattr(a, "self"):
        raise Unraisable("aten::where with one argument")
    if torch_dtype(node) == torch.bool:
        return choose(condition, _predicate(r, node, a.self, index), _predicate(r, node, a.other, index))
    return Where(condition, _number(r, node, a.self, index), _number(r, node, a.other, index))


def _number(r: Raiser, node: Node, value: Any, index: Index) -> Expr:
    return _argument(r, node, value, index, logical=False)


def _predicate(r: Raiser, node: Node, value: Any, index: Index) -> Any:
    return _argument(r, node, value, index, logical=True)


def _masked_fill(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    condition = _predicate(r, node, a.mask, index)
    if torch_dtype(node) == torch.bool:
        return choose(condition, _predicate(r, node, a.value, index), _predicate(r, node, a.self, index))
    return Where(condition, _number(r, node, a.value, index), _number(r, node, a.self, index))


def _cast(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """The casts that change a value: to booleans, from booleans, and from reals to integers."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    before, after = torch_dtype(operand), torch_dtype(node)
    value = r.read(operand, index)
    if after == torch.bool:
        return as_predicate(value, before == torch.bool)
    if before == torch.bool:
        return as_number(value, boolean=True)
    if value.is_integer:
        return value
    if node not in r.core:
        # A bucket computed in float32 may round differently in another order of operations, so it stays as it is.
        raise Unraisable(f"{node.target} from reals to integers on the side")
    return Trunc(value)


def _dropout(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    if a.p and a.train is not False:
        raise Unraisable(f"dropout of {a.p} in training draws random numbers")
    return r.read(a.input, index)


def _detach(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """A value that gradients stop at has a statement of its own (`raise_region` asks whether anything feels that); what
    the region reads is read behind it."""
    return r.define((node, "detached"), node, index, shape(node), lambda own: (r.read(a.self, own), None))


def _bernoulli(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    raise Unraisable(f"{node.target} draws random numbers")


# -- made from nothing --


def _full(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    value = {"zeros": 0, "ones": 1}.get(op_name(node).removeprefix("aten::").removesuffix("_like").removeprefix("new_"))
    if value is None:
        value = a.s if hasattr(a, "s") else a.fill_value if hasattr(a, "fill_value") else a.value
    if isinstance(value, Node) and is_tensor(value):
        return r.read(value, ())
    number = scalar(value)
    return sympy.true if number and torch_dtype(node) == torch.bool else (
        sympy.false if torch_dtype(node) == torch.bool else number)  # fmt: skip


def _arange(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    start = getattr(a, "start", None)
    step = getattr(a, "step", None)
    return scalar(0 if start is None else start) + scalar(1 if step is None else step) * index[0]


def _triangle(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    row, column = index[-2], index[-1]
    k = scalar(a.diagonal)
    kept = sympy.Le(column, row + k) if op_name(node) == "aten::tril" else sympy.Ge(column, row + k)
    if torch_dtype(node) == torch.bool:
        return sympy.And(kept, r.read(a.self, index))
    return Where(kept, r.read(a.self, index), _ZERO)


def _eye(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    same = sympy.Eq(index[0], index[1])
    return same if torch_dtype(node) == torch.bool else Where(same, _ONE, _ZERO)


# -- gathers --


def _wrapped(r: Raiser, value: Expr, size: Expr) -> Expr:
    """An index that may count from the end, as one that does not."""
    low, high = bounds(value, r.extents)
    if (low is not None and at_least(low)) or value.is_nonnegative:
        return value
    if high is not None and at_least(-1 - high):
        return value + size
    return Where(value < 0, value + size, value)


def gathered(r: Raiser, node: Node, index: Index) -> tuple[Node, Index] | None:
    """Where an operation that gathers whole blocks (pages of keys, not rows of a table) reads an element from, and at
    which index there; None for any other operation. Raises Unraisable where the index cannot be computed."""
    if op_name(node) != "aten::index":
        return None
    a = arguments(node)
    left = len(shape(a.self)) - sum(p is not None for p in a.indices)
    return (a.self, _indexed(r, node, a, index)) if left >= 2 else None


def _index(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return r.read(a.self, _indexed(r, node, a, index))


def _indexed(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Index:
    """The index into the tensor that is indexed by tensors."""
    picks = list(a.indices) + [None] * (len(shape(a.self)) - len(a.indices))
    chosen = [d for d, p in enumerate(picks) if p is not None]
    if any(torch_dtype(p) == torch.bool for p in picks if p is not None):
        raise Unraisable(f"{node.target} by a boolean mask")
    together = max((len(shape(picks[d])) for d in chosen), default=0)
    adjacent = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    place = chosen[0] if adjacent else 0
    block, rest = index[place : place + together], iter(index[:place] + index[place + together :])
    block_shape = shape(node)[place : place + together]
    full: list[Expr] = []
    for d, size in enumerate(shape(a.self)):
        pick = picks[d]
        if pick is None:
            full.append(next(rest))
            continue
        at = r.read(pick, broadcast(block, block_shape, shape(pick)))
        full.append(at if r.nonnegative(pick) else _wrapped(r, at, size))
    return tuple(full)


def _embedding(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return r.read(a.weight, (r.read(a.indices, index[:-1]), index[-1]))


def _index_select(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    return r.read(a.self, (*index[:dim], r.read(a.index, (index[dim],)), *index[dim + 1 :]))


def _gather(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    return r.read(a.self, (*index[:dim], r.read(a.index, index), *index[dim + 1 :]))


# -- scans --


def _cumsum(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """Only of a constant: a running count of nothing, or a position."""
    dim = a.dim % len(index)
    here = r.fresh((node, "constant"), shape(a.self)[dim])[0]
    value = as_number(r.read(a.self, (*index[:dim], here, *index[dim + 1 :])), torch_dtype(a.self) == torch.bool)
    if value.free_symbols or value.has(Access):
        raise Unraisable(f"{node.target} is a scan")
    return value * (index[dim] + 1)


# -- pieces put together --


def _within(r: Raiser, at: Expr, size: Expr) -> bool | None:
    """Whether `0 <= at < size` for every point; None where it depends on the point."""
    low, high = bounds(at, r.extents)
    if low is not None and high is not None and at_least(low) and at_least(sympy.expand(size - 1 - high)):
        return True
    if (low is not None and at_least(sympy.expand(low - size))) or (high is not None and at_least(-1 - high)):
        return False
    return None


def _cat(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    parts = [t for t in a.tensors if shape(t) != (_ZERO,)]
    dim = a.dim % len(index)
    start: Expr = _ZERO
    found: list[tuple[Expr, Expr]] = []
    for part in parts:
        at, size = sympy.expand(index[dim] - start), shape(part)[dim]
        inside = _within(r, at, size)
        if inside is True:
            return r.share(part, (*index[:dim], at, *index[dim + 1 :]))
        if inside is None:
            found.append((sympy.Lt(index[dim], start + size), r.read(part, (*index[:dim], at, *index[dim + 1 :]))))
        start = start + size
    value = found[-1][1]
    for condition, part_value in reversed(found[:-1]):
        value = _joined(condition, part_value, value, torch_dtype(node) == torch.bool)
    return value if len(found) == 1 else _of_pieces(r, node, value)


def _of_pieces(r: Raiser, node: Node, value: Expr) -> Expr:
    """What depends on the piece that an index falls in. Outside the region, pieces that are tensors are read as they
    were put together: every read is then of an element that exists, whichever piece is chosen."""
    if node not in r.core and value.has(Access):
        raise Unraisable(f"{node.target} of tensors on the side")
    return value


def _joined(condition: Any, a: Expr, b: Expr, boolean: bool) -> Expr:
    """`Where`, but of one value if the points that choose `a` see the same in `b` (a sequence put together again)."""
    only_first = isinstance(condition, sympy.StrictLessThan) and condition.lhs.is_Symbol and condition.rhs == 1
    if only_first and a == b.xreplace({condition.lhs: _ZERO}):
        return b
    return choose(condition, a, b) if boolean else Where(condition, a, b)


def _pad(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    inner = list(index)
    conditions: list[Any] = []
    for k in range(len(a.pad) // 2):
        d = len(index) - 1 - k
        before, after = a.pad[2 * k], a.pad[2 * k + 1]
        size = shape(a.self)[d]
        inner[d] = sympy.expand(index[d] - scalar(before))
        inside = _within(r, inner[d], size)
        if inside is False:
            return _number(r, node, a.value, index) if torch_dtype(node) != torch.bool else as_predicate(a.value, True)
        if inside is None:
            if before != 0:
                conditions.append(sympy.Ge(inner[d], 0))
            if after != 0:
                conditions.append(sympy.Lt(inner[d], size))
    value = r.read(a.self, tuple(inner))
    if not conditions:
        return value
    if torch_dtype(node) == torch.bool:
        padded = choose(sympy.And(*conditions), value, sympy.true if a.value else sympy.false)
    else:
        padded = Where(sympy.And(*conditions), value, scalar(a.value or 0))
    return _of_pieces(r, node, padded)


def _scatter(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """One element along a dimension replaced, at a place that data says: zeros and a 1 are a one-hot code."""
    dim = a.dim % len(index)
    once = (*shape(node)[:dim], _ONE, *shape(node)[dim + 1 :])
    new = a.value if hasattr(a, "value") else a.src
    if shape(a.index) != once or (is_tensor(new) and shape(new) != once) or hasattr(a, "reduce"):
        raise Unraisable(f"{node.target} of more than one element along its dimension")
    chosen = sympy.Eq(r.read(a.index, (*index[:dim], _ZERO, *index[dim + 1 :])), index[dim])
    if torch_dtype(node) == torch.bool:
        return choose(chosen, _predicate(r, node, new, index), _predicate(r, node, a.self, index))
    return Where(chosen, _number(r, node, new, index), _number(r, node, a.self, index))


def _slice_scatter(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    start, step = slice_start(a.start, shape(a.self)[dim]), scalar(a.step)
    at = sympy.expand(index[dim] - start)
    if step != 1:
        raise Unraisable(f"{node.target} with a step")
    size = shape(a.src)[dim]
    return _overlaid(r, node, a.self, index, a.src, (*index[:dim], at, *index[dim + 1 :]), at, size)


def _select_scatter(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    at = sympy.expand(index[dim] - slice_start(a.index, shape(a.self)[dim]))
    return _overlaid(r, node, a.self, index, a.src, index[:dim] + index[dim + 1 :], at, _ONE)


def _overlaid(r: Raiser, node: Node, base: Node, index: Index, src: Node, there: Index, at: Expr, size: Expr) -> Expr:
    inside = _within(r, at, size)
    if inside is not None:
        return r.read(src, there) if inside else r.read(base, index)
    condition = sympy.And(sympy.Ge(at, 0), sympy.Lt(at, size))
    return _of_pieces(r, node, _chosen(r, node, condition, r.read(src, there), r.read(base, index)))


def _diagonal_scatter(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    rows, columns = a.dim1 % len(index), a.dim2 % len(index)
    row, column = index[rows], index[columns]
    other = tuple(i for d, i in enumerate(index) if d not in (rows, columns))
    there = (*other, row if a.offset >= 0 else column)
    return _chosen(r, node, sympy.Eq(column, row + a.offset), r.read(a.src, there), r.read(a.self, index))


def _index_put(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """One number where a boolean mask says so: what `masked_fill` does."""
    picks = [(d, p) for d, p in enumerate(a.indices) if p is not None]
    if len(picks) != 1 or torch_dtype(picks[0][1]) != torch.bool or a.accumulate:
        raise Unraisable(f"{node.target} at places that are no boolean mask")
    if any(n != 1 for n in shape(a.values)):
        raise Unraisable(f"{node.target} of more than one number")
    ((first, mask),) = picks
    condition = r.read(mask, index[first : first + len(shape(mask))])
    return _chosen(r, node, condition, r.read(a.values, (_ZERO,) * len(shape(a.values))), r.read(a.self, index))


def _chosen(r: Raiser, node: Node, condition: Any, a: Expr, b: Expr) -> Expr:
    return choose(condition, a, b) if torch_dtype(node) == torch.bool else Where(condition, a, b)


def _copy(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return r.read(a.src, broadcast(index, shape(node), shape(a.src)))


def _item(r: Raiser, node: Node, index: Index) -> Expr:
    whole, which = node.args
    assert isinstance(whole, Node)
    name = op_name(whole)
    if which == 0 and name in SCALED_DOT_PRODUCT:
        return scaled_dot_product(r, whole, index)
    if which == 0 and name == "aten::native_dropout":
        return _dropout(r, whole, arguments(whole), index)
    if which == 0 and name in ("aten::max", "aten::min") and whole in r.core:
        return reduction(name.removeprefix("aten::"))(r, node, arguments(whole), index)
    if which == 1 and name == "aten::max":
        return RULES["aten::argmax"](r, node, arguments(whole), index)
    if name in ("aten::var_mean", "aten::std_mean"):
        spread = variance if name == "aten::var_mean" else deviation
        return (reduction("sum", mean=True) if which else spread)(r, node, arguments(whole), index)
    short = name.removeprefix("aten::")
    if which == 0 and short in NUMERIC:
        return _pointwise(r, whole, short, index, node)
    raise Unraisable(f"{whole.target}, result {which}, has no rule")


def _attention(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return scaled_dot_product(r, node, index)


RULES: Mapping[str, Rule] = {
    **CONTRACTIONS,
    **CHANNELS,
    **DISTANCES,
    **REDUCTIONS,
    **SOFTMAX,
    **dict.fromkeys(SCALED_DOT_PRODUCT, _attention),
    "aten::where": _where,
    "aten::masked_fill": _masked_fill,
    "aten::_to_copy": _cast,
    "aten::to": _cast,
    "prims::convert_element_type": _cast,
    "aten::dropout": _dropout,
    "aten::native_dropout": _dropout,
    "aten::bernoulli": _bernoulli,
    "aten::detach": _detach,
    "aten::full": _full,
    "aten::zeros": _full,
    "aten::ones": _full,
    "aten::full_like": _full,
    "aten::zeros_like": _full,
    "aten::ones_like": _full,
    "aten::new_full": _full,
    "aten::new_zeros": _full,
    "aten::new_ones": _full,
    "aten::scalar_tensor": _full,
    "aten::fill": _full,
    "aten::arange": _arange,
    "prims::iota": _arange,
    "aten::tril": _triangle,
    "aten::triu": _triangle,
    "aten::eye": _eye,
    "aten::index": _index,
    "aten::embedding": _embedding,
    "aten::index_select": _index_select,
    "aten::gather": _gather,
    "aten::cat": _cat,
    "aten::constant_pad_nd": _pad,
    "aten::scatter": _scatter,
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
    "aten::diagonal_scatter": _diagonal_scatter,
    "aten::index_put": _index_put,
    "aten::copy": _copy,
    "aten::cumsum": _cumsum,
}
