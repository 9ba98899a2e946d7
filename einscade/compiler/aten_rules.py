"""Raising rules of the ATen operations that are neither views nor (plain) pointwise.

Comes in: a raiser, a node, an index into its result. Goes out: the scalar expression there; contractions, reductions
and softmax make statements through the raiser on their way. `evaluate` is the single entry; an operation without a
rule raises `Unraisable` with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from einscade.compiler.aten_attention import SCALED_DOT_PRODUCT, scaled_dot_product
from einscade.compiler.aten_facts import Unraisable, arguments, is_tensor, op_name, scalar, shape, torch_dtype
from einscade.compiler.aten_pointwise import LOGICAL, NUMERIC, as_number, as_predicate, choose
from einscade.compiler.aten_views import broadcast, slice_start
from einscade.compiler.raising_index import Index, at_least, bounds
from einscade.ir.expr import Access, Expr, Trunc, Where, const

if TYPE_CHECKING:
    from einscade.compiler.raising import Raiser

__all__ = ["CONTRACTIONS", "REDUCTIONS", "SOFTMAX", "evaluate", "has_rule"]

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


def _pointwise(r: Raiser, node: Node, name: str, index: Index) -> Expr:
    bound = arguments(node)
    tensors = [v for v in vars(bound).values() if is_tensor(v)]
    boolean = torch_dtype(node) == torch.bool
    kinds = [torch_dtype(t) for t in tensors]
    logical = name in LOGICAL and all(k == torch.bool for k in kinds) and (boolean or name.startswith("bitwise"))
    if logical and any(not isinstance(v, bool | Node) for k, v in vars(bound).items() if k == "other"):
        logical = False
    if name.startswith("logical") and not logical:
        logical = True
    if not logical and name not in NUMERIC:
        raise Unraisable(f"{node.target} of integers")
    integral = all(not k.is_floating_point for k in kinds) and not torch_dtype(node).is_floating_point
    values: dict[str, Any] = {"integral": integral}
    for key, value in vars(bound).items():
        values[key] = _argument(r, node, value, index, logical)
    for key, default in _SCALARS.items():
        values.setdefault(key, const(default))
    if name == "mul" and node not in r.core and any(_is_fill(v) for v in values.values()):
        if any(isinstance(v, sympy.Add) for v in values.values()):
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
    if (a.p and getattr(a, "train", True)) and op_name(node) != "aten::alpha_dropout":
        raise Unraisable(f"dropout of {a.p} in training draws random numbers")
    return r.read(getattr(a, "input", None) or a.self, index)


# -- made from nothing --


def _full(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    value = {"zeros": 0, "ones": 1}.get(op_name(node).removeprefix("aten::").removesuffix("_like").removeprefix("new_"))
    if value is None:
        value = a.s if hasattr(a, "s") else a.fill_value if hasattr(a, "fill_value") else a.value
    if is_tensor(value):
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


def _index(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
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
    return r.read(a.self, tuple(full))


def _embedding(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return r.read(a.weight, (r.read(a.indices, index[:-1]), index[-1]))


def _index_select(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    return r.read(a.self, (*index[:dim], r.read(a.index, (index[dim],)), *index[dim + 1 :]))


def _gather(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    dim = a.dim % len(index)
    return r.read(a.self, (*index[:dim], r.read(a.index, index), *index[dim + 1 :]))


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
    return value


def _joined(condition: Any, a: Expr, b: Expr, boolean: bool) -> Expr:
    """`Where`, but of one value where the points that choose `a` see the same in `b` (a sequence put together again)."""
    if isinstance(condition, sympy.StrictLessThan) and condition.lhs.is_Symbol and condition.rhs == 1:
        if a == b.xreplace({condition.lhs: _ZERO}):
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
        return choose(sympy.And(*conditions), value, sympy.true if a.value else sympy.false)
    return Where(sympy.And(*conditions), value, scalar(a.value or 0))


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
    if torch_dtype(node) == torch.bool:
        return choose(condition, r.read(src, there), r.read(base, index))
    return Where(condition, r.read(src, there), r.read(base, index))


def _copy(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return r.read(a.src, broadcast(index, shape(node), shape(a.src)))


# -- reductions --


def segments(r: Raiser, node: Node, dim: int) -> list[tuple[Expr, Expr]]:
    """Start and length of the runs of a dimension that were concatenated inside the region, in order."""
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
            for offset, length in segments(r, part, dim):
                runs.append((start + offset, length))
            start = start + shape(part)[dim]
        return runs
    if name.removeprefix("aten::") in NUMERIC or name in _TRANSPARENT:
        for operand in node.all_input_nodes:
            if is_tensor(operand) and len(shape(operand)) == len(shape(node)) and shape(operand)[dim] == size:
                if len(found := segments(r, operand, dim)) > 1:
                    return found
    return whole


_TRANSPARENT = {"aten::_softmax", "aten::_safe_softmax", "aten::clone", "aten::_to_copy", "aten::masked_fill",
                "aten::where", "prims::convert_element_type", "aten::_log_softmax"}  # fmt: skip


def _combine(monoid: str, values: Sequence[Expr]) -> Expr:
    combine = {"sum": sympy.Add, "prod": sympy.Mul, "max": sympy.Max, "min": sympy.Min, "any": sympy.Or,
               "all": sympy.And}  # fmt: skip
    return combine[monoid](*values)


def over(r: Raiser, node: Node, key: Any, operand: Node, dims: Sequence[int], monoid: str, kept: Index,
         value: Callable[[Index], Expr], dtype: str | None = None) -> Expr:  # fmt: skip
    """`monoid` over dimensions of an operand of `value(index into the operand)`; `kept` indexes the other dimensions."""
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


def _reduction(monoid: str, prepare: Callable[[Expr], Expr] | None = None, mean: bool = False) -> Rule:
    def rule(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
        operand = a.self
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


def _constant_reduction(r: Raiser, node: Node, operand: Node, dims: Sequence[int], kept: Index,
                        value: Callable[[Index], Expr], monoid: str, count: Expr, mean: bool) -> Expr:  # fmt: skip
    """A reduction on the side, where every element is one number."""
    left = iter(kept)
    at = tuple(r.fresh((node, "constant", d), n)[0] if d in dims else next(left) for d, n in enumerate(shape(operand)))
    constant = value(at)
    if constant.free_symbols or constant.has(Access):
        raise Unraisable(f"{node.target} outside the region")
    return constant * count if monoid == "sum" and not mean else constant


def _max_dim(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    raise Unraisable(f"{node.target} gives values and indices")


def _cumsum(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    """Only of a constant: a running count of nothing, or a position."""
    dim = a.dim % len(index)
    here = r.fresh((node, "constant"), shape(a.self)[dim])[0]
    value = as_number(r.read(a.self, (*index[:dim], here, *index[dim + 1 :])), torch_dtype(a.self) == torch.bool)
    if value.free_symbols or value.has(Access):
        raise Unraisable(f"{node.target} is a scan")
    return value * (index[dim] + 1)


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
    if order not in (2, 2.0, None):
        raise Unraisable(f"{node.target} of order {order}")
    return sympy.sqrt(_reduction("sum", lambda x: x**2)(r, node, a, index))


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


def _linear(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    product = contract(r, node, a.input, a.weight, index, lambda i, k: (*i[:-1], k), lambda i, k: (i[-1], k),
                       shape(a.input)[-1])  # fmt: skip
    return product if a.bias is None else product + r.read(a.bias, (index[-1],))


def _item(r: Raiser, node: Node, index: Index) -> Expr:
    whole, which = node.args
    assert isinstance(whole, Node)
    name = op_name(whole)
    if which == 0 and name in SCALED_DOT_PRODUCT:
        return scaled_dot_product(r, whole, index)
    if which == 0 and name == "aten::native_dropout":
        return _dropout(r, whole, arguments(whole), index)
    if which == 0 and name in ("aten::max", "aten::min") and whole in r.core:
        return _reduction(name.removeprefix("aten::"))(r, node, arguments(whole), index)
    raise Unraisable(f"{whole.target}, result {which}, has no rule")


def _attention(r: Raiser, node: Node, a: SimpleNamespace, index: Index) -> Expr:
    return scaled_dot_product(r, node, index)


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

REDUCTIONS: Mapping[str, Rule] = {
    "aten::sum": _reduction("sum"),
    "aten::mean": _reduction("sum", mean=True),
    "aten::amax": _reduction("max"),
    "aten::amin": _reduction("min"),
    "aten::max": _reduction("max"),
    "aten::min": _reduction("min"),
    "aten::prod": _reduction("prod"),
    "aten::any": _reduction("any"),
    "aten::all": _reduction("all"),
    "aten::linalg_vector_norm": _norm,
    "aten::logsumexp": _logsumexp,
}

SOFTMAX: Mapping[str, Rule] = {
    "aten::_softmax": _softmax,
    "aten::softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_log_softmax": _log_softmax,
    "aten::log_softmax": _log_softmax,
}

RULES: Mapping[str, Rule] = {
    **CONTRACTIONS,
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
    "aten::bernoulli": _dropout,
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
    "aten::slice_scatter": _slice_scatter,
    "aten::select_scatter": _select_scatter,
    "aten::copy": _copy,
    "aten::cumsum": _cumsum,
}
