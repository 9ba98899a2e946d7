"""Schedules: the tile sizes and launch parameters of a loop program.

Comes in: nothing. Goes out: `Schedule`, which emitters take, and what of a device is part of one. `space` has the ones
that are worth trying.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from einscade.ir.device import Device
from einscade.ir.text import parse_expr

__all__ = ["Schedule", "has_descriptors", "target_of"]


@dataclass(frozen=True)
class Schedule:
    """How a loop program runs.

    tiles: extents of tiles, by grid rank (`p`) or by the symbol of a serial tile (`M0`), as sorted pairs. A grid rank
        without one is a batch dimension (torch) or one point a program (Triton); with several, a program has a box.
    warps, stages: a Triton program's warps, and the depth of its loop's software pipeline.
    out_order: for an output, its ranks in memory order, outermost first; outputs not named are in rank order.
    target: what the kernel is compiled for: "cuda:90", "hip:94", "cpu" (kind and compute capability).
    descriptors: read tiles through tensor descriptors (TMA) where strides allow.
    launch: further symbols (the length of a loop's parts), each with the expression over the lengths, as text, that
        `run` computes it by at every call.
    summaries: compute beforehand what data along a loop says of its tiles (`codegen.summaries`), to skip them.
    unordered: programs add to a sum in memory in whatever order they come (`codegen.gluon_spread`): not deterministic.
    ahead: where they do, the products that an iteration begins with are issued at the end of the one before
        (`codegen.gluon_ahead`): more registers.
    in_order: what a loop has several of is done one after another, with fewer registers: the products of an iteration
        (`codegen.gluon_chain`), or the passes of sums that have nothing in common (`codegen.gluon_passes`).
    grouped: a program goes through all members of a group (the heads that share keys), where all that its loop makes is
        summed over them (`codegen.gluon_group`).
    joined: a resident program issues the first scores of its next tile of rows together with the last weighted sum of
        this one (`codegen.gluon_joined`), of one pass over the loop or, in order, of several.
    anchored: the reference of a softmax stays what the first tile of a row gave it; an ordinary kernel behind this one
        does again what is lost that way (`codegen.gluon_anchored`).
    abreast: so many neighbours along the innermost batch rank have their tiles of rows dealt out together
        (`codegen.gluon_places`).
    resident: so many programs at most, each of which takes one tile of rows after another; 0: a program for each.
    """

    tiles: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 2
    out_order: tuple[tuple[str, tuple[str, ...]], ...] = ()
    target: str = "cpu"
    descriptors: bool = False
    launch: tuple[tuple[str, str], ...] = ()
    summaries: bool = False
    unordered: bool = False
    ahead: bool = False
    resident: int = 0
    in_order: bool = False
    grouped: bool = False
    joined: bool = False
    anchored: bool = False
    abreast: int = 1

    def tile(self, name: str) -> int | None:
        return dict(self.tiles).get(name)

    @property
    def settled(self) -> frozenset[str]:
        """The symbols that `run` does not take, because the schedule says what they are."""
        return frozenset(name for name, _ in (*self.tiles, *self.launch))

    @cached_property
    def multiples(self) -> Mapping[str, int]:
        """What each symbol computed at launch is a multiple of."""
        return {name: int(parse_expr(text).as_coeff_Mul()[0]) for name, text in self.launch}


def target_of(device: Device) -> str:
    """A device as a schedule's target."""
    return "cpu" if device.kind == "cpu" else f"{device.kind}:{device.capability[0]}{device.capability[1]}"


def has_descriptors(device: Device) -> bool:
    """Whether the device's copy engine reads tiles through tensor descriptors."""
    return device.kind == "cuda" and device.capability >= (9, 0)
