"""What the Gluon emitter knows before it writes: names, sizes, reads by address, which iterations are masked.

Comes in: a `Form` and a `Schedule`. Goes out: a `Plan`, whose methods the writers share. Raises `Unsupported` where the
schedule's tiles fit neither shared memory nor registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from einscade.codegen.base2 import base2
from einscade.codegen.gluon_bounds import bounds
from einscade.codegen.gluon_form import Form
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, free_vars, var

__all__ = ["GROUP_ROWS", "REGISTERS", "Load", "Plan", "factor_of"]

GROUP_ROWS = 64
"""Rows of a warpgroup: those of one warpgroup_mma instruction."""

SHARED = 226 << 10
REGISTERS = {1: 240, 2: 240, 3: 160}
"""Registers a thread of each consumer may use, by the number of warpgroups; the loading warp gets 24."""

RESERVED = frozenset({
    "gl", "gluon", "torch", "tma", "mbarrier", "run", "kernel", "load", "weigh", "advance", "compute", "group", "tile",
    "stage", "phase", "first", "end", "full_first", "full_end", "weights", "keep", "programs", "row", "finite", "tanh",
    "reciprocal", "row_max", "row_min", "row_sum", "row_parts", "tile_map", "MASKED", "ROWS", "COLUMNS",
})  # fmt: skip  # fmt: skip


def padded(width: int) -> int:
    return max(32, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Load:
    """A read of an input that is not an operand of a product; `name` is its variable if it is read before the loop."""

    access: Access
    name: str | None


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
        self.columns, self.stages = columns, max(1, schedule.stages)
        self.e, self.f = padded(shape.width(shape.e)), padded(shape.width(shape.f))
        self.shares = self.e == self.f and shape.dtype == self.dtype(shape.result.tensor)
        self._check_fit()
        self.statements, self.score, self.epilogue, self.rescale = self._in_base2()
        self.factor = factor_of(self.score, shape.e)
        self.bounds = bounds(shape.keep, shape.m, shape.p, var("row"), self.rows, self.columns)
        self.used: set[str] = set()
        self.loads = self._loads()
        self.sizes = self._sizes()

    def dtype(self, tensor: str) -> str:
        return self.cascade.tensors[tensor].dtype

    def name(self, tensor: str) -> str:
        taken = tensor in RESERVED or tensor in self.cascade.symbols or tensor in self.cascade.rank_table
        return f"{tensor}_" if taken else tensor

    def _check_fit(self) -> None:
        tiles = self.stages * self.columns * (self.e + self.f) * 2
        tiles += self.rows * (self.e if self.shares else self.e + self.f) * 2
        if tiles + 1024 > SHARED:
            raise Unsupported(f"{tiles} bytes of tiles do not fit in {SHARED} bytes of shared memory")
        if self.f // 2 + self.columns * 3 // 4 + 32 > REGISTERS[self.groups]:
            raise Unsupported(f"tiles of {self.columns} by {self.f} do not fit in {REGISTERS[self.groups]} registers")

    def _in_base2(self) -> tuple[tuple[Statement, ...], Statement, tuple[Statement, ...], Expr | None]:
        """The statements with exponentials in base 2; the rescaling factor travels as one of them."""
        shape = self.shape
        body = (shape.score, *shape.statements)
        if shape.rescale is not None:
            ranks = tuple(r for r in shape.accumulator.ranks if r != shape.f)
            body = (*body, Statement("rescale", ranks, shape.rescale))
        loop = base2(replace(shape.loop, body=body, states=shape.states), self._unit())
        statements = {s.name: s for s in loop.body}
        rescale = statements["rescale"].expr if shape.rescale is not None else None
        score = statements[shape.score.name]
        rest = tuple(s for s in loop.body if s.name not in ("rescale", score.name))
        factor = factor_of(score, shape.e)
        if factor.is_number and score.fill is None:  # it joins the numbers of whatever reads the score
            both = score.expr / factor
            scaled = {a: factor * a for s in rest for a in s.reads if a.tensor == score.name}
            rest = tuple(replace(s, expr=s.expr.xreplace(scaled)) for s in rest)
            score = replace(score, expr=both)
        return tuple(map(spread, rest)), score, loop.epilogue, rescale

    def _unit(self) -> Expr | None:
        """What a modified score `c*score + ...` is kept in: c times the score's own factor, so that adding to it is one
        multiply-add for each point. None: what `base2` chooses."""
        shape = self.shape
        access = Access(shape.score.name, *map(var, shape.score.ranks))
        readers = [s for s in shape.statements if access in s.reads]
        number = factor_of(shape.score, shape.e)
        if len(readers) != 1 or not readers[0].expr.is_Add or not number.is_number:
            return None
        unit = number * readers[0].expr.coeff(access)
        rest = readers[0].expr - readers[0].expr.coeff(access) * access
        return unit if unit.is_number and unit.is_positive and not rest.has(access) else None

    def _loads(self) -> tuple[Load, ...]:
        """Other inputs: an element or a row is read before the loop, the rest in it."""
        shape = self.shape
        operands = {shape.queries.tensor, shape.keys.tensor, shape.values.tensor}
        found: dict[Access, None] = {}
        for s in (*self.statements, *self.epilogue, self.score):
            exprs = (self.factor, s.keep) if s is self.score else (s.expr, s.keep, s.row)
            for expr in exprs:
                for a in accesses(expr):
                    if a.tensor in shape.loop.nest.inputs:
                        found[a] = None
        for a in found:
            if a.tensor in operands:
                raise Unsupported(f"{a.tensor} is an operand of a product and read elsewhere")
            if self.cascade.tensors[a.tensor].layout.kind != "dense" or shape.f in free_vars(a):
                raise Unsupported(f"{a} is read where the kernel does not")
        loads = []
        for i, a in enumerate(sorted(found, key=sympy.default_sort_key)):
            moves = (
                shape.m in free_vars(a)
                or a.has(*(x for x in accesses(a) if x != a and x.tensor == ""))
                or any(x != a for x in accesses(a))
            )
            loads.append(Load(a, None if moves else f"{self.name(a.tensor)}_at{i}"))
        return tuple(loads)

    def _pointers(self) -> list[str]:
        """Arguments for tensors read or written by address: the pointer and a stride for each dimension."""
        read = [a for t in dict.fromkeys(x.access.tensor for x in self.loads) for a in self._pointer(t, self.name(t))]
        return read + [a for t in self._row_results() for a in self._pointer(t, f"{self.name(t)}_to")]

    def _pointer(self, tensor: str, name: str) -> list[str]:
        return [name, *(f"{name}_{i}" for i in range(len(self.cascade.tensors[tensor].ranks)))]

    def _row_results(self) -> list[str]:
        return [r for r in self.shape.results if r != self.shape.result.tensor]

    def _sizes(self) -> list[str]:
        """Symbols that the kernel needs: in extents of the grid, bounds, predicates and expressions."""
        shape = self.shape
        tiles = set(dict(self.schedule.tiles))
        names: set[str] = set()
        for r in (shape.p, *shape.batch):
            names |= free_vars(shape.extent(r))
        for s in (*self.statements, *self.epilogue, self.score):
            names |= free_vars(s.expr) | free_vars(s.keep) | free_vars(s.row)
        return [s for s in self.cascade.symbols if s in names and s not in tiles]

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

    def _is_static(self) -> bool:
        """Whether it is known, where the code is made, which iterations are masked."""
        return not self._classes() or not (self.bounds.upper or self.bounds.lower)

    def _masked_argument(self) -> str:
        return "MASKED: gl.constexpr" if self._is_static() else "MASKED"

    def _state_names(self) -> list[str]:
        return [self.name(s.name) for s in self.shape.states]

    def _barriers(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        return [f"{q}_full", f"{k}_full", f"{k}_empty", f"{v}_full", f"{v}_empty"]

    def _tiles(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        return [f"{q}_tile", f"{k}_tiles", f"{v}_tiles"]

    def _context(self) -> list[str]:
        """What the elementwise part reads besides the scores and the running values."""
        hoisted = [x.name for x in self.loads if x.name is not None]
        tensors = dict.fromkeys(x.access.tensor for x in self.loads if x.name is None)
        moving = [a for t in tensors for a in self._pointer(t, self.name(t))]
        return [self.shape.p + "_", *self.shape.batch, *hoisted, *moving, *self.sizes]


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
