"""Every way to run a program on a device.

Comes in: a program, what its recipe made of it, a device and sizes. Goes out: `Candidate`s, the cost model's choice
first: schedules of the emitters that can lower the rewritten cascade, library calls that compute the same cascade, and
at the end what needs nothing: one Einsum after another, whole, and the reference interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from einscade.codegen import tiled_torch
from einscade.codegen.cost import Lengths, crossed, crossed_tiles, few_rows
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.parts import parted, split_rank, with_parts
from einscade.codegen.schedule import Schedule, target_of
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.space import candidates as schedules_for
from einscade.ir.cascade import Cascade
from einscade.ir.device import CPU, Device
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from einscade.passes.tables import Tables
from einscade.runtime import library_call, library_gradient
from einscade.runtime.library import NotInLibrary
from einscade.runtime.messages import first_line, warn_once
from einscade.runtime.modules import interpreted
from einscade.runtime.program import MemoryOrder, Program
from einscade.runtime.steps import StepRecord

__all__ = ["LAST_RESORTS", "Candidate", "candidates", "reference"]

MOST_SCHEDULES = {"gluon": 4, "triton": 8, "tiled_torch": 3}
"""So many schedules of an emitter are written out; the cost model has put the likely ones first."""

BESIDE_PARTS = 2
"""Where the cost model wants a loop in parts, so many schedules of each emitter show what it is without."""

LAST_RESORTS = ("flat", "interpreter")

ROOMY = replace(CPU, name="torch operations", shared=64 << 20)
"""What a reference's tiles are chosen for: so large that launching torch's operations is not what takes the time."""

LARGEST_REFERENCE = 1 << 35
"""Of a tensor with more points than these no reference is made: about two seconds of a large GPU."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a cascade. `symbols` are the sizes that it takes.

    `kind`: "gluon", "triton", "tiled_torch", "library:sdpa", of gradients "library:cudnn" and "library:flash", "flat"
    (every Einsum whole) or "interpreter".
    """

    kind: str
    source: Source
    schedule: Schedule
    symbols: tuple[str, ...]


def candidates(
    program: Program,
    rewritten: Cascade,
    steps: Sequence[StepRecord],
    device: Device,
    sizes: Mapping[str, int],
    deterministic: bool = False,
) -> list[Candidate]:
    """Every way to run the program, the cost model's choice first, the last resorts last; none stands twice.

    On a GPU generated kernels come before library calls, on a CPU after them: torch's own kernel is compiled code
    there, ours is a loop of torch operations, which for a single query has nothing to gain. `deterministic`: only
    those whose results do not depend on the order in which a device's processors come.
    """
    form = _library_form(program, steps)
    calls = [] if form is None else [Candidate("library:sdpa", library_call.emit(form), Schedule(), form.symbols)]
    calls += _library_gradients(program, device)
    last = _last_resorts(program.cascade, Schedule(target=target_of(device)))
    if device.kind == "cpu" and form is not None and library_call.one_query(form):
        return [*calls, *last]
    try:
        loops = plan(rewritten)
    except Unsupported:
        return [*calls, *last]
    orders = program.order_in(rewritten)
    kinds = _emitters(device)
    if device.kind != "cpu" and few_rows(loops, Lengths(rewritten, sizes)) is not None:
        kinds = tuple(sorted(kinds, key=lambda kind: kind != "triton"))  # it packs the heads of a group into a tile
    generated = _in_parts(program, loops, device, sizes)
    tables = None if device.kind == "cpu" or deterministic else _with_tables(program, device, Lengths(rewritten, sizes))
    whole: list[list[Candidate]] = []
    if tables is not None:
        named = program.order_in(tables.cascade)
        whole = [_generated(kind, tables, named, device, sizes) for kind in kinds]
    if not any(whole):
        whole = [_generated(kind, loops, orders, device, sizes) for kind in kinds]
    generated += [c for found in whole for c in (found[:BESIDE_PARTS] if generated else found)]
    if not generated:
        generated = _generated("tiled_torch", loops, orders, device, sizes)
    found = [*calls, *generated] if device.kind == "cpu" else [*generated, *calls]
    return [c for c in dict.fromkeys([*found, *last]) if not (deterministic and c.schedule.unordered)]


def reference(program: Program, rewritten: Cascade, sizes: Mapping[str, int]) -> Candidate | None:
    """The program in torch's operations, tile by tile, for any device: no candidate there, but one that candidates can
    be held to. None where it has no such form, or would take too long."""
    lengths = Lengths(program.cascade, sizes)
    points = max(prod(map(lengths.rank, e.output.ranks)) for e in program.cascade.body)
    if points > LARGEST_REFERENCE:
        return None
    try:
        found = _generated("tiled_torch", plan(rewritten), program.order_in(rewritten), ROOMY, sizes)
    except Unsupported:
        return None
    return found[0] if found else None


def _in_parts(program: Program, loops: LoopProgram, device: Device, sizes: Mapping[str, int]) -> list[Candidate]:
    """The program with its loop's rank in parts that run side by side, where the cost model wants that."""
    rank = split_rank(loops, device, Lengths(loops.cascade, sizes))
    if rank is None:
        return []
    try:
        split = run(program.cascade, with_parts(recipe(program.recipe), rank, loops.cascade.fresh("L"))).cascade
        form = plan(split)
    except Exception as error:  # as for an emitter
        warn_once(f"{program.cascade.name}: splitting {rank} failed ({first_line(error)})")
        return []
    if parted(form) is None:  # the split did not apply
        return []
    return _generated("triton", form, program.order_in(split), device, sizes)


def _with_tables(program: Program, device: Device, lengths: Lengths) -> LoopProgram | None:
    """The program with what it sums by the entries of a table summed by pairs of positions first, if there is such a
    sum and the device has enough to do with that: else by entries at once. Only kernels that add to memory do either
    on chip."""
    for shared in (True, False):
        try:
            found = run(program.cascade, (Tables(recipe(program.recipe), shared),))
            loops = plan(found.cascade)
        except Exception as error:  # as for an emitter
            warn_once(f"{program.cascade.name}: the sums by entries of a table failed ({first_line(error)})")
            return None
        if not found.steps[0].changed:
            return None
        crossing = [n for n in loops.serial_nests if crossed(loops.cascade, n)]
        tiles = [(crossed_tiles(loops.cascade, n), n.grid) for n in crossing]
        programs = [prod(ceil(lengths.rank(r) / sizes.get(r, 1)) for r in grid) for sizes, grid in tiles]
        if programs and min(programs) >= device.processors:
            break
    return loops


def _emitters(device: Device) -> tuple[str, ...]:
    """The emitters for a device, the ones that know most of it first; tiled torch is what all others fall back to."""
    if device.kind == "cpu":
        return ("tiled_torch",)
    hopper = device.kind == "cuda" and device.capability[0] == 9
    return ("gluon", "triton") if hopper else ("triton",)


def _last_resorts(cascade: Cascade, schedule: Schedule) -> list[Candidate]:
    """One Einsum after another, whole; and should even that fail, the reference interpreter."""
    interpreter = Candidate("interpreter", interpreted(cascade), schedule, cascade.symbols)
    try:
        return [Candidate("flat", tiled_torch.emit_flat(cascade), schedule, cascade.symbols), interpreter]
    except Unsupported:
        return [interpreter]


def _generated(
    kind: str, loops: LoopProgram, orders: MemoryOrder, device: Device, sizes: Mapping[str, int]
) -> list[Candidate]:
    """What an emitter makes of a loop program, one candidate per schedule; nothing where it cannot lower it."""
    if kind == "gluon":
        from einscade.codegen.gluon import emit, schedules
    elif kind == "triton":
        from einscade.codegen.triton_emit import emit
    else:
        from einscade.codegen.tiled_torch import emit
    found = []
    orders = tuple((o, tuple(x for r in ranks for x in loops.views.get(o, {}).get(r, (r,)))) for o, ranks in orders)
    try:
        tried = (schedules if kind == "gluon" else schedules_for)(loops, device, sizes)
        for schedule in tried[: MOST_SCHEDULES[kind]]:
            schedule = replace(schedule, out_order=orders)
            symbols = tuple(s for s in loops.cascade.symbols if s not in schedule.settled)
            found.append(Candidate(kind, emit(loops, schedule), schedule, symbols))
    except Unsupported:
        pass
    except Exception as error:  # an emitter that breaks on a program costs its speed, not its result
        warn_once(f"{loops.cascade.name}: the {kind} emitter failed ({first_line(error)})")
    return found


def _library_form(program: Program, steps: Sequence[StepRecord]) -> Cascade | None:
    """The form of the program that a library call computes, if one does: the raised cascade or a later form, the first
    that needs no mask tensor if there is one. A triangle spelled as a bias is a mask for the library, whose every tile
    it computes; once canonicalised it is a domain, whose empty tiles it skips."""
    masked: list[Cascade] = []
    for cascade in [program.cascade, *(parse_cascade(s.after) for s in steps if s.changed)]:
        try:
            library_call.emit(cascade)
            if not library_call.needs_mask(cascade):
                return cascade
        except NotInLibrary:
            continue
        masked.append(cascade)
    return masked[0] if masked else None


def _library_gradients(program: Program, device: Device) -> list[Candidate]:
    """The library's backward calls that compute the program, if it is a gradient of what has a forward call."""
    found = []
    for kind in library_gradient.kinds(device):
        with contextlib.suppress(NotInLibrary):
            source = library_gradient.emit(program, kind, device)
            schedule = library_gradient.schedule(kind, target_of(device))
            found.append(Candidate(f"library:{kind}", source, schedule, program.cascade.symbols))
    return found
