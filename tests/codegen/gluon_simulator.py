"""Executes generated Gluon modules on the CPU: what a Hopper kernel computes, and in which orders it may compute it.

Comes in: the text of a module (`Simulator(seed).load(text)`). Goes out: its namespace, whose `run` computes with torch.
The module's Triton imports become the stand-ins below; everything else in it is plain Python and runs as it is.

Values are torch tensors, layouts are carried but mean nothing (the compiler checks them). What is modelled is what goes
wrong silently on a GPU:

* Partitions of `warp_specialize` take turns: at every operation that another partition can notice, a seeded choice says
  who goes on. When nobody can, `Deadlock` says what each waits for.
* Copies and products are *in flight* after they are issued: they read their operands, and their results appear, at any
  later moment up to the wait that guarantees them. Products of a warpgroup complete in order.
* mbarriers have phases, counts and bytes; named barriers have counts. Waiting for a parity lets pass what the hardware
  lets pass; an arrival too many is an error.
* Shared memory and outputs start as NaN, and a tile that a copy is about to fill is NaN until the copy is complete, so
  that a missing wait shows in the result.
* Reads and writes by address, shapes, copy boxes, bytes expected, fences between ordinary stores and asynchronous
  readers, shared memory's size, and work still in flight at the end of a program are checked.
"""

from __future__ import annotations

import ast
import functools
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.codegen.gluon_memory import (
    Barrier,
    ConstInt,
    Layout,
    Misuse,
    Named,
    Pointer,
    Ring,
    Shared,
    TensorDescriptor,
    block,
    check,
    layout,
    scalar,
)  # fmt: skip
from tests.codegen.ptx import evaluated, is_arithmetic

__all__ = ["Deadlock", "Misuse", "Simulator"]

SHARED_BYTES = 227 << 10
WARP = 32


class Deadlock(Misuse):
    """Every partition waits for something that nobody will do."""


# -- what is in flight ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Flight:
    """An operation that was issued; `complete` takes effect once, at a moment of the simulator's choice."""

    kind: str
    owner: Partition
    effect: Callable[[], Any]
    haste: float
    result: Any = None
    done: bool = False

    def complete(self) -> None:
        if not self.done:
            self.result = self.effect()
            self.done = True


@dataclass(frozen=True, eq=False)
class Accumulator:
    """What an asynchronous product returns: no value before it was waited for."""

    flight: Flight

    def _missing(self, *_: Any) -> Any:
        raise Misuse("the value of a product that is in flight")

    __getattr__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _missing


class _Abandoned(BaseException):
    """Ends the thread of a partition whose program failed elsewhere."""


@dataclass(eq=False)
class Partition:
    """A thread that runs only when it is given the turn."""

    name: str
    warps: int
    body: Callable[[], Any]
    ready: Callable[[], bool] = lambda: True
    waits_for: str = ""
    finished: bool = False
    thread: threading.Thread | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


# -- the simulator ----------------------------------------------------------------------------------------------------


class Simulator:
    """One order of events, by `seed`: who runs, and how long what was issued takes."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.haste = self.random.choice([0.0, 0.2, 0.6, 1.0])  # how soon what is in flight completes
        self.constancy = self.random.choice([0.2, 0.5, 0.9])  # how long a partition keeps the turn
        self.partitions: list[Partition] = []
        self.flights: list[Flight] = []
        self.over = threading.Semaphore(0)
        self.running: Partition = Partition("host", 0, lambda: None)
        self.abandoned = False
        self.failure: BaseException | None = None

    def load(self, text: str) -> SimpleNamespace:
        """The module's namespace, with stand-ins for what it imports from Triton."""
        imported, code = _parsed(text)
        stand_ins = self._stand_ins()
        space: dict[str, Any] = {"__name__": "simulated", "torch": _Torch()}
        space |= {name: stand_ins[name] for name in imported}
        exec(code, space)
        return SimpleNamespace(**space)

    # -- programs and partitions --

    def launch(
        self, kernel: Callable[..., None], grid: Sequence[int], arguments: Sequence[Any], warps: int, early: bool
    ) -> None:
        """`early`: the kernel before this one may not have ended when it begins. What waits for this one must then have
        waited for that one, too: every program waits, whatever it needs."""
        given = [Pointer.to(x) if isinstance(x, Tensor) else scalar(x) if isinstance(x, int) else x for x in arguments]
        for number in range(prod(grid)):
            self.program, self.grid, self.ready = number, tuple(grid), not early
            self.shared, self.tiles, self.named = 0, list[Shared](), dict[int, Named]()
            self.partitions, self.flights = [Partition("default", warps, lambda: kernel(*given))], []
            self._drive()
            check(self.ready, "a program ends, and the kernel in front of this one has not")

    def _drive(self) -> None:
        """Let partitions take turns until all are done. Who has the turn gives it away; this thread only waits."""
        self.abandoned, self.failure = False, None
        try:
            self._choose()
            self._resume()
            self.over.acquire()
            if self.failure is not None:
                raise self.failure
            check(not self.flights, f"{len(self.flights)} operations are in flight at the end of the program")
        finally:
            self.abandoned = True
            for p in self.partitions:
                p.turn.release()
                if p.thread is not None:
                    p.thread.join()

    def _choose(self) -> None:
        """Decide whose turn it is, and what lands before."""
        while True:
            while self.flights and self.random.random() < self.haste:
                self._land_one()
            if able := [p for p in self.partitions if not p.finished and p.ready()]:
                break
            if not self.flights:
                waits = "; ".join(f"{p.name} waits for {p.waits_for}" for p in self.partitions if not p.finished)
                raise Deadlock(waits)
            self._land_one()
        if not (self.running in able and self.random.random() < self.constancy):
            self.running = self.random.choice(able)

    def _resume(self) -> None:
        """Give the turn to the partition that was chosen."""
        p = self.running
        if p.thread is None:
            p.thread = threading.Thread(target=self._run, args=(p,), daemon=True)
            p.thread.start()
        else:
            p.turn.release()

    def _run(self, p: Partition) -> None:
        try:
            p.body()
            own = [f.kind for f in self.flights if f.owner is p and f.kind != "load"]
            check(not own, f"{p.name} ends with a {own[0] if own else ''} in flight")
            p.finished = True
            if not all(q.finished for q in self.partitions):
                self._choose()
                self._resume()
                return
        except _Abandoned:
            return
        except BaseException as failure:
            self.failure = failure
        self.over.release()

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "its turn") -> None:
        """A moment at which another partition may go on; until `ready`."""
        p = self.running
        p.ready, p.waits_for = ready, waits_for
        self._choose()
        if self.running is not p:
            self._resume()
            p.turn.acquire()
            if self.abandoned:
                raise _Abandoned
        check(ready(), f"{p.name} was woken too early")

    def _specialize(self, parts: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], warps: Sequence[int],
                    registers: Sequence[int]) -> Any:  # fmt: skip
        check(len(parts) == len(warps) + 1 == len(registers) + 1, "a partition without warps or registers")
        (first, arguments), *rest = parts
        workers = [
            Partition(f"{fn.__name__} {i}", n, lambda fn=fn, args=args: fn(*args))  # type: ignore[misc]
            for i, ((fn, args), n) in enumerate(zip(rest, warps, strict=True), 1)
        ]
        self.partitions += workers
        result = first(*arguments)
        self.pause(lambda: all(w.finished for w in workers), "the other partitions")
        return result

    # -- asynchronous operations --

    def _issue(self, kind: str, effect: Callable[[], Any]) -> Flight:
        flight = Flight(kind, self.running, effect, self.random.choice([1.0, 1.0, 0.02]))
        self.flights.append(flight)
        self.pause()
        return flight

    def _land(self, flight: Flight) -> None:
        """Complete what is in flight: products of one partition in their order."""
        if flight.kind == "product":
            flight = next(f for f in self.flights if f.kind == "product" and f.owner is flight.owner)
        self.flights.remove(flight)
        flight.complete()

    def _land_one(self) -> None:
        (flight,) = self.random.choices(self.flights, [f.haste for f in self.flights])
        self._land(flight)

    def _drain(self, kind: str, pending: int) -> None:
        self.pause()
        own = [f for f in self.flights if f.owner is self.running and f.kind == kind]
        for f in own[: len(own) - pending]:
            self._land(f)

    def _copy_in(self, source: TensorDescriptor, at: Sequence[Any], barrier: Barrier, to: Shared) -> None:
        self._touch()
        check(to.shape == source.block_shape and to.layout == source.layout, f"a copy into a tile of {to.shape}")
        check(to.begins() % 128 == 0, f"a copy to byte {to.begins()} of an allocation")
        address, inside = source.places(at)
        to.data.fill_(poison(to.data.dtype))

        def effect() -> None:
            to.data.copy_(torch.where(inside, source.memory[address], 0))
            barrier.bytes -= source.block_type.nbytes
            barrier.settle()

        self._issue("load", effect)

    def _copy_out(self, target: TensorDescriptor, at: Sequence[Any], source: Shared) -> None:
        self._touch()
        check(source.shape == target.block_shape and source.layout == target.layout, f"a copy out of {source.shape}")
        check(source.begins() % 128 == 0, f"a copy from byte {source.begins()} of an allocation")
        address, inside = target.places(at)
        source.seen()  # a fence that comes later is too late, even if the copy begins later still

        def effect() -> None:
            target.memory[address[inside]] = source.seen()[inside]

        self._issue("store", effect)

    def _copy_added(self, target: TensorDescriptor, at: Sequence[Any], source: Shared) -> None:
        self._touch()
        check(source.shape == target.block_shape and source.layout == target.layout, f"a copy out of {source.shape}")
        check(source.begins() % 128 == 0, f"a copy from byte {source.begins()} of an allocation")
        address, inside = target.places(at)
        source.seen()

        def effect() -> None:
            target.memory.index_put_((address[inside],), source.seen()[inside], accumulate=True)

        self._issue("store", effect)

    def _product(self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
        (m, k), (_, n) = a.shape, b.shape
        check(k == b.shape[0] and m % 64 == 0 and k % 16 == 0 and n % 8 == 0 and n <= 256, f"a product {m, k, n}")
        left, right = a.data.dtype, b.data.dtype
        check(left == right and left in (torch.float16, torch.bfloat16), f"a product of {left} and {right}")
        check(isinstance(acc, Accumulator) or list(acc.shape) == [m, n], f"an accumulator that is not {m, n}")
        for x in (a, b):
            if isinstance(x, Shared):
                x.seen()

        def effect() -> Any:
            x = a.seen() if isinstance(a, Shared) else a.as_subclass(Tensor)
            product = x.float() @ b.seen().float()
            if not bool(use_acc):
                return block(product)
            before = acc.flight.result if isinstance(acc, Accumulator) else acc
            check(before.dtype == torch.float32, f"an accumulator of {before.dtype}")
            return block(before.as_subclass(Tensor) + product)

        flight = self._issue("product", effect)
        if is_async:
            return Accumulator(flight)
        self._drain("product", 0)
        return flight.result

    def _product_wait(self, pending: int = 0, deps: Sequence[Any] = ()) -> Any:
        self._drain("product", int(pending))
        done = [d.flight.result if isinstance(d, Accumulator) and d.flight.done else d for d in deps]
        return done[0] if len(done) == 1 else tuple(done)

    def _fence(self) -> None:
        self.pause()
        for tile in self.tiles:
            tile.unfenced[:] = [store for store in tile.unfenced if store[0] is not self.running]

    # -- barriers --

    def _wait(self, barrier: Barrier, phase: Any) -> None:
        check(barrier.count, f"{barrier.name} is waited for before it is initialised")
        self.pause(lambda: barrier.phase != int(phase), f"phase {int(phase)} of {barrier.name}")

    def _arrive(self, barrier: Barrier, *, count: int = 1, expected: int = 0) -> None:
        self.pause()
        barrier.arrive(int(count), expected)

    def _init(self, barrier: Barrier, count: int) -> None:
        check(barrier.count == 0, f"{barrier.name} is initialised twice")
        barrier.count = barrier.missing = int(count)

    def _named(self, instruction: str, number: int, threads: int) -> None:
        check(0 < number < 16, f"named barrier {number}")
        named = self.named.setdefault(number, Named(threads))
        check(named.expected == threads, f"named barrier {number} for {named.expected} and {threads} threads")
        self.pause()
        opening = named.openings
        named.came += self.running.warps * WARP
        check(named.came <= named.expected, f"named barrier {number}: an arrival too many")
        if named.came == named.expected:
            named.came, named.openings = 0, named.openings + 1
        if instruction == "sync":
            self.pause(lambda: named.openings > opening, f"named barrier {number}")

    # -- memory --

    def _touch(self) -> None:
        check(self.ready, "memory is read or written before the kernel in front of this one has ended")

    def _allocate(self, dtype: torch.dtype, shape: Sequence[int], kind: Layout) -> Any:
        self.shared += prod(shape) * dtype.itemsize
        check(self.shared <= SHARED_BYTES, f"{self.shared} bytes of shared memory")
        if kind.kind == "MBarrierLayout":
            made = [Barrier(f"mbarrier {i} at byte {self.shared}") for i in range(prod(shape))]
            return Ring(made) if len(shape) > 1 else made[0]
        tile = Shared(self, torch.full(tuple(shape), poison(dtype), dtype=dtype), kind)
        self.tiles.append(tile)
        return tile

    def _load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        self._touch()
        shape = torch.broadcast_shapes(*(torch.as_tensor(x).shape for x in (pointer.offset, mask) if x is not None))
        at, used = pointer.addresses(mask, shape)
        return block(torch.where(used, pointer.memory[at], torch.as_tensor(other, dtype=pointer.memory.dtype)))

    def _store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        self._touch()
        if isinstance(value, int):
            value = torch.tensor(value, dtype=pointer.memory.dtype)
        value = torch.as_tensor(value).as_subclass(Tensor)
        parts = [torch.as_tensor(x).shape for x in (pointer.offset, value, mask) if x is not None]
        shape = torch.broadcast_shapes(*parts)
        at, used = pointer.addresses(mask, shape)
        pointer.memory[at[used]] = value.broadcast_to(shape)[used].to(pointer.memory.dtype)

    def _add(self, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> Any:
        self._touch()
        if isinstance(value, int):
            value = torch.tensor(value, dtype=pointer.memory.dtype)
        at, used = pointer.addresses(mask, value.shape)
        self.pause()
        before = block(pointer.memory[at].clone())
        pointer.memory.index_put_((at[used],), value.as_subclass(Tensor)[used], accumulate=True)
        return before

    def _assembly(
        self, text: str, _: str, arguments: Sequence[Any], dtype: torch.dtype, pack: int = 1, **__: Any
    ) -> Any:
        if found := re.fullmatch(r"bar\.(sync|arrive) (\d+), (\d+); mov\.u32 \$0, 0;", text):
            self._named(found[1], int(found[2]), int(found[3]))
            return block(0, dtype)
        if text == GRID_WAIT:
            self.ready = True
            return block(0, dtype)
        if pack > 1 and is_arithmetic(text):
            (x,) = arguments
            return block(evaluated(text, x, pack), dtype)
        check(text in ASSEMBLY, f"inline assembly that the simulator does not know: {text}")
        return ASSEMBLY[text](*arguments).to(dtype)

    # -- what a module imports --

    def _stand_ins(self) -> dict[str, Any]:
        barrier = SimpleNamespace(
            MBarrierLayout=layout("MBarrierLayout"),
            init=self._init,
            wait=self._wait,
            arrive=self._arrive,
            expect=lambda b, n: self._arrive(b, expected=int(n)),
        )
        tma = SimpleNamespace(
            async_copy_global_to_shared=self._copy_in,
            async_copy_shared_to_global=self._copy_out,
            store_wait=lambda n: self._drain("store", n),
        )
        return {
            "gluon": SimpleNamespace(jit=self._jit, constexpr_function=lambda fn: fn),
            "gl": SimpleNamespace(**self._language()),
            "fence_async_shared": self._fence,
            "mbarrier": barrier,
            "tma": tma,
            "warpgroup_mma": self._product,
            "warpgroup_mma_wait": self._product_wait,
            "TensorDescriptor": TensorDescriptor,
            "builtin": lambda fn: {"add_tile": self._copy_added}[fn.__name__],  # what calls the compiler itself
            "ir": None,
        }

    def _language(self) -> dict[str, Any]:
        layouts = ("NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout",
                   "SwizzledSharedLayout")  # fmt: skip
        return {
            **{name: getattr(torch, name) for name in DTYPES},
            "int1": torch.bool,
            **{name: layout(name) for name in layouts},
            **{name: getattr(torch, name) for name in UNARY},
            "constexpr": lambda x: ConstInt(x) if isinstance(x, int) else x,
            "program_id": lambda axis: scalar(self.program if axis == 0 else 0),
            "num_programs": lambda axis: scalar(self.grid[axis]),
            "static_range": range,
            "cdiv": lambda a, b: (a + b - 1) // b,
            "arange": lambda start, stop, _=None: block(torch.arange(start, stop, dtype=torch.int32)),
            "full": lambda shape, value, dtype, _=None: block(torch.full(tuple(shape), float(value)), dtype),
            "convert_layout": lambda x, _: x,
            "where": lambda c, a, b: block(torch.where(torch.as_tensor(c), a, b)),
            "maximum": lambda a, b: _extreme(torch.maximum, a, b),
            "minimum": lambda a, b: _extreme(torch.minimum, a, b),
            "sum": lambda x, axis: x.sum(axis, dtype=x.dtype),
            "associative_scan": _scan,
            "reduce": lambda x, axis, combine: block(functools.reduce(combine, x.unbind(axis))),
            "max": lambda x, axis: x.amax(axis),
            "min": lambda x, axis: x.amin(axis),
            "load": self._load,
            "store": self._store,
            "atomic_add": self._add,
            "allocate_shared_memory": self._allocate,
            "inline_asm_elementwise": self._assembly,
            "thread_barrier": self.pause,
            "warp_specialize": self._specialize,
        }

    def _jit(self, fn: Callable[..., Any] | None = None, **_: Any) -> Any:
        return Kernel(self, fn) if fn is not None else lambda f: Kernel(self, f)


@functools.cache
def _parsed(text: str) -> tuple[list[str], CodeType]:
    """What a module imports from Triton, and its code without imports."""
    imported, kept = [], []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            imported += [a.asname or a.name for a in node.names]
        elif not (isinstance(node, ast.Import) and [a.name for a in node.names] == ["torch"]):
            kept.append(node)
    return imported, compile(ast.Module(kept, []), "<generated>", "exec")


class Kernel:
    """A device function: called by others, or launched on a grid."""

    def __init__(self, simulator: Simulator, fn: Callable[..., Any]) -> None:
        self.simulator, self.fn, self.__name__ = simulator, fn, fn.__name__

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.fn(*args, **named)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, launch_pdl: bool = False, **constants: Any) -> None:
            self.simulator.launch(functools.partial(self.fn, **constants), grid, arguments, num_warps, launch_pdl)

        return launch


class _Torch:
    """torch, whose empty tensors hold no results of the past."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **named: Any) -> Tensor:
        made = torch.empty(*args, **named)
        return made.fill_(poison(made.dtype))


def poison(dtype: torch.dtype) -> float:
    """What memory holds that nothing was written to."""
    return float("nan") if dtype.is_floating_point else 77


def _extreme(operation: Callable[..., Tensor], a: Any, b: Any) -> Any:
    if isinstance(b, int) and isinstance(a, Tensor):
        b = torch.tensor(b, dtype=a.dtype)  # as in Triton, a plain number takes the other's type
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.dtype.is_floating_point != b.dtype.is_floating_point:
        a, b = a.float(), b.float()
    return block(operation(a, b))


def _scan(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Any:
    parts = list(x.unbind(axis))
    for i in range(1, len(parts)):
        parts[i] = combine(parts[i - 1], parts[i])
    return block(torch.stack(parts, axis))


DTYPES = ("float16", "bfloat16", "float32", "int8", "uint8", "int16", "int32", "int64")
UNARY = ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "abs", "floor", "ceil", "sqrt", "rsqrt")
GRID_WAIT = "griddepcontrol.wait; mov.u32 $0, 0;"

ASSEMBLY: dict[str, Callable[..., Tensor]] = {
    "mov.b32 $0, $1;": torch.clone,
    "rcp.approx.ftz.f32 $0, $1;": torch.reciprocal,
    "tanh.approx.f32 $0, $1;": torch.tanh,
    "add.f32 $0, $1, 0f80000000;": torch.clone,
    "mov.u32 $0, 0;": lambda: block(0),
    "griddepcontrol.launch_dependents; mov.u32 $0, 0;": lambda: block(0),
    "{ .reg .pred p; .reg .b32 t; max.f32 t, $2, $3; setp.eq.s32 p, t, 0x7f800001; @p bar.arrive 15, 256; "
    "mov.b32 $0, 0; mov.b32 $1, 0; }": torch.zeros_like,
    "{ .reg .pred p; .reg .f32 t, u; .reg .b32 v; max.f32 t, $4, $5; max.f32 u, $6, $7; max.f32 t, t, u; "
    "mov.b32 v, t; setp.eq.s32 p, v, 0x7f800001; @p bar.arrive 15, 256; "
    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }": torch.zeros_like,
}
"""Inline assembly that generated kernels use, and what it computes."""
