"""The Gluon emitter: a loop program as a warp-specialised kernel for Hopper (compute capability 9.0).

Comes in: a `LoopProgram` with one serial nest (`gluon_form`) and a `Schedule`. Goes out: `Source` in "triton", a
module that imports on its own. One warp keeps the copy engine busy with a ring of tiles of the two moving operands;
each of two or three warpgroups owns 64 rows and runs the loop: the product of the next scores is issued before the
last weights meet their values, so that the elementwise part of one tile hides behind the tensor cores' work on
another, and the warpgroups take turns at issuing, so that they do not do the same thing at the same time.

Schedule: the tile of the long row rank is 64 a warpgroup; the serial tile is the ring's; `stages` is its depth.
"""

from __future__ import annotations

import sympy

from einscade.codegen.gluon_form import Operand, form
from einscade.codegen.gluon_plan import GROUP_ROWS, REGISTERS
from einscade.codegen.gluon_points import GLUON_DTYPES, Points
from einscade.codegen.gluon_text import REDUCTIONS, TILE_MAP, TURN, call, function, indent, paren, wrapped
from einscade.codegen.gluon_values import HELPERS, Printer, Value
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.torch_values import python
from einscade.ir.expr import Access, FloorDiv, accesses, free_vars, var

__all__ = ["emit", "schedules"]

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
        a.tensor in shape.loop.nest.inputs and shape.m in free_vars(a)
        for s in (shape.score, *shape.statements)
        for a in (*accesses(s.keep), *(s.reads if s is not shape.score else ()))
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


class _Module(Points):
    """One module's text."""

    def text(self) -> str:
        shape = self.shape
        body = [self._place(), self._load(), self._weigh(), self._advance(), self._compute(), self._kernel()]
        helpers = [HELPERS[h].strip("\n") for h in HELPERS if h in self.used]
        helpers += [REDUCTIONS[h].strip("\n") for h in REDUCTIONS if h in self.used]
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
            TURN.strip("\n") if self.groups > 1 else "",
            *body,
            TILE_MAP.strip("\n"),
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
        return function("place", self.sizes, [doc, *lines, f"return {places}"])

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
            *self._copy(k, f"{self._coordinates(shape.keys, '(end - 1) * STEP')}", "0", wait=False),
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
            *indent(
                self._copy(k, self._coordinates(shape.keys, "(end - 2 - tile) * STEP"), "next_stage", "next_phase")
            ),
            *indent(self._copy(v, self._coordinates(shape.values, "(end - 1 - tile) * STEP"), "stage", "phase")),
            "    stage = next_stage",
            "    phase = next_phase",
            *self._copy(v, self._coordinates(shape.values, "first * STEP"), "stage", "phase"),
        ]
        return function("load", self._load_arguments(), lines)

    def _copy(self, x: str, at: str, stage: str, phase: str = "", wait: bool = True) -> list[str]:
        return [
            *([f"mbarrier.wait({x}_empty.index({stage}), {phase})"] if wait else []),
            f"mbarrier.expect({x}_full.index({stage}), {x}_map.block_type.nbytes)",
            f"tma.async_copy_global_to_shared({x}_map, {at}, {x}_full.index({stage}), {x}_tiles.index({stage}))",
        ]

    def _load_arguments(self) -> list[str]:
        q, k, v = (self.name(x.tensor) for x in (self.shape.queries, self.shape.keys, self.shape.values))
        places = [*self.shape.batch, "row", "first", "end"]
        return [f"{q}_map", f"{k}_map", f"{v}_map", *self._tiles(), *self._barriers(), *places]

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
            call(
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
        return function("advance", [*self._advance_arguments(), self._masked_argument(), "group: gl.constexpr"], lines)

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
        return f"{tile}._reinterpret({GLUON_DTYPES[self.shape.dtype]}, [{rows}, {width}], TILE_{rank.upper()})"

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
            call([*states, *rescale, "weights"], "weigh", [score, *states, "tile * STEP", *self._context(), "True"]),
            "stage = 0",
            "phase = 0",
        ]
        result = [*states, acc, "weights", "stage", "phase"]
        passed = [x if x != f"{q}_tile" else f"{q}_rows" for x in self._advance_arguments()]
        lines += [
            "for _ in range(end - 1 - first):",
            "    tile -= 1",
            *indent(call(result, "advance", [*passed, self._edge(), "group"]).splitlines()),
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
            store = f"{o}_tile.index(group)._reinterpret({GLUON_DTYPES[self.dtype(shape.result.tensor)]}, " \
                    f"[{GROUP_ROWS}, {self.f}], TILE_{shape.f.upper()})"  # fmt: skip
        source = f"{q}_tile" if self.shares else f"{o}_tile"
        lines += [
            f"{store}.store({o}.to({GLUON_DTYPES[self.dtype(shape.result.tensor)]}))",
            "fence_async_shared()",
            f"at = {self._coordinates(shape.result, f'row + group * {GROUP_ROWS}')}",
            f"tma.async_copy_shared_to_global({o}_map, at, {source}.index(group))",
            "tma.store_wait(0)",
        ]
        return function("compute", [*self._compute_arguments(), "group: gl.constexpr"], lines)

    def _compute_arguments(self) -> list[str]:
        o = self.name(self.shape.result.tensor)
        tiles = [*self._tiles(), *([] if self.shares else [f"{o}_tile"])]
        places = [*self.shape.batch, "row", *self._ends()]
        return [f"{o}_map", *tiles, *self._barriers(), *places, *self._pointers(), *self.sizes]

    def _kernel(self) -> str:
        shape = self.shape
        q, k, v = (self.name(x.tensor) for x in (shape.queries, shape.keys, shape.values))
        o = self.name(shape.result.tensor)
        maps = [f"{x}_map" for x in (q, k, v, o)]
        dtype = GLUON_DTYPES[shape.dtype]

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
            out = GLUON_DTYPES[self.dtype(shape.result.tensor)]
            lines.append(
                f"{o}_tile = gl.allocate_shared_memory({out}, [GROUPS, {', '.join(map(str, block))}], {o}_map.layout)"
            )
        lines.append(f"{q}_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())")
        rings = self._barriers()[1:]
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())" for b in rings]
        lines += [f"mbarrier.init({q}_full, 1)", "for stage in gl.static_range(STAGES):"]
        lines += [f"    mbarrier.init({b}.index(stage), {'1' if b.endswith('_full') else 'GROUPS'})" for b in rings]
        lines.append(call([*shape.batch, "row", *self._ends()], "place", self.sizes))
        compute, load = ", ".join(self._compute_arguments()), ", ".join(self._load_arguments())
        lines.append("gl.warp_specialize(")
        lines.append("    [")
        for g in range(self.groups):
            lines += wrapped(f"(compute, ({compute}, {g})),", 8)
        lines += wrapped(f"(load, ({load})),", 8)
        regs = REGISTERS[self.groups]
        warps, registers = [4] * (self.groups - 1) + [1], [regs] * (self.groups - 1) + [24]
        lines += ["    ],", f"    {warps},", f"    {registers},", ")"]
        decorator = f"@gluon.jit(do_not_specialize={self.sizes!r})"
        return function("kernel", [*maps, *self._pointers(), *self.sizes], lines, decorator)

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
            f"-(-{paren(python(shape.extent(shape.p)))} // {self.rows})"
        ]
        lines.append(f"programs = {' * '.join(paren(g) for g in grid)}")
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
            lines += wrapped(", ".join([*others, *self.sizes]) + ",", 8)
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
