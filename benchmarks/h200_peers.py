"""What others make of the rows of `benchmarks/h200.py`.

Comes in: a row and its inputs. Goes out: `attention`, a call without arguments for each of `PEERS` (cuDNN through
`scaled_dot_product_attention`, FlexAttention on its Triton kernels, FlashAttention-4, and torch.compile of the module
itself), and `call_ahead`, which calls them first in several processes at once: their compilers keep on disk what they
made, and what crashes does so there.

FlashAttention-4 (`pip install flash-attn-4`) is called directly where its own function computes the row, on views with
the heads behind the positions, as it wants them; elsewhere it is FlexAttention's `BACKEND="FLASH"`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import apart
from benchmarks.h200_rows import ROWS, Row

__all__ = ["PEERS", "attention", "call_ahead", "problem"]

LARGEST_SCORES = 9 << 30
"""Bytes of scores in bfloat16 up to which a module is run as it is written: compiled, it holds several such tensors."""

AHEAD = ("flex", "fa4")
"""Peers whose compilers keep what they made on disk, and whose calls take little memory beside the inputs."""


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


def problem(error: Exception) -> str:
    """What stands in place of a peer's figure."""
    if isinstance(error, NotImplementedError):
        return f"no: {error}"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def call_ahead(rows: Sequence[str], names: Sequence[str], seconds: float) -> dict[tuple[str, str], str]:
    """Calls each peer of `AHEAD` that is named once on each row, by name, in processes that share the rows among them.
    A later call of what went well finds its kernels on disk; returned is why the others did not go well. What was not
    begun within `seconds` is neither, and takes longer later."""
    if not (names := [name for name in names if name in AHEAD]):
        return {}
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # read when flash_attn is imported
    workers = min(len(rows), max(1, (os.cpu_count() or 1) // 2))
    shares = [rows[i::workers] for i in range(workers)]
    this = str(Path(__file__).resolve())
    said = apart.lines([[this, ",".join(share), ",".join(names)] for share in shares], workers, seconds)
    found: dict[tuple[str, str], str | None] = {(row, name): reason for part in said for row, name, reason in part}
    unfinished = f"its first call crashed, or took longer than {seconds:g} s"
    return {key: unfinished if reason is None else reason for key, reason in found.items() if reason != ""}


def _call_each(rows: Sequence[Row], names: Sequence[str], log: Path) -> None:
    """Writes of every call, as a line of JSON, that it began (None), and then what was wrong ("" for nothing)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functorch_config.donated_buffer = False  # as where they are timed, or what is kept would not fit
    for row in rows:
        for name in names:
            apart.append(log, [row.name, name, None])
            torch._dynamo.reset()
            reason = ""
            try:
                inputs = row.inputs(row.length, device)
                row.timed(attention(name, row, inputs), inputs)()
                _wait(device)
            except Exception as error:
                reason = problem(error)
            apart.append(log, [row.name, name, reason])
            if reason:
                _wait(device)  # raises where a kernel took the device with it: all that follows would fail too


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    chosen, wanted, written = sys.argv[1:]
    _call_each([r for r in ROWS if r.name in chosen.split(",")], wanted.split(","), Path(written))
