"""Every spelling through the whole compiler: rewritten at every site, and the same result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import einscade
from tests.spellings.cases import CASES, NEGATIVES, Case, Function, inputs


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*args)


@pytest.mark.parametrize("case", [*CASES, *NEGATIVES], ids=lambda c: c.name)
def test_optimized_spelling(case: Case) -> None:
    model = case.function.float() if isinstance(case.function, nn.Module) else Calls(case.function)
    args = inputs(case)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*args))
        fast = einscade.optimize(model, inner="eager")
        got = pytree.tree_leaves(fast(*args))
    assert [site.status for site in fast.report.sites] == ["rewritten"] * case.sites
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("grouped")], ids=lambda c: c.name)
def test_gradients_of_heads_in_groups(case: Case) -> None:
    args = [x.requires_grad_() for x in inputs(case)]
    torch._dynamo.reset()
    fast = einscade.optimize(Calls(case.function), inner="eager")
    expected = case.function(*args)
    cotangent = torch.randn(expected.shape)
    got = torch.autograd.grad(fast(*args), args, cotangent)
    for a, b in zip(got, torch.autograd.grad(expected, args, cotangent), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
