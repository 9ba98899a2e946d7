"""Quantize: store a tensor in few bits with a scale per block, and let the scales out of contractions.

Comes in: a cascade and a tensor of it. Goes out: the same cascade reading `Round(x / scale)` (integers, in a quantized
layout) times `scale`, with `scale` an Einsum of its own. A scale that lacks the contracted ranks leaves the sum by
distributivity, so that Q·K becomes a sum of integer products times two scales; one that does not lack them stays
inside, which is a contraction over dequantized values. Approximate: |x - scale * Round(x / scale)| <= scale / 2.
(SageAttention, arXiv 2410.02367: queries and keys by block; KIVI, arXiv 2402.02750: keys by channel.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import sympy

from einscade.ir import (
    Access,
    Cascade,
    Einsum,
    Expr,
    FloorDiv,
    Layout,
    Rank,
    Reduction,
    Round,
    Tensor,
    Where,
    ceil_div,
    var,
)
from einscade.passes.rewrite import NotApplicable
from einscade.passes.statements import Names, merge_pointwise, redirect, release, wide

__all__ = ["Quantize"]

_STORAGE = {4: "i4", 8: "i8"}


@dataclass(frozen=True)
class Quantize:
    """Quantize `tensor` symmetrically to `bits` bits.

    `group` says which points share a scale: pairs of one of the tensor's ranks and how many neighbours along it (0:
    all). A rank that is not named has a scale for each of its points. `(("m", 64), ("e", 0))` is a scale for every 64
    keys, `(("m", 0),)` one for every channel.
    """

    tensor: str
    group: tuple[tuple[str, int], ...]
    bits: int = 8
    name: ClassVar[str] = "quantize"
    identity: ClassVar[str] = (
        "x ≈ s * round(x / s), s = max|x| / (2^(bits-1) - 1) over a group; sum(e) s * y = s * sum(e) y"
    )
    exact: ClassVar[bool] = False
    error: ClassVar[str] = "relative Frobenius error of the outputs against the cascade before"

    def __post_init__(self) -> None:
        if self.bits not in _STORAGE:
            raise ValueError(
                f"Quantize: bits={self.bits}; integers are stored in {' or '.join(map(str, _STORAGE))} bits"
            )
        for rank, span in self.group:
            if span < 0:
                raise ValueError(f"Quantize: group {rank}={span}; give a number of neighbours, or 0 for all")

    def apply(self, cascade: Cascade) -> Cascade:
        tensor = cascade.tensors.get(self.tensor)
        if tensor is None or not all(rank in tensor.ranks for rank, _ in self.group):
            raise NotApplicable(f"no tensor {self.tensor} with ranks {', '.join(r for r, _ in self.group)}")
        if tensor.layout.kind == "quantized":
            raise NotApplicable(f"{self.tensor} is quantized already")
        users = tuple(cascade.users(self.tensor))
        if not users:
            raise NotApplicable(f"nothing reads {self.tensor}")
        cascade, made, scales = self._encode(cascade, tensor)
        integers = made[-1].output

        def decoded(access: Access) -> Expr:
            return Access(integers.name, *access.index) * scales(access) if access.tensor == tensor.name else access

        first = min(cascade.body.index(user) for user in users)
        known = cascade.replace(body=(*cascade.body[:first], *made, *cascade.body[first:]))
        names = Names(known)
        rest = (release(redirect(s, decoded), names, known) if s in users else (s,) for s in cascade.body[first:])
        result = cascade.replace(body=(*cascade.body[:first], *made, *chain.from_iterable(rest)))
        for user in users:  # Where the other operand's scale left before, one product of both.
            result = merge_pointwise(result, user.name)
        return result

    def _encode(self, cascade: Cascade, tensor: Tensor) -> tuple[Cascade, tuple[Einsum, ...], _Scales]:
        """The statements that make scales and integers, in a cascade that has their ranks."""
        names, spans = Names(cascade), dict(self.group)
        blocks, inside, kept = {}, {}, []
        for rank in tensor.ranks:
            extent = cascade.extent(rank)
            if spans.get(rank, 1) > 1:
                blocks[rank] = Rank(names(f"{rank}b"), ceil_div(extent, spans[rank]), origin=rank)
                inside[rank] = Rank(names(f"{rank}u"), sympy.Integer(spans[rank]), origin=rank)
                kept.append(blocks[rank].name)
            elif spans.get(rank) != 0:
                kept.append(rank)
        largest = Tensor(names(f"{self.tensor}max"), tuple(kept), wide(tensor.dtype))
        scale = Tensor(names(f"{self.tensor}scale"), tuple(kept), wide(tensor.dtype))
        group = ",".join(f"{rank}:{span or '*'}" for rank, span in self.group)
        layout = Layout("quantized", (("bits", self.bits), ("group", group), ("scales", scale.name)))
        integers = Tensor(names(f"{self.tensor}int"), tensor.ranks, _STORAGE[self.bits], layout)

        at = {rank: var(blocks[rank].name) * spans[rank] + var(inside[rank].name) for rank in blocks}
        member = tensor(*(at.get(rank, var(rank)) for rank in tensor.ranks))
        # A block that the extent cuts short has points that do not exist.
        domain = sympy.And(*(at[rank] < cascade.extent(rank) for rank in blocks))
        reduced = tuple(inside[r].name if r in inside else r for r in tensor.ranks if r in inside or spans.get(r) == 0)
        scales = _Scales(scale, tensor.ranks, tuple(self.group))
        made = (
            Einsum(largest, sympy.Abs(member), Reduction("max", reduced) if reduced else None, domain),
            # A group of zeros has scale 1, so that no quotient is 0 / 0.
            Einsum(scale, Where(largest() > 0, largest() / (2 ** (self.bits - 1) - 1), 1)),
            Einsum(integers, Round(tensor() / scales(tensor()))),
        )
        return cascade.replace(ranks=(*cascade.ranks, *blocks.values(), *inside.values())), made, scales


@dataclass(frozen=True)
class _Scales:
    """The scale tensor, and which element of it belongs to an access of the quantized tensor."""

    tensor: Tensor
    ranks: tuple[str, ...]
    group: tuple[tuple[str, int], ...]

    def __call__(self, access: Access) -> Access:
        spans = dict(self.group)
        points = zip(self.ranks, access.index, strict=True)
        return Access(self.tensor.name, *(FloorDiv(i, spans.get(r, 1)) for r, i in points if spans.get(r) != 0))
