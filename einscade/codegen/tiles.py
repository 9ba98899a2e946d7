"""A serial nest at the level of one tile: what both emitters print.

Comes in: a `SerialNest`. Goes out: a `TileLoop`, in which

* the split rank is a *coordinate* again: where the cascade writes `m1*M0 + m0`, the tile form writes `m`, with
  `m_lo <= m < m_hi` in one iteration. The serial rank is gone from every value that lives in the loop;
* a scan is a *state*: `G` is its value before the iteration, `G_new` after it;
* every statement knows which of its points exist (`keep`), and what its value is at the points that do not (`fill`),
  so that masks are applied only where a reduction would notice;
* a maximum over nothing (-oo) is replaced by 0 (`Finite`) where it is subtracted under an exponential, which makes
  such a row all zeros rather than NaN;
* corrections that several states share are computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import sympy
from sympy.logic.boolalg import And, Boolean, Or

from einscade.codegen.loops import SerialNest
from einscade.codegen.row_conditions import Placed, apart
from einscade.codegen.source import Unsupported
from einscade.ir.cascade import MONOIDS, Cascade, Einsum
from einscade.ir.expr import Access, Expr, accesses, var
from einscade.ir.text import print_expr
from einscade.passes.domains import implied_limit
from einscade.passes.existence import Existence, existence
from einscade.passes.terms import conjuncts

__all__ = [
    "Finite", "State", "Statement", "TileLoop", "guarded", "may_be_infinite", "missing_value", "reads_maxima",
    "tile_loop", "whole_scans", "with_fills",
]  # fmt: skip


class Finite(sympy.Function):
    """`x`, or 0 where x is infinite: for the reference value of an exponential over an empty row."""

    nargs = (1,)
    is_extended_real = True


@dataclass(frozen=True)
class Statement:
    """One step on a tile. `ranks` are those of the value (coordinates among them); `source` is the Einsum it
    implements, None for helpers. `keep`: the points iterated over that exist; `row`: those of the result that do.
    `mask_operand`: a reduction must itself replace the missing points of its operand by its identity. `fill`: the
    constant to put at the missing points of the result, None if none is needed."""

    name: str
    ranks: tuple[str, ...]
    expr: Expr
    monoid: str | None = None
    reduced: tuple[str, ...] = ()
    keep: Boolean = sympy.true
    row: Boolean = sympy.true
    fill: Expr | None = None
    mask_operand: bool = False
    source: Einsum | None = None

    @property
    def iterated(self) -> tuple[str, ...]:
        return self.ranks + self.reduced

    @cached_property
    def reads(self) -> tuple[Access, ...]:
        return tuple(dict.fromkeys(accesses(self.expr) + accesses(self.keep)))

    @property
    def identity(self) -> Expr | None:
        """What the reduction gives over nothing; None for a statement that reduces nothing, and for topk."""
        return MONOIDS[self.monoid].identity if self.monoid is not None and self.monoid in MONOIDS else None


@dataclass(frozen=True)
class State:
    """A scan as a variable of the loop: `name` before an iteration, `new` after it, `init` before the first."""

    name: str
    new: str
    ranks: tuple[str, ...]
    init: Expr


@dataclass(frozen=True)
class TileLoop:
    """`inner` pairs each rank that runs within an iteration with its coordinate; all coordinates run over the same
    `lo <= x < hi`, where `lo = serial * step` and `hi = min(lo + step, limit)` (no limit: None). `domain` is where any
    point of the body exists; `skippable` says that an iteration without one changes no state and may be left out."""

    nest: SerialNest
    inner: tuple[tuple[str, str], ...]
    step: Expr
    limit: Expr | None
    prologue: tuple[Statement, ...]
    states: tuple[State, ...]
    body: tuple[Statement, ...]
    epilogue: tuple[Statement, ...]
    domain: Boolean
    skippable: bool

    @cached_property
    def coordinates(self) -> tuple[str, ...]:
        return tuple(x for _, x in self.inner)

    @property
    def coordinate(self) -> str | None:
        return self.coordinates[0] if self.coordinates else None

    @cached_property
    def statements(self) -> tuple[Statement, ...]:
        return self.prologue + self.body + self.epilogue


def whole_scans(cascade: Cascade) -> Existence:
    """Where the points of a cascade exist, if every scan has all of its steps. Raises `Unsupported` else: a scan ends
    at the first step that is missing, and what the emitters print would go on."""
    found = existence(cascade)
    if found.ended:
        scan, condition = found.ended
        raise Unsupported(
            f"the scan {scan.name} has a step only if {print_expr(condition)}, and no values after one that is "
            "missing: choose with Where, inside the expression, what such a step does"
        )
    return found


# -- missing points ----------------------------------------------------------------------------------------------------


def missing_value(expr: Expr, missing: Mapping[str, Expr], undefined: Collection[str] = ()) -> Expr | None:
    """The expression's value where the tensors in `missing` are at the given constants, if it is one whatever the
    other values are: finite ones, but for those of the tensors in `undefined`."""
    if isinstance(expr, Access):
        return missing.get(expr.tensor)
    if expr.is_number:
        return expr
    if isinstance(expr, sympy.exp):
        inner = missing_value(expr.args[0], missing, undefined)
        return None if inner is None else sympy.exp(inner)
    if isinstance(expr, sympy.Add):
        parts = [missing_value(a, missing, undefined) for a in expr.args]
        if any(p is not None and p.is_infinite for p in parts):
            infinite = {p for p in parts if p is not None and p.is_infinite}
            return infinite.pop() if len(infinite) == 1 else None
        return sympy.Add(*(p for p in parts if p is not None)) if None not in parts else None
    if isinstance(expr, sympy.Mul):
        parts = [missing_value(a, missing, undefined) for a in expr.args]
        if any(p == 0 for p in parts):  # what divides may itself be 0 there, and a power may have overflowed
            others = [a for a, p in zip(expr.args, parts, strict=True) if p is None]
            divided = any(isinstance(a, sympy.Pow) and a.exp.is_negative and a.has(Access) for a in expr.args)
            wild = divided or any(_may_overflow(a) or _may_be_undefined(a, undefined) for a in others)
            return None if wild else sympy.Integer(0)
        return sympy.Mul(*(p for p in parts if p is not None)) if None not in parts else None
    if isinstance(expr, sympy.Pow) and expr.exp.is_positive:
        base = missing_value(expr.base, missing, undefined)
        return None if base is None else base**expr.exp
    return None


def _may_be_undefined(expr: Expr, undefined: Collection[str]) -> bool:
    """Whether reads of 0, as missing points have them, may give what is no number: what divides, a logarithm."""
    divides = any(x.exp.is_negative and x.base.has(Access) and not _positive(x.base) for x in expr.atoms(sympy.Pow))
    return divides or any(x.has(Access) for x in expr.atoms(sympy.log)) or _reads_any(expr, undefined)


def _positive(expr: Expr) -> bool:
    """Whether the expression is more than 0 whatever the tensors are: a logistic function's divisor."""
    if isinstance(expr, sympy.Add):
        return any(x.is_number and x.is_positive for x in expr.args) and all(map(_positive, expr.args))
    return bool(expr.is_number and expr.is_positive) or isinstance(expr, sympy.exp)


def _may_overflow(expr: Expr) -> bool:
    """Whether finite tensors may give an infinite value: a decay between two positions, taken the wrong way round."""
    powers = [x for x in expr.atoms(sympy.exp, sympy.Pow) if not x.is_Pow or not x.exp.is_number]
    return any(x.has(Access) for x in powers)


# -- one nest ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def tile_loop(cascade: Cascade, nest: SerialNest, clip: bool = True) -> TileLoop:
    """The tile form of a serial nest of a planned cascade. `clip`: the last tile is cut short, so that points beyond
    the end need no mask; else tiles are whole and the end is a condition like any other."""
    return _Builder(cascade, nest, clip).build()


class _Builder:
    def __init__(self, cascade: Cascade, nest: SerialNest, clip: bool) -> None:
        self.cascade, self.nest, self.clip = cascade, nest, clip
        self.there = whole_scans(cascade)
        self.taken = {*cascade.tensors, *cascade.rank_table, *cascade.symbols}
        self.step = self._step()
        self.coordinates = self._coordinates()
        self.states = {e.name: self._state(e) for e in nest.scans}
        self.body_names = {e.name for e in nest.body}

    def fresh(self, prefix: str) -> str:
        names = (prefix, *(f"{prefix}{i}" for i in range(1, len(self.taken) + 2)))
        name = next(n for n in names if n not in self.taken)
        self.taken.add(name)
        return name

    def _step(self) -> Expr:
        return self.cascade.extent(self.nest.tile) if self.nest.tile else sympy.Integer(1)

    def _coordinates(self) -> dict[str, str]:
        """Every rank of the body that is the inner part of the split rank, with the name of its coordinate."""
        if self.nest.tile is None:
            return {}
        origin = self.cascade.rank_table[self.nest.serial].origin
        used = dict.fromkeys(r for e in self.nest.body for r in e.ranks)
        inner = [
            r
            for r in used
            if r != self.nest.serial
            and self.cascade.rank_table[r].origin == origin
            and self.cascade.extent(r) == self.step
        ]
        inner.sort(key=lambda r: r != self.nest.tile)
        prefix = origin or self.nest.tile
        iterated = {r for e in self.nest.einsums for r in e.ranks} | {*self.cascade.tensors, *self.cascade.symbols}
        return {r: prefix if i == 0 and prefix not in iterated else self.fresh(prefix) for i, r in enumerate(inner)}

    def _state(self, e: Einsum) -> State:
        assert e.scan is not None
        ranks = tuple(r for r in e.output.ranks if r != self.nest.serial)
        return State(e.name, self.fresh(f"{e.name}_new"), ranks, e.scan.init)

    # -- rewriting into tile form --

    def local_ranks(self, ranks: Iterable[str]) -> tuple[str, ...]:
        return tuple(self.coordinates.get(r, r) for r in ranks if r != self.nest.serial)

    def rewrite(self, expr: sympy.Basic, *, in_body: bool) -> sympy.Basic:
        """Coordinates for split indices; the serial index dropped from reads of values in the loop."""
        if in_body:
            start = var(self.nest.serial) * self.step
            expr = expr.xreplace({var(u): var(x) - start for u, x in self.coordinates.items()})
        return self._reads(expr, in_body)

    def _reads(self, expr: sympy.Basic, in_body: bool) -> sympy.Basic:
        if isinstance(expr, Access):
            index = [self._reads(i, in_body) for i in expr.index]
            if expr.tensor in self.body_names:
                return self._local_read(expr, index, in_body)
            return Access(expr.tensor, *index)
        if not expr.args or not expr.has(Access):
            return expr
        return expr.func(*(self._reads(a, in_body) for a in expr.args))

    def _local_read(self, access: Access, index: list[Expr], in_body: bool) -> Access:
        ranks = self.cascade.tensors[access.tensor].ranks
        t = ranks.index(self.nest.serial)
        name = access.tensor
        if in_body and name in self.states and index[t] == var(self.nest.serial):
            name = self.states[name].new
        start = var(self.nest.serial) * self.step
        local = [i + start if r in self.coordinates else i for r, i in zip(ranks, index, strict=True)]
        return Access(name, *(i for r, i in zip(ranks, local, strict=True) if r != self.nest.serial))

    def statement(self, placed: Placed, *, in_body: bool, limit: Boolean = sympy.true) -> Statement:
        e = placed.einsum
        keep = And(*(c for c in conjuncts(self.rewrite(placed.points, in_body=in_body)) if c != limit))
        row = And(*(c for c in conjuncts(self.rewrite(placed.results, in_body=in_body)) if c != limit))
        name = self.states[e.name].new if e.name in self.states else e.name
        return Statement(
            name,
            self.local_ranks(e.output.ranks),
            self.rewrite(e.expr, in_body=in_body),
            e.reduce.monoid if e.reduce else None,
            self.local_ranks(e.reduce.ranks) if e.reduce else (),
            keep,
            row,
            source=e,
        )

    # -- assembly --

    def build(self) -> TileLoop:
        limit = self._limit()
        implied = sympy.true
        if limit is not None:
            implied = sympy.Lt(var(next(iter(self.coordinates.values()))), limit)

        def made(loop: Sequence[Placed]) -> list[Statement]:
            return [self._drop_limits(self.statement(s, in_body=True, limit=implied), limit) for s in loop]

        loop, after = ([Placed.of(e, self.there) for e in part] for part in (self.nest.body, self.nest.epilogue))
        body = made(loop)
        skippable = self._skippable(body)
        parted = apart(self.cascade, self.nest, self.there, self.coordinates) if skippable else None
        if parted is not None:
            loop, after = parted
            body = made(loop)
        prologue = [self.statement(Placed.of(e, self.there), in_body=False) for e in self.nest.prologue]
        epilogue = [self.statement(s, in_body=False) for s in after]
        domain = self._domain(body)
        body = self._share_corrections(body)
        if may_be_infinite(body, (t.name for t in self.cascade.inputs)) or reads_maxima(self.cascade, self.nest.inputs):
            maxima = {s.name for s in body if s.monoid in ("max", "min")}
            maxima |= {state.new for state in self.states.values() if state.init.is_infinite}
            body = guarded(body, maxima, self.fresh)
        body = with_fills(body)
        return TileLoop(
            self.nest,
            tuple(self.coordinates.items()),
            self.step,
            limit,
            tuple(with_fills(prologue)),
            tuple(self.states.values()),
            tuple(body),
            tuple(with_fills(epilogue)),
            domain,
            skippable,
        )

    def _limit(self) -> Expr | None:
        """The end of the coordinates, where every statement that iterates over one says that it ends there."""
        if not self.clip:
            return None
        sizes = frozenset(self.cascade.symbols)
        found: set[Expr | None] = set()
        for e in self.nest.body:
            points = self.rewrite(self.there.points[e.name], in_body=True)
            found |= {implied_limit(points, x, sizes) for u, x in self.coordinates.items() if u in e.ranks}
        return found.pop() if len(found) == 1 else None

    def _drop_limits(self, s: Statement, limit: Expr | None) -> Statement:
        """Points below the limit are all that the loop visits: the comparison itself need not be printed."""
        if limit is None:
            return s
        sizes = frozenset(self.cascade.symbols)

        def rest(predicate: Boolean) -> Boolean:
            kept = [c for c in conjuncts(predicate)
                    if not any(implied_limit(c, x, sizes) == limit for x in self.coordinates.values())]  # fmt: skip
            return And(*kept)

        return replace(s, keep=rest(s.keep), row=rest(s.row))

    def _domain(self, body: list[Statement]) -> Boolean:
        """Where a reduction along the coordinates finds points; data made in the loop counts as always there."""
        local = self.body_names | {s.new for s in self.states.values()}
        inner = set(self.coordinates.values())
        parts: list[Boolean] = []
        for s in body:
            if not inner & set(s.iterated) or (s.monoid is None and not s.source):
                continue
            if s.monoid is not None and inner & set(s.reduced):
                outer = [c for c in conjuncts(s.keep) if not any(a.tensor in local for a in accesses(c))]
                parts.append(And(*outer))
        return Or(*parts) if parts else sympy.true

    def _skippable(self, body: list[Statement]) -> bool:
        """Whether an iteration without points leaves every state as it was and writes nothing."""
        inner = set(self.coordinates.values())
        if not inner or any(name in self.nest.outputs for name in self.body_names - set(self.states)):
            return False
        empty: dict[str, Expr] = {}
        for s in body:
            if s.identity is not None and inner & set(s.reduced):
                empty[s.name] = s.identity
        for state in self.states.values():
            update = next(s for s in body if s.name == state.new)
            unchanged = {
                a: (empty[a.tensor] if a.tensor in empty else Access(self._old(a.tensor), *a.index))
                for a in update.expr.atoms(Access)
            }
            before = Access(state.name, *map(var, state.ranks))
            if update.monoid is not None or sympy.expand(update.expr.xreplace(unchanged) - before) != 0:
                return False
        return True

    def _old(self, name: str) -> str:
        return next((s.name for s in self.states.values() if s.new == name), name)

    def _share_corrections(self, body: list[Statement]) -> list[Statement]:
        """A factor between a state's old and new value that several states use becomes a value of its own."""
        news = {s.new for s in self.states.values()}
        updates = [s for s in body if s.name in news]
        count = Counter(x for s in updates for x in s.expr.atoms(sympy.exp) if x.has(Access))
        for factor in sorted((x for x, n in count.items() if n > 1), key=sympy.default_sort_key):
            name = self.fresh("C")
            used = [s for s in self.states.values() if factor.has(Access) and _reads_any(factor, (s.name, s.new))]
            ranks = max((s.ranks for s in used), key=len)
            if not all(set(ranks) <= set(s.ranks) for s in updates if s.expr.has(factor)):
                continue
            access = Access(name, *map(var, ranks))
            first = next(i for i, s in enumerate(body) if s.expr.has(factor))
            body = [replace(s, expr=s.expr.xreplace({factor: access})) for s in body]
            body.insert(first, Statement(name, ranks, factor))
        return body


def may_be_infinite(statements: Iterable[Statement], inputs: Iterable[str]) -> bool:
    """Whether a row can be without points, or hold only infinite ones: masks, infinite constants, additive inputs."""
    inputs = set(inputs)
    for s in statements:
        if s.keep != sympy.true or s.expr.has(sympy.oo, -sympy.oo):
            return True
        terms = sympy.Add.make_args(s.expr)
        if s.monoid is None and len(terms) > 1 and any(a.tensor in inputs for t in terms for a in accesses(t)):
            return True
    return False


def reads_maxima(cascade: Cascade, inputs: Iterable[str]) -> bool:
    """Whether a nest with these inputs reads a maximum, made in another nest, that nothing may have entered."""

    def is_extreme(name: str) -> bool:
        made = cascade.definitions.get(name)
        if made is None:
            return False
        if made.scan is not None:
            return bool(made.scan.init.is_infinite)
        if made.reduce is not None:
            return made.reduce.monoid in ("max", "min")
        return isinstance(made.expr, Access) and is_extreme(made.expr.tensor)

    return any(map(is_extreme, inputs))


def guarded(statements: list[Statement], extremes: Iterable[str], fresh: Callable[[str], str]) -> list[Statement]:
    """`exp(x - G)` where G is one of `extremes` (maxima) becomes `exp(x - Finite(G))`, a value of its own."""
    makers = {s.name: s for s in statements if s.name in set(extremes)}
    guards: dict[str, Statement] = {}

    def finite(exponential: sympy.exp) -> Expr:
        table: dict[Access, Access] = {}
        for a in exponential.atoms(Access):
            maker = makers.get(a.tensor)
            if maker is None or exponential.args[0].coeff(a) != -1 or a.index != tuple(map(var, maker.ranks)):
                continue
            if a.tensor not in guards:
                guards[a.tensor] = Statement(fresh(f"{a.tensor.removesuffix('_new')}_ref"), maker.ranks, Finite(a))
            table[a] = Access(guards[a.tensor].name, *a.index)
        return exponential.xreplace(table)

    statements = [replace(s, expr=s.expr.xreplace({x: finite(x) for x in s.expr.atoms(sympy.exp)})) for s in statements]
    result: list[Statement] = []
    for s in statements:
        result.append(s)
        if s.name in guards:
            result.append(guards[s.name])
    return result


def _reads_any(expr: sympy.Basic, names: Iterable[str]) -> bool:
    return any(a.tensor in names for a in accesses(expr))


def with_fills(statements: list[Statement]) -> list[Statement]:
    """Decide where masks are applied: at a value (`fill`, where `row` fails) if a reduction reads it, else at the
    reduction's operand (`mask_operand`, where `keep` fails). A reduction needs no mask where each condition of its
    own is one of a tensor that it reads, whose fill makes the operand the identity."""
    missing: dict[str, dict[Boolean, Expr]] = {}  # by tensor: its value where a condition of its points fails
    undefined: set[str] = set()  # what may be no number at missing points
    result: list[Statement] = []
    for i, s in enumerate(statements):
        rows = conjuncts(s.row)
        aligned = {
            t.name for t in result if all(a.index == tuple(map(var, t.ranks)) for a in s.reads if a.tensor == t.name)
        }
        known = {
            c: missing_value(s.expr, {n: v[c] for n, v in missing.items() if c in v and n in aligned}, undefined)
            for c in conjuncts(s.keep)
        }
        values = {c: v for c in rows if s.monoid is None and (v := known.get(c)) is not None}
        if (identity := s.identity) is not None:
            s = replace(s, mask_operand=any(v != identity for c, v in known.items() if c not in rows))
        if rows:
            wanted = _wanted(s, statements[i + 1 :])
            if wanted is not None and any(values.get(c) != wanted for c in rows):
                s, values = replace(s, fill=wanted), dict.fromkeys(rows, wanted)
        missing[s.name] = values
        if s.monoid is None and s.fill is None and _may_be_undefined(s.expr, undefined):
            undefined.add(s.name)
        result.append(s)
    return result


def _wanted(s: Statement, later: list[Statement]) -> Expr | None:
    """The identity of the first reduction that would be right if this value's missing points were at it."""
    for user in later:
        identity = user.identity
        if identity is not None and any(a.tensor == s.name for a in user.reads):
            covered = set(conjuncts(s.row)) <= set(conjuncts(user.keep))
            if covered and missing_value(user.expr, {s.name: identity}) == identity:
                return identity
    return None
