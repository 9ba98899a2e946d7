"""The tiled PyTorch emitter: a loop program as readable Python over torch operations, for any device.

Comes in: a `LoopProgram` and a `Schedule`. Goes out: `Source` in "torch". A serial nest becomes a loop over tiles of
its long grid ranks with a loop over tiles of the serial rank inside; the other grid ranks are batch dimensions.
Contractions are `torch.matmul` on views; a tile is masked only where it crosses the edge of its domain, and tiles
outside are not visited. Memory is that of a few tiles. `emit_flat` runs every Einsum whole and out of place, so that
autograd can differentiate it.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.domains import certain, conjuncts, possible, span
from einscade.codegen.grouping import Group, split_groups
from einscade.codegen.loops import FlatNest, LoopProgram, SerialNest, flat, plan
from einscade.codegen.matmul import Contraction, contraction
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Source, Unsupported
from einscade.codegen.tiles import (
    State,
    Statement,
    TileLoop,
    existence,
    guarded,
    may_be_infinite,
    reads_maxima,
    tile_loop,
    with_fills,
)
from einscade.codegen.torch_values import COMPARISON, Name, Range, Scope, Value, align, number, python, value
from einscade.ir.cascade import MONOIDS, Cascade, Einsum
from einscade.ir.expr import Access, Expr, Where, accesses, free_vars, var
from einscade.ir.text import print_einsum

__all__ = ["TorchModule", "emit", "emit_flat"]

TORCH_DTYPES: Mapping[str, str] = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8e4m3": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2", "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "i4": "int8",
    "bool": "bool",
}  # fmt: skip

_RESERVED = frozenset({"torch", "run", "range", "min", "max", "keep", "partial"})


def emit(program: LoopProgram, schedule: Schedule) -> Source:
    """The program's text under a schedule; `Unsupported` where an expression has no torch counterpart."""
    return Source("torch", TorchModule(program, schedule, in_place=True).text())


def emit_flat(cascade: Cascade) -> Source:
    """The cascade with every Einsum whole, out of place and differentiable: quadratic memory, the fallback backward."""
    return Source("torch", TorchModule(flat(cascade), Schedule(), in_place=False).text())


def accumulation_dtype(cascade: Cascade) -> str:
    return "float64" if any(t.dtype == "f64" for t in cascade.inputs) else "float32"


@dataclass
class _Lines:
    """Code being written, with its indentation."""

    lines: list[str] = field(default_factory=list)
    depth: int = 1

    def __call__(self, text: str = "") -> None:
        self.lines.append("    " * self.depth + text if text else "")


class TorchModule:
    """One module's text. Ranks read in groups are split first, and the program planned again on the split cascade."""

    def __init__(self, program: LoopProgram, schedule: Schedule, in_place: bool, grouped: bool = True) -> None:
        self.original = program.cascade
        split, self.groups = split_groups(program.cascade) if grouped else (program.cascade, ())
        flat_plan = not program.serial_nests
        self.program = program if not self.groups else flat(split) if flat_plan else plan(split)
        self.cascade = self.program.cascade
        self.schedule, self.in_place = schedule, in_place
        self.out = _Lines()
        self.points, self.results = existence(self.cascade)
        self.acc = accumulation_dtype(self.cascade)
        self.device = f"{self.code(self.original.inputs[0].name)}.device" if self.original.inputs else '"cpu"'
        self.names: dict[str, Name] = {t.name: self.stored(t.name) for t in self.cascade.inputs}

    # -- names and shapes --

    def code(self, tensor: str) -> str:
        return f"{tensor}_" if tensor in _RESERVED or tensor in self.cascade.symbols else tensor

    def tiles(self) -> Mapping[str, int]:
        return dict(self.schedule.tiles)

    def size(self, expr: Expr) -> str:
        """An extent as code, tile symbols as their numbers."""
        return python(expr.xreplace({var(s): sympy.Integer(n) for s, n in self.tiles().items()}))

    def stored(self, tensor: str) -> Name:
        t = self.cascade.tensors[tensor]
        extents = tuple(self.size(self.cascade.extent(r)) for r in t.ranks)
        return Name(self.code(tensor), t.ranks, t.dtype, True, extents=extents)

    # -- the module --

    def text(self) -> str:
        symbols = [s for s in self.original.symbols if s not in self.tiles()]
        inputs = [self.code(t.name) for t in self.original.inputs]
        signature = ", ".join(inputs + (["*", *symbols] if symbols else []))
        self.boundary_views()
        for nest in self.program.nests:
            self.nest(nest)
        self.out("return " + ", ".join(self.result(o) for o in self.original.outputs) + ",")
        body = "\n".join(self.out.lines)
        title = f"{self.original.name}: written by einscade for the cascade"
        doc = "\n".join("    " + line for line in str(self.original).splitlines())
        function = f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}\n"
        return f'"""{title}\n\n{doc}\n"""\n\n{self.preamble()}\n\n{function}'

    def preamble(self) -> str:
        return "import torch\n"

    def boundary_views(self) -> None:
        for t in self.original.inputs:
            dim = 0
            views = ""
            for r in t.ranks:
                group = self.group(r)
                if group is not None:
                    views += f".unflatten({dim}, ({self.extent(group.outer)}, {group.size}))"
                dim += 2 if group else 1
            if views:
                self.out(f"{self.code(t.name)} = {self.code(t.name)}{views}")

    def group(self, rank: str) -> Group | None:
        return next((g for g in self.groups if g.rank == rank), None)

    def tile(self, rank: str) -> int | None:
        """The tile of a grid rank; one of a rank that was split into groups is a tile of whole groups."""
        for g in self.groups:
            if rank == g.outer:
                whole = self.schedule.tile(g.rank)
                return None if whole is None else max(1, whole // g.size)
        return self.schedule.tile(rank)

    def extent(self, rank: str) -> str:
        return self.size(self.cascade.extent(rank))

    def result(self, output: str) -> str:
        ranks = self.original.tensors[output].ranks
        code = self.code(output)
        for dim, r in enumerate(ranks):  # joined from the left, so that each pair is at its final place
            if self.group(r) is not None:
                code += f".flatten({dim}, {dim + 1})"
        return code

    def nest(self, nest: SerialNest | FlatNest) -> None:
        if isinstance(nest, SerialNest):
            _SerialWriter(self, tile_loop(self.cascade, nest)).write()
        else:
            _FlatWriter(self, nest).write()

    def allocate(self, tensor: str, zeros: bool = False) -> None:
        """An output, in memory in the schedule's order of its (unsplit) ranks."""
        t = self.cascade.tensors[tensor]
        order = dict(self.schedule.out_order).get(tensor)
        ranks = t.ranks
        if order is not None:
            parts = {g.rank: (g.outer, g.inner) for g in self.groups}
            ranks = tuple(x for r in order for x in parts.get(r, (r,)))
        shape = ", ".join(self.extent(r) for r in ranks)
        make = "zeros" if zeros else "empty"
        dtype = TORCH_DTYPES[t.dtype]
        comma = "," if len(ranks) == 1 else ""
        code = f"torch.{make}(({shape}{comma}), dtype=torch.{dtype}, device={self.device})"
        if ranks != t.ranks:
            code += f".permute({', '.join(str(ranks.index(r)) for r in t.ranks)})"
        self.out(f"{self.code(tensor)} = {code}")
        self.names[tensor] = self.stored(tensor)


class _Writer:
    """What flat and serial nests share: statements to lines of code in a scope."""

    def __init__(self, module: TorchModule, order: tuple[str, ...]) -> None:
        self.module, self.out, self.cascade = module, module.out, module.cascade
        self.scope = Scope(
            order, {}, dict(module.names), module.acc, module.in_place, module.device, rank_values=self.rank_values
        )
        self.made_ranks: dict[str, str] = {}
        self.masks: dict[object, Value] = {}

    def rank_values(self, rank: str) -> str:
        """The variable with a rank's values here, made on first use."""
        if rank not in self.made_ranks:
            r = self.scope.ranges[rank]
            bounds = f"{r.lo}, {r.hi}" if r.lo is not None else r.size
            self.made_ranks[rank] = f"{rank}_"
            self.out(f"{rank}_ = torch.arange({bounds}, device={self.module.device})")
        return self.made_ranks[rank]

    def comment(self, s: Statement) -> None:
        if s.source is not None:
            indent = 4 * self.out.depth
            for line in textwrap.wrap(print_einsum(s.source), 116 - indent, subsequent_indent="  "):
                self.out(f"# {line}")

    def evaluate(self, s: Statement) -> Value:
        """The statement's value over `s.ranks`, reductions done, fills not yet applied."""
        if s.monoid is None:
            return value(s.expr, self.scope)
        if s.monoid == "topk":
            return self.topk(s)
        if s.monoid == "sum" and (c := contraction(s, self.scope.order, self.scope.dims)) is not None:
            return self.contract(c, s)
        operand = value(s.expr, self.scope)
        if s.mask_operand:
            operand = self.masked(operand, s.keep, MONOIDS[s.monoid].identity)
        return self.reduced(operand, s)

    def masked(self, v: Value, predicate: Boolean, fill: Expr) -> Value:
        keep = self.mask(predicate)
        full = self.scope.sort(v.ranks + keep.ranks)
        if v.kind == "b":
            op = "&" if fill == sympy.false else "| ~"
            return Value(f"{align(v, full)} {op}{keep.tight()}", full, "b", True, 3)
        if v.kind == "i" and not fill.is_Integer:
            v = Value(f"{v.tight()}.to(torch.{self.scope.acc})", v.ranks, "f", True)
        return Value(f"torch.where({align(keep, full)}, {align(v, full)}, {number(fill)})", full, v.kind, True)

    def mask(self, predicate: Boolean) -> Value:
        """The variable that holds the points that exist."""
        if predicate not in self.masks:
            v = value(predicate, self.scope)
            name = "keep" if not self.masks else f"keep{len(self.masks)}"
            self.out(f"{name} = {v.code}")
            self.masks[predicate] = Value(name, v.ranks, "b")
        return self.masks[predicate]

    def reduced(self, operand: Value, s: Statement) -> Value:
        missing = [r for r in s.reduced if r not in operand.ranks]
        if missing:  # the operand is the same along a reduced rank: spread it out
            full = self.scope.sort(operand.ranks + tuple(missing))
            sizes = ", ".join(self.length(r) if r in missing else "-1" for r in full)
            operand = Value(
                f"{Value(align(operand, full), prec=operand.prec).tight()}.expand({sizes})", full, operand.kind
            )
        dims = [operand.ranks.index(r) - len(operand.ranks) for r in s.reduced]
        rest = tuple(r for r in operand.ranks if r not in s.reduced)
        which = str(dims[0]) if len(dims) == 1 else str(tuple(sorted(dims)))
        method = {"sum": "sum", "max": "amax", "min": "amin", "any": "any", "all": "all"}.get(s.monoid or "")
        if s.monoid == "prod":
            code = operand.tight()
            for d in sorted(dims):
                code += f".prod({d})"
            return Value(code, rest, operand.kind, True)
        if method is None:
            raise Unsupported(f"reduction {s.monoid}")
        if method in ("amax", "amin"):
            if operand.kind == "b":
                raise Unsupported(f"{s.monoid} of booleans")
            return self.extreme(operand, s, method, which, rest)
        return Value(f"{operand.tight()}.{method}({which})", rest, "b" if operand.kind == "b" else operand.kind, True)

    def extreme(self, operand: Value, s: Statement, method: str, which: str, rest: tuple[str, ...]) -> Value:
        """`amax` refuses an empty dimension; a whole rank may be empty."""
        whole = [r for r in s.reduced if self.scope.ranges[r].lo is None and not self.scope.ranges[r].size.isdigit()]
        if whole and operand.kind == "f":
            name = operand.code
            if not name.isidentifier():
                name = "terms"
                self.out(f"{name} = {operand.code}")
            shape = ", ".join(self.length(r) for r in rest) + ("," if len(rest) == 1 else "")
            empty = f"{name}.new_full(({shape}), {number(s.identity or sympy.oo)})"
            some = " and ".join(self.scope.ranges[r].size for r in whole)
            return Value(f"{name}.{method}({which}) if {some} else {empty}", rest, "f", True, COMPARISON)
        return Value(f"{operand.tight()}.{method}({which})", rest, operand.kind, True)

    def topk(self, s: Statement) -> Value:
        e = s.source
        assert e is not None
        assert e.reduce is not None
        assert e.reduce.slot is not None
        operand = value(s.expr, self.scope)
        if s.keep != sympy.true:
            operand = self.masked(operand, s.keep, -sympy.oo)
        full = self.scope.sort(tuple(r for r in s.ranks if r != e.reduce.slot) + s.reduced)
        dim = full.index(s.reduced[0]) - len(full)
        code = f"torch.sort({align(operand, full)}, dim={dim}, descending=True, stable=True).indices"
        code += f".narrow({dim}, 0, {self.length(e.reduce.slot)})"
        kept = tuple(e.reduce.slot if r == s.reduced[0] else r for r in full)
        order = self.scope.sort(kept)
        if order != kept:
            code += f".permute({', '.join(str(kept.index(r)) for r in order)})"
        return Value(code, order, "i", True)

    def length(self, rank: str) -> str:
        r = self.scope.ranges[rank]
        return f"{r.hi} - {r.lo}" if r.lo is not None else r.size

    def contract(self, c: Contraction, s: Statement) -> Value:
        left, right = c.left(self.scope), c.right(self.scope)
        if s.mask_operand:
            keep = self.mask(s.keep)
            side = next((v for v in (left, right) if set(keep.ranks) <= set(v.ranks)), None)
            if side is None:
                raise Unsupported(f"a mask over {keep.ranks} in the contraction {s.name}")
            masked = self.masked(side, s.keep, sympy.Integer(0))
            left, right = (masked, right) if side is left else (left, masked)
        result = c.product(c.as_left(left).tight(), c.as_right(right).tight(), self.scope, self.length)
        return self.scaled(result, c.outer)

    def scaled(self, result: Value, outer: Expr) -> Value:
        """The product times the factors that lack the reduced ranks."""
        if outer == 1:
            return result
        factor = value(outer, self.scope)
        ranks = self.scope.sort(result.ranks + factor.ranks)
        if ranks == result.ranks and self.scope.in_place:
            return Value(f"{result.code}.mul_({align(factor, ranks)})", ranks, "f", True)
        product = Value(align(factor, ranks), prec=factor.prec).tight(1)
        return Value(f"{align(result, ranks)} * {product}", ranks, "f", True, 1)

    def spread(self, v: Value, ranks: tuple[str, ...]) -> Value:
        """The value with all of `ranks` as dimensions."""
        if v.ranks == ranks:
            return v
        sizes = ", ".join("-1" if r in v.ranks else self.length(r) for r in ranks)
        if not ranks:
            return v
        code = Value(align(v, ranks), prec=v.prec)
        if not v.ranks and "[" not in v.code:
            dtype = {"f": self.scope.acc, "i": "int64", "b": "bool"}[v.kind]
            shape = ", ".join(self.length(r) for r in ranks)
            comma = "," if len(ranks) == 1 else ""
            return Value(
                f"torch.full(({shape}{comma}), {v.code}, dtype=torch.{dtype}, device={self.module.device})",
                ranks,
                v.kind,
                True,
            )
        return Value(f"{code.tight()}.expand({sizes})", ranks, v.kind)

    def gone(self, statements: Sequence[Statement], index: int, keeps: Iterable[str]) -> set[str]:
        """Names that this statement reads, once, and none after it does."""
        later = {a.tensor for s in statements[index + 1 :] for a in s.reads} | set(keeps)
        s = statements[index]
        count = Counter(
            x.tensor for e in (s.expr, s.keep, s.row) for x in sympy.preorder_traversal(e) if isinstance(x, Access)
        )
        return {name for name, n in count.items() if n == 1} - later

    def define(self, name: str, v: Value, declared: tuple[str, ...], code: str | None = None) -> None:
        """Bind a value of the loop, of a statement with these ranks, to a variable."""
        code = code or self.module.code(name)
        self.out(f"{code} = {v.code}")
        kind = "bool" if v.kind == "b" else "i64" if v.kind == "i" else "f32"
        self.scope.names[name] = Name(code, v.ranks, kind, False, v.owned, declared=declared)

    def store(self, name: str, v: Value, row: Boolean) -> None:
        """Write a value to its place in an output; missing points are 0."""
        t = self.cascade.tensors[name]
        if row != sympy.true:
            keep = value(row, self.scope)
            full = self.scope.sort(v.ranks + keep.ranks)
            zero = "False" if v.kind == "b" else "0"
            v = Value(f"torch.where({align(keep, full)}, {align(v, full)}, {zero})", full, v.kind, True)
        index, ranks = [], []
        for r in t.ranks:
            place = self.place(r)
            index.append(place[0])
            if place[1] is not None:
                ranks.append(place[1])
        code = Value(align(v, self.scope.sort(ranks)), prec=v.prec)
        order = self.scope.sort(ranks)
        text = code.code
        if tuple(ranks) != order and v.ranks:
            v = self.spread(v, order)
            text = f"{v.tight()}.permute({', '.join(str(order.index(r)) for r in ranks)})"
        self.out(f"{self.module.code(name)}[{', '.join(index) or '...'}] = {text}")

    def place(self, rank: str) -> tuple[str, str | None]:
        """Where a dimension of an output is written: its index, and the rank that it keeps."""
        r = self.scope.ranges[rank]
        if r.at is not None:
            return r.at, None
        return (f"{r.lo}:{r.hi}" if r.lo is not None else ":"), rank


class _FlatWriter(_Writer):
    """Einsums that run whole, one after another."""

    def __init__(self, module: TorchModule, nest: FlatNest) -> None:
        super().__init__(module, tuple(r.name for r in module.cascade.ranks))
        self.nest = nest
        self.scope.ranges = {r.name: Range(module.size(r.extent)) for r in module.cascade.ranks}
        self.statements = self.prepared()

    def prepared(self) -> list[Statement]:
        statements = []
        self.before = {e.name: f"{e.name}@before" for e in self.nest.einsums if e.scan}
        for e in self.nest.einsums:
            reduce = e.reduce
            s = Statement(
                e.name, e.output.ranks, self.from_before(e, self.divisible(e)), reduce.monoid if reduce else None,
                reduce.ranks if reduce else (), self.module.points[e.name], self.module.results[e.name], source=e,
            )  # fmt: skip
            statements += self.without_empty_divisions(s)
        inputs = (t.name for t in self.cascade.inputs)
        if may_be_infinite(statements, inputs) or reads_maxima(self.cascade, self.nest.inputs):
            maxima = [s.name for s in statements if s.monoid in ("max", "min")]
            taken = {*self.cascade.tensors}

            def fresh(name: str) -> str:
                while name in taken:
                    name += "_"
                taken.add(name)
                return name

            statements = guarded(statements, maxima, fresh)
        return with_fills(statements)

    def without_empty_divisions(self, s: Statement) -> list[Statement]:
        """A sum over nothing is 0 whatever it is divided by: where a row has no point, a divisor that is the same for
        the whole row is 1, so that neither the sum nor its gradient meets 0 / 0."""
        divisors = {
            f.base
            for f in sympy.Mul.make_args(s.expr)
            if isinstance(f, sympy.Pow) and f.exp.is_negative and not free_vars(f) & set(s.reduced)
        }
        if s.monoid != "sum" or s.keep == s.row or not divisors or not any(d.has(Access) for d in divisors):
            return [s]
        ranks = tuple(r for r in s.ranks if r in free_vars(s.keep))
        some = Statement(f"{s.name}_some", ranks, s.keep, "any", s.reduced)
        safe = {d: Where(Access(some.name, *map(var, ranks)), d, 1) for d in divisors}
        return [some, replace(s, expr=s.expr.xreplace(safe))]

    def from_before(self, e: Einsum, expr: Expr) -> Expr:
        """Another scan read one step back is a tensor of its own, which starts with the scan's initial value."""
        table = {}
        for a in accesses(expr):
            scan = self.cascade.definitions[a.tensor].scan if a.tensor in self.before and a.tensor != e.name else None
            if scan is not None:
                at = self.cascade.tensors[a.tensor].ranks.index(scan.rank)
                if a.index[at] == var(scan.rank) - 1:
                    table[a] = Access(self.before[a.tensor], *a.index[:at], var(scan.rank), *a.index[at + 1 :])
        return expr.xreplace(table)

    def divisible(self, e: Einsum) -> Expr:
        """Where the domain says `x != 0`, a division by x must not meet the 0 either, or its gradient is NaN."""
        zeros = [
            c.lhs for c in conjuncts(e.domain) if isinstance(c, sympy.Ne) and c.rhs == 0 and isinstance(c.lhs, Access)
        ]
        return e.expr.xreplace({x: Where(sympy.Ne(x, 0), x, 1) for x in zeros})

    def write(self) -> None:
        for i, s in enumerate(self.statements):
            self.comment(s)
            self.scope.dead = self.gone(self.statements, i, self.nest.outputs) if self.scope.in_place else set()
            if s.source is not None and s.source.scan is not None:
                self.write_scan(s)
                continue
            v = self.evaluate(s)
            if s.fill is not None:
                v = self.masked(v, s.row, s.fill)
            if s.name in self.cascade.outputs:
                if s.row != sympy.true:
                    v = self.masked(v, s.row, sympy.false if v.kind == "b" else sympy.Integer(0))
                v = self.as_output(s, v)
            elif s.name in self.nest.outputs:
                v = self.spread(v, self.scope.sort(s.ranks))
                self.define(s.name, v, s.ranks)
                self.hand_over(s.name)
                continue
            self.define(s.name, v, s.ranks)
            if s.name in self.nest.outputs:
                self.module.names[s.name] = self.module.stored(s.name)
                self.scope.names[s.name] = self.module.stored(s.name)

    def hand_over(self, name: str) -> None:
        """A value of this nest that another nest reads: in memory, as it was computed."""
        here = self.scope.names[name]
        dtype = {"float32": "f32", "float64": "f64"}[self.scope.acc] if here.dtype == "f32" else here.dtype
        self.module.names[name] = replace(here, dtype=dtype, stored=True, fresh=False)

    def as_output(self, s: Statement, v: Value) -> Value:
        """In the cascade's order of ranks, its dtype, and the schedule's memory order."""
        t = self.cascade.tensors[s.name]
        order = self.scope.sort(t.ranks)
        v = self.spread(v, order)
        code = v.tight()
        if order != t.ranks:
            code += f".permute({', '.join(str(order.index(r)) for r in t.ranks)})"
        dtype = TORCH_DTYPES[t.dtype]
        code += f".to(torch.{dtype})"
        return Value(code + ".contiguous()", t.ranks, v.kind)

    def write_scan(self, s: Statement) -> None:
        e = s.source
        assert e is not None
        assert e.scan is not None
        code, rank = self.module.code(s.name), e.scan.rank
        ranks = self.scope.sort(tuple(r for r in s.ranks if r != rank))
        init = value(e.scan.init, self.scope)
        init = self.spread(replace(init, kind="f") if init.kind == "i" else init, ranks)
        self.out(f"{code} = {code}_first = {init.code}")
        self.out(f"{code}_steps = []")
        self.out(f"for {rank} in range({self.scope.ranges[rank].size}):")
        self.out.depth += 1
        whole = self.scope.ranges[rank]
        self.scope.ranges[rank] = Range(whole.size, at=rank)
        self.scope.names[s.name] = Name(code, ranks, "f32", False, declared=tuple(r for r in s.ranks if r != rank))
        previous = {a: Access(s.name, *(i for r, i in zip(s.ranks, a.index, strict=True) if r != rank))
                    for a in accesses(s.expr) if a.tensor == s.name}  # fmt: skip
        step = replace(s, ranks=ranks, expr=s.expr.xreplace(previous), keep=s.keep.xreplace(previous))
        v = self.spread(self.evaluate(step), ranks)
        self.out(f"{code} = {v.code}")
        self.out(f"{code}_steps.append({code})")
        self.out.depth -= 1
        self.scope.ranges[rank] = whole
        order = self.scope.sort(s.ranks)
        self.out(f"{code} = torch.stack({code}_steps, {order.index(rank)})")
        self.scope.names[s.name] = Name(code, order, "f32", False, declared=s.ranks)
        if self.before[s.name] in {a.tensor for t in self.statements for a in t.reads}:
            self.out(f"{code}_before = torch.stack([{code}_first, *{code}_steps[:-1]], {order.index(rank)})")
            self.scope.names[self.before[s.name]] = Name(f"{code}_before", order, "f32", False, declared=s.ranks)
        if s.name in self.nest.outputs:
            if s.name in self.cascade.outputs:
                v = self.as_output(s, Value(code, order))
                self.out(f"{code} = {v.code}")
                self.scope.names[s.name] = self.module.names[s.name] = self.module.stored(s.name)
            else:
                self.hand_over(s.name)


class _SerialWriter(_Writer):
    """A loop over tiles of the grid, with a loop along the serial rank inside."""

    def __init__(self, module: TorchModule, loop: TileLoop) -> None:
        self.loop, self.nest = loop, loop.nest
        grid = loop.nest.grid
        used = [r for s in loop.statements for r in s.iterated]
        tail = [r for r in dict.fromkeys(used) if r not in grid and r not in loop.coordinates]
        super().__init__(module, (*grid, *loop.coordinates, *tail))
        self.tile_of = {r: n for r in grid if (n := module.tile(r)) is not None}
        self.tiled = list(self.tile_of)
        for r in (*grid, *tail):
            size = module.extent(r)
            self.scope.ranges[r] = Range(size, f"{r}_lo", f"{r}_hi") if r in self.tiled else Range(size)
        self.step = module.size(loop.step)
        self.uses_serial = any(
            loop.nest.serial in free_vars(x) for s in loop.body for x in (s.expr, s.keep, s.row)
        ) or any(name in loop.nest.outputs for name in (e.name for e in loop.nest.body if not e.scan))
        self.partial: dict[object, str] = {}
        self.hoisted: _Lines | None = None  # lines before the loop, while its body is being written
        self.hoist_names: dict[str, str] = {}

    def write(self) -> None:
        made_in_body = {e.name for e in self.nest.body}
        for name in self.nest.outputs:
            self.module.allocate(name, zeros=name in made_in_body)
        depth = self.out.depth
        for r in self.tiled:
            size, tile = self.scope.ranges[r].size, self.tile_of[r]
            self.out(f"for {r}_lo in range(0, {size}, {tile}):")
            self.out.depth += 1
            self.out(f"{r}_hi = min({r}_lo + {tile}, {size})")
        self.statements(self.loop.prologue, ())
        for state in self.loop.states:
            self.initialise(state)
        self.serial_loop()
        self.made_ranks = {r: v for r, v in self.made_ranks.items() if r not in self.loop.coordinates}
        self.masks = {}
        self.partial = {}
        for state in self.loop.states:
            if state.name in self.nest.outputs:
                raise Unsupported(f"every value of the scan {state.name} is asked for")
        self.statements(self.loop.epilogue, ())
        self.out.depth = depth

    def initialise(self, state: State) -> None:
        ranks = self.scope.sort(state.ranks)
        v = value(state.init, self.scope)
        if v.kind == "i" and not v.ranks:
            v = Value(v.code, (), "f")
        v = self.spread(v, ranks)
        code = v.code if v.owned and v.code.startswith("torch.full") else f"{v.tight()}.clone()"
        self.define(state.name, Value(code, ranks, "f", True), state.ranks)

    # -- the loop along the serial rank --

    def edges(self) -> dict[str, tuple[Expr, Expr]]:
        """The first and last index of every rank in the tile, as expressions of the code's variables."""
        found: dict[str, tuple[Expr, Expr]] = {}
        for r, where in self.scope.ranges.items():
            if where.at is not None:
                continue
            if r in self.tiled:
                found[r] = (var(f"{r}_lo"), var(f"{r}_hi") - 1)
            elif r in self.cascade.rank_table:
                found[r] = (sympy.Integer(0), self.cascade.extent(r) - 1)
        for x in self.loop.coordinates:
            found[x] = (var(f"{self.loop.coordinate}_lo"), var(f"{self.loop.coordinate}_hi") - 1)
        return found

    def serial_loop(self) -> None:
        outer, body = self.out, _Lines(depth=self.out.depth + 1)
        x = self.loop.coordinate
        serial = self.nest.serial
        extent = self.module.size(self.cascade.extent(serial))
        if x is None:
            self.scope.ranges[serial] = Range(extent, at=serial)
            head = [f"for {serial} in range({extent}):"]
        else:
            head = self.bounds(x, body)
        self.hoisted = hoisted = _Lines(depth=outer.depth)
        self.out = body
        self.find_partial(body)
        self.statements(self.loop.body, tuple(s.name for s in self.loop.states))
        for state in self.loop.states:
            code, new = self.scope.names[state.name].code, self.scope.names[state.new].code
            if code != new:
                self.out(f"{code} = {new}")
        self.out = outer
        self.hoisted = None
        for line in (*hoisted.lines, *("    " * outer.depth + h for h in head), *body.lines):
            outer.lines.append(line)

    def bounds(self, x: str, body: _Lines) -> list[str]:
        """The loop over tiles of the coordinate, from the domain."""
        lo, hi = f"{x}_lo", f"{x}_hi"
        total = (
            self.loop.limit if self.loop.limit is not None else self.cascade.extent(self.nest.serial) * self.loop.step
        )
        reach = span(self.loop.domain, x, self.edges())
        start, stop = sympy.Integer(0), total
        if self.loop.skippable:
            start = sympy.Max(0, reach.start) if reach.start is not None else start
            stop = sympy.Min(total, reach.stop) if reach.stop is not None else stop
        first = self.module.size(start)
        if start != 0 and self.uses_serial:
            first = f"({first}) // {self.step} * {self.step}"
        end = self.module.size(stop)
        head = []
        if not end.isidentifier() and not end.isdigit():
            head.append(f"{x}_end = {end}")
            end = f"{x}_end"
        head.append(f"for {lo} in range({first}, {end}, {self.step}):")
        body(f"{hi} = min({lo} + {self.step}, {end})" if self.loop.limit is not None else f"{hi} = {lo} + {self.step}")
        self.scope.ranges[self.nest.serial] = Range(self.module.size(self.cascade.extent(self.nest.serial)),
                                                    at=f"{lo} // {self.step}")  # fmt: skip
        for c in self.loop.coordinates:
            self.scope.ranges[c] = Range(self.module.size(total), lo, hi)
        if self.loop.skippable and not reach.exact:
            condition = possible(self.loop.domain, self.edges())
            if condition != sympy.true:
                body(f"if not ({python(condition, self.tile_numbers())}):")
                body("    continue")
        return head

    def tile_numbers(self) -> dict[str, str]:
        numbers = {name: str(n) for name, n in self.module.tiles().items()}
        return {**numbers, self.nest.serial: self.scope.ranges[self.nest.serial].at or ""}

    def rank_values(self, rank: str) -> str:
        """Values of a rank that the loop does not move are made before it."""
        if rank in self.made_ranks or rank in self.loop.coordinates or self.hoisted is None:
            return super().rank_values(rank)
        here, self.out = self.out, self.hoisted
        code = super().rank_values(rank)
        self.out = here
        return code

    def find_partial(self, body: _Lines) -> None:
        """One flag for each mask: whether this tile needs it."""
        predicates = dict.fromkeys(
            p for s in self.loop.body for p, used in ((s.row, s.fill is not None), (s.keep, s.mask_operand)) if used
        )
        for predicate in predicates:
            condition = certain(predicate, self.edges())
            if condition == sympy.false:
                continue
            flag = "partial" if not self.partial else f"partial{len(self.partial)}"
            body(f"{flag} = not ({python(condition, self.tile_numbers())})")
            self.partial[predicate] = flag

    # -- statements --

    def statements(self, statements: tuple[Statement, ...], keeps: tuple[str, ...]) -> None:
        carried = {state.new: state for state in self.loop.states} if keeps else {}
        for i, s in enumerate(statements):
            self.comment(s)
            states = {n for n in keeps if n != next((c.name for c in carried.values() if c.new == s.name), None)}
            later = {e.name for e in self.nest.epilogue} if keeps else set()
            self.scope.dead = self.gone(statements, i, {*states, *self.nest.outputs, *later})
            if not keeps and statements is self.loop.prologue:
                self.scope.dead = set()
            v = self.evaluate(s)
            if s.name in carried:
                state = carried[s.name]
                overwritten = not any(a.tensor == state.name for t in statements[i + 1 :] for a in t.reads)
                v = self.spread(v, self.scope.sort(state.ranks))
                self.define(s.name, v, state.ranks, self.scope.names[state.name].code if overwritten else None)
                continue
            output = s.name in self.nest.outputs
            read_later = any(a.tensor == s.name for t in (*statements[i + 1 :], *self.loop.epilogue) for a in t.reads)
            if output and not read_later:
                self.store(s.name, v, s.row)
                continue
            self.define(s.name, v, s.ranks)
            if s.fill is not None:
                self.fill(s, v)
            if output:
                local = self.scope.names[s.name]
                self.store(s.name, Value(local.code, local.ranks, v.kind), s.row)

    def fill(self, s: Statement, v: Value) -> None:
        assert s.fill is not None
        flag = self.partial.get(s.row)
        made = dict(self.made_ranks)
        if flag is not None:
            self.out(f"if {flag}:")
            self.out.depth += 1
        keep = self.mask(s.row)
        name = self.scope.names[s.name]
        if set(keep.ranks) <= set(name.ranks) and v.owned and v.kind == "f":
            negated = align(Value(f"~{keep.code}", keep.ranks, "b", prec=1), name.ranks)
            self.out(f"{name.code}.masked_fill_({negated}, {number(s.fill)})")
        else:
            masked = super().masked(Value(name.code, name.ranks, v.kind), s.row, s.fill)
            self.out(f"{name.code} = {masked.code}")
            self.scope.names[s.name] = replace(name, ranks=masked.ranks)
        if flag is not None:
            self.out.depth -= 1
            self.forget(made)

    def masked(self, v: Value, predicate: Boolean, fill: Expr) -> Value:
        """Under a flag, the operand is a variable first, so that a full tile pays nothing."""
        flag = self.partial.get(predicate)
        if flag is None:
            return super().masked(v, predicate, fill)
        made = dict(self.made_ranks)
        self.out(f"terms = {v.code}")
        self.out(f"if {flag}:")
        self.out.depth += 1
        masked = super().masked(Value("terms", v.ranks, v.kind), predicate, fill)
        if masked.ranks != v.ranks:
            raise Unsupported(f"a mask over {masked.ranks} on terms over {v.ranks}")
        self.out(f"terms = {masked.code}")
        self.out.depth -= 1
        self.forget(made)
        return Value("terms", v.ranks, masked.kind, True)

    def forget(self, made: dict[str, str]) -> None:
        """Coordinate values made under a condition are not there after it."""
        self.made_ranks = {r: v for r, v in self.made_ranks.items() if r in made or r not in self.loop.coordinates}

    def contract(self, c: Contraction, s: Statement) -> Value:
        """A contraction whose operand does not change in the loop has it prepared before."""
        if s.mask_operand or self.hoisted is None:
            return super().contract(c, s)
        outer, codes = c.outer, []
        for expr, prepare in ((c.left_expr, c.as_left), (c.right_expr, c.as_right)):
            if not self.invariant(expr):
                v = c.left(self.scope) if expr is c.left_expr else c.right(self.scope)
                codes.append(prepare(v).tight())
                continue
            here, self.out = self.out, self.hoisted
            v = c.left(self.scope) if expr is c.left_expr else c.right(self.scope)
            if outer != 1 and outer.is_number:
                v = Value(f"{v.tight(1)} * {number(outer)}", v.ranks, "f", True, 1)
                outer = sympy.Integer(1)
            text = prepare(v).code
            if text not in self.hoist_names:
                base = next((a.tensor for a in accesses(expr)), s.name)
                self.hoist_names[text] = f"{base}_tile{len(self.hoist_names) or ''}"
                self.out(f"{self.hoist_names[text]} = {text}")
            self.out = here
            codes.append(self.hoist_names[text])
        return self.scaled(c.product(codes[0], codes[1], self.scope, self.length), outer)

    def invariant(self, expr: Expr) -> bool:
        moving = {*self.loop.coordinates, self.nest.serial}
        local = {s.name for s in self.loop.body} | {s.name for s in self.loop.states}
        return not free_vars(expr) & moving and not any(a.tensor in local for a in accesses(expr))

    def place(self, rank: str) -> tuple[str, str | None]:
        inner = dict(self.loop.inner)
        if rank in inner:
            x = inner[rank]
            r = self.scope.ranges[x]
            return f":{r.hi} - {r.lo}", x
        return super().place(rank)
