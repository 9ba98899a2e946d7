"""What a rewrite is: a frozen dataclass that turns one cascade into another.

A rewrite states the identity it applies and whether it is exact (equal over the reals). It raises `NotApplicable` with
the reason where its condition fails, and never returns a cascade that it did not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from einscade.ir import Cascade

__all__ = ["NotApplicable", "Notes", "Rewrite", "Step"]


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


@runtime_checkable
class Notes(Protocol):
    """A rewrite that has something to say about its result, for the report."""

    def note(self, cascade: Cascade) -> str: ...


@dataclass(frozen=True)
class Step:
    """One rewrite as it was (or was not) applied: `reason` says why `after` is `before`, else it is None.
    `note` is what else the rewrite found out (the classes of tiles of a domain)."""

    name: str
    identity: str
    before: Cascade
    after: Cascade
    reason: str | None = None
    note: str = ""

    @property
    def changed(self) -> bool:
        return self.reason is None
