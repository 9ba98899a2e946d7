"""Aliasing, in-place updates, views, strides, shared intermediates: what a rewrite could silently break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import einscade
from tests.models.small import CausalAttention, assert_as_exact, rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Tensor = torch.Tensor


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> object:
        return self.function(*args)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


def _qkv(n: int = 21, s: int = 27) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, n, 8), torch.randn(2, 3, s, 8), torch.randn(2, 3, s, 8)


def _check(function: Callable[..., object], *args: Tensor, sites: int = 1) -> nn.Module:
    model = Function(function)
    fast = einscade.optimize(model, inner="eager")
    assert_as_exact(fast, model, args)
    assert rewritten_sites(fast) == sites
    return fast


def test_transposed_inputs() -> None:
    """[b, n, h, e] storage seen as [b, h, n, e], as every model splits its heads."""
    _check(attention, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in _qkv()))


def test_sliced_and_strided_inputs() -> None:
    q, k, v = _qkv(42, 54)
    _check(attention, q[:, :, ::2], k[:, :, 1::2], v[:, :, ::2])


def test_zero_strides() -> None:
    """Expanded tensors: all heads share keys, all positions share a value."""
    q, k, v = _qkv()
    _check(attention, q, k[:, :1].expand(-1, 3, -1, -1), v[:, :, :1].expand(-1, -1, 27, -1))


def test_a_view_of_a_view_of_packed_projections() -> None:
    def packed(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 21, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v).transpose(1, 2).flatten(2)

    _check(packed, torch.randn(2, 21, 72))


def test_one_tensor_is_query_key_and_value() -> None:
    _check(lambda x: attention(x, x, x), _qkv()[0])


def test_overlapping_inputs() -> None:
    """Two arguments over the same storage."""
    x = torch.randn(2, 3, 30, 8)
    _check(attention, x[:, :, :21], x[:, :, 3:], x[:, :, 3:])


def test_an_output_that_is_an_input() -> None:
    model = Function(lambda q, k, v: (attention(q, k, v), q))
    fast = einscade.optimize(model, inner="eager")
    args = _qkv()
    out, same = fast(*args)
    assert same is args[0]
    torch.testing.assert_close(out, attention(*args), rtol=1e-5, atol=1e-6)
    assert rewritten_sites(fast) == 1


def test_an_output_that_is_a_view_of_an_input() -> None:
    fast = einscade.optimize(Function(lambda q, k, v: (attention(q, k, v), q[:, :, :3])), inner="eager")
    args = _qkv()
    _, view = fast(*args)
    assert view.data_ptr() == args[0].data_ptr()


def test_an_input_updated_in_place() -> None:
    """The caller sees the update, and attention sees the value of its time: before for keys, after for values."""

    def updating(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = torch.softmax(q @ k.transpose(-1, -2), -1)
        k.add_(1.0)
        return before @ (v + k)

    model = Function(updating)
    fast = einscade.optimize(model, inner="eager")
    args = _qkv()
    expected_args, actual_args = tuple(t.clone() for t in args), tuple(t.clone() for t in args)
    expected, actual = model(*expected_args), fast(*actual_args)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual_args, expected_args, strict=True):
        assert torch.equal(ours, theirs)


class Updating(nn.Module):
    """Attention, and after it an update of one of its inputs."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.written = written

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        {"q": q, "k": k, "v": v}[self.written].mul_(-0.5)
        return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("written", ["q", "k", "v"])
def test_an_input_updated_in_place_afterwards(written: str, inner: str) -> None:
    """Attention reads what was there before the update, also where nothing reads its result until after it."""
    model, args = Updating(written), _qkv()
    for original in (model, fx.symbolic_trace(model)):
        fast = einscade.optimize(original, inner=inner)
        theirs, ours = tuple(t.clone() for t in args), tuple(t.clone() for t in args)
        torch.testing.assert_close(fast(*ours), model(*theirs), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert rewritten_sites(fast) == 1


def test_an_input_that_another_one_shares_memory_with() -> None:
    """An update of the keys is one of the values where these are views of the same memory, and else is none; whichever
    of the two calls comes first."""

    class Shifted(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.transpose(-1, -2)
            k.mul_(2.0)
            return scores.softmax(-1) @ v

    def overlapping() -> tuple[Tensor, ...]:
        x = torch.randn(2, 3, 30, 8, generator=torch.Generator().manual_seed(0))
        return x[:, :, :21], x[:, :, 3:24], x[:, :, 5:26]

    def separate() -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in overlapping())

    model = Shifted()
    for order in ((overlapping, separate), (separate, overlapping)):
        for original in (model, fx.symbolic_trace(model)):
            torch._dynamo.reset()
            fast = einscade.optimize(original, inner="aot_eager")
            for inputs in order * 2:
                ours, theirs = inputs(), inputs()
                torch.testing.assert_close(fast(*ours), model(*theirs), rtol=1e-5, atol=1e-5)
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert rewritten_sites(fast) == 1


def test_an_intermediate_updated_in_place() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)
        scores.mul_(0.3)
        scores[:, :, :, 5:9] = float("-inf")
        scores += 0.25 * torch.arange(27)
        return scores.softmax(-1) @ v

    _check(masked, *_qkv())


def test_a_cache_updated_in_place() -> None:
    """A static cache: a step writes its key and value into buffers and attends over all that is there."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(1, 3, 16, 8))
            self.register_buffer("values", torch.zeros(1, 3, 16, 8))

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            self.keys.index_copy_(2, position, x)
            self.values.index_copy_(2, position, 2 * x)
            scores = x @ self.keys.transpose(-1, -2)
            scores = scores.masked_fill(torch.arange(16) > position[:, None], float("-inf"))
            return scores.softmax(-1) @ self.values

    torch.manual_seed(3)
    model, twin = Cached(), Cached()
    fast = einscade.optimize(twin, inner="eager", dynamic=True)
    for step in range(6):
        x, position = torch.randn(1, 3, 1, 8), torch.tensor([step])
        torch.testing.assert_close(fast(x, position), model(x, position), rtol=1e-5, atol=1e-6)
        assert torch.equal(twin.keys, model.keys)


def test_the_weights_are_returned_too() -> None:
    """An intermediate that is also an output is produced, rewritten or not."""

    def with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights

    model = Function(with_weights)
    assert_as_exact(einscade.optimize(model, inner="eager"), model, _qkv())


def test_two_regions_share_scores() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v, torch.sigmoid(scores) @ v

    model = Function(shared)
    assert_as_exact(einscade.optimize(model, inner="eager"), model, _qkv())


def test_two_regions_share_weights() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights @ v.flip(2)

    model = Function(shared)
    assert_as_exact(einscade.optimize(model, inner="eager"), model, _qkv())


def test_two_regions_share_scores_that_are_returned() -> None:
    """Both regions have them as a result; the one that is put back first gives them."""

    def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        scores = q @ k.transpose(-1, -2)
        return scores.softmax(-1) @ v, torch.sigmoid(scores) @ v, scores

    _check(shared, *_qkv(), sites=2)


def test_two_regions_share_weights_that_are_returned() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights @ v.flip(2), weights

    _check(shared, *_qkv(), sites=2)


def test_one_attention_feeds_the_next() -> None:
    _check(lambda q, k, v: attention(attention(q, k, v), k, v), *_qkv(), sites=2)


def test_a_graph_break_in_between() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(first, k, v)

    _check(broken, *_qkv(), sites=2)


def test_a_value_that_steers_python() -> None:
    def steered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v)
        return out * 2 if out.sum().item() > 0 else attention(out, k, v)

    model = Function(steered)
    fast = einscade.optimize(model, inner="eager")
    for seed in range(4):
        torch.manual_seed(seed)
        assert_as_exact(fast, model, _qkv())


def test_state_is_shared_with_the_original() -> None:
    """The optimised module has the original's parameters, not copies, under the same names."""
    model = CausalAttention()
    fast = einscade.optimize(model, inner="eager")
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    x = torch.randn(2, 9, 32)
    fast(x)
    with torch.no_grad():
        model.out.weight.mul_(2.0)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_rows_without_any_key() -> None:
    """A row masked whole. By a large finite number: the original's mean of all values. By -inf: NaN there, 0 here."""

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fill: float) -> Tensor:
        return (q @ k.transpose(-1, -2)).masked_fill(~mask, fill).softmax(-1) @ v

    q, k, v = _qkv()
    mask = torch.rand(21, 27) > 0.5
    mask[4] = False
    _check(lambda *args: masked(*args, torch.finfo(torch.float32).min), q, k, v, mask)

    model = Function(lambda *args: masked(*args, float("-inf")))
    fast = einscade.optimize(model, inner="eager")
    expected, actual = model(q, k, v, mask), fast(q, k, v, mask)
    assert expected[:, :, 4].isnan().all()
    assert (actual[:, :, 4] == 0).all()
    kept = [row for row in range(21) if row != 4]
    torch.testing.assert_close(actual[:, :, kept], expected[:, :, kept], rtol=1e-5, atol=1e-6)
