"""Schedules of Gluon kernels: the declared space, what of it fits, and which is likely best at some sizes.

Comes in: a `Form`, and, where they are known, a device and sizes. Goes out: `Schedule`s, best guess first. The space is
`SPACE`; what does not fit in shared memory or registers is left out, and so are kernels whose programs would leave most
of the device idle: few rows are for emitters with smaller tiles, or for loops in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

import sympy
from sympy import divisors

from einscade.codegen.base2 import logistic_exponent
from einscade.codegen.cost import Lengths
from einscade.codegen.gluon_anchored import anchors
from einscade.codegen.gluon_form import Form
from einscade.codegen.gluon_passes import Passes, in_order, in_passes
from einscade.codegen.gluon_plan import GROUP_ROWS, distance
from einscade.codegen.gluon_tables import Tables
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.device import Device
from einscade.ir.expr import Expr, free_vars

__all__ = ["SPACE", "schedules"]

SPACE = (
    (3, 128, 2), (2, 128, 2), (2, 64, 3), (2, 64, 2), (2, 32, 2), (1, 128, 2), (1, 64, 3), (1, 64, 2), (1, 32, 2),
)  # fmt: skip
"""Warpgroups of 64 rows, the tile of the loop, and the depth of the rings; the likely ones first."""

IN_ORDER = ((2, 128, 2), (3, 64, 2))
"""The same of loops with several products that are issued one after another."""

IN_PASSES = ((3, 128, 2), (2, 128, 2), (2, 64, 3))
"""The same of loops whose sums have a pass each."""

SLOWER = {128: 1.0, 64: 1.15, 32: 1.5}
"""Time of a point in shorter tiles of the loop, which hide less; as measured at width 128."""

TURNS = {1: 1.3, 2: 1.0, 3: 0.88}
"""Time of a row by the number of warpgroups that take turns; three fit where both widths are at most 64."""

STARTS = {False: 6.5, True: 2.0}
"""What a tile of rows takes besides its loop, in the time of 64 rows by 128 columns: a program of its own, and one tile
of a resident program, whose loads run ahead. Estimated from packed documents."""

UNEVEN = 1.1
"""What resident programs lose where tiles of rows have loops of different lengths, as long causal rows showed; with
lists of tiles they gained."""

JOINED_START = 4.5
"""The same as `STARTS` of tiles of rows that are joined, whose code is longer: windows lose."""

JOINED = {2: 1.04, 3: 0.96}
"""The same as `UNEVEN` where tiles of rows are joined, by the number of warpgroups: three gain, as long causal rows of
width 64 showed. Loops of one length, and lists of tiles, lose, unless they have several passes."""

ANCHORED = (0.87, 4.0)
"""Time of a loop whose references stay, and what a tile of rows takes besides, in the unit of `STARTS`: long rows of
both widths gained that much, as did lists of tiles (padding, packed documents), and windows of nine tiles lost."""

CACHED = 0.35
"""The part of the second-level cache that neighbours' operands may take up, besides what else goes through it."""

LEAST_ROWS = 32
"""With fewer rows a warpgroup computes mostly padding."""

MOST = 4


@dataclass(frozen=True)
class Choice:
    """A point of the space that fits. `iterations`: how many tiles of the loop the middle tile of rows visits, as an
    expression; None where data decides. `uneven`: whether other tiles of rows visit more or fewer. `sharing`: how many
    neighbours along the innermost batch rank read the same keys."""

    groups: int
    columns: int
    schedule: Schedule
    iterations: Expr | None
    uneven: bool
    sharing: int


def schedules(
    shape: Form, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """At most `MOST` schedules, and half as many whose references stay. Raises `Unsupported` where none fits, or where
    at these sizes none is worth trying."""
    found = _distinct([c for point in SPACE if (c := _fitting(shape, *point)) is not None])
    if len(shape.products) > 1:
        space = IN_PASSES if in_passes(shape) else IN_ORDER
        found += [c for point in space if (c := _fitting(shape, *point, ordered=True)) is not None]
    if not found:
        raise Unsupported("no tile of the kernel fits on chip")
    if device is None or sizes is None:
        return tuple(c.schedule for c in [c for c in found if c.groups > 1] or found)[:MOST]
    lengths = Lengths(shape.cascade, sizes)
    rows, batch = lengths.rank(shape.p), 1
    for r in shape.batch:
        batch *= lengths.rank(r)
    if rows < LEAST_ROWS:
        raise Unsupported(f"{rows} rows: a warpgroup takes {GROUP_ROWS}")
    if batch * ceil(rows / GROUP_ROWS) < device.processors // 2:
        raise Unsupported(f"{batch * ceil(rows / GROUP_ROWS)} warpgroups for {device.processors} processors")

    def programs(choice: Choice) -> int:
        return int(batch) * ceil(rows / (choice.groups * GROUP_ROWS))

    def cost(choice: Choice) -> float:
        waves = programs(choice) / device.processors
        waves = waves if waves > 4 else ceil(waves)
        longest = lengths.number(shape.loop.limit or sympy.Integer(0), {}) / choice.columns
        visited = longest / 4
        if choice.iterations is not None:
            visited = lengths.number(choice.iterations, {"row": rows // 2})
        resident = bool(choice.schedule.resident)
        loop = choice.groups * visited * choice.columns / 128 * SLOWER[choice.columns] * TURNS[choice.groups]
        if choice.schedule.anchored:
            loop = loop * ANCHORED[0] + ANCHORED[1]
        if choice.schedule.joined:
            return waves * (loop + JOINED_START) * (JOINED[choice.groups] if choice.uneven else 1.0)
        balanced = not choice.uneven or choice.iterations is None
        return waves * (loop + STARTS[resident]) * (UNEVEN if resident and not balanced else 1.0)

    resident = [
        replace(c, schedule=alternative)
        for c in found
        for joined in (False, True)
        if not joined or c.schedule.in_order or (c.uneven and c.iterations is not None)
        if c.groups > 1 and programs(c) > device.processors
        if _plan(shape, alternative := replace(c.schedule, resident=device.processors, joined=joined)) is not None
    ]
    several = [c for c in resident if not c.schedule.in_order] if anchors(shape) else []
    staying = sorted((replace(c, schedule=replace(c.schedule, anchored=True)) for c in several), key=cost)[: MOST // 2]
    best = sorted([*sorted([*found, *resident], key=cost)[:MOST], *staying], key=cost)
    return tuple(replace(c.schedule, abreast=_abreast(shape, c, lengths, device)) for c in best)


def _abreast(shape: Form, choice: Choice, lengths: Lengths, device: Device) -> int:
    """How many neighbours along the innermost batch rank have their tiles of rows dealt out together, where loops
    differ in length: as many as what their loops read fits in `CACHED` of the second-level cache."""
    extent = shape.extent(shape.batch[-1]) if shape.batch else sympy.Integer(1)
    if not choice.uneven or not extent.is_Integer:
        return 1
    tile = choice.groups * GROUP_ROWS
    longest = lengths.number(shape.loop.limit or sympy.Integer(0), {})
    if choice.iterations is not None:
        ends = (0, lengths.rank(shape.p) // tile * tile)
        longest = min(longest, max(lengths.number(choice.iterations, {"row": r}) for r in ends) * choice.columns)
    read = longest * sum(x.width for x in shape.moving) * 2
    fitting = [
        n for n in divisors(int(extent)) if n % choice.sharing == 0 and n // choice.sharing * read <= CACHED * device.l2
    ]
    return max(fitting, default=1)


def _fitting(shape: Form, groups: int, columns: int, stages: int, ordered: bool = False) -> Choice | None:
    """A point of the space as a choice, if the kernel fits."""
    tiles = {shape.p: groups * GROUP_ROWS}
    step = shape.loop.step
    if isinstance(step, sympy.Symbol):
        tiles[step.name] = columns
    elif step != columns:
        return None
    schedule = Schedule(tuple(sorted(tiles.items())), 4, stages, (), "cuda:90", True, in_order=ordered)
    plan = _plan(shape, schedule)
    if plan is None:
        return None
    iterations = None if plan.listed else plan.bounds.end - plan.bounds.first
    return Choice(groups, columns, schedule, iterations, plan.uneven, plan.sharing)


def _plan(shape: Form, schedule: Schedule) -> Tables | None:
    """The kernel under a schedule, if it fits on chip."""
    try:
        if schedule.in_order:
            ordered = in_order(shape, schedule)
            if isinstance(ordered, Passes):
                return ordered if all(map(_has_registers, ordered.passes)) else None
            return None if ordered.tables else ordered
        plan = Tables(shape, schedule)
    except Unsupported:
        return None
    return plan if _has_registers(plan) else None


def _has_registers(plan: Tables) -> bool:
    """Whether what is computed point by point leaves room, beyond the tiles that `Plan` counts."""
    shape = plan.shape
    several = len(shape.products) > 1 or len(shape.sums) > 1
    tiles = {t.access for t in plan.tables} | {c.access for c in plan.copied_columns}
    read = [x.access for x in plan.loads if x.name is None and x.access not in tiles]
    moving = [a for a in read if {shape.p, shape.m} <= free_vars(a)]
    near = not plan.schedule.joined and all(distance(a, shape.p, shape.m) is not None for a in moving)
    addressed = bool(moving and not near) or (plan.listed and bool(read))
    if plan.groups == 3:
        values = [s for s in shape.statements if s.monoid is None and shape.m in s.ranks]
        narrow = max(x.width for x in (*shape.stills, *shape.moving)) <= 64 and len(values) == 1
        # ptxas (CUDA 12.8) gives the third warpgroup with these a descriptor that only the second one has made
        logistic = any(logistic_exponent(s.expr) is not None for s in plan.statements)
        return narrow and not (several or read or plan.tables or plan.listed or logistic)
    if several:
        return plan.columns <= 64
    wide = sum(t.size for t in plan.tables) > 2  # bytes a point, all in registers at once
    return plan.columns == 64 or (plan.columns == 128 and not (addressed or wide))


def _distinct(found: list[Choice]) -> list[Choice]:
    """For each number of warpgroups the two longest tiles, each with its deepest ring."""
    kept: list[Choice] = []
    for choice in found:
        same = [c for c in kept if c.groups == choice.groups]
        if len(same) < 2 and choice.columns not in {c.columns for c in same}:
            kept.append(choice)
    return kept
