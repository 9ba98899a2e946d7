"""The Gluon emitter for loops with several products: gradients, as warp-specialised Hopper kernels.

Comes in: a form. Goes out: the text of one kernel. The frame is `gluon_frame`'s (one warp loads, warpgroups own 64
rows each); the iteration differs from `gluon_overlap`'s. With two products and two sums there are no registers to hold
the next scores while the last weights are used. So an iteration goes through its statements in order: all products are
issued, each weighted sum as soon as its weights exist, and waited for as late as possible; one warpgroup's products
then run behind the other's arithmetic. The weights (a transposed tile of probabilities, say) stay in registers, as the
left operand of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import sympy

from einscade.codegen.gluon_factors import joined, shared
from einscade.codegen.gluon_form import Operand, WeightedSum
from einscade.codegen.gluon_frame import Frame
from einscade.codegen.gluon_plan import ALIGNED, GROUP_ROWS, REGISTERS, RUN_BYTES, SHARED, Load, Ring, Table
from einscade.codegen.gluon_points import GLUON_DTYPES
from einscade.codegen.gluon_text import call, function, indent, paren, wrapped
from einscade.codegen.gluon_values import Printer, Value
from einscade.codegen.host import python
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Expr, accesses, free_vars, var

__all__ = ["Chain", "Iteration"]

RUNS = {"f32": "gl.float32", "i32": "gl.int32", "i64": "gl.int64", **{d: GLUON_DTYPES[d] for d in ("bf16", "f16")}}
"""The dtypes of columns' values that the copy engine brings."""


@dataclass
class Iteration:
    """What the text of an iteration has come to: products and sums in flight, in order; tiles that have arrived, and
    those handed back; columns' values read; values made; sums issued. Its tiles are at `stage` of the rings, where they
    come if `there` holds."""

    flying: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    issued: set[str] = field(default_factory=set)
    stage: str = "stage"
    phase: str = "phase"
    there: str = ""


class Chain(Frame):
    """One nest's kernel."""

    spilled = 0
    """So many registers more than there are may be counted."""

    shared = SHARED
    """Bytes of shared memory that a kernel may take, with what is allotted besides tiles."""

    takes_several = False
    """Whether a program may take one tile of rows after another."""

    # -- what differs in the plan --

    @property
    def rescaled(self) -> bool:
        """Whether sums are rescaled: scores are made into weights then, and nothing else of a tile is kept."""
        return any(x.rescale is not None for x in self.shape.sums)

    def _check_fit(self) -> None:
        if self.resident and not self.takes_several:
            raise Unsupported("a loop in order has a program for each tile of rows")
        if self.shape.members and self.listed:
            raise Unsupported("a list of tiles for all members of a group")
        tiles = self.stages * self.columns * sum(r.width for r in self.rings) * 2
        tiles += self.rows * sum(r.width * self._slots(r) for r in self.stills) * 2
        tiles += self.rows * self.f * 2 * (len(self.shape.written) - len(self.shares))
        if tiles + 1024 > self.shared:
            raise Unsupported(f"{tiles} bytes of tiles do not fit in {self.shared} bytes of shared memory")
        registers = len(self.shape.sums) * self.f // 2 + self._most_live() + 24
        spare = 16 if self.groups == 3 and not self.rescaled else 0  # masks and positions take as many, of fewer
        if registers + spare > REGISTERS[self.groups] + self.spilled:
            raise Unsupported(f"tiles of {self.columns} by {self.f} do not fit in {REGISTERS[self.groups]} registers")

    def _most_live(self) -> int:
        """Registers of the iteration's tiles at the moment when most are needed: values of the points, weights of sums
        that have been issued, columns' values that are read by address. Late products have none before they are
        issued."""
        if self.rescaled:
            return self.columns // 2 + len(self.shape.sums) * self.columns // 4
        statements = {s.name: s for s in self.scaled[0]}
        tile = {n for n, s in statements.items() if {self.shape.p, self.shape.m} <= set(s.ranks)} | {*self.shape.scores}
        order = [[n for end in self._before(x) for n in self._needed(end)] for x in self.order[0]]
        events = [n for n in dict.fromkeys([*chain(*order), *statements]) if n in statements]
        copied = {t.access for t in self.tables}
        columns = sum(1 for x in self.loads if self._of_columns(x) and x.access not in copied) * self.columns // 4
        most, issued = (len(self.shape.scores) - len(self.late)) * self.columns // 2, 0
        for i, name in enumerate(events):
            later = {a.tensor for n in events[i + 1 :] for a in statements[n].reads}
            weights = any(x.weights == name for x in self.shape.sums)
            known = {*self.shape.scores, *events[: i + 1]} - ({*self.late} if name in order[0] else set())
            live = [n for n in known if n in tile and (n in later or n == name)]
            issued += weights
            kept = len([n for n in live if n in later]) * self.columns // 2 + issued * self.columns // 4
            most = max(most, len(live) * self.columns // 2 + (issued - weights) * self.columns // 4, kept)
        return most + columns

    # -- values of columns --

    def _loads(self) -> tuple[Load, ...]:
        """Values that a tile's columns have (statistics of the rows that the loop runs over) get variables, too."""
        return tuple(
            Load(x.access, f"{self.name(x.access.tensor)}_{self.shape.m}{i}") if self._of_columns(x) else x
            for i, x in enumerate(super()._loads())
        )

    def _of_columns(self, x: Load) -> bool:
        names = free_vars(x.access)
        return self.shape.m in names and self.shape.p not in names and accesses(x.access) == (x.access,)

    def _name_hoisted(self, printer: Printer) -> None:
        super()._name_hoisted(printer)
        for x in self.loads:
            if x.name is not None and self._of_columns(x):
                printer.names[x.name] = replace(printer.names[x.name], ranks=(self.shape.m,))

    def _context(self) -> list[str]:
        hoisted = [x.name for x in self.loads if x.name is not None and not self._of_columns(x)]
        tiles = {t.access for t in self.tables}
        rest = [x for x in self.loads if x.access not in tiles]
        tensors = dict.fromkeys(x.access.tensor for x in rest if x.name is None or self._of_columns(x))
        moving = [a for t in tensors for a in self._pointer(t, self.name(t))]
        member = [self.shape.members.rank] if self.shape.members else []
        return [self.shape.p + "_", *self.shape.batch, *member, *hoisted, *moving, *self.sizes]

    def _tables_of(self, loads: Sequence[Load]) -> tuple[Table, ...]:
        """Those that the copy engine can bring, as runs of the last dimension: registers would have to hold the others
        through all of the iteration."""
        m = self.shape.m
        found: list[Table] = []
        for x in loads:
            if not self._of_columns(x):
                continue
            *others, last = x.access.index
            t = self.cascade.tensors[x.access.tensor]
            plain = last == var(m) and not any(m in free_vars(i) for i in others)
            size = RUN_BYTES[t.dtype] if t.dtype in RUNS else 0
            if plain and size and size * self.columns % ALIGNED == 0 and len(x.access.index) <= 5:
                operand = Operand(t.name, len(others), len(others), 0, self.columns, tuple(enumerate(others)))
                found.append(Table(self.name(t.name), x.access, operand, size))
        names = [t.name for t in found]
        return tuple(t for t in found if names.count(t.name) == 1)

    def _table_dtype(self, t: Table) -> str:
        return RUNS[self.dtype(t.operand.tensor)]

    def _table_rings(self) -> list[str]:
        return [f"{t.name}_tiles" for t in self.tables]

    def _table_flags(self) -> list[str]:
        return []

    def _table_layouts(self) -> list[str]:
        return ["RUN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))"] if self.tables else []

    def _allocate_tables(self) -> list[str]:
        return [self._run_tiles(t.name, self._table_dtype(t), len(t.operand.batch)) for t in self.tables]

    def _init_tables(self) -> list[str]:
        return []

    @cached_property
    def home(self) -> Ring:
        """The ring whose barriers the columns' values share: that of the last sum."""
        return self.ring(self.order[0][-1].values)

    def _copy_all(self, ring: Ring) -> list[str]:
        """A tile of a ring, and what shares its barriers."""
        lines = self._copy(ring, "tile * STEP", "stage", "phase")
        if ring != self.home or not self.tables:
            return lines
        names = [ring.name, *(t.name for t in self.tables)]
        size = " + ".join(f"{n}_map.block_type.nbytes" for n in names)
        lines[1] = f"mbarrier.expect({ring.name}_full.index(stage), {size})"
        printer = self._scalar_printer()
        for t in self.tables:
            column = self._run_words(self._table_dtype(t), "tile * STEP")[1]
            at = ", ".join([*(printer.value(i).code for _, i in t.operand.batch), column])
            lines.append(
                f"tma.async_copy_global_to_shared({t.name}_map, [{at}], {ring.name}_full.index(stage), "
                f"{t.name}_tiles.index(stage))"
            )
        return lines

    def _read_columns(self, s: Statement, it: Iteration) -> list[str]:
        """The columns' values that a statement, or its mask, is the first to need, from shared memory."""
        lines = []
        addressed = any(x.name is None and x.access in accesses(s.expr) for x in self.loads)
        needed = {*accesses(s.expr), *(accesses(s.row) if s.fill is not None else ())}
        needed |= set(accesses(s.keep)) if s.mask_operand or addressed else set()
        for t in self.tables:
            x = next(x for x in self.loads if x.access == t.access)
            if x.access in needed and x.name not in it.read:
                assert x.name is not None
                it.read.add(x.name)
                tile = f"{t.name}_tiles.index(stage)._reinterpret({self._table_dtype(t)}, [STEP], RUN)"
                number = "" if self._table_dtype(t) in ("gl.int32", "gl.int64") else ".to(gl.float32)"
                lines += [*self._see(self.home, it), f"{x.name} = {tile}.load(COLUMN){number}"]
        return lines

    def _see(self, ring: Ring, it: Iteration) -> list[str]:
        """Wait for a ring's tile, once an iteration."""
        if ring.name in it.seen:
            return []
        it.seen.add(ring.name)
        wait = f"mbarrier.wait({ring.name}_full.index({it.stage}), {it.phase})"
        return [
            *([f"if {it.there}:", f"    {wait}"] if it.there else [wait]),
            f"{ring.name}_tile = {self._view(ring, it.stage)}",
        ]

    def _pointers(self) -> list[str]:
        tiles = {t.access for t in self.tables}
        tensors = dict.fromkeys(x.access.tensor for x in self.loads if x.access not in tiles)
        read = [a for t in tensors for a in self._pointer(t, self.name(t))]
        return read + [a for t in self._row_results() for a in self._pointer(t, f"{self.name(t)}_to")]

    @cached_property
    def scaled(self) -> tuple[tuple[Statement, ...], dict[str, Expr]]:
        """The statements, where weights that only a sum reads lose the number in front; and the sums' numbers, which
        multiply them after the loop."""
        statements = list(joined(shared(self.statements, (self.shape.p, self.shape.m)), self.shape))
        numbers: dict[str, Expr] = {}
        for x in self.shape.sums:
            at = next((i for i, s in enumerate(statements) if s.name == x.weights), None)
            read = [s for s in statements if any(a.tensor == x.weights for a in s.reads)]
            sums = [y for y in self.shape.sums if y.weights == x.weights]
            if at is None or read or len(sums) > 1 or statements[at].fill not in (None, 0):
                continue
            number, rest = statements[at].expr.as_coeff_Mul()
            if number != 1 and rest.has(*accesses(rest)):
                statements[at] = replace(statements[at], expr=rest)
                numbers[x.state.name] = number
        return tuple(statements), numbers

    # -- the order of an iteration --

    @cached_property
    def order(self) -> tuple[tuple[WeightedSum, ...], tuple[str, ...]]:
        """The sums, those that need fewest products first, and the products' scores in the order they are needed."""
        needs = {x.state.name: [s for s in self._needed(x.weights) if s in self.shape.scores] for x in self.shape.sums}
        sums = sorted(self.shape.sums, key=lambda x: len(needs[x.state.name]))
        return tuple(sums), tuple(dict.fromkeys([s for x in sums for s in needs[x.state.name]] + [*self.shape.scores]))

    def _needed(self, name: str) -> tuple[str, ...]:
        """The values of the loop that a value depends on, itself included, each after those it needs; what takes more
        functions first, so that they run behind the products that the rest waits for."""
        made = {s.name: s for s in self.scaled[0]}
        found: dict[str, None] = {}

        def visit(n: str) -> None:
            if n in found:
                return
            read = (*accesses(made[n].expr), *accesses(made[n].keep)) if n in made else ()
            for a in sorted(dict.fromkeys(a.tensor for a in read), key=self._functions_in, reverse=True):
                if a in made or a in self.shape.scores:
                    visit(a)
            found[n] = None

        visit(name)
        return tuple(found)

    @cached_property
    def late(self) -> tuple[str, ...]:
        """The products that are issued with the first sum."""
        return ()

    def _functions_in(self, name: str) -> int:
        """How many functions of one argument it takes to make a value of the loop."""
        made = next((s for s in self.scaled[0] if s.name == name), None)
        if made is None:
            return 0
        own = sum(1 for x in sympy.preorder_traversal(made.expr) if isinstance(x, sympy.Function))
        return own + sum(self._functions_in(a.tensor) for a in accesses(made.expr))

    # -- the text --

    def text(self) -> str:
        if self.tables:
            raise Unsupported("values of columns that come as runs, in a module of one kernel")
        return super().text()

    def _functions(self) -> list[str]:
        return [self._place(), self._load(), self._step(), self._compute(), self._kernel()]

    def _load(self) -> str:
        names = ", ".join(x.name for x in (*self.stills, *self.rings))
        lines = [f'"""The loading warp: all of a program\'s tiles of {names}."""']
        lines += [line for x in self.stills for line in self._copy_still(x)]
        lines += ["stage = 0", "phase = 1", *self._walk()]
        lines += indent(line for r in self._in_order() for line in self._copy_all(r))
        lines += indent(self._next_stage())
        return function("load", self._load_arguments(), lines)

    def _in_order(self) -> list[Ring]:
        """The rings in the order in which an iteration reads them."""
        moving = {x.score.name: x.moving for x in self.shape.products}
        operands = [*(moving[s] for s in self.order[1]), *(x.values for x in self.order[0])]
        return list(dict.fromkeys(map(self.ring, operands)))

    def _count(self, tiles: str = "") -> str:
        """The iterations of a program, or those for so many tiles of its loop."""
        tiles = tiles or ("count" if self.listed else "end - first")
        return f"{paren(tiles)} * {self.shape.members.count}" if self.shape.members else tiles

    def _walk(self, iterations: str = "") -> list[str]:
        """The head of a loop over the tiles that are visited, from the last to the first, or over a range of them."""
        head = f"for iteration in range({iterations or self._count()}):"
        if self.listed:
            return [head, "    visit = gl.load(visits + iteration)", "    tile = visit // 2"]
        if (x := self.shape.members) is not None:
            member = f"    {x.rank} = {x.group} * {x.count} + iteration % {x.count}"
            return [head, f"    tile = end - 1 - iteration // {x.count}", member]
        return [head, "    tile = end - 1 - iteration"]

    def _loop(self, masked: str, iterations: str = "") -> list[str]:
        """The loop, or a range of its iterations; `masked` says which of them are."""
        step = call(self._running(), "step", [*self._given(self._step_arguments()), masked, *self._step_constants()])
        return [*self._walk(iterations), *indent([*step.splitlines(), *self._hand_on(), *self._next_stage()])]

    def _given(self, arguments: Sequence[str]) -> list[str]:
        """What an iteration's arguments are in the loop."""
        return list(arguments)

    def _hand_on(self) -> list[str]:
        """What an iteration says to the next besides its sums."""
        return []

    def _loops(self) -> list[str]:
        """All iterations of a program."""
        return self._loop(self._masked())

    def _masked(self) -> str:
        """Whether the tile of an iteration is masked."""
        edge = self._edge()
        if self.listed or edge == "True":
            return edge
        return "tile == end - 1" if edge == "False" else f"(tile == end - 1) | ({edge})"

    def _step_arguments(self) -> list[str]:
        stills = [f"{x.name}_rows" for x in self.stills]
        rings = [f"{x.name}_tiles" for x in self.rings]
        rings += [*self._table_rings(), *self._ring_barriers()]
        return ["tile", *self._running(), "stage", "phase", *stills, *rings, "zero", *self._context()]

    def _running(self) -> list[str]:
        """What an iteration takes from the one before."""
        return [*self._state_names(), *self._sum_names()]

    def _step(self) -> str:
        shape = self.shape
        masked, full = self._printer("finite"), self._printer("finite" if shape.always_guard else "")
        for printer in (masked, full):
            for state in shape.states:
                printer.names[state.name] = Value(self.name(state.name), (shape.p,) if shape.p in state.ranks else ())
            for score in shape.scores:
                printer.names[score] = Value(self.name(score), (shape.p, shape.m))
        lines = ['"""One iteration: products are issued at once, sums as soon as their weights exist."""']
        lines.append(f"{shape.m}_ = tile * STEP + gl.arange(0, STEP, COLUMN)")
        if self.offset:
            lines += [f"{shape.m}_first = tile * STEP", f"{self.offset} = gl.arange(0, STEP, COLUMN)"]
        copied = {t.access for t in self.tables}
        for load in self.loads:
            if load.name is not None and self._of_columns(load) and load.access not in copied:
                lines.append(f"{load.name} = {self._element(load.access, full).code}")
        for printer in (masked, full):
            self._name_hoisted(printer)
        it = Iteration()
        lines += self._issue_products(it)
        statements = {s.name: s for s in (*self.scores, *self.scaled[0])}
        ends = [self._before(x) for x in self.order[0]] + [(s.name,) for s in self.scaled[0]]
        for end in ends:
            for name in dict.fromkeys(n for e in end for n in self._needed(e)):
                if name in it.done:
                    continue
                it.done.add(name)
                if name in shape.scores:
                    lines += [*self._await_score(name, it), *self._release(it)]
                lines += self._read_columns(statements[name], it)
                lines += [*self._comment(statements[name]), *self._statement(statements[name], masked, full)]
            for x in self.order[0]:
                if x.weights == end[0] and x.state.name not in it.issued:
                    lines += self._issue_sum(x, full, it)
        lines += self._complete(it)
        lines += [f"{self.name(s.name)} = {self.name(s.new)}" for s in shape.states]
        lines.append(f"return {', '.join(self._running())}")
        masking = "MASKED: gl.constexpr" if self._masked() == "True" else "MASKED"
        constants = [f"{c}: gl.constexpr" for c in self._step_constants()]
        return function("step", [*self._step_arguments(), masking, *constants], lines)

    def _step_constants(self) -> list[str]:
        return []

    def _await_score(self, name: str, it: Iteration) -> list[str]:
        return [self._await(it, self.name(name))]

    def _complete(self, it: Iteration) -> list[str]:
        """The end of an iteration: its sums are waited for."""
        return [line for x in self.order[0] for line in self._await_sum(x, it)]

    def _await_sum(self, x: WeightedSum, it: Iteration) -> list[str]:
        it.done.add(x.state.name)
        return [self._await(it, self.name(x.state.name), self.weight_names[x.weights]), *self._release(it)]

    def _before(self, x: WeightedSum) -> tuple[str, ...]:
        """The values of the loop that are made before a sum is issued: its weights first; and what rescales it."""
        made = {s.name for s in self.scaled[0]}
        factor = self.rescales[self.shape.sums.index(x)]
        factors = [a.tensor for a in accesses(factor) if a.tensor in made] if factor is not None else []
        return (x.weights, *factors)

    def _issue_products(self, it: Iteration) -> list[str]:
        return [line for score in self.order[1] for line in self._issue_product(score, it)]

    def _issue_product(self, score: str, it: Iteration) -> list[str]:
        x = next(x for x in self.shape.products if x.score.name == score)
        ring, still = self.ring(x.moving), next(r for r in self.stills if r.operand == x.still)
        name, right = self.name(score), f"{ring.name}_tile.permute([1, 0])"
        it.flying.append(name)
        product = f"{name} = warpgroup_mma({still.name}_rows, {right}, zero, use_acc=False, is_async=True)"
        return [*self._see(ring, it), product]

    def _issue_sum(self, x: WeightedSum, printer: Printer, it: Iteration) -> list[str]:
        ring, name, weights = self.ring(x.values), self.name(x.state.name), self.weight_names[x.weights]
        value = printer.names[x.weights].atom()
        lines = [
            *self._see(ring, it),
            f"{weights} = gl.convert_layout({value}.to({GLUON_DTYPES[self.shape.dtype]}), WEIGHTS)",
        ]
        if (factor := self.rescales[self.shape.sums.index(x)]) is not None:
            lines.append(f"{name} = {name} * gl.convert_layout({printer.value(factor).code}, RESULT_ROW)[:, None]")
        it.issued.add(x.state.name)
        it.flying.append(name)
        return [*lines, f"{name} = warpgroup_mma({weights}, {ring.name}_tile, {name}, is_async=True)"]

    def _await(self, it: Iteration, *names: str) -> str:
        """Wait for the first of the names, and what was issued before it; the others are kept until then."""
        return self._waited(len(it.flying) - it.flying.index(names[0]) - 1, names, names)

    def _release(self, it: Iteration) -> list[str]:
        """Tiles that no product or sum still reads go back to the loading warp."""
        lines = []
        for ring in self._in_order():
            users = [x.score.name for x in self.shape.products if x.moving == ring.operand]
            users += [x.state.name for x in self.shape.sums if x.values == ring.operand]
            if ring.name not in it.released and all(u in it.done for u in users):
                it.released.add(ring.name)
                lines.append(f"mbarrier.arrive({ring.name}_empty.index(stage))")
        return lines

    def _compute(self) -> str:
        doc = f'"""A warpgroup: {GROUP_ROWS} rows of {self.shape.p}, all of their loop, and what follows it."""'
        printer = self._printer("")
        lines = [doc, *self._at_rows(printer), *self._initial(printer)]
        for x in self.stills:
            lines += [f"mbarrier.wait({x.name}_full, 0)", f"{x.name}_rows = {self._view(x, 'group', still=True)}"]
        lines += [*self._begin(), "stage = 0", "phase = 0", *self._loops(), *self._finish(), *self._results(printer)]
        lines += ["tma.store_wait(0)"] if self.shape.written or self.added else []
        return function("compute", [*self._compute_arguments(), "group: gl.constexpr"], lines)

    def _at_rows(self, printer: Printer) -> list[str]:
        """What a warpgroup knows of its rows, which begin at `row`."""
        lines = [f"{self.shape.p}_ = row + group * {GROUP_ROWS} + gl.arange(0, {GROUP_ROWS}, ROW)"]
        loads = [x for x in self.loads if x.name is not None and not self._of_columns(x)]
        return lines + [f"{x.name} = {self._element(x.access, printer).code}" for x in loads]

    def _results(self, printer: Printer) -> list[str]:
        """What follows the loop, to where results are on their way."""
        lines = self._settle()
        for name, number in self.scaled[1].items():
            lines.append(f"{self.name(name)} = {self.name(name)} * {printer.value(sympy.Float(float(number))).code}")
        return [*lines, *self._after(), *(line for x in self.shape.written for line in self._store(x))]

    def _begin(self) -> list[str]:
        """What comes before the loop, when the operands that stay are there."""
        return []

    def _finish(self) -> list[str]:
        """What follows the loop, before results leave."""
        return []

    # -- the host's part --

    @property
    def added(self) -> tuple[str, ...]:
        """Results besides the form's."""
        return ()

    def _map_calls(self) -> list[str]:
        """The copy engine's views of what is neither an operand nor a tile of results."""
        return []

    def launch(self, device: str) -> list[str]:
        """The lines that launch the kernel; tensors have the names that they have here."""
        shape = self.shape
        grid = [python(shape.extent(r)) for r in shape.batch]
        grid.append(f"-(-{paren(python(shape.extent(shape.p)))} // {self.rows})")
        blocks = [(x.operand, GROUP_ROWS, x.width) for x in self.stills]
        blocks += [(r.operand, self.columns, r.width) for r in self.rings]
        written = [(x, GROUP_ROWS, self.f) for x in shape.written]
        tiles = {t.access for t in self.tables}
        tensors = [*dict.fromkeys(x.access.tensor for x in self.loads if x.access not in tiles), *self._row_results()]
        others = [code for t in tensors for code in (self.name(t), f"*{self.name(t)}.stride()")]
        others += ["visits"] if self.listed else []
        others += ["taken"] if self.dynamic else []
        others += ["programs"] if self.resident else []
        return [
            f"programs = {' * '.join(paren(g) for g in grid)}",
            "if programs:",
            *indent(self._make_lists(device) if self.listed else []),
            *indent(self._counters(device)),
            f"    kernel[({f'min(programs, {self.resident})' if self.resident else 'programs'},)](",
            *(f"        tile_map({self._seen(operand)}, {rows}, {width})," for operand, rows, width in blocks),
            *(f"        run_map({self.name(t.operand.tensor)}, {self.columns})," for t in self.tables),
            *(f"        tile_map({self._seen(operand)}, {rows}, {width})," for operand, rows, width in written),
            *(f"        {code}," for code in self._map_calls()),
            *(wrapped(", ".join([*others, *self.sizes]) + ",", 8) if others or self.sizes else []),
            f"        {self._options()}",
            "    )",
        ]
