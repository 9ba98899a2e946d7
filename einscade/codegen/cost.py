"""A model of what a schedule costs: what the loops of a program read and hold, and the time that takes.

Comes in: a nest, tile extents, a device, sizes. Goes out: whether the tiles fit on chip, and seconds. The model counts
operations over the matrix unit's rate, bytes over the memory's, masked work and a tile's overhead; it orders schedules
before anything compiles, and is not meant to predict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil, prod

import sympy
from sympy import Basic
from sympy.logic.boolalg import Boolean

from einscade.codegen.loops import LoopProgram, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.ir.analysis import BITS
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.device import Device
from einscade.ir.expr import Access, Expr, FloorDiv, accesses, free_vars, var
from einscade.passes.domains import is_data_dependent
from einscade.passes.fusion import is_long

__all__ = [
    "MOST_ROWS",
    "Lengths",
    "contractions",
    "cost",
    "crossed",
    "crossed_tiles",
    "few_rows",
    "fits",
    "heads_in_groups",
    "is_gathered",
    "moving_inputs",
    "narrow_steps",
    "promises_no_spills",
    "row_ranks",
    "shared_bytes",
    "step_bytes",
    "tile_symbols",
    "tiled_ranks",
]


def tile_symbols(program: LoopProgram) -> tuple[str, ...]:
    """The symbols that a schedule gives a value: the extents of the serial nests' tile ranks."""
    found: dict[str, None] = {}
    for nest in program.serial_nests:
        if nest.tile is not None and isinstance(extent := program.cascade.extent(nest.tile), sympy.Symbol):
            found[extent.name] = None
    return tuple(found)


def tiled_ranks(program: LoopProgram, lengths: Lengths) -> tuple[str, ...]:
    """Of each nest the grid rank that is tiled: one whose points share what the loop reads, so that a tile is read
    once for all of them, or at least what it multiplies (a mask or a bias is another for every point); the longest of
    those. None where no grid rank is long."""
    found: dict[str, None] = {}
    for nest in program.serial_nests:
        long = [r for r in nest.grid if is_long(program.cascade, r)]
        shared = ([r for r in long if r not in _ranks_of(reads)] for reads in (moving_inputs(nest), _multiplied(nest)))
        if long:
            found[max(next(filter(None, shared), long), key=lengths.rank)] = None
    return tuple(found)


def _ranks_of(reads: Iterable[tuple[str, tuple[Expr, ...]]]) -> frozenset[str]:
    return frozenset().union(*(free_vars(Access("_", *index)) for _, index in reads))


def crossed(cascade: Cascade, nest: SerialNest) -> tuple[str, ...]:
    """The two long grid ranks that meet in a nest's products, neither of them the loop's: rows and columns of its tile.
    Nothing for the nests whose products have rows alone in the grid."""
    for e in nest.einsums if nest.tile is None else ():
        sides = [[r for r in e.output.ranks if r in s & {*nest.grid} and is_long(cascade, r)] for s in e.sides]
        if sides and all(sides):
            return tuple(sorted((side[-1] for side in sides), key=e.output.ranks.index))
    return ()


def crossed_tiles(cascade: Cascade, nest: SerialNest) -> dict[str, int]:
    """Tiles of the `crossed` ranks, whatever a schedule says of them elsewhere: every value of the nest has a point for
    each pair, and what a step multiplies has to fit on chip with the next step's."""
    crossing = crossed(cascade, nest)
    point = 0  # bytes that one more row and one more column read
    for e in nest.einsums:
        if e.sides and e.reduce:
            width = prod(int(n) if (n := cascade.extent(r)).is_Integer else 64 for r in e.reduce.ranks)
            read = [a for a in accesses(e.expr) if free_vars(a) & {*e.reduce.ranks}]
            point += sum(_power(width) * _bytes(cascade.tensors[a.tensor].dtype) for a in read)
    tile = next((n for n in (64, 32) if n * point <= CROSSED_BYTES), 16)
    return dict.fromkeys(crossing, tile)


def moving_inputs(nest: SerialNest) -> tuple[tuple[str, tuple[Expr, ...]], ...]:
    """Inputs of the nest whose index moves with the loop, with that index."""
    return _moving(nest, (a for e in nest.body for a in e.reads))


def _multiplied(nest: SerialNest) -> tuple[tuple[str, tuple[Expr, ...]], ...]:
    """Those of them that the loop's products read."""
    return _moving(nest, (a for e in contractions(nest) for a in accesses(e.expr)))


def is_gathered(nest: SerialNest) -> bool:
    """Whether what the loop multiplies is read at an index that is read itself. Loads ahead then come in two steps: a
    stage of the pipeline is one for the index or one for what it names."""
    return any(i.has(Access) for _, index in _multiplied(nest) for i in index)


def _moving(nest: SerialNest, read: Iterable[Access]) -> tuple[tuple[str, tuple[Expr, ...]], ...]:
    reads = [a for a in read if a.tensor in nest.inputs]
    moves = {nest.serial, nest.tile}
    return tuple(dict.fromkeys((a.tensor, a.index) for a in reads if moves & free_vars(Access("_", *a.index))))


def row_ranks(cascade: Cascade, nest: SerialNest, tiles: Mapping[str, int]) -> tuple[str, ...]:
    """The grid ranks that a program of the nest has a tile of, the outermost of the box first: those with a tile. None
    where the points of a tile would share nothing that the loop reads, and each reads vectors of its own: a tile of
    them would be a batch of products with one row."""
    tiled = [r for r in nest.grid if r in tiles]
    if crossing := crossed(cascade, nest):
        return crossing[:1]
    moving = moving_inputs(nest)
    shared = any(var(r) not in index for _, index in moving for r in tiled)
    wide = any(len({*e.ranks} - {*nest.grid, nest.serial, nest.tile}) for e in nest.body)
    return tuple(reversed(tiled)) if shared or not wide else ()


def few_rows(program: LoopProgram, lengths: Lengths) -> dict[str, int] | None:
    """Tiles of grid ranks that together hold all points that share what the program's loop reads, if they are few: the
    positions (decoding has one), times the heads of a group. None where they fill tiles of their own, and where several
    loops share different things."""
    sharing = [n for n in program.serial_nests if row_ranks(program.cascade, n, dict.fromkeys(n.grid, 1))]
    if len(sharing) != 1 or not contractions(sharing[0]):
        return None
    nest = sharing[0]
    shared = _ranks_of(_multiplied(nest))
    rows = dict([heads]) if (heads := heads_in_groups(program.cascade, nest)) is not None else {}
    positions = max((r for r in nest.grid if r not in shared and r not in rows), key=lengths.rank, default=None)
    if positions is not None:
        rows[positions] = _power(lengths.rank(positions))
    return rows if rows and prod(rows.values()) <= MOST_ROWS else None


def narrow_steps(program: LoopProgram, lengths: Lengths, device: Device) -> dict[str, int]:
    """Tiles of the loops that read vectors for one point at a time (the merge of parts): as long as fit on
    chip, since nothing hides the time that a tile takes to come, and no longer than the loop."""
    found = {}
    most = min(8192, 1 << (device.shared // 16).bit_length() - 1)  # elements, of which four stages fit
    for nest in program.serial_nests:
        extent = program.cascade.extent(nest.tile) if nest.tile else None
        if extent is None or not extent.is_Symbol or row_ranks(program.cascade, nest, dict.fromkeys(nest.grid, 1)):
            continue
        inner = {r for e in nest.body for r in e.ranks} - {*nest.grid, nest.serial, nest.tile}
        width = max((lengths.rank(r) for r in inner), default=1)
        positions = lengths.rank(nest.serial, {extent.name: 1})
        found[extent.name] = max(16, min(64, most // _power(width), _power(positions)))
    return found


def heads_in_groups(cascade: Cascade, nest: SerialNest) -> tuple[str, int] | None:
    """The grid rank of which several points in a row share all that the loop multiplies, and how many: query heads that
    read a key head (`h // 4`), or all heads where there is one. None where every point has its own."""
    products = _multiplied(nest)
    found = []
    for r in nest.grid:
        extent = cascade.extent(r)
        uses = [_group(i, r) for _, index in products for i in index if r in free_vars(i)]
        sizes = {extent, *(n for n in uses if n is not None)}
        size = min(sizes, key=int) if products and extent.is_Integer and None not in uses else sympy.Integer(1)
        if size > 1 and all(n % size == 0 for n in sizes):
            found.append((r, int(size)))
    return max(found, key=lambda pair: pair[1], default=None)


def _group(index: Expr, rank: str) -> Expr | None:
    """c where the index is `rank // c`."""
    whole = isinstance(index, FloorDiv) and index.args[0] == var(rank) and index.args[1].is_Integer
    return index.args[1] if whole else None


MOST_ROWS = 128
"""A tile has no more rows than this."""


CROSSED_BYTES = 64 << 10
"""What a step of a nest with a tile of two grid ranks reads at most: three stages of it on Hopper, two on Ampere."""


class Lengths:
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
    return -(-BITS[dtype] // 8)


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def contractions(nest: SerialNest) -> list[Einsum]:
    """The sums of the loop's body, scans apart."""
    return [e for e in nest.body if e.reduce and e.reduce.monoid == "sum" and not e.scan]


def cost(cascade: Cascade, nest: SerialNest, schedule: Schedule, device: Device, lengths: Lengths) -> float | None:
    """Seconds by the model, or None where a tile does not fit on chip."""
    tiles = dict(schedule.tiles) if device.kind == "cpu" else _tiles_of(cascade, nest, schedule)
    if device.kind != "cpu" and not fits(cascade, nest, schedule, device, lengths):
        return None
    iterations = lengths.rank(nest.serial, tiles)
    programs = 1.0
    for r in nest.grid:
        whole = lengths.rank(r, tiles)
        tile = tiles.get(r) or (whole if device.kind == "cpu" else 1)
        programs *= ceil(whole / max(1, tile))
    work = 0.0  # multiply-adds of one iteration
    for e in contractions(nest):
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
    computing = waves * iterations * visited * (work / share + overhead)
    return computing if device.kind == "cpu" else max(computing, _reading(cascade, nest, programs, device, lengths))


def _reading(cascade: Cascade, nest: SerialNest, programs: float, device: Device, lengths: Lengths) -> float:
    """Seconds to bring what the loop reads from memory, once; few programs do not draw all of the bandwidth."""
    tensors = {name for name, _ in moving_inputs(nest)}
    total = sum(
        prod(lengths.rank(r) for r in cascade.tensors[n].ranks) * _bytes(cascade.tensors[n].dtype) for n in tensors
    )
    return total / (device.bandwidth * min(1.0, programs / device.processors))


def _tiles_of(cascade: Cascade, nest: SerialNest, schedule: Schedule) -> dict[str, int]:
    """The schedule's tiles, without those of grid ranks that this nest has no tiles of."""
    tiles = dict(schedule.tiles)
    rows = row_ranks(cascade, nest, tiles)
    kept = {r: n for r, n in tiles.items() if r in rows or r not in nest.grid}
    return kept | crossed_tiles(cascade, nest)


def _tile_points(
    cascade: Cascade, nest: SerialNest, rank: str, tiles: Mapping[str, int], lengths: Lengths, device: Device
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


def fits(cascade: Cascade, nest: SerialNest, schedule: Schedule, device: Device, lengths: Lengths) -> bool:
    """Shared memory for the pipelined tiles, registers for running values and the scores of one tile; and no product
    that warpgroups would cut too narrow."""
    tiles = _tiles_of(cascade, nest, schedule)
    if device.kind == "cuda" and device.capability[0] == 9 and _has_slivers(cascade, nest, schedule, lengths):
        return False

    def elements(ranks: tuple[str, ...]) -> int:
        return _elements(nest, ranks, tiles, lengths)

    shared = shared_bytes(cascade, nest, schedule, device, lengths)
    whole = max((elements(e.output.ranks) for e in nest.epilogue), default=0)  # what loops leave changes its layout
    if max(shared, 4 * whole) > device.shared:
        return False
    least = max(tiles.values(), default=1)  # what a row statistic has, which no matrix unit reads
    scans = sum(elements(e.output.ranks) for e in nest.scans)
    columns = {nest.tile, *crossed(cascade, nest)[1:]}
    scores = max((elements(e.output.ranks) for e in nest.body if columns & {*e.output.ranks}), default=0)
    made = [e.output.ranks for e in contractions(nest)]
    wide = sum(1 for ranks in made if columns & {*ranks} and elements(ranks) > _power(least))
    ranks_of = {(t, i): _box(cascade, i) for t, i in moving_inputs(nest)}
    multiplied = {a.tensor for e in contractions(nest) for a in e.reads}
    single = [
        r
        for (t, _), r in ranks_of.items()
        if t in multiplied and cascade.tensors[t].dtype == "f32" and elements(tuple(r)) > _power(least)
    ]
    if single:  # split into parts in registers before they multiply, or multiplied there
        parts = 4 if row_ranks(cascade, nest, dict(schedule.tiles)) else 1
        scores += parts * max(elements(tuple(r)) for r in single)
    if len(columns) == 1 and any(set(r) & set(nest.grid) & set(tiles) for r in ranks_of.values()):
        scores *= 3  # a mask or bias is read with an address of 64 bits for each score
    threads = schedule.warps * (64 if device.kind == "hip" else 32)
    registers = _REGISTERS.get((device.kind, device.capability[0]), 215)
    if any(is_data_dependent(e.domain) for e in nest.body):  # bounds that are data are computed and kept
        registers *= 0.8
    return (scans + scores * max(1, wide) * 1.75) / threads <= registers


def shared_bytes(cascade: Cascade, nest: SerialNest, schedule: Schedule, device: Device, lengths: Lengths) -> int:
    """Bytes of shared memory that a kernel needs while it loops, barriers apart (about 1 KiB), at most: the pipelined
    tiles, and what it keeps of what it reads once. Where warpgroups multiply, none of the stages is spare: then with
    room for points to change their layout in."""
    tiles = _tiles_of(cascade, nest, schedule)
    buffers = (schedule.stages + 1) // 2 if is_gathered(nest) else schedule.stages
    shared = buffers * step_bytes(cascade, nest, schedule, lengths)
    moving = moving_inputs(nest)
    read = dict.fromkeys((a.tensor, a.index) for e in nest.body for a in e.reads if a.tensor in nest.inputs)
    for tensor, index in read:
        if (tensor, index) not in moving and len(index) > 1:
            ranks = tuple(r for r in _box(cascade, index) if r in nest.grid or not is_long(cascade, r))
            shared += _elements(nest, ranks, tiles, lengths) * _bytes(cascade.tensors[tensor].dtype)
    rows = row_ranks(cascade, nest, tiles)
    if device.kind != "cuda" or device.capability[0] < 9 or _elements(nest, rows, tiles, lengths) < 64:
        return shared
    columns = (*([nest.tile] if nest.tile else []), *crossed(cascade, nest)[1:])
    points = _elements(nest, (*rows, *columns), tiles, lengths)
    joined = [x for x in _joined(nest) if free_vars(x) & {*rows} and free_vars(x) & {*columns}]
    return shared + points * max((_value_bytes(x) for x in joined), default=0)


def _joined(nest: SerialNest) -> Iterator[Basic]:
    """The largest parts of the loop's expressions that join several reads, and no value that it made. A kernel computes
    them in a layout of their own, and changes that to the products' where they meet."""
    made = {e.name for e in nest.body}

    def parts(expr: Basic) -> Iterator[Basic]:
        if not any(a.tensor in made for a in accesses(expr)):
            yield expr
        elif not isinstance(expr, Access):
            for x in expr.args:
                yield from parts(x)

    for e in nest.body:
        for x in (e.domain, *(sympy.Mul.make_args(e.expr) if e.reduce else (e.expr,))):
            yield from (part for part in parts(x) if len(accesses(part)) > 1)


def _value_bytes(expr: Basic) -> int:
    return 1 if isinstance(expr, Boolean) and not isinstance(expr, Access) else 4


def _has_slivers(cascade: Cascade, nest: SerialNest, schedule: Schedule, lengths: Lengths) -> bool:
    """Whether a warpgroup would have 8 columns of a product. Warpgroups beyond one for 64 rows divide the columns among
    themselves; an instruction for 8 of them reads shared memory that is not its own, or by a descriptor that the
    assembler has lost (triton-lang/triton issues 7830 and 10629; ptxas of CUDA 12.8)."""
    tiles = _tiles_of(cascade, nest, schedule)
    grid = row_ranks(cascade, nest, tiles)  # one dimension, of as many ranks as it has
    order = (*grid, *crossed(cascade, nest)[1:], nest.tile)  # of a product the first of these is the rows

    def along(dimension: tuple[str, ...]) -> tuple[int, int]:
        place = order.index(dimension[0]) if dimension[0] in order else len(order)
        return place, -_elements(nest, dimension, tiles, lengths)

    for e in nest.einsums:
        if e.reduce and e.reduce.monoid == "sum":
            rest = [r for r in e.output.ranks if r not in grid]
            dimensions = [tuple(r for r in e.output.ranks if r in grid), *((r,) for r in rest)]
            sides = [-n for _, n in sorted(along(d) for d in dimensions if d) if n < -1]
            if len(sides) == 2 and sides[0] >= 64 and max(16, sides[1]) < schedule.warps * 256 // sides[0]:
                return True
    return False


_REGISTERS: Mapping[tuple[str, int], float] = {("hip", 9): 472, ("cuda", 8): 160}
"""Registers of a thread for what `fits` counts: before Hopper the matrix unit's operands take registers too."""


def step_bytes(cascade: Cascade, nest: SerialNest, schedule: Schedule, lengths: Lengths) -> int:
    """Bytes that an iteration of the nest's loop reads."""
    tiles = _tiles_of(cascade, nest, schedule)
    return sum(
        _elements(nest, _box(cascade, index), tiles, lengths) * _bytes(cascade.tensors[tensor].dtype)
        for tensor, index in moving_inputs(nest)
    )


def _elements(nest: SerialNest, ranks: tuple[str, ...], tiles: Mapping[str, int], lengths: Lengths) -> int:
    """Places of a tile over these ranks: padded to powers of two, as they are held on a GPU."""
    n = 1
    for r in ranks:
        if r != nest.serial and (r not in nest.grid or r in tiles):
            n *= _power(tiles[r] if r in tiles else lengths.in_tile(nest, r, tiles))
    return n


def _box(cascade: Cascade, index: tuple[Expr, ...]) -> tuple[str, ...]:
    """The ranks along which a tile of this access extends; a group of heads reads one."""
    found: set[str] = set()
    for i in index:
        if not (isinstance(i, FloorDiv) and i.args[0].is_Symbol and i.args[1].is_Integer):
            found |= free_vars(i)
    return tuple(r for r in cascade.rank_table if r in found)


def promises_no_spills(program: LoopProgram) -> bool:
    """Whether the register model covers what the program does: products in half precision, and no gathered reads."""
    half = any(t.dtype in ("bf16", "f16") for t in program.cascade.inputs)
    gathered = any(i.has(Access) for nest in program.serial_nests for _, index in moving_inputs(nest) for i in index)
    return half and not gathered
