"""Tiny random Florence-2 checkpoints of every layout, written the way their authors' tools write them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

MICROSOFT_FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "microsoft_layout"

SIDE = 64
BASE_TOKENS = 300
FLORENCE_TOKENS = 1024
ROWS = BASE_TOKENS + FLORENCE_TOKENS

IDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
GENERATION = {
    **IDS,
    "decoder_start_token_id": 2,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 2,
    "early_stopping": True,
    "no_repeat_ngram_size": 3,
    "num_beams": 3,
}
PREPROCESSOR = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "CLIPImageProcessor",
    "image_seq_length": 5,
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
}
BANNED = ["it", "the image"]

State = dict[str, Tensor]


def random_model(rows: int = ROWS, positions: int = 64, seed: int = 0) -> Florence2ForConditionalGeneration:
    """One layer and one block a stage; everything else as in Florence-2."""
    text = BartConfig(
        vocab_size=rows,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=positions,
    )
    vision = Florence2VisionConfig(
        embed_dim=[8, 12, 16, 20],
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        num_groups=[2, 2, 2, 2],
        window_size=4,
        projection_dim=16,
    )
    torch.manual_seed(seed)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=rows, **IDS)
    model = Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Fresh biases and norms are constants: with them a swapped pair would go unnoticed.
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def base_tokenizer(words: int = BASE_TOKENS) -> Tokenizer:
    """BART's arrangement: `<s>` `<pad>` `</s>` `<unk>`, bytes, words, `<mask>` last; next to no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "th", "the", "Ġthe", "im", "ag"]
    vocabulary += [f"filler{index}" for index in range(words - len(vocabulary) - 1)] + ["<mask>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "m"), ("a", "g")]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in vocabulary[:4]])
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, lstrip=True)])
    return tokenizer


def florence_tokens() -> list[str]:
    """Written out here as in Microsoft's processor, so that the package's list is compared with something."""
    before = ["<od>", "</od>", "<ocr>", "</ocr>"]
    pairs = ["cap", "ncap", "dcap", "grounding", "seg"]
    after = [token for name in pairs for token in (f"<{name}>", f"</{name}>")] + ["<sep>"]
    pairs = ["region_cap", "region_to_desciption", "proposal", "poly"]
    after += [token for name in pairs for token in (f"<{name}>", f"</{name}>")] + ["<and>"]
    return before + [f"<loc_{index}>" for index in range(1000)] + after


def full_tokenizer(words: int = BASE_TOKENS, image: bool = False) -> Tokenizer:
    tokenizer = base_tokenizer(words)
    tokens = florence_tokens() + (["<image>"] if image else [])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return tokenizer


# Microsoft's name -> native; the package goes the other way, with rules of its own.
_FROM_MICROSOFT = (
    (r"^image_projection$", "model.multi_modal_projector.image_projection.weight"),
    (r"^image_pos_embed\.", "model.multi_modal_projector.image_position_embed."),
    (r"^(image_proj_norm|visual_temporal_embed)\.", r"model.multi_modal_projector.\1."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.convs\.(\d)\.proj\.", r"model.vision_tower.convs.\1.conv."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"\.fn\.dw\.", "."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"_attn\.fn\.", "_attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".ffn."),
)


def from_microsoft(name: str) -> str:
    for pattern, replacement in _FROM_MICROSOFT:
        name = re.sub(pattern, replacement, name)
    return name


def microsoft_names(depths: list[int], layers: tuple[int, int]) -> list[str]:
    """Every tensor that Microsoft's class has, tied copies included, for these depths."""
    names = ["image_projection", "language_model.final_logits_bias", "language_model.lm_head.weight"]
    names += [f"image_pos_embed.{axis}_embeddings.weight" for axis in ("row", "column")]
    names += ["visual_temporal_embed.pos_idx_to_embed", "language_model.model.shared.weight"]
    modules = ["image_proj_norm"]
    for stage, depth in enumerate(depths):
        modules += [f"vision_tower.convs.{stage}.{part}" for part in ("proj", "norm")]
        for block in range(depth):
            modules += [
                f"vision_tower.blocks.{stage}.{block}.{kind}_block.{part}"
                for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn"))
                for part in (
                    *("conv1.fn.dw", "conv2.fn.dw", "ffn.norm", "ffn.fn.net.fc1", "ffn.fn.net.fc2"),
                    *(f"{attention}.norm", f"{attention}.fn.qkv", f"{attention}.fn.proj"),
                )
            ]
    for side, count in zip(("encoder", "decoder"), layers, strict=True):
        stack = f"language_model.model.{side}"
        names += [f"{stack}.embed_tokens.weight", f"{stack}.embed_positions.weight"]
        modules.append(f"{stack}.layernorm_embedding")
        attentions = ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn")
        for layer in range(count):
            modules += [f"{stack}.layers.{layer}.{part}" for part in ("fc1", "fc2", "final_layer_norm")]
            for attention in attentions:
                modules.append(f"{stack}.layers.{layer}.{attention}_layer_norm")
                parts = ("q_proj", "k_proj", "v_proj", "out_proj")
                modules += [f"{stack}.layers.{layer}.{attention}.{part}" for part in parts]
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


TIED = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def microsoft_state(model: Florence2ForConditionalGeneration, tied_copies: bool = False) -> State:
    native = model.state_dict()
    config: Any = model.config
    state = {}
    for name in microsoft_names(config.vision_config.depths, (config.text_config.encoder_layers,) * 2):
        if name == "language_model.final_logits_bias":
            state[name] = torch.zeros(1, config.text_config.vocab_size)
        elif tied_copies or not name.endswith(TIED):
            tensor = native[from_microsoft(name)]
            state[name] = (tensor.T if name == "image_projection" else tensor).contiguous().clone()
    return state


def native_state(model: Florence2ForConditionalGeneration, tied_copies: bool = False) -> State:
    state = model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if tied_copies or not name.endswith(TIED)}


def microsoft_config(model: Florence2ForConditionalGeneration) -> dict[str, Any]:
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    same = (
        "depths",
        "patch_size",
        "patch_stride",
        "patch_padding",
        "patch_prenorm",
        "num_heads",
        "num_groups",
    )
    return {
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
        "model_type": "florence2",
        "is_encoder_decoder": True,
        **IDS,
        "projection_dim": vision.projection_dim,
        "text_config": {
            **{key: value for key, value in text.to_dict().items() if key not in ("model_type", "dtype")},
            **GENERATION,
            "model_type": "florence2_language",
            "normalize_before": False,
            "add_final_layer_norm": False,
            "max_length": 20,
            "length_penalty": 1.0,
        },
        "vision_config": {
            "model_type": "davit",
            **{key: list(getattr(vision, key)) for key in same},
            "window_size": vision.window_size,
            "drop_path_rate": 0.1,
            "projection_dim": vision.projection_dim,
            "dim_embed": list(vision.embed_dim),
            "image_pos_embed": {
                "type": "learned_abs_2d",
                "max_pos_embeddings": vision.max_position_embeddings,
            },
            "visual_temporal_embedding": {
                "type": "COSINE",
                "max_temporal_embeddings": vision.max_temporal_embeddings,
            },
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, content)


def write_safetensors(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded(folder: Path, state: State, suffix: str = "safetensors", shards: int = 3) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: state[name] for name in list(state)[number::shards]}
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def remove_weights(folder: Path) -> None:
    for pattern in ("model*.safetensors*", "pytorch_model*"):
        for path in folder.glob(pattern):
            path.unlink()


def write_microsoft(folder: Path, model: Florence2ForConditionalGeneration, words: int = BASE_TOKENS) -> Path:
    """As on microsoft/Florence-2-*: the tokenizer has the base vocabulary only."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", microsoft_config(model))
    write_json(folder / "generation_config.json", GENERATION)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    base_tokenizer(words).save(str(folder / "tokenizer.json"))
    write_safetensors(folder, microsoft_state(model))
    return folder


def write_native(
    folder: Path, model: Florence2ForConditionalGeneration, words: int = BASE_TOKENS, nested: bool = True
) -> Path:
    """As transformers saves it: the image processor in processor_config.json (5.x), or beside it (4.56)."""
    model.save_pretrained(folder)
    write_json(folder / "generation_config.json", GENERATION)
    processor: dict[str, Any] = {
        "processor_class": "Florence2Processor",
        "post_processor_config": {"phrase_grounding": {"banned_grounding_tokens": BANNED}},
    }
    if nested:
        processor["image_processor"] = PREPROCESSOR
    else:
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)
    write_json(folder / "processor_config.json", processor)
    has_image_row = model.config.get_text_config().vocab_size > words + FLORENCE_TOKENS
    full_tokenizer(words, image=has_image_row).save(str(folder / "tokenizer.json"))
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def logits(model: Florence2ForConditionalGeneration) -> Tensor:
    """[1, 4, rows] for fixed pixels, prompt and decoder tokens; no image token is embedded."""
    with torch.no_grad():
        pixels = torch.linspace(-1, 1, 3 * SIDE * SIDE).view(1, 3, SIDE, SIDE).sin()
        prompt = torch.tensor([[0, 40, 50, 60, 2]])
        features = model.get_image_features(pixels).pooler_output
        embeds = torch.cat([features, model.get_input_embeddings()(prompt)], dim=1)
        decoder = torch.tensor([[2, 0, 70, 80]])
        return model(inputs_embeds=embeds, decoder_input_ids=decoder).logits
