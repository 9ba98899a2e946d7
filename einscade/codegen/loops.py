"""Loop programs: which Einsums share a loop, and what runs before, in and after it.

Comes in: a verified cascade. Goes out: a `LoopProgram`, the cascade's statements arranged in *nests*, in order:

* a `SerialNest` is one loop along a serial rank `t` (the rank that scans run along), repeated for every point of its
  grid ranks, which are independent of each other and may be tiled. The tile rank `u` is the other part of the rank
  that was split (`m -> m1, m0`). `prologue` runs before the loop, `body` once an iteration, `epilogue` after it.
* a `FlatNest` runs its Einsums one after another, each whole.

A cascade without scans is a single flat nest. A tensor that one nest writes and another reads is
materialised; everything else lives inside a nest, a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.codegen.source import Unsupported
from einscade.ir.cascade import Cascade, Einsum, Tensor
from einscade.ir.expr import Access, accesses, free_vars, var
from einscade.passes.existence import existence, narrowed
from einscade.passes.fusion import is_long
from einscade.passes.terms import conjuncts
from einscade.passes.views import Views, output_views

__all__ = ["FlatNest", "LoopProgram", "Nest", "SerialNest", "plan"]

@dataclass(frozen=True)
class SerialNest:
    """A loop along `serial` for every point of `grid`. `inputs` are read from memory, `outputs` are written to it.
    `totals` are sums over the points of the grid, of values that the nest makes: all of its programs add to them."""

    grid: tuple[str, ...]
    serial: str
    tile: str | None
    prologue: tuple[Einsum, ...]
    body: tuple[Einsum, ...]
    epilogue: tuple[Einsum, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    totals: tuple[Einsum, ...] = ()

    @cached_property
    def einsums(self) -> tuple[Einsum, ...]:
        return self.prologue + self.body + self.epilogue

    @cached_property
    def scans(self) -> tuple[Einsum, ...]:
        return tuple(e for e in self.body if e.scan)


@dataclass(frozen=True)
class FlatNest:
    """Einsums that run whole, in order."""

    einsums: tuple[Einsum, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


Nest = SerialNest | FlatNest


@dataclass(frozen=True)
class LoopProgram:
    """`cascade` (with the copies that materialise a loop's last values, if any were needed) and its nests in order.
    `views`: the outputs of which several ranks are one of the result."""

    cascade: Cascade
    nests: tuple[Nest, ...]
    views: Views = field(default_factory=dict, compare=False)

    @cached_property
    def serial_nests(self) -> tuple[SerialNest, ...]:
        return tuple(n for n in self.nests if isinstance(n, SerialNest))


def plan(cascade: Cascade) -> LoopProgram:
    """Arrange a verified cascade into nests. Raises Unsupported where loops need each other's results."""
    cascade, views = output_views(cascade)
    cascade = _materialise_last(_materialise_existence(cascade))
    loops = _loops(cascade)
    owner: dict[str, list[int]] = {}
    nests: list[SerialNest] = []
    for serial, names in loops:
        after_others = {e.name for nest in nests for e in nest.epilogue}
        nest = _serial_nest(cascade, serial, names, _elsewhere(loops, names) | after_others)
        for e in nest.einsums:
            owner.setdefault(e.name, []).append(len(nests))
        nests.append(nest)
    try:
        return LoopProgram(cascade, _order(cascade, _stored_once(cascade, nests), owner), views)
    except nx.NetworkXUnfeasible as cycle:
        raise Unsupported("two loops that each need a result of the other") from cycle


def _stored_once(cascade: Cascade, nests: list[SerialNest]) -> list[SerialNest]:
    """The nests with only those outputs that someone reads who does not make them again, each from the first maker."""
    made = {e.name for nest in nests for e in nest.einsums}
    wanted = {*cascade.outputs, *_reads(e for e in cascade.body if e.name not in made)}
    wanted |= {name for nest in nests for name in nest.inputs}
    result: list[SerialNest] = []
    for nest in nests:
        outputs = tuple(name for name in nest.outputs if name in wanted)
        wanted -= {*outputs}
        result.append(replace(nest, outputs=outputs))
    return result


def flat(cascade: Cascade) -> LoopProgram:
    """The plan that runs every Einsum whole, in order: quadratic memory, but differentiable by autograd."""
    inputs = _reads(cascade.body) & {t.name for t in cascade.inputs}
    nest = FlatNest(cascade.body, _in_order(cascade, inputs), tuple(o for o in cascade.outputs if o not in inputs))
    return LoopProgram(cascade, (nest,) if cascade.body else ())


# -- which Einsums belong to which loop -------------------------------------------------------------------------------


def _serial_ranks(cascade: Cascade) -> tuple[str, ...]:
    return tuple(dict.fromkeys(e.scan.rank for e in cascade.body if e.scan))


def _position(cascade: Cascade, tensor: str, rank: str) -> int | None:
    ranks = cascade.tensors[tensor].ranks
    return ranks.index(rank) if rank in ranks else None


def _in_step(cascade: Cascade, access: Access, serial: str) -> bool:
    """Whether a read of a tensor with the serial rank is of this iteration's (or the previous one's) value."""
    position = _position(cascade, access.tensor, serial)
    return position is not None and access.index[position] in (var(serial), var(serial) - 1)


def _levels(cascade: Cascade, serial: str) -> dict[str, int]:
    """For every Einsum, how many whole traversals along `serial` must have ended before it can run.

    This is the pass count of FuseMax (arXiv 2406.10491) along one rank: reading a tensor of the loop anywhere but at
    the current iteration, or reducing over the rank, needs the traversal that made it to be complete.
    """
    levels: dict[str, int] = {}
    for e in cascade.body:
        level = 0
        reduced = e.reduce is not None and serial in e.reduce.ranks
        for a in e.reads:
            if a.tensor not in levels or a.tensor == e.name:
                continue
            whole = _position(cascade, a.tensor, serial) is not None and (
                reduced or not _in_step(cascade, a, serial) or serial not in e.ranks
            )
            level = max(level, levels[a.tensor] + whole)
        levels[e.name] = level
    return levels


def _loops(cascade: Cascade) -> list[tuple[str, frozenset[str]]]:
    """Every loop as its serial rank and the names of its body's Einsums, in the order of their first scan.

    Scans along one rank and of one level share a loop where they have the same independent ranks, or where one reads
    another, or where both need a statement that is made for each of the ranks that both have (the weights, for the
    gradients of keys and values, whose widths differ); so two softmaxes over the same keys are one loop, and unrelated
    traversals stay apart.
    """
    loops: list[tuple[str, frozenset[str]]] = []
    for serial in _serial_ranks(cascade):
        levels = _levels(cascade, serial)
        scans = [e for e in cascade.body if e.scan and e.scan.rank == serial]
        for level in sorted({levels[e.name] for e in scans}):
            members = [e.name for e in scans if levels[e.name] == level]
            bodies = {name: _body(cascade, serial, levels, name) for name in members}
            graph = nx.Graph()
            graph.add_nodes_from(members)
            for i, a in enumerate(members):
                for b in members[i + 1 :]:
                    shared = bodies[a] & bodies[b]
                    rows = _independent(cascade, a, serial) & _independent(cascade, b, serial)
                    alike = rows == _independent(cascade, a, serial) | _independent(cascade, b, serial)
                    common = rows and any(rows <= set(cascade.tensors[name].ranks) for name in shared)
                    if alike or common or shared & set(members):
                        graph.add_edge(a, b)
            for component in nx.connected_components(graph):
                loops.append((serial, frozenset().union(*(bodies[name] for name in component))))
    position = {e.name: i for i, e in enumerate(cascade.body)}
    return sorted(loops, key=lambda loop: min(position[name] for name in loop[1]))


def _independent(cascade: Cascade, scan: str, serial: str) -> frozenset[str]:
    return frozenset(r for r in cascade.tensors[scan].ranks if r != serial and is_long(cascade, r))


def _body(cascade: Cascade, serial: str, levels: Mapping[str, int], scan: str) -> frozenset[str]:
    """The Einsums of one level that a scan reads in step with its loop, and those that read it in step."""
    same = {e.name for e in cascade.body if serial in e.output.ranks and levels[e.name] == levels[scan]}
    graph = nx.DiGraph()
    graph.add_nodes_from(same)
    for name in same:
        for a in cascade.definitions[name].reads:
            if a.tensor in same and a.tensor != name and _in_step(cascade, a, serial):
                graph.add_edge(a.tensor, name)
    after = nx.descendants(graph, scan) | {scan}
    names = set(after)
    for name in after:
        names |= nx.ancestors(graph, name)
    return frozenset(names)


def _tile_rank(cascade: Cascade, serial: str, body: Iterable[Einsum]) -> str | None:
    """The other part of the split rank: the one reduced, or else made, inside the loop."""
    origin = cascade.rank_table[serial].origin
    if origin is None:
        return None
    parts = [r.name for r in cascade.ranks if r.origin == origin and r.name != serial]
    used = [r for e in body for r in e.ranks]
    return next((r for r in dict.fromkeys(used) if r in parts), None)


# -- one loop's nest --------------------------------------------------------------------------------------------------


def _elsewhere(loops: Iterable[tuple[str, frozenset[str]]], names: frozenset[str]) -> frozenset[str]:
    """The Einsums in the bodies of the other loops: never made again as part of this one's nest."""
    return frozenset().union(*(other for _, other in loops)) - names


def _serial_nest(cascade: Cascade, serial: str, names: frozenset[str], elsewhere: frozenset[str]) -> SerialNest:
    body = [e for e in cascade.body if e.name in names]
    tile = _tile_rank(cascade, serial, body)
    grid = _grid(cascade, serial, tile, body)
    long_grid = {r for r in grid if is_long(cascade, r)}
    if long_grid:  # a contraction that no grid tile shares would be repeated for every one of them: run it once, whole
        repeated = {e.name for e in body if e.reduce and not e.scan and not long_grid & set(e.output.ranks)}
        inside = {a.tensor for e in body for a in e.reads}
        body = [e for e in body if e.name not in repeated or not inside or _reads_any(e, names)]
    epilogue = _epilogue(cascade, serial, tile, grid, body, elsewhere)
    prologue = _prologue(cascade, grid, long_grid, body, epilogue, elsewhere)
    members = {e.name for e in (*prologue, *body, *epilogue)}
    made = {e.name: e for e in (*prologue, *body, *epilogue)}
    read_outside = _reads(e for e in cascade.body if e.name not in members) | set(cascade.outputs)
    return SerialNest(
        grid,
        serial,
        tile,
        tuple(prologue),
        tuple(body),
        tuple(epilogue),
        inputs=_in_order(cascade, _reads(made.values()) - members),
        outputs=tuple(name for name in made if name in read_outside),
    )


def _reads(einsums: Iterable[Einsum]) -> set[str]:
    return {a.tensor for e in einsums for a in e.reads}


def _reads_any(e: Einsum, names: Iterable[str]) -> bool:
    return bool({a.tensor for a in e.reads} & set(names))


def _in_order(cascade: Cascade, names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in cascade.tensors if name in names)


def _aligned(cascade: Cascade, access: Access, rank: str) -> bool:
    position = _position(cascade, access.tensor, rank)
    return position is None or access.index[position] == var(rank)


def _grid(cascade: Cascade, serial: str, tile: str | None, body: list[Einsum]) -> tuple[str, ...]:
    """The ranks whose points run independently: every running value has them, nothing inside reduces over them or
    reads across them, and no statement shared by their points (the scores, for a value's width) lacks them."""
    names = {e.name for e in body}
    read_outside = _reads(e for e in cascade.body if e.name not in names) | set(cascade.outputs)
    carried = [e for e in body if e.scan or (e.name in read_outside and not e.scan)]
    grid = [r for r in carried[0].output.ranks if r not in (serial, tile)]
    grid = [r for r in grid if all(r in e.output.ranks for e in carried)]
    reduced = {r for e in body if e.reduce for r in e.reduce.ranks}
    grid = [r for r in grid if r not in reduced]
    local = [a for e in body for a in e.reads if a.tensor in names]
    grid = [r for r in grid if all(_aligned(cascade, a, r) for a in local)]
    long = {r for r in grid if is_long(cascade, r)}
    shared = [e for e in body if long <= set(e.output.ranks)]
    return tuple(r for r in grid if r in long or cascade.extent(r) == 1 or all(r in e.output.ranks for e in shared))


def _epilogue(
    cascade: Cascade,
    serial: str,
    tile: str | None,
    grid: tuple[str, ...],
    body: list[Einsum],
    elsewhere: frozenset[str],
) -> list[Einsum]:
    """What can follow the loop on the same tile: statements over the grid that read its last values, and those alone
    or with tensors that do not wait for anything else made from this loop."""
    inside = {e.name for e in body}
    found: list[Einsum] = []
    waits = set(inside)  # everything downstream of the loop
    for e in cascade.body:
        if e.name in inside:
            continue
        from_loop = [a for a in e.reads if a.tensor in waits]
        if not from_loop:
            continue
        waits.add(e.name)
        members = inside | {f.name for f in found}
        fits = (
            serial not in e.ranks
            and tile not in e.ranks
            and e.name not in elsewhere
            and not e.scan
            and set(grid) <= set(e.output.ranks)
            and all(a.tensor in members for a in from_loop)
            and all(_aligned(cascade, a, r) for a in from_loop for r in grid)
            and all(_reads_last(cascade, a, serial) for a in from_loop if a.tensor in inside)
            and not (e.reduce and e.reduce.monoid == "topk")
        )
        if fits:
            found.append(e)
    return found


def _reads_last(cascade: Cascade, access: Access, serial: str) -> bool:
    position = _position(cascade, access.tensor, serial)
    if position is None or not (cascade.definitions[access.tensor].scan):
        return False
    return access.index[position] == cascade.extent(serial) - 1


def _prologue(
    cascade: Cascade,
    grid: tuple[str, ...],
    long_grid: set[str],
    body: list[Einsum],
    epilogue: list[Einsum],
    elsewhere: frozenset[str],
) -> list[Einsum]:
    """What only this loop reads and a grid tile can make for itself, another loop's running values not among it."""
    members = {e.name for e in (*body, *epilogue)}
    found: list[Einsum] = []
    if not long_grid:
        return found
    for e in reversed(cascade.body):
        users = list(cascade.users(e.name))
        fits = (
            e.name not in members
            and e.name not in cascade.outputs
            and not e.scan
            and not (e.reduce and e.reduce.monoid == "topk")
            and users
            and all(u.name in members for u in users)
            and long_grid <= set(e.output.ranks)
            and not any(is_long(cascade, r) for r in e.ranks if r not in grid)
            and all(_aligned(cascade, a, r) for u in users for a in u.reads if a.tensor == e.name for r in grid)
            and all(a.tensor not in members and a.tensor not in elsewhere for a in e.reads)
            and e.name not in elsewhere
        )
        if fits:
            found.insert(0, e)
            members.add(e.name)
    return found


# -- between the nests ------------------------------------------------------------------------------------------------


def _materialise_last(cascade: Cascade) -> Cascade:
    """Reads of a scan's last value from statements that are no epilogue go through a copy, so that only the last value
    is written to memory. (A copy that an epilogue could have done itself stays unused by it and is not made.)"""
    for serial in _serial_ranks(cascade):
        last = cascade.extent(serial) - 1
        loops = _loops(cascade)
        for names in [n for s, n in loops if s == serial]:
            nest = _serial_nest(cascade, serial, names, _elsewhere(loops, names))
            members = {e.name for e in nest.einsums}
            for scan in nest.scans:
                position = scan.output.ranks.index(serial)
                outside = [e for e in cascade.users(scan.name) if e.name not in members]
                reads = [a for e in outside for a in e.reads if a.tensor == scan.name]
                if not reads or any(a.index[position] != last for a in reads):
                    continue
                cascade = _copy_last(cascade, scan, position, {e.name for e in outside})
    return cascade


def _materialise_existence(cascade: Cascade) -> Cascade:
    """Whether a loop's result exists may depend on the loop's values (a row without keys: `if Z != 0`). Where such a
    result is read outside the loop, its existence goes there as a boolean tensor beside it."""
    loops = _loops(cascade)
    for serial, names in loops:
        nest = _serial_nest(cascade, serial, names, _elsewhere(loops, names))
        members = {e.name for e in nest.einsums}
        for e in nest.epilogue:
            inside = [c for c in conjuncts(e.domain) if any(a.tensor in members for a in accesses(c))]
            downstream = _downstream(cascade, e.name)
            if inside and downstream - members:
                cascade = _flagged(cascade, e.name, And(*inside), downstream - members)
    return cascade


def _downstream(cascade: Cascade, name: str) -> set[str]:
    found = {name}
    for e in cascade.body:
        if any(a.tensor in found for a in e.reads):
            found.add(e.name)
    return found - {name}


def _flagged(cascade: Cascade, name: str, condition: Boolean, outside: set[str]) -> Cascade:
    """The condition of a statement's domain as a tensor, which the statement and those outside read in its stead."""
    made = cascade.definitions[name]
    ranks = tuple(r for r in made.output.ranks if r in free_vars(condition))
    flag = Einsum(Tensor(cascade.fresh(f"{name}_exists"), ranks, "bool"), condition)
    rest = [c for c in conjuncts(made.domain) if c not in conjuncts(condition)]
    made = replace(made, domain=And(*rest, flag.output()))
    body = tuple(x for e in cascade.body for x in ((flag, made) if e.name == name else (e,)))
    cascade = cascade.replace(body=body)
    there = existence(cascade)

    def reads_flag(e: Einsum) -> Einsum:
        result = conjuncts(there.results[e.name])
        implied = [c for c in conjuncts(there.points[e.name]) if any(a.tensor == flag.name for a in accesses(c))]
        if e.name not in outside or not implied:
            return e
        return narrowed(e, [c for c in implied if c in result], implied, there.results[e.name])

    return cascade.replace(body=tuple(map(reads_flag, cascade.body)))


def _copy_last(cascade: Cascade, scan: Einsum, position: int, users: set[str]) -> Cascade:
    ranks = scan.output.ranks[:position] + scan.output.ranks[position + 1 :]
    dtype = "f64" if any(t.dtype == "f64" for t in cascade.inputs) else scan.output.dtype  # as precise as the loop is
    copy = Tensor(cascade.fresh(f"{scan.name}_last"), ranks, dtype)
    last = cascade.extent(scan.output.ranks[position]) - 1
    index = [*map(var, ranks)]
    index.insert(position, last)

    def rewrite(expr: sympy.Basic) -> sympy.Basic:
        found = {
            a: Access(copy.name, *a.index[:position], *a.index[position + 1 :])
            for a in expr.atoms(Access)
            if a.tensor == scan.name
        }
        return expr.xreplace(found)

    body: list[Einsum] = []
    for e in cascade.body:
        changed = e.name in users
        body.append(replace(e, expr=rewrite(e.expr), domain=rewrite(e.domain)) if changed else e)
        if e.name == scan.name:
            body.append(Einsum(copy, Access(scan.name, *index)))
    return cascade.replace(body=tuple(body))


def _order(cascade: Cascade, nests: list[SerialNest], owner: Mapping[str, list[int]]) -> tuple[Nest, ...]:
    """Nests in an order that makes every tensor before it is read, as close to the cascade's own as that allows;
    neighbouring flat statements become one nest."""
    position = {e.name: i for i, e in enumerate(cascade.body)}
    unit: dict[object, int] = {}  # a nest's number or a flat Einsum's name, to its place in the cascade
    for i, nest in enumerate(nests):
        unit[i] = max(position[e.name] for e in nest.einsums)
    flats = [e for e in cascade.body if e.name not in owner]
    for e in reversed(flats):  # next to its first reader, where only flat statements read it
        readers = [unit[x.name] if x.name not in owner else -1 for x in cascade.users(e.name) if x is not e]
        unit[e.name] = min(readers, default=-1) if min(readers, default=-1) >= 0 else position[e.name]
    makers: dict[str, object] = {e.name: e.name for e in flats}
    for i, nest in enumerate(nests):
        makers.update(dict.fromkeys(nest.outputs, i))
    graph = nx.DiGraph()
    graph.add_nodes_from(unit)
    for i, nest in enumerate(nests):
        graph.add_edges_from((makers[name], i) for name in nest.inputs if name in makers and makers[name] != i)
    for e in flats:
        graph.add_edges_from((makers[a.tensor], e.name) for a in e.reads if a.tensor in makers and a.tensor != e.name)
    ordered: list[SerialNest | Einsum] = []
    for key in nx.lexicographical_topological_sort(graph, key=lambda k: unit[k]):
        ordered.append(nests[key] if isinstance(key, int) else cascade.definitions[key])
    return _group_flat(cascade, ordered)


def _group_flat(cascade: Cascade, ordered: list[SerialNest | Einsum]) -> tuple[Nest, ...]:
    result: list[Nest] = []
    run: list[Einsum] = []

    def close() -> None:
        if not run:
            return
        made = {e.name for e in run}
        others = [o for o in ordered if not (isinstance(o, Einsum) and o.name in made)]
        wanted = set(cascade.outputs)
        for o in others:
            wanted |= set(o.inputs) if isinstance(o, SerialNest) else _reads([o])
        result.append(
            FlatNest(tuple(run), _in_order(cascade, _reads(run) - made), tuple(e.name for e in run if e.name in wanted))
        )
        run.clear()

    for item in ordered:
        if isinstance(item, Einsum):
            run.append(item)
        else:
            close()
            result.append(item)
    close()
    return tuple(result)
