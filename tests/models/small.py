"""Small modules written as people write attention, and the comparison that the model tests use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["Block", "CausalAttention", "CrossAttention", "assert_as_exact", "compilations", "rewritten_sites"]


class CausalAttention(nn.Module):
    """Causal self attention [b, n, width] -> [b, n, width], with fewer key heads than query heads if asked."""

    def __init__(self, width: int = 32, heads: int = 4, key_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head = heads, key_heads or heads, width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * self.key_heads * self.head)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, self.key_heads, self.head).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / self.head**0.5
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of x [b, n, width] over memory [b, s, width], with an additive bias [n, s] where one is given."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (self.heads, self.head)).transpose(1, 2)

        scores = torch.matmul(split(self.q(x)), split(self.k(memory)).transpose(2, 3)) * self.head**-0.5
        if bias is not None:
            scores = scores + bias
        weights = torch.softmax(scores, dim=-1)
        return torch.matmul(weights, split(self.v(memory))).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A transformer block: attention and a feed-forward part, both residual."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = CausalAttention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


def assert_as_exact(fast: Any, model: nn.Module, args: Sequence[torch.Tensor], slack: float = 1.5) -> None:
    """`fast(*args)` is as close to the model in float64 as the model in its own dtype, within `slack` or rounding."""

    def tensors(output: Any) -> list[torch.Tensor]:
        return [output] if isinstance(output, torch.Tensor) else [t for o in output for t in tensors(o)]

    exact_args = [a.double() if a.is_floating_point() else a for a in args]
    exact, plain, ours = (
        tensors(copy.deepcopy(model).double()(*exact_args)),
        tensors(model(*args)),
        tensors(fast(*args)),
    )
    assert len(exact) == len(plain) == len(ours)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.shape == p.shape
        assert o.dtype == p.dtype
        scale = float(e.norm()) or 1.0
        bound = max(slack * float((p - e).norm()) / scale, 4 * torch.finfo(p.dtype).eps)
        assert float((o - e).norm()) / scale <= bound


def rewritten_sites(fast: Any) -> int:
    """How many sites of an optimised module run as generated kernels."""
    return sum(site.status == "rewritten" for site in fast.report.sites)


def compilations() -> int:
    """Graphs that Dynamo compiled since its counters were cleared."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
