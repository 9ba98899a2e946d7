"""Resident programs, which take one tile of rows after another: right in any order of events, within a Hopper GPU's
resources, and chosen where loops are short."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.ir.cascade import Cascade
from einscade.ir.device import H200
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from tests.codegen import test_gluon_operands, test_gluon_visits
from tests.codegen.cascades import CASES, cascade, inputs, relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import Misuse, Simulator
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

BY_NAME = {c.name: c for c in CASES}
NARROW = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}
WIDE = {"dtype": "bf16", "h": 4, "g": 2, "e": 128, "f": 128}
JOINED = pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
TEXTS = ["two sums", "two softmaxes", "one tensor", "a bias", "biases of rows and of columns", "a mask"]


def resident(loops: LoopProgram, programs: int = 3, joined: bool = False) -> list[Schedule]:
    """The schedules of two warpgroups, and of three if tiles of rows are joined, with resident programs, where those
    fit on chip: results have a tile of their own there."""
    tried = [x for x in schedules(loops) if x.tile("p") in ((128, 192) if joined else (128,)) and not x.in_order]
    return [s for x in tried if fits(loops, s := replace(x, resident=programs, joined=joined))]


def fits(loops: LoopProgram, schedule: Schedule) -> bool:
    try:
        emit(loops, schedule)
    except Unsupported as reason:
        return "do not fit" not in str(reason)  # any other reason fails the test that asks
    return True


def right(
    plain: Cascade, loops: LoopProgram, given: list[torch.Tensor], sizes: dict[str, int], seed: int, joined: bool
) -> None:
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    tried = resident(loops, joined=joined)
    assert tried
    for schedule in tried:
        found = Simulator(seed).load(emit(loops, schedule).text).run(*given, **passed)
        for out, name in zip(found, plain.outputs, strict=True):
            assert relative_error(out, exact[name]) <= 3 * relative_error(exact[name].to(out.dtype), exact[name])


@JOINED
@pytest.mark.parametrize("lengths", [(300, 304), (500, 77), (1, 1)], ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_right(name: str, lengths: tuple[int, int], joined: bool) -> None:
    text, sizes = test_gluon_operands.TEXTS[name], {"B": 2, "P": lengths[0], "M": lengths[1]}
    given = test_gluon_operands.inputs(text, sizes)
    right(parse_cascade(text), test_gluon_operands.program(text), given, sizes, len(name), joined)


@JOINED
@pytest.mark.parametrize("name", ["full", "causal", "window", "slopes", "sink", "softcap"])
def test_cases_are_right(name: str, joined: bool) -> None:
    plain, rewritten = cascade(BY_NAME[name], **NARROW)  # type: ignore[arg-type]
    sizes = {"B": 1, "P": 300, "M": 333}
    right(plain, plan(rewritten), list(inputs(plain, BY_NAME[name], sizes).values()), sizes, len(name), joined)


@JOINED
@pytest.mark.parametrize("name", ["causal documents", "padding", "a window and a sink"])
def test_lists_are_followed(name: str, joined: bool) -> None:
    plain, loops = test_gluon_visits.textbook(name), test_gluon_visits.program(name)
    right(plain, loops, test_gluon_visits.made(name, ordered=False), test_gluon_visits.SIZES, len(name), joined)


@JOINED
def test_every_synchronisation_is_missed(joined: bool) -> None:
    """Of the lines of a resident kernel that synchronise, none can go, where one tensor is keys and values. (Values of
    their own are waited for before the next keys are loaded, and that says enough of the keys. Turns guard no data.)"""
    text = test_gluon_operands.TEXTS["one tensor"]
    plain, loops = parse_cascade(text), test_gluon_operands.program(text)
    source = emit(loops, resident(loops, 2, joined)[-1]).text
    cases = []
    for sizes in ({"B": 2, "M": 300}, {"B": 9, "M": 60}):  # several tiles of the loop, and one
        given = test_gluon_operands.inputs(text, sizes)
        exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
        cases.append((given, {s: sizes[s] for s in loops.cascade.symbols if s in sizes}, exact))

    def holds(changed: str, seed: int) -> bool:
        try:
            found = [(Simulator(seed).load(changed).run(*given, **sizes)[0], exact) for given, sizes, exact in cases]
        except (Misuse, TypeError, UnboundLocalError):
            return False
        return all(relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact) for out, exact in found)

    assert all(holds(source, seed) for seed in range(8))
    lines = [i for i, line in enumerate(source.split("\n")) if SYNCHRONISES.match(line) and "_turn(" not in line]
    assert len(lines) > 12
    for line in lines:
        assert not all(holds(without(source, line), seed) for seed in range(60)), source.split("\n")[line]


@pytest.mark.parametrize("programs", [0, 3])
@pytest.mark.parametrize("abreast", [1, 2, 4])
def test_heads_go_abreast(abreast: int, programs: int) -> None:
    """Four heads, of which two share their keys: in whatever order, all rows are computed."""
    plain, rewritten = cascade(BY_NAME["causal"], **NARROW)  # type: ignore[arg-type]
    loops, sizes = plan(rewritten), {"B": 2, "P": 300, "M": 300}
    given = inputs(plain, BY_NAME["causal"], sizes)
    schedule = replace(schedules(loops)[0], resident=programs, abreast=abreast)
    (out,) = Simulator(abreast).load(emit(loops, schedule).text).run(*given.values(), **sizes)
    exact = interpret(plain, given, {})["O"]
    assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize(
    ("domain", "counted"), [("", False), ("if m <= p", True), ("if m <= p & X[p] == X[m]", True)], ids=str
)
def test_places_are_counted_where_loops_differ(domain: str, counted: bool) -> None:
    """Else they are known beforehand, and no counter is read. What makes lists, if something does, sets it to 0."""
    documents = "X" in domain
    loops = test_gluon_operands.program(
        f"""cascade some(Q[p,e]: bf16, K[m,e]: bf16, V[m,f]: bf16{", X[n]: i32" if documents else ""}) -> O[p,f]: bf16
  where p < P, m < P, e < 64, f < 64{", n < P" if documents else ""}
  S[p,m] = sum(e) Q[p,e] * K[m,e]   {domain}
  G[p]   = max(m) S[p,m]
  W[p,m] = exp(S[p,m] - G[p])
  Z[p]   = sum(m) W[p,m]
  O[p,f]: bf16 = sum(m) W[p,m] * V[m,f] / Z[p]
"""
    )
    source = emit(loops, resident(loops)[0]).text
    assert ("gl.atomic_add(taken" in source) == counted
    assert ("torch.zeros" in source) == (counted and not documents)
    assert ("gl.store(taken + at" in source) == documents


# -- which are chosen -------------------------------------------------------------------------------------------------


def test_chosen_where_loops_are_short() -> None:
    def first(name: str, length: int) -> Schedule:
        loops = plan(cascade(BY_NAME[name], **WIDE)[1])  # type: ignore[arg-type]
        found = schedules(loops, H200, {"B": 16, "P": length, "M": length})
        return next(s for s in found if not s.anchored)  # which only residents are

    assert first("window", 8192).resident == H200.processors
    assert first("full", 512).resident == H200.processors
    assert not first("causal", 16384).resident
    assert not first("causal", 256).resident  # all tiles of rows at once


def test_joined_where_three_warpgroups_have_loops_of_different_lengths() -> None:
    """There first; for two it is there to be measured; loops of one length, and lists of tiles, have none."""

    def joined(name: str, shape: dict[str, int]) -> list[bool]:
        loops = plan(cascade(BY_NAME[name], **(shape | {"h": 32, "g": 32}))[1])  # type: ignore[arg-type]
        return [s.joined for s in schedules(loops, H200, {"B": 2, "P": 16384, "M": 16384})]

    assert joined("causal", NARROW)[0]
    assert any(joined("causal", WIDE))
    assert not joined("window", WIDE)[0]
    assert not any(joined("full", NARROW) + joined("documents", WIDE))


def test_as_many_heads_abreast_as_the_cache_holds() -> None:
    """Where loops differ in length; of windows, whose loops read little, more than of causal rows."""

    def abreast(name: str, length: int) -> int:
        loops = plan(cascade(BY_NAME[name], **(WIDE | {"h": 32, "g": 32}))[1])  # type: ignore[arg-type]
        (found,) = {s.abreast for s in schedules(loops, H200, {"B": 2, "P": length, "M": length})}
        return found

    assert abreast("full", 8192) == 1
    assert abreast("causal", 2048) > abreast("causal", 8192) >= abreast("causal", 32768) >= 1
    assert abreast("window", 8192) == 32


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["64", "128"])
@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_offered_fits(name: str, shape: dict[str, int]) -> None:
    """Also where a ring of a table leaves results no tile of their own, as dense biases do at width 128."""
    loops = plan(cascade(BY_NAME[name], **shape)[1])  # type: ignore[arg-type]
    for length in (512, 8192):
        for schedule in schedules(loops, H200, {"B": 16, "P": length, "M": length}):
            emit(loops, schedule)


def test_only_residents_are_joined() -> None:
    loops = plan(cascade(BY_NAME["full"], **NARROW)[1])  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="resident"):
        emit(loops, replace(schedules(loops)[0], joined=True))


def test_some_do_not_fit() -> None:
    loops = plan(cascade(BY_NAME["additive"], **WIDE)[1])  # type: ignore[arg-type]
    assert [s.tile("M0") for s in schedules(loops) if s.tile("p") == 128] == [64]
    assert not resident(loops)
    assert not any(s.resident for s in schedules(loops, H200, {"B": 16, "P": 8192, "M": 8192}))


# -- compiled without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "joined"),
    [
        ("causal", NARROW, False), ("causal", WIDE, True), ("window", NARROW, True), ("window", WIDE, False),
        ("documents", NARROW, False), ("documents", WIDE, True), ("softcap", NARROW, True), ("softcap", WIDE, False),
    ],
)  # fmt: skip
def test_compiles(name: str, shape: dict[str, int], joined: bool) -> None:
    plain, rewritten = cascade(BY_NAME[name], **shape)  # type: ignore[arg-type]
    loops, sizes = plan(rewritten), {"B": 2, "P": 300, "M": 304}
    given = list(inputs(plain, BY_NAME[name], sizes).values())
    assert_fits(module(emit(loops, resident(loops, joined=joined)[0])), given, sizes)


@pytest.mark.parametrize("name", ["two softmaxes", "a bias", "biases of rows and of columns"])
def test_texts_compile(name: str) -> None:
    text, sizes = test_gluon_operands.TEXTS[name], {"B": 2, "P": 300, "M": 304}
    loops = test_gluon_operands.program(text)
    passed = {s: sizes[s] for s in loops.cascade.symbols if s in sizes}
    schedule = resident(loops)[-1]
    assert_fits(module(emit(loops, schedule)), test_gluon_operands.inputs(text, sizes), passed)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize(("shape", "lengths"), [(NARROW, (500, 77)), (WIDE, (333, 333))], ids=["64", "128"])
@pytest.mark.parametrize("name", ["full", "causal", "window", "documents", "slopes", "additive"])
def test_right_on_a_gpu(name: str, shape: dict[str, int], lengths: tuple[int, int]) -> None:
    plain, rewritten = cascade(BY_NAME[name], **shape)  # type: ignore[arg-type]
    loops, sizes = plan(rewritten), {"B": 2, "P": lengths[0], "M": lengths[1]}
    given = inputs(plain, BY_NAME[name], sizes, "cuda")
    exact = interpret(plain, {n: x.cpu() for n, x in given.items()}, {})["O"]
    tried = resident(loops, 7) + resident(loops, 7, joined=True)
    if not tried:
        pytest.skip("no schedule with resident programs fits on chip")
    for schedule in tried:
        (out,) = module(emit(loops, schedule)).run(*given.values(), **sizes)
        assert relative_error(out.cpu(), exact) <= 3 * relative_error(exact.bfloat16(), exact), schedule
