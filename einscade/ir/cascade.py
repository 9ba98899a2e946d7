"""The cascade: ranks, tensors, Einsums in single-assignment order. Frozen data, structural equality, no behaviour.

    cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
      where b < B, h < 32, g < 8, p < P, m < M, e < 128, f < 128
      S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // 4,m,e] * 0.125  if m <= p
      G[b,h,p]   = max(m) S[b,h,p,m]
      W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
      Z[b,h,p]   = sum(m) W[b,h,p,m]
      O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // 4,m,f] / Z[b,h,p]

Semantics every layer agrees on (the interpreter is the definition):

* Over the reals: a dtype says how a tensor is stored, never how it is computed.
* *Existence*: a point of an Einsum exists where its own domain holds and every point it reads exists. A reduction
  takes the existing points only. Conditions free of the reduced ranks (conjuncts of the domain, reads whose index has
  none) say whether the output point exists at all, as `m <= p` does above; the others only say what is reduced, and a
  reduction over nothing is the monoid's identity, which exists. A cascade output's missing points are 0.
* `Where` reads the branch it takes, `&` and `|` stop at what decides them: what they pass over need not exist. A point
  that does not exist may read outside a tensor; one that exists must not.
* A *scan* (`scan=Scan("t", init)`) is sequential along rank `t`: its expression may read its own output at `t - 1`
  and its own point of the other ranks (or, where the statement reduces, at the reduced ranks); at `t = 0` that read
  gives `init`, and so does any other statement's read of a scan at -1: the value before the first step (and the last
  value of a scan without steps). `max`-, `sum`-like running values, states of linear attention, online softmax.
  A step that is missing ends the scan: all after it read it. (Emitters refuse such a scan.)
* `topk` reduces a rank to the *indices* of its k largest points (largest first; ties to the smaller index;
  missing points last), along a new rank `slot` of the output; k, the slot's extent, is at most the rank's. All k
  slots exist: one that names a missing point is for the reader's domain to drop.
* `-oo` and `+oo` added to each other give 0, so that a correction `exp(G[t - 1] - G[t])` is 1 where nothing was
  accumulated yet.
* An empty row: sums over nothing are 0, and rewrites that divide by such a sum guard the division with a domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir.expr import Access, Expr, accesses, free_vars, var

__all__ = [
    "DENSE",
    "DTYPES",
    "MONOIDS",
    "TENSOR_PARAMS",
    "Cascade",
    "Einsum",
    "Layout",
    "Monoid",
    "Rank",
    "Reduction",
    "Scan",
    "Tensor",
]

DTYPES = ("f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "i64", "i32", "i16", "i8", "u8", "i4", "bool")


@dataclass(frozen=True)
class Monoid:
    """An associative, commutative operator with its identity; `combine(a, b)` builds the expression."""

    name: str
    identity: Expr

    def combine(self, a: Expr, b: Expr) -> Expr:
        return _COMBINE[self.name](a, b)


_COMBINE = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "max": lambda a, b: sympy.Max(a, b),
    "min": lambda a, b: sympy.Min(a, b),
    "any": lambda a, b: sympy.Or(a, b),
    "all": lambda a, b: sympy.And(a, b),
}

MONOIDS: Mapping[str, Monoid] = {
    m.name: m
    for m in (
        Monoid("sum", sympy.Integer(0)),
        Monoid("prod", sympy.Integer(1)),
        Monoid("max", -sympy.oo),
        Monoid("min", sympy.oo),
        Monoid("any", sympy.false),
        Monoid("all", sympy.true),
    )
}


@dataclass(frozen=True)
class Rank:
    """A named dimension. `origin` names the rank that this one is a part of, after partitioning (m -> t, u)."""

    name: str
    extent: Expr
    origin: str | None = None


# Parameters of a layout that name other tensors.
TENSOR_PARAMS = frozenset({"scales", "zeros", "mean", "codebook", "rotation", "smooth", "table", "index"})


@dataclass(frozen=True)
class Layout:
    """How a tensor is stored. `kind`: dense, quantized, blocks (block-sparse) or paged; `params` are sorted pairs of
    plain values (bits=8, group="m:64,e:*", scales="Ks", ...), names of tensors among them. A group says how many
    neighbours along a rank share a scale (*: all; ranks that it does not name: one)."""

    kind: str = "dense"
    params: tuple[tuple[str, str | int], ...] = ()

    def __getitem__(self, key: str) -> str | int:
        return dict(self.params)[key]

    def renamed(self, tensors: Mapping[str, str], ranks: Mapping[str, str]) -> Layout:
        """The same layout where the tensors that its parameters name, and the ranks in its group, are called anew."""

        def new(key: str, value: str | int) -> str | int:
            if key == "group" and isinstance(value, str):
                pairs = (part.partition(":") for part in value.split(","))
                return ",".join(f"{ranks.get(rank, rank)}{colon}{span}" for rank, colon, span in pairs)
            return tensors.get(value, value) if key in TENSOR_PARAMS and isinstance(value, str) else value

        return replace(self, params=tuple((key, new(key, value)) for key, value in self.params))


DENSE = Layout()


@dataclass(frozen=True)
class Tensor:
    """A name, the ranks that shape it (each extent from the cascade's rank table), a dtype and a layout."""

    name: str
    ranks: tuple[str, ...]
    dtype: str = "f32"
    layout: Layout = DENSE

    def __call__(self, *index: object) -> Access:
        """This tensor at an index, or, without one, at its own rank variables."""
        return Access(self.name, *(index or map(var, self.ranks)))

    def place(self, access: Access) -> dict[Expr, Expr]:
        """The substitution that takes what is said of this tensor's own rank variables to where an access reads it."""
        return {var(r): i for r, i in zip(self.ranks, access.index, strict=True) if var(r) != i}


@dataclass(frozen=True)
class Reduction:
    """`monoid` (a key of MONOIDS, or "topk") over `ranks`; `slot` is the rank that topk's result runs along."""

    monoid: str
    ranks: tuple[str, ...]
    slot: str | None = None


@dataclass(frozen=True)
class Scan:
    """Sequential along `rank`; the output read at `rank - 1` when `rank` is 0 gives `init`."""

    rank: str
    init: Expr


@dataclass(frozen=True)
class Einsum:
    """One statement: `output[ranks] = reduce(ranks) expr if domain`."""

    output: Tensor
    expr: Expr
    reduce: Reduction | None = None
    domain: Boolean = sympy.true
    scan: Scan | None = None

    @property
    def name(self) -> str:
        return self.output.name

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """The iteration space: output ranks (topk's slot is not iterated), then reduced ranks."""
        slot = self.reduce.slot if self.reduce else None
        return tuple(r for r in self.output.ranks if r != slot) + (self.reduce.ranks if self.reduce else ())

    @cached_property
    def reads(self) -> tuple[Access, ...]:
        """Every access in the expression, the domain and a scan's initial value, nested ones included."""
        init = accesses(self.scan.init) if self.scan else ()
        return tuple(dict.fromkeys(accesses(self.expr) + accesses(self.domain) + init))

    @cached_property
    def sides(self) -> tuple[frozenset[str], ...]:
        """Of a sum of products of two tensors' points: the output's ranks that only one has, and those that only the
        other has; nothing where either has none, as where the statement is no such sum."""
        if self.reduce is None or self.reduce.monoid != "sum" or self.scan:
            return ()
        reads = [free_vars(a) for a in accesses(self.expr) if free_vars(a) & {*self.reduce.ranks}]
        if len(reads) != 2:
            return ()
        own = tuple((x - y) & {*self.output.ranks} for x, y in (reads, reads[::-1]))
        return own if all(own) else ()

    def replace(self, **changes: object) -> Einsum:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cascade:
    """A program between two graph boundaries. `ranks` tables the extents; `outputs` names body or input tensors."""

    name: str
    ranks: tuple[Rank, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    body: tuple[Einsum, ...]

    @cached_property
    def rank_table(self) -> Mapping[str, Rank]:
        return {r.name: r for r in self.ranks}

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return {t.name: t for t in (*self.inputs, *(e.output for e in self.body))}

    @cached_property
    def definitions(self) -> Mapping[str, Einsum]:
        return {e.name: e for e in self.body}

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """Free extent symbols (lengths only known at run time, and tile sizes), sorted."""
        names: set[str] = set()
        for r in self.ranks:
            names |= free_vars(r.extent)
        for e in self.body:
            names |= free_vars(e.expr) | free_vars(e.domain) | (free_vars(e.scan.init) if e.scan else frozenset())
        return tuple(sorted(names - set(self.rank_table)))

    @cached_property
    def in_layouts(self) -> frozenset[str]:
        """The tensors that other tensors' layouts name (scales, tables)."""
        return frozenset(
            value
            for t in self.tensors.values()
            for key, value in t.layout.params
            if key in TENSOR_PARAMS and isinstance(value, str)
        )

    @cached_property
    def lengths(self) -> frozenset[str]:
        """The ranks that are positions of a sequence, whatever their extents, by structure: they meet in pairs in a
        product, and one of the pair is reduced after that. Where nothing but sums and products is between the two, as
        in linear attention, that could be widths too: lengths are those that are longer than what is contracted."""
        found: set[str] = set()
        for e in self.body:
            if e.reduce is None or found & {*e.reduce.ranks}:
                continue
            apart = frozenset().union(*e.sides)
            reduced, scored = self.reduced_after(e.name)
            if e.sides and reduced & apart:
                contracted = self._points(e.reduce.ranks)
                found |= {r for r in apart if scored or self._points((r,)) > contracted}
        return frozenset(found | {origin for r in found if (origin := self.rank_table[r].origin)})

    def _points(self, ranks: tuple[str, ...]) -> float:
        extents = [self.extent(r) for r in ranks]
        return prod(int(n) if n.is_Integer else inf for n in extents)

    def reduced_after(self, name: str) -> tuple[frozenset[str], bool]:
        """The ranks that statements reduce which read a tensor, or what is computed of it point by point; and whether
        that is more than sums of products."""
        values, ranks, scored = {name}, set(), False
        for e in self.body:
            if any(a.tensor in values for a in e.reads):
                ranks |= {*e.reduce.ranks} if e.reduce else set()
                values |= {e.name} if e.reduce is None else set()
                inside = {a.tensor for f in e.expr.atoms(sympy.Function) for x in f.args for a in accesses(x)}
                scored |= bool(inside & values) or (e.reduce is not None and e.reduce.monoid != "sum")
        return frozenset(ranks), scored

    def extent(self, rank: str) -> Expr:
        return self.rank_table[rank].extent

    def shape(self, tensor: str) -> tuple[Expr, ...]:
        return tuple(self.extent(r) for r in self.tensors[tensor].ranks)

    def users(self, tensor: str) -> Iterator[Einsum]:
        """The statements that read a tensor (a scan's read of itself included)."""
        return (e for e in self.body if any(a.tensor == tensor for a in e.reads))

    def fresh(self, prefix: str) -> str:
        """A name no tensor, rank or symbol has."""
        taken = {*self.tensors, *self.rank_table, *self.symbols}
        if prefix not in taken:
            return prefix
        return next(f"{prefix}{i}" for i in range(1, len(taken) + 2) if f"{prefix}{i}" not in taken)

    def replace(self, **changes: object) -> Cascade:
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        from einscade.ir.text import print_cascade

        return print_cascade(self)
