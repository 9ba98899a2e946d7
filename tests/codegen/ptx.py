"""Arithmetic in inline assembly, evaluated: what a block of PTX makes of its operands.

Comes in: the text of a block that `inline_asm_elementwise` has, and a tile as a warpgroup's threads hold the scores.
Goes out: the tile that it makes. Powers and reciprocals are exact here, and results below float32's least normal number
are 0, as `ftz` has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["evaluated", "is_arithmetic"]

TINY = torch.finfo(torch.float32).tiny


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < TINY, torch.zeros_like(x), x)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "min.NaN.f32": torch.minimum,
    "ex2.approx.ftz.f32": lambda x: _flushed(torch.exp2(x)),
    "rcp.approx.ftz.f32": lambda x: _flushed(torch.reciprocal(_flushed(x))),
    "add.f32": torch.add,
    "mul.f32": torch.mul,
    "fma.rn.f32": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
}


def is_arithmetic(text: str) -> bool:
    """Whether a text is a block with registers of its own and nothing else than `OPERATIONS`."""
    head, *lines = _instructions(text)
    return head.startswith("{ .reg .f32 ") and all(line.split(" ", 1)[0] in OPERATIONS for line in lines)


def evaluated(text: str, x: Tensor, pack: int) -> Tensor:
    """The block on a tile `x` [64, n], each time of `pack` of the elements that a thread holds in a row: of two rows
    eight apart it has two neighbours, then the same eight columns on."""
    n = x.shape[1]
    held = x.reshape(4, 2, 8, n // 8, 4, 2).permute(0, 2, 4, 3, 1, 5)  # warps, lanes; a thread's columns, rows, pairs
    groups = held.reshape(128, -1, pack)
    made = torch.stack(_block(text, list(groups.unbind(-1)), pack), -1)
    return made.reshape(4, 8, 4, n // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, n)


def _block(text: str, operands: list[Tensor], results: int) -> list[Tensor]:
    found = {f"${results + i}": x for i, x in enumerate(operands)}
    for line in _instructions(text)[1:]:
        name, rest = line.split(" ", 1)
        to, *given = (x.strip() for x in rest.split(","))
        found[to] = OPERATIONS[name](*(_value(x, found) for x in given))
    return [found[f"${i}"] for i in range(results)]


def _value(name: str, found: dict[str, Tensor]) -> Tensor:
    if literal := re.fullmatch(r"0f([0-9A-Fa-f]{8})", name):
        bits = torch.tensor(int(literal[1], 16), dtype=torch.int64).to(torch.int32)
        return bits.view(torch.float32)
    return found[name]


def _instructions(text: str) -> list[str]:
    return [line.strip() for line in text.strip().removesuffix("}").split(";") if line.strip()]
