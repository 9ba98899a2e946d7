"""Kernels whose references stay: right in any order of events whatever the scores are, within a Hopper GPU's resources,
and only where the results do not depend on the reference."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_anchored import anchors
from einscade.codegen.gluon_form import form
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from tests.codegen import test_gluon_visits
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.generated import module, run_poisoned
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import Simulator

BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
JOINED = pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])

WITH_STATISTICS = """cascade attention(Q[p,e]: bf16, K[m,e]: bf16, V[m,f]: bf16) -> O[p,f]: bf16, L[p]
  where p < P, m < M, e < 64, f < 64
  S[p,m] = sum(e) 0.125 * Q[p,e] * K[m,e]   if m <= p
  G[p]   = max(m) S[p,m]
  W[p,m] = exp(S[p,m] - G[p])
  Z[p]   = sum(m) W[p,m]
  O[p,f]: bf16 = sum(m) W[p,m] * V[m,f] / Z[p]
  L[p]   = G[p] + log(Z[p])
"""


def anchored(loops: LoopProgram, joined: bool, programs: int = 3) -> list[Schedule]:
    """The schedules of two and three warpgroups with references that stay."""
    found = []
    for x in schedules(loops):
        tried = replace(x, resident=programs, joined=joined, anchored=True)
        if x.tile("p") in (128, 192) and not x.in_order:
            with contextlib.suppress(Unsupported):  # where tiles do not fit
                emit(loops, tried)
                found.append(tried)
    assert found
    return found


def check(plain: Cascade, loops: LoopProgram, given: dict[str, torch.Tensor], joined: bool) -> None:
    exact = interpret(plain, given, {})
    sizes = {str(n): size for t in plain.inputs
             for n, size in zip(map(plain.extent, t.ranks), given[t.name].shape, strict=True)}  # fmt: skip
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    for seed, schedule in enumerate(anchored(loops, joined)):
        found = Simulator(seed).load(emit(loops, schedule).text).run(*given.values(), **passed)
        for out, name in zip(found, plain.outputs, strict=True):
            there = exact[name].isfinite()
            assert torch.equal(out.double()[~there], exact[name][~there])
            out, best = out[there], exact[name][there]
            assert relative_error(out, best) <= max(3 * relative_error(best.to(out.dtype), best), 1e-6)


@JOINED
@pytest.mark.parametrize("name", ["full", "causal", "window", "slopes", "softcap"])
def test_cases_are_right(name: str, joined: bool) -> None:
    plain, rewritten = cascade(BY_NAME[name], **NARROW)  # type: ignore[arg-type]
    given = inputs(plain, BY_NAME[name], {"B": 1, "P": 300, "M": 333})
    check(plain, plan(rewritten), given, joined)


TEXTS = {
    "with statistics": WITH_STATISTICS,
    "rows without points": WITH_STATISTICS.replace("m <= p", "m <= p - 70"),
    "a bias": WITH_STATISTICS.replace("V[m,f]: bf16)", "V[m,f]: bf16, X[p,m]: bf16)")
    .replace("G[p]   = max(m) S", "T[p,m] = S[p,m] + X[p,m]   if m <= p\n  G[p]   = max(m) T")
    .replace("exp(S", "exp(T"),
}


def loops_of(text: str) -> tuple[Cascade, LoopProgram]:
    plain = parse_cascade(text)
    return plain, plan(run(plain, "exact").cascade)


def scores(growth: float, rows: int = 300, keys: int = 333) -> dict[str, torch.Tensor]:
    """Inputs whose scores rise from the last key, whose tile is visited first, to the first one, by `growth` in all."""
    q, k, v = (torch.randn(n, 64).bfloat16() for n in (rows, keys, keys))
    q[:, 0], k[:, 0] = 1, torch.linspace(growth * 8, 0, keys).bfloat16()
    return {"Q": q, "K": k, "V": v}


@JOINED
@pytest.mark.parametrize("growth", [0.0, 5.0, 30.0, 80.0, 3000.0, -30.0, -3000.0])
def test_scores_may_grow(growth: float, joined: bool) -> None:
    """Slowly, faster than weights can, and the other way."""
    plain, loops = loops_of(WITH_STATISTICS.replace("   if m <= p", ""))
    check(plain, loops, scores(growth), joined)


@pytest.mark.parametrize(
    ("growth", "size", "needed"),
    [(5.0, 1.0, False), (30.0, 1.0, False), (200.0, 1.0, True), (3000.0, 1.0, True), (30.0, 1e30, True),
     (0.0, 1e30, False)],
)  # fmt: skip
def test_the_second_kernel_works_where_it_is_needed(growth: float, size: float, needed: bool) -> None:
    """Without it, results are right where sums of weights are in range and results finite, and else they are not."""
    plain, loops = loops_of(WITH_STATISTICS.replace("   if m <= p", ""))
    given = scores(growth)
    given["V"] = given["V"] * size
    exact = interpret(plain, given, {})["O"]
    text = emit(loops, anchored(loops, False)[0]).text
    for again in (True, False):
        changed = text if again else text.replace("programs * gl.load(mark_to + 1)", "programs * 0")
        out, _ = Simulator(0).load(changed).run(**given, M=333, P=300)
        right = relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)
        assert right == (again or not needed)


@JOINED
@pytest.mark.parametrize("keys", [slice(250, None), slice(0, 200)], ids=["last", "first"])
def test_rows_whose_first_tile_is_infinitely_small(keys: slice, joined: bool) -> None:
    """Some rows, by data: as padding is masked with a bias."""
    plain, loops = loops_of(TEXTS["a bias"].replace("   if m <= p", ""))
    given = scores(0.0) | {"X": torch.randn(300, 333).bfloat16()}
    given["X"][40:90, keys] = -torch.inf
    check(plain, loops, given, joined)


@JOINED
@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_right(name: str, joined: bool) -> None:
    plain, loops = loops_of(TEXTS[name])
    given = scores(0.0)
    if name == "a bias":
        given["X"] = torch.randn(300, 333).bfloat16()
    check(plain, loops, given, joined)


def test_infinities_are_what_they_are_in_the_ordinary_kernel() -> None:
    """Of scores: infinite and undefined ones, and rows in which all are infinitely small."""
    _, loops = loops_of(TEXTS["a bias"].replace("   if m <= p", ""))
    given = scores(0.0) | {"X": torch.randn(300, 333).bfloat16()}
    given["Q"][7, 9], given["X"][11, 13], given["X"][40:90] = torch.nan, torch.inf, -torch.inf
    schedule = anchored(loops, False)[0]
    plainly = Simulator(1).load(emit(loops, replace(schedule, anchored=False)).text).run(**given, M=333, P=300)
    found = Simulator(1).load(emit(loops, schedule).text).run(**given, M=333, P=300)
    for a, b in zip(found, plainly, strict=True):
        assert torch.equal(a[:128].nan_to_num(7.0), b[:128].nan_to_num(7.0))  # the tile of all of these rows
        assert a[128:].isfinite().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("L[p]\n  where", "G[p]\n  where"),  # the maximum is a result
        ("bf16", "f16"),  # weights of half precision end at 65504
        (" / Z[p]", ""),  # not divided by what the reference divides
    ],
)  # fmt: skip
def test_references_that_results_depend_on_move(old: str, new: str) -> None:
    text = WITH_STATISTICS.replace(old, new)
    if old.startswith("L"):
        text = text.replace("  L[p]   = G[p] + log(Z[p])\n", "")
    assert anchors(form(loops_of(WITH_STATISTICS)[1]))
    assert not anchors(form(loops_of(text)[1]))


@JOINED
@pytest.mark.parametrize("name", ["causal documents", "padding", "a window and a sink"])
def test_lists_are_followed(name: str, joined: bool) -> None:
    """Rows may have no points in the first tile of a list, or none at all."""
    plain, loops = test_gluon_visits.textbook(name), test_gluon_visits.program(name)
    given = dict(zip((t.name for t in plain.inputs), test_gluon_visits.made(name, ordered=False), strict=True))
    check(plain, loops, given, joined)


# -- compiled without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "joined"),
    [("full", 128, False), ("causal", 64, True), ("softcap", 128, True)],
)
def test_compiles(name: str, width: int, joined: bool) -> None:
    plain, rewritten = cascade(BY_NAME[name], **(NARROW | {"e": width, "f": width}))  # type: ignore[arg-type]
    loops, sizes = plan(rewritten), {"B": 2, "P": 300, "M": 304}
    given = list(inputs(plain, BY_NAME[name], sizes).values())
    assert_fits(module(emit(loops, anchored(loops, joined, 132)[0])), given, sizes)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@HOPPER
@JOINED
@pytest.mark.parametrize("growth", [0.0, 30.0, 80.0, 3000.0])
def test_right_on_a_gpu(growth: float, joined: bool) -> None:
    plain, loops = loops_of(WITH_STATISTICS)
    given = scores(growth, 1500, 1700)
    exact = interpret(plain, given, {})
    on_device = {n: x.cuda() for n, x in given.items()}
    for schedule in anchored(loops, joined, 7):
        found = module(emit(loops, schedule)).run(**on_device, M=1700, P=1500)
        for out, name in zip(found, plain.outputs, strict=True):
            best = exact[name]
            assert relative_error(out, best) <= max(3 * relative_error(best.to(out.dtype), best), 1e-5)


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("name", test_gluon_visits.DOMAINS)
def test_lists_are_followed_on_a_gpu(name: str) -> None:
    """Also where the second kernel follows them once more: for large scores."""
    plain, loops = test_gluon_visits.textbook(name), test_gluon_visits.program(name)
    for schedule, ordered, size in itertools.product(anchored(loops, False, 7), (True, False), (1.0, 300.0)):
        given = dict(zip((t.name for t in plain.inputs), test_gluon_visits.made(name, ordered), strict=True))
        given["Q"] = given["Q"] * size
        exact = interpret(plain, given, {})["O"]
        on_device = {n: x.cuda() for n, x in given.items()}
        (out,) = run_poisoned(emit(loops, schedule), on_device, test_gluon_visits.SIZES)
        assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact), (schedule, ordered, size)


@pytest.mark.gpu
@HOPPER
@JOINED
def test_one_row_is_enough_on_a_gpu(joined: bool) -> None:
    """A key that outdoes all others for one row, in a tile that is visited late."""
    plain, loops = loops_of(WITH_STATISTICS.replace("   if m <= p", ""))
    given = scores(0.0, 1500, 1700)
    given["Q"][:, 1], given["K"][:, 1] = 0, 0
    given["Q"][1234, 1], given["K"][3, 1] = 100, 100
    exact = interpret(plain, given, {})
    for schedule in anchored(loops, joined, 7):
        found = module(emit(loops, schedule)).run(**{n: x.cuda() for n, x in given.items()}, M=1700, P=1500)
        for out, name in zip(found, plain.outputs, strict=True):
            assert relative_error(out, exact[name]) <= max(
                3 * relative_error(exact[name].to(out.dtype), exact[name]), 1e-5
            )
            assert relative_error(out[1234], exact[name][1234]) <= 0.01


@pytest.mark.gpu
@HOPPER
@JOINED
def test_graphs_are_replayed_with_other_data_on_a_gpu(joined: bool) -> None:
    """Marks are cleared within the graph: what one replay lost, the next need not."""
    plain, loops = loops_of(WITH_STATISTICS)
    kinds = [scores(growth, 1500, 1700) for growth in (0.0, 3000.0, 0.0, -3000.0, 3000.0)]
    made = module(emit(loops, anchored(loops, joined, 7)[0]))
    given = {n: x.cuda() for n, x in kinds[0].items()}
    made.run(**given, M=1700, P=1500)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = made.run(**given, M=1700, P=1500)
    for kind in kinds:
        for n, x in kind.items():
            given[n].copy_(x)
        graph.replay()
        exact = interpret(plain, kind, {})["O"]
        assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)
