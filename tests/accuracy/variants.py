"""Attention written out in plain PyTorch, and inputs that are hard on its numbers.

Comes in: nothing. Goes out: `VARIANTS`, each a module over (q, k, v, *tensors) with the tensors it reads besides, and
`HOSTILE`, functions that make queries, keys and values of random normal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["HOSTILE", "VARIANTS", "Variant", "scores", "softmax", "unsubtracted"]

INF = float("inf")


def softmax(s: Tensor) -> Tensor:
    return s.softmax(-1)


def unsubtracted(s: Tensor) -> Tensor:
    """A softmax whose gradient lacks what it subtracts: the size of the terms that cancel in the whole one."""
    return (s - s.logsumexp(-1, keepdim=True).detach()).exp()


def scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled as math attention scales them: half of it on each side."""
    scale = q.shape[-1] ** -0.25
    return (q * scale) @ (k * scale).mT


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(scores(q, k)) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p, m = positions(q, k)
    return softmax(scores(q, k).masked_fill(m > p, -INF)) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two query heads for each key head."""
    return causal(q, *(x[:, : q.shape[1] // 2].repeat_interleave(2, 1) for x in (k, v)))


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p, m = positions(q, k)
    return softmax(scores(q, k).masked_fill((m > p) | (p - m >= 9), -INF)) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    p, m = positions(q, k)
    keep = (document[:, None] == document) & (m <= p)
    return softmax(scores(q, k).masked_fill(~keep, -INF)) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return softmax(scores(q, k).masked_fill(~mask, -INF)) @ v


def masked_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`masked`, with 0 for the rows without keys, for which eager's softmax is NaN."""
    some = mask.any(-1, keepdim=True)
    weights = softmax(scores(q, k).masked_fill(~mask, -INF).masked_fill(~some, 0))
    return weights.masked_fill(~some, 0) @ v


def slopes(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    p, m = positions(q, k)
    return softmax((scores(q, k) + slope[:, None, None] * (m - p)).masked_fill(m > p, -INF)) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p, m = positions(q, k)
    return softmax((20 * torch.tanh(scores(q, k) / 20)).masked_fill(m > p, -INF)) @ v


def bias(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return softmax(scores(q, k) + b) @ v


def buckets(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bucket: Tensor) -> Tensor:
    """A bias for each bucket of distances, read from a table at an index."""
    return softmax(scores(q, k) + table[bucket].permute(2, 0, 1)) @ v


def distances(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """A bias for each distance."""
    p, m = positions(q, k)
    return softmax((scores(q, k) + table[:, p - m + k.shape[2] - 1]).masked_fill(m > p, -INF)) @ v


def sink(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Tensor:
    """One more logit in each row, which weighs no value."""
    p, m = positions(q, k)
    s = scores(q, k).masked_fill(m > p, -INF)
    more = logit[:, None, None].expand(*s.shape[:-1], 1).to(s.dtype)
    return softmax(torch.cat([s, more], -1))[..., :-1] @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(scores(q, k) - 4) @ v


def differential(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, 1), k.chunk(2, 1)
    return (softmax(scores(q1, k1)) - factor * softmax(scores(q2, k2))) @ v[:, : q1.shape[1]]


@dataclass(frozen=True)
class Variant:
    """`function(q, k, v, *tensors(heads, p, m))`; `reference` is the same where the function itself has no numbers."""

    function: Callable[..., Tensor]
    tensors: Callable[[int, int, int], tuple[Tensor, ...]] = lambda heads, p, m: ()
    reference: Callable[..., Tensor] | None = None

    def module(self) -> nn.Module:
        function = self.function

        class Module(nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return function(*inputs)

        return Module()

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (self.reference or self.function)(*inputs)


def _mask(heads: int, p: int, m: int) -> tuple[Tensor, ...]:
    mask = torch.rand(1, 1, p, m) < 0.6
    mask[:, :, p // 2] = False
    mask[:, :, 0, 0] = True
    return (mask,)


def _buckets(p: int, m: int) -> Tensor:
    distance = (torch.arange(p)[:, None] - torch.arange(m)).abs() + 1
    return distance.log2().floor().clamp_max(5).long()


VARIANTS: Mapping[str, Variant] = {
    "full": Variant(full),
    "causal": Variant(causal),
    "grouped": Variant(grouped),
    "window": Variant(window),
    "documents": Variant(documents, lambda heads, p, m: (torch.arange(p) * 4 // p,)),
    "masked": Variant(masked, _mask, masked_reference),
    "slopes": Variant(slopes, lambda heads, p, m: (2.0 ** -torch.arange(1, heads + 1),)),
    "softcap": Variant(softcap),
    "bias": Variant(bias, lambda heads, p, m: (torch.randn(heads, p, m),)),
    "buckets": Variant(buckets, lambda heads, p, m: (torch.randn(6, heads), _buckets(p, m))),
    "distances": Variant(distances, lambda heads, p, m: (torch.randn(heads, p + m - 1),)),
    "sink": Variant(sink, lambda heads, p, m: (torch.linspace(-3, 100, heads),)),
    "sigmoid": Variant(sigmoid),
    "differential": Variant(differential, lambda heads, p, m: (torch.tensor(0.3),)),
}

Triple = tuple[Tensor, Tensor, Tensor]


def large(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Scores up to some thousands, where one key takes all."""
    return q * 30, k * 30, v


def overflowing(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Products of queries and keys beyond float16's range, values near its end."""
    return q * 100, k * 100, v.clamp(-3, 3) * 16000


def dominant(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """One key that half of the rows score far above all others."""
    k = k.clone()
    k[:, :, k.shape[2] // 3] = 8 * q.mean(2)[:, : k.shape[1]].sign()
    return q + q.mean(2, keepdim=True).sign(), k, v


def denormal(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Values and keys below the least normal number of float16."""
    return q, k * 2.0**-17, v * 2.0**-17


def constant(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """All keys alike, so that every score of a row is."""
    return q, k[:, :, :1].expand_as(k).contiguous(), v


def offset(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    """Scores that are large and close together."""
    return q.abs() + 8, k * 0.25 + 8, v + 4


HOSTILE: Mapping[str, Callable[[Tensor, Tensor, Tensor], Triple]] = {
    "normal": lambda q, k, v: (q, k, v),
    "large": large,
    "overflowing": overflowing,
    "dominant": dominant,
    "denormal": denormal,
    "constant": constant,
    "offset": offset,
}
