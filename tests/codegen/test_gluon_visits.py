"""The lists of tiles of a Gluon kernel: every tile that holds a point is on its list, once, last tile first, and a tile
without a mask holds nothing but points; for sorted and for shuffled data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from einscade.codegen.gluon import emit, schedules
from einscade.codegen.gluon_visits import UNIT
from einscade.codegen.loops import LoopProgram, plan
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite
from tests.codegen.cascades import relative_error
from tests.codegen.generated import module
from tests.codegen.gluon_offline import assert_fits
from tests.codegen.gluon_simulator import GRID_WAIT, Misuse, Simulator

TEXT = """cascade some(Q[b,h,p,e]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16{extra}) -> O[b,h,p,f]: bf16
  where b < B, h < 2, p < P, m < M, e < 64, f < 64
  S[b,h,p,m] = sum(e) 0.125 * Q[b,h,p,e] * K[b,h,m,e]   if {domain}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""

P, M = 330, 500
SIZES = {"B": 2, "P": P, "M": M}
p, m = torch.arange(P)[:, None], torch.arange(M)


@dataclass(frozen=True)
class Domain:
    """A condition as text, the inputs that it reads, each with the end of its values, and the points that it keeps.
    `unit`: what integers are multiples of."""

    text: str
    extra: tuple[tuple[str, int], ...]
    kept: Callable[..., Tensor]
    unit: int = 1


DOMAINS = {
    "documents": Domain("D[b,p] == E[b,m]", (("D[b,p]: i32", 8), ("E[b,m]: i32", 8)),
                        lambda d, e: d[:, :, None] == e[:, None]),
    "causal documents": Domain("D[b,p] == E[b,m] & m <= p", (("D[b,p]: i32", 8), ("E[b,m]: i32", 8)),
                               lambda d, e: (d[:, :, None] == e[:, None]) & (m <= p)),
    "documents of 64 bits": Domain("D[b,p] == E[b,m]", (("D[b,p]: i64", 8), ("E[b,m]: i64", 8)),
                                   lambda d, e: d[:, :, None] == e[:, None], 2**32),
    "padding": Domain("There[b,m]", (("There[b,m]: bool", 2),), lambda x: x[:, None].expand(2, P, M)),
    "lengths": Domain("m < Length[b] & m <= p", (("Length[b]: i64", 300),),
                      lambda x: (m < x[:, None, None]) & (m <= p)),
    "positions": Domain("At[p] - m < 70 & m <= At[p]", (("At[p]: i32", 300),),
                        lambda x: ((x[:, None] - m < 70) & (m <= x[:, None])).expand(2, P, M)),
    "a window and a sink": Domain("m < 3 & m <= p | p - m < 20 & m <= p", (),
                                  lambda: ((m <= p) & ((m < 3) | (p - m < 20))).expand(2, P, M)),
    "others": Domain("~(D[b,p] == E[b,m])", (("D[b,p]: i32", 8), ("E[b,m]: i32", 8)),
                     lambda d, e: d[:, :, None] != e[:, None]),
}  # fmt: skip


def textbook(name: str) -> Cascade:
    domain = DOMAINS[name]
    return parse_cascade(TEXT.format(domain=domain.text, extra="".join(f", {x}" for x, _ in domain.extra)))


@functools.cache
def program(name: str) -> LoopProgram:
    return plan(rewrite(textbook(name), "exact").cascade)


def made(name: str, ordered: bool) -> list[Tensor]:
    """Inputs; integers and booleans sorted, or not."""
    random = torch.Generator().manual_seed(len(name))
    shapes = {"b": 2, "h": 2, "p": P, "m": M, "e": 64, "f": 64}
    given = []
    high = {x.split("[")[0]: n for x, n in DOMAINS[name].extra}
    for t in textbook(name).inputs:
        shape = [shapes[r] for r in t.ranks]
        if t.dtype == "bf16":
            given.append(torch.randn(shape, generator=random).bfloat16())
            continue
        x = torch.randint(0, high[t.name], shape, generator=random)
        x = (x.sort(-1).values if ordered else x) * DOMAINS[name].unit
        given.append(x.to({"bool": torch.bool, "i32": torch.int32, "i64": torch.int64}[t.dtype]))
    return given


class _Kept:
    """A kernel (None: one that does nothing) that keeps the tensors it was launched with."""

    def __init__(self, kernel: Any, kept: list[Tensor]) -> None:
        self.kernel, self.kept = kernel, kept

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.kept.extend(x for x in arguments if isinstance(x, Tensor))
            if self.kernel is not None:
                self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("name", DOMAINS)
def test_lists(name: str, ordered: bool) -> None:
    loops = program(name)
    given = made(name, ordered)
    points = DOMAINS[name].kept(*given[3:])
    for schedule in schedules(loops):
        rows, step = schedule.tile("p") or 0, schedule.tile("M0") or 0
        lists = listed(emit(loops, schedule).text, given, step)
        row_tiles = -(-P // rows)
        for i, entries in enumerate(lists):
            batch = points if len(lists) == row_tiles else points[i // row_tiles][None]
            row = i % row_tiles * rows
            begins = [at for at, _ in entries]
            assert all(above - below >= step for above, below in itertools.pairwise(begins))
            assert len({x % step for x in begins}) == 1
            covered = torch.zeros(M, dtype=torch.bool)
            for at, masked in entries:
                covered[at : at + step] = True
                here = batch[:, row : row + rows, at : at + step]
                assert masked or (here.all() and here.shape[-1] == step)
            assert not batch[:, row : row + rows, ~covered].any()


def listed(
    text: str, given: list[Tensor], step: int, sizes: Mapping[str, int] = SIZES
) -> list[list[tuple[int, bool]]]:
    """The lists that a module makes: where tiles begin, and whether they are masked. `step`: the tile of columns."""
    space = Simulator().load(text)
    kept: list[Tensor] = []
    tiles = -(-sizes["M"] // step)
    space.run.__globals__["list_tiles"] = _Kept(space.list_tiles, kept)
    space.run.__globals__["kernel"] = _Kept(None, [])
    space.run(*given, **sizes)
    visits = next(x for x in kept if x.dim() == 2 and x.dtype == torch.int32 and x.shape[1] == tiles + 1)
    unit = UNIT if "shift" in text else step
    lists = [row[1 : 1 + int(row[0])].tolist() for row in visits]
    return [[(x // 2 * unit, x % 2 > 0) for x in entries] for entries in lists]


@pytest.mark.parametrize("ordered", [True, False], ids=["sorted", "shuffled"])
@pytest.mark.parametrize("name", DOMAINS)
def test_what_follows_the_list_is_right(name: str, ordered: bool) -> None:
    given = made(name, ordered)
    plain = textbook(name)
    exact = interpret(plain, dict(zip((t.name for t in plain.inputs), given, strict=True)), {})["O"]
    loops = program(name)
    (out,) = Simulator(len(name)).load(emit(loops, schedules(loops)[0]).text).run(*given, **SIZES)
    assert relative_error(out, exact) <= 3 * relative_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("name", ["padding", "lengths", "documents"])
def test_no_points_at_all(name: str) -> None:
    """Every row is empty: 0, and one tile visited by each tile of rows."""
    given = made(name, ordered=True)
    nothing = {"padding": [0], "lengths": [0], "documents": [1, 2]}[name]
    given[3:] = [torch.full_like(x, value) for x, value in zip(given[3:], nothing, strict=True)]
    loops = program(name)
    schedule = schedules(loops)[0]
    text = emit(loops, schedule).text
    assert all(len(entries) == 1 for entries in listed(text, given, schedule.tile("M0") or 0))
    (out,) = Simulator(1).load(text).run(*given, **SIZES)
    assert not out.any()


def test_the_kernel_behind_a_list_waits_for_it() -> None:
    """Before it touches memory. If it touched none, what waits for it would still wait for the list."""
    text = emit(program("documents"), schedules(program("documents"))[0]).text
    assert text.count(GRID_WAIT) == 1
    given = made("documents", True)
    with pytest.raises(Misuse, match="before the kernel in front of this one has ended"):
        Simulator(0).load(text.replace(GRID_WAIT, "mov.u32 $0, 0;")).run(*given, **SIZES)
    simulator = Simulator(0)
    simulator.launch(lambda: None, (1,), (), 4, False)
    with pytest.raises(Misuse, match="a program ends"):
        simulator.launch(lambda: None, (1,), (), 4, True)


def test_sorted_documents_visit_little() -> None:
    """What it is for: of packed documents, each tile of rows visits the tiles of its own documents."""
    loops = program("documents")
    schedule = next(x for x in schedules(loops) if x.tile("M0") == 64)
    lists = listed(emit(loops, schedule).text, made("documents", ordered=True), 64)
    everything = -(-P // (schedule.tile("p") or 0)) * -(-M // (schedule.tile("M0") or 0)) * 2
    assert sum(map(len, lists)) < 0.6 * everything


@pytest.mark.parametrize("name", ["documents", "documents of 64 bits", "padding"])
@pytest.mark.parametrize("length", [700, 20000], ids=["read at once", "read in parts"])
def test_lists_begin_where_points_do(name: str, length: int) -> None:
    """Documents, and padding in front, at any place: no more tiles than their columns fill."""
    loops = program(name)
    random = torch.Generator().manual_seed(length)
    begin, middle = (torch.randint(2, length // 3, (2, 1), generator=random) for _ in range(2))
    unit = DOMAINS[name].unit
    at, dtype = torch.arange(length), torch.int64 if unit > 1 else torch.int32
    columns = (at >= begin).to(dtype) + (at >= begin + middle).to(dtype)
    if name == "padding":
        given, wanted = [columns > 0], [length - begin] * 2
    else:
        rows = torch.stack([(torch.arange(P) >= 200).to(columns.dtype) + 1] * 2)
        given, wanted = [rows * unit, columns * unit], [middle, length - begin - middle]
    moving = [torch.zeros(2, 2, n, 64, dtype=torch.bfloat16) for n in (P, length, length)]
    for schedule in schedules(loops):
        step, tile = schedule.tile("M0") or 0, schedule.tile("p") or 0
        lists = listed(emit(loops, schedule).text, [*moving, *given], step, {"B": 2, "P": P, "M": length})
        row_tiles = -(-P // tile)
        for i, entries in enumerate(lists):
            batch, row = divmod(i, row_tiles)
            ends = row * tile, min(P, row * tile + tile) - 1
            if name == "padding" or (ends[0] < 200) == (ends[1] < 200):
                most = -(-(int(wanted[int(ends[0] >= 200)][batch]) + UNIT - 1) // step)
                assert len(entries) <= most
                assert sum(masked for _, masked in entries) <= 2


@pytest.mark.parametrize("name", DOMAINS)
def test_fits_on_chip(name: str) -> None:
    loops = program(name)
    assert_fits(module(emit(loops, schedules(loops)[0])), made(name, ordered=True), SIZES)


@pytest.mark.parametrize("domain", ["m <= p", "m <= p & p - m < 99", "m <= p | m < 50", "Mask[b,p,m]"])
def test_what_needs_no_list_has_none(domain: str) -> None:
    extra = ", Mask[b,p,m]: bool" if "Mask" in domain else ""
    loops = plan(rewrite(parse_cascade(TEXT.format(domain=domain, extra=extra)), "exact").cascade)
    assert "list_tiles" not in emit(loops, schedules(loops)[0]).text
