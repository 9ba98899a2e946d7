"""Compiling generated Triton kernels without a GPU, and what the compiler says of them.

Comes in: a loop program, a schedule, a target. Goes out: a `Resources` per kernel: shared memory, registers, spilled
bytes, the assembly. Used by tests, and by whoever wants to know what a schedule costs before a device is at hand.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.summaries import summarised
from einscade.codegen.triton_emit import emit_with_kernels
from einscade.codegen.triton_kernel import Kernel
from einscade.ir.cascade import Cascade

__all__ = ["SHARED_LIMITS", "Resources", "compile_offline"]

SHARED_LIMITS = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}
"""Bytes of shared memory that one program may have."""

_POINTERS = {
    "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "f8e4m3": "*fp8e4nv", "f8e5m2": "*fp8e5", "i64": "*i64",
    "i32": "*i32", "i16": "*i16", "i8": "*i8", "u8": "*u8", "bool": "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. `registers` and `spilled` (bytes a thread) are None where the target's assembly
    does not say."""

    name: str
    shared: int
    registers: int | None
    spilled: int | None
    assembly: str


def compile_offline(
    program: LoopProgram, schedule: Schedule, target: str, descriptors: bool = False
) -> tuple[Resources, ...]:
    """Compile every kernel of the program for a target ("cuda:90", "hip:gfx942"), inputs contiguous and aligned.

    `descriptors`: as if strides allowed the copy engine. Raises what the compiler raises.
    """
    source, kernels = emit_with_kernels(program, schedule)
    cascade = summarised(program, schedule).cascade
    with _imported(source.text) as module:
        return tuple(_compile(module, cascade, k, schedule, target, descriptors) for k in kernels)


@contextmanager
def _imported(text: str) -> Iterator[ModuleType]:
    """The text as a module; Triton reads a kernel's source from its file."""
    with tempfile.TemporaryDirectory(prefix="einscade-") as folder:
        path = Path(folder) / "generated.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("einscade_generated", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def _compile(
    module: ModuleType, cascade: Cascade, k: Kernel, schedule: Schedule, target: str, descriptors: bool
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, architecture = target.split(":")
    gpu = GPUTarget(kind, int(architecture), 32) if kind == "cuda" else GPUTarget(kind, architecture, 64)
    signature, constants, attributes = _signature(cascade, k, descriptors)
    fn = getattr(module, k.name)
    places = {name: i for i, name in enumerate(fn.arg_names)}
    attrs = {(places[name],): [["tt.divisibility", 16]] for name in attributes}
    source = ASTSource(
        fn=fn, signature=signature, constexprs={(places[n],): v for n, v in constants.items()}, attrs=attrs
    )
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    compiled: Any = triton.compile(source, target=gpu, options=options)
    assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    registers, spilled = _usage(compiled.asm, kind)
    return Resources(k.name, compiled.metadata.shared, registers, spilled, assembly)


def _signature(cascade: Cascade, k: Kernel, descriptors: bool) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Argument types, constants, and the arguments that are multiples of 16, for contiguous tensors."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for name in k.tensors:
        pointer = _POINTERS[cascade.tensors[name].dtype if name in cascade.tensors else "f32"]
        if descriptors and name in k.described:
            signature[name] = f"tensordesc<{pointer[1:]}{list(k.described[name])}>".replace(" ", "")
        else:
            signature[name] = pointer
            aligned.append(name)
    for stride, dim, tensor in k.strides:
        if dim == len(cascade.tensors[tensor].ranks) - 1:
            signature[stride], constants[stride] = "constexpr", 1
        else:
            signature[stride] = "i32"
            aligned.append(stride)
    for size in k.sizes:
        signature[size] = "i32"
    for name in k.described:
        signature[f"{name}_TMA"], constants[f"{name}_TMA"] = "constexpr", descriptors
    return signature, constants, aligned


def _usage(assembly: dict[str, Any], kind: str) -> tuple[int | None, int | None]:
    if kind == "hip":
        text = assembly.get("amdgcn", "")
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        return (int(registers[1]) if registers else None), (4 * int(spilled[1]) if spilled else None)
    tool = _cuobjdump()
    if tool is None or "cubin" not in assembly:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", report.stdout)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


def _cuobjdump() -> str | None:
    import triton

    packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packaged) if packaged.exists() else shutil.which("cuobjdump")
