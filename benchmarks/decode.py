"""Decoding, ragged and paged batches, packed documents on one GPU, in plain PyTorch through `einscade.optimize`.

    python benchmarks/decode.py                        the table, peers beside it, in under four minutes
    python benchmarks/decode.py --only NAME ...        some rows
    python benchmarks/decode.py --tiny                 small sizes on whatever device there is: does it run?
    python benchmarks/decode.py --out FILE [--commit ID] [--json]

A row is a module that writes its attention out (products, mask, softmax), as bound by memory as decoding is: GB/s count
the keys and values that it has to read, each once, and stand beside the bandwidth of a copy in the same run. Rows of
packed documents are bound by arithmetic: TFLOP/s of the points that exist. Before anything is timed, the optimised call
at full size is compared with float64, sequence by sequence (documents: head by head), and must err by at most 1.5 times
what PyTorch's math attention in the row's dtype errs on the same. Times are medians after warm-up, on random data, with
the caches flushed between calls, of calls captured in CUDA graphs (a call that cannot be is timed as it is); what the
first call took (compiling, choosing among candidates) stands beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import einscade
from benchmarks import record

PEERS = ("flex", "cudnn", "flash", "sdpa", "copy + sdpa", "varlen")

Arguments = tuple[Tensor, ...]
Peer = Callable[[], Callable[[], Tensor]]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, written out; several query heads may share a key head."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def within(lengths: Tensor, m: int) -> Tensor:
    return (torch.arange(m, device=lengths.device) < lengths[:, None])[:, None, None, :]


def same_document(doc: Tensor) -> Tensor:
    at = torch.arange(len(doc), device=doc.device)
    return (doc[:, None] == doc[None, :]) & (at[:, None] >= at[None, :])


class Whole(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)


class Ragged(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return attention(q, k, v, within(lengths, k.shape[2]))


class Paged(nn.Module):
    """`k_pages`, `v_pages`: page, place in it, head, width; `table`: the pages of each sequence in order."""

    def forward(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k_pages, v_pages))
        return attention(q, k, v, within(lengths, k.shape[2]))


class Documents(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return attention(q, k, v, same_document(doc))


class Boundaries(nn.Module):
    """The same from the documents' ends (`cu_seqlens` without its leading 0)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        doc = torch.searchsorted(ends, torch.arange(q.shape[2], device=q.device), right=True)
        return attention(q, k, v, same_document(doc))


@dataclass(frozen=True)
class Row:
    """`batch` sequences of up to `length` keys, `heads` query heads on `groups` key heads. `page`: keys in a page.
    `kind`: whole, ragged, documents or boundaries. `goal`: GB/s, or TFLOP/s of documents."""

    name: str
    kind: str
    batch: int
    heads: int
    groups: int
    length: int
    goal: float | None = None
    queries: int = 1
    page: int | None = None
    width: int = 128

    @property
    def packed(self) -> bool:
        return self.kind in ("documents", "boundaries")

    def model(self) -> nn.Module:
        if self.page is not None:
            return Paged()
        return {"whole": Whole, "ragged": Ragged, "documents": Documents, "boundaries": Boundaries}[self.kind]()

    def lengths(self, device: str) -> Tensor:
        """Between a 64th of the length and all of it, evenly on a logarithmic scale, in no order."""
        if self.kind != "ragged":
            return torch.full((self.batch,), self.length, device=device)
        share = torch.linspace(-6, 0, self.batch)[torch.randperm(self.batch)]
        return (self.length * 2**share).long().clamp_min(1).to(device)

    def ends(self, device: str) -> Tensor:
        """Of twelve documents of unequal lengths."""
        share = torch.tensor([1, 7, 2, 3, 9, 1, 4, 2, 8, 5, 3, 6]).cumsum(0)
        return (share * self.length // int(share[-1])).to(device)

    def inputs(self, device: str) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        n = self.length if self.packed else self.queries
        q = normal(self.batch, self.heads, n, self.width)
        if self.page is not None:
            each = -(-self.length // self.page)
            table = torch.randperm(self.batch * each, device=device).reshape(self.batch, each)
            pages = [normal(self.batch * each, self.page, self.groups, self.width) for _ in "kv"]
            return (q, *pages, table, self.lengths(device))
        keys = [normal(self.batch, self.groups, self.length, self.width) for _ in "kv"]
        if self.kind == "ragged":
            return (q, *keys, self.lengths(device))
        if self.packed:
            ends = self.ends(device)
            at = torch.arange(self.length, device=device)
            return (q, *keys, ends if self.kind == "boundaries" else torch.searchsorted(ends, at, right=True))
        return (q, *keys)

    def work(self, arguments: Arguments) -> float:
        """Bytes of keys and values that have to be read, or operations on the points of documents."""
        if self.packed:
            ends = self.ends("cpu")
            sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long)).double()
            return float((sizes * (sizes + 1) / 2).sum()) * 4 * self.width * self.heads * self.batch
        keys = arguments[-1].sum().item() if self.kind == "ragged" else self.batch * self.length
        return float(keys) * self.groups * self.width * 2 * 2

    def pieces(
        self, arguments: Arguments, out: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]:
        """Queries, keys, values, mask and result of one sequence at a time, or of one head of packed documents."""
        q, k, v, *rest = arguments
        if self.packed:
            at = torch.arange(self.length, device=q.device)
            doc = rest[0] if self.kind == "documents" else torch.searchsorted(rest[0], at, right=True)
            mask = same_document(doc)
            for h in range(self.heads):
                g = h // (self.heads // self.groups)
                yield q[:, h : h + 1], k[:, g : g + 1], v[:, g : g + 1], mask, out[:, h : h + 1]
            return
        for b in range(self.batch):
            kb, vb = k[b : b + 1], v[b : b + 1]
            if self.page is not None:
                kb, vb = (x[rest[0][b : b + 1]].flatten(1, 2).transpose(1, 2) for x in (k, v))
            mask = within(rest[-1][b : b + 1], kb.shape[2])[0] if rest else None
            yield q[b : b + 1], kb, vb, mask, out[b : b + 1]

    # -- peers --

    def peers(self, arguments: Arguments) -> dict[str, Peer]:
        q, k, v, *rest = arguments
        found: dict[str, Peer] = {}
        if self.page is not None:
            found["copy + sdpa"] = lambda: partial(_gathered, *arguments)
            return found
        mask = {"ragged": lambda b, h, p, m: m < rest[0][b]}.get(self.kind)
        if self.packed:
            at = torch.arange(self.length, device=q.device)
            doc = rest[0] if self.kind == "documents" else torch.searchsorted(rest[0], at, right=True)
            mask = lambda b, h, p, m: (doc[p] == doc[m]) & (p >= m)  # noqa: E731
            found["varlen"] = lambda: self.varlen(arguments)
        found["flex"] = lambda: _flex(q, k, v, mask)
        if self.kind == "whole":
            for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
                found[name] = partial(lambda b: partial(_sdpa, q, k, v, b), backend)
        if self.kind == "ragged":
            there = within(rest[0], self.length)
            found["sdpa"] = lambda: partial(sdpa, q, k, v, there, enable_gqa=True)
        return found

    def varlen(self, arguments: Arguments) -> Callable[[], Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1).contiguous() for x in arguments[:3])
        ends = self.ends(str(q.device))
        cu = torch.cat([torch.zeros_like(ends[:1]), ends]).int()
        longest = int(torch.diff(cu).max())
        return partial(varlen_attn, q, k, v, cu, cu, longest, longest, window_size=(-1, 0))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, enable_gqa=True)


def _gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))
    return sdpa(q, k, v, within(lengths, k.shape[2]), enable_gqa=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Callable[..., Tensor] | None) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    block = None
    if mask is not None:
        block = create_block_mask(mask, q.shape[0], None, q.shape[2], k.shape[2], device=q.device)
    return partial(torch.compile(flex_attention), q, k, v, block_mask=block, enable_gqa=True)


ROWS = (
    Row("B16 Hq32 Hkv8 S32768", "whole", 16, 32, 8, 32768, 4400),
    Row("B1 Hq32 Hkv8 S131072", "whole", 1, 32, 8, 131072, 4000),
    Row("B64 Hq32 Hkv32 S4096", "whole", 64, 32, 32, 4096, 4480),
    Row("B16 Hq32 Hkv8 S32768, 8 queries", "whole", 16, 32, 8, 32768, queries=8),
    Row("ragged 1k to 64k, B32 Hq32 Hkv8", "ragged", 32, 32, 8, 65536),
    Row("ragged, pages of 16", "ragged", 32, 32, 8, 65536, page=16),
    Row("ragged, pages of 128", "ragged", 32, 32, 8, 65536, page=128),
    Row("12 packed documents, H16 N16384", "documents", 1, 16, 16, 16384, 480),
    Row("12 packed documents from their ends", "boundaries", 1, 16, 16, 16384, 480),
)


def tiny(row: Row) -> Row:
    """The row at a size for a CPU: its structure is the same."""
    heads = 4 if row.heads > row.groups else 2
    page = row.page and min(row.page, 16)
    shape = (row.kind, min(row.batch, 3), heads, 2, 96)
    return Row(row.name, *shape, queries=min(row.queries, 3), page=page, width=16)


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=30, rep=120, return_mode="median")) * 1e-3
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph, as decoding runs it, so that what counts is the kernels; itself where that fails."""
    if device != "cuda":
        return call
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception:
        torch.cuda.synchronize()
        return call
    return graph.replay


def copy_bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def errors(row: Row, arguments: Arguments, out: Tensor) -> tuple[float, float]:
    """Relative error of a result against float64, and that of PyTorch's math attention in the same dtype."""
    ours, plain, whole = 0.0, 0.0, 0.0
    for q, k, v, mask, got in row.pieces(arguments, out):
        exact = attention(q.double(), k.double(), v.double(), mask)
        with sdpa_kernel(SDPBackend.MATH):
            math_out = sdpa(q, k, v, mask, enable_gqa=True)
        ours += float((got.double() - exact).square().sum())
        plain += float((math_out.double() - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(ours / whole), math.sqrt(plain / whole)


def measure(row: Row, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, arguments = row.model(), row.inputs(device)
    result: dict[str, Any] = {"goal": row.goal, "unit": "TFLOP/s" if row.packed else "GB/s"}
    scale = row.work(arguments) / (1e12 if row.packed else 1e9)
    try:
        fast = einscade.optimize(model, dynamic=False)
        start = time.perf_counter()
        out = fast(*arguments)
        _wait(device)
        result["first_call_s"] = round(time.perf_counter() - start, 2)
        result["error"], result["math_error"] = errors(row, arguments, out)
        if not result["error"] <= 1.5 * result["math_error"]:
            raise ArithmeticError(f"error {result['error']:.2e}, math attention has {result['math_error']:.2e}")
        (site,) = einscade.report(fast).sites
        if site.status != "rewritten":
            raise RuntimeError(f"the site is unchanged: {site.reason}")
        result["candidate"] = site.kernel.candidate
        result["schedule"] = dict(site.kernel.schedule.tiles) | dict(site.kernel.schedule.launch)
        replay = captured(lambda: fast(*arguments), device)
        result["graph"] = device == "cuda" and getattr(replay, "__name__", "") == "replay"
        result["einscade"] = scale / seconds(replay, device)
    except Exception as problem:
        result["problem"] = f"{type(problem).__name__}: {problem}"[:400]
    for name, peer in row.peers(arguments).items():
        try:
            result[name] = scale / seconds(captured(peer(), device), device)
        except Exception as problem:
            result[name] = f"{type(problem).__name__}: {problem}"[:200]
    return result


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def line(name: str, result: Mapping[str, Any], copy: float) -> str:
    """A row of the table."""
    rate = result.get("einscade")
    fixed = (
        "graph",
        "goal",
        "unit",
        "first_call_s",
        "error",
        "math_error",
        "candidate",
        "schedule",
        "einscade",
        "problem",
    )
    peers = ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} –" for k, v in result.items() if k not in fixed)
    if rate is None:
        return f"{name:36}{'–':>9}  {peers}; {result.get('problem')}"
    share = f"{rate * 1e9 / copy:.0%}" if result["unit"] == "GB/s" else ""
    goal = "" if result["goal"] is None else f"{result['goal']:.0f}"
    return (
        f"{name:36}{rate:>9.1f}{result['unit']:>8}{share:>6}{goal:>6}  {peers}; {result['candidate']}, "
        f"error {result['error']:.1e} ({result['math_error']:.1e}), first call {result['first_call_s']:.1f} s"
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of rows, or parts of names")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU where there is no GPU")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON at the end")
    parser.add_argument("--commit", help="id of the commit, where there is no git")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("no GPU: --tiny runs the same rows at small sizes")
    copy = copy_bandwidth(device)
    figures: dict[str, Any] = {"copy_GBps": copy / 1e9, "tiny": options.tiny, "rows": {}}
    report = {"environment": record.environment(options.commit), "figures": figures}
    print(f"copy {copy / 1e9:.0f} GB/s\n{'':36}{'einscade':>9}{'':>8}{'copy':>6}{'goal':>6}  peers", flush=True)
    for row in ROWS:
        if options.only and not any(name in row.name for name in options.only):
            continue
        result = figures["rows"][row.name] = measure(tiny(row) if options.tiny else row, device)
        print(line(row.name, result, copy), flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.json:
        print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
