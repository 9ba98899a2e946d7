"""Schedules of Gluon kernels: the declared space, what of it fits, and which is likely best at some sizes.

Comes in: a `Form`, and, where they are known, a device and sizes. Goes out: `Schedule`s, best guess first. The space is
`SPACE`; what does not fit in shared memory or registers is left out, and so are kernels whose programs would leave most
of the device idle: few rows are for emitters with smaller tiles, or for loops in parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import sympy

from einscade.codegen.cost import Lengths
from einscade.codegen.gluon_form import Form
from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_tables import Tables
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.device import Device
from einscade.ir.expr import free_vars

__all__ = ["SPACE", "schedules"]

SPACE = (
    (3, 128, 2), (2, 128, 2), (2, 64, 3), (2, 64, 2), (2, 32, 2), (1, 128, 2), (1, 64, 3), (1, 64, 2), (1, 32, 2),
)  # fmt: skip
"""Warpgroups of 64 rows, the tile of the loop, and the depth of the rings; the likely ones first."""

SLOWER = {128: 1.0, 64: 1.15, 32: 1.5}
"""Time of a point in shorter tiles of the loop, which hide less; as measured at width 128."""

TURNS = {1: 1.3, 2: 1.0, 3: 0.88}
"""Time of a row by the number of warpgroups that take turns; three fit where both widths are at most 64."""

LEAST_ROWS = 32
"""With fewer rows a warpgroup computes mostly padding."""

MOST = 4


def schedules(
    shape: Form, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """At most `MOST` schedules. Raises `Unsupported` where none fits, or where at these sizes none is worth trying."""
    found = [(choice, schedule) for choice in SPACE if (schedule := _fitting(shape, *choice)) is not None]
    if not found:
        raise Unsupported("no tile of the kernel fits on chip")
    if device is None or sizes is None:
        several = [(c, s) for c, s in found if c[0] > 1]
        return tuple(s for _, s in _distinct(several or found))
    lengths = Lengths(shape.cascade, sizes)
    rows, batch = lengths.rank(shape.p), 1
    for r in shape.batch:
        batch *= lengths.rank(r)
    if rows < LEAST_ROWS:
        raise Unsupported(f"{rows} rows: a warpgroup takes {GROUP_ROWS}")
    if batch * ceil(rows / GROUP_ROWS) < device.processors // 2:
        raise Unsupported(f"{batch * ceil(rows / GROUP_ROWS)} warpgroups for {device.processors} processors")

    def cost(choice: tuple[int, int, int]) -> float:
        groups, columns, _ = choice
        programs = batch * ceil(rows / (groups * GROUP_ROWS))
        waves = programs / device.processors
        waves = waves if waves > 4 else ceil(waves)
        return waves * groups * SLOWER[columns] * TURNS[groups]

    ordered = sorted(_distinct(found), key=lambda pair: cost(pair[0]))
    return tuple(s for _, s in ordered)


def _fitting(shape: Form, groups: int, columns: int, stages: int) -> Schedule | None:
    """A choice of the space as a schedule, if the kernel fits."""
    tiles = {shape.p: groups * GROUP_ROWS}
    step = shape.loop.step
    if isinstance(step, sympy.Symbol):
        tiles[step.name] = columns
    elif step != columns:
        return None
    schedule = Schedule(tuple(sorted(tiles.items())), 4, stages, (), "cuda:90", True)
    try:
        plan = Tables(shape, schedule)
    except Unsupported:
        return None
    return schedule if _has_registers(plan) else None


def _has_registers(plan: Tables) -> bool:
    """Whether what is computed point by point leaves room, beyond the tiles that `Plan` counts."""
    shape = plan.shape
    several = len(shape.products) > 1 or len(shape.sums) > 1
    tiles = {t.access for t in plan.tables}
    read = [x.access for x in plan.loads if x.name is None and x.access not in tiles]
    addressed = any({shape.p, shape.m} <= free_vars(a) for a in read) or (plan.listed and bool(read))
    points = [s for s in shape.statements if s.monoid is None and shape.m in s.ranks]
    if plan.groups == 3:
        narrow = max(x.width for x in (*shape.stills, *shape.moving)) <= 64 and len(points) == 1
        return narrow and not (several or read or plan.tables or plan.listed)
    if several:
        return plan.columns <= 64
    wide = sum(t.size for t in plan.tables) > 2  # bytes a point, all in registers at once
    return plan.columns == 64 or (plan.columns == 128 and not (addressed or wide))


Choice = tuple[tuple[int, int, int], Schedule]


def _distinct(found: list[Choice]) -> list[Choice]:
    """For each number of warpgroups the two longest tiles, each with its deepest ring; at most `MOST`."""
    kept: list[Choice] = []
    for choice, schedule in found:
        same = [c for c, _ in kept if c[0] == choice[0]]
        if len(same) < 2 and choice[1] not in {c[1] for c in same}:
            kept.append((choice, schedule))
    return kept[:MOST]
