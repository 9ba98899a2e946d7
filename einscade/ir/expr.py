"""Scalar expressions: sympy trees over tensor accesses and rank variables.

Comes in: Python numbers, rank names, tensor names. Goes out: sympy expressions that every other layer
substitutes into, differentiates, simplifies and prints. Nothing here evaluates anything; see `interpret`.

Two kinds of leaves exist beside numbers:

* a *variable* (`var("m")`): a rank variable or the symbol of an extent. Always a nonnegative integer.
* an `Access` (`Access("K", b, h // 4, m, e)`): one element of a tensor. Its indices are expressions
  themselves: affine (`p - m + N`), divided (`FloorDiv(h, 4)`), or another access (a gather).

Booleans are sympy booleans (`m <= p`, `And`, `Or`, `Not`) and boolean tensors are accesses like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, wraps
from typing import Any, TypeAlias

import sympy
from sympy.core import relational
from sympy.core.symbol import Str
from sympy.logic.boolalg import Boolean

Expr: TypeAlias = sympy.Expr

__all__ = [
    "FUNCTIONS",
    "Access",
    "Expr",
    "FloorDiv",
    "Mod",
    "Round",
    "Trunc",
    "Where",
    "accesses",
    "ceil_div",
    "const",
    "free_vars",
    "var",
]


def var(name: str) -> sympy.Symbol:
    """The variable of a rank, or the symbol of an extent, by name: a nonnegative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def const(value: Any) -> Expr:
    """A number as an expression: integral floats become integers, so that `2.0 * x` and `2 * x` are one form."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float):
        if value != value:
            return sympy.nan
        if value in (float("inf"), float("-inf")):
            return sympy.oo if value > 0 else -sympy.oo
        if value.is_integer() and abs(value) < 2**53:
            return sympy.Integer(int(value))
        return sympy.Float(value)
    return sympy.sympify(value)


class Access(sympy.Expr, Boolean):
    """One element of a tensor: `Access("K", b, h, m, e)`; prints `K[b,h,m,e]`.

    It is an expression (real) and a boolean at once, as sympy's own Symbol is: which of the two a tensor holds is
    the tensor's dtype, and the verifier checks that it is used as such. Differentiable as an atom.
    """

    is_commutative = True
    is_extended_real = True
    is_number = False
    _diff_wrt = True

    def __new__(cls, tensor: str | Str, *index: Any) -> Access:
        name = tensor if isinstance(tensor, Str) else Str(tensor)
        return sympy.Expr.__new__(cls, name, *[sympy.sympify(i) for i in index])

    @property
    def tensor(self) -> str:
        return self.args[0].name

    @property
    def index(self) -> tuple[Expr, ...]:
        return self.args[1:]

    @property
    def free_symbols(self) -> set:  # the tensor's name is not a variable
        return set().union(*(i.free_symbols for i in self.index)) if self.index else set()

    def at(self, *index: Any) -> Access:
        """The same tensor at another index."""
        return Access(self.args[0], *index)

    def _eval_derivative(self, s: Expr) -> Expr:
        return sympy.Integer(1) if self == s else sympy.Integer(0)

    def _sympystr(self, printer: Any) -> str:
        return f"{self.tensor}[{','.join(printer._print(i) for i in self.index)}]"


def _leave_equality_of_accesses_open(is_eq: Callable[..., bool | None]) -> Callable[..., bool | None]:
    """sympy decides `Eq(x, y)` to be false where one side is a boolean and the other is not, symbols excepted. An
    access is as undecided as a symbol, but there is no hook to say so: the rule's own module needs this wrapper."""

    @wraps(is_eq)
    def wrapped(lhs: Any, rhs: Any, assumptions: Any = None) -> bool | None:
        if isinstance(lhs, Access) or isinstance(rhs, Access):
            return True if lhs == rhs else None
        return is_eq(lhs, rhs, assumptions)

    return wrapped


relational.is_eq = _leave_equality_of_accesses_open(relational.is_eq)


class FloorDiv(sympy.Function):
    """Integer division rounding down. Evaluates on numbers and pulls out exact multiples; the rest needs ranges
    (`intervals.simplify`)."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b == 1:
            return a
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) // int(b))
        if a.is_zero:
            return sympy.Integer(0)
        if a.is_Add or a.is_Mul or a.is_Pow or a.is_Symbol:
            whole, rest = _split_multiple(a, b)
            if whole != 0:
                return whole + cls(rest, b)
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        a, b = self.args
        return True if a.is_nonnegative and b.is_nonnegative else None


class Mod(sympy.Function):
    """Remainder of `FloorDiv`, with the sign of the divisor."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Expr, b: Expr) -> Expr | None:
        if b == 1 or a.is_zero:
            return sympy.Integer(0)
        if a.is_Integer and b.is_Integer and b != 0:
            return sympy.Integer(int(a) % int(b))
        if a.is_Add or a.is_Mul or a.is_Pow or a.is_Symbol:
            whole, rest = _split_multiple(a, b)
            if whole != 0:
                return cls(rest, b)
        return None


def _split_multiple(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """`a == whole * b + rest`, with every term of `a` that is visibly a multiple of `b` in `whole`."""
    whole: list[Expr] = []
    rest: list[Expr] = []
    for term in sympy.Add.make_args(a):
        quotient = _exact_quotient(term, b)
        (rest if quotient is None else whole).append(term if quotient is None else quotient)
    return sympy.Add(*whole), sympy.Add(*rest)


def _exact_quotient(term: Expr, b: Expr) -> Expr | None:
    if b.is_Integer:
        coefficient, factors = term.as_coeff_Mul()
        if coefficient.is_Integer and int(coefficient) % int(b) == 0:
            return (coefficient // b) * factors
        return None
    quotient = term / b
    return quotient if quotient.is_integer and quotient.as_numer_denom()[1] == 1 else None


class Where(sympy.Function):
    """`Where(condition, a, b)`: `a` where the condition holds, else `b`. Not sympy's Piecewise, whose constructor
    rewrites conditions and costs milliseconds."""

    nargs = (3,)
    is_extended_real = True

    @classmethod
    def eval(cls, condition: Boolean, a: Expr, b: Expr) -> Expr | None:
        if condition == sympy.true:
            return a
        if condition == sympy.false:
            return b
        if a == b:
            return a
        return None

    def _eval_derivative(self, s: Expr) -> Expr:
        condition, a, b = self.args
        return Where(condition, a.diff(s), b.diff(s))


class Round(sympy.Function):
    """To the nearest integer, halves to even (as torch.round)."""

    nargs = (1,)
    is_integer = True

    def _eval_derivative(self, s: Expr) -> Expr:
        return sympy.Integer(0)


class Trunc(sympy.Function):
    """Towards zero (as a float to integer cast)."""

    nargs = (1,)
    is_integer = True

    @classmethod
    def eval(cls, a: Expr) -> Expr | None:
        return a if a.is_integer else None

    def _eval_derivative(self, s: Expr) -> Expr:
        return sympy.Integer(0)


# Functions of one real argument that an expression may hold, by the name they have in the text form.
FUNCTIONS: Mapping[str, Any] = {
    "exp": sympy.exp,
    "log": sympy.log,
    "tanh": sympy.tanh,
    "erf": sympy.erf,
    "sin": sympy.sin,
    "cos": sympy.cos,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "atan": sympy.atan,
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "round": Round,
    "trunc": Trunc,
}


def ceil_div(a: Any, b: Any) -> Expr:
    """⌈a / b⌉ for nonnegative integers, as an expression."""
    a, b = sympy.sympify(a), sympy.sympify(b)
    return FloorDiv(a + b - 1, b)


@lru_cache(maxsize=65536)
def accesses(expr: Any) -> tuple[Access, ...]:
    """Every access in the expression, nested ones included, each once, in a fixed order."""
    return tuple(dict.fromkeys(_walk(expr)))


def _walk(expr: Any) -> Iterator[Access]:
    if isinstance(expr, Access):
        yield expr
        for index in expr.index:
            yield from _walk(index)
    elif expr.args:
        for arg in expr.args:
            yield from _walk(arg)


@lru_cache(maxsize=65536)
def free_vars(expr: Any) -> frozenset[str]:
    """Names of all rank variables and extent symbols in the expression, those inside indices included."""
    return frozenset(s.name for s in expr.free_symbols)
