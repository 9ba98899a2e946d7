"""What tensors along a loop say of whole tiles, computed once for all programs: an estimator in front of a nest.

Comes in: a loop program and a schedule. Goes out: the program with, for every integer or boolean input that a nest's
domain reads along its loop and nowhere along its rows (document ids, padding masks), the least and greatest value of
each tile as Einsums of a flat nest:

    E_min[b,mt] = min(mu) E[b,Min(64*mt + mu, M - 1)]

(the last tile repeats the last element, which changes no minimum). A predicate on E over a tile is then one on two
numbers (`passes.restrict`); of a boolean, on whether all and any hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy

from einscade.codegen.loops import FlatNest, LoopProgram, Nest, SerialNest
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiles import tile_loop
from einscade.codegen.triton_rows import is_multiple
from einscade.ir.cascade import Cascade, Einsum, Rank, Reduction, Tensor
from einscade.ir.expr import Access, Expr, FloorDiv, accesses, ceil_div, free_vars, var

__all__ = ["summarised", "summary_of"]

_MONOIDS = {True: ("all", "any"), False: ("min", "max")}


def summarised(program: LoopProgram, schedule: Schedule) -> LoopProgram:
    """The program with summaries of the data that its loops' domains read, each nest with those it can use, if the
    schedule asks for them."""
    cascade = program.cascade
    if not schedule.summaries:
        return program
    nests: list[Nest] = []
    for nest in program.nests:
        if isinstance(nest, SerialNest):
            before = {e.name for e in cascade.body}
            cascade, names = _with_summaries(cascade, nest, schedule)
            if names:
                made = tuple(e for e in cascade.body if e.name not in before)
                if made:
                    reads = dict.fromkeys(a.tensor for e in made for a in e.reads)
                    nests.append(FlatNest(made, tuple(reads), tuple(e.name for e in made)))
                nest = replace(nest, inputs=(*nest.inputs, *names))
        nests.append(nest)
    return replace(program, cascade=cascade, nests=tuple(nests))


def _with_summaries(cascade: Cascade, nest: SerialNest, schedule: Schedule) -> tuple[Cascade, list[str]]:
    loop = tile_loop(cascade, nest, clip=False)
    names: list[str] = []
    step = loop.step.xreplace({var(s): sympy.Integer(n) for s, n in schedule.tiles})
    if loop.coordinate is None or not loop.skippable or not step.is_Integer:
        return cascade, names
    points = {r for r in nest.grid if schedule.tile(r) is None} | {nest.serial, *loop.coordinates}
    for a in accesses(loop.domain):
        tensor = cascade.tensors[a.tensor]
        place = _place(a, loop.coordinate, int(step), schedule.multiples)
        along_rows = free_vars(a) & {*cascade.rank_table} - points  # of the tile, or held whole
        whole = tensor.dtype == "bool" or tensor.dtype[0] in "iu"
        if place is None or along_rows or not whole or a.tensor not in {t.name for t in cascade.inputs}:
            continue
        if summary_of(cascade, a, loop.coordinate, int(step), schedule.multiples) is None:
            cascade = _summed_up(cascade, tensor, place[0], int(step))
        found = summary_of(cascade, a, loop.coordinate, int(step), schedule.multiples)
        assert found is not None
        names += [s.tensor for s in found]
    return cascade, list(dict.fromkeys(names))


def _place(access: Access, coordinate: str, step: int, multiples: Mapping[str, int]) -> tuple[int, Expr] | None:
    """Which index moves along the loop, and the number of the tile that it is in: where whole tiles of the loop are
    whole tiles of the tensor."""
    moving = [i for i, index in enumerate(access.index) if coordinate in free_vars(index)]
    if len(moving) != 1:
        return None
    rest = access.index[moving[0]] - var(coordinate)
    if rest.has(Access) or coordinate in free_vars(rest) or not is_multiple(rest, step, multiples):
        return None
    return moving[0], FloorDiv(var(f"{coordinate}_lo") + rest, sympy.Integer(step))


def _summed_up(cascade: Cascade, tensor: Tensor, place: int, step: int) -> Cascade:
    rank = tensor.ranks[place]
    tile, inner = cascade.fresh(f"{rank}t"), cascade.fresh(f"{rank}u")
    extent = cascade.extent(rank)
    cascade = cascade.replace(
        ranks=(*cascade.ranks, Rank(tile, ceil_div(extent, step)), Rank(inner, sympy.Integer(step)))
    )
    at = _clamped(tile, inner, step, extent)
    index = [at if i == place else var(r) for i, r in enumerate(tensor.ranks)]
    ranks = tuple(tile if i == place else r for i, r in enumerate(tensor.ranks))
    made = [
        Einsum(
            Tensor(cascade.fresh(f"{tensor.name}_{monoid}"), ranks, tensor.dtype),
            Access(tensor.name, *index),
            Reduction(monoid, (inner,)),
        )
        for monoid in _MONOIDS[tensor.dtype == "bool"]
    ]
    return cascade.replace(body=(*made, *cascade.body))


def _clamped(tile: str, inner: str, step: int, extent: Expr) -> Expr:
    return sympy.Min(step * var(tile) + var(inner), extent - 1)


def summary_of(
    cascade: Cascade, access: Access, coordinate: str | None, step: int, multiples: Mapping[str, int]
) -> tuple[Access, Access] | None:
    """Reads of an access's least and greatest value over the tile that begins at `{coordinate}_lo`, if the cascade has
    statements that compute them."""
    place = _place(access, coordinate, step, multiples) if coordinate is not None else None
    if place is None:
        return None
    at, number = place
    index = [number if i == at else x for i, x in enumerate(access.index)]
    found = []
    for monoid in _MONOIDS[cascade.tensors[access.tensor].dtype == "bool"]:
        for e in cascade.body:
            if e.reduce is not None and e.reduce.monoid == monoid and _sums_up(cascade, e, access.tensor, at, step):
                found.append(Access(e.name, *index))
                break
    return (found[0], found[1]) if len(found) == 2 else None


def _sums_up(cascade: Cascade, e: Einsum, tensor: str, at: int, step: int) -> bool:
    """Whether a statement reduces tiles of this length of a tensor's rank."""
    if not isinstance(e.expr, Access) or e.expr.tensor != tensor or e.reduce is None or len(e.reduce.ranks) != 1:
        return False
    inner = e.reduce.ranks[0]
    ranks = e.output.ranks
    index = e.expr.index
    return (
        cascade.extent(inner) == step
        and len(ranks) == len(index)
        and index[at] == _clamped(ranks[at], inner, step, cascade.extent(cascade.tensors[tensor].ranks[at]))
        and all(i == var(r) for n, (i, r) in enumerate(zip(index, ranks, strict=True)) if n != at)
    )
