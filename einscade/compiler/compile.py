"""From one graph to something to call: capture, rewrite, and the compiler for the rest.

Comes in: a torch-level graph with its example inputs, as Dynamo hands them to a backend. Goes out: a callable for it.
If anything stops the rewriting, the graph goes to the inner compiler as it came, the report says why, and one warning
is given.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from einscade.compiler import operators
from einscade.compiler.capture import Captured, CaptureError, fake_inputs, to_aten
from einscade.compiler.report import REWRITTEN, Report
from einscade.compiler.rewrite import rewrite
from einscade.runtime import progress
from einscade.runtime.messages import first_line, warn_once

__all__ = [
    "RewrittenGraph",
    "apart",
    "compile_graph",
    "constants_of",
    "default_inner",
    "frame_path",
    "inner_compile",
    "rewritten",
    "weights_of",
]

aten = torch.ops.aten


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: str,
    inner: str,
    report: Report,
    model: nn.Module | None = None,
) -> Any:
    """What runs in place of `gm`. `report` learns what was done; the paths in it are those of `model`."""
    specialise_floats(gm)
    constants = constants_of(gm, example_inputs)
    weights = weights_of(gm, example_inputs)
    try:
        within = "" if model is None else frame_path(gm, example_inputs, model)
        found = rewritten(gm, fake_inputs(gm, example_inputs), recipe, report, constants, weights, within)
    except CaptureError as stop:
        report.add((), f"not captured: {stop}")
        warn_once(f"a graph is left as it was: {stop}")
        found = None
    finally:
        progress.finish()
    if found is None:
        return inner_compile(gm, example_inputs, inner, autocast=False)
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if operators.are_plain(tensors) and not _anything_left(found.captured.gm, recorded):
        _call_directly(found.captured.gm, recorded)
        inner = "eager"
    compiled = inner_compile(found.captured.gm, example_inputs, inner, found.captured.autocast)
    compiled = _while_apart(compiled, gm, found.written, weights | constants.keys())
    return _while_constant(compiled, gm, found.relied_on, example_inputs)


def specialise_floats(gm: fx.GraphModule) -> None:
    """Make Dynamo trace again with the graph's float inputs (a scale, an epsilon) as the constants they are.

    Under `dynamic=True` they arrive as symbols. Inductor asks for the same, but only once everything is compiled, so
    that all of the work would be done twice.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    again = False
    for node in gm.graph.find_nodes(op="placeholder"):
        item = getattr(node.meta.get("example_value"), "item_memo", None)
        if isinstance(item, torch.SymFloat) and all(u.target == "item" for u in node.users):
            name = str(item.node._expr)
            again |= not TensorifyState.should_specialize(name)
            TensorifyState.specialize(name)
    if again:
        raise TensorifyScalarRestartAnalysis


@dataclass(frozen=True)
class RewrittenGraph:
    """A captured graph with operators in it. `relied_on`: the inputs and attributes, by name, that it is special to;
    `written`: those that it updates."""

    captured: Captured
    relied_on: frozenset[str]
    written: frozenset[str]


def rewritten(
    gm: fx.GraphModule,
    fakes: Sequence[Any],
    recipe: str,
    report: Report,
    constants: dict[str, torch.Tensor],
    weights: set[str],
    within: str = "",
    settled: bool = True,
) -> RewrittenGraph | None:
    """The captured and rewritten graph; None where nothing in it was rewritten. Raises CaptureError. `within`: the path
    of the module that the graph's module paths begin at; `settled` as in `rewrite`."""
    captured = to_aten(gm, fakes)
    written = {n.args[0].name for n in captured.gm.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    known = {name: value for name, value in constants.items() if name not in written}
    try:
        result = rewrite(captured.gm, recipe, known, weights, within, settled)
    except Exception as error:  # whatever goes wrong here must not cost the user their model
        raise CaptureError(f"internal error, {first_line(error)}") from error
    report.add(result.sites)
    if not any(s.status == REWRITTEN for s in result.sites):
        return None
    return RewrittenGraph(captured, result.relied_on, frozenset(written))


def _anything_left(gm: fx.GraphModule, recorded: bool) -> bool:
    """Whether a graph has anything for another compiler to compile: more than operators and views. Else it is called as
    it is, without what compilers put around every call (Inductor may have been told to record CUDA graphs). `recorded`:
    whether autograd records it. Then compilers also see to it that results are no views."""
    from torch._inductor import config

    if config.triton.cudagraphs or (recorded and any(_is_view(n) for n in _results(gm))):
        return True
    calls = (n for n in gm.graph.nodes if n.op == "call_function")
    return not all(_is_view(n) or n.target in (operators.cascade, operator.getitem, aten.sym_size.int) for n in calls)


def _is_view(node: fx.Node) -> bool:
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    """The results that a graph makes."""
    return [n for n in gm.graph.output_node().all_input_nodes if n.op == "call_function"]


def _call_directly(gm: fx.GraphModule, recorded: bool) -> None:
    """Puts what the operator calls in its place: Dynamo guards what kind of tensors there are. Results that are not
    recorded are no views."""
    for node in gm.graph.find_nodes(op="call_function", target=operators.cascade):
        inputs, sizes, program = node.args
        node.target = operators.direct(program, inputs[0].meta["val"].device)
        node.args = (inputs, sizes)
    ours = [n for n in _results(gm) if not recorded and _made_of(n).target is operator.getitem]
    for node in ours:
        with gm.graph.inserting_after(node):
            whole = gm.graph.call_function(operators.owned, (node,))
        gm.graph.output_node().replace_input_with(node, whole)
    gm.recompile()


def _made_of(node: fx.Node) -> fx.Node:
    """What a view is one of."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: str, autocast: bool) -> Callable[..., Any]:
    """The graph by one of the inner compilers. `autocast`: its casts are explicit, so none may be added."""
    if inner == "eager":
        compiled: Callable[..., Any] = gm.forward
    else:
        with _no_autocast(autocast):
            if inner == "inductor":
                from torch._inductor.compile_fx import compile_fx

                compiled = cast("Callable[..., Any]", compile_fx(gm, list(example_inputs)))
            else:
                from torch._dynamo.backends.debugging import aot_eager

                compiled = aot_eager(gm, list(example_inputs))
    if not autocast:
        return compiled

    @functools.wraps(compiled)
    def without_autocast(*args: Any) -> Any:
        with _no_autocast(True):
            return compiled(*args)

    return without_autocast


def _no_autocast(disable: bool) -> Any:
    return torch._C._DisableAutocast() if disable else contextlib.nullcontext()


def default_inner(model: nn.Module) -> str:
    """ "inductor" where its code can be compiled for the model's device, else "aot_eager"."""
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
    if device == "cpu":
        return "inductor" if _cpp_compiler() else "aot_eager"
    return "inductor" if _triton() and _cpp_compiler() else "aot_eager"


@functools.cache
def _cpp_compiler() -> bool:
    """Whether Inductor would find a C++ compiler."""
    from torch._inductor import config

    chosen = config.cpp.cxx
    names = [c for c in (chosen if isinstance(chosen, (tuple, list)) else (chosen,)) if c]
    if sys.platform == "win32":
        names.append("cl")
    return any(shutil.which(str(name)) for name in [*names, "g++", "clang++"])


@functools.cache
def _triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


# --- what the graph may rely on --------------------------------------------------------------------------------------


def weights_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> set[str]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {n.name for n, v in zip(placeholders, example_inputs, strict=True) if isinstance(v, nn.Parameter)}


def constants_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Buffers and other tensors of modules among the inputs: masks and tables that a domain may come from."""
    found = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        plain = type(value) is torch.Tensor and not value.requires_grad and not value.is_inference()
        if plain and value.device.type != "meta" and _belongs_to_module(node):
            found[node.name] = value
    return found


def _belongs_to_module(node: fx.Node) -> bool:
    """Whether Dynamo took the input from a module rather than from the call's arguments."""
    text = _source_name(node)
    return "_buffers[" in text or text.startswith("L['self']")


def _source_name(node: fx.Node) -> str:
    """Where Dynamo took an input from, as a Python expression."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return name() if callable(name) else str(name)


def frame_path(gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module) -> str:
    """The path in `model` of the module whose call Dynamo compiles; after a graph break that is not always `model`.

    It is what the name of a parameter in the model has before the name that the frame has for it. "" where no
    parameter tells.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        own = re.sub(r"\._(?:modules|parameters)\['([^']*)'\]", r".\1", _source_name(node))
        whole = names.get(id(value))
        if whole is not None and own.startswith("L['self']."):
            own = own.removeprefix("L['self'].")
            if whole != own and whole.endswith(f".{own}"):
                return whole.removesuffix(f".{own}")
    return ""


def _while_apart(
    compiled: Callable[..., Any], original: fx.GraphModule, written: Collection[str], owned: Collection[str]
) -> Callable[..., Any]:
    """`compiled` for calls in which nothing else is in the memory of what the graph updates, the original graph for the
    others: a functional graph does not see one input change with another. `owned` are modules' tensors."""
    names = [n.name for n in original.graph.find_nodes(op="placeholder")]
    updated = [i for i, name in enumerate(names) if name in written]
    given = [i for i, name in enumerate(names) if name not in owned or name in written]
    if not updated:
        return compiled

    def run(*args: Any) -> Any:
        return compiled(*args) if apart(args, updated, given) else original.forward(*args)

    return run


def apart(values: Sequence[Any], updated: Sequence[int], given: Sequence[int]) -> bool:
    """Whether none of the tensors at `given` shares memory with another one at `updated`."""
    owner: dict[int, int] = {}
    for i in updated:
        owner[values[i].untyped_storage()._cdata] = i
    if len(owner) < len(updated):
        return False
    tensors = ((i, values[i]) for i in given if isinstance(values[i], torch.Tensor))
    return all(owner.get(t.untyped_storage()._cdata, i) == i for i, t in tensors)


def _while_constant(
    compiled: Callable[..., Any], original: fx.GraphModule, relied_on: Collection[str], inputs: Sequence[Any]
) -> Callable[..., Any]:
    """`compiled` while the tensors that it was specialised on are what they were; the original graph after that."""
    names = [str(n.target) for n in original.graph.find_nodes(op="placeholder")]
    watched = [(i, weakref.ref(inputs[i]), inputs[i]._version) for i, name in enumerate(names) if name in relied_on]
    if not watched:
        return compiled

    def run(*args: Any) -> Any:
        for i, tensor, version in watched:
            if args[i] is not tensor() or args[i]._version != version:
                warn_once(
                    "a buffer that a graph was specialised on has changed; that graph runs unoptimised from now on"
                )
                return original.forward(*args)
        return compiled(*args)

    return run
