"""The Hopper emitter: what it accepts, that its modules compile without a GPU and without spills, and, on a Hopper GPU,
that they are right."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_bounds import bounds
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.expr import var
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits, compiled

GOLDEN = Path(__file__).parent / "golden" / "causal_gluon.py"
BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 4, "g": 2, "e": 128, "f": 128}


def program(name: str, **shape: Any) -> LoopProgram:
    return plan(cascade(BY_NAME[name], **shape)[1])


def test_golden() -> None:
    """One example of the emitter's text, kept to be read. `EINSCADE_UPDATE_GOLDEN=1` writes it anew."""
    loops = program("causal", dtype="bf16", h=32, g=8, e=128, f=128)
    text = emit(loops, schedules(loops)[0]).text
    if os.environ.get("EINSCADE_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text


@pytest.mark.parametrize("name", BY_NAME)
def test_every_case_has_a_module(name: str) -> None:
    loops = program(name, **NARROW)
    for schedule in schedules(loops):
        compile(emit(loops, schedule).text, name, "exec")


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": "f32", "e": 64, "f": 64}, "dense f32"),
        ({"dtype": "bf16", "e": 36, "f": 64}, "width 36"),
        ({"dtype": "bf16", "e": 64, "f": 20}, "width 20"),
        ({"dtype": "bf16", "e": 264, "f": 64}, "width 264"),
    ],
)
def test_unsupported_operands(shape: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        schedules(program("causal", **shape))


@pytest.mark.parametrize(
    ("tiles", "stages", "reason"),
    [
        ({"M0": 128, "p": 96}, 2, "tile of 96 rows"),
        ({"M0": 48, "p": 128}, 2, "tile of 48"),
        ({"M0": 128, "p": 128}, 4, "shared memory"),
        ({"M0": 128, "p": 192}, 2, "registers"),
    ],
)
def test_unsupported_schedules(tiles: dict[str, int], stages: int, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        emit(program("causal", **WIDE), Schedule(tuple(sorted(tiles.items())), 4, stages, (), "cuda:90", True))


# -- which tiles are masked -------------------------------------------------------------------------------------------


def tiles_of(predicate: str, row: int, length: int, rows: int, step: int) -> tuple[set[int], set[int]]:
    """The tiles that the bounds visit, and those among them that run without a mask."""
    text = f"cascade c(X[p]) -> Y[p,m]\n  where p < P, m < M\n  Y[p,m] = X[p]  if ({predicate}) & m < M\n"
    domain = parse_cascade(text).body[0].domain
    b = bounds(domain, "m", "p", var("row"), rows, step)
    known = {var(n): sympy.Integer(x) for n, x in (("row", row), ("M", length), ("P", length))}

    def at(expr: sympy.Expr) -> int:
        return int(expr.xreplace(known))

    first, end = at(b.first), at(b.end)
    visited = set(range(min(first, end - 1), end))
    if b.full_first is None or b.full_end is None:
        return visited, set()
    full_end = at(b.full_end) if b.upper else end - 1
    full_first = at(b.full_first) if b.lower else 0
    return visited, {t for t in visited if full_first <= t < min(full_end, end - 1)}


@pytest.mark.parametrize(
    "predicate",
    ["m <= p", "m <= p + 37", "m <= p & p - m < 100", "m <= p | m < 70", "p - m < 50 & m - p < 50", "m < 99"],
)
@pytest.mark.parametrize(("rows", "step"), [(128, 128), (192, 128), (128, 64), (64, 128)])
def test_bounds(predicate: str, rows: int, step: int) -> None:
    """Every tile with a point is visited; a tile without a mask has nothing but points."""
    length = 500
    holds = eval(f"lambda p, m: {predicate.replace('&', 'and').replace('|', 'or')}")
    for row in range(0, length, rows):
        visited, full = tiles_of(predicate, row, length, rows, step)
        for t in range(-(-length // step)):
            points = [
                holds(p, m) and m < length
                for p in range(row, row + rows)
                for m in range(t * step, t * step + step)
            ]
            assert not any(points) or t in visited
            assert all(points) or t not in full


# -- compiled without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("full", NARROW), ("causal", WIDE), ("causal_end", NARROW), ("window_sink", WIDE), ("documents", WIDE),
        ("slopes", WIDE), ("softcap", WIDE), ("table", WIDE), ("sigmoid", WIDE), ("sink", NARROW),
        ("full", {"dtype": "f16", "e": 96, "f": 80}), ("full", {"dtype": "bf16", "e": 256, "f": 256}),
    ],
)  # fmt: skip
def test_compiles(name: str, shape: dict[str, Any]) -> None:
    plain, _ = cascade(BY_NAME[name], **shape)
    loops = program(name, **shape)
    sizes = {"B": 1, "P": 300, "M": 300}
    given = list(inputs(plain, BY_NAME[name], sizes).values())
    assert_fits(module(emit(loops, schedules(loops)[0])), given, sizes)


@pytest.mark.parametrize(("name", "resident"), [("causal", 0), ("window", 132)])
def test_sums_are_waited_for_behind_the_maxima(name: str, resident: int) -> None:
    """The assembler leaves all maxima of an iteration's scores in front of the wait for the weighted sums."""
    plain, _ = cascade(BY_NAME[name], **WIDE)
    loops = program(name, **WIDE)
    given = list(inputs(plain, BY_NAME[name], sizes := {"B": 1, "P": 300, "M": 300}).values())
    schedule = replace(schedules(loops)[0], resident=resident, joined=False)
    ((_, _, assembly),) = compiled(module(emit(loops, schedule)), given, sizes).values()
    waits = re.findall(r"DEPBAR\.LE gsb0, (0x[01])(.*?)(?=WARPGROUP\.DEPBAR|HGMMA|\Z)", assembly, re.DOTALL)
    maxima = [text.count("FMNMX") for pending, text in waits if pending == "0x1"]
    columns = dict(schedule.tiles)["M0"]
    assert maxima
    assert min(maxima) >= columns // 2 - 2  # a thread has two rows, and half as many scores as there are columns


# -- on a GPU ---------------------------------------------------------------------------------------------------------

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [(NARROW, (1, 1)), (NARROW, (300, 77)), (WIDE, (333, 333)), ({"dtype": "f16", "e": 96, "f": 80}, (129, 129))],
    ids=["64-one", "64", "128", "96x80"],
)
def test_right(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    """Error against float64 at most three times that of rounding the exact result: weights are rounded, too. At one
    length every schedule's kernel, else the first one's."""
    sizes = {"B": 2, "P": lengths[0], "M": lengths[1]}
    plain, _ = cascade(BY_NAME[name], **shape)
    given = inputs(plain, BY_NAME[name], sizes, "cuda")
    loops = program(name, **shape)
    exact = interpret(plain, {n: x.cpu() for n, x in given.items()}, {})["O"]
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[shape["dtype"]]
    rounding = relative_error(exact.to(dtype), exact)
    for schedule in schedules(loops) if lengths == (333, 333) else schedules(loops)[:1]:
        poison = torch.full((1 << 24,), float("nan"), device="cuda")
        del poison
        (out,) = module(emit(loops, schedule)).run(*given.values(), **sizes)
        assert relative_error(out, exact) <= 3 * rounding
