"""Where the tensors of a Triton kernel lie in memory.

Comes in: a loop program and a schedule. Goes out: `Stored`: of every tensor that `run` allocates for kernels the order
in which it is stored. A kernel computes its strides from the lengths, which costs the host less than an argument each.
What kernels alone read (the partial results of a loop in parts) lies in one tensor, one after another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sympy

from einscade.codegen.loops import LoopProgram, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.triton_values import scalar
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Expr, var

__all__ = ["Stored", "stored"]


@dataclass(frozen=True)
class Stored:
    """`orders`: the ranks of each allocated tensor in memory order, outermost first. `scratch`: those of them that lie
    in one tensor, in that order, and `pointer`, its name. `tiles`: numbers that stand for symbols."""

    cascade: Cascade
    orders: Mapping[str, tuple[str, ...]]
    scratch: tuple[str, ...]
    pointer: str
    tiles: Mapping[Expr, Expr]

    def argument(self, tensor: str) -> str:
        """The kernel's argument in which a tensor lies."""
        return self.pointer if tensor in self.scratch else tensor

    def lines(self, tensors: Collection[str]) -> list[str]:
        """Kernel code: the strides of those tensors that are allocated, and where those in the scratch memory begin."""
        made, at = [], self.pointer
        for t in self.scratch if {*self.scratch} & {*tensors} else ():
            strides, elements = self.strides(t)
            made += [f"{t} = {at}", *strides]
            at = f"{t} + {elements}"
        for t in tensors:
            made += self.strides(t)[0] if t in self.orders and t not in self.scratch else ()
        return made

    def strides(self, tensor: str) -> tuple[list[str], str]:
        """Lines, innermost first, and the tensor's elements as code: numbers, or in 64 bits."""
        lines, code = [], "1"
        for r in reversed(self.orders[tensor]):
            lines.append(f"{tensor}_{r} = {code}")
            extent = self.cascade.extent(r).xreplace(dict(self.tiles))
            shown = scalar(extent, {})
            if not code.isdigit():
                code = f"{tensor}_{r} * {shown if shown.isalnum() else f'({shown})'}"
            elif extent.is_Integer:
                code = str(int(code) * int(extent))
            else:
                code = f"tl.cast({shown}, tl.int64)" + (f" * {code}" if code != "1" else "")
        return lines, code

    def elements(self) -> Expr:
        """Of the scratch memory."""
        return sympy.Add(*(sympy.Mul(*map(self.cascade.extent, self.orders[t])) for t in self.scratch))


def stored(program: LoopProgram, schedule: Schedule) -> Stored:
    """How the results of the program's kernels are stored."""
    cascade = program.cascade
    orders = {o: cascade.tensors[o].ranks for nest in program.serial_nests for o in nest.outputs}
    tiles = {var(s): sympy.Integer(n) for s, n in schedule.tiles}
    scratch = []
    for at, nest in enumerate(program.nests):
        if all(isinstance(n, SerialNest) for n in program.nests[at:]):
            zeros = {e.name for e in (*nest.body, *nest.totals)} if isinstance(nest, SerialNest) else {}
            inner = [o for o in nest.outputs if o not in cascade.outputs and o not in zeros]
            scratch += [o for o in inner if cascade.tensors[o].dtype == "f32"]

    def width(tensor: str) -> int:
        extents = map(cascade.extent, cascade.tensors[tensor].ranks)
        return int(sympy.Mul(*(e for e in extents if e.is_Integer)))

    # what is wide first: each then begins at a multiple of what loads at once
    scratch.sort(key=width, reverse=True)
    orders |= {o: order for o, order in schedule.out_order if o in orders}
    return Stored(cascade, orders, tuple(scratch), cascade.fresh("scratch"), tiles)
