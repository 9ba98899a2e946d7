"""Sums of products as `torch.matmul`: which dimensions are batch, rows, columns and reduced, and the views that make
them so.

Comes in: a summing `Statement` and the scope. Goes out: a `Contraction`, or None where the sum is no product of two
operands that share the reduced ranks (it is then computed elementwise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import sympy

from einscade.codegen.tiles import Statement
from einscade.codegen.torch_values import Scope, Value, as_float, value
from einscade.ir.expr import Expr, free_vars

__all__ = ["Contraction", "contraction"]


@dataclass(frozen=True)
class Contraction:
    """`sum(reduced) left * right * outer`; `left` has the output's earlier ranks. The expressions are kept for the
    writer, which may compute an operand before the loop."""

    left_expr: Expr
    right_expr: Expr
    outer: Expr
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    reduced: tuple[str, ...]

    def left(self, scope: Scope) -> Value:
        return as_float(value(self.left_expr, scope), scope)

    def right(self, scope: Scope) -> Value:
        return as_float(value(self.right_expr, scope), scope)

    def as_left(self, v: Value) -> Value:
        return _matrix(v, self.batch, self.rows, self.reduced)

    def as_right(self, v: Value) -> Value:
        return _matrix(v, self.batch, self.reduced, self.columns)

    def product(self, left: str, right: str, scope: Scope, length: Callable[[str], str]) -> Value:
        """The matrix product of two prepared operands, with its rows and columns as separate dimensions again."""
        code = f"torch.matmul({left}, {right})"
        at = len(self.batch)
        code += _separated(at + 1, self.columns, length) + _separated(at, self.rows, length)
        ranks = self.batch + self.rows + self.columns
        order = scope.sort(ranks)
        if order != ranks:
            code += f".permute({', '.join(str(ranks.index(r)) for r in order)})"
        return Value(code, order, "f", True)


def contraction(s: Statement, order: tuple[str, ...], dims: frozenset[str]) -> Contraction | None:
    """The sum as a product of two operands, merging factors whose ranks another factor has. `dims`: the ranks that are
    dimensions here, in `order`."""
    inner: list[Expr] = []
    outer: list[Expr] = []
    for f in sympy.Mul.make_args(s.expr):
        (inner if free_vars(f) & set(s.reduced) else outer).append(f)
    ranks = {f: free_vars(f) & dims for f in inner}
    while len(inner) > 2:
        small = next(((a, b) for a in sorted(inner, key=lambda x: len(ranks[x])) for b in inner
                      if a is not b and ranks[a] <= ranks[b]), None)  # fmt: skip
        if small is None:
            return None
        merged = small[0] * small[1]
        ranks[merged] = ranks[small[1]]
        inner = [f for f in inner if f not in small] + [merged]
    if len(inner) != 2 or any(not set(s.reduced) <= ranks[f] for f in inner):
        return None
    place = {r: i for i, r in enumerate(order)}
    a, b = sorted(inner, key=sympy.default_sort_key)
    shared = ranks[a] & ranks[b] - set(s.reduced)
    rows, columns = ranks[a] - ranks[b], ranks[b] - ranks[a]
    if not rows and not columns:
        return None
    if not rows or (columns and min(map(place.__getitem__, columns)) < min(map(place.__getitem__, rows))):
        a, b, rows, columns = b, a, columns, rows

    def sort(found: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(found, key=place.__getitem__))

    return Contraction(a, b, sympy.Mul(*outer), sort(shared), sort(rows), sort(columns), sort(s.reduced))


def _matrix(v: Value, batch: tuple[str, ...], first: tuple[str, ...], second: tuple[str, ...]) -> Value:
    """The operand as batch dimensions and one matrix dimension each for `first` and `second`."""
    wanted = batch + first + second
    code = v.tight()
    own = tuple(r for r in wanted if r in v.ranks)  # a batch dimension it lacks is one that the other operand has
    if v.ranks != own:
        if v.ranks[:-2] == own[:-2] and v.ranks[-2:] == own[:-3:-1]:
            code += ".mT"
        else:
            code += f".permute({', '.join(str(v.ranks.index(r)) for r in own)})"
    if own != wanted:
        code += f"[{', '.join(':' if r in own else 'None' for r in wanted)}]"
    code += _joined(len(batch) + len(first), second) + _joined(len(batch), first)
    return Value(code, wanted, "f", v.owned, 0 if code != v.code else v.prec)


def _joined(at: int, ranks: tuple[str, ...]) -> str:
    if not ranks:
        return f".unsqueeze({at})"
    return f".flatten({at}, {at + len(ranks) - 1})" if len(ranks) > 1 else ""


def _separated(at: int, ranks: tuple[str, ...], length: Callable[[str], str]) -> str:
    if not ranks:
        return f".squeeze({at})"
    if len(ranks) == 1:
        return ""
    return f".unflatten({at}, ({', '.join(length(r) for r in ranks)}))"
