"""Kernels of one module that overlap: a later one is launched while the one before it still runs.

Comes in: a schedule's target. Goes out: whether it can do that, and the lines of a kernel that does. NVIDIA calls it
programmatic dependent launch (from Hopper on): a kernel that is launched so comes on chip where there is room once all
programs of the one before have said `GO`, prepares itself, and waits there (`WAIT`) until that one has ended and what
it wrote can be seen. A kernel that is launched so waits before it reads or writes any memory: having waited for a
kernel is then having waited for all before it, and nothing is written that they still read.
"""

from __future__ import annotations

import os

__all__ = ["GLUON_GO", "GLUON_WAIT", "GO", "IMPORT", "OPTION", "WAIT", "overlaps"]

IMPORT = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
GO = "gdc_launch_dependents()  # the next kernel comes on chip where there is room, and waits"
WAIT = "gdc_wait()  # until the kernels before this one have ended"
OPTION = "launch_pdl=True"


def overlaps(target: str) -> bool:
    """Whether kernels for a schedule's target ("cuda:90") can. Triton's interpreter (TRITON_INTERPRET=1) runs one
    kernel after another and has neither instruction."""
    kind, _, capability = target.partition(":")
    return kind == "cuda" and int(capability) >= 90 and os.environ.get("TRITON_INTERPRET") != "1"


def _gluon(line: str, instruction: str) -> str:
    """The same in Gluon, which has no function for it."""
    assembly = f'"griddepcontrol.{instruction}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1'
    return f"#{line.partition('#')[2]}\ngl.inline_asm_elementwise(\n    {assembly}\n)"


GLUON_GO, GLUON_WAIT = _gluon(GO, "launch_dependents"), _gluon(WAIT, "wait")
