"""Florence-2 checkpoints of the true sizes with random weights, so that nothing is downloaded.

python benchmarks/random_checkpoint.py FOLDER base|large
"""

import sys
from pathlib import Path

import torch
from transformers import (
    BartConfig,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from checkpoints import GENERATION, IDS, full_tokenizer

BART_WORDS = 50265
IMAGE_TOKEN_ID = 51289
ROWS = 51328
"""BART's words, Florence-2's 1024 tokens and `<image>`, filled up to a multiple of 64 as by transformers' converter."""

# config.json of microsoft/Florence-2-base and -large.
TEXT = {
    "base": {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072, "positions": 1024},
    "large": {"d_model": 1024, "layers": 12, "heads": 16, "ffn": 4096, "positions": 4096},
}
VISION = {
    "base": {"embed_dim": [128, 256, 512, 1024], "heads": [4, 8, 16, 32]},
    "large": {"embed_dim": [256, 512, 1024, 2048], "heads": [8, 16, 32, 64]},
}
# With HF's own 0.02 nearly all tokens are equally likely; a trained model is more decided.
EMBEDDING_STD = 0.1


def config(name: str) -> Florence2Config:
    text, vision = TEXT[name], VISION[name]
    return Florence2Config(
        text_config=BartConfig(
            vocab_size=ROWS,
            d_model=text["d_model"],
            encoder_layers=text["layers"],
            decoder_layers=text["layers"],
            encoder_attention_heads=text["heads"],
            decoder_attention_heads=text["heads"],
            encoder_ffn_dim=text["ffn"],
            decoder_ffn_dim=text["ffn"],
            max_position_embeddings=text["positions"],
        ),
        vision_config=Florence2VisionConfig(
            embed_dim=vision["embed_dim"],
            num_heads=vision["heads"],
            num_groups=vision["heads"],
            projection_dim=text["d_model"],
        ),
        image_token_id=IMAGE_TOKEN_ID,
        **IDS,
    )


def processor() -> Florence2Processor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=full_tokenizer(BART_WORDS, image=True),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(
        size={"height": 768, "width": 768},
        do_center_crop=False,
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        image_seq_length=577,
    )
    return Florence2Processor(images, tokenizer, post_processor_config={"description_with_bboxes": {}})


def write(folder: Path, name: str) -> None:
    """A checkpoint as transformers saves it; `name` is "base" or "large"."""
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config(name)).eval()
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    model.generation_config = GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
