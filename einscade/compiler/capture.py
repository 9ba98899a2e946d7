"""Torch-level graphs to functional ATen graphs.

Comes in: a GraphModule as Dynamo or `torch.fx.symbolic_trace` makes it (torch functions, methods, leaf modules, higher
order operators) and its example inputs. Goes out: a GraphModule of ATen operations without mutation (writes to inputs
stay as `copy_` at the end), whose nodes have `val` (fake tensors), `stack_trace` and `nn_module_stack`, inputs also
`requires_grad` (their `val` is detached). The placeholders keep their names and order, parameters and buffers are read
by `get_attr` under the names they had.

A few torch functions stay whole instead of being decomposed (`WHOLE`), because their decomposition says less than they
do, and fused layers are written out (`written_out`); higher order operators (checkpointing, cond, ...) stay opaque, and
the graphs that they call are captured in turn. Gradients pass through what is captured as through the original: what
ran under `no_grad` is detached where it leaves. Autocast is resolved: every cast is a node, so the graph has to run
with autocast off (`Captured.autocast`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.utils import stateless
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from einscade.compiler.direct import direct
from einscade.compiler.written_out import WRITTEN_OUT
from einscade.runtime.messages import first_line

__all__ = ["CaptureError", "Captured", "fake_inputs", "made_fake", "nested_graphs", "operations_of", "to_aten"]

aten = torch.ops.aten

WHOLE: Mapping[Any, OpOverload] = {
    torch.nn.functional.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.nn.functional.linear: aten.linear.default,
    torch.nn.functional.dropout: aten.dropout.default,
    torch.dropout: aten.dropout.default,
}
_CAST_BY_AUTOCAST = {aten.scaled_dot_product_attention.default, aten.linear.default}

_CALLS_FIRST_ARGUMENT = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint")
"""Higher order operators of the form `op(graph, *args)`: the graph runs once, on exactly these arguments."""

_DIFFERENTIATING = ("_grad_increment_nesting", "_autograd_grad", "grad", "backward")
"""Calls of torch.func.grad and its like, torch.autograd.grad and `.backward()`: tracing runs without gradients."""


class CaptureError(Exception):
    """The graph has something whose meaning we could not keep; the message says what."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """A functional ATen graph. `autocast`: casts were made explicit, so it must run with autocast disabled."""

    gm: fx.GraphModule
    autocast: bool


def to_aten(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Captures `gm` for inputs like `example_inputs` (fake tensors of one mode, SymInts, numbers; see `fake_inputs`).

    Raises CaptureError where that is not possible; `gm` is not changed in any case.
    """
    mode = _mode_of(example_inputs)
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", node.target) in _DIFFERENTIATING:
            raise CaptureError("the graph differentiates a part of itself")
    level = torch._C._functorch.maybe_current_level()
    try:
        graph_module = _trace(gm, example_inputs, mode)
        if any(_mutates(n) for n in graph_module.graph.nodes):
            graph_module = _functionalise(graph_module, example_inputs, mode)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(first_line(error)) from error
    finally:  # a vmap that the trace stopped in is still open
        while torch._C._functorch.maybe_current_level() != level:
            torch._C._functorch.pop_dynamic_layer_stack()
    return Captured(graph_module, _uses_autocast(gm))


def operations_of(run: Callable[..., Any], values: Sequence[Any]) -> fx.Graph | None:
    """The ATen operations of a function without side effects, for values like these (fake tensors of one mode, SymInts,
    numbers): a placeholder for each value, what it returns as the output. None where they are not the same for all
    sizes that the SymInts stand for."""
    mode = _mode_of(values)
    env = mode.shape_env
    known = 0 if env is None else len(env.guards)
    with torch.no_grad(), torch._C._DisableAutocast(), mode, _KeepWhole(), _kernels_for(values):
        try:
            graph = make_fx(run, _allow_non_fake_inputs=True)(*values).graph
        except Exception:  # control flow over what is not known yet
            return None
    return graph if env is None or len(env.guards) == known else None


def fake_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any] | None, dynamic: bool = False) -> list[Any]:
    """Fake stand-ins for the placeholders of `gm`, all of one FakeTensorMode.

    Dynamo and torch.export leave them on the placeholders; else they are made from `example_inputs` (tensors and
    plain values, in placeholder order). With `dynamic`, every dimension of theirs that is not 0 or 1 gets a symbol.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = [n.meta.get("example_value", n.meta.get("val", _MISSING)) for n in placeholders]
    tensors = [v for v in known if isinstance(v, torch.Tensor)]
    complete = all(v is not _MISSING for v in known) and all(isinstance(v, FakeTensor) for v in tensors)
    if complete and len({v.fake_mode for v in tensors if isinstance(v, FakeTensor)}) <= 1:
        return known
    if example_inputs is None:
        raise CaptureError("the graph has no fake tensors on its placeholders, and no example inputs were given")
    if len(example_inputs) != len(placeholders):
        raise CaptureError(f"the graph has {len(placeholders)} inputs, {len(example_inputs)} examples were given")
    return made_fake(example_inputs, dynamic)


def made_fake(values: Sequence[Any], dynamic: bool = False) -> list[Any]:
    """Fake tensors of a new mode for tensors, other values as they are; `dynamic` as in `fake_inputs`."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    kind = DimDynamic.DUCK if dynamic else DimDynamic.STATIC

    def fake(position: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        context: Any = StatelessSymbolicContext(dynamic_sizes=[kind] * value.dim())
        return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"input_{position}"))

    return [fake(i, v) for i, v in enumerate(values)]


def nested_graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The captured graphs that the higher order operators of `gm` call, depth first, `gm` itself last."""
    for node in gm.graph.find_nodes(op="get_attr"):
        child = _attribute(gm, node.target)
        if isinstance(child, fx.GraphModule) and node.meta.get("captured"):
            yield from nested_graphs(child)
    yield gm


_MISSING = object()


def _mode_of(values: Sequence[Any]) -> FakeTensorMode:
    modes = {v.fake_mode for v in values if isinstance(v, FakeTensor)}
    if len(modes) > 1:
        raise CaptureError("the example inputs belong to different fake tensor modes")
    if modes:
        return modes.pop()
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _uses_autocast(gm: fx.GraphModule) -> bool:
    if any(torch.amp.is_autocast_available(d) and torch.is_autocast_enabled(d) for d in _devices(gm)):
        return True
    return any(n.target is torch.amp.autocast_mode._enter_autocast for n in gm.graph.nodes)


def _devices(gm: fx.GraphModule) -> set[str]:
    values = (n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes)
    return {"cpu"} | {v.device.type for v in values if isinstance(v, torch.Tensor)}


# --- tracing ---------------------------------------------------------------------------------------------------------


def _trace(gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """One trace of `gm` with everything it owns (parameters, buffers, constants) lifted to inputs, then put back."""
    owned = _owned_tensors(gm)
    fakes = [_fake_parameter(mode, t) for t in owned.values()]
    tracer = _Capture(gm, dict(zip(owned, fakes, strict=True)), mode)
    state = {name: t for name, t in tracer.owned.items() if name in tracer.state_names}

    def run(*flat: Any) -> Any:
        tracer.owned = dict(zip(owned, flat, strict=False))
        with stateless._reparametrize_module(gm, {name: tracer.owned[name] for name in state}, tie_weights=True):
            return tracer.run(*flat[len(owned) :], enable_io_processing=False)

    with tracer.contexts(), _kernels_for(inputs):
        traced = make_fx(run, _allow_non_fake_inputs=True)(*fakes, *inputs)
    return _put_back(gm, traced, list(owned), inputs, mode)


def _kernels_for(inputs: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Where shapes move, fake values come from torch's Python kernels: some of the C++ ones take numbers only."""
    moving = any(isinstance(n, torch.SymInt) for x in inputs for n in (x.shape if _is_tensor(x) else (x,)))
    return enable_python_dispatcher() if moving else contextlib.nullcontext()


def _fake_parameter(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return mode.from_tensor(tensor, static_shapes=True)


def _owned_tensors(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    owned: dict[str, torch.Tensor] = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    present = {id(t) for t in owned.values()}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = _attribute(gm, node.target)
        if isinstance(value, torch.Tensor) and id(value) not in present:
            owned[node.target] = value
            present.add(id(value))
    return owned


def _attribute(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _put_back(
    gm: fx.GraphModule, traced: fx.GraphModule, owned: Sequence[str], inputs: Sequence[Any], mode: FakeTensorMode
) -> fx.GraphModule:
    """The traced graph over `gm`'s own attributes: lifted placeholders become get_attr again, names are restored."""
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    attributes: dict[str, Any] = {}
    lifted: set[fx.Node] = set()
    for name, node in zip(owned, placeholders, strict=False):
        if node.users:
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", name)
            lifted.add(read)
            attributes[name] = _attribute(gm, name)
            read.meta.update(node.meta, requires_grad=attributes[name].requires_grad)
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    sources = gm.graph.find_nodes(op="placeholder")
    for source, node, value in zip(sources, placeholders[len(owned) :], inputs, strict=True):
        node.meta["requires_grad"] = isinstance(value, torch.Tensor) and value.requires_grad
        node.target, node.args, node.type = source.target, source.args, source.type
        node._rename(source.name)
        if "tensor_dict" in source.meta:
            node.meta["tensor_dict"] = source.meta["tensor_dict"]
    first = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    for node in graph.find_nodes(op="get_attr"):
        if node not in lifted:  # made by the trace, whose names may be those of the module's own constants
            value = _attribute(traced, node.target)
            while node.target in owned:
                node.target += "_made"
            attributes[node.target] = value
            if isinstance(value, torch.Tensor):
                node.meta["val"] = _fake_parameter(mode, value)
    if first is not None:  # placeholders come first in a graph
        for node in reversed(graph.find_nodes(op="placeholder")):
            node_first = next(iter(graph.nodes))
            if node is not node_first:
                node_first.prepend(node)
    graph.set_codegen(gm.graph._codegen)
    result = fx.GraphModule(attributes, graph, class_name=type(gm).__name__)
    result.train(gm.training)
    result.meta.update(gm.meta)
    return result


class _Capture(fx.Interpreter):
    """Runs a torch-level graph on fake tensors under make_fx, keeping grad mode, autocast and opaque nodes in order."""

    def __init__(self, gm: fx.GraphModule, owned: dict[str, torch.Tensor], mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.owned = owned
        self.state_names = {n for n, _ in gm.named_parameters()} | {n for n, _ in gm.named_buffers()}
        self.grad_at_entry = torch.is_grad_enabled()
        self.grad = _grad_modes(gm, self.grad_at_entry)
        self.autocasts: list[Any] = []
        self.mode = mode
        self.plain = not _uses_autocast(gm)

    @contextlib.contextmanager
    def contexts(self) -> Iterator[None]:
        """What the trace runs under. Grad mode is off: what is recorded must not depend on who needs gradients."""
        with torch.no_grad(), fx.traceback.preserve_node_meta(), self.mode, _KeepWhole():
            try:
                yield
            finally:
                while self.autocasts:
                    torch.amp.autocast_mode._exit_autocast(self.autocasts.pop())

    def run_node(self, n: fx.Node) -> Any:
        result = self._written_down(n) if self.plain else None
        if result is None:
            result = super().run_node(n)
        if self.grad_at_entry and not self.grad[n] and any(self.grad[u] for u in n.users):
            result = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        return result

    def _written_down(self, n: fx.Node) -> torch.Tensor | None:
        """The node as the one operation that it is, with the fake value that it has already; None where it has none."""
        value = n.meta.get("example_value")
        if not isinstance(value, FakeTensor) or value.fake_mode is not self.mode:
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = direct(n, args, kwargs)
        if call is None or not all(type(a) is FakeTensor for a in pytree.tree_leaves(call[1]) if _is_tensor(a)):
            return None
        with self._set_current_node(n):
            return _record(call[0], call[1], {}, value)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.owned:
            return self.owned[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator):
            return self._opaque_call(target, args, kwargs)
        if target is torch._C._set_grad_enabled:
            return None
        if target is torch.amp.autocast_mode._enter_autocast:
            self.autocasts.append(target(*args, **kwargs))
            return self.autocasts[-1]
        if target is torch.amp.autocast_mode._exit_autocast and args[0] in self.autocasts:
            self.autocasts.remove(args[0])
        return super().call_function(WRITTEN_OUT.get(target, target), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target == "requires_grad_":
            raise CaptureError("requires_grad_() inside the graph")
        return super().call_method(target, args, kwargs)

    def _opaque_call(self, target: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
        """A higher order operator as one node. The graph it calls is captured on its own where the call is plain."""
        tracer = _tracer()
        captured = target.name() in _CALLS_FIRST_ARGUMENT and isinstance(args[0], fx.GraphModule)
        if not captured and self.autocasts:
            raise CaptureError(f"{target.name()} under autocast")
        with disable_proxy_modes_tracing():
            if captured:
                result = fx.Interpreter(args[0]).run(*args[1:])
                args = (_captured_child(args[0], args[1:]), *args[1:])
            else:
                known = fx.traceback.get_current_meta().get("example_value", _MISSING)
                if known is _MISSING:
                    raise CaptureError(f"{target.name()} without a known result")
                result = known
        return _record(target, _register(tracer, args, captured), kwargs, result)


def _captured_child(child: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    return to_aten(child, list(args)).gm


def _register(tracer: Any, args: tuple[Any, ...], captured: bool) -> tuple[Any, ...]:
    """The arguments with each graph among them made a submodule of the traced root and read by a get_attr node."""

    def read(value: Any) -> Any:
        if not isinstance(value, fx.GraphModule):
            return value
        name = tracer.get_fresh_qualname("subgraph_")
        tracer.root.register_module(name, value)
        node = tracer.create_node("get_attr", name, (), {})
        node.meta["captured"] = captured
        return fx.Proxy(node, tracer)

    return tuple(read(a) for a in args)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _tracer() -> Any:
    mode = get_proxy_mode()
    if mode is None:
        raise CaptureError("not tracing")
    return mode.tracer


def _grad_modes(gm: fx.GraphModule, enabled: bool) -> dict[fx.Node, bool]:
    """Whether grad mode is on where each node runs; raises where the graph turns it on inside a no_grad caller."""
    at_entry, modes = enabled, {}
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            if enabled and not at_entry:
                raise CaptureError("the graph enables gradients inside a caller's no_grad")
        modes[node] = at_entry if node.op == "output" else enabled
    return modes


class _KeepWhole(TorchFunctionMode):
    """Records the functions of WHOLE as one ATen node instead of their decomposition."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = WHOLE.get(func)
        if whole is None or get_proxy_mode() is None:
            return func(*args, **kwargs)
        if whole is aten.dropout.default:
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            value = kwargs.get("input", args[0] if args else None)
            if kwargs.get("inplace") or len(args) > 3 or not training or p == 0:
                return func(*args, **kwargs) if kwargs.get("inplace") else value
            args, kwargs = (value, p, True), {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not all(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)  # a functorch level is active: let it decompose
        device = tensors[0].device.type
        if whole in _CAST_BY_AUTOCAST and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _autocast(t, dtype), (args, kwargs))
        if whole is aten.scaled_dot_product_attention.default:
            _agree(*args, **kwargs)
        return record_whole(whole, args, kwargs)


def _agree(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: object,
    enable_gqa: bool = False,
    **others: object,
) -> None:
    """Makes sizes one symbol that a scaled_dot_product_attention has to have in common. Its fake kernels do not compare
    them, and lengths that are marked as dynamic have a symbol each: keys would be as many as values by accident."""
    heads = 1 if enable_gqa else 0  # of queries there may be more
    front = max(query.dim(), key.dim(), value.dim()) - 2
    rows = [query.shape[:-2], key.shape[:-2], value.shape[:-2]]
    pairs = [(query.shape[-1], key.shape[-1]), (key.shape[-2], value.shape[-2])]
    for d in range(1, front + 1):
        sizes = [shape[-d] for shape in (rows[1:] if d <= heads else rows) if len(shape) >= d]
        pairs += [(sizes[0], n) for n in sizes[1:]]
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        pairs += list(zip(reversed(attn_mask.shape), reversed(scores), strict=False))
    for a, b in pairs:
        if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and not a.node.shape_env.frozen:
            guard_or_false(a == b)


def _autocast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def record_whole(op: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Records `op` as one node of the trace in progress; its result comes from running it on the fake tensors."""
    with disable_proxy_modes_tracing():
        result = op(*args, **kwargs)
    return _record(op, args, kwargs, result)


def _record(target: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> Any:
    """One node of the trace in progress, `result` its value. Tracing looks at many attributes of fake tensors, which
    function modes would see one by one."""
    tracer = _tracer()
    with torch._C.DisableTorchFunction():
        proxy_args, proxy_kwargs = pytree.tree_map(tracer.unwrap_proxy, (args, dict(kwargs)))
        proxy = tracer.create_proxy("call_function", target, proxy_args, proxy_kwargs)
        return track_tensor_tree(result, proxy, constant=None, tracer=tracer)


# --- functionalisation -----------------------------------------------------------------------------------------------


def _functionalise(gm: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """A second trace without mutation: writes to temporaries disappear, writes to inputs become `copy_` at the end."""
    owned = _owned_tensors(gm)
    fakes = [_fake_parameter(mode, t) for t in owned.values()]
    replay = _Functional(gm)

    def run(*flat: Any) -> Any:
        replay.owned = dict(zip(owned, flat, strict=False))
        return replay.run(*flat[len(owned) :], enable_io_processing=False)

    with torch.no_grad(), fx.traceback.preserve_node_meta(), mode, _kernels_for(inputs):
        traced = make_fx(torch.func.functionalize(run, remove="mutations"), _allow_non_fake_inputs=True)(
            *fakes, *inputs
        )
    result = _put_back(gm, traced, list(owned), inputs, mode)
    _without_copies(result)
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def _without_copies(gm: fx.GraphModule) -> None:
    """What functionalisation makes of `x[i] = y`, without `copy`: autograd has no derivative for that."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.copy.default):
        target, source = node.args[0].meta["val"], node.args[1].meta["val"]
        with gm.graph.inserting_before(node), source.fake_mode, torch.no_grad():
            result = node.args[1]
            if source.dtype != target.dtype or source.device != target.device:
                kind = {"dtype": target.dtype, "device": target.device}
                result = gm.graph.call_function(aten._to_copy.default, (result,), kind)
                result.meta = {**node.meta, "val": aten._to_copy(source, **kind)}
            if source.shape != target.shape:
                sizes = [_size(gm, node.args[0], d, n) for d, n in enumerate(target.shape)]
                result = gm.graph.call_function(aten.expand.default, (result, sizes))
                result.meta = node.meta
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)


def _size(gm: fx.GraphModule, node: fx.Node, dim: int, size: Any) -> Any:
    """A size as an argument of a node."""
    if not isinstance(size, torch.SymInt):
        return size
    read = gm.graph.call_function(aten.sym_size.int, (node, dim))
    read.meta["val"] = size
    return read


class _Functional(fx.Interpreter):
    """Replays an ATen graph under functionalize; opaque nodes are unwrapped, recorded and wrapped again."""

    owned: dict[str, torch.Tensor]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.owned:
            return self.owned[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        opaque = isinstance(target, HigherOrderOperator)
        if not opaque and target not in WHOLE.values():
            return super().call_function(target, args, kwargs)
        from torch._functorch import eager_transforms

        args, kwargs = eager_transforms._unwrap_all_tensors_from_functional((args, kwargs), reapply_views=True)
        if opaque:
            captured = any(a.meta.get("captured", False) for a in self._node.all_input_nodes)
            args = _register(_tracer(), args, captured)
        result = _record(target, args, kwargs, self._node.meta["val"])  # to run it would functionalise its inside
        level = torch._C._functorch.maybe_current_level() or 0
        return eager_transforms._wrap_all_tensors_to_functional(result, level=level)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)
