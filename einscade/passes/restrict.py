"""Restrict: the domain as classes of tiles (empty, full, partial), by interval reasoning over its conjuncts.

Comes in: a domain, the serial rank, and the extents. Goes out: `TileClasses`, from which an emitter gets the range of
the serial loop, the part of it that needs no masking, and per-tile predicates where a range is not enough. The rewrite
drops the conjuncts that the ranges of the ranks decide, and its note is the classification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Cascade, Expr, FloorDiv, Mod, Where, var
from einscade.ir.intervals import rank_ranges, simplify
from einscade.passes.rewrite import NotApplicable
from einscade.passes.terms import conjuncts, depends

__all__ = ["NO_DATA", "Data", "Restrict", "RowBound", "TileClasses", "certain", "extremes", "possible", "tile_classes"]

_ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class RowBound:
    """A bound on the serial rank that must be computed from tensors: `monoid` ("max" or "min") of `expr`, an integer
    expression over the other ranks that reads tensors, over the points of a tile."""

    monoid: str
    expr: Expr


@dataclass(frozen=True)
class TileClasses:
    """Where the points of a tile are. The tile of rank `r` is `r_lo <= r <= r_hi`, both ends included, with the
    symbols `var("r_lo")` and `var("r_hi")` in every expression below, for the serial rank and all others alike;
    a rank that is not tiled has both at its one value. Ends are clipped: `0 <= r_lo <= r_hi < extent(r)`.

    `lower`, `upper`: points exist only for `lower <= serial < upper` (always within 0 and the extent).
    `full_lower`, `full_upper`: every point with `full_lower <= serial < full_upper` exists, for all points of the
    other ranks' tiles; an empty range (`full_lower >= full_upper`) says nothing is known to be full.
    These four hold the other ranks' ends and extents, never the serial rank's.
    `row_lower`, `row_upper`, `row_full_lower`, `row_full_upper`: further bounds of the same meaning that need tensors;
    the range is their intersection with the closed form. To ignore those of `lower` and `upper` is correct and
    visits more tiles; those of `full_lower` and `full_upper` must hold before a tile is called full.
    `maybe`: false only where no point of the tile exists. `full`: true only where all do. Both also over
    `serial_lo`, `serial_hi`, and sharper than a range for domains with holes (a window with a sink).
    `needs_check`: conjuncts that no interval decides (a boolean tensor): a tile with any is never full.
    `holes`: whether `maybe` can exclude tiles within [lower, upper), so that a loop gains by testing it.
    """

    rank: str
    lower: Expr
    upper: Expr
    full_lower: Expr
    full_upper: Expr
    row_lower: tuple[RowBound, ...] = ()
    row_upper: tuple[RowBound, ...] = ()
    row_full_lower: tuple[RowBound, ...] = ()
    row_full_upper: tuple[RowBound, ...] = ()
    maybe: Boolean = sympy.true
    full: Boolean = sympy.true
    needs_check: tuple[Boolean, ...] = ()
    holes: bool = False


@dataclass(frozen=True)
class Restrict:
    """Drops what `0 <= rank < extent` decides."""

    name: ClassVar[str] = "restrict"
    identity: ClassVar[str] = "x if c = x where c holds for every point"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        ranges = rank_ranges(cascade)
        body = tuple(s.replace(domain=simplify(s.domain, ranges)) for s in cascade.body)
        if body == cascade.body:
            raise NotApplicable("no condition of a domain is decided by the ranges of its ranks")
        return cascade.replace(body=body)

    def note(self, cascade: Cascade) -> str:
        """The classes of tiles of every reduced rank that a statement's domain restricts."""
        reduced = {r for s in cascade.body if s.reduce for r in s.reduce.ranks}
        lines = []
        for s in cascade.body:
            for rank in s.output.ranks:
                if rank in reduced and depends(s.domain, (rank,)):
                    c = tile_classes(s.domain, rank, {r.name: r.extent for r in cascade.ranks})
                    lines.append(
                        f"{s.name}: {rank} from {c.lower} to {c.upper}, full from {c.full_lower} to {c.full_upper}"
                        + (", with holes" if c.holes else "")
                        + (f", to be checked: {', '.join(map(str, c.needs_check))}" if c.needs_check else "")
                    )
        return "\n".join(lines)


def tile_classes(domain: Boolean, serial: str, extents: Mapping[str, Expr]) -> TileClasses:
    """The classes of tiles of a domain over the ranks in `extents`, the serial one among them."""
    tiles = {r: (var(f"{r}_lo"), var(f"{r}_hi")) for r in extents}
    others = {r: t for r, t in tiles.items() if r != serial}
    parts = [_part(c, serial, others) for c in conjuncts(domain)]
    extent = extents[serial]
    maybe, full = possible(domain, tiles), certain(domain, tiles)
    return TileClasses(
        serial,
        lower=_most(sympy.Max, _ZERO, [p.lower for p in parts]),
        upper=_most(sympy.Min, extent, [p.upper for p in parts]),
        full_lower=_most(sympy.Max, _ZERO, [p.full_lower for p in parts]),
        full_upper=_most(sympy.Min, extent, [p.full_upper for p in parts]),
        row_lower=tuple(b for p in parts for b in p.row_lower),
        row_upper=tuple(b for p in parts for b in p.row_upper),
        row_full_lower=tuple(b for p in parts for b in p.row_full_lower),
        row_full_upper=tuple(b for p in parts for b in p.row_full_upper),
        maybe=maybe,
        full=full,
        needs_check=tuple(c for c, p in zip(conjuncts(domain), parts, strict=True) if p.check),
        holes=any(p.holes for p in parts),
    )


@dataclass(frozen=True)
class _Part:
    """One conjunct's bounds on the serial rank; None is unbounded."""

    lower: Expr | None = None
    upper: Expr | None = None
    full_lower: Expr | None = None
    full_upper: Expr | None = None
    row_lower: tuple[RowBound, ...] = ()
    row_upper: tuple[RowBound, ...] = ()
    row_full_lower: tuple[RowBound, ...] = ()
    row_full_upper: tuple[RowBound, ...] = ()
    check: bool = False
    holes: bool = False


def _never_full(condition: Expr | Boolean) -> _Part:
    """What no range along the serial rank describes: points to be checked, or tiles for `maybe` to skip."""
    reads = bool(condition.has(Access))
    return _Part(full_lower=_ZERO, full_upper=_ZERO, check=reads, holes=not reads)


def _most(choose: type, start: Expr, bounds: list[Expr | None]) -> Expr:
    return choose(start, *(b for b in bounds if b is not None))


def _part(condition: Boolean, serial: str, others: Mapping[str, tuple[Expr, Expr]]) -> _Part:
    if isinstance(condition, (sympy.Or, sympy.And)):
        return _joined(condition, [_part(c, serial, others) for c in condition.args])
    if isinstance(condition, sympy.Eq):
        both = sympy.And(sympy.Le(condition.lhs, condition.rhs), sympy.Ge(condition.lhs, condition.rhs))
        return _part(both, serial, others) if isinstance(both, sympy.And) else _never_full(condition)
    difference = _nonnegative(condition)
    if difference is None:
        return _never_full(condition)
    m = var(serial)
    slope = difference.coeff(m)
    rest = sympy.expand(difference - slope * m)
    if depends(rest, (serial,)) or not slope.is_Integer:
        return _never_full(rest)
    if slope == 0:
        low = extremes(rest, others)
        full = Where(low[0] >= 0, sympy.oo, _ZERO) if low else _ZERO
        return _Part(full_upper=None if full == sympy.oo else full, check=low is None)
    steps = abs(slope)
    bound = FloorDiv(rest, steps)
    ends = extremes(rest, others)
    if slope > 0:  # m >= -(rest // slope)
        if ends is None:
            return _Part(row_lower=(RowBound("min", -bound),), row_full_lower=(RowBound("max", -bound),))
        return _Part(lower=-FloorDiv(ends[1], steps), full_lower=-FloorDiv(ends[0], steps))
    if ends is None:
        return _Part(row_upper=(RowBound("max", bound + 1),), row_full_upper=(RowBound("min", bound + 1),))
    return _Part(upper=FloorDiv(ends[1], steps) + 1, full_upper=FloorDiv(ends[0], steps) + 1)


def _joined(condition: Boolean, parts: list[_Part]) -> _Part:
    """Bounds of a conjunction within a conjunct, or the hull of a disjunction (none of which is known to be full)."""
    check = any(p.check for p in parts)
    if isinstance(condition, sympy.And):
        return _Part(
            _tightest(sympy.Max, [p.lower for p in parts]),
            _tightest(sympy.Min, [p.upper for p in parts]),
            _tightest(sympy.Max, [p.full_lower for p in parts]),
            _tightest(sympy.Min, [p.full_upper for p in parts]),
            tuple(b for p in parts for b in p.row_lower),
            tuple(b for p in parts for b in p.row_upper),
            tuple(b for p in parts for b in p.row_full_lower),
            tuple(b for p in parts for b in p.row_full_upper),
            check,
            any(p.holes for p in parts),
        )
    lower = None if any(p.lower is None or p.row_lower for p in parts) else sympy.Min(*(p.lower for p in parts))
    upper = None if any(p.upper is None or p.row_upper for p in parts) else sympy.Max(*(p.upper for p in parts))
    return _Part(lower, upper, full_lower=_ZERO, full_upper=_ZERO, check=check, holes=True)


def _tightest(choose: type, bounds: list[Expr | None]) -> Expr | None:
    known = [b for b in bounds if b is not None]
    return choose(*known) if known else None


def _nonnegative(condition: Boolean) -> Expr | None:
    """`d` with `d >= 0` for an ordering of integers."""
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    difference = sympy.expand(condition.gts - condition.lts)
    return difference - 1 if isinstance(condition, (sympy.Lt, sympy.Gt)) else difference


Ends = Mapping[str, tuple[Expr, Expr]]
"""First and last index of each rank in a tile."""

Data = Mapping[Access, tuple[Expr | Boolean, Expr | Boolean]]
"""Least and greatest value of an access over a tile, as expressions of whatever the caller will compute; of a boolean
access, whether it holds at all points and at any. Symbols in them must not be assumed nonnegative: data need not be."""

NO_DATA: Data = MappingProxyType({})


def extremes(expr: Expr, tiles: Ends, data: Data = NO_DATA) -> tuple[Expr, Expr] | None:
    """Least and greatest value over a tile; None for what intervals do not bound, accesses without `data` included."""
    if isinstance(expr, Access):
        return data.get(expr)
    if not depends(expr, tiles) and not expr.has(Access):
        return expr, expr
    if isinstance(expr, sympy.Symbol):
        return tiles[expr.name]
    if isinstance(expr, (sympy.Add, sympy.Max, sympy.Min)):
        parts = [extremes(a, tiles, data) for a in expr.args]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts):
            return None
        return expr.func(*(p[0] for p in known)), expr.func(*(p[1] for p in known))
    if isinstance(expr, sympy.Mul):
        coefficient, rest = expr.as_coeff_Mul()
        inner = extremes(rest, tiles, data) if coefficient != 1 else None
        if inner is None:
            return None
        ends = coefficient * inner[0], coefficient * inner[1]
        return ends if coefficient > 0 else (ends[1], ends[0])
    if isinstance(expr, (FloorDiv, Mod)) and expr.args[1].is_Integer and expr.args[1] > 0:
        if isinstance(expr, Mod):
            return _ZERO, expr.args[1] - 1
        inner = extremes(expr.args[0], tiles, data)
        return None if inner is None else (FloorDiv(inner[0], expr.args[1]), FloorDiv(inner[1], expr.args[1]))
    return None


def possible(condition: Boolean, tiles: Ends, data: Data = NO_DATA) -> Boolean:
    """False only where no point of the tile satisfies the condition."""
    if isinstance(condition, (sympy.And, sympy.Or)):
        return condition.func(*(possible(a, tiles, data) for a in condition.args))
    if isinstance(condition, sympy.Not):
        return sympy.Not(certain(condition.args[0], tiles, data))
    if isinstance(condition, Access):
        return data.get(condition, (sympy.false, sympy.true))[1]
    difference = _nonnegative(condition)
    if difference is not None:
        ends = extremes(difference, tiles, data)
        return sympy.true if ends is None else sympy.Ge(ends[1], 0)
    if isinstance(condition, Relational) and (ends := extremes(_gap(condition), tiles, data)) is not None:
        if isinstance(condition, sympy.Eq):
            return sympy.And(sympy.Le(ends[0], 0), sympy.Ge(ends[1], 0))
        return sympy.Or(sympy.Ne(ends[0], 0), sympy.Ne(ends[1], 0))
    return sympy.false if condition == sympy.false else sympy.true


def certain(condition: Boolean, tiles: Ends, data: Data = NO_DATA) -> Boolean:
    """True only where every point of the tile satisfies the condition."""
    if isinstance(condition, (sympy.And, sympy.Or)):
        return condition.func(*(certain(a, tiles, data) for a in condition.args))
    if isinstance(condition, sympy.Not):
        return sympy.Not(possible(condition.args[0], tiles, data))
    if isinstance(condition, Access):
        return data.get(condition, (sympy.false, sympy.true))[0]
    difference = _nonnegative(condition)
    if difference is not None:
        ends = extremes(difference, tiles, data)
        return sympy.false if ends is None else sympy.Ge(ends[0], 0)
    if isinstance(condition, Relational) and (ends := extremes(_gap(condition), tiles, data)) is not None:
        if isinstance(condition, sympy.Eq):
            return sympy.And(sympy.Eq(ends[0], 0), sympy.Eq(ends[1], 0))
        return sympy.Or(sympy.Gt(ends[0], 0), sympy.Lt(ends[1], 0))
    return sympy.true if condition == sympy.true else sympy.false


def _gap(condition: Relational) -> Expr:
    a, b = condition.args
    return sympy.nan if isinstance(a, Boolean) and not isinstance(a, sympy.Expr) else sympy.expand(a - b)
