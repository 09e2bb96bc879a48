"""The demo's Florence-2: the architecture in small, its initialisation, and the folder it is saved in."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from florence2_export.checkpoint_settings import MICROSOFT_BANNED_PHRASES
from florence2_training.saving import post_processor_config
from torch import nn
from transformers import (
    BartConfig,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
)
from transformers.models.florence2 import Florence2VisionConfig

from florence2_demo import bpe

SIDE = 96
GRID = 12
"""The vision tower's last feature map is GRID x GRID."""
IMAGE_TOKENS = GRID * GRID + 1
WIDTH = 128
POSITIONS = 512
ADAM_BETA2 = 0.98


def processor() -> Florence2Processor:
    image_processor = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        resample=3,
        do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        image_seq_length=IMAGE_TOKENS,
    )
    rules = post_processor_config(MICROSOFT_BANNED_PHRASES)
    return Florence2Processor(image_processor, bpe.build(), post_processor_config=rules)


def config(tokenizer) -> Florence2Config:
    vision = Florence2VisionConfig(
        depths=(1, 1, 3, 1),
        patch_stride=(4, 2, 1, 1),
        embed_dim=(32, 64, 128, WIDTH),
        num_heads=(1, 2, 4, 4),
        num_groups=(1, 2, 4, 4),
        window_size=GRID,
        # Stages of a few minutes underfit: stochastic depth only slows them.
        drop_path_rate=0.0,
        projection_dim=WIDTH,
    )
    layers: dict[str, Any] = {"layers": 2, "ffn_dim": 4 * WIDTH, "attention_heads": 4}
    text = BartConfig(
        vocab_size=bpe.vocabulary_size(tokenizer),
        d_model=WIDTH,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in layers.items()},
    )
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)


def generation_config(tokenizer) -> GenerationConfig:
    """Florence-2's own, and a length: transformers stops at 20 tokens where none is given."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_bos_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        num_beams=3,
        no_repeat_ngram_size=3,
        early_stopping=True,
        max_length=POSITIONS,
    )


def initialise(tokenizer, seed: int) -> Florence2ForConditionalGeneration:
    torch.manual_seed(seed)
    model = Florence2ForConditionalGeneration(config(tokenizer))
    model.generation_config = generation_config(tokenizer)
    for module in model.modules():
        _fan_in(module)
    embeddings = model.lm_head.weight
    first = tokenizer.convert_tokens_to_ids("<loc_0>")
    with torch.no_grad():
        embeddings[first : first + 1000] = _fourier(1000, WIDTH) * WIDTH**-0.5
    model.tie_weights()
    return model


@torch.no_grad()
def _fan_in(module: nn.Module) -> None:
    """Unit variance through every layer; at these widths transformers' 0.02 is too small to learn from."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


def _fourier(count: int, width: int) -> torch.Tensor:
    """[count, width] of unit variance: neighbouring locations start as neighbours, also in the tied head."""
    frequencies = 0.5 * 2.0 ** torch.linspace(0, 7, width // 2)
    angles = 2 * np.pi * torch.arange(count)[:, None] / count * frequencies
    return 2**0.5 * torch.cat([angles.sin(), angles.cos()], dim=1)


def save(model: Florence2ForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Native layout; `model` itself is rounded to what is saved."""
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(folder)
    model.float()
    (folder / "model.safetensors").chmod(0o644)
    processor().save_pretrained(folder)
