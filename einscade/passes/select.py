"""Select: an estimator cascade scores blocks, and the main cascade visits only the best of them.

Comes in: a cascade with scores S[.., p, m] = sum(e) q[p] * k[m] and what is computed from them. Goes out: an estimator,
the same scores between the means of blocks of queries and of keys (by bilinearity the mean score of the block pair),
its top k key blocks for every query block as an index tensor, and the main cascade restricted to them: the selected
keys are a rank of their own, s, and a gather where a key is read, m = I[.., pb, s // B] * B + s % B. To everything
after (online, splits, schedules) that is a key rank like any other. Blocks in which the domain has no point are not
scored; within a selected block the domain holds as before. Approximate: it drops the blocks that are not selected.
(MInference, arXiv 2407.02490; XAttention, arXiv 2503.16428; SeerAttention, arXiv 2410.13276.)
"""

from __future__ import annotations

from collections.abc import Iterator
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
    Tensor,
    Where,
    ceil_div,
    free_vars,
    var,
)
from einscade.passes.domains import possible
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, closure, redirect, wide
from einscade.passes.terms import factors

__all__ = ["Select"]


@dataclass(frozen=True)
class Select:
    """Keep, for every block of `query_block` queries, the `keep` best blocks of `key_block` keys.

    `always` is a predicate over the query and key variables: block pairs in which it may hold are taken first, the
    diagonal (`Eq(m, p)`), a sink (`m < 64`). They count towards `keep`.
    """

    query: str
    key: str
    keep: int
    query_block: int = 64
    key_block: int = 64
    always: Boolean = sympy.false
    name: ClassVar[str] = "select"
    identity: ClassVar[str] = (
        "sum(m) x[m] ≈ sum(s) x[I[s//B]*B + s%B], I = topk(mb) mean(q in block)·mean(k in block mb)"
    )
    exact: ClassVar[bool] = False
    error: ClassVar[str] = "relative Frobenius error of the outputs against the cascade before"

    def __post_init__(self) -> None:
        for option in ("keep", "query_block", "key_block"):
            if getattr(self, option) < 1:
                raise ValueError(f"Select: {option}={getattr(self, option)}; it must be at least 1")

    def apply(self, cascade: Cascade) -> Cascade:
        pairs = [s for s in cascade.body if {self.query, self.key} <= set(s.ranks)]
        scores = next((s for s in pairs if self._is_score(s)), None)
        if scores is None:
            raise NotApplicable(f"no sum of products over a query at {self.query} and a key at {self.key}")
        split = _Split.of(self, cascade)
        cascade = cascade.replace(ranks=(*cascade.ranks, *split.ranks))
        names = Names(cascade)
        estimator, index = split.estimator(scores, cascade, names)

        region = {s.name for s in pairs}
        region |= {s.name for s in cascade.body if region & closure(cascade, [s.name])}
        body: list[Einsum] = []
        views: list[Einsum] = []
        for statement in cascade.body:
            if statement is scores:
                body += estimator
            if statement.name not in region:
                body.append(statement)
                continue
            made = split.restricted(statement, cascade, region, index)
            if statement.name in cascade.outputs:
                made = made.replace(output=Tensor(names(f"{statement.name}b"), made.output.ranks, made.output.dtype))
                views.append(split.view(statement.output, made.output))
            body.append(made)
        return cascade.replace(body=(*body, *views))

    def _is_score(self, statement: Einsum) -> bool:
        """A sum of a product in which one factor has the query, another the key, and none both."""
        if statement.reduce is None or statement.reduce.monoid != "sum" or statement.scan is not None:
            return False
        if not {self.query, self.key} <= set(statement.output.ranks):
            return False
        sides = [free_vars(f) & {self.query, self.key} for f in factors(statement.expr)]
        plain = all(isinstance(f, Access) for f, side in zip(factors(statement.expr), sides, strict=True) if side)
        single = [sides.count(frozenset((r,))) == 1 for r in (self.query, self.key)]
        return plain and all(single) and max(map(len, sides)) == 1


@dataclass(frozen=True)
class _Split:
    """The ranks: query = block * query_block + row; key = key block * key_block + column in the estimator, and
    index[.., slot] * key_block + place % key_block with slot = place // key_block in the main cascade."""

    options: Select
    queries: Expr
    keys: Expr
    ranks: tuple[Rank, Rank, Rank, Rank, Rank, Rank]

    @classmethod
    def of(cls, options: Select, cascade: Cascade) -> _Split:
        names, query, key = Names(cascade), options.query, options.key
        queries, keys = cascade.extent(query), cascade.extent(key)
        rows, columns = sympy.Integer(options.query_block), sympy.Integer(options.key_block)
        blocks = ceil_div(keys, columns)
        kept = sympy.Min(sympy.Integer(options.keep), blocks)
        ranks = (
            Rank(names(f"{query}b"), ceil_div(queries, rows), query),
            Rank(names(f"{query}u"), rows, query),
            Rank(names(f"{key}b"), blocks, key),
            Rank(names(f"{key}u"), columns, key),
            Rank(names(f"{key}k"), kept, key),
            Rank(names(f"{key}s"), kept * columns, key),
        )
        return cls(options, queries, keys, ranks)

    @property
    def block(self) -> sympy.Symbol:
        return var(self.ranks[0].name)

    @property
    def query(self) -> Expr:
        return self.block * self.ranks[1].extent + var(self.ranks[1].name)

    @property
    def key(self) -> Expr:
        """Of a key in a block, by the block's own number."""
        return var(self.ranks[2].name) * self.ranks[3].extent + var(self.ranks[3].name)

    def selected(self, index: Access) -> Expr:
        """Of a selected key, by its place among them."""
        place, columns = var(self.ranks[5].name), self.ranks[3].extent
        at = {var(self.ranks[4].name): FloorDiv(place, columns)}
        return index.xreplace(at) * columns + Mod(place, columns)

    # -- the estimator --

    def estimator(self, scores: Einsum, cascade: Cascade, names: Names) -> tuple[tuple[Einsum, ...], Access]:
        """Pooled operands, block scores and the index of the best; and the index as the main cascade reads it."""
        options, (block, row, key_block, column, slot, _) = self.options, self.ranks
        made, pooled = [], {}
        for factor in factors(scores.expr):
            for rank, blocks, inside, position in (
                (options.query, block, row, self.query),
                (options.key, key_block, column, self.key),
            ):
                if rank in free_vars(factor):
                    mean, read = _pooled(factor, rank, blocks, inside, position, cascade, names)
                    made.append(mean)
                    pooled[factor] = read
        ranks = tuple({options.query: block.name, options.key: key_block.name}.get(r, r) for r in scores.output.ranks)
        estimate = Tensor(names("E"), ranks, wide(scores.output.dtype))
        index = Tensor(names("I"), (*(r for r in ranks if r != key_block.name), slot.name), "i32")
        best = Where(self._reached(options.always, cascade), sympy.oo, estimate())
        made += (
            Einsum(estimate, scores.expr.xreplace(pooled), scores.reduce, self._reached(scores.domain, cascade)),
            Einsum(index, best, Reduction("topk", (key_block.name,), slot.name)),
        )
        return tuple(made), index()

    def _reached(self, predicate: Boolean, cascade: Cascade) -> Boolean:
        """False only where a block pair has no point of the predicate."""
        (_, row, key_block, column, *_), options = self.ranks, self.options
        first = {options.query: self.block * row.extent, options.key: var(key_block.name) * column.extent}
        size = {options.query: row.extent, options.key: column.extent}
        starts = {r.name: first.get(r.name, var(r.name)) for r in cascade.ranks}
        return possible(predicate, {r: (start, start + size.get(r, 1) - 1) for r, start in starts.items()})

    # -- the main cascade --

    def restricted(self, statement: Einsum, cascade: Cascade, region: set[str], index: Access) -> Einsum:
        """The statement over selected blocks."""
        query, key = self.options.query, self.options.key
        if (key in statement.output.ranks and query not in statement.output.ranks) or query not in statement.ranks:
            raise NotApplicable(f"{statement.name} needs every {key}, not a selection for each {query}")
        if statement.scan is not None:
            raise NotApplicable(f"{statement.name} is a scan: select before the one-pass form")
        if key in statement.ranks and not free_vars(index) - {r.name for r in self.ranks} <= set(statement.ranks):
            raise NotApplicable(f"{statement.name} lacks ranks of the selection {index}")
        at = {var(query): self.query, var(key): self.selected(index)}

        def read(access: Access) -> Expr:
            if access.tensor not in region:
                return access.xreplace(at)
            return Access(access.tensor, *self._spread(access, cascade.tensors[access.tensor].ranks))

        outside = [a for a in statement.reads if a.tensor not in region]
        keyed = any(a.tensor in region and key in free_vars(a) for a in statement.reads)
        made = redirect(statement, read)
        limits = []
        if any(query in free_vars(a) for a in outside) or self._reduces(statement, query):
            limits.append(self.query < self.queries)
        if key in statement.ranks and not keyed:
            limits.append(at[var(key)] < self.keys)
        reduce = statement.reduce
        return made.replace(
            output=Tensor(statement.name, self._parts(statement.output.ranks), statement.output.dtype),
            expr=made.expr.xreplace(at),
            domain=And(made.domain.xreplace(at), *limits),
            reduce=Reduction(reduce.monoid, self._parts(reduce.ranks), reduce.slot) if reduce else None,
        )

    def _reduces(self, statement: Einsum, rank: str) -> bool:
        return statement.reduce is not None and rank in statement.reduce.ranks

    def _parts(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        block, row, *_, place = (r.name for r in self.ranks)
        parts = {self.options.query: (block, row), self.options.key: (place,)}
        return tuple(part for r in ranks for part in parts.get(r, (r,)))

    def _spread(self, access: Access, ranks: tuple[str, ...]) -> Iterator[Expr]:
        """The index of a tensor of the region, over the new ranks."""
        for rank, index in zip(ranks, access.index, strict=True):
            if rank not in (self.options.query, self.options.key):
                yield index
            elif index != var(rank):
                raise NotApplicable(f"{access} is not read at its own {rank}")
            else:
                yield from map(var, self._parts((rank,)))

    def view(self, output: Tensor, blocked: Tensor) -> Einsum:
        """An output of the cascade, from its blocked form."""
        query, rows = self.options.query, self.options.query_block
        if self.options.key in output.ranks:
            raise NotApplicable(f"the output {output.name} has every {self.options.key}")
        at = {query: (FloorDiv(var(query), rows), Mod(var(query), rows))}
        return Einsum(output, Access(blocked.name, *(i for r in output.ranks for i in at.get(r, (var(r),)))))


def _pooled(
    factor: Access, rank: str, blocks: Rank, inside: Rank, position: Expr, cascade: Cascade, names: Names
) -> tuple[Einsum, Access]:
    """The mean of a tensor over each block of a rank, and its access in place of `factor`."""
    tensor = cascade.tensors[factor.tensor]
    axes = [axis for axis, index in enumerate(factor.index) if rank in free_vars(index)]
    if len(axes) != 1 or factor.index[axes[0]] != var(rank):
        raise NotApplicable(f"{factor} is not read at {rank} itself, so a block of it has no mean")
    (axis,) = axes
    own, extent = tensor.ranks[axis], cascade.extent(tensor.ranks[axis])
    mean = Tensor(
        names(f"{tensor.name}mean"), tuple(blocks.name if r == own else r for r in tensor.ranks), wide(tensor.dtype)
    )
    count = sympy.Min(inside.extent, extent - var(blocks.name) * inside.extent)
    member = tensor(*(position if r == own else var(r) for r in tensor.ranks))
    made = Einsum(mean, member / count, Reduction("sum", (inside.name,)), position < extent)
    return made, Access(mean.name, *(var(blocks.name) if i == axis else x for i, x in enumerate(factor.index)))
