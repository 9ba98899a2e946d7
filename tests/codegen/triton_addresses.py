"""Every address that a kernel reads or writes under Triton's interpreter lies in a tensor that the launch was given.

The interpreter takes any address, and what lies beside a tensor on the CPU seldom faults; on a GPU it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


def _tensors(values: Iterable[object]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
        elif hasattr(value, "base"):  # a tensor descriptor
            yield value.base


class Addresses:
    """The memory of the launch that is running: `[starts[i], ends[i])` in bytes, in ascending order."""

    def __init__(self) -> None:
        self.starts = np.zeros(0, np.uint64)
        self.ends = np.zeros(0, np.uint64)

    def launch(self, tensors: Iterable[Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        ordered = sorted(storages.items())
        self.starts = np.array([start for start, _ in ordered], np.uint64)
        self.ends = np.array([start + size for start, size in ordered], np.uint64)

    def check(self, pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        width = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        place = np.searchsorted(self.starts, used, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (used + width <= self.ends[np.maximum(place, 0)]) if len(self.starts) else used < 0
        assert inside.all(), f"{int((~inside).sum())} of {inside.size} addresses lie outside of the launch's tensors"


@pytest.fixture(autouse=True, scope="module")
def addresses_checked() -> Iterator[None]:
    """For every test of the module that imports this."""
    with pytest.MonkeyPatch.context() as patch:
        check_addresses(patch)
        yield


def check_addresses(patch: pytest.MonkeyPatch) -> None:
    """Make loads and stores outside of a launch's tensors errors, until `patch` is undone."""
    known = Addresses()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    arguments = executor._init_args_hst
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def launched(self: Any, args: Any, kwargs: Any) -> Any:
        copied = arguments(self, args, kwargs)
        known.launch(_tensors([*copied[0], *copied[1].values()]))
        return copied

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        known.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        known.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def updated(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        known.check(pointers, mask)
        return rmw(self, operation, pointers, value, mask, *rest)

    patch.setattr(executor, "_init_args_hst", launched)
    patch.setattr(builder, "create_masked_load", loaded)
    patch.setattr(builder, "create_masked_store", stored)
    patch.setattr(builder, "create_atomic_rmw", updated)
