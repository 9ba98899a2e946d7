"""The verifier: what a cascade must satisfy before any layer may rely on it.

Comes in: a `Cascade`, and the name of whatever made it. Goes out: nothing, or a `CascadeError` that names the maker,
the cascade, the statement and what is wrong with it.

Checked: names, the rank table, single assignment, reads of what is defined, arity, free variables, integer indices,
boolean against real use by dtype, reductions, topk, scans, layouts, outputs.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable
from typing import Any

import sympy
from sympy.core.relational import Equality, Relational, Unequality
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from einscade.ir.cascade import DTYPES, MONOIDS, TENSOR_PARAMS, Cascade, Einsum, Layout, Tensor
from einscade.ir.expr import FUNCTIONS, Access, FloorDiv, Mod, Round, Trunc, Where, accesses, free_vars, var

__all__ = ["LAYOUTS", "TENSOR_PARAMS", "WORDS", "CascadeError", "verify"]

BOOL, INT, REAL = "boolean", "integer", "real"

# Words of the text form, which no tensor, rank or symbol may be called.
WORDS = frozenset({"cascade", "where", "if", "along", "from", "of", "oo", "nan", "pi", "true", "false"})

# Kinds of layout.
LAYOUTS = frozenset({"dense", "quantized", "blocks", "paged"})

_KIND = {"bool": BOOL} | {d: (INT if d[0] in "iu" else REAL) for d in DTYPES if d != "bool"}
_FUNCTIONS: tuple[Any, ...] = tuple(FUNCTIONS.values())
_INT_FUNCTIONS = (Round, Trunc, sympy.floor, sympy.ceiling, sympy.sign)


class CascadeError(ValueError):
    """A cascade that breaks a rule. `statement` is the name of the Einsum at fault, `where` what made the cascade."""

    def __init__(self, message: str, *, statement: str | None = None, where: str = "") -> None:
        self.statement, self.where = statement, where
        prefix = f"after {where}: " if where else ""
        super().__init__(prefix + (f"statement {statement}: " if statement else "") + message)


def verify(cascade: Cascade, where: str = "") -> None:
    """Raise `CascadeError` if the cascade breaks a rule; `where` names the pass (or reader) that made it."""
    try:
        _Verifier(cascade).run()
    except _Broken as broken:
        raise CascadeError(f"{broken} (cascade {cascade.name})", statement=broken.statement, where=where) from None


class _Broken(Exception):
    statement: str | None = None


class _Verifier:
    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.ranks = cascade.rank_table
        self.defined: dict[str, Tensor] = {}
        self.statement: Einsum | None = None
        self.bound: frozenset[str] = frozenset()

    def run(self) -> None:
        c = self.cascade
        _name(c.name, "cascade")
        _unique((r.name for r in c.ranks), "rank")
        self.rank_extents()
        for tensor in c.inputs:
            self.tensor(tensor)
        for statement in c.body:
            self.statement = statement
            try:
                self.einsum(statement)
            except _Broken as broken:
                broken.statement = statement.name
                raise
        self.layouts()
        if clash := set(c.tensors) & (set(self.ranks) | set(c.symbols)):
            raise _Broken(f"{_list(clash)}: both a tensor and a rank or symbol")
        _unique(c.outputs, "output")
        if not c.outputs:
            raise _Broken("has no outputs")
        for name in c.outputs:
            if name not in self.defined:
                raise _Broken(f"output {name} is not defined")

    def rank_extents(self) -> None:
        for r in self.cascade.ranks:
            _name(r.name, "rank", variable=True)
            if r.origin is not None:
                _name(r.origin, f"origin of rank {r.name}", variable=True)
            if used := free_vars(r.extent) & set(self.ranks):
                raise _Broken(f"extent of rank {r.name} depends on the rank {_list(used)}")
            if r.extent.has(Access) or self.kind(r.extent) != INT or r.extent.is_negative:
                raise _Broken(f"extent of rank {r.name} is {r.extent}, not a nonnegative integer over symbols")

    def tensor(self, t: Tensor) -> None:
        _name(t.name, "tensor")
        if t.name in self.defined:
            raise _Broken(f"tensor {t.name} is defined twice")
        if t.dtype not in DTYPES:
            raise _Broken(f"tensor {t.name} has unknown dtype {t.dtype!r}; known: {', '.join(DTYPES)}")
        _unique(t.ranks, f"rank of tensor {t.name}")
        for rank in t.ranks:
            if rank not in self.ranks:
                raise _Broken(f"rank {rank} of tensor {t.name} is not in the rank table")
        self.defined[t.name] = t

    def einsum(self, e: Einsum) -> None:
        if e.name in self.defined:
            raise _Broken(f"tensor {e.name} is defined twice")
        self.reduction(e)
        self.bound = frozenset(e.ranks)
        if e.scan is not None:
            self.scan(e)
        kind = self.kind(e.expr)
        stored = _KIND.get(e.output.dtype, REAL)
        if e.reduce and e.reduce.monoid == "topk":
            if kind == BOOL:
                raise _Broken("topk needs a real expression, this one is boolean")
            if stored != INT:
                raise _Broken(f"topk gives indices: its output needs an integer dtype, not {e.output.dtype}")
        else:
            if (kind == BOOL) != (stored == BOOL):
                raise _Broken(f"the expression is {kind}, the output's dtype {e.output.dtype} is not")
            if kind == REAL and stored == INT:
                raise _Broken(f"a real expression in dtype {e.output.dtype}; Round or Trunc it first")
            if e.reduce and (e.reduce.monoid in ("any", "all")) != (kind == BOOL):
                raise _Broken(f"{e.reduce.monoid} over a {kind} expression")
        if self.kind(e.domain) != BOOL:
            raise _Broken(f"domain {e.domain} is not boolean")
        self.tensor(e.output)

    def reduction(self, e: Einsum) -> None:
        reduce = e.reduce
        if reduce is None:
            return
        if reduce.monoid != "topk" and reduce.monoid not in MONOIDS:
            raise _Broken(f"unknown monoid {reduce.monoid!r}; known: {', '.join(MONOIDS)}, topk")
        if not reduce.ranks:
            raise _Broken(f"{reduce.monoid} over no ranks")
        _unique(reduce.ranks, "reduced rank")
        for rank in reduce.ranks:
            if rank not in self.ranks:
                raise _Broken(f"reduced rank {rank} is not in the rank table")
            if rank in e.output.ranks:
                raise _Broken(f"rank {rank} is reduced and in the output")
        if reduce.monoid == "topk":
            if len(reduce.ranks) != 1:
                raise _Broken("topk reduces exactly one rank")
            if reduce.slot is None or reduce.slot not in e.output.ranks:
                raise _Broken(f"topk needs a slot that is a rank of the output, not {reduce.slot}")
        elif reduce.slot is not None:
            raise _Broken(f"only topk has a slot, {reduce.monoid} has {reduce.slot}")

    def scan(self, e: Einsum) -> None:
        assert e.scan is not None
        rank, init = e.scan.rank, e.scan.init
        if rank not in e.output.ranks or (e.reduce and (e.reduce.monoid == "topk")):
            raise _Broken(f"scan along {rank}, which is not a rank of the output, or of a topk")
        if e.name in {a.tensor for a in accesses(init)}:
            raise _Broken("the scan's initial value reads the scan itself")
        self.bound = frozenset(e.output.ranks) - {rank}
        if (self.kind(init) == BOOL) != (e.output.dtype == "bool"):
            raise _Broken(f"the scan's initial value {init} does not fit dtype {e.output.dtype}")
        self.bound = frozenset(e.ranks)
        reduced = set(e.reduce.ranks) if e.reduce else set()
        for access in e.reads:
            if access.tensor != e.name:
                continue
            if len(access.index) != len(e.output.ranks):
                raise _Broken(f"{access} has {len(access.index)} indices, {e.name} has {len(e.output.ranks)} ranks")
            for r, index in zip(e.output.ranks, access.index, strict=True):
                own = index == var(r) or free_vars(index) & reduced
                if index != var(r) - 1 if r == rank else not own:
                    raise _Broken(f"{access}: a scan along {rank} reads itself at {rank} - 1 and its own other ranks")
        if e.name in {a.tensor for a in accesses(e.domain)}:
            raise _Broken("the domain of a scan reads the scan itself")

    def layouts(self) -> None:
        for t in self.defined.values():
            layout: Layout = t.layout
            if layout.kind not in LAYOUTS:
                raise _Broken(f"tensor {t.name} has unknown layout {layout.kind!r}; known: {_list(LAYOUTS)}")
            keys = [k for k, _ in layout.params]
            if keys != sorted(set(keys)):
                raise _Broken(f"layout of {t.name}: parameters must be sorted by name, each once")
            for key, value in layout.params:
                if not key.isidentifier() or key in WORDS or type(value) not in (int, str):
                    raise _Broken(f"layout of {t.name}: {key}={value!r} is not a name with an int or str")
                if key in TENSOR_PARAMS and value not in self.defined:
                    raise _Broken(f"layout of {t.name}: {key}={value!r} is not a tensor of the cascade")

    # -- expressions: the kind of a node, with every rule checked on the way --

    def kind(self, node: Any) -> str:
        """BOOL, INT or REAL; raises where a node is unknown or used as what it is not."""
        if isinstance(node, Access):
            return self.access(node)
        if isinstance(node, sympy.Symbol):
            if node != var(node.name):
                raise _Broken(f"symbol {node} has assumptions of its own; make it with var({node.name!r})")
            _name(node.name, "variable", variable=True)
            if node.name in self.ranks and node.name not in self.bound:
                raise _Broken(f"rank {node} is not bound here")
            return INT
        if isinstance(node, sympy.Integer):
            return INT
        if isinstance(node, sympy.Float):
            if sympy.Float(float(node)) != node:
                raise _Broken(f"{node} is not a double")
            return REAL
        if node in (sympy.oo, -sympy.oo, sympy.pi, sympy.E) or isinstance(node, sympy.Rational):
            return REAL
        if isinstance(node, (BooleanTrue, BooleanFalse)):
            return BOOL
        if isinstance(node, (And, Or, Not)):
            self.all_of(node, node.args, boolean=True)
            return BOOL
        if isinstance(node, Relational):
            kinds = {self.kind(a) == BOOL for a in node.args}
            if len(kinds) > 1 or (True in kinds and not isinstance(node, (Equality, Unequality))):
                raise _Broken(f"{node} compares a boolean with a number")
            return BOOL
        if isinstance(node, Where):
            self.all_of(node, node.args[:1], boolean=True)
            return self.all_of(node, node.args[1:])
        if isinstance(node, (FloorDiv, Mod)):
            if self.all_of(node, node.args) != INT:
                raise _Broken(f"{node} divides what is not an integer; use floor(a / b)")
            return INT
        if isinstance(node, (sympy.Add, sympy.Mul, sympy.Max, sympy.Min)):
            return self.all_of(node, node.args)
        if isinstance(node, sympy.Pow):
            kind, exponent = self.all_of(node, node.args), node.exp
            return kind if exponent.is_Integer and exponent.is_nonnegative else REAL
        if isinstance(node, _FUNCTIONS):
            kind = self.all_of(node, node.args)
            return INT if isinstance(node, _INT_FUNCTIONS) else kind if isinstance(node, sympy.Abs) else REAL
        raise _Broken(f"{node} ({type(node).__name__}) is not an expression a cascade may hold")

    def all_of(self, node: Any, args: Iterable[Any], boolean: bool = False) -> str:
        kind = INT
        for arg in args:
            k = self.kind(arg)
            if (k == BOOL) != boolean:
                raise _Broken(f"{arg} in {node} is {k}, {'a boolean' if boolean else 'a number'} is needed")
            kind = REAL if k == REAL else kind
        return kind

    def access(self, a: Access) -> str:
        e = self.statement
        own = e is not None and e.scan is not None and a.tensor == e.name
        tensor = e.output if own and e else self.defined.get(a.tensor)
        if tensor is None:
            raise _Broken(f"{a} reads {a.tensor}, which is not defined before it")
        if len(a.index) != len(tensor.ranks):
            raise _Broken(f"{a} has {len(a.index)} indices, {tensor.name} has {len(tensor.ranks)} ranks")
        for i in a.index:
            if self.kind(i) != INT:
                raise _Broken(f"index {i} of {a} is not an integer")
        return _KIND[tensor.dtype]


def _name(name: str, what: str, variable: bool = False) -> None:
    """Names are ASCII identifiers, and no words of the text form or (variables) names of its functions."""
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name) or name in WORDS:
        raise _Broken(f"{name!r} cannot name a {what}")
    if variable and name in FUNCTIONS:
        raise _Broken(f"{name!r} cannot name a {what}: it is a function")


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _Broken(f"{what} {name} appears twice")
        seen.add(name)


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
