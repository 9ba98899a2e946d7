"""Which loops the warp-specialised Hopper kernel can run, and what each of their statements is to it.

Comes in: a `LoopProgram`. Goes out: a `Form`, the statements of its one serial nest sorted by the part they play:

    scores     = rows @ moving.T           one product over a short rank, on the tensor cores
    elementwise statements and row reductions, in registers, up to the weights
    accumulator = scale * accumulator + weights @ values

Nothing here knows softmax: the running values, their corrections and the weights are whatever the scans say. A loop
with no scan but its accumulator (sigmoid attention) is the simplest case. `Unsupported` says what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import And, Boolean

from einscade.codegen.loops import LoopProgram, SerialNest, is_long
from einscade.codegen.source import Unsupported
from einscade.codegen.tiles import Finite, State, Statement, TileLoop, guarded, may_be_infinite, tile_loop, with_fills
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, accesses, free_vars, var

__all__ = ["Form", "Operand", "form"]

WIDTHS = (8, 256)
"""Least and greatest width of a row of an operand, in elements; a multiple of 8 elements is 16 bytes, the copy
engine's granule."""

DTYPES = ("bf16", "f16")


@dataclass(frozen=True)
class Operand:
    """A tensor read (or written) a tile at a time: the position of its row rank and of its width rank, and the index
    of every other dimension, an expression over grid ranks."""

    tensor: str
    row: int
    width: int
    batch: tuple[tuple[int, Expr], ...]


@dataclass(frozen=True)
class Form:
    """`p`: the tiled grid rank; `m`: the coordinate of the loop; `e`, `f`: the widths of the two products.

    score: the first product; weights: the name of the value that the second one reads. `statements` run between the
    two, in order; `accumulator` is the state that the second product adds to, after scaling it by `rescale` (None: not
    at all). `split` names running sums that only the epilogue reads: each thread keeps its own part of them until
    then. keep: where points exist; always_guard: whether a tile without masks can hold infinite scores.
    """

    cascade: Cascade
    loop: TileLoop
    p: str
    m: str
    e: str
    f: str
    batch: tuple[str, ...]
    queries: Operand
    keys: Operand
    values: Operand
    score: Statement
    statements: tuple[Statement, ...]
    weights: str
    accumulator: State
    rescale: Expr | None
    states: tuple[State, ...]
    split: frozenset[str]
    epilogue: tuple[Statement, ...]
    results: tuple[str, ...]
    result: Operand
    keep: Boolean
    always_guard: bool

    @property
    def dtype(self) -> str:
        return self.cascade.tensors[self.keys.tensor].dtype

    def extent(self, rank: str) -> Expr:
        return self.cascade.extent(rank)

    def width(self, rank: str) -> int:
        return int(self.cascade.extent(rank))


def form(program: LoopProgram) -> Form:
    """The program's one nest as the kernel sees it. Raises `Unsupported` with the construct that does not fit."""
    if len(program.nests) != 1 or not isinstance(program.nests[0], SerialNest):
        raise Unsupported("the Hopper kernel runs one serial nest, and nothing before or after it")
    nest = program.nests[0]
    cascade = program.cascade
    loop = tile_loop(cascade, nest)
    if loop.prologue:
        raise Unsupported(f"{loop.prologue[0].name} is computed before the loop")
    if len(loop.coordinates) != 1 or loop.limit is None or not loop.skippable:
        raise Unsupported("the loop does not run along one coordinate with a limit")
    (m,) = loop.coordinates
    always_guard = any(s.expr.has(Finite) for s in loop.body) and _reads_infinities(cascade, loop)
    body = _with_limit(loop, m)
    score, queries, keys, p, e = _score(cascade, nest, body, m)
    body, score = _joined(body, score)
    product, accumulator, weights, values, f, rescale = _accumulation(cascade, loop, body, score, m)
    update = next(s for s in body if s.name == accumulator.new)
    states = tuple(s for s in loop.states if s is not accumulator)
    statements = tuple(s for s in body if s not in (score, product, update))
    _check_order(statements, product, accumulator, p, m)
    results, result = _results(cascade, nest, loop.epilogue, p, f)
    return Form(
        cascade,
        loop,
        p,
        m,
        e,
        f,
        tuple(r for r in nest.grid if r != p),
        queries,
        keys,
        values,
        score,
        statements,
        weights,
        accumulator,
        rescale,
        states,
        _split(states, statements, rescale, p, m),
        loop.epilogue,
        results,
        result,
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
        moving = [x for x in parts if isinstance(x, Access) and x.tensor in loop.nest.inputs and m in free_vars(x)]
        rest = sympy.Mul(*(x for x in parts if x not in moving))
        if s.monoid == "sum" and s.reduced == (m,) and len(moving) == 1 and not isinstance(rest, Access):
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


# -- the two products -------------------------------------------------------------------------------------------------


def _score(
    cascade: Cascade, nest: SerialNest, body: Sequence[Statement], m: str
) -> tuple[Statement, Operand, Operand, str, str]:
    found = [s for s in body if s.monoid == "sum" and m in s.ranks]
    if len(found) != 1:
        raise Unsupported(f"{len(found)} products along a short rank in the loop; the kernel runs one")
    (s,) = found
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
    long = [r for r in nest.grid if is_long(cascade, r) and r in free_vars(still[0]) and r not in free_vars(moving[0])]
    if len(long) != 1:
        raise Unsupported(f"{s.name}: {still[0].tensor} needs one long rank of its own, it has {len(long)}")
    (p,) = long
    return s, _operand(cascade, still[0], p, e), _operand(cascade, moving[0], m, e), p, e


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


def _operand(cascade: Cascade, access: Access, row: str, width: str) -> Operand:
    t = cascade.tensors[access.tensor]
    if t.dtype not in DTYPES or t.layout.kind != "dense":
        raise Unsupported(f"{t.name} is {t.layout.kind} {t.dtype}; the kernel reads dense {' or '.join(DTYPES)}")
    index = list(access.index)
    if index.count(var(row)) != 1 or index.count(var(width)) != 1:
        raise Unsupported(f"{access} is not indexed by {row} and {width} themselves")
    at, across = index.index(var(row)), index.index(var(width))
    others = [(i, x) for i, x in enumerate(index) if i not in (at, across)]
    if any({row, width} & free_vars(x) or x.has(Access) for _, x in others):
        raise Unsupported(f"{access}: an index that gathers or mixes {row} or {width}")
    extent = cascade.extent(width)
    if not extent.is_Integer or int(extent) % 8 or not WIDTHS[0] <= int(extent) <= WIDTHS[1]:
        raise Unsupported(f"{t.name} has width {extent}; the copy engine needs a multiple of 8 up to {WIDTHS[1]}")
    if len(index) > 5:
        raise Unsupported(f"{t.name} has {len(index)} dimensions; the copy engine takes 5")
    return Operand(t.name, at, across, tuple(others))


def _accumulation(
    cascade: Cascade, loop: TileLoop, body: Sequence[Statement], score: Statement, m: str
) -> tuple[Statement, State, str, Operand, str, Expr | None]:
    found = [s for s in body if s.monoid == "sum" and s.reduced == (m,) and _reads_input(s, loop)]
    if len(found) != 1:
        raise Unsupported(f"{len(found)} products along {m} in the loop; the kernel runs one")
    (s,) = found
    both, rest = _factors(s.expr, m)
    weights = [x for x in both if isinstance(x, Access) and x.tensor not in loop.nest.inputs]
    values = [x for x in both if isinstance(x, Access) and x.tensor in loop.nest.inputs]
    if len(both) != 2 or len(weights) != 1 or len(values) != 1 or rest != 1:
        raise Unsupported(f"{s.name} is no product of a value of the loop and an input")
    if s.mask_operand:
        raise Unsupported(f"{s.name}: its weights are not zero where points are missing")
    own = [r for r in s.ranks if var(r) in values[0].index and r not in free_vars(weights[0])]
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
    if any(i not in map(var, score.ranks) for i in weights[0].index):
        raise Unsupported(f"{s.name} reads {weights[0]} at another place than {score.name}'s")
    operand = _operand(cascade, values[0], m, f)
    return s, state, weights[0].tensor, operand, f, None if rescale == 1 else rescale


def _reads_input(s: Statement, loop: TileLoop) -> bool:
    return any(a.tensor in loop.nest.inputs and set(s.reduced) & free_vars(a) for a in accesses(s.expr))


def _check_order(statements: Sequence[Statement], product: Statement, accumulator: State, p: str, m: str) -> None:
    made = {product.name, accumulator.name, accumulator.new}
    for s in statements:
        if any(a.tensor in made for a in s.reads):
            raise Unsupported(f"{s.name} reads {product.name} within the loop")
        if s.reduced and s.reduced != (m,):
            raise Unsupported(f"{s.name} reduces {', '.join(s.reduced)}")
        if s.monoid not in (None, "sum", "max", "min"):
            raise Unsupported(f"{s.name} reduces with {s.monoid}")


def _split(
    states: Sequence[State], statements: Sequence[Statement], rescale: Expr | None, p: str, m: str
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
        uses = rescale is not None and any(a.tensor in (state.name, state.new) for a in accesses(rescale))
        if linear and once and not readers and not uses and m not in free_vars(expr.coeff(before)):
            found.add(state.name)
    return frozenset(found)


# -- what comes out ---------------------------------------------------------------------------------------------------


def _results(
    cascade: Cascade, nest: SerialNest, epilogue: Sequence[Statement], p: str, f: str
) -> tuple[tuple[str, ...], Operand]:
    made = {s.name for s in epilogue}
    tiles = []
    for name in nest.outputs:
        t = cascade.tensors[name]
        if name not in made:
            raise Unsupported(f"{name} leaves the loop without an epilogue")
        if f in t.ranks:
            tiles.append(t)
        elif p not in t.ranks or set(t.ranks) - set(nest.grid):
            raise Unsupported(f"the output {name} is not one value a row")
    if len(tiles) != 1 or tiles[0].dtype not in DTYPES:
        raise Unsupported(f"one output over {p} and {f} in {' or '.join(DTYPES)} is needed")
    (t,) = tiles
    access = Access(t.name, *map(var, t.ranks))
    for s in epilogue:
        if s.monoid is not None:
            raise Unsupported(f"{s.name} reduces after the loop")
    return nest.outputs, _operand(cascade, access, p, f)
