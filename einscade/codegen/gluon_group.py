"""All members of a group in one program: what sums over the members then need not go to memory for each of them.

Comes in: the form of a loop whose results, in float32, nothing reads but sums over the members of a group

    here:   X[h, ..] = a sum of this loop             for every h
    later:  Y[g, ..] = sum(n < N) X[N*g + n, ..]      (the gradients of keys and values that several heads share)

Goes out: the form with a program for every g, whose loop has an iteration for each of the N members at every tile, and
whose sums run on through all of them. The members are innermost, so that programs that run side by side read the same
tiles of all of them at about the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from einscade.codegen.gluon_form import DTYPES, Form, Members, Operand, written_tile
from einscade.codegen.gluon_rows import SliceSum
from einscade.codegen.source import Unsupported
from einscade.ir.expr import FloorDiv, accesses, free_vars, var

__all__ = ["grouped", "in_group"]


def grouped(form: Form, sums: Sequence[SliceSum]) -> Form | None:
    """The form with a program for each group; `sums` are those of the form's results, each of which nothing else reads.
    None where they are no sums of all results, or what stays depends on the member."""
    if form.written or {s.tensor for s in sums} != set(form.results) or len(sums) != len(form.results):
        return None
    found = {_members(form, s) for s in sums}
    members = found.pop() if len(found) == 1 else None
    if members is None or members.rank not in form.batch:
        return None
    h = members.rank
    stills = [i for x in form.products for _, i in in_group(x.still, members).batch]
    moving = {x.moving.tensor for x in form.products} | {x.values.tensor for x in form.sums}
    stay = {x.still.tensor for x in form.products}
    scalars = [a for s in form.statements for a in accesses(s.expr) if a.tensor not in moving | stay]
    if any(h in free_vars(i) for i in stills) or any(h in free_vars(s.keep) for s in form.statements):
        return None
    if h in free_vars(form.keep) or any(h in free_vars(a) and form.m not in free_vars(a) for a in scalars):
        return None
    made = {s.name: s for s in form.epilogue}
    if any(s.tensor not in made or s.dtype not in DTYPES for s in sums):
        return None
    try:
        written = tuple(written_tile(form.cascade, s.name, form.p, s.across) for s in sums)
    except Unsupported:
        return None
    ranks = {s.name: (*(r for r, _ in s.rows), s.across) for s in sums}
    after = tuple(
        replace(made[s.tensor], name=s.name, ranks=ranks[s.name], expr=s.number * made[s.tensor].expr) for s in sums
    )
    return replace(
        form,
        loop=replace(form.loop, epilogue=after),
        batch=tuple(members.group if r == h else r for r in form.batch),
        products=tuple(replace(x, still=in_group(x.still, members)) for x in form.products),
        epilogue=after,
        results=tuple(s.name for s in sums),
        written=written,
        addressed=(),
        members=members,
    )


def in_group(operand: Operand, members: Members) -> Operand:
    """An operand of a group, where it is the same for all of its members."""
    table = {FloorDiv(var(members.rank), members.count): var(members.group)}
    return replace(operand, batch=tuple((i, x.xreplace(table)) for i, x in operand.batch))


def _members(form: Form, s: SliceSum) -> Members | None:
    """Which rank of its tensor a sum takes apart; None where another index is more than a rank of its own."""
    ranks = form.cascade.tensors[s.tensor].ranks
    found = None
    for rank, terms in zip(ranks, s.index, strict=True):
        if terms == ((rank, 1),):
            continue
        factors = dict(terms)
        group = next((r for r in factors if r not in (None, s.summed)), None)
        if found is not None or group is None or factors != {s.summed: 1, group: s.count}:
            return None
        found = Members(rank, group, s.count)
    if found is None or form.extent(found.rank) != found.count * form.extent(found.group):
        return None
    return found
