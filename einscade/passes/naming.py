"""Names and orders that depend on a cascade's structure alone, so that equal layers are equal cascades.

Comes in: a cascade with whatever names it was raised under. Goes out: the same with ranks named by what they do (b h p
rows, m reduced and walked along, e contracted, f only in outputs), tensors likewise (Q K V, S G W Z N O), statements in
an order of their own. Inputs and outputs keep their positions, and extents their symbols.
"""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from einscade.ir import Access, Cascade, Einsum, Rank, Reduction, Scan, Tensor, accesses, var
from einscade.passes.fusion import inner_ranks
from einscade.passes.statements import RESERVED
from einscade.passes.terms import variables
from einscade.passes.views import output_views

__all__ = ["named"]


def named(cascade: Cascade) -> Cascade:
    """The cascade with names, and statements in an order, that follow from its structure alone."""
    ranks = _rank_names(cascade)
    tensors = _input_names(cascade, ranks)
    variables_ = {var(a): var(b) for a, b in ranks.items()}
    taken = _reserved(cascade) | set(ranks.values()) | set(tensors.values())
    waiting = {s.name: s for s in cascade.body}
    body: list[Einsum] = []
    while waiting:
        ready = [s for s in waiting.values() if not any(a.tensor in waiting and a.tensor != s.name for a in s.reads)]
        candidates = []
        for s in ready:
            moved = _renamed(s, {**tensors, s.name: "_"}, ranks, variables_)
            candidates.append((_kind(cascade, s), str(moved.expr), str(moved.domain), moved.ranks, s))
        *_, s = min(candidates, key=lambda c: c[:4])
        del waiting[s.name]
        place = cascade.outputs.index(s.name) if s.name in cascade.outputs else None
        tensors[s.name] = _fresh("O" if place is not None else _role(cascade, s), taken)
        body.append(_renamed(s, tensors, ranks, variables_))
    inputs = tuple(
        Tensor(tensors[t.name], tuple(ranks[r] for r in t.ranks), t.dtype, t.layout.renamed(tensors, ranks))
        for t in cascade.inputs
    )
    order = {r: i for i, r in enumerate(ranks.values())}
    table = sorted(
        (Rank(ranks[r.name], r.extent, ranks.get(r.origin, r.origin) if r.origin else None) for r in cascade.ranks),
        key=lambda r: order[r.name],
    )
    body = [_with_sorted_ranks(s, order) if s.name not in [tensors[o] for o in cascade.outputs] else s for s in body]
    shapes = {s.name: s.output.ranks for s in body}
    body = [_reordered(s, cascade, tensors, ranks, shapes) for s in body]
    outputs = tuple(tensors[o] for o in cascade.outputs)
    return Cascade(cascade.name, tuple(table), inputs, outputs, tuple(body))


def _reserved(cascade: Cascade) -> set[str]:
    return {*cascade.symbols, *RESERVED, cascade.name}


def _fresh(prefix: str, taken: set[str]) -> str:
    name = prefix
    number = 0
    while name in taken:
        number += 1
        name = f"{prefix}{number}"
    taken.add(name)
    return name


# -- ranks --


def _rank_names(cascade: Cascade) -> dict[str, str]:
    """Every rank's name, in the order of the table."""
    reduced = {r for s in cascade.body if s.reduce for r in s.reduce.ranks}
    results = output_views(cascade)[0].tensors
    first = [r for o in cascade.outputs for r in results[o].ranks]
    seen = dict.fromkeys([*first, *_walk(cascade), *(r.name for r in cascade.ranks)])
    contracted = inner_ranks(cascade)
    main = results[cascade.outputs[0]].ranks
    inner = [r for r in seen if r in contracted]
    tiles = [t for s in cascade.body if (t := set(s.output.ranks)) & (reduced - contracted)]
    rows = [r for r in main if r not in contracted and (not tiles or any(r in t for t in tiles))]
    along = [r for r in seen if r in reduced and r not in contracted and r not in rows]
    only = [r for r in seen if r in first and r not in (*rows, *along, *inner)]
    names: dict[str, str] = {}
    taken = _reserved(cascade)
    groups = (
        (rows[-1:], "p"),
        (rows[:-1], "bhijkl"),
        (along, "mn"),
        (inner, "ed"),
        (only, "f"),
        ([r for r in seen if r not in (*rows, *along, *inner, *only)], "guvwxyz"),
    )
    for members, letters in groups:
        for i, r in enumerate(members):
            names[r] = _fresh(letters[min(i, len(letters) - 1)], taken)
    return {r: names[r] for r in [*rows, *(r for r in seen if r not in rows)] if r in cascade.rank_table}


def _walk(cascade: Cascade) -> Iterator[str]:
    """Rank variables in the order in which the inputs, by position, are indexed with them."""
    for t in cascade.inputs:
        found = sorted(
            (
                (len(variables(a)), place, i.name)
                for s in cascade.body
                for a in s.reads
                if a.tensor == t.name
                for place, i in enumerate(a.index)
                if i.is_Symbol
            ),
            key=lambda x: x[1],
        )
        yield from (name for *_, name in found)
        yield from t.ranks


# -- tensors --


def _input_names(cascade: Cascade, ranks: dict[str, str]) -> dict[str, str]:
    taken = _reserved(cascade) | set(ranks.values())
    names = {}
    for t in cascade.inputs:
        letters = {
            ranks[v] for s in cascade.body for a in s.reads if a.tensor == t.name for v in variables(a) if v in ranks
        }
        if t.dtype == "bool":
            role = "mask"
        elif "e" in letters and not letters & {"m", "f"}:
            role = "Q"
        elif "e" in letters and "m" in letters:
            role = "K"
        elif "f" in letters and "m" in letters:
            role = "V"
        else:
            role = "X"
        names[t.name] = _fresh(role, taken)
    return names


def _kind(cascade: Cascade, s: Einsum) -> int:
    return "STGWZNO".index(_role(cascade, s)) if s.name not in cascade.outputs else 7


def _role(cascade: Cascade, s: Einsum) -> str:
    reduced = {r for t in cascade.body if t.reduce for r in t.reduce.ranks}
    along = bool(set(s.output.ranks) & reduced)
    if s.reduce is None:
        return "W" if any(e.has(Access) for e in s.expr.atoms(sympy.exp)) else "T"
    if along:
        return "S"
    if s.reduce.monoid in ("max", "min"):
        return "G"
    factors = [f for f in sympy.Mul.make_args(s.expr) if isinstance(f, Access)]
    return "N" if len(factors) > 1 else "Z"


# -- statements --


def _renamed(
    s: Einsum, tensors: dict[str, str], ranks: dict[str, str], moved: dict[sympy.Symbol, sympy.Symbol]
) -> Einsum:
    def rewritten(expr: sympy.Basic) -> sympy.Basic:
        expr = expr.xreplace(moved)
        return _retensored(expr, tensors)

    output = Tensor(
        tensors[s.name],
        tuple(ranks[r] for r in s.output.ranks),
        s.output.dtype,
        s.output.layout.renamed(tensors, ranks),
    )
    reduce = s.reduce
    if reduce is not None:
        slot = ranks[reduce.slot] if reduce.slot else None
        reduce = Reduction(
            reduce.monoid, tuple(sorted((ranks[r] for r in reduce.ranks), key=list(ranks.values()).index)), slot
        )
    scan = Scan(ranks[s.scan.rank], rewritten(s.scan.init)) if s.scan else None
    return Einsum(output, rewritten(s.expr), reduce, rewritten(s.domain), scan)


def _retensored(expr: sympy.Basic, tensors: dict[str, str]) -> sympy.Basic:
    """Accesses under their tensors' new names, all at once (names may trade places)."""
    if isinstance(expr, Access):
        return Access(tensors[expr.tensor], *(_retensored(i, tensors) for i in expr.index))
    if not expr.args or not accesses(expr):
        return expr
    return expr.func(*(_retensored(a, tensors) for a in expr.args))


def _with_sorted_ranks(s: Einsum, order: dict[str, int]) -> Einsum:
    t = s.output
    return s.replace(output=Tensor(t.name, tuple(sorted(t.ranks, key=order.__getitem__)), t.dtype, t.layout))


def _reordered(
    s: Einsum, cascade: Cascade, tensors: dict[str, str], ranks: dict[str, str], shapes: dict[str, tuple[str, ...]]
) -> Einsum:
    """The statement with its reads in the new order of ranks of what it reads."""
    was = {tensors[t.name]: tuple(ranks[r] for r in t.output.ranks) for t in cascade.body}
    calls = {}
    for a in s.reads:
        if a.tensor in was and was[a.tensor] != shapes[a.tensor]:
            index = dict(zip(was[a.tensor], a.index, strict=True))
            calls[a] = a.at(*(index[r] for r in shapes[a.tensor]))
    return s.replace(expr=s.expr.xreplace(calls), domain=s.domain.xreplace(calls)) if calls else s
