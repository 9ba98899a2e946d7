"""The rows of a Triton program's tile, and what is one number all over a tile.

Comes in: a nest, a schedule. Goes out: `Rows`, the tiled grid ranks as one dimension of the tile (a tile of several is
a box: every point of one with every point of the others), and `boxed`, a tile form in which the quotient of an index by
a multiple of its tile's length is the scalar that it is: the key head that a group of query heads shares, the page of a
tile of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy

from einscade.codegen.cost import crossed, crossed_tiles, row_ranks
from einscade.codegen.loops import SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiles import Statement, TileLoop
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, accesses, var

__all__ = ["Rows", "Start", "boxed", "find_columns", "find_rows", "is_multiple", "starts_of"]


@dataclass(frozen=True)
class Rows:
    """`ranks` of the box, outermost first, with the tile of each; `dim` names the dimension, of `size` places."""

    ranks: tuple[str, ...]
    tiles: tuple[int, ...]
    dim: str
    size: int

    @property
    def padded(self) -> bool:
        """Whether the dimension has more places than the box has points."""
        points = 1
        for n in self.tiles:
            points *= n
        return points != self.size

    def lines(self) -> list[str]:
        """The index of every row: code that follows from `{rank}_lo`."""
        places = f"tl.arange(0, {self.size})"
        if len(self.ranks) == 1:
            return [f"{self.ranks[0]} = {self.ranks[0]}_lo + {places}"]
        made, inner = [f"{self.dim} = {places}"], 1
        for r, n in reversed(list(zip(self.ranks, self.tiles, strict=True))):
            place = self.dim if inner == 1 else f"{self.dim} // {inner}"
            outermost = r == self.ranks[0]
            made.append(f"{r} = {r}_lo + {place}" + ("" if outermost else f" % {n}"))
            inner *= n
        return made


def find_rows(cascade: Cascade, nest: SerialNest, schedule: Schedule) -> Rows | None:
    """The box of the nest's tiled grid ranks, or None where a program is one point of the grid."""
    ranks = row_ranks(cascade, nest, dict(schedule.tiles))
    if not ranks:
        return None
    own = crossed_tiles(cascade, nest)
    tiles = tuple(own.get(r) or schedule.tile(r) or 1 for r in ranks)
    points = 1
    for n in tiles:
        points *= n
    dim = ranks[0] if len(ranks) == 1 else cascade.fresh("row")
    return Rows(ranks, tiles, dim, max(16, 1 << (points - 1).bit_length()))


def find_columns(cascade: Cascade, nest: SerialNest) -> dict[str, int]:
    """The grid rank that a tile has beside its rows, if it has one, with its tile."""
    tiles = crossed_tiles(cascade, nest)
    return {r: tiles[r] for r in crossed(cascade, nest)[1:]}


# -- what is one number all over a tile -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """An index that runs over `lo <= index < lo + length` in a tile, where `lo` is a multiple of the length."""

    lo: sympy.Symbol
    length: int


def is_multiple(expr: Expr, n: int, multiples: Mapping[str, int]) -> bool:
    """Whether an integer expression is visibly a multiple of n. `multiples`: of what each symbol is known to be one."""
    for term in sympy.Add.make_args(expr):
        known = 1
        for f in sympy.Mul.make_args(term):
            known *= abs(int(f)) if f.is_Integer else multiples.get(f.name, 1) if f.is_Symbol else 1
        if known % n:
            return False
    return True


def boxed(loop: TileLoop, starts: Mapping[str, Start], multiples: Mapping[str, int]) -> TileLoop:
    """The loop with every `x // c` and `x % c` inside an index that is one number (plus the place in the tile) in every
    tile written so."""

    def index(expr: Expr) -> Expr:
        table = {}
        for q in expr.atoms(FloorDiv, Mod):
            whole = _whole(q.args[0], q.args[1], starts, multiples)
            if whole is not None:
                lo, moving = whole
                table[q] = FloorDiv(lo, q.args[1]) if isinstance(q, FloorDiv) else Mod(lo, q.args[1]) + moving
        return expr.xreplace(table)

    def reads(expr: sympy.Basic) -> sympy.Basic:
        if isinstance(expr, Access):
            return Access(expr.tensor, *(index(reads(i)) for i in expr.index))
        return expr.func(*map(reads, expr.args)) if expr.args and accesses(expr) else expr

    def statements(found: Iterable[Statement]) -> tuple[Statement, ...]:
        return tuple(replace(s, expr=reads(s.expr), keep=reads(s.keep), row=reads(s.row)) for s in found)

    return replace(
        loop,
        prologue=statements(loop.prologue),
        body=statements(loop.body),
        epilogue=statements(loop.epilogue),
        domain=reads(loop.domain),
    )


def _whole(
    expr: Expr, divisor: Expr, starts: Mapping[str, Start], multiples: Mapping[str, int]
) -> tuple[Expr, Expr] | None:
    """The index at the start of the tile and the place in it, if the tile does not cross a multiple of the divisor."""
    moving = [starts[s.name] for s in expr.free_symbols if s.name in starts]
    if len(moving) != 1 or not divisor.is_Integer or expr.has(Access):
        return None
    start = moving[0]
    x = next(s for s in expr.free_symbols if s.name in starts)
    rest = expr - x
    if x in rest.free_symbols or int(divisor) % start.length or not is_multiple(rest, start.length, multiples):
        return None
    return rest + start.lo, x - start.lo


def starts_of(rows: Rows | None, coordinates: Iterable[str], coordinate: str | None, step: int) -> dict[str, Start]:
    """Where the tiles of the rows' ranks and of the loop's coordinates begin."""
    found = {r: Start(var(f"{r}_lo"), n) for r, n in zip(rows.ranks, rows.tiles, strict=True)} if rows else {}
    return found | {x: Start(var(f"{coordinate}_lo"), step) for x in coordinates}
