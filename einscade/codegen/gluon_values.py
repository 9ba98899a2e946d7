"""Scalar expressions as Gluon code on one tile: which dimensions a value has, and how it meets the others.

Comes in: sympy expressions over accesses and rank variables, and a `Printer` that knows what each name is. Goes out:
`Value`s, code with dimensions. A tile has two dimensions; a value has both, one of them or none, and is only ever
broadcast. Terms and factors of fewer dimensions are combined first, so that what could be done once a row is not done
once a point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.codegen.base2 import Exp2
from einscade.codegen.gluon_text import is_atomic
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Where

__all__ = ["HELPERS", "Printer", "Value"]

HELPERS: Mapping[str, str] = {
    "settled": '''
@gluon.jit
def settled(x):
    """x + -0, which is x. The assembler (CUDA 12.8) drops the products of a sum whose first reader after the loop is a
    bit operation, as the change of a sign is."""
    return gl.inline_asm_elementwise("add.f32 $0, $1, 0f80000000;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
''',
    "apart": '''
@gluon.jit
def apart():
    """Nothing, once. The assembler makes a short branch's instructions conditional, and issues them in every iteration;
    with one that may not move among them they stay behind the branch."""
    gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
''',
    "hold": '''
@gluon.jit
def hold(x):
    """What waits for products behind this does so once x, a value a row, is known. The assembler moves such waits up,
    in front of work that is to run meanwhile, but not across a barrier; to this one nobody ever comes, as no maximum
    has a signalling NaN's bits. A thread has two rows."""
    text: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 t; max.f32 t, $2, $3; setp.eq.s32 p, t, 0x7f800001; @p bar.arrive 15, 256; "
        "mov.b32 $0, 0; mov.b32 $1, 0; }"
    )
    gl.inline_asm_elementwise(text, "=r,=r,r,r", [x], gl.int32, is_pure=False, pack=2)
''',
    "first_columns": '''
@gluon.jit
def sooner(a, b):
    return a


@gluon.jit
def first_columns(x):
    """Some of the points that each thread has, as they are: for whoever is to wait until points are known."""
    return gl.reduce(x.reshape([64, x.shape[1] // 8, 8]), 1, sooner)
''',
    "hold_parts": '''
@gluon.jit
def hold_parts(x):
    """As `hold`, with parts of the rows' sums, of which a thread has four, and none is a signalling NaN either."""
    text: gl.constexpr = (
        "{ .reg .pred p; .reg .f32 t, u; .reg .b32 v; max.f32 t, $4, $5; max.f32 u, $6, $7; max.f32 t, t, u; "
        "mov.b32 v, t; setp.eq.s32 p, v, 0x7f800001; @p bar.arrive 15, 256; "
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
    )
    gl.inline_asm_elementwise(text, "=r,=r,=r,=r,f,f,f,f", [x], gl.int32, is_pure=False, pack=4)
''',
    "packed": '''
@gluon.jit
def packed(x):
    """x, whose pairs of 16 bits are put together here: in a loop and behind it, the compiler then does so once, in
    front of both, where it costs nothing. Else it takes pairs apart and joins them in every iteration."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=True, pack=2)
''',
    "finite": '''
@gluon.jit
def finite(x):
    """x, or 0 where a row had no points: the reference of an exponential."""
    return gl.where(gl.abs(x) == float("inf"), 0.0, x)
''',
    "reciprocal": '''
@gluon.jit
def reciprocal(x):
    """1 / x by the special-function unit, to one unit in the last place."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
''',
    "at_points": '''
@gluon.constexpr_function
def is_one(x):
    return isinstance(x, int) and x == 1


@gluon.jit
def at_points(x, first, rows, columns, a: gl.constexpr, b: gl.constexpr, stride):
    """Where `first + a * rows + b * columns` of a dimension is, for each point. A thread's rows differ in the bit of 8,
    its columns in all but those of 6: by constants, which are part of a load where elements lie side by side. Points
    with the same number share theirs."""
    thread = (rows & -9)[:, None] * a + (columns & 6)[None, :] * b + first
    constant = (rows & 8)[:, None] * a + (columns & -7)[None, :] * b
    if is_one(stride):
        place = x + thread.to(gl.int64) + constant
    else:
        place = x + (thread + constant) * stride
    return place
''',
    "logistic": '''
@gluon.jit
def logistic(x):
    """a / (1 + a) for a = 2**x, of two neighbours a and b in a row at once: their denominators' product, which is
    1 + b + a*b + a, has the only reciprocal. From 2**30 on, where float32 has 1, powers are cut off, so that nothing
    overflows; 0 stays 0."""
    text: gl.constexpr = (
        "{ .reg .f32 a, b, n, m, d; "
        "min.NaN.f32 a, $2, 0f41F00000; min.NaN.f32 b, $3, 0f41F00000; "
        "ex2.approx.ftz.f32 a, a; ex2.approx.ftz.f32 b, b; "
        "fma.rn.f32 n, a, b, a; fma.rn.f32 m, a, b, b; "
        "add.f32 b, b, 0f3F800000; add.f32 d, n, b; rcp.approx.ftz.f32 d, d; "
        "mul.f32 $0, n, d; mul.f32 $1, m, d; }"
    )
    return gl.inline_asm_elementwise(text, "=f,=f,f,f", [x], gl.float32, is_pure=True, pack=2)
''',
    "tanh_approximate": '''
@gluon.jit
def tanh_approximate(x):
    """tanh by the special-function unit: relative error 2**-11, below bfloat16's rounding (2**-9)."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)
''',
    "tanh": '''
@gluon.jit
def tanh(x):
    """tanh to float32's accuracy: by its series near 0, where the exponential form would cancel."""
    s = x * x
    series = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835 - s * (1382 / 155925))))))
    t = gl.exp2(gl.abs(x) * -2.8853900817779268)
    far = (1 - t) / (1 + t)
    return gl.where(s < 0.1, series, gl.where(x < 0, -far, far))
''',
}
"""Device functions that a generated module includes where it calls them."""


@dataclass(frozen=True)
class Value:
    """`code` over the dimensions `ranks`; `kind`: f (float32), i (integer), b (boolean)."""

    code: str
    ranks: tuple[str, ...] = ()
    kind: str = "f"

    def atom(self) -> str:
        """The code where an operand is wanted."""
        return self.code if is_atomic(self.code) else f"({self.code})"


@dataclass
class Printer:
    """`dims` are the tile's two ranks (after the loop: the rows, and the widths of the tiles); `names` what local
    tensors are, `variables` what ranks and sizes are.

    load: code for an element (or a tile of elements) of a tensor in memory. guard: how `Finite` is printed ("finite",
    or "" where no row can be without points). inside: the points that exist, where some of a tile may not, for reads by
    address. approximate: whether `tanh` may be the hardware's. used: the helpers
    that the printed code calls. rows: the layout in which rows meet the tile, if not the one they are in. columns:
    a tile's first column and its columns from there, where rows and columns are those of the scores. whole: whether
    all of a tile's points exist, but for rows.
    """

    dims: tuple[str, ...]
    names: dict[str, Value]
    variables: dict[str, Value]
    load: Callable[[Access, Printer], Value]
    approximate: bool = False
    guard: str = "finite"
    inside: Value | None = None
    used: set[str] = field(default_factory=set)
    rows: str = ""
    columns: tuple[str, str] | None = None
    whole: bool = False

    def sort(self, *values: Value) -> tuple[str, ...]:
        ranks = {r for v in values for r in v.ranks}
        return tuple(r for r in self.dims if r in ranks)

    def align(self, v: Value, ranks: tuple[str, ...]) -> str:
        """Code that broadcasts against a value with these dimensions."""
        if not v.ranks or v.ranks == ranks:
            return v.atom()
        if v.ranks[0] != self.dims[0]:
            return f"{v.atom()}[None, :]"
        return f"gl.convert_layout({v.code}, {self.rows})[:, None]" if self.rows else f"{v.atom()}[:, None]"

    def floating(self, v: Value) -> Value:
        if v.kind == "f" or (not v.ranks and v.code.lstrip("-").isdigit()):
            return v
        return Value(f"{v.atom()}.to(gl.float32)", v.ranks, "f")

    def value(self, expr: sympy.Basic) -> Value:
        """An expression as code on the present tile."""
        if isinstance(expr, Access):
            return self.names[expr.tensor] if expr.tensor in self.names else self.load(expr, self)
        if isinstance(expr, (BooleanTrue, BooleanFalse)):
            return Value(str(bool(expr)), kind="b")
        if isinstance(expr, sympy.Symbol):
            return self.variables[expr.name] if expr.name in self.variables else Value(expr.name, kind="i")
        if isinstance(expr, sympy.Expr) and expr.is_number:
            return _number(expr)
        if isinstance(expr, sympy.Add):
            return self._add(expr)
        if isinstance(expr, sympy.Mul):
            return self._mul(expr)
        if isinstance(expr, (And, Or)):
            return self._fold([self.value(a) for a in expr.args], " & " if isinstance(expr, And) else " | ")
        if isinstance(expr, Not):
            v = self.value(expr.args[0])
            return Value(f"{v.atom()} == 0", v.ranks, "b")
        if isinstance(expr, sympy.core.relational.Relational):
            return self._relation(expr)
        if isinstance(expr, (sympy.Max, sympy.Min)):
            return self._extreme(expr)
        if isinstance(expr, Where):
            return self._where(expr)
        if isinstance(expr, (FloorDiv, Mod)):
            return self._division(expr)
        if isinstance(expr, sympy.Pow):
            return self._pow(expr)
        return self._function(expr)

    def _converted(self, expr: sympy.Basic, v: Value) -> Value:
        """A factor as float32. Of a sum of integers over the tile (`m - p`) each term is converted, a row or a column
        of them, and not every point; both are exact below 2**24."""
        if v.kind != "i" or len(v.ranks) < 2 or not isinstance(expr, sympy.Add):
            return self.floating(v)
        terms = [(self.floating(self.value(abs_)), sign) for abs_, sign in map(_signed, expr.args)]
        terms.sort(key=lambda t: (t[1], -len(t[0].ranks)))
        part = terms[0]
        for term in terms[1:]:
            part = self._plus(part, term, "f")
        code = part[0].code
        return Value(f"-({code})" if part[1] else code, part[0].ranks)

    # -- arithmetic --

    def _add(self, expr: sympy.Add) -> Value:
        """Terms of the same dimensions first, then the sums of all, the one with most dimensions in front."""
        groups: dict[tuple[str, ...], list[tuple[Value, bool]]] = {}
        for term in expr.args:
            negative = term.could_extract_minus_sign()
            v = self.value(-term if negative else term)
            groups.setdefault(v.ranks, []).append((v, negative))
        kind = "f" if any(v.kind == "f" for vs in groups.values() for v, _ in vs) else "i"
        total: tuple[Value, bool] | None = None
        for ranks in sorted(groups, key=len, reverse=True):
            terms = [(self.floating(v) if kind == "f" else v, n) for v, n in groups[ranks]]
            terms.sort(key=lambda vn: vn[1])
            flip = terms[0][1]
            code = terms[0][0].code
            for v, negative in terms[1:]:
                code += f" {'+' if negative == flip else '-'} {v.atom()}"
            part = Value(code, ranks, kind)
            total = (part, flip) if total is None else self._plus(total, (part, flip), kind)
        assert total is not None
        v, negative = total
        return Value(f"-{v.atom()}", v.ranks, kind) if negative else v

    def _plus(self, a: tuple[Value, bool], b: tuple[Value, bool], kind: str) -> tuple[Value, bool]:
        (left, flip), (right, other) = a, b
        if flip and not other:
            (left, flip), (right, other) = b, a
        ranks = self.sort(left, right)
        first = left.code if left.ranks == ranks else self.align(left, ranks)
        sign = "+" if flip == other else "-"
        return Value(f"{first} {sign} {self.align(right, ranks)}", ranks, kind), flip

    def _mul(self, expr: sympy.Mul) -> Value:
        """Factors of the same dimensions first, numbers with those of fewest dimensions."""
        numbers, rest = expr.as_independent(Access, *expr.free_symbols, as_Add=False)
        coefficient = numbers if numbers.is_Rational else sympy.Float(float(numbers))
        if abs(abs(float(coefficient)) - 1) < 1e-12:  # a factor and its inverse
            coefficient = sympy.Integer(round(float(coefficient)))
        factors = sympy.Mul.make_args(rest)
        values = [self.value(f) for f in factors]
        kind = "f" if any(v.kind == "f" for v in values) or not coefficient.is_Integer else "i"
        values = [self._converted(f, v) if kind == "f" else v for f, v in zip(factors, values, strict=True)]
        negative = coefficient.is_negative
        if abs(coefficient) != 1:
            values.append(_number(abs(coefficient)))
        groups: dict[tuple[str, ...], str] = {}
        for v in sorted(values, key=lambda v: (len(v.ranks), v.code[0].isdigit())):
            groups[v.ranks] = f"{groups[v.ranks]} * {v.atom()}" if v.ranks in groups else v.atom()
        parts = [Value(code, ranks, kind) for ranks, code in sorted(groups.items(), key=lambda g: len(g[0]))]
        total = parts[0]
        for part in parts[1:]:
            ranks = self.sort(total, part)
            total = Value(f"{self.align(part, ranks)} * {self.align(total, ranks)}", ranks, kind)
        return Value(f"-{total.atom()}", total.ranks, kind) if negative else total

    def _pow(self, expr: sympy.Pow) -> Value:
        base, exponent = expr.args
        if base == sympy.E:
            return self._function(sympy.exp(exponent, evaluate=False))
        v = self.floating(self.value(base))
        if exponent == -1:
            return self._inverse(v)
        if exponent in (sympy.Rational(1, 2), sympy.Rational(-1, 2)):
            return Value(f"gl.{'sqrt' if exponent > 0 else 'rsqrt'}({v.code})", v.ranks)
        if exponent.is_Integer and 2 <= abs(exponent) <= 4 and v.code.isidentifier():
            power = Value(" * ".join([v.code] * abs(int(exponent))), v.ranks)
            return power if exponent > 0 else self._inverse(power)
        raise Unsupported(f"the power {expr}")

    def _inverse(self, v: Value) -> Value:
        if len(v.ranks) == 2:
            self.used.add("reciprocal")
            return Value(f"reciprocal({v.code})", v.ranks)
        return Value(f"1.0 / {v.atom()}", v.ranks)

    def _division(self, expr: FloorDiv | Mod) -> Value:
        a, b = expr.args
        if not (a.is_nonnegative and b.is_positive):
            raise Unsupported(f"{expr}: integer division of a number that may be negative")
        left, right = self.value(a), self.value(b)
        ranks = self.sort(left, right)
        sign = "//" if isinstance(expr, FloorDiv) else "%"
        return Value(f"{self.align(left, ranks)} {sign} {self.align(right, ranks)}", ranks, "i")

    # -- comparisons, choices, functions --

    def _fold(self, values: list[Value], symbol: str) -> Value:
        ranks = self.sort(*values)
        return Value(symbol.join(self.align(v, ranks) for v in values), ranks, "b")

    def _relation(self, expr: sympy.core.relational.Relational) -> Value:
        """`a <= b` with terms on the side where they are positive, so that each side has few dimensions, and what has
        none on the side that has no columns, of which a tile has more than rows."""
        difference = expr.lhs - expr.rhs
        over = {t: self.value(t).ranks for t in sympy.Add.make_args(difference)}
        scalars = sympy.Add(*(t for t, own in over.items() if not own))
        positive = {t for t in over if not t.could_extract_minus_sign()}
        left = sympy.Add(*positive)
        wide = {t in positive for t, own in over.items() if self.dims[-1] in own}
        if len(wide) == 1:
            left = sympy.Add(*(t for t in positive if over[t])) + (0 if True in wide else scalars)
        a, b = self.value(left), self.value(left - difference)
        ranks = self.sort(a, b)
        if "f" in (a.kind, b.kind):
            a, b = self.floating(a), self.floating(b)
        return Value(f"{self.align(a, ranks)} {expr.rel_op} {self.align(b, ranks)}", ranks, "b")

    def _extreme(self, expr: sympy.Max | sympy.Min) -> Value:
        name = "gl.maximum" if isinstance(expr, sympy.Max) else "gl.minimum"
        values = [self.value(a) for a in expr.args]
        kind = "f" if any(v.kind == "f" for v in values) else "i"
        values = [self.floating(v) if kind == "f" else v for v in sorted(values, key=lambda v: -len(v.ranks))]
        ranks = self.sort(*values)
        code = self.align(values[0], ranks)
        for v in values[1:]:
            code = f"{name}({code}, {self.align(v, ranks)})"
        return Value(code, ranks, kind)

    def _where(self, expr: Where) -> Value:
        condition, a, b = (self.value(x) for x in expr.args)
        kind = "f" if "f" in (a.kind, b.kind) else a.kind
        if kind == "f":
            a, b = self.floating(a), self.floating(b)
        ranks = self.sort(condition, a, b)
        parts = ", ".join(self.align(v, ranks) for v in (condition, a, b))
        return Value(f"gl.where({parts})", ranks, kind)

    def _function(self, expr: sympy.Basic) -> Value:
        v = self.floating(self.value(expr.args[0])) if expr.args else None
        name = _FUNCTIONS.get(expr.func)
        if v is None or len(expr.args) != 1:
            raise Unsupported(f"function {expr.func.__name__} in {expr}")
        if isinstance(expr, Finite):
            if not self.guard:
                return v
            name = self.guard
        elif isinstance(expr, sympy.tanh):
            name = "tanh_approximate" if self.approximate else "tanh"
        if name is None:
            raise Unsupported(f"function {expr.func.__name__} in {expr}")
        if name in HELPERS:
            self.used.add(name)
        return Value(f"{name}({v.code})", v.ranks)


_FUNCTIONS: Mapping[type, str] = {
    Exp2: "gl.exp2", sympy.exp: "gl.exp", sympy.log: "gl.log", sympy.sin: "gl.sin", sympy.cos: "gl.cos",
    sympy.erf: "gl.erf", sympy.Abs: "gl.abs", sympy.floor: "gl.floor", sympy.ceiling: "gl.ceil",
}  # fmt: skip


def _signed(term: Expr) -> tuple[Expr, bool]:
    negative = bool(term.could_extract_minus_sign())
    return (-term if negative else term), negative


def _number(x: Expr) -> Value:
    if x.is_Integer:
        return Value(str(int(x)), kind="i")
    if x in (sympy.oo, -sympy.oo):
        return Value('float("inf")' if x == sympy.oo else 'float("-inf")')
    return Value(repr(float(x)))
