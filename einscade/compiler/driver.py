"""The driver: `optimize`, `explain`, and the backend "einscade" for torch.compile.

Entry point group `torch_dynamo_backends`, name `einscade`: `einscade.compiler.driver:backend`.

A model goes in and a model comes out that does the same with other kernels. A graph that cannot be captured, or has
nothing to rewrite, runs as it was, and the report says why.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from einscade.compiler import graph_module
from einscade.compiler.compile import compile_graph, default_inner
from einscade.compiler.frame import compiled_call
from einscade.compiler.inputs import check_call, check_environment, check_inner, check_recipe, split_call
from einscade.compiler.report import Report
from einscade.compiler.verification import VerificationError, verify_call
from einscade.runtime import progress as progress_display

__all__ = ["VerificationError", "backend", "explain", "optimize", "report"]

_backend_reports: dict[tuple[str, str], Report] = {}


def optimize(
    model: nn.Module,
    recipe: str = "exact",
    *,
    inner: str | None = None,
    dynamic: bool | None = None,
    verify: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    example_inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The model with its attention rewritten: same call, same parameters, same state_dict; the original is untouched.

    Parameters, buffers and submodules are shared with the original, whichever of the two is cast, loaded or trained.
    The root's other attributes (`training` among them) and hooks are the result's own: `fast.train()`, `fast.eval()`.
    A deep copy of the result is optimised too; a pickled one is loaded as the plain model.

    model: an `nn.Module`, compiled on its first call; or a `torch.fx.GraphModule`, which comes back as a rewritten
        GraphModule: at once where it carries fake tensors (as torch.export leaves them) or example inputs are given,
        else on its first call.
    recipe: what to rewrite to; "exact" never approximates.
    inner: what compiles the rest of the graph: "inductor", "aot_eager" or "eager". Default: "inductor" where a C++
        compiler (on a GPU: Triton) works, else "aot_eager".
    dynamic: as in torch.compile: True for shapes that change, False to specialise, None to find out.
    verify: `(args, kwargs)`: run original and optimised on them now and raise `VerificationError` with the figures if
        they differ by more than the original differs from float64, times 1.5.
    example_inputs: `(args, kwargs)` to rewrite a GraphModule at once, or to compile a module before its first call.
    progress: called with (sites done, sites found) while compiling, instead of a line on stderr.

    The report is `einscade.report(fast)`, and `fast.report` where the model has no attribute of that name.
    Raises TypeError for what is not a module, ValueError for an unknown recipe or inner compiler.
    """
    if not isinstance(model, nn.Module):
        hint = "; pass an instance of it" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise TypeError(f"optimize: model must be an nn.Module or a GraphModule, got {_kind(model)}{hint}")
    check_recipe(recipe)
    check_environment()
    chosen = default_inner(model) if inner is None else check_inner(inner)
    examples = split_call("example_inputs", example_inputs)
    checked = split_call("verify", verify)
    made = Report(recipe, chosen)
    with progress_display.listening(progress):
        if isinstance(model, fx.GraphModule):
            known = examples or checked
            fast: nn.Module = graph_module.optimized(model, recipe, inner, dynamic, known, made)
        else:
            fast = _shallow(model)
            _compile(fast, dynamic, progress, made)
            if examples is not None:
                with torch.no_grad():
                    fast(*examples[0], **examples[1])
    _show(fast, made)
    if checked is not None:
        verify_call(model, fast, *checked, made)
    return fast


def explain(model: nn.Module, *args: Any, recipe: str = "exact", **kwargs: Any) -> Report:
    """What `optimize` would do with `model(*args, **kwargs)`, kernels' sources included; nothing is run or changed.

    Raises TypeError for what is not a module and for arguments that it does not take, ValueError for an unknown recipe.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an nn.Module or a GraphModule, got {_kind(model)}")
    check_recipe(recipe)
    check_environment()
    check_call("explain", model, args, kwargs)
    from einscade.compiler.explaining import explain_call

    return explain_call(model, args, kwargs, recipe)


def report(model: nn.Module | None = None) -> Report:
    """The report of an optimised model; without one, of what `torch.compile(..., backend="einscade")` compiled last.

    Raises ValueError for a model that `optimize` did not return.
    """
    if model is None:
        if not _backend_reports:
            raise ValueError('report: nothing was compiled yet with torch.compile(..., backend="einscade")')
        return list(_backend_reports.values())[-1]
    found = vars(model).get("_einscade") if isinstance(model, nn.Module) else None
    if found is None or (isinstance(found, _Optimised) and found.module() is not model):
        hint = "" if found is None else "; it is a copy of what was, and plain: pass it to einscade.optimize"
        raise ValueError(f"report: this {_kind(model)} was not returned by einscade.optimize{hint}")
    known: Report = found.report
    return known


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Any:
    """The torch.compile backend. `options`: `recipe` and `inner`, as in `optimize`."""
    chosen = dict(options or {})
    recipe, inner = check_recipe(chosen.pop("recipe", "exact")), chosen.pop("inner", None)
    if chosen:
        raise ValueError(f"options: backend einscade knows 'recipe' and 'inner', not {', '.join(map(repr, chosen))}")
    check_environment()
    inner = default_inner(gm) if inner is None else check_inner(inner)
    made = _backend_reports.pop((recipe, inner), None) or Report(recipe, inner)
    _backend_reports[recipe, inner] = made
    return compile_graph(gm, example_inputs, recipe, inner, made)


@dataclass(frozen=True)
class _Optimised:
    """What a module was optimised to, kept in it (`_einscade`): its report, and what its deep copy is compiled with."""

    module: Callable[[], nn.Module | None]
    dynamic: bool | None
    progress: Callable[[int, int], None] | None
    report: Report

    def __deepcopy__(self, memo: dict[int, Any]) -> _Optimised:
        report = copy.deepcopy(self.report, memo)
        copied = memo.get(id(self.module()))
        if isinstance(copied, nn.Module):  # the module that this one is in is being copied
            return _compile(copied, self.dynamic, self.progress, report)
        return _Optimised(_nothing, self.dynamic, self.progress, report)

    def __reduce__(self) -> tuple[object, ...]:
        return _Optimised, (_nothing, self.dynamic, None, self.report)


def _nothing() -> None:
    """The module of a record that was loaded, or copied, without it."""


def _compile(
    fast: nn.Module, dynamic: bool | None, progress: Callable[[int, int], None] | None, made: Report
) -> _Optimised:
    """Gives `fast` a compiled call, as `nn.Module.compile` would."""

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        with progress_display.listening(progress):
            return compile_graph(gm, example_inputs, made.recipe, made.inner, made, fast)

    fast.__dict__["_compiled_call_impl"] = compiled_call(fast, compiler, dynamic)
    fast.__dict__["_einscade"] = record = _Optimised(weakref.ref(fast), dynamic, progress, made)
    return record


def _shallow(model: nn.Module) -> nn.Module:
    """A copy with attributes and hooks of its own. Parameters and buffers are one table, as they are for submodules: a
    cast or a load replaces some of them in it."""
    fast = copy.copy(model)
    fast.__dict__["_modules"] = dict(model._modules)
    for name, value in model.__dict__.items():
        if name.startswith("_") and name.endswith("_hooks") and isinstance(value, dict):
            fast.__dict__[name] = copy.copy(value)
    return fast


def _show(model: nn.Module, made: Report) -> None:
    """The report as `model.report`, if the model has nothing of its own there."""
    if isinstance(vars(model).get("report"), Report) or not hasattr(model, "report"):
        model.__dict__["report"] = made


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
