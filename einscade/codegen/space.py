"""The schedules of a loop program that are worth trying on a device.

Comes in: a `LoopProgram`, the `Device` it will run on, and the sizes it will run at. Goes out: `Schedule`s, best guess
first. The search space is `_cpu_space`, `_gpu_space` or, where a tile's rows are few, `_narrow_space`; what cannot fit
on chip is dropped and the rest ordered by a model of its time (`cost`) before anything compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import prod

from einscade.codegen.cost import Lengths, cost, few_rows, fits, is_gathered, narrow_steps, tile_symbols, tiled_ranks
from einscade.codegen.loops import LoopProgram
from einscade.codegen.parts import part_lengths
from einscade.codegen.schedule import Schedule, has_descriptors, target_of
from einscade.ir.device import Device
from einscade.ir.text import parse_expr

__all__ = ["candidates"]


def candidates(program: LoopProgram, device: Device, sizes: Mapping[str, int]) -> tuple[Schedule, ...]:
    """Schedules for the program on a device at these sizes, best guess first; at least one.

    `sizes` gives the cascade's length symbols; one that is missing counts as long.
    """
    cascade, lengths = program.cascade, Lengths(program.cascade, sizes)
    if device.kind != "cpu" and (rows := few_rows(program, lengths)) is not None:
        narrow = _narrow_space(program, device, lengths, rows)
        if fitting := [s for s in narrow if all(fits(cascade, n, s, device, lengths) for n in program.serial_nests)]:
            return tuple(fitting)
    space = (_cpu_space if device.kind == "cpu" else _gpu_space)(program, device, lengths)
    scored = []
    for schedule in space:
        costs = [cost(cascade, nest, schedule, device, lengths) for nest in program.serial_nests]
        if all(c is not None for c in costs):
            scored.append((sum(c for c in costs if c is not None), schedule))
    scored.sort(key=lambda pair: pair[0])
    # Where nothing fits, the model may be wrong of the smallest.
    found = tuple(s for _, s in scored) or (min(space, key=lambda s: (prod(n for _, n in s.tiles), s.stages)),)
    return tuple(_launched(program, s, device, lengths)[0] for s in found)


def _launched(program: LoopProgram, schedule: Schedule, device: Device, lengths: Lengths) -> list[Schedule]:
    """The schedule with the lengths of parts that are worth trying, if the program has a loop in parts."""
    found = []
    for launch in part_lengths(program, schedule, device, lengths):
        tiles = dict(schedule.tiles)
        if launch:  # now it is known how many parts there are to merge
            made = {name: lengths.number(parse_expr(text), tiles) for name, text in launch}
            tiles |= narrow_steps(program, Lengths(program.cascade, {**lengths.sizes, **made}), device)
        found.append(replace(schedule, tiles=tuple(sorted(tiles.items())), launch=launch))
    return found


def _cpu_space(program: LoopProgram, device: Device, lengths: Lengths) -> list[Schedule]:
    """Square-ish tiles; batch ranks one at a time once they alone would fill the cache."""
    symbols, ranks = tile_symbols(program), tiled_ranks(program, lengths)
    cache = 2.4 * device.shared * device.processors
    space = []
    for p, m in product((256, 128, 64), (512, 256, 128)):
        tiles = {**dict.fromkeys(symbols, m), **dict.fromkeys(ranks, p)}
        for nest in program.serial_nests:
            points = lengths.points(nest, tiles)
            for r in nest.grid:  # outermost first
                if points * 4 <= cache or r in tiles:
                    continue
                whole = lengths.rank(r)
                keep = max(1, int(whole * cache / (points * 4)))
                tiles[r] = keep
                points = points * keep // max(1, whole)
        space.append(Schedule(tuple(sorted(tiles.items()))))
    return space


def _gpu_space(program: LoopProgram, device: Device, lengths: Lengths) -> list[Schedule]:
    symbols, ranks = tile_symbols(program), tiled_ranks(program, lengths)
    space = []
    for p, m, warps, stages in product((128, 64, 32, 16), (128, 64, 32, 16), (4, 8), (2, 3, 4)):
        tiles = {**dict.fromkeys(symbols, m), **dict.fromkeys(ranks, p), **narrow_steps(program, lengths, device)}
        space.append(
            Schedule(
                tuple(sorted(tiles.items())), warps, stages, (), target_of(device), has_descriptors(device),
                summaries=True,
            )
        )  # fmt: skip
    return space


def _narrow_space(
    program: LoopProgram, device: Device, lengths: Lengths, rows: Mapping[str, int]
) -> tuple[Schedule, ...]:
    """All rows that share what the loop reads in one tile. Such a loop waits for memory: what counts is how many bytes
    are on their way, so the space is that of the stages' sizes."""
    space: list[Schedule] = []
    others: list[Schedule] = []
    gathered = any(map(is_gathered, program.serial_nests))
    for m, warps, ahead in _NARROW:
        stages = 2 * ahead - 1 if gathered else ahead
        tiles = {**dict.fromkeys(tile_symbols(program), m), **rows, **narrow_steps(program, lengths, device)}
        schedule = Schedule(tuple(sorted(tiles.items())), warps, stages, (), target_of(device), has_descriptors(device))
        best, *rest = _launched(program, schedule, device, lengths)
        space.append(best)
        others += rest[:1]
    return (*space[:2], *others[:2], *space[2:])


_NARROW = (
    (64, 4, 3), (128, 4, 2), (64, 4, 4), (128, 4, 3), (32, 4, 4), (128, 8, 3), (64, 8, 3), (64, 4, 2), (32, 4, 2),
    (16, 4, 2),
)  # fmt: skip
"""Tile of keys, warps, stages: not fitted to a device yet, ordered by the bytes that they keep in flight."""
