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


def test_export_with_lengths_that_move() -> None:
    model, traced, args = _traced()
    fast = einscade.optimize(traced, dynamic=True, example_inputs=((*args, None), {}))
    n, s = torch.export.Dim("n", min=2, max=64), torch.export.Dim("s", min=2, max=64)
    program = torch.export.export(fast, (*args, None), dynamic_shapes=({1: n}, {1: s}, None))
    assert any("einscade" in str(node.target) for node in program.graph.nodes)
    loaded = program.module()
    for lengths in ((13, 17), (5, 40), (64, 3)):
        others = tuple(torch.randn(2, length, 32) for length in lengths)
        assert_as_exact(lambda *a: loaded(*a, None), model, others)


def test_export_of_a_graph_for_one_length_refuses_others() -> None:
    """The sizes are in the graph: a dimension that is said to move is an error when exporting, not when running."""
    _, traced, args = _traced()
    fast = einscade.optimize(traced, dynamic=False, example_inputs=((*args, None), {}))
    n = torch.export.Dim("n", min=2, max=64)
    with pytest.raises(Exception, match=r"(?i)constraint|speciali[sz]ed|13"):
        torch.export.export(fast, (*args, None), dynamic_shapes=({1: n}, None, None))


def test_an_exported_model_can_be_optimised() -> None:
    model = CausalAttention()
    args = (torch.randn(2, 13, 32),)
    exported = torch.export.export(model, args).module()
    fast = einscade.optimize(exported, verify=(args, {}))
    assert any("einscade" in name for name in _operators(fast))
    assert_as_exact(fast, model, args)
