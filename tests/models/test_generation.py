"""Text generation by a pretrained decoder: the same tokens as eager, with growing and with static caches."""

from __future__ import annotations

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


def _generate(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int = NEW_TOKENS, **settings: Any
) -> torch.Tensor:
    """The new tokens, greedily chosen, never stopping early."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **settings)
    return out[:, inputs["input_ids"].shape[1] :]


def _every_layer_is_rewritten(fast: Any) -> bool:
    layers = {site.module_path for site in fast.report.sites}
    return len(layers) == fast.config.num_hidden_layers and all(s.status == "rewritten" for s in fast.report.sites)


def test_growing_cache(smollm2: Any, tokenizer: Any) -> None:
    """The same tokens with transformers' dynamic cache; after the first tokens nothing compiles, for no prompt."""
    prompt, other = (pretrained.real_tokens(tokenizer, n) for n in (61, 80))
    expected = _generate(smollm2, {"input_ids": prompt})
    fast = einscade.optimize(smollm2, inner="eager", dynamic=True)
    assert torch.equal(_generate(fast, {"input_ids": prompt}), expected)
    assert _every_layer_is_rewritten(fast)
    compiled = compilations()
    assert compiled <= 4
    _generate(fast, {"input_ids": other}, new_tokens=8)
    assert compilations() == compiled


def test_static_cache(smollm2: Any, tokenizer: Any) -> None:
    inputs = {"input_ids": pretrained.real_tokens(tokenizer, 61)}
    expected = _generate(smollm2, inputs, cache_implementation="static", disable_compile=True)
    fast = einscade.optimize(smollm2, inner="eager", dynamic=True)
    assert torch.equal(_generate(fast, inputs, cache_implementation="static", disable_compile=True), expected)
    assert _every_layer_is_rewritten(fast)
    assert compilations() <= 4


def test_left_padding(smollm2: Any, tokenizer: Any) -> None:
    """A batch of prompts of different lengths, padded on the left as decoders need it."""
    text = pretrained.real_tokens(tokenizer, 50)
    ids, mask = text.repeat(3, 1), torch.ones(3, 50, dtype=torch.long)
    for row, padding in enumerate((0, 13, 31)):
        ids[row, :padding], mask[row, :padding] = tokenizer.pad_token_id or 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = _generate(smollm2, inputs, new_tokens=16)
    fast = einscade.optimize(smollm2, inner="eager", dynamic=True)
    assert torch.equal(_generate(fast, inputs, new_tokens=16), expected)
    assert _every_layer_is_rewritten(fast)
    assert compilations() <= 4
