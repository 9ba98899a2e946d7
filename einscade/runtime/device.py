"""What a kernel's choice depends on: the device, the versions that compile for it, and the sizes, coarsely."""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Mapping

import torch

from einscade.codegen.schedule import target_of
from einscade.ir.device import Device

__all__ = ["bucket", "describe", "indexed", "supported", "versions"]


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


def bucket(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Sizes rounded up to powers of two: what was chosen for one length holds for its neighbours."""
    return tuple((name, n if n <= 1 else 1 << (n - 1).bit_length()) for name, n in sorted(sizes.items()))
