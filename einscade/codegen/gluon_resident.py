"""A sum over programs that are resident: each takes one tile of rows after another.

Comes in: what `gluon_spread` takes, under a schedule that says how many programs there are. Goes out: a kernel of the
same iteration in another frame. Where loops are short, what a program takes besides its loop counts: to come on chip,
to wait for its first tiles, to multiply its last part of the sum, to let results leave.

* The rings go on from one tile of rows to the next, whose first tiles come while this one's last are multiplied.
* The operand that the sum multiplies has two places: the last part of one tile of rows is multiplied in the first
  iteration of the next. So that operand's second place is taken when a program begins, and free after an iteration.
* Each other operand that stays comes with the first of the tiles that it meets, which is when its place is free.
* Results leave through the tile of the part, which the next iteration waits for in any case.
* The last tile of a list is often one in which the last rows have no points (on the diagonal, where masks are causal).
  Their warpgroup passes it by: it makes weights of zero there, and multiplies its part of the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from einscade.codegen.gluon_bounds import bounds
from einscade.codegen.gluon_chain import Iteration
from einscade.codegen.gluon_form import Operand
from einscade.codegen.gluon_plan import GROUP_ROWS, Ring
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_spread import ARRIVE, FENCE, SpreadChain
from einscade.codegen.gluon_sum import LINE
from einscade.codegen.gluon_text import function, indent
from einscade.codegen.source import Unsupported
from einscade.ir.expr import Expr, free_vars, var

__all__ = ["ResidentChain"]


class ResidentChain(SpreadChain):
    """The kernel of a form with a sum of its programs, which are resident.

    `past` counts the iterations of the tiles of rows before; `still_phase` is 0 for every other tile of rows and 1 for
    the rest, and tells the two places of the operand that the sum multiplies apart; `slot_phase` is the phase of their
    barriers. `slot_before` and `line` say of the iteration before which place it had and where its part is added."""

    shared = 227 << 10
    takes_several = True

    # -- sizes and names --

    def _check_fit(self) -> None:
        if self.schedule.ahead:
            raise Unsupported("resident programs do not issue the next scores ahead")
        super()._check_fit()
        if self.shape.written and not self._room:
            raise Unsupported(f"results {self.f} wide do not fit in the tile of a part of the sum")

    def _slots(self, x: Ring) -> int:
        return 2 if x == self.kept else 1

    @cached_property
    def shares(self) -> dict[str, str]:
        return {x.tensor: "part" for x in self.shape.written}

    @property
    def _room(self) -> int:
        """How many tiles of results fit in that of a warpgroup's part."""
        return self.part.lines * LINE * 4 // (GROUP_ROWS * self.f * 2)

    def _still_barriers(self) -> list[str]:
        others = [f"{x.name}_empty" for x in self.stills if x != self.kept]
        upcoming = ["upcoming_full", "upcoming_empty"] if self.dynamic else []
        return [f"{self.kept.name}_full", f"{self.kept.name}_empty", *others, *upcoming]

    @cached_property
    def idle(self) -> Expr | None:
        """The first tile of the loop in which a warpgroup has points, where the list of a program may end before it."""
        if not self.listed or self.groups == 1:
            return None
        row = var("row") + GROUP_ROWS * var("group")
        first = bounds(self.shape.keep, self.shape.m, self.shape.p, row, GROUP_ROWS, self.columns).first
        return first if "group" in free_vars(first) else None

    # -- the sum in memory --

    def _allocate_tables(self) -> list[str]:
        *lines, _, barriers = super()._allocate_tables()
        block = f"[GROUPS, {self.part.lines}, {LINE}]"
        part = f"part_tile = gl.allocate_shared_memory(gl.float32, {block}, {self.total}_map.layout)"
        return [*lines, part, barriers]

    def _map_calls(self) -> list[str]:
        """Its lines, one after another: what an iteration hands on is then one number."""
        return [f"tile_map({self.total}.view(-1, {LINE}), {self.part.lines}, {LINE})"]

    def _hand_on(self) -> list[str]:
        """Where its part is added, and where what it multiplies is."""
        result, printer, at = self.spread.result, self._scalar_printer(), ""
        index = dict(result.batch)
        for place, rank in zip(result.order, self._rows_of_result(), strict=False):  # all but the width
            extent = printer.value(self.shape.extent(rank)).atom()
            if place == result.row:
                extent, here = f"gl.cdiv({extent}, STEP)", "tile"
            else:
                here = printer.value(index[place]).atom()
            at = f"({at}) * {extent} + {here}" if at else here
        return [f"line = {self.part.first_line(at)}", "slot_before = still_phase"]

    def _store_part(self) -> list[str]:
        """The place of what the tile of rows before multiplied is free when its last part is made."""
        left = f"mbarrier.arrive({self.kept.name}_empty.index(slot_before))"
        return ["if slot_before != still_phase:", f"    {left}", *super()._store_part()]

    def _send(self, back: int) -> list[str]:
        sent = f"add_tile({self.total}_map, [line, 0], part_tile.index(group))"
        return [FENCE, "gl.thread_barrier()", "if iteration > 0:", f"    {sent}"]

    def _place_before(self, group: int) -> str:
        return f"slot_before * GROUPS + {group}"

    # -- the loading warp --

    def _load(self) -> str:
        k, (_, *rest) = self.kept.name, self._copy_still(self.kept)
        full, tile = f"{k}_full.index(still_phase ^ 1)", f"{k}_tile.index((still_phase ^ 1) * GROUPS + group)"
        lines = [
            f"mbarrier.wait({k}_empty.index(still_phase ^ 1), slot_phase)",
            *(x.replace(f"{k}_full", full).replace(f"{k}_tile.index(group)", tile) for x in rest),
            *self._walk(),
            *indent(line for r in self._in_order() for line in self._copy_all(r)),
            *indent(self._next_stage()),
            *self._take_place(),
            *self._next_still(),
        ]
        names = ", ".join(x.name for x in (*self.stills, *self.rings))
        begun = ["stage = 0", "phase = 1", "still_phase = 1", "slot_phase = 1"]
        doc = f'"""The loading warp: all of a program\'s tiles of {names}."""'
        return function("load", self._load_arguments(), [doc, *begun, *self._each_place(lines, loads=True)])

    def _next_still(self) -> list[str]:
        return ["slot_phase ^= still_phase", "still_phase ^= 1"]

    def _copy_all(self, ring: Ring) -> list[str]:
        """A tile of a ring; the first of them with the operands that stay and meet it first."""
        lines = super()._copy_all(ring)
        met = {x: next(p.moving for p in self.shape.products if p.still == x.operand) for x in self.stills}
        brought = [x for x in self.stills if x != self.kept and met[x] == ring.operand]
        if not brought:
            return lines
        wait, expect, *copies = lines
        more = "".join(f" + GROUPS * {x.name}_map.block_type.nbytes" for x in brought)
        stills = []
        for x in brought:
            free, _, *rest = self._copy_still(x)
            stills += [free, *(line.replace(f"{x.name}_full", f"{ring.name}_full.index(stage)") for line in rest)]
        first = ["if iteration == 0:", f"    {expect.removesuffix(')')}{more})", "else:", f"    {expect}"]
        return [wait, *first, *copies, "if iteration == 0:", *indent(stills)]

    # -- the warpgroups --

    def _functions(self) -> list[str]:
        *others, compute, kernel = super()._functions()
        return [*others, *([self._pass_by()] if self.idle is not None else []), compute, kernel]

    def _step_arguments(self) -> list[str]:
        given = [x for x in super()._step_arguments() if x != "visits"]
        return [*given, "line", "slot_before", "still_phase", f"{self.kept.name}_empty"]

    def _given(self, arguments: Sequence[str]) -> list[str]:
        """`iteration` counts those of all tiles of rows."""
        return ["past + iteration" if x == "iteration" else x for x in arguments]

    def _pass_arguments(self) -> list[str]:
        own = {*self._running(), *self._context(), "tile", "zero", *(f"{x.name}_rows" for x in self.stills)}
        tiles = {*(f"{x.name}_tiles" for x in self.rings), *self._table_rings()}
        return [x for x in self._step_arguments() if x not in own | tiles]

    def _pass_by(self) -> str:
        it = Iteration()
        zeros = f"gl.full([{GROUP_ROWS}, STEP], 0.0, {GLUON_DTYPES[self.shape.dtype]}, SCORES)"
        lines = [
            '"""An iteration without points of these rows."""',
            *self._await_others(),
            *self._multiply_part(it),
            *(f"mbarrier.wait({r.name}_full.index(stage), phase)" for r in self.rings),
            self._await(it, "part"),
            *self._store_part(),
            f"others.index(iteration % 2 * GROUPS + group).store({zeros})",
            *self._send(1),
            ARRIVE,
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in self.rings),
        ]
        constants = [f"{c}: gl.constexpr" for c in self._step_constants()]
        return function("pass_by", [*self._pass_arguments(), *constants], lines)

    def _loops(self) -> list[str]:
        if self.idle is None:
            return super()._loops()
        first = self._scalar_printer().value(self.idle).atom()
        passed = ", ".join([*self._given(self._pass_arguments()), *self._step_constants()])
        passing = [*self._walk("count - trail, count"), *indent([f"pass_by({passed})", *self._hand_on()])]
        return [
            "trail = 0",
            "if group > 0:",
            f"    trail = (gl.load(visits + (count - 1)) // 2 < {first}).to(gl.int32)",
            *self._loop(self._masked(), "count - trail"),
            "if group > 0:",
            *indent([*passing, *indent(self._next_stage())]),
        ]

    def _compute(self) -> str:
        k, printer = self.kept.name, self._printer("")
        places = {x: "still_phase * GROUPS + group" if x == self.kept else "group" for x in self.stills}
        place = [
            *self._at_rows(printer),
            *self._initial(printer),
            f"mbarrier.wait({k}_full.index(still_phase), slot_phase)",
            *(f"{x.name}_rows = {self._view(x, at, still=True)}" for x, at in places.items()),
            *self._loops(),
            f"past += {self._count()}",
            *(f"mbarrier.arrive({x.name}_empty)" for x in self.stills if x != self.kept),
            *self._results(printer),
            *self._next_still(),
        ]
        it = Iteration()
        part = [*self._await_others(), *self._multiply_part(it), self._await(it, "part")]
        own = f"A warpgroup: {GROUP_ROWS} rows of {self.shape.p} after another, all of their loops, and what follows."
        lines = [
            f'"""{own}"""',
            *(f"{x} = 0" for x in ("stage", "phase", "still_phase", "slot_phase", "past", "line")),
            "slot_before = 1",
            *self._each_place(place),
            "iteration = past",
            *part,
            *super()._store_part(),
            *self._send(1),
            "tma.store_wait(0)",
        ]
        return function("compute", [*self._compute_arguments(), "group: gl.constexpr"], lines)

    def _store(self, x: Operand) -> list[str]:
        """A tile of results through that of the part, as many of them at once as fit there."""
        o, dtype, at = self.name(x.tensor), GLUON_DTYPES[self.dtype(x.tensor)], self.shape.written.index(x)
        room, ones = self._room, "1, " * len(x.batch)
        several, which = (f"{room}, ", f".index({at % room})") if room > 1 else ("", "")
        tile = f"part_tile.index(group)._reinterpret({dtype}, [{several}{{}}{GROUP_ROWS}, {self.f}], {{}}){which}"
        return [
            *(["tma.store_wait(0)"] if at % room == 0 else []),
            f"{tile.format('', f'TILE_{self.f}')}.store({o}.to({dtype}))",
            "fence_async_shared()",
            f"at = {self._coordinates(x, f'row + group * {GROUP_ROWS}')}",
            f"tma.async_copy_shared_to_global({o}_map, at, {tile.format(ones, f'{o}_map.layout')})",
        ]
