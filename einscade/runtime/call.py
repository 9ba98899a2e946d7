"""The prepared call: from tensors and sizes to outputs, with all that depends on the program alone done before.

Comes in: a program's text and a device (`call_for`). Goes out: a `Call`, to be called with any inputs and sizes. What
it does each time is short: shapes and strides come from a function written for the program (`Program.geometry`),
inputs are held against them, and the kernel of the size bucket runs. Nothing waits for the device, and nothing is
allocated but the outputs and a kernel's own scratch: a CUDA graph can capture a call. (While one is captured nothing is
measured either: a kernel that was not tuned before runs the cost model's choice.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from einscade.runtime.device import indexed
from einscade.runtime.kernels import Kernel, build
from einscade.runtime.program import DTYPES, Program, parse_program

__all__ = ["Call", "call_for"]

_calls: dict[tuple[str, torch.device], Call] = {}


def call_for(program: str, device: torch.device) -> Call:
    """What runs `program` on `device`. Raises ValueError for a text that is no program, and for a device that no
    kernels are generated for."""
    call = _calls.get((program, device))
    if call is None:
        call = _calls[program, device] = Call(parse_program(program), indexed(device))
    return call


class Call:
    """A program on a device. `Call(inputs, sizes)` returns the outputs, with the strides that the program's memory
    order says: inputs in cascade order with any strides, sizes in the order of `cascade.symbols`.

    Raises ValueError where inputs and sizes contradict each other or the program.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self._dtypes = tuple(DTYPES[t.dtype] for t in program.cascade.inputs)
        self._kernels: dict[tuple[int, ...], Kernel] = {}

    def __call__(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        shapes, layouts, points = self.program.geometry(*sizes)
        if len(inputs) != len(shapes):
            self.program.check(inputs, sizes)
        for x, shape, dtype in zip(inputs, shapes, self._dtypes, strict=True):
            if x.shape != shape or x.dtype is not dtype or x.device != self.device:
                self.program.check(inputs, sizes)
        if not points:
            return self._pointless(inputs, sizes)
        bucket = tuple([(n - 1).bit_length() for n in sizes])
        kernel = self._kernels.get(bucket)
        if kernel is None:
            kernel = self._kernels[bucket] = self._kernel(sizes)
        if self._undisturbed():
            outputs = kernel(inputs, sizes)
        else:
            with self._own_device(), torch.autocast(self.device.type, enabled=False):
                outputs = kernel(inputs, sizes)
        return [
            out if out.stride() == strides and out.shape == shape else _laid_out(out, shape, strides)
            for out, (shape, strides) in zip(outputs, layouts, strict=True)
        ]

    def _kernel(self, sizes: Sequence[int]) -> Kernel:
        program = self.program
        named = dict(zip(program.cascade.symbols, sizes, strict=True))
        return build(program.cascade, program.recipe, self.device, named, program.out_order)

    def _undisturbed(self) -> bool:
        """Whether kernels run as they were written here: no autocast, and this device is the current one."""
        if torch.is_autocast_enabled(self.device.type):
            return False
        return self.device.type != "cuda" or torch.cuda.current_device() == self.device.index

    def _own_device(self) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _pointless(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Where a rank has no points at all there is next to nothing to compute: the interpreter's definition holds."""
        from einscade.ir.interpret import interpret

        program = self.program
        named = dict(zip(program.cascade.symbols, sizes, strict=True))
        values = {t.name: x for t, x in zip(program.cascade.inputs, inputs, strict=True)}
        results = interpret(program.cascade, values, named)
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=self.device).copy_(results[name])
            for name, (shape, strides), dtype in zip(
                program.cascade.outputs, program.geometry(*sizes)[1], program.dtypes, strict=True
            )
        ]


def _laid_out(out: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The output with the strides that the graph was promised."""
    if out.shape != shape:
        raise RuntimeError(f"a kernel returned shape {tuple(out.shape)}, expected {shape}")
    if all(n <= 1 or a == b for n, a, b in zip(shape, out.stride(), strides, strict=True)):
        return out.as_strided(shape, strides)  # they differ where there is nothing to step over
    return torch.empty_strided(shape, strides, dtype=out.dtype, device=out.device).copy_(out)
