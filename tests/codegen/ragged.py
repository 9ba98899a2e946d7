"""Decoding and ragged batches as cascades, with inputs for them and a way to run them in parts.

Comes in: a variant and sizes. Goes out: textbook cascades, loop programs whose key rank may be in parts, random inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.parts import with_parts
from einscade.codegen.schedule import Schedule
from einscade.ir.cascade import Cascade
from einscade.ir.expr import var
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run as rewrite
from einscade.passes.recipes import recipe
from tests.codegen.cascades import DTYPES

__all__ = ["CASES", "Case", "inputs", "paged", "program", "schedule", "textbook"]


@dataclass(frozen=True)
class Case:
    """Attention over keys that data bounds. `key`: the index of K and V without the head and width; `extra`: further
    inputs, and how to fill them (see `inputs`); `ranks`: their extents; `page`: keys in a page, if there are pages."""

    name: str
    domain: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    key: str = "b,{h},m"
    key_ranks: str = "b,g,m"
    ranks: str = ", m < M"
    score: str = "X[b,h,p,m]"
    page: int | None = None


def paged(size: int, table: str = "i32") -> Case:
    """Keys in pages of this many, found through a table of integers of that dtype."""
    return Case(
        f"pages_of_{size}", "m < len[b]", ((f"T[b,n]: {table}", "pages"), ("len[b]: i64", "lengths")),
        f"T[b,m // {size}],m % {size},{{h}}", "c,s,g", f", m < N*{size}, c < C, s < {size}, n < N", page=size,
    )  # fmt: skip


CASES = (
    Case("full"),
    Case("causal_end", "m <= p + M - P"),
    Case("lengths", "m < len[b]", (("len[b]: i32", "lengths"),)),
    Case("positions", "m <= pos[p]", (("pos[p]: i64", "positions"),)),
    Case("from_offsets", "m >= start[b,p] & m < len[b]", (("start[b,p]: i32", "offsets"), ("len[b]: i64", "lengths"))),
    Case("window_of_lengths", "m < len[b] & len[b] - m < 9", (("len[b]: i32", "lengths"),)),
    Case("padded", "there[b,m] & m <= p + M - P", (("there[b,m]: bool", "padding"),)),
    Case("documents", "m <= p & D[b,p] == E[b,m]", (("D[b,p]: i64", "documents"), ("E[b,m]: i64", "documents"))),
    Case("unordered", "D[b,p] == E[b,m]", (("D[b,p]: i32", "shuffled"), ("E[b,m]: i32", "shuffled"))),
    Case("used_or_not", "use[b] & m < len[b]", (("use[b]: bool", "bool"), ("len[b]: i32", "lengths"))),
    Case("through_a_document", "m >= off[D[b,p]] & m <= p",
         (("off[c]: i32", "boundaries"), ("D[b,p]: i64", "documents")), ranks=", m < M, c < 4"),
    Case("slopes", "m < len[b]", (("len[b]: i32", "lengths"), ("A[h]: f32", "float")),
         score="X[b,h,p,m] + A[h] * (m - len[b])"),
    Case("slots", "m < len[b]", (("T[b,m]: i64", "slots"), ("len[b]: i32", "lengths")), "T[b,m],{h}", "c,g",
         ", m < M, c < C"),
    paged(8), paged(16), paged(32, "i64"),
)  # fmt: skip


def textbook(case: Case, dtype: str = "f32", heads: tuple[int, int] = (6, 2), width: int = 16, p: str = "P") -> Cascade:
    """Softmax attention under the case's domain; `p`: the extent of the query rank."""
    h, g = heads
    head = "h" if h == g else f"h // {h // g}"
    at = case.key.format(h=head)
    declared = ["Q[b,h,p,e]", f"K[{case.key_ranks},e]", f"V[{case.key_ranks},f]"]
    given = [*(f"{d}: {dtype}" for d in declared), *(x for x, _ in case.extra)]
    groups = "" if h == g else f", g < {g}"
    if h == g:
        given = [x.replace(",g,", ",h,") for x in given]
    where = f"   if {case.domain}" if case.domain else ""
    return parse_cascade(f"""
cascade {case.name}({", ".join(given)}) -> O
  where b < B, h < {h}{groups}, p < {p}{case.ranks}, e < {width}, f < {width}
  X[b,h,p,m] = sum(e) {width**-0.5!r} * Q[b,h,p,e] * K[{at},e]
  S[b,h,p,m] = {case.score}{where}
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: {dtype} = sum(m) W[b,h,p,m] * V[{at},f] / Z[b,h,p]
""")


@functools.cache
def program(cascade: Cascade, parts: bool) -> LoopProgram:
    """The exact recipe's loops, the key rank in parts or not."""
    rewrites = with_parts(recipe("exact"), "m", "L") if parts else recipe("exact")
    return plan(rewrite(cascade, rewrites).cascade)


def schedule(
    loops: LoopProgram, rows: Mapping[str, int], step: int = 16, part: str = "16", **options: object
) -> Schedule:
    """That step for every loop, parts of a length given as text."""
    tiles = {**dict.fromkeys(tile_symbols(loops), step), **rows}
    launch = (("L", part),) if "L" in loops.cascade.symbols else ()
    return Schedule(tuple(sorted(tiles.items())), launch=launch, target="cuda:90", descriptors=True, **options)  # type: ignore[arg-type]


def inputs(cascade: Cascade, case: Case, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors. Lengths contain 0 and the whole; pages are a permutation with room to spare, and the table names
    pages that do not exist where no key is; documents are runs; a row of `offsets` may have nothing."""
    rng = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, max(low + 1, high), shape, generator=rng)

    kinds = {x.split("[")[0]: kind for x, kind in case.extra}
    keys = sizes["M"] if "M" in sizes else sizes["N"] * (case.page or 1)
    made: dict[str, Tensor] = {}
    for t in cascade.inputs:
        known = {var(s): n for s, n in sizes.items()}
        shape = tuple(int(cascade.extent(r).subs(known)) for r in t.ranks)
        kind = kinds.get(t.name, "float")
        if kind == "lengths":
            made[t.name] = whole(0, keys + 1, shape)
            made[t.name][0] = keys
            if shape[0] > 1:
                made[t.name][-1] = 0
        elif kind == "positions":
            made[t.name] = torch.arange(shape[0]) + max(0, keys // 2 - shape[0])
        elif kind == "offsets":
            made[t.name] = whole(0, keys + 4, shape)
        elif kind == "documents":
            made[t.name] = whole(-1, 3, shape).sort(-1).values.clamp_min(0)
            if not any(x.startswith("off[") for x, _ in case.extra):  # names, not numbers: any 64 bits
                made[t.name] = (made[t.name] - 1) * (2**63 - 1)
        elif kind == "shuffled":
            made[t.name] = whole(-2, 3, shape)
        elif kind == "boundaries":
            made[t.name] = whole(0, keys, shape).sort(-1).values
        elif kind == "padding":
            made[t.name] = torch.arange(keys)[None] >= whole(0, keys, (shape[0], 1))
        elif kind == "bool":
            made[t.name] = whole(0, 2, shape).bool()
        elif kind in ("pages", "slots"):
            pages = torch.randperm(sizes["C"], generator=rng)[: shape[0] * shape[1]].reshape(shape)
            made[t.name] = pages
        else:
            made[t.name] = torch.randn(shape, generator=rng).to(DTYPES[t.dtype])
        if t.dtype in ("i32", "i64"):
            made[t.name] = made[t.name].to(torch.int32 if t.dtype == "i32" else torch.int64)
    return made
