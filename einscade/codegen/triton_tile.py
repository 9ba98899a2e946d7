"""What happens on one tile of a Triton kernel: loads, statements, products, masks, stores.

Comes in: the statements of a `TileLoop` in base 2. Goes out: lines of code, into the kernel itself or into its step
function, whichever is being written. `triton_kernel` arranges them into a loop.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.base2 import base2
from einscade.codegen.loops import SerialNest
from einscade.codegen.matmul import Contraction, contraction
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import State, Statement, TileLoop, tile_loop
from einscade.codegen.triton_rows import boxed, find_columns, find_rows, starts_of
from einscade.codegen.triton_values import (
    Block,
    Lines,
    Local,
    Memory,
    TritonScope,
    Value,
    align,
    aligned,
    scalar,
    value,
)
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, Mod, accesses, free_vars, var
from einscade.ir.text import print_einsum

__all__ = ["TileWriter"]

TRITON_DTYPES: Mapping[str, str] = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8e4m3": "float8e4nv", "f8e5m2": "float8e5",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "int1",
}  # fmt: skip
_HALF = ("bf16", "f16")
_LONGEST_INDEX = 32  # characters of an index that are written where it is used
_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f8e4m3": 1, "f8e5m2": 1, "i32": 4, "i16": 2, "i8": 1, "u8": 1}


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


class TileWriter:
    """Writes statements of one nest's tile form as Triton code."""

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
        return any(t.dtype in _HALF for t in self.cascade.inputs)

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
        for i, v, stride, extent in zip(access.index, indices, memory.strides, memory.extents, strict=True):
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
                continue
            address += term
            if self.is_inside(i, extent):
                continue
            if len(v.ranks) == 1 and v.ranks[0] in self.loop.coordinates and moving:
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

    # -- statements --

    def comment(self, s: Statement) -> None:
        if s.source is not None:
            for line in textwrap.wrap(print_einsum(s.source), 112, subsequent_indent="  "):
                self.here(f"# {line}")

    def evaluate(self, s: Statement, into: str | None = None) -> Value:
        if s.monoid is None:
            return value(s.expr, self.scope)
        if (c := self.as_dot(s)) is not None:
            return self.dot(c, s, into)
        operand = value(s.expr, self.scope)
        if operand.kind == "b":
            operand = Value(f"({operand.code}).to(tl.int32)", operand.ranks, "i")
        if s.mask_operand:
            operand = self.masked(operand, s.keep, s.identity)
        return self.reduced(operand, s)

    def reduced(self, operand: Value, s: Statement) -> Value:
        calls = {"sum": "tl.sum", "max": "tl.max", "min": "tl.min"}
        if s.monoid not in calls:
            raise Unsupported(f"the reduction {s.monoid}")
        code, ranks = operand.code, operand.ranks
        for r in s.reduced:
            if r not in ranks:
                raise Unsupported(f"{s.name} reduces over {r}, which its terms do not depend on")
            block = self.scope.blocks[r]
            if block.limit is not None and s.identity is not None:
                inside = align(Value(f"({block.index} < {block.limit})", (r,)), ranks)
                code = f"tl.where({inside}, {code}, {value(s.identity, self.scope).code})"
            code = f"{calls[s.monoid]}({code}, {ranks.index(r)})"
            ranks = tuple(x for x in ranks if x != r)
        return Value(code, ranks, operand.kind)

    def as_dot(self, s: Statement) -> Contraction | None:
        """The statement as one product of two matrices, if it is one."""
        order = sorted(self.scope.blocks, key=lambda r: self.scope.order.index(self.scope.blocks[r].dim))
        c = contraction(s, tuple(order), frozenset(order)) if s.monoid == "sum" else None
        if c is None or c.batch:
            return None
        c = replace(c, rows=self.scope.dims(c.rows), columns=self.scope.dims(c.columns))
        return c if len(c.reduced) == len(c.rows) == len(c.columns) == 1 else None

    def dot(self, c: Contraction, s: Statement, into: str | None = None) -> Value:
        """Operands in one dtype of the matrix unit; what was computed is rounded to that of what it meets."""
        left, right = (self.operand(e) for e in (c.left_expr, c.right_expr))
        if s.mask_operand:
            if set(self.scope.dims(free_vars(s.keep))) & {*c.rows}:
                left = self.masked_terms(left, s)
            else:
                right = self.masked_terms(right, s)
        left, right = self.together(left, right)
        a = self.turned(left, (*c.rows, *c.reduced))
        b = self.turned(right, (*c.reduced, *c.columns))
        precision = ""
        integers = left.kind == right.kind == "i"
        if left.dtype in (None, "float32") and not self.has_half() and not integers:
            self.check_single(c)
        if not integers and left.dtype in (None, "float32"):
            hip = self.schedule.target.startswith("hip")
            precision = ', input_precision="' + ("ieee" if hip else "tf32" if self.has_half() else "tf32x3") + '"'
        accumulate = f", {into}" if into and not integers else ""
        v = Value(f"tl.dot({a}, {b}{accumulate}{precision})", self.scope.sort(c.rows + c.columns))
        if integers:
            v = replace(v, code=f"{v.code}.to(tl.float32)")
        if c.rows + c.columns != v.ranks:
            v = replace(v, code=f"tl.trans({v.code})")
        if sympy.simplify(c.outer - 1) != 0:
            factor = value(c.outer, self.scope)
            ranks = self.scope.sort(v.ranks + factor.ranks)
            v = Value(f"{v.code} * {aligned(factor, ranks).tight(2)}", ranks, prec=2)
        return v

    def check_single(self, c: Contraction) -> None:
        """A float32 product is three of the matrix unit's, on operands split in registers."""
        wide = [r for r in (*c.reduced, *c.columns) if self.widths.get(r, 0) > 128]
        if wide:
            raise Unsupported(
                f"a float32 product over {wide[0]}, {self.widths[wide[0]]} wide: it would not stay on chip"
            )

    def masked_terms(self, v: Value, s: Statement) -> Value:
        """An operand as a variable that is 0 where a point is missing."""
        name = f"{s.name}_terms"
        self.here(f"{name} = {v.code}")
        self.here("if MASKED:" if self.in_step else "if True:")
        self.here.depth += 1
        masked = self.masked(Value(name, v.ranks, v.kind), s.keep, sympy.Integer(0))
        if masked.ranks != v.ranks:
            raise Unsupported(f"a mask over {masked.ranks} on the operand of {s.name}, which is over {v.ranks}")
        self.here(f"{name} = {masked.code}")
        self.here.depth -= 1
        return Value(name, v.ranks, v.kind, dtype=v.dtype)

    def operand(self, expr: Expr) -> Value:
        """A bare read keeps its storage dtype."""
        if isinstance(expr, Access) and expr.tensor not in self.scope.locals:
            return self.load(expr)
        return value(expr, self.scope)

    def together(self, a: Value, b: Value) -> tuple[Value, Value]:
        floats = [v.dtype for v in (a, b) if v.kind == "f" and v.dtype not in (None, "float32")]
        if a.kind == b.kind == "i" and a.dtype == b.dtype == "int8":
            return a, b
        halves = [TRITON_DTYPES[t.dtype] for t in self.cascade.inputs if t.dtype in _HALF]
        small = next((d for d in floats if d in ("bfloat16", "float16")), None)
        if small is None and floats and a.dtype == b.dtype:
            return a, b  # eight-bit floats as they are
        computed = a.dtype is None and b.dtype is None  # both from half-precision inputs: rounded as the weights are
        if (
            small is None
            and halves
            and (computed or any(v.kind == "i" or v.dtype not in (None, "float32") for v in (a, b)))
        ):
            small = halves[0]
        target = small or "float32"

        def cast(v: Value) -> Value:
            if v.dtype == target or (target == "float32" and v.kind == "f" and v.dtype is None):
                return v
            return Value(f"{v.tight()}.to(tl.{target})", v.ranks, "f", dtype=target)

        return cast(a), cast(b)

    def turned(self, v: Value, wanted: tuple[str, ...]) -> str:
        return v.code if v.ranks == wanted else f"tl.trans({v.code})"

    def masked(self, v: Value, predicate: Boolean, fill: Expr | None) -> Value:
        assert fill is not None
        keep = self.mask(predicate)
        ranks = self.scope.sort(v.ranks + keep.ranks)
        filler = value(fill, self.scope).code
        return Value(f"tl.where({align(keep, ranks)}, {align(v, ranks)}, {filler})", ranks, v.kind)

    def mask(self, predicate: Boolean) -> Value:
        if predicate not in self.masks:
            v = value(predicate, self.scope)
            if not v.ranks:
                return v
            name = "keep" if not self.masks else f"keep{len(self.masks)}"
            self.here(f"{name} = {v.code}")
            self.masks[predicate] = Value(name, v.ranks, "b")
        return self.masks[predicate]

    def define(self, s: Statement, v: Value) -> None:
        """Bind the value, in the accumulation dtype, with masks where this tile is masked."""
        code = v.code
        if v.dtype not in (None, "float32") and v.kind == "f":
            code = f"{v.tight()}.to(tl.float32)"
        self.here(f"{s.name} = {code}")
        ranks = v.ranks
        self.scope.locals[s.name] = Local(s.name, ranks, v.kind)
        if s.fill is None:
            return
        if self.in_step:
            self.here("if MASKED:")
            self.here.depth += 1
        masked = self.masked(Value(s.name, ranks, v.kind), s.row, s.fill)
        if masked.ranks != ranks:
            raise Unsupported(f"a mask over {masked.ranks} on {s.name}, which is over {ranks}")
        self.here(f"{s.name} = {masked.code}")
        if self.in_step:
            self.here.depth -= 1

    def store(self, s: Statement, v: Value) -> None:
        t = self.cascade.tensors[s.name]
        if s.row != sympy.true:
            v = self.masked(v, s.row, sympy.Integer(0))
        memory = self.scope.memory[s.name]
        inner = dict(self.loop.inner)
        ordered = self.scope.dims(inner.get(r, r) for r in t.ranks)
        base, address, conditions = memory.pointer, "", []
        for r, stride in zip(t.ranks, memory.strides, strict=True):
            x = inner.get(r, r)
            if x not in self.scope.blocks:
                base += f" + {r}.to(tl.int64) * {stride}"
                continue
            dim = (self.scope.blocks[x].dim,)
            index = Value(x, dim) if x not in inner.values() else Value(f"({x} - {self.loop.coordinate}_lo)", dim)
            wide = "" if x in self.widths else ".to(tl.int64)"
            address += f" + {align(index, ordered)}{wide} * {stride}"
            limit = self.scope.blocks[x].limit
            if limit is not None:
                conditions.append(align(Value(f"({x} < {limit})", dim), ordered))
        full = (
            v.code if set(v.ranks) == set(ordered) else f"tl.broadcast_to({align(v, ordered)}, {self.shape(ordered)})"
        )
        at = memory.pointer
        if base != memory.pointer:
            at = f"{memory.pointer}_at"
            self.here(f"{at} = {base}")
        if full != s.name:
            self.here(f"{memory.pointer}_tile = {full}")
            full = f"{memory.pointer}_tile"
        mask = f", mask={' & '.join(conditions)}" if conditions else ""
        line = f"tl.store({at}{address}, {full}.to({memory.pointer}.dtype.element_ty){mask})"
        if len(line) + 4 * self.here.depth <= 116:
            self.here(line)
            return
        self.here("tl.store(")
        self.here(f"    {at}{address},")
        self.here(f"    {full}.to({memory.pointer}.dtype.element_ty){mask},")
        self.here(")")

    def shape(self, ranks: Iterable[str]) -> str:
        return "[" + ", ".join(map(self.size, ranks)) + "]"

    def size(self, dim: str) -> str:
        return next(b.size for b in self.scope.blocks.values() if b.dim == dim)

    def statements(self, statements: tuple[Statement, ...]) -> None:
        updates = {v.new: v for v in self.loop.states} if self.in_step else {}
        fused = self.fused(statements) if self.in_step else {}
        for s in statements:
            if s.name in fused.values():
                continue
            self.comment(s)
            if s.name in fused:
                self.accumulate(s, next(x for x in statements if x.name == fused[s.name]))
            elif s.name in self.nest.outputs:
                v = self.evaluate(s)
                read = any(a.tensor == s.name for x in (*statements, *self.loop.epilogue) for a in x.reads)
                if read:  # by another name: its own is the pointer's
                    made = replace(s, name=f"{s.name}_made")
                    self.define(made, v)
                    local = self.scope.locals[s.name] = self.scope.locals.pop(made.name)
                    v = Value(local.code, local.ranks, local.kind)
                self.store(s, v)
            else:
                v = self.evaluate(s)
                if s.name in updates:
                    v = self.spread(v, self.state_ranks(updates[s.name]))
                self.define(s, v)

    def fused(self, statements: tuple[Statement, ...]) -> dict[str, str]:
        """State updates that end in adding a contraction, with its name: the matrix unit adds for free."""
        found: dict[str, str] = {}
        for state in self.loop.states:
            update = next(s for s in statements if s.name == state.new)
            for t in sympy.Add.make_args(update.expr):
                if not isinstance(t, Access):
                    continue
                made = next((s for s in statements if s.name == t.tensor), None)
                users = [s for s in statements for a in s.reads if made is not None and a.tensor == made.name]
                if made is None or made.fill is not None or len(users) != 1:
                    continue
                c = self.as_dot(made)
                if c is not None and c.outer == 1:
                    found[update.name] = made.name
        return found

    def accumulate(self, update: Statement, made: Statement) -> None:
        term = next(t for t in sympy.Add.make_args(update.expr) if isinstance(t, Access) and t.tensor == made.name)
        state = next(v for v in self.loop.states if v.new == update.name)
        self.here(f"{update.name} = {self.spread(value(update.expr - term, self.scope), self.state_ranks(state)).code}")
        self.comment(made)
        v = self.evaluate(made, into=update.name)
        if f", {update.name}" not in v.code:  # integers are converted before they are added
            v = Value(f"{update.name} + {v.code}", v.ranks)
        self.here(f"{update.name} = {v.code}")
        self.scope.locals[update.name] = Local(update.name, v.ranks)

    def state_ranks(self, state: State) -> tuple[str, ...]:
        return self.scope.dims(state.ranks)

    def spread(self, v: Value, ranks: tuple[str, ...]) -> Value:
        if v.ranks == ranks != ():
            return v
        if not ranks:  # a scalar that the loop carries has a type from the start
            return Value(
                f"tl.full([], {v.code}, tl.float32)" if v.kind == "i" or v.code.startswith("float(") else v.code
            )
        if not v.ranks and re.fullmatch(r'-?[\d.]+(e-?\d+)?|float\(".*"\)', v.code):
            return Value(f"tl.full({self.shape(ranks)}, {v.code}, tl.float32)", ranks)
        if v.ranks:
            return Value(f"tl.broadcast_to({align(v, ranks)}, {self.shape(ranks)})", ranks, v.kind)
        return Value(f"tl.full({self.shape(ranks)}, 0.0, tl.float32) + {v.tight(3)}", ranks, v.kind)
