"""Windows whose warpgroups leave out half of an edge tile, and lists whose first tiles some leave out: right in any
order of events, every synchronisation needed, and within a Hopper GPU's resources."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_form import form
from einscade.codegen.gluon_halves import halved
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from tests.codegen import test_gluon_operands, test_gluon_visits
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import Misuse, Simulator
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

TEXT = """cascade window(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < {heads}, p < N, m < {keys}, e < {width}, f < {width}
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h,m,e]   if {domain}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""


def window(
    length: int = 256, domain: str = "m <= p & p - m < {}", keys: str = "N", width: int = 64, heads: int = 2
) -> str:
    return TEXT.format(domain=domain.format(length), keys=keys, width=width, heads=heads)


def resident(loops: LoopProgram, columns: int = 128, programs: int = 3) -> Schedule:
    """Two warpgroups, tiles of so many keys."""
    tiles = {"p": 128, str(form(loops).loop.step): columns}
    return replace(schedules(loops)[0], tiles=tuple(sorted(tiles.items())), stages=2, resident=programs)


def holds(text: str, sizes: dict[str, int]) -> Callable[[str, int], bool]:
    """Whether a changed kernel of this cascade is right in some order of events."""
    given, plain = test_gluon_operands.inputs(text, sizes), parse_cascade(text)
    loops = test_gluon_operands.program(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    return partial(_holds, given=given, sizes=passed, exact=exact)


def _holds(text: str, seed: int, **case: object) -> bool:
    try:
        return test_gluon_operands.holds(text, seed, **case)  # type: ignore[arg-type]
    except UnboundLocalError:  # of a wait that made a name
        return False


def apart(source: str) -> str:
    """The kernel without turns, which guard no data, but in which one warpgroup's waits are also the other's."""
    return re.sub(r"( +)(take|pass)_turn\(group\)", r"\1pass", source)


@pytest.mark.parametrize("length", [1, 60, 129, 200, 256], ids=str)
@pytest.mark.parametrize("n", [1, 64, 65, 129, 300, 640], ids=str)
def test_right(n: int, length: int) -> None:
    """Windows shorter than a tile, of whole tiles and not."""
    text = window(length)
    loops = test_gluon_operands.program(text)
    assert halved(form(loops), resident(loops))
    right = holds(text, {"B": 2, "N": n})
    assert all(right(emit(loops, resident(loops)).text, seed) for seed in range(2))


@pytest.mark.parametrize(
    ("domain", "keys", "expected"),
    [
        ("m <= p & p - m < {}", "N", True),
        ("m < p & p - m <= {}", "N", True),
        ("m <= p", "N", False),  # one limit
        ("m <= p & p - m < {}", "M", False),  # rows may begin behind the last key
        ("m <= p + 1 & p - m < {}", "N", False),  # the first warpgroup's rows reach into the other half
        ("(m <= p & p - m < {}) | m < 3", "N", False),
    ],
)
def test_where_it_is_known_that_a_half_is_empty(domain: str, keys: str, expected: bool) -> None:
    text = window(256, domain, keys)
    loops = test_gluon_operands.program(text)
    try:
        assert halved(form(loops), resident(loops)) == expected
    except Unsupported:
        assert not expected
        return
    assert not halved(form(loops), resident(loops, 64))
    assert not halved(form(loops), replace(resident(loops), resident=0))
    right = holds(text, {"B": 1, "N": 300, "M": 200})
    assert right(emit(loops, resident(loops)).text, 0)


def test_every_synchronisation_is_missed() -> None:
    """Where one tensor is keys and values (else waits for values say enough of the keys)."""
    text = window(200, heads=1).replace(", V[b,h,m,f]: bf16", "").replace("V[b,h,m,f]", "K[b,h,m,e]")
    text = text.replace("O[b,h,p,f]", "O[b,h,p,e]").replace(", f < 64", "")
    loops = test_gluon_operands.program(text)
    source = apart(emit(loops, resident(loops, programs=2)).text)
    cases = [holds(text, {"B": 1, "N": 600}), holds(text, {"B": 9, "N": 60})]

    def right(changed: str, seed: int) -> bool:
        return all(case(changed, seed) for case in cases)

    assert all(right(source, seed) for seed in range(4))
    text_lines = source.split("\n")
    lines = [i for i, x in enumerate(text_lines) if SYNCHRONISES.match(x)]
    assert len(lines) > 20
    assert not [text_lines[i] for i in lines if all(right(without(source, i), seed) for seed in range(40))]


@pytest.mark.parametrize("name", ["causal documents", "lengths", "positions"])
@pytest.mark.parametrize("columns", [32, 64])
def test_first_tiles_of_lists_are_left_out(name: str, columns: int) -> None:
    """One of 64 keys, or two of 32, where a warpgroup's rows end before them; none where data says where they end."""
    loops, plain = test_gluon_visits.program(name), test_gluon_visits.textbook(name)
    source = emit(loops, resident(loops, columns)).text
    assert ("begun" in source) == (name != "positions")
    for ordered in (False, True):
        given = test_gluon_visits.made(name, ordered)
        exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
        for seed in range(2):
            (out,) = Simulator(seed).load(source).run(*given, **test_gluon_visits.SIZES)
            assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)


def test_every_synchronisation_of_what_is_left_out_is_missed() -> None:
    loops, plain = test_gluon_visits.program("causal documents"), test_gluon_visits.textbook("causal documents")
    given = test_gluon_visits.made("causal documents", ordered=True)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    source = apart(emit(loops, resident(loops, 32)).text)
    text_lines = source.split("\n")
    start = next(i for i, x in enumerate(text_lines) if "while (tile" in x)
    lines = [i for i in range(start, start + 12) if SYNCHRONISES.match(text_lines[i])]
    assert len(lines) == 4

    def right(changed: str, seed: int) -> bool:
        try:
            (out,) = Simulator(seed).load(changed).run(*given, **test_gluon_visits.SIZES)
        except Misuse:
            return False
        return relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)

    assert right(source, 0)
    assert not [text_lines[i] for i in lines if all(right(without(source, i), seed) for seed in range(40))]


@pytest.mark.parametrize("width", [64, 128])
def test_fits_on_chip(width: int) -> None:
    text, sizes = window(256, width=width), {"B": 2, "N": 600}
    loops = test_gluon_operands.program(text)
    assert_fits(module(emit(loops, resident(loops))), test_gluon_operands.inputs(text, sizes), sizes)


def test_lists_fit_on_chip() -> None:
    loops = test_gluon_visits.program("causal documents")
    made = module(emit(loops, resident(loops, 64)))
    assert_fits(made, test_gluon_visits.made("causal documents", ordered=True), test_gluon_visits.SIZES)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("length", [60, 129, 256, 300], ids=str)
@pytest.mark.parametrize("n", [333, 640], ids=str)
def test_right_on_a_gpu(n: int, length: int) -> None:
    text, sizes = window(length, width=128), {"B": 2, "N": n}
    loops, given = test_gluon_operands.program(text), test_gluon_operands.inputs(text, sizes, seed=n + length)
    plain = parse_cascade(text)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    (out,) = module(emit(loops, resident(loops, programs=7))).run(*(x.cuda() for x in given), **sizes)
    assert relative_error(out.cpu(), exact) <= 3 * relative_error(exact.bfloat16(), exact)
