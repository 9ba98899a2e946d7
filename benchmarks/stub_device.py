"""A Hopper GPU for Triton that is not there: kernels compile for it, launching them does nothing.

For measuring host time, and for testing what a launch passes, on machines without a GPU. Everything up to Triton's C
functions is the real thing: the JIT, its driver's launcher, the encoding of descriptors. Tensors are the CPU's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from einscade.ir.device import H200, Device

__all__ = ["hopper"]


class _Utils:
    """What Triton's driver asks of the CUDA library."""

    def __init__(self) -> None:
        self.functions = 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H200.shared, "multiprocessor_count": H200.processors, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.functions += 1
        return object(), self.functions, 0, 0, 1024

    def fill_tma_descriptor(self, *arguments: Any) -> tuple[Any, ...]:
        return arguments


def _launch(launched: list[tuple[Any, ...]] | None, *arguments: Any) -> None:
    if launched is not None:
        launched.append(arguments)


@contextlib.contextmanager
def hopper(launched: list[tuple[Any, ...]] | None = None) -> Iterator[_Utils]:
    """Within it Triton's current device, and what the CPU is taken for when kernels are chosen, is an H200. The
    arguments of every launch, as Triton's C function gets them, are appended to `launched`."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    def built(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(launch=functools.partial(_launch, launched))

    utils = _Utils()
    stub = SimpleNamespace(
        utils=utils,
        launcher_cls=nvidia.CudaLauncher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with (
        mock.patch.object(nvidia, "compile_module_from_src", built),
        mock.patch.object(nvidia, "library_dirs", list),
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(Device, "of", return_value=H200),
    ):
        yield utils
