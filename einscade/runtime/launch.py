"""Launching generated Triton kernels with little host time.

Comes in: a generated module, as loaded. Goes out: the same module, in which `kernel[grid](*arguments, **options)` is a
`Launcher`'s, and the functions that describe tensors to the copy engine remember what they made; or (`compilations`)
what compiles the kernels that it would launch.

`JITFunction.run` binds, specialises and hashes all arguments at every call, and every descriptor is made, checked and
encoded anew: 40 µs and more for a kernel that takes four descriptors. What a kernel is compiled for depends on less:
on the arguments' types and options, on the dtype and alignment of pointers, on whether an integer is 1, a multiple of
16 or wide. A launcher writes a function that makes a short key of these, finds what Triton compiled for it, and calls
Triton's own C function. Whatever it does not know (another version, another vendor, a hook that a profiler set, a kind
of argument) goes through the JIT as before.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Launcher", "compilations", "install", "remembered"]

KNOWN_VERSIONS = ("3.6.",)
"""Versions of Triton whose C launcher takes the arguments that `_launch_code` passes."""

WIDE = ~0x7FFFFFFF
"""The bits of an integer beyond the 31 that a signed 32-bit one has: with them Triton compiles for 64 bits."""

MOST = 4096
"""So many descriptors of a function, or compiled forms of a kernel, are remembered before all are forgotten."""


def install(module: ModuleType) -> None:
    """Puts launchers in the place of the kernels that the module's functions launch, and remembers descriptors."""
    from triton.runtime.jit import JITFunction

    scope = vars(module)
    kernels = {name: value for name, value in scope.items() if isinstance(value, JITFunction)}
    hosts = [f for f in scope.values() if isinstance(f, FunctionType) and f.__module__ == module.__name__]
    launched = {name for f in hosts for name in f.__code__.co_names}
    called = {name for kernel in kernels.values() for name in kernel.fn.__code__.co_names}
    for name, kernel in kernels.items():
        if name in launched - called:
            scope[name] = Launcher(kernel)
    for f in hosts:
        if "TensorDescriptor" in str(f.__annotations__.get("return")):
            scope[f.__name__] = remembered(f)


def compilations(
    run: Callable[..., Any], inputs: Sequence[Tensor], sizes: Mapping[str, int]
) -> list[Callable[[], object]]:
    """What compiles each kernel that a generated module's `run` would launch with these inputs and sizes, in threads of
    their own if one likes; they hold no memory. Nothing is launched meanwhile: what kernels would have written is 0
    (torch operations after them may index by it), and `inputs` stay as they are."""
    scope = dict(run.__globals__)
    given = {x.untyped_storage().data_ptr() for x in inputs}
    found: list[Callable[[], object]] = []
    for name, value in run.__globals__.items():
        if isinstance(value, Launcher):
            scope[name] = _Noting(value.kernel, given, found)
        elif isinstance(value, FunctionType) and value.__globals__ is run.__globals__:
            same = FunctionType(value.__code__, scope, name, value.__defaults__, value.__closure__)
            same.__kwdefaults__ = value.__kwdefaults__
            scope[name] = same
    if any(isinstance(value, _Noting) for value in scope.values()):
        scope[run.__name__](*inputs, **sizes)
    return found


@dataclass(frozen=True)
class _Noting:
    """Stands where a launcher does. `given`: the addresses of memory that is not ours to write."""

    kernel: Any
    given: set[int]
    found: list[Callable[[], object]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            addresses = [_address(x) for x in arguments]
            self.found.append(functools.partial(self.kernel.run, *addresses, grid=grid, warmup=True, **options))
            for x in arguments:
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                    x.zero_()

        return noted


def _address(argument: Any) -> Any:
    """An argument as compiling needs it: what a tensor's memory holds is nothing to it."""
    if isinstance(argument, Tensor):
        return Address(argument.data_ptr(), argument.dtype)
    if isinstance(getattr(argument, "base", None), Tensor):
        argument = copy.copy(argument)
        argument.base = Address(argument.base.data_ptr(), argument.base.dtype)
    return argument


# --- descriptors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """What a descriptor asks of its tensor, without holding the memory."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.pointer


def remembered(describe: Callable[..., Any]) -> Callable[..., Any]:
    """`describe(tensor, *others)`, which returns a descriptor of the tensor, or a tuple in which one stands or, where
    it cannot be described, the tensor itself. What it does depends on nothing but the tensor's address, shape, strides
    and dtype and on the others, and is done once for each of these. What describes a copy of the tensor is not kept:
    the copy has to be made every time."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(describe)
    def look_up(tensor: Tensor, *others: Any) -> Any:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, *others)
        found = known.get(key)
        if found is None:
            found = describe(tensor, *others)
            parts = found if isinstance(found, tuple) else (found,)
            bases = [p.base if hasattr(p, "block_shape") else p for p in parts]
            if all(not isinstance(b, Tensor) or b.data_ptr() == tensor.data_ptr() for b in bases):
                if len(known) >= MOST:
                    known.clear()
                known[key] = _without(tensor, found)
        elif found.__class__ is _Itself:
            return (tensor, *found.rest)
        return found

    return look_up


@dataclass(frozen=True)
class _Itself:
    """The tensor, and what else its function returned."""

    rest: tuple[Any, ...]


def _without(tensor: Tensor, found: Any) -> Any:
    """What a function returned, with nothing in it that holds the tensor's memory."""
    if isinstance(found, tuple) and found[0] is tensor:
        return _Itself(found[1:])
    for part in found if isinstance(found, tuple) else (found,):
        if hasattr(part, "block_shape"):
            part.base = Address(part.base.data_ptr(), part.base.dtype)
    return found


_kinds: dict[tuple[Any, ...], int] = {}


def _kind(descriptor: Any) -> int:
    """A number for what a kernel's specialisation sees of a descriptor."""
    layout = getattr(descriptor, "layout", None)
    seen = (descriptor.base.dtype, tuple(descriptor.block_shape), layout, descriptor.padding)
    return _kinds.setdefault(seen, len(_kinds))


# --- launching -------------------------------------------------------------------------------------------------------


class Launcher:
    """A kernel of a generated module: `launcher[grid](*arguments, **options)` is `kernel[grid](...)`, sooner.

    `kernel` is the `triton.jit` (or `gluon.jit`) function. Keyword arguments are constants and compile options.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._forms: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        form = (len(grid), *map(type, arguments), *options.values())
        launch = self._forms.get(form)
        if launch is None:
            launch = self._forms[form] = self._form(len(grid), arguments, options)
        launch(grid, *arguments)

    def _form(self, dimensions: int, arguments: Sequence[Any], options: dict[str, Any]) -> Callable[..., None]:
        """What launches with arguments of these types and exactly these options."""

        def through_the_jit(grid: tuple[int, ...], *arguments: Any) -> Any:
            return self.kernel.run(*arguments, grid=grid, warmup=False, **options)

        code = _launch_code(self.kernel.params, dimensions, arguments, options)
        if code is None or not _direct_launches():
            return through_the_jit
        compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

        def first(key: tuple[Any, ...], grid: tuple[int, ...], *arguments: Any) -> None:
            kernel = through_the_jit(grid, *arguments)
            ready = _ready(kernel)
            if ready is not None:
                if len(compiled) >= MOST:
                    compiled.clear()
                compiled[key] = ready

        from triton import knobs
        from triton.backends.nvidia.driver import make_tensordesc_arg
        from triton.runtime import driver

        scope = {
            "compiled": compiled,
            "first": first,
            "hooks": knobs.runtime,
            "current_device": driver.active.get_current_device,
            "current_stream": driver.active.get_current_stream,
            "encode": make_tensordesc_arg,
            "kind": _kind,
        }
        exec(compile(code, f"<einscade launch of {self.kernel.__name__}>", "exec"), scope)
        return scope["launch"]


@functools.cache
def _direct_launches() -> bool:
    """Whether the C launcher of this Triton, on this device, is one that we know."""
    import triton
    from triton.runtime import driver

    return triton.__version__.startswith(KNOWN_VERSIONS) and driver.active.launcher_cls.__name__ == "CudaLauncher"


def _ready(kernel: Any) -> tuple[Any, ...] | None:
    """Of a compiled kernel what a launch needs: a number of its own, the C function, the device function, two launch
    attributes, packed metadata, and how its descriptors are encoded. None where launching takes more than that."""
    launcher = kernel.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    call = launcher.launch
    if inspect.isfunction(call):  # a wrapper that encodes descriptors
        call = inspect.getclosurevars(call).nonlocals.get("launcher")
    if call is None:
        return None
    encodings = getattr(kernel.metadata, "tensordesc_meta", None) or ()
    return (
        id(kernel), call, kernel.function, launcher.launch_cooperative_grid, launcher.launch_pdl,
        kernel.packed_metadata, encodings, kernel,
    )  # fmt: skip


def _launch_code(
    params: Sequence[Any], dimensions: int, arguments: Sequence[Any], options: dict[str, Any]
) -> str | None:
    """The text of `launch(grid, *arguments)` for arguments like these; None where one is of a kind not known here, or
    is passed by keyword and no constant."""
    constants = [p.name in options or p.has_default for p in params[len(arguments) :] if p.is_constexpr]
    if len(arguments) + len(constants) != len(params) or not all(constants):
        return None
    names = [f"a{i}" for i in range(len(arguments))]
    lines, key, passed, described = [], ["current_device()"], [], 0
    maps = []
    for param, name, value in zip(params, names, arguments, strict=False):
        if param.is_constexpr:
            key.append(name)
            passed.append("None")
        elif isinstance(value, Tensor):
            lines.append(f"{name}_at = {name}.data_ptr()")
            key += [f"{name}.dtype", f"{name}_at & 15"]
            passed.append(f"{name}_at")
        elif type(value) is int:
            # from 17 on: the remainder of 16, beside what 16 and less stand for themselves
            own = f"{name} if {name} < 17 else {name} & {WIDE | 15} | 16"
            key.append(f"{name} & {WIDE}" if param.do_not_specialize else own)
            passed.append(name)
        elif type(value) is bool or type(value) is float:
            passed.append(name)
        elif hasattr(value, "block_shape"):
            lines += [
                "try:",
                f"    {name}_kind, {name}_maps = {name}.known",
                "except AttributeError:",
                f"    {name}_kind, {name}_maps = {name}.known = kind({name}), {{}}",
            ]
            key.append(f"{name}_kind")
            maps += [
                "try:",
                f"    {name}_map = {name}_maps[number]",
                "except KeyError:",
                f"    {name}_map = {name}_maps[number] = encode({name}, encodings[{described}] if encodings else None)",
            ]
            passed.append(f"*{name}_map")
            described += 1
        else:
            return None
    passed += ["None"] * (len(params) - len(arguments))
    grid = ", ".join([f"grid[{i}]" for i in range(dimensions)] + ["1"] * (3 - dimensions))
    body = [
        *lines,
        f"key = ({', '.join(key)},)",
        "ready = compiled.get(key)",
        "if ready is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:",
        f"    return first(key, grid, {', '.join(names)})",
        "number, call, function, cooperative, dependent, packed, encodings, _ = ready",
        *maps,
        f"call({grid}, current_stream(key[0]), function, cooperative, dependent, None, None, packed, None, None, None, "
        f"{', '.join(passed)})",
    ]
    return f"def launch(grid, {', '.join(names)}):\n" + "\n".join("    " + line for line in body) + "\n"
