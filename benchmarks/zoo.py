"""The zoo: is every attention of transformers' architectures found, rewritten and still right?

    python benchmarks/zoo.py                     every family of FAMILIES, eager and sdpa attention
    python benchmarks/zoo.py llama deberta-v2    these; any other model type of transformers works too
    python benchmarks/zoo.py --json              the same as JSON

Comes in: names of model types. Goes out: one row for each family and attention implementation: the true number of
attention sites, how many einscade found and rewrote, the largest error against the original in fp32, graph breaks and
compile seconds. The exit status is 1 if any site was missed, left alone or wrong.

The true number is counted without einscade, from what runs: forward hooks count the calls of the innermost modules
whose class is named for attention (a module called twice, as ALBERT's shared layer is, has two sites). A site that
einscade reports outside of such a module is a stray: a router, a gate or an expert that should have been left alone.
Modules of linear attention are left out of both numbers.

The models have random weights, drawn wider than transformers initialises them: with its 0.02 every attention is close
to uniform, and a wrong mask or scale would hide in the rounding. Every family runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

import einscade

MAX_ERROR = 1e-4
NO_SDPA = "transformers has no sdpa for it"
LENGTH = 37  # divides nothing, and equals no width of the tiny configurations
SOURCE_LENGTH = 43  # the encoder's, so that cross attention is not square
BATCH = 2

# Any field of these names, in a configuration or in one nested in it, is set so; a family's own choices go on top.
TINY: Mapping[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "d_model": 64,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_heads": 4,
    "n_layers": 2,
    "n_positions": 128,
    "dim": 64,
    "hidden_dim": 96,
    "d_ff": 96,
    "d_kv": 16,
    "d_inner": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "image_size": 48,
    "patch_size": 8,
    "projection_dim": 32,
}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model: choices on top of `TINY`, those of nested configurations by dotted name."""

    config: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "bert": Family(),
    "roberta": Family(),
    "distilbert": Family(),
    "albert": Family(),
    "gpt2": Family(),
    "gptj": Family({"rotary_dim": 8}),
    "gpt_neox": Family(),
    "opt": Family(),
    "bloom": Family(),
    "mpt": Family({"max_seq_len": 128}),
    "llama": Family(),
    "mistral": Family({"sliding_window": 8}),
    "mixtral": Family({"sliding_window": None}),
    "qwen2": Family({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Family(),
    "phi3": Family(),
    "gemma2": Family({"sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": Family({"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
    "t5": Family({"decoder_start_token_id": 0}),
    "bart": Family(),
    "m2m_100": Family(),
    "whisper": Family({"max_source_positions": 50, "max_target_positions": 64, "num_mel_bins": 16}),
    "vit": Family(),
    "dinov2": Family(),
    "clip": Family({"text_config.eos_token_id": 98}),
    "swin": Family(
        {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 3,
            "image_size": 24,
            "patch_size": 2,
        }
    ),
    "deberta-v2": Family({"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}),
    "xlnet": Family(),
    "longformer": Family({"attention_window": [8, 8]}),
    "deepseek_v3": Family(
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "head_dim": 8,
        }
    ),
    "gpt_oss": Family({"sliding_window": 8}),
    "minimax": Family({"block_size": 16}),
}


@dataclass
class Row:
    """One family with one attention implementation. `error` is the largest absolute one; None where nothing ran."""

    family: str
    attention: str
    true: int | None = None
    found: int | None = None
    rewritten: int | None = None
    stray: int | None = None
    error: float | None = None
    scale: float | None = None
    graph_breaks: int | None = None
    compile_s: float | None = None
    note: str = ""

    @property
    def applies(self) -> bool:
        return self.note != NO_SDPA

    @property
    def ok(self) -> bool:
        return not self.applies or (
            self.true is not None
            and self.true == self.found == self.rewritten
            and self.stray == 0
            and self.error is not None
            and self.error <= MAX_ERROR
        )


def tiny_config(name: str) -> Any:
    """The configuration of model type `name`, shrunk. Raises ValueError for a name transformers does not have."""
    family = FAMILIES.get(name, Family())
    config = transformers.AutoConfig.for_model(name)
    _shrink(config, TINY)
    for path, value in family.config.items():
        *parents, last = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, value)
    # Fields that transformers derives from the ones above (layer types, head widths) are derived anew.
    return type(config)(**_without_derived(config.to_dict()))


def _shrink(config: Any, values: Mapping[str, Any]) -> None:
    stored = config.to_dict()
    for key, value in values.items():
        if type(stored.get(key)) is type(value) or (key.endswith("_id") and key in stored):
            setattr(config, key, value)
    for nested in vars(config).values():
        if isinstance(nested, transformers.PretrainedConfig):
            _shrink(nested, values)


def _without_derived(config: dict[str, Any]) -> dict[str, Any]:
    derived = {
        "layer_types",
        "transformers_version",
        "model_type",
        "stage_names",
        "out_features",
        "out_indices",
        "d_head",
    }
    kept = {k: v for k, v in config.items() if k.lstrip("_") not in derived}
    return {k: _without_derived(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in kept.items()}


def build(name: str, attention: str) -> torch.nn.Module:
    """A tiny random model of type `name` in eval mode, fp32, with weights wide enough for attention to be selective."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(tiny_config(name), attn_implementation=attention).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def example_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs for the model's forward: padded token ids, images or audio features, by what it says it takes."""
    torch.manual_seed(1)
    config = model.config
    text = getattr(config, "text_config", config)
    inputs: dict[str, torch.Tensor] = {}
    main = model.main_input_name
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if main == "input_features":
        inputs[main] = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    if main == "pixel_values" or hasattr(config, "vision_config"):
        vision = getattr(config, "vision_config", config)
        inputs["pixel_values"] = torch.randn(BATCH, vision.num_channels, vision.image_size, vision.image_size)
    if main == "input_ids":
        inputs |= _tokens(text.vocab_size, SOURCE_LENGTH if encoder_decoder else LENGTH)
    if encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, text.vocab_size, (BATCH, LENGTH))
    return inputs


def _tokens(vocabulary: int, length: int) -> dict[str, torch.Tensor]:
    ids, mask = torch.randint(3, vocabulary - 1, (BATCH, length)), torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, -5:] = 0
    ids[-1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def attention_modules(model: torch.nn.Module, linear: bool = False) -> dict[str, torch.nn.Module]:
    """The innermost modules named for attention: those that normalise scores, or instead the `linear` ones."""

    def named(module: torch.nn.Module) -> bool:
        return "attention" in type(module).__name__.lower()

    def inner(module: torch.nn.Module) -> bool:
        return not any(named(m) for m in module.modules() if m is not module and _computes(m))

    def wanted(module: torch.nn.Module) -> bool:
        return linear == any(word in type(module).__name__.lower() for word in ("lightning", "linearattention"))

    return {p: m for p, m in model.named_modules() if named(m) and _computes(m) and inner(m) and wanted(m)}


def _computes(module: torch.nn.Module) -> bool:
    """Whether a module is more than an output projection or a norm that carries attention's name."""
    name = type(module).__name__
    return not name.endswith(("Output", "Norm", "Mask", "Bias", "Config", "Embeddings"))


def run(name: str, attention: str, inner: str) -> Row:
    """Builds, counts, optimises, compares. What fails becomes the row's note."""
    row = Row(name, attention)
    try:
        if attention == "sdpa" and not transformers.AutoModel._model_mapping[type(tiny_config(name))]._supports_sdpa:
            return Row(name, attention, note=NO_SDPA)
        model = build(name, attention)
        inputs = example_inputs(model)
        calls: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
            for path, module in attention_modules(model).items()
        ]
        with torch.no_grad():
            expected = _tensors(model(**inputs))
        for hook in hooks:
            hook.remove()
        row.true = len(calls)

        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        started = time.perf_counter()
        fast = einscade.optimize(model, inner=inner)
        with torch.no_grad():
            actual = _tensors(fast(**inputs))
        row.compile_s = time.perf_counter() - started
        row.graph_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        row.error, row.scale = _error(expected, actual)
        beside = attention_modules(model, linear=True)
        sites = [site for site in fast.report.sites if not _inside(site.module_path, beside)]
        row.found = sum(_inside(site.module_path, calls) for site in sites)
        row.stray = len(sites) - row.found
        row.rewritten = sum(site.status == "rewritten" for site in sites if _inside(site.module_path, calls))
        reasons = sorted({site.reason for site in sites if site.status != "rewritten" and site.reason})
        row.note = "; ".join(reasons)
    except Exception as error:
        row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if os.environ.get("ZOO_TRACEBACK"):
            traceback.print_exc()
    return row


def _inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a site's module is one of `modules` or in one. After a graph break in a submodule's forward, Dynamo names
    modules from that submodule on."""
    return any(f".{m}.".endswith(f".{path}.") or path.startswith(m + ".") for m in modules) and path != ""


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every floating tensor of a model's output, in a fixed order; caches are states, not results, and are left out."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in _tensors(value)]
    return []


def _error(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the largest absolute value for scale. NaN anywhere counts as infinite."""
    if len(expected) != len(actual) or not expected:
        raise ValueError(f"the original returned {len(expected)} tensors, the optimised model {len(actual)}")
    differences = [(a.double() - b.double()).abs().max() for a, b in zip(expected, actual, strict=True)]
    worst = float(torch.stack(differences).max())  # unlike Python's max, NaN whenever there is one
    return (float("inf") if math.isnan(worst) else worst), max(float(e.abs().max()) for e in expected)


def _child(connection: Any, name: str, attention: str, inner: str) -> None:
    torch.set_num_threads(1)
    connection.send(run(name, attention, inner))


def run_apart(name: str, attention: str, inner: str, timeout: float) -> Row:
    """`run` in a forked process: a crash, a hang or a leak is this row's, not the table's."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, name, attention, inner), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return Row(name, attention, note=f"no result within {timeout:.0f} s")
        return ours.recv()
    except EOFError:
        process.join(5)
        return Row(name, attention, note=f"the process died with exit code {process.exitcode}")
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


HEADER = ("family", "attention", "true", "found", "rewritten", "stray", "error", "breaks", "compile", "")


def _line(row: Row) -> str:
    def show(value: Any, form: str = "") -> str:
        return "–" if value is None else format(value, form)

    verdict = "" if not row.applies else "ok" if row.ok else "FAIL"
    return (
        f"{row.family:<14}{row.attention:<10}{show(row.true):>5}{show(row.found):>7}{show(row.rewritten):>10}"
        f"{show(row.stray):>7}{show(row.error, '.1e'):>10}{show(row.graph_breaks):>8}"
        f"{show(row.compile_s, '.1f'):>8}s  {verdict:<4}  {row.note[:160]}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"model types; default: {', '.join(FAMILIES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="only this implementation")
    parser.add_argument("--inner", default="eager", help="what compiles the rest of the graph; eager is the quickest")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row")
    args = parser.parse_args(argv)

    rows = []
    if not args.json:
        print("{:<14}{:<10}{:>5}{:>7}{:>10}{:>7}{:>10}{:>8}{:>9}  {}".format(*HEADER))
    for name in args.names or FAMILIES:
        for attention in (args.attention,) if args.attention else ("eager", "sdpa"):
            row = run_apart(name, attention, args.inner, args.timeout)
            rows.append(row)
            if not args.json:
                print(_line(row), flush=True)
    rows = [row for row in rows if row.applies]
    good = sum(row.ok for row in rows)
    if args.json:
        print(json.dumps([asdict(row) | {"ok": row.ok} for row in rows], indent=1))
    else:
        totals = [sum(getattr(row, key) or 0 for row in rows) for key in ("true", "found", "rewritten")]
        print(f"{good} of {len(rows)} rows hold; {totals[0]} sites, {totals[1]} found, {totals[2]} rewritten")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
