"""Layouts name tensors and ranks, and follow them when they are renamed."""

from __future__ import annotations

from einscade.ir import DENSE, Layout
from einscade.ir.text import parse_cascade

QUANTIZED = """
cascade c(X[p,e]: f32) -> Y
  where p < P, e < 8, pb < ceil_div(P, 4) of p, pu < 4 of p
  A[pb]    = max(pu,e) abs(X[4*pb + pu,e])   if 4*pb + pu < P
  I[p,e]: i8 quantized(bits=8, group="p:4,e:*", scales="A") = round(127 * X[p,e] / A[p // 4])
  Y[p,e]   = I[p,e] * A[p // 4] / 127
"""


def test_a_layout_follows_new_names() -> None:
    layout = parse_cascade(QUANTIZED).tensors["I"].layout
    renamed = layout.renamed({"A": "scale", "I": "A"}, {"p": "m"})
    assert renamed == Layout("quantized", (("bits", 8), ("group", "m:4,e:*"), ("scales", "scale")))
    assert layout.renamed({}, {}) == layout
    assert DENSE.renamed({"A": "B"}, {}) == DENSE


def test_parameters_that_name_no_tensor_stay() -> None:
    layout = Layout("paged", (("order", "A"), ("table", "A")))
    assert layout.renamed({"A": "B"}, {}) == Layout("paged", (("order", "A"), ("table", "B")))


def test_a_cascade_knows_what_its_layouts_name() -> None:
    assert parse_cascade(QUANTIZED).in_layouts == {"A"}
