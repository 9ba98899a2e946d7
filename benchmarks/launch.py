"""Host time of a call, layer by layer: from the bare launch of a site's kernels to the call of a compiled module.

    python benchmarks/launch.py              the table; with a CUDA device on it, else with launches that do nothing
    python benchmarks/launch.py --stub       with launches that do nothing, also where there is a device
    python benchmarks/launch.py --training   also where gradients are asked for
    python benchmarks/launch.py --json       the same as JSON
    python benchmarks/launch.py --out FILE [--commit ID]
    python benchmarks/launch.py --write      keeps it in benchmarks/results/launch.json (only from a clean commit)

The sites are causal attention of 32 heads with 8 heads of keys (bf16, width 128): a prompt, and a single query whose
kernel comes in two parts. Both are short, so that the device never holds the host up. Without a GPU kernels are
compiled for an H200 and everything runs but Triton's C functions (`stub_device`).

Every figure is a slope, in microseconds: ten calls (a model with ten sites) take so much longer than two, each the
least of many times, over eight. So nothing that surrounds calls is in it: no synchronisation, no waking device, and of
a site in a model not the model's own guards and wrappers. What a call is compared with is measured in the same way, on
the very launches that it makes, with arguments that are ready:

* "Triton's launch": `compiled[grid](*arguments)`, the least that Triton's own interface offers. It looks up device and
  stream, and encodes descriptors anew. The bound holds against this.
* "the C function": what that ends in, with everything encoded before. Less cannot be done.

A graph with nothing but sites is called as it is, whatever is to compile the rest: "in a model" and "a whole call" have
the operator's own path, and "called" has what a site costs in a graph that Inductor compiles.

"A whole call" is that of a module with one site, with all that surrounds the site: guards, wrappers, and for gradients
what autograd does in `torch.autograd.grad`. Beside it stands a module without a site, whose call by `torch.compile`
allocates its result and nothing else.
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
from torch._functorch import config as functorch_config

HEADS, KEY_HEADS, WIDTH, LENGTH = 32, 8, 128, 256
SITES = {"a prompt": (LENGTH, LENGTH), "a single query": (1, 8 * LENGTH)}  # queries, keys
BOUND = 15.0
TRAINING = ", for training"
FEW, MANY = 2, 10  # calls, or sites in the models, that are compared

ATTENTION = f"""
cascade attention(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
  where b < B, h < {HEADS}, g < {KEY_HEADS}, p < P, m < M, e < {WIDTH}, f < {WIDTH}
  S[b,h,p,m] = sum(e) {WIDTH**-0.5!r} * Q[b,h,p,e] * K[b,h // {HEADS // KEY_HEADS},m,e]   if m <= p + M - P
  G[b,h,p]   = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p]   = sum(m) W[b,h,p,m]
  O[b,h,p,f]: bf16 = sum(m) W[b,h,p,m] * V[b,h // {HEADS // KEY_HEADS},m,f] / Z[b,h,p]
"""


class Empty(nn.Module):
    """Nothing but a result: what a compiled call costs without what it is called for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


class Sites(nn.Module):
    """Attention in plain PyTorch, again and again on its own result."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
        for _ in range(self.number):
            scores = (q @ k.transpose(-1, -2) * WIDTH**-0.5).masked_fill(hidden, float("-inf"))
            q = scores.float().softmax(-1).to(q.dtype) @ v
        return q


def microseconds(calls: Mapping[str, Callable[[int], object]], seconds: float = 3.0) -> dict[str, float]:
    """The slope of each, called with the number of times to do what it does: the least time of `MANY` less that of
    `FEW`, a time. They take turns, for so many seconds altogether."""
    best: dict[tuple[str, int], float] = {}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            for number in (FEW, MANY):
                _synchronize()
                start = time.perf_counter()
                call(number)
                if turn:  # the first is the warm-up
                    best[name, number] = min(best.get((name, number), float("inf")), time.perf_counter() - start)
        turn += 1
    return {name: (best[name, MANY] - best[name, FEW]) / (MANY - FEW) * 1e6 for name in calls}


def repeated(call: Callable[[], object]) -> Callable[[int], None]:
    def times(number: int) -> None:
        for _ in range(number):
            call()

    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def noted_launches(call: Callable[[], object]) -> list[Launch]:
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


def bare(launches: list[Launch], number: int = 1) -> dict[str, Callable[[int], None]]:
    """What a call's launches cost with arguments that are ready. `launches`: of so many calls."""
    by_triton, by_c = [], []
    for launcher, grid, arguments, options in launches:
        compiled = launcher.kernel.run(*arguments, grid=grid, warmup=False, **options)
        whole = (*grid, 1, 1)[:3]
        by_triton.append(functools.partial(compiled[whole], *_in_order(launcher.kernel, arguments, options)))
        by_c.append(_c_call(launcher.kernel, compiled, whole, arguments))
    each = len(launches) // number

    def first(ready: list[Callable[[], object]]) -> Callable[[int], None]:
        def calls(n: int) -> None:
            for i in range(n):
                for j in range(i % number * each, i % number * each + each):
                    ready[j]()

        return calls

    parts = f"{each} kernel{'s' if each > 1 else ''}"
    return {f"Triton's launch of what was compiled ({parts})": first(by_triton), "the C function": first(by_c)}


def _c_call(jit: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Callable[[], object]:
    """The launch at the end of all launches, on the current stream."""
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.runtime import driver

    from einscade.runtime.launch import _ready

    _, call, function, cooperative, dependent, packed, encodings, _ = _ready(compiled) or (None,) * 8
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    passed: list[Any] = []
    described = 0
    for param, value in zip(jit.params, arguments, strict=False):
        if hasattr(value, "block_shape"):
            passed += make_tensordesc_arg(value, encodings[described] if encodings else None)
            described += 1
        else:
            passed.append(value.data_ptr() if isinstance(value, Tensor) else None if param.is_constexpr else value)
    passed += [None] * (len(jit.params) - len(arguments))
    head = (*grid, stream, function, cooperative, dependent, None, None, packed, None, None, None)
    return functools.partial(call, *head, *passed)


def _in_order(jit: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    """The kernel's arguments as the compiled kernel takes them: by position, constants too."""
    return [*arguments, *(options.get(p.name, p.default) for p in jit.params[len(arguments) :])]


def layers(device: torch.device, queries: int, keys: int, training: bool) -> dict[str, Callable[[int], object]]:
    """A call of the operator by layers, the outer ones with all that is in them; the bare launch first."""
    from einscade.compiler.operators import cascade
    from einscade.ir.text import parse_cascade
    from einscade.runtime.call import call_for
    from einscade.runtime.modules import load
    from einscade.runtime.program import Program

    program = Program("exact", parse_cascade(ATTENTION))
    inputs = _inputs(device, queries, keys)
    sizes = [1, keys, queries]
    call = call_for(program.text, inputs[0].device)
    call.run(inputs, sizes)
    kernel = list(call.kernels.values())[-1]
    run = load(kernel.chosen.source, program.cascade.name)
    named = dict(zip(kernel.chosen.symbols, sizes, strict=True))
    launches = noted_launches(lambda: run(*inputs, **named))

    def through_the_jit() -> None:
        for launcher, grid, arguments, options in launches:
            launcher.kernel[grid](*arguments, **options)

    def ours() -> None:
        for launcher, grid, arguments, options in launches:
            launcher[grid](*arguments, **options)

    found = bare(launches) | {
        "launch through the JIT": repeated(through_the_jit),
        "our launch": repeated(ours),
        "the generated run (allocates, describes, launches)": repeated(lambda: run(*inputs, **named)),
        "the prepared call": repeated(lambda: call.run(inputs, sizes)),
        "the operator": repeated(lambda: cascade(inputs, sizes, program.text)),
    }
    if training:
        leaves = [x.clone().requires_grad_() for x in inputs]
        found["the operator, for training"] = repeated(lambda: cascade(leaves, sizes, program.text))
    return found


def sites(device: torch.device, queries: int, keys: int, training: bool) -> dict[str, Callable[[int], object]]:
    """A site in an optimised model, by what compiles the rest; the bare launches of the same sites first."""
    import einscade

    inputs = [x.requires_grad_(training) for x in _inputs(device, queries, keys)]
    found: dict[str, Callable[[int], object]] = {}
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        models = {}
        for number in (FEW, MANY):
            models[number] = fast = einscade.optimize(Sites(number), inner=inner, progress=lambda done, total: None)
            launches = noted_launches(functools.partial(fast, *inputs))
            assert [s.status for s in fast.report.sites] == ["rewritten"] * number
        found |= bare(launches, MANY) if not found else {}
        found[f"a site in a model, inner {inner!r}"] = lambda n, models=models: models[n](*inputs)  # type: ignore[misc]
    return found


def modules(device: torch.device, queries: int, keys: int, training: bool) -> dict[str, Callable[[int], object]]:
    """The whole call of a module with one site, by what compiles the rest; the bare launches first."""
    inputs = [x.requires_grad_(training) for x in _inputs(device, queries, keys)]
    found = _whole("a module with one site", inputs, lambda call: call)
    empty = torch.compile(Empty(), dynamic=False)
    return found | {"a module without a site, torch.compile": repeated(lambda: empty(*inputs))}


def gradients(device: torch.device, queries: int, keys: int, training: bool) -> dict[str, Callable[[int], object]]:
    """`torch.autograd.grad` of that call's result; the bare launches first."""
    inputs = [x.requires_grad_(training) for x in _inputs(device, queries, keys)]

    def of(call: Callable[[], Tensor]) -> Callable[[], object]:
        result = call()
        return functools.partial(torch.autograd.grad, result, inputs, torch.ones_like(result), retain_graph=True)

    return _whole("the gradients of a module with one site", inputs, of)


def _whole(
    name: str, inputs: list[Tensor], of: Callable[[Callable[[], Tensor]], Callable[[], object]]
) -> dict[str, Callable[[int], object]]:
    """What `of` makes of the module's call."""
    import einscade

    found: dict[str, Callable[[int], object]] = {}
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        fast = einscade.optimize(Sites(1), inner=inner, dynamic=False, progress=lambda done, total: None)
        call = of(functools.partial(fast, *inputs))
        call()
        found |= bare(noted_launches(call)) if not found else {}
        found[f"{name}, inner {inner!r}"] = repeated(call)
        assert [s.status for s in fast.report.sites] == ["rewritten"]
    return found


def _inputs(device: torch.device, queries: int, keys: int) -> list[Tensor]:
    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, WIDTH, device=device).bfloat16()

    return [normal(HEADS, queries), normal(KEY_HEADS, keys), normal(KEY_HEADS, keys)]


def measure(stub: bool, training: bool, show: Callable[[str, dict[str, float]], None]) -> dict[str, dict[str, float]]:
    """All groups of figures, each shown as soon as it is there."""
    found: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(EINSCADE_CACHE_DIR=folder, EINSCADE_AUTOTUNE="0")
        if stub:
            from benchmarks.stub_device import hopper

            stack.enter_context(hopper())
        device = torch.device("cpu" if stub else "cuda")
        stack.enter_context(functorch_config.patch(donated_buffer=False))  # gradients are taken time and again
        for name, lengths in SITES.items():
            groups = [(f"{name}, called", layers, training)]
            for recorded in (False, True) if training else (False,):
                end = TRAINING if recorded else ""
                groups.append((f"{name}, in a model{end}", sites, recorded))
                groups.append((f"{name}, a whole call{end}", modules, recorded))
            if training and lengths[0] > 1:
                groups.append((f"{name}, gradients{TRAINING}", gradients, True))
            for title, group, recorded in groups:
                with contextlib.nullcontext() if recorded else torch.no_grad():
                    found[title] = microseconds(group(device, *lengths, recorded))
                show(title, found[title])
    return found


def bounded(title: str) -> bool:
    """Whether a group has rows that the bound is for."""
    return not title.endswith(TRAINING) and "a whole call" not in title


def over(rows: Mapping[str, float]) -> float:
    """By how much the dearest that runs without gradients is above the bare launch, which comes first."""
    asked = [v for name, v in rows.items() if name.startswith(("the operator", "a site")) and "training" not in name]
    return max(asked) - next(iter(rows.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stub", action="store_true", help="launches do nothing, also where there is a CUDA device")
    parser.add_argument("--training", action="store_true", help="also where gradients are asked for")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--commit", help="id of the commit, where there is no git")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/launch.json")
    args = parser.parse_args()
    from benchmarks import record

    if args.write:
        record.check_clean()
    env = record.environment(args.commit)
    stub = args.stub or not torch.cuda.is_available()

    def show(title: str, rows: Mapping[str, float]) -> None:
        if not args.json:
            least = next(iter(rows.values()))
            print(f"{title}: bound {BOUND:g} over Triton's launch" if bounded(title) else title)
            lines = (f"{value:8.2f}  {value - least:+8.2f}  {name}" for name, value in rows.items())
            print(*lines, sep="\n", flush=True)

    if not args.json:
        print(
            f"{'launches do nothing; ' if stub else ''}microseconds of host time, and over Triton's launch", flush=True
        )
    found = measure(stub, args.training, show)
    figures = {"launches": "do nothing" if stub else "real", "microseconds": found, "bound_over_bare": BOUND}
    if args.json:
        print(json.dumps({"environment": env, "figures": figures}, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": env, "figures": figures}, indent=1) + "\n")
    if args.write:
        print(f"written to {record.write('launch', figures, env)}", file=sys.stderr)
    return int(any(over(rows) > BOUND for title, rows in found.items() if bounded(title)))


if __name__ == "__main__":
    sys.exit(main())
