"""torch's backward calls of attention, as modules like any generated kernel.

Comes in: a gradient's program that says what it was derived from, and a device. Goes out: for each of the library's
kernels a `Source` in "torch", or `NotInLibrary`. Nothing of the gradient itself is recognised: the forward cascade is,
as `library` recognises it for a forward call, and what that cascade saves is all that a backward call needs.

What a call takes, and what follows for which gradients have one:

* Rows without keys are NaN there, so every row must have one: no bias, no domain but the triangle from the top left.
* The log-sum-exp of a row's scores, [batch, head, row] in the dtype of its accumulator: saved as such, or made of the
  row's maximum and normaliser.
* The output. The CPU's kernel is called in float32 for half precision (its own rounds the weights, which costs the
  gradient more than DESIGN.md's bound allows), and takes the output as it was saved, unrounded. The GPU's takes it
  rounded, by which `sum(f) O * dO` is off where values have something in common (docs/backward.md). Softmax's gradient
  does not feel a shift of all values of a head: where their mean is far from 0 it is taken off both values and output
  before that is rounded, and nothing is done to others.
* GPUs: half precision, widths that are multiples of 8; flash attention aligns its triangle at the bottom right, and is
  called where that is the same. Both kernels add up in memory in any order (`Schedule.unordered`).

Dropout's seeds are tensors that nothing reads: no call waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import sympy

from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source
from einscade.ir.cascade import Cascade
from einscade.ir.device import Device
from einscade.ir.expr import Access, Expr, FloorDiv, Where, var
from einscade.runtime.library import NotInLibrary, View, recognise
from einscade.runtime.library_call import Number, Writer, module
from einscade.runtime.program import DTYPES, Derivation, Program

__all__ = ["emit", "kinds", "schedule"]

HALVES = ("f16", "bf16")
WIDEST = 256

_DENSE = '''\
def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` as the library reads it: the width innermost, rows on 16 bytes, nothing read twice."""
    step = 16 // x.element_size()
    outer = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    fits = x.stride(-1) == 1 and all(s and s % step == 0 for s in outer) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _backward(q, k, v, out, lse, do, causal, scale):
    """The gradients of queries, keys and values, all [batch, head, row, column]."""
'''

_CPU = """\
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, out, do = (_dense(x.to(wide)) for x in (q, k, v, out, do))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
    )


"""

_CENTRED = """\
    q, k, v, do = map(_dense, (q, k, v, do))
    # Where all values are far from 0, the output loses in its rounding what the gradient is made of.
    spread, centre = torch.std_mean(v, 2, correction=0, keepdim=True)
    centre = torch.where(centre.abs() > 2 * spread, centre, 0)
    v, centre = v - centre, centre.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = torch.sub(out, centre, out=torch.empty(out.shape, dtype=q.dtype, device=q.device))
    unread = torch.empty((), dtype=torch.int64, device=q.device)
"""

_FLASH = """\
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unread, unread, scale=scale
    )


"""

_CUDNN = """\
    if not torch.backends.cuda.cudnn_sdp_enabled():
        raise RuntimeError("cuDNN attention is turned off")
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, lse.contiguous().unsqueeze(3), unread, unread, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )


"""


def kinds(device: Device) -> tuple[str, ...]:
    """The library's kernels on a device, the likely ones first."""
    if device.kind == "cpu":
        return ("flash",)
    return ("cudnn", "flash") if device.kind == "cuda" and device.capability >= (8, 0) else ()


def schedule(kind: str, target: str) -> Schedule:
    """What a call promises: on a GPU no order of additions."""
    return Schedule(target=target, unordered=target != "cpu")


def emit(program: Program, kind: str, device: Device) -> Source:
    """A module whose `run` computes the gradient by one of the `kinds`. Raises NotInLibrary."""
    if program.derived is None:
        raise NotInLibrary("not known to be a gradient")
    return Source("torch", _Backward(program.cascade, program.derived, kind, device).text())


class _Backward:
    def __init__(self, gradient: Cascade, derived: Derivation, kind: str, device: Device) -> None:
        self.gradient, self.kind, self.cpu = gradient, kind, device.kind == "cpu"
        self.adjoints: Mapping[str, str] = dict(derived.adjoints)
        results = tuple(o for o in derived.forward.outputs if o in self.adjoints)
        self.forward = derived.forward.replace(outputs=results)
        self.a = recognise(self.forward)
        self.writer = Writer(self.forward, self.a)
        (self.out,) = results
        self.causal = self._causal()
        self._check()

    def _causal(self) -> bool:
        """Whether the domain is the triangle; each row of it, or of everything, has a key."""
        if self.a.bias:
            raise NotInLibrary("a bias, which may leave rows without keys")
        offset = self.writer.causal_offset()
        if self.a.domain and offset != 0:
            raise NotInLibrary("a domain that may leave rows without keys")
        return bool(self.a.domain)

    def _check(self) -> None:
        a, extent = self.a, self.forward.extent
        operands = [self.forward.tensors[x.tensor].dtype for x in (a.query, a.key, a.value)]
        types = {*operands, self.forward.tensors[self.out].dtype}
        if len(types) != 1 or not types <= {"f64", "f32", *HALVES}:
            raise NotInLibrary(f"queries, keys, values and output of types {', '.join(sorted(types))}")
        (self.dtype,) = types
        if not set(self.forward.symbols) <= set(self.gradient.symbols):
            raise NotInLibrary("sizes that the gradient does not have")
        if not {x for x, _ in self._inputs()} >= set(self.gradient.outputs):
            raise NotInLibrary("the gradient of something else than queries, keys or values")
        if (self.cpu or self.kind == "flash") and extent(a.e) != extent(a.f):
            raise NotInLibrary("values of another width than keys")
        if self.cpu:
            return
        if self.dtype not in HALVES:
            raise NotInLibrary(f"{self.dtype} on a GPU")
        for width in (extent(a.e), extent(a.f)):
            if not width.is_Integer or width % 8 or width > WIDEST:
                raise NotInLibrary(f"a width of {width}")
        if self.kind == "flash" and self.causal and extent(a.p) != extent(a.m):
            raise NotInLibrary("a triangle that is not square")

    def _inputs(self) -> list[tuple[str, list[tuple[str, Access]]]]:
        """The gradients that are asked for, each with the call's gradients that it is made of, and their operands."""
        made: dict[str, list[tuple[str, Access]]] = {}
        for i, access in enumerate((self.a.query, self.a.key, self.a.value)):
            if access.tensor in self.adjoints:
                made.setdefault(self.adjoints[access.tensor], []).append((f"gradients[{i}]", access))
        return list(made.items())

    def text(self) -> str:
        a, writer = self.a, self.writer
        rows, columns = (*a.batch, a.p), (*a.batch, a.m)
        if {"gradients", "torch", "_dense", "_backward"} & {*self.gradient.tensors, *self.gradient.symbols}:
            raise NotInLibrary("a tensor or size by a name that the call uses itself")
        shared = bool(a.batch) and not any(a.batch[-1] in View.of(x).ranks for x in (a.key, a.value))
        lines = [
            "gradients = _backward(",
            f"    {writer.operand(a.query, (*rows, a.e))},",
            f"    {writer.operand(a.key, (*columns, a.e), shared)},",
            f"    {writer.operand(a.value, (*columns, a.f), shared)},",
            f"    {self.rows(self.output(), (*rows, a.f))},",
            f"    {self.log_sum_exp()},",
            f"    {self.rows(self.adjoints[self.out], (*rows, a.f))},",
            f"    {self.causal},",
            f"    {Number().code(a.scale)},",
            ")",
        ]
        results = {}
        for name, parts in self._inputs():
            added, results[name] = self.result(name, parts)
            lines += added
        lines += ["return (", *(f"    {results[o]}," for o in self.gradient.outputs), ")"]
        calls = _CPU if self.cpu else _CENTRED + (_FLASH if self.kind == "flash" else _CUDNN)
        return module(self.gradient, lines, _DENSE + calls)

    def rows(self, tensor: str, ranks: tuple[str, ...]) -> str:
        """A tensor over batch ranks and query positions with the call's batch and head in front."""
        batch = len(self.a.batch)
        code = self.writer.aligned(tensor, self.gradient.tensors[tensor].ranks, ranks)
        if batch < 2:
            return f"{code}[{'None, ' * (2 - batch)}...]"
        return f"{code}.flatten(0, {batch - 2})" if batch > 2 else code

    def output(self) -> str:
        """The saved tensor that is the output, before or after it was rounded."""
        given = {t.name for t in self.gradient.inputs}
        made = self.forward.definitions[self.out]
        whole = tuple(map(var, made.output.ranks))
        if isinstance(made.expr, Access) and made.expr.tensor in given and made.expr.index == whole:
            return made.expr.tensor
        if self.out in given:
            return self.out
        raise NotInLibrary("an output that is not saved")

    def log_sum_exp(self) -> str:
        """A row's log-sum-exp, of what is saved of it."""
        z, g = self.a.normaliser, self.a.maximum
        known = {self.value(t.name): t.name for t in self.gradient.inputs if t.name in self.forward.definitions}
        rows = (*self.a.batch, self.a.p)

        def code(expr: Expr) -> str | None:
            found = known.get(expr)
            if found is None or set(self.gradient.tensors[found].ranks) != set(rows):
                return None
            return self.rows(found, rows)

        log = sympy.log(z)
        if (whole := code(log if g is None else log + g)) is not None:
            return whole
        plain, inverse = code(z), code(1 / z)
        if plain is None and inverse is None:
            raise NotInLibrary("a normaliser that is not saved")
        logarithm = f"{plain}.log()" if plain is not None else f"-{inverse}.log()"
        if g is None:
            return logarithm
        if (maximum := code(g)) is None:
            raise NotInLibrary("a maximum that is not saved")
        return f"{maximum} + {logarithm}" if plain is not None else f"{maximum} {logarithm[0]} {logarithm[1:]}"

    def value(self, name: str) -> Expr:
        """What a saved tensor holds of a row that has keys: an expression over the reductions of the forward pass."""
        made = self.forward.definitions[name]
        if made.reduce is not None:
            return made.output()
        guard = sympy.Ne(self.a.normaliser, 0)
        return made.expr.args[1] if isinstance(made.expr, Where) and made.expr.args[0] == guard else made.expr

    def result(self, name: str, parts: list[tuple[str, Access]]) -> tuple[list[str], str]:
        """Lines that make an input's gradient of the call's gradients, and what it is then."""
        tensor = parts[0][1].tensor
        laid = "memory_format=torch.contiguous_format"
        rounded = f".to({DTYPES[self.dtype]}, {laid})" if self.cpu and self.dtype in HALVES else ".contiguous()"
        if len(parts) == 1 and self.writer.is_permutation(parts[0][1]):
            call, access = parts[0]
            view = View.of(access)
            dims = {steps[0][0]: rank for rank, steps in view.steps}
            code = self.own(call, access)
            have = [r for r in self.ranks_of(access) if r in view.ranks]
            order = [have.index(dims[d]) for d in sorted(dims)]
            if order != list(range(len(order))):
                code += f".permute({', '.join(map(str, order))})"
            return [], f"{code}{rounded}"
        lines = [f"{name} = torch.zeros_like({tensor}, dtype=gradients[0].dtype, {laid})"]
        for call, access in parts:
            view = View.of(access)
            self.check_disjoint(access, view)
            divided = any(i.has(FloorDiv) for i in access.index)
            ranks = tuple(r for r in self.ranks_of(access) if r in view.ranks)
            lines.append(f"{self.writer.strided(name, view, ranks, divided)}.add_({self.own(call, access)})")
        return lines, f"{name}{rounded}"

    def ranks_of(self, access: Access) -> tuple[str, ...]:
        a = self.a
        return (*a.batch, *((a.p, a.e) if access is a.query else (a.m, a.e) if access is a.key else (a.m, a.f)))

    def own(self, call: str, access: Access) -> str:
        """The call's gradient of an operand over the ranks that its tensor has, summed over those that it lacks."""
        batch, ranks = len(self.a.batch), self.ranks_of(access)
        if batch < 2:
            call = f"{call}[{', '.join(['0'] * (2 - batch))}]"
        elif batch > 2:
            sizes = ", ".join(Number().code(self.forward.extent(r)) for r in self.a.batch[:-1])
            call = f"{call}.unflatten(0, ({sizes}))"
        missing = [str(i) for i, r in enumerate(ranks) if r not in View.of(access).ranks]
        return f"{call}.sum(({', '.join(missing)},))" if missing else call

    def check_disjoint(self, access: Access, view: View) -> None:
        """Raises NotInLibrary where two points may be one element: adding to the view would then lose one of them."""
        dimensions: dict[int, list[tuple[int, Expr]]] = {}
        for rank, steps in view.steps:
            extent = self.forward.extent(rank)
            if any(i.has(FloorDiv) and i.has(var(rank)) for i in access.index):
                extent = FloorDiv(extent, self.a.group)
            for d, coefficient in steps:
                dimensions.setdefault(d, []).append((int(coefficient), extent))
        for found in dimensions.values():
            found.sort(key=lambda pair: pair[0])
            for (step, extent), (wider, _) in pairwise(found):
                if step < 1 or not extent.is_Integer or step * extent > wider:
                    raise NotInLibrary(f"{access.tensor} is read where it may have been read before")
