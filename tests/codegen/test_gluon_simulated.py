"""Generated Hopper kernels, executed by the simulator in many orders of events, against the interpreter in float64;
and the simulator itself: kernels with a synchronisation taken out do not pass."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.loops import plan
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.gluon_simulator import Deadlock, Misuse, Simulator

BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 2, "g": 1, "e": 128, "f": 128}
ODD = {"dtype": "f16", "h": 2, "g": 2, "e": 96, "f": 80}
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}


class Example:
    """A case with inputs: its kernel under the first schedule, and what that is to compute."""

    def __init__(self, name: str, shape: dict[str, Any], sizes: dict[str, int]) -> None:
        torch.manual_seed(len(name) + sizes["P"])
        plain, rewritten = cascade(BY_NAME[name], **shape)
        program = plan(rewritten)
        self.text = emit(program, schedules(program)[0]).text
        self.given, self.sizes = inputs(plain, BY_NAME[name], sizes), sizes
        self.exact = interpret(plain, self.given, {})["O"]
        self.rounding = relative_error(self.exact.to(TORCH[str(shape["dtype"])]), self.exact)

    def holds(self, text: str, seed: int) -> bool:
        """Whether a text, in the order of events of this seed, is right to within three times the rounding of the exact
        result (weights are rounded, too)."""
        (out,) = Simulator(seed).load(text).run(*self.given.values(), **self.sizes)
        return relative_error(out, self.exact) <= 3 * self.rounding


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [(NARROW, (1, 1)), (NARROW, (130, 300)), (WIDE, (130, 300)), (ODD, (300, 77))],
    ids=["64-one", "64", "128", "96x80"],
)
@pytest.mark.parametrize("name", BY_NAME)
def test_right_in_any_order(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    example = Example(name, shape, {"B": 1, "P": lengths[0], "M": lengths[1]})
    assert example.holds(example.text, seed=len(name))


PREVIOUS = """
cascade previous(Q[c,p,e]: bf16, K[c,m,e]: bf16, V[c,m,f]: bf16, X[c], R[c,p], B[c,p,m]: bf16) -> O
  where c < C, p < P, m < M, e < 64, f < 64
  S[c,p,m] = sum(e) Q[c,p,e] * K[c - 1,m,e]   if c >= 1 & p >= 3
  T[c,p,m] = S[c,p,m] {}
  G[c,p]   = max(m) T[c,p,m]
  W[c,p,m] = exp(T[c,p,m] - G[c,p])
  Z[c,p]   = sum(m) W[c,p,m]
  N[c,p,f] = sum(m) W[c,p,m] * V[c - 1,m,f]
  O[c,p,f]: bf16 = N[c,p,f] / Z[c,p] {}   if Z[c,p] != 0
"""


@pytest.mark.parametrize(("score", "result"), [
    ("* X[c - 1]", ""), ("+ R[c - 1,p]", ""), ("+ R[c,p - 3]", ""), ("+ B[c - 1,p,m]", ""), ("+ B[c,p - 3,m]", ""),
    ("", "* R[c - 1,p - 3]"),
])  # fmt: skip
def test_an_index_leaves_its_tensor_where_no_point_exists(score: str, result: str) -> None:
    """The simulator refuses reads outside of a tensor."""
    plain = parse_cascade(PREVIOUS.format(score, result))
    program = plan(run(plain, "exact").cascade)
    sizes = {"C": 3, "P": 70, "M": 90}
    shapes = {t.name: [sizes.get(str(n := plain.extent(r))) or int(n) for r in t.ranks] for t in plain.inputs}
    given = {t.name: torch.randn(shapes[t.name]).to(TORCH.get(t.dtype, torch.float32)) for t in plain.inputs}
    (out,) = Simulator(1).load(emit(program, schedules(program)[0]).text).run(*given.values(), **sizes)
    exact = interpret(plain, given, {})["O"]
    assert relative_error(out, exact) <= 3 * relative_error(exact.to(torch.bfloat16), exact)


# -- the simulator ----------------------------------------------------------------------------------------------------

SYNCHRONISES = re.compile(
    r"^ +(mbarrier\.(wait|arrive)|fence_async_shared\(|tma\.store_wait|take_turn\(|pass_turn\(|.* = warpgroup_mma_wait)"
)


def without(text: str, line: int) -> str:
    """The module without one synchronisation; instead of waiting for products, a value that is not there yet."""
    lines = text.split("\n")
    code = lines[line].strip()
    if found := re.match(r"(.*) = warpgroup_mma_wait\(\d, deps=\[(.*)\]\)", code):
        code = f"{found[1]} = {found[2]}"
    else:
        code = "pass"
    lines[line] = lines[line][: -len(lines[line].lstrip())] + code
    return "\n".join(lines)


def test_every_synchronisation_is_missed() -> None:
    """Of the lines of a kernel that synchronise, none can go: in some order of events the result is wrong."""
    example = Example("causal_end", NARROW | {"h": 1, "g": 1}, {"B": 1, "P": 150, "M": 900})
    lines = [i for i, line in enumerate(example.text.split("\n")) if SYNCHRONISES.match(line)]
    assert len(lines) > 15
    for line in lines:

        def holds(seed: int, line: int = line) -> bool:
            try:
                return example.holds(without(example.text, line), seed)
            except (Misuse, TypeError):  # torch refuses a product in flight with the latter
                return False

        assert not all(map(holds, range(60))), example.text.split("\n")[line]


def test_a_deadlock_says_who_waits() -> None:
    example = Example("full", NARROW, {"B": 1, "P": 10, "M": 900})
    with pytest.raises(Deadlock, match=r"load \d waits for phase 0 of mbarrier 1"):
        example.holds(example.text.replace("    mbarrier.arrive(K_empty.index(stage))\n", ""), 0)
