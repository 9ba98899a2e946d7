"""Sums by entry of what a kernel's tiles hold: the gradient of a table that pairs of positions index.

Comes in: a loop program in which flat statements sum what a nest with a tile of two grid ranks makes, point by point,
by an index (`passes.tables`). Goes out: the program with these sums as `totals` of that nest, and for one of them the
kernel's code: a tile adds what it has of each entry to memory.

Where a tile has few entries (buckets of distances are wide, and most of a table's range is far from most tiles), each
is summed in registers, and added once. Else every point is added by itself: neighbours then have different entries, and
go to memory side by side. Either way the order of the additions is not fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import sympy

from einscade.codegen.cost import crossed
from einscade.codegen.loops import FlatNest, LoopProgram, Nest, SerialNest
from einscade.codegen.source import Unsupported
from einscade.codegen.triton_values import Value, align, aligned, value
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Access, Expr, var
from einscade.ir.text import print_einsum
from einscade.passes.existence import existence
from einscade.passes.fusion import is_long
from einscade.passes.tables import entries, is_total
from einscade.passes.terms import conjuncts

if TYPE_CHECKING:
    from einscade.codegen.triton_tile import TileWriter

__all__ = ["totalled", "write_total"]

MOST_SUMMED = 32
"""So many entries of a tile are summed one by one, each over all of the tile."""


def totalled(program: LoopProgram) -> LoopProgram:
    """The program with sums by entry as part of the nests whose values they sum. Raises `Unsupported` where one sums
    pairs that would have to be stored."""
    cascade, nests = program.cascade, list(program.nests)
    totals = [e for nest in nests if isinstance(nest, FlatNest) for e in nest.einsums if is_total(e)]
    for e in totals:
        assert isinstance(e.expr, Access)
        summed = e.expr.tensor
        if summed not in cascade.definitions or sum(is_long(cascade, r) for r in cascade.tensors[summed].ranks) < 2:
            continue
        maker = next((n for n in nests if isinstance(n, SerialNest) and summed in n.outputs), None)
        read = {a.tensor for x in cascade.body if x != e for a in x.reads} | {*cascade.outputs}
        if maker is None or summed in read or not _fits(cascade, maker, e):
            raise Unsupported(f"{e.name} sums {summed} by entries, which would have to be stored")
        outputs = (*(o for o in maker.outputs if o != summed), e.name)
        inputs = tuple(dict.fromkeys((*maker.inputs, *(a.tensor for a in e.reads if a != e.expr))))
        nests[nests.index(maker)] = replace(maker, inputs=inputs, outputs=outputs, totals=(*maker.totals, e))
    moved = {e.name for n in nests if isinstance(n, SerialNest) for e in n.totals}
    return replace(program, nests=tuple(left for n in nests if (left := _without(n, moved)) is not None))


def _without(nest: Nest, moved: set[str]) -> Nest | None:
    """The nest without the statements that went to others."""
    if isinstance(nest, SerialNest) or not moved & {e.name for e in nest.einsums}:
        return nest
    kept = tuple(e for e in nest.einsums if e.name not in moved)
    made = {e.name for e in kept}
    inputs = dict.fromkeys(a.tensor for e in kept for a in e.reads if a.tensor not in made)
    return FlatNest(kept, tuple(inputs), tuple(o for o in nest.outputs if o in made)) if kept else None


def _fits(cascade: Cascade, nest: SerialNest, e: Einsum) -> bool:
    """Whether a tile has all points of two ranks that are summed, and an entry for each."""
    made = next((x for x in (*nest.prologue, *nest.epilogue) if x.output() == e.expr), None)
    pair, table = crossed(cascade, nest), entries(e.domain, e.output.ranks)
    if made is None or not pair or {*made.output.ranks} != {*nest.grid} or {*pair} & {*e.output.ranks}:
        return False
    double = any(cascade.tensors[t].dtype == "f64" for t in nest.inputs)
    return {*e.output.ranks} - {*table} <= {*nest.grid} and cascade.tensors[e.name].dtype == "f32" and not double


def write_total(w: TileWriter, e: Einsum) -> None:
    """Code that adds a tile's points to the sums by entry that they belong to."""
    here, scope = w.here, w.scope
    here(f"# {print_einsum(e)}")
    points = existence(w.cascade).points[e.name]
    table = entries(points, e.output.ranks)
    dims = (*((w.rows.dim,) if w.rows else ()), *w.columns)

    def whole(v: Value) -> str:
        return v.code if v.ranks == dims else f"tl.broadcast_to({align(v, dims)}, {w.shape(dims)})"

    limits = [(b.dim, f"{b.index} < {b.limit}") for b in scope.blocks.values() if b.dim in dims and b.limit is not None]
    conditions = [align(Value(f"({code})", (dim,)), dims) for dim, code in limits]
    for c in conjuncts(points):
        if not (isinstance(c, sympy.Eq) and {*map(var, table)} & {*c.args}):
            conditions.append(aligned(value(c, scope), dims).tight())
    place = ""
    for number, (r, index) in enumerate(table.items()):
        v, extent = w.named(index, value(index, scope), False), w.host(w.cascade.extent(r))
        own = f"{e.name}_entry{number or ''}"
        here(f"{own} = {whole(Value(f'({v.code}).to(tl.int32)', v.ranks))}")
        conditions += [f"({own} >= 0)", f"({own} < {extent})"]
        place = f"({place}) * {extent} + {own}" if place else own
    there, first, last = (f"{e.name}_{x}" for x in ("there", "first", "last"))
    if len(table) > 1:
        here(f"{e.name}_place = {place}")
        place = f"{e.name}_place"
    here(f"{there} = {' & '.join(conditions)}")
    here(f"{first} = tl.min(tl.where({there}, {place}, {2**31 - 1}))")
    here(f"{last} = tl.max(tl.where({there}, {place}, -1))")
    strides = dict(zip(e.output.ranks, scope.memory[e.name].strides, strict=True))
    at = [f"{r}.to(tl.int64) * {stride}" for r, stride in strides.items() if r not in table]
    here(f"{e.name}_at = {' + '.join([scope.memory[e.name].pointer, *at])}")
    made = whole(value(e.expr, scope))
    here(f"if {last} - {first} < {MOST_SUMMED}:")
    here(f"    for entry in range({first}, {last} + 1):")
    here(f"        {e.name}_sum = tl.sum(tl.where({there} & ({place} == entry), {made}, 0.0))")
    here(f'        tl.atomic_add({e.name}_at + {_offset(w, table, strides, "entry")}, {e.name}_sum, sem="relaxed")')
    here("else:")
    offset = _offset(w, table, strides, place)
    here(f'    tl.atomic_add({e.name}_at + {offset}, {made}, mask={there}, sem="relaxed")')


def _offset(w: TileWriter, table: Mapping[str, Expr], strides: Mapping[str, str], place: str) -> str:
    """Where an entry lies in memory, by its number among all of the table's."""
    terms: list[str] = []
    for r in reversed(tuple(table)):
        extent = w.host(w.cascade.extent(r))
        whole = r == next(iter(table))
        terms.insert(0, f"{place} * {strides[r]}" if whole else f"{place} % ({extent}) * {strides[r]}")
        place = f"({place} // ({extent}))"
    return " + ".join(terms)
