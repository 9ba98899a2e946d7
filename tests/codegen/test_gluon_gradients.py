"""Gradients as Hopper kernels: executed by the simulator against the interpreter in float64, compiled without a GPU."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from einscade.codegen import gluon
from einscade.codegen.gluon_program import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.compiler.gradients import scan_free
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import Gradient, differentiate
from einscade.passes.pipeline import run
from tests.codegen.cascades import CASES, DTYPES, inputs, relative_error, text
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits, compiled
from tests.codegen.gluon_simulator import Simulator

BY_NAME = {c.name: c for c in CASES}
NAMES = [n for n in BY_NAME if n != "sink"]
NARROW = {"dtype": "bf16", "h": 2, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 2, "g": 2, "e": 128, "f": 128}
GROUPED = {"dtype": "f16", "h": 4, "g": 2, "e": 96, "f": 80}


@functools.cache
def program(name: str, shape: tuple[tuple[str, Any], ...]) -> tuple[Gradient, LoopProgram]:
    """The gradient of a case with respect to queries, keys and values, and its loops."""
    forward = scan_free(parse_cascade(text(BY_NAME[name], **dict(shape))), "exact")
    gradient = differentiate(forward, ["Q", "K", "V"])
    return gradient, plan(run(gradient.cascade, "exact").cascade)


def example(gradient: Gradient, name: str, shape: dict[str, Any], sizes: dict[str, int]) -> list[Tensor]:
    """Inputs of the gradient: random ones, and what the forward pass saved of them."""
    forward = gradient.forward
    plain = parse_cascade(text(BY_NAME[name], **dict(shape)))
    values = dict(zip((t.name for t in forward.inputs), inputs(plain, BY_NAME[name], sizes).values(), strict=True))
    made = interpret(forward, values, {})
    values |= {n: made[n].to(DTYPES[forward.tensors[n].dtype]) for n in gradient.saved}
    for output, cotangent in gradient.cotangents.items():
        values[cotangent] = torch.randn(made[output].shape).to(DTYPES[forward.tensors[output].dtype])
    return [values[t.name] for t in gradient.cascade.inputs]


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [(NARROW, (1, 1)), (NARROW, (150, 333)), (WIDE, (150, 200)), (GROUPED, (200, 77))],
    ids=["64-one", "64", "128", "96x80"],
)
@pytest.mark.parametrize("name", NAMES)
def test_right_in_any_order(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    """Error against float64 at most three times that of rounding the exact gradients: weights are rounded, too."""
    torch.manual_seed(len(name) + lengths[0])
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1, "P": lengths[0], "M": lengths[1]}
    given = example(gradient, name, shape, sizes)
    named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
    expected = interpret(gradient.cascade, named, {n: s for n, s in sizes.items() if n in gradient.cascade.symbols})
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    space = schedules(loops)
    schedule = space[len(name) % len(space)]
    found = Simulator(len(name)).load(emit(loops, schedule).text).run(*given, **used)
    for output, value in zip(gradient.cascade.outputs, found, strict=True):
        exact = expected[output]
        rounding = relative_error(exact.to(value.dtype), exact)
        scale = exact.norm() + 1e-2 * named["dO"].double().norm()  # a gradient that cancels keeps its terms' rounding
        assert (value.double() - exact).norm() <= 3 * max(rounding, 2**-10) * scale, output


# -- compiled without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("full", NARROW), ("causal", NARROW), ("causal", WIDE), ("causal", {**NARROW, "dtype": "f16"}),
        ("window", WIDE), ("slopes", WIDE), ("documents", WIDE),
        ("softcap", WIDE), ("sigmoid", NARROW), ("causal", GROUPED),
    ],
)  # fmt: skip
def test_compiles(name: str, shape: dict[str, Any]) -> None:
    """For Hopper, in the background, without spills (but of two registers, outside of the loops)."""
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1, "P": 300, "M": 300}
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    made = module(emit(loops, schedules(loops)[0]))
    for shared, report in compiled(made, example(gradient, name, shape, sizes), used).values():
        assert shared <= 227 << 10
        assert "serialized" not in report
        assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= 8, report  # type: ignore[index]


def test_the_forward_pass_that_saves_compiles() -> None:
    gradient, _ = program("causal", tuple(WIDE.items()))
    loops = plan(run(gradient.forward, "exact").cascade)
    values = inputs(gradient.forward, BY_NAME["causal"], {"B": 1, "P": 300, "M": 300})
    made = module(gluon.emit(loops, gluon.schedules(loops)[0]))
    assert_fits(made, list(values.values()), {"B": 1, "P": 300, "M": 300})


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("shape", [NARROW, WIDE, GROUPED], ids=["64", "128", "96x80"])
@pytest.mark.parametrize("lengths", [(1, 1), (300, 77), (1000, 1000)])
@pytest.mark.parametrize("name", NAMES)
def test_right(name: str, lengths: tuple[int, int], shape: dict[str, Any]) -> None:
    """Every schedule's kernels on the device, to the bound of the simulated ones."""
    torch.manual_seed(0)
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 2, "P": lengths[0], "M": lengths[1]}
    given = example(gradient, name, shape, sizes)
    named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
    expected = interpret(gradient.cascade, named, {n: s for n, s in sizes.items() if n in gradient.cascade.symbols})
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    for schedule in schedules(loops):
        found = module(emit(loops, schedule)).run(*(x.cuda() for x in given), **used)
        for output, value in zip(gradient.cascade.outputs, found, strict=True):
            exact = expected[output]
            rounding = relative_error(exact.to(value.dtype), exact)
            scale = exact.norm() + 1e-2 * named["dO"].double().norm()
            assert (value.double().cpu() - exact).norm() <= 3 * max(rounding, 2**-10) * scale, (output, schedule)
