"""Kernels that live: from a raised cascade to something to call, made once per process and machine.

Comes in: a cascade, a recipe, a device and sizes. Goes out: a `Kernel`, found in this process's memory, else on disk
(passes and code generation are skipped), else made: the recipe rewrites the cascade and `candidates` lists every way to
run the result.

The first call of a kernel measures them (`tuning`) and keeps the order on disk. A candidate that fails to compile, to
run or to agree is dropped with a warning; what needs nothing is the last of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.ir.cascade import Cascade
from einscade.ir.device import Device
from einscade.ir.expr import accesses
from einscade.ir.text import parse_cascade, print_cascade
from einscade.passes.pipeline import run
from einscade.passes.recipes import RECIPES
from einscade.runtime import cache, launch, progress, tuning
from einscade.runtime import device as machine
from einscade.runtime.candidates import LAST_RESORTS, Candidate, candidates, reference
from einscade.runtime.messages import first_line, warn_once
from einscade.runtime.modules import load
from einscade.runtime.program import Derivation, MemoryOrder, Program, parse_program
from einscade.runtime.steps import StepRecord
from einscade.runtime.tuning import Timing

__all__ = ["Kernel", "build"]

Run = Callable[[Sequence[Tensor], Sequence[int]], tuple[Tensor, ...]]


@dataclass
class Kernel:
    """A cascade ready to run on one device, for sizes like those it was made for. `form` is the rewritten cascade as
    text: a warm process has no other use for it.

    `Kernel(inputs, sizes)` returns the outputs; `sizes` in the order of the cascade's symbols. What it will run is
    `candidate`. Where it was tuned, `timings` has what was measured, in the cost model's order, `untried` how many
    candidates there was no time or memory for, and `spent` the seconds for compiling and for measuring.
    """

    program: Program
    form: str
    steps: tuple[StepRecord, ...]
    candidates: list[Candidate]
    address: str
    from_disk: bool
    tuned: bool
    timings: tuple[Timing, ...] = ()
    untried: int = 0
    spent: tuple[float, float] = (0.0, 0.0)
    _ready: Run | None = None

    @functools.cached_property
    def rewritten(self) -> Cascade:
        return parse_cascade(self.form)

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

    @property
    def library_call(self) -> Callable[..., tuple[Tensor, ...]] | None:
        """The entry of the generated module that calls torch's library, where there is nothing else to choose from."""
        if self.candidate != "library:sdpa" or any(c.kind not in LAST_RESORTS for c in self.candidates[1:]):
            return None
        return load(self.chosen.source, self.program.cascade.name)

    def __call__(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, ...]:
        if not self.tuned and not _capturing(inputs[0].device):
            self._tune(inputs, sizes)
        while True:
            try:
                ready = self._ready
                if ready is None:
                    ready = self._ready = self.prepared(self.chosen)
                return ready(inputs, sizes)
            except torch.OutOfMemoryError:
                raise  # no broken kernel: another form would need more
            except Exception as error:
                if len(self.candidates) == 1:
                    raise
                self._drop(self.chosen, error)

    def prepared(self, candidate: Candidate) -> Run:
        """What runs a candidate."""
        symbols = self.program.cascade.symbols
        named = "".join(f", {name}=sizes[{symbols.index(name)}]" for name in candidate.symbols)
        run = load(candidate.source, self.program.cascade.name)
        return eval(f"lambda inputs, sizes: run(*inputs{named})", {"run": run})

    def compilations(
        self, candidate: Candidate, inputs: Sequence[Tensor], sizes: Sequence[int]
    ) -> list[Callable[[], object]]:
        """What compiles each of a candidate's kernels for these inputs."""
        if candidate.source.language != "triton":
            return []
        known = dict(zip(self.program.cascade.symbols, sizes, strict=True))
        run = load(candidate.source, self.program.cascade.name)
        with torch.no_grad():
            return launch.compilations(run, inputs, {name: known[name] for name in candidate.symbols})

    def _drop(self, candidate: Candidate, error: Exception) -> None:
        """Goes on without a candidate that failed."""
        self._ready = None
        self.candidates.remove(candidate)
        following = "another schedule" if self.candidate == candidate.kind else self.candidate
        warn_once(
            f"{self.program.cascade.name}: the {candidate.kind} kernel failed ({first_line(error)}); "
            f"running {following} instead"
        )

    def _tune(self, inputs: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Measures the candidates on these inputs and keeps the order on disk."""
        self.tuned = True
        if not tuning.enabled():
            return
        given = {t.name for t in self.rewritten.inputs}
        empty_rows = any(a.tensor in given for e in self.rewritten.body for a in accesses(e.domain))
        derived = self.program.derived
        adjoints = {adjoint for _, adjoint in derived.adjoints} if derived else set()
        found = tuning.tune(
            self.program.cascade.name,
            self.candidates,
            lambda c: self.prepared(c)(inputs, sizes),
            lambda c: self.compilations(c, inputs, sizes),
            inputs,
            empty_rows,
            [i for i, t in enumerate(self.program.cascade.inputs) if t.name in adjoints],
            None if tuning.has_trusted(self.candidates) else self._reference(sizes),
        )
        progress.finish()
        self._ready = None
        self.timings, self.spent = found.timings(self.candidates), (found.compiling, found.measuring)
        known = len(found.seconds) + len(found.failures)
        self.untried = max(0, len(tuning.contenders(self.candidates)) - known) if found.seconds else 0
        self.candidates[:] = [*found.order, *found.failures]
        for candidate, error in found.failures.items():
            self._drop(candidate, error)
        cache.DiskCache().put(self.address, _entry(self))

    def _reference(self, sizes: Sequence[int]) -> Candidate | None:
        """What the candidates are held to where none of them rests on torch's operations alone."""
        if len(tuning.contenders(self.candidates)) < 2:
            return None
        try:
            return reference(self.program, self.rewritten, dict(zip(self.program.cascade.symbols, sizes, strict=True)))
        except Exception as error:  # it costs the check, not the result
            warn_once(f"{self.program.cascade.name}: candidates are not checked ({first_line(error)})")
            return None


def _capturing(device: torch.device) -> bool:
    """Whether calls are being recorded for a CUDA graph: nothing may be measured or waited for then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def build(
    cascade: Cascade,
    recipe: str,
    device: torch.device,
    sizes: Mapping[str, int],
    out_order: MemoryOrder = (),
    derived: Derivation | None = None,
) -> Kernel:
    """The kernel of a raised cascade under a recipe; `out_order` and `derived` as in `Program`. Raises ValueError for
    an unknown recipe, and for a device that no kernels are generated for. Under
    `torch.use_deterministic_algorithms(True)` it is one whose results do not depend on the order in which programs
    run."""
    text = Program(recipe, cascade, out_order, derived).text
    return _build(text, machine.indexed(device), machine.bucket(sizes), torch.are_deterministic_algorithms_enabled())


@functools.lru_cache(maxsize=1024)
def _build(text: str, device: torch.device, bucket: tuple[tuple[str, int], ...], deterministic: bool) -> Kernel:
    program = parse_program(text)
    address = cache.key(
        {
            "program": text,
            "device": machine.describe(device),
            "versions": machine.versions(),
            "sizes": bucket,
            "autotune": tuning.enabled(),
            "deterministic": deterministic,
        }
    )
    entry = cache.DiskCache().get(address)
    if entry is not None and (known := _from_entry(program, entry, address)) is not None:
        return known
    kernel = _make(program, device, dict(bucket), address, deterministic)
    cache.DiskCache().put(address, _entry(kernel))
    return kernel


def _make(
    program: Program, device: torch.device, sizes: Mapping[str, int], address: str, deterministic: bool
) -> Kernel:
    rewritten, steps = _rewrite(program)
    found = candidates(program, rewritten, steps, Device.of(device), sizes, deterministic)
    return Kernel(program, print_cascade(rewritten), steps, found, address, from_disk=False, tuned=False)


@functools.lru_cache(maxsize=256)
def _rewrite(program: Program) -> tuple[Cascade, tuple[StepRecord, ...]]:
    try:
        result = run(program.cascade, program.recipe)
    except Exception as error:  # a pass that breaks on a cascade costs its speed, not its result
        if program.recipe not in RECIPES:
            raise
        warn_once(f"{program.cascade.name}: rewriting failed ({first_line(error)})")
        return program.cascade, ()
    steps = tuple(
        StepRecord(s.name, s.identity, print_cascade(s.before), print_cascade(s.after), s.reason) for s in result.steps
    )
    return result.cascade, steps


# --- on disk ---------------------------------------------------------------------------------------------------------


def _entry(kernel: Kernel) -> dict[str, Any]:
    return {
        "rewritten": kernel.form,
        "steps": [asdict(s) for s in kernel.steps],
        "candidates": [asdict(c) for c in kernel.candidates],
        "tuned": kernel.tuned,
        "timings": [asdict(t) for t in kernel.timings],
        "untried": kernel.untried,
        "spent": kernel.spent,
    }


def _from_entry(program: Program, entry: Mapping[str, Any], address: str) -> Kernel | None:
    """The kernel of an entry; None where the entry is whole but not one that `_entry` makes."""
    try:
        found = [
            Candidate(
                c["kind"],
                Source(**c["source"]),
                _schedule(c["schedule"]),
                tuple(c["symbols"]),
            )
            for c in entry["candidates"]
        ]
        steps = tuple(StepRecord(**s) for s in entry["steps"])
        timings = tuple(
            Timing(t["rank"], t["kind"], _schedule(t["schedule"]), float(t["seconds"])) for t in entry["timings"]
        )
        compiling, measuring = entry["spent"]
        form, tuned, untried = entry["rewritten"], bool(entry["tuned"]), int(entry["untried"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    if not found or not isinstance(form, str):
        return None
    return Kernel(program, form, steps, found, address, True, tuned, timings, untried, (compiling, measuring))


def _schedule(fields: Mapping[str, Any]) -> Schedule:
    return Schedule(**{k: _tuples(v) for k, v in fields.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
