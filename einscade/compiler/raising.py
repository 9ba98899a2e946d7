"""Raising: what a value of the graph is, as scalar expressions over the tensors a region reads, and as Einsums.

Comes in: the nodes of a region and the demand "this node at this index". Goes out: expressions and, for contractions,
reductions and shared values, statements. Demand flows from the result to the inputs: the index of a view is translated
and the view is gone, a mask is evaluated at the very (p, m) it is asked at, a broadcast drops the ranks it lacks.

A statement's ranks are the variables it is first demanded at, wherever these cover its dimensions; a merged dimension
demanded at `b*H + h` has the ranks `b` and `h`. A variable that the inputs need in two parts (`h // 4` and `h % 4`) is
noted in `wanted`; the caller raises again with that split (`raise_region`), until nothing is wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor as TorchTensor
from torch.fx import Node

from einscade.compiler.aten_facts import (
    Unraisable,
    device_of,
    dtype_name,
    is_cpu_number,
    is_tensor,
    op_name,
    readers,
    scalar,
    shape,
    tensor_inputs,
    torch_dtype,
)
from einscade.compiler.aten_rules import evaluate, gathered
from einscade.compiler.aten_views import VIEWS, is_copy, view
from einscade.compiler.raising_constants import least_is_nonnegative, recognise
from einscade.compiler.raising_index import Index, exact_quotient, is_one, one, product, same, solved_digits
from einscade.ir.cascade import Einsum, Reduction, Tensor
from einscade.ir.digits import counted, number
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, accesses, var

__all__ = ["Key", "Raiser", "leaf_name"]

Key = tuple[Any, ...]
Build = Callable[[Index], tuple[Expr, Reduction | None]]

_LONGEST = 64  # operations of a mask or bias that are done again for every element
_DEEPEST = 100  # operations between a value and what it is made of (a loop that was unrolled): Python's stack ends
_MOST = 32  # reductions of one cascade (an iteration that was unrolled): what rewriting takes grows faster than they do
_HINT = 4096  # what a length that is not known counts for when sizes are compared


def leaf_name(node: Node) -> str:
    """The name that accesses to a node have until the cascade's tensors are named."""
    return f"@{node.name}"


@dataclass(frozen=True)
class _Step:
    """A tensor on an operand's way back to what it was made of: the index there and the factor so far. `copied` says
    that the step before it stores the elements anew."""

    node: Node
    index: Index
    factor: Expr
    copied: bool


@dataclass
class Raiser:
    """One raising. `core` are the region's own nodes, `products` those of them whose operands are cut like a
    contraction's, `constants` the values known of graph inputs, `splits` which variables to make in parts, `scores` the
    contractions that make the intermediate, `owned` the nodes of all regions, `device` where the region computes: what
    is on another one is read behind its move."""

    core: Collection[Node]
    products: Collection[Node]
    constants: Mapping[str, TorchTensor]
    splits: Mapping[Key, Expr]
    scores: Collection[Node] = ()
    owned: Collection[Node] = ()
    device: torch.device | None = None
    extents: dict[str, Expr] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    body: list[Einsum] = field(default_factory=list)
    leaves: dict[str, Node] = field(default_factory=dict)
    wanted: dict[Key, Expr] = field(default_factory=dict)
    touched: set[Node] = field(default_factory=set)
    known: set[Node] = field(default_factory=set)
    defined: dict[Key, tuple[str, tuple[tuple[str, ...], ...]]] = field(default_factory=dict)
    width: Expr | None = None
    first: dict[Node, Index] = field(default_factory=dict)
    _memo: dict[tuple[Node, Index, str], Expr] = field(default_factory=dict)
    _depth: int = 0
    _cut: dict[Node, bool] = field(default_factory=dict)
    _far: set[str] = field(default_factory=set)

    # -- variables --

    def fresh(self, key: Key, size: Expr, keep_one: bool = False) -> tuple[Expr, tuple[str, ...]]:
        """A new variable for a dimension, as an index and its names: several names where a split was asked for.
        With `keep_one`, a dimension of 1 has a variable too (its extent an opaque symbol, until naming)."""
        if key in self.splits:
            inner = self.splits[key]
            outer = exact_quotient(size, inner)
            assert outer is not None
            (high, names), (low, more) = self.fresh((*key, "/"), outer), self.fresh((*key, "%"), inner)
            return sympy.expand(high * inner + low), names + more
        if size == 1 and not keep_one:
            return sympy.Integer(0), ()
        name = f"_{len(self.extents)}"
        self.extents[name] = one(name) if size == 1 else size
        self.keys[name] = key
        return var(name), (name,)

    def names_of(self, key: Key) -> tuple[str, ...]:
        """The variables made for a key, parts in order."""
        if key in self.splits:
            return self.names_of((*key, "/")) + self.names_of((*key, "%"))
        return tuple(name for name, made in self.keys.items() if made == key)

    def size_of(self, name: str) -> Expr:
        return sympy.Integer(1) if is_one(self.extents[name]) else self.extents[name]

    def _wants(self, index: Sequence[Expr]) -> None:
        """Note the variables of an index that are needed in two parts."""
        divided: dict[Expr, set[Expr]] = {}
        rest: dict[Expr, set[Expr]] = {}
        for part in index:
            if not part.has(FloorDiv, Mod):
                continue
            for node in sympy.preorder_traversal(part):
                if isinstance(node, FloorDiv | Mod) and isinstance(node.args[0], sympy.Symbol):
                    (divided if isinstance(node, FloorDiv) else rest).setdefault(node.args[0], set()).add(node.args[1])
        for variable in divided.keys() & rest.keys():
            extent = self.extents.get(variable.name)
            sizes = [s for s in divided[variable] | rest[variable] if extent is not None and exact_quotient(extent, s)]
            if sizes and (key := self.keys.get(variable.name)) is not None:
                self.wanted.setdefault(key, max(sizes, key=lambda s: (s.is_Integer, int(s) if s.is_Integer else 0)))

    # -- demand --

    def read(self, node: Node, index: Index) -> Expr:
        """A node of the region, or something on its side (a mask, a bias), at an index."""
        return self._remembered(node, index, "core" if node in self.core else "side")

    def operand(self, node: Node, index: Index, width: Expr | None = None) -> Expr:
        """An operand of a contraction: followed through what only moves or scales elements, never further. Of views
        that are equally good, the one whose last dimension is `width` is read."""
        self.width = width
        return self._remembered(node, index, "core" if node in self.core else "operand")

    def share(self, node: Node, index: Index) -> Expr:
        """As `read`, but what is no single access becomes a statement that others read too."""
        value = self.read(node, index)
        if isinstance(value, Access) or value.is_number or not value.has(Access) or node not in self.core:
            return value
        sizes = shape(node)
        if not self.covers(index, sizes):
            return value
        return self.define((node, "share"), node, index, sizes, lambda i: (self.read(node, i), None))

    def _remembered(self, node: Node, index: Index, mode: str) -> Expr:
        self.touched.add(node)
        key = (node, index, mode)
        if key not in self._memo:
            if self._depth == _DEEPEST:
                raise Unraisable(f"it is made by more than {_DEEPEST} operations in a row, back to {node.name}")
            self._depth += 1
            try:
                self._memo[key] = getattr(self, f"_{mode}")(node, index)
            finally:
                self._depth -= 1
        return self._memo[key]

    def _core(self, node: Node, index: Index) -> Expr:
        if moved := view(node, index, self.extents):
            return self.read(*moved)
        self.first.setdefault(node, index)
        shared = sum(1 for user in readers(node) if user in self.core) > 1
        sizes = shape(node)
        if not shared or not self.covers(index, sizes):
            return evaluate(self, node, index)
        if known := self.defined.get((node, "shared")):
            return self._access(*known, index)
        value = evaluate(self, node, index)
        if isinstance(value, Access) or not value.has(Access):
            return value
        return self.define((node, "shared"), node, index, sizes, lambda i: (evaluate(self, node, i), None))

    def _operand(self, node: Node, index: Index) -> Expr:
        """The operand read where it needs no copy: past clones, casts, scaling, repeated heads and gathered blocks, but
        not past the view that gives it one dimension per rank."""
        steps = [_Step(node, index, sympy.Integer(1), copied=False)]
        while (step := self._step(steps[-1])) is not None:
            steps.append(step)
        chosen = self._chosen(steps)
        return self.leaf(chosen.node, chosen.index) * chosen.factor

    def _step(self, at: _Step) -> _Step | None:
        self.touched.add(at.node)
        if at.node in self.core or at.node in self.owned:
            return None
        if (scaled := _scaled(at.node)) is not None:
            tensor, apply = scaled
            if not self.reaches(tensor):
                return None
            return _Step(tensor, at.index, apply(at.factor, self), copied=True)
        try:
            if (block := gathered(self, at.node, at.index)) is not None:
                return _Step(*block, at.factor, copied=True)
            moved = view(at.node, at.index, self.extents)
        except Unraisable:
            return None
        if moved is None or not self.reaches(moved[0]):
            return None
        copied = op_name(at.node) in _COPYING and shape(moved[0]) != shape(at.node)
        return _Step(*moved, at.factor, copied)

    def _chosen(self, steps: list[_Step]) -> _Step:
        """Of the steps after the last copy, the first whose index is one variable (or part of one) per dimension;
        better without dimensions that are not read along, and with the contracted one last."""
        ends = [k for k, step in enumerate(steps) if k == 0 or step.copied]
        for start, end in reversed(list(zip(ends, [*ends[1:], len(steps)], strict=True))):
            group = steps[start:end]
            plain = [s for s in group if self._is_plain(s)]
            if plain:
                return min(plain, key=self._plainness)
            before = len(self.wanted)
            for step in group:
                self._wants(step.index)
                if len(self.wanted) > before:
                    return step
        return steps[ends[-1]]

    def _plainness(self, step: _Step) -> tuple[int, int, bool]:
        constants = sum(i.is_Integer for i in step.index)
        return constants, constants - len(step.index), step.index[-1:] != (self.width,)

    def _is_plain(self, step: _Step) -> bool:
        seen: list[str] = []
        for index, size in zip(step.index, shape(step.node), strict=True):
            at = self._plain(index, size)
            if at.has(Access):  # a block, wherever it is
                continue
            if isinstance(at, FloorDiv | Mod):
                at = at.args[0]
            if at.is_Symbol:
                seen.append(at.name)
            elif not at.is_Integer:
                return False
        return len(seen) == len(set(seen))

    def _side(self, node: Node, index: Index) -> Expr:
        if self._cut.get(node) or node in self.owned:
            return self.leaf(node, index)
        try:
            if moved := view(node, index, self.extents):
                return self.read(*moved)
            value = evaluate(self, node, index)
        except Unraisable:
            self._cut[node] = True
            return self.leaf(node, index)
        if node not in self._cut:
            self._cut[node] = self._heavier(value, node)
        return self.leaf(node, index) if self._cut[node] else value

    def _heavier(self, value: Expr, node: Node) -> bool:
        """Whether reading a value is better: its inputs hold more than it does, or it is far to compute from them."""
        names = {a.tensor for a in accesses(value)}
        own, read = _elements(node), sum(_elements(self.leaves[name]) for name in names if name in self.leaves)
        # What is made of something too far to compute is read whole as well, rather than finished for every element.
        if value.count_ops() > _LONGEST or (read >= own and not self._far.isdisjoint(names)):
            self._far.add(leaf_name(node))
            return True
        return read > own or (read == own and op_name(node).removeprefix("aten::") in _EXPENSIVE)

    # -- leaves and statements --

    def constant(self, node: Node, index: Index) -> Expr | None:
        """What the known value of a graph input shows the element to be."""
        value = self.constants.get(node.name)
        form = None if value is None else recognise(value, index)
        if form is not None:
            self.known.add(node)
        return form

    def nonnegative(self, node: Node) -> bool:
        """Whether a tensor of integers is a known one without negative elements."""
        while node.name not in self.constants:
            self.touched.add(node)
            moved = op_name(node) in VIEWS or is_copy(node)
            if not moved or not is_tensor(node.args[0]):
                return False
            node = node.args[0]
        if not least_is_nonnegative(self.constants[node.name]):
            return False
        self.known.add(node)
        return True

    def number(self, value: Any) -> Expr:
        """A scalar argument. A float that torch only knows at run time is read where it is stored."""
        if isinstance(value, Node) and op_name(value) == "aten::_local_scalar_dense":
            self.touched.add(value)
            (stored,) = tensor_inputs(value)
            return self.leaf(stored, ())
        if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.SymFloat):
            self.touched.add(value)
            combine = _ARITHMETIC.get(op_name(value))
            if combine is not None:
                return combine(*map(self.number, value.args))
        return scalar(value)

    def leaf(self, node: Node, index: Index) -> Expr:
        """One element of a tensor the region reads; of a known tensor, what the value shows it to be."""
        if (known := self.constant(node, index)) is not None:
            return known
        self.touched.add(node)
        if not self.reaches(node):
            raise Unraisable(f"{node.name} is on {device_of(node)}, not on {self.device}")
        dtype_name(node)
        sizes = shape(node)
        index = tuple(self._plain(i, n) for i, n in zip(index, sizes, strict=True))
        if not any(i.has(Access) for i in index):  # the place in a block is not worth a rank of its own
            self._wants(index)
        self.leaves.setdefault(leaf_name(node), node)
        return Access(leaf_name(node), *index)

    def reaches(self, node: Node) -> bool:
        """Whether a tensor can be read where the region computes; a single number is moved there."""
        return self.device in (None, device_of(node)) or is_cpu_number(node)

    def _plain(self, index: Expr, size: Expr) -> Expr:
        """The index with variables of extent 1 gone, unless it is one into a dimension of 1."""
        ones = [s for s in index.free_symbols if s.name in self.extents and self.size_of(s.name) == 1]
        return (
            index
            if not ones or (size == 1 and index.is_Symbol)
            else index.xreplace({s: sympy.Integer(0) for s in ones})
        )

    def define(self, key: Key, node: Node, index: Index, sizes: Index, build: Build, dtype: str | None = None) -> Expr:
        """An access to a statement with `sizes`, made at the first demand: `build` gives its expression at the index
        of its own ranks and its reduction, whose slot, if it has one, is the last dimension. Only nodes of the region
        become statements."""
        if node not in self.core:
            raise Unraisable(f"{node.target} outside the region")
        if key not in self.defined:
            dims = self._dims(key, index, sizes)
            own = tuple(number([*map(var, names)], [self.extents[n] for n in names]) for names in dims)
            expr, reduce = build(own)
            if sum(e.reduce is not None for e in self.body) == _MOST:
                raise Unraisable(f"it has more than {_MOST} reductions")
            name = f"%{len(self.body)}"
            if reduce is not None and reduce.slot is not None:
                dims = (*dims[:-1], (reduce.slot,))
            ranks = tuple(n for names in dims for n in names)
            self.body.append(Einsum(Tensor(name, ranks, dtype or dtype_name(node)), expr, reduce))
            self.defined[key] = (name, dims)
        return self._access(*self.defined[key], index)

    def _access(self, name: str, dims: tuple[tuple[str, ...], ...], index: Index) -> Expr:
        places: list[Expr] = []
        for names, at in zip(dims, index, strict=True):
            places += solved_digits(at, [self.extents[n] for n in names], self.extents)
        self._wants(places)
        return Access(name, *places)

    def _dims(self, key: Key, index: Index, sizes: Index) -> tuple[tuple[str, ...], ...]:
        """Per dimension the names of the ranks that make it up: those of the index where they cover it exactly."""
        taken: set[str] = set()
        dims: list[tuple[str, ...]] = []
        for d, (at, size) in enumerate(zip(index, sizes, strict=True)):
            names = self.digits(at, size)
            if names is None or taken & set(names):
                _, names = self.fresh((*key, d), size)
            taken |= set(names)
            dims.append(names)
        return tuple(dims)

    def covers(self, index: Index, sizes: Index) -> bool:
        found = [self.digits(at, size) for at, size in zip(index, sizes, strict=True)]
        names = [n for part in found if part is not None for n in part]
        return None not in found and len(names) == len(set(names))

    def digits(self, at: Expr, size: Expr) -> tuple[str, ...] | None:
        """The variables `v1, v2, …` with `at == (v1 * n2 + v2) * n3 + …` and `n1 * n2 * … == size`, if there are."""
        extents = {s.name: self.size_of(s.name) for s in sorted(at.free_symbols, key=str) if s.name in self.extents}
        return counted(at, extents) if same(product(extents.values()), size) else None

    def body_of(self, name: str) -> Einsum:
        return next(e for e in self.body if e.name == name)

    # -- what rules use --

    def reduce(self, key: Key, node: Node, monoid: str, sizes: Sequence[Expr], value: Callable[[Index], Expr],
               index: Index, result: Index, dtype: str | None = None) -> Expr:  # fmt: skip
        """`monoid` over new variables of `sizes` of `value(them)`, where `index` (into `result`) is fixed."""

        def build(own: Index) -> tuple[Expr, Reduction | None]:
            made = [self.fresh((*key, "reduced", k), n) for k, n in enumerate(sizes)]
            names = tuple(n for _, part in made for n in part)
            expr = value((*own, *(i for i, _ in made)))
            return expr, (Reduction(monoid, names) if names else None)

        return self.define(key, node, index, result, build, dtype)


_COPYING = {"aten::expand", "aten::repeat", "aten::repeat_interleave", "aten::flip", "aten::roll"}
_ARITHMETIC: Mapping[str, Callable[..., Expr]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "neg": operator.neg,
    "pow": operator.pow,
    "sym_float": lambda x: x,
    "_sym_sqrt": sympy.sqrt,
    "sym_sqrt": sympy.sqrt,
}
_EXPENSIVE = {"exp", "log", "sigmoid", "tanh", "sin", "cos", "erf", "gelu", "silu", "softplus", "sqrt", "rsqrt", "pow"}


def _elements(node: Node) -> int:
    total = 4
    for n in shape(node):
        total *= int(n) if n.is_Integer else _HINT
    return total if str(torch_dtype(node)) != "torch.bool" else total // 4


def _scaled(node: Node) -> tuple[Node, Callable[[Expr, Raiser], Expr]] | None:
    """The tensor that a node multiplies or divides by one number, and how; a cast counts as such a product by 1."""
    if is_copy(node) and is_tensor(node.args[0]):
        return node.args[0], lambda x, r: x
    name = op_name(node)
    if name not in ("aten::mul", "aten::div") or not torch_dtype(node).is_floating_point or len(node.args) != 2:
        return None
    first, second = node.args
    if not is_tensor(first) or (name == "aten::mul" and _is_number(first) and is_tensor(second)):
        if name == "aten::div":
            return None
        first, second = second, first
    if not is_tensor(first) or not _is_number(second) or "rounding_mode" in node.kwargs:
        return None
    if torch_dtype(first).is_floating_point is False:
        return None

    def apply(x: Expr, raiser: Raiser) -> Expr:
        by = raiser.read(second, ()) if is_tensor(second) else raiser.number(second)
        return x * by if name == "aten::mul" else x / by

    return first, apply


def _is_number(value: Any) -> bool:
    if isinstance(value, Node) and is_tensor(value):
        return value.meta["val"].dim() == 0
    return not isinstance(value, list | tuple)
