"""The call of an optimised module: the Python frame that Dynamo compiles it from, and the short way into what it made.

Comes in: a module, and a backend for its graphs. Goes out: a function that calls the module compiled.

Dynamo keeps compiled graphs, and counts recompilations against its limit, by code object. Compiled from `forward`, all
models of a class, and all that are optimised in turn in one process, would share one count and run unoptimised once it
is reached; and a `forward` that is torch's own (nn.TransformerEncoder) would not be compiled at all. So the frame has a
code object of its own.

`torch.compile`'s wrapper prepares for compiling at every call, and takes longer for that than to check the guards of
what was compiled. Where a frame was compiled whole, the short way asks those same guards, all of them, and runs the
same code. Whatever is unusual goes through the wrapper as before: guards that fail, graph breaks, a trace, an export, a
profile, a stance, another compiled function around, a version of torch that is not known here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn

__all__ = ["compiled_call", "framed"]

KNOWN_VERSIONS = ("2.11.", "2.12.", "2.13.")
"""Versions of torch whose cache of compiled frames is read here."""

MOST = 8
"""So many compiled forms of a frame are tried before the wrapper is asked."""

Backend = Callable[[fx.GraphModule, Sequence[Any]], Any]


def framed(self: nn.Module) -> Callable[..., Any]:
    """A function that calls the module, hooks included and its compiled call left aside. The module has the name that
    its own methods give it, which is how Dynamo names what it finds in it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return self._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def compiled_call(module: nn.Module, backend: Backend, dynamic: bool | None) -> Callable[..., Any]:
    """The module's call, compiled by Dynamo and `backend`."""
    from torch._guards import CompileContext

    frame = framed(module)
    whole: set[Any] = set()  # the compilations of whole frames that were not looked at yet

    def noting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        reason = getattr(gm, "compile_subgraph_reason", None)
        if reason is not None and not reason.graph_break:
            whole.add(CompileContext.current_compile_id())
        return backend(gm, example_inputs)

    compiled: Callable[..., Any] = torch.compile(frame, backend=noting, dynamic=dynamic)
    if not torch.__version__.startswith(KNOWN_VERSIONS) or torch._dynamo.config.compiled_autograd:
        return compiled
    return _short_way(module, frame, compiled, whole)


@dataclass(frozen=True)
class _Form:
    """What Dynamo compiled a frame to: to be run where its guards hold, for as long as Dynamo keeps it (`guards` lose
    their `cache_entry` when it does not)."""

    guards: Any
    hold: Callable[[dict[str, Any]], bool]
    run: Callable[..., Any]


def _short_way(
    module: nn.Module, frame: Callable[..., Any], compiled: Callable[..., Any], whole: set[Any]
) -> Callable[..., Any]:
    """`compiled`, sooner."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._dynamo import eval_frame
    from torch._dynamo.mutation_guard import GenerationTracker
    from torch._guards import TracingContext
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing

    forms: tuple[_Form, ...] = ()
    callback, context = get_eval_frame_callback, TracingContext.try_get
    exporting, tracing = torch.compiler.is_exporting, torch._C._is_tracing
    profiled = torch._C._autograd._profiler_enabled

    def usual() -> bool:
        """Whether the wrapper would do nothing but run the form whose guards hold."""
        stance = eval_frame._stance
        if stance.stance != "default" or stance.backend is not None or callback() is not None:
            return False
        return not (context() or exporting() or is_fx_symbolic_tracing() or tracing() or profiled())

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal forms
        if forms and usual():
            names = {"self": module, "args": args, "kwargs": kwargs}
            for form in forms:
                if form.guards.cache_entry is None:
                    forms = tuple(f for f in forms if f is not form)
                elif form.hold(names):
                    if form is not forms[0]:
                        forms = (form, *(f for f in forms if f is not form))
                    GenerationTracker.generation += 1  # a call is a step, for torch's CUDA graphs
                    return form.run(*args, **kwargs)
        result = compiled(*args, **kwargs)
        if whole:
            forms = (*_forms(frame, whole), *forms)[:MOST]
            whole.clear()
        return result

    return call


def _forms(frame: Any, whole: set[Any]) -> list[_Form]:
    """The forms that came of these compilations."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    entries = [e for e in _debug_get_cache_entry_list(frame.__code__) if e.compile_id in whole]
    return [_Form(e.guard_manager, e.guard_manager.root.check, _function(e.code, frame)) for e in entries]


def _function(code: CodeType, frame: Any) -> Callable[..., Any]:
    """What Dynamo made of the frame's code, as a function. Its graphs need not turn Dynamo off: it is off."""
    names = _names(code)
    scope = {name: value for name, value in frame.__globals__.items() if name in names}
    for name, value in scope.items():
        if name.startswith("__compiled_fn"):
            scope[name] = getattr(value, "_torchdynamo_orig_callable", value)
    return FunctionType(code, scope, frame.__name__, frame.__defaults__, frame.__closure__)


def _names(code: CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return {"__builtins__", *code.co_names}.union(*inner)
