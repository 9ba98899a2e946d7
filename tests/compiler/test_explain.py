"""explain: what it must not change, what it says of calls that cannot be made, and how a report prints."""

from __future__ import annotations

import io
import random
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import einscade
from tests.models.small import CausalAttention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Noisy(nn.Module):
    """Attention twice; draws random numbers, counts, updates statistics, and breaks the graph in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.BatchNorm1d(19), CausalAttention(), CausalAttention()
        self.calls = 0

    def forward(self, x: torch.Tensor, seen: dict[str, Any]) -> torch.Tensor:
        self.calls += 1
        seen["x"] = x
        x = self.first(self.norm(x))
        torch._dynamo.graph_break()
        x = x + random.random() * torch.rand(()) + np.random.rand()
        return self.second(x)


def test_nothing_is_left_behind() -> None:
    model, seen = Noisy().train(), {}
    x = torch.randn(2, 19, 32, requires_grad=True) * 2  # no leaf, which copy.deepcopy refuses
    state = {name: value.clone() for name, value in model.state_dict().items()}
    limit = torch._dynamo.config.recompile_limit
    random_states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    report = einscade.explain(model, x, seen)
    assert [(s.module_path, s.status) for s in report.sites] == [("first", "rewritten"), ("second", "rewritten")]
    assert random.getstate() == random_states[0]
    assert torch.equal(torch.get_rng_state(), random_states[1])
    assert (np.random.get_state()[1] == random_states[2]).all()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.calls, seen, model.training) == (0, {}, True)
    assert torch._dynamo.config.recompile_limit == limit
    assert torch.is_grad_enabled()


def test_what_the_user_compiled_stays_compiled() -> None:
    graphs = 0

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    model, x = CausalAttention(), torch.randn(2, 19, 32)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    for n in range(3):
        einscade.explain(model, torch.randn(2, 5 + n, 32))
    compiled(x)
    assert graphs == 1


def test_of_a_model_that_is_optimised_already() -> None:
    fast = einscade.optimize(nn.Sequential(CausalAttention()), inner="eager")
    x = torch.randn(2, 19, 32)
    assert [s.module_path for s in einscade.explain(fast, x).sites] == ["0"]
    assert fast.report.graphs == 0
    fast(x)
    assert [s.module_path for s in einscade.explain(fast, x).sites] == ["0"]
    assert fast.report.graphs == 1


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"explain: CausalAttention.forward\(.*missing a required argument: 'x'"):
        einscade.explain(CausalAttention())
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        einscade.explain(CausalAttention(), torch.randn(2, 19, 32), mask=None)


def test_shapes_that_contradict_each_other_are_named() -> None:
    report = einscade.explain(CausalAttention(), torch.randn(2, 3, 5))
    assert report.sites == []
    assert "[6, 5]" in str(report)


def test_a_report_prints_where_standard_output_has_no_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential()
    model.add_module("größe", nn.Sequential(CausalAttention(), CausalAttention()))
    report = einscade.explain(model, torch.randn(2, 19, 32))
    assert "größe.0-1 ×2" in str(report)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    text = str(report)
    print(report, file=stream)
    assert text.isascii()
    assert "gr\\xf6\\xdfe.0-1 x2" in text
    assert "online 1" in text


def test_many_kinds_of_sites_are_a_line_each() -> None:
    """Four lengths of the same layers are paragraphs; with a fifth each is a line, with its count and its kernel."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.ModuleList(nn.Sequential(CausalAttention(), CausalAttention()) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for level in self.levels:
                x = level(x)[:, 1:]
            return x

    many = einscade.explain(Pyramid(), torch.randn(2, 19, 32))
    few = replace(many, sites=many.sites[:8])
    assert str(few) == few.details()
    assert str(few).count("cascade attention(") == 4
    head, empty, *lines, last = str(many).splitlines()
    assert head.startswith("einscade: 10 of 10 attention sites rewritten")
    assert empty == ""
    for i, (line, site) in enumerate(zip(lines, many.sites[::2], strict=True)):
        assert line == f"levels.{i}.0-1 ×2  {site.source}  rewritten · {site.kernel.candidate}"
    assert "report.details()" in last
    assert many.details().count("cascade attention(") == 5


@pytest.mark.parametrize("name", ["EINSCADE_AUTOTUNE", "EINSCADE_PROGRESS"])
def test_a_switch_is_0_or_1(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "off")
    for call in (einscade.optimize, einscade.explain):
        with pytest.raises(ValueError, match=f"{name} must be 0 or 1, got 'off'"):
            call(CausalAttention())
    monkeypatch.setenv(name, "")
    einscade.optimize(CausalAttention())
