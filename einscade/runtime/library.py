"""Which cascades torch's `scaled_dot_product_attention` computes: found by structure.

Comes in: a raised (or canonical) cascade. Goes out: an `Attention`, from which `library_call` writes the call, or
`NotInLibrary` with the reason.

What is recognised, after pointwise statements are inlined, whatever its names and whichever way it was split up:

    O = sum(m) exp(S - max(m) S) * V / sum(m) exp(S - max(m) S)      S = c * sum(e) Q * K + bias   on a domain

The maximum may be missing, the division may come before or after the sum. Batch ranks are those that keys or values
share with queries; a key head may serve a group of query heads. The domain `m <= p + offset` becomes `is_causal` where
the offset is 0 when it runs (torch aligns causal masks at the top left); other domains and biases become a mask tensor.
Rows without keys are 0 in the library as in a cascade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Access, Expr, FloorDiv, free_vars, var
from einscade.passes.terms import LONGEST, size

__all__ = ["Attention", "NotInLibrary", "View", "recognise"]


class NotInLibrary(Exception):
    """The library has no call that computes this cascade; the message says which part it lacks."""


@dataclass(frozen=True)
class Attention:
    """`query`, `key`, `value` are the accesses at ranks `batch`, `p`, `m`, `e`, `f`; `group` query heads (the last
    batch rank) share a key head. `scale` and `bias` make scores of the contraction; `domain` is a set of conjuncts.
    A row's weights are divided by `normaliser`, after `maximum`, where there is one, left their exponents."""

    query: Access
    key: Access
    value: Access
    batch: tuple[str, ...]
    p: str
    m: str
    e: str
    f: str
    group: int
    scale: Expr
    bias: tuple[Expr, ...]
    domain: frozenset[Boolean]
    normaliser: Access
    maximum: Access | None


@dataclass(frozen=True)
class _Read:
    """An expression with pointwise statements inlined, and the conjuncts under which it exists."""

    expr: Expr
    domain: frozenset[Boolean]


def recognise(cascade: Cascade) -> Attention:
    """What the cascade computes as an attention call. Raises NotInLibrary."""
    if len(cascade.outputs) != 1:
        raise NotInLibrary(f"{len(cascade.outputs)} outputs")
    if any(e.scan for e in cascade.body):
        raise NotInLibrary("a scan")
    if any(t.layout.kind != "dense" for t in cascade.inputs):
        raise NotInLibrary("an input that is not dense")
    return _Recogniser(cascade).attention()


class _Recogniser:
    def __init__(self, cascade: Cascade) -> None:
        self.cascade = cascade
        self.inputs = {t.name for t in cascade.inputs}

    def attention(self) -> Attention:
        if self.cascade.outputs[0] not in self.cascade.definitions:
            raise NotInLibrary("an output that is an input")
        out = self.cascade.definitions[self.cascade.outputs[0]]
        outer = _Read(out.output(), frozenset()) if out.reduce else self.inline(out.expr, out.domain)
        numerator, normalisers = self.quotient(outer.expr)
        if self.guards(outer.domain, normalisers):
            raise NotInLibrary("a domain on the output")
        weighted = self.reduction(numerator, "sum")
        m = self.only(weighted.reduce.ranks if weighted.reduce else ())
        inner = self.inline(weighted.expr, weighted.domain)
        weights, values, more = self.weights(inner.expr)
        normalisers = normalisers + more
        if len(normalisers) != 1:
            raise NotInLibrary(f"{len(normalisers)} normalisers")
        scores, shift = self.without_maximum(weights.args[0], m)
        domain = self.guards(inner.domain, normalisers)
        self.check_normaliser(normalisers[0], weights, m, domain)
        if shift is not None:
            self.check_maximum(shift, scores, m, domain)
        return self.shape_of(scores, values, m, domain, out, normalisers[0], shift)

    def inline(self, expr: Expr | Boolean, domain: Boolean = sympy.true) -> _Read:
        """Pointwise statements replaced by what they compute, down to inputs and reductions."""
        conjuncts = set(And.make_args(domain)) - {sympy.true}
        for _ in range(len(self.cascade.body) + 1):
            found = [a for a in expr.atoms(Access) if self.is_pointwise(a.tensor)]
            if not found:
                break
            table = {}
            for access in found:
                made = self.cascade.definitions[access.tensor]
                binding = made.output.place(access)
                table[access] = made.expr.xreplace(binding)
                conjuncts |= {c.xreplace(binding) for c in And.make_args(made.domain)} - {sympy.true}
            expr = expr.xreplace(table)
            if size(expr) > LONGEST:
                raise NotInLibrary(f"more than {LONGEST} operations on one score or result")
        for access in expr.atoms(Access):
            definition = self.cascade.definitions.get(access.tensor)
            if definition is not None and definition.reduce is not None:  # a row of a reduction exists by its own part
                kept = {c for c in And.make_args(definition.domain) if not free_vars(c) & set(definition.reduce.ranks)}
                conjuncts |= {c.xreplace(definition.output.place(access)) for c in kept} - {sympy.true}
        flat: set[Boolean] = set()
        for c in conjuncts:
            flat |= set(And.make_args(c))
        return _Read(expr, frozenset(flat))

    def is_pointwise(self, name: str) -> bool:
        definition = self.cascade.definitions.get(name)
        return definition is not None and definition.reduce is None and definition.scan is None

    def reduction(self, access: Expr, monoid: str) -> Einsum:
        definition = self.cascade.definitions.get(access.tensor) if isinstance(access, Access) else None
        if definition is None or definition.reduce is None or definition.reduce.monoid != monoid:
            raise NotInLibrary(f"no {monoid} where one belongs")
        return definition

    @staticmethod
    def only(ranks: Sequence[str]) -> str:
        if len(ranks) != 1:
            raise NotInLibrary(f"a reduction over {len(ranks)} ranks")
        return ranks[0]

    def quotient(self, expr: Expr) -> tuple[Expr, list[Access]]:
        """`N / Z` as its numerator and its divisors."""
        divisors = [f.base for f in sympy.Mul.make_args(expr) if f.is_Pow and f.exp == -1]
        rest = [f for f in sympy.Mul.make_args(expr) if not (f.is_Pow and f.exp == -1)]
        if len(rest) != 1 or not all(isinstance(d, Access) for d in divisors):
            raise NotInLibrary("an output that is not a weighted mean")
        return rest[0], divisors

    def guards(self, domain: frozenset[Boolean], normalisers: Sequence[Access]) -> frozenset[Boolean]:
        """The conjuncts that are more than `Z != 0`."""
        guard = {sympy.Ne(z, 0) for z in normalisers}
        return frozenset(c for c in domain if c not in guard)

    def weights(self, expr: Expr) -> tuple[Expr, Access, list[Access]]:
        """`exp(...) * V[...] / Z[...]` as its parts."""
        exponentials, values, divisors = [], [], []
        for factor in sympy.Mul.make_args(expr):
            if isinstance(factor, sympy.exp):
                exponentials.append(factor)
            elif isinstance(factor, Access) and factor.tensor in self.inputs:
                values.append(factor)
            elif factor.is_Pow and factor.exp == -1 and isinstance(factor.base, Access):
                divisors.append(factor.base)
            else:
                raise NotInLibrary(f"a factor {type(factor).__name__} beside the weights")
        if len(exponentials) != 1 or len(values) != 1:
            raise NotInLibrary("weights that are not one exponential times one value")
        return exponentials[0], values[0], divisors

    def without_maximum(self, exponent: Expr, m: str) -> tuple[Expr, Access | None]:
        """`S - G` as S and G, where G is a maximum over `m`."""
        for term in sympy.Add.make_args(exponent):
            access = -term
            if isinstance(access, Access):
                definition = self.cascade.definitions.get(access.tensor)
                if definition is not None and definition.reduce is not None and definition.reduce.monoid == "max":
                    return exponent - term, access
        return exponent, None

    def check_normaliser(self, z: Access, weights: Expr, m: str, domain: frozenset[Boolean]) -> None:
        total = self.reduction(z, "sum")
        read = self.inline(total.expr, total.domain)
        rename = self.renaming(total, z, m)
        if read.expr.xreplace(rename) != weights:
            raise NotInLibrary("a normaliser that is not the sum of the weights")
        if {c.xreplace(rename) for c in read.domain} != domain:
            raise NotInLibrary("a normaliser over another domain")

    def check_maximum(self, g: Access, scores: Expr, m: str, domain: frozenset[Boolean]) -> None:
        """A maximum over any points at all cancels; it is compared to be sure that no row is without one."""
        top = self.reduction(g, "max")
        read = self.inline(top.expr, top.domain)
        rename = self.renaming(top, g, m)
        if read.expr.xreplace(rename) != scores or {c.xreplace(rename) for c in read.domain} != domain:
            raise NotInLibrary("a maximum of something else than the scores")

    def renaming(self, statement: Einsum, at: Access, m: str) -> dict[Expr, Expr]:
        own = self.only(statement.reduce.ranks if statement.reduce else ())
        return {**statement.output.place(at), var(own): var(m)}

    def shape_of(
        self,
        scores: Expr,
        value: Access,
        m: str,
        domain: frozenset[Boolean],
        out: Einsum,
        normaliser: Access,
        maximum: Access | None,
    ) -> Attention:
        terms = sympy.Add.make_args(scores)
        contracted = [t for t in terms if any(self.is_contraction(a) for a in t.atoms(Access))]
        if len(contracted) != 1:
            raise NotInLibrary("scores that are not one contraction and a bias")
        bias = tuple(t for t in terms if t is not contracted[0])
        scale, contraction = self.scaled(contracted[0])
        definition = self.reduction(contraction, "sum")
        e = self.only(definition.reduce.ranks if definition.reduce else ())
        product = self.inline(definition.expr, definition.domain)
        binding = definition.output.place(contraction)
        if any(e in free_vars(c) for c in product.domain):
            raise NotInLibrary("a domain over the contracted rank")
        domain = domain | {c.xreplace(binding) for c in product.domain}
        factors = sympy.Mul.make_args(product.expr.xreplace(binding))
        operands = [f for f in factors if isinstance(f, Access)]
        scale = scale * sympy.Mul(*(f for f in factors if not isinstance(f, Access)))
        if len(operands) != 2 or scale.has(Access) or free_vars(scale) & set(self.cascade.rank_table):
            raise NotInLibrary("scores that are not queries times keys times a constant")
        key = next((a for a in operands if m in free_vars(a)), None)
        if key is None:
            raise NotInLibrary("keys that do not depend on the reduced rank")
        query = operands[1] if operands[0] is key else operands[0]
        if m in free_vars(query):
            raise NotInLibrary("queries that depend on the reduced rank")
        f = self.only([r for r in out.output.ranks if r not in free_vars(query) | free_vars(key)])
        batch, p = self.split_ranks([r for r in out.output.ranks if r != f], query, key, value, domain, m)
        group = self.group(key, value, batch, p, m, e, f)
        self.view(query, (*batch, p, e))
        for term in (*bias, *domain):
            unknown = free_vars(term) - {*batch, p, m} - set(self.cascade.symbols)
            if unknown or any(a.tensor not in self.inputs for a in term.atoms(Access)):
                raise NotInLibrary("a bias or domain beyond query and key positions")
        return Attention(query, key, value, batch, p, m, e, f, group, scale, bias, domain, normaliser, maximum)

    def is_contraction(self, access: Access) -> bool:
        definition = self.cascade.definitions.get(access.tensor)
        return definition is not None and definition.reduce is not None

    def scaled(self, term: Expr) -> tuple[Expr, Access]:
        factors = sympy.Mul.make_args(term)
        contractions = [f for f in factors if isinstance(f, Access) and self.is_contraction(f)]
        if len(contractions) != 1:
            raise NotInLibrary("scores that are not linear in one contraction")
        return sympy.Mul(*(f for f in factors if f is not contractions[0])), contractions[0]

    def split_ranks(
        self, ranks: list[str], query: Access, key: Access, value: Access, domain: frozenset[Boolean], m: str
    ) -> tuple[tuple[str, ...], str]:
        """Batch ranks, and the one that query positions run along."""
        own = [r for r in ranks if r not in free_vars(key) | free_vars(value)]
        if not own:
            raise NotInLibrary("no rank of queries alone")
        with_m = [r for r in own if any({r, m} <= free_vars(c) for c in domain)]
        p = (with_m or own)[-1]
        return tuple(r for r in ranks if r != p), p

    def group(self, key: Access, value: Access, batch: tuple[str, ...], p: str, m: str, e: str, f: str) -> int:
        """Query heads per key head; 1 without groups. Keys and values must be shared alike."""
        groups = set()
        for access, last in ((key, e), (value, f)):
            shared = {a for i in access.index for a in i.atoms(FloorDiv)}
            if any(not batch or a.args[0] != var(batch[-1]) or not a.args[1].is_Integer for a in shared):
                raise NotInLibrary("an index that is not a group of query heads")
            if len(shared) > 1:
                raise NotInLibrary("heads shared in two ways")
            groups.add(int(next(iter(shared)).args[1]) if shared else 1)
            self.view(access, (*batch, m, last))
        if len(groups) != 1:
            raise NotInLibrary("keys and values shared by different numbers of query heads")
        return groups.pop()

    @staticmethod
    def view(access: Access, ranks: Sequence[str]) -> None:
        """Checks that the access is a strided view over (some of) the ranks, the last of them among them."""
        steps = View.of(access)
        if not set(steps.ranks) <= set(ranks):
            raise NotInLibrary(f"{access.tensor} is read along a rank of its own")
        if ranks[-1] not in steps.ranks or ranks[-2] not in steps.ranks:
            raise NotInLibrary(f"{access.tensor} is read without rank {ranks[-1]} or {ranks[-2]}")


@dataclass(frozen=True)
class View:
    """An access as a strided view: `steps[rank]` are (dimension, coefficient) pairs, `start` (dimension, offset) ones.
    A rank that is divided (`h // 4`) counts with its quotient."""

    steps: tuple[tuple[str, tuple[tuple[int, Expr], ...]], ...]
    start: tuple[tuple[int, Expr], ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(r for r, _ in self.steps)

    @property
    def is_plain(self) -> bool:
        """Whether every dimension is one rank, so that the view is a permutation."""
        dims = [d for _, s in self.steps for d, c in s if c == 1]
        return (
            not self.start
            and all(len(s) == 1 for _, s in self.steps)
            and len(dims) == len(self.steps) == len(set(dims))
        )

    @staticmethod
    def of(access: Access) -> View:
        """Raises NotInLibrary where an index is not affine in ranks."""
        steps: dict[str, list[tuple[int, Expr]]] = {}
        start = []
        for d, index in enumerate(access.index):
            for term in sympy.Add.make_args(sympy.expand(index)):
                coefficient, factor = term.as_independent(*term.atoms(sympy.Symbol, FloorDiv), as_Add=False)
                if term.is_Integer:
                    if term != 0:
                        start.append((d, term))
                    continue
                base = factor.args[0] if isinstance(factor, FloorDiv) else factor
                if not base.is_Symbol or not coefficient.is_Integer:
                    raise NotInLibrary(f"{access.tensor} is read at an index that is not a view")
                steps.setdefault(base.name, []).append((d, coefficient))
        return View(tuple((r, tuple(s)) for r, s in steps.items()), tuple(start))
