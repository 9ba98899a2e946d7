"""Small sums as kernels that read their operands once and hold nothing in memory.

Comes in: an Einsum that stands alone before or behind a loop. Goes out: the text of a kernel and of its launch, for

    RowSum:    S[b,p] = sum(d) X[b,p,d] * Y[b,p,d]            a gradient's statistic of its rows
    SliceSum:  K[b,g,m,e] = sum(n) X[b,4*g + n,m,e]           the gradients of the heads of a group

`row_sum` and `slice_sum` return None for what is not of this form. As torch operations the first takes a float32 copy
of every operand, the second one of its result. A row sum in front of a sum over programs (`gluon_spread`) of the same
rows sets that to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from einscade.codegen.gluon_text import allocated, function, wrapped
from einscade.codegen.host import python
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Access, Expr, free_vars, var

__all__ = ["RowSum", "SliceSum", "Zeros", "row_sum", "slice_sum"]

ROWS = 32
"""Rows of a program: with 16 bytes a load and four warps, two to eight loads of a thread are on their way at once."""

Zeros = Mapping[str, tuple[str, str]]
"""What is set to zero: names, with shape and dtype as the host's text has them."""

WIDEST = 512
DTYPES = ("bf16", "f16", "f32")
_DTYPES = {"bf16": "gl.bfloat16", "f16": "gl.float16", "f32": "gl.float32"}

MOST_SLICES = 64
"""More would make a long kernel, of which each load is a line."""


@dataclass(frozen=True)
class RowSum:
    """`name[rows] = number * sum(d) product of the tensors at [*rows, d]`."""

    name: str
    rows: tuple[tuple[str, Expr], ...]
    tensors: tuple[tuple[str, tuple[str, ...]], ...]
    number: Expr
    across: str
    width: int

    def kernel(self, name: str, zeros: Zeros) -> str:
        """The kernel, whose rows are counted through all of their ranks. Beside that it sets `zeros` to zero."""
        lines = _places(self.rows, self.width)
        factors = []
        for i, (_, index) in enumerate(self.tensors):
            own = " + ".join(f"{r}_at.to(gl.int64) * x{i}_{at}" for at, r in enumerate(index) if r != self.across)
            along = f"column * x{i}_{index.index(self.across)}"
            lines.append(f"at = ({own})[:, None] + ({along})[None, :]")
            lines.append(f"y{i} = gl.load(x{i} + at, mask=inside, other=0).to(gl.float32)")
            factors.append(f"y{i}")
        total = f"gl.sum({' * '.join(factors)}, axis=1)"
        number = "" if self.number == 1 else f" * {python(self.number)}"
        lines += self._clear(zeros)
        lines.append(f"gl.store(result + row, {total}{number}, mask=row < rows)")
        extents = [f"{r}_extent" for r, _ in self.rows[1:]]
        arguments = [a for i, (_, index) in enumerate(self.tensors) for a in (f"x{i}", *_strides(i, len(index)))]
        decorator = f"@gluon.jit(do_not_specialize={['rows', *extents]!r})"
        cleared = [a for x in zeros for a in (x, f"{x}_size")]
        return function(name, [*arguments, "result", *cleared, "rows", *extents], lines, decorator)

    def _clear(self, zeros: Zeros) -> list[str]:
        """The lines that set a program's share of each to zero, while what it reads is on its way."""
        share = ROWS * _padded(self.width)
        step = f"gl.num_programs(0).to(gl.int64) * {share}"
        lines = ["ZEROS: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])"] if zeros else []
        for x, (_, dtype) in zeros.items():
            lines += [
                f"for first in range(gl.program_id(0).to(gl.int64) * {share}, {x}_size, {step}):",
                f"    place = first + gl.arange(0, {share}, ZEROS)",
                f"    gl.store({x} + place, gl.full([{share}], 0, gl.{dtype}, ZEROS), mask=place < {x}_size)",
            ]
        return lines

    def launch(self, name: str, result: str, codes: Mapping[str, str], device: str, zeros: Zeros) -> list[str]:
        """The lines that make the result and `zeros`; `codes` are the tensors in the host's text."""
        extents = [python(n) for _, n in self.rows]
        given = [f"{codes[t]}, *{codes[t]}.stride()" for t, _ in self.tensors]
        cleared = [f"{x}, {x}.numel()" for x in zeros]
        return [
            allocated(result, "empty", ", ".join(extents), "float32", device),
            *(allocated(x, "empty", *what, device) for x, what in zeros.items()),
            f"if {result}.numel():",
            f"    {name}[(-(-{result}.numel() // {ROWS}),)](",
            *wrapped(", ".join([*given, result, *cleared, f"{result}.numel()", *extents[1:], "num_warps=4"]) + ",", 8),
            "    )",
        ]


@dataclass(frozen=True)
class SliceSum:
    """`name[rows, across] = number * sum(n) tensor[index]`, the index affine in all of them: for each dimension of the
    tensor the factor of each rank, and a constant under None."""

    name: str
    rows: tuple[tuple[str, Expr], ...]
    across: str
    width: int
    tensor: str
    index: tuple[tuple[tuple[str | None, int], ...], ...]
    summed: str
    count: int
    number: Expr
    dtype: str

    def kernel(self, name: str) -> str:
        """The kernel, whose rows are counted through all of their ranks."""
        lines = _places(self.rows, self.width)
        own, along, slices = [], [], []
        for at, terms in enumerate(self.index):
            for r, factor in terms:
                scaled = f"x_{at}" if factor == 1 else f"{factor} * x_{at}"
                if r == self.across:
                    along.append(f"column * {scaled}")
                elif r == self.summed:
                    slices.append(scaled)
                else:
                    own.append(f"{r}_at.to(gl.int64) * {scaled}" if r is not None else scaled)
        ranks = [r for r, _ in self.rows]
        to = " + ".join(f"{r}_at.to(gl.int64) * result_{at}" for at, r in enumerate(ranks))
        number = "" if self.number == 1 else f" * {python(self.number)}"
        lines += [
            f"at = x + ({' + '.join(own)})[:, None] + ({' + '.join(along)})[None, :]",
            "total = gl.load(at, mask=inside, other=0).to(gl.float32)",
        ]
        if self.count > 1:
            lines += [
                f"for n in gl.static_range(1, {self.count}):",
                f"    at += {' + '.join(slices)}",
                "    total += gl.load(at, mask=inside, other=0).to(gl.float32)",
            ]
        lines += [
            f"to = result + ({to})[:, None] + (column * result_{len(ranks)})[None, :]",
            f"gl.store(to, (total{number}).to({_DTYPES[self.dtype]}), mask=inside)",
        ]
        extents = [f"{r}_extent" for r in ranks[1:]]
        strides = [f"x_{i}" for i in range(len(self.index))]
        results = [f"result_{i}" for i in range(len(ranks) + 1)]
        decorator = f"@gluon.jit(do_not_specialize={['rows', *extents]!r})"
        return function(name, ["x", *strides, "result", *results, "rows", *extents], lines, decorator)

    def launch(self, name: str, result: str, code: str) -> list[str]:
        """The lines that fill the result, which is there; `code` is the tensor in the host's text."""
        rows = [f"{result}.numel() // {self.width}", *(python(n) for _, n in self.rows[1:])]
        given = ", ".join([f"{code}, *{code}.stride(), {result}, *{result}.stride()", *rows, "num_warps=4"]) + ","
        return [
            f"if {result}.numel():",
            f"    {name}[(-(-{result}.numel() // {self.width * ROWS}),)](",
            *wrapped(given, 8),
            "    )",
        ]


def _padded(width: int) -> int:
    return max(8, 1 << (width - 1).bit_length())


def _places(ranks: tuple[tuple[str, Expr], ...], width: int) -> list[str]:
    """The first lines of a kernel: which rows, by the ranks that they are counted through, and columns it has."""
    padded = _padded(width)
    threads = min(32, padded // 8)
    lines = [
        f'"""{ROWS} of the rows, in float32."""',
        f"LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [{32 // threads}, {threads}], [4, 1], [1, 0])",
        f"row = gl.program_id(0) * {ROWS} + gl.arange(0, {ROWS}, gl.SliceLayout(1, LAYOUT))",
        f"column = gl.arange(0, {padded}, gl.SliceLayout(0, LAYOUT))",
        "rest = row",
    ]
    for r, _ in reversed(ranks[1:]):
        lines += [f"{r}_at = rest % {r}_extent", f"rest = rest // {r}_extent"]
    lines.append(f"{ranks[0][0]}_at = rest")
    lines.append(f"inside = (row < rows)[:, None] & (column < {width})[None, :]")
    return lines


def slice_sum(cascade: Cascade, e: Einsum) -> SliceSum | None:
    """An Einsum as a `SliceSum`; None where it is none."""
    if e.reduce is None or e.reduce.monoid != "sum" or len(e.reduce.ranks) != 1 or e.scan or e.domain != sympy.true:
        return None
    (summed,) = e.reduce.ranks
    number, x = e.expr.as_coeff_Mul()
    if not isinstance(x, Access) or len(e.output.ranks) < 2 or e.output.dtype not in _DTYPES:
        return None
    *rows, across = e.output.ranks
    count, width, t = cascade.extent(summed), cascade.extent(across), cascade.tensors[x.tensor]
    small = count.is_Integer and 1 <= int(count) <= MOST_SLICES and width.is_Integer and 8 <= int(width) <= WIDEST
    if not small or t.dtype not in DTYPES or t.layout.kind != "dense":
        return None
    index = []
    for i in x.index:
        terms: list[tuple[str | None, int]] = []
        rest = sympy.expand(i)
        for r in sorted(free_vars(i)):
            factor = rest.coeff(var(r))
            rest = rest - factor * var(r)
            if r not in (*rows, across, summed) or not factor.is_Integer:
                return None
            terms.append((r, int(factor)))
        if not rest.is_Integer:
            return None
        index.append(tuple(terms) + (((None, int(rest)),) if rest != 0 else ()))
    read = {r for terms in index for r, _ in terms}
    if not {*rows, across, summed} <= read:
        return None
    extents = tuple((r, cascade.extent(r)) for r in rows)
    return SliceSum(
        e.name, extents, across, int(width), t.name, tuple(index), summed, int(count), number, e.output.dtype
    )


def _strides(i: int, dimensions: int) -> list[str]:
    return [f"x{i}_{at}" for at in range(dimensions)]


def row_sum(cascade: Cascade, e: Einsum) -> RowSum | None:
    """An Einsum as a `RowSum`; None where it is none."""
    if e.reduce is None or e.reduce.monoid != "sum" or len(e.reduce.ranks) != 1 or e.scan or e.domain != sympy.true:
        return None
    (across,) = e.reduce.ranks
    width = cascade.extent(across)
    number, product = e.expr.as_coeff_Mul()
    factors = [x for f in sympy.Mul.make_args(product) for x in _repeated(f)]
    if not width.is_Integer or not 8 <= int(width) <= WIDEST or not all(isinstance(x, Access) for x in factors):
        return None
    tensors = []
    ranks = e.output.ranks
    for x in factors:
        t = cascade.tensors[x.tensor]
        index = tuple(map(str, x.index))
        plain = x.index == tuple(map(var, index)) and set(index) <= {*ranks, across} and across in index
        if not plain or len(index) < 2 or t.dtype not in DTYPES or t.layout.kind != "dense":
            return None
        tensors.append((t.name, index))
    if not ranks or set(ranks) - {r for _, index in tensors for r in index}:
        return None
    rows = tuple((r, cascade.extent(r)) for r in ranks)
    return RowSum(e.name, rows, tuple(tensors), number, across, int(width))


def _repeated(factor: Expr) -> list[Expr]:
    square = isinstance(factor, sympy.Pow) and factor.exp == 2
    return [factor.base, factor.base] if square else [factor]
