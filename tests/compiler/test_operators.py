"""`torch.ops.einscade.cascade` as torch sees it: schema, fake tensors, autograd, compilation, host time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from einscade.compiler import gradients
from einscade.compiler.operators import cascade, gradient_of
from einscade.ir.text import parse_cascade
from einscade.passes.rewrite import NotApplicable
from einscade.runtime.program import Program

ATTENTION = parse_cascade("""
cascade attention(Q[b,h,p,e], K[b,g,m,e], V[b,g,m,f], A[h,p,m]) -> O
  where b < B, h < 4, g < 2, p < P, m < M, e < 8, f < 8
  S[b,h,p,m] = sum(e) 0.25 * Q[b,h,p,e] * K[b,h // 2,m,e] if m <= p
  T[b,h,p,m] = S[b,h,p,m] + A[h,p,m]
  G[b,h,p] = max(m) T[b,h,p,m]
  W[b,h,p,m] = exp(T[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h // 2,m,f] / Z[b,h,p]
""")
TEXT = Program("exact", ATTENTION, (("O", ("b", "p", "h", "f")),)).text


def _inputs(b: int = 2, p: int = 9, m: int = 9, grad: bool = False) -> tuple[list[torch.Tensor], list[int]]:
    shapes = ((b, 4, p, 8), (b, 2, m, 8), (b, 2, m, 8), (4, p, m))
    return [torch.randn(s, requires_grad=grad) for s in shapes], [b, m, p]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    keep = torch.ones(q.shape[2], k.shape[2]).tril().bool()
    return ((q @ k.mT * 0.25 + a).masked_fill(~keep, -torch.inf)).softmax(-1) @ v


def test_values_and_memory_order() -> None:
    inputs, sizes = _inputs(p=5, m=7)
    (out,) = cascade(inputs, sizes, TEXT)
    torch.testing.assert_close(out, _plain(*inputs), rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    inputs, sizes = _inputs(grad=grad)
    torch.library.opcheck(cascade, (inputs, sizes, TEXT), rtol=1e-4, atol=1e-5)


def test_fake_tensors_with_symbols() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs, _ = _inputs(b=3, p=5, m=7)
    fakes = [mode.from_tensor(x) for x in inputs]
    b, m, p = fakes[0].shape[0], fakes[1].shape[2], fakes[0].shape[2]
    (out,) = cascade(fakes, [b, m, p], TEXT)
    (real,) = cascade(inputs, [3, 7, 5], TEXT)
    assert [int(n) for n in out.shape] == list(real.shape)
    assert [int(n) for n in out.stride()] == list(real.stride())
    assert isinstance(out.shape[0], torch.SymInt)


@pytest.mark.parametrize(("p", "m"), [(9, 9), (3, 11), (20, 4)])
@pytest.mark.parametrize("needed", [(True, True, True, True), (False, True, False, False), (True, False, True, True)])
def test_gradients_match_autograd(p: int, m: int, needed: tuple[bool, ...]) -> None:
    inputs, sizes = _inputs(p=p, m=m)
    inputs = [x.requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
    wanted = [x for x in inputs if x.requires_grad]
    (out,) = cascade(inputs, sizes, TEXT)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, wanted, grad)
    exact = [x.detach().double().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
    theirs = torch.autograd.grad(_plain(*exact), [x for x in exact if x.requires_grad], grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_the_gradient_is_a_cascade_that_stores_nothing_quadratic() -> None:
    plan = gradient_of(TEXT, (True, True, True, False))
    assert plan.strategy == gradients.DIFFERENTIATED
    assert plan.backward is not None
    saved = [plan.backward.cascade.tensors[name] for name in plan.saved_names]
    assert all(not {"p", "m"} <= set(t.ranks) for t in saved)


@pytest.mark.parametrize("stop", [NotApplicable("statement S has no derivative"), KeyError("S")], ids=["no", "broken"])
@pytest.mark.filterwarnings("ignore:.*recomputed:RuntimeWarning")
def test_without_a_derivative_the_flat_form_is_recomputed(monkeypatch: pytest.MonkeyPatch, stop: Exception) -> None:
    def refuse(*args: object) -> None:
        raise stop

    monkeypatch.setattr(gradients, "differentiate", refuse)
    gradient_of.cache_clear()
    inputs, sizes = _inputs(grad=True)
    (out,) = cascade(inputs, sizes, TEXT)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(_plain(*inputs), inputs, grad)
    plan = gradient_of(TEXT, (True, True, True, True))
    gradient_of.cache_clear()
    assert plan.strategy == gradients.RECOMPUTED
    assert plan.reason is not None
    assert plan.reason.endswith(str(stop))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SHIFTED = Program(
    "exact",
    parse_cascade("""
cascade shifted(Q[b,p,e], K[b,m,e], R[n,e], I[p,m]: i64, A[k], V[b,m,f]) -> O
  where b < B, p < 24, m < 24, n < 25, e < 8, f < 8, k < 50
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]
  D[b,p,n] = sum(e) Q[b,p,e] * R[n,e]
  T[b,p,m] = S[b,p,m] + D[b,(24*p + m + 24) // 25,(24*p + m + 24) % 25] + A[I[p,m]]
  G[b,p] = max(m) T[b,p,m]
  W[b,p,m] = exp(T[b,p,m] - G[b,p])
  Z[b,p] = sum(m) W[b,p,m]
  O[b,p,f] = sum(m) W[b,p,m] * V[b,m,f] / Z[b,p]
"""),
).text


@pytest.mark.parametrize(("shifted", "strategy"), [(True, gradients.RECOMPUTED), (False, gradients.DIFFERENTIATED)])
def test_what_a_gradient_would_take_out_of_proportion_is_recomputed(shifted: bool, strategy: str) -> None:
    """A shift written as a reshape: which scores an element of D reaches, the gradient would find out by comparing all
    pairs. The entries of a table (A) are few, and their gradient is a cascade."""
    shapes = ((3, 24, 8), (3, 24, 8), (25, 8), (50,), (3, 24, 8))
    needed = (shifted, True, shifted, True, True)
    q, k, r, a, v = [torch.randn(s, requires_grad=n) for s, n in zip(shapes, needed, strict=True)]
    i = torch.randint(50, (24, 24))
    (out,) = cascade([q, k, r, i, a, v], [3], SHIFTED)
    d = (q @ r.mT).reshape(3, -1)[:, 24:].reshape(3, 24, 24)
    expected = (q @ k.mT + d + a[i]).softmax(-1) @ v
    wanted, grad = [x for x in (q, k, r, a, v) if x.requires_grad], torch.randn_like(out)
    found = zip(*(torch.autograd.grad(o, wanted, grad) for o in (out, expected)), strict=True)
    for ours, theirs in found:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    plan = gradient_of(SHIFTED, (*needed[:3], False, *needed[3:]))
    assert plan.strategy == strategy, plan.reason


def test_under_aot_autograd() -> None:
    inputs, sizes = _inputs(grad=True)
    compiled = torch.compile(lambda *xs: cascade(list(xs), sizes, TEXT)[0].sin(), backend="aot_eager", fullgraph=True)
    out = compiled(*inputs)
    expected = _plain(*inputs).sin()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_outputs_are_fresh_memory() -> None:
    """A softmax over one key is 1: what is left is a copy of the value, and it has to be one."""
    program = Program(
        "exact", parse_cascade("cascade one(V[b,u,f]) -> O\n  where b < B, u < 1, f < 8\n  O[b,f] = V[b,0,f]")
    )
    v = torch.randn(3, 1, 8)
    (out,) = cascade([v], [3], program.text)
    torch.testing.assert_close(out, v[:, 0], rtol=0, atol=0)
    assert out.data_ptr() != v.data_ptr()


def test_autocast_around_it_casts_nothing() -> None:
    inputs, sizes = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out,) = cascade(inputs, sizes, TEXT)
    torch.testing.assert_close(out, _plain(*inputs), rtol=1e-5, atol=1e-5)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


AROUND: dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "nothing": (nullcontext, lambda x: x, False),
    "no gradients": (torch.no_grad, lambda x: x.requires_grad_(), False),
    "inference": (torch.inference_mode, lambda x: x, False),
    "autocast": (lambda: torch.autocast("cpu"), lambda x: x, False),
    "gradients": (nullcontext, lambda x: x.requires_grad_(), False),
    "below autograd": (torch._C._AutoDispatchBelowAutograd, lambda x: x.requires_grad_(), False),
    "a dispatch mode": (_Dispatch, lambda x: x, True),
    "a function mode": (_Function, lambda x: x, True),
    "a negation to come": (nullcontext, lambda x: torch._neg_view(-x), True),
    "a subclass": (nullcontext, lambda x: x.as_subclass(_Subclass), True),
    "a profile": (lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), lambda x: x, True),
    "a parameter": (torch.no_grad, lambda x: torch.nn.Parameter(x), False),
    "tangents": (forward_ad.dual_level, lambda x: x, True),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_dispatcher_decides_where_it_has_anything_to_decide(around: str) -> None:
    """Elsewhere the kernel is called at once; the result is the same."""
    context, change, decides = AROUND[around]
    inputs, sizes = _inputs()
    expected = _plain(*inputs)
    for _ in range(2):
        cascade(inputs, sizes, TEXT)  # known from here on
    dispatched = mock.Mock(side_effect=cascade._op)
    changed = [change(inputs[0].clone()), *inputs[1:]]
    with mock.patch.object(cascade, "_op", dispatched), context():
        (out,) = cascade(changed, sizes, TEXT)
    assert (dispatched.call_count > 0) == decides
    assert out.requires_grad == (around == "gradients")
    assert out.is_inference() == (around == "inference")
    torch.testing.assert_close(torch.Tensor(out.detach()), expected, rtol=1e-5, atol=1e-5)


def test_what_is_known_of_a_program_does_not_hide_what_is_wrong() -> None:
    inputs, sizes = _inputs()
    for _ in range(2):
        cascade(inputs, sizes, TEXT)
    with pytest.raises(ValueError, match="has 4 inputs, 3 were given"):
        cascade(inputs[:3], sizes, TEXT)
    with pytest.raises(ValueError, match=r"is torch\.float64"):
        cascade([inputs[0].double(), *inputs[1:]], sizes, TEXT)
    with pytest.raises(ValueError, match="the sizes say"):
        cascade([inputs[0][:, :, 1:], *inputs[1:]], sizes, TEXT)
    same = [inputs[0], inputs[1], inputs[1], inputs[3]]
    torch.testing.assert_close(cascade(same, sizes, TEXT)[0], _plain(*same), rtol=1e-5, atol=1e-5)


def test_transforms_are_not_passed_by() -> None:
    inputs, sizes = _inputs()
    stack = [torch.stack([x, -x]) for x in inputs]
    dispatched = mock.Mock(side_effect=cascade._op)
    with mock.patch.object(cascade, "_op", dispatched), contextlib.suppress(RuntimeError):  # there is no batching rule
        torch.func.vmap(lambda *xs: cascade(list(xs), sizes, TEXT)[0])(*stack)
    assert dispatched.call_count > 0


def test_host_time_beside_the_kernel() -> None:
    """What the operator adds to its kernel. Generous: other work may run on the machine; the least of many counts."""
    inputs, sizes = _inputs(b=1, p=1, m=1)
    cascade(inputs, sizes, TEXT)
    from einscade.runtime.call import call_for

    with torch.no_grad():
        bare = call_for(TEXT, inputs[0].device).run

        def least(call: object) -> float:
            times = []
            for _ in range(300):
                start = time.perf_counter()
                call()  # type: ignore[operator]
                times.append(time.perf_counter() - start)
            return min(times)

        added = least(lambda: cascade(inputs, sizes, TEXT)) - least(lambda: bare(inputs, sizes))
    assert added < 60e-6, f"{added * 1e6:.1f} µs"
    print(f"\noperator adds {added * 1e6:.1f} µs")
