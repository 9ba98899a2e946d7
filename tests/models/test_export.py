"""GraphModules in, GraphModules out; and torch.export of the result."""

from __future__ import annotations

import io

import pytest
import torch
from torch import fx

import einscade
from tests.models.small import CausalAttention, CrossAttention, assert_as_exact

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _operators(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def _traced() -> tuple[CrossAttention, fx.GraphModule, tuple[torch.Tensor, ...]]:
    model = CrossAttention()
    args = (torch.randn(2, 13, 32), torch.randn(2, 17, 32))
    return model, fx.symbolic_trace(model, concrete_args={"bias": None}), args


def test_a_graph_module_comes_back_rewritten() -> None:
    model, traced, args = _traced()
    fast = einscade.optimize(traced, verify=((*args, None), {}))
    assert isinstance(fast, fx.GraphModule)
    assert any("einscade" in name for name in _operators(fast))
    assert not any("softmax" in name for name in _operators(fast))
    assert_as_exact(lambda *a: fast(*a, None), model, args)


def test_the_original_graph_is_untouched() -> None:
    _, traced, args = _traced()
    before = traced.code
    einscade.optimize(traced, verify=((*args, None), {}))
    assert traced.code == before


def test_export_keeps_the_operator_and_survives_a_file() -> None:
    model, traced, args = _traced()
    fast = einscade.optimize(traced, verify=((*args, None), {}))
    program = torch.export.export(fast, (*args, None))
    assert any("einscade" in str(n.target) for n in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_as_exact(lambda *a: loaded(*a, None), model, args)


def test_an_exported_model_can_be_optimised() -> None:
    model = CausalAttention()
    args = (torch.randn(2, 13, 32),)
    exported = torch.export.export(model, args).module()
    fast = einscade.optimize(exported, verify=(args, {}))
    assert any("einscade" in name for name in _operators(fast))
    assert_as_exact(fast, model, args)
