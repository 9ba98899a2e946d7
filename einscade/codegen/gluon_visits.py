"""Lists of tiles: what a Gluon kernel visits where its domain has no closed bounds.

Comes in: a `Plan` whose predicate reads tensors, or leaves out tiles between others. Goes out: a second kernel of the
module, which writes for each tile of rows the tiles of the loop that can hold a point, from the last to the first, each
as twice its number, plus 1 where it needs a mask. The loading warp and the consumers of the main kernel follow that
list, which has its length in front. Which tiles are on it is decided by `passes.domains` from the ends of each access
over the tile. Where columns' data says where points begin (packed documents, padding), a list's tiles begin there, and
go by the number of a `UNIT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean, Or

from einscade.codegen.gluon_points import Points
from einscade.codegen.gluon_text import function, indent, paren, wrapped
from einscade.codegen.gluon_values import Printer, Value
from einscade.codegen.host import python
from einscade.codegen.overlap import GLUON_GO
from einscade.codegen.source import Unsupported
from einscade.ir.expr import Access, Expr, accesses, ceil_div, free_vars, var
from einscade.passes.domains import certain, possible, span

__all__ = ["Visits"]

READ = 8192
"""So many values of an access are read at once, 32 by each thread: nothing else hides the time that a read takes."""

WARPS = 8

UNIT = 16
"""Where tiles may begin: reads by address know that so many columns lie side by side."""

CLEARED = 32 * WARPS
"""So many numbers a program sets to 0 at once."""

LISTING = """
LISTED = gl.constexpr({listed})  # tiles decided at once
BLOCK = gl.constexpr(gl.BlockedLayout([1, 8], [{rows}, {columns}], [{warps}, 1], [1, 0]))
EACH = gl.constexpr(gl.SliceLayout(1, BLOCK))
WITHIN = gl.constexpr(gl.SliceLayout(0, BLOCK))
LIST = gl.constexpr(gl.BlockedLayout([1], [32], [{warps}], [0]))
"""

SHIFTING = """\
READ = gl.constexpr({read})  # columns looked at one by one, at once
EVERY = gl.constexpr(gl.BlockedLayout([4], [32], [{warps}], [0]))
"""

ADD = """

@gluon.jit
def add(a, b):
    return a + b
"""


@dataclass(frozen=True)
class Datum:
    """An access that decides about tiles. `moves`: with "rows", with the loop ("columns"), or not at all ("")."""

    access: Access
    moves: str
    low: sympy.Symbol
    high: sympy.Symbol


class Visits(Points):
    """Which tiles a program visits, where that takes a list."""

    @cached_property
    def data(self) -> tuple[Datum, ...]:
        """The accesses of the predicate whose ends over a tile can be computed."""
        shape = self.shape
        found: list[Datum] = []
        for a in sorted(accesses(shape.keep), key=sympy.default_sort_key):
            dtype = self.dtype(a.tensor)
            moving = {shape.p, shape.m} & free_vars(a)
            if a.tensor not in shape.loop.nest.inputs or len(moving) > 1 or not (dtype == "bool" or dtype[0] in "iu"):
                continue
            moves = {shape.p: "rows", shape.m: "columns"}[moving.pop()] if moving else ""
            name = f"{self.name(a.tensor)}{len(found) or ''}"
            low, high = (sympy.Symbol(f"{name}_{end}", integer=True) for end in ("low", "high"))
            found.append(Datum(a, moves, low, high))
        return tuple(found)

    @cached_property
    def classes(self) -> tuple[Boolean, Boolean] | None:
        """Whether a tile can hold a point, and whether it holds nothing else, over its ends and those of the data;
        None where the closed bounds say as much."""
        shape = self.shape
        if not self.data and not _has_holes(shape.keep, shape.m):
            return None
        ends: dict[Access, tuple[Expr | Boolean, Expr | Boolean]] = {}
        for d in self.data:
            flag = self.dtype(d.access.tensor) == "bool"
            ends[d.access] = (sympy.Ne(d.low, 0), sympy.Ne(d.high, 0)) if flag else (d.low, d.high)
        tiles = {r: (var(f"{r}_low"), var(f"{r}_high")) for r in (shape.p, shape.m)}
        found = possible(shape.keep, tiles, ends), certain(shape.keep, tiles, ends)
        try:
            for predicate in found:
                self._tile_printer().value(predicate)
        except Unsupported:
            return None
        return found

    @property
    def listed(self) -> bool:
        return self.classes is not None

    @property
    def uneven(self) -> bool:
        """Whether tiles of rows differ in how many tiles of the loop they visit."""
        return self.listed or "row" in free_vars(self.bounds.end - self.bounds.first)

    @property
    def dynamic(self) -> bool:
        """Whether a resident program takes the next place that nobody has, and not one known beforehand."""
        return bool(self.resident) and self.uneven

    def _is_static(self) -> bool:
        return not self.listed and super()._is_static()

    def _ends(self) -> list[str]:
        return ["visits", "count"] if self.listed else super()._ends()

    def _edge(self) -> str:
        return "visit % 2 != 0" if self.listed else super()._edge()

    def _head(self) -> str:
        """The tile that is visited first."""
        return "gl.load(visits) // 2" if self.listed else "end - 1"

    @property
    def shifted(self) -> bool:
        """Whether a list's tiles may begin at any unit of columns: not where each tile has a place of its own."""
        return False

    def _column(self, tile: str = "tile") -> str:
        """The first column of a tile."""
        return f"{paren(tile)} * {UNIT if self.shifted else 'STEP'}"

    def _tile_printer(self) -> Printer:
        """Prints predicates over tiles of the loop, a vector of them at once."""
        shape = self.shape
        variables = {f"{shape.p}_{end}": Value(f"{shape.p}_{end}", (), "i") for end in ("low", "high")}
        variables |= {f"{shape.m}_{end}": Value(f"{shape.m}_{end}", ("tile",), "i") for end in ("low", "high")}
        for d in self.data:
            ranks = ("tile",) if d.moves == "columns" else ()
            variables |= {x.name: Value(x.name, ranks, "i") for x in (d.low, d.high)}

        def refuse(access: Access, _: Printer) -> Value:
            raise Unsupported(f"{access} has no ends over a tile")

        return Printer(("tile",), {}, variables, refuse, used=self.used)

    # -- the list of a program --

    def _list_batch(self) -> tuple[str, ...]:
        """The grid ranks that a list depends on."""
        names = free_vars(self.shape.keep)
        return tuple(r for r in self.shape.batch if r in names)

    def _listing_tensors(self) -> list[str]:
        """The tensors that are read to make the lists."""
        return list(dict.fromkeys(x.tensor for d in self.data for x in accesses(d.access)))

    def _listing_pointers(self) -> list[str]:
        return [a for t in self._listing_tensors() for a in self._pointer(t, self.name(t))]

    def _loop_tiles(self) -> Expr:
        """How long a list can be."""
        assert self.shape.loop.limit is not None
        return ceil_div(self.shape.loop.limit, sympy.Integer(self.columns))

    def _follow(self) -> list[str]:
        """Where a program of the main kernel finds its list, and how long that is."""
        names = self._scalar_printer()
        number = ""
        for r in self._list_batch():
            number = f"{paren(number)} * {names.value(self.shape.extent(r)).atom()} + {r}" if number else r
        number = f"{paren(number)} * row_tiles + row_tile" if number else "row_tile"
        return [
            f"listed = {number}",
            f"visits += listed.to(gl.int64) * ({names.value(self._loop_tiles()).atom()} + 1)",
            "count = gl.load(visits)",
            "visits += 1",
        ]

    # -- the kernel that makes it --

    def _listing_parts(self) -> list[str]:
        """The constants and functions of the kernel that makes the lists."""
        columns = min(32, self.columns // 8)  # threads side by side on a tile
        constants = LISTING.format(listed=READ // self.columns, rows=32 // columns, columns=columns, warps=WARPS)
        constants += SHIFTING.format(read=READ, warps=WARPS) if self.shifted else ""
        return [f"{constants.strip()}\n{ADD}".rstrip(), self._listing()]

    def _listing(self) -> str:
        """The kernel that writes the lists."""
        assert self.classes is not None
        shape, bounds = self.shape, self.bounds
        p, m = shape.p, shape.m
        names = self._scalar_printer()
        assert shape.loop.limit is not None
        rows, limit = names.value(shape.extent(p)).atom(), names.value(shape.loop.limit).atom()
        points = {p: Value(f"{p}_", (p,), "i"), m: Value(f"{m}_", (m,), "i")}
        loads = Printer((p, m), {}, points, self._element, used=self.used)
        lines = [
            f'"""The tiles of {m} that a tile of {p} visits, last to first: twice the number, plus 1 where',
            f'points of it are missing. A tile of {p} without points visits one tile, masked."""',
            GLUON_GO,
            f"row_tiles = gl.cdiv({rows}, {self.rows})",
            "program = gl.program_id(0)",
            "batch = program // row_tiles",
            f"row = program % row_tiles * {self.rows}",
            *self._unravel(self._list_batch()),
            f"first = {names.value(bounds.first).code}",
            f"end = {names.value(bounds.end).code}",
            f"{p}_low = row",
            f"{p}_high = gl.minimum(row + {self.rows}, {rows}) - 1",
            f"{p}_ = gl.minimum(row + gl.arange(0, {self._power(self.rows)}, WITHIN), {p}_high)",
        ]
        for d in self.data:
            if d.moves != "columns":
                lines += self._ends_of(d, loads)
        inside: list[str] = []
        number = "unit" if self.shifted else "tile"
        if self.shifted:
            inside.append(f"unit = tile * (STEP // {UNIT}) + shift")
        if any(d.moves == "columns" for d in self.data):
            start = self._column(f"gl.maximum({number}, 0)[:, None]")
            inside.append(f"{m}_ = gl.minimum({start} + gl.arange(0, STEP, WITHIN)[None, :], {limit} - 1)")
        for d in self.data:
            if d.moves == "columns":
                inside += self._ends_of(d, loads)
        printer = self._tile_printer()
        some, whole = (printer.value(c) for c in self.classes)
        inside += [
            f"{m}_low = {self._column(number)}",
            f"{m}_high = {m}_low + STEP - 1",
            f"some = (tile >= first) & {some.atom()}",
            f"whole = (tile >= first) & {whole.atom()}",
            f"entry = gl.convert_layout({number} * 2 + 1 - whole.to(gl.int32), LIST)",
            "written = gl.convert_layout(some.to(gl.int32), LIST)",
            "at = count + gl.associative_scan(written, 0, add) - 1",
            "gl.store(visits + 1 + at, entry, mask=written != 0)",
            "count += gl.sum(written, axis=0)",
        ]
        if self.shifted:
            lines += self._shift(some, limit, loads)
        lines += [
            f"visits += program.to(gl.int64) * ({names.value(self._loop_tiles()).atom()} + 1)",
            "count = 0",
            "for block in range(gl.cdiv(end - first, LISTED)):",
            "    tile = end - 1 - block * LISTED - gl.arange(0, LISTED, EACH)",
            *indent(inside),
            "if count == 0:",
            f"    gl.store(visits + 1, 2 * first{f' * (STEP // {UNIT})' if self.shifted else ''} + 1)",
            "gl.store(visits, gl.maximum(count, 1))",
        ]
        if self.dynamic:
            lines += [
                f"for start in range(program * {CLEARED}, cleared, gl.num_programs(0) * {CLEARED}):",
                f"    at = start + gl.arange(0, {CLEARED}, LIST)",
                f"    gl.store(taken + at, gl.full([{CLEARED}], 0, gl.int32, LIST), mask=at < cleared)",
            ]
        counters = ["taken", "cleared"] if self.dynamic else []
        decorator = f"@gluon.jit(do_not_specialize={[*counters[1:], *self.sizes]!r})"
        arguments = [*self._listing_pointers(), "visits", *counters, *self.sizes]
        return function("list_tiles", arguments, lines, decorator)

    def _shift(self, some: Value, limit: str, loads: Printer) -> list[str]:
        """How many units a list's tiles are shifted: to the first that can hold a point. It saves a tile or a mask."""
        m = self.shape.m
        ends = [line for d in self.data if d.moves == "columns" for line in self._ends_of(d, loads, alone=True)]
        return [
            f"low = {limit}",
            "for block in range(first * STEP // READ, gl.cdiv(end * STEP, READ)):",
            *indent([
                f"{m}_ = gl.minimum(block * READ + gl.arange(0, READ, EVERY), {limit} - 1)",
                *ends,
                f"{m}_low = {m}_",
                f"{m}_high = {m}_",
                f"alone = ({m}_ >= first * STEP) & {some.atom()}",
                f"low = gl.minimum(low, gl.min(gl.where(alone, {m}_, {limit}), axis=0))",
            ]),
            f"shift = low // {UNIT} % (STEP // {UNIT})",
        ]  # fmt: skip

    def _cleared(self) -> str:
        """How many numbers the kernel that makes the lists sets to 0: the counter of places taken, and what is behind
        it."""
        return "1"

    def _make_lists(self, device: str) -> list[str]:
        """The host's part of the lists of tiles."""
        shape = self.shape
        grid = [python(shape.extent(r)) for r in self._list_batch()]
        grid.append(f"-(-{paren(python(shape.extent(shape.p)))} // {self.rows})")
        given = [f"{self.name(t)}, *{self.name(t)}.stride()" for t in self._listing_tensors()]
        results = ["visits", *(["taken", self._cleared()] if self.dynamic else [])]
        return [
            f"lists = {' * '.join(paren(g) for g in grid)}",
            f"visits = torch.empty(lists, {paren(python(self._loop_tiles()))} + 1, dtype=torch.int32, device={device})",
            *([f"taken = torch.empty({self._cleared()}, dtype=torch.int32, device={device})"] if self.dynamic else []),
            *wrapped(f"list_tiles[(lists,)]({', '.join([*given, *results, *self.sizes])}, num_warps={WARPS})", 0),
        ]

    def _ends_of(self, d: Datum, printer: Printer, alone: bool = False) -> list[str]:
        """The least and the greatest value of an access over a tile, or over each column `alone`."""
        v = self._element(d.access, printer)
        code = f"({v.code}).to(gl.int32)" if v.kind == "b" else v.code
        if not d.moves or alone:
            return [f"{d.low} = {code}", f"{d.high} = {d.low}"]
        axis = 0 if d.moves == "rows" else 1
        held = f"{d.low.name.removesuffix('_low')}_held"
        return [f"{held} = {code}", f"{d.low} = gl.min({held}, axis={axis})", f"{d.high} = gl.max({held}, axis={axis})"]

    @staticmethod
    def _power(n: int) -> int:
        return 1 << (n - 1).bit_length()


def _has_holes(predicate: Boolean, m: str) -> bool:
    """Whether a tile without points can lie between two that have some: of two alternatives one ends, one begins."""
    if not isinstance(predicate, Or):
        return any(_has_holes(a, m) for a in predicate.args if isinstance(a, Boolean))
    reach = [span(a, m, {}) for a in predicate.args]
    return any(r.start is not None for r in reach) and any(r.start is None for r in reach)
