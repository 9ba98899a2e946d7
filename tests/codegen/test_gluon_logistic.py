"""Logistic functions in Hopper kernels: what is recognised, what the assembly makes, and points that do not exist."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from einscade.codegen.base2 import Exp2, logistic_exponent
from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_values import HELPERS
from einscade.codegen.loops import plan
from einscade.ir.expr import Access, Expr, var
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from tests.codegen.cascades import CASES, cascade, inputs
from tests.codegen.gluon_offline import compiled
from tests.codegen.gluon_simulator import Simulator
from tests.codegen.ptx import evaluated
from tests.codegen.test_gluon import module
from tests.codegen.uniform_registers import undefined

BY_NAME = {c.name: c for c in CASES}
SHAPE = {"dtype": "bf16", "h": 2, "g": 1, "e": 128, "f": 128}
S = Access("S", var("p"), var("m"))
FEW_KEYS = """cascade attention(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < 2, h < 4, p < 200, f < 64, e < 64, m < 200
  S[b,h,p,m]: bf16 = sum(e) 0.125 * K[b,h,m,e] * Q[b,h,p,e]DOMAIN
  O[b,h,p,f]: bf16 = sum(m) V[b,h,m,f] / (exp(4 - S[b,h,p,m]) + 1)
"""


@pytest.mark.parametrize(
    ("expr", "exponent"),
    [
        (1 / (1 + Exp2(-S)), S), (1 / (Exp2(5 - S / 7) + 1), S / 7 - 5), (Exp2(S) / (1 + Exp2(S)), S),
        (1 / (2 + Exp2(S)), None), (2 / (1 + Exp2(S)), None), (1 / (1 - Exp2(S)), None), (S / (1 + Exp2(-S)), None),
        (1 / Exp2(S), None), (Exp2(S), None), (1 / (1 + S), None), (Exp2(S) / (1 + Exp2(2 * S)), None), (S, None),
    ],
)  # fmt: skip
def test_recognised(expr: Expr, exponent: Expr | None) -> None:
    found = logistic_exponent(expr)
    assert found == exponent if exponent is None else sympy.expand(found - exponent) == 0  # type: ignore[operator]


def assembly() -> tuple[str, int]:
    """The helper's block, and how many elements it takes."""
    text = HELPERS["logistic"]
    lines = re.findall(r'^ +"(.*)"$', text, re.MULTILINE)
    return "".join(lines), int(re.search(r"pack=(\d+)", text)[1])  # type: ignore[index]


def logistic(x: Tensor) -> Tensor:
    return evaluated(assembly()[0], x, assembly()[1])


def test_the_assembly_is_the_function() -> None:
    """To float32's accuracy wherever neighbours are, to the least number that float32 holds."""
    torch.manual_seed(0)
    spans = torch.tensor([1.0, 10, 40, 120, 1000])
    for span in spans:
        x = (torch.rand(64, 128) * 2 - 1) * span
        exact = torch.sigmoid(x.double() * torch.tensor(2.0).double().log())
        normal = exact > 2.0**-124
        error = ((logistic(x).double() - exact) / exact)[normal]
        assert error.abs().max() < 6 * 2.0**-24
        assert (logistic(x)[~normal] <= 2.0**-123).all()


@pytest.mark.parametrize(("x", "exact"), [(float("-inf"), 0.0), (float("inf"), 1.0), (3e38, 1.0), (-3e38, 0.0)])
def test_extremes_leave_others_alone(x: float, exact: float) -> None:
    torch.manual_seed(1)
    tile = torch.randn(64, 64)
    plain, chosen = logistic(tile), torch.rand(64, 64) < 0.3
    made = logistic(tile.masked_fill(chosen, x))
    assert ((made[chosen] - exact).abs() <= exact * 6 * 2.0**-24).all()  # what is 0 is exactly 0
    assert torch.allclose(made[~chosen], plain[~chosen], rtol=6 * 2.0**-24, atol=0)


def test_not_a_number_stays_in_its_row() -> None:
    tile = torch.zeros(64, 64)
    tile[5, 7] = float("nan")
    made = logistic(tile)
    assert made[5, 7].isnan()
    assert not made[torch.arange(64) != 5].isnan().any()


@pytest.mark.parametrize("resident", [0, 3])
def test_keys_that_are_masked_do_not_matter(resident: int) -> None:
    """Causal attention whose last keys are no numbers: the rows before them are what they are without."""
    plain, rewritten = cascade(BY_NAME["sigmoid"], **SHAPE)
    program = plan(rewritten)
    text = emit(program, replace(schedules(program)[0], resident=resident)).text
    assert "logistic(" in text
    assert "reciprocal(" not in text
    given = inputs(plain, BY_NAME["sigmoid"], sizes := {"B": 1, "P": 160, "M": 160})
    (whole,) = Simulator(1).load(text).run(*given.values(), **sizes)
    given["K"] = given["K"].clone()
    given["K"][:, :, 101:] = float("nan")
    (spoilt,) = Simulator(2).load(text).run(*given.values(), **sizes)
    assert torch.equal(spoilt[:, :, :101], whole[:, :, :101])
    assert spoilt[:, :, 101:].isnan().all()


@pytest.mark.parametrize("domain", ["", "   if m <= p"])
def test_no_descriptor_of_another_warpgroup(domain: str) -> None:
    """At width 64, where others have three warpgroups. `compiled` looks for what the assembler gets wrong there."""
    plain = parse_cascade(FEW_KEYS.replace("DOMAIN", domain))
    program = plan(run(plain, "exact").cascade)
    for schedule in schedules(program):
        assert dict(schedule.tiles)["p"] <= 128
        given = [torch.empty(2, 4, 200, 64, dtype=torch.bfloat16) for _ in plain.inputs]
        compiled(module(emit(program, schedule)), given, {})


@pytest.mark.parametrize(("second", "read"), [("UR6", ["UR6"]), ("UR4", [])])
def test_undefined_registers_are_found(second: str, read: list[str]) -> None:
    """Of two branches of a jump through a table: the first one's registers are not the second's."""
    text = f"""
        /*0000*/                   S2UR UR4, SR_CTAID.X ;
        /*0010*/                   BRX R4 -0x20                 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_1:
        /*0020*/                   UIADD3.64 UR6, UR4, 0x2, URZ ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   UMOV UR9, {second} ;
        /*0060*/                   EXIT ;
"""
    found = undefined(text)
    assert [re.findall(r"UR\d+", x)[-1] for x in found if "UMOV" in x] == read


def test_special_functions() -> None:
    """Compiled for Hopper, an iteration has an exponential for each point and a reciprocal for several, and some of
    them stand in front of the wait for the weighted sum."""
    plain, rewritten = cascade(BY_NAME["sigmoid"], **SHAPE)
    program = plan(rewritten)
    schedule = schedules(program)[0]
    given: list[Any] = list(inputs(plain, BY_NAME["sigmoid"], sizes := {"B": 1, "P": 300, "M": 300}).values())
    ((_, report, text),) = compiled(module(emit(program, schedule)), given, sizes).values()
    assert " 0 bytes spill stores" in report
    powers, reciprocals = text.count("MUFU.EX2"), text.count("MUFU.RCP")
    assert powers >= 2 * dict(schedule.tiles)["M0"] // 2
    assert 0 < reciprocals * assembly()[1] <= powers * 1.1  # sizes are divided, too, a few times
    waits = re.findall(r"DEPBAR\.LE gsb0, (0x[01])(.*?)(?=WARPGROUP\.DEPBAR|HGMMA|\Z)", text, re.DOTALL)
    beside = [between.count("MUFU") for pending, between in waits if pending == "0x1"]
    assert beside
    assert min(beside) >= 8
