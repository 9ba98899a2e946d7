"""The record of a rewrite, kept as text beside the kernel it led to, and its analyses, computed when asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from einscade.ir import analysis
from einscade.ir.cascade import Cascade
from einscade.ir.text import parse_cascade

__all__ = ["Measures", "StepRecord", "measures"]


@dataclass(frozen=True)
class Measures:
    """What the analyses say of a cascade: passes per rank, and as text (expressions over extents) the bytes that any
    execution moves and the bytes held at once."""

    passes: Mapping[str, int]
    traffic: str
    footprint: str

    @property
    def most_passes(self) -> int:
        return max(self.passes.values(), default=0)


@dataclass(frozen=True)
class StepRecord:
    """A rewrite as it was applied, the cascades as text. `reason` says why nothing was done; None where it applied."""

    name: str
    identity: str
    before: str
    after: str
    reason: str | None = None

    @property
    def changed(self) -> bool:
        return self.reason is None

    @property
    def measures_before(self) -> Measures:
        return _measures(self.before)

    @property
    def measures_after(self) -> Measures:
        return _measures(self.after)


def measures(cascade: Cascade) -> Measures:
    return Measures(analysis.passes(cascade), str(analysis.traffic(cascade)), str(analysis.footprint(cascade)))


@functools.lru_cache(maxsize=256)
def _measures(text: str) -> Measures:
    return measures(parse_cascade(text))
