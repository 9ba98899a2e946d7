"""Warnings, each given once a process."""

from __future__ import annotations

import functools
import warnings

__all__ = ["first_line", "warn_once"]


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(f"einscade: {message}", RuntimeWarning, stacklevel=3)


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    text = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
