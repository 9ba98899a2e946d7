"""How long finding and raising takes on a large graph: `python benchmarks/finder.py [nodes]`, 10,000 by default.

The graph is a decoder of as many layers as it takes, with rotary positions, grouped heads and a causal mask, traced by
`make_fx` with fake tensors. Every layer has norms and a gated MLP, which must not be taken for attention.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from einscade.compiler.regions import find

HEADS, GROUPS, WIDTH, LENGTH = 4, 2, 16, 32
DIM = HEADS * WIDTH


def norm(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def layer(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, weights: list[Tensor]) -> Tensor:
    wq, wk, wv, wo, gate, up, down, scale = weights
    b, n, _ = x.shape
    y = norm(x, scale)
    q = rotated((y @ wq).view(b, n, HEADS, WIDTH).transpose(1, 2), cos, sin)
    k = rotated((y @ wk).view(b, n, GROUPS, WIDTH).transpose(1, 2), cos, sin).repeat_interleave(HEADS // GROUPS, 1)
    v = (y @ wv).view(b, n, GROUPS, WIDTH).transpose(1, 2).repeat_interleave(HEADS // GROUPS, 1)
    s = q @ k.transpose(2, 3) * WIDTH**-0.5 + mask
    x = x + ((s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, DIM)) @ wo
    y = norm(x, scale)
    return x + (F.silu(y @ gate) * (y @ up)) @ down


def graph(nodes: int) -> tuple[GraphModule, int]:
    """A graph of at least `nodes` nodes, and its number of layers."""

    def decoder(x: Tensor, layers: int, weights: list[list[Tensor]]) -> Tensor:
        n = x.shape[1]
        angle = torch.arange(n)[:, None] * torch.arange(WIDTH)[None, :] / WIDTH
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.where(keep, 0.0, torch.finfo(x.dtype).min)
        for k in range(layers):
            x = layer(x, angle.cos(), angle.sin(), mask, weights[k])
        return x

    def traced(layers: int) -> GraphModule:
        grouped = (DIM, GROUPS * WIDTH)
        shapes = [(DIM, DIM), grouped, grouped, (DIM, DIM), (DIM, 96), (DIM, 96), (96, DIM), (DIM,)]
        owner = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(s) / 8) for _ in range(layers) for s in shapes])
        weights = [list(owner[k * len(shapes) : (k + 1) * len(shapes)]) for k in range(layers)]
        with torch.no_grad():
            return make_fx(lambda x: decoder(x, layers, weights), tracing_mode="fake", _allow_non_fake_inputs=True)(
                torch.randn(2, LENGTH, DIM)
            )

    one, two = len(traced(1).graph.nodes), len(traced(2).graph.nodes)
    layers = -(-(nodes - one) // (two - one)) + 1
    return traced(layers), layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nodes", type=int, nargs="?", default=10_000)
    gm, layers = graph(parser.parse_args().nodes)
    started = time.perf_counter()
    regions = find(gm)
    seconds = time.perf_counter() - started
    raised = sum(r.cascade is not None for r in regions)
    print(f"{len(gm.graph.nodes)} nodes, {layers} layers: {raised} of {len(regions)} regions raised in {seconds:.2f} s")


if __name__ == "__main__":
    main()
