"""Raising one operation at a time: what an index becomes through a view, what an operation is as an expression."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from einscade.compiler.aten_views import view
from einscade.compiler.raising_constants import recognise
from einscade.compiler.raising_index import at_least, bounds, joined, quotient_and_rest, reshape_index
from einscade.ir import var
from einscade.ir.expr import FloorDiv, Mod
from tests.compiler.region_oracle import check, trace, values_of

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 20),
    "reshape_split": lambda x: x.view(2, 3, 2, 2, 5),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(-1, 0),
    "t": lambda x: x[0].t(),
    "expand": lambda x: x[:, :1].expand(2, 7, 4, 5),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:, :, :1].squeeze(2),
    "slice": lambda x: x[:, 1:, -3::2],
    "select": lambda x: x[:, -1],
    "flip": lambda x: x.flip(0, 2),
    "roll": lambda x: x.roll((1, -2), (1, 2)),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "unfold": lambda x: x.unfold(2, 3, 1),
    "diagonal": lambda x: x.diagonal(1, 1, 2),
    "as_strided": lambda x: x.as_strided((2, 3, 4), (1, 2, 3), 5),
    "split": lambda x: x.split(2, 2)[1],
    "chunk": lambda x: x.chunk(2, 2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "clone": lambda x: x.transpose(0, 1).contiguous(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_view(name: str) -> None:
    """Following the index back to the input finds the very element, at every index."""
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)[:, :, :, 0] if name == "t" else torch.arange(120).view(2, 3, 4, 5)
    if name in ("permute", "expand", "squeeze", "diagonal"):
        x = torch.arange(24).view(2, 3, 4)
    if name in ("expand",):
        x = torch.arange(24).view(2, 3, 4)[:, :, :, None].expand(2, 3, 4, 5).contiguous()
    gm = trace(VIEWS[name], [x])
    result = VIEWS[name](x)
    (output,) = gm.graph.find_nodes(op="output")
    node = output.args[0]
    names = [f"i{d}" for d in range(result.dim())]
    extents = {n: sympy.Integer(s) for n, s in zip(names, result.shape, strict=True)}
    index = tuple(var(n) for n in names)
    while node.op != "placeholder":
        moved = view(node, index, extents)
        assert moved is not None, node.target
        node, index = moved
    for point in itertools.product(*map(range, result.shape)):
        at = {var(n): sympy.Integer(i) for n, i in zip(names, point, strict=True)}
        place = tuple(int(i.xreplace(at)) for i in index)
        assert x[place] == result[point]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same number of elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=5))

    def grouped() -> list[int]:
        shape = [1]
        for f in draw(st.permutations(factors)):
            if draw(st.booleans()):
                shape.append(f)
            else:
                shape[-1] *= f
        return shape

    return grouped(), grouped()


@settings(max_examples=150, deadline=None)
@given(shapes())
def test_reshape(pair: tuple[list[int], list[int]]) -> None:
    new, old = pair
    names = [f"i{d}" for d in range(len(new))]
    extents = {n: sympy.Integer(s) for n, s in zip(names, new, strict=True)}
    sizes = [tuple(map(sympy.Integer, shape)) for shape in (new, old)]
    index = reshape_index(tuple(map(var, names)), *sizes, extents)
    elements = torch.arange(torch.Size(old).numel())
    for point in itertools.product(*map(range, new)):
        at = {var(n): sympy.Integer(i) for n, i in zip(names, point, strict=True)}
        place = tuple(int(i.xreplace(at)) for i in index)
        assert elements.view(old)[place] == elements.view(new)[point]


def test_reshape_of_symbols() -> None:
    b, h, p, e, B, H, P = map(var, ("b", "h", "p", "e", "B", "H", "P"))
    extents = {"b": B, "h": H, "p": P, "e": sympy.Integer(8)}
    merged = (sympy.expand(b * H + h), p, e)
    shape = (B * H, P, sympy.Integer(8))
    assert reshape_index(merged, shape, (B, H, P, sympy.Integer(8)), extents) == (b, h, p, e)


def test_relative_shift_is_affine() -> None:
    """Row by row one place further: `(p * M + m + M) // (M + 1)` where it stays in its row."""
    p, m, P, M = map(var, ("p", "m", "P", "M"))
    length = P + M
    whole, rest = quotient_and_rest(sympy.expand(p * (length - 1) + m + P), length, {"p": P, "m": M})
    assert (whole, rest) == (p, m - p + P)


def test_joined() -> None:
    x = var("x")
    assert joined(7 * FloorDiv(x, 7) + Mod(x, 7)) == x
    assert joined(21 * FloorDiv(x, 7) + 3 * Mod(x, 7) + 1) == 3 * x + 1
    assert joined(6 * FloorDiv(x, 7) + Mod(x, 7)) == 6 * FloorDiv(x, 7) + Mod(x, 7)


def test_bounds_and_signs() -> None:
    h, H, P = map(var, ("h", "H", "P"))
    assert bounds(h * P, {"h": H}) == (0, (H - 1) * P)
    assert at_least(sympy.expand(H * P - P))
    assert not at_least(H - P)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.full((3, 4), 2.5), lambda p, m: 2.5),
        (torch.arange(3, 24, 3).view(1, -1), lambda p, m: 3 + 3 * m),
        (torch.ones(5, 5, dtype=torch.bool).tril(), lambda p, m: m <= p),
        (torch.ones(5, 7).triu(-1).tril(2), lambda p, m: float(p - 1 <= m <= p + 2)),
        (torch.full((4, 4), -torch.inf).triu(1), lambda p, m: 0.0 if m <= p else -torch.inf),
        (torch.tensor([[1, 1, 0, 0, 0]]), lambda p, m: int(m < 2)),
    ],
    ids=["constant", "sequence", "lower", "band", "additive", "prefix"],
)
def test_known_values(value: Tensor, expected: Callable[[int, int], float]) -> None:
    p, m = var("p"), var("m")
    form = recognise(value, (p, m))
    assert form is not None
    for i, j in itertools.product(*map(range, value.shape)):
        got = form.xreplace({p: sympy.Integer(i), m: sympy.Integer(j)})
        assert (bool(got) if value.dtype == torch.bool else float(got)) == expected(i, j) == value[i, j].item()


UNKNOWN = [torch.rand(4, 4), torch.tensor([1, 0, 1, 1, 0]), torch.eye(3)[torch.tensor([0, 2, 1])]]


@pytest.mark.parametrize("value", UNKNOWN)
def test_unknown_values(value: Tensor) -> None:
    assert recognise(value, tuple(var(f"i{d}") for d in range(value.dim()))) is None


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda s: torch.add(s, s.square(), alpha=2), "rsub": lambda s: 1 - s.exp(), "remainder": lambda s: s % 0.7,
    "fmod": lambda s: torch.fmod(s, 0.7), "floor_divide": lambda s: s // 0.3, "true_divide": lambda s: s.exp() / 3,
    "abs": torch.abs, "sign": torch.sign, "exp2": torch.exp2, "expm1": torch.expm1, "log1p": lambda s: s.abs().log1p(),
    "log2": lambda s: (s.abs() + 1).log2(), "log10": lambda s: (s.abs() + 1).log10(), "sqrt": lambda s: s.abs().sqrt(),
    "rsqrt": lambda s: (s.abs() + 1).rsqrt(), "reciprocal": lambda s: (s.abs() + 1).reciprocal(), "pow": lambda s: s**3,
    "pow_half": lambda s: (s.abs() + 1) ** 0.5, "power_of": lambda s: 3.0**s, "sin": torch.sin, "cos": torch.cos,
    "tan": lambda s: (s / 9).tan(), "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh,
    "erf": torch.erf, "erfc": torch.erfc, "sigmoid": torch.sigmoid, "logsigmoid": F.logsigmoid, "silu": F.silu,
    "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish,
    "leaky_relu": lambda s: F.leaky_relu(s, 0.1), "threshold": lambda s: F.threshold(s, 0.2, -1.0), "elu": F.elu,
    "selu": F.selu, "celu": F.celu, "gelu": F.gelu, "gelu_tanh": lambda s: F.gelu(s, approximate="tanh"),
    "softplus": lambda s: F.softplus(s, beta=2), "mish": F.mish, "maximum": lambda s: torch.maximum(s, s.square()),
    "minimum": lambda s: torch.minimum(s, s.square()), "clamp": lambda s: s.clamp(-1, 0.5),
    "clamp_min": lambda s: s.clamp(min=0.1),
    "logaddexp": lambda s: torch.logaddexp(s, s.sin()), "xlogy": lambda s: torch.xlogy(s.relu(), s.exp()),
    "logit": lambda s: s.sigmoid().logit(), "logit_clamped": lambda s: s.logit(0.2), "frac": torch.frac,
    "softshrink": lambda s: F.softshrink(s, 0.3), "hardshrink": lambda s: F.hardshrink(s, 0.3),
    "floor": lambda s: s.exp().floor(), "ceil": lambda s: s.exp().ceil(), "round": lambda s: (3 * s).round(),
    "trunc": lambda s: (3 * s).trunc(), "lerp": lambda s: torch.lerp(s, s.exp(), 0.3),
    "to_int": lambda s: (3 * s).long().double(),
    "addcmul": lambda s: torch.addcmul(s, s, s, value=0.5),
    "addcdiv": lambda s: torch.addcdiv(s, s, s.exp(), value=0.5),
    "compare": lambda s: (s > 0.1).double(), "logical": lambda s: ((s > 0) ^ (s < 0.5) | ~(s >= -1)).double(),
    "where": lambda s: torch.where(s > 0, s, s.exp()), "masked_fill": lambda s: s.masked_fill(s > 0, 0.25),
    "nan_to_num": lambda s: s.exp().nan_to_num(0.0), "boolean_sum": lambda s: (s > 0).sum(-1, keepdim=True) * s,
    "amax": lambda s: s.exp() - s.amax(-1, keepdim=True), "amin": lambda s: s.exp() - s.amin((2, 3), keepdim=True),
    "mean": lambda s: s.square() - s.mean(-1, keepdim=True), "prod": lambda s: s.exp() * s.prod(-1, keepdim=True),
    "any": lambda s: s.exp() * (s > 1).any(-1, keepdim=True), "all": lambda s: s.exp() * (s > -2).all(-1, keepdim=True),
    "var": lambda s: s.exp() - s.var(-1, keepdim=True), "std": lambda s: s.exp() / s.std((2, 3), False, keepdim=True),
    "var_mean": lambda s: s.exp() * sum(torch.var_mean(s, -1, keepdim=True)),
    "std_mean": lambda s: s.exp() * sum(torch.std_mean(s, 2, keepdim=True, correction=0)),
    "norm_one": lambda s: F.normalize(s, p=1.0, dim=-1), "norm_inf": lambda s: F.normalize(s, p=torch.inf, dim=-1),
    "norm_least": lambda s: s.exp() * s.norm(-torch.inf, dim=-1, keepdim=True),
    "norm": lambda s: s.exp() / s.norm(dim=-1, keepdim=True), "log_softmax": lambda s: s.log_softmax(-1),
    "softmax_other": lambda s: s.softmax(-2), "logsumexp": lambda s: s.exp() - s.logsumexp(-1, keepdim=True),
    "tril": lambda s: s.tril(1), "triu": lambda s: s.exp().triu(-1), "pad": lambda s: F.pad(s.exp(), (1, 0))[..., 1:],
    "cat_split": lambda s: torch.cat([s.exp()[..., :3], s.sin()[..., 3:]], -1).softmax(-1),
    "gather": lambda s: s.exp().gather(-1, torch.arange(6).flip(0).expand(2, 3, 5, 6)),
    "index_select": lambda s: s.exp().index_select(-1, torch.arange(6).flip(0)), "flip": lambda s: s.exp().flip(-1),
    "slice_scatter": lambda s: torch.slice_scatter(s.exp(), s[..., :2], -1, 1, 3),
    "select_scatter": lambda s: torch.select_scatter(s.exp(), s[..., 0], -1, 4),
    "diagonal_scatter": lambda s: torch.diagonal_scatter(s.exp(), s[..., 0], 0, 2, 3),
    "diagonal_scatter_above": lambda s: torch.diagonal_scatter(s.exp(), s[..., 0, :4], 2, -2, -1),
    "diagonal_scatter_below": lambda s: torch.diagonal_scatter(s.exp(), s[..., 0, :4], -1, 2, 3),
    "index_put": lambda s: s.exp().index_put((s > 0,), torch.tensor(0.25, dtype=s.dtype)),
    "index_put_rows": lambda s: torch.ops.aten.index_put(s.exp(), (None, None, torch.arange(5) > 2), s[0, 0, 0, :1]),
    "argmax": lambda s: s.exp() * s.argmax(-1, keepdim=True),
    "argmax_of_queries": lambda s: s.exp() + s.argmax(2)[:, :, None],
    "place_of_max": lambda s: s.exp() - s.max(-1, keepdim=True).indices,
    "scatter": lambda s: s.exp().scatter(-1, s.argmax(-1, keepdim=True), 0.5),
    "scatter_tensor": lambda s: torch.zeros_like(s).scatter(2, s.argmax(2, keepdim=True), s.amax(2, keepdim=True)),
    "scatter_boolean": lambda s: s.exp() * (s > 0).scatter(-1, s.argmax(-1, keepdim=True), True),
    "one_hot": lambda s: s.exp() * F.one_hot(s.argmax(-1), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
def test_operation_between_scores_and_values(name: str) -> None:
    operation = POINTWISE[name]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    args = [q, k, v]
    (region,) = check(trace(lambda q, k, v: operation(q @ k.mT / 2) @ v, args), args)
    assert region.reason is None


def test_values_of_runs_the_graph() -> None:
    x = torch.randn(3)
    gm = trace(lambda x: x.sin() + 1, [x])
    (output,) = gm.graph.find_nodes(op="output")
    torch.testing.assert_close(values_of(gm, [x])[output.args[0]], x.sin() + 1)
