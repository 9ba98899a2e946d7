"""Smooth: subtract from a tensor its mean along a rank, where the rest of the cascade cannot tell.

Comes in: a cascade in which a tensor (the keys) enters a contraction (the scores). Goes out: the same cascade with
the mean of the tensor along one of its ranks subtracted first, which narrows its range before it is quantized.
Exact: the scores S = Q·(K - mean K) differ from Q·K by something free of that rank, and `invariance` derives, statement
by statement, that no output depends on such a shift. (SageAttention, arXiv 2410.02367, for softmax.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from einscade.ir import Access, Cascade, Einsum, Reduction, Tensor, accesses, free_vars, var
from einscade.passes.invariance import UNCHANGED, Change, propagate
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import wide

__all__ = ["Smooth"]


@dataclass(frozen=True)
class Smooth:
    """Subtract from `tensor` its mean along `rank` (one of the tensor's own ranks)."""

    tensor: str
    rank: str
    name: ClassVar[str] = "smooth"
    identity: ClassVar[str] = "f(Q·K + c) = f(Q·K) for c free of m, so f(Q·K) = f(Q·(K - mean(m) K))"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        tensor = cascade.tensors.get(self.tensor)
        if tensor is None or self.rank not in tensor.ranks:
            raise NotApplicable(f"no tensor {self.tensor} with a rank {self.rank}")
        if not _exists_everywhere(self.tensor, cascade):
            raise NotApplicable(f"{self.tensor} has missing points, so its mean differs from fiber to fiber")
        axis = tensor.ranks.index(self.rank)
        users = tuple(cascade.users(self.tensor))
        changes = propagate(cascade, {user.name: _shift(user, self.tensor, axis) for user in users})
        for output in cascade.outputs:
            if changes[output] != UNCHANGED:
                raise NotApplicable(f"the output {output} depends on a shift of {', '.join(u.name for u in users)}")

        kept = tensor.ranks[:axis] + tensor.ranks[axis + 1 :]
        mean = Tensor(cascade.fresh(f"{self.tensor}mean"), kept, wide(tensor.dtype))
        centred = Tensor(cascade.fresh(f"{self.tensor}centred"), tensor.ranks, wide(tensor.dtype))
        count = sympy.Max(cascade.extent(self.rank), 1)  # no points, no quotient by zero
        made = (
            Einsum(mean, tensor() / count, Reduction("sum", (self.rank,))),
            Einsum(centred, tensor() - mean()),
        )
        first = cascade.body.index(users[0])
        rest = tuple(_reading(s, self.tensor, centred.name) for s in cascade.body[first:])
        return cascade.replace(body=cascade.body[:first] + made + rest)


def _shift(statement: Einsum, tensor: str, axis: int) -> Change:
    """How `statement` changes when `tensor` loses its mean along `axis`: a shift free of the variables read there."""
    reads = [a for a in accesses(statement.expr) if a.tensor == tensor]
    if any(a.tensor == tensor for a in accesses(statement.domain)) or statement.scan is not None:
        raise NotApplicable(f"{statement.name} reads {tensor} in its domain or in a scan")
    reduced = set(statement.reduce.ranks) if statement.reduce else set()
    if statement.reduce is not None and statement.reduce.monoid != "sum":
        raise NotApplicable(f"{statement.name} reduces {tensor} with {statement.reduce.monoid}, not with a sum")
    if not isinstance(statement.expr, sympy.Expr):
        raise NotApplicable(f"{statement.name} compares {tensor}")
    means = {a: a - Access("mean", *a.index[:axis], *a.index[axis + 1 :]) for a in reads}
    moved = sympy.expand(statement.expr.xreplace(means) - statement.expr)
    if any(a.tensor == tensor for a in accesses(moved)):
        raise NotApplicable(f"{statement.name} is not linear in {tensor}")
    along = frozenset().union(*(free_vars(a.index[axis]) for a in reads))
    inside = free_vars(moved) | (free_vars(statement.domain) if free_vars(statement.domain) & reduced else set())
    if along & reduced:
        raise NotApplicable(f"{statement.name} sums {tensor} over {', '.join(sorted(along & reduced))}: no shift")
    if inside & along:
        raise NotApplicable(f"the shift of {statement.name} varies along {', '.join(sorted(inside & along))}")
    free = [r for r in statement.output.ranks if r not in along]
    return Change(shift=sympy.Function("shift", real=True)(*map(var, free)))


def _exists_everywhere(name: str, cascade: Cascade) -> bool:
    statement = cascade.definitions.get(name)
    if statement is None:
        return True
    return statement.domain == sympy.true and all(_exists_everywhere(a.tensor, cascade) for a in statement.reads)


def _reading(statement: Einsum, old: str, new: str) -> Einsum:
    """The statement with every access to `old` turned to `new`."""
    return statement.replace(
        expr=statement.expr.xreplace({a: Access(new, *a.index) for a in accesses(statement.expr) if a.tensor == old})
    )
