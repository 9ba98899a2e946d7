"""Parts of a benchmark in processes of their own, several at once: compilers that fill their caches on disk, checks,
measurements on several GPUs.

Comes in: commands. Goes out: what each of them wrote, as lines of JSON, to the file whose path it got as its last
argument. A process that crashes, or takes too long, has written less. Processes that share work need no order from
outside: each does what nobody has claimed yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["append", "claim", "gpu", "lines", "stream"]

POLLING = 0.2
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


def lines(
    commands: Sequence[Sequence[str]],
    at_once: int,
    seconds: float,
    settings: Sequence[Mapping[str, str]] | None = None,
) -> list[list[Any]]:
    """Runs Python on each command, `at_once` of them at a time with one thread each, and gives the lines of each; other
    output is dropped. After `seconds` those that run are killed and no other begins. `settings`: what is added to the
    environment of each."""
    end = time.monotonic() + seconds

    def one(command: Sequence[str], more: Mapping[str, str], log: Path) -> list[Any]:
        log.touch()
        environment = os.environ | ONE_THREAD | more
        if (left := end - time.monotonic()) > 0:
            quiet = subprocess.DEVNULL
            whole = [sys.executable, *command, str(log)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(whole, stdout=quiet, stderr=quiet, env=environment, timeout=left)
        return [json.loads(line) for line in log.read_text().splitlines()]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, at_once)) as pool:
        logs = (Path(folder, str(i)) for i in range(len(commands)))
        return list(pool.map(one, commands, settings or [{}] * len(commands), logs))


def stream(commands: Sequence[Sequence[str]], settings: Sequence[Mapping[str, str]]) -> Iterator[Any]:
    """Runs Python on all commands at once and gives each line soon after it was written. `settings` as in `lines`; what
    they say on stderr is seen."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        logs = [Path(folder, str(i)) for i in range(len(commands))]
        processes = []
        for command, more, log in zip(commands, settings, logs, strict=True):
            log.touch()
            whole = [sys.executable, *command, str(log)]
            process = subprocess.Popen(whole, stdout=subprocess.DEVNULL, env=os.environ | more)
            running.callback(process.wait)
            running.callback(process.kill)  # where the caller wants no more lines
            processes.append(process)
        files = [running.enter_context(log.open()) for log in logs]
        parts = [""] * len(files)
        alive = True
        while alive:
            alive = any(process.poll() is None for process in processes)  # first: the last lines are read after it
            time.sleep(POLLING if alive else 0)
            for i, file in enumerate(files):
                *whole, parts[i] = (parts[i] + file.read()).split("\n")
                yield from map(json.loads, whole)


def append(log: Path, line: Any) -> None:
    """Adds a line, all of it or nothing."""
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def claim(folder: Path, name: str) -> bool:
    """Whether no other process that shares the folder has claimed this."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def gpu(i: int) -> dict[str, str]:
    """The setting under which a process sees only the i-th of the GPUs that this one sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[i] if visible else str(i)}
