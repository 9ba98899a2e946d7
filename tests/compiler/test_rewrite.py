"""Operators in the place of regions: where in the graph they can stand, and what may follow them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import einscade
from einscade.compiler import operators
from einscade.compiler.capture import fake_inputs, made_fake, to_aten
from einscade.compiler.rewrite import rewrite

aten = torch.ops.aten


class Calls(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return self.function(q, k, v)  # type: ignore[operator]


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=generator) for n in (5, 7, 7)]


def assert_rewritten(function: object, *args: Tensor, sites: int = 1) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        fast = einscade.optimize(Calls(function), inner="eager")
        torch.testing.assert_close(fast(*args), function(*args), rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert [s.status for s in fast.report.sites] == ["rewritten"] * sites


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


def test_scores_that_another_region_returns() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        out = scores.softmax(-1) @ v
        return out + ((q.cos() @ k.mT + scores).softmax(-1) @ v)

    assert_rewritten(function, *qkv(), sites=2)


def unrolled(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = 6) -> Tensor:
    """A delta rule in chunks, as it is written with loops: rows of a triangle from those above, then chunk by chunk."""
    q, k, v = (x.unflatten(-2, (-1, chunk)) for x in (q, k, v))
    g = g.unflatten(-1, (-1, chunk)).cumsum(-1)
    decay = (g[..., None] - g[..., None, :]).tril().exp().tril()
    inverse = -((k @ k.mT) * decay).tril(-1)
    for i in range(1, chunk):
        row, above = inverse[..., i, :i].clone(), inverse[..., :i, :i].clone()
        inverse[..., i, :i] = row + (row.unsqueeze(-1) * above).sum(-2)
    inverse = inverse + torch.eye(chunk)
    new, seen, out = inverse @ v, inverse @ (k * g.exp()[..., None]), torch.zeros_like(v)
    state = torch.zeros(*k.shape[:-3], k.shape[-1], v.shape[-1])
    for i in range(q.shape[-3]):
        weights = (q[..., i, :, :] @ k[..., i, :, :].mT * decay[..., i, :, :]).tril()
        delta = new[..., i, :, :] - seen[..., i, :, :] @ state
        out[..., i, :, :] = q[..., i, :, :] @ state + weights @ delta
        state = state * g[..., i, -1, None, None].exp() + k[..., i, :, :].mT @ delta
    return out.flatten(-3, -2)


class Rule(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return unrolled(q, k, v, g)


def rule_inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))
    return [q, F.normalize(k, dim=-1), v, -torch.rand(2, 3, length, generator=generator)]


def test_regions_that_share_what_they_compute() -> None:
    """Some read what others return, some end in one product; none is left because another came first."""
    torch._dynamo.reset()
    inputs = rule_inputs(12)
    fast = einscade.optimize(Rule(), inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), unrolled(*inputs), rtol=1e-4, atol=1e-5)
    assert {s.status for s in fast.report.sites} == {"rewritten"}


def test_a_view_that_the_originals_strides_allowed() -> None:
    """The operator writes `b p h f`; the original was a transposed view of `b h p f`, and merged `b h` again later."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return (out + 1).transpose(1, 2).view(8, 5, 8)

    assert_rewritten(function, *qkv())


def moving_lengths(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fake tensors whose dimension before the last has a symbol, unless it is 1."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DUCK, DimDynamic.STATIC]
    return [
        mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(sizes), source=ConstantSource(f"input_{i}"))
        for i, x in enumerate(tensors)
    ]


def rewritten_graph(function: object, *args: Tensor, dynamic: bool = False) -> fx.GraphModule:
    gm = fx.symbolic_trace(Calls(function))
    captured = to_aten(gm, moving_lengths(args) if dynamic else made_fake(args)).gm
    assert {s.status for s in rewrite(captured, "exact", {}, ()).sites} == {"rewritten"}
    return captured


def calls_of(gm: fx.GraphModule, target: object) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def single_query(keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((4, 1), (2, keys), (2, keys)))
    return q, k, v


def decoding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query over all keys, spelled with a causal mask and repeated heads, twice."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    length = k.shape[2]
    for _ in range(2):
        visible = torch.arange(length)[None, :] <= torch.arange(length - 1, length)[:, None]
        scores = (q @ k.mT * 0.3).masked_fill(~visible, float("-inf"))
        q = scores.softmax(-1) @ v
    return q


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_single_query_is_torchs_own_call_in_the_graph(dynamic: bool) -> None:
    """Nothing of ours is called for it, no mask is made and no head repeated; lengths may move."""
    q, k, v = single_query()
    with torch.no_grad():
        gm = rewritten_graph(decoding, q, k, v, dynamic=dynamic)
    assert calls_of(gm, operators.cascade) == 0
    assert calls_of(gm, aten.scaled_dot_product_attention.default) == 2
    for name in ("arange", "where", "masked_fill", "clone", "bmm"):
        assert not any(name in str(n.target) for n in gm.graph.nodes), name
    for keys in (7, 300) if dynamic else (7,):
        q, k, v = single_query(keys)
        torch.testing.assert_close(gm(q, k, v), decoding(q, k, v), rtol=1e-5, atol=1e-6)


def test_calls_in_the_graph_share_what_they_need() -> None:
    """Two sites with the same mask by data: one mask is made."""
    keep = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.3

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        hidden = ~keep[:, None, None, :]
        for _ in range(2):
            q = (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return q

    class Masked(Calls):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> object:  # type: ignore[override]
            return function(q, k, v, keep)

    q, k, v = single_query()
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    gm = fx.symbolic_trace(Masked(None))
    with torch.no_grad():
        captured = to_aten(gm, made_fake((q, k, v, keep))).gm
        assert [s.status for s in rewrite(captured, "exact", {}, ()).sites] == ["rewritten"] * 2
    first, second = captured.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    masks = [n.args[3] if len(n.args) > 3 else n.kwargs["attn_mask"] for n in (first, second)]
    assert isinstance(masks[0], fx.Node)
    assert masks[0] is masks[1]
    torch.testing.assert_close(captured(q, k, v, keep), function(q, k, v, keep), rtol=1e-5, atol=1e-6)


def test_a_single_query_that_is_trained_keeps_the_operator() -> None:
    """Its gradient comes from the cascade."""
    q, k, v = (x.requires_grad_() for x in single_query())
    assert calls_of(rewritten_graph(decoding, q, k, v), operators.cascade) == 2
