"""Random cascades, and their gradients, through the plan and the tiled torch emitter, against the interpreter.

The kernels compute in float64 here, so that what differs by more than rounding is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import LoopProgram, flat, plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.tiled_torch import emit
from einscade.compiler.gradients import scan_free
from einscade.ir import Cascade, Tensor
from einscade.ir.interpret import interpret
from einscade.passes.differentiate import differentiate
from einscade.passes.pipeline import run
from tests.codegen.generated import module
from tests.strategies import Case, attention, cascades, reductions, selections

RELAXED = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
DIFFERENTIABLE = attention(
    normalisers=("softmax", "softmax, weights apart", "softmax and log-sum-exp", "no maximum", "sigmoid", "sink")
)


def in_double(cascade: Cascade) -> Cascade:
    """The cascade with every float stored as float64."""

    def wide(t: Tensor) -> Tensor:
        return replace(t, dtype="f64") if t.dtype in ("f32", "f16", "bf16") else t

    body = tuple(s.replace(output=wide(s.output)) for s in cascade.body)
    return cascade.replace(inputs=tuple(map(wide, cascade.inputs)), body=body)


def assert_kernel(
    program: LoopProgram, values: Mapping[str, torch.Tensor], sizes: Mapping[str, int], tile: int
) -> None:
    """The generated code gives what the interpreter gives for the program's cascade."""
    cascade = program.cascade
    known = {s: sizes.get(s, tile) for s in cascade.symbols}
    inputs = [values[t.name] for t in cascade.inputs]
    kernel = module(emit(program, Schedule(tiles=tuple((s, tile) for s in sorted(tile_symbols(program))))))
    expected = interpret(cascade, dict(zip((t.name for t in cascade.inputs), inputs, strict=True)), known)
    actual = kernel.run(*inputs, **{s: n for s, n in sizes.items() if s in cascade.symbols})
    for name, got in zip(cascade.outputs, actual, strict=True):
        torch.testing.assert_close(
            got, expected[name], rtol=1e-8, atol=1e-9, equal_nan=True, check_dtype=False, msg=f"{name} of\n{cascade}"
        )


def doubled(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in values.items()}


@RELAXED
@given(case=cascades(), strided=st.booleans())
def test_whole(case: Case, strided: bool) -> None:
    cascade = in_double(case.cascade)
    assert_kernel(flat(cascade), doubled(case.inputs(strided=strided)), case.sizes, 1)


@RELAXED
@given(case=st.one_of(attention(), reductions(), selections()), tile=st.integers(1, 5), strided=st.booleans())
def test_in_loops(case: Case, tile: int, strided: bool) -> None:
    cascade = in_double(case.cascade)
    rewritten = run(cascade, "exact").cascade
    values = doubled(case.inputs(strided=strided))
    named = {new.name: values[old.name] for old, new in zip(cascade.inputs, rewritten.inputs, strict=True)}
    assert_kernel(plan(rewritten), named, case.sizes, tile)


@settings(RELAXED, max_examples=15)  # one takes a second
@given(case=DIFFERENTIABLE, tile=st.integers(1, 5), sink=st.sampled_from([1, 1000]))
@pytest.mark.parametrize("looped", [False, True])
def test_gradients(looped: bool, case: Case, tile: int, sink: float) -> None:
    """From the forward cascade before loops are made and its saved tensors, as the compiler has them; sinks among the
    scores, and a thousand above or below them, where float64 overflows."""
    cascade = in_double(case.cascade)
    forward = scan_free(cascade, "exact")
    values = doubled(case.inputs())
    if "I" in values:
        values["I"] *= sink
    values = {new.name: values[old.name] for old, new in zip(cascade.inputs, forward.inputs, strict=True)}
    gradient = differentiate(forward)
    saved = interpret(gradient.forward, values, {s: case.sizes[s] for s in gradient.forward.symbols})
    values |= {n: saved[n] for n in gradient.saved}
    generator = torch.Generator().manual_seed(1)
    for output, cotangent in gradient.cotangents.items():
        values[cotangent] = torch.randn(saved[output].shape, generator=generator, dtype=torch.float64)
    inputs = [values[t.name] for t in gradient.cascade.inputs]
    assume(all(bool(t.isfinite().all()) for t in inputs))
    backward = run(gradient.cascade, "exact").cascade if looped else gradient.cascade
    named = dict(zip((t.name for t in backward.inputs), inputs, strict=True))
    tiles = {s: case.sizes.get(s, tile) for s in backward.symbols}
    expected = interpret(
        gradient.cascade,
        {t.name: x for t, x in zip(gradient.cascade.inputs, inputs, strict=True)},
        {s: case.sizes[s] for s in gradient.cascade.symbols},
    )
    rewritten = interpret(backward, named, tiles)
    for old, new in zip(gradient.cascade.outputs, backward.outputs, strict=True):
        torch.testing.assert_close(
            rewritten[new], expected[old], rtol=1e-8, atol=1e-9, equal_nan=True, msg=f"{new} of\n{backward}"
        )
    assert_kernel(plan(backward) if looped else flat(backward), named, case.sizes, tile)
