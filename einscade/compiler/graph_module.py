"""GraphModules in, GraphModules out.

Comes in: a `torch.fx.GraphModule`. Goes out: an `OptimizedGraphModule` that shares its parameters, buffers and
submodules. It is rewritten at once where fake tensors are on the placeholders or example inputs are given, else on its
first call, and again on a call that no graph was made for so far (`Variant.accepts`, `Held.unchanged`): other inputs,
another grad mode or autocast, a submodule put into train or eval mode, a tensor rebound or cast, a buffer written that
became part of a cascade. Its `graph` is the newest rewritten one; with `inner=None` that graph simply runs, so that it
can be compiled, exported or transformed further.

As with a shallow copy, what is rebound on the result's root (`fast.mask = new`) is the result's own; what happens
inside submodules, and every update in place, is seen by the original too.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from einscade.compiler.capture import CaptureError, fake_inputs, made_fake
from einscade.compiler.compile import apart, inner_compile, rewritten
from einscade.compiler.report import Report

__all__ = ["OptimizedGraphModule", "flat_inputs", "optimized"]

MOST_VARIANTS = 16
"""So often is a module rewritten; after that, calls that fit no graph there is run the original one."""

AUTOCAST_DEVICES = ("cpu", "cuda")
"""Kinds of devices whose autocast changes what a graph is (those that kernels are generated for)."""


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
    fast._einscade = state = _State(_original(gm, fast), recipe, inner, dynamic, report)
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
            own, shared = self.__dict__[kind], root.__dict__[kind]
            self.__dict__[kind] = {**shared, **{name: value for name, value in own.items() if name not in shared}}
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.training = root.training
        self._einscade = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state: _State | None = self.__dict__.get("_einscade")
        if state is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() is not None:  # torch.func: no graph was made for its tensors
            return state.original(*args, **kwargs)
        flat = flat_inputs(state.original, args, kwargs)
        variant = state.variant_for(flat)
        if variant is None or not apart(flat, variant.updated, range(len(flat))):
            return state.original(*args, **kwargs)
        if variant.compiled is not None:
            return variant.compiled(args, kwargs, flat)
        if variant is not state.current:
            self._adopt(variant)
        return super().__call__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        """A copy of the original that is optimised in the same way, on its first call: what was made so far watches
        this module's tensors."""
        state: _State | None = self.__dict__.get("_einscade")
        if state is None:
            return super().__deepcopy__(memo)
        original = copy.deepcopy(state.original, memo)
        report = copy.deepcopy(state.report)
        result = memo[id(self)] = optimized(original, state.recipe, state.inner, state.dynamic, None, report)
        result.__dict__["report"] = report
        return result

    def __reduce__(self) -> Any:
        """Pickled as the original: what was made so far is special to inputs, modes and this process."""
        state: _State | None = self.__dict__.get("_einscade")
        return super().__reduce__() if state is None else state.original.__reduce__()

    def _adopt(self, variant: Variant | None) -> None:
        """Makes the variant's graph this module's own."""
        assert self._einscade is not None
        if variant is None or variant.gm is self._einscade.original:
            return
        for name in variant.made:
            setattr(self, name, getattr(variant.gm, name))
        self.graph = variant.gm.graph
        self._einscade.current = variant


@dataclass
class Variant:
    """One graph and what it was made for: a rewritten one, or the original where there was nothing to rewrite. `made`
    names the attributes that capturing added (constants, the graphs that it calls), `updated` the positions of inputs
    that it writes to; `compiled`, if there, runs instead of `gm`."""

    gm: fx.GraphModule
    fakes: tuple[Any, ...]
    same: tuple[int, ...]
    modes: tuple[Any, ...]
    held: Held
    made: tuple[str, ...] = ()
    updated: tuple[int, ...] = ()
    compiled: Callable[[tuple[Any, ...], Mapping[str, Any], list[Any]], Any] | None = None
    _accepted: dict[Any, bool] = field(default_factory=dict)

    def accepts(self, flat: Sequence[Any]) -> bool:
        """Whether the graph is right for these inputs: dtypes, devices, dimensions, layouts, which of them are one
        tensor, plain values, where it is compiled who needs gradients; and for the modes that are on."""
        if self.modes != _modes():
            return False
        key = (_same(flat), *(_property(v) for v in flat))
        try:
            if key not in self._accepted:
                self._accepted[key] = self._fits(flat)
            return self._accepted[key]
        except TypeError:  # an unhashable plain value
            return self._fits(flat)

    def _fits(self, flat: Sequence[Any]) -> bool:
        if len(flat) != len(self.fakes) or _same(flat) != self.same:
            return False
        sizes: dict[sympy.Symbol, int] = {}
        env = None
        for fake, value in zip(self.fakes, flat, strict=True):
            if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor):
                if isinstance(fake, torch.Tensor) or type(fake) is not type(value) or fake != value:
                    return False
                continue
            if (fake.dtype, fake.device, fake.dim()) != (value.dtype, value.device, value.dim()):
                return False
            if _order(fake) != _order(value):
                return False
            if self.compiled is not None and fake.requires_grad != value.requires_grad:
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
        values: dict[sympy.Symbol, sympy.Expr] = {s: sympy.Integer(n) for s, n in sizes.items()}
        values |= {s: known.xreplace(values) for s, known in env.replacements.items()}  # found to be that while tracing
        for symbol, n in sizes.items():
            bounds = env.var_to_range.get(symbol)
            if bounds is not None and not (bounds.lower <= n <= bounds.upper):
                return False
        return all(guard.expr.xreplace(values) == sympy.true for guard in env.guards)


@dataclass(frozen=True)
class Held:
    """What a module held when a graph was made of it. `places`: the tables on the way to each tensor and module that
    the graph is of, with what they had there; `kinds`: what must stay of each; `versions`: of the tensors whose values
    are part of the graph."""

    places: tuple[tuple[Mapping[str, Any], str, object], ...]
    kinds: tuple[tuple[Any, Any], ...]
    versions: tuple[tuple[torch.Tensor, int], ...]

    @staticmethod
    def by(root: nn.Module, paths: Collection[str], relied_on: Collection[str]) -> Held:
        places: dict[tuple[int, str], tuple[Mapping[str, Any], str, object]] = {}
        found: dict[str, Any] = {}
        for path in paths:
            value: Any = root
            for name in path.split("."):
                table = next(t for t in (value._parameters, value._buffers, value._modules, vars(value)) if name in t)
                value = table[name]
                places[id(table), name] = (table, name, value)
            found[path] = value
        special = (found[path] for path in found if path in relied_on)
        versions = tuple((t, t._version) for t in special if isinstance(t, torch.Tensor) and not t.is_inference())
        return Held(tuple(places.values()), tuple((v, _kind(v)) for v in found.values()), versions)

    @property
    def unchanged(self) -> bool:
        return (
            all(table.get(name) is value for table, name, value in self.places)
            and all(_kind(value) == kind for value, kind in self.kinds)
            and all(tensor._version == version for tensor, version in self.versions)
        )


class _State:
    """What an OptimizedGraphModule remembers: the original graph over the module's own state, what was asked for, and
    the variants made so far."""

    def __init__(
        self, original: fx.GraphModule, recipe: str, inner: str | None, dynamic: bool | None, report: Report
    ) -> None:
        self.original, self.recipe, self.inner, self.dynamic, self.report = original, recipe, inner, dynamic, report
        self.variants: list[Variant] = []
        self.current: Variant | None = None
        self.failed: str | None = None
        self.derived = 0

    def variant_for(self, flat: list[Any]) -> Variant | None:
        """The variant for these inputs, made now if there is none; None where the original has to run."""
        for variant in self.variants:
            if variant.accepts(flat):
                if variant.held.unchanged:
                    return variant
                self.variants.remove(variant)
                break
        if self.failed is not None:
            return None
        dynamic = bool(self.variants) if self.dynamic is None else self.dynamic
        try:
            return self.derive(made_fake(flat, dynamic))
        except CaptureError as stop:
            self.give_up(str(stop))
            return None

    def derive(self, fakes: list[Any]) -> Variant | None:
        if self.derived >= MOST_VARIANTS:
            self.give_up(f"rewritten {self.derived} times already, for other inputs, modes or buffers")
            return None
        self.derived += 1
        constants: dict[str, torch.Tensor] = {}
        try:
            settled = self.derived <= MOST_VARIANTS // 2  # what moves time and again is no width of the model
            rewrite = rewritten(self.original, fakes, self.recipe, self.report, constants, set(), settled=settled)
        except CaptureError as stop:
            self.give_up(str(stop))
            return None
        gm, relied_on = (self.original, frozenset()) if rewrite is None else (rewrite.captured.gm, rewrite.relied_on)
        state = {name for name, _ in (*self.original.named_parameters(), *self.original.named_buffers())}
        state |= {str(n.target) for n in self.original.graph.find_nodes(op="get_attr")}
        read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
        called = {str(n.target) for n in self.original.graph.find_nodes(op="call_module")}
        called = {p for p, _ in self.original.named_modules() if any(p == c or p.startswith(f"{c}.") for c in called)}
        held = Held.by(self.original, [*called, *((read | relied_on) & state)], relied_on)
        variant = Variant(gm, tuple(fakes), _same(fakes), _modes(), held, tuple(read - state))
        if rewrite is not None:
            inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
            variant.updated = tuple(i for i, n in inputs if n.name in rewrite.written)
        if rewrite is None:
            variant.compiled = lambda args, kwargs, flat: self.original(*args, **kwargs)
        elif self.inner not in (None, "eager") or rewrite.captured.autocast:
            variant.compiled = self.compiled(variant, rewrite.captured.autocast)
        self.variants.insert(0, variant)
        return variant

    def compiled(
        self, variant: Variant, autocast: bool
    ) -> Callable[[tuple[Any, ...], Mapping[str, Any], list[Any]], Any]:
        gm = variant.gm
        if self.inner in (None, "eager"):
            return lambda args, kwargs, flat: _without_autocast(gm, args, kwargs)
        cell: list[Callable[..., Any]] = []
        plain = _flat_graph(gm)

        def run(args: tuple[Any, ...], kwargs: Mapping[str, Any], flat: list[Any]) -> Any:
            if not cell:
                cell.append(inner_compile(plain, variant.fakes, self.inner or "eager", autocast))
            outputs = cell[0](*flat)
            return gm.graph._codegen.process_outputs(pytree.tree_unflatten(outputs, plain.meta["out_spec"]))

        return run

    def give_up(self, reason: str) -> None:
        """From now on calls that fit no variant run the original graph."""
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


def _original(gm: fx.GraphModule, fast: OptimizedGraphModule) -> fx.GraphModule:
    """The graph of `gm` over the state of `fast`: what is rebound there counts here."""
    original = fx.GraphModule(gm, _copied(gm.graph), type(gm).__name__)
    for name, value in gm.__dict__.items():
        if name.startswith("_") and name.endswith("_hooks") and isinstance(value, dict):
            original.__dict__[name] = copy.copy(value)
    for kind in ("_modules", "_parameters", "_buffers"):
        original.__dict__[kind] = fast.__dict__[kind]
    original.meta.update(gm.meta)
    return original


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
        return (tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)
    return (type(value), value)


def _same(values: Sequence[Any]) -> tuple[int, ...]:
    """For each value the first position at which this very tensor is: a graph traced of f(x, x) has one input twice."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(v), i) if isinstance(v, torch.Tensor) else i for i, v in enumerate(values))


def _modes() -> tuple[Any, ...]:
    """Grad mode, and where autocast is on, its dtype."""
    casts = (torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in AUTOCAST_DEVICES)
    return torch.is_grad_enabled(), *casts


def _kind(value: Any) -> Any:
    """What a graph takes for granted of a tensor or a module: for a module without tensors (dropout) its numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.shape, value.requires_grad
    if value._parameters or value._buffers:
        return value.training
    return tuple(v for v in vars(value).values() if isinstance(v, (bool, int, float)))


def _order(tensor: torch.Tensor) -> tuple[bool, tuple[int, ...]]:
    """A layout up to lengths: contiguous or not, and which dimension is inside which."""
    strides = tensor.stride()
    if tensor.is_contiguous():
        return True, ()
    hints = [int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in strides]
    return False, tuple(sorted(range(len(hints)), key=lambda d: (-hints[d], d)))
