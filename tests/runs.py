"""Small fine-tuning runs: random pictures, a few samples, a tiny random model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints as make
import numpy as np
import torch
from florence2_export.checkpoint import Checkpoint, load_checkpoint
from florence2_export.export import sizes_of
from florence2_training import trainable
from florence2_training.corpus import Corpus, Tokens, read_corpus
from florence2_training.objective import Batches
from florence2_training.recipe import Recipe, Source
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from florence2.prompts import PromptEncoder

ROWS = 1344
"""With a row for <image>, rounded up as transformers' converter does."""

SAMPLES = [
    (0, "<CAPTION>", "a cat"),
    (0, "<OD>", "cat<loc_1><loc_2><loc_300><loc_400>dog<loc_5><loc_6><loc_700><loc_800>"),
    (1, "<CAPTION>", "the dog and the image"),
    (2, "what?", "no"),
    (1, "<OD>", "dog<loc_10><loc_20><loc_30><loc_40>"),
    (3, "<CAPTION>", "them"),
    (2, "<OCR>", "the age of the cat, in full"),
]
"""Place of the picture, prompt, answer."""


def model(dropout: float = 0.0, drop_path: float = 0.0, rows: int = ROWS, positions: int = 128, seed: int = 0) -> Any:
    made: Any = make.random_model(rows, positions, seed)
    made.config.text_config.dropout = dropout
    made.config.vision_config.drop_path_rate = drop_path
    return made


def native(folder: Path, **given: Any) -> Path:
    return make.write_native(folder, model(**given))


def pictures(folder: Path, count: int = 4) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def lines(file: Path, samples: Sequence[tuple[int, str, str]] = tuple(SAMPLES)) -> Path:
    """With its pictures beside it."""
    names = pictures(file.parent / "pictures")
    file.write_text(
        "".join(
            json.dumps({"image": str(names[picture]), "prefix": prompt, "suffix": answer}) + "\n"
            for picture, prompt, answer in samples
        )
    )
    return file


def recipe(folder: Path, **given: Any) -> Recipe:
    """Full fine-tuning without workers; `model` and `data` are made in `folder` where they are not there."""
    data = folder / "train.jsonl"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines(data)
    if "model" not in given and not (folder / "model").exists():
        native(folder / "model")
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "train": [Source(data=str(data))],
        "method": "full",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "save_steps": 1,
    }
    return Recipe(**settings | given)


def weights(run: Path) -> dict[str, Tensor]:
    """What the last checkpoint of a run holds."""
    last = sorted(run.glob("checkpoint-*"))[-1]
    return load_file(next(last.glob("*.safetensors")))


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def loaded(folder: Path, dropout: float = 0.0, drop_path: float = 0.0, trained: bool = True) -> Checkpoint:
    """A fresh native checkpoint, its weights ready to be trained."""
    checkpoint = load_checkpoint(str(native(folder, dropout=dropout, drop_path=drop_path)))
    if trained:
        trainable.freeze(checkpoint.model, [])
    return checkpoint


def tokens(checkpoint: Checkpoint, long_answers: str = "refuse") -> Tokens:
    return Tokens(PromptEncoder(checkpoint.tokenizer, sizes_of(checkpoint)), long_answers)


def corpus(checkpoint: Checkpoint, folder: Path, samples: Sequence[tuple[int, str, str]] = tuple(SAMPLES)) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    data = lines(folder / "given.jsonl", samples)
    return read_corpus([Source(data=str(data))], tokens(checkpoint), folder / "corpus.jsonl")


def batches(checkpoint: Checkpoint, folder: Path, features: Any = None, **given: Any) -> Batches:
    found = corpus(checkpoint, folder, **given)
    return Batches([found], tokens(checkpoint), checkpoint.preprocessor, features)


def greedy(model: Any, checkpoint: Checkpoint, picture: Path, prompt: str, new_tokens: int = 40) -> str:
    """transformers' own generate."""
    from florence2_export.pixel_values import normalised
    from florence2_training.pixels import read_pixels
    from transformers.modeling_outputs import BaseModelOutput

    model.eval()
    ids = torch.tensor([tokens(checkpoint).prompt(prompt)])
    pixels = normalised(torch.from_numpy(read_pixels([str(picture)], checkpoint.preprocessor)), checkpoint.preprocessor)
    with torch.no_grad():
        seen = model.get_image_features(pixels).pooler_output
        embedded = torch.cat([seen, model.get_input_embeddings()(ids)], dim=1)
        encoded = model.get_encoder()(inputs_embeds=embedded).last_hidden_state
        out = model.generate(
            encoder_outputs=BaseModelOutput(encoded),
            attention_mask=torch.ones(encoded.shape[:2], dtype=torch.int64),
            num_beams=1,
            early_stopping=False,
            max_new_tokens=new_tokens,
            no_repeat_ngram_size=0,
        )
    return checkpoint.tokenizer.decode(out[0].tolist(), skip_special_tokens=False)
