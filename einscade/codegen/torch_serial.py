"""A serial nest as torch code: a loop over tiles of the grid with a loop along the serial rank inside.

Comes in: a `TileLoop`. Goes out: lines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.host import number, python
from einscade.codegen.matmul import Contraction
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import (
    State,
    Statement,
    TileLoop,
)
from einscade.codegen.torch_values import Range, Value, align, as_float, exact_factor, value
from einscade.codegen.torch_writer import Lines, Writer
from einscade.ir.expr import Expr, accesses, free_vars, var
from einscade.passes.domains import certain, is_data_dependent, possible, span

if TYPE_CHECKING:
    from einscade.codegen.tiled_torch import TorchModule

__all__ = ["SerialWriter"]


class SerialWriter(Writer):
    """A loop over tiles of the grid, with a loop along the serial rank inside."""

    def __init__(self, module: TorchModule, loop: TileLoop) -> None:
        self.loop, self.nest = loop, loop.nest
        grid = loop.nest.grid
        used = [r for s in loop.statements for r in s.iterated]
        tail = [r for r in dict.fromkeys(used) if r not in grid and r not in loop.coordinates]
        super().__init__(module, (*grid, *loop.coordinates, *tail))
        self.tile_of = {r: n for r in grid if (n := module.tile(r)) is not None}
        self.tiled = list(self.tile_of)
        for r in (*grid, *tail):
            size = module.extent(r)
            self.scope.ranges[r] = Range(size, f"{r}_lo", f"{r}_hi") if r in self.tiled else Range(size)
        self.step = module.size(loop.step)
        self.uses_serial = any(
            loop.nest.serial in free_vars(x) for s in loop.body for x in (s.expr, s.keep, s.row)
        ) or any(name in loop.nest.outputs for name in (e.name for e in loop.nest.body if not e.scan))
        self.partial: dict[object, str] = {}
        self.hoisted: Lines | None = None  # lines before the loop, while its body is being written
        self.hoist_names: dict[str, str] = {}

    def write(self) -> None:
        made_in_body = {e.name for e in self.nest.body}
        for name in self.nest.outputs:
            self.module.allocate(name, zeros=name in made_in_body)
        depth = self.out.depth
        for r in self.tiled:
            size, tile = self.scope.ranges[r].size, self.tile_of[r]
            self.out(f"for {r}_lo in range(0, {size}, {tile}):")
            self.out.depth += 1
            self.out(f"{r}_hi = min({r}_lo + {tile}, {size})")
        self.statements(self.loop.prologue, ())
        for state in self.loop.states:
            self.initialise(state)
        self.serial_loop()
        self.made_ranks = {r: v for r, v in self.made_ranks.items() if r not in self.loop.coordinates}
        self.masks = {}
        self.partial = {}
        for state in self.loop.states:
            if state.name in self.nest.outputs:
                raise Unsupported(f"every value of the scan {state.name} is asked for")
        self.statements(self.loop.epilogue, ())
        self.out.depth = depth

    def initialise(self, state: State) -> None:
        ranks = self.scope.sort(state.ranks)
        v = value(state.init, self.scope)
        v = self.spread(replace(v, kind="f") if v.host else as_float(v, self.scope), ranks)
        code = v.code if v.owned and v.code.startswith("torch.full") else f"{v.tight()}.clone()"
        if not ranks and state.init.is_number:
            code = f"torch.full((), {v.code}, dtype=torch.{self.scope.acc}, device={self.module.device})"
        self.define(state.name, Value(code, ranks, "f", True), state.ranks)

    # -- the loop along the serial rank --

    def edges(self) -> dict[str, tuple[Expr, Expr]]:
        """The first and last index of every rank in the tile, as expressions of the code's variables."""
        found: dict[str, tuple[Expr, Expr]] = {}
        for r, where in self.scope.ranges.items():
            if where.at is not None:
                continue
            if r in self.tiled:
                found[r] = (var(f"{r}_lo"), var(f"{r}_hi") - 1)
            elif r in self.cascade.rank_table:
                found[r] = (sympy.Integer(0), self.cascade.extent(r) - 1)
        for x in self.loop.coordinates:
            found[x] = (var(f"{self.loop.coordinate}_lo"), var(f"{self.loop.coordinate}_hi") - 1)
        return found

    def serial_loop(self) -> None:
        outer, body = self.out, Lines(depth=self.out.depth + 1)
        x = self.loop.coordinate
        serial = self.nest.serial
        extent = self.module.size(self.cascade.extent(serial))
        if x is None:
            self.scope.ranges[serial] = Range(extent, at=serial)
            head = [f"for {serial} in range({extent}):"]
        else:
            head = self.bounds(x, body)
        self.hoisted = hoisted = Lines(depth=outer.depth)
        self.out = body
        self.find_partial(body)
        if self.loop.skippable and is_data_dependent(self.loop.domain):
            keep = self.mask(self.loop.domain)
            self.out(f"if not {keep.tight()}.any():")
            self.out("    continue  # no point of this tile exists: looking costs less than computing it")
        self.statements(self.loop.body, tuple(s.name for s in self.loop.states))
        for state in self.loop.states:
            code, new = self.scope.names[state.name].code, self.scope.names[state.new].code
            if code != new:
                self.out(f"{code} = {new}")
        self.out = outer
        self.hoisted = None
        for line in (*hoisted.lines, *("    " * outer.depth + h for h in head), *body.lines):
            outer.lines.append(line)

    def bounds(self, x: str, body: Lines) -> list[str]:
        """The loop over tiles of the coordinate, from the domain."""
        lo, hi = f"{x}_lo", f"{x}_hi"
        total = (
            self.loop.limit if self.loop.limit is not None else self.cascade.extent(self.nest.serial) * self.loop.step
        )
        reach = span(self.loop.domain, x, self.edges())
        start, stop = sympy.Integer(0), total
        if self.loop.skippable:
            start = sympy.Max(0, reach.start) if reach.start is not None else start
            stop = sympy.Min(total, reach.stop) if reach.stop is not None else stop
        first = self.module.size(start)
        if start != 0 and self.uses_serial:
            first = f"({first}) // {self.step} * {self.step}"
        end = self.module.size(stop)
        head = []
        if not end.isidentifier() and not end.isdigit():
            head.append(f"{x}_end = {end}")
            end = f"{x}_end"
        head.append(f"for {lo} in range({first}, {end}, {self.step}):")
        body(f"{hi} = min({lo} + {self.step}, {end})" if self.loop.limit is not None else f"{hi} = {lo} + {self.step}")
        self.scope.ranges[self.nest.serial] = Range(self.module.size(self.cascade.extent(self.nest.serial)),
                                                    at=f"{lo} // {self.step}")  # fmt: skip
        for c in self.loop.coordinates:
            self.scope.ranges[c] = Range(self.module.size(total), lo, hi)
        if self.loop.skippable and not reach.exact:
            condition = possible(self.loop.domain, self.edges())
            if condition != sympy.true:
                body(f"if not ({python(condition, self.tile_numbers())}):")
                body("    continue")
        return head

    def tile_numbers(self) -> dict[str, str]:
        numbers = {name: str(n) for name, n in self.module.tiles().items()}
        return {**numbers, self.nest.serial: self.scope.ranges[self.nest.serial].at or ""}

    def rank_values(self, rank: str) -> str:
        """Values of a rank that the loop does not move are made before it."""
        if rank in self.made_ranks or rank in self.loop.coordinates or self.hoisted is None:
            return super().rank_values(rank)
        here, self.out = self.out, self.hoisted
        code = super().rank_values(rank)
        self.out = here
        return code

    def find_partial(self, body: Lines) -> None:
        """One flag for each mask: whether this tile needs it."""
        predicates = dict.fromkeys(
            p for s in self.loop.body for p, used in ((s.row, s.fill is not None), (s.keep, s.mask_operand)) if used
        )
        for predicate in predicates:
            condition = certain(predicate, self.edges())
            if condition == sympy.false:
                continue
            flag = "partial" if not self.partial else f"partial{len(self.partial)}"
            body(f"{flag} = not ({python(condition, self.tile_numbers())})")
            self.partial[predicate] = flag

    # -- statements --

    def statements(self, statements: tuple[Statement, ...], keeps: tuple[str, ...]) -> None:
        carried = {state.new: state for state in self.loop.states} if keeps else {}
        for i, s in enumerate(statements):
            self.comment(s)
            states = {n for n in keeps if n != next((c.name for c in carried.values() if c.new == s.name), None)}
            states |= {*carried}  # what the next iteration begins with
            later = {e.name for e in (*self.nest.prologue, *self.nest.epilogue)} if keeps else set()
            self.scope.dead = self.gone(statements, i, {*states, *self.nest.outputs, *later})
            if not keeps and statements is self.loop.prologue:
                self.scope.dead = set()
            v = self.evaluate(s)
            if s.name in carried:
                v = as_float(v, self.scope)
                state = carried[s.name]
                overwritten = not any(a.tensor == state.name for t in statements[i + 1 :] for a in t.reads)
                v = self.spread(v, self.scope.sort(state.ranks))
                self.define(s.name, v, state.ranks, self.scope.names[state.name].code if overwritten else None)
                continue
            output = s.name in self.nest.outputs
            read_later = any(a.tensor == s.name for t in (*statements[i + 1 :], *self.loop.epilogue) for a in t.reads)
            if output and not read_later:
                self.store(s.name, v, s.row)
                continue
            if s.fill is not None and s.row in self.partial:  # the same dimensions, masked or not
                v = self.spread(v, self.scope.sort((*v.ranks, *(free_vars(s.row) & self.scope.dims))))
            # The tile of an output is a variable beside the memory that it is stored in.
            self.define(s.name, v, s.ranks, f"{self.module.code(s.name)}_here" if output else None)
            if s.fill is not None:
                self.fill(s, v)
            if output:
                local = self.scope.names[s.name]
                self.store(s.name, Value(local.code, local.ranks, v.kind), s.row)

    def fill(self, s: Statement, v: Value) -> None:
        assert s.fill is not None
        flag = self.partial.get(s.row)
        made = dict(self.made_ranks)
        if flag is not None:
            self.out(f"if {flag}:")
            self.out.depth += 1
        keep = self.mask(s.row)
        name = self.scope.names[s.name]
        if set(keep.ranks) <= set(name.ranks) and v.owned and v.kind == "f":
            negated = align(Value(f"~{keep.code}", keep.ranks, "b", prec=1), name.ranks)
            self.out(f"{name.code}.masked_fill_({negated}, {number(s.fill)})")
        else:
            masked = super().masked(Value(name.code, name.ranks, v.kind), s.row, s.fill)
            self.out(f"{name.code} = {masked.code}")
            self.scope.names[s.name] = replace(name, ranks=masked.ranks)
        if flag is not None:
            self.out.depth -= 1
            self.forget(made)

    def masked(self, v: Value, predicate: Boolean, fill: Expr, name: str = "terms") -> Value:
        """Under a flag, the operand is a variable first, so that a full tile pays nothing."""
        flag = self.partial.get(predicate)
        if flag is None:
            return super().masked(v, predicate, fill, name)
        made = dict(self.made_ranks)
        v = self.spread(v, self.scope.sort((*v.ranks, *(free_vars(predicate) & self.scope.dims))))
        self.out(f"{name} = {v.code}")
        self.out(f"if {flag}:")
        self.out.depth += 1
        masked = super().masked(Value(name, v.ranks, v.kind), predicate, fill)
        self.out(f"{name} = {masked.code}")
        self.out.depth -= 1
        self.forget(made)
        return Value(name, v.ranks, masked.kind, True)

    def forget(self, made: dict[str, str]) -> None:
        """Coordinate values made under a condition are not there after it."""
        self.made_ranks = {r: v for r, v in self.made_ranks.items() if r in made or r not in self.loop.coordinates}

    def contract(self, c: Contraction, s: Statement) -> Value:
        """A contraction whose operand does not change in the loop has it prepared before, and multiplied by the factor
        of the contraction where that rounds nothing."""
        if s.mask_operand or self.hoisted is None:
            return super().contract(c, s)
        outer, codes = c.outer, []
        for expr, prepare in ((c.left_expr, c.as_left), (c.right_expr, c.as_right)):
            if not self.invariant(expr):
                v = self.left(c) if expr is c.left_expr else self.right(c)
                codes.append(prepare(v).tight())
                continue
            here, self.out = self.out, self.hoisted
            v = self.left(c) if expr is c.left_expr else self.right(c)
            if outer != 1 and exact_factor(outer):
                v = Value(f"{v.tight(1)} * {number(outer)}", v.ranks, "f", True, 1)
                outer = sympy.Integer(1)
            text = prepare(v).code
            if text not in self.hoist_names:
                base = next((a.tensor for a in accesses(expr)), s.name)
                self.hoist_names[text] = f"{base}_tile{len(self.hoist_names) or ''}"
                self.out(f"{self.hoist_names[text]} = {text}")
            self.out = here
            codes.append(self.hoist_names[text])
        return self.scaled(c.product(codes[0], codes[1], self.scope, self.length), outer)

    def invariant(self, expr: Expr) -> bool:
        moving = {*self.loop.coordinates, self.nest.serial}
        local = {s.name for s in self.loop.body} | {s.name for s in self.loop.states}
        return not free_vars(expr) & moving and not any(a.tensor in local for a in accesses(expr))

    def place(self, rank: str) -> tuple[str, str | None]:
        inner = dict(self.loop.inner)
        if rank in inner:
            x = inner[rank]
            r = self.scope.ranges[x]
            return f":{r.hi} - {r.lo}", x
        return super().place(rank)
