"""Programs: a raised cascade, the recipe for it and the memory order of its outputs, as one self-contained text.

    exact -> O[b,p,h,f]
    cascade attention(Q[b,h,p,e]: f32, ...) -> O
      ...

The first line is the recipe and, after `->`, the ranks in memory order (outermost first) of every output that is not
stored in the order of its own ranks. The rest is the cascade's text. This is what the operator in a graph carries, so
that a graph with it needs nothing else. There it is one line, with `;;` for the ends of lines: compilers quote a
graph's constants in comments of what they generate.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from einscade.ir.cascade import Cascade
from einscade.ir.expr import Expr, FloorDiv, Mod
from einscade.ir.text import parse_cascade, print_cascade

__all__ = ["DTYPES", "MemoryOrder", "Program", "evaluate", "parse_program", "remember"]

DTYPES: Mapping[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "i64": torch.int64, "i32": torch.int32,
    "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i4": torch.int8, "bool": torch.bool,
}  # fmt: skip

LINE_END = " ;; "

MemoryOrder = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Program:
    """`out_order`: pairs of an output and its ranks in memory order, outermost first; rank order where not named."""

    recipe: str
    cascade: Cascade
    out_order: MemoryOrder = ()

    @cached_property
    def text(self) -> str:
        orders = ", ".join(f"{name}[{','.join(ranks)}]" for name, ranks in self.out_order)
        lines = self.recipe + (f" -> {orders}" if orders else "") + "\n" + print_cascade(self.cascade)
        return lines.strip().replace("\n", LINE_END)

    def named_sizes(self, sizes: Sequence[Any]) -> dict[str, Any]:
        """`sizes` come in the order of `cascade.symbols`; they may be ints or SymInts."""
        return dict(zip(self.cascade.symbols, sizes, strict=True))

    def check(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Raises ValueError where an input's shape or dtype is not what the cascade says for these sizes."""
        tensors = self.cascade.inputs
        if len(inputs) != len(tensors):
            raise ValueError(f"cascade {self.cascade.name} has {len(tensors)} inputs, {len(inputs)} were given")
        for tensor, value in zip(tensors, inputs, strict=True):
            expected = tuple(evaluate(self.cascade.extent(r), sizes) for r in tensor.ranks)
            if tuple(value.shape) != expected:
                extents = ", ".join(f"{r}={n}" for r, n in zip(tensor.ranks, expected, strict=True))
                raise ValueError(f"input {tensor.name} has shape {tuple(value.shape)}, the sizes say {extents}")
            if value.dtype != DTYPES[tensor.dtype]:
                raise ValueError(f"input {tensor.name} is {value.dtype}, the cascade says {DTYPES[tensor.dtype]}")

    def is_empty(self, sizes: Mapping[str, int]) -> bool:
        """Whether some rank has no points."""
        return any(evaluate(r.extent, sizes) == 0 for r in self.cascade.ranks)

    def outputs(self, sizes: Mapping[str, Any]) -> list[tuple[list[Any], list[Any], torch.dtype]]:
        """Shape, strides and dtype of every output."""
        return [self._output(name, sizes) for name in self.cascade.outputs]

    def _output(self, name: str, sizes: Mapping[str, Any]) -> tuple[list[Any], list[Any], torch.dtype]:
        tensor = self.cascade.tensors[name]
        lengths = {r: evaluate(self.cascade.extent(r), sizes) for r in tensor.ranks}
        strides: dict[str, Any] = {}
        step: Any = 1
        for rank in reversed(dict(self.out_order).get(name, tensor.ranks)):
            strides[rank] = step
            step = step * torch.sym_max(lengths[rank], 1)
        return [lengths[r] for r in tensor.ranks], [strides[r] for r in tensor.ranks], DTYPES[tensor.dtype]


_parsed: dict[str, Program] = {}


def parse_program(text: str) -> Program:
    """The program that `text` says. Raises `ValueError` (a `ParseError` where the cascade is at fault)."""
    program = _parsed.get(text)
    if program is None:
        program = _parsed[text] = _parse(text)
    return program


def remember(program: Program) -> Program:
    """`program`, or the equal one that was here before; its text will not have to be parsed in this process."""
    return _parsed.setdefault(program.text, program)


def _parse(text: str) -> Program:
    header, newline, body = text.replace(LINE_END, "\n").partition("\n")
    if not newline:
        raise ValueError(f"not a program: {text[:60]!r} has a recipe but no cascade")
    recipe, _, orders = header.partition(" -> ")
    cascade = parse_cascade(body)
    out_order = tuple((n, tuple(r.split(","))) for n, r in re.findall(r"(\w+)\[([^\]]*)\]", orders))
    for name, ranks in out_order:
        if name not in cascade.outputs or sorted(ranks) != sorted(cascade.tensors[name].ranks):
            raise ValueError(f"program: {name}[{','.join(ranks)}] does not order the ranks of an output")
    return Program(recipe, cascade, out_order)


def evaluate(expr: Expr, sizes: Mapping[str, Any]) -> Any:
    """An extent as an int, or as a SymInt where `sizes` has SymInts."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        return sizes[expr.name]
    args = [evaluate(a, sizes) for a in expr.args]
    if isinstance(expr, FloorDiv):
        return args[0] // args[1]
    if isinstance(expr, Mod):
        return args[0] % args[1]
    operation = _FOLDS.get(expr.func)
    if operation is None:
        raise ValueError(f"extent {expr}: {expr.func.__name__} is not an operation on sizes")
    return functools.reduce(operation, args)


_FOLDS: Mapping[Any, Any] = {
    sympy.Add: lambda a, b: a + b,
    sympy.Mul: lambda a, b: a * b,
    sympy.Pow: lambda a, b: a**b,
    sympy.Max: lambda a, b: torch.sym_max(a, b),
    sympy.Min: lambda a, b: torch.sym_min(a, b),
}
