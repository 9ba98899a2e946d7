"""Text generation by a pretrained decoder: the tokens and logits of eager, with growing and with static caches.

By the first of its layers only, which compile in a fraction of the time; all thirty are compared in `test_pretrained`,
and generate in `make demo`. What they say means little, so that equal tokens alone would prove little: the logits of
every step are compared too.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import einscade
from examples import pretrained
from tests.models.small import compilations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]

LAYERS = 4
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def decoder(smollm2: Any) -> Any:
    """The first layers and the rest of the model, on the same weights."""
    shared = {id(x): x for x in (*smollm2.parameters(), *smollm2.buffers())}
    model = copy.deepcopy(smollm2, shared)
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    return model


def _generate(
    model: Any, inputs: dict[str, torch.Tensor], new_tokens: int = NEW_TOKENS, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens, greedily chosen, never stopping early, and the logits they were chosen by."""
    settings |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def _assert_same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    assert (actual[1] - expected[1]).abs().max() <= 1e-3


def _every_layer_is_rewritten(fast: Any) -> bool:
    layers = {site.module_path for site in fast.report.sites}
    return len(layers) == fast.config.num_hidden_layers and all(s.status == "rewritten" for s in fast.report.sites)


def test_growing_cache(decoder: Any, smollm2_tokenizer: Any) -> None:
    """The same tokens with transformers' dynamic cache; after the first tokens nothing compiles, for no prompt."""
    prompt, other = (pretrained.real_tokens(smollm2_tokenizer, n) for n in (61, 80))
    expected = _generate(decoder, {"input_ids": prompt})
    fast = einscade.optimize(decoder, inner="eager", dynamic=True)
    _assert_same(_generate(fast, {"input_ids": prompt}), expected)
    assert _every_layer_is_rewritten(fast)
    compiled = compilations()
    assert compiled <= 4
    _generate(fast, {"input_ids": other}, new_tokens=8)
    assert compilations() == compiled


def test_static_cache(decoder: Any, smollm2_tokenizer: Any) -> None:
    inputs = {"input_ids": pretrained.real_tokens(smollm2_tokenizer, 61)}
    expected = _generate(decoder, inputs, cache_implementation="static", disable_compile=True)
    fast = einscade.optimize(decoder, inner="eager", dynamic=True)
    _assert_same(_generate(fast, inputs, cache_implementation="static", disable_compile=True), expected)
    assert _every_layer_is_rewritten(fast)
    assert compilations() <= 4


def test_left_padding(decoder: Any, smollm2_tokenizer: Any) -> None:
    """A batch of prompts of different lengths, padded on the left as decoders need it."""
    text = pretrained.real_tokens(smollm2_tokenizer, 50)
    ids, mask = text.repeat(3, 1), torch.ones(3, 50, dtype=torch.long)
    for row, padding in enumerate((0, 13, 31)):
        ids[row, :padding], mask[row, :padding] = smollm2_tokenizer.pad_token_id or 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = _generate(decoder, inputs, new_tokens=16)
    fast = einscade.optimize(decoder, inner="eager", dynamic=True)
    _assert_same(_generate(fast, inputs, new_tokens=16), expected)
    assert _every_layer_is_rewritten(fast)
    assert compilations() <= 4
