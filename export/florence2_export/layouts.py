"""Checkpoint layouts as data: Microsoft's names for the tensors and settings of transformers' native class.

The pairs are those of transformers' convert_florence2_original_pytorch_to_hf.py.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import BartConfig, Florence2Config
from transformers.activations import ACT2FN
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from florence2.fields import short, value_at
from florence2_export.source import CheckpointError, one_line

Layout = Literal["microsoft", "native"]

_LANGUAGE = "model.language_model."
SHARED = _LANGUAGE + "shared.weight"
EMBEDDING_COPIES = (_LANGUAGE + "encoder.embed_tokens.weight", _LANGUAGE + "decoder.embed_tokens.weight")
LM_HEAD = "lm_head.weight"
POSITIONS = (_LANGUAGE + "encoder.embed_positions.weight", _LANGUAGE + "decoder.embed_positions.weight")
TEMPORAL = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
IMAGE_PROJECTION = "model.multi_modal_projector.image_projection.weight"
"""Linear [projection, vision]; Microsoft holds a bare parameter [vision, projection]."""

# BartForConditionalGeneration keeps it under both names, depending on the class that saved.
LOGITS_BIAS = (
    "language_model.final_logits_bias",
    "final_logits_bias",
    "model.language_model.final_logits_bias",
)

POSITION_OFFSET = 2
"""BartLearnedPositionalEmbedding.offset: rows beyond max_position_embeddings."""

# Native name -> Microsoft's, applied one after the other.
_TO_MICROSOFT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.multi_modal_projector\.image_projection\.weight$", "image_projection"),
        (r"^model\.multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
        (r"^model\.multi_modal_projector\.", ""),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.", "vision_tower."),
        (r"^(vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
        (r"^(vision_tower\.blocks\..*_block\.conv[12])\.", r"\1.fn.dw."),
        (r"^(vision_tower\.blocks\..*_attn)\.(qkv|proj)\.", r"\1.fn.\2."),
        (r"^(vision_tower\.blocks\..*spatial_block)\.norm1\.", r"\1.window_attn.norm."),
        (r"^(vision_tower\.blocks\..*channel_block)\.norm1\.", r"\1.channel_attn.norm."),
        (r"^(vision_tower\.blocks\..*_block)\.norm2\.", r"\1.ffn.norm."),
        (r"^(vision_tower\.blocks\..*\.ffn)\.(fc[12])\.", r"\1.fn.net.\2."),
    )
)


def name_in(layout: Layout, native: str) -> str:
    """What the tensor that the native class calls `native` is called in a checkpoint of `layout`."""
    if layout == "microsoft":
        for pattern, replacement in _TO_MICROSOFT:
            native = pattern.sub(replacement, native)
    return native


def find_layout(names: Iterable[str], file: str) -> Layout:
    names = list(names)
    if any(name.startswith("language_model.model.") for name in names):
        return "microsoft"
    if any(name.startswith("model.language_model.") for name in names):
        return "native"
    sample = ", ".join(name[:80] for name in sorted(names)[:3]) or "no tensors"
    raise CheckpointError(
        f"{file}: neither language_model.model.* (Microsoft's layout) nor "
        f"model.language_model.* (transformers'): it holds {sample}; give a Florence-2 checkpoint"
    )


def check_architecture(config: dict[str, Any], file: str, repairs: list[str]) -> None:
    model_type, classes = config.get("model_type"), config.get("architectures") or []
    named = isinstance(classes, list) and any(str(name).startswith("Florence2") for name in classes)
    if model_type == "florence2" and (named or not classes):
        return
    if not named:
        found = f"model_type {short(model_type)}, architectures {short(classes)}"
        raise CheckpointError(f"{file}: {found}: not Florence-2; give a Florence-2 checkpoint")
    repairs.append(f"config.json: model_type {short(model_type)} replaced by 'florence2', as architectures say")


def native_config(config: dict[str, Any], ids: dict[str, Any], file: str) -> Florence2Config:
    """Either layout's config.json as transformers' Florence2Config; `ids` are the special tokens' ids."""
    text, vision = config["text_config"], config["vision_config"]
    _check_supported(text, vision, file)
    text_fields = _present(text, _REQUIRED_TEXT + _OPTIONAL_TEXT)
    try:
        native = Florence2Config(
            text_config=BartConfig(**text_fields | _CONSTANT_TEXT | ids),
            vision_config=Florence2VisionConfig(**_vision_fields(vision)),
            **ids,
        )
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: {one_line(error)}; correct it there") from error
    _check_shapes(native, file)
    return native


def _check_shapes(native: Florence2Config, file: str) -> None:
    """Raises CheckpointError for what the native class divides by, multiplies with or looks up in vain."""
    # transformers types its sub-configs as dicts too.
    text: Any = native.text_config
    vision: Any = native.vision_config
    stages = {name: len(getattr(vision, name)) for name in _PER_STAGE}
    if len(set(stages.values())) != 1:
        raise CheckpointError(f"{file}: vision_config's lists differ in length: {stages}; one entry a stage")
    divided = [("text_config.d_model", text.d_model, f"text_config.{name}", getattr(text, name)) for name in _HEADS]
    for name in ("num_heads", "num_groups"):
        parts = zip(vision.embed_dim, getattr(vision, name), strict=True)
        divided += [("vision_config.embed_dim", width, f"vision_config.{name}", count) for width, count in parts]
    # Half of its columns are sines, half cosines.
    divided.append(("vision_config.embed_dim", vision.embed_dim[-1], "two, in the last stage", 2))
    for whole, width, part, count in divided:
        if width % count:
            raise CheckpointError(f"{file}: {whole} {width} is not divisible by {part} {count}; correct it there")
    if vision.projection_dim != text.d_model:
        what = f"vision_config.projection_dim {vision.projection_dim} is not text_config.d_model {text.d_model}"
        raise CheckpointError(f"{file}: {what}; the language model reads the projected features")
    for part, config in (("text_config", text), ("vision_config", vision)):
        if config.activation_function not in ACT2FN:
            what = f"{part}.activation_function is {short(config.activation_function)}"
            raise CheckpointError(f"{file}: {what}, which transformers does not have; correct it there")


_HEADS = ("encoder_attention_heads", "decoder_attention_heads")


_REQUIRED_TEXT = (
    "vocab_size",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
_OPTIONAL_TEXT = (
    "max_position_embeddings",
    "activation_function",
    "scale_embedding",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "init_std",
    "use_cache",
    "decoder_start_token_id",
    "forced_eos_token_id",
)
# The embedding's copies are one table in all that loads; the top level says whether the head is too.
_CONSTANT_TEXT = {"tie_word_embeddings": True, "is_encoder_decoder": True, "is_decoder": False}

_VISION = (
    "in_channels",
    "depths",
    "patch_size",
    "patch_stride",
    "patch_padding",
    "patch_prenorm",
    "embed_dim",
    "num_heads",
    "num_groups",
    "window_size",
    "drop_path_rate",
    "mlp_ratio",
    "qkv_bias",
    "activation_function",
    "projection_dim",
    "max_temporal_embeddings",
    "max_position_embeddings",
    "initializer_range",
)


_PER_STAGE = (
    "embed_dim",
    "depths",
    "patch_size",
    "patch_stride",
    "patch_padding",
    "patch_prenorm",
    "num_heads",
    "num_groups",
)


def _present(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _vision_fields(vision: dict[str, Any]) -> dict[str, Any]:
    """Native names win: checkpoints converted by transformers 4.56 may carry Microsoft's beside them."""
    position, temporal = vision.get("image_pos_embed") or {}, vision.get("visual_temporal_embedding") or {}
    microsoft = {
        "embed_dim": vision.get("dim_embed"),
        "max_position_embeddings": vision.get("max_pos_embeddings", position.get("max_pos_embeddings")),
        "max_temporal_embeddings": temporal.get("max_temporal_embeddings"),
    }
    return _present(microsoft, microsoft) | _present(vision, _VISION)


# What other values would ask for is in neither implementation's released models, and not in the native class.
_SUPPORTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "text_config": {
        "normalize_before": (False, None),
        "add_final_layer_norm": (False, None),
        "add_bias_logits": (False, None),
        "model_type": ("florence2_language", "bart", "", None),
    },
    "vision_config": {
        "image_feature_source": (["spatial_avg_pool", "temporal_avg_pool"], None),
        "image_pos_embed.type": ("learned_abs_2d", None),
        "visual_temporal_embedding.type": ("COSINE", None),
        "model_type": ("davit", "florence_vision", "", None),
    },
}


def _check_supported(text: dict[str, Any], vision: dict[str, Any], file: str) -> None:
    for part, values in (("text_config", text), ("vision_config", vision)):
        for key, allowed in _SUPPORTED[part].items():
            value = value_at(values, key, f"{file}: {part}.")
            if value not in allowed:
                raise CheckpointError(
                    f"{file}: {part}.{key} is {short(value)}, which is not Florence-2; expected {allowed[0]!r}"
                )
    missing = [f"text_config.{name}" for name in _REQUIRED_TEXT if text.get(name) is None]
    missing += [] if vision.get("embed_dim") or vision.get("dim_embed") else ["vision_config.dim_embed"]
    missing += [] if vision.get("projection_dim") else ["vision_config.projection_dim"]
    if missing:
        raise CheckpointError(f"{file}: {', '.join(missing)} missing; copy the file from the checkpoint's base model")
