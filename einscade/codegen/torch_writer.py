"""Statements of a loop program as lines of torch code: what flat and serial nests share.

Comes in: `Statement`s and the scope they are in. Goes out: lines, appended to the module being written.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.host import number
from einscade.codegen.matmul import Contraction, contraction
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import (
    Statement,
)
from einscade.codegen.torch_values import COMPARISON, Name, Scope, Value, align, as_tensor, value
from einscade.ir.cascade import MONOIDS
from einscade.ir.expr import Access, Expr
from einscade.ir.text import print_einsum

if TYPE_CHECKING:
    from einscade.codegen.tiled_torch import TorchModule

__all__ = ["TORCH_DTYPES", "Lines", "Writer"]

TORCH_DTYPES: Mapping[str, str] = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2", "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "i4": "int8",
    "bool": "bool",
}  # fmt: skip


@dataclass
class Lines:
    """Code being written, with its indentation."""

    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __call__(self, text: str = "") -> None:
        self.lines.append("    " * self.depth + text if text else "")


class Writer:
    """What flat and serial nests share: statements to lines of code in a scope."""

    def __init__(self, module: TorchModule, order: tuple[str, ...]) -> None:
        self.module, self.out, self.cascade = module, module.out, module.cascade
        self.scope = Scope(
            order, {}, dict(module.names), module.acc, module.in_place, module.device, rank_values=self.rank_values,
            numbers={symbol: str(n) for symbol, n in module.tiles().items()},
        )  # fmt: skip
        self.made_ranks: dict[str, str] = {}
        self.masks: dict[object, Value] = {}

    def rank_values(self, rank: str) -> str:
        """The variable with a rank's values here, made on first use."""
        if rank not in self.made_ranks:
            r = self.scope.ranges[rank]
            bounds = f"{r.lo}, {r.hi}" if r.lo is not None else r.size
            self.made_ranks[rank] = f"{rank}_"
            self.out(f"{rank}_ = torch.arange({bounds}, device={self.module.device})")
        return self.made_ranks[rank]

    def comment(self, s: Statement) -> None:
        if s.source is not None:
            indent = 4 * self.out.depth
            for line in textwrap.wrap(print_einsum(s.source), 116 - indent, subsequent_indent="  "):
                self.out(f"# {line}")

    def evaluate(self, s: Statement) -> Value:
        """The statement's value over `s.ranks`, or those of them that it moves with, reductions done, fills not yet
        applied."""
        if s.monoid is None:
            return as_tensor(value(s.expr, self.scope), self.scope)
        if s.monoid == "topk":
            return self.topk(s)
        if s.monoid == "sum" and (c := contraction(s, self.scope.order, self.scope.dims)) is not None:
            return self.contract(c, s)
        operand = value(s.expr, self.scope)
        if s.mask_operand:
            operand = self.masked(operand, s.keep, MONOIDS[s.monoid].identity)
        return self.reduced(operand, s)

    def masked(self, v: Value, predicate: Boolean, fill: Expr, name: str = "terms") -> Value:
        """The value where the points exist, else `fill`; `name` is that of a variable for it, where one is needed."""
        keep = self.mask(predicate)
        full = self.scope.sort(v.ranks + keep.ranks)
        if v.kind == "b":
            op = "& " if fill == sympy.false else "| ~"
            operand = Value(align(v, full), prec=v.prec)
            return Value(f"{operand.tight()} {op}{align(keep, full)}", full, "b", True, COMPARISON)
        if v.kind == "f" or not fill.is_Integer:
            v = as_tensor(v, self.scope)
        if v.kind == "i" and not fill.is_Integer:
            v = Value(f"{v.tight()}.to(torch.{self.scope.acc})", v.ranks, "f", True)
        return Value(f"torch.where({align(keep, full)}, {align(v, full)}, {number(fill)})", full, v.kind, True)

    def mask(self, predicate: Boolean) -> Value:
        """The variable that holds the points that exist."""
        if predicate not in self.masks:
            v = as_tensor(value(predicate, self.scope), self.scope)
            name = "keep" if not self.masks else f"keep{len(self.masks)}"
            self.out(f"{name} = {v.code}")
            self.masks[predicate] = Value(name, v.ranks, "b")
        return self.masks[predicate]

    def reduced(self, operand: Value, s: Statement) -> Value:
        missing = [r for r in s.reduced if r not in operand.ranks]
        if missing:  # the operand is the same along a reduced rank: spread it out
            full = self.scope.sort(operand.ranks + tuple(missing))
            if operand.host:
                operand = as_tensor(operand if operand.kind == "b" else replace(operand, kind="f"), self.scope)
            sizes = ", ".join(self.length(r) if r in missing else "-1" for r in full)
            operand = Value(
                f"{Value(align(operand, full), prec=operand.prec).tight()}.expand({sizes})", full, operand.kind
            )
        dims = [operand.ranks.index(r) - len(operand.ranks) for r in s.reduced]
        rest = tuple(r for r in operand.ranks if r not in s.reduced)
        which = str(dims[0]) if len(dims) == 1 else str(tuple(sorted(dims)))
        method = {"sum": "sum", "max": "amax", "min": "amin", "any": "any", "all": "all"}.get(s.monoid or "")
        if s.monoid == "prod":
            code = operand.tight()
            for d in sorted(dims):
                code += f".prod({d})"
            return Value(code, rest, operand.kind, True)
        if method is None:
            raise Unsupported(f"reduction {s.monoid}")
        if method in ("amax", "amin"):
            if operand.kind == "b":
                raise Unsupported(f"{s.monoid} of booleans")
            return self.extreme(operand, s, method, which, rest)
        return Value(f"{operand.tight()}.{method}({which})", rest, "b" if operand.kind == "b" else operand.kind, True)

    def extreme(self, operand: Value, s: Statement, method: str, which: str, rest: tuple[str, ...]) -> Value:
        """`amax` refuses an empty dimension; a whole rank may be empty."""
        whole = [r for r in s.reduced if self.scope.ranges[r].lo is None and not self.scope.ranges[r].size.isdigit()]
        if whole and operand.kind == "f":
            name = operand.code
            if not name.isidentifier():
                name = "terms"
                self.out(f"{name} = {operand.code}")
            shape = ", ".join(self.length(r) for r in rest) + ("," if len(rest) == 1 else "")
            empty = f"{name}.new_full(({shape}), {number(s.identity or sympy.oo)})"
            some = " and ".join(self.scope.ranges[r].size for r in whole)
            return Value(f"{name}.{method}({which}) if {some} else {empty}", rest, "f", True, COMPARISON)
        return Value(f"{operand.tight()}.{method}({which})", rest, operand.kind, True)

    def topk(self, s: Statement) -> Value:
        e = s.source
        assert e is not None
        assert e.reduce is not None
        assert e.reduce.slot is not None
        operand = value(s.expr, self.scope)
        if s.keep != sympy.true:
            operand = self.masked(operand, s.keep, -sympy.oo)
        full = self.scope.sort(tuple(r for r in s.ranks if r != e.reduce.slot) + s.reduced)
        dim = full.index(s.reduced[0]) - len(full)
        code = f"torch.sort({self.spread(operand, full).code}, dim={dim}, descending=True, stable=True).indices"
        code += f".narrow({dim}, 0, {self.length(e.reduce.slot)})"
        kept = tuple(e.reduce.slot if r == s.reduced[0] else r for r in full)
        order = self.scope.sort(kept)
        if order != kept:
            code += f".permute({', '.join(str(kept.index(r)) for r in order)})"
        return Value(code, order, "i", True)

    def length(self, rank: str) -> str:
        r = self.scope.ranges[rank]
        return f"{r.hi} - {r.lo}" if r.lo is not None else r.size

    def contract(self, c: Contraction, s: Statement) -> Value:
        left, right = self.left(c), self.right(c)
        if s.mask_operand:
            keep = self.mask(s.keep)
            fit = [set(keep.ranks) <= set(v.ranks) for v in (left, right)]
            if not any(fit):  # neither operand has all of the mask's ranks: their product does
                return self.reduced(self.masked(value(s.expr, self.scope), s.keep, sympy.Integer(0)), s)
            # What was computed may be undefined at missing points, and 0 times that is no 0.
            exprs = (c.left_expr, c.right_expr)
            computed = [ok and not isinstance(e, Access) for ok, e in zip(fit, exprs, strict=True)]
            on_left, on_right = computed if any(computed) else (fit[0], not fit[0])
            left = self.masked(left, s.keep, sympy.Integer(0)) if on_left else left
            right = self.masked(right, s.keep, sympy.Integer(0), "others") if on_right else right
        result = c.product(c.as_left(left).tight(), c.as_right(right).tight(), self.scope, self.length)
        return self.scaled(result, c.outer)

    def left(self, c: Contraction) -> Value:
        """The left side of a product with all of its dimensions: also those along which its value is the same."""
        v = c.left(self.scope)
        return self.spread(v, self.scope.sort((*v.ranks, *c.batch, *c.rows, *c.reduced)))

    def right(self, c: Contraction) -> Value:
        """The right side likewise; it may lack a batch dimension, since the left side has all."""
        v = c.right(self.scope)
        return self.spread(v, self.scope.sort((*v.ranks, *c.reduced, *c.columns)))

    def scaled(self, result: Value, outer: Expr) -> Value:
        """The product times the factors that lack the reduced ranks."""
        if outer == 1:
            return result
        factor = value(outer, self.scope)
        ranks = self.scope.sort(result.ranks + factor.ranks)
        if ranks == result.ranks and self.scope.in_place:
            return Value(f"{result.code}.mul_({align(factor, ranks)})", ranks, "f", True)
        product = Value(align(factor, ranks), prec=factor.prec).tight(1)
        return Value(f"{align(result, ranks)} * {product}", ranks, "f", True, 1)

    def spread(self, v: Value, ranks: tuple[str, ...]) -> Value:
        """The value with all of `ranks` as dimensions."""
        if v.ranks == ranks:
            return v
        sizes = ", ".join("-1" if r in v.ranks else self.length(r) for r in ranks)
        if not ranks:
            return v
        code = Value(align(v, ranks), prec=v.prec)
        if v.host:
            dtype = {"f": self.scope.acc, "i": "int64", "b": "bool"}[v.kind]
            shape = ", ".join(self.length(r) for r in ranks)
            comma = "," if len(ranks) == 1 else ""
            return Value(
                f"torch.full(({shape}{comma}), {v.code}, dtype=torch.{dtype}, device={self.module.device})",
                ranks,
                v.kind,
                True,
            )
        return Value(f"{code.tight()}.expand({sizes})", ranks, v.kind)

    def gone(self, statements: Sequence[Statement], index: int, keeps: Iterable[str]) -> set[str]:
        """Names that this statement reads, once, and none after it does, nor what is a view of them."""
        later = {a.tensor for s in statements[index + 1 :] for a in s.reads} | set(keeps)
        for s in reversed(statements[:index]):
            if s.name in later and s.name in self.scope.names and not self.scope.names[s.name].fresh:
                later |= {a.tensor for a in s.reads}
        s = statements[index]
        count = Counter(
            x.tensor for e in (s.expr, s.keep, s.row) for x in sympy.preorder_traversal(e) if isinstance(x, Access)
        )
        return {name for name, n in count.items() if n == 1} - later

    def define(self, name: str, v: Value, declared: tuple[str, ...], code: str | None = None) -> None:
        """Bind a value of the loop, of a statement with these ranks, to a variable."""
        code = code or self.module.code(name)
        self.out(f"{code} = {v.code}")
        kind = "bool" if v.kind == "b" else "i64" if v.kind == "i" else "f32"
        self.scope.names[name] = Name(code, v.ranks, kind, False, v.owned, declared=declared)

    def store(self, name: str, v: Value, row: Boolean) -> None:
        """Write a value to its place in an output; missing points are 0."""
        t = self.cascade.tensors[name]
        if row != sympy.true:
            keep = as_tensor(value(row, self.scope), self.scope)
            full = self.scope.sort(v.ranks + keep.ranks)
            zero = "False" if v.kind == "b" else "0"
            v = Value(f"torch.where({align(keep, full)}, {align(v, full)}, {zero})", full, v.kind, True)
        index, ranks = [], []
        for r in t.ranks:
            place = self.place(r)
            index.append(place[0])
            if place[1] is not None:
                ranks.append(place[1])
        code = Value(align(v, self.scope.sort(ranks)), prec=v.prec)
        order = self.scope.sort(ranks)
        text = code.code
        if tuple(ranks) != order and v.ranks:
            v = self.spread(v, order)
            text = f"{v.tight()}.permute({', '.join(str(order.index(r)) for r in ranks)})"
        self.out(f"{self.module.code(name)}[{', '.join(index) or '...'}] = {text}")

    def place(self, rank: str) -> tuple[str, str | None]:
        """Where a dimension of an output is written: its index, and the rank that it keeps."""
        r = self.scope.ranges[rank]
        if r.at is not None:
            return r.at, None
        return (f"{r.lo}:{r.hi}" if r.lo is not None else ":"), rank
