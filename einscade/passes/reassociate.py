"""Reassociate: compute a sum of products in the order that costs least.

Comes in: a cascade where a sum over a rank reads a product that is itself a contraction, (Q·K) V for linear attention.
Goes out: the same sums with the order of contraction chosen by cost over the extents, Q (K V) where that is cheaper,
because multiplication is associative and distributes over the sum. A domain between two ranks (causal) masks a factor
that has both, so it keeps the quadratic order; `chunk` deals with those. The absorption of projections into latent
attention is the same step over more factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import ClassVar

from einscade.ir import Cascade, Einsum
from einscade.passes.contract import contract, flatten, visits
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, without_unused

__all__ = ["Reassociate"]

MOST_SUMS = 4
"""Sums over the rank that are reordered together."""


@dataclass(frozen=True)
class Reassociate:
    """Reorder every sum over `rank`. `sizes` gives extents to compare costs at; what it lacks counts as large."""

    rank: str
    sizes: tuple[tuple[str, int], ...] = ()
    name: ClassVar[str] = "reassociate"
    identity: ClassVar[str] = "sum(m) (sum(e) q[e] * k[m,e]) * v[m] = sum(e) q[e] * (sum(m) k[m,e] * v[m])"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        sizes = dict(self.sizes)
        sums = [s for s in cascade.body if s.reduce and s.reduce.monoid == "sum" and self.rank in s.reduce.ranks]
        if not sums:
            raise NotApplicable(f"no sum over {self.rank}")
        # A product that two sums share is worth keeping only while one of them needs it: choose for all at once.
        best, fewest, reasons = cascade, visits(cascade.body, cascade, sizes), []
        for chosen in chain.from_iterable(combinations(sums[:MOST_SUMS], n + 1) for n in range(len(sums))):
            try:
                candidate = _reordered(cascade, chosen, self.rank, sizes)
            except NotApplicable as reason:
                reasons.append(str(reason))
                continue
            visited = visits(candidate.body, candidate, sizes)
            if visited < fewest:
                best, fewest = candidate, visited
        if best == cascade:
            raise NotApplicable("; ".join(dict.fromkeys(reasons)) or f"{fewest} points visited, no order visits fewer")
        return best


def _reordered(cascade: Cascade, sums: Sequence[Einsum], rank: str, sizes: Mapping[str, int]) -> Cascade:
    """The cascade with these sums in their cheapest order."""
    for statement in sums:
        product, cascade = flatten(statement, cascade, rank)
        made = contract(product, statement.output, cascade, Names(cascade), sizes)
        at = cascade.body.index(statement)
        cascade = cascade.replace(body=(*cascade.body[:at], *made, *cascade.body[at + 1 :]))
    return without_unused(cascade)
