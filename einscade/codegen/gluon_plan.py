"""What the Gluon emitter knows before it writes: names, sizes, reads by address, which iterations are masked.

Comes in: a `Form` and a `Schedule`. Goes out: a `Plan`, whose methods the writers share. Raises `Unsupported` where the
schedule's tiles fit neither shared memory nor registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import sympy

from einscade.codegen.base2 import base2
from einscade.codegen.gluon_bounds import bounds
from einscade.codegen.gluon_form import Form, Operand
from einscade.codegen.gluon_shift import coordinates, row_terms_apart
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, free_vars, var
from einscade.ir.intervals import is_inside
from einscade.passes.terms import reads_by_choice

__all__ = [
    "COLUMN_DTYPES", "GROUP_ROWS", "REGISTERS", "Column", "Load", "Plan", "Ring", "Table", "distance", "factor_of",
]  # fmt: skip

GROUP_ROWS = 64
"""Rows of a warpgroup: those of one warpgroup_mma instruction."""

SHARED = 226 << 10
REGISTERS = {1: 240, 2: 240, 3: 160}
"""Registers a thread of each consumer may use, by the number of warpgroups; the loading warp gets 24."""

TABLE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "bool": 1}
"""The dtypes of tables that the copy engine brings, and their sizes."""

RUN_BYTES = {**TABLE_BYTES, "i32": 4, "i64": 8}
"""The dtypes of columns that the copy engine brings, and their sizes."""

ALIGNED = 128
"""Bytes: where in shared memory the copy engine may put a tile, and so what each place of a ring is a multiple of."""

COLUMN_DTYPES = {
    "bf16": "gl.bfloat16", "f16": "gl.float16", "f32": "gl.float32", "i32": "gl.int32", "i64": "gl.int64",
    "bool": "gl.int1",
}  # fmt: skip
"""The dtypes of columns that are read early."""

MOST_EARLY = 64
"""Columns of a tile up to which reads of them are issued early: a quarter as many registers for each read."""

RESERVED = frozenset({
    "gl", "gluon", "torch", "tma", "mbarrier", "run", "kernel", "load", "weigh", "advance", "compute", "group", "tile",
    "stage", "phase", "first", "end", "full_first", "full_end", "weights", "keep", "programs", "row", "finite", "tanh",
    "reciprocal", "row_max", "row_min", "row_sum", "row_parts", "tile_map", "MASKED", "UPPER", "LOWER", "ROWS",
    "COLUMNS", "visit", "visits", "count", "listed", "lists", "list_tiles", "add", "at", "some", "whole",
    "add_tile", "others", "others_full", "part", "part_tile", "before", "values", "program", "still_phase", "following",
    "packed", "taken", "upcoming", "next_stage", "next_phase", "slot_phase", "finish", "edge", "inside", "turn", "half",
    "zero_half", "HALF", "begun", "logistic", "at_points", "sooner", "first_columns", "is_one", "mark", "mark_to",
    "sound", "lost", "maps", "kernel_again", "quarter", "cleared",
    "start", "shift", "low", "alone", "unit", "place", "block", "entry", "written", "batch",
    "past", "line", "slot_before", "trail", "pass_by",
})  # fmt: skip


def padded(width: int) -> int:
    return max(32, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Load:
    """A read of an input that is not an operand of a product; `name` is its variable if it is read before the loop."""

    access: Access
    name: str | None


@dataclass(frozen=True)
class Ring:
    """An operand's tiles in shared memory, `width` elements wide there. `name` is the operand's in the text; `early`:
    a product reads it, so that it is needed before the last weights are; `late`: a weighted sum reads it."""

    name: str
    operand: Operand
    width: int
    early: bool
    late: bool


@dataclass(frozen=True)
class Table:
    """A read `T[.., p, m]` of an input at every point, `size` bytes each, that can come as tiles."""

    name: str
    access: Access
    operand: Operand
    size: int


@dataclass(frozen=True)
class Column:
    """A read `X[.., m]`, one value for each column of a tile, that is issued before the products of its iteration.
    `masks`: only masks read it. `size`: bytes of a value where the copy engine brings them; 0: read by address."""

    name: str
    access: Access
    masks: bool
    size: int


class Plan:
    """A form under a schedule."""

    def __init__(self, shape: Form, schedule: Schedule) -> None:
        self.shape = shape
        self.schedule = schedule
        self.cascade = shape.cascade
        tile = schedule.tile(shape.p)
        if tile is None or tile % GROUP_ROWS or tile // GROUP_ROWS not in REGISTERS:
            raise Unsupported(f"a tile of {tile} rows: 64 for each of one to three warpgroups is needed")
        self.rows, self.groups = tile, tile // GROUP_ROWS
        step = shape.loop.step
        columns = int(step) if step.is_Integer else schedule.tile(str(step))
        if columns not in (32, 64, 128, 256):
            raise Unsupported(f"a tile of {columns} along {shape.m}: 32, 64, 128 or 256 are what the kernel takes")
        self.columns, self.stages, self.resident = columns, max(1, schedule.stages), schedule.resident
        self.f = max(padded(x.values.width) for x in shape.sums)
        self.statements, self.scores, self.epilogue, self.rescales = _in_base2(shape)
        self.factors = {s.name: factor_of(s, x.e) for s, x in zip(self.scores, shape.products, strict=True)}
        self.bounds = bounds(shape.keep, shape.m, shape.p, var("row"), self.rows, self.columns)
        self.used: set[str] = set()
        self.loads = self._loads()
        self.tables = self._tables_of(self.loads)
        self.early_columns = self._columns_of(self.loads)
        self.sizes = self._sizes()
        self._check_fit()

    @property
    def slots(self) -> int:
        """How many tiles of rows have their operands that stay in shared memory at once: two where the next rows begin
        while a single pass over the keys ends."""
        return 2 if self.schedule.joined and not self.schedule.in_order else 1

    def _slots(self, x: Ring) -> int:
        """The same of one of these operands."""
        return self.slots

    def dtype(self, tensor: str) -> str:
        return self.cascade.tensors[tensor].dtype

    def name(self, tensor: str) -> str:
        taken = tensor in RESERVED or tensor in self.cascade.symbols or tensor in self.cascade.rank_table
        return f"{tensor}_" if taken else tensor

    # -- operands --

    @cached_property
    def _names(self) -> tuple[dict[Operand, str], dict[Operand, str]]:
        """Operands that stay, and that move, by the names of their tensors, numbered where a tensor is read at several
        places."""
        given: set[str] = set()
        found: tuple[dict[Operand, str], dict[Operand, str]] = {}, {}
        for names, operands in zip(found, (self.shape.stills, self.shape.moving), strict=True):
            for x in operands:
                name = self.name(x.tensor)
                numbered = (f"{name}_{i}" for i in range(2, 99))
                taken = given | set(self.cascade.tensors)
                names[x] = name if name not in given else next(n for n in numbered if n not in taken)
                given.add(names[x])
        return found

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        shape = self.shape
        early = [x.moving for x in shape.products]
        late = [x.values for x in shape.sums]
        return tuple(
            Ring(self._names[1][x], x, self.f if x in late else padded(x.width), x in early, x in late)
            for x in shape.moving
        )

    @property
    def buffers(self) -> tuple[Ring, ...]:
        """The rings that there are in shared memory, where several operands can have one."""
        return self.rings

    def ring(self, operand: Operand) -> Ring:
        return next(r for r in self.rings if r.operand == operand)

    @cached_property
    def stills(self) -> tuple[Ring, ...]:
        """The operands that stay, as wide as what they meet."""
        widths = {x.still: self.ring(x.moving).width for x in self.shape.products}
        for x in self.shape.products:
            if widths[x.still] != self.ring(x.moving).width:
                raise Unsupported(f"{x.still.tensor} meets tiles of different widths")
        return tuple(Ring(self._names[0][x], x, widths[x], False, False) for x in self.shape.stills)

    @cached_property
    def shares(self) -> dict[str, str]:
        """The outputs that leave through the tile of an operand that stays, by its name. Where the next rows' operand
        comes while these rows' results leave, there is none."""
        if self.resident:
            return {}
        free = {r.name: r.width for r in self.stills}
        found = {}
        for x in self.shape.written:
            name = next((n for n, w in free.items() if w == self.f), None)
            if name is not None and self.dtype(x.tensor) == self.shape.dtype:
                found[x.tensor] = name
                del free[name]
        return found

    def _check_fit(self) -> None:
        tiles = self.stages * self.columns * sum(r.width for r in self.rings) * 2
        tiles += self.slots * self.rows * sum(r.width for r in self.stills) * 2
        tiles += self.rows * self.f * 2 * (len(self.shape.written) - len(self.shares))
        tiles += self.stages * self.rows * self.columns * sum(t.size for t in self.tables)
        tiles += self.stages * sum(self.columns * c.size for c in self.copied_columns)
        if tiles + 1024 > SHARED:
            raise Unsupported(f"{tiles} bytes of tiles do not fit in {SHARED} bytes of shared memory")
        registers = len(self.shape.sums) * self.f // 2 + len(self.shape.products) * self.columns * 3 // 4 + 32
        if registers > REGISTERS[self.groups]:
            raise Unsupported(f"tiles of {self.columns} by {self.f} do not fit in {REGISTERS[self.groups]} registers")

    # -- arithmetic --

    @property
    def offset(self) -> str | None:
        """The name of the place in a tile of the loop, where a statement reads it."""
        name = coordinates(self.shape.m)[1].name
        return name if any(name in free_vars(s.expr) for s in self.statements) else None

    # -- other inputs --

    def _loads(self) -> tuple[Load, ...]:
        """Other inputs: an element or a row is read before the loop, the rest in it."""
        shape = self.shape
        operands = {x.tensor for x in (*shape.stills, *shape.moving)}
        widths = {x.f for x in shape.sums}
        found: dict[Access, None] = {}
        for s in (*self.statements, *self.epilogue, *self.scores):
            exprs = (self.factors[s.name], s.keep) if s in self.scores else (s.expr, s.keep, s.row)
            for expr in exprs:
                for a in accesses(expr):
                    if a.tensor in shape.loop.nest.inputs:
                        found[a] = None
        for a in found:
            if a.tensor in operands:
                raise Unsupported(f"{a.tensor} is an operand of a product and read elsewhere")
            if self.cascade.tensors[a.tensor].layout.kind != "dense" or widths & free_vars(a):
                raise Unsupported(f"{a} is read where the kernel does not")
        loads = []
        for i, a in enumerate(sorted(found, key=sympy.default_sort_key)):
            moves = shape.m in free_vars(a) or any(x != a for x in accesses(a))
            loads.append(Load(a, None if moves else f"{self.name(a.tensor)}_at{i}"))
        return tuple(loads)

    def _tables_of(self, loads: Sequence[Load]) -> tuple[Table, ...]:
        """The reads that can come as tiles: along the rows and, last, along the loop."""
        p, m = self.shape.p, self.shape.m
        found: list[Table] = []
        for a in (x.access for x in loads if x.name is None):
            others = [(i, x) for i, x in enumerate(a.index) if x not in (var(p), var(m))]
            straight = a.index[-1] == var(m) and a.index.count(var(p)) == a.index.count(var(m)) == 1
            if not straight or any({p, m} & free_vars(x) or x.has(Access) for _, x in others):
                continue
            if self.dtype(a.tensor) not in TABLE_BYTES or len(a.index) > 5:
                continue
            names = (f"{self.name(a.tensor)}{n}" for n in ("", *(f"_{i}" for i in range(2, 99))))
            name = next(n for n in names if n not in {t.name for t in found})
            extent = self.shape.extent(self.cascade.tensors[a.tensor].ranks[-1])
            width = int(extent) if extent.is_Integer else self.columns
            operand = Operand(a.tensor, a.index.index(var(p)), len(a.index) - 1, 0, width, tuple(others))
            found.append(Table(name, a, operand, TABLE_BYTES[self.dtype(a.tensor)]))
        return tuple(found)

    def _columns_of(self, loads: Sequence[Load]) -> tuple[Column, ...]:
        """The reads that move with the loop alone and end where it does, so that all of a tile may be read. What is
        the run of a last dimension comes with the copy engine; by address, only where a tile has no more columns than
        there are registers to keep them in."""
        m, limit = self.shape.m, self.shape.loop.limit
        read = {a for s in (*self.statements, *self.scores) for a in accesses(s.expr)}
        found: list[Column] = []
        for a in (x.access for x in loads if x.name is None):
            ranks = self.cascade.tensors[a.tensor].ranks
            plain = all(x == var(m) or not ({m, self.shape.p} & free_vars(x) or x.has(Access)) for x in a.index)
            ends = {self.shape.extent(r) for r, x in zip(ranks, a.index, strict=True) if x == var(m)}
            straight = a.index[-1] == var(m) and a.index.count(var(m)) == 1 and len(a.index) <= 5
            size = RUN_BYTES.get(self.dtype(a.tensor), 0) if straight else 0
            size = size if size * self.columns % ALIGNED == 0 else 0
            usable = self.dtype(a.tensor) in COLUMN_DTYPES
            few = self.columns <= MOST_EARLY or (size and self.dtype(a.tensor) != "i64")  # which takes two registers
            if plain and ends == {limit} and usable and few:
                found.append(Column(f"{self.name(a.tensor)}_columns{len(found) or ''}", a, a not in read, size))
        return tuple(found)

    @property
    def copied_columns(self) -> tuple[Column, ...]:
        """Those that come with the tiles of the first ring."""
        return tuple(c for c in self.early_columns if c.size)

    def _pointers(self) -> list[str]:
        """Arguments for tensors read or written by address: the pointer and a stride for each dimension."""
        read = [a for t in dict.fromkeys(x.access.tensor for x in self.loads) for a in self._pointer(t, self.name(t))]
        results = [a for t in self._row_results() for a in self._pointer(t, f"{self.name(t)}_to")]
        return [*read, *results, *self._marks()]

    def _marks(self) -> list[str]:
        """Arguments for what programs tell the kernel behind this one."""
        return []

    def _pointer(self, tensor: str, name: str) -> list[str]:
        return [name, *(f"{name}_{i}" for i in range(len(self.cascade.tensors[tensor].ranks)))]

    def _row_results(self) -> list[str]:
        return [r for r in self.shape.results if r not in {x.tensor for x in self.shape.written}]

    def _sizes(self) -> list[str]:
        """Symbols that the kernel needs: in extents of the grid, bounds, predicates and expressions."""
        shape = self.shape
        tiles = set(dict(self.schedule.tiles))
        names: set[str] = set()
        for r in (shape.p, *shape.batch):
            names |= free_vars(shape.extent(r))
        for s in (*self.statements, *self.epilogue, *self.scores):
            names |= free_vars(s.expr) | free_vars(s.keep) | free_vars(s.row)
        for x in self.loads:
            names |= {n for _, extent in self._may_leave(x.access) for n in free_vars(extent)}
        return [s for s in self.cascade.symbols if s in names and s not in tiles]

    @cached_property
    def _chosen(self) -> frozenset[Access]:
        """What only the points read for which a condition chooses it."""
        return reads_by_choice(x for s in (*self.statements, *self.epilogue, *self.scores) for x in (s.expr, s.keep))

    def _may_leave(self, access: Access) -> list[tuple[Expr, Expr]]:
        """The indices of a read, with the extents, that are not proved to stay inside where no point exists. Those of
        rows and columns at once, which a tile's own mask covers, are left out, but for what a condition chooses."""
        shape, own = self.shape, (self.shape.p, self.shape.m)
        ends = {r: shape.extent(r) for r in (shape.p, *shape.batch)}
        if shape.loop.limit is not None:
            ends[shape.m] = shape.loop.limit
        ranges = {r: (sympy.Integer(0), end - 1) for r, end in ends.items()}
        extents = [shape.extent(r) for r in self.cascade.tensors[access.tensor].ranks]
        return [
            (i, n) for i, n in zip(access.index, extents, strict=True)
            if (access in self._chosen or not {*own} <= free_vars(i)) and not is_inside(i, n, ranges)
        ]  # fmt: skip

    def _classes(self) -> bool:
        return self.bounds.full_end is not None

    def _ends(self) -> list[str]:
        """The names of the bounds that the loops use."""
        full = ["full_first"] if self.bounds.lower else []
        return ["first", "end", *([*full, *(["full_end"] if self.bounds.upper else [])] if self._classes() else [])]

    def _edge(self) -> str:
        """Whether a tile after the first one visited is masked."""
        b = self.bounds
        if not self._classes():
            return "True"
        edges = (["tile >= full_end"] if b.upper else []) + (["tile < full_first"] if b.lower else [])
        return " | ".join(f"({e})" for e in edges) if len(edges) > 1 else edges[0] if edges else "False"

    def _edges(self) -> list[str]:
        """The same of each edge for itself, where tiles across them are masked apart."""
        if not self._masked_apart():
            return [self._edge()]
        return ["tile >= full_end" if self.bounds.upper else "False", "tile < full_first"]

    def _first_edges(self) -> list[str]:
        """The same of the tile that is visited first, of which no more is known."""
        return ["True", "tile < full_first"] if self._masked_apart() else ["True"]

    def _masked_names(self) -> list[str]:
        """The names of what these say in the functions of an iteration."""
        return ["UPPER", "LOWER"] if self._masked_apart() else ["MASKED"]

    def _masked_apart(self) -> bool:
        """Whether a tile across one edge need not be compared with the other."""
        return False

    def _is_static(self) -> bool:
        """Whether it is known, where the code is made, which iterations are masked."""
        return not self._classes() or not (self.bounds.upper or self.bounds.lower)

    def _masked_arguments(self) -> list[str]:
        return [f"{x}: gl.constexpr" if self._is_static() else x for x in self._masked_names()]

    # -- names in the text --

    def _seen(self, operand: Operand) -> str:
        """A tensor as the copy engine sees it: the operand's part of it, rows and width last."""
        view = self.name(operand.tensor)
        extent = self.shape.extent(self.cascade.tensors[operand.tensor].ranks[operand.across])
        if extent.is_Integer and extent != operand.width:
            view = f"{view}.narrow({operand.across}, {operand.offset}, {operand.width})"
        if list(operand.order) != sorted(operand.order):
            view = f"{view}.permute({', '.join(map(str, operand.order))})"
        return view

    def _state_names(self) -> list[str]:
        return [self.name(s.name) for s in self.shape.states]

    def _score_names(self) -> list[str]:
        return [self.name(x.score.name) for x in self.shape.products]

    def _sum_names(self) -> list[str]:
        return [self.name(x.state.name) for x in self.shape.sums]

    @cached_property
    def rescale_names(self) -> dict[Expr, str]:
        """The distinct factors of the sums, by their names."""
        distinct = dict.fromkeys(x for x in self.rescales if x is not None)
        return {x: "rescale" if i == 0 else f"rescale{i + 1}" for i, x in enumerate(distinct)}

    @cached_property
    def weight_names(self) -> dict[str, str]:
        """The values that are weights of a sum, by the names of what multiplies."""
        distinct = dict.fromkeys(x.weights for x in self.shape.sums)
        return {x: "weights" if i == 0 else f"weights{i + 1}" for i, x in enumerate(distinct)}

    def _barriers(self) -> list[str]:
        return self._still_barriers() + self._ring_barriers()

    def _still_barriers(self) -> list[str]:
        empty = [f"{x.name}_empty" for x in self.stills] if self.resident else []
        return [f"{x.name}_full" for x in self.stills] + empty

    def _ring_barriers(self) -> list[str]:
        return [b for x in self.buffers for b in (f"{x.name}_full", f"{x.name}_empty")]

    def _tiles(self) -> list[str]:
        moving = [x.name for x in self.buffers] + [x.name for x in self.copied_columns]
        return [f"{x.name}_tile" for x in self.stills] + [f"{name}_tiles" for name in moving]

    def _context(self) -> list[str]:
        """What the elementwise part reads besides the scores and the running values."""
        hoisted = [x.name for x in self.loads if x.name is not None]
        tiles = {t.access for t in self.tables} | {c.access for c in self.copied_columns}
        tensors = dict.fromkeys(x.access.tensor for x in self.loads if x.name is None and x.access not in tiles)
        moving = [a for t in tensors for a in self._pointer(t, self.name(t))]
        return [self.shape.p + "_", *self.shape.batch, *hoisted, *moving, *self.sizes]


def distance(access: Access, p: str, m: str) -> tuple[int, int, int] | None:
    """The one dimension of a read whose place is a sum of the row and the column, each times a number, and the two
    numbers, where the others have the same place for all points of a tile (a table by distance); None of any other."""
    found = []
    for i, x in enumerate(map(sympy.expand, access.index)):
        a, b = x.coeff(var(p)), x.coeff(var(m))
        rest = sympy.expand(x - a * var(p) - b * var(m))
        if rest.has(Access) or {p, m} & free_vars(rest):
            return None
        if a != 0 or b != 0:
            found.append((i, a, b))
    if len(found) != 1 or not all(x.is_Integer and x != 0 for x in found[0][1:]):
        return None
    ((at, a, b),) = found
    return at, int(a), int(b)


def factor_of(score: Statement, e: str) -> Expr:
    """What the score is multiplied by beyond the product along `e`."""
    factor = score.expr / sympy.Mul(*(a for a in accesses(score.expr) if e in free_vars(a)))
    return sympy.Integer(1) if factor.is_number and float(factor) == 1 else factor


def spread(s: Statement) -> Statement:
    """A number in front of a sum joins the numbers of its terms."""
    number, rest = s.expr.as_independent(Access, *s.expr.free_symbols, as_Add=False)
    if s.monoid is not None or not rest.is_Add:
        return s
    return replace(s, expr=sympy.Add(*(number * t for t in rest.args)))


@lru_cache(maxsize=64)
def _in_base2(
    shape: Form,
) -> tuple[tuple[Statement, ...], tuple[Statement, ...], tuple[Statement, ...], tuple[Expr | None, ...]]:
    """The statements between, the scores, those after the loop, and the sums' rescaling factors, with exponentials
    in base 2; the factors travel as statements."""
    body = (*(x.score for x in shape.products), *shape.statements)
    for i, total in enumerate(shape.sums):
        if total.rescale is not None:
            ranks = tuple(r for r in total.state.ranks if r != total.f)
            body = (*body, Statement(f"rescale {i}", ranks, total.rescale))
    loop = base2(replace(shape.loop, body=body, states=shape.states), _unit(shape))
    made = {s.name: s for s in loop.body}
    rescales = tuple(made[f"rescale {i}"].expr if f"rescale {i}" in made else None for i in range(len(shape.sums)))
    rest = tuple(s for s in loop.body if not s.name.startswith("rescale ") and s.name not in shape.scores)
    scores = []
    for x in shape.products:
        score = made[x.score.name]
        factor = factor_of(score, x.e)
        if factor.is_number and score.fill is None:  # it joins the numbers of whatever reads the score
            score = replace(score, expr=score.expr / factor)
            scaled = {a: factor * a for s in rest for a in s.reads if a.tensor == score.name}
            rest = tuple(replace(s, expr=s.expr.xreplace(scaled)) for s in rest)
        scores.append(score)
    rest = row_terms_apart(rest, shape.p, shape.m)
    return tuple(map(spread, rest)), tuple(scores), loop.epilogue, rescales


def _unit(shape: Form) -> Expr | None:
    """What a modified score `c*score + ...` is kept in: c times the score's own factor, so that adding to it is one
    multiply-add for each point. None: what `base2` chooses."""
    units = {_unit_of(shape, x.score, x.e) for x in shape.products}
    return units.pop() if len(units) == 1 else None


def _unit_of(shape: Form, score: Statement, e: str) -> Expr | None:
    access = Access(score.name, *map(var, score.ranks))
    readers = [s for s in shape.statements if access in s.reads]
    number = factor_of(score, e)
    if len(readers) != 1 or not readers[0].expr.is_Add or not number.is_number:
        return None
    unit = number * readers[0].expr.coeff(access)
    rest = readers[0].expr - readers[0].expr.coeff(access) * access
    return unit if unit.is_number and unit.is_positive and not rest.has(access) else None
