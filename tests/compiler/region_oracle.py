"""The oracle of the region tests: every raised cascade, interpreted in float64, against the graph it was found in.

Comes in: a functional ATen graph and inputs. The graph is run node by node, so that what a region reads and what it
replaces are both known; the cascade gets the former and must give the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from einscade.compiler.regions import Region, find
from einscade.ir.interpret import interpret


def trace(function: Callable[..., Any], args: Sequence[Any], dynamic: Collection[int] = ()) -> GraphModule:
    """A functional ATen graph with fake tensors on its nodes; dimensions whose size is in `dynamic` get symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = []
    for arg in args:
        sizes = [DimDynamic.DUCK if n in dynamic else DimDynamic.STATIC for n in arg.shape]
        fakes.append(mode.from_tensor(arg, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    functional = torch.func.functionalize(function, remove="mutations")
    with torch.no_grad(), mode:
        kind = "symbolic" if dynamic else "real"  # "real" may take the numbers that symbols stand for
        gm = make_fx(functional, tracing_mode=kind, _allow_non_fake_inputs=True)(*fakes)
    gm.graph.eliminate_dead_code()
    return gm


class _Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = result = super().run_node(n)
        return result


def values_of(gm: GraphModule, args: Sequence[Any]) -> dict[Node, Any]:
    """What every node of the graph is for these inputs."""
    recorder = _Recorder(gm)
    with torch.no_grad():
        recorder.run(*args)
    return recorder.values


def outputs_of(region: Region, values: dict[Node, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per output of a region (what the cascade gives, what the graph had), in the shape of the graph's node."""
    assert region.cascade is not None, region.reason
    inputs = {t.name: values[n] for t, n in zip(region.cascade.inputs, region.inputs, strict=True)}
    results = interpret(region.cascade, inputs, {k: _number(v, values) for k, v in region.sizes.items()})
    pairs = []
    for name, output in zip(region.cascade.outputs, region.outputs, strict=True):
        expected = values[output.node]
        pairs.append((results[name].permute(output.permute).reshape(expected.shape), expected))
    return pairs


def _number(size: Any, values: dict[Node, Any]) -> int:
    if isinstance(size, Node):
        return int(values[size])
    if isinstance(size, torch.SymInt):
        for node, value in values.items():
            fake = node.meta.get("val")
            if isinstance(fake, torch.Tensor):
                for own, real in zip(fake.shape, value.shape, strict=True):
                    if str(own) == str(size):
                        return int(real)
    return int(size)


def check(gm: GraphModule, args: Sequence[Any], tolerance: float = 1e-9) -> list[Region]:
    """The graph's regions, each compared with what the graph computes (in float64, so that little may differ)."""
    regions = find(gm)
    values = values_of(gm, args)
    for region in regions:
        if region.cascade is not None:
            for got, expected in outputs_of(region, values):
                torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)
    return regions
