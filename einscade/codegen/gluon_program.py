"""Programs of several nests for Hopper: gradients, one Gluon kernel for each loop.

Comes in: a `LoopProgram` with more than one nest, and a `Schedule` with tiles for all of them. Goes out: `Source`, a
module whose `run` launches the kernels in order; flat nests (statistics of rows, sums of a group of heads) are torch
operations, as the torch emitter writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest
from math import ceil, prod

import sympy

from einscade.codegen.cost import Lengths
from einscade.codegen.gluon import IMPORTS
from einscade.codegen.gluon_chain import Chain
from einscade.codegen.gluon_form import Form, nest_form
from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_text import RUN_MAP, TILE_MAP
from einscade.codegen.loops import FlatNest, LoopProgram, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.tiled_torch import TorchModule
from einscade.ir.device import Device

__all__ = ["emit", "schedules"]

TILES = ((3, 64), (2, 128), (2, 64), (2, 32))
"""Warpgroups, and the tile along the loop, that a nest is tried with, best guess first."""


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's module. Raises `Unsupported` where a nest or the schedule does not fit."""
    return Source("triton", _Program(program, schedule).text())


def schedules(
    program: LoopProgram, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """Schedules for the program: every nest at its first choice of those that fit, then the second, and so on. Raises
    `Unsupported` as `emit` does, and where at these sizes a loop would leave most of the device idle."""
    if not program.serial_nests:
        raise Unsupported("the program has no loop: there is nothing to write a kernel for")
    forms = [nest_form(program.cascade, nest) for nest in program.serial_nests]
    if device is not None and sizes is not None:
        lengths = Lengths(program.cascade, sizes)
        for shape in forms:
            groups = ceil(lengths.rank(shape.p) / GROUP_ROWS) * prod(map(lengths.rank, shape.batch))
            if groups < device.processors // 2:
                raise Unsupported(f"{groups} warpgroups for {device.processors} processors")
    choices = [_choices(shape) for shape in forms]
    found = []
    for row in zip_longest(*choices):
        tiles = {k: v for choice, tried in zip(row, choices, strict=True) for k, v in (choice or tried[0]).items()}
        found.append(Schedule(tuple(sorted(tiles.items())), 4, 2, (), "cuda:90", True))
    return tuple(found)


def _choices(shape: Form) -> list[dict[str, int]]:
    found = []
    for groups, columns in TILES:
        tiles = {shape.p: groups * GROUP_ROWS}
        if isinstance(shape.loop.step, sympy.Symbol):
            tiles[shape.loop.step.name] = columns
        try:
            Chain(shape, Schedule(tuple(sorted(tiles.items())), 4, 2, (), "cuda:90", True))
        except Unsupported as reason:
            last = reason
            continue
        found.append(tiles)
    if not found:
        raise Unsupported(f"no tile of the loop over {shape.m} fits: {last}")
    return found


class _Program(TorchModule):
    """Launches in place of the serial nests' loops."""

    def __init__(self, program: LoopProgram, schedule: Schedule) -> None:
        super().__init__(program, schedule, in_place=True, grouped=False)
        self.kernels: list[str] = []

    def preamble(self) -> str:
        return "\n\n\n".join(
            [IMPORTS.strip("\n") + "\n", *self.kernels, TILE_MAP.strip("\n"), RUN_MAP.strip("\n") + "\n"]
        )

    def nest(self, nest: SerialNest | FlatNest) -> None:
        if isinstance(nest, FlatNest):
            super().nest(nest)
            return
        chain = Chain(nest_form(self.cascade, nest), self.schedule)
        mark = f"_{len(self.kernels) + 1}"
        self.kernels.append(_marked("\n\n\n".join(chain.parts()), mark))
        for output in nest.outputs:
            self.allocate(output)
        for tensor in (*nest.inputs, *nest.outputs):
            if chain.name(tensor) != self.code(tensor):
                self.out(f"{chain.name(tensor)} = {self.code(tensor)}")
        for line in chain.launch(self.device):
            self.out(re.sub(r"^( *)(kernel|list_tiles)\[", rf"\1\2{mark}[", line))


def _marked(text: str, mark: str) -> str:
    """A kernel's text with its functions and constants told apart from those of the module's other kernels."""
    functions = "|".join(dict.fromkeys(re.findall(r"^def (\w+)\(", text, re.MULTILINE)))
    constants = "|".join(dict.fromkeys(re.findall(r"^(\w+) = gl\.constexpr\(", text, re.MULTILINE)))
    used = rf"(?<![\w.])({functions})(?=\()|(?<=\()({functions})(?=, \()|(?<=, )({functions})(?=\))"
    text = re.sub(used, lambda m: f"{m[0]}{mark}", text)
    return re.sub(rf"(?<![\w.])({constants})\b", rf"\1{mark}", text)
