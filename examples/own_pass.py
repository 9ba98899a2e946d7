"""A rewrite of one's own: bounded scores need no running maximum. docs/add-a-pass.md explains it line by line.

Comes in: softmax attention whose scores are soft-capped, c * tanh(s / c), so that |s| <= c. Softmax subtracts the row's
maximum so that exp does not overflow; below `limit` it cannot, and softmax is the same without. The pass drops the
maximum; what `online` would have to correct at every step of its loop is gone.

    python examples/own_pass.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch

from einscade.ir import Access, Cascade, Einsum, Expr, accesses, var
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade, print_cascade
from einscade.passes.invariance import UNCHANGED, Change, propagate
from einscade.passes.pipeline import run
from einscade.passes.recipes import RECIPES
from einscade.passes.rewrite import NotApplicable, Rewrite
from einscade.passes.statements import inlined, without_unused

CAPPED = """
cascade capped(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32) -> O
  where b < B, h < 4, p < P, m < M, e < 16, f < 16
  A[b,h,p,m] = sum(e) 0.25 * Q[b,h,p,e] * K[b,h,m,e] if m <= p
  S[b,h,p,m] = 20 * tanh(0.05 * A[b,h,p,m])
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""


@dataclass(frozen=True)
class Unshift:
    """Drop a maximum that is subtracted inside an exponential, where the exponent stays below `limit` without it.

    fp32's exp overflows at 88; the default leaves room for sums over e**28 keys.
    """

    limit: float = 60.0
    name: ClassVar[str] = "unshift"
    identity: ClassVar[str] = "f(c * exp(s)) = f(exp(s)) for c free of m, so f(exp(s - g)) = f(exp(s))"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        for statement in cascade.body:
            exponent = _unshifted(statement, cascade)
            if exponent is not None and self._bounded(exponent, cascade):
                _check_no_output_depends_on_scale(cascade, statement)
                body = tuple(s.replace(expr=sympy.exp(exponent)) if s is statement else s for s in cascade.body)
                return without_unused(cascade.replace(body=body))
        raise NotApplicable(f"no exponential of scores below {self.limit:g} subtracts their maximum")

    def _bounded(self, exponent: Expr, cascade: Cascade) -> bool:
        bound = _magnitude(exponent, cascade)
        return bound is not None and bool(bound <= self.limit)


def _unshifted(statement: Einsum, cascade: Cascade) -> Expr | None:
    """The exponent of `exp(s - G)` without the maximum G, or None where the statement is something else."""
    if statement.reduce is not None or not isinstance(statement.expr, sympy.exp):
        return None
    (exponent,) = statement.expr.args
    for access in accesses(exponent):
        made = cascade.definitions.get(access.tensor)
        is_maximum = made is not None and made.reduce is not None and made.reduce.monoid == "max"
        if is_maximum and exponent.coeff(access) == -1:
            return exponent + access
    return None


def _magnitude(expr: Expr, cascade: Cascade) -> Expr | None:
    """A bound of |expr| that holds for every input, or None."""
    if expr.is_number:
        return abs(expr)
    if isinstance(expr, sympy.tanh):
        return sympy.Integer(1)
    if isinstance(expr, Access) and expr.tensor in cascade.definitions:
        made = cascade.definitions[expr.tensor]
        return None if made.reduce or made.scan else _magnitude(inlined(expr, made), cascade)
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        parts = [_magnitude(a, cascade) for a in expr.args]
        return None if None in parts else expr.func(*parts)
    return None


def _check_no_output_depends_on_scale(cascade: Cascade, statement: Einsum) -> None:
    """Raises NotApplicable unless a positive factor on each row of `statement` cancels before the outputs."""
    reduced = {r for user in cascade.users(statement.name) if user.reduce for r in user.reduce.ranks}
    row = [var(r) for r in statement.output.ranks if r not in reduced]
    changes = propagate(cascade, {statement.name: Change(scale=sympy.Function("c", positive=True)(*row))})
    for output in cascade.outputs:
        if changes[output] != UNCHANGED:
            raise NotApplicable(f"{output} depends on the scale of {statement.name}")


def with_unshift() -> tuple[Rewrite, ...]:
    """The exact recipe with the pass after `canonicalise`, which gives every softmax a maximum, and before `online`."""
    exact = RECIPES["exact"]
    place = [rewrite.name for rewrite in exact].index("online")
    return (*exact[:place], Unshift(), *exact[place:])


def main() -> None:
    torch.manual_seed(0)
    cascade = parse_cascade(CAPPED)
    plain = run(cascade, "exact")
    ours = run(cascade, with_unshift())
    for step in ours.steps:
        print(f"{step.name:<13} {step.identity if step.changed else step.reason}")
    print(f"\n{print_cascade(ours.cascade)}\n")
    print(
        f"statements in the one-pass form: {len(plain.cascade.body)} with the maximum, {len(ours.cascade.body)} without"
    )

    sizes = {"B": 1, "P": 12, "M": 12}
    inputs = {n: torch.randn(1, 4, 12, 16, dtype=torch.float64) for n in ("Q", "K", "V")}
    tiles = {name: 4 for name in ours.cascade.symbols if name not in sizes}
    (expected,) = interpret(cascade, inputs, sizes).values()
    (actual,) = interpret(ours.cascade, inputs, sizes | tiles).values()
    print(f"largest difference in float64: {float((expected - actual).abs().max()):.1e}")


if __name__ == "__main__":
    main()
