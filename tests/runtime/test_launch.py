"""Launches without the JIT: the C function gets what the JIT would give it, for every kernel and alignment, and nothing
is computed twice. A stub stands for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from benchmarks.stub_device import hopper
from einscade.codegen import gluon, triton_emit
from einscade.codegen.loops import plan
from einscade.codegen.schedule import candidates
from einscade.codegen.source import Source
from einscade.ir.device import A100, H200
from einscade.runtime import launch
from einscade.runtime.modules import load
from tests.codegen.cascades import CASES, cascade

BY_NAME = {c.name: c for c in CASES}
SHAPE = {"dtype": "bf16", "h": 4, "g": 2, "e": 64, "f": 64}


@pytest.fixture
def launched() -> Iterator[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    launch._direct_launches.cache_clear()
    with hopper(calls):
        yield calls
    launch._direct_launches.cache_clear()


def _source(kind: str) -> Source:
    loops = plan(cascade(BY_NAME["causal"], **SHAPE)[1])
    if kind == "gluon":
        return gluon.emit(loops, gluon.schedules(loops)[0])
    device = A100 if kind == "triton, no descriptors" else H200
    return triton_emit.emit(loops, candidates(loops, device, {})[0])


def _inputs(n: int, offset: int = 0) -> tuple[Tensor, ...]:
    def normal(heads: int) -> Tensor:
        whole = torch.randn(heads * n * 64 + offset).bfloat16()
        return whole[offset:].view(1, heads, n, 64)

    return normal(4), normal(2), normal(2)


def _launchers(run: Callable[..., Any]) -> list[launch.Launcher]:
    return [x for x in run.__globals__.values() if isinstance(x, launch.Launcher)]


def _through_the_jit(run: Callable[..., Any], inputs: tuple[Tensor, ...], n: int) -> None:
    for launcher in _launchers(run):
        launcher._forms.clear()
    run(*inputs, B=1, M=n, P=n)


def _without_output(call: tuple[Any, ...], inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What is passed, but hooks, the output's address, which differs, and the inputs as addresses."""
    known = {x.data_ptr() for x in inputs}

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            x = x.data_ptr()
        if isinstance(x, tuple):
            return tuple(map(plain, x))
        return "address" if isinstance(x, int) and x > 1 << 32 and x not in known else x

    head, rest = call[:10], call[13:]
    constants = [i for i, x in enumerate(rest) if isinstance(x, bool) or x is None]  # compiled in
    return tuple(map(plain, head)), tuple(plain(x) for i, x in enumerate(rest) if i not in constants)


@pytest.mark.parametrize("kind", ["gluon", "triton", "triton, no descriptors"])
def test_a_launch_passes_what_the_jit_passes(kind: str, launched: list[tuple[Any, ...]]) -> None:
    run = load(_source(kind), "causal")
    for n, offset in ((256, 0), (250, 0), (250, 1), (1, 0), (257, 0), (256, 0)):
        inputs = _inputs(n, offset)
        _through_the_jit(run, inputs, n)
        run(*inputs, B=1, M=n, P=n)
        through_the_jit, direct = launched[-2:]
        assert direct[10:13] == (None, None, None)
        assert _without_output(direct, inputs) == _without_output(through_the_jit, inputs), (n, offset)
