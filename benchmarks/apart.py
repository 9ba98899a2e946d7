"""Parts of a benchmark in processes of their own, several at once: compilers that fill their caches on disk, checks.

Comes in: commands. Goes out: what each of them wrote, as lines of JSON, to the file whose path it got as its last
argument; its other output is dropped. A process that crashes, or takes too long, has written less.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["append", "lines"]

ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


def lines(
    commands: Sequence[Sequence[str]], at_once: int, seconds: float, settings: Mapping[str, str] | None = None
) -> list[list[Any]]:
    """Runs Python on each command, `at_once` of them at a time with one thread each, and gives the lines of each. After
    `seconds` those that run are killed and no other begins. `settings` are added to the environment."""
    end = time.monotonic() + seconds
    environment = os.environ | ONE_THREAD | (settings or {})

    def one(command: Sequence[str], log: Path) -> list[Any]:
        log.touch()
        if (left := end - time.monotonic()) > 0:
            quiet = subprocess.DEVNULL
            whole = [sys.executable, *command, str(log)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(whole, stdout=quiet, stderr=quiet, env=environment, timeout=left)
        return [json.loads(line) for line in log.read_text().splitlines()]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, at_once)) as pool:
        return list(pool.map(one, commands, (Path(folder, str(i)) for i in range(len(commands)))))


def append(log: Path, line: Any) -> None:
    """Adds a line, all of it or nothing."""
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")
