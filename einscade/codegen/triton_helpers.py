"""Small Triton functions that generated kernels include when they call them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["HELPERS"]

HELPERS: Mapping[str, str] = {
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """Rounded down; Triton's own rounds towards zero."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """With the sign of the divisor; Triton's own has that of the dividend."""
    r = a % b
    return r + tl.where((r != 0) & ((r < 0) != (b < 0)), b, 0)
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """To float32's accuracy: by exp, and by its series near 0, where that would cancel."""
    s = x * x
    series = x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835 - s * (1382 / 155925))))))
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    return tl.where(s < 0.1, series, tl.where(x < 0, -far, far))
''',
    "round_even": '''
@triton.jit
def round_even(x):
    """To the nearest integer, halves to even."""
    down = tl.floor(x)
    odd = down - 2 * tl.floor(down / 2)
    return tl.where(x - down > 0.5, down + 1, tl.where(x - down < 0.5, down, down + odd))
''',
    "truncate": '''
@triton.jit
def truncate(x):
    """Towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "sign": """
@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))
""",
    "finite_or_zero": '''
@triton.jit
def finite_or_zero(x):
    """A maximum over nothing is -inf; as the reference of an exponential it must not be."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)
''',
}
