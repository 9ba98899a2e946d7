"""Sums over programs that are resident: right in any order of events, every synchronisation needed, within a Hopper
GPU's resources, and chosen where loops are short."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from einscade.codegen.gluon_program import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.compiler.gradients import scan_free
from einscade.ir.device import H200
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from tests.codegen.generated import module
from tests.codegen.gluon_offline import compiled
from tests.codegen.test_gluon_gradients import (
    GROUPED,
    HOPPER,
    NAMES,
    NARROW,
    WIDE,
    assert_right,
    example,
    holding,
    of_kind,
    program,
)
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

SHORT = ("window", "window_sink", "documents", "causal")
"""Those that residence is for, and one of long loops: on a GPU all run."""

LENGTHS = [(NARROW, (1, 1), 3), (NARROW, (150, 333), 3), (WIDE, (150, 300), 2), (WIDE, (300, 77), 5),
           (GROUPED, (200, 77), 1)]  # fmt: skip


def resident(name: str, shape: dict[str, Any], programs: int) -> list[Schedule]:
    """The schedules with so many resident programs at most: of each kind of groups one."""
    _, loops = program(name, tuple(shape.items()))
    found = {s.grouped: replace(s, resident=programs) for s in reversed(of_kind(loops, "unordered"))}
    return list(found.values())


@pytest.mark.parametrize(("shape", "lengths", "programs"), LENGTHS, ids=["64-one", "64", "128", "fewer", "96x80"])
@pytest.mark.parametrize("name", SHORT)
def test_right_in_any_order(name: str, shape: dict[str, Any], lengths: tuple[int, int], programs: int) -> None:
    """With more tiles of rows than programs, and fewer; with heads that share keys, in a program each or together."""
    if not (tried := resident(name, shape, programs)):
        pytest.skip("no tile for a sum over programs")
    for schedule in tried:
        assert_right(name, shape, lengths, schedule)


@pytest.mark.parametrize("lengths", [(700, 700), (333, 500), (500, 333), (64, 200)], ids=str)
@pytest.mark.parametrize(("name", "passes"), [("documents", True), ("window", False), ("window_sink", False)])
def test_the_last_rows_pass_by_the_end_of_a_list(name: str, passes: bool, lengths: tuple[int, int]) -> None:
    (schedule,) = resident(name, WIDE, 3)
    _, loops = program(name, tuple(WIDE.items()))
    assert ("def pass_by" in emit(loops, schedule).text) == passes
    assert_right(name, WIDE, lengths, schedule)


@pytest.mark.parametrize("abreast", [2, 4])
def test_heads_go_abreast(abreast: int) -> None:
    shape = {**WIDE, "h": 4, "g": 4}
    (schedule,) = resident("window", shape, 3)
    assert_right("window", shape, (200, 300), replace(schedule, abreast=abreast))


@pytest.mark.long
def test_every_synchronisation_is_missed() -> None:
    """Of the lines of a resident kernel that synchronise none can go, but for those that others say enough of: the
    second ring's tiles are handed back before the first's; and with rings of two stages nobody who passes a tile by
    can be too early to hand it back."""
    torch.manual_seed(0)
    name, shape = "documents", {**WIDE, "h": 1, "g": 1}
    _, loops = program(name, tuple(shape.items()))
    source = emit(loops, resident(name, shape, 1)[0]).text
    holds = holding(name, shape, [{"B": 1, "P": 400, "M": 400}, {"B": 3, "P": 60, "M": 60}])
    assert all(holds(source, seed) for seed in range(4))
    text = source.split("\n")
    within = next(i for i, line in enumerate(text) if line.startswith("def pass_by"))
    known = [i for i, line in enumerate(text) if "_full.index(stage)" in line and within < i < within + 25]
    lines = [i for i, line in enumerate(text) if SYNCHRONISES.match(line) and i not in known]
    assert len(lines) > 25
    kept = {text[i].strip() for i in lines if all(holds(without(source, i), seed) for seed in range(40))}
    assert [re.sub(r"\d", "", line) for line in kept] == ["mbarrier.wait(X_empty.index(stage), phase)"], kept


@pytest.mark.parametrize(
    ("name", "shape"),
    [("window", WIDE), ("documents", WIDE), ("causal", {**WIDE, "h": 8})],
)
def test_compiles(name: str, shape: dict[str, Any]) -> None:
    """As kernels with a program for each tile of rows: what is spilled is written before the loops."""
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1, "P": 300, "M": 300}
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    made = module(emit(loops, resident(name, shape, 132)[0]))
    for shared, report, assembly in compiled(made, example(gradient, name, shape, sizes), used).values():
        assert shared <= 227 << 10
        assert "serialized" not in report
        assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= 512, report  # type: ignore[index]
        assert not re.search(r"@!?P\d+ FSEL", assembly)


# -- which are chosen -------------------------------------------------------------------------------------------------


def attention(domain: str, width: int = 128, documents: bool = False) -> LoopProgram:
    """The loops of a gradient of 32 heads of 8192 positions."""
    extra = ", D[p]: i32" if documents else ""
    forward = parse_cascade(
        f"""cascade attention(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16{extra}) -> O[b,h,p,f]: bf16
  where b < B, h < 16, p < P, m < P, e < {width}, f < {width}
  S[b,h,p,m] = sum(e) 0.1 * Q[b,h,p,e] * K[b,h,m,e]   {domain}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
    )
    return plan(run(differentiate(scan_free(forward, "exact"), ["Q", "K", "V"]).cascade, "exact").cascade)


@pytest.mark.parametrize(
    ("domain", "width", "chosen"),
    [
        ("if m <= p & p - m < 1024", 128, (132, 4)), ("if m <= p & p - m < 4096", 128, None),
        ("if m <= p & D[p] == D[m]", 128, (132, 1)), ("if m <= p", 128, None), ("", 128, None),
        ("if m <= p & p - m < 1024", 64, (132, 4)),
    ],
)  # fmt: skip
def test_chosen_where_loops_are_short(domain: str, width: int, chosen: tuple[int, int] | None) -> None:
    """Windows of few tiles, and lists; first of the sums over programs, each of which is tried without them, too."""
    loops = attention(domain, width, "D" in domain)
    tried = [s for s in schedules(loops, H200, {"B": 2, "P": 8192}) if s.unordered and not s.ahead]
    expected = [chosen, (0, 1)] if chosen else [(0, 1)]
    assert [(s.resident, s.abreast) for s in tried] == expected
    few = schedules(loops, H200, {"B": 1, "P": 1024})
    assert not any(s.resident for s in few)


def test_not_with_the_next_scores_ahead() -> None:
    _, loops = program("causal", tuple(NARROW.items()))
    (schedule, *_) = of_kind(loops, "ahead")
    with pytest.raises(Unsupported, match="ahead"):
        emit(loops, replace(schedule, resident=3))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("shape", "lengths", "programs"), LENGTHS, ids=["64-one", "64", "128", "fewer", "96x80"])
@pytest.mark.parametrize("name", NAMES)
def test_right(name: str, shape: dict[str, Any], lengths: tuple[int, int], programs: int) -> None:
    for schedule in resident(name, shape, programs):
        assert_right(name, shape, lengths, schedule, "cuda")
