"""Which parts of a graph are attention: an intermediate over two free ranks that is made and consumed inside.

Comes in: a functional ATen graph whose nodes have `meta["val"]`. Goes out: `Region`s in graph order, each with its
cascade, or with the reason why it has none. Nothing here knows a model or a spelling: `regions_scan` finds the two
contractions by how ranks flow, and everything between them is raised operation by operation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from einscade.compiler.aten_facts import Unraisable, device_of, is_tensor, op_name, readers
from einscade.compiler.aten_pointwise import NUMERIC
from einscade.compiler.aten_views import VIEWS, is_copy
from einscade.compiler.raising_memo import Memo, Request
from einscade.compiler.raising_region import Output, raise_region
from einscade.compiler.regions_scan import Candidate, products_of, scan, widths_of
from einscade.compiler.settling import held_whole
from einscade.ir.cascade import Cascade
from einscade.ir.expr import free_vars
from einscade.ir.verify import CascadeError

__all__ = ["Output", "Region", "find", "is_weight"]


@dataclass(frozen=True)
class Region:
    """One site. `cascade` is None where it cannot be raised, and `reason` says which operation stopped it.

    `inputs` are in the order of `cascade.inputs`; `sizes` maps the cascade's symbols to an int, a SymInt, or the node
    that holds it; `nodes` are the region's own nodes, in graph order, which the outputs replace; `known` are the inputs
    of the graph whose values became part of the cascade; `detached` says that gradients stop inside, at a statement;
    `widths` are the graph's symbols that a kernel needs as numbers (see `settling`).
    """

    cascade: Cascade | None
    inputs: tuple[Node, ...]
    sizes: Mapping[str, int | torch.SymInt | Node]
    outputs: tuple[Output, ...]
    nodes: tuple[Node, ...]
    module_path: str
    source: str
    reason: str | None = None
    known: frozenset[Node] = frozenset()
    detached: bool = False
    widths: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where it computes: that of its result."""
        return device_of(self.outputs[0].node)


def find(gm: GraphModule, constants: Mapping[str, torch.Tensor] | None = None,
         parameters: Collection[str] = ()) -> list[Region]:  # fmt: skip
    """The attention regions of a graph, those that could not be raised among them.

    `constants` are the values of placeholders (by name) that never change; buffers of `gm` are known without it.
    `parameters` names the placeholders that are weights, where their fake tensors do not say so themselves.
    """
    return _Finder(gm, dict(constants or {}), set(parameters)).run()


@dataclass(frozen=True, eq=False)
class _Draft:
    """A candidate with its nodes; `root` is the node whose value the region is for."""

    scores: tuple[Node, ...]
    values: Node
    core: frozenset[Node]
    root: Node
    order: int
    widths: frozenset[str]


class _Finder:
    def __init__(self, gm: GraphModule, constants: dict[str, torch.Tensor], parameters: set[str]) -> None:
        self.gm = gm
        self.position = {node: k for k, node in enumerate(gm.graph.nodes)}
        self.constants = constants
        self.memo = Memo(constants)
        self.static: set[Node] = set()
        self.parameters: set[Node] = set()
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "placeholder" and (node.name in parameters or is_weight(node)):
                self.static.add(node)
                if node.name in parameters or isinstance(node.meta.get("val"), torch.nn.Parameter):
                    self.parameters.add(node)

    def _attribute(self, node: Node) -> None:
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if not isinstance(value, torch.Tensor):
            return
        self.static.add(node)
        if isinstance(value, torch.nn.Parameter):
            self.parameters.add(node)
        if not isinstance(value, torch.nn.Parameter) and not value.requires_grad and not _written(node):
            self.constants.setdefault(node.name, value)

    def run(self) -> list[Region]:
        drafts = [self._draft(c) for c in scan(self.gm, self.static, self.position, self.parameters)]
        holders: dict[Node, list[_Draft]] = {}
        for draft in drafts:
            for node in draft.core:
                holders.setdefault(node, []).append(draft)
        found = {draft: self._region(draft, holders) for draft in drafts}
        return [found[d] for d in drafts if not any(_within(d, e) and found[e].cascade for e in holders[d.values])]

    def _draft(self, candidate: Candidate) -> _Draft:
        core = self._between(candidate)
        core |= self._on_the_way(core, self._result(candidate.values, core))
        root = self._root(candidate.values, core)
        widths = frozenset(s for size in widths_of(candidate) for s in free_vars(size))
        order = self.position[candidate.values]
        return _Draft(candidate.scores, candidate.values, frozenset(core), root, order, widths)

    def _region(self, draft: _Draft, holders: Mapping[Node, list[_Draft]]) -> Region:
        core, values = draft.core, draft.values
        scores = tuple(s for s in draft.scores if s in core)
        nodes = tuple(sorted(core, key=self.position.__getitem__))
        where = (_module_path(values), _source(values))
        products = {p for node in (*scores, values) for p in products_of(node)}
        others = [n for n in nodes if n is not draft.root and is_tensor(n) and _escapes(n, core, holders)]
        try:
            request = Request(core, products, scores, values, (draft.root, *others), holders)
            raised = raise_region(request, self.memo, "attention")
            used = {new: old for new, old in raised.symbols.items() if new in raised.cascade.symbols}
            if missing := sorted(set(used.values()) - set(self._sizes)):
                raise Unraisable(f"no node of the graph has the size {missing[0]}")
        except Unraisable as stop:
            return Region(None, (), {}, (), nodes, *where, reason=str(stop), widths=draft.widths)
        except (CascadeError, RecursionError) as error:
            reason = f"raising failed: {error}"
            return Region(None, (), {}, (), nodes, *where, reason=reason, widths=draft.widths)
        sizes = {new: self._sizes[old] for new, old in used.items()}
        # Which ranks are lengths shows once the widths are numbers.
        widths = draft.widths or frozenset(raised.symbols[s] for s in held_whole(raised.cascade))
        return Region(raised.cascade, raised.inputs, sizes, raised.outputs, nodes, *where, known=raised.known,
                      detached=raised.detached is not None, widths=widths)  # fmt: skip

    def _between(self, candidate: Candidate) -> set[Node]:
        """The nodes on the paths from what makes the intermediate to what consumes it."""
        if candidate.intermediate is None:
            return {candidate.values}
        core = self._on_the_way(candidate.scores, candidate.values)
        for node in candidate.scores:
            core.update(products_of(node))
        return core

    def _on_the_way(self, begins: Collection[Node], end: Node) -> set[Node]:
        """The nodes on the paths to `end` from those of `begins` that come last on them, both included."""
        start = min(map(self.position.__getitem__, begins))
        above: set[Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node not in above and self.position[node] >= start:
                above.add(node)
                stack += () if node in begins else node.all_input_nodes
        found = above.intersection(begins)
        for node in sorted(above, key=self.position.__getitem__):
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def _result(self, values: Node, core: set[Node]) -> Node:
        """Where the value leaves the region: past a division by a sum of the region, as hand-written softmax has it."""
        node = values
        last = values
        for _ in range(8):
            users = readers(node)
            if len(users) != 1 or not self._follows(users[0]):
                return last
            before, node = node, users[0]
            others = [s for s in node.all_input_nodes if is_tensor(s) and s is not before]
            if others and all(self._from_region(s, core) for s in others):
                last = node
        return last

    def _follows(self, node: Node) -> bool:
        name = op_name(node)
        return name in VIEWS or is_copy(node) or name.removeprefix("aten::") in NUMERIC

    def _from_region(self, node: Node, core: set[Node]) -> bool:
        """Whether a node is computed from the region by a few reductions, views and pointwise operations."""
        for _ in range(8):
            if node in core:
                return True
            sources = [s for s in node.all_input_nodes if is_tensor(s)]
            if node.op != "call_function" or len(sources) != 1:
                return False
            node = sources[0]
        return False

    def _root(self, values: Node, core: set[Node]) -> Node:
        """The last node that only moves or casts the result, so that the kernel writes what is read. `core` gets all of
        these."""
        inside = [n for n in core if not any(u in core for u in readers(n))]
        node = max(inside or [values], key=self.position.__getitem__)
        if not is_tensor(node):
            items = [u for u in node.users if op_name(u) == "getitem" and u.args[1] == 0]
            if items:
                core.add(items[0])
                node = items[0]
        while len(readers(node)) == 1:
            user = readers(node)[0]
            if user.op != "call_function" or not is_tensor(user) or not (is_copy(user) or op_name(user) in _RESHAPES):
                break
            if device_of(user) != device_of(node):
                break
            core.add(user)
            node = user
        return node

    @cached_property
    def _sizes(self) -> dict[str, torch.SymInt | Node]:
        """Every symbol of a shape: the node that holds it, else a SymInt equal to it."""
        found: dict[str, torch.SymInt | Node] = {}
        for node in self.gm.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                if not isinstance(found.get(str(value.node.expr)), Node):
                    found[str(value.node.expr)] = node
            elif isinstance(value, torch.Tensor):
                for size in value.shape:
                    if isinstance(size, torch.SymInt):
                        found.setdefault(str(size.node.expr), size)
        return found


_RESHAPES = frozenset({
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::permute", "aten::transpose", "aten::t", "aten::squeeze",
    "aten::unsqueeze",
})  # fmt: skip


def _within(inner: _Draft, outer: _Draft) -> bool:
    """Whether a region is a step of another (a mixing of heads), or the same one found by another of its ends."""
    if inner is outer or not inner.core <= outer.core:
        return False
    return inner.core < outer.core or inner.order > outer.order


def _escapes(node: Node, core: Collection[Node], holders: Mapping[Node, list[_Draft]]) -> bool:
    """Whether a node of a region is read from outside: by no region, or by one that does not make it again itself."""
    for user in readers(node):
        if user not in core:
            users = holders.get(user, [])
            if not users or any(node not in other.core for other in users):
                return True
    return False


def is_weight(node: Node) -> bool:
    """A parameter or buffer that was lifted to an input (Dynamo marks those)."""
    marked = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    return marked or isinstance(node.meta.get("val"), torch.nn.Parameter)


def _written(node: Node) -> bool:
    return any(op_name(u).endswith("copy_") for u in node.users)


def _module_path(node: Node) -> str:
    """The innermost module that the node's operation ran in, as `named_modules` calls it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return _attribute_path(paths[-1]) if paths else ""


def _attribute_path(path: str) -> str:
    path = re.sub(r"^L\['[^']*'\]\.?|^L__self___?", "", path)
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).strip(".")


_PACKAGE = str(Path(__file__).parents[1])
_FRAME = re.compile(r'File "([^"]*)", line (\d+)')


def _source(node: Node) -> str:
    """`file.py:line` of the innermost frame that is not torch's own, if any is; ours are none."""
    frames = [f for f in _FRAME.findall(node.meta.get("stack_trace") or "") if not f[0].startswith(_PACKAGE)]
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}" if own else ""
