"""Sums by the entries of a table, of sums over what shares an index: equal over the reals; a reason where there are
none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from einscade.ir import Cascade, Einsum
from einscade.ir.interpret import interpret
from einscade.passes.differentiate import Gradient
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from einscade.passes.rewrite import NotApplicable
from einscade.passes.tables import Tables
from tests.codegen.tables import TABLES, forward, gradient, values

EXACT = recipe("exact")


def total(made: Gradient, after: Cascade) -> Einsum:
    """The statement that makes the gradient of the table, the last of the inputs."""
    table = made.gradients[made.forward.inputs[-1].name]
    return after.definitions[after.outputs[made.cascade.outputs.index(table)]]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(TABLES)), st.booleans(), st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(2, 2), (4, 2)]), st.sampled_from(["f32", "f16"]), st.sampled_from([1, 3, 16]),
)  # fmt: skip
def test_equal_to_the_sum_over_everything(
    name: str, shared: bool, lengths: tuple[int, int, int], heads: tuple[int, int], dtype: str, tile: int
) -> None:
    plain = forward(name, dtype, *heads, 3)
    made = gradient(plain)
    sizes = dict(zip("BPM", lengths, strict=True))
    given_values = values(plain, made, sizes)
    after = run(made.cascade, (Tables(EXACT, shared),)).cascade
    expected = interpret(made.cascade, given_values, {s: sizes[s] for s in made.cascade.symbols})
    inputs = dict(zip((t.name for t in after.inputs), given_values.values(), strict=True))
    found = interpret(after, inputs, {s: sizes.get(s, tile) for s in after.symbols})
    for old, new in zip(made.cascade.outputs, after.outputs, strict=True):
        difference = (found[new] - expected[old]).norm()
        assert difference <= 1e-9 * (1 + expected[old].norm()), f"{old} of\n{after}"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_table_is_summed_last_from_pairs(name: str) -> None:
    made = gradient(forward(name))
    after = Tables(EXACT).apply(made.cascade)
    last = total(made, after)
    assert last.reduce is not None
    assert len(last.reduce.ranks) == (3 if name == "an index of each batch" else 2)
    table = {*last.output.ranks} - {*after.tensors[after.outputs[0]].ranks}
    assert not any(table & {*s.output.ranks} for s in after.body if s.scan)
    last = total(made, Tables(EXACT, shared=False).apply(made.cascade))
    assert last.reduce is not None
    assert len(last.reduce.ranks) == (4 if name == "shared by heads" else 3)


def test_refuses_without_a_table() -> None:
    plain = forward("sigmoid")
    queries = gradient(plain).cascade
    with pytest.raises(NotApplicable, match="no output is a sum by the entries of a table"):
        Tables(EXACT).apply(queries.replace(outputs=(queries.outputs[0],)))
