"""A sum over programs in memory: float32, in the order in which products leave it in registers.

Comes in: which part of a tile of the sum a warpgroup adds to it (`Part`). Goes out: how its registers lie in memory,
the shape of the sum, and a kernel that rounds it to the result.

Of every 8 columns of a product a thread has two of one row and two of the row 8 below. In the order of rows and columns
it would store 8 bytes at a time, and the copy engine's swizzle puts those of two rows on the same banks of shared
memory: each store would take twice its time. Here it stores the four as 16 bytes, beside those of the next thread:

    [4 warps, 2, 8 rows, blocks of 8 columns, 4 threads, 2 columns] -> [blocks, warps, rows, threads, 2, columns]

No register moves for that, and a part is one run of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_text import function, paren, wrapped
from einscade.codegen.host import python
from einscade.ir.expr import Expr

__all__ = ["LINE", "Part"]

LINE = 32
"""Elements of a line of a part in memory: 128 bytes, the widest that the copy engine swizzles."""

_DTYPES = {"bf16": "gl.bfloat16", "f16": "gl.float16", "f32": "gl.float32"}


@dataclass(frozen=True)
class Part:
    """What each of `groups` warpgroups has of a tile of `step` rows: `rows` of them, by `columns` (a power of two, at
    least 8). They share the rows of a tile that has more, and else its columns."""

    step: int
    columns: int
    groups: int

    rows = GROUP_ROWS

    @property
    def lines(self) -> int:
        """A part in memory, in lines."""
        return self.rows * self.columns // LINE

    @property
    def layouts(self) -> list[str]:
        """The layouts of a part as a product's result and in shared memory."""
        return [
            f"PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {self.columns}, 16]))",
            "PART_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))",
        ]

    def store(self, tile: str, part: str) -> list[str]:
        """Lines that store a product's result in its tile of shared memory."""
        registers = f"{part}.reshape([4, 2, 8, {self.columns // 8}, 4, 2]).permute([3, 0, 2, 4, 1, 5])"
        return [
            f"{tile}._reinterpret(gl.float32, [{self.lines}, {LINE}], PART_TILE).store(",
            f"    {registers}.reshape([{self.lines}, {LINE}]))",
        ]

    def first_line(self, tile: str) -> str:
        """Where the part of the warpgroup `group` begins in memory."""
        return f"(({tile}) * {self.groups} + group) * {self.lines}"

    def shape(self, extents: tuple[Expr, ...]) -> str:
        """The shape of the sum, in whole tiles, for a result whose ranks but its width have these extents."""
        *batch, rows = map(python, extents)
        return ", ".join([*batch, f"-(-{paren(rows)} // {self.step}) * {self.groups * self.lines}", str(LINE)])

    def kernel(self, name: str, ranks: tuple[str, ...], width: int, number: Expr, dtype: str) -> str:
        """The kernel that rounds `number` times the sum to a result of these ranks and a last one, `width` wide: a part
        a program, read and written 16 bytes at a time."""
        size, across = self.rows * self.columns, self.columns // 8
        *batch, row = ranks
        below, beside = (f"group * {self.rows} + ", "") if self.step > self.rows else ("", f"group * {self.columns} + ")
        to = " + ".join(f"{r}_at.to(gl.int64) * result_{at}" for at, r in enumerate(ranks))
        lines = [
            '"""A part of a tile, rounded."""',
            "MEMORY: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])",
            f"LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [{32 // across}, {across}], [4, 1], [1, 0])",
            f"at = gl.program_id(0).to(gl.int64) * {size} + gl.arange(0, {size}, MEMORY)",
            f"total = (gl.load(x + at){'' if number == 1 else f' * {python(number)}'}).to({_DTYPES[dtype]})",
            f"total = total.reshape([{across}, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5])",
            f"total = gl.convert_layout(total.reshape([{self.rows}, {self.columns}]), LAYOUT)",
            f"group = gl.program_id(0) % {self.groups}",
            f"rest = gl.program_id(0) // {self.groups}",
            f"tiles = gl.cdiv({row}_extent, {self.step})",
            f"{row}_at = rest % tiles * {self.step} + {below}gl.arange(0, {self.rows}, gl.SliceLayout(1, LAYOUT))",
            f"column = {beside}gl.arange(0, {self.columns}, gl.SliceLayout(0, LAYOUT))",
            "rest = rest // tiles",
        ]
        for r in reversed(batch):
            lines += [f"{r}_at = rest % {r}_extent", f"rest = rest // {r}_extent"]
        lines += [
            f"to = result + ({to})[:, None] + (column * result_{len(ranks)})[None, :]",
            f"gl.store(to, total, mask=({row}_at < {row}_extent)[:, None] & (column < {width})[None, :])",
        ]
        extents = [f"{r}_extent" for r in ranks]
        results = [f"result_{i}" for i in range(len(ranks) + 1)]
        decorator = f"@gluon.jit(do_not_specialize={extents!r})"
        return function(name, ["x", "result", *results, *extents], lines, decorator)

    def launch(self, name: str, total: str, result: str, extents: tuple[Expr, ...]) -> list[str]:
        """The lines that fill the result, which is there, and has ranks of these extents and its width."""
        given = ", ".join([total, result, f"*{result}.stride()", *map(python, extents), "num_warps=4"]) + ","
        return [
            f"if {result}.numel():",
            f"    {name}[({total}.numel() // {self.rows * self.columns},)](",
            *wrapped(given, 8),
            "    )",
        ]
