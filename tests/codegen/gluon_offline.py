"""Compiling generated Gluon modules for Hopper without a GPU, as their `run` would launch them."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.codegen.uniform_registers import undefined

__all__ = ["Compiled", "assert_fits", "compiled", "iterations"]


class Compiled(NamedTuple):
    """A compiled kernel: bytes of shared memory, what ptxas reported, and the assembly."""

    shared: int
    report: str
    assembly: str


class _Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.warps = 4
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, launch_pdl: bool = False, **constants: Any) -> None:
            self.arguments, self.warps, self.constants = arguments, num_warps, constants

        return launch


_COMPILED: dict[tuple[Any, ...], Compiled] = {}
"""By all that a kernel is made of: the lists and the sums of rows are the same for many schedules."""


def compiled(made: ModuleType, given: list[Tensor], sizes: dict[str, int]) -> dict[str, Compiled]:
    """A module's kernels, compiled as its `run` would launch them for these inputs. Products that the assembler left
    out are an error, and so are registers that it reads before they are defined."""
    launched = dict.fromkeys(re.findall(r"(\w+)\[\(", inspect.getsource(made.run)))
    kernels = {name: getattr(made, name) for name in launched}
    recorders = {name: _Recorder() for name in kernels}
    vars(made).update(recorders)
    try:
        made.run(*given, **sizes)
    finally:
        vars(made).update(kernels)
    return {name: _compiled(kernel, recorders[name], _text(made, name)) for name, kernel in kernels.items()}


def _text(made: ModuleType, name: str) -> tuple[tuple[str, str], ...]:
    """Of a kernel: its text, and that of the functions and constants of its module that it reaches by name."""
    found: dict[str, str] = {}
    work = [name]
    while work:
        name = work.pop()
        value = vars(made).get(name)
        if name not in found and value is not None and not isinstance(value, ModuleType):
            text = getattr(value, "src", None) or (inspect.getsource(value) if inspect.isfunction(value) else None)
            found[name] = text or repr(value)
            work += re.findall(r"[A-Za-z_]\w*", text or "")
    return tuple(sorted(found.items()))


def _compiled(kernel: Any, launched: _Recorder, text: tuple[tuple[str, str], ...]) -> Compiled:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    names = {
        torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
        torch.bool: "i1", torch.uint8: "u8",
    }  # fmt: skip
    signature = dict.fromkeys(launched.constants, "constexpr")
    places = [n for n in kernel.arg_names if n not in signature]
    constants = dict(launched.constants)
    free = {p.name for p in kernel.params if p.do_not_specialize}
    for name, x in zip(places, launched.arguments, strict=True):
        if type(x) is int and x == 1 and name not in free:  # a stride of 1 is a constant, as it is to the JIT
            signature[name], constants[name] = "constexpr", 1
        elif isinstance(x, TensorDescriptor):
            signature[name] = f"tensordesc<{names[x.base.dtype]}{list(x.block_shape)},{x.layout!r}>"
        else:
            signature[name] = f"*{names[x.dtype]}" if isinstance(x, Tensor) else "i32"
    key = (text, launched.warps, tuple(sorted(signature.items())), repr(sorted(constants.items())), tuple(sorted(free)))
    if key in _COMPILED:
        return _COMPILED[key]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, values)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "ptxas").exists() or not (tools / "nvdisasm").exists():
        pytest.skip("this Triton has no assembler")
    report = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(report):
        triton.knobs.compilation.always_compile = True  # what comes from Triton's cache comes without a report
        triton.knobs.nvidia.dump_ptxas_log = True
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launched.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert _products(assembly) == result.asm["ptx"].count("wgmma.mma_async"), "the assembler dropped products"
    assert not undefined(assembly), "the assembler reads registers that nothing has defined"
    _COMPILED[key] = Compiled(result.metadata.shared, report.getvalue(), assembly)
    return _COMPILED[key]


def _products(assembly: str) -> int:
    """The matrix instructions of a kernel, without those that stand for a group in which none is left."""
    return sum("HGMMA" in line and " RZ, gdesc[URZ], RZ" not in line for line in assembly.split("\n"))


def iterations(assembly: str, within: str) -> list[list[str]]:
    """The loops of a kernel with an instruction of that name: what is between a label and a jump back to it, shortest
    first, where it shares none with a shorter one: warps that wait jump back, too, from the kernel's end."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.split("\n"):
        if found := re.match(r"\s*(\.L_x_\d+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    jumps = [(i, re.search(r"BRA.* `\((\.L_x_\d+)\)", line)) for i, line in enumerate(instructions)]
    spans = [(labels[to[1]], i + 1) for i, to in jumps if to and labels[to[1]] <= i]
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda x: x[1] - x[0]):
        body = "\n".join(instructions[start:end])
        if within in body and "STG" not in body and all(end <= a or b <= start for a, b in kept):
            kept.append((start, end))
    return [instructions[start:end] for start, end in kept]


def assert_fits(made: ModuleType, given: list[Tensor], sizes: dict[str, int], spilled: int = 0) -> None:
    """Every kernel of a module compiles for Hopper, fits in shared memory and spills no more bytes than that."""
    for shared, report, _ in compiled(made, given, sizes).values():
        assert shared <= 227 << 10
        found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert found, report
        assert max(map(int, found.groups())) <= spilled, report
        assert "serialized" not in report  # what ptxas says where products do not run in the background
