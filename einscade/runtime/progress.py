"""Progress while compiling: one line on stderr, or a caller's function.

Compiling reports through `step` how many sites are done, `tuning` how many kernels of one are compiled or measured; who
listens is a context (`listening`). Without a listener the line is drawn where stderr is a terminal, and
`EINSCADE_PROGRESS=0` turns it off.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["Listener", "finish", "listening", "step", "tuning"]

Listener = Callable[[int, int], None]
"""Called with the number of sites done and their total."""

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("einscade_progress", default=None)
_started: float | None = None
WIDTH = 24


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Reports steps to `listener` instead of drawing them; None leaves things as they are."""
    if listener is None:
        yield
        return
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def step(done: int, total: int, what: str) -> None:
    """`done` of `total` sites are compiled; `what` names the one that is next."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total)
    else:
        _draw(done, total, "sites", what)


def tuning(done: int, total: int, how: str, what: str) -> None:
    """`done` of `total` kernels for the site `what` are compiled or measured (`how`). Drawn only: a listener counts
    sites."""
    if _listener.get() is None:
        _draw(done, total, f"kernels {how}", what)


def _draw(done: int, total: int, unit: str, what: str) -> None:
    global _started
    if not _visible():
        return
    _started = time.monotonic() if _started is None else _started
    filled = WIDTH * done // max(total, 1)
    bar = "█" * filled + "░" * (WIDTH - filled)
    seconds = time.monotonic() - _started
    sys.stderr.write(f"\r\x1b[Keinscade {bar} {done}/{total} {unit} · {seconds:.1f} s · {what[:48]}")
    sys.stderr.flush()


def finish() -> None:
    """Takes the line away."""
    global _started
    if _started is not None and _visible():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
    _started = None


def _visible() -> bool:
    return os.environ.get("EINSCADE_PROGRESS", "1") != "0" and sys.stderr is not None and sys.stderr.isatty()
