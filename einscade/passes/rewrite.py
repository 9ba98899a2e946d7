"""What a rewrite is: a frozen dataclass that turns one cascade into another.

A rewrite states the identity it applies and whether it is exact (equal over the reals). It raises `NotApplicable` with
the reason where its condition fails, and never returns a cascade that it did not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from einscade.ir import Cascade

__all__ = ["NotApplicable", "Rewrite", "Step"]


class NotApplicable(Exception):
    """A rewrite's condition does not hold; the message says which, for the report."""


class Rewrite(Protocol):
    """`name` and `identity` (the equation, one line) are for the report; parameters are the dataclass's fields."""

    name: ClassVar[str]
    identity: ClassVar[str]
    exact: ClassVar[bool]

    def apply(self, cascade: Cascade) -> Cascade:
        """The rewritten cascade, or `NotApplicable`."""
        ...


@dataclass(frozen=True)
class Step:
    """One rewrite as it was (or was not) applied: `reason` says why `after` is `before`, else it is None."""

    name: str
    identity: str
    before: Cascade
    after: Cascade
    reason: str | None = None

    @property
    def changed(self) -> bool:
        return self.reason is None
