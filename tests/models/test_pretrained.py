"""Two pretrained models on real text: every site rewritten, logits and embeddings those of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import einscade
from examples import pretrained

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_dynamo")]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_smollm2(attention: str, smollm2: Any, smollm2_tokenizer: Any) -> None:
    tokens = pretrained.real_tokens(smollm2_tokenizer, 300)
    smollm2.set_attn_implementation(attention)
    try:
        fast = einscade.optimize(smollm2, inner="eager")
        with torch.no_grad():
            error = (fast(tokens).logits - smollm2(tokens).logits).abs().max()
    finally:
        smollm2.set_attn_implementation("eager")
    assert error <= 1e-3
    assert [site.status for site in fast.report.sites] == ["rewritten"] * 30
    assert [site.module_path for site in fast.report.sites] == [f"model.layers.{i}.self_attn" for i in range(30)]
    assert len({site.kernel.source for site in fast.report.sites}) == 1, "thirty equal layers are one kernel"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm_on_a_padded_batch(attention: str) -> None:
    model, tokenizer = pretrained.minilm(attention), pretrained.minilm_tokenizer()
    sentences = [
        "Attention is found by structure.",
        "It rains.",
        "A mask keeps padding out of the softmax, row by row.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    fast = einscade.optimize(model, inner="eager")
    with torch.no_grad():
        expected, actual = (pretrained.sentence_embedding(m(**batch), batch["attention_mask"]) for m in (model, fast))
    assert (actual - expected).abs().max() <= 1e-5
    assert [site.status for site in fast.report.sites] == ["rewritten"] * 6
