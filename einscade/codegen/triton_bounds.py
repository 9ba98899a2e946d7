"""How far a Triton kernel's loop runs: bounds from the domain, those that are data included.

Comes in: the domain of a `TileLoop`. Goes out: lines in the kernel that compute the first and the last tile of the loop
and which of them are full, and the loops over them. What tensors say of a tile (docs/ragged.md) is read once a program:
a value that is the same for the whole tile, the least and greatest of one that moves with the rows. Of what moves along
the loop there are summaries (`summaries`), from which the kernel finds the possible tiles before it visits any.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import replace

import sympy
from sympy.logic.boolalg import And, Boolean, Or

from einscade.codegen.summaries import summary_of
from einscade.codegen.triton_tile import TileWriter
from einscade.codegen.triton_values import Block, Value, aligned, scalar, value
from einscade.ir.expr import Access, Expr, free_vars, var
from einscade.passes.domains import Data, certain, full_range, possible, span
from einscade.passes.terms import conjuncts

__all__ = ["BoundsWriter"]

SCANNED = 256
"""So many tiles are looked at at once for whether data leaves them possible."""

_LIMITS = {"i32": 2**31 - 1, "i16": 2**15 - 1, "i8": 127, "u8": 255, "i64": 2**62}


class BoundsWriter(TileWriter):
    """The loops around the tile."""

    def edges(self) -> dict[str, tuple[Expr, Expr]]:
        found: dict[str, tuple[Expr, Expr]] = {}
        for r in (*self.row_names(), *self.columns):
            found[r] = (var(f"{r}_lo"), var(f"{r}_hi") - 1)
        for r, n in self.widths.items():
            found[r] = (sympy.Integer(0), sympy.Integer(n - 1))
        for x in self.loop.coordinates:
            lo = var(f"{self.loop.coordinate}_lo")
            found[x] = (lo, lo + self.step_size - 1)
        return found

    # -- what tensors say of a tile --

    def data(self, predicate: Boolean) -> dict[Access, tuple[Expr | Boolean, Expr | Boolean]]:
        """Least and greatest value of what the predicate reads, over a tile: variables of the kernel, or summaries."""
        found: dict[Access, tuple[Expr | Boolean, Expr | Boolean]] = {}
        for a in dict.fromkeys(_outermost(predicate)):
            kind = self.cascade.tensors[a.tensor].dtype
            if a.tensor not in self.scope.memory or (kind not in _LIMITS and kind != "bool"):
                continue
            if any(self.moves(i) for i in a.index):
                summary = summary_of(self.cascade, a, self.loop.coordinate, self.step_size, self.schedule.multiples)
                if summary is not None and summary[0].tensor in self.scope.memory:
                    found[a] = summary
            elif all(r in self.points or r in self.row_names() for r in free_vars(a) & {*self.cascade.rank_table}):
                found[a] = self.ends(a, kind)
        return found

    def ends(self, a: Access, kind: str) -> tuple[Expr | Boolean, Expr | Boolean]:
        """Variables with the least and greatest of an access that the loop does not move."""
        v = self.load(a)
        if v.code.isidentifier() and not v.ranks:
            return self.symbols(v.code, v.code, kind)
        number = self.edge_counts.get(a.tensor, 0)
        self.edge_counts[a.tensor] = number + 1
        least, most = (f"{a.tensor}_{word}{number or ''}" for word in ("least", "most"))
        if not v.ranks:
            self.main(f"{least} = {v.code}")
            return self.symbols(least, least, kind)
        if kind == "bool":
            v = Value(f"{v.tight()}.to(tl.int32)", v.ranks)
        top = _LIMITS.get(kind, 1)
        there = self.rows_there()
        inside, outside = (f"tl.where({there}, {v.code}, {fill})" if there else v.code for fill in (top, -top))
        end = " != 0" if kind == "bool" else ""
        self.main(f"{least} = tl.min({inside}, 0){end}")
        self.main(f"{most} = tl.max({outside}, 0){end}")
        return self.symbols(least, most, kind)

    def symbols(self, least: str, most: str, kind: str) -> tuple[Expr | Boolean, Expr | Boolean]:
        """Data may be negative, which a rank variable may not."""
        self.data_names |= {least, most}
        if kind == "bool":
            return sympy.Symbol(least), sympy.Symbol(most)
        return sympy.Symbol(least, integer=True), sympy.Symbol(most, integer=True)

    def rows_there(self) -> str:
        """The rows of the tile that are points, as code; empty where all are, always."""
        limits = [(b.index, b.limit) for r in self.row_names() if (b := self.scope.blocks[r]).limit is not None]
        return " & ".join(f"({index} < {limit})" for index, limit in limits)

    def reached(self) -> Boolean:
        """Whether a tile of two grid ranks may hold points of what its nest writes, by where it lies; true for nests
        whose tile is along the loop."""
        if not self.columns:
            return sympy.true
        placed = {*self.row_names(), *self.columns, *self.points, *self.cascade.symbols}
        wanted = {*self.nest.outputs, *(a.tensor for e in self.nest.totals for a in e.reads)}
        rows = [s.row for s in self.loop.statements if s.name in wanted]
        own = [And(*(c for c in conjuncts(row) if free_vars(c) <= placed and not c.has(Access))) for row in rows]
        return Or(*(possible(c, self.edges()) for c in own)).xreplace(self.known)

    # -- the loops --

    def masked_predicate(self) -> Boolean:
        found = [s.row for s in self.loop.body if s.fill is not None]
        found += [s.keep for s in self.loop.body if s.mask_operand]
        return And(*found)

    def bound(self, name: str, expr: Expr, tail: str = "") -> str:
        """A variable for a bound (data may be of 64 bits: a position is not)."""
        code = self.host(expr)
        if tail:
            code = f"({code}){tail}"
        if self.data_names & {s.name for s in expr.free_symbols}:
            code = f"({code}).to(tl.int32)"
        self.main(f"{name} = {code}")
        return name

    def write_loop(self, call: str, states: str) -> None:
        x, here, size = self.loop.coordinate, self.main, self.step_size
        if x is None:
            serial = self.nest.serial
            steps = self.host(self.cascade.extent(serial))
            if (reached := self.reached()) != sympy.true:
                here("# none in a tile without points")
                here(f"{serial}_stop = tl.where({scalar(reached, {})}, {steps}, 0)")
                steps = f"{serial}_stop"
            here(f"for {serial} in range({steps}):")
            self.write_call(2, states, call.format(masked=True))
            return
        edges, domain, lo = self.edges(), self.loop.domain, var(f"{x}_lo")
        data = self.data(domain) if self.loop.skippable else {}
        reach = span(domain, x, edges, data)
        start, stop = sympy.Integer(0), self.cascade.extent(self.nest.serial) * self.loop.step
        conditions: list[Boolean] = []
        if self.loop.skippable:
            start = sympy.Max(0, reach.start) if reach.start is not None else start
            stop = reach.stop if reach.stop is not None else stop
            if not reach.exact:
                conditions = list(conjuncts(possible(domain, edges, data).xreplace(self.known)))
        scanned = [c for c in conditions if c.has(Access)]
        guards = [c for c in conditions if c not in scanned and lo in c.free_symbols]
        always = [c for c in conditions if c not in scanned and c not in guards]
        first = "0"
        if start != 0:
            first = self.bound(f"{x}_start", start, f" // {size} * {size}")
        last = self.bound(f"{x}_stop", stop)
        if always:
            here(f"{last} = tl.where({scalar(And(*always), {})}, {last}, 0)")
        if scanned:
            first = self.write_hull(And(*conditions), first, last)
            guards = []  # the hull is visited whole: a branch would keep the loop from loading ahead
        guard = scalar(And(*guards), {}) if guards else None

        def loop(a: str, b: str, masked: bool) -> None:
            here(f"for {lo} in range({a}, {b}, {size}):")
            if guard is None or not masked:
                self.write_call(2, states, call.format(masked=masked))
            else:
                here(f"    if {guard}:")
                self.write_call(3, states, call.format(masked=masked))

        predicate = self.masked_predicate()
        if predicate == sympy.true:
            loop(first, last, False)
            return
        full = self.write_full(predicate, {**data, **self.new_data(predicate, data)}, first, last, stop)
        if full is None:
            loop(first, last, True)
            return
        if full[0] != first:
            here("# tiles before those that are full")
            loop(first, f"tl.minimum({full[0]}, {last})", True)
        here("# full tiles need no masks")
        loop(full[0], full[1], False)
        here("# tiles across the edge of the domain")
        loop(full[1], last, True)

    def write_call(self, depth: int, states: str, call: str) -> None:
        name, arguments = call[:-1].split("(", 1)
        self.main.depth = depth
        self.main(f"{states} = {name}(")
        for line in textwrap.wrap(arguments, 108, break_long_words=False):
            self.main(f"    {line}")
        self.main(")")
        self.main.depth = 1

    def new_data(self, predicate: Boolean, data: Data) -> Data:
        """What the masks read beyond what the domain reads."""
        others = {a: sympy.true for a in _outermost(predicate) if a not in data}
        return self.data(And(*(c for c in conjuncts(predicate) if c.atoms(Access) & others.keys())))

    def write_full(self, predicate: Boolean, data: Data, first: str, last: str, stop: Expr) -> tuple[str, str] | None:
        """Names of where the full tiles begin and end."""
        x, here, size = str(self.loop.coordinate), self.main, self.step_size
        edges = self.edges()
        inside = full_range(predicate, x, edges, data)
        if inside is None:
            every = certain(predicate, edges, data).xreplace(self.known)
            return self.write_full_run(every, first, last) if every.has(Access) else None
        full_first = first
        if inside[0] is not None:
            low = self.bound(f"{x}_full", inside[0]) if self.data_names else self.host(inside[0])
            here(f"{x}_full = tl.maximum({first}, tl.cdiv(tl.maximum({low}, 0), {size}) * {size})")
            full_first = f"{x}_full"
        end = sympy.Min(inside[1] if inside[1] is not None else stop, stop)
        data_free = not self.data_names & {s.name for s in end.free_symbols}
        code = f"({self.host(end)})" if data_free else f"({self.host(end)}).to(tl.int32)"
        here(f"{x}_full_stop = tl.maximum({full_first}, {code} // {size} * {size})")
        return full_first, f"{x}_full_stop"

    # -- tiles that data leaves possible --

    def write_scan(self, lines: list[str], condition: Boolean, name: str, first: str, last: str) -> None:
        """The lines for all tiles of the loop, `SCANNED` at once: `tile` are their numbers, and `name` says of which
        the condition holds."""
        here, x, size = self.main, self.loop.coordinate, self.step_size
        begin = "0" if first == "0" else f"{first} // {size}"
        here(f"for tile_lo in range({begin}, {x}_tiles, {SCANNED}):")
        here.depth += 1
        here(f"tile = tile_lo + tl.arange(0, {SCANNED})")
        scope, loads = self.scope, self.loads
        self.scope = replace(scope, order=("tile",), blocks={"tile": Block("tile", str(SCANNED), f"{x}_tiles", "tile")})
        self.loads = {}
        at = {var(f"{x}_lo"): size * var("tile")}
        parts = [value(c.xreplace(at), self.scope) for c in conjuncts(condition)]
        here(f"{name} = tile < {x}_tiles")
        for v in parts:
            here(f"{name} &= {aligned(v, ('tile',)).code}")
        for line in lines:
            here(line)
        self.scope, self.loads = scope, loads
        here.depth -= 1

    def write_hull(self, condition: Boolean, first: str, last: str) -> str:
        """Narrows the loop to the tiles between the first and the last possible one; gives the name of its start."""
        x, here, size = self.loop.coordinate, self.main, self.step_size
        here("# from the first to the last of the tiles that data leaves possible")
        here(f"{x}_tiles = tl.cdiv({last}, {size})")
        here(f"{x}_first = {x}_tiles")
        here(f"{x}_last = -1")
        found = [
            f"{x}_first = tl.minimum({x}_first, tl.min(tl.where(may, tile, {2**31 - 1}), 0))",
            f"{x}_last = tl.maximum({x}_last, tl.max(tl.where(may, tile, -1), 0))",
        ]
        self.write_scan(found, condition, "may", first, last)
        here(f"{x}_first = {x}_first * {size}")
        here(f"{last} = tl.minimum({last}, ({x}_last + 1) * {size})")
        return f"{x}_first"

    def write_full_run(self, condition: Boolean, first: str, last: str) -> tuple[str, str]:
        """The first run of tiles that are full, from which on and up to which."""
        x, here, size = self.loop.coordinate, self.main, self.step_size
        here("# the first run of tiles that data leaves full")
        here(f"{x}_tiles = tl.cdiv({last}, {size})")
        here(f"{x}_full = {x}_tiles")
        here(f"{x}_full_stop = {x}_tiles")
        least = f"tl.min(tl.where({{}}, tile, {2**31 - 1}), 0)"
        self.write_scan([f"{x}_full = tl.minimum({x}_full, {least.format('full')})"], condition, "full", first, last)
        after = [
            f"ends = (tile < {x}_tiles) & (tile > {x}_full) & ~full",
            f"{x}_full_stop = tl.minimum({x}_full_stop, {least.format('ends')})",
        ]
        self.write_scan(after, condition, "full", first, last)
        here(f"{x}_full = {x}_full * {size}")
        here(f"{x}_full_stop = {x}_full_stop * {size}")
        return f"{x}_full", f"{x}_full_stop"


def _outermost(expr: sympy.Basic) -> Iterator[Access]:
    """The accesses that are not in another one's index."""
    if isinstance(expr, Access):
        yield expr
    else:
        for a in expr.args:
            yield from _outermost(a)
