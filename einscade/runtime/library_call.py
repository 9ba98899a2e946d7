"""The call of torch's `scaled_dot_product_attention` that computes a cascade, as a module like any generated kernel.

Comes in: a cascade that `library` recognises. Goes out: `Source` in "torch", or `NotInLibrary`. Operands are views;
where dimensions of a tensor are split among ranks they are written with sizes and strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from sympy.logic.boolalg import And, Boolean, Not, Or

from einscade.codegen.source import Source
from einscade.ir.cascade import Cascade
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Where, free_vars, var
from einscade.runtime.library import Attention, NotInLibrary, View, recognise
from einscade.runtime.program import DTYPES

__all__ = ["Number", "Writer", "emit", "module", "needs_mask", "one_query"]


def emit(cascade: Cascade) -> Source:
    """A module that calls the library for a recognised cascade. Raises NotInLibrary."""
    a = recognise(cascade)
    types = {cascade.tensors[x.tensor].dtype for x in (a.query, a.key, a.value)}
    if len(types) != 1 or not types <= {"f64", "f32", "f16", "bf16"}:
        raise NotInLibrary(f"queries, keys and values of types {', '.join(sorted(types))}")
    return Source("torch", Writer(cascade, a).text())


def needs_mask(cascade: Cascade) -> bool:
    """Whether the call for a recognised cascade makes a mask tensor at every length. Raises NotInLibrary."""
    a = recognise(cascade)
    return bool(a.bias) or (bool(a.domain) and Writer(cascade, a).causal_offset() is None)


def one_query(cascade: Cascade) -> bool:
    """Whether a recognised cascade has a single query position, whatever the sizes. Raises NotInLibrary."""
    return bool(cascade.extent(recognise(cascade).p) == 1)


def module(cascade: Cascade, lines: Sequence[str], before: str = "") -> str:
    """A module whose `run` computes the cascade by these lines. `before`: functions that they call."""
    symbols = list(cascade.symbols)
    names = [t.name for t in cascade.inputs]
    signature = ", ".join(names + (["*", *symbols] if symbols else []))
    doc = "\n".join("    " + line for line in str(cascade).splitlines())
    body = "\n".join("    " + line for line in lines)
    return (
        f'"""{cascade.name}: a call of torch\'s library, which computes this cascade\n\n{doc}\n"""\n\n'
        f"import torch\n\n\n{before}"
        f"def run({signature}) -> tuple[torch.Tensor, ...]:\n{body}\n"
    )


class Writer:
    """Writes calls: operands as views in the library's layout, [batch, head, row, column]."""

    def __init__(self, cascade: Cascade, a: Attention) -> None:
        self.cascade, self.a = cascade, a
        self.axes = (*a.batch, a.p, a.m)
        self.ranges: dict[str, str] = {}
        self.lines: list[str] = []
        taken = {*cascade.tensors, *cascade.symbols, "torch"}
        q, k, v, mask, causal, offset, out = (
            name if name not in taken else f"{name}_call" for name in ("q", "k", "v", "mask", "causal", "offset", "out")
        )
        self.q, self.k, self.v, self.mask_name, self.causal, self.offset, self.out = q, k, v, mask, causal, offset, out

    def text(self) -> str:
        a = self.a
        self.lines = [
            f"{self.q} = {self.operand(a.query, (*a.batch, a.p, a.e))}",
            f"{self.k} = {self.operand(a.key, (*a.batch, a.m, a.e))}",
            f"{self.v} = {self.operand(a.value, (*a.batch, a.m, a.f))}",
        ]
        self.mask()
        heads = ", enable_gqa=True" if a.group > 1 else ""
        scale = Number().code(a.scale)
        self.lines.append(
            f"{self.out} = torch.nn.functional.scaled_dot_product_attention({self.q}, {self.k}, {self.v}, "
            f"attn_mask={self.mask_name}, is_causal={self.causal}, scale={scale}{heads})"
        )
        self.lines.append(f"return ({self.result()},)")
        return module(self.cascade, self.lines)

    def operand(self, access: Access, ranks: tuple[str, ...], shared: bool = False) -> str:
        """The tensor as [batch, head, row, column]: dimensions in the call's order, made four. `shared`: heads that
        the tensor does not have stay one head."""
        view = View.of(access)
        divided = any(i.has(FloorDiv) for i in access.index)
        if self.is_permutation(access):
            dims = {steps[0][0]: rank for rank, steps in view.steps}
            code = self.aligned(access.tensor, [dims[d] for d in sorted(dims)], ranks)
        else:
            code = self.strided(access.tensor, view, ranks, divided)
        batch = len(ranks) - 2
        sizes = [Number().code(self.cascade.extent(r)) for r in self.a.batch]
        if batch > 2:
            if divided or shared:
                sizes[-1] = "-1"
            return f"{code}.expand({', '.join(sizes)}, -1, -1).flatten(0, {batch - 2})"
        missing = [r not in view.ranks and not (shared and r == self.a.batch[-1]) for r in self.a.batch]
        if any(missing):
            sizes = [n if m else "-1" for n, m in zip(sizes, missing, strict=True)]
            code += f".expand({', '.join(sizes)}, -1, -1)"
        return f"{code}[{'None, ' * (2 - batch)}...]" if batch < 2 else code

    def is_permutation(self, access: Access) -> bool:
        """Whether the access reads all of its tensor, each dimension along a rank of its own."""
        view, extent, own = View.of(access), self.cascade.extent, self.cascade.tensors[access.tensor].ranks
        whole = all(not i.is_Symbol or extent(i.name) == extent(r) for i, r in zip(access.index, own, strict=True))
        return view.is_plain and whole and len(view.steps) == len(access.index)  # else a dimension of 1 is read at 0

    def strided(self, tensor: str, view: View, ranks: tuple[str, ...], divided: bool) -> str:
        """The view by its sizes and strides, where dimensions of the tensor are split among ranks."""
        steps = dict(view.steps)
        sizes, strides = [], []
        for r in ranks:
            extent = self.cascade.extent(r)
            if r not in steps:
                sizes.append("1")
                strides.append("0")
                continue
            sizes.append(Number().code(FloorDiv(extent, self.a.group) if divided and r == self.a.batch[-1] else extent))
            strides.append(" + ".join(self.step(tensor, d, c) for d, c in steps[r]))
        offset = " + ".join([f"{tensor}.storage_offset()", *(self.step(tensor, d, c) for d, c in view.start)])
        return f"{tensor}.as_strided(({', '.join(sizes)}), ({', '.join(strides)}), {offset})"

    @staticmethod
    def step(tensor: str, dimension: int, coefficient: Expr) -> str:
        return (f"{coefficient} * " if coefficient != 1 else "") + f"{tensor}.stride({dimension})"

    @staticmethod
    def aligned(tensor: str, names: Sequence[str], ranks: Sequence[str]) -> str:
        """A tensor with dimensions `names` as a view with dimensions `ranks`, of size 1 where it lacks one."""
        order = [names.index(r) for r in ranks if r in names]
        code = tensor if order == list(range(len(order))) else f"{tensor}.permute({', '.join(map(str, order))})"
        missing = [axis for axis, r in enumerate(ranks) if r not in names]
        for axis in missing:
            code += f".unsqueeze({axis})"
        return code

    def mask(self) -> None:
        """`mask` and `causal`: nothing where the domain is everything, `is_causal` where it is the plain triangle."""
        a, mask, causal = self.a, self.mask_name, self.causal
        offset = self.causal_offset()
        if not a.domain and not a.bias:
            self.lines.append(f"{mask}, {causal} = None, False")
        elif offset == 0 and not a.bias:
            self.lines.append(f"{mask}, {causal} = None, True")
        elif offset is not None and not a.bias:
            m = Number().code(self.cascade.extent(a.m))
            self.lines.append(f"{self.offset} = {Number().code(offset)}")
            self.lines.append(f"{mask}, {causal} = None, {self.offset} == 0")
            self.lines.append(f"if not {causal} and {self.offset} < {m} - 1:  # torch knows the top-left triangle only")
            before = len(self.lines)
            code = self.fitted(self.expression(next(iter(a.domain))))
            self.lines[before:] = ["    " + line for line in [*self.lines[before:], f"{mask} = {code}"]]
        else:
            parts = [self.expression(c) for c in sorted(a.domain, key=str)]
            domain = " & ".join(f"({p})" for p in parts)
            if a.bias:
                bias = " + ".join(self.expression(b) for b in a.bias)
                code = f"({bias}).to({self.q}.dtype)"
                if domain:
                    code = f'torch.where({domain}, {code}, float("-inf"))'
            else:
                code = domain
            self.lines.append(f"{mask}, {causal} = {self.fitted(code)}, False")

    def fitted(self, code: str) -> str:
        """A mask over `axes` as the call's four dimensions (or fewer)."""
        batch = len(self.a.batch)
        if batch <= 2:
            return code
        sizes = [Number().code(self.cascade.extent(r)) for r in self.axes]
        return f"({code}).expand({', '.join(sizes)}).flatten(0, {batch - 2})"

    def causal_offset(self) -> Expr | None:
        """`o` where the domain is `m <= p + o` and `o` depends on sizes only."""
        if len(self.a.domain) != 1:
            return None
        condition = next(iter(self.a.domain))
        if isinstance(condition, (sympy.Le, sympy.Lt)):
            difference = condition.rhs - condition.lhs - (1 if isinstance(condition, sympy.Lt) else 0)
        elif isinstance(condition, (sympy.Ge, sympy.Gt)):
            difference = condition.lhs - condition.rhs - (1 if isinstance(condition, sympy.Gt) else 0)
        else:
            return None
        offset = sympy.expand(difference - var(self.a.p) + var(self.a.m))
        return None if offset.has(Access) or free_vars(offset) & set(self.cascade.rank_table) else offset

    def expression(self, expr: Expr | Boolean) -> str:
        return _Elementwise(self).code(expr)

    def range(self, rank: str) -> str:
        """The variable that holds a rank's values along its axis."""
        if rank not in self.ranges:
            shape = ["1"] * len(self.axes)
            shape[self.axes.index(rank)] = "-1"
            extent = Number().code(self.cascade.extent(rank))
            self.lines.append(f"{rank}_ = torch.arange({extent}, device={self.q}.device).view({', '.join(shape)})")
            self.ranges[rank] = f"{rank}_"
        return self.ranges[rank]

    def result(self) -> str:
        a = self.a
        batch = len(a.batch)
        code = self.out
        if batch < 2:
            code = f"{self.out}[{', '.join(['0'] * (2 - batch))}]"
        elif batch > 2:
            sizes = ", ".join(Number().code(self.cascade.extent(r)) for r in a.batch[:-1])
            code = f"{self.out}.unflatten(0, ({sizes}))"
        made = (*a.batch, a.p, a.f)
        order = [made.index(r) for r in self.cascade.tensors[self.cascade.outputs[0]].ranks]
        if order != list(range(len(order))):
            code += f".permute({', '.join(map(str, order))})"
        out = self.cascade.tensors[self.cascade.outputs[0]]
        return code if out.dtype == self.cascade.tensors[a.query.tensor].dtype else f"{code}.to({DTYPES[out.dtype]})"


class Number:
    """Expressions over sizes as Python."""

    infix = {sympy.Add: " + ", sympy.Mul: " * "}  # noqa: RUF012

    def code(self, expr: Expr) -> str:
        if expr.is_Symbol:
            return self.symbol(expr.name)
        if isinstance(expr, Access):
            return self.access(expr)
        if expr.is_Integer:
            return str(int(expr))
        if expr.is_number:
            return f"float('{float(expr)}')" if expr.is_infinite else repr(float(expr))
        if expr.is_Pow and expr.exp == -1:
            return f"(1 / {self.code(expr.base)})"
        if expr.is_Pow and expr.exp.is_Integer and expr.exp.is_positive:
            return f"({self.code(expr.base)} ** {expr.exp})"
        args = [self.code(x) for x in expr.args]
        for kind, sign in self.infix.items():
            if isinstance(expr, kind):
                return "(" + sign.join(args) + ")"
        if isinstance(expr, FloorDiv):
            return f"({args[0]} // {args[1]})"
        if isinstance(expr, Mod):
            return f"({args[0]} % {args[1]})"
        return self.other(expr, args)

    def symbol(self, name: str) -> str:
        return name

    def access(self, access: Access) -> str:
        raise NotInLibrary(f"a size that depends on {access.tensor}")

    def other(self, expr: Expr, args: list[str]) -> str:
        if isinstance(expr, (sympy.Max, sympy.Min)):
            return f"{type(expr).__name__.lower()}({', '.join(args)})"
        raise NotInLibrary(f"{type(expr).__name__} in a size")


_COMPARISONS = {sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!="}


class _Elementwise(Number):
    """Expressions over query and key positions as broadcasting torch code."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def symbol(self, name: str) -> str:
        return self.writer.range(name) if name in self.writer.axes else name

    def access(self, access: Access) -> str:
        """A view where every index is a rank of its own or a number (a dimension of 1 is read at 0), else a gather."""
        names = [i.name for i in access.index if i.is_Symbol]
        plain = all(i.is_Symbol or i.is_Integer for i in access.index)
        if plain and len(set(names)) == len(names) and set(names) <= set(self.writer.axes):
            last = max((d for d, i in enumerate(access.index) if i.is_Integer), default=-1)
            at = [str(i) if i.is_Integer else ":" for i in access.index[: last + 1]]
            code = access.tensor + (f"[{', '.join(at)}]" if at else "")
            return self.writer.aligned(code, names, self.writer.axes)
        return f"{access.tensor}[{', '.join(self.code(i) for i in access.index)}]"

    def other(self, expr: Expr, args: list[str]) -> str:
        for kind, sign in _COMPARISONS.items():
            if isinstance(expr, kind):
                return f"({args[0]} {sign} {args[1]})"
        if isinstance(expr, (And, Or)):
            return "(" + (" & " if isinstance(expr, And) else " | ").join(args) + ")"
        if isinstance(expr, Not):
            return f"(~{args[0]})"
        if isinstance(expr, Where):
            return f"torch.where({', '.join(args)})"
        raise NotInLibrary(f"{type(expr).__name__} in a bias or domain")
