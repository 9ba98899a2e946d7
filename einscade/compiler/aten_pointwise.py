"""Pointwise ATen operations as scalar expressions.

Comes in: a node's bound arguments with every tensor replaced by its scalar expression. Goes out: one expression.
`NUMERIC` functions get numbers (booleans arrive as 1 and 0), `LOGICAL` ones get booleans. Each entry is the operation's
definition in torch's documentation; nothing here knows about attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from einscade.compiler.aten_facts import Unraisable
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Round, Trunc, Where, const

__all__ = ["LOGICAL", "NUMERIC", "as_number", "as_predicate", "choose"]

Rule = Callable[[SimpleNamespace], Any]
_HALF = sympy.Rational(1, 2)


def as_number(value: Any, boolean: bool) -> Expr:
    return Where(value, sympy.Integer(1), sympy.Integer(0)) if boolean else value


def as_predicate(value: Any, boolean: bool) -> Boolean:
    if boolean:
        return value
    if isinstance(value, Where) and value.args[1].is_number and value.args[2].is_number:
        return choose(value.args[0], sympy.Ne(value.args[1], 0), sympy.Ne(value.args[2], 0))
    return sympy.Ne(value, 0)


def choose(condition: Boolean, a: Boolean, b: Boolean) -> Boolean:
    """`a` where the condition holds, else `b`, for booleans."""
    if a == b:
        return a
    return sympy.Or(sympy.And(condition, a), sympy.And(sympy.Not(condition), b))


def _sigmoid(x: Expr) -> Expr:
    return 1 / (1 + sympy.exp(-x))


def _softplus(a: SimpleNamespace) -> Expr:
    """log(1 + exp(beta x)) / beta, in the form that never overflows; torch's `threshold` only avoids the overflow."""
    x = a.beta * a.self
    return (sympy.Max(x, 0) + sympy.log(1 + sympy.exp(-sympy.Abs(x)))) / a.beta


def _gelu(a: SimpleNamespace) -> Expr:
    x = a.self
    if a.approximate == "tanh":
        return _HALF * x * (1 + sympy.tanh(const(math.sqrt(2 / math.pi)) * (x + const(0.044715) * x**3)))
    return _HALF * x * (1 + sympy.erf(x / sympy.sqrt(2)))


def _div(a: SimpleNamespace) -> Expr:
    mode = getattr(a, "rounding_mode", None)
    if mode is None:
        return _over(a.self, a.other)
    if mode == "floor":
        return FloorDiv(a.self, a.other) if _integers(a) else sympy.floor(a.self / a.other)
    return Trunc(a.self / a.other)


def _over(a: Expr, b: Expr) -> Expr:
    """a / b; of numbers as floating point has it, by a positive zero: sympy's zoo is none of its values."""
    if b.is_zero and a.is_number and not a.is_zero:
        return sympy.oo if a.is_positive else -sympy.oo
    return a / b


def _log(x: Expr) -> Expr:
    return -sympy.oo if x.is_zero else sympy.log(x)


def _integers(a: SimpleNamespace) -> bool:
    return bool(a.integral)


def _remainder(a: SimpleNamespace) -> Expr:
    return Mod(a.self, a.other) if _integers(a) else a.self - a.other * sympy.floor(a.self / a.other)


def _clamp(a: SimpleNamespace) -> Expr:
    x = a.self
    if a.min is not None:
        x = sympy.Max(x, a.min)
    return x if a.max is None else sympy.Min(x, a.max)


def _pow(a: SimpleNamespace) -> Expr:
    base, exponent = a.self, a.exponent
    if exponent.is_Float and exponent == _HALF:
        return sympy.sqrt(base)
    if base.is_number and not exponent.is_number:
        return sympy.exp(exponent * sympy.log(base)) if base.is_positive else base**exponent
    return base**exponent


def _elu(a: SimpleNamespace) -> Expr:
    x = a.self
    positive = a.scale * x
    return Where(x > 0, positive, a.scale * a.alpha * (sympy.exp(sympy.Min(x * a.input_scale, 0)) - 1))


def _hardswish(a: SimpleNamespace) -> Expr:
    return a.self * sympy.Min(sympy.Max(a.self + 3, 0), 6) / 6


def _logit(a: SimpleNamespace) -> Expr:
    x = a.self if a.eps is None else sympy.Min(sympy.Max(a.self, a.eps), 1 - a.eps)
    return sympy.log(x / (1 - x))


def _nan_to_num(a: SimpleNamespace) -> Expr:
    """Over the reals nothing is NaN; an infinity becomes the given (or the largest) number only where one is stored."""
    if a.posinf is not None or a.neginf is not None:
        raise Unraisable("aten::nan_to_num with a replacement for infinities")
    return a.self


NUMERIC: Mapping[str, Rule] = {
    "add": lambda a: a.self + a.other * a.alpha,
    "sub": lambda a: a.self - a.other * a.alpha,
    "rsub": lambda a: a.other - a.self * a.alpha,
    "mul": lambda a: a.self * a.other,
    "div": _div,
    "true_divide": _div,
    "floor_divide": lambda a: FloorDiv(a.self, a.other) if _integers(a) else sympy.floor(a.self / a.other),
    "remainder": _remainder,
    "fmod": lambda a: a.self - a.other * Trunc(a.self / a.other),
    "neg": lambda a: -a.self,
    "abs": lambda a: sympy.Abs(a.self),
    "sgn": lambda a: sympy.sign(a.self),
    "sign": lambda a: sympy.sign(a.self),
    "exp": lambda a: sympy.exp(a.self),
    "exp2": lambda a: sympy.exp(a.self * sympy.log(2)),
    "expm1": lambda a: sympy.exp(a.self) - 1,
    "log": lambda a: _log(a.self),
    "log2": lambda a: _log(a.self) / sympy.log(2),
    "log10": lambda a: _log(a.self) / sympy.log(10),
    "log1p": lambda a: _log(1 + a.self),
    "sqrt": lambda a: sympy.sqrt(a.self),
    "rsqrt": lambda a: _over(sympy.S.One, sympy.sqrt(a.self)),
    "reciprocal": lambda a: _over(sympy.S.One, a.self),
    "square": lambda a: a.self**2,
    "pow": _pow,
    "sin": lambda a: sympy.sin(a.self),
    "cos": lambda a: sympy.cos(a.self),
    "tan": lambda a: sympy.sin(a.self) / sympy.cos(a.self),
    "atan": lambda a: sympy.atan(a.self),
    "sinh": lambda a: sympy.sinh(a.self),
    "cosh": lambda a: sympy.cosh(a.self),
    "tanh": lambda a: sympy.tanh(a.self),
    "erf": lambda a: sympy.erf(a.self),
    "erfc": lambda a: 1 - sympy.erf(a.self),
    "sigmoid": lambda a: _sigmoid(a.self),
    "log_sigmoid_forward": lambda a: sympy.Min(a.self, 0) - sympy.log(1 + sympy.exp(-sympy.Abs(a.self))),
    "silu": lambda a: a.self * _sigmoid(a.self),
    "relu": lambda a: sympy.Max(a.self, 0),
    "relu6": lambda a: sympy.Min(sympy.Max(a.self, 0), 6),
    "hardtanh": lambda a: sympy.Min(sympy.Max(a.self, a.min_val), a.max_val),
    "hardsigmoid": lambda a: sympy.Min(sympy.Max(a.self + 3, 0), 6) / 6,
    "hardswish": _hardswish,
    "leaky_relu": lambda a: Where(a.self > 0, a.self, a.negative_slope * a.self),
    "threshold": lambda a: Where(a.self > a.threshold, a.self, a.value),
    "elu": _elu,
    "celu": lambda a: sympy.Max(a.self, 0) + sympy.Min(a.alpha * (sympy.exp(a.self / a.alpha) - 1), 0),
    "gelu": _gelu,
    "softplus": _softplus,
    "mish": lambda a: a.self * sympy.tanh(sympy.Max(a.self, 0) + sympy.log(1 + sympy.exp(-sympy.Abs(a.self)))),
    "maximum": lambda a: sympy.Max(a.self, a.other),
    "minimum": lambda a: sympy.Min(a.self, a.other),
    "fmax": lambda a: sympy.Max(a.self, a.other),
    "fmin": lambda a: sympy.Min(a.self, a.other),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda a: sympy.Max(a.self, a.min),
    "clamp_max": lambda a: sympy.Min(a.self, a.max),
    "logaddexp": lambda a: sympy.Max(a.self, a.other) + sympy.log(1 + sympy.exp(-sympy.Abs(a.self - a.other))),
    "xlogy": lambda a: Where(sympy.Eq(a.self, 0), sympy.Integer(0), a.self * _log(a.other)),
    "logit": _logit,
    "softshrink": lambda a: a.self - sympy.Min(sympy.Max(a.self, -a.lambd), a.lambd),
    "hardshrink": lambda a: Where(sympy.Abs(a.self) > a.lambd, a.self, sympy.Integer(0)),
    "frac": lambda a: a.self - Trunc(a.self),
    "floor": lambda a: sympy.floor(a.self),
    "ceil": lambda a: sympy.ceiling(a.self),
    "round": lambda a: Round(a.self),
    "trunc": lambda a: Trunc(a.self),
    "nan_to_num": _nan_to_num,
    "lerp": lambda a: a.self + a.weight * (a.end - a.self),
    "addcmul": lambda a: a.self + a.value * a.tensor1 * a.tensor2,
    "addcdiv": lambda a: a.self + a.value * a.tensor1 / a.tensor2,
    "isnan": lambda a: sympy.false,
    "isinf": lambda a: _infinite(a.self),
    "isfinite": lambda a: sympy.Not(_infinite(a.self)),
    "eq": lambda a: sympy.Eq(a.self, a.other),
    "ne": lambda a: sympy.Ne(a.self, a.other),
    "lt": lambda a: sympy.Lt(a.self, a.other),
    "le": lambda a: sympy.Le(a.self, a.other),
    "gt": lambda a: sympy.Gt(a.self, a.other),
    "ge": lambda a: sympy.Ge(a.self, a.other),
}


def _infinite(x: Expr) -> Boolean:
    if x.is_number:
        return sympy.true if x.is_infinite else sympy.false
    return (
        sympy.Or(sympy.Eq(x, sympy.oo), sympy.Eq(x, -sympy.oo)) if x.has(Access, sympy.oo, -sympy.oo) else sympy.false
    )


def _exclusive(a: Boolean, b: Boolean) -> Boolean:
    return sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(sympy.Not(a), b))


LOGICAL: Mapping[str, Rule] = {
    "logical_and": lambda a: sympy.And(a.self, a.other),
    "logical_or": lambda a: sympy.Or(a.self, a.other),
    "logical_xor": lambda a: _exclusive(a.self, a.other),
    "logical_not": lambda a: sympy.Not(a.self),
    "bitwise_and": lambda a: sympy.And(a.self, a.other),
    "bitwise_or": lambda a: sympy.Or(a.self, a.other),
    "bitwise_xor": lambda a: _exclusive(a.self, a.other),
    "bitwise_not": lambda a: sympy.Not(a.self),
    "__and__": lambda a: sympy.And(a.self, a.other),
    "__or__": lambda a: sympy.Or(a.self, a.other),
    "__xor__": lambda a: _exclusive(a.self, a.other),
    "mul": lambda a: sympy.And(a.self, a.other),
    "add": lambda a: sympy.Or(a.self, a.other),
    "eq": lambda a: sympy.Not(_exclusive(a.self, a.other)),
    "ne": lambda a: _exclusive(a.self, a.other),
    "maximum": lambda a: sympy.Or(a.self, a.other),
    "minimum": lambda a: sympy.And(a.self, a.other),
}
