"""The reference interpreter: runs any verified cascade in float64, slow and obvious. The oracle of every other layer.

Comes in: a `Cascade`, a torch tensor per input, integers for the symbols that no input shape fixes. Goes out: a dict
of the cascade's outputs (float64, or int64 and bool where the cascade computes integers and booleans).

Every Einsum is evaluated on the grid of its iteration space by broadcasting, large grids in slices along one output
rank. A value travels with two masks: `exists`, and `outside`, where an access left its tensor (it then reads the
nearest element). A point that exists and read outside is an error of the cascade. See `cascade` for the semantics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or
from torch import Tensor

from einscade.ir.cascade import MONOIDS, Cascade, Einsum
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Round, Trunc, Where, free_vars
from einscade.ir.verify import CascadeError, verify

__all__ = ["OPERATIONS", "extents", "infer_sizes", "interpret"]

# Points of one slice of a grid: 32 MiB for each temporary of doubles.
GRID_POINTS = 1 << 22


def interpret(
    cascade: Cascade, inputs: Mapping[str, Tensor], sizes: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """The cascade's outputs for these inputs, computed over the reals (float64; integers and booleans exactly).

    `inputs` maps every input's name to a tensor of any strides; `sizes` gives the symbols that are no input's whole
    extent (tile sizes, windows). Missing points of an output are 0 (False).

    Raises `ValueError` where inputs or sizes are missing or contradict each other, `CascadeError` where the cascade
    is not verified, or an existing point reads outside a tensor.
    """
    verify(cascade)
    sizes = infer_sizes(cascade, {name: tuple(t.shape) for name, t in inputs.items()}, sizes)
    lengths = extents(cascade, sizes)
    stored = {t.name: _Value(_real(inputs[t.name], t.name, t.dtype)) for t in cascade.inputs}
    device = next((v.data.device for v in stored.values()), torch.device("cpu"))
    for statement in cascade.body:
        value = _Statement(statement, stored, sizes, lengths, device).run()
        stored[statement.name] = replace(value, made_by=statement if statement.scan else None)
    return {name: stored[name].or_zero() for name in cascade.outputs}


def infer_sizes(
    cascade: Cascade, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The value of every symbol, from `sizes` and from input shapes where an extent is a bare symbol.

    Raises `ValueError` where an input is missing or unknown, has the wrong number of dimensions, contradicts another
    one or the rank table, or where a symbol stays open.
    """
    known = {name: int(size) for name, size in (sizes or {}).items()}
    source = dict.fromkeys(known, "sizes")
    if unknown := set(known) - set(cascade.symbols):
        raise ValueError(f"sizes: cascade {cascade.name} has no symbol {', '.join(sorted(unknown))}")
    names = [t.name for t in cascade.inputs]
    if set(names) != set(shapes):
        missing, extra = sorted(set(names) - set(shapes)), sorted(set(shapes) - set(names))
        raise ValueError(f"inputs of cascade {cascade.name} are {names}; missing: {missing}, unknown: {extra}")
    dims = [(t, axis, rank, cascade.extent(rank)) for t in cascade.inputs for axis, rank in enumerate(t.ranks)]
    for t in cascade.inputs:
        if len(shapes[t.name]) != len(t.ranks):
            raise ValueError(f"input {t.name} has shape {shapes[t.name]}, its ranks are [{','.join(t.ranks)}]")
    for t, axis, rank, extent in dims:
        if extent.is_Symbol and extent.name not in known:
            known[extent.name] = shapes[t.name][axis]
            source[extent.name] = f"rank {rank} of input {t.name}"
    if missing := [s for s in cascade.symbols if s not in known]:
        raise ValueError(f"no input's shape gives {', '.join(missing)}; pass sizes={{{missing[0]!r}: ...}}")
    for t, axis, rank, extent in dims:
        expected, actual = _integer(extent, known), shapes[t.name][axis]
        if actual != expected:
            because = ", ".join(f"{s}={known[s]} from {source[s]}" for s in sorted(free_vars(extent)))
            raise ValueError(
                f"input {t.name}, rank {rank} (dimension {axis}): size {actual}, expected {extent} = {expected}"
                + (f" ({because})" if because else "")
            )
    return known


def extents(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, int]:
    """The length of every rank once the symbols have values."""
    lengths = {r.name: _integer(r.extent, sizes) for r in cascade.ranks}
    if negative := [r for r, n in lengths.items() if n < 0]:
        raise ValueError(f"rank {negative[0]} of cascade {cascade.name} has extent {lengths[negative[0]]} for {sizes}")
    return lengths


def _integer(extent: Expr, sizes: Mapping[str, int]) -> int:
    return int(extent.xreplace({s: sympy.Integer(sizes[s.name]) for s in extent.free_symbols}))


def _real(tensor: Tensor, name: str, dtype: str) -> Tensor:
    """The input in the interpreter's arithmetic, checked against what the cascade says it holds."""
    kind = "bool" if tensor.dtype == torch.bool else "float" if tensor.dtype.is_floating_point else "int"
    declared = "bool" if dtype == "bool" else "int" if dtype[0] in "iu" else "float"
    if tensor.dtype.is_complex or kind != declared:
        raise ValueError(f"input {name} is {tensor.dtype}, the cascade declares it {dtype}")
    return tensor.detach().to({"float": torch.float64, "int": torch.int64, "bool": torch.bool}[kind])


@dataclass(frozen=True)
class _Value:
    """Data with its masks, each broadcastable to the grid it belongs to. None: exists everywhere, outside nowhere.
    `row` is the part of `exists` that is free of the statement's reduced ranks: it says whether the output exists.
    `made_by` is the statement of a stored scan, whose value before its first step is its initial value."""

    data: Tensor
    exists: Tensor | None = None
    outside: Tensor | None = None
    row: Tensor | None = None
    made_by: Einsum | None = None

    def or_zero(self) -> Tensor:
        return self.data if self.exists is None else self.data.masked_fill(~self.exists, 0)

    def there(self) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=self.data.device) if self.exists is None else self.exists

    def left(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=self.data.device) if self.outside is None else self.outside


def _both(*masks: Tensor | None) -> Tensor | None:
    """And of masks, None being all true."""
    result = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else result & mask
    return result


def _either(*masks: Tensor | None) -> Tensor | None:
    """Or of masks, None being all false."""
    result = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else result | mask
    return result


class _Statement:
    """One Einsum at given sizes: `run` gives its stored output."""

    def __init__(
        self,
        einsum: Einsum,
        stored: Mapping[str, _Value],
        sizes: Mapping[str, int],
        lengths: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self.einsum, self.stored, self.sizes, self.lengths, self.device = einsum, stored, sizes, lengths, device
        slot = einsum.reduce.slot if einsum.reduce else None
        self.kept = tuple(r for r in einsum.output.ranks if r != slot)
        self.axes = {rank: axis for axis, rank in enumerate(einsum.ranks)}
        self.reduced = frozenset(einsum.reduce.ranks if einsum.reduce else ())
        self.at: dict[str, range] = {}  # the slice of each rank now being evaluated
        self.previous: _Value | None = None  # a scan's output at the step before

    def run(self) -> _Value:
        scan = self.einsum.scan
        self.at = {r: range(self.lengths[r]) for r in self.axes}
        if scan is None:
            return self.sliced(None)
        steps = []
        for t in range(self.lengths[scan.rank]):
            self.at[scan.rank] = range(t, t + 1)
            step = self.sliced(scan.rank)
            steps.append(step)
            self.previous = step
        axis = self.einsum.output.ranks.index(scan.rank)
        return self.join(steps, axis) if steps else self.empty()

    def sliced(self, fixed: str | None) -> _Value:
        """The output on the present slices, computed along the longest output rank in parts that fit."""
        points = prod(len(self.at[r]) for r in self.axes)
        ranks = [r for r in self.kept if r != fixed]
        if points <= GRID_POINTS or not ranks:
            return self.part()
        rank = max(ranks, key=lambda r: len(self.at[r]))
        whole = self.at[rank]
        step = max(1, GRID_POINTS * len(whole) // points)
        parts = []
        for start in range(0, len(whole), step):
            self.at[rank] = whole[start : start + step]
            parts.append(self.part())
        self.at[rank] = whole
        return self.join(parts, self.einsum.output.ranks.index(rank))

    def join(self, parts: list[_Value], axis: int) -> _Value:
        data = torch.cat([p.data for p in parts], axis)
        if all(p.exists is None for p in parts):
            return _Value(data)
        return _Value(data, torch.cat([p.there().expand(p.data.shape) for p in parts], axis))

    def empty(self) -> _Value:
        return _Value(self.grid(torch.zeros((), dtype=torch.float64, device=self.device), self.kept).clone())

    def part(self) -> _Value:
        """The output on the present slices: expression, domain, the check of reads, reduction."""
        e = self.einsum
        value = self.value(e.expr)
        conjuncts = [(c, self.value(c)) for c in And.make_args(e.domain) if c != sympy.true]
        exists, row = value.exists, value.row
        if conjuncts:
            domain = self.logic([c for _, c in conjuncts], decided_by=False)
            self.check(domain.outside, _both(exists, domain.exists))
            exists = _both(exists, domain.exists, domain.data)
            row = _both(row, *(m for node, c in conjuncts if self.is_row(node) for m in (c.exists, c.data)))
        self.check(value.outside, exists)
        if e.reduce is None:
            return _Value(
                self.as_stored(self.grid(value.data, self.kept)),
                None if exists is None else self.grid(exists, self.kept),
            )
        if row is not None:  # free of the reduced ranks, which are the last axes
            row = self.grid(row.reshape(row.shape[: len(self.kept)]), self.kept)
        data = self.grid(value.data, tuple(self.axes))
        mask = None if exists is None else self.grid(exists, tuple(self.axes))
        if e.reduce.monoid == "topk":
            slot = e.output.ranks.index(e.reduce.slot or "")
            return _Value(self.topk(data, mask), None if row is None else row.unsqueeze(slot))
        axes = tuple(self.axes[r] for r in e.reduce.ranks)
        identity = MONOIDS[e.reduce.monoid].identity
        if data.dtype == torch.int64 and not identity.is_finite and e.reduce.monoid in ("max", "min"):
            data = data.double()  # an empty maximum of integers is -oo
        if mask is not None:
            data = torch.where(mask, data, torch.tensor(_constant(identity), dtype=data.dtype, device=self.device))
        return _Value(self.as_stored(_reduce(e.reduce.monoid, data, axes, _constant(identity))), row)

    def check(self, outside: Tensor | None, exists: Tensor | None) -> None:
        bad = _both(outside, exists)
        if outside is not None and bad is not None and self.points() and bool(bad.any()):
            raise CascadeError(f"reads outside a tensor at {self.first(bad)}", statement=self.einsum.name)

    def as_stored(self, data: Tensor) -> Tensor:
        """int64, float64 or bool, as the output's dtype says; infinities (an empty maximum of integers) stay floats."""
        if data.dtype == torch.bool:
            return data
        if self.einsum.output.dtype[0] in "iu":
            return data.to(torch.int64) if bool(data.isfinite().all()) else data
        return data.double()

    def topk(self, data: Tensor, mask: Tensor | None) -> Tensor:
        """Indices of the largest points, existing ones before missing ones, ties and missing ones by index."""
        e = self.einsum
        assert e.reduce is not None
        assert e.reduce.slot is not None
        k, n = self.lengths[e.reduce.slot], data.shape[-1]
        if k > n:
            raise CascadeError(f"topk of {k} points among {n} along {e.reduce.ranks[0]}", statement=e.name)
        order = torch.sort(data, dim=-1, descending=True, stable=True).indices
        if mask is not None:
            missing = (~mask.gather(-1, order)).to(torch.int8)
            # Missing points keep the order of their indices, whatever their values are.
            by_index = torch.sort(torch.where(missing.bool(), order, -1), dim=-1, stable=True).indices
            order = order.gather(-1, by_index)
        return order[..., :k].movedim(-1, e.output.ranks.index(e.reduce.slot))

    def is_row(self, node: Any) -> bool:
        """Whether the expression is free of the reduced ranks."""
        return not any(s.name in self.reduced for s in node.free_symbols)

    # -- the grid --

    def points(self) -> int:
        return prod(len(self.at[r]) for r in self.axes)

    def grid(self, data: Tensor, ranks: tuple[str, ...]) -> Tensor:
        return data.expand([len(self.at[r]) for r in ranks])

    def first(self, mask: Tensor) -> str:
        where = self.grid(mask, tuple(self.axes)).nonzero()[0].tolist()
        return ", ".join(f"{r}={self.at[r][i]}" for r, i in zip(self.axes, where, strict=True))

    def rank(self, name: str) -> Tensor:
        """A rank variable's values, along its axis of the grid."""
        at = self.at[name]
        shape = [1] * len(self.axes)
        shape[self.axes[name]] = len(at)
        return torch.arange(at.start, at.stop, device=self.device).view(shape)

    # -- expressions --

    def value(self, node: Any) -> _Value:
        """An expression on the present grid."""
        value = self.compute(node)
        if value.exists is not None and value.row is not value.exists and self.is_row(node):
            return replace(value, row=value.exists)
        return value

    def compute(self, node: Any) -> _Value:
        if isinstance(node, Access):
            return self.access(node)
        if isinstance(node, sympy.Symbol):
            name = node.name
            return _Value(self.rank(name) if name in self.axes else self.constant(self.sizes[name]))
        if node.is_Number or node.is_NumberSymbol or isinstance(node, (BooleanTrue, BooleanFalse)):
            return _Value(self.constant(_constant(node)))
        args = [self.value(a) for a in node.args]
        if isinstance(node, (And, Or)):
            return self.logic(args, isinstance(node, Or))
        if isinstance(node, Where):
            return self.where(*args)
        data = OPERATIONS[node.func](*(a.data for a in args))
        exists, row = _both(*(a.exists for a in args)), _both(*(a.row for a in args))
        return _Value(data, exists, _either(*(a.outside for a in args)), row)

    def constant(self, value: float | int | bool) -> Tensor:
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None, device=self.device)

    def where(self, condition: _Value, a: _Value, b: _Value) -> _Value:
        exists, outside = condition.exists, condition.outside
        if a.exists is not None or b.exists is not None:
            exists = _both(exists, torch.where(condition.data, a.there(), b.there()))
        if a.outside is not None or b.outside is not None:
            outside = _either(outside, torch.where(condition.data, a.left(), b.left()))
        data = torch.where(condition.data, *_promoted(a.data, b.data))
        return _Value(data, exists, outside, condition.row)

    def logic(self, args: list[_Value], decided_by: bool) -> _Value:
        """And, Or: an operand that exists and decides is enough, whatever the others are."""
        decided = None
        for a in args:
            decided = _either(decided, _both(a.data == decided_by, a.exists, None if a.outside is None else ~a.outside))
        assert decided is not None
        data = _fold(torch.logical_or if decided_by else torch.logical_and)(*(a.data for a in args))
        exists, outside = _both(*(a.exists for a in args)), _either(*(a.outside for a in args))
        return _Value(
            data, None if exists is None else exists | decided, None if outside is None else outside & ~decided
        )

    def access(self, node: Access) -> _Value:
        """One element per point of the ranks that the index depends on."""
        e = self.einsum
        if e.scan is not None and node.tensor == e.name:
            if self.previous is None:
                return self.value(e.scan.init)
            base = self.previous
            indices = [sympy.Integer(0) if r == e.scan.rank else i
                       for r, i in zip(e.output.ranks, node.index, strict=True)]  # fmt: skip
        else:
            base, indices = self.stored[node.tensor], list(node.index)
        values = [self.value(i) for i in indices]
        exists, outside = _both(*(v.exists for v in values)), _either(*(v.outside for v in values))
        shape = base.data.shape
        before, axis = None, -1
        if base.made_by is not None and base.made_by.scan is not None:
            axis = base.made_by.output.ranks.index(base.made_by.scan.rank)
            before = values[axis].data == -1
        if 0 in shape:
            if before is not None and bool(before.all()):
                return self.initial(base.made_by, node)
            nothing = torch.zeros((), dtype=base.data.dtype, device=self.device)
            return _Value(nothing, exists, torch.ones((), dtype=torch.bool, device=self.device))
        gathered = []
        for i, (v, n) in enumerate(zip(values, shape, strict=True)):
            index = v.data
            if index.is_floating_point():
                index = index.nan_to_num(nan=-1.0).clamp(-1, n).to(torch.int64)
            low = -1 if i == axis else 0
            if index.numel() and (int(index.min()) < low or int(index.max()) >= n):
                outside = _either(outside, (index < low) | (index >= n))
            gathered.append(index.clamp(0, n - 1))
        data = base.data[tuple(gathered)] if gathered else base.data
        if base.exists is not None:
            there = base.exists[tuple(gathered)] if gathered else base.exists
            there = there if before is None else there | before
            exists = _both(exists, there if outside is None else there | outside)
        if before is not None and bool(before.any()):
            data = torch.where(before, *_promoted(self.initial(base.made_by, node).data, data))
        return _Value(data, exists, outside)

    def initial(self, made_by: Einsum | None, node: Access) -> _Value:
        """What a finished scan holds before its first step, at an access that may go there."""
        assert made_by is not None
        assert made_by.scan is not None
        return self.value(made_by.scan.init.xreplace(made_by.output.place(node)))


def _constant(node: Any) -> float | int | bool:
    if isinstance(node, (BooleanTrue, BooleanFalse)):
        return bool(node)
    if node.is_Integer and abs(int(node)) < 2**63:
        return int(node)
    return float(node)


def _promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _add(*terms: Tensor) -> Tensor:
    """A sum in which opposite infinities cancel; what else is infinite stays so."""
    total = terms[0]
    for t in terms[1:]:
        total = total + t
    if total.is_floating_point() and bool(total.isnan().any()):
        floats = [t.double() for t in terms]
        up = _either(*(t == torch.inf for t in floats))
        down = _either(*(t == -torch.inf for t in floats))
        assert up is not None
        assert down is not None
        rest = sum((t.masked_fill(t.isinf(), 0) for t in floats[1:]), floats[0].masked_fill(floats[0].isinf(), 0))
        total = torch.where(up & down, rest, total)
    return total


def _multiply(*factors: Tensor) -> Tensor:
    total = factors[0]
    for f in factors[1:]:
        total = total * f
    return total


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    if base.is_floating_point() or exponent.is_floating_point() or bool((exponent < 0).any()):
        return torch.pow(base.double(), exponent.double())
    return torch.pow(base, exponent)


def _fold(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def folded(*args: Tensor) -> Tensor:
        total = args[0]
        for a in args[1:]:
            total = operation(*_promoted(total, a))
        return total

    return folded


def _floor_divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, torch.where(b == 0, 1, b), rounding_mode="floor")


def _in_double(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.double())


OPERATIONS: Mapping[Any, Callable[..., Tensor]] = {
    sympy.Add: _add,
    sympy.Mul: _multiply,
    sympy.Pow: _power,
    sympy.Max: _fold(torch.maximum),
    sympy.Min: _fold(torch.minimum),
    Not: torch.logical_not,
    FloorDiv: _floor_divide,
    Mod: lambda a, b: a - _floor_divide(a, b) * b,
    sympy.Lt: torch.lt,
    sympy.Le: torch.le,
    sympy.Gt: torch.gt,
    sympy.Ge: torch.ge,
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    sympy.exp: _in_double(torch.exp),
    sympy.log: _in_double(torch.log),
    sympy.tanh: _in_double(torch.tanh),
    sympy.erf: _in_double(torch.erf),
    sympy.sin: _in_double(torch.sin),
    sympy.cos: _in_double(torch.cos),
    sympy.sinh: _in_double(torch.sinh),
    sympy.cosh: _in_double(torch.cosh),
    sympy.atan: _in_double(torch.atan),
    sympy.Abs: torch.abs,
    sympy.sign: torch.sign,
    sympy.floor: torch.floor,
    sympy.ceiling: torch.ceil,
    Round: torch.round,
    Trunc: torch.trunc,
}


def _reduce(monoid: str, data: Tensor, axes: tuple[int, ...], identity: float | int | bool) -> Tensor:
    kept = [n for axis, n in enumerate(data.shape) if axis not in axes]
    if 0 in data.shape:
        return torch.full(kept, identity, dtype=data.dtype, device=data.device)
    if monoid == "sum":
        return data.sum(axes)
    if monoid in ("max", "min"):
        return data.amax(axes) if monoid == "max" else data.amin(axes)
    for axis in sorted(axes, reverse=True):
        data = data.prod(axis) if monoid == "prod" else data.any(axis) if monoid == "any" else data.all(axis)
    return data
