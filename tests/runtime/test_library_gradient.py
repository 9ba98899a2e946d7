"""The library's backward calls: which gradients have one, and that it computes them, against the interpreter.

GPU calls run here in a stand-in for the library's kernel, which holds their arguments to what the kernel asks for; the
kernels themselves in tests marked `gpu`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from einscade.compiler.gradients import gradient
from einscade.ir.cascade import Cascade
from einscade.ir.device import A100, CPU, H200, MI300X, Device
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.runtime import library_gradient
from einscade.runtime.library import NotInLibrary
from einscade.runtime.modules import load
from einscade.runtime.program import DTYPES, Program, parse_program

ATTENTION = """
cascade attention(Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32) -> O[b,h,p,f]: f32
  where b < B, h < 4, p < P, m < M, e < 8, f < 8
  S[b,h,p,m] = sum(e) 0.25 * Q[b,h,p,e] * K[b,h,m,e]
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f]: f32 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
SCORES = "0.25 * Q[b,h,p,e] * K[b,h,m,e]"
CAUSAL = ATTENTION.replace(SCORES, SCORES + " if m <= p")
SQUARE = CAUSAL.replace("p < P, m < M", "p < N, m < N")
GROUPED = (
    SQUARE.replace("h < 4", "h < 4, g < 2").replace("K[b,h,m,e]: ", "K[b,g,m,e]: ")
    .replace("V[b,h,m,f]: ", "V[b,g,m,f]: ").replace("K[b,h,m,e] if", "K[b,h // 2,m,e] if")
    .replace("* V[b,h,m,f]", "* V[b,h // 2,m,f]")
)  # fmt: skip
SIZES = {"B": 2, "P": 7, "M": 11, "N": 9}


def _gradient(text: str, needed: Sequence[bool] | None = None) -> Program:
    program = Program("exact", parse_cascade(text))
    found = gradient(program, tuple(needed or [True] * len(program.cascade.inputs))).backward
    assert found is not None
    assert parse_program(found.text) == found
    return found


def _shape(cascade: Cascade, name: str, sizes: Mapping[str, int]) -> torch.Size:
    return torch.Size(int(n.subs({s: sizes[s.name] for s in n.free_symbols})) for n in cascade.shape(name))


def _random(cascade: Cascade, sizes: Mapping[str, int], like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    made = dict(like or {})
    for t in cascade.inputs:
        made.setdefault(t.name, torch.randn(_shape(cascade, t.name, sizes), dtype=torch.float64).to(DTYPES[t.dtype]))
    return {t.name: made[t.name].to(DTYPES[t.dtype]) for t in cascade.inputs}


def _inputs(program: Program, sizes: Mapping[str, int], given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Random inputs, and what the forward pass saves of them."""
    assert program.derived is not None
    forward = program.derived.forward
    values = _random(forward, sizes, given)
    return _random(program.cascade, sizes, {**values, **interpret(forward, values, sizes), **(given or {})})


def _errors(
    program: Program,
    kind: str = "flash",
    device: Device = CPU,
    given: Mapping[str, Tensor] | None = None,
    on: str = "cpu",
    **sizes: int,
) -> list[float]:
    """Of each gradient that the call makes, relative to the interpreter's norm."""
    known = {s: (SIZES | sizes)[s] for s in program.cascade.symbols}
    inputs = _inputs(program, known, given)
    expected = interpret(program.cascade, inputs, known)
    found = _called(program, inputs, known, kind, device, on)
    return [float((found[n].double() - expected[n]).norm() / expected[n].norm()) for n in program.cascade.outputs]


def _called(
    program: Program,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    kind: str = "flash",
    device: Device = CPU,
    on: str = "cpu",
) -> dict[str, Tensor]:
    """The gradients that the call makes, by name, each of the shape, dtype and strides that it promises."""
    cascade = program.cascade
    run = load(library_gradient.emit(program, kind, device), cascade.name)
    found = dict(zip(cascade.outputs, run(*(x.to(on) for x in inputs.values()), **sizes), strict=True))
    for name, got in found.items():
        assert got.shape == _shape(cascade, name, sizes)
        assert got.dtype == DTYPES[cascade.tensors[name].dtype]
        assert got.is_contiguous()
    return {name: x.cpu() for name, x in found.items()}


def _agrees(text: str, needed: Sequence[bool] | None = None, **sizes: int) -> None:
    assert max(_errors(_gradient(text, needed), **sizes)) < 1e-5


# -- on the CPU: the library's own kernel ------------------------------------------------------------------------------


def test_plain_and_causal_at_any_lengths() -> None:
    for text in (ATTENTION, CAUSAL):
        for p, m in ((7, 11), (11, 7), (33, 33)):
            _agrees(text, P=p, M=m)
    _agrees(ATTENTION, P=1, M=5)
    _agrees(SQUARE)
    _agrees(SQUARE.replace("m <= p", "m < p + 1"))


def test_where_every_query_has_a_single_key_scores_have_no_gradient() -> None:
    """The weight is 1 whatever the score is, so queries and keys have a gradient of 0: the difference of two equal
    terms, dO·V and dO·O, of which the rounding is left. It is held against what it is the rounding of."""
    for text, p, m in ((ATTENTION, 5, 1), (CAUSAL, 5, 1), (CAUSAL, 1, 5)):
        program, sizes = _gradient(text), {"B": 2, "P": p, "M": m}
        inputs = _inputs(program, sizes)
        found = _called(program, inputs, sizes)
        do, q, k, v = (inputs[n].double() for n in ("dO", "Q", "K", "V"))
        assert float((found["dV"][..., :1, :] - do.sum(2, keepdim=True)).norm()) < 1e-6 * float(found["dV"].norm())
        assert not found["dV"][..., 1:, :].any()
        term = 0.25 * do @ v[..., :1, :].mT
        for name, terms in (("dQ", term * k[..., :1, :]), ("dK", term * q)):
            assert float(found[name].norm()) < 4 * torch.finfo(torch.float32).eps * float(terms.norm()), name


def test_some_gradients_only() -> None:
    _agrees(CAUSAL, (True, False, False))
    _agrees(CAUSAL, (False, True, True))


@pytest.mark.parametrize("dtype", ["f64", "f16", "bf16"])
def test_other_dtypes_are_as_exact_as_their_own_rounding(dtype: str) -> None:
    """Half precision is computed in float32: what is left is the rounding of results."""
    errors = _errors(_gradient(SQUARE.replace("f32", dtype)), N=33)
    assert max(errors) < 1.1 * torch.finfo(DTYPES[dtype]).eps / 2 or dtype == "f64"
    assert max(errors) < 1e-2


def test_shared_key_heads() -> None:
    _agrees(GROUPED)
    one = GROUPED.replace("K[b,g,m,e]", "K[b,m,e]").replace("V[b,g,m,f]", "V[b,m,f]").replace("[b,h // 2,m,", "[b,m,")
    _agrees(one.replace(", g < 2", ""))
    unlike = SQUARE.replace("K[b,h,m,e]: ", "K[b,m,e]: ").replace("K[b,h,m,e] if", "K[b,m,e] if")
    _agrees(unlike)  # keys without heads, values with
    _agrees(unlike.replace("Q[b,h,p,e]: ", "Q[h,p,e]: ").replace("Q[b,h,p,e] *", "Q[h,p,e] *"))


@pytest.mark.parametrize(("ranks", "where"), [("", ""), ("b,", "b < B, "), ("b,c,h,", "b < B, c < 3, h < 4, ")])
def test_any_number_of_batch_ranks(ranks: str, where: str) -> None:
    _agrees(CAUSAL.replace("b,h,", ranks).replace("b < B, h < 4, ", where))


@pytest.mark.parametrize("shared", ["Q", "K", "V", "QV"])
@pytest.mark.parametrize("ranks", ["", "h,", "c,h,"])
def test_operands_that_all_of_a_batch_shares(shared: str, ranks: str) -> None:
    """Latents that every batch queries with: their gradient is a sum, the others' are not."""
    where = "".join(f"{r} < {n}, " for r, n in (("b", "B"), ("c", 3), ("h", 4)) if r in f"b,{ranks}")
    text = ATTENTION.replace("b < B, h < 4, ", where).replace("[b,h,", f"[b,{ranks}")
    for name in shared:
        text = text.replace(f"{name}[b,", f"{name}[")
    _agrees(text)


def test_ranks_in_another_order() -> None:
    text = CAUSAL.replace("Q[b,h,p,e]", "Q[b,p,h,e]").replace("V[b,h,m,f]", "V[m,f,b,h]")
    _agrees(text.replace("O[b,h,p,f]", "O[p,b,h,f]"))


def test_packed_operands() -> None:
    """Queries, keys and values in one tensor: its gradient is put together of theirs."""
    text = SQUARE.replace("Q[b,h,p,e]: f32, K[b,h,m,e]: f32, V[b,h,m,f]: f32", "X[b,p,w]: f32")
    text = text.replace("f < 8", "f < 8, w < 96").replace("m < N", "m < N").replace("Q[b,h,p,e]", "X[b,p,8*h + e]")
    _agrees(text.replace("K[b,h,m,e]", "X[b,m,8*h + e + 32]").replace("V[b,h,m,f]", "X[b,m,8*h + f + 64]"))
    heads = SQUARE.replace("Q[b,h,p,e]", "Q[b,p,8*h + e]").replace("Q[b,p,8*h + e]: f32", "Q[b,p,w]: f32")
    _agrees(heads.replace("f < 8", "f < 8, w < 32"))


def test_a_view_that_reads_an_element_twice_has_no_call() -> None:
    overlapping = SQUARE.replace("Q[b,h,p,e]: f32", "Q[b,p,w]: f32").replace("Q[b,h,p,e]", "Q[b,p,4*h + e]")
    _refused(overlapping.replace("f < 8", "f < 8, w < 20"), "may have been read before")


def test_a_cotangent_of_any_strides() -> None:
    program = _gradient(SQUARE)
    plain = torch.randn(2, 4, 9, 8)
    by_rows = plain.transpose(1, 2).contiguous().transpose(1, 2)
    for cotangent in (plain.mT.contiguous().mT, by_rows, plain[..., :1].expand_as(plain)):
        assert max(_errors(program, given={"dO": cotangent})) < 1e-5


def test_a_saved_log_sum_exp_and_one_made_of_maximum_and_normaliser() -> None:
    for dtype, saved in (("f32", {"G", "R"}), ("bf16", {"L"})):
        assert saved <= {t.name for t in _gradient(SQUARE.replace("f32", dtype)).cascade.inputs}
    without = CAUSAL.replace("  G[b,h,p] = max(m) S[b,h,p,m]\n", "").replace(" - G[b,h,p]", "")
    for dtype, bound in (("f32", 1e-5), ("bf16", 5e-3)):
        assert max(_errors(_gradient(without.replace("f32", dtype)))) < bound


def _refused(text: str, reason: str, kind: str = "flash", device: Device = CPU) -> None:
    with pytest.raises(NotInLibrary, match=reason):
        library_gradient.emit(_gradient(text), kind, device)


def test_what_may_leave_rows_without_keys_has_no_call() -> None:
    """There the library has NaN."""
    _refused(ATTENTION.replace(SCORES, SCORES + " if m <= p + M - P"), "may leave rows without keys")
    _refused(ATTENTION.replace(SCORES, SCORES + " if m <= p & m > p - 3"), "may leave rows without keys")
    masked = ATTENTION.replace("V[b,h,m,f]: f32)", "V[b,h,m,f]: f32, A[b,m]: bool)")
    _refused(masked.replace(SCORES, SCORES + " if A[b,m]"), "may leave rows without keys")
    biased = ATTENTION.replace("V[b,h,m,f]: f32)", "V[b,h,m,f]: f32, A[h,p,m]: f32)")
    biased = biased.replace("G[b,h,p] =", "T[b,h,p,m] = S[b,h,p,m] + A[h,p,m]\n  G[b,h,p] =")
    _refused(biased.replace("max(m) S", "max(m) T").replace("exp(S", "exp(T"), "a bias")


def test_what_the_library_does_not_compute_has_no_call() -> None:
    capped = ATTENTION.replace("G[b,h,p] =", "T[b,h,p,m] = tanh(S[b,h,p,m])\n  G[b,h,p] =")
    _refused(capped.replace("max(m) S", "max(m) T").replace("exp(S", "exp(T"), "contraction")
    _refused(ATTENTION.replace("f < 8", "f < 6"), "another width")
    _refused(SQUARE.replace("V[b,h,m,f]: f32", "V[b,h,m,f]: bf16"), "of types")
    with pytest.raises(NotInLibrary, match="not known to be a gradient"):
        library_gradient.emit(Program("exact", _gradient(SQUARE).cascade), "flash", CPU)


# -- on a GPU: the calls, in a stand-in for the kernel -----------------------------------------------------------------


def _kernel(kind: str, seen: list[Any], *arguments: Any, scale: float) -> tuple[Tensor, ...]:
    """What the library computes, of the operands it is given alone, in float32."""
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    shapes = [g.shape for g in _REAL[kind](*meta, scale=scale)]  # the schema's check
    do, q, k, v, out, lse, *rest = arguments
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (do, q, k, v, out))
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert lse.shape == (*q.shape[:3], 1) if kind == "cudnn" else lse.shape == q.shape[:3]
    causal = rest[-1] if kind == "cudnn" else rest[5]
    seen.append((v, out, causal))
    group = q.shape[1] // k.shape[1]
    dof, qf, of = do.float(), q.float(), out.float()
    kf, vf = (x.float().repeat_interleave(group, 1) for x in (k, v))
    s = qf @ kf.mT * scale
    if causal:
        assert kind == "cudnn" or s.shape[-1] == s.shape[-2]
        s = s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -torch.inf)
    w = (s - lse.view(*q.shape[:3], 1)).exp()
    ds = w * (dof @ vf.mT - (dof * of).sum(-1, keepdim=True))
    grads = (ds @ kf * scale, ds.mT @ qf * scale, w.mT @ dof)
    found = (grads[0], *(g.unflatten(1, (-1, group)).sum(2) for g in grads[1:]))
    assert [g.shape for g in found] == shapes
    return tuple(g.to(q.dtype) for g in found)


_NAMES = {kind: f"_scaled_dot_product_{kind}_attention_backward" for kind in ("flash", "cudnn")}
_REAL = {kind: getattr(torch.ops.aten, name) for kind, name in _NAMES.items()}


def _on_gpu(
    program: Program, kind: str, given: Mapping[str, Tensor] | None = None, **sizes: int
) -> tuple[list[float], list[Any]]:
    seen: list[Any] = []
    with mock.patch.object(torch.ops.aten, _NAMES[kind], functools.partial(_kernel, kind, seen)):
        return _errors(program, kind, H200, given, **sizes), seen


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("kind", ["flash", "cudnn"])
@pytest.mark.parametrize("text", [ATTENTION, SQUARE, GROUPED])
def test_gpu_calls(text: str, kind: str, dtype: str) -> None:
    errors, seen = _on_gpu(_gradient(text.replace("f32", dtype)), kind, N=33)
    assert max(errors) < 2 * torch.finfo(DTYPES[dtype]).eps
    assert [causal for *_, causal in seen] == [text is not ATTENTION]


@pytest.mark.parametrize("kind", ["flash", "cudnn"])
def test_values_far_from_zero_do_not_lose_the_gradient_in_the_outputs_rounding(kind: str) -> None:
    """Without taking their mean off, the gradient of queries errs as much as it is large."""
    program = _gradient(GROUPED.replace("f32", "bf16"))
    values = (torch.randn(2, 2, 33, 8) * 0.1 + 30).bfloat16()
    (dq, dk, dv), [(v, out, _)] = _on_gpu(program, kind, {"V": values, "K": torch.randn(2, 2, 33, 8) + 8}, N=33)
    assert max(dq, dk, dv) < 0.1
    assert float(v.abs().max()) < 1
    assert float(out.abs().max()) < 1
    plain, [(v, *_)] = _on_gpu(program, kind, {"V": values - 30}, N=33)
    assert torch.equal(v, values - 30)  # near 0 they are not touched
    assert max(plain) < 0.1


def test_what_gpu_kernels_do_not_take() -> None:
    _refused(SQUARE, "f32 on a GPU", "cudnn", H200)
    half = SQUARE.replace("f32", "bf16")
    _refused(half.replace("e < 8", "e < 12"), "a width of 12", "cudnn", H200)
    _refused(half.replace("f < 8", "f < 16"), "another width", "flash", H200)
    assert library_gradient.emit(_gradient(half.replace("f < 8", "f < 16")), "cudnn", H200)
    oblong = CAUSAL.replace("f32", "bf16")
    _refused(oblong, "not square", "flash", H200)
    assert library_gradient.emit(_gradient(oblong), "cudnn", H200)
    assert library_gradient.kinds(A100) == ("cudnn", "flash")
    assert library_gradient.kinds(MI300X) == ()


def test_a_library_call_that_is_turned_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    with pytest.raises(RuntimeError, match="off"):
        _on_gpu(_gradient(SQUARE.replace("f32", "bf16")), "cudnn")


WIDE = {"e < 8": "e < 64", "f < 8": "f < 64", "0.25": "0.125"}


def _wide(text: str, dtype: str) -> Program:
    for old, new in {**WIDE, "f32": dtype}.items():
        text = text.replace(old, new)
    return _gradient(text)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("text", "kind"),
    [(ATTENTION, "cudnn"), (ATTENTION, "flash"), (CAUSAL, "cudnn"), (SQUARE, "cudnn"), (SQUARE, "flash"),
     (GROUPED, "cudnn"), (GROUPED, "flash")],
)  # fmt: skip
def test_on_a_gpu(text: str, kind: str, dtype: str) -> None:
    """Odd lengths, more queries than keys and fewer; `tests/accuracy` holds the calls to the bound on errors."""
    program, device = _wide(text, dtype), Device.of("cuda")
    for p, m in ((37, 70), (70, 37), (33, 33)):
        assert max(_errors(program, kind, device, on="cuda", P=p, M=m, N=p)) < 4 * torch.finfo(DTYPES[dtype]).eps


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cudnn", "flash"])
def test_operands_of_any_strides_on_a_gpu(kind: str) -> None:
    program, device = _wide(GROUPED, "bf16"), Device.of("cuda")
    plain = torch.randn(2, 4, 33, 64)
    by_rows = torch.randn(2, 33, 4, 64).transpose(1, 2)
    cotangents = (plain.mT.contiguous().mT, plain[..., :1].expand_as(plain), by_rows)
    for given in ({"dO": cotangents[0]}, {"dO": cotangents[1]}, {"dO": cotangents[2], "Q": by_rows}):
        given = {name: x.bfloat16() for name, x in given.items()}
        assert max(_errors(program, kind, device, given, on="cuda", N=33)) < 4 * 2.0**-7


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cudnn", "flash"])
def test_a_cuda_graph_captures_the_call(kind: str) -> None:
    """Replayed, it reads what its inputs hold then."""
    program, sizes = _wide(SQUARE, "bf16"), {"B": 2, "N": 33}
    inputs = [x.cuda() for x in _inputs(program, sizes).values()]
    run = load(library_gradient.emit(program, kind, Device.of("cuda")), program.cascade.name)
    run(*inputs, **sizes)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(*inputs, **sizes)
    inputs[-1].mul_(-2)
    graph.replay()
    for got, expected in zip(found, run(*inputs, **sizes), strict=True):
        assert float((got - expected).norm()) <= 1e-2 * float(expected.norm())
