"""Generated Triton kernels on a GPU: dtypes, widths, lengths, masks, strides, against float64 and PyTorch's own error.

The bound is the project's: relative Frobenius error against float64 at most 1.5 times the error of PyTorch's math
attention on the same inputs in the same dtype (written out here for scores that PyTorch has no call for).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einscade.codegen.loops import plan
from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.device import Device
from einscade.ir.interpret import interpret
from tests.codegen.cascades import CASES, Case, cascade, inputs, relative_error
from tests.codegen.generated import module

pytestmark = pytest.mark.gpu

CAUSAL = next(c for c in CASES if c.name == "causal")
FULL = next(c for c in CASES if c.name == "full")


def check(case: Case, sizes: dict[str, int], choice: int = 0, contiguous: bool = True, **shape: object) -> None:
    plain, rewritten = cascade(case, **shape)  # type: ignore[arg-type]
    given = inputs(plain, case, sizes, "cuda")
    if not contiguous:  # as models hand them over: heads inside rows
        given = {n: x.transpose(1, 2).contiguous().transpose(1, 2) if n in "QKV" else x for n, x in given.items()}
    program = plan(rewritten)
    schedules = candidates(program, Device.of("cuda"), sizes)
    run = module(emit(program, schedules[min(choice, len(schedules) - 1)])).run
    poison = torch.full((1 << 24,), float("nan"), device="cuda")
    del poison
    (out,) = run(*given.values(), **sizes)
    torch.cuda.synchronize()
    reference = interpret(plain, {n: x.cpu() for n, x in given.items()}, {})["O"]
    error = relative_error(out, reference)
    allowed = 1.5 * math_error(case, given, reference)
    assert error <= allowed, f"{case.name} {shape} {sizes}: error {error:.3g}, allowed {allowed:.3g}"


def math_error(case: Case, x: dict[str, Tensor], reference: Tensor) -> float:
    """The error of PyTorch's math attention on these inputs, with the case's mask as an argument where it can take
    one; a score it cannot express is charged plain attention's error on the same Q, K and V."""
    q, k, v = x["Q"], x["K"], x["V"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
        causal = bool(case.domain)
        square = causal and q.shape[2] == k.shape[2]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=square, enable_gqa=True)
        exact = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), is_causal=square, enable_gqa=True
        )
    return relative_error(out, exact.cpu())


@pytest.mark.parametrize(("dtype", "width"), [
    (d, w) for d in ("bf16", "f16", "f32") for w in (32, 64, 80, 96, 128, 256) if (d, w) != ("f32", 256)
])  # fmt: skip
@pytest.mark.parametrize("case", [FULL, CAUSAL], ids=lambda c: c.name)
def test_widths_and_dtypes(case: Case, width: int, dtype: str) -> None:
    check(case, {"B": 2, "P": 333, "M": 333}, dtype=dtype, h=4, g=2, e=width, f=width)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_variants(case: Case) -> None:
    check(case, {"B": 2, "P": 301, "M": 419}, dtype="bf16", h=8, g=2, e=64, f=64)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 700), (17, 1), (129, 63), (64, 64), (1000, 1000)])
@pytest.mark.parametrize("case", [FULL, CAUSAL], ids=lambda c: c.name)
def test_lengths(case: Case, sizes: tuple[int, int]) -> None:
    check(case, {"B": 3, "P": sizes[0], "M": sizes[1]}, dtype="f16", h=6, g=2, e=64, f=32)


def test_strides_of_models() -> None:
    check(CAUSAL, {"B": 2, "P": 257, "M": 257}, contiguous=False, dtype="bf16", h=8, g=8, e=64, f=64)


@pytest.mark.parametrize("choice", [0, 1, 2, 3, 6, 9])
def test_schedules(choice: int) -> None:
    check(CAUSAL, {"B": 1, "P": 555, "M": 555}, choice=choice, dtype="bf16", h=4, g=1, e=128, f=128)
