"""How much attention a model runs, seen from outside: the operations of one call, followed as they are executed.

Comes in: a model and inputs. Goes out: `Calls`, the attention that the call computed, each with the module it ran in.
Nothing of einscade takes part: no graph, no finder, no names of modules. `watch` sees every operation on real tensors,
and keeps with each storage whether it is a weight, whether it holds scores, and which attention it depends on:

* weights are parameters and buffers, and what is made of them without a matrix product;
* scores are products of two tensors that are not weights, until a product with weights makes something new of them;
* a softmax of scores whose result reaches the model's output is attention, and so is a scaled_dot_product_attention;
* scores that enter a product with another tensor that is no weight, without a softmax, are a linear form of attention
  (linear attention, state spaces); these are listed apart, for how many sites one of them is is a matter of taste.

A product is a matrix product, or what says the same in two operations: an elementwise product summed along a dimension
that both operands have, where one has another that the other lacks (`(q[:, :, None] * k[:, None]).sum(-1)`).

A router's softmax, a gate or a convolution's weights are computed by a product with weights, and do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Calls", "softmaxes_left", "watch"]

_SOFTMAX = {"aten::_softmax", "aten::_safe_softmax"}
_WHOLE = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_native_multi_head_attention",
}
_PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::mv": 0,
    "aten::dot": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::convolution": 0,
}  # fmt: skip  (the place of the first operand)
_SUMS = {"aten::sum", "aten::mean"}


@dataclass(frozen=True)
class Calls:
    """`softmax`: the module path of every attention with a softmax; `linear`: of every other; `other`: how many
    softmaxes that reach the output are no attention."""

    softmax: tuple[str, ...]
    linear: tuple[str, ...]
    other: int


@dataclass(frozen=True)
class _Elementwise:
    """A product of two tensors, point by point, that may yet be summed: its shape, the dimensions along which each of
    them varies, and their marks."""

    shape: torch.Size
    varying: tuple[frozenset[int], frozenset[int]]
    operands: tuple[_Mark, _Mark]

    def contracts(self, dims: Iterable[int]) -> bool:
        """Whether summing along `dims` makes it what a matrix product makes."""
        first, second = self.varying
        gone = {d % len(self.shape) for d in dims} if self.shape else set()
        return bool(gone & first & second) and bool((first ^ second) - gone)


@dataclass(frozen=True)
class _Mark:
    weight: bool = False
    scores: bool = False
    reached_by: frozenset[int] = frozenset()
    product: _Elementwise | None = None


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[str] = []
        self.marks: dict[int, _Mark] = {}
        self.alive: list[Any] = []  # storages that were seen, so that no address is used twice
        self.softmax: dict[int, tuple[str, bool]] = {}  # where, and whether it is attention
        self.linear: list[str] = []
        for tensor in (*model.parameters(), *model.buffers()):
            self.put(tensor, _Mark(weight=True))

    def put(self, tensor: Tensor, mark: _Mark) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.marks:
            self.alive.append(storage)
        self.marks[storage._cdata] = mark

    def of(self, tensor: Tensor) -> _Mark:
        return self.marks.get(tensor.untyped_storage()._cdata, _Mark())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        mark = self.result(func._schema.name, args, inputs)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.put(tensor, mark)
        return result

    def result(self, name: str, args: Any, inputs: list[Tensor]) -> _Mark:
        marks = [self.of(x) for x in inputs]
        reached = frozenset[int]().union(*(m.reached_by for m in marks))
        where = self.running[-1] if self.running else ""
        scores = any(m.scores for m in marks)
        if name in _SOFTMAX or name in _WHOLE:
            number = len(self.softmax)
            self.softmax[number] = where, scores or name in _WHOLE
            return _Mark(reached_by=reached | {number})
        if (operands := self.multiplied(name, args)) is not None:
            active = not any(m.weight for m in operands)
            if active and any(m.scores for m in operands):
                self.linear.append(where)
            added = args[: _PRODUCTS.get(name, 0)]
            return _Mark(scores=active or any(self.of(x).scores for x in added), reached_by=reached)
        floating = [m for x, m in zip(inputs, marks, strict=True) if x.is_floating_point()]
        weight = bool(floating) and all(m.weight for m in floating)
        return _Mark(weight, scores, reached, self.elementwise(name, args))

    def multiplied(self, name: str, args: Any) -> Sequence[_Mark] | None:
        """The operands of a product, and of a sum that completes one; None for all else."""
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            return [self.of(x) for x in args[first : first + 2]]
        if name in _SUMS and (product := self.of(args[0]).product) is not None and product.shape == args[0].shape:
            dims = args[1] if len(args) > 1 and args[1] else range(args[0].dim())
            return product.operands if product.contracts(dims) else None
        return None

    def elementwise(self, name: str, args: Any) -> _Elementwise | None:
        """The product of two tensors that an operation makes, or casts."""
        if name == "aten::_to_copy":
            return self.of(args[0]).product
        if name != "aten::mul" or not all(isinstance(x, Tensor) for x in args):
            return None
        shape = torch.broadcast_shapes(*(x.shape for x in args))
        first, second = (_varying(x.expand(shape)) for x in args)
        return _Elementwise(shape, (first, second), (self.bare(args[0]), self.bare(args[1])))

    def bare(self, tensor: Tensor) -> _Mark:
        """A tensor's mark without what it is a product of: nothing remembers more than one step."""
        return replace(self.of(tensor), product=None)


def _varying(x: Tensor) -> frozenset[int]:
    """The dimensions along which a tensor is not one repeated value."""
    return frozenset(
        d for d, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)) if size != 1 and stride
    )


def watch(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, Calls]:
    """The model's output for `inputs`, and the attention that computed it."""
    seen = _Watch(model)
    with torch.no_grad(), _named(model, seen.running), seen:
        output = model(**inputs)
    tensors = [x for x in pytree.tree_leaves(_plain(output)) if isinstance(x, Tensor)]
    reached = frozenset[int]().union(*(seen.of(x).reached_by for x in tensors))
    live = [seen.softmax[number] for number in sorted(reached)]
    softmax = tuple(where for where, attention in live if attention)
    return output, Calls(softmax, tuple(w for w in seen.linear if w not in softmax), len(live) - len(softmax))


def _plain(output: Any) -> Any:
    """A model's output as a plain tree: its classes are no containers to pytree unless they were registered."""
    if isinstance(output, Mapping):
        return [_plain(value) for value in output.values()]
    if isinstance(output, (list, tuple)):
        return [_plain(value) for value in output]
    return output


@contextmanager
def _named(model: nn.Module, running: list[str]) -> Iterator[None]:
    """`running` is the stack of the paths of the modules that are running; torch's own layers are their parents'."""

    def enter(path: str) -> Any:
        return lambda *_: running.append(path)

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn.modules") or isinstance(module, nn.MultiheadAttention):
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def softmaxes_left(model: Any, inputs: Mapping[str, Any], inside: str) -> int:
    """How many softmaxes a call of an optimised model still runs, other than within the operators named `inside`."""
    with torch.no_grad(), profile(use_kineto=False) as profiler:
        model(**inputs)
    counted = _SOFTMAX | _WHOLE
    excluded = counted | {inside}  # an operation within one that counts is a part of it
    return sum(e.name in counted and excluded.isdisjoint(_above(e)) for e in profiler.function_events or ())


def _above(event: Any) -> Iterator[str]:
    """The names of the operations that an operation ran in."""
    while (event := event.cpu_parent) is not None:
        yield event.name
