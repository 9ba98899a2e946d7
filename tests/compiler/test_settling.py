"""Where every size of a bare tensor may move, widths are numbers all the same: kernels for a GPU stay, and lengths and
batches cost at most two compilations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import einscade
from einscade.codegen.loops import plan
from einscade.codegen.offline import compile_offline
from einscade.codegen.source import Unsupported
from einscade.codegen.space import candidates as schedules
from einscade.codegen.triton_emit import emit
from einscade.compiler.compile import compile_graph
from einscade.compiler.regions import find
from einscade.compiler.report import Report
from einscade.compiler.settling import WIDEST, held_whole
from einscade.ir.cascade import Cascade
from einscade.ir.device import H200
from einscade.ir.text import parse_cascade
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from tests.compiler.region_oracle import trace
from tests.spellings.cases import CASES, Case, M, P, inputs, moved

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here is which programs are made, and that they are right: no kernel is measured for each size."""
    monkeypatch.setenv("EINSCADE_AUTOTUNE", "0")


@dataclass
class Compiled:
    """A function compiled with the backend, and how often."""

    function: Callable[..., Any]
    dynamic: bool | None = True
    graphs: int = 0
    report: Report = field(default_factory=lambda: Report("exact", "eager"))

    def __post_init__(self) -> None:
        self.call = torch.compile(self.function, backend=self._backend, dynamic=self.dynamic)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        compiled = compile_graph(gm, example_inputs, "exact", "eager", self.report)  # may ask for another trace
        self.graphs += 1
        return compiled

    def check(self, *args: Any) -> None:
        with torch.no_grad():
            got, expected = pytree.tree_leaves(self.call(*args)), pytree.tree_leaves(self.function(*args))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @property
    def cascade(self) -> Cascade:
        """Of the only site of the newest graph."""
        (site,) = self.report.sites
        assert site.status == "rewritten", site.reason
        assert site.cascade is not None
        return site.cascade


def numbers(cascade: Cascade) -> dict[str, int]:
    """The extents that are known."""
    return {r.name: int(r.extent) for r in cascade.ranks if r.extent.is_Integer}


def kernel_for_a_gpu(cascade: Cascade, build: bool = False) -> bool:
    """Whether the Triton emitter lowers the cascade for Hopper, for queries that are many; with `build`, Triton has to
    compile what it wrote."""
    loops = plan(run(cascade, recipe("exact")).cascade)
    batches = {"B": 2, "H": 8}
    try:
        schedule, *_ = schedules(loops, H200, {s: n for s, n in batches.items() if s in loops.cascade.symbols})
        emit(loops, schedule)
    except Unsupported:
        return False
    if build:
        assert compile_offline(loops, schedule, "cuda:90")
    return True


@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.name)
def test_a_spelling_keeps_its_kernel(case: Case) -> None:
    """Every second one, for time; `tests/spellings` has all of them at one length."""
    compiled = _spelled(case)
    with_kernel = [s.cascade is not None and kernel_for_a_gpu(s.cascade) for s in compiled.report.sites]
    assert len(with_kernel) == case.sites
    if not all(with_kernel):  # then none can be written where all but the lengths is known either
        regions = find(trace(case.function, inputs(case), (P, M)))
        assert with_kernel == [r.cascade is not None and kernel_for_a_gpu(r.cascade) for r in regions]


@pytest.mark.parametrize("name", ["sdpa_grouped", "packed_chunk", "talking_heads", "window_causal", "documents"])
def test_kernels_without_known_heads_compile(name: str) -> None:
    """Where a number of heads is a symbol, it is one in the kernel too."""
    pytest.importorskip("triton")
    (site,) = _spelled(next(c for c in CASES if c.name == name)).report.sites
    assert site.cascade is not None
    assert kernel_for_a_gpu(site.cascade, build=True)


def _spelled(case: Case) -> Compiled:
    """The case compiled for sizes that move, and called at lengths that it takes: some are written for one length."""
    function = case.function.float() if isinstance(case.function, nn.Module) else case.function
    compiled = Compiled(function)
    compiled.check(*inputs(case))
    for batch, queries, keys in ((5, 9, 11), (6, 12, 15)):  # one bucket: one kernel
        if case.sites > 1:  # a loop in Python, over so many
            break
        args = inputs(moved(case, batch, queries, keys))
        try:
            function(*args)
        except (RuntimeError, IndexError):
            continue
        compiled.check(*args)
    assert compiled.graphs <= 2
    return compiled


# -- bare functions ----------------------------------------------------------------------------------------------------


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * (1 / math.sqrt(q.size(-1)))).softmax(-1) @ v


def by_power(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def by_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype))).softmax(-1) @ v


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        n, e = x.shape[-2:]
        angle = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, e, 2) / e)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    return whole(turn(q), turn(k), v)


def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.size(-2))
    keep = (at[:, None] // 9 == at // 9) & (at[:, None] >= at)
    return (q @ k.mT).masked_fill(~keep, -math.inf).softmax(-1) @ v


def qkv(batch: int, queries: int, keys: int | None = None, width: int = 16, heads: int = 4, shared: int = 1
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys = queries if keys is None else keys
    shapes = ((batch, heads, queries, width), *[(batch, heads // shared, keys, width)] * 2)
    q, k, v = (torch.randn(shape) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("function", [scaled, by_power, by_tensor, whole, rotated, documents])
def test_lengths_and_batches_cost_two_compilations(function: Callable[..., Tensor]) -> None:
    compiled = Compiled(function)
    for batch, n in ((2, 100), (3, 7), (5, 333), (2, 4096)):
        compiled.check(*qkv(batch, n) if n < 4096 else (x[:, :1] for x in qkv(batch, n, heads=2)))
        if n == 333:
            assert compiled.graphs == 1
            assert numbers(compiled.cascade) == {"e": 16, "f": 16}
            assert kernel_for_a_gpu(compiled.cascade)
    compiled.check(*qkv(2, 1))
    assert compiled.graphs <= 3  # one head, and a single query, are graphs of Dynamo's own


@pytest.mark.parametrize("first", [(2, 1), (1, 50), (4, 16), (2, 0)], ids=["length", "batch", "accidents", "empty"])
def test_a_first_call_of_unusual_sizes(first: tuple[int, int]) -> None:
    """Sizes of 1 are Dynamo's constants, equal ones are one symbol: that costs a graph, and no kernel afterwards."""
    compiled = Compiled(scaled)
    for batch, n in (first, (2, 50), (3, 70), (5, 9), first):
        compiled.check(*qkv(batch, n))
    assert compiled.graphs == 2
    if first == (4, 16):
        assert kernel_for_a_gpu(compiled.cascade)


@pytest.mark.parametrize("function", [scaled, whole])
def test_as_many_keys_as_queries_by_accident(function: Callable[..., Tensor]) -> None:
    compiled = Compiled(function)
    for batch, p, m in ((2, 10, 10), (2, 20, 11), (3, 15, 15), (3, 99, 30), (5, 8, 40)):
        compiled.check(*qkv(batch, p, m))
    assert compiled.graphs == 2
    assert set(compiled.cascade.symbols) == {"B", "H", "M", "P"}


def test_automatic_dynamic_lengths() -> None:
    """`dynamic=None`: values are as many as keys, though Dynamo has a symbol for each."""
    compiled = Compiled(whole, dynamic=None)
    for n, m in ((10, 12), (20, 24), (40, 80), (15, 15)):
        compiled.check(*qkv(2, n, m))
    assert compiled.graphs == 2
    assert set(compiled.cascade.symbols) == {"M", "P"}
    assert kernel_for_a_gpu(compiled.cascade)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_length_marked_as_dynamic(dynamic: bool | None) -> None:
    compiled = Compiled(scaled, dynamic)
    for n in (16, 7, 300):  # 16 is the width too
        args = qkv(2, n)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)
        compiled.check(*args)
    assert compiled.graphs == 1
    assert {"e", "f"} <= numbers(compiled.cascade).keys()
    assert kernel_for_a_gpu(compiled.cascade)


def test_a_width_marked_as_dynamic_stays_one() -> None:
    compiled = Compiled(scaled)
    for width in (16, 32):
        args = qkv(2, 50, width=width)
        for x in args:
            torch._dynamo.mark_dynamic(x, 3)
        compiled.check(*args)
    assert compiled.graphs == 1
    (site,) = compiled.report.sites
    assert site.status == "rewritten"
    assert site.reason is not None
    assert "E was marked as dynamic" in site.reason
    assert site.reason in str(compiled.report)


def test_widths_that_keep_moving() -> None:
    """Each is a graph with a kernel at first; before Dynamo gives up, one graph is made for all others."""
    compiled = Compiled(scaled)
    for width in (16, 24):
        compiled.check(*qkv(2, 50, width=width))
        assert numbers(compiled.cascade)["e"] == width
    for width in (32, 40, 48, 56, 64, 72, 80):
        compiled.check(*qkv(2, 50 + width, width=width))
    assert compiled.graphs == torch._dynamo.config.recompile_limit // 2 + 1
    (site,) = compiled.report.sites
    assert "E has moved before" in str(site.reason)


def test_channels_that_attend_over_positions() -> None:
    """What is contracted is a length there: no number, where it is longer than any width, or moves."""

    def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v

    compiled = Compiled(channels)
    for n in (WIDEST + 1, WIDEST + 70):
        compiled.check(*(torch.randn(2, 4, 16, n) for _ in range(3)))
    assert compiled.graphs == 1
    (site,) = compiled.report.sites
    assert f"is {WIDEST + 1}" in str(site.reason)


# -- heads -------------------------------------------------------------------------------------------------------------


def by_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def by_repeat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.size(1) // k.size(1)
    return scaled(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))


def by_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, g, m, e = k.shape
    groups = q.size(1) // g
    k, v = (x[:, :, None].expand(b, g, groups, m, e).reshape(b, g * groups, m, e) for x in (k, v))
    return scaled(q, k, v)


@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("function", [by_flag, by_repeat, by_expand])
def test_heads_in_groups(function: Callable[..., Tensor], queries: int) -> None:
    compiled = Compiled(function)
    for batch, m in ((3, 50), (5, 51), (7, 999)):
        compiled.check(*qkv(batch, min(queries * m, 40 + m) if queries > 1 else 1, m, heads=8, shared=4))
    assert compiled.graphs == 1
    assert "B" in compiled.cascade.symbols
    assert numbers(compiled.cascade)["h"] == 8
    assert kernel_for_a_gpu(compiled.cascade)


def in_chunks(x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in x.chunk(3, -1))
    return whole(q, k, v).transpose(1, 2).flatten(-2)


def in_one_view(x: Tensor, heads: int = 4) -> Tensor:
    b, n, width = x.shape
    q, k, v = x.view(b, n, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return scaled(q, k, v).transpose(1, 2).reshape(b, n, -1)


@pytest.mark.parametrize(("function", "rest"), [(in_chunks, ()), (in_one_view, ()), (in_one_view, (8,))])
def test_queries_keys_and_values_in_one_tensor(function: Callable[..., Tensor], rest: tuple[int, ...]) -> None:
    compiled = Compiled(function)
    for batch, n in ((2, 50), (3, 7), (5, 200)):
        compiled.check(torch.randn(batch, n, 192), *rest)
    assert compiled.graphs == 1
    assert kernel_for_a_gpu(compiled.cascade)


# -- masks and memory --------------------------------------------------------------------------------------------------


def mixed_heads(x: Tensor, mix: Tensor) -> Tensor:
    b, n, width = x.shape
    q, k, v = x.view(b, n, 3, 4, width // 12).permute(2, 0, 3, 1, 4).flatten(1, 2)
    scores = torch.baddbmm(torch.zeros(1, n, n), q, k.mT).view(b, 4, n, n)
    return torch.einsum("bhnm,hg->bgnm", scores.softmax(-1), mix) @ v.view(b, 4, n, -1)


def test_heads_mixed_over_products_of_one_batch() -> None:
    """einsum flattens the two positions, which have one length, and takes them apart again."""
    compiled = Compiled(mixed_heads)
    for batch, n in ((2, 24), (3, 40), (5, 7)):
        compiled.check(torch.randn(batch, n, 96), torch.randn(4, 4))
    assert compiled.graphs == 1
    assert {"B", "P"} <= {*compiled.cascade.symbols}
    assert "//" not in str(compiled.cascade)


def test_a_window_of_a_length_that_moves() -> None:
    def window(q: Tensor, k: Tensor, v: Tensor, width: int) -> Tensor:
        behind = torch.arange(q.size(-2))[:, None] - torch.arange(k.size(-2))
        return (q @ k.mT).masked_fill((behind < 0) | (behind >= width), -math.inf).softmax(-1) @ v

    compiled = Compiled(window)
    for n, width in ((50, 10), (70, 11), (90, 20), (33, 5)):
        compiled.check(*qkv(2, n), width)
    assert compiled.graphs == 1
    assert not any(t.name.startswith("mask") for t in compiled.cascade.inputs)
    assert kernel_for_a_gpu(compiled.cascade)


def test_an_integer_that_is_negative_sometimes() -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor, by: int) -> Tensor:
        ahead = torch.arange(k.size(-2)) - torch.arange(q.size(-2))[:, None]
        return (q @ k.mT).masked_fill(ahead > by, -1e9).softmax(-1) @ v

    compiled = Compiled(shifted)
    for n, by in ((50, 5), (70, 9), (33, -3), (40, -7), (41, 12)):
        compiled.check(*qkv(2, n), by)
    assert compiled.graphs == 2


def test_pages() -> None:
    def paged(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (keys, values))
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        keep = torch.arange(k.size(2)) < lengths[:, None, None, None]
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    compiled = Compiled(paged)
    for batch, pages, most in ((3, 20, 5), (5, 21, 7), (6, 30, 9)):
        table, lengths = torch.randint(0, pages, (batch, most)), torch.randint(1, most * 32, (batch,))
        compiled.check(torch.randn(batch, 8, 1, 16), *torch.randn(2, pages, 32, 2, 16), table, lengths)
    assert compiled.graphs == 1
    assert {"h": 8, "e": 16}.items() <= numbers(compiled.cascade).items()
    assert kernel_for_a_gpu(compiled.cascade)


def test_packed_sequences() -> None:
    def packed(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        at = torch.arange(q.size(0))
        own = torch.searchsorted(offsets, at, right=True)
        keep = (own[:, None] == own) & (at[:, None] >= at)
        scores = torch.einsum("phe,mhe->hpm", q, k).masked_fill(~keep, -math.inf)
        return torch.einsum("hpm,mhf->phf", scores.softmax(-1), v)

    compiled = Compiled(packed)
    for n, offsets in ((50, [0, 10, 30]), (70, [0, 5, 10, 50]), (33, [0, 2, 9])):
        compiled.check(*(torch.randn(n, 4, 16) for _ in range(3)), torch.tensor(offsets))
    assert compiled.graphs == 1
    assert kernel_for_a_gpu(compiled.cascade)


def test_strides_that_move() -> None:
    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    compiled = Compiled(rows)
    for batch, n in ((3, 50), (5, 70), (6, 9)):
        compiled.check(*(torch.randn(batch, n, 4, 32)[..., ::2] for _ in range(3)))
    assert compiled.graphs == 1
    assert kernel_for_a_gpu(compiled.cascade)


def test_without_a_softmax_lengths_stay_lengths() -> None:
    """As long as widths are open, what is reduced could be either."""

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.tril(q @ k.mT) @ v / q.size(-2)

    compiled = Compiled(linear)
    for batch, n in ((2, 50), (3, 7), (5, 200)):
        compiled.check(*qkv(batch, n))
    assert compiled.graphs == 1
    assert kernel_for_a_gpu(compiled.cascade)


def test_training() -> None:
    """Gradients through a graph whose widths were settled."""
    compiled = torch.compile(by_repeat, backend="einscade", dynamic=True, options={"inner": "aot_eager"})
    for n in (20, 33):
        args = [x.requires_grad_() for x in qkv(3, n, heads=8, shared=4)]
        got = torch.autograd.grad(compiled(*args).square().sum(), args)
        expected = torch.autograd.grad(by_repeat(*args).square().sum(), args)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- graph modules and exported programs -------------------------------------------------------------------------------


class ByPower(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_power(q, k, v)


def test_a_graph_module() -> None:
    fast = einscade.optimize(fx.symbolic_trace(ByPower()), dynamic=True)
    for batch, n, width in ((2, 50, 16), (3, 70, 16), (5, 9, 16), (2, 50, 32)):
        args = qkv(batch, n, width=width)
        torch.testing.assert_close(fast(*args), by_power(*args))
    assert fast.report.graphs == 2  # one for each width
    assert all(numbers(s.cascade)["e"] in (16, 32) for s in fast.report.sites)


def test_an_exported_program_keeps_the_sizes_that_it_promises() -> None:
    moving = {2: torch.export.Dim("n", min=2, max=4096), 3: torch.export.Dim("e", min=2, max=512)}
    program = torch.export.export(ByPower(), qkv(2, 50), dynamic_shapes=(moving,) * 3)
    fast = einscade.optimize(program.module())
    (site,) = fast.report.sites
    assert "moves in the exported program" in str(site.reason)
    for n, width in ((50, 16), (70, 32)):
        args = qkv(2, n, width=width)
        torch.testing.assert_close(fast(*args), by_power(*args))


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h // (H // G),m,e]", {"H", "G"}),
        ("S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] * L[m // C]", {"C"}),
        ("S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]", set()),
        ("S[b,h,p,m] = sum(e) tanh(Q[b,h,p,e] + K[b,h,m,e])", set()),
        ("S[b,h,p,m] = sum(e) Q[b,h,0,e] * K[b,h,m,e]", set()),
    ],
)
def test_what_is_held_whole(text: str, expected: set[str]) -> None:
    heads = "h" if "K[b,h," in text else "g"
    table = ", L[c]: f32" if "L[" in text else ""
    extra = (", g < G" if heads == "g" else "") + (", c < N" if table else "")
    cascade = parse_cascade(f"""
cascade attention(Q[b,h,p,e]: f32, K[b,{heads},m,e]: f32, V[b,h,m,f]: f32{table}) -> O[b,h,p,f]: f32
  where b < B, h < H, p < P, f < 16, m < M, e < 16{extra}
  {text}
  G1[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G1[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f]: f32 = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
""")
    assert held_whole(cascade) == expected
