"""Where a benchmark's figures come from: commit, machine, versions; and the files that keep them.

Comes in: a benchmark's figures. Goes out: benchmarks/results/<name>.json, only ever of a clean commit.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["DirtyTreeError", "check_clean", "environment", "write"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class DirtyTreeError(RuntimeError):
    """The working tree differs from the commit that figures would be recorded under."""


def check_clean() -> None:
    """Raises DirtyTreeError, with what to do, unless the code is exactly that of a commit. Results may differ."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    if changed:
        raise DirtyTreeError(f"figures are recorded under a commit; commit or remove these first:\n{changed}")


def environment(commit: str | None = None) -> dict[str, Any]:
    """Commit, date (UTC), machine and versions of what takes part in the measurement. `commit`: its id, for a copy of
    the tree without git, where nothing else can tell."""
    packages = ("torch", "triton", "transformers", "sympy", "numpy")
    return {
        "commit": commit or _git("rev-parse", "HEAD"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def write(name: str, figures: Mapping[str, Any], env: Mapping[str, Any]) -> Path:
    """Writes `figures` as results/<name>.json. Raises DirtyTreeError: also where the commit moved since `env`."""
    check_clean()
    if env["commit"] != _git("rev-parse", "HEAD"):
        raise DirtyTreeError(
            f"the figures are of commit {env['commit']}, which is no longer checked out; measure again"
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": env, "figures": figures}, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
