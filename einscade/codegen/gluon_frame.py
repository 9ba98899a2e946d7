"""What all warp-specialised kernels of the Gluon emitter have in common: the frame around an iteration.

Comes in: a `Form` and a `Schedule`. Goes out: `Frame`, whose `text` is a module that imports on its own. One warp keeps
the copy engine busy with rings of tiles of the operands that move; each of one to three warpgroups owns 64 rows. What
an iteration does, and so what the loading warp and the warpgroups run, is a subclass's: `_functions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from einscade.codegen.gluon_form import Operand
from einscade.codegen.gluon_plan import GROUP_ROWS, REGISTERS, Ring
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_tables import Tables
from einscade.codegen.gluon_text import REDUCTIONS, TILE_MAP, call, function, indent, paren, wrapped
from einscade.codegen.gluon_values import HELPERS, Printer
from einscade.codegen.host import python
from einscade.codegen.overlap import GLUON_WAIT, OPTION
from einscade.codegen.source import Unsupported

__all__ = ["IMPORTS", "Frame"]

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


class Frame(Tables):
    """One module's text, but for its iteration."""

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
        """The functions of the kernel, each after those it calls, the kernel last."""
        raise NotImplementedError

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

    def _stage_after(self) -> list[str]:
        """The place in the rings after this one, beside it."""
        return [
            "next_stage = stage + 1",
            "next_phase = phase",
            "if next_stage == STAGES:",
            "    next_stage = 0",
            "    next_phase = phase ^ 1",
        ]

    def _next_stage(self) -> list[str]:
        return ["stage += 1", "if stage == STAGES:", "    stage = 0", "    phase ^= 1"]

    def _widths(self) -> list[int]:
        return sorted({r.width for r in (*self.stills, *self.rings)} | {self.f})

    def _copy_still(self, x: Ring) -> list[str]:
        """An operand's tiles that stay to their places, one a warpgroup; in a resident program once the last place's
        have been read."""
        return [
            *([f"mbarrier.wait({x.name}_empty, still_phase)"] if self.resident else []),
            f"mbarrier.expect({x.name}_full, GROUPS * {x.name}_map.block_type.nbytes)",
            "for group in gl.static_range(GROUPS):",
            f"    at = {self._coordinates(x.operand, f'row + group * {GROUP_ROWS}')}",
            f"    tma.async_copy_global_to_shared({x.name}_map, at, {x.name}_full, {x.name}_tile.index(group))",
        ]

    def _copy(self, ring: Ring, row: str, stage: str, phase: str | None = None, view: str | None = None) -> list[str]:
        """A tile to its place in the ring, after what was there has been read (`phase`; None: nothing was). The values
        of columns come with the first ring's. `view`: whose the copy engine's view is, if not the ring's."""
        x = ring.name
        copies = {x: (view or x, self._coordinates(ring.operand, row))}
        if ring == self.rings[0]:
            copies |= {c.name: (c.name, self._run_coordinates(c, row)) for c in self.copied_columns}
        size = " + ".join(f"{of}_map.block_type.nbytes" for of, _ in copies.values())
        full = f"{x}_full.index({stage})"
        return [
            *([f"mbarrier.wait({x}_empty.index({stage}), {phase})"] if phase is not None else []),
            f"mbarrier.expect({full}, {size})",
            *(
                f"tma.async_copy_global_to_shared({of}_map, {at}, {full}, {name}_tiles.index({stage}))"
                for name, (of, at) in copies.items()
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

    def _waited(self, pending: int, targets: Sequence[str], sources: Sequence[str]) -> str:
        return f"{', '.join(targets)} = warpgroup_mma_wait({pending}, deps=[{', '.join(sources)}])"

    def _view(self, ring: Ring, at: str, still: bool = False) -> str:
        """A tile without its dimensions of one element."""
        rows, tile = (GROUP_ROWS, "tile") if still else (self.columns, "tiles")
        dtype = GLUON_DTYPES[self.shape.dtype]
        return f"{ring.name}_{tile}.index({at})._reinterpret({dtype}, [{rows}, {ring.width}], TILE_{ring.width})"

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

        def slots(x: Ring) -> str:
            return "GROUPS" if self._slots(x) == 1 else f"{self._slots(x)} * GROUPS"

        lines = [
            tiles(f"{x.name}_tile", shape.dtype, slots(x), x.operand, GROUP_ROWS, x.width, x.name) for x in self.stills
        ]
        lines += [
            tiles(f"{r.name}_tiles", shape.dtype, "STAGES", r.operand, self.columns, r.width, r.name)
            for r in self.buffers
        ]
        lines += [
            tiles(f"{o}_tile", self.dtype(x.tensor), "GROUPS", x, GROUP_ROWS, self.f, o)
            for o, x in zip(written, shape.written, strict=True)
            if x.tensor not in self.shares
        ]
        lines += self._allocate_tables()
        if self.dynamic:
            lines.append("upcoming = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))")
        rings = self._ring_barriers()
        slotted = {f"{x.name}_{end}": n for x in self.stills if (n := self._slots(x)) > 1 for end in ("full", "empty")}
        stills = [b for b in self._still_barriers() if b not in slotted]
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())" for b in stills]
        lines += [
            f"{b} = gl.allocate_shared_memory(gl.int64, [{n}, 1], mbarrier.MBarrierLayout())"
            for b, n in slotted.items()
        ]
        lines += [f"{b} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())" for b in rings]
        single = [*stills, *(f"{b}.index({i})" for b, n in slotted.items() for i in range(n))]
        lines += [f"mbarrier.init({b}, {'1' if '_full' in b else 'GROUPS'})" for b in single]
        lines.append("for stage in gl.static_range(STAGES):")
        lines += [f"    mbarrier.init({b}.index(stage), {'1' if b.endswith('_full') else 'GROUPS'})" for b in rings]
        lines += self._init_tables()
        lines += [*[GLUON_WAIT] * self.listed, *self._begun()]
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
        others += self._marks()
        lines.append("if programs:")
        if self.listed:
            lines += indent(self._make_lists(device))
            others.append("visits")
        lines += indent(self._prepare_tables())
        lines += indent(self._counters(device))
        others += ["taken"] if self.dynamic else []
        others += ["programs"] if self.resident else []
        lines += self._launches(maps, [*others, *self.sizes])
        lines.append(f"return {', '.join(outputs)},")
        signature = ", ".join(inputs + (["*", *symbols] if symbols else []))
        doc = '"""' + f"{self.cascade.name}: inputs with any strides; sizes by name." + '"""'
        body = "\n".join("    " + line for line in [doc, *lines])
        return f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}"

    def _begun(self) -> list[str]:
        """The first lines of the kernel, when its barriers are there."""
        return []

    @property
    def counting(self) -> bool:
        """Whether the host makes what counts places taken: a list makes it with itself."""
        return self.dynamic and not self.listed

    def _counters(self, device: str) -> list[str]:
        """The lines that make it."""
        return [f"taken = torch.zeros(1, dtype=torch.int32, device={device})"] if self.counting else []

    def _launches(self, maps: Sequence[str], others: Sequence[str]) -> list[str]:
        """The lines that launch the kernel. `maps`, `others`: its arguments, but for flags and options."""
        return [
            f"    kernel[({self._grid()},)](",
            *(f"        {m}," for m in maps),
            *(wrapped(", ".join(others) + ",", 8) if others else []),
            *(f"        {flag}={flag}," for flag in self._table_flags()),
            f"        {self._options()}",
            "    )",
        ]

    def _grid(self) -> str:
        return f"min(programs, {self.resident})" if self.resident else "programs"

    def _options(self) -> str:
        """How the kernel is launched: behind one that makes lists before that has ended."""
        return ", ".join(["num_warps=4", *[OPTION] * self.listed]) + ","

    def _allocation(self, tensor: str, device: str) -> str:
        t = self.cascade.tensors[tensor]
        order = dict(self.schedule.out_order).get(tensor, t.ranks)
        across = next((t.ranks[x.across] for x in self.shape.written if x.tensor == tensor), order[-1])
        if order[-1] != across:
            raise Unsupported(f"{tensor} with {across} not innermost")
        shape = ", ".join(python(self.shape.extent(r)) for r in order)
        code = f"torch.empty({shape}, dtype={_TORCH[t.dtype]}, device={device})"
        if order != t.ranks:
            code += f".permute({', '.join(str(order.index(r)) for r in t.ranks)})"
        return code
