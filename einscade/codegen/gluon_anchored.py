"""The Gluon emitter for softmax whose reference stays: what the first tile of a row's loop gave it.

Comes in: what `gluon_overlap` and `gluon_joined` take, with a schedule that says `anchored`. Goes out: a module of two
kernels. A cascade in one pass carries a reference G and corrects what it has summed where G moves,

    f(x, G') = c(G, G') f(x, G)

for any G and G': the running maximum is one choice, which keeps exp(S - G) from overflow. Weights in bfloat16 and sums
in float32 reach to 2**127, and rounding is relative, so that a row's result is as exact with the maximum of its first
tile (c = 1 from there on): no maxima, no corrections, and weights that wait for nothing but their scores. What a row
loses that way shows in its sum of weights, which bounds each of them: a row whose sum leaves `RANGE`, or whose results
are not finite, leaves a mark. Behind the kernel stands the ordinary one; it does everything again where there is a
mark, and else ends at once.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import sympy

from einscade.codegen.base2 import Exp2
from einscade.codegen.gluon_form import Form
from einscade.codegen.gluon_joined import Joined
from einscade.codegen.gluon_overlap import Overlapped
from einscade.codegen.gluon_plan import GROUP_ROWS
from einscade.codegen.gluon_text import TURN, indent, marked, wrapped
from einscade.codegen.gluon_values import Printer, Value
from einscade.codegen.overlap import GLUON_GO, GLUON_WAIT, OPTION
from einscade.codegen.schedule import Schedule
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite, State, Statement
from einscade.ir.expr import Access, Expr, accesses, var

__all__ = ["Anchored", "AnchoredJoined", "anchors"]

BEHIND = f"num_warps=4, {OPTION},"
"""How a kernel is launched before that in front of it has ended."""

RANGE = (2.0**-60, 2.0**60)
"""Where a row's sum of weights must be. Above, values of 2**67 would overflow; below, weights that count would be 0."""


@lru_cache(maxsize=64)
def anchors(shape: Form) -> tuple[State, ...]:
    """The running values that may stay what the first tile gave them: the extrema of a form in which all weights are
    exponentials, and one running value is their sum. Empty where the results depend on them otherwise."""
    made = {s.name: s for s in shape.statements}
    found = tuple(s for s in shape.states if isinstance(made[s.new].expr, (sympy.Max, sympy.Min)))
    weights = {x.weights for x in shape.sums}
    if not found or len(weights) != 1 or shape.dtype != "bf16" or _bound(shape) is None:
        return ()
    if not isinstance(made[weights.pop()].expr, (sympy.exp, Exp2)):
        return ()
    statements, rescales = frozen(shape.statements, [x.rescale for x in shape.sums], found)
    kept = {s.name: s for s in statements}
    moved = [s for s in shape.states if s not in found and s.name not in {a.tensor for a in kept[s.new].reads}]
    still = all(_constant(kept[s.new].expr, s) for s in shape.states if s not in found)
    return found if still and not moved and set(rescales) == {None} and _invariant(shape, found) else ()


def _constant(expr: Expr, state: State) -> bool:
    """Whether an update adds to a running value, and no more."""
    return bool(expr.coeff(Access(state.name, *map(var, state.ranks))) == 1)


def _bound(shape: Form) -> State | None:
    """The running sum of all weights."""
    made = {s.name: s for s in shape.statements}
    weights = {x.weights for x in shape.sums}
    for state in shape.states:
        added = [made[a.tensor] for a in made[state.new].reads if a.tensor in made]
        sums = [s for s in added if s.monoid == "sum" and {a.tensor for a in accesses(s.expr)} == weights]
        read = any(a.tensor == state.name for s in shape.epilogue for a in s.reads)
        if state.name in shape.split and sums and isinstance(sums[0].expr, Access) and read:
            return state
    return None


def _invariant(shape: Form, found: Sequence[State]) -> bool:
    """Whether what follows the loop is the same for all references: with c = exp(G - H) it is the same of c N, c Z and
    H as of N, Z and G."""
    before, after = ({s.name: sympy.Symbol(f"{s.name}{mark}", real=True) for s in found} for mark in ("", "'"))
    c = sympy.exp(sum(before.values()) - sum(after.values()))
    others = [x.state for x in shape.sums] + [s for s in shape.states if s not in found]
    sums = {s.name: sympy.Symbol(s.name, positive=True) for s in others}
    for s in shape.epilogue:
        old = s.expr.replace(lambda x: isinstance(x, Access), lambda a: {**sums, **before}.get(a.tensor, a))
        new = old.xreplace({x: c * x for x in sums.values()} | {before[n]: after[n] for n in before})
        if sympy.expand_log(sympy.simplify(new - old), force=True).expand() != 0:
            return False
    return len(found) == 1


def frozen(
    statements: Sequence[Statement], rescales: Sequence[Expr | None], found: Sequence[State]
) -> tuple[tuple[Statement, ...], tuple[Expr | None, ...]]:
    """The statements of a tile, and the factors of sums (None: 1), with running values that do not move, and are
    finite. Statements that only these read are still there."""
    moved, references = {s.new: s.name for s in found}, {s.name for s in found}
    known: dict[Expr, Expr] = {}

    def stays(expr: Expr) -> Expr:
        expr = expr.replace(lambda x: _reads(x, moved), lambda a: Access(moved[a.tensor], *a.index))
        expr = expr.replace(lambda x: isinstance(x, Finite) and _reads(x.args[0], references), lambda x: x.args[0])
        expr = expr.xreplace(known)
        return expr.replace(lambda x: isinstance(x, (Exp2, sympy.exp)) and x.args[0] == 0, lambda _: sympy.Integer(1))

    kept: list[Statement] = []
    for s in statements:
        if s.name in moved:
            continue
        expr = stays(s.expr)
        if s.monoid is None and (expr == 1 or _reads(expr, references)):
            known[Access(s.name, *map(var, s.ranks))] = expr
        else:
            kept.append(replace(s, expr=expr))
    factors = (stays(x) if x is not None else sympy.Integer(1) for x in rescales)
    return tuple(kept), tuple(None if x == 1 else x for x in factors)


def _reads(x: sympy.Basic, tensors: Container[str]) -> bool:
    return isinstance(x, Access) and x.tensor in tensors


def _needed(statements: Sequence[Statement], ends: Iterable[str]) -> tuple[Statement, ...]:
    """The statements that make these values."""
    made = {s.name: s for s in statements}
    found: set[str] = set()
    rest = [x for x in ends if x in made]
    while rest:
        s = made[rest.pop()]
        found.add(s.name)
        rest += [a.tensor for e in (s.expr, s.keep, s.row) for a in accesses(e) if a.tensor in {*made} - found]
    return tuple(s for s in statements if s.name in found)


class After(Overlapped):
    """The tiles behind the first one of a kernel, whose references are what it found there."""

    suffix = "_on"

    def __init__(self, whole: Overlapped) -> None:
        cached = {n for c in type(whole).__mro__ for n, x in vars(c).items() if isinstance(x, cached_property)}
        vars(self).update({n: x for n, x in vars(whole).items() if n not in cached})
        self.whole, self.references = whole, anchors(whole.shape)
        statements, self.rescales = frozen(whole.statements, whole.rescales, self.references)
        states = tuple(s for s in whole.shape.states if s not in self.references)
        weights = [x.weights for x in whole.shape.sums]
        self.statements = _needed(statements, [*weights, *(s.new for s in states)])
        self.shape = replace(whole.shape, states=states)

    def _context(self) -> list[str]:
        return [*super()._context(), *(self.name(s.name) for s in self.references)]

    def _printer(self, guard: str) -> Printer:
        printer = super()._printer(guard)
        printer.names |= {s.name: Value(self.name(s.name), (self.shape.p,)) for s in self.references}
        return printer

    def _hold(self) -> list[str]:
        return []

    def _hold_within(self) -> list[str]:
        """The wait for the sums comes behind a quarter of the weights, which wait for nothing but their scores: no sum
        is corrected behind it, and all that it keeps back are the tiles. Three warpgroups are faster without."""
        if self.whole._waits_soon() or self.groups > 2:
            return []
        self.used |= {"hold_parts", "quarter", "row_parts"}
        weights = self.name(self.shape.sums[0].weights)
        return [f"hold_parts(gl.sum(quarter({weights}).reshape([64, STEP // 32, 8]), axis=1))"]

    @property
    def leaves_within(self) -> bool:
        return self.whole.leaves_within

    def _pack(self) -> list[str]:
        return self.whole._pack()

    def _advanced(
        self, last: str, masked: Sequence[str], name: str = "advance", others: Mapping[str, str] | None = None,
        results: Sequence[str] | None = None,
    ) -> list[str]:  # fmt: skip
        return super()._advanced(last, masked, f"{name}{self.suffix}", others, results)


class Marking(Overlapped):
    """A kernel with a counter of places, a mark that says whether there are others, and one for each tile of rows."""

    def _marks(self) -> list[str]:
        return ["mark_to"]

    def _mark(self) -> str:
        """The place of the mark of the present rows."""
        printer, shape = self._scalar_printer(), self.shape
        at = "0"
        for r in shape.batch:
            at = r if at == "0" else f"({at}) * {printer.value(shape.extent(r)).atom()} + {r}"
        row_tiles = f"gl.cdiv({printer.value(shape.extent(shape.p)).code}, {self.rows})"
        return f"mark_to + 2 + ({at}) * {row_tiles} + row // {self.rows}"


class Again(Marking):
    """The ordinary kernel, for rows with a mark."""

    @property
    def dynamic(self) -> bool:
        return False

    def _load_arguments(self) -> list[str]:
        return [*super()._load_arguments(), *self._marks()]

    def _listing_parts(self) -> list[str]:
        return []  # the lists are there

    def _begun(self) -> list[str]:
        return [GLUON_WAIT, "programs = programs * gl.load(mark_to + 1)"]

    def _each_place(self, lines: Sequence[str], loads: bool = False) -> list[str]:
        head, *body = super()._each_place([], loads)
        return [head, *body, f"    if gl.load({self._mark()}) > 0:", *indent(indent(lines))]


class Anchored(Marking):
    """A resident program, a tile of rows after another."""

    def __init__(self, shape: Form, schedule: Schedule) -> None:
        if not schedule.resident or not anchors(shape):
            raise Unsupported("no reference of resident programs that may stay")
        super().__init__(shape, schedule)

    @cached_property
    def after(self) -> After:
        return After(self)

    def _begun(self) -> list[str]:
        return [GLUON_GO]

    def parts(self) -> list[str]:
        again = Again(self.shape, replace(self.schedule, anchored=False, joined=False))
        return [*super().parts(), marked("\n\n\n".join(again.parts()), "_again")]

    def _steps(self) -> list[str]:
        """The functions of an iteration."""
        return [self._weigh(), self.after._weigh(), self.after._advance()]

    def _functions(self) -> list[str]:
        turn = [TURN.strip("\n")] if self.groups > 1 else []
        load = [self._load(), *map(self._reader, self.tables)]
        return [*turn, self._place(), *load, *self._steps(), self._compute(), self._kernel()]

    def _anchor(self) -> list[str]:
        """Behind the first tile."""
        self.used.add("finite")
        return [f"{name} = finite({name})" for name in (self.name(s.name) for s in self.after.references)]

    def _all_tiles(self) -> list[str]:
        return [*self._first_tile(), *self._anchor(), *self.after._loop(), *self._last_sums()]

    def _after(self) -> list[str]:
        return [*super()._after(), *self._leave_mark()]

    def _leave_mark(self) -> list[str]:
        """A mark, where a row has lost something."""
        bound, p = _bound(self.shape), self.shape.p
        assert bound is not None
        z, (least, most) = self.name(bound.name), RANGE
        results = " + ".join(f"{self.name(x.tensor)} * 0.0" for x in self.shape.written)
        end = self._scalar_printer().value(self.shape.extent(p)).code
        return [
            f"sound = ({z} >= {least!r}) & ({z} <= {most!r}) & (gl.sum({results}, axis=1) == 0)",
            f"lost = ({p}_ < {end}) & (sound == 0)",
            f"mark = gl.full([{GROUP_ROWS}], 1, gl.int32, RESULT_ROW)",
            f"gl.store(mark_to + 1 + 0 * {p}_, mark, mask=lost)",
            f"gl.store({self._mark()} + 0 * {p}_, mark, mask=lost)",
        ]

    # -- the host's part --

    def _cleared(self) -> str:
        """Marks are behind the counter of places taken, if there is one."""
        return "programs + 2"

    def _counters(self, device: str) -> list[str]:
        if self.dynamic and self.listed:
            return ["mark_to = taken"]
        names = "mark_to = taken" if self.counting else "mark_to"
        return [f"{names} = torch.zeros({self._cleared()}, dtype=torch.int32, device={device})"]

    def _launches(self, maps: Sequence[str], others: Sequence[str]) -> list[str]:
        flags = [f"{flag}={flag}" for flag in self._table_flags()]
        again = [x for x in others if x != "taken"]
        lines = ["    maps = (", *(f"        {m}," for m in maps), "    )"]
        for kernel, given, options in (("kernel", others, self._options()), ("kernel_again", again, BEHIND)):
            arguments = ", ".join(["*maps", *given, *flags, options])
            lines += [f"    {kernel}[({self._grid()},)](", *wrapped(arguments, 8), "    )"]
        return lines


class AnchoredJoined(Anchored, Joined):
    """The same, whose tiles of rows run into one another."""

    def _functions(self) -> list[str]:
        *others, compute, kernel = Joined._functions(self)
        return [*others, self.after._weigh(), self.after._advance(), compute, kernel]

    def _through(self) -> list[str]:
        left = [f"mbarrier.arrive({x.name}_empty.index(still_phase))" for x in self.stills]
        step = self.after._advanced("", self._edges())
        return [*self._views(), *self._anchor(), *self._walk(), *indent(step), *left]
