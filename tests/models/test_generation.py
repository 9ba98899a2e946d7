"""Text generation by a pretrained decoder: the same tokens as eager, with growing and with static caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import einscade
from examples import pretrained
from tests.models.small import compilations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return pretrained.smollm2("eager")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pretrained.smollm2_tokenizer()


def _generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """The new tokens, greedily chosen, never stopping early."""
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **settings)
    return out[:, inputs["input_ids"].shape[1] :]


def _sites_by_layer(fast: Any) -> dict[str, set[str]]:
    statuses: dict[str, set[str]] = {}
    for site in fast.report.sites:
        statuses.setdefault(site.module_path, set()).add(site.status)
    return statuses


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_tokens(smollm2: Any, tokenizer: Any, cache: str) -> None:
    inputs = {"input_ids": pretrained.real_tokens(tokenizer, 61)}
    expected = _generate(smollm2, inputs, cache_implementation=cache, disable_compile=True)
    fast = einscade.optimize(copy.deepcopy(smollm2), inner="eager", dynamic=True)
    actual = _generate(fast, inputs, cache_implementation=cache, disable_compile=True)
    assert torch.equal(actual, expected)
    layers = _sites_by_layer(fast)
    assert len(layers) == smollm2.config.num_hidden_layers
    assert all(statuses == {"rewritten"} for statuses in layers.values())


def test_decoding_does_not_recompile(smollm2: Any, tokenizer: Any) -> None:
    """Prefill and the first steps compile; every later token runs what is there, for another prompt too."""
    fast = einscade.optimize(copy.deepcopy(smollm2), inner="eager", dynamic=True)
    _generate(fast, {"input_ids": pretrained.real_tokens(tokenizer, 61)})
    compiled = compilations()
    assert compiled <= 4
    _generate(fast, {"input_ids": pretrained.real_tokens(tokenizer, 80)})
    assert compilations() == compiled


def test_left_padding(smollm2: Any, tokenizer: Any) -> None:
    """A batch of prompts of different lengths, padded on the left as decoders need it."""
    text = pretrained.real_tokens(tokenizer, 50)
    ids, mask = text.repeat(3, 1), torch.ones(3, 50, dtype=torch.long)
    for row, padding in enumerate((0, 13, 31)):
        ids[row, :padding], mask[row, :padding] = tokenizer.pad_token_id or 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = _generate(smollm2, inputs)
    fast = einscade.optimize(copy.deepcopy(smollm2), inner="eager", dynamic=True)
    assert torch.equal(_generate(fast, inputs), expected)
