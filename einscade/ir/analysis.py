"""What a cascade costs, before anything is scheduled: passes, operations, traffic, footprint, roofline.

Comes in: a verified `Cascade` (and, for seconds, a `Device` and sizes). Goes out: numbers and symbolic expressions
over extents. The pass count is FuseMax's (arXiv 2406.10491): how often the dependencies force a fiber of a rank to be
traversed, whatever the schedule. Parts of a partitioned rank count as the rank they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import networkx as nx
import sympy
import torch
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Or

from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.device import Device
from einscade.ir.expr import FUNCTIONS, Access, Expr, Where, accesses, free_vars, var
from einscade.ir.interpret import OPERATIONS, extents
from einscade.ir.intervals import decide

__all__ = [
    "BITS",
    "Analysis",
    "Work",
    "analyse",
    "dependencies",
    "family",
    "footprint",
    "kept_fraction",
    "operations",
    "passes",
    "roofline",
    "serial_rank",
    "traffic",
]

BITS: Mapping[str, int] = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f8e5m2": 8,
    "i64": 64, "i32": 32, "i16": 16, "i8": 8, "u8": 8, "i4": 4, "bool": 8,
}  # fmt: skip
_SPECIAL = tuple(FUNCTIONS[name] for name in ("exp", "log", "tanh", "erf", "sin", "cos", "sinh", "cosh", "atan"))
_SAMPLES = 48  # per rank, where the fraction of points that a domain keeps is estimated


# ------------------------------------------------------------------------------------------------------------ passes


def family(cascade: Cascade, rank: str) -> str:
    """The rank that this one is a part of, through any number of partitions; itself where it is none."""
    table = cascade.rank_table
    while rank in table and (origin := table[rank].origin) is not None and origin != rank:
        rank = origin
    return rank


def dependencies(cascade: Cascade) -> nx.DiGraph:
    """Who reads whom: tensors as nodes, an edge from what is read to what is computed, with the `accesses` it makes.
    A scan's read of itself is no edge."""
    graph = nx.DiGraph()
    graph.add_nodes_from(t.name for t in cascade.inputs)
    for e in cascade.body:
        graph.add_node(e.name)
        for access in e.reads:
            if access.tensor != e.name:
                if not graph.has_edge(access.tensor, e.name):
                    graph.add_edge(access.tensor, e.name, accesses=[])
                graph.edges[access.tensor, e.name]["accesses"].append(access)
    return graph


def passes(cascade: Cascade) -> dict[str, int]:
    """The number of passes over every rank (a partitioned rank by the name of its origin)."""
    graph = dependencies(cascade)
    families = dict.fromkeys(family(cascade, r.name) for r in cascade.ranks)
    return {rank: max(_levels(cascade, graph, rank).values(), default=0) for rank in families}


def _levels(cascade: Cascade, graph: nx.DiGraph, rank: str) -> dict[str, int]:
    """For every statement, the pass over `rank` in which it is computed, or (where it does not iterate the rank) the
    number of passes that are over before it can be: the longest path of a graph in which an edge weighs 1 if its
    reader traverses the rank anew, and 0 if it goes along with, or merely follows, the traversal that it reads."""
    parts = {r.name for r in cascade.ranks if family(cascade, r.name) == rank}
    level: dict[str, int] = {}
    for name in nx.topological_sort(graph):
        if name not in cascade.definitions:
            continue
        iterates = bool(parts & set(cascade.definitions[name].ranks))
        level[name] = int(iterates)
        for producer, _, data in graph.in_edges(name, data=True):
            if producer in level:
                along = all(_goes_along(cascade, access, parts) for access in data["accesses"])
                level[name] = max(level[name], level[producer] + int(iterates and not along))
    return level


def _goes_along(cascade: Cascade, access: Access, parts: set[str]) -> bool:
    """Whether the access, during a traversal, reads what the same traversal has just computed: its index moves
    forward with the rank. An index that is free of the rank, gathered, or runs backwards needs all of it first."""
    ranks = cascade.tensors[access.tensor].ranks
    indices = [i for r, i in zip(ranks, access.index, strict=True) if r in parts]
    moving = [i for i in indices if free_vars(i) & parts]
    return bool(moving) and not any(i.has(Access) or _runs_backwards(i, parts) for i in moving)


def _runs_backwards(index: Expr, parts: set[str]) -> bool:
    return any(term.could_extract_minus_sign() and free_vars(term) & parts for term in sympy.Add.make_args(index))


# -------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Work:
    """Scalar operations: `matrix` those of contractions by the dtype they multiply in, `special` exp and its kin,
    `vector` all others."""

    matrix: Mapping[str, Expr]
    vector: Expr
    special: Expr

    @property
    def total(self) -> Expr:
        return sympy.Add(*self.matrix.values(), self.vector, self.special)


def operations(cascade: Cascade, kept: Mapping[str, float] | None = None) -> Work:
    """Operations of the whole cascade, as expressions over extents. Every point of an iteration space counts, or, by
    statement, the fraction `kept` of them."""
    matrix: dict[str, Expr] = {}
    vector = special = sympy.Integer(0)
    for e in cascade.body:
        points = _product(cascade.extent(r) for r in e.ranks) * (1 if kept is None else kept[e.name])
        rows = _product(cascade.extent(r) for r in e.output.ranks)
        inner, outer = _factors(e)
        if e.reduce and e.reduce.monoid == "sum" and sum(1 for f in inner if f.has(Access)) > 1:
            dtype = _contraction_dtype(cascade, inner)
            matrix[dtype] = matrix.get(dtype, sympy.Integer(0)) + 2 * points
            for f in outer:  # what is free of the contracted ranks is applied once
                vector, special = vector + (1 + _count(f)[0]) * rows, special + _count(f)[1] * rows
            for f in inner:
                vector, special = vector + _count(f)[0] * points, special + _count(f)[1] * points
        else:
            count, calls = _count(e.expr)
            vector += (count + bool(e.reduce)) * points
            special += calls * points
    return Work(matrix, vector, special)


def _factors(e: Einsum) -> tuple[list[Expr], list[Expr]]:
    """Factors of the expression that depend on reduced ranks, and those that don't."""
    reduced = set(e.reduce.ranks) if e.reduce else set()
    inner: list[Expr] = []
    outer: list[Expr] = []
    for factor in sympy.Mul.make_args(e.expr):
        (inner if free_vars(factor) & reduced else outer).append(factor)
    return inner, outer


def _contraction_dtype(cascade: Cascade, factors: Iterable[Expr]) -> str:
    """The narrowest dtype among the operands: wider ones are rounded to it for the matrix unit."""
    return min((cascade.tensors[a.tensor].dtype for f in factors for a in accesses(f)), key=lambda d: BITS[d])


def _count(expr: Any) -> tuple[int, int]:
    """(arithmetic operations, special functions) of one evaluation; indices are not counted, a sign is part of the
    sum it stands in, and a division is one operation."""
    if isinstance(expr, Access) or not expr.args:
        return 0, 0
    args = expr.args
    if expr.is_Mul:
        args = [a.base if a.is_Pow and a.exp == -1 else a for a in args if a != -1]
    special = isinstance(expr, _SPECIAL) or (expr.is_Pow and not expr.exp.is_Integer)
    own = 0 if special else 1 if expr.is_Pow else len(args) - 1 if expr.is_Mul else max(1, len(args) - 1)
    inner = [_count(a) for a in args]
    return sum(c for c, _ in inner) + own, sum(s for _, s in inner) + int(special)


# ----------------------------------------------------------------------------------------------- traffic, footprint


def traffic(cascade: Cascade) -> Expr:
    """Bytes that any execution moves: inputs that are read and outputs, each once."""
    read = {a.tensor for e in cascade.body for a in e.reads} | set(cascade.outputs)
    moved = [t.name for t in cascade.inputs if t.name in read]
    moved += [name for name in cascade.outputs if name in cascade.definitions]
    return sympy.Add(*(_bytes(cascade, name, cascade.tensors[name].ranks) for name in moved))


def serial_rank(cascade: Cascade) -> str | None:
    """The rank that a kernel runs along: of those reduced or scanned, the one with the most passes; ranks of open
    length before those of constant length, earlier ones before later ones."""
    count = passes(cascade)
    reduced = [r for e in cascade.body if e.reduce for r in e.reduce.ranks]
    scanned = [e.scan.rank for e in cascade.body if e.scan]
    candidates = dict.fromkeys(family(cascade, r) for r in (r.name for r in cascade.ranks) if r in reduced + scanned)
    open_length = {family(cascade, r.name) for r in cascade.ranks if not r.extent.is_Integer}
    return max(candidates, key=lambda r: (r in open_length, count[r]), default=None)


def footprint(cascade: Cascade, serial: str | None = None, grid: Iterable[str] | None = None) -> Expr:
    """Bytes held at once while one point of the `grid` ranks is computed along the `serial` rank.

    A tensor that is made and used within one pass is held for one step of the rank; one that a later pass reads is
    held (or made again) whole. Inputs are held for one step. `serial` defaults to `serial_rank`, `grid` to the ranks
    that every statement's output has.
    """
    serial = serial if serial is not None else serial_rank(cascade)
    parts = {r.name for r in cascade.ranks if family(cascade, r.name) == serial}
    # Of a partitioned rank the outermost part is stepped along, a step covers the others.
    stepped = {r for r in parts if r == _outermost(cascade, parts)}
    if grid is None:
        grid = set.intersection(*(set(e.output.ranks) for e in cascade.body)) if cascade.body else set()
    fixed = frozenset(set(grid) - parts)
    graph = dependencies(cascade)
    level = _levels(cascade, graph, serial) if serial is not None else {}
    held: dict[str, Expr] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, e in enumerate(cascade.body):
        first[e.name] = last[e.name] = position
        for access in e.reads:
            first.setdefault(access.tensor, position)
            last[access.tensor] = position
            if access.tensor in cascade.definitions:
                continue
            # Of an input, what one step's ranks reach: K[m1*M0 + m0] is M0 elements.
            ranks = free_vars(access) & set(e.ranks) - fixed - stepped
            held[access.tensor] = _bytes(cascade, access.tensor, [r for r in e.ranks if r in ranks])
    for e in cascade.body:
        later = e.name in level and any(level[reader] > level[e.name] for reader in graph.successors(e.name))
        ones = fixed if later else fixed | stepped
        held[e.name] = _bytes(cascade, e.name, [r for r in e.output.ranks if r not in ones])
    steps = range(len(cascade.body))
    return _largest([sympy.Add(*(b for n, b in held.items() if first[n] <= at <= last[n])) for at in steps])


def _outermost(cascade: Cascade, parts: set[str]) -> str | None:
    """The part of a rank that the scans run along, else the first one in the table."""
    scanned = [e.scan.rank for e in cascade.body if e.scan and e.scan.rank in parts]
    return next(iter(scanned), next((r.name for r in cascade.ranks if r.name in parts), None))


def _largest(values: list[Expr]) -> Expr:
    """The maximum, over extents of at least 1; dominated values are left out by proof."""
    kept: list[Expr] = []
    for v in dict.fromkeys(values):
        if any(decide(sympy.Ge(k, v), {}) for k in kept):
            continue
        kept = [k for k in kept if not decide(sympy.Ge(v, k), {})] + [v]
    return sympy.Max(*kept) if kept else sympy.Integer(0)


def _bytes(cascade: Cascade, tensor: str, ranks: Iterable[str]) -> Expr:
    """Bytes of as many elements of a tensor as these ranks have points."""
    return sympy.Rational(BITS[cascade.tensors[tensor].dtype], 8) * _product(cascade.extent(r) for r in ranks)


def _product(extents: Iterable[Expr]) -> Expr:
    return sympy.Mul(*extents)


# ---------------------------------------------------------------------------------------------------------- roofline


def roofline(cascade: Cascade, device: Device, sizes: Mapping[str, int]) -> float:
    """Seconds that the cascade takes on the device at least: traffic at full bandwidth, or operations at full rate,
    whichever is longer. Points outside the domains are not counted (their share is estimated by `kept_fraction`)."""
    lengths = extents(cascade, sizes)
    work = operations(cascade, {e.name: kept_fraction(cascade, e.name, sizes) for e in cascade.body})
    values = {var(name): size for name, size in {**sizes, **lengths}.items()}

    def number(expr: Expr) -> float:
        return float(sympy.sympify(expr).xreplace({s: sympy.Integer(v) for s, v in values.items()}))

    return max(
        number(traffic(cascade)) / device.bandwidth,
        sum(number(count) / device.matrix_rate(dtype) for dtype, count in work.matrix.items()),
        number(work.vector) / device.vector,
        number(work.special) / device.special,
    )


def kept_fraction(cascade: Cascade, statement: str, sizes: Mapping[str, int]) -> float:
    """The share of a statement's points that its domain, and the domains of what it reads, keep. Estimated on an
    even sample of the ranks that they depend on; conditions on tensors count as true."""
    e = cascade.definitions[statement]
    conditions = [c for c in _conditions(cascade, e) if not c.has(Access) and free_vars(c) & set(e.ranks)]
    ranks = [r for r in e.ranks if any(r in free_vars(c) for c in conditions)]
    lengths = extents(cascade, sizes)
    if not ranks or 0 in (lengths[r] for r in ranks):
        return 1.0
    grid: dict[str, torch.Tensor] = {name: torch.tensor(size) for name, size in sizes.items()}
    per_rank = _SAMPLES if len(ranks) <= 2 else max(4, int(_SAMPLES ** (2 / len(ranks))))
    for axis, r in enumerate(ranks):
        count = min(per_rank, lengths[r])
        points = ((torch.arange(count, dtype=torch.float64) + 0.5) * lengths[r] / count).long()
        grid[r] = points.view([-1 if i == axis else 1 for i in range(len(ranks))])
    shape = [grid[r].numel() for r in ranks]
    kept = reduce(torch.logical_and, (_sampled(c, grid) for c in conditions))
    return float(kept.expand(shape).sum()) / prod(shape)


def _conditions(cascade: Cascade, e: Einsum) -> list[Any]:
    """Conjuncts under which a point of the statement exists, in its own rank variables; a reduction in between ends
    the search on the ranks it reduces."""
    found = list(And.make_args(e.domain)) if e.domain != sympy.true else []
    for access in e.reads:
        producer = cascade.definitions.get(access.tensor)
        if producer is None or producer is e:
            continue
        place = producer.output.place(access)
        reduced = set(producer.reduce.ranks) if producer.reduce else set()
        found += [c.xreplace(place) for c in _conditions(cascade, producer) if not free_vars(c) & reduced]
    return list(dict.fromkeys(found))


def _sampled(node: Any, grid: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """An access-free condition on sampled values of its variables."""
    if isinstance(node, sympy.Symbol):
        return grid[node.name]
    if isinstance(node, (BooleanTrue, BooleanFalse)):
        return torch.tensor(bool(node))
    if node.is_Number:
        return torch.tensor(int(node) if node.is_Integer else float(node))
    args = [_sampled(a, grid) for a in node.args]
    if isinstance(node, (And, Or)):
        return reduce(torch.logical_and if isinstance(node, And) else torch.logical_or, args)
    return OPERATIONS[node.func](*args)


# ----------------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Analysis:
    """A cascade's figures, for the report: passes by rank, and expressions over extents (bytes, operations)."""

    passes: Mapping[str, int]
    serial: str | None
    operations: Expr
    traffic: Expr
    footprint: Expr


def analyse(cascade: Cascade) -> Analysis:
    """Everything that needs no sizes."""
    return Analysis(
        passes(cascade), serial_rank(cascade), operations(cascade).total, traffic(cascade), footprint(cascade)
    )


_LARGE = 1000


def is_moderate(expr: Expr, defined: Callable[[str], Expr | None]) -> bool:
    """Whether scores are of the size of a contraction: no finite fill in them, no tensor added that could hold one.
    What is infinite is no point that a row's maximum is taken at. `defined` gives what the values of a tensor are made
    of, a number for a reduction, None for an input."""
    if expr.is_number:
        return bool(expr.is_infinite or abs(expr) <= _LARGE)
    if isinstance(expr, Access):
        made = defined(expr.tensor)
        return made is not None and is_moderate(made, defined)
    if isinstance(expr, sympy.Mul):
        numbers = [x for x in expr.args if x.is_number]
        factors = [x for x in expr.args if not x.is_number]  # a slope times a distance, scores times a temperature
        return all(is_moderate(x, defined) for x in numbers) and any(is_moderate(x, defined) for x in factors)
    branches = expr.args[1:] if isinstance(expr, Where) else expr.args
    return all(is_moderate(x, defined) for x in branches)
