"""Regions: what they own, what they return, why they fail, where they are, and that equal layers are equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einscade.compiler.capture import fake_inputs, to_aten
from einscade.compiler.regions import Region, find
from einscade.passes.terms import LONGEST, size
from tests.compiler.region_oracle import check, outputs_of, trace, values_of

SCALE = 8**-0.5


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def qkv(p: int = 5, m: int = 7) -> list[Tensor]:
    return tensors((2, 4, p, 8), (2, 4, m, 8), (2, 4, m, 6))


def only(regions: list[Region]) -> Region:
    (region,) = regions
    return region


# -- what is returned ------------------------------------------------------------------------------------------------


def test_output_takes_in_the_reshape_that_follows() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 24).sin()

    gm = trace(function, qkv())
    region = only(check(gm, qkv()))
    output = only(region.outputs)  # type: ignore[arg-type]
    assert output.node.meta["val"].shape == (2, 5, 24)
    assert output.permute == (0, 2, 1, 3)
    assert region.cascade is not None
    assert region.cascade.tensors[region.cascade.outputs[0]].ranks == ("b", "h", "p", "f")


def test_a_slice_of_the_result_stays_outside() -> None:
    gm = trace(lambda q, k, v: ((q @ k.mT).softmax(-1) @ v)[:, :, 1:], qkv())
    region = only(check(gm, qkv()))
    assert region.outputs[0].node.meta["val"].shape == (2, 4, 5, 6)


def test_weights_that_are_returned_are_a_second_output() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w = (q @ k.mT).softmax(-1)
        return w @ v, w

    region = only(check(trace(function, qkv()), qkv()))
    assert [o.node.meta["val"].shape[-1] for o in region.outputs] == [6, 7]


def test_scores_carried_to_the_next_layer_are_returned_and_read() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor) -> Tensor:
        s = q @ k.mT
        o = s.softmax(-1) @ v
        s2 = q2 @ k2.mT + s
        return o + s2.softmax(-1) @ v

    args = [*qkv(), *qkv()[:2]]
    gm = trace(function, args)
    first, second = check(gm, args)
    assert len(first.outputs) == 2
    assert first.outputs[1].node in second.inputs
    assert len(second.outputs) == 1
    assert set(first.nodes).isdisjoint(second.nodes)


def test_scores_through_many_operations_are_left() -> None:
    """A loop that was unrolled: an expression of it would have no end, and Python's stack has one."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        for _ in range(300):
            scores = scores.sin()
        return scores.softmax(-1) @ v

    region = only(find(trace(function, qkv())))
    assert region.cascade is None
    assert region.reason is not None
    assert "operations in a row" in region.reason


def test_scores_through_a_chain_that_reads_each_link_twice_are_found() -> None:
    """Once for each link: they double with it for what writes them out."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        for _ in range(40):
            scores = scores + scores.sin()
        return scores.softmax(-1) @ v

    cascade = only(find(trace(function, qkv()))).cascade
    assert cascade is not None
    assert max(size(s.expr) for s in cascade.body) <= LONGEST


@pytest.mark.parametrize(("rounds", "reason"), [(3, None), (40, "more than 32 reductions")])
def test_an_iteration_that_was_unrolled_is_found_up_to_a_length(rounds: int, reason: str | None) -> None:
    """Sinkhorn's: weights whose rows and columns are normalised in turn. Rewriting takes more with every round."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        for _ in range(rounds):
            weights = weights / (weights.sum(-2, keepdim=True) + 1e-6)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
        return weights @ v

    region = only(find(trace(function, qkv())))
    if reason is None:
        assert region.cascade is not None
    else:
        assert region.cascade is None
        assert reason in str(region.reason)


def test_two_softmaxes_of_the_same_scores_are_two_regions() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        s = q @ k.mT
        return s.softmax(-1) @ v, s.softmax(-2).mT @ u

    args = [*qkv(), *tensors((2, 4, 5, 3))]
    first, second = check(trace(function, args), args)
    assert len(first.outputs) == len(second.outputs) == 1


def test_sizes_that_are_asked_of_a_score_are_no_reads() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT
        return s.softmax(-1) @ v * s.shape[-1]

    region = only(check(trace(function, qkv(), dynamic=(5, 7)), qkv()))
    assert len(region.outputs) == 1


# -- shapes that move ------------------------------------------------------------------------------------------------


def test_symbols_are_named_after_ranks_and_sizes_say_where_they_are() -> None:
    gm = trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), qkv(), dynamic=(5, 7))
    region = only(check(gm, qkv()))
    assert region.cascade is not None
    assert set(region.cascade.symbols) == {"P", "M"} == set(region.sizes)


def test_offsets_of_dynamic_lengths_stay_affine() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, m = q.shape[2], k.shape[2]
        keep = torch.arange(m)[None, :] <= torch.arange(m - p, m)[:, None]
        return (q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) @ v

    gm = trace(function, qkv(), dynamic=(5, 7))
    region = only(find(gm))
    text = str(region.cascade)
    assert "m > M + p - P" in text
    for p, m in ((5, 7), (1, 9), (2, 2), (6, 11)):
        args = qkv(p, m)
        ((got, expected),) = outputs_of(region, values_of(gm, args))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2])
def test_one_query(batch: int) -> None:
    """A step of decoding, its length of 1 not a symbol."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).reshape(batch, 1, -1)

    args = tensors((batch, 4, 1, 8), (batch, 4, 7, 8), (batch, 4, 7, 6))
    region = only(check(trace(function, args, dynamic=(7,)), args))
    assert region.cascade is not None
    assert region.cascade.tensors["Q"].ranks == ("b", "h", "p", "e")


def test_a_batch_of_one_is_still_a_rank() -> None:
    args = tensors((1, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 6))
    region = only(check(trace(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, args), args))
    assert region.cascade is not None
    assert region.cascade.tensors["O"].ranks == ("b", "h", "p", "f")


# -- operands and masks ----------------------------------------------------------------------------------------------


def test_copies_of_operands_are_not_read() -> None:
    """Heads that were repeated, made contiguous and merged with the batch are read where they were made."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1).reshape(8, 7, -1).contiguous() for t in (k, v))
        return torch.bmm(torch.bmm(q.reshape(8, 5, 8), k.mT).softmax(-1), v)

    args = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
    region = only(check(trace(function, args), args))
    assert [n.op for n in region.inputs] == ["placeholder"] * 3
    assert "K[b,h // 2,m,e]" in str(region.cascade)


def test_rotations_and_norms_are_not_pulled_in() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor) -> Tensor:
        q, k = q * cos, F.rms_norm(k, (8,))
        return (q @ k.mT).softmax(-1) @ v

    args = [*qkv(), *tensors((5, 8))]
    gm = trace(function, args)
    region = only(check(gm, args))
    placeholders = gm.graph.find_nodes(op="placeholder")
    assert len(region.inputs) == 3
    assert not {placeholders[0], placeholders[1], placeholders[3]} & set(region.inputs)


def test_a_mask_smaller_than_what_it_masks_is_made_again() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        i = torch.arange(7)
        bias = slopes[:, None, None] * (i[None, :] - i[:5, None])
        return (q @ k.mT + bias).softmax(-1) @ v

    args = [*qkv(), *tensors((4,))]
    region = only(check(trace(function, args), args))
    assert {n.meta["val"].dim() for n in region.inputs} == {4, 1}


def test_a_bias_larger_than_itself_to_compute_is_read() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + (a + b)).softmax(-1) @ v

    args = [*qkv(), *tensors((4, 5, 7), (4, 5, 7))]
    region = only(check(trace(function, args), args))
    assert len(region.inputs) == 4


def test_a_mask_that_is_padded_is_read_as_it_was_padded() -> None:
    """Read where it was made, it would be asked for elements that it does not have."""

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT + F.pad(keep, (2, 1))[:, None, None, :]).softmax(-1) @ v

    args = [*qkv(), *tensors((2, 4))]
    region = only(check(trace(function, args), args))
    assert region.inputs[-2].meta["val"].shape[-1] == 7
    assert "Where" not in str(region.cascade)


def test_a_bias_put_together_from_tensors_is_read_whole() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + torch.cat([a, b], -1)).softmax(-1) @ v

    args = [*qkv(), *tensors((4, 5, 3), (4, 5, 4))]
    region = only(check(trace(function, args), args))
    assert len(region.inputs) == 4
    assert "Where" not in str(region.cascade)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT).masked_fill(~self.keep[:n, :n], -torch.inf).softmax(-1) @ v


def test_a_buffer_becomes_a_condition_and_is_named() -> None:
    args = qkv(7, 7)
    gm = trace(Buffered(), args, dynamic=(7,))
    region = only(check(gm, args))
    assert len(region.inputs) == 3
    assert {n.op for n in region.known} == {"get_attr"}
    assert "Where(m > p" in str(region.cascade)


def test_a_buffer_that_is_an_input_is_known_by_its_name() -> None:
    keep = torch.ones(16, 16, dtype=torch.bool).tril()

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~keep[:7, :7], -torch.inf).softmax(-1) @ v

    args = [*qkv(7, 7), keep]
    gm = trace(function, args)
    name = gm.graph.find_nodes(op="placeholder")[3].name
    assert len(only(find(gm)).inputs) == 4
    region = only(find(gm, {name: keep}))
    assert len(region.inputs) == 3
    assert [n.name for n in region.known] == [name]


def test_a_float_that_is_only_known_at_run_time_is_read() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * self.scale).softmax(-1) @ v

    captured = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        captured.append((to_aten(gm, fake_inputs(gm, inputs)).gm, inputs))
        return gm

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=False):
        torch.compile(Scaled(), backend=backend, dynamic=True)(*qkv())
    region = only(find(captured[0][0]))
    assert region.reason is None
    assert any(n.meta["val"].dim() == 0 for n in region.inputs)


# -- why not ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda s: s.softmax(-1).cumsum(-1), "cumsum"),
        (lambda s: s.softmax(-1).sort(-1)[0], "sort"),
        (lambda s: torch.special.bessel_j0(s), "bessel_j0"),
    ],
    ids=["cumsum", "sort", "unknown"],
)
def test_reason_names_the_operation(operation: object, reason: str) -> None:
    gm = trace(lambda q, k, v: operation(q @ k.mT) @ v, qkv())  # type: ignore[operator]
    region = only(find(gm))
    assert region.cascade is None
    assert region.reason is not None
    assert reason in region.reason


class Dropped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.mT).softmax(-1), 0.1, training=True) @ v


class DroppedWhole(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class DroppedByHand(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights * torch.bernoulli(torch.full_like(weights, 0.9)) / 0.9 @ v


@pytest.mark.parametrize("module", [Dropped(), DroppedWhole(), DroppedByHand()])
def test_dropout_in_training_is_left_alone(module: nn.Module) -> None:
    gm = torch.fx.symbolic_trace(module)
    region = only(find(to_aten(gm, fake_inputs(gm, qkv())).gm))
    assert region.cascade is None
    assert region.reason is not None
    assert "random" in region.reason


def test_complex_attention_is_left_alone() -> None:
    args = [t.to(torch.complex128) for t in qkv()]
    gm = trace(lambda q, k, v: (q @ k.mT).abs().to(q.dtype) @ v, args)
    assert all(r.cascade is None for r in find(gm))


def test_nothing_to_find() -> None:
    assert find(trace(lambda x: x + 1, tensors((3,)))) == []
    assert find(trace(lambda x: x @ x, tensors((3, 3)))) == []


# -- layers ----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 2, 8).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        a = (q @ k.mT * SCALE + mask).softmax(-1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(b, n, -1))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def captured_stack(layers: int) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    found: list = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        found.append((to_aten(gm, fake_inputs(gm, inputs)).gm, list(inputs)))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Stack(layers).double(), backend=backend)(*tensors((2, 9, 16)))
    return found[0]


def test_equal_layers_have_equal_cascades_and_say_where_they_are() -> None:
    gm, args = captured_stack(5)
    regions = check(gm, args)
    assert len(regions) == 5
    assert len({r.cascade for r in regions}) == 1
    assert len({r.inputs for r in regions}) == 5
    assert [r.module_path for r in regions] == [f"layers.{k}" for k in range(5)]
    assert {r.source.split(":")[0] for r in regions} == {Path(__file__).name}
    assert all(set(a.nodes).isdisjoint(b.nodes) for a in regions for b in regions if a is not b)


class ChannelsFirst(nn.Module):
    """Two layers whose projections are convolutions: what the first one made is nothing to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv1d(16, 16, 1, groups=2) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for q, k, v in (self.project[:3], self.project[3:]):
            scores = q(x).view(2, 2, 8, 9).mT @ k(x).view(2, 2, 8, 9)
            x = x + ((scores * SCALE).softmax(-1) @ v(x).view(2, 2, 8, 9).mT).mT.reshape(2, 16, 9)
        return x


def test_projections_by_convolutions_separate_layers() -> None:
    args = tensors((2, 16, 9))
    regions = check(trace(ChannelsFirst().double(), args), args)
    assert [r.reason for r in regions] == [None, None]
    assert regions[0].cascade == regions[1].cascade


def test_a_convolution_of_the_scores_is_a_reason() -> None:
    mixing = nn.Conv2d(4, 4, 3, padding=1).double()
    region = only(find(trace(lambda q, k, v: mixing(q @ k.mT).softmax(-1) @ v, qkv())))
    assert region.reason is not None
    assert "convolution" in region.reason


def test_a_region_reads_the_result_of_another_and_nothing_inside_it() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 24)
        y = x.view(2, 5, 4, 6).transpose(1, 2)
        return (y @ y.mT).softmax(-1) @ y

    first, second = check(trace(function, qkv()), qkv())
    assert set(second.inputs) & set(first.nodes) <= {o.node for o in first.outputs}


def test_pieces_of_a_packed_projection_are_told_apart() -> None:
    """Two layers that differ in which piece is which, and in where they are split, have no common cascade."""

    def layer(x: Tensor, order: tuple[int, int, int], sizes: list[int]) -> Tensor:
        pieces = x.split(sizes, -1)
        q, k, v = (pieces[i] for i in order)
        return (q @ k.mT).softmax(-1) @ v

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (layer(x, (0, 1, 2), [8, 8, 8]), layer(x, (2, 0, 1), [8, 8, 8]), layer(x, (0, 2, 1), [8, 8, 8]),
                layer(x.sin(), (0, 1, 2), [8, 8, 8]), layer(x, (0, 1, 3), [8, 8, 1, 7]), layer(x, (0, 1, 3), [8, 8, 0, 8]))  # fmt: skip  # noqa: E501

    args = tensors((2, 5, 24))
    regions = check(trace(function, args), args)
    assert len(regions) == 6
    assert regions[0].cascade == regions[3].cascade
