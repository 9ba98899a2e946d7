"""What `benchmarks/h200.py` does before it measures, in processes of their own, several at once on every GPU.

Comes in: rows, and which of their peers to call. Goes out: of every row what is known then. A check is the row's error
beside the module's own; what it compiles stays in caches that nothing else reads, so that tuning begins cold. The peers
are those whose compilers keep on disk what they made: a later call finds it, and what crashes does so here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import apart, h200_peers
from benchmarks.h200_rows import ROWS, Row

__all__ = ["CHECK", "ahead", "check", "jobs"]

CHECK = "check"
PEERS = ("fa4", "flex")
"""Whose compilers keep on disk what they made, and whose calls take little memory beside the inputs; slow ones first.
"""

CACHES = ("EINSCADE_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
BEGUN = "begun"


def check(row: Row, device: str) -> dict[str, float]:
    """The error of the row's optimised module at an odd length, by the cost model's choice of kernels, and the module's
    own in bfloat16 (`plain_error`), both against float64; of several gradients where they differ most."""
    import einscade

    torch.manual_seed(0)
    inputs = row.inputs(row.checked, device, batch=min(row.batch, 4) if row.batch else None)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    with _untuned():
        fast = einscade.optimize(row.module, dynamic=False)
        found = [_results(row, *given) for given in ((fast, inputs), (row.module, inputs), (row.module, exact))]
    torch._dynamo.reset()
    pairs = [(_distance(ours, best), _distance(plain, best)) for ours, plain, best in zip(*found, strict=True)]
    error, plain = max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))
    return {"error": error, "plain_error": plain}


def jobs(rows: Sequence[Row], peers: Sequence[str]) -> list[tuple[str, str]]:
    """What can be done ahead, names of rows and of what to do, the longest first. FlexAttention's form of what
    libraries compute comes last of its calls: with a causal mask of 16384 positions its first ones were seen not to
    end."""
    longest = sorted(rows, key=lambda row: not row.backward)
    last = sorted(longest, key=lambda row: row.module.plain)
    todo = (*(p for p in PEERS if p in peers), CHECK)
    return [(row.name, what) for what in todo for row in (last if what == "flex" else longest)]


def ahead(todo: Sequence[tuple[str, str]], gpus: int, seconds: float, tiny: bool = False) -> dict[str, dict[str, Any]]:
    """Does the jobs, as many at once as there are cores but one. By row and by what was done: what `check` found, None
    for a peer that was called, or why it was not. Checks that were not done within `seconds` are not in it, nor is a
    peer that was not begun: what calls these later waits longer."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # read when flash_attn is imported
    cores = max(2, (os.cpu_count() or 1) - 1)
    checks = [job for job in todo if job[1] == CHECK]
    calls = [job for job in todo if job[1] != CHECK]
    checking = max(1, cores // 3)
    shares = [(calls, min(len(calls), cores - checking)), (checks, min(len(checks), checking))]
    this = str(Path(__file__).resolve())
    commands, settings = [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for share, workers in shares:
            for _ in range(workers):
                own = tempfile.mkdtemp(dir=folder)
                cold = dict.fromkeys(CACHES, own) if share is checks else {}
                settings.append(cold | (apart.gpu(len(commands) % gpus) if gpus else {}))
                commands.append([this, json.dumps({"todo": share, "folder": folder, "tiny": tiny})])
        said = apart.lines(commands, len(commands), seconds, settings)
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for row, what, state in (line for part in said for line in part):  # that it began, then how it ended
        found[row][what] = state
    unfinished = f"its first call crashed, or took longer than {seconds:g} s"
    for states in found.values():
        for what in [what for what, state in states.items() if state == BEGUN]:
            if what == CHECK:
                del states[what]
            else:
                states[what] = unfinished
    return dict(found)


def _work(todo: Sequence[tuple[Row, str]], folder: Path, device: str, log: Path) -> None:
    """Does the jobs that nobody has claimed, and writes of each that it began, and how it ended."""
    functorch_config.donated_buffer = False  # as where they are timed, or what is kept would not fit
    for row, what in todo:
        if not apart.claim(folder, f"{row.name}:{what}"):
            continue
        apart.append(log, [row.name, what, BEGUN])
        torch._dynamo.reset()
        state: Any = None
        try:
            if what == CHECK:
                state = check(row, device)
            else:
                inputs = row.inputs(row.length, device)
                row.timed(h200_peers.attention(what, row, inputs), inputs)()
            _wait(device)
        except Exception as error:
            state = h200_peers.problem(error)
        apart.append(log, [row.name, what, state])
        _wait(device)  # raises where a kernel took the device with it: all that follows would fail too


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """The model's choice of kernels, for a call that is not timed."""
    before = os.environ.get("EINSCADE_AUTOTUNE")
    os.environ["EINSCADE_AUTOTUNE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EINSCADE_AUTOTUNE"]
        else:
            os.environ["EINSCADE_AUTOTUNE"] = before


def _distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def _results(row: Row, attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a row computes: the attention's result, or the gradients of a fixed weighted sum of it."""
    result = attention(*inputs)
    if not row.backward:
        return [result]
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return list(torch.autograd.grad(result, inputs[:3], weights.to(result)))


if __name__ == "__main__":
    given, written = json.loads(sys.argv[1]), Path(sys.argv[2])
    known = {row.name: row.tiny() if given["tiny"] else row for row in ROWS}
    here = "cuda" if torch.cuda.is_available() else "cpu"
    _work([(known[row], what) for row, what in given["todo"]], Path(given["folder"]), here, written)
