"""Canonicalise: many spellings, one form.

Comes in: a cascade as raised, in whatever granularity and spelling the user's program had. Goes out: an equal one in
which pointwise statements are written out, equal statements are one, masks are domains, exponentials under a sum are
shifted by their maximum, constants are folded into contractions, scores and weights that several reductions share have
a statement, dead statements are gone, and names depend on the structure alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from einscade.ir import Cascade
from einscade.passes.inline import aligned, deduplicated, inlined, shaped, specialised
from einscade.passes.masks import masks_to_domains
from einscade.passes.naming import named
from einscade.passes.rewrite import NotApplicable
from einscade.passes.shared import aliases_merged, constants_folded, domains_sunk, factors_out, guarded, shared
from einscade.passes.shifts import stabilised, unshifted
from einscade.passes.statements import without_unused

__all__ = ["Canonicalise"]


@dataclass(frozen=True)
class Canonicalise:
    """One form for many spellings, in the order of stages that `apply` has."""

    name: ClassVar[str] = "canonicalise"
    identity: ClassVar[str] = "equal terms are one term; exp(x - g) / sum exp(x - g) = exp(x) / sum exp(x)"
    exact: ClassVar[bool] = True

    def apply(self, cascade: Cascade) -> Cascade:
        before = cascade
        cascade = inlined(without_unused(cascade))
        cascade = deduplicated(aligned(specialised(cascade)))
        cascade = factors_out(cascade)
        cascade, shifted = unshifted(masks_to_domains(cascade))
        cascade = stabilised(deduplicated(cascade), shifted)
        cascade = deduplicated(shared(cascade))
        cascade = guarded(aliases_merged(domains_sunk(constants_folded(cascade))))
        cascade = named(shaped(without_unused(cascade)))
        if cascade == before:
            raise NotApplicable("it is in canonical form")
        return cascade
