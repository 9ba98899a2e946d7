"""The forward sweep: which contractions make an intermediate over two free ranks, and which contraction consumes it.

Comes in: a functional ATen graph. Goes out: `Candidate`s, in graph order. One pass over the nodes; every dimension of
every value carries the *marks* of the contractions that made it:

    S = contraction(Q, K)        S's free dimension from Q gets the mark (S, 0), the one from K gets (S, 1)
    views, pointwise, …          marks travel with the dimensions
    contraction over (S, 1) of a value that still has (S, 0)   a candidate: S makes, this consumes

A mark whose partner is gone is dropped, so that marks never pile up along a residual stream and the sweep is linear.
What a model's weights do to a value is not attention: a contraction with a parameter on the side that is reduced later
(MLPs, projections, routers) makes no candidate, nor does a chain of matrix products with nothing in between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from einscade.compiler.aten_attention import SCALED_DOT_PRODUCT
from einscade.compiler.aten_facts import Unraisable, arguments, is_tensor, op_name, shape, tensor_inputs
from einscade.compiler.aten_reductions import CONTRACTIONS, DISTANCES, REDUCTIONS, SOFTMAX
from einscade.compiler.aten_rules import has_rule
from einscade.compiler.aten_views import VIEWS, is_copy
from einscade.compiler.raising_index import groups
from einscade.ir.expr import Expr

__all__ = ["Candidate", "scan", "widths_of"]

Mark = tuple[Node, int]
Marks = tuple[frozenset[Mark], ...]
_NONE: frozenset[Mark] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """`values` reduces what `scores` made; `intermediate` is the operand of `values` that carries it. A
    scaled_dot_product_attention is its own scores and values."""

    scores: tuple[Node, ...]
    values: Node
    intermediate: Node | None


@dataclass
class _Pair:
    """What is known of one intermediate: which of its sides come from weights alone, whether anything but scaling
    happened to it, and along which sides it was exponentiated and summed. One that is `no_product` of two sides with
    ranks of their own is attention only if a softmax shows it."""

    static: tuple[bool, bool]
    no_product: bool = False
    touched: bool = False
    exponential: bool = False
    reduced: set[int] = field(default_factory=set)
    matched: bool = False


def scan(
    gm: GraphModule, static: Collection[Node], position: Mapping[Node, int], parameters: Collection[Node] = ()
) -> list[Candidate]:
    """All candidates of a graph. `static` are the graph inputs that belong to the model, `parameters` those of them
    that are trained (a buffer may be a cache of keys)."""
    return _Scan(set(static), position, parameters).run(gm)


class _Scan:
    def __init__(self, static: set[Node], position: Mapping[Node, int], parameters: Collection[Node]) -> None:
        self.static, self.position, self.parameters = static, position, parameters
        self.marks: dict[Node, Marks] = {}
        self.pairs: dict[Node, _Pair] = {}
        self.matches: list[tuple[tuple[Mark, ...], Node, Node, Node]] = []
        self.whole: list[Node] = []

    def run(self, gm: GraphModule) -> list[Candidate]:
        for node in gm.graph.nodes:
            if node.op == "call_function":
                with suppress(Unraisable):  # shapes and dtypes that the IR cannot say are no one's intermediate
                    self.node(node)
        found = [Candidate((node,), node, None) for node in self.whole]
        for makers, values, intermediate, other in self.matches:
            # Judged at the end: a sum over m that normalises may come after the values in the graph.
            scores = {m[0] for m in makers if self.counts(m, other)}
            if scores:
                ordered = tuple(sorted(scores, key=self.position.__getitem__))
                found.append(Candidate(ordered, values, intermediate))
        return sorted(found, key=lambda c: self.position[c.values])

    def of(self, node: Node) -> Marks:
        return self.marks.get(node, ())

    def pairs_on(self, node: Node) -> set[Node]:
        return {m[0] for dim in self.of(node) for m in dim}

    def node(self, node: Node) -> None:
        inputs = list(tensor_inputs(node))
        if all(n in self.static for n in node.all_input_nodes if not _is_size(n)):
            self.static.add(node)
        name = op_name(node)
        if name in _PICKS and node.args[0] in self.parameters:
            self.static.add(node)  # an expert's weights are weights, whoever chose the expert
        if name in SCALED_DOT_PRODUCT:
            self.whole.append(node)
            return
        if not is_tensor(node):
            return
        if sides := sides_of(node):
            self.contraction(node, *sides)
            return
        spread = len(inputs) == 2 and shape(inputs[0]) != shape(inputs[1])
        if not spread and not any(self.of(n) for n in inputs) and not _is_item(node):
            return
        if name == "getitem":
            self.item(node)
        elif name in VIEWS or is_copy(node):
            self.store(node, self.single(node, inputs[0], self.viewed(node, inputs[0])))
        elif name in REDUCTIONS:
            self.reduction(node, inputs[0])
        elif name == "aten::convolution":
            self.convolution(node, inputs[0], name)
        else:
            self.pointwise(node, inputs, name)

    def item(self, node: Node) -> None:
        """An item of several results: the values of a maximum, a sort or a top-k, a piece of a split."""
        whole, which = node.args[0], node.args[1]
        assert isinstance(whole, Node)
        name = op_name(whole)
        if which != 0 and name in _WITH_INDICES:
            return
        for source in tensor_inputs(whole):
            if self.of(source):
                if name in ("aten::max", "aten::min"):
                    self.touch(source, "reduce", arguments(whole).dim)
                elif has_rule(name):
                    self.touch(source, name)
                self.store(node, self.viewed(node, source))
                return

    # -- marks through operations --

    def store(self, node: Node, marks: Marks) -> None:
        """Keep the marks whose partner is on the value too."""
        every = [m for dim in marks for m in dim]
        if not every:
            return
        present = set(every)
        whole = {m for m in present if (m[0], 1 - m[1]) in present}
        # A product with weights whose two ranks were merged is no intermediate any more (tokens sent to experts).
        whole -= {m for dim in marks for m in dim if (m[0], 1 - m[1]) in dim and any(self.pairs[m[0]].static)}
        whole = {m for m in whole if (m[0], 1 - m[1]) in whole}
        if whole:
            self.marks[node] = tuple(frozenset(dim & whole) for dim in marks)

    def viewed(self, node: Node, source: Node) -> Marks:
        """Marks of a view: by position where the operation says so, by size of groups for a reshape."""
        marks, name = self.of(source), op_name(node)
        if not marks:
            return ()
        new, old = shape(node), shape(source)
        if name in ("aten::permute", "aten::transpose", "aten::t", "aten::numpy_T"):
            return tuple(marks[d] for d in _order(node, len(old)))
        if name == "aten::expand":
            return (_NONE,) * (len(new) - len(old)) + marks
        if name == "aten::unsqueeze":
            dim = arguments(node).dim % len(new)
            return (*marks[:dim], _NONE, *marks[dim:])
        if name == "aten::select":
            dim = arguments(node).dim % len(old)
            return marks[:dim] + marks[dim + 1 :]
        if len(new) == len(old) and name not in ("aten::view", "aten::_unsafe_view", "aten::reshape"):
            return marks
        return _regrouped(marks, new, old)

    def pointwise(self, node: Node, inputs: Sequence[Node], name: str) -> None:
        """Every other operation: marks travel by position, aligned at the last dimension as in broadcasting. Through
        what has no meaning here they travel only if the shape stays, so that a site can say what stopped it."""
        rank, short = len(shape(node)), name.removeprefix("aten::")
        if name in _GATHERS:
            marked = [n for n in inputs[:1] if self.of(n)]
        elif has_rule(name):
            marked = [n for n in inputs if self.of(n)]
        else:
            marked = [n for n in inputs[:1] if self.of(n) and shape(n) == shape(node)]
        result = [_NONE] * rank
        for source in marked:
            marks = self.of(source)
            if len(marks) > rank:
                marks = marks[len(marks) - rank :]
            for d, dim in enumerate(marks, start=rank - len(marks)):
                result[d] = result[d] | dim
        pairs = {m[0] for dim in result for m in dim}
        fresh = {p for p in pairs if not self.pairs[p].matched}
        if fresh and fresh != pairs:  # scores carried on from an earlier region are a bias of this one
            result = [frozenset(m for m in dim if m[0] in fresh) for dim in result]
        for source in marked:
            if short in _LINEAR and self.linear(node, source, inputs):
                continue
            self.touch(source, name, arguments(node).dim if name in SOFTMAX else None)
        for at, more in self.spread(node, inputs, tuple(result)).items():
            result[at] = result[at] | more
        self.store(node, tuple(result))

    def spread(self, node: Node, inputs: Sequence[Node], marks: Marks) -> dict[int, frozenset[Mark]]:
        """The marks of an operation that spreads two operands over each other's positions and keeps what they share: a
        difference of queries and keys, an additive network's sum. Where a product has those positions already, what is
        added is a bias."""
        if len(inputs) != 2 or not has_rule(op_name(node)) or any(n in self.static for n in inputs):
            return {}
        if not all(n.meta["val"].is_floating_point() for n in (node, *inputs)):
            return {}
        size = shape(node)
        left, right = (_varying(n, len(size), size) for n in inputs)
        if not left - right or not right - left or not left & right:
            return {}
        one, other = (_NONE.union(*(marks[d] for d in own)) for own in (left - right, right - left))
        if any((maker, 1 - side) in other for maker, side in one):
            return {}
        self.pairs[node] = _Pair((False, False), no_product=True, touched=True)
        return {d: frozenset({(node, side)}) for side, own in enumerate((left - right, right - left)) for d in own}

    def single(self, node: Node, source: Node, marks: Marks) -> Marks:
        """The marks of a view, where it dropped a dimension of one row (einsum makes one where an operand has no
        positions of its own): as `one_sided` has them."""
        before, size = self.of(source), shape(source)
        rows = {m for d, dim in enumerate(before) for m in dim if size[d] == 1}
        rows -= {m for d, dim in enumerate(before) for m in dim if size[d] != 1} | _NONE.union(*marks)
        for maker, side in rows:
            pair, partner = self.pairs[maker], (maker, 1 - side)
            shared = [d for d, n in enumerate(shape(node)) if n != 1 and partner not in marks[d]]
            if any(pair.static) or not shared or partner not in _NONE.union(*marks):
                continue
            pair.no_product = pair.touched = True
            marks = tuple(dim | {(maker, side)} if d in shared else dim for d, dim in enumerate(marks))
        return marks

    def linear(self, node: Node, source: Node, inputs: Sequence[Node]) -> bool:
        """Whether the value stays a plain product of its sides: something is added, or its rows or columns are scaled,
        or taken from elsewhere (a cache that a product with one-hot codes writes to)."""
        name = op_name(node).removeprefix("aten::")
        if name in ("where", "masked_fill"):
            inputs = inputs[:1] if name == "where" else inputs[1:2]
        elif name not in ("mul", "div"):
            return True
        marks = self.of(source)
        for other in inputs:
            if other is source or not shape(other):
                continue
            size = shape(other)
            varies = {d - len(size) for d, n in enumerate(size) if n != 1}
            marked = [{d - len(marks) for d, dim in enumerate(marks) for m in dim if m[1] == side} for side in (0, 1)]
            if all(varies & dims for dims in marked):
                return False
        return True

    def reduction(self, node: Node, source: Node) -> None:
        a = arguments(node)
        rank = len(shape(source))
        dims = getattr(a, "dim", None)
        dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        gone = {d % rank for d in dims} if rank else set()
        for d in gone:
            self.touch(source, "reduce", d)
        marks = self.of(source)
        kept = getattr(a, "keepdim", False)
        self.store(node, tuple(_NONE if d in gone else m for d, m in enumerate(marks) if kept or d not in gone))

    def convolution(self, node: Node, source: Node, name: str) -> None:
        """A contraction of the channels with weights, wherever else it reads: what they carried ends here."""
        marks = self.of(source)
        ended = {m[0] for m in marks[1]} if len(marks) > 1 else set()
        if marks and shape(node) == shape(source):
            self.touch(source, name)
            self.store(node, tuple(frozenset(m for m in dim if m[0] not in ended) for dim in marks))

    def touch(self, source: Node, name: str, dim: int | None = None) -> None:
        marks = self.of(source)
        along = marks[dim % len(marks)] if dim is not None and marks else _NONE
        for mark in {m for each in marks for m in each}:
            pair = self.pairs[mark[0]]
            pair.touched = True
            pair.exponential |= name in _EXPONENTIAL or name in SOFTMAX
            if mark in along:
                pair.reduced.add(mark[1])

    def contraction(self, node: Node, left: _Side, right: _Side) -> None:
        """Match the marks of what is reduced, then mark what is new."""
        # What reaches both operands is a value of the model by now (a residual stream), and no intermediate.
        both = self.pairs_on(left.node) & self.pairs_on(right.node)
        for side, other in ((left, right), (right, left)):
            marks = self.of(side.node)
            if not marks:
                continue
            makers = [m for m in _reduced(marks, side, other) if m[0] not in both]
            if makers:
                self.matches.append((tuple(makers), node, side.node, other.node))
                for maker, _ in makers:
                    self.pairs[maker].matched = True
        dims: list[set[Mark]] = [set() for _ in shape(node)]
        for side in (left, right):
            marks = self.of(side.node)
            consumed = both | ({m[0] for d in side.reduced for m in marks[d]} if marks else set())
            for d, to in side.dims.items():
                if marks:
                    dims[to] |= {m for m in marks[d] if m[0] not in consumed}
        if left.free and right.free:
            far = op_name(node) in DISTANCES
            static = (left.node in self.static, right.node in self.static)
            self.pairs[node] = _Pair(static, no_product=far, touched=far)
            for number, side in enumerate((left, right)):
                for d in side.free:
                    dims[side.dims[d]].add((node, number))
        elif left.free or right.free:
            self.one_sided(node, left, right, dims)
        self.store(node, tuple(frozenset(d) for d in dims))

    def one_sided(self, node: Node, left: _Side, right: _Side, dims: list[set[Mark]]) -> None:
        """A product in which only one operand has positions of its own: one query for each of what both have, as a
        decoder's step or a neighbourhood has it."""
        many, one = (left, right) if left.free else (right, left)
        shared = set(many.dims.values()) & set(one.dims.values()) - {many.dims[d] for d in many.free}
        if not shared or left.node in self.static or right.node in self.static:
            return
        self.pairs[node] = _Pair((False, False), no_product=True, touched=True)
        for d in shared:
            dims[d].add((node, 0))
        for d in many.free:
            dims[many.dims[d]].add((node, 1))

    def counts(self, reduced: Mark, other: Node) -> bool:
        """Whether reducing this mark against `other` is attention, and no MLP, projection or plain product."""
        maker, side = reduced
        pair = self.pairs[maker]
        if not pair.touched or pair.static[side]:
            return False
        if pair.no_product:
            return pair.exponential and side in pair.reduced and other not in self.static
        if pair.static[1 - side] or other in self.static:
            return pair.exponential and side in pair.reduced
        return True


_LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "detach", "where", "masked_fill"}
_WITH_INDICES = {"aten::max", "aten::min", "aten::sort", "aten::topk", "aten::kthvalue", "aten::mode"}
_GATHERS = {"aten::index", "aten::gather", "aten::index_select", "aten::index_put", "aten::scatter"}
_PICKS = {"aten::index", "aten::index_select"}
_EXPONENTIAL = {"aten::exp", "aten::exp2", "aten::sigmoid"}


def _reduced(marks: Marks, side: _Side, other: _Side) -> list[Mark]:
    """The marks that a contraction reduces while their partners stay. Where the other operand has no width of its own
    it has to lack the rows (else it scales, or sums, weights), and likewise where a reshape has mixed the two ranks."""
    kept = [d for d in range(len(marks)) if d not in side.reduced]
    alive = {m for d in kept for m in marks[d]}
    rows = {m for d in kept if d in side.free for m in marks[d]}
    gone = {m for d in side.reduced for m in marks[d]}
    partner = {m: (m[0], 1 - m[1]) for m in gone}
    return [m for m in gone if partner[m] in (alive if other.free and partner[m] not in gone else rows)]


@dataclass(frozen=True)
class _Side:
    """One operand of a contraction: its reduced dimensions, its free ones (that the other lacks), and where each kept
    dimension goes in the result."""

    node: Node
    reduced: tuple[int, ...]
    free: tuple[int, ...]
    dims: dict[int, int]


def sides_of(node: Node) -> tuple[_Side, _Side] | None:
    """The operands of a contraction: matrix products by their definition, `sum(a * b)` by its broadcasts."""
    name = op_name(node)
    if name in CONTRACTIONS:
        return _matrix_sides(node, name)
    if name in DISTANCES:
        return _distance_sides(node)
    if name in ("aten::sum", "aten::mean"):
        return _product_sides(node)
    return None


def _matrix_sides(node: Node, name: str) -> tuple[_Side, _Side] | None:
    a = arguments(node)
    if name == "aten::linear":
        rank = len(shape(a.input))
        left = _Side(a.input, (rank - 1,), tuple(range(rank - 1)), {d: d for d in range(rank - 1)})
        return left, _Side(a.weight, (1,), (0,), {0: rank - 1})
    first = getattr(a, "batch1", getattr(a, "mat1", getattr(a, "self", None)))
    second = next(v for k, v in vars(a).items() if k in ("batch2", "mat2", "other", "vec", "vec2", "tensor"))
    if not is_tensor(first) or not is_tensor(second):
        return None
    m, n, result = len(shape(first)), len(shape(second)), len(shape(node))
    row, column = m > 1, n > 1
    batch = result - row - column

    def batches(rank: int) -> dict[int, int]:
        return {d: d + batch - (rank - 2) for d in range(rank - 2)} if rank > 2 else {}

    left = _Side(first, (m - 1,), (m - 2,) if row else (), {**batches(m), **({m - 2: batch} if row else {})})
    right = _Side(second, (n - 2 if column else 0,), (n - 1,) if column else (),
                  {**batches(n), **({n - 1: result - 1} if column else {})})  # fmt: skip
    return left, right


def _distance_sides(node: Node) -> tuple[_Side, _Side]:
    """Two lists of points with a batch of dimensions in front, which broadcast."""
    a, result = arguments(node), len(shape(node))
    sides = []
    for x, place in ((a.x1, result - 2), (a.x2, result - 1)):
        rank = len(shape(x))
        dims = {d: d + result - rank for d in range(rank - 2)} | {rank - 2: place}
        sides.append(_Side(x, (rank - 1,), (rank - 2,), dims))
    return sides[0], sides[1]


def _product_sides(node: Node) -> tuple[_Side, _Side] | None:
    """`(a * b).sum(dims)`, where each operand varies along a reduced dimension."""
    product = node.args[0]
    while isinstance(product, Node) and is_copy(product):
        product = product.args[0]
    if not isinstance(product, Node) or op_name(product) != "aten::mul":
        return None
    if not all(is_tensor(x) for x in product.args[:2]):
        return None
    a = arguments(node)
    size = shape(product)
    rank = len(size)
    dims = [a.dim] if isinstance(a.dim, int) else list(a.dim or range(rank))
    gone = {d % rank for d in dims} if rank else set()
    kept = getattr(a, "keepdim", False)
    place = {d: d if kept else sum(1 for k in range(d) if k not in gone) for d in range(rank) if d not in gone}
    sides = []
    varies = [_varying(x, rank, size) for x in product.args[:2]]  # type: ignore[arg-type]
    for k, x in enumerate(product.args[:2]):
        assert isinstance(x, Node)
        own = len(shape(x))
        shift = rank - own
        free = tuple(d - shift for d in sorted(varies[k] - varies[1 - k] - gone))
        reduced = tuple(d - shift for d in sorted(gone & varies[k]))
        sides.append(_Side(x, reduced, free, {d - shift: place[d] for d in range(shift, rank) if d not in gone}))
    if not (gone & varies[0] & varies[1]):
        return None
    return sides[0], sides[1]


def _varying(x: Node, rank: int, size: Sequence[Expr]) -> set[int]:
    """The dimensions (of the broadcast result) along which an operand is not one repeated value."""
    source, repeated = x, set()
    own = shape(x)
    shift = rank - len(own)
    while is_copy(source) or op_name(source) == "aten::expand":
        operand = source.args[0]
        assert isinstance(operand, Node)
        if op_name(source) == "aten::expand":
            before = shape(operand)
            extra = len(own) - len(before)
            repeated |= {d for d in range(len(own)) if d < extra or (before[d - extra] == 1 and own[d] != 1)}
            if extra:
                break
        source = operand
    return {d + shift for d, n in enumerate(own) if n != 1 and d not in repeated}


def widths_of(candidate: Candidate) -> tuple[Expr, ...]:
    """What the scores are summed over, and what the values add of their own: the extents that a kernel holds whole."""
    found: list[Expr] = []
    for node in candidate.scores:
        if op_name(node) in SCALED_DOT_PRODUCT:
            a = arguments(node)
            found += [shape(a.query)[-1], shape(a.value)[-1]]
        else:
            found += [shape(side.node)[d] for side in sides_of(node) or () for d in side.reduced]
    for side in sides_of(candidate.values) or ():
        if side.node is not candidate.intermediate:
            found += [shape(side.node)[d] for d in side.free]
    return tuple(found)


def products_of(node: Node) -> tuple[Node, ...]:
    """The nodes between a `sum(a * b)` and its operands: the product, and casts on the way."""
    if op_name(node) in CONTRACTIONS or op_name(node) in DISTANCES or sides_of(node) is None:
        return ()
    found = []
    product = node.args[0]
    while isinstance(product, Node):
        found.append(product)
        if not is_copy(product):
            break
        product = product.args[0]
    return tuple(found)


def _is_size(node: Node) -> bool:
    """A length: a slice of a weight is a weight, however long it is."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_item(node: Node) -> bool:
    return op_name(node) == "getitem"


def _order(node: Node, rank: int) -> list[int]:
    """For a permutation, the operand's dimension at each dimension of the result."""
    order = list(range(rank))
    a = arguments(node)
    if op_name(node) == "aten::permute":
        return [d % rank for d in a.dims]
    if op_name(node) == "aten::transpose":
        i, j = a.dim0 % rank, a.dim1 % rank
        order[i], order[j] = order[j], order[i]
        return order
    return order[::-1]


def _regrouped(marks: Marks, new: Sequence[Expr], old: Sequence[Expr]) -> Marks:
    """Marks through a reshape: each new dimension has those of every old one in its group. A dimension of 1 may end up
    at any other of 1, and its marks with it; with none, a single row ends that is grouped with its columns."""
    result: list[frozenset[Mark]] = [_NONE] * len(new)
    ones = _NONE.union(*(marks[d] for d, n in enumerate(old) if n == 1))
    room = any(n == 1 for n in new)
    for here, there in groups(tuple(new), tuple(old)):
        exact = len(there) == len(here) == 1
        together = _NONE.union(*(marks[d] for d in there if exact or old[d] != 1))
        if not room:
            together |= {
                m
                for m in ones.intersection(*[_NONE.union(*(marks[d] for d in there))])
                if (m[0], 1 - m[1]) not in together
            }
        for d in here:
            result[d] = together | ones if new[d] == 1 else together
    return tuple(result)
