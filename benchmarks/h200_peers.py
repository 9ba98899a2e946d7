"""What others make of the rows of `benchmarks/h200.py`.

Comes in: a row and its inputs. Goes out: `attention`, a call without arguments for each of `PEERS` (cuDNN through
`scaled_dot_product_attention`, FlexAttention on its Triton kernels, FlashAttention-4, and torch.compile of the module
itself).

FlashAttention-4 (`pip install flash-attn-4`) is called directly where its own function computes the row, on views with
the heads behind the positions, as it wants them; elsewhere it is FlexAttention's `BACKEND="FLASH"`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.h200_rows import Row

__all__ = ["PEERS", "TITLES", "attention", "problem"]

LARGEST_SCORES = 9 << 30
"""Bytes of scores in bfloat16 up to which a module is run as it is written: compiled, it holds several such tensors."""


def attention(name: str, row: Row, inputs: Sequence[Tensor], autotune: bool = False) -> Callable[[], Tensor]:
    """A peer's form of the row. Raises NotImplementedError where there is none."""
    return PEERS[name](row, inputs, autotune)


def _cudnn(row: Row, inputs: Sequence[Tensor], autotune: bool) -> Callable[[], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not row.module.plain:
        raise NotImplementedError("not in scaled_dot_product_attention")
    q, k, v = inputs
    backend = SDPBackend.CUDNN_ATTENTION if q.is_cuda else SDPBackend.MATH

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=row.module.causal, enable_gqa=row.shared > 1
            )

    return call


def _flex(row: Row, inputs: Sequence[Tensor], autotune: bool) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if not inputs[0].is_cuda:
        return row.module.flex(flex_attention, inputs, compiled=False)
    mode = "max-autotune-no-cudagraphs" if autotune else None
    return row.module.flex(torch.compile(flex_attention, mode=mode), inputs, compiled=True)


def _fa4(row: Row, inputs: Sequence[Tensor], autotune: bool) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        raise NotImplementedError("flash-attn-4 is not installed")
    if not inputs[0].is_cuda:
        raise NotImplementedError("it needs a CUDA device")
    if not row.module.plain:
        flash = functools.partial(torch.compile(flex_attention), kernel_options={"BACKEND": "FLASH"})
        return row.module.flex(flash, inputs, compiled=True)
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in inputs)
    return lambda: flash_attn_func(q, k, v, causal=row.module.causal)[0].transpose(1, 2)


def _compile(row: Row, inputs: Sequence[Tensor], autotune: bool) -> Callable[[], Tensor]:
    if 2 * inputs[0].shape[0] * row.heads * row.length**2 > LARGEST_SCORES:
        raise NotImplementedError("its scores do not fit in memory")
    compiled = torch.compile(row.module, dynamic=False) if inputs[0].is_cuda else row.module
    return lambda: compiled(*inputs)


PEERS: dict[str, Callable[[Row, Sequence[Tensor], bool], Callable[[], Tensor]]] = {
    "cudnn": _cudnn,
    "flex": _flex,
    "fa4": _fa4,
    "compile": _compile,
}

TITLES = {"cudnn": "cuDNN", "flex": "FlexAttention", "fa4": "FlashAttention-4", "compile": "torch.compile"}


def problem(error: Exception) -> str:
    """What stands in place of a peer's figure."""
    if isinstance(error, NotImplementedError):
        return f"no: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
