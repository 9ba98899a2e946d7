"""A flat nest as torch code: every Einsum whole, one after another.

Comes in: a `FlatNest`. Goes out: lines of code; differentiable (out of place) where the module asks for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sympy

from einscade.codegen.loops import FlatNest
from einscade.codegen.tiles import (
    Statement,
    guarded,
    may_be_infinite,
    reads_maxima,
    with_fills,
)
from einscade.codegen.torch_values import Name, Range, Value, as_float, as_tensor, value
from einscade.codegen.torch_writer import TORCH_DTYPES, Writer
from einscade.ir.cascade import Einsum
from einscade.ir.expr import Access, Expr, Where, accesses, free_vars, var
from einscade.passes.terms import conjuncts

if TYPE_CHECKING:
    from einscade.codegen.tiled_torch import TorchModule

__all__ = ["FlatWriter"]


class FlatWriter(Writer):
    """Einsums that run whole, one after another."""

    def __init__(self, module: TorchModule, nest: FlatNest) -> None:
        super().__init__(module, tuple(r.name for r in module.cascade.ranks))
        self.nest = nest
        self.scope.ranges = {r.name: Range(module.size(r.extent)) for r in module.cascade.ranks}
        self.statements = self.prepared()

    def prepared(self) -> list[Statement]:
        statements = []
        self.before = {e.name: f"{e.name}@before" for e in self.nest.einsums if e.scan}
        for e in self.nest.einsums:
            reduce = e.reduce
            s = Statement(
                e.name, e.output.ranks, self.from_before(e, self.divisible(e)), reduce.monoid if reduce else None,
                reduce.ranks if reduce else (), self.module.points[e.name], self.module.results[e.name], source=e,
            )  # fmt: skip
            statements += self.without_empty_divisions(s)
        inputs = (t.name for t in self.cascade.inputs)
        if may_be_infinite(statements, inputs) or reads_maxima(self.cascade, self.nest.inputs):
            maxima = [s.name for s in statements if s.monoid in ("max", "min")]
            taken = {*self.cascade.tensors}

            def fresh(name: str) -> str:
                while name in taken:
                    name += "_"
                taken.add(name)
                return name

            statements = guarded(statements, maxima, fresh)
        return with_fills(statements)

    def without_empty_divisions(self, s: Statement) -> list[Statement]:
        """A sum over nothing is 0 whatever it is divided by: where a row has no point, a divisor that is the same for
        the whole row is 1, so that neither the sum nor its gradient meets 0 / 0. Likewise at any missing point."""
        divisors = {
            f.base
            for f in sympy.Mul.make_args(s.expr)
            if isinstance(f, sympy.Pow) and f.exp.is_negative and not free_vars(f) & set(s.reduced)
        }
        if s.monoid is None and s.keep != sympy.true and any(d.has(Access) for d in divisors):
            return [replace(s, expr=s.expr.xreplace({d: Where(s.keep, d, 1) for d in divisors}))]
        if s.monoid != "sum" or s.keep == s.row or not divisors or not any(d.has(Access) for d in divisors):
            return [s]
        ranks = tuple(r for r in s.ranks if r in free_vars(s.keep))
        some = Statement(f"{s.name}_some", ranks, s.keep, "any", s.reduced)
        safe = {d: Where(Access(some.name, *map(var, ranks)), d, 1) for d in divisors}
        return [some, replace(s, expr=s.expr.xreplace(safe))]

    def from_before(self, e: Einsum, expr: Expr) -> Expr:
        """Another scan read one step back is a tensor of its own, which starts with the scan's initial value."""
        table = {}
        for a in accesses(expr):
            scan = self.cascade.definitions[a.tensor].scan if a.tensor in self.before and a.tensor != e.name else None
            if scan is not None:
                at = self.cascade.tensors[a.tensor].ranks.index(scan.rank)
                if a.index[at] == var(scan.rank) - 1:
                    table[a] = Access(self.before[a.tensor], *a.index[:at], var(scan.rank), *a.index[at + 1 :])
        return expr.xreplace(table)

    def divisible(self, e: Einsum) -> Expr:
        """Where the domain says `x != 0`, a division by x must not meet the 0 either, or its gradient is NaN."""
        zeros = [
            c.lhs for c in conjuncts(e.domain) if isinstance(c, sympy.Ne) and c.rhs == 0 and isinstance(c.lhs, Access)
        ]
        return e.expr.xreplace({x: Where(sympy.Ne(x, 0), x, 1) for x in zeros})

    def write(self) -> None:
        for i, s in enumerate(self.statements):
            self.comment(s)
            self.scope.dead = self.gone(self.statements, i, self.nest.outputs) if self.scope.in_place else set()
            if s.source is not None and s.source.scan is not None:
                self.write_scan(s)
                continue
            v = self.evaluate(s)
            if s.fill is not None:
                v = self.masked(v, s.row, s.fill)
            here = None
            if s.name in self.cascade.outputs:
                if s.fill not in (None, 0):  # what is missing is another number to its readers
                    self.define(s.name, v, s.ranks, f"{self.module.code(s.name)}_here")
                    here = self.scope.names[s.name]
                    v = Value(here.code, here.ranks, v.kind)
                if s.row != sympy.true:
                    v = self.masked(v, s.row, sympy.false if v.kind == "b" else sympy.Integer(0))
                v = self.as_output(s, v)
            elif s.name in self.nest.outputs:
                v = self.spread(v, self.scope.sort(s.ranks))
                self.define(s.name, v, s.ranks)
                self.hand_over(s.name)
                continue
            self.define(s.name, v, s.ranks)
            if s.name in self.nest.outputs:
                self.module.names[s.name] = self.module.stored(s.name)
                self.scope.names[s.name] = here or self.module.stored(s.name)

    def hand_over(self, name: str) -> None:
        """A value of this nest that another nest reads: in memory, as it was computed."""
        here = self.scope.names[name]
        dtype = {"float32": "f32", "float64": "f64"}[self.scope.acc] if here.dtype == "f32" else here.dtype
        extents = tuple(self.module.size(self.cascade.extent(r)) for r in here.ranks)
        self.module.names[name] = replace(here, dtype=dtype, stored=True, fresh=False, extents=extents)

    def as_output(self, s: Statement, v: Value) -> Value:
        """In the cascade's order of ranks, its dtype, and the schedule's memory order."""
        t = self.cascade.tensors[s.name]
        order = self.scope.sort(t.ranks)
        v = self.spread(v, order)
        code = v.tight()
        if order != t.ranks:
            code += f".permute({', '.join(str(order.index(r)) for r in t.ranks)})"
        dtype = TORCH_DTYPES[t.dtype]
        code += f".to(torch.{dtype})"
        # An output is fresh memory, also where all that is left of its statement is a read.
        read_only = s.source is not None and isinstance(s.source.expr, Access) and s.source.reduce is None
        fresh = ".clone(memory_format=torch.contiguous_format)" if read_only else ".contiguous()"
        return Value(code + fresh, t.ranks, v.kind)

    def write_scan(self, s: Statement) -> None:
        e = s.source
        assert e is not None
        assert e.scan is not None
        code, rank = self.module.code(s.name), e.scan.rank
        ranks = self.scope.sort(tuple(r for r in s.ranks if r != rank))
        init = value(e.scan.init, self.scope)
        init = self.spread(as_float(as_tensor(init, self.scope), self.scope), ranks)
        self.out(f"{code} = {code}_first = {init.code}")
        self.out(f"{code}_steps = []")
        self.out(f"for {rank} in range({self.scope.ranges[rank].size}):")
        self.out.depth += 1
        whole = self.scope.ranges[rank]
        self.scope.ranges[rank] = Range(whole.size, at=rank)
        self.scope.names[s.name] = Name(code, ranks, "f32", False, declared=tuple(r for r in s.ranks if r != rank))
        previous = {a: Access(s.name, *(i for r, i in zip(s.ranks, a.index, strict=True) if r != rank))
                    for a in accesses(s.expr) if a.tensor == s.name}  # fmt: skip
        step = replace(s, ranks=ranks, expr=s.expr.xreplace(previous), keep=s.keep.xreplace(previous))
        v = self.spread(as_float(self.evaluate(step), self.scope), ranks)
        self.out(f"{code} = {v.code}")
        self.out(f"{code}_steps.append({code})")
        self.out.depth -= 1
        self.scope.ranges[rank] = whole
        order = self.scope.sort(s.ranks)
        self.out(f"{code} = torch.stack({code}_steps, {order.index(rank)})")
        self.scope.names[s.name] = Name(code, order, "f32", False, declared=s.ranks)
        if self.before[s.name] in {a.tensor for t in self.statements for a in t.reads}:
            self.out(f"{code}_before = torch.stack([{code}_first, *{code}_steps[:-1]], {order.index(rank)})")
            self.scope.names[self.before[s.name]] = Name(f"{code}_before", order, "f32", False, declared=s.ranks)
        if s.name in self.nest.outputs:
            if s.name in self.cascade.outputs:
                v = self.as_output(s, Value(code, order))
                self.out(f"{code} = {v.code}")
                self.scope.names[s.name] = self.module.names[s.name] = self.module.stored(s.name)
            else:
                self.hand_over(s.name)
