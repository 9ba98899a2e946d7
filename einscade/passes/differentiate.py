"""Differentiate: reverse mode on a cascade.

Comes in: a scan-free cascade (canonical, best after `defer`). Goes out: a `Gradient`: a cascade from the original
inputs, the outputs' gradients and the *saved* tensors of the forward cascade to the inputs' gradients.

What is saved and what is computed again is a decision on structure: a reduction over a rank that other statements have
too (a row's maximum, its normaliser) costs a traversal of everything and is small, so it is saved; all else, whatever
has two long ranks included, is computed again from the inputs. An output stands in for a saved tensor where it gives
it back (O = N / Z: N = O * Z), as it was before it was rounded to half precision: the gradient subtracts a row's mean,
sum(f) O * dO, from what may be close to it. What only a row's saved values enter is computed and saved in their place
(`row_factors`). The result is scan-free, so the passes that make loops apply to it as to any cascade.

A piece of an input is a tensor of its own meanwhile (`pieces`): its gradient is made over the piece, then put in place.

Maxima that only shift what they normalise have no gradient: `invariance` shows that the outputs do not see them move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
from sympy.logic.boolalg import Boolean

from einscade.ir import Access, Cascade, Einsum, Expr, FloorDiv, Mod, Rank, Reduction, Tensor, Where, ceil_div, var
from einscade.ir.digits import counted, digits
from einscade.ir.expr import accesses
from einscade.passes.derivative import derivative, differences, outer_accesses
from einscade.passes.existence import deciding, existence
from einscade.passes.invariance import is_felt
from einscade.passes.pieces import apart, together
from einscade.passes.rewrite import NotApplicable
from einscade.passes.row_factors import positive, row_factors
from einscade.passes.statements import Names, ordered, without_unused
from einscade.passes.terms import conjoin, conjuncts, depends, fold, variables

__all__ = ["Gradient", "differentiate"]

FLOATS = ("f64", "f32", "f16", "bf16")


@dataclass(frozen=True)
class Gradient:
    """`cascade` reads inputs of the forward cascade, `saved` tensors and, for each forward output, its gradient
    `cotangents[output]`; it makes `gradients[input]` for each input asked for. `forward` is the forward cascade with
    the saved tensors as further outputs."""

    cascade: Cascade
    saved: tuple[str, ...]
    forward: Cascade
    cotangents: Mapping[str, str]
    gradients: Mapping[str, str]


def differentiate(
    cascade: Cascade, wrt: Iterable[str] | None = None, roles: Mapping[str, str] | None = None
) -> Gradient:
    """Gradients of the outputs with respect to the inputs named (default: every floating input), in their dtypes.
    `roles`: inputs that are another one's tensor (`passes.roles`); each has a gradient of its own.

    Raises NotApplicable, with the statement, where a statement has no derivative rule (scan, prod, topk).
    An input that no output depends on has no gradient in the result.
    """
    inputs = {t.name: t for t in cascade.inputs}
    asked = tuple(n for n in (inputs if wrt is None else wrt) if inputs[n].dtype in FLOATS)
    pieced, copies = apart(cascade)
    gradient = _Reverse(pieced, asked, roles or {}).run()
    return replace(gradient, cascade=together(gradient.cascade, copies), forward=together(gradient.forward, copies))


@dataclass(frozen=True)
class _Part:
    """One contribution to a tensor's gradient, over the tensor's own ranks."""

    expr: Expr
    reduce: Reduction | None
    domain: Boolean


_Solution = tuple[dict[sympy.Symbol, Expr], tuple[Boolean, ...]]


@dataclass(frozen=True)
class _Group:
    """Which ranks of a tensor are the quotient and the remainder of a variable by `size`, where it is read at those."""

    size: Expr
    quotient: str | None = None
    remainder: str | None = None


class _Reverse:
    def __init__(self, cascade: Cascade, wrt: tuple[str, ...], roles: Mapping[str, str]) -> None:
        self.forward, self.wrt, self.roles = cascade, wrt, roles
        self.names = Names(cascade)
        self.ranks = list(cascade.ranks)
        self.parts: dict[str, list[_Part]] = {}
        self.adjoint: dict[str, Tensor] = {}
        self.made: dict[str, Einsum] = {}
        self.active = self._depending(wrt)
        self.summaries = _summaries(cascade)
        self.existing: dict[Einsum, tuple[Boolean, ...]] = {}
        self.wide = "f64" if any(t.dtype == "f64" for t in cascade.inputs) else "f32"
        self.along = frozenset(r for s in cascade.body if s.name in self.summaries and s.reduce for r in s.reduce.ranks)
        self.seeds: frozenset[str] = frozenset()
        self.still: set[str] = set()  # what no output sees move: when others are looked at, it may as well stay
        self.unrounded: dict[str, Einsum] = {}  # of outputs in half precision, what is saved instead

    def run(self) -> Gradient:
        c = self.forward
        cotangents = {o: self.names(f"d{o}") for o in c.outputs if o in self.active and o in c.definitions}
        seeds = tuple(Tensor(name, c.tensors[o].ranks, c.tensors[o].dtype) for o, name in cotangents.items())
        self.seeds = frozenset(cotangents.values())
        for seed, o in zip(seeds, cotangents, strict=True):
            self.parts.setdefault(o, []).append(_Part(seed(), None, sympy.true))
        for statement in reversed(c.body):
            if statement.name in self.active and self._close(statement.output):
                self._backward(statement)
            elif statement.name not in c.outputs:
                self.still.add(statement.name)
        gradients = {}
        for name in self.wrt:
            if self._close(c.tensors[name]):
                gradients[name] = self.adjoint[name].name
        if not gradients:
            raise NotApplicable(f"no output of {c.name} depends on {', '.join(self.wrt) or 'a floating input'}")
        again, saved = self._recomputed()
        kept = tuple(dict.fromkeys(self._saved(n).output for n in (*saved, *self.unrounded)))
        everything = (*c.inputs, *kept, *seeds)
        body = ordered([*again, *self.made.values()], [t.name for t in everything])
        result = Cascade(f"{c.name}_gradient", tuple(self.ranks), everything, tuple(gradients.values()), body)
        half = any(t.dtype in FLOATS and t.dtype != self.wide for t in c.inputs)
        result = row_factors(without_unused(result), self.names, positive(c) if half else (), self.wide)
        rows = self._of_forward(result, frozenset(saved))
        everything = (*c.inputs, *kept, *(s.output for s in rows), *seeds)
        body = ordered([s for s in result.body if s not in rows], [t.name for t in everything])
        result = without_unused(result.replace(inputs=everything, body=body))
        read = {a.tensor for s in result.body for a in s.reads}
        result = result.replace(inputs=tuple(t for t in result.inputs if t.name in read or t in seeds))
        found = tuple(n for n in (*(t.name for t in kept), *(s.name for s in rows)) if n in read)
        body = (*(part for s in c.body for part in self._saving(s, found)), *rows)
        augmented = c.replace(outputs=tuple(dict.fromkeys((*c.outputs, *found))), body=body)
        return Gradient(result, found, without_unused(augmented), cotangents, gradients)

    def _saving(self, s: Einsum, saved: Collection[str]) -> tuple[Einsum, ...]:
        """A statement of the forward cascade as it is where something is saved of it: unrounded."""
        kept = self._saved(s.name)
        if kept.name not in saved or kept == s:
            return (s,)
        return (kept,) if kept.name == s.name else (kept, Einsum(s.output, kept.output()))

    def _of_forward(self, gradient: Cascade, saved: frozenset[str]) -> tuple[Einsum, ...]:
        """Statements of the gradient that only saved tensors enter: the forward pass makes them, and saves them."""
        known = saved & self.summaries
        return tuple(
            s
            for s in gradient.body
            if s.name not in (*gradient.outputs, *self.forward.definitions)
            and s.reduce is None
            and s.reads
            and all(a.tensor in known for a in s.reads)
        )

    # -- what is needed --

    def _depending(self, wrt: Iterable[str]) -> frozenset[str]:
        """Floating tensors that a change of the inputs can reach."""
        found = set(wrt)
        for s in self.forward.body:
            if any(a.tensor in found for a in outer_accesses(s.expr)) and s.output.dtype in FLOATS:
                found.add(s.name)
        return frozenset(found)

    def _recomputed(self) -> tuple[list[Einsum], tuple[str, ...]]:
        """Forward statements that the gradient reads: those it computes again, and the names of those it is given."""
        definitions = self.forward.definitions
        again: dict[str, Einsum] = {}
        saved: dict[str, None] = {}
        todo = [a.tensor for s in self.made.values() for a in s.reads]
        while todo:
            name = todo.pop()
            if name not in definitions or name in again or name in saved:
                continue
            if name in self.summaries or name in self.forward.outputs:
                saved[name] = None
            else:
                again[name] = definitions[name]
                todo += [a.tensor for a in definitions[name].reads]
        order = [s.name for s in self.forward.body]
        return [again[n] for n in order if n in again], tuple(n for n in order if n in saved)

    # -- the chain rule --

    def _close(self, tensor: Tensor) -> bool:
        """All contributions to a tensor are known: write their sum. False where there are none."""
        parts = self.parts.get(tensor.name, [])
        if not parts:
            return False
        is_input = tensor.name not in self.forward.definitions
        # Nobody asks for the gradient of a point that is not there, nor misses one that no part has.
        there = self._exists(tensor.name)
        parts = [_Part(p.expr, p.reduce, conjoin(c for c in conjuncts(p.domain) if c not in there)) for p in parts]
        given = parts[0].expr
        alone = len(parts) == 1 and parts[0] == _Part(given, None, sympy.true)
        if alone and not is_input and given in (Tensor(c, tensor.ranks)() for c in self.seeds):
            self.adjoint[tensor.name] = Tensor(given.tensor, tensor.ranks, tensor.dtype)
            return True
        output = Tensor(self.names(f"d{tensor.name}"), tensor.ranks, tensor.dtype if is_input else self.wide)
        self.adjoint[tensor.name] = output
        if len(parts) == 1:
            self.made[output.name] = Einsum(output, parts[0].expr, parts[0].reduce, parts[0].domain)
            return True
        exist = [[c for c in self._result_exists(p) if c not in there] for p in parts]
        common = frozenset.intersection(*map(frozenset, exist))
        terms = []
        for part, conditions in zip(parts, exist, strict=True):
            expr = part.expr
            if part.reduce is not None:
                own = Tensor(self.names(f"d{tensor.name}p"), tensor.ranks, self.wide)
                self.made[own.name] = Einsum(own, part.expr, part.reduce, part.domain)
                expr = own()
            needed = conjoin(c for c in conditions if c not in common)
            terms.append(Where(needed, expr, sympy.Integer(0)))
        self.made[output.name] = Einsum(
            output,
            sympy.Add(*terms),
            domain=conjoin(c for c in sorted(common, key=str) if c not in self._existence(sympy.Add(*terms))),
        )
        return True

    def _backward(self, s: Einsum) -> None:
        if s.scan is not None:
            raise NotApplicable(f"{s.name} is a scan: differentiate before loops are made")
        monoid = s.reduce.monoid if s.reduce else "sum"
        if (monoid in ("max", "min") or isinstance(s.expr, (sympy.Max, sympy.Min))) and self._only_shifts(s):
            return
        if monoid not in ("sum", "max", "min"):
            raise NotApplicable(f"{s.name} is a {monoid}: no derivative rule")
        weight = self._chosen(s) if monoid != "sum" else sympy.Integer(1)
        apart = differences(s.expr, self.roles)
        for access in outer_accesses(s.expr):
            if access.tensor not in self.active:
                continue
            slope = derivative(s, access, self._value(s))
            if slope == 0:
                continue
            slope = self._available(s, slope)
            expr = fold(self.adjoint[s.name]() * slope * weight)
            domain = conjoin((*conjuncts(self._where(s, expr)), *apart.get(access, ())))
            self.parts.setdefault(access.tensor, []).append(self._scatter(s, access, expr, domain))

    def _only_shifts(self, s: Einsum) -> bool:
        """Whether no output sees this statement move: then its gradient is zero, whatever its formula gives."""
        if is_felt(self.forward, s.name, self.still):
            return False
        self.still.add(s.name)
        return True

    def _chosen(self, s: Einsum) -> Expr:
        """The gradient of an extreme goes in equal parts to the points that attain it (as torch.amax has it). A sum
        that is computed again may round to another number, and no point would."""
        if (again := self._summed_again(s)) is not None:
            raise NotApplicable(f"{s.name} is an extreme of what reads {again}, which would be summed up again")
        chosen = Where(sympy.Eq(s.expr, s.output(), evaluate=False), sympy.Integer(1), sympy.Integer(0))
        count = Tensor(self.names(f"{s.name}count"), s.output.ranks, self.wide)
        self.made[count.name] = Einsum(count, chosen, Reduction("sum", s.reduce.ranks if s.reduce else ()), s.domain)
        return chosen / count()

    def _summed_again(self, s: Einsum) -> str | None:
        """A sum that a statement's value is made of and that the gradient is not given."""
        for a in s.reads:
            made = self.forward.definitions.get(a.tensor)
            if made is None or made.name in self.summaries or made.name in self.forward.outputs:
                continue
            if made.reduce is not None and made.reduce.monoid in ("sum", "prod"):
                return made.name
            if (found := self._summed_again(made)) is not None:
                return found
        return None

    def _available(self, s: Einsum, slope: Expr) -> Expr:
        """The slope without what would have to be saved for it, where the statement's own output gives it back."""
        if s.reduce is not None or s.name not in self.forward.outputs:
            return slope
        for access in outer_accesses(slope):
            if access.tensor in self.summaries and access.tensor not in self.forward.outputs:
                rest = s.expr / access
                if not rest.has(access) and s.output.ranks == self.forward.tensors[access.tensor].ranks:
                    slope = slope.xreplace({access: self._value(s) / rest})
        return slope

    def _value(self, s: Einsum) -> Access:
        """A statement's own value, where a gradient reads it: of an output, what can be saved of it."""
        return (self._saved(s.name).output if s.name in self.forward.outputs else s.output)()

    def _saved(self, name: str) -> Einsum:
        """What can be saved of a statement: its value in the wide dtype, under another name if it is an output."""
        s = self.forward.definitions[name]
        if s.output.dtype not in FLOATS or s.output.dtype == self.wide:
            return s
        if name not in self.forward.outputs:
            return s.replace(output=replace(s.output, dtype=self.wide))
        if name not in self.unrounded:
            self.unrounded[name] = s.replace(output=replace(s.output, name=self.names(f"{name}w"), dtype=self.wide))
        return self.unrounded[name]

    def _where(self, s: Einsum, expr: Expr) -> Boolean:
        """The domain of a contribution: where the statement has points, less what the reads in `expr` imply."""
        implied = self._existence(expr)
        return conjoin(c for c in conjuncts(existence(self.forward).points[s.name]) if c not in implied)

    # -- existence in the gradient, to which what the forward pass saves is complete --

    def _exists(self, name: str) -> tuple[Boolean, ...]:
        s = self._definition(name)
        if s is None or name in self.summaries:
            return ()  # given as an input, complete
        if s not in self.existing:
            self.existing[s] = self._result_exists(s)
        return self.existing[s]

    def _definition(self, name: str) -> Einsum | None:
        unrounded = {s.name: s for s in self.unrounded.values()}
        return self.made.get(name) or self.forward.definitions.get(name) or unrounded.get(name)

    def _result_exists(self, s: Einsum | _Part) -> tuple[Boolean, ...]:
        reduced = s.reduce.ranks if s.reduce else ()
        rows = (c for c in conjuncts(s.domain) if not depends(c, reduced))
        read = frozenset().union(*map(self._existence, deciding(s.expr, reduced)))
        return tuple(dict.fromkeys((*rows, *sorted(read, key=str))))

    def _exists_at(self, access: Access) -> tuple[Boolean, ...]:
        s = self._definition(access.tensor)
        if s is None:
            return ()
        return tuple(c.xreplace(s.output.place(access)) for c in self._exists(access.tensor))

    def _existence(self, expr: Expr) -> frozenset[Boolean]:
        return frozenset(c for a in set(_unconditional(expr)) for c in self._exists_at(a))

    # -- from the statement's points to the tensor's --

    def _scatter(self, s: Einsum, access: Access, expr: Expr, domain: Boolean) -> _Part:
        """The contribution, made over the statement's points, summed into the points of the tensor it belongs to."""
        target = self.forward.tensors[access.tensor]
        given: dict[sympy.Symbol, Expr] = {}  # the statement's variables, by those of the tensor
        conditions: list[Boolean] = []
        fresh = {r: f"{r}\0" for r in target.ranks}  # the tensor's own variables, kept apart until all are known
        whole: dict[Expr, Expr] = {}
        groups: dict[sympy.Symbol, _Group] = {}
        for rank, index in zip(target.ranks, access.index, strict=True):
            own = sympy.Symbol(fresh[rank], integer=True, nonnegative=True)
            open_ = (r for r in s.ranks if var(r) not in given and var(r) not in groups)
            unknown = [var(r) for r in open_ if depends(index, (r,))]
            solved = self._solve(index, own, unknown)
            if solved is None:
                if not self._in_group(index, rank, unknown, groups) and self.forward.extent(rank) != 1:
                    conditions.append(sympy.Eq(index, own, evaluate=False))
            else:
                values, needed = solved
                given |= values
                conditions += needed
                if len(values) > 1:  # others are read at the same index, and need not take it apart to put it together
                    whole[index] = own
                more = sympy.Mul(*(self.forward.extent(v.name) for v in values)) - self.forward.extent(rank)
                start, _ = index.as_coeff_Add()
                if len(values) > 1 and not needed and start == 0 and sympy.expand(more) == 0:
                    continue  # every place of the dimension is one point of these variables
                for v, value in values.items():
                    if value != own or self.forward.extent(v.name) != self.forward.extent(rank):
                        conditions += self._inside(v, value)
        left = [r for r in s.ranks if var(r) not in given and var(r) not in groups]
        renames = {var(r): var(self._renamed(r, target)) for r in (*left, *map(str, groups))}
        plain = {sympy.Symbol(f, integer=True, nonnegative=True): var(r) for r, f in fresh.items()}

        def moved(e: Expr) -> Expr:
            return e.xreplace(whole).xreplace(given).xreplace(renames).xreplace(plain)

        reduce = Reduction("sum", tuple(renames[var(r)].name for r in left)) if left else None
        part = _Part(moved(expr), reduce, conjoin(moved(c) for c in (*conjuncts(domain), *conditions)))
        return self._grouped(part, target, groups, renames) if groups else self._by_rows(self._contracted(part), target)

    def _contracted(self, part: _Part) -> _Part:
        """A sum over points of which a factor has both ends (a decay) contracts the others first, over what only they
        have: sum(p,f) D[p,m] * V[m,f] * dO[p,f] = sum(p) D[p,m] * (sum(f) V[m,f] * dO[p,f])."""
        reduced = part.reduce.ranks if part.reduce else ()
        factors = sympy.Mul.make_args(part.expr)
        for r in reduced if len(reduced) > 1 else ():
            inner = [f for f in factors if depends(f, (r,))]
            outer = [f for f in factors if f not in inner]
            ends = {v for f in inner for v in variables(f) if v != r}
            everywhere = frozenset.intersection(*(variables(f) for f in factors if variables(f)))
            both = any(ends <= variables(f) | everywhere for f in outer)
            if len(inner) < 2 or not both or depends(part.domain, (r,)) or ends.isdisjoint(reduced):
                continue
            if not all(self._reads_everywhere(a) for f in inner for a in accesses(f)):
                continue
            ranks = tuple(x.name for x in self.ranks if x.name in ends)
            made = Tensor(self.names("C"), ranks, self.wide)
            self.made[made.name] = Einsum(made, sympy.Mul(*inner), Reduction("sum", (r,)))
            rest = tuple(x for x in reduced if x != r)
            return self._contracted(_Part(made() * sympy.Mul(*outer), Reduction("sum", rest), part.domain))
        return part

    def _reads_everywhere(self, access: Access) -> bool:
        """Whether an access reads its tensor at any values of its ranks."""
        extents = {r.name: r.extent for r in self.ranks}
        known = {**self.forward.tensors, **{t.name: t for t in self.adjoint.values()}}
        ranks = known[access.tensor].ranks if access.tensor in known else ()
        return len(ranks) == len(access.index) and all(
            i.is_Symbol and extents.get(str(i)) == extents[r] for i, r in zip(access.index, ranks, strict=True)
        )

    def _by_rows(self, part: _Part, target: Tensor) -> _Part:
        """A sum over everything that has two long ranks goes row by row: first over those that rows reduce, as in the
        forward cascade, so that it can share their loop."""
        reduced = part.reduce.ranks if part.reduce else ()
        along = tuple(r for r in reduced if r in self.along)
        rest = tuple(r for r in reduced if r not in self.along)
        if not along or not rest:
            return part
        rows = Tensor(self.names(f"d{target.name}r"), (*rest, *target.ranks), self.wide)
        self.made[rows.name] = Einsum(rows, part.expr, Reduction("sum", along), part.domain)
        return _Part(rows(), Reduction("sum", rest), sympy.true)

    def _solve(self, index: Expr, own: Expr, unknown: Sequence[sympy.Symbol]) -> _Solution | None:
        """Values of the unknown variables for which the index is `own`, if the index determines them, and what has to
        hold for there to be any (beside their ranges)."""
        if not unknown or index.has(FloorDiv) or index.has(Mod) or index.has(Access):
            return None
        if len(unknown) == 1 and (slope := index.coeff(unknown[0])) in (1, -1):
            rest = sympy.expand(index - slope * unknown[0])
            return None if rest.has(unknown[0]) else ({unknown[0]: slope * (own - rest)}, ())
        start, index = index.as_coeff_Add()
        extents = {v.name: self.forward.extent(v.name) for v in unknown}
        steps = [c for v in unknown if (c := index.coeff(v)).is_Integer and c > 0]
        step = min(steps, default=sympy.Integer(1))
        found = counted(index, extents, step)
        if found is None:
            return None
        values = digits(own - start, [extents[r] for r in found], step)
        between = () if step == 1 else (sympy.Eq(Mod(own - start, step), 0, evaluate=False),)
        return dict(zip(map(var, found), values, strict=True)), between

    def _inside(self, v: sympy.Symbol, value: Expr) -> list[Boolean]:
        bounds = [sympy.Ge(value, 0), sympy.Lt(value, self.forward.extent(v.name))]
        return [b for b in bounds if b != sympy.true]

    def _renamed(self, rank: str, target: Tensor) -> str:
        """A rank variable that is summed, under a name that the tensor's own ranks do not have."""
        if rank not in target.ranks:
            return rank
        return self._new_rank(rank, self.forward.extent(rank))

    def _new_rank(self, like: str, extent: Expr) -> str:
        name = self.names(f"{like}s")
        self.ranks.append(Rank(name, extent))
        return name

    def _in_group(
        self, index: Expr, rank: str, unknown: list[sympy.Symbol], groups: dict[sympy.Symbol, _Group]
    ) -> bool:
        """Whether an index is the quotient of a variable or the remainder; `groups` then has what its rank is."""
        if not isinstance(index, (FloorDiv, Mod)) or not index.args[1].is_Integer:
            return False
        variable, size = index.args
        if variable not in unknown and variable not in groups:
            return False
        group = groups.get(variable, _Group(size))
        part = "quotient" if isinstance(index, FloorDiv) else "remainder"
        known = part == "quotient" or self.forward.extent(str(variable)).is_Integer
        if group.size != size or getattr(group, part) is not None or not known:
            return False
        groups[variable] = replace(group, **{part: rank})
        return True

    def _grouped(
        self, part: _Part, target: Tensor, groups: Mapping[sympy.Symbol, _Group], renames: Mapping[Expr, Expr]
    ) -> _Part:
        """A tensor read at `h // 4` gets the sum of a group, one read at `h % 4` that of every fourth: first for every
        h, which `part` is, then over the digit of h that the tensor lacks. One read at both has a place for every h."""
        digit_of: dict[str, str] = {}  # which rank the tensor has for every h, by those that are its digits
        places: dict[str, Expr] = {}  # and where it is read
        conditions: list[Boolean] = []
        for variable, group in groups.items():
            whole, extent, size = renames[variable].name, self.forward.extent(str(variable)), group.size
            count = self.forward.extent(group.quotient) if group.quotient else ceil_div(extent, size)
            quotient = group.quotient or self._new_rank(str(variable), count)
            remainder = group.remainder or self._new_rank(str(variable), size)
            digit_of |= {quotient: whole, remainder: whole}
            places[whole] = var(quotient) * size + var(remainder)
            if sympy.expand(count * size - extent) != 0:
                conditions.append(sympy.Lt(places[whole], extent))
            if group.remainder and self.forward.extent(remainder) != size:
                conditions.append(sympy.Lt(var(remainder), size))
        ranks = tuple(dict.fromkeys(digit_of.get(r, r) for r in target.ranks))
        part = self._by_rows(part, replace(target, ranks=ranks))
        each = Tensor(self.names(f"d{target.name}e"), ranks, self.wide)
        self.made[each.name] = Einsum(each, part.expr, part.reduce, part.domain)
        lacking = tuple(r for r in digit_of if r not in target.ranks)
        read = each(*(places.get(r, var(r)) for r in ranks))
        return _Part(read, Reduction("sum", lacking) if lacking else None, conjoin(conditions))


def _summaries(cascade: Cascade) -> frozenset[str]:
    """Reductions over a rank that another statement's tensor has: row statistics, and what only they allow. A copy of
    an input is no more than the input."""
    made = {
        r: {s.name for s in cascade.body if r in s.output.ranks and not isinstance(s.expr, Access)}
        for r in cascade.rank_table
    }
    found = set()
    for s in cascade.body:
        if s.reduce and any(a.tensor in made[r] for r in s.reduce.ranks for a in s.reads):
            found.add(s.name)
    return frozenset(found)


def _unconditional(expr: Expr) -> tuple[Access, ...]:
    """The accesses that every point of the expression reads."""
    if isinstance(expr, Access):
        return (expr, *(a for i in expr.index for a in _unconditional(i)))
    args = expr.args[:1] if isinstance(expr, Where) else expr.args
    return tuple(a for arg in args for a in _unconditional(arg))
