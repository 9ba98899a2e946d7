"""Decoding and ragged batches under Triton's interpreter, against the reference interpreter in float64.

Not collected by name: `test_triton_ragged` runs this file in a process of its own, with TRITON_INTERPRET=1. Outputs and
partial results are allocated poisoned: what is not written is NaN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from einscade.codegen.schedule import Schedule
from einscade.codegen.triton_emit import emit
from einscade.ir.cascade import Cascade
from einscade.ir.interpret import interpret
from tests.codegen.cascades import relative_error
from tests.codegen.generated import run_poisoned
from tests.codegen.ragged import CASES, Case, inputs, program, schedule, textbook
from tests.codegen.triton_addresses import addresses_checked  # noqa: F401

assert os.environ.get("TRITON_INTERPRET") == "1"

BOUND = {"f32": 2e-6, "f16": 1e-3}


def run(cascade: Cascade, parts: bool, chosen: Schedule, x: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    (out,) = run_poisoned(emit(program(cascade, parts), chosen), x, sizes)
    return out


def sizes_of(case: Case, b: int, p: int, m: int) -> dict[str, int]:
    pages = -(-m // (case.page or 1))
    return {"B": b, "P": p, "C": b * pages + 2} | ({"M": m} if case.page is None else {"N": pages})


def error(
    case: Case, b: int, p: int, m: int, heads: tuple[int, int] = (6, 2), parts: bool = True, part: str = "16",
    rows: Mapping[str, int] | None = None, seed: int = 0, dtype: str = "f32", **options: object,
) -> float:  # fmt: skip
    c = textbook(case, dtype, heads)
    sizes = sizes_of(case, b, p, m)
    x = inputs(c, case, sizes, seed)
    rows = rows or ({"h": heads[0] // heads[1], "p": 2} if heads[0] > heads[1] else {"p": 2})
    chosen = schedule(program(c, parts), rows, part=part, **options)
    sizes = {n: s for n, s in sizes.items() if n in c.symbols}
    out = run(c, parts, chosen, x, sizes)
    expected = interpret(c, x, {})["O"]
    assert bool(out.isfinite().all())
    return relative_error(out, expected) if bool(expected.any()) else float(out.abs().max())


@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_variants(case: Case, parts: bool) -> None:
    assert error(case, b=2, p=3, m=37, parts=parts, part="32", summaries=not parts) <= BOUND["f32"]


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (7, 1), (5, 5)])
def test_heads_of_a_group_are_rows(heads: tuple[int, int]) -> None:
    lengths = next(c for c in CASES if c.name == "lengths")
    assert error(lengths, b=2, p=3, m=40, heads=heads, dtype="f16") <= BOUND["f16"]


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(CASES), st.integers(1, 3), st.integers(1, 6), st.integers(1, 70),
    st.sampled_from(["16", "48", "16 * Max(1, ceil_div(B, 2))", "4096"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_lengths_and_parts(case: Case, b: int, p: int, m: int, part: str, wide: bool, seed: int) -> None:
    """More parts than tiles, one part that is longer than all keys, queries that fill a tile and that do not."""
    rows = {"h": 3, "p": 8 if wide else 1}
    assert error(case, b, p, m, part=part, rows=rows, seed=seed) <= BOUND["f32"]
