"""Operators in the place of regions: where in the graph they can stand, and what may follow them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import einscade
from einscade.compiler.capture import fake_inputs, to_aten
from einscade.compiler.rewrite import rewrite


class Calls(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return self.function(q, k, v)  # type: ignore[operator]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=generator) for n in (5, 7, 7)]


def assert_rewritten(function: object, *args: Tensor) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        fast = einscade.optimize(Calls(function), inner="eager")
        torch.testing.assert_close(fast(*args), function(*args), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert [s.status for s in fast.report.sites] == ["rewritten"]


def test_weights_are_read_before_the_values_are_made() -> None:
    """What the operator reads moves up to where its first result is needed."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        seen = weights.sum(-2)
        return seen.cos(), weights @ v.sin()

    assert_rewritten(function, *qkv())


def test_random_numbers_keep_their_order() -> None:
    """A draw between the first reader and the values cannot move past that reader: the site says so."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        seen = weights.sum(-2)
        return seen.cos(), weights @ F.dropout(v, 0.5, training=True)

    gm = fx.symbolic_trace(Calls(function))
    captured = to_aten(gm, fake_inputs(gm, qkv())).gm
    (site,) = rewrite(captured, "exact", {}, ()).sites
    assert site.status == "unchanged"
    assert site.reason is not None
    assert "draws random numbers" in site.reason


def test_a_view_that_the_originals_strides_allowed() -> None:
    """The operator writes `b p h f`; the original was a transposed view of `b h p f`, and merged `b h` again later."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return (out + 1).transpose(1, 2).view(8, 5, 8)

    assert_rewritten(function, *qkv())
