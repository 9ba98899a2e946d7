"""The Gluon emitter for windows: warpgroups that leave out the half of an edge tile in which they have no points.

Comes in: what `gluon_overlap` takes, of a domain with a limit on either side that moves with the rows. Goes out: a
module in which the first of two warpgroups multiplies half of the tile that is visited first, and the last one half of
the tile that is visited last: tiles of 128 keys, of which 64 rows on the diagonal have 64. Loops are short where a
window is, so that this is a part of all work that counts; and the warpgroups fall out of step by half a tile.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property

import sympy

from einscade.codegen.gluon_form import Form
from einscade.codegen.gluon_overlap import Overlapped
from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_text import REDUCTIONS, TURN, indent
from einscade.codegen.gluon_values import Printer
from einscade.codegen.schedule import Schedule
from einscade.ir.expr import Expr, var
from einscade.passes.domains import limits_apart, span

__all__ = ["Halved", "halved"]

LOWER, UPPER = ".slice(0, HALF)", ".slice(HALF, HALF)"
"""The halves of a tile."""


def halved(shape: Form, schedule: Schedule) -> bool:
    """Whether the kernel under a schedule is of this kind: a resident program of two warpgroups of half a tile's keys,
    whose first one never has a point in the second half of the tile that it visits first."""
    if not schedule.resident or schedule.joined or schedule.in_order:
        return False
    plan = Halved(shape, schedule)
    size = 2 * GROUP_ROWS
    if not (plan.groups == 2 and plan.rows == plan.columns == size and plan._masked_apart() and not plan.bounds.upper):
        return False
    row = var("row")
    own, stop = (_span(plan, 0, groups)[1] for groups in (1, 2))
    # the tile of `row` itself is visited: what ends the loop is behind `row`, as is the end of all rows
    ends = stop.args if isinstance(stop, sympy.Min) else (stop,)
    there = all((x - row).is_positive or (x - shape.extent(shape.p)).is_nonnegative for x in ends)
    return bool(there and sympy.Min(own, row + GROUP_ROWS) == own)


def _span(plan: Overlapped, group: int, groups: int) -> tuple[Expr, Expr]:
    """From where, and up to where, some warpgroups' rows have points."""
    first = var("row") + group * GROUP_ROWS
    reach = span(plan.shape.keep, plan.shape.m, {plan.shape.p: (first, first + groups * GROUP_ROWS - 1)})
    assert reach.start is not None
    assert reach.stop is not None
    return reach.start, reach.stop


class Halved(Overlapped):
    """One nest's kernel."""

    @cached_property
    def half(self) -> Half:
        return Half(self)

    def _masked_apart(self) -> bool:
        """Where every mask is a limit from above and one from below, and no point is read by address."""
        read = any(x.name is None for x in self.loads)
        if read or self.listed or not self._classes() or not self.bounds.lower:
            return False
        masked = [s for s in (*self.scores, *self.statements) if s.fill is not None or s.mask_operand]
        return all(not s.mask_operand and limits_apart(s.row, self.shape.m) is not None for s in masked)

    def _constants(self) -> str:
        return f"""{super()._constants()}
HALF = gl.constexpr({GROUP_ROWS})
SCORES_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF.value, 16]))
ROW_HALF = gl.constexpr(gl.SliceLayout(1, SCORES_HALF))
COLUMN_HALF = gl.constexpr(gl.SliceLayout(0, SCORES_HALF))"""

    def _functions(self) -> list[str]:
        half = self.half
        weigh = [self._weigh(), half._weigh()]
        reductions = [re.sub(r"\b(row_\w+)\(", r"\1_half(", REDUCTIONS[h]).replace("STEP", "HALF").strip("\n")
                      for h in REDUCTIONS if h in self.used]  # fmt: skip
        steps = [self._advance(), self._advance(name="advance_from_half", values=LOWER)]
        steps.append(half._advance(name="advance_to", keys=UPPER))
        own = [self._compute(), self._kernel()]
        return [TURN.strip("\n"), self._place(), self._load(), *reductions, *weigh, *steps, *own]

    def _pack(self) -> list[str]:
        """Weights of loops and of halves meet in no place, but the compiler does not find that by itself."""
        self.used.add("packed")
        return [f"{name} = packed({name})" for name in self.weight_names.values()]

    def _all_tiles(self) -> list[str]:
        half = self.half
        names = dict(zip(self.weight_names.values(), half.weight_names.values(), strict=True))
        count, edges = "end - 1 - first", self._edges()
        first = [
            *half._first_tile(LOWER),
            "if end - 1 > first:",
            *indent([
                "tile -= 1",
                *self._advanced("tile == first", edges, "advance_from_half", names),
                *self._loop("end - 2 - first"),
                *self._last_sums(),
            ]),
            "else:",
            *indent(half._last_sums(LOWER)),
        ]  # fmt: skip
        start = self._scalar_printer().value(_span(self, 1, 1)[0]).code
        last = [
            *self._first_tile(),
            f"half = (end - 1 > first) & ({start} >= first * STEP + HALF)",
            *self._loop(f"{count} - half.to(gl.int32)", ["False", "False"] if self._one_tile_below() else edges),
            "if half:",
            *indent([
                "tile -= 1",
                *self._advanced("True", ["False", "True"], "advance_to_half", {"zero": "zero_half"}, half._running()),
                *half._last_sums(UPPER),
            ]),
            "else:",
            *indent(self._last_sums()),
        ]  # fmt: skip
        zero = f"zero_half = gl.full([{GROUP_ROWS}, HALF], 0.0, gl.float32, SCORES_HALF)"
        return [zero, "if group == 0:", *indent(first), "else:", *indent(last)]

    def _one_tile_below(self) -> bool:
        """Whether a tile across the lower edge is always one of which the last warpgroup has half: where the first row
        of a tile of rows has its first point at a tile's second key."""
        distance = _span(self, 0, 2)[0] - var("row")
        return bool(distance.is_Integer and (distance - 1) % self.columns == 0)


class Half(Overlapped):
    """The same on half a tile of keys."""

    suffix = reductions = "_half"
    columns_code = "gl.arange(0, HALF, COLUMN_HALF)"

    def __init__(self, whole: Halved) -> None:
        cached = {n for c in type(whole).__mro__ for n, x in vars(c).items() if isinstance(x, cached_property)}
        vars(self).update({n: x for n, x in vars(whole).items() if n not in cached})
        self.whole = whole

    @cached_property
    def weight_names(self) -> dict[str, str]:
        return {x: f"{name}_half" for x, name in self.whole.weight_names.items()}

    def _pack(self) -> list[str]:
        self.used.add("packed")
        return [f"{name} = packed({name})" for name in self.weight_names.values()]

    def _printer(self, guard: str) -> Printer:
        return replace(super()._printer(guard), rows="ROW_HALF")

    def _part(self, name: str, part: str) -> str:
        return f"gl.convert_layout({part}, {name}.type.layout)"

    def _masked_apart(self) -> bool:
        return True

    def _first_column(self, keys: str) -> str:
        return "tile * STEP" if keys == LOWER else "tile * STEP + HALF"
