"""An optimised module as a module: its state, its copies, its modes, what is done to it or to the original later on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn

import einscade
from tests.models.small import CausalAttention, rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Rooted(nn.Module):
    """Attention with a parameter, a float buffer and a mask of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.register_buffer("bias", torch.randn(19, 19))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight @ x.mT + self.bias).softmax(-1) @ x


def _optimised(model: nn.Module) -> nn.Module:
    fast = einscade.optimize(model, inner="eager")
    fast(torch.randn(2, 19, 32))
    return fast


def _assert_same(fast: nn.Module, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(2, 19, 32, dtype=dtype)
    with torch.no_grad():
        actual, expected = fast(x), model(x)
    assert actual.dtype == expected.dtype
    tolerance = 4 * torch.finfo(dtype).eps
    assert float((actual - expected).double().norm()) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cast", ["fast", "original"])
def test_a_cast_of_one_is_a_cast_of_both(dtype: torch.dtype, cast: str) -> None:
    """Parameters are cast in place, buffers are replaced: also those of the root."""
    model = Rooted()
    fast = _optimised(model)
    (fast if cast == "fast" else model).to(dtype)
    assert {t.dtype for m in (fast, model) for t in (*m.parameters(), *m.buffers())} == {dtype}
    _assert_same(fast, model, dtype)


def test_what_replaces_a_parameter_or_a_buffer_of_the_root_counts_for_both() -> None:
    model = Rooted()
    fast = _optimised(model)
    model.load_state_dict(Rooted().state_dict(), assign=True)
    _assert_same(fast, model)
    fast.weight = nn.Parameter(torch.randn(32, 32))
    model.bias = torch.randn(19, 19)
    _assert_same(fast, model)
    assert fast.weight is model.weight


def test_training_the_original_trains_the_copy() -> None:
    model = CausalAttention()
    fast = _optimised(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        fast(torch.randn(2, 19, 32)).sin().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        _assert_same(fast, model)


def test_modes_and_gradients_that_are_switched_between_calls() -> None:
    class Dropping(CausalAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = Dropping()
    fast = _optimised(model)
    x = torch.randn(2, 19, 32)
    assert not torch.equal(fast(x), fast(x))
    fast.eval()
    model.eval()
    _assert_same(fast, model)
    for wanted in (False, True):
        model.requires_grad_(wanted)
        assert fast(x).requires_grad is wanted


def test_hooks_before_and_after() -> None:
    model = nn.Sequential(CausalAttention(), CausalAttention())
    model.register_forward_hook(lambda module, args, output: output * 2)
    fast = _optimised(model)
    plain = model(x := torch.randn(2, 19, 32))
    own = fast.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(fast(x), plain + 1, rtol=1e-5, atol=1e-5)
    own.remove()
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    _assert_same(fast, model)


def test_submodules_that_are_replaced_or_parametrised_later() -> None:
    model = nn.Sequential(CausalAttention(), CausalAttention())
    fast = _optimised(model)
    model[0].q = nn.Sequential(model[0].q, nn.Linear(32, 32))
    _assert_same(fast, model)
    nn.utils.parametrizations.weight_norm(model[1].q)
    _assert_same(fast, model)


@pytest.mark.parametrize("called", [False, True])
def test_a_deep_copy_is_optimised_too(called: bool) -> None:
    fast = einscade.optimize(CausalAttention(), inner="eager")
    x = torch.randn(2, 19, 32)
    if called:
        fast(x)
    twin = copy.deepcopy(fast)
    assert twin.report is einscade.report(twin)
    assert twin.report is not fast.report
    assert twin.report.sites == []
    with torch.no_grad():
        twin.out.weight.mul_(2)
        twin.out.bias.mul_(2)
    torch.testing.assert_close(twin(x), 2 * fast(x))
    assert rewritten_sites(twin) == 1


def test_a_pickled_module_is_loaded_as_the_plain_one() -> None:
    fast = _optimised(nn.Sequential(CausalAttention()))
    loaded = pickle.loads(pickle.dumps(fast))
    _assert_same(loaded, fast)
    assert "pass it to einscade.optimize again" in str(loaded.report)
    with pytest.raises(ValueError, match="it is a copy of what was, and plain"):
        einscade.report(loaded)
    again = _optimised(loaded)
    assert again.report is einscade.report(again)
    assert rewritten_sites(again) == 1


def test_a_saved_graph_module_is_loaded_as_the_plain_one() -> None:
    class Plain(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    fast = einscade.optimize(fx.symbolic_trace(Plain()))
    args = tuple(torch.randn(2, n, 8) for n in (13, 17, 17))
    expected = fast(*args)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(*args), expected)
    assert "torch.ops.einscade" in fast.code
    assert "torch.ops.einscade" not in loaded.code


def test_optimised_twice_and_inside_of_another() -> None:
    model = nn.Sequential(CausalAttention(), CausalAttention())
    once = _optimised(model)
    twice = _optimised(once)
    assert twice.report is einscade.report(twice)
    assert twice.report is not once.report
    assert rewritten_sites(once) == rewritten_sites(twice) == 2
    inside = _optimised(nn.Sequential(einscade.optimize(model[0], inner="eager"), model[1]))
    assert rewritten_sites(inside) == 2
    _assert_same(inside, model)
