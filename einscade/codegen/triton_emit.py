"""The Triton emitter: a loop program as a module of kernels and a `run` that launches them.

Comes in: a `LoopProgram` and a `Schedule`. Goes out: `Source` in "triton", or `Unsupported`. Every serial nest is a
kernel (`triton_kernel`); flat nests are torch operations, as the torch emitter writes them.
"""

from __future__ import annotations

import textwrap

from einscade.codegen.loops import FlatNest, LoopProgram, SerialNest
from einscade.codegen.overlap import IMPORT, OPTION, overlaps
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.summaries import summarised
from einscade.codegen.tiled_torch import TorchModule
from einscade.codegen.triton_helpers import HELPERS
from einscade.codegen.triton_kernel import Kernel, kernel
from einscade.codegen.triton_memory import stored
from einscade.codegen.triton_pairs import paired
from einscade.codegen.triton_tables import totalled

__all__ = ["TritonModule", "emit", "emit_with_kernels"]


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's text for a GPU, or `Unsupported` with the construct that stopped it."""
    return emit_with_kernels(program, schedule)[0]


def emit_with_kernels(program: LoopProgram, schedule: Schedule) -> tuple[Source, tuple[Kernel, ...]]:
    """The same, with what is known of each kernel in it, for compiling without launching."""
    if not program.serial_nests:
        raise Unsupported("the program has no loop: there is nothing to write a kernel for")
    module = TritonModule(summarised(totalled(paired(program)), schedule), schedule)
    return Source("triton", module.text()), tuple(module.kernels)


DESCRIBED = '''

def described(tensor: torch.Tensor, block: tuple[int, ...]) -> tuple[torch.Tensor | TensorDescriptor, bool]:
    """The tensor for the copy engine, and True; the tensor itself where its address or strides are none for it."""
    strides = [s * tensor.element_size() for s in tensor.stride()[:-1]]
    fits = tensor.is_cuda and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0
    if not fits or any(s % 16 or s <= 0 for s in strides):
        return tensor, False
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)), True
'''


class TritonModule(TorchModule):
    """Launches in place of the serial nests' loops."""

    def __init__(self, program: LoopProgram, schedule: Schedule) -> None:
        super().__init__(program, schedule, in_place=True, grouped=False)
        self.kernels: list[Kernel] = []
        self.kernel_schedule = schedule
        self.memory = stored(self.program, schedule)

    def nest(self, nest: SerialNest | FlatNest) -> None:
        if isinstance(nest, FlatNest):
            super().nest(nest)
            return
        several = len(self.program.serial_nests) > 1
        name = f"{self.cascade.name}_kernel" + (f"{len(self.kernels) + 1}" if several else "")
        k = kernel(self.memory, nest, self.kernel_schedule, name, *self.neighbours(nest))
        self.kernels.append(k)
        added_to = {e.name for e in (*nest.body, *nest.totals)}
        for argument in dict.fromkeys(map(self.memory.argument, nest.outputs)):
            if argument != self.memory.pointer:
                self.allocate(argument, zeros=argument in added_to)
            elif not any(argument in other.tensors for other in self.kernels[:-1]):
                size = self.size(self.memory.elements())
                self.out(f"{argument} = torch.empty({size}, dtype=torch.float32, device={self.device})")
        self.launch(k)

    def neighbours(self, nest: SerialNest) -> tuple[bool, bool]:
        """Whether the kernel of a nest overlaps with one before it, and with one behind it."""
        nests = self.program.serial_nests
        able = overlaps(self.kernel_schedule.target)
        return able and nest != nests[0], able and nest != nests[-1]

    def launch(self, k: Kernel) -> None:
        described = {}
        for tensor, block in k.described.items():
            described[tensor] = f"{tensor}_read"
            self.out(f"{tensor}_read, {tensor}_TMA = described({self.code(tensor)}, {tuple(block)})")
        arguments = [described.get(t, self.code(t)) for t in k.tensors]
        arguments += self.strides(k)
        arguments += k.sizes
        arguments += [f"{t}_TMA={t}_TMA" for t in k.described]
        arguments += [f"num_warps={self.kernel_schedule.warps}", f"num_stages={self.kernel_schedule.stages}"]
        arguments += [OPTION] * k.waits
        self.out(f"grid = ({k.grid},)")
        self.out(f"{k.name}[grid](")
        for line in textwrap.wrap(", ".join(arguments), 108, break_long_words=False):
            self.out(f"    {line}")
        self.out(")")

    def strides(self, k: Kernel) -> list[str]:
        """The strides that a kernel takes; those of a tensor at once where it takes all."""
        taken: dict[str, list[int]] = {}
        for _, dimension, tensor in k.strides:
            taken.setdefault(tensor, []).append(dimension)
        arguments = []
        for tensor, dimensions in taken.items():
            code, known = self.code(tensor), self.cascade.tensors.get(tensor)
            if known is not None and dimensions == list(range(len(known.ranks))):
                arguments.append(f"*{code}.stride()")
            else:
                arguments += [f"{code}.stride({d})" for d in dimensions]
        return arguments

    def preamble(self) -> str:
        imports = "import torch\nimport triton\nimport triton.language as tl\n"
        text = ""
        if any(k.described for k in self.kernels):
            imports += "from triton.tools.tensor_descriptor import TensorDescriptor\n"
            text += DESCRIBED
        if any(self.neighbours(n) != (False, False) for n in self.program.serial_nests):
            imports += IMPORT
        return imports + text + self.kernel_texts()

    def kernel_texts(self) -> str:
        """The kernels, after the functions that they call."""
        helpers = sorted({h for k in self.kernels for h in k.helpers})
        return "".join(f"\n{HELPERS[h]}" for h in helpers) + "".join(k.text for k in self.kernels)
