"""Regions in graphs that compute on several devices: what comes from another one is read as it was moved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from einscade.compiler.aten_facts import op_name
from einscade.compiler.lowering import check, lower, program_of
from einscade.compiler.regions import find

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")  # of fake tensors: no GPU is needed
P, M = 16, 24
TABLE = ((16, 4), torch.float32, GPU)


def put_back(function: Callable[..., Tensor], *others: tuple[tuple[int, ...], torch.dtype, torch.device]) -> fx.Graph:
    """The graph of `function(q, k, v, *others)` with its regions put back; queries, keys and values are on a GPU."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    given = [((2, 4, n, 8), torch.float32, GPU) for n in (P, M, M)]
    with mode, torch.no_grad():
        inputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in (*given, *others)]
        gm = make_fx(function, _allow_non_fake_inputs=True)(*inputs)
    gm.graph.eliminate_dead_code()
    regions = find(gm)
    assert regions
    for region in regions:
        assert region.cascade is not None, region.reason
        check(region)
        lower(gm, region, program_of(region, "exact"))
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    operators = [n for n in gm.graph.nodes if op_name(n) == "einscade::cascade"]
    assert len(operators) == len(regions)
    for operator in operators:
        assert {x.meta["val"].device for x in operator.args[0]} == {GPU}  # type: ignore[union-attr]
    return gm.graph


def operators(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if op_name(n) == "einscade::cascade"]


def names(graph: fx.Graph) -> list[str]:
    return [op_name(n) for n in graph.nodes]


def buckets() -> Tensor:
    """As relative positions are put into buckets on the CPU, whatever the model is on."""
    distance = torch.arange(M)[None, :] - torch.arange(P)[:, None]
    return ((distance.abs() + 1).float().log() * 4).long().clamp(max=15)


def biased(q: Tensor, k: Tensor, v: Tensor, table: Tensor, at: Tensor) -> Tensor:
    return (q @ k.mT + torch.ops.aten.index.Tensor(table, [at]).permute(2, 0, 1)).softmax(-1) @ v


def test_what_is_computed_on_another_device_stays_there() -> None:
    graph = put_back(lambda q, k, v, table: biased(q, k, v, table, buckets().to(q.device)), TABLE)
    assert "aten::log" in names(graph)


def test_a_mask_that_needs_no_tensor_of_the_other_device_is_a_domain() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(P, M, dtype=torch.bool).tril().to(q.device)
        return torch.where(seen, q @ k.mT, -torch.inf).softmax(-1) @ v

    (operator,) = operators(put_back(causal))
    assert len(operator.args[0]) == 3  # type: ignore[arg-type]


def test_an_index_on_another_device() -> None:
    """PyTorch takes it; a kernel does not."""
    graph = put_back(biased, TABLE, ((P, M), torch.int64, CPU))
    assert "aten::index" in names(graph)


def test_layers_differ_where_their_inputs_devices_do() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor, here: Tensor, there: Tensor) -> Tensor:
        return biased(biased(q, k, v, table, here), k, v, table, there)

    first, second = operators(put_back(function, TABLE, ((P, M), torch.int64, GPU), ((P, M), torch.int64, CPU)))
    assert first.args[2] != second.args[2]


def test_an_operand_is_read_behind_its_move() -> None:
    keys = ((2, 4, M, 8), torch.float32, CPU)
    put_back(lambda q, _, v, k: (q @ (k * 2).to(q.device).mT).softmax(-1) @ v, keys)


def test_a_number_on_the_cpu_is_moved_by_the_graph() -> None:
    put_back(lambda q, k, v, scale: (q @ k.mT * scale).softmax(-1) @ v, ((), torch.float32, CPU))
    put_back(lambda q, k, v, scale: (q @ k.mT * scale[3]).softmax(-1) @ v, ((8,), torch.float32, CPU))


def test_a_result_is_moved_behind_the_operator() -> None:
    graph = put_back(lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).cpu())
    (result,) = graph.output_node().all_input_nodes
    assert result.meta["val"].device == CPU
    assert op_name(result) == "aten::_to_copy"
