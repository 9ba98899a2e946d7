"""What a kernel's choice depends on: the device, the versions that compile for it, and the sizes, coarsely."""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Callable, Mapping

import torch

from einscade.codegen.schedule import target_of
from einscade.ir.device import Device

__all__ = ["bucket", "bucket_code", "describe", "indexed", "supported", "versions"]


def supported(device: torch.device) -> bool:
    """Whether kernels are generated for this kind of device."""
    return device.type in ("cpu", "cuda")


def indexed(device: torch.device) -> torch.device:
    """The device with its number. Raises ValueError for a kind that no kernels are generated for."""
    if not supported(device):
        raise ValueError(
            f"device {device}: kernels are generated for cpu and cuda; run the model unchanged on {device.type}"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def describe(device: torch.device) -> str:
    """The device as far as timings depend on it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{target_of(Device.of(device))} {properties.name} x{properties.multi_processor_count}"
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} x{torch.get_num_threads()}"


@functools.cache
def versions() -> str:
    if importlib.util.find_spec("triton") is None:
        return f"torch {torch.__version__}"
    from importlib.metadata import PackageNotFoundError, version

    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return f"torch {torch.__version__} triton {version(name)}"
        except PackageNotFoundError:
            continue
    return f"torch {torch.__version__} triton"


SHORT = 256
"""Up to here a tile may hold all of a rank, and one that is too small is two: sizes are rounded up."""


def bucket_code(n: str) -> str:
    """The exponent of the power of two that a size counts as, as Python over the size's name `n`. Beyond `SHORT` it is
    the nearest (on a logarithmic scale): 8000, 8192 and 8200 count alike, so that a length which grows past a power of
    two, as round ones do, is not measured again there."""
    return f"(({n} - 1).bit_length() if 0 < {n} <= {SHORT} else ({n} * {n}).bit_length() // 2)"


_exponent: Callable[[int], int] = eval(f"lambda n: {bucket_code('n')}")


def bucket(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Sizes as powers of two: what was chosen for one length holds for its neighbours."""
    return tuple((name, n and 1 << _exponent(n)) for name, n in sorted(sizes.items()))
