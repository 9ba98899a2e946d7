"""The tile of a Triton kernel and what it reads: ranks as dimensions, sizes, loads by address or descriptor.

Comes in: the nest of a kernel and its schedule. Goes out: `LoadWriter`, on which `triton_tile` builds; lines of code
for the loads, into the kernel itself or into its step function, whichever is being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.base2 import base2
from einscade.codegen.loops import SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import TileLoop, tile_loop
from einscade.codegen.triton_rows import boxed, find_columns, find_rows, starts_of
from einscade.codegen.triton_values import (
    Block,
    Lines,
    Memory,
    TritonScope,
    Value,
    aligned,
    scalar,
    value,
)
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, Mod, accesses, free_vars, var
from einscade.ir.intervals import is_inside
from einscade.passes.terms import reads_by_choice

__all__ = ["HALF", "TRITON_DTYPES", "LoadWriter"]

TRITON_DTYPES: Mapping[str, str] = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8e4m3": "float8e4nv", "f8e5m2": "float8e5",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "int1",
}  # fmt: skip
HALF = ("bf16", "f16")
_LONGEST_INDEX = 32  # characters of an index that are written where it is used
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "f8e5m2": 1, "i32": 4, "i16": 2, "i8": 1, "u8": 1}


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


class LoadWriter:
    """One nest's tile as Triton code: its names and sizes, and what it reads."""

    def __init__(self, cascade: Cascade, nest: SerialNest, schedule: Schedule, name: str) -> None:
        self.cascade, self.nest, self.schedule, self.name = cascade, nest, schedule, name
        self.step_name = name.replace("_kernel", "_step")
        self.known = {var(s): sympy.Integer(n) for s, n in schedule.tiles}
        self.rows, self.columns = find_rows(cascade, nest, schedule), find_columns(cascade, nest)
        loop = base2(tile_loop(cascade, nest, clip=False))
        self.step_size = self.step_extent(loop)
        self.starts = starts_of(self.rows, loop.coordinates, loop.coordinate, self.step_size)
        self.loop = boxed(loop, self.starts, schedule.multiples)
        self.check()
        self.main, self.step = Lines(), Lines()
        self.here = self.main
        self.in_step = False
        self.loads: dict[tuple[bool, Access], Value] = {}
        self.load_names: dict[str, int] = {}
        self.described: dict[str, tuple[int, ...]] = {}
        self.edge_names: dict[tuple[Expr, str], str] = {}
        self.edge_lines: list[str] = []
        self.index_names: dict[tuple[bool, Expr], str] = {}
        self.edge_counts: dict[str, int] = {}
        self.data_names: set[str] = set()
        self.masks: dict[Boolean, Value] = {}
        self.points = [r for r in nest.grid if r not in (*self.row_names(), *self.columns)]
        self.widths = self.find_widths()
        self.scope = self.make_scope()

    # -- what is what --

    def check(self) -> None:
        dtypes = {t.dtype for t in self.cascade.inputs} | {t.dtype for t in self.cascade.tensors.values()}
        if "f64" in dtypes:
            raise Unsupported("float64")
        if "i4" in dtypes:
            raise Unsupported("packed 4-bit integers")
        for s in self.loop.states:
            if s.name in self.nest.outputs:
                raise Unsupported(f"every value of the scan {s.name} is asked for")

    def number(self, expr: Expr, what: str) -> int:
        expr = expr.xreplace(self.known)
        if not expr.is_Integer:
            raise Unsupported(f"{what} is {expr}, only known at run time")
        return int(expr)

    def find_widths(self) -> dict[str, int]:
        used = dict.fromkeys(r for s in self.loop.statements for r in s.iterated)
        inner = [r for r in used if r not in self.nest.grid and r not in self.loop.coordinates]
        return {r: self.number(self.cascade.extent(r), f"rank {r}, which a program holds whole,") for r in inner}

    def step_extent(self, loop: TileLoop) -> int:
        if not loop.coordinates:
            return 1
        size = self.number(loop.step, "the tile of the serial rank")
        if size & (size - 1) or size < 16:
            raise Unsupported(f"a tile of {size} along {self.nest.serial}: Triton needs a power of two from 16")
        return size

    def make_scope(self) -> TritonScope:
        blocks: dict[str, Block] = {}
        if self.rows is not None:
            for i, r in enumerate(self.rows.ranks):  # all but the outermost are cut off by what they are divided by
                whole = f"{r}_hi" if self.rows.padded else self.host(self.cascade.extent(r))
                blocks[r] = Block(r, str(self.rows.size), None if i else whole, self.rows.dim)
        for r, n in self.columns.items():
            blocks[r] = Block(r, str(n), self.host(self.cascade.extent(r)), r)
        for x in self.loop.coordinates:
            blocks[x] = Block(x, str(self.step_size), None, x)
        for r, n in self.widths.items():
            blocks[r] = Block(r, str(_power(n)), None if _power(n) == n else str(n), r)
        sizes = {s: str(n) for s, n in self.schedule.tiles if s not in self.cascade.rank_table}
        points = {r: r for r in (*self.points, self.nest.serial)} | sizes
        memory = {}
        for name in dict.fromkeys((*self.nest.inputs, *self.inherited(), *self.nest.outputs)):
            t = self.cascade.tensors[name]
            strides = tuple(f"{name}_{r}" for r in t.ranks)
            extents = tuple(self.host(self.cascade.extent(r)) for r in t.ranks)
            memory[name] = Memory(name, strides, extents, t.dtype)
        order = (*((self.rows.dim,) if self.rows else ()), *self.columns, *self.loop.coordinates, *self.widths)
        return TritonScope(order, points, blocks, memory, {}, "float32", self.load)

    def row_names(self) -> tuple[str, ...]:
        return self.rows.ranks if self.rows else ()

    def inherited(self) -> list[str]:
        """Tensors that only conditions read which the nest's points inherit from those of another nest."""
        made = {e.name for e in self.nest.einsums}
        read = {a.tensor for s in self.loop.statements for x in (s.keep, s.row) for a in accesses(x)}
        return [t for t in self.cascade.tensors if t in read - made]

    def host(self, expr: Expr) -> str:
        """A size as kernel code."""
        return scalar(expr.xreplace(self.known), {})

    def has_half(self) -> bool:
        return any(t.dtype in HALF for t in self.cascade.inputs)

    def size(self, dim: str) -> str:
        return next(b.size for b in self.scope.blocks.values() if b.dim == dim)

    # -- loads --

    def moves(self, expr: Expr) -> bool:
        return bool(free_vars(expr) & {*self.loop.coordinates, f"{self.loop.coordinate}_lo", self.nest.serial})

    def load(self, access: Access) -> Value:
        """A variable with what memory holds at the access; one that does not move is loaded before the loop."""
        moving = self.in_step and any(self.moves(i) for i in access.index)
        key = (moving, access)
        if key in self.loads:
            return self.loads[key]
        here = self.here
        if self.in_step and not moving:
            self.here = self.main
        count = self.load_names.get(access.tensor, 0)
        self.load_names[access.tensor] = count + 1
        name = f"{access.tensor}_tile{count or ''}"
        v = self.emit_load(access, name, moving)
        self.here = here
        self.loads[key] = v
        return v

    def emit_load(self, access: Access, name: str, moving: bool) -> Value:
        memory = self.scope.memory[access.tensor]
        t = self.cascade.tensors[access.tensor]
        kind = "b" if t.dtype == "bool" else "i" if t.dtype[0] in "iu" else "f"
        dtype = TRITON_DTYPES[t.dtype]
        indices = [self.named(i, value(i, self.scope), moving) for i in access.index]
        ranks = self.scope.sort(r for v in indices for r in v.ranks)
        base, address, conditions = memory.pointer, "", []
        for r, i, v, stride, extent in zip(
            t.ranks, access.index, indices, memory.strides, memory.extents, strict=True
        ):
            if v.code == "0":
                continue
            code = aligned(v, ranks)
            if v.code.isdigit() or self.is_width(i):
                term = f" + {code.tight(2)} * {stride}"
            elif not v.ranks and self.moves(i):  # the loop's variable may be no tensor
                term = f" + tl.cast({v.code}, tl.int64) * {stride}"
            else:
                term = f" + {code.tight()}.to(tl.int64) * {stride}"
            if not v.ranks:
                base += term
                if not self.stays_inside(i, self.cascade.extent(r)):
                    conditions.append(f"({v.within(extent, i)})")
                continue
            address += term
            if self.is_inside(i, extent):
                continue
            if access in self.chosen and not self.stays_inside(i, self.cascade.extent(r)):
                inside = Value(v.within(extent, i), v.ranks, prec=4)
            elif len(v.ranks) == 1 and v.ranks[0] in self.loop.coordinates and moving:
                inside = Value(self.edge(i, v, extent), v.ranks)
            elif not isinstance(i, sympy.Symbol):
                inside = Value(v.within(extent, i), v.ranks, prec=4)
            elif (limit := self.scope.blocks[i.name].limit) is not None:
                inside = Value(f"{v.code} < {limit}", v.ranks, prec=4)
            else:
                continue
            conditions.append(aligned(inside, ranks).tight())
        depth = self.here.depth
        if moving and self.descriptor(access, ranks, name):
            self.here("else:")
            self.here.depth += 1
        at = memory.pointer
        if base != memory.pointer:
            at = f"{name.replace('_tile', '_at')}"
            self.here(f"{at} = {base}")
        mask = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        line = f"{name} = tl.load({at}{address}{mask})"
        if len(line) + 4 * self.here.depth > 116 and mask:
            self.here(f"{name} = tl.load(")
            self.here(f"    {at}{address},")
            self.here(f"    {mask[2:]},")
            self.here(")")
        else:
            self.here(line)
        self.here.depth = depth
        if kind == "b":
            return Value(f"({name} != 0)", ranks, "b")
        return Value(name, ranks, kind, dtype=dtype)

    def named(self, index: Expr, v: Value, moving: bool) -> Value:
        """A long index as a variable, which the loads that share it share."""
        if len(v.code) <= _LONGEST_INDEX or v.code.isidentifier():
            return v
        key = (moving, index)
        if key not in self.index_names:
            self.index_names[key] = "place" + (str(len(self.index_names)) if self.index_names else "")
            self.here(f"{self.index_names[key]} = {v.code}")
        return Value(self.index_names[key], v.ranks, v.kind)

    def edge(self, index: Expr, v: Value, extent: str) -> str:
        """The variable that says which of the tile's indices are inside the tensor; all are, in a full tile."""
        key = (index, extent)
        if key not in self.edge_names:
            name = f"{self.loop.coordinate}_there" + (str(len(self.edge_names)) if self.edge_names else "")
            inside = v.within(extent, index)
            line = f"{name} = ({inside}) if MASKED else tl.full([{self.step_size}], True, tl.int1)"
            if isinstance(index, sympy.Symbol):
                self.edge_lines.append(f"    {line}")
            else:  # what the index is made of is loaded here
                self.here(line)
            self.edge_names[key] = name
        return self.edge_names[key]

    def is_inside(self, index: Expr, extent: str) -> bool:
        """Whether an index cannot leave its dimension: the rest of a division by its length."""
        x = self.loop.coordinate
        place = var(x) - var(f"{x}_lo") if x is not None else sympy.Integer(0)
        return any(isinstance(i, Mod) and str(i.args[1]) == extent for i in (index, index - place))

    @cached_property
    def chosen(self) -> frozenset[Access]:
        """What only the points read for which a condition chooses it."""
        loop = self.loop
        return reads_by_choice(x for s in (*loop.prologue, *loop.body, *loop.epilogue) for x in (s.expr, s.keep))

    def stays_inside(self, index: Expr, extent: Expr) -> bool:
        """Whether an index is proved to be in its dimension for all of a tile's ranks, be there a point or not."""
        whole = (*self.points, *self.row_names(), *self.columns, *self.widths, self.nest.serial)
        ends = {r: self.cascade.extent(r) - 1 for r in whole if r}
        if self.loop.limit is not None:
            ends |= dict.fromkeys(self.loop.coordinates, self.loop.limit - 1)
        ends |= {f"{r}_lo": self.cascade.extent(r) - 1 for r in (*self.row_names(), *self.columns)}
        ends |= {f"{x}_lo": var(f"{x}_end") for x in self.loop.coordinates}  # nothing is known of it
        ranges = {r: (sympy.Integer(0), end) for r, end in ends.items()}
        return is_inside(index, extent, ranges)

    def is_width(self, index: Expr) -> bool:
        return isinstance(index, sympy.Symbol) and index.name in self.widths

    def descriptor(self, access: Access, ranks: tuple[str, ...], name: str) -> bool:
        """The load through the copy engine, where the access is a box whose innermost dimension is a width."""
        t = self.cascade.tensors[access.tensor]
        last = access.index[-1]
        width = self.widths.get(last.name) if isinstance(last, sympy.Symbol) else None
        if (
            not self.schedule.descriptors
            or self.rows is None
            or width is None
            or t.dtype not in _BYTES
            or width * _BYTES[t.dtype] % 16
            or len(access.index) > 5
            or len(ranks) != 2
            or not all(self.is_like(access, other) for other in self.reads_of(access.tensor))
        ):
            return False
        starts, block, order = [], [], []
        for i in access.index:
            moving = [s for s in sympy.Add.make_args(i) if s.is_Symbol and s.name in self.scope.blocks]
            rest = i - moving[0] if moving else i
            if len(moving) > 1 or free_vars(rest) & {*self.scope.blocks}:
                return False
            if not moving:
                starts.append(self.start(rest))
                block.append(1)
            elif moving[0].name in self.loop.coordinates:
                starts.append(self.start(rest + var(f"{self.loop.coordinate}_lo")))
                block.append(self.step_size)
            elif rest == 0 and (moving[0].name in self.widths or self.columns):
                starts.append("0" if moving[0].name in self.widths else f"{moving[0]}_lo")
                block.append(int(self.scope.blocks[moving[0].name].size))
            else:
                return False
            order += [s.name for s in moving]
        if tuple(order) != ranks or max(block) > 256 or self.described.get(access.tensor, tuple(block)) != tuple(block):
            return False
        self.described[access.tensor] = tuple(block)
        shape = ", ".join(self.size(r) for r in ranks)
        self.here(f"if {access.tensor}_TMA:")
        self.here(f"    {name} = {access.tensor}.load([{', '.join(starts)}]).reshape({shape})")
        return True

    def start(self, index: Expr) -> str:
        """Where a box begins along a dimension: in 32 bits, also where a table's entries have 64."""
        code = self.index_names.get((True, index)) or value(index, self.scope).code
        wide = any(self.cascade.tensors[a.tensor].dtype == "i64" for a in accesses(index))
        return f"tl.cast({code}, tl.int32)" if wide else code

    def reads_of(self, tensor: str) -> set[Access]:
        loop = self.loop
        return {a for s in (*loop.prologue, *loop.body, *loop.epilogue) for a in s.reads if a.tensor == tensor}

    def is_like(self, a: Access, b: Access) -> bool:
        """Whether two reads of a tensor take boxes that differ in where they begin alone, and not along a width: then a
        descriptor serves both."""
        blocks = {*self.scope.blocks}
        pairs = zip(a.index, b.index, strict=True)
        return all(x == y or not (free_vars(x) & {*self.widths} or free_vars(x - y) & blocks) for x, y in pairs)
