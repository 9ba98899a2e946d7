"""What an emitter returns, and how it says that it cannot."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Source", "Unsupported"]


@dataclass(frozen=True)
class Source:
    """A module's text. `language` is "torch" or "triton"; `entry` is the function to call (`run`).

    The text imports on its own and defines `run(*inputs, **sizes) -> tuple[torch.Tensor, ...]`: inputs in cascade
    order with any strides, sizes by symbol name (those of tile symbols are the schedule's and are not passed).
    """

    language: str
    text: str
    entry: str = "run"


class Unsupported(Exception):
    """An emitter cannot lower a loop program; the message says which construct stopped it."""
