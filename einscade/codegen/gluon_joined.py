"""The Gluon emitter for resident programs whose tiles of rows run into one another.

Comes in: what `gluon_overlap` takes, with a schedule that says `joined`. Goes out: a module in which the first scores
of a program's next tile of rows are issued together with the last weighted sum of this one, as those of the next tile
of keys are within a loop. So the tensor cores work while the first weights are made and while results leave.
`JoinedRows` is the frame of such a program, `Joined` one with a single pass over the keys; `gluon_passes` has that with
several.
"""

from __future__ import annotations

from einscade.codegen.gluon_overlap import Overlapped
from einscade.codegen.gluon_plan import GROUP_ROWS, Ring
from einscade.codegen.gluon_text import TURN, call, function, indent
from einscade.codegen.source import Unsupported

__all__ = ["Joined", "JoinedRows"]


class JoinedRows(Overlapped):
    """A program that goes from one tile of rows to the next without a pause. How it begins (`_begin`), goes through the
    tiles of a place (`_through`) and gets from its last sums to the next place (`_onward`) is a subclass's."""

    def _check_fit(self) -> None:
        if not self.resident:
            raise Unsupported("only a resident program's tiles of rows run into one another")
        super()._check_fit()

    def _begin(self) -> list[str]:
        """The first weights of a program, beside which there is nothing."""
        raise NotImplementedError

    def _through(self) -> list[str]:
        """The tiles of a place after its first."""
        raise NotImplementedError

    def _onward(self) -> list[str]:
        """The last sums of a place, and the first weights of the next if there is one."""
        raise NotImplementedError

    def _other_still(self) -> list[str]:
        """From a place's operands that stay to those of the next."""
        raise NotImplementedError

    def _at_place(self, program: str = "program") -> list[str]:
        """To the first tile of a place."""
        return [self._go_to(program), f"tile = {self._head()}", *self._at_rows()]

    def _finish_arguments(self) -> list[str]:
        maps = [f"{self.name(x.tensor)}_{end}" for x in self.shape.written for end in ("map", "tile")]
        done = [*self.last._sum_names(), *self._state_names(), *self.shape.batch, "row"]
        return [*done, *maps, *self._pointers(), *self.sizes]

    def _finish(self) -> str:
        """The function that writes results."""
        lines = [
            '"""What follows the loop of some rows."""',
            *self._at_rows(),
            *self._settle(),
            *self._after(),
            *(["tma.store_wait(0)  # of the rows before"] if self.shape.written else []),
            *(line for written in self.shape.written for line in self._store(written)),
        ]
        return function("finish", [*self._finish_arguments(), "group: gl.constexpr"], lines)

    def _compute(self) -> str:
        shape, first = self.shape, self.first
        initial, states = first._initial(self._printer("")), first._state_names()
        finished = [*self._state_names(), *shape.batch, "row"]
        before = {name: f"done_{name}" for name in finished}
        given = [*(before.get(x, x) for x in self._finish_arguments()), "group"]
        place = [
            *self._through(),
            f"{', '.join(before.values())} = {', '.join(finished)}",
            *self._next_place("still_phase"),
            *self._other_still(),
            *initial[1 : 1 + len(states)],
            *self._onward(),
            f"finish({', '.join(given)})",
            *initial[1 + len(states) :],
        ]
        own = f"A warpgroup: {GROUP_ROWS} rows of {shape.p} after another, all of their loops, and what follows."
        lines = [
            f'"""{own}"""',
            *self._first_turn(),
            *("stage = 0", "phase = 0", "still_phase = 0"),
            *(["slot_phase = 0"] if self.slots > 1 else []),
            "program = gl.program_id(0)",
            *self._at_place(),
            *initial,
            *self._begin(),
            "while program < programs:",
            *indent(x for line in place for x in line.splitlines()),
            "tma.store_wait(0)",
        ]
        return function("compute", [*self._compute_arguments(), *self._table_constants(), "group: gl.constexpr"], lines)


class Joined(JoinedRows):
    """One nest's kernel, with two places in shared memory for each operand that stays: these rows', and the next.
    `still_phase` is 0 for every other tile of rows and 1 for the rest, and so tells the places of operands that stay
    apart; `slot_phase` is the phase of their barriers, which turn half as often."""

    def _functions(self) -> list[str]:
        turn = [TURN.strip("\n")] if self.groups > 1 else []
        load = [self._load(), *map(self._reader, self.tables)]
        own = [self._advance(rescaled=False), self._finish(), self._compute()]
        return [*turn, self._place(), *load, self._weigh(), *own, self._kernel()]

    # -- the loading warp, which is ahead by what is free --

    def _free_stills(self) -> list[str]:
        return ["still_phase = 1", "slot_phase = 1"]

    def _copy_still(self, x: Ring) -> list[str]:
        full, tile = f"{x.name}_full.index(still_phase ^ 1)", f"{x.name}_tile.index((still_phase ^ 1) * GROUPS + group)"
        return [
            f"mbarrier.wait({x.name}_empty.index(still_phase ^ 1), slot_phase)",
            f"mbarrier.expect({full}, GROUPS * {x.name}_map.block_type.nbytes)",
            "for group in gl.static_range(GROUPS):",
            f"    at = {self._coordinates(x.operand, f'row + group * {GROUP_ROWS}')}",
            f"    tma.async_copy_global_to_shared({x.name}_map, at, {full}, {tile})",
        ]

    def _next_still(self) -> list[str]:
        return ["still_phase ^= 1", "slot_phase ^= still_phase"]

    # -- the warpgroups --

    def _pack(self) -> list[str]:
        """Nothing: weights of one loop's end and of the next one's beginning meet, where the compiler packs them."""
        return []

    def _other_still(self) -> list[str]:
        return ["slot_phase ^= still_phase", "still_phase ^= 1"]

    def _views(self) -> list[str]:
        at = "still_phase * GROUPS + group"
        return [f"{x.name}_rows = {self._view(x, at, still=True)}" for x in self.stills]

    @property
    def leaves_within(self) -> bool:
        """No: a place is left behind its loop, in which there is one branch less."""
        return False

    def _waits_soon(self) -> bool:
        """With three warpgroups, too: there are no registers left for what waits."""
        return super()._waits_soon() or self.groups == 3

    def _crossed(self, masked: list[str]) -> list[str]:
        """The call of an iteration."""
        given = {f"{x.name}_tile": f"{x.name}_rows" for x in self.stills}
        passed = [given.get(x, x) for x in self._advance_arguments()]
        results = [*self._running(), *self.rescale_names.values()]
        return call(results, "advance", [*passed, *masked, *self._table_flags(), "group"]).splitlines()

    def _begin(self) -> list[str]:
        scores, states = self._score_names(), self._state_names()
        turn, done = self._turns()
        given = [*scores, *states, self._column(), *self._points(), *self._context(), *self._first_edges()]
        return [
            *self._read_columns_early("True"),
            *(f"mbarrier.wait({x.name}_full.index(0), 0)" for x in self.stills),
            *self._views(),
            *(f"mbarrier.wait({r.name}_full.index(0), 0)" for r in self.rings if r.early),
            *self._read_columns_copied("0"),
            *turn,
            *self._multiply(lambda still: f"{still.name}_rows", "0", ""),
            *done,
            self._waited(0, scores, scores),
            *(f"mbarrier.arrive({r.name}_empty.index(0))" for r in self.rings if not r.late),
            *self._read_tables("0", "0"),
            call(self._made(list(self.weight_names.values())), "weigh", given),
        ]

    def _through(self) -> list[str]:
        step = [*self._crossed(self._edges()), *self._rescale()]
        left = [f"mbarrier.arrive({x.name}_empty.index(still_phase))" for x in self.stills]
        return [*self._views(), *self._walk(), *indent(step), *left]

    def _onward(self) -> list[str]:
        ending = [*self._sum_names(), *self.weight_names.values()]
        return [
            "if program < programs:",
            *indent([
                *self._at_place(),
                *(f"mbarrier.wait({x.name}_full.index(still_phase), slot_phase)" for x in self.stills),
                *self._views(),
                *self._crossed(self._first_edges()),
            ]),
            "else:",
            *indent([*self._accumulate("stage", "phase", ""), self._waited(0, ending, ending)]),
        ]  # fmt: skip
