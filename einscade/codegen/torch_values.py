"""Scalar expressions as torch code: which dimensions a value has, how it broadcasts, when it may be changed in place.

Comes in: sympy expressions over accesses and rank variables, and a `Scope` that says what each name is at this place
of the program. Goes out: `Value`s, code with the ranks of its dimensions. Dimensions are always in the scope's order,
so that aligning two values only ever inserts dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.codegen.host import number
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Round, Trunc, Where, free_vars
from einscade.passes.terms import opposed

__all__ = [
    "ATOM", "COMPARISON", "Name", "Range", "Scope", "Value", "align", "as_float", "as_tensor", "exact_factor", "value",
]  # fmt: skip

ATOM, PRODUCT, SUM, COMPARISON = 0, 1, 2, 3
LOG2_E = repr(math.log2(math.e))


@dataclass(frozen=True)
class Value:
    """`code` with dimensions `ranks`. `kind`: f (float), i (integer), b (boolean). `owned`: a fresh tensor of exactly
    these dimensions that nothing else refers to, so that it may be changed in place. `host`: a number of Python's."""

    code: str
    ranks: tuple[str, ...] = ()
    kind: str = "f"
    owned: bool = False
    prec: int = ATOM
    host: bool = False

    def tight(self, prec: int = ATOM) -> str:
        return self.code if self.prec <= prec else f"({self.code})"


@dataclass(frozen=True)
class Range:
    """What a rank runs over here: all of `size`, or `lo:hi` of it, or, with `at`, a single place."""

    size: str
    lo: str | None = None
    hi: str | None = None
    at: str | None = None


@dataclass(frozen=True)
class Name:
    """A tensor at this place: a variable of the code whose dimensions have these ranks. `stored`: in memory, indexed
    by whole ranks; otherwise a value of the loop, whose dimensions cover just the present tile, in the scope's order:
    `declared` then has the statement's own order, which is that of an access's indices."""

    code: str
    ranks: tuple[str, ...]
    dtype: str
    stored: bool
    fresh: bool = False
    extents: tuple[str, ...] = ()
    declared: tuple[str, ...] = ()


@dataclass
class Scope:
    """What names mean. `order` is the order of dimensions; `acc` the dtype computed in ("float32" or "float64");
    `in_place` whether owned values may be overwritten; `dead` the local names whose last read is being printed;
    `numbers` the lengths of tiles, by symbol."""

    order: tuple[str, ...]
    ranges: dict[str, Range]
    names: dict[str, Name]
    acc: str
    in_place: bool
    device: str
    dead: set[str] = field(default_factory=set)
    rank_values: Callable[[str], str] | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)

    @property
    def dims(self) -> frozenset[str]:
        """The ranks that are dimensions of values here."""
        return frozenset(name for name, r in self.ranges.items() if r.at is None)

    def sort(self, ranks: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted(dict.fromkeys(ranks), key=self.order.index))


def exact_factor(expr: Expr) -> bool:
    """Whether multiplying by it rounds nothing: a power of two."""
    return bool(expr.is_number) and abs(math.frexp(float(expr))[0]) == 0.5


# -- tensors ----------------------------------------------------------------------------------------------------------


def align(v: Value, ranks: tuple[str, ...]) -> str:
    """Code for a value that broadcasts against dimensions `ranks` (a superset of its own, both in scope order)."""
    if not v.ranks or v.ranks == ranks[len(ranks) - len(v.ranks) :]:
        return v.code
    first = ranks.index(v.ranks[0])
    index = [":" if r in v.ranks else "None" for r in ranks[first:]]
    kept = len(v.ranks)
    if index[:kept] == [":"] * kept:
        index = (["..."] if kept > 1 else [":"]) + index[kept:]
    return f"{v.tight()}[{', '.join(index)}]"


def value(expr: Expr, scope: Scope) -> Value:
    """An expression as torch code on the present tile."""
    if isinstance(expr, Access):
        return read(expr, scope)
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return Value(str(bool(expr)), kind="b", host=True)
    if isinstance(expr, sympy.Symbol):
        return _variable(expr.name, scope)
    if expr.is_number and not expr.args:
        prec = SUM if expr.is_negative else ATOM
        return Value(number(expr), kind="i" if expr.is_Integer else "f", prec=prec, host=True)
    if expr.is_number and isinstance(expr, sympy.Expr):
        return Value(repr(float(expr)), host=True)
    if isinstance(expr, sympy.Add):
        return _add(expr, scope)
    if isinstance(expr, sympy.Mul):
        return _mul(expr, scope)
    if isinstance(expr, sympy.Pow):
        return _pow(expr, scope)
    if isinstance(expr, (And, Or, Not)):
        return _logic(expr, scope)
    if isinstance(expr, sympy.core.relational.Relational):
        return _relation(expr, scope)
    if isinstance(expr, Where):
        return _where(expr, scope)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return _extreme(expr, scope)
    if isinstance(expr, (FloorDiv, Mod)):
        return _integer_division(expr, scope)
    if isinstance(expr, Finite):
        v = value(expr.args[0], scope)
        return Value(f"{v.tight()}.masked_fill({v.tight()}.isinf(), 0)", v.ranks, "f", True)
    return _function(expr, scope)


def _variable(name: str, scope: Scope) -> Value:
    if name not in scope.ranges:
        return Value(scope.numbers.get(name, name), kind="i", host=True)
    r = scope.ranges[name]
    if r.at is not None:
        return Value(r.at, kind="i", prec=ATOM if r.at.isidentifier() else PRODUCT, host=True)
    assert scope.rank_values is not None
    return Value(scope.rank_values(name), (name,), "i")


_FUNCTIONS = {
    sympy.exp: "exp", sympy.log: "log", sympy.tanh: "tanh", sympy.sin: "sin", sympy.cos: "cos", sympy.erf: "erf",
    sympy.Abs: "abs", sympy.sign: "sign", sympy.floor: "floor", sympy.ceiling: "ceil", sympy.sinh: "sinh",
    sympy.cosh: "cosh", sympy.tan: "tan", sympy.atan: "atan", sympy.asin: "asin", sympy.acos: "acos",
    sympy.asinh: "asinh", sympy.acosh: "acosh", sympy.atanh: "atanh", sympy.erfc: "erfc", sympy.loggamma: "lgamma",
    Round: "round", Trunc: "trunc",
}  # fmt: skip


def _function(expr: Expr, scope: Scope) -> Value:
    name = _FUNCTIONS.get(expr.func)
    if name is None:
        raise Unsupported(f"function {expr.func.__name__} in {expr}")
    v = value(expr.args[0], scope)
    if v.host:
        v = as_tensor(replace(v, kind="f"), scope)
    if name == "exp" and scope.in_place:  # torch's exp2 takes less than half of the time, with this pass too
        return _method(_binary(as_float(v, scope), Value(LOG2_E), "*", "mul", scope, PRODUCT), "exp2", scope)
    return _method(v, name, scope)


def as_tensor(v: Value, scope: Scope) -> Value:
    """A number of Python's as a tensor: what torch's functions and other statements read."""
    if not v.host:
        return v
    dtype = {"f": scope.acc, "i": "int64", "b": "bool"}[v.kind]
    return Value(f"torch.full((), {v.code}, dtype=torch.{dtype}, device={scope.device})", (), v.kind, True)


_OF_INTEGERS = ("abs", "sign", "floor", "ceil", "round", "trunc", "square", "clamp")


def _method(v: Value, name: str, scope: Scope, *args: str) -> Value:
    if v.kind == "i":
        if name in _OF_INTEGERS:
            return Value(f"{v.tight()}.{name}({', '.join(args)})", v.ranks, "i", True)
        v = as_float(v, scope)
    in_place = "_" if v.owned and scope.in_place and v.kind == "f" else ""
    return Value(f"{v.tight()}.{name}{in_place}({', '.join(args)})", v.ranks, "f" if v.kind != "b" else "b", True)


def as_float(v: Value, scope: Scope) -> Value:
    """Integers and booleans as floats of the dtype computed in: torch itself would take its default one."""
    if v.kind == "f" or v.host:
        return v
    narrow = v.code.removesuffix(".long()") if v.prec == ATOM else v.code  # small integers are read as 64-bit ones
    return _cast(replace(v, code=narrow), scope)


def _cast(v: Value, scope: Scope) -> Value:
    method = {"float32": "float", "float64": "double"}[scope.acc]
    return Value(f"{v.tight()}.{method}()", v.ranks, "f", True)


def _terms(args: Sequence[Expr], scope: Scope) -> list[Value]:
    """Operands, the one with most dimensions first (an owned one before others)."""
    values = [value(a, scope) for a in args]
    return sorted(values, key=lambda v: (-len(v.ranks), not v.owned))


def _binary(a: Value, b: Value, symbol: str, method: str, scope: Scope, prec: int) -> Value:
    ranks = scope.sort(a.ranks + b.ranks)
    kind = "f" if "f" in (a.kind, b.kind) or symbol == "/" else "i"
    if kind == "f" and not any(v.kind == "f" and not v.host for v in (a, b)):
        a, b = as_float(a, scope), as_float(b, scope)
    if scope.in_place and a.owned and a.ranks == ranks and a.kind == kind == "f":
        return Value(f"{a.tight()}.{method}_({align(b, ranks)})", ranks, kind, True)
    left, right = Value(align(a, ranks), prec=a.prec), Value(align(b, ranks), prec=b.prec)
    tight = prec - 1 if symbol in "-/" else prec
    code = f"{left.tight(prec)} {symbol} {right.tight(tight)}"
    return Value(code, ranks, kind, bool(ranks), prec, a.host and b.host)


def _add(expr: sympy.Add, scope: Scope) -> Value:
    constant, rest = expr.as_coeff_Add()
    pair = opposed(rest)
    terms = [(t.could_extract_minus_sign(), t) for t in sympy.Add.make_args(rest) if t not in (pair or ())]
    values = [(value(-t if negative else t, scope), negative) for negative, t in terms]
    if pair is not None:
        between = _binary(value(pair[0], scope), value(-pair[1], scope), "-", "sub", scope, SUM)
        values.append((replace(between, code=f"({between.code})", prec=ATOM), False))
    values.sort(key=lambda vn: (vn[1], -len(vn[0].ranks), not vn[0].owned))
    (total, negative), others = values[0], values[1:]
    if negative:
        total = Value(f"-{total.tight()}", total.ranks, total.kind, bool(total.ranks), PRODUCT, total.host)
    for v, minus in others:
        total = _binary(total, v, "-" if minus else "+", "sub" if minus else "add", scope, SUM)
    if constant != 0:
        c = value(abs(constant), scope)
        minus = bool(constant < 0)
        total = _binary(total, c, "-" if minus else "+", "sub" if minus else "add", scope, SUM)
    return total


def _mul(expr: sympy.Mul, scope: Scope) -> Value:
    coefficient, rest = expr.as_coeff_Mul()
    above: list[Expr] = []
    below: list[Expr] = []
    for f in sympy.Mul.make_args(rest):
        if f == 1:
            continue
        inverse = isinstance(f, sympy.Pow) and f.exp.is_number and f.exp.is_negative
        (below if inverse else above).append(1 / f if inverse else f)
    if coefficient.is_Rational and not coefficient.is_Integer and coefficient.p in (1, -1) and above:
        below.append(sympy.Integer(coefficient.q))
        coefficient = sympy.Integer(coefficient.p)
    if not above:
        above, coefficient = [coefficient], sympy.Integer(1)
    values = _terms(above, scope)
    total = values[0]
    for v in values[1:]:
        total = _binary(total, v, "*", "mul", scope, PRODUCT)
    if coefficient == -1:
        total = Value(f"-{total.tight(PRODUCT)}", total.ranks, total.kind, bool(total.ranks), PRODUCT, total.host)
    elif coefficient != 1:
        total = _binary(total, value(coefficient, scope), "*", "mul", scope, PRODUCT)
    for f in below:
        total = _binary(as_float(total, scope), as_float(value(f, scope), scope), "/", "div", scope, PRODUCT)
    return total


def _pow(expr: sympy.Pow, scope: Scope) -> Value:
    base, exponent = expr.args
    if base == sympy.E:
        return _function(sympy.exp(exponent, evaluate=False), scope)
    if exponent.is_number and exponent.is_negative and exponent != sympy.Rational(-1, 2):
        v = as_float(value(base**-exponent, scope), scope)
        return Value(f"1 / {v.tight()}", v.ranks, "f", bool(v.ranks), PRODUCT, v.host)
    v = value(base, scope)
    if exponent.is_number and v.host:
        kind = "i" if exponent.is_Integer and v.kind == "i" else "f"
        return Value(f"({v.tight()} ** {number(exponent)})", (), kind, host=True)
    if exponent == sympy.Rational(-1, 2):
        return _method(v, "rsqrt", scope)
    if exponent == 2:
        return _method(v, "square", scope)
    if exponent == sympy.Rational(1, 2):
        return _method(v, "sqrt", scope)
    if exponent.is_number:
        return _method(v, "pow", scope, number(exponent))
    v, e = as_tensor(v, scope), value(exponent, scope)
    ranks = scope.sort(v.ranks + e.ranks)
    return Value(f"torch.pow({align(v, ranks)}, {align(e, ranks)})", ranks, "f", True)


def _logic(expr: And | Or | Not, scope: Scope) -> Value:
    if isinstance(expr, Not):
        v = value(expr.args[0], scope)
        if v.host:
            return Value(f"not {v.tight()}", kind="b", prec=COMPARISON, host=True)
        return Value(f"~{v.tight()}", v.ranks, "b", True, PRODUCT)
    parts = [value(a, scope) for a in expr.args]
    ranks = scope.sort([r for v in parts for r in v.ranks])
    symbol = " & " if isinstance(expr, And) else " | "
    code = symbol.join(Value(align(v, ranks), prec=v.prec).tight() for v in parts)
    host = all(v.host for v in parts)
    return Value(code, ranks, "b", not host, COMPARISON, host)


def _relation(expr: sympy.core.relational.Relational, scope: Scope) -> Value:
    left, right = value(expr.lhs, scope), value(expr.rhs, scope)
    ranks = scope.sort(left.ranks + right.ranks)
    symbol = expr.rel_op
    a, b = (Value(align(v, ranks), prec=v.prec).tight(SUM) for v in (left, right))
    host = left.host and right.host
    return Value(f"{a} {symbol} {b}", ranks, "b", not host, COMPARISON, host)


def _where(expr: Where, scope: Scope) -> Value:
    condition, *branches = (value(a, scope) for a in expr.args)
    kind = "f" if any(v.kind == "f" for v in branches) else branches[0].kind
    if kind == "f" and not any(v.kind == "f" and not v.host for v in branches):  # torch would take its default dtype
        i = next((i for i, v in enumerate(branches) if not v.host), 0)
        v = branches[i]
        branches[i] = as_tensor(replace(v, kind=kind), scope) if v.host else as_float(v, scope)
    condition = as_tensor(condition, scope)
    ranks = scope.sort([r for v in (condition, *branches) for r in v.ranks])
    codes = ", ".join(align(v, ranks) for v in (condition, *branches))
    return Value(f"torch.where({codes})", ranks, kind, True)


def _extreme(expr: sympy.Max | sympy.Min, scope: Scope) -> Value:
    name = "max" if isinstance(expr, sympy.Max) else "min"
    values = _terms(expr.args, scope)
    tensors = [v for v in values if not v.host]
    scalars = [v for v in values if v.host]
    if len(scalars) > 1:  # sizes, compared on the host
        code = f"{name}({', '.join(v.code for v in scalars)})"
        scalars = [Value(code, kind="f" if any(v.kind == "f" for v in scalars) else "i", host=True)]
    if not tensors:
        return scalars[0]
    total = tensors[0]
    for v in (*tensors[1:], *scalars):
        if v.host:
            bound = "min" if name == "max" else "max"
            total = _method(total, "clamp", scope, f"{bound}={v.code}")
            continue
        ranks = scope.sort(total.ranks + v.ranks)
        kind = "f" if "f" in (total.kind, v.kind) else "i"
        total = Value(f"torch.{name}imum({align(total, ranks)}, {align(v, ranks)})", ranks, kind, True)
    return total


def _integer_division(expr: FloorDiv | Mod, scope: Scope) -> Value:
    a, b = value(expr.args[0], scope), value(expr.args[1], scope)
    ranks = scope.sort(a.ranks + b.ranks)
    symbol = "//" if isinstance(expr, FloorDiv) else "%"
    left, right = Value(align(a, ranks), prec=a.prec), Value(align(b, ranks), prec=b.prec)
    code = f"{left.tight(PRODUCT)} {symbol} {right.tight()}"
    return Value(code, ranks, "i", bool(ranks), PRODUCT, a.host and b.host)


# -- reads ------------------------------------------------------------------------------------------------------------


def read(access: Access, scope: Scope) -> Value:
    """A tensor on the present tile: slices where an index is a rank, integer indexing where it is anything else."""
    name = scope.names[access.tensor]
    if name.declared:
        at = dict(zip(name.declared, access.index, strict=True))
        access = access.at(*(at[r] for r in name.ranks))
    name, access = _merged(*_unmerged(name, access, scope), scope)
    simple: list[str | None] = []  # the rank of a dimension that is sliced
    taken: set[str] = set()
    for dim, i in enumerate(access.index):
        rank = i.name if isinstance(i, sympy.Symbol) and i.name in scope.ranges else None
        if rank is not None and (scope.ranges[rank].at is not None or rank in taken):
            rank = None
        if rank is not None and not name.stored and rank != name.ranks[dim]:
            rank = None
        if rank is not None and _overruns(name, dim, scope.ranges[rank]):
            rank = None
        if rank is not None:
            taken.add(rank)
        simple.append(rank)
    depends = [set() if r else _ranks_of(i, scope) for r, i in zip(simple, access.index, strict=True)]
    gathered = [d for d, r in enumerate(simple) if r is None and (depends[d] or _reads_tensor(access.index[d]))]
    shared = set().union(*(depends[d] for d in gathered)) if gathered else set()
    gathered += [d for d, r in enumerate(simple) if r is not None and r in shared]
    if gathered:
        return _converted(_gather(name, access, simple, sorted(gathered), scope), name, scope)
    return _converted(_slices(name, access, simple, scope), name, scope)


def _overruns(name: Name, dim: int, along: Range) -> bool:
    """Whether the rank is longer than the dimension: points beyond its end do not exist, but are computed."""
    length = name.extents[dim] if name.stored and name.extents else ""
    return length.isdigit() and along.size.isdigit() and int(along.size) > int(length)


def _unmerged(name: Name, access: Access, scope: Scope) -> tuple[Name, Access]:
    """A stored dimension read at `size * outer + inner`, over all of it, as two dimensions: a view, not a gather."""
    if not name.stored or not name.extents:
        return name, access
    for dim, i in enumerate(access.index):
        if not isinstance(i, sympy.Add) or len(i.args) != 2:
            continue
        inner = next((a for a in i.args if isinstance(a, sympy.Symbol) and a.name in scope.ranges), None)
        if inner is None:
            continue
        size, outer = (i - inner).as_coeff_Mul()
        if not isinstance(outer, sympy.Symbol) or outer.name not in scope.ranges or not size.is_Integer:
            continue
        whole = [scope.ranges[x.name] for x in (outer, inner)]
        if any(r.lo is not None or r.at is not None or not r.size.isdigit() for r in whole):
            continue
        rows, columns = (int(r.size) for r in whole)
        if columns != size or str(rows * columns) != name.extents[dim]:
            continue
        extents = (*name.extents[:dim], str(rows), str(columns), *name.extents[dim + 1 :])
        ranks = (*name.ranks[:dim], outer.name, inner.name, *name.ranks[dim + 1 :])
        name = replace(name, code=f"{name.code}.unflatten({dim}, ({rows}, {columns}))", ranks=ranks, extents=extents)
        return _unmerged(name, access.at(*access.index[:dim], outer, inner, *access.index[dim + 1 :]), scope)
    return name, access


def _merged(name: Name, access: Access, scope: Scope) -> tuple[Name, Access]:
    """Two stored dimensions read at `x // size` and `x % size`, all of them, as one: a view, or a copy, no gather."""
    if not name.stored or not name.extents:
        return name, access
    for inner, i in enumerate(access.index):
        if not isinstance(i, Mod) or not i.args[1].is_Integer or name.extents[inner] != str(i.args[1]):
            continue  # pages of a size that is known at run time only are gathered
        x, size = i.args
        whole = scope.ranges.get(x.name) if isinstance(x, sympy.Symbol) else None
        for outer, o in enumerate(access.index):
            if not name.extents[outer].isdigit():
                continue
            length = int(name.extents[outer]) * int(size)
            if o == FloorDiv(x, size) and whole == Range(str(length)):
                index = x
            elif o == Mod(FloorDiv(x, size), int(name.extents[outer])):
                index = Mod(x, length)
            else:
                continue
            order = [d for d in range(len(access.index)) if d != inner]
            at = order.index(outer)
            order.insert(at + 1, inner)
            permuted = "" if order == sorted(order) else f".permute({', '.join(map(str, order))})"
            rest = order[:at], order[at + 2 :]
            ranks, extents, places = (
                (*(values[d] for d in rest[0]), joined, *(values[d] for d in rest[1]))
                for values, joined in ((name.ranks, str(x)), (name.extents, str(length)), (access.index, index))
            )
            name = replace(name, code=f"{name.code}{permuted}.flatten({at}, {at + 1})", ranks=ranks, extents=extents)
            return _merged(name, access.at(*places), scope)
    return name, access


def _ranks_of(expr: Expr, scope: Scope) -> set[str]:
    return {n for n in free_vars(expr) if n in scope.ranges and scope.ranges[n].at is None}


def _reads_tensor(expr: Expr) -> bool:
    return bool(expr.has(Access))


def _converted(v: Value, name: Name, scope: Scope) -> Value:
    """Stored floats are computed with in the accumulation dtype, small integers as 64-bit ones."""
    if not name.stored:
        return v
    if name.dtype[0] in "fb" and name.dtype != "bool":
        same = name.dtype == {"float32": "f32", "float64": "f64"}[scope.acc]
        return v if same else _cast(v, scope)
    if name.dtype == "bool":
        return replace(v, kind="b")
    return replace(v, kind="i") if name.dtype == "i64" else Value(f"{v.tight()}.long()", v.ranks, "i", True)


def _slice(name: Name, dim: int, rank: str, scope: Scope) -> str:
    r = scope.ranges[rank]
    if not name.stored:
        return ":"
    if r.lo is not None:
        return f"{r.lo}:{r.hi}"
    return ":" if not name.extents or name.extents[dim] == r.size else f":{r.size}"


def _slices(name: Name, access: Access, simple: list[str | None], scope: Scope) -> Value:
    index, ranks = [], []
    for dim, (rank, i) in enumerate(zip(simple, access.index, strict=True)):
        if rank is None:
            index.append(value(i, scope).code)
        else:
            index.append(_slice(name, dim, rank, scope))
            ranks.append(rank)
    code = _indexed(name.code, index)
    owned = not name.stored and name.fresh and access.tensor in scope.dead and code == name.code
    kind = "b" if name.dtype == "bool" else "i" if name.dtype[0] in "iu" else "f"
    return _ordered(Value(code, tuple(ranks), kind, owned), scope)


def _indexed(code: str, index: list[str]) -> str:
    while index and index[-1] == ":":
        index = index[:-1]
    return f"{code}[{', '.join(index)}]" if index else code


def _ordered(v: Value, scope: Scope) -> Value:
    order = scope.sort(v.ranks)
    if order == v.ranks:
        return v
    if len(order) == 2:
        return replace(v, code=f"{v.tight()}.mT", ranks=order)
    places = ", ".join(str(v.ranks.index(r)) for r in order)
    return replace(v, code=f"{v.tight()}.permute({places})", ranks=order)


def _gather(name: Name, access: Access, simple: list[str | None], gathered: list[int], scope: Scope) -> Value:
    """Integer indexing: sliced dimensions first, then the gathered ones, moved to the front."""
    kept = [d for d in range(len(simple)) if d not in gathered]
    index, kept_ranks = [], []
    for d in range(len(simple)):
        rank = simple[d]
        if d in gathered:
            index.append(":")
        elif rank is None:
            index.append(value(access.index[d], scope).code)
        else:
            index.append(_slice(name, d, rank, scope))
            kept_ranks.append(rank)
    code = _indexed(name.code, index)
    dims = [d for d in range(len(simple)) if d in gathered or simple[d] is not None]  # those left after selection
    parts = [value(access.index[d], scope) for d in gathered]
    ranks = scope.sort([r for v in parts for r in v.ranks])
    codes = []
    for d, v in zip(gathered, parts, strict=True):
        if not v.ranks:
            codes.append(v.code)
            continue
        text = align(v, ranks)
        exact = isinstance(access.index[d], sympy.Symbol) and simple[d] is not None  # a rank's own dimension
        codes.append(text if exact else f"{Value(text, prec=v.prec).tight()}.clamp(0, {_length(name, d)} - 1)")
    if len(gathered) == 1 and kept:
        d = gathered[0]
        place = dims.index(d)
        code = f"{code}[{', '.join([':'] * place + codes)}]"
        left = [simple[x] for x in dims[:place]]
        right = [simple[x] for x in dims[place + 1 :]]
        result = tuple(r for r in left if r) + ranks + tuple(r for r in right if r)
        return _ordered(Value(code, result, owned=True), scope)
    order = [dims.index(d) for d in gathered] + [dims.index(d) for d in dims if d not in gathered]
    if order != list(range(len(order))):
        code = f"{code}.permute({', '.join(map(str, order))})"
    return _ordered(Value(f"{code}[{', '.join(codes)}]", ranks + tuple(kept_ranks), owned=True), scope)


def _length(name: Name, dim: int) -> str:
    return f"{name.code}.shape[{dim}]"
