"""optimize, explain, report and the backend: what a user does with them, and what happens on bad input."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import fx, nn

import einscade
from einscade.compiler.compile import default_inner
from einscade.ir.text import parse_cascade
from tests.models.small import CausalAttention, CrossAttention, assert_as_exact

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_the_copy_shares_parameters_and_leaves_the_original_alone() -> None:
    model = CausalAttention()
    x = torch.randn(2, 19, 32)
    expected = model(x)
    fast = einscade.optimize(model, inner="eager")
    assert type(fast) is type(model)
    assert model._compiled_call_impl is None
    assert not hasattr(model, "report")
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert_as_exact(fast, model, (x,))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    fast.extra = nn.Linear(1, 1)
    assert not hasattr(model, "extra")


def test_the_report_is_empty_before_and_full_after_the_first_call() -> None:
    fast = einscade.optimize(CausalAttention(), inner="eager")
    report = einscade.report(fast)
    assert report is fast.report
    assert report.sites == []
    assert "call the model once" in str(report)
    fast(torch.randn(2, 19, 32))
    (site,) = report.sites
    assert (site.status, site.reason) == ("rewritten", None)
    assert site.source.startswith("small.py:")
    assert parse_cascade(str(site.cascade)) == site.cascade
    assert parse_cascade(str(site.rewritten)) == site.rewritten
    assert {s.name: s.changed for s in site.steps}["online"]
    online = next(s for s in site.steps if s.name == "online")
    assert online.measures_before.most_passes == 2
    assert online.measures_after.most_passes == 1
    assert "def run(" in site.kernel.source
    assert "1 of 1 attention sites rewritten" in str(report)


def test_a_place_compiled_twice_is_told_once() -> None:
    fast = einscade.optimize(CausalAttention(), inner="eager", dynamic=False)
    for n in (5, 7, 9):
        fast(torch.randn(2, n, 32))
    assert fast.report.graphs == 3
    assert len(fast.report.sites) == 1


def test_layers_that_are_alike_are_one_paragraph() -> None:
    model = nn.Sequential(*(CausalAttention() for _ in range(3)))
    report = einscade.explain(model, torch.randn(2, 19, 32))
    assert [s.module_path for s in report.sites] == ["0", "1", "2"]
    text = str(report)
    assert "0-2 ×3" in text
    assert text.count("cascade attention") == 1
    assert len(text.splitlines()) < 30


def test_explain_changes_nothing_and_runs_nothing() -> None:
    class Counting(CausalAttention):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return super().forward(x)

    model = Counting()
    model.register_buffer("seen", torch.zeros(()))
    before = copy.deepcopy(model.state_dict())
    report = einscade.explain(model, torch.randn(2, 19, 32))
    assert [s.status for s in report.sites] == ["rewritten"]
    assert model._compiled_call_impl is None
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_explain_goes_on_after_a_graph_break() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = CausalAttention(), CausalAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    report = einscade.explain(Broken(), torch.randn(2, 19, 32))
    assert [s.module_path for s in report.sites] == ["first", "second"]
    assert len(report.breaks) == 1
    assert "graph breaks: 1" in str(report)


def test_explain_of_a_graph_module() -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    code = traced.code
    report = einscade.explain(traced, torch.randn(2, 5, 32), torch.randn(2, 7, 32), None)
    assert [s.status for s in report.sites] == ["rewritten"]
    assert traced.code == code


def test_the_backend_needs_no_import() -> None:
    """The entry point is declared; it is found by name once the package is installed."""
    model = CausalAttention()
    fast = torch.compile(model, backend="einscade", options={"inner": "eager"})
    assert_as_exact(fast, model, (torch.randn(2, 19, 32),))
    assert [s.status for s in einscade.report().sites] == ["rewritten"]


def test_the_backend_refuses_options_that_it_does_not_know() -> None:
    fast = torch.compile(CausalAttention(), backend="einscade", options={"tiles": 64})
    with pytest.raises(Exception, match="knows 'recipe' and 'inner', not 'tiles'"):
        fast(torch.randn(2, 19, 32))


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_gradients_through_each_inner_compiler(inner: str) -> None:
    model = CausalAttention()
    fast = einscade.optimize(copy.deepcopy(model), inner=inner)
    x = torch.randn(2, 19, 32)
    model(x).square().sum().backward()
    fast(x).square().sum().backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    site = fast.report.sites[0]
    assert site.gradients is not None
    assert site.gradient_kernels
    (line,) = (x for x in str(fast.report).splitlines() if "gradients' kernel" in x)
    assert line.startswith(f"  gradients' kernel: {site.gradient_kernels[0].candidate} · ")
    assert " · measured " in line


def test_importing_costs_little() -> None:
    """Nothing heavy comes with the import: sympy, networkx, Triton and Dynamo are loaded when they are used."""
    code = "import torch, sys; before = set(sys.modules); import einscade; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sympy", "networkx", "triton", "torch._dynamo"} & set(loaded)


def test_export_of_a_rewritten_graph_loads_where_only_the_package_was_imported() -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    args = (torch.randn(2, 13, 32), torch.randn(2, 17, 32), None)
    fast = einscade.optimize(traced, example_inputs=(args, {}))
    file = io.BytesIO()
    torch.export.save(torch.export.export(fast, args), file)
    code = (
        "import sys, io, torch, einscade; program = torch.export.load(io.BytesIO(sys.stdin.buffer.read()));"
        "print(program.module()(torch.zeros(2, 13, 32), torch.zeros(2, 17, 32), None).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=file.getvalue(), capture_output=True, check=True)
    assert b"[2, 13, 32]" in done.stdout


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_passes_what_is_right() -> None:
    args = (torch.randn(2, 19, 32),)
    assert einscade.optimize(CausalAttention(), inner="eager", verify=(args, {})).report.sites


def test_verify_raises_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    from einscade.runtime import kernels

    plain = kernels.Kernel.__call__
    monkeypatch.setattr(kernels.Kernel, "__call__", lambda *a: tuple(o * 1.01 for o in plain(*a)))
    with pytest.raises(
        einscade.VerificationError, match=r"relative error \d\.\d+e-\d+ against float64, the original's"
    ):
        einscade.optimize(CausalAttention(), inner="eager", verify=((torch.randn(2, 19, 32),), {}))


def test_verify_sees_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from einscade.runtime import kernels

    plain = kernels.Kernel.__call__
    monkeypatch.setattr(kernels.Kernel, "__call__", lambda *a: tuple(o / 0 for o in plain(*a)))
    with pytest.raises(einscade.VerificationError, match="NaN or infinity"):
        einscade.optimize(CausalAttention(), inner="eager", verify=((torch.randn(2, 19, 32),), {}))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, 3, "model", torch.nn.functional.softmax, CausalAttention])
def test_not_a_module(model: object) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module or a GraphModule, got"):
        einscade.optimize(model)
    with pytest.raises(TypeError, match=r"model must be an nn.Module or a GraphModule, got"):
        einscade.explain(model)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'exat'; did you mean 'exact'"):
        einscade.optimize(CausalAttention(), "exat")
    with pytest.raises(ValueError, match="recipe must be a name, got int"):
        einscade.optimize(CausalAttention(), 3)


def test_an_unknown_inner_compiler() -> None:
    with pytest.raises(ValueError, match="inner must be one of 'inductor', 'aot_eager', 'eager', got 'xla'"):
        einscade.optimize(CausalAttention(), inner="xla")


@pytest.mark.parametrize("value", [torch.zeros(1), (torch.zeros(1),), ((torch.zeros(1),), [1]), "x"])
def test_verify_and_example_inputs_are_args_and_kwargs(value: object) -> None:
    with pytest.raises(ValueError, match=r"verify must be \(args, kwargs\)"):
        einscade.optimize(CausalAttention(), verify=value)
    with pytest.raises(ValueError, match=r"example_inputs must be \(args, kwargs\)"):
        einscade.optimize(CausalAttention(), example_inputs=value)


def test_a_report_of_a_stranger() -> None:
    with pytest.raises(ValueError, match=r"was not returned by einscade.optimize"):
        einscade.report(CausalAttention())


def test_a_model_that_does_not_trace_runs_unchanged_with_the_reason() -> None:
    """A graph that we cannot capture: the answer is the original's, the report says why, one warning is given."""

    class Odd(CausalAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            with torch.enable_grad():
                return y * 2

    model = Odd()
    x = torch.randn(2, 19, 32)
    fast = einscade.optimize(model, inner="eager")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert any("enables gradients" in str(w.message) for w in caught)
    assert "enables gradients" in str(fast.report)


def test_a_graph_module_that_cannot_be_captured_runs_unchanged() -> None:
    def branchy(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.mT, -1) @ x + x.sum().item()

    class Branchy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return branchy(x)

    traced = fx.symbolic_trace(Branchy())
    fast = einscade.optimize(traced)
    x = torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(fast(x), branchy(x))


def test_example_inputs_of_another_count() -> None:
    traced = fx.symbolic_trace(CrossAttention(), concrete_args={"bias": None})
    with pytest.raises((TypeError, ValueError), match=r"inputs|argument"):
        einscade.optimize(traced, example_inputs=((torch.randn(2, 13, 32),), {}))


def test_a_device_without_kernels_is_left_alone() -> None:
    model = CausalAttention().to("meta")
    fast = einscade.optimize(model, inner="eager")
    assert fast(torch.randn(2, 19, 32, device="meta")).shape == (2, 19, 32)
    (site,) = fast.report.sites
    assert site.status == "unchanged"
    assert "meta" in site.reason


class _Plain(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.mT)
        return torch.matmul(scores * scores, v)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.complex64])
def test_integer_and_complex_attention(dtype: torch.dtype) -> None:
    """Unchanged, or right: never something else."""
    q, k, v = (torch.randint(-3, 3, (2, 4, 5, 6)).to(dtype) for _ in range(3))
    model = _Plain()
    fast = einscade.optimize(model, inner="eager")
    if dtype.is_complex:
        torch.testing.assert_close(fast(q, k, v), model(q, k, v))
    else:
        assert torch.equal(fast(q, k, v), model(q, k, v))


def test_zero_length_sequences() -> None:
    model = CrossAttention()
    fast = einscade.optimize(model, inner="eager", dynamic=False)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    for a, b in ((x[:, :0], memory), (x[:, :0], memory[:, :0]), (x[:0], memory[:0])):
        assert fast(a, b).shape == model(a, b).shape


def test_no_keys_at_all_give_zeros() -> None:
    """Softmax over nothing is 0 here; torch agrees, by summing nothing."""
    model = CrossAttention()
    fast = einscade.optimize(model, inner="eager", dynamic=False)
    out = fast(torch.randn(2, 5, 32), torch.randn(2, 0, 32))
    torch.testing.assert_close(out, torch.zeros(2, 5, 32), rtol=0, atol=0)


def test_contradicting_shapes_raise_as_the_original_does() -> None:
    model = CrossAttention()
    fast = einscade.optimize(model, inner="eager")
    with pytest.raises(Exception, match=r"shape|size"):
        fast(torch.randn(2, 5, 32), torch.randn(3, 7, 32))


def test_the_default_inner_compiler_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from einscade.compiler import compile as compiling

    monkeypatch.setattr(compiling, "_cpp_compiler", lambda: False)
    assert default_inner(CausalAttention()) == "aot_eager"
    monkeypatch.setattr(compiling, "_cpp_compiler", lambda: True)
    assert default_inner(CausalAttention()) == "inductor"


def test_a_buffer_that_changes_after_compiling_is_noticed() -> None:
    """A mask in a buffer may become a domain; when somebody writes to it, the answer follows."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(19, 19).tril().bool())

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT).masked_fill(~self.mask, -torch.inf).softmax(-1) @ v

    model = Masked()
    args = tuple(torch.randn(2, 19, 8) for _ in range(3))
    fast = einscade.optimize(model, inner="eager")
    assert_as_exact(fast, model, args)
    model.mask.logical_or_(torch.eye(19).bool().flip(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(fast(*args), model(*args))
        model.mask = torch.ones(19, 19).tril(3).bool()
        fast.mask = model.mask
        torch.testing.assert_close(fast(*args), model(*args))


def test_many_models_of_one_class_are_all_compiled() -> None:
    """Dynamo's limit of recompilations counts each of them on its own."""
    for width in range(16, 28):
        fast = einscade.optimize(Named(width), inner="eager")
        for length in (9, 11, 14):
            fast(torch.randn(2, length, width))
        assert [s.status for s in fast.report.sites] == ["rewritten"]


class Named(nn.Module):
    """Does not call itself `self`."""

    def __init__(this, width: int) -> None:
        super().__init__()
        this.inner = nn.ModuleDict({"a": CausalAttention(width, heads=1, key_heads=1)})

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        return this.inner["a"](x)


def test_a_module_is_named_as_named_modules_does() -> None:
    model = Named(32)
    fast = einscade.optimize(model, inner="eager")
    fast(torch.randn(2, 9, 32))
    (site,) = fast.report.sites
    assert site.module_path == "inner.a"
    assert site.source.startswith("small.py:")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["", "causal", "padding", "causal padding"])
def test_torchs_own_encoder(norm_first: bool, training: bool, masks: str) -> None:
    """Its forward is torch's code, which Dynamo does not enter by itself; without gradients it is a fused operator."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, nn.functional.gelu, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(3, 13, 32)
    given = {}
    if "causal" in masks:
        given["mask"] = nn.Transformer.generate_square_subsequent_mask(13)
    if "padding" in masks:
        left_out = torch.arange(13) >= torch.tensor([13, 9, 5])[:, None]
        given["src_key_padding_mask"] = torch.zeros(3, 13).masked_fill(left_out, -torch.inf)
    with torch.set_grad_enabled(training):
        fast = einscade.optimize(model, inner="eager")
        actual, expected = fast(x, **given), model(x, **given)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert [s.status for s in fast.report.sites] == ["rewritten"] * 2
    inner = ".self_attn" if training else ""
    assert [s.module_path for s in fast.report.sites] == [f"layers.{i}{inner}" for i in range(2)]


def test_torchs_own_attention_with_its_weights() -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, y = torch.randn(3, 13, 32), torch.randn(3, 17, 32)
    fast = einscade.optimize(model, inner="eager")
    with torch.no_grad():
        for average in (True, False):
            actual = fast(x, y, y, average_attn_weights=average)
            expected = model(x, y, y, average_attn_weights=average)
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert {s.status for s in fast.report.sites} == {"rewritten"}
