"""What a machine offers, as far as analyses and schedules ask: sizes and peak rates.

Comes in: a `torch.device`. Goes out: a frozen `Device`. The described ones have the figures of their vendors' data
sheets (dense, no sparsity); one that is not described gets its sizes from the driver and its rates from the described
device of the nearest generation, in proportion to its processors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

__all__ = ["A100", "CPU", "DEVICES", "H100", "H200", "MI300X", "Device"]

KIB, MIB, TERA = 1 << 10, 1 << 20, 1e12


@dataclass(frozen=True)
class Device:
    """`kind` is torch's device type, or "hip". Bytes, bytes per second, operations per second (a multiply-add is two).

    `processors`: SMs, compute units or cores; `shared` the shared memory one block may have (on a CPU: the cache that
    a tile should fit); `registers` of 32 bits per processor; `matrix` the rate of contractions by dtype; `vector` of
    float32 arithmetic; `special` of exp and its kin.
    """

    name: str
    kind: str
    capability: tuple[int, int]
    processors: int
    shared: int
    registers: int
    l2: int
    bandwidth: float
    matrix: Mapping[str, float] = field(hash=False)
    vector: float
    special: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", MappingProxyType(dict(self.matrix)))

    def __reduce__(self) -> tuple[object, ...]:
        fields = {**self.__dict__, "matrix": dict(self.matrix)}
        return Device, tuple(fields[name] for name in self.__dataclass_fields__)

    def matrix_rate(self, dtype: str) -> float:
        """Operations per second of contractions over this dtype; the vector units' where no matrix unit takes it."""
        return self.matrix.get(dtype, self.vector)

    @staticmethod
    def of(device: torch.device | str) -> Device:
        """The description of a torch device. Raises `ValueError` for kinds that nothing is known of."""
        device = torch.device(device)
        if device.type == "cpu":
            cores = torch.get_num_threads()
            return replace(
                CPU,
                processors=cores,
                matrix={dtype: rate * cores for dtype, rate in CPU.matrix.items()},
                vector=CPU.vector * cores,
                special=CPU.special * cores,
            )
        if device.type == "cuda":
            return _gpu(device)
        raise ValueError(f"device {device}: kernels are generated for cpu and cuda (CUDA and ROCm) devices")


_CUDA_DTYPES = {"f16": 1.0, "bf16": 1.0, "f8e4m3": 2.0, "f8e5m2": 2.0, "i8": 2.0, "u8": 2.0}

H200 = Device(
    name="NVIDIA H200", kind="cuda", capability=(9, 0), processors=132, shared=227 * KIB, registers=65536,
    l2=50 * MIB, bandwidth=4.8 * TERA,
    matrix={d: r * 989.4 * TERA for d, r in _CUDA_DTYPES.items()} | {"f32": 66.9 * TERA, "f64": 66.9 * TERA},
    vector=66.9 * TERA, special=4.2 * TERA,
)  # fmt: skip
H100 = replace(H200, name="NVIDIA H100", bandwidth=3.35 * TERA)
A100 = Device(
    name="NVIDIA A100", kind="cuda", capability=(8, 0), processors=108, shared=163 * KIB, registers=65536,
    l2=40 * MIB, bandwidth=2.04 * TERA,
    matrix={"f16": 312 * TERA, "bf16": 312 * TERA, "i8": 624 * TERA, "u8": 624 * TERA, "f64": 19.5 * TERA},
    vector=19.5 * TERA, special=2.4 * TERA,
)  # fmt: skip
MI300X = Device(
    name="AMD Instinct MI300X", kind="hip", capability=(9, 4), processors=304, shared=64 * KIB, registers=131072,
    l2=32 * MIB, bandwidth=5.3 * TERA,
    matrix={d: r * 1307.4 * TERA for d, r in _CUDA_DTYPES.items()} | {"f32": 163.4 * TERA, "f64": 163.4 * TERA},
    vector=163.4 * TERA, special=10.2 * TERA,
)  # fmt: skip
# One core of a present-day server; `Device.of` multiplies by the threads torch uses.
CPU = Device(
    name="CPU", kind="cpu", capability=(0, 0), processors=1, shared=MIB, registers=512, l2=MIB, bandwidth=20e9,
    matrix={"f32": 60e9, "f64": 30e9, "bf16": 60e9, "f16": 60e9}, vector=30e9, special=2e9,
)  # fmt: skip

DEVICES: tuple[Device, ...] = (H200, H100, A100, MI300X, CPU)


def _gpu(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    described = next((d for d in DEVICES if d.kind != "cpu" and d.name in found.name), None)
    if described is not None:
        return described
    like = MI300X if hip else H100 if found.major >= 9 else A100
    share = found.multi_processor_count / like.processors
    return Device(
        name=found.name,
        kind="hip" if hip else "cuda",
        capability=(found.major, found.minor),
        processors=found.multi_processor_count,
        shared=getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block),
        registers=getattr(found, "regs_per_multiprocessor", like.registers),
        l2=found.L2_cache_size,
        bandwidth=like.bandwidth * share,
        matrix={dtype: rate * share for dtype, rate in like.matrix.items()},
        vector=like.vector * share,
        special=like.special * share,
    )
