"""Gradients where a cascade has no derivative: its flat form, run again under autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from einscade.codegen import tiled_torch
from einscade.runtime.modules import load
from einscade.runtime.program import parse_program

__all__ = ["recompute_gradients"]


@functools.lru_cache(maxsize=256)
def _flat(text: str) -> Callable[..., tuple[Tensor, ...]]:
    program = parse_program(text)
    return load(tiled_torch.emit_flat(program.cascade), program.cascade.name)


def recompute_gradients(
    program: str,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    sizes: Sequence[int],
) -> list[Tensor]:
    """Gradients of the needed inputs, given those of the outputs (None where there is none). It needs the memory that
    the original graph needed."""
    named = dict(zip(parse_program(program).cascade.symbols, sizes, strict=True))
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, needed, strict=True)]
        outputs = _flat(program)(*leaves, **named)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) if g is None else g.contiguous()
            for x, g in zip(wanted, found, strict=True)]  # fmt: skip
