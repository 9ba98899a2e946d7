"""Graphs in which operators and views are all that there is: called as they are, by no compiler of the rest."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import einscade
from tests.models.small import CausalAttention, rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attention(nn.Module):
    """Attention of heads that are split from the inputs by views."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v))
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        weights = (q @ k.mT * 8**-0.5).masked_fill(~keep, float("-inf")).softmax(-1)
        return weights @ v


class Joined(Attention):
    """Heads are joined again: a copy here, a view of what a kernel stores in that order."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return super().forward(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def compiled() -> Any:
    """What AOTAutograd was asked to compile."""
    from torch._dynamo.backends import debugging

    with mock.patch.object(debugging, "aot_eager", side_effect=debugging.aot_eager) as asked:
        yield asked


def _inputs(n: int = 9, grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(2, n, 32).requires_grad_(grad) for _ in range(3)]


def _fast(model: nn.Module, **options: Any) -> Any:
    return einscade.optimize(model, inner="aot_eager", **options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_is_compiled_where_nothing_is_left(grad: bool, dynamic: bool, compiled: mock.Mock) -> None:
    model = Attention()
    fast = _fast(model, dynamic=dynamic)
    for n in (9, 9, 13):
        inputs = _inputs(n, grad)
        actual, expected = fast(*inputs), model(*inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert actual.requires_grad is grad
        if grad:
            cotangent = torch.randn_like(actual)
            found = [torch.autograd.grad(y, inputs, cotangent) for y in (actual, expected)]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert rewritten_sites(fast) == 1
    assert compiled.call_count == 0


def test_what_is_left_is_compiled(compiled: mock.Mock) -> None:
    model = CausalAttention()
    fast = _fast(model)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert compiled.call_count == 1


def test_inductor_records_cuda_graphs_where_it_was_told_to(compiled: mock.Mock) -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        _fast(Attention())(*_inputs())
    assert compiled.call_count == 1


def test_what_is_not_plain_is_left_to_the_dispatcher(compiled: mock.Mock) -> None:
    """A view whose sign is still to be turned."""
    (q, k, v), model = _inputs(), Attention()
    fast = _fast(model)
    for negated in (False, True, False):
        x = torch._neg_view(q) if negated else q
        torch.testing.assert_close(fast(x, k, v), model(x, k, v), rtol=1e-4, atol=1e-5)
    assert compiled.call_count == 1


def test_a_profile_has_the_operator() -> None:
    fast, inputs = _fast(Attention()), _inputs()
    fast(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fast(*inputs)
    assert "einscade::cascade" in {e.name for e in profile.events()}


@pytest.mark.parametrize("kind", [Attention, Joined])
def test_results_are_no_views(kind: type[nn.Module], compiled: mock.Mock) -> None:
    """They may be changed in place: also where autograd records only what comes then."""
    model, inputs, factor = kind(), _inputs(), torch.randn((), requires_grad=True)
    fast = _fast(model)
    with torch.no_grad():
        result = fast(*inputs)
    assert compiled.call_count == 0
    assert not result._is_view()
    expected = model(*inputs).sum()
    (gradient,) = torch.autograd.grad(result.mul_(factor).sum(), factor)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "inner"), [(Attention, "aot_eager"), (Attention, "eager"), (Joined, "eager")])
def test_results_that_are_recorded_may_be_changed_in_place(kind: type[nn.Module], inner: str) -> None:
    fast, inputs = einscade.optimize(kind(), inner=inner), _inputs(grad=True)
    result = fast(*inputs)
    result.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):  # the gradient reads it
        torch.autograd.grad(result.sum(), inputs)
    if kind is Attention:
        assert not fast(*inputs).detach_().requires_grad


def test_where_results_would_be_views_autograd_is_left_to_compilers(compiled: mock.Mock) -> None:
    model, inputs = Joined(), _inputs(grad=True)
    fast = _fast(model)
    found = [torch.autograd.grad(m(*inputs).sin().sum(), inputs) for m in (fast, model)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert compiled.call_count == 1


def test_tangents_that_come_later() -> None:
    model, inputs = Attention(), _inputs()
    fast = _fast(model)
    fast(*inputs)
    found = []
    tangent = torch.randn_like(inputs[0])
    with forward_ad.dual_level():
        for m in (fast, model):
            result = m(forward_ad.make_dual(inputs[0], tangent), *inputs[1:])
            found.append(forward_ad.unpack_dual(result).tangent)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_and_under_checkpointing(compiled: mock.Mock) -> None:
    model, inputs = Attention(), _inputs(grad=True)
    fast = _fast(model)
    found = []
    for m in (fast, model):
        first = torch.autograd.grad(m(*inputs).sin().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    for reentrant in (False, True):
        found = [_gradients(checkpoint(m, *inputs, use_reentrant=reentrant), inputs) for m in (fast, model)]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert compiled.call_count == 0


def _gradients(result: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    for x in inputs:
        x.grad = None
    result.sin().sum().backward()
    return tuple(x.grad for x in inputs)
