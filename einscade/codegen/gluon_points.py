"""What a Gluon kernel computes point by point: the Einsums between its two products, and those after the loop.

Comes in: a `Plan`. Goes out: the function `weigh` as text, and the lines that follow the loop.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.codegen.gluon_form import Operand
from einscade.codegen.gluon_plan import GROUP_ROWS, Plan, distance
from einscade.codegen.gluon_text import function, indent
from einscade.codegen.gluon_values import Printer, Value
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, free_vars, var
from einscade.ir.text import print_einsum
from einscade.passes.domains import limits_apart, one_limit_a_side

__all__ = ["GLUON_DTYPES", "Points"]

GLUON_DTYPES = {"bf16": "gl.bfloat16", "f16": "gl.float16", "f32": "gl.float32"}


class Points(Plan):
    """The elementwise part of a module."""

    suffix = ""
    """What tells the functions of an iteration from those of others in one module."""

    columns_code = "gl.arange(0, STEP, COLUMN)"
    """The columns of a tile, from 0."""

    reductions = ""
    """What tells the reductions of a tile from those of others."""

    def _scalar_printer(self) -> Printer:
        """Prints what is the same for all of a program's points."""

        def refuse(access: Access, _: Printer) -> Value:
            raise Unsupported(f"{access} decides which tile is read")

        return Printer((self.shape.p, self.shape.m), {}, {}, refuse)

    def _coordinates(self, operand: Operand, row: str, column: str = "0") -> str:
        """Where a tile of an operand begins, as the copy engine counts."""
        printer = self._scalar_printer()
        index = {operand.row: row, operand.across: column} | {i: printer.value(x).code for i, x in operand.batch}
        return f"[{', '.join(index[i] for i in operand.order)}]"

    def _unravel(self, ranks: Sequence[str]) -> list[str]:
        """The lines that take `batch` apart, the last rank fastest."""
        names, lines, rest = self._scalar_printer(), [], "batch"
        for r in reversed(ranks[1:]):
            extent = names.value(self.shape.extent(r)).atom()
            lines += [f"{r} = {rest} % {extent}", f"batch = {rest} // {extent}"]
        return lines + ([f"{ranks[0]} = {rest}"] if ranks else [])

    def _printer(self, guard: str) -> Printer:
        shape = self.shape
        variables = {shape.p: Value(f"{shape.p}_", (shape.p,), "i"), shape.m: Value(f"{shape.m}_", (shape.m,), "i")}
        if self.offset:
            variables[self.offset] = Value(self.offset, (shape.m,), "i")
        return Printer((shape.p, shape.m), {}, variables, self._element, shape.dtype == "bf16", guard, used=self.used)

    def _element(self, access: Access, printer: Printer) -> Value:
        """A read by address: before the loop where nothing in it moves, else with the tile's points."""
        for x in self.loads:
            if x.access == access and x.name is not None and x.name in printer.names:
                return printer.names[x.name]
        for t in self.tables:
            if t.access == access and f"{t.name}_points" in printer.names:
                return printer.names[f"{t.name}_points"]
        for c in self.early_columns:
            if c.access == access and c.name in printer.names:
                return printer.names[c.name]
        code, ranks = self._address(access, printer), self._ranks(access, printer)
        dtype = self.dtype(access.tensor)
        if dtype == "bool":
            return Value(f"{code} != 0", ranks, "b")
        return Value(code, ranks, "i") if dtype[0] in "iu" else Value(f"{code}.to(gl.float32)", ranks)

    def _ranks(self, access: Access, printer: Printer) -> tuple[str, ...]:
        return printer.sort(*(printer.value(index) for index in access.index))

    def _address(self, access: Access, printer: Printer) -> str:
        """The load of an access by address, within the ends of the tile's ranks."""
        if (across := self._across(access, printer)) is not None:
            return across
        n = self.name(access.tensor)
        groups: dict[tuple[str, ...], list[str]] = {}
        for i, index in enumerate(access.index):
            v = printer.value(index)
            if v.code == "0":
                continue
            groups.setdefault(v.ranks, []).append(f"{v.atom()}.to(gl.int64) * {n}_{i}" if len(v.ranks) < 2 and not
                                                  v.code.isdigit() else f"{v.atom()} * {n}_{i}")  # fmt: skip
        ranks = printer.sort(*(Value("", r) for r in groups))
        address = n
        for r in sorted(groups, key=len):
            address = f"{address} + {printer.align(Value(' + '.join(groups[r]), r), ranks)}"
        inside = []
        if printer.inside is not None and set(printer.inside.ranks) <= set(ranks):
            inside.append(printer.align(printer.inside, ranks))
        if self.shape.p in ranks:
            limit = printer.value(self.shape.extent(self.shape.p)).code
            inside.append(printer.align(Value(f"{self.shape.p}_ < {limit}", (self.shape.p,)), ranks))
        if self.shape.m in ranks:
            assert self.shape.loop.limit is not None
            limit = printer.value(self.shape.loop.limit).code
            inside.append(printer.align(Value(f"{self.shape.m}_ < {limit}", (self.shape.m,)), ranks))
        inside += self._within(access, printer, ranks)
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        return f"gl.load({address}{mask})"

    def _within(self, access: Access, printer: Printer, ranks: tuple[str, ...]) -> list[str]:
        """That the read stays inside its tensor, where that is not known."""
        found = []
        for index, extent in self._may_leave(access):
            v, end = printer.value(index), printer.value(extent).code
            found.append(printer.align(Value(f"({v.atom()} >= 0) & ({v.atom()} < {end})", v.ranks), ranks))
        return found

    def _across(self, access: Access, printer: Printer) -> str | None:
        """The same of a table by distance, where the tile is one of scores; None of any other read."""
        p, m, n = self.shape.p, self.shape.m, self.name(access.tensor)
        found = distance(access, p, m)
        if found is None or printer.columns is None:
            return None
        at, a, b = found
        first, columns = printer.columns
        index = [printer.value(sympy.expand(x.xreplace({var(p): 0, var(m): var(first)}))) for x in access.index]
        others = [f"{v.atom()}.to(gl.int64) * {n}_{i}" if not v.code.isdigit() else f"{v.code} * {n}_{i}"
                  for i, v in enumerate(index) if i != at and v.code != "0"]  # fmt: skip
        inside = [printer.align(printer.inside, (p, m))] if printer.inside is not None else []
        rows, limit = self.shape.extent(p), self.shape.loop.limit
        assert limit is not None
        if not (rows.is_Integer and int(rows) % self.rows == 0):
            inside.append(f"({p}_ < {printer.value(rows).code})[:, None]")
        if not (printer.whole or (limit.is_Integer and int(limit) % self.columns == 0)):
            inside.append(f"({m}_ < {printer.value(limit).code})[None, :]")
        inside += self._within(access, printer, (p, m))
        mask = f", mask={' & '.join(inside)}, other=0" if inside else ""
        self.used.add("at_points")
        place = f"{' + '.join([n, *others])}, {index[at].code}, {p}_, {columns}, {a}, {b}, {n}_{at}"
        return f"gl.load(at_points({place}){mask})"

    def _weigh(self) -> str:
        """The Einsums between the two products, on one tile."""
        shape = self.shape
        masked = self._printer("finite")
        full = self._printer("finite" if shape.always_guard or not self._is_static() else "")
        full.whole = True
        for printer in (masked, full):
            printer.columns = f"{shape.m}_first", self.columns_code
            self._name_hoisted(printer)
            for c in self.early_columns:
                dtype = self.dtype(c.access.tensor)
                kind = "b" if dtype == "bool" else "i" if dtype[0] in "iu" else "f"
                code = {"b": f"{c.name} != 0", "i": c.name, "f": f"{c.name}.to(gl.float32)"}[kind]
                printer.names[c.name] = Value(code, (shape.m,), kind)
        lines = [
            '"""From a tile of scores to weights; the running values before it to those after it."""',
        ]
        m, p = shape.m, shape.p
        lines.append(f"{m}_ = {m}_first + {self.columns_code}")
        lines += [f"{self.offset} = gl.arange(0, STEP, COLUMN)"] if self.offset else []
        for printer in (masked, full):
            for state in shape.states:
                ranks = () if p not in state.ranks else (p,)
                printer.names[state.name] = Value(self.name(state.name), ranks)
            for score in shape.scores:
                printer.names[score] = Value(self.name(score), (p, m))
        for s in (*self.scores, *self.statements):
            lines += self._comment(s)
            lines += self._statement(s, masked, full)
        result = [self.name(s.new) for s in shape.states]
        for expr, name in self.rescale_names.items():
            codes = [full.value(expr).code, masked.value(expr).code]
            lines += self._both(*([f"{name} = {c}"] for c in codes))
            result.append(name)
        for weights in self.weight_names:
            value = full.names[weights].atom()
            result.append(f"gl.convert_layout({value}.to({GLUON_DTYPES[shape.dtype]}), WEIGHTS)")
        result += self._held()
        arguments = [*self._score_names(), *self._state_names(), f"{m}_first", *self._points(), *self._context()]
        lines += [*self._hold_within(), f"return {', '.join(result)}"]
        return function(f"weigh{self.suffix}", [*arguments, *self._masked_arguments()], lines)

    def _held(self) -> list[str]:
        """Points that waits for sums come behind."""
        return []

    def _hold_within(self) -> list[str]:
        """What the wait for sums comes behind, if that is no result of `weigh`."""
        return []

    def _points(self) -> list[str]:
        """The tiles of tables, and the columns, that have been read."""
        return [f"{t.name}_points" for t in self.tables] + [c.name for c in self.early_columns]

    def _name_hoisted(self, printer: Printer) -> None:
        for t in self.tables:
            flag = self.dtype(t.access.tensor) == "bool"
            code = f"{t.name}_points != 0" if flag else f"{t.name}_points.to(gl.float32)"
            printer.names[f"{t.name}_points"] = Value(code, (self.shape.p, self.shape.m), "b" if flag else "f")
        for x in self.loads:
            if x.name is None:
                continue
            dtype = self.dtype(x.access.tensor)
            kind = "b" if dtype == "bool" else "i" if dtype[0] in "iu" else "f"
            ranks = (self.shape.p,) if self.shape.p in free_vars(x.access) else ()
            printer.names[x.name] = Value(x.name, ranks, kind)

    def _statement(self, s: Statement, masked: Printer, full: Printer) -> list[str]:
        """A statement on a tile whose points all exist, and what is different on a tile across an edge."""
        name = self.name(s.name)
        shape = self.shape
        keep: list[str] = []
        tiles = {t.access for t in self.tables}
        addressed = {x.access for x in self.loads if x.name is None} - tiles
        if s.keep != sympy.true and not addressed.isdisjoint(accesses(s.expr)):
            keep = self._mask(masked, s.keep)  # an index may be out of bounds where no point exists
            masked.inside = masked.names["keep"]
        score = s in self.scores
        expr = Access(s.name, *map(var, s.ranks)) * self.factors[s.name] if score else s.expr
        v, other = full.value(expr), masked.value(expr)
        masked.inside = None
        split = s.name in {x.new for x in shape.states if x.name in shape.split}
        codes = [self._split_update(s, full)] * 2 if split else [v.code, other.code]
        lines = [[f"{name} = {c}"] if c != name else [] for c in codes]
        if s.monoid is not None and not score:
            lines, v = self._reduction(s, [replace(v, code=c) for c in codes], masked)
        kind = "f" if score else v.kind
        for printer in (masked, full):
            printer.names[s.name] = Value(name, v.ranks, kind)
        if s.fill is not None and self._masked_apart():
            for edge, limit in zip(self._masked_names(), limits_apart(s.row, shape.m) or (), strict=True):
                filled = [*self._mask(masked, limit), f"{name} = {self._filled(masked, masked.names[s.name], s.fill)}"]
                lines[0] += [f"if {edge}:", *indent(filled)]
            return lines[0]
        if s.fill is not None:
            mask = [] if keep and s.row == s.keep else self._mask(masked, s.row)
            lines[1] = [*lines[1], *mask, f"{name} = {self._filled(masked, masked.names[s.name], s.fill)}"]
        lines[1] = [*keep, *lines[1]]
        return self._both(*lines)

    def _both(self, full: list[str], masked: list[str]) -> list[str]:
        """Lines for full and for masked tiles, told apart only where they differ."""
        if full == masked:
            return full
        if masked[: len(full)] == full:
            return [*full, "if MASKED:", *indent(masked[len(full) :])]
        return ["if MASKED:", *indent(masked), "else:", *indent(full or ["pass"])]

    def _mask(self, printer: Printer, predicate: Boolean) -> list[str]:
        """The line that makes `keep`, where the predicate holds."""
        v = printer.value(one_limit_a_side(predicate, self.shape.m))
        printer.names["keep"] = Value("keep", v.ranks, "b")
        return [f"keep = {v.code}"]

    def _filled(self, printer: Printer, v: Value, fill: Expr) -> str:
        keep = printer.names["keep"]
        ranks = printer.sort(keep, v)
        value = printer.align(printer.floating(v), ranks)
        return f"gl.where({printer.align(keep, ranks)}, {value}, {printer.value(fill).code})"

    def _reduction(self, s: Statement, operands: list[Value], masked: Printer) -> tuple[list[list[str]], Value]:
        """A reduction along the tile; one that would notice missing points has them at its identity."""
        name = self.name(s.name)
        results = [self._reduced(s, v) for v in operands]
        lines = [[f"{name} = {code}"] for _, code in results]
        if s.mask_operand:
            identity = s.identity if s.identity is not None else sympy.Integer(0)
            keep = self._mask(masked, s.keep)
            filled = Value(self._filled(masked, operands[1], identity), (self.shape.p, self.shape.m))
            lines[1] = [*keep, f"{name} = {self._reduced(s, filled)[1]}"]
        return lines, results[0][0]

    def _is_split(self, new: str) -> bool:
        return any(x.new == new and x.name in self.shape.split for x in self.shape.states)

    def _split_update(self, s: Statement, printer: Printer) -> str:
        """The update of a sum that threads keep their parts of: factors of the rows meet the parts."""
        state = next(x for x in self.shape.states if x.new == s.name)
        before = Access(state.name, *map(var, state.ranks))
        expr = sympy.expand(s.expr)
        factor = expr.coeff(before)
        (part,) = accesses(expr - factor * before)
        name = self.name(state.name)
        added = self._part(name, self.name(part.tensor))
        if factor == 1:
            return f"{name} + {added}"
        row = printer.value(factor)
        spread = (
            f"gl.convert_layout({row.code}, gl.SliceLayout(1, {name}.type.layout))[:, None]"
            if row.ranks
            else row.atom()
        )
        return f"{name} * {spread} + {added}"

    def _part(self, name: str, part: str) -> str:
        """What is added to the parts that threads keep of a sum."""
        return part

    def _reduced(self, s: Statement, operand: Value) -> tuple[Value, str]:
        p, m = self.shape.p, self.shape.m
        code = operand.code if operand.kind == "f" else f"{operand.atom()}.to(gl.float32)"
        if operand.ranks != (p, m):
            zero = f"gl.full([{GROUP_ROWS}, STEP], 0.0, gl.float32, SCORES)"
            aligned = Printer((p, m), {}, {}, self._element).align(Value(code, operand.ranks), (p, m))
            code = f"{zero} + {aligned}"
        users = [x for x in self.statements if any(a.tensor == s.name for a in x.reads)]
        split = s.monoid == "sum" and len(users) == 1 and self._is_split(users[0].name)
        helper = "row_parts" if split else f"row_{s.monoid}"
        self.used.add(helper)
        if split or helper == "row_sum":
            self.used.add("row_parts")
        return Value(self.name(s.name), (p,)), f"{helper}{self.reductions}({code})"

    def _comment(self, s: Statement) -> list[str]:
        if s.source is None:
            return []
        lines = textwrap.wrap(print_einsum(s.source), 108, subsequent_indent="  ")
        return [f"# {line}" for line in lines]

    def _settle(self) -> list[str]:
        """The finished sums, as whatever reads them may have them."""
        self.used.add("settled")
        return [f"{name} = settled({name})" for name in self._sum_names()]

    def _after(self) -> list[str]:
        """The Einsums that follow the loop."""
        shape = self.shape
        p = shape.p
        names = {x.state.name: Value(self.name(x.state.name), (p, x.f)) for x in shape.sums}
        variables = {p: Value(f"{p}_", (p,), "i")}
        dims = (p, *dict.fromkeys(x.f for x in shape.sums))
        printer = Printer(dims, names, variables, self._element, shape.dtype == "bf16", "finite", used=self.used)
        self._name_hoisted(printer)
        lines = [f"{p}_ = gl.convert_layout({p}_, RESULT_ROW)"]
        lines += [f"{x.name} = gl.convert_layout({x.name}, RESULT_ROW)" for x in self.loads
                  if x.name is not None and p in free_vars(x.access) and self._read_after(x.access)]  # fmt: skip
        for state in shape.states:
            name = self.name(state.name)
            if any(a.tensor == state.name for s in self.epilogue for a in (*s.reads, *accesses(s.row))):
                whole = f"gl.sum({name}, axis=1)" if state.name in shape.split else name
                lines.append(f"{name} = gl.convert_layout({whole}, RESULT_ROW)")
            names[state.name] = Value(name, (p,))
        for s in self.epilogue:
            lines += self._comment(s)
            v = printer.floating(printer.value(s.expr))
            name, code = self.name(s.name), v.code
            if s.row != sympy.true:
                keep = printer.value(s.row)
                ranks = printer.sort(v, keep)
                code = f"gl.where({printer.align(keep, ranks)}, {printer.align(v, ranks)}, 0.0)"
            lines.append(f"{name} = {code}")
            names[s.name] = Value(name, v.ranks)
        for r in self._row_results():
            lines += self._store_row(r, printer)
        return lines

    def _store_addressed(self, x: Operand, to: str, printer: Printer) -> list[str]:
        """A tile of float32 results, by address."""
        p, t = self.shape.p, self.cascade.tensors[x.tensor]
        f = t.ranks[x.across]
        scalars = [f"{r}.to(gl.int64) * {to}_{i}" for i, r in enumerate(t.ranks) if i not in (x.row, x.across)]
        limit = printer.value(self.shape.extent(p)).code
        rows, columns = f"({p}_.to(gl.int64) * {to}_{x.row})[:, None]", f"({f}_ * {to}_{x.across})[None, :]"
        mask = f"({p}_ < {limit})[:, None]" + (f" & ({f}_ < {x.width})[None, :]" if x.width != self.f else "")
        return [
            f"{f}_ = gl.arange(0, {self.f}, gl.SliceLayout(0, RESULT))",
            f"gl.store({' + '.join([to, *scalars, rows, columns])}, {printer.names[x.tensor].code}, mask={mask})",
        ]

    def _read_after(self, access: Access) -> bool:
        return any(access in accesses(s.expr) + accesses(s.row) for s in self.epilogue)

    def _store_row(self, output: str, printer: Printer) -> list[str]:
        t = self.cascade.tensors[output]
        to = f"{self.name(output)}_to"
        p = self.shape.p
        for x in self.shape.addressed:
            if x.tensor == output:
                return self._store_addressed(x, to, printer)
        scalars = [f"{r}.to(gl.int64) * {to}_{i}" for i, r in enumerate(t.ranks) if r != p]
        limit = printer.value(self.shape.extent(p)).code
        where = " + ".join([to, *scalars, f"{p}_ * {to}_{t.ranks.index(p)}"])
        dtype = GLUON_DTYPES.get(t.dtype)
        if dtype is None:
            raise Unsupported(f"the output {output} is {t.dtype}")
        value = printer.names[output]
        code = value.code if value.ranks else f"gl.full([{GROUP_ROWS}], {value.code}, gl.float32, RESULT_ROW)"
        return [f"gl.store({where}, {code}.to({dtype}), mask={p}_ < {limit})"]
