"""What is settled of sizes before kernels are written: widths are constants of a model, where every size may move too.

`dynamic=True` gives all sizes of bare tensors symbols, head widths among them. A kernel holds a width whole: it is
written for a number, and where there is none no kernel for a GPU can be written. Lengths and batches stay symbols, and
so do integers among the arguments (a window), of which the sign is settled: the IR's symbols have none.

Comes in: the regions of a graph, which say by structure what has to be a number (`Region.widths`). Goes out: those
symbols as the numbers that they are at this call, with a guard, so that Dynamo compiles again for another width. A size
that its user declared to move, or that did move time and again, is none; `open_because` says which it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch.fx import GraphModule

from einscade.compiler.aten_facts import is_nonnegative
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Expr, FloorDiv, Mod, free_vars

__all__ = ["WIDEST", "held_whole", "open_because", "settle", "settle_signs", "symbols_of"]

WIDEST = 1024
"""No kernel holds a wider row whole: what is contracted over more (channels attending over positions) is a length."""


def held_whole(cascade: Cascade) -> frozenset[str]:
    """The symbols of a cascade that kernels need as numbers, by structure: extents of what is reduced within the point
    of a pair of positions (a mixing of heads), and what indices are divided by (heads in groups, pages, blocks). What a
    length has in it is none: of a sequence's positions, or of what else scores are normalised over (where they are no
    product, or one query's)."""
    moving = cascade.lengths | _normalised(cascade)
    lengths = {s for r in moving for s in free_vars(cascade.extent(r))}
    reduced = {r for e in cascade.body if e.reduce for r in e.reduce.ranks} - moving
    extents = (cascade.extent(r) for r in reduced)
    found = {s for x in (*extents, *_divisors(cascade)) for s in free_vars(x)} - cascade.rank_table.keys()
    return frozenset(found - lengths)


def _normalised(cascade: Cascade) -> frozenset[str]:
    found: set[str] = set()
    for e in cascade.body:
        if e.reduce and e.reduce.monoid == "sum":
            reduced, scored = cascade.reduced_after(e.name)
            found |= reduced.intersection(e.output.ranks) if scored else set()
    return frozenset(found)


def _divisors(cascade: Cascade) -> Iterator[Expr]:
    for e in cascade.body:
        for expr in (e.expr, e.domain):
            yield from (part.args[1] for part in expr.atoms(FloorDiv, Mod))


def symbols_of(graphs: Collection[GraphModule]) -> dict[str, torch.SymInt]:
    """The sizes of the graphs' tensors that are one symbol each, by its name."""
    found: dict[str, torch.SymInt] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr.name, size)
    return found


def settle(names: Collection[str], sizes: Mapping[str, torch.SymInt]) -> bool:
    """Makes the sizes with these names numbers, where that is allowed; whether one was."""
    settled = False
    for name in sorted(names):
        if name in sizes and open_because(sizes[name]) is None:
            int(sizes[name])  # with a guard that it is this number
            settled |= sizes[name].node.expr.is_Integer
    return settled


def settle_signs(graph: GraphModule) -> bool:
    """Makes sure that the integers among a graph's inputs that are not negative never are; whether one was not known to
    be."""
    settled = False
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt) or not value.node.expr.is_Symbol or not value.node.has_hint():
            continue
        if not is_nonnegative(value) and value.node.hint >= 0 and not value.node.shape_env.frozen:
            settled |= bool(value >= 0)  # with a guard that it is
    return settled


def open_because(size: torch.SymInt) -> str | None:
    """Why a size has to stay a symbol; None where it may become a number."""
    env, name = size.node.shape_env, size.node.expr.name
    if not size.node.has_hint():
        return "is only known at run time"
    if env.frozen:
        return "moves in the exported program"
    if (n := int(size.node.hint)) > WIDEST:
        return f"is {n}: kernels hold {WIDEST} at most"
    for tracked in env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if constraints is None or not isinstance(tracked.fake, torch.Tensor):
            continue
        for extent, constraint in zip(tracked.fake.shape, constraints, strict=True):
            if constraint is not None and isinstance(extent, torch.SymInt) and str(extent.node.expr) == name:
                if not constraint.warn_only:
                    return "was marked as dynamic"
                if _compiled_often():  # Dynamo saw it at other values before
                    return "has moved before"
    return None


def _compiled_often() -> bool:
    """Whether half of the compilations that Dynamo allows are used up: the rest is for what is no width after all."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    often = torch._dynamo.config.recompile_limit // 2
    return compile_id is not None and (compile_id.frame_compile_id or 0) >= often
