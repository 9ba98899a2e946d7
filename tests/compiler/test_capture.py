"""Capture keeps the meaning of a graph: values, gradients, grad mode, autocast, writes, opaque operators, names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from einscade.compiler.capture import Captured, CaptureError, fake_inputs, made_fake, nested_graphs, to_aten

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def captured(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[Captured, fx.GraphModule, list]:
    """The capture of the one graph that Dynamo makes of a call, the torch-level graph, and its real inputs."""
    made: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        made.extend((to_aten(gm, fake_inputs(gm, inputs)), gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return tuple(made)


def _targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_values_names_and_meta_survive() -> None:
    layer = nn.Linear(8, 8)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(layer(x), -1)

    found, gm, inputs = captured(f, torch.randn(3, 8))
    torch.testing.assert_close(found.gm(*inputs), gm(*inputs), rtol=0, atol=0)
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    assert [n.name for n in found.gm.graph.find_nodes(op="placeholder")] == names
    assert _targets(found.gm) == ["aten.linear.default", "aten._softmax.default"]
    for node in found.gm.graph.find_nodes(op="call_function", target=torch.ops.aten._softmax.default):
        assert isinstance(node.meta["val"], FakeTensor)
        assert "test_capture.py" in node.meta["stack_trace"]
    assert [n.meta["requires_grad"] for n in found.gm.graph.find_nodes(op="placeholder")].count(True) == 2


def test_sizes_stay_symbols() -> None:
    found, gm, _ = captured(lambda x: x.reshape(x.shape[0] * x.shape[1], -1) + 1, torch.randn(3, 4, 5), dynamic=True)
    placeholders = found.gm.graph.find_nodes(op="placeholder")
    assert sum(isinstance(n.meta["val"], torch.SymInt) for n in placeholders) == 3
    for shape in ((3, 4, 5), (2, 7, 6)):
        x = torch.randn(shape)
        inputs = [x if isinstance(n.meta["val"], torch.Tensor) else None for n in placeholders]
        symbols = iter(shape)
        inputs = [next(symbols) if v is None else v for v in inputs]
        torch.testing.assert_close(found.gm(*inputs), gm(*inputs), rtol=0, atol=0)


def test_in_place_work_on_temporaries_disappears() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.mT
        scores.mul_(0.5)
        scores[:, 0] += 1
        scores.masked_fill_(scores > 1, -torch.inf)
        return scores.softmax(-1)

    found, gm, inputs = captured(f, torch.randn(4, 6))
    assert not any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in found.gm.graph.nodes)
    torch.testing.assert_close(found.gm(*inputs), gm(*inputs), rtol=0, atol=0)


def test_writes_to_inputs_happen_once_at_the_end() -> None:
    def f(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[:, 1:3] = x
        view = cache.view(-1)
        view[0] = 7
        drawn = torch.nn.functional.dropout(x, 0.5, training=True)
        return cache.sum() + torch.nn.functional.linear(x, drawn).sum()

    cache, x = torch.zeros(2, 4), torch.randn(2, 2)
    found, gm, _ = captured(f, cache.clone(), x)
    mutating = [n for n in found.gm.graph.nodes if isinstance(n.target, OpOverload) and n.target._schema.is_mutable]
    assert [str(n.target) for n in mutating] == ["aten.copy_.default"]
    assert "aten.linear.default" in _targets(found.gm)
    assert "aten.dropout.default" in _targets(found.gm)
    ours, theirs = cache.clone(), cache.clone()
    results = []
    for g, written in ((found.gm, ours), (gm, theirs)):
        torch.manual_seed(3)
        results.append(g(written, x))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_running_statistics_are_written() -> None:
    norm = nn.BatchNorm1d(5).train()
    reference = copy.deepcopy(norm)
    x = torch.randn(16, 5)
    traced = fx.symbolic_trace(nn.Sequential(norm))
    found = to_aten(traced, made_fake([x]))
    before = copy.deepcopy(norm.state_dict())
    torch.testing.assert_close(found.gm(x), reference(x))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
        assert not torch.equal(value, before[name]) or name in ("weight", "bias")


def test_no_grad_inside_stays() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = (x @ w).exp()
        return (scale * (x @ w)).sum()

    x, w = torch.randn(3, 3), torch.randn(3, 3, requires_grad=True)
    found, gm, inputs = captured(f, x, w)
    grads = [torch.autograd.grad(g(*inputs)[0], w)[0] for g in (found.gm, gm)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_detach_stays() -> None:
    x = torch.randn(3, 3, requires_grad=True)
    found, gm, inputs = captured(lambda x: (x.detach() * x).sum(), x)
    grads = [torch.autograd.grad(g(*inputs)[0], x)[0] for g in (found.gm, gm)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("ambient", [False, True])
def test_autocast_becomes_casts(ambient: bool) -> None:
    layer = nn.Linear(8, 8)

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", enabled=not ambient, dtype=torch.bfloat16):
            y = layer(x)
        attended = torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])
        return y, x @ x.mT, attended

    x = torch.randn(3, 8)
    with torch.autocast("cpu", enabled=ambient, dtype=torch.bfloat16):
        found, gm, inputs = captured(f, x)
        expected = gm(*inputs)
    assert found.autocast
    for ours, theirs in zip(found.gm(*inputs), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_dropout(training: bool) -> None:
    drop = nn.Dropout(0.5).train(training)
    found, gm, inputs = captured(lambda x: drop(x) + 1, torch.randn(40, 8))
    assert ("aten.dropout.default" in _targets(found.gm)) == training
    results = []
    for g in (found.gm, gm):
        torch.manual_seed(3)
        results.append(g(*inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_random_numbers_are_drawn_in_order() -> None:
    found, gm, inputs = captured(
        lambda x: torch.rand_like(x) - torch.randn_like(x) * x.bernoulli(0.5), torch.rand(9, 9)
    )
    results = []
    for g in (found.gm, gm):
        torch.manual_seed(3)
        results.append(g(*inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_checkpointed_blocks_are_captured_within() -> None:
    layer = nn.Linear(8, 8)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(layer(x) @ x.mT, -1) @ x

    x = torch.randn(5, 8, requires_grad=True)
    found, gm, inputs = captured(lambda x: checkpoint(block, x, use_reentrant=False) + 1, x)
    inner, outer = nested_graphs(found.gm)
    assert outer is found.gm
    assert "aten._softmax.default" in _targets(inner)
    assert not any("softmax" in t for t in _targets(outer))
    grads = [torch.autograd.grad(g(*inputs)[0].square().sum(), x)[0] for g in (found.gm, gm)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_conditions_stay_opaque() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)) * 2

    found, gm, inputs = captured(f, torch.rand(3))
    for x in (torch.rand(3), -torch.rand(3)):
        arguments = [x if v is inputs[0] else v for v in inputs]
        torch.testing.assert_close(found.gm(*arguments), gm(*arguments))


def test_views_and_aliases_of_inputs_stay_what_they_are() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return x, x.transpose(0, 1), x[1:]

    x = torch.randn(3, 4)
    a, b, c = to_aten(fx.symbolic_trace(Views()), made_fake([x])).gm(x)
    assert a is x
    assert b.data_ptr() == x.data_ptr()
    assert c.storage_offset() == 4


def test_tied_and_nested_parameters_keep_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4, bias=False))
            self.table = torch.arange(4.0)
            self.again = self.inner[0].weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) @ self.again + self.table

    traced = fx.symbolic_trace(Tied())
    x = torch.randn(3, 4)
    found = to_aten(traced, made_fake([x]))
    torch.testing.assert_close(found.gm(x), traced(x), rtol=0, atol=0)
    assert {id(p) for p in found.gm.parameters()} == {id(p) for p in traced.parameters()}
    read = {n.target for n in found.gm.graph.find_nodes(op="get_attr")}
    assert read <= {"inner.0.weight", "again", *(n.target for n in traced.graph.find_nodes(op="get_attr"))}


def test_what_cannot_be_captured_says_so() -> None:
    with pytest.raises(CaptureError, match="requires_grad_"):
        to_aten(fx.symbolic_trace(lambda x: x.requires_grad_() + 1), made_fake([torch.randn(3)]))
    with pytest.raises(CaptureError, match="same reduction dim"):
        to_aten(fx.symbolic_trace(lambda x: x @ x), made_fake([torch.randn(3, 4)]))
    with pytest.raises(CaptureError, match="no example inputs were given"):
        fake_inputs(fx.symbolic_trace(lambda x: x + 1), None)
    with pytest.raises(CaptureError, match="1 inputs, 2 examples"):
        fake_inputs(fx.symbolic_trace(lambda x: x + 1), [torch.zeros(1), torch.zeros(1)])


class BiasedProduct(nn.Module):
    def forward(self, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return bias.baddbmm(a, b)


def test_operations_whose_fake_kernels_take_numbers_only() -> None:
    """`baddbmm` with a bias that is expanded, where lengths move."""
    gm = torch.fx.symbolic_trace(BiasedProduct())
    args = [torch.randn(3, 1, 7), torch.randn(3, 5, 4), torch.randn(3, 4, 7)]
    captured = to_aten(gm, fake_inputs(gm, args, dynamic=True)).gm
    (node,) = captured.graph.find_nodes(op="call_function", target=torch.ops.aten.baddbmm.default)
    assert all(isinstance(n, torch.SymInt) for n in node.meta["val"].shape)
    torch.testing.assert_close(captured(*args), gm(*args))
