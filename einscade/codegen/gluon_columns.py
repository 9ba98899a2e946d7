"""Columns: inputs that have one value for each column of a Gluon kernel's tile, read before its products are issued.

Comes in: a `Plan` with reads `X[.., m]` (numbers of documents, padding, a bias of the keys). Goes out: the text that
reads them. What is the run of a last dimension comes with the keys, by the copy engine; the rest by address, and what
only masks read only where a tile is masked.
"""

from __future__ import annotations

from einscade.codegen.gluon_places import Places
from einscade.codegen.gluon_plan import COLUMN_DTYPES, Column
from einscade.codegen.gluon_text import RUN_MAP, indent, paren
from einscade.codegen.gluon_values import Printer, Value

__all__ = ["Columns"]


class Columns(Places):
    """The columns' values of a module."""

    def _read_columns_early(self, masked: str) -> list[str]:
        """The reads of a tile's columns, as early as the tile is known."""
        m = self.shape.m
        printer = Printer((m,), {}, {m: Value(f"{m}_", (m,), "i")}, self._element, used=self.used)
        addressed = [c for c in self.early_columns if not c.size]
        always, masks = ([c for c in addressed if c.masks is x] for x in (False, True))
        lines = [f"{m}_ = {self._column()} + gl.arange(0, STEP, COLUMN)"] if addressed else []
        lines += [f"{c.name} = {self._address(c.access, printer)}" for c in always]
        if not masks or masked == "True":
            return lines + [f"{c.name} = {self._address(c.access, printer)}" for c in masks]
        nothing = [
            f"{c.name} = gl.full([STEP], 0, {COLUMN_DTYPES[self.dtype(c.access.tensor)]}, COLUMN)" for c in masks
        ]
        read = [f"{c.name} = {self._address(c.access, printer)}" for c in masks]
        return [*lines, f"if {masked}:", *indent(read), "else:", *indent(nothing)]

    def _run_dtype(self, c: Column) -> str:
        """What the ring holds: of booleans the bytes."""
        dtype = self.dtype(c.access.tensor)
        return "gl.uint8" if dtype == "bool" else COLUMN_DTYPES[dtype]

    def _run_words(self, dtype: str, count: str) -> tuple[str, str]:
        """As what and how many the copy engine brings so many values: those of 64 bits as two words each."""
        return ("gl.int32", f"2 * {paren(count)}") if dtype == "gl.int64" else (dtype, count)

    def _run_coordinates(self, c: Column, column: str) -> str:
        """Where a tile's values begin, as the copy engine counts: a vector is a matrix of one row."""
        printer = self._scalar_printer()
        others = [printer.value(x).code for x in c.access.index[:-1]] or ["0"]
        return f"[{', '.join([*others, self._run_words(self._run_dtype(c), column)[1]])}]"

    def _run_maps(self) -> list[str]:
        """On the host: the copy engine's views of the columns."""
        return [f"run_map({self.name(c.access.tensor)}, {self.columns}, 2)" for c in self.copied_columns]

    def _allocate_runs(self) -> list[str]:
        columns = self.copied_columns
        return [self._run_tiles(c.name, self._run_dtype(c), max(1, len(c.access.index) - 1)) for c in columns]

    def _run_tiles(self, name: str, dtype: str, others: int) -> str:
        """Shared memory for a tile's values in each stage; so many ranks come before the columns."""
        words, count = self._run_words(dtype, "STEP")
        block = f"[STAGES, {'1, ' * others}{count}]"
        return f"{name}_tiles = gl.allocate_shared_memory({words}, {block}, {name}_map.layout)"

    def _read_columns_copied(self, stage: str) -> list[str]:
        """A tile's columns from a stage whose keys have arrived."""
        return [
            f"{c.name} = {c.name}_tiles.index({stage})._reinterpret({self._run_dtype(c)}, [STEP], RUN).load(COLUMN)"
            for c in self.copied_columns
        ]

    def _run_layouts(self) -> list[str]:
        return ["RUN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))"] if self.copied_columns else []

    def _maps(self) -> list[str]:
        """The function that makes the copy engine's views of them."""
        return [RUN_MAP.strip("\n")] if self.copied_columns else []
