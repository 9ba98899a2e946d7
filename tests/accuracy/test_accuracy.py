"""How exact kernels are: forward and gradients of attention written in plain PyTorch, on inputs hard on its numbers.

The bound is DESIGN.md's: error against float64 at most 1.5 times that of PyTorch's math attention on the same inputs
in the same dtype (which computes in float32 and rounds its results), or of rounding the exact result where math
attention happens to be exact; and no NaN or infinity where it has none, but for values so close to the largest number
that their rounding decides. A gradient whose terms cancel is known to what its terms are: weights that are made again
from scores, to eps of float32 times the scores' size; on tensor cores, which read them rounded, to the rounding of the
inputs' dtype. Math attention has its scores from the GPU's tensor cores too where those are compared: their sums in
float32 are shortened, which scores of some ten thousands feel. In float16 they read weights and gradients of scores,
which must be neither beyond its range nor below its least normal number: gradients of `BEYOND_F16` inputs are left to
bfloat16.

Each emitter stands alone here, and each of the library's backward calls: kernels of the others are taken out, and one
that fails is an error. On a CPU that is
tiled torch; Triton's under its interpreter (in a process of its own) and Gluon's in the simulator, on fewer inputs.
With a GPU all of them run there; gradients that Gluon has no form for run Triton's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import einscade
from einscade.codegen import gluon
from einscade.codegen.source import Source
from einscade.ir.device import H200, Device
from einscade.runtime import candidates, kernels
from einscade.runtime.candidates import Candidate
from einscade.runtime.program import Program
from tests.accuracy import variants
from tests.accuracy.variants import HOSTILE, VARIANTS, Variant

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FACTOR = 1.5
EPS = 2.0**-24
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HALVES = ("f16", "bf16")
BEYOND_F16 = ("overflowing", "denormal")
NEARLY_ALL = 1 - 2.0**-6
"""So much of a dtype's largest number stays finite when it is rounded, whatever the error within the bound."""
HEADS = 4
DRAWS = 3
LENGTHS = ((1, 1), (1, 37), (37, 1), (33, 70))
cpu = pytest.mark.skipif(INTERPRETING or torch.cuda.is_available(), reason="kernels of the other kinds are tested here")


@dataclass
class Emitter:
    """One emitter, for everything that is built while it is installed."""

    kind: str
    patch: pytest.MonkeyPatch
    folder: Path

    def __post_init__(self) -> None:
        self.patch.setenv("EINSCADE_CACHE_DIR", str(self.folder))
        self.patch.setenv("EINSCADE_AUTOTUNE", "0")
        kinds = ("gluon", "triton") if self.kind == "gluon" and torch.cuda.is_available() else (self.kind,)
        self.patch.setattr(candidates, "_emitters", lambda device: kinds)
        self.patch.setattr(candidates, "_library_form", lambda program, steps: None)
        if self.kind.startswith("library:"):
            kinds = ("gluon", "triton") if torch.cuda.is_available() else ("tiled_torch",)
            made = candidates.candidates

            def only(program: Program, *arguments: Any) -> list[Candidate]:
                """Of gradients, the library's."""
                return [c for c in made(program, *arguments) if not program.derived or c.kind == self.kind]

            self.patch.setattr(kernels, "candidates", only)
        else:
            self.patch.setattr(candidates, "_library_gradients", lambda program, device: [])
        self.patch.setattr(candidates, "_last_resorts", lambda cascade, schedule: [])
        schedules = gluon.schedules  # of its own accord it leaves small grids to the others
        self.patch.setattr(gluon, "schedules", lambda loops, device, sizes: schedules(loops))
        kernels._build.cache_clear()
        from einscade.runtime import call

        call.calls.clear()
        if self.kind in ("gluon", "triton") and not torch.cuda.is_available():
            self.patch.setattr(Device, "of", staticmethod(lambda device: H200))
        if self.kind == "gluon" and not torch.cuda.is_available():
            from tests.codegen.gluon_simulator import Simulator

            def load(source: Source, name: str) -> Any:
                return Simulator(1).load(source.text).run

            self.patch.setattr(kernels, "load", load)

    def used(self, gradients: bool | None = None) -> set[str]:
        """The kinds of the kernels; `gradients`: of those alone, or of all others."""
        from einscade.runtime.call import prepared

        made = [call for call in prepared() if gradients in (None, call.program.cascade.name.endswith("_gradient"))]
        return {k.candidate for call in made for k in call.kernels.values()}


@pytest.fixture
def emitter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Emitter:
    return Emitter(request.param, monkeypatch, tmp_path)


def inputs(variant: Variant, hostile: str, dtype: torch.dtype, lengths: tuple[int, int], width: int) -> list[Tensor]:
    p, m = lengths
    q, k, v = (torch.randn(2, HEADS, n, width, dtype=torch.float64) for n in (p, m, m))
    tensors = variant.tensors(HEADS, p, m)
    made = [*HOSTILE[hostile](q, k, v), *tensors]
    return [t.to(dtype) if t.is_floating_point() else t for t in made]


def outcome(
    function: Any, given: Sequence[Tensor], cotangent: Tensor, backward: bool, dtype: torch.dtype
) -> list[Tensor]:
    """The result and the gradients of all floating inputs, in `dtype`."""
    given = [t.detach().clone().requires_grad_(backward) if t.is_floating_point() else t for t in given]
    out = function(*given)
    if not backward:
        return [out.to(dtype)]
    out.backward(cotangent.to(out.dtype))
    return [x.detach().to(dtype) for x in (out, *(t.grad for t in given if t.is_floating_point()))]


def scores_of_tensor_cores(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """`variants.scores`, for inputs that are values of `dtype`, with the products that tensor cores make of them."""

    def scores(q: Tensor, k: Tensor) -> Tensor:
        plain = q @ k.mT
        flat = (x.detach().to(dtype).flatten(0, 1) for x in (q, k.mT))
        product = torch.bmm(*flat, out_dtype=torch.float32).view(plain.shape)
        return (plain + (product - plain.detach())) * q.shape[-1] ** -0.5  # their value, the other's gradient

    return scores


def errors(
    fast: Any, variant: Variant, given: list[Tensor], backward: bool, device: str, tensor_cores: bool
) -> list[dict[str, float]]:
    """Of the output and each gradient: squared norms of our error, math attention's, the exact values, and what
    scores made again are known to (see the top of this file)."""
    dtype = given[0].dtype
    wide, single = ([t.to(d) if t.is_floating_point() else t for t in given] for d in (torch.float64, torch.float32))
    cotangent = torch.randn(variant(*wide).shape, dtype=torch.float64).to(dtype)
    exact = outcome(variant, wide, cotangent, backward, torch.float64)
    if tensor_cores and device == "cuda":
        with mock.patch.object(variants, "scores", scores_of_tensor_cores(dtype)):
            math = outcome(variant, [t.to(device) for t in single], cotangent.to(device), backward, dtype)
    else:
        math = outcome(variant, single, cotangent, backward, dtype)
    with mock.patch.object(variants, "softmax", variants.unsubtracted):
        terms = outcome(variant, wide, cotangent, backward, torch.float64)
    again = EPS * (8 + float(variants.scores(wide[0], wide[1][:, : wide[0].shape[1]]).abs().max()))
    if tensor_cores:
        again = max(again, torch.finfo(dtype).eps / 2)
    ours = outcome(fast, [t.to(device) for t in given], cotangent.to(device), backward, dtype)
    found = []
    for i, (o, m, e, t) in enumerate(zip(ours, math, exact, terms, strict=True)):
        o, m = o.cpu().double(), m.cpu().double()
        known = (e.abs() <= NEARLY_ALL * torch.finfo(dtype).max) & m.isfinite()
        parts = {"ours": o - e, "math": m - e, "size": e, "again": again * (t.abs() + e.abs()) if i else 0 * e}
        found.append({part: float(x[known].square().sum()) for part, x in parts.items()})
    return found


def assert_exact(
    fast: Any, name: str, dtype: str, lengths: tuple[int, int], hostile: str = "normal", width: int = 16,
    backward: bool = True, device: str = "cpu", tensor_cores: bool = False, count: int = DRAWS,
) -> None:  # fmt: skip
    """The bound, on the errors of several draws together: one draw is luck where few elements decide."""
    variant, of = VARIANTS[name], DTYPES[dtype]
    draws = []
    for seed in range(count):
        torch.manual_seed(seed)
        given = inputs(variant, hostile, of, lengths, width)
        draws.append(errors(fast, variant, given, backward, device, tensor_cores))
    wrong = []
    for i, parts in enumerate(zip(*draws, strict=True)):
        total = {key: sum(part[key] for part in parts) ** 0.5 for key in parts[0]}
        bound = max(FACTOR * total["math"], torch.finfo(of).eps / 2 * total["size"], total["again"])
        if not total["ours"] <= bound:  # NaN neither
            figures = ", ".join(f"{key} {value:.2e}" for key, value in total.items())
            wrong.append(f"{f'gradient {i - 1}' if i else 'output'} of {hostile} inputs: {figures}; bound {bound:.2e}")
    assert not wrong, "\n".join(wrong)


# -- on the CPU -------------------------------------------------------------------------------------------------------


@cpu
@pytest.mark.parametrize("emitter", ["tiled_torch"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_tiled_torch(name: str, dtype: str, emitter: Emitter) -> None:
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in HOSTILE:
        assert_exact(fast, name, dtype, (67, 67), hostile)
    assert emitter.used() == {"tiled_torch"}


@cpu
@pytest.mark.parametrize("emitter", ["tiled_torch"], indirect=True)
@pytest.mark.parametrize("name", ["full", "masked", "bias", "differential"])
def test_lengths(name: str, emitter: Emitter) -> None:
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager", dynamic=True)
    for lengths in LENGTHS:
        # Few elements decide here, so there are more draws. The gradient of two softmaxes with unknown widths has no
        # tiled form yet: it runs flat.
        assert_exact(fast, name, "f32", lengths, backward=name != "differential", count=4 * DRAWS)
    assert emitter.used() == {"tiled_torch"}


@cpu
@pytest.mark.parametrize("emitter", ["library:flash"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype"), [("full", "f32"), ("grouped", "f32"), ("grouped", "f16"), ("causal", "bf16")]
)
def test_the_librarys_gradients(name: str, dtype: str, emitter: Emitter) -> None:
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in HOSTILE:
        assert_exact(fast, name, dtype, (67, 67), hostile)
    assert emitter.used(gradients=True) == {"library:flash"}


@cpu
@pytest.mark.parametrize("emitter", ["gluon"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("causal", "f16"), ("masked", "bf16"), ("window", "f16"), ("softcap", "bf16"), ("sigmoid", "f16"),
        ("distances", "bf16"),
    ],
)  # fmt: skip
def test_gluon_in_the_simulator(name: str, dtype: str, emitter: Emitter) -> None:
    """Forward: the simulator has gradients' kernels in `tests/codegen/test_gluon_gradients`."""
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in HOSTILE:
        assert_exact(fast, name, dtype, (67, 67), hostile, width=64, backward=False)
    assert emitter.used() == {"gluon"}


@cpu
@pytest.mark.long
def test_triton_under_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETING, reason="runs in the process that test_triton_under_the_interpreter starts")
@pytest.mark.parametrize("emitter", ["triton"], indirect=True)
@pytest.mark.parametrize(
    ("name", "dtype", "hostiles"),
    [
        ("sink", "f32", ("dominant", "denormal", "offset")),
        ("masked", "f16", ("dominant", "denormal", "offset")),
        ("buckets", "f16", ("dominant", "offset")),
        ("distances", "f32", ("normal", "offset")),
    ],
)
def test_triton(name: str, dtype: str, hostiles: tuple[str, ...], emitter: Emitter) -> None:
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in hostiles:
        backward = dtype != "f16" or hostile not in BEYOND_F16
        assert_exact(fast, name, dtype, (37, 37), hostile, width=16, backward=backward, tensor_cores=True)
    assert emitter.used() == {"triton"}


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("emitter", ["gluon", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu(name: str, dtype: str, emitter: Emitter) -> None:
    if emitter.kind == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in HOSTILE:
        backward = dtype != "f16" or hostile not in BEYOND_F16
        assert_exact(
            fast, name, dtype, (521, 521), hostile, width=64, backward=backward, device="cuda", tensor_cores=True
        )
    assert emitter.used(gradients=False) == {emitter.kind}
    assert emitter.used(gradients=True) <= {emitter.kind, "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("emitter", ["library:cudnn", "library:flash"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["full", "causal", "grouped"])
def test_the_librarys_gradients_on_a_gpu(name: str, dtype: str, emitter: Emitter) -> None:
    fast = einscade.optimize(VARIANTS[name].module(), inner="eager")
    for hostile in HOSTILE:
        if dtype != "f16" or hostile not in BEYOND_F16:
            assert_exact(fast, name, dtype, (521, 521), hostile, width=64, device="cuda", tensor_cores=True)
    assert emitter.used(gradients=True) == {emitter.kind}
