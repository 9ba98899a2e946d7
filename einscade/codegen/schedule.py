"""Schedules: the tile sizes and launch parameters of a loop program, and which of them are worth trying.

Comes in: a `LoopProgram`, the `Device` it will run on, and the sizes it will run at. Goes out: `Schedule`s, best guess
first. The search space is `_cpu_space` or `_gpu_space`; what cannot fit on chip is dropped and the rest ordered by a
model of its time (operations over the matrix unit's rate, masked work and a tile's overhead included) before anything
compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil

import sympy

from einscade.codegen.loops import LoopProgram, SerialNest, is_long
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.device import Device
from einscade.ir.expr import Access, Expr, free_vars, var

__all__ = ["Schedule", "candidates", "has_descriptors", "promises_no_spills", "target_of", "tile_symbols"]


@dataclass(frozen=True)
class Schedule:
    """How a loop program runs.

    tiles: extents of tiles, by grid rank (`p`) or by the symbol of a serial tile (`M0`), as sorted pairs. A grid rank
        without one is a batch dimension (torch) or one point a program (Triton).
    warps, stages: a Triton program's warps, and the depth of its loop's software pipeline.
    out_order: for an output, its ranks in memory order, outermost first; outputs not named are in rank order.
    target: what the kernel is compiled for: "cuda:90", "hip:94", "cpu" (kind and compute capability).
    descriptors: read tiles through tensor descriptors (TMA) where strides allow.
    """

    tiles: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 2
    out_order: tuple[tuple[str, tuple[str, ...]], ...] = ()
    target: str = "cpu"
    descriptors: bool = False

    def tile(self, name: str) -> int | None:
        return dict(self.tiles).get(name)


def candidates(program: LoopProgram, device: Device, sizes: Mapping[str, int]) -> tuple[Schedule, ...]:
    """Schedules for the program on a device at these sizes, best guess first; at least one.

    `sizes` gives the cascade's length symbols; one that is missing counts as long.
    """
    lengths = _Lengths(program.cascade, sizes)
    space = (_cpu_space if device.kind == "cpu" else _gpu_space)(program, device, lengths)
    scored = []
    for schedule in space:
        costs = [_cost(program.cascade, nest, schedule, device, lengths) for nest in program.serial_nests]
        if all(c is not None for c in costs):
            scored.append((sum(c for c in costs if c is not None), schedule))
    scored.sort(key=lambda pair: pair[0])
    return tuple(s for _, s in scored) or (next(iter(space)),)


def target_of(device: Device) -> str:
    """A device as a schedule's target."""
    return "cpu" if device.kind == "cpu" else f"{device.kind}:{device.capability[0]}{device.capability[1]}"


def has_descriptors(device: Device) -> bool:
    """Whether the device's copy engine reads tiles through tensor descriptors."""
    return device.kind == "cuda" and device.capability >= (9, 0)


def tile_symbols(program: LoopProgram) -> tuple[str, ...]:
    """The symbols that a schedule gives a value: the extents of the serial nests' tile ranks."""
    found: dict[str, None] = {}
    for nest in program.serial_nests:
        if nest.tile is not None and isinstance(extent := program.cascade.extent(nest.tile), sympy.Symbol):
            found[extent.name] = None
    return tuple(found)


def tiled_ranks(program: LoopProgram, lengths: _Lengths) -> tuple[str, ...]:
    """Of each nest the grid rank that is tiled: one whose points share what the loop reads, so that a tile is read
    once for all of them; the longest of those. None where no grid rank is long."""
    found: dict[str, None] = {}
    for nest in program.serial_nests:
        long = [r for r in nest.grid if is_long(program.cascade, r)]
        moving = {r for t, index in moving_inputs(nest) for r in free_vars(Access("_", *index))}
        sharing = [r for r in long if r not in moving]
        if long:
            found[max(sharing or long, key=lengths.rank)] = None
    return tuple(found)


def moving_inputs(nest: SerialNest) -> tuple[tuple[str, tuple[Expr, ...]], ...]:
    """Inputs of the nest whose index moves with the loop, with that index."""
    reads = [a for e in nest.body for a in e.reads if a.tensor in nest.inputs]
    moves = {nest.serial, nest.tile}
    return tuple(dict.fromkeys((a.tensor, a.index) for a in reads if moves & free_vars(Access("_", *a.index))))


# -- the spaces -------------------------------------------------------------------------------------------------------


def _cpu_space(program: LoopProgram, device: Device, lengths: _Lengths) -> list[Schedule]:
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


def _gpu_space(program: LoopProgram, device: Device, lengths: _Lengths) -> list[Schedule]:
    symbols, ranks = tile_symbols(program), tiled_ranks(program, lengths)
    space = []
    for p, m, warps, stages in product((128, 64, 32, 16), (128, 64, 32, 16), (4, 8), (2, 3, 4)):
        tiles = {**dict.fromkeys(symbols, m), **dict.fromkeys(ranks, p)}
        space.append(
            Schedule(tuple(sorted(tiles.items())), warps, stages, (), target_of(device), has_descriptors(device))
        )
    return space


# -- the model --------------------------------------------------------------------------------------------------------


class _Lengths:
    """Extents as numbers; a symbol without a size counts as 4096."""

    def __init__(self, cascade: Cascade, sizes: Mapping[str, int]) -> None:
        self.cascade, self.sizes = cascade, sizes

    def number(self, expr: Expr, tiles: Mapping[str, int]) -> int:
        known = {var(n): sympy.Integer(v) for n, v in {**self.sizes, **tiles}.items()}
        expr = expr.xreplace(known)
        expr = expr.xreplace({s: sympy.Integer(4096) for s in expr.free_symbols})
        return max(0, int(expr))

    def rank(self, rank: str, tiles: Mapping[str, int] | None = None) -> int:
        return self.number(self.cascade.extent(rank), tiles or {})

    def in_tile(self, nest: SerialNest, rank: str, tiles: Mapping[str, int]) -> int:
        if rank == nest.serial:
            return 1
        whole = self.rank(rank, tiles)
        return min(whole, tiles[rank]) if rank in tiles and rank in nest.grid else whole

    def points(self, nest: SerialNest, tiles: Mapping[str, int]) -> int:
        """The largest value of the loop: elements of a tile over all of its ranks."""
        most = 1
        for e in nest.body:
            n = 1
            for r in e.output.ranks:
                n *= self.in_tile(nest, r, tiles)
            most = max(most, n)
        return most


def _bytes(dtype: str) -> int:
    return {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2}.get(dtype, 1)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _contractions(nest: SerialNest) -> list[Einsum]:
    return [e for e in nest.body if e.reduce and e.reduce.monoid == "sum" and not e.scan]


def _cost(cascade: Cascade, nest: SerialNest, schedule: Schedule, device: Device, lengths: _Lengths) -> float | None:
    """Seconds by the model, or None where a tile does not fit on chip."""
    tiles = dict(schedule.tiles)
    if device.kind != "cpu" and not _fits(cascade, nest, schedule, device, lengths):
        return None
    iterations = lengths.rank(nest.serial, tiles)
    programs = 1.0
    for r in nest.grid:
        whole = lengths.rank(r, tiles)
        tile = tiles.get(r) or (whole if device.kind == "cpu" else 1)
        programs *= ceil(whole / max(1, tile))
    work = 0.0  # multiply-adds of one iteration
    for e in _contractions(nest):
        n = 1.0
        for r in e.ranks:
            n *= _tile_points(cascade, nest, r, tiles, lengths, device)
        work += n
    visited = 1.0
    if _has_edge(nest):  # half of the tiles, and those across the edge in full
        rows = max((tiles[r] for r in nest.grid if r in tiles and is_long(cascade, r)), default=1)
        step = lengths.rank(nest.tile, tiles) if nest.tile else 1
        columns = 0 if device.kind == "cpu" else step  # the torch emitter cuts the last tile short
        visited = min(1.0, 0.5 + 0.5 * (rows + columns) / max(1, iterations * step))
    waves = ceil(programs / device.processors) if device.kind != "cpu" else programs
    dtype = next((t.dtype for t in cascade.inputs if t.dtype[0] in "fb" and t.dtype != "bool"), "f32")
    rate = device.matrix_rate(dtype) / 2 * _efficiency(nest, schedule, device)
    share = rate / device.processors if device.kind != "cpu" else rate
    overhead = 1e-4 if device.kind == "cpu" else 3e-7
    return waves * iterations * visited * (work / share + overhead)


def _tile_points(
    cascade: Cascade, nest: SerialNest, rank: str, tiles: Mapping[str, int], lengths: _Lengths, device: Device
) -> int:
    if device.kind != "cpu" and rank in nest.grid:
        return tiles.get(rank, 1)
    return lengths.in_tile(nest, rank, tiles)


def _has_edge(nest: SerialNest) -> bool:
    """Whether the domain compares a grid rank with the loop's."""
    return any(
        set(nest.grid) & free_vars(c) and nest.serial in free_vars(c)
        for e in nest.body
        for c in sympy.And.make_args(e.domain)
    )


def _efficiency(nest: SerialNest, schedule: Schedule, device: Device) -> float:
    """The part of the matrix unit's rate that tiles of this shape reach: small ones reload operands, warps without 16
    rows each idle, two stages do not cover a load. Fitted to causal attention of width 128 on an H200."""
    if device.kind == "cpu":
        return 1.0
    sizes = list(dict(schedule.tiles).values())
    least, most = min(sizes, default=64), max(sizes, default=64)
    shape = 0.55 + 0.35 * (least >= 64) + 0.05 * (most >= 128) + 0.05 * (least >= 128)
    rows = min((n for r, n in schedule.tiles if r in nest.grid), default=0)
    idle = 0.65 if rows < 16 * schedule.warps else 1.0
    return shape * idle * {2: 0.92, 3: 1.0}.get(schedule.stages, 0.97)


def _fits(cascade: Cascade, nest: SerialNest, schedule: Schedule, device: Device, lengths: _Lengths) -> bool:
    """Shared memory for the pipelined tiles, registers for running values and the scores of one tile."""
    tiles = dict(schedule.tiles)

    def elements(ranks: tuple[str, ...]) -> int:
        n = 1
        for r in ranks:
            if r == nest.serial or (r in nest.grid and r not in tiles):
                continue
            n *= _power(tiles[r] if r in tiles else lengths.in_tile(nest, r, tiles))
        return n

    shared = 0
    moving = moving_inputs(nest)
    for tensor, index in moving:
        ranks = tuple(dict.fromkeys(r for r in cascade.rank_table if r in free_vars(Access("_", *index))))
        shared += schedule.stages * elements(ranks) * _bytes(cascade.tensors[tensor].dtype)
    read = dict.fromkeys((a.tensor, a.index) for e in nest.body for a in e.reads if a.tensor in nest.inputs)
    for tensor, index in read:
        if (tensor, index) not in moving and len(index) > 1:
            ranks = tuple(r for r in cascade.rank_table if r in free_vars(Access("_", *index)))
            kept = elements(tuple(r for r in ranks if r in nest.grid or not is_long(cascade, r)))
            shared += kept * _bytes(cascade.tensors[tensor].dtype)
    if shared > device.shared:
        return False
    least = max(tiles.values(), default=1)  # what a row statistic has, which no matrix unit reads
    scans = sum(elements(e.output.ranks) for e in nest.scans)
    scores = max((elements(e.output.ranks) for e in nest.body if nest.tile in e.output.ranks), default=0)
    wide = sum(1 for e in _contractions(nest) if nest.tile in e.output.ranks)
    ranks_of = {(t, i): [r for r in cascade.rank_table if r in free_vars(Access("_", *i))] for t, i in moving}
    multiplied = {a.tensor for e in _contractions(nest) for a in e.reads}
    single = [
        r
        for (t, _), r in ranks_of.items()
        if t in multiplied and cascade.tensors[t].dtype == "f32" and elements(tuple(r)) > _power(least)
    ]
    if single:  # split into parts in registers before they multiply
        scores += 4 * max(elements(tuple(r)) for r in single)
    if any(set(r) & set(nest.grid) & set(tiles) for r in ranks_of.values()):
        scores *= 3  # a mask or bias is read with an address of 64 bits for each score
    threads = schedule.warps * (64 if device.kind == "hip" else 32)
    return (scans + scores * max(1, wide) * 1.75) / threads <= (472 if device.kind == "hip" else 215)


def promises_no_spills(program: LoopProgram) -> bool:
    """Whether the register model covers what the program does: products in half precision, and no gathered reads."""
    half = any(t.dtype in ("bf16", "f16") for t in program.cascade.inputs)
    gathered = any(i.has(Access) for nest in program.serial_nests for _, index in moving_inputs(nest) for i in index)
    return half and not gathered
