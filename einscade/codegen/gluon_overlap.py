"""The Gluon emitter for one loop whose next scores are computed beside the last weights' sums: attention, forward.

Comes in: a form and a schedule. Goes out: the text of a module. The product of the next scores is issued before the
last weights meet their values, so that the elementwise part of one tile hides behind the tensor cores' work on another,
and the warpgroups take turns at issuing, so that they do not do the same thing at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import sympy
from sympy.logic.boolalg import And

from einscade.codegen.base2 import logistic_exponent
from einscade.codegen.gluon_frame import Frame
from einscade.codegen.gluon_plan import GROUP_ROWS, Ring
from einscade.codegen.gluon_text import TURN, call, function, indent
from einscade.codegen.gluon_values import Printer
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Expr, accesses, free_vars, var
from einscade.passes.domains import span

__all__ = ["Overlapped"]


class Overlapped(Frame):
    """One nest's kernel."""

    @property
    def first(self) -> Overlapped:
        """What the first pass over the loop computes; here there is one."""
        return self

    @property
    def last(self) -> Overlapped:
        """What the last pass computes."""
        return self

    def _functions(self) -> list[str]:
        turn = [TURN.strip("\n")] if self.groups > 1 else []
        load = [self._load(), *map(self._reader, self.tables)]
        return [*turn, self._place(), *load, self._weigh(), self._advance(), self._compute(), self._kernel()]

    @cached_property
    def shifted(self) -> bool:
        """Whether columns' data says where points begin, and masks know where columns end. Where points end with the
        rows there is nothing to gain: a tile of rows ends where one of columns does."""
        limit, keep = self.shape.loop.limit, And.make_args(self.shape.keep)
        if not any(d.moves == "columns" for d in self.data) or "row" in free_vars(self.bounds.end):
            return False
        return self.listed and limit is not None and (var(self.shape.m) < limit) in keep

    def _load(self) -> str:
        early, late = [r for r in self.rings if r.early], [r for r in self.rings if not r.early]
        names = [x.name for x in (*self.stills, *self.rings)]
        doc = f'"""The loading warp: all of a program\'s tiles of {_listed(names)}, in the order they are read."""'
        step = self._stage_after()
        first = ("next_stage", "next_phase") if self.resident else ("0", None)
        lines = [
            *(step if self.resident else []),
            *(["tile = gl.load(visits) // 2"] if self.listed else []),
            *(line for r in early for line in self._copy(r, self._at("tile", "end - 1"), *first)),
        ]
        lines += [line for x in self.stills for line in self._copy_still(x)]
        lines += self._copy_tables(self._at("tile", "end - 1"), *first)
        lines += [
            *([*self._next_still(), "stage = next_stage", "phase = next_phase"] if self.resident else []),
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
            lines = ["stage = STAGES - 1", "phase = 0", *self._free_stills(), *self._each_place(lines, loads=True)]
        return function("load", [*self._load_arguments(), *self._table_constants()], [doc, *lines])

    def _free_stills(self) -> list[str]:
        """Before the first place, where the places of operands that stay are free."""
        return ["still_phase = 1"]

    def _next_still(self) -> list[str]:
        return ["still_phase ^= 1"]

    def _at(self, listed: str, ranged: str) -> str:
        """The row at which a tile begins: of the list, or of the range."""
        return self._column(listed if self.listed else ranged)

    def _turns(self) -> tuple[list[str], list[str]]:
        return (["take_turn(group)"], ["pass_turn(group)"]) if self.groups > 1 else ([], [])

    @cached_property
    def logistics(self) -> dict[str, Expr]:
        """The statements that are logistic functions of points, and their exponents."""
        ends, points = (None, 0), {self.shape.p, self.shape.m}
        made = {s.name: logistic_exponent(s.expr) for s in self.statements if s.monoid is None and s.fill in ends}
        return {n: x for n, x in made.items() if x is not None and any(points <= free_vars(a) for a in accesses(x))}

    def _statement(self, s: Statement, masked: Printer, full: Printer) -> list[str]:
        """A logistic function has its exponent first, masked there, so that a point which does not exist is 0 and
        leaves its neighbours alone."""
        if s.name not in self.logistics:
            return super()._statement(s, masked, full)
        fill = None if s.fill is None else -sympy.oo
        exponent = replace(s, expr=self.logistics[s.name], fill=fill)
        self.used.add("logistic")
        name = self.name(s.name)
        return [*super()._statement(exponent, masked, full), f"{name} = logistic({name})"]

    def _held(self) -> list[str]:
        self.used |= {"first_columns"} if self.logistics else set()
        return [f"first_columns({self.name(name)})" for name in self.logistics]

    @property
    def held_names(self) -> list[str]:
        return [f"{self.name(name)}_held" for name in self.logistics]

    def _made(self, weights: Sequence[str]) -> list[str]:
        """What the points of a tile make, its weights by these names."""
        return [*self._state_names(), *self.rescale_names.values(), *weights, *self.held_names]

    def _multiply(self, still: Callable[[Ring], str], stage: str, prefix: str, part: str = "") -> list[str]:
        """All products with the tiles of a stage, or a part of them, issued."""
        lines = []
        tile, zero = ("half", "zero_half") if part else ("tile", "zero")
        seen: set[str] = set()
        for x, score in zip(self.shape.products, self._score_names(), strict=True):
            ring = self.ring(x.moving)
            if ring.name not in seen:
                lines.append(f"{ring.name}_{tile} = {self._view(ring, stage)}{part}.permute([1, 0])")
                seen.add(ring.name)
            rows = still(next(r for r in self.stills if r.operand == x.still))
            lines.append(
                f"{prefix}{score} = warpgroup_mma({rows}, {ring.name}_{tile}, {zero}, use_acc=False, is_async=True)"
            )
        return lines

    def _accumulate(self, stage: str, phase: str, prefix: str, part: str = "") -> list[str]:
        """All weighted sums with the tiles of a stage, or a part of them, issued. What a product reads as well has been
        waited for."""
        lines = []
        seen: set[str] = set()
        for x, name in zip(self.shape.sums, self._sum_names(), strict=True):
            ring = self.ring(x.values)
            if ring.name not in seen:
                if not ring.early:
                    lines.append(f"mbarrier.wait({ring.name}_full.index({stage}), {phase})")
                lines.append(f"{self._values(ring, part)} = {self._view(ring, stage)}{part}")
                seen.add(ring.name)
            tile = self._values(ring, part)
            weights = self.weight_names[x.weights]
            lines.append(f"{prefix}{name} = warpgroup_mma({weights}, {tile}, {name}, is_async=True)")
        return lines

    def _values(self, ring: Ring, part: str) -> str:
        """The variable of a tile that sums read."""
        return f"{ring.name}_{'part' if part else 'rows' if ring.early else 'tile'}"

    def _advance(self, rescaled: bool = True, name: str = "advance", keys: str = "", values: str = "") -> str:
        """The function of an iteration; it multiplies the sums with their factors (`rescaled`) or returns these.
        `keys`, `values`: the parts of its tiles that it reads."""
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
            *self._read_columns_early(" | ".join(self._masked_names())),
            *(f"mbarrier.wait({r.name}_full.index(stage), phase)" for r in self.rings if r.early),
            *self._read_columns_copied("stage"),
            *turn,
            *self._multiply(lambda still: f"{still.name}_tile", "stage", "next_", keys),
            *self._accumulate("last_stage", "last_phase", "next_", values),
            *done,
            *self._read_tables("stage", "phase"),
            self._waited(len(sums), scores, [f"next_{s}" for s in scores]),
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in early),
            *self._leave_stills("last"),
            self._weighed([f"next_{w}" for w in weights], self._masked_names(), keys),
            *self._hold(),
            self._waited(0, [*sums, *weights], [*(f"next_{s}" for s in sums), *weights]),
            *(f"mbarrier.arrive({r.name}_empty.index(last_stage))" for r in late),
        ]
        found = [*states, *sums, *(f"next_{w}" for w in weights), "stage", "phase"]
        lines += self._rescale() if rescaled else []
        lines.append(f"return {', '.join(found if rescaled else [*found, *rescales])}")
        last = ["last"] if self.leaves_within else []
        constants = [*last, *self._masked_arguments(), *self._table_constants(), "group: gl.constexpr"]
        arguments = ["zero_half" if keys and x == "zero" else x for x in self._advance_arguments()]
        return function(f"{name}{self.suffix}", [*arguments, *constants], lines)

    def _weighed(self, weights: Sequence[str], masked: Sequence[str], keys: str = "") -> str:
        """The call that makes weights of scores. `keys`: the part of the tile of which there are scores."""
        at = self._first_column(keys)
        passed = [*self._score_names(), *self._state_names(), at, *self._points(), *self._context(), *masked]
        return call(self._made(weights), f"weigh{self.suffix}", passed)

    def _first_column(self, keys: str) -> str:
        """The first column of a tile, or of the part of it that is read."""
        return self._column()

    def _hold(self) -> list[str]:
        """The wait for the sums comes behind the rows' maxima, or some of the points: these run beside the sums, and
        exponentials as far as there is room."""
        if self._waits_soon():
            return []
        extrema = {s.name for s in self.shape.statements if isinstance(s.expr, (sympy.Max, sympy.Min))}
        names = [self.name(x.name) for x in self.shape.states if x.new in extrema and x.name not in self.shape.split]
        names += self.held_names
        self.used |= {"hold"} if names else set()
        return [f"hold({name})" for name in names]

    def _waits_soon(self) -> bool:
        """Whether nothing need run beside the sums: in short tiles of a list, most of which are masked, the masks alone
        take as long."""
        return self.listed and self.columns < 128

    def _rescale(self) -> list[str]:
        return [
            f"{name} = {name} * gl.convert_layout({self.rescale_names[factor]}, RESULT_ROW)[:, None]"
            for name, factor in zip(self._sum_names(), self.rescales, strict=True)
            if factor is not None
        ]

    def _pack(self) -> list[str]:
        """The weights, which iterations hand on, in the form in which products read them: first of all where they are
        read. With fewer than three warpgroups the compiler finds that by itself."""
        if self.groups < 3:
            return []
        self.used.add("packed")
        return [f"{name} = packed({name})" for name in self.weight_names.values()]

    @property
    def leaves_within(self) -> bool:
        """Whether the last iteration of a place says that the operands that stay have been read."""
        return bool(self.resident)

    def _leave_stills(self, last: str) -> list[str]:
        """Behind the last products of a place (`last`: whether these are they), the next place's operands may come."""
        arrivals = [f"    mbarrier.arrive({x.name}_empty)" for x in self.stills]
        return [f"if {last}:", *arrivals] if self.leaves_within else []

    def _running(self) -> list[str]:
        """What an iteration takes from the one before."""
        return [*self._state_names(), *self._sum_names(), *self.weight_names.values(), "stage", "phase"]

    def _advance_arguments(self) -> list[str]:
        left = [f"{x.name}_empty" for x in self.stills] if self.leaves_within else []
        always = ["tile", *self._running(), *self._tiles(), *left, *self._ring_barriers(), "zero", *self._context()]
        return [*always, *self._table_arguments(always)] if self.tables else always

    def _first_turn(self) -> list[str]:
        """What gives the first warpgroup its first turn."""
        begun = ["if group == GROUPS - 1:", "    pass_turn(group)  # the first turn is the first warpgroup's"]
        return begun if self.groups > 1 else []

    def _at_rows(self) -> list[str]:
        """What a warpgroup knows of its rows, which begin at `row`."""
        p_, printer = f"{self.shape.p}_", self._printer("")
        lines = [f"{p_} = row + group * {GROUP_ROWS} + gl.arange(0, {GROUP_ROWS}, ROW)"]
        return lines + [f"{x.name} = {self._element(x.access, printer).code}" for x in self.loads if x.name is not None]

    def _compute(self) -> str:
        shape, begun = self.shape, self._first_turn()
        still_phase = "still_phase" if self.resident else "0"
        doc = f'"""A warpgroup: {GROUP_ROWS} rows of {shape.p}, all of their loop, and what follows it."""'
        lines = [
            *self._at_rows(),
            *self._initial(self._printer("")),
            f"tile = {self._head()}",
            *([] if self._own_stop else self._read_columns_early("True")),
            *(self._next_stage() if self.resident else begun),
            *(f"mbarrier.wait({x.name}_full, {still_phase})" for x in self.stills),
            *(f"{x.name}_rows = {self._view(x, 'group', still=True)}" for x in self.stills),
            *(self._leave_out(self._own_stop) if self._own_stop else []),
            *self._all_tiles(),
            *self._settle(),
            *self._after(),
            *(["tma.store_wait(0)  # of the rows before"] if self.resident and shape.written else []),
            *(line for written in shape.written for line in self._store(written)),
        ]
        if self.resident:
            lines.append("still_phase ^= 1")
            lines = [*begun, "stage = STAGES - 1", "phase = 1", "still_phase = 0", *self._each_place(lines)]
        lines.append("tma.store_wait(0)")
        constants = [*self._table_constants(), "group: gl.constexpr"]
        return function("compute", [*self._compute_arguments(), *constants], [doc, *lines])

    @cached_property
    def _own_stop(self) -> str:
        """Up to where a warpgroup's own rows have points, where the first tiles of a list may lie behind that; empty
        where none can, and where programs have one tile of rows."""
        if not (self.listed and self.resident) or self.tables or self.columns >= self.rows:
            return ""
        first = var("row") + var("group") * GROUP_ROWS
        stop = span(self.shape.keep, self.shape.m, {self.shape.p: (first, first + GROUP_ROWS - 1)}).stop
        known = stop is not None and "group" in free_vars(stop)
        return self._scalar_printer().value(stop).code if known else ""

    def _leave_out(self, stop: str) -> list[str]:
        """The first tiles of a list, where a warpgroup has no points in them: it gives them back."""
        turn, done = self._turns()
        barriers = [f"{r.name}_{{}}.index(stage)" for r in self.rings]
        leave = [
            *turn,
            *done,
            *(line for b in barriers for line in (
                f"mbarrier.wait({b.format('full')}, phase)", f"mbarrier.arrive({b.format('empty')})"
            )),
            *self._next_stage(),
            "begun += 1",
            "tile = gl.load(visits + begun) // 2",
        ]  # fmt: skip
        condition = f"({self._column()} >= {stop}) & (begun < count - 1)"
        skip = ["if group < GROUPS - 1:", f"    while {condition}:", *indent(indent(leave))]
        return ["begun = 0", *skip, *self._read_columns_early("True")]

    def _all_tiles(self) -> list[str]:
        """From the first tile's scores to the last one's sums."""
        return [*self._first_tile(), *self._loop(), *self._last_sums()]

    def _first_tile(self, keys: str = "") -> list[str]:
        """The weights of the tile that is visited first."""
        scores, (turn, done) = self._score_names(), self._turns()
        stage, phase = ("stage", "phase") if self.resident else ("0", "0")
        last = "begun == count - 1" if self._own_stop else "count == 1" if self.listed else "tile == first"
        return [
            *(f"mbarrier.wait({r.name}_full.index({stage}), {phase})" for r in self.rings if r.early),
            *self._read_columns_copied(stage),
            *turn,
            *self._multiply(lambda still: f"{still.name}_rows", stage, "", keys),
            *done,
            self._waited(0, scores, scores),
            *(f"mbarrier.arrive({r.name}_empty.index({stage}))" for r in self.rings if not r.late),
            *self._leave_stills(last),
            *self._read_tables(stage, phase),
            self._weighed(list(self.weight_names.values()), self._first_edges(), keys),
            *([] if self.resident else ["stage = 0", "phase = 0"]),
        ]

    def _advanced(
        self, last: str, masked: Sequence[str], name: str = "advance", others: Mapping[str, str] | None = None,
        results: Sequence[str] | None = None,
    ) -> list[str]:  # fmt: skip
        """The call of an iteration. `last`: whether it is a place's last. `others`: what it is given under other names
        than its own. `results`: the names of what it makes, if not those of what it takes."""
        given = {f"{x.name}_tile": f"{x.name}_rows" for x in self.stills} | dict(others or {})
        passed = [given.get(x, x) for x in self._advance_arguments()]
        passed += [*([last] if self.leaves_within else []), *masked, *self._table_flags(), "group"]
        return call(results or self._running(), name, passed).splitlines()

    def _loop(self, count: str = "end - 1 - first", edges: Sequence[str] | None = None) -> list[str]:
        """The tiles after the first, so many of a range."""
        last = "iteration == count - 1" if self.listed else "tile == first"
        second = "begun + 1" if self._own_stop else "1"
        return [*self._walk(count, second), *indent(self._advanced(last, edges or self._edges()))]

    def _walk(self, count: str = "end - 1 - first", second: str = "1") -> list[str]:
        """The head of a loop over the tiles after the first: so many of a range, or those of a list from the place
        `second` on, each read an iteration early."""
        if not self.listed:
            return [f"for _ in range({count}):", "    tile -= 1"]
        return [
            f"following = gl.load(visits + gl.minimum({second}, count - 1))",
            f"for iteration in range({second}, count):",
            "    visit = following",
            "    following = gl.load(visits + gl.minimum(iteration + 1, count - 1))",
            "    tile = visit // 2",
        ]

    def _last_sums(self, values: str = "") -> list[str]:
        """The sums with the last weights."""
        read = [*self._sum_names(), *self.weight_names.values()]
        return [
            *self._pack(),
            *self._accumulate("stage", "phase", "", values),
            self._waited(0, read, read),
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in self.rings if r.late and self.resident),
        ]


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
