"""Pointwise statements written out where they are read, one name for one thing, one statement for one value.

Comes in: a cascade of any granularity. Goes out: one whose statements are reductions (and outputs), whose ranks agree
between a statement and its readers wherever they can, and in which nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import DENSE, Access, Cascade, Einsum, Expr, FloorDiv, Mod, Rank, Tensor, Where, accesses, var
from einscade.ir.intervals import rank_ranges, simplify
from einscade.passes.existence import deciding, existence, lost, narrowed
from einscade.passes.fusion import is_long
from einscade.passes.normalise import normal, predicate
from einscade.passes.statements import Names, instead, renamed, without_unused
from einscade.passes.terms import LONGEST, conjuncts, depends, reads_outside_where, size, variables

__all__ = ["aligned", "deduplicated", "inlined", "shaped", "specialised"]

# A tensor read at more distinct places than this is computed whole rather than once per place.
PLACES = 4


def inlined(cascade: Cascade) -> Cascade:
    """Pointwise statements disappear into their readers, their domains with them; expressions take normal form."""
    written: dict[str, Einsum] = {}
    body = []
    for s in cascade.body:
        s = _written_out(s, written, cascade)
        if s.reduce is None and s.scan is None and _may_inline(s, cascade):
            written[s.name] = s
        body.append(s)  # whoever reads it under a condition may not have written it out
    return without_unused(cascade.replace(body=tuple(body)))


def _written_out(s: Einsum, written: Mapping[str, Einsum], cascade: Cascade) -> Einsum:
    reduced = s.reduce.ranks if s.reduce else ()
    everywhere = reads_outside_where(s.expr)
    whole = frozenset().union(*map(reads_outside_where, deciding(s.expr, reduced)))
    own: list[Boolean] = list(conjuncts(s.domain))
    inner: list[Boolean] = []  # what points need, and the result does not

    def value(a: Access, needs: list[Boolean]) -> Expr | None:
        made = written.get(a.tensor)
        if made is None or (made.domain != sympy.true and a not in everywhere):
            return None
        index = tuple(_replaced(i, lambda x: value(x, needs)) for i in a.index)
        place = made.output.place(a.at(*index))
        needs.extend(c.xreplace(place) for c in conjuncts(made.domain))
        return made.expr.xreplace(place)

    found = {a: value(a, own if a in whole else inner) for a in accesses(s.expr)}
    values = {a: v for a, v in found.items() if v is not None}
    longer = s.expr.xreplace(values)
    if values and size(longer) > max(LONGEST, size(s.expr)):
        return _written_out(s, {}, cascade)
    expr = normal(_put_together(longer, cascade) if values else longer)
    inner += _cancelled(s.expr, values)
    asked = [(c, inner if depends(c, reduced) else own) for c in conjuncts(s.domain)]
    for reads, needs in ((whole, own), (everywhere - whole, inner)):
        read = frozenset().union(*(reads_outside_where(a.xreplace(values)) for a in reads))
        kept = lost((_put_together(a, cascade) for a in read) if values else read, expr, cascade)
        needs += kept
        asked += [(c, needs) for c in kept]
    in_domain = {}
    for c, needs in asked:
        for a in accesses(c):
            if (made := written.get(a.tensor)) is not None:
                place = made.output.place(a)
                in_domain[a] = made.expr.xreplace(place)
                needs.extend(x.xreplace(place) for x in conjuncts(made.domain))
    own, inner = ([p for c in said for p in conjuncts(predicate(c.xreplace(in_domain)))] for said in (own, inner))
    there = existence(cascade)
    inner += (c for x in deciding(expr, reduced) if reduced for c in conjuncts(there.of(x)))
    return narrowed(s.replace(expr=expr, domain=sympy.true), own, inner, there.results[s.name])


def _put_together(expr: Expr, cascade: Cascade) -> Expr:
    """The expression with indices `b * (x // b) + x % b`, which what is written out takes apart, as x."""
    table = {}
    for a in accesses(expr):
        apart = [i for i in a.index if isinstance(i, sympy.Add) and i.has(Mod) and i.has(FloorDiv)]
        if apart:
            ranges = rank_ranges(cascade)
            table[a] = a.at(*(simplify(i, ranges) if i in apart else i for i in a.index))
    return expr.xreplace(table) if table else expr


def _cancelled(expr: Expr, values: Mapping[Access, Expr]) -> list[Boolean]:
    """What must hold for the values that an expression reads, and cancels, to be finite: x - x is 0, but a single key
    that is masked leaves its row without points."""
    marks = {v: sympy.Dummy() for v in values.values() if _finite(v) != sympy.true}
    read = {a: marks[v] for a, v in values.items() if v in marks and a in reads_outside_where(expr)}
    left = expr.xreplace(read).free_symbols
    return [_finite(v) for v, mark in marks.items() if mark in read.values() and mark not in left]


def _finite(expr: Expr) -> Boolean:
    if isinstance(expr, Where):
        condition, a, b = expr.args
        return sympy.And(sympy.Or(sympy.Not(condition), _finite(a)), sympy.Or(condition, _finite(b)))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        return sympy.And(*map(_finite, expr.args))
    return sympy.false if expr.is_infinite else sympy.true


def _replaced(expr: Expr, value: Callable[[Access], Expr | None]) -> Expr:
    """The expression with the accesses that have a value as that."""
    return expr.xreplace({a: v for a in accesses(expr) if (v := value(a)) is not None})


def _may_inline(s: Einsum, cascade: Cascade) -> bool:
    """Not what a contraction would compute again for every point of the ranks it lacks: a feature map, a rotation, or,
    of what other statements make, something that lacks a long rank. A scale is no such thing; but what has a layout
    of its own, or is part of one (the scales of quantized values), is stored."""
    if s.output.layout != DENSE or s.name in cascade.in_layouts:
        return False
    if s.expr.is_infinite:  # written out, -oo less -oo would be no number
        return False
    factors = [f.as_base_exp() for f in sympy.Mul.make_args(s.expr)] if isinstance(s.expr, sympy.Expr) else ()
    if factors and all(b.is_number or (isinstance(b, Access) and e.is_positive) for b, e in factors):
        return True
    made = any(a.tensor in cascade.definitions for a in accesses(s.expr))
    for user in cascade.users(s.name):
        if user.reduce is None or user.reduce.monoid != "sum":
            continue
        for term in sympy.Add.make_args(user.expr):
            operands = sympy.Mul.make_args(term)
            for a in operands:
                if isinstance(a, Access) and a.tensor == s.name and len(operands) > 1 and depends(a, user.reduce.ranks):
                    lacking = set(user.ranks) - variables(a)
                    if any(is_long(cascade, r) or not made for r in lacking):
                        return False
    return True


def specialised(cascade: Cascade) -> Cascade:
    """A statement read at places that are no plain variables (every second head) becomes one statement per place. A
    place that only a condition keeps inside the tensor stays a place: the statement has no points beyond its ends."""
    names = Names(cascade)
    body = list(cascade.body)
    ranks = {r.name: r for r in cascade.ranks}
    for s in reversed(cascade.body):
        s = next(x for x in body if x.name == s.name)
        if s.reduce is None or s.scan is not None or s.reduce.monoid == "topk" or s.name in cascade.outputs:
            continue
        places = dict.fromkeys(a.index for t in body for a in t.reads if a.tensor == s.name)
        if all(_plain(p) for p in places) or len(places) > PLACES or not all(_simple(p) for p in places):
            continue
        made: list[Einsum] = []
        calls: dict[Access, Access] = {}
        for place in places:
            output = Tensor(
                names(s.name), tuple(v for i in place for v in sorted(variables(i) & set(ranks))), s.output.dtype
            )
            if set(output.ranks) & set(s.reduce.ranks) or not _within(cascade, s.output, place):
                break
            sub = {var(r): i for r, i in zip(s.output.ranks, place, strict=True)}
            made.append(Einsum(output, s.expr.xreplace(sub), s.reduce, s.domain.xreplace(sub)))
            calls[Access(s.name, *place)] = output()
        else:
            index = body.index(s)
            body[index : index + 1] = made
            body = [t.replace(expr=t.expr.xreplace(calls), domain=t.domain.xreplace(calls)) for t in body]
    return cascade.replace(body=tuple(body))


def shaped(cascade: Cascade) -> Cascade:
    """Inputs shaped by the ranks they are read at, wherever each read of a dimension is at the same one."""
    inputs = []
    for t in cascade.inputs:
        reads = [a for s in cascade.body for a in s.reads if a.tensor == t.name]
        ranks = list(t.ranks)
        for place, own in enumerate(t.ranks):
            found = {a.index[place] for a in reads}
            name = next(iter(found)).name if len(found) == 1 and next(iter(found)).is_Symbol else own
            known = cascade.rank_table.get(name)
            if known is not None and name not in ranks and known.extent == cascade.extent(own):
                ranks[place] = name
        inputs.append(Tensor(t.name, tuple(ranks), t.dtype, t.layout))
    return without_unused(cascade.replace(inputs=tuple(inputs)))


def _plain(place: Iterable[Expr]) -> bool:
    place = tuple(place)
    return all(i.is_Symbol for i in place) and len(set(place)) == len(place)


def _simple(place: Iterable[Expr]) -> bool:
    """Each index a constant, a variable or a multiple of one plus a constant, and no variable in two of them."""
    seen: list[Expr] = []
    for i in place:
        if i.is_Integer:
            continue
        constant, rest = i.as_coeff_Add()
        coefficient, variable = rest.as_coeff_Mul()
        if not (variable.is_Symbol and constant.is_Integer and coefficient.is_Integer) or variable in seen:
            return False
        seen.append(variable)
    return True


def _within(cascade: Cascade, tensor: Tensor, place: Iterable[Expr]) -> bool:
    """Whether the place is one of the tensor's for all values of the ranks in it."""
    inside = sympy.And(*(b for r, i in zip(tensor.ranks, place, strict=True) for b in (i >= 0, i < cascade.extent(r))))
    return simplify(inside, rank_ranges(cascade)) == sympy.true


def aligned(cascade: Cascade) -> Cascade:
    """Ranks named so that statements are read at their own variables. A statement takes the names of its first reader;
    a later reader's reduced ranks take those of what it reads."""
    extents = {r.name: r.extent for r in cascade.ranks}
    names = Names(cascade)
    bound: dict[str, tuple[str, ...]] = {}
    usual: dict[tuple[str, int], list[str]] = {}
    done: dict[str, Einsum] = {}
    new_ranks: list[Rank] = []

    for s in reversed(cascade.body):
        mapping: dict[str, str] = {}
        if s.name in bound and s.scan is None:
            mapping = dict(zip(s.output.ranks, bound[s.name], strict=True))
        reduced = s.reduce.ranks if s.reduce else ()
        taken = set(mapping.values()) | (set(s.output.ranks) if not mapping else set())
        for r in reduced:
            target = next(
                (c for c in _candidates(s, r, bound, usual) if c not in taken and extents[c] == extents[r]), r
            )
            if target in taken:
                target = names(r)
                extents[target] = extents[r]
                new_ranks.append(Rank(target, extents[r], cascade.rank_table[r].origin))
            mapping[r] = target
            taken.add(target)
        s = renamed(s, {a: b for a, b in mapping.items() if a != b})
        done[s.name] = s
        for a in s.reads:
            made = a.tensor in cascade.definitions and a.tensor not in cascade.outputs
            if made and a.tensor not in bound and _plain(a.index):
                own = tuple(i.name for i in a.index)
                if all(extents[i] == extents[r] for i, r in zip(own, cascade.tensors[a.tensor].ranks, strict=True)):
                    bound[a.tensor] = own
            for place, i in enumerate(a.index):
                if i.is_Symbol and s.reduce and i.name in s.reduce.ranks:
                    usual.setdefault((a.tensor, place), []).append(i.name)
    body = tuple(done[s.name] for s in cascade.body)
    return without_unused(cascade.replace(ranks=(*cascade.ranks, *new_ranks), body=body))


def _candidates(
    s: Einsum, rank: str, bound: Mapping[str, tuple[str, ...]], usual: Mapping[tuple[str, int], list[str]]
) -> Iterable[str]:
    """Names for a reduced rank: what the statements read call it, then what other reductions of the same inputs do."""
    places = [(a.tensor, i) for a in s.reads for i, x in enumerate(a.index) if x == var(rank)]
    for tensor, i in places:
        if tensor in bound:
            yield bound[tensor][i]
    for place in places:
        yield from usual.get(place, ())


def deduplicated(cascade: Cascade) -> Cascade:
    """One statement per value: equal right hand sides, and inputs passed on, are read under one name."""
    seen: dict[tuple[object, ...], Tensor] = {}
    alias: dict[str, Tensor] = {}
    body = []
    for s in cascade.body:
        calls = {a: instead(a, cascade.tensors[a.tensor], alias[a.tensor]) for a in s.reads if a.tensor in alias}
        if calls:
            s = s.replace(expr=normal(s.expr.xreplace(calls)), domain=s.domain.xreplace(calls))
        reduce = (s.reduce.monoid, frozenset(s.reduce.ranks)) if s.reduce else None
        key = (frozenset(s.output.ranks), s.expr, frozenset(conjuncts(s.domain)), reduce, s.output.dtype == "bool")
        topk = s.reduce is not None and s.reduce.monoid == "topk"
        if key in seen and s.scan is None and not topk and s.name not in {*cascade.outputs, *cascade.in_layouts}:
            alias[s.name] = seen[key]
            continue
        seen.setdefault(key, s.output)
        body.append(s)
    return cascade.replace(body=tuple(body))
