"""The Einsum cascade: what every layer above reads and writes."""

from einscade.ir.cascade import (
    DENSE,
    DTYPES,
    MONOIDS,
    Cascade,
    Einsum,
    Layout,
    Monoid,
    Rank,
    Reduction,
    Scan,
    Tensor,
)
from einscade.ir.expr import Access, Expr, FloorDiv, Mod, Round, Trunc, Where, accesses, ceil_div, const, free_vars, var

__all__ = [
    "DENSE",
    "DTYPES",
    "MONOIDS",
    "Access",
    "Cascade",
    "Einsum",
    "Expr",
    "FloorDiv",
    "Layout",
    "Mod",
    "Monoid",
    "Rank",
    "Reduction",
    "Round",
    "Scan",
    "Tensor",
    "Trunc",
    "Where",
    "accesses",
    "ceil_div",
    "const",
    "free_vars",
    "var",
]
