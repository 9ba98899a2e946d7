"""Attention in the ways people write it: one function a spelling, with what a compiler should find in it.

Data only, so that tests of the finder, of the passes and of whole compilations share it. `CASES` are attention,
`NEGATIVES` are what looks a little like it and is something else. Sizes are small, odd and all different.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CASES", "NEGATIVES", "Case", "inputs", "moved"]

B, H, G, P, M, E, D = 3, 4, 2, 5, 7, 8, 6

SHAPES: Mapping[str, tuple[int, ...]] = {
    "q": (B, H, P, E), "k": (B, H, M, E), "v": (B, H, M, D),  # cross
    "qs": (B, H, M, E), "ks": (B, H, M, E), "vs": (B, H, M, D),  # self: as many queries as keys
    "kg": (B, G, M, E), "vg": (B, G, M, D), "k1": (B, 1, M, E), "v1": (B, 1, M, D),  # grouped, one head for all
    "qn": (B, M, H, E), "kn": (B, M, H, E), "vn": (B, M, H, D),  # sequence before heads
    "q3": (B, P, E), "k3": (B, M, E), "v3": (B, M, D), "x": (B, M, H * E),  # no heads
    "qkv": (B, M, 3 * H * E), "bias": (H, P, M), "pair": (1, H, M, M), "head": (H,), "table": (32, H),
    "shift": (H, 2 * M - 1), "positions": (2 * M, E), "mix": (H, H), "lam": (H, 1, 1),
    "rows": (B, 2, M, E), "cell": (B, H, M, M, 4), "gate": (B, H, M),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A function (or a module) of tensors named in SHAPES or in `extra`, and what should be found in it.

    `domain(p, m)` is the predicate on positions that must come out as a domain (None: every point exists); `masked`
    says that a tensor masks too, `casts` that the function itself computes in float32. `normaliser`: "softmax" (a
    maximum and a sum over m), "sum" or "none".
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    args: tuple[str, ...]
    domain: Callable[[int, int], bool] | None = None
    normaliser: str = "softmax"
    sites: int = 1
    outputs: int = 1
    masked: bool = False
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    casts: bool = False


CASES: list[Case] = []
NEGATIVES: list[Case] = []
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def spelling(args: str, **expected: object) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        CASES.append(Case(function.__name__, function, tuple(args.split()), **expected))  # type: ignore[arg-type]
        return function

    return add


def negative(args: str, **expected: object) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        made = Case(function.__name__, function, tuple(args.split()), sites=0, **expected)  # type: ignore[arg-type]
        NEGATIVES.append(made)
        return function

    return add


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Random inputs of a case. Names decide kinds: `keep…` are boolean, `…lengths`, `…ids` and `…mask` integers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, **dict(case.shapes)}
    made = []
    for name in case.args:
        if name.startswith("keep"):
            value = torch.rand(shapes[name], generator=generator) > 0.4
            value[..., 0] = True  # no empty row: what softmax of nothing is differs between spellings
        elif name.endswith("lengths"):
            value = torch.randint(1, M + 1, shapes[name], generator=generator)
        elif name.endswith("mask"):
            value = (torch.arange(shapes[name][-1]) < torch.tensor([M, M - 2, 1])[:, None]).long()
        elif name.endswith("ids"):
            value = torch.arange(shapes[name][-1]).div(3, rounding_mode="floor").expand(shapes[name]).clone()
        else:
            value = torch.randn(shapes[name], generator=generator, dtype=torch.float64).to(dtype)
        made.append(value.to(device))
    return made


def moved(case: Case, batch: int, queries: int, keys: int) -> Case:
    """The case at another batch size and at other lengths."""
    sizes = {B: batch, P: queries, M: keys, 2 * M - 1: 2 * keys - 1, 2 * M: 2 * keys}
    shapes = {**SHAPES, **dict(case.shapes)}
    return replace(case, shapes=tuple((a, tuple(sizes.get(n, n) for n in shapes[a])) for a in case.args))


def causal(p: int, m: int) -> bool:
    return m <= p


def bottom_right(p: int, m: int) -> bool:
    return m <= p + M - P


SCALE = 1 / math.sqrt(E)

# -- products ---------------------------------------------------------------------------------------------------------


@spelling("q k v")
def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelling("qs ks vs", domain=causal)
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling("q k v", domain=causal)
def sdpa_causal_top_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@spelling("q kg vg")
def sdpa_grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@spelling("q k v keep", masked=True, shapes=(("keep", (B, 1, P, M)),))
def sdpa_boolean_mask(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling("q k v bias")
def sdpa_float_mask(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@spelling("q k v")
def matmul_transpose(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1]), dim=-1), v)


@spelling("q k v")
def at_operator(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("q3 k3 v3")
def bmm(q, k, v):
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, 2), v)


@spelling("q k v bias")
def baddbmm(q, k, v, bias):
    b, h, p, e = q.shape
    m = k.shape[2]
    s = torch.baddbmm(bias.expand(b, h, p, m).reshape(b * h, p, m), q.reshape(b * h, p, e),
                      k.reshape(b * h, m, e).transpose(1, 2), beta=1.0, alpha=SCALE)  # fmt: skip
    return torch.bmm(s.softmax(-1), v.reshape(b * h, m, -1)).view(b, h, p, -1)


@spelling("q3 k3 v3")
def baddbmm_without_input(q, k, v):
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    s = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(s.softmax(-1), v)


@spelling("q k v")
def einsum_bhqd(q, k, v):
    s = torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bhkd->bhqd", s.softmax(-1), v)


@spelling("qn kn vn")
def einsum_bqhd(q, k, v):
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


@spelling("qn kn vn")
def einsum_keys_first(q, k, v):
    s = torch.einsum("bkhd,bqhd->bkqh", k, q) * SCALE
    return torch.einsum("bkqh,bkhd->bqhd", s.softmax(1), v)


@spelling("q k v")
def multiply_and_sum(q, k, v):
    s = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) * SCALE
    return (s.softmax(-1)[..., None] * v[:, :, None, :, :]).sum(3)


@spelling("q3 k3 v3")
def transposed_scores(q, k, v):
    s = k @ q.transpose(1, 2) * SCALE
    return s.softmax(1).transpose(1, 2) @ v


@spelling("q3 k3 v3")
def transposed_output(q, k, v):
    s = q @ k.transpose(1, 2) * SCALE
    return (v.transpose(1, 2) @ s.softmax(-1).transpose(1, 2)).transpose(1, 2)


@spelling("qn kn vn")
def permuted_layouts(q, k, v):
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return ((q @ k * SCALE).softmax(-1) @ v).permute(0, 2, 1, 3).contiguous().flatten(2)


@spelling("qkv")
def packed_chunk(x):
    b, n, _ = x.shape
    q, k, v = (t.view(b, n, H, -1).transpose(1, 2) for t in x.chunk(3, dim=-1))
    return ((q @ k.transpose(2, 3) * SCALE).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)


@spelling("qkv")
def packed_permute(x):
    b, n, _ = x.shape
    q, k, v = x.reshape(b, n, 3, H, -1).permute(2, 0, 3, 1, 4)
    return ((q * SCALE @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)


@spelling("qkv")
def packed_interleaved(x):
    b, n, _ = x.shape
    q, k, v = x.view(b, n, H, 3 * E).split(E, dim=-1)
    s = torch.einsum("bqhe,bkhe->bhqk", q, k) * SCALE
    return torch.einsum("bhqk,bkhf->bqhf", s.softmax(-1), v).reshape(b, n, -1)


@spelling("x")
def one_tensor_for_all(x):
    return (x @ x.transpose(1, 2) * SCALE).softmax(-1) @ x


@spelling("q3 k3 v3")
def unbatched_loop(q, k, v):
    return torch.stack([(q[i] @ k[i].T * SCALE).softmax(-1) @ v[i] for i in range(q.shape[0])])


CASES[-1] = Case("unbatched_loop", unbatched_loop, ("q3", "k3", "v3"), sites=B)


# -- scale ------------------------------------------------------------------------------------------------------------


@spelling("q k v")
def scale_on_q(q, k, v):
    return ((q * SCALE) @ k.mT).softmax(-1) @ v


@spelling("q k v")
def scale_on_both(q, k, v):
    r = E**-0.25
    return ((q * r) @ (k * r).mT).softmax(-1) @ v


@spelling("q k v")
def scale_divides_k(q, k, v):
    return (q @ (k / math.sqrt(E)).mT).softmax(-1) @ v


@spelling("q k v keep", masked=True, shapes=(("keep", (P, M)),))
def scale_after_mask(q, k, v, keep):
    s = (q @ k.mT).masked_fill(~keep, float("-inf"))
    return (s * SCALE).softmax(-1) @ v


@spelling("q k v head")
def scale_learned_per_head(q, k, v, head):
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q @ k.mT * head.exp().clamp(max=100)[:, None, None]).softmax(-1) @ v


# -- masks ------------------------------------------------------------------------------------------------------------


@spelling("qs ks vs", domain=causal)
def causal_tril_masked_fill(q, k, v):
    n = q.shape[2]
    s = q @ k.mT * SCALE
    return s.masked_fill(torch.tril(torch.ones(n, n)) == 0, float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_triu_additive(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * SCALE + torch.full((n, n), float("-inf")).triu(1)).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_isinf_of_an_additive_mask(q, k, v):
    mask = nn.Transformer.generate_square_subsequent_mask(q.shape[2])
    return (q @ k.mT * SCALE).masked_fill(mask.isinf(), float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_equal_to_minus_infinity(q, k, v):
    n = q.shape[2]
    mask = torch.full((n, n), float("-inf")).triu(1)
    return torch.where(mask == -math.inf, mask, q @ k.mT * SCALE).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_log_of_tril(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * SCALE + torch.ones(n, n).tril().log()).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_minus_reciprocal(q, k, v):
    n = q.shape[2]
    return (q @ k.mT * SCALE + 1 - 1 / torch.ones(n, n).tril()).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_where_arange(q, k, v):
    n = torch.arange(q.shape[2])
    s = q @ k.mT * SCALE
    return torch.where(n[None, :] <= n[:, None], s, float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_where_finfo_min(q, k, v):
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()
    s = q @ k.mT * SCALE
    return torch.where(keep, s, torch.finfo(s.dtype).min).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_minus_ten_thousand(q, k, v):
    n = q.shape[2]
    keep = torch.tril(torch.ones(n, n))
    s = q @ k.mT * SCALE
    return (s * keep - 1e4 * (1 - keep)).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_added_finfo_min(q, k, v):
    n = q.shape[2]
    keep = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    bias = (1.0 - keep.to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def causal_index_put(q, k, v):
    s = q @ k.mT * SCALE
    s[:, :, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)] = float("-inf")
    return s.softmax(-1) @ v


@spelling("qs ks vs", domain=lambda p, m: p != m)
def not_itself(q, k, v):
    s = q @ k.mT * SCALE
    s.diagonal(dim1=-2, dim2=-1).fill_(float("-inf"))
    return s.softmax(-1) @ v


@spelling("q k v", domain=bottom_right)
def causal_offset(q, k, v):
    p, m = q.shape[2], k.shape[2]
    keep = torch.ones(p, m, dtype=torch.bool).tril(m - p)
    return (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling("q k v", domain=bottom_right)
def causal_sliced_square(q, k, v):
    p, m = q.shape[2], k.shape[2]
    keep = torch.ones(64, 64, dtype=torch.bool).tril()[m - p : m, :m]
    return torch.where(keep, q @ k.mT * SCALE, -torch.inf).softmax(-1) @ v


class CausalBuffer(nn.Module):
    """The mask is a registered buffer, sliced by length."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64))

    def forward(self, q, k, v):
        p, m = q.shape[2], k.shape[2]
        s = q @ k.mT * SCALE
        return s.masked_fill(~self.keep[:, :, m - p : m, :m], float("-inf")).softmax(-1) @ v


class AdditiveBuffer(nn.Module):
    """The mask is a registered float buffer of 0 and -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((64, 64), float("-inf")).triu(1))

    def forward(self, q, k, v):
        n = q.shape[2]
        return (q @ k.mT * SCALE + self.mask[:n, :n]).softmax(-1) @ v


CASES.append(Case("causal_buffer", CausalBuffer(), ("q", "k", "v"), bottom_right))
CASES.append(Case("causal_additive_buffer", AdditiveBuffer(), ("qs", "ks", "vs"), causal))


@spelling("qs ks vs", domain=lambda p, m: m <= p and p - m < 3)
def window_causal(q, k, v):
    i = torch.arange(q.shape[2])
    keep = (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < 3)
    return (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=lambda p, m: abs(p - m) <= 2)
def window_symmetric(q, k, v):
    i = torch.arange(q.shape[2])
    far = (i[:, None] - i[None, :]).abs() > 2
    return (q @ k.mT * SCALE).masked_fill(far, float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=lambda p, m: m <= p and p - m < 3)
def window_triu_tril(q, k, v):
    keep = torch.ones(M, M, dtype=torch.bool).tril().triu(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


@spelling("qs ks vs", domain=lambda p, m: m <= p and (p - m < 3 or m < 2))
def window_with_sinks(q, k, v):
    p, m = torch.arange(M)[:, None], torch.arange(M)[None, :]
    keep = (m <= p) & ((p - m < 3) | (m < 2))
    return (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=lambda p, m: m <= p or m < 3)
def prefix_lm(q, k, v):
    p, m = torch.arange(M)[:, None], torch.arange(M)[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(m <= p) | (m < 3))


@spelling("qs ks vs", domain=lambda p, m: p // 2 == m // 2)
def block_diagonal(q, k, v):
    block = torch.arange(M) // 2
    return (q @ k.mT * SCALE).masked_fill(block[:, None] != block[None, :], float("-inf")).softmax(-1) @ v


@spelling("qs ks vs", domain=lambda p, m: m <= p and (p - m) % 2 == 0)
def dilated(q, k, v):
    p, m = torch.arange(M)[:, None], torch.arange(M)[None, :]
    keep = (m <= p) & ((p - m) % 2 == 0)
    return (q @ k.mT * SCALE).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling("q k v pad_mask", masked=True, shapes=(("pad_mask", (B, M)),))
def padding_integers(q, k, v, mask):
    bias = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("q k v lengths", masked=True, shapes=(("lengths", (B,)),))
def padding_lengths(q, k, v, lengths):
    keep = torch.arange(M)[None, :] < lengths[:, None]
    return (q @ k.mT * SCALE).masked_fill(~keep[:, None, None], float("-inf")).softmax(-1) @ v


@spelling("qs ks vs pad_mask", domain=causal, masked=True, shapes=(("pad_mask", (B, M)),))
def causal_and_padding(q, k, v, mask):
    keep = torch.ones(M, M, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    bias = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("qs ks vs doc_ids", masked=True, shapes=(("doc_ids", (B, M)),))
def documents(q, k, v, ids):
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same)


@spelling("q k v keep", masked=True, shapes=(("keep", (B, 1, P, M)),))
def mask_input_multiplied(q, k, v, keep):
    w = torch.exp(q @ k.mT * SCALE) * keep
    return (w / w.sum(-1, keepdim=True)) @ v


# -- biases -----------------------------------------------------------------------------------------------------------


@spelling("q k v bias")
def bias_table(q, k, v, bias):
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("qs ks vs", domain=causal)
def alibi(q, k, v):
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=q.dtype)
    i = torch.arange(M)
    bias = slopes[:, None, None] * (i[None, :] - i[:, None])
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    return (q @ k.mT * SCALE + bias).masked_fill(~keep, float("-inf")).softmax(-1) @ v


@spelling("q k v head")
def alibi_keys_only(q, k, v, head):
    bias = head[None, :, None, None] * torch.arange(M)[None, None, None, :]
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("qs ks vs table")
def buckets_by_gather(q, k, v, table):
    distance = (torch.arange(M)[None, :] - torch.arange(M)[:, None]).clamp(-5, 5) + 5
    bias = F.embedding(distance, table).permute(2, 0, 1)
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@spelling("qs ks vs shift")
def relative_table_by_index(q, k, v, shift):
    distance = torch.arange(M)[None, :] - torch.arange(M)[:, None] + M - 1
    return (q @ k.mT * SCALE + shift[:, distance]).softmax(-1) @ v


@spelling("qs ks vs positions")
def relative_shift(q, k, v, r):
    """Transformer-XL: the products with 2M relative positions, shifted row by row with a reshape."""
    b, h, p, _ = q.shape
    x = torch.einsum("bhpe,re->bhpr", q, r)
    x = x.reshape(b, h, 2 * p, p)[:, :, 1:].reshape(b, h, p, 2 * p - 1)[..., :p]
    return ((q @ k.mT + x) * SCALE).softmax(-1) @ v


@spelling("q k v bias bias2", shapes=(("bias2", (B, 1, 1, M)),))
def two_biases(q, k, v, bias, bias2):
    return (q @ k.mT * SCALE + bias + bias2).softmax(-1) @ v


# -- normalisers ------------------------------------------------------------------------------------------------------


@spelling("q k v")
def softmax_by_hand(q, k, v):
    w = torch.exp(q @ k.mT * SCALE)
    return (w / w.sum(-1, keepdim=True)) @ v


@spelling("q k v")
def softmax_by_hand_shifted(q, k, v):
    s = q @ k.mT * SCALE
    w = (s - s.amax(-1, keepdim=True)).exp()
    return w @ v / w.sum(-1, keepdim=True)


@spelling("q k v")
def softmax_max_with_indices(q, k, v):
    s = q @ k.mT * SCALE
    w = torch.exp(s - s.max(dim=-1, keepdim=True)[0])
    return (w / w.sum(dim=-1, keepdim=True)) @ v


@spelling("q k v")
def softmax_base_two(q, k, v):
    s = q @ k.mT * (SCALE * 1.4426950408889634)
    w = torch.exp2(s - s.amax(-1, keepdim=True))
    return (w @ v) / w.sum(-1, keepdim=True)


@spelling("q k v")
def softmax_by_logsumexp(q, k, v):
    s = q @ k.mT * SCALE
    return torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v


@spelling("q k v", casts=True)
def softmax_upcast(q, k, v):
    return torch.softmax(q @ k.mT * SCALE, -1, dtype=torch.float32).to(v.dtype) @ v


@spelling("q k v", casts=True)
def softmax_inputs_upcast(q, k, v):
    s = (q.float() @ k.float().mT * SCALE).softmax(-1)
    return (s @ v.float()).type_as(q)


@spelling("q k v")
def softmax_soft_cap(q, k, v):
    s = 20.0 * torch.tanh(q @ k.mT * SCALE / 20.0)
    return s.softmax(-1) @ v


@spelling("q k v")
def softmax_plus_one(q, k, v):
    s = q @ k.mT * SCALE
    top = s.amax(-1, keepdim=True).clamp(min=0)
    w = (s - top).exp()
    return (w / (w.sum(-1, keepdim=True) + (-top).exp())) @ v


@spelling("q k v head")
def softmax_with_sink(q, k, v, head):
    sink = head.view(1, H, 1, 1).expand(B, H, P, 1)
    s = torch.cat([q @ k.mT * SCALE, sink], dim=-1)
    return s.softmax(-1)[..., :-1] @ v


@spelling("q k v", normaliser="none")
def sigmoid(q, k, v):
    return torch.sigmoid(q @ k.mT * SCALE - math.log(M)) @ v


@spelling("q k v", normaliser="none")
def relu_squared(q, k, v):
    return F.relu(q @ k.mT * SCALE).square() / M @ v


@spelling("q k v", normaliser="none")
def softplus(q, k, v):
    return F.softplus(q @ k.mT * SCALE) @ v


@spelling("q k v", normaliser="sum")
def relu_normalised(q, k, v):
    w = F.relu(q @ k.mT) + 1e-6
    return w @ v / w.sum(-1, keepdim=True)


@spelling("qs ks vs lam", domain=causal)
def differential(q, k, v, lam):
    q1, q2 = q.chunk(2, -1)
    k1, k2 = k.chunk(2, -1)
    keep = torch.ones(M, M, dtype=torch.bool).tril()
    a1 = (q1 @ k1.mT).masked_fill(~keep, float("-inf")).softmax(-1)
    a2 = (q2 @ k2.mT).masked_fill(~keep, float("-inf")).softmax(-1)
    return (a1 - lam * a2) @ v


@spelling("q k v mix")
def talking_heads(q, k, v, mix):
    s = torch.einsum("bhpm,hg->bgpm", q @ k.mT * SCALE, mix)
    return torch.einsum("bhpm,hg->bgpm", s.softmax(-1), mix) @ v


@spelling("q k v", sites=2)
def weights_twice(q, k, v):
    w = (q @ k.mT * SCALE).softmax(-1)
    return w @ v + (w @ v.flip(-1))


# -- heads ------------------------------------------------------------------------------------------------------------


@spelling("q kg vg")
def grouped_repeat_interleave(q, k, v):
    k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("q kg vg")
def grouped_expand(q, k, v):
    def repeat(x):
        b, g, m, e = x.shape
        return x[:, :, None].expand(b, g, H // G, m, e).reshape(b, H, m, e)

    return (q @ repeat(k).mT * SCALE).softmax(-1) @ repeat(v)


@spelling("q kg vg")
def grouped_reshape(q, k, v):
    b, h, p, e = q.shape
    q = q.view(b, G, h // G, p, e)
    s = torch.einsum("bgrpe,bgme->bgrpm", q, k) * SCALE
    return torch.einsum("bgrpm,bgmf->bgrpf", s.softmax(-1), v).reshape(b, h, p, -1)


@spelling("q kg vg")
def grouped_tiled(q, k, v):
    return (q @ k.repeat(1, H // G, 1, 1).mT * SCALE).softmax(-1) @ v.repeat(1, H // G, 1, 1)


@spelling("q kg vg")
def grouped_concatenated(q, k, v):
    k, v = (torch.cat([x] * (H // G), 1) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("q kg vg")
def grouped_members(q, k, v):
    b, h, p, e = q.shape
    s = torch.einsum("brgpe,bgme->brgpm", q.view(b, h // G, G, p, e), k) * SCALE
    return torch.einsum("brgpm,bgmf->brgpf", s.softmax(-1), v)


@spelling("q k1 v1")
def multi_query_broadcast(q, k, v):
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("q k3 v3")
def multi_query_folded(q, k, v):
    b, h, p, e = q.shape
    s = q.reshape(b, h * p, e) @ k.mT * SCALE
    return (s.softmax(-1) @ v).view(b, h, p, -1)


@spelling("step kn vn lengths", masked=True, shapes=(("step", (B, H, E)), ("lengths", (B,))))
def one_query(step, kn, vn, lengths):
    """A step of a decoder: no positions of queries at all."""
    scores = torch.einsum("bhe,bmhe->bhm", step, kn) / math.sqrt(E)
    beyond = torch.arange(M, device=kn.device) >= lengths[:, None]
    return torch.einsum("bhm,bmhd->bhd", scores.masked_fill(beyond[:, None], -torch.inf).softmax(-1), vn)


@spelling("step kn vn", shapes=(("step", (B, H, E)),))
def one_query_squeezed(step, kn, vn):
    scores = (step.unsqueeze(2) @ kn.permute(0, 2, 3, 1)).squeeze(2) * E**-0.5
    return (scores.softmax(-1).unsqueeze(2) @ vn.transpose(1, 2)).squeeze(2)


@spelling("qs ks vs news news2 at", shapes=(("news", (B, H, 2, E)), ("news2", (B, H, 2, D)), ("at", (2,))))
def cache_by_one_hot_codes(q, k, v, new_k, new_v, at):
    """A product with one-hot codes writes new keys and values to their places: that is no attention."""
    codes = torch.arange(M)[:, None] == at.argsort()[None, :]
    k, v = (torch.where(codes.any(1)[:, None], codes.to(q.dtype) @ n, c) for n, c in ((new_k, k), (new_v, v)))
    return (q @ k.mT * SCALE).softmax(-1) @ v


# -- shapes of programs -----------------------------------------------------------------------------------------------


@spelling("qs ks vs")
def chunked_queries(q, k, v):
    return torch.cat([(c @ k.mT * SCALE).softmax(-1) @ v for c in q.split(3, dim=2)], dim=2)


CASES[-1] = Case("chunked_queries", chunked_queries, ("qs", "ks", "vs"), sites=3)


@spelling("qs ks vs")
def chunked_queries_causal(q, k, v):
    out = []
    for start in range(0, M, 4):
        s = q[:, :, start : start + 4] @ k.mT * SCALE
        row = torch.arange(start, start + s.shape[2])[:, None]
        out.append(s.masked_fill(torch.arange(M)[None, :] > row, float("-inf")).softmax(-1) @ v)
    return torch.cat(out, dim=2)


CASES[-1] = Case("chunked_queries_causal", chunked_queries_causal, ("qs", "ks", "vs"), sites=2)


@spelling("qs ks vs head", domain=lambda p, m: m <= p)
def descending_positions(q, k, v, slopes):
    n = q.shape[-2]
    back = torch.arange(n - 1, -1, -1.0, dtype=q.dtype)
    far = back[None] - back[:, None]
    s = q @ k.mT * SCALE - slopes[:, None, None] * far
    return s.masked_fill(far < 0, -torch.inf).softmax(-1) @ v


@spelling("qs ks vs")
def first_half_of_keys(q, k, v):
    half = int(k.shape[-2] / 2)
    return (q @ k[:, :, :half].mT * SCALE).softmax(-1) @ v[:, :, :half]


@spelling("q k v")
def hard_assignment(q, k, v):
    soft = (q @ k.mT * SCALE).softmax(-2)
    hard = torch.zeros_like(soft).scatter(-2, soft.max(-2, keepdim=True).indices, 1.0)
    w = hard - soft.detach() + soft
    return w / (w.sum(-1, keepdim=True) + 1) @ v


@spelling("q k v", outputs=2)
def weights_returned(q, k, v):
    w = (q @ k.mT * SCALE).softmax(-1)
    return w @ v, w


@spelling("q k v", outputs=2)
def mean_weights_returned(q, k, v):
    w = (q @ k.mT * SCALE).softmax(-1)
    return w @ v, w.mean(1)


@spelling("q k v", outputs=2)
def logsumexp_returned(q, k, v):
    s = q @ k.mT * SCALE
    total = s.logsumexp(-1)
    return torch.exp(s - total[..., None]) @ v, total


@spelling("q k v")
def dropout_in_eval(q, k, v):
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, training=False) @ v


@spelling("q3 k3 v3")
def width_one_query(q, k, v):
    return (q[:, -1:] @ k.mT * SCALE).softmax(-1) @ v


@spelling("rows rows2 rows3 pair2 pair3", shapes=(("rows2", (B, 2, M, E)), ("rows3", (B, 2, M, D)),
          ("pair2", (B, 1, M, M)), ("pair3", (B, 2, 1, M))))  # fmt: skip
def evoformer_rows(q, k, v, pair, mask_bias):
    s = torch.einsum("bspe,bsme->bspm", q, k) * SCALE + pair + mask_bias
    return torch.einsum("bspm,bsmf->bspf", s.softmax(-1), v)


@spelling("rows rows2 rows3", shapes=(("rows", (B, M, 2, E)), ("rows2", (B, M, 2, E)), ("rows3", (B, M, 2, D))))
def evoformer_columns(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2)


@spelling("cell cell2 cell3 tri", shapes=(("cell", (B, M, M, H, E)), ("cell2", (B, M, M, H, E)),
          ("cell3", (B, M, M, H, D)), ("tri", (B, M, M, H))))  # fmt: skip
def triangle(q, k, v, bias):
    s = torch.einsum("bijhe,bikhe->bhijk", q, k) * SCALE + torch.einsum("bjkh->bhjk", bias)[:, :, None]
    return torch.einsum("bhijk,bikhf->bijhf", s.softmax(-1), v)


@spelling("q k v")
def cosine(q, k, v):
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (s / 0.1).softmax(-1) @ v


@spelling("q k v")
def negative_distance(q, k, v):
    d = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * q @ k.mT
    return (-d * SCALE).softmax(-1) @ v


# -- without softmax: linear forms, written as quadratic --------------------------------------------------------------


@spelling("qs ks vs", domain=causal, normaliser="none")
def linear_causal(q, k, v):
    return (q @ k.mT * torch.ones(M, M).tril()) @ v


@spelling("q k v", normaliser="sum")
def linear_feature_map(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    w = q @ k.mT
    return (w @ v) / w.sum(-1, keepdim=True)


@spelling("qs ks vs", domain=causal, normaliser="none")
def retention(q, k, v):
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    i = torch.arange(M)
    distance = i[:, None] - i[None, :]
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    return (q @ k.mT * decay) @ v


@spelling("qs ks vs gate", domain=causal, normaliser="none")
def gated_decay(q, k, v, gate):
    total = F.logsigmoid(gate).cumsum(-1)
    decay = torch.exp(total[..., :, None] - total[..., None, :])
    return (q @ k.mT * decay).tril() @ v


@spelling("qs ks vs gate", domain=causal, normaliser="none")
def strong_decay_masked_in_its_exponent(q, k, v, gate):
    """The other way round the decay overflows, so what is masked must not be computed and multiplied by 0."""
    total = 300 * F.logsigmoid(gate).cumsum(-1)
    later = torch.ones(M, M, dtype=torch.bool).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    return (q @ k.mT * decay) @ v


@spelling("q k v", normaliser="none")
def squared_scores(q, k, v):
    return (q @ k.mT).square() @ v


# -- what is no attention ---------------------------------------------------------------------------------------------


class _Owned(nn.Module):
    """A module with the given weights, so that they are parameters and not inputs."""

    def __init__(self, compute: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.compute = compute
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 4, requires_grad=False))

    def forward(self, *args: Tensor) -> Tensor:
        return self.compute(*args, **dict(self.named_parameters()))


def _module(name: str, compute: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
    NEGATIVES.append(Case(name, _Owned(compute, **shapes), ("x",), sites=0))


def _router(x, choose, scale):
    return torch.einsum("bne,neo->bno", (x @ choose).softmax(-1), torch.ones(M, 3, 5, dtype=x.dtype)) * scale


def _experts(x, choose, up, down):
    made = F.relu(torch.einsum("bnw,gwu->gbnu", x, up)) @ down[:, None]
    return (made * (x @ choose).softmax(-1).permute(2, 0, 1)[..., None]).sum(0)


def _top_two_experts(x, choose, up, down):
    weights, chosen = (x @ choose).softmax(-1).topk(2, -1)
    made = torch.einsum("bnw,bnkwu->bnku", x, up[chosen]).relu()
    return torch.einsum("bnku,bnkuw,bnk->bnw", made, down[chosen], weights)


def _rms_norm_between(x, a, b):
    y = x @ a
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True)) @ b


def _gathered_experts(x, choose, up, down):
    """The experts' weights picked by the router and applied by `bmm`."""
    chosen = (x @ choose).argmax(-1).flatten()
    made = torch.bmm(x.flatten(0, 1)[:, None], up[chosen])
    return torch.bmm(F.silu(made), down[chosen]).view_as(x)


def _convolutions(x, first, second):
    return F.conv1d(F.gelu(F.conv1d(x.mT, first, padding=1)), second, padding=1).mT


def _convolution_as_product(x, weight, out):
    patches = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).flatten(2)
    return F.relu(patches @ weight) @ out


def _dynamic_convolution(x, make, out):
    """Weights over the taps of a window, made from the position alone."""
    taps = (x @ make).softmax(-1)
    windows = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1)
    return torch.einsum("bnwk,bnk->bnw", windows, taps) @ out


def _squeeze_excite_channels(x, first, second, third, fourth):
    x = F.conv1d(x.mT, first)
    gate = torch.sigmoid(F.conv1d(F.relu(F.conv1d(x.mean(-1, keepdim=True), second)), third))
    return F.conv1d(x * gate, fourth).mT


W = H * E
_module("mlp", lambda x, a, b: F.gelu(x @ a) @ b, a=(W, 64), b=(64, W))
_module("mlp_linear", lambda x, a, b, c: F.linear(F.relu(F.linear(x, a, c)), b), a=(64, W), b=(W, 64), c=(64,))
_module("glu", lambda x, a, b, c: (F.silu(x @ a) * (x @ b)) @ c, a=(W, 64), b=(W, 64), c=(64, W))
_module("router", _router, choose=(W, 3), scale=(5,))
_module("experts", _experts, choose=(W, 3), up=(3, W, 16), down=(3, 16, W))
_module("top_two_experts", _top_two_experts, choose=(W, 3), up=(3, W, 16), down=(3, 16, W))
_module("squeeze_excite", lambda x, a, b: x * torch.sigmoid(F.relu(x.mean(1) @ a) @ b)[:, None], a=(W, 4), b=(4, W))
_module("layer_norm", lambda x, a, b: F.layer_norm(x @ a, (W,), b) @ a, a=(W, W), b=(W,))
_module("rms_norm_between_projections", _rms_norm_between, a=(W, W), b=(W, W))
_module("gathered_experts", _gathered_experts, choose=(W, 3), up=(3, W, 16), down=(3, 16, W))
_module("convolutions", _convolutions, first=(16, W, 3), second=(W, 16, 3))
_module("convolution_as_product", _convolution_as_product, weight=(3 * W, 16), out=(16, W))
_module("dynamic_convolution", _dynamic_convolution, make=(W, 3), out=(W, W))
_module("squeeze_excite_of_convolutions", _squeeze_excite_channels, first=(16, W, 1), second=(4, 16, 1),
        third=(16, 4, 1), fourth=(W, 16, 1))  # fmt: skip
_module("gated_mlp_with_norms", lambda x, a, b, c: F.normalize((x @ a).sigmoid() * (x @ b), dim=-1) @ c, a=(W, 64),
        b=(W, 64), c=(64, W))  # fmt: skip
_module("softmax_over_classes", lambda x, a, b: (x @ a).softmax(-1) @ b, a=(W, 10), b=(10, W))


@negative("q3 k3 v3")
def plain_products(q, k, v):
    return q @ k.mT @ v


@negative("q3 k3 v3")
def scaled_products(q, k, v):
    return (q @ k.mT) / 3.0 @ v * 2.0


@negative("q3 k3")
def similarity(q, k):
    return (q @ k.mT).softmax(-1)


@negative("x")
def gram_norm(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()
