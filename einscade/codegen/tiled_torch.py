"""The tiled PyTorch emitter: a loop program as readable Python over torch operations, for any device.

Comes in: a `LoopProgram` and a `Schedule`. Goes out: `Source` in "torch". A serial nest becomes a loop over tiles of
its long grid ranks with a loop over tiles of the serial rank inside; the other grid ranks are batch dimensions.
Contractions are `torch.matmul` on views; a tile is masked only where it crosses the edge of its domain, and tiles
outside are not visited. Memory is that of a few tiles. `emit_flat` runs every Einsum whole and out of place, so that
autograd can differentiate it.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from einscade.codegen.grouping import Group, split_groups
from einscade.codegen.host import python
from einscade.codegen.loops import FlatNest, LoopProgram, SerialNest, flat, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.codegen.tiles import tile_loop, whole_scans
from einscade.codegen.torch_flat import FlatWriter
from einscade.codegen.torch_serial import SerialWriter
from einscade.codegen.torch_values import Name
from einscade.codegen.torch_writer import TORCH_DTYPES, Lines
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Expr, var
from einscade.ir.text import parse_expr

__all__ = ["TorchModule", "emit", "emit_flat"]

_RESERVED = frozenset({"torch", "run", "range", "min", "max", "keep", "partial"})


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's text under a schedule; `Unsupported` where an expression has no torch counterpart."""
    return Source("torch", TorchModule(program, schedule, in_place=True).text())


def emit_flat(cascade: Cascade) -> Source:
    """The cascade with every Einsum whole, out of place and differentiable: quadratic memory, the fallback backward."""
    return Source("torch", TorchModule(flat(cascade), Schedule(), in_place=False).text())


def accumulation_dtype(cascade: Cascade) -> str:
    return "float64" if any(t.dtype == "f64" for t in cascade.inputs) else "float32"


class TorchModule:
    """One module's text. Ranks read in groups are split first, and the program planned again on the split cascade."""

    def __init__(self, program: LoopProgram, schedule: Schedule, in_place: bool, grouped: bool = True) -> None:
        self.original, self.views = program.cascade, program.views
        split, self.groups = split_groups(program.cascade) if grouped else (program.cascade, ())
        flat_plan = not program.serial_nests
        self.program = program if not self.groups else flat(split) if flat_plan else plan(split)
        self.cascade = self.program.cascade
        self.schedule, self.in_place = schedule, in_place
        self.out = Lines()
        found = whole_scans(self.cascade)
        self.points, self.results = found.points, found.results
        self.acc = accumulation_dtype(self.cascade)
        self.device = f"{self.code(self.original.inputs[0].name)}.device" if self.original.inputs else '"cpu"'
        self.names: dict[str, Name] = {t.name: self.stored(t.name) for t in self.cascade.inputs}

    # -- names and shapes --

    def code(self, tensor: str) -> str:
        return f"{tensor}_" if tensor in _RESERVED or tensor in self.cascade.symbols else tensor

    def tiles(self) -> Mapping[str, int]:
        return dict(self.schedule.tiles)

    def size(self, expr: Expr) -> str:
        """An extent as code, tile symbols as their numbers."""
        return python(expr.xreplace({var(s): sympy.Integer(n) for s, n in self.tiles().items()}))

    def stored(self, tensor: str) -> Name:
        t = self.cascade.tensors[tensor]
        extents = tuple(self.size(self.cascade.extent(r)) for r in t.ranks)
        return Name(self.code(tensor), t.ranks, t.dtype, True, extents=extents)

    # -- the module --

    def text(self) -> str:
        symbols = [s for s in self.original.symbols if s not in self.schedule.settled]
        inputs = [self.code(t.name) for t in self.original.inputs]
        signature = ", ".join(inputs + (["*", *symbols] if symbols else []))
        for symbol, expr in self.schedule.launch:
            self.out(f"{symbol} = {self.size(parse_expr(expr))}")
        self.boundary_views()
        for nest in self.program.nests:
            self.nest(nest)
        self.out("return " + ", ".join(self.result(o) for o in self.original.outputs) + ",")
        body = "\n".join(self.out.lines)
        title = f"{self.original.name}: written by einscade for the cascade"
        doc = "\n".join("    " + line for line in str(self.original).splitlines())
        function = f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}\n"
        return f'"""{title}\n\n{doc}\n"""\n\n{self.preamble()}\n\n{function}'

    def preamble(self) -> str:
        return "import torch\n"

    def boundary_views(self) -> None:
        for t in self.original.inputs:
            dim = 0
            views = ""
            for r in t.ranks:
                group = self.group(r)
                if group is not None:
                    views += f".unflatten({dim}, ({self.extent(group.outer)}, {group.size}))"
                dim += 2 if group else 1
            if views:
                self.out(f"{self.code(t.name)} = {self.code(t.name)}{views}")

    def group(self, rank: str) -> Group | None:
        return next((g for g in self.groups if g.rank == rank), None)

    def tile(self, rank: str) -> int | None:
        """The tile of a grid rank; one of a rank that was split into groups is a tile of whole groups."""
        for g in self.groups:
            if rank == g.outer:
                whole = self.schedule.tile(g.rank)
                return None if whole is None else max(1, whole // g.size)
        return self.schedule.tile(rank)

    def extent(self, rank: str) -> str:
        return self.size(self.cascade.extent(rank))

    def result(self, output: str) -> str:
        ranks = self.original.tensors[output].ranks
        code = self.code(output)
        for dim, r in enumerate(ranks):  # joined from the left, so that each pair is at its final place
            if self.group(r) is not None:
                code += f".flatten({dim}, {dim + 1})"
        for joined in self.views.get(output, {}).values():
            first = ranks.index(joined[0])
            ranks = (*ranks[:first], joined[0], *ranks[first + len(joined) :])
            code += f".flatten({first}, {first + len(joined) - 1})"
        return code

    def nest(self, nest: SerialNest | FlatNest) -> None:
        if isinstance(nest, SerialNest):
            SerialWriter(self, tile_loop(self.cascade, nest)).write()
        else:
            FlatWriter(self, nest).write()

    def allocate(self, tensor: str, zeros: bool = False) -> None:
        """An output, in memory in the schedule's order of its (unsplit) ranks."""
        t = self.cascade.tensors[tensor]
        order = dict(self.schedule.out_order).get(tensor)
        ranks = t.ranks
        if order is not None:
            parts = {g.rank: (g.outer, g.inner) for g in self.groups}
            ranks = tuple(x for r in order for x in parts.get(r, (r,)))
        shape = ", ".join(self.extent(r) for r in ranks) or "()"
        make = "zeros" if zeros else "empty"
        dtype = TORCH_DTYPES[t.dtype]
        code = f"torch.{make}({shape}, dtype=torch.{dtype}, device={self.device})"
        if ranks != t.ranks:
            code += f".permute({', '.join(str(ranks.index(r)) for r in t.ranks)})"
        self.out(f"{self.code(tensor)} = {code}")
        self.names[tensor] = self.stored(tensor)
