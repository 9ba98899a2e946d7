"""The tiled torch emitter against the interpreter in float64, and what its text promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.space import candidates
from einscade.codegen.tiled_torch import emit, emit_flat
from einscade.ir.device import Device
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from tests import strategies
from tests.codegen.cascades import CASES, DTYPES, Case, cascade, inputs, relative_error
from tests.codegen.generated import module

CAUSAL = next(c for c in CASES if c.name == "causal")
BOUND = {"f64": 1e-12, "f32": 2e-6, "bf16": 3e-3, "f16": 4e-4}  # rounding of the output alone is up to half of it


def error(case: Case, sizes: dict[str, int], tile: int = 16, **shape: object) -> float:
    plain, rewritten = cascade(case, **shape)  # type: ignore[arg-type]
    program = plan(rewritten)
    tiles = dict.fromkeys((*tile_symbols(program), "p"), tile)
    given_inputs = inputs(plain, case, sizes)
    (out,) = module(emit(program, Schedule(tuple(tiles.items())))).run(*given_inputs.values(), **sizes)
    assert out.dtype == DTYPES[str(shape.get("dtype", "f32"))]
    return relative_error(out, interpret(plain, given_inputs, {})["O"])


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_variants_and_dtypes(case: Case, dtype: str) -> None:
    assert error(case, {"B": 2, "P": 37, "M": 41}, dtype=dtype) <= BOUND[dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flat_is_differentiable_and_exact(case: Case) -> None:
    plain, _ = cascade(case, dtype="f64")
    sizes = {"B": 1, "P": 9, "M": 11}
    given_inputs = inputs(plain, case, sizes)
    leaves = [x.requires_grad_() for n, x in given_inputs.items() if n in "QKV"]
    (out,) = module(emit_flat(plain)).run(*given_inputs.values(), **sizes)
    reference = interpret(plain, {n: x.detach() for n, x in given_inputs.items()}, {})["O"]
    assert relative_error(out.detach(), reference) <= BOUND["f64"]
    out.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(CASES), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3),
    st.sampled_from([(4, 2), (3, 1), (2, 2), (6, 2)]), st.sampled_from([4, 7, 16, 64]), st.integers(1, 19),
)  # fmt: skip
def test_any_length_group_and_tile(
    case: Case, p: int, m: int, b: int, heads: tuple[int, int], tile: int, width: int
) -> None:
    found = error(case, {"B": b, "P": p, "M": m}, tile, h=heads[0], g=heads[1], e=width, f=width + 1)
    assert found <= BOUND["f32"]


@settings(max_examples=40, deadline=None)
@given(strategies.cascades(), st.integers(0, 3))
def test_random_cascades_run_flat(case: strategies.Case, seed: int) -> None:
    given_inputs = case.inputs(seed)
    outputs = module(emit_flat(case.cascade)).run(*given_inputs.values(), **case.sizes)
    reference = case.reference(given_inputs)
    for name, out in zip(case.cascade.outputs, outputs, strict=True):
        expected = reference[name].double()
        dtype = case.cascade.tensors[name].dtype
        scale = expected.abs().max().item() if expected.numel() else 0.0
        assert torch.allclose(out.double(), expected, rtol=2e-2 if dtype in ("bf16", "f16") else 1e-4,
                              atol=1e-4 * max(scale, 1.0)), name  # fmt: skip


def test_non_contiguous_inputs_and_memory_order_of_outputs() -> None:
    plain, rewritten = cascade(CAUSAL)
    sizes = {"B": 2, "P": 21, "M": 21}
    x = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs(plain, CAUSAL, sizes).items()}
    schedule = Schedule((("M0", 8), ("p", 8)), out_order=(("O", ("b", "p", "h", "f")),))
    (out,) = module(emit(plan(rewritten), schedule)).run(*x.values(), **sizes)
    assert out.shape == (2, 4, 21, 16)
    assert out.transpose(1, 2).is_contiguous()
    assert relative_error(out, interpret(plain, x, {})["O"]) <= BOUND["f32"]


def test_a_row_without_keys_is_zero() -> None:
    case = next(c for c in CASES if c.name == "boolean")
    plain, rewritten = cascade(case)
    sizes = {"B": 1, "P": 6, "M": 5}
    x = inputs(plain, case, sizes)
    (out,) = module(emit(plan(rewritten), Schedule((("M0", 4), ("p", 4))))).run(*x.values(), **sizes)
    assert bool((out[:, :, 3] == 0).all())
    assert bool((out[:, :, 2] != 0).any())


def test_full_tiles_have_no_mask_and_empty_ones_no_iteration() -> None:
    _, rewritten = cascade(CAUSAL)
    text = emit(plan(rewritten), Schedule((("M0", 16), ("p", 16)))).text
    assert "m_end = min(M, p_hi)" in text
    assert "if partial:" in text
    assert "repeat" not in text


def test_tiles_whose_tensors_exclude_every_point_are_skipped() -> None:
    case = next(c for c in CASES if c.name == "documents")
    plain, rewritten = cascade(case)
    n = 64
    sizes = {"B": 1, "P": n, "M": n}
    x = inputs(plain, case, sizes)
    x["D"] = x["E"] = (torch.arange(n, dtype=torch.int32) // 16)[None]
    generated = module(emit(plan(rewritten), Schedule((("M0", 16), ("p", 16)))))
    calls, matmul = [], torch.matmul

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(a.shape)
        return matmul(a, b)

    torch.matmul = counted  # type: ignore[assignment]
    try:
        (out,) = generated.run(*x.values(), **sizes)
    finally:
        torch.matmul = matmul  # type: ignore[assignment]
    assert relative_error(out, interpret(plain, x, {})["O"]) <= BOUND["f32"]
    assert len(calls) == 2 * 4  # two products for each of the four tiles on the diagonal, of ten that causality leaves


def test_an_output_that_later_statements_read() -> None:
    """Of the loop and after it: neither the tile nor the memory hides the other."""
    text = """cascade both(x[b,m]) -> L[b,m1,m0], D[b], E[b]
      where b < B, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m
      L[b,m1,m0] = x[b,m1*M0 + m0]**2   if m1*M0 + m0 < M
      X[b,m1]    = sum(m0) L[b,m1,m0]
      A[b,m1]    = A[b,m1 - 1] + X[b,m1]   along m1 from 0
      D[b]       = A[b,ceil_div(M, M0) - 1] / M
      E[b]       = D[b]**2 + 1"""
    x = torch.randn(7, 10)
    square, mean, more = module(emit(plan(parse_cascade(text)), Schedule((("M0", 4), ("b", 3))))).run(x, B=7, M=10)
    assert torch.equal(square.flatten(1)[:, :10], x**2)
    assert relative_error(mean, (x**2).mean(1)) <= BOUND["f32"]
    assert relative_error(more, (x**2).mean(1) ** 2 + 1) <= BOUND["f32"]


def test_both_operands_of_a_product_are_masked() -> None:
    """Both are computed, and each is masked in a variable of its own."""
    text = """cascade decayed(x[b,p,m], g[p]) -> Z[b,p]
      where b < B, p < P, m < M, m1 < ceil_div(M, M0) of m, m0 < M0 of m
      S[b,p,m1,m0] = x[b,p,m1*M0 + m0]**3   if m1*M0 + m0 < M & m1*M0 + m0 <= p
      L[b,p,m1]    = sum(m0) abs(S[b,p,m1,m0]) * exp(g[p] * (p - m1*M0 - m0))
      A[b,p,m1]    = A[b,p,m1 - 1] + L[b,p,m1]   along m1 from 0
      Z[b,p]       = A[b,p,ceil_div(M, M0) - 1]"""
    program = parse_cascade(text)
    x, g = torch.randn(3, 7, 10), -torch.rand(7)
    source = emit(plan(program), Schedule((("M0", 4), ("b", 3), ("p", 7))))
    (out,) = module(source).run(x, g, B=3, P=7, M=10)
    expected = interpret(program, {"x": x, "g": g}, {"M0": 4})["Z"]
    assert relative_error(out, expected) <= BOUND["f32"]


def test_memory_is_that_of_tiles() -> None:
    """The largest tensor allocated has no two long ranks: counted by watching every allocation."""
    _, rewritten = cascade(CAUSAL, h=2, g=1, e=8, f=8)
    program = plan(rewritten)
    n = 2048
    schedule = Schedule((("M0", 128), ("p", 128)))
    x = [torch.randn(1, heads, n, 8) for heads in (2, 1, 1)]
    run = module(emit(program, schedule)).run
    with torch.profiler.profile(profile_memory=True) as profile:
        run(*x, B=1, P=n, M=n)
    most = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < most <= max(2 * 128 * 128 * 4, 2 * n * 8 * 4) + 4096  # a tile of scores, or the output


def test_candidates_fit_and_the_first_is_near_square() -> None:
    _, rewritten = cascade(CAUSAL, h=9, g=3, e=64, f=64)
    found = candidates(plan(rewritten), Device.of("cpu"), {"B": 1, "P": 4096, "M": 4096})
    assert len(found) == len(set(found))
    assert all(s.tile("p") and s.tile("M0") for s in found)


def test_a_loop_without_rows() -> None:
    """Running values that are one number each, as the gradient of a scale has them."""
    text = "cascade c(X[m]: f32) -> Z[]: f32\n  where m < M\n  G[] = max(m) X[m]\n  Z[] = sum(m) exp(X[m] - G[])"
    program = plan(run(parse_cascade(text), "exact").cascade)
    assert program.serial_nests
    x = torch.randn(100)
    (out,) = module(emit(program, Schedule(tuple((s, 16) for s in tile_symbols(program))))).run(x, M=100)
    torch.testing.assert_close(out, (x - x.max()).exp().sum())
