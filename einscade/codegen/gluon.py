"""The Gluon emitter: a loop program as warp-specialised kernels for Hopper (compute capability 9.0).

Comes in: a `LoopProgram` whose serial nests are products, what lies between them, and weighted sums (`gluon_form`), and
a `Schedule`. Goes out: `Source` in "triton", a module that imports on its own. A program of one nest is one kernel,
`gluon_overlap`'s (of windows `gluon_halves`'), `gluon_joined`'s or one in order (`gluon_passes`), as the schedule
says; one of several is `gluon_program`'s.

Schedule: the tile of the long row rank is 64 a warpgroup; the serial tile is the ring's; `stages` is its depth.
"""

from __future__ import annotations

from collections.abc import Mapping

from einscade.codegen import gluon_program, gluon_schedules
from einscade.codegen.gluon_anchored import Anchored, AnchoredJoined
from einscade.codegen.gluon_form import form
from einscade.codegen.gluon_halves import Halved, halved
from einscade.codegen.gluon_joined import Joined
from einscade.codegen.gluon_overlap import Overlapped
from einscade.codegen.gluon_passes import in_order
from einscade.codegen.loops import LoopProgram
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.ir.device import Device

__all__ = ["emit", "schedules"]


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's module. Raises `Unsupported` where a nest or the schedule does not fit the kernel."""
    if len(program.nests) != 1:
        return gluon_program.emit(program, schedule)
    shape = form(program)
    if schedule.anchored:
        return Source("triton", (AnchoredJoined if schedule.joined else Anchored)(shape, schedule).text())
    apart = Halved if halved(shape, schedule) else Overlapped
    kernel = in_order if schedule.in_order else Joined if schedule.joined else apart
    return Source("triton", kernel(shape, schedule).text())


def schedules(
    program: LoopProgram, device: Device | None = None, sizes: Mapping[str, int] | None = None
) -> tuple[Schedule, ...]:
    """Schedules for the program, best guess first, where a device and sizes are given for these. Raises `Unsupported`
    as `emit` does, and where the sizes are too small for the kernel."""
    if len(program.nests) != 1:
        return gluon_program.schedules(program, device, sizes)
    return gluon_schedules.schedules(form(program), device, sizes)
