"""The short way into what Dynamo compiled: taken where its guards hold, and for nothing that is unusual."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import einscade
from einscade.compiler import frame
from tests.models.small import rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((16,), 0.25))
        self.register_buffer("bias", torch.randn(9, 9))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x * self.scale) @ x.mT + self.bias[: x.shape[1], : x.shape[1]]
        return self.dropout(scores.softmax(-1) @ x)


@pytest.fixture
def through_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that go through torch.compile's wrapper."""
    calls: list[tuple[Any, ...]] = []
    plain: Callable[..., Any] = torch.compile

    def compiling(*args: Any, **options: Any) -> Callable[..., Any]:
        compiled = plain(*args, **options)

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return compiled(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiling)
    return calls


def _both(dynamic: bool | None = False) -> tuple[nn.Module, nn.Module]:
    model = Attention()
    return model, einscade.optimize(model, inner="eager", dynamic=dynamic)


def _agree(fast: nn.Module, model: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    actual, expected = fast(*args), model(*args)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 if expected.dtype is torch.bfloat16 else 1e-5)
    assert actual.requires_grad == expected.requires_grad
    return actual


def test_only_the_first_call_goes_through_the_wrapper(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    for _ in range(3):
        _agree(fast, model, torch.randn(2, 9, 16))
    assert len(through_the_wrapper) == 1
    assert rewritten_sites(fast) == 1


def _cast(model: nn.Module, fast: nn.Module) -> None:
    model.to(torch.bfloat16)


def _another_weight(model: nn.Module, fast: nn.Module) -> None:
    fast.scale = nn.Parameter(torch.randn(16), requires_grad=False)


def _another_buffer(model: nn.Module, fast: nn.Module) -> None:
    model.bias = torch.randn(10, 9)


def _another_module(model: nn.Module, fast: nn.Module) -> None:
    model.dropout = nn.Identity()
    fast.dropout = nn.Identity()


CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Any, Any]] = {
    "shape": (lambda x: x[:, :5], None, None),
    "strides": (lambda x: x.mT.contiguous().mT, None, None),
    "requires_grad": (lambda x: x.requires_grad_(), None, None),
    "no_grad": (lambda x: x, None, torch.no_grad),
    "inference": (lambda x: x, None, torch.inference_mode),
    "autocast": (lambda x: x, None, lambda: torch.autocast("cpu", torch.bfloat16)),
    "dtype": (lambda x: x.bfloat16(), _cast, None),
    "weight": (lambda x: x, _another_weight, None),
    "buffer": (lambda x: x, _another_buffer, None),
    "module": (lambda x: x, _another_module, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_compiled_anew(change: str, through_the_wrapper: list[Any]) -> None:
    prepare, apply, mode = CHANGES[change]
    model, fast = _both()
    for _ in range(2):
        _agree(fast, model, torch.randn(2, 9, 16))
    if apply is not None:
        apply(model, fast)
    context: AbstractContextManager[Any] = nullcontext() if mode is None else mode()
    with context:
        for _ in range(2):
            _agree(fast, model, prepare(torch.randn(2, 9, 16)))
    assert len(through_the_wrapper) == 2
    if apply is None:  # both forms are there now
        for _ in range(2):
            _agree(fast, model, torch.randn(2, 9, 16))
            with nullcontext() if mode is None else mode():
                _agree(fast, model, prepare(torch.randn(2, 9, 16)))
        assert len(through_the_wrapper) == 2


def test_gradients_are_those_of_the_original(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    for _ in range(3):
        x = torch.randn(2, 9, 16)
        found = []
        for m in (fast, model):
            model.scale.grad = None
            m(x).sin().sum().backward()
            found.append(model.scale.grad)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(through_the_wrapper) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_after_a_graph_break_the_rest_is_still_compiled(nested: bool, through_the_wrapper: list[Any]) -> None:
    class Breaking(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x + 1)
            torch._dynamo.graph_break()
            return super().forward(y)

    model = Breaking()
    fast = einscade.optimize(model, inner="eager")
    with torch._dynamo.config.patch(nested_graph_breaks=nested):
        for _ in range(3):
            _agree(fast, model, torch.randn(2, 9, 16))
    assert len(through_the_wrapper) == 3
    assert rewritten_sites(fast) == 2


def test_what_is_unusual_goes_through_the_wrapper(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    x = torch.randn(2, 9, 16)
    _agree(fast, model, x)

    def went_through(call: Callable[[], Any]) -> bool:
        before = len(through_the_wrapper)
        torch.testing.assert_close(call(), model(x), rtol=1e-4, atol=1e-5)
        return len(through_the_wrapper) > before

    assert not went_through(lambda: fast(x))
    with torch.compiler.set_stance("force_eager"):
        assert went_through(lambda: fast(x))
    with torch.compiler.set_stance("default", force_backend="eager"):
        assert went_through(lambda: fast(x))
    with torch._guards.tracing(torch._guards.TracingContext(None)):
        assert went_through(lambda: fast(x))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert went_through(lambda: fast(x))
    with FlopCounterMode(display=False):
        assert went_through(lambda: fast(x))
    with pytest.raises(RuntimeError, match="FX"):
        make_fx(fast)(x)
    with pytest.raises(RuntimeError, match="jit"):
        torch.jit.trace(fast, (x,), check_trace=False)
    assert not went_through(lambda: fast(x))


def test_within_another_compiled_function(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    x = torch.randn(2, 9, 16)
    _agree(fast, model, x)

    def breaking(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return fast(y) * 2

    outer = torch.compile(breaking, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(outer(x), model(x + 1) * 2, rtol=1e-4, atol=1e-5)
        _agree(fast, model, x)


def test_what_dynamo_forgets_is_compiled_again(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    for n in range(1, 4):
        for _ in range(2):
            _agree(fast, model, torch.randn(2, 9, 16))
        assert len(through_the_wrapper) == n
        torch._dynamo.reset()


def test_an_error_leaves_nothing_behind(through_the_wrapper: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from einscade.compiler import operators

    model, fast = _both()
    x = torch.randn(2, 9, 16)
    _agree(fast, model, x)
    with monkeypatch.context() as broken:
        broken.setattr(operators, "_run", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fast(x)
    _agree(fast, model, x)
    assert len(through_the_wrapper) == 1


def test_threads_in_modes_of_their_own(through_the_wrapper: list[Any]) -> None:
    model, fast = _both()
    problems: list[str] = []

    def work(grad: bool, n: int) -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(20):
                x = torch.randn(2, n, 16)
                y = fast(x)
                if y.requires_grad != grad or not torch.allclose(y, model(x), rtol=1e-4, atol=1e-5):
                    problems.append(f"{grad} {n}")

    for grad, n in ((True, 9), (False, 9), (True, 5)):
        work(grad, n)
    threads = [threading.Thread(target=work, args=(g, n)) for g, n in ((True, 9), (False, 9), (True, 5), (False, 9))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert problems == []
    assert len(through_the_wrapper) == 3


def test_a_version_that_is_not_known_has_the_wrapper_alone(
    through_the_wrapper: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "KNOWN_VERSIONS", ())
    model, fast = _both()
    for _ in range(3):
        _agree(fast, model, torch.randn(2, 9, 16))
    assert len(through_the_wrapper) == 3


def test_a_module_that_is_dropped_is_freed_where_dynamo_forgets_it() -> None:
    fast = _both()[1]
    for _ in range(2):
        fast(torch.randn(2, 9, 16))
    dropped = weakref.ref(fast)
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert dropped() is None
