"""Transformers' architectures: every attention site found and rewritten, nothing else touched, the output unchanged."""

from __future__ import annotations

import pytest

from benchmarks import zoo

QUICK = ("bert", "gpt2", "llama", "t5")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in zoo.FAMILIES]
)
def test_family(name: str, attention: str, fresh_dynamo: None) -> None:
    row = zoo.run(name, attention, inner="eager")
    if not row.applies:
        pytest.skip(row.note)
    assert row.error is not None, row.note
    assert (row.found, row.rewritten, row.stray) == (row.true, row.true, 0), row.note
    assert row.error <= zoo.MAX_ERROR


def test_the_count_is_of_what_runs() -> None:
    """ALBERT calls one layer twice; T5 has three kinds of calls; routers and linear attention are not counted."""
    counts = {}
    for name in ("albert", "t5", "mixtral", "minimax"):
        model = zoo.build(name, "eager")
        calls: list[str] = []
        for path, module in zoo.attention_modules(model).items():
            module.register_forward_hook(lambda *_, path=path, calls=calls: calls.append(path))
        model(**zoo.example_inputs(model))
        counts[name] = (len(calls), len(set(calls)))
    assert counts == {"albert": (2, 1), "t5": (6, 6), "mixtral": (2, 2), "minimax": (1, 1)}


def test_an_unknown_name_is_a_row() -> None:
    row = zoo.run("no_such_model", "eager", inner="eager")
    assert not row.ok
    assert "no_such_model" in row.note
