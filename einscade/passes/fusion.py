"""Which reductions over a long rank run together in one loop, and how each is carried along.

Comes in: a cascade. Goes out: `Loop`s: a rank, the reductions over it that share one traversal, the correction derived
for each, and the statements along the rank that are recomputed inside. Two reductions over the rank share a loop if
neither reads the other, or the reader has a correction; otherwise the reader waits for the next loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from einscade.ir import Access, Cascade, Einsum, Expr, accesses, var
from einscade.passes.correction import Correction, NoCorrection, derive
from einscade.passes.statements import closure

__all__ = ["Carried", "Loop", "Plan", "along", "inner_ranks", "is_long", "plan_loops"]

# A rank of constant extent up to SHORT is short: worth a loop only if reductions over it depend on each other, and
# small enough to be kept whole on chip. One of LONG is long. Between them, lengths are long and widths are short.
SHORT, LONG = 16, 512


@dataclass(frozen=True)
class Carried:
    """A reduction in a loop: `f` is its expression over inputs, inner reductions and `states` (reads of other
    reductions in the loop, or of statements computed from them)."""

    name: str
    f: Expr
    states: tuple[Access, ...]
    correction: Correction


@dataclass(frozen=True)
class Loop:
    """One traversal of `rank`. `along`: statements over the rank that are computed inside; `rows`: statements without
    the rank that move with the loop's reductions."""

    rank: str
    reductions: tuple[Carried, ...]
    along: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Loops in an order that respects what they read, why reductions could not join, and how many did."""

    loops: tuple[Loop, ...]
    refusals: tuple[str, ...]
    joined: int


def is_long(cascade: Cascade, rank: str) -> bool:
    """Whether a rank's extent is symbolic, at least `LONG`, or that of a length and above `SHORT`."""
    extent = cascade.extent(rank)
    if not extent.is_Integer or int(extent) >= LONG:
        return True
    return int(extent) > SHORT and rank in cascade.lengths


def plan_loops(cascade: Cascade, join: bool = True) -> Plan:
    """Loops for every rank that needs them; with `join` false, no reduction shares a loop with one that it reads."""
    over = _reductions(cascade)
    inner = _inside(cascade, over)
    ranks = sorted(over, key=lambda r: not is_long(cascade, r))
    loops: list[Loop] = []
    refusals: list[str] = []
    joined, taken = 0, set()
    for rank in ranks:
        outer = [r for r in over[rank] if r.name not in taken and not _is_inner(cascade, r, rank, inner)]
        if not outer:
            continue
        levels, why = _levels(cascade, rank, outer, join)
        refusals += why
        for members in _groups(cascade, rank, levels):
            loop = _loop(cascade, rank, members)
            if loop is not None:
                loops.append(loop)
                joined += sum(bool(c.states) for c in loop.reductions)
                taken |= {*loop.along}
    return Plan(tuple(loops), tuple(refusals), joined)


def inner_ranks(cascade: Cascade) -> frozenset[str]:
    """Ranks that are reduced inside traversals of other ranks (only there, if long): widths that scores contract."""
    over = _reductions(cascade)
    inner = _inside(cascade, over)
    return frozenset(
        rank
        for rank, reductions in over.items()
        if (all if is_long(cascade, rank) else any)(_is_inner(cascade, r, rank, inner) for r in reductions)
    )


def _reductions(cascade: Cascade) -> dict[str, list[Einsum]]:
    """The reductions over each rank that are in no loop yet."""
    over: dict[str, list[Einsum]] = {}
    scanned = {cascade.rank_table[s.scan.rank].origin or s.scan.rank for s in cascade.body if s.scan}
    for s in cascade.body:
        in_loop = any(cascade.rank_table[r].origin in scanned for r in s.ranks)
        if s.reduce and s.reduce.monoid != "topk" and s.scan is None and not in_loop:
            for r in s.reduce.ranks:
                over.setdefault(r, []).append(s)
    return over


def _inside(cascade: Cascade, over: dict[str, list[Einsum]]) -> dict[str, set[str]]:
    """For each reduction that a traversal of another rank computes inside, those ranks."""
    inner: dict[str, set[str]] = {}
    for rank, reductions in over.items():
        walk = _Walk(cascade, rank, frozenset(x.name for x in reductions))
        for reduction in reductions:
            for name in walk.read(reduction).along:
                if cascade.definitions[name].reduce:
                    inner.setdefault(name, set()).add(rank)
    return inner


def _is_inner(cascade: Cascade, r: Einsum, rank: str, inner: dict[str, set[str]]) -> bool:
    """Whether the reduction only feeds a traversal of another rank, inside which it can be computed whole."""
    return any(is_long(cascade, other) or not is_long(cascade, rank) for other in inner.get(r.name, ()))


@dataclass
class _Reads:
    """What a statement reads, sorted by how it takes part in a loop along one rank."""

    along: dict[str, None] = field(default_factory=dict)
    rows: dict[str, None] = field(default_factory=dict)
    states: dict[str, None] = field(default_factory=dict)  # reductions of the loop
    fixed: dict[str, None] = field(default_factory=dict)  # must be complete before the loop begins


class _Walk:
    """Follows reads from a statement through what a loop along `rank` can compute inside."""

    def __init__(self, cascade: Cascade, rank: str, reductions: frozenset[str]) -> None:
        self.cascade, self.rank, self.reductions = cascade, rank, reductions

    def read(self, statement: Einsum) -> _Reads:
        found = _Reads()
        self._visit(statement, found)
        return found

    def _visit(self, statement: Einsum, found: _Reads) -> None:
        in_domain = {a.tensor for a in accesses(statement.domain)}
        for a in statement.reads:
            made = self.cascade.definitions.get(a.tensor)
            if made is None or a.tensor == statement.name:
                continue
            own = a.index == tuple(map(var, made.output.ranks)) and not made.scan
            if own and a.tensor in self.reductions and a.tensor not in in_domain:
                found.states[a.tensor] = None
            elif own and self.rank in made.output.ranks and not self._complete(made, statement):
                if a.tensor not in found.along:
                    self._visit(made, found)
                    found.along[a.tensor] = None
            elif own and made.reduce is None and self._moves(a.tensor):
                if a.tensor not in found.rows:
                    self._visit(made, found)
                    found.rows[a.tensor] = None
            else:
                found.fixed[a.tensor] = None

    def _complete(self, made: Einsum, reader: Einsum) -> bool:
        """Whether a statement along the rank is better complete before the loop begins than computed inside it: a
        selection, a reduction that has to traverse another long rank, or one that lacks a long rank of its reader and
        would be computed again for every tile of it (a norm of the keys, the sum(f) O*dO of a gradient)."""
        if made.reduce is None:
            return False
        if made.reduce.monoid == "topk":
            return True
        if any(is_long(self.cascade, r) and r not in made.ranks for r in reader.ranks):
            return True
        long = [r for r in made.reduce.ranks if is_long(self.cascade, r)]
        read = [self.cascade.definitions[a.tensor] for a in made.reads if a.tensor in self.cascade.definitions]
        return any(r in q.output.ranks and self.rank in q.output.ranks for q in read for r in long)

    def _moves(self, name: str) -> bool:
        return not self.reductions.isdisjoint(closure(self.cascade, [name]))


def along(cascade: Cascade, rank: str, statement: Einsum) -> tuple[str, ...]:
    """The statements along a rank that a loop over it can compute inside for a statement that reduces it."""
    return tuple(_Walk(cascade, rank, frozenset()).read(statement).along)


def _levels(
    cascade: Cascade, rank: str, reductions: list[Einsum], join: bool
) -> tuple[dict[int, list[Carried]], list[str]]:
    """Each reduction in the earliest loop that it can run in."""
    names = frozenset(r.name for r in reductions)
    level: dict[str, int] = {}
    result: dict[int, list[Carried]] = {}
    refusals: list[str] = []
    for r in reductions:
        everything = closure(cascade, [r.name]) - {r.name}
        deps = names & everything
        first = max((level[d] for d in deps), default=0)
        here = frozenset(d for d in deps if level[d] == first)
        carried = None
        if not here:
            carried = Carried(r.name, *expand(cascade, rank, r, here), Correction())
        elif join:
            try:
                carried = _carry(cascade, rank, r, here)
            except NoCorrection as why:
                refusals.append(f"{r.name}: {why}")
        if carried is None:
            first += 1
            carried = Carried(r.name, *expand(cascade, rank, r, frozenset()), Correction())
        level[r.name] = first
        result.setdefault(first, []).append(carried)
    return result, refusals


def _carry(cascade: Cascade, rank: str, r: Einsum, here: frozenset[str]) -> Carried:
    reads = _Walk(cascade, rank, here).read(r)
    if late := [n for n in reads.fixed if here & closure(cascade, [n])]:
        raise NoCorrection(f"it needs {', '.join(late)} complete before the loop over {rank} begins")
    for name in reads.along:
        s = cascade.definitions[name]
        if s.reduce and here & closure(cascade, [name]):
            raise NoCorrection(f"{name} mixes other reductions over {rank} within a {s.reduce.monoid} of its own")
    f, states = expand(cascade, rank, r, here)
    assert r.reduce is not None
    return Carried(r.name, f, states, derive(f, r.reduce.monoid, states, rank))


def expand(cascade: Cascade, rank: str, r: Einsum, moving: frozenset[str]) -> tuple[Expr, tuple[Access, ...]]:
    """The reduction's expression with every statement along the rank that reads moving reductions written out."""
    walk = _Walk(cascade, rank, moving)
    states: dict[Access, None] = {}

    def written_out(expr: Expr) -> Expr:
        values = {}
        for a in accesses(expr):
            made = cascade.definitions.get(a.tensor)
            if made is None or a.index != tuple(map(var, made.output.ranks)):
                continue
            if a.tensor in moving or (made.reduce is None and rank not in made.output.ranks and walk._moves(a.tensor)):
                states[a] = None
            elif made.reduce is None and not made.scan and rank in made.output.ranks and walk._moves(a.tensor):
                values[a] = written_out(made.expr)
        return expr.xreplace(values)

    return written_out(r.expr), tuple(states)


def _groups(cascade: Cascade, rank: str, levels: dict[int, list[Carried]]) -> Iterable[list[Carried]]:
    """The reductions of each level that belong together: those that share statements along the rank or read each
    other, and then those with the same rows."""
    for level in sorted(levels):
        groups: list[tuple[set[str], list[Carried]]] = []
        names = frozenset(c.name for c in levels[level])
        for c in levels[level]:
            reads = _Walk(cascade, rank, names).read(cascade.definitions[c.name])
            keys = {c.name, *reads.along, *reads.states}
            members = [c]
            for group in [g for g in groups if g[0] & keys]:
                groups.remove(group)
                keys |= group[0]
                members = group[1] + members
            groups.append((keys, members))
        by_rows: dict[tuple[str, ...], list[Carried]] = {}
        for _, members in groups:
            rows = common_ranks(cascade, [m.name for m in members])
            if not _worthwhile(cascade, rank, members):
                continue
            by_rows.setdefault(rows, []).extend(members)
        yield from by_rows.values()


def common_ranks(cascade: Cascade, names: list[str]) -> tuple[str, ...]:
    """The ranks that all these outputs have, in the order of the first."""
    first, *others = (cascade.tensors[n].ranks for n in names)
    return tuple(r for r in first if all(r in o for o in others))


def _worthwhile(cascade: Cascade, rank: str, members: list[Carried]) -> bool:
    """A loop pays for reductions that read each other, or to keep something along the rank out of memory."""
    if any(m.states for m in members):
        return True
    reads = [_Walk(cascade, rank, frozenset()).read(cascade.definitions[m.name]) for m in members]
    along = {n for r in reads for n in r.along}
    return bool(along) and (is_long(cascade, rank) or any(cascade.definitions[n].reduce for n in along))


def _loop(cascade: Cascade, rank: str, members: list[Carried]) -> Loop | None:
    names = frozenset(m.name for m in members)
    order = {s.name: i for i, s in enumerate(cascade.body)}
    along: set[str] = set()
    rows: set[str] = set()
    for m in members:
        reads = _Walk(cascade, rank, names).read(cascade.definitions[m.name])
        along |= {*reads.along}
        rows |= {*reads.rows}
    in_order = sorted(members, key=lambda m: order[m.name])
    return Loop(
        rank,
        tuple(in_order),
        tuple(sorted(along, key=order.__getitem__)),
        tuple(sorted(rows, key=order.__getitem__)),
    )
