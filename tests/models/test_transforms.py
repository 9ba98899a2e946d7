"""Derivatives of all kinds, torch.func and modes, around an optimised model and within it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import einscade
from tests.models.small import CausalAttention, rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Tensor = torch.Tensor


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def _qkv(n: int = 5, s: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 2, length, 4, dtype=dtype) for length in (n, s, s))  # type: ignore[return-value]


def _leaves(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in values)


def _optimised(model: nn.Module, args: tuple[Tensor, ...]) -> list[nn.Module]:
    """As a module and as a GraphModule, called before."""
    fast = [einscade.optimize(m, inner="eager") for m in (model, fx.symbolic_trace(model))]
    for f in fast:
        f(*args)
        assert rewritten_sites(f) == 1
    return fast


def _assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients() -> None:
    """The gradient's program is no function that autograd knows: with create_graph another form runs."""

    def second(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(model(*args).sin().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    args = _leaves(_qkv())
    for fast in _optimised(Plain(), args):
        _assert_close(second(fast, args), second(Plain(), args))


def test_gradients_of_gradients_where_one_tensor_is_all_inputs() -> None:
    def second(model: nn.Module, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(model(x, x, x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    (x,) = _leaves(_qkv()[:1])
    fast = einscade.optimize(Plain(), inner="eager")
    _assert_close(second(fast, x), second(Plain(), x))
    assert rewritten_sites(fast) == 1


def test_compiled_backwards_refuse_gradients_of_gradients() -> None:
    class More(Plain):
        def forward(self, *args: Tensor) -> Tensor:
            return super().forward(*args).sin()

    fast = einscade.optimize(More(), inner="aot_eager")
    args = _leaves(_qkv())
    first = torch.autograd.grad(fast(*args).sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first[0].sum().backward()


def test_gradcheck_and_two_backwards() -> None:
    args = _leaves(_qkv(3, 4))
    for fast in _optimised(Plain(), args):
        assert torch.autograd.gradcheck(fast, args)
        loss = fast(*args).sin().sum()
        first = torch.autograd.grad(loss, args, retain_graph=True)
        _assert_close(torch.autograd.grad(loss, args), first)


def test_forward_mode_derivatives() -> None:
    args, tangent = _qkv(), _qkv()[0]

    def directional(model: nn.Module) -> Tensor | None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(args[0], tangent)
            return forward_ad.unpack_dual(model(dual, *args[1:])).tangent

    for fast in _optimised(Plain(), args):
        _assert_close(directional(fast), directional(Plain()))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": lambda f, q, k, v: torch.func.vmap(f)(q, k, v),
    "grad": lambda f, q, k, v: torch.func.grad(lambda *a: f(*a).sin().sum(), argnums=(0, 1, 2))(q, k, v),
    "vjp": lambda f, q, k, v: torch.func.vjp(f, q, k, v)[1](torch.ones_like(q)),
    "jvp": lambda f, q, k, v: torch.func.jvp(f, (q, k, v), (q, k, v))[1],
    "hessian": lambda f, q, k, v: torch.func.hessian(lambda q: f(q, k, v).sin().sum())(q),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_around_a_model(name: str) -> None:
    args = _qkv()
    for fast in _optimised(Plain(), args):
        _assert_close(TRANSFORMS[name](fast, *args), TRANSFORMS[name](Plain(), *args))


@pytest.mark.parametrize("name", ["vmap", "grad", "vjp", "jvp"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_torch_func_within_a_model(name: str, inner: str) -> None:
    """A graph that differentiates a part of itself is left as it was: what is traced runs without gradients."""

    def transformed(*args: Tensor) -> Tensor:
        result = TRANSFORMS[name](Plain(), *args)
        return result[0] if isinstance(result, tuple) else result

    args = _qkv()
    fast = einscade.optimize(Function(transformed), inner=inner)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*differentiates a part of itself")
        _assert_close(fast(*args), transformed(*args))
        _assert_close(fast(*args), transformed(*args))  # no level of torch.func was left open
    if name in ("grad", "vjp"):
        assert "differentiates a part of itself" in str(fast.report)


def test_a_model_that_calls_backward() -> None:
    """Dynamo breaks the graph there; it must not trace into the kernels of a backward pass."""

    def descended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        Plain()(q, k, v).sin().sum().backward()
        return q - q.grad

    args = _qkv()
    fast = einscade.optimize(Function(descended), inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch.*")
        _assert_close(fast(*args), descended(*args))
    assert rewritten_sites(fast) == 1


def test_functional_call_with_other_parameters_and_buffers() -> None:
    class Masked(CausalAttention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(19, 19).tril().bool())

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x)
            return (y @ y.mT).masked_fill(~self.mask, -torch.inf).softmax(-1) @ y

    model = Masked().double()
    fast = einscade.optimize(model, inner="eager")
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    _assert_close(fast(x), model(x))
    other = {"mask": torch.ones(19, 19).triu().bool(), "q.weight": torch.randn(32, 32, dtype=torch.float64)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*a buffer that a graph was specialised on")
        _assert_close(torch.func.functional_call(fast, other, x), torch.func.functional_call(model, other, x))
    _assert_close(fast(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_model(reentrant: bool) -> None:
    def gradient(model: nn.Module) -> Tensor:
        q, k, v = _leaves(args)
        checkpoint(model, q, k, v, use_reentrant=reentrant).sin().sum().backward()
        assert k.grad is not None
        return k.grad

    args = _qkv()
    for fast in _optimised(Plain(), args):
        _assert_close(gradient(fast), gradient(Plain()))


def test_one_model_through_all_modes() -> None:
    model = CausalAttention()
    fast = einscade.optimize(model, inner="eager")
    x = torch.randn(2, 19, 32)
    modes: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ]
    for mode in (*modes, *modes):
        with mode():
            actual, expected = fast(x), model(x)
        assert (actual.dtype, actual.requires_grad) == (expected.dtype, expected.requires_grad)
        assert actual.is_inference() == expected.is_inference()
        tolerance = 4 * torch.finfo(expected.dtype).eps
        assert float((actual - expected).double().norm()) <= tolerance * float(expected.double().norm())


def test_threads_that_make_the_first_calls() -> None:
    model = CausalAttention().double()
    fast = einscade.optimize(model, inner="eager")
    failures: list[BaseException] = []

    def calls(length: int) -> None:
        try:
            for n in (length, length + 1, 9):
                x = torch.randn(2, n, 32, dtype=torch.float64)
                _assert_close(fast(x), model(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=calls, args=(5 + 2 * i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_an_interrupted_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from einscade.compiler import rewrite

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    args = _qkv()
    fast = einscade.optimize(Plain(), inner="eager")
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "find", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast(*args)
    _assert_close(fast(*args), Plain()(*args))
    assert rewritten_sites(fast) == 1
