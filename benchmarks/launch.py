"""Host time of a call, layer by layer: from the bare launch of a site's kernel to the site in a compiled model.

    python benchmarks/launch.py              the table; with a CUDA device on it, else with launches that do nothing
    python benchmarks/launch.py --stub       with launches that do nothing, also where there is a device
    python benchmarks/launch.py --json       the same as JSON
    python benchmarks/launch.py --write      keeps it in benchmarks/results/launch.json (only from a clean commit)

The sites are causal attention of 32 heads with 8 heads of keys (bf16, width 128): a prompt, and a single query whose
kernel comes in two parts. Both are short, so that the device never holds the host up. Without a GPU kernels are
compiled for an H200 and everything runs but Triton's C functions (`stub_device`). Times are the least of many means, in
microseconds; a site in a model is the difference between models with more and fewer of them, so that the model's own
costs (guards, wrappers) are not in it. The bound holds against launching what was compiled with arguments that are
ready, the least that Triton's own interface offers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

HEADS, KEY_HEADS, WIDTH, LENGTH = 32, 8, 128, 256
SITES = {"a prompt": (LENGTH, LENGTH), "a single query": (1, 8 * LENGTH)}  # queries, keys
BOUND = 15.0
FEW, MANY = 2, 10  # sites in the models that are compared

ATTENTION = f"""
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < {HEADS}, g < {KEY_HEADS}, p < P, m < M, e < {WIDTH}, f < {WIDTH}
  S[b,h,p,m] = sum(e) {WIDTH**-0.5!r} * Q[b,h,p,e] * K[b,h // {HEADS // KEY_HEADS},m,e]   if m <= p + M - P
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // {HEADS // KEY_HEADS},m,f] / Z[b,h,p]
"""


class Sites(nn.Module):
    """Attention in plain PyTorch, again and again on its own result."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        for _ in range(self.number):
            scores = (q @ k.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, float("-inf"))
            q = scores.float().softmax(-1).to(q.dtype) @ v
        return q


def microseconds(calls: Mapping[str, Callable[[], object]], number: int = 20, rounds: int = 300) -> dict[str, float]:
    """The least mean of `number` calls over some rounds, of each; in turns, so that a busy moment is nobody's loss."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            if turn:  # the first is the warm-up
                best[name] = min(best[name], (time.perf_counter() - start) / number)
    return {name: seconds * 1e6 for name, seconds in best.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def noted_launches(call: Callable[[], object]) -> list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """The launches that a call makes: launcher, grid, arguments and options."""
    from einscade.runtime.launch import Launcher

    made: list[Any] = []
    plain = Launcher._launch

    def noting(self: Launcher, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        made.append((self, grid, arguments, options))
        plain(self, grid, *arguments, **options)

    with mock.patch.object(Launcher, "_launch", noting):
        call()
    return made


def layers(device: torch.device, queries: int, keys: int) -> dict[str, float]:
    """Microseconds by layer, the outer ones with all that is in them."""
    from einscade.compiler.operators import cascade
    from einscade.ir.text import parse_cascade
    from einscade.runtime.call import call_for
    from einscade.runtime.modules import load
    from einscade.runtime.program import Program

    program = Program("exact", parse_cascade(ATTENTION))
    inputs = _inputs(device, queries, keys)
    sizes = [1, keys, queries]
    call = call_for(program.text, inputs[0].device)
    call(inputs, sizes)
    kernel = list(call.kernels.values())[-1]
    run = load(kernel.chosen.source, program.cascade.name)
    named = dict(zip(kernel.chosen.symbols, sizes, strict=True))
    launches = noted_launches(lambda: run(*inputs, **named))
    ready = []
    for launcher, grid, arguments, options in launches:
        compiled = launcher.kernel.run(*arguments, grid=grid, warmup=False, **options)
        bound = _in_order(launcher.kernel, arguments, options)
        ready.append(functools.partial(compiled[(*grid, 1, 1)[:3]], *bound))

    def bare() -> None:
        for launch in ready:
            launch()

    def through_the_jit() -> None:
        for launcher, grid, arguments, options in launches:
            launcher.kernel[grid](*arguments, **options)

    def ours() -> None:
        for launcher, grid, arguments, options in launches:
            launcher[grid](*arguments, **options)

    leaves = [x.clone().requires_grad_() for x in inputs]
    parts = f"{kernel.candidate}, {len(launches)} kernel{'s' if len(launches) > 1 else ''}"
    return microseconds(
        {
            f"bare launch of what was compiled ({parts})": bare,
            "launch through the JIT": through_the_jit,
            "our launch": ours,
            "the generated run (allocates, describes, launches)": lambda: run(*inputs, **named),
            "the prepared call": lambda: call(inputs, sizes),
            "the operator": lambda: cascade(inputs, sizes, program.text),
            "the operator, for training": lambda: cascade(leaves, sizes, program.text),
        }
    )


def sites(device: torch.device) -> dict[str, float]:
    """Microseconds of one site more in an optimised model, by what compiles the rest."""
    import einscade

    found = {}
    for inner in ("eager", "inductor"):
        for training in (False, True):
            torch._dynamo.reset()
            inputs = [x.requires_grad_(training) for x in _inputs(device, LENGTH, LENGTH)]
            with contextlib.nullcontext() if training else torch.no_grad():
                calls = {}
                for number in (FEW, MANY):
                    fast = einscade.optimize(Sites(number), inner=inner, progress=lambda done, total: None)
                    fast(*inputs)
                    assert [s.status for s in fast.report.sites] == ["rewritten"] * number
                    calls[str(number)] = functools.partial(fast, *inputs)
                few, many = microseconds(calls).values()
            name = f"a site in a model, inner {inner!r}{', forward for training' if training else ''}"
            found[name] = (many - few) / (MANY - FEW)
    return found


def _inputs(device: torch.device, queries: int, keys: int) -> list[Tensor]:
    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, WIDTH, device=device).bfloat16()

    return [normal(HEADS, queries), normal(KEY_HEADS, keys), normal(KEY_HEADS, keys)]


def _in_order(jit: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The kernel's arguments as the compiled kernel takes them: by position, constants too."""
    return [*arguments, *(options.get(p.name, p.default) for p in jit.params[len(arguments) :])]


def measure(stub: bool) -> dict[str, dict[str, float]]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(EINSCADE_CACHE_DIR=folder, EINSCADE_AUTOTUNE="0")
        if stub:
            from benchmarks.stub_device import hopper

            stack.enter_context(hopper())
        device = torch.device("cpu" if stub else "cuda")
        found = {name: layers(device, *lengths) for name, lengths in SITES.items()}
        found["a prompt"] |= sites(device)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stub", action="store_true", help="launches do nothing, also where there is a CUDA device")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/launch.json")
    args = parser.parse_args()
    from benchmarks import record

    if args.write:
        record.check_clean()
    env = record.environment()
    stub = args.stub or not torch.cuda.is_available()
    found = measure(stub)
    figures = {"launches": "do nothing" if stub else "real", "microseconds": found, "bound_over_bare": BOUND}
    if args.json:
        print(json.dumps({"environment": env, "figures": figures}, indent=1))
    else:
        print(f"{'launches do nothing; ' if stub else ''}microseconds of host time, and over the bare launch")
    missed = False
    for site, rows in found.items():
        bare = next(iter(rows.values()))
        missed |= rows["the operator"] - bare > BOUND
        if not args.json:
            print(f"{site}: bound {BOUND:g} for the operator")
            print(*(f"{value:8.2f}  {value - bare:+8.2f}  {name}" for name, value in rows.items()), sep="\n")
    if args.write:
        print(f"written to {record.write('launch', figures, env)}", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
