"""Run a recipe on a cascade, verifying after every rewrite.

Comes in: a cascade and a recipe (its name, or the rewrites themselves). Goes out: the rewritten cascade and one `Step`
per rewrite, those that did not apply included, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einscade.ir import Cascade
from einscade.ir.verify import verify
from einscade.passes.recipes import recipe as named
from einscade.passes.rewrite import NotApplicable, Notes, Rewrite, Step

__all__ = ["Rewritten", "run"]


@dataclass(frozen=True)
class Rewritten:
    """What a recipe made of a cascade. Inputs and outputs keep their order; names of ranks and tensors may change."""

    cascade: Cascade
    steps: tuple[Step, ...]


def run(cascade: Cascade, recipe: str | Sequence[Rewrite]) -> Rewritten:
    """Apply a recipe's rewrites in order.

    Raises ValueError for an unknown recipe, and CascadeError (naming the rewrite) if one breaks the cascade.
    """
    steps = []
    for rewrite in named(recipe) if isinstance(recipe, str) else recipe:
        try:
            after, reason = rewrite.apply(cascade), None
        except NotApplicable as refusal:
            after, reason = cascade, str(refusal)
        else:
            verify(after, where=rewrite.name)
        note = rewrite.note(after) if isinstance(rewrite, Notes) else ""
        steps.append(Step(rewrite.name, rewrite.identity, cascade, after, reason, note))
        cascade = after
    return Rewritten(cascade, tuple(steps))
