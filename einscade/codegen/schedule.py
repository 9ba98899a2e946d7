"""Schedules: the tile sizes and launch parameters of a loop program. (Candidates and their cost model: `candidates`.)"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How a loop program runs.

    tiles: extents of tiles, by grid rank (`p`) or by the symbol of a serial tile (`M0`), as sorted pairs. A grid rank
        without one is a batch dimension (torch) or one point a program (Triton).
    warps, stages: a Triton program's warps, and the depth of its loop's software pipeline.
    out_order: for an output, its ranks in memory order, outermost first; outputs not named are in rank order.
    target: what the kernel is compiled for, "cuda:90", "hip:gfx942", "cpu".
    descriptors: read tiles through tensor descriptors (TMA) where strides allow.
    """

    tiles: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 2
    out_order: tuple[tuple[str, tuple[str, ...]], ...] = ()
    target: str = "cpu"
    descriptors: bool = False

    def tile(self, name: str) -> int | None:
        return dict(self.tiles).get(name)
