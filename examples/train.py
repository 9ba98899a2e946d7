"""Training through an optimised model: a byte-level language model on this repository's licence, against eager.

Both start from the same weights and see the same batches; the losses agree because the gradients come from
differentiating the cascade, not from an approximation of it.

    python examples/train.py
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import nn

import einscade

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.quickstart import Attention

LENGTH, BATCH, WIDTH = 96, 8, 64


class LanguageModel(nn.Module):
    """Bytes [b, n] in, logits of the next byte [b, n, 256] out."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.attentions = nn.ModuleList(Attention(WIDTH, heads=4) for _ in range(layers))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for i, (attention, feed) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.head(x)


def train(model: nn.Module, steps: int) -> list[float]:
    """The losses of `steps` steps on random pieces of the licence's text, the same pieces on every call."""
    text = torch.tensor(list((Path(__file__).resolve().parents[1] / "LICENSE").read_bytes()))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
        batch = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 30) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    fast = einscade.optimize(copy.deepcopy(model))
    eager, optimised = train(model, steps), train(fast, steps)
    for step in range(0, steps, max(steps // 6, 1)):
        print(f"step {step:>3}: eager {eager[step]:.5f}   optimised {optimised[step]:.5f}")
    difference = max(abs(a - b) / b for a, b in zip(optimised, eager, strict=True))
    print(f"largest relative difference of a loss: {difference:.1e}")
    print(fast.report)


if __name__ == "__main__":
    main()
