"""The Gluon emitter: a loop program as a warp-specialised kernel for Hopper (compute capability 9.0).

Comes in: a `LoopProgram` with one serial nest (`gluon_form`) and a `Schedule`. Goes out: `Source` in "triton", a
module that imports on its own. One warp keeps the copy engine busy with a ring of tiles of the two moving operands;
each of two or three warpgroups owns 64 rows and runs the loop: the product of the next scores is issued before the
last weights meet their values, so that the elementwise part of one tile hides behind the tensor cores' work on
another, and the warpgroups take turns at issuing, so that they do not do the same thing at the same time.

Schedule: the tile of the long row rank is 64 a warpgroup; the serial tile is the ring's; `stages` is its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy

from einscade.codegen.gluon_form import Operand, form
from einscade.codegen.gluon_plan import GROUP_ROWS, REGISTERS, Ring
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_schedules import schedules as schedules_of
from einscade.codegen.gluon_tables import Tables
from einscade.codegen.gluon_text import REDUCTIONS, TILE_MAP, TURN, call, function, indent, paren, wrapped
from einscade.codegen.gluon_values import HELPERS, Printer
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.torch_values import python
from einscade.ir.device import Device

__all__ = ["IMPORTS", "Module", "emit", "schedules"]

IMPORTS = """
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
    """The program's module. Raises `Unsupported` where a nest or the schedule does not fit the kernel."""
    if len(program.nests) != 1:
        from einscade.codegen import gluon_program  # which builds on Module

        return gluon_program.emit(program, schedule)
    return Source("triton", _writer(schedule)(form(program), schedule).text())


def _writer(schedule: Schedule) -> type[Module]:
    if not schedule.in_order:
        return Module
    from einscade.codegen.gluon_chain import Chain  # which builds on Module

    return Chain


def schedules(
    program: LoopProgram, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """Schedules for the program, best guess first, where a device and sizes are given for these. Raises `Unsupported`
    as `emit` does, and where the sizes are too small for the kernel."""
    if len(program.nests) != 1:
        from einscade.codegen import gluon_program

        return gluon_program.schedules(program, device, sizes)
    return schedules_of(form(program), device, sizes)


class Module(Tables):
    """One module's text."""

    def text(self) -> str:
        title = f"{self.cascade.name}: written by einscade for the cascade"
        doc = "\n".join("    " + line for line in str(self.cascade).splitlines())
        head = f'"""{title}\n\n{doc}\n"""\n{IMPORTS}\n'
        parts = [*self.parts(), TILE_MAP.strip("\n"), *self._maps(), self._run()]
        return head + "\n" + "\n\n\n".join(p for p in parts if p) + "\n"

    def parts(self) -> list[str]:
        """The constants and functions of the kernel."""
        functions = self._functions()  # which add to the helpers used
        listing = self._listing_parts() if self.listed else []
        helpers = [HELPERS[h].strip("\n") for h in HELPERS if h in self.used]
        helpers += [REDUCTIONS[h].strip("\n") for h in REDUCTIONS if h in self.used]
        return [self._constants(), *helpers, *listing, *functions]

    def _functions(self) -> list[str]:
        turn = [TURN.strip("\n")] if self.groups > 1 else []
        load = [self._load(), *map(self._reader, self.tables)]
        return [*turn, self._place(), *load, self._weigh(), self._advance(), self._compute(), self._kernel()]

    def _constants(self) -> str:
        shape = self.shape
        layouts = [f"TILE_{w} = gl.constexpr(gl.NVMMASharedLayout({min(128, w * 2)}, 16, 2))" for w in self._widths()]
        maps = "\n".join([*layouts, *self._table_layouts()])
        return f"""
GROUPS = gl.constexpr({self.groups})  # warpgroups of 64 rows of {shape.p}
STEP = gl.constexpr({self.columns})  # of {shape.m}, an iteration
STAGES = gl.constexpr({self.stages})
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {self.columns}, 16]))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {self.f}, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, RESULT, 2))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES))
RESULT_ROW = gl.constexpr(gl.SliceLayout(1, RESULT))
{maps}
""".strip("\n")

    def _next_stage(self) -> list[str]:
        return ["stage += 1", "if stage == STAGES:", "    stage = 0", "    phase ^= 1"]

    def _widths(self) -> list[int]:
        return sorted({r.width for r in (*self.stills, *self.rings)} | {self.f})

    def _load(self) -> str:
        early, late = [r for r in self.rings if r.early], [r for r in self.rings if not r.early]
        names = [x.name for x in (*self.stills, *self.rings)]
        doc = f'"""The loading warp: all of a program\'s tiles of {_listed(names)}, in the order they are read."""'
        step = [
            "next_stage = stage + 1",
            "next_phase = phase",
            "if next_stage == STAGES:",
            "    next_stage = 0",
            "    next_phase = phase ^ 1",
        ]
        first = ("next_stage", "next_phase") if self.resident else ("0", None)
        lines = [
            *(step if self.resident else []),
            *(["tile = gl.load(visits) // 2"] if self.listed else []),
            *(line for r in early for line in self._copy(r, self._at("tile", "end - 1"), *first)),
        ]
        for x in self.stills:
            lines += [
                *([f"mbarrier.wait({x.name}_empty, still_phase)"] if self.resident else []),
                f"mbarrier.expect({x.name}_full, GROUPS * {x.name}_map.block_type.nbytes)",
                "for group in gl.static_range(GROUPS):",
                f"    at = {self._coordinates(x.operand, f'row + group * {GROUP_ROWS}')}",
                f"    tma.async_copy_global_to_shared({x.name}_map, at, {x.name}_full, {x.name}_tile.index(group))",
            ]
        lines += self._copy_tables(self._at("tile", "end - 1"), *first)
        lines += [
            *(["still_phase ^= 1", "stage = next_stage", "phase = next_phase"] if self.resident else []),
            *([] if self.resident else ["stage = 0", "phase = 1"]),
            "for visit in range(1, count):" if self.listed else "for tile in range(end - 1 - first):",
            *(["    next_tile = gl.load(visits + visit) // 2"] if self.listed else []),
            *indent(step),
            *indent(
                line
                for r in early
                for line in self._copy(r, self._at("next_tile", "end - 2 - tile"), "next_stage", "next_phase")
            ),
            *indent(self._copy_tables(self._at("next_tile", "end - 2 - tile"), "next_stage", "next_phase")),
            *indent(line for r in late for line in self._copy(r, self._at("tile", "end - 1 - tile"), "stage", "phase")),
            "    stage = next_stage",
            "    phase = next_phase",
            *(["    tile = next_tile"] if self.listed else []),
            *self._take_place(),
            *(line for r in late for line in self._copy(r, self._at("tile", "first"), "stage", "phase")),
        ]
        if self.resident:  # one before the first stage, none of which has been read
            lines = ["stage = STAGES - 1", "phase = 0", "still_phase = 1", *self._each_place(lines, loads=True)]
        return function("load", [*self._load_arguments(), *self._table_constants()], [doc, *lines])

    def _at(self, listed: str, ranged: str) -> str:
        """The row at which a tile begins: of the list, or of the range."""
        return f"{paren(listed if self.listed else ranged)} * STEP"

    def _copy(self, ring: Ring, row: str, stage: str, phase: str | None = None) -> list[str]:
        """A tile to its place in the ring, after what was there has been read (`phase`; None: nothing was). The values
        of columns come with the first ring's."""
        x = ring.name
        copies = {x: self._coordinates(ring.operand, row)}
        if ring == self.rings[0]:
            copies |= {c.name: self._run_coordinates(c, row) for c in self.copied_columns}
        size, full = " + ".join(f"{name}_map.block_type.nbytes" for name in copies), f"{x}_full.index({stage})"
        return [
            *([f"mbarrier.wait({x}_empty.index({stage}), {phase})"] if phase is not None else []),
            f"mbarrier.expect({full}, {size})",
            *(
                f"tma.async_copy_global_to_shared({name}_map, {at}, {full}, {name}_tiles.index({stage}))"
                for name, at in copies.items()
            ),
        ]

    def _load_arguments(self) -> list[str]:
        maps = [f"{x.name}_map" for x in (*self.stills, *self.rings, *self._runs_and_tables())]
        rings = [*self._tiles(), *self._barriers(), *self._table_rings()]
        if self.resident:
            taken = ["upcoming", "taken"] if self.dynamic else []
            return [*maps, *rings, *taken, "programs", *self._lists(), *self.sizes]
        ends = self._ends() if self.listed else ["first", "end"]
        return [*maps, *rings, *self.shape.batch, "row", *ends]

    def _turns(self) -> tuple[list[str], list[str]]:
        return (["take_turn(group)"], ["pass_turn(group)"]) if self.groups > 1 else ([], [])

    def _multiply(self, still: Callable[[Ring], str], stage: str, prefix: str) -> list[str]:
        """All products with the tiles of a stage, issued."""
        lines = []
        seen: set[str] = set()
        for x, score in zip(self.shape.products, self._score_names(), strict=True):
            ring = self.ring(x.moving)
            if ring.name not in seen:
                lines.append(f"{ring.name}_tile = {self._view(ring, stage)}.permute([1, 0])")
                seen.add(ring.name)
            rows = still(next(r for r in self.stills if r.operand == x.still))
            lines.append(
                f"{prefix}{score} = warpgroup_mma({rows}, {ring.name}_tile, zero, use_acc=False, is_async=True)"
            )
        return lines

    def _accumulate(self, stage: str, phase: str, prefix: str) -> list[str]:
        """All weighted sums with the tiles of a stage, issued. What a product reads as well has been waited for."""
        lines = []
        seen: set[str] = set()
        for x, name in zip(self.shape.sums, self._sum_names(), strict=True):
            ring = self.ring(x.values)
            if ring.name not in seen:
                if not ring.early:
                    lines.append(f"mbarrier.wait({ring.name}_full.index({stage}), {phase})")
                lines.append(f"{ring.name}_{'rows' if ring.early else 'tile'} = {self._view(ring, stage)}")
                seen.add(ring.name)
            tile = f"{ring.name}_{'rows' if ring.early else 'tile'}"
            weights = self.weight_names[x.weights]
            lines.append(f"{prefix}{name} = warpgroup_mma({weights}, {tile}, {name}, is_async=True)")
        return lines

    def _waited(self, pending: int, targets: Sequence[str], sources: Sequence[str]) -> str:
        return f"{', '.join(targets)} = warpgroup_mma_wait({pending}, deps=[{', '.join(sources)}])"

    def _advance(self) -> str:
        scores, sums, states = self._score_names(), self._sum_names(), self._state_names()
        weights = list(self.weight_names.values())
        rescales = list(self.rescale_names.values())
        early, late = [r for r in self.rings if not r.late], [r for r in self.rings if r.late]
        turn, done = self._turns()
        lines = [
            '"""One iteration: the next scores are issued before the last weights meet their values."""',
            *self._pack(),
            "last_stage = stage",
            "last_phase = phase",
            *self._next_stage(),
            *self._read_columns_early("MASKED"),
            *(f"mbarrier.wait({r.name}_full.index(stage), phase)" for r in self.rings if r.early),
            *self._read_columns_copied("stage"),
            *turn,
            *self._multiply(lambda still: f"{still.name}_tile", "stage", "next_"),
            *self._accumulate("last_stage", "last_phase", "next_"),
            *done,
            *self._read_tables("stage", "phase"),
            self._waited(len(sums), scores, [f"next_{s}" for s in scores]),
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in early),
            *self._leave_stills("last"),
            call(
                [*states, *rescales, *(f"next_{w}" for w in weights)],
                "weigh",
                [*scores, *states, "tile * STEP", *self._points(), *self._context(), "MASKED"],
            ),
            self._waited(0, [*sums, *weights], [*(f"next_{s}" for s in sums), *weights]),
            *(f"mbarrier.arrive({r.name}_empty.index(last_stage))" for r in late),
        ]
        for name, factor in zip(sums, self.rescales, strict=True):
            if factor is not None:
                lines.append(f"{name} = {name} * gl.convert_layout({self.rescale_names[factor]}, RESULT_ROW)[:, None]")
        lines.append(f"return {', '.join([*states, *sums, *(f'next_{w}' for w in weights), 'stage', 'phase'])}")
        last = ["last"] if self.resident else []
        constants = [*last, self._masked_argument(), *self._table_constants(), "group: gl.constexpr"]
        return function("advance", [*self._advance_arguments(), *constants], lines)

    def _pack(self) -> list[str]:
        """The weights, which iterations hand on, in the form in which products read them: first of all where they are
        read. With fewer than three warpgroups the compiler finds that by itself."""
        if self.groups < 3:
            return []
        self.used.add("packed")
        return [f"{name} = packed({name})" for name in self.weight_names.values()]

    def _leave_stills(self, last: str) -> list[str]:
        """Behind the last products of a place (`last`: whether these are they), the next place's operands may come."""
        arrivals = [f"    mbarrier.arrive({x.name}_empty)" for x in self.stills]
        return [f"if {last}:", *arrivals] if self.resident else []

    def _running(self) -> list[str]:
        """What an iteration takes from the one before."""
        return [*self._state_names(), *self._sum_names(), *self.weight_names.values(), "stage", "phase"]

    def _advance_arguments(self) -> list[str]:
        left = [f"{x.name}_empty" for x in self.stills] if self.resident else []
        always = ["tile", *self._running(), *self._tiles(), *left, *self._ring_barriers(), "zero", *self._context()]
        return [*always, *self._table_arguments(always)] if self.tables else always

    def _view(self, ring: Ring, at: str, still: bool = False) -> str:
        """A tile without its dimensions of one element."""
        rows, tile = (GROUP_ROWS, "tile") if still else (self.columns, "tiles")
        dtype = GLUON_DTYPES[self.shape.dtype]
        return f"{ring.name}_{tile}.index({at})._reinterpret({dtype}, [{rows}, {ring.width}], TILE_{ring.width})"

    def _compute(self) -> str:
        shape = self.shape
        scores, sums, states = self._score_names(), self._sum_names(), self._state_names()
        weights = list(self.weight_names.values())
        rescales = list(self.rescale_names.values())
        printer = self._printer("")
        p_ = f"{shape.p}_"
        doc = f'"""A warpgroup: {GROUP_ROWS} rows of {shape.p}, all of their loop, and what follows it."""'
        turn, done = self._turns()
        begun = ["if group == GROUPS - 1:", "    pass_turn(group)  # the first turn is the first warpgroup's"]
        begun = begun if self.groups > 1 else []
        stage, phase, still_phase = ("stage", "phase", "still_phase") if self.resident else ("0", "0", "0")
        lines = [f"{p_} = row + group * {GROUP_ROWS} + gl.arange(0, {GROUP_ROWS}, ROW)"]
        for x in self.loads:
            if x.name is not None:
                lines.append(f"{x.name} = {self._element(x.access, printer).code}")
        lines += self._initial(printer)
        lines.append("tile = gl.load(visits) // 2" if self.listed else "tile = end - 1")
        lines += self._read_columns_early("True")
        lines += self._next_stage() if self.resident else begun
        lines += [f"mbarrier.wait({x.name}_full, {still_phase})" for x in self.stills]
        lines += [f"{x.name}_rows = {self._view(x, 'group', still=True)}" for x in self.stills]
        lines += [
            *(f"mbarrier.wait({r.name}_full.index({stage}), {phase})" for r in self.rings if r.early),
            *self._read_columns_copied(stage),
            *turn,
            *self._multiply(lambda still: f"{still.name}_rows", stage, ""),
            *done,
            self._waited(0, scores, scores),
            *(f"mbarrier.arrive({r.name}_empty.index({stage}))" for r in self.rings if not r.late),
            *self._leave_stills("count == 1" if self.listed else "tile == first"),
            *self._read_tables(stage, phase),
            call(
                [*states, *rescales, *weights],
                "weigh",
                [*scores, *states, "tile * STEP", *self._points(), *self._context(), "True"],
            ),
            *([] if self.resident else ["stage = 0", "phase = 0"]),
        ]
        stills = {f"{x.name}_tile" for x in self.stills}
        passed = [x.removesuffix("_tile") + "_rows" if x in stills else x for x in self._advance_arguments()]
        if self.listed:
            lines += [
                "following = gl.load(visits + gl.minimum(1, count - 1))",
                "for i in range(1, count):",
                "    visit = following",
                "    following = gl.load(visits + gl.minimum(i + 1, count - 1))",
                "    tile = visit // 2",
            ]
        else:
            lines += ["for _ in range(end - 1 - first):", "    tile -= 1"]
        last = ["i == count - 1" if self.listed else "tile == first"] if self.resident else []
        passed += [*last, self._edge(), *self._table_flags(), "group"]
        lines += [
            *indent(call(self._running(), "advance", passed).splitlines()),
            *self._pack(),
            *self._accumulate("stage", "phase", ""),
            self._waited(0, [*sums, *weights], [*sums, *weights]),
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in self.rings if r.late and self.resident),
            *self._settle(),
            *self._after(),
            *(["tma.store_wait(0)  # of the rows before"] if self.resident and shape.written else []),
        ]
        for written in shape.written:
            lines += self._store(written)
        if self.resident:
            lines.append("still_phase ^= 1")
            lines = [*begun, "stage = STAGES - 1", "phase = 1", "still_phase = 0", *self._each_place(lines)]
        lines.append("tma.store_wait(0)")
        constants = [*self._table_constants(), "group: gl.constexpr"]
        return function("compute", [*self._compute_arguments(), *constants], [doc, *lines])

    def _initial(self, printer: Printer) -> list[str]:
        """The running values and sums before the first iteration."""
        shape = self.shape
        lines = [f"zero = gl.full([{GROUP_ROWS}, STEP], 0.0, gl.float32, SCORES)"]
        for state in shape.states:
            name, init = self.name(state.name), printer.value(state.init).code
            if state.name in shape.split:
                lines.append(f"{name} = row_parts(zero)")
            elif shape.p in state.ranks:
                lines.append(f"{name} = gl.full([{GROUP_ROWS}], {init}, gl.float32, ROW)")
            else:
                raise Unsupported(f"{state.name} runs without the rank {shape.p}")
        return lines + [f"{s} = gl.full([{GROUP_ROWS}, {self.f}], 0.0, gl.float32, RESULT)" for s in self._sum_names()]

    def _store(self, x: Operand) -> list[str]:
        """A tile of results through shared memory, that of an operand where there is one to spare."""
        o, dtype = self.name(x.tensor), GLUON_DTYPES[self.dtype(x.tensor)]
        if x.tensor in self.shares:
            source, target = f"{self.shares[x.tensor]}_tile", f"{self.shares[x.tensor]}_rows"
        else:
            source = f"{o}_tile"
            target = f"{o}_tile.index(group)._reinterpret({dtype}, [{GROUP_ROWS}, {self.f}], TILE_{self.f})"
        return [
            f"{target}.store({o}.to({dtype}))",
            "fence_async_shared()",
            f"at = {self._coordinates(x, f'row + group * {GROUP_ROWS}')}",
            f"tma.async_copy_shared_to_global({o}_map, at, {source}.index(group))",
        ]

    def _compute_arguments(self) -> list[str]:
        written = [self.name(x.tensor) for x in self.shape.written]
        own = [f"{self.name(x.tensor)}_tile" for x in self.shape.written if x.tensor not in self.shares]
        places = ["programs", *self._lists()] if self.resident else self._placed()
        places = ["upcoming", *places] if self.dynamic else places
        return [
            *(f"{o}_map" for o in written), *self._tiles(), *own, *self._barriers(), *self._table_rings(), *places,
            *self._pointers(), *self.sizes,
        ]  # fmt: skip

    def _sum_maps(self) -> list[str]:
        """The copy engine's views of what programs add up in memory."""
        return []

    def _kernel(self) -> str:
        shape = self.shape
        written = [self.name(x.tensor) for x in shape.written]
        names = [*(r.name for r in (*self.stills, *self.rings)), *(t.name for t in self._runs_and_tables()), *written]
        maps = [f"{x}_map" for x in names] + self._sum_maps()

        def tiles(name: str, dtype: str, count: str, operand: Operand, rows: int, width: int, layout: str) -> str:
            block = [1] * len(operand.batch) + [rows, width]
            sizes = f"[{count}, {', '.join(map(str, block))}]"
            return f"{name} = gl.allocate_shared_memory({GLUON_DTYPES[dtype]}, {sizes}, {layout}_map.layout)"

        lines = [
            tiles(f"{x.name}_tile", shape.dtype, "GROUPS", x.operand, GROUP_ROWS, x.width, x.name) for x in self.stills
        ]
        lines += [
            tiles(f"{r.name}_tiles", shape.dtype, "STAGES", r.operand, self.columns, r.width, r.name)
            for r in self.rings
        ]
        lines += [
            tiles(f"{o}_tile", self.dtype(x.tensor), "GROUPS", x, GROUP_ROWS, self.f, o)
            for o, x in zip(written, shape.written, strict=True)
            if x.tensor not in self.shares
        ]
        lines += self._allocate_tables()
        if self.dynamic:
            lines.append("upcoming = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))")
        stills, rings = self._still_barriers(), self._ring_barriers()
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())" for b in stills]
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())" for b in rings]
        lines += [f"mbarrier.init({b}, {'1' if b.endswith('_full') else 'GROUPS'})" for b in stills]
        lines.append("for stage in gl.static_range(STAGES):")
        lines += [f"    mbarrier.init({b}.index(stage), {'1' if b.endswith('_full') else 'GROUPS'})" for b in rings]
        lines += self._init_tables()
        if not self.resident:
            lines.append(call(self._placed(), "place", self._place_arguments()))
        flags = self._table_flags()
        compute = ", ".join([*self._compute_arguments(), *flags])
        load = ", ".join([*self._load_arguments(), *flags])
        lines.append("gl.warp_specialize(")
        lines.append("    [")
        for g in range(self.groups):
            lines += wrapped(f"(compute, ({compute}, {g})),", 8)
        lines += wrapped(f"(load, ({load})),", 8)
        regs = REGISTERS[self.groups]
        warps, registers = [4] * (self.groups - 1) + [1], [regs] * (self.groups - 1) + [24]
        lines += ["    ],", f"    {warps},", f"    {registers},", ")"]
        programs = ["programs"] if self.resident else []
        decorator = f"@gluon.jit(do_not_specialize={[*programs, *self.sizes]!r})"
        taken = ["taken"] if self.dynamic else []
        arguments = [*maps, *self._pointers(), *self._lists(), *taken, *programs, *self.sizes, *self._table_constants()]
        return function("kernel", arguments, lines, decorator)

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
        blocks = [(x.operand, GROUP_ROWS, x.width) for x in self.stills]
        blocks += [(r.operand, self.columns, r.width) for r in self.rings]
        written = [(x, GROUP_ROWS, self.f) for x in shape.written]
        maps = [f"tile_map({self._seen(operand)}, {rows}, {width})" for operand, rows, width in blocks]
        maps += [*self._run_maps(), *(f"{t.name}_map" for t in self.tables)]
        maps += [f"tile_map({self._seen(operand)}, {rows}, {width})" for operand, rows, width in written]
        others = []
        for t in dict.fromkeys(x.access.tensor for x in self.loads):
            others += [self.name(t), f"*{self.name(t)}.stride()"]
        for t in self._row_results():
            others += [self.name(t), f"*{self.name(t)}.stride()"]
        lines.append("if programs:")
        if self.listed:
            lines += indent(self._make_lists(device))
            others += ["visits", "counts"]
        lines += indent(self._prepare_tables())
        if self.dynamic:
            if not self.listed:
                lines.append(f"    taken = torch.zeros((1,), dtype=torch.int32, device={device})")
            others.append("taken")
        others += ["programs"] if self.resident else []
        lines.append(f"    kernel[({f'min(programs, {self.resident})' if self.resident else 'programs'},)](")
        lines += [f"        {m}," for m in maps]
        if others or self.sizes:
            lines += wrapped(", ".join([*others, *self.sizes]) + ",", 8)
        lines += [f"        {flag}={flag}," for flag in self._table_flags()]
        lines += ["        num_warps=4,", "    )"]
        lines.append(f"return {', '.join(outputs)},")
        signature = ", ".join(inputs + (["*", *symbols] if symbols else []))
        doc = '"""' + f"{self.cascade.name}: inputs with any strides; sizes by name." + '"""'
        body = "\n".join("    " + line for line in [doc, *lines])
        return f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}"

    def _allocation(self, tensor: str, device: str) -> str:
        t = self.cascade.tensors[tensor]
        order = dict(self.schedule.out_order).get(tensor, t.ranks)
        across = next((t.ranks[x.across] for x in self.shape.written if x.tensor == tensor), order[-1])
        if order[-1] != across:
            raise Unsupported(f"{tensor} with {across} not innermost")
        shape = ", ".join(python(self.shape.extent(r)) for r in order)
        comma = "," if len(order) == 1 else ""
        code = f"torch.empty(({shape}{comma}), dtype={_TORCH[t.dtype]}, device={device})"
        if order != t.ranks:
            code += f".permute({', '.join(str(order.index(r)) for r in t.ranks)})"
        return code


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
