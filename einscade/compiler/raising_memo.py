"""Equal layers are raised once: a region whose nodes correspond to an earlier one's has the same cascade.

Comes in: a region to raise, and the earlier ones with every node that their raising looked at. Goes out: the earlier
result with this region's nodes in place of the other's, or None. Two nodes correspond if they have the same operation,
the same plain arguments, the same fake value, the same place in the region, and corresponding inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor as TorchTensor
from torch.fx import Node

from einscade.compiler.aten_facts import readers

__all__ = ["Correspondence", "Memo", "Request"]


@dataclass(frozen=True)
class Request:
    """What is to be raised: the region's nodes, those read like a contraction's operands, the contractions that make
    the intermediate, the one that consumes it, the nodes whose values are wanted, and the nodes of all regions (what
    another one owns is read as it is, for only its results will be there)."""

    core: Collection[Node]
    products: Collection[Node]
    scores: tuple[Node, ...]
    values: Node
    roots: tuple[Node, ...]
    owned: Collection[Node]

    @property
    def key(self) -> tuple[Any, ...]:
        return (len(self.core), len(self.roots), self.roots[0].target, _shape(self.roots[0].meta.get("val")))


Correspondence = dict[Node, Node]


@dataclass
class Memo:
    """The regions raised so far in one graph, with a result of any kind each."""

    constants: Mapping[str, TorchTensor]
    _entries: dict[tuple[Any, ...], list[tuple[Request, Collection[Node], Any]]] = field(default_factory=dict)

    def add(self, request: Request, touched: Collection[Node], result: Any) -> None:
        self._entries.setdefault(request.key, []).append((request, touched, result))

    def find(self, request: Request) -> tuple[Any, Correspondence] | None:
        """An earlier result, and which of its nodes is which of this region's."""
        for earlier, touched, result in self._entries.get(request.key, ()):
            nodes = self._correspondence(earlier, request, touched)
            if nodes is not None:
                return result, nodes
        return None

    def _correspondence(self, a: Request, b: Request, touched: Collection[Node]) -> Correspondence | None:
        found: Correspondence = {}
        taken: dict[Node, Node] = {}
        stack = list(zip(a.roots, b.roots, strict=True))
        while stack:
            x, y = stack.pop()
            if x in found or y in taken:
                if found.get(x) is not y:
                    return None
                continue
            if not self._alike(x, y, a, b):
                return None
            found[x], taken[y] = y, x
            followed = _followed(x, touched)
            if followed and not (_pair(x.args, y.args, touched, stack) and _pair(x.kwargs, y.kwargs, touched, stack)):
                return None
        same = found.get(a.values) is b.values and [found.get(s) for s in a.scores] == list(b.scores)
        return found if same else None

    def _alike(self, x: Node, y: Node, a: Request, b: Request) -> bool:
        if x is y:
            return (x in a.core) == (y in b.core)
        if x.op != y.op or (x.op == "call_function" and x.target is not y.target) or not _same_value(x, y):
            return False
        if (x in a.owned) != (y in b.owned) or (x in a.core) != (y in b.core) or (x in a.products) != (y in b.products):
            return False
        if x in a.core and _used_inside(x, a.core) != _used_inside(y, b.core):
            return False
        one, two = self.constants.get(x.name), self.constants.get(y.name)
        if one is None or two is None:
            return one is two
        return one is two or (one.device == two.device and torch.equal(one, two))


def _used_inside(node: Node, core: Collection[Node]) -> int:
    return sum(user in core for user in readers(node))


def _followed(node: Node, touched: Collection[Node]) -> bool:
    """Whether a node's inputs matter: it was looked at, or it is several results of which one was."""
    return node in touched or isinstance(node.meta.get("val"), tuple | list)


def _pair(x: Any, y: Any, touched: Collection[Node], stack: list[tuple[Node, Node]]) -> bool:
    """Compare two arguments; nodes whose elements matter are put on the stack, of others only the shape counts."""
    if isinstance(x, Node):
        if not isinstance(y, Node):
            return False
        if _followed(x, touched):
            stack.append((x, y))
            return True
        return _same_value(x, y)
    if isinstance(x, list | tuple):
        return isinstance(y, list | tuple) and len(x) == len(y) and all(
            _pair(i, j, touched, stack) for i, j in zip(x, y, strict=True))  # fmt: skip
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(_pair(x[k], y[k], touched, stack) for k in x)
    return type(x) is type(y) and str(x) == str(y)


def _same_value(x: Node, y: Node) -> bool:
    one, two = x.meta.get("val"), y.meta.get("val")
    if isinstance(one, TorchTensor) and isinstance(two, TorchTensor):
        return one.dtype == two.dtype and one.device == two.device and _shape(one) == _shape(two)
    return type(one) is type(two) and (str(one) == str(two) or isinstance(one, tuple | list))


def _shape(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, TorchTensor):
        return ()
    return tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in value.shape)
