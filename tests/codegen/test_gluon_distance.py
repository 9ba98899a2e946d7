"""Tables that a Hopper kernel reads by distance: the right entries, inside of the table, and each of them once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.loops import plan
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite
from tests.codegen.cascades import Case, inputs, relative_error, text
from tests.codegen.gluon_offline import compiled
from tests.codegen.gluon_simulator import Simulator
from tests.codegen.test_gluon import module

TABLE = (("T[h,c]: bf16", "float"),)
CASES = {
    "distance": Case("distance", "X[b,h,p,m] + T[h,m - p + P - 1]", extra=TABLE, ranks=", c < P + M"),
    "backwards": Case("backwards", "X[b,h,p,m] * T[h,p - m]", "m <= p", extra=TABLE, ranks=", c < P"),
    "window": Case("window", "X[b,h,p,m] + T[h,p - m]", "m <= p & p - m < 70", extra=TABLE, ranks=", c < 70"),
    "steps": Case("steps", "X[b,h,p,m] + T[h,2*p + 3*m]", extra=TABLE, ranks=", c < 2*P + 3*M"),
    "rows": Case("rows", "X[b,h,p,m] + T[p,m - p + P - 1]", extra=(("T[p,c]: bf16", "float"),), ranks=", c < P + M"),
}
SHAPE = {"dtype": "bf16", "h": 2, "g": 1, "e": 64, "f": 64}


def cascades(case: Case, lengths: tuple[int, int] | None = None) -> Cascade:
    """The case as it is spelled; of lengths that are known."""
    spelled = text(case, **SHAPE)  # type: ignore[arg-type]
    if lengths is not None:
        for name, n in zip("PM", lengths, strict=True):
            spelled = spelled.replace(f" {name}", f" {n}").replace(f"*{name}", f"*{n}")
    return parse_cascade(spelled)


def result(source: str, given: dict[str, Tensor], sizes: dict[str, int], seed: int) -> Tensor:
    (out,) = Simulator(seed).load(source).run(*given.values(), **sizes)
    return out


@pytest.mark.parametrize("resident", [0, 3])
@pytest.mark.parametrize("lengths", [(1, 1), (130, 200), (300, 77)])
@pytest.mark.parametrize("name", CASES)
def test_right_at_odd_lengths(name: str, lengths: tuple[int, int], resident: int) -> None:
    """The simulator refuses reads outside of a tensor."""
    plain = cascades(CASES[name])
    program = plan(rewrite(plain, "exact").cascade)
    source = emit(program, replace(schedules(program)[0], resident=resident)).text
    assert ("at_points(" in source) == (name != "rows")
    sizes = {"B": 1, "P": lengths[0], "M": lengths[1]}
    given = inputs(plain, CASES[name], sizes)
    exact = interpret(plain, given, {})["O"]
    rounding = relative_error(exact.to(torch.bfloat16), exact)
    assert relative_error(result(source, given, sizes, len(name)), exact) <= 3 * rounding


@pytest.mark.parametrize("lengths", [(256, 256), (256, 200), (200, 256)])
def test_known_lengths_need_fewer_masks(lengths: tuple[int, int]) -> None:
    plain = cascades(CASES["distance"], lengths)
    program = plan(rewrite(plain, "exact").cascade)
    source = emit(program, schedules(program)[0]).text
    read = [line for line in source.split("\n") if "T = S" in line][-1]  # where no tile is masked
    assert ("p_ < 200" in read) == (lengths[0] == 200)
    given = inputs(plain, CASES["distance"], sizes := {"B": 1})
    exact = interpret(plain, given, {})["O"]
    rounding = relative_error(exact.to(torch.bfloat16), exact)
    assert relative_error(result(source, given, sizes, 3), exact) <= 3 * rounding


def test_each_entry_is_loaded_once() -> None:
    """Compiled for Hopper: points with the same distance share a load, and loads share an address."""
    plain = cascades(CASES["distance"], (256, 256))
    program = plan(rewrite(plain, "exact").cascade)
    schedule = schedules(program)[0]
    columns = dict(schedule.tiles)["M0"]
    given = list(inputs(plain, CASES["distance"], sizes := {"B": 1}).values())
    ((_, report, assembly),) = compiled(module(emit(program, schedule)), given, sizes).values()
    assert " 0 bytes spill stores" in report
    loads = [line for line in assembly.split("\n") if "LDG.E.U16" in line]
    distances = columns // 4 + 2  # a thread's: of two neighbours in each eight columns, of two rows eight apart
    consumers, places = schedule.tiles and dict(schedule.tiles)["p"] // 64, 2  # the first tile, and the loop
    assert len(loads) <= consumers * places * distances
