"""Products over two long ranks outside of any loop, whose points are used one by one: a kernel's tiles, not a matrix.

Comes in: a loop program with such products in a flat nest (the gradient of a bias that every head of every batch has
its own of: scores, weights, and what they give, all over queries and keys). Goes out: the program with a nest without
a loop in their place, whose prologue makes a tile of all that, so that only what is asked for goes to memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from einscade.codegen.cost import crossed
from einscade.codegen.loops import FlatNest, LoopProgram, Nest, SerialNest
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import var
from einscade.passes.fusion import is_long
from einscade.passes.tables import is_total

__all__ = ["paired"]


def paired(program: LoopProgram) -> LoopProgram:
    """The program with a nest for what its flat nests compute over pairs, if it can be one."""
    nests: list[Nest] = []
    for nest in program.nests:
        nests += _split(program.cascade, nest) if isinstance(nest, FlatNest) else [nest]
    return replace(program, nests=tuple(nests))


def _split(cascade: Cascade, flat: FlatNest) -> list[Nest]:
    """The flat nest without the statements over pairs, and those as a nest."""
    sums = [e for e in flat.einsums if all(any(is_long(cascade, r) for r in side) for side in e.sides) and e.sides]
    if not sums:
        return [flat]
    grid = sums[0].output.ranks
    made = {e.name: e for e in sums if e.output.ranks == grid}
    for e in flat.einsums:
        if e.reduce is None and not e.scan and e.output.ranks == grid and any(a.tensor in made for a in e.reads):
            made[e.name] = e
    members = [e for e in flat.einsums if e.name in made]
    after = _after(flat, made)
    rest = tuple(e for e in flat.einsums if e.name not in made and e not in after)
    summed = {a.tensor for e in after for a in e.reads}
    outputs = tuple(n for n in made if n in flat.outputs or n in summed)
    elsewhere = {n for n in outputs if made[n].reduce} or any(a.tensor in made for e in rest for a in e.reads)
    point = tuple(map(var, grid))
    if not outputs or elsewhere or any(a.index != point for e in members for a in e.reads if a.tensor in made):
        return [flat]
    reads = dict.fromkeys(a.tensor for e in members for a in e.reads if a.tensor not in made)
    nest = SerialNest(grid, "", None, tuple(members), (), (), tuple(reads), outputs)
    if not crossed(cascade, nest):
        return [flat]
    wanted = {*flat.outputs, *reads, *summed}
    found: list[Nest] = [nest]
    if rest:
        found.insert(0, replace(flat, einsums=rest, outputs=tuple(e.name for e in rest if e.name in wanted)))
    if after:
        own = {e.name for e in after}
        inputs = dict.fromkeys(a.tensor for e in after for a in e.reads if a.tensor not in own)
        found.append(FlatNest(after, tuple(inputs), tuple(n for n in flat.outputs if n in own)))
    return found


def _after(flat: FlatNest, made: Mapping[str, Einsum]) -> tuple[Einsum, ...]:
    """The sums by the entries of a table of what the pairs make (`triton_tables`), and what reads those."""
    found: dict[str, Einsum] = {}
    for e in flat.einsums:
        by_entry = is_total(e) and any(a.tensor in made for a in e.reads)
        if e.name not in made and (by_entry or any(a.tensor in found for a in e.reads)):
            found[e.name] = e
    return tuple(found.values())
