"""What generated Gluon kernels compute with, on the CPU: values, addresses, tiles of shared memory, barriers.

Comes in: torch tensors. Goes out: stand-ins for Gluon's types, which `gluon_simulator` acts on and which check
how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.codegen.gluon_simulator import Partition, Simulator


class Misuse(AssertionError):
    """The kernel did what the hardware forbids, or leaves undefined."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise Misuse(message)


class Block(torch.Tensor):
    """A value in registers; scalars are blocks without dimensions."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None, shape=list(self.shape))

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The two halves of a last dimension of two."""
        return self.unbind(-1)

    def _divide(self, other: Any, operation: Callable[..., Tensor]) -> Any:
        whole = not self.dtype.is_floating_point
        check(not whole or bool((self >= 0).all()), "an integer division of a negative number, which truncates")
        return operation(self, other)

    def __floordiv__(self, other: Any) -> Any:
        return self._divide(other, torch.floor_divide)

    def __mod__(self, other: Any) -> Any:
        return self._divide(other, torch.remainder)


def block(x: Any, dtype: torch.dtype | None = None) -> Any:
    made = x if isinstance(x, Tensor) else torch.tensor(x)
    return (made if dtype is None else made.to(dtype)).as_subclass(Block)


def scalar(x: int) -> Any:
    return block(x, torch.int32)


class ConstInt(int):
    @property
    def value(self) -> int:
        return int(self)


@dataclass(frozen=True)
class Layout:
    kind: str
    arguments: tuple[Any, ...] = ()

    @property
    def swizzle(self) -> int:
        return int(self.arguments[0])


def layout(kind: str) -> Callable[..., Layout]:
    return lambda *args: Layout(kind, tuple(tuple(a) if isinstance(a, list) else a for a in args))


@dataclass(frozen=True)
class Pointer:
    """Addresses into the storage of a tensor, in elements."""

    memory: Tensor
    offset: Any

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    @staticmethod
    def to(x: Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return Pointer(x.as_strided((size,), (1,), 0), block(x.storage_offset()))

    def addresses(self, mask: Any, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The addresses, and which of them are used; those must be inside."""
        at = torch.as_tensor(self.offset).as_subclass(Tensor).broadcast_to(tuple(shape)).long()
        used = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).as_subclass(Tensor)
        used = used.broadcast_to(at.shape)
        inside = (at >= 0) & (at < len(self.memory))
        check(bool((inside | ~used).all()), f"an address outside of a tensor of {len(self.memory)} elements")
        return torch.where(used, at, 0), used


@dataclass(frozen=True)
class TensorDescriptor:
    """The copy engine's view of a tensor."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Layout

    def __post_init__(self) -> None:
        size = self.base.element_size()
        check(1 <= len(self.shape) <= 5 and min(self.shape) > 0, f"a descriptor of shape {self.shape}")
        check(self.base.data_ptr() % 16 == 0 and self.strides[-1] == 1, "a descriptor's base or last stride")
        check(all(s * size % 16 == 0 for s in self.strides[:-1]), f"strides {self.strides} of {size} bytes")
        check(max(self.block_shape) <= 256 and self.block_shape[-1] * size >= 16, f"a box of {self.block_shape}")

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=prod(self.block_shape) * self.base.element_size(), shape=self.block_shape)

    def places(self, at: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Addresses of a box at some coordinates, and which of its points are inside."""
        check(len(at) == len(self.shape), f"{len(at)} coordinates for {len(self.shape)} dimensions")
        address = torch.tensor(self.base.storage_offset())
        inside = torch.tensor(True)
        for start, n, stride, width in zip(at, self.shape, self.strides, self.block_shape, strict=True):
            index = int(start) + torch.arange(width)
            address = address[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < n)
        return torch.where(inside, address, 0), inside

    @cached_property
    def memory(self) -> Tensor:
        return Pointer.to(self.base).memory


# -- shared memory and barriers ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Shared:
    """A view of an allocation. `unfenced`: ordinary stores (whose, from where to where) that asynchronous readers do
    not see yet, of the whole allocation."""

    simulator: Simulator
    data: Tensor
    layout: Layout
    unfenced: list[tuple[Partition, int, int]] = field(default_factory=list)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def begins(self) -> int:
        """Where the view begins in its allocation, in bytes; allocations begin where the copy engine needs it."""
        return self.data.storage_offset() * self.data.element_size()

    def view(self, data: Tensor, new: Layout | None = None) -> Shared:
        return Shared(self.simulator, data, new or self.layout, self.unfenced)

    def index(self, i: Any) -> Shared:
        check(0 <= int(i) < len(self.data), f"stage {int(i)} of {len(self.data)}")
        return self.view(self.data[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        check(int(start) + length <= self.data.shape[dim], f"a slice beyond {self.data.shape[dim]}")
        return self.view(self.data.narrow(dim, int(start), length))

    def permute(self, order: Sequence[int]) -> Shared:
        return self.view(self.data.permute(*order))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self.view(self.data.view(*shape))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], new: Layout) -> Shared:
        swizzle = new.swizzle if new.kind == self.layout.kind else 0
        check(swizzle == self.layout.swizzle, f"a tile swizzled by {self.layout.swizzle} read by {new.swizzle}")
        return self.view(self.data.view(dtype).view(*shape), new)

    def load(self, _: Any = None) -> Any:
        self.simulator.pause()
        return block(self.data.clone())

    def store(self, value: Tensor) -> None:
        check(value.dtype == self.data.dtype and list(value.shape) == self.shape, f"a store into {self.shape}")
        self.simulator.pause()
        self.unfenced.append((self.simulator.running, *self._reach()))
        self.data.copy_(value)

    def seen(self) -> Tensor:
        """The data as asynchronous operations see it."""
        first, last = self._reach()
        late = any(start <= last and first <= end for _, start, end in self.unfenced)
        check(not late, "an asynchronous read of what was stored without a fence")
        return self.data

    def _reach(self) -> tuple[int, int]:
        """The first and the last byte."""
        size, strides = self.data.element_size(), zip(self.data.shape, self.data.stride(), strict=True)
        start = self.data.storage_offset()
        return start * size, (start + sum((n - 1) * s for n, s in strides) + 1) * size - 1


@dataclass
class Barrier:
    """An mbarrier: a phase ends when `count` arrivals and all expected bytes are in."""

    name: str = "barrier"
    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0

    def arrive(self, n: int = 1, expected: int = 0) -> None:
        check(self.count, f"{self.name} is used before it is initialised")
        check(self.missing >= n, f"{self.name}: an arrival too many")
        self.missing -= n
        self.bytes += expected
        self.settle()

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


@dataclass
class Ring:
    barriers: list[Barrier]

    def index(self, i: Any) -> Barrier:
        check(0 <= int(i) < len(self.barriers), f"barrier {int(i)} of {len(self.barriers)}")
        return self.barriers[int(i)]


@dataclass
class Named:
    """A named barrier: opens when `expected` threads have come."""

    expected: int = 0
    came: int = 0
    openings: int = 0
