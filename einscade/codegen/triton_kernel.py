"""One serial nest as a Triton kernel.

Comes in: a cascade, one of its serial nests, a schedule. Goes out: `Kernel`: the text of a step function (one tile of
the loop, with or without masks), of the kernel, and the lines that launch it. A program of the kernel is one tile of
the nest's tiled grid ranks at one point of the others. The loop runs over the tiles that hold points: those across the
domain's edge masked, those inside it without any mask code.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.loops import SerialNest
from einscade.codegen.overlap import GO, WAIT
from einscade.codegen.schedule import Schedule
from einscade.codegen.triton_bounds import BoundsWriter
from einscade.codegen.triton_memory import Stored
from einscade.codegen.triton_tables import write_total
from einscade.codegen.triton_values import Lines, Local, Value, scalar, value
from einscade.ir.expr import free_vars, var
from einscade.passes.domains import span

__all__ = ["Kernel", "kernel"]


@dataclass(frozen=True)
class Kernel:
    """`text`: the functions. `name`: the kernel's. `grid`: code of the number of programs. `arguments`: what it takes,
    in order: tensors, strides, sizes. `described`: the block of each input read through a descriptor, if strides
    allow; for each the kernel takes a flag that says whether they did. `helpers`: functions it needs. `waits`: it is
    launched before the kernel in front of it has ended (`overlap`)."""

    name: str
    text: str
    grid: str
    tensors: tuple[str, ...]
    strides: tuple[tuple[str, int, str], ...]
    sizes: tuple[str, ...]
    described: Mapping[str, tuple[int, ...]]
    helpers: frozenset[str]
    waits: bool


def kernel(
    stored: Stored, nest: SerialNest, schedule: Schedule, name: str, waits: bool = False, awaited: bool = False
) -> Kernel:
    """Write the kernel, or raise `Unsupported`. `waits`, `awaited`: it overlaps with one before it, one behind it."""
    return _KernelWriter(stored.cascade, nest, schedule, name).write(stored, waits, awaited)


class _KernelWriter(BoundsWriter):
    """The text around the loops."""

    def heavy_last(self, rank: str) -> bool:
        """Whether later tiles of a rank have more to do, as the later rows under a causal domain have."""
        if self.loop.coordinate is None or not self.loop.skippable:
            return False
        reach = span(self.loop.domain, self.loop.coordinate, self.edges())
        return reach.stop is not None and var(f"{rank}_hi") in reach.stop.free_symbols and reach.start is None

    # -- the text --

    def write(self, stored: Stored, waits: bool, awaited: bool) -> Kernel:
        self.write_head()
        if not self.loop.body and (reached := self.reached()) != sympy.true:
            self.write_empty(reached)
        self.statements(self.loop.prologue)
        for state in self.loop.states:
            ranks = self.state_ranks(state)
            v = self.spread(value(state.init, self.scope), ranks)
            self.main(f"{state.name} = {v.code}")
            self.scope.locals[state.name] = Local(state.name, ranks)
        states = ", ".join(v.name for v in self.loop.states)
        step: str = ""
        parameters: list[str] = []
        if self.loop.body:
            step = self.write_step()
            call, parameters = self.step_call(step)
            self.write_loop(call, states)
        self.scope.blocks = {r: b for r, b in self.scope.blocks.items() if r not in self.loop.coordinates}
        self.masks = {}
        self.statements(self.loop.epilogue)
        for e in self.nest.totals:
            write_total(self, e)
        head = Lines()
        for line in stored.lines(self.scope.memory):
            head(line)
        for line in [WAIT] * waits + [GO] * awaited:
            head(line)
        self.main.lines[:0] = head.lines
        return self.assemble(stored, step, parameters, states, waits)

    def write_head(self) -> None:
        here = self.main
        here("program = tl.program_id(0)")
        tiled = self.tiled()
        for i, (r, size) in enumerate(tiled):
            extent = self.host(self.cascade.extent(r))
            here(f"{r}_tiles = tl.cdiv({extent}, {size})")
            if self.heavy_last(r):
                here(f"{r}_tile = {r}_tiles - 1 - program % {r}_tiles  # the tiles with most to do first")
            else:
                here(f"{r}_tile = program % {r}_tiles")
            if self.points or i < len(tiled) - 1:
                here(f"program = program // {r}_tiles")
            here(f"{r}_lo = {r}_tile * {size}")
            here(f"{r}_hi = tl.minimum({r}_lo + {size}, {extent})")
        for line in self.rows.lines() if self.rows else ():
            here(line)
        for r, n in self.columns.items():
            here(f"{r} = {r}_lo + tl.arange(0, {n})")
        for i, r in enumerate(reversed(self.points)):
            extent = self.host(self.cascade.extent(r))
            if i == len(self.points) - 1:
                here(f"{r} = program")
            else:
                here(f"{r} = program % {_wrapped(extent)}")
                here(f"program = program // {_wrapped(extent)}")
        for r in self.widths:
            here(f"{r} = tl.arange(0, {self.scope.blocks[r].size})")

    def write_empty(self, reached: Boolean) -> None:
        """A tile without points is zeros, and done."""
        self.main(f"if ~({scalar(reached, {})}):")
        self.main.depth += 1
        for s in self.loop.prologue:
            if s.name in self.nest.outputs:
                ranks = self.scope.dims(s.ranks)
                self.store(replace(s, row=sympy.true), Value(f"tl.zeros({self.shape(ranks)}, tl.float32)", ranks))
        self.main("return")
        self.main.depth -= 1

    def tiled(self) -> tuple[tuple[str, int], ...]:
        """The grid ranks that a program has several points of, with how many, those of neighbouring programs first."""
        rows = zip(self.rows.ranks, self.rows.tiles, strict=True) if self.rows else ()
        return (*self.columns.items(), *rows)

    def write_step(self) -> str:
        self.here, self.in_step = self.step, True
        x = self.loop.coordinate
        if x is not None:
            if self.uses_serial():
                self.step(f"{self.nest.serial} = {x}_lo // {self.step_size}")
            for c in self.loop.coordinates:
                self.step(f"{c} = {x}_lo + tl.arange(0, {self.step_size})")
        saved = dict(self.scope.locals)
        head = len(self.step.lines)
        self.statements(self.loop.body)
        self.step.lines[head:head] = self.edge_lines
        self.step("return " + ", ".join(v.new for v in self.loop.states))
        self.here, self.in_step = self.main, False
        self.scope.locals = {**saved}
        self.masks = {}
        return self.step.text

    def uses_serial(self) -> bool:
        """Whether anything but the coordinates asks which iteration this is."""
        read = any(self.nest.serial in free_vars(x) for s in self.loop.body for x in (s.expr, s.keep, s.row))
        return read or any(e.name in self.nest.outputs for e in self.nest.body if not e.scan)

    def step_call(self, step: str) -> tuple[str, list[str]]:
        """The step's parameters are the kernel's names that its text uses."""
        used = _names(step)
        made = set(re.findall(r"^\s*([A-Za-z_]\w*) = ", step, re.M))
        x = self.loop.coordinate
        names = [v.name for v in self.loop.states]
        names += [n for n in self.main_names() if n not in names]
        names += [m.pointer for m in self.scope.memory.values()]
        names += [n for m in self.scope.memory.values() for n in m.strides]
        names += [f"{t}_TMA" for t in self.described]
        names += list(self.cascade.symbols)
        moving = [f"{x}_lo"] if x is not None else [self.nest.serial]
        states = [v.name for v in self.loop.states]
        parameters = [n for n in dict.fromkeys(names) if n in states or (n in used and n not in made)] + moving
        return f"{self.step_name}({', '.join(parameters)}, MASKED={{masked}})", parameters

    def main_names(self) -> list[str]:
        return re.findall(r"^    ([A-Za-z_]\w*) = ", self.main.text, re.M)

    def assemble(self, stored: Stored, step: str, parameters: list[str], states: str, waits: bool) -> Kernel:
        used = _names(self.main.text + step)
        tensors = tuple(dict.fromkeys(map(stored.argument, self.scope.memory)))
        strides = tuple(
            (s, d, t)
            for t, m in self.scope.memory.items()
            for d, s in enumerate(m.strides)
            if s in used and t not in stored.orders
        )
        sizes = tuple(s for s in self.cascade.symbols if s in used)
        flags = [f"{t}_TMA: tl.constexpr" for t in self.described]
        signature = [*tensors, *(s for s, _, _ in strides), *sizes, *flags]
        constants = [f"{p}: tl.constexpr" if p.endswith("_TMA") else p for p in parameters]
        where = self.loop.coordinate or self.nest.serial
        loops = f", and loops along {where}" if self.loop.body else ""
        text = ""
        if self.loop.body:
            title = f"One tile along {where} of {self.name}: the values of {states} after it."
            text = _function(self.step_name, [*constants, "MASKED: tl.constexpr"], title, step)
        tile = f"one tile of {', '.join((*self.row_names(), *self.columns))}" if self.rows else "one point"
        at = f" at one {', '.join(self.points)}" if self.points and self.rows else ""
        title = f"{', '.join(self.nest.outputs)}: a program is {tile}{at}{loops}."
        text += _function(self.name, signature, title, self.main.text)
        programs = [f"-(-{_wrapped(self.grid_extent(r))} // {n})" for r, n in self.tiled()]
        programs += [_wrapped(self.grid_extent(r)) for r in self.points]
        return Kernel(self.name, text, " * ".join(programs) or "1", tensors, strides, sizes, self.described,
                      frozenset(self.scope.helpers), waits)  # fmt: skip

    def grid_extent(self, rank: str) -> str:
        return self.host(self.cascade.extent(rank))


def _names(code: str) -> set[str]:
    return set(re.findall(r"\b[A-Za-z_]\w*", re.sub(r"#.*", "", code)))


def _wrapped(code: str) -> str:
    return code if code.isidentifier() or code.isdigit() else f"({code})"


def _function(name: str, parameters: list[str], title: str, body: str) -> str:
    spaceless = [p.replace(" ", "~") for p in parameters]  # an annotation stays with its name
    lines = [x.replace("~", " ") for x in textwrap.wrap(", ".join(spaceless), 112, break_long_words=False)]
    signature = "\n    ".join(lines)
    doc = "\n    ".join(textwrap.wrap(title, 110))
    return f'\n\n@triton.jit\ndef {name}(\n    {signature}\n):\n    """{doc}"""\n{body}\n'
