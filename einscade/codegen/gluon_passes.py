"""The Gluon emitter for loops whose sums have nothing in common: a pass over the loop for each, in one kernel.

Comes in: a form (of two softmaxes, say) and a schedule in order. Goes out: the text of a module. The scores, running
values and sums of a loop fall into parts that read nothing of each other. Side by side, their sums and tiles of scores
would share the registers, and tiles would be short. One after another, each has the iteration of `gluon_overlap` and
tiles as long as there. The first scores of a pass are issued with the last sums of the pass before, so that nothing
waits in between; these sums stay in shared memory until the last pass is over. The passes share the rings: what several
of them read (the values) is copied several times, out of the second-level cache. `JoinedPasses` goes from the last pass
over some rows to the first pass over the next in the same way (`gluon_joined`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import networkx as nx

from einscade.codegen.gluon_chain import Chain
from einscade.codegen.gluon_form import Form
from einscade.codegen.gluon_joined import JoinedRows
from einscade.codegen.gluon_overlap import Overlapped
from einscade.codegen.gluon_plan import GROUP_ROWS, REGISTERS, SHARED, Ring
from einscade.codegen.gluon_text import TURN, call, function, indent
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Statement
from einscade.ir.expr import Expr, accesses

__all__ = ["JoinedPasses", "Passes", "in_order", "in_passes"]


def in_order(shape: Form, schedule: Schedule) -> Chain | Passes:
    """The kernel of a loop in order: of passes where there are several. Raises `Unsupported` where it does not fit."""
    if in_passes(shape):
        return (JoinedPasses if schedule.joined else Passes)(shape, schedule)
    if schedule.joined:
        raise Unsupported("products in order have no tiles of rows that run into one another")
    return Chain(shape, schedule)


def in_passes(shape: Form) -> bool:
    """Whether a loop falls into parts, each with products and sums."""
    parts = _parts(shape, shape.statements, [x.rescale for x in shape.sums])
    sums = {x.state.name for x in shape.sums}
    return len(parts) > 1 and not any(part.isdisjoint(x) for part in parts for x in (sums, shape.scores))


def _parts(shape: Form, statements: Sequence[Statement], rescales: Sequence[Expr | None]) -> list[frozenset[str]]:
    """The names of the loop's values, in parts that read nothing of each other; in the order of their products."""
    names = {*shape.scores, *(s.name for s in statements), *(s.name for s in shape.states)}
    graph = nx.Graph()
    for s in statements:
        read = {a.tensor for e in (s.expr, s.keep, s.row) for a in accesses(e)}
        graph.add_edges_from((s.name, name) for name in {s.name, *read} & names)
    graph.add_edges_from((s.name, s.new) for s in shape.states)
    for x, rescale in zip(shape.sums, rescales, strict=True):
        read = {x.weights, *(a.tensor for a in accesses(rescale))} if rescale is not None else {x.weights}
        graph.add_edges_from((x.state.name, name) for name in read & names)
    order = [*shape.scores, *graph.nodes]
    return sorted(map(frozenset, nx.connected_components(graph)), key=lambda part: min(map(order.index, part)))


class Passes(Overlapped):
    """One nest's kernel."""

    still_phase = "0"
    """The phase of the barriers of operands that stay."""

    # -- the plan --

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        parts = _parts(self.shape, self.statements, self.rescales)
        return tuple(Pass(self, part, i) for i, part in enumerate(parts))

    @property
    def buffers(self) -> tuple[Ring, ...]:
        return self.passes[0].rings

    @property
    def kept(self) -> list[str]:
        """The sums that wait in shared memory, a tile for each warpgroup."""
        return [name for x in self.passes[:-1] for name in x._sum_names()]

    @property
    def first(self) -> Pass:
        return self.passes[0]

    @property
    def last(self) -> Pass:
        return self.passes[-1]

    def _check_fit(self) -> None:
        first, *rest = self.passes
        if self.tables or (self.resident and not self.schedule.joined):
            raise Unsupported("passes over a loop read no tables; resident programs join them")
        if not rest or any(x.kind != first.kind for x in rest):
            raise Unsupported("passes over a loop need operands of the same kinds")
        tiles = self.stages * self.columns * sum(r.width for r in self.buffers) * 2
        tiles += self.rows * (sum(r.width for r in self.stills) * 2 + self.f * 4 * len(self.kept))
        tiles += self.rows * self.f * 2 * (len(self.shape.written) - len(self.shares))
        tiles += self.stages * sum(self.columns * c.size for c in self.copied_columns)
        if tiles + 1024 > SHARED:
            raise Unsupported(f"{tiles} bytes of tiles do not fit in {SHARED} bytes of shared memory")
        sums, products = len(first.shape.sums), len(first.shape.products)
        registers = sums * self.f // 2 + products * self.columns * 3 // 4 + 32
        if registers > REGISTERS[self.groups]:
            raise Unsupported(f"tiles of {self.columns} by {self.f} do not fit in {REGISTERS[self.groups]} registers")

    def _compute_arguments(self) -> list[str]:
        return [*super()._compute_arguments(), *(f"{name}_kept" for name in self.kept)]

    def _table_layouts(self) -> list[str]:
        return [*super()._table_layouts(), "KEPT = gl.constexpr(gl.SwizzledSharedLayout(2, 1, 8, [1, 0]))"]

    def _allocate_tables(self) -> list[str]:
        shape = f"[GROUPS, {GROUP_ROWS}, {self.f}]"
        kept = [f"{name}_kept = gl.allocate_shared_memory(gl.float32, {shape}, KEPT)" for name in self.kept]
        return [*super()._allocate_tables(), *kept]

    # -- the text --

    def _functions(self) -> list[str]:
        turn = [TURN.strip("\n")] if self.groups > 1 else []
        passes = [text for x in self.passes for text in (x._weigh(), x._advance())]
        crossings = [self._cross(*both) for both in self._crossings()]
        return [*turn, self._place(), self._load(), *passes, *crossings, *self._ending(), self._kernel()]

    def _crossings(self) -> list[tuple[Pass, Pass]]:
        """The passes that follow one another."""
        return list(pairwise(self.passes))

    def _ending(self) -> list[str]:
        return [self._compute()]

    def _tiles_after(self, step: list[str]) -> list[str]:
        """A loop over the tiles after the first."""
        if self.listed:
            return ["for iteration in range(1, count):", *indent(["visit = gl.load(visits + iteration)", *step])]
        return ["for _ in range(end - 1 - first):", *indent(step)]

    def _load(self) -> str:
        lines = [
            '"""The loading warp: all of a program\'s tiles, pass by pass, in the order they are read."""',
            f"tile = {self._head()}",
            *self._copy_pass(self.first, True, "tile", "0"),
            *(line for x in self.stills for line in self._copy_still(x)),
            *("stage = 0", "phase = 1"),
            *self._copy_passes(),
            *self._copy_pass(self.last, False, "tile", "stage", "phase"),
        ]
        return function("load", self._load_arguments(), lines)

    def _copy_passes(self) -> list[str]:
        """What lies between the first tile of the first pass and the last of the last."""
        lines: list[str] = []
        for x, after in zip(self.passes, [*self.passes[1:], None], strict=True):
            lines += self._copy_begun(after) if after is not None else []
            lines += self._tiles_after([f"next_tile = {self._step()}", *self._copy_next(x, x)])
            if after is not None:
                lines += [f"next_tile = {self._head()}", *self._copy_next(x, after)]
        return lines

    def _copy_begun(self, x: Pass) -> list[str]:
        """The operands that stay and that no pass before reads, where they come no sooner than that one begins."""
        return []

    def _step(self) -> str:
        """The next tile of a pass."""
        return "visit // 2" if self.listed else "tile - 1"

    def _copy_next(self, now: Pass, after: Pass) -> list[str]:
        """The operands of the next tile's products, and of this tile's sums."""
        return [
            *self._stage_after(),
            *self._copy_pass(after, True, "next_tile", "next_stage", "next_phase"),
            *self._copy_pass(now, False, "tile", "stage", "phase"),
            "stage = next_stage",
            "phase = next_phase",
            "tile = next_tile",
        ]

    def _copy_pass(self, x: Pass, early: bool, tile: str, stage: str, phase: str | None = None) -> list[str]:
        """The tiles of a pass that products read, or those that only sums do, to their places."""
        lines = []
        for ring in x.rings:
            if ring.early == early:
                lines += x._copy(ring, x._column(tile), stage, phase, self.ring(ring.operand).name)
        return lines

    def _cross(self, before: Pass, after: Pass) -> str:
        """The end of a pass and the beginning of the next."""
        scores, sums, weights = after._score_names(), before._sum_names(), list(before.weight_names.values())
        turn, done = self._turns()
        lines = [
            '"""The first scores of a pass are issued before the last weights of the one before meet their values."""',
            *before._pack(),
            "last_stage = stage",
            "last_phase = phase",
            *self._next_stage(),
            *self._read_columns_early("True"),
            *(f"mbarrier.wait({r.name}_full.index(stage), phase)" for r in self.buffers if r.early),
            *self._read_columns_copied("stage"),
            *turn,
            *after._multiply(lambda still: f"{still.name}_tile", "stage", ""),
            *before._accumulate("last_stage", "last_phase", ""),
            *done,
            self._waited(len(sums), scores, scores),
            *(f"mbarrier.arrive({r.name}_empty.index(stage))" for r in self.buffers if not r.late),
            *(f"mbarrier.arrive({x.name}_empty)" for x in self._left(before)),
            after._weigh_first("next_"),
            *after._hold(),
            self._waited(0, [*sums, *weights], [*sums, *weights]),
            *(f"mbarrier.arrive({r.name}_empty.index(last_stage))" for r in self.buffers if r.late),
            f"return {', '.join(self._crossed(before, after))}",
        ]
        return function(f"cross{after.suffix}", [*self._cross_arguments(before, after), "group: gl.constexpr"], lines)

    def _left(self, x: Pass) -> list[Ring]:
        """The operands that stay of which there will be others when this pass is over."""
        return []

    def _crossed(self, before: Pass, after: Pass, weights: str = "next_") -> list[str]:
        made = [f"{weights}{w}" for w in after.weight_names.values()]
        return [*after._state_names(), *before._sum_names(), *made, "stage", "phase"]

    def _cross_arguments(self, before: Pass, after: Pass) -> list[str]:
        running = [*after._state_names(), *before._sum_names(), *before.weight_names.values(), "stage", "phase"]
        left = [f"{x.name}_empty" for x in self._left(before)]
        return ["tile", *running, *after._tiles(), *left, *self._ring_barriers(), "zero", *self._context()]

    def _cross_from(self, before: Pass, after: Pass) -> str:
        """The call of that function."""
        passed = [*_as_rows(after, self._cross_arguments(before, after)), "group"]
        return call(self._crossed(before, after, ""), f"cross{after.suffix}", passed)

    def _compute(self) -> str:
        shape, first, last = self.shape, self.first, self.last
        sums, weights = last._sum_names(), list(last.weight_names.values())
        lines = [
            f'"""A warpgroup: {GROUP_ROWS} rows of {shape.p}, all passes over their loop, and what follows."""',
            *self._at_rows(),
            *first._initial(self._printer("")),
            f"tile = {self._head()}",
            *self._read_columns_early("True"),
            *self._first_turn(),
            *self._first_weights(),
            "stage = 0",
            "phase = 0",
            *self._all_passes(),
            *last._pack(),
            *last._accumulate("stage", "phase", ""),
            self._waited(0, [*sums, *weights], [*sums, *weights]),
            *self._take_kept(),
            *self._settle(),
            *self._after(),
            *(line for x in shape.written for line in self._store(x)),
            "tma.store_wait(0)",
        ]
        return function("compute", [*self._compute_arguments(), "group: gl.constexpr"], lines)

    def _first_weights(self) -> list[str]:
        """The first weights of all, beside which there is nothing."""
        first, (turn, done) = self.first, self._turns()
        scores = first._score_names()
        return [
            *first._see_stills(),
            *(f"mbarrier.wait({r.name}_full.index(0), 0)" for r in self.buffers if r.early),
            *self._read_columns_copied("0"),
            *turn,
            *first._multiply(lambda still: f"{still.name}_rows", "0", ""),
            *done,
            self._waited(0, scores, scores),
            *(f"mbarrier.arrive({r.name}_empty.index(0))" for r in self.buffers if not r.late),
            first._weigh_first(""),
        ]

    def _all_passes(self) -> list[str]:
        """The passes, after the first weights of the first and up to the last of the last."""
        lines = self.first._rest_of_loop()
        for before, after in pairwise(self.passes):
            lines += [*after._see_stills(), *after._initial(self._printer(""))[1:], f"tile = {self._head()}"]
            lines.append(self._cross_from(before, after))
            lines += [f"{name}_kept.index(group).store({name})" for name in before._sum_names()]
            lines += after._rest_of_loop()
        return lines

    def _take_kept(self) -> list[str]:
        return [f"{name} = {name}_kept.index(group).load(RESULT)" for name in self.kept]


AFTER = "gl.minimum(program, programs - 1)"
"""The place after this one; after a program's last some other, whose first weights are made for nothing: with a branch
around them, weights would come from two places, and the compiler would take them apart and join them again."""


class JoinedPasses(JoinedRows, Passes):
    """The same of a resident program. There is one place in shared memory for each operand that stays: the next rows'
    comes when the last pass that reads it is over, and before the first one that does begins again."""

    still_phase = "still_phase"

    def _check_fit(self) -> None:
        super()._check_fit()
        if any(x in self.last.stills for x in self.first.stills):
            raise Unsupported("the first pass over some rows reads what the last one over those before does")

    def _ending(self) -> list[str]:
        return [self._finish(), self._compute()]

    def _crossings(self) -> list[tuple[Pass, Pass]]:
        return [*super()._crossings(), (self.last, self.first)]

    def _load(self) -> str:
        first = self.first
        place = [
            *self._copy_passes(),
            *self._take_place(),
            *self._copy_pass(self.last, False, "tile", "stage", "phase"),
            *self._next_place("still_phase", loads=True),
            *self._next_still(),
            self._go_to(AFTER),
            f"tile = {self._head()}",
            *self._copy_begun(first),
            *self._stage_after(),
            *self._copy_pass(first, True, "tile", "next_stage", "next_phase"),
            *("stage = next_stage", "phase = next_phase"),
        ]
        lines = [
            '"""The loading warp: all tiles of a program\'s rows, pass by pass, in the order they are read."""',
            *("program = gl.program_id(0)", self._go_to("program"), f"tile = {self._head()}"),
            *(line for x in first.stills for line in first._copy_still(x)),
            *self._copy_pass(first, True, "tile", "0"),
            *("stage = 0", "phase = 1", *self._free_stills()),
            "while program < programs:",
            *indent(x for line in place for x in line.splitlines()),
        ]
        return function("load", self._load_arguments(), lines)

    def _copy_begun(self, x: Pass) -> list[str]:
        before = self.passes[: x.number]
        new = [r for r in x.stills if not any(r in y.stills for y in before)]
        return [line for r in new for line in self._copy_still(r)]

    def _left(self, x: Pass) -> list[Ring]:
        after = self.passes[x.number + 1 :]
        return [r for r in x.stills if not any(r in y.stills for y in after)]

    def _begin(self) -> list[str]:
        return [*self._read_columns_early("True"), *self._first_weights()]

    def _through(self) -> list[str]:
        return [*self.first._views(), *self._all_passes()]

    def _onward(self) -> list[str]:
        return [*self._at_place(AFTER), *self.first._see_stills(), self._cross_from(self.last, self.first)]

    def _other_still(self) -> list[str]:
        return ["still_phase ^= 1"]

    def _finish_arguments(self) -> list[str]:
        return [*super()._finish_arguments(), *(f"{name}_kept" for name in self.kept)]

    def _settle(self) -> list[str]:
        return [*self._take_kept(), *super()._settle()]


def _as_rows(x: Pass, arguments: list[str]) -> list[str]:
    """Arguments with a warpgroup's own rows where a function names the tiles that stay."""
    stills = {f"{r.name}_tile": f"{r.name}_rows" for r in x.stills}
    return [stills.get(a, a) for a in arguments]


class Pass(Overlapped):
    """What one pass computes: the plan of the whole, for some of its values."""

    def __init__(self, whole: Passes, names: frozenset[str], number: int) -> None:
        # what the whole has found out is right for its parts, but for what it says of all its values
        cached = {n for c in type(whole).__mro__ for n, x in vars(c).items() if isinstance(x, cached_property)}
        vars(self).update({n: x for n, x in vars(whole).items() if n not in cached})
        shape, self.whole, self.number = whole.shape, whole, number
        self.resident = 0  # what stays, the whole gives back, between the passes
        self.suffix = f"_{number + 1}" if number else ""
        self.statements = tuple(s for s in whole.statements if s.name in names)
        self.scores = tuple(s for s in whole.scores if s.name in names)
        self.rescales = tuple(r for r, x in zip(whole.rescales, shape.sums, strict=True) if x.state.name in names)
        self.shape = replace(
            shape,
            products=tuple(x for x in shape.products if x.score.name in names),
            sums=tuple(x for x in shape.sums if x.state.name in names),
            statements=tuple(s for s in shape.statements if s.name in names),
            states=tuple(s for s in shape.states if s.name in names),
            split=shape.split & names,
        )

    @cached_property
    def rings(self) -> tuple[Ring, ...]:
        """The operands of this pass, under the names that the first one's have."""
        early, late = [x.moving for x in self.shape.products], [x.values for x in self.shape.sums]
        own = [replace(self.whole.ring(x), early=x in early, late=x in late) for x in self.shape.moving]
        if self.number == 0:
            return tuple(own)
        return tuple(replace(r, name=b.name) for r, b in zip(own, self.whole.buffers, strict=False))

    @cached_property
    def stills(self) -> tuple[Ring, ...]:
        return tuple(r for r in self.whole.stills if r.operand in self.shape.stills)

    @property
    def kind(self) -> tuple[object, ...]:
        """What passes that share rings have in common."""
        rings = [(r.width, r.early, r.late) for r in self.rings]
        return rings, len(self.shape.moving), len(self.shape.products), len(self.shape.sums)

    def _see_stills(self) -> list[str]:
        return [*(f"mbarrier.wait({x.name}_full, {self.whole.still_phase})" for x in self.stills), *self._views()]

    def _views(self) -> list[str]:
        return [f"{x.name}_rows = {self._view(x, 'group', still=True)}" for x in self.stills]

    def _weigh_first(self, prefix: str) -> str:
        """The first scores to weights."""
        states, weights = self._state_names(), [f"{prefix}{w}" for w in self.weight_names.values()]
        place = [self._column(), *self._points(), *self._context()]
        passed = [*self._score_names(), *states, *place, *self._first_edges()]
        return call(self._made(weights), f"weigh{self.suffix}", passed)

    def _rest_of_loop(self) -> list[str]:
        """The iterations after the first scores."""
        passed = [*_as_rows(self, self._advance_arguments()), *self._edges(), "group"]
        advance = call(self._running(), f"advance{self.suffix}", passed)
        return self.whole._tiles_after([f"tile = {self.whole._step()}", *advance.splitlines()])
