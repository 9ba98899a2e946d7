"""Tiny random models of transformers' architectures, from the name of the model type alone.

Comes in: a model type and an attention implementation. Goes out: a `Tiny`, a model in eval mode in fp32 with inputs
that its forward accepts. Configurations are shrunk by the names of their fields, narrow at first; where widths depend
on each other in ways that names do not tell, wider. `CHOICES` are what a tiny model of a type needs to have the
structure that a real one has (a window smaller than the sequence, both kinds of layers). `CannotShrink` says why no
attempt gave a model that runs.

The weights are drawn wider than transformers initialises them: with its 0.02 every attention is close to uniform, and a
wrong mask or scale would hide in the rounding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["CHOICES", "CannotShrink", "Lengths", "Tiny", "has_sdpa", "tiny"]

MOST_PARAMETERS = 60_000_000
BATCH = 2

# Any field of these names, in a configuration or in one nested in it, is set so; a type's own choices go on top.
_COUNTS: Mapping[str, Any] = {
    "vocab_size": 99,
    "entity_vocab_size": 99,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "depth": 2,
    "num_hidden_groups": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_frames": 4,
    "image_size": 48,
    "patch_size": 8,
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_WIDTHS: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 16,
    "d_model": 64,
    "n_embd": 64,
    "emb_dim": 64,
    "embed_dim": 64,
    "dim": 64,
    "hidden_dim": 96,
    "d_ff": 96,
    "d_kv": 16,
    "d_inner": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "projection_dim": 32,
    "num_mel_bins": 16,
}
_WIDER = {name: 8 * width for name, width in _WIDTHS.items()}
_LONGER = {name: 4 * _COUNTS[name] for name in ("max_position_embeddings", "n_positions")}
_ATTEMPTS: Mapping[str, Mapping[str, Any]] = {
    "narrow": {**_COUNTS, **_WIDTHS},
    "wider": {**_COUNTS, **_WIDER},
    "as wide as the type's default": _COUNTS,
}
_WIDE_ATTEMPTS = {"wide": {**_COUNTS, **_WIDER, **_LONGER}, **_ATTEMPTS}  # heads of 64 and 128, as real models have

# Choices by the dotted names of configuration fields.
CHOICES: Mapping[str, Mapping[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "mpt": {"max_seq_len": 128},
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "t5": {"decoder_start_token_id": 0},
    "whisper": {"max_source_positions": 50, "max_target_positions": 64},
    "clip": {"text_config.eos_token_id": 98},
    "swin": {
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 3,
        "image_size": 24,
        "patch_size": 2,
    },
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "longformer": {"attention_window": [8, 8]},
    "deepseek_v3": {
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
    },
    "gpt_oss": {"sliding_window": 8},
    "minimax": {"block_size": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
}


class CannotShrink(ValueError):
    """No tiny model of this type that runs could be made; the message has what was tried and why it failed."""


@dataclass(frozen=True)
class Lengths:
    """Of the sequences. 37 divides nothing and equals no width; the encoder's differs, so that cross attention is not
    square."""

    target: int = 37
    source: int = 43


LONG = Lengths(target=293, source=331)


@dataclass(frozen=True)
class Tiny:
    """A model, and the inputs of the form and the lengths that its forward was seen to accept."""

    model: nn.Module
    form: tuple[Form, ...]
    lengths: Lengths = Lengths()

    def inputs(self, lengths: Lengths | None = None) -> dict[str, Tensor]:
        """The same tensors for the same lengths, whenever they are asked for."""
        return _inputs(self.model, self.form, lengths or self.lengths)


def has_sdpa(name: str) -> bool:
    """Whether transformers has a path through scaled_dot_product_attention for model type `name`."""
    return bool(_model_class(name)._supports_sdpa)


def tiny(name: str, attention: str, wide: bool = False) -> Tiny:
    """A tiny random model of model type `name`; `wide`: with heads as wide as real ones and sequences of several
    hundred, where that runs. Raises CannotShrink, also for a name that transformers lacks."""
    _model_class(name)
    reasons = []
    for how, values in (_WIDE_ATTEMPTS if wide else _ATTEMPTS).items():
        try:
            model = _build(name, attention, values)
        except Exception as error:  # any library code: whatever it says becomes the reason
            reasons.append(f"{how}: {_first_line(error)}")
            continue
        for lengths in (LONG, Lengths()) if how == "wide" else (Lengths(),):
            for form in _forms(model):
                try:
                    with torch.no_grad():
                        model(**_inputs(model, form, lengths))
                except Exception as error:
                    called = ", ".join(name for name, _ in form)
                    reasons.append(f"{how}: forward({called}): {_first_line(error)}")
                else:
                    return Tiny(model, form, lengths)
    raise CannotShrink(f"no tiny {name} that runs; say how in CHOICES. Tried {'; '.join(reasons)}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# -- configurations ---------------------------------------------------------------------------------------------------


def _model_class(name: str) -> Any:
    try:
        config = transformers.CONFIG_MAPPING[name]
    except KeyError:
        raise CannotShrink(f"transformers {transformers.__version__} has no model type {name!r}") from None
    try:
        found = transformers.AutoModel._model_mapping[config]
    except KeyError:
        raise CannotShrink(f"transformers' AutoModel has no model for {name!r}") from None
    return found[0] if isinstance(found, (tuple, list)) else found


def _config(name: str, values: Mapping[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(name)
    _shrink(config, values)
    for path, value in CHOICES.get(name, {}).items():
        *parents, last = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, value)
    # Fields that transformers derives from the ones above (layer types, head widths) are derived anew, if they can be.
    made = _without_derived(config.to_dict())
    made.pop("model_type", None)
    kinds = made.pop(_KINDS, None)
    with suppress(TypeError, ValueError, AttributeError, ZeroDivisionError):
        config = type(config)(**made, **({} if kinds is None else {"layer_types": kinds}))
    return config


def _shrink(config: Any, values: Mapping[str, Any]) -> None:
    stored = config.to_dict()
    for key, value in values.items():
        unset = key in stored and stored[key] is None and (key in _COUNTS or key.endswith("_id"))
        if unset or type(stored.get(key)) is type(value) or (key.endswith("_id") and key in stored):
            setattr(config, key, value)
    layers = stored.get("num_hidden_layers")
    kinds = list(dict.fromkeys(stored.get("layer_types") or ()))
    if len(kinds) > 1:  # one layer of each kind
        config.num_hidden_layers = len(kinds)
        config.layer_types = kinds
        setattr(config, _KINDS, kinds)
    for key, value in stored.items():
        if key == "depths":
            config.depths = [1] * len(value)
        elif isinstance(value, list) and len(value) > 2 and len(value) == layers and key not in _DERIVED:
            setattr(config, key, value[: max(2, len(kinds))])
    for nested in vars(config).values():
        if isinstance(nested, transformers.PretrainedConfig):
            _shrink(nested, values)


_KINDS = "kinds_of_layers"  # kept apart from layer_types, which are derived anew where all layers are of one kind
_DERIVED = {
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "transformers_version",
    "stage_names",
    "out_features",
    "out_indices",
    "d_head",
}


def _without_derived(config: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if k.lstrip("_") not in _DERIVED}
    return {k: _without_derived(v) if k.endswith("_config") and isinstance(v, dict) else v for k, v in kept.items()}


def _build(name: str, attention: str, values: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = _config(name, values)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.1f} million parameters")
    model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval().float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


# -- inputs -----------------------------------------------------------------------------------------------------------

Form = tuple[str, Callable[[Any, Lengths], dict[str, Tensor]]]


def _inputs(model: nn.Module, form: tuple[Form, ...], lengths: Lengths) -> dict[str, Tensor]:
    torch.manual_seed(1)
    inputs: dict[str, Tensor] = {}
    for _, make in form:
        inputs |= make(model.config, lengths)
    return inputs


def _forms(model: Any) -> Iterator[tuple[Form, ...]]:
    """What to try to call the model with: every way to make its main input, with and without what it takes beside."""
    accepted = inspect.signature(model.forward).parameters
    named = model.main_input_name if isinstance(model.main_input_name, (list, tuple)) else [model.main_input_name]
    main = next(n for n in (*named, *accepted) if n in accepted)
    needed = [n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    asked = [main, *(n for n in needed if n != main)]
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        asked.append("decoder_input_ids")
    optional = [n for n in ("pixel_values", "bbox", "visual_feats", "visual_pos") if n in accepted and n not in asked]
    for beside in (optional, []) if optional else ([],):
        ways = [[(n, make) for make in _MAKERS.get(n, ())] for n in (*asked, *beside) if n != "attention_mask"]
        yield from itertools.product(*ways)


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tokens(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    """Token ids with the last row padded, and the mask that says so."""
    decoder = getattr(config, "is_encoder_decoder", False)
    n, vocabulary = lengths.source if decoder else lengths.target, _vocabulary(config)
    ids, mask = torch.randint(3, vocabulary - 1, (BATCH, n)), torch.ones(BATCH, n, dtype=torch.long)
    mask[-1, -5:] = 0
    ids[-1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _vocabulary(config: Any) -> int:
    for owner in (config, _text(config)):
        for field in ("vocab_size", "n_vocab", "src_vocab_size"):
            if isinstance(size := getattr(owner, field, None), int):
                return size
    return 64


def _plain_tokens(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    """Token ids alone, for models that take no mask."""
    return {"input_ids": _tokens(config, lengths)["input_ids"].clamp(min=3)}


def _decoder_tokens(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    return {"decoder_input_ids": torch.randint(3, _vocabulary(config) - 1, (BATCH, lengths.target))}


def _field(config: Any, *names: str, default: int) -> int:
    """The first field of these names that holds a number, in the configuration or that of a part of the model."""
    parts = (getattr(config, part, None) for part in ("vision_config", "audio_config", "encoder_config"))
    for owner in (config, *parts):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, dict):
                value = value.get("height")
            if isinstance(value, int):
                return value
    return default


def _image(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    side = _field(config, "image_size", "input_size", "img_size", default=64)
    return {"pixel_values": torch.randn(BATCH, _field(config, "num_channels", "in_channels", default=3), side, side)}


def _video(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    (image,) = _image(config, lengths).values()
    frames = _field(config, "num_frames", default=4)
    return {"pixel_values": image[:, None].expand(-1, frames, -1, -1, -1) + torch.randn(BATCH, frames, 1, 1, 1)}


def _wave(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 320 * lengths.target)}


def _one_channel(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 1, 320 * lengths.target)}


def _frames(name: str, last: bool) -> Callable[[Any, Lengths], dict[str, Tensor]]:
    def make(config: Any, lengths: Lengths) -> dict[str, Tensor]:
        width = _field(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", default=80)
        n = 4 * lengths.target if last else 2 * _field(config, "max_source_positions", default=50)
        n = _field(config, "max_length", default=n) if name == "input_values" else n
        return {name: torch.randn(BATCH, n, width) if last else torch.randn(BATCH, width, n)}

    return make


def _boxes(config: Any, lengths: Lengths) -> dict[str, Tensor]:
    corner, size = torch.randint(0, 60, (BATCH, lengths.target, 2)), torch.randint(1, 30, (BATCH, lengths.target, 2))
    return {"bbox": torch.cat((corner, corner + size), -1)}


_MAKERS: Mapping[str, tuple[Callable[[Any, Lengths], dict[str, Tensor]], ...]] = {
    "input_ids": (_tokens, _plain_tokens),
    "decoder_input_ids": (_decoder_tokens,),
    "pixel_values": (_image, _video),
    "pixel_values_videos": (lambda c, n: {"pixel_values_videos": _video(c, n)["pixel_values"]},),
    "input_values": (_wave, _one_channel, _frames("input_values", last=True)),
    "input_features": (_frames("input_features", last=False), _frames("input_features", last=True)),
    "bbox": (_boxes,),
    "visual_feats": (lambda c, n: {"visual_feats": torch.randn(BATCH, 11, c.visual_feat_dim)},),
    "visual_pos": (lambda c, n: {"visual_pos": torch.rand(BATCH, 11, c.visual_pos_dim)},),
    "inputs": (lambda c, n: {"inputs": torch.randn(BATCH, n.target, c.d_model)},),
    "inputs_embeds": (lambda c, n: {"inputs_embeds": torch.randn(BATCH, n.target, _text(c).hidden_size)},),
    "hidden_states": (lambda c, n: {"hidden_states": torch.randn(BATCH, n.target, c.hidden_size)},),
}
