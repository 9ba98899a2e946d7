"""Shapes that move: lengths and batch sizes change, and at most two graphs are compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import einscade
from tests.models.small import Block, CausalAttention, CrossAttention, assert_as_exact, compilations, rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    ("module", "longest"),
    [(CausalAttention(), 1000), (CausalAttention(key_heads=2), 4096), (Block(), 1000)],
    ids=["mha", "gqa", "block"],
)
def test_lengths_from_1_to_4096(module: nn.Module, longest: int) -> None:
    """The longest once, in the most general form of the three: in float64 it takes longer than all others."""
    fast = einscade.optimize(module, inner="eager", dynamic=True)
    with torch.no_grad():
        for n in (64, 7, 1, 2, 129, 1000, 33, longest):
            x = torch.randn(1, n, 32)
            assert_as_exact(fast, module, (x,))
    assert compilations() <= 2
    assert rewritten_sites(fast) == 1


def test_batch_sizes() -> None:
    module = CausalAttention()
    fast = einscade.optimize(module, inner="eager", dynamic=True)
    for b in (3, 1, 5, 2, 8):
        assert_as_exact(fast, module, (torch.randn(b, 21, 32),))
    assert compilations() <= 2


def test_two_lengths_at_once() -> None:
    """Cross attention: queries and keys move apart from one another."""
    module = CrossAttention()
    fast = einscade.optimize(module, inner="eager", dynamic=True)
    for n, s in ((16, 40), (40, 16), (9, 9), (1, 30), (30, 1), (257, 65)):
        assert_as_exact(fast, module, (torch.randn(2, n, 32), torch.randn(2, s, 32), torch.randn(n, s)))
    # lengths of 1 broadcast: n and s of 1 may each cost a graph beside the general one
    assert compilations() <= 4


def test_a_mask_buffer_sliced_by_length() -> None:
    """`mask[:, :, :n, :n]` of a registered buffer, as GPT-2 wrote it, stays right at every length."""

    class Sliced(CausalAttention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tril(torch.ones(512, 512, dtype=torch.bool))[None, None])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q = self.q(x).view(b, n, self.heads, self.head).transpose(1, 2)
            k, v = self.kv(x).view(b, n, 2, self.heads, self.head).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) * self.head**-0.5
            scores = torch.where(self.mask[:, :, :n, :n], scores, torch.finfo(scores.dtype).min)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    module = Sliced()
    fast = einscade.optimize(module, inner="eager", dynamic=True)
    for n in (64, 9, 200, 512):
        assert_as_exact(fast, module, (torch.randn(2, n, 32),))
    assert compilations() <= 2
    assert rewritten_sites(fast) == 1


def test_without_dynamic_every_length_is_right_too() -> None:
    module = CausalAttention()
    fast = einscade.optimize(module, inner="eager")
    for n in (16, 17, 5, 40):
        assert_as_exact(fast, module, (torch.randn(2, n, 32),))


def test_empty_sequences_and_batches() -> None:
    """A length or a batch of zero gives what the original gives: nothing."""
    module = CausalAttention()
    fast = einscade.optimize(module, inner="eager")
    for shape in ((2, 0, 32), (0, 5, 32)):
        x = torch.randn(shape)
        assert fast(x).shape == module(x).shape == shape
