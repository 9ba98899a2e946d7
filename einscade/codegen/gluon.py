"""The Gluon emitter: a loop program as a warp-specialised kernel for Hopper (compute capability 9.0).

Comes in: a `LoopProgram` with one serial nest (`gluon_form`) and a `Schedule`. Goes out: `Source` in "triton", a
module that imports on its own. One warp keeps the copy engine busy with a ring of tiles of the two moving operands;
each of two or three warpgroups owns 64 rows and runs the loop: the product of the next scores is issued before the
last weights meet their values, so that the elementwise part of one tile hides behind the tensor cores' work on
another, and the warpgroups take turns at issuing, so that they do not do the same thing at the same time.

Schedule: the tile of the long row rank is 64 a warpgroup; the serial tile is the ring's; `stages` is its depth.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.base2 import base2
from einscade.codegen.gluon_bounds import Bounds, bounds
from einscade.codegen.gluon_form import Form, Operand, form
from einscade.codegen.gluon_values import HELPERS, Printer, Value
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.tiles import Finite, Statement
from einscade.codegen.torch_values import python
from einscade.ir.cascade import MONOIDS
from einscade.ir.expr import Access, Expr, FloorDiv, accesses, free_vars, var
from einscade.ir.text import print_einsum

__all__ = ["emit", "schedules"]

GROUP_ROWS = 64
"""Rows of a warpgroup: those of one warpgroup_mma instruction."""

SHARED = 226 << 10
REGISTERS = {1: 240, 2: 240, 3: 160}
"""Registers a thread of each consumer may use, by the number of warpgroups; the loading warp gets 24."""

_RESERVED = frozenset({
    "gl", "gluon", "torch", "tma", "mbarrier", "run", "kernel", "load", "weigh", "advance", "compute", "group", "tile",
    "stage", "phase", "first", "end", "full_first", "full_end", "weights", "keep", "programs", "row", "finite", "tanh",
    "reciprocal", "row_max", "row_min", "row_sum", "row_parts", "tile_map", "MASKED", "ROWS", "COLUMNS",
})  # fmt: skip

_IMPORTS = """
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""

_TORCH = {"bf16": "torch.bfloat16", "f16": "torch.float16", "f32": "torch.float32"}
_GLUON = {"bf16": "gl.bfloat16", "f16": "gl.float16", "f32": "gl.float32"}


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's module. Raises `Unsupported` where the nest or the schedule does not fit the kernel."""
    return Source("triton", _Module(form(program), schedule).text())


def schedules(program: LoopProgram) -> tuple[Schedule, ...]:
    """Schedules for the program, best guess first. Raises `Unsupported` as `emit` does.

    Two warpgroups with tiles of 128; three where both widths are at most 64 and nothing but the weights is computed
    point by point, which leaves registers for it.
    """
    shape = form(program)
    step = shape.loop.step
    points = [s for s in shape.statements if s.monoid is None and shape.m in s.ranks]
    narrow = max(shape.width(shape.e), shape.width(shape.f)) <= 64 and len(points) == 1
    wide = max(shape.width(shape.e), shape.width(shape.f)) > 128
    gathers = any(
        a.tensor in shape.loop.nest.inputs and {shape.p, shape.m} <= free_vars(a) for s in points for a in s.reads
    )
    space = [(3, 128, 2), (2, 128, 2)] if narrow else [(2, 64, 2)] if wide else [(2, 128, 2), (2, 64, 3)]
    if gathers:  # addresses take registers
        space = [(2, 64, 2 if wide else 3)]
    found = []
    for groups, columns, stages in space:
        tiles = {shape.p: groups * GROUP_ROWS}
        if isinstance(step, sympy.Symbol):
            tiles[step.name] = columns
        found.append(Schedule(tuple(sorted(tiles.items())), 4, stages, (), "cuda:90", True))
    return tuple(found)


def _padded(width: int) -> int:
    return max(32, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class _Load:
    """A read of an input that is not an operand of a product; `name` is its variable if it is read before the loop."""

    access: Access
    name: str | None


class _Module:
    """One module's text."""

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
        self.e, self.f = _padded(shape.width(shape.e)), _padded(shape.width(shape.f))
        self.shares = self.e == self.f and shape.dtype == self.dtype(shape.result.tensor)
        self._check_fit()
        self.statements, self.score, self.epilogue, self.rescale = self._in_base2()
        self.factor = _factor(self.score, shape.e)
        self.bounds = bounds(shape.keep, shape.m, shape.p, var("row"), self.rows, self.columns)
        self.used: set[str] = set()
        self.loads = self._loads()
        self.sizes = self._sizes()

    def dtype(self, tensor: str) -> str:
        return self.cascade.tensors[tensor].dtype

    def name(self, tensor: str) -> str:
        taken = tensor in _RESERVED or tensor in self.cascade.symbols or tensor in self.cascade.rank_table
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
        factor = _factor(score, shape.e)
        if factor.is_number and score.fill is None:  # it joins the numbers of whatever reads the score
            both = score.expr / factor
            scaled = {a: factor * a for s in rest for a in s.reads if a.tensor == score.name}
            rest = tuple(replace(s, expr=s.expr.xreplace(scaled)) for s in rest)
            score = replace(score, expr=both)
        return tuple(map(_spread, rest)), score, loop.epilogue, rescale

    def _unit(self) -> Expr | None:
        """What a modified score `c*score + ...` is kept in: c times the score's own factor, so that adding to it is one
        multiply-add for each point. None: what `base2` chooses."""
        shape = self.shape
        access = Access(shape.score.name, *map(var, shape.score.ranks))
        readers = [s for s in shape.statements if access in s.reads]
        number = _factor(shape.score, shape.e)
        if len(readers) != 1 or not readers[0].expr.is_Add or not number.is_number:
            return None
        unit = number * readers[0].expr.coeff(access)
        rest = readers[0].expr - readers[0].expr.coeff(access) * access
        return unit if unit.is_number and unit.is_positive and not rest.has(access) else None

    # -- what the kernel reads besides the operands --

    def _loads(self) -> tuple[_Load, ...]:
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
            loads.append(_Load(a, None if moves else f"{self.name(a.tensor)}_at{i}"))
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

    # -- text --

    def text(self) -> str:
        shape = self.shape
        body = [self._place(), self._load(), self._weigh(), self._advance(), self._compute(), self._kernel()]
        helpers = [HELPERS[h].strip("\n") for h in HELPERS if h in self.used]
        helpers += [_REDUCTIONS[h].strip("\n") for h in _REDUCTIONS if h in self.used]
        title = f"{self.cascade.name}: written by einscade for the cascade"
        doc = "\n".join("    " + line for line in str(self.cascade).splitlines())
        head = f'"""{title}\n\n{doc}\n"""\n{_IMPORTS}\n'
        swizzle_e, swizzle_f = min(128, self.e * 2), min(128, self.f * 2)
        constants = f"""
GROUPS = gl.constexpr({self.groups})  # warpgroups of 64 rows of {shape.p}
STEP = gl.constexpr({self.columns})  # of {shape.m}, an iteration
STAGES = gl.constexpr({self.stages})
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {self.columns}, 16]))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {self.f}, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, RESULT, 2))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES))
RESULT_ROW = gl.constexpr(gl.SliceLayout(1, RESULT))
TILE_{shape.e.upper()} = gl.constexpr(gl.NVMMASharedLayout({swizzle_e}, 16, 2))
TILE_{shape.f.upper()} = gl.constexpr(gl.NVMMASharedLayout({swizzle_f}, 16, 2))
""".strip("\n")
        parts = [
            constants,
            *helpers,
            _TURN.strip("\n") if self.groups > 1 else "",
            *body,
            _TILE_MAP.strip("\n"),
            self._run(),
        ]
        return head + "\n" + "\n\n\n".join(p for p in parts if p) + "\n"

    def _place(self) -> str:
        """Which tile of the grid a program has, and which tiles of the loop it visits."""
        shape, b = self.shape, self.bounds
        names = self._scalar_printer()
        lines = [
            f"row_tiles = gl.cdiv({names.value(shape.extent(shape.p)).code}, {self.rows})",
            "program = gl.program_id(0)",
        ]
        share = self._sharing()
        if share > 1:
            lines += [
                f"rest = program % ({share} * row_tiles)  # neighbours share what the loop reads",
                f"batch = program // ({share} * row_tiles) * {share} + rest % {share}",
                f"row_tile = rest // {share}",
            ]
        else:
            lines += ["batch = program // row_tiles", "row_tile = program % row_tiles"]
        if b.rising:
            lines.append("row_tile = row_tiles - 1 - row_tile  # the longest loops first")
        lines.append(f"row = row_tile * {self.rows}")
        rest = "batch"
        for r in reversed(shape.batch[1:]):
            extent = names.value(shape.extent(r)).atom()
            lines += [f"{r} = {rest} % {extent}", f"batch = {rest} // {extent}"]
        if shape.batch:
            lines.append(f"{shape.batch[0]} = {rest}")
        lines += [f"first = {names.value(b.first).code}", f"end = {names.value(b.end).code}"]
        lines.append("first = gl.minimum(first, end - 1)")
        if self._classes() and (b.upper or b.lower):
            assert b.full_first is not None
            assert b.full_end is not None
            lines.append(f"full_end = gl.maximum(gl.minimum({names.value(b.full_end).code}, end - 1), first)")
            if b.lower:
                full_first = names.value(b.full_first).code
                lines.append(f"full_first = gl.minimum(gl.maximum({full_first}, first), full_end)")
        places = ", ".join([*shape.batch, "row", *self._ends()])
        doc = f'"""The program\'s place in the grid, and the tiles of {shape.m} it visits: `first <= tile < end`."""'
        return _function("place", self.sizes, [doc, *lines, f"return {places}"])

    def _classes(self) -> bool:
        return self.bounds.full_end is not None

    def _ends(self) -> list[str]:
        """The names of the bounds that the loops use."""
        full = ["full_first"] if self.bounds.lower else []
        return ["first", "end", *([*full, *(["full_end"] if self.bounds.upper else [])] if self._classes() else [])]

    def _sharing(self) -> int:
        """How many neighbours along the innermost batch rank read the same keys."""
        if not self.shape.batch:
            return 1
        last = var(self.shape.batch[-1])
        shared = {x.args[1] for _, i in self.shape.keys.batch for x in i.atoms(FloorDiv) if x.args[0] == last}
        size = shared.pop() if len(shared) == 1 else sympy.Integer(1)
        extent = self.shape.extent(self.shape.batch[-1])
        return int(size) if size.is_Integer and extent.is_Integer and extent % size == 0 else 1

    def _coordinates(self, operand: Operand, row: str) -> str:
        printer = self._scalar_printer()
        index = {operand.row: row, operand.width: "0"} | {i: printer.value(x).code for i, x in operand.batch}
        order = self._order(operand)
        return f"[{', '.join(index[i] for i in order)}]"

    def _order(self, operand: Operand) -> list[int]:
        """Dimensions as the copy engine sees them: rows and width last."""
        return [*(i for i, _ in operand.batch), operand.row, operand.width]

    def _scalar_printer(self) -> Printer:
        def refuse(access: Access, _: Printer) -> Value:
            raise Unsupported(f"{access} decides which tile is read")

        return Printer((self.shape.p, self.shape.m), {}, {}, refuse)

    def _load(self) -> str:
        shape = self.shape
        q, k, v = (self.name(x.tensor) for x in (shape.queries, shape.keys, shape.values))
        lines = [
            f'"""The loading warp: all of a program\'s tiles of {q}, {k} and {v}, in the order they are read."""',
            *self._copy(k, f"{self._coordinates(shape.keys, f'(end - 1) * STEP')}", "0", wait=False),
            f"mbarrier.expect({q}_full, GROUPS * {q}_map.block_type.nbytes)",
            "for group in gl.static_range(GROUPS):",
            f"    at = {self._coordinates(shape.queries, f'row + group * {GROUP_ROWS}')}",
            f"    tma.async_copy_global_to_shared({q}_map, at, {q}_full, {q}_tile.index(group))",
            "stage = 0",
            "phase = 1",
            "for tile in range(end - 1 - first):",
            "    next_stage = stage + 1",
            "    next_phase = phase",
            "    if next_stage == STAGES:",
            "        next_stage = 0",
            "        next_phase = phase ^ 1",
            *_indent(
                self._copy(k, self._coordinates(shape.keys, "(end - 2 - tile) * STEP"), "next_stage", "next_phase")
            ),
            *_indent(self._copy(v, self._coordinates(shape.values, "(end - 1 - tile) * STEP"), "stage", "phase")),
            "    stage = next_stage",
            "    phase = next_phase",
            *self._copy(v, self._coordinates(shape.values, "first * STEP"), "stage", "phase"),
        ]
        return _function("load", self._load_arguments(), lines)

    def _copy(self, x: str, at: str, stage: str, phase: str = "", wait: bool = True) -> list[str]:
        return [
            *([f"mbarrier.wait({x}_empty.index({stage}), {phase})"] if wait else []),
            f"mbarrier.expect({x}_full.index({stage}), {x}_map.block_type.nbytes)",
            f"tma.async_copy_global_to_shared({x}_map, {at}, {x}_full.index({stage}), {x}_tiles.index({stage}))",
        ]

    def _barriers(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        return [f"{q}_full", f"{k}_full", f"{k}_empty", f"{v}_full", f"{v}_empty"]

    def _tiles(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        return [f"{q}_tile", f"{k}_tiles", f"{v}_tiles"]

    def _load_arguments(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        places = [*self.shape.batch, "row", "first", "end"]
        return [f"{q}_map", f"{k}_map", f"{v}_map", *self._tiles(), *self._barriers(), *places]

    # -- the elementwise part --

    def _state_names(self) -> list[str]:
        return [self.name(s.name) for s in self.shape.states]

    def _context(self) -> list[str]:
        """What the elementwise part reads besides the scores and the running values."""
        hoisted = [x.name for x in self.loads if x.name is not None]
        tensors = dict.fromkeys(x.access.tensor for x in self.loads if x.name is None)
        moving = [a for t in tensors for a in self._pointer(t, self.name(t))]
        return [self.shape.p + "_", *self.shape.batch, *hoisted, *moving, *self.sizes]

    def _printer(self, guard: str) -> Printer:
        shape = self.shape
        variables = {shape.p: Value(f"{shape.p}_", (shape.p,), "i"), shape.m: Value(f"{shape.m}_", (shape.m,), "i")}
        return Printer((shape.p, shape.m), {}, variables, self._element, shape.dtype == "bf16", guard, used=self.used)

    def _element(self, access: Access, printer: Printer) -> Value:
        """A read by address: before the loop where nothing in it moves, else with the tile's points."""
        for x in self.loads:
            if x.access == access and x.name is not None and x.name in printer.names:
                return printer.names[x.name]
        n = self.name(access.tensor)
        groups: dict[tuple[str, ...], list[str]] = {}
        for i, index in enumerate(access.index):
            v = printer.value(index)
            if v.code == "0":
                continue
            groups.setdefault(v.ranks, []).append(f"{v.atom()}.to(gl.int64) * {n}_{i}" if len(v.ranks) < 2 and not
                                                  v.code.isdigit() else f"{v.atom()} * {n}_{i}")  # fmt: skip
        ranks = printer.sort(*(Value("", r) for r in groups))
        address = n
        for r in sorted(groups, key=len):
            address = f"{address} + {printer.align(Value(' + '.join(groups[r]), r), ranks)}"
        inside = []
        if printer.inside is not None and set(printer.inside.ranks) <= set(ranks):
            inside.append(printer.align(printer.inside, ranks))
        if self.shape.p in ranks:
            limit = printer.value(self.shape.extent(self.shape.p)).code
            inside.append(printer.align(Value(f"{self.shape.p}_ < {limit}", (self.shape.p,)), ranks))
        if self.shape.m in ranks:
            assert self.shape.loop.limit is not None
            limit = printer.value(self.shape.loop.limit).code
            inside.append(printer.align(Value(f"{self.shape.m}_ < {limit}", (self.shape.m,)), ranks))
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        code = f"gl.load({address}{mask})"
        dtype = self.dtype(access.tensor)
        if dtype == "bool":
            return Value(f"{code} != 0", ranks, "b")
        return Value(code, ranks, "i") if dtype[0] in "iu" else Value(f"{code}.to(gl.float32)", ranks)

    def _weigh(self) -> str:
        """The Einsums between the two products, on one tile."""
        shape = self.shape
        masked = self._printer("finite")
        full = self._printer("finite" if shape.always_guard or not self._is_static() else "")
        self._name_hoisted(masked)
        self._name_hoisted(full)
        lines = [
            '"""From a tile of scores to weights; the running values before it to those after it."""',
        ]
        m, p = shape.m, shape.p
        lines.append(f"{m}_ = {m}_first + gl.arange(0, STEP, COLUMN)")
        for printer in (masked, full):
            for state in shape.states:
                ranks = () if p not in state.ranks else (p,)
                printer.names[state.name] = Value(self.name(state.name), ranks)
            printer.names[shape.score.name] = Value(self.name(shape.score.name), (p, m))
        for s in (self.score, *self.statements):
            lines += self._comment(s)
            lines += self._statement(s, masked, full)
        result = [self.name(s.new) for s in shape.states]
        if self.rescale is not None:
            codes = [full.value(self.rescale).code, masked.value(self.rescale).code]
            lines += self._both(*([f"rescale = {c}"] for c in codes))
            result.append("rescale")
        weights = full.names[shape.weights]
        result.append(f"gl.convert_layout({weights.atom()}.to({_GLUON[shape.dtype]}), WEIGHTS)")
        arguments = [self.name(shape.score.name), *self._state_names(), f"{m}_first", *self._context()]
        lines.append(f"return {', '.join(result)}")
        return _function("weigh", [*arguments, self._masked_argument()], lines)

    def _name_hoisted(self, printer: Printer) -> None:
        for x in self.loads:
            if x.name is None:
                continue
            dtype = self.dtype(x.access.tensor)
            kind = "b" if dtype == "bool" else "i" if dtype[0] in "iu" else "f"
            ranks = (self.shape.p,) if self.shape.p in free_vars(x.access) else ()
            printer.names[x.name] = Value(x.name, ranks, kind)

    def _statement(self, s: Statement, masked: Printer, full: Printer) -> list[str]:
        """A statement on a tile whose points all exist, and what is different on a tile across an edge."""
        name = self.name(s.name)
        shape = self.shape
        keep: list[str] = []
        if s.keep != sympy.true and any(x.name is None and x.access in s.reads for x in self.loads):
            keep = self._mask(masked, s.keep)  # an index may be out of bounds where no point exists
            masked.inside = masked.names["keep"]
        if s is self.score:
            expr = Access(s.name, *map(var, s.ranks)) * self.factor
        else:
            expr = s.expr
        v, other = full.value(expr), masked.value(expr)
        masked.inside = None
        split = s.name in {x.new for x in shape.states if x.name in shape.split}
        codes = [self._split_update(s, full)] * 2 if split else [v.code, other.code]
        lines = [[f"{name} = {c}"] if c != name else [] for c in codes]
        if s.monoid is not None and s is not self.score:
            lines, v = self._reduction(s, [replace(v, code=c) for c in codes], masked)
        kind = "f" if s is self.score else v.kind
        for printer in (masked, full):
            printer.names[s.name] = Value(name, v.ranks, kind)
        if s.fill is not None:
            mask = [] if keep and s.row == s.keep else self._mask(masked, s.row)
            lines[1] = [*lines[1], *mask, f"{name} = {self._filled(masked, masked.names[s.name], s.fill)}"]
        lines[1] = [*keep, *lines[1]]
        return self._both(*lines)

    def _both(self, full: list[str], masked: list[str]) -> list[str]:
        """Lines for full and for masked tiles, told apart only where they differ."""
        if full == masked:
            return full
        if masked[: len(full)] == full:
            return [*full, "if MASKED:", *_indent(masked[len(full) :])]
        return ["if MASKED:", *_indent(masked), "else:", *_indent(full or ["pass"])]

    def _mask(self, printer: Printer, predicate: Boolean) -> list[str]:
        """The line that makes `keep`, where the predicate holds."""
        v = printer.value(predicate)
        printer.names["keep"] = Value("keep", v.ranks, "b")
        return [f"keep = {v.code}"]

    def _filled(self, printer: Printer, v: Value, fill: Expr) -> str:
        keep = printer.names["keep"]
        ranks = printer.sort(keep, v)
        value = printer.align(printer.floating(v), ranks)
        return f"gl.where({printer.align(keep, ranks)}, {value}, {printer.value(fill).code})"

    def _reduction(self, s: Statement, operands: list[Value], masked: Printer) -> tuple[list[list[str]], Value]:
        """A reduction along the tile; one that would notice missing points has them at its identity."""
        name = self.name(s.name)
        results = [self._reduced(s, v) for v in operands]
        lines = [[f"{name} = {code}"] for _, code in results]
        if s.mask_operand:
            identity = s.identity if s.identity is not None else sympy.Integer(0)
            keep = self._mask(masked, s.keep)
            filled = Value(self._filled(masked, operands[1], identity), (self.shape.p, self.shape.m))
            lines[1] = [*keep, f"{name} = {self._reduced(s, filled)[1]}"]
        return lines, results[0][0]

    def _is_split(self, new: str) -> bool:
        return any(x.new == new and x.name in self.shape.split for x in self.shape.states)

    def _split_update(self, s: Statement, printer: Printer) -> str:
        """The update of a sum that threads keep their parts of: factors of the rows meet the parts."""
        state = next(x for x in self.shape.states if x.new == s.name)
        before = Access(state.name, *map(var, state.ranks))
        expr = sympy.expand(s.expr)
        factor = expr.coeff(before)
        (part,) = [a for a in accesses(expr - factor * before)]
        name = self.name(state.name)
        if factor == 1:
            return f"{name} + {self.name(part.tensor)}"
        row = printer.value(factor)
        spread = (
            f"gl.convert_layout({row.code}, gl.SliceLayout(1, {name}.type.layout))[:, None]"
            if row.ranks
            else row.atom()
        )
        return f"{name} * {spread} + {self.name(part.tensor)}"

    def _reduced(self, s: Statement, operand: Value) -> tuple[Value, str]:
        p, m = self.shape.p, self.shape.m
        code = operand.code if operand.kind == "f" else f"{operand.atom()}.to(gl.float32)"
        if operand.ranks != (p, m):
            zero = f"gl.full([{GROUP_ROWS}, STEP], 0.0, gl.float32, SCORES)"
            aligned = Printer((p, m), {}, {}, self._element).align(Value(code, operand.ranks), (p, m))
            code = f"{zero} + {aligned}"
        users = [x for x in self.statements if any(a.tensor == s.name for a in x.reads)]
        split = s.monoid == "sum" and len(users) == 1 and self._is_split(users[0].name)
        helper = "row_parts" if split else f"row_{s.monoid}"
        self.used.add(helper)
        if split or helper == "row_sum":
            self.used.add("row_parts")
        return Value(self.name(s.name), (p,)), f"{helper}({code})"

    def _comment(self, s: Statement) -> list[str]:
        if s.source is None:
            return []
        lines = textwrap.wrap(print_einsum(s.source), 108, subsequent_indent="  ")
        return [f"# {line}" for line in lines]

    # -- one iteration, and the loop --

    def _advance(self) -> str:
        shape = self.shape
        k, v = self.name(shape.keys.tensor), self.name(shape.values.tensor)
        score, acc = self.name(shape.score.name), self.name(shape.accumulator.name)
        states = self._state_names()
        rescale = ["rescale"] if self.rescale is not None else []
        turn, done = (["take_turn(group)"], ["pass_turn(group)"]) if self.groups > 1 else ([], [])
        lines = [
            '"""One iteration: the next scores are issued before the last weights meet their values."""',
            "last_stage = stage",
            "last_phase = phase",
            "stage += 1",
            "if stage == STAGES:",
            "    stage = 0",
            "    phase ^= 1",
            f"mbarrier.wait({k}_full.index(stage), phase)",
            *turn,
            f"{k}_tile = {self._view(f'{k}_tiles.index(stage)', self.columns, self.e, shape.e)}.permute([1, 0])",
            f"next_{score} = warpgroup_mma({self._tiles()[0]}, {k}_tile, zero, use_acc=False, is_async=True)",
            f"mbarrier.wait({v}_full.index(last_stage), last_phase)",
            f"{v}_tile = {self._view(f'{v}_tiles.index(last_stage)', self.columns, self.f, shape.f)}",
            f"next_{acc} = warpgroup_mma(weights, {v}_tile, {acc}, is_async=True)",
            *done,
            f"{score} = warpgroup_mma_wait(1, deps=[next_{score}])",
            f"mbarrier.arrive({k}_empty.index(stage))",
            _call(
                [*states, *rescale, "next_weights"],
                "weigh",
                [score, *states, "tile * STEP", *self._context(), "MASKED"],
            ),
            f"{acc}, weights = warpgroup_mma_wait(0, deps=[next_{acc}, weights])",
            f"mbarrier.arrive({v}_empty.index(last_stage))",
        ]
        if self.rescale is not None:
            lines.append(f"{acc} = {acc} * gl.convert_layout(rescale, RESULT_ROW)[:, None]")
        lines.append(f"return {', '.join([*states, acc, 'next_weights', 'stage', 'phase'])}")
        return _function("advance", [*self._advance_arguments(), self._masked_argument(), "group: gl.constexpr"], lines)

    def _advance_arguments(self) -> list[str]:
        acc = self.name(self.shape.accumulator.name)
        tiles, barriers = self._tiles(), self._barriers()[1:]
        return [
            "tile",
            *self._state_names(),
            acc,
            "weights",
            "stage",
            "phase",
            *tiles,
            *barriers,
            "zero",
            *self._context(),
        ]

    def _view(self, tile: str, rows: int, width: int, rank: str) -> str:
        return f"{tile}._reinterpret({_GLUON[self.shape.dtype]}, [{rows}, {width}], TILE_{rank.upper()})"

    def _compute(self) -> str:
        shape = self.shape
        q, k, v = (self.name(x.tensor) for x in (shape.queries, shape.keys, shape.values))
        o = self.name(shape.result.tensor)
        score, acc = self.name(shape.score.name), self.name(shape.accumulator.name)
        states = self._state_names()
        rescale = ["rescale"] if self.rescale is not None else []
        printer = self._printer("")
        p_ = f"{shape.p}_"
        lines = [f'"""A warpgroup: {GROUP_ROWS} rows of {shape.p}, all of their loop, and what follows it."""']
        lines.append(f"{p_} = row + group * {GROUP_ROWS} + gl.arange(0, {GROUP_ROWS}, ROW)")
        for x in self.loads:
            if x.name is not None:
                lines.append(f"{x.name} = {self._element(x.access, printer).code}")
        lines.append(f"zero = gl.full([{GROUP_ROWS}, STEP], 0.0, gl.float32, SCORES)")
        for state in shape.states:
            name, init = self.name(state.name), printer.value(state.init).code
            if state.name in shape.split:
                lines.append(f"{name} = row_parts(zero)")
            elif shape.p in state.ranks:
                lines.append(f"{name} = gl.full([{GROUP_ROWS}], {init}, gl.float32, ROW)")
            else:
                raise Unsupported(f"{state.name} runs without the rank {shape.p}")
        lines.append(f"{acc} = gl.full([{GROUP_ROWS}, {self.f}], 0.0, gl.float32, RESULT)")
        if self.groups > 1:
            lines += ["if group == GROUPS - 1:", "    pass_turn(group)  # the first turn is the first warpgroup's"]
        turn, done = (["take_turn(group)"], ["pass_turn(group)"]) if self.groups > 1 else ([], [])
        lines += [
            f"mbarrier.wait({q}_full, 0)",
            f"{q}_rows = {self._view(f'{q}_tile.index(group)', GROUP_ROWS, self.e, shape.e)}",
            f"mbarrier.wait({k}_full.index(0), 0)",
            *turn,
            f"{k}_tile = {self._view(f'{k}_tiles.index(0)', self.columns, self.e, shape.e)}.permute([1, 0])",
            f"{score} = warpgroup_mma({q}_rows, {k}_tile, zero, use_acc=False, is_async=True)",
            *done,
            f"{score} = warpgroup_mma_wait(0, deps=[{score}])",
            f"mbarrier.arrive({k}_empty.index(0))",
            "tile = end - 1",
            _call([*states, *rescale, "weights"], "weigh", [score, *states, "tile * STEP", *self._context(), "True"]),
            "stage = 0",
            "phase = 0",
        ]
        result = [*states, acc, "weights", "stage", "phase"]
        passed = [x if x != f"{q}_tile" else f"{q}_rows" for x in self._advance_arguments()]
        lines += [
            "for _ in range(end - 1 - first):",
            "    tile -= 1",
            *_indent(_call(result, "advance", [*passed, self._edge(), "group"]).splitlines()),
        ]
        lines += [
            f"mbarrier.wait({v}_full.index(stage), phase)",
            f"{v}_tile = {self._view(f'{v}_tiles.index(stage)', self.columns, self.f, shape.f)}",
            f"{acc} = warpgroup_mma(weights, {v}_tile, {acc}, is_async=True)",
            f"{acc}, weights = warpgroup_mma_wait(0, deps=[{acc}, weights])",
            *self._after(),
        ]
        store = f"{q}_rows" if self.shares else f"{o}_tile.index(group)._reinterpret"
        if not self.shares:
            store = f"{o}_tile.index(group)._reinterpret({_GLUON[self.dtype(shape.result.tensor)]}, " \
                    f"[{GROUP_ROWS}, {self.f}], TILE_{shape.f.upper()})"  # fmt: skip
        source = f"{q}_tile" if self.shares else f"{o}_tile"
        lines += [
            f"{store}.store({o}.to({_GLUON[self.dtype(shape.result.tensor)]}))",
            "fence_async_shared()",
            f"at = {self._coordinates(shape.result, f'row + group * {GROUP_ROWS}')}",
            f"tma.async_copy_shared_to_global({o}_map, at, {source}.index(group))",
            "tma.store_wait(0)",
        ]
        return _function("compute", [*self._compute_arguments(), "group: gl.constexpr"], lines)

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

    def _compute_arguments(self) -> list[str]:
        o = self.name(self.shape.result.tensor)
        tiles = [*self._tiles(), *([] if self.shares else [f"{o}_tile"])]
        places = [*self.shape.batch, "row", *self._ends()]
        return [f"{o}_map", *tiles, *self._barriers(), *places, *self._pointers(), *self.sizes]

    def _after(self) -> list[str]:
        """The Einsums that follow the loop."""
        shape = self.shape
        p, f = shape.p, shape.f
        names = {shape.accumulator.name: Value(self.name(shape.accumulator.name), (p, f))}
        variables = {p: Value(f"{p}_", (p,), "i")}
        printer = Printer((p, f), names, variables, self._element, shape.dtype == "bf16", "finite", used=self.used)
        self._name_hoisted(printer)
        lines = [f"{p}_ = gl.convert_layout({p}_, RESULT_ROW)"]
        lines += [f"{x.name} = gl.convert_layout({x.name}, RESULT_ROW)" for x in self.loads
                  if x.name is not None and p in free_vars(x.access) and self._read_after(x.access)]  # fmt: skip
        for state in shape.states:
            name = self.name(state.name)
            if any(a.tensor == state.name for s in self.epilogue for a in (*s.reads, *accesses(s.row))):
                whole = f"gl.sum({name}, axis=1)" if state.name in shape.split else name
                lines.append(f"{name} = gl.convert_layout({whole}, RESULT_ROW)")
            names[state.name] = Value(name, (p,))
        for s in self.epilogue:
            lines += self._comment(s)
            v = printer.floating(printer.value(s.expr))
            name, code = self.name(s.name), v.code
            if s.row != sympy.true:
                keep = printer.value(s.row)
                ranks = printer.sort(v, keep)
                code = f"gl.where({printer.align(keep, ranks)}, {printer.align(v, ranks)}, 0.0)"
            lines.append(f"{name} = {code}")
            names[s.name] = Value(name, v.ranks)
        for r in self._row_results():
            lines += self._store_row(r, printer)
        return lines

    def _read_after(self, access: Access) -> bool:
        return any(access in accesses(s.expr) + accesses(s.row) for s in self.epilogue)

    def _store_row(self, output: str, printer: Printer) -> list[str]:
        t = self.cascade.tensors[output]
        to = f"{self.name(output)}_to"
        p = self.shape.p
        scalars = [f"{r}.to(gl.int64) * {to}_{i}" for i, r in enumerate(t.ranks) if r != p]
        limit = printer.value(self.shape.extent(p)).code
        where = " + ".join([to, *scalars, f"{p}_ * {to}_{t.ranks.index(p)}"])
        dtype = _GLUON.get(t.dtype)
        if dtype is None:
            raise Unsupported(f"the output {output} is {t.dtype}")
        value = printer.names[output]
        code = value.code if value.ranks else f"gl.full([{GROUP_ROWS}], {value.code}, gl.float32, RESULT_ROW)"
        return [f"gl.store({where}, {code}.to({dtype}), mask={p}_ < {limit})"]

    # -- the kernel and its launch --

    def _kernel(self) -> str:
        shape = self.shape
        q, k, v = (self.name(x.tensor) for x in (shape.queries, shape.keys, shape.values))
        o = self.name(shape.result.tensor)
        maps = [f"{x}_map" for x in (q, k, v, o)]
        dtype = _GLUON[shape.dtype]

        def ring(x: str, count: str, operand: Operand, rows: int, width: int, name: str) -> str:
            block = [1] * len(operand.batch) + [rows, width]
            return (
                f"{name} = gl.allocate_shared_memory({dtype}, [{count}, {', '.join(map(str, block))}], {x}_map.layout)"
            )

        lines = [
            ring(q, "GROUPS", shape.queries, GROUP_ROWS, self.e, f"{q}_tile"),
            ring(k, "STAGES", shape.keys, self.columns, self.e, f"{k}_tiles"),
            ring(v, "STAGES", shape.values, self.columns, self.f, f"{v}_tiles"),
        ]
        if not self.shares:
            block = [1] * len(shape.result.batch) + [GROUP_ROWS, self.f]
            out = _GLUON[self.dtype(shape.result.tensor)]
            lines.append(
                f"{o}_tile = gl.allocate_shared_memory({out}, [GROUPS, {', '.join(map(str, block))}], {o}_map.layout)"
            )
        lines.append(f"{q}_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())")
        rings = self._barriers()[1:]
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())" for b in rings]
        lines += [f"mbarrier.init({q}_full, 1)", "for stage in gl.static_range(STAGES):"]
        lines += [f"    mbarrier.init({b}.index(stage), {'1' if b.endswith('_full') else 'GROUPS'})" for b in rings]
        lines.append(_call([*shape.batch, "row", *self._ends()], "place", self.sizes))
        compute, load = ", ".join(self._compute_arguments()), ", ".join(self._load_arguments())
        lines.append("gl.warp_specialize(")
        lines.append("    [")
        for g in range(self.groups):
            lines += _wrapped(f"(compute, ({compute}, {g})),", 8)
        lines += _wrapped(f"(load, ({load})),", 8)
        regs = REGISTERS[self.groups]
        warps, registers = [4] * (self.groups - 1) + [1], [regs] * (self.groups - 1) + [24]
        lines += ["    ],", f"    {warps},", f"    {registers},", ")"]
        decorator = f"@gluon.jit(do_not_specialize={self.sizes!r})"
        return _function("kernel", [*maps, *self._pointers(), *self.sizes], lines, decorator)

    def _run(self) -> str:
        shape = self.shape
        inputs = [self.name(t.name) for t in self.cascade.inputs]
        tiles = {name: sympy.Integer(n) for name, n in self.schedule.tiles}
        symbols = [s for s in self.cascade.symbols if s not in tiles]
        outputs = [self.name(o) for o in self.cascade.outputs]
        if set(self.cascade.outputs) != set(shape.results):
            raise Unsupported("an output that the loop does not make")
        lines = []
        device = f"{inputs[0]}.device"
        for r in shape.results:
            lines.append(f"{self.name(r)} = {self._allocation(r, device)}")
        grid = [python(shape.extent(r)) for r in shape.batch] + [
            f"-(-{_paren(python(shape.extent(shape.p)))} // {self.rows})"
        ]
        lines.append(f"programs = {' * '.join(_paren(g) for g in grid)}")
        maps = []
        sizes = ((shape.queries, GROUP_ROWS, self.e), (shape.keys, self.columns, self.e),
                 (shape.values, self.columns, self.f), (shape.result, GROUP_ROWS, self.f))  # fmt: skip
        for operand, rows, width in sizes:
            order = self._order(operand)
            n = self.name(operand.tensor)
            view = n if order == sorted(order) else f"{n}.permute({', '.join(map(str, order))})"
            maps.append(f"tile_map({view}, {rows}, {width})")
        others = []
        for t in dict.fromkeys(x.access.tensor for x in self.loads):
            others += [self.name(t), f"*{self.name(t)}.stride()"]
        for t in self._row_results():
            others += [self.name(t), f"*{self.name(t)}.stride()"]
        lines.append("if programs:")
        lines.append("    kernel[(programs,)](")
        lines += [f"        {m}," for m in maps]
        if others or self.sizes:
            lines += _wrapped(", ".join([*others, *self.sizes]) + ",", 8)
        lines += ["        num_warps=4,", "    )"]
        lines.append(f"return {', '.join(outputs)},")
        signature = ", ".join(inputs + (["*", *symbols] if symbols else []))
        doc = '"""' + f"{self.cascade.name}: inputs with any strides; sizes by name." + '"""'
        body = "\n".join("    " + line for line in [doc, *lines])
        return f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}"

    def _allocation(self, tensor: str, device: str) -> str:
        t = self.cascade.tensors[tensor]
        order = dict(self.schedule.out_order).get(tensor, t.ranks)
        if tensor == self.shape.result.tensor and order[-1] != self.shape.f:
            raise Unsupported(f"{tensor} with {self.shape.f} not innermost")
        shape = ", ".join(python(self.shape.extent(r)) for r in order)
        comma = "," if len(order) == 1 else ""
        code = f"torch.empty(({shape}{comma}), dtype={_TORCH[t.dtype]}, device={device})"
        if order != t.ranks:
            code += f".permute({', '.join(str(order.index(r)) for r in t.ranks)})"
        return code


def _factor(score: Statement, e: str) -> Expr:
    """What the score is multiplied by beyond the product along `e`."""
    factor = score.expr / sympy.Mul(*(a for a in accesses(score.expr) if e in free_vars(a)))
    return sympy.Integer(1) if factor.is_number and float(factor) == 1 else factor


def _spread(s: Statement) -> Statement:
    """A number in front of a sum joins the numbers of its terms."""
    number, rest = s.expr.as_independent(Access, *s.expr.free_symbols, as_Add=False)
    if s.monoid is not None or not rest.is_Add:
        return s
    return replace(s, expr=sympy.Add(*(number * t for t in rest.args)))


_REDUCTIONS = {
    "row_parts": '''
@gluon.jit
def row_parts(x):
    """Sums along rows as far as a thread goes alone: eight parts a row, in independent chains of additions."""
    return gl.sum(x.reshape([64, STEP // 8, 8]), axis=1)
''',
    "row_sum": """
@gluon.jit
def row_sum(x):
    return gl.convert_layout(gl.sum(row_parts(x), axis=1), ROW)
""",
    "row_max": '''
@gluon.jit
def row_max(x):
    """Eight parts a row first: chains of maxima that do not wait for each other."""
    return gl.convert_layout(gl.max(gl.max(x.reshape([64, STEP // 8, 8]), axis=1), axis=1), ROW)
''',
    "row_min": """
@gluon.jit
def row_min(x):
    return gl.convert_layout(gl.min(gl.min(x.reshape([64, STEP // 8, 8]), axis=1), axis=1), ROW)
""",
}

_TURN = '''
@gluon.constexpr_function
def barrier(instruction, group):
    return f"bar.{instruction} {8 + group % GROUPS.value}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(group: gl.constexpr):
    """Wait until the warpgroup before this one has issued its products."""
    text: gl.constexpr = barrier("sync", group)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(group: gl.constexpr):
    text: gl.constexpr = barrier("arrive", group + 1)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
'''

_TILE_MAP = '''
def tile_map(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """The copy engine's view of x as tiles of its last two dimensions; of a copy where its strides or address are
    none that the engine can take."""
    if x.numel() == 0:
        x = x.new_zeros([max(1, n) for n in x.shape])
    size = x.element_size()
    usable = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    usable &= all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1]))
    if not usable:
        x = x.clone(memory_format=torch.contiguous_format)
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride()[:-1])] + [1]
    layout = gl.NVMMASharedLayout(min(128, width * size), 8 * size, x.dim())
    return TensorDescriptor(x, list(x.shape), strides, [1] * (x.dim() - 2) + [rows, width], layout)
'''


def _paren(code: str) -> str:
    return code if code.replace("_", "").isalnum() or code.startswith("-(-") else f"({code})"


def _indent(lines: Iterable[str]) -> list[str]:
    return ["    " + line for line in lines]


def _wrapped(text: str, depth: int) -> list[str]:
    pad = " " * depth
    return textwrap.wrap(text, 112, initial_indent=pad, subsequent_indent=pad + " ", break_long_words=False)


def _call(targets: Sequence[str], function: str, arguments: Sequence[str]) -> str:
    return "\n".join(textwrap.wrap(
        f"{', '.join(targets)} = {function}({', '.join(arguments)})", 104, subsequent_indent="    ", break_long_words=False,
    ))  # fmt: skip


def _function(name: str, arguments: Sequence[str], lines: Sequence[str], decorator: str = "@gluon.jit") -> str:
    head = "\n".join(textwrap.wrap(
        f"def {name}({', '.join(arguments)}):", 112, subsequent_indent=" " * (5 + len(name)), break_long_words=False,
    ))  # fmt: skip
    body = "\n".join("    " + part for line in lines for part in line.split("\n"))
    return f"{decorator}\n{head}\n{body}"
