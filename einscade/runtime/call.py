"""The prepared call: from tensors and sizes to outputs, with all that depends on the program alone done before.

Comes in: a program's text and a device (`call_for`). Goes out: a `Call`, to be called with any inputs and sizes. What
it does each time is short, and written out for the program (`_text`): inputs are held against the sizes, the kernel of
the size bucket runs, outputs are held against what the graph was promised. Nothing waits for the device, and nothing is
allocated but the outputs and a kernel's own scratch: a CUDA graph can capture a call. (While one is captured nothing is
measured either: a kernel that was not tuned before runs the cost model's choice.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from einscade.runtime.device import bucket_code, indexed
from einscade.runtime.kernels import Kernel, build
from einscade.runtime.program import DTYPES, Program, parse_program

__all__ = ["Call", "call_for", "calls", "prepared"]

calls: dict[tuple[str, torch.device], Call] = {}
"""What `call_for` has made."""


def call_for(program: str, device: torch.device) -> Call:
    """What runs `program` on `device`. Raises ValueError for a text that is no program, and for a device that no
    kernels are generated for."""
    call = calls.get((program, device))
    if call is None:
        call = calls[program, device] = Call(parse_program(program), indexed(device))
    return call


def prepared() -> tuple[Call, ...]:
    """The calls of this process, in the order in which they were prepared: those of backward passes are among them."""
    return tuple(calls.values())


class Call:
    """A program on a device. `run(inputs, sizes)` returns the outputs, with the strides that the program's memory order
    says: inputs in cascade order with any strides, sizes in the order of `cascade.symbols`.

    `run` raises ValueError where inputs and sizes contradict each other or the program.

    `alike(*inputs)`: whether they, as many as `count` says, and the thread's modes are like those of a call that was
    found to need nothing but `run`: one look of Dynamo's at types, dtypes, devices and dispatch keys. The operator sets
    it; None before.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.count = len(program.cascade.inputs)
        self.alike: Callable[..., bool] | None = None
        self.kernels: dict[tuple[int, ...], Kernel] = {}  # by the sizes' buckets, and whether to be deterministic
        scope: dict[str, Any] = {
            "_device": device,
            "_dtypes": [DTYPES[t.dtype] for t in program.cascade.inputs],
            "_refuse": self._refuse,
            "_pointless": self._pointless,
            "_kernels": self.kernels,
            "_made": self._made,
            "_autocast": torch.is_autocast_enabled,
            "_kind": device.type,
            "_current": torch._C._cuda_getDevice if device.type == "cuda" else lambda: None,
            "_number": device.index if device.type == "cuda" else None,
            "_run_undisturbed": self._run_undisturbed,
            "_laid_out": _laid_out,
            "_deterministic": torch._C._get_deterministic_algorithms,
        }
        exec(_text(program), scope)
        self.run: Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]] = scope["_call"]

    def _refuse(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> NoReturn:
        self.program.check(inputs, sizes)
        raise ValueError(f"the inputs are on {inputs[0].device}, this call is for {self.device}")

    def _made(self, bucket: tuple[int, ...], sizes: Sequence[int]) -> Kernel:
        """The kernel for a bucket that was not asked for before."""
        program = self.program
        named = dict(zip(program.cascade.symbols, sizes, strict=True))
        kernel = build(program.cascade, program.recipe, self.device, named, program.out_order, program.derived)
        self.kernels[bucket] = kernel
        return kernel

    def _run_undisturbed(self, kernel: Kernel, inputs: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """Kernels run as they were written: not under autocast, and on their own device."""
        own = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with own, torch.autocast(self.device.type, enabled=False):
            return kernel(inputs, sizes)

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
                program.cascade.outputs, program.layouts(sizes), program.dtypes, strict=True
            )
        ]


def _text(program: Program) -> str:
    """The call of a program, written out:

    def _call(inputs, sizes):
        x0, x1, x2 = inputs
        B, M, P = sizes
        if x0.shape != (B, 32, P, 128) or x0.dtype is not _dtypes[0] or x0.device != _device or x1.shape != ...:
            _refuse(inputs, sizes)
        ...
    """
    cascade = program.cascade
    inputs = [f"_x{i}" for i in range(len(cascade.inputs))]
    outputs = [f"_y{i}" for i in range(len(cascade.outputs))]
    wrong = [
        f"{x}.shape != {program.shape_code(t.name)} or {x}.dtype is not _dtypes[{i}] or {x}.device != _device"
        for i, (x, t) in enumerate(zip(inputs, cascade.inputs, strict=True))
    ]
    bucket = "".join(f"{bucket_code(s)}, " for s in cascade.symbols)
    lines = [
        f"if len(inputs) != {len(inputs)}:",
        "    _refuse(inputs, sizes)",
        f"{', '.join(inputs)}, = inputs",
        *([f"{', '.join(cascade.symbols)}, = sizes"] if cascade.symbols else []),
        f"if {' or '.join(wrong)}:",
        "    _refuse(inputs, sizes)",
        f"if not ({program.points_code}):",
        "    return _pointless(inputs, sizes)",
        f"_bucket = ({bucket}_deterministic(),)",
        "_kernel = _kernels.get(_bucket) or _made(_bucket, sizes)",
        "_disturbed = _autocast(_kind) or _current() != _number",
        f"{', '.join(outputs)}, = _run_undisturbed(_kernel, inputs, sizes) if _disturbed else _kernel(inputs, sizes)",
    ]
    for y, name in zip(outputs, cascade.outputs, strict=True):
        shape, strides = program.shape_code(name), program.strides_code(name)
        lines += [
            f"if {y}.stride() != {strides} or {y}.shape != {shape}:",
            f"    {y} = _laid_out({y}, {shape}, {strides})",
        ]
    lines.append(f"return [{', '.join(outputs)}]")
    return "def _call(inputs, sizes):\n" + "".join(f"    {line}\n" for line in lines)


def _laid_out(out: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The output with the strides that the graph was promised."""
    if out.shape != shape:
        raise RuntimeError(f"a kernel returned shape {tuple(out.shape)}, expected {shape}")
    if all(n <= 1 or a == b for n, a, b in zip(shape, out.stride(), strides, strict=True)):
        return out.as_strided(shape, strides)  # they differ where there is nothing to step over
    return torch.empty_strided(shape, strides, dtype=out.dtype, device=out.device).copy_(out)
