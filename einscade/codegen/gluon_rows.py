"""Sums of products along a row, `S[b,p] = sum(d) X[b,p,d] * Y[b,p,d]`, as a kernel that reads its operands once.

Comes in: an Einsum that stands alone between two loops (a gradient's statistic of its rows). Goes out: a `RowSum`, the
text of a kernel and of its launch; `row_sum` returns None for what is not of this form. As torch operations the same
takes a float32 copy of every operand.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from einscade.codegen.gluon_text import function, wrapped
from einscade.codegen.torch_values import python
from einscade.ir.cascade import Cascade, Einsum
from einscade.ir.expr import Access, Expr, var

__all__ = ["RowSum", "row_sum"]

ROWS = 32
"""Rows of a program: with 16 bytes a load and four warps, two to eight loads of a thread are on their way at once."""

WIDEST = 512
DTYPES = ("bf16", "f16", "f32")


@dataclass(frozen=True)
class RowSum:
    """`name[rows] = number * sum(d) product of the tensors at [*rows, d]`."""

    name: str
    rows: tuple[tuple[str, Expr], ...]
    tensors: tuple[tuple[str, tuple[str, ...]], ...]
    number: Expr
    across: str
    width: int

    def kernel(self, name: str) -> str:
        """The kernel, whose rows are counted through all of their ranks."""
        padded = max(8, 1 << (self.width - 1).bit_length())
        threads = min(32, padded // 8)
        lines = [
            f'"""{ROWS} of the rows, in float32."""',
            f"LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [{32 // threads}, {threads}], [4, 1], [1, 0])",
            f"row = gl.program_id(0) * {ROWS} + gl.arange(0, {ROWS}, gl.SliceLayout(1, LAYOUT))",
            f"column = gl.arange(0, {padded}, gl.SliceLayout(0, LAYOUT))",
            "rest = row",
        ]
        for r, _ in reversed(self.rows[1:]):
            lines += [f"{r}_at = rest % {r}_extent", f"rest = rest // {r}_extent"]
        lines.append(f"{self.rows[0][0]}_at = rest")
        lines.append(f"inside = (row < rows)[:, None] & (column < {self.width})[None, :]")
        factors = []
        for i, (_, index) in enumerate(self.tensors):
            own = " + ".join(f"{r}_at.to(gl.int64) * x{i}_{at}" for at, r in enumerate(index) if r != self.across)
            along = f"column * x{i}_{index.index(self.across)}"
            lines.append(f"at = ({own})[:, None] + ({along})[None, :]")
            lines.append(f"y{i} = gl.load(x{i} + at, mask=inside, other=0).to(gl.float32)")
            factors.append(f"y{i}")
        total = f"gl.sum({' * '.join(factors)}, axis=1)"
        number = "" if self.number == 1 else f" * {python(self.number)}"
        lines.append(f"gl.store(result + row, {total}{number}, mask=row < rows)")
        extents = [f"{r}_extent" for r, _ in self.rows[1:]]
        arguments = [a for i, (_, index) in enumerate(self.tensors) for a in (f"x{i}", *_strides(i, len(index)))]
        decorator = f"@gluon.jit(do_not_specialize={['rows', *extents]!r})"
        return function(name, [*arguments, "result", "rows", *extents], lines, decorator)

    def launch(self, name: str, result: str, codes: dict[str, str], device: str) -> list[str]:
        """The lines that make the result; `codes` are the tensors in the host's text."""
        extents = [python(n) for _, n in self.rows]
        given = [f"{codes[t]}, *{codes[t]}.stride()" for t, _ in self.tensors]
        comma = "," if len(extents) == 1 else ""
        return [
            f"{result} = torch.empty(({', '.join(extents)}{comma}), dtype=torch.float32, device={device})",
            f"if {result}.numel():",
            f"    {name}[(-(-{result}.numel() // {ROWS}),)](",
            *wrapped(", ".join([*given, result, f"{result}.numel()", *extents[1:], "num_warps=4"]) + ",", 8),
            "    )",
        ]


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
