"""A model as a checkpoint's folder: transformers' native layout, or Microsoft's, each complete and clean."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from florence2_export.checkpoint import Checkpoint
from florence2_export.layouts import IMAGE_PROJECTION, LOGITS_BIAS, SHARED, name_in
from florence2_export.tokenizer import FLORENCE_TOKENS, IMAGE
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, Florence2Processor, GenerationConfig, RobertaTokenizer
from transformers.utils import logging

_ROWS = 64
"""transformers' converter rounds the vocabulary up to a multiple of this."""
_MICROSOFT_CODE = "microsoft/Florence-2-base"
_OCR_PATTERN = "(.+?)" + r"<loc_(\d+)>" * 8


def make_native(checkpoint: Checkpoint) -> None:
    """Gives the model what the native class needs, in place, before it is trained or saved.

    It reads a picture through an `<image>` token, which Microsoft's checkpoints have no row for: it is added as
    transformers' converter adds it. What the added rows hold is never generated: see `_grow`.
    """
    model: Any = checkpoint.model
    tokenizer: Any = checkpoint.tokenizer
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False, special=True)])
    image = tokenizer.token_to_id(IMAGE)
    if image >= model.config.text_config.vocab_size:
        _grow(model, -(-tokenizer.get_vocab_size() // _ROWS) * _ROWS, tokenizer.token_to_id("<unk>"))
    model.config.image_token_id = image


def save_native(checkpoint: Checkpoint, folder: Path) -> None:
    """What `Florence2ForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` load, of a model
    that `make_native` has seen."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = checkpoint.model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        # Its bar would run through the one of a training.
        logging.disable_progress_bar()
        model.save_pretrained(folder)
    finally:
        model.generation_config = own
    (folder / "model.safetensors").chmod(0o644)
    # As it was read: transformers refuses to save settings that say nothing together, such as those of beams with one.
    kept = {key: value for key, value in checkpoint.generation.items() if not key.startswith("_")}
    _write(folder / "generation_config.json", kept)
    _processor(checkpoint).save_pretrained(folder)


def save_microsoft(checkpoint: Checkpoint, folder: Path) -> None:
    """What `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)` loads with Microsoft's code, which
    config.json names by its repository."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = checkpoint.tokenizer.get_vocab()
    rows = max(ids[token] for token in FLORENCE_TOKENS) + 1
    native = {name: tensor for name, tensor in checkpoint.model.state_dict().items()}
    own_head = not checkpoint.model.config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    for name, tensor in native.items():
        if name.endswith("embed_tokens.weight") or (name == "lm_head.weight" and not own_head):
            continue
        tensor = tensor[:rows] if name in (SHARED, "lm_head.weight") else tensor
        tensor = tensor.T if name == IMAGE_PROJECTION else tensor
        state[name_in("microsoft", name)] = tensor.contiguous().clone()
    state[LOGITS_BIAS[0]] = torch.zeros(1, rows)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _microsoft_config(checkpoint, rows))
    _write(folder / "generation_config.json", checkpoint.generation)
    size = checkpoint.preprocessor["size"]
    extra = {"crop_size": size, "image_processor_type": "CLIPImageProcessor", "processor_class": "Florence2Processor"}
    auto_map = {"AutoProcessor": f"{_MICROSOFT_CODE}--processing_florence2.Florence2Processor"}
    _write(folder / "preprocessor_config.json", {**checkpoint.preprocessor, **extra, "auto_map": auto_map})
    checkpoint.tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>"}
    positions = _positions(checkpoint)
    settings = {**names, "sep_token": "</s>", "mask_token": "<mask>", "add_prefix_space": False}
    _write(
        folder / "tokenizer_config.json",
        {**settings, "model_max_length": positions, "tokenizer_class": "BartTokenizer", "errors": "replace"},
    )
    vocabulary = json.loads(checkpoint.tokenizer.to_str())["model"]
    _write(folder / "vocab.json", vocabulary["vocab"])
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _positions(checkpoint: Checkpoint) -> int:
    config: Any = checkpoint.model.config
    return int(config.text_config.max_position_embeddings)


def _microsoft_config(checkpoint: Checkpoint, rows: int) -> dict[str, Any]:
    config: Any = checkpoint.model.config
    vision, text = config.vision_config, config.text_config.to_dict()
    ids = {key: checkpoint.generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    same = ("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups")
    positions = {"type": "learned_abs_2d", "max_pos_embeddings": vision.max_position_embeddings}
    temporal = {"type": "COSINE", "max_temporal_embeddings": vision.max_temporal_embeddings}
    code = f"{_MICROSOFT_CODE}--"
    tied = bool(config.tie_word_embeddings)
    dropped = ("dtype", "_name_or_path", "architectures", "transformers_version", "model_type", "id2label", "label2id")
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{code}configuration_florence2.Florence2Config",
            "AutoModelForCausalLM": f"{code}modeling_florence2.Florence2ForConditionalGeneration",
        },
        "model_type": "florence2",
        "is_encoder_decoder": True,
        "projection_dim": vision.projection_dim,
        "vocab_size": rows,
        "ignore_index": -100,
        "torch_dtype": "float32",
        "tie_word_embeddings": tied,
        **ids,
        "text_config": {
            **{key: value for key, value in text.items() if key not in dropped},
            **{key: value for key, value in checkpoint.generation.items() if not key.startswith("_")},
            "model_type": "florence2_language",
            "vocab_size": rows,
            "normalize_before": False,
            "add_final_layer_norm": False,
            "normalize_embedding": True,
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "model_type": "davit",
            **{key: list(getattr(vision, key)) for key in same},
            "dim_embed": list(vision.embed_dim),
            "window_size": vision.window_size,
            "drop_path_rate": vision.drop_path_rate,
            "enable_checkpoint": False,
            "projection_dim": vision.projection_dim,
            "image_pos_embed": positions,
            "visual_temporal_embedding": temporal,
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


@torch.no_grad()
def _grow(model: Any, rows: int, like: int) -> None:
    """Rows behind the last are copies of `<unk>`'s: a head without bias then gives them its logit, never more than what
    would have won before. Rows of zeros, or random ones, can win."""
    tables = [model.model.language_model.shared]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head)
    for table in tables:
        more = table.weight[like].expand(rows - len(table.weight), -1)
        table.weight = nn.Parameter(torch.cat([table.weight, more]), requires_grad=False)
    language = model.model.language_model
    language.shared.num_embeddings = rows
    for stack in (language.encoder, language.decoder):
        stack.embed_tokens.weight = language.shared.weight
        stack.embed_tokens.num_embeddings = rows
    if model.config.tie_word_embeddings:
        model.lm_head.weight = language.shared.weight
    model.lm_head.out_features = rows
    model.config.text_config.vocab_size = rows


def _processor(checkpoint: Checkpoint) -> Florence2Processor:
    given = checkpoint.preprocessor
    names = ("size", "resample", "rescale_factor", "image_mean", "image_std", "image_seq_length")
    image_processor = CLIPImageProcessorPil(
        **{name: given[name] for name in names}, do_center_crop=False, crop_size=given["size"]
    )
    tokenizer = RobertaTokenizer(
        tokenizer_object=checkpoint.tokenizer,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=_positions(checkpoint),
    )
    rules = post_processor_config(checkpoint.banned_grounding_phrases)
    return Florence2Processor(image_processor, tokenizer, post_processor_config=rules)


def post_processor_config(banned_grounding_phrases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What transformers' processor reads of each kind of answer."""
    answers = ("pure_text", "description_with_bboxes", "description_with_polygons", "polygons", "bboxes")
    return {
        "ocr": {"pattern": _OCR_PATTERN, "area_threshold": 0.0},
        "phrase_grounding": {"banned_grounding_tokens": list(banned_grounding_phrases)},
        **{answer: {} for answer in (*answers, "description_with_bboxes_or_polygons")},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def set_no_repeat_ngram_size(checkpoint: Checkpoint, size: int) -> None:
    checkpoint.generation["no_repeat_ngram_size"] = size
    checkpoint.model.generation_config.no_repeat_ngram_size = size
