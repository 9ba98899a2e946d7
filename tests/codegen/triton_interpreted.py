"""Generated Triton kernels under Triton's interpreter, on the CPU, against the interpreter in float64.

Not collected by name: Triton decides when it is imported whether it interprets, so `test_triton` runs this file in a
process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from einscade.codegen.cost import tile_symbols
from einscade.codegen.loops import plan
from einscade.codegen.schedule import Schedule
from einscade.codegen.triton_emit import emit
from einscade.ir import Cascade
from einscade.ir.interpret import interpret
from einscade.ir.text import parse_cascade
from einscade.passes.differentiate import Gradient, differentiate
from einscade.passes.online import Loops
from einscade.passes.pipeline import run
from einscade.passes.recipes import recipe
from einscade.passes.tables import Tables
from tests.codegen.cascades import CASES, Case, cascade, inputs, relative_error
from tests.codegen.generated import module, run_poisoned
from tests.codegen.tables import TABLES, values
from tests.codegen.tables import forward as table_bias
from tests.codegen.tables import gradient as gradient_of
from tests.codegen.test_gradients import CASES as GRADIENTS
from tests.codegen.test_gradients import ROLES, VIEWS, of_roles, scored, values_of
from tests.codegen.test_triton import COMPUTED_MASK
from tests.codegen.triton_addresses import addresses_checked  # noqa: F401

assert os.environ.get("TRITON_INTERPRET") == "1"

CAUSAL = next(c for c in CASES if c.name == "causal")
BOUND = {"f32": 2e-6, "f16": 1e-3}
# Lengths are a whole tile and a piece of another: under the interpreter, time is that of the tiles.


def error(case: Case, sizes: dict[str, int], tiles: tuple[int, int], contiguous: bool = True, **shape: object) -> float:
    plain, rewritten = cascade(case, **shape)  # type: ignore[arg-type]
    program = plan(rewritten)
    chosen = {**dict.fromkeys(tile_symbols(program), tiles[1]), "p": tiles[0]}
    x = inputs(plain, case, sizes)
    if not contiguous:
        x = {n: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t for n, t in x.items()}
    (out,) = module(emit(program, Schedule(tuple(chosen.items()), target="cuda:90", descriptors=True))).run(
        *x.values(), **sizes
    )
    return relative_error(out, interpret(plain, x, {})["O"])


@pytest.mark.parametrize(("dtype", "batch"), [("f32", 2), ("f16", 1)])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_variants(case: Case, dtype: str, batch: int) -> None:
    assert error(case, {"B": batch, "P": 21, "M": 41}, (16, 16), dtype=dtype) <= BOUND[dtype]


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(CASES), st.integers(1, 40), st.integers(1, 40), st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    st.sampled_from([(16, 32), (32, 16)]), st.integers(1, 33),
)  # fmt: skip
def test_any_length_group_width(
    case: Case, p: int, m: int, heads: tuple[int, int], tiles: tuple[int, int], width: int
) -> None:
    assert error(case, {"B": 1, "P": p, "M": m}, tiles, h=heads[0], g=heads[1], e=width, f=width + 3) <= BOUND["f32"]


@pytest.mark.parametrize("name", [n for n in GRADIENTS if "bias" in n or n in VIEWS])
def test_gradients(name: str) -> None:
    """The gradient of a bias has tiles of two grid ranks: one step at a time along what it sums, or without a loop. One
    of heads that are groups and members is written over those."""
    forward = parse_cascade(GRADIENTS[name].replace("f64", "f32"))
    assert_gradient_is_right(forward, differentiate(forward), {})


@pytest.mark.parametrize("name", ROLES)
def test_gradients_of_roles(name: str) -> None:
    assert_gradient_is_right(*of_roles(ROLES[name].replace("f64", "f32")))


def assert_gradient_is_right(forward: Cascade, gradient: Gradient, of: dict[str, str]) -> None:
    program = plan(Loops().apply(gradient.cascade))
    generator, sizes = torch.Generator().manual_seed(0), {"B": 2, "P": 35, "M": 41}
    values = {n: v.float() if v.is_floating_point() else v for n, v in values_of(forward, sizes, generator).items()}
    values |= {role: values[n] for role, n in of.items()}
    saved = interpret(gradient.forward, values)
    values |= {n: saved[n].float() for n in gradient.saved}
    for output, cotangent in gradient.cotangents.items():
        values[cotangent] = torch.randn(saved[output].shape, generator=generator)
    x = {t.name: values[t.name] for t in gradient.cascade.inputs}
    chosen = {**dict.fromkeys(tile_symbols(program), 32), "p": 32, "m": 32}
    source = emit(program, Schedule(tuple(chosen.items()), target="cuda:90", descriptors=True))
    expected = interpret(gradient.cascade, x, {})
    known = {s: n for s, n in sizes.items() if s in program.cascade.symbols}
    for output, value in zip(program.cascade.outputs, module(source).run(*x.values(), **known), strict=True):
        assert relative_error(value, expected[output]) <= 4 * BOUND["f32"], output


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("name", sorted(TABLES))
def test_gradients_of_tables(name: str, shared: bool) -> None:
    """Tiles add what they have of each entry: where entries are few each summed first, else point by point."""
    plain = table_bias(name, h=2, g=1)
    made, sizes = gradient_of(plain), {"B": 2, "P": 35, "M": 41}
    x = values(plain, made, sizes)
    after = run(made.cascade, (Tables(recipe("exact"), shared),)).cascade
    program = plan(after)
    tiles = {**dict.fromkeys(tile_symbols(program), 32), "p": 32, "m": 32}
    source = emit(program, Schedule(tuple(tiles.items()), target="cuda:90", descriptors=True))
    assert "tl.atomic_add(" in source.text
    expected = interpret(made.cascade, x, {s: sizes[s] for s in made.cascade.symbols})
    found = module(source).run(*x.values(), **{s: n for s, n in sizes.items() if s in after.symbols})
    for output, value in zip(made.cascade.outputs, found, strict=True):
        assert value.shape == expected[output].shape
        assert relative_error(value, expected[output]) <= 4 * BOUND["f32"], output


def test_strides() -> None:
    assert error(CAUSAL, {"B": 2, "P": 20, "M": 20}, (16, 16), contiguous=False) <= BOUND["f32"]


def test_rows_without_keys_are_zero_and_every_element_is_written() -> None:
    case = next(c for c in CASES if c.name == "boolean")
    plain, rewritten = cascade(case)
    sizes = {"B": 1, "P": 18, "M": 5}
    x = inputs(plain, case, sizes)
    schedule = Schedule((("M0", 16), ("p", 16)), target="cuda:90")
    (out,) = run_poisoned(emit(plan(rewritten), schedule), x, sizes)
    assert bool(out.isfinite().all())
    assert bool((out[:, :, 9] == 0).all())


LEAST = torch.finfo(torch.float32).min
MASKS = {
    "added": ("C[b,h,p,m] = S[b,h,p,m] + A[p,m]", ", A[p,m]: f32"),
    "added by keys": ("C[b,h,p,m] = S[b,h,p,m] + A[0,m]", ", A[p,m]: f32"),
    "chosen": (f"C[b,h,p,m] = Where(A[p,m] < 0, {LEAST!r}, S[b,h,p,m])", ", A[p,m]: f32"),
    "multiplied": (f"C[b,h,p,m] = S[b,h,p,m] + Where(A[p,m] < 0, 1, 0) * {LEAST!r}", ", A[p,m]: f32"),
}


def masked_forward(name: str) -> Cascade:
    score, more = MASKS[name]
    return parse_cascade(scored("0", more).replace("C[b,h,p,m]: f64 = 0", score).replace("f64", "f32"))


def mask(name: str, p: int, m: int) -> Tensor:
    """Half of the keys, and all keys of every fifth row, with a dtype's least number."""
    gone = torch.rand(p, m, generator=torch.Generator().manual_seed(3)) < 0.5
    gone[::5] = True
    return torch.where(gone if name != "added by keys" else gone[:1].expand(p, m), LEAST, 0.0)


def gradients_hold(
    forward: Cascade, of: Sequence[str], given: dict[str, Tensor], sizes: dict[str, int], tile: int = 32
) -> None:
    """The kernels of the gradients of some inputs, and of the forward pass for it, on memory that is NaN before."""
    gradient = differentiate(forward, of)
    saved, generator = interpret(gradient.forward, given), torch.Generator().manual_seed(0)
    assert all(bool(v.isfinite().all()) for v in saved.values())
    x = given | {n: v.float() for n, v in saved.items()}
    x |= {c: torch.randn(saved[o].shape, generator=generator) for o, c in gradient.cotangents.items()}
    for plain in (gradient.forward, gradient.cascade):
        own = {t.name: x[t.name] for t in plain.inputs}
        program = plan(run(plain, "exact").cascade)
        tiles = {**dict.fromkeys(tile_symbols(program), tile), "p": tile, "m": tile}
        source = emit(program, Schedule(tuple(tiles.items()), target="cuda:90", descriptors=True))
        expected = interpret(plain, own, {})
        for output, value in zip(plain.outputs, run_poisoned(source, own, sizes), strict=True):
            assert bool(value.isfinite().all()), output
            assert relative_error(value, expected[output]) <= 4 * BOUND["f32"], output


@pytest.mark.parametrize("name", MASKS)
def test_rows_of_nothing_but_the_least_number(name: str) -> None:
    """All keys weigh the same there, in the gradient too; nothing is -inf on the way."""
    forward, sizes = masked_forward(name), {"B": 1, "P": 35, "M": 41}
    values = values_of(forward, sizes, torch.Generator().manual_seed(0))
    given = {n: v.float() for n, v in values.items()} | {"A": mask(name, 35, 41)}
    gradients_hold(forward, ["Q", "K", "V"], given, sizes)


WITH_WEIGHTS = {
    "heads of groups": """cascade c(
      Q[b,h,p,e]: f32, K[b,g,m,e]: f32, V[b,g,m,f]: f32, A[p,m]: f32
    ) -> O[b,h,p,f]: f32, R[b,h,p,m]: f32
      where b < B, h < 4, g < 2, p < 21, m < 19, e < 8, f < 6
      C[b,h,p,m] = sum(e) 0.7 * Q[b,h,p,e] * K[b,h // 2,m,e]
      S[b,h,p,m] = C[b,h,p,m] + A[p,m]
      G[b,h,p] = max(m) S[b,h,p,m]
      W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
      Z[b,h,p] = sum(m) W[b,h,p,m]
      N[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h // 2,m,f]
      O[b,h,p,f]: f32 = N[b,h,p,f] / Z[b,h,p]  if Z[b,h,p] != 0
      R[b,h,p,m]: f32 = W[b,h,p,m] / Z[b,h,p]""",
    "members and groups": """cascade c(
      Q[b,g,p,e]: f32, K[b,i,m,e]: f32, V[b,i,m,f]: f32, A[p,m]: f32
    ) -> O[b,h,i,p,f]: f32, R[b,h,i,p,m]: f32
      where b < B, g < 4, h < 2, i < 2, p < 21, m < 21, e < 128, f < 128
      C[b,h,i,p,m] = sum(e) 0.09 * Q[b,2*h + i,p,e] * K[b,i,m,e]
      S[b,h,i,p,m] = C[b,h,i,p,m] + A[p,m]
      G[b,h,i,p] = max(m) S[b,h,i,p,m]
      W[b,h,i,p,m] = exp(S[b,h,i,p,m] - G[b,h,i,p])
      Z[b,h,i,p] = sum(m) W[b,h,i,p,m]
      N[b,h,i,p,f] = sum(m) W[b,h,i,p,m] * V[b,i,m,f]
      O[b,h,i,p,f]: f32 = N[b,h,i,p,f] / Z[b,h,i,p]  if Z[b,h,i,p] != 0
      R[b,h,i,p,m]: f32 = W[b,h,i,p,m] / Z[b,h,i,p]""",
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_what_is_undefined_at_missing_points_adds_nothing(name: str) -> None:
    """Rows beyond the last divide by what nothing was loaded of (with weights among the results, the normaliser), in
    the sum's own terms or in a statement in front of it."""
    forward = parse_cascade(WITH_WEIGHTS[name])
    values = values_of(forward, {"B": 2}, torch.Generator().manual_seed(0))
    of = ["K", "V"] if name == "heads of groups" else ["Q", "K", "V"]
    gradients_hold(forward, of, {n: v.float() for n, v in values.items()}, {"B": 2}, 16)


PREVIOUS = """
cascade previous(Q[c,p,e]: f16, K[c,m,e]: f16, V[c,m,f]: f16, X[c]) -> O
  where c < C, p < P, m < M, e < 16, f < 16
  S[c,p,m] = sum(e) Q[c,p,e] * K[c - 1,m,e]   if c >= 1
  G[c,p]   = max(m) S[c,p,m]
  W[c,p,m] = exp(S[c,p,m] - G[c,p])
  Z[c,p]   = sum(m) W[c,p,m]
  N[c,p,f] = sum(m) W[c,p,m] * V[c - 1,m,f] * X[c + 1]   if c + 1 < C
  O[c,p,f]: f16 = N[c,p,f] / Z[c,p]   if Z[c,p] != 0
"""


def test_a_chunk_without_one_before_it_reads_nothing() -> None:
    """Where an index leaves a tensor no point exists, and no address may be formed that is another tensor's."""
    plain = parse_cascade(PREVIOUS)
    sizes = {"C": 3, "P": 17, "M": 19}
    x = {t.name: torch.randn([sizes.get(str(plain.extent(r)), 16) for r in t.ranks]) for t in plain.inputs}
    x = {name: v.half() if v.dim() > 1 else v for name, v in x.items()}
    source = emit(plan(run(plain, "exact").cascade), Schedule((("M0", 16), ("p", 16)), target="cuda:90"))
    (out,) = module(source).run(*x.values(), **sizes)
    assert relative_error(out, interpret(plain, x, {})["O"]) <= BOUND["f16"]


CONCATENATED = """
cascade concatenated(Q[h,p,e]: f16, K[h,m,e]: f16, V[h,m,f]: f16, X[l], Y[m], R[l,p]) -> O
  where h < 2, p < P, m < M, l < 40, e < 16, f < 16
  S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
  T[h,p,m] = S[h,p,m] + Where(m < 40, X[m] + R[m,p], Y[m - 40])
  G[h,p]   = max(m) T[h,p,m]
  W[h,p,m] = exp(T[h,p,m] - G[h,p])
  Z[h,p]   = sum(m) W[h,p,m]
  O[h,p,f]: f16 = sum(m) W[h,p,m] * V[h,m,f] / Z[h,p]
"""


def test_a_choice_reads_nothing_where_it_chooses_otherwise() -> None:
    """Also in tiles whose points all exist: of two tensors one after the other each tile reads one, or both in part."""
    plain = parse_cascade(CONCATENATED)
    sizes = {"P": 17, "M": 128}
    x = {t.name: torch.randn([sizes.get(str(n := plain.extent(r))) or int(n) for r in t.ranks]) for t in plain.inputs}
    x = {name: v.half() if name in ("Q", "K", "V") else v for name, v in x.items()}
    source = emit(plan(run(plain, "exact").cascade), Schedule((("M0", 16), ("p", 16)), target="cuda:90"))
    (out,) = module(source).run(*x.values(), **sizes)
    assert relative_error(out, interpret(plain, x, {})["O"]) <= BOUND["f16"]


def test_points_that_a_computed_mask_leaves_out_add_nothing() -> None:
    """Neither do numbers there that are none."""
    plain = parse_cascade(COMPUTED_MASK)
    sizes = {"B": 2, "P": 37}
    x = {t.name: torch.randn([sizes.get(str(n := plain.extent(r))) or int(n) for r in t.ranks]) for t in plain.inputs}
    x |= {name: x[name].half() for name in ("X", "Y")}
    missing = torch.rand(x["Z"].shape) < 0.3
    x["Z"][missing] = 0
    x["Y"][missing] = float("nan")
    source = emit(plan(run(plain, "exact").cascade), Schedule((("M0", 16), ("p", 16)), target="cuda:90"))
    (out,) = module(source).run(*x.values(), **sizes)
    assert relative_error(out, interpret(plain, x, {})["O"]) <= BOUND["f16"]
