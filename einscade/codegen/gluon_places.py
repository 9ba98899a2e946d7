"""Which tiles of rows a program of a Gluon kernel works on, and in which order.

Comes in: a `Plan` and the lists of its tiles. Goes out: the function `place` as text, and the loop of a resident
program over its places. Loops of one length are dealt out in turns; where they differ, a program takes the next place
that nobody has, and some neighbours along the batch go abreast: the longest loops of all of them come first, so that a
long one does not begin when there is little else left.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from einscade.codegen.gluon_text import call, function, indent
from einscade.codegen.gluon_visits import Visits
from einscade.ir.expr import FloorDiv, var

__all__ = ["Places"]


class Places(Visits):
    """Where a program is in the grid."""

    def _still_barriers(self) -> list[str]:
        return super()._still_barriers() + (["upcoming_full", "upcoming_empty"] if self.dynamic else [])

    def _place(self) -> str:
        """Which tile of the grid a program has, and which tiles of the loop it visits."""
        shape, b = self.shape, self.bounds
        names = self._scalar_printer()
        lines = [
            f"row_tiles = gl.cdiv({names.value(shape.extent(shape.p)).code}, {self.rows})",
            *([] if self.resident else ["program = gl.program_id(0)"]),
        ]
        abreast = max(self.sharing, self.schedule.abreast)
        if abreast > 1:
            why = "neighbours share what the loop reads" if abreast == self.sharing else "the long loops of all first"
            lines += [
                f"rest = program % ({abreast} * row_tiles)  # {why}",
                f"batch = program // ({abreast} * row_tiles) * {abreast} + rest % {abreast}",
                f"row_tile = rest // {abreast}",
            ]
        else:
            lines += ["batch = program // row_tiles", "row_tile = program % row_tiles"]
        if b.rising:
            lines.append("row_tile = row_tiles - 1 - row_tile  # the longest loops first")
        lines.append(f"row = row_tile * {self.rows}")
        lines += self._unravel(shape.batch)
        if self.listed:
            lines += self._follow()
            doc = f'"""The program\'s place in the grid, the tiles of {shape.m} it visits, and how many they are."""'
            places = ", ".join(self._placed())
            return function("place", self._place_arguments(), [doc, *lines, f"return {places}"])
        lines += [f"first = {names.value(b.first).code}", f"end = {names.value(b.end).code}"]
        lines.append("first = gl.minimum(first, end - 1)")
        if self._classes() and (b.upper or b.lower):
            assert b.full_first is not None
            assert b.full_end is not None
            full_end = f"full_end = gl.maximum(gl.minimum({names.value(b.full_end).code}, end - 1), first)"
            full_first = names.value(b.full_first).code
            if self._masked_apart():  # no tile need be full
                lines += [*([full_end] if b.upper else []), f"full_first = {full_first}"]
            else:
                full = f"full_first = gl.minimum(gl.maximum({full_first}, first), full_end)"
                lines += [full_end, *([full] if b.lower else [])]
        places = ", ".join(self._placed())
        doc = f'"""The program\'s place in the grid, and the tiles of {shape.m} it visits: `first <= tile < end`."""'
        return function("place", self._place_arguments(), [doc, *lines, f"return {places}"])

    def _place_arguments(self) -> list[str]:
        program = ["program"] if self.resident else []
        return [*program, *(["visits"] if self.listed else []), *self.sizes]

    def _placed(self) -> list[str]:
        """What `place` says of a program."""
        return [*self.shape.batch, "row", *self._ends()]

    def _lists(self) -> list[str]:
        """The lists of all programs, as arguments; of a program that takes several places under another name than the
        list of one."""
        return ["lists" if self.resident else "visits"] if self.listed else []

    def _go_to(self, program: str) -> str:
        """What `place` says of a place."""
        return call(self._placed(), "place", [program, *self._lists(), *self.sizes])

    def _each_place(self, lines: Sequence[str], loads: bool = False) -> list[str]:
        """The lines for all places that a program takes, one after another."""
        place = self._go_to("program")
        if not self.dynamic:
            head = "for program in range(gl.program_id(0), programs, gl.num_programs(0)):"
            return [head, *indent(line for x in (place, *lines) for line in x.splitlines())]
        body = [line for x in (place, *lines, *self._next_place("still_phase ^ 1", loads)) for line in x.splitlines()]
        return ["program = gl.program_id(0)", "while program < programs:", *indent(body)]

    def _next_place(self, phase: str, loads: bool = False) -> list[str]:
        """The next place of a program (`phase`: 0 after its first one, then 1, 0, ...; of the loading warp, `loads`, it
        is the other one). Where loops differ in length, that is the next which nobody has: the loading warp asks which
        before its last tile, late enough for a good balance, and tells the warpgroups through shared memory."""
        if not self.dynamic:
            return ["program += gl.num_programs(0)"]
        if loads:
            return [
                f"mbarrier.wait(upcoming_empty, {phase})",
                "upcoming.store(gl.full([1], following, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))",
                "mbarrier.arrive(upcoming_full)",
                "program = following",
            ]
        return [
            f"mbarrier.wait(upcoming_full, {phase})",
            "program = gl.sum(upcoming.load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)",
            "mbarrier.arrive(upcoming_empty)",
        ]

    def _take_place(self) -> list[str]:
        """The loading warp's question for the next place."""
        return ['following = gl.num_programs(0) + gl.atomic_add(taken, 1, sem="relaxed")'] if self.dynamic else []

    @property
    def sharing(self) -> int:
        """How many neighbours along the innermost batch rank read the same keys."""
        if not self.shape.batch:
            return 1
        last = var(self.shape.batch[-1])
        moving = [i for x in self.shape.moving for _, i in x.batch]
        shared = {x.args[1] for i in moving for x in i.atoms(FloorDiv) if x.args[0] == last}
        size = shared.pop() if len(shared) == 1 else sympy.Integer(1)
        extent = self.shape.extent(self.shape.batch[-1])
        return int(size) if size.is_Integer and extent.is_Integer and extent % size == 0 else 1
