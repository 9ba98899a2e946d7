"""A wrong kernel is told from a right one before it is timed."""

from __future__ import annotations

import pytest
import torch

from einscade.runtime.agreement import disagreement


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_agrees_and_a_wrong_tile_does_not(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 129, 16, dtype=torch.float64)
    right = x.to(dtype)
    rounded = (x * (1 + 0.3 * torch.finfo(dtype).eps * torch.randn_like(x))).to(dtype)
    assert disagreement([rounded], [right], [right]) is None
    wrong = right.clone()
    wrong[:, :, 64:128] = 0
    assert "off by" in (disagreement([wrong], [right], [right]) or "")


def test_values_that_are_not_finite() -> None:
    right = torch.randn(5, 7)
    wrong = right.clone()
    wrong[2, 3] = torch.nan
    assert "not finite" in (disagreement([wrong], [right], [right]) or "")
    assert disagreement([right], [wrong], [right]) is None  # the trusted one knows less


def test_what_cancels_is_held_to_the_scale_of_the_inputs() -> None:
    noise = 1e-8 * torch.randn(64)
    assert disagreement([noise], [torch.zeros(64)], [torch.randn(64)]) is None
    assert disagreement([noise + 1e-2], [torch.zeros(64)], [torch.randn(64)]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_held_to_the_scale_of_what_they_are_linear_in(dtype: torch.dtype) -> None:
    """A loss that is a mean has small cotangents, and a sum over a long rank smaller gradients yet."""
    x, cotangent = torch.randn(64, 16).to(dtype), (1e-4 * torch.randn(64, 16)).to(dtype)
    right = 0.02 * cotangent
    assert disagreement([torch.zeros_like(right)], [right], [x, cotangent]) is None
    assert "off by" in (disagreement([torch.zeros_like(right)], [right], [x, cotangent], cotangents=[1]) or "")
    rounded = (right.double() * (1 + 0.3 * torch.finfo(dtype).eps)).to(dtype)
    assert disagreement([rounded], [right], [x, cotangent], cotangents=[1]) is None
    nothing = torch.zeros(64, 16, dtype=dtype)
    assert disagreement([nothing], [nothing], [x, nothing], cotangents=[1]) is None


def test_shapes_and_integers() -> None:
    a = torch.arange(6)
    assert disagreement([a], [a.clone()], []) is None
    assert disagreement([a + 1], [a], []) == "output 0 differs"
    assert "not torch.int64(6,)" in (disagreement([a[:3]], [a], []) or "")


def test_rows_without_points_are_passed_over_only_where_there_can_be_some() -> None:
    right = torch.randn(4, 5, 6)
    empty = right.clone()
    empty[1, 2] = 0
    assert disagreement([empty], [right], [right]) is not None
    assert disagreement([empty], [right], [right], empty_rows=True) is None
    assert disagreement([empty + 0.5], [right], [right], empty_rows=True) is not None
