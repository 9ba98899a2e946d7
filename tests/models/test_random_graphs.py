"""Random FX graphs, of operations that are raised and of others between them: optimised = original.

Every graph computes over two families of tensors, rows [2, h, n, e] and score matrices [2, h, n, n], so that
contractions over two long ranks, normalisers, masks and reductions meet in every order, shared or dead or returned,
with operations that nobody raises (sorting, cumulative sums, in-place updates) in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import einscade

H, N, E = 2, 11, 4
Tensor = torch.Tensor


@dataclass(frozen=True)
class Operation:
    """A function from kinds of tensors ("row", "score") to a kind."""

    name: str
    takes: tuple[str, ...]
    gives: str
    function: Callable[..., Tensor]


def _causal(x: Tensor) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def _masked_softmax(s: Tensor) -> Tensor:
    return torch.softmax(s.masked_fill(~_causal(s), float("-inf")), -1)


def _updated(s: Tensor) -> Tensor:
    out = s.clone()
    out[..., 3:5].fill_(0.5)
    out.mul_(0.9)
    return out


OPERATIONS = (
    Operation("scores", ("row", "row"), "score", lambda q, k: q @ k.transpose(-1, -2) * 0.5),
    Operation("einsum_scores", ("row", "row"), "score", lambda q, k: torch.einsum("bhpe,bhme->bhpm", q, k) / 2),
    Operation("weighted", ("score", "row"), "row", lambda w, v: w @ v / N**0.5),
    Operation("weighted_transposed", ("score", "row"), "row", lambda w, v: w.transpose(-1, -2) @ v / N**0.5),
    Operation("softmax", ("score",), "score", lambda s: torch.softmax(s, -1)),
    Operation("softmax_other", ("score",), "score", lambda s: torch.softmax(s, -2)),
    Operation("causal_softmax", ("score",), "score", _masked_softmax),
    Operation("sigmoid", ("score",), "score", torch.sigmoid),
    Operation("softcap", ("score",), "score", lambda s: 2.0 * torch.tanh(s / 2.0)),
    Operation("relu_squared", ("score",), "score", lambda s: torch.relu(s).square() / N),
    Operation("add_scores", ("score", "score"), "score", lambda a, b: a + 0.5 * b),
    Operation("difference", ("score", "score"), "score", lambda a, b: a - 0.3 * b),
    Operation("distance", ("score",), "score", lambda s: s - 0.1 * (torch.arange(N)[:, None] - torch.arange(N)).abs()),
    Operation("where", ("score",), "score", lambda s: torch.where(_causal(s), s, -1e4)),
    Operation("row_max", ("score",), "score", lambda s: s - s.amax(-1, keepdim=True)),
    Operation("normalise", ("score",), "score", lambda s: s / (s.abs().sum(-1, keepdim=True) + 1.0)),
    Operation("row_mean", ("score", "row"), "row", lambda s, v: v * s.mean(-1, keepdim=True)),
    Operation("updated", ("score",), "score", _updated),
    Operation("sorted", ("score",), "score", lambda s: s.sort(-1).values),
    Operation("cumulative", ("row",), "row", lambda v: v.cumsum(2) / N**0.5),
    Operation("heads_mixed", ("row",), "row", lambda v: v.flip(1).transpose(1, 2).contiguous().transpose(1, 2)),
    Operation("norm", ("row",), "row", lambda v: nn.functional.layer_norm(v, (E,))),
    Operation("one_head", ("row",), "row", lambda v: v[:, :1].expand(-1, H, -1, -1)),
    Operation("add_rows", ("row", "row"), "row", lambda a, b: a + b),
)


class Program(nn.Module):
    """Steps (operation, operands' positions) over three inputs; `returned` are positions of what comes back."""

    def __init__(self, steps: list[tuple[Operation, tuple[int, ...]]], returned: list[int]) -> None:
        super().__init__()
        self.steps, self.returned = steps, returned

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        values = [q, k, v]
        for operation, operands in self.steps:
            values.append(operation.function(*(values[i] for i in operands)))
        return tuple(values[i] for i in self.returned)

    def __repr__(self) -> str:
        lines = [f"  {i + 3} = {op.name}{operands}" for i, (op, operands) in enumerate(self.steps)]
        return "\n".join(("0, 1, 2 = q, k, v", *lines, f"  return {self.returned}"))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    kinds = ["row", "row", "row"]
    steps: list[tuple[Operation, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(3, 10))):
        operation = draw(st.sampled_from([op for op in OPERATIONS if set(op.takes) <= set(kinds)]))
        operands = tuple(
            draw(st.sampled_from([i for i, kind in enumerate(kinds) if kind == t])) for t in operation.takes
        )
        steps.append((operation, operands))
        kinds.append(operation.gives)
    returned = draw(st.lists(st.integers(3, len(kinds) - 1), max_size=2, unique=True))
    return Program(steps, sorted({*returned, len(kinds) - 1}))


def _agree(program: Program, fast: Callable[..., tuple[Tensor, ...]]) -> None:
    """Compared in float64's terms: an operation order may double an error of fp32, and may not do worse."""
    torch.manual_seed(0)
    args = tuple(torch.randn(2, H, N, E) for _ in range(3))
    exact, plain, ours = program(*(a.double() for a in args)), program(*args), fast(*args)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.shape == p.shape
        rounding = float((p - e).abs().max())
        assert float((o - e).abs().max()) <= 3 * rounding + 2e-6 * max(1.0, float(e.abs().max()))


@pytest.mark.usefixtures("fresh_dynamo")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=programs())
def test_optimised_equals_original(program: Program) -> None:
    torch._dynamo.reset()
    _agree(program, einscade.optimize(copy.copy(program), inner="eager"))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=programs())
def test_graph_modules_too(program: Program) -> None:
    torch._dynamo.reset()
    traced = fx.symbolic_trace(program)
    args = tuple(torch.randn(2, H, N, E) for _ in range(3))
    _agree(program, einscade.optimize(traced, verify=(args, {})))
