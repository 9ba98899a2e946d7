"""Gluon kernels with several products, sums and tables: right in the simulator, and within a Hopper GPU's resources."""

from __future__ import annotations

import functools
import re
from functools import partial

import pytest
import torch
from torch import Tensor

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_form import form
from einscade.codegen.loops import LoopProgram, plan
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import Misuse, Simulator
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

SOFTMAX = """  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""

BIASED = """cascade biased(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16{extra}) -> O[b,h,p,f]: bf16
  where b < B, h < 2, p < P, m < M, e < 64, f < 64
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h,m,e]
  S[b,h,p,m] = R[b,h,p,m] {terms}
"""

TWO_SUMS = """cascade two(Q[p,e]: bf16, K[m,e]: bf16, V[m,f]: bf16, U[m,f]: bf16) -> O[p,f]: bf16, R[p,f]: bf16
  where p < P, m < M, e < 64, f < 64
  S[p,m] = sum(e) 0.125 * Q[p,e] * K[m,e]
  O[p,f]: bf16 = sum(m) S[p,m] * V[m,f]
  R[p,f]: bf16 = sum(m) S[p,m] * S[p,m] * U[m,f]
"""

TWO_SOFTMAXES = """cascade two(Q[b,g,p,e]: bf16, K[b,g,m,e]: bf16, L[], V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, g < 4, h < 2, p < P, m < M, e < 64, f < 64
  A[b,g,p,m] = sum(e) 0.125 * Q[b,g,p,e] * K[b,g,m,e]   if m <= p
  G[b,g,p]   = max(m) A[b,g,p,m]
  W[b,g,p,m] = exp(A[b,g,p,m] - G[b,g,p])
  Z[b,g,p]   = sum(m) W[b,g,p,m]
  O[b,h,p,f]: bf16 = sum(m) (W[b,2*h,p,m] / Z[b,2*h,p] - L[] * W[b,2*h + 1,p,m] / Z[b,2*h + 1,p]) * V[b,h,m,f]
"""

HALVES = """cascade halves(Q[b,p,c]: bf16, K[b,m,c]: bf16, V[b,m,f]: bf16) -> O[b,p,f]: bf16
  where b < B, p < P, m < M, c < 128, e < 64, f < 128
  A[b,p,m] = sum(e) 0.125 * Q[b,p,e] * K[b,m,e]
  C[b,p,m] = sum(e) 0.125 * Q[b,p,e + 64] * K[b,m,e + 64]
  G[b,p]   = max(m) A[b,p,m]
  W[b,p,m] = exp(A[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  H[b,p]   = max(m) C[b,p,m]
  U[b,p,m] = exp(C[b,p,m] - H[b,p])
  Y[b,p]   = sum(m) U[b,p,m]
  O[b,p,f]: bf16 = sum(m) (W[b,p,m] / Z[b,p] - 0.3 * U[b,p,m] / Y[b,p]) * V[b,m,f]
"""

OWN = """cascade own(X[b,m,e]: bf16) -> O[b,p,f]: bf16
  where b < B, p < M, m < M, e < 64, f < 64
  S[b,p,m] = sum(e) 0.125 * X[b,p,e] * X[b,m,e]
  G[b,p]   = max(m) S[b,p,m]
  W[b,p,m] = exp(S[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  O[b,p,f]: bf16 = sum(m) W[b,p,m] * X[b,m,f] / Z[b,p]
"""


COMPLEMENT = OWN.replace("own", "complement").replace(
    "  O[b,p,f]: bf16 = sum(m) W[b,p,m] * X[b,m,f] / Z[b,p]\n",
    "  N[b,p,f]   = sum(m) W[b,p,m] * X[b,m,f]\n  O[b,p,f]: bf16 = 1 - N[b,p,f] / Z[b,p]\n",
)


def biased(terms: str, extra: str, domain: str = "") -> str:
    head = BIASED.format(extra=f", {extra}", terms=terms + (f"   if {domain}" if domain else ""))
    return head.replace("  S[b,h,p,m] = sum", "  R[b,h,p,m] = sum") + SOFTMAX


TEXTS = {
    "two sums": TWO_SUMS,
    "two softmaxes": TWO_SOFTMAXES,
    "halves of one tensor": HALVES,
    "one tensor": OWN,
    "a change of sign": COMPLEMENT,
    "a bias": biased("+ T[h,p,m]", "T[h,p,m]: bf16"),
    "a causal bias": biased("+ T[b,p,m]", "T[b,p,m]: f32", "m <= p"),
    "biases of rows and of columns": biased("+ T[b,m] + U[h,p,m]", "T[b,m]: bf16, U[h,p,m]: f16"),
    "one tensor twice": biased("+ T[0,p,m] * T[1,p,m]", "T[h,p,m]: bf16"),
    "a mask": biased("", "T[b,p,m]: bool", "T[b,p,m]"),
    "a bias of documents": biased("+ T[h,p,m]", "T[h,p,m]: bf16, D[b,p]: i32, E[b,m]: i32", "D[b,p] == E[b,m]"),
    "a bias under a cap": biased("+ T[h,p,m] * tanh(R[b,h,p,m] / 5)", "T[h,p,m]: bf16"),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@functools.cache
def program(text: str) -> LoopProgram:
    return plan(rewrite(parse_cascade(text), "exact").cascade)


def inputs(text: str, sizes: dict[str, int], seed: int = 0) -> list[Tensor]:
    plain = parse_cascade(text)
    random = torch.Generator().manual_seed(seed)
    given = []
    for t in plain.inputs:
        shape = [int(plain.extent(r).subs({s: sizes[s.name] for s in plain.extent(r).free_symbols})) for r in t.ranks]
        if t.dtype == "bool":
            given.append(torch.rand(shape, generator=random) < 0.6)
        elif t.dtype == "i32":
            given.append(torch.randint(0, 5, shape, generator=random, dtype=torch.int32).sort(-1).values)
        else:
            given.append(torch.randn(shape, generator=random).to(DTYPES[t.dtype]))
    return given


def check(text: str, given: list[Tensor], sizes: dict[str, int]) -> None:
    """Every schedule's kernel, in one order of events, against float64."""
    plain = parse_cascade(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})
    loops = program(text)
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    for seed, schedule in enumerate(schedules(loops)):
        found = Simulator(seed).load(emit(loops, schedule).text).run(*given, **passed)
        for out, name in zip(found, plain.outputs, strict=True):
            assert relative_error(out, exact[name]) <= 3 * relative_error(exact[name].bfloat16(), exact[name])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("lengths", [(130, 304), (333, 333)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_right_on_a_gpu(name: str, lengths: tuple[int, int]) -> None:
    text, sizes = TEXTS[name], {"B": 2, "P": lengths[0], "M": lengths[1]}
    given, plain, loops = inputs(text, sizes), parse_cascade(text), program(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    for schedule in schedules(loops):
        found = module(emit(loops, schedule)).run(*(x.cuda() for x in given), **passed)
        for out, output in zip(found, plain.outputs, strict=True):
            rounding = relative_error(exact[output].bfloat16(), exact[output])
            assert relative_error(out.cpu(), exact[output]) <= 3 * rounding, (output, schedule)


@pytest.mark.parametrize("lengths", [(130, 304), (200, 77), (1, 1)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_right(name: str, lengths: tuple[int, int]) -> None:
    """With tables that the copy engine can take (304 elements a row), and that it cannot."""
    sizes = {"B": 1, "P": lengths[0], "M": lengths[1]}
    check(TEXTS[name], inputs(TEXTS[name], sizes), sizes)


def holds(text: str, seed: int, given: list[Tensor], sizes: dict[str, int], exact: Tensor) -> bool:
    """Whether a text, in the order of events of this seed, is right to within three times the rounding of `exact`."""
    try:
        (out,) = Simulator(seed).load(text).run(*given, **sizes)
    except (Misuse, TypeError):  # a product that nothing waited for is no number
        return False
    return relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)


def test_every_synchronisation_is_missed() -> None:
    """Of the lines of a kernel with a ring for a table that synchronise, none can go."""
    text, sizes = TEXTS["a bias"], {"B": 1, "P": 100, "M": 496}
    given = inputs(text, sizes)
    plain = parse_cascade(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    loops = program(text)
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    source = emit(loops, schedules(loops)[0]).text

    right = partial(holds, given=given, sizes=passed, exact=exact)
    assert all(right(source, seed) for seed in range(8))
    lines = [i for i, line in enumerate(source.split("\n")) if SYNCHRONISES.match(line)]
    assert len(lines) > 20
    for line in lines:
        assert not all(right(without(source, line), seed) for seed in range(60)), source.split("\n")[line]


@pytest.mark.parametrize("change", ["transposed", "expanded", "shifted"])
def test_tables_with_any_strides(change: str) -> None:
    text, sizes = TEXTS["a bias"], {"B": 1, "P": 96, "M": 160}
    *others, bias = inputs(text, sizes)
    if change == "transposed":
        bias = bias.mT.contiguous().mT
    elif change == "expanded":
        bias = bias[:1].expand(2, -1, -1)
    else:
        bias = torch.cat([bias.flatten(), bias.flatten()])[1 : 1 + bias.numel()].view(bias.shape)
    check(text, [*others, bias], sizes)


@pytest.mark.parametrize("length", [160, 77])
@pytest.mark.parametrize("change", ["transposed", "expanded", "shifted"])
def test_columns_with_any_strides(change: str, length: int) -> None:
    """What the copy engine cannot take comes through a copy."""
    text, sizes = TEXTS["biases of rows and of columns"], {"B": 2, "P": 96, "M": length}
    *others, keys, pairs = inputs(text, sizes)
    if change == "transposed":
        keys = keys.mT.contiguous().mT
    elif change == "expanded":
        keys = keys[:1].expand(2, -1)
    else:
        keys = torch.cat([keys.flatten(), keys.flatten()])[1 : 1 + keys.numel()].view(keys.shape)
    check(text, [*others, keys, pairs], sizes)


def test_tables_come_through_the_copy_engine_where_they_can() -> None:
    text = TEXTS["a bias"]
    loops = program(text)
    space = Simulator().load(emit(loops, schedules(loops)[0]).text)
    for length, copied in [(160, True), (161, False)]:
        *_, bias = inputs(text, {"B": 1, "P": 96, "M": length})
        assert space.table_map(bias, 64, 64)[1] is copied


@pytest.mark.parametrize("name", TEXTS)
def test_fits_on_chip(name: str) -> None:
    """The first schedule, with tables that the copy engine can take; and some schedule where it cannot."""
    text = TEXTS[name]
    loops = program(text)
    for length in (304, 301):
        sizes = {"B": 1, "P": 300, "M": length}
        passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
        tried = schedules(loops)[:1] if length == 304 else schedules(loops)[-1:]
        assert_fits(module(emit(loops, tried[0])), inputs(text, sizes), passed)


def test_what_several_read_is_loaded_once() -> None:
    shape = form(program(TWO_SOFTMAXES))
    assert [len(x) for x in (shape.products, shape.sums, shape.stills, shape.moving)] == [2, 2, 2, 3]
    shape = form(program(TWO_SUMS))
    assert (len(shape.products), len(shape.sums)) == (1, 2)
    assert {x.tensor for x in shape.written} == set(shape.results)


def test_operands_that_are_one_tensor_have_names_of_their_own() -> None:
    loops = program(OWN)
    assert len(form(loops).moving) == 1
    for schedule in schedules(loops):
        names = re.findall(r"^    (\w+) = gl.allocate_shared_memory", emit(loops, schedule).text, re.M)
        assert len(names) == len(set(names))
