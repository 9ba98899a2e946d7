"""The rows of `benchmarks/h200.py`: attention written out in plain PyTorch, and the same for FlexAttention.

Comes in: nothing. Goes out: `ROWS`. A row's module is what a model would contain; einscade gets it as it is.
FlexAttention gets the same as modifications of scores and masks (`score_mod`, `mask_mod`), which its users write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ROWS", "Attention", "Row"]

CHECKED = 1000

Mod = Callable[..., Tensor]


class Attention(nn.Module):
    """Softmax attention of all queries to all keys; keys and values may have fewer heads. `tensors` are what a variant
    reads besides: biases, tables, document numbers."""

    products = 2
    """Matrix products over each pair of positions."""

    plain = True
    """Whether `scaled_dot_product_attention` computes it without a mask."""

    causal = False

    by_sequence = False
    """Whether the mask differs from sequence to sequence."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        if (groups := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        p, m = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
        scores = self.score(q @ k.mT * q.shape[-1] ** -0.5, p, m, *tensors)
        keep = self.keep(p, m, *tensors)
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return self.weights(scores).to(v.dtype) @ v

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        return s

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        return None

    def weights(self, s: Tensor) -> Tensor:
        return s.softmax(-1)

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        """Values for `tensors`, for `batch` sequences of `n` positions."""
        return []

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        return None

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        return None

    def flex(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], compiled: bool) -> Callable[[], Tensor]:
        """The call of FlexAttention that computes the same; its block mask is made beforehand. Raises
        NotImplementedError where it cannot."""
        from torch.nn.attention.flex_attention import create_block_mask

        q, k, v, *tensors = inputs
        mask, mod = self.mask_mod(*tensors), self.score_mod(*tensors)
        sizes = q.shape[0] if self.by_sequence else None, None, q.shape[2], k.shape[2]
        block = create_block_mask(mask, *sizes, device=q.device.type, _compile=compiled) if mask else None
        grouped = q.shape[1] != k.shape[1]
        return lambda: attention(q, k, v, score_mod=mod, block_mask=block, enable_gqa=grouped)


class Causal(Attention):
    causal = True

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        return m <= p

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        return lambda b, h, p, m: m <= p


class Slopes(Causal):
    plain = False

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        return s + tensors[0][:, None, None] * (m - p)

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        return [2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)]

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        (a,) = tensors
        return lambda s, b, h, p, m: s + a[h] * (m - p)


class Capped(Causal):
    plain = False

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        return 20 * torch.tanh(s / 20)

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        return lambda s, b, h, p, m: 20 * torch.tanh(s / 20)


class Window(Causal):
    plain = False

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        return (m <= p) & (p - m < 1024)

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        return lambda b, h, p, m: (m <= p) & (p - m < 1024)


class Prefix(Causal):
    plain = False

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        return (m <= p) | (m < 1024)

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        return lambda b, h, p, m: (m <= p) | (m < 1024)


class Documents(Attention):
    """Twelve documents of different lengths in one sequence; each position attends to all of its own document."""

    plain = False

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        (document,) = tensors
        return document[:, None] == document

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        ends = torch.tensor([n * i * (i + 11) // (12 * 23) for i in range(1, 13)])
        return [torch.bucketize(torch.arange(n), ends, right=True).to(torch.int32).to(device)]

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        (document,) = tensors
        return lambda b, h, p, m: document[p] == document[m]


class CausalDocuments(Documents):
    causal = True

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        (document,) = tensors
        return (document[:, None] == document) & (m <= p)

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        (document,) = tensors
        return lambda b, h, p, m: (document[p] == document[m]) & (m <= p)


class Padded(Attention):
    """Sequences of which a quarter is padding, behind one's keys and before the next one's."""

    plain = False
    by_sequence = True

    def keep(self, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor | None:
        return tensors[0][:, None, None]

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        at, padding = torch.arange(n, device=device), n // 4
        return [torch.stack([at >= padding if i % 2 else at < n - padding for i in range(batch)])]

    def mask_mod(self, *tensors: Tensor) -> Mod | None:
        (real,) = tensors
        return lambda b, h, p, m: real[b, m]


class Table(Attention):
    """A bias for each distance, from a table."""

    plain = False

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        (t,) = tensors
        return s + t[:, m - p + (t.shape[1] - 1) // 2]

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        return [torch.randn(heads, 2 * n - 1, device=device).bfloat16()]

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        (t,) = tensors
        n = (t.shape[1] + 1) // 2
        return lambda s, b, h, p, m: s + t[h, m - p + n - 1]


class Biased(Attention):
    plain = False

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        return s + tensors[0]

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        return [torch.randn(heads, n, n, device=device).bfloat16()]

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        (t,) = tensors
        return lambda s, b, h, p, m: s + t[h, p, m]


class Sigmoid(Attention):
    plain = False

    def weights(self, s: Tensor) -> Tensor:
        return torch.sigmoid(s - 8)

    def flex(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], compiled: bool) -> Callable[[], Tensor]:
        raise NotImplementedError("FlexAttention has softmax only")


class Differential(Attention):
    """The difference of two softmaxes; the first half of the heads' queries and keys is for one, the rest for the
    other."""

    products = 4
    plain = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, 1), k.chunk(2, 1)
        scale = q.shape[-1] ** -0.5
        first, second = (q1 @ k1.mT * scale).softmax(-1), (q2 @ k2.mT * scale).softmax(-1)
        return (first - tensors[0] * second) @ v[:, : q1.shape[1]]

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        return [torch.tensor(0.3, device=device).bfloat16()]

    def flex(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], compiled: bool) -> Callable[[], Tensor]:
        q, k, v, factor = inputs
        (q1, q2), (k1, k2), (v1, _) = q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1)
        return lambda: attention(q1, k1, v1) - factor * attention(q2, k2, v1)


class Rows(Attention):
    """Row attention of an Evoformer: each row of an alignment (the batch) attends to itself, with a bias for the
    keys of each row and one for each pair that all rows share."""

    plain = False

    def score(self, s: Tensor, p: Tensor, m: Tensor, *tensors: Tensor) -> Tensor:
        keys, pairs = tensors
        return s + keys[:, None, None] + pairs

    def make(self, batch: int, heads: int, n: int, device: str) -> list[Tensor]:
        return [torch.randn(batch, n, device=device).bfloat16(), torch.randn(heads, n, n, device=device).bfloat16()]

    def score_mod(self, *tensors: Tensor) -> Mod | None:
        keys, pairs = tensors
        return lambda s, b, h, p, m: s + keys[b, m] + pairs[h, p, m]


@dataclass(frozen=True)
class Row:
    """A module at a size. `shared`: query heads for each key head; `batch` None: as many as there are positions.
    `goal` in TFLOP/s; `beside`: peers, and how many times their TFLOP/s are to be reached. `backward`: the gradients of
    queries, keys and values are what is computed, five products for the forward pass' two."""

    name: str
    module: Attention
    heads: int
    shared: int
    width: int
    length: int
    goal: float | None
    batch: int | None = 2
    backward: bool = False
    beside: tuple[tuple[str, float], ...] = ()

    @property
    def checked(self) -> int:
        """An odd length, at which everything fits in memory in float64."""
        return min(CHECKED, self.length - 7)

    def tiny(self) -> Row:
        """The row at a size for tests."""
        return replace(self, length=80, heads=2 * self.shared, batch=self.batch and 1)

    def bounds(self, figures: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What the row is to reach, given its own and its peers' TFLOP/s: of each bound, by name (`goal`, or the
        peer's), `tflops` (of a peer without figures None) and whether it is `met` (None where there is nothing to
        compare)."""
        wanted = {} if self.goal is None else {"goal": self.goal}
        for peer, factor in self.beside:
            seen = figures.get(peer)
            wanted[peer] = round(factor * seen, 1) if isinstance(seen, (int, float)) else None
        ours = figures.get("tflops")
        met = {name: None if None in (ours, least) else ours >= least for name, least in wanted.items()}
        return {name: {"tflops": least, "met": met[name]} for name, least in wanted.items()}

    def inputs(self, n: int, device: str, batch: int | None = None) -> list[Tensor]:
        """Queries, keys, values and what the module reads besides, for n positions."""
        batch = batch or self.batch or n

        def normal(heads: int) -> Tensor:
            x = torch.randn(batch, heads, n, self.width, device=device).bfloat16()
            return x.requires_grad_(self.backward)

        keys = self.heads // self.shared
        return [normal(self.heads), normal(keys), normal(keys), *self.module.make(batch, self.heads, n, device)]

    def operations(self, n: int, tensors: Sequence[Tensor]) -> float:
        """Floating point operations over the points that the domain keeps."""
        device = tensors[0].device
        kept, keys = 0, torch.arange(n, device=device)
        for rows in torch.arange(n, device=device).split(1024):
            kept += self._kept(rows, keys, tensors)
        heads = self.heads if not isinstance(self.module, Differential) else self.heads // 2
        passes = 2.5 if self.backward else 1.0
        return 2.0 * passes * self.module.products * self.width * kept * (self.batch or n) * heads

    def timed(self, attention: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
        """What is timed of an attention: its call, or the gradients of its result."""
        if not self.backward:
            return attention
        result = attention()
        cotangent = torch.randn_like(result)
        return lambda: torch.autograd.grad(result, inputs[:3], cotangent, retain_graph=True)

    def _kept(self, rows: Tensor, keys: Tensor, tensors: Sequence[Tensor]) -> int:
        mask: Any = self.module.mask_mod(*tensors[3:])
        points = (len(rows), len(keys))
        return len(rows) * len(keys) if mask is None else int(mask(0, 0, rows[:, None], keys).expand(points).sum())


MODIFIED_GRADIENT = (("flex", 1.25), ("fa4", 1.0))

# Packed documents come at two lengths. Their goal was set beside a figure of FlexAttention's without its length:
# FlexAttention makes it of 32768 positions, and half of it of the 8192 that the other masks have, where documents are
# so short that most of their tiles are on an edge.
ROWS = (
    Row("dense-d128", Attention(), 16, 1, 128, 16384, 680),
    Row("causal-d128", Causal(), 16, 1, 128, 16384, 640),
    Row("dense-d64", Attention(), 32, 1, 64, 16384, 540),
    Row("causal-d64", Causal(), 32, 1, 64, 16384, 520),
    Row("gqa-causal-d128", Causal(), 32, 4, 128, 16384, 650),
    Row("slopes-causal", Slopes(), 16, 1, 128, 8192, 560),
    Row("soft-cap-causal", Capped(), 16, 1, 128, 8192, 430),
    Row("window-1024", Window(), 16, 1, 128, 8192, 520),
    Row("documents-full", Documents(), 16, 1, 128, 8192, 480),
    Row("documents", CausalDocuments(), 16, 1, 128, 8192, 480),
    Row("documents-32k", CausalDocuments(), 16, 1, 128, 32768, 480),
    Row("padding", Padded(), 16, 1, 128, 8192, None),
    Row("prefix-1024", Prefix(), 16, 1, 128, 8192, 620),
    Row("position-table", Table(), 16, 1, 128, 8192, 450),
    Row("dense-bias", Biased(), 16, 1, 128, 8192, 450),
    Row("sigmoid", Sigmoid(), 16, 1, 128, 8192, 600),
    Row("differential", Differential(), 32, 1, 64, 4096, 500, batch=4),
    Row("evoformer-rows", Rows(), 4, 1, 64, 256, 180, batch=None),
    Row("dense-d128-backward", Attention(), 16, 1, 128, 16384, 610, backward=True),
    Row("causal-d128-backward", Causal(), 16, 1, 128, 16384, 610, backward=True),
    Row("dense-d64-backward", Attention(), 32, 1, 64, 16384, 525, backward=True),
    Row("causal-d64-backward", Causal(), 32, 1, 64, 16384, 525, backward=True),
    Row("gqa-causal-d128-backward", Causal(), 32, 4, 128, 16384, None, backward=True),
    Row("slopes-causal-backward", Slopes(), 16, 1, 128, 8192, None, backward=True, beside=MODIFIED_GRADIENT),
    Row("soft-cap-causal-backward", Capped(), 16, 1, 128, 8192, None, backward=True, beside=MODIFIED_GRADIENT),
    Row("window-1024-backward", Window(), 16, 1, 128, 8192, None, backward=True, beside=MODIFIED_GRADIENT),
    Row("documents-backward", CausalDocuments(), 16, 1, 128, 8192, None, backward=True, beside=MODIFIED_GRADIENT),
    Row("padding-backward", Padded(), 16, 1, 128, 8192, None, backward=True, beside=MODIFIED_GRADIENT),
)
