"""A sum over programs in memory: where registers are in it, and the kernel that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from einscade.codegen.gluon_frame import IMPORTS
from einscade.codegen.gluon_sum import LINE, Part
from tests.codegen.gluon_simulator import Simulator

PARTS = [Part(64, 64, 2), Part(128, 64, 2), Part(64, 32, 2), Part(128, 128, 2), Part(128, 32, 2), Part(64, 128, 1)]
IDS = [f"{p.groups} of {p.step}, {p.columns} wide" for p in PARTS]


def stored(part: Part, registers: Tensor) -> Tensor:
    """What the lines that store a part leave in its tile of shared memory."""

    class Tile:
        def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: None) -> Any:
            assert (dtype, shape) == (torch.float32, [part.lines, LINE])
            return self

        def store(self, value: Tensor) -> None:
            assert list(value.shape) == [part.lines, LINE]
            found.append(value)

    found: list[Tensor] = []
    exec("\n".join(part.store("tile", "part")), {"gl": torch, "PART_TILE": None, "tile": Tile(), "part": registers})
    return found[0]


@pytest.mark.parametrize("part", PARTS, ids=IDS)
def test_a_warp_stores_a_run_of_memory(part: Part) -> None:
    """Registers as PTX has them in the accumulator of wgmma.m64nNk16. The four that a thread has of 8 columns are 16
    bytes, and those of a warp's threads 512, so that no two are on one bank."""
    row, column = torch.arange(part.rows)[:, None], torch.arange(part.columns)
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    register = column // 8 * 4 + row % 16 // 8 * 2 + column % 2
    memory = stored(part, thread).flatten()
    assert torch.equal(memory, torch.arange(128).repeat_interleave(4).repeat(part.columns // 8))
    memory = stored(part, register).view(-1, 128, 4)
    assert torch.equal(memory, torch.arange(part.columns // 2).view(-1, 1, 4).expand_as(memory))


@pytest.mark.parametrize("ranks", [("p",), ("b", "h", "p")], ids=len)
@pytest.mark.parametrize("part", PARTS, ids=IDS)
def test_what_is_stored_is_read_again(part: Part, ranks: tuple[str, ...]) -> None:
    """By the kernel that rounds, of a result that ends within a tile, in rows and in columns."""
    across = part.columns if part.step > part.rows else part.groups * part.columns
    extents, width = {"b": 2, "h": 3, "p": part.step + 40}, across - 8
    shape = [extents[r] for r in ranks]
    result = torch.full((*shape, width), torch.nan, dtype=torch.bfloat16)
    size = tuple(map(sympy.Integer, shape))
    total = torch.zeros(eval(part.shape(size)))
    expected = torch.randn(*shape[:-1], 2 * part.step, across)
    for tile in range(2):
        for group in range(part.groups):
            down, right = (group * part.rows, 0) if part.step > part.rows else (0, group * part.columns)
            at = tile * part.step + down
            values = expected[..., at : at + part.rows, right : right + part.columns]
            line = eval(part.first_line("tile"), {"tile": tile, "group": group})
            flat = [stored(part, x) for x in values.reshape(-1, part.rows, part.columns)]
            total[..., line : line + part.lines, :] = torch.stack(flat).view(*shape[:-1], part.lines, LINE)
    assert total.numel() == expected.numel()
    text = IMPORTS + part.kernel("rounded", ranks, width, sympy.Float(0.5), "bf16")
    launch = "\n".join(part.launch("rounded", "total", "result", size))
    exec(launch, {"rounded": Simulator(0).load(text).rounded, "total": total, "result": result})
    assert torch.equal(result, (0.5 * expected[..., : part.step + 40, :width]).bfloat16())
