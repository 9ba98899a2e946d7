"""The quickstart of the README, as a script: a module written in plain PyTorch, optimised three ways.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from torch import nn

import einscade


class Attention(nn.Module):
    """Causal attention the way it is written on a blackboard: every score is stored."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, width))


def main() -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 300, 256)

    with torch.no_grad():
        fast = einscade.optimize(model)  # a module in, a module out: same call, same state_dict
        print(f"largest difference: {float((fast(x) - model(x)).abs().max()):.1e}")
        print(fast.report)

        compiled = torch.compile(model, backend="einscade")  # the same, as a backend of torch.compile
        print(f"as a backend:       {float((compiled(x) - model(x)).abs().max()):.1e}")

        einscade.optimize(model, verify=((x,), {}))  # raises, with the figures, if the two differed beyond rounding


if __name__ == "__main__":
    main()
