"""Small steps on statements that several rewrites share: fresh names, redirected reads, order, dead code.

Everything here is a pure function of frozen data; nothing decides what to rewrite. Tools on expressions are in `terms`.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping, Sequence

import sympy

from einscade.ir import Access, Cascade, Einsum, Expr, Reduction, Tensor, accesses, var
from einscade.ir.expr import FUNCTIONS
from einscade.ir.verify import WORDS
from einscade.passes.terms import factors, split_factors

__all__ = [
    "RESERVED",
    "Names",
    "closure",
    "inlined",
    "instead",
    "merge_pointwise",
    "ordered",
    "redirect",
    "reduced_over",
    "release",
    "renamed",
    "wide",
    "without_unused",
]


RESERVED = frozenset({*WORDS, *FUNCTIONS, *keyword.kwlist})
"""What no rank and no tensor can be called."""


class Names:
    """Gives out names that no tensor, rank or symbol of a cascade has, each once."""

    def __init__(self, cascade: Cascade) -> None:
        self._cascade = cascade
        self._given: set[str] = set()

    def __call__(self, prefix: str) -> str:
        cascade = self._cascade
        taken = {*cascade.tensors, *cascade.rank_table, *cascade.symbols, *self._given, *RESERVED}
        name = prefix
        for number in range(1, len(taken) + 2):
            if name not in taken:
                break
            name = f"{prefix}{number}"
        self._given.add(name)
        return name


def redirect(statement: Einsum, read: Callable[[Access], Expr]) -> Einsum:
    """The statement with every access replaced by what `read` makes of it, in expression and domain."""
    table = {a: read(a) for a in accesses(statement.expr) + accesses(statement.domain)}
    table = {old: new for old, new in table.items() if old != new}
    return statement.replace(expr=statement.expr.xreplace(table), domain=statement.domain.xreplace(table))


def instead(access: Access, old: Tensor, new: Tensor) -> Access:
    """The access to `old` as one to `new`, which has the same ranks in an order of its own."""
    index = dict(zip(old.ranks, access.index, strict=True))
    return Access(new.name, *(index[r] for r in new.ranks))


def wide(dtype: str) -> str:
    """The dtype to keep a partial result of this dtype in."""
    return "f64" if dtype == "f64" else "f32"


def inlined(access: Access, definition: Einsum) -> Expr:
    """The value of a statement that does not reduce, at the index of an access to it."""
    return definition.expr.xreplace(definition.output.place(access))


def merge_pointwise(cascade: Cascade, name: str) -> Cascade:
    """The cascade with statement `name` inlined where it does not reduce and has one user that does not either."""
    made, users = cascade.definitions[name], tuple(cascade.users(name))
    plain = made.reduce is None and made.scan is None and made.domain == sympy.true and name not in cascade.outputs
    if not plain or len(users) != 1 or users[0].reduce is not None or users[0].scan is not None:
        return cascade
    user = redirect(users[0], lambda a: inlined(a, made) if a.tensor == name else a)
    return cascade.replace(body=tuple(user if s == users[0] else s for s in cascade.body if s != made))


def release(statement: Einsum, names: Names, cascade: Cascade) -> tuple[Einsum, ...]:
    """Let the factors that lack the reduced ranks out of a sum: `sum(e) s * y = s * sum(e) y`.

    Gives the sum of what stays (in i32 where all of it is integers of at most 8 bits) and the product with what left,
    or the statement alone where nothing can leave.
    """
    if statement.reduce is None or statement.reduce.monoid != "sum" or statement.scan is not None:
        return (statement,)
    leaving, staying = split_factors(statement.expr, statement.reduce.ranks)
    if 1 in (leaving, staying):
        return (statement,)
    narrow = all(
        isinstance(f, Access) and cascade.tensors[f.tensor].dtype in ("i4", "i8", "u8") for f in factors(staying)
    )
    output = statement.output
    inner = Tensor(names(f"{output.name.removesuffix('dot')}dot"), output.ranks, "i32" if narrow else output.dtype)
    return (
        statement.replace(output=inner, expr=staying),
        Einsum(output, leaving * inner()),
    )


def without_unused(cascade: Cascade) -> Cascade:
    """The cascade without the statements that no output depends on, and without ranks that nothing has."""
    needed, body = set(cascade.outputs), []
    for statement in reversed(cascade.body):
        if statement.name in needed:
            needed |= {a.tensor for a in statement.reads}
            body.append(statement)
    body.reverse()
    used = {r for t in cascade.inputs for r in t.ranks}
    used |= {r for s in body for r in (*s.output.ranks, *s.ranks)}
    return cascade.replace(ranks=tuple(r for r in cascade.ranks if r.name in used), body=tuple(body))


def renamed(statement: Einsum, names: Mapping[str, str]) -> Einsum:
    """The same statement with rank variables renamed, in its output, its reduction, expression and domain."""
    if not names:
        return statement
    sub = {var(a): var(b) for a, b in names.items()}
    output = statement.output
    reduce = statement.reduce
    return Einsum(
        Tensor(output.name, tuple(names.get(r, r) for r in output.ranks), output.dtype, output.layout),
        statement.expr.xreplace(sub),
        Reduction(reduce.monoid, tuple(names.get(r, r) for r in reduce.ranks), reduce.slot) if reduce else None,
        statement.domain.xreplace(sub),
        statement.scan,
    )


def ordered(statements: Sequence[Einsum], inputs: Iterable[str]) -> tuple[Einsum, ...]:
    """The statements so that each follows what it reads, otherwise as they came."""
    by_name = {s.name: s for s in statements}
    done: dict[str, Einsum] = {}
    known = set(inputs)

    def visit(statement: Einsum) -> None:
        if statement.name in done:
            return
        for access in statement.reads:
            if access.tensor in by_name and access.tensor != statement.name and access.tensor not in known:
                visit(by_name[access.tensor])
        done[statement.name] = statement

    for statement in statements:
        visit(statement)
    return tuple(done.values())


def closure(cascade: Cascade, names: Iterable[str]) -> frozenset[str]:
    """The names and everything they read, directly or not."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in cascade.definitions:
                todo += [a.tensor for a in cascade.definitions[name].reads]
    return frozenset(seen)


def reduced_over(cascade: Cascade) -> dict[str, frozenset[str]]:
    """For each tensor, the ranks that it, or anything it reads, reduces."""
    found: dict[str, frozenset[str]] = {t.name: frozenset() for t in cascade.inputs}
    for s in cascade.body:
        own = frozenset(s.reduce.ranks) if s.reduce else frozenset()
        found[s.name] = own.union(*(found.get(a.tensor, frozenset()) for a in s.reads))
    return found
