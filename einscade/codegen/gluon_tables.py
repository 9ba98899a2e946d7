"""Tables: inputs that a Gluon kernel reads at every point, brought by the copy engine a tile at a time.

Comes in: a `Plan` with reads `T[.., p, m]`. Goes out: the text of their ring: what the loading warp copies, and a
function for each that gives a warpgroup its tile in the layout of the scores. Whether the copy engine can read a tensor
(aligned, its last dimension contiguous) is known when a kernel is launched: `T_COPIED` says so, and the same function
reads by address where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

from einscade.codegen.gluon_columns import Columns
from einscade.codegen.gluon_plan import GROUP_ROWS, Column, Table
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_text import TABLE_MAP, function, indent
from einscade.codegen.gluon_values import Printer, Value

__all__ = ["Tables"]


class Tables(Columns):
    """The tables of a module."""

    def _runs_and_tables(self) -> tuple[Column | Table, ...]:
        return (*self.copied_columns, *self.tables)

    def _maps(self) -> list[str]:
        """The functions that make the copy engine's views of them."""
        return ([TABLE_MAP.strip("\n")] if self.tables else []) + super()._maps()

    def _table_flags(self) -> list[str]:
        return [f"{t.name}_COPIED" for t in self.tables]

    def _table_constants(self) -> list[str]:
        """The flags as parameters of a function."""
        return [f"{flag}: gl.constexpr" for flag in self._table_flags()]

    def _table_rings(self) -> list[str]:
        return [x for t in self.tables for x in (f"{t.name}_tiles", f"{t.name}_full", f"{t.name}_empty")]

    def _table_pointers(self) -> list[str]:
        return [a for t in dict.fromkeys(t.operand.tensor for t in self.tables) for a in self._pointer(t, self.name(t))]

    def _table_arguments(self, present: Sequence[str]) -> list[str]:
        """What reading the tables takes, besides what is present."""
        wanted = dict.fromkeys([*self._table_rings(), *self._table_pointers()])
        return [x for x in wanted if x not in present]

    def _table_block(self, t: Table) -> list[int]:
        return [1] * len(t.operand.batch) + [GROUP_ROWS, self.columns]

    def _copy_tables(self, column: str, stage: str, phase: str | None = None) -> list[str]:
        """The tables' tiles at a column to their places, after what was there has been read (None: nothing was)."""
        lines = []
        for t in self.tables:
            at = self._coordinates(t.operand, f"row + group * {GROUP_ROWS}", column)
            here, full = f"{t.name}_tiles.index({stage} * GROUPS + group)", f"{t.name}_full.index({stage})"
            lines += [
                f"if {t.name}_COPIED:",
                *([f"    mbarrier.wait({t.name}_empty.index({stage}), {phase})"] if phase is not None else []),
                f"    mbarrier.expect({full}, GROUPS * {t.name}_map.block_type.nbytes)",
                "    for group in gl.static_range(GROUPS):",
                f"        at = {at}",
                f"        tma.async_copy_global_to_shared({t.name}_map, at, {full}, {here})",
            ]
        return lines

    def _read_tables(self, stage: str, phase: str) -> list[str]:
        """A warpgroup's tiles of the tables."""
        lines = []
        for t in self.tables:
            arguments = [*self._reading_arguments(t), stage, phase, self._column(), f"{t.name}_COPIED", "group"]
            lines.append(f"{t.name}_points = read_{t.name}({', '.join(arguments)})")
        return lines

    def _reading_arguments(self, t: Table) -> list[str]:
        rings = [f"{t.name}_tiles", f"{t.name}_full", f"{t.name}_empty"]
        pointers = self._pointer(t.operand.tensor, self.name(t.operand.tensor))
        return [*rings, *pointers, f"{self.shape.p}_", *self.shape.batch, *self.sizes]

    def _reader(self, t: Table) -> str:
        """The function that reads a tile of a table."""
        p, m = self.shape.p, self.shape.m
        points = {p: Value(f"{p}_", (p,), "i"), m: Value(f"{m}_", (m,), "i")}
        address = self._address(t.access, Printer((p, m), {}, points, self._element, used=self.used))
        view = f"_reinterpret({self._table_dtype(t)}, [{GROUP_ROWS}, STEP], {self._table_layout(t)})"
        tensor = self.name(t.operand.tensor)
        lines = [
            f'"""A tile of {tensor} as the scores lie: from the ring, or by address where nothing was copied."""',
            f"if {t.name}_COPIED:",
            f"    mbarrier.wait({t.name}_full.index(stage), phase)",
            f"    {t.name}_points = {t.name}_tiles.index(stage * GROUPS + group).{view}.load(SCORES)",
            f"    mbarrier.arrive({t.name}_empty.index(stage))",
            "else:",
            f"    {m}_ = {m}_first + gl.arange(0, STEP, COLUMN)",
            f"    {t.name}_points = {address}",
            f"return {t.name}_points",
        ]
        constants = ["stage", "phase", f"{m}_first", f"{t.name}_COPIED: gl.constexpr", "group: gl.constexpr"]
        return function(f"read_{t.name}", [*self._reading_arguments(t), *constants], lines)

    def _table_dtype(self, t: Table) -> str:
        """What the ring holds: of booleans the bytes."""
        dtype = self.dtype(t.operand.tensor)
        return "gl.uint8" if dtype == "bool" else GLUON_DTYPES[dtype]

    def _table_layout(self, t: Table) -> str:
        return f"TABLE_{8 * t.size}"

    def _table_layouts(self) -> list[str]:
        return self._run_layouts() + [
            f"TABLE_{8 * size} = gl.constexpr(gl.NVMMASharedLayout({min(128, self.columns * size)}, {8 * size}, 2))"
            for size in sorted({t.size for t in self.tables})
        ]

    def _allocate_tables(self) -> list[str]:
        """The rings; where nothing is copied, none."""
        lines = self._allocate_runs()
        for t in self.tables:
            dtype = self._table_dtype(t)
            block = ", ".join(map(str, self._table_block(t)))
            lines += [
                f"{t.name}_tiles = {self.name(t.operand.tensor)}",
                f"if {t.name}_COPIED:",
                f"    {t.name}_tiles = gl.allocate_shared_memory({dtype}, [STAGES * GROUPS, {block}], "
                f"{t.name}_map.layout)",
            ]
            for b in (f"{t.name}_full", f"{t.name}_empty"):
                lines.append(f"{b} = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())")
        return lines

    def _prepare_tables(self) -> list[str]:
        """On the host: what the kernel gets of each table, and whether it can be copied."""
        lines = []
        for t in self.tables:
            seen = self._seen(t.operand) + (".view(torch.uint8)" if self.dtype(t.operand.tensor) == "bool" else "")
            lines.append(f"{t.name}_map, {t.name}_COPIED = table_map({seen}, {GROUP_ROWS}, {self.columns})")
        return lines

    def _init_tables(self) -> list[str]:
        return indent(
            f"mbarrier.init({t.name}_{b}.index(stage), {n})"
            for t in self.tables
            for b, n in (("full", "1"), ("empty", "GROUPS"))
        )
