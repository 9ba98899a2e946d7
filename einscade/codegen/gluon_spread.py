"""Two loops over the same points as one: what the second sums over the first one's programs is added up in memory.

Comes in: two forms of a program. Where the rows of one are the loop of the other and both have the same weights, the
other's sum over its loop is a sum over this one's rows,

    other:  sum[q] += weights[q, r] * values[r]        a loop over r, for rows q
    here:   sum[q] += weights[r, q].T @ values[r]      for every q of the loop over q, from all programs' rows r

(in a gradient dQ, of which every program of dK and dV knows its keys' part). Goes out: a `Spread` that says so, and
`SpreadChain`, the kernel of both. It saves the products that the weights are made of; the price is a float32 sum in
memory, to which programs add in whatever order they come, so that its last bits differ from run to run.

In the kernel an iteration's weights go to shared memory, transposed, and every warpgroup multiplies its part of the
tile in the *next* iteration: nobody waits for the slower warpgroup, and the addition, which the copy engine does, runs
behind the next scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import sympy
from sympy.logic.boolalg import And

from einscade.codegen.gluon_chain import Chain, Iteration
from einscade.codegen.gluon_form import Form, Operand, WeightedSum
from einscade.codegen.gluon_plan import GROUP_ROWS, REGISTERS, Ring
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_sum import LINE, Part
from einscade.codegen.gluon_text import allocated, indent
from einscade.codegen.gluon_values import Printer
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Access, Expr, accesses, free_vars, var
from einscade.passes.terms import conjuncts

__all__ = ["ADD_TILE", "ARRIVE", "Spread", "SpreadChain", "spread"]

ADD_TILE = '''
@builtin
def add_tile(target, at, tile, _semantic=None):
    """The copy engine adds a tile of shared memory to one in memory."""
    at = _semantic._convert_to_ir_values(at, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, target.handle, at, tile.handle)
'''

ARRIVE = "mbarrier.arrive(others_full.index(iteration % 2))"
"""The weights of an iteration are made, and its part of those before is multiplied."""

FENCE = "fence_async_shared()"
"""The copy engine and products see what this warpgroup has stored. It takes as long as the stores do, and best stands
where products run that nobody waits for yet."""

PANEL = 64
"""Columns of 16 bits in a row of swizzled shared memory: what a product reads begins at a multiple."""


@dataclass(frozen=True)
class Spread:
    """`result = number * sum(rows) weights.T @ values`: `weights` are those of one of the form's sums, `values` an
    operand that stays, `result` a tensor with rows along the form's loop."""

    weights: str
    values: Operand
    result: Operand
    number: Expr


def spread(other: Form, form: Form) -> Spread | None:
    """The one sum of another form as a sum over this one's programs; None where it is none."""
    if (other.p, other.m) != (form.m, form.p) or set(other.batch) != set(form.batch):
        return None
    if len(other.sums) != 1 or other.states or len(other.epilogue) != 1 or len(other.written) != 1 or other.addressed:
        return None
    (total,), (after,) = other.sums, other.epilogue
    if total.weights in other.scores:  # a product with nothing after it, which could mask points beyond the last row
        return None
    if total.rescale is not None or after.expr != Access(total.state.name, *map(var, total.state.ranks)):
        return None
    if other.results != (other.written[0].tensor,) or total.values not in form.stills:
        return None
    wanted = _value(other, total.weights)
    for x in form.sums:
        found = None if x.weights in form.scores else _value(form, x.weights)
        if wanted is None or found is None or _domain(form, x.weights) != _domain(other, total.weights):
            continue
        (number, rest), (own, same) = wanted.as_coeff_Mul(), found.as_coeff_Mul()
        if rest == same:
            return Spread(x.weights, total.values, other.written[0], number / own)
    return None


def _value(form: Form, name: str) -> Expr | None:
    """A value of the loop as an expression over inputs; None where it takes a reduction other than the products."""
    made = {s.name: s for s in (*(x.score for x in form.products), *form.statements)}
    s = made[name]
    if s.monoid is not None and name not in form.scores:
        return None
    table: dict[Expr, Expr] = {}
    for a in accesses(s.expr):
        if a.tensor in made:
            value = _value(form, a.tensor)
            if value is None or a.index != tuple(map(var, made[a.tensor].ranks)):
                return None
            table[a] = value
        elif any(a.tensor == state.name for state in form.states):
            return None
    expr = s.expr.xreplace(table)
    return sympy.Function("total")(expr) if name in form.scores else expr


def _domain(form: Form, name: str) -> frozenset[sympy.Basic]:
    """Which points a value has, but for the end of the loop."""
    made = {s.name: s for s in form.statements}
    limit = sympy.Lt(var(form.m), form.loop.limit)
    return frozenset(c for c in conjuncts(made[name].keep) if c != limit)


def _within_rows(form: Form, spread: Spread) -> Form:
    """The form, with points of missing rows and beyond the last one masked where others are: their weights would
    count. A condition of whole rows is else asked of results alone."""
    inside = sympy.Lt(var(form.p), form.extent(form.p))
    rows = (c for c in _domain(form, spread.weights) if form.m not in free_vars(c))

    def bounded(s: Statement) -> Statement:
        masked = {form.p, form.m} <= set(s.ranks) and s.fill is not None
        return replace(s, keep=And(s.keep, inside), row=And(s.row, inside)) if masked else s

    return replace(form, statements=tuple(map(bounded, form.statements)), keep=And(form.keep, *rows))


class SpreadChain(Chain):
    """The kernel of a form with a sum of its programs. The tensor of that sum, in memory as `Part` has it whatever the
    result's order, has the result's name and `_sum`."""

    spilled = 16

    def __init__(self, shape: Form, schedule: Schedule, spread: Spread, cleared: bool = False) -> None:
        """`cleared`: a kernel in front has set `zeros` to zero."""
        self.spread, self.cleared = spread, cleared
        super().__init__(_within_rows(shape, spread), schedule)

    # -- sizes and names --

    @cached_property
    def kept(self) -> Ring:
        """The operand that the sum multiplies."""
        return next(r for r in self.stills if r.operand == self.spread.values)

    def _place_before(self, group: int) -> str:
        """Where the iteration before had a warpgroup's rows of it."""
        return str(group)

    @cached_property
    def part(self) -> Part:
        """What a warpgroup multiplies of the sum's tile: all rows of the tile if there are 64, and a part of the
        columns."""
        width = self.kept.width
        down = max(1, self.columns // GROUP_ROWS)
        if self.columns % GROUP_ROWS or self.groups % down:
            raise Unsupported(f"{self.groups} warpgroups do not share a tile of {self.columns} rows")
        across = width * down // self.groups
        if across * self.groups != width * down or (across != width and across % PANEL):
            raise Unsupported(f"{self.groups} warpgroups do not share a tile {width} wide")
        return Part(self.columns, across, self.groups)

    @property
    def total(self) -> str:
        return f"{self.name(self.spread.result.tensor)}_sum"

    @property
    def number(self) -> Expr:
        """What multiplies the sum after all."""
        own = next(x for x in self.shape.sums if x.weights == self.spread.weights)
        return self.spread.number * self.scaled[1].get(own.state.name, sympy.Integer(1))

    def _check_fit(self) -> None:
        super()._check_fit()
        across = self.part.columns
        tiles = self.stages * self.columns * sum(r.width for r in self.rings) * 2
        tiles += self.rows * sum(r.width * self._slots(r) for r in self.stills) * 2 + 2 * self.rows * self.columns * 2
        tiles += self.groups * GROUP_ROWS * across * 4 + self.stages * self.columns * sum(t.size for t in self.tables)
        if len(self.shares) < len(self.shape.written) or tiles + 1024 > self.shared:
            raise Unsupported(f"{tiles} bytes of tiles do not fit in {self.shared} bytes of shared memory")
        registers = len(self.shape.sums) * self.f // 2 + across // 2 + self.columns // 2 + 24
        if registers > REGISTERS[self.groups]:
            raise Unsupported(f"a part of {across} columns does not fit in {REGISTERS[self.groups]} registers")

    def _table_layouts(self) -> list[str]:
        others = "OTHERS = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))"
        return [*super()._table_layouts(), others, *self.part.layouts]

    def _allocate_tables(self) -> list[str]:
        dtype = GLUON_DTYPES[self.shape.dtype]
        block = ", ".join(["1"] * len(self.spread.result.batch) + [str(self.part.lines), str(LINE)])
        return [
            *super()._allocate_tables(),
            f"others = gl.allocate_shared_memory({dtype}, [2 * GROUPS, {GROUP_ROWS}, STEP], OTHERS)",
            f"part_tile = gl.allocate_shared_memory(gl.float32, [GROUPS, {block}], {self.total}_map.layout)",
            "others_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())",
        ]

    def _init_tables(self) -> list[str]:
        return [
            *super()._init_tables(),
            "for turn in gl.static_range(2):",
            "    mbarrier.init(others_full.index(turn), GROUPS)",
        ]

    def _shared_by_groups(self) -> list[str]:
        """What the warpgroups need besides; the values' rows of all of them among it."""
        return [f"{self.total}_map", "others", "others_full", "part_tile", f"{self.kept.name}_tile"]

    def _compute_arguments(self) -> list[str]:
        return list(dict.fromkeys([*super()._compute_arguments(), *self._shared_by_groups()]))

    def _step_arguments(self) -> list[str]:
        listed = ["visits"] if self.listed else []
        return [*super()._step_arguments(), "iteration", *listed, *self._shared_by_groups()]

    def _step_constants(self) -> list[str]:
        return ["group"]

    def _sum_maps(self) -> list[str]:
        return [f"{self.total}_map"]

    def _map_calls(self) -> list[str]:
        return [f"tile_map({self.total}, {self.part.lines}, {LINE})"]

    # -- the iteration --

    def _masked(self) -> str:
        masked = super()._masked()
        end = self._scalar_printer().value(self.shape.extent(self.shape.p)).code
        return masked if masked == "True" else f"({masked}) | (row + {self.rows} > {end})"

    @property
    def split(self) -> bool:
        """Whether tiles without masks have a loop of their own: where the domain masks none, but only what is missing
        of the last tile and of the last rows."""
        return not (self.listed or self.bounds.lower or self.bounds.upper or self._masked() == "True")

    def _loops(self) -> list[str]:
        if not self.split or "if MASKED:" not in self._step():
            return super()._loops()
        count, end = self._count(), self._scalar_printer().value(self.shape.extent(self.shape.p)).code
        return [
            f"edge = {self._count('1')}",
            f"inside = edge + ({count} - edge) * (row + {self.rows} <= {end}).to(gl.int32)",
            "for turn in range(2):",
            *indent(self._loop("True", f"turn * inside, edge + turn * ({count} - edge)")),
            *indent(self._loop("False", "edge + turn * (inside - edge), inside")),
        ]

    def _both(self, full: list[str], masked: list[str]) -> list[str]:
        """In one loop masks stay behind their branch: with no more than this in it the assembler would do without."""
        lines = super()._both(full, masked)
        if self.split or "if MASKED:" not in lines:
            return lines
        self.used.add("apart")
        at = lines.index("if MASKED:") + 1
        return [*lines[:at], "    apart()", *lines[at:]]

    def _issue_products(self, it: Iteration) -> list[str]:
        """First what the last tile adds to the sum, whose weights everybody has made meanwhile; it is stored behind the
        first scores, and sent off behind the first sum. What else this one's weights need is read while scores are
        made. Products that it does not need wait for its weights, which leaves registers."""
        lines = [*self._await_others(), *self._multiply_part(it)]
        first, *rest = [s for s in self.order[1] if s not in self.late]
        lines += self._issue_product(first, it)
        lines += self._read_needed(it) if self.reads_first else []
        lines += [self._await(it, "part"), *self._store_part()]
        lines += [line for score in rest for line in self._issue_product(score, it)]
        return lines + self._read_needed(it)

    def _read_needed(self, it: Iteration) -> list[str]:
        """The columns' values that the first sum's weights need, once an iteration."""
        needed = self._needed(self.order[0][0].weights)
        return [line for s in self.scaled[0] if s.name in needed for line in self._read_columns(s, it)]

    @property
    def reads_first(self) -> bool:
        """Whether columns' values are read in front of the part's stores, behind which they wait for shared memory. It
        gains where masks are behind a branch, and loses where the registers that they take are the last: where more
        than weights is held for late products. Resident programs were not tried."""
        needed_late = {a.tensor for s in self.scaled[0] if s.name not in self.early for a in s.reads}
        held = needed_late & {*self.early} - {self.order[0][0].weights}
        return not (self.split or self.resident or self.listed or self._masked() == "True" or held)

    @cached_property
    def late(self) -> tuple[str, ...]:
        """Those that the first sum does not need."""
        needed = self._needed(self.order[0][0].weights)
        return tuple(s for s in self.order[1] if s not in needed)

    @cached_property
    def early(self) -> tuple[str, ...]:
        """The values that need no late products."""
        return tuple(s.name for s in self.scaled[0] if not {*self.late} & {*self._needed(s.name)})

    def _before(self, x: WeightedSum) -> tuple[str, ...]:
        """Before the first sum, and late products, also all else that can be made: less is held while they run."""
        if not self.late or x != self.order[0][0]:
            return super()._before(x)
        return tuple(dict.fromkeys([*super()._before(x), *self.early]))

    def _tile_before(self, back: int) -> str:
        """The tile of an iteration that many before this one."""
        if (x := self.shape.members) is not None:
            return f"tile + {back} - (iteration % {x.count} + {back * (x.count - 1)}) // {x.count}"
        return f"gl.load(visits + (iteration - {back})) // 2" if self.listed else f"tile + {back}"

    def _await_others(self) -> list[str]:
        """Until all weights of the iteration before are made; those before them nobody reads any more."""
        phase = "((iteration + 1) // 2 + 1) % 2"
        return ["before = (iteration + 1) % 2", f"mbarrier.wait(others_full.index(before), {phase})"]

    def _multiply_part(self, it: Iteration) -> list[str]:
        """This warpgroup's part of the product of all weights of the iteration before."""
        rows, across = GROUP_ROWS, self.part.columns
        ring = self.kept
        weights = ".permute([1, 0])"
        if self.columns > rows:
            weights = f".slice(group * {rows}, {rows}, 1)" + weights
        lines = [f"part = gl.full([{rows}, {across}], 0.0, gl.float32, PART)"]
        for group in range(self.groups):
            values = self._view(ring, self._place_before(group), still=True)
            if across != ring.width:
                values += f".slice(group * {across}, {across}, 1)"
            left = f"others.index(before * GROUPS + {group}){weights}"
            kept = "" if group else "use_acc=False, "
            lines += [f"values = {values}", f"part = warpgroup_mma({left}, values, part, {kept}is_async=True)"]
            it.flying.append("part" if group == self.groups - 1 else f"part {group}")
        return lines

    def _store_part(self) -> list[str]:
        """The part goes to shared memory, once what was sent off before has left its tile."""
        return ["tma.store_wait(0)", *self.part.store("part_tile.index(group)", "part")]

    def _send(self, back: int) -> list[str]:
        """Add to the sum in memory what was stored: the part of an iteration that many before this one. All warps have
        to be behind their fences."""
        result = self.spread.result
        sent: list[str] = []
        if (x := self.shape.members) is not None:
            sent.append(f"{x.rank}_before = {x.group} * {x.count} + (iteration + {back * (x.count - 1)}) % {x.count}")
            before = {var(x.rank): var(f"{x.rank}_before")}
            result = replace(result, batch=tuple((at, index.xreplace(before)) for at, index in result.batch))
        sent.append(f"at = {self._coordinates(result, self.part.first_line(self._tile_before(back)))}")
        sent.append(f"add_tile({self.total}_map, at, part_tile.index(group))")
        return [FENCE, "gl.thread_barrier()", f"if iteration > {back - 1}:", *indent(sent)]

    def _issue_sum(self, x: WeightedSum, printer: Printer, it: Iteration) -> list[str]:
        late = self.late if x == self.order[0][0] else ()
        products = [line for score in late for line in self._issue_product(score, it)]
        *lines, product = super()._issue_sum(x, printer, it)
        if x.weights == self.spread.weights:
            lines = [*lines[:-1], *self._keep_weights(x, printer)]
        return [*lines, *products, product, *self._behind(x)]

    def _behind(self, x: WeightedSum) -> list[str]:
        """What waits for stores while a sum runs, whose own weights are in registers: the part is sent off behind the
        first one, and everybody may read the weights behind theirs."""
        made = [FENCE, ARRIVE] if x.weights == self.spread.weights else []
        return [*made, *(self._send(1) if x == self.order[0][0] else [])]

    def _keep_weights(self, x: WeightedSum, printer: Printer) -> list[str]:
        """The weights of a sum of programs, which go to shared memory, too."""
        value, weights = printer.names[x.weights].atom(), self.weight_names[x.weights]
        return [
            f"{weights} = {value}.to({GLUON_DTYPES[self.shape.dtype]})",
            f"others.index(iteration % 2 * GROUPS + group).store({weights})",
            f"{weights} = gl.convert_layout({weights}, WEIGHTS)",
        ]

    def _finish(self) -> list[str]:
        """After the loop: the last tile's part; then nobody reads the operands that stay, through whose tiles results
        leave."""
        it = Iteration()
        return [
            f"iteration = {self._count()}",
            *([] if self.listed else ["tile = first - 1"]),
            *self._unsent(),
            *self._await_others(),
            *self._multiply_part(it),
            self._await(it, "part"),
            *self._store_part(),
            *self._send(1),
            'gl.inline_asm_elementwise("bar.sync 8, '
            f'{128 * self.groups}; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)',
        ]

    def _unsent(self) -> list[str]:
        """What the last iteration has stored and left to the next."""
        return []

    # -- the host's part --

    def parts(self) -> list[str]:
        result = self.spread.result
        ranks, dtype = self._rows_of_result(), self.cascade.tensors[result.tensor].dtype
        number = sympy.Float(float(self.number))
        return [*super().parts(), self.part.kernel("rounded", ranks, result.width, number, dtype)]

    @property
    def added(self) -> tuple[str, ...]:
        return (self.spread.result.tensor,)

    @property
    def zeros(self) -> dict[str, tuple[str, str]]:
        """What has to be zero when programs begin to add to it: names, shapes and dtypes."""
        extents = tuple(map(self.shape.extent, self._rows_of_result()))
        counter = {"taken": ("1", "int32")} if self.counting else {}
        return {self.total: (self.part.shape(extents), "float32"), **counter}

    def _counters(self, device: str) -> list[str]:
        return []  # among the zeros

    def _rows_of_result(self) -> tuple[str, ...]:
        """The ranks of the result but its width, in the order in which the copy engine sees them."""
        *rows, _ = self.spread.result.order
        return tuple(self.cascade.tensors[self.spread.result.tensor].ranks[i] for i in rows)

    def launch(self, device: str) -> list[str]:
        result = self._seen(self.spread.result)
        extents = tuple(map(self.shape.extent, self._rows_of_result()))
        return [
            *(allocated(x, "zeros", *what, device) for x, what in self.zeros.items() if not self.cleared),
            *super().launch(device),
            *self.part.launch("rounded", self.total, result, extents),
        ]
