"""Regions back into the graph, each as one operator.

Comes in: a functional ATen graph and its `Region`s. Goes out: the graph, changed in place, with
`torch.ops.einscade.cascade` where regions were, and for each region whether that was possible, or why not.

The operator stores each output in the memory order in which the graph reads it, so that the permutation and the reshape
that follow it are views.

Where a kernel is a call of torch's library and there is nothing to choose, that call itself is put into the graph
(`_written_in`): nothing of ours runs then, and what the call needs (a mask) the inner compiler sees, and makes once for
all layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from einscade.compiler import operators
from einscade.compiler.aten_facts import device_of, is_cpu_number
from einscade.compiler.capture import operations_of
from einscade.compiler.regions import Output, Region
from einscade.passes.statements import without_unused
from einscade.runtime import device as machine
from einscade.runtime.program import DTYPES, MemoryOrder, Program

__all__ = ["Unlowerable", "check", "lower", "program_of", "reading", "still_read"]

aten = torch.ops.aten


class Unlowerable(Exception):
    """A region has a cascade, but the operator cannot stand in its place; the message says why."""


def program_of(region: Region, recipe: str) -> Program:
    """The program of a region that has a cascade."""
    assert region.cascade is not None
    return Program(recipe, region.cascade, _memory_order(region))


def still_read(region: Region) -> Region | None:
    """The region with only the results that something reads: another region, put back before, may have given those
    that both have. None where it was a step of that one, or where a single product is what is left."""
    kept = tuple(o for o in region.outputs if o.node.users)
    if region.cascade is None or kept == region.outputs:
        return region
    names = zip(region.cascade.outputs, region.outputs, strict=True)
    cascade = without_unused(region.cascade.replace(outputs=tuple(name for name, o in names if o in kept)))
    if sum(e.reduce is not None for e in cascade.body) < 2:
        return None
    read = {a.tensor for e in cascade.body for a in e.reads}
    used = [(n, t) for n, t in zip(region.inputs, cascade.inputs, strict=True) if t.name in read]
    cascade = without_unused(cascade.replace(inputs=tuple(t for _, t in used)))
    return replace(region, cascade=cascade, outputs=kept, inputs=tuple(n for n, _ in used))


def reading(region: Region, replaced: Mapping[fx.Node, fx.Node]) -> Region:
    """The region with what stands for the results of others, put back before, where it reads those."""
    inputs = tuple(replaced.get(n, n) for n in region.inputs)
    sizes = {s: replaced.get(n, n) if isinstance(n, fx.Node) else n for s, n in region.sizes.items()}
    return replace(region, inputs=inputs, sizes=sizes)


def lower(
    gm: fx.GraphModule, region: Region, program: Program, written: Callable[..., Any] | None = None
) -> dict[fx.Node, fx.Node]:
    """Puts the operator for `region` into the graph and takes the region out; what stands for each of its outputs.

    written: the `run` of a generated module in torch operations, to be written into the graph instead of the operator
        where its operations do not depend on sizes.
    The caller recompiles the graph module when all regions are in. Raises Unlowerable, what the graph computes
    unchanged.
    """
    assert region.cascade is not None
    before = _place(region)
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    inside = set(region.nodes)  # what of it others still need (another region may share it) stays as it was
    made: list[fx.Node] = []
    sizes = _Sizes(gm, [n for n in position if position[n] < position[before] and n not in inside], made)
    try:
        with gm.graph.inserting_before(before):
            symbols = [sizes.of(region.sizes[s]) for s in region.cascade.symbols]
            region = replace(region, inputs=tuple(_moved(gm, n, region.device, made) for n in region.inputs))
            values = None if written is None else _written_in(before, region, symbols, written, made)
            if values is None:
                inputs = [_itself(n) for n in region.inputs]
                node = gm.graph.call_function(operators.cascade, (inputs, symbols, program.text))
                made.append(node)
                values = [gm.graph.call_function(operator.getitem, (node, i)) for i in range(len(region.outputs))]
                made += values
            results = [_output(gm, v, i, region, sizes, made) for i, v in enumerate(values)]
    except Unlowerable:
        for n in reversed(made):
            gm.graph.erase_node(n)
        raise
    _describe(made, region)
    for output, result in zip(region.outputs, results, strict=True):
        output.node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for n in sorted(inside & position.keys(), key=position.__getitem__, reverse=True):
        if not n.users:
            gm.graph.erase_node(n)
    return dict(zip((o.node for o in region.outputs), results, strict=True))


def _memory_order(region: Region) -> MemoryOrder:
    assert region.cascade is not None
    orders = []
    for name, output in zip(region.cascade.outputs, region.outputs, strict=True):
        ranks = region.cascade.tensors[name].ranks
        order = tuple(ranks[i] for i in output.permute)
        if order != ranks:
            orders.append((name, order))
    return tuple(orders)


def check(region: Region) -> None:
    """Raises Unlowerable where no kernel can be made for a region that has a cascade."""
    assert region.cascade is not None
    device = region.device
    used = [o.node for o in region.outputs] + [n for n in region.inputs if not is_cpu_number(n)]
    if len(devices := {device, *map(device_of, used)}) != 1:
        raise Unlowerable(f"its inputs and results are on different devices: {', '.join(sorted(map(str, devices)))}")
    if not machine.supported(device):
        raise Unlowerable(f"no kernels are generated for {device.type} devices, only for cpu and cuda")
    for output in region.outputs:
        if not (dtype := output.node.meta["val"].dtype).is_floating_point:
            raise Unlowerable(f"its result is {dtype}: kernels accumulate in floating point")
    for node, tensor in zip(region.inputs, region.cascade.inputs, strict=True):
        if node.meta["val"].dtype != DTYPES.get(tensor.dtype):
            raise Unlowerable(f"input {node.name} is {node.meta['val'].dtype}, which the cascade has as {tensor.dtype}")


def _place(region: Region) -> fx.Node:
    """The first node that reads a result from outside or that writes to memory after the region began to read. What the
    region reads and is made later moves before it, unless that cannot be done without changing a value."""
    position = {n: i for i, n in enumerate(region.outputs[0].node.graph.nodes)}
    inside = set(region.nodes)
    users = [u for o in region.outputs for u in o.node.users if u not in inside]
    if not users:
        raise Unlowerable("nothing reads its result")
    begin = min(position[n] for n in inside if n in position)  # another region may have taken some out
    writes = [n for n, at in position.items() if at > begin and _writes(n)]
    first = min((*users, *writes), key=position.__getitem__)
    for source in (sources := [*region.inputs, *(n for n in region.sizes.values() if isinstance(n, fx.Node))]):
        if source in inside:
            raise Unlowerable(f"it reads {source.name}, which is part of it")
        if source not in position:
            raise Unlowerable(f"it reads {source.name}, which became part of another site")
    late = _made_after(first, sources, position)
    for node in late:
        why = "needs its own result" if any(o.node in node.all_input_nodes for o in region.outputs) else None
        why = "draws random numbers" if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) else why
        why = "comes after an update" if any(position[w] <= position[node] for w in writes) else why
        if why:
            raise Unlowerable(f"{node.name}, which is needed before {first.name}, {why}")
    for node in late:
        first.prepend(node)
    return first


def _made_after(first: fx.Node, sources: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The sources that do not come before `first`, with all of theirs that do not, in order."""
    late: set[fx.Node] = set()
    stack = list(sources)
    while stack:
        node = stack.pop()
        if node not in late and position[node] >= position[first]:
            late.add(node)
            stack.extend(node.all_input_nodes)
    return sorted(late, key=position.__getitem__)


def _writes(node: fx.Node) -> bool:
    """Updates of the graph's inputs: all else in it is functional."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _written_in(
    before: fx.Node, region: Region, sizes: Sequence[Any], run: Callable[..., Any], made: list[fx.Node]
) -> list[fx.Node] | None:
    """The operations of a generated `run` as nodes before `before`, and which of them are its results; None where they
    depend on sizes, or on how inputs lie in memory. A call that the graph has already is not made again."""
    assert region.cascade is not None
    count, symbols = len(region.inputs), region.cascade.symbols
    given = [*region.inputs, *sizes]

    def flat(*values: Any) -> Any:
        return run(*values[:count], **dict(zip(symbols, values[count:], strict=True)))

    traced = operations_of(flat, [n.meta["val"] if isinstance(n, fx.Node) else n for n in given])
    if traced is None or any(n.op == "get_attr" or n.target is aten.as_strided.default for n in traced.nodes):
        return None
    here: dict[fx.Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), given, strict=True))
    for node in traced.nodes:
        if node.op != "call_function":
            continue
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), here.__getitem__)
        args, kwargs = arguments
        new = before.graph.call_function(node.target, args, kwargs)
        new.meta["val"] = node.meta["val"]
        present = _earlier(new)
        if present is None:
            made.append(new)
        else:
            before.graph.erase_node(new)
        here[node] = present or new
    returned: Any = traced.output_node().args[0]
    return [here[n] for n in returned]


def _itself(node: fx.Node) -> fx.Node:
    """The node that this one is a view of from one end to the other: making it would cost a call for nothing."""

    def layout(n: fx.Node) -> list[str]:
        value = n.meta["val"]
        return [str(x) for x in (value.dtype, *value.shape, *value.stride(), value.storage_offset())]

    while node.target in (aten.expand.default, aten.view.default) and layout(node) == layout(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _moved(gm: fx.GraphModule, node: fx.Node, device: torch.device, made: list[fx.Node]) -> fx.Node:
    """The node on a device: PyTorch takes a number that lies on the CPU anywhere, a kernel takes its inputs' device."""
    if device_of(node) == device:
        return node
    to: Any = {"device": device}
    moved = gm.graph.call_function(aten._to_copy.default, (node,), to)
    with node.meta["val"].fake_mode, torch.no_grad():
        moved.meta["val"] = aten._to_copy.default(node.meta["val"], **to)
    made.append(moved)
    return moved


def _earlier(node: fx.Node) -> fx.Node | None:
    """A node that makes the same call before this one."""
    inputs = node.all_input_nodes
    alike = inputs[0].users if inputs else node.graph.find_nodes(op="call_function", target=node.target)
    for n in alike:
        if n < node and (n.target, n.args, n.kwargs) == (node.target, node.args, node.kwargs):
            return n
    return None


def _output(
    gm: fx.GraphModule, result: fx.Node, index: int, region: Region, sizes: _Sizes, made: list[fx.Node]
) -> fx.Node:
    """What stands for an output of the region, from the cascade's output."""
    output = region.outputs[index]
    value = output.node.meta["val"]
    if tuple(output.permute) != tuple(range(len(output.permute))):
        result = gm.graph.call_function(aten.permute.default, (result, list(output.permute)))
        made.append(result)
    assert region.cascade is not None
    if len(output.permute) != value.dim() or not _same_extents(region, index, output, value):
        result = gm.graph.call_function(aten.reshape.default, (result, [sizes.of(n) for n in value.shape]))
        made.append(result)
    return result


def _same_extents(region: Region, index: int, output: Output, value: torch.Tensor) -> bool:
    """Whether the permuted output has the node's shape already, dimension by dimension (constants and bare symbols)."""
    assert region.cascade is not None
    ranks = region.cascade.tensors[region.cascade.outputs[index]].ranks
    for axis, size in zip(output.permute, value.shape, strict=True):
        extent = region.cascade.extent(ranks[axis])
        known: Any = int(extent) if extent.is_Integer else region.sizes.get(extent.name) if extent.is_Symbol else None
        if isinstance(known, fx.Node):
            known = known.meta.get("val")
        if known is None or str(known) != str(size):
            return False
    return True


def _describe(made: Sequence[fx.Node], region: Region) -> None:
    """The new nodes say where they come from as the old ones did; fake values are theirs."""
    source = region.outputs[0].node
    for n in made:
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in source.meta and name not in n.meta:
                n.meta[name] = source.meta[name]
        if "val" in n.meta:
            continue
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: a.meta["val"])
        mode = region.inputs[0].meta["val"].fake_mode
        with mode, torch.no_grad():
            n.meta["val"] = n.target(*args, **kwargs)  # type: ignore[operator]


class _Sizes:
    """Sizes as arguments of nodes: numbers stay, symbols become the node that holds them, or are read off a tensor.
    `earlier` are the nodes that may be read: those before the operator that stay in the graph."""

    def __init__(self, gm: fx.GraphModule, earlier: Sequence[fx.Node], made: list[fx.Node]) -> None:
        self.gm, self.earlier, self.made = gm, earlier, made
        self.known: dict[sympy.Expr, fx.Node] = {}

    def of(self, size: int | torch.SymInt | fx.Node) -> int | fx.Node:
        if isinstance(size, (int, fx.Node)):
            return size
        if size.node.expr.is_Integer:
            return int(size.node.expr)
        return self.symbolic(size.node.expr)

    def symbolic(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self.known:
            self.known[expr] = self.found(expr) or self.computed(expr)
        return self.known[expr]

    def found(self, expr: sympy.Expr) -> fx.Node | None:
        for n in self.earlier:
            value = n.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expr:
                return n
        for n in self.earlier:
            value = n.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            for axis, length in enumerate(value.shape):
                if isinstance(length, torch.SymInt) and length.node.expr == expr:
                    node = self.gm.graph.call_function(aten.sym_size.int, (n, axis))
                    node.meta["val"] = length
                    self.made.append(node)
                    return node
        return None

    def computed(self, expr: sympy.Expr) -> fx.Node:
        """An expression that no tensor has as a size, from those that one has."""
        operation = _ARITHMETIC.get(type(expr).__name__)
        if operation is None or not expr.args:
            raise Unlowerable(f"no tensor has the size {expr}")
        result = self.symbolic(expr.args[0])
        for argument in expr.args[1:]:
            right = self.symbolic(argument)
            values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in (result, right)]
            result = self.gm.graph.call_function(operation, (result, right))
            result.meta["val"] = operation(*values)
            self.made.append(result)
        return result


_ARITHMETIC = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "Mod": operator.mod,
    "PythonMod": operator.mod, "Pow": operator.pow, "Max": torch.sym_max, "Min": torch.sym_min,
}  # fmt: skip
