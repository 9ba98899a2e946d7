"""Torch-level calls that are exactly one ATen operation, so that capture writes the operation down without running it.

Comes in: a node of a torch-level graph and its arguments. Goes out: the operation with its arguments, or None where the
call may be something else (decomposed, promoted from a Python number on the left, with arguments that are left out
here). Dynamo has computed the node's fake value already; half of a transformer's nodes need nothing more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

__all__ = ["Call", "direct"]

aten = torch.ops.aten
Call = tuple[OpOverload, tuple[Any, ...]]


def direct(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The one operation that the node's call is, with positional arguments; None where that is not certain."""
    if node.op == "call_function":
        rule = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        rule = _METHODS.get(str(node.target))
    else:
        return None
    if rule is None or not args:
        return None
    return rule(args, kwargs)


Rule = Callable[[tuple[Any, ...], Mapping[str, Any]], Call | None]


def _unary(op: OpOverload) -> Rule:
    def rule(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        return (op, args) if len(args) == 1 and not kwargs and _is_tensor(args[0]) else None

    return rule


def _binary(op: OpOverload) -> Rule:
    def rule(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        if len(args) != 2 or kwargs or not _is_tensor(args[0]):
            return None
        return (op, args) if _is_tensor(args[1]) or type(args[1]) in (int, float) else None

    return rule


def _with_integers(op: OpOverload, count: int) -> Rule:
    def rule(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        plain = len(args) == count + 1 and not kwargs and all(type(a) is int for a in args[1:])
        return (op, args) if plain and _is_tensor(args[0]) else None

    return rule


def _power(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    plain = len(args) == 2 and not kwargs and type(args[1]) in (int, float)
    return (aten.pow.Tensor_Scalar, args) if plain and _is_tensor(args[0]) else None


def _mean(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    if len(args) != 2 or set(kwargs) - {"keepdim"} or type(args[1]) is not int or not _is_tensor(args[0]):
        return None
    return aten.mean.dim, (args[0], [args[1]], bool(kwargs.get("keepdim", False)))


def _cat(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    if len(args) > 2 or set(kwargs) - {"dim"} or not isinstance(args[0], (tuple, list)):
        return None
    dim = args[1] if len(args) == 2 else kwargs.get("dim", 0)
    return (aten.cat.default, (list(args[0]), dim)) if type(dim) is int and all(map(_is_tensor, args[0])) else None


def _linear(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    if kwargs or len(args) not in (2, 3) or not all(_is_tensor(a) for a in args[:2]):
        return None
    return aten.linear.default, args if len(args) == 3 and args[2] is not None else args[:2]


def _silu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    return (aten.silu.default, args) if len(args) == 1 and not kwargs.get("inplace") and _is_tensor(args[0]) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


_ADD, _SUB, _MUL = _binary(aten.add.Tensor), _binary(aten.sub.Tensor), _binary(aten.mul.Tensor)
_FUNCTIONS: Mapping[Any, Rule] = {
    operator.add: _ADD,
    operator.sub: _SUB,
    operator.mul: _MUL,
    operator.neg: _unary(aten.neg.default),
    torch.add: _ADD,
    torch.sub: _SUB,
    torch.mul: _MUL,
    torch.neg: _unary(aten.neg.default),
    torch.rsqrt: _unary(aten.rsqrt.default),
    torch.tanh: _unary(aten.tanh.default),
    torch.cat: _cat,
    torch.nn.functional.linear: _linear,
    torch.nn.functional.silu: _silu,
}
_METHODS: Mapping[str, Rule] = {
    "add": _ADD,
    "sub": _SUB,
    "mul": _MUL,
    "neg": _unary(aten.neg.default),
    "rsqrt": _unary(aten.rsqrt.default),
    "pow": _power,
    "mean": _mean,
    "transpose": _with_integers(aten.transpose.int, 2),
    "unsqueeze": _with_integers(aten.unsqueeze.default, 1),
}
