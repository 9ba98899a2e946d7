"""`scaled_dot_product_attention` and its backends' own operators, written out as the cascade they compute.

Comes in: the node, an index into its (first) result. Goes out: the normalised sum, with statements for scores, maximum,
weights and total. Masked scores are -oo, as in torch; a causal mask is aligned at the top left, as torch defines it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch.fx import Node

from einscade.compiler.aten_facts import Unraisable, arguments, dtype_name, is_tensor, shape, torch_dtype
from einscade.compiler.aten_views import broadcast
from einscade.compiler.raising_index import Index, exact_quotient, quotient_and_rest
from einscade.ir.expr import Expr, FloorDiv, Where

if TYPE_CHECKING:
    from einscade.compiler.raising import Raiser

__all__ = ["SCALED_DOT_PRODUCT", "scaled_dot_product"]

SCALED_DOT_PRODUCT = frozenset({
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
})  # fmt: skip


def scaled_dot_product(r: Raiser, node: Node, index: Index) -> Expr:
    a = arguments(node)
    if a.dropout_p:
        raise Unraisable(f"{node.target} with a dropout of {a.dropout_p} draws random numbers")
    mask = getattr(a, "attn_mask", None)
    mask = getattr(a, "attn_bias", None) if mask is None else mask
    causal = a.is_causal
    if not isinstance(causal, bool):
        raise Unraisable(f"{node.target} with an is_causal that is only known at run time")
    dtype = dtype_name(a.query)
    query, key, value = shape(a.query), shape(a.key), shape(a.value)
    scale = 1 / sympy.sqrt(query[-1]) if a.scale is None else r.number(a.scale)
    scores = (*shape(node)[:-1], key[-2]) if is_tensor(node) else (*query[:-1], key[-2])

    def batch(operand: Node, i: Index) -> Index:
        """The batch index into keys or values: broadcast, and heads shared by groups of query heads."""
        own = broadcast(i, scores[:-2], shape(operand)[:-2])
        heads, all_heads = shape(operand)[-3:-2], scores[-3:-2]
        if not getattr(a, "enable_gqa", False) or heads == all_heads:
            return own
        group = exact_quotient(all_heads[0], heads[0]) or FloorDiv(all_heads[0], heads[0])
        return (*own[:-1], quotient_and_rest(i[-1], group, r.extents)[0])

    def product(i: Index) -> Expr:
        *front, p, m, e = i
        at = tuple(front)
        return r.operand(a.query, (*broadcast(at, scores[:-2], query[:-2]), p, e)) * r.operand(
            a.key, (*batch(a.key, at), m, e)
        )

    def score(i: Index) -> Expr:
        x = r.reduce((node, "scores"), node, "sum", [query[-1]], product, i, scores, dtype) * scale
        if is_tensor(mask):
            read = r.read(mask, broadcast(i, scores, shape(mask)))
            x = Where(read, x, -sympy.oo) if torch_dtype(mask) == torch.bool else x + read
        return Where(sympy.Le(i[-1], i[-2]), x, -sympy.oo) if causal else x

    def masked(i: Index) -> Expr:
        return r.define((node, "masked"), node, i, scores, lambda own: (score(own), None), dtype)

    def greatest(i: Index) -> Expr:
        return r.reduce((node, "max"), node, "max", scores[-1:], masked, i, scores[:-1], dtype)

    def weight(i: Index) -> Expr:
        def shifted(own: Index) -> tuple[Expr, None]:
            return sympy.exp(masked(own) - greatest(own[:-1])), None

        return r.define((node, "weight"), node, i, scores, shifted, dtype)

    def total(i: Index) -> Expr:
        return r.reduce((node, "total"), node, "sum", scores[-1:], weight, i, scores[:-1], dtype)

    def weighted(i: Index) -> Expr:
        *front, p, f, m = i
        at = (*front, p, m)
        return weight(at) / total(at[:-1]) * r.operand(a.value, (*batch(a.value, tuple(front)), m, f))

    return r.reduce((node, "values"), node, "sum", value[-2:-1], weighted, index, (*scores[:-1], value[-1]), dtype)
