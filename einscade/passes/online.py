"""Online: reductions over a long rank become running values of one loop (the one-pass form of docs/architecture.md).

Comes in: a cascade whose reductions over a rank m depend on each other. Goes out: m split into m1 (serial) and m0 (the
tile, of symbolic extent), local reductions over m0, scans along m1 that correct what was accumulated when a state
moves, and readers of the last element. The corrections are derived (`correction`), for whatever the reductions are.

The states may take any path to their final values: a mean divides by the length of the prefix, not of the whole row,
so that a running variance does not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import (
    MONOIDS,
    Access,
    Cascade,
    Einsum,
    Expr,
    Rank,
    Reduction,
    Scan,
    Tensor,
    Where,
    accesses,
    ceil_div,
    free_vars,
    var,
)
from einscade.ir.digits import digits
from einscade.passes.correction import Correction, derive, old
from einscade.passes.existence import existence, narrowed, passing_over
from einscade.passes.fusion import Carried, Loop, Plan, along, common_ranks, is_long, plan_loops
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, closure, ordered, redirect, wide, without_unused
from einscade.passes.terms import conjoin, conjuncts, depends, reads_outside_where

__all__ = ["Loops", "Online"]


@dataclass(frozen=True)
class Online:
    """Reductions that wait for each other, in one loop, where a correction of running values can be derived."""

    name: ClassVar[str] = "online"
    identity: ClassVar[str] = "f(x, G') = c(G, G') * f(x, G), so sum f(x, G') = c * sum f(x, G), with c derived"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        cascade = separated(cascade)
        plan = plan_loops(cascade)
        if plan.refusals and not plan.joined:
            raise NotApplicable("; ".join(plan.refusals))
        if not plan.loops:
            raise NotApplicable("no reduction over a long rank waits for another or for a tensor along that rank")
        return _emitted(cascade, plan, join=True)


@dataclass(frozen=True)
class Loops:
    """What `online` left: each remaining reduction in a loop of its own, after those it reads."""

    name: ClassVar[str] = "loops"
    identity: ClassVar[str] = "sum(m) x[m] = sum(m1) sum(m0) x[m1*M0 + m0]"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        cascade = separated(cascade)
        plan = plan_loops(cascade, join=False)
        if not plan.loops:
            raise NotApplicable("every reduction over a long rank that needs a loop is in one")
        return _emitted(cascade, plan, join=False)


def _emitted(cascade: Cascade, plan: Plan, join: bool) -> Cascade:
    """The cascade with its loops, planned again after each: one loop changes what the statements of the next read."""
    while plan.loops:
        cascade = _Emit(cascade, plan.loops[0]).run()
        plan = plan_loops(cascade, join)
    return cascade


def crossed(cascade: Cascade, names: Iterable[str], reduced: Collection[str]) -> bool:
    """Whether any of these statements is made of products over two long ranks that are not among those `reduced`, nor
    parts of one index with them. Where a reduced rank is on a side itself (queries that the batch shares, and keys of
    each of its points), that side has a tile of it."""

    def long(s: Einsum, side: frozenset[str]) -> bool:
        if side & {*reduced}:
            return False
        with_reduced = {r for a in s.reads for i in a.index if free_vars(i) & {*reduced} for r in free_vars(i)}
        return any(is_long(cascade, r) for r in side - with_reduced)

    found = (cascade.definitions[n] for n in names)
    return any(s.sides and all(long(s, side) for side in s.sides) for s in found)


def merged(cascade: Cascade) -> Cascade:
    """A sum over several ranks of what products over two others give (the gradient of a bias that heads share) as one
    over a rank that counts the points of them all, so that no partial sums of the size of those two go to memory."""
    for s in cascade.body:
        ranks = s.reduce.ranks if s.reduce and s.reduce.monoid == "sum" and not s.scan else ()
        inside = along(cascade, ranks[0], s) if len(ranks) > 1 else ()
        if not crossed(cascade, inside, ranks):
            continue
        names = Names(cascade)
        rank = Rank(names(ranks[-1]), sympy.Mul(*map(cascade.extent, ranks)))
        at = dict(zip(map(var, ranks), digits(var(rank.name), [*map(cascade.extent, ranks)]), strict=True))
        cloned = {n: names(n) for n in inside if {*ranks} <= {*cascade.tensors[n].ranks}}
        cascade = cascade.replace(ranks=(*cascade.ranks, rank), body=_with_clones(cascade, s, cloned, rank.name, at))
    return cascade


def _with_clones(
    cascade: Cascade, s: Einsum, cloned: Mapping[str, str], rank: str, at: Mapping[Expr, Expr]
) -> tuple[Einsum, ...]:
    """The body with a reduction, and clones of the statements that it reads, over one rank in the place of several."""
    merging = {str(r) for r in at}

    def over(ranks: tuple[str, ...]) -> tuple[str, ...]:
        return (*((rank,) if merging & {*ranks} else ()), *(r for r in ranks if r not in merging))

    def read(a: Access) -> Expr:
        if a.tensor not in cloned:
            return Access(a.tensor, *(i.xreplace(dict(at)) for i in a.index))
        return Access(cloned[a.tensor], *map(var, over(cascade.tensors[a.tensor].ranks)))

    def clone(e: Einsum) -> Einsum:
        e = redirect(e, read)
        reduce = e.reduce and replace(e.reduce, ranks=over(e.reduce.ranks))
        output = replace(e.output, name=cloned.get(e.name, e.name), ranks=over(e.output.ranks))
        return Einsum(output, e.expr.xreplace(dict(at)), reduce, e.domain.xreplace(dict(at)))

    body: list[Einsum] = []
    for e in cascade.body:
        body += [clone(e)] if e is s else [e, clone(e)] if e.name in cloned else [e]
    return tuple(body)


def separated(cascade: Cascade) -> Cascade:
    """A reduction over several ranks of what other statements compute, as one over the longest of them, then the rest:
    keys shared by a group of query heads get their gradient per head first. What is `merged` has one rank instead."""
    cascade = without_unused(merged(cascade))
    body: list[Einsum] = []
    names = Names(cascade)
    for s in cascade.body:
        reduced = s.reduce.ranks if s.reduce and s.reduce.monoid != "topk" and not s.scan else ()
        made = [cascade.definitions[a.tensor] for a in s.reads if a.tensor in cascade.definitions]
        shared = [[r for r in reduced if r in m.output.ranks] for m in made]
        mixed = next((ranks for ranks in shared if len(ranks) > 1), None)
        if mixed is None or s.reduce is None:
            body.append(s)
            continue
        serial = max(mixed, key=lambda r: _length(cascade, r))
        rest = tuple(r for r in reduced if r != serial)
        kept = s.output.ranks[:-2] + rest + s.output.ranks[-2:]
        partial = Tensor(names(f"{s.name}p"), kept, _stored(s))
        body.append(Einsum(partial, s.expr, Reduction(s.reduce.monoid, (serial,)), s.domain))
        body.append(Einsum(s.output, partial(), Reduction(s.reduce.monoid, rest)))
    return cascade.replace(body=tuple(body))


def _stored(s: Einsum) -> str:
    """The dtype of a reduction's running value: booleans and counts as they are, all else wide."""
    exact = s.output.dtype == "bool" or (s.output.dtype[0] in "iu" and s.reduce and s.reduce.monoid == "sum")
    return s.output.dtype if exact else wide(s.output.dtype)


def _length(cascade: Cascade, rank: str) -> float:
    extent = cascade.extent(rank)
    return int(extent) if extent.is_Integer else math.inf


def _undefined(expr: Expr, values: Mapping[Access, Expr], step: Expr) -> bool:
    """Whether the expression has no finite value with these accesses at these values, all others positive."""
    plain = {a: sympy.Symbol(f"x{i}", positive=True) for i, a in enumerate(accesses(expr)) if a not in values}
    value = expr.xreplace(dict(values)).xreplace(plain).xreplace({step: sympy.S.One})
    return value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


class _Emit:
    """Writes one loop into a cascade."""

    def __init__(self, cascade: Cascade, loop: Loop) -> None:
        self.cascade, self.loop, self.m = cascade, loop, loop.rank
        names = self.names = Names(cascade)
        self.m1, self.extent = names(f"{self.m}1"), cascade.extent(self.m)
        self.m0 = None if self._crossed() else names(f"{self.m}0")
        self.tile = var(names(f"{self.m.upper()}0")) if self.m0 else sympy.Integer(1)
        self.steps = ceil_div(self.extent, self.tile) if self.m0 else self.extent
        self.index = var(self.m1) * self.tile + (var(self.m0) if self.m0 else 0)
        self.reductions = {c.name for c in loop.reductions}
        tiles = {r for n in loop.along for r in cascade.tensors[n].ranks}
        common = common_ranks(cascade, [c.name for c in loop.reductions])
        self.common = tuple(r for r in common if r in tiles) or common
        self.running: dict[str, Tensor] = {}
        self.inside: dict[str, str] = {}  # statements along the rank and rows, to their names inside the loop
        self.made: list[Einsum] = []
        self.aux: list[tuple[Expr, list[Boolean], Tensor]] = []  # moments, the points they sum over, their running sums

    def run(self) -> Cascade:
        c = self.cascade
        outside = [s for s in c.body if s.name not in self.reductions]
        live = closure(c.replace(body=tuple(outside)), c.outputs) | {
            a.tensor for s in self._sources() for a in s.reads if a.tensor not in {*self.loop.along, *self.loop.rows}
        }
        live = closure(c.replace(body=tuple(outside)), live)
        for carried in self.loop.reductions:
            output = c.tensors[carried.name]
            name = output.name if output.name not in c.outputs else self.names(f"{output.name}R")
            self.running[carried.name] = Tensor(
                name, self._with_step(output.ranks), _stored(c.definitions[carried.name])
            )
        for name in (*self.loop.along, *self.loop.rows):
            self.inside[name] = name if name not in live else self.names(f"{name}t")
        self.made = [self._along(c.definitions[n]) for n in self.loop.along]
        self.made += [self._row(c.definitions[n]) for n in self.loop.rows]
        for carried in self.loop.reductions:
            self._carry(carried)
        kept = [self._after(s) for s in outside if s.name in live]
        finals = [
            Einsum(c.tensors[n], self._final(Access(n, *map(var, c.tensors[n].ranks))))
            for n in c.outputs
            if n in self.reductions
        ]
        ranks = (*c.ranks, Rank(self.m1, self.steps, self.m))
        ranks += (Rank(self.m0, self.tile, self.m),) if self.m0 else ()
        body = ordered([*kept, *self.made, *finals], [t.name for t in c.inputs])
        return without_unused(c.replace(ranks=ranks, body=body))

    def _crossed(self) -> bool:
        """Whether the loop computes products over two other long ranks (the scores, for a bias that sums their
        gradient over the batch): it then takes one step at a time, with a tile of those two."""

        return crossed(self.cascade, self.loop.along, (self.m,))

    def _sources(self) -> list[Einsum]:
        d = self.cascade.definitions
        return [d[n] for n in (*self.loop.along, *self.loop.rows, *self.reductions)]

    # -- ranks and accesses --

    def _with_step(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        """The serial rank after those that all of the loop's rows have."""
        place = 1 + max((i for i, r in enumerate(ranks) if r in self.common), default=-1)
        return (*ranks[:place], self.m1, *ranks[place:])

    def _run_at(self, access: Access, step: Expr) -> Access:
        """A running value, for an access to the reduction, at a step of the loop."""
        running = self.running[access.tensor]
        place = running.ranks.index(self.m1)
        return Access(running.name, *access.index[:place], step, *access.index[place:])

    def _final(self, access: Access) -> Access:
        return self._run_at(access, self.steps - 1)

    def _now(self, expr: Expr) -> Expr:
        """An expression of the old cascade inside the loop: at the step's own values."""
        values = {}
        for a in accesses(expr):
            if a.tensor in self.loop.rows or a.tensor in self.loop.along:
                self._here(a)
            if a.tensor in self.running:
                values[a] = self._run_at(a, var(self.m1))
            elif a.tensor in self.loop.rows:
                ranks = self._with_step(self.cascade.tensors[a.tensor].ranks)
                values[a] = Access(self.inside[a.tensor], *map(var, ranks))
            elif a.tensor in self.loop.along:
                ranks = self._split(self.cascade.tensors[a.tensor].ranks)
                values[a] = Access(self.inside[a.tensor], *map(var, ranks))
        return expr.xreplace(values).xreplace({var(self.m): self.index})

    def _here(self, access: Access) -> None:
        """A step has the points of its own tile only: what reads others (a rotation of halves) has no loop."""
        if access.index != tuple(map(var, self.cascade.tensors[access.tensor].ranks)):
            raise NotApplicable(f"{access} is read in a loop that makes {access.tensor} point by point")

    def _split(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        parts = (self.m1, self.m0) if self.m0 else (self.m1,)
        return tuple(q for r in ranks for q in (parts if r == self.m else (r,)))

    def _reduction(self, monoid: str, ranks: tuple[str, ...]) -> Reduction | None:
        """The part of a reduction that one step makes."""
        own = tuple(self.m0 if r == self.m else r for r in ranks)
        kept = tuple(r for r in own if r is not None)
        return Reduction(monoid, kept) if kept else None

    # -- statements --

    def _bounded(self, s: Einsum, domain: Boolean) -> Boolean:
        """The domain with the end of the rank, unless a statement along the rank that is read says it already. (One
        read inside a reduction of this statement's own says what is reduced, not that the point exists.)"""
        own = {r for r in s.reduce.ranks if r != self.m} if s.reduce and s.name in self.loop.along else set()
        if self.m0 is None or any(
            a.tensor in self.loop.along and not depends(a, own) for a in reads_outside_where(s.expr)
        ):
            return domain
        return conjoin([self.index < self.extent, *conjuncts(domain)])

    def _along(self, s: Einsum) -> Einsum:
        output = Tensor(self.inside[s.name], self._split(s.output.ranks), s.output.dtype, s.output.layout)
        return Einsum(output, self._now(s.expr), s.reduce, self._bounded(s, self._now(s.domain)))

    def _row(self, s: Einsum) -> Einsum:
        """A row statement at each step. The rank's extent in it is the length so far: any path to the end will do."""
        output = Tensor(self.inside[s.name], self._with_step(s.output.ranks), s.output.dtype)
        expr = self._now(self._counting(s.expr, self._count(var(self.m1) + 1)))
        return Einsum(output, expr, domain=self._now(s.domain))

    def _counting(self, expr: Expr, count: Expr) -> Expr:
        return expr.xreplace({self.extent: count}) if self.extent.is_Symbol else expr

    def _count(self, steps: Expr) -> Expr:
        return sympy.Min(steps * self.tile, self.extent)

    def _carry(self, carried: Carried) -> None:
        s = self.cascade.definitions[carried.name]
        assert s.reduce is not None
        running = self.running[s.name]
        local = Tensor(self.names(f"{s.name}L"), running.ranks, running.dtype)
        part = self._reduction(s.reduce.monoid, s.reduce.ranks)
        if part is None:
            self.made.append(self._point(local, s.name, s.expr, s.domain))
        else:
            self.made.append(Einsum(local, self._now(s.expr), part, self._bounded(s, self._now(s.domain))))
        self._scan(running, local, s.reduce.monoid, carried.correction, carried)

    def _point(self, local: Tensor, name: str, expr: Expr, domain: Boolean) -> Einsum:
        """What a step of a single point adds to a reduction, or to a moment of one. Where that point is missing it is
        the identity: a reduction passes over it, and a running value needs every step's. The conditions under which
        the reduction has a result at all are the step's own."""
        there, reduce = existence(self.cascade), self.cascade.definitions[name].reduce
        assert reduce is not None
        taken = dict.fromkeys((*conjuncts(domain), *conjuncts(there.of(expr))))
        own = [c for c in taken if c in conjuncts(there.results[name])]
        passed = [c for c in taken if c not in own]
        if not passed:
            return Einsum(local, self._now(expr), domain=self._now(domain))
        chosen = passing_over(expr, passed, reduce.monoid)
        return Einsum(local, self._now(chosen), domain=self._now(conjoin(own)))

    def _scan(self, running: Tensor, local: Tensor, monoid: str, correction: Correction, carried: Carried) -> None:
        step = var(self.m1)
        identity = MONOIDS[monoid].identity
        before = Access(running.name, *(step - 1 if r == self.m1 else var(r) for r in running.ranks))
        moved: Expr = before + correction.shift if correction.shift != 0 else before
        for coefficient, moment in correction.moments:
            moved += coefficient * self._moment(moment, carried, running)
        moved = correction.scale * moved
        guard = self._guard(correction, carried) + self._states_exist(carried)
        moved = self._before_and_now(moved, carried.states)
        if guard:
            moved = Where(conjoin(guard), moved, identity)
        combined = MONOIDS[monoid].combine(moved, local())
        self.made.append(Einsum(running, combined, scan=Scan(self.m1, identity)))

    def _before_and_now(self, expr: Expr, states: tuple[Access, ...]) -> Expr:
        """A correction with its states as the loop has them: `old` ones at the step before."""
        values: dict[Expr, Expr] = {old(s): self._previous(s) for s in states}
        values |= {s: self._now(s) for s in states}
        return expr.xreplace(values)

    def _previous(self, state: Access) -> Expr:
        """A state at the step before, written out over running values (only these know what came before the first)."""
        return self._written_out(state, var(self.m1) - 1, sympy.Max(self._count(var(self.m1)), 1))

    def _written_out(self, state: Access, step: Expr, count: Expr) -> Expr:
        if state.tensor in self.running:
            return self._run_at(state, step)
        expr = self._counting(self.cascade.definitions[state.tensor].expr, count)
        moving = {*self.running, *self.loop.rows}
        return expr.xreplace({a: self._written_out(a, step, count) for a in accesses(expr) if a.tensor in moving})

    def _guard(self, correction: Correction, carried: Carried) -> list[Boolean]:
        """Where the correction is undefined because nothing was accumulated, the old states are not to be read."""
        step = var(self.m1)
        values: dict[Expr, Expr] = {old(s): self._previous(s) for s in carried.states}
        values |= {s: self._written_out(s, step, self._count(step + 1)) for s in carried.states}
        expr = (correction.scale + correction.shift + sum(c for c, _ in correction.moments)).xreplace(values)
        names = {t.name: n for n, t in self.running.items()}
        running = {a: self._identity(names[a.tensor]) for a in accesses(expr) if a.tensor in names}
        before = {a: i for a, i in running.items() if step - 1 in a.index}
        # Nothing before this step; and nothing up to it, where `oo - oo` is 0 but 0 / 0 is not.
        empty = {a: i for a, i in running.items() if i == 0}
        bad: dict[Access, Expr] = {}
        for nothing in (before, empty):
            if _undefined(expr, nothing, step):
                bad |= {a: i for a, i in nothing.items() if a in before}
        return [sympy.Ne(a, i) for a, i in bad.items()]

    def _states_exist(self, carried: Carried) -> list[Boolean]:
        """Where the states are missing, nothing is accumulated; the result may be there all the same."""
        there = existence(self.cascade)
        found = dict.fromkeys(c for s in carried.states for c in conjuncts(there.of(s)))
        return [self._now(c) for c in found if c not in conjuncts(there.results[carried.name])]

    def _identity(self, name: str) -> Expr:
        reduce = self.cascade.definitions[name].reduce
        assert reduce is not None
        return MONOIDS[reduce.monoid].identity

    # -- moments --

    def _moment(self, moment: Expr, carried: Carried, owner: Tensor) -> Expr:
        """The sum so far (at the step before) of a moment that a correction needs: a count in closed form, one of the
        loop's own reductions, or one more."""
        step = var(self.m1) - 1
        domain = self._points(carried.name)
        if not depends(moment, (self.m,)) and not domain and not any(moment.has(s) for s in carried.states):
            return moment * self._count(var(self.m1))
        for other in self.loop.reductions:
            reduce = self.cascade.definitions[other.name].reduce
            if other.f == moment and reduce and reduce.monoid == "sum" and self._points(other.name) == domain:
                own = Access(other.name, *map(var, self.cascade.tensors[other.name].ranks))
                return self._run_at(own, step)
        for f, points, running in self.aux:
            if f == moment and points == domain:
                return Access(running.name, *(step if r == self.m1 else var(r) for r in running.ranks))
        s = self.cascade.definitions[carried.name]
        assert s.reduce is not None
        if s.reduce.ranks != (self.m,):
            raise NotApplicable(f"{s.name} sums over {', '.join(s.reduce.ranks)} at once; its moments would too")
        states = tuple(a for a in carried.states if moment.has(a))
        moving = (moment, *domain)
        kept = tuple(
            r for r in owner.ranks if r in self.common or r == self.m1 or any(depends(e, (r,)) for e in moving)
        )
        running = Tensor(self.names(f"{s.name}A"), kept, owner.dtype)
        local = Tensor(self.names(f"{running.name}L"), kept, owner.dtype)
        self.aux.append((moment, domain, running))
        correction = derive(moment, "sum", states, self.m)
        part = self._reduction("sum", (self.m,))
        if part is None:
            self.made.append(self._point(local, s.name, moment, conjoin(domain)))
        else:
            lacked = {r for r in owner.ranks if r not in kept}
            there = conjuncts(existence(self.cascade).results[s.name])
            result = conjoin(self._now(c) for c in there if not depends(c, lacked))
            inside = [self.index < self.extent, *map(self._now, domain)]
            self.made.append(narrowed(Einsum(local, self._now(moment), part), (), inside, result))
        self._scan(running, local, "sum", correction, Carried(s.name, moment, states, correction))
        return Access(running.name, *(step if r == self.m1 else var(r) for r in running.ranks))

    def _points(self, name: str) -> list[Boolean]:
        """The conditions under which the reduction takes a point: its own and those of what it reads along the rank."""
        s = self.cascade.definitions[name]
        found = dict.fromkeys(conjuncts(s.domain))
        for a in s.reads:
            if a.tensor in self.loop.along:
                inner = self.cascade.definitions[a.tensor].reduce
                found |= dict.fromkeys(c for c in self._points(a.tensor) if not inner or not depends(c, inner.ranks))
        return list(found)

    # -- outside --

    def _after(self, s: Einsum) -> Einsum:
        """A statement outside the loop, reading the last running values."""
        values = {a: self._final(a) for a in s.reads if a.tensor in self.running}
        return s.replace(expr=s.expr.xreplace(values), domain=s.domain.xreplace(values)) if values else s
