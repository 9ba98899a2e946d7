"""A training step on the CPU: time, bytes kept for backward and peak memory, of eager, sdpa and einscade attention.

    python benchmarks/training.py                       a small Llama at 512, 1,024 and 2,048 tokens
    python benchmarks/training.py --lengths 64,128      other lengths
    python benchmarks/training.py --json                the same as JSON
    python benchmarks/training.py --write               keeps the figures in benchmarks/results/training.json

A step is forward and backward of one text in fp32. Nothing else is compiled, so that attention is all that differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import einscade
from benchmarks import record
from benchmarks.measure import interleaved_medians, peak_extra_memory

LENGTHS = (512, 1024, 2048)
RUNS = 3
VARIANTS = ("eager", "sdpa", "einscade")
LINEAR = 1.1
"""What is kept may grow with the length by this much more than the length does."""


def build(variant: str) -> Any:
    """A Llama with grouped key heads, the same weights for every variant."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    attention = "sdpa" if variant == "sdpa" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    return einscade.optimize(model, inner="eager", dynamic=True) if variant == "einscade" else model


def step(model: Any, tokens: torch.Tensor) -> float:
    """One step's loss; the gradients are the model's."""
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def kept(model: Any, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each memory once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=tokens, labels=tokens).loss
    total = sum(found.values())
    del loss
    return total


def measure(models: dict[str, Any], length: int) -> dict[str, Any]:
    """All variants at one length."""
    tokens = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(1))

    def steps(model: Any) -> Callable[[], float]:
        return lambda: step(model, tokens)

    losses = {name: step(model, tokens) for name, model in models.items()}  # compiles and tunes
    memory = {name: peak_extra_memory(steps(model)) for name, model in models.items()}
    seconds = interleaved_medians({name: steps(model) for name, model in models.items()}, repeats=RUNS)
    return {
        "step_s": {name: median for name, (median, _) in seconds.items()},
        "kept_bytes": {name: kept(model, tokens) for name, model in models.items()},
        "peak_bytes": memory,
        "loss_difference": abs(losses["einscade"] - losses["eager"]) / abs(losses["eager"]),
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    rows = [f"{'tokens':>7}  {'attention':<10}{'step':>10}{'kept':>12}{'peak':>12}"]
    for length, f in figures.items():
        for name in VARIANTS:
            mebibytes = (f[what][name] / 2**20 for what in ("kept_bytes", "peak_bytes"))
            sizes = "".join(f"{size:>8.0f} MiB" for size in mebibytes)
            rows.append(f"{length:>7}  {name:<10}{f['step_s'][name]:>8.2f} s{sizes}")
    return "\n".join(rows)


def is_linear(figures: dict[str, dict[str, Any]]) -> bool:
    """Whether what einscade keeps grows no faster than the length, from each length to the next."""
    points = [(int(n), f["kept_bytes"]["einscade"]) for n, f in figures.items()]
    return all(b / a <= LINEAR * m / n for (n, a), (m, b) in itertools.pairwise(points))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens, separated by commas")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--write", action="store_true", help="keep the figures in benchmarks/results/training.json")
    args = parser.parse_args()
    if args.write:
        record.check_clean()
    env = record.environment()
    models = {name: build(name) for name in VARIANTS}
    figures = {str(n): measure(models, n) for n in sorted(map(int, args.lengths.split(",")))}
    if args.json:
        print(json.dumps({"environment": env, "figures": figures}, indent=1))
    else:
        print(table(figures))
        print(f"what einscade keeps grows {'with the length' if is_linear(figures) else 'FASTER than the length'}")
    if args.write:
        print(f"written to {record.write('training', figures, env)}", file=sys.stderr)
    return 0 if is_linear(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
