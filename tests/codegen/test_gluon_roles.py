"""Gradients of inputs that are read along several ranks, as Hopper kernels: simulated, and on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.ir.interpret import interpret
from einscade.passes.pipeline import run
from einscade.runtime.program import DTYPES
from tests.codegen.cascades import relative_error
from tests.codegen.generated import run_poisoned
from tests.codegen.gluon_simulator import Simulator
from tests.codegen.test_gradients import ROLES, of_roles

N = 200


def example(name: str, width: int) -> tuple[LoopProgram, dict[str, Tensor], dict[str, Tensor]]:
    """The gradient's loops in bfloat16 (decays in float32), its inputs and the exact results."""
    text = ROLES[name].replace("]: f64 =", "] =").replace("f64", "bf16").replace("X[b,h,m]: bf16", "X[b,h,m]: f32")
    forward, gradient, of = of_roles(text.replace("e < 8, f < 6", f"e < {width}, f < {width}").replace("0.7", "0.1"))
    values = {}
    for t in forward.inputs:
        decays = torch.rand(1, 2, N).mul(-0.3).cumsum(-1) if len(t.ranks) == 3 else torch.randn(1, 2, N, width)
        values[t.name] = decays.to(DTYPES[t.dtype])
    values |= {role: values[n] for role, n in of.items()}
    made = interpret(gradient.forward, values, {})
    values |= {n: made[n].to(DTYPES[gradient.forward.tensors[n].dtype]) for n in gradient.saved}
    values[gradient.cotangents["O"]] = torch.randn(made["O"].shape).bfloat16()
    given = {t.name: values[t.name] for t in gradient.cascade.inputs}
    return plan(run(gradient.cascade, "exact").cascade), given, interpret(gradient.cascade, given, {})


def assert_right(found: tuple[Tensor, ...], expected: dict[str, Tensor]) -> None:
    for value, exact in zip(found, expected.values(), strict=True):
        assert relative_error(value.cpu(), exact) <= (2e-6 if value.dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ROLES)
def test_right(name: str, width: int) -> None:
    loops, given, expected = example(name, width)
    schedule = schedules(loops)[0]
    assert_right(Simulator(0).load(emit(loops, schedule).text).run(*given.values(), B=1, P=N), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ROLES)
def test_right_on_a_gpu(name: str, width: int) -> None:
    loops, given, expected = example(name, width)
    for schedule in schedules(loops):
        inputs = {n: x.cuda() for n, x in given.items()}
        assert_right(run_poisoned(emit(loops, schedule), inputs, {"B": 1, "P": N}), expected)
