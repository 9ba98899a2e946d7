"""Decoding, ragged and paged batches, packed documents in plain PyTorch: what is found in them, what is chosen on a
GPU, and that it computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor, nn

import einscade
from einscade.ir.cascade import Cascade
from einscade.ir.device import H200
from einscade.passes.pipeline import run
from einscade.runtime.candidates import Candidate, candidates
from einscade.runtime.program import Program

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, H, G, D, PAGE = 3, 8, 2, 16, 16
LENGTHS = torch.tensor([96, 5, 40])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def same_document(doc: Tensor) -> Tensor:
    at = torch.arange(len(doc), device=doc.device)
    return (doc[:, None] == doc[None, :]) & (at[:, None] >= at[None, :])


class Ragged(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        return attention(q, k, v, there[:, None, None, :])


class RaggedCall(nn.Module):
    """The same as one call of torch's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, there[:, None, None, :], enable_gqa=True)


class StaticCache(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return attention(q, k, v, torch.arange(k.shape[2], device=q.device)[None, :] <= position[:, None])


class Paged(nn.Module):
    def forward(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k_pages, v_pages))
        there = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        return attention(q, k, v, there[:, None, None, :])


class Slots(nn.Module):
    """Every key has a place of its own in the cache."""

    def forward(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        k, v = (x[slots].transpose(1, 2) for x in (k_cache, v_cache))
        there = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
        return attention(q, k, v, there[:, None, None, :])


class Packed(nn.Module):
    """All sequences' tokens one after another, without a batch: tokens, heads, width."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        doc = torch.searchsorted(cu, torch.arange(len(q)), right=True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attention(q, k, v, same_document(doc))[0].transpose(0, 1)


class Documents(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        return attention(q, k, v, same_document(doc))


class Boundaries(nn.Module):
    """`cu` are the ends of the documents, as `cu_seqlens` without its leading 0."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return attention(q, k, v, same_document(torch.searchsorted(cu, torch.arange(q.shape[2]), right=True)))


class Firsts(nn.Module):
    """`first` marks the first token of each document."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        return attention(q, k, v, same_document(first.cumsum(0)))


class Starts(nn.Module):
    """From each row's own first key on."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        start = cu[torch.searchsorted(cu, at, right=True) - 1]
        return attention(q, k, v, (at[None, :] >= start[:, None]) & (at[:, None] >= at[None, :]))


def keys(m: int = 96) -> list[Tensor]:
    return [torch.randn(B, G, m, D), torch.randn(B, G, m, D)]


def queries(p: int) -> Tensor:
    return torch.randn(B, H, p, D)


def pages() -> list[Tensor]:
    table = torch.randperm(20)[: B * 6].reshape(B, 6)
    table[1, 1:] = -1  # pages that nobody has
    return [torch.randn(20, PAGE, G, D), torch.randn(20, PAGE, G, D), table]


def slots() -> list[Tensor]:
    return [torch.randn(500, G, D), torch.randn(500, G, D), torch.randperm(500)[: B * 96].reshape(B, 96)]


def packed() -> list[Tensor]:
    return [torch.randn(96, H, D), torch.randn(96, G, D), torch.randn(96, G, D)]


CASES: dict[str, tuple[nn.Module, Callable[[], list[Tensor]], str]] = {
    "lengths": (Ragged(), lambda: [queries(1), *keys(), LENGTHS], "m < X[b]"),
    "lengths of a few queries": (Ragged(), lambda: [queries(5), *keys(), LENGTHS], "m < X[b]"),
    "lengths, in a call": (RaggedCall(), lambda: [queries(1), *keys(), LENGTHS.clamp_min(1)], "m < X[b]"),
    "slots": (Slots(), lambda: [queries(1), *slots(), LENGTHS], "X1[b,m]"),
    "packed": (Packed(), lambda: [*packed(), torch.tensor([20, 50, 96])], "X[p] == X[m]"),
    "a static cache": (StaticCache(), lambda: [queries(1), *keys(), torch.tensor([50])], "m <= X[p]"),
    "pages": (Paged(), lambda: [queries(1), *pages(), LENGTHS], "m // 16"),
    "documents": (Documents(), lambda: [queries(96), *keys(), torch.arange(96) // 30], "X[p] == X[m]"),
    "boundaries": (Boundaries(), lambda: [queries(96), *keys(), torch.tensor([20, 50, 96])], "X[p] == X[m]"),
    "first tokens": (Firsts(), lambda: [queries(96), *keys(), (torch.arange(96) % 30 == 0).long()], "X[p] == X[m]"),
    "starts": (Starts(), lambda: [queries(96), *keys(), torch.tensor([0, 20, 50])], "X[p]"),
}


@pytest.mark.parametrize("name", CASES)
def test_is_found_and_computes_the_same(name: str) -> None:
    model, make, _ = CASES[name]
    args = make()
    fast = einscade.optimize(model, inner="eager")
    expected = model(*(a.double() if a.is_floating_point() else a for a in args))
    assert float((fast(*args) - expected).norm() / expected.norm()) < 1e-6
    (site,) = einscade.report(fast).sites
    assert site.status == "rewritten", site.reason


def raised(name: str) -> Cascade:
    model, make, _ = CASES[name]
    (site,) = einscade.explain(model, *make()).sites
    assert isinstance(site.cascade, Cascade)
    return site.cascade


@pytest.mark.parametrize("name", CASES)
def test_data_is_a_domain(name: str) -> None:
    """What bounds the keys is a predicate on the data as it is stored, not a mask over queries and keys."""
    cascade = raised(name)
    assert CASES[name][2] in str(run(cascade, "exact").steps[0].after)
    assert not any({"p", "m"} <= set(t.ranks) for t in cascade.inputs)


def test_pages_are_not_copied() -> None:
    """The keys are read through the table, negative entries as torch reads them."""
    cascade = raised("pages")
    stored = [t for t in cascade.inputs if len(t.ranks) == 4 and t.name != "Q"]
    assert [int(cascade.extent(t.ranks[0])) for t in stored] == [20, 20]


def lengthened(name: str, **sizes: int) -> Cascade:
    """The case's cascade at other extents, in half precision."""
    cascade = raised(name)
    ranks = tuple(replace(r, extent=sympy.sympify(sizes.get(r.name, r.extent))) for r in cascade.ranks)
    half = tuple(replace(t, dtype="bf16") if t.dtype == "f32" else t for t in cascade.inputs)
    return cascade.replace(ranks=ranks, inputs=half)


def chosen(cascade: Cascade) -> list[Candidate]:
    rewritten = run(cascade, "exact").cascade
    return candidates(Program("exact", cascade, ()), rewritten, (), H200, {})


def test_a_gpu_decodes_in_parts() -> None:
    found = chosen(lengthened("lengths", m=65536, b=16, h=32, g=8, e=128, f=128))
    assert found[0].kind == "triton"
    assert dict(found[0].schedule.launch)
    assert found[0].symbols == ()
    assert dict(found[0].schedule.tiles)["h"] == 4
    assert found[0].source.text.count("@triton.jit\ndef attention_kernel") == 2
    assert any(not c.schedule.launch for c in found if c.kind == "triton"), "in one part it is a candidate as well"


def test_short_keys_are_not_split() -> None:
    assert not any(c.schedule.launch for c in chosen(lengthened("lengths", m=256)))


def test_a_split_that_breaks_costs_its_speed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("no such rank")

    monkeypatch.setattr("einscade.runtime.candidates.with_parts", broken)
    with pytest.warns(RuntimeWarning, match="splitting m failed"):
        found = chosen(lengthened("lengths", m=65536, b=16, h=32, g=8, e=128, f=128))
    assert found
    assert not any(c.schedule.launch for c in found)
