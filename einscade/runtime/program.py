"""Programs: a raised cascade, the recipe for it and the memory order of its outputs, as one self-contained text.

    exact -> O[b,p,h,f]
    cascade attention(Q[b,h,p,e]: f32, ...) -> O
      ...

The first line is the recipe and, after `->`, the ranks in memory order (outermost first) of every output that is not
stored in the order of its own ranks. The rest is the cascade's text. This is what the operator in a graph carries, so
that a graph with it needs nothing else. There it is one line, with `;;` for the ends of lines: compilers quote a
graph's constants in comments of what they generate.

A gradient also says what it is the gradient of, so that a library's backward call can stand in for it:

    exact
    cascade attention_gradient(Q[b,h,p,e]: f32, ..., dO[b,h,p,f]: f32) -> dQ, dK, dV
      ...
    derived O by dO, Q by dQ, K by dK, V by dV
    cascade attention(Q[b,h,p,e]: f32, ...) -> O, G, R
      ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch

from einscade.ir.cascade import Cascade
from einscade.ir.expr import Expr, FloorDiv, Mod
from einscade.ir.text import parse_cascade, print_cascade

__all__ = ["DTYPES", "Derivation", "MemoryOrder", "Program", "parse_program", "remember"]

DTYPES: Mapping[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "i64": torch.int64, "i32": torch.int32,
    "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i4": torch.int8, "bool": torch.bool,
}  # fmt: skip

LINE_END = " ;; "

MemoryOrder = tuple[tuple[str, tuple[str, ...]], ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Derivation:
    """What a gradient was derived from. `forward` is the cascade that runs forward, whose outputs are its results and
    what the gradient reads besides; what both cascades have goes by one name. `adjoints` are pairs of a result of
    `forward` or an input of it, and the gradient's input or output that is its gradient."""

    forward: Cascade
    adjoints: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        pairs = ", ".join(f"{name} by {adjoint}" for name, adjoint in self.adjoints)
        return f"derived {pairs}\n{print_cascade(self.forward)}"


@dataclass(frozen=True)
class Program:
    """`out_order`: pairs of an output and its ranks in memory order, outermost first; rank order where not named.
    `derived`: of a gradient, what it is the gradient of."""

    recipe: str
    cascade: Cascade
    out_order: MemoryOrder = ()
    derived: Derivation | None = None

    @cached_property
    def text(self) -> str:
        orders = ", ".join(f"{name}[{','.join(ranks)}]" for name, ranks in self.out_order)
        parts = [self.recipe + (f" -> {orders}" if orders else ""), print_cascade(self.cascade).strip()]
        if self.derived is not None:
            parts.append(self.derived.text.strip())
        return "\n".join(parts).replace("\n", LINE_END)

    def order_in(self, form: Cascade) -> MemoryOrder:
        """The memory orders in the names that outputs and their ranks have in another form of the cascade."""
        orders = []
        for name, ranks in self.out_order:
            new = form.outputs[self.cascade.outputs.index(name)]
            names = dict(zip(self.cascade.tensors[name].ranks, form.tensors[new].ranks, strict=True))
            orders.append((new, tuple(names[r] for r in ranks)))
        return tuple(orders)

    def check(self, inputs: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        """Raises ValueError where an input's shape, dtype or device is not what the cascade says for these sizes."""
        tensors = self.cascade.inputs
        if len(inputs) != len(tensors):
            raise ValueError(f"cascade {self.cascade.name} has {len(tensors)} inputs, {len(inputs)} were given")
        for tensor, value, expected in zip(tensors, inputs, self.shapes(sizes), strict=True):
            if tuple(value.shape) != expected:
                extents = ", ".join(f"{r}={n}" for r, n in zip(tensor.ranks, expected, strict=True))
                raise ValueError(f"input {tensor.name} has shape {tuple(value.shape)}, the sizes say {extents}")
            if value.dtype != DTYPES[tensor.dtype]:
                raise ValueError(f"input {tensor.name} is {value.dtype}, the cascade says {DTYPES[tensor.dtype]}")
            if value.device != inputs[0].device:
                raise ValueError(f"input {tensor.name} is on {value.device}, {tensors[0].name} on {inputs[0].device}")

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the outputs."""
        return tuple(DTYPES[self.cascade.tensors[name].dtype] for name in self.cascade.outputs)

    def shapes(self, sizes: Sequence[int]) -> tuple[Shape, ...]:
        """Of the inputs."""
        return self._function(_tuple([self.shape_code(t.name) for t in self.cascade.inputs]))(*sizes)

    def layouts(self, sizes: Sequence[int]) -> tuple[tuple[Shape, Shape], ...]:
        """Of the outputs shapes and strides. `sizes` may be SymInts."""
        pairs = [_tuple([self.shape_code(name), self.strides_code(name)]) for name in self.cascade.outputs]
        return self._function(_tuple(pairs))(*sizes)

    # Extents as Python over the sizes, by symbol name: what a call computes is written and compiled once a program.

    def shape_code(self, tensor: str) -> str:
        return _tuple([_code(n) for n in self.cascade.shape(tensor)])

    def strides_code(self, output: str) -> str:
        """The strides that the memory order gives an output."""
        ranks = self.cascade.tensors[output].ranks
        strides: dict[str, str] = {}
        steps: list[str] = []
        constant = 1
        for rank in reversed(dict(self.out_order).get(output, ranks)):
            strides[rank] = " * ".join([*steps, str(constant)] if constant != 1 else steps or ["1"])
            extent = self.cascade.extent(rank)
            if extent.is_Integer:
                constant *= max(int(extent), 1)
            else:
                steps.append(f"max({_code(extent)}, 1)")
        return _tuple([strides[r] for r in ranks])

    @property
    def points_code(self) -> str:
        """Whether every rank has a point."""
        extents = dict.fromkeys(_code(r.extent) for r in self.cascade.ranks)
        return " and ".join([f"{e} > 0" for e in extents if e == "0" or not e.isdigit()] or ["True"])

    def _function(self, code: str) -> Callable[..., Any]:
        return _compiled(f"lambda {', '.join(self.cascade.symbols)}: {code}")


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
    body, _, origin = body.partition("\nderived ")
    cascade = parse_cascade(body)
    out_order = tuple((n, tuple(r.split(","))) for n, r in re.findall(r"(\w+)\[([^\]]*)\]", orders))
    for name, ranks in out_order:
        if name not in cascade.outputs or sorted(ranks) != sorted(cascade.tensors[name].ranks):
            raise ValueError(f"program: {name}[{','.join(ranks)}] does not order the ranks of an output")
    return Program(recipe, cascade, out_order, _derivation(cascade, origin) if origin else None)


def _derivation(cascade: Cascade, text: str) -> Derivation:
    pairs, _, body = text.partition("\n")
    forward = parse_cascade(body)
    adjoints = tuple(re.findall(r"(\w+) by (\w+)", pairs))
    known = {*cascade.outputs, *(t.name for t in cascade.inputs)}
    for name, adjoint in adjoints:
        if name not in forward.tensors or adjoint not in known:
            raise ValueError(f"program: {adjoint} is not the gradient of {name} in what it is derived from")
    return Derivation(forward, adjoints)


@functools.lru_cache(maxsize=4096)
def _compiled(code: str) -> Callable[..., Any]:
    return eval(code, {"max": torch.sym_max, "min": torch.sym_min})


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _code(expr: Expr) -> str:
    """An extent as Python over the sizes."""
    if expr.is_Integer:
        return str(int(expr))
    if expr.is_Symbol:
        return expr.name
    args = [_code(a) for a in expr.args]
    if isinstance(expr, (sympy.Max, sympy.Min)):
        return functools.reduce(lambda a, b: f"{type(expr).__name__.lower()}({a}, {b})", args)
    for kind, sign in _SIGNS.items():
        if isinstance(expr, kind):
            return f"({sign.join(args)})"
    raise ValueError(f"extent {expr}: {expr.func.__name__} is not an operation on sizes")


_SIGNS: Mapping[Any, str] = {sympy.Add: " + ", sympy.Mul: " * ", sympy.Pow: " ** ", FloorDiv: " // ", Mod: " % "}
