"""Which loops the warp-specialised Hopper kernel can run, and what each of their statements is to it.

Comes in: a `LoopProgram`. Goes out: a `Form`, the statements of its one serial nest sorted by the part they play:

    scores     = rows @ moving.T           products over short ranks, on the tensor cores
    elementwise statements and row reductions, in registers, up to the weights
    accumulator = scale * accumulator + weights @ moving

Of both products there may be several, and one tensor may be an operand of more than one. Nothing here knows softmax:
the running values, their corrections and the weights are whatever the scans say. A loop with no scan but its
accumulator (sigmoid attention) is the simplest case. `Unsupported` says what does not fit.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.codegen.loops import LoopProgram, SerialNest
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite, State, Statement, TileLoop, guarded, may_be_infinite, tile_loop, with_fills
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, accesses, free_vars, var
from einscade.passes.fusion import is_long

__all__ = ["DTYPES", "Form", "Members", "Operand", "Product", "WeightedSum", "form", "nest_form", "written_tile"]

WIDTHS = (8, 256)
"""Least and greatest width of a row of an operand, in elements; a multiple of 8 elements is 16 bytes, the copy
engine's granule."""

DTYPES = ("bf16", "f16")


@dataclass(frozen=True)
class Operand:
    """A tensor read (or written) a tile at a time: the position of its row rank and of its width rank, and the index
    of every other dimension, an expression over grid ranks. It is `width` elements wide from `offset` on."""

    tensor: str
    row: int
    across: int
    offset: int
    width: int
    batch: tuple[tuple[int, Expr], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions as the copy engine sees them: rows and width last."""
        return (*(i for i, _ in self.batch), self.row, self.across)


@dataclass(frozen=True)
class Product:
    """`score = still @ moving.T`, a product along the short rank `e`."""

    score: Statement
    still: Operand
    moving: Operand
    e: str


@dataclass(frozen=True)
class WeightedSum:
    """`state = rescale * state + weights @ values`, as wide as the rank `f`; no `rescale`: None."""

    state: State
    weights: str
    values: Operand
    f: str
    rescale: Expr | None


@dataclass(frozen=True)
class Members:
    """A rank `rank = count * group + member`, all of whose members a program of the group goes through."""

    rank: str
    group: str
    count: int


@dataclass(frozen=True)
class Form:
    """`p`: the tiled grid rank; `m`: the coordinate of the loop.

    `statements` run between the products and the sums, in order. `split` names running sums that only the epilogue
    reads: each thread keeps its own part of them until then. results: the nest's outputs; written: those that are
    tiles, as operands; addressed: such tiles in f32, which are stored by address. keep: where points exist;
    always_guard: whether a tile without masks can hold infinite scores. members: those of a batch rank that there is an
    iteration for each of, if there are (`gluon_group`).
    """

    cascade: Cascade
    loop: TileLoop
    p: str
    m: str
    batch: tuple[str, ...]
    products: tuple[Product, ...]
    sums: tuple[WeightedSum, ...]
    statements: tuple[Statement, ...]
    states: tuple[State, ...]
    split: frozenset[str]
    epilogue: tuple[Statement, ...]
    results: tuple[str, ...]
    written: tuple[Operand, ...]
    addressed: tuple[Operand, ...]
    keep: Boolean
    always_guard: bool
    members: Members | None = None

    @cached_property
    def stills(self) -> tuple[Operand, ...]:
        """What is loaded once."""
        return tuple(dict.fromkeys(x.still for x in self.products))

    @cached_property
    def moving(self) -> tuple[Operand, ...]:
        """What is loaded once an iteration: the products' operands first."""
        return tuple(dict.fromkeys((*(x.moving for x in self.products), *(x.values for x in self.sums))))

    @cached_property
    def scores(self) -> tuple[str, ...]:
        return tuple(x.score.name for x in self.products)

    @property
    def dtype(self) -> str:
        return self.cascade.tensors[self.moving[0].tensor].dtype

    def extent(self, rank: str) -> Expr:
        return self.cascade.extent(rank)


def form(program: LoopProgram) -> Form:
    """The program's one nest as the kernel sees it. Raises `Unsupported` with the construct that does not fit."""
    if len(program.nests) != 1 or not isinstance(program.nests[0], SerialNest):
        raise Unsupported("the Hopper kernel runs one serial nest, and nothing before or after it")
    if program.views:
        raise Unsupported(f"{', '.join(program.views)} with ranks that are one of the result")
    return nest_form(program.cascade, program.nests[0])


@lru_cache(maxsize=64)
def nest_form(cascade: Cascade, nest: SerialNest) -> Form:
    """One of a planned cascade's nests as the kernel sees it, for all schedules. Raises as `form` does."""
    loop = tile_loop(cascade, nest)
    if loop.prologue:
        raise Unsupported(f"{loop.prologue[0].name} is computed before the loop")
    if len(loop.coordinates) != 1 or loop.limit is None or not loop.skippable:
        raise Unsupported("the loop does not run along one coordinate with a limit")
    (m,) = loop.coordinates
    always_guard = any(s.expr.has(Finite) for s in loop.body) and _reads_infinities(cascade, loop)
    body = _with_limit(loop, m)
    body, products, p = _products(cascade, nest, body, m)
    found = [_weighted_sum(cascade, loop, body, products, s, m) for s in body if _is_weighted(s, loop, m)]
    if not found:
        raise Unsupported(f"no product along {m} in the loop")
    sums = tuple(x for x, _ in found)
    accumulators = {x.state.name for x in sums}
    summed = {name for _, names in found for name in names}
    scores = {x.score.name for x in products}
    states = tuple(s for s in loop.states if s.name not in accumulators)
    statements = tuple(s for s in body if s.name not in summed | scores)
    _check_order(statements, summed | accumulators, m)
    operands = [o for x in products for o in (x.still, x.moving)] + [x.values for x in sums]
    if len(dtypes := sorted({cascade.tensors[o.tensor].dtype for o in operands})) > 1:
        raise Unsupported(f"operands in {' and '.join(dtypes)}")
    written, addressed = _written(cascade, nest, loop.epilogue, p, [x.f for x in sums])
    return Form(
        cascade,
        loop,
        p,
        m,
        tuple(r for r in nest.grid if r != p),
        products,
        sums,
        statements,
        states,
        _split(states, statements, [x.rescale for x in sums if x.rescale is not None], m),
        loop.epilogue,
        nest.outputs,
        written,
        addressed,
        And(*{c for s in body for c in And.make_args(s.keep) if m in free_vars(c)}) if body else sympy.true,
        always_guard,
    )


# -- masks ------------------------------------------------------------------------------------------------------------


def _with_limit(loop: TileLoop, m: str) -> list[Statement]:
    """The body with the end of the coordinate as part of every mask: a tile here may reach beyond it."""
    assert loop.limit is not None
    inside = sympy.Lt(var(m), loop.limit)
    body = list(loop.body)
    if not may_be_infinite(body, ()):  # a tile may hold no point at all, as soon as the limit can be 0
        maxima = {s.name for s in body if s.monoid in ("max", "min")}
        maxima |= {state.new for state in loop.states if state.init.is_infinite}
        if not any(s.expr.has(Finite) for s in body):
            body = guarded(body, maxima, lambda prefix: prefix)
    return with_fills(
        [
            replace(
                s,
                keep=And(s.keep, inside) if m in s.iterated else s.keep,
                row=And(s.row, inside) if m in s.ranks else s.row,
                fill=None,
                mask_operand=False,
            )
            for s in _named_weights(body, loop, m)
        ]
    )


def _named_weights(body: Sequence[Statement], loop: TileLoop, m: str) -> list[Statement]:
    """Where a product with an input has an expression for its other operand, that expression as a value of its own."""
    named: list[Statement] = []
    for s in body:
        parts = sympy.Mul.make_args(s.expr)
        moving = [x for x in parts if x in _wide(s, loop, m)] if _is_weighted(s, loop, m) else []
        rest = sympy.Mul(*(x for x in parts if x not in moving))
        if len(moving) == 1 and not isinstance(rest, Access):
            own = [r for r in s.ranks if r in free_vars(moving[0]) and r not in free_vars(rest)]
            ranks = (*(r for r in s.ranks if r not in own or r in loop.nest.grid), m)
            name = f"{s.name}_weights"
            named.append(Statement(name, ranks, rest, keep=s.keep, row=s.keep))
            s = replace(s, expr=moving[0] * Access(name, *map(var, ranks)))
        named.append(s)
    return named


def _reads_infinities(cascade: Cascade, loop: TileLoop) -> bool:
    """Whether a full tile can hold infinite scores: constants in the expressions, or inputs added to them."""
    bare = [replace(s, keep=sympy.true) for s in loop.body]
    return may_be_infinite(bare, (t.name for t in cascade.inputs))


# -- the products -----------------------------------------------------------------------------------------------------


def _products(
    cascade: Cascade, nest: SerialNest, body: list[Statement], m: str
) -> tuple[list[Statement], tuple[Product, ...], str]:
    """The body, with a score that is only scaled under the name of what scales it, its products, and the tiled rank."""
    found = [s for s in body if s.monoid == "sum" and m in s.ranks]
    if not found:
        raise Unsupported("no product along a short rank in the loop")
    products = []
    rows = set()
    for s in found:
        product, p = _product(cascade, nest, s, m)
        body, score = _joined(body, s)
        products.append(replace(product, score=score))
        rows.add(p)
    if len(rows) > 1:
        raise Unsupported(f"the products have rows along {', '.join(sorted(rows))}")
    return body, tuple(products), rows.pop()


def _product(cascade: Cascade, nest: SerialNest, s: Statement, m: str) -> tuple[Product, str]:
    """A statement as a product, and the rank of its rows."""
    if len(s.reduced) != 1 or is_long(cascade, s.reduced[0]):
        raise Unsupported(f"{s.name} reduces {', '.join(s.reduced)}: one rank of constant width is needed")
    (e,) = s.reduced
    both, _ = _factors(s.expr, e)
    if len(both) != 2 or not all(isinstance(x, Access) and x.tensor in nest.inputs for x in both):
        raise Unsupported(f"{s.name} is no product of two inputs along {e}")
    moving = [a for a in both if m in free_vars(a)]
    still = [a for a in both if a not in moving]
    if len(moving) != 1:
        raise Unsupported(f"{s.name}: exactly one operand has to move with {m}")
    own = [r for r in nest.grid if var(r) in still[0].index and r not in free_vars(moving[0])]
    long = [r for r in own if is_long(cascade, r)] or sorted(own, key=lambda r: -int(cascade.extent(r)))[:1]
    if len(long) != 1:
        raise Unsupported(f"{s.name}: {still[0].tensor} needs one long rank of its own, it has {len(long)}")
    (p,) = long
    return Product(s, _operand(cascade, still[0], p, e), _operand(cascade, moving[0], m, e), e), p


def _joined(body: list[Statement], score: Statement) -> tuple[list[Statement], Statement]:
    """A value that is the score times a number, and its only reader, is the score."""
    access = Access(score.name, *map(var, score.ranks))
    readers = [s for s in body if any(a.tensor == score.name for a in s.reads)]
    if len(readers) != 1 or readers[0].ranks != score.ranks or readers[0].monoid is not None:
        return body, score
    (reader,) = readers
    number, rest = reader.expr.as_coeff_Mul()
    if rest != access or not number.is_number or reader.keep != score.keep:
        return body, score
    expr = score.expr * (1 if float(number) == 1 else number)
    joined = replace(score, name=reader.name, expr=expr, row=reader.row, fill=reader.fill)
    return [joined if s is reader else s for s in body if s is not score], joined


def _factors(expr: Expr, rank: str) -> tuple[list[Expr], Expr]:
    parts = sympy.Mul.make_args(expr)
    return [x for x in parts if rank in free_vars(x)], sympy.Mul(*(x for x in parts if rank not in free_vars(x)))


def _operand(cascade: Cascade, access: Access, row: str, width: str, dtypes: Sequence[str] = DTYPES) -> Operand:
    t = cascade.tensors[access.tensor]
    if t.dtype not in dtypes or t.layout.kind != "dense":
        raise Unsupported(f"{t.name} is {t.layout.kind} {t.dtype}; the kernel reads dense {' or '.join(DTYPES)}")
    index = list(access.index)
    wide = [i for i, x in enumerate(index) if width in free_vars(x)]
    if index.count(var(row)) != 1 or len(wide) != 1 or not (index[wide[0]] - var(width)).is_Integer:
        raise Unsupported(f"{access} is not indexed by {row} and {width} themselves")
    at, across = index.index(var(row)), wide[0]
    others = [(i, x) for i, x in enumerate(index) if i not in (at, across)]
    if any({row, width} & free_vars(x) or x.has(Access) for _, x in others):
        raise Unsupported(f"{access}: an index that gathers or mixes {row} or {width}")
    extent = cascade.extent(width)
    if not extent.is_Integer or int(extent) % 8 or not WIDTHS[0] <= int(extent) <= WIDTHS[1]:
        raise Unsupported(f"{t.name} has width {extent}; the copy engine needs a multiple of 8 up to {WIDTHS[1]}")
    if len(index) > 5:
        raise Unsupported(f"{t.name} has {len(index)} dimensions; the copy engine takes 5")
    return Operand(t.name, at, across, int(index[across] - var(width)), int(extent), tuple(others))


def _is_weighted(s: Statement, loop: TileLoop, m: str) -> bool:
    """Whether a statement multiplies with a tile of an input: one that has a rank besides the loop's and the grid's."""
    return s.monoid == "sum" and s.reduced == (m,) and bool(_wide(s, loop, m))


def _wide(s: Statement, loop: TileLoop, m: str) -> list[Access]:
    """The reads of inputs along `m` that have a rank of the result outside of the grid."""
    own = set(s.ranks) - set(loop.nest.grid)
    inputs = [a for a in accesses(s.expr) if a.tensor in loop.nest.inputs]
    return [a for a in inputs if m in free_vars(a) and own & free_vars(a)]


def _weighted_sum(
    cascade: Cascade, loop: TileLoop, body: Sequence[Statement], products: Sequence[Product], s: Statement, m: str
) -> tuple[WeightedSum, tuple[str, str]]:
    """A product of weights and values as a sum that runs along, and the names of the two statements that it is."""
    both, rest = _factors(s.expr, m)
    weights = [x for x in both if isinstance(x, Access) and x.tensor not in loop.nest.inputs]
    values = [x for x in both if isinstance(x, Access) and x.tensor in loop.nest.inputs]
    if len(both) != 2 or len(weights) != 1 or len(values) != 1 or rest != 1:
        raise Unsupported(f"{s.name} is no product of a value of the loop and an input")
    if s.mask_operand:
        raise Unsupported(f"{s.name}: its weights are not zero where points are missing")
    own = [r for r in s.ranks if r in free_vars(values[0]) and r not in free_vars(weights[0])]
    if len(own) != 1:
        raise Unsupported(f"{s.name}: {values[0].tensor} needs one width rank, it has {len(own)}")
    (f,) = own
    users = [t for t in body if any(a.tensor == s.name for a in t.reads)]
    state = next((x for x in loop.states if len(users) == 1 and users[0].name == x.new), None)
    if state is None:
        raise Unsupported(f"{s.name} is not added to a running sum")
    before, product = Access(state.name, *map(var, state.ranks)), Access(s.name, *map(var, s.ranks))
    expr = sympy.expand(users[0].expr)
    rescale = expr.coeff(before)
    if sympy.expand(expr - rescale * before - product) != 0 or state.init != 0 or f in free_vars(rescale):
        raise Unsupported(f"{state.name} is no sum with a factor for each row")
    if any(a.tensor == state.name for t in body for a in t.reads if t is not users[0]):
        raise Unsupported(f"{state.name} is read within the loop")
    if any(i not in map(var, products[0].score.ranks) for i in weights[0].index):
        raise Unsupported(f"{s.name} reads {weights[0]} at another place than {products[0].score.name}'s")
    operand = _operand(cascade, values[0], m, f)
    found = WeightedSum(state, weights[0].tensor, operand, f, None if rescale == 1 else rescale)
    return found, (s.name, users[0].name)


def _check_order(statements: Sequence[Statement], sums: Container[str], m: str) -> None:
    for s in statements:
        if any(a.tensor in sums for a in s.reads):
            raise Unsupported(f"{s.name} reads a weighted sum within the loop")
        if s.reduced and s.reduced != (m,):
            raise Unsupported(f"{s.name} reduces {', '.join(s.reduced)}")
        if s.monoid not in (None, "sum", "max", "min"):
            raise Unsupported(f"{s.name} reduces with {s.monoid}")


def _split(
    states: Sequence[State], statements: Sequence[Statement], rescales: Sequence[Expr], m: str
) -> frozenset[str]:
    """Running sums `x = c*x + sum(m) tile` that nothing in the loop reads: a sum is linear, so the threads of a row can
    keep their parts apart until the loop is over."""
    found = set()
    for state in states:
        update = next(s for s in statements if s.name == state.new)
        readers = [
            s for s in statements if any(a.tensor in (state.name, state.new) for a in s.reads) and s is not update
        ]
        before = Access(state.name, *map(var, state.ranks))
        expr = sympy.expand(update.expr)
        rest = sympy.expand(expr - expr.coeff(before) * before)
        local = next((s for s in statements if isinstance(rest, Access) and s.name == rest.tensor), None)
        linear = local is not None and local.monoid == "sum" and local.reduced == (m,) and state.init == 0
        once = local is not None and sum(any(a.tensor == local.name for a in s.reads) for s in statements) == 1
        uses = any(a.tensor in (state.name, state.new) for x in rescales for a in accesses(x))
        if linear and once and not readers and not uses and m not in free_vars(expr.coeff(before)):
            found.add(state.name)
    return frozenset(found)


def written_tile(cascade: Cascade, name: str, p: str, across: str) -> Operand:
    """A result as tiles along `p`."""
    t = cascade.tensors[name]
    return _operand(cascade, Access(name, *map(var, t.ranks)), p, across, (*DTYPES, "f32"))


# -- what comes out ---------------------------------------------------------------------------------------------------


def _written(
    cascade: Cascade, nest: SerialNest, epilogue: Sequence[Statement], p: str, widths: Sequence[str]
) -> tuple[tuple[Operand, ...], tuple[Operand, ...]]:
    """The outputs that are tiles, and those that are tiles in f32; the others have to be one value a row."""
    made = {s.name for s in epilogue}
    tiles: list[Operand] = []
    wide: list[Operand] = []
    for name in nest.outputs:
        t = cascade.tensors[name]
        if name not in made:
            raise Unsupported(f"{name} leaves the loop without an epilogue")
        across = [f for f in dict.fromkeys(widths) if f in t.ranks]
        if len(across) == 1 and t.dtype in (*DTYPES, "f32"):
            operand = written_tile(cascade, name, p, across[0])
            (tiles if t.dtype in DTYPES else wide).append(operand)
        elif p not in t.ranks or set(t.ranks) - set(nest.grid):
            raise Unsupported(f"the output {name} is not one value a row, nor a tile in {' or '.join(DTYPES)}")
    if not tiles and not wide:
        raise Unsupported(f"an output over {p} and a width is needed")
    for s in epilogue:
        if s.monoid is not None:
            raise Unsupported(f"{s.name} reduces after the loop")
    return tuple(tiles), tuple(wide)
