"""From raised statements to a cascade: ranks, tensors and symbols get the names of their roles.

Comes in: a finished `Raiser` and its root statements. Goes out: a verified `Cascade`, the graph nodes of its inputs in
order, and the torch symbols behind its own. Roles follow from where a variable occurs: reduced with the values is `m`,
reduced in the scores is `e`, only with the queries `p`, only with the values `f`, everywhere a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
from torch.fx import Node

from einscade.compiler.aten_facts import dtype_name, shape
from einscade.compiler.raising import Raiser
from einscade.compiler.raising_index import is_one, same
from einscade.ir.cascade import Cascade, Einsum, Rank, Reduction, Tensor
from einscade.ir.expr import Access, Expr, FloorDiv, accesses, free_vars, var
from einscade.ir.verify import verify

__all__ = ["Named", "named"]

_POOLS = {
    "batch": "bhrwgijklyz",
    "p": "pqo",
    "m": "mns",
    "e": "ecd",
    "f": "fvd",
    "other": "tuxyaijklgz",
}
_PREFIXES = {
    "contract": "S", "scores": "S", "masked": "A", "shared": "A", "share": "A", "max": "G", "weight": "W",
    "sum": "Z", "total": "Z", "reduce": "R", "greatest": "I", "values": "O", "root": "O",
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """`inputs` in the cascade's order; `ranks` from the raiser's variables to rank names; `symbols` from the
    cascade's symbols to the graph's."""

    cascade: Cascade
    inputs: tuple[Node, ...]
    ranks: Mapping[str, str]
    symbols: Mapping[str, str]


def named(r: Raiser, name: str, roots: Sequence[str], scores: Iterable[Node], values: Node) -> Named:
    """`roots` are the statements that are outputs, `scores` and `values` the contractions that make and consume m."""
    classes = _same_ranks(r)
    roles = _roles(r, classes, list(scores), values)
    ranks = _rank_names(r, classes, roles, roots)
    tensors = _tensor_names(r, classes, roles, roots)
    cascade, symbols = _assemble(r, name, roots, ranks, tensors)
    verify(cascade, "raising")
    return Named(cascade, tuple(r.leaves.values()), ranks, symbols)


def _same_ranks(r: Raiser) -> dict[str, str]:
    """Variables that index the same dimension of a statement are one rank, unless a statement has both."""
    parent = {v: v for v in r.extents}
    together: dict[str, set[int]] = {v: set() for v in r.extents}
    for k, e in enumerate(r.body):
        for v in e.ranks:
            together[v].add(k)
    definitions = {e.name: e for e in r.body}

    def find(v: str) -> str:
        while parent[v] != v:
            v = parent[v]
        return v

    def merge(a: str, b: str) -> None:
        a, b = find(a), find(b)
        if a != b and not together[a] & together[b] and same(r.size_of(a), r.size_of(b)):
            parent[a] = b
            together[b] |= together[a]

    for e in r.body:
        for access in e.reads:
            if access.tensor in definitions:
                for at, rank in zip(access.index, definitions[access.tensor].output.ranks, strict=True):
                    if at.is_Symbol and at.name in parent:
                        merge(at.name, rank)
    reduced = [v for e in r.body if e.reduce for v in e.reduce.ranks]
    for k, a in enumerate(reduced):
        for b in reduced[:k]:
            merge(a, b)
    return {v: find(v) for v in parent}


def _roles(r: Raiser, classes: Mapping[str, str], scores: Sequence[Node], values: Node) -> dict[str, str]:
    """Class -> role."""
    made = {key: r.body_of(statement) for key, (statement, _) in r.defined.items()}
    final = [e for key, e in made.items() if key[0] is values and key[1] in ("contract", "values", "reduce")]
    first = [e for key, e in made.items() if key[0] in scores and key[1] in ("contract", "scores", "reduce")]
    roles: dict[str, str] = {}

    def give(role: str, variables: Iterable[str]) -> None:
        for v in variables:
            roles.setdefault(classes[v], role)

    for e in final:
        give("m", e.reduce.ranks if e.reduce else ())
    for e in first:
        give("e", e.reduce.ranks if e.reduce else ())
    outer = {classes[v] for e in first for v in e.output.ranks}
    for e in final:
        made_here = [a for a in accesses(e.expr) if a.tensor not in r.leaves]
        weights = {classes[v] for a in made_here for v in free_vars(a) if v in classes}
        give("f", (v for v in e.output.ranks if classes[v] not in outer | weights))
    keyed: set[str] = set()
    for e in (*first, *final):
        for a in accesses(e.expr):
            seen = {classes[v] for v in free_vars(a) if v in classes}
            if a.tensor in r.leaves and any(roles.get(c) == "m" for c in seen):
                keyed |= seen
    queries = [v for e in first[:1] for v in e.output.ranks if classes[v] not in keyed and classes[v] not in roles]
    give("p", queries[-1:])
    for e in first:
        give("batch", e.output.ranks)
    for e in final:
        give("batch", e.output.ranks)
    return roles


def _rank_names(
    r: Raiser, classes: Mapping[str, str], roles: Mapping[str, str], roots: Sequence[str]
) -> dict[str, str]:
    used = [v for e in sorted(r.body, key=lambda e: e.name not in roots) for v in (*e.ranks, *e.output.ranks)]
    taken: dict[str, str] = {}
    for v in dict.fromkeys(classes[v] for v in used):
        pool = _POOLS[roles.get(v, "other")]
        names = [*pool, *(f"{pool[0]}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
        taken[v] = next(n for n in names if n not in taken.values())
    return {v: taken[c] for v, c in classes.items() if c in taken}


def _tensor_names(
    r: Raiser, classes: Mapping[str, str], roles: Mapping[str, str], roots: Sequence[str]
) -> dict[str, str]:
    names: dict[str, str] = {}

    def give(tensor: str, prefix: str) -> None:
        if tensor not in names:
            taken = set(names.values())
            names[tensor] = next(n for n in (prefix, *(f"{prefix}{k}" for k in range(2, 999))) if n not in taken)

    prefixes = {statement: _PREFIXES.get(str(key[1]), "R") for key, (statement, _) in r.defined.items()}
    for root in roots:
        give(root, "O" if root == roots[0] else "P" if prefixes.get(root) in ("W", "A", "S", None) else prefixes[root])
    for e in r.body:
        give(e.name, prefixes.get(e.name, "R"))
    for e in r.body:
        seen = {roles.get(classes[v]) for v in e.ranks}
        for a in _ordered(e.expr):
            if a.tensor in r.leaves and e.reduce and e.reduce.monoid == "sum":
                own = {roles.get(classes[v]) for v in free_vars(a) if v in classes}
                if "e" in own and "e" in seen:
                    give(a.tensor, "K" if "m" in own else "Q")
                elif "m" in own and "p" not in own and any(roles.get(classes[v]) == "m" for v in e.reduce.ranks):
                    give(a.tensor, "V")
    for tensor, node in r.leaves.items():
        kind = dtype_name(node)
        give(tensor, "mask" if kind == "bool" else "index" if kind[0] in "iu" else "bias" if shape(node) else "scale")
    return names


def _ordered(expr: Expr) -> list[Access]:
    return [node for node in sympy.preorder_traversal(expr) if isinstance(node, Access)]


def _assemble(r: Raiser, name: str, roots: Sequence[str], ranks: Mapping[str, str],
              tensors: Mapping[str, str]) -> tuple[Cascade, dict[str, str]]:  # fmt: skip
    table: dict[str, Expr] = {}
    for v, rank in ranks.items():
        table.setdefault(rank, r.size_of(v))
    inputs = tuple(_input(r, leaf, node, tensors[leaf], ranks, table) for leaf, node in r.leaves.items())
    symbols = _symbol_names(table, r.body, set(ranks) | set(r.extents), {*tensors.values(), *table})
    swap: dict[Expr, Expr] = {var(v): var(rank) for v, rank in ranks.items()}
    swap.update({var(old): var(new) for old, new in symbols.items()})

    ones = {var(v): sympy.Integer(0) for v, size in r.extents.items() if is_one(size)}

    def renamed(expr: Expr) -> Expr:
        inner = _without_ones(expr, ones).xreplace(swap)
        table_of = {a: Access(tensors[a.tensor], *a.index) for a in accesses(inner)}
        while table_of:
            inner = inner.xreplace(table_of)
            table_of = {a: Access(tensors[a.tensor], *a.index) for a in accesses(inner) if a.tensor in tensors}
        return inner

    body = []
    for e in r.body:
        output = Tensor(tensors[e.name], tuple(ranks[v] for v in e.output.ranks), e.output.dtype)
        reduce = e.reduce and Reduction(
            e.reduce.monoid, tuple(ranks[v] for v in e.reduce.ranks), e.reduce.slot and ranks[e.reduce.slot]
        )
        body.append(Einsum(output, renamed(e.expr), reduce, renamed(e.domain)))
    extents = tuple(Rank(rank, size.xreplace(swap)) for rank, size in table.items())
    cascade = Cascade(name, extents, inputs, tuple(tensors[root] for root in roots), tuple(body))
    return cascade, {new: old for old, new in symbols.items()}


def _without_ones(expr: Expr, ones: Mapping[Expr, Expr]) -> Expr:
    """Variables of extent 1 are 0 wherever they are no index of their own."""
    if not ones or not expr.free_symbols & set(ones):
        return expr
    if isinstance(expr, Access):
        return expr.at(*(i if i.is_Symbol else _without_ones(i, ones) for i in expr.index))
    if expr.is_Symbol:
        return ones.get(expr, expr)
    return expr.func(*(_without_ones(a, ones) for a in expr.args))


def _input(r: Raiser, leaf: str, node: Node, name: str, ranks: Mapping[str, str], table: dict[str, Expr]) -> Tensor:
    """An input's ranks: those it is read at where they run along all of a dimension, else ranks of its own."""
    reads = [a for e in r.body for a in e.reads if a.tensor == leaf]
    own: list[str] = []
    for d, size in enumerate(shape(node)):
        direct = [ranks[a.index[d].name] for a in reads if a.index[d].is_Symbol and a.index[d].name in ranks]
        direct = [n for n in direct if n not in own and same(table[n], size)]
        if direct:
            own.append(direct[0])
            continue
        groups = any(isinstance(a.index[d], FloorDiv) for a in reads)
        pool = ("g" if groups else "") + ("u" if size == 1 else _POOLS["other"]) + "abcdefghijklmnopqrstuvwxyz"
        free = (n for n in (*pool, *(f"u{c}" for c in pool)) if n not in own and same(table.get(n, size), size)
                and n not in ranks.values())  # fmt: skip
        rank = next(free)
        table[rank] = size
        own.append(rank)
    return Tensor(name, tuple(own), dtype_name(node))


def _symbol_names(
    table: Mapping[str, Expr], body: Sequence[Einsum], variables: set[str], taken: set[str]
) -> dict[str, str]:
    """Graph symbol -> cascade symbol: the capital of the rank whose extent it is, else its own name."""
    free: list[str] = []
    names: dict[str, str] = {}
    for rank, size in table.items():
        if size.is_Symbol and size.name not in names:
            capital = rank.upper()
            names[size.name] = capital if capital not in taken | set(names.values()) else size.name
        free += sorted(free_vars(size))
    for e in body:
        free += sorted((free_vars(e.expr) | free_vars(e.domain)) - variables)
    for symbol in free:
        names.setdefault(symbol, symbol)
    return names
