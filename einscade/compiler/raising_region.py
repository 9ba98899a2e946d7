"""Raising a whole region: from its nodes and its roots to a named cascade, and how the outputs go back into the graph.

Comes in: a `Request`, the nodes of a region and the ends of its intermediate. Goes out: `Raised`, or `Unraisable` with
the operation that stopped it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor as TorchTensor
from torch.fx import Node

from einscade.compiler.aten_facts import Unraisable, device_of, dtype_name, shape
from einscade.compiler.raising import Key, Raiser
from einscade.compiler.raising_index import Index, is_one
from einscade.compiler.raising_memo import Correspondence, Memo, Request
from einscade.compiler.raising_names import named
from einscade.ir.cascade import Cascade, Einsum, Tensor
from einscade.ir.expr import Access, Expr, free_vars
from einscade.passes.invariance import is_felt

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
    graph inputs whose values the cascade has in it; `detached` is a statement that gradients must not pass, if any."""

    cascade: Cascade
    inputs: tuple[Node, ...]
    outputs: tuple[Output, ...]
    symbols: Mapping[str, str]
    known: frozenset[Node]
    detached: str | None

    def moved(self, nodes: Correspondence) -> Raised:
        """The same for the region whose nodes correspond to this one's."""
        return replace(
            self,
            inputs=tuple(nodes[n] for n in self.inputs),
            outputs=tuple(replace(o, node=nodes[o.node]) for o in self.outputs),
            known=frozenset(nodes[n] for n in self.known),
        )


def raise_region(request: Request, memo: Memo, name: str) -> Raised:
    """The cascade of a region; its first root is the value it is for, further ones are values that others read."""
    if (known := memo.find(request)) is not None:
        earlier, nodes = known
        return earlier.moved(nodes)
    r, roots = _raised(request, memo.constants)
    read = {a.tensor for e in r.body for a in e.reads}
    r.leaves = {name: node for name, node in r.leaves.items() if name in read}  # some were only considered
    found = named(r, name, [statement for statement, _ in roots], request.scores, request.values)
    cascade, permutes = _ordered(found.cascade, [[found.ranks[v] for v in ranks] for _, ranks in roots], request.roots)
    outputs = tuple(Output(node, permute) for node, permute in zip(request.roots, permutes, strict=True))
    stops = {statement for key, (statement, _) in r.defined.items() if key[1] == "detached"}
    pairs = zip(r.body, found.cascade.body, strict=True)
    detached = _felt(cascade, [made.name for e, made in pairs if e.name in stops])
    result = Raised(cascade, found.inputs, outputs, found.symbols, frozenset(r.known), detached)
    memo.add(request, r.touched, result)
    return result


def _felt(cascade: Cascade, detached: Sequence[str]) -> str | None:
    """The first of the statements whose values matter: where it moves, an output moves. A maximum that only shifts what
    is normalised does not, and the gradient through it is zero, whether it is stopped or not."""
    return next((name for name in detached if is_felt(cascade, name)), None)


def _raised(request: Request, constants: Mapping[str, TorchTensor]) -> tuple[Raiser, list[tuple[str, tuple[str, ...]]]]:
    """Raise, again with the variables split that the inputs need in parts, until none is."""
    splits: dict[Key, Expr] = {}
    for _ in range(_ROUNDS):
        r = Raiser(request.core, request.products, constants, splits, request.scores, request.owned,
                   device_of(request.roots[0]))  # fmt: skip
        roots = [_root(r, k, node) for k, node in enumerate(request.roots)]
        if not r.wanted:
            if len({statement for statement, _ in roots}) != len(roots):
                raise Unraisable("two of its results are one value")
            return r, roots
        splits.update(r.wanted)
    raise Unraisable("its dimensions do not factor")


def _ordered(cascade: Cascade, memory: Sequence[Sequence[str]], roots: Sequence[Node]
             ) -> tuple[Cascade, list[tuple[int, ...]]]:  # fmt: skip
    """The cascade with its outputs' ranks in the usual order and their nodes' dtypes, and how to permute them to their
    nodes' order (`memory`). An output that the cascade reads itself keeps its order."""
    read = {a.tensor for e in cascade.body for a in e.reads}
    body = {e.name: e for e in cascade.body}
    permutes = []
    for result, ranks, node in zip(cascade.outputs, memory, roots, strict=True):
        own = body[result].output.ranks if result in read else _natural(ranks)
        body[result] = body[result].replace(output=Tensor(result, own, dtype_name(node)))
        permutes.append(tuple(own.index(rank) for rank in ranks))
    return cascade.replace(body=tuple(body.values())), permutes


def _root(r: Raiser, k: int, node: Node) -> tuple[str, tuple[str, ...]]:
    """The statement that is the value of a root, and its ranks in the order in which they make up the node's shape."""
    index, names = _root_index(r, k, node)
    value = r.read(node, index)
    seen = free_vars(value)
    names = tuple(n for n in names if n in seen or not is_one(r.extents[n]))
    statements = {e.name: e.output.ranks for e in r.body}
    if isinstance(value, Access) and value.tensor in statements and all(i.is_Symbol for i in value.index):
        own = dict(zip(map(str, value.index), statements[value.tensor], strict=True))
        if sorted(own) == sorted(names) and len(own) == len(value.index):
            return value.tensor, tuple(own[n] for n in names)
    name = f"%{len(r.body)}"
    r.body.append(Einsum(Tensor(name, names, dtype_name(node)), value))
    r.defined[node, "root", k] = (name, tuple((n,) for n in names))
    return name, names


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


def _natural(memory: Sequence[str]) -> tuple[str, ...]:
    """Batches first, then rows, then the width: the order that kernels and readers expect."""
    rows = [n for n in memory if n[0] in "pqo"]
    width = [n for n in memory if n[0] in "fvd" or n[0] in "mns"]
    return (*(n for n in memory if n not in rows and n not in width), *rows, *width)
