"""Long loops in parts: when splitting a loop's rank pays, and how long the parts are.

Comes in: a loop program, the device, sizes. Goes out: the rank to split (`passes.split`), and for a program that was,
the length of its parts as an expression over the lengths, which the generated `run` computes at every call: the kernel
is the same for all lengths. (Flash-decoding; FlashInfer plans the same balance on the host.)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import sympy

from einscade.codegen.cost import Lengths, few_rows, step_bytes, tile_symbols, tiled_ranks
from einscade.codegen.loops import LoopProgram, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.ir.cascade import Cascade
from einscade.ir.device import Device
from einscade.ir.expr import Expr, FloorDiv, ceil_div, free_vars, var
from einscade.ir.text import print_expr
from einscade.passes.domains import is_data_dependent
from einscade.passes.online import Online
from einscade.passes.rewrite import Rewrite
from einscade.passes.split import Split

__all__ = ["part_lengths", "parted", "split_rank", "with_parts"]

SHORTEST = 256
"""A part has at least so many positions: its program's start and its partial results must be worth their while."""

LONG_FOR_TILES = 4096
"""So many positions are worth splitting for tiles that are full of rows."""

WAVES = (1, 2, 3, 4, 8, 16)
"""Programs per multiprocessor to aim at. More are balanced better, and merge more."""

RAGGED_SHORTEST, RAGGED_WAVES = 1024, (64,)
"""The same where data says how far each program's loop runs: most of them find nothing to do, and nobody knows how many
when they are launched."""

PROGRAM_SECONDS, MERGE_SECONDS = 2e-6, 4e-6
"""What a program takes beside its loop, and the kernel that merges."""


def with_parts(rewrites: Sequence[Rewrite], rank: str, length: str) -> tuple[Rewrite, ...]:
    """A recipe that cuts `rank` into parts before its loops become one pass each."""
    at = next((i for i, r in enumerate(rewrites) if isinstance(r, Online)), len(rewrites))
    return (*rewrites[:at], Split(rank, length=length), *rewrites[at:])


def split_rank(program: LoopProgram, device: Device, lengths: Lengths) -> str | None:
    """The rank (of the cascade before `online`) whose loop should run in parts on this device, or None: where its
    programs are too few to draw the memory's bandwidth, or too unequal."""
    if device.kind == "cpu" or len(program.serial_nests) != 1:
        return None
    cascade, (nest,) = program.cascade, program.serial_nests
    origin = cascade.rank_table[nest.serial].origin
    if origin is None or nest.tile is None:
        return None
    positions = lengths.rank(nest.serial, dict.fromkeys(tile_symbols(program), 1))
    if positions < 2 * SHORTEST:
        return None
    rows = few_rows(program, lengths)
    if rows is None and not (ranks := tiled_ranks(program, lengths)):
        return None
    tiles = rows or dict.fromkeys(ranks, 64)
    programs = prod(ceil(lengths.rank(r) / tiles.get(r, 1)) for r in nest.grid)
    if rows is None:  # full tiles compute more than they read: only a machine that is mostly idle gains
        return origin if 2 * programs <= device.processors and positions >= LONG_FOR_TILES else None
    return origin if programs < (WAVES[-1] if _ragged(nest) else 2) * device.processors else None


def _ragged(nest: SerialNest) -> bool:
    """Whether data says how far each program's loop has to run."""
    return any(is_data_dependent(e.domain) for e in nest.body)


def parted(program: LoopProgram) -> tuple[SerialNest, str, str] | None:
    """The nest whose loop runs over a part, the rank of the parts, and the symbol of their length."""
    cascade = program.cascade
    known = {s for t in cascade.inputs for r in t.ranks for s in free_vars(cascade.extent(r))}
    known |= {*tile_symbols(program)}
    for nest in program.serial_nests:
        for symbol in free_vars(cascade.extent(nest.serial)) - known:
            for rank in nest.grid:
                if symbol in free_vars(cascade.extent(rank)):
                    return nest, rank, symbol
    return None


def part_lengths(
    program: LoopProgram, schedule: Schedule, device: Device, lengths: Lengths
) -> list[tuple[tuple[str, str], ...]]:
    """The symbol of the parts' length with its expression, whole tiles that give the programs that the model wants: the
    model's choice first; or once nothing, where no loop runs in parts."""
    found = parted(program)
    if found is None:
        return [()]
    nest, part, symbol = found
    cascade, tiles = program.cascade, dict(schedule.tiles)
    step = lengths.number(cascade.extent(nest.tile), tiles) if nest.tile else 1
    last = next(q for q in cascade.extent(part).atoms(FloorDiv) if q.args[1] == var(symbol))
    whole = last.args[0] + 1 if cascade.extent(part) == last + 1 else last.args[0] - var(symbol) + 1
    others = sympy.Mul(*(ceil_div(cascade.extent(r), tiles.get(r, 1)) for r in nest.grid if r != part))
    ragged = _ragged(nest)
    least = max(1, (RAGGED_SHORTEST if ragged else SHORTEST) // step)

    def length(waves: int) -> Expr:
        parts = sympy.Max(1, FloorDiv(waves * device.processors, sympy.Max(1, others)))  # one more is another wave
        return step * sympy.Max(least, ceil_div(whole, step * parts))

    def seconds(waves: int) -> float:
        return _seconds(program, nest, part, length(waves), schedule, device, lengths)

    distinct: dict[int, int] = {}  # at these lengths
    for waves in sorted(RAGGED_WAVES if ragged else WAVES, key=seconds):
        distinct.setdefault(lengths.number(length(waves), tiles), waves)
    return [((symbol, print_expr(length(waves))),) for waves in distinct.values()]


def _seconds(
    program: LoopProgram, nest: SerialNest, part: str, length: Expr, schedule: Schedule, device: Device,
    lengths: Lengths,
) -> float:  # fmt: skip
    """Time of the parts and of their merge: programs come in waves, and share the bandwidth with those beside them."""
    cascade, tiles = program.cascade, dict(schedule.tiles)
    whole = lengths.rank(part, {**tiles, **_at(cascade, part, 1)})
    positions = min(whole, lengths.number(length, tiles))
    parts = ceil(whole / max(1, positions))
    others = prod(ceil(lengths.rank(r, tiles) / tiles.get(r, 1)) for r in nest.grid if r != part)
    step = lengths.rank(nest.tile, tiles) if nest.tile else 1
    moved = step_bytes(cascade, nest, schedule, lengths)
    kept = max(1, schedule.stages - 1) * moved  # one stage is in registers
    side_by_side = device.processors * max(1, min(4, device.shared // max(1, kept)))
    rate = device.bandwidth / side_by_side * max(1.0, min(2.0, side_by_side / max(1, others * parts)))
    reading = ceil(others * parts / side_by_side) * (PROGRAM_SECONDS + positions / step * moved / rate)
    partial = sum(
        prod(lengths.rank(r, tiles) for r in cascade.tensors[n].ranks if r != part) * 4 * parts for n in nest.outputs
    )
    return reading + MERGE_SECONDS + 2 * partial / device.bandwidth


def _at(cascade: Cascade, part: str, length: int) -> dict[str, int]:
    """The symbol of the parts' length as a number."""
    known = {s for t in cascade.inputs for r in t.ranks for s in free_vars(cascade.extent(r))}
    return dict.fromkeys(free_vars(cascade.extent(part)) - known, length)
