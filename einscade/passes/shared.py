"""What several statements compute gets a statement; constants and conditions move to where they cost least.

Comes in: a cascade of reductions with everything pointwise written out. Goes out: the same with shared scores and
weights as statements of their own, constants inside the contractions they scale, and each condition on the innermost
statement that all of its readers agree on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Cascade, Einsum, Expr, Tensor, accesses
from einscade.passes.normalise import normal
from einscade.passes.statements import Names, instead, redirect, reduced_over, wide
from einscade.passes.terms import conjoin, conjuncts, depends, reads_outside_where, split_factors, variables

__all__ = ["aliases_merged", "constants_folded", "domains_sunk", "factors_out", "guarded", "shared"]


def factors_out(cascade: Cascade) -> Cascade:
    """Factors that lack the summed ranks leave contractions of inputs: a scale on q, on k, or on q·k is one on q·k.
    (A factor that waits for a reduction over the same rank is left for `defer`, which shows what it saves.)"""
    over = reduced_over(cascade)
    names = Names(cascade)
    body: list[Einsum] = []
    left: dict[str, Expr] = {}
    for s in cascade.body:
        calls = {}
        for a in accesses(s.expr):
            if a.tensor in left:
                calls[a] = left[a.tensor].xreplace(cascade.tensors[a.tensor].place(a)) * a
        if calls:
            s = s.replace(expr=normal(s.expr.xreplace(calls)))
        if s.reduce is None or s.reduce.monoid != "sum" or s.scan is not None or isinstance(s.expr, sympy.Add):
            body.append(s)
            continue
        reduced = set(s.reduce.ranks)
        free, bound = split_factors(s.expr, s.reduce.ranks)
        waiting = [f for f in sympy.Mul.make_args(free) if any(over[a.tensor] & reduced for a in accesses(f))]
        leaving = sympy.Mul(*(f for f in sympy.Mul.make_args(free) if f not in waiting))
        if leaving == 1 or bound == 1:
            body.append(s)
            continue
        inner = s.replace(expr=bound * sympy.Mul(*waiting))
        if s.name in cascade.outputs:
            inner = inner.replace(output=Tensor(names(f"{s.name}c"), s.output.ranks, wide(s.output.dtype)))
            body += [inner, Einsum(s.output, leaving * inner.output())]
        else:
            left[s.name] = leaving
            body.append(inner)
    return cascade.replace(body=tuple(body))


def shared(cascade: Cascade) -> Cascade:
    """Statements for the exponents under a sum (scores) and for whatever else more than one reduction computes."""
    names = Names(cascade)
    cascade = _rows(_scores(cascade, names), names)
    while (found := _repeated(cascade)) is not None:
        expr, users = found
        first = next(s for s in cascade.body if s.name in users)
        ranks = tuple(r for r in first.ranks if depends(expr, (r,)))
        cascade = _extracted(cascade, expr, users, Tensor(names("W"), ranks, wide(first.output.dtype)), first)
    return cascade


def _scores(cascade: Cascade, names: Names) -> Cascade:
    """What a maximum reduces and exponentials shift is one statement, even where it is a single access scaled."""
    for s in cascade.body:
        if s.reduce is None or s.reduce.monoid != "max" or isinstance(s.expr, Access):
            continue
        users = []
        for t in cascade.body:
            same = t.reduce is None or t.reduce.ranks == s.reduce.ranks
            if same and t.scan is None and _contains_terms(t.expr, s.expr):
                users.append(t.name)
        if len(users) > 1:
            ranks = tuple(r for r in s.ranks if depends(s.expr, (r,)))
            cascade = _extracted(cascade, s.expr, users, Tensor(names("T"), ranks, wide(s.output.dtype)), s)
    return cascade


def _rows(cascade: Cascade, names: Names) -> Cascade:
    """What a reduction computes of other reductions without its rank, inside a function of that rank (a mean, in
    (x - mean)**2), is a statement of the row."""
    body: list[Einsum] = []
    made: dict[Expr, Tensor] = {}

    def replaced(expr: Expr, s: Einsum) -> Expr:
        assert s.reduce is not None
        if isinstance(expr, Access) or not expr.args or not depends(expr, s.reduce.ranks):
            return expr
        free = [
            a for a in expr.args if not depends(a, s.reduce.ranks) and not a.is_number and isinstance(a, sympy.Expr)
        ]
        own = expr.func(*free) if isinstance(expr, (sympy.Add, sympy.Max, sympy.Min)) and free else None
        moving = own is not None and any(a.tensor in cascade.definitions for a in accesses(own))
        if own is None or not moving or isinstance(own.as_coeff_Mul()[1], Access):
            return expr.func(*(replaced(a, s) for a in expr.args))
        number, own = own.as_coeff_Mul()
        if own not in made:
            ranks = tuple(r for r in s.output.ranks if depends(own, (r,)))
            made[own] = Tensor(names("T"), ranks, wide(s.output.dtype))
            body.append(Einsum(made[own], own))
        rest = [replaced(a, s) for a in expr.args if a not in free]
        return expr.func(number * made[own](), *rest)

    for s in cascade.body:
        if s.reduce is not None and s.scan is None and s.output.dtype != "bool":
            s = s.replace(expr=sympy.Mul(*(replaced(f, s) for f in sympy.Mul.make_args(s.expr))))
        body.append(s)
    return cascade.replace(body=tuple(body))


def _contains_terms(expr: Expr, part: Expr) -> bool:
    return expr == part or any(_covers(a, part) for a in expr.atoms(sympy.Add)) or expr.has(part)


def _covers(total: Expr, part: Expr) -> bool:
    return set(sympy.Add.make_args(part)) <= set(total.args)


def _extracted(cascade: Cascade, expr: Expr, users: list[str], output: Tensor, first: Einsum) -> Cascade:
    """The expression as a statement before its first user, with the conditions that all users have in common (which
    they keep until `domains_sunk` sees that they read it)."""
    access = output()
    common = [c for c in conjuncts(first.domain) if variables(c) <= {*output.ranks, *cascade.symbols}]
    for name in users:
        user = cascade.definitions[name]
        reduced = user.reduce.ranks if user.reduce else ()
        common = [c for c in common if c in conjuncts(user.domain) and (user.reduce is None or depends(c, reduced))]
    body: list[Einsum] = []
    for s in cascade.body:
        if s.name == first.name:
            body.append(Einsum(output, expr, domain=conjoin(common)))
        if s.name in users:
            s = s.replace(expr=_replaced(s.expr, expr, access))
        body.append(s)
    return cascade.replace(body=tuple(body))


def _replaced(expr: Expr, part: Expr, by: Expr) -> Expr:
    values: dict[Expr, Expr] = {part: by}
    for total in expr.atoms(sympy.Add):
        if isinstance(part, sympy.Add) and total != part and _covers(total, part):
            rest = [t for t in total.args if t not in part.args]
            values[total] = sympy.Add(by, *rest)
    return expr.xreplace(values)


def _repeated(cascade: Cascade) -> tuple[Expr, list[str]] | None:
    """The largest expression along a reduced rank that two statements both compute."""
    users: dict[Expr, list[str]] = {}
    reduced = {r for s in cascade.body if s.reduce for r in s.reduce.ranks}
    for s in cascade.body:
        if s.scan is not None:
            continue
        seen = {
            node
            for node in _values(s.expr)
            if any(a.tensor in cascade.definitions for a in accesses(node)) and depends(node, reduced)
        }
        for node in seen:
            users.setdefault(node, []).append(s.name)
    many = [(e, u) for e, u in users.items() if len(u) > 1 and _worth(e)]
    many = [(e, u) for e, u in many if any(cascade.definitions[n].reduce for n in u)]
    if not many:
        return None
    return max(many, key=lambda pair: (sympy.count_ops(pair[0]), sympy.default_sort_key(pair[0])))


def _values(expr: Expr) -> Iterator[Expr]:
    """The real-valued parts of an expression that are no accesses: not indices, not conditions."""
    if isinstance(expr, Access | Boolean) or not expr.args:
        return
    yield expr
    for a in expr.args:
        yield from _values(a)


def _worth(expr: Expr) -> bool:
    """More than a constant times an access, or a power of it."""
    rest = expr.as_coeff_Mul()[1]
    return not isinstance(rest, Access) and not (isinstance(rest, sympy.Pow) and isinstance(rest.base, Access))


def constants_folded(cascade: Cascade) -> Cascade:
    """A constant that every reader multiplies a contraction by goes into the contraction."""
    reduced = {r for s in cascade.body if s.reduce for r in s.reduce.ranks}
    for s in reversed(cascade.body):
        if s.reduce is None or s.reduce.monoid != "sum" or s.name in cascade.outputs or s.scan is not None:
            continue
        if s.output.dtype[0] in "iu":
            continue  # a sum of integers stays one
        # A sum divided by its length stays so: online divides by the length so far.
        ranks = {*cascade.rank_table, *(() if reduced & set(s.output.ranks) else cascade.symbols)}
        coefficients: set[Expr] = set()
        for user in cascade.users(s.name):
            coefficients |= _coefficients(user.expr, s.name, ranks)
            if any(a.tensor == s.name for a in accesses(user.domain)):
                coefficients.add(sympy.Integer(1))
        if len(coefficients) == 1 and (c := sympy.Abs(coefficients.pop())) not in (0, 1):
            body = tuple(
                t.replace(expr=c * t.expr) if t.name == s.name else t.replace(expr=_divided(t.expr, s.name, c, ranks))
                for t in cascade.body
            )
            cascade = cascade.replace(body=body)
    return cascade


def _coefficients(expr: Expr, name: str, ranks: Collection[str]) -> set[Expr]:
    """The constants that accesses to a tensor are multiplied by, wherever they occur."""
    if isinstance(expr, Access):
        found: set[Expr] = {sympy.Integer(1)} if expr.tensor == name else set()
        return found.union(*(_coefficients(i, name, ranks) for i in expr.index))
    if isinstance(expr, sympy.Mul) and any(isinstance(f, Access) and f.tensor == name for f in expr.args):
        own = sympy.Mul(*(f for f in expr.args if _is_scalar(f, ranks)))
        return {own}.union(
            *(_coefficients(f, name, ranks) for f in expr.args if not (isinstance(f, Access) and f.tensor == name))
        )
    return set().union(*(_coefficients(a, name, ranks) for a in expr.args)) if expr.args else set()


def _is_scalar(factor: Expr, ranks: Collection[str]) -> bool:
    """Whether the factor is the same at every point: a number, or what extents make (1/sqrt(E))."""
    return not factor.has(Access) and not depends(factor, ranks)


def _divided(expr: Expr, name: str, c: Expr, ranks: Collection[str]) -> Expr:
    if not expr.args or isinstance(expr, Access):
        return expr
    if isinstance(expr, sympy.Mul) and any(isinstance(f, Access) and f.tensor == name for f in expr.args):
        scalar = sympy.Mul(*(f for f in expr.args if _is_scalar(f, ranks)))
        rest = (_divided(f, name, c, ranks) for f in expr.args if not _is_scalar(f, ranks))
        return normal(scalar / c) * sympy.Mul(*rest)
    args = tuple(_divided(a, name, c, ranks) for a in expr.args)
    return expr if args == expr.args else expr.func(*args)


def aliases_merged(cascade: Cascade) -> Cascade:
    """A statement that only reads another at its own ranks is that other one, if it has no conditions or is the only
    reader."""
    return _sole_readers_merged(_plain_aliases_merged(cascade))


def _plain_aliases_merged(cascade: Cascade) -> Cascade:
    """Aliases without conditions go: what read them reads what they are of."""
    for s in cascade.body:
        made = cascade.definitions.get(s.expr.tensor) if isinstance(s.expr, Access) else None
        plain = s.reduce is None and s.scan is None and s.domain == sympy.true and s.name not in cascade.outputs
        if made is not None and plain and s.expr == made.output() and made.scan is None:
            body = [_rereading(t, s.output, made.output) for t in cascade.body if t.name != s.name]
            cascade = cascade.replace(body=tuple(body))
    return cascade


def _sole_readers_merged(cascade: Cascade) -> Cascade:
    """What an alias alone reads is made under the alias' name, and under its conditions too."""
    readers = Counter(a.tensor for s in cascade.body for a in s.reads)
    body = list(cascade.body)
    for s in cascade.body:
        if s.reduce is not None or s.scan is not None or not isinstance(s.expr, Access):
            continue
        made = next((t for t in body if t.name == s.expr.tensor), None)
        if made is None or made.name in cascade.outputs or readers[made.name] != 1:
            continue
        if any(a.tensor in cascade.definitions for a in accesses(s.domain)):
            continue
        if s.expr != made.output() or set(s.output.ranks) != set(made.output.ranks) or made.scan is not None:
            continue
        body.remove(made)
        merged = made.replace(output=s.output, domain=conjoin([*conjuncts(made.domain), *conjuncts(s.domain)]))
        body[body.index(s)] = merged
    return cascade.replace(body=tuple(body))


def guarded(cascade: Cascade) -> Cascade:
    """A quotient of two sums over the same points is 0 where there are none, whatever a program made of 0 / 0."""
    body = []
    for s in cascade.body:
        if s.reduce is None and s.scan is None:
            numerators = [f for f in sympy.Mul.make_args(s.expr) if isinstance(f, Access)]
            denominators = [1 / f for f in sympy.Mul.make_args(s.expr) if f.is_Pow and isinstance(1 / f, Access)]
            for d in denominators:
                ranks = _summed_weights(d, cascade)
                if ranks and any(_summed_over(n, cascade) == ranks for n in numerators):
                    s = s.replace(domain=conjoin([*conjuncts(s.domain), sympy.Ne(d, 0)]))
        body.append(s)
    return cascade.replace(body=tuple(body))


def _summed_over(access: Access, cascade: Cascade) -> tuple[str, ...] | None:
    made = cascade.definitions.get(access.tensor)
    return made.reduce.ranks if made is not None and made.reduce is not None and made.reduce.monoid == "sum" else None


def _summed_weights(access: Access, cascade: Cascade) -> tuple[str, ...] | None:
    """The ranks over which the tensor sums exponentials, and nothing else: 0 only where it sums nothing."""
    made = cascade.definitions.get(access.tensor)
    if made is None or made.reduce is None or made.reduce.monoid != "sum":
        return None
    weight = made.expr
    if isinstance(weight, Access) and weight.tensor in cascade.definitions:
        weight = cascade.definitions[weight.tensor].expr
    return made.reduce.ranks if isinstance(weight, sympy.exp) else None


def _rereading(s: Einsum, old: Tensor, new: Tensor) -> Einsum:
    return redirect(s, lambda a: instead(a, old, new) if a.tensor == old.name else a)


def domains_sunk(cascade: Cascade) -> Cascade:
    """A condition that every reader of a statement has, moved to the statement: outside it, nothing is computed."""
    for name in [s.name for s in reversed(cascade.body)]:
        s = cascade.definitions[name]
        if name in cascade.outputs or s.scan is not None:
            continue
        common: list[Boolean] | None = None
        for user in cascade.users(name):
            plain = all(a == s.output() for a in user.reads if a.tensor == name)
            read = any(a.tensor == name for a in reads_outside_where(user.expr))
            own = [
                c
                for c in conjuncts(user.domain)
                if variables(c) <= {*s.output.ranks, *cascade.symbols}
                and not any(a.tensor in cascade.definitions for a in accesses(c))
                and _passes_on(c, s.output(), user)
            ]
            mine = own if plain and read else []
            common = mine if common is None else [c for c in common if c in mine]
        if common:
            moved = s.replace(domain=conjoin([*conjuncts(s.domain), *common]))
            cascade = cascade.replace(body=tuple(moved if t.name == name else t for t in cascade.body))
    body = tuple(
        s.replace(domain=conjoin(c for c in conjuncts(s.domain) if not _implied(c, s, cascade))) for s in cascade.body
    )
    return cascade.replace(body=body)


def _passes_on(condition: Boolean, access: Access, user: Einsum) -> bool:
    """Whether points of the user without the condition are missing when the points read are. A read inside a reduction
    of the user's own would only say what it reduces."""
    inner = user.reduce.ranks if user.reduce else ()
    return depends(condition, inner) or not depends(access, inner)


def _implied(condition: Boolean, s: Einsum, cascade: Cascade) -> bool:
    """Whether a tensor that the statement reads at its own ranks is missing where the condition fails."""
    for a in reads_outside_where(s.expr):
        made = cascade.definitions.get(a.tensor)
        if made is None or a != made.output() or made.name == s.name or not _passes_on(condition, a, s):
            continue
        if made.reduce is not None and depends(condition, made.reduce.ranks):
            continue  # says what it reduces, not where it exists
        if condition in conjuncts(made.domain) or _implied(condition, made, cascade):
            return True
    return False
