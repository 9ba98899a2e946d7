"""Which cascades the library computes, and that its call computes them: against the interpreter."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from einscade.ir.cascade import Cascade
from einscade.ir.interpret import infer_sizes, interpret
from einscade.ir.text import parse_cascade
from einscade.runtime.library import NotInLibrary, recognise
from einscade.runtime.library_call import emit
from einscade.runtime.modules import load

PLAIN = """
cascade attention(Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]) -> O
  where b < B, h < 4, p < P, m < M, e < 8, f < 8
  S[b,h,p,m] = sum(e) 0.25 * Q[b,h,p,e] * K[b,h,m,e]
  G[b,h,p] = max(m) S[b,h,p,m]
  W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
  Z[b,h,p] = sum(m) W[b,h,p,m]
  O[b,h,p,f] = sum(m) W[b,h,p,m] * V[b,h,m,f] / Z[b,h,p]
"""
S = "0.25 * Q[b,h,p,e] * K[b,h,m,e]"


def _inputs(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {}
    for t in cascade.inputs:
        shape = [
            int(cascade.extent(r).subs({s: sizes[s.name] for s in cascade.extent(r).free_symbols})) for r in t.ranks
        ]
        made[t.name] = torch.rand(shape) > 0.3 if t.dtype == "bool" else torch.randn(shape)
    return made


def _agrees(text: str, **sizes: int) -> str:
    """The call's result is the interpreter's; its source."""
    cascade = parse_cascade(text)
    sizes = {"B": 2, "P": 7, "M": 7} | sizes
    sizes = {s: sizes[s] for s in cascade.symbols}
    inputs = _inputs(cascade, sizes)
    source = emit(cascade)
    (actual,) = load(source, cascade.name)(*inputs.values(), **sizes)
    expected = interpret(cascade, inputs, infer_sizes(cascade, {n: tuple(t.shape) for n, t in inputs.items()}, sizes))
    (reference,) = expected.values()
    assert actual.shape == reference.shape
    torch.testing.assert_close(actual.double(), reference, rtol=1e-5, atol=1e-6)
    return source.text


def test_plain() -> None:
    assert "mask, causal = None, False" in _agrees(PLAIN)
    _agrees(PLAIN, P=3, M=11)


def test_names_of_the_cascade_hide_nothing() -> None:
    """The width of the values is F where it is dynamic, and what the module imports has to be another name."""
    _agrees(PLAIN.replace("e < 8, f < 8", "e < E, f < F"), E=8, F=6)


def test_a_mask_that_all_heads_share_is_read_as_a_view() -> None:
    """Its dimension of 1 is read at 0: no gather, which would take as long as the call itself when decoding."""
    text = PLAIN.replace("V[b,h,m,f])", "V[b,h,m,f], A[b,u,p,m])").replace("where b < B", "where b < B, u < 1")
    text = text.replace("G[b,h,p] =", "T[b,h,p,m] = S[b,h,p,m] + A[b,0,p,m]\n  G[b,h,p] =")
    source = _agrees(text.replace("max(m) S", "max(m) T").replace("exp(S", "exp(T"))
    assert "A[:, 0].unsqueeze(1)" in source
    assert "arange" not in source


def test_causal_is_the_flag() -> None:
    causal = PLAIN.replace(S, S + " if m <= p")
    assert recognise(parse_cascade(causal)).domain
    assert "mask, causal = None, True" in _agrees(causal)
    for p, m in ((3, 11), (11, 3), (1, 9), (9, 1)):
        _agrees(causal, P=p, M=m)
    _agrees(PLAIN.replace(S, S + " if p >= m"))
    _agrees(PLAIN.replace(S, S + " if m < p + 1"))


@pytest.mark.parametrize(("p", "m"), [(7, 7), (1, 9), (4, 9), (9, 4)])
def test_a_triangle_elsewhere_is_the_flag_only_where_it_is_the_same(p: int, m: int) -> None:
    """Aligned at the end, as in decoding: a triangle for equal lengths, nothing at all for one query."""
    assert "offset == 0" in _agrees(PLAIN.replace(S, S + " if m <= p + M - P"), P=p, M=m)


def test_domains_that_torch_has_no_flag_for_become_masks() -> None:
    _agrees(PLAIN.replace(S, S + " if m <= p & m > p - 3"))
    _agrees(PLAIN.replace(S, S + " if m <= p | m < 2"))
    _agrees(PLAIN.replace(S, S + " if m > p"))  # the last row is empty: zeros
    _agrees(PLAIN.replace(S, S + " if m > p").replace("/ Z[b,h,p]", "/ Z[b,h,p] if Z[b,h,p] != 0"))


def test_masks_and_biases_that_are_inputs() -> None:
    masked = PLAIN.replace("V[b,h,m,f])", "V[b,h,m,f], A[b,m]: bool)")
    _agrees(masked.replace(S, S + " if A[b,m]"))
    _agrees(masked.replace(S, S + " if A[b,m] & m <= p"))
    biased = PLAIN.replace("V[b,h,m,f])", "V[b,h,m,f], A[h,p,m])")
    for expression in ("S[b,h,p,m] + A[h,p,m]", "S[b,h,p,m] + 2 * A[h,p,m] - m"):
        text = biased.replace("G[b,h,p] =", f"T[b,h,p,m] = {expression}\n  G[b,h,p] =")
        _agrees(text.replace("max(m) S", "max(m) T").replace("exp(S", "exp(T"))


@pytest.mark.parametrize("key", ["K[b,g,m,e]", "K[b,m,e]"])
def test_shared_key_heads(key: str) -> None:
    index = "h // 2" if "g" in key else ""
    at = f"[b,{index},m," if index else "[b,m,"
    text = PLAIN.replace("K[b,h,m,e], V[b,h,m,f])", f"{key}, {key.replace('K', 'V').replace('e]', 'f]')})")
    text = text.replace("K[b,h,m,e]", f"K{at}e]").replace("V[b,h,m,f]", f"V{at}f]")
    source = _agrees(text.replace("h < 4,", "h < 4, g < 2," if index else "h < 4,"))
    assert ("enable_gqa=True" in source) == bool(index)


@pytest.mark.parametrize(("ranks", "where"), [("", ""), ("b,", "b < B, "), ("b,c,h,", "b < B, c < 3, h < 4, ")])
def test_any_number_of_batch_ranks(ranks: str, where: str) -> None:
    _agrees(PLAIN.replace("b,h,", ranks).replace("b < B, h < 4, ", where))


def test_one_key_head_that_is_a_dimension_of_its_own() -> None:
    _agrees(
        """
    cascade attention(Q[b,h,p,e], K[b,u,m,e], V[b,u,m,f]) -> O[b,h,p,f]
      where b < 2, h < 4, p < 5, f < 6, m < 7, e < 8, u < 1
      S[b,h,p,m] = sum(e) K[b,0,m,e] * Q[b,h,p,e]
      G[b,h,p]   = max(m) S[b,h,p,m]
      W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
      Z[b,h,p]   = sum(m) W[b,h,p,m]
      O[b,h,p,f] = sum(m) V[b,0,m,f] * W[b,h,p,m] / Z[b,h,p]"""
    )


def test_an_infinite_bias_is_written_as_a_float() -> None:
    source = _agrees(
        """
    cascade attention(Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f]) -> O[b,h,p,f]
      where b < 2, h < 4, p < 7, f < 6, m < 7, e < 8
      S[b,h,p,m] = sum(e) K[b,h,m,e] * Q[b,h,p,e]
      A[b,h,p,m] = S[b,h,p,m] + Where(m >= p + 1, -oo, 0)
      G[b,h,p]   = max(m) A[b,h,p,m]
      W[b,h,p,m] = exp(A[b,h,p,m] - G[b,h,p])
      Z[b,h,p]   = sum(m) W[b,h,p,m]
      O[b,h,p,f] = sum(m) V[b,h,m,f] * W[b,h,p,m] / Z[b,h,p]"""
    )
    assert "float('-inf')" in source


def test_packed_operands_are_strided_views() -> None:
    packed = """
    cascade attention(X[b,p,t], Y[b,m,u]) -> O
      where b < B, h < 4, p < P, m < M, e < 8, f < 8, t < 32, u < 32
      S[b,h,p,m] = sum(e) X[b,p,8*h + e] * Y[b,m,(h // 2)*8 + e]
      G[b,h,p] = max(m) S[b,h,p,m]
      W[b,h,p,m] = exp(S[b,h,p,m] - G[b,h,p])
      Z[b,h,p] = sum(m) W[b,h,p,m]
      O[b,h,p,f] = sum(m) W[b,h,p,m] * Y[b,m,(h // 2)*8 + f + 16] / Z[b,h,p]
    """
    assert "as_strided" in _agrees(packed)


def test_other_orders_and_the_same_thing_said_differently() -> None:
    _agrees(PLAIN.replace("Q[b,h,p,e]", "Q[p,b,h,e]").replace("O[b,h,p,f]", "O[p,f,h,b]"))
    _agrees(
        PLAIN.replace(" / Z[b,h,p]", "").replace("O[b,h,p,f] =", "N[b,h,p,f] =")
        + "  O[b,h,p,f] = N[b,h,p,f] / Z[b,h,p]\n"
    )
    _agrees(PLAIN.replace("W[b,h,p,m] * V", "X[b,h,p,m] * V").replace(" / Z[b,h,p]\n", "\n").replace(
        "  O[b", "  X[b,h,p,m] = W[b,h,p,m] / Z[b,h,p]\n  O[b"))  # fmt: skip
    without_maximum = PLAIN.replace(" - G[b,h,p]", "").replace("  G[b,h,p] = max(m) S[b,h,p,m]\n", "")
    _agrees(without_maximum)


def test_names_of_inputs_do_not_collide_with_those_of_the_call() -> None:
    _agrees(PLAIN.replace("Q[", "k[").replace("K[", "v[").replace("V[", "out["))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PLAIN.replace("exp(S[b,h,p,m] - G[b,h,p])", "tanh(S[b,h,p,m])"), "tanh beside the weights"),
        (PLAIN.replace("Z[b,h,p] = sum(m) W[b,h,p,m]", "Z[b,h,p] = sum(m) 2*W[b,h,p,m]"), "not the sum of the weights"),
        (PLAIN.replace("Z[b,h,p] = sum(m) W[b,h,p,m]", "Z[b,h,p] = sum(m) W[b,h,p,m] if m <= p"), "another domain"),
        (PLAIN.replace("max(m) S[b,h,p,m]", "max(m) S[b,h,p,m] if m <= p"), "maximum"),
        (PLAIN.replace(" / Z[b,h,p]", ""), "0 normalisers"),
        (PLAIN.replace(" / Z[b,h,p]", " / Z[b,h,p] if f <= p"), "another domain"),
        (PLAIN.replace("-> O", "-> O, Z"), "2 outputs"),
        (PLAIN.replace("V[b,h,m,f] /", "V[b,h,m,f]**2 /"), "beside the weights"),
        (PLAIN.replace("0.25 * Q", "Q[b,h,p,e] * Q"), "queries times keys"),
    ],
)
def test_what_is_something_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(NotInLibrary, match=reason):
        emit(parse_cascade(text))


def test_operands_of_several_types_are_refused() -> None:
    with pytest.raises(NotInLibrary, match="of types"):
        emit(parse_cascade(PLAIN.replace("Q[b,h,p,e],", "Q[b,h,p,e]: bf16,")))


def test_a_chain_whose_links_read_the_one_before_twice_is_given_up_before_it_is_written_out() -> None:
    links = "\n".join(f"      T{i + 1}[p,m] = T{i}[p,m] * sin(T{i}[p,m])" for i in range(60))
    text = f"""
    cascade chain(Q[p,e]: f32, K[m,e]: f32, V[m,f]: f32) -> O
      where p < P, m < M, e < 4, f < 4
      T0[p,m] = sum(e) Q[p,e] * K[m,e]
{links}
      G[p] = max(m) T60[p,m]
      Z[p] = sum(m) exp(T60[p,m] - G[p])
      O[p,f] = sum(m) exp(T60[p,m] - G[p]) / Z[p] * V[m,f]
    """
    with pytest.raises(NotInLibrary, match="more than 400 operations"):
        recognise(parse_cascade(text))
