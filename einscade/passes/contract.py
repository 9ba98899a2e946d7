"""Products as contractions: flatten nested sums of products, find the cheapest order, write it as Einsums.

Comes in: a statement `sum(r) x * y * ...` some of whose factors are sums of products themselves. Goes out: the flat
`Product` (factors, domain, reduced ranks) by distributivity, and from a product the statements that compute it, one
pair of factors after another, in the order that costs least. The cost of a step is the number of points it visits, a
polynomial in the extents; orders are compared at sizes given, or with every open extent large.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.ir import Access, Cascade, Einsum, Expr, Rank, Reduction, Tensor, Where, free_vars, var
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, inlined, wide
from einscade.passes.terms import factors

__all__ = ["LARGE", "Product", "Tree", "contract", "flatten", "order", "visits"]

LARGE = 1 << 16
"""What an extent that nobody gave counts as when two costs are compared."""

MOST_FACTORS = 8


@dataclass(frozen=True)
class Product:
    """`sum(reduced) prod(factors) if and(conditions)`, over the cascade's ranks; `ranks` are those of the result."""

    factors: tuple[Expr, ...]
    conditions: tuple[Boolean, ...]
    ranks: tuple[str, ...]
    reduced: tuple[str, ...]

    def variables(self, *exprs: Expr) -> frozenset[str]:
        """The ranks of the product that occur in these expressions."""
        return frozenset().union(*(free_vars(x) for x in exprs)) & frozenset((*self.ranks, *self.reduced))


def flatten(statement: Einsum, cascade: Cascade, rank: str) -> tuple[Product, Cascade]:
    """The statement as one product, with every factor over `rank` that is itself a product inlined, sums included.

    Gives the cascade too: a sum inlined twice gets ranks of its own. Raises NotApplicable where the statement is not
    a sum of products.
    """
    if statement.reduce is None or statement.reduce.monoid != "sum" or statement.scan is not None:
        raise NotApplicable(f"{statement.name} is not a sum")
    reduced, conditions = list(statement.reduce.ranks), list(And.make_args(statement.domain))
    done: list[Expr] = []
    todo = list(factors(statement.expr))
    while todo:
        factor = todo.pop(0)
        made = cascade.definitions.get(factor.tensor) if isinstance(factor, Access) else None
        if made is None or rank not in free_vars(factor) or not _is_product(made):
            done.append(factor)
            continue
        made, cascade = _apart(made, cascade, {*statement.ranks, *reduced})
        todo = [*factors(inlined(factor, made)), *todo]
        conditions += And.make_args(made.domain.xreplace(made.output.place(factor)))
        reduced += made.reduce.ranks if made.reduce else ()
    # What an inlined statement lacked for all reduced points at once was a sum over nothing, not a missing point.
    empty = [c for c in conditions if not free_vars(c) & set(reduced) and c not in And.make_args(statement.domain)]
    done += (Where(c, 1, 0) for c in empty if c != sympy.true)
    conditions = [c for c in dict.fromkeys(conditions) if c != sympy.true and c not in empty]
    product = Product(tuple(done), tuple(conditions), statement.output.ranks, tuple(reduced))
    unread = [r for r in reduced if r not in product.variables(*done)]
    if unread:
        raise NotApplicable(f"{statement.name} sums over {', '.join(unread)}, which no factor has")
    return product, cascade


def _is_product(statement: Einsum) -> bool:
    summed = statement.reduce is not None and statement.reduce.monoid == "sum"
    scaled = statement.reduce is None and isinstance(statement.expr, (sympy.Mul, Access))
    return statement.scan is None and (summed or scaled)


def _apart(statement: Einsum, cascade: Cascade, taken: set[str]) -> tuple[Einsum, Cascade]:
    """The statement with reduced ranks that nobody in `taken` has."""
    clash = [r for r in statement.reduce.ranks if r in taken] if statement.reduce else []
    for old in clash:
        new = cascade.fresh(old)
        cascade = cascade.replace(
            ranks=(*cascade.ranks, Rank(new, cascade.extent(old), cascade.rank_table[old].origin))
        )
        rename = {var(old): var(new)}
        assert statement.reduce is not None
        ranks = tuple(new if r == old else r for r in statement.reduce.ranks)
        statement = statement.replace(
            expr=statement.expr.xreplace(rename),
            domain=statement.domain.xreplace(rename),
            reduce=Reduction("sum", ranks),
        )
    return statement, cascade


def visits(statements: Iterable[Einsum], cascade: Cascade, sizes: Mapping[str, int]) -> Expr:
    """How many points the statements visit in all."""
    return sympy.Add(*(points(frozenset(s.ranks), cascade, sizes) for s in statements))


def points(ranks: frozenset[str], cascade: Cascade, sizes: Mapping[str, int]) -> Expr:
    """How many points a statement over these ranks visits; open extents count as `LARGE`."""
    extent = sympy.Mul(*(cascade.extent(r) for r in sorted(ranks)))
    return extent.xreplace({var(s): sympy.Integer(sizes.get(s, LARGE)) for s in free_vars(extent)})


@dataclass(frozen=True)
class Tree:
    """An order for the elements of a product: one of them (`index`), or two trees. `cost` in points visited."""

    cost: Expr
    index: int | None = None
    parts: tuple[Tree, ...] = ()


def order(product: Product, cascade: Cascade, sizes: Mapping[str, int]) -> Tree:
    """The cheapest order over all trees of pairwise contractions. Conditions are elements too: they mask a tensor."""
    elements = (*product.factors, *product.conditions)
    if len(elements) > MOST_FACTORS:
        raise NotApplicable(f"a product of {len(elements)} factors: orders are searched for at most {MOST_FACTORS}")

    @cache
    def best(group: frozenset[int]) -> Tree:
        if len(group) == 1:
            (index,) = group
            inside = product.variables(elements[index])
            return Tree(points(inside, cascade, sizes) if inside - _open(product, group) else sympy.Integer(0), index)
        first, *others = sorted(group)
        trees = []
        for chosen in (c for size in range(len(others)) for c in combinations(others, size)):
            left = frozenset((first, *chosen))
            right = group - left
            visited = points(_open(product, left) | _open(product, right), cascade, sizes)
            trees.append(Tree(best(left).cost + best(right).cost + visited, None, (best(left), best(right))))
        return min(trees, key=lambda tree: tree.cost)

    return best(frozenset(range(len(elements))))


def _open(product: Product, group: frozenset[int]) -> frozenset[str]:
    """The ranks of a group's result: those that the product's result or another element needs."""
    elements = (*product.factors, *product.conditions)
    inside = product.variables(*(elements[i] for i in group))
    if min(group) >= len(product.factors):
        return inside  # conditions alone: a predicate is not summed
    rest = product.variables(*(x for i, x in enumerate(elements) if i not in group))
    return inside & (frozenset(product.ranks) | rest)


def contract(
    product: Product, output: Tensor, cascade: Cascade, names: Names, sizes: Mapping[str, int] | None = None
) -> tuple[Einsum, ...]:
    """The statements that compute `output` (whose ranks are the product's) in the cheapest order."""
    elements = (*product.factors, *product.conditions)
    made: list[Einsum] = []

    def build(tree: Tree, target: Tensor | None) -> _Part:
        if tree.index is not None:
            alone = frozenset((tree.index,))
            is_factor = tree.index < len(product.factors)
            part = _Part(alone, elements[tree.index]) if is_factor else _Part(alone, conditions=(elements[tree.index],))
        else:
            part = build(tree.parts[0], None).times(build(tree.parts[1], None))
        variables = product.variables(part.expr, *part.conditions)
        kept = _open(product, part.group)
        closed = tuple(r for r in product.reduced if r in variables - kept)
        if target is None and not closed:
            return part
        if target is None:
            ranks = tuple(r for r in (*product.ranks, *product.reduced) if r in kept)
            target = Tensor(names(f"{output.name}part"), ranks, wide(output.dtype))
        # A condition masks as soon as its variables are there: what it excludes may not even be readable.
        early = (c for c in product.conditions if c not in part.applied and product.variables(c) <= variables)
        conditions = tuple(dict.fromkeys((*part.conditions, *early)))
        if closed or conditions or part.expr != made[-1].output():
            made.append(Einsum(target, part.expr, Reduction("sum", closed) if closed else None, And(*conditions)))
        else:
            made[-1] = made[-1].replace(output=target)
        return _Part(part.group, target(), (), part.applied | set(conditions))

    build(order(product, cascade, sizes or {}), output)
    return tuple(made)


@dataclass(frozen=True)
class _Part:
    """Elements of a product multiplied together: what they come to, conditions to apply, conditions that were."""

    group: frozenset[int]
    expr: Expr = sympy.S.One
    conditions: tuple[Boolean, ...] = ()
    applied: frozenset[Boolean] = frozenset()

    def times(self, other: _Part) -> _Part:
        applied = self.applied | other.applied
        conditions = tuple(c for c in (*self.conditions, *other.conditions) if c not in applied)
        return _Part(self.group | other.group, self.expr * other.expr, conditions, applied)
