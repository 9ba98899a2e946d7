"""Which schedules the Hopper emitter proposes, by what the loop computes and by how long it is."""

from __future__ import annotations

from typing import Any

import pytest

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.source import Unsupported
from einscade.ir.device import H200
from einscade.ir.interpret import interpret
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.gluon_simulator import Simulator

BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 4, "g": 2, "e": 128, "f": 128}
LONG = {"B": 2, "P": 8192, "M": 8192}


def program(name: str, **shape: Any) -> LoopProgram:
    return plan(cascade(BY_NAME[name], **shape)[1])


def choices(loops: LoopProgram, sizes: dict[str, int] | None = None) -> list[tuple[int | None, int | None, int]]:
    found = schedules(loops) if sizes is None else schedules(loops, H200, sizes)
    return [(s.tile("p"), s.tile("M0"), s.stages) for s in found]


def test_three_warpgroups_where_there_are_registers() -> None:
    assert choices(program("causal", **NARROW), LONG)[0] == (192, 128, 2)
    assert choices(program("softcap", **NARROW), LONG)[0] == (128, 128, 2)
    assert choices(program("window_sink", **NARROW), LONG)[0] == (128, 128, 2)
    assert choices(program("causal", **WIDE), LONG)[0] == (128, 128, 2)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_case_has_some(name: str) -> None:
    for shape in (NARROW, WIDE):
        loops = program(name, **shape)
        assert 1 <= len(choices(loops)) <= 4
        assert 1 <= len(choices(loops, LONG)) <= 6
        assert 1 <= sum(not s.anchored for s in schedules(loops, H200, LONG)) <= 4


def test_references_stay_where_loops_are_long() -> None:
    """There first, also with lists of tiles; beside them are the ordinary kernels. Windows begin with these, and rows
    of a few keys."""

    def anchored(name: str, keys: int) -> list[bool]:
        return [s.anchored for s in schedules(program(name, **WIDE), H200, {"B": 2, "P": 8192, "M": keys})]

    for name in ("full", "causal", "slopes", "softcap", "documents"):
        first, *others = anchored(name, 8192)
        assert first
        assert not all(others)
    assert not anchored("window", 8192)[0]
    assert not anchored("full", 512)[0]
    assert not any(s.anchored for s in schedules(program("causal", **(WIDE | {"dtype": "f16"})), H200, LONG))


def test_one_warpgroup_where_two_would_leave_the_device_idle() -> None:
    first, *_ = choices(program("causal", **WIDE), {"B": 1, "P": 1500, "M": 1500})
    assert first[0] == 64


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"B": 64, "P": 1, "M": 8192}, "1 rows"),
        ({"B": 64, "P": 16, "M": 8192}, "16 rows"),
        ({"B": 1, "P": 256, "M": 8192}, "16 warpgroups for 132 processors"),
    ],
)
def test_none_where_the_kernel_would_idle(sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        schedules(program("causal", **WIDE), H200, sizes)


@pytest.mark.parametrize("name", ["causal", "additive", "documents"])
def test_one_warpgroup_is_right(name: str) -> None:
    shape, sizes = WIDE | {"h": 2, "g": 1}, {"B": 1, "P": 130, "M": 304}
    plain, _ = cascade(BY_NAME[name], **shape)
    given = inputs(plain, BY_NAME[name], sizes)
    loops = program(name, **shape)
    alone = [s for s in schedules(loops, H200, {"B": 4, "P": 1500, "M": 1500}) if s.tile("p") == 64]
    assert alone
    exact = interpret(plain, given, {})["O"]
    for seed, schedule in enumerate(alone):
        (out,) = Simulator(seed).load(emit(loops, schedule).text).run(*given.values(), **sizes)
        assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)
