"""Restrict: what the ranges of the ranks decide is dropped from domains; its note is where the points of tiles are.

The note says, for each rank that a statement reduces under a domain, which range of it holds the points of a tile of
the other ranks (`r_lo <= r <= r_hi`, both ends included), and which holds nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Cascade, Expr
from einscade.ir.intervals import rank_ranges, simplify
from einscade.passes.domains import edges, full_range, is_data_dependent, span
from einscade.passes.rewrite import NotApplicable
from einscade.passes.terms import conjuncts, depends

__all__ = ["Restrict"]


@dataclass(frozen=True)
class Restrict:
    """Drops what `0 <= rank < extent` decides."""

    name: ClassVar[str] = "restrict"
    identity: ClassVar[str] = "x if c = x where c holds for every point"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        ranges = rank_ranges(cascade)
        body = tuple(s.replace(domain=simplify(s.domain, ranges)) for s in cascade.body)
        if body == cascade.body:
            raise NotApplicable("no condition of a domain is decided by the ranges of its ranks")
        return cascade.replace(body=body)

    def note(self, cascade: Cascade) -> str:
        """Where the points are along every reduced rank that a statement's domain restricts."""
        reduced = {r for s in cascade.body if s.reduce for r in s.reduce.ranks}
        extents = {r.name: r.extent for r in cascade.ranks}
        return "\n".join(
            f"{s.name}: {_described(s.domain, rank, extents)}"
            for s in cascade.body
            for rank in s.output.ranks
            if rank in reduced and depends(s.domain, (rank,))
        )


def _described(domain: Boolean, rank: str, extents: Mapping[str, Expr]) -> str:
    ranges, extent = edges(extents), extents[rank]
    reach, full = span(domain, rank, ranges), full_range(domain, rank, ranges)

    def between(start: Expr | None, stop: Expr | None) -> str:
        return f"from {sympy.Max(0, start or 0)} to {extent if stop is None else sympy.Min(extent, stop)}"

    tensors = [c for c in conjuncts(domain) if is_data_dependent(c)]
    holes = not all(span(c, rank, ranges).exact for c in conjuncts(domain) if c not in tensors)
    return (
        f"{rank} {between(reach.start, reach.stop)}, {f'full {between(*full)}' if full else 'nowhere known to be full'}"
        + (", with holes" if holes else "")
        + (f", to be checked: {', '.join(map(str, tensors))}" if tensors else "")
    )
