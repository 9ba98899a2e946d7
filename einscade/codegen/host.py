"""What runs on the host, before a kernel does: sizes, bounds and conditions over Python integers, as code.

Comes in: sympy expressions over sizes and tile variables. Goes out: Python.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.codegen.source import Unsupported
from einscade.ir.expr import Expr, FloorDiv, Mod

__all__ = ["number", "python"]


def number(x: Expr) -> str:
    """A number as Python, infinities and NaN as torch's."""
    if x.is_Integer:
        return str(int(x))
    if x in (sympy.oo, -sympy.oo):
        return "torch.inf" if x == sympy.oo else "-torch.inf"
    if x == sympy.nan:
        return "torch.nan"
    return repr(float(x))


def python(expr: Expr, names: Mapping[str, str] | None = None) -> str:
    """A condition or bound over Python integers, as code. `names` renames variables. Raises `Unsupported` for what is
    made of anything else."""
    names = names or {}
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return str(bool(expr))
    if isinstance(expr, sympy.Symbol):
        return names.get(expr.name, expr.name)
    if expr.is_number:
        return number(expr)
    args = [python(a, names) for a in expr.args]
    wrapped = [_wrap(a, code) for a, code in zip(expr.args, args, strict=True)]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return f"{'max' if isinstance(expr, sympy.Max) else 'min'}({', '.join(args)})"
    if isinstance(expr, FloorDiv):
        if (up := _ceil_form(expr)) is not None:
            return f"-(-{_wrap(up, python(up, names))} // {wrapped[1]})"
        return f"{wrapped[0]} // {wrapped[1]}"
    if isinstance(expr, Mod):
        return f"{wrapped[0]} % {wrapped[1]}"
    if isinstance(expr, sympy.Add):
        return _difference(expr, names)
    if isinstance(expr, sympy.Mul):
        if expr.args[0] == -1:
            return "-" + "*".join(wrapped[1:])
        return "*".join(wrapped)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp.is_positive:
        return f"{wrapped[0]}**{expr.exp}"
    if isinstance(expr, (And, Or)):
        word = " and " if isinstance(expr, And) else " or "
        return word.join(f"({a})" if isinstance(x, (And, Or)) else a for a, x in zip(args, expr.args, strict=True))
    if isinstance(expr, Not):
        return f"not ({args[0]})"
    if isinstance(expr, sympy.core.relational.Relational):
        return _compared(expr, names)
    raise Unsupported(f"the bound {expr} cannot be computed on the host")


def _ceil_form(expr: FloorDiv) -> Expr | None:
    a, b = expr.args
    return a - b + 1 if a.is_Add and not (a - b + 1).free_symbols & b.free_symbols and not b.is_Integer else None


def _wrap(expr: Expr, code: str) -> str:
    """The code of an operand: a name, a number or a call stands for itself."""
    return code if isinstance(expr, (sympy.Max, sympy.Min)) or code.replace("_", "").isalnum() else f"({code})"


def _difference(expr: sympy.Add, names: Mapping[str, str]) -> str:
    plus = [t for t in expr.args if not t.could_extract_minus_sign()]
    minus = [-t for t in expr.args if t.could_extract_minus_sign()]
    plus.sort(key=lambda t: (t.is_number, sympy.default_sort_key(t)))
    text = " + ".join(python(t, names) for t in plus)
    for t in minus:
        code = python(t, names)
        text += f" - {code if t.is_Atom or t.is_Mul else _wrap(t, code)}" if text else f"-{_wrap(t, code)}"
    return text


def _compared(expr: sympy.core.relational.Relational, names: Mapping[str, str]) -> str:
    """`a <= b` with terms on the side where they are positive."""
    difference = expr.lhs - expr.rhs
    left = sympy.Add(*(t for t in sympy.Add.make_args(difference) if not t.could_extract_minus_sign()))
    right = left - difference
    return f"{python(left, names)} {expr.rel_op} {python(right, names)}"
