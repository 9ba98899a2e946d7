"""Attention modules as people write them: results and gradients of every one, in float64's terms, static and dynamic.

Each is here because something about it went wrong once, or because no spelling has it: it writes to slices, makes its
mask from what it computes, normalises twice, masks whole rows with a finite number, or folds windows into the batch.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import einscade
from tests.models.small import rewritten_sites

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, HEADS = 32, 4


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Projected(nn.Module):
    """Queries, keys and values of one input, and what a module does with them."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.attend = nn.Linear(WIDTH, 3 * WIDTH), attend

    def forward(self, x: Tensor) -> Tensor:
        return _merged(self.attend(*map(_heads, self.project(x).chunk(3, -1))))


def _filled(fill: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every second key, seen from behind it: the first queries see none, and take the mean of all."""
        k, v = k[:, :, ::2], v[:, :, ::2]
        position, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(position < 2 * key + 1, fill)
        return scores.softmax(-1) @ v

    return attend


def _padded_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padding multiplied out, as an additive mask that is computed from data: rows of padding see nothing."""
    keep = (q[:, 0, :, 0].sigmoid() > 0.4).float()
    mask = (1.0 - keep[:, None, None, :] * keep[:, None, :, None]) * -1e9
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


def _into_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries in two blocks, each written to its slice of the result."""
    n = q.shape[2]
    out = torch.empty_like(q)
    for rows in (slice(0, n // 2), slice(n // 2, n)):
        out[:, :, rows] = (q[:, :, rows] @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
    return out


def _slopes_as_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ALiBi with its slopes made inside, added by baddbmm."""
    b, h, n, width = q.shape
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(1, h, 1)
    bias = (slopes * (torch.ones(b, n).cumsum(-1) - 1)[:, None, :]).reshape(b * h, 1, n).to(q.dtype)
    scores = bias.baddbmm(q.reshape(b * h, n, width), k.reshape(b * h, n, width).transpose(1, 2), alpha=width**-0.5)
    scores = scores.view(b, h, n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def _normalised_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights thinned by a gate of the keys, then normalised again."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) * k[:, :, None, :, 0].sigmoid()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-8)) @ v


def _mask_like_an_activation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A causal mask in the shape and dtype of scores, filled from them."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = torch.full_like(scores[0, 0], -torch.inf).triu(1)
    return (scores + mask).softmax(-1) @ v


def _keys_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are a target: nothing is learnt through them."""
    return (q @ k.detach().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def _maximum_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax plus one by hand, the maximum detached: that moves nothing, so it may as well be differentiated."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    top = scores.amax(-1, keepdim=True).clamp(min=0).detach()
    weights = torch.exp(scores - top)
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-top))) @ v


def _norm_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Retention's normaliser: a sum that gradients stop at."""
    n = q.shape[2]
    scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), 0)
    return (scores / scores.detach().abs().sum(-1, keepdim=True).clamp(min=1)) @ v


def _norm_of_masked_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Retention's normaliser, differentiated: a sum that does not count below 1, of scores that are not all there."""
    scores = (q @ k.transpose(-1, -2)).tril()
    return (scores / scores.abs().sum(-1, keepdim=True).clamp(min=1)) @ v


def _scores_within_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Divided by the greatest of a row, which has a gradient."""
    scores = (q @ k.transpose(-1, -2)).tril()
    return (scores / scores.abs().amax(-1, keepdim=True).clamp(min=0.1)) @ v


def _scores_of_unit_variance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised over queries and keys alike: in the gradient two loops each need a result of the other."""
    scores = q @ k.transpose(-1, -2)
    spread, mean = torch.var_mean(scores, (-1, -2), keepdim=True, correction=0)
    return ((scores - mean) * torch.rsqrt(spread + 1e-5)).softmax(-1) @ v


def _latents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same queries for the whole batch."""
    return (q[0, 0] @ k[:, 0].transpose(-1, -2)).softmax(-1)[:, None] @ v[:, :1].expand_as(v)


def _differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights by squared distance, from every difference of a query and a key."""
    return (-((q[:, :, :, None] - k[:, :, None]) ** 2).sum(-1) / 4).softmax(-1) @ v


def _distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def _channel_by_channel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Point clouds: every channel has weights of its own."""
    return torch.einsum("bhpme,bhme->bhpe", (q[:, :, :, None] - k[:, :, None]).relu().softmax(3), v)


def _one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A step of a decoder: the products of one query with all keys, and a weighted sum, both by broadcasting."""
    weights = (q[:, :, :1] * k).sum(-1).softmax(-1)
    return (weights.unsqueeze(-1) * v).sum(2, keepdim=True)


def _neighbours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees itself and two before it, gathered by a table of places."""
    places = (torch.arange(q.shape[2])[:, None] - torch.arange(3)[None, :]).clamp(min=0)
    weights = (q[:, :, :, None] * k[:, :, places]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, places]).sum(3)


class SharedKey(nn.Module):
    """One key head for all, kept in the first half of a tensor whose other half are the values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        q = _heads(self.query(x))
        k, v = self.both(x).unsqueeze(1).split(WIDTH // HEADS, -1)
        return _merged((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)


class Additive(nn.Module):
    """An additive network's scores (Bahdanau), the heads mixed by a convolution of one point."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.query, self.key = (nn.Linear(WIDTH, n) for n in (WIDTH, 12, 12))
        self.score, self.mix = nn.Linear(12, HEADS), nn.Conv2d(HEADS, HEADS, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.query(x)[:, :, None] + self.key(x)[:, None])
        scores = self.mix(self.score(hidden).permute(0, 3, 1, 2))
        return _merged(scores.softmax(-1) @ _heads(self.project(x)))


class Mixer(nn.Module):
    """No attention: positions mixed by weights that are cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(64, 64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return (torch.nn.functional.gelu(x.mT @ self.first[:n]) @ self.second[:, :n]).mT


class Windows(nn.Module):
    """Attention over a grid of positions that lie apart; windows and batch are one dimension meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g, width = 4, c // HEADS
        parts = self.project(x).view(b, 3, HEADS, width, g, h // g, g, w // g).permute(1, 0, 5, 7, 2, 4, 6, 3)
        q, k, v = parts.reshape(3, b * (h // g) * (w // g), HEADS, g * g, width)
        out = ((q @ k.transpose(-1, -2) * width**-0.5).softmax(-1) @ v).view(b, h // g, w // g, HEADS, g, g, width)
        return out.permute(0, 3, 6, 4, 1, 5, 2).reshape(b, c, h, w)


class SquareImages(nn.Module):
    """Patches of images as wide as they are high, with a table of relative rows that is cut to their side."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.rows = nn.Conv2d(WIDTH, 3 * WIDTH, 4, 4), nn.Parameter(torch.randn(HEADS, 64))

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1] // 4
        q, k, v = map(_heads, self.patches(x).flatten(2).mT.chunk(3, -1))
        row = torch.arange(side * side) // side
        bias = self.rows[:, row[:, None] - row[None, :] + 32]
        return _merged((q @ k.transpose(-1, -2) * 0.3 + bias).softmax(-1) @ v)


@dataclass(frozen=True)
class Written:
    """A module, its input for a length, and how many sites it has."""

    name: str
    make: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]] = lambda n: (2, n, WIDTH)
    sites: int = 1


MODULES = [
    Written("a_fill_of_ten_thousand", lambda: Projected(_filled(-1e4))),
    Written("a_fill_of_a_billion", lambda: Projected(_filled(-1e9))),
    Written("padded_rows", lambda: Projected(_padded_rows)),
    Written("into_slices", lambda: Projected(_into_slices), sites=2),
    Written("slopes_as_numbers", lambda: Projected(_slopes_as_numbers)),
    Written("normalised_twice", lambda: Projected(_normalised_twice)),
    Written("mask_like_an_activation", lambda: Projected(_mask_like_an_activation)),
    Written("keys_without_gradient", lambda: Projected(_keys_without_gradient)),
    Written("maximum_without_gradient", lambda: Projected(_maximum_without_gradient)),
    Written("norm_of_masked_scores", lambda: Projected(_norm_of_masked_scores)),
    Written("scores_within_one", lambda: Projected(_scores_within_one)),
    Written("scores_of_unit_variance", lambda: Projected(_scores_of_unit_variance)),
    Written("latents", lambda: Projected(_latents)),
    Written("differences", lambda: Projected(_differences)),
    Written("distances", lambda: Projected(_distances)),
    Written("channel_by_channel", lambda: Projected(_channel_by_channel)),
    Written("one_query", lambda: Projected(_one_query)),
    Written("neighbours", lambda: Projected(_neighbours)),
    Written("additive", Additive),
    Written("shared_key", SharedKey),
    Written("mixer", Mixer, sites=0),
    Written("square_images", SquareImages, lambda n: (2, WIDTH, n, n)),
    Written("windows", Windows, lambda n: (2, WIDTH, n, 8)),
]


def _gradients(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """All gradients of a weighted sum of the output, in one vector."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * weights).sum().backward()
    found = [*(p.grad for p in module.parameters()), x.grad]
    return torch.cat([g.double().flatten() for g in found if g is not None])


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("written", MODULES, ids=lambda w: w.name)
def test_results_and_gradients(written: Written, dynamic: bool) -> None:
    torch.manual_seed(0)
    module = written.make()
    exact = copy.deepcopy(module).double()
    fast = einscade.optimize(module, inner="eager", dynamic=True if dynamic else None)
    for n in (16, 24) if dynamic else (16, 16):  # a second call with other data, too
        x = torch.randn(written.shape(n))
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # nothing may have fallen back
            ours = _gradients(module, fast, x)
            result = fast(x)
        plain = _gradients(module, module, x)
        right = _gradients(exact, exact, x.double())
        assert _error(result, exact(x.double())) <= max(1.5 * _error(module(x), exact(x.double())), 4e-7)
        assert _error(ours, right) <= max(1.5 * _error(plain, right), 4e-7)
    assert [site.status for site in fast.report.sites] == ["rewritten"] * written.sites
    assert rewritten_sites(fast) == written.sites


def test_a_gradient_that_stops_inside() -> None:
    """The site is left alone while gradients are asked for, with the reason, and rewritten without."""
    torch.manual_seed(0)
    module = Projected(_norm_without_gradient)
    fast = einscade.optimize(module, inner="eager")
    x = torch.randn(2, 16, WIDTH)
    assert torch.equal(_gradients(module, fast, x), _gradients(module, module, x))
    (site,) = fast.report.sites
    assert (site.status, "detach()" in str(site.reason)) == ("unchanged", True)
    with torch.no_grad():
        assert _error(fast(x), copy.deepcopy(module).double()(x.double())) <= 4e-7
    assert [site.status for site in fast.report.sites] == ["rewritten"]
