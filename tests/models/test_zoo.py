"""Transformers' architectures: every attention site found and rewritten, nothing else touched, the output unchanged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import tiny_models, zoo
from benchmarks.attention_calls import softmaxes_left, watch
from benchmarks.tiny_models import CannotShrink, Lengths, tiny

QUICK = ("bert", "gpt2", "llama", "t5")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else (pytest.mark.slow,)) for n in zoo.DEVELOPED]
)
def test_family(name: str, attention: str, fresh_dynamo: None) -> None:
    row = zoo.run(name, attention)
    if not row.applies:
        pytest.skip(row.note)
    assert row.error is not None, row.note
    assert (row.found, row.rewritten, row.stray) == (row.true, row.true, 0), row.note
    assert row.error <= zoo.MAX_ERROR


@pytest.mark.parametrize("name", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_lengths_that_move(name: str, fresh_dynamo: None) -> None:
    row = zoo.run(name, "eager", zoo.How(dynamic=True))
    assert row.ok, row.note


# -- the count --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "softmax", "modules"),
    [("albert", "eager", 2, 1), ("t5", "sdpa", 6, 6), ("mixtral", "eager", 2, 2), ("minimax", "eager", 1, 1)],
)
def test_the_count_is_of_what_runs(name: str, attention: str, softmax: int, modules: int) -> None:
    """ALBERT calls one layer twice; T5 has three kinds of calls; routers and linear attention are not counted."""
    made = tiny(name, attention)
    _, calls = watch(made.model, made.inputs())
    assert (len(calls.softmax), len(set(calls.softmax))) == (softmax, modules)
    assert bool(calls.linear) == (name == "minimax")
    assert calls.other == (2 if name in ("mixtral", "minimax") else 0)


class Counted(nn.Module):
    """One of each: attention, attention whose result is not used, a router, a linear form, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.route = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        attended = (q @ k.mT).softmax(-1) @ v
        (k @ q.mT).softmax(-1) @ v
        linear = (q @ k.mT).tril() @ v
        return attended + linear + self.route(x).softmax(-1) * F.scaled_dot_product_attention(q, k, v)


def test_what_counts() -> None:
    model = Counted()
    output, calls = watch(model, {"x": torch.randn(2, 5, 8)})
    assert output.shape == (2, 5, 8)
    assert (len(calls.softmax), len(calls.linear), calls.other) == (2, 0, 1)  # linear, but in a module with softmaxes
    assert softmaxes_left(model, {"x": torch.randn(2, 5, 8)}, inside="nothing") == 4


class Spelled(nn.Module):
    """Products written as a product and a sum: attention, and below it what is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.route = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q[:, :, None] * k[:, None]).float().sum(-1)
        if self.kind == "attention":
            return (scores.softmax(-1)[..., None] * v[:, None]).sum(-2)
        if self.kind == "attention without a query's positions":
            return ((q[:, :1] * k).sum(-1, keepdim=True).softmax(1) * v).sum(1)
        if self.kind == "linear form":
            return (scores.tril()[..., None] * v[:, None]).sum(2)
        if self.kind == "router":
            return (x[:, :, None] * self.route.weight).sum(-1).softmax(-1) * v
        if self.kind == "new from scores":
            return (scores[..., None] * self.route.weight[:5]).sum(-2).softmax(-1) * v
        return (q * k).sum(-1, keepdim=True).softmax(1) * v


@pytest.mark.parametrize(
    ("kind", "softmax", "linear", "other"),
    [
        ("attention", 1, 0, 0),
        ("attention without a query's positions", 1, 0, 0),
        ("linear form", 0, 1, 0),
        ("router", 0, 0, 1),
        ("new from scores", 0, 0, 1),
        ("point by point", 0, 0, 1),
    ],
)
def test_a_product_and_a_sum_count_as_a_matrix_product(kind: str, softmax: int, linear: int, other: int) -> None:
    _, calls = watch(Spelled(kind), {"x": torch.randn(2, 5, 8)})
    assert (len(calls.softmax), len(calls.linear), calls.other) == (softmax, linear, other)


# -- tiny models ------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_a_row() -> None:
    row = zoo.run("no_such_model", "eager")
    assert not row.ok
    assert "no model type 'no_such_model'" in row.note


def test_what_cannot_be_shrunk_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "MOST_PARAMETERS", 10)
    with pytest.raises(CannotShrink, match=r"no tiny bert that runs.*Tried narrow: ValueError: 0\.1 m"):
        tiny("bert", "eager")


def test_inputs_are_the_same_for_the_same_lengths() -> None:
    made = tiny("bart", "eager")
    one, two, other = made.inputs(), made.inputs(), made.inputs(Lengths(5, 7))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (other["input_ids"].shape[1], other["decoder_input_ids"].shape[1]) == (7, 5)
