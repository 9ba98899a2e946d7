"""Scalar expressions as Triton code on a tile.

Comes in: sympy expressions and a `TritonScope` that says what each rank and tensor is inside the kernel. Goes out:
`Value`s: code with at most two dimensions, in the scope's order. A rank is a *point* (one index a program: its value
is a scalar) or a *block* (a vector of indices along a dimension, padded to a power of two; ranks that a tile has a box
of share one dimension).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.codegen.base2 import Exp2
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Round, Trunc, Where, free_vars
from einscade.passes.terms import opposed

__all__ = ["Block", "Lines", "Local", "Memory", "TritonScope", "Value", "align", "scalar", "value"]

ATOM, UNARY, PRODUCT, SUM, COMPARISON = range(5)


@dataclass
class Lines:
    """Lines of one function's body."""

    depth: int = 1
    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append("    " * self.depth + line)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class Value:
    """Code over the dimensions `ranks`. `kind`: f, i or b. `dtype`: the storage dtype of an unconverted load, else None
    (float32)."""

    code: str
    ranks: tuple[str, ...] = ()
    kind: str = "f"
    prec: int = ATOM
    dtype: str | None = None

    def tight(self, prec: int = ATOM) -> str:
        return self.code if self.prec <= prec else f"({self.code})"

    def within(self, extent: str, index: Expr) -> str:
        """That `index`, whose value this is, is inside a dimension, as code."""
        below = f"({self.code}) < {extent}"
        return f"{self.code} < {extent}" if index.is_nonnegative else f"(({self.code}) >= 0) & ({below})"


@dataclass(frozen=True)
class Block:
    """A rank that a tile has several points of: `size` indices along the dimension `dim`, held by the variable `index`,
    of which those below `limit` are there (None: all of them are, always)."""

    index: str
    size: str
    limit: str | None
    dim: str


@dataclass(frozen=True)
class Memory:
    """A tensor in memory: its pointer, and the names of its strides, a dimension each."""

    pointer: str
    strides: tuple[str, ...]
    extents: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class Local:
    """A value of the kernel: a variable over ranks."""

    code: str
    ranks: tuple[str, ...]
    kind: str = "f"


@dataclass
class TritonScope:
    """`order`: of dimensions. `points`: scalars by rank. `blocks`: those along dimensions by rank. `load`: emits a load
    and returns its variable (loads of one place are shared). `helpers`: names of helper functions used."""

    order: tuple[str, ...]
    points: Mapping[str, str]
    blocks: dict[str, Block]
    memory: Mapping[str, Memory]
    locals: dict[str, Local]
    acc: str
    load: Callable[[Access], Value]
    helpers: set[str] = field(default_factory=set)

    def sort(self, ranks: Iterable[str]) -> tuple[str, ...]:
        found = tuple(sorted(dict.fromkeys(ranks), key=self.order.index))
        if len(found) > 2:
            raise Unsupported(f"a tile over {', '.join(found)}: Triton kernels are written with two dimensions")
        return found

    def dims(self, ranks: Iterable[str]) -> tuple[str, ...]:
        """The dimensions that values over these ranks have; points have none."""
        return self.sort(self.blocks[r].dim for r in ranks if r in self.blocks)


def scalar(expr: Expr, names: Mapping[str, str]) -> str:
    """A bound or condition over integers, as kernel code."""
    return _scalar(expr, names).code


def _scalar(expr: Expr, names: Mapping[str, str]) -> Value:
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return Value(str(bool(expr)))
    if isinstance(expr, sympy.Symbol):
        return Value(names.get(expr.name, expr.name))
    if expr.is_Integer:
        return Value(str(int(expr)), prec=SUM if expr < 0 else ATOM)
    args = [_scalar(a, names) for a in expr.args]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        call = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        code = args[0].code
        for a in args[1:]:
            code = f"{call}({code}, {a.code})"
        return Value(code)
    if isinstance(expr, sympy.Add):
        plus = sorted((t for t in expr.args if not t.could_extract_minus_sign()), key=lambda t: t.is_number)
        minus = [-t for t in expr.args if t.could_extract_minus_sign()]
        code = " + ".join(_scalar(t, names).tight(PRODUCT) for t in plus)
        for t in minus:
            code += (" - " if code else "-") + _scalar(t, names).tight(PRODUCT)
        return Value(code, prec=SUM)
    if isinstance(expr, sympy.Mul):
        if expr.args[0] == -1:
            return Value(f"-{_scalar(-expr, names).tight(PRODUCT)}", prec=PRODUCT)
        return Value(" * ".join(a.tight(PRODUCT) for a in args), prec=PRODUCT)
    if isinstance(expr, FloorDiv):
        return Value(f"{args[0].tight(PRODUCT)} // {args[1].tight()}", prec=PRODUCT)
    if isinstance(expr, Mod):
        return Value(f"{args[0].tight(PRODUCT)} % {args[1].tight()}", prec=PRODUCT)
    if isinstance(expr, (And, Or)):
        word = " & " if isinstance(expr, And) else " | "
        return Value(word.join(f"({a.code})" for a in args), prec=COMPARISON)
    if isinstance(expr, Not):
        return Value(f"~({args[0].code})", prec=UNARY)
    if isinstance(expr, sympy.core.relational.Relational):
        difference = expr.lhs - expr.rhs
        left = sympy.Add(*(t for t in sympy.Add.make_args(difference) if not t.could_extract_minus_sign()))
        right = left - difference
        return Value(f"{scalar(left, names)} {expr.rel_op} {scalar(right, names)}", prec=COMPARISON)
    raise Unsupported(f"the bound {expr}")


def align(v: Value, ranks: Sequence[str]) -> str:
    """The value broadcasting against the dimensions `ranks`."""
    if len(ranks) < 2 or len(v.ranks) != 1:
        return v.code
    return f"{v.tight()}[:, None]" if v.ranks[0] == ranks[0] else f"{v.tight()}[None, :]"


def aligned(v: Value, ranks: Sequence[str]) -> Value:
    code = align(v, ranks)
    return v if code == v.code else Value(code, v.ranks, v.kind)


def value(expr: Expr, scope: TritonScope) -> Value:
    """An expression as code on the tile."""
    if isinstance(expr, Access):
        return _read(expr, scope)
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return Value(str(bool(expr)), kind="b")
    if isinstance(expr, sympy.Symbol):
        if expr.name in scope.blocks:
            block = scope.blocks[expr.name]
            return Value(block.index, (block.dim,), "i")
        return Value(scope.points.get(expr.name, expr.name), kind="i")
    if expr.is_number and not expr.args:
        return _number(expr)
    if expr.is_number and isinstance(expr, sympy.Expr):
        return Value(repr(float(expr)))
    if isinstance(expr, sympy.Add):
        return _add(expr, scope)
    if isinstance(expr, sympy.Mul):
        return _mul(expr, scope)
    if isinstance(expr, sympy.Pow):
        return _pow(expr, scope)
    if isinstance(expr, (And, Or, Not)):
        return _logic(expr, scope)
    if isinstance(expr, sympy.core.relational.Relational):
        sides = expr.args
        if expr.rhs == 0 and expr.lhs.is_Add:  # a difference of data could overflow
            right = sympy.Add(*(-t for t in expr.lhs.args if t.could_extract_minus_sign()))
            sides = (expr.lhs + right, right)
        parts, ranks = _operands(sides, scope)
        return Value(f"{parts[0].tight(SUM)} {expr.rel_op} {parts[1].tight(SUM)}", ranks, "b", COMPARISON)
    if isinstance(expr, Where):
        condition, a, b = expr.args
        parts, ranks = _operands((condition, a, b), scope)
        kind = "f" if "f" in (parts[1].kind, parts[2].kind) else parts[1].kind
        return Value(f"tl.where({', '.join(p.code for p in parts)})", ranks, kind)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        name = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        parts, ranks = _operands(expr.args, scope)
        code = parts[0].code
        for p in parts[1:]:
            code = f"{name}({code}, {p.code})"
        return Value(code, ranks, "f" if any(p.kind == "f" for p in parts) else "i")
    if isinstance(expr, (FloorDiv, Mod)):
        return _integer_division(expr, scope)
    return _function(expr, scope)


def _number(expr: Expr) -> Value:
    if expr.is_Integer:
        return Value(str(int(expr)), kind="i", prec=SUM if expr < 0 else ATOM)
    if expr in (sympy.oo, -sympy.oo):
        return Value('float("inf")' if expr == sympy.oo else 'float("-inf")')
    if expr == sympy.nan:
        return Value('float("nan")')
    return Value(repr(float(expr)), prec=SUM if expr < 0 else ATOM)


def _operands(exprs: Sequence[Expr], scope: TritonScope) -> tuple[list[Value], tuple[str, ...]]:
    """Values aligned to the union of their dimensions."""
    values = [value(e, scope) for e in exprs]
    ranks = scope.sort(r for v in values for r in v.ranks)
    return [aligned(v, ranks) for v in values], ranks


def _binary(a: Value, b: Value, symbol: str, prec: int, scope: TritonScope) -> Value:
    ranks = scope.sort(a.ranks + b.ranks)
    kind = "f" if "f" in (a.kind, b.kind) or symbol == "/" else "i"
    right = prec - 1 if symbol in "-/" else prec
    return Value(f"{aligned(a, ranks).tight(prec)} {symbol} {aligned(b, ranks).tight(right)}", ranks, kind, prec)


def _add(expr: sympy.Add, scope: TritonScope) -> Value:
    pair = opposed(expr)
    terms = [(t.could_extract_minus_sign(), t) for t in sympy.Add.make_args(expr) if t not in (pair or ())]
    values = [(value(-t if negative else t, scope), negative, t.is_number) for negative, t in terms]
    if pair is not None:
        between = _binary(value(pair[0], scope), value(-pair[1], scope), "-", SUM, scope)
        values.append((replace(between, code=f"({between.code})", prec=ATOM), False, False))
    values.sort(key=lambda vnc: (vnc[1], vnc[2], -len(vnc[0].ranks)))
    (total, negative, _), others = values[0], values[1:]
    if negative:
        total = Value(f"-{total.tight(UNARY)}", total.ranks, total.kind, UNARY)
    for v, minus, _ in others:
        total = _binary(total, v, "-" if minus else "+", SUM, scope)
    return total


def _mul(expr: sympy.Mul, scope: TritonScope) -> Value:
    coefficient, rest = expr.as_coeff_Mul()
    above: list[Expr] = []
    below: list[Expr] = []
    for f in sympy.Mul.make_args(rest):
        if f == 1:
            continue
        inverse = isinstance(f, sympy.Pow) and f.exp.is_number and f.exp.is_negative and f.exp.is_Integer
        (below if inverse else above).append(1 / f if inverse else f)
    if not above:
        above, coefficient = [coefficient], sympy.Integer(1)
    values = sorted((value(f, scope) for f in above), key=lambda v: -len(v.ranks))
    total = values[0]
    for v in values[1:]:
        total = _binary(total, v, "*", PRODUCT, scope)
    if coefficient == -1:
        total = Value(f"-{total.tight(UNARY)}", total.ranks, total.kind, UNARY)
    elif coefficient != 1:
        total = _binary(total, value(coefficient, scope), "*", PRODUCT, scope)
    for f in below:
        total = _binary(total, value(f, scope), "/", PRODUCT, scope)
    return total


def _pow(expr: sympy.Pow, scope: TritonScope) -> Value:
    base, exponent = expr.args
    v = value(base, scope)
    if exponent == sympy.Rational(1, 2):
        return Value(f"tl.sqrt({_floating(v, scope)})", v.ranks)
    if exponent == sympy.Rational(-1, 2):
        return Value(f"tl.rsqrt({_floating(v, scope)})", v.ranks)
    if exponent.is_Integer and 0 < abs(int(exponent)) <= 4:
        code = " * ".join([v.tight(UNARY)] * abs(int(exponent)))
        if exponent > 0:
            return Value(code, v.ranks, v.kind, PRODUCT)
        return Value(f"1.0 / ({code})", v.ranks, "f", PRODUCT)
    e = value(exponent, scope)
    ranks = scope.sort(v.ranks + e.ranks)
    return Value(f"tl.exp2({aligned(e, ranks).tight(PRODUCT)} * tl.log2({_floating(aligned(v, ranks), scope)}))", ranks)


def _floating(v: Value, scope: TritonScope) -> str:
    return v.code if v.kind == "f" else f"({v.code}).to(tl.{scope.acc})"


def _logic(expr: And | Or | Not, scope: TritonScope) -> Value:
    if isinstance(expr, Not):
        v = value(expr.args[0], scope)
        return Value(f"~{v.tight()}", v.ranks, "b", UNARY)
    parts, ranks = _operands(sorted(expr.args, key=sympy.default_sort_key), scope)
    symbol = " & " if isinstance(expr, And) else " | "
    return Value(symbol.join(p.tight() for p in parts), ranks, "b", COMPARISON)


def _integer_division(expr: FloorDiv | Mod, scope: TritonScope) -> Value:
    """Triton divides towards zero; ranges that may be negative go through a helper."""
    parts, ranks = _operands(expr.args, scope)
    divides = isinstance(expr, FloorDiv)
    if expr.args[0].is_nonnegative and expr.args[1].is_positive:
        symbol = "//" if divides else "%"
        return Value(f"{parts[0].tight(PRODUCT)} {symbol} {parts[1].tight()}", ranks, "i", PRODUCT)
    name = "floor_div" if divides else "floor_mod"
    scope.helpers.add(name)
    return Value(f"{name}({parts[0].code}, {parts[1].code})", ranks, "i")


_FUNCTIONS = {
    sympy.exp: "tl.exp", Exp2: "tl.exp2", sympy.log: "tl.log", sympy.sin: "tl.sin", sympy.cos: "tl.cos",
    sympy.erf: "tl.erf", sympy.Abs: "tl.abs", sympy.floor: "tl.floor", sympy.ceiling: "tl.ceil",
}  # fmt: skip
_HELPERS = {sympy.tanh: "tanh", Round: "round_even", Trunc: "truncate", sympy.sign: "sign", Finite: "finite_or_zero"}


def _function(expr: Expr, scope: TritonScope) -> Value:
    if expr.func not in _FUNCTIONS and expr.func not in _HELPERS:
        raise Unsupported(f"function {expr.func.__name__}")
    v = value(expr.args[0], scope)
    if expr.func in _FUNCTIONS:
        return Value(f"{_FUNCTIONS[expr.func]}({_floating(v, scope)})", v.ranks)
    name = _HELPERS[expr.func]
    scope.helpers.add(name)
    return Value(f"{name}({_floating(v, scope)})", v.ranks)


def _read(access: Access, scope: TritonScope) -> Value:
    local = scope.locals.get(access.tensor)
    if local is None:
        v = scope.load(access)
        return (
            v
            if v.kind != "f" or v.dtype in (None, scope.acc)
            else replace(v, code=f"{v.tight()}.to(tl.{scope.acc})", dtype=None)
        )
    blocks = [i.name for i in access.index if isinstance(i, sympy.Symbol) and i.name in scope.blocks]
    points = [i for i in access.index if not (isinstance(i, sympy.Symbol) and i.name in scope.blocks)]
    if scope.dims(blocks) != local.ranks or any(_moved(i, scope) for i in points):
        raise Unsupported(f"{access}: a value of the loop read at another point of its tile")
    return Value(local.code, local.ranks, local.kind)


def _moved(index: Expr, scope: TritonScope) -> bool:
    """Whether a point's index is anything but the program's own."""
    return not isinstance(index, sympy.Symbol) and bool(free_vars(index) & {*scope.points, *scope.blocks})
