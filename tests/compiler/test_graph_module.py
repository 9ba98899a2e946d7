"""An optimised GraphModule follows its inputs, modes and tensors: no answer comes from a graph made for others."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import einscade
from einscade.compiler import graph_module
from tests.models.small import CausalAttention, CrossAttention, assert_as_exact

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Tensor = torch.Tensor


class Masked(nn.Module):
    """Attention with a buffer of hidden points, which becomes a domain, and one of scales, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.ones(19, 19).triu(1).bool())
        self.register_buffer("scale", torch.rand(19, 1), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(self.hidden, -torch.inf).softmax(-1) @ torch.mul(v, self.scale)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Masked()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner(q, k, v)


def _qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 19, 8) for _ in range(3))


def _statuses(fast: Any) -> list[str]:
    return [site.status for site in fast.report.sites]


@pytest.fixture(params=[None, "aot_eager"], ids=["as a graph", "compiled"])
def inner(request: pytest.FixtureRequest) -> str | None:
    return request.param


def test_state_dict_is_the_original_s(inner: str | None) -> None:
    traced = fx.symbolic_trace(Nested())
    fast = einscade.optimize(traced, inner=inner, example_inputs=(_qkv(), {}))
    assert list(fast.state_dict()) == list(traced.state_dict())
    assert all(a is b for a, b in zip(fast.buffers(), traced.buffers(), strict=True))


def test_a_buffer_written_in_place(inner: str | None) -> None:
    traced, args = fx.symbolic_trace(Masked()), _qkv()
    fast = einscade.optimize(traced, inner=inner)
    assert_as_exact(fast, traced, args)
    traced.hidden.logical_and_(~torch.eye(19).bool().flip(0))
    assert_as_exact(fast, traced, args)
    assert _statuses(fast) == ["rewritten"]


@pytest.mark.parametrize("name", ["hidden", "scale"])
def test_a_buffer_rebound_on_the_result(inner: str | None, name: str) -> None:
    traced, args = fx.symbolic_trace(Masked()), _qkv()
    fast = einscade.optimize(traced, inner=inner)
    fast(*args)
    new = torch.ones(19, 19).triu(4).bool() if name == "hidden" else torch.rand(19, 1)
    before = getattr(traced, name)
    setattr(fast, name, new)
    assert getattr(traced, name) is before, "the original is untouched"
    expected = copy.deepcopy(traced)
    setattr(expected, name, new)
    assert_as_exact(fast, expected, args)
    assert _statuses(fast) == ["rewritten"]


def test_a_buffer_rebound_in_a_submodule(inner: str | None) -> None:
    """Submodules are shared, whoever rebinds."""
    traced, args = fx.symbolic_trace(Nested()), _qkv()
    fast = einscade.optimize(traced, inner=inner)
    fast(*args)
    traced.inner.hidden = torch.ones(19, 19).triu(-2).bool() & ~torch.eye(19).bool()
    assert_as_exact(fast, traced, args)
    fast.inner.hidden = torch.ones(19, 19).triu(3).bool()
    assert_as_exact(fast, traced, args)


def test_a_parameter_rebound_and_a_module_replaced(inner: str | None) -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner)
    args = (torch.randn(2, 13, 32), torch.randn(2, 17, 32), None)
    fast(*args)
    fast.q.weight = nn.Parameter(torch.randn(32, 32) / 6)
    torch.testing.assert_close(fast(*args), traced(*args), rtol=1e-4, atol=1e-5)
    fast.v = nn.Linear(32, 32)
    expected = copy.copy(traced)
    expected.v = fast.v
    torch.testing.assert_close(fast(*args), expected(*args), rtol=1e-4, atol=1e-5)


def test_cast_to_another_dtype(inner: str | None) -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner)
    args = (torch.randn(2, 13, 32), torch.randn(2, 17, 32))
    fast(*args, None)
    expected = copy.deepcopy(traced).double()
    fast.double()
    wide = tuple(a.double() for a in args)
    torch.testing.assert_close(fast(*wide, None), expected(*wide, None))


def test_dropout_comes_and_goes_with_the_mode(inner: str | None) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.dropout((q @ k.mT).softmax(-1) @ v)

    traced, args = fx.symbolic_trace(Dropped()), _qkv()
    fast = einscade.optimize(traced, inner=inner)
    fast.train()
    assert 0.3 < (fast(*args) == 0).float().mean() < 0.7
    fast.eval(), traced.eval()
    assert_as_exact(fast, traced, args)
    fast.train()
    fast.dropout.p = 0.0
    assert_as_exact(fast, traced, args)


def test_autocast_comes_and_goes(inner: str | None) -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner)
    args = (torch.randn(2, 13, 32), torch.randn(2, 17, 32), None)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(*args).dtype == traced(*args).dtype
        torch.testing.assert_close(fast(*args), traced(*args), rtol=1e-4, atol=1e-5)


def test_lengths_that_move(inner: str | None) -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner, dynamic=True)
    for n, m in ((13, 17), (5, 29), (13, 17), (40, 6), (1, 1)):
        args = (torch.randn(2, n, 32), torch.randn(2, m, 32), None)
        torch.testing.assert_close(fast(*args), traced(*args), rtol=1e-4, atol=1e-5)
    assert fast.report.graphs <= 2


def test_one_tensor_twice_and_then_two(inner: str | None) -> None:
    """A graph that was made of f(x, x) is not the graph of f(x, y)."""
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner)
    x, y = torch.randn(2, 13, 32), torch.randn(2, 13, 32)
    for args in ((x, x, None), (x, y, None), (y, y, None)):
        torch.testing.assert_close(fast(*args), traced(*args), rtol=1e-4, atol=1e-5)


def test_gradients_of_inputs_that_had_none_before(inner: str | None) -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    fast = einscade.optimize(traced, inner=inner)
    x, y = torch.randn(2, 13, 32), torch.randn(2, 17, 32)
    fast(x, y, None)
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    theirs = torch.autograd.grad(traced(*leaves, None).square().sum(), leaves)
    ours = torch.autograd.grad(fast(*leaves, None).square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_constants_of_the_module_and_of_the_trace_have_one_name_each() -> None:
    """`_tensor_constant0` is what symbolic_trace calls a constant, and what the capture calls the first of its own."""
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    scores = graph.call_function(torch.matmul, (q, graph.call_method("transpose", (k, -1, -2))))
    out = graph.call_function(torch.matmul, (graph.call_method("softmax", (scores, -1)), v))
    made = graph.call_function(torch.tensor, ([0.5, 0.25, 2.0, 1.0, 0.5, 0.25, 2.0, 1.0],))
    scaled = graph.call_function(torch.mul, (out, made))
    graph.output(graph.call_function(torch.add, (scaled, graph.get_attr("_tensor_constant0"))))
    model = fx.GraphModule({"_tensor_constant0": torch.arange(8.0)}, graph)
    assert_as_exact(einscade.optimize(model), model, _qkv())


def test_a_deep_copy_is_optimised_on_its_own() -> None:
    traced, args = fx.symbolic_trace(Masked()), _qkv()
    fast = einscade.optimize(traced, example_inputs=(args, {}))
    twin = copy.deepcopy(fast)
    twin.hidden.logical_and_(~torch.eye(19).bool().flip(0))
    assert not torch.equal(twin.hidden, fast.hidden)
    assert_as_exact(fast, traced, args)
    expected = copy.deepcopy(traced)
    expected.hidden = twin.hidden
    assert_as_exact(twin, expected, args)
    assert _statuses(twin) == ["rewritten"]


def test_what_changes_all_the_time_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """No endless rewriting: after so many graphs the original runs, and the report says so."""
    monkeypatch.setattr(graph_module, "MOST_VARIANTS", 2)
    traced, args = fx.symbolic_trace(Masked()), _qkv()
    fast = einscade.optimize(traced)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for diagonal in range(1, 5):
            traced.hidden.copy_(torch.ones(19, 19).triu(diagonal).bool())
            assert_as_exact(fast, traced, args)
    assert sum("rewritten 2 times already" in str(w.message) for w in caught) == 1
    assert fast.report.graphs <= 3
    assert "rewritten 2 times already" in str(fast.report)


def test_a_graph_without_attention_in_train_mode_is_asked_again_in_eval() -> None:
    """Live dropout on the weights leaves the site as it is, with the reason; without it, it is rewritten."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.dropout((q @ k.mT).softmax(-1)) @ v

    traced, args = fx.symbolic_trace(Dropped()), _qkv()
    fast = einscade.optimize(traced)
    fast.train()
    fast(*args)
    assert _statuses(fast) == ["unchanged"]
    assert "dropout of 0.5 in training draws random numbers" in fast.report.sites[0].reason
    fast.eval()
    assert_as_exact(fast, traced, args)
    assert _statuses(fast) == ["rewritten"]


def test_attention_of_any_causal_module_through_export_and_back() -> None:
    model, args = CausalAttention(), (torch.randn(2, 13, 32),)
    exported = torch.export.export(model, args, dynamic_shapes=({1: torch.export.Dim("n", min=2, max=64)},)).module()
    fast: Callable[..., Tensor] = einscade.optimize(exported)
    for n in (13, 7, 50):
        assert_as_exact(fast, model, (torch.randn(2, n, 32),))
