"""What happens on one tile of a Triton kernel: statements, products, masks, stores.

Comes in: the statements of a `TileLoop` in base 2. Goes out: lines of code, into the kernel itself or into its step
function, whichever is being written. `triton_loads` brings what they read, `triton_kernel` arranges them into a loop.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeGuard

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.matmul import Contraction, contraction
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import State, Statement
from einscade.codegen.triton_loads import HALF, TRITON_DTYPES, LoadWriter
from einscade.codegen.triton_values import (
    COMPARISON,
    Local,
    Value,
    align,
    aligned,
    value,
)
from einscade.ir.expr import Access, Expr, accesses, free_vars
from einscade.ir.text import print_einsum

__all__ = ["TileWriter"]


class TileWriter(LoadWriter):
    """Writes statements of one nest's tile form as Triton code."""

    def comment(self, s: Statement) -> None:
        if s.source is not None:
            for line in textwrap.wrap(print_einsum(s.source), 112, subsequent_indent="  "):
                self.here(f"# {line}")

    def evaluate(self, s: Statement, into: str | None = None) -> Value:
        if s.monoid is None:
            return value(s.expr, self.scope)
        if (c := self.as_dot(s)) is not None:
            return self.dot(c, s, into)
        operand = value(s.expr, self.scope)
        if operand.kind == "b":
            operand = Value(f"({operand.code}).to(tl.int32)", operand.ranks, "i")
        if s.mask_operand:
            operand = self.masked(operand, s.keep, s.identity)
        return self.reduced(operand, s)

    def reduced(self, operand: Value, s: Statement) -> Value:
        calls = {"sum": "tl.sum", "max": "tl.max", "min": "tl.min"}
        if s.monoid not in calls:
            raise Unsupported(f"the reduction {s.monoid}")
        code, ranks = operand.code, operand.ranks
        for r in s.reduced:
            if r not in ranks:
                raise Unsupported(f"{s.name} reduces over {r}, which its terms do not depend on")
            block = self.scope.blocks[r]
            if block.limit is not None and s.identity is not None:
                inside = align(Value(f"({block.index} < {block.limit})", (r,)), ranks)
                code = f"tl.where({inside}, {code}, {value(s.identity, self.scope).code})"
            code = f"{calls[s.monoid]}({code}, {ranks.index(r)})"
            ranks = tuple(x for x in ranks if x != r)
        return Value(code, ranks, operand.kind)

    def as_dot(self, s: Statement) -> Contraction | None:
        """The statement as one product of two matrices, if it is one."""
        order = sorted(self.scope.blocks, key=lambda r: self.scope.order.index(self.scope.blocks[r].dim))
        c = contraction(s, tuple(order), frozenset(order)) if s.monoid == "sum" else None
        if c is None or c.batch:
            return None
        c = replace(c, rows=self.scope.dims(c.rows), columns=self.scope.dims(c.columns))
        return c if len(c.reduced) == len(c.rows) == len(c.columns) == 1 else None

    def dot(self, c: Contraction, s: Statement, into: str | None = None) -> Value:
        """Operands in one dtype of the matrix unit; what was computed is rounded to that of what it meets."""
        left, right = (self.operand(e) for e in (c.left_expr, c.right_expr))
        if s.mask_operand:
            left, right = self.masked_operands(left, right, c, s)
        left, right = self.together(left, right)
        a = self.turned(left, (*c.rows, *c.reduced))
        b = self.turned(right, (*c.reduced, *c.columns))
        precision = ""
        integers = left.kind == right.kind == "i"
        if left.dtype in (None, "float32") and not self.has_half() and not integers:
            self.check_single(c)
        if not integers and left.dtype in (None, "float32"):
            hip = self.schedule.target.startswith("hip")
            precision = ', input_precision="' + ("ieee" if hip else "tf32" if self.has_half() else "tf32x3") + '"'
        accumulate = f", {into}" if into and not integers else ""
        v = Value(f"tl.dot({a}, {b}{accumulate}{precision})", self.scope.sort(c.rows + c.columns))
        if integers:
            v = replace(v, code=f"{v.code}.to(tl.float32)")
        if c.rows + c.columns != v.ranks:
            v = replace(v, code=f"tl.trans({v.code})")
        if sympy.simplify(c.outer - 1) != 0:
            factor = value(c.outer, self.scope)
            ranks = self.scope.sort(v.ranks + factor.ranks)
            v = Value(f"{v.code} * {aligned(factor, ranks).tight(2)}", ranks, prec=2)
        return v

    def check_single(self, c: Contraction) -> None:
        """A float32 product is three of the matrix unit's, on operands split in registers."""
        wide = [r for r in (*c.reduced, *c.columns) if self.widths.get(r, 0) > 128]
        if wide:
            raise Unsupported(
                f"a float32 product over {wide[0]}, {self.widths[wide[0]]} wide: it would not stay on chip"
            )

    def masked_operands(self, left: Value, right: Value, c: Contraction, s: Statement) -> tuple[Value, Value]:
        """Both operands where missing points add nothing. What was computed may be undefined there, and 0 times that is
        no 0: where conditions allow it, each computed operand is masked, and one in any case."""
        dims = {*self.scope.dims(free_vars(s.keep))}
        by_row, by_column = bool(dims & {*c.rows}), bool(dims & {*c.columns})
        computed = [not self.is_read(e) for e in (c.left_expr, c.right_expr)]
        if by_row or (computed[0] and not by_column):
            left = self.masked_terms(left, s, "terms")
        if not by_row and (computed[1] or by_column or not computed[0]):
            right = self.masked_terms(right, s, "others")
        return left, right

    def masked_terms(self, v: Value, s: Statement, suffix: str) -> Value:
        """An operand as a variable that is 0 where a point is missing."""
        name = f"{s.name}_{suffix}"
        self.here(f"{name} = {v.code}")
        self.here("if MASKED:" if self.in_step else "if True:")
        self.here.depth += 1
        keep = self.mask(s.keep)
        computed = any(a.tensor in self.scope.locals for a in accesses(s.keep))
        if computed and len(keep.ranks) == 1 and {*keep.ranks} < {*v.ranks}:
            keep = self.kept_points(keep, v.ranks)
        ranks = self.scope.sort(v.ranks + keep.ranks)
        if ranks != v.ranks:
            raise Unsupported(f"a mask over {ranks} on the operand of {s.name}, which is over {v.ranks}")
        masked = self.where(keep, Value(name, v.ranks, v.kind), sympy.Integer(0))
        self.here(f"{name} = {masked.code}")
        self.here.depth -= 1
        return Value(name, v.ranks, v.kind, dtype=v.dtype)

    def kept_points(self, keep: Value, ranks: tuple[str, ...]) -> Value:
        """A mask along one of an operand's two dimensions as a mask of its points: of the other dimension it keeps so
        many, all or none. What a tile computes gets another layout on its way to an operand, and Triton 3.6 fails on
        booleans that do; on integers it does not."""
        (other,) = (d for d in ranks if d not in keep.ranks)
        count = Value(f"tl.where({keep.code}, {self.size(other)}, 0)", keep.ranks)
        place = Value(f"tl.arange(0, {self.size(other)})", (other,))
        return Value(f"{align(place, ranks)} < {align(count, ranks)}", ranks, "b", prec=COMPARISON)

    def operand(self, expr: Expr) -> Value:
        """A bare read keeps its storage dtype."""
        return self.load(expr) if self.is_read(expr) else value(expr, self.scope)

    def is_read(self, expr: Expr) -> TypeGuard[Access]:
        return isinstance(expr, Access) and expr.tensor not in self.scope.locals

    def together(self, a: Value, b: Value) -> tuple[Value, Value]:
        floats = [v.dtype for v in (a, b) if v.kind == "f" and v.dtype not in (None, "float32")]
        if a.kind == b.kind == "i" and a.dtype == b.dtype == "int8":
            return a, b
        halves = [TRITON_DTYPES[t.dtype] for t in self.cascade.inputs if t.dtype in HALF]
        small = next((d for d in floats if d in ("bfloat16", "float16")), None)
        if small is None and floats and a.dtype == b.dtype:
            return a, b  # eight-bit floats as they are
        computed = a.dtype is None and b.dtype is None  # both from half-precision inputs: rounded as the weights are
        if (
            small is None
            and halves
            and (computed or any(v.kind == "i" or v.dtype not in (None, "float32") for v in (a, b)))
        ):
            small = halves[0]
        target = small or "float32"

        def cast(v: Value) -> Value:
            if v.dtype == target or (target == "float32" and v.kind == "f" and v.dtype is None):
                return v
            return Value(f"{v.tight()}.to(tl.{target})", v.ranks, "f", dtype=target)

        return cast(a), cast(b)

    def turned(self, v: Value, wanted: tuple[str, ...]) -> str:
        return v.code if v.ranks == wanted else f"tl.trans({v.code})"

    def masked(self, v: Value, predicate: Boolean, fill: Expr | None) -> Value:
        assert fill is not None
        return self.where(self.mask(predicate), v, fill)

    def where(self, keep: Value, v: Value, fill: Expr) -> Value:
        ranks = self.scope.sort(v.ranks + keep.ranks)
        filler = value(fill, self.scope).code
        return Value(f"tl.where({align(keep, ranks)}, {align(v, ranks)}, {filler})", ranks, v.kind)

    def mask(self, predicate: Boolean) -> Value:
        if predicate not in self.masks:
            v = value(predicate, self.scope)
            if not v.ranks:
                return v
            name = "keep" if not self.masks else f"keep{len(self.masks)}"
            self.here(f"{name} = {v.code}")
            self.masks[predicate] = Value(name, v.ranks, "b")
        return self.masks[predicate]

    def define(self, s: Statement, v: Value) -> None:
        """Bind the value, in the accumulation dtype, with masks where this tile is masked."""
        code = v.code
        if v.dtype not in (None, "float32") and v.kind == "f":
            code = f"{v.tight()}.to(tl.float32)"
        self.here(f"{s.name} = {code}")
        ranks = v.ranks
        self.scope.locals[s.name] = Local(s.name, ranks, v.kind)
        if s.fill is None:
            return
        if self.in_step:
            self.here("if MASKED:")
            self.here.depth += 1
        masked = self.masked(Value(s.name, ranks, v.kind), s.row, s.fill)
        if masked.ranks != ranks:
            raise Unsupported(f"a mask over {masked.ranks} on {s.name}, which is over {ranks}")
        self.here(f"{s.name} = {masked.code}")
        if self.in_step:
            self.here.depth -= 1

    def store(self, s: Statement, v: Value) -> None:
        t = self.cascade.tensors[s.name]
        if s.row != sympy.true:
            v = self.masked(v, s.row, sympy.Integer(0))
        memory = self.scope.memory[s.name]
        inner = dict(self.loop.inner)
        ordered = self.scope.dims(inner.get(r, r) for r in t.ranks)
        base, address, conditions = memory.pointer, "", []
        for r, stride in zip(t.ranks, memory.strides, strict=True):
            x = inner.get(r, r)
            if x not in self.scope.blocks:
                base += f" + {r}.to(tl.int64) * {stride}"
                continue
            dim = (self.scope.blocks[x].dim,)
            index = Value(x, dim) if x not in inner.values() else Value(f"({x} - {self.loop.coordinate}_lo)", dim)
            wide = "" if x in self.widths else ".to(tl.int64)"
            address += f" + {align(index, ordered)}{wide} * {stride}"
            limit = self.scope.blocks[x].limit
            if limit is not None:
                conditions.append(align(Value(f"({x} < {limit})", dim), ordered))
        full = (
            v.code if set(v.ranks) == set(ordered) else f"tl.broadcast_to({align(v, ordered)}, {self.shape(ordered)})"
        )
        at = memory.pointer
        if base != memory.pointer:
            at = f"{memory.pointer}_at"
            self.here(f"{at} = {base}")
        if full != s.name:
            self.here(f"{memory.pointer}_tile = {full}")
            full = f"{memory.pointer}_tile"
        mask = f", mask={' & '.join(conditions)}" if conditions else ""
        line = f"tl.store({at}{address}, {full}.to({memory.pointer}.dtype.element_ty){mask})"
        if len(line) + 4 * self.here.depth <= 116:
            self.here(line)
            return
        self.here("tl.store(")
        self.here(f"    {at}{address},")
        self.here(f"    {full}.to({memory.pointer}.dtype.element_ty){mask},")
        self.here(")")

    def shape(self, ranks: Iterable[str]) -> str:
        return "[" + ", ".join(map(self.size, ranks)) + "]"

    def statements(self, statements: tuple[Statement, ...]) -> None:
        updates = {v.new: v for v in self.loop.states} if self.in_step else {}
        fused = self.fused(statements) if self.in_step else {}
        for s in statements:
            if s.name in fused.values():
                continue
            self.comment(s)
            if s.name in fused:
                self.accumulate(s, next(x for x in statements if x.name == fused[s.name]))
            elif s.name in self.nest.outputs:
                v = self.evaluate(s)
                read = any(a.tensor == s.name for x in (*statements, *self.loop.epilogue) for a in x.reads)
                if read:  # by another name: its own is the pointer's
                    made = replace(s, name=f"{s.name}_made")
                    self.define(made, v)
                    local = self.scope.locals[s.name] = self.scope.locals.pop(made.name)
                    v = Value(local.code, local.ranks, local.kind)
                self.store(s, v)
            else:
                v = self.evaluate(s)
                if s.name in updates:
                    v = self.spread(v, self.state_ranks(updates[s.name]))
                self.define(s, v)

    def fused(self, statements: tuple[Statement, ...]) -> dict[str, str]:
        """State updates that end in adding a contraction, with its name: the matrix unit adds for free."""
        found: dict[str, str] = {}
        for state in self.loop.states:
            update = next(s for s in statements if s.name == state.new)
            for t in sympy.Add.make_args(update.expr):
                if not isinstance(t, Access):
                    continue
                made = next((s for s in statements if s.name == t.tensor), None)
                users = [s for s in statements for a in s.reads if made is not None and a.tensor == made.name]
                if made is None or made.fill is not None or len(users) != 1:
                    continue
                c = self.as_dot(made)
                if c is not None and c.outer == 1:
                    found[update.name] = made.name
        return found

    def accumulate(self, update: Statement, made: Statement) -> None:
        term = next(t for t in sympy.Add.make_args(update.expr) if isinstance(t, Access) and t.tensor == made.name)
        state = next(v for v in self.loop.states if v.new == update.name)
        self.here(f"{update.name} = {self.spread(value(update.expr - term, self.scope), self.state_ranks(state)).code}")
        self.comment(made)
        v = self.evaluate(made, into=update.name)
        if f", {update.name}" not in v.code:  # integers are converted before they are added
            v = Value(f"{update.name} + {v.code}", v.ranks)
        self.here(f"{update.name} = {v.code}")
        self.scope.locals[update.name] = Local(update.name, v.ranks)

    def state_ranks(self, state: State) -> tuple[str, ...]:
        return self.scope.dims(state.ranks)

    def spread(self, v: Value, ranks: tuple[str, ...]) -> Value:
        if v.ranks == ranks != ():
            return v
        if not ranks:  # a scalar that the loop carries has a type from the start
            return Value(
                f"tl.full([], {v.code}, tl.float32)" if v.kind == "i" or v.code.startswith("float(") else v.code
            )
        if not v.ranks and re.fullmatch(r'-?[\d.]+(e-?\d+)?|float\(".*"\)', v.code):
            return Value(f"tl.full({self.shape(ranks)}, {v.code}, tl.float32)", ranks)
        if v.ranks:
            return Value(f"tl.broadcast_to({align(v, ranks)}, {self.shape(ranks)})", ranks, v.kind)
        return Value(f"tl.full({self.shape(ranks)}, 0.0, tl.float32) + {v.tight(3)}", ranks, v.kind)
