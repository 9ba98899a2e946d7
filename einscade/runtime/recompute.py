"""A cascade's flat form under autograd: for gradients where the cascade has no derivative, and for derivatives of
gradients and derivatives forwards, of which no program is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from einscade.codegen import tiled_torch
from einscade.runtime.modules import load
from einscade.runtime.program import parse_program

__all__ = ["flat_form", "gradients_with_graph", "recompute_gradients"]


@functools.lru_cache(maxsize=256)
def _flat(text: str) -> Callable[..., tuple[Tensor, ...]]:
    program = parse_program(text)
    return load(tiled_torch.emit_flat(program.cascade), program.cascade.name)


def flat_form(program: str, inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """The outputs by torch's own operations, one Einsum after another: every kind of derivative passes."""
    named = dict(zip(parse_program(program).cascade.symbols, sizes, strict=True))
    return list(_flat(program)(*inputs, **named))


def gradients_with_graph(
    program: str,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    sizes: Sequence[int],
) -> list[Tensor | None]:
    """The gradient of every input, None where not needed, as a differentiable function of `inputs` and `gradients`
    (those of the program's first outputs)."""
    with torch.enable_grad():
        # One tensor may be given as two inputs: a view of each tells their gradients apart.
        own = [x.view_as(x) if wanted else x for x, wanted in zip(inputs, needed, strict=True)]
        pairs = [(o, g) for o, g in zip(flat_form(program, own, sizes), gradients, strict=False) if g is not None]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        wanted = [x for x, w in zip(own, needed, strict=True) if w]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            outputs, cotangents = [o for o, _ in pairs], [g for _, g in pairs]
            found = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True)
        made = iter([torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)])
        return [next(made) if w else None for w in needed]


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
