"""GraphModules in, GraphModules out.

Comes in: a `torch.fx.GraphModule`. Goes out: an `OptimizedGraphModule` that shares its parameters. It is rewritten at
once where fake tensors are on the placeholders or example inputs are given, else on its first call, and again on a call
whose inputs the present graph was not made for (`Variant.accepts`). Its `graph` is the newest rewritten one; with
`inner=None` that graph simply runs, so that it can be compiled, exported or transformed further.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from einscade.compiler.capture import CaptureError, fake_inputs, made_fake
from einscade.compiler.compile import inner_compile, rewritten
from einscade.compiler.report import Report

__all__ = ["OptimizedGraphModule", "flat_inputs", "optimized"]

MOST_VARIANTS = 16
"""Graphs kept for different inputs; beyond that, calls that fit none run the original graph."""


def optimized(
    gm: fx.GraphModule,
    recipe: str,
    inner: str | None,
    dynamic: bool | None,
    examples: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
    report: Report,
) -> OptimizedGraphModule:
    """`gm` as an OptimizedGraphModule, rewritten already where that can be done without a call."""
    fast = OptimizedGraphModule(gm)
    fast._einscade = state = _State(gm, recipe, inner, dynamic, report)
    if examples is not None:
        fast._adopt(state.variant_for(flat_inputs(gm, *examples)))
    elif all("val" in n.meta for n in gm.graph.find_nodes(op="placeholder")):
        fast._adopt(state.derive(fake_inputs(gm, None)))
    return fast


class OptimizedGraphModule(fx.GraphModule):
    """The rewritten graph over the original's parameters; see the module's docstring."""

    _einscade: _State | None

    def __init__(self, root: fx.GraphModule, graph: fx.Graph | None = None, class_name: str | None = None) -> None:
        super().__init__(root, _copied(root.graph) if graph is None else graph, class_name or type(root).__name__)
        for kind in ("_modules", "_parameters", "_buffers"):
            for name, value in root.__dict__[kind].items():
                self.__dict__[kind].setdefault(name, value)
        self.training = root.training
        self._einscade = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state: _State | None = self.__dict__.get("_einscade")
        if state is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        flat = flat_inputs(state.original, args, kwargs)
        variant = state.variant_for(flat)
        if variant is None:
            return state.original(*args, **kwargs)
        if variant.compiled is not None:
            return variant.compiled(args, kwargs, flat)
        if variant is not state.current:
            self._adopt(variant)
        return super().__call__(*args, **kwargs)

    def _adopt(self, variant: Variant | None) -> None:
        """Makes the variant's graph this module's own."""
        assert self._einscade is not None
        if variant is None:
            return
        for node in variant.gm.graph.find_nodes(op="get_attr"):
            _share(variant.gm, self, node.target)
        self.graph = variant.gm.graph
        self._einscade.current = variant


@dataclass
class Variant:
    """One rewritten graph and what it was made for."""

    gm: fx.GraphModule
    fakes: tuple[Any, ...]
    grad_mode: bool
    relied_on: tuple[tuple[torch.Tensor, int], ...]
    compiled: Callable[[tuple[Any, ...], Mapping[str, Any], list[Any]], Any] | None = None
    _accepted: dict[Any, bool] = field(default_factory=dict)

    def accepts(self, flat: Sequence[Any]) -> bool:
        """Whether the graph is right for these inputs: dtypes, devices, dimensions, layouts, plain values, grad mode,
        and that the buffers it was specialised on are unwritten."""
        if torch.is_grad_enabled() != self.grad_mode or any(t._version != v for t, v in self.relied_on):
            return False
        key = tuple(_property(v) for v in flat)
        try:
            if key not in self._accepted:
                self._accepted[key] = self._fits(flat)
            return self._accepted[key]
        except TypeError:  # an unhashable plain value
            return self._fits(flat)

    def _fits(self, flat: Sequence[Any]) -> bool:
        if len(flat) != len(self.fakes):
            return False
        sizes: dict[sympy.Symbol, int] = {}
        env = None
        for fake, value in zip(self.fakes, flat, strict=True):
            if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor):
                if isinstance(fake, torch.Tensor) or isinstance(value, torch.Tensor) or fake != value:
                    return False
                continue
            if (fake.dtype, fake.device, fake.dim()) != (value.dtype, value.device, value.dim()):
                return False
            if _order(fake) != _order(value):
                return False
            for length, actual in zip(fake.shape, value.shape, strict=True):
                if not isinstance(length, torch.SymInt):
                    if length != actual:
                        return False
                    continue
                env = length.node.shape_env
                expr = length.node.expr
                if expr.is_Symbol:
                    if sizes.setdefault(expr, int(actual)) != actual:
                        return False
                elif int(expr.xreplace(sizes)) != actual:
                    return False
        if env is None:
            return True
        values = {s: sympy.Integer(n) for s, n in sizes.items()}
        for symbol, n in sizes.items():
            bounds = env.var_to_range.get(symbol)
            if bounds is not None and not (bounds.lower <= n <= bounds.upper):
                return False
        return all(guard.expr.xreplace(values) == sympy.true for guard in env.guards)


class _State:
    """What an OptimizedGraphModule remembers: the original, what was asked for, and the variants made so far."""

    def __init__(
        self, original: fx.GraphModule, recipe: str, inner: str | None, dynamic: bool | None, report: Report
    ) -> None:
        self.original, self.recipe, self.inner, self.dynamic, self.report = original, recipe, inner, dynamic, report
        self.variants: list[Variant] = []
        self.current: Variant | None = None
        self.failed: str | None = None

    def variant_for(self, flat: list[Any]) -> Variant | None:
        """The variant for these inputs, made now if there is none; None where the original has to run."""
        for variant in self.variants:
            if variant.accepts(flat):
                return variant
        if self.failed is not None or len(self.variants) >= MOST_VARIANTS:
            return None
        dynamic = bool(self.variants) if self.dynamic is None else self.dynamic
        try:
            return self.derive(made_fake(flat, dynamic))
        except CaptureError as stop:
            self.give_up(str(stop))
            return None

    def derive(self, fakes: list[Any]) -> Variant | None:
        constants: dict[str, torch.Tensor] = {}
        try:
            made = rewritten(self.original, fakes, self.recipe, self.report, constants, set())
        except CaptureError as stop:
            self.give_up(str(stop))
            return None
        if made is None:
            self.failed = "nothing to rewrite"
            return None
        gm = made.captured.gm
        read = [n.target for n in self.original.graph.find_nodes(op="get_attr")]
        constants_read = (_attribute(self.original, str(name)) for name in {*read, *dict(self.original.named_buffers())}
                          if name in made.relied_on)  # fmt: skip
        relied_on = tuple(
            (t, t._version) for t in constants_read if isinstance(t, torch.Tensor) and not t.is_inference()
        )
        variant = Variant(gm, tuple(fakes), torch.is_grad_enabled(), relied_on)
        if self.inner not in (None, "eager") or made.captured.autocast:
            variant.compiled = self.compiled(gm, made.captured.autocast)
        self.variants.insert(0, variant)
        return variant

    def compiled(
        self, gm: fx.GraphModule, autocast: bool
    ) -> Callable[[tuple[Any, ...], Mapping[str, Any], list[Any]], Any]:
        if self.inner in (None, "eager"):
            return lambda args, kwargs, flat: _without_autocast(gm, args, kwargs)
        cell: list[Callable[..., Any]] = []
        plain = _flat_graph(gm)

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: list[Any]) -> Any:
            if not cell:
                cell.append(inner_compile(plain, flat, self.inner or "eager", autocast))
            outputs = cell[0](*flat)
            return gm.graph._codegen.process_outputs(pytree.tree_unflatten(outputs, plain.meta["out_spec"]))

        return run

    def give_up(self, reason: str) -> None:
        self.failed = reason
        self.report.add((), f"not captured: {reason}")
        warnings.warn(f"einscade: the graph is left as it was: {reason}", RuntimeWarning, stacklevel=5)


def _without_autocast(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with torch._C._DisableAutocast():
        return gm(*args, **kwargs)


def _flat_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with flat inputs and a tuple of outputs, as compilers want it; `meta["out_spec"]` is the spec."""
    graph = _copied(gm.graph)
    graph.set_codegen(fx.graph.CodeGen())
    output = graph.output_node()
    leaves, spec = pytree.tree_flatten(output.args[0], is_leaf=lambda x: isinstance(x, fx.Node))
    output.args = (tuple(leaves),)
    flat = fx.GraphModule(gm, graph)
    flat.meta["out_spec"] = spec
    return flat


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.set_codegen(graph._codegen)
    values: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, values)
    old = graph.output_node()
    output = new.output(result)
    output.meta.update(old.meta)
    return new


def _share(source: torch.nn.Module, target: torch.nn.Module, path: str) -> None:
    """Makes `target.path` be `source.path`, with plain modules where its prefix has none."""
    *prefix, name = path.split(".")
    for part in prefix:
        source = getattr(source, part)
        if not hasattr(target, part):
            setattr(target, part, torch.nn.Module())
        target = getattr(target, part)
    if not hasattr(target, name):
        setattr(target, name, getattr(source, name))


def _attribute(root: torch.nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def flat_inputs(gm: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The call's values in placeholder order, defaults filled in. Raises TypeError as a call with them would."""
    if isinstance(gm.graph._codegen, fx.graph._PyTreeCodeGen):
        return list(pytree.arg_tree_leaves(*args, **kwargs))
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    values: list[Any] = []
    for name, parameter in inspect.signature(gm.forward).parameters.items():
        value = bound.arguments[name]
        values.extend(value if parameter.kind is inspect.Parameter.VAR_POSITIONAL else [value])
    return values


def _property(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    return (type(value), value)


def _order(tensor: torch.Tensor) -> tuple[bool, tuple[int, ...]]:
    """A layout up to lengths: contiguous or not, and which dimension is inside which."""
    strides = tensor.stride()
    if tensor.is_contiguous():
        return True, ()
    hints = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in strides]
    return False, tuple(sorted(range(len(hints)), key=lambda d: (-hints[d], d)))
