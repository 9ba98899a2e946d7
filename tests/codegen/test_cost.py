"""What the cost model says of loops: which rows share what is read, and what few rows there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from einscade.codegen.cost import Lengths, few_rows, heads_in_groups, narrow_steps, row_ranks, shared_bytes, tiled_ranks
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.offline import compile_offline
from einscade.codegen.schedule import Schedule
from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.device import A100, H200, Device
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from tests.codegen.ragged import CASES, program, textbook


def loops(heads: tuple[int, int], parts: bool = False) -> LoopProgram:
    return program(textbook(CASES[0], "bf16", heads, 64), parts)


def rows(found: LoopProgram, **sizes: int) -> dict[str, int] | None:
    return few_rows(found, Lengths(found.cascade, sizes))


def test_heads_of_a_group() -> None:
    def of(heads: tuple[int, int]) -> tuple[str, int] | None:
        found = loops(heads)
        return heads_in_groups(found.cascade, found.serial_nests[0])

    assert of((32, 8)) == ("h", 4)
    assert of((28, 4)) == ("h", 7)
    assert of((32, 32)) is None


def test_heads_that_share_one_latent_are_all_rows() -> None:
    text = """
cascade latent(Q[b,h,p,e]: bf16, C[b,m,e]: bf16) -> O
  where b < B, h < 16, p < P, m < M, e < 64
  S[b,h,p,m] = sum(e) Q[b,h,p,e] * C[b,m,e]
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,e]: bf16 = sum(m) W[b,h,p,m] * C[b,m,e] / Z[b,h,p]
"""
    found = plan(run(parse_cascade(text), "exact").cascade)
    assert few_rows(found, Lengths(found.cascade, {"B": 4, "P": 1, "M": 4096})) == {"h": 16, "p": 1}


@pytest.mark.parametrize(("p", "expected"), [(1, {"h": 4, "p": 1}), (5, {"h": 4, "p": 8}), (33, None), (8192, None)])
def test_few_rows_are_positions_times_heads(p: int, expected: dict[str, int] | None) -> None:
    assert rows(loops((32, 8)), B=4, P=p, M=4096) == expected


def test_loops_that_share_different_things_have_no_common_rows() -> None:
    """A gradient has a loop over keys and one over queries: a tile of one is none of the other."""
    cascade = textbook(CASES[0], "bf16", (4, 2), 64)
    backward = plan(run(differentiate(cascade).cascade, "exact").cascade)
    assert len(backward.serial_nests) > 1
    assert rows(backward, B=1, P=16, M=16) is None
    assert candidates(backward, H200, {"B": 1, "P": 16, "M": 16})


def test_the_merge_runs_a_point_a_program() -> None:
    found = loops((32, 8), parts=True)
    parts, merge = found.serial_nests
    tiles = {"h": 4, "p": 1}
    assert row_ranks(found.cascade, parts, tiles) == ("p", "h")
    assert row_ranks(found.cascade, merge, tiles) == ()
    for length, tile in ((4096, 16), (128, 32), (64, 64), (32, 64)):  # of 4096 keys
        assert narrow_steps(found, Lengths(found.cascade, {"L": length}), H200) == {"MS0": tile}


@pytest.mark.parametrize("sizes", [{}, {"B": 256, "P": 256, "M": 256}, {"B": 512, "P": 256, "M": 256}], ids=str)
@pytest.mark.parametrize("queries", ["b,h,p,e", "h,p,e"])
@pytest.mark.parametrize("mask", ["b,p,m", "p,m", "b,h,p,m", "b,m"])
def test_positions_are_tiled_where_a_mask_is_another_for_every_point(
    mask: str, queries: str, sizes: dict[str, int]
) -> None:
    """A tile of the batch would share nothing that the loop multiplies, however long the batch is; queries that it
    shares change nothing about that."""
    text = f"""
cascade masked(Q[{queries}]: bf16, K[b,h,m,e]: bf16, V[b,h,m,f]: bf16, A[{mask}]: bool) -> O
  where b < B, h < 4, p < P, m < M, e < 64, f < 64
  S[b,h,p,m] = sum(e) Q[{queries}] * K[b,h,m,e]   if A[{mask}]
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
    found = plan(run(parse_cascade(text), "exact").cascade)
    assert tiled_ranks(found, Lengths(found.cascade, sizes)) == ("p",)
    schedule, *_ = candidates(found, H200, sizes)
    source = emit(found, schedule).text
    assert dict(schedule.tiles)["M0"] > 1
    assert source.count("tl.dot(") == 2


SLIVERS = """
cascade recurrence(Q[b,p,e]: {0}, K[b,m,e]: {0}, X[b,m,p]: {0}, V[b,m,f]: {0}) -> O
  where b < 64, p < 128, m < 128, e < 64, f < {1}
  S[b,p,m] = sum(e) K[b,m,e] * Q[b,p,e]
  O[b,p,f]: {0} = sum(m) (X[b,m,p] + S[b,p,m]) * V[b,m,f]
"""


@pytest.mark.parametrize(("dtype", "width"), [("f32", 64), ("bf16", 16)])
def test_no_warpgroup_has_8_columns_of_a_product(dtype: str, width: int) -> None:
    """Hopper's instructions for 8 columns are not to be trusted; on other machines no warps work in groups."""
    found = plan(run(parse_cascade(SLIVERS.format(dtype, width)), "exact").cascade)

    def slivers(device: Device) -> list[Schedule]:
        tiles = [(s, dict(s.tiles)) for s in candidates(found, device, {})]
        return [s for s, t in tiles if s.warps == 8 and t["p"] == 64 and 16 in (t["M0"], width)]

    assert slivers(A100)
    assert not slivers(H200)
    for schedule in candidates(found, H200, {})[:2]:
        for kernel in compile_offline(found, schedule, "cuda:90"):
            assert "m64n8k" not in kernel.assembly


CHOSEN = """
cascade chosen(Q[b,p,e]: f16, K[b,m,e]: f16, A[b,m]: bool, X[b,m]: f16, V[b,m,f]: f16) -> O
  where b < 2, p < {0}, m < {0}, e < 128, f < 128
  S[b,p,m] = sum(e) K[b,m,e] * Q[b,p,e]
  T[b,p,m] = S[b,p,m] + {1}
  G[b,p]   = max(m) T[b,p,m]
  W[b,p,m] = exp(T[b,p,m] - G[b,p])
  Z[b,p]   = sum(m) W[b,p,m]
  O[b,p,f]: f16 = sum(m) V[b,m,f] * W[b,p,m] / Z[b,p]
"""


@pytest.mark.parametrize(
    ("length", "added", "joined"),
    [("P", "X[b,m]", False), ("293", "Where(m <= p & A[b,m], X[b,m], -65504)", True)],
)
def test_shared_memory_is_what_the_model_says(length: str, added: str, joined: bool) -> None:
    """What joins several reads is computed apart from the products, and changes its layout in shared memory: four bytes
    a point, with which three stages of tiles do not fit."""
    found = plan(run(parse_cascade(CHOSEN.format(length, added)), "exact").cascade)
    lengths = Lengths(found.cascade, {"P": 4096})

    def most(schedule: Schedule) -> int:
        return max(shared_bytes(found.cascade, n, schedule, H200, lengths) for n in found.serial_nests)

    large = Schedule((("M0", 128), ("p", 64)), 4, 3, target="cuda:90", descriptors=True)
    (kernel,) = compile_offline(found, large, "cuda:90", True)
    assert abs(most(large) - kernel.shared) <= 2 << 10
    assert (most(large) > H200.shared) == (kernel.shared > H200.shared) == joined
    tried = candidates(found, H200, {"P": 4096})
    assert any(replace(s, summaries=False) == large for s in tried) == (not joined)
    (kernel,) = compile_offline(found, tried[0], "cuda:90", True)
    assert kernel.shared - (2 << 10) <= most(tried[0]) <= H200.shared
    assert kernel.shared <= H200.shared
