"""Gradients as Hopper kernels: executed by the simulator against the interpreter in float64, compiled without a GPU."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from einscade.codegen import gluon
from einscade.codegen.gluon_form import Form, nest_form
from einscade.codegen.gluon_frame import IMPORTS
from einscade.codegen.gluon_program import emit, schedules
from einscade.codegen.gluon_rows import row_sum
from einscade.codegen.gluon_spread import spread
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.compiler.gradients import scan_free
from einscade.ir.device import H200
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import Gradient, differentiate
from einscade.passes.pipeline import run
from einscade.runtime.candidates import MOST_SCHEDULES
from tests.codegen.cascades import CASES, DTYPES, Case, inputs, relative_error, text
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits, compiled, iterations
from tests.codegen.gluon_simulator import Misuse, Simulator
from tests.codegen.test_gluon_simulated import SYNCHRONISES, without

BY_NAME = {c.name: c for c in CASES}
NAMES = [n for n in BY_NAME if n != "sink"]
BY_NAME["long documents"] = Case(
    "long", domain="m <= p & D[b,p] == E[b,m]", extra=(("D[b,p]: i64", "long:3"), ("E[b,m]: i64", "long:3"))
)
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


@functools.lru_cache(maxsize=8)
def worked(
    name: str, shape: tuple[tuple[str, Any], ...], sizes: tuple[tuple[str, int], ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs of a case's gradient, the same for every schedule, and the exact results."""
    gradient, _ = program(name, shape)
    torch.manual_seed(len(name) + dict(sizes)["P"])
    given = example(gradient, name, dict(shape), dict(sizes))
    named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
    return given, interpret(gradient.cascade, named, {n: s for n, s in sizes if n in gradient.cascade.symbols})


@functools.cache
def of_kind(loops: LoopProgram, kind: str) -> list[Schedule]:
    """The schedules whose nests are loops of their own ("ordered"), or which add up a sum of programs: one iteration
    after the other, or with the next scores ahead."""
    found = [replace(s, ahead=kind == "ahead") for s in schedules(loops) if s.unordered == (kind != "ordered")]
    return [s for s in dict.fromkeys(found) if kind != "ahead" or fits(loops, s)]


def fits(loops: LoopProgram, schedule: Schedule) -> bool:
    try:
        emit(loops, schedule)
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [(NARROW, (1, 1)), (NARROW, (150, 333)), (WIDE, (150, 200)), (GROUPED, (200, 77))],
    ids=["64-one", "64", "128", "96x80"],
)
@pytest.mark.parametrize("kind", ["ordered", "unordered", "ahead"])
@pytest.mark.parametrize("name", NAMES)
def test_right_in_any_order(name: str, shape: dict[str, Any], lengths: tuple[int, int], kind: str) -> None:
    _, loops = program(name, tuple(shape.items()))
    if not (space := of_kind(loops, kind)):
        pytest.skip("no tile for a sum over programs")
    assert_right(name, shape, lengths, space[len(name) % len(space)])


@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=["64", "128"])
def test_columns_of_64_bits_come_as_two_words(shape: dict[str, Any]) -> None:
    _, loops = program("long documents", tuple(shape.items()))
    for kind in ("ordered", "unordered"):
        schedule = of_kind(loops, kind)[0]
        assert "_reinterpret(gl.int64, [STEP" in emit(loops, schedule).text
        assert_right("long documents", shape, (150, 200), schedule)


def assert_right(
    name: str, shape: dict[str, Any], lengths: tuple[int, int], schedule: Schedule, device: str = "simulator"
) -> None:
    """Error against float64 at most three times that of rounding the exact gradients: weights are rounded, too."""
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1 if device == "simulator" else 2, "P": lengths[0], "M": lengths[1]}
    given, expected = worked(name, tuple(shape.items()), tuple(sizes.items()))
    cotangent = next(x for t, x in zip(gradient.cascade.inputs, given, strict=True) if t.name == "dO")
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    source = emit(loops, schedule)
    if device == "simulator":
        found = Simulator(len(name)).load(source.text).run(*given, **used)
    else:
        found = module(source).run(*(x.to(device) for x in given), **used)
    for output, value in zip(gradient.cascade.outputs, found, strict=True):
        exact = expected[output]
        rounding = relative_error(exact.to(value.dtype), exact)
        scale = exact.norm() + 1e-2 * cotangent.double().norm()  # a gradient that cancels keeps its terms' rounding
        assert (value.double().cpu() - exact).norm() <= 3 * max(rounding, 2**-10) * scale, (output, schedule)


# -- compiled without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", NARROW), ("causal", WIDE), ("window", WIDE), ("slopes", WIDE), ("documents", WIDE),
        ("softcap", WIDE), ("sigmoid", NARROW), ("causal", GROUPED),
    ],
)  # fmt: skip
def test_compiles(name: str, shape: dict[str, Any]) -> None:
    """For Hopper, in the background, without spills (but of three registers, outside of the loops)."""
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1, "P": 300, "M": 300}
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    made = module(emit(loops, next(s for s in schedules(loops) if not s.unordered)))
    for shared, report, _ in compiled(made, example(gradient, name, shape, sizes), used).values():
        assert shared <= 227 << 10
        assert "serialized" not in report
        assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= 12, report  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("full", WIDE, "unordered"), ("causal", WIDE, "unordered"), ("documents", WIDE, "unordered"),
        ("long documents", WIDE, "unordered"),
        ("slopes", WIDE, "unordered"),
        ("causal", {**WIDE, "h": 8}, "unordered"), ("documents", {**WIDE, "h": 8}, "unordered"),
        ("full", NARROW, "ahead"), ("causal", NARROW, "ahead"), ("documents", NARROW, "ahead"),
        ("causal", {**NARROW, "h": 8}, "ahead"),
        ("softcap", WIDE, "unordered"), ("softcap", {**WIDE, "dtype": "f16", "h": 8}, "unordered"),
        ("sigmoid", WIDE, "unordered"), ("softcap", NARROW, "unordered"), ("sigmoid", NARROW, "unordered"),
    ],
)  # fmt: skip
def test_a_sum_over_programs_compiles(name: str, shape: dict[str, Any], kind: str) -> None:
    """As above; what is spilled is read again in every iteration, but nearly all of it written before the loops. Masks
    are behind a branch, not conditional instructions of every iteration. Parts of the sum are stored 16 bytes wide."""
    gradient, loops = program(name, tuple(shape.items()))
    sizes = {"B": 1, "P": 300, "M": 300}
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    made = module(emit(loops, of_kind(loops, kind)[0]))
    kernels = compiled(made, example(gradient, name, shape, sizes), used)
    for shared, report, assembly in kernels.values():
        assert shared <= 227 << 10
        assert "serialized" not in report
        assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= 256, report  # type: ignore[index]
        assert not re.search(r"@!?P\d+ FSEL", assembly)
    (kernel,) = (k for name, k in kernels.items() if name.startswith("kernel"))
    assert kernel[2].count("STS.128") >= 2 * 64 // 8  # both warpgroups store 64 columns, in the loop and after it
    found = iterations(kernel.assembly, "UTMAREDG")
    assert len(found) >= 2  # a warpgroup's are its own
    if (name, kind) in (("causal", "unordered"), ("slopes", "unordered")):
        for loop in found:
            assert_columns_are_read_before_the_part_is_stored(loop)
    if (name, kind) != ("full", "ahead"):  # where it was slower
        for loop in found:
            assert_fences_wait_with_products(loop)


def assert_fences_wait_with_products(loop: list[str]) -> None:
    """In an iteration as it was assembled, products are issued between what is stored and the fence that waits for it;
    and between a fence and the copy engine's addition all warps meet."""
    letters = {"STS.": "S", "STSM": "S", "FENC": "F", "HGMM": "H", "BAR.": "B", "UTMAREDG": "U"}
    names = [re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in loop]
    order = "".join(letter for n in names for start, letter in letters.items() if n.startswith(start))
    assert order.count("F") == 2, order  # the part's, and the weights'
    assert not re.search("SB*F", order + order), order
    assert order.count("U") == 1, order
    assert re.search("F[^FS]*B[^FS]*$", order + order[: order.index("U")]), order


def assert_columns_are_read_before_the_part_is_stored(loop: list[str]) -> None:
    names = [re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in loop]
    stores = names.index("STS.128")
    assert names[:stores].count("LDS.64") >= 8  # 16 values a thread
    assert names[:stores].index("LDS.64") > names.index("HGMMA.64x64x16.F32.BF16")


@pytest.mark.parametrize(
    ("name", "first"),
    [("causal", True), ("slopes", True), ("full", False), ("documents", False), ("softcap", False), ("boolean", False)],
)
def test_columns_values_are_read_before_the_part_is_stored(name: str, first: bool) -> None:
    """Those that the weights need; where all tiles are masked, none are, the domain is a list, or more than the weights
    is held for dS, behind it."""
    _, loops = program(name, tuple(WIDE.items()))
    step = emit(loops, of_kind(loops, "unordered")[0]).text.split("def step")[1].split("return")[0]
    score, stored, read = (step.index(x) for x in ("_rows, ", "part_tile.index(group)._reinterpret", ".load(COLUMN"))
    assert score < min(stored, read)
    assert (read < stored) == first


def test_the_gradient_of_a_bias_is_a_triton_kernel_beside_them() -> None:
    """What sums over the batch with a tile of queries and keys has no Hopper kernel, which costs the others nothing."""
    forward = scan_free(parse_cascade(text(BY_NAME["additive"], **NARROW)), "exact")
    gradient = differentiate(forward)
    loops = plan(run(gradient.cascade, "exact").cascade)
    made = module(emit(loops, schedules(loops)[0]))
    sizes = {"B": 2, "P": 300, "M": 300}
    launched: list[tuple[int, ...]] = []
    made.additive_gradient_kernel1 = type(
        "Kernel", (), {"__getitem__": lambda self, grid: lambda *given, **options: launched.append(grid)}
    )()
    used = {n: s for n, s in sizes.items() if n in loops.cascade.symbols}
    for shared, _, _ in compiled(made, example(gradient, "additive", NARROW, sizes), used).values():
        assert shared <= 227 << 10
    assert launched == [(5 * 5 * 2,)]


@pytest.mark.parametrize("heads", [2, 8])
def test_whole_tiles_have_a_loop_without_masks(heads: int) -> None:
    """Where the domain has none. Every iteration is in one of two loops, in order; masks have those of the last tile,
    which may end within, and all where the program lacks rows."""
    _, loops = program("full", tuple({**WIDE, "h": heads}.items()))
    text, members = emit(loops, next(s for s in schedules(loops) if s.unordered)).text, heads // 2
    text = text[text.index("    edge = ") :]
    edge, inside = (re.findall(rf"^    {x} = (.*)$", text, re.MULTILINE)[0] for x in ("edge", "inside"))
    ranges = re.findall(r"^        for iteration in range\((.*)\):$", text, re.MULTILINE)
    assert re.findall(r"\b(True|False),\s+group\)", text) == ["True", "False"]
    for first, tiles, row, rows in itertools.product((0, 2), range(1, 6), (0, 128), (128, 200, 256)):
        known: dict[str, Any] = {"first": first, "end": first + tiles, "row": torch.tensor(row), "M": rows, "gl": torch}
        known["edge"] = eval(edge, known)
        known["inside"] = int(eval(inside, known))
        seen = [(i, whole) for turn in (0, 1) for whole, x in enumerate(ranges)
                for i in eval(f"range({x})", known | {"turn": turn})]  # fmt: skip
        count = tiles * members
        assert seen == [(i, int(i >= members and row + 128 <= rows)) for i in range(count)]


def test_narrow_rows_issue_the_next_scores_ahead() -> None:
    for shape, expected in ((NARROW, [True, False]), (WIDE, [False])):
        _, loops = program("causal", tuple(shape.items()))
        assert [s.ahead for s in schedules(loops) if s.unordered] == expected
    _, loops = program("causal", tuple({**NARROW, "h": 8}.items()))
    assert [s.ahead for s in schedules(loops)[:3]] == [True, True, False]


# -- groups -----------------------------------------------------------------------------------------------------------

HEADS = {**WIDE, "h": 8}
GROUPS = [
    ("causal", {**NARROW, "h": 6, "g": 2}, (150, 333)), ("window", {**NARROW, "h": 5, "g": 1}, (200, 77)),
    ("softcap", {**WIDE, "h": 3, "g": 1}, (77, 130)), ("full", {**WIDE, "h": 2, "g": 1}, (1, 140)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "whole"), [("causal", True), ("slopes", False), ("documents", False)])
def test_a_program_has_all_members_of_a_group(name: str, whole: bool) -> None:
    """Then no head's sums go to memory; but not where what stays, or the list of tiles, may differ."""
    _, loops = program(name, tuple(HEADS.items()))
    tried = schedules(loops)
    assert {(s.grouped, s.unordered) for s in tried} == {(g, u) for g in {False, whole} for u in (False, True)}
    for schedule in tried:
        assert ("def slices_" not in emit(loops, schedule).text) == schedule.grouped


@pytest.mark.parametrize(("name", "shape", "lengths"), GROUPS)
def test_groups_are_right(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    """Of any number of members, with three warpgroups too, and where programs visit no tile."""
    _, loops = program(name, tuple(shape.items()))
    tried = [s for s in schedules(loops) if s.grouped]
    for schedule in {s.unordered: s for s in reversed(tried)}.values():
        assert_right(name, shape, lengths, schedule)


def test_a_result_of_each_member_goes_to_memory() -> None:
    gradient, _ = program("causal", tuple(HEADS.items()))
    asked = replace(gradient.cascade, outputs=(*gradient.cascade.outputs, "dKe"))
    assert not any(s.grouped for s in schedules(plan(run(asked, "exact").cascade)))


@pytest.mark.parametrize(
    ("batch", "length", "first"),
    [(1, 4096, [False]), (3, 4096, [False, True]), (16, 4096, [True, False]), (4, 16384, [False, True])],
    ids=["idle", "uneven", "many", "long"],
)
def test_which_groups_have_a_program_for_each_member(batch: int, length: int, first: list[bool]) -> None:
    """Few ones: groups alone are 64, 192 and 1024 programs of 4096 rows for 132 processors. And long ones, of which the
    cache does not hold all members' rows. Among as many schedules as are tried are both."""
    _, loops = program("causal", tuple(HEADS.items()))
    tried = schedules(loops, H200, {"B": batch, "P": length, "M": length})[: MOST_SCHEDULES["gluon"]]
    for unordered in (True, False):
        assert [s.grouped for s in tried if s.unordered == unordered][: len(first)] == first


# -- a sum over programs ----------------------------------------------------------------------------------------------


def forms(name: str, shape: dict[str, Any]) -> tuple[Form, Form]:
    """The loops of a gradient: of the queries' rows, and of the keys'."""
    _, loops = program(name, tuple(shape.items()))
    queries, keys = (nest_form(loops.cascade, nest) for nest in loops.serial_nests)
    return queries, keys


@pytest.mark.parametrize("name", ["full", "causal", "softcap", "documents"])
def test_the_queries_gradient_is_a_sum_of_the_keys_programs(name: str) -> None:
    queries, keys = forms(name, WIDE)
    found = spread(queries, keys)
    assert found is not None
    assert found.weights == keys.sums[0].weights
    assert found.values == keys.products[0].still
    assert found.result == queries.written[0]
    assert float(found.number) == 1
    assert spread(keys, queries) is None  # two sums are not one


def test_what_has_other_points_or_values_is_no_sum_of_programs() -> None:
    queries, keys = forms("causal", WIDE)
    every, _ = forms("full", WIDE)
    assert spread(every, keys) is None
    assert spread(queries, replace(keys, batch=())) is None
    other = [replace(s, expr=2 * s.expr + 1) if s.name == queries.sums[0].weights else s for s in queries.statements]
    assert spread(replace(queries, statements=tuple(other)), keys) is None
    twice = [replace(s, expr=2 * s.expr) if s.name == queries.sums[0].weights else s for s in queries.statements]
    found = spread(replace(queries, statements=tuple(twice)), keys)
    assert found is not None
    assert float(found.number) == 2


LINEAR = """cascade c(Q[b,p,e]: bf16, K[b,m,e]: bf16, V[b,m,f]: bf16) -> O[b,p,f]: bf16
  where b < 64, p < 1024, m < 1024, e < 64, f < 64
  S[b,p,m] = sum(e) Q[b,p,e] * K[b,m,e]  if m <= p
  O[b,p,f]: bf16 = sum(m) S[b,p,m] * V[b,m,f]
"""


def test_products_that_are_weights_as_they_are_have_loops_of_their_own() -> None:
    """Their points beyond the last row would have to be masked by a statement after them."""
    loops = plan(run(differentiate(parse_cascade(LINEAR)).cascade, "exact").cascade)
    queries, keys, _ = (nest_form(loops.cascade, nest) for nest in loops.serial_nests)
    assert queries.sums[0].weights in queries.scores
    assert spread(queries, keys) is None
    assert len(schedules(loops, H200, {})) > 0


def test_a_row_beyond_the_last_adds_nothing() -> None:
    """Its scores are those of a key of zeros, whose weight overflows where all scores are far below 0."""
    gradient, loops = program("full", tuple(WIDE.items()))
    given = example(gradient, "full", WIDE, {"B": 1, "P": 64, "M": 5})
    named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
    named["K"] = torch.ones_like(named["K"])
    named["Q"] = torch.full_like(named["Q"], -20)  # scores of -20 * sqrt(128)
    named["L"] = torch.full_like(named["L"], -20 * 128**0.5 + math.log(5))
    expected = interpret(gradient.cascade, named, {"B": 1, "P": 64, "M": 5})
    schedule = next(s for s in schedules(loops) if s.unordered)
    found = Simulator(0).load(emit(loops, schedule).text).run(*named.values(), B=1, P=64, M=5)
    for output, value in zip(gradient.cascade.outputs, found, strict=True):
        assert value.isfinite().all()
        scale = expected[output].norm() + 1e-2 * named["dO"].double().norm()
        assert (value.double() - expected[output]).norm() <= 3 * 2**-9 * scale, output


def reshaped(old: str, new: str) -> tuple[Gradient, LoopProgram, list[Tensor]]:
    """The gradient of causal attention of one head with another text, its loops and inputs; 150 queries, 77 keys."""
    spelled = text(BY_NAME["causal"], **{**NARROW, "h": 1, "g": 1}).replace("b,g,", "b,h,").replace("h // 1", "h")
    spelled = spelled if new else spelled.replace("b < B, h < 1, g < 1, ", "")
    gradient = differentiate(scan_free(parse_cascade(spelled.replace(old, new)), "exact"))
    extents = {"b": 1, "h": 1, "p": 150, "m": 77, "e": 64, "f": 64}
    values = {t.name: torch.randn([extents[r] for r in t.ranks]).bfloat16() for t in gradient.forward.inputs}
    made = interpret(gradient.forward, values, {})
    values |= {n: made[n].to(DTYPES[gradient.forward.tensors[n].dtype]) for n in gradient.saved}
    values |= {gradient.cotangents["O"]: torch.randn(made["O"].shape).bfloat16()}
    return gradient, plan(run(gradient.cascade, "exact").cascade), [values[t.name] for t in gradient.cascade.inputs]


ONE_SIDED = """
cascade c(
    Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16, A[b,m]: bool, B[b,p]: bool, L[b]: i64
) -> O[b,h,p,f]: bf16
  where b < 1, h < 2, p < P, m < M, e < 64, f < 64
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] if {}
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
ONE_SIDED_DOMAINS = ("A[b,m]", "A[b,m] & m <= p", "B[b,p]", "m < L[b]", "p >= 3")


def one_sided(domain: str) -> tuple[LoopProgram, dict[str, Tensor], Callable[[Sequence[Tensor]], None]]:
    """The loops of a gradient under a condition on keys or queries alone, their inputs, and a check of results; 400
    positions."""
    torch.manual_seed(0)
    gradient = differentiate(scan_free(parse_cascade(ONE_SIDED.format(domain)), "exact"), ["Q", "K", "V"])
    masks = (torch.rand(1, 400) < 0.7, torch.rand(1, 400) < 0.7, torch.tensor([300]))
    inputs = [*(torch.randn(1, 2, 400, 64).bfloat16() for _ in "QKV"), *masks]
    values = {t.name: x for t, x in zip(gradient.forward.inputs, inputs, strict=True)}
    made = interpret(gradient.forward, values, {})
    values |= {n: made[n].to(DTYPES[gradient.forward.tensors[n].dtype]) for n in gradient.saved}
    values[gradient.cotangents["O"]] = torch.randn(made["O"].shape).bfloat16()
    given = {t.name: values[t.name] for t in gradient.cascade.inputs}
    expected = interpret(gradient.cascade, given, {})

    def check(found: Sequence[Tensor]) -> None:
        for output, value in zip(gradient.cascade.outputs, found, strict=True):
            assert relative_error(value.cpu(), expected[output]) <= 3 * 2**-9, output

    return plan(run(gradient.cascade, "exact").cascade), given, check


@pytest.mark.parametrize(
    ("domain", "unordered"),
    [*((d, True) for d in ONE_SIDED_DOMAINS if "B" not in d), *((d, False) for d in ONE_SIDED_DOMAINS)],
)
def test_conditions_on_keys_or_queries_alone_hold_in_whole_tiles_too(domain: str, unordered: bool) -> None:
    loops, given, check = one_sided(domain)
    schedule = next(s for s in schedules(loops) if s.unordered == unordered)
    check(Simulator(0).load(emit(loops, schedule).text).run(*given.values(), P=400, M=400))


@pytest.mark.parametrize(("old", "new"), [("b,h,", ""), ("p,e]", "e,p]")], ids=["one head", "width before rows"])
def test_a_sum_over_programs_is_rounded_in_any_shape(old: str, new: str) -> None:
    torch.manual_seed(0)
    gradient, loops, given = reshaped(old, new)
    named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
    sizes = {n: {"B": 1, "P": 150, "M": 77}[n] for n in gradient.cascade.symbols}
    expected = interpret(gradient.cascade, named, {})
    kernels = emit(loops, next(s for s in schedules(loops) if s.unordered))
    found = Simulator(0).load(kernels.text).run(*given, **sizes)
    for output, value in zip(gradient.cascade.outputs, found, strict=True):
        assert relative_error(value, expected[output]) <= 3 * 2**-9, output


VIEWED = """cascade c(Q[b,g,p,e]: bf16, K[b,i,m,e]: bf16, V[b,i,m,f]: bf16) -> O[b,h,i,p,f]: bf16
  where b < 2, h < 2, i < 2, g < 4, p < 150, m < 77, e < 64, f < 64
  S[b,h,i,p,m] = sum(e) Q[b,2*h + i,p,e] * K[b,i,m,e] * 0.125   if m <= p
  G[b,h,i,p] = max(m) S[b,h,i,p,m]
  W[b,h,i,p,m] = exp(S[b,h,i,p,m] - G[b,h,i,p])
  Z[b,h,i,p] = sum(m) W[b,h,i,p,m]
  N[b,h,i,p,f] = sum(m) W[b,h,i,p,m] * V[b,i,m,f]
  O[b,h,i,p,f]: bf16 = N[b,h,i,p,f] / Z[b,h,i,p]  if Z[b,h,i,p] != 0
"""


@pytest.mark.parametrize("unordered", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_heads_that_are_groups_and_members(view: bool, unordered: bool) -> None:
    """The kernel writes the gradient of queries over both, of which the result is a view where they are one rank."""
    spelled = VIEWED if view else VIEWED.replace("b,g,p", "b,h,i,p").replace("2*h + i", "h,i").replace(" g < 4,", "")
    gradient = differentiate(scan_free(parse_cascade(spelled), "exact"))
    loops = plan(run(gradient.cascade, "exact").cascade)
    torch.manual_seed(0)
    extents = {r.name: int(r.extent) for r in gradient.forward.ranks}
    values = {t.name: torch.randn([extents[r] for r in t.ranks]).bfloat16() for t in gradient.forward.inputs}
    made = interpret(gradient.forward, values, {})
    values |= {n: made[n].to(DTYPES[gradient.forward.tensors[n].dtype]) for n in gradient.saved}
    values |= {gradient.cotangents["O"]: torch.randn(made["O"].shape).bfloat16()}
    given = {t.name: values[t.name] for t in gradient.cascade.inputs}
    source = emit(loops, next(s for s in schedules(loops) if s.unordered == unordered)).text
    assert (".flatten(1, 2)" in source.splitlines()[-1]) == view
    found = Simulator(0).load(source).run(*given.values())
    expected = interpret(gradient.cascade, given, {})
    for output, value in zip(gradient.cascade.outputs, found, strict=True):
        assert value.shape == expected[output].shape
        assert relative_error(value, expected[output]) <= 3 * 2**-9, output


@pytest.mark.parametrize("old", ["p,e]", "m,e]", "m,f]"])
def test_what_the_copy_engine_cannot_write_has_no_kernel(old: str) -> None:
    """It would write to a copy: rows of a tile are runs in memory."""
    _, loops, _ = reshaped(old, f"{old[2]},{old[0]}]")
    with pytest.raises(Unsupported, match="not innermost"):
        emit(loops, next(s for s in schedules(loops) if not s.unordered))


@pytest.mark.parametrize("name", ["causal", "window", "documents", "sigmoid"])
def test_a_row_sum_sets_the_sum_to_zero(name: str) -> None:
    """In more rows than a tile, and the counter of places of resident programs. Where a gradient has no statistic of
    its rows, the host does."""
    torch.manual_seed(0)
    shape = {**NARROW, "h": 1, "g": 1}
    _, loops = program(name, tuple(shape.items()))
    schedule = replace(of_kind(loops, "unordered")[0], resident=2 if name in ("window", "documents") else 0)
    text = emit(loops, schedule).text
    holds = holding(name, shape, [{"B": 2, "P": 300, "M": 300}])
    assert holds(text, 0)
    stores = re.findall(r"gl\.store\(\w+ \+ place, .*\)\n", text)
    assert len(stores) == {"window": 2, "sigmoid": 0}.get(name, 1)
    assert text.count("torch.zeros") == (name == "sigmoid")
    for line in stores:
        assert not holds(text.replace(line, "pass\n"), 0), line


def holding(name: str, shape: dict[str, Any], several: list[dict[str, int]]) -> Callable[[str, int], bool]:
    """Whether a module's text, by a seed of the order of events, computes a gradient at all of these sizes: several
    tiles of the loop, say, and one."""
    gradient, _ = program(name, tuple(shape.items()))
    cases = []
    for sizes in several:
        given = example(gradient, name, shape, sizes)
        named = {t.name: x for t, x in zip(gradient.cascade.inputs, given, strict=True)}
        cases.append((given, sizes, interpret(gradient.cascade, named, sizes)))

    def holds(changed: str, seed: int) -> bool:
        try:
            found = [(Simulator(seed).load(changed).run(*given, **sizes), exact) for given, sizes, exact in cases]
        except (Misuse, TypeError):
            return False
        pairs = [(x, exact[o]) for made, exact in found for o, x in zip(gradient.cascade.outputs, made, strict=True)]
        return all(relative_error(x, exact) <= 2**-6 for x, exact in pairs)

    return holds


@pytest.mark.parametrize("kind", ["unordered", "ahead"])
def test_every_synchronisation_is_missed(kind: str) -> None:
    """Of the lines of a kernel with a sum of its programs that synchronise, none can go, but for one that another says
    enough of: the second ring's tiles are handed back before the first's."""
    torch.manual_seed(0)
    shape = {**NARROW, "h": 1, "g": 1}
    _, loops = program("causal", tuple(shape.items()))
    source = emit(loops, of_kind(loops, kind)[0]).text
    holds = holding("causal", shape, [{"B": 1, "P": 400, "M": 150}, {"B": 1, "P": 60, "M": 60}])
    assert all(holds(source, seed) for seed in range(8))
    text = source.split("\n")
    lines = [i for i, line in enumerate(text) if SYNCHRONISES.match(line) and "wait(X3_empty" not in line]
    assert len(lines) > 20
    for line in lines:
        assert not all(holds(without(source, line), seed) for seed in range(60)), text[line]


@pytest.mark.parametrize("kind", ["unordered", "ahead"])
def test_a_fence_behind_the_copy_is_too_late(kind: str) -> None:
    """In every order of events, whenever the copy engine begins."""
    shape = {**NARROW, "h": 1, "g": 1}
    gradient, loops = program("causal", tuple(shape.items()))
    sizes = {"B": 1, "P": 400, "M": 150}
    given = example(gradient, "causal", shape, sizes)
    source = emit(loops, of_kind(loops, kind)[0]).text
    sent = r"( +fence_async_shared\(\)\n)( +gl\.thread_barrier\(\)\n.*\n.*\n.*add_tile.*\n)"
    changed, count = re.subn(sent, r"\2\1", source)
    assert count >= 2  # in the loop and after it
    for seed in range(4):
        with pytest.raises(Misuse, match="without a fence"):
            Simulator(seed).load(changed).run(*given, **sizes)


# -- sums along rows --------------------------------------------------------------------------------------------------

ROWS = """cascade rows(X[b,h,p,d]: f16, Y[b,p,h,d]: f16) -> S[b,h,p]: f32
  where b < B, h < 3, p < P, d < {width}
  S[b,h,p] = sum(d) {expr}
"""


@pytest.mark.parametrize(
    ("width", "expr"), [(80, "-X[b,h,p,d] * Y[b,p,h,d]"), (8, "0.5 * X[b,h,p,d]**2"), (200, "X[b,h,p,d]")]
)
def test_sums_along_rows(width: int, expr: str) -> None:
    """Of tensors with any strides, against float64."""
    torch.manual_seed(width)
    cascade = parse_cascade(ROWS.format(width=width, expr=expr))
    found = row_sum(cascade, cascade.body[0])
    assert found is not None
    codes = {"X": "X", "Y": "Y"}
    body = [*found.launch("rows", "S", codes, "X.device", {}), "return S"]
    text = "\n".join([IMPORTS, found.kernel("rows", {}), "def run(X, Y, B, P):", *("    " + line for line in body)])
    x = torch.randn(2, 37, 3, width).half().transpose(1, 2)
    y = torch.randn(2, 37, 3, 2 * width).half()[..., ::2]
    expected = interpret(cascade, {"X": x, "Y": y}, {"B": 2, "P": 37})["S"]
    assert relative_error(Simulator(0).load(text).run(x, y, 2, 37), expected) < 1e-6


@pytest.mark.parametrize("expr", ["exp(X[b,h,p,d])", "X[b,h,p,d] + Y[b,p,h,d]", "X[b,h,0,d]", "Y[b,p,h,d]   if d <= p"])
def test_what_is_no_sum_of_products_along_rows(expr: str) -> None:
    cascade = parse_cascade(ROWS.format(width=64, expr=expr))
    assert row_sum(cascade, cascade.body[0]) is None


def test_the_forward_pass_that_saves_compiles() -> None:
    gradient, _ = program("causal", tuple(WIDE.items()))
    loops = plan(run(gradient.forward, "exact").cascade)
    values = inputs(gradient.forward, BY_NAME["causal"], {"B": 1, "P": 300, "M": 300})
    made = module(gluon.emit(loops, gluon.schedules(loops)[0]))
    assert_fits(made, list(values.values()), {"B": 1, "P": 300, "M": 300})


# -- on a GPU ---------------------------------------------------------------------------------------------------------


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [(NARROW, (1, 1)), (NARROW, (300, 77)), (WIDE, (333, 333)), (WIDE, (77, 300)), (GROUPED, (150, 200))],
    ids=["64-one", "64", "128", "128-short", "96x80"],
)
@pytest.mark.parametrize("name", NAMES)
def test_right(name: str, lengths: tuple[int, int], shape: dict[str, Any]) -> None:
    """Every schedule's kernels on the device, to the bound of the simulated ones."""
    for schedule in schedules(program(name, tuple(shape.items()))[1]):
        assert_right(name, shape, lengths, schedule, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(("name", "shape", "lengths"), GROUPS)
def test_groups_are_right_on_the_device(name: str, shape: dict[str, Any], lengths: tuple[int, int]) -> None:
    for schedule in [s for s in schedules(program(name, tuple(shape.items()))[1]) if s.grouped]:
        assert_right(name, shape, lengths, schedule, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("domain", ONE_SIDED_DOMAINS)
def test_conditions_on_keys_or_queries_alone_are_right(domain: str) -> None:
    """Every schedule's kernels on the device."""
    loops, given, check = one_sided(domain)
    on_device = [x.cuda() for x in given.values()]
    for schedule in schedules(loops):
        check(module(emit(loops, schedule)).run(*on_device, P=400, M=400))
