"""What was found in a model, what was done with it, and why not where nothing was done.

`Report.sites` is for programs; `print(report)` fits one screen: sites that are alike (thirty layers) are one paragraph
with the cascade, the rewrites with their pass counts, the kernel and the way gradients are computed. Where many differ
(a pyramid of resolutions), each kind is one line, and `report.details()` has the paragraphs.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from einscade.compiler.operators import gradient_of
from einscade.ir.cascade import Cascade
from einscade.runtime.call import prepared
from einscade.runtime.kernels import Kernel, build
from einscade.runtime.program import Program
from einscade.runtime.steps import StepRecord, measures

__all__ = ["REWRITTEN", "UNCHANGED", "Report", "Site"]

REWRITTEN, UNCHANGED = "rewritten", "unchanged"
MOST_PARAGRAPHS = 4
"""With more kinds of sites than this, each is a line."""


@dataclass
class Site:
    """One place where attention was found. `module_path` as in `named_modules()`, `source` as `file.py:line`.

    `status` is "rewritten" or "unchanged"; `reason` says why unchanged, or why no kernel for a GPU can be written for a
    rewritten one. `cascade`, `rewritten`, `steps` and `kernel` are None (empty) where no cascade could be raised.
    """

    module_path: str
    source: str
    status: str
    reason: str | None
    program: Program | None = None
    device: torch.device | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    differentiable: tuple[bool, ...] = ()
    frame: int | None = None

    @property
    def place(self) -> tuple[int | None, str, str]:
        """What two compilations of one place have in common: the traced frame, the module, the line."""
        return self.frame, self.module_path, self.source

    @property
    def cascade(self) -> Cascade | None:
        """The cascade as it was raised from the graph."""
        return None if self.program is None else self.program.cascade

    @cached_property
    def kernel(self) -> Kernel | None:
        """The kernel for the sizes at which the model was captured."""
        if self.program is None or self.device is None:
            return None
        return build(self.program.cascade, self.program.recipe, self.device, dict(self.sizes), self.program.out_order)

    @property
    def rewritten(self) -> Cascade | None:
        """The cascade after the recipe's rewrites."""
        return None if self.kernel is None else self.kernel.rewritten

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        return () if self.kernel is None else self.kernel.steps

    @property
    def gradients(self) -> str | None:
        """How gradients are computed; None where none were asked for."""
        if self.program is None or self.status != REWRITTEN or not any(self.differentiable):
            return None
        plan = gradient_of(self.program.text, self.differentiable)
        return plan.strategy + (f" ({plan.reason})" if plan.reason else "")

    @property
    def gradient_kernels(self) -> tuple[Kernel, ...]:
        """The kernels that have made gradients so far, one for each bucket of sizes."""
        if self.program is None or self.gradients is None:
            return ()
        backward = gradient_of(self.program.text, self.differentiable).backward
        calls = [c for c in prepared() if c.program == backward and c.device == self.device]
        return tuple(kernel for c in calls for kernel in c.kernels.values())


@dataclass
class Report:
    """Of one optimised model. Filled as graphs are compiled; empty until the first call."""

    recipe: str
    inner: str
    sites: list[Site] = field(default_factory=list)
    graphs: int = 0
    unchanged_graphs: list[str] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, sites: Sequence[Site], unchanged: str | None = None) -> None:
        """The sites of one more graph. A place compiled again (for other shapes, for training) is told once, as it is
        now. `unchanged`: why the graph as a whole was left alone."""
        with self._lock:
            again = {s.place for s in sites}
            self.sites[:] = [s for s in self.sites if s.place not in again] + list(sites)
            self.graphs += 1
            if unchanged is not None and unchanged not in self.unchanged_graphs:
                self.unchanged_graphs.append(unchanged)

    def __deepcopy__(self, memo: object) -> Report:
        return Report(self.recipe, self.inner)

    def __reduce__(self) -> tuple[object, ...]:
        loaded = "this model was loaded, as the plain model: pass it to einscade.optimize again"
        return Report, (self.recipe, self.inner, [], 0, [loaded])

    def __str__(self) -> str:
        return _printable("\n".join(_lines(self, MOST_PARAGRAPHS)))

    def details(self) -> str:
        """What `print(report)` shows, with a paragraph for each kind of site, however many there are."""
        return _printable("\n".join(_lines(self, len(self.sites))))


def _printable(text: str) -> str:
    """The text in characters that standard output has: a C locale or an old console must not make printing fail."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for character, plain in (("·", "|"), ("→", "->"), ("×", "x"), ("…", "...")):
            text = text.replace(character, plain)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def _lines(report: Report, most: int) -> Iterable[str]:
    done = sum(s.status == REWRITTEN for s in report.sites)
    graphs = f"{report.graphs} graph{'s' * (report.graphs != 1)}"
    how = f"recipe {report.recipe}, rest by {report.inner}"
    yield f"einscade: {done} of {len(report.sites)} attention sites rewritten · {graphs} · {how}"
    if not report.graphs and not report.unchanged_graphs:
        yield "  nothing was compiled yet: call the model once"
        yield "  (called, it had no graph that Dynamo could trace: TORCH_LOGS=graph_breaks says where that stopped)"
    groups = _alike(report.sites)
    if len(groups) <= most:
        for group in groups:
            yield ""
            yield from _group(group)
    else:
        yield ""
        yield from map(_summary, groups)
        yield f"{len(groups)} kinds of sites: print(report.details()) shows the cascade and the rewrites of each"
    if report.breaks:
        yield ""
        yield f"graph breaks: {len(report.breaks)}"
        yield from (f"  {b}" for b in report.breaks[:4])
    if report.unchanged_graphs:
        yield ""
        yield "graphs left as they were:"
        yield from (f"  {reason}" for reason in report.unchanged_graphs[:4])


def _alike(sites: Sequence[Site]) -> list[list[Site]]:
    groups: dict[object, list[Site]] = {}
    for site in sites:
        key = (site.source, site.status, site.reason, site.program, site.device, site.differentiable)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _head(sites: list[Site]) -> str:
    times = f" ×{len(sites)}" if len(sites) > 1 else ""
    return f"{_paths([s.module_path for s in sites])}{times}  {sites[0].source}  {sites[0].status}"


def _summary(sites: list[Site]) -> str:
    """Sites that are alike, as one line."""
    site = sites[0]
    kernel = f" · {site.kernel.candidate}" if site.kernel is not None else ""
    reason = f" · because: {site.reason}" if site.reason else ""
    return f"{_head(sites)}{kernel}{reason}"


def _group(sites: list[Site]) -> Iterable[str]:
    """Sites that are alike, as a paragraph."""
    site = sites[0]
    yield _head(sites)
    if site.reason:
        yield f"  because: {site.reason}"
    if site.cascade is None:
        return
    yield from (f"  {line}" for line in str(site.cascade).splitlines())
    kernel = site.kernel
    if kernel is None:
        return
    applied = [s for s in kernel.steps if s.changed]
    if applied:
        count = [measures(site.cascade).most_passes, *(s.measures_after.most_passes for s in applied)]
        arrow = " → ".join([str(count[0])] + [f"{s.name} {n}" for s, n in zip(applied, count[1:], strict=True)])
        yield f"  passes over the longest rank: {arrow}"
    skipped = [f"{s.name} ({s.reason})" for s in kernel.steps if not s.changed]
    if skipped:
        yield f"  did not apply: {'; '.join(skipped)}"
    yield f"  kernel: {_kernel(kernel)}"
    if site.gradients:
        yield f"  gradients: {site.gradients}"
        yield from (f"  gradients' kernel: {_kernel(k)}" for k in site.gradient_kernels)


def _kernel(kernel: Kernel) -> str:
    chosen = kernel.chosen
    parts = [chosen.kind]
    if chosen.schedule.tiles:
        parts.append(" ".join(f"{name}={n}" for name, n in chosen.schedule.tiles))
    if kernel.timings:
        best: dict[str, float] = {}
        for t in kernel.timings:
            best[t.kind] = min(t.seconds, best.get(t.kind, t.seconds))
        parts.append("measured " + ", ".join(f"{kind} {1e3 * s:.2f} ms" for kind, s in best.items()))
    if kernel.untried:
        parts.append(f"no time or memory to measure {kernel.untried} more")
    if kernel.from_disk:
        parts.append("from the disk cache")
    return " · ".join(parts)


def _paths(paths: list[str]) -> str:
    """`model.layers.0-29.self_attn` for paths that differ in one number."""
    if len(set(paths)) == 1:
        return paths[0] or "(top level)"
    split = [re.split(r"(\d+)", p) for p in paths]
    if len({len(s) for s in split}) == 1:
        differing = [i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
        if len(differing) == 1 and all(s[differing[0]].isdigit() for s in split):
            numbers = sorted({int(s[differing[0]]) for s in split})
            return "".join([*split[0][: differing[0]], _ranges(numbers), *split[0][differing[0] + 1 :]])
    return f"{paths[0]} … {paths[-1]}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
