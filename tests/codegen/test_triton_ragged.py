"""Decoding and ragged batches on Triton without a GPU: under the interpreter, compiled, and as text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from einscade.codegen.cost import Lengths
from einscade.codegen.offline import SHARED_LIMITS, compile_offline
from einscade.codegen.parts import split_rank
from einscade.codegen.space import candidates
from einscade.codegen.triton_emit import emit
from einscade.ir.device import A100, CPU, H200, MI300X, Device
from tests.codegen.ragged import CASES, Case, paged, program, schedule, textbook

TARGETS: dict[str, Device] = {"cuda:80": A100, "cuda:90": H200, "hip:gfx942": MI300X}
DECODE = {"B": 16, "P": 1, "M": 32768, "N": 1024, "C": 16384}


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@pytest.mark.long
def test_under_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    file = "tests/codegen/triton_ragged_interpreted.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["lengths", "positions", "pages_of_16", "pages_of_128"])
def test_decoding_compiles_for_every_target(name: str, target: str) -> None:
    """The model's first choice for a long decoding step: two kernels that fit, and spill nothing."""
    chosen = paged(128) if name == "pages_of_128" else case(name)
    loops = program(textbook(chosen, "bf16", (32, 8), 128), parts=True)
    best = candidates(loops, TARGETS[target], DECODE)[0]
    parts, merge = compile_offline(loops, best, target, descriptors=target == "cuda:90")
    for found in (parts, merge):
        assert found.shared <= SHARED_LIMITS[target]
        assert found.spilled is None or found.spilled <= 8  # the assembler keeps a predicate on the stack at times
    boxes = "cp.async.bulk.tensor" in parts.assembly
    assert boxes == (target == "cuda:90" and name != "pages_of_16"), "a page that a tile does not fit is no box"
    assert "cp.async.bulk.tensor" not in merge.assembly


@pytest.mark.parametrize("table", ["i32", "i64"])
@pytest.mark.parametrize(("page", "step"), [(16, 16), (64, 64), (128, 128), (128, 32), (16, 64)])
def test_pages_compile(page: int, step: int, table: str) -> None:
    """A box begins in 32 bits, whatever the table's entries have; a tile is one where it fits into a page."""
    loops = program(textbook(paged(page, table), "bf16", (32, 8), 128), parts=True)
    chosen = replace(schedule(loops, {"h": 4, "p": 1, "MS0": 16}, step, f"{step} * Max(4, N)"), stages=3)
    parts, merge = compile_offline(loops, chosen, "cuda:90", descriptors=True)
    assert max(parts.shared, merge.shared) <= SHARED_LIMITS["cuda:90"]
    assert ("cp.async.bulk.tensor" in parts.assembly) == (page % step == 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["documents", "padded", "through_a_document"])
def test_prefill_compiles_for_every_target(name: str, target: str) -> None:
    loops = program(textbook(case(name), "bf16", (8, 2), 128), parts=False)
    best = candidates(loops, TARGETS[target], {"B": 1, "P": 8192, "M": 8192})[0]
    for found in compile_offline(loops, best, target, descriptors=target == "cuda:90"):
        assert found.shared <= SHARED_LIMITS[target]
        assert found.spilled == 0


def test_gathered_keys_have_a_stage_for_the_index_and_one_for_the_key() -> None:
    def stages(name: str) -> int:
        loops = program(textbook(case(name), "bf16", (32, 8), 128), parts=True)
        return candidates(loops, H200, DECODE)[0].stages

    assert stages("pages_of_16") == 2 * stages("lengths") - 1


def test_what_is_split() -> None:
    """Few programs, or unequal ones, over a long rank; never a full machine, and never a CPU."""
    full, ragged, pages = (
        program(textbook(case(n), "bf16", (32, 8), 128), parts=False) for n in ("full", "lengths", "pages_of_16")
    )

    def rank(loops: object, device: Device = H200, **sizes: int) -> str | None:
        return split_rank(loops, device, Lengths(loops.cascade, sizes))  # type: ignore[arg-type,attr-defined]

    assert rank(full, B=1, P=1, M=131072) == "m"
    assert rank(full, B=16, P=1, M=32768) == "m"
    assert rank(full, B=1, P=64, M=131072) == "m"  # a chunk of a prompt
    assert rank(full, B=64, P=1, M=4096) is None
    assert rank(ragged, B=64, P=1, M=65536) == "m"
    assert rank(pages, B=32, P=1, N=4096, C=10**6) == "m"
    assert rank(full, B=1, P=1, M=300) is None
    assert rank(full, B=1, P=512, M=512) is None
    assert rank(full, B=2, P=8192, M=8192) is None
    assert rank(full, CPU, B=1, P=1, M=131072) is None


def test_the_number_of_parts_follows_the_lengths_at_launch() -> None:
    """One text for all lengths; the programs of a launch fill the machine a few times, and a part is whole tiles."""
    loops = program(textbook(case("full"), "bf16", (32, 8), 128), parts=True)
    best = candidates(loops, H200, {"B": 1, "P": 1, "M": 131072})[0]
    ((symbol, _),) = best.launch
    line = next(x for x in emit(loops, best).text.splitlines() if x.strip().startswith(f"{symbol} = "))
    step = dict(best.tiles)["MU0"]
    for m in (1, 1000, 32768, 131072, 500_000):
        length = eval(line.split("=", 1)[1], {}, {"B": 1, "P": 1, "M": m})
        assert length % step == 0
        assert length >= 256
        assert 8 * -(-m // length) <= 16 * H200.processors
        if m >= 131072:
            assert 8 * -(-m // length) >= 0.5 * H200.processors
    assert best.multiples == {symbol: step}


def test_parts_of_several_lengths_are_tried() -> None:
    """Of the likeliest tiles the two best lengths; the same one not twice, where the shortest is all there is."""
    loops = program(textbook(case("full"), "bf16", (32, 8), 128), parts=True)
    long, short = (candidates(loops, H200, {"B": 1, "P": 1, "M": m}) for m in (131072, 2048))
    assert len({(s.tile("MU0"), s.warps, s.stages) for s in long}) == len(long) - 2 == len(short)
    assert len({(s.tiles, s.warps, s.stages, s.launch) for s in long}) == len(long)
    assert [s.tile("MU0") for s in long[:4]] == [64, 128, 64, 128]


@pytest.mark.parametrize("b", [0, 1, 3, 16, 20])
def test_parts_are_no_more_than_a_wave_of_programs(b: int) -> None:
    """Rounded down: one program more than fits would take as long again. The merge has them in as few tiles as fit."""
    loops = program(textbook(case("full"), "bf16", (32, 8), 128), parts=True)
    for chosen in candidates(loops, H200, {"B": b, "P": 1, "M": 131072}):
        ((symbol, _),) = chosen.launch
        line = next(x for x in emit(loops, chosen).text.splitlines() if x.strip().startswith(f"{symbol} = "))
        length = eval(line.split("=", 1)[1], {}, {"B": b, "P": 1, "M": 131072})
        parts = -(-131072 // length)
        waves = [n for n in (1, 2, 3, 4, 8, 16) if 8 * b * parts <= n * H200.processors < 8 * b * (1.1 * parts + 1)]
        assert waves or parts == 1 or b == 0
        assert chosen.tile("MS0") == max(16, min(64, 1 << (parts - 1).bit_length()))

@pytest.mark.parametrize("target", TARGETS)
def test_a_merge_is_launched_before_its_parts_have_ended(target: str) -> None:
    """On NVIDIA's GPUs from Hopper on; it then waits for them before it reads or writes anything."""
    loops = program(textbook(case("full"), "bf16", (32, 8), 128), parts=True)
    best, able = candidates(loops, TARGETS[target], DECODE)[0], target == "cuda:90"
    parts, merge = compile_offline(loops, best, target, descriptors=able)
    assert parts.assembly.count("griddepcontrol.launch_dependents") == able
    assert merge.assembly.count("griddepcontrol.wait") == able
    assert "griddepcontrol.wait" not in parts.assembly
    assert "griddepcontrol.launch_dependents" not in merge.assembly
    assert not able or not re.search(r"(ld|st)\.global.*griddepcontrol", merge.assembly, re.S)
    assert emit(loops, best).text.count("launch_pdl=True") == able


def test_pages_are_boxes_where_a_tile_fits_one() -> None:
    loops = program(textbook(paged(128), "bf16", (32, 8), 128), parts=True)
    text = emit(loops, schedule(loops, {"h": 4, "p": 1}, step=64, part="64 * Max(4, N)")).text
    assert re.search(r"K_tile = K.load\(\[\w+_tile, \(mu_lo \+ L \* ms\) % 128, h_lo // 4, 0\]\)", text)
    unaligned = emit(loops, schedule(loops, {"h": 4, "p": 1}, step=64, part="Max(4, N)")).text
    assert "K.load(" not in unaligned
    assert "K_TMA" not in unaligned


def test_documents_are_found_before_they_are_visited() -> None:
    loops = program(textbook(case("documents")), parts=False)
    text = emit(loops, schedule(loops, {"p": 16}, summaries=True)).text
    assert re.search(r"(\w+)_min\[b,mt\].* = min\(mu\) \1\[b,Min\(M - 1, 16\*mt \+ mu\)\]", text)
    assert re.search(r"\w+_least = tl.min\(", text)
    assert "m_first = tl.minimum(" in text
    plain = emit(loops, schedule(loops, {"p": 16})).text
    assert "_min" not in plain.replace("tl.minimum", "").replace("_minimum", "")
