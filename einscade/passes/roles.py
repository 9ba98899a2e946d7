"""An input that is read along several ranks as several inputs, and back.

Comes in: a cascade. Goes out: `separate`, the same cascade with an input of its own for each role of one (a decay at
the query and at the key, one tensor as queries, keys and values), and which inputs are one tensor; and `merged`,
which reads that one again.

    A[p,m] = S[p,m] + X[p] - X[m]          X[m]
    A[p,m] = S[p,m] + X1[p] - X[m]         X1[p], and X1 is X

Each role's gradient is then a reduction like its neighbours', with which it can share a loop: the sum of all of them
would be over ranks that none of the others has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from einscade.ir import Access, Cascade, Expr, Tensor
from einscade.passes.statements import Names, redirect

__all__ = ["merged", "separate"]


def separate(cascade: Cascade, among: Collection[str]) -> tuple[Cascade, dict[str, str]]:
    """The cascade in which each of the inputs `among` has one role, and the original of each input that this adds."""
    names = Names(cascade)
    of: dict[str, str] = {}
    roles: dict[tuple[str, tuple[Expr, ...]], Tensor] = {}
    for tensor in (t for t in cascade.inputs if t.name in among):
        read = dict.fromkeys(a.index for s in cascade.body for a in s.reads if a.tensor == tensor.name)
        if not all(_is_role(cascade, tensor, index) for index in read):
            continue
        own = next((index for index in read if index == tensor().index), next(iter(read), ()))
        for index in read:
            if index != own:
                role = Tensor(names(tensor.name), tuple(map(str, index)), tensor.dtype)
                roles[tensor.name, index], of[role.name] = role, tensor.name
    if not of:
        return cascade, {}

    def at_role(access: Access) -> Expr:
        role = roles.get((access.tensor, access.index))
        return access if role is None else role()

    body = tuple(redirect(s, at_role) for s in cascade.body)
    return cascade.replace(inputs=(*cascade.inputs, *roles.values()), body=body), of


def merged(cascade: Cascade, of: Mapping[str, str]) -> Cascade:
    """The cascade that reads the originals in place of the roles `of` them."""

    def at_original(access: Access) -> Expr:
        return Access(of[access.tensor], *access.index) if access.tensor in of else access

    body = tuple(redirect(s, at_original) for s in cascade.body)
    return cascade.replace(inputs=tuple(t for t in cascade.inputs if t.name not in of), body=body)


def _is_role(cascade: Cascade, tensor: Tensor, index: tuple[Expr, ...]) -> bool:
    """Whether an index is all of the tensor, each dimension along a rank of its own."""
    plain = all(i.is_Symbol for i in index) and len(set(index)) == len(index)
    return plain and all(
        str(i) in cascade.rank_table and cascade.extent(str(i)) == cascade.extent(r)
        for i, r in zip(index, tensor.ranks, strict=True)
    )
