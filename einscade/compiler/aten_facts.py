"""Facts about ATen nodes that every stage asks for: names, bound arguments, shapes and dtypes as the IR writes them.

Comes in: nodes of a functional ATen graph whose `meta["val"]` is a fake tensor (or a SymInt). Goes out: plain values
and sympy expressions over the IR's own symbols.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Node

from einscade.ir.expr import Expr, FloorDiv, Mod, const, var

__all__ = [
    "Unraisable",
    "arguments",
    "device_of",
    "dtype_name",
    "extent",
    "is_cpu_number",
    "is_nonnegative",
    "is_tensor",
    "op_name",
    "readers",
    "scalar",
    "shape",
    "tensor_inputs",
    "torch_dtype",
]

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


class Unraisable(Exception):
    """Why a node has no meaning in the IR; the message names the operation."""


def op_name(node: Node) -> str:
    """`aten::add`, without the overload; `getitem` and other Python functions by their name; "" for other nodes."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name
    return getattr(node.target, "__name__", str(node.target))


@lru_cache(maxsize=4096)
def _signature(target: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in target._schema.arguments)


def arguments(node: Node) -> SimpleNamespace:
    """The node's arguments by the names in its schema, defaults filled in."""
    signature = _signature(node.target)
    bound = dict(signature)
    for (name, _), value in zip(signature, node.args, strict=False):
        bound[name] = value
    bound.update(node.kwargs)
    return SimpleNamespace(**bound)


def is_tensor(value: Any) -> TypeGuard[Node]:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def torch_dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def device_of(node: Node) -> torch.device:
    return node.meta["val"].device


def is_cpu_number(node: Node) -> bool:
    """Whether it is a tensor of one number that PyTorch takes beside tensors of any device."""
    return device_of(node).type == "cpu" and not node.meta["val"].dim()


def dtype_name(node: Node) -> str:
    """The node's dtype as the IR names it; `Unraisable` for one that it lacks (complex numbers)."""
    name = _DTYPES.get(torch_dtype(node))
    if name is None:
        raise Unraisable(f"{node.name} has dtype {torch_dtype(node)}")
    return name


def shape(node: Node) -> tuple[Expr, ...]:
    return tuple(extent(n) for n in node.meta["val"].shape)


def extent(size: int | torch.SymInt) -> Expr:
    """A size as an expression over the IR's symbols. A size is nonnegative, so what it is made of is taken to be."""
    if isinstance(size, torch.SymInt):
        return _converted(size.node.expr)
    return sympy.Integer(int(size))


def scalar(value: Any) -> Expr:
    """A number, a SymInt or a node that holds one, as an expression."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt | torch.SymFloat):
        if not is_nonnegative(value):
            raise Unraisable(f"the number {value.node.expr} is only known at run time, and may be negative")
        return _converted(value.node.expr)
    if isinstance(value, torch.SymBool) or value is None or isinstance(value, complex | torch.Tensor):
        raise Unraisable(f"{value!r} is not a number")
    return const(value)


def _floor_div(a: Expr, b: Expr) -> Expr:
    return FloorDiv(a, b)


def _whole(size: Expr, up: bool) -> Expr:
    """A quotient of lengths as a whole number, rounded up or down: the length of an `arange` with a float step."""
    exact = size.xreplace({f: sympy.Integer(int(f)) for f in size.atoms(sympy.Float) if f == int(f)})
    above, below = sympy.fraction(sympy.together(exact))
    whole = below.is_Integer and above.is_polynomial() and above.is_integer
    if not whole or not (up or above.is_nonnegative):  # towards 0 is not down where it is negative
        raise Unraisable(f"a size is {size}, rounded")
    return above if below == 1 else FloorDiv(above + (below - 1 if up else 0), below)


_FUNCTIONS: dict[str, Callable[..., Expr]] = {
    "FloorDiv": _floor_div,
    "CleanDiv": _floor_div,
    "CeilDiv": lambda a, b: FloorDiv(a + b - 1, b),
    "ModularIndexing": lambda a, b, c: Mod(FloorDiv(a, b), c),
    "Mod": lambda a, b: Mod(a, b),
    "PythonMod": lambda a, b: Mod(a, b),
    "Max": sympy.Max,
    "Min": sympy.Min,
    "CeilToInt": lambda a: _whole(a, up=True),
    "FloorToInt": lambda a: _whole(a, up=False),
    "TruncToInt": lambda a: _whole(a, up=False),
    "ToFloat": lambda a: a,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
}


def is_nonnegative(value: torch.SymInt | torch.SymFloat) -> bool:
    """Whether the symbols that a number is made of are integers that are known not to be negative."""
    ranges = value.node.shape_env.var_to_range
    return all(
        s.is_integer and (s.is_nonnegative or (s in ranges and ranges[s].lower >= 0))
        for s in value.node.expr.free_symbols
    )


@lru_cache(maxsize=65536)
def _converted(expr: Expr) -> Expr:
    """torch's symbolic shape expression with the IR's symbols and functions, which are nonnegative integers."""
    if isinstance(expr, sympy.Symbol):
        return var(expr.name)
    if not expr.args:
        return const(float(expr)) if expr.is_Float else expr
    args = [_converted(a) for a in expr.args]
    if function := _FUNCTIONS.get(type(expr).__name__):
        return function(*args)
    if expr.is_Add or expr.is_Mul or expr.is_Pow:
        return expr.func(*args)
    raise Unraisable(f"a size is {expr}")


_SIZES = {"aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::sym_storage_offset"}


def readers(node: Node) -> list[Node]:
    """The users of a node's elements: those that ask only for its size read nothing."""
    return [u for u in node.users if op_name(u) not in _SIZES]


def tensor_inputs(node: Node) -> Iterator[Node]:
    """The nodes with one tensor that this one reads, in order, repeats included."""
    for arg in node.all_input_nodes:
        if is_tensor(arg):
            yield arg
