"""Kernels that live: from a raised cascade to something to call, made once per process and machine.

Comes in: a cascade, a recipe, a device and sizes. Goes out: a `Kernel`, found in this process's memory, else on disk
(passes and code generation are skipped), else made: the recipe rewrites the cascade, every emitter that can lower the
result gives a candidate, and library calls that compute the same cascade are candidates beside them.

Which candidate runs is measured on the first real inputs of each size bucket and kept on disk; `EINSCADE_AUTOTUNE=0`
takes the first, which is the cost model's choice. A candidate that fails to compile or to run is dropped with a
warning; the flat torch form, which needs nothing, is the last of them.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einscade.codegen import tiled_torch
from einscade.codegen.loops import LoopProgram, plan
from einscade.codegen.schedule import Schedule, candidates, target_of
from einscade.codegen.source import Source, Unsupported
from einscade.ir.cascade import Cascade
from einscade.ir.device import Device
from einscade.ir.expr import accesses
from einscade.ir.text import parse_cascade, print_cascade
from einscade.passes.pipeline import run
from einscade.passes.recipes import RECIPES
from einscade.runtime import cache, library_call
from einscade.runtime import device as machine
from einscade.runtime.agreement import disagreement
from einscade.runtime.library import NotInLibrary
from einscade.runtime.modules import interpreted, load
from einscade.runtime.program import MemoryOrder, Program, parse_program
from einscade.runtime.steps import StepRecord

__all__ = ["Candidate", "Kernel", "build", "kernel_for", "recompute_gradients"]

TUNING_SECONDS = 20.0
"""No more than this is spent on measuring the candidates of one kernel."""

ROUNDS = 4
"""So often are those that are close to the best timed again."""

MARGIN = 0.9
"""The cost model's choice is kept unless another is faster by more than measurements are off."""

MOST_SCHEDULES = {"gluon": 4, "triton": 8, "tiled_torch": 3}
"""So many schedules of an emitter are written out; the cost model has put the likely ones first."""

LAST_RESORTS = ("flat", "interpreter")

TRUSTED = ("library:sdpa", "tiled_torch")
"""The kinds that others are checked against before they are timed: torch's own code, then code of torch operations."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a cascade. `symbols` are the sizes that it takes.

    `kind`: "gluon", "triton", "tiled_torch", "library:sdpa", "flat" (every Einsum whole) or "interpreter".
    """

    kind: str
    source: Source
    schedule: Schedule
    symbols: tuple[str, ...]


@dataclass
class Kernel:
    """A cascade ready to run on one device, for sizes like those it was made for.

    `Kernel(inputs, sizes)` returns the outputs; `sizes` by symbol name. What it will run is `candidate`.
    """

    program: Program
    rewritten: Cascade
    steps: tuple[StepRecord, ...]
    candidates: list[Candidate]
    address: str
    from_disk: bool
    tuned: bool
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]

    @property
    def candidate(self) -> str:
        return self.chosen.kind

    @property
    def source(self) -> str:
        return self.chosen.source.text

    @property
    def schedule(self) -> Schedule:
        return self.chosen.schedule

    def __call__(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        if not self.tuned:
            self._tune(inputs, sizes)
        while True:
            try:
                return self._run(self.candidates[0], inputs, sizes)
            except Exception as error:
                self._drop(self.candidates[0], error)

    def _run(self, candidate: Candidate, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        run = load(candidate.source, self.program.cascade.name)
        return run(*inputs, **{name: sizes[name] for name in candidate.symbols})

    def _drop(self, candidate: Candidate, error: Exception) -> None:
        """Goes on without a candidate that failed; the last one's failure is the caller's."""
        if len(self.candidates) == 1 or _is_resource(error):
            raise error
        self.candidates.remove(candidate)
        _warn_once(
            f"{self.program.cascade.name}: the {candidate.kind} kernel failed "
            f"({type(error).__name__}: {_first_line(error)}); running {self.candidates[0].kind} instead"
        )

    def _tune(self, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> None:
        """Times the candidates on these inputs, the likely ones first, and keeps the order on disk."""
        self.tuned = True
        contenders = [c for c in self.candidates if c.kind not in LAST_RESORTS]
        if len(contenders) < 2 or not autotuning():
            return
        end = time.perf_counter() + TUNING_SECONDS
        timed = partial(_timed, device=inputs[0].device)
        seconds: dict[Candidate, float] = {}
        trusted = self._trusted(contenders, inputs, sizes)
        for candidate in [c for c in contenders if c in self.candidates]:
            if time.perf_counter() > end:
                break
            try:
                self._check(candidate, trusted, inputs, sizes)
                seconds[candidate] = timed(partial(self._run, candidate, inputs, sizes))
            except Exception as error:
                self._drop(candidate, error)
        for _ in range(ROUNDS):  # in turns, so that a busy moment of the machine is nobody's loss
            close = [c for c, s in seconds.items() if s <= 2 * min(seconds.values())]
            if len(close) < 2 or time.perf_counter() > end:
                break
            for candidate in close:
                again = timed(partial(self._run, candidate, inputs, sizes))
                seconds[candidate] = min(seconds[candidate], again)
        likely = next(iter(seconds), None)
        self.candidates.sort(key=lambda c: seconds.get(c, float("inf")) * (MARGIN if c == likely else 1))
        self.timings = {f"{i} {c.kind}": s for i, (c, s) in enumerate(seconds.items())}
        cache.DiskCache().put(self.address, _entry(self))

    def _trusted(
        self, contenders: Sequence[Candidate], inputs: Sequence[Tensor], sizes: Mapping[str, int]
    ) -> tuple[str, tuple[Tensor, ...]] | None:
        """The kind of the candidate that rests on least of our own, and its outputs: the others are held to them."""
        for kind in TRUSTED:
            for candidate in (c for c in contenders if c.kind == kind):
                try:
                    return kind, self._run(candidate, inputs, sizes)
                except Exception as error:
                    self._drop(candidate, error)
                break
        return None

    def _check(
        self,
        candidate: Candidate,
        trusted: tuple[str, tuple[Tensor, ...]] | None,
        inputs: Sequence[Tensor],
        sizes: Mapping[str, int],
    ) -> None:
        if trusted is None or candidate.kind == trusted[0]:
            return
        given = {t.name for t in self.rewritten.inputs}
        empty_rows = any(a.tensor in given for e in self.rewritten.body for a in accesses(e.domain))
        if wrong := disagreement(self._run(candidate, inputs, sizes), trusted[1], inputs, empty_rows):
            raise ArithmeticError(wrong)


def autotuning() -> bool:
    return os.environ.get("EINSCADE_AUTOTUNE", "1") != "0"


def build(
    cascade: Cascade, recipe: str, device: torch.device, sizes: Mapping[str, int], out_order: MemoryOrder = ()
) -> Kernel:
    """The kernel of a raised cascade under a recipe. Raises ValueError for an unknown recipe, and for a device that no
    kernels are generated for."""
    return _build(Program(recipe, cascade, out_order).text, _indexed(device), machine.bucket(sizes))


def _indexed(device: torch.device) -> torch.device:
    if not machine.supported(device):
        raise ValueError(
            f"device {device}: kernels are generated for cpu and cuda; run the model unchanged on {device.type}"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.lru_cache(maxsize=1024)
def _build(text: str, device: torch.device, bucket: tuple[tuple[str, int], ...]) -> Kernel:
    program = parse_program(text)
    address = cache.key(
        {
            "program": text,
            "device": machine.describe(device),
            "versions": machine.versions(),
            "sizes": bucket,
            "autotune": autotuning(),
        }
    )
    entry = cache.DiskCache().get(address)
    if entry is not None:
        return _from_entry(program, entry, address)
    kernel = _make(program, device, dict(bucket), address)
    cache.DiskCache().put(address, _entry(kernel))
    return kernel


def _make(program: Program, device: torch.device, sizes: Mapping[str, int], address: str) -> Kernel:
    rewritten, steps = _rewrite(program)
    candidates = _candidates(program, rewritten, steps, device, sizes)
    return Kernel(program, rewritten, steps, candidates, address, from_disk=False, tuned=False)


@functools.lru_cache(maxsize=256)
def _rewrite(program: Program) -> tuple[Cascade, tuple[StepRecord, ...]]:
    try:
        result = run(program.cascade, program.recipe)
    except Exception as error:  # a pass that breaks on a cascade costs its speed, not its result
        if program.recipe not in RECIPES:
            raise
        _warn_once(f"{program.cascade.name}: rewriting failed ({type(error).__name__}: {_first_line(error)})")
        return program.cascade, ()
    steps = tuple(
        StepRecord(s.name, s.identity, print_cascade(s.before), print_cascade(s.after), s.reason) for s in result.steps
    )
    return result.cascade, steps


def _candidates(
    program: Program,
    rewritten: Cascade,
    steps: Sequence[StepRecord],
    device: torch.device,
    sizes: Mapping[str, int],
) -> list[Candidate]:
    """Every way to run the program, the cost model's choice first, the flat form last.

    On a GPU generated kernels come before library calls, on a CPU after them: torch's own kernel is compiled code
    there, ours is a loop of torch operations.
    """
    described = Device.of(device)
    loops = plan(rewritten)
    orders = _renamed_orders(program, rewritten)
    calls = _library_calls(program, steps)
    generated = [c for kind in _emitters(described) for c in _generated(kind, loops, orders, described, sizes)]
    if not generated:
        generated = _generated("tiled_torch", loops, orders, described, sizes)
    found = [*calls, *generated] if device.type == "cpu" else [*generated, *calls]
    found += _last_resorts(program.cascade, Schedule(target=target_of(described)))
    return list(dict.fromkeys(found))


def _emitters(device: Device) -> tuple[str, ...]:
    """The emitters for a device, the ones that know most of it first; tiled torch is what all others fall back to."""
    if device.kind == "cpu":
        return ("tiled_torch",)
    hopper = device.kind == "cuda" and device.capability[0] == 9
    return ("gluon", "triton") if hopper else ("triton",)


def _last_resorts(cascade: Cascade, schedule: Schedule) -> list[Candidate]:
    """One Einsum after another, whole; and should even that fail, the reference interpreter."""
    interpreter = Candidate("interpreter", interpreted(cascade), schedule, cascade.symbols)
    try:
        return [Candidate("flat", tiled_torch.emit_flat(cascade), schedule, cascade.symbols), interpreter]
    except Unsupported:
        return [interpreter]


def _generated(
    kind: str, loops: LoopProgram, orders: MemoryOrder, device: Device, sizes: Mapping[str, int]
) -> list[Candidate]:
    """What an emitter makes of a loop program, one candidate per schedule; nothing where it cannot lower it."""
    if kind == "gluon":
        from einscade.codegen.gluon import emit, schedules
    elif kind == "triton":
        from einscade.codegen.triton_emit import emit
    else:
        from einscade.codegen.tiled_torch import emit
    found = []
    try:
        tried = schedules(loops) if kind == "gluon" else candidates(loops, device, sizes)
        for schedule in tried[: MOST_SCHEDULES[kind]]:
            schedule = replace(schedule, out_order=orders)
            tiles = dict(schedule.tiles)
            symbols = tuple(s for s in loops.cascade.symbols if s not in tiles)
            found.append(Candidate(kind, emit(loops, schedule), schedule, symbols))
    except Unsupported:
        pass
    except Exception as error:  # an emitter that breaks on a program costs its speed, not its result
        _warn_once(f"{loops.cascade.name}: the {kind} emitter failed ({type(error).__name__}: {_first_line(error)})")
    return found


def _library_calls(program: Program, steps: Sequence[StepRecord]) -> list[Candidate]:
    """The library call that computes the program, if one does: recognised on the raised cascade or on a later form."""
    for cascade in [program.cascade, *(parse_cascade(s.after) for s in steps if s.changed)]:
        try:
            return [Candidate("library:sdpa", library_call.emit(cascade), Schedule(), cascade.symbols)]
        except NotInLibrary:
            continue
    return []


def _renamed_orders(program: Program, rewritten: Cascade) -> MemoryOrder:
    """The program's memory orders in the names that outputs and their ranks have after rewriting."""
    orders = []
    for name, ranks in program.out_order:
        new = rewritten.outputs[program.cascade.outputs.index(name)]
        names = dict(zip(program.cascade.tensors[name].ranks, rewritten.tensors[new].ranks, strict=True))
        orders.append((new, tuple(names[r] for r in ranks)))
    return tuple(orders)


# --- on disk ---------------------------------------------------------------------------------------------------------


def _entry(kernel: Kernel) -> dict[str, Any]:
    return {
        "rewritten": print_cascade(kernel.rewritten),
        "steps": [asdict(s) for s in kernel.steps],
        "candidates": [asdict(c) for c in kernel.candidates],
        "tuned": kernel.tuned,
        "timings": kernel.timings,
    }


def _from_entry(program: Program, entry: Mapping[str, Any], address: str) -> Kernel:
    candidates = [
        Candidate(
            c["kind"],
            Source(**c["source"]),
            Schedule(**{k: _tuples(v) for k, v in c["schedule"].items()}),
            tuple(c["symbols"]),
        )
        for c in entry["candidates"]
    ]
    steps = tuple(StepRecord(**s) for s in entry["steps"])
    return Kernel(
        program, parse_cascade(entry["rewritten"]), steps, candidates, address, from_disk=True,
        tuned=entry["tuned"], timings=dict(entry["timings"]),
    )  # fmt: skip


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


# --- running ---------------------------------------------------------------------------------------------------------

_ready: dict[tuple[Any, ...], Callable[[Sequence[Tensor]], list[Tensor]]] = {}


def kernel_for(
    program: str, inputs: Sequence[Tensor], sizes: tuple[int, ...]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs `program` on inputs of these sizes: one dictionary lookup after the first call."""
    key = (program, inputs[0].device, sizes)
    ready = _ready.get(key)
    if ready is None:
        if len(_ready) > 8192:
            _ready.clear()
        ready = _ready[key] = _prepare(parse_program(program), inputs, sizes)
    return ready


def _prepare(
    program: Program, inputs: Sequence[Tensor], sizes: tuple[int, ...]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    named = program.named_sizes(sizes)
    program.check(inputs, named)
    device = _indexed(inputs[0].device)
    layouts = [(tuple(shape), tuple(strides)) for shape, strides, _ in program.outputs(named)]
    if program.is_empty(named):
        return partial(_run_empty, program, named)
    kernel = build(program.cascade, program.recipe, device, named, program.out_order)
    device_type = device.type

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                outputs = kernel(inputs, named)
        else:
            outputs = kernel(inputs, named)
        return [_laid_out(out, *layout) for out, layout in zip(outputs, layouts, strict=True)]

    return run


def _laid_out(out: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The output with the strides that the graph was promised."""
    if out.stride() == strides and out.shape == shape:
        return out
    if out.shape != shape:
        raise RuntimeError(f"a kernel returned shape {tuple(out.shape)}, expected {shape}")
    if all(n <= 1 or a == b for n, a, b in zip(shape, out.stride(), strides, strict=True)):
        return out.as_strided(shape, strides)  # they differ where there is nothing to step over
    return torch.empty_strided(shape, strides, dtype=out.dtype, device=out.device).copy_(out)


def _run_empty(program: Program, sizes: Mapping[str, int], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Where a rank has no points at all there is next to nothing to compute: the interpreter's definition holds."""
    from einscade.ir.interpret import interpret

    names = [t.name for t in program.cascade.inputs]
    results = interpret(program.cascade, dict(zip(names, inputs, strict=True)), sizes)
    made = []
    for name, (shape, strides, dtype) in zip(program.cascade.outputs, program.outputs(sizes), strict=True):
        made.append(torch.empty_strided(shape, strides, dtype=dtype, device=inputs[0].device).copy_(results[name]))
    return made


@functools.lru_cache(maxsize=256)
def _flat(text: str) -> Callable[..., tuple[Tensor, ...]]:
    program = parse_program(text)
    return load(tiled_torch.emit_flat(program.cascade), program.cascade.name)


def recompute_gradients(
    program: str,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    sizes: Sequence[int],
) -> list[Tensor]:
    """Gradients of the needed inputs: the cascade's flat form, run again under autograd."""
    named = parse_program(program).named_sizes(sizes)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, needed, strict=True)]
        outputs = _flat(program)(*leaves, **named)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x in leaves if x.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(x, memory_format=torch.contiguous_format) if g is None else g.contiguous()
            for x, g in zip(wanted, found, strict=True)]  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call that is warm."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3


def _is_resource(error: Exception) -> bool:
    """Out of memory is not a broken kernel: another form would need more."""
    return isinstance(error, torch.OutOfMemoryError)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"einscade: {message}", RuntimeWarning, stacklevel=5)
