"""`torch.ops.einscade.cascade`: any cascade as one operator of a graph.

    einscade::cascade(Tensor[] inputs, SymInt[] sizes, str program) -> Tensor[]

`inputs` in cascade order, `sizes` in the order of `cascade.symbols`, `program` as `runtime.program` writes it. The
operator is functional: fresh outputs, with the strides that the program's memory order says. Fake tensors get shapes
from the cascade's extents; gradients come from another program (`gradients`), run by the same operator; where there is
none, from `einscade::cascade_backward`, which recomputes the cascade in its flat form under autograd. Gradients of
gradients and tangents come from the flat form too.

Importing the package registers the operators, so that saved programs load; what they need to run is imported when the
first of them runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from einscade.compiler.gradients import Gradient

__all__ = ["are_plain", "cascade", "cascade_backward", "direct", "gradient_of", "owned"]

_library = torch.library.Library("einscade", "DEF")
_library.define("cascade(Tensor[] inputs, SymInt[] sizes, str program) -> Tensor[]")
_library.define(
    "cascade_backward(Tensor[] inputs, Tensor?[] gradients, bool[] needed, SymInt[] sizes, str program) -> Tensor[]"
)


@functools.cache
def _compiler() -> SimpleNamespace:
    from einscade.compiler.gradients import gradient
    from einscade.runtime import call
    from einscade.runtime.program import parse_program
    from einscade.runtime.recompute import flat_form, gradients_with_graph, recompute_gradients

    return SimpleNamespace(
        gradient=gradient,
        call_for=call.call_for,
        calls=call.calls,
        flat_form=flat_form,
        gradients_with_graph=gradients_with_graph,
        recompute_gradients=recompute_gradients,
        parse_program=parse_program,
    )


def _run(inputs: Sequence[Tensor], sizes: Sequence[int], program: str) -> list[Tensor]:
    return _compiler().call_for(program, inputs[0].device).run(inputs, sizes)


def _run_backward(
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    sizes: Sequence[int],
    program: str,
) -> list[Tensor]:
    return _compiler().recompute_gradients(program, inputs, gradients, needed, sizes)


for _device in ("CPU", "CUDA"):
    _library.impl("cascade", _run, _device)
    _library.impl("cascade_backward", _run_backward, _device)

cascade = torch.ops.einscade.cascade.default
cascade_backward = torch.ops.einscade.cascade_backward.default


@torch.library.register_fake("einscade::cascade", lib=_library)
def _fake(inputs: Sequence[Tensor], sizes: Sequence[int], program: str) -> list[Tensor]:
    parsed = _compiler().parse_program(program)
    tensors = parsed.cascade.inputs
    if len(inputs) != len(tensors):
        raise ValueError(f"cascade {parsed.cascade.name} has {len(tensors)} inputs, {len(inputs)} were given")
    device = inputs[0].device
    return [
        torch.empty_strided(shape, strides, dtype=dtype, device=device)
        for (shape, strides), dtype in zip(parsed.layouts(sizes), parsed.dtypes, strict=True)
    ]


@torch.library.register_fake("einscade::cascade_backward", lib=_library)
def _fake_backward(
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    sizes: Sequence[int],
    program: str,
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, wanted in zip(inputs, needed, strict=True)
        if wanted
    ]


# --- calls -----------------------------------------------------------------------------------------------------------


def _keys(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


_SPECIAL = ~_keys("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
"""What a tensor has none of that is no subclass, no view with a bit pending, no part of a transform, and dense."""

_TYPES = frozenset((Tensor, torch.nn.Parameter))

_UNUSUAL = ~_keys("BackendSelect", "ADInplaceOrView")
"""What a thread has none of outside of all modes and transforms."""

_RECORDED = _keys("AutogradFunctionality")
"""What a thread leaves out that is below autograd."""


class _Operator(torch._ops.OpOverload):
    """The operator, which runs its kernel, and has autograd record it, without a trip through the dispatcher where that
    would do nothing but turn the arguments into its own kind and back: that takes longer than all the rest of a call.
    In a mode, a transform, a trace or a profile, for subclasses and where tangents are carried, the dispatcher decides.
    """

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 3 and not _watched():
            inputs, sizes, program = args
            call = _compiler().calls.get((program, inputs[0].device))
            if call is not None and call.alike is not None and call.count == len(inputs) and call.alike(*inputs):
                return call.run(inputs, sizes)
            if are_plain(inputs):
                return _run_recorded(*args) if any(x.requires_grad for x in inputs) else _run_known(*args)
        return self._op(*args, **kwargs)


def _watched(
    functions: Any = torch._C._len_torch_function_stack, profiles: Any = torch._C._autograd._profiler_enabled
) -> bool:
    """Whether somebody wants to see the call whatever the inputs are, or tangents may be carried."""
    return bool(functions() or profiles() or forward_ad._current_level >= 0)


def are_plain(
    inputs: Iterable[Tensor],
    keys: Any = torch._C._dispatch_keys,
    included: Any = torch._C._dispatch_tls_local_include_set,
) -> bool:
    """Whether nothing but autograd and the kernel has a say in what is called with these inputs."""
    found = 0 if included().raw_repr() & _UNUSUAL == 0 else _SPECIAL
    for x in inputs:
        found |= keys(x).raw_repr() if type(x) in _TYPES else _SPECIAL
    return not found & _SPECIAL


def _run_known(inputs: Sequence[Tensor], sizes: Sequence[int], program: str) -> list[Tensor]:
    """`_run` for plain inputs that ask for no gradients; calls with others like them are known from now on."""
    call = _compiler().call_for(program, inputs[0].device)
    if call.alike is None:
        free: Any = [[None] * x.dim() for x in inputs]
        guards = torch._C._dynamo.guards.TensorGuards(*inputs, dynamic_dims_sizes=free, dynamic_dims_strides=free)
        call.alike = guards.check
    return call.run(inputs, sizes)


def direct(program: str, device: torch.device) -> Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]:
    """The operator with a program on a device, for inputs that are known to be plain where no mode and no transform is
    (Dynamo's guards say so of a graph's inputs). `direct(...)(inputs, sizes)` is `cascade(inputs, sizes, program)`."""
    run, recording = _compiler().call_for(program, device).run, torch.is_grad_enabled

    def called(inputs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if _watched():
            return cascade(inputs, sizes, program)
        return _run_recorded(inputs, sizes, program) if recording() else run(inputs, sizes)

    return called


def owned(result: Tensor) -> Tensor:
    """A result of which nothing is recorded, as a tensor that is no view: it may be changed in place at any time."""
    return result if forward_ad._current_level >= 0 else result.data


cascade.__class__ = _Operator


# --- autograd --------------------------------------------------------------------------------------------------------


# What the dispatcher would do between autograd and a device's kernel: modes, subclasses, functionalization, lazy
# negation and conjugation, layouts that are not dense.
_BETWEEN = torch._C._after_ADInplaceOrView_keyset.raw_repr() & ~_keys("CPU", "CUDA", "BackendSelect")


def _below(keyset: Any, inputs: Sequence[Tensor], sizes: Sequence[int], program: str) -> Sequence[Tensor]:
    """The operator below autograd, called where nothing records. Where nothing lies between, the kernel is called from
    here: the dispatcher would only turn the arguments into its own kind and back again, which takes longer."""
    if keyset is None or not keyset.raw_repr() & _BETWEEN:
        return _run(inputs, sizes, program)
    with torch._C._AutoDispatchBelowAutograd():
        return cascade.redispatch(keyset & torch._C._after_autograd_keyset, inputs, sizes, program)


class _Differentiable(torch.autograd.Function):
    """Forward runs the program that its gradient asks for (which may return more) and saves what the gradient reads.
    `keyset` is the dispatcher's, None where it was not asked."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, plan: Gradient, sizes: Sequence[int], *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = _below(keyset, inputs, plan.forward_sizes(sizes), plan.forward)
        outputs = [x.data if x._is_view() else x for x in outputs]  # a view made in here could not be changed in place
        results = outputs[: plan.results]
        ctx.plan, ctx.sizes = plan, sizes
        ctx.shapes = [(r.shape, r.dtype) for r in results]
        ctx.save_for_backward(*inputs, *(outputs[i] for i in plan.saved))
        ctx.mark_non_differentiable(*(r for r in results if not r.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @torch._disable_dynamo  # a compiled function may call backward; Dynamo would trace into kernels
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan: Gradient = ctx.plan
        kept = ctx.saved_tensors  # once: checkpointing unpacks them, by computing them again
        inputs, saved = kept[: len(plan.inputs)], kept[len(plan.inputs) :]
        needed = list(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():  # create_graph: what the program saved is no function of the inputs for autograd
            sizes = plan.forward_sizes(ctx.sizes)
            return None, None, None, *_compiler().gradients_with_graph(plan.forward, inputs, grads, needed, sizes)
        return None, None, None, *plan.run(inputs, saved, grads, needed, ctx.sizes, ctx.shapes)


_record = super(torch.autograd.Function, _Differentiable).apply
"""Without what `Function.apply` does for transforms."""


def _autograd(keyset: Any, inputs: Sequence[Tensor], sizes: Sequence[int], program: str) -> Sequence[Tensor]:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        return list(_compiler().flat_form(program, inputs, sizes))
    needed = tuple([x.requires_grad for x in inputs]) if torch.is_grad_enabled() else ()
    if True not in needed:
        return _below(keyset, inputs, sizes, program)
    return list(_Differentiable.apply(keyset, gradient_of(program, needed), sizes, *inputs))


def _run_recorded(
    inputs: Sequence[Tensor],
    sizes: Sequence[int],
    program: str,
    excluded: Any = torch._C._dispatch_tls_local_exclude_set,
) -> list[Tensor]:
    """The operator with plain inputs that may ask for gradients, the dispatcher not asked."""
    needed = tuple([x.requires_grad for x in inputs]) if torch.is_grad_enabled() else ()
    if True not in needed or excluded().raw_repr() & _RECORDED:
        return _run(inputs, sizes, program)
    return list(_record(None, gradient_of(program, needed), sizes, *inputs))


@functools.lru_cache(maxsize=1024)
def gradient_of(program: str, needed: tuple[bool, ...]) -> Gradient:
    """How the operator with this program is differentiated; see `gradients`."""
    return _compiler().gradient(_compiler().parse_program(program), needed)


_library.impl("cascade", _autograd, "Autograd", with_keyset=True)
