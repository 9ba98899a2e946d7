"""Restrict: the domain as classes of tiles (empty, full, partial), by interval reasoning over its conjuncts.

Comes in: a domain, the serial rank, and the extents. Goes out: `TileClasses`, from which an emitter gets the range of
the serial loop, the part of it that needs no masking, and per-tile predicates where a range is not enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Expr

__all__ = ["RowBound", "TileClasses"]


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
    `serial_lo`, `serial_hi`, and exact for domains whose hull has holes (a window with a sink).
    `needs_check`: conjuncts that no interval decides (a boolean tensor): a tile with any is never full.
    `holes`: whether `maybe` excludes tiles within [lower, upper), so that a loop gains by testing it.
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
