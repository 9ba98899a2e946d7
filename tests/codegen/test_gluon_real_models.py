"""Gluon kernels of what real models have and textbook cascades lack: more ranks of a batch, masks that add a dtype's
least number. Executed by the simulator against the interpreter in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einscade.codegen.gluon_program import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.compiler.gradients import scan_free
from einscade.ir import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from einscade.runtime.candidates import MOST_SCHEDULES
from tests.codegen.cascades import DTYPES, relative_error
from tests.codegen.gluon_simulator import Simulator

WINDOWS = """cascade windows(
    Q[{ranks},p,e]: bf16, K[{ranks},m,e]: bf16, V[{ranks},m,f]: bf16{more}
  ) -> O[{ranks},p,f]: bf16
  where x < 1, y < 2, z < 3, p < P, m < M, e < 64, f < 64
  S[{ranks},p,m] = sum(e) 0.125 * Q[{ranks},p,e] * K[{ranks},m,e] {domain}
  C[{ranks},p,m] = {score}
  G[{ranks},p] = max(m) C[{ranks},p,m]
  W[{ranks},p,m] = exp(C[{ranks},p,m] - G[{ranks},p])
  Z[{ranks},p] = sum(m) W[{ranks},p,m]
  O[{ranks},p,f]: bf16 = sum(m) W[{ranks},p,m] * V[{ranks},m,f] / Z[{ranks},p]
"""


def windows(ranks: str = "x,y,z", score: str = "S[{ranks},p,m]", more: str = "", domain: str = "") -> Cascade:
    score = score.replace("{ranks}", ranks)
    return parse_cascade(WINDOWS.format(ranks=ranks, score=score, more=more, domain=domain))


def given(cascade: Cascade, sizes: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    extents = {r.name: sizes.get(str(r.extent)) or int(r.extent) for r in cascade.ranks}
    shapes = {t: [extents[r] for r in t.ranks] for t in cascade.inputs}
    dtypes = {**DTYPES, "bool": torch.bool}
    return {t.name: torch.randn(shape, generator=generator).to(dtypes[t.dtype]) for t, shape in shapes.items()}


def gradients(forward: Cascade, x: dict[str, Tensor]) -> tuple[Cascade, dict[str, Tensor]]:
    """The differentiated cascade, and its inputs."""
    gradient = differentiate(scan_free(forward, "exact"), ["Q", "K", "V"])
    x = dict(zip((t.name for t in gradient.forward.inputs), x.values(), strict=True))
    saved = interpret(gradient.forward, x)
    kept = {n: saved[n].to(DTYPES[gradient.forward.tensors[n].dtype]) for n in gradient.saved}
    generator = torch.Generator().manual_seed(2)
    cotangents = {
        c: torch.randn(saved[o].shape, generator=generator).bfloat16() for o, c in gradient.cotangents.items()
    }
    return gradient.cascade, {t.name: (x | kept | cotangents)[t.name] for t in gradient.cascade.inputs}


def assert_right(plain: Cascade, x: dict[str, Tensor], sizes: dict[str, int], keys: int | None = None) -> None:
    """Under every schedule that may be tried, or those with so many keys in a tile: at most three times the rounding of
    the exact results."""
    loops: LoopProgram = plan(run(plain, "exact").cascade)
    exact = interpret(plain, x)
    tried = [s for s in schedules(loops) if keys in (None, dict(s.tiles).get("M0"))]
    assert tried
    for schedule in dict.fromkeys(tried[: 2 * MOST_SCHEDULES["gluon"]]):
        text = emit(loops, schedule).text
        found = Simulator(1).load(text).run(*x.values(), **{n: sizes[n] for n in loops.cascade.symbols if n in sizes})
        for name, value in zip(plain.outputs, found, strict=True):
            rounding = relative_error(exact[name].to(value.dtype), exact[name])
            assert relative_error(value, exact[name]) <= 3 * max(rounding, 2**-10), (name, schedule)


@pytest.mark.parametrize("domain", ["", "if m <= p"], ids=["full", "causal"])
def test_ranks_of_a_batch_are_no_names_of_the_text(domain: str) -> None:
    """Loops of the text count with names of their own: the third rank of a batch is called i."""
    forward, sizes = windows(domain=domain), {"P": 150, "M": 150}
    x = given(forward, sizes)
    assert_right(forward, x, sizes)
    gradient, values = gradients(forward, x)
    assert_right(gradient, values, sizes)


@pytest.mark.parametrize("keys", [64, 128])
def test_a_boolean_for_each_key_is_a_value(keys: int) -> None:
    """As many bytes as a tile has keys: fewer than the copy engine can put side by side are read by address."""
    sizes = {"P": 150, "M": 200}
    forward = windows("x,y", "S[{ranks},p,m] + Where(A[x,m], 0, -30000)", ", A[x,m]: bool")
    x = given(forward, sizes)
    assert_right(forward, x | {"A": (torch.arange(200) % 3 > 0)[None]}, sizes, keys)


@pytest.mark.parametrize("index", ["p,m", "0,m"])
def test_rows_of_nothing_but_the_least_number(index: str) -> None:
    """All keys weigh the same there. Half of the others are masked so, the first tile of keys of some rows whole."""
    sizes = {"P": 150, "M": 200}
    forward = windows("x,y", f"S[{{ranks}},p,m] + A[{index}]", ", A[p,m]: bf16")
    x = given(forward, sizes)
    gone = torch.rand(150, 200, generator=torch.Generator().manual_seed(3)) < 0.5
    gone[::5] = True
    gone[3::5, :130] = True
    x["A"] = torch.where(gone, torch.finfo(torch.bfloat16).min, 0.0).bfloat16()
    assert_right(forward, x, sizes)
