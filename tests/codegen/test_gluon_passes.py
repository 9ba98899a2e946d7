"""Loops of several softmaxes in passes, also of rows that run into one another: right in any order of events, within a
Hopper GPU's resources, and chosen where they fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_form import form
from einscade.codegen.gluon_passes import Passes, in_order
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.device import H200
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from tests.codegen import test_gluon_operands
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import Simulator
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

THREE = """cascade three(Q[b,g,p,e]: bf16, K[b,g,m,e]: bf16, V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, g < 3, h < 1, p < P, m < M, e < 64, f < 64
  A[b,g,p,m] = sum(e) 0.125 * Q[b,g,p,e] * K[b,g,m,e]   if m <= p
  G[b,g,p]   = max(m) A[b,g,p,m]
  W[b,g,p,m] = exp(A[b,g,p,m] - G[b,g,p])
  Z[b,g,p]   = sum(m) W[b,g,p,m]
  D[b,g,p,m] = W[b,g,p,m] / Z[b,g,p]
  O[b,h,p,f]: bf16 = sum(m) (D[b,3*h,p,m] - 0.5 * D[b,3*h + 1,p,m] + 0.25 * D[b,3*h + 2,p,m]) * V[b,h,m,f]
"""
PADDED = """cascade padded(Q[b,p,e]: bf16, K[b,m,e]: bf16, R[b,p,e]: bf16, L[b,m,e]: bf16, V[b,m,f]: bf16,
  D[b,m]: bool) -> O[b,p,f]: bf16
  where b < B, p < P, m < M, e < 64, f < 64
  A[b,p,m] = sum(e) 0.125 * Q[b,p,e] * K[b,m,e]   if D[b,m]
  G[b,p]   = max(m) A[b,p,m]
  W[b,p,m] = exp(A[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  C[b,p,m] = sum(e) 0.125 * R[b,p,e] * L[b,m,e]   if D[b,m]
  H[b,p]   = max(m) C[b,p,m]
  U[b,p,m] = exp(C[b,p,m] - H[b,p])
  Y[b,p]   = sum(m) U[b,p,m]
  O[b,p,f]: bf16 = sum(m) (W[b,p,m] / Z[b,p] - 0.3 * U[b,p,m] / Y[b,p]) * V[b,m,f]
"""
TWO_PRODUCTS = """cascade parts(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, A[b,h,p,r]: bf16, C[b,m,r]: bf16,
  V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < 2, p < P, m < M, e < 128, r < 64, f < 64
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h,m,e]
  R[b,h,p,m] = sum(r) 0.125 * A[b,h,p,r] * C[b,m,r]
  T[b,h,p,m] = S[b,h,p,m] + R[b,h,p,m]   if m <= p
  G[b,h,p]   = max(m) T[b,h,p,m]
  W[b,h,p,m] = exp(T[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
OWN = """cascade own(Q[b,p,e]: bf16, R[b,p,e]: bf16, X[b,m,e]: bf16) -> O[b,p,e]: bf16
  where b < B, p < M, m < M, e < 64
  A[b,p,m] = sum(e) 0.125 * Q[b,p,e] * X[b,m,e]   if m <= p
  G[b,p]   = max(m) A[b,p,m]
  W[b,p,m] = exp(A[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  C[b,p,m] = sum(e) 0.125 * R[b,p,e] * X[b,m,e]   if m <= p
  H[b,p]   = max(m) C[b,p,m]
  U[b,p,m] = exp(C[b,p,m] - H[b,p])
  Y[b,p]   = sum(m) U[b,p,m]
  O[b,p,e]: bf16 = sum(m) (W[b,p,m] / Z[b,p] - 0.3 * U[b,p,m] / Y[b,p]) * X[b,m,e]
"""
SEVERAL = {n: test_gluon_operands.TEXTS[n] for n in ("two softmaxes", "halves of one tensor")}
SEVERAL |= {"three softmaxes": THREE, "padding": PADDED}
TEXTS = SEVERAL | {"one softmax of two products": TWO_PRODUCTS}
KINDS = [(name, False) for name in TEXTS] + [(name, True) for name in SEVERAL]


def ordered(loops: LoopProgram, joined: bool = False) -> list[Schedule]:
    """The schedules in order, and one of small tiles."""
    found = [s for s in schedules(loops) if s.in_order]
    small = {"p": 64, str(form(loops).loop.step): 32}
    found.append(replace(found[0], tiles=tuple(sorted(small.items()))))
    return [replace(s, joined=True, resident=3) for s in found] if joined else found


@pytest.mark.parametrize("lengths", [(300, 304), (200, 77), (1, 1)], ids=str)
@pytest.mark.parametrize(("name", "joined"), KINDS)
def test_right(name: str, joined: bool, lengths: tuple[int, int]) -> None:
    text, sizes = TEXTS[name], {"B": 1 + joined, "P": lengths[0], "M": lengths[1]}
    given, plain = test_gluon_operands.inputs(text, sizes), parse_cascade(text)
    loops = test_gluon_operands.program(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    tried = ordered(loops, joined)
    assert len(tried) > 1
    for schedule in tried:
        for seed in range(2):
            (out,) = Simulator(seed).load(emit(loops, schedule).text).run(*given, **passed)
            assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("name", TEXTS)
def test_passes_are_for_sums_with_scores_of_their_own(name: str) -> None:
    loops = test_gluon_operands.program(TEXTS[name])
    found = in_order(form(loops), ordered(loops)[0])
    assert isinstance(found, Passes) == (name in SEVERAL)


def test_every_synchronisation_is_missed() -> None:
    text = TEXTS["two softmaxes"].replace("h < 2", "h < 1").replace("g < 4", "g < 2")
    sizes = {"B": 1, "P": 70, "M": 400}
    given, plain = test_gluon_operands.inputs(text, sizes), parse_cascade(text)
    loops = test_gluon_operands.program(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    source = emit(loops, ordered(loops)[-1]).text

    right = partial(test_gluon_operands.holds, given=given, sizes=sizes, exact=exact)
    assert all(right(source, seed) for seed in range(12))
    lines = [i for i, line in enumerate(source.split("\n")) if SYNCHRONISES.match(line)]
    assert len(lines) > 20
    assert not [source.split("\n")[i] for i in lines if all(right(without(source, i), seed) for seed in range(60))]


def test_every_synchronisation_of_joined_rows_is_missed() -> None:
    """Where one tensor is keys and values (else the wait for a place of values says enough of the keys). What tells the
    next rows need not be waited for: those before it have been read when the last pass's queries are given back."""
    loops, plain = test_gluon_operands.program(OWN), parse_cascade(OWN)
    source = emit(loops, replace(ordered(loops, joined=True)[-1], resident=2, stages=4)).text
    cases = []
    for sizes in ({"B": 9, "M": 30}, {"B": 2, "M": 200}):  # one tile of the loop, and several
        given = test_gluon_operands.inputs(OWN, sizes)
        exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
        cases.append(partial(test_gluon_operands.holds, given=given, sizes=sizes, exact=exact))

    def right(changed: str, seed: int) -> bool:
        return all(case(changed, seed) for case in cases)

    assert all(right(source, seed) for seed in range(8))
    lines = [i for i, x in enumerate(source.split("\n")) if SYNCHRONISES.match(x) and "wait(upcoming_empty" not in x]
    assert len(lines) > 30
    assert not [source.split("\n")[i] for i in lines if all(right(without(source, i), seed) for seed in range(60))]


def test_rows_are_joined_where_the_next_operand_can_come_early() -> None:
    """That of the first pass cannot where the last pass reads it, too."""
    one = PADDED.replace("R[b,p,e]: bf16, ", "").replace("R[b,p,e]", "Q[b,p,e]")
    for text, reason in ((one, "the last one over those before"), (TWO_PRODUCTS, "in order")):
        loops = test_gluon_operands.program(text)
        with pytest.raises(Unsupported, match=reason):
            emit(loops, ordered(loops, joined=True)[0])


@pytest.mark.parametrize("name", SEVERAL)
def test_joined_rows_are_tried(name: str) -> None:
    """Where rows have loops of one length, or three warpgroups, first of all; not where all are worked on at once."""
    loops = test_gluon_operands.program(TEXTS[name])

    def chosen(length: int) -> list[bool]:
        return [s.joined for s in schedules(loops, H200, {"B": 64, "P": length, "M": length}) if s.in_order]

    assert any(chosen(8192))
    assert chosen(8192)[0] or name not in ("two softmaxes", "halves of one tensor")
    assert not any(chosen(128))


@pytest.mark.parametrize(("name", "joined"), [*((n, True) for n in SEVERAL), ("two softmaxes", False)])
def test_fits_on_chip(name: str, joined: bool) -> None:
    """Causal softmaxes may spill two registers in each of three warpgroups, five where rows are joined."""
    text, sizes = TEXTS[name], {"B": 2, "P": 300, "M": 304}
    loops = test_gluon_operands.program(text)
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    made = module(emit(loops, ordered(loops, joined)[0]))
    assert_fits(made, test_gluon_operands.inputs(text, sizes), passed, spilled=60 if joined else 24)
