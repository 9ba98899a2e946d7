"""One captured graph: its regions found, raised, and put back as operators.

Comes in: a functional ATen graph (changed in place) and a recipe. Goes out: a `Site` per region, and the names of the
constants that cascades were specialised on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from einscade.compiler.capture import nested_graphs
from einscade.compiler.lowering import Unlowerable, check, lower, program_of, reading, still_read
from einscade.compiler.regions import Region, find, is_weight
from einscade.compiler.report import REWRITTEN, UNCHANGED, Site
from einscade.compiler.settling import open_because, settle, settle_signs, symbols_of
from einscade.runtime import progress
from einscade.runtime.messages import first_line, warn_once
from einscade.runtime.program import remember

__all__ = ["Rewritten", "rewrite"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """`relied_on`: targets of the placeholders and attributes whose values became part of a cascade."""

    sites: list[Site]
    relied_on: frozenset[str]


def rewrite(
    gm: fx.GraphModule,
    recipe: str,
    constants: Mapping[str, torch.Tensor],
    parameters: Collection[str],
    within: str = "",
    settled: bool = True,
) -> Rewritten:
    """Puts an operator in the place of every region that has a cascade, in `gm` and in the graphs that it calls.

    `constants` are placeholders (by name) whose values are known, `parameters` those that are weights, `within` is the
    path of the module that the graph's module paths begin at. `settled`: widths among the sizes become numbers.
    """
    graphs = list(nested_graphs(gm))
    needed = {graph: _differentiable(graph) for graph in graphs}
    for graph in graphs:
        _without_idle_detaches(graph, needed[graph])
    weights = _weights(gm, parameters)
    found = _found(gm, constants, weights, settled)
    relied_on = {n.target for graph, region in found for n in region.known if graph is gm}
    sites: list[Site] = []
    placed: dict[fx.Node, fx.Node] = {}
    for done, (graph, region) in enumerate(found):
        progress.step(done, len(found), region.module_path)
        if (left := still_read(region)) is None:
            continue
        region = reading(left, placed)
        sites.append(_site(graph, region, recipe, needed[graph], within, placed))
    if found:
        progress.step(len(found), len(found), "")
    for graph in graphs:
        _without_stride_assumptions(graph, set(placed.values()))
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
    return Rewritten(sites, frozenset(str(name) for name in relied_on))


def _found(
    gm: fx.GraphModule,
    constants: Mapping[str, torch.Tensor],
    weights: Mapping[fx.GraphModule, Collection[str]],
    settled: bool,
) -> list[tuple[fx.GraphModule, Region]]:
    """The regions of `gm` and of the graphs that it calls, found again for as long as there is something to settle:
    what a region is, and whether it can be raised, may hang on it."""
    graphs, known = list(nested_graphs(gm)), {gm: constants}
    while True:
        found = [(graph, r) for graph in graphs for r in find(graph, known.get(graph), weights[graph])]
        widths = {name for _, region in found for name in region.widths} if settled else set()
        if not (found and settle_signs(gm)) and not (widths and settle(widths, symbols_of(graphs))):
            return found


def _weights(gm: fx.GraphModule, parameters: Collection[str]) -> dict[fx.GraphModule, set[str]]:
    """The names of the placeholders that are weights, for `gm` and for each graph that it calls: a checkpointed block
    gets the weights that it uses as arguments."""
    found = {gm: set(parameters)}
    static: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            known = node.name in parameters or is_weight(node)
        else:
            known = node.op != "output" and static.issuperset(node.all_input_nodes) and not node.meta.get("captured")
        if known:
            static.add(node)
        graph = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(graph, fx.Node) and graph.meta.get("captured"):
            called = getattr(gm, str(graph.target))
            inside = called.graph.find_nodes(op="placeholder")
            given = {p.name for p, a in zip(inside, node.args[1:], strict=False) if a in static}
            for each, names in _weights(called, given).items():
                found[each] = found.get(each, names) & names
    return found


def _without_stride_assumptions(gm: fx.GraphModule, placed: Collection[fx.Node]) -> None:
    """What was `placed` for regions lies in memory as kernels write it. A view of what is computed from it was one by
    the original's strides, and becomes a reshape: a view where that is possible, a copy where it is not."""
    moved: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node in placed or any(n in moved for n in node.all_input_nodes):
            moved.add(node)
            if node.target is aten.view.default:
                node.target = aten.reshape.default


def _without_idle_detaches(gm: fx.GraphModule, differentiable: Collection[fx.Node]) -> None:
    """Only a detach that stops a gradient is one; the others (masks made under no_grad) are what they are made of."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.detach.default):
        source = node.args[0]
        if source not in differentiable:
            node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")


def _differentiable(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes through which gradients may flow to an input or a parameter."""
    found: set[fx.Node] = set()
    if not torch.is_grad_enabled():
        return found
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        parts = value if isinstance(value, (list, tuple)) else (value,)
        if not any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in parts):
            continue
        if node.op in ("placeholder", "get_attr"):
            wanted = node.meta.get("requires_grad", False)
        else:
            wanted = node.target is not aten.detach.default and any(n in found for n in node.all_input_nodes)
        if wanted:
            found.add(node)
    return found


def _site(
    gm: fx.GraphModule,
    region: Region,
    recipe: str,
    differentiable: Collection[fx.Node],
    within: str,
    placed: dict[fx.Node, fx.Node],
) -> Site:
    """The site of a region, which is lowered; `placed` gets what stands for its outputs."""
    where = (".".join(filter(None, (within, region.module_path))), region.source)
    frame = _frame()
    if region.cascade is None:
        return Site(*where, UNCHANGED, region.reason, frame=frame)
    program = remember(program_of(region, recipe))
    sizes = tuple((s, _hint(region.sizes[s])) for s in region.cascade.symbols)
    device = region.device
    needed = tuple(n in differentiable for n in region.inputs)
    site = Site(*where, REWRITTEN, _open(region), program, device, sizes, needed, frame)
    try:
        if region.detached and any(needed):
            raise Unlowerable("its gradient stops at a detach() inside, which a cascade cannot say")
        check(region)
        kernel = site.kernel  # built here, where progress is shown, rather than in the first call
        written = None if kernel is None or any(needed) else kernel.library_call
        placed.update(lower(gm, region, program, written))
    except Unlowerable as stop:
        site.status, site.reason = UNCHANGED, str(stop)
    except Exception as error:  # a site that we fail on costs that site, never the model
        site.status, site.reason = UNCHANGED, f"internal error, {first_line(error)}"
        warn_once(f"{region.module_path or 'a site'} ({region.source}) is left as it was: {site.reason}")
    return site


def _open(region: Region) -> str | None:
    """What keeps kernels for a GPU from a region that has a cascade; None where nothing does."""
    values = {s: n.meta["val"] if isinstance(n, fx.Node) else n for s, n in region.sizes.items()}
    moving = {s: n for s, n in values.items() if isinstance(n, torch.SymInt) and str(n.node.expr) in region.widths}
    told = [f"{s} {open_because(n) or 'has moved before'}" for s, n in moving.items()]
    return f"kernels for a GPU need widths as numbers, and {', '.join(told)}" if told else None


def _frame() -> int | None:
    """Dynamo's number of the code that is being compiled, the same when it is compiled again; None outside Dynamo."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def _hint(size: Any) -> int:
    """A size at capture time, for choosing a schedule."""
    if isinstance(size, fx.Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1024
    return int(size)
