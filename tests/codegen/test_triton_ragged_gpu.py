"""Decoding and ragged batches on a GPU: the model's schedules, in parts and whole, against float64.

The bound is the project's: 1.5 times the error of PyTorch's math attention in the same dtype, here on the same queries,
keys and values without the domain, which PyTorch cannot always express.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.cascade import Cascade
from einscade.ir.device import Device
from einscade.ir.interpret import interpret
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.ragged import CASES, Case, inputs, program, textbook

pytestmark = pytest.mark.gpu


def math_error(x: dict[str, Tensor], case: Case) -> float:
    q, k, v = x["Q"], x["K"], x["V"]
    if k.dim() == 3:  # places, heads, width
        k, v = (t[None].transpose(1, 2) for t in (k, v))
    elif case.page is not None:
        k, v = (t.flatten(0, 1)[None].transpose(1, 2) for t in (k, v))
    k, v = (t[:1].expand(len(q), -1, -1, -1) for t in (k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    return relative_error(out, exact)


def check(cascade: Cascade, case: Case, sizes: dict[str, int], parts: bool, choice: int) -> None:
    x = inputs(cascade, case, sizes)
    given = {n: sizes[n] for n in cascade.symbols}
    loops = program(cascade, parts)
    # as for keys 64 times as long, so that parts are what they are for those
    asked = {n: s * 64 if n in "MN" and parts else s for n, s in given.items()}
    schedules = candidates(loops, Device.of("cuda"), asked)
    run = module(emit(loops, schedules[min(choice, len(schedules) - 1)])).run
    on_gpu = {n: t.cuda() for n, t in x.items()}
    expected, allowed = interpret(cascade, x, {})["O"], 1.5 * math_error(on_gpu, case)
    for _ in range(20 if parts else 1):  # a merge that does not wait for the parts may be late by chance
        poison = torch.full((1 << 24,), float("nan"), device="cuda")
        del poison
        (out,) = run(*on_gpu.values(), **given)
        error = relative_error(out, expected)
        assert error <= allowed, f"{case.name} {sizes}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("choice", [3, 6])
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_schedules(parts: bool, choice: int) -> None:
    decode(CASES[0], parts, choice)


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_decoding(case: Case, parts: bool) -> None:
    decode(case, parts, 0)


def decode(case: Case, parts: bool, choice: int) -> None:
    pages = -(-1500 // (case.page or 1))
    sizes = {"B": 3, "P": 2, "M": 1500, "N": pages, "C": 3 * max(pages, 500) + 5}
    check(textbook(case, "bf16", (8, 2), 64), case, sizes, parts, choice)


@pytest.mark.parametrize("name", ["documents", "unordered", "padded", "through_a_document"])
def test_prefill(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    check(textbook(case, "bf16", (4, 2), 64), case, {"B": 2, "P": 777, "M": 777}, False, 0)
