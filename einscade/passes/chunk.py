"""Chunk: a causal sum of products as a scan over chunks of keys.

Comes in: O[p] = sum(m) phi(p, m) q[p] k[m] v[m] with a domain that shows a query all keys of the chunks before its
own and none of those after (causal). Goes out: inside a chunk the quadratic sum; for all chunks before, a state that a
scan carries from chunk to chunk. What couples p and m must separate: phi(p, m) = r(p, p') * phi(p', m), r free of m.
Then the keys are summed once, as the last position of their chunk sees them, and r moves that view. For a decay,
phi = l^(p - m) and r = l^(p - p'): every exponent stays nonnegative. r is derived with sympy; products without a
coupling (r = 1), gates from a running sum (exp(g[p] - g[m])) and gates for every feature are the same case.
(Lightning Attention, arXiv 2405.17381; gated linear attention, arXiv 2312.06635.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.ir import (
    Access,
    Cascade,
    Einsum,
    Expr,
    FloorDiv,
    Mod,
    Rank,
    Reduction,
    Scan,
    Tensor,
    accesses,
    ceil_div,
    free_vars,
    var,
)
from einscade.ir.intervals import Ranges, decide
from einscade.passes.contract import Product, contract, flatten
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, redirect, wide, without_unused
from einscade.passes.terms import factors

__all__ = ["Chunk"]


@dataclass(frozen=True)
class Chunk:
    """Turn every sum over `key` that keeps `query` into a scan over chunks of `size` positions."""

    query: str
    key: str
    size: int = 64
    name: ClassVar[str] = "chunk"
    identity: ClassVar[str] = (
        "sum(m <= p) phi(p,m) k[m] = sum(p' < m <= p) phi(p,m) k[m] + r(p,p') * sum(m <= p') phi(p',m) k[m]"
        " where phi(p,m) = r(p,p') * phi(p',m)"
    )
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Chunk: size={self.size}; it must be at least 1")

    def apply(self, cascade: Cascade) -> Cascade:
        sums = [
            s
            for s in cascade.body
            if s.reduce and s.reduce.monoid == "sum" and self.key in s.reduce.ranks and self.query in s.output.ranks
        ]
        if not sums:
            raise NotApplicable(f"no sum over {self.key} for every {self.query}")
        chunks = _Chunks.of(self, cascade)
        cascade = cascade.replace(ranks=(*cascade.ranks, *chunks.ranks))
        pairs: dict[str, Tensor] = {}
        for statement in sums:
            product, cascade = flatten(statement, cascade, self.key)
            made = chunks.statements(statement, product, cascade, pairs)
            at = cascade.body.index(statement)
            cascade = cascade.replace(body=(*cascade.body[:at], *made, *cascade.body[at + 1 :]))
        return without_unused(cascade)


@dataclass(frozen=True)
class _Chunks:
    """Query position `chunk * size + row`, key position `chunk * size + column`."""

    query: str
    key: str
    size: int
    queries: Expr
    keys: Expr
    ranks: tuple[Rank, Rank, Rank]

    @classmethod
    def of(cls, rewrite: Chunk, cascade: Cascade) -> _Chunks:
        names = Names(cascade)
        query, key, size = rewrite.query, rewrite.key, sympy.Integer(rewrite.size)
        ranks = (
            Rank(names(f"{query}c"), ceil_div(cascade.extent(query), size), origin=query),
            Rank(names(f"{query}u"), size, origin=query),
            Rank(names(f"{key}u"), size, origin=key),
        )
        return cls(query, key, rewrite.size, cascade.extent(query), cascade.extent(key), ranks)

    @property
    def chunk(self) -> sympy.Symbol:
        return var(self.ranks[0].name)

    @property
    def position(self) -> Expr:
        """Of a query."""
        return self.chunk * self.size + var(self.ranks[1].name)

    @property
    def member(self) -> Expr:
        """Of a key."""
        return self.chunk * self.size + var(self.ranks[2].name)

    @property
    def at(self) -> dict[Expr, Expr]:
        return {var(self.query): self.position, var(self.key): self.member}

    @property
    def bounds(self) -> tuple[Boolean, Boolean]:
        """Where the positions of a query and of a key exist: the last chunk may be short."""
        return self.position < self.queries, self.member < self.keys

    def parts(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        chunk, row, column = (r.name for r in self.ranks)
        parts = {self.query: (chunk, row), self.key: (column,)}
        return tuple(part for r in ranks for part in parts.get(r, (r,)))

    def within(
        self, statement: Einsum, output: Tensor, cascade: Cascade, names: Names, pairs: dict[str, Tensor]
    ) -> list[Einsum]:
        """The statement inside a chunk, after the tensors over queries and keys that it reads, each made once (they
        are in `pairs` from then on)."""
        before: list[Einsum] = []

        def read(access: Access) -> Access:
            made = cascade.definitions.get(access.tensor)
            if made is None or not {self.query, self.key} <= set(made.output.ranks):
                return access.xreplace(self.at)
            index = dict(zip(made.output.ranks, access.index, strict=True))
            if index[self.query] != var(self.query) or index[self.key] != var(self.key):
                raise NotApplicable(f"{statement.name} reads {access} across positions")
            if access.tensor not in pairs:
                pairs[access.tensor] = Tensor(
                    names(f"{access.tensor}inner"), self.parts(made.output.ranks), wide(made.output.dtype)
                )
                before.extend(self.within(made, pairs[access.tensor], cascade, names, pairs))
            own = {r: (index[r],) for r in made.output.ranks if r not in (self.query, self.key)}
            return pairs[access.tensor](*(i for r in made.output.ranks for i in own.get(r, map(var, self.parts((r,))))))

        made = redirect(statement, read)
        bounds = () if any(a.tensor in pairs for a in statement.reads) else self.bounds
        reduce = statement.reduce
        inside = made.replace(
            output=output,
            expr=made.expr.xreplace(self.at),
            domain=And(*(_cancelled(c.xreplace(self.at)) for c in And.make_args(made.domain)), *bounds),
            reduce=Reduction(reduce.monoid, self.parts(reduce.ranks), reduce.slot) if reduce else None,
        )
        if inside.reduce is None or inside.reduce.monoid != "sum" or len(inside.reduce.ranks) == 1:
            return [*before, inside]
        conditions = tuple(c for c in And.make_args(inside.domain) if c != sympy.true)
        product = Product(factors(inside.expr), conditions, output.ranks, inside.reduce.ranks)
        return [*before, *contract(product, output, cascade, names)]

    def statements(
        self, statement: Einsum, product: Product, cascade: Cascade, pairs: dict[str, Tensor]
    ) -> tuple[Einsum, ...]:
        """What computes a sum: inside the chunk, the state of the chunks before, and what a query reads of it."""
        output, names = statement.output, Names(cascade)
        query, key = var(self.query), var(self.key)
        both = [x for x in product.factors if {self.query, self.key} <= free_vars(x)]
        coupled = [c for c in product.conditions if {self.query, self.key} <= free_vars(c)]
        phi = sympy.Mul(*both)
        ratio = self._ratio(phi)
        self._check_domain(coupled, output.name)
        # The references: the last position of this chunk, and of the one before, each within the sequence where a
        # tensor is read there (beyond it, the state is not read, or nothing yet).
        last, before = self.chunk * self.size + self.size - 1, self.chunk * self.size - 1
        earlier = _placed(ratio, _REFERENCE, before, sympy.Max(before, 0))
        here = earlier.xreplace({_POSITION: self.position})
        carried = _placed(earlier, _POSITION, last, sympy.Min(last, self.queries - 1))
        seen = _placed(phi, query, last, sympy.Min(last, self.queries - 1))

        of_key = [x for x in product.factors if self.key in free_vars(x) and x not in both]
        of_query = [x for x in product.factors if x not in both and x not in of_key]
        key_conditions = [c for c in product.conditions if self.key in free_vars(c) and c not in coupled]
        query_conditions = [c for c in product.conditions if c not in coupled and c not in key_conditions]
        chunk, _, column = (r.name for r in self.ranks)
        at_query, at_key = {query: self.position}, {key: self.member}
        query_bound, key_bound = self.bounds
        ranks = self.parts(product.ranks)
        inner = Tensor(names(f"{output.name}inner"), ranks, wide(output.dtype))

        # What a chunk adds to the state, as its last position sees it; the state; what a position reads of it.
        of_state = product.variables(*of_key, seen, carried)
        read = product.variables(*of_query, here) | set(product.ranks)
        shared = of_state & read - {self.key} | {self.query}
        state_ranks = tuple(chunk if r == self.query else r for r in (*product.ranks, *product.reduced) if r in shared)
        added = Tensor(names(f"{output.name}added"), state_ranks, wide(output.dtype))
        state = Tensor(names(f"{output.name}state"), state_ranks, wide(output.dtype))
        summed = Product(
            (*(x.xreplace(at_key) for x in of_key), seen.xreplace(at_key)),
            (*(c.xreplace(at_key) for c in key_conditions), key_bound),
            state_ranks,
            (column, *(r for r in product.reduced if r in of_state and r not in read)),
        )
        outer = Tensor(names(f"{output.name}outer"), ranks, wide(output.dtype))
        previous = state(*(self.chunk - 1 if r == chunk else var(r) for r in state_ranks))
        moved = Product(
            (*(x.xreplace(at_query) for x in of_query), here.xreplace(at_query), previous),
            (*(c.xreplace(at_query) for c in query_conditions), query_bound),
            ranks,
            tuple(r for r in product.reduced if r in read and r != self.key),
        )
        own = (FloorDiv(query, self.size), Mod(query, self.size))
        back = tuple(i for r in product.ranks for i in (own if r == self.query else (var(r),)))
        return (
            *contract(summed, added, cascade, names),
            Einsum(state, carried * previous + added(), scan=Scan(chunk, sympy.Integer(0))),
            *self.within(statement, inner, cascade, names, pairs),
            *contract(moved, outer, cascade, names),
            Einsum(output, inner(*back) + outer(*back)),
        )

    def _ratio(self, phi: Expr) -> Expr:
        """`r` with `phi(position, m) = r(position, reference) * phi(reference, m)`, if it is free of m."""
        query = var(self.query)
        ratio = _collected(phi.xreplace({query: _POSITION}) / phi.xreplace({query: _REFERENCE}))
        if self.key in free_vars(ratio):
            raise NotApplicable(f"{phi} does not separate: between two {self.query} its ratio depends on {self.key}")
        return ratio

    def _check_domain(self, conditions: Sequence[Boolean], name: str) -> None:
        """All keys of earlier chunks are seen, none of later ones."""
        apart = var("apart") * self.size  # a symbol: at least 1
        earlier = {var(self.query): self.position, var(self.key): self.member - apart}
        later = {var(self.query): self.position, var(self.key): self.member + apart}
        for condition in conditions:
            if decide(condition.xreplace(earlier), self.ranges) is not True:
                raise NotApplicable(f"{name}: {condition} may hide keys of earlier chunks from a query")
        if not any(decide(condition.xreplace(later), self.ranges) is False for condition in conditions):
            raise NotApplicable(f"{name}: keys after a query's chunk are not all hidden from it")

    @property
    def ranges(self) -> Ranges:
        return {r.name: (sympy.S.Zero, r.extent - 1) for r in self.ranks}


_POSITION, _REFERENCE = sympy.Dummy("position", integer=True), sympy.Dummy("reference", integer=True)


def _cancelled(condition: Boolean) -> Boolean:
    """A comparison without the terms that both sides have."""
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return condition
    terms = sympy.Add.make_args(sympy.expand(condition.lhs - condition.rhs))
    right = sympy.Add(*(-t for t in terms if t.could_extract_minus_sign()))
    return condition.func(sympy.Add(*(t for t in terms if not t.could_extract_minus_sign())), right)


def _placed(expr: Expr, symbol: sympy.Symbol, position: Expr, inside: Expr) -> Expr:
    """The expression with `symbol` at `position`, and, where it indexes a tensor, at `inside`."""
    reads = {a: a.xreplace({symbol: inside}) for a in accesses(expr)}
    return expr.xreplace(reads).xreplace({symbol: position})


def _collected(ratio: Expr) -> Expr:
    """A quotient of powers with the exponents of equal bases collected."""
    return sympy.powsimp(ratio).replace(
        lambda x: isinstance(x, (sympy.Pow, sympy.exp)),
        lambda x: x.func(*x.args[:-1], sympy.expand(x.args[-1])),
    )
