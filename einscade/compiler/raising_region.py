"""Raising a whole region: from its nodes and its roots to a named cascade, and how the outputs go back into the graph.

Comes in: the nodes of a region, the contractions that make and consume its intermediate, the nodes whose values others
need. Goes out: `Raised`, or `Unraisable` with the operation that stopped it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor as TorchTensor
from torch.fx import Node

from einscade.compiler.aten_facts import Unraisable, dtype_name, shape
from einscade.compiler.raising import Key, Raiser
from einscade.compiler.raising_index import Index, is_one
from einscade.compiler.raising_names import named
from einscade.ir.cascade import Cascade, Einsum, Tensor
from einscade.ir.expr import Access, Expr, free_vars

__all__ = ["Output", "Raised", "raise_region"]

_ROUNDS = 8  # how often variables may be split; each round splits at least one


@dataclass(frozen=True)
class Output:
    """The cascade's output, permuted by `permute` and reshaped to the node's shape, replaces `node`."""

    node: Node
    permute: tuple[int, ...]


@dataclass(frozen=True)
class Raised:
    """`inputs` in the order of `cascade.inputs`; `symbols` from the cascade's symbols to the graph's; `known` are the
    graph inputs whose values the cascade has in it."""

    cascade: Cascade
    inputs: tuple[Node, ...]
    outputs: tuple[Output, ...]
    symbols: Mapping[str, str]
    known: frozenset[Node]


def raise_region(core: Collection[Node], products: Collection[Node], scores: Sequence[Node], values: Node,
                 roots: Sequence[Node], constants: Mapping[str, TorchTensor], name: str) -> Raised:  # fmt: skip
    """`scores` make the intermediate, `values` consumes it, `roots` are the nodes to produce, the main one first."""
    splits: dict[Key, Expr] = {}
    for _ in range(_ROUNDS):
        r = Raiser(core, products, constants, splits, scores)
        statements = [_root(r, k, node) for k, node in enumerate(roots)]
        if not r.wanted:
            break
        splits.update(r.wanted)
    else:
        raise Unraisable("its dimensions do not factor")
    if len(set(statements)) != len(statements):
        raise Unraisable("two of its results are one value")
    read = {a.tensor for e in r.body for a in e.reads}
    r.leaves = {name: node for name, node in r.leaves.items() if name in read}  # some were only considered
    order = {name: _memory(r, k, node, name) for k, (name, node) in enumerate(zip(statements, roots, strict=True))}
    found = named(r, name, statements, scores, values)
    cascade = found.cascade
    outputs, body = [], {e.name: e for e in cascade.body}
    for statement, node, result in zip(statements, roots, cascade.outputs, strict=True):
        made = body[result]
        memory = [found.ranks[v] for v in order[statement]]
        ranks = _natural(made, memory)
        body[result] = made.replace(output=Tensor(result, ranks, dtype_name(node)))
        outputs.append(Output(node, tuple(ranks.index(rank) for rank in memory)))
    reordered = {e.name: e.output.ranks for e in cascade.body if e.output.ranks != body[e.name].output.ranks}
    if any(a.tensor in reordered for e in cascade.body for a in e.reads):
        body = {e.name: body[e.name].replace(output=Tensor(e.name, e.output.ranks, body[e.name].output.dtype))
                for e in cascade.body}  # fmt: skip
        outputs = [Output(node, tuple(body[result].output.ranks.index(found.ranks[v]) for v in order[statement]))
                   for statement, node, result in zip(statements, roots, cascade.outputs, strict=True)]  # fmt: skip
    cascade = cascade.replace(body=tuple(body.values()))
    return Raised(cascade, found.inputs, tuple(outputs), found.symbols, frozenset(r.known))


def _root(r: Raiser, k: int, node: Node) -> str:
    """The statement that is the value of a root."""
    index, names = _root_index(r, k, node)
    value = r.read(node, index)
    ranks = {e.name: e.output.ranks for e in r.body}
    seen = free_vars(value)
    names = tuple(n for n in names if n in seen or not is_one(r.extents[n]))
    if isinstance(value, Access) and value.tensor in ranks:
        if sorted(map(str, value.index)) == sorted(names) and all(i.is_Symbol for i in value.index):
            return value.tensor
    name = f"%{len(r.body)}"
    r.body.append(Einsum(Tensor(name, names, dtype_name(node)), value))
    r.defined[node, "root", k] = (name, tuple((n,) for n in names))
    return name


def _root_index(r: Raiser, k: int, node: Node) -> tuple[Index, tuple[str, ...]]:
    """A further root is asked for where the main one needed it, so that both have the same ranks."""
    if k and (asked := _asked(r, node)) is not None:
        return asked
    made = [r.fresh(("root", k, d), n, keep_one=True) for d, n in enumerate(shape(node))]
    return tuple(i for i, _ in made), tuple(n for _, names in made for n in names)


def _asked(r: Raiser, node: Node) -> tuple[Index, tuple[str, ...]] | None:
    index = r.first.get(node)
    if index is None or not r.covers(index, shape(node)):
        return None
    digits = (r.digits(at, size) or () for at, size in zip(index, shape(node), strict=True))
    return index, tuple(n for names in digits for n in names)


def _memory(r: Raiser, k: int, node: Node, statement: str) -> tuple[str, ...]:
    """The statement's ranks in the order in which they make up the node's dimensions."""
    own = set(r.body_of(statement).output.ranks)
    if k and (asked := _asked(r, node)) is not None:
        names = asked[1]
    else:
        names = tuple(name for d in range(len(shape(node))) for name in r.names_of(("root", k, d)))
    return tuple(n for n in names if n in own)


def _natural(made: Einsum, memory: Sequence[str]) -> tuple[str, ...]:
    """Batches first, then rows, then the width: the order that kernels and readers expect."""
    rows = [n for n in memory if n[0] in "pqo"]
    width = [n for n in memory if n[0] in "fvd" or n[0] in "mns"]
    return (*(n for n in memory if n not in rows and n not in width), *rows, *width)
