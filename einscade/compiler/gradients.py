"""How a program is differentiated: which forward runs, what it saves, and what computes the gradients.

Comes in: a program and which inputs need gradients. Goes out: a `Gradient`. There are two strategies:

* *differentiated cascade*: the cascade (as it is before the rewrites that make loops) is differentiated; the forward
  program also returns the small tensors that the gradient reads (a row's normaliser), and the gradient is a program
  of its own, compiled like any other: no quadratic intermediate is stored.
* *recomputation*: where a statement has no derivative rule, backward runs the cascade's flat form again under autograd,
  one Einsum after another, and needs the memory that the original graph needed. So it does where the differentiated
  cascade is out of proportion: reverse mode takes a few times what runs forward, but the gradient of a read at an index
  that cannot be solved for its ranks compares every point with every element that may be meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from einscade.codegen.cost import Lengths
from einscade.ir.cascade import Cascade
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from einscade.passes.rewrite import NotApplicable
from einscade.passes.roles import merged, separate
from einscade.runtime.messages import first_line, warn_once
from einscade.runtime.program import DTYPES, Derivation, Program

__all__ = ["Gradient", "gradient", "scan_free"]

MOST_ELEMENTS = 16
"""No tensor of a gradient has more than so many times the elements of the largest one that runs forward: a table for
relative positions in three dimensions has eight entries for every position, each with a sum for every row."""

MOST_POINTS = 256
"""No statement of a gradient goes through more than so many times the points that all of those do that run forward."""

DIFFERENTIATED, RECOMPUTED = "differentiated cascade", "recomputation of the flat form"


@dataclass(frozen=True)
class Gradient:
    """`forward` is the program that runs forward; of its outputs the first `results` are the original's, and those at
    `saved` are kept. `backward` makes gradients of the inputs at `wrt`, each in one of its `roles` (pairs of an input
    of `backward` and the original's input that it is); None: recomputation, because of `reason`.
    """

    forward: str
    results: int
    inputs: tuple[str, ...]
    roles: tuple[tuple[str, str], ...] = ()
    saved: tuple[int, ...] = ()
    saved_names: tuple[str, ...] = ()
    backward: Program | None = None
    cotangents: tuple[str | None, ...] = ()
    wrt: tuple[int, ...] = ()
    reason: str | None = None
    symbols: tuple[str, ...] = ()
    forward_symbols: tuple[str, ...] = ()

    @property
    def strategy(self) -> str:
        return RECOMPUTED if self.backward is None else DIFFERENTIATED

    def forward_sizes(self, sizes: Sequence[Any]) -> list[Any]:
        """The sizes that `forward` takes, from those of the original program: a rewrite may have dropped a symbol."""
        known = dict(zip(self.symbols, sizes, strict=True))
        return [known[s] for s in self.forward_symbols]

    def run(
        self,
        inputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        sizes: Sequence[Any],
        shapes: Sequence[tuple[Sequence[Any], torch.dtype]],
    ) -> list[Tensor | None]:
        """The gradient of every input, None where not needed: zeros where it does not depend on the input (a single
        key has weight 1, whatever the query). `shapes` are those of the forward's results."""
        if self.backward is None:
            found = iter(torch.ops.einscade.cascade_backward.default(inputs, gradients, needed, sizes, self.forward))
            return [next(found) if wanted else None for wanted in needed]
        values: dict[str, Tensor] = dict(zip(self.inputs, inputs, strict=True))
        values.update((role, values[name]) for role, name in self.roles)
        values.update(zip(self.saved_names, saved, strict=True))
        for name, value, (shape, dtype) in zip(self.cotangents, gradients, shapes, strict=True):
            if name is not None:
                values[name] = inputs[0].new_zeros(shape, dtype=dtype) if value is None else value
        backward = self.backward.cascade
        known = dict(zip(self.symbols, sizes, strict=True))
        results = torch.ops.einscade.cascade.default(
            [values[t.name] for t in backward.inputs], [known[s] for s in backward.symbols], self.backward.text
        )
        made: dict[int, Tensor] = {}
        for i, result in zip(self.wrt, results, strict=True):
            made[i] = made[i] + result if i in made else result
        return [
            None if not wanted else made[i] if i in made else torch.zeros_like(inputs[i])
            for i, wanted in enumerate(needed)
        ]


def scan_free(cascade: Cascade, recipe: str) -> Cascade:
    """The cascade after the recipe's rewrites up to the first that makes loops."""
    for step in run(cascade, recipe).steps:
        if any(e.scan for e in step.after.body):
            break
        cascade = step.after
    return cascade


def gradient(program: Program, needed: Sequence[bool]) -> Gradient:
    """The strategy for `program` when the inputs at which `needed` is true require gradients."""
    cascade = program.cascade
    names = tuple(t.name for t in cascade.inputs)
    symbols = cascade.symbols
    recomputed = Gradient(program.text, len(cascade.outputs), names, symbols=symbols, forward_symbols=symbols)
    wrt = [i for i, wanted in enumerate(needed) if wanted and DTYPES[cascade.inputs[i].dtype].is_floating_point]
    try:
        base = scan_free(cascade, program.recipe)
        asked = [base.inputs[i].name for i in wrt]
        apart, roles = separate(base, asked)
        reverse = differentiate(apart, (*asked, *roles), roles)
    except NotApplicable as reason:
        return replace(recomputed, reason=str(reason))
    except Exception as error:  # a pass that breaks must not cost the user their gradients
        stop = f"internal error, {first_line(error)}"
        warn_once(f"a gradient is recomputed: {stop}")
        return replace(recomputed, reason=stop)
    if (excess := _out_of_proportion(base, reverse.cascade)) is not None:
        return replace(recomputed, reason=excess)
    forward = merged(reverse.forward, roles)
    index = {name: i for i, name in enumerate(forward.outputs)}
    positions = {t.name: i for i, t in enumerate(base.inputs)}
    outputs = {out: positions[roles.get(name, name)] for name, out in reverse.gradients.items()}
    adjoints = (*reverse.cotangents.items(), *reverse.gradients.items())
    return Gradient(
        forward=Program(program.recipe, forward, program.order_in(base)).text,
        results=len(cascade.outputs),
        inputs=tuple(t.name for t in base.inputs),
        roles=tuple(roles.items()),
        saved=tuple(index[name] for name in reverse.saved),
        saved_names=reverse.saved,
        backward=Program(program.recipe, reverse.cascade, derived=Derivation(reverse.forward, adjoints)),
        cotangents=tuple(reverse.cotangents.get(name) for name in base.outputs),
        wrt=tuple(outputs[out] for out in reverse.cascade.outputs),
        symbols=cascade.symbols,
        forward_symbols=forward.symbols,
    )


def _out_of_proportion(forward: Cascade, backward: Cascade) -> str | None:
    """Which statement of a gradient makes, or goes through, far more than anything that runs forward; None where none
    does."""
    made, visited = _elements(forward), _points(forward)
    most, work = max(made.values()), sum(visited.values())
    for name, elements in _elements(backward).items():
        if elements > MOST_ELEMENTS * most:
            return f"{name} of its gradient has {elements // most} times the elements of any tensor that runs forward"
    for name, points in _points(backward).items():
        if points > MOST_POINTS * work:
            return f"{name} of its gradient has {points // work} times the points of all that runs forward"
    return None


def _elements(cascade: Cascade) -> dict[str, int]:
    """Of every tensor; a length that is a symbol counts as a long one."""
    lengths = Lengths(cascade, {})
    return {name: prod(map(lengths.rank, tensor.ranks)) for name, tensor in cascade.tensors.items()}


def _points(cascade: Cascade) -> dict[str, int]:
    """Of every statement, those that it reduces included."""
    lengths = Lengths(cascade, {})
    return {e.name: prod(map(lengths.rank, e.ranks)) for e in cascade.body}
